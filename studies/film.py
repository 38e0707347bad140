"""What does an agent do when its motor is reversed under way? A film, contexts side by side.

    python studies/film.py RUN [--out FILE.gif]

RUN is a run folder or a policy file. In each of two contexts (both modes, all else at its default)
the agent begins an episode as in an evaluation: its window is full of transitions of that context.
Half way each context becomes the other one. Where there are no modes, these are the two ends of the
first context's train range. Body and window stay, and no weight changes.

The last column begins like the first, but from the switch on ω stays what it was just before. The
agent goes on to infer z, and does not use it. So one sees what inferring is good for.

Poles start tilted and are pushed now and then (START, PUSH), since a pole that is left alone stays
upright for long. Below each picture are the code z (eight numbers over time, if the agent infers
one), the action, and the return so far. The film has 400 steps, or a shorter episode. The program
prints the return before and after the switch. It needs matplotlib and half a minute.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from adaptation import mirrored, mirrored_dim, switch
from figures import Figure
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import aib_envs  # noqa: E402
import dmash  # noqa: E402

STEPS = 400  # of a film at most
FRAMES = 200  # at most
FPS = 25
HOLD = 1500  # ms of the last frame
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]  # of modes, in the order they appear
# By environment: the first state, and what is added to the state at each push, the signs in turns.
START = {"cartpole_inv": [0.0, 0.2, 0.0, 0.0]}  # of cart and pole: m, rad, m/s, rad/s
PUSH = {"cartpole_inv": [0.0, 0.0, 0.0, 1.0]}
EVERY = 100  # steps between pushes
WORDS = {  # for the values of a context
    "action_factor": {1: "normal", -1: "inverted"},
    "swap": {0: "normal", 1: "swapped"},
    "sign_x": {1: "x normal", -1: "x inverted"},
    "sign_y": {1: "y normal", -1: "y inverted"},
}


class Film(NamedTuple):
    """T steps in N contexts. The switch comes before step T // 2."""

    contexts: list  # at each step, N dicts
    pictures: list  # at each step, N pairs of a View and Shapes
    z: np.ndarray  # (T, N, d_z), or None
    a: np.ndarray  # (T, N, d_a)
    r: np.ndarray  # (T, N)


class Freezer:
    """An agent for a Rollout, in which ω of the last instance can be frozen."""

    def __init__(self, agent):
        self.agent, self.cfg, self.g, self.act = agent, agent.cfg, agent.g, agent.act
        self.frozen = False

    def infer(self, tau, noisy, c):
        self.z, omega = self.agent.infer(tau, noisy, c)
        if self.frozen:
            omega = last_of(self.omega, omega)
        self.omega = omega
        return self.z, omega


def last_of(old, new):
    """ω, or what stands in its place, with the last row of `old`."""
    if isinstance(new, dmash.Omega):
        return dmash.Omega(*map(last_of, old, new))
    return torch.cat([new[:-1], old[-1:]])


def shoot(agent, contexts, steps, freeze=False):
    """Acts. All instances start in the same state, as far as it does not depend on the context.

    freeze: from the switch on, ω of the last instance stays what it was.
    """
    env = agent.cfg.env
    envs = aib_envs.VectorEnv(env, contexts, seed=0)
    envs.rngs = [np.random.default_rng(0) for _ in contexts]
    agent = Freezer(agent)
    rollout = dmash.Rollout(agent, envs, noisy=False)
    rollout.begin_episode()
    if env in START:
        put(rollout, np.tile(START[env], (envs.N, 1)))
    frames = []
    for t in range(steps):
        if t == steps // 2:
            switch(rollout)
            agent.frozen = freeze
        if env in PUSH and t % EVERY == EVERY - 1:
            push = np.array(PUSH[env]) * (-1) ** (t // EVERY)
            put(rollout, envs.task.state() + push)
        pictures = [envs.task.picture(i) for i in range(envs.N)]
        _, a, r, _ = rollout.step()
        frames.append((envs.task.contexts, pictures, agent.z, a, r))
    contexts, pictures, z, a, r = zip(*frames)
    z = None if z[0] is None else torch.stack(z).numpy()
    return Film(contexts, pictures, z, torch.stack(a).numpy(), torch.stack(r).numpy())


def put(rollout, state):
    """Puts all instances into `state` (N, …)."""
    task = rollout.envs.task
    task.set_state(state)
    rollout.s = torch.from_numpy(task.observation().astype(np.float32))


# ---- Pictures -----------------------------------------------------------------------------------


def outline(shape):
    """The polygon of a line with round ends, (32, 2)."""
    along = shape.end - shape.start
    angles = np.arctan2(along[1], along[0]) + np.linspace(np.pi / 2, 3 * np.pi / 2, 16)
    half = shape.radius * np.stack([np.cos(angles), np.sin(angles)], -1)
    return np.concatenate([shape.start + half, shape.end - half])


def boxes(film, ratio):
    """The corners of what the pictures show, lower left and upper right, (T, N, 2, 2).

    A picture is `ratio` times as wide as high. It shows all that ever moves. Of what goes far, it
    shows the environment's own view, which follows.
    """
    views = [[view for view, _ in row] for row in film.pictures]
    width = views[0][0].width
    shapes = [shape for row in film.pictures for _, shapes in row for shape in shapes]
    # Not the ground:
    short = [shape for shape in shapes if np.linalg.norm(shape.end - shape.start) < 5 * width]
    points = np.concatenate([outline(shape) for shape in short])
    low, high = points.min(0), points.max(0)
    if max(high - low) < 1.5 * width:
        centres = np.broadcast_to((low + high) / 2, (*film.r.shape, 2))
        size = 1.1 * (high - low)
    else:
        centres = np.array([[view.centre for view in row] for row in views])
        size = np.full(2, width)
    size = np.maximum(size, size[::-1] * (ratio, 1 / ratio))
    return np.stack([centres - size / 2, centres + size / 2], -2)


def label(context):
    """The context in words, the mode first."""
    modes, others = [], []
    for name, value in context.items():
        word = WORDS.get(name, {}).get(value)
        if word is None:
            others.append(f"{name} {value:.3g}")
        else:
            modes.append(word)
    return ", ".join(modes + others)


class Screen:
    """The figure of a film, a column per context. `at` draws it as it stands after step t."""

    def __init__(self, film, env_id, dt, title, notes):
        T, N = film.r.shape
        self.film, self.dt, self.half, self.notes = film, dt, T // 2, notes
        self.dim = mirrored_dim(env_id).name
        ends = [*film.contexts[0], *film.contexts[-1]]
        self.modes = list(dict.fromkeys(context[self.dim] for context in ends))
        self.returns = film.r.cumsum(0)  # (T, N)
        heights = {"picture": 3, "z": 1.4, "action": 1, "return": 1}
        if film.z is None:
            del heights["z"]
        figure = Figure(figsize=(3 + 3 * N, 2.4 + len(heights)), dpi=100, layout="constrained")
        self.canvas = FigureCanvasAgg(figure)
        options = dict(squeeze=False, sharey="row", height_ratios=list(heights.values()))
        grid = figure.subplots(len(heights), N, **options)
        figure.suptitle(title, fontsize=13)
        self.columns = [dict(zip(heights, column)) for column in grid.T]
        for column in self.columns:
            self.prepare(column, T * dt)
        for name, panel in self.columns[0].items():
            if name != "picture":
                panel.set_ylabel(name, fontsize=12)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # From now on, nothing moves.
        size = self.columns[0]["picture"].get_window_extent()
        self.boxes = boxes(film, size.width / size.height)
        self.drawn = []  # what the next picture replaces

    def prepare(self, column, seconds):
        """Labels and limits of a column."""
        picture, last = column["picture"], column["return"]
        picture.set_title(" ", fontsize=14, fontweight="bold")
        picture.set_xlabel("position, m")
        picture.tick_params(left=False, labelleft=False)
        column["action"].set_ylim(-1.15, 1.15)
        low, high = min(0, self.returns.min()), max(self.returns.max(), 1e-9)
        last.set(xlabel="time, s", ylim=(low, high + 0.2 * (high - low)))
        for name, panel in column.items():
            if name != "picture":
                panel.set_xlim(0, seconds)
                panel.tick_params(labelbottom=name == "return")

    def colour(self, t, i):
        mode = self.modes.index(self.film.contexts[t][i][self.dim])
        return COLOURS[mode % len(COLOURS)]

    def at(self, t):
        """An array (height, width, 3)."""
        for artist in self.drawn:
            artist.remove()
        self.drawn = []
        for i, column in enumerate(self.columns):
            self.draw_picture(t, i, column["picture"])
            self.draw_return_and_actions(t, i, column)
            if "z" in column:
                self.draw_z(t, i, column["z"])
            if t >= self.half:
                for panel in list(column.values())[1:]:
                    mark = panel.axvline(self.half * self.dt, color="black", linestyle="--")
                    self.drawn.append(mark)
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()

    def draw_picture(self, t, i, panel):
        colour = self.colour(t, i)
        (left, bottom), (right, top) = self.boxes[t, i]
        panel.set(xlim=(left, right), ylim=(bottom, top))
        panel.title.set(text=label(self.film.contexts[t][i]) + self.notes[i], color=colour)
        for spine in panel.spines.values():
            spine.set(color=colour, linewidth=3)
        _, shapes = self.film.pictures[t][i]
        body = PolyCollection([outline(shape) for shape in shapes])
        body.set_facecolor([np.array(shape.colour) / 255 for shape in shapes])
        self.drawn.append(panel.add_collection(body))
        if self.half <= t < 1.25 * self.half:
            look = dict(color="white", fontsize=14, fontweight="bold")
            box = dict(facecolor=colour, edgecolor="none")
            self.write(panel, "SWITCH", **look, bbox=box)

    def write(self, panel, text, **look):
        """Writes at the panel's upper left corner."""
        self.drawn.append(panel.text(0.02, 0.92, text, va="top", transform=panel.transAxes, **look))

    def draw_return_and_actions(self, t, i, column):
        self.write(column["return"], f"{self.returns[t, i]:.0f}", fontsize=11)
        self.draw_curve(t, i, column["return"], self.returns[:, i], 1.0)
        for j, values in enumerate(self.film.a[:, i].T):
            self.draw_curve(t, i, column["action"], values, 1.0 if j == 0 else 0.4)

    def draw_curve(self, t, i, panel, values, alpha):
        """Up to step t, before and after the switch in the colours of the modes."""
        times = np.arange(t + 1)
        for part in (times[: self.half], times[self.half :]):
            if len(part) > 0:
                look = dict(color=self.colour(part[0], i), alpha=alpha, linewidth=1.6)
                self.drawn += panel.plot(part * self.dt, values[part], **look)

    def draw_z(self, t, i, panel):
        z = self.film.z[:, i].copy()  # (T, d_z)
        z[t + 1 :] = np.nan
        T, d_z = z.shape
        look = dict(vmin=self.film.z.min(), vmax=self.film.z.max(), interpolation="nearest")
        extent = 0, T * self.dt, d_z + 0.5, 0.5
        self.drawn.append(panel.imshow(z.T, aspect="auto", extent=extent, **look))
        panel.set_yticks([1, d_z])


def save(screen, T, path):
    """One palette for all frames, without dithering: what stands still does not flicker."""
    some = np.concatenate([screen.at(t) for t in (0, T // 2, T - 1)])
    palette = Image.fromarray(some).quantize(128, Image.Quantize.MAXCOVERAGE)
    images = []
    for t in range(0, T, stride(T)):
        images.append(Image.fromarray(screen.at(t)).quantize(palette=palette, dither=0))
    duration = [1000 // FPS] * (len(images) - 1) + [HOLD]
    others = dict(append_images=images[1:], duration=duration, loop=0, optimize=True)
    images[0].save(path, save_all=True, **others)


def stride(T):
    """Steps from frame to frame."""
    return -(-T // FRAMES)


# ---- Command line -------------------------------------------------------------------------------


def both_contexts(env_id):
    """Both modes; or without modes, both ends of the first context's train range."""
    dim = mirrored_dim(env_id)
    value = dim.default if dim.binary else dim.train[0]
    first = aib_envs.full_context(env_id, {dim.name: value})
    return [first, mirrored(env_id, first)]


def run_command(args):
    run = Path(args.run)
    path = (run if run.is_dir() else run.parent) / "film.gif"
    if args.out is not None:
        path = Path(args.out)
    if path.suffix != ".gif":
        raise dmash.BadInput(f"--out {path}: must end in .gif")
    cfg, agent = dmash.load_policy(run)
    contexts = both_contexts(cfg.env)
    notes = ["", ""]
    if agent.g is not None:
        contexts.append(contexts[0])
        notes.append(", ω frozen")
    spec = aib_envs.lookup(cfg.env)
    dt = spec.cls(contexts).dt
    steps = min(STEPS, spec.horizon)
    path.parent.mkdir(parents=True, exist_ok=True)

    film = shoot(agent, contexts, steps, freeze=agent.g is not None)
    half, speed = steps // 2, stride(steps) * dt * FPS
    title = f"{agent.method.paper} on {cfg.env}, weights fixed: switch at {half * dt:.2g} s"
    save(Screen(film, cfg.env, dt, f"{title} (speed × {speed:.2g})", notes), steps, path)
    for i, note in enumerate(notes):
        before, after = label(film.contexts[0][i]), label(film.contexts[-1][i]) + note
        a, b = film.r[:half, i].sum(), film.r[half:, i].sum()
        print(f"{before}: return {a:.1f} in {half} steps; then {after}: {b:.1f} in {steps - half}")
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def main(argv=None):
    """The command line. Returns the exit status."""
    layout = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = dmash.Parser("film.py", description=__doc__, **layout)
    parser.add_argument("run", metavar="RUN", help="run folder or policy file")
    parser.add_argument("--out", metavar="FILE.gif", help="default: film.gif beside the policy")
    return dmash.exit_status("film.py", lambda: run_command(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
