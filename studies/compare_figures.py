"""The figures of studies/compare.py, a file per environment and setting. Needs matplotlib.

The first column shows learning: the mean of the three sets at each evaluation. The others show the
return in each context at the last evaluation. Lines are means over seeds, points single seeds. The
first row holds five methods at most. Each further row holds one other method and, for comparison,
DMA*-SH. The dashed line is what an agent earns that never acts.
"""

import dataclasses
import functools
import operator

import numpy as np
from figures import Figure
from runs import OURS, file_name, group, joined

LOOKS = {  # colours that the colour-blind can tell apart; marker and line tell them apart in grey
    OURS: ("#D55E00", "o", "solid"),
    "DMA*": ("#0072B2", "s", (0, (6, 2))),
    "Concat": ("#E69F00", "^", "dashdot"),
    "DA": ("#009E73", "D", (0, (3, 1, 1, 1))),
    "DR": ("#CC79A7", "v", "dotted"),
    "no action": ("0.35", "", "dashed"),
}
OTHER = ("black", "X", "solid")
WORDS = {
    ("action_factor", 1): "not inverted",
    ("action_factor", -1): "inverted",
    ("swap", 0): "not swapped",
    ("swap", 1): "swapped",
}


def words_for(context):
    """A context, or a part of it, in words."""
    return joined(*(WORDS.get(pair, f"{pair[0]} {pair[1]:g}") for pair in context.items()))


def learning_curve(run):
    return [(row["step"], row["mean"]) for row in run.metrics]


# A column of a figure: title, label of its axis, points of a run, trained range, parts of a line
LEARNING = ("mean of the three sets", "gradient steps", learning_curve, None, 1000)


def style(label):
    color, marker, linestyle = LOOKS.get(label, OTHER)
    return {"color": color, "marker": marker, "linestyle": linestyle, "label": label}


def all_of(blocks, nothing):
    """Names and figures. `nothing(env)` gives the returns without action by set and index."""
    names = []
    for arms in blocks.values():
        first = next(iter(arms.values()))[0]
        name = file_name(first.env)
        names.append(name)
        if names.count(name) > 1:
            name += f"_{names.count(name)}"
        idle = without_action(first, nothing(first.env))
        columns = contexts(first)
        yield name, drawn(arms, idle, [LEARNING, *columns])
        few = {label: arms[label] for label in (OURS, "DMA*", "Concat", "DR") if label in arms}
        if name == "cartpole_inv" and few:
            yield "pole_length", drawn(few, idle, columns)


def without_action(run, nothing):
    """A run with the same contexts and steps in which nothing acts; none where it is not known."""
    if len(nothing) != len(run.contexts):
        return []
    mean = np.mean(list(nothing.values()))
    metrics = [row | {"mean": mean} for row in run.metrics]
    contexts = [row | {"return": nothing[row["set"], row["index"]]} for row in run.contexts]
    return [dataclasses.replace(run, metrics=metrics, contexts=contexts)]


def contexts(run):
    """A column for each combination of signs and each place on the horizontal axis.

    A context with two values is a sign. The place is the value of another context. With more than
    two of these, and in the ODE, it is the distance from the centre of the trained range, which
    ends at 1.
    """
    signs, ends = [], {}
    for name in run.contexts[0]:
        if name in ("set", "index", "return", "diverged"):
            continue
        if len({row[name] for row in run.contexts}) <= 2:
            signs.append(name)
        else:
            trained = [row[name] for row in run.contexts if row["set"] == "train"]
            ends[name] = min(trained), max(trained)

    def distance(row):
        return max(
            abs(2 * row[x] - low - high) / (high - low or 1) for x, (low, high) in ends.items()
        )

    places = [(name, operator.itemgetter(name), trained) for name, trained in ends.items()]
    if len(ends) > 2 or run.env.startswith("ode"):
        places = [("distance from the centre", distance, (0, 1))]
    if not ends:
        places = [("number in its set", operator.itemgetter("index"), None)]
    kinds = sorted({tuple(row[name] for name in signs) for row in run.contexts}, reverse=True)
    columns = []
    for kind in kinds:
        chosen = dict(zip(signs, kind))
        for name, place, trained in places:
            points = functools.partial(places_and_returns, chosen, place)
            columns.append((words_for(chosen), name, points, trained, 20))
    return columns


def places_and_returns(signs, place, run):
    """Points of a run, for the contexts with these signs."""
    points = []
    for row in run.contexts:
        if signs.items() <= row.items():
            points.append((place(row), row["return"]))
    return points


def drawn(arms, idle, columns):
    arms = arms | {"no action": idle}
    first = [label for label in arms if label in LOOKS]
    rows = [first] + [[OURS, label, "no action"] for label in arms if label not in LOOKS]
    heights = [2.2] + [1] * (len(rows) - 1)
    size = 3.8 * len(columns), 1.7 * sum(heights) + 0.9
    figure = Figure(figsize=size, layout="constrained")
    shape = {"squeeze": False, "height_ratios": heights}
    axes = figure.subplots(len(rows), len(columns), sharex="col", sharey=True, **shape)
    for row, labels in zip(axes, rows):
        row[0].set_ylabel("return")
        for ax, (title, _, points, trained, parts) in zip(row, columns):
            if labels is not first:
                title = labels[1]
            ax.set_title(title, fontsize="medium")
            for label in labels:
                draw(ax, arms.get(label, []), points, parts, style(label))
            if trained:
                ax.axvspan(*trained, color="0.93", zorder=0)
                ax.text(sum(trained) / 2, 0, "trained", color="0.35", ha="center", va="bottom")
    lowest, _ = axes[0][0].get_ylim()
    axes[0][0].set_ylim(bottom=min(0, lowest))
    for ax, (_, label, *_) in zip(axes[-1], columns):
        ax.set_xlabel(label)
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=6, handlelength=3)
    return figure


def draw(ax, runs, points_of_run, parts, look):
    """Each point of each run, and a line through the means in so many equal parts of the axis."""
    points = [point for run in runs for point in points_of_run(run)]
    if not points:
        return
    lowest = min(x for x, _ in points)
    width = (max(x for x, _ in points) - lowest) / parts or 1
    near = group(sorted(points), lambda point: round((point[0] - lowest) / width))
    means = [np.mean(of, axis=0) for of in near.values()]
    ax.plot(*zip(*means), **look, markersize=5, markevery=max(1, len(means) // 8))
    if look["marker"]:
        single = look | {"linestyle": "", "label": "_", "alpha": 0.4}
        ax.plot(*zip(*points), **single, markersize=2.5, markeredgewidth=0)
