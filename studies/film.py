"""What does an agent do when its motor is reversed under way? A film, contexts side by side.

    python studies/film.py RUN [--out FILE.gif] [--contexts length=.5,action_factor=-1 ...]
                               [--seconds N] [--seed N]

RUN is a run folder or a policy file. In each context (default: both modes, all else at its default)
the agent begins an episode as in an evaluation: its window is full of transitions of that context.
Half way the context becomes its mirror image, which has the other sign or swap. Where there is
none, it has the other end of the first context's train range. Body and window stay, and no weight
changes.

The last column begins like the first, but from the switch on ω stays what it was just before. The
agent goes on to infer z, and does not use it. So one sees what inferring is good for.

Poles start tilted and are pushed now and then (START, PUSH), since a pole that is left alone stays
upright for long. Below each picture are the code z (eight numbers over time, if the agent infers
one), the action, and the return so far. The program prints the return before and after the switch.
It needs matplotlib and half a minute.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from adaptation import mirrored, mirrored_dim, switch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import aib_envs  # noqa: E402
import dmash  # noqa: E402

FRAMES = 200  # of a film at most
FPS = 25
HOLD = 1500  # ms of the last frame
MOST = 4  # contexts side by side
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]  # of modes, in the order they appear
# By environment: the first state, and what is added to the state at each push, the signs in turns.
START = {"cartpole_inv": [0.0, 0.2, 0.0, 0.0]}  # of cart and pole: m, rad, m/s, rad/s
PUSH = {"cartpole_inv": [0.0, 0.0, 0.0, 1.0]}
EVERY = 100  # steps between pushes
WORDS = {  # for a value of a context
    ("action_factor", 1): "normal",
    ("action_factor", -1): "inverted",
    ("swap", 0): "normal",
    ("swap", 1): "swapped",
    ("sign_x", 1): "x normal",
    ("sign_x", -1): "x inverted",
    ("sign_y", 1): "y normal",
    ("sign_y", -1): "y inverted",
}


class Film(NamedTuple):
    """T steps in N contexts. The switch comes before step T // 2."""

    contexts: list  # at each step, N dicts
    pictures: list  # at each step, N pairs of a View and Shapes
    z: np.ndarray  # (T, N, d_z), or None
    a: np.ndarray  # (T, N, d_a)
    r: np.ndarray  # (T, N)


class Freezing(dmash.Rollout):
    """A Rollout in which ω of the last instance can be frozen."""

    def __init__(self, agent, envs):
        super().__init__(agent, envs, noisy=False)
        self.agent, self.act_as = self, agent
        self.cfg = agent.cfg
        self.z, self.omega, self.frozen = None, None, False

    def infer(self, tau, noisy, c):
        self.z, omega = self.act_as.infer(tau, noisy, c)
        if self.frozen:
            omega = last_of(self.omega, omega)
        self.omega = omega
        return self.z, omega

    def act(self, s, omega, noisy):
        return self.act_as.act(s, omega, noisy)


def last_of(old, new):
    """ω, or what stands in its place, with the last row of `old`."""
    if isinstance(new, dmash.Omega):
        return dmash.Omega(*map(last_of, old, new))
    return torch.cat([new[:-1], old[-1:]])


def shoot(agent, contexts, steps, seed, freeze=False):
    """Acts. All instances start in the same state, as far as it does not depend on the context.

    freeze: from the switch on, ω of the last instance stays what it was.
    """
    env = agent.cfg.env
    envs = aib_envs.VectorEnv(env, contexts, seed)
    envs.rngs = [np.random.default_rng(seed) for _ in contexts]
    rollout = Freezing(agent, envs)
    rollout.begin_episode()
    if env in START:
        envs.task.set_state(np.tile(START[env], (envs.N, 1)))
        rollout.s = torch.from_numpy(envs.task.observation().astype(np.float32))
    frames = []
    for t in range(steps):
        if t == steps // 2:
            switch(rollout)
            rollout.frozen = freeze
        if env in PUSH and t % EVERY == EVERY - 1:
            push = np.array(PUSH[env]) * (-1) ** (t // EVERY)
            envs.task.set_state(envs.task.state() + push)
            rollout.s = torch.from_numpy(envs.task.observation().astype(np.float32))
        pictures = [envs.task.picture(i) for i in range(envs.N)]
        _, a, r, _ = rollout.step()
        frames.append((envs.task.contexts, pictures, rollout.z, a, r))
    contexts, pictures, z, a, r = zip(*frames)
    z = None if z[0] is None else torch.stack(z).numpy()
    return Film(contexts, pictures, z, torch.stack(a).numpy(), torch.stack(r).numpy())


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
    points = []
    for row in film.pictures:
        for _, shapes in row:
            for shape in shapes:
                if np.linalg.norm(shape.end - shape.start) < 5 * width:  # not the ground
                    points.append(outline(shape))
    points = np.concatenate(points)
    low, high = points.min(0), points.max(0)
    if max(high - low) < 1.5 * width:
        centres = np.broadcast_to((low + high) / 2, (*film.r.shape, 2))
        size = 1.1 * (high - low)
    else:
        centres = np.array([[view.centre for view, _ in row] for row in film.pictures])
        size = np.full(2, width)
    size = np.maximum(size, size[::-1] * (ratio, 1 / ratio))
    return np.stack([centres - size / 2, centres + size / 2], -2)


def label(context):
    """The context in words, the mode first."""
    modes, others = [], []
    for name, value in context.items():
        if (name, value) in WORDS:
            modes.append(WORDS[name, value])
        else:
            others.append(f"{name} {value:.3g}")
    return ", ".join(modes + others)


class Screen:
    """The figure of a film, a column per context. `at` draws it as it stands after step t."""

    def __init__(self, film, env_id, dt, title, frozen):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        T, N = film.r.shape
        self.film, self.dt, self.half, self.dim = film, dt, T // 2, mirrored_dim(env_id).name
        self.modes = []
        for context in (*film.contexts[0], *film.contexts[-1]):
            if context[self.dim] not in self.modes:
                self.modes.append(context[self.dim])
        self.returns = film.r.cumsum(0)  # (T, N)
        self.notes = [""] * N
        if frozen:
            self.notes[-1] = ", ω frozen"
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
        for name in heights:
            if name != "picture":
                self.columns[0][name].set_ylabel(name, fontsize=12)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # From now on, nothing moves.
        size = self.columns[0]["picture"].get_window_extent()
        self.boxes = boxes(film, size.width / size.height)
        self.lines, self.images, self.marks = [], [], []
        for i in range(N):
            self.fill(i, T)

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

    def fill(self, i, T):
        """What will move in column i: the body, words, lines, the image of z."""
        from matplotlib.collections import PolyCollection

        column, film = self.columns[i], self.film
        picture, half = column["picture"], self.half
        column["body"] = picture.add_collection(PolyCollection([]))
        place = dict(x=0.02, y=0.92, s="", va="top")
        banner = dict(color="white", fontsize=14, fontweight="bold")
        column["banner"] = picture.text(**place, **banner, transform=picture.transAxes)
        panel = column["return"]
        column["number"] = panel.text(**place, fontsize=11, transform=panel.transAxes)
        curves = [("return", self.returns[:, i], 1.0)]
        for j, values in enumerate(film.a[:, i].T):
            curves.append(("action", values, 1.0 if j == 0 else 0.4))
        for name, values, alpha in curves:
            for part in (range(half), range(half, T)):
                look = dict(color=self.colour(part.start, i), alpha=alpha, linewidth=1.6)
                (line,) = column[name].plot([], [], **look)
                self.lines.append((line, part, values))
        names = ["action", "return"]
        if film.z is not None:
            names.append("z")
            d_z = film.z.shape[-1]
            look = dict(vmin=film.z.min(), vmax=film.z.max(), interpolation="nearest")
            extent = 0, T * self.dt, d_z + 0.5, 0.5
            blank = np.zeros((1, 1))
            image = column["z"].imshow(blank, aspect="auto", extent=extent, **look)
            column["z"].set_yticks([1, d_z])
            self.images.append((image, film.z[:, i].T))
        for name in names:
            look = dict(color="black", linestyle="--")
            self.marks.append(column[name].axvline(half * self.dt, **look))

    def colour(self, t, i):
        mode = self.modes.index(self.film.contexts[t][i][self.dim])
        return COLOURS[mode % len(COLOURS)]

    def at(self, t):
        """An array (height, width, 3)."""
        for line, part, values in self.lines:
            times = np.array([time for time in part if time <= t], dtype=int)
            line.set_data(times * self.dt, values[times])
        for image, z in self.images:  # z (d_z, T)
            later = np.broadcast_to(np.arange(z.shape[1]) > t, z.shape)
            image.set_data(np.ma.masked_array(z, later))
        for mark in self.marks:
            mark.set_visible(t >= self.half)
        for i in range(len(self.columns)):
            self.show(t, i)
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()

    def show(self, t, i):
        """Column i after step t, but for its curves."""
        column, colour = self.columns[i], self.colour(t, i)
        _, shapes = self.film.pictures[t][i]
        column["body"].set_verts([outline(shape) for shape in shapes])
        column["body"].set_facecolor([np.array(shape.colour) / 255 for shape in shapes])
        picture = column["picture"]
        (left, bottom), (right, top) = self.boxes[t, i]
        picture.set(xlim=(left, right), ylim=(bottom, top))
        picture.title.set(text=label(self.film.contexts[t][i]) + self.notes[i], color=colour)
        for spine in picture.spines.values():
            spine.set(color=colour, linewidth=3)
        if self.half <= t < 1.25 * self.half:
            box = dict(facecolor=colour, edgecolor="none")
            column["banner"].set(text="SWITCH", bbox=box)
        else:
            column["banner"].set(text="", bbox=None)
        column["number"].set_text(f"{self.returns[t, i]:.0f}")


def save(screen, T, path):
    """One palette for all frames, without dithering: what stands still does not flicker."""
    from PIL import Image

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


def contexts_from(texts, env_id):
    """Contexts from words such as length=.5,action_factor=-1; default: both modes."""
    dim = mirrored_dim(env_id)
    if texts is None:
        first = aib_envs.full_context(env_id, {} if dim.binary else {dim.name: dim.train[0]})
        return [first, mirrored(env_id, first)]
    if len(texts) > MOST:
        raise ValueError(f"{len(texts)} contexts; allowed: up to {MOST}")
    contexts = []
    for text in texts:
        pairs = [word.partition("=") for word in text.split(",")]
        values = {name: float(value) for name, _, value in pairs}
        contexts.append(aib_envs.full_context(env_id, values))
    return contexts


def gif_path(run, out):
    if out is not None:
        path = Path(out)
    elif Path(run).is_dir():
        path = Path(run) / "film.gif"
    else:
        path = Path(run).parent / "film.gif"
    if path.suffix != ".gif":
        raise dmash.BadInput(f"--out {path}: must end in .gif")
    return path


def run_command(args):
    try:
        import matplotlib  # noqa: F401  (before anything takes time)
    except ImportError as error:
        raise dmash.BadInput(f"a film needs matplotlib ({error})") from None

    path = gif_path(args.run, args.out)
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
        message = f"{args.run}, --contexts {args.contexts}: {dmash.one_line(error)}"
        raise dmash.BadInput(message) from None
    frozen = agent.g is not None
    if frozen:
        contexts.append(contexts[0])
    longest = round(spec.horizon * task.dt, 6)
    seconds = min(400 * task.dt, longest) if args.seconds is None else args.seconds
    steps = round(dmash.number("--seconds", seconds, float, 2 * task.dt, longest) / task.dt)
    seed = dmash.number("--seed", args.seed, int, 0, 2**32 - 1)
    path.parent.mkdir(parents=True, exist_ok=True)

    film = shoot(agent, contexts, steps, seed, frozen)
    half, speed = steps // 2, stride(steps) * task.dt * FPS
    title = f"{agent.method.paper} on {cfg.env}, weights fixed: switch at {half * task.dt:.2g} s"
    screen = Screen(film, cfg.env, task.dt, f"{title} (speed × {speed:.2g})", frozen)
    save(screen, steps, path)
    for i, note in enumerate(screen.notes):
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
    contexts = f"up to {MOST}; default: both modes"
    parser.add_argument("--contexts", nargs="+", metavar="NAME=VALUE,...", help=contexts)
    parser.add_argument("--seconds", help="of simulated time (400 steps, or the whole episode)")
    parser.add_argument("--seed", default=0, help="of the initial state (%(default)s)")
    return dmash.exit_status("film.py", lambda: run_command(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
