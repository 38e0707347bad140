"""Do the differences between dmash.py and the published code change returns?

    python studies/departures.py --env cartpole_inv --method terminal --quick    one run; as long as one of dmash.py

The command line is dmash.py's, with --go-on, --resume and --eval, and seven methods more. Four are DMA*-SH but for one
thing, done as the published code does it (results/README.md, "Differences from the published code"):

    included    windows of the batch hold the transition to be predicted, as their last entry
    terminal    the time limit is a terminal state in the critics' target
    fresh       encoder and hypernetwork run again, with fresh masks, for the critics and for each step of the policy
    apart       warm-ups act by the mean action, without masks, and stay out of the replay (and of the column
                env_steps); none among random actions

The fifth tells what it is in actor_into_eta that does the harm: there the policy's loss reaches η through π and through
the critics, which it may flatter.

    through_pi  as actor_into_eta, but in the critics ω is a constant for the policy's loss

The last two tell whether the baselines that know the context suffer from its units, which the published code leaves as
they are (a string of .24 to .36 m beside a gravity of 8 to 12 m/s²).

    scaled_concat, scaled_da    as concat and da, with each number of the context from -1 to 1 over its train range

The run folder bears the method's name, so that `studies/compare.py report` sets it beside the others.
"""

import contextlib
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import aib_envs  # noqa: E402
import dmash  # noqa: E402

Replay, PLAIN_ACTOR_LOSS = dmash.Replay, dmash.actor_loss  # as they are, whatever stands in their place later


class IncludedReplay(dmash.Replay):
    later = 0

    def sample(self, size):
        self.later = 1
        batch = super().sample(size)
        self.later = 0
        return batch

    def windows(self, n, t, noisy):
        return super().windows(n, t + self.later, noisy)


class TerminalBatch(dmash.Batch):
    """A batch that knows where its transitions end: `goes_on` (B,), 0 at the time limit, else 1."""


class TerminalReplay(dmash.Replay):
    def sample(self, size):
        batch = TerminalBatch(*super().sample(size))
        batch.goes_on = ((self.sampled + 1) % self.period != 0).float()
        return batch

    def windows(self, n, t, noisy):
        self.sampled = t  # (B,)
        return super().windows(n, t, noisy)


class TerminalRollout(dmash.Rollout):
    def __init__(self, agent, envs, **options):
        super().__init__(agent, envs, **options)
        self.replay.period = agent.cfg.K + aib_envs.lookup(agent.cfg.env).horizon  # every episode with its warm-up


def terminal_critic_loss(pi, Q, Q_target, alpha, told, batch, gamma, plain=dmash.critic_loss):
    return plain(pi, Q, Q_target, alpha, told, batch, gamma * batch.goes_on)


def through_pi_actor_loss(pi, Q, alpha, told, batch):
    return PLAIN_ACTOR_LOSS(pi, lambda s, a, omega: Q(s, a, dmash.stop_gradient(omega)), alpha, told, batch)


class FreshAgent(dmash.Agent):
    def update(self, batch, step):
        self.batch = batch
        return super().update(batch, step)

    def reopened(self, loss, z, told):
        _, told, _ = self.tell(self.batch.tau, self.batch.c, noisy=True)
        return dmash.stop_gradient(told)


class ApartReplay(dmash.Replay):
    """Holds no warm-ups; `recent`, the last K transitions, which acting reads, does."""

    def __init__(self, c, capacity, d_s, d_a, K, L):
        super().__init__(c, capacity, d_s, d_a, K, L)
        self.recent, self.warm_up = Replay(c, K, d_s, d_a, K, L), False

    def add(self, *transition):
        self.recent.add(*transition)
        if not self.warm_up:
            super().add(*transition)

    def latest(self, noisy):
        return self.recent.latest(noisy)

    def state_dict(self):
        return super().state_dict() | {"recent": self.recent.state_dict()}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.recent.load_state_dict(state["recent"])


class ApartRollout(dmash.Rollout):
    def begin_episode(self, warm_up=True, random=False):
        noisy, self.noisy, self.replay.warm_up = self.noisy, False, True
        super().begin_episode(warm_up and not random)
        self.noisy, self.replay.warm_up = noisy, False


class ScaledRollout(dmash.Rollout):
    def __init__(self, agent, envs, **options):
        super().__init__(agent, envs, **options)
        ranges = [dim.train for dim in aib_envs.lookup(agent.cfg.env).context]
        low, high = self.tensor(np.array(ranges, dtype=np.float32).T)  # (d_c,) each
        self.replay.c = (2 * self.replay.c - low - high) / (high - low)


DEPARTURES = {  # what of dmash.py each replaces
    "included": {"Replay": IncludedReplay},
    "terminal": {"Replay": TerminalReplay, "Rollout": TerminalRollout, "critic_loss": terminal_critic_loss},
    "fresh": {"Agent": FreshAgent},
    "apart": {"Replay": ApartReplay, "Rollout": ApartRollout},
    "through_pi": {"actor_loss": through_pi_actor_loss},
    "scaled_concat": {"Rollout": ScaledRollout},
    "scaled_da": {"Rollout": ScaledRollout},
}
# the row of the table of methods, where it is not that of DMA*-SH
BASES = {"through_pi": "actor_into_eta", "scaled_concat": "concat", "scaled_da": "da"}
ROWS = {method: dmash.METHODS[base] for method, base in BASES.items()}


@contextlib.contextmanager
def departed(method):
    """dmash with the functions and classes of a departure, while the block runs."""
    dmash.METHODS.setdefault(method, ROWS.get(method, dmash.METHODS["dma_star_sh"])._replace(paper="departure"))
    before = {name: getattr(dmash, name) for name in DEPARTURES[method]}
    try:
        vars(dmash).update(DEPARTURES[method])
        yield
    finally:
        vars(dmash).update(before)


def method_of(words):
    """The departure asked for, by each word of the command line and the next; BadInput if there is none."""
    method = words.get("--method")
    if run := words.get("--resume") or words.get("--eval"):
        path = Path(run) / "policy.pt" if Path(run).is_dir() else Path(run)
        with dmash.reading(path):
            method = dmash.load(path)["settings"]["method"]
    if method not in DEPARTURES:
        raise dmash.BadInput(f"allowed: --method {', '.join(DEPARTURES)}, with settings, or a run of one of these")
    return method


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if {"-h", "--help"} & {*words}:
        print(__doc__)
        return 0
    try:
        method = method_of(dict(zip(words, words[1:])))
    except dmash.BadInput as error:
        print(f"departures.py: error: {error}", file=sys.stderr)
        return 2
    with departed(method):
        return dmash.main(argv)


if __name__ == "__main__":
    sys.exit(main())
