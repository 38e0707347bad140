"""Tests of studies/departures.py: each departure against what the published code does."""

import copy
import dataclasses
import itertools
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "studies")]
import departures  # noqa: E402

import aib_envs  # noqa: E402
import dmash  # noqa: E402

K, T = 24, 100  # of di_inv
SMALL = dict(env="di_inv", contexts=4, threads=1, hidden=8, hyper_hidden=8, bottleneck=4)


def trained(folder, steps=120, **settings):
    """A run past 150 random steps and 120 gradient steps, which lead over two resets.

    Then the time of each transition takes the place of its reward.
    """
    small = SMALL | dict(batch=64, subsample=1, encoder_hidden=8, seed=3)
    run = dmash.Run(dmash.Config(**small | settings), folder)
    for _ in range(150):
        run.rollout.collect(random=True)
    for _ in range(steps):
        run.gradient_step()
    replay = run.rollout.replay
    times = torch.arange(max(0, replay.t - replay.capacity), replay.t)
    replay.rows[times % replay.capacity, :, -1] = times.float().unsqueeze(-1)
    return run


@pytest.fixture
def departing(request, tmp_path):
    """A run; its parameter is a method, a dot, and departures."""
    method, names = request.param.split(".")
    with departures.departed():
        yield trained(tmp_path, method=method, departures=names)


def departs(*methods):
    return pytest.mark.parametrize("departing", methods, indirect=True)


@pytest.fixture
def noted(monkeypatch):
    """Lets a function note the arguments and the result of each call."""

    def note(owner, name):
        calls = []
        plain = getattr(owner, name)

        def noting(*args, **options):
            result = plain(*args, **options)
            calls.append((args, result))
            return result

        monkeypatch.setattr(owner, name, noting)
        return calls

    return note


@pytest.mark.parametrize("method", ["dma_star_sh", "dma_pearl", "concat"])
def test_without_a_departure_nothing_changes(method, tmp_path):
    plain = trained(tmp_path, method=method)
    with departures.departed():
        other = trained(tmp_path, method=method)
    assert type(other.agent) is departures.Agent
    assert torch.equal(other.rollout.replay.rows, plain.rollout.replay.rows)
    weights = plain.agent.state_dict()
    for name, weight in other.agent.state_dict().items():
        assert torch.equal(weight, weights[name]), name


@departs("dma_star_sh.included", "dma_star.published")
def test_included_windows_end_with_the_transition_itself(departing):
    replay = departing.rollout.replay
    batch = replay.sample(64)
    itself = torch.cat([batch.s, batch.a, batch.ds], -1).unsqueeze(1)  # windows are in any order
    assert (batch.tau == itself).all(-1).any(-1).all()
    last = replay.latest(False)[:, -1]
    assert torch.equal(last, replay.rows[replay.t - 1, :, :-1])  # acting knows no more


@departs("dma_star_sh.terminal", "concat.terminal+same_index")
def test_terminal_targets_end_where_episodes_end(departing):
    replay, agent = departing.rollout.replay, departing.agent
    before = copy.deepcopy(agent)
    batch = replay.sample(2048)
    ends = (batch.r == K + T - 1) | (batch.r == 2 * (K + T) - 1)
    assert 0 < ends.sum() < 200
    torch.manual_seed(0)
    found = agent.update(batch, 1)["critic_loss"]
    torch.manual_seed(0)
    _, omega = before.infer(batch.tau, True, batch.c)
    s2 = batch.s + batch.ds
    a2, log_prob = before.pi.sample(s2, omega)
    value = before.Q_target(s2, a2, omega).amin(1) - before.alpha * log_prob
    target = batch.r + 0.99 * value * ~ends
    errors = before.Q(batch.s, batch.a, omega) - target.unsqueeze(1)
    assert torch.allclose(found, errors.square().mean(0).sum())


@departs("dma_star_sh.fresh", "dma_star.published", "dma_pearl.fresh")
def test_fresh_draws_give_each_loss_a_code_of_its_own(departing, noted):
    agent, batch = departing.agent, departing.rollout.replay.sample(64)
    inferred = noted(agent, "infer")
    losses = [
        noted(departures.plain, f"{name}_loss") for name in ("critic", "actor", "temperature")
    ]
    agent.update(batch, 2)
    windows = [args[0] for args, _ in inferred]
    assert len(windows) == (5 if agent.method.kl else 4)  # one more for the KL term
    for one, other in itertools.combinations(windows, 2):
        assert not torch.equal(one, other)
        assert torch.equal(one.sort(1).values, other.sort(1).values)  # of the same windows
    critic, actor, temperature = losses
    used = [critic[0][0][4], actor[0][0][3], actor[1][0][3]]
    for (_, (_, omega)), found in zip(inferred[-3:], used):
        assert torch.equal(omega[0], found[0])
        assert not found[0].requires_grad
    for (_, (_, log_prob)), ((_, fresh, _), _) in zip(actor, temperature):
        assert not fresh.requires_grad
        assert not torch.allclose(log_prob, fresh)


@departs("dma_star_sh.apart", "dma_star.published")
def test_warm_ups_apart_fill_windows_but_no_batch(departing, noted):
    rollout, replay = departing.rollout, departing.rollout.replay
    # 150 random steps without a warm-up, the rest of that episode, then a warm-up and an episode
    assert replay.t == 150 + 120 + K
    episodes = {*range(K, 2 * T), *range(2 * T + K, replay.t)}
    if "finished" in rollout.names:
        episodes = set(range(K, 2 * T))
    assert set(replay.sample(4096).r.tolist()) == episodes
    n, first = torch.zeros(1, dtype=torch.long), torch.tensor([2 * T + K])
    warm_up = replay.rows[2 * T : 2 * T + K, 0, :-1]
    assert torch.equal(replay.windows(n, first, False)[0], warm_up)
    acted = noted(departing.agent, "act")
    rollout.begin_episode()
    rollout.step()
    assert [noisy for (_, _, noisy), _ in acted] == [False] * K + [True]
    rollout.begin_episode(random=True)
    assert len(acted) == K + 1
    assert replay.t == 150 + 120 + 2 * K + 1


@departs("dma_star.same_index", "dr.same_index", "dma_star_sh.published")
def test_same_index_draws_the_same_times_in_all_contexts_but_the_first(departing):
    times = departing.rollout.replay.sample(48).r.view(4, 12)
    assert torch.equal(times[1], times[2])
    assert torch.equal(times[1], times[3])
    assert not torch.equal(times[0], times[1])
    assert len(times.unique()) > 15


@departs("dma_star.same_start", "concat.published")
def test_same_start_in_training_and_evaluation(departing, noted):
    def starts_of(calls):
        starts = [s for _, s in calls]
        for s in starts:
            assert (s == s[0]).all()
        return {tuple(s[0]) for s in starts}

    resets = noted(aib_envs.VectorEnv, "reset")
    for _ in range(3):
        departing.rollout.reset()
    assert len(starts_of(resets)) == 3
    resets.clear()
    contexts = aib_envs.context_sets("di_inv", 4)["eval_out"]
    returns, diverged = dmash.evaluate(departing.agent, departing.cfg, contexts, rollouts=2)
    assert returns.shape == diverged.shape == (4, 2)
    assert len(starts_of(resets)) == 4  # a warm-up and an episode each
    first, _ = dmash.evaluate(departing.agent, departing.cfg, contexts)
    assert (first[:, 0] == returns[:, 0]).all()
    assert len(starts_of(resets)) == 4
    dmash.evaluate(departing.agent, departing.cfg, contexts, seed=4)
    assert len(starts_of(resets)) == 6


def test_a_ring_that_wraps_around(tmp_path):
    """The oldest rows are lost, and the marks with them."""
    names = "terminal+apart+finished"
    with departures.departed():
        run = trained(tmp_path, steps=400, method="dr", departures=names, buffer=300)
    replay = run.rollout.replay
    assert replay.t == 150 + 400 + 4 * K
    oldest = replay.t - 300 + K
    starts = 200 + K, 200 + T + 2 * K, 200 + 2 * T + 3 * K  # of the three finished episodes
    expected = [time for start in starts for time in range(start, start + T) if time >= oldest]
    assert replay.times().tolist() == expected
    batch = replay.sample(4096)
    ended = sum(batch.r == start + T - 1 for start in starts)
    assert torch.equal(batch.discounts, 1.0 - ended)
    assert ended.any()


@departs("dma_star_sh.epsilon")
def test_epsilon_in_the_log_probability(departing):
    agent, batch = departing.agent, departing.rollout.replay.sample(64)
    _, omega = agent.infer(batch.tau, False)
    s = 100 * batch.s  # where tanh saturates
    torch.manual_seed(0)
    a, log_prob = agent.pi.sample(s, omega)
    torch.manual_seed(0)
    mu, log_std = agent.pi(s, omega)
    normal = torch.distributions.Normal(mu, log_std.exp())
    u = normal.rsample()
    expected = (normal.log_prob(u) - torch.log(1 - u.tanh() ** 2 + 1e-6)).sum(-1)
    assert torch.allclose(a, u.tanh())
    assert torch.allclose(log_prob, expected, rtol=1e-4, atol=1e-4)


@departs(*(f"dma_star_sh.{name}" for name in departures.INTO_ETA))
def test_rl_losses_that_reach_eta_are_stepped_as_by_hand(departing):
    """An update with the policy against one by hand, in which each loss has an Adam of its own."""
    cfg = departing.cfg
    name, lr = cfg.departures, cfg.dynamics_lr
    agent = dmash.new_agent(cfg)  # its Adam begins with averages of zero
    hand = dmash.new_agent(dataclasses.replace(cfg, departures=""))
    for one in (agent, hand):
        one.load_state_dict(departing.agent.state_dict())
    batch = departing.rollout.replay.sample(64)
    torch.manual_seed(0)
    agent.update(batch, 2)

    into_eta = {"critic_into_eta": ["critic"], "both_into_eta": ["critic", "actor"]}
    into_eta = into_eta.get(name, ["actor"])
    adams = {loss: torch.optim.Adam(hand.h.parameters(), lr) for loss in into_eta}

    def minimise(name, loss):
        hand.zero_grad()
        loss.backward()
        hand.optimizers[name].step()
        if name in adams:
            adams[name].step()

    def omega_for(name):
        return hand.h(z) if name in adams else omega.detach()

    torch.manual_seed(0)
    z, omega = hand.infer(batch.tau, True)
    z = z.detach()
    minimise("dynamics", (hand.f(batch.s, batch.a, omega) - batch.ds).square().mean())
    networks = hand.pi, hand.Q, hand.Q_target, hand.alpha
    minimise("critic", dmash.critic_loss(*networks, omega_for("critic"), batch, 0.99))
    for _ in range(2):
        told = omega_for("actor")
        a, log_prob = hand.pi.sample(batch.s, told)
        for_critics = told.detach() if name == "through_pi" else told
        q = hand.Q(batch.s, a, for_critics).amin(1)
        minimise("actor", (hand.alpha * log_prob - q).mean())
        entropy_missing = log_prob.detach().mean() - 2
        minimise("temperature", -hand.log_alpha.exp() * entropy_missing)
    for (weight, found), expected in zip(agent.named_parameters(), hand.parameters()):
        if not weight.startswith("Q_target"):
            assert torch.allclose(found, expected, atol=1e-6), weight


@departs("concat.scaled", "da.scaled")
def test_scaled_contexts_span_one_in_training_and_more_beyond(departing, noted):
    c = departing.rollout.replay.sample(64).c
    assert c.amin(0).tolist() == [-1, -1]
    assert c.amax(0).tolist() == [1, 1]
    assert torch.equal(departing.rollout.step()[3], c)  # what acting is told
    low, high = aib_envs.MASS.train
    contexts = [{"mass": high, "action_factor": -1.0}, {"mass": low, "action_factor": 1.0}]
    contexts.append({"mass": high + (high - low), "action_factor": 1.0})
    acted = noted(departing.agent, "act")
    dmash.evaluate(departing.agent, departing.cfg, contexts)
    _, told, _ = acted[0][0]
    assert torch.allclose(told, torch.tensor([[1.0, -1], [-1, 1], [3, 1]]))


# ---- The command line ---------------------------------------------------------------------------


SHORT = [f"{dmash.flag(name)}={value}" for name, value in SMALL.items()]
SHORT += "--batch 16 --random-steps 130 --rollouts 1 --eval-every 2".split()


@pytest.mark.parametrize(
    "words, run",
    [
        ("--as both_into_eta+fresh", "dma_star_sh.both_into_eta+fresh"),
        ("--as scaled+epsilon --method da", "da.epsilon+scaled"),
        ("--as " + "+".join(reversed(departures.PUBLISHED)), "dma_star_sh.published"),
    ],
)
def test_a_departure_trains_goes_on_and_leaves_dmash_as_it_was(words, run, tmp_path, capsys):
    """A run in two parts, of which the second knows the checkpoint alone, against one in one."""
    before = dict(vars(dmash))
    command = [*SHORT, *words.split()]
    parts = tmp_path / f"di_inv__{run}__s1"
    whole = tmp_path / "whole" / parts.name
    assert departures.main([*command, "--steps=4", f"--out={whole.parent}"]) == 0
    assert departures.main([*command, "--steps=2", f"--out={tmp_path}"]) == 0
    for path in parts.iterdir():
        if path.name != "checkpoint.pt":
            path.unlink()
    assert departures.main([f"--resume={parts}", "--steps=4"]) == 0
    assert departures.main([*command, "--steps=4", f"--out={tmp_path}", "--go-on"]) == 0
    assert departures.main([f"--eval={parts}", "--rollouts=1"]) == 0
    assert f"di_inv, {run.partition('.')[0]}, seed 1, step 4, " in capsys.readouterr().out
    assert vars(dmash) == before
    weights = dmash.load(whole / "checkpoint.pt")["agent"]
    for name, weight in dmash.load(parts / "checkpoint.pt")["agent"].items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.parametrize(
    "words, message",
    [
        ("--as terminals --method dr", "unknown departure 'terminals' (did you mean terminal?)"),
        ("--as terminal --method drr", "unknown method 'drr'"),
        ("--as both_into_eta --method dma_star", "both_into_eta: dma_star has no shared hypern"),
        ("--as finished --random-steps=90", "--random-steps: must fill an episode"),
    ],
)
def test_bad_input_is_one_line(words, message, tmp_path, capsys):
    assert departures.main([*SHORT, f"--out={tmp_path}", *words.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith("departures.py: error: ")
    assert message in said
    assert said.count("\n") == 1
