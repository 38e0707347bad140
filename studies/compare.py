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
measures what an agent earns that never acts, and puts it into results/no_action.csv. The report of
all runs takes half a minute.
"""

import itertools
import math
import re
import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import runs as reader
import torch
from command_line import parser_of
from runs import OURS, BadInput, aib_envs, dmash, group, joined

RESULTS = Path(__file__).resolve().parent.parent / "results"
NO_ACTION = RESULTS / "no_action.csv"
FEWEST = 5  # seeds a side, for a verdict
LEVEL = 0.05  # of Holm's p, for a verdict
FEWEST_OF_INTERVAL = 3
MOST_SPLITS = 5_000_000  # of an exact p

# ---- Statistics --------------------------------------------------------------------------------


def t_quantile(dof):
    """The 97.5 % quantile of Student's t: |t| is below it in 95 % of cases.

    With t = √dof · tan θ the density of θ is proportional to cos(θ)^(dof - 1).
    """
    theta = np.linspace(0, np.pi / 2, 20_001)
    middle = (theta[1:] + theta[:-1]) / 2
    mass = np.concatenate([[0], np.cumsum(np.cos(middle) ** (dof - 1))])
    return math.sqrt(dof) * math.tan(np.interp(0.95, mass / mass[-1], theta))


def contrast(weights, samples):
    """A weighted sum of the samples' means, and the ends of its 95 % interval.

    With weights 1 and -1 it is Welch's interval of a difference. The ends are nan where a sample
    has fewer than three values, whose intervals say nothing.
    """
    point = np.dot(weights, [np.mean(sample) for sample in samples])
    if min(map(len, samples)) < FEWEST_OF_INTERVAL:
        return point, math.nan, math.nan
    shares = [w**2 * np.var(x, ddof=1) / len(x) for w, x in zip(weights, samples)]
    variance = sum(shares)
    if variance == 0:
        return point, point, point
    squares = [share**2 / (len(x) - 1) for share, x in zip(shares, samples)]
    half = t_quantile(variance**2 / sum(squares)) * math.sqrt(variance)
    return point, point - half, point + half


def mean_contrast(weights, samples):
    """The mean of sums with these weights. `samples` has those of the first sum first."""
    n = len(samples) // len(weights)
    return contrast(np.tile(weights, n) / n, samples)


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
    return np.mean(abs(sums[size]) >= observed - 1e-9 * abs(values).sum())


def holm(ps):
    """Holm's correction: the p-values, each made larger for the number of those tested with it."""
    order = np.argsort(ps)
    factors = np.arange(len(ps), 0, -1)
    rising = np.maximum.accumulate(np.sort(ps) * factors)
    return np.minimum(rising, 1)[np.argsort(order)].tolist()


def probability_of_improvement(x, y):
    """The share of pairs in which x is larger, ties half."""
    return np.mean([(np.sign(value - y).mean() + 1) / 2 for value in x])


# ---- What is compared --------------------------------------------------------------------------


def scores(runs, score):
    return np.array([run.last(score) for run in runs])


def setting_of(run):
    """`--quick` or not, in words."""
    if "quick" in run.settings:
        return "`--quick`"
    return "paper's settings"


def blocks_of(runs):
    """Finished runs of one environment and equal settings, by arm; each block under a title."""
    finished = [run for run in runs if run.finished]
    blocks = group(finished, lambda run: (run.env, run.compared)).values()
    firsts = [block[0] for block in blocks]
    titled = {}
    for block in blocks:
        if len({frozenset(run.contexts[0]) for run in block}) > 1:
            env = block[0].env
            raise BadInput(f"{env}: its runs have different contexts, and cannot be compared")
        titled[title_of(block[0], firsts)] = group(block, lambda run: run.arm)
    return titled


def title_of(run, others):
    """Environment, steps, and the settings in which it differs from others like it."""
    words = [run.env, f"{run.steps:,} steps"]
    if len({setting_of(other) for other in others}) > 1:
        words.append(setting_of(run))
    kind = run.env, setting_of(run)
    alike = [dict(other.compared) for other in others if (other.env, setting_of(other)) == kind]
    for name in sorted(set().union(*alike) - {"steps"}):
        if len({settings.get(name) for settings in alike}) > 1:
            words.append(f"{name} {run.settings.get(name, 'off')}")
    return ", ".join(words)


def find(arms, label, departures):
    """The runs in a block of a method, by its label, with these departures."""
    return arms.get(joined(label, departures), [])


def rivals_of_ours(runs):
    """A block's title, the runs of DMA*-SH, those of another arm with the same departures."""
    for title, arms in blocks_of(runs).items():
        for others in arms.values():
            ours = find(arms, OURS, others[0].departures)
            if ours and ours is not others:
                yield title, ours, others


def departed(runs):
    """A block's title, the block, the runs of an arm with departures, those without."""
    for title, arms in blocks_of(runs).items():
        for changed in arms.values():
            plain = arms.get(changed[0].label)
            if plain and plain is not changed:
                yield title, arms, changed, plain


def no_action_rows():
    key = ("env", "set", "index")
    return reader.read_table(NO_ACTION, ("index", "return"), texts=("env", "set"), key=key)


@cache
def returns_without_action(env):
    """By set and index of the context; empty where they were not measured."""
    rows = no_action_rows()
    return {(row["set"], row["index"]): row["return"] for row in rows if row["env"] == env}


def no_action(env, score):
    """What an agent earns that never acts, or nan."""
    found = returns_without_action(env).items()
    values = [value for (name, _), value in found if score in (name, "mean")]
    return np.mean(values) if values else math.nan


def largest(env):
    """The largest possible return, or nan: the horizon where no reward is above 1."""
    if env not in aib_envs.ENVS or env in ("walker_gym", "hopper_gym"):
        return math.nan
    return aib_envs.ENVS[env].horizon


# ---- Tables ------------------------------------------------------------------------------------


def table(head, rows):
    """`head` is a list, or a text with | between the columns. Short rows end with dashes."""
    if isinstance(head, str):
        head = head.split(" | ")
    lines = []
    for row in [head, ["---"] * len(head), *rows]:
        row = [*row] + ["–"] * (len(head) - len(row))
        cells = [printable(cell).replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def printable(value):
    """A value in one line of letters that any file can hold and any terminal can show."""
    text = " ".join(str(value).split())
    return "".join(filter(str.isprintable, text))


def figure(value, digits, sign=""):
    if math.isnan(value):
        return "–"
    return f"{value:{sign}.{digits}f}".replace("-", "−")


def cell(estimate, digits, sign=""):
    """A figure and its interval, if it has one."""
    point, *ends = [figure(value, digits, sign) for value in estimate]
    if "–" in ends:
        return point
    return f"{point} [{ends[0]}, {ends[1]}]"


def digits_of(env):
    """Returns up to 1000 are written without decimals; those up to 200, or unknown, with one."""
    if largest(env) > 200:
        return 0
    return 1


def p_text(p):
    if p < 0.001:
        return f"{p:.0e}"
    return figure(p, 3)


def returns_table(runs, score):
    """A row per arm, a column per environment and setting."""
    blocks = blocks_of(runs)
    envs = [next(iter(arms.values()))[0].env for arms in blocks.values()]
    nothing = [figure(no_action(env, score), digits_of(env)) for env in envs]
    most = [figure(largest(env), 0) for env in envs]
    rows = [["no action", *nothing], ["largest possible", *most]]
    for arm in dict.fromkeys(run.arm for run in sorted(runs, key=reader.arm_rank)):
        row = [arm]
        for env, arms in zip(envs, blocks.values()):
            text = "not run"
            if arm in arms:
                estimate = contrast([1], [scores(arms[arm], score)])
                text = f"{cell(estimate, digits_of(env))} ({len(arms[arm])})"
            row.append(text)
        rows.append(row)
    return table(["method", *blocks], rows)


def difference(ours, others, score):
    """The difference of two lists of runs with its interval, and its p."""
    x, y = scores(ours, score), scores(others, score)
    return contrast([1, -1], [x, y]), permutation_p(x, y)


def sizes(*sides):
    """The number of seeds of each side."""
    return ", ".join(str(len(side)) for side in sides)


DIFFERENCES = "seeds | mean of the sets | p | extrapolation | p"


def difference_row(title, arm, ours, others):
    row = [title, arm, sizes(ours, others)]
    for score in ("mean", "eval_out"):
        estimate, p = difference(ours, others, score)
        row += [cell(estimate, digits_of(ours[0].env), "+"), p_text(p)]
    return row


def speed(runs):
    """Gradient steps per second of whole runs, evaluations included: the median."""
    return np.median([run.steps / run.last("seconds") for run in runs])


def differences_table(runs):
    """DMA*-SH minus each other method with the same departures."""
    rows = []
    for title, ours, others in rivals_of_ours(runs):
        row = difference_row(title, others[0].arm, ours, others)
        rows.append([*row, figure(speed(others), 1), figure(speed(ours), 1)])
    head = f"environment | DMA*-SH minus | {DIFFERENCES} | its steps/s | DMA*-SH's"
    return table(head, rows)


def departures_table(runs):
    """What each departure changes: each method with it minus the same method without."""
    rows = []
    for title, _, changed, plain in departed(runs):
        rows.append(difference_row(title, changed[0].arm, changed, plain))
    return table(f"environment | with it minus without | {DIFFERENCES}", rows)


LEADS = [1, -1, -1, 1]  # weights of a difference of leads; the first two are those of a difference


def artefacts_table(runs, score, short=False):
    """What departures change of a method's score, and of DMA*-SH's lead over it.

    A row per block, then their mean, of equal weight, on the scale of the aggregates. In short it
    has the means only.
    """
    found = {}  # by arm and title: for each column the lists of runs that are compared
    for title, arms, changed, plain in departed(runs):
        first = changed[0]
        ours, ours_changed = arms.get(OURS), find(arms, OURS, first.departures)
        columns = [[changed, plain]]
        if first.label != OURS and ours and ours_changed:
            leads = [ours_changed, changed, ours, plain]
            columns += [leads[2:], leads[:2], leads]
        found.setdefault(first.arm, {})[title] = columns
    rows = []
    for arm, blocks in found.items():
        if not short:
            for title, columns in blocks.items():
                changed, _ = columns[0]
                digits = digits_of(changed[0].env)
                cells = [artefact([of], scores, score, digits) for of in columns]
                rows.append([arm, title, *cells])
        means = [artefact(column, scaled, score, 3) for column in zip(*blocks.values())]
        rows.append([arm, f"mean of {len(blocks)}", *means])
    leads = "DMA*-SH's lead without | lead with them | change of the lead"
    return table(f"method | environment | with them minus without | {leads}", rows)


def artefact(column, measure, score, digits):
    """The mean over blocks of a difference, or of a difference of leads."""
    samples = [measure(side, score) for of in column for side in of]
    return cell(mean_contrast(LEADS[: len(column[0])], samples), digits, "+")


CLAIMS = [  # what the paper says: the first arm is better than the second
    ("DMA*-SH beats DR", OURS, "DR"),
    ("DMA*-SH beats Concat", OURS, "Concat"),
    ("DMA*-SH beats DA", OURS, "DA"),
    ("DMA*-SH beats DMA*", OURS, "DMA*"),
    ("DMA*-SH beats DMA", OURS, "DMA"),
    ("DMA*-SH beats DMA-Pearl", OURS, "DMA-Pearl"),
    ("DMA*-SH beats DMA*-H", OURS, "DMA*-H"),
    ("DMA*-SH beats rl_adapters", OURS, "rl_adapters"),
    ("Masks help DMA*-SH", OURS, "no_mask"),
    ("The input norm helps DMA*-SH", OURS, "no_input_norm"),
    ("The output norm helps DMA*-SH", OURS, "no_output_norm"),
    ("Masks and norms help DMA*-SH", OURS, "dma_sh"),
    ("DMA* beats DMA, which lacks its masks and norms", "DMA*", "DMA"),
    # these departures let an RL loss train the hypernetwork
    ("The policy's gradients harm the hypernetwork", OURS, f"{OURS}, actor_into_eta"),
    ("The critics' gradients harm the hypernetwork", OURS, f"{OURS}, critic_into_eta"),
    ("The gradients of both harm the hypernetwork", OURS, f"{OURS}, both_into_eta"),
]


@dataclass
class Judged:
    """A claim in one block."""

    claim: str
    title: str
    better: list  # of runs
    worse: list
    estimate: tuple  # the difference with its interval
    p: float
    corrected: float = math.nan  # Holm's p, where there is a test
    verdict: str = ""


def judged(runs):
    """The claims in all blocks that have their methods, with the same departures.

    p is corrected for all that have enough seeds.
    """
    blocks = blocks_of(runs)
    found, tested = [], []
    for claim, first, second in CLAIMS:
        for title, arms in blocks.items():
            for better in arms.values():
                worse = find(arms, second, better[0].departures)
                if better[0].label == first and worse:
                    numbers = difference(better, worse, "mean")
                    words = joined(claim, better[0].departures)
                    found.append(Judged(words, title, better, worse, *numbers))
    for of in found:
        if min(len(of.better), len(of.worse)) < FEWEST:
            of.verdict = "too few seeds"
        elif math.isnan(of.p):
            of.verdict = "too many seeds for an exact p"
        else:
            tested.append(of)
    for of, corrected in zip(tested, holm([of.p for of in tested])):
        of.corrected = corrected
        if corrected >= LEVEL:
            of.verdict = "inconclusive"
        elif of.estimate[0] > 0:
            of.verdict = "consistent with the paper"
        else:
            of.verdict = "against it"
    return found


def claims_table(runs, short=False):
    """A row per claim, a column per block: the difference, its p, and the seeds.

    In short it has Holm's p in place of p and seeds, and only the claims that were tested.
    """
    found = [of for of in judged(runs) if not (short and math.isnan(of.corrected))]
    titles = dict.fromkeys(of.title for of in found)
    rows = []
    for claim, of_claim in group(found, lambda of: of.claim).items():
        cells = dict.fromkeys(titles, "–")
        for of in of_claim:
            difference = cell(of.estimate, digits_of(of.better[0].env), "+")
            rest = f"p {p_text(of.p)} ({sizes(of.better, of.worse)})"
            if short:
                rest = f"({p_text(of.corrected)})"
            cells[of.title] = f"{difference} {rest}"
        verdicts = Counter(of.verdict for of in of_claim)
        words = [f"{words} ({n} of {len(of_claim)})" for words, n in verdicts.items()]
        rows.append([claim, *cells.values(), ", ".join(words)])
    return table(["the paper says", *titles, "verdict"], rows)


def scaled(runs, score):
    """Returns with no action as 0 and the largest possible as 1."""
    nothing = no_action(runs[0].env, score)
    return (scores(runs, score) - nothing) / (largest(runs[0].env) - nothing)


def aggregates_table(runs):
    """DMA*-SH minus each method over the environments that have both, on the common scale.

    Of several blocks of an environment, that with most runs of the two counts.
    """
    found = {}
    for _, *pair in rivals_of_ours(runs):
        first = pair[1][0]
        pairs = found.setdefault((setting_of(first), first.arm), {})
        has_scale = not np.isnan(scaled(pair[1], "mean")).any()
        if has_scale and sum(map(len, pair)) > sum(map(len, pairs.get(first.env, []))):
            pairs[first.env] = pair
    rows = []
    several = len({setting for setting, _ in found}) > 1
    for (setting, arm), pairs in found.items():
        if len(pairs) < 2:
            continue
        row = [f"{arm}, {setting}" if several else arm, len(pairs)]
        for score in ("mean", "eval_out"):
            of = {env: [scaled(side, score) for side in pair] for env, pair in pairs.items()}
            row.append(cell(mean_difference(of), 3, "+"))
            row.append(figure(np.mean([probability_of_improvement(*x) for x in of.values()]), 2))
            without = {env: mean_difference(of, env)[0] for env in of}  # one left out
            for env in (min(without, key=without.get), max(without, key=without.get)):
                row.append(f"{figure(without[env], 3, '+')} without {env}")
        rows.append(row)
    rest = "P(better) | lowest, leaving one out | highest"
    head = f"DMA*-SH minus | environments | mean of the sets | {rest} | extrapolation | {rest}"
    return table(head, rows)


def mean_difference(pairs, left_out=None):
    """The mean over environments, of equal weight, of the differences of two samples each."""
    samples = [side for env, pair in pairs.items() if env != left_out for side in pair]
    return mean_contrast([1, -1], samples)


PAPER = {  # its returns for runs of results/: means of the three sets, at its own settings
    "cartpole_inv": {OURS: 967, "Concat": 863, "DA": 892},
    "ball_in_cup": {OURS: 890, "Concat": 924, "DMA-Pearl": 903},
    "di_inv": {"DMA-Pearl": 68},
}


def published_score(run):
    """The larger of the last two evaluations of each set."""
    return np.mean([max(row[name] for row in run.metrics[-2:]) for name in dmash.SETS])


def published_table(runs):
    """Our endpoint, the published score, and the paper's figure, where it gives one."""
    rows = []
    for title, arms in blocks_of(runs).items():
        for arm, of in arms.items():
            first = of[0]
            paper = PAPER.get(first.env, {}).get(first.label)
            if paper:
                row = [title, arm, len(of)]
                for sample in (scores(of, "mean"), [published_score(run) for run in of]):
                    row.append(cell(contrast([1], [sample]), digits_of(first.env)))
                rows.append([*row, paper])
    return table("environment | method | seeds | last evaluation | published score | paper", rows)


MAKERS = {
    "table 1": partial(returns_table, score="mean"),
    "table 2": partial(returns_table, score="eval_out"),
    "table 3": differences_table,
    "claims": claims_table,
    "claims in short": partial(claims_table, short=True),
    "aggregates": aggregates_table,
    "published scores": published_table,
    "departures": departures_table,
    "artefacts": partial(artefacts_table, score="mean"),
    "artefacts in short": partial(artefacts_table, score="mean", short=True),
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
    versions = ", ".join(sorted({printable(run.versions["version"]) for run in runs}))
    done = sum(run.finished for run in runs)
    parts = [INTRO, f"{len(runs)} runs, {done} of them finished. Versions: {versions}.\n"]
    for name, make in MAKERS.items():
        parts.append(f"## {name.capitalize()}\n\n{make(runs)}")
    return "\n".join(parts)


def report(places, experiments, out, into, check):
    """Writes report.md and the figures, or with `into` the tables of a document."""
    if into:
        fill(places, into, check)
        return
    if check:
        raise BadInput("--check: only with --into")
    import compare_figures

    runs = reader.read_runs(places)
    if experiments:
        runs = reader.of_experiments(runs, experiments)
    text = report_text(runs)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(text, encoding="utf-8")
    for name, drawing in compare_figures.all_of(blocks_of(runs), returns_without_action):
        drawing.savefig(out / f"{name}.png", dpi=100)
    print(f"{out}: report.md and figures of {len(runs)} runs")


def fill(places, document, check):
    """Writes the tables of a document anew. With `check`, refuses one that would change."""
    runs = reader.read_runs(places)

    def new(match):
        begin, name, experiments, end = match.groups()
        if name not in MAKERS:
            raise BadInput(f"{document}: no table {name!r}; known: {', '.join(MAKERS)}")
        made = MAKERS[name](reader.of_experiments(runs, experiments.split(", ")))
        return f"{begin}{made}{end}"

    mark = r"(<!-- ([^>]+?) of ([^>]+) -->\n)"
    text = document.read_text(encoding="utf-8")
    filled, count = re.subn(rf"{mark}.*?(<!-- end -->)", new, text, flags=re.DOTALL)
    if count < max(1, len(re.findall(mark, text))):
        raise BadInput(
            f"{document}: needs a line like <!-- table 1 of quick -->, then <!-- end -->"
        )
    if check and filled != text:
        raise BadInput(f"{document}: its tables are not those of the runs; write them with --into")
    if not check:
        document.write_text(filled, encoding="utf-8")
    print(f"{document}: {count} tables")


def add(places, experiment, to):
    """Puts finished runs into the tables of a folder, under the name of an experiment."""
    runs = []
    if (to / "runs.csv").exists():
        runs = reader.read_tables(to)
    before = len(runs)
    for run in reader.read_runs(places):
        if run.finished:
            run.experiment = experiment
            run.name = f"{experiment}/{run.name}"
            runs.append(run)
        else:
            print(f"{run.place}: not finished, left out")
    if len(runs) == before:
        raise BadInput("no finished run there")
    reader.refuse_doubles(runs)
    reader.write_tables(to, runs)
    print(f"{to}: {len(runs) - before} runs more, {len(runs)} in all")


def measure_no_action(envs):
    """Ten episodes in each context, from where the evaluations of a run with seed 11 start."""
    rows = [row for row in no_action_rows() if row["env"] not in envs]
    for env in envs:
        cfg = dmash.Config(env=env, method="dr", seed=11)
        agent = dmash.new_agent(cfg)
        for weights in agent.parameters():
            torch.nn.init.zeros_(weights)  # so the mean action is 0
        for row in dmash.evaluate_sets(agent, cfg, cfg.rollouts):
            rows.append({"env": env} | {name: row[name] for name in ("set", "index", "return")})
    reader.write_table(NO_ACTION, rows)
    print(f"{NO_ACTION}: {len(envs)} environments measured")


def seeds(word):
    """The seeds that a word such as 7 or 11-15 names."""
    first, _, last = word.partition("-")
    found = range(int(first), int(last or first) + 1)
    if not found:
        raise ValueError
    return found


def plan(envs, methods, seeds, given):
    """A command per run, seeds outermost, with the settings in `given`, words for dmash.py."""
    settings = vars(dmash.build_parser().parse_args(given))
    allowed = dmash.Config.__annotations__.keys() - {"env", "method", "seed"}
    for name in settings.keys() - allowed:
        raise BadInput(f"{dmash.flag(name)}: not here; allowed: --envs, --seeds, settings of a run")
    if "threads" not in settings:  # several runs at once must not slow each other down
        given = [*given, "--threads", "1"]
    lines = []
    for seed, env, method in itertools.product(itertools.chain(*seeds), envs, methods):
        dmash.Config(env=env, method=method, seed=seed, **settings)
        words = ["--env", env, "--method", method, "--seed", str(seed), *given, "--go-on"]
        lines.append(shlex.join(["python", "dmash.py", *words]))
    print("\n".join(lines))


COMMANDS = {"plan": plan, "add": add, "report": report, "no-action": measure_no_action}


def build_parser():
    parser = parser_of("compare.py", __doc__)
    modes = parser.add_subparsers(dest="mode", required=True)
    for_plan, for_add, for_report, for_no_action = [
        modes.add_parser(name, allow_abbrev=False) for name in COMMANDS
    ]
    for_plan.epilog = "and settings: python dmash.py --help"
    several = {"nargs": "+", "required": True}
    for part in (for_plan, for_no_action):
        part.add_argument("--envs", **several, help="environments")
    for_plan.add_argument("--methods", **several, help="methods of the comparison")
    for_plan.add_argument("--seeds", type=seeds, **several, help="such as 1 2 or 11-15")
    about = "run folders, folders of these, or with runs.csv, which then counts alone"
    for part in (for_add, for_report):
        part.add_argument("places", nargs="+", metavar="RUNS", help=about)
    for_add.add_argument("--experiment", required=True, help="its name in the tables")
    for_add.add_argument("--to", type=Path, default=RESULTS, help="folder of tables (results)")
    for_report.add_argument("--experiments", nargs="+", help="of the tables only these")
    for_report.add_argument("--out", type=Path, default="runs/report", help="folder (%(default)s)")
    for_report.add_argument("--into", type=Path, help="a document: write its tables, no report")
    for_report.add_argument("--check", action="store_true", help="with --into: only compare")
    return parser


def run_command(argv):
    args, given = build_parser().parse_known_args(argv)
    args = vars(args)
    mode = args.pop("mode")
    if mode == "plan":
        args["given"] = given
    elif given:
        raise BadInput(f"unrecognized arguments: {' '.join(given)}")
    COMMANDS[mode](**args)


def main(argv=None):
    """The command line. Returns the exit status."""
    return dmash.exit_status("compare.py", lambda: run_command(argv))


if __name__ == "__main__":
    sys.exit(main())
