"""Which method is better, by how much, and how sure is that?

    python studies/compare.py plan --envs cartpole_inv di_inv --methods dma_star_sh dr --seeds 11-15
    python studies/compare.py add RUNS... --experiment quick
    python studies/compare.py report results --out runs/report
    python studies/compare.py report results --into results/README.md
    python studies/compare.py no-action --envs cartpole_inv di_inv

`plan` prints a command per environment, method and seed, in the order of seeds, so that a list cut
short leaves whole comparisons. A command that is given again goes on with its run. A list is worked
through two at a time, or as a Slurm array, in a shell where `python` is the one with torch:

    python studies/compare.py plan … | xargs -P 2 -I{} sh -c '{}'
    sbatch --array=1-$(wc -l < plan.txt) --wrap 'sed -n "${SLURM_ARRAY_TASK_ID}p" plan.txt | sh'

xargs takes quotes away. Where a value needs them: tr '\\n' '\\0' | xargs -0 -P 2 …

`add` puts finished runs into the tables of results/ (studies/runs.py says which). `report` reads
these tables, run folders, or both, and writes report.md with figures. With --into, it writes each
table of a document anew, between a line such as <!-- table 1 of quick, masks --> and the next
<!-- end -->. With --check, it changes nothing and fails if one of them would change. `no-action`
writes results/no_action.csv: what an agent earns that never acts. The report takes seconds.
"""

import argparse
import itertools
import math
import re
import shlex
import sys
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import runs as reader
import torch
from runs import BadInput, aib_envs, dmash, group

RESULTS = Path(__file__).resolve().parent.parent / "results"
NO_ACTION = RESULTS / "no_action.csv"
OURS = "DMA*-SH"
FEWEST = 5  # seeds a side, for a verdict
LEVEL = 0.05  # of Holm's p, for a verdict
FEWEST_OF_INTERVAL = 3
MOST_SPLITS = 5_000_000  # of an exact p

# ---- Statistics --------------------------------------------------------------------------------


def t_quantile(p, dof):
    """Student's t with t = √dof · tan θ: the density of θ is proportional to cos(θ)^(dof - 1)."""
    theta = np.linspace(0, np.pi / 2, 20_001)
    middle = (theta[1:] + theta[:-1]) / 2
    mass = np.concatenate([[0], np.cumsum(np.cos(middle) ** (dof - 1))])
    return math.sqrt(dof) * math.tan(np.interp(2 * p - 1, mass / mass[-1], theta))


def contrast(weights, samples):
    """A weighted sum of the samples' means, and the ends of its 95 % interval.

    With weights 1 and -1 it is Welch's interval of a difference. The ends are nan where a sample
    has fewer than three values, whose intervals say nothing.
    """
    point = sum(weight * np.mean(sample) for weight, sample in zip(weights, samples))
    if min(map(len, samples)) < FEWEST_OF_INTERVAL:
        return point, math.nan, math.nan
    shares = [w**2 * np.var(x, ddof=1) / len(x) for w, x in zip(weights, samples)]
    variance = sum(shares)
    if variance == 0:
        return point, point, point
    squares = [share**2 / (len(x) - 1) for share, x in zip(shares, samples)]
    half = t_quantile(0.975, variance**2 / sum(squares)) * math.sqrt(variance)
    return point, point - half, point + half


def permutation_p(x, y):
    """Exact and two-sided: of all splits in two, the share with means at least as far apart.

    It is nan where there are more than MOST_SPLITS of them.
    """
    values = np.concatenate([x, y])
    size = min(len(x), len(y))
    if math.comb(len(values), size) > MOST_SPLITS:
        return math.nan
    values = values - values.mean()
    sums = [np.zeros(1)] + [np.zeros(0)] * size  # of all subsets of the values so far, by size
    for value in values:
        for k in range(size, 0, -1):
            sums[k] = np.concatenate([sums[k], sums[k - 1] + value])
    observed = abs(values[: len(x)].sum())
    return float(np.mean(abs(sums[size]) >= observed - 1e-9 * abs(values).sum()))


def holm(ps):
    """Holm's correction: the p-values, each made larger for the number of those tested with it."""
    order = np.argsort(ps)
    factors = len(ps) - np.arange(len(ps))
    corrected = np.empty(len(ps))
    corrected[order] = np.minimum(np.maximum.accumulate(np.array(ps)[order] * factors), 1)
    return corrected.tolist()


def probability_of_improvement(x, y):
    """The share of pairs in which x is larger, ties half."""
    return float(np.mean([(np.sign(value - y).mean() + 1) / 2 for value in x]))


# ---- What is compared --------------------------------------------------------------------------


def scores(runs, score):
    return np.array([run.last(score) for run in runs])


def blocks_of(runs):
    """Finished runs of one environment and equal settings, by arm; each block under a title."""
    runs = [run for run in runs if run.finished]
    blocks = group(runs, lambda run: (run.env, run.compared))
    quick = {"quick" in dict(settings) for _, settings in blocks}
    titles = {}
    for (env, settings), block in blocks.items():
        mine = dict(settings)
        words = [env, f"{block[0].steps:,} steps"]
        if len(quick) > 1:
            words.append(setting_of(block[0]))
        alike = [dict(other) for name, other in blocks if name == env]
        alike = [other for other in alike if other.get("quick") == mine.get("quick")]
        for name in sorted(set().union(*alike) - {"steps"}):
            if len({other.get(name) for other in alike}) > 1:
                words.append(f"{name} {mine.get(name, 'off')}")
        titles[", ".join(words)] = group(block, lambda run: run.arm)
    return titles


def one_of(arms):
    """Any run of a block."""
    return next(iter(arms.values()))[0]


def setting_of(run):
    """`--quick` or not, in words."""
    if "quick" in run.settings:
        return "`--quick`"
    return "paper's settings"


def find(arms, label, departures):
    """The runs in a block of a method, by its label, with these departures."""
    return arms.get(", ".join(filter(None, [label, departures])), [])


def departures_in(arms):
    return sorted({of[0].departures for of in arms.values()})


@cache
def returns_without_action(env):
    """By set and index of the context; empty where they were not measured."""
    key = ("env", "set", "index")
    rows = reader.read_table(NO_ACTION, ("index", "return"), texts=("env", "set"), key=key)
    return {(row["set"], row["index"]): row["return"] for row in rows if row["env"] == env}


def no_action(env, score):
    """What an agent earns that never acts, or nan."""
    values = []
    for (name, _), value in returns_without_action(env).items():
        if score in (name, "mean"):
            values.append(value)
    return float(np.mean(values)) if values else math.nan


def largest(env):
    """The largest possible return, or None: the horizon where no reward is above 1."""
    if env not in aib_envs.ENVS or env in ("walker_gym", "hopper_gym"):
        return None
    return aib_envs.ENVS[env].horizon


# ---- Tables ------------------------------------------------------------------------------------


def table(head, rows):
    lines = []
    for row in [head, ["---"] * len(head), *rows]:
        cells = [printable(cell).replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def printable(value):
    """A value in one line of letters that any file can hold and any terminal can show."""
    text = " ".join(str(value).split())
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def figure(value, digits, sign=""):
    if math.isnan(value):
        return "–"
    text = f"{value:{sign}.{digits}f}"
    return text.replace("-", "−")


def cell(estimate, digits, sign=""):
    """A figure and its interval, if it has one."""
    point, *ends = [figure(value, digits, sign) for value in estimate]
    if "–" in ends:
        return point
    return f"{point} [{ends[0]}, {ends[1]}]"


def digits_of(env):
    """Returns of a thousand are written without decimals, others with one."""
    if env in aib_envs.ENVS and aib_envs.ENVS[env].horizon <= 200:
        return 1
    return 0


def p_text(p):
    if math.isnan(p):
        return "–"
    if p < 0.001:
        return f"{p:.0e}"
    return f"{p:.3f}"


def returns_table(runs, score):
    """A row per arm, a column per environment and setting."""
    blocks = blocks_of(runs)
    arms = dict.fromkeys(run.arm for run in sorted(runs, key=reader.arm_rank))
    rows = [["no action"], ["largest possible"]]
    for arms_here in blocks.values():
        env = one_of(arms_here).env
        rows[0].append(figure(no_action(env, score), digits_of(env)))
        rows[1].append(largest(env) or "–")
    for arm in arms:
        rows.append([arm])
        for arms_here in blocks.values():
            done = arms_here.get(arm, [])
            text = "not run"
            if done:
                estimate = contrast([1], [scores(done, score)])
                text = f"{cell(estimate, digits_of(done[0].env))} ({len(done)})"
            rows[-1].append(text)
    return table(["method", *blocks], rows)


def difference_cells(ours, others, score):
    """The difference of two lists of runs with its interval, and its p."""
    x, y = scores(ours, score), scores(others, score)
    difference = contrast([1, -1], [x, y])
    return [cell(difference, digits_of(ours[0].env), "+"), p_text(permutation_p(x, y))]


def speed(runs):
    """Gradient steps per second of whole runs, evaluations included: the median."""
    return float(np.median([run.steps / max(run.last("seconds"), 1e-9) for run in runs]))


def difference_row(title, arm, ours, others):
    row = [title, arm, f"{len(ours)}, {len(others)}"]
    for score in ("mean", "eval_out"):
        row += difference_cells(ours, others, score)
    return row


def differences_table(runs):
    """DMA*-SH minus each other method with the same departures."""
    rows = []
    for title, arms in blocks_of(runs).items():
        for departures in departures_in(arms):
            ours = find(arms, OURS, departures)
            for arm, others in arms.items():
                if ours and others is not ours and others[0].departures == departures:
                    row = difference_row(title, arm, ours, others)
                    rows.append([*row, figure(speed(others), 1), figure(speed(ours), 1)])
    head = ["environment", "DMA*-SH minus", "seeds", "mean of the sets", "p", "extrapolation", "p"]
    return table([*head, "its steps/s", "DMA*-SH's"], rows)


def departures_table(runs):
    """What each departure changes: each method with it minus the same method without."""
    rows = []
    for title, arms in blocks_of(runs).items():
        for arm, changed in arms.items():
            plain = arms.get(changed[0].label)
            if changed[0].departures and plain:
                rows.append(difference_row(title, arm, changed, plain))
    head = ["environment", "with it minus without", "seeds", "mean of the sets", "p"]
    return table([*head, "extrapolation", "p"], rows)


CLAIMS = [  # what the paper says: the first arm is better than the second
    ("The shared hypernetwork beats domain randomisation", OURS, "DR"),
    ("It beats the true context, concatenated", OURS, "Concat"),
    ("It beats adapters made from the true context", OURS, "DA"),
    ("It beats the inferred code, concatenated", OURS, "DMA*"),
    ("It beats DMA", OURS, "DMA"),
    ("It beats DMA-Pearl", OURS, "DMA-Pearl"),
    ("It beats a hypernetwork in each network", OURS, "DMA*-H"),
    ("It beats adapters trained by the RL losses", OURS, "rl_adapters"),
    ("Masks help it", OURS, "no_mask"),
    ("The input norm helps it", OURS, "no_input_norm"),
    ("The output norm helps it", OURS, "no_output_norm"),
    ("Masks and norms help it", OURS, "dma_sh"),
    ("Masks and norms help a concatenated code", "DMA*", "DMA"),
    # these departures let an RL loss train the hypernetwork
    ("The policy's gradients harm the hypernetwork", OURS, f"{OURS}, actor_into_eta"),
    ("The critics' gradients harm the hypernetwork", OURS, f"{OURS}, critic_into_eta"),
    ("The gradients of both harm the hypernetwork", OURS, f"{OURS}, both_into_eta"),
]


def claims_in(runs):
    """A claim, the title of its block, and its two lists of runs, for each that has them."""
    blocks = blocks_of(runs)
    for claim, first, second in CLAIMS:
        for title, arms in blocks.items():
            for departures in departures_in(arms):
                better = find(arms, first, departures)
                worse = find(arms, second, departures)
                if better and worse:
                    yield claim, title, better, worse


def verdict(difference, p):
    if p >= LEVEL:
        return "inconclusive"
    if difference > 0:
        return "consistent with the paper"
    return "against it"


class Judged(NamedTuple):
    """A claim in one block."""

    claim: str
    title: str
    better: list  # of runs
    worse: list
    difference: float
    p: float  # nan: no test
    corrected: float  # Holm's p
    verdict: str


def judged(runs, score):
    """All claims; p is corrected for all that have enough seeds."""
    claims, ps = list(claims_in(runs)), []
    for _, _, better, worse in claims:
        p = math.nan
        if min(len(better), len(worse)) >= FEWEST:
            p = permutation_p(scores(better, score), scores(worse, score))
        ps.append(p)
    corrected = iter(holm([p for p in ps if not math.isnan(p)]))
    result = []
    for (claim, title, better, worse), p in zip(claims, ps):
        difference = scores(better, score).mean() - scores(worse, score).mean()
        if min(len(better), len(worse)) < FEWEST:
            end = math.nan, "too few seeds"
        elif math.isnan(p):
            end = math.nan, "too many seeds for an exact p"
        else:
            p_holm = next(corrected)
            end = p_holm, verdict(difference, p_holm)
        result.append(Judged(claim, title, better, worse, difference, p, *end))
    return result


def claims_table(runs, score):
    """A row per claim and block."""
    rows = []
    for of in judged(runs, score):
        first = of.better[0]
        setting = ", ".join(filter(None, [setting_of(first), first.departures]))
        row = [of.claim, of.title, setting, f"{len(of.better)}, {len(of.worse)}"]
        row += difference_cells(of.better, of.worse, score)
        rows.append([*row, p_text(of.corrected), of.verdict])
    head = ["the paper says", "environment", "setting", "seeds", "difference", "p", "Holm's p"]
    return table([*head, "verdict"], rows)


def claims_in_short(runs):
    """A row per claim, a column per block: the difference and, in parentheses, Holm's p."""
    tested = [of for of in judged(runs, "mean") if not math.isnan(of.p)]
    titles = [title for title in blocks_of(runs) if title in {of.title for of in tested}]
    rows = []
    for claim, of_claim in group(tested, lambda of: of.claim).items():
        cells = dict.fromkeys(titles, "–")
        for of in of_claim:
            difference = figure(of.difference, digits_of(of.better[0].env), "+")
            cells[of.title] = f"{difference} ({p_text(of.corrected)})"
        envs = group(of_claim, lambda of: of.verdict)
        verdicts = [f"{words} ({len(of)} of {len(of_claim)})" for words, of in envs.items()]
        rows.append([claim, *cells.values(), ", ".join(verdicts)])
    return table(["the paper says", *titles, "verdict"], rows)


def artefacts_table(runs, score):
    """What departures cost a method, and DMA*-SH's lead over it without and with them."""
    rows = []
    for title, arms in blocks_of(runs).items():
        for changed in arms.values():
            label, departures = changed[0].label, changed[0].departures
            if not departures or label not in arms:
                continue
            row = [title, departures, label, f"{len(changed)}, {len(arms[label])}"]
            row += difference_cells(changed, arms[label], score)
            ours = arms.get(OURS), find(arms, OURS, departures)
            if label != OURS and all(ours):
                digits = digits_of(changed[0].env)
                lists = [ours[0], arms[label], ours[1], changed]
                samples = [scores(of, score) for of in lists]
                for weights in ([1, -1, 0, 0], [0, 0, 1, -1], [-1, 1, 1, -1]):
                    used = [(w, x) for w, x in zip(weights, samples) if w]
                    row.append(cell(contrast(*zip(*used)), digits, "+"))
            rows.append(row + [""] * (9 - len(row)))
    head = ["environment", "with", "method", "seeds", "what it changes", "p"]
    return table([*head, "DMA*-SH's lead without", "lead with", "change of the lead"], rows)


def samples(runs):
    """Blocks that enter an aggregate, by setting and departures, of each environment one.

    Of several blocks of an environment, that with most runs counts.
    """
    found = {}
    for arms in blocks_of(runs).values():
        first = one_of(arms)
        if not largest(first.env) or not returns_without_action(first.env):
            continue
        for departures in departures_in(arms):
            here = {arm: of for arm, of in arms.items() if of[0].departures == departures}
            envs = found.setdefault((setting_of(first), departures), {})
            if count(here) > count(envs.get(first.env, {})):
                envs[first.env] = here
    return found


def count(arms):
    return sum(map(len, arms.values()))


def scaled(runs, score):
    """Returns with no action as 0 and the largest possible as 1."""
    nothing = no_action(runs[0].env, score)
    return (scores(runs, score) - nothing) / (largest(runs[0].env) - nothing)


def mean_difference(pairs):
    """The mean over environments, of equal weight, of the differences of two samples each."""
    weights = [1 / len(pairs), -1 / len(pairs)] * len(pairs)
    return contrast(weights, [sample for pair in pairs for sample in pair])


def aggregates_table(runs):
    """DMA*-SH minus each method over the environments that have both, on the common scale."""
    rows = []
    for (_, departures), envs in samples(runs).items():
        for arm in dict.fromkeys(arm for arms in envs.values() for arm in arms):
            pairs = {}
            for env, arms in envs.items():
                ours = find(arms, OURS, departures)
                if ours and arm in arms and ours is not arms[arm]:
                    pairs[env] = ours, arms[arm]
            if len(pairs) < 2:
                continue
            row = [arm, len(pairs)]
            for score in ("mean", "eval_out"):
                of = {env: [scaled(side, score) for side in pair] for env, pair in pairs.items()}
                row.append(cell(mean_difference(of.values()), 3, "+"))
                row.append(figure(mean_probability(of.values()), 2))
                row += leaving_one_out(of)
            rows.append(row)
    head = ["P(better)", "lowest, leaving one out", "highest"]
    head = ["mean of the sets", *head, "extrapolation", *head]
    return table(["DMA*-SH minus", "environments", *head], rows)


def leaving_one_out(pairs):
    """The lowest and the highest difference without one of the environments."""
    without = {}
    for env in pairs:
        rest = [pair for other, pair in pairs.items() if other != env]
        without[env] = mean_difference(rest)[0]
    ends = min(without, key=without.get), max(without, key=without.get)
    return [f"{figure(without[env], 3, '+')} without {env}" for env in ends]


def mean_probability(pairs):
    return np.mean([probability_of_improvement(*pair) for pair in pairs])


PAPER = {  # its returns, means of the three sets, at its own settings
    "cartpole_inv": {OURS: 967, "Concat": 863, "DA": 892},
    "reacher_hard_inv": {OURS: 805, "Concat": 683, "DA": 713},
    "reacher_hard_perm": {OURS: 840, "Concat": 712, "DA": 749},
    "ball_in_cup": {OURS: 890, "Concat": 924, "DMA-Pearl": 903},
    "walker_gym": {OURS: 3258, "DMA-Pearl": 3162},
    "hopper_gym": {OURS: 2563, "DMA-Pearl": 2646},
    "cheetah_inv": {OURS: 408},
    "di_inv": {"DMA-Pearl": 68},
    "di_perm": {"DMA-Pearl": 70},
}


def published_score(run):
    """The larger of the last two evaluations of each set."""
    return np.mean([max(row[name] for row in run.metrics[-2:]) for name in dmash.SETS])


def published_table(runs):
    """Our endpoint, the published score, and the paper's figure, where it gives one."""
    rows = []
    for title, arms in blocks_of(runs).items():
        for arm, of in arms.items():
            paper = PAPER.get(of[0].env, {}).get(of[0].label)
            if paper:
                row = [title, arm, len(of)]
                for sample in (scores(of, "mean"), [published_score(run) for run in of]):
                    row.append(cell(contrast([1], [sample]), digits_of(of[0].env)))
                rows.append([*row, paper])
    head = ["environment", "method", "seeds", "last evaluation", "published score", "paper"]
    return table(head, rows)


MAKERS = {
    "table 1": partial(returns_table, score="mean"),
    "table 2": partial(returns_table, score="eval_out"),
    "table 3": differences_table,
    "claims": partial(claims_table, score="mean"),
    "claims in short": claims_in_short,
    "claims, extrapolation": partial(claims_table, score="eval_out"),
    "aggregates": aggregates_table,
    "published scores": published_table,
    "departures": departures_table,
    "artefacts": partial(artefacts_table, score="mean"),
    "artefacts, extrapolation": partial(artefacts_table, score="eval_out"),
}


# ---- Commands ----------------------------------------------------------------------------------

INTRO = """# Comparison

The score is the mean of the three context sets at the last evaluation. The second score is the
extrapolation set alone. Behind each mean stands its 95 % interval: Student's t, or Welch's for a
difference. The number in parentheses counts seeds. Each p is two-sided and exact: it looks at all
splits of the seeds in two groups. Holm's p is corrected for all claims of its table that have five
seeds a side. In aggregates no action is 0, the largest possible return is 1, and environments have
equal weight. The published score takes the larger of the last two evaluations in each set. It is
optimistic.
"""


def report_text(runs):
    versions = group(runs, lambda run: run.versions["version"])
    versions = ", ".join(f"{printable(name)} ({len(of)})" for name, of in sorted(versions.items()))
    done = sum(run.finished for run in runs)
    parts = [INTRO, f"{len(runs)} runs, {done} of them finished. Versions: {versions}.\n"]
    for name, make in MAKERS.items():
        parts.append(f"## {name.capitalize()}\n\n{make(runs)}")
    return "\n".join(parts)


def report(places, experiments, out):
    import compare_figures

    runs = reader.read_runs(places, experiments)
    text = report_text(runs)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(text, encoding="utf-8")
    figures = list(compare_figures.all_of(blocks_of(runs), returns_without_action))
    for name, drawing in figures:
        drawing.savefig(out / f"{name}.png", dpi=100)
    print(f"{out}: report.md of {len(runs)} runs, {len(figures)} figures")


def fill(places, document, check):
    """Writes the tables of a document anew. With `check`, refuses one that would change."""
    runs = reader.read_runs(places)
    known = {run.experiment for run in runs}

    def new(match):
        begin, name, experiments, end = match.groups()
        wanted = known
        if experiments:
            wanted = experiments.split(", ")
        for experiment in wanted:
            if experiment not in known:
                raise BadInput(f"{document}: no experiment {experiment!r}")
        if name not in MAKERS:
            raise BadInput(f"{document}: no table {name!r}; known: {', '.join(MAKERS)}")
        made = MAKERS[name]([run for run in runs if run.experiment in wanted])
        return f"{begin}{made}{end}"

    pattern = r"(<!-- ([^>]+?)(?: of ([^>]+))? -->\n).*?(<!-- end -->)"
    text = document.read_text(encoding="utf-8")
    filled, count = re.subn(pattern, new, text, flags=re.DOTALL)
    if check and filled != text:
        raise BadInput(f"{document}: its tables are not those of the runs; write them with --into")
    if not check:
        document.write_text(filled, encoding="utf-8")
    print(f"{document}: {count} tables")


def add(places, experiment, folder):
    """Puts finished runs into the tables of a folder, under the name of an experiment."""
    runs = []
    if (folder / "runs.csv").exists():
        runs = reader.read_tables(folder)
    before = len(runs)
    for run in reader.read_runs(places):
        if run.finished:
            run.experiment = experiment
            run.name = f"{experiment}/{run.name}"
            runs.append(run)
        else:
            print(f"{run.place}: not finished, left out")
    reader.refuse_doubles(runs)
    folder.mkdir(parents=True, exist_ok=True)
    reader.write_tables(folder, runs)
    print(f"{folder}: {len(runs) - before} runs more, {len(runs)} in all")


def measure_no_action(envs):
    """Ten episodes in each context, from where the evaluations of a run with seed 11 start."""
    rows = []
    for env in envs:
        cfg = dmash.quick(env=env, method="dr", seed=11)
        agent = dmash.new_agent(cfg)
        for weights in agent.parameters():
            torch.nn.init.zeros_(weights)  # so the mean action is 0
        for row in dmash.evaluate_sets(agent, cfg, cfg.rollouts):
            rows.append({"env": env} | {name: row[name] for name in ("set", "index", "return")})
    reader.write_table(NO_ACTION, rows)


def seed_numbers(words):
    numbers = []
    for word in words:
        ends = re.fullmatch("([0-9]+)(?:-([0-9]+))?", word)
        found = []
        if ends:
            found = range(int(ends[1]), int(ends[2] or ends[1]) + 1)
        if not found:
            raise BadInput(f"--seeds {word}: must be seeds such as 1 2 3, or ranges such as 11-15")
        numbers += found
    return numbers


def plan(envs, methods, seeds, given):
    """A command per run, seeds outermost, with the settings in `given`, words for dmash.py."""
    settings = vars(dmash.build_parser().parse_args(given))
    for name in settings:
        if name in ("env", "method", "seed") or name not in dmash.Config.__annotations__:
            allowed = "allowed: --envs, --methods, --seeds, settings of a run"
            raise BadInput(f"{dmash.flag(name)}: not here; {allowed}")
    if "threads" not in settings:  # several runs at once must not slow each other down
        given = [*given, "--threads", "1"]
    lines = []
    for seed, env, method in itertools.product(seed_numbers(seeds), envs, methods):
        dmash.Config(env=env, method=method, seed=seed, **settings)
        words = ["--env", env, "--method", method, "--seed", str(seed), *given, "--go-on"]
        lines.append(shlex.join(["python", "dmash.py", *words]))
    print("\n".join(lines))


def build_parser():
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = dmash.Parser("compare.py", description=__doc__, **layout)
    modes = parser.add_subparsers(dest="mode", required=True)
    about = "run folders, folders of these, or with runs.csv"
    runs = {"nargs": "+", "metavar": "RUNS", "help": about}

    more = "and settings: python dmash.py --help"
    part = modes.add_parser("plan", allow_abbrev=False, epilog=more)
    for name in ("envs", "methods", "seeds"):
        part.add_argument(f"--{name}", nargs="+", required=True, help=f"{name}, one or more")

    part = modes.add_parser("add", allow_abbrev=False)
    part.add_argument("runs", **runs)
    part.add_argument("--experiment", required=True, help="name of the experiment they belong to")
    part.add_argument("--to", type=Path, default=RESULTS, help="folder of the tables (results)")

    part = modes.add_parser("report", allow_abbrev=False)
    part.add_argument("runs", **runs)
    part.add_argument("--experiments", nargs="+", default=[], help="of the tables only these")
    part.add_argument("--out", type=Path, default=Path("runs/report"), help="folder (%(default)s)")
    part.add_argument("--into", type=Path, help="a document: write its tables, and no report")
    part.add_argument("--check", action="store_true", help="with --into: only compare")

    part = modes.add_parser("no-action", allow_abbrev=False)
    part.add_argument("--envs", nargs="+", required=True, help="environments")
    return parser


def run_command(argv):
    args, given = build_parser().parse_known_args(argv)
    if args.mode == "plan":
        plan(args.envs, args.methods, args.seeds, given)
    elif given:
        raise BadInput(f"unrecognized arguments: {' '.join(given)}")
    elif args.mode == "add":
        add(args.runs, args.experiment, args.to)
    elif args.mode == "no-action":
        measure_no_action(args.envs)
    elif args.into:
        fill(args.runs, args.into, args.check)
    else:
        report(args.runs, args.experiments, args.out)


def main(argv=None):
    """The command line. Returns the exit status."""
    return dmash.exit_status("compare.py", lambda: run_command(argv))


if __name__ == "__main__":
    sys.exit(main())
