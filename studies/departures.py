"""Do the differences between dmash.py and the published code change returns?

    python studies/departures.py --env ode --method dma_star --as published --quick
    python studies/departures.py --env ode --method dma_star --as terminal+same_index --quick
    python studies/departures.py --resume runs/ode__dma_star.published__quick__s1

A run takes about as long as one of dmash.py, whose command line this is. `--as` names what is done as
the published code does it, for any method. Names are joined by +, and `published` stands for all:

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

The names are a setting of the run, `departures`, and stand in its folder's name, so that --resume and
--eval need nothing else, and studies/compare.py sets the run beside the others.

Two names more are no part of the published way. The first tells what does the harm in actor_into_eta.
There the policy's loss reaches η through π and through the critics, which it may flatter.

    through_pi   The policy's loss reaches η through π alone; with --method actor_into_eta.

The other tells whether the baselines that know the context suffer from its units. The published code
leaves these as they are: a string of .24 to .36 m beside a gravity of 8 to 12 m/s².

    scaled       A context's numbers go from -1 to 1 in training; with concat and da.
"""

import contextlib
import copy
import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import aib_envs  # noqa: E402
import dmash  # noqa: E402

PUBLISHED = (
    "included",
    "terminal",
    "fresh",
    "apart",
    "same_index",
    "same_start",
    "finished",
    "epsilon",
)
DEPARTURES = (*PUBLISHED, "through_pi", "scaled")

plain_critic_loss = dmash.critic_loss  # as they are, whatever stands in their place later
plain_actor_loss = dmash.actor_loss
plain_evaluate = dmash.evaluate


@dataclass
class Config(dmash.Config):
    departures: str = dmash.option("", "published, or names joined by +")

    @property
    def names(self):
        """A set of names of DEPARTURES."""
        if self.departures == "published":
            return set(PUBLISHED)
        return {name for name in self.departures.split("+") if name}

    @property
    def folder(self):
        plain = super().folder
        if not self.departures:
            return plain
        env, method, rest = plain.name.partition(f"__{self.method}__")
        return plain.with_name(f"{env}__{self.method}.{self.departures}__{rest}")


def joined(words):
    """The setting of a run for the words of --as; BadInput if one of them is no departure."""
    names = set(words.split("+"))
    if "published" in names:
        names = names - {"published"} | set(PUBLISHED)
    for name in names:
        if name not in DEPARTURES:
            raise dmash.BadInput(aib_envs.unknown("departure", name, ["published", *DEPARTURES]))
    if names == set(PUBLISHED):
        return "published"
    return "+".join(sorted(names))


class Batch(dmash.Batch):
    """Has three attributes more: `ends` (B,), whether an episode ends with the transition;
    `discounts` (B,), 0 where the return ends there, else 1; and `windows`, a function that reads
    another part of the same windows, (B, L, 2 d_s + d_a)."""


class Replay(dmash.Replay):
    """Knows of each row whether it belongs to a warm-up, and whether an episode ends with it."""

    def __init__(self, c, capacity, d_s, d_a, K, L):
        super().__init__(c, capacity, d_s, d_a, K, L)
        self.departures = set()  # until the rollout says which
        self.warm_ups = torch.zeros(capacity, dtype=torch.bool, device=c.device)
        self.ends = torch.zeros(capacity, dtype=torch.bool, device=c.device)

    def mark(self, warm_up, end):
        """Says what the last row is."""
        last = (self.t - 1) % self.capacity
        self.warm_ups[last] = warm_up
        self.ends[last] = end

    def times(self):
        """When the transitions happened that a batch may hold."""
        oldest = max(0, self.t - self.capacity) + self.K
        times = torch.arange(oldest, self.t, device=self.rows.device)
        if "finished" in self.departures:
            ends = times[self.ends[times % self.capacity]]
            times = times[times <= ends.max()] if len(ends) else ends
        if "apart" in self.departures:
            times = times[~self.warm_ups[times % self.capacity]]
        if len(times) == 0:
            raise dmash.BadInput("--random-steps: must fill an episode, so that there is a batch")
        return times

    def sample(self, size):
        times = self.times()
        n = torch.arange(self.N, device=self.rows.device).repeat_interleave(size // self.N)
        i = torch.randint(len(times), n.shape, device=self.rows.device)
        if "same_index" in self.departures:
            by_context = i.view(self.N, -1)
            by_context[1:] = by_context[1:2]
        t = times[i]
        rows = self.rows[t % self.capacity, n]
        s, a, ds, r = rows.split([self.d_s, self.d_a, self.d_s, 1], -1)
        later = 1 if "included" in self.departures else 0
        windows = functools.partial(self.windows, n, t + later, noisy=True)
        batch = Batch(s, a, ds, r.squeeze(-1), windows(), self.c)
        batch.windows = windows
        batch.ends = self.ends[t % self.capacity]
        batch.discounts = torch.ones_like(batch.r)
        if "terminal" in self.departures:
            batch.discounts[batch.ends] = 0
        return batch

    def state_dict(self):
        return super().state_dict() | {"warm_ups": self.warm_ups, "ends": self.ends}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.warm_ups[:] = state["warm_ups"]
        self.ends[:] = state["ends"]


class Rollout(dmash.Rollout):
    def __init__(self, agent, envs, **options):
        super().__init__(agent, envs, **options)
        self.departures = agent.cfg.names
        self.replay.departures = self.departures
        self.warming_up = False
        if "same_start" in self.departures:
            envs.rngs = [copy.deepcopy(envs.rngs[0]) for _ in envs.rngs]
        if "scaled" in self.departures:
            ranges = [dim.train for dim in aib_envs.lookup(agent.cfg.env).context]
            low, high = self.tensor(np.array(ranges, dtype=np.float32).T)  # (d_c,) each
            self.replay.c = (2 * self.replay.c - low - high) / (high - low)

    def begin_episode(self, warm_up=True, random=False):
        noisy = self.noisy
        self.warming_up = True
        if "apart" in self.departures:
            self.noisy = False
            warm_up = warm_up and not random
        super().begin_episode(warm_up, random)
        self.noisy = noisy
        self.warming_up = False

    def step(self, random=False):
        result = super().step(random)
        self.replay.mark(self.warming_up, self.done and not self.warming_up)
        return result


class FreshAgent(dmash.Agent):
    def update(self, batch, step):
        """As the plain one, but for the lines that draw anew."""
        cfg, pi, Q, Q_target, losses = self.cfg, self.pi, self.Q, self.Q_target, {}

        def tell():
            return self.tell(batch.windows(), batch.c, noisy=True)

        if self.f:
            z, told, kl = self.tell(batch.tau, batch.c, noisy=True)
            if self.method.kl:
                _, _, kl = tell()
            dynamics_loss = dmash.dynamics_loss(self.f, told, batch)
            loss = dynamics_loss * (1 + self.method.kl * kl)
            dmash.minimise(loss, self.optimizers["dynamics"])
            losses["dynamics_loss"] = dynamics_loss.detach()

        z, told, _ = tell()
        told = self.reopened("critic", dmash.stop_gradient(z), dmash.stop_gradient(told))
        loss = dmash.critic_loss(pi, Q, Q_target, self.alpha, told, batch, cfg.gamma)
        losses["critic_loss"] = dmash.minimise(loss, self.optimizers["critic"])

        for _ in range(2 if step % 2 == 0 else 0):
            z, told, _ = tell()
            told = self.reopened("actor", dmash.stop_gradient(z), dmash.stop_gradient(told))
            loss, _ = dmash.actor_loss(pi, Q, self.alpha, told, batch)
            losses["actor_loss"] = dmash.minimise(loss, self.optimizers["actor"])
            with torch.no_grad():
                _, logp = pi.sample(batch.s, told)
            loss = dmash.temperature_loss(self.log_alpha, logp, self.target_entropy)
            dmash.minimise(loss, self.optimizers["temperature"])
            if self.pi_average:
                dmash.average(self.pi_average, pi, cfg.policy_average)

        dmash.average(Q_target, Q, cfg.polyak)
        return losses | {"alpha": self.alpha}


class EpsilonActor(dmash.Actor):
    def sample(self, s, told):
        mu, log_std = self(s, told)
        noise = torch.randn_like(mu)
        a = (mu + log_std.exp() * noise).tanh()
        logp_u = -(noise**2) / 2 - log_std - math.log(2 * math.pi) / 2
        return a, (logp_u - torch.log(1 - a**2 + 1e-6)).sum(-1)


def critic_loss(pi, Q, Q_target, alpha, told, batch, gamma):
    return plain_critic_loss(pi, Q, Q_target, alpha, told, batch, gamma * batch.discounts)


def through_pi_actor_loss(pi, Q, alpha, told, batch):
    def Q_of_constant(s, a, omega):
        return Q(s, a, omega.detach())

    return plain_actor_loss(pi, Q_of_constant, alpha, told, batch)


def evaluate_from_same_start(agent, cfg, contexts, rollouts=1, seed=None, **options):
    """One rollout after the other, as all instances of a Rollout have the same initial states."""
    seed = cfg.seed if seed is None else seed
    results = []
    for i in range(rollouts):
        of_its_own = seed + i * 2**32  # no other run has it
        results.append(plain_evaluate(agent, cfg, contexts, 1, of_its_own, **options))
    returns, diverged = zip(*results)
    return np.concatenate(returns, 1), np.concatenate(diverged, 1)


@contextlib.contextmanager
def departed(departures):
    """dmash with the functions and classes of a run's departures, while the block runs."""
    names = Config(departures=departures).names
    instead = {"Config": Config, "Replay": Replay, "Rollout": Rollout}
    if "terminal" in names:
        instead["critic_loss"] = critic_loss
    if "fresh" in names:
        instead["Agent"] = FreshAgent
    if "same_start" in names:
        instead["evaluate"] = evaluate_from_same_start
    if "epsilon" in names:
        instead["Actor"] = EpsilonActor
    if "through_pi" in names:
        instead["actor_loss"] = through_pi_actor_loss
    before = {name: getattr(dmash, name) for name in instead}
    try:
        vars(dmash).update(instead)
        yield
    finally:
        vars(dmash).update(before)


def departures_of_run(path):
    """The setting in a run's checkpoint, or in a policy file."""
    path = Path(path)
    if path.is_dir():
        there = [path / name for name in ("checkpoint.pt", "policy.pt")]
        path = there[0] if there[0].exists() else there[1]
    with dmash.reading(path):
        return joined(dmash.load(path)["settings"]["departures"])


def build_parser():
    """Of the arguments that are read here; dmash.py reads the others."""
    parser = dmash.Parser("departures.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--as", dest="names")
    parser.add_argument("--resume")
    parser.add_argument("--eval")
    return parser


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        print(__doc__)
        return 0
    try:
        args, others = build_parser().parse_known_args(argv)
        run = args.resume or args.eval
        if run:
            departures = departures_of_run(run)
        elif args.names is None:
            allowed = ", ".join(["published", *DEPARTURES])
            raise dmash.BadInput(f"--as: required, one of {allowed}, or several joined by +")
        else:
            departures = joined(args.names)
            argv = [*others, "--departures", departures]
    except dmash.BadInput as error:
        print(f"departures.py: error: {error}", file=sys.stderr)
        return 2
    with departed(departures):
        return dmash.main(argv)


if __name__ == "__main__":
    sys.exit(main())
