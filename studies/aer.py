"""Average episodic returns (AER): run folders, read without torch and MuJoCo, and statistics over their seeds.

No program: studies/compare.py makes tables of it, studies/compare_figures.py figures. A statistic takes strata, a list
of arrays, one for each environment: (seeds,), or (samples, seeds) for a number of each sample.
"""

import csv
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

SETS = ("train", "eval_in", "eval_out")
SCORES = (*SETS, "mean")  # of the three sets
VERSIONS = ("version", "torch", "numpy", "mujoco", "gymnasium")
# no settings that runs must have in common
APART = ("env", "method", "seed", "out", "threads", "device", "snapshots", *VERSIONS)
OWN = ("steps", "K", "mask", "buffer")  # settings whose defaults depend on the environment or the method
METHODS = "dma_star_sh dma_star_h dma_star dma dma_pearl concat da dr".split()  # the paper's
ABLATIONS = "dma_sh rl_adapters no_mask no_input_norm no_output_norm".split()
ABLATIONS += "critic_into_eta actor_into_eta both_into_eta".split()
ABLATIONS += "included terminal fresh apart through_pi scaled_concat scaled_da".split()  # studies/departures.py
METHODS += ABLATIONS
BOUNDS = {  # the largest return: the horizon, where no reward is above 1, unlike in walker_gym and hopper_gym
    "non-overlapping": dict(di_inv=100, di_perm=100, cartpole_inv=1000, cheetah_inv=1000, reacher_easy_inv=1000)
    | dict(reacher_hard_inv=1000, reacher_hard_perm=1000, ode=200, **{f"ode_{k}": 200 for k in range(1, 21)})
    | dict(di_signs=100),
    "overlapping": dict(di_friction=100, ball_in_cup=1000, walker=1000),
}
BOUND = BOUNDS["non-overlapping"] | BOUNDS["overlapping"]


class BadInput(ValueError):
    """Something wrong from outside; its message is the one line that the user sees."""


# ---- Reading ----------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    folder: Path
    config: dict
    metrics: list  # a dict of numbers per evaluation, with the mean of the three sets
    contexts: list  # a dict per context of the last evaluation, once the run is finished
    label: str = ""  # what it is told by in tables and figures

    env = property(lambda run: run.config["env"])
    method = property(lambda run: run.config["method"])
    seed = property(lambda run: run.config["seed"])
    steps = property(lambda run: run.config["steps"])
    finished = property(lambda run: bool(run.contexts))

    @property
    def settings(self):
        return {name: value for name, value in self.config.items() if name not in APART}

    def version(self, name):
        return str(self.config.get(name, "unknown"))


def read_runs(places):
    """All runs in the folders, in an order that does not depend on theirs. BadInput: none in one, or one twice."""
    folders, runs = set(), {}
    for place in places:
        files = list(Path(place).rglob("config.json"))
        if not files:
            raise BadInput(f"{place}: no run there; allowed: folders of runs (with a config.json), or folders of these")
        folders |= {file.resolve().parent for file in files}
    for run in map(read_run, sorted(folders)):
        key = rank(run.env, BOUND), rank(run.method, METHODS), run.seed, json.dumps(run.settings, sort_keys=True)
        if key in runs:
            raise BadInput(f"{run.folder}: the same run as {runs[key].folder}; give only one of them")
        runs[key] = run
    return with_labels([runs[key] for key in sorted(runs)])


def with_labels(runs):
    """Labels them by method and, where a method has several masks, by mask too, but for that of most of its runs."""
    main, mask = {}, lambda run: run.settings.get("mask", "–")
    for method, of in group(runs, lambda run: run.method).items():
        masks = group(of, mask)
        main[method] = max(masks, key=lambda value: sum(run.finished for run in masks[value]))
    other = lambda run: mask(run) != main[run.method]
    return [run._replace(label=run.method + f", mask {mask(run)}" * other(run)) for run in runs]


def read_run(folder):
    """The run in a folder; before its first evaluation it has no tables. BadInput names a file that is of no use."""
    path, metrics, contexts = folder / "config.json", [], []
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        for name, kind in dict(env=str, method=str, seed=int, steps=int).items():
            if type(config.get(name)) is not kind:
                raise ValueError(f"its {name} is {config.get(name)!r}")
        path = folder / "metrics.csv"
        if path.exists():
            metrics = read_table(path, ("step", "seconds", *SETS))
        for row in metrics:
            row["mean"] = sum(row[name] for name in SETS) / 3
        if metrics and metrics[-1]["step"] == config["steps"]:
            path = folder / "per_context.csv"
            contexts = [row for row in read_table(path, ("step", "index", "return")) if row["step"] == config["steps"]]
            if {row["set"] for row in contexts} != set(SETS):
                raise ValueError(f"not all of {', '.join(SETS)} at step {config['steps']}")
    except (ValueError, TypeError, KeyError, AttributeError, csv.Error) as error:
        raise BadInput(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    return Run(folder, config, metrics, contexts)


def read_table(path, needed):
    """The rows of a CSV file as dicts of numbers, but for the column `set`."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := set(needed) - set(reader.fieldnames or ()):
            raise ValueError(f"no column {min(missing)}")
        rows = [{k: v if k == "set" else float(v) for k, v in row.items()} for row in reader]
    if bad := [name for row in rows for name in needed if not math.isfinite(row[name])]:
        raise ValueError(f"a {bad[0]} that is no finite number")
    return rows


# ---- What may be compared ---------------------------------------------------------------------------------------


def rank(name, names):
    """To sort by: the place of a name in a table, or after all of these."""
    return list(names).index(name) if name in names else len(names), name


def by_rank(found, names):
    return sorted(found, key=lambda name: rank(name, names))


def group(runs, key):
    """Lists of runs by key, in order."""
    groups = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def differing(runs):
    """The settings that are not the same in all runs."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [name for name in names if len({repr(run.settings.get(name)) for run in runs}) > 1]


def varied(run, runs, without=OWN):
    """The run's settings that are not the same in all runs, as text."""
    return "".join(f", {name} {run.settings.get(name, '–')}" for name in differing(runs) if name not in without)


def blocks_of(runs):
    """What may be compared, by a title: runs of one environment, with the same settings but for the method's mask."""
    of_env = group(runs, lambda run: run.env)
    title = "{0.env}, {0.steps:,} steps{1}".format
    return group(runs, lambda run: title(run, varied(run, of_env[run.env], ("steps", "mask"))))


def rows_of(block):
    """The runs of a block by label."""
    return group(block, lambda run: run.label)


def full_label(run, runs):
    """Its method and the settings in which these runs differ, the mask only from its own method's."""
    of_method = [other for other in runs if other.method == run.method]
    mask = f", mask {run.settings.get('mask', '–')}" * ("mask" in differing(of_method))
    return run.method + varied(run, runs, ("mask",)) + mask


def own(block):
    """The settings of a block whose defaults depend on environment and method, in a line."""
    masks = group(block, lambda run: run.settings.get("mask"))
    masks = [f"mask {mask} ({', '.join(dict.fromkeys(run.label for run in of))})" for mask, of in masks.items() if mask]
    return ", ".join([f"{name} {block[0].settings.get(name, '–')}" for name in ("K", "buffer")] + masks)


def finished(blocks):
    """The finished runs by environment, row and seed; of several blocks of an environment, of the one with most."""
    blocks = sorted(blocks, key=lambda block: (sum(run.finished for run in block), block[0].steps))
    rows = {block[0].env: rows_of(block) for block in blocks}
    done = {}
    for env in by_rank(rows, BOUND):
        of_env = {label: {run.seed: run for run in row if run.finished} for label, row in rows[env].items()}
        done[env] = {label: row for label, row in of_env.items() if row}
    return done


def shared(done, methods):
    """Of `done`, by environment and method, the lists of those runs whose seeds all of the methods have."""
    seeds = {env: set.intersection(*(set(rows.get(m, ())) for m in methods)) for env, rows in done.items()}
    return {env: {m: [done[env][m][seed] for seed in sorted(of)] for m in methods} for env, of in seeds.items() if of}


def by_kind(runs):
    """The environments that have a bound: all, if they are of several kinds, and those of each kind."""
    kinds = {kind: [env for env in runs if env in BOUNDS[kind]] for kind in BOUNDS}
    kinds = {kind: envs for kind, envs in kinds.items() if envs}
    return {"all": [env for env in runs if env in BOUND]} | kinds if len(kinds) > 1 else kinds


def last(runs, name, n=1):
    """Of each run, the last evaluation, or the mean of its last n."""
    return np.array([np.mean([row[name] for row in run.metrics[-n:]]) for run in runs])


# ---- Statistics -------------------------------------------------------------------------------------------------


def iqm(strata):
    """Interquartile mean over all n scores: of the middle n - 2 ⌊n / 4⌋."""
    scores = np.sort(np.concatenate(strata, -1), -1)
    n = scores.shape[-1]
    return scores[..., n // 4 : n - n // 4].mean(-1)


def gain(ours, other):
    return iqm(ours) / iqm(other) - 1


def improvement(ours, other):
    """P(ours > other): the share of pairs of seeds, ties half, averaged over environments."""
    signs = [np.sign(x[..., :, None] - y[..., None, :]).mean((-2, -1)) for x, y in zip(ours, other)]
    return (np.mean(signs, 0) + 1) / 2


def estimate(statistic, *samples, n=2000):
    """A statistic of one or two strata, and the ends of its 95 % interval, from n samples of seeds drawn with
    replacement within each environment; nan if no environment has two seeds."""
    rng, several = np.random.default_rng(0), all(any(len(x) > 1 for x in strata) for strata in samples)
    drawn = [[x[rng.integers(len(x), size=(n, len(x)))] for x in strata] for strata in samples]
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = np.percentile(statistic(*drawn), (2.5, 97.5)) if several else (math.nan, math.nan)
        return [float(x) for x in (statistic(*samples), *ends)]


def standing(ours, others):
    """On which sets ours are "ahead" of the others or "behind": where the two 95 % intervals do not overlap, both at
    the last evaluation and for the mean of each run's last three. Nothing of fewer than 3 seeds and 3, or 2 and 5:
    by chance alone, one side would be above the other more often than in one of ten cases."""
    sides, enough = {"ahead": [], "behind": []}, math.comb(len(ours) + len(others), len(ours)) >= 20
    for name in SCORES if enough else ():
        found = set()
        for n in (1, 3):
            (_, low, high), (_, their_low, their_high) = (estimate(iqm, [last(of, name, n)]) for of in (ours, others))
            found.add("ahead" if low > their_high else "behind" if high < their_low else None)
        if len(found) == 1 and (side := found.pop()):
            sides[side].append(name)
    return "; ".join(f"{side}: {', '.join(names)}" for side, names in sides.items() if names) or "–"
