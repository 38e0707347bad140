"""The figure of studies/inside.py; no program. Needs matplotlib."""

import numpy as np
from figures import Figure
from runs import in_words

MARKERS = "ovsD"


def heat_map(ax, matrix, space):
    """A matrix of the few contexts as colours and numbers."""
    low = min(0, matrix.min())
    middle = (low + matrix.max()) / 2
    ax.imshow(matrix, cmap="cividis", vmin=low, vmax=matrix.max())
    for (i, j), value in np.ndenumerate(matrix):
        colour = "w" if value <= middle else "k"
        ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour)
    labels = [", ".join(f"{value:g}" for value in context.values()) for context in space.few]
    ax.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    ax.set_yticks(range(len(labels)), labels)
    names = ", ".join(space.few[0])  # of the contexts
    ax.set(title="cosine of mean codes", xlabel=names, ylabel=names)


def codes(space, cosines, samples):
    """Cosines of mean codes; 500 codes in the plane of the train set's principal components."""
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    first, *axes = figure.subplots(1, 3, width_ratios=(1.1, 1, 1))
    heat_map(first, cosines, space)
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
            label = in_words(mode) or "all contexts"
            ax.scatter(x[own], y[own], c=u[own], marker=MARKERS[i % 4], label=label, **colours)
        figure.colorbar(ax.collections[0], ax=ax, label=space.first.name)
        ax.set(title=f"z, {which}", ylabel=f"second component ({share[1]:.0%})")
        ax.set_xlabel(f"first component ({share[0]:.0%} of variance, train)")
        ax.legend()
    return figure
