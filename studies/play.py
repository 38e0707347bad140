"""Can you fool it? A page in which a trained agent acts and the reader flips its motor.

    python studies/play.py RUN [--against RUN] [--out play.html]

RUN is a run folder or a policy file of cartpole_inv, di_inv or di_perm, trained by dma_star_sh.
`--against` adds a second agent, which gets the same flips and pushes. It is one of `dr`, which
is told nothing, or of `concat`, which is told the true context. The page is one file of 3 MB.
It opens by a double click and needs no network.

The weights are written as float16, which halves the file. The program prints what that costs:
the largest change of an action in 100 steps of each training context. It takes 10 seconds.

With a second agent the program also finds its mean reward for each wiring of the motors.
"""

import base64
import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch
from adaptation import mirrored_dim
from command_line import parser_of
from runs import aib_envs, dmash

TEMPLATE = Path(__file__).with_suffix(".html")
ENVIRONMENTS = ("cartpole_inv", "di_inv", "di_perm")
SHOWN = ("dma_star_sh",)
AGAINST = ("dr", "concat")
STEPS = 100

# ---- An agent as the page reads it --------------------------------------------------------------


def acting_weights(agent):
    """The tensors that acting needs, by name. An averaged policy takes the place of the policy."""
    pi = agent.pi if agent.pi_average is None else agent.pi_average
    return torch.nn.ModuleDict({"g": agent.g, "h": agent.h, "pi": pi}).state_dict()


def as_text(tensor):
    """The tensor as float16, in base64."""
    array = tensor.numpy().astype("<f2")
    return base64.b64encode(array.tobytes()).decode()


def describe(agent):
    weights = {name: as_text(tensor) for name, tensor in acting_weights(agent).items()}
    return {"method": dmash.METHODS[agent.cfg.method].paper, "weights": weights}


# ---- What the agent does in its training contexts -----------------------------------------------


def train_contexts(cfg):
    """The training contexts, and whether the motors of each are wired as usual, (N,)."""
    contexts = aib_envs.context_sets(cfg.env, cfg.contexts)["train"]
    wiring = mirrored_dim(cfg.env)
    return contexts, np.array([context[wiring.name] == wiring.default for context in contexts])


def watch(agent):
    """Acts in the training contexts. Returns the mean code z of each wiring of the motors, usual
    and other, and the largest change of an action by float16."""
    contexts, usual = train_contexts(agent.cfg)
    envs = aib_envs.VectorEnv(agent.cfg.env, contexts, seed=0)
    rollout = dmash.Rollout(agent, envs, noisy=False)
    rollout.begin_episode()
    coarse = copy.deepcopy(agent).half().float()
    codes = []
    changes = []
    for _ in range(STEPS):
        tau = rollout.replay.latest(noisy=False)
        with torch.no_grad():
            z, _ = agent.infer(tau, noisy=False)
            _, omega = coarse.infer(tau, noisy=False)
        s, a, _, _ = rollout.step()
        codes.append(z)
        changes.append(coarse.act(s, omega, noisy=False) - a)
    mean = torch.stack(codes).mean(0)  # of each context, (N, d_z)
    means = [mean[usual].mean(0).tolist(), mean[~usual].mean(0).tolist()]
    return means, torch.stack(changes).abs().max().item()


def mean_rewards(agent):
    """The mean reward of one episode in each training context, by wiring: usual, other."""
    contexts, usual = train_contexts(agent.cfg)
    returns, _ = dmash.evaluate(agent, agent.cfg, contexts)
    rewards = returns[:, 0] / aib_envs.lookup(agent.cfg.env).horizon
    return [rewards[usual].mean(), rewards[~usual].mean()]


# ---- The page -----------------------------------------------------------------------------------


def page(agent, other=None):
    """The text of the page, and the cost of float16 in action."""
    cfg = agent.cfg
    codes, cost = watch(agent)
    dims = []
    for dim in aib_envs.lookup(cfg.env).context:
        dims.append({"name": dim.name, "usual": dim.default, "train": dim.train})
        if not dim.binary:
            dims[-1]["all"] = dim.extrapolation
    data = {"env": cfg.env, "K": cfg.K, "L": cfg.L, "dims": dims, "codes": codes, "cost": cost}
    data["agents"] = [describe(agent)]
    if other is not None:
        data["agents"].append(describe(other))
        data["rewards"] = mean_rewards(other)
    text = json.dumps(data).replace("</", "<\\/")
    return TEMPLATE.read_text(encoding="utf-8").replace("{{DATA}}", text), cost


def load(run, environments, methods):
    """The agent of a run. BadInput says why the page cannot show it there."""
    cfg, agent = dmash.load_policy(run)
    for found, allowed in ((cfg.env, environments), (cfg.method, methods)):
        if found not in allowed:
            what = ", ".join(allowed)
            raise dmash.BadInput(f"{run} is of {found}; the page can show {what} here")
    return agent


def run_command(args):
    agent = load(args.run, ENVIRONMENTS, SHOWN)
    other = None
    if args.against is not None:
        other = load(args.against, [agent.cfg.env], AGAINST)
    text, cost = page(agent, other)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(f"float16 changes an action by at most {cost:.1e}")
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = parser_of("play.py", __doc__)
    parser.add_argument("run", metavar="RUN", help="run folder or policy file")
    parser.add_argument("--against", metavar="RUN", help="a second agent, of dr or concat")
    out = "the page (default: %(default)s)"
    parser.add_argument("--out", type=Path, default="play.html", help=out)
    return dmash.exit_status("play.py", lambda: run_command(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
