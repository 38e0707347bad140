"""Tests of dmash.py and aib_envs.py: each compares with something computed another way (an oracle)."""

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from xml.etree import ElementTree

import gymnasium
import numpy as np
import pytest
import torch
import torch.nn as nn
from gymnasium.utils.env_checker import check_env
from torch.utils._pytree import tree_map_only

import aib_envs
import dmash

HERE = Path(__file__).parent
D_S, D_A, B, L = 5, 1, 12, 6


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small_config(**changes):
    """A fast but real configuration: DI, 4 contexts, every network at full size."""
    settings = dict(env="di_inv", contexts=4, batch=32, random_steps=60, steps=40, eval_every=20, rollouts=1, threads=1)
    return dmash.Config(**(settings | changes))


def small_arguments(out, **changes):
    cfg = small_config(**changes)
    names = ("env", "contexts", "batch", "random_steps", "steps", "eval_every", "rollouts", "threads", "seed", "K")
    return [text for name in names for text in (dmash.flag(name), str(getattr(cfg, name)))] + ["--out", str(out)]


def random_batch(B=B):
    return dmash.Batch(
        s=torch.randn(B, D_S),
        a=torch.rand(B, D_A) * 2 - 1,
        ds=torch.randn(B, D_S),
        r=torch.rand(B),
        tau=torch.randn(B, L, 2 * D_S + D_A),
    )


def random_omega(B=B, **options):
    return dmash.Omega(*(torch.randn(B, *shape, **options) / 8 for shape in dmash.Hypernetwork().shapes))


def small_agent(**changes):
    return dmash.Agent(small_config(**changes), D_S, D_A)


# ---------------------------------------------------------------------------------------------------------------
# Encoder
# ---------------------------------------------------------------------------------------------------------------


def test_avg_l1_norm_by_hand():
    x = torch.tensor([[1.0, -3.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(dmash.avg_l1_norm(x), torch.tensor([[0.5, -1.5, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]))


def test_sim_norm_by_hand():
    x = [0.0, 1.0, 2.0, 3.0, -1.0, -1.0, -1.0, 5.0]
    expected = []
    for group in (x[:4], x[4:]):
        total = sum(math.exp(v) for v in group)
        expected += [math.exp(v) / total for v in group]
    torch.testing.assert_close(dmash.sim_norm(torch.tensor([x]), 4), torch.tensor([expected]))


def test_masking_zeroes_whole_vectors_at_the_stated_rate():
    tau = torch.ones(400, 25, 2 * D_S + D_A)
    masked = dmash.mask_inputs(tau, D_S, D_A, 0.4)
    vectors = masked.split([D_S, D_A, D_S], -1)
    for vector in vectors:
        assert torch.equal(vector.amin(-1), vector.amax(-1))  # whole vectors, left as they are or zero
        assert abs((vector[..., 0] == 0).float().mean().item() - 0.4) < 0.02  # 4 standard errors
    both = ((vectors[0][..., 0] == 0) & (vectors[2][..., 0] == 0)).float().mean().item()
    assert abs(both - 0.16) < 0.02  # s and δs independently


def test_encoder_masks_in_training_mode_and_never_at_evaluation():
    g = dmash.ContextEncoder(D_S, D_A, mask=0.4)
    tau = torch.randn(B, L, 2 * D_S + D_A)
    assert torch.equal(g(tau, train=False), g(tau, train=False))
    assert not torch.equal(g(tau, train=True), g(tau, train=True))
    unmasked = dmash.ContextEncoder(D_S, D_A, mask=0.0)
    unmasked.load_state_dict(g.state_dict())
    torch.testing.assert_close(unmasked(tau, train=True), g(tau, train=False))


def test_encoder_equals_a_step_by_step_lstm():
    g = dmash.ContextEncoder(D_S, D_A)
    tau = torch.randn(B, L, 2 * D_S + D_A)
    cell = nn.LSTMCell(32, 32)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in g.lstm.state_dict().items()})
    h = c = torch.zeros(B, 32)
    for i in range(L):
        x = tau[:, i] @ g.embed.weight.T
        x = x / x.abs().mean(-1, keepdim=True)
        h, c = cell(x, (h, c))
    z = (h @ g.project.weight.T).reshape(B, 2, 4).softmax(-1).reshape(B, 8)
    torch.testing.assert_close(g(tau, train=False), z)


def test_subsampling_size_and_order():
    random = dmash.subsample(300, 24, 4, train=True)
    assert random.shape == (300, 4)
    assert all(len(set(row)) == 4 for row in random.tolist())  # without repetition
    assert torch.bincount(random.flatten(), minlength=24).min() > 20  # every position (50 expected)
    assert (random.diff() < 0).any() and (random.diff() > 0).any()  # in random order
    assert len({tuple(row) for row in random.tolist()}) > 290  # drawn per sample
    even = dmash.subsample(3, 24, 4, train=False)
    assert even.tolist() == [[0, 8, 15, 23]] * 3
    for K, L in ((128, 25), (24, 4), (7, 1), (1, 1)):
        i = dmash.subsample(1, K, L, train=False)[0]
        assert i.shape == (L,) and i.min() >= 0 and i.max() < K and (L == 1 or (i.diff() > 0).all())


def test_window_share_is_rounded_down():
    assert (dmash.Config(env="cartpole_inv").L, dmash.Config(env="di_inv").L) == (25, 4)


# ---------------------------------------------------------------------------------------------------------------
# Hypernetwork and adapter
# ---------------------------------------------------------------------------------------------------------------


def test_adapter_and_hypernetwork_equal_a_per_sample_loop():
    h, n = dmash.Hypernetwork(), 2
    z, x = torch.randn(B, 8, requires_grad=True), torch.randn(B, n, 256, requires_grad=True)
    weights = [z, x, *h.parameters()]

    fast = dmash.adapter(x, h(z))
    slow = torch.zeros(B, n, 256)
    for b in range(B):
        hidden = torch.cat([h.trunk(z[b]), torch.ones(1)])
        W_down, b_down, W_up, b_up = (
            (hidden @ head).reshape(shape) for head, shape in zip(h.heads, ((256, 32), (32,), (32, 256), (256,)))
        )
        for i in range(n):  # column form, as in Eq. 3
            slow[b, i] = W_up.T @ torch.relu(W_down.T @ x[b, i] + b_down) + b_up
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-6)
    direction = torch.randn_like(fast)
    for g_fast, g_slow in zip(
        torch.autograd.grad(fast, weights, direction), torch.autograd.grad(slow, weights, direction)
    ):
        torch.testing.assert_close(g_fast, g_slow, rtol=1e-3, atol=1e-5)


def test_hypernetwork_heads_start_as_pytorch_linear_layers():
    torch.manual_seed(0)
    head, linear = dmash.Hypernetwork().heads[0], nn.Linear(64, 256 * 32)
    for ours, theirs in ((head[:-1], linear.weight), (head[-1], linear.bias)):
        assert abs(ours.std() / theirs.std() - 1) < 0.05 and ours.abs().max() <= 1 / 8


def test_sizes_of_omega():
    assert [tuple(w.shape) for w in dmash.Hypernetwork()(torch.randn(3, 8))] == [
        (3, 256, 32),
        (3, 1, 32),
        (3, 32, 256),
        (3, 1, 256),
    ]


@pytest.mark.parametrize("n", [1, 2])
def test_adapted_network_equals_separate_networks(n):
    """Trunk without a last activation, skip connection, ReLU after the sum, head; every network its own weights."""
    net, omega, inputs = dmash.AdaptedNetwork(7, 3, n=n), random_omega(), torch.randn(B, 7)
    out = net(inputs, omega)
    assert out.shape == (n, B, 3)
    first, _, second = net.trunk
    for i in range(n):
        x = torch.relu(inputs @ first.weight[i] + first.bias[i]) @ second.weight[i] + second.bias[i]
        adapted = torch.relu(x + dmash.adapter(x.unsqueeze(1), omega).squeeze(1))
        torch.testing.assert_close(out[i], adapted @ net.head.weight[i] + net.head.bias[i], rtol=1e-4, atol=1e-5)
    if n == 2:
        assert not torch.equal(out[0], out[1])


def test_the_same_omega_modulates_all_three_users():
    agent, batch = small_agent(), random_batch()
    users = (
        lambda omega: agent.f(batch.s, batch.a, omega),
        lambda omega: agent.pi.mean(batch.s, omega),
        lambda omega: agent.Q(batch.s, batch.a, omega),
        lambda omega: agent.Q_target(batch.s, batch.a, omega),
    )
    omega, other = random_omega(), random_omega()
    for user in users:
        assert user(omega).shape[0] == B and not torch.allclose(user(omega), user(other))


# ---------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------


def test_log_probability_equals_torch_distributions():
    pi, s, omega = dmash.Actor(D_S, 3), torch.randn(B, D_S), random_omega()
    a, logp = pi.sample(s, omega)
    mu, log_std = pi(s, omega)
    assert a.abs().max() < 1 and log_std.min() > -5 and log_std.max() < 2
    transforms = [torch.distributions.transforms.TanhTransform()]
    oracle = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mu.double(), log_std.double().exp()), transforms
    )
    torch.testing.assert_close(logp.double(), oracle.log_prob(a.double()).sum(-1), rtol=1e-3, atol=1e-3)


def test_log_probability_stays_finite_where_tanh_saturates():
    pi, s, omega = dmash.Actor(D_S, 1), torch.randn(B, D_S), random_omega()
    with torch.no_grad():
        pi.head.bias[:] = torch.tensor([30.0, 0.0])  # mean 30: tanh is 1 in single precision
    a, logp = pi.sample(s, omega)
    assert torch.equal(a, torch.ones(B, 1)) and torch.isfinite(logp).all()


def test_dynamics_loss_is_the_mean_over_samples_and_dimensions():
    f, omega, batch = dmash.DynamicsModel(D_S, D_A), random_omega(), random_batch()
    predicted = f(batch.s, batch.a, omega)
    by_hand = sum((predicted[b, i] - batch.ds[b, i]) ** 2 for b in range(B) for i in range(D_S)) / (B * D_S)
    torch.testing.assert_close(dmash.dynamics_loss(f, omega, batch), by_hand)


def test_bellman_target_by_hand_and_through_the_time_limit():
    """The last transition of an episode, cut by the time limit, still bootstraps from the state it led to."""
    env = aib_envs.make("di_inv")
    s, _ = env.reset(seed=0)
    truncated = False
    while not truncated:
        last, a = s, env.action_space.sample()
        s, r, terminated, truncated, _ = env.step(a)
    assert env.t == 100 and not terminated
    replay = dmash.Replay(1, 10, 4, 2, K=1, L=1)
    replay.add(*(torch.tensor(x).unsqueeze(0) for x in (last, a, np.float32(r), s)))
    replay.add(*(torch.tensor(x).unsqueeze(0) for x in (last, a, np.float32(r), s)))
    batch = replay.sample(4)
    torch.testing.assert_close(batch.s2, torch.tensor(s).expand(4, -1))  # the state itself, not the next episode's

    pi, Q, Q_target, omega = dmash.Actor(4, 2), dmash.Critics(4, 2), dmash.Critics(4, 2), random_omega(4)
    alpha, gamma = torch.tensor(0.3), 0.9
    torch.manual_seed(5)
    loss = dmash.critic_loss(pi, Q, Q_target, alpha, omega, batch, gamma)
    torch.manual_seed(5)
    a2, logp = pi.sample(batch.s2, omega)
    q2, q, by_hand = Q_target(batch.s2, a2, omega), Q(batch.s, batch.a, omega), 0.0
    for b in range(4):
        y = batch.r[b] + gamma * (min(q2[b, 0], q2[b, 1]) - alpha * logp[b])
        by_hand += ((q[b, 0] - y) ** 2 + (q[b, 1] - y) ** 2) / 4
    torch.testing.assert_close(loss, by_hand)
    assert (loss - (q - batch.r.unsqueeze(-1)).square().mean(0).sum()).abs() > 1e-4  # not the terminal target


def test_actor_and_temperature_loss_by_hand():
    pi, Q, omega, batch = dmash.Actor(D_S, D_A), dmash.Critics(D_S, D_A), random_omega(), random_batch()
    torch.manual_seed(5)
    loss, logp = dmash.actor_loss(pi, Q, torch.tensor(0.3), omega, batch)
    torch.manual_seed(5)
    a, logp_again = pi.sample(batch.s, omega)
    q = Q(batch.s, a, omega)
    torch.testing.assert_close(loss, sum(0.3 * logp_again[b] - min(q[b]) for b in range(B)) / B)
    log_alpha = torch.tensor(-1.0, requires_grad=True)
    dmash.temperature_loss(log_alpha, logp, target_entropy=-1.0).backward()
    torch.testing.assert_close(log_alpha.grad, -math.exp(-1) * (logp.mean() - 1))
    assert not logp.requires_grad


# Rows: steps of Algorithm 2. Columns: the parameters that each changes. All others it leaves alone.
ROUTING = {
    "dynamics_step": {"φ", "η", "θ"},
    "critic_step": {"ζ"},
    "actor_step": {"ξ", "α"},
    "target_step": {"ζ target"},
}


def parameter_groups(agent):
    groups = {"φ": agent.g, "η": agent.h, "θ": agent.f, "ξ": agent.pi, "ζ": agent.Q, "ζ target": agent.Q_target}
    return {name: list(module.parameters()) for name, module in groups.items()} | {"α": [agent.log_alpha]}


@pytest.mark.parametrize("step", ROUTING)
def test_gradient_routing(step):
    agent, batch = small_agent(), random_batch()
    omega = agent.h(agent.g(batch.tau, train=True))  # with its graph: nothing but the losses stops the gradient
    agent.critic_step(batch, omega)  # so that the target critics have somewhere to move
    groups = parameter_groups(agent)
    before = {name: [p.detach().clone() for p in group] for name, group in groups.items()}
    arguments = {"dynamics_step": (batch,), "target_step": ()}.get(step, (batch, omega))
    getattr(agent, step)(*arguments)
    changed = {
        name for name, group in groups.items() if any(not torch.equal(p, q) for p, q in zip(group, before[name]))
    }
    assert changed == ROUTING[step]
    for name in changed:
        assert all(not torch.equal(p, q) for p, q in zip(groups[name], before[name])), f"part of {name} is untouched"


def test_rl_losses_see_omega_as_a_constant():
    """Eq. 2: with the whole graph of ω at hand, only Eq. 1 has a gradient for φ and η, and a non-zero one."""
    agent, batch = small_agent(), random_batch()
    omega = agent.h(agent.g(batch.tau, train=True))
    losses = {
        "dynamics": dmash.dynamics_loss(agent.f, omega, batch),
        "critic": dmash.critic_loss(agent.pi, agent.Q, agent.Q_target, agent.alpha, omega, batch, 0.99),
        "actor": dmash.actor_loss(agent.pi, agent.Q, agent.alpha, omega, batch)[0],
    }
    reaches = {"dynamics": {"φ", "η", "θ"}, "critic": {"ζ"}, "actor": {"ξ", "ζ"}}  # the actor's loss steps ξ only
    for name, loss in losses.items():
        for group, parameters in parameter_groups(agent).items():
            if group in ("ζ target", "α"):
                continue
            grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            if group in reaches[name]:
                assert all(g is not None for g in grads) and sum(g.abs().sum() for g in grads) > 0, (name, group)
            else:
                assert all(g is None for g in grads), (name, group)


def test_update_schedule():
    """The policy is updated at every second step, twice; the targets move by τ at every step."""
    agent, batch, calls = small_agent(), random_batch(), []
    original = agent.actor_opt.step
    agent.actor_opt.step = lambda *args: (calls.append(1), original(*args))
    before = [p.clone() for p in agent.Q_target.parameters()]
    for step in range(1, 6):
        losses = agent.update(batch, step)
        assert ("actor_loss" in losses) == (step % 2 == 0)
        if step == 1:
            for target, old, new in zip(agent.Q_target.parameters(), before, agent.Q.parameters()):
                torch.testing.assert_close(target, 0.995 * old + 0.005 * new)
    assert len(calls) == 4
    assert all(p.is_leaf and not p.requires_grad for p in agent.Q_target.parameters())  # else a graph grows with them


# ---------------------------------------------------------------------------------------------------------------
# Replay
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_windows_hold_past_transitions_of_their_own_context(seed):
    """Rows say which context and time they are from, over random sizes and wrap-around."""
    rng = np.random.default_rng(seed)
    N, K = int(rng.integers(1, 5)), int(rng.integers(1, 9))
    L, capacity = int(rng.integers(1, K + 1)), K + int(rng.integers(1, 30))
    replay = dmash.Replay(N, capacity, 1, 1, K, L)
    context = torch.arange(1.0, N + 1).unsqueeze(-1)
    total = int(rng.integers(K + 1, 3 * capacity + 2))
    for t in range(total):
        time = torch.full((N, 1), float(t))
        replay.add(context, time, time.squeeze(-1), 2 * context)  # s = context, a = r = time, δs = context
    batch = replay.sample(64 * N)
    assert (
        torch.equal(batch.s, batch.ds)
        and torch.equal(batch.a.squeeze(-1), batch.r)
        and torch.equal(batch.s2, 2 * batch.s)
    )
    assert sorted(batch.s.flatten().tolist()) == sorted(context.repeat(64, 1).flatten().tolist())  # equal shares
    assert (batch.tau[..., 0] == batch.s).all() and (batch.tau[..., 2] == batch.s).all()  # one context a window
    age = batch.a - batch.tau[..., 1]
    assert (age >= 1).all() and (age <= K).all()  # past, and not older than K: never the transition to predict
    assert batch.a.min() >= max(0, total - capacity) + K and batch.a.max() <= total - 1
    latest = replay.latest(train=False)
    assert torch.equal(latest[:, -1, 1] if L > 1 else latest[:, 0, 1] + K - 1, torch.full((N,), float(total - 1)))


class Clock:
    """Stands for a VectorEnv: observes [context, clock, episode], and ends episodes after random numbers of steps."""

    def __init__(self, N, rng):
        self.N, self.d_s, self.d_a, self.rng, self.clock, self.episode = N, 3, 1, rng, 0, 0

    def observe(self):
        return np.array([[1.0 + n, self.clock, self.episode] for n in range(self.N)], dtype=np.float32)

    def reset(self):
        self.episode, self.left = self.episode + 1, self.rng.integers(1, 12)
        return self.observe()

    def step(self, actions):
        self.clock, self.left = self.clock + 1, self.left - 1
        return self.observe(), np.zeros(self.N, dtype=np.float32), self.left <= 0


@pytest.mark.parametrize("seed", range(20))
def test_windows_over_random_episode_lengths(seed):
    """No transition spans a reset; windows do, and hold the K transitions before, over wrap-around."""
    rng = np.random.default_rng(seed)
    N, K = int(rng.integers(1, 4)), int(rng.integers(1, 9))
    replay = dmash.Replay(N, K + int(rng.integers(1, 40)), 3, 1, K, L=K)
    rollout = dmash.Rollout(None, Clock(N, rng), replay, train=True)
    for _ in range(int(rng.integers(K + 1, 100))):
        rollout.collect(random=True)
        assert torch.equal(rollout.s[:, 1], torch.full((N,), float(replay.t)))
    batch = replay.sample(40 * N)
    clock, ages = batch.s[:, 1:2], torch.arange(1.0, K + 1)
    assert torch.equal(batch.ds, torch.tensor([0.0, 1.0, 0.0]).expand_as(batch.ds))  # one step on, in one episode
    assert (batch.tau[..., 0] == batch.s[:, :1]).all()  # one context a window
    assert torch.equal((clock - batch.tau[..., 1]).sort().values, ages.expand(len(clock), K))
    latest = replay.latest(train=False)
    assert torch.equal(latest[..., 1], (replay.t - ages.flip(0)).expand(N, K))


def test_windows_before_the_first_transitions_are_zeros():
    replay = dmash.Replay(2, 8, 1, 1, K=4, L=4)
    assert torch.equal(replay.latest(train=False), torch.zeros(2, 4, 3))
    replay.add(torch.ones(2, 1), torch.ones(2, 1), torch.ones(2), torch.ones(2, 1))
    latest = replay.latest(train=False)
    assert (latest[:, :3] == 0).all() and (latest[:, 3, :2] == 1).all()


# ---------------------------------------------------------------------------------------------------------------
# Environments
# ---------------------------------------------------------------------------------------------------------------


def one_step(env, state, action):
    env.reset(seed=0, options={"state": np.array(state)})
    s2, r, terminated, truncated, info = env.step(np.array(action))
    assert not terminated and s2.dtype == np.float32
    return s2, r


def test_double_integrator_by_hand():
    env = aib_envs.make("di_inv", mass=0.5, action_factor=-1)
    s2, r = one_step(env, [0.5, -0.2, 0.3, -0.4], [0.6, -1.0])
    # p + .1 v with the old v; v + .1 * clip(-a) / .5
    np.testing.assert_allclose(s2, [0.53, -0.24, 0.3 - 0.12, -0.4 + 0.2], rtol=1e-6)
    assert r == 0.0
    s2, r = one_step(env, [0.1, 0.0, -0.5, 0.99], [0.0, -1.0])
    np.testing.assert_allclose(s2, [0.05, 0.099, -0.5, 1.0], rtol=1e-6)  # v is clipped at 1
    assert r == 0.0  # at distance .111
    assert one_step(env, [0.1, 0.0, -0.5, 0.0], [0.0, 0.0])[1] == 1.0
    assert one_step(env, [0.99, -0.99, 1.0, -1.0], [0.0, 0.0])[0][:2].tolist() == [1.0, -1.0]  # so is p


def test_ode_by_hand():
    env = aib_envs.make("ode", c0=2.0, c1=-3.0)
    s2, r = one_step(env, [0.4], [0.5, -0.25])
    # Re(2 a - 3 a^2), a = .5 - .25i: 2 * .5 - 3 * (.25 - .0625) = .4375
    np.testing.assert_allclose(s2, [0.4 + 0.004375], rtol=1e-6)
    assert r == 0.25
    tiers = [
        (0.04, 1.0),
        (0.06, 1 / 2),
        (0.15, 1 / 3),
        (0.3, 1 / 4),
        (1.5, 0.05),
        (2.5, 0.0),
        (-0.04, 1.0),
        (-19.9, 0.0),
    ]
    assert [one_step(env, [x], [0.0, 0.0])[1] for x, _ in tiers] == [r for _, r in tiers]
    assert one_step(aib_envs.make("ode", c0=10.0), [19.99], [1.0, 0.0])[0] == [20.0]


# (length, action_factor), state, action, next observation, reward: recorded from the reference environment
CARTPOLE_STEPS = [
    (
        (0.3, -1),
        [0.020060623, -0.226369539, -0.114903159, -0.458260721],
        [0.365500637],
        [0.018741977, 0.973478326, -0.228779257, -0.148820475, -0.43272457],
        0.952068559,
    ),
    (
        (0.3, -1),
        [-0.38143505, 0.92491718, -0.895787365, 4.749734228],
        [-0.893602041],
        [-0.389967147, 0.56302201, 0.826441901, -0.810602711, 4.820853938],
        0.351581873,
    ),
    (
        (0.1, -1),
        [0.133016017, -0.795044588, 1.014104593, -9.114582302],
        [-1.0],
        [0.143607365, 0.629184744, -0.777255787, 1.103803398, -9.933346505],
        0.323950889,
    ),
    (
        (0.1, -1),
        [0.439941131, -3.914023887, 1.382655654, -16.387327954],
        [1.0],
        [0.453406753, -0.593346556, 0.804947119, 1.310937102, -16.221964448],
        0.076792189,
    ),
    (
        (2.0, 1),
        [0.144087194, -0.018832602, 0.699281212, -0.262551213],
        [-0.901999884],
        [0.150640935, 0.999773199, -0.02129673, 0.611470225, -0.230612856],
        0.829719708,
    ),
    (
        (2.0, 1),
        [0.157871009, -0.029442524, 0.842420106, -0.304411392],
        [0.162232598],
        [0.166375333, 0.999471206, -0.032516269, 0.858448261, -0.311503998],
        0.982223626,
    ),
]


@pytest.mark.parametrize("context, state, action, s2, reward", CARTPOLE_STEPS)
def test_cartpole_reproduces_recorded_steps(context, state, action, s2, reward):
    env = aib_envs.make("cartpole_inv", length=context[0], action_factor=context[1])
    ours, r = one_step(env, state, action)
    np.testing.assert_allclose(ours, s2, atol=1e-6)
    assert abs(r - reward) < 1e-6


# ---- Oracles: the reference environments, with the context applied to their own models ----


def scale(element, attribute, *factors):
    values = [float(value) * factor for value, factor in zip(element.get(attribute).split(), factors)]
    element.set(attribute, " ".join(map(repr, values)))


def edit_cartpole(root, length, action_factor):
    scale(root.find(".//default[@class='pole']/geom"), "fromto", 0, 0, 0, 0, 0, 2 * length)


def edit_reacher(root, length, **actuators):
    for name in ("arm", "hand"):
        scale(root.find(f".//geom[@name='{name}']"), "fromto", 1, 1, 1, length, 1, 1)
    for name in ("hand", "finger"):
        scale(root.find(f".//body[@name='{name}']"), "pos", length, 1, 1)


def edit_cheetah(root, length, action_factor):
    for name in ("bthigh", "bshin", "bfoot", "fthigh", "fshin", "ffoot"):
        scale(root.find(f".//geom[@name='{name}']"), "pos", length, 1, length)
        scale(root.find(f".//geom[@name='{name}']"), "size", 1, length)
    for name in ("bshin", "bfoot", "fshin", "ffoot"):
        scale(root.find(f".//body[@name='{name}']"), "pos", length, 1, length)


def edit_ball_in_cup(root, gravity, distance):
    ElementTree.SubElement(root, "option", gravity=f"0 0 {-gravity!r}")
    root.find(".//spatial[@name='string']").set("range", f"0 {distance!r}")
    root.find(".//body[@name='ball']").set("pos", f"0 0 {0.2 + 0.3 - distance!r}")


def edit_walker(root, gravity, actuator_strength):
    root.find("./option").set("gravity", f"0 0 {-gravity!r}")
    for motor in root.findall("./actuator/motor"):
        scale(motor, "gear", actuator_strength)


# id: (dm_control module, task class and its arguments, substeps, edit of the XML)
DM_CONTROL = {
    "cartpole_inv": ("cartpole", "Balance", dict(swing_up=False, sparse=False), 1, edit_cartpole),
    "reacher_easy_inv": ("reacher", "Reacher", dict(target_size=0.05), 1, edit_reacher),
    "reacher_hard_inv": ("reacher", "Reacher", dict(target_size=0.015), 1, edit_reacher),
    "reacher_hard_perm": ("reacher", "Reacher", dict(target_size=0.015), 1, edit_reacher),
    "cheetah_inv": ("cheetah", "Cheetah", {}, 1, edit_cheetah),
    "ball_in_cup": ("ball_in_cup", "BallInCup", {}, 10, edit_ball_in_cup),
    "walker": ("walker", "PlanarWalker", dict(move_speed=1), 10, edit_walker),
}
GYMNASIUM = {"walker_gym": "Walker2d-v5", "hopper_gym": "Hopper-v5"}


class DmControl:
    """A dm_control task, one context."""

    def __init__(self, env_id, context):
        module, task, arguments, self.substeps, edit = DM_CONTROL[env_id]
        module = pytest.importorskip(f"dm_control.suite.{module}", reason="dm_control, the oracle, is not installed")
        xml, assets = module.get_model_and_assets()
        root = ElementTree.fromstring(xml)
        edit(root, **context)
        self.physics = module.Physics.from_xml_string(ElementTree.tostring(root), assets)
        self.task = getattr(module, task)(random=0, **arguments)
        self.context = context
        self.reset()

    def reset(self):
        with self.physics.reset_context():
            self.task.initialize_episode(self.physics)
        return self.state()

    def state(self):
        return self.physics.get_state().copy()

    def set_state(self, state, target=None):
        if target is not None:
            self.physics.named.model.geom_pos["target", ["x", "y"]] = target
        with self.physics.reset_context():
            self.physics.set_state(state)

    def step(self, action):
        action = action * self.context.get("action_factor", 1)
        self.task.before_step(action[::-1] if self.context.get("swap") else action, self.physics)
        self.physics.step(self.substeps)
        parts = self.task.get_observation(self.physics)
        order = ("height", "orientations", "velocity") if "orientations" in parts else parts
        return np.concatenate([np.ravel(parts[name]) for name in order]), self.task.get_reward(self.physics)


class GymnasiumOwn:
    """A locomotion environment of Gymnasium, one context."""

    def __init__(self, env_id, context):
        pytest.importorskip(
            "imageio", reason="imageio, without which Gymnasium's own MuJoCo tasks do not load, is missing"
        )
        self.env = gymnasium.make(GYMNASIUM[env_id], terminate_when_unhealthy=False).unwrapped
        self.env.model.opt.gravity[2] = -context["gravity"]
        self.env.model.actuator_gear[:] = self.env.model.actuator_gear * context["actuator_strength"]
        self.env.reset(seed=0)

    def reset(self):
        self.env.reset()
        return self.state()

    def state(self):
        return np.concatenate([self.env.data.qpos, self.env.data.qvel])

    def set_state(self, state, target=None):
        self.env.reset()
        self.env.set_state(state[: self.env.model.nq], state[self.env.model.nq :])

    def step(self, action):
        return self.env.step(action)[:2]


ORACLES = [*DM_CONTROL, *GYMNASIUM]


def oracle(env_id, context):
    return (DmControl if env_id in DM_CONTROL else GymnasiumOwn)(env_id, context)


def range_ends(env_id):
    """The default context, and every combination of the ends of train and extrapolation range."""
    dims = aib_envs.ENVS[env_id].context
    default = {dim.name: dim.default for dim in dims}
    ends = [dim.train + (dim.extrapolation or ()) for dim in dims]
    return [default] + [dict(zip(default, values)) for values in itertools.product(*ends)]


def largest_differences(env_id, steps=40):
    """Of observation, reward and state after single steps, from states along random episodes, in every context of
    `range_ends`; and the number of contexts."""
    worst, contexts = np.zeros(3), range_ends(env_id)
    for i, context in enumerate(contexts):
        rng, env, reference = np.random.default_rng(i), aib_envs.make(env_id, **context), oracle(env_id, context)
        env.reset(seed=i)
        task = env.unwrapped.task
        for k in range(steps):
            if k % 20 == 10:  # far from where an episode leads
                env.reset(options={"state": env.state() + rng.normal(size=task.state_size) * 0.1})
            state, target = env.state(), task.target[0].copy() if hasattr(task, "target") else None
            action = rng.uniform(-1, 1, task.d_a) if k % 3 else rng.choice([-1.0, 1.0], task.d_a)
            env.reset(options={"state": state} | ({} if target is None else {"target": target}))
            reference.set_state(state, target)
            _, r, *_ = env.step(action)
            s2, r2 = reference.step(action)
            s1 = task.observation()[0]
            pairs = ((s1, s2), (r, r2), (env.state(), reference.state()))
            worst = np.maximum(worst, [np.abs(np.subtract(x, y)).max() for x, y in pairs])
    return worst, len(contexts)


@pytest.mark.parametrize("env_id", ORACLES)
def test_steps_equal_the_reference(env_id):
    worst, _ = largest_differences(env_id)
    assert (worst < 1e-6).all(), worst


@pytest.mark.parametrize("env_id", ORACLES)
def test_resets_are_distributed_as_in_the_reference(env_id):
    """2,000 resets each: the Kolmogorov-Smirnov distance in each dimension of the state, and the support."""
    n, context = 2000, range_ends(env_id)[0]
    env, reference = aib_envs.make(env_id), oracle(env_id, context)
    env.reset(seed=0)
    ours, theirs = np.empty((n, env.task.state_size)), np.empty((n, env.task.state_size))
    for i in range(n):
        env.reset()
        ours[i], theirs[i] = env.state(), reference.reset()
    for x, y in zip(ours.T, theirs.T):
        grid = np.concatenate([x, y])
        distance = (
            np.abs(np.searchsorted(np.sort(x), grid, "right") - np.searchsorted(np.sort(y), grid, "right")).max() / n
        )
        assert distance < 1.95 * math.sqrt(2 / n)  # one in a thousand exceeds this by chance
        width = np.ptp(y)
        assert x.min() > y.min() - 0.15 * width - 1e-9 and x.max() < y.max() + 0.15 * width + 1e-9


def test_reacher_targets_lie_on_a_ring():
    env = aib_envs.make("reacher_easy_inv")
    env.reset(seed=0)
    targets = np.array([(env.reset(), env.task.target[0].copy())[1] for _ in range(2000)])
    radii = np.hypot(*targets.T)
    assert radii.min() >= 0.05 and radii.max() <= 0.2 and abs(np.median(radii) - 0.125) < 0.005
    assert np.abs(targets.mean(0)).max() < 0.01


@pytest.mark.parametrize("env_id", aib_envs.ENVS)
def test_every_context_dimension_changes_a_trajectory(env_id):
    def trajectory(**context):
        env = aib_envs.make(env_id, **context)
        env.reset(seed=3)
        rng = np.random.default_rng(0)
        return np.array([env.step(rng.uniform(-1, 1, env.action_space.shape))[0] for _ in range(30)])

    default = trajectory()
    for dim in aib_envs.ENVS[env_id].context:
        changed = trajectory(**{dim.name: next(value for value in dim.train if value != dim.default)})
        assert np.abs(changed - default).max() > 1e-3, dim.name
        np.testing.assert_array_equal(trajectory(**{dim.name: dim.default}), default)


@pytest.mark.parametrize("env_id", aib_envs.ENVS)
def test_environment_conventions(env_id):
    spec, env = aib_envs.ENVS[env_id], aib_envs.make(env_id)
    s, info = env.reset(seed=1)
    assert info["context"] == {dim.name: dim.default for dim in spec.context}
    first = s.copy()
    for t in range(1, spec.horizon + 1):
        s2, r, terminated, truncated, info = env.step(env.action_space.sample())
        assert env.observation_space.contains(s2) and np.isfinite(r) and (env_id.endswith("gym") or 0 <= r <= 1)
        assert not terminated and truncated == (t == spec.horizon)
    assert np.array_equal(s, first)  # an observation handed out is never written to again
    assert np.array_equal(env.reset(seed=1)[0], first)
    assert not np.array_equal(env.reset()[0], first)
    info["context"].clear()
    assert env.context


@pytest.mark.parametrize("env_id", aib_envs.ENVS)
def test_context_sets(env_id):
    spec, sets = aib_envs.ENVS[env_id], aib_envs.context_sets(env_id)
    assert list(sets) == ["train", "eval_in", "eval_out"] and all(len(contexts) == 20 for contexts in sets.values())
    assert sets == aib_envs.context_sets(env_id)
    seen = [tuple(context.values()) for contexts in sets.values() for context in contexts]
    assert len(set(seen)) == 60  # pairwise disjoint, no repetition
    for dim in spec.context:
        values = {name: np.array([context[dim.name] for context in contexts]) for name, contexts in sets.items()}
        if dim.binary:
            assert all(set(v) == set(dim.train) for v in values.values())
            assert all(abs(np.mean(v == dim.train[0]) - 0.5) <= 0.1 for v in values.values())
            continue
        (low, high), (far_low, far_high) = dim.train, dim.extrapolation
        margin = 0.01 * (high - low)
        assert values["train"].min() >= low and values["train"].max() <= high
        assert values["eval_in"].min() >= low + margin - 1e-9 and values["eval_in"].max() <= high - margin + 1e-9
        out = values["eval_out"]
        assert ((out <= low - margin + 1e-9) | (out >= high + margin - 1e-9)).all()
        assert out.min() >= far_low - 1e-9 and out.max() <= far_high + 1e-9
        assert (out < low).any() and (out > high).any()


def test_context_sets_by_hand():
    """Cartpole: 50 lengths x 2 signs, sorted, every 99/19-th entry."""
    sets = aib_envs.context_sets("cartpole_inv")
    mesh = [(length, sign) for length in np.linspace(0.3, 0.85, 50) for sign in (-1, 1)]
    for i, context in enumerate(sets["train"]):
        assert (context["length"], context["action_factor"]) == pytest.approx(mesh[int(i * 99 / 19 + 1e-9)])
    assert sets["eval_out"][0] == pytest.approx({"length": 0.1, "action_factor": -1})
    assert sets["eval_out"][-1] == pytest.approx({"length": 2.0, "action_factor": 1})


@pytest.mark.parametrize("env_id", aib_envs.ENVS)
def test_gymnasium_checker_passes_without_a_warning(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(f"aib/{env_id}-v0").unwrapped)


def test_gymnasium_make_and_make_vec():
    env = gymnasium.make("aib_envs:aib/cartpole_inv-v0", length=0.7, action_factor=-1)
    assert env.reset(seed=0)[1]["context"] == {"length": 0.7, "action_factor": -1.0}
    envs = gymnasium.make_vec("aib_envs:aib/di_inv-v0", num_envs=3, vectorization_mode="sync", mass=0.5)
    s, info = envs.reset(seed=0)
    assert s.shape == (3, 4) and envs.step(envs.action_space.sample())[0].shape == (3, 4)
    env.close(), env.close(), envs.close()


@pytest.mark.parametrize("env_id", aib_envs.ENVS)
def test_vector_env_equals_single_environments(env_id):
    """Same contexts and states, same steps, bit for bit; also after a context was built twice."""
    contexts = aib_envs.context_sets(env_id, n=4)["eval_out"]
    envs = aib_envs.VectorEnv(env_id, contexts, seed=0)
    envs.reset()
    singles = [aib_envs.make(env_id, **context) for context in contexts]
    for single, state, target in zip(singles, envs.task.state(), getattr(envs.task, "target", [None] * 4)):
        single.reset(options={"state": state} | ({} if target is None else {"target": target}))
    rng = np.random.default_rng(0)
    for _ in range(20):
        actions = rng.uniform(-1, 1, (4, envs.d_a))
        s2, r, done = envs.step(actions)
        for i, single in enumerate(singles):
            ours, reward, *_ = single.step(actions[i])
            np.testing.assert_array_equal(s2[i], ours)
            assert np.float32(reward) == r[i]
    assert s2.dtype == r.dtype == np.float32 and not done


@pytest.mark.parametrize("env_id", aib_envs.ENVS)
def test_context_switches_keep_the_state_or_rebuild(env_id):
    """set_context mid-episode goes on from the same state as a fresh environment of that context; reset rebuilds."""
    new = aib_envs.context_sets(env_id, n=2)["eval_out"][1]
    env, fresh = aib_envs.make(env_id), aib_envs.make(env_id, **new)
    env.reset(seed=0)
    action = np.full(env.action_space.shape, 0.5)
    for _ in range(5):
        env.step(action)
    state, t = env.state(), env.t
    env.set_context(**new)
    assert env.context == fresh.context and env.t == t
    np.testing.assert_array_equal(env.state(), state)
    target = getattr(env.task, "target", None)
    fresh.reset(options={"state": state} | ({} if target is None else {"target": target[0]}))
    np.testing.assert_array_equal(env.step(action)[0], fresh.step(action)[0])

    again = aib_envs.make(env_id)
    first, info = again.reset(seed=7, options={"context": new})
    assert info["context"] == fresh.context
    np.testing.assert_array_equal(first, fresh.reset(seed=7)[0])
    default = {dim.name: dim.default for dim in aib_envs.ENVS[env_id].context}
    back, _ = again.reset(seed=7, options={"context": default})
    np.testing.assert_array_equal(back, aib_envs.make(env_id).reset(seed=7)[0])


@pytest.mark.parametrize("env_id", [env_id for env_id in aib_envs.ENVS if not env_id.startswith("ode_")])
def test_observations_vary_and_pictures_are_drawn(env_id):
    """No constant element over an episode's start, no shared memory, and a picture that leaves the physics alone."""
    context = aib_envs.context_sets(env_id)["train"][6]
    env, twin = (
        gymnasium.make(f"aib/{env_id}-v0", render_mode=mode, **context).unwrapped for mode in ("rgb_array", None)
    )
    s, _ = env.reset(seed=3)
    twin.reset(seed=3)
    assert twin.render() is None
    seen, pictures, rng = [s], [], np.random.default_rng(0)
    for _ in range(60):
        action = rng.uniform(-1, 1, env.action_space.shape)
        pictures.append(env.render())
        seen.append(env.step(action)[0])
        np.testing.assert_array_equal(seen[-1], twin.step(action)[0])
    assert (np.ptp(seen, axis=0) > 0).all()
    assert not any(np.shares_memory(a, b) for a, b in zip(seen, seen[1:]))
    assert pictures[0].shape == (256, 256, 3) and pictures[0].dtype == np.uint8
    assert len(np.unique(pictures[0].reshape(-1, 3), axis=0)) > 1 and not np.array_equal(pictures[0], pictures[-1])


def test_inversion_and_permutation_by_context():
    """A flipped or swapped actuator does what the flipped or swapped action does without it."""
    rng = np.random.default_rng(0)
    for env_id, context in (
        ("di_inv", {"action_factor": -1}),
        ("cheetah_inv", {"action_factor": -1}),
        ("di_perm", {"swap": 1}),
        ("reacher_hard_perm", {"swap": 1}),
    ):
        plain, changed = aib_envs.make(env_id), aib_envs.make(env_id, **context)
        plain.reset(seed=0), changed.reset(seed=0)
        for _ in range(10):
            action = rng.uniform(-1, 1, plain.action_space.shape)
            same = -action if "action_factor" in context else action[::-1]
            np.testing.assert_array_equal(plain.step(action)[0], changed.step(same)[0])


def test_actuator_wrappers_on_any_environment():
    flipped, plain = aib_envs.ActuatorInversion(gymnasium.make("Pendulum-v1"), -1), gymnasium.make("Pendulum-v1")
    flipped.reset(seed=0), plain.reset(seed=0)
    np.testing.assert_array_equal(flipped.step(np.float32([0.7]))[0], plain.step(np.float32([-0.7]))[0])
    env = aib_envs.ActuatorInversion(aib_envs.make("di_inv"), [1, -1])
    swapped = aib_envs.ActuatorPermutation(aib_envs.make("di_inv"), [1, 0])
    plain = aib_envs.make("di_inv")
    for wrapped, same in ((env, [0.2, -0.8]), (swapped, [0.8, 0.2])):
        wrapped.reset(seed=0), plain.reset(seed=0)
        np.testing.assert_allclose(wrapped.step(np.array([0.2, 0.8]))[0], plain.step(np.array(same))[0], atol=1e-7)


BAD_CALLS = [
    (lambda: aib_envs.make("cartpole"), "unknown environment 'cartpole' (did you mean cartpole_inv?)"),
    (
        lambda: aib_envs.make("cartpole_inv", lenght=1),
        "unknown context of cartpole_inv 'lenght' (did you mean length?)",
    ),
    (lambda: aib_envs.make("cartpole_inv", length=0), "length=0: must be a finite number above 0"),
    (lambda: aib_envs.make("di_inv", mass=math.nan), "mass=nan: must be a finite number above 0"),
    (lambda: aib_envs.make("ode", c0="x"), "c0='x': must be a finite number"),
    (lambda: aib_envs.context_sets("ode", 0), "n=0: the number of contexts must be a whole number of at least 1"),
    (lambda: aib_envs.make("di_perm", swap=0.5), "swap=0.5: must be 0 or 1"),
    (lambda: aib_envs.make("reacher_easy_inv", length=-1), "length=-1: must be a finite number above 0"),
    (lambda: aib_envs.make("ball_in_cup", distance=1.2), "distance=1.2: must be a finite number above 0 and below 0.9"),
    (lambda: aib_envs.make("walker", gravity=math.inf), "gravity=inf: must be a finite number"),
    (lambda: aib_envs.make("di_inv", render_mode="human"), "render_mode 'human': must be None or 'rgb_array'"),
    (lambda: aib_envs.make("di_inv").reset(options={"stat": 1}), "unknown option 'stat' (did you mean state?)"),
    (lambda: aib_envs.make("di_inv").reset(options={"target": [1, 2]}), "target [1, 2]: must be 0 finite numbers"),
    (lambda: aib_envs.make("di_inv").set_context(mass=-1), "mass=-1: must be a finite number above 0"),
    (lambda: aib_envs.ActuatorInversion(aib_envs.make("di_inv"), [1, 2, 3]), "signs [1, 2, 3]: must be"),
    (
        lambda: aib_envs.ActuatorPermutation(aib_envs.make("di_inv"), [0, 0]),
        "order [0, 0]: must be a permutation of 0 ... 1",
    ),
    (lambda: aib_envs.make("ode").reset(options={"state": [1, 2]}), "state [1, 2]: must be 1 finite numbers"),
]


@pytest.mark.parametrize("call, message", BAD_CALLS)
def test_bad_values_name_what_is_allowed(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_step_before_reset_is_told():
    for call in (lambda env: env.step(np.zeros(2)), lambda env: env.set_context(mass=1)):
        with pytest.raises(gymnasium.error.ResetNeeded, match="call reset"):
            call(aib_envs.make("di_inv"))


@pytest.mark.parametrize("env_id", aib_envs.ENVS)
def test_bad_actions_leave_the_environment_unharmed(env_id):
    env, twin = aib_envs.make(env_id), aib_envs.make(env_id)
    env.reset(seed=0), twin.reset(seed=0)
    d_a = env.action_space.shape[0]
    good = np.full(d_a, 0.5)
    for bad in (np.zeros(d_a + 1), np.full(d_a, np.nan), np.full(d_a, np.inf), "left", None):
        with pytest.raises(ValueError, match="finite numbers"):
            env.step(bad)
    np.testing.assert_array_equal(env.step(good)[0], twin.step(good)[0])


# ---------------------------------------------------------------------------------------------------------------
# Acting and evaluation
# ---------------------------------------------------------------------------------------------------------------


class Recorder:
    """Stands for an Agent: notes what it is asked, acts with zeros."""

    def __init__(self, d_a):
        self.d_a, self.calls = d_a, []

    def act(self, s, tau, train):
        self.calls.append((s.clone(), tau.clone(), train))
        return torch.zeros(len(s), self.d_a)


@pytest.mark.parametrize("train", [True, False])
def test_warm_up_fills_the_window_then_resets(train):
    cfg = small_config(K=10)
    envs = aib_envs.VectorEnv("di_inv", [{}, {"mass": 0.5}], seed=0)
    agent = Recorder(envs.d_a)
    rollout = dmash.new_rollout(cfg, agent, envs, 200, train)
    rollout.begin_episode()
    assert len(agent.calls) == 10 and rollout.replay.t == 10 and not rollout.done
    assert (agent.calls[0][1] == 0).all()  # the window is empty at first
    corners = rollout.s[:, :2].abs()
    assert (corners >= 0.8).all() and (rollout.s[:, 2:] == 0).all()  # a fresh start
    rollout.step()
    assert all(call[2] is train for call in agent.calls)
    assert agent.calls[-1][1].abs().sum() > 0  # the window stays over the reset
    assert envs.t == 1  # warm-up steps do not count towards the horizon


@pytest.mark.parametrize("K", [99, 100])
def test_a_warm_up_as_long_as_an_episode_does_not_end_it(K):
    cfg = small_config(K=K, contexts=2)
    rollout = dmash.new_rollout(cfg, Recorder(2), aib_envs.VectorEnv("di_inv", [{}], seed=0), 300, train=False)
    rollout.begin_episode()
    steps = 0
    while not rollout.done:
        rollout.step()
        steps += 1
    assert steps == 100


def test_collecting_samples_and_evaluation_takes_the_mean():
    agent = small_agent()
    s, tau = torch.randn(3, D_S), torch.randn(3, L, 2 * D_S + D_A)
    mean = agent.act(s, tau, train=False)
    torch.testing.assert_close(mean, agent.pi.mean(s, agent.h(agent.g(tau, train=False))))
    assert torch.equal(mean, agent.act(s, tau, train=False))
    assert not torch.equal(agent.act(s, tau, train=True), agent.act(s, tau, train=True))


def test_evaluation_is_repeatable_and_leaves_the_generator_alone():
    cfg = small_config()
    agent, _ = dmash.start(cfg)
    generator = torch.get_rng_state()
    first = dmash.evaluate(agent, cfg, rollouts=2)
    assert first.shape == (3, 4) and np.isfinite(first).all()
    np.testing.assert_array_equal(dmash.evaluate(agent, cfg, rollouts=2), first)
    assert torch.equal(torch.get_rng_state(), generator)


def test_evaluation_sums_rewards_of_the_counted_episode_only(monkeypatch):
    """An agent that stays at rest, started within the goal: one reward a step, none from the warm-up."""
    monkeypatch.setattr(aib_envs.DoubleIntegrator, "initial_state", lambda self, i, rng: np.zeros(4))
    returns = dmash.evaluate(Recorder(2), small_config(), rollouts=1)
    np.testing.assert_array_equal(returns, np.full((3, 4), 100.0))


# ---------------------------------------------------------------------------------------------------------------
# Training and the command line
# ---------------------------------------------------------------------------------------------------------------


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def timeless(rows):
    return [{name: v for name, v in row.items() if name not in ("seconds", "steps_per_second")} for row in rows]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    assert dmash.main(small_arguments(out)) == 0
    return out / "di_inv__dma_star_sh__s1"


@pytest.fixture
def folder(run, tmp_path):
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(run, tmp_path / run.name))


def test_run_folder(run):
    assert {"config.json", "metrics.csv", "per_context.csv", "checkpoint.pt", "policy.pt"} <= {
        path.name for path in run.iterdir()
    }
    metrics, contexts = read(run / "metrics.csv"), read(run / "per_context.csv")
    losses = ["dynamics_loss", "critic_loss", "actor_loss", "alpha"]
    assert list(metrics[0]) == ["step", "env_steps", "seconds", "steps_per_second", *losses, *dmash.SETS]
    assert [row["step"] for row in metrics] == ["20", "40"]
    assert metrics[-1]["env_steps"] == str(4 * (24 + 60 + 40))  # the warm-up counts too
    assert list(contexts[0]) == ["step", "set", "index", "mass", "action_factor", "return"]
    assert len(contexts) == 2 * 3 * 4
    for name in dmash.SETS:
        returns = [float(row["return"]) for row in contexts if (row["step"], row["set"]) == ("40", name)]
        assert float(metrics[-1][name]) == pytest.approx(np.mean(returns), abs=1e-3)
    config = json.loads((run / "config.json").read_text())
    assert (config["method"], config["env"], config["K"], config["steps"]) == ("dma_star_sh", "di_inv", 24, 40)


def test_policy_holds_plain_state_dicts(run):
    state = torch.load(run / "policy.pt", weights_only=True)
    assert state["step"] == 40 and set(state) == {"g", "h", "f", "pi", "Q", "Q_target", "log_alpha", "step"}
    agent = dmash.Agent(small_config(), 4, 2)
    agent.load_state_dict(state)
    assert torch.equal(agent.h.heads[0], state["h"]["heads.0"])


def test_eval_reproduces_the_last_row_of_the_run(run, capsys):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert dmash.main(["--eval", str(run), "--rollouts", "1", "--threads", "1", "--per-context"]) == 0
    lines = capsys.readouterr().out.splitlines()
    last = read(run / "metrics.csv")[-1]
    assert lines[-1] == "AER over 4 contexts x 1 rollouts:  " + "  ".join(
        f"{name} {float(last[name]):.1f}" for name in dmash.SETS
    )
    assert len(lines) == 2 + 3 * 4 and "action_factor" in lines[0]
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}


def test_same_seed_same_metrics_bit_for_bit(run, tmp_path):
    assert dmash.main(small_arguments(tmp_path)) == 0
    assert same_run(tmp_path / run.name, run)


class StopAfter:
    """Stands for catch_signals and for its list: says stop after it was asked n times."""

    def __init__(self, n):
        self.left = n

    def __call__(self):
        return contextlib.nullcontext(self)

    def __bool__(self):
        self.left -= 1
        return self.left < 0


def same_run(ours, theirs):
    """Whether two finished run folders hold the same results, bit for bit and times aside."""
    states = [torch.load(folder / "policy.pt", weights_only=True) for folder in (ours, theirs)]
    return (
        timeless(read(ours / "metrics.csv")) == timeless(read(theirs / "metrics.csv"))
        and (ours / "per_context.csv").read_bytes() == (theirs / "per_context.csv").read_bytes()
        and all(
            torch.equal(states[0][net][k], states[1][net][k]) for net in dmash.Agent.NETWORKS for k in states[0][net]
        )
        and torch.equal(states[0]["log_alpha"], states[1]["log_alpha"])
    )


@pytest.mark.parametrize(
    "stops, step, evaluated",
    [
        ((30,), None, None),  # among the random steps: nothing to keep
        ((61,), 1, 0),
        ((80,), 20, 0),  # before an evaluation
        ((95,), 20, 0),  # in its warm-up
        ((130,), 20, 0),  # in the middle of it
        ((207,), 20, 20),  # after it
        ((67, 15, 129, 2), 24, 20),  # again and again
        ((300,), 40, 20),  # in the last evaluation
    ],
)
def test_a_stopped_and_resumed_run_equals_the_undisturbed_one(stops, step, evaluated, run, tmp_path, monkeypatch):
    """It asks 60 times in the random steps, 20 times in as many gradient steps, 1 + 24 + 102 times around and in an
    evaluation and its warm-up, and so on. An episode ends at step 40."""
    folder = tmp_path / run.name
    for i, stop in enumerate(stops):
        with monkeypatch.context() as patch:
            patch.setattr(dmash, "catch_signals", StopAfter(stop))
            assert dmash.main(["--resume", str(folder)] if i else small_arguments(tmp_path)) == 0
    if step is None:
        assert not (folder / "checkpoint.pt").exists()
    else:
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        assert (state["step"], state["evaluated"]) == (step, evaluated)
    assert dmash.main(["--resume", str(folder)]) == 0
    assert same_run(folder, run)


@pytest.mark.parametrize(
    "env_id", ["cartpole_inv", "reacher_easy_inv", "cheetah_inv", "ball_in_cup", "walker", "hopper_gym"]
)
def test_resuming_in_mid_episode_restores_the_physics(env_id, tmp_path, monkeypatch):
    arguments = dict(env=env_id, K=4, contexts=2, batch=4, random_steps=5, steps=30, eval_every=40)
    monkeypatch.setitem(aib_envs.ENVS, env_id, dataclasses.replace(aib_envs.ENVS[env_id], horizon=25))
    for name, stop in (("whole", 999), ("stopped", 14)):
        with monkeypatch.context() as patch:
            patch.setattr(dmash, "catch_signals", StopAfter(5 + stop))
            assert dmash.main(small_arguments(tmp_path / name, **arguments)) == 0
    folder = f"{env_id}__dma_star_sh__s1"
    assert dmash.main(["--resume", str(tmp_path / "stopped" / folder)]) == 0
    assert same_run(tmp_path / "whole" / folder, tmp_path / "stopped" / folder)


@pytest.mark.parametrize("torn", ["60,12", "1"])
def test_rows_after_the_checkpoint_are_written_again(torn, run, folder):
    """As after a kill between a row and its checkpoint, in the middle of a line."""
    os.replace(folder / "checkpoint.previous.pt", folder / "checkpoint.pt")  # of step 20
    with open(folder / "metrics.csv", "a") as file:
        file.write(torn)
    assert dmash.main(["--resume", str(folder)]) == 0
    assert same_run(folder, run)


def test_kills_before_the_first_checkpoint_start_afresh(run, folder):
    """Between the first row and its checkpoint; then, resumed, before the first row."""
    for path in folder.glob("checkpoint*"):
        path.unlink()
    for name in ("metrics.csv", "per_context.csv"):
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(line for line in lines if not line.startswith("40,")))
    dmash.resume_run(folder).lock.close()
    assert len((folder / "metrics.csv").read_text().splitlines()) == 1
    assert dmash.main(["--resume", str(folder)]) == 0
    assert same_run(folder, run)


def test_a_kill_between_the_two_moves_of_a_save_loses_nothing(run, folder):
    """The moment at which checkpoint.pt is on its way out and its successor not yet in."""
    os.remove(folder / "checkpoint.pt")
    (folder / "checkpoint.pt.partial").write_bytes(b"half")
    assert dmash.main(["--resume", str(folder)]) == 0
    assert same_run(folder, run)


def test_steps_may_be_raised_on_resume(folder, capsys):
    assert dmash.main(["--resume", str(folder), "--steps", "50"]) == 0
    assert [row["step"] for row in read(folder / "metrics.csv")] == ["20", "40", "50"]
    assert json.loads((folder / "config.json").read_text())["steps"] == 50
    capsys.readouterr()
    assert dmash.main(["--resume", str(folder), "--steps", "45"]) == 2
    assert "--steps 45: may only be raised on --resume, here from 50" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="signals of this kind are not sent on Windows")
def test_sigterm_saves_and_a_second_process_is_refused(run, tmp_path):
    command_line = [sys.executable, str(HERE / "dmash.py"), *small_arguments(tmp_path, steps=100_000)]
    process = subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / run.name
    assert process.stdout.readline() == f"{folder}: 60 random steps, then 100,000 gradient steps\n"
    assert process.stdout.readline().startswith("step 20 ")
    refused = command("--resume", folder)
    assert refused.returncode == 2 and refused.stderr == f"dmash.py: error: {folder} is in use by another process\n"
    process.terminate()
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0 and error == ""
    assert out.splitlines()[-1].endswith(f"to go on: python dmash.py --resume {folder}")
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] >= 20


def test_another_seed_gives_another_run(run, tmp_path):
    assert dmash.main(small_arguments(tmp_path, seed=2)) == 0
    assert timeless(read(tmp_path / "di_inv__dma_star_sh__s2" / "metrics.csv")) != timeless(read(run / "metrics.csv"))


def test_training_predicts_the_dynamics_and_reads_the_sign():
    """Dynamics steps on real transitions predict far better than 'nothing changes' does; fed with the code of the
    other actuator sign, the model predicts the opposite, which is worse than 'nothing changes'."""
    cfg = small_config(contexts=8, batch=64, hidden=64, bottleneck=8, dynamics_lr=1e-3, mask=0.0)
    agent, rollout = dmash.start(cfg)
    for _ in range(300):
        rollout.collect(random=True)
    losses = [agent.dynamics_step(rollout.replay.sample(cfg.batch))[0].item() for _ in range(800)]
    assert np.mean(losses[-20:]) < 0.1 * np.mean(losses[:5])
    batch = rollout.replay.sample(400)
    nothing = batch.ds.square().mean()
    sign = torch.tensor(rollout.envs.task.c["action_factor"].tolist()).repeat_interleave(50)
    with torch.no_grad():
        z = agent.g(batch.tau, train=False)
        right = dmash.dynamics_loss(agent.f, agent.h(z), batch)
        flipped = torch.where(sign.unsqueeze(-1) > 0, z[sign < 0].mean(0), z[sign > 0].mean(0))
        wrong = dmash.dynamics_loss(agent.f, agent.h(flipped), batch)
    assert right < 0.1 * nothing and wrong > nothing


def test_a_training_step_updates_every_network(run):
    """The short run took real gradient steps: its networks differ from the freshly seeded ones."""
    fresh, _ = dmash.start(small_config())
    trained = torch.load(run / "policy.pt", weights_only=True)
    for net in dmash.Agent.NETWORKS:
        for name, value in getattr(fresh, net).state_dict().items():
            assert not torch.equal(value, trained[net][name]), (net, name)


def test_plot_needs_no_more_than_the_run_folder(run, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, which is optional, is not installed")
    for name in ("config.json", "metrics.csv", "per_context.csv"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    assert dmash.plot(tmp_path) and (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def command(*arguments, code=None, cwd=HERE):
    script = ["-c", code] if code else [str(HERE / "dmash.py")]
    script = [sys.executable, *script, *map(str, arguments)]
    return subprocess.run(script, capture_output=True, text=True, cwd=cwd, timeout=300)


def test_command_line_end_to_end_without_matplotlib_and_tqdm(tmp_path):
    """As a script in a process of its own, in which both optional packages are missing."""
    code = "import sys; sys.modules['matplotlib'] = sys.modules['tqdm'] = None; import dmash; sys.exit(dmash.main())"
    done = command(*small_arguments(tmp_path, steps=4, eval_every=2), code=code)
    assert done.returncode == 0 and done.stderr == ""
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:3]] == [["step", "2"], ["step", "4"]]
    assert "curve.png" not in done.stdout
    again = command(*small_arguments(tmp_path, steps=4, eval_every=2))
    assert again.returncode == 2 and "already holds this run" in again.stderr  # nothing is overwritten
    assert len(read(tmp_path / "di_inv__dma_star_sh__s1" / "metrics.csv")) == 2


@pytest.mark.parametrize("env_id", [env_id for env_id in aib_envs.ENVS if not env_id.startswith("ode_")] + ["ode_20"])
def test_every_environment_trains_end_to_end(env_id, tmp_path, monkeypatch):
    """The whole command on every id, with episodes of 12 steps."""
    spec = aib_envs.ENVS[env_id]
    monkeypatch.setitem(aib_envs.ENVS, env_id, dataclasses.replace(spec, horizon=12))
    assert (
        dmash.main(
            small_arguments(tmp_path, env=env_id, K=6, contexts=2, random_steps=3, steps=2, eval_every=1) + ["--K", "6"]
        )
        == 0
    )
    folder = tmp_path / f"{env_id}__dma_star_sh__s1"
    assert all(np.isfinite([float(row[name]) for name in dmash.SETS]).all() for row in read(folder / "metrics.csv"))
    assert list(read(folder / "per_context.csv")[0]) == [
        "step",
        "set",
        "index",
        *(dim.name for dim in spec.context),
        "return",
    ]


def test_list_envs(capsys):
    assert dmash.main(["--list-envs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["id", *aib_envs.ENVS]
    assert lines[5].split()[:6] == ["cartpole_inv", "Cartpole", "non-overlapping", "1000", "128", "100000"]
    assert lines[5].endswith("length 0.5, [0.3, 0.85], [0.1, 2]; action_factor in {-1, 1}")


def test_importing_has_no_side_effect(tmp_path):
    """Beyond what the libraries do by themselves: no environment variable, file, seed, output or renderer."""
    code = """if True:
        import os, random, sys
        import gymnasium, mujoco, numpy, torch
        def world():
            return (dict(os.environ), os.listdir(), random.getstate(), str(numpy.random.get_state()),
                    torch.get_rng_state().tolist(), torch.get_num_threads(), set(sys.modules))
        *before, modules = world()
        sys.path.insert(0, sys.argv[1])
        import aib_envs, dmash
        *after, new = world()
        assert before == after
        assert not any(name.split('.')[0] in ('matplotlib', 'OpenGL', 'glfw', 'tqdm') for name in new - modules)"""
    done = command(HERE, code=code, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stderr


def test_benchmark_prints_every_phase(capsys):
    assert dmash.main("--benchmark --env di_inv --contexts 4 --batch 16 --threads 1".split()) == 0
    out = capsys.readouterr().out
    for word in (
        "gradient acting environments batch dynamics critic actor targets rest vector peak update matrix ratio".split()
    ):
        assert any(line.split()[0] == word for line in out.splitlines()), word


def test_whole_numbers_may_be_written_with_an_exponent():
    settings = dmash.build_parser().parse_args(["--steps", "1e5", "--seed", "4294967295"])
    assert (settings.steps, settings.seed) == (100_000, 4294967295)


def test_help_names_every_setting():
    done = command("--help")
    assert done.returncode == 0
    assert all(dmash.flag(name) in done.stdout for name in dmash.Config.__dataclass_fields__)


BAD_COMMANDS = [
    ("--env cartpole", "unknown environment 'cartpole' (did you mean cartpole_inv?)"),
    ("--env nonsense", "unknown environment 'nonsense'; known: di_inv, di_friction, di_perm, ode, cartpole_inv, "),
    ("--stepz 5", "unknown argument '--stepz' (did you mean --steps?)"),
    ("extra", "unknown argument 'extra'"),
    ("--steps 0", "--steps 0: must be in [1, 1e9]"),
    ("--steps -5", "--steps -5: must be in [1, 1e9]"),
    ("--steps 1.5", "'1.5': must be a whole number in [1, 1e9]"),
    ("--steps many", "'many': must be a whole number in [1, 1e9]"),
    ("--steps", "expected one argument"),
    ("--seed -1", "--seed -1: must be in [0, 4294967295]"),
    ("--gamma 1.5", "--gamma 1.5: must be in [0, 1]"),
    ("--gamma nan", "--gamma nan: must be in [0, 1]"),
    ("--tau 0", "--tau 0.0: must be in (0, 1]"),
    ("--mask -0.1", "--mask -0.1: must be in [0, 1]"),
    ("--subsample 0", "--subsample 0.0: must be in (0, 1]"),
    ("--critic-lr 0", "--critic-lr 0.0: must be in (0, 1]"),
    ("--actor-lr inf", "--actor-lr inf: must be in (0, 1]"),
    ("--K 0", "--K 0: must be in [1, 1e6]"),
    ("--env di_inv --K 101", "--K 101: must be at most the horizon, 100 for di_inv"),
    ("--buffer 128", "--buffer 128: must be more than --K, here 128"),
    ("--batch 19", "--batch 19: must be at least --contexts, here 20"),
    ("--d-z 6", "--d-z 6: must be a multiple of --simnorm-group, here 4"),
    ("--log-std-min 3", "--log-std-min 3.0: must be below --log-std-max, here 2.0"),
    ("--threads 0", "--threads 0: must be in [1, 1024]"),
    ("--device gpu", "--device gpu: not usable here; allowed: cpu"),
    ("--per-context", "--per-context: allowed only with --eval RUN_FOLDER"),
    ("--eval nowhere", "--eval nowhere: no run folder"),
    ("--eval nowhere --steps 5", "--steps: not with --eval"),
    ("--eval nowhere --benchmark", "not allowed with argument --eval"),
    ("--eval nowhere --resume elsewhere", "not allowed with argument --eval"),
    ("--resume nowhere", "--resume nowhere: no run folder"),
    ("--resume nowhere --seed 3", "--seed: not with --resume, which allows --steps"),
    ("--device meta", "--device meta: not usable here; allowed: cpu"),
    ("--out /dev/null", "--out /dev/null: cannot write"),
    ("--env", "expected one argument"),
    ("--env ode_21", "unknown environment 'ode_21' (did you mean ode_2?)"),
    ("--steps 1e-3", "'1e-3': must be a whole number in [1, 1e9]"),
    ("--steps inf", "'inf': must be a whole number in [1, 1e9]"),
    ("--steps 10000000000", "--steps 10000000000: must be in [1, 1e9]"),
    ("--seed one", "'one': must be a whole number in [0, 4294967295]"),
    ("--seed 4294967296", "--seed 4294967296: must be in [0, 4294967295]"),
    ("--contexts 0", "--contexts 0: must be in [1, 1000]"),
    ("--eval-every 0", "--eval-every 0: must be in [1, 1e9]"),
    ("--rollouts 0", "--rollouts 0: must be in [1, 1000]"),
    ("--mask 1.01", "--mask 1.01: must be in [0, 1]"),
    ("--mask half", "'half': must be a number in [0, 1]"),
    ("--subsample 1.1", "--subsample 1.1: must be in (0, 1]"),
    ("--dynamics-lr -1", "--dynamics-lr -1.0: must be in (0, 1]"),
    ("--actor-every 0", "--actor-every 0: must be in [1, 1000]"),
    (
        "--env di_inv --contexts 1000 --batch 1000 --buffer 1000000000 --steps 1 --random-steps 30",
        "not enough memory for these settings",
    ),
    ("--eval=", "--eval .: no run folder"),
    ("--resume=", "--resume .: no run folder"),
    ("--list-envs --gamma 0.9", "--gamma: not with --list-envs, which allows nothing else"),
    ("--benchmark --steps 5", "--steps: not with --benchmark, which allows --env, --seed, --device, --threads, "),
    ("--hidden 100000", "--hidden 100000: must be in [1, 10000]"),
    ("--log-std-max nan", "--log-std-max nan: must be in (-inf, inf)"),
    ("--list-envs --benchmark", "not allowed with argument --list-envs"),
    ("--resume nowhere --per-context", "--per-context: allowed only with --eval RUN_FOLDER"),
    ("--device cuda:99", "--device cuda:99: not usable here; allowed: cpu"),
]


@pytest.mark.parametrize("arguments, message", BAD_COMMANDS)
def test_bad_input_gets_one_line_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert dmash.main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("dmash.py: error: ") and message in captured.err
    assert not list(tmp_path.iterdir())


DAMAGES = [
    ("policy.pt", lambda data: data[: len(data) // 2], "policy.pt cannot be read"),
    ("policy.pt", lambda data: b"", "policy.pt cannot be read"),
    ("policy.pt", None, "no policy.pt"),
    ("config.json", lambda data: data[:20], "config.json cannot be read"),
    ("config.json", lambda data: b"[1]", "config.json cannot be read"),
    ("config.json", lambda data: data.replace(b'"gamma": 0.99', b'"gamma": 7'), "--gamma 7: must be in [0, 1]"),
    ("config.json", lambda data: data.replace(b'"gamma"', b'"gamme"'), "config.json cannot be read"),
    ("config.json", lambda data: data.replace(b'"di_inv"', b"[1]"), "unknown environment '[1]'; known: "),
    ("config.json", lambda data: data.replace(b'"hidden": 256', b'"hidden": 128'), "policy.pt cannot be read"),
    ("config.json", None, "no run folder"),
]


@pytest.mark.parametrize("name, damage, message", DAMAGES)
def test_damaged_run_folders_are_named_as_such(name, damage, message, folder, capsys):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(damage(data)) if damage else os.remove(folder / name)
    assert dmash.main(["--eval", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error, error


# ---------------------------------------------------------------------------------------------------------------
# Faults: kills, full disks, damaged files, numbers that go wrong
# ---------------------------------------------------------------------------------------------------------------


def in_child(arguments, seconds=None):
    """The command in a forked process, killed after so many seconds. Returns its status, or minus the signal."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(dmash.main(arguments))
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def survive_kills(out, kills):
    """Kills as many short runs, each at a random time, and resumes each to its end. Returns for each what it had
    written when it was killed (the last row's step, or None) and whether all that and the end equal an undisturbed run.
    """
    sys.modules["matplotlib"] = None  # what is imported late would be most of the time
    dmash.start(small_config())
    aib_envs.ENVS["di_inv"] = dataclasses.replace(aib_envs.ENVS["di_inv"], horizon=20)
    settings = dict(steps=24, eval_every=3, random_steps=30, K=8)
    name, rng, found = "di_inv__dma_star_sh__s1", np.random.default_rng(0), []
    begin = time.perf_counter()
    assert in_child(small_arguments(out / "undisturbed", **settings)) == 0
    duration, whole = time.perf_counter() - begin, out / "undisturbed" / name
    for kill in range(kills):
        arguments, folder = small_arguments(out / str(kill), **settings), out / str(kill) / name
        status = in_child(arguments, duration * rng.random())
        rows = timeless(read(folder / "metrics.csv")) if (folder / "metrics.csv").exists() else []
        kept = rows == timeless(read(whole / "metrics.csv"))[: len(rows)]
        for path in folder.glob("*.pt"):
            dmash.load(path, "cpu")  # raises if it is damaged
        if status == -signal.SIGKILL:
            begun = (folder / "config.json").exists()
            status = in_child(["--resume", str(folder)] if begun else arguments)
        found.append((rows[-1]["step"] if rows else None, kept and status == 0 and same_run(folder, whole)))
        shutil.rmtree(folder)
    return found


def kill_twenty(out):
    """What survive_kills returns, from a process of its own, where torch has started no threads yet and a fork is safe:
    each kill then costs a fork, not an import of torch."""
    code = "import sys; from test_dmash import *; print(json.dumps(survive_kills(Path(sys.argv[1]), 20)))"
    done = command(out, code=code)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills are tried where processes can be forked")
def test_runs_killed_at_random_times_resume_to_the_same_end(tmp_path):
    found = kill_twenty(tmp_path)
    assert len(found) == 20 and all(same for _, same in found), found
    assert len({step for step, _ in found}) >= 5, found  # they did hit at different times


@pytest.mark.skipif(os.name == "nt", reason="this limit is not known to Windows")
@pytest.mark.parametrize("file, limit", [("policy.pt", 10_000), ("checkpoint.pt", None)])
def test_a_full_disk_stops_the_run_and_loses_nothing(file, limit, run, tmp_path):
    """A limit on the size of a file: no room for the first policy.pt, or for the second, larger checkpoint.pt."""
    limit = limit or (run / "checkpoint.previous.pt").stat().st_size + 100
    assert limit < (run / file).stat().st_size
    code = "import resource as r, sys, dmash; r.setrlimit(r.RLIMIT_FSIZE, ({0}, {0})); sys.exit(dmash.main())"
    done = command(*small_arguments(tmp_path), code=code.format(limit))
    folder, step = tmp_path / run.name, 20 if limit == 10_000 else 40
    assert done.returncode == 2 and done.stderr == (
        f"dmash.py: error: step {step}: cannot write {folder / file} (File too large); the run stops, its earlier "
        f"files are intact; to go on: python dmash.py --resume {folder}\n"
    )
    assert not list(folder.glob("*.partial"))
    assert (folder / "checkpoint.pt").exists() == (step == 40)
    assert step == 20 or dmash.load(folder / "checkpoint.pt", "cpu")["step"] == 20
    assert dmash.main(["--resume", str(folder)]) == 0
    assert same_run(folder, run)


@pytest.mark.skipif(os.name == "nt", reason="these permissions are not known to Windows")
def test_a_folder_that_cannot_be_written(run):
    """As a user without rights on it. It can still be evaluated."""
    code = """if True:
        import os, sys, dmash
        dmash.start(dmash.Config("di_inv"))  # what is imported late may be out of that user's reach
        os.getuid() or os.setuid(65534)
        sys.exit(dmash.main())"""
    with tempfile.TemporaryDirectory() as there:
        folder = Path(shutil.copytree(run, Path(there) / run.name))
        for path in (folder, Path(there)):
            path.chmod(0o555)
        try:
            new = command(*small_arguments(there, seed=2), code=code)
            resumed = command("--resume", folder, code=code)
            evaluated = command("--eval", folder, "--rollouts", 1, code=code)
        finally:
            for path in (folder, Path(there)):
                path.chmod(0o755)
        assert new.returncode == 2 and new.stderr == (
            f"dmash.py: error: --out {there}: cannot write {there}/di_inv__dma_star_sh__s2 (Permission denied)\n"
        )
        assert resumed.returncode == 2 and resumed.stderr == f"dmash.py: error: {folder}/lock: Permission denied\n"
        assert evaluated.returncode == 0 and evaluated.stderr == ""
        assert sorted(os.listdir(folder)) == sorted(os.listdir(run))


def test_flipped_bits_are_found(run, tmp_path):
    """Wherever a bit of a checkpoint is flipped: the file is refused, or the bit meant nothing."""
    data, rng = (run / "checkpoint.pt").read_bytes(), np.random.default_rng(0)
    whole, refused = dmash.load(run / "checkpoint.pt", "cpu"), 0
    places = [*rng.integers(len(data), size=15), *rng.integers(2000, size=5), *(len(data) - rng.integers(2000, size=5))]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.integers(8)
        (tmp_path / "checkpoint.pt").write_bytes(damaged)
        try:
            state = dmash.load(tmp_path / "checkpoint.pt", "cpu")
        except Exception:
            refused += 1
        else:
            assert as_text(state) == as_text(whole), place
    assert refused >= 15


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda data: data[: len(data) // 2], ""),
        (lambda data: b"", ""),
        (lambda data: b"x" * 1000, ""),
        (lambda data: data[:1_000_000] + bytes([data[1_000_000] ^ 1]) + data[1_000_001:], "is damaged"),
        (lambda data: saved({"g": 1}), "'config'"),
        (lambda data: saved([1, 2]), ""),
        (lambda data: saved({"config": dataclasses.asdict(small_config()) | {"out": "x"}}), "'step'"),
    ],
)
def test_damaged_and_foreign_checkpoints_are_refused_and_the_one_before_offered(damage, reason, folder, run, capsys):
    path = folder / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert dmash.main(["--resume", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dmash.py: error: --resume {folder}: checkpoint.pt cannot be read (") and reason in error
    assert error.endswith("; if you move it away, --resume goes on from checkpoint.previous.pt\n")
    assert error.count("\n") == 1
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    path.rename(folder / "away")
    assert dmash.main(["--resume", str(folder)]) == 0 and same_run(folder, run)


def test_a_checkpoint_of_other_settings_is_refused(folder, capsys):
    (folder / "checkpoint.pt").write_bytes(saved({"config": dataclasses.asdict(small_config(seed=2, K=8))}))
    assert dmash.main(["--resume", str(folder)]) == 2
    assert capsys.readouterr().err == (
        f"dmash.py: error: --resume {folder}: checkpoint.pt is of a run with other settings (--seed 2 there and 1 "
        "here, --K 8 there and 24 here)\n"
    )


def as_text(state):
    return str(tree_map_only(torch.Tensor, lambda value: value.numpy().tobytes(), state))


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name, data", [("metrics.csv", b""), ("per_context.csv", b"step\nx,1\n")])
def test_damaged_tables_are_named(name, data, folder, capsys):
    (folder / name).write_bytes(data)
    assert dmash.main(["--resume", str(folder)]) == 2
    assert f"--resume {folder}: {name} cannot be read" in capsys.readouterr().err
    assert (folder / name).read_bytes() == data


def test_a_run_without_its_checkpoints_is_not_started_anew(folder, capsys):
    for path in folder.glob("checkpoint*"):
        path.unlink()
    before = (folder / "metrics.csv").read_bytes()
    assert dmash.main(["--resume", str(folder)]) == 2
    assert "no checkpoint.pt, but metrics.csv goes to step 40" in capsys.readouterr().err
    assert (folder / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize("file, option", [("policy.pt", "--eval"), ("checkpoint.pt", "--resume")])
def test_a_checkpoint_from_a_stranger_runs_no_code(file, option, folder, tmp_path, capsys):
    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "attacked"),))

    (folder / file).write_bytes(saved({"g": Attack()}))
    assert dmash.main([option, str(folder)]) == 2
    assert f"{file} cannot be read" in capsys.readouterr().err and not (tmp_path / "attacked").exists()


def test_a_folder_with_results_but_no_config_is_refused(folder, capsys):
    (folder / "config.json").unlink()
    before = (folder / "metrics.csv").read_bytes()
    assert dmash.main(small_arguments(folder.parent)) == 2
    assert f"{folder} already holds metrics.csv, per_context.csv, policy.pt, checkpoint.pt" in capsys.readouterr().err
    assert before == (folder / "metrics.csv").read_bytes()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_output_that_cannot_be_written_is_told_once():
    with open("/dev/full", "w") as full:
        script = [sys.executable, str(HERE / "dmash.py"), "--list-envs"]
        done = subprocess.run(script, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "dmash.py: error: output: No space left on device\n")


def test_a_folder_of_another_configuration_is_refused(run, capsys):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert dmash.main(small_arguments(run.parent, steps=30, batch=16)) == 2
    assert capsys.readouterr().err == (
        f"dmash.py: error: {run} already holds a run with other settings (--steps 40 there and 30 here, "
        f"--batch 32 there and 16 here); choose another --seed or --out, or go on with --resume {run} "
        "(where --steps may be raised)\n"
    )
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}


def poison(step, target, when):
    """Makes the value that `target`, a method, returns go wrong from its call number `when` on."""
    owner, name = target
    method, calls = getattr(owner, name), []

    def poisoned(self, *args, **kwargs):
        calls.append(1)
        result = method(self, *args, **kwargs)
        return step(self, result) if len(calls) >= when else result

    return owner, name, poisoned


def nan_weight(agent, losses):
    agent.Q_target.head.bias.data[0] = math.nan
    return losses


NOT_FINITE = {  # what goes wrong at gradient step 30: 24 warm-up steps and 60 random ones come before the first
    "observation": lambda: poison(lambda envs, out: (out[0] * np.nan, *out[1:]), (aib_envs.VectorEnv, "step"), 114),
    "reward": lambda: poison(lambda envs, out: (out[0], out[1] + np.inf, out[2]), (aib_envs.VectorEnv, "step"), 114),
    "action": lambda: poison(lambda agent, a: a * math.nan, (dmash.Agent, "act"), 30),
    "dynamics_loss": lambda: poison(lambda agent, out: (out[0] / 0, out[1]), (dmash.Agent, "dynamics_step"), 30),
    "critic_loss": lambda: poison(lambda agent, loss: loss * math.nan, (dmash.Agent, "critic_step"), 30),
    "actor_loss": lambda: poison(lambda agent, loss: loss * math.inf, (dmash.Agent, "actor_step"), 15),
    "weight Q_target.head.bias": lambda: poison(nan_weight, (dmash.Agent, "update"), 40),
}


@pytest.mark.parametrize("name", NOT_FINITE)
def test_numbers_that_go_wrong_stop_the_run(name, run, tmp_path, capsys, monkeypatch):
    folder = tmp_path / run.name
    with monkeypatch.context() as patch:
        patch.setattr(dmash, "evaluate", lambda agent, cfg, *_: np.zeros((3, cfg.contexts)))
        patch.setattr(*NOT_FINITE[name]())
        assert dmash.main(small_arguments(tmp_path)) == 1
    step = 40 if name.startswith("weight") else 30
    message = f"step {step}: {name} is not finite; the run stops, the last checkpoint in {folder} is untouched"
    assert capsys.readouterr().err == f"dmash.py: error: {message}\n"
    assert [dmash.load(folder / file, "cpu")["step"] for file in ("checkpoint.pt", "policy.pt")] == [20, 20]
    assert dmash.main(["--resume", str(folder)]) == 0  # without the fault


def test_a_simulation_that_diverges_stops_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # MuJoCo notes it in a file where it is
    too_fast = np.array([0.0, 0.0, 1e11, 1e11])
    monkeypatch.setattr(aib_envs.Cartpole, "initial_state", lambda self, i, rng: too_fast)
    assert dmash.main(small_arguments(tmp_path / "runs", env="cartpole_inv")) == 1
    assert capsys.readouterr().err.endswith("__s1 is untouched\n")


def test_signal_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with dmash.catch_signals() as caught:
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


# ---------------------------------------------------------------------------------------------------------------
# python test_dmash.py: the tables of the README
# ---------------------------------------------------------------------------------------------------------------


def main():
    """Prints how far each environment is from its reference, what a step of 20 contexts costs, and faults survived."""
    print("| id | contexts tried | observation | reward | state |\n|---|---|---|---|---|")
    for env_id in ORACLES:
        worst, contexts = largest_differences(env_id)
        print(
            f"| `{env_id}` | {contexts} | " + " | ".join(f"{difference:.0e}" for difference in worst) + " |", flush=True
        )
    print("\n| id | vector step, ms | bare mj_step, ms | ratio | reference, ms | speed-up |\n|---|---|---|---|---|---|")
    for env_id in aib_envs.ENVS:
        if env_id.startswith("ode_"):
            continue
        vector, bare = dmash.vector_step_times(env_id, 20)
        row = [f"{vector:.2f}", *((f"{bare:.2f}", f"{vector / bare:.2f}") if bare else ("–", "–"))]
        if env_id in ORACLES:
            references = [oracle(env_id, context) for context in aib_envs.context_sets(env_id)["train"]]
            actions = np.random.default_rng(0).uniform(-1, 1, (50, 20, aib_envs.make(env_id).task.d_a))
            times = []
            for step in actions:
                begin = time.perf_counter()
                for reference, action in zip(references, step):
                    reference.step(action)
                times.append(1e3 * (time.perf_counter() - begin))
            row += [f"{np.median(times):.2f}", f"{np.median(times) / vector:.1f}"]
        else:
            row += ["–", "–"]
        print(f"| `{env_id}` | " + " | ".join(row) + " |", flush=True)
    print("\n| fault | tried | survived |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as out, contextlib.chdir(out), open(os.devnull, "w") as nowhere:
        same = [same for _, same in kill_twenty(out)] if hasattr(os, "fork") else []
        print(f"| `SIGKILL` at a random time, then `--resume` | {len(same)} | {sum(same)} |", flush=True)
        with contextlib.redirect_stderr(nowhere):
            refused = [dmash.main(arguments.split()) == 2 for arguments, _ in BAD_COMMANDS]
        print(f"| bad command line | {len(refused)} | {sum(refused)} |")


if __name__ == "__main__":
    main()
