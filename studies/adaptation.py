"""What does "zero-shot" cost, in steps? And how short may the window be?

    python studies/adaptation.py RUN [RUN ...] [--out FOLDER]

RUN is a run folder or a policy file. All are of one environment, of any methods and seeds. The
agents act in the training contexts and in their mirror images. The mirror image of a context has
the other mode (sign, swap). Where there is none, the first context is at one end of its train
range, and in the mirror image at the other. There are three questions of half an episode each:

    start     An episode begins with an empty window, all zeros.
              Reference: it begins with a full window, after a warm-up.
    switch    In mid-episode the context becomes its mirror image. The window is of the old context.
              Reference: a twin in the same state, whose window becomes one of the new context.
    window    Only the last k of the window's K transitions are there, the rest are zeros.
              Reference: all K are there.

Rollout and reference have contexts, initial states and agent in common. Methods that are told the
context (concat, da) or nothing (dr) read no window. They are the controls.

Each run prints a line. adaptation.csv has rows by mode, which after a switch is the new one. A row
has the mean reward of rollout and reference, the return lost against the reference, and the steps
until the reward (mean over ten steps) stays at 95 % of the reference's, inf if it does not. On one
CPU core a run of cartpole_inv takes about 25 seconds.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from command_line import parser_of
from runs import aib_envs, distinct, dmash

SHARE = 0.95  # of the reference's reward
SMOOTH = 10  # steps of a moving mean

# ---- Contexts that change, windows that are short -----------------------------------------------


def mirrored_dim(env_id):
    """The context dimension that a switch changes: the first binary one, else the first."""
    dims = aib_envs.lookup(env_id).context
    return next((dim for dim in dims if dim.binary), dims[0])


def mirrored(env_id, context):
    """The context with that value mirrored in the middle of its train range."""
    dim = mirrored_dim(env_id)
    return context | {dim.name: sum(dim.train) - context[dim.name]}


def switch(rollout):
    """Mirrors all contexts now. States and windows stay. The methods that know c know it."""
    envs, task = rollout.envs, rollout.envs.task
    envs.task = task.with_contexts([mirrored(envs.env_id, context) for context in task.contexts])
    envs.task.restore(task.snapshot())
    rollout.replay.c = torch.tensor([list(context.values()) for context in envs.task.contexts])


class ShortRollout(dmash.Rollout):
    """In its window, all but the last `keep` of the K transitions are zeros."""

    def step(self, random=False):
        replay = self.replay  # with room for K
        age = (replay.t - 1 - torch.arange(replay.K)) % replay.K  # of each row; the last one's is 0
        replay.rows[age >= self.keep] = 0
        return super().step(random)


def rewards(agent, contexts, warm_up=True, keep=math.inf, after=None):
    """Rewards (T // 2, N) of the first half of an episode.

    after "switch": of the second half, which begins with a switch. after "twin": the window, too,
    then is of the new context. The mirror image of a context stands half of `contexts` away.
    """
    envs = aib_envs.VectorEnv(agent.cfg.env, contexts, seed=[agent.cfg.seed, 2])
    rollout = ShortRollout(agent, envs, noisy=False)
    rollout.keep = keep
    rollout.begin_episode(warm_up)
    found = half_an_episode(rollout)
    if after is None:
        return found
    switch(rollout)
    if after == "twin":
        rollout.replay.rows = rollout.replay.rows.roll(envs.N // 2, dims=1)
    return half_an_episode(rollout)


def half_an_episode(rollout):
    """The rewards (T // 2, N), 0 where the simulation diverged."""
    found = []
    for _ in range(rollout.envs.horizon // 2):
        _, _, r, _ = rollout.step()
        found.append(np.where(rollout.diverged, 0, r.numpy()))
    return np.array(found)


# ---- The three questions ------------------------------------------------------------------------


def smooth(x):
    """The mean of each entry of x (T,) and the SMOOTH - 1 before it, as far as there are any."""
    sums = np.convolve(x, np.ones(SMOOTH))[: len(x)]
    return sums / np.minimum(np.arange(len(x)) + 1, SMOOTH)


def steps_to(curve, reference):
    """Steps until the moving mean of `curve` (T,) stays at SHARE of the reference's; inf: never."""
    below = smooth(reference - curve) > (1 - SHARE) * abs(smooth(reference)) + 1e-9
    steps = max(np.flatnonzero(below) + 1, default=0)
    return math.inf if steps == len(curve) else int(steps)


def study(agent):
    """Rows of adaptation.csv."""
    cfg = agent.cfg
    contexts = aib_envs.context_sets(cfg.env, cfg.contexts)["train"]
    dim = mirrored_dim(cfg.env)
    if not dim.binary:
        contexts = [c | {dim.name: dim.train[i % 2]} for i, c in enumerate(contexts)]
    contexts += [mirrored(cfg.env, context) for context in contexts]

    full = rewards(agent, contexts)
    empty = rewards(agent, contexts, warm_up=False)
    switched = rewards(agent, contexts, after="switch")
    twins = rewards(agent, contexts, after="twin")
    pairs = {("start", ""): (empty, full), ("switch", ""): (switched, twins)}
    powers = [2**i for i in range(1, 30) if agent.g is not None and 2**i < cfg.K]
    for k in [0, *powers]:
        pairs["window", k] = rewards(agent, contexts, keep=k), full
    pairs["window", cfg.K] = full, full

    rows = []
    for (question, k), (found, reference) in pairs.items():
        values = np.array([context[dim.name] for context in contexts])
        if question == "switch":
            values = sum(dim.train) - values
        modes = {"all": np.full(len(values), True)}
        for value in dim.train:
            modes[f"{dim.name}={value:g}"] = np.isclose(values, value)
        for mode, which in modes.items():
            mean, ref = found[:, which].mean(1), reference[:, which].mean(1)
            row = {
                "method": cfg.method,
                "seed": cfg.seed,
                "step": agent.step,
                "question": question,
                "mode": mode,
                "k": k,
                "reward": float(mean.mean()),
                "reference": float(ref.mean()),
                "lost": float((ref - mean).sum()),
                "steps": "",
            }
            if question != "window":
                row["steps"] = steps_to(mean, ref)
            rows.append(row)
    return rows


def summary(rows):
    """A run's numbers, all modes together, in a line."""
    start, switched, *windows = [row for row in rows if row["mode"] == "all"]
    parts = []
    for row in (start, switched):
        parts.append(f"{row['question']} {row['lost']:.1f} lost, {row['steps']} steps")
    by_k = "  ".join(f"{row['k']}: {row['reward']:.3f}" for row in windows)
    parts.append(f"reward by k  {by_k}")
    return f"{start['method']}, seed {start['seed']}: {'; '.join(parts)}"


# ---- Command line -------------------------------------------------------------------------------


def run_command(runs, out):
    agents = [dmash.load_policy(path)[1] for path in distinct(runs)]
    envs = sorted({agent.cfg.env for agent in agents})
    if len(envs) > 1:
        raise dmash.BadInput(f"runs of {' and '.join(envs)}: must be of one environment")
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for agent in agents:
        of_run = study(agent)
        print(summary(of_run), flush=True)
        rows += of_run
    (out / "adaptation.csv").write_text(dmash.csv_text(rows))


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = parser_of("adaptation.py", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders or policy files")
    parser.add_argument(
        "--out", type=Path, default="results/adaptation", help="folder (%(default)s)"
    )
    return dmash.exit_status("adaptation.py", lambda: run_command(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main())
