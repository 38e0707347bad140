"""Which method is better, by how much, and how sure is that? Commands for the runs, and a report of those made.

    python studies/compare.py plan --envs cartpole_inv di_inv --methods dma_star_sh concat dr --seeds 11-15 --quick
    python studies/compare.py report RUNS... --out results/comparison

`plan` prints a command for every environment, method and seed, with the settings given, in the order of seeds: a list
cut short leaves whole comparisons. A command that is given again goes on with its run. To work through a list, two at a
time on one machine, or as a Slurm array (in a shell where `python` is the one with torch):

    python studies/compare.py plan … --threads 1 | xargs -P 2 -I{} sh -c '{}'
    sbatch --array=1-$(wc -l < plan.txt) --wrap 'sed -n "${SLURM_ARRAY_TASK_ID}p" plan.txt | sh'

xargs takes quotes away. Where a value needs them, as an --out with a blank does: tr '\\n' '\\0' | xargs -0 -P 2 …

`report` reads config.json, metrics.csv and per_context.csv of all run folders in RUNS and writes report.md (returns by
environment; over environments, scaled returns, gains, probabilities of improvement), report.csv (a row per run) and
figures (learning curves; returns by context, ablations apart) into --out. The same runs give the same tables, byte for
byte. It takes seconds; numpy is enough, matplotlib draws the figures.
"""

import argparse
import csv
import io
import math
import os
import re
import shlex
import sys
from itertools import product
from pathlib import Path

import aer
import numpy as np
from aer import BadInput, group

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where `plan` finds dmash

OURS = "dma_star_sh"
COLUMNS = {name: (name, 1) for name in aer.SCORES} | {"mean, last three": ("mean", 3)}  # of how many evaluations
# The paper's scaled returns (10 seeds, all of its environments), whose ratios are its Table 9
PAPER_METHODS = ("concat", "da", "dr", "dma", "dma_pearl", "dma_star", "dma_star_sh")
PAPER = {
    ("all", "train"): (0.79, 0.81, 0.56, 0.78, 0.80, 0.80, 0.84),
    ("all", "eval_out"): (0.61, 0.65, 0.43, 0.59, 0.63, 0.64, 0.68),
    ("non-overlapping", "eval_out"): (0.64, 0.69, 0.37, 0.61, 0.65, 0.68, 0.73),
    ("overlapping", "eval_out"): (0.56, 0.58, 0.55, 0.55, 0.60, 0.58, 0.59),
}
INTRO = """# Comparison

Average episodic return (AER) at the last evaluation: interquartile mean over seeds [95 % interval of 2,000 bootstrap
samples, which draw seeds within each environment]. The interquartile mean leaves out the lowest and the highest
quarter, rounded down: one each of 4 to 7 seeds, none of fewer. Intervals of few seeds are too narrow: of two, they only
span these, and where all of one side are above all of the other, that of a probability has no width. `mean` is that of
the three sets, minutes are the median. Each run by itself: [report.csv](report.csv). Unfinished runs are counted, not
averaged. `dma_star_sh` is ahead or behind where the intervals of the two do not overlap, both at the last evaluation
and for the mean of each run's last three, of 3 and 3 seeds, 2 and 5, or more. A mask other than most runs' is named.
"""
SCALED = """Returns divided by the largest possible, of the seeds (how many) that all of these methods have in an
environment: {}.
`ode` counts as non-overlapping; methods that lack one of the environments are not here.
"""
GAINS = f"""### Gain of `{OURS}`

Its scaled return divided by the other's, minus 1, of the seeds (how many) that both have in an environment; behind it
the paper's, from its scaled returns over all of its environments.
"""
ODDS = f"""### Probability that `{OURS}` is better

The share of pairs of seeds in which it is, ties half, averaged over environments.
"""

# ---- plan -------------------------------------------------------------------------------------------------------


def commands(envs, methods, seeds, given):
    """A command per run, seeds outermost, with the settings in `given`, words of dmash.py's command line."""
    import dmash

    numbers = []
    for word in seeds:
        ends = re.fullmatch("([0-9]{1,10})(?:-([0-9]{1,10}))?", word)
        low, high = (int(end or ends[1]) for end in ends.groups()) if ends else (1, 0)
        if not low <= high < low + 1000:
            raise BadInput(f"--seeds {word}: must be seeds such as 1 2 3, or ranges such as 11-15 of at most 1,000")
        numbers += range(low, high + 1)
    try:
        settings = {k: v for k, v in vars(dmash.build_parser().parse_args(given)).items() if v not in (None, False)}
        if wrong := [k for k in settings if k in aer.APART[:3] or k not in dmash.Config.__annotations__]:
            raise BadInput(f"{dmash.flag(wrong[0])}: not here; allowed: --envs, --methods, --seeds, settings of a run")
        if split := [word for word in given if "\n" in word]:
            raise BadInput(f"{split[0]!r}: must be one line, as each line is a command")
        for env, method, seed in product(envs, methods, (min(numbers), max(numbers))):
            dmash.Config(env=env, method=method, seed=seed, **settings)
    except dmash.BadInput as error:
        raise BadInput(error) from None
    for seed, env, method in product(*map(dict.fromkeys, (numbers, envs, methods))):
        words = ["--env", env, "--method", method, "--seed", str(seed), *given, "--go-on"]
        yield shlex.join(["python", "dmash.py", *words])


# ---- report.md and report.csv -----------------------------------------------------------------------------------


def listed(words):
    return ", ".join(map(str, words))


def table(head, rows):
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def cell(form, statistic, *samples):
    """A figure and its interval, as far as they are finite numbers."""
    point, *ends = [format(x, form) if math.isfinite(x) else "–" for x in aer.estimate(statistic, *samples)]
    return point if "–" in ends else f"{point} [{', '.join(ends)}]"


def returns(block):
    """The table of a block: a row for each method, with a note of seeds that are not there and versions that differ."""
    seeds, lines, rows = {run.seed for run in block}, [], aer.rows_of(block)
    ours = [run for run in rows.get(OURS, ()) if run.finished]
    differing = [name for name in aer.VERSIONS if len({run.version(name) for run in block}) > 1]
    for label, row in rows.items():
        done, missing = [run for run in row if run.finished], sorted(seeds - {run.seed for run in row})
        at = {run.seed: run.metrics[-1]["step"] if run.metrics else 0 for run in row if not run.finished}
        notes = [f"seed {seed} unfinished, at {step:,.0f}" for seed, step in at.items()]
        notes += [f"seed {listed(missing)} missing"] * bool(missing)
        for name in differing:
            values = group(row, lambda run: run.version(name))
            notes += [f"{name} {value}: seed {listed(run.seed for run in of)}" for value, of in values.items()]
        cells = [cell(".1f", aer.iqm, [aer.last(done, name)]) if done else "–" for name in aer.SCORES]
        cells += [aer.standing(ours, done), f"{np.median(aer.last(done, 'seconds')) / 60:.1f}" if done else "–"]
        lines.append([f"`{label}`", f"{len(done)} of {len(seeds)}", *cells, "; ".join(notes)])
    return table(["method", "seeds", *aer.SCORES, f"`{OURS}` is", "minutes", "note"], lines)


def scaled(runs, envs, method, name, n=1):
    """Strata of scaled returns."""
    return [aer.last(runs[env][method], name, n) / aer.BOUND[env] for env in envs]


def scaled_returns(done, methods):
    """For each set of environments that a method has: a table of all methods that have them."""
    having = {m: tuple(env for env in done if m in done[env] and env in aer.BOUND) for m in methods}
    for envs in sorted(set(having.values()), key=lambda envs: (-len(envs), envs)):
        members = [m for m in methods if set(envs) <= set(having[m])]
        runs, lines = aer.shared({env: done[env] for env in envs}, members), []
        for (kind, of_kind), m in product(aer.by_kind(runs).items(), members):
            cells = (cell(".3f", aer.iqm, scaled(runs, of_kind, m, name)) for name in aer.SCORES)
            lines.append([kind, f"`{m}`", *cells])
        if len(runs) > 1 and len(members) > 1:
            counts = listed(f"{env} ({len(of[members[0]])})" for env, of in runs.items())
            yield f"### Scaled returns in {len(runs)} environments\n\n{SCALED.format(counts)}"
            yield table(["environments", "method", *aer.SCORES], lines)


def against_each(done, methods):
    """Tables of OURS against each other method, over the environments that both have."""
    gains, odds = [], []
    for m in methods if OURS in methods else ():
        runs = aer.shared(done, (OURS, m)) if m != OURS else {}
        for i, (kind, envs) in enumerate(aer.by_kind(runs).items()):
            cells = []
            for name, n in COLUMNS.values():
                cells.append(cell("+.1%", aer.gain, *(scaled(runs, envs, who, name, n) for who in (OURS, m))))
                if m in (paper := dict(zip(PAPER_METHODS, PAPER.get((kind, name), ())))):
                    cells[-1] += f" (paper {paper[OURS] / paper[m] - 1:+.1%})"
            which = ": " + listed(f"{env} ({len(runs[env][m])})" for env in envs) if i == 0 else ""
            gains.append([f"`{m}`", kind + which, *cells])
        if envs := [env for env in done if m != OURS and {m, OURS} <= set(done[env])]:
            cells = []
            for name, n in COLUMNS.values():
                pair = ([aer.last(done[env][who].values(), name, n) for env in envs] for who in (OURS, m))
                cells.append(cell(".2f", aer.improvement, *pair))
            odds.append([f"`{m}`", listed(envs), *cells])
    for text, lines in ((GAINS, gains), (ODDS, odds)):
        if lines:
            yield text
            yield table(["over", "environments", *COLUMNS], lines)


def report(runs):
    """The text of report.md, and its figures: by file name, the function of compare_figures and its arguments."""
    blocks, figures, parts = aer.blocks_of(runs), {}, [INTRO]
    versions = sorted(group(runs, lambda run: run.version("version")).items(), key=lambda item: item[0])
    versions = listed(f"{version} ({len(of)} runs)" for version, of in versions)
    parts.append(f"{len(runs)} runs, {sum(run.finished for run in runs)} of them finished. Versions: {versions}.\n")
    alike = [name for name in runs[0].settings if name not in aer.OWN + tuple(aer.differing(runs))]
    parts.append(f"Settings of all: {listed(f'{name} {runs[0].settings[name]}' for name in alike)}.\n")
    drawn = {title: [run for run in block if run.finished] for title, block in blocks.items()}
    drawn = {title: block for title, block in drawn.items() if block}
    if drawn:
        figures["curves.png"] = "curves", drawn
        parts.append("![Learning curves](curves.png)\n")
        parts.append("The last evaluation may have more episodes (`rollouts`) than those before (`eval_rollouts`).\n")
    for title, block in blocks.items():
        same = [other for other in blocks if blocks[other][0].env == block[0].env]
        parts.append(f"## {title}\n")
        parts += [f"Not comparable with the other {len(same) - 1} tables of this environment.\n"] * (len(same) > 1)
        parts += [f"{aer.own(block)}.\n", returns(block)]
        if title in drawn:
            place = re.sub("[^a-zA-Z0-9_]", ".", block[0].env) + f"_{same.index(title) + 1}" * (len(same) > 1)
            kinds = group(drawn[title], lambda run: "ablations" if run.method in aer.ABLATIONS else "contexts")
            if "ablations" in kinds:  # beside ours, of which most of them are
                kinds["ablations"] = [run for run in drawn[title] if run.method == OURS] + kinds["ablations"]
            for kind in sorted(kinds, reverse=True):  # contexts first
                figures[f"{kind}_{place}.png"] = "contexts", title, kinds[kind]
                parts.append(f"![Return by context]({kind}_{place}.png)\n")
    for settings, same in group(blocks.values(), lambda block: aer.varied(block[0], runs)).items():
        done = aer.finished(same)
        methods = aer.by_rank({m for env in done for m in done[env]}, aer.METHODS)
        if tables := [*scaled_returns(done, methods), *against_each(done, methods)]:
            parts.append(f"## Over environments{settings}\n")
            parts += ["Of the tables of one environment, that with most finished runs counts.\n"] * (
                len(same) > len(done)
            )
            parts += tables
    return "\n".join(parts), figures


def runs_table(runs):
    """The text of report.csv: a row per run, without returns if it is not finished."""
    text, parent = io.StringIO(newline=""), os.path.commonpath([run.folder.parent for run in runs])
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*aer.APART[:3], *aer.OWN, *aer.SCORES, "minutes", "diverged", "version", "folder"])
    for run in runs:
        numbers = [""] * (len(aer.SCORES) + 2)
        if run.finished:
            end = run.metrics[-1]
            diverged = [n for name, n in end.items() if name.startswith("diverged")]
            numbers = [f"{x:.6g}" for x in (*(end[name] for name in aer.SCORES), end["seconds"] / 60)]
            numbers.append(f"{sum(diverged):g}" if diverged else "")
        folder = run.folder.relative_to(parent).as_posix()
        own = [run.config.get(name, "") for name in aer.OWN]
        writer.writerow([run.env, run.method, run.seed, *own, *numbers, run.version("version"), folder])
    return text.getvalue()


def write_report(places, out):
    """Writes all files into the folder `out`."""
    runs = aer.read_runs(places)
    text, figures = report(runs)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in {"report.md": text, "report.csv": runs_table(runs)}.items():
        (out / name).write_bytes(content.encode())
    try:
        import compare_figures
    except ImportError as error:
        figures = {}
        print(f"no figures are drawn ({error})")
    for name, (kind, *arguments) in figures.items():
        getattr(compare_figures, kind)(*arguments).savefig(out / name, dpi=110)
    print(f"{out}: {len(runs)} runs in report.md and report.csv, {len(figures)} figures")


# ---- Command line -----------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)


def main(argv=None):
    """The command line. Returns the exit status: 0; 2 for bad input or a file that cannot be used, told in one line."""
    layout = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = Parser("compare.py", description=__doc__, **layout)
    modes = parser.add_subparsers(dest="mode", required=True, metavar="plan | report")
    plan = modes.add_parser("plan", allow_abbrev=False, epilog="and settings of a run: python dmash.py --help")
    for name, about in dict(envs="environments", methods="methods", seeds="seeds, or ranges such as 11-15").items():
        plan.add_argument(f"--{name}", nargs="+", required=True, help=about)
    report = modes.add_parser("report", allow_abbrev=False)
    report.add_argument("runs", nargs="+", metavar="RUNS", help="run folders, or folders that hold some")
    report.add_argument("--out", default="results/comparison", help="folder to write into (default: %(default)s)")
    try:
        args, given = parser.parse_known_args(argv)
        if args.mode == "plan":
            for line in commands(args.envs, args.methods, args.seeds, given):
                print(line)
        elif given:
            parser.error(f"unrecognized arguments: {' '.join(given)}")
        else:
            write_report(args.runs, Path(args.out))
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # of `| head`; what is left to write must not fail again at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BadInput as error:
        message = error
    except ImportError as error:
        message = f"plan needs what dmash.py needs ({error})"
    except OSError as error:
        message = f"{error.filename or 'output'}: {error.strerror}"
    print(f"compare.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
