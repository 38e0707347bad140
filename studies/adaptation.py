"""What does "zero-shot" cost, in steps? From an empty window, after a switch; and how short may the window be?

    python studies/adaptation.py RUN [RUN ...] [--out FOLDER] [--rollouts N]

RUN: a run folder or a policy file, all of one environment, of any methods and seeds. They act in the training contexts
and in their mirror images: in the other mode (sign, swap) or, where there is none, with the first context at one end of
its train range and at the other. Three questions, half an episode each:

    start     an episode begins with an empty window, all zeros; reference: with a full one, after a warm-up
    switch    in mid-episode the context becomes its mirror image, the window is still of the old one; reference: a
              twin in the same state whose window becomes one of the new context
    window    only the last k of the window's K transitions are there, the rest zeros; reference: all K

Rollout and reference have contexts, initial states and agent in common. What is told c (concat, da) or nothing (dr)
reads no window: the controls. Prints for each run, and writes by mode into adaptation.csv, the mean reward of both, the
return lost against the reference, and the steps until the reward (mean over ten steps) stays at 95 % of the
reference's, inf if it does not. The mode of a switch is that after it. Draws adaptation.png. On one CPU core about 25
seconds for a run of cartpole_inv, 3 for one of di_inv.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import aib_envs  # noqa: E402
import dmash  # noqa: E402

SHARE, SMOOTH = 0.95, 10  # of the reference's reward; steps of a moving mean

# ---- Contexts that change, windows that are short ---------------------------------------------------------------


def mirrored_dim(env_id):
    """The context dimension that a switch changes: the first binary one or, where there is none, the first."""
    dims = aib_envs.lookup(env_id).context
    return next((dim for dim in dims if dim.binary), dims[0])


def mirrored(env_id, context):
    """The context with that value mirrored in the middle of its train range: the other mode, the other end."""
    dim = mirrored_dim(env_id)
    return context | {dim.name: sum(dim.train) - context[dim.name]}


def switch(rollout):
    """Mirrors all contexts now. Physical states and the window stay; the methods that are told c are told."""
    envs, task = rollout.envs, rollout.envs.task
    envs.task = task.with_contexts([mirrored(envs.env_id, context) for context in task.contexts])
    envs.task.restore(task.snapshot())
    rollout.replay.c = torch.tensor([list(context.values()) for context in envs.task.contexts])


class ShortReplay(dmash.Replay):
    """Its latest windows hold the last `keep` of K transitions, zeros in place of the others, as if not yet written."""

    keep = None  # all

    def latest(self, noisy):
        tau = super().latest(noisy)
        return tau if tau is None or self.keep is None else tau * read(self.K, self.L, self.keep).unsqueeze(-1)


def read(K, L, keep):
    """Which of the L window positions that the encoder reads are among the last `keep` of K, (L,)."""
    return dmash.subsample(1, K, L, noisy=False)[0] >= K - keep


def rewards(agent, contexts, rollouts, warm_up=True, keep=None, after=None):
    """Rewards (T // 2, N) of the first half of an episode. With `after` "switch", of the second half, which begins with
    a switch; with "twin" the window, too, then is of the new context. The mirror image of a context stands half of
    `contexts` away; the first of several rollouts starts where a single one does."""
    envs = aib_envs.VectorEnv(agent.cfg.env, contexts * rollouts, seed=[agent.cfg.seed, 2])
    rollout, half, found = dmash.Rollout(agent, envs, noisy=False), envs.horizon // 2, []
    old = rollout.replay
    rollout.replay = ShortReplay(old.c, old.capacity, old.d_s, old.d_a, old.K, old.L)
    rollout.replay.keep = keep
    rollout.begin_episode(warm_up)
    while envs.t < (2 * half if after else half):
        if envs.t == half:
            switch(rollout)
            found = []
            if after == "twin":
                mirror_image = torch.arange(envs.N).reshape(rollouts, 2, -1).flip(1).flatten()
                rollout.replay.rows = rollout.replay.rows[:, mirror_image]
        _, _, r, _ = rollout.step()
        found.append(np.where(rollout.diverged, 0, r.numpy()))
    return np.array(found)


# ---- The three questions ----------------------------------------------------------------------------------------


def smooth(x):
    """The mean of each entry of x (T,) and the SMOOTH - 1 before it, as far as there are any."""
    ones = np.ones(SMOOTH)
    return np.convolve(x, ones)[: len(x)] / np.convolve(np.ones(len(x)), ones)[: len(x)]


def steps_to(curve, reference):
    """Steps until the moving mean of `curve` (T,) stays at SHARE of that of `reference`; inf: it does not."""
    curve, reference = smooth(curve), smooth(reference)
    below = np.flatnonzero(curve < SHARE * reference - 1e-9)
    if len(below) == 0:
        return 0
    return math.inf if below[-1] == len(curve) - 1 else int(below[-1]) + 1


def study(agent, rollouts):
    """Rows of adaptation.csv, and for each question, for `window` each k, the mean rewards over time of the rollouts
    and of their reference, (T // 2,) each."""
    cfg = agent.cfg
    contexts = aib_envs.context_sets(cfg.env, cfg.contexts)["train"]
    dim = mirrored_dim(cfg.env)
    if not dim.binary:
        contexts = [context | {dim.name: dim.train[i % 2]} for i, context in enumerate(contexts)]
    contexts += [mirrored(cfg.env, context) for context in contexts]
    values = np.array([context[dim.name] for context in contexts] * rollouts)
    new = np.array([mirrored(cfg.env, context)[dim.name] for context in contexts] * rollouts)  # after the switch
    act = lambda **how: rewards(agent, contexts, rollouts, **how)
    full = act()
    pairs = {("start", ""): (act(warm_up=False), full), ("switch", ""): (act(after="switch"), act(after="twin"))}
    for k in [0, *(2**i for i in range(1, 30) if 2**i < cfg.K)] if cfg.L else [0]:
        pairs["window", k] = act(keep=k), full
    pairs["window", cfg.K] = full, full
    rows = []
    for (question, k), (found, reference) in pairs.items():
        mode = new if question == "switch" else values
        of_modes = {f"{dim.name}={value:g}": mode == value for value in dim.train}
        for name, which in ({"all": np.full(len(mode), True)} | of_modes).items():
            mean, ref = found[:, which].mean(1), reference[:, which].mean(1)
            row = dict(method=cfg.method, seed=cfg.seed, step=agent.step, question=question, mode=name, k=k)
            row["read"] = int(read(cfg.K, cfg.L, k).sum()) if k != "" and cfg.L else ""
            row |= dict(reward=float(mean.mean()), reference=float(ref.mean()), lost=float((ref - mean).sum()))
            rows.append(row | {"steps": steps_to(mean, ref) if question != "window" else ""})
    return rows, {key: (found.mean(1), reference.mean(1)) for key, (found, reference) in pairs.items()}


def summary(rows):
    """A run's numbers, all modes together, in a line."""
    rows, parts = [row for row in rows if row["mode"] == "all"], []
    for row in rows[:2]:
        parts.append(f"{row['question']} {row['lost']:.1f} lost, {row['steps']} steps")
    windows = "  ".join(f"{row['k']}: {row['reward']:.3f}" for row in rows[2:])
    return f"{rows[0]['method']}, seed {rows[0]['seed']}: {'; '.join(parts)}; reward by k  {windows}"


# ---- Picture ----------------------------------------------------------------------------------------------------


def draw(env_id, found):
    """The figure of `found`, a list of method and curves: of several runs of a method, the mean."""
    from compare_figures import style, with_legend
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.4), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[1].sharey(axes[0])
    for method in dict.fromkeys(method for method, _ in found):
        runs = [curves for name, curves in found if name == method]
        mean = lambda key: np.mean([run[key] for run in runs], 0)  # of rollouts and reference, (2, T // 2)
        for ax, question in zip(axes, ("start", "switch")):
            curve, reference = mean((question, ""))
            ax.plot(smooth(curve - reference), markevery=max(1, len(curve) // 10), **style(method))
        ks = [k for question, k in runs[0] if question == "window"]
        axes[2].plot(ks, [mean(("window", k))[0].mean() for k in ks], **style(method))
    axes[0].set(title="begun with an empty window", xlabel="steps since the start of the episode")
    axes[1].set(title="context switched in mid-episode", xlabel="steps since the switch")
    for ax in axes[:2]:
        ax.set_ylabel("reward less the reference's, per step")
    axes[2].set(title="with a short window", xlabel="k, transitions kept of the last K", ylabel="reward per step")
    axes[2].set_xscale("symlog", base=2, linthresh=2)
    axes[2].set_xticks(ks_of(found), map(str, ks_of(found)))
    axes[2].minorticks_off()
    figure.suptitle(f"{env_id}: what an agent loses while its window does not tell the context")
    return with_legend(figure)


def ks_of(found):
    return sorted({k for _, curves in found for question, k in curves if question == "window"})


# ---- Command line -----------------------------------------------------------------------------------------------


def run_command(args):
    rollouts = dmash.number("--rollouts", args.rollouts, int, "[1, 1000]")
    agents = [dmash.load_policy(run)[1] for run in args.runs]
    if len({agent.cfg.env for agent in agents}) > 1:
        each = ", ".join(f"{run} of {agent.cfg.env}" for run, agent in zip(args.runs, agents))
        raise dmash.BadInput(f"{each}: must be of one environment")
    out, rows, found, several = Path(args.out), [], [], len({agent.cfg.K for agent in agents}) > 1
    out.mkdir(parents=True, exist_ok=True)
    for agent in agents:
        of_run, curves = study(agent, rollouts)
        print(summary(of_run), flush=True)
        rows += of_run
        found.append((agent.cfg.method + f", K {agent.cfg.K}" * several, curves))
    (out / "adaptation.csv").write_bytes(dmash.csv_text(rows).encode())
    try:
        draw(agents[0].cfg.env, found).savefig(out / "adaptation.png", dpi=110)
    except ImportError as error:
        print(f"no figure is drawn ({error})")


def main(argv=None):
    """The command line. Returns the exit status."""
    layout = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = dmash.Parser("adaptation.py", description=__doc__, **layout)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders or policy files, of one environment")
    parser.add_argument("--out", default="results/adaptation", help="folder to write into (default: %(default)s)")
    parser.add_argument("--rollouts", default=1, help="episodes in each context (default: %(default)s)")
    return dmash.exit_status("adaptation.py", lambda: run_command(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
