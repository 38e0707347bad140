"""The figures of studies/compare.py; no program. Needs matplotlib."""

import textwrap
from itertools import product

import aer
import numpy as np
from matplotlib.figure import Figure

SIGNS = {"action_factor": {1: "normal", -1: "inverted"}, "swap": {0: "normal", 1: "swapped"}}
SIGNS |= {f"sign_{axis}": {1: f"{axis} normal", -1: f"{axis} inverted"} for axis in "xy"}
# Okabe and Ito's colours, which the colour-blind can tell apart, without their yellow, too pale for lines
COLOURS = "#D55E00 #CC79A7 #0072B2 #56B4E9 #8C6D1F #009E73 #E69F00 #000000".split()


def style(label):
    """Colour, marker and line of a method, the same in all figures; the last two tell it in grey. A method that is not
    in the table is grey."""
    i = aer.rank(label.split(",")[0], aer.METHODS)[0]
    first = dict(linewidth=2.2, zorder=3) if i == 0 else dict(linewidth=1.3)
    line, marker = ("-", "--", "-.", ":")[(i + i // 8) % 4], "osD^vP*Xphd<>H8.1234x+|_"[i]
    return first | dict(
        color=COLOURS[i % 8] if i < len(aer.METHODS) else "0.6",
        marker=marker,
        markersize=4,
        linestyle=line,
        label=label,
    )


def curves(blocks):
    """Interquartile mean over seeds of the mean of the three sets, with its interval, against gradient steps."""
    rows = -(-len(blocks) // 3)
    columns = -(-len(blocks) // rows)
    figure = Figure(figsize=(1 + 4.5 * columns, 1 + 3.2 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, (title, block) in zip(axes, blocks.items()):
        for label, runs in aer.rows_of(block).items():
            means = [{row["step"]: row["mean"] for row in run.metrics} for run in runs]
            steps = sorted(set.intersection(*map(set, means)))
            middle, *ends = zip(*(aer.estimate(aer.iqm, [np.array([mean[s] for mean in means])]) for s in steps))
            ax.plot(steps, middle, markevery=-(-len(steps) // 10), **style(label))
            ax.fill_between(steps, *ends, color=style(label)["color"], alpha=0.15, linewidth=0)
        ax.set(xlabel="gradient steps", ylabel="return, mean of the three sets")
        ax.locator_params(axis="x", nbins=5)
        ax.set_title(textwrap.fill(title, 50), fontsize="medium")
    for ax in axes[len(blocks) :]:
        ax.remove()
    return with_legend(figure)


def contexts(title, block):
    """Return in each context at the last evaluation, mean over seeds: against each context value; for ode and from
    three dimensions on, the distance from the centre of the values trained on, 1 at their ends; where there are only
    signs, the place in the set. Signs apart, what was trained on grey."""
    names = [name for name in block[0].contexts[0] if name not in ("step", "set", "index", "return", "diverged")]
    signs, graded = [name for name in names if name in SIGNS], [name for name in names if name not in SIGNS]
    trained = {name: [row[name] for row in block[0].contexts if row["set"] == "train"] for name in graded}
    ends = {name: (min(values), max(values)) for name, values in trained.items()}

    def distance(row):
        return max(abs(2 * row[name] - low - high) / (high - low or 1) for name, (low, high) in ends.items())

    places = {name: (lambda row, name=name: row[name], ends[name]) for name in graded}
    if len(graded) > 2 or block[0].env.startswith("ode"):
        places = {"distance from the centre": (distance, (0, 1))}
    if not graded:
        places = {"place in the set": (lambda row: row["index"], (0, 0))}
    panels = list(product(product(*(SIGNS[name] for name in signs)), places))
    figure = Figure(figsize=(1 + 4.5 * len(panels), 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=len(places) == 1, sharey=True, squeeze=False)[0]
    for ax, (values, name) in zip(axes, panels):
        place, shaded = places[name]
        for label, runs in aer.rows_of(block).items():
            found = [row for run in runs for row in run.contexts if all(row[s] == v for s, v in zip(signs, values))]
            points = aer.group(found, lambda row: (place(row), row["set"], row["index"]))
            points = [(key[0], np.mean([row["return"] for row in points[key]])) for key in sorted(points)]
            look = style(label) | ({} if len(graded) == 1 else {"linestyle": ""})  # else what differs in the rest jumps
            ax.plot(*zip(*points), alpha=0.8, **look)
        ax.axvspan(*shaded, color="0.92", zorder=0)
        ax.set(xlabel=name, title=", ".join(SIGNS[s][v] for s, v in zip(signs, values)))
    axes[0].set_ylabel("return at the last evaluation")
    figure.suptitle(textwrap.fill(title, 50 * len(panels)))
    return with_legend(figure)


def with_legend(figure):
    """One legend below all panels, each method once; returns from 0 on, lest differences look larger than they are."""
    lines = {label: line for ax in figure.axes for line, label in zip(*ax.get_legend_handles_labels())}
    labels = sorted(lines, key=lambda label: aer.rank(label.split(",")[0], aer.METHODS))
    place = dict(loc="outside lower center", ncols=max(3, int(figure.get_figwidth() / 1.9)), handlelength=3)
    figure.legend([lines[label] for label in labels], labels, **place)
    for ax in figure.axes:
        ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    return figure
