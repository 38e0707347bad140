"""What does the code z hold, what does the adapter do with it, and which adapter suits a context?

    python studies/inside.py runs/cartpole_inv__dma_star_sh__s1 --out inside
    python studies/inside.py runs/di_inv__* --out inside            several runs
    python studies/inside.py runs/<run>/policies/5000.pt            a policy of that step

A run takes a minute or two at K = 128, seconds at K = 24. The program prints the main numbers of
each run and writes into --out (the figure by matplotlib):

    inside.csv            run, env, method, seed, step, set, quantity, context, other, value
    <run>_codes.png       cosines of mean codes; codes in the plane of two principal components

S is the mode (the binary contexts), U the continuous contexts, C both. z is the code of evaluation,
without masks. These are the quantities:

    variability, noise, spread, separation
                        (1/d_z) tr Cov(Z) and its parts (Theorem A.15), in each set of contexts
    I(Z;S), I(Z;U|S), I(Z;C)
                        in nats, each estimated by itself. Each of --windows contexts, uniform in
                        the set's range, gives the window that its warm-up leaves. The finer z is,
                        the more windows it takes to see all of the information.
    cosine              of the mean codes of `context` and `other`
    undone              cosine between the policy's actions in the first mode and its actions in
                        the second mode with their signs flipped or their dimensions swapped back.
                        It is 1 if the same reaches the actuators.
    return              of an episode in `context` with ω from `other`
    return, matching    with ω from another episode in the same context, mean over contexts
    return, best        with ω from the best context: chosen in one half of the episodes, measured
                        in the other half
    …, same mode; …, other mode
                        means over pairs of different contexts

A policy that gets z or c in place of ω gets it here too. Methods that get c have no z. The set
`snapshot` is the train set with a quarter of the windows.
"""

import itertools
import sys
from pathlib import Path

import inside_figures
import mutual_information
import numpy as np
import torch
from command_line import parser_of
from runs import aib_envs, dmash, in_words

EPISODES = 4  # in each context, for mean codes and Variability
CROSS_EPISODES = 8  # in each cell of the cross-table
PAPER = {"mass": (0.8, 1.0, 1.3)}  # the values of the paper's cosines
HEAD = ("run", "env", "method", "seed", "step", "set", "quantity", "context", "other", "value")


class Space:
    """The contexts of an environment: modes (values of the binary ones) and continuous ones."""

    def __init__(self, env):
        spec = aib_envs.lookup(env)
        self.env, self.horizon = env, spec.horizon
        self.binary = [dim for dim in spec.context if dim.binary]
        self.continuous = [dim for dim in spec.context if not dim.binary]
        if not self.continuous:
            raise dmash.BadInput(f"{env}: has no continuous context, which this program needs")
        names = [dim.name for dim in self.binary]
        modes = itertools.product(*[dim.train for dim in self.binary])
        self.modes = [dict(zip(names, mode)) for mode in modes]
        self.first = self.continuous[0]
        low, high = self.first.train
        self.few = self.mesh(PAPER.get(self.first.name, (low, (low + high) / 2, high)))

    def context(self, mode, *values):
        """A mode, {} without binary contexts, with values of the first continuous contexts."""
        names = [dim.name for dim in self.continuous]
        return aib_envs.full_context(self.env, mode | dict(zip(names, values)))

    def mesh(self, values):
        """Each mode with each value of the first continuous context; the others at default."""
        return [self.context(mode, value) for mode in self.modes for value in values]

    def split(self, contexts):
        """S and U: the number of the mode (n,) and the continuous values (n, d_u)."""
        s, u = [], []
        for context in contexts:
            s.append(self.modes.index({dim.name: context[dim.name] for dim in self.binary}))
            u.append([context[dim.name] for dim in self.continuous])
        return np.array(s), np.array(u)

    def draw(self, which, n, rng):
        """n contexts of a set: the modes take turns, continuous values are uniform."""
        columns = [draw_values(dim, which, n, rng) for dim in self.continuous]
        modes = itertools.cycle(self.modes)
        return [self.context(mode, *values) for mode, values in zip(modes, zip(*columns))]


def draw_values(dim, which, n, rng):
    """n values, uniform in a set's range. eval_in and eval_out keep 1 % away from train's ends."""
    low, high = dim.train
    margin = 0.01 * (high - low)
    if which == "eval_out":
        far_low, far_high = dim.extrapolation
        below = low - margin - far_low  # lengths of the two parts of the range
        above = far_high - (high + margin)
        x = rng.uniform(0, below + above, n)
        return np.where(x < below, far_low + x, high + margin + x - below)
    if which == "eval_in":
        low, high = low + margin, high - margin
    return rng.uniform(low, high, n)


# ---- What is measured ---------------------------------------------------------------------------


def rollout_in(agent, contexts, *seed):
    """All contexts side by side at the start of an episode, after a warm-up."""
    # Random numbers of stream 2: training draws from 0, evaluation from 1.
    envs = aib_envs.VectorEnv(agent.cfg.env, contexts, seed=[agent.cfg.seed, 2, *seed])
    rollout = dmash.Rollout(agent, envs, noisy=False)
    rollout.begin_episode()
    return rollout


def gather(agent, contexts, episodes, steps, *seed):
    """Codes of fresh windows: (contexts, codes of each, d_z).

    The agent acts in all contexts at once. z is read after the warm-up and then every K steps, so
    no two windows overlap.
    """
    rollout = rollout_in(agent, list(contexts) * episodes, *seed)
    codes = []
    for t in range(steps):
        if t % agent.cfg.K == 0:
            with torch.no_grad():
                z, _ = agent.infer(rollout.replay.latest(False), False)
            codes.append(z.numpy())
        rollout.step()
    codes = np.concatenate(codes).reshape(-1, len(contexts), agent.cfg.d_z)
    return codes.swapaxes(0, 1).astype(np.float64)


def variability(agent, space, which):
    """Variability and its parts over whole episodes in the contexts of training or evaluation."""
    contexts = aib_envs.context_sets(agent.cfg.env, agent.cfg.contexts)[which]
    codes = gather(agent, contexts, EPISODES, space.horizon, 0, dmash.SETS.index(which))
    c = np.arange(len(contexts)).repeat(codes.shape[1])
    s, _ = space.split(contexts)
    values = mutual_information.variability(codes.reshape(len(c), -1), s[c], c)
    return dict(zip(("variability", "noise", "spread", "separation"), values))


def measure(agent, space, which, n):
    """Variability, its parts, estimates of information; and n contexts with codes (n, d_z)."""
    # A context gives only one window. A second one, with the same U, would be the first one's
    # neighbour in U however coarse z is, and the estimate would be too high.
    index = dmash.SETS.index(which)
    contexts = space.draw(which, n, np.random.default_rng([agent.cfg.seed, 2, index]))
    codes = gather(agent, contexts, 1, 1, 1, index)[:, 0]
    s, u = space.split(contexts)
    z = codes
    if agent.method.output_norm:
        # SimNorm: each group sums to 1, so one number of each tells nothing new.
        z = codes.reshape(n, -1, agent.g.GROUP)[..., :-1].reshape(n, -1)
    found = variability(agent, space, which)
    c = u
    if space.binary:
        found["I(Z;S)"] = mutual_information.discrete(z, s)
        modes = [s == mode for mode in np.unique(s)]
        within = [mutual_information.continuous(z[mode], u[mode]) for mode in modes]
        found["I(Z;U|S)"] = float(np.mean(within))
        c = np.column_stack([u, s])
    found["I(Z;C)"] = mutual_information.continuous(z, c)
    return found, contexts, codes


def undone(agent, space):
    """{"undone": cosine of the policy's mean actions in two modes}, empty without two modes."""
    if len(space.modes) != 2:
        return {}
    values = np.linspace(*space.first.extrapolation, 40)
    rollout = rollout_in(agent, space.mesh(values.repeat(EPISODES)), 2)
    replay = rollout.replay
    with torch.no_grad():
        _, omega = agent.infer(replay.latest(False), False, replay.c)
    visited = replay.rows[..., : replay.d_s].flatten(0, 1)  # in the warm-ups
    rng = np.random.default_rng(agent.cfg.seed)
    s = visited[rng.choice(len(visited), 100, replace=False)]
    a = agent.act(s.repeat(rollout.envs.N, 1), omega, False)  # each row of omega serves all of s
    a = a.numpy().reshape(2, len(values), EPISODES, len(s), -1)
    low, high = space.first.train
    one, other = a[:, (low <= values) & (values <= high)]
    if space.binary[0].name == "swap":
        other = other[..., ::-1]
    else:
        other = -other
    return {"undone": (one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum())}


def cross_table(agent, contexts):
    """Returns of acting in context c with ω inferred in c': (c, c', episodes).

    ω is read anew at each step from an episode of the agent beside, in c'. All begin in the same
    states. But an episode never acts on the ω of one that began as it did: where c' is c, that
    would be its own window.
    """
    n = len(contexts)
    episodes = range(CROSS_EPISODES)

    def start(episode, c):
        return np.random.default_rng([agent.cfg.seed, 3, episode % CROSS_EPISODES, c])

    beside = rollout_in(agent, list(contexts) * CROSS_EPISODES, 3)  # (episodes, c')
    beside.envs.rngs = [start(e + 1, c) for e in episodes for c in range(n)]
    beside.reset()
    envs = aib_envs.VectorEnv(agent.cfg.env, list(contexts) * beside.envs.N, seed=0)
    envs.rngs = [start(e, c) for e in episodes for _ in contexts for c in range(n)]
    s = envs.reset()  # (episodes, c', c)
    returns = np.zeros(envs.N)
    while not beside.done:
        _, _, _, omega = beside.step()
        a = agent.act(beside.tensor(s), omega, False)  # each row of omega serves all c
        s, r, _ = envs.step(a.numpy())
        s = np.nan_to_num(s)  # where a simulation diverged
        returns += np.nan_to_num(r)
    return returns.reshape(CROSS_EPISODES, n, n).transpose(2, 1, 0)


def with_best(returns):
    """Mean return with ω of the best context, chosen in one half of the episodes."""
    even = returns[..., ::2].mean(-1)  # (c, c')
    odd = returns[..., 1::2].mean(-1)
    c = np.arange(len(returns))
    return (odd[c, even.argmax(1)].mean() + even[c, odd.argmax(1)].mean()) / 2


# ---- The table of a run -------------------------------------------------------------------------


def rows_of(step, which, numbers):
    """Rows (step, set, quantity, context, other, value)."""
    return [(step, which, name, "", "", value) for name, value in numbers.items()]


def matrix_rows(step, quantity, matrix, space):
    """A row for each pair of the few contexts, and means over pairs of different ones."""
    names = [in_words(context) for context in space.few]
    rows = []
    for (i, j), value in np.ndenumerate(matrix):
        rows.append((step, "", quantity, names[i], names[j], value))
    s, _ = space.split(space.few)
    same = s[:, None] == s
    means = {f"{quantity}, same mode": matrix[same & ~np.eye(len(s), dtype=bool)].mean()}
    if not same.all():
        means[f"{quantity}, other mode"] = matrix[~same].mean()
    return rows + rows_of(step, "", means)


def look(path, agent, space, windows):
    """The rows of a run, and the figure of its codes, if it has any."""
    step, few = agent.step, space.few
    rows, figure = [], None
    if agent.g is not None:
        samples = {}
        for which in dmash.SETS:
            found, contexts, codes = measure(agent, space, which, windows)
            rows += rows_of(step, which, found)
            samples[which] = contexts, codes
        mean = gather(agent, few, EPISODES, space.horizon, 4).mean(1)  # (n, d_z)
        mean /= np.linalg.norm(mean, axis=1, keepdims=True)
        cosines = mean @ mean.T
        rows += matrix_rows(step, "cosine", cosines, space)
        figure = inside_figures.codes(space, cosines, samples)
    rows += rows_of(step, "", undone(agent, space))
    returns = cross_table(agent, few)
    cells = returns.mean(-1)
    means = {"return, matching": cells.diagonal().mean(), "return, best": with_best(returns)}
    rows += rows_of(step, "", means) + matrix_rows(step, "return", cells, space)
    if agent.g is not None:
        for file in sorted((path / "policies").glob("*.pt"), key=lambda file: int(file.stem)):
            _, agent = dmash.load_policy(file)
            found, _, _ = measure(agent, space, "train", max(windows // 4, 100))
            rows += rows_of(agent.step, "snapshot", found)
    return rows, figure


# ---- Command line -------------------------------------------------------------------------------


def read(places):
    """The runs by their names: (path, agent, space)."""
    runs = {}
    for place in map(Path, places):
        cfg, agent = dmash.load_policy(place)
        name = dmash.run_folder(cfg).name
        if name in runs:  # at another step, or with other settings
            name += f"__{len(runs) + 1}"
        runs[name] = (place, agent, Space(cfg.env))
    return runs


def run_command(args):
    """Writes the table after each run, so that a stop leaves what is known."""
    windows = dmash.number("--windows", args.windows, int, 100, 5000)
    runs = read(args.places)
    args.out.mkdir(parents=True, exist_ok=True)
    dmash.keep_freed_memory()
    rows = []
    for name, (path, agent, space) in runs.items():
        cfg = agent.cfg
        found, figure = look(path, agent, space, windows)
        print(f"{name}, step {agent.step:,}")
        for row in found:
            rows.append(dict(zip(HEAD, (name, cfg.env, cfg.method, cfg.seed, *row))))
            _, which, quantity, context, _, value = row
            if not context and which in ("", "train"):
                print(f"  {quantity:<20} {value:10.4g}", flush=True)
        (args.out / "inside.csv").write_text(dmash.csv_text(rows))
        if figure is not None:
            figure.suptitle(name, parse_math=False)
            figure.savefig(args.out / f"{name}_codes.png", dpi=100)


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = parser_of("inside.py", __doc__)
    parser.add_argument("places", nargs="+", metavar="RUN", help="a run folder, or a policy file")
    parser.add_argument("--out", type=Path, default="inside", help="folder (default: %(default)s)")
    help = "windows in each set, for information (default: %(default)s)"
    parser.add_argument("--windows", default=2000, help=help)
    return dmash.exit_status("inside.py", lambda: run_command(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
