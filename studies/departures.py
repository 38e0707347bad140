"""Do the differences between dmash.py and the published code change returns?

    python studies/departures.py --env ode --method dma_star --as published --quick
    python studies/departures.py --env ode --method dma_star --as terminal+same_index --quick
    python studies/departures.py --resume runs/ode__dma_star.published__quick__s1

The other words of the command line are those of dmash.py, and so are the time and what is printed.
`--as` names what differs from dmash.py, for any method. Names are joined by +. `published` stands
for the first eight, which are what the published code does:

    included     The window of a transition in the batch holds that transition, as its last entry.
    terminal     The time limit is a terminal state in the critics' target.
    fresh        Encoder and hypernetwork run again for the critics and for each step of the policy,
                 each time with another part of the window and other masks. The temperature learns
                 from actions of its own. The KL term of DMA-Pearl comes from a second pass.
    apart        Warm-ups act by the mean action, without masks. Windows reach back into them, but
                 no batch holds their transitions. Random actions have no warm-up.
    same_index   All contexts but the first have the same times in a batch.
    same_start   All contexts have the same initial states, in training and in evaluation.
    finished     A batch holds transitions of finished episodes only.
    epsilon      The log-probability of an action has log(1 − tanh²u + 1e-6), not log(1 − tanh²u).

Four names let RL losses reach η, in methods with a shared hypernetwork. For the named loss, ω is
computed again from z, a constant, and Adam steps η at the dynamics' rate, too:

    critic_into_eta   The critics' loss reaches η.
    actor_into_eta    The policy's loss reaches η, through π and through the critics.
    both_into_eta     Both losses reach η.
    through_pi        The policy's loss reaches η through π; in the critics, ω is a constant for it.

One name tells whether the methods that know the context suffer from its units. The published code
leaves these as they are: a string of .24 to .36 m beside a gravity of 8 to 12 m/s².

    scaled       Each number of the true context goes from -1 to 1 over its train range.

The names are a setting of the run, `departures`, and stand in the folder's name. So --resume and
--eval find them, and studies/compare.py sets the run beside the others.
"""

import copy
import functools
import math
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from runs import aib_envs, dmash

PUBLISHED = "included terminal fresh apart same_index same_start finished epsilon".split()
INTO_ETA = {  # which losses reach η
    "critic_into_eta": ["critic"],
    "actor_into_eta": ["actor"],
    "both_into_eta": ["critic", "actor"],
    "through_pi": ["actor"],
}
DEPARTURES = [*PUBLISHED, *INTO_ETA, "scaled"]

plain = SimpleNamespace(**vars(dmash))  # as dmash is before and after `departed`


def replacing(mine):
    """In the block, these functions and classes stand in the place of dmash's of the same names."""
    return mock.patch.multiple(dmash, **{one.__name__: one for one in mine})


# ---- Settings -----------------------------------------------------------------------------------


@dataclass
class Config(dmash.Config):
    departures: str = dmash.option("", "names joined by +")

    def __post_init__(self):
        super().__post_init__()
        names = set(self.departures.split("+")) - {""}
        if "published" in names:
            names = names - {"published"} | set(PUBLISHED)
        for name in sorted(names - set(DEPARTURES)):
            raise dmash.BadInput(aib_envs.unknown("departure", name, ["published", *DEPARTURES]))
        self.names = names
        self.departures = "+".join(sorted(names))
        if names == set(PUBLISHED):
            self.departures = "published"
        self.into_eta = {loss for name in names & INTO_ETA.keys() for loss in INTO_ETA[name]}
        if self.into_eta and dmash.METHODS[self.method].hypernetwork != "shared":
            raise dmash.BadInput(f"{self.departures}: {self.method} has no shared hypernetwork")


def run_folder(cfg):
    folder = plain.run_folder(cfg)
    method = f"__{cfg.method}"
    if cfg.departures:
        folder = folder.with_name(folder.name.replace(method, f"{method}.{cfg.departures}", 1))
    return folder


# ---- Replay and rollout -------------------------------------------------------------------------


class Batch(dmash.Batch):
    """Has two attributes more. `discounts` (B,) is 0 where the return ends, else 1.

    `windows` is a function that reads another part of the same windows, (B, L, 2 d_s + d_a).
    """


class Replay(dmash.Replay):
    """Knows of each row whether it belongs to a warm-up, and whether an episode ends with it."""

    def __init__(self, c, capacity, *sizes):
        super().__init__(c, capacity, *sizes)
        self.names = set()  # until the rollout says which
        self.warm_ups = torch.zeros(capacity, dtype=torch.bool, device=c.device)
        self.ends = torch.zeros(capacity, dtype=torch.bool, device=c.device)

    def times(self):
        """When the transitions happened that a batch may hold."""
        oldest = max(0, self.t - self.capacity) + self.K
        times = torch.arange(self.t, device=self.rows.device)[oldest:]
        if "finished" in self.names:
            ends = times[self.ends[times % self.capacity]]
            times = times[times <= max(ends.tolist(), default=-1)]
        if "apart" in self.names:
            times = times[~self.warm_ups[times % self.capacity]]
        if len(times) == 0:
            raise dmash.BadInput("--random-steps: must fill an episode, so that there is a batch")
        return times

    def sample(self, size):
        times = self.times()
        n = torch.arange(self.N, device=self.rows.device).repeat_interleave(size // self.N)
        i = torch.randint(len(times), n.shape, device=self.rows.device)
        if "same_index" in self.names:
            of_context = i.view(self.N, -1)
            of_context[1:] = of_context[1:2]
        t = times[i]
        s, a, ds, r = self.rows[t % self.capacity, n].split([self.d_s, self.d_a, self.d_s, 1], -1)
        until = t + 1 if "included" in self.names else t
        windows = functools.partial(self.windows, n, until, noisy=True)
        batch = Batch(s, a, ds, r.squeeze(-1), windows(), self.c)
        batch.windows = windows
        batch.discounts = torch.ones_like(batch.r)
        if "terminal" in self.names:
            batch.discounts[self.ends[t % self.capacity]] = 0
        return batch


class Rollout(dmash.Rollout):
    def __init__(self, agent, envs, **options):
        super().__init__(agent, envs, **options)
        self.names = self.replay.names = agent.cfg.names
        self.warming_up = False
        if "same_start" in self.names:
            envs.rngs = [copy.deepcopy(envs.rngs[0]) for _ in envs.rngs]
        if "scaled" in self.names:
            ranges = [dim.train for dim in aib_envs.lookup(agent.cfg.env).context]
            low, high = self.tensor(np.array(ranges, dtype=np.float32).T)  # (d_c,) each
            self.replay.c = (2 * self.replay.c - low - high) / (high - low)

    def begin_episode(self, warm_up=True, random=False):
        noisy = self.noisy
        self.warming_up = True
        if "apart" in self.names:
            self.noisy = False
            warm_up = warm_up and not random
        super().begin_episode(warm_up, random)
        self.noisy = noisy
        self.warming_up = False

    def step(self, random=False):
        result = super().step(random)
        replay = self.replay
        row = (replay.t - 1) % replay.capacity
        replay.warm_ups[row] = self.warming_up
        replay.ends[row] = self.done and not self.warming_up
        return result


def evaluate(agent, cfg, contexts, rollouts=1, seed=None):
    """With same_start, one rollout after the other: in each, all instances start alike."""
    if "same_start" not in cfg.names:
        return plain.evaluate(agent, cfg, contexts, rollouts, seed)
    first = cfg.seed if seed is None else seed
    seeds = [first + i * 2**32 for i in range(rollouts)]
    results = [plain.evaluate(agent, cfg, contexts, 1, seed) for seed in seeds]
    returns, diverged = zip(*results)
    return np.hstack(returns), np.hstack(diverged)


# ---- Policy and update --------------------------------------------------------------------------


class Actor(dmash.Actor):
    """Draws the actions of dmash.Actor, and adds ε in their log-probability, if it is not 0."""

    epsilon = 0

    def sample(self, s, omega):
        if not self.epsilon:
            return super().sample(s, omega)
        mu, log_std = self(s, omega)
        noise = torch.randn_like(mu)
        a = (mu + log_std.exp() * noise).tanh()
        log_prob_u = -(noise**2) / 2 - log_std - math.log(2 * math.pi) / 2
        return a, (log_prob_u - torch.log(1 - a**2 + self.epsilon)).sum(-1)


class Agent(dmash.Agent):
    """Updates as dmash.Agent does, with the losses below in the place of those of dmash."""

    def __init__(self, cfg, *sizes):
        super().__init__(cfg, *sizes)
        self.names = cfg.names
        if "epsilon" in self.names:
            self.pi.epsilon = 1e-6
        for loss in cfg.into_eta:  # the same as an Adam of its own, which works weight by weight
            eta = {"params": list(self.h.parameters()), "lr": cfg.dynamics_lr}
            self.optimizers[loss].add_param_group(eta)

    def infer(self, tau, noisy, c=None):
        z, omega = super().infer(tau, noisy, c)
        if self.cfg.into_eta:
            self.z = z.detach()
        return z, omega

    def update(self, batch, step):
        mine = self.dynamics_loss, self.critic_loss, self.actor_loss, self.temperature_loss
        with replacing(mine):
            return super().update(batch, step)

    def omega_for(self, loss, omega, batch):
        """What π and Q get in the named loss."""
        if "fresh" in self.names:
            _, omega = self.infer(batch.windows(), noisy=True, c=batch.c)
        if loss in self.cfg.into_eta:
            return self.h(self.z)
        return omega.detach()

    def dynamics_loss(self, f, omega, batch):
        if "fresh" in self.names and self.method.beta:
            self.infer(batch.windows(), noisy=True)  # leaves another KL term
        return plain.dynamics_loss(f, omega, batch)

    def critic_loss(self, pi, Q, Q_target, alpha, omega, batch, gamma):
        omega = self.omega_for("critic", omega, batch)
        gamma = gamma * batch.discounts
        return plain.critic_loss(pi, Q, Q_target, alpha, omega, batch, gamma)

    def actor_loss(self, pi, Q, alpha, omega, batch):
        omega = self.omega_for("actor", omega, batch)
        self.actor_inputs = batch.s, omega.detach()
        if "through_pi" in self.names:
            Q = self.Q_of_constant
        return plain.actor_loss(pi, Q, alpha, omega, batch)

    def Q_of_constant(self, s, a, omega):
        return self.Q(s, a, omega.detach())

    def temperature_loss(self, log_alpha, log_prob, target_entropy):
        if "fresh" in self.names:
            with torch.no_grad():
                _, log_prob = self.pi.sample(*self.actor_inputs)
        return plain.temperature_loss(log_alpha, log_prob, target_entropy)


class Run(dmash.Run):
    def state_dict(self):
        replay = self.rollout.replay
        return super().state_dict() | {"warm_ups": replay.warm_ups, "ends": replay.ends}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        replay = self.rollout.replay
        replay.warm_ups[:] = state["warm_ups"]
        replay.ends[:] = state["ends"]


# ---- Command line -------------------------------------------------------------------------------


def departed():
    """In the block, dmash has the functions and classes of this file."""
    return replacing([Config, run_folder, Replay, Rollout, evaluate, Actor, Agent, Run])


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = dmash.build_parser()
    parser.prog, parser.description = "departures.py", __doc__
    parser.add_argument("--as", dest="departures", metavar="NAMES", help="such as terminal+fresh")

    def command():
        given = vars(parser.parse_args(argv))
        with departed():
            dmash.run_command(given)

    return dmash.exit_status("departures.py", command)


if __name__ == "__main__":
    sys.exit(main())
