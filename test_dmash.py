"""Tests of the method in dmash.py. Each compares with something computed another way (an oracle).

    python -m pytest -q test_dmash.py                all of them, in less than a minute
    python -m pytest -q test_dmash.py -k windows     those of one function

Most names begin with the function or the class that they are about, in the order of dmash.py:
subsample, mask_inputs, avg_l1_norm, sim_norm, encoder, hypernetwork, adapter, network, actor,
critic_loss, …, update, windows, rollout, evaluate, run. The tests of environments, of files and of
the command line are in tests/.
"""

import csv
import dataclasses
import inspect
import itertools
import math
import signal
import textwrap
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.distributions import Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform
from torch.testing import assert_close

import aib_envs
import dmash

HERE = Path(__file__).parent

D_S = 5  # size of a state
D_A = 2  # of an action
D_C = 3  # of a context
B = 12  # samples
N = 4  # contexts
L = 6  # transitions of a window that are read
D_X = 16  # width of the networks
BOTTLENECK = 4  # width of the adapters


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(dmash, "plot", lambda run: None)


@pytest.fixture
def short_episodes(monkeypatch):
    short = dataclasses.replace(aib_envs.ENVS["di_inv"], horizon=20)
    monkeypatch.setitem(aib_envs.ENVS, "di_inv", short)


def small_config(**changes):
    """A real configuration with few contexts, few steps and narrow networks."""
    settings = dict(env="di_inv", contexts=N, batch=32, hidden=D_X, bottleneck=BOTTLENECK)
    settings |= dict(random_steps=60, steps=40, eval_every=20, rollouts=1, threads=1)
    return dmash.Config(**(settings | changes))


def small_agent(**changes):
    return dmash.Agent(small_config(**changes), D_S, D_A, D_C)


def random_batch():
    return dmash.Batch(
        s=torch.randn(B, D_S),
        a=torch.rand(B, D_A) * 2 - 1,
        ds=torch.randn(B, D_S),
        r=torch.rand(B),
        tau=torch.randn(B, L, 2 * D_S + D_A),
        c=torch.randn(N, D_C),
    )


def random_omega(samples=B):
    shapes = [(D_X, BOTTLENECK), (1, BOTTLENECK), (BOTTLENECK, D_X), (1, D_X)]
    return dmash.Omega(*(torch.randn(samples, *shape) / 4 for shape in shapes))


def with_seed(function, *arguments):
    """What a function that draws random numbers returns, with the same ones each time."""
    torch.manual_seed(5)
    return function(*arguments)


def tensors(omega):
    """The tensors of ω; of another method, the one tensor that stands in its place."""
    if isinstance(omega, dmash.Omega):
        return list(omega)
    return [omega]


def equal(omega, other):
    return all(torch.equal(x, y) for x, y in zip(tensors(omega), tensors(other), strict=True))


class Row(NamedTuple):
    """What a method is. The words are those of dmash.Method."""

    context: str
    rl: str
    f: str
    hypernetwork: str
    mask: float
    input_norm: bool
    output_norm: bool
    beta: float


# The methods once more, as the paper has them. Both norms in one column: input, output.
TABLE = """
    dma_star_sh     z     adapter  adapter  shared  0.4  yes,yes  0
    dma_star_h      z     adapter  adapter  own     0.4  yes,yes  0
    dma_star        z     concat   concat   none    0.2  yes,yes  0
    dma             z     concat   concat   none    0    no,no    0
    dma_pearl       z     concat   concat   none    0    no,no    0.4
    concat          c     concat   none     none    0    no,no    0
    da              c     adapter  none     own     0    no,no    0
    dr              none  none     none     none    0    no,no    0
    rl_adapters     z     adapter  concat   own     0.4  yes,yes  0
    dma_sh          z     adapter  adapter  shared  0    no,no    0
    no_mask         z     adapter  adapter  shared  0    yes,yes  0
    no_input_norm   z     adapter  adapter  shared  0.4  no,yes   0
    no_output_norm  z     adapter  adapter  shared  0.4  yes,no   0
"""


def parse(line):
    name, context, rl, f, hypernetwork, mask, norms, beta = line.split()
    input_norm, output_norm = [word == "yes" for word in norms.split(",")]
    row = Row(context, rl, f, hypernetwork, float(mask), input_norm, output_norm, float(beta))
    return name, row


METHODS = dict(parse(line) for line in TABLE.strip().splitlines())
INFERRED = [name for name, row in METHODS.items() if row.context == "z"]


# ---- Context encoder ----------------------------------------------------------------------------


def test_subsample_draws_a_random_subset_in_random_order_for_each_sample():
    random = dmash.subsample(300, 24, 4, noisy=True)
    assert random.shape == (300, 4)
    assert all(len(set(row)) == 4 for row in random.tolist())  # without repetition
    assert torch.bincount(random.flatten(), minlength=24).min() > 20  # 50 expected
    assert (random.diff() < 0).any()
    assert (random.diff() > 0).any()
    assert len({tuple(row) for row in random.tolist()}) > 290


@pytest.mark.parametrize("K", [*range(1, 20), 24, 128, 1000])
def test_subsample_is_even_and_rounded_down_at_evaluation(K):
    """⌊i (K − 1) / (L − 1)⌋ in fractions; the oldest alone where L = 1."""
    assert dmash.subsample(2, K, 1, noisy=False).tolist() == [[0], [0]]
    for L in range(2, min(K, 40) + 1):
        by_hand = [math.floor(Fraction(i * (K - 1), L - 1)) for i in range(L)]
        assert dmash.subsample(2, K, L, noisy=False).tolist() == [by_hand] * 2


def test_config_rounds_the_length_that_is_read_down():
    assert dmash.Config(env="cartpole_inv").L == 25
    assert dmash.Config(env="di_inv").L == 4
    assert dmash.Config(env="cartpole_inv", K=100, subsample=0.29).L == 29
    assert dmash.Config(env="di_inv", K=3).L == 1


def test_mask_inputs_zeroes_whole_vectors_at_the_stated_rate():
    tau = torch.ones(400, 25, 2 * D_S + D_A)
    masked = dmash.mask_inputs(tau, D_S, D_A, 0.7).split([D_S, D_A, D_S], -1)
    zero = [(vector[..., 0] == 0).float() for vector in masked]
    for vector, is_zero in zip(masked, zero):
        assert torch.equal(vector.amin(-1), vector.amax(-1))  # all of a vector, or nothing
        assert abs(is_zero.mean() - 0.7) < 0.02  # 4 standard errors
        assert abs(is_zero.mean(0) - 0.7).max() < 0.12  # at each time step
    for first, second in itertools.combinations(zero, 2):
        assert abs((first * second).mean() - 0.49) < 0.02  # independent of each other


def test_mask_inputs_does_not_scale_what_is_left():
    """Dropout would divide it by 1 − p."""
    tau = torch.randn(50, L, 2 * D_S + D_A)
    masked = dmash.mask_inputs(tau, D_S, D_A, 0.4)
    assert torch.equal(masked[masked != 0], tau[masked != 0])


def test_avg_l1_norm_by_hand():
    x = torch.tensor([[1.0, -3.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    by_hand = torch.tensor([[0.5, -1.5, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    y = dmash.avg_l1_norm(x)
    assert_close(y, by_hand)
    y.sum().backward()
    # y does not change with the scale of x. A masked transition is a row of zeros: no nan there.
    assert (x.grad * x).sum().abs() < 1e-5


def test_sim_norm_by_hand():
    x = torch.randn(3, 6)
    by_hand = torch.zeros(3, 6)
    for row in range(3):
        for group in (range(3), range(3, 6)):
            total = sum(math.exp(x[row, i]) for i in group)
            for i in group:
                by_hand[row, i] = math.exp(x[row, i]) / total
    assert_close(dmash.sim_norm(x, 3), by_hand)


@pytest.mark.parametrize("method", INFERRED)
def test_encoder_masks_at_the_rate_of_its_method_and_only_if_noisy(method):
    tau = torch.ones(400, 25, 2 * D_S + D_A)
    for changes, rate in (({}, METHODS[method].mask), ({"mask": 0.7}, 0.7)):
        g = small_agent(method=method, **changes).g
        seen = []
        g.embed.register_forward_pre_hook(lambda embed, inputs: seen.append(inputs[0]))
        g(tau, noisy=True)
        g(tau, noisy=False)
        masked, unmasked = seen
        assert torch.equal(unmasked, tau)
        for vector in masked.split([D_S, D_A, D_S], -1):
            masked_share = (vector[..., 0] == 0).float().mean()
            assert abs(masked_share - rate) < 0.02
            assert (masked_share > 0) == (rate > 0)


@pytest.mark.parametrize("method", INFERRED)
def test_encoder_equals_a_step_by_step_lstm(method):
    """With the norms of the method, and without masks."""
    g, row = small_agent(method=method).g, METHODS[method]
    tau = 3 * torch.randn(B, L, 2 * D_S + D_A)
    weights = {name.removesuffix("_l0"): value for name, value in g.lstm.state_dict().items()}
    cell = nn.LSTMCell(32, 32)
    cell.load_state_dict(weights)
    h = c = torch.zeros(B, 32)
    for i in range(L):
        x = tau[:, i] @ g.embed.weight.T
        if row.input_norm:
            x = x / x.abs().mean(-1, keepdim=True)
        h, c = cell(x, (h, c))
    z = h @ g.project.weight.T
    if row.beta:
        z = standardised(z)  # LayerNorm as it starts
    if row.output_norm:
        z = z.reshape(B, 2, 4).softmax(-1).reshape(B, 8)
    assert_close(g(tau, noisy=False), z)


def standardised(x):
    """Mean 0 and variance 1 over the last axis, with LayerNorm's 1e-5."""
    spread = x.var(-1, correction=0, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) / (spread + 1e-5) ** 0.5


def pearl_code(g, tau):
    """The Gaussian of DMA-Pearl's code, (B, 8), by torch.distributions, and its mean KL."""
    _, (last, _) = g.lstm(g.embed(tau))
    mean = standardised(last[0] @ g.project.weight.T) * g.mean_norm.weight + g.mean_norm.bias
    norm = g.variance_norm
    raw = standardised(last[0] @ g.variance.weight.T) * norm.weight + norm.bias
    variance = torch.log1p(raw.exp())
    normal = Normal(mean.double(), variance.double().sqrt())
    unit = Normal(torch.zeros(8).double(), torch.ones(8).double())
    return normal, kl_divergence(normal, unit).mean()


def test_gaussian_encoder_equals_torch_distributions():
    """The mean at evaluation, a sample if noisy."""
    g, n = small_agent(method="dma_pearl").g, 4000
    with torch.no_grad():
        for norm in (g.mean_norm, g.variance_norm):  # so that both do something
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
    tau = torch.randn(1, L, 2 * D_S + D_A).expand(n, -1, -1)
    normal, kl = pearl_code(g, tau)
    assert_close(g(tau, noisy=False).double(), normal.mean)
    assert_close(g.kl.double(), kl)
    weights = [g.project.weight, g.variance.weight]
    gradients = [torch.autograd.grad(x, weights, retain_graph=True) for x in (g.kl, kl)]
    assert_close(*gradients)
    sample = g(tau, noisy=True)
    assert_close(g.kl.double(), kl)
    standard = (sample - normal.mean) / normal.stddev
    assert standard.mean(0).abs().max() < 5 / math.sqrt(n)
    assert (standard.std(0) - 1).abs().max() < 5 / math.sqrt(2 * n)
    correlation = torch.corrcoef(standard.T) - torch.eye(8)
    assert correlation.abs().max() < 5 / math.sqrt(n)  # each dimension is drawn for itself
    for gradient in torch.autograd.grad(sample.sum(), weights):  # it is reparameterised
        assert gradient.abs().sum() > 0


# ---- Hypernetwork, adapter, networks ------------------------------------------------------------


def omega_by_hand(h, z, d_x=256, k=32):
    """ω of one sample, z (8,), by matrix products. k is the width of the adapter."""
    y = torch.relu(h.trunk[0].weight @ z + h.trunk[0].bias)
    y = torch.relu(h.trunk[2].weight @ y + h.trunk[2].bias)
    flat = [head.weight @ y + head.bias for head in h.heads]
    shapes = [(d_x, k), (k,), (k, d_x), (d_x,)]
    return [x.reshape(shape) for x, shape in zip(flat, shapes)]


def adapter_by_hand(x, W_down, b_down, W_up, b_up):
    """Eq. 3 of one sample, x (256,), in its column form."""
    return W_up.T @ torch.relu(W_down.T @ x + b_down) + b_up


def test_hypernetwork_equals_a_loop_over_samples():
    h, z = dmash.Hypernetwork(2, 9, 7, 5).double(), torch.randn(3, 2).double()
    omega = h(z)
    assert [tuple(w.shape) for w in omega] == [(3, 7, 5), (3, 1, 5), (3, 5, 7), (3, 1, 7)]
    for b in range(3):
        for fast, slow in zip(omega, omega_by_hand(h, z[b], 7, 5)):
            assert_close(fast[b].squeeze(0), slow)


def test_hypernetwork_heads_start_as_linear_layers_of_pytorch():
    """Uniform up to 1 / √64, whose standard deviation is 1 / √192."""
    for head in dmash.Hypernetwork().heads:
        for values in head.parameters():
            # Five standard errors: 39 % for the bias of 32 numbers, at most 5 % for a weight.
            assert abs(values.std() * 192**0.5 - 1) < 2.2 / values.numel() ** 0.5
            assert values.abs().max() <= 1 / 8


@pytest.mark.parametrize("n", [1, 3])
def test_adapter_and_its_gradients_equal_a_loop_over_samples(n):
    """Each of the B adapters serves n samples. Double precision, so that only rounding differs."""
    h = dmash.Hypernetwork().double()
    z = torch.randn(B, 8).double().requires_grad_()
    x = torch.randn(B, n, 256).double().requires_grad_()
    fast = dmash.adapter(x, h(z))
    slow = torch.zeros(B, n, 256).double()
    for b in range(B):
        omega = omega_by_hand(h, z[b])
        for i in range(n):
            slow[b, i] = adapter_by_hand(x[b, i], *omega)
    assert_close(fast, slow)
    direction, weights = torch.randn_like(fast), [z, x, *h.parameters()]
    fast_gradients = torch.autograd.grad(fast, weights, direction)
    slow_gradients = torch.autograd.grad(slow, weights, direction)
    assert_close(fast_gradients, slow_gradients)


def make_own():
    return dmash.Hypernetwork(8, 64, D_X, BOTTLENECK)


def network_by_hand(net, inputs, omega):
    """Trunk without a last activation, sum (Eq. 3), ReLU, head."""
    first, _, second = net.trunk
    if net.use == "concat":
        inputs = torch.cat([inputs, omega], -1)
    x = torch.relu(inputs @ first.weight.T + first.bias) @ second.weight.T + second.bias
    if net.use == "adapter":
        if net.own is not None:
            omega = net.own(omega)
        x = x + dmash.adapter(x.unsqueeze(1), omega).squeeze(1)
    return torch.relu(x) @ net.head.weight.T + net.head.bias


USES = {
    "adapter": dict(use="adapter"),
    "own adapter": dict(use="adapter", make_own=make_own),
    "concat": dict(use="concat", d_context=8),
    "none": dict(use="none", d_context=8),
}


@pytest.mark.parametrize("use", USES)
def test_network_adds_the_adapter_to_x_before_the_relu(use):
    """Or it concatenates z behind its inputs, or it has nothing."""
    net, inputs = dmash.Network(7, 3, D_X, **USES[use]), torch.randn(B, 7)
    omega = random_omega() if use == "adapter" else torch.randn(B, 8)
    by_hand = network_by_hand(net, inputs, omega)
    assert_close(net(inputs, omega), by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use", USES)
def test_critics_are_two_networks_with_a_column_each(use):
    critics = dmash.Critics(4, 3, d_x=D_X, **USES[use])
    s, a = torch.randn(B, 4), torch.randn(B, 3)
    omega = random_omega() if use == "adapter" else torch.randn(B, 8)
    inputs, out = torch.cat([s, a], -1), critics(s, a, omega)
    for net, column in ((critics.Q1, out[:, :1]), (critics.Q2, out[:, 1:])):
        by_hand = network_by_hand(net, inputs, omega)
        assert_close(column, by_hand, rtol=1e-4, atol=1e-5)
    assert not torch.equal(out[:, 0], out[:, 1])


# ---- Policy and losses --------------------------------------------------------------------------


def new_actor(d_a=D_A):
    return dmash.Actor(D_S, d_a, d_x=D_X)


def test_actor_squashes_the_log_std_into_its_range():
    pi, s, omega = new_actor(1), torch.randn(B, D_S), random_omega()
    with torch.no_grad():
        pi.head.weight[:] = 0
        for raw in (-50.0, -1.0, 0.0, 2.0, 50.0):
            pi.head.bias[:] = torch.tensor([0.5, raw])
            mu, log_std = pi(s, omega)
            assert_close(mu, torch.full((B, 1), 0.5))
            by_hand = -5 + 7 * (math.tanh(raw) + 1) / 2
            assert_close(log_std, torch.full((B, 1), by_hand))


def test_actor_sample_has_the_log_probability_of_torch_distributions():
    pi, s, omega = new_actor(3), torch.randn(B, D_S), random_omega()
    a, log_prob = pi.sample(s, omega)
    mu, log_std = pi(s, omega)
    normal = Normal(mu.double(), log_std.double().exp())
    oracle = TransformedDistribution(normal, [TanhTransform()])
    by_hand = oracle.log_prob(a.double()).sum(-1)
    assert log_prob.shape == (B,)
    assert_close(log_prob.double(), by_hand, rtol=1e-3, atol=1e-3)
    bias = [pi.head.bias]
    gradients = [torch.autograd.grad(x.sum(), bias, retain_graph=True) for x in (log_prob, by_hand)]
    assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_actor_sample_is_distributed_as_its_gaussian_and_reparameterised():
    pi, n = new_actor(2), 4000
    s = torch.randn(1, D_S).expand(n, -1)
    omega = dmash.Omega(*(w.expand(n, -1, -1) for w in random_omega(1)))
    a, _ = pi.sample(s, omega)
    mu, log_std = pi(s, omega)
    standard = (a.atanh() - mu) / log_std.exp()
    assert standard.mean(0).abs().max() < 5 / math.sqrt(n)
    assert (standard.std(0) - 1).abs().max() < 0.1
    assert torch.corrcoef(standard.T)[0, 1].abs() < 5 / math.sqrt(n)
    (gradient,) = torch.autograd.grad(a.sum(), [pi.head.bias])
    assert (gradient != 0).all()  # through the mean and through the standard deviation


def test_actor_sample_is_exact_where_tanh_saturates():
    """There log(1 − tanh²u) is log 4 − 2u."""
    pi, s, omega = new_actor(1), torch.randn(B, D_S), random_omega()
    with torch.no_grad():
        pi.head.bias[:] = torch.tensor([30.0, 0.0])  # tanh(30) is 1 in single precision
    a, log_prob = with_seed(pi.sample, s, omega)
    assert torch.equal(a, torch.ones(B, 1))
    mu, log_std = pi(s, omega)
    u = mu + log_std.exp() * with_seed(torch.randn_like, mu)
    by_hand = Normal(mu, log_std.exp()).log_prob(u) - math.log(4) + 2 * u
    assert_close(log_prob, by_hand.sum(-1))


def test_dynamics_loss_is_the_mean_over_samples_and_dimensions():
    f, omega, batch = dmash.DynamicsModel(D_S, D_A, d_x=D_X), random_omega(), random_batch()
    predicted = f(batch.s, batch.a, omega)
    total = 0.0
    for b in range(B):
        for i in range(D_S):
            total += (predicted[b, i] - batch.ds[b, i]) ** 2
    assert_close(dmash.dynamics_loss(f, omega, batch), total / (B * D_S))


def new_critics():
    return dmash.Critics(D_S, D_A, d_x=D_X)


def critic_loss_by_hand(pi, Q, Q_target, alpha, omega, batch, gamma):
    a2, log_prob = pi.sample(batch.s + batch.ds, omega)
    q2, q = Q_target(batch.s + batch.ds, a2, omega), Q(batch.s, batch.a, omega)
    total = 0.0
    for b in range(B):
        target = batch.r[b] + gamma * (min(q2[b, 0], q2[b, 1]) - alpha * log_prob[b])
        total += (q[b, 0] - target) ** 2 + (q[b, 1] - target) ** 2
    return total / B


def test_critic_loss_by_hand():
    networks = new_actor(), new_critics(), new_critics()
    arguments = torch.tensor(0.3), random_omega(), random_batch(), 0.9
    loss = with_seed(dmash.critic_loss, *networks, *arguments)
    by_hand = with_seed(critic_loss_by_hand, *networks, *arguments)
    assert_close(loss, by_hand)


def test_critic_loss_trains_the_critics_alone():
    pi, Q, Q_target = new_actor(), new_critics(), new_critics()
    loss = dmash.critic_loss(pi, Q, Q_target, 0.3, random_omega(), random_batch(), 0.9)
    loss.backward()
    assert all(p.grad is not None for p in Q.parameters())
    assert all(p.grad is None for net in (pi, Q_target) for p in net.parameters())


def test_actor_loss_by_hand():
    pi, Q, omega, batch = new_actor(), new_critics(), random_omega(), random_batch()
    loss, log_prob = with_seed(dmash.actor_loss, pi, Q, torch.tensor(0.3), omega, batch)
    a, again = with_seed(pi.sample, batch.s, omega)
    q = Q(batch.s, a, omega)
    by_hand = sum(0.3 * again[b] - min(q[b, 0], q[b, 1]) for b in range(B)) / B
    assert_close(loss, by_hand)
    weights = list(pi.parameters())
    gradients = [torch.autograd.grad(x, weights) for x in (loss, by_hand)]
    assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert torch.equal(log_prob, again)
    assert not log_prob.requires_grad


def test_temperature_loss_by_hand():
    log_alpha, log_prob = torch.tensor(-1.0, requires_grad=True), torch.randn(B)
    loss = dmash.temperature_loss(log_alpha, log_prob, target_entropy=-2.0)
    (gradient,) = torch.autograd.grad(loss, [log_alpha])
    assert_close(gradient, -math.exp(-1) * (log_prob.mean() - 2))


# ---- Methods and what the published code computes -----------------------------------------------


def test_methods_are_those_of_the_paper():
    assert {name: Row(*method[1:]) for name, method in dmash.METHODS.items()} == METHODS
    assert dmash.Config().method == "dma_star_sh"


def linear_size(d_in, d_out):
    """The number of weights and biases of a linear layer."""
    return d_in * d_out + d_out


def hypernetwork_size(d_context):
    return (
        linear_size(d_context, 64)
        + linear_size(64, 64)
        + linear_size(64, 2 * D_X * BOTTLENECK + BOTTLENECK + D_X)
    )


def network_size(d_in, d_out, use, row, d_context):
    size = linear_size(d_in, D_X) + linear_size(D_X, D_X) + linear_size(D_X, d_out)
    if use == "concat":
        size += d_context * D_X
    if use == "adapter" and row.hypernetwork == "own":
        size += hypernetwork_size(d_context)
    return size


def sizes_by_hand(row):
    """The number of parameters of each network that a method has."""
    d_context = {"z": 8, "c": D_C, "none": 0}[row.context]
    sizes = {"pi": network_size(D_S, 2 * D_A, row.rl, row, d_context)}
    sizes["Q"] = sizes["Q_target"] = 2 * network_size(D_S + D_A, 1, row.rl, row, d_context)
    if row.context == "z":
        lstm = 4 * 32 * (32 + 32 + 2)
        sizes["g"] = 32 * (2 * D_S + D_A) + lstm + 8 * 32
        if row.beta:  # the variance's layer, and two layer norms
            sizes["g"] += 8 * 32 + 32
    if row.f != "none":
        sizes["f"] = network_size(D_S + D_A, D_S, row.f, row, d_context)
    if row.hypernetwork == "shared":
        sizes["h"] = hypernetwork_size(d_context)
    return sizes


@pytest.mark.parametrize("method", METHODS)
def test_agent_has_the_networks_of_its_method(method):
    agent, sizes = small_agent(method=method), {}
    everything = []
    for name in ("g", "h", "f", "pi", "Q", "Q_target"):
        network = getattr(agent, name)
        if network is not None:
            parameters = list(network.parameters())
            sizes[name] = sum(p.numel() for p in parameters)
            everything += [id(p) for p in parameters]
    assert sizes == sizes_by_hand(METHODS[method])
    assert len(everything) == len(set(everything))  # no two networks are the same object
    for p, target in zip(agent.Q.parameters(), agent.Q_target.parameters(), strict=True):
        assert torch.equal(p, target)
        assert not target.requires_grad


def test_agent_has_the_size_of_the_paper():
    """On Cartpole, in millions of parameters, without target critics and α."""
    for method, size in (("dma_star_sh", 1.37), ("da", 3.47)):
        agent = dmash.Agent(dmash.Config(env="cartpole_inv", method=method), 5, 1, 2)
        trained = [p for p in agent.parameters() if p.requires_grad and p.ndim > 0]
        assert round(sum(p.numel() for p in trained) / 1e6, 2) == size


# Inputs and outputs of the published code (commit c74cb4a), with weights set by a formula.
REFERENCE = HERE / "results" / "method_reference.npz"


def wave(k, *shape):
    """What tensor number k holds: sin(0.7 i + k) / √fan; i numbers its entries row by row.

    fan is the last size, 64 for a vector.
    """
    fan = shape[-1] if len(shape) > 1 else 64
    values = np.sin(0.7 * np.arange(math.prod(shape)) + k) / math.sqrt(fan)
    return torch.from_numpy(values).float().reshape(shape)


def set_tensors(k, *parameters):
    for i, parameter in enumerate(parameters):
        parameter.data.copy_(wave(k + i, *parameter.shape))


def set_hypernetwork(k, h):
    """The reference has one output layer, and ω in the column form of Eq. 3."""
    set_tensors(k, *h.trunk.parameters())
    sizes = [256 * 32, 32, 32 * 256, 256]
    columns = [(32, 256), (32, 1), (256, 32), (256, 1)]
    weights, biases = wave(k + 4, 16672, 64).split(sizes), wave(k + 5, 16672).split(sizes)
    for head, weight, bias, shape in zip(h.heads, weights, biases, columns):
        weight = weight.unflatten(0, shape).transpose(0, 1)
        head.weight.data.copy_(weight.flatten(0, 1))
        head.bias.data.copy_(bias.unflatten(0, shape).T.flatten())


def set_network(k, k_own, network):
    if network is not None:
        set_tensors(k, *network.trunk.parameters(), *network.head.parameters())
        if network.own is not None:
            set_hypernetwork(k_own, network.own)


def reference_agent(method):
    """d_s = 5, d_a = 2, d_c = 2, with the weights of the reference.

    The first tensor has number 0 in the encoder, 10 in a shared hypernetwork or that of f, 20 in f,
    30 in π, 40 in Q₁, 50 in Q₂, and 60, 70, 80 in the own hypernetworks of π, Q₁, Q₂.
    """
    agent = dmash.Agent(dmash.Config(env="di_inv", method=method), 5, 2, 2)
    if agent.g is not None:
        layers = [agent.g.embed, agent.g.lstm, agent.g.project]
        if method == "dma_pearl":
            layers.append(agent.g.variance)
            agent.g.mean_norm = agent.g.variance_norm = torch.nn.Identity()  # recorded without
        set_tensors(0, *(p for layer in layers for p in layer.parameters()))
    if agent.h is not None:
        set_hypernetwork(10, agent.h)
    set_network(20, 10, agent.f)
    set_network(30, 60, agent.pi)
    set_network(40, 70, agent.Q.Q1)
    set_network(50, 80, agent.Q.Q2)
    # The reference has two heads where π has one: mean and log standard deviation.
    agent.pi.head.weight.data.copy_(torch.cat([wave(34, 2, 256), wave(36, 2, 256)]))
    agent.pi.head.bias.data.copy_(torch.cat([wave(35, 2), wave(37, 2)]))
    return agent


def gradient_norms(agent):
    """Of each tensor. The reference's output layer is our four heads."""
    result = {}
    for name, network in (("encoder", agent.g), ("hypernetwork", agent.h), ("f", agent.f)):
        norms = [p.grad.norm() for p in network.parameters()]
        if name == "hypernetwork":
            weights, biases = torch.stack(norms[4::2]).norm(), torch.stack(norms[5::2]).norm()
            norms = [*norms[:4], weights, biases]
        result[f"grad_norm/{name}"] = torch.stack(norms)
    return result


def recorded_outputs(agent, batch):
    """All that the reference holds of a method."""
    z, omega = agent.infer(batch.tau, noisy=False, c=batch.c)
    if agent.method.beta:
        return {"z_mean": z, "kl": agent.g.kl}
    result = {"Q": agent.Q(batch.s, batch.a, omega)}
    result["mean"], result["log_std"] = agent.pi(batch.s, omega)
    if agent.f is not None:
        result["z"], result["f"] = z, agent.f(batch.s, batch.a, omega)
    if agent.h is not None:
        columns = [omega.W_down.mT, omega.b_down, omega.W_up.mT, omega.b_up]
        flat = torch.cat([w.flatten(1) for w in columns], -1)
        result["omega_sum"] = flat.sum(-1)
        result["omega_first_last"] = torch.cat([flat[:, :4], flat[:, -4:]], -1)
        result["loss"] = dmash.dynamics_loss(agent.f, omega, batch)
        result["loss"].backward()
        result |= gradient_norms(agent)
    return result


PUBLISHED = ["dma_star_sh", "dma_star_h", "dma_star", "dma", "dma_pearl", "concat", "da"]


@pytest.mark.parametrize("method", PUBLISHED)
def test_agent_computes_what_the_published_code_does(method):
    with np.load(REFERENCE) as file:
        reference = {name: torch.from_numpy(file[name]) for name in file}
    window = torch.cat([reference[f"window/{name}"] for name in ("s", "a", "ds")], -1)
    tau = window[:, dmash.subsample(1, 24, 4, noisy=False)[0]]
    s, a, ds, c = [reference[name] for name in ("s", "a", "ds", "c")]
    computed = recorded_outputs(reference_agent(method), dmash.Batch(s, a, ds, None, tau, c))
    expected = {}
    for name, value in reference.items():
        if name.startswith(f"{method}/"):
            expected[name.removeprefix(f"{method}/")] = value
    if method == "dma_pearl":
        expected["kl"] = expected["kl"].mean()
    if method == "dma_star_h":
        del computed["z"]  # not recorded
    assert set(computed) == set(expected)
    for name, value in computed.items():
        atol = 1e-5 if name == "omega_sum" else 2e-6
        assert_close(value, expected[name], rtol=1e-5, atol=atol)


# ---- The agent: which network sees what ---------------------------------------------------------


def outputs_of(agent, batch, tau, c):
    """What each user of ω computes, from windows tau and contexts c."""
    _, omega = agent.infer(tau, noisy=False, c=c)
    result = {"π": torch.cat(agent.pi(batch.s, omega), -1)}
    result["Q"] = agent.Q(batch.s, batch.a, omega)
    result["Q̄"] = agent.Q_target(batch.s, batch.a, omega)
    if agent.f is not None:
        result["f"] = agent.f(batch.s, batch.a, omega)
    return result


@pytest.mark.parametrize("method", METHODS)
def test_agent_reads_the_window_or_the_true_context_and_nothing_else(method):
    """For every sample, the outputs of all networks change with that alone."""
    agent, batch, other = small_agent(method=method), random_batch(), random_batch()
    context = METHODS[method].context
    first = outputs_of(agent, batch, batch.tau, batch.c)
    other_window = outputs_of(agent, batch, other.tau, batch.c)
    other_context = outputs_of(agent, batch, batch.tau, other.c)
    assert ("f" in first) == (context == "z")
    for name, output in first.items():
        assert len(output) == B
        for changed, source in ((other_window, "z"), (other_context, "c")):
            if context == source:
                assert not torch.isclose(changed[name], output, rtol=0, atol=0).all(-1).any()
            else:
                assert torch.equal(changed[name], output)


@pytest.mark.parametrize("method", METHODS)
def test_infer_returns_the_code_and_what_stands_for_omega(method):
    agent, row, batch = small_agent(method=method), METHODS[method], random_batch()
    z, omega = agent.infer(batch.tau, noisy=False, c=batch.c)
    if row.context != "z":
        assert z is None
        assert omega is batch.c
        return
    assert z.shape == (B, 8)
    assert torch.equal(z, agent.g(batch.tau, noisy=False))
    if row.hypernetwork == "shared":
        assert equal(omega, agent.h(z))
    else:
        assert omega is z


@pytest.mark.parametrize("method", METHODS)
def test_infer_is_random_only_if_noisy(method):
    """Masks, and the samples of DMA-Pearl."""
    agent, row, batch = small_agent(method=method), METHODS[method], random_batch()
    generator = torch.get_rng_state()
    clean, _ = agent.infer(batch.tau, noisy=False, c=batch.c)
    again, _ = agent.infer(batch.tau, noisy=False, c=batch.c)
    assert torch.equal(torch.get_rng_state(), generator)
    if row.context == "z":
        noisy, _ = agent.infer(batch.tau, noisy=True, c=batch.c)
        other, _ = agent.infer(batch.tau, noisy=True, c=batch.c)
        random = row.mask > 0 or row.beta > 0
        assert torch.equal(clean, again)
        assert torch.equal(noisy, other) != random
        assert torch.equal(noisy, clean) != random


@pytest.mark.parametrize("method", ["concat", "da"])
def test_agent_uses_a_row_of_c_for_all_samples_of_its_context(method):
    agent, batch = small_agent(method=method), random_batch()
    each = batch.c.repeat_interleave(B // N, 0)  # (B, d_c)
    once = outputs_of(agent, batch, None, batch.c)
    repeated = outputs_of(agent, batch, None, each)
    for name in once:
        assert_close(once[name], repeated[name])


def test_act_samples_for_training_and_takes_the_mean_for_evaluation():
    agent, s, omega = small_agent(), torch.randn(B, D_S), random_omega()
    mean = agent.act(s, omega, noisy=False)
    assert_close(mean, agent.pi(s, omega)[0].tanh())
    assert not mean.requires_grad
    a = with_seed(agent.act, s, omega, True)
    assert torch.equal(a, with_seed(agent.pi.sample, s, omega)[0])
    assert not torch.equal(a, agent.act(s, omega, noisy=True))


# ---- Agent.update: Algorithm 2 ------------------------------------------------------------------

# What the dynamics loss trains. In every method the critic loss trains ζ alone, and the policy loss
# ξ alone. A network's own hypernetwork is a part of the network.
ROUTING = {
    "dma_star_sh": "φηθ",
    "dma_star_h": "φθ",
    "dma_star": "φθ",
    "dma": "φθ",
    "dma_pearl": "φθ",
    "concat": "",
    "da": "",
    "dr": "",
    "rl_adapters": "φθ",
    "dma_sh": "φηθ",
    "no_mask": "φηθ",
    "no_input_norm": "φηθ",
    "no_output_norm": "φηθ",
}


def parameter_groups(agent):
    """The parameters by their symbols."""
    networks = {"φ": agent.g, "η": agent.h, "θ": agent.f, "ζ": agent.Q, "ξ": agent.pi}
    networks["ζ̄"] = agent.Q_target
    groups = {"α": [agent.log_alpha]}
    for name, network in networks.items():
        if network is not None:
            groups[name] = list(network.parameters())
    return groups


def leads_to(loss, groups):
    """The groups in which the graph of `loss` ends: what its backward pass reaches."""
    seen, nodes, ends = set(), [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ends.add(id(getattr(node, "variable", None)))
            nodes += [following for following, _ in node.next_functions]
    reached = set()
    for name, group in groups.items():
        found = [id(p) in ends for p in group]
        assert all(found) or not any(found), f"part of {name} only"
        if any(found):
            reached.add(name)
    return reached


class Watch:
    """Looks on while `update` runs.

    losses: each loss, the groups to which it leads, and the ω that it was given.
    steps: each optimizer step, and the groups that it changed.
    """

    def __init__(self, agent, monkeypatch):
        self.agent, self.groups = agent, parameter_groups(agent)
        self.losses, self.steps, self.last = [], [], self.values()
        for name in ("dynamics", "critic", "actor", "temperature"):
            monkeypatch.setattr(dmash, f"{name}_loss", self.watched_loss(name))
        for name, optimizer in agent.optimizers.items():
            monkeypatch.setattr(optimizer, "step", self.watched_step(name, optimizer.step))

    def watched_loss(self, name):
        original = getattr(dmash, f"{name}_loss")
        signature = inspect.signature(original)

        def loss(*arguments):
            given = signature.bind(*arguments).arguments
            result = original(*arguments)
            value = result[0] if name == "actor" else result
            self.losses.append((name, leads_to(value, self.groups), given.get("omega")))
            return result

        return loss

    def watched_step(self, name, original):
        def step():
            assert not self.changed()  # nothing moves but by a step
            original()
            self.steps.append((name, self.changed()))

        return step

    def values(self):
        groups = self.groups.items()
        return {name: [p.detach().clone() for p in group] for name, group in groups}

    def changed(self):
        """The groups that changed since this was last asked."""
        now, names = self.values(), set()
        for name, group in now.items():
            moved = [not torch.equal(p, old) for p, old in zip(group, self.last[name])]
            assert all(moved) or not any(moved), f"part of {name} is untouched"
            if any(moved):
                names.add(name)
        self.last = now
        return names

    def update(self, batch, step):
        """What `update` reports, the losses and steps of it, and what changed after the last step.

        A loss comes with the groups that it leads to, a step with those that it changed.
        """
        self.losses, self.steps = [], []
        reported = self.agent.update(batch, step)
        reached = [(name, groups) for name, groups, _ in self.losses]
        return reported, reached, self.steps, self.changed()


@pytest.mark.parametrize("method", METHODS)
def test_gradient_routing(method, monkeypatch):
    """What each loss leads to, and what its step changes, in the order of Algorithm 2.

    A loss of RL that leads to φ or η shows here even if no step changes them.
    """
    watch = Watch(small_agent(method=method), monkeypatch)
    first = [("critic", {"ζ"})]
    if ROUTING[method]:
        first.insert(0, ("dynamics", set(ROUTING[method])))
    policy = [("actor", {"ξ"}), ("temperature", {"α"})]
    for step in (1, 2, 3, 4):
        reported, reached, changed, at_last = watch.update(random_batch(), step)
        expected = first + 2 * policy if step % 2 == 0 else first
        assert reached == expected
        assert changed == expected
        assert at_last == {"ζ̄"}
        names = {f"{name}_loss" for name, _ in expected} - {"temperature_loss"}
        assert set(reported) == names | {"alpha"}
        for value in reported.values():
            assert value.ndim == 0 and not value.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_update_infers_once_and_gives_the_rl_losses_omega_as_a_constant(method, monkeypatch):
    """Lines 2 and 4: one draw of masks for all losses. Only the dynamics loss can reach φ and η."""
    agent, batch, inferred = small_agent(method=method), random_batch(), []
    infer = agent.infer

    def watched_infer(tau, noisy, c):
        assert tau is batch.tau and c is batch.c and noisy
        inferred.append(infer(tau, noisy, c))
        return inferred[-1]

    monkeypatch.setattr(agent, "infer", watched_infer)
    watch = Watch(agent, monkeypatch)
    watch.update(batch, 2)
    [(_, omega)] = inferred  # fails unless it ran exactly once
    for name, _, given in watch.losses:
        if name == "dynamics":
            assert given is omega
            assert all(x.requires_grad for x in tensors(given))
        elif name != "temperature":
            assert equal(given, omega)
            assert not any(x.requires_grad for x in tensors(given))


def test_update_fails_without_the_stop_gradient(monkeypatch):
    """Line 4: without it the critic loss leads to encoder and hypernetwork, and breaks on them."""
    source, line = inspect.getsource(dmash.Agent.update), "omega = omega.detach()"
    assert source.count(line) == 1
    names = {}
    exec(textwrap.dedent(source).replace(line, ""), vars(dmash), names)
    monkeypatch.setattr(dmash.Agent, "update", names["update"])
    agent = small_agent()
    watch = Watch(agent, monkeypatch)
    with pytest.raises(RuntimeError):
        agent.update(random_batch(), 1)
    name, reached, _ = watch.losses[-1]
    assert name == "critic"
    assert reached == {"φ", "η", "ζ"}


RATES = {"φ": 1e-3, "η": 1e-3, "θ": 1e-3, "ζ": 2e-3, "ξ": 3e-3, "α": 4e-3}
OTHER_SETTINGS = dict(dynamics_lr=1e-3, critic_lr=2e-3, actor_lr=3e-3, alpha_lr=4e-3)
OTHER_SETTINGS |= dict(gamma=0.8, polyak=0.2, alpha=0.3)


class AnotherUpdate:
    """Algorithm 2 in another way: torch.autograd.grad, and an Adam for each group."""

    def __init__(self, agent):
        self.agent, self.groups, self.adams = agent, parameter_groups(agent), {}
        for name, rate in RATES.items():
            if name in self.groups:
                self.adams[name] = torch.optim.Adam(self.groups[name], rate)

    def descend(self, loss, names):
        parameters = [p for name in names for p in self.groups[name]]
        for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
            p.grad = gradient
        for name in names:
            self.adams[name].step()

    def update(self, batch, step):
        agent, dynamics = self.agent, ROUTING[self.agent.cfg.method]
        _, omega = agent.infer(batch.tau, noisy=True, c=batch.c)
        if dynamics:
            loss = dmash.dynamics_loss(agent.f, omega, batch)
            if agent.cfg.method == "dma_pearl":
                loss = loss * (1 + 0.4 * agent.g.kl)
            self.descend(loss, dynamics)
            omega = omega.detach()
        alpha = agent.log_alpha.exp().item()
        Q, Q_target, pi = agent.Q, agent.Q_target, agent.pi
        loss = dmash.critic_loss(pi, Q, Q_target, alpha, omega, batch, 0.8)
        self.descend(loss, "ζ")
        if step % 2 == 0:
            for _ in range(2):
                alpha = agent.log_alpha.exp().item()
                loss, log_prob = dmash.actor_loss(pi, Q, alpha, omega, batch)
                self.descend(loss, "ξ")
                loss = dmash.temperature_loss(agent.log_alpha, log_prob, -float(D_A))
                self.descend(loss, "α")
        for target, p in zip(self.groups["ζ̄"], self.groups["ζ"]):
            target.data = 0.8 * target + 0.2 * p.detach()


@pytest.mark.parametrize("method", METHODS)
def test_update_equals_algorithm_2_in_another_way(method):
    """Lines 2 to 7: the same weights after four updates, each group at its own learning rate."""
    ours, theirs = [small_agent(method=method, **OTHER_SETTINGS).double() for _ in range(2)]
    theirs.load_state_dict(ours.state_dict())
    other = AnotherUpdate(theirs)
    for number in (1, 2, 3, 4):
        batch = dmash.Batch(*(x.double() for x in random_batch()))
        for agent in (ours, other):
            torch.manual_seed(number)
            agent.update(batch, number)
        for name, group in parameter_groups(ours).items():
            for p, q in zip(group, other.groups[name], strict=True):
                assert_close(p, q, msg=f"{name}, update {number}")


def test_update_moves_the_target_critics_by_rho():
    """Line 7, with the paper's ρ. Targets stay leaves, or a graph would grow with them."""
    agent = small_agent()
    for step in (1, 2, 3):
        before = [p.clone() for p in agent.Q_target.parameters()]
        agent.update(random_batch(), step)
        ours = zip(agent.Q_target.parameters(), before, agent.Q.parameters(), strict=True)
        for target, old, new in ours:
            assert_close(target, 0.995 * old + 0.005 * new)
            assert target.is_leaf and not target.requires_grad


def test_update_weighs_the_dynamics_loss_of_pearl_by_its_kl(monkeypatch):
    """L (1 + 0.4 KL) is minimised. L is reported."""
    agent, batch = small_agent(method="dma_pearl"), random_batch()
    with torch.no_grad():
        agent.g.variance_norm.weight *= 20  # so that the KL is not close to zero
    _, kl = pearl_code(agent.g, batch.tau)
    minimised, backward = [], torch.Tensor.backward

    def watched_backward(loss):
        minimised.append(loss.item())
        backward(loss)

    monkeypatch.setattr(torch.Tensor, "backward", watched_backward)
    losses = agent.update(batch, 1)
    assert kl > 0.01
    assert minimised[0] == pytest.approx((losses["dynamics_loss"] * (1 + 0.4 * kl)).item())


def test_update_averages_the_policy_where_asked():
    """The average starts as the policy, follows each of its steps, and acts at evaluation only."""
    assert small_agent().pi_average is None
    agent = small_agent(policy_average=0.1)
    by_hand = [p.detach().clone() for p in agent.pi.parameters()]
    optimizer_step = agent.optimizers["actor"].step

    def watched_step():
        optimizer_step()
        for average, p in zip(by_hand, agent.pi.parameters()):
            average += 0.1 * (p.detach() - average)

    agent.optimizers["actor"].step = watched_step
    for number in range(1, 5):
        agent.update(random_batch(), number)
    for average, p in zip(agent.pi_average.parameters(), by_hand, strict=True):
        assert_close(average, p)
        assert not average.requires_grad
    s, omega = torch.randn(B, D_S), random_omega()
    averaged = agent.pi_average.mean(s, omega)
    assert torch.equal(agent.act(s, omega, noisy=False), averaged)
    assert not torch.equal(agent.pi.mean(s, omega), averaged)
    a = with_seed(agent.act, s, omega, True)
    assert torch.equal(a, with_seed(agent.pi.sample, s, omega)[0])


def test_agent_starts_with_the_temperature_of_its_config():
    assert small_agent().alpha == 1
    assert small_agent(alpha=0.1).alpha.item() == pytest.approx(0.1)


# The rows of each call of a hypernetwork, in an update with a policy step: of the shared one (η),
# and of own ones in f, in π, in a critic and in its target. π and Q₁ run once for the critic loss
# and twice for the policy loss, Q̄₁ once.
HYPERNETWORKS = {
    "dma_star_sh": {"η": [B]},
    "dma_star_h": {"f": [B], "π": [B] * 3, "Q₁": [B] * 3, "Q̄₁": [B]},
    "rl_adapters": {"π": [B] * 3, "Q₁": [B] * 3, "Q̄₁": [B]},
    "da": {"π": [N] * 3, "Q₁": [N] * 3, "Q̄₁": [N]},  # a row for each context
}


@pytest.mark.parametrize("method", HYPERNETWORKS)
def test_update_runs_hypernetworks_no_more_often_than_needed(method):
    agent, ran = small_agent(method=method), {}
    networks = {"f": agent.f, "π": agent.pi, "Q₁": agent.Q.Q1, "Q̄₁": agent.Q_target.Q1}
    hypernetworks = {"η": agent.h}
    for name, network in networks.items():
        hypernetworks[name] = getattr(network, "own", None)

    def count_rows(name, h):
        rows = ran[name] = []
        h.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))

    for name, h in hypernetworks.items():
        if h is not None:
            count_rows(name, h)
    agent.update(random_batch(), 2)
    assert ran == HYPERNETWORKS[method]


# ---- Replay -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_windows_hold_past_transitions_of_their_own_context(seed):
    """Each row says its context and its time. Random sizes; the ring may be filled again."""
    rng = np.random.default_rng(seed)
    N, K = int(rng.integers(1, 5)), int(rng.integers(1, 9))
    L, capacity = int(rng.integers(1, K + 1)), K + int(rng.integers(1, 30))
    context = torch.arange(1.0, N + 1).unsqueeze(-1)
    replay = dmash.Replay(context, capacity, 1, 1, K, L)
    total = int(rng.integers(K + 1, 3 * capacity + 2))
    for t in range(total):
        time = torch.full((N, 1), float(t))
        replay.add(context, time, time.squeeze(-1), 2 * context)
    batch = replay.sample(64 * N + N - 1)  # which is rounded down to equal shares
    each = context.repeat_interleave(64, 0)  # samples of a context stand side by side
    assert torch.equal(batch.s, each) and torch.equal(batch.ds, each)
    assert torch.equal(batch.c, context)
    assert torch.equal(batch.a.squeeze(-1), batch.r)
    assert batch.a.min() >= max(0, total - capacity) + K  # else its window is not stored
    assert batch.a.max() <= total - 1
    assert batch.tau.shape == (64 * N, L, 3)
    assert (batch.tau[..., 0] == each).all() and (batch.tau[..., 2] == each).all()
    age = batch.a - batch.tau[..., 1]
    assert age.min() >= 1  # never the transition to predict
    assert age.max() <= K


class Clock:
    """Stands for a VectorEnv. Observes context, clock and episode; episodes have random lengths."""

    def __init__(self, N, rng):
        self.N, self.d_s, self.d_a = N, 3, 1
        self.rng, self.clock, self.episode = rng, 0, 0
        self.c = np.arange(1.0, N + 1, dtype=np.float32)[:, None]

    def observe(self):
        rows = [[1.0 + n, self.clock, self.episode] for n in range(self.N)]
        return np.array(rows, dtype=np.float32)

    def reset(self):
        self.episode += 1
        self.left = self.rng.integers(1, 12)
        return self.observe()

    def step(self, actions):
        self.clock += 1
        self.left -= 1
        return self.observe(), np.zeros(self.N, dtype=np.float32), self.left <= 0


@pytest.mark.parametrize("seed", range(20))
def test_windows_reach_over_resets_and_transitions_do_not(seed):
    rng = np.random.default_rng(seed)
    N, K = int(rng.integers(1, 4)), int(rng.integers(1, 9))
    cfg = SimpleNamespace(K=K, L=K, device="cpu")
    agent, capacity = SimpleNamespace(cfg=cfg, g="an encoder"), K + int(rng.integers(1, 40))
    rollout = dmash.Rollout(agent, Clock(N, rng), noisy=True, capacity=capacity)
    replay = rollout.replay
    for _ in range(int(rng.integers(K + 1, 100))):
        rollout.collect(random=True)
        assert torch.equal(rollout.s[:, 1], torch.full((N,), float(replay.t)))
    batch = replay.sample(40 * N)
    one_step = torch.tensor([0.0, 1.0, 0.0])  # same context, next clock, same episode
    assert torch.equal(batch.ds, one_step.expand_as(batch.ds))
    assert torch.equal(batch.s[:, :1], batch.c.repeat_interleave(40, 0))
    assert (batch.tau[..., 0] == batch.s[:, :1]).all()
    age, ages = batch.s[:, 1:2] - batch.tau[..., 1], torch.arange(1.0, K + 1)
    assert torch.equal(age.sort().values, ages.expand(len(age), K))  # exactly the last K
    latest = replay.latest(noisy=False)
    assert torch.equal(latest[..., 1], (replay.t - ages.flip(0)).expand(N, K))


def test_windows_before_the_first_transitions_are_zeros():
    replay = dmash.Replay(torch.zeros(2, 1), 8, 1, 1, K=4, L=4)
    assert torch.equal(replay.latest(noisy=False), torch.zeros(2, 4, 3))
    replay.add(torch.ones(2, 1), torch.ones(2, 1), torch.ones(2), torch.ones(2, 1))
    latest = replay.latest(noisy=False)
    assert (latest[:, :3] == 0).all()
    assert (latest[:, 3, :2] == 1).all()


def test_windows_are_read_at_random_for_training_and_evenly_for_evaluation():
    replay = dmash.Replay(torch.zeros(1, 1), 100, 1, 1, K=90, L=4)
    for t in range(100):
        time = torch.full((1, 1), float(t))
        replay.add(time, time, time[0], time)
    assert replay.latest(noisy=False)[0, :, 1].tolist() == [10, 39, 69, 99]
    assert not torch.equal(replay.latest(noisy=True), replay.latest(noisy=True))
    batch = replay.sample(300)
    ages = batch.a - batch.tau[..., 1]
    assert len(ages.unique()) > 50


def test_sample_draws_all_stored_transitions_alike():
    """And in each context others."""
    replay = dmash.Replay(torch.zeros(2, 1), 12, 1, 1, K=2, L=1)
    for t in range(20):
        time = torch.full((2, 1), float(t))
        replay.add(time, time, time[:, 0], time)
    first, second = replay.sample(4000).r.long().chunk(2)
    assert not torch.equal(first, second)
    counts = torch.bincount(first, minlength=20)
    assert (counts[:10] == 0).all()  # overwritten, or without a window
    assert counts[10:].min() > 150 and counts[10:].max() < 250  # 200 ± 13 expected


@pytest.mark.parametrize("method", ["concat", "da", "dr"])
def test_windows_are_not_cut_where_no_encoder_reads_them(method, monkeypatch):
    monkeypatch.setattr(dmash, "subsample", None)
    agent = dmash.new_agent(small_config(method=method))
    envs = aib_envs.VectorEnv("di_inv", [{}, {}], seed=0)
    rollout = dmash.Rollout(agent, envs, noisy=True, capacity=100)
    rollout.collect()
    assert rollout.replay.sample(8).tau is None


@pytest.mark.parametrize("env, K", [("cartpole_inv", None), ("di_inv", "5e1")])
def test_config_gives_warm_ups_room_in_the_replay(env, K):
    """It holds the last 100,000 steps of a run and their warm-ups."""
    cfg = dmash.Config(env=env, K=K)
    warm_ups = math.ceil(100_000 / aib_envs.lookup(env).horizon) * cfg.K
    assert cfg.buffer == 100_000 + warm_ups
    assert dmash.Config(env=env, buffer=1000).buffer == 1000


# ---- Acting and evaluation ----------------------------------------------------------------------


class Recorder:
    """Stands for an Agent: notes each call of `act`, and acts with zeros. Its ω is the window."""

    g = "an encoder"

    def __init__(self, d_a=2, **settings):
        self.cfg, self.d_a, self.calls = small_config(**settings), d_a, []

    def infer(self, tau, noisy, c):
        assert len(tau) == len(c)
        self.noisy = noisy
        return None, tau

    def act(self, s, omega, noisy):
        assert s.isfinite().all() and omega.isfinite().all()
        assert noisy is self.noisy
        self.calls.append((s.clone(), omega.clone(), noisy))
        return torch.zeros(len(s), self.d_a)


class Driver(Recorder):
    """Drives to the goal and stops there, where the actuators are not inverted."""

    def act(self, s, omega, noisy):
        super().act(s, omega, noisy)
        return (-3 * s[:, :2] - 5 * s[:, 2:]).clamp(-1, 1)


CONTEXTS = [{}, {"mass": 0.5}, {"action_factor": -1}]


def new_envs(contexts=CONTEXTS):
    return aib_envs.VectorEnv("di_inv", contexts, seed=0)


@pytest.mark.parametrize("noisy", [True, False])
def test_rollout_warms_up_for_K_steps_and_then_resets(noisy):
    envs, agent = new_envs(), Driver(K=10)
    rollout = dmash.Rollout(agent, envs, noisy, capacity=200)
    rollout.begin_episode()
    assert len(agent.calls) == rollout.replay.t == 10
    assert (agent.calls[0][1] == 0).all()  # the window is empty at first
    assert not rollout.done
    assert envs.t == 0  # warm-up steps do not count towards the horizon
    assert not torch.equal(rollout.s, agent.calls[0][0])  # a second start, after the first
    assert agent.calls[-1][0][:, 2:].any()  # in the warm-up there was no reset
    assert (rollout.s[:, :2].abs() >= 0.8).all() and (rollout.s[:, 2:] == 0).all()
    tau = with_seed(rollout.replay.latest, noisy)
    with_seed(rollout.step)
    assert torch.equal(agent.calls[-1][1], tau)
    assert (tau[:, -1] != 0).any(-1).all()  # the window survives the reset
    assert all(call[2] is noisy for call in agent.calls)


def test_rollout_may_begin_without_a_warm_up():
    """With an empty window at first; later with what the episode before left there."""
    envs, agent = new_envs(), Recorder(K=10)
    rollout = dmash.Rollout(agent, envs, noisy=False)
    rollout.begin_episode(warm_up=False)
    assert rollout.replay.t == envs.t == 0
    while not rollout.done:
        rollout.step()
    assert len(agent.calls) == 100
    assert (agent.calls[0][1] == 0).all()
    rollout.begin_episode(warm_up=False)
    assert rollout.replay.t == 100
    assert not rollout.done
    rollout.step()
    assert (agent.calls[-1][1] != 0).any()


@pytest.mark.parametrize("K", [99, 100])
def test_rollout_survives_a_warm_up_as_long_as_an_episode(K):
    rollout = dmash.Rollout(Recorder(K=K), new_envs(), noisy=False, capacity=300)
    rollout.begin_episode()
    steps = 0
    while not rollout.done:
        rollout.step()
        steps += 1
    assert steps == 100


def test_rollout_collects_episodes_that_begin_with_a_warm_up():
    envs, agent = new_envs(), Recorder(K=10)
    rollout = dmash.Rollout(agent, envs, noisy=True, capacity=500)
    for _ in range(201):
        rollout.collect()
    assert rollout.replay.t == 201 + 3 * 10
    assert envs.t == 1


@pytest.mark.parametrize("method", METHODS)
def test_rollout_steps_are_what_the_replay_holds(method):
    """`step` returns s, a, r and the ω of the window before."""
    agent, envs = dmash.Agent(small_config(method=method), 4, 2, 2), new_envs()
    rollout = dmash.Rollout(agent, envs, noisy=False, capacity=30)
    c = torch.tensor([[1.0, 1.0], [0.5, 1.0], [1.0, -1.0]])
    rollout.begin_episode()
    for _ in range(10):  # past the end of the ring
        before, tau = rollout.s.clone(), rollout.replay.latest(noisy=False)
        s, a, r, omega = rollout.step()
        row = rollout.replay.rows[(rollout.replay.t - 1) % 30]
        assert torch.equal(row, torch.cat([s, a, rollout.s - before, r[:, None]], -1))
        assert torch.equal(s, before)
        with torch.no_grad():
            _, expected = agent.infer(tau, noisy=False, c=c)
        assert equal(omega, expected)
        assert not any(x.requires_grad for x in tensors(omega))
        assert torch.equal(a, agent.act(s, expected, noisy=False))
        assert_close(rollout.s, torch.from_numpy(envs.task.observation()).float())


def test_rollout_draws_random_actions_uniformly():
    rollout = dmash.Rollout(Recorder(), new_envs([{}] * 50), noisy=True, capacity=200)
    for _ in range(40):
        rollout.collect(random=True)
    a = rollout.replay.rows[: rollout.replay.t, :, 4:6].flatten()  # the warm-up is random, too
    assert len(a) == 64 * 100
    assert -1 <= a.min() < -0.99 and 0.99 < a.max() <= 1
    assert abs(a.mean()) < 0.03 and abs(a.var() - 1 / 3) < 0.015  # 4 standard errors


def test_critic_loss_bootstraps_at_the_time_limit():
    """It is no terminal state. The last s' is the state that was reached, not the next start."""
    envs = new_envs()
    rollout = dmash.Rollout(Driver(K=1), envs, noisy=True, capacity=2)
    rollout.begin_episode()
    while not rollout.done:
        rollout.step()
    batch = rollout.replay.sample(B)  # the last transition alone has its window in the ring
    reached = torch.from_numpy(envs.task.observation()).float()
    assert_close(batch.s + batch.ds, reached.repeat_interleave(B // 3, 0))
    networks = [
        dmash.Actor(4, 2, d_x=D_X),
        dmash.Critics(4, 2, d_x=D_X),
        dmash.Critics(4, 2, d_x=D_X),
    ]
    arguments = [*networks, torch.tensor(0.3), random_omega(), batch, 0.9]
    loss = with_seed(dmash.critic_loss, *arguments)
    assert_close(loss, with_seed(critic_loss_by_hand, *arguments))


@pytest.mark.parametrize("method", METHODS)
def test_evaluate_is_repeatable_and_changes_nothing(method, short_episodes):
    """Neither the agent nor torch's generator, threads and default type."""
    threads = torch.get_num_threads()
    cfg = small_config(method=method, K=5, threads=threads + 1)
    agent = dmash.Agent(cfg, 4, 2, 2)
    with torch.no_grad():
        agent.pi.head.bias[:] = torch.tensor([0.3, -0.2, 0.0, 0.0])  # so that it moves
    weights = {name: value.clone() for name, value in agent.state_dict().items()}
    generator = torch.get_rng_state()
    returns, diverged = dmash.evaluate(agent, cfg, CONTEXTS, rollouts=2)
    again, _ = dmash.evaluate(agent, cfg, CONTEXTS, rollouts=2)
    assert returns.shape == diverged.shape == (3, 2)
    assert not diverged.any()
    np.testing.assert_array_equal(again, returns)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.get_num_threads() == threads
    assert torch.get_default_dtype() == torch.float32
    assert all(p.grad is None for p in agent.parameters())
    for name, value in agent.state_dict().items():
        assert torch.equal(value, weights[name])


GOAL = np.array([0.02, 0.03, 0.0, 0.0])  # at rest in the goal: a reward of 1 a step


@pytest.fixture
def start_in_the_goal(monkeypatch):
    monkeypatch.setattr(aib_envs.DoubleIntegrator, "initial_state", lambda task, i, rng: GOAL)


def test_evaluate_sums_the_rewards_of_the_episode_without_its_warm_up(start_in_the_goal):
    agent = Recorder()
    returns, diverged = dmash.evaluate(agent, agent.cfg, CONTEXTS)
    np.testing.assert_array_equal(returns, np.full((3, 1), 100.0))
    assert not diverged.any()
    assert not any(noisy for _, _, noisy in agent.calls)  # no masks, no samples


def test_evaluate_starts_the_first_of_many_rollouts_where_a_single_one_starts():
    one, many = Driver(K=7), Driver(K=7)
    single, _ = dmash.evaluate(one, one.cfg, CONTEXTS, rollouts=1)
    several, _ = dmash.evaluate(many, many.cfg, CONTEXTS, rollouts=4)
    first, all_starts = one.calls[7][0], many.calls[7][0]  # call 7 is the first after the warm-up
    assert torch.equal(all_starts[:3], first)
    assert len(all_starts.unique(dim=0)) == 12
    np.testing.assert_array_equal(several[:, :1], single)
    assert (several[:2] > 20).all() and (several[2] == 0).all()  # each context in its own row


def test_evaluate_takes_its_seed_or_that_of_the_run():
    def start(seed=None, run_seed=1):
        agent = Driver(K=3, seed=run_seed)
        dmash.evaluate(agent, agent.cfg, [{}, {}], seed=seed)
        return agent.calls[3][0]

    assert torch.equal(start(), start(1))
    assert torch.equal(start(2), start(run_seed=2))
    assert not torch.equal(start(1), start(2))


def test_evaluate_starts_elsewhere_than_training():
    agent = Driver(K=3)
    contexts = aib_envs.context_sets("di_inv", N)["train"]
    dmash.evaluate(agent, agent.cfg, contexts)
    rollout = dmash.Run(agent.cfg, "unused").rollout
    rollout.reset()
    assert not torch.equal(rollout.s, agent.calls[0][0])


class Fault(Recorder):
    """Acts with zeros. At step n one number of instance 1 is wrong: what it observes, its reward
    or its action. Steps of the warm-up count."""

    def __init__(self, what, value, n, monkeypatch):
        super().__init__(K=24)
        self.what, self.value, self.n = what, value, n
        original = aib_envs.VectorEnv.step

        def step(envs, actions):
            s2, r, done = original(envs, actions)
            if len(self.calls) == n and what == "observation":
                s2[1, 1] = value
            if len(self.calls) == n and what == "reward":
                r[1] = value
            return s2, r, done

        monkeypatch.setattr(aib_envs.VectorEnv, "step", step)

    def act(self, s, omega, noisy):
        a = super().act(s, omega, noisy)
        if len(self.calls) == self.n and self.what == "action":
            a[1, 1] = self.value
        return a


SOURCES, VALUES = ["observation", "reward", "action"], [math.nan, math.inf, -math.inf]
each_fault = pytest.mark.parametrize("what, value", list(itertools.product(SOURCES, VALUES)))


@each_fault
def test_evaluate_keeps_what_a_diverged_episode_collected(
    what, value, start_in_the_goal, monkeypatch
):
    """What comes after does not count. No other episode notices."""
    agent = Fault(what, value, 24 + 30, monkeypatch)
    returns, diverged = dmash.evaluate(agent, agent.cfg, CONTEXTS, rollouts=2)
    np.testing.assert_array_equal(returns, [[100, 100], [29, 100], [100, 100]])
    np.testing.assert_array_equal(diverged, [[False, False], [True, False], [False, False]])


@each_fault
def test_evaluate_forgives_a_diverged_warm_up(what, value, start_in_the_goal, monkeypatch):
    agent = Fault(what, value, 20, monkeypatch)
    returns, diverged = dmash.evaluate(agent, agent.cfg, CONTEXTS)
    np.testing.assert_array_equal(returns, np.full((3, 1), 100.0))
    assert not diverged.any()


@each_fault
def test_rollout_for_training_refuses_what_is_not_finite(what, value, monkeypatch):
    agent = Fault(what, value, 24 + 30, monkeypatch)
    rollout = dmash.Rollout(agent, new_envs(), noisy=True, capacity=200)
    for _ in range(29):
        rollout.collect()
    with pytest.raises(FloatingPointError, match=f"^{what} is not finite$"):
        rollout.collect()
    assert rollout.replay.t == 24 + 29
    assert rollout.replay.rows.isfinite().all()


def test_evaluate_counts_nothing_of_an_episode_that_begins_diverged(monkeypatch):
    def initial_state(task, i, rng):
        if i == 1:
            return GOAL * math.nan
        return GOAL

    monkeypatch.setattr(aib_envs.DoubleIntegrator, "initial_state", initial_state)
    agent = Recorder()
    returns, diverged = dmash.evaluate(agent, agent.cfg, CONTEXTS)
    assert returns[:, 0].tolist() == [100, 0, 100]
    assert diverged[:, 0].tolist() == [False, True, False]
    with pytest.raises(FloatingPointError, match="^observation is not finite$"):
        dmash.Rollout(agent, new_envs(), noisy=True).reset()


def test_evaluate_survives_a_divergence_of_mujoco(tmp_path, monkeypatch):
    """One of three cartpoles starts far too fast."""
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log where it is
    agent, ordinary = Recorder(1, env="cartpole_inv", K=20), aib_envs.Cartpole.initial_state
    contexts = [{}, {}, {"length": 0.8}]
    undisturbed, _ = dmash.evaluate(agent, agent.cfg, contexts)

    def initial_state(task, i, rng):
        state = ordinary(task, i, rng)
        return np.array([0.0, 0.0, 1e11, 1e11]) if i == 1 else state

    monkeypatch.setattr(aib_envs.Cartpole, "initial_state", initial_state)
    returns, diverged = dmash.evaluate(agent, agent.cfg, contexts)
    assert diverged[:, 0].tolist() == [False, True, False]
    np.testing.assert_array_equal(returns[[0, 2]], undisturbed[[0, 2]])
    assert 0 <= returns[1, 0] < 100 < undisturbed[1, 0]


# ---- Runs, end to end ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run."""
    cfg = small_config(out=str(tmp_path_factory.mktemp("runs")))
    dmash.Run.start(cfg)
    return dmash.run_folder(cfg)


def last_row(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))[-1]


def same(x, y):
    """Whether two nests of dicts, lists, tensors and numbers are equal bit for bit."""
    if isinstance(x, torch.Tensor):
        return torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)
    if isinstance(x, list):
        return len(x) == len(y) and all(map(same, x, y))
    return repr(x) == repr(y)  # where nan equals nan


def result(folder):
    """All that a run computed, without times."""
    state = dmash.load(folder / "checkpoint.pt")
    del state["seconds"], state["version"], state["settings"]["out"]
    for row in state["metrics"]:
        del row["seconds"]
    return state


def start_and_stop(cfg, step, monkeypatch):
    """Sends SIGTERM to a new run in its gradient step number `step`."""
    gradient_step = dmash.Run.gradient_step

    def stopping(run):
        gradient_step(run)
        if run.step == step:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(dmash.Run, "gradient_step", stopping)
        with pytest.raises(dmash.Stopped):
            dmash.Run.start(cfg)
    assert dmash.load(dmash.run_folder(cfg) / "checkpoint.pt")["step"] == step


def test_run_differs_with_another_seed(run, tmp_path, no_pictures):
    cfg = small_config(out=str(tmp_path), seed=2)
    dmash.Run.start(cfg)
    assert last_row(dmash.run_folder(cfg))["critic_loss"] != last_row(run)["critic_loss"]


@pytest.mark.parametrize("step", [19, 33])
def test_run_that_was_stopped_resumes_exactly(step, run, tmp_path, monkeypatch, no_pictures):
    """Before an evaluation, and in mid-episode after it. So equal seeds give equal runs, too."""
    cfg = small_config(out=str(tmp_path))
    start_and_stop(cfg, step, monkeypatch)
    dmash.Run.resume(dmash.run_folder(cfg))
    assert same(result(dmash.run_folder(cfg)), result(run))


@pytest.mark.parametrize("method", METHODS)
def test_run_trains_every_method_and_resumes_it_exactly(
    method, tmp_path, monkeypatch, no_pictures, short_episodes
):
    """Gradient steps move every weight of every network. K = 10: the LSTM reads two steps."""
    settings = dict(method=method, K=10, steps=6, eval_every=3, random_steps=10)
    whole = small_config(out=str(tmp_path / "whole"), **settings)
    parts = small_config(out=str(tmp_path / "parts"), **settings)
    dmash.Run.start(whole)
    start_and_stop(parts, 4, monkeypatch)
    dmash.Run.resume(dmash.run_folder(parts))
    trained = result(dmash.run_folder(whole))
    assert same(result(dmash.run_folder(parts)), trained)
    fresh = dmash.Run(whole, tmp_path).agent.state_dict()
    assert set(fresh) == set(trained["agent"])
    for name, weight in fresh.items():
        assert not torch.equal(weight, trained["agent"][name]), name


def test_run_is_reproduced_by_eval(run, capsys):
    """The last row of metrics.csv, from policy.pt alone."""
    options = ["--rollouts", "1", "--threads", "1"]
    assert dmash.main(["--eval", str(run / "policy.pt"), *options]) == 0
    row, printed = last_row(run), capsys.readouterr().out.splitlines()[-1]
    means = "  ".join(f"{name} {float(row[name]):.1f}" for name in dmash.SETS)
    assert printed == f"average episodic return: {means}"


AGENT = HERE / "results/agent/policy.pt"


def test_the_agent_in_the_repository_balances_normal_and_inverted_motors():
    """With lengths inside and outside the training range: what a policy computes is still right."""
    if not AGENT.is_file():
        pytest.skip("results/ is not here")
    cfg, agent = dmash.load_policy(AGENT)
    contexts = itertools.product((0.4, 1.0), (1, -1))
    contexts = [{"length": length, "action_factor": factor} for length, factor in contexts]
    returns, _ = dmash.evaluate(agent, cfg, contexts)
    assert returns.min() > 800, returns


def test_dynamics_model_learns_and_reads_the_sign_of_the_motors():
    """With the code of the other sign, the model is worse than the guess that nothing moves."""
    settings = dict(contexts=8, batch=64, hidden=64, bottleneck=8, dynamics_lr=1e-3, mask=0.0)
    run = dmash.Run(small_config(**settings), "unused")
    agent, rollout = run.agent, run.rollout
    for _ in range(300):
        rollout.collect(random=True)
    for _ in range(600):
        batch = rollout.replay.sample(64)
        loss = dmash.dynamics_loss(agent.f, agent.infer(batch.tau, noisy=True)[1], batch)
        agent.optimizers["dynamics"].zero_grad()
        loss.backward()
        agent.optimizers["dynamics"].step()
    batch = rollout.replay.sample(400)
    positive = batch.c[:, 1].repeat_interleave(50) > 0  # the actuators' sign
    with torch.no_grad():
        z, omega = agent.infer(batch.tau, noisy=False)
        other = torch.where(positive[:, None], z[~positive].mean(0), z[positive].mean(0))
        right = dmash.dynamics_loss(agent.f, omega, batch)
        wrong = dmash.dynamics_loss(agent.f, agent.h(other), batch)
    nothing_moves = batch.ds.square().mean()
    assert right < 0.1 * nothing_moves
    assert wrong > nothing_moves
