"""Tests of studies/departures.py: each departure against what the published code does."""

import copy
import dataclasses
import itertools

import departures
import pytest
import torch
from untrained import SMALL, succeed

import aib_envs
import dmash

K, T = 24, 100  # of di_inv


def trained(folder, steps=120, **settings):
    """A run past 150 random steps and 120 gradient steps, which lead over two resets.

    Then the time of each transition takes the place of its reward.
    """
    small = SMALL | dict(env="di_inv", batch=64, subsample=1, seed=3, policy_average=0)
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


def assert_equal(found, expected):
    """Weights by name, bit for bit."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["dma_star_sh", "dma_pearl", "concat"])
def test_without_a_departure_nothing_changes(method, tmp_path):
    plain = trained(tmp_path, method=method)
    with departures.departed():
        other = trained(tmp_path, method=method)
    assert type(other.agent) is departures.Agent
    assert torch.equal(other.rollout.replay.rows, plain.rollout.replay.rows)
    assert_equal(other.agent.state_dict(), plain.agent.state_dict())


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
    agent, batch = departing.agent, departing.rollout.replay.sample(2048)
    before = copy.deepcopy(agent)
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
    critic = noted(departures.plain, "critic_loss")
    actor = noted(departures.plain, "actor_loss")
    temperature = noted(departures.plain, "temperature_loss")
    agent.update(batch, 2)
    windows = [tau for (tau, *_), _ in inferred]
    assert len(windows) == (5 if agent.method.beta else 4)  # one more for the KL term
    for one, other in itertools.combinations(windows, 2):
        assert not torch.equal(one, other)
        assert torch.equal(one.sort(1).values, other.sort(1).values)  # of the same windows
    used = [args[-3] for args, _ in critic] + [args[-2] for args, _ in actor]
    for (_, (_, omega)), found in zip(inferred[-3:], used, strict=True):
        assert torch.equal(omega[0], found[0])
        assert not found[0].requires_grad
    for (_, (_, log_prob)), ((_, fresh, _), _) in zip(actor, temperature, strict=True):
        assert not fresh.requires_grad
        assert not torch.allclose(log_prob, fresh)


@departs("dma_star_sh.apart")
def test_warm_ups_apart_fill_windows_but_no_batch(departing, noted):
    rollout, replay = departing.rollout, departing.rollout.replay
    # 150 random steps without a warm-up, the rest of that episode, then a warm-up and an episode
    assert replay.t == 150 + 120 + K
    episodes = {*range(K, 2 * T), *range(2 * T + K, replay.t)}
    assert set(replay.sample(4096).r.tolist()) == episodes
    window = replay.windows(torch.tensor([0]), torch.tensor([2 * T + K]), noisy=False)
    assert torch.equal(window[0], replay.rows[2 * T : 2 * T + K, 0, :-1])  # all of the warm-up
    acted = noted(departing.agent, "act")
    rollout.begin_episode()
    rollout.step()
    assert [noisy for (_, _, noisy), _ in acted] == [False] * K + [True]
    rollout.begin_episode(random=True)
    assert replay.t == 150 + 120 + 2 * K + 1


@departs("dma_star.same_index", "dr.same_index", "dma_star_sh.published")
def test_same_index_draws_the_same_times_in_all_contexts_but_the_first(departing):
    times = departing.rollout.replay.sample(48).r.view(4, 12)
    assert (times[1:] == times[1]).all()
    assert len(times.unique()) > 15  # more than the twelve of one context


@departs("dma_star.same_start", "concat.published")
def test_same_start_in_training_and_evaluation(departing, noted):
    def distinct_starts():
        for _, s in resets:
            assert (s == s[0]).all()
        return len({tuple(s[0]) for _, s in resets})

    resets = noted(aib_envs.VectorEnv, "reset")
    for _ in range(3):
        departing.rollout.reset()
    assert distinct_starts() == 3
    contexts = aib_envs.context_sets("di_inv", 4)["eval_out"]
    returns, diverged = dmash.evaluate(departing.agent, departing.cfg, contexts, rollouts=2)
    assert returns.shape == diverged.shape == (4, 2)
    assert distinct_starts() == 3 + 4  # a warm-up and an episode each
    first, _ = dmash.evaluate(departing.agent, departing.cfg, contexts)
    assert (first[:, 0] == returns[:, 0]).all()
    assert distinct_starts() == 3 + 4
    dmash.evaluate(departing.agent, departing.cfg, contexts, seed=4)
    assert distinct_starts() == 3 + 6


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
    name = cfg.departures
    agent = dmash.new_agent(cfg)  # its Adam begins with averages of zero
    hand = dmash.new_agent(dataclasses.replace(cfg, departures=""))
    for one in (agent, hand):
        one.load_state_dict(departing.agent.state_dict())
    batch = departing.rollout.replay.sample(64)
    torch.manual_seed(0)
    agent.update(batch, 2)

    into_eta = {"critic_into_eta": ["critic"], "both_into_eta": ["critic", "actor"]}
    into_eta = into_eta.get(name, ["actor"])
    adams = {loss: torch.optim.Adam(hand.h.parameters(), cfg.dynamics_lr) for loss in into_eta}

    def minimise(name, loss):
        hand.zero_grad()
        loss.backward()
        hand.optimizers[name].step()
        if name in adams:
            adams[name].step()

    def omega_for(name):
        return hand.h(z.detach()) if name in adams else omega.detach()

    torch.manual_seed(0)
    z, omega = hand.infer(batch.tau, True)
    minimise("dynamics", dmash.dynamics_loss(hand.f, omega, batch))
    networks = hand.pi, hand.Q, hand.Q_target, hand.alpha
    minimise("critic", dmash.critic_loss(*networks, omega_for("critic"), batch, 0.99))
    for _ in range(2):
        told = omega_for("actor")
        a, log_prob = hand.pi.sample(batch.s, told)
        for_critics = told.detach() if name == "through_pi" else told
        q = hand.Q(batch.s, a, for_critics).amin(1)
        minimise("actor", (hand.alpha * log_prob - q).mean())
        minimise("temperature", dmash.temperature_loss(hand.log_alpha, log_prob.detach(), -2))
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
    contexts = [
        {"mass": high, "action_factor": -1.0},
        {"mass": low, "action_factor": 1.0},
        {"mass": high + (high - low), "action_factor": 1.0},
    ]
    acted = noted(departing.agent, "act")
    dmash.evaluate(departing.agent, departing.cfg, contexts)
    (_, told, _), _ = acted[0]
    assert torch.allclose(told, torch.tensor([[1.0, -1], [-1, 1], [3, 1]]))


# ---- The command line ---------------------------------------------------------------------------


SHORT = [f"{dmash.flag(name)}={value}" for name, value in SMALL.items()]
SHORT += "--env di_inv --random-steps 130 --rollouts 1 --eval-every 2".split()


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
    succeed(departures, *command, "--steps=4", f"--out={whole.parent}")
    succeed(departures, *command, "--steps=2", f"--out={tmp_path}")
    for path in parts.iterdir():
        if path.name != "checkpoint.pt":
            path.unlink()
    succeed(departures, f"--resume={parts}", "--steps=4")
    succeed(departures, *command, "--steps=4", f"--out={tmp_path}", "--go-on")
    succeed(departures, f"--eval={parts}", "--rollouts=1")
    assert f"di_inv, {run.partition('.')[0]}, seed 1, step 4, " in capsys.readouterr().out
    assert vars(dmash) == before
    found = dmash.load(parts / "checkpoint.pt")["agent"]
    assert_equal(found, dmash.load(whole / "checkpoint.pt")["agent"])


@pytest.mark.parametrize(
    "words, message",
    [
        ("--as terminals --method dr", "unknown departure 'terminals' (did you mean terminal?)"),
        ("--as both_into_eta --method dma_star", "both_into_eta: dma_star has no shared hypern"),
        ("--as finished --random-steps=90", "--random-steps: must fill an episode"),
        ("--as apart --random-steps=5", "--random-steps: must fill an episode"),
    ],
)
def test_bad_input_is_one_line(words, message, tmp_path, capsys):
    assert departures.main([*SHORT, f"--out={tmp_path}", *words.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"departures.py: error: {message}")
    assert said.count("\n") == 1
