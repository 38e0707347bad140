"""The figures of studies/inside.py; no program. Needs matplotlib."""

import numpy as np
from matplotlib.figure import Figure

MARKERS = "ovsD"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito's
LINES = ("-", "--", "-.", ":")


def look_of(i):
    """The look of the i-th line, which the colour-blind can tell apart, and readers in grey."""
    i = i % len(COLOURS)
    return {"color": COLOURS[i], "linestyle": LINES[i], "marker": MARKERS[i], "markersize": 4}


def mode_label(mode):
    return ", ".join(f"{name} {value:g}" for name, value in mode.items()) or "all contexts"


def heat_map(ax, matrix, space, form):
    """A matrix of the few contexts as colours and numbers."""
    low = min(0, matrix.min())
    middle = (low + matrix.max()) / 2
    ax.imshow(matrix, cmap="cividis", vmin=low, vmax=matrix.max())
    for (i, j), value in np.ndenumerate(matrix):
        colour = "w" if value <= middle else "k"
        ax.text(j, i, format(value, form), ha="center", va="center", color=colour)
    labels = [", ".join(f"{value:g}" for value in context.values()) for context in space.few]
    ax.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    ax.set_yticks(range(len(labels)), labels)
    return ", ".join(space.few[0])  # the names of the contexts


def codes(space, cosines, samples):
    """Cosines of mean codes; 500 codes in the plane of the train set's principal components."""
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    first, *axes = figure.subplots(1, 3, width_ratios=(1.1, 1, 1))
    names = heat_map(first, cosines, space, ".2f")
    first.set(title="cosine of mean codes", xlabel=names, ylabel=names)
    _, trained = samples["train"]
    centre = trained.mean(0)
    _, size, rows = np.linalg.svd(trained - centre, full_matrices=False)
    share = size**2 / (size**2).sum()
    for ax, which in zip(axes, ("train", "eval_out")):
        contexts, z = samples[which]
        x, y = rows[:2] @ (z[:500] - centre).T
        s, u = space.split(contexts[:500])
        u = u[:, 0]
        colours = {"cmap": "viridis", "vmin": u.min(), "vmax": u.max()}
        for i, mode in enumerate(space.modes):
            own = s == i
            points = ax.scatter(x[own], y[own], c=u[own], marker=MARKERS[i % 4], **colours)
            points.set_label(mode_label(mode))
        figure.colorbar(points, ax=ax, label=space.first.name)
        ax.set(title=f"z, {which}", ylabel=f"second component ({share[1]:.0%})")
        ax.set_xlabel(f"first component ({share[0]:.0%} of variance, train)")
        ax.legend()
    return figure


def adapter(space, values, a, s, returns):
    """The first number of the mean action in three states, by ω's context; the cross-table."""
    strength = np.abs(a).mean((0, 1, 3))
    order = np.argsort(strength)
    states = order[[len(s) // 2, -len(s) // 10, -1]]  # of median, large and largest actions
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1))
    axes = left.subplots(1, 3, sharey=True)
    for ax, state in zip(axes, states):
        ax.axvspan(*space.first.train, color="0.92", zorder=0)
        ax.axhline(0, color="0.6", linewidth=0.8)
        for i, mode in enumerate(space.modes):
            ax.plot(values, a[i, :, state, 0], label=mode_label(mode), **look_of(i))
        numbers = " ".join(f"{x:.2f}" for x in s[state][:6])
        ax.set_title(f"s = {numbers}", fontsize="small")
        ax.set_xlabel(f"{space.first.name} of ω's context")
    axes[0].set_ylabel("mean action")
    axes[0].legend()
    ax = right.subplots()
    names = heat_map(ax, returns, space, ".0f")
    ax.set(title="return", xlabel=f"ω of {names}", ylabel=f"acting in {names}")
    return figure
