"""What does an agent do when its motor is reversed under way? A film: an animated GIF, contexts side by side.

    python studies/film.py RUN [--out FILE.gif] [--contexts length=.5,action_factor=-1 ...] [--seconds N] [--seed N]

RUN is a run folder or a policy file. In each context (default: both modes, all else at its default) the agent begins an
episode as in an evaluation, its window full of transitions of that context. Half way the context becomes its mirror
image (the other sign or swap; where there is none, the other end of the first context's train range): body and window
stay, and no weight changes. Below each picture: the code z, eight numbers over time, where the agent infers one; the
action; the return so far. Prints the return before and after the switch. Needs matplotlib. Half a minute.
"""

import argparse
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from adaptation import mirrored, mirrored_dim, switch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import aib_envs  # noqa: E402
import dmash  # noqa: E402

FRAMES, FPS, HOLD = 200, 25, 1500  # of a film at most, per second, and ms of the last one
MOST = 4  # contexts side by side
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # of modes, in the order in which they appear


class Film(NamedTuple):
    """T steps in N contexts. The switch comes before step T // 2."""

    contexts: list  # at each step, N dicts
    pictures: list  # at each step, N pairs of a View and Shapes
    z: np.ndarray  # (T, N, d_z), or None
    a: np.ndarray  # (T, N, d_a)
    r: np.ndarray  # (T, N)


def shoot(agent, contexts, steps, seed):
    """Acts. All instances start in the same state, as far as it does not depend on the context."""
    envs = aib_envs.VectorEnv(agent.cfg.env, contexts, seed)
    envs.rngs = [np.random.default_rng(seed) for _ in contexts]
    rollout, rows = dmash.Rollout(agent, envs, noisy=False), []
    rollout.begin_episode()
    for t in range(steps):
        if t == steps // 2:
            switch(rollout)
        with torch.no_grad():
            z, _, _ = agent.tell(rollout.replay.latest(False), rollout.replay.c, False)
        pictures, (_, a, r, _) = [envs.task.picture(i) for i in range(envs.N)], rollout.step()
        rows.append((envs.task.contexts, pictures, z, a, r))
    contexts, pictures, *numbers = zip(*rows)
    return Film(contexts, pictures, *(None if x[0] is None else torch.stack(x).numpy() for x in numbers))


# ---- Pictures ---------------------------------------------------------------------------------------------------


def outline(shape):
    """The polygon of a line with round ends, (32, 2)."""
    along = shape.end - shape.start
    angles = np.arctan2(along[1], along[0]) + np.linspace(np.pi / 2, 3 * np.pi / 2, 16)
    half = shape.radius * np.stack([np.cos(angles), np.sin(angles)], -1)
    return np.concatenate([shape.start + half, shape.end - half])


def boxes(film, ratio):
    """What the pictures show at each step, (T, N, 2, 2): lower left and upper right corners, `ratio` times as wide as
    high. All that ever moves, always; or, of what goes far, the environment's own view, which follows."""
    width = film.pictures[0][0][0].width
    shapes = [shape for row in film.pictures for _, shapes in row for shape in shapes]
    points = np.concatenate([outline(s) for s in shapes if np.hypot(*(s.end - s.start)) < 5 * width])  # no ground
    low, high = points.min(0), points.max(0)
    if max(high - low) < 1.5 * width:
        centres, size = np.broadcast_to((low + high) / 2, (*film.r.shape, 2)), 1.1 * (high - low)
    else:
        centres, size = np.array([[view.centre for view, _ in row] for row in film.pictures]), np.full(2, width)
    size = np.maximum(size, size[::-1] * (ratio, 1 / ratio))
    return np.stack([centres - size / 2, centres + size / 2], -2)


def label(context):
    """The context in words, the mode first."""
    from compare_figures import SIGNS

    names = sorted(context, key=lambda name: name not in SIGNS)
    return ", ".join(SIGNS.get(name, {}).get(context[name], f"{name} {context[name]:.3g}") for name in names)


class Screen:
    """The figure of a film, a column per context; `at` draws it as it stands after step t."""

    def __init__(self, film, env_id, dt, title):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.collections import PolyCollection
        from matplotlib.figure import Figure

        T, N = film.r.shape
        self.film, self.dt, self.half, self.dim = film, dt, T // 2, mirrored_dim(env_id).name
        self.modes = list(dict.fromkeys(c[self.dim] for t in (0, -1) for c in film.contexts[t]))
        self.returns = film.r.cumsum(0)  # (T, N)
        rows = {"picture": 3} | ({} if film.z is None else {"z": 1.4}) | {"action": 1, "return": 1}  # and heights
        figure = Figure(figsize=(9, 2.4 + len(rows)), dpi=100, layout="constrained")
        self.canvas = FigureCanvasAgg(figure)
        grid = figure.subplots(len(rows), N, squeeze=False, sharey="row", height_ratios=[*rows.values()])
        self.axes = [dict(zip(rows, column)) for column in grid.T]
        figure.suptitle(title, fontsize=13)
        low, high = min(0, self.returns.min()), max(self.returns.max(), 1e-9)
        for ax in self.axes:
            ax["picture"].set_title(" ", fontsize=14, fontweight="bold")
            ax["picture"].set_xlabel("position, m")
            ax["picture"].tick_params(left=False, labelleft=False)
            ax["action"].set_ylim(-1.15, 1.15)
            ax["return"].set(xlabel="time, s", ylim=(low, high + 0.2 * (high - low)))
            for name in list(rows)[1:]:
                ax[name].set_xlim(0, T * dt)
                ax[name].tick_params(labelbottom=name == "return")
                self.axes[0][name].set_ylabel(name, fontsize=12)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # lest anything moves from now on
        size = self.axes[0]["picture"].get_window_extent()
        self.boxes = boxes(film, size.width / size.height)
        self.bodies = [ax["picture"].add_collection(PolyCollection([])) for ax in self.axes]
        write = lambda ax, **how: ax.text(0.02, 0.92, "", transform=ax.transAxes, va="top", **how)
        self.banners = [write(ax["picture"], color="white", fontsize=14, fontweight="bold") for ax in self.axes]
        self.numbers = [write(ax["return"], fontsize=11) for ax in self.axes]
        self.lines, self.images, self.marks = [], [], []
        for i, ax in enumerate(self.axes):
            for name, values in (("action", film.a[:, i]), ("return", self.returns[:, [i]])):
                for j, part in product(range(values.shape[1]), (range(self.half), range(self.half, T))):
                    look = dict(color=self.colour(part.start, i), alpha=0.4 if j else 1.0, linewidth=1.6)
                    self.lines.append((*ax[name].plot([], [], **look), part, values[:, j]))
            if film.z is not None:
                d_z, look = film.z.shape[-1], dict(vmin=film.z.min(), vmax=film.z.max(), interpolation="nearest")
                extent = 0, T * dt, d_z + 0.5, 0.5
                self.images.append(ax["z"].imshow(np.zeros((1, 1)), aspect="auto", extent=extent, **look))
                ax["z"].set_yticks([1, d_z])
            self.marks += [ax[name].axvline(self.half * dt, color="black", linestyle="--") for name in list(rows)[1:]]

    def colour(self, t, i):
        return COLOURS[self.modes.index(self.film.contexts[t][i][self.dim]) % len(COLOURS)]

    def at(self, t):
        """An array (height, width, 3)."""
        for line, part, values in self.lines:
            times = np.array(part[: max(0, t + 1 - part.start)], dtype=int)
            line.set_data(times * self.dt, values[times])
        for i, image in enumerate(self.images):
            z = self.film.z[:, i].T  # (d_z, T)
            image.set_data(np.ma.masked_array(z, np.broadcast_to(np.arange(z.shape[1]) > t, z.shape)))
        for mark in self.marks:
            mark.set_visible(t >= self.half)
        flash = self.half <= t < 1.25 * self.half
        for i, ax in enumerate(self.axes):
            ax, colour, (_, shapes) = ax["picture"], self.colour(t, i), self.film.pictures[t][i]
            self.bodies[i].set_verts([outline(shape) for shape in shapes])
            self.bodies[i].set_facecolor([np.array(shape.colour) / 255 for shape in shapes])
            (left, bottom), (right, top) = self.boxes[t, i]
            ax.set(xlim=(left, right), ylim=(bottom, top))
            ax.title.set(text=label(self.film.contexts[t][i]), color=colour)
            for spine in ax.spines.values():
                spine.set(color=colour, linewidth=3)
            self.banners[i].set(text="SWITCH" * flash, bbox=dict(facecolor=colour, edgecolor="none") if flash else None)
            self.numbers[i].set_text(f"{self.returns[t, i]:.0f}")
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()


def save(screen, T, path):
    """One palette for all frames, without dithering: what stands still does not flicker."""
    from PIL import Image

    some = np.concatenate([screen.at(t) for t in (0, T // 2, T - 1)])
    palette = Image.fromarray(some).quantize(128, Image.Quantize.MAXCOVERAGE)
    images = [Image.fromarray(screen.at(t)).quantize(palette=palette, dither=0) for t in range(0, T, -(-T // FRAMES))]
    duration = [1000 // FPS] * (len(images) - 1) + [HOLD]
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0, optimize=True)


# ---- Command line -----------------------------------------------------------------------------------------------


def contexts_from(texts, env_id):
    """Contexts from words such as length=.5,action_factor=-1; by default the default one and its mirror image."""
    dim = mirrored_dim(env_id)
    first = aib_envs.full_context(env_id, {} if dim.binary else {dim.name: dim.train[0]})
    if texts is None:
        return [first, mirrored(env_id, first)]
    if len(texts) > MOST:
        raise ValueError(f"{len(texts)} contexts; allowed: up to {MOST}")
    pairs = [[word.partition("=") for word in text.split(",")] for text in texts]
    return [aib_envs.full_context(env_id, {name: float(value) for name, _, value in of}) for of in pairs]


def run_command(args):
    try:
        import matplotlib  # noqa: F401  (before anything takes time)
    except ImportError as error:
        raise dmash.BadInput(f"a film needs matplotlib ({error})") from None

    path = Path(args.out or (Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent) / "film.gif")
    if path.suffix != ".gif":
        raise dmash.BadInput(f"--out {path}: must end in .gif")
    cfg, agent = dmash.load_policy(args.run)
    spec = aib_envs.lookup(cfg.env)
    try:
        contexts = contexts_from(args.contexts, cfg.env)
        for context in contexts:
            aib_envs.full_context(cfg.env, mirrored(cfg.env, context))
        task = spec.cls(contexts)
        task.reset([np.random.default_rng(0)] * len(contexts))
        task.picture(0)
    except ValueError as error:
        raise dmash.BadInput(f"{args.run}, --contexts {args.contexts}: {dmash.one_line(error)}") from None
    longest = round(spec.horizon * task.dt, 6)
    seconds = min(400 * task.dt, longest) if args.seconds is None else args.seconds
    steps = round(dmash.number("--seconds", seconds, float, f"[{2 * task.dt}, {longest}]") / task.dt)
    seed = dmash.number("--seed", args.seed, int, "[0, 4294967295]")
    path.parent.mkdir(parents=True, exist_ok=True)
    film = shoot(agent, contexts, steps, seed)
    half, speed = steps // 2, -(-steps // FRAMES) * task.dt * FPS
    title = f"{agent.method.paper} on {cfg.env}, weights fixed: switch at {half * task.dt:.2g} s (speed × {speed:.2g})"
    save(Screen(film, cfg.env, task.dt, title), steps, path)
    for i, (before, after) in enumerate(zip(film.contexts[0], film.contexts[-1])):
        a, b = film.r[:half, i].sum(), film.r[half:, i].sum()
        print(f"{label(before)}: return {a:.1f} in {half} steps; then {label(after)}: {b:.1f} in {steps - half}")
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def main(argv=None):
    """The command line. Returns the exit status."""
    layout = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = dmash.Parser("film.py", description=__doc__, **layout)
    parser.add_argument("run", metavar="RUN", help="run folder or policy file")
    parser.add_argument("--out", metavar="FILE.gif", help="default: film.gif beside the policy")
    parser.add_argument("--contexts", nargs="+", metavar="NAME=VALUE,...", help=f"up to {MOST}; default: both modes")
    parser.add_argument("--seconds", help="of simulated time (default: 400 steps, or the whole episode)")
    parser.add_argument("--seed", default=0, help="of the initial state (default: %(default)s)")
    return dmash.exit_status("film.py", lambda: run_command(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
