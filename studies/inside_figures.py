"""The figures of studies/inside.py; no program. Needs matplotlib."""

import numpy as np
from matplotlib.figure import Figure

MARKERS = "ovsD"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito's
LINES = ("-", "--", "-.", ":")
PARTS = ("variability", "noise", "spread", "separation")
INFORMATION = ("I(Z;S)", "I(Z;U|S)", "I(Z;C)")
SETS = ("train", "eval_in", "eval_out")
RETURNS = ("return, own", "return, matching", "return, best", "return, other mode")
PANELS = (  # of side_by_side: title, and (set, quantity) of each mark
    ("return", [(which, "return") for which in SETS]),
    ("return in a context, with ω …", [("", quantity) for quantity in RETURNS]),
    ("variability, train", [("train", part) for part in PARTS]),
    ("information, train (nats)", [("train", name) for name in INFORMATION]),
    ("information, eval_out (nats)", [("eval_out", name) for name in INFORMATION]),
)


def of_run(name, space, shown):
    """The figures of a run by their kinds."""
    figures = {"adapter": adapter(space, *shown["adapter"])}
    if "codes" in shown:
        figures["codes"] = codes(space, *shown["codes"])
    if "training" in shown:
        figures["training"] = training(*shown["training"])
    for figure in figures.values():
        figure.suptitle(name, parse_math=False)
    return figures


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


def training(snapshots):
    """Variability and information of the train set at each snapshot."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    first, second = figure.subplots(1, 2)
    steps = sorted(snapshots)
    for ax, quantities in ((first, PARTS), (second, INFORMATION)):
        for i, quantity in enumerate(quantities):
            values = [snapshots[step].get(quantity, np.nan) for step in steps]
            ax.plot(steps, values, label=quantity, **look_of(i))
        ax.set_xlabel("gradient steps")
    first.set(ylabel="variability and its parts", ylim=(0, None))
    second.axhline(np.log(2), color="0.5", linewidth=1, label="ln 2")
    second.set_ylabel("information (nats)")
    first.legend()
    second.legend()
    return figure


def side_by_side(rows):
    """The main quantities of all runs, a line for each run."""
    steps = {row["run"]: row["step"] for row in rows if row["set"] != "snapshot"}
    found = {}
    for row in rows:
        if not row["context"]:
            found[row["run"], row["set"], row["quantity"]] = row["value"]
    figure = Figure(figsize=(16, 2.5 + 0.35 * len(steps)), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for ax, (title, keys) in zip(axes, PANELS):
        for i, (which, quantity) in enumerate(keys):
            x = [found.get((run, which, quantity), np.nan) for run in steps]
            y = np.arange(len(steps)) + 0.14 * (i - 1)  # lest equal values hide each other
            name = quantity.removeprefix("return, ")
            if quantity == "return":
                name = which
            ax.plot(x, y, **look_of(i) | {"linestyle": "none"}, label=name)
        if title.startswith("information"):
            ax.axvline(np.log(2), color="0.5", linewidth=1, label="ln 2")
        if title.startswith("variability"):
            ax.set_xscale("log")
        else:
            ax.axvline(0, color="0.9")
        ax.grid(axis="y", color="0.9")
        ax.set_title(title)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18))
    labels = [f"{run}\nstep {step:,}" for run, step in steps.items()]
    axes[0].set_yticks(range(len(steps)), labels)
    axes[0].set_ylim(len(steps) - 0.5, -0.5)
    return figure
