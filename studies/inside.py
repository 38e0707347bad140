"""What does the code z hold, what does the adapter do with it, and is the adapter of a context best for its policy?

    python studies/inside.py runs/cartpole_inv__dma_star_sh__s1 --out inside
    python studies/inside.py runs/di_inv__* --out inside            several runs, side by side
    python studies/inside.py runs/<run>/policies/5000.pt            a policy of that step

It prints the main numbers of each run and writes into --out:

    inside.csv            a row per number: run, env, method, seed, step, set, quantity, context, other, value
    side_by_side.png      returns, Variability, information, returns with another context's ω: all runs
    <run>_codes.png       cosines of mean codes; z in the plane of its first two principal components
    <run>_adapter.png     mean action under ω of each context; returns in a context with ω of another
    <run>_training.png    Variability and information at each step, if the run has a folder policies/ (--snapshots)

Quantities; S is the mode (the binary contexts), U the continuous contexts, C both, z the code of evaluation, unmasked:

    variability, noise, spread, separation    1/d_z tr Cov(Z) and its parts (Theorem A.15), in each context set
    I(Z;S), I(Z;U|S), I(Z;C)    in nats, each by itself, of --windows contexts uniform in the set's range and the window
                                that the warm-up leaves; the finer z is, the more windows it takes to see it all
    cosine              of the mean codes of `context` and `other`
    undone              cosine between the policy's actions in the first mode and those in the second after it acted
                        on them (sign flipped, actuators swapped): 1 if what reaches the actuators is the same
    return              in a set, at the last evaluation; in `context` with ω inferred in `other`
    return, own         with ω inferred from its own window, mean over the contexts of the table
    return, matching    with ω inferred in the same context, by an episode beside
    return, best        with ω of the best context, chosen in half of the episodes and measured in the other half
    …, same mode and …, other mode    means over pairs of different contexts

Where a policy is told z or c in place of ω, so it is here; for those told c there is no z, and nothing to say of it.
Set `snapshot` is the train set, a quarter of the windows. A run takes a minute or two at K = 128, seconds at K = 24.
"""

import argparse
import contextlib
import csv
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import mutual_information
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import aib_envs  # noqa: E402
import dmash  # noqa: E402

EPISODES, CROSS_EPISODES = 4, 8  # in each context, for mean codes and Variability; in each cell of the cross-table
PAPER = {"mass": (0.8, 1.0, 1.3)}  # the values of the paper's cosines; else ends and middle of the train range
SETS, HEAD = dmash.SETS, ("run", "env", "method", "seed", "step", "set", "quantity", "context", "other", "value")


class Space:
    """The contexts of an environment: modes (values of the binary ones, S) and continuous ones (U)."""

    def __init__(self, env):
        dims, self.horizon = aib_envs.lookup(env).context, aib_envs.lookup(env).horizon
        self.binary, self.graded = ([dim for dim in dims if dim.binary == which] for which in (True, False))
        if not self.graded:
            raise dmash.BadInput(f"{env}: has no continuous context")
        values = itertools.product(*(dim.train for dim in self.binary))
        self.modes = [dict(zip([dim.name for dim in self.binary], mode)) for mode in values]  # [{}] without S
        self.first = self.graded[0]
        low, high = self.first.train
        self.few = self.mesh(PAPER.get(self.first.name, (low, (low + high) / 2, high)))

    def mesh(self, values):
        """Contexts: each mode with each of `values` of the first continuous dimension, the others at their defaults."""
        rest = {dim.name: dim.default for dim in self.graded}
        return [rest | {self.first.name: float(value)} | mode for mode in self.modes for value in values]

    def split(self, contexts):
        """S and U of contexts: the number (n,) of the mode, and the continuous values (n, d_u)."""
        s = [self.modes.index({dim.name: c[dim.name] for dim in self.binary}) for c in contexts]
        return np.array(s), np.array([[c[dim.name] for dim in self.graded] for c in contexts])

    def draw(self, which, n, rng):
        """n contexts of a set: modes in turns, each continuous value uniform over the set's range, 1 % of the train
        range apart from it (eval_out: beyond both of its ends)."""
        columns = {}
        for dim in self.graded:
            (low, high), (far_low, far_high) = dim.train, dim.extrapolation
            margin = {"train": 0, "eval_in": 0.01, "eval_out": -0.01}[which] * (high - low)
            low, high = low + margin, high - margin
            beyond = low - far_low, far_high - high, high
            below, above, start = beyond if which == "eval_out" else (0, high - low, low)
            x = rng.uniform(0, below + above, n)
            columns[dim.name] = np.where(x < below, far_low + x, start + x - below)
        u = [dict(zip(columns, map(float, row))) for row in zip(*columns.values())]
        return [context | self.modes[i % len(self.modes)] for i, context in enumerate(u)]


def rollout_in(agent, contexts, *seed):
    """All contexts side by side after a warm-up, at the start of an episode. Stream 2: training is 0, evaluation 1."""
    envs = aib_envs.VectorEnv(agent.cfg.env, contexts, seed=[agent.cfg.seed, 2, *seed])
    rollout = dmash.Rollout(agent, envs, noisy=False)
    rollout.begin_episode()
    return rollout


def gather(agent, contexts, episodes, steps, *seed):
    """Codes (contexts, codes of each, d_z) of fresh windows: the trained agent acts in all contexts at once for `steps`
    steps; z is read at the start of the episode, of the warm-up's window, and every K steps: no two windows overlap."""
    rollout, z = rollout_in(agent, list(contexts) * episodes, *seed), []
    for t in range(steps):
        if t % agent.cfg.K == 0:
            with torch.no_grad():
                z.append(agent.infer(rollout.replay.latest(False), False)[0].cpu().numpy())
        if t + 1 < steps:
            rollout.step()
    z = np.concatenate(z).reshape(-1, len(contexts), z[0].shape[-1])
    return z.swapaxes(0, 1).astype(np.float64)


def variability(agent, space, which):
    """Variability and parts of the contexts that the agent is trained or evaluated in, over whole episodes."""
    contexts = aib_envs.context_sets(agent.cfg.env, agent.cfg.contexts)[which]
    z = gather(agent, contexts, EPISODES, space.horizon, 0, SETS.index(which))
    c = np.arange(len(contexts)).repeat(z.shape[1])
    values = mutual_information.variability(z.reshape(len(c), -1), space.split(contexts)[0][c], c)
    return dict(zip(("variability", "noise", "spread", "separation"), values))


def information(agent, space, which, n):
    """Estimates of information; the n contexts and their codes z (n, d_z). A context gives one window: of two with the
    same U, each would be the other's neighbour in U, however coarse z is, and the estimate would be too high."""
    contexts = space.draw(which, n, np.random.default_rng([agent.cfg.seed, 2, SETS.index(which)]))
    codes = gather(agent, contexts, 1, 1, 1, SETS.index(which))[:, 0]
    z, (s, u), found = codes, space.split(contexts), {}
    if agent.method.output_norm and not agent.method.kl:
        z = z.reshape(n, -1, agent.g.GROUP)[..., :-1].reshape(n, -1)  # SimNorm: each group sums to 1
    if space.binary:
        found["I(Z;S)"] = mutual_information.discrete(z, s)
        within = [mutual_information.continuous(z[s == mode], u[s == mode]) for mode in np.unique(s)]
        found["I(Z;U|S)"] = float(np.mean(within))
    found["I(Z;C)"] = mutual_information.continuous(z, np.column_stack([u, s]) if space.binary else u)
    return found, contexts, codes


def mean_actions(agent, space):
    """For values (n,) of the first continuous context, over the extrapolation range: mean actions (modes, n, states,
    d_a), averaged over windows, in states (states, d_s) of warm-ups; and, if there are two modes, {"undone": cosine}.
    """
    values = np.linspace(*space.first.extrapolation, 40)
    rollout = rollout_in(agent, space.mesh(values.repeat(EPISODES)), 2)
    with torch.no_grad():
        _, told, _ = agent.tell(rollout.replay.latest(False), rollout.replay.c, False)
    visited = rollout.replay.rows[..., : rollout.replay.d_s].flatten(0, 1)
    s = visited[np.random.default_rng(agent.cfg.seed).choice(len(visited), 100, replace=False)]
    a = agent.act(s.repeat(rollout.envs.N, 1), told, False).cpu().numpy()  # a row of told serves all states
    a = a.reshape(len(space.modes), len(values), EPISODES, len(s), -1)
    found, (low, high) = {}, space.first.train
    if len(space.modes) == 2:
        one, other = a[:, (low <= values) & (values <= high)]
        other = other[..., [1, 0, *range(2, other.shape[-1])]] if space.binary[0].name == "swap" else -other
        found["undone"] = (one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum())
    return values, a.mean(2), s.cpu().numpy(), found


def cross_table(agent, contexts):
    """Returns (context c, context c', episodes) of acting in c while told ω of c', read anew at each step from an
    episode of the agent that runs beside, in c'; and returns (c, episodes) beside. All have the same starts, but never
    at once: the window beside must not be that of the very episode that is told."""
    n, start = len(contexts), lambda e, c: np.random.default_rng([agent.cfg.seed, 3, e % CROSS_EPISODES, c])
    beside = rollout_in(agent, list(contexts) * CROSS_EPISODES, 3)  # (episodes, c')
    envs = aib_envs.VectorEnv(agent.cfg.env, list(contexts) * beside.envs.N, seed=0)  # (episodes, c', c)
    envs.rngs = [start(e, c) for e in range(CROSS_EPISODES) for _ in contexts for c in range(n)]
    beside.envs.rngs = [start(e + 1, c) for e in range(CROSS_EPISODES) for c in range(n)]
    beside.reset()
    s, returns, own = envs.reset(), np.zeros(envs.N), np.zeros(beside.envs.N)
    while not beside.done:
        _, _, r, told = beside.step()
        own += r.cpu().numpy()
        s, r, _ = envs.step(agent.act(beside.tensor(s), told, False).cpu().numpy())  # a row of told serves all c
        s, returns = np.nan_to_num(s), returns + np.nan_to_num(r)  # a simulation that diverges
    return returns.reshape(CROSS_EPISODES, n, n).transpose(2, 1, 0), own.reshape(CROSS_EPISODES, n).T


def returns_beside(path, step):
    """The returns of metrics.csv, beside the policy or one folder above, at its step; none if there are none."""
    folder = path if path.is_dir() else path.parent
    for file in (folder / "metrics.csv", folder.parent / "metrics.csv"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError), open(file, encoding="utf-8") as text:
            for row in csv.DictReader(text):
                if int(row["step"]) == step:
                    return {name: float(row[name]) for name in SETS}
    return {}


def look(path, agent, space, windows):
    """All rows (step, set, quantity, context, other, value) of a run, and by file name what its figures show."""
    step, rows, pictures, snapshots = agent.step, [], {}, {}
    few, (s, _) = space.few, space.split(space.few)

    def add(numbers, which="", at=step):
        rows.extend((at, which, name, "", "", value) for name, value in numbers.items())

    def add_matrix(quantity, matrix):
        names = [", ".join(f"{name} {value:g}" for name, value in context.items()) for context in few]
        rows.extend((step, "", quantity, *pair, x) for pair, x in zip(itertools.product(names, names), matrix.flat))
        same, off = s[:, None] == s, ~np.eye(len(s), dtype=bool)
        means = {"same mode": matrix[same & off], "other mode": matrix[~same]}
        add({f"{quantity}, {name}": values.mean() for name, values in means.items() if len(values)})

    for which, value in returns_beside(path, step).items():
        add({"return": value}, which)
    if agent.g:
        shown = {}
        for which in SETS:
            add(variability(agent, space, which), which)
            found, *shown[which] = information(agent, space, which, windows)
            add(found, which)
        mean = gather(agent, few, EPISODES, space.horizon, 4).mean(1)  # (n, d_z)
        mean /= np.linalg.norm(mean, axis=1, keepdims=True)
        add_matrix("cosine", mean @ mean.T)
        pictures["codes"] = mean @ mean.T, space, shown
    *actions, found = mean_actions(agent, space)
    add(found)
    returns, own = cross_table(agent, few)
    cells, halves = returns.mean(-1), (returns[..., ::2].mean(-1), returns[..., 1::2].mean(-1))
    best = [test[range(len(few)), choice.argmax(1)].mean() for choice, test in (halves, halves[::-1])]
    add({"return, own": own.mean(), "return, matching": cells.diagonal().mean(), "return, best": np.mean(best)})
    add_matrix("return", cells)
    pictures["adapter"] = space, *actions, cells
    for file in (path / "policies").glob("*.pt") if agent.g else ():  # none where path is a file
        _, then = dmash.load_policy(file)
        found, *_ = information(then, space, "train", max(windows // 4, 100))
        snapshots[then.step] = variability(then, space, "train") | found
        add(snapshots[then.step], "snapshot", then.step)
    return rows, pictures | ({"training": (dict(sorted(snapshots.items())),)} if snapshots else {})


# ---- Command line -----------------------------------------------------------------------------------------------


def read(places):
    """{name: (path, agent, space)} of the runs; BadInput if one is of no use here, or given twice."""
    runs = {}
    for place in map(Path, places):
        cfg, agent = dmash.load_policy(place)
        if agent.method.context == "none":
            raise dmash.BadInput(f"{place}: {cfg.method} is told nothing of the context; allowed: any other method")
        name = cfg.folder.name + f"__{agent.step}" * (place.is_file() and place.name != "policy.pt")
        for other, there, _ in runs.values():
            if (replace(there.cfg, out=cfg.out), there.step) == (cfg, agent.step):
                raise dmash.BadInput(f"{place}: the same run as {other}; give only one of them")
        name += f"__{len(runs) + 1}" * (name in runs)  # with other settings
        runs[name] = place, agent, Space(cfg.env)
    return runs


def write(places, out, windows):
    """Everything, into the folder `out`: after each run, so that a stop leaves what is known."""
    windows = dmash.number("--windows", windows, int, "[100, 5000]")
    runs, rows = read(places), []
    out.mkdir(parents=True, exist_ok=True)
    dmash.keep_freed_memory()
    try:
        import inside_figures
    except ImportError as error:
        inside_figures = None
        print(f"no figures are drawn ({error})")
    for name, (path, agent, space) in runs.items():
        cfg, (found, pictures) = agent.cfg, look(path, agent, space, windows)
        print(f"{name}, step {agent.step:,}")
        for _, which, quantity, context, _, value in found:
            if not context and which in ("", "train"):
                print(f"  {quantity:<20} {value:10.4g}")
        sys.stdout.flush()
        rows += [dict(zip(HEAD, (name, cfg.env, cfg.method, cfg.seed, *row))) for row in found]
        (out / "inside.csv").write_text(dmash.csv_text(rows), encoding="utf-8")
        if inside_figures:
            for kind, shown in pictures.items():
                getattr(inside_figures, kind)(name, *shown).savefig(out / f"{name}_{kind}.png", dpi=100)
            inside_figures.side_by_side(rows).savefig(out / "side_by_side.png", dpi=100)


def main(argv=None):
    """The command line. Returns the exit status."""
    layout = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = dmash.Parser("inside.py", description=__doc__, **layout)
    parser.add_argument("places", nargs="+", metavar="RUN", help="a run folder, or a policy file")
    parser.add_argument("--out", type=Path, default="inside", help="folder to write into (default: %(default)s)")
    parser.add_argument("--windows", default=2000, help="windows in each set, for information (default: %(default)s)")
    return dmash.exit_status("inside.py", lambda: write(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main())
