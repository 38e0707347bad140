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

import sys
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from adaptation import mirrored, mirrored_dim, switch
from command_line import parser_of
from compare_figures import words_for
from figures import Figure
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from PIL import Image
from runs import aib_envs, dmash

STEPS = 400  # of a film at most
FRAMES = 200  # at most
FPS = 25
HOLD = 1500  # ms of the last frame
COLOURS = ["#0072B2", "#D55E00"]  # of the two modes
# Of cartpole_inv: the first state of cart and pole in m, rad, m/s, rad/s; and what is added to the
# state at each push, with the signs in turns.
START = np.array([0.0, 0.2, 0.0, 0.0])
PUSH = np.array([0.0, 0.0, 0.0, 1.0])
EVERY = 100  # steps between pushes


class Film(NamedTuple):
    """T steps in N contexts. The switch comes before step T // 2."""

    dt: float  # s, of a step
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
    envs = aib_envs.VectorEnv(agent.cfg.env, contexts, seed=0)
    envs.rngs = [np.random.default_rng(0) for _ in contexts]
    agent = Freezer(agent)
    rollout = dmash.Rollout(agent, envs, noisy=False)
    rollout.begin_episode()
    tilted = agent.cfg.env == "cartpole_inv"
    if tilted:
        put(rollout, np.tile(START, (envs.N, 1)))
    frames = []
    for t in range(steps):
        if t == steps // 2:
            switch(rollout)
            agent.frozen = freeze
        if tilted and t % EVERY == EVERY - 1:
            put(rollout, envs.task.state() + PUSH * (-1) ** (t // EVERY))
        pictures = [envs.task.picture(i) for i in range(envs.N)]
        _, a, r, _ = rollout.step()
        frames.append((envs.task.contexts, pictures, agent.z, a, r))
    contexts, pictures, z, a, r = zip(*frames)
    z = None if z[0] is None else torch.stack(z).numpy()
    return Film(envs.task.dt, contexts, pictures, z, torch.stack(a).numpy(), torch.stack(r).numpy())


def put(rollout, state):
    """Puts all instances into `state` (N, …)."""
    task = rollout.envs.task
    task.set_state(state)
    rollout.s = rollout.tensor(task.observation())


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
    width = film.pictures[0][0][0].width
    centres, points = [], []
    for view, shapes in chain(*film.pictures):
        centres.append(view.centre)
        for shape in shapes:
            if np.linalg.norm(shape.end - shape.start) < 5 * width:  # not the ground
                points.append(outline(shape))
    centres = np.reshape(centres, (*film.r.shape, 2))
    size = np.full(2, width)
    low, high = np.min(points, (0, 1)), np.max(points, (0, 1))
    if max(high - low) < 1.5 * width:
        centres[:] = (low + high) / 2
        size = 1.1 * (high - low)
    size = np.maximum(size, size[::-1] * (ratio, 1 / ratio))
    return np.stack([centres - size / 2, centres + size / 2], -2)


class Screen:
    """The figure of a film, a column per context. `at` draws it as it stands after step t."""

    def __init__(self, film, title, notes):
        T, N = film.r.shape
        self.film, self.half, self.notes = film, T // 2, notes
        self.returns = film.r.cumsum(0)  # (T, N)
        heights = {"picture": 3, "z": 1.4, "action": 1, "return": 1}
        if film.z is None:
            del heights["z"]
        figure = Figure(figsize=(3 + 3 * N, 2.4 + len(heights)), dpi=100, layout="constrained")
        figure.suptitle(title, fontsize=13)
        self.canvas = FigureCanvasAgg(figure)
        options = dict(sharey="row", height_ratios=list(heights.values()))
        self.pictures, *rows = figure.subplots(len(heights), N, **options)
        self.panels = dict(zip(list(heights)[1:], rows))  # by name: a row of panels
        self.prepare(T * film.dt)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # From now on, nothing moves.
        size = self.pictures[0].get_window_extent()
        self.boxes = boxes(film, size.width / size.height)
        self.drawn = []  # what the next picture replaces

    def prepare(self, seconds):
        """Labels and limits. Panels of a row have their vertical axis in common."""
        for picture in self.pictures:
            picture.set_title(" ", fontsize=14, fontweight="bold")
            picture.set_xlabel("position, m")
            picture.tick_params(left=False, labelleft=False)
        for name, row in self.panels.items():
            row[0].set_ylabel(name, fontsize=12)
            for panel in row:
                panel.set_xlim(0, seconds)
                panel.tick_params(labelbottom=name == "return")
        self.panels["action"][0].set_ylim(-1.15, 1.15)
        low, high = min(0, self.returns.min()), max(self.returns.max(), 1e-9)
        for panel in self.panels["return"]:
            panel.set(xlabel="time, s", ylim=(low, high + 0.2 * (high - low)))

    def colour(self, t, i):
        """Of the mode: columns begin in one and the other in turns, and a switch exchanges them."""
        return COLOURS[(i + (t >= self.half)) % 2]

    def at(self, t):
        """An array (height, width, 3)."""
        for artist in self.drawn:
            artist.remove()
        self.drawn = []
        for i in range(len(self.notes)):
            self.draw_picture(t, i)
            self.draw_return_and_actions(t, i)
            if self.film.z is not None:
                self.draw_z(t, i)
        if t >= self.half:
            for panel in chain(*self.panels.values()):
                mark = panel.axvline(self.half * self.film.dt, color="black", linestyle="--")
                self.drawn.append(mark)
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()

    def draw_picture(self, t, i):
        panel, colour = self.pictures[i], self.colour(t, i)
        (left, bottom), (right, top) = self.boxes[t, i]
        panel.set(xlim=(left, right), ylim=(bottom, top))
        panel.title.set(text=words_for(self.film.contexts[t][i]) + self.notes[i], color=colour)
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

    def draw_return_and_actions(self, t, i):
        self.write(self.panels["return"][i], f"{self.returns[t, i]:.0f}", fontsize=11)
        self.draw_curve(t, i, "return", self.returns[:, i])
        for values in self.film.a[:, i].T:
            self.draw_curve(t, i, "action", values)

    def draw_curve(self, t, i, name, values):
        """Up to step t, before and after the switch in the colours of the modes."""
        times = np.arange(t + 1)
        for step, part in ((0, times[: self.half]), (self.half, times[self.half :])):
            look = dict(color=self.colour(step, i), linewidth=1.6)
            self.drawn += self.panels[name][i].plot(part * self.film.dt, values[part], **look)

    def draw_z(self, t, i):
        panel, z = self.panels["z"][i], self.film.z[: t + 1, i]  # (t + 1, d_z)
        d_z = z.shape[1]
        look = dict(vmin=self.film.z.min(), vmax=self.film.z.max(), interpolation="nearest")
        extent = 0, (t + 1) * self.film.dt, d_z + 0.5, 0.5
        self.drawn.append(panel.imshow(z.T, aspect="auto", extent=extent, **look))
        panel.set_yticks([1, d_z])


def save(screen, stride, path):
    """One palette for all frames, without dithering: what stands still does not flicker."""
    T = len(screen.film.r)
    some = np.concatenate([screen.at(t) for t in (0, T // 2, T - 1)])
    palette = Image.fromarray(some).quantize(128, Image.Quantize.MAXCOVERAGE)
    images = []
    for t in range(0, T, stride):
        images.append(Image.fromarray(screen.at(t)).quantize(palette=palette, dither=0))
    duration = [1000 // FPS] * (len(images) - 1) + [HOLD]
    others = dict(append_images=images[1:], duration=duration, loop=0, optimize=True)
    images[0].save(path, save_all=True, **others)


# ---- Command line -------------------------------------------------------------------------------


def both_contexts(env_id):
    """Both modes; or without modes, both ends of the first context's train range."""
    dim = mirrored_dim(env_id)
    value = dim.default if dim.binary else dim.train[0]
    first = aib_envs.full_context(env_id, {dim.name: value})
    return [first, mirrored(env_id, first)]


def run_command(args):
    path = args.out
    if path.suffix != ".gif":
        raise dmash.BadInput(f"--out {path}: must end in .gif")
    cfg, agent = dmash.load_policy(args.run)
    contexts = both_contexts(cfg.env)
    notes = ["", ""]
    infers = agent.g is not None
    if infers:
        contexts.append(contexts[0])
        notes.append(", ω frozen")
    steps = min(STEPS, aib_envs.lookup(cfg.env).horizon)
    half = steps // 2
    stride = -(-steps // FRAMES)  # steps from frame to frame
    path.parent.mkdir(parents=True, exist_ok=True)

    film = shoot(agent, contexts, steps, freeze=infers)
    title = f"{agent.method.paper} on {cfg.env}, weights fixed: switch at {half * film.dt:.2g} s"
    title += f" (speed × {stride * film.dt * FPS:.2g})"
    save(Screen(film, title, notes), stride, path)
    for i, note in enumerate(notes):
        before, after = words_for(film.contexts[0][i]), words_for(film.contexts[-1][i]) + note
        a, b = film.r[:half, i].sum(), film.r[half:, i].sum()
        print(f"{before}: return {a:.1f} in {half} steps; then {after}: {b:.1f} in {steps - half}")
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = parser_of("film.py", __doc__)
    parser.add_argument("run", metavar="RUN", help="run folder or policy file")
    out = "default: %(default)s"
    parser.add_argument("--out", type=Path, default="film.gif", metavar="FILE.gif", help=out)
    return dmash.exit_status("film.py", lambda: run_command(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
