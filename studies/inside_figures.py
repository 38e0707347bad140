"""The figures of studies/inside.py; no program. Needs matplotlib."""

import numpy as np
from matplotlib.figure import Figure

MARKERS = "ovsD"  # of modes, and of sets
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")  # Okabe and Ito's
LINES = ("-", "--", "-.", ":")
INFORMATION = ("I(Z;S)", "I(Z;U|S)", "I(Z;C)")
PARTS = ("variability", "noise", "spread", "separation")


def heat_map(ax, matrix, space, form, low, high):
    """A matrix of contexts as colours and numbers."""
    labels = [", ".join(f"{value:g}" for value in context.values()) for context in space.few]
    ax.imshow(matrix, cmap="cividis", vmin=low, vmax=high)
    for (i, j), value in np.ndenumerate(matrix):
        dark = value <= (low + high) / 2
        ax.text(j, i, form.format(value), ha="center", va="center", color="w" if dark else "k", fontsize="small")
    ax.set_xticks(range(len(labels)), labels, rotation=45, ha="right", fontsize="small")
    ax.set_yticks(range(len(labels)), labels, fontsize="small")
    ax.set(xlabel=(names := ", ".join(space.few[0])), ylabel=names)


def mode_label(mode):
    return ", ".join(f"{name} {value:g}" for name, value in mode.items()) or "all contexts"


def codes(name, matrix, space, shown):
    """Cosines of mean codes; the codes of 500 windows in the plane of the train set's first principal components."""
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    first, *axes = figure.subplots(1, 3, width_ratios=(1.1, 1, 1))
    heat_map(first, matrix, space, "{:.2f}", min(0, matrix.min()), 1)
    first.set_title("cosine of mean codes")
    z = shown["train"][1]
    _, size, rows = np.linalg.svd(z - z.mean(0), full_matrices=False)
    share = size[:2] ** 2 / (size**2).sum()
    for ax, which in zip(axes, ("train", "eval_out")):
        contexts, codes = (values[:500] for values in shown[which])
        x, y = rows[:2] @ (codes - z.mean(0)).T
        s, u = space.split(contexts)
        for i, mode in enumerate(space.modes):
            look = dict(marker=MARKERS[i % 4], cmap="viridis", vmin=u[:, 0].min(), vmax=u[:, 0].max(), s=22)
            look |= dict(linewidths=0.3, edgecolors="k", label=mode_label(mode))
            points = ax.scatter(x[s == i], y[s == i], c=u[s == i, 0], **look)
        figure.colorbar(points, ax=ax, label=space.first.name)
        ax.set(title=f"z, {which}", xlabel=f"first component ({share[0]:.0%} of variance, train)")
        ax.set_ylabel(f"second component ({share[1]:.0%})")
        ax.legend(fontsize="small")
    figure.suptitle(name, parse_math=False)
    return figure


def adapter(name, space, values, a, s, returns):
    """Mean action in three states, of median, large and largest actions, under what contexts tell; the cross-table."""
    actions, strength = min(a.shape[-1], 2), np.abs(a).mean((0, 1, 3))
    a, s = (np.take(x, np.argsort(strength)[[len(s) // 2, -len(s) // 10, -1]], axis) for x, axis in ((a, 2), (s, 0)))
    figure = Figure(figsize=(15, 1.6 + 2.6 * actions), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1))
    axes = left.subplots(actions, 3, sharex=True, sharey=True, squeeze=False)
    for (row, column), ax in np.ndenumerate(axes):
        ax.axvspan(*space.first.train, color="0.92", zorder=0)
        for i, mode in enumerate(space.modes):
            look = dict(color=COLOURS[i % 6], linestyle=LINES[i % 4], marker=MARKERS[i % 4], markersize=3)
            ax.plot(values, a[i, :, column, row], label=mode_label(mode), **look)
        if row == 0:
            state = " ".join(f"{x:.2f}" for x in s[column][:6]) + " …" * (s.shape[1] > 6)
            ax.set_title(f"s = {state}", fontsize="small")
        ax.axhline(0, color="0.6", linewidth=0.8)
    for ax in axes[-1]:
        ax.set_xlabel(f"{space.first.name} of the context told")
    for row, ax in enumerate(axes[:, 0]):
        ax.set_ylabel(f"mean action {row + 1}")
    left.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    ax = right.subplots()
    heat_map(ax, returns, space, "{:.0f}", min(0, returns.min()), returns.max())
    ax.set(xlabel=f"told of {ax.get_xlabel()}", ylabel=f"acting in {ax.get_ylabel()}", title="return")
    figure.suptitle(name, parse_math=False)
    return figure


def training(name, numbers):
    """Variability and information of the train set at each snapshot."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    first, second = figure.subplots(1, 2)
    for ax, quantities in ((first, PARTS), (second, INFORMATION)):
        for i, quantity in enumerate(quantities):
            points = [(step, found[quantity]) for step, found in numbers.items() if quantity in found]
            look = dict(color=COLOURS[i], linestyle=LINES[i], marker=MARKERS[i], markersize=4, label=quantity)
            ax.plot(*zip(*points), **look) if points else None
        ax.set_xlabel("gradient steps")
    first.set_ylabel("variability and its parts")
    first.set_ylim(bottom=0)
    second.axhline(np.log(2), color="0.5", linewidth=1, label="ln 2")
    second.set_ylabel("information (nats)")
    for ax in (first, second):
        ax.legend(fontsize="small")
    figure.suptitle(name, parse_math=False)
    return figure


def side_by_side(rows):
    """Main quantities, a line for each run: by set, Variability by part, returns of the cross-table by what is told."""
    names = list(dict.fromkeys(row["run"] for row in rows))
    steps = {row["run"]: row["step"] for row in rows if row["set"] != "snapshot"}
    sets = ("train", "eval_in", "eval_out")
    told = ("own", "matching", "best", "other mode")
    panels = [  # title, and by label the set and quantity
        ("return", {which: (which, "return") for which in sets}),
        ("return, told ω of …", {label: ("", f"return, {label}") for label in told}),
        ("variability, train", {part: ("train", part) for part in PARTS}),
        *((f"information, {which} (nats)", {name: (which, name) for name in INFORMATION}) for which in sets[::2]),
    ]
    found = {(row["run"], row["set"], row["quantity"]): row["value"] for row in rows if not row["context"]}
    panels = [(title, lines) for title, lines in panels if any(key[1:] in lines.values() for key in found)]
    figure = Figure(figsize=(3 + 2.6 * len(panels), 2.2 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (title, lines) in zip(axes, panels):
        for i, (label, key) in enumerate(lines.items()):
            x = [found.get((name, *key), np.nan) for name in names]
            places = np.arange(len(names)) + 0.14 * (i - 1)  # lest equal values hide each other
            ax.plot(x, places, MARKERS[i], color=COLOURS[i], markersize=5, linestyle="", label=label)
        if title.startswith("information"):
            ax.axvline(np.log(2), color="0.5", linewidth=1, label="ln 2")
        if title.startswith("variability"):
            ax.set_xscale("log")
        else:
            ax.set_xlim(min(0, ax.get_xlim()[0]), 1.08 * ax.get_xlim()[1])
        ax.grid(axis="y", color="0.9")
        ax.set_title(title, fontsize="medium")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), fontsize="small")
    axes[0].set_yticks(range(len(names)), [f"{name}\nstep {steps[name]:,}" for name in names], fontsize="small")
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    return figure
