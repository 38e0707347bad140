"""Does a method act well where a discontinuous context is new? How far beyond its ranges?

    python studies/unseen.py --env di_signs_without_pm --method concat --quick    one run
    python studies/unseen.py report RUNS... --out results/unseen         what they came to
    python studies/unseen.py beyond RUN... --out results/beyond          a minute a run on cartpole

In the paper's evaluation every sign was trained on. `di_signs` has a sign for each axis. An agent
that was trained on three of the four pairs knows each sign, but not the fourth pair. The first
command line is that of dmash.py, with four environments more: di_signs_without_pp, _pm, _mp and _mm
(p is plus, m is minus, x comes first). Masses are of the train range. Their sets are

    train       the three other pairs in turns
    eval_in     the same pairs, with masses in between
    eval_out    the pair left out, with the masses of eval_in

RUNS are run folders, folders of these, or a folder with tables (results). `report` prints the mean
return by method, over pairs and seeds, with its 95 % interval. unseen.csv has a row for each run.

`beyond` varies one context value after the other, for each sign: from a quarter of the lower to
four times the upper extrapolation limit, or to four times both where the lower is not above 0.
A sign's strength goes from 0 to twice the trained one.
All else has its default, and what an actuator gets is clipped to [-1, 1]. The program prints means
by range. beyond_<env>.csv has all returns.
"""

import sys
from dataclasses import asdict
from itertools import cycle, product
from pathlib import Path
from unittest import mock

import compare
import numpy as np
import runs as reader
from command_line import parser_of
from runs import aib_envs, dmash, group, in_words, joined

LEFT_OUT = {
    "di_signs_without_pp": {"sign_x": 1.0, "sign_y": 1.0},
    "di_signs_without_pm": {"sign_x": 1.0, "sign_y": -1.0},
    "di_signs_without_mp": {"sign_x": -1.0, "sign_y": 1.0},
    "di_signs_without_mm": {"sign_x": -1.0, "sign_y": -1.0},
}
STRENGTHS = [-2, -1.5, -1, -0.5, -0.25, -0.1, 0, 0.1, 0.25, 0.5, 1, 1.5, 2]  # of a sign
POINTS = 17  # values of another context
FAR = 4  # how far beyond its limits
ROLLOUTS = 5  # episodes at each
NO_SETTINGS = [*reader.UNTOLD, *reader.TECHNICAL]  # that would make runs differ

plain_context_sets = aib_envs.context_sets

# ---- Training without a pair --------------------------------------------------------------------


def context_sets(env_id, n=20, seed=0):
    """aib_envs.context_sets, also for the environments of LEFT_OUT."""
    if env_id not in LEFT_OUT:
        return plain_context_sets(env_id, n, seed)
    sets = plain_context_sets("di_signs", n)

    def signed(name, pairs):
        return [context | pair for context, pair in zip(sets[name], cycle(pairs))]

    left_out = LEFT_OUT[env_id]
    kept = [pair for pair in LEFT_OUT.values() if pair != left_out]
    return {
        "train": signed("train", kept),
        "eval_in": signed("eval_in", kept),
        "eval_out": signed("eval_in", [left_out]),
    }


def labels_of(settings):
    """A label for each dict of settings, with the values in which runs of one method differ."""
    told = []
    of_methods = group(settings, lambda one: one["method"]).values()
    for name in settings[0]:
        values = [{str(one.get(name)) for one in part} for part in of_methods]
        if name not in NO_SETTINGS and max(map(len, values)) > 1:
            told.append(name)
    labels = []
    for one in settings:
        words = [f"{name} {one.get(name)}" for name in told]
        labels.append(", ".join([reader.paper_name(one["method"]), *words]))
    return labels


def report(places, out):
    """Prints the table of finished runs, and writes their returns."""
    found = reader.read_runs(places)
    runs = [run for run in found if run.finished and run.env in LEFT_OUT]
    if not runs:
        raise dmash.BadInput(f"{' '.join(places)}: no finished run of {', '.join(LEFT_OUT)}")
    print(f"{len(runs)} of {len(found)} runs are finished and leave out a pair of signs\n")
    labels = labels_of([run.settings | {"method": run.method} for run in runs])
    by_label = {}
    rows = []
    for run, label in zip(runs, labels):
        by_label.setdefault(label, []).append(run)
        row = {"env": run.env, "method": run.method, "seed": run.seed, "steps": run.steps}
        rows.append(row | {name: run.last(name) for name in dmash.SETS})
    lines = []
    for label, of in by_label.items():
        estimates = [compare.contrast([1], [compare.scores(of, name)]) for name in dmash.SETS]
        cells = [compare.cell(estimate, 1) for estimate in estimates]
        lines.append([label, len(of), len({run.env for run in of}), *cells])
    head = "method | runs | pairs left out | three pairs: train | eval_in | left out: eval_out"
    print(compare.table(head, lines), end="")
    reader.write_table(out / "unseen.csv", rows)


# ---- Far beyond the ranges ----------------------------------------------------------------------


def sweeps(dims):
    """Pairs of a panel and a context.

    In a panel one dimension varies, and the others have one combination of signs.
    """
    for dim in dims:
        others = [other for other in dims if other.binary and other is not dim]
        for signs in product(*(other.train[::-1] for other in others)):
            fixed = {other.name: sign for other, sign in zip(others, signs)}
            title = joined(dim.name, in_words(fixed))
            for value in swept(dim):
                context = {other.name: other.default for other in dims}
                context |= fixed | {dim.name: float(value)}
                yield {"panel": title, "varied": dim.name}, context


def swept(dim):
    """The values that a dimension takes."""
    if dim.only:
        return []
    if dim.binary:
        return STRENGTHS
    low, high = dim.extrapolation
    high = min(high * FAR, 0.99 * dim.below)
    if low > 0:
        return np.geomspace(low / FAR, high, POINTS)
    return np.linspace(low * FAR, high, POINTS)


def where(dim, value):
    """The column of the table that a value counts in."""
    if dim.binary:
        return f"±{abs(value):g}"
    for name, (low, high) in {"train": dim.train, "extrapolation": dim.extrapolation}.items():
        if low <= value <= high:
            return f"{name} range"
    return "beyond"


def evaluated(env, policies):
    """Rows of beyond_<env>.csv."""
    rows = []
    panels, contexts = zip(*sweeps(aib_envs.lookup(env).context))
    labels = labels_of([asdict(cfg) | {"steps": agent.step} for cfg, agent in policies])
    for (cfg, agent), label in zip(policies, labels):
        head = f"{env}, {cfg.method}, seed {cfg.seed}"
        print(f"{head}, step {agent.step:,} of {cfg.steps:,}", flush=True)
        returns, diverged = dmash.evaluate(agent, cfg, contexts, ROLLOUTS)
        for panel, context, of, lost in zip(panels, contexts, returns, diverged):
            row = {"method": label, "seed": cfg.seed, "step": agent.step} | panel | context
            rows.append(row | {"return": float(np.mean(of)), "diverged": int(sum(lost))})
    return rows


def panel_table(dim, rows):
    """Mean returns by method and range."""
    ranges = group(rows, lambda row: where(dim, row[dim.name]))
    names = list(ranges)[::-1]
    lines = []
    for method, of in group(rows, lambda row: row["method"]).items():
        line = [method, len({row["seed"] for row in of})]
        for name in names:
            mean = np.mean([row["return"] for row in ranges[name] if row["method"] == method])
            line.append(f"{mean:.1f}")
        lines.append(line)
    return compare.table(["method", "seeds", *names], lines)


def beyond(paths, out):
    """Evaluates the policies, prints a table for each panel, and writes the returns."""
    policies = [dmash.load_policy(path) for path in reader.distinct(paths)]
    for env, of_env in group(policies, lambda policy: policy[0].env).items():
        rows = evaluated(env, of_env)
        dims = {dim.name: dim for dim in aib_envs.lookup(env).context}
        for title, panel in group(rows, lambda row: row["panel"]).items():
            table = panel_table(dims[panel[0]["varied"]], panel)
            print(f"\n{env}: {title}\n\n{table}", end="")
        reader.write_table(out / f"beyond_{reader.file_name(env)}.csv", rows)


# ---- Command line -------------------------------------------------------------------------------


def run_command(argv):
    parser = parser_of("unseen.py", __doc__)
    modes = {"report": report, "beyond": beyond}
    parser.add_argument("mode", choices=modes)
    parser.add_argument("places", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")
    args = parser.parse_args(argv)
    modes[args.mode](args.places, args.out)


@mock.patch.dict(aib_envs.ENVS, dict.fromkeys(LEFT_OUT, aib_envs.ENVS["di_signs"]))
@mock.patch.object(aib_envs, "context_sets", context_sets)
def main(argv=None):
    """The command line. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].startswith("--") and argv[0] != "--help":
        return dmash.main(argv)
    return dmash.exit_status("unseen.py", lambda: run_command(argv))


if __name__ == "__main__":
    sys.exit(main())
