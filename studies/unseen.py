"""Does a method act well where a discontinuous context is new, and how far beyond its ranges does it get?

    python studies/unseen.py --env di_signs_without_pm --method concat --quick     one run; as long as one of dmash.py
    python studies/unseen.py plan --seeds 11-13 --quick --threads 1                the commands of all runs
    python studies/unseen.py report RUNS... --out results/unseen                   what they came to; seconds
    python studies/unseen.py beyond RUN... --out results/beyond                    within a minute a run on cartpole

In the paper's evaluation every sign was trained on. `di_signs` has a sign for each axis: an agent trained on three of
the four pairs knows each sign, but not the fourth pair. The first command line is dmash.py's, with --resume, --go-on
and --eval, and four environments more: di_signs_without_pp, _pm, _mp, _mm (p plus, m minus, x first). Their sets, with
masses of the train range: train, the three other pairs in turns; eval_in, the same with masses in between; eval_out,
the pair left out, with the masses of eval_in. `report` prints returns per method, means over pairs and seeds [95 %
intervals of bootstrap samples, which draw seeds within each pair]; unseen.csv has a row per run, unseen.png shows each.

`beyond` varies one context value after the other from a quarter of the lower to four times the upper extrapolation
limit, for each sign, and each sign's strength from 0 to twice the trained one; all else has its default, and what an
actuator gets is clipped to [-1, 1]. It prints means by range; beyond_<env>.csv has all, beyond_<env>.png shows them.
"""

import argparse
import sys
from dataclasses import asdict
from itertools import cycle, product
from pathlib import Path
from unittest import mock

import aer
import compare
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import aib_envs  # noqa: E402
import dmash  # noqa: E402

METHODS = "dma_star_sh dma_star concat da dr".split()
LEFT_OUT = {f"di_signs_without_{'mp'[x > 0]}{'mp'[y > 0]}": (x, y) for x, y in product((1.0, -1.0), repeat=2)}
STRENGTHS = (-2, -1.5, -1, -0.5, -0.25, -0.1, 0, 0.1, 0.25, 0.5, 1, 1.5, 2)  # of a sign
POINTS, FAR, ROLLOUTS = 17, 4, 5  # values of another context, how far beyond its limits, episodes at each


def context_sets(env_id, n=20, seed=0, plain=aib_envs.context_sets):
    """aib_envs.context_sets, also for the environments of LEFT_OUT."""
    if env_id not in LEFT_OUT:
        return plain(env_id, n, seed)
    sets, left_out = plain("di_signs", n), LEFT_OUT[env_id]

    def signed(name, pairs):
        return [context | {"sign_x": x, "sign_y": y} for context, (x, y) in zip(sets[name], cycle(pairs))]

    kept = [pair for pair in LEFT_OUT.values() if pair != left_out]
    return dict(train=signed("train", kept), eval_in=signed("eval_in", kept), eval_out=signed("eval_in", [left_out]))


def report(places, out):
    """Prints the table of finished runs, and writes their returns and the figure into the folder `out`."""
    found = aer.read_runs(places)
    runs = [run for run in found if run.finished and run.env in LEFT_OUT]
    if not runs:
        raise aer.BadInput(f"{compare.listed(places)}: no finished run of {compare.listed(LEFT_OUT)}")
    print(f"{len(runs)} runs; {len(found) - len(runs)} more are unfinished or of other environments\n")
    mean, lines = lambda strata: np.concatenate(strata, -1).mean(-1), []
    rows = aer.group(runs, lambda run: aer.full_label(run, runs))
    for label, of in rows.items():
        pairs = aer.group(of, lambda run: run.env).values()
        cells = (compare.cell(".1f", mean, [aer.last(pair, name) for pair in pairs]) for name in aer.SETS)
        lines.append([f"`{label}`", str(len(of)), str(len(pairs)), *cells])
    head = ["method", "runs", "pairs left out", "three pairs: train", "eval_in", "the pair left out: eval_out"]
    print(compare.table(head, lines), end="")
    columns = ("env", "method", "seed", "steps", *aer.SETS)
    table = [{name: getattr(run, name, run.metrics[-1].get(name)) for name in columns} for run in runs]
    write(out, "unseen", table, draw_report, rows)


def draw_report(figures, rows):
    """Each run's return on the pairs it was trained on (open) and on the one left out (filled); bars are means."""
    figure = figures.Figure(figsize=(2 + 1.3 * len(rows), 4), layout="constrained")
    ax = figure.subplots()
    for x, (label, runs) in enumerate(rows.items()):
        look = figures.style(label) | {"linestyle": "", "markersize": 6}
        for middle, name, face in ((x - 0.2, "eval_in", "none"), (x + 0.2, "eval_out", look["color"])):
            values = aer.last(runs, name)
            ax.plot(middle + np.linspace(-0.1, 0.1, len(values)), values, markerfacecolor=face, **look)
            ax.hlines(values.mean(), middle - 0.17, middle + 0.17, color="black", zorder=4)
    ax.set_xticks(range(len(rows)), rows)
    ax.set(ylim=(-3, 103), ylabel="return, of at most 100", title="open: three pairs trained on; filled: pair left out")
    return figure


def sweeps(dims):
    """Pairs of a panel and a context: in a panel, one dimension varies, with one combination of the others' signs."""
    for dim in dims:
        if dim.binary:
            values = () if dim.only else STRENGTHS
        else:
            low, high = dim.extrapolation
            ends = low / FAR if low > 0 else low * FAR, min(high * FAR, 0.99 * dim.below)
            values = (np.geomspace if low > 0 else np.linspace)(*ends, POINTS)
        others = [other for other in dims if other.binary and other is not dim]
        for signs in product(*(other.train[::-1] for other in others)):
            fixed = {other.name: sign for other, sign in zip(others, signs)}
            title = ", ".join([dim.name, *(f"{name} {sign:g}" for name, sign in fixed.items())])
            for value in values:
                context = {other.name: other.default for other in dims} | fixed | {dim.name: float(value)}
                yield {"panel": title, "varied": dim.name}, context


def where(dim, value):
    """The column of the table that a value counts in."""
    if dim.binary:
        return f"±{abs(value):g}"
    ranges = {"train range": dim.train, "extrapolation range": dim.extrapolation}
    return next((name for name, (low, high) in ranges.items() if low <= value <= high), "beyond")


def means(rows, key):
    return {name: np.mean([row["return"] for row in of]) for name, of in aer.group(rows, key).items()}


def labels_of(loaded, paths):
    """A label for each of the policies, in which their settings and steps show where they differ; BadInput: the same
    one twice."""
    runs = [aer.Run(path, asdict(cfg) | {"steps": a.step}, [], []) for (cfg, a), path in zip(loaded, paths)]
    of_env, there = aer.group(runs, lambda run: run.env), {}
    labels = [aer.full_label(run, of_env[run.env]) for run in runs]
    for run, label in zip(runs, labels):
        if there.setdefault((run.env, label, run.seed), run) is not run:
            raise dmash.BadInput(f"{run.folder}: the same run as {there[run.env, label, run.seed].folder}")
    return labels


def beyond(paths, out):
    """Evaluates the policies, prints a table for each panel, and writes all returns and the figures into `out`."""
    loaded, of_env = [dmash.load_policy(path) for path in paths], {}
    labels = labels_of(loaded, paths)
    out.mkdir(parents=True, exist_ok=True)
    for label, (cfg, agent) in zip(labels, loaded):
        print(f"{cfg.env}, {cfg.method}, seed {cfg.seed}, step {agent.step:,} of {cfg.steps:,}", flush=True)
        panels, contexts = zip(*sweeps(aib_envs.lookup(cfg.env).context))
        returns, diverged = (x.tolist() for x in dmash.evaluate(agent, cfg, contexts, ROLLOUTS))
        for panel, context, of, lost in zip(panels, contexts, returns, diverged):
            row = {"method": label, "seed": cfg.seed, "step": agent.step} | panel | context
            of_env.setdefault(cfg.env, []).append(row | {"return": float(np.mean(of)), "diverged": sum(lost)})
    for env, rows in of_env.items():
        dims = {dim.name: dim for dim in aib_envs.lookup(env).context}
        for title, panel in aer.group(rows, lambda row: row["panel"]).items():
            dim, lines = dims[panel[0]["varied"]], []
            for method, of in aer.group(panel, lambda row: row["method"]).items():
                columns = means(of, lambda row: where(dim, row[dim.name]))
                seeds = str(len({row["seed"] for row in of}))
                lines.append([f"`{method}`", seeds, *(f"{columns[name]:.1f}" for name in reversed(columns))])
            print(f"\n{env}: {title}\n\n{compare.table(['method', 'seeds', *reversed(columns)], lines)}", end="")
        write(out, f"beyond_{env.replace(':', '.').replace('/', '.')}", rows, draw_beyond, env, dims, rows)


def draw_beyond(figures, env, dims, rows):
    """Return against what varies, mean over runs. The train range is dark, the extrapolation range light."""
    panels = aer.group(rows, lambda row: row["panel"])
    figure = figures.Figure(figsize=(1 + 4.3 * len(panels), 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (title, panel) in zip(axes, panels.items()):
        dim = dims[panel[0]["varied"]]
        for method, of in aer.group(panel, lambda row: row["method"]).items():
            ax.plot(*zip(*means(of, lambda row: row[dim.name]).items()), **figures.style(method))
        for sign in dim.train * dim.binary:
            ax.axvline(sign, color="0.84", linewidth=6, zorder=0)
        for ends, grey in ((dim.extrapolation, "0.93"), (dim.train, "0.84")) * (not dim.binary):
            ax.axvspan(*ends, color=grey, zorder=0)
        ax.set(title=title, xlabel=dim.name, xscale="linear" if dim.binary or dim.extrapolation[0] <= 0 else "log")
    axes[0].set_ylabel("return")
    figure.suptitle(f"{env}. Dark: trained on; light: the paper's extrapolation range")
    return figures.with_legend(figure)


def write(out, name, rows, draw, *arguments):
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.csv").write_text(dmash.csv_text(rows))
    try:
        import compare_figures
    except ImportError as error:
        return print(f"no figure is drawn ({error})")
    draw(compare_figures, *arguments).savefig(out / f"{name}.png", dpi=110)


def run_command(parser, argv):
    try:
        args, given = parser.parse_known_args(argv)
        if args.mode == "plan":
            lines = compare.commands(LEFT_OUT, METHODS, args.seeds, given)
            print(*(line.replace("dmash.py", "studies/unseen.py", 1) for line in lines), sep="\n")
        elif given:
            parser.error(f"unrecognized arguments: {' '.join(given)}")
        else:
            {"report": report, "beyond": beyond}[args.mode](args.places, args.out)
    except aer.BadInput as error:
        raise dmash.BadInput(error) from None


@mock.patch.dict(aib_envs.ENVS, dict.fromkeys(LEFT_OUT, aib_envs.ENVS["di_signs"]))
@mock.patch.object(aib_envs, "context_sets", context_sets)
def main(argv=None):
    """The command line. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = compare.Parser("unseen.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True, metavar="plan | report | beyond | --env ENV")
    modes.add_parser("plan", allow_abbrev=False).add_argument("--seeds", nargs="+", required=True)
    for mode in (modes.add_parser("report"), modes.add_parser("beyond")):
        mode.add_argument("places", nargs="+", metavar="RUN")
        mode.add_argument("--out", type=Path, required=True)
    if {"--env", "--resume", "--eval"} & {word.split("=")[0] for word in argv} and argv[0] not in modes.choices:
        return dmash.main(argv)
    return dmash.exit_status("unseen.py", lambda: run_command(parser, argv))


if __name__ == "__main__":
    sys.exit(main())
