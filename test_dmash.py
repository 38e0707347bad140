"""Tests of dmash.py and aib_envs.py: each compares with something computed another way (an oracle)."""

import contextlib
import copy
import csv
import dataclasses
import gc
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
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
D_S, D_A, D_C, B, N, L = 5, 1, 2, 12, 4, 6


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small_config(**changes):
    """A fast but real configuration: DI, 4 contexts, every network at full size."""
    settings = dict(env="di_inv", method="dma_star_sh", contexts=4, batch=32, random_steps=60, steps=40, eval_every=20)
    return dmash.Config(**(settings | dict(rollouts=1, threads=1) | changes))


def small_arguments(out, **changes):
    cfg = small_config(**changes)
    names = ("env", "method", "contexts", "batch", "random_steps", "steps", "eval_every", "rollouts", "threads", "seed")
    settings = [text for name in (*names, "K") for text in (dmash.flag(name), str(getattr(cfg, name)))]
    return settings + ["--out", str(out)]


def command(*arguments, code=None, cwd=HERE, environment={}):
    script = ["-c", code] if code else [str(HERE / "dmash.py")]
    script = [sys.executable, *script, *map(str, arguments)]
    world = os.environ | environment
    return subprocess.run(script, capture_output=True, text=True, cwd=cwd, timeout=300, env=world)


def random_batch(B=B, N=N):
    return dmash.Batch(
        s=torch.randn(B, D_S),
        a=torch.rand(B, D_A) * 2 - 1,
        ds=torch.randn(B, D_S),
        r=torch.rand(B),
        tau=torch.randn(B, L, 2 * D_S + D_A),
        c=torch.randn(N, D_C),
    )


def random_omega(B=B, **options):
    return dmash.Omega(*(torch.randn(B, *shape, **options) / 8 for shape in dmash.Hypernetwork().shapes))


def small_agent(**changes):
    return dmash.Agent(small_config(**changes), D_S, D_A, D_C)


class Row(NamedTuple):
    """What a method is."""

    context: str  # inferred, true, none
    rl: str  # how it enters π and Q, or -
    f: str  # how it enters f, or - where there is no f
    hypernetwork: str  # shared, own or -
    mask: float
    input_norm: bool
    output_norm: bool
    kl: float
    into_eta: str  # the RL losses that reach η


TABLE = """
    dma_star_sh      inferred  adapter  adapter  shared  .4   yes  yes  0   -
    dma_star_h       inferred  adapter  adapter  own     .4   yes  yes  0   -
    rl_adapters      inferred  adapter  concat   own     .4   yes  yes  0   -
    dma_star         inferred  concat   concat   -       .2   yes  yes  0   -
    dma              inferred  concat   concat   -       0    no   no   0   -
    dma_pearl        inferred  concat   concat   -       0    no   no   .4  -
    concat           true      concat   -        -       0    no   no   0   -
    da               true      adapter  -        own     0    no   no   0   -
    dr               none      -        -        -       0    no   no   0   -
    dma_sh           inferred  adapter  adapter  shared  0    no   no   0   -
    no_mask          inferred  adapter  adapter  shared  0    yes  yes  0   -
    no_input_norm    inferred  adapter  adapter  shared  .4   no   yes  0   -
    no_output_norm   inferred  adapter  adapter  shared  .4   yes  no   0   -
    critic_into_eta  inferred  adapter  adapter  shared  .4   yes  yes  0   critic
    actor_into_eta   inferred  adapter  adapter  shared  .4   yes  yes  0   actor
    both_into_eta    inferred  adapter  adapter  shared  .4   yes  yes  0   critic,actor
"""
TABLE = {name: row for name, *row in map(str.split, TABLE.strip().splitlines())}
TABLE = {
    name: Row(*how, float(mask), norm_in == "yes", norm_out == "yes", float(kl), into)
    for name, (*how, mask, norm_in, norm_out, kl, into) in TABLE.items()
}
INFERRED = [name for name, row in TABLE.items() if row.context == "inferred"]


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


@pytest.mark.parametrize("method", INFERRED)
def test_the_encoder_masks_at_its_method_s_rate_and_only_if_noisy(method):
    seen, tau = [], torch.ones(400, 25, 2 * D_S + D_A)
    for changes, rate in (({}, TABLE[method].mask), ({"mask": 0.7}, 0.7)):  # by method, or as the user sets it
        g = small_agent(method=method, **changes).g
        g.embed.register_forward_pre_hook(lambda embed, inputs: seen.append(inputs[0]))
        g(tau, noisy=True), g(tau, noisy=False)
        masked, unmasked = seen[-2:]
        assert torch.equal(unmasked, tau)
        for vector in masked.split([D_S, D_A, D_S], -1):
            assert abs((vector[..., 0] == 0).float().mean().item() - rate) < (0.02 if rate else 1e-9)


def test_encoder_masks_in_training_mode_and_never_at_evaluation():
    g = dmash.ContextEncoder(D_S, D_A, mask=0.4)
    tau = torch.randn(B, L, 2 * D_S + D_A)
    assert torch.equal(g(tau, noisy=False)[0], g(tau, noisy=False)[0])
    assert not torch.equal(g(tau, noisy=True)[0], g(tau, noisy=True)[0])
    unmasked = dmash.ContextEncoder(D_S, D_A, mask=0.0)
    unmasked.load_state_dict(g.state_dict())
    torch.testing.assert_close(unmasked(tau, noisy=True)[0], g(tau, noisy=False)[0])


@pytest.mark.parametrize("method", INFERRED)
def test_encoder_equals_a_step_by_step_lstm(method):
    """With the norms that the method has."""
    g, row = small_agent(method=method).g, TABLE[method]
    tau = 3 * torch.randn(B, L, 2 * D_S + D_A)
    cell = nn.LSTMCell(32, 32)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in g.lstm.state_dict().items()})
    h = c = torch.zeros(B, 32)
    for i in range(L):
        x = tau[:, i] @ g.embed.weight.T
        x = x / x.abs().mean(-1, keepdim=True) if row.input_norm else x
        h, c = cell(x, (h, c))
    z = h @ g.project.weight.T
    z = z.reshape(B, 2, 4).softmax(-1).reshape(B, 8) if row.output_norm else z
    torch.testing.assert_close(g(tau, noisy=False)[0], z)


def test_gaussian_code_equals_torch_distributions():
    """DMA-Pearl: the mean at evaluation, a sample if noisy; its KL as torch.distributions has it."""
    g, n = small_agent(method="dma_pearl").g, 4000
    with torch.no_grad():
        g.project.weight *= 8  # so that means are not all close to zero
        g.variance.weight *= 8
    tau = torch.randn(1, L, 2 * D_S + D_A).expand(n, -1, -1)
    _, (last, _) = g.lstm(g.embed(tau).transpose(0, 1))
    mean, variance = last[0] @ g.project.weight.T, torch.log1p((last[0] @ g.variance.weight.T).exp())
    normal = torch.distributions.Normal(mean.double(), variance.double().sqrt())
    unit = torch.distributions.Normal(torch.zeros(8).double(), torch.ones(8).double())
    (z, kl), (sample, noisy_kl) = g(tau, noisy=False), g(tau, noisy=True)
    torch.testing.assert_close(z, mean)
    for ours in (kl, noisy_kl):
        torch.testing.assert_close(ours.double(), torch.distributions.kl_divergence(normal, unit).mean())
    standard = (sample - mean) / variance.sqrt()
    assert standard.mean(0).abs().max() < 5 / math.sqrt(n) and (standard.std(0) - 1).abs().max() < 5 / math.sqrt(2 * n)
    assert (np.corrcoef(standard.T.detach()) - np.eye(8)).max() < 5 / math.sqrt(n)  # each dimension for itself
    gradient = torch.autograd.grad(sample.sum(), [g.project.weight, g.variance.weight])  # reparameterised
    assert all(grad.abs().sum() > 0 for grad in gradient)


def test_subsampling_size_and_order():
    random = dmash.subsample(300, 24, 4, noisy=True)
    assert random.shape == (300, 4)
    assert all(len(set(row)) == 4 for row in random.tolist())  # without repetition
    assert torch.bincount(random.flatten(), minlength=24).min() > 20  # every position (50 expected)
    assert (random.diff() < 0).any() and (random.diff() > 0).any()  # in random order
    assert len({tuple(row) for row in random.tolist()}) > 290  # drawn per sample
    even = dmash.subsample(3, 24, 4, noisy=False)
    assert even.tolist() == [[0, 7, 15, 23]] * 3  # rounded down, as in the published code
    for K, L in ((128, 25), (24, 4), (7, 1), (1, 1)):
        i = dmash.subsample(1, K, L, noisy=False)[0]
        assert i.shape == (L,) and i.min() >= 0 and i.max() < K and (L == 1 or (i.diff() > 0).all())


@pytest.mark.parametrize("K", [*range(1, 40), 128, 1000])
def test_even_subsampling_is_rounded_down(K):
    """⌊i (K-1) / (L-1)⌋, i = 0 ... L-1, in fractions; the oldest alone where L = 1."""
    for L in range(1, K + 1):
        by_hand = [math.floor(Fraction(i * (K - 1), L - 1)) if L > 1 else 0 for i in range(L)]
        assert dmash.subsample(2, K, L, noisy=False).tolist() == [by_hand] * 2


def test_window_share_is_rounded_down():
    assert (dmash.Config(env="cartpole_inv").L, dmash.Config(env="di_inv").L) == (25, 4)


def test_no_window_is_cut_where_no_encoder_reads_it(monkeypatch):
    monkeypatch.setattr(dmash, "subsample", None)
    for method in ("concat", "da", "dr"):
        cfg = small_config(method=method)
        envs = aib_envs.VectorEnv(cfg.env, aib_envs.context_sets(cfg.env, 4)["train"], seed=0)
        rollout = dmash.Rollout(dmash.new_agent(cfg), envs, noisy=True, capacity=100)
        rollout.collect()
        assert cfg.L == 0 and rollout.replay.sample(8).tau is None


# ---------------------------------------------------------------------------------------------------------------
# Hypernetwork and adapter
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
def test_adapter_and_hypernetwork_equal_a_per_sample_loop(n):
    """Each row of ω serves n samples that follow each other. In double precision: what is left is rounding."""
    h, exact = dmash.Hypernetwork().double(), dict(dtype=torch.float64)
    z, x = torch.randn(B, 8, **exact, requires_grad=True), torch.randn(B * n, 256, **exact, requires_grad=True)
    weights = [z, x, *h.parameters()]

    fast = dmash.adapter(x, h(z))
    slow = torch.zeros(B * n, 256, **exact)
    for b in range(B):
        hidden, shapes = h.trunk(z[b]), ((256, 32), (32,), (32, 256), (256,))
        W_down, b_down, W_up, b_up = (
            (head.weight @ hidden + head.bias).reshape(shape) for head, shape in zip(h.heads, shapes)
        )
        for i in range(b * n, (b + 1) * n):  # column form, as in Eq. 3
            slow[i] = W_up.T @ torch.relu(W_down.T @ x[i] + b_down) + b_up
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)
    direction = torch.randn_like(fast)
    for g_fast, g_slow in zip(
        torch.autograd.grad(fast, weights, direction), torch.autograd.grad(slow, weights, direction)
    ):
        torch.testing.assert_close(g_fast, g_slow, rtol=1e-9, atol=1e-12)


def test_hypernetwork_heads_start_as_pytorch_linear_layers():
    torch.manual_seed(0)
    head, linear = dmash.Hypernetwork().heads[0], nn.Linear(64, 256 * 32)
    for ours, theirs in ((head.weight, linear.weight), (head.bias, linear.bias)):
        assert abs(ours.std() / theirs.std() - 1) < 0.05 and ours.abs().max() <= 1 / 8


def test_omega_in_bfloat16_is_the_same_to_its_three_digits():
    """The heads alone: what comes out is float32, ω and its gradients differ by rounding, all else by nothing."""
    z = torch.rand(B, 8)
    found = {}
    for bfloat16 in (False, True):
        torch.manual_seed(0)
        h = dmash.Hypernetwork(bfloat16=bfloat16)
        omega = h(z)
        sum(w.square().mean() for w in omega).backward()
        assert all(w.dtype == torch.float32 for w in omega)
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in h.parameters())
        found[bfloat16] = [*omega, *(p.grad for p in h.parameters())]
    for exact, rounded in zip(found[False], found[True]):
        assert not torch.equal(exact, rounded)
        assert torch.dist(exact, rounded) < 0.02 * exact.norm()


def test_sizes_of_omega():
    assert [tuple(w.shape) for w in dmash.Hypernetwork()(torch.randn(3, 8))] == [
        (3, 256, 32),
        (3, 1, 32),
        (3, 32, 256),
        (3, 1, 256),
    ]


@pytest.mark.parametrize("how", ["adapter", "own adapter", "concat", "nothing"])
@pytest.mark.parametrize("n", [1, 2])
def test_adapted_network_equals_separate_networks(n, how):
    """Trunk without a last activation, skip connection, ReLU after the sum, head; every network its own weights. What
    is concatenated stands last. n = 2: the critics, a column each."""
    options = dict(
        how=how.removeprefix("own "), d_told=8, make_own=dmash.Hypernetwork if how == "own adapter" else None
    )
    inputs, told = torch.randn(B, 7), random_omega() if how == "adapter" else torch.randn(B, 8)
    if n == 1:
        net = dmash.Network(7, 3, **options)
        nets, outs = [net], [net(inputs, told)]
        assert outs[0].shape == (B, 3)
    else:
        critics = dmash.Critics(4, 3, **options)
        out = critics(*inputs.split([4, 3], -1), told)
        assert out.shape == (B, 2)
        nets, outs = [critics.Q1, critics.Q2], out.split(1, -1)
    for net, out in zip(nets, outs):
        first, _, second = net.trunk
        x = torch.cat([inputs, told], -1) if how == "concat" else inputs
        x = torch.relu(x @ first.weight.T + first.bias) @ second.weight.T + second.bias
        if "adapter" in how:
            x = x + dmash.adapter(x, net.own(told) if how == "own adapter" else told)
        by_hand = torch.relu(x) @ net.head.weight.T + net.head.bias
        torch.testing.assert_close(out, by_hand, rtol=1e-4, atol=1e-5)
    if n == 2:
        assert not torch.equal(outs[0], outs[1])


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
# Methods
# ---------------------------------------------------------------------------------------------------------------

# Inputs and outputs of the published code (commit c74cb4a) for weights set by a formula, encoder in evaluation mode
REFERENCE = HERE / "results" / "method_reference.npz"


def wave(k, *shape):
    """What tensor number k holds: sin(.7 i + k) / √fan, i its entries' number in row-major order."""
    fan = shape[-1] if len(shape) > 1 else 64
    return torch.from_numpy(np.sin(0.7 * np.arange(math.prod(shape)) + k) / math.sqrt(fan)).float().reshape(shape)


@torch.no_grad()
def set_layers(k, *layers):
    """Weights and biases of layers, numbered from k on."""
    for i, p in enumerate(p for layer in layers for p in (layer.weight, layer.bias)):
        p.copy_(wave(k + i, *p.shape))


@torch.no_grad()
def set_hypernetwork(k, h):
    """The reference has one output layer, and ω in the column form of Eq. 3: W_down (32, 256), W_up (256, 32)."""
    set_layers(k, h.trunk[0], h.trunk[2])
    sizes = [256 * 32, 32, 32 * 256, 256]
    columns = zip(wave(k + 4, 16672, 64).split(sizes), wave(k + 5, 16672).split(sizes))
    for head, (weight, bias), shape in zip(h.heads, columns, ((32, 256), (32, 1), (256, 32), (256, 1))):
        head.weight.copy_(weight.unflatten(0, shape).transpose(0, 1).flatten(0, 1))
        head.bias.copy_(bias.unflatten(0, shape).T.flatten())


def reference_agent(method):
    """d_s = 5, d_a = 2, d_c = 2, with the weights of the reference."""
    agent = dmash.Agent(small_config(method=method), 5, 2, 2)
    if agent.g:
        lstm = agent.g.lstm
        tensors = [agent.g.embed.weight, lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0, lstm.bias_hh_l0]
        tensors += [agent.g.project.weight] + ([agent.g.variance.weight] if method == "dma_pearl" else [])
        for k, tensor in enumerate(tensors):
            tensor.data.copy_(wave(k, *tensor.shape))
    for net, k, own in ((agent.f, 20, 10), (agent.pi, 30, 60), (agent.Q.Q1, 40, 70), (agent.Q.Q2, 50, 80)):
        if net:
            set_layers(k, net.trunk[0], net.trunk[2], net.head)
            if net.own:
                set_hypernetwork(own, net.own)
    heads = [wave(34, 2, 256), wave(36, 2, 256)], [wave(35, 2), wave(37, 2)]  # mean and log-std: one layer here
    agent.pi.head.weight.data.copy_(torch.cat(heads[0]))
    agent.pi.head.bias.data.copy_(torch.cat(heads[1]))
    if agent.h:
        set_hypernetwork(10, agent.h)
    return agent


@pytest.mark.parametrize("method", ["dma_star_sh", "dma_star_h", "dma_star", "dma", "dma_pearl", "concat", "da"])
def test_every_method_computes_what_the_published_code_does(method):
    with np.load(REFERENCE) as file:
        reference = {name: torch.from_numpy(file[name]) for name in file}
    expected = {name.removeprefix(method + "/"): x for name, x in reference.items() if name.startswith(method + "/")}
    s, a, ds, c = (reference[name] for name in ("s", "a", "ds", "c"))
    whole = torch.cat([reference[f"window/{name}"] for name in ("s", "a", "ds")], -1)  # (6, 24, 12)
    tau = whole[:, dmash.subsample(1, 24, 4, noisy=False)[0]]
    agent = reference_agent(method)
    z, told, kl = agent.tell(tau, c, noisy=False)
    computed = {}
    if method == "dma_pearl":  # encoder only
        computed |= {"z_mean": z, "kl": kl}
        expected["kl"] = expected["kl"].mean()
    else:
        computed["mean"], computed["log_std"] = agent.pi(s, told)
        computed["Q"] = agent.Q(s, a, told)
        computed |= {"f": agent.f(s, a, told)} if agent.f else {}
        computed |= {"z": z} if "z" in expected else {}
    if method == "dma_star_sh":
        omega = torch.cat([told.W_down.mT.flatten(1), told.b_down[:, 0], told.W_up.mT.flatten(1), told.b_up[:, 0]], -1)
        computed |= {"omega_sum": omega.sum(-1), "omega_first_last": torch.cat([omega[:, :4], omega[:, -4:]], -1)}
        computed["loss"] = dmash.dynamics_loss(agent.f, told, dmash.Batch(s, a, ds, None, tau, c))
        computed["loss"].backward()
        for name, network in (("encoder", agent.g), ("hypernetwork", agent.h), ("f", agent.f)):
            norms = [p.grad.norm() for p in network.parameters()]
            if network is agent.h:  # the reference's output layer is our four heads
                norms = [*norms[:4], torch.stack(norms[4::2]).norm(), torch.stack(norms[5::2]).norm()]
            computed[f"grad_norm/{name}"] = torch.stack(norms)
    assert set(computed) == set(expected)
    for name, value in computed.items():
        atol = 1e-5 if name == "omega_sum" else 2e-6
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=atol, msg=lambda text: f"{name}: {text}")


def test_the_table_names_every_method():
    assert set(TABLE) == set(dmash.METHODS) == set(ROUTING)
    assert dmash.Config().method == "dma_star_sh" and dmash.METHODS["dma_star_sh"] == dmash.Method("DMA*-SH")


@pytest.mark.parametrize("method", TABLE)
def test_a_method_has_the_networks_of_its_row(method):
    """Which there are, what stands inside them, and how many parameters that makes, counted by hand."""
    agent, row = small_agent(method=method), TABLE[method]
    d_told = {"inferred": 8, "true": D_C, "none": 0}[row.context]
    d_more = d_told if row.rl == "concat" else 0

    def layer(d_in, d_out):
        return d_in * d_out + d_out

    hypernetwork = layer(d_told, 64) + layer(64, 64) + layer(64, 2 * 256 * 32 + 32 + 256)
    inside = {how: hypernetwork if (how, row.hypernetwork) == ("adapter", "own") else 0 for how in (row.rl, row.f)}
    d_told_f = d_told if row.f == "concat" else 0

    def network(d_in, d_out, how):
        return layer(d_in, 256) + layer(256, 256) + layer(256, d_out) + inside[how]

    sizes = {
        "g": 32 * (2 * D_S + D_A) + 4 * 32 * (32 + 32 + 2) + 8 * 32 * (2 if row.kl else 1),
        "h": hypernetwork,
        "f": network(D_S + D_A + d_told_f, D_S, row.f),
        "pi": network(D_S + d_more, 2 * D_A, row.rl),
        "Q": 2 * network(D_S + D_A + d_more, 1, row.rl),
        "Q_target": 2 * network(D_S + D_A + d_more, 1, row.rl),
    }
    missing = {"g"} if row.context != "inferred" else set()
    missing |= {"h"} if row.hypernetwork != "shared" else set()
    missing |= {"f"} if row.f == "-" else set()
    for name, size in sizes.items():
        if name in missing:
            assert getattr(agent, name) is None, name
        else:
            assert sum(p.numel() for p in getattr(agent, name).parameters()) == size, name
    users = {"pi": (agent.pi, row.rl), "Q1": (agent.Q.Q1, row.rl), "Q2": (agent.Q.Q2, row.rl)}
    for name, (net, how) in (users | ({} if row.f == "-" else {"f": (agent.f, row.f)})).items():
        own = [module for module in net.modules() if isinstance(module, dmash.Hypernetwork)]
        assert len(own) == (how == "adapter" and row.hypernetwork == "own"), name
    everything = [id(p) for name in sizes if name not in missing for p in getattr(agent, name).parameters()]
    assert len(everything) == len(set(everything))  # nothing is shared by being the same object
    for p, target in zip(agent.Q.parameters(), agent.Q_target.parameters(), strict=True):
        assert torch.equal(p, target) and not target.requires_grad


def test_sizes_of_the_paper_s_methods():
    """On Cartpole, without target critics."""
    sizes = {}
    for method in ("dma_star_sh", "da"):
        agent = dmash.Agent(dmash.Config(env="cartpole_inv", method=method), 5, 1, 2)
        networks = [agent.g, agent.h, agent.f, agent.pi, agent.Q]
        sizes[method] = sum(p.numel() for network in networks if network for p in network.parameters())
    assert {method: round(size / 1e6, 2) for method, size in sizes.items()} == {"dma_star_sh": 1.37, "da": 3.47}


@pytest.mark.parametrize("method", TABLE)
def test_networks_are_told_what_the_row_says(method):
    """z or c or ω or nothing; their outputs change with what it comes from, window or true context, and that alone."""
    agent, row, batch, other = small_agent(method=method), TABLE[method], random_batch(), random_batch()

    def outputs(tau, c):
        _, told, _ = agent.tell(tau, c, noisy=False)
        users = {"π": lambda: torch.cat(agent.pi(batch.s, told), -1)}
        users |= {"Q": lambda: agent.Q(batch.s, batch.a, told), "Q̄": lambda: agent.Q_target(batch.s, batch.a, told)}
        users |= {"f": lambda: agent.f(batch.s, batch.a, told)} if agent.f else {}
        return {name: user() for name, user in users.items()}

    first, window, context = outputs(batch.tau, batch.c), outputs(other.tau, batch.c), outputs(batch.tau, other.c)
    assert ("f" in first) == (row.context == "inferred")
    for name, out in first.items():
        assert len(out) == B
        for changed, by in ((window, "inferred"), (context, "true")):
            if row.context == by:
                assert not torch.isclose(changed[name], out).all(-1).any(), name  # for every sample
            else:
                assert torch.equal(changed[name], out), name

    z, told, kl = agent.tell(batch.tau, batch.c, noisy=False)
    if row.context == "inferred":
        assert torch.equal(z, agent.g(batch.tau, noisy=False)[0]) and z.shape == (B, 8)
        expected = agent.h(z) if row.hypernetwork == "shared" else z
        assert all(torch.equal(x, y) for x, y in zip(told, expected, strict=True)) and type(told) is type(expected)
    else:
        assert z is None and told is (batch.c if row.context == "true" else None)
    assert (kl > 0) == (row.kl > 0)


@pytest.mark.parametrize("method", TABLE)
def test_noise_in_what_is_told(method):
    """Masks and DMA-Pearl's samples: drawn anew each time if noisy, never at evaluation."""
    agent, row, batch = small_agent(method=method), TABLE[method], random_batch()
    first, second = (agent.tell(batch.tau, batch.c, noisy=True)[0] for _ in range(2))
    clean, again = (agent.tell(batch.tau, batch.c, noisy=False)[0] for _ in range(2))
    if row.context == "inferred":
        assert torch.equal(clean, again)
        assert torch.equal(first, second) == torch.equal(first, clean) == (row.mask == 0 and row.kl == 0)
    generator = torch.get_rng_state()
    agent.tell(batch.tau, batch.c, noisy=False)
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("method", ["concat", "da"])
def test_a_row_of_c_serves_all_samples_of_its_context(method):
    """The same as c repeated for every sample, and as sample by sample; also the losses and their gradients."""
    agent, batch = small_agent(method=method), random_batch()
    each = batch._replace(c=batch.c.repeat_interleave(B // N, 0))
    users = {
        "π": lambda s, a, c: torch.cat(agent.pi(s, c), -1),
        "Q": agent.Q,
        "Q̄": agent.Q_target,
    }
    for name, user in users.items():
        out = user(batch.s, batch.a, batch.c)
        torch.testing.assert_close(out, user(batch.s, batch.a, each.c), msg=name)
        for b in range(B):
            n = b // (B // N)
            alone = user(batch.s[b : b + 1], batch.a[b : b + 1], batch.c[n : n + 1])
            torch.testing.assert_close(out[b : b + 1], alone, rtol=1e-4, atol=1e-5, msg=name)
    grads = []
    for told, data in ((batch.c, batch), (each.c, each)):
        torch.manual_seed(5)
        loss = dmash.critic_loss(agent.pi, agent.Q, agent.Q_target, agent.alpha, told, data, 0.99)
        grads.append(torch.autograd.grad(loss, list(agent.Q.parameters())))
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


# On how many rows each hypernetwork runs, each time that it does, in an update that updates the policy too: the shared
# one, and own ones in f, in π, in a critic and in its target
HYPERNETWORKS = {
    "dma_star_sh": {"η": [B]},
    "critic_into_eta": {"η": [B] * 2},
    "actor_into_eta": {"η": [B] * 3},  # for each of the two updates of the policy
    "both_into_eta": {"η": [B] * 4},
    "dma_star_h": {"f": [B], "π": [B] * 3, "Q₁": [B] * 3, "Q̄₁": [B]},
    "rl_adapters": {"π": [B] * 3, "Q₁": [B] * 3, "Q̄₁": [B]},
    "da": {"π": [N] * 3, "Q₁": [N] * 3, "Q̄₁": [N]},  # a row per context, not per sample
}


@pytest.mark.parametrize("method", HYPERNETWORKS)
def test_hypernetworks_run_no_oftener_than_needed(method):
    agent, ran = small_agent(method=method), {}
    places = {"f": agent.f, "π": agent.pi, "Q₁": agent.Q.Q1, "Q̄₁": agent.Q_target.Q1}
    for name, h in [("η", agent.h)] + [(name, net.own) for name, net in places.items() if net]:
        if h:
            h.register_forward_pre_hook(lambda h, z, name=name: ran.setdefault(name, []).append(len(z[0])))
    agent.update(random_batch(), 2)
    assert ran == HYPERNETWORKS[method]


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


def test_log_std_fills_its_range():
    """tanh squashes it into [-5, 2]."""
    pi, s, omega = dmash.Actor(D_S, 1), torch.randn(B, D_S), random_omega()
    with torch.no_grad():
        pi.head.weight[:] = 0
        for raw in (-50.0, -1.0, 0.0, 2.0, 50.0):
            pi.head.bias[:] = torch.tensor([0.5, raw])
            mu, log_std = pi(s, omega)
            torch.testing.assert_close(mu, torch.full((B, 1), 0.5))
            torch.testing.assert_close(log_std, torch.full((B, 1), -5 + 7 * (math.tanh(raw) + 1) / 2))


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
    replay = dmash.Replay(torch.zeros(1, 2), 10, 4, 2, K=1, L=1)
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


# ---------------------------------------------------------------------------------------------------------------
# Algorithm 2: which loss trains what
# ---------------------------------------------------------------------------------------------------------------

# The parameters that the step on the dynamics, the critic and the policy loss changes; it leaves all others alone.
# An own hypernetwork is part of its network.
ROUTING = {
    "dma_star_sh": ("φηθ", "ζ", "ξ"),
    "dma_star_h": ("φθ", "ζ", "ξ"),
    "rl_adapters": ("φθ", "ζ", "ξ"),
    "dma_star": ("φθ", "ζ", "ξ"),
    "dma": ("φθ", "ζ", "ξ"),
    "dma_pearl": ("φθ", "ζ", "ξ"),
    "concat": (None, "ζ", "ξ"),
    "da": (None, "ζ", "ξ"),
    "dr": (None, "ζ", "ξ"),
    "dma_sh": ("φηθ", "ζ", "ξ"),
    "no_mask": ("φηθ", "ζ", "ξ"),
    "no_input_norm": ("φηθ", "ζ", "ξ"),
    "no_output_norm": ("φηθ", "ζ", "ξ"),
    "critic_into_eta": ("φηθ", "ζη", "ξ"),
    "actor_into_eta": ("φηθ", "ζ", "ξη"),
    "both_into_eta": ("φηθ", "ζη", "ξη"),
}


def parameter_groups(agent):
    groups = {"φ": agent.g, "η": agent.h, "θ": agent.f, "ξ": agent.pi, "ζ": agent.Q, "ζ̄": agent.Q_target}
    return {name: list(module.parameters()) for name, module in groups.items() if module} | {"α": [agent.log_alpha]}


def leads_to(loss, groups):
    """The groups in which the graph of `loss` ends, whatever a step on it would change."""
    seen, nodes, ends = set(), [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ends.add(id(getattr(node, "variable", None)))
            nodes += [following for following, _ in node.next_functions]
    reached = {name for name, group in groups.items() if any(id(p) in ends for p in group)}
    for name in reached:
        assert all(id(p) in ends for p in groups[name]), f"part of {name} only"
    return reached


class Watch:
    """Looks into `update` while it runs: `rows` is what was stepped on, which groups that led to, and which it changed;
    `told` what each loss was told."""

    NAMES = ("dynamics_loss", "critic_loss", "actor_loss", "temperature_loss")

    def __init__(self, agent, monkeypatch):
        self.groups, self.rows, self.told, self.agent = parameter_groups(agent), [], [], agent
        self.loss, self.minimise, self.last = None, dmash.minimise, self.values()
        for name in self.NAMES:
            monkeypatch.setattr(dmash, name, self.spied(name, getattr(dmash, name)))
        monkeypatch.setattr(dmash, "minimise", self.step)

    def spied(self, name, original):
        def loss(*arguments):
            self.loss = name
            told = {"dynamics_loss": 1, "critic_loss": 4, "actor_loss": 3}.get(name)
            if told:
                self.told.append((name, arguments[told]))
            return original(*arguments)

        return loss

    def values(self):
        return {name: [p.detach().clone() for p in group] for name, group in self.groups.items()}

    def changed(self):
        """Since it was last asked."""
        last, self.last, names = self.last, self.values(), set()
        for name, group in self.last.items():
            moved = [not torch.equal(p, q) for p, q in zip(group, last[name])]
            assert all(moved) or not any(moved), f"part of {name} is untouched"
            names |= {name} if any(moved) else set()
        return names

    def step(self, loss, optimizer):
        assert not self.changed()  # nothing moves but by a step
        before = [(p, p.grad, p.grad.clone()) for group in self.groups.values() for p in group if p.grad is not None]
        reached, result = leads_to(loss, self.groups), self.minimise(loss, optimizer)
        self.rows.append((self.loss, reached, self.changed()))
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for p, grad, value in before:  # no other parameter's gradient is touched
            assert id(p) in mine or (p.grad is grad and torch.equal(grad, value))
        assert not result.requires_grad and result == loss
        return result

    def update(self, batch, step):
        self.rows, self.told = [], []
        losses = self.agent.update(batch, step)
        return losses, self.rows, self.changed()


@pytest.mark.parametrize("method", TABLE)
def test_gradient_routing(method, monkeypatch):
    """What every loss in `update` leads to, and what its step changes: in the order of Algorithm 2, with nothing moving
    in between. An RL loss that leads to φ or η would be caught even where its step does not change them."""
    agent, batch, (dynamics, critic, actor) = small_agent(method=method), random_batch(), ROUTING[method]
    watch = Watch(agent, monkeypatch)
    first = [("dynamics_loss", set(dynamics), set(dynamics))] if dynamics else []
    first += [("critic_loss", set(critic), set(critic))]
    policy = ("actor_loss", set(actor) | {"ζ"}, set(actor))  # through Q(s, a), which it does not step
    then = [policy, ("temperature_loss", {"α"}, {"α"})] * 2
    for step in (1, 2):
        losses, rows, at_last = watch.update(batch, step)
        assert rows == first + then * (step % 2 == 0)
        assert at_last == {"ζ̄"}
        names = ["dynamics_loss"] * bool(dynamics) + ["critic_loss"] + ["actor_loss"] * (step % 2 == 0) + ["alpha"]
        assert list(losses) == names
        assert all(value.ndim == 0 and not value.requires_grad and value.isfinite() for value in losses.values())


@pytest.mark.parametrize("method", TABLE)
def test_rl_losses_see_omega_as_a_constant(method, monkeypatch):
    """Eq. 2: all are told the same, of one draw of masks, and the RL losses as a constant. Where such a loss may reach
    η, it is told ω made afresh of the same z, which remains a constant."""
    agent, batch, tell, codes = small_agent(method=method), random_batch(), dmash.Agent.tell, []
    monkeypatch.setattr(dmash.Agent, "tell", lambda *args, **more: codes.append(tell(*args, **more)) or codes[-1])
    omegas = []
    if agent.h:
        agent.h.register_forward_hook(lambda h, inputs, omega: omegas.append((inputs[0], omega)))
    watch = Watch(agent, monkeypatch)
    watch.update(batch, 2)
    assert len(codes) == 1  # one draw
    z, told, _ = codes[0]

    def tensors(told):
        return list(told) if isinstance(told, tuple) else [told]

    assert [name for name, _ in watch.told] == ["dynamics_loss"] * bool(agent.f) + ["critic_loss"] + ["actor_loss"] * 2
    for name, seen in watch.told:
        if name == "dynamics_loss":
            assert seen is told and all(x.requires_grad for x in tensors(seen))
        elif name.removesuffix("_loss") in TABLE[method].into_eta:
            (code, _), *_ = [(code, omega) for code, omega in omegas if omega is seen]
            assert torch.equal(code, z) and not code.requires_grad
            assert all(x.requires_grad and not torch.equal(x, y) for x, y in zip(seen, told))  # η has moved
        elif TABLE[method].context == "none":
            assert seen is None
        else:
            assert type(seen) is type(told) and not any(x.requires_grad for x in tensors(seen))
            assert all(torch.equal(x, y) for x, y in zip(tensors(seen), tensors(told), strict=True))


@pytest.mark.parametrize("method", TABLE)
def test_every_group_has_an_adam_of_its_own(method, monkeypatch):
    """At its own rate, for each loss that steps it: η has as many as there are losses that reach it. The update with
    its optimizers, which may share one among groups, against a separate Adam for each."""
    rates = {"φ": 1e-3, "η": 1e-3, "θ": 1e-3, "ζ": 2e-3, "ξ": 3e-3, "α": 4e-3}
    changes = dict(method=method, dynamics_lr=1e-3, critic_lr=2e-3, actor_lr=3e-3, alpha_lr=4e-3)
    batches, agents = [random_batch() for _ in range(4)], []

    def train():
        torch.manual_seed(1)
        agent = small_agent(**changes)
        agents.append(agent)
        for step, batch in enumerate(batches, start=1):
            agent.update(batch, step)
        return parameter_groups(agent)

    ours, adams = train(), {}

    def separate(loss, optimizer):
        groups, given = parameter_groups(agents[-1]), {id(p) for g in optimizer.param_groups for p in g["params"]}
        for name, group in groups.items():
            if given & {id(p) for p in group}:
                key = optimizer, name
                if key not in adams:
                    adams[key] = torch.optim.Adam(group, rates[name], fused=True)
                adams[key].zero_grad()
        mine = [adam for (owner, _), adam in adams.items() if owner is optimizer]
        loss.backward(inputs=[p for adam in mine for p in adam.param_groups[0]["params"]])
        for adam in mine:
            adam.step()
        return loss.detach()

    monkeypatch.setattr(dmash, "minimise", separate)
    theirs = train()
    dynamics, critic, actor = ROUTING[method]
    assert sorted(name for _, name in adams) == sorted((dynamics or "") + critic + actor + "α")
    for name, group in ours.items():
        for p, q in zip(group, theirs[name], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-5, msg=lambda text: f"{name}: {text}")


def test_kl_enters_the_dynamics_loss_as_a_factor(monkeypatch):
    """DMA-Pearl: L (1 + .4 KL), with the mean KL of its codes; reported is L."""
    agent, batch, steps = small_agent(method="dma_pearl"), random_batch(), []
    with torch.no_grad():
        agent.g.variance.weight *= 20  # a KL that is not all but zero
    _, (last, _) = agent.g.lstm(agent.g.embed(batch.tau).transpose(0, 1))
    mean, variance = last[0] @ agent.g.project.weight.T, torch.log1p((last[0] @ agent.g.variance.weight.T).exp())
    normal, unit = torch.distributions.Normal(mean, variance.sqrt()), torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(normal, unit).mean()
    minimise = dmash.minimise
    monkeypatch.setattr(dmash, "minimise", lambda loss, opt: steps.append(loss.detach()) or minimise(loss, opt))
    losses = agent.update(batch, 1)
    torch.testing.assert_close(steps[0], losses["dynamics_loss"] * (1 + 0.4 * kl))
    assert kl > 0.01


@pytest.mark.parametrize("method", TABLE)
def test_update_schedule(method, monkeypatch):
    """The policy is updated at every second step, twice; the targets move by τ at every step."""
    agent, batch, calls = small_agent(method=method), random_batch(), []
    original = dmash.actor_loss
    monkeypatch.setattr(dmash, "actor_loss", lambda *args: (calls.append(1), original(*args))[1])
    for step in range(1, 6):
        before = [p.clone() for p in agent.Q_target.parameters()]
        losses = agent.update(batch, step)
        assert ("actor_loss" in losses) == (step % 2 == 0)
        for target, old, new in zip(agent.Q_target.parameters(), before, agent.Q.parameters(), strict=True):
            torch.testing.assert_close(target, 0.995 * old + 0.005 * new)
    assert len(calls) == 4
    assert all(p.is_leaf and not p.requires_grad for p in agent.Q_target.parameters())  # else a graph grows with them


def test_the_policy_may_be_averaged_for_evaluation():
    """The average starts as the policy, follows each of its steps at the stated rate, acts at evaluation only."""
    assert small_agent().pi_average is None
    agent, batch, rate = small_agent(policy_average=0.1), random_batch(), 0.1
    by_hand = [p.detach().clone() for p in agent.pi.parameters()]
    original = agent.optimizers["actor"].step

    def step(*args):
        original(*args)
        for average, p in zip(by_hand, agent.pi.parameters()):
            average += rate * (p.detach() - average)

    agent.optimizers["actor"].step = step
    for number in range(1, 5):
        agent.update(batch, number)
    for average, p in zip(agent.pi_average.parameters(), by_hand):
        torch.testing.assert_close(average, p)
        assert not average.requires_grad
    s, omega = batch.s, random_omega()
    mean, averaged = agent.pi.mean(s, omega), agent.pi_average.mean(s, omega)
    assert torch.equal(agent.act(s, omega, noisy=False), averaged) and not torch.equal(mean, averaged)
    torch.manual_seed(0)
    a = agent.act(s, omega, noisy=True)
    torch.manual_seed(0)
    assert torch.equal(a, agent.pi.sample(s, omega)[0])


def test_the_temperature_starts_where_it_is_told():
    assert small_agent().alpha == 1 and small_agent(alpha=0.1).alpha.item() == pytest.approx(0.1)


# ---------------------------------------------------------------------------------------------------------------
# Replay
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_windows_hold_past_transitions_of_their_own_context(seed):
    """Rows say which context and time they are from, over random sizes and wrap-around."""
    rng = np.random.default_rng(seed)
    N, K = int(rng.integers(1, 5)), int(rng.integers(1, 9))
    L, capacity = int(rng.integers(1, K + 1)), K + int(rng.integers(1, 30))
    context = torch.arange(1.0, N + 1).unsqueeze(-1)
    replay = dmash.Replay(context, capacity, 1, 1, K, L)
    assert replay.rows.shape == (capacity, N, 4)
    total = int(rng.integers(K + 1, 3 * capacity + 2))
    for t in range(total):
        time = torch.full((N, 1), float(t))
        replay.add(context, time, time.squeeze(-1), 2 * context)  # s = context, a = r = time, δs = context
    batch = replay.sample(64 * N + N - 1)  # rounded down to equal shares
    assert (
        torch.equal(batch.s, batch.ds)
        and torch.equal(batch.a.squeeze(-1), batch.r)
        and torch.equal(batch.s2, 2 * batch.s)
    )
    assert sorted(batch.s.flatten().tolist()) == sorted(context.repeat(64, 1).flatten().tolist())  # equal shares
    assert torch.equal(batch.c, context) and torch.equal(batch.s, batch.c.repeat_interleave(64, 0))  # side by side
    assert (batch.tau[..., 0] == batch.s).all() and (batch.tau[..., 2] == batch.s).all()  # one context a window
    age = batch.a - batch.tau[..., 1]
    assert (age >= 1).all() and (age <= K).all()  # past, and not older than K: never the transition to predict
    assert batch.a.min() >= max(0, total - capacity) + K and batch.a.max() <= total - 1
    latest = replay.latest(noisy=False)
    assert torch.equal(latest[:, -1, 1] if L > 1 else latest[:, 0, 1] + K - 1, torch.full((N,), float(total - 1)))


class Clock:
    """Stands for a VectorEnv: observes [context, clock, episode], and ends episodes after random numbers of steps."""

    def __init__(self, N, rng):
        self.N, self.d_s, self.d_a, self.rng, self.clock, self.episode = N, 3, 1, rng, 0, 0
        self.c = np.arange(1.0, N + 1, dtype=np.float32)[:, None]

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
    agent = SimpleNamespace(cfg=SimpleNamespace(K=K, L=K, device="cpu"))
    rollout = dmash.Rollout(agent, Clock(N, rng), noisy=True, capacity=K + int(rng.integers(1, 40)))
    replay = rollout.replay
    for _ in range(int(rng.integers(K + 1, 100))):
        rollout.collect(random=True)
        assert torch.equal(rollout.s[:, 1], torch.full((N,), float(replay.t)))
    batch = replay.sample(40 * N)
    clock, ages = batch.s[:, 1:2], torch.arange(1.0, K + 1)
    assert torch.equal(batch.ds, torch.tensor([0.0, 1.0, 0.0]).expand_as(batch.ds))  # one step on, in one episode
    assert (batch.tau[..., 0] == batch.s[:, :1]).all()  # one context a window
    assert torch.equal(batch.s[:, :1], batch.c.repeat_interleave(40, 0))  # which is the one that is told
    assert torch.equal((clock - batch.tau[..., 1]).sort().values, ages.expand(len(clock), K))
    latest = replay.latest(noisy=False)
    assert torch.equal(latest[..., 1], (replay.t - ages.flip(0)).expand(N, K))


@pytest.mark.parametrize("env", ["cartpole_inv", "di_inv"])
def test_warm_ups_take_no_room_in_the_replay(env):
    """It holds the last 100,000 steps of a run: when warm-ups counted, a run of 100,000 lost its first 11,000 on the
    way, which showed in the critics' loss (results/README.md)."""
    cfg = dmash.Config(env=env)
    warm_ups = math.ceil(100_000 / aib_envs.lookup(env).horizon) * cfg.K
    assert cfg.buffer == 100_000 + warm_ups
    assert dmash.Config(env=env, buffer=1000).buffer == 1000


def test_windows_before_the_first_transitions_are_zeros():
    replay = dmash.Replay(torch.zeros(2, 1), 8, 1, 1, K=4, L=4)
    assert torch.equal(replay.latest(noisy=False), torch.zeros(2, 4, 3))
    replay.add(torch.ones(2, 1), torch.ones(2, 1), torch.ones(2), torch.ones(2, 1))
    latest = replay.latest(noisy=False)
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


def need_imageio():
    pytest.importorskip("imageio", reason="imageio, without which Gymnasium's own MuJoCo tasks do not load, is missing")


class GymnasiumOwn:
    """A locomotion environment of Gymnasium, one context."""

    def __init__(self, env_id, context):
        need_imageio()
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


def mesh(env_id, which):
    """All contexts of a set in up to two dimensions, sorted."""
    values = []
    for dim in aib_envs.ENVS[env_id].context:
        (low, high), (far_low, far_high) = dim.train, dim.extrapolation or dim.train
        margin = 0.01 * (high - low)
        if dim.binary:
            values.append(dim.train)
        elif which == "eval_out":
            below = [far_low + i * (low - margin - far_low) / 24 for i in range(25)]
            values.append(below + [high + margin + i * (far_high - high - margin) / 24 for i in range(25)])
        else:
            low, high = (low + margin, high - margin) if which == "eval_in" else (low, high)
            values.append([low + i * (high - low) / 49 for i in range(50)])
    return list(itertools.product(*values))


FLAT = [env_id for env_id, spec in aib_envs.ENVS.items() if len(spec.context) <= 2]
BINARY = [env_id for env_id in FLAT if any(dim.binary for dim in aib_envs.ENVS[env_id].context)]


@pytest.mark.parametrize("env_id", FLAT)
def test_twenty_contexts_are_the_published_ones(env_id):
    """Evenly spaced entries of the sorted mesh, rounded down. So are other numbers where no dimension is binary."""
    for n in [20] if env_id in BINARY else [1, 3, 7, 20, 33]:
        for which, contexts in aib_envs.context_sets(env_id, n).items():
            entries = mesh(env_id, which)
            for i, context in enumerate(contexts):
                expected = entries[i * (len(entries) - 1) // max(1, n - 1)]
                assert tuple(context.values()) == pytest.approx(expected, rel=1e-12)
                assert list(context) == [dim.name for dim in aib_envs.ENVS[env_id].context]


@pytest.mark.parametrize("env_id", BINARY)
def test_both_values_of_a_binary_dimension_get_their_share(env_id):
    """Whatever the number of contexts; only the published 20 stand 11 to 9."""
    (dim,) = [dim for dim in aib_envs.ENVS[env_id].context if dim.binary]
    for n in range(1, 121):
        sets = aib_envs.context_sets(env_id, n)
        entries = {which: {tuple(context.values()) for context in contexts} for which, contexts in sets.items()}
        assert len(set.union(*entries.values())) == sum(map(len, entries.values()))  # disjoint
        for which, contexts in sets.items():
            counts = [sum(context[dim.name] == value for context in contexts) for value in dim.train]
            assert sum(counts) == len(contexts) == n
            assert sorted(counts) == [9, 11] if n == 20 else abs(counts[0] - counts[1]) <= 1
            assert len(entries[which]) == n or n > 100  # no repetition
            allowed = {tuple(np.round(entry, 9)) for entry in mesh(env_id, which)}
            assert {tuple(np.round(entry, 9)) for entry in entries[which]} <= allowed
            first, last = contexts[0], contexts[-1]  # from one end of the mesh to the other
            assert n == 1 or [next(iter(c.values())) for c in (first, last)] == pytest.approx(
                [min(allowed)[0], max(allowed)[0]]
            )


def test_all_pairs_of_signs_get_their_share():
    """Five each of twenty; and masses from one end of the range to the other."""
    for n in (1, 4, 7, 20, 50, 200):
        for contexts in aib_envs.context_sets("di_signs", n).values():
            signs = [(context["sign_x"], context["sign_y"]) for context in contexts]
            counts = [signs.count(pair) for pair in itertools.product((-1, 1), repeat=2)]
            assert sum(counts) == n and max(counts) - min(counts) <= 1
            assert len({tuple(context.values()) for context in contexts}) == n
            masses = [context["mass"] for context in contexts]
            assert masses == sorted(masses) and (n == 1 or masses[-1] - masses[0] > 0.9)


def test_window_and_gradient_steps_of_the_paper():
    for env_id, spec in aib_envs.ENVS.items():
        small = env_id.startswith(("di_", "ode"))
        steps = 100_000 if small or env_id == "cartpole_inv" else 500_000 if env_id.endswith("_gym") else 200_000
        assert (spec.K, spec.steps) == (24 if small else 128, steps)


def test_distance_from_the_train_range():
    """0 in its middle, 1 at its ends, more beyond."""
    for (low, high), value, distance in (((-5, 5), 0, 0), ((-5, 5), -5, 1), ((0.5, 1.5), 2, 2), ((0.5, 1.5), 0.5, 1)):
        assert aib_envs.ContextDim("x", 0, (low, high), (-9, 9)).distance(value) == distance


def test_table_of_environments():
    lines = aib_envs.table().splitlines()
    assert [line.split()[0] for line in lines] == ["id", *aib_envs.ENVS]
    cartpole = next(line for line in lines if line.startswith("cartpole_inv"))
    assert cartpole.split(maxsplit=6)[:6] == ["cartpole_inv", "Cartpole", "non-overlapping", "1000", "128", "100000"]
    assert cartpole.endswith("length 0.5, [0.3, 0.85], [0.1, 2]; action_factor in {-1, 1}")
    for line, (env_id, spec) in zip(lines[1:], aib_envs.ENVS.items()):
        assert all(text in line for text in (spec.paper_name, spec.kind, str(spec.horizon), spec.context[-1].name))


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


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("env_id", aib_envs.ENVS)
def test_vector_env_equals_single_environments(env_id, dtype):
    """Same contexts and states, same steps, bit for bit, whatever the type of the actions."""
    contexts = aib_envs.context_sets(env_id, n=4)["eval_out"]
    envs = aib_envs.VectorEnv(env_id, contexts, seed=0)
    envs.reset()
    singles = [aib_envs.make(env_id, **context) for context in contexts]
    for single, state, target in zip(singles, envs.task.state(), getattr(envs.task, "target", [None] * 4)):
        single.reset(options={"state": state} | ({} if target is None else {"target": target}))
    rng = np.random.default_rng(0)
    for _ in range(20):
        actions = rng.uniform(-1, 1, (4, envs.d_a)).astype(dtype)
        s2, r, done = envs.step(actions)
        for i, single in enumerate(singles):
            ours, reward, *_ = single.step(actions[i])
            np.testing.assert_array_equal(s2[i], ours)
            assert np.float32(reward) == r[i]
    assert s2.dtype == r.dtype == np.float32 and not done


def test_vector_env_tells_the_contexts_in_the_order_of_the_table():
    """Raw, with the defaults of what is not named: (N, d_c)."""
    contexts = [{"action_factor": -1, "length": 0.7}, {}, {"action_factor": -1}]
    c = aib_envs.VectorEnv("cartpole_inv", contexts, seed=0).c
    assert c.dtype == np.float32
    np.testing.assert_array_equal(c, np.float32([[0.7, -1], [0.5, 1], [0.5, -1]]))
    assert aib_envs.VectorEnv("ode_20", [{"c19": 3}] * 2, seed=0).c.shape == (2, 20)


@pytest.mark.parametrize("steps", [None, 0, 7])
def test_vector_env_goes_on_from_a_saved_state(steps):
    """Also from before its first reset."""

    def play(envs):
        seen = []
        if steps is not None:
            seen += [envs.step(np.full((2, 1), 0.3))[0] for _ in range(5)]
        return np.stack([*seen, envs.reset(), envs.step(np.full((2, 1), 0.3))[0]]), envs.t

    envs, other = (aib_envs.VectorEnv("cartpole_inv", [{}, {"length": 0.8}], seed=seed) for seed in (3, 4))
    if steps is not None:
        envs.reset()
        for _ in range(steps):
            envs.step(np.full((2, 1), -0.5))
    other.load_state_dict(envs.state_dict())
    (seen, t), (again, t_again) = play(envs), play(other)
    np.testing.assert_array_equal(again, seen)
    assert t == t_again == 1


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
    for env_id, context, same in (
        ("di_inv", {"action_factor": -1}, lambda action: -action),
        ("cheetah_inv", {"action_factor": -1}, lambda action: -action),
        ("di_perm", {"swap": 1}, lambda action: action[::-1]),
        ("reacher_hard_perm", {"swap": 1}, lambda action: action[::-1]),
        ("di_signs", {"sign_x": -1}, lambda action: action * [-1, 1]),
        ("di_signs", {"sign_y": -1}, lambda action: action * [1, -1]),
    ):
        plain, changed = aib_envs.make(env_id), aib_envs.make(env_id, **context)
        plain.reset(seed=0), changed.reset(seed=0)
        for _ in range(10):
            action = rng.uniform(-1, 1, plain.action_space.shape)
            np.testing.assert_array_equal(plain.step(action)[0], changed.step(same(action))[0])


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
        for wrong in ([0.2], [0.2, 0.8, 0.3]):
            with pytest.raises(ValueError, match="must be 2 finite numbers"):
                wrapped.step(wrong)
    signs, order = np.array([-1.0, 1.0]), np.array([1, 0])
    env, swapped = (
        f(plain, x) for f, x in zip((aib_envs.ActuatorInversion, aib_envs.ActuatorPermutation), (signs, order))
    )
    signs *= -1
    order[:] = 0
    assert env.action([1, 1]).tolist() == [-1, 1] and swapped.action([1, 0]).tolist() == [0, 1]


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
    (lambda: aib_envs.make("ode").reset(options={"state": [10**400]}), "must be 1 finite numbers"),
    (lambda: aib_envs.make("walker").reset(options={"state": np.zeros(99)}), "...: must be 18 finite numbers"),
    (lambda: aib_envs.make("ode").reset(options=5), "options 5: must be a dict of values by name"),
    (lambda: aib_envs.make("ode").reset(options={"context": None}), "context None: must be a dict of values by name"),
    (lambda: aib_envs.make([1]), "unknown environment '[1]'; known: di_inv, "),
    (lambda: aib_envs.make("ode", c0=10**400), "...: must be a finite number"),
    (
        lambda: aib_envs.VectorEnv("ode", [], seed=0),
        "contexts []: must be a list of at least one, or train, eval_in or",
    ),
    (lambda: aib_envs.VectorEnv("ode", 5, seed=0), "contexts 5: must be a list of at least one, or train, eval_in or"),
    (lambda: aib_envs.VectorEnv("ode", [5], seed=0), "context 5: must be a dict of values by name"),
    (lambda: make_vec("di_inv", 2, contexts=[{}]), "num_envs=2: must be the number of contexts, here 1"),
    (lambda: make_vec("di_inv", 2).reset(seed=[1]), "seed [1]: must be a number, or 2 of them"),
    (lambda: make_vec("di_inv", 2).reset(options={"state": 1}), "options {'state': 1}: a vector environment has none"),
    (
        lambda: aib_envs.RandomContext(aib_envs.make("ode"), "test"),
        "contexts 'test': must be a list of at least one, or",
    ),
    (lambda: aib_envs.make("gymnasium:CartPole-v1"), "gymnasium:CartPole-v1: must have Boxes of one axis as spaces"),
    (
        lambda: need_imageio() or aib_envs.make("gymnasium:InvertedPendulum-v5"),
        "gymnasium:InvertedPendulum-v5 has terminal states",
    ),
    (lambda: permuted("hopper_gym", [1, 0]), "order [1, 0]: must be a permutation of 0 ... 2"),
    (lambda: permuted("di_inv", [True, False]), "order [True, False]: must be a permutation of 0 ... 1"),
    (lambda: permuted("di_inv", [[1, 0]]), "order [[1, 0]]: must be a permutation of 0 ... 1"),
    (lambda: permuted("di_inv", 1), "order 1: must be a permutation of 0 ... 1"),
    (
        lambda: aib_envs.RandomContext(gymnasium.make("Pendulum-v1")),
        "must be an environment of aib_envs, with a context",
    ),
    (lambda: aib_envs.AddContext(gymnasium.make("Pendulum-v1")), "must be an environment of aib_envs, with a context"),
    (
        lambda: aib_envs.AddContext(gymnasium.wrappers.FrameStackObservation(aib_envs.make("ode"), 4)),
        "needs a key, as it has not one axis",
    ),
    (lambda: permuted("di_inv", [1, 0], bounds=[1.0, 2.0]), "order [1, 0]: must leave actuators with other bounds in"),
]


def make_vec(env_id, num_envs, **options):
    return gymnasium.make_vec(f"aib_envs:aib/{env_id}-v0", num_envs=num_envs, **options)


def permuted(env_id, order, bounds=None):
    env = aib_envs.make(env_id)
    if bounds:
        env = gymnasium.wrappers.RescaleAction(env, -np.float32(bounds), np.float32(bounds))
    return aib_envs.ActuatorPermutation(env, order)


@pytest.mark.parametrize("call, message", BAD_CALLS)
def test_bad_values_name_what_is_allowed(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_step_before_reset_is_told():
    calls = lambda env: env.step(np.zeros(2)), lambda env: env.set_context(mass=1), lambda env: env.state()
    for call in (*calls, lambda env: env.render()):
        with pytest.raises(gymnasium.error.ResetNeeded, match="call reset"):
            call(aib_envs.make("di_inv"))
    for envs in (aib_envs.VectorEnv("cartpole_inv", [{}, {}], seed=0), make_vec("cartpole_inv", 2)):
        with pytest.raises(gymnasium.error.ResetNeeded, match="call reset"):
            envs.step(np.zeros((2, 1)))


@pytest.mark.parametrize("env_id", aib_envs.ENVS)
def test_bad_actions_leave_the_environment_unharmed(env_id):
    env, twin = aib_envs.make(env_id), aib_envs.make(env_id)
    env.reset(seed=0), twin.reset(seed=0)
    d_a = env.action_space.shape[0]
    good = np.full(d_a, 0.5)
    graded = torch.zeros(d_a, requires_grad=True)
    vector = aib_envs.VectorEnv(env_id, [{}], seed=0)
    vector.reset()
    for bad in (np.zeros(d_a + 1), np.full(d_a, np.nan), [np.inf] * d_a, "left", None, [object()] * d_a, graded):
        with pytest.raises(ValueError, match="finite numbers$"):
            env.step(bad)
        with pytest.raises(ValueError, match="finite numbers$"):
            vector.step([bad])
    for same in (good.tolist(), torch.tensor(good), np.array(list(good), dtype=object)):
        np.testing.assert_array_equal(env.step(same)[0], twin.step(good)[0])
    vector.step([good.tolist()])


@pytest.mark.parametrize("env_id", aib_envs.ENVS)
def test_actions_are_clipped_everywhere(env_id):
    """An actuator gets at most 1, whatever the agent sends."""
    wild, context = np.array([50, -3, 0.5, 1.5, -1.01, 7]), aib_envs.context_sets(env_id)["train"][3]
    env, twin = aib_envs.make(env_id, **context), aib_envs.make(env_id, **context)
    env.reset(seed=0), twin.reset(seed=0)
    for _ in range(3):
        action = wild[: env.task.d_a]
        s, r, *_ = env.step(action)
        s2, r2, *_ = twin.step(action.clip(-1, 1))
        assert np.array_equal(s, s2) and r == r2


COPIES = {"copy": copy.deepcopy, "pickle": lambda env: pickle.loads(pickle.dumps(env))}


@pytest.mark.parametrize("made", COPIES)
@pytest.mark.parametrize("env_id", aib_envs.ENVS)
def test_copies_go_on_like_the_original(env_id, made):
    """A copy made before the first reset, after it or in mid-episode: bit for bit, and each by itself."""
    context = aib_envs.context_sets(env_id)["train"][3]
    single, vector = aib_envs.make(env_id, **context), aib_envs.VectorEnv(env_id, [context, {}], seed=1)
    for env, shape in ((single, vector.d_a), (vector, (2, vector.d_a))):
        actions = np.random.default_rng(0).uniform(-1, 1, (7, *np.atleast_1d(shape)))

        def play(env, begin, end):
            return [np.hstack([np.ravel(x) for x in env.step(action)[:2]]) for action in actions[begin:end]]

        def restart(env):
            return np.ravel(env.reset()[0])

        single.np_random = np.random.default_rng(2)
        copies = [COPIES[made](env)]
        restart(env)
        copies.append(COPIES[made](env))
        seen = play(env, 0, 4)
        copies.append(COPIES[made](env))
        seen += [*play(env, 4, 7), restart(env), play(env, 0, 1)[0]]
        restart(copies[0])
        for twin, begin in zip(copies, (0, 0, 4)):
            again = [*play(twin, begin, 7), restart(twin), play(twin, 0, 1)[0]]
            assert all(np.array_equal(x, y) for x, y in zip(seen[begin:], again, strict=True))


@pytest.mark.parametrize("env_id", ["cartpole_inv", "reacher_easy_inv"])
@pytest.mark.parametrize("length", [1e-9, 1e300])
def test_a_context_that_cannot_be_built_changes_nothing(env_id, length):
    env, twin = aib_envs.make(env_id), aib_envs.make(env_id)
    env.reset(seed=0), twin.reset(seed=0)
    bad = {"length": length}
    for call in (
        lambda: aib_envs.make(env_id, **bad),
        lambda: env.set_context(**bad),
        lambda: env.reset(seed=5, options={"context": bad}),
    ):
        with pytest.raises(ValueError, match=r"^contexts \[\{'length': .*\}\]: .*$") as error:
            call()
        assert "\n" not in str(error.value)
    assert env.context == twin.context
    for _ in range(3):
        np.testing.assert_array_equal(env.step([0.5] * env.task.d_a)[0], twin.step([0.5] * env.task.d_a)[0])
    np.testing.assert_array_equal(env.reset()[0], twin.reset()[0])


# ---- With other people's tools ----


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda: aib_envs.ActuatorInversion(gymnasium.make("Pendulum-v1"), -1),
        lambda: aib_envs.ActuatorPermutation(gymnasium.make("Pendulum-v1"), [0]),
        lambda: aib_envs.ActuatorPermutation(aib_envs.make("hopper_gym", gravity=5), [2, 0, 1]),
        lambda: aib_envs.RandomContext(gymnasium.make("aib/ode-v0"), [{"c1": 2.0}, {"c0": 1.0}]),
        lambda: aib_envs.AddContext(aib_envs.make("di_inv", mass=1.2)),
        lambda: aib_envs.AddContext(aib_envs.RandomContext(aib_envs.make("cartpole_inv"), "eval_in"), key="c"),
    ],
)
def test_wrappers_are_rebuilt_from_their_spec(wrapped):
    env = wrapped()
    again = gymnasium.make(env.spec)
    assert env.observation_space == again.observation_space and env.action_space == again.action_space
    for space in (env.action_space, again.action_space):
        space.seed(0)
    for seed in (3, None, None):
        pairs = [env.reset(seed=seed), again.reset(seed=seed)]
        pairs += [x.step(x.action_space.sample())[:2] for x in (env, again)]
        for x, y in (pairs[:2], pairs[2:]):
            assert gymnasium.utils.env_checker.data_equivalence(x, y, exact=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "(?s).*(different from the unwrapped|symmetric and normalized)")
        check_env(again, skip_render_check=True)


@pytest.mark.parametrize("env_id", aib_envs.ENVS)
def test_the_horizon_is_gymnasium_s(env_id):
    name, horizon = f"aib/{env_id}-v0", aib_envs.ENVS[env_id].horizon
    assert gymnasium.spec(name).max_episode_steps == horizon
    for env in (gymnasium.make(name), aib_envs.make(env_id)):
        timed = gymnasium.wrappers.TimeAwareObservation(env, normalize_time=False, flatten=False)
        assert timed.observation_space["time"].high == horizon
    env = gymnasium.make(name, max_episode_steps=horizon + 5)
    env.reset(seed=0)
    action = np.zeros(env.action_space.shape, np.float32)
    truncated = [env.step(action)[3] for _ in range(horizon + 5)]
    assert truncated == [False] * (horizon + 4) + [True]  # by one clock, the one that was asked for
    assert not env.unwrapped.step(action)[3]
    short = aib_envs.make(env_id, horizon=2)
    short.reset(seed=0)
    assert [short.step(action)[3] for _ in range(2)] == [False, True] and short.spec.max_episode_steps == 2


@pytest.mark.parametrize("env_id", aib_envs.ENVS)
def test_pictures_in_a_film_run_in_real_time(env_id):
    env = gymnasium.make(f"aib/{env_id}-v0", render_mode="rgb_array")
    env.reset(seed=0)
    task, action = env.unwrapped.task, np.zeros(env.action_space.shape, np.float32)
    before = task.datas[0].time if isinstance(task, aib_envs.MujocoTask) else 0
    env.step(action)
    seconds = task.datas[0].time - before if isinstance(task, aib_envs.MujocoTask) else [0.01, 0.1]["di" in env_id]
    assert env.metadata["render_fps"] == pytest.approx(1 / seconds)


@pytest.mark.parametrize("env_id", aib_envs.ENVS)
def test_make_vec_equals_sync_vector_env(env_id):
    """Also the infos, and the episode that begins by itself; rewards to float32, as in training."""
    contexts = aib_envs.context_sets(env_id, 3)["eval_out"]
    ours = make_vec(env_id, 3, contexts=contexts, max_episode_steps=4)
    singles = [
        lambda context=context: gymnasium.make(f"aib/{env_id}-v0", max_episode_steps=4, **context)
        for context in contexts
    ]
    sync = gymnasium.vector.SyncVectorEnv(singles)
    assert isinstance(ours, gymnasium.vector.VectorEnv) and ours.num_envs == 3
    assert ours.metadata["autoreset_mode"] is sync.metadata["autoreset_mode"]
    for name in ("observation_space", "action_space", "single_observation_space", "single_action_space"):
        assert getattr(ours, name) == getattr(sync, name)
    sync.action_space.seed(0)
    for seed in (5, [7, 1, 7]):
        same = gymnasium.utils.env_checker.data_equivalence
        assert same(ours.reset(seed=seed), sync.reset(seed=seed), exact=True)
        for _ in range(11):
            actions = sync.action_space.sample()
            (s, r, *rest), (s2, r2, *rest2) = ours.step(actions), sync.step(actions)
            assert same((s, *rest), (s2, *rest2), exact=True)
            assert r.dtype == r2.dtype == np.float64 and np.array_equal(np.float32(r), np.float32(r2))
    ours.close(), sync.close()
    assert ours.closed


def test_make_vec_by_the_name_of_a_set_or_values():
    envs = make_vec("cartpole_inv", 20, contexts="train")
    assert envs.envs.task.contexts == aib_envs.context_sets("cartpole_inv")["train"] and envs.envs.horizon == 1000
    _, infos = envs.reset(seed=0)
    np.testing.assert_array_equal(np.float32(infos["context"]["length"]), envs.envs.c[:, 0])
    infos["context"]["length"][:] = 0
    assert envs.step(envs.action_space.sample())[4]["context"]["length"].all()
    assert make_vec("di_inv", 2, mass=0.6).envs.task.contexts == [{"mass": 0.6, "action_factor": 1.0}] * 2


def test_vector_wrappers_work():
    vector, sums = gymnasium.wrappers.vector, np.zeros(3)
    envs = vector.RecordEpisodeStatistics(make_vec("cartpole_inv", 3, contexts="train", max_episode_steps=5))
    envs = vector.NormalizeObservation(envs)
    envs.reset(seed=0)
    for t in range(1, 13):
        s, r, _, truncated, infos = envs.step(envs.action_space.sample())
        sums = sums * (t != 6) + r
        assert truncated.all() == (t in (5, 11)) and (t not in (5, 11) or np.allclose(infos["episode"]["r"], sums))
    assert np.abs(s.mean()) < 3 and infos["context"]["length"].shape == (3,)


def test_vector_steps_are_much_faster_than_gymnasium_s():
    """In processor time, the best of some tries: about three times, with room for a busy machine."""
    contexts = aib_envs.context_sets("cartpole_inv")["train"]
    ours = make_vec("cartpole_inv", 20, contexts=contexts)
    sync = gymnasium.vector.SyncVectorEnv([lambda c=c: gymnasium.make("aib/cartpole_inv-v0", **c) for c in contexts])
    actions, best = np.zeros((20, 1), np.float32), {}
    for envs in (ours, sync) * 5:
        envs.reset(seed=0)
        begin = time.process_time()
        for _ in range(40):
            envs.step(actions)
        best[envs] = min(best.get(envs, math.inf), time.process_time() - begin)
    assert best[sync] > 2 * best[ours]


@pytest.mark.parametrize("env_id", aib_envs.ENVS)
def test_random_contexts_and_contexts_that_are_told(env_id):
    sets = aib_envs.context_sets(env_id)
    told = aib_envs.AddContext(aib_envs.RandomContext(gymnasium.make(f"aib/{env_id}-v0"), "eval_out"))
    keyed = aib_envs.RandomContext(aib_envs.AddContext(aib_envs.make(env_id), key="context"), sets["eval_out"])
    drawn = []
    for seed in (3, *[None] * 7):
        (s, info), (s2, info2) = told.reset(seed=seed), keyed.reset(seed=seed)
        assert info == info2 and info["context"] in sets["eval_out"]
        drawn.append(tuple(info["context"].values()))
        action = np.zeros(told.action_space.shape, np.float32)
        for x, y in ((s, s2), (told.step(action)[0], keyed.step(action)[0])):
            np.testing.assert_array_equal(x, np.float32([*y["observation"], *drawn[-1]]))
            assert x in told.observation_space and y in keyed.observation_space
            np.testing.assert_array_equal(y["context"], np.float32(drawn[-1]))
    assert len(set(drawn)) > 4 and tuple(told.reset(seed=3)[1]["context"].values()) == drawn[0]
    fixed = sets["train"][0]
    assert told.reset(options={"context": fixed})[1]["context"] == fixed


def test_a_random_context_leaves_what_it_does_not_name():
    env = aib_envs.RandomContext(aib_envs.make("cartpole_inv", length=0.8), [{"action_factor": -1}])
    assert env.reset(seed=0)[1]["context"] == {"length": 0.8, "action_factor": -1}
    env.reset(options={"context": {"length": 0.4}})
    assert env.reset()[1]["context"]["length"] == 0.8  # what the environment had when it was wrapped


def test_a_told_context_keeps_the_type_of_its_space():
    env = aib_envs.AddContext(gymnasium.wrappers.DtypeObservation(aib_envs.make("di_inv"), np.float64))
    assert env.reset(seed=0)[0] in env.observation_space


def test_a_task_in_other_contexts_leaves_the_first_one_alone():
    task = aib_envs.VectorEnv("reacher_easy_inv", [{}, {}], seed=0).task
    task.reset([np.random.default_rng(0)] * 2)
    target = task.target.copy()
    other = task.with_contexts(task.contexts)
    other.reset([np.random.default_rng(1)] * 2)
    assert np.array_equal(task.target, target) and not np.array_equal(other.target, target)


def test_vector_seeds_of_none_go_on():
    def starts():
        envs = make_vec("di_inv", 2)
        envs.reset(seed=2**70)
        return envs.reset(seed=[None, 5])[0]

    first = starts()
    np.testing.assert_array_equal(first, starts())
    np.testing.assert_array_equal(first[1], make_vec("di_inv", 2).reset(seed=[4, 5])[0][1])


def test_a_random_context_and_state_are_independent():
    """Of one seed each: the starts in the first half of the contexts spread like those in the second."""
    env = aib_envs.RandomContext(aib_envs.make("ode"), "train")
    first = np.array([(env.reset(seed=seed)[0][0], env.unwrapped.context["c0"]) for seed in range(400)])
    assert abs(np.corrcoef(first.T)[0, 1]) < 0.15
    assert len(set(first[:, 1])) > 15


class Slider(aib_envs.Task):
    """What somebody might add: a mass on a rail, to be held at 0, with a hidden gain."""

    d_s, d_a, state_size, dt = 2, 1, 2, 0.05

    def initial_state(self, i, rng):
        return rng.uniform(-1, 1, 2)

    def set_state(self, state):
        self.x = state.copy()

    def state(self):
        return self.x.copy()

    def advance(self, actions):
        self.x[:, 1] += self.dt * self.c["gain"] * actions[:, 0]
        self.x[:, 0] += self.dt * self.x[:, 1]

    observation = state

    def reward(self):
        return np.exp(-(self.x[:, 0] ** 2))

    def picture(self, i):
        place = np.array([self.x[i, 0], 0])
        return aib_envs.View(np.zeros(2), 4.0), [aib_envs.Shape(place, place, 0.1, aib_envs.BLUE)]


GAIN = aib_envs.ContextDim("gain", 1.0, (0.5, 1.5), (0.1, 2.0))


@pytest.fixture
def registered(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(aib_envs, "ENVS", dict(aib_envs.ENVS))
    monkeypatch.setattr(gymnasium.envs.registration, "registry", gymnasium.envs.registration.registry.copy())


def test_register_an_environment_of_one_s_own(registered):
    aib_envs.register("slider", Slider, [GAIN, aib_envs.ACTION_FACTOR], 50, "non-overlapping", K=10, steps=500)
    spec = aib_envs.ENVS["slider"]
    assert (spec.K, spec.steps, spec.horizon, spec.kind) == (10, 500, 50, "non-overlapping")
    assert "slider" in aib_envs.table().splitlines()[-1]
    sets = aib_envs.context_sets("slider")
    assert len({tuple(context.values()) for contexts in sets.values() for context in contexts}) == 60
    env = gymnasium.make("aib/slider-v0", render_mode="rgb_array", gain=0.7)
    check_env(env.unwrapped)
    assert env.reset(seed=0)[1]["context"] == {"gain": 0.7, "action_factor": 1.0} and env.render().std() > 0
    assert env.metadata["render_fps"] == 20 and env.spec.max_episode_steps == 50
    assert make_vec("slider", 20, contexts="eval_in").reset(seed=0)[0].shape == (20, 2)


WRONG_CLASSES = [
    ({"d_s": None}, "must give d_s, a whole number"),
    ({"state_size": 2.5}, "must give state_size, a whole number"),
    ({"d_s": 3}, "gives a observation of shape (2, 2) for two instances: must be (2, 3)"),
    ({"reward": lambda self: self.x}, "gives a reward of shape (2, 2) for two instances: must be (2,)"),
    ({"reward": lambda self: 1.0}, "gives a reward of shape () for two instances: must be (2,)"),
    *(({name: None}, f"has no {name}") for name in ("picture", "dt", "initial_state", "reward")),
    ({"context": [GAIN, aib_envs.SWAP]}, "has no two actuators"),
]


@pytest.mark.parametrize("changes, message", WRONG_CLASSES)
def test_register_says_what_is_wrong_with_a_class(changes, message, registered):
    before, changes = dict(aib_envs.ENVS), dict(changes)
    context = changes.pop("context", [GAIN])
    with pytest.raises(ValueError) as error:
        aib_envs.register("slider", type("Slider", (Slider,), changes), context, 50)
    assert str(error.value) == f"environment 'slider': Slider {message}" and aib_envs.ENVS == before


def test_signs_go_by_their_names(registered):
    X, Y = aib_envs.SIGN_X, aib_envs.SIGN_Y
    aib_envs.register("y", aib_envs.DoubleIntegrator, [aib_envs.MASS, Y], 50)
    aib_envs.register("both", aib_envs.DoubleIntegrator, [aib_envs.MASS, X, aib_envs.ACTION_FACTOR], 50)
    for env_id, context, signs in (
        ("y", {"sign_y": -1}, [1, -1]),
        ("both", {"action_factor": -1}, [-1, -1]),
        ("both", {"action_factor": -1, "sign_x": -1}, [1, -1]),
    ):
        plain, signed = aib_envs.make("di_inv"), aib_envs.make(env_id, **context)
        plain.reset(seed=0), signed.reset(seed=0)
        action = np.array([0.3, 0.7])
        np.testing.assert_array_equal(plain.step(action)[0], signed.step(action * signs)[0])


def test_binary_values_take_turns_in_any_environment(registered):
    """Alone, before a graded dimension, and beside so many that contexts are drawn."""
    graded = [aib_envs.ContextDim(f"c{i}", 0.0, (-1.0, 1.0), (-2.0, 2.0)) for i in range(3)]
    for env_id, dims in {"alone": [], "first": [aib_envs.MASS], "drawn": graded}.items():
        task = type(
            "Task", (Slider,), {"build": lambda self: aib_envs.Task.build(self) or self.c.setdefault("gain", 1)}
        )
        aib_envs.register(env_id, task, [aib_envs.ACTION_FACTOR, *dims], 50)
        for n in (1, 4, 5, 19, *([20] if env_id != "first" else [])):
            for contexts in aib_envs.context_sets(env_id, n).values():
                assert list(contexts[0]) == ["action_factor", *(dim.name for dim in dims)]
                assert [context["action_factor"] for context in contexts] == [(-1.0, 1.0)[i % 2] for i in range(n)]


def test_a_swap_leaves_further_actuators_alone(registered):
    seen = []
    parts = dict(d_a=3, advance=lambda self, actions: seen.extend(actions.tolist()))
    aib_envs.register("three", type("Three", (Slider,), parts), [GAIN, aib_envs.SWAP], 50)
    seen.clear()
    envs = aib_envs.VectorEnv("three", [{"swap": 1}, {}], seed=0)
    envs.reset()
    envs.step([[0.1, 0.2, 0.3]] * 2)
    assert seen == [[0.2, 0.1, 0.3], [0.1, 0.2, 0.3]]


MY_MODULE = """import test_dmash, aib_envs
aib_envs.register("slider", test_dmash.Slider, [test_dmash.GAIN], 50, K=10, steps=500)
"""


def test_an_environment_of_a_module_trains(registered, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_module.py").write_text(MY_MODULE)
    arguments = small_arguments(tmp_path, env="di_inv", steps=3, eval_every=3)
    arguments[arguments.index("di_inv")] = "my_module:slider"
    assert dmash.main(arguments) == 2 and "No module named 'my_module'" in capsys.readouterr().err
    monkeypatch.syspath_prepend(tmp_path)
    assert dmash.main(arguments) == 0
    folder = tmp_path / "my_module.slider__dma_star_sh__s1"
    assert list(read(folder / "per_context.csv")[0])[3] == "gain"
    arguments[arguments.index("my_module:slider")] = "my_module:slidr"
    assert dmash.main(arguments) == 2
    assert "unknown environment 'slidr' (did you mean slider?)" in capsys.readouterr().err
    del aib_envs.ENVS["slider"], sys.modules["my_module"], gymnasium.envs.registration.registry["aib/slider-v0"]
    assert dmash.main(["--eval", str(folder), "--rollouts", "1"]) == 0  # imports it by itself
    assert capsys.readouterr().out.startswith("my_module:slider, dma_star_sh")


def test_any_environment_of_gymnasium_has_hidden_actuators():
    env_id, contexts = "gymnasium:Pendulum-v1", [{}, {"actuator_strength": 0.5}, {"action_factor": -1}]
    envs, plain = aib_envs.VectorEnv(env_id, contexts, seed=0), gymnasium.make("Pendulum-v1")
    spec, starts = (
        aib_envs.lookup(env_id),
        [np.random.default_rng(child) for child in np.random.SeedSequence(0).spawn(3)],
    )
    assert (spec.K, spec.steps, spec.horizon) == (24, 100_000, 200)
    sets = aib_envs.context_sets(env_id)
    assert len({tuple(context.values()) for contexts in sets.values() for context in contexts}) == 60
    s = envs.reset()
    seen = [envs.step(np.full((3, 1), action)) for action in (0.6, -0.8, 2.0)]
    assert not np.array_equal(envs.reset(), s) and seen[0][0].dtype == np.float32
    for i, factor in enumerate((1, 0.5, -1)):
        np.testing.assert_array_equal(plain.reset(seed=int(starts[i].integers(2**31)))[0], s[i])
        for (s2, r, _), action in zip(seen, (0.6, -0.8, 1.0)):
            ours, reward, *_ = plain.step(np.float32([2 * factor * action]))
            np.testing.assert_allclose(s2[i], ours, rtol=1e-5, atol=1e-6)
            assert r[i] == pytest.approx(reward, rel=1e-5)
    env = aib_envs.make(env_id, actuator_strength=0.5)
    np.testing.assert_array_equal(env.reset(seed=1)[0], aib_envs.make(env_id).reset(seed=1)[0])
    env.set_context(action_factor=-1)
    assert env.step([0.3])[4]["context"] == {"actuator_strength": 0.5, "action_factor": -1.0}


def test_an_environment_of_gymnasium_trains_and_resumes(tmp_path, monkeypatch, capsys):
    arguments = dict(env="gymnasium:Pendulum-v1", K=4, contexts=2, batch=4, random_steps=5, steps=6, eval_every=6)
    with monkeypatch.context() as patch:
        patch.setattr(dmash, "catch_signals", stopping_after(5 + 3))
        assert dmash.main(small_arguments(tmp_path, **arguments)) == 0
    folder = tmp_path / "gymnasium.Pendulum-v1__dma_star_sh__s1"
    capsys.readouterr()
    assert dmash.main(["--resume", str(folder)]) == 0
    new = f"{folder}: a new episode begins, as the state of gymnasium:Pendulum-v1 cannot be saved"
    assert capsys.readouterr().out.splitlines()[0] == new and len(read(folder / "metrics.csv")) == 1
    assert dmash.load(folder / "checkpoint.pt")["rollout"]["replay"]["t"] == 4 + 5 + 3 + 4 + 3  # with its warm-up


class Ends(gymnasium.Env):
    """Counts its steps, and its own end comes after 5 of 20; a number of another kind acts."""

    observation_space = gymnasium.spaces.Box(-100, 100, (1,), np.float32)

    def __init__(self, after=5, dtype=np.float32):
        self.after, self.action_space = after, gymnasium.spaces.Box(-2, 2, (1,), dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.float32([0]), {}

    def step(self, action):
        self.t += 1
        return np.float32([self.t]), 1.0, False, self.t == self.after, {}


def test_an_environment_of_gymnasium_ends_by_its_horizon_alone(registered):
    """A reset unasked for would be stored as dynamics."""
    for env_id, options in {
        "Ends-v0": {},
        "Whole-v0": dict(after=99, dtype=np.int64),
        "Long-v0": dict(after=99),
    }.items():
        gymnasium.register(env_id, Ends, max_episode_steps=20, kwargs=options)
    with pytest.raises(
        aib_envs.BadEnvironment, match="gymnasium:Ends-v0 has terminal states: the method knows none but"
    ):
        aib_envs.make("gymnasium:Ends-v0")
    with pytest.raises(aib_envs.BadEnvironment, match="gymnasium:Whole-v0: must have .* bounded float actions"):
        aib_envs.make("gymnasium:Whole-v0")
    env = aib_envs.make("gymnasium:Long-v0", horizon=50)
    env.reset(seed=0)
    steps = [env.step([0.5]) for _ in range(50)]
    assert [int(s[0]) for s, *_ in steps] == list(range(1, 51))
    assert [truncated for *_, truncated, _ in steps] == [False] * 49 + [True]


def test_terminal_states_met_later_stop_a_run_in_one_line(tmp_path, monkeypatch, capsys):
    arguments = small_arguments(tmp_path, env="gymnasium:Pendulum-v1")  # which tries the environment
    monkeypatch.setattr(aib_envs.GymnasiumTask, "advance", lambda self, actions: terminate(self))
    assert dmash.main(arguments) == 2
    assert capsys.readouterr().err == "dmash.py: error: gymnasium:Pendulum-v1 has terminal states\n"


def terminate(task):
    raise aib_envs.BadEnvironment(f"gymnasium:{task.gymnasium_id} has terminal states")


@pytest.mark.parametrize("told", [False, True])
def test_stable_baselines3_trains(told):
    """The example of the README, with fewer steps."""
    sb3 = pytest.importorskip("stable_baselines3", reason="Stable-Baselines3 is not installed")
    env = aib_envs.RandomContext(aib_envs.make("cartpole_inv"))
    env = aib_envs.AddContext(env) if told else env
    model = sb3.SAC("MlpPolicy", env, learning_starts=20, batch_size=8, seed=0).learn(30)
    assert model.num_timesteps == 30 and env.observation_space.contains(model.get_env().reset()[0])
    assert np.isfinite(model.predict(env.reset()[0])[0]).all()


def test_installing_takes_two_modules_and_no_torch():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((HERE / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["py-modules"] == ["aib_envs", "dmash"]
    needed = project["project"]["dependencies"]
    assert sorted(re.split("[<>=]", text)[0] for text in needed) == ["gymnasium", "mujoco", "numpy"]
    assert [text.startswith("torch>=") for text in project["project"]["optional-dependencies"]["train"]] == [True]
    for package, version in (("gymnasium", gymnasium.__version__), ("torch", torch.__version__.split("+")[0])):
        assert f"{package}=={version}\n" in (HERE / "requirements.txt").read_text()


@pytest.mark.parametrize("minor", [10, 11, 12, 13])
def test_both_files_compile(minor, tmp_path):
    found = [
        Path(folder) / f"python3.{minor}"
        for folder in (*os.get_exec_path(), *map(str, Path.home().glob(f".pyenv/versions/3.{minor}.*/bin")))
    ]
    pythons = [python for python in found if python.exists() and "shims" not in python.parts]
    if not pythons:
        pytest.skip(f"there is no Python 3.{minor} here")
    for file in ("dmash.py", "aib_envs.py"):
        code = f"compile(open({str(HERE / file)!r}, encoding='utf-8').read(), {file!r}, 'exec')"
        assert subprocess.run([pythons[0], "-c", code], capture_output=True).returncode == 0


# ---------------------------------------------------------------------------------------------------------------
# Acting and evaluation
# ---------------------------------------------------------------------------------------------------------------


class Recorder:
    """Stands for an Agent: notes what it is asked, acts with zeros. What it is told is the window."""

    def __init__(self, d_a, **settings):
        self.cfg, self.d_a, self.calls = small_config(**settings), d_a, []

    def tell(self, tau, c, noisy):
        assert len(tau) == len(c)
        self.asked = noisy
        return None, tau, 0.0

    def act(self, s, told, noisy):
        assert self.asked is noisy
        self.calls.append((s.clone(), told.clone(), noisy))
        return torch.zeros(len(s), self.d_a)


class Steersman(Recorder):
    """Drives to the middle and stops there, where the actuators are not inverted; entry by entry, so that a row of a
    larger batch does what it does alone."""

    def act(self, s, told, noisy):
        super().act(s, told, noisy)
        return (-3 * s[:, :2] - 5 * s[:, 2:]).clamp(-1, 1)


@pytest.mark.parametrize("noisy", [True, False])
def test_warm_up_fills_the_window_then_resets(noisy):
    envs = aib_envs.VectorEnv("di_inv", [{}, {"mass": 0.5}], seed=0)
    agent = Recorder(envs.d_a, K=10)
    rollout = dmash.Rollout(agent, envs, noisy, capacity=200)
    rollout.begin_episode()
    assert len(agent.calls) == 10 and rollout.replay.t == 10 and not rollout.done
    assert (agent.calls[0][1] == 0).all()  # the window is empty at first
    corners = rollout.s[:, :2].abs()
    assert (corners >= 0.8).all() and (rollout.s[:, 2:] == 0).all()  # a fresh start
    rollout.step()
    assert all(call[2] is noisy for call in agent.calls)
    assert agent.calls[-1][1].abs().sum() > 0  # the window stays over the reset
    assert envs.t == 1  # warm-up steps do not count towards the horizon


def test_an_episode_may_begin_without_a_warm_up():
    """With an empty window at first; later with what the episode before left there."""
    envs = aib_envs.VectorEnv("di_inv", [{}, {"mass": 0.5}], seed=0)
    agent = Recorder(envs.d_a, K=10)
    rollout = dmash.Rollout(agent, envs, noisy=False)
    rollout.begin_episode(warm_up=False)
    assert not agent.calls and rollout.replay.t == 0 and envs.t == 0
    rollout.step()
    assert (agent.calls[0][1] == 0).all() and envs.t == 1
    while not rollout.done:
        rollout.step()
    assert len(agent.calls) == 100
    rollout.begin_episode(warm_up=False)
    assert len(agent.calls) == 100 and rollout.replay.t == 100 and not rollout.done
    rollout.step()
    assert agent.calls[-1][1].abs().sum() > 0


@pytest.mark.parametrize("K", [99, 100])
def test_a_warm_up_as_long_as_an_episode_does_not_end_it(K):
    envs = aib_envs.VectorEnv("di_inv", [{}], seed=0)
    rollout = dmash.Rollout(Recorder(2, K=K, contexts=2), envs, noisy=False, capacity=300)
    rollout.begin_episode()
    steps = 0
    while not rollout.done:
        rollout.step()
        steps += 1
    assert steps == 100


@pytest.mark.parametrize("method", TABLE)
def test_steps_are_what_the_replay_holds(method):
    """What `step` returns: s, a, r, and what the policy was told, of the window before."""
    contexts = [{}, {"mass": 0.5}, {"action_factor": -1}]
    envs = aib_envs.VectorEnv("di_inv", contexts, seed=0)
    agent = dmash.Agent(small_config(method=method), 4, 2, 2)
    rollout = dmash.Rollout(agent, envs, noisy=False, capacity=30)
    c = torch.tensor([[1.0, 1.0], [0.5, 1.0], [1.0, -1.0]])
    rollout.begin_episode()
    for _ in range(10):  # past the end of the ring
        before, tau = rollout.s.clone(), rollout.replay.latest(noisy=False)
        s, a, r, told = rollout.step()
        row = rollout.replay.rows[(rollout.replay.t - 1) % 30]
        torch.testing.assert_close(row, torch.cat([s, a, rollout.s - before, r[:, None]], -1), rtol=0, atol=0)
        assert torch.equal(s, before) and s.shape == (3, 4) and a.shape == (3, 2) and r.shape == (3,)
        with torch.no_grad():
            _, expected, _ = agent.tell(tau, c, noisy=False)
        assert torch.equal(a, agent.act(s, expected, noisy=False))
        if expected is None:
            assert told is None
        else:
            pairs = zip(told, expected, strict=True)
            assert all(torch.equal(x, y) and not x.requires_grad for x, y in pairs)
    s, a, r, told = rollout.step(random=True)
    assert (
        told is None and a.abs().max() <= 1 and torch.equal(a, rollout.replay.rows[(rollout.replay.t - 1) % 30, :, 4:6])
    )


def test_random_actions_are_uniform():
    envs = aib_envs.VectorEnv("di_inv", [{}] * 50, seed=0)
    rollout = dmash.Rollout(Recorder(2), envs, noisy=True, capacity=200)
    for _ in range(40):
        rollout.collect(random=True)
    a = rollout.replay.rows[: rollout.replay.t, :, 4:6].flatten()  # the warm-up's, too
    assert len(a) == 64 * 100 and a.abs().max() <= 1 and a.min() < -0.99 and a.max() > 0.99
    assert abs(a.mean()) < 0.03 and abs(a.var() - 1 / 3) < 0.015  # 4 standard errors


def test_collecting_samples_and_evaluation_takes_the_mean():
    agent = small_agent()
    s, tau = torch.randn(3, D_S), torch.randn(3, L, 2 * D_S + D_A)
    omega = agent.infer(tau, noisy=False)[1]
    mean = agent.act(s, omega, noisy=False)
    torch.testing.assert_close(mean, agent.pi.mean(s, agent.h(agent.g(tau, noisy=False)[0])))
    torch.testing.assert_close(mean, agent.pi(s, omega)[0].tanh())
    assert torch.equal(mean, agent.act(s, omega, noisy=False)) and not mean.requires_grad
    assert not torch.equal(agent.act(s, omega, noisy=True), agent.act(s, omega, noisy=True))


@pytest.mark.parametrize("method", TABLE)
def test_infer_returns_the_code_and_omega(method):
    """As far as the method has them."""
    agent, row, tau = small_agent(method=method), TABLE[method], random_batch().tau
    z, omega = agent.infer(tau, noisy=False)
    assert (z is None) == (row.context != "inferred") and (omega is None) == (row.hypernetwork != "shared")
    if z is not None:
        assert torch.equal(z, agent.g(tau, noisy=False)[0])
        assert torch.equal(agent.infer(tau, noisy=True)[0], z) == (row.mask == 0 and row.kl == 0)
    if omega is not None:
        assert all(torch.equal(x, y) for x, y in zip(omega, agent.h(z), strict=True))


def on_three_sets(cfg):
    return [context for contexts in aib_envs.context_sets(cfg.env, cfg.contexts).values() for context in contexts]


@pytest.mark.parametrize("method", TABLE)
def test_evaluation_is_repeatable_and_leaves_torch_alone(method, monkeypatch):
    """Its generator, its number of threads, its default type; and the agent."""
    short = dataclasses.replace(aib_envs.ENVS["di_inv"], horizon=30)
    monkeypatch.setitem(aib_envs.ENVS, "di_inv", short)
    threads = torch.get_num_threads()
    cfg = small_config(method=method, contexts=2, K=5, threads=threads + 1)
    agent = dmash.Agent(cfg, 4, 2, 2)
    with torch.no_grad():
        agent.pi.head.bias[:] = torch.tensor([0.3, -0.2, 0.0, 0.0])  # not all but at rest
    contexts, weights = on_three_sets(cfg), [p.clone() for p in agent.pi.parameters()]
    generator = torch.get_rng_state()
    first, diverged = dmash.evaluate(agent, cfg, contexts, rollouts=2)
    assert first.shape == diverged.shape == (6, 2) and np.isfinite(first).all() and not diverged.any()
    np.testing.assert_array_equal(dmash.evaluate(agent, cfg, contexts, rollouts=2)[0], first)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.get_num_threads() == threads and torch.get_default_dtype() == torch.float32
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(agent.pi.parameters(), weights))


def test_evaluation_sums_rewards_of_the_counted_episode_only(monkeypatch):
    """An agent that stays at rest, started within the goal: one reward a step, none from the warm-up."""
    monkeypatch.setattr(aib_envs.DoubleIntegrator, "initial_state", lambda self, i, rng: np.zeros(4))
    agent, cfg = Recorder(2), small_config()
    returns, diverged = dmash.evaluate(agent, cfg, on_three_sets(cfg), rollouts=1)
    np.testing.assert_array_equal(returns, np.full((12, 1), 100.0))
    assert not diverged.any() and not any(noisy for _, _, noisy in agent.calls)


def test_the_first_of_many_rollouts_is_the_single_one():
    """From the same states; the others from others; each context's returns in its own row."""
    contexts, K = [{}, {"mass": 0.5}, {"action_factor": -1}], 7
    agents = [Steersman(2, K=K) for _ in range(2)]
    one, many = (dmash.evaluate(agent, agent.cfg, contexts, n)[0] for agent, n in zip(agents, (1, 4)))
    starts, more = (agent.calls[K][0] for agent in agents)
    assert one.shape == (3, 1) and many.shape == (3, 4)
    assert torch.equal(more[:3], starts) and len(more) == 12 and len(more.unique(dim=0)) == 12
    np.testing.assert_array_equal(many[:, :1], one)
    assert (many[:2] > 20).all() and (many[2] == 0).all() and len(np.unique(many[:2])) > 2


def test_the_seed_sets_where_an_evaluation_starts():
    starts = []
    for settings, seed in (({}, None), ({}, 1), ({}, 2), ({"seed": 2}, None)):
        agent = Steersman(2, K=3, **settings)
        dmash.evaluate(agent, agent.cfg, [{}, {}], seed=seed)
        starts.append(agent.calls[3][0])
    default, one, two, config = starts
    assert torch.equal(default, one) and torch.equal(two, config) and not torch.equal(one, two)


@pytest.mark.parametrize("rollouts, contexts", [(0, [{}]), (-1, [{}]), (1.5, [{}]), (None, [{}]), ("1", [{}]), (1, [])])
def test_an_evaluation_of_nothing_is_refused(rollouts, contexts):
    with pytest.raises(dmash.BadInput, match="must be at least 1") as error:
        dmash.evaluate(Recorder(2), small_config(), contexts, rollouts)
    assert f"rollouts={rollouts!r}" in str(error.value) and "\n" not in str(error.value)


def test_an_evaluation_can_be_stopped():
    """Before any step."""
    agent, asked = Recorder(2), []

    def stop():
        asked.append(1)
        if len(asked) == 41:
            raise dmash.Stopped

    with pytest.raises(dmash.Stopped):
        dmash.evaluate(agent, agent.cfg, [{}], stop=stop)
    assert len(agent.calls) == 40


class Spoiler:
    """Makes what instance 1 observes, is rewarded with or does not finite, at step `t` of an episode, in its warm-up
    (`when` 0) or when it counts (1). All instances are at rest in the goal: a reward of 1 a step."""

    def __init__(self, what, value, t, when, monkeypatch):
        self.what, self.value, self.t, self.when, self.resets = what, value, t, when, 0
        self.step, self.reset = aib_envs.VectorEnv.step, aib_envs.VectorEnv.reset
        monkeypatch.setattr(aib_envs.DoubleIntegrator, "initial_state", lambda *_: np.array([0.02, 0.03, 0, 0]))
        monkeypatch.setattr(aib_envs.VectorEnv, "step", lambda envs, actions: self.spoilt_step(envs, actions))
        monkeypatch.setattr(aib_envs.VectorEnv, "reset", lambda envs: self.counted_reset(envs))

    def counted_reset(self, envs):
        self.resets, self.now = self.resets + 1, 1
        return self.reset(envs)

    def due(self, what):
        return self.what == what and self.resets == self.when + 1 and self.now == self.t

    def spoilt_step(self, envs, actions):
        s2, r, done = self.step(envs, actions)
        for name, values in (("observation", s2[1]), ("reward", r)):
            if self.due(name):
                values[1] = self.value  # one entry
        self.now += 1
        return s2, r, done

    def agent(self):
        agent = Recorder(2, K=24)
        act = agent.act

        def spoilt_act(s, told, noisy):
            assert s.isfinite().all() and told.isfinite().all()  # what is not finite never comes back
            zeros = self.what == "observation" and (self.resets, self.now) == (self.when + 1, self.t + 1)
            assert s.any(-1).tolist() == [not zeros or i != 1 for i in range(len(s))]
            a = act(s, told, noisy)
            if self.due("action"):
                a[1, 1] = self.value
            return a

        agent.act = spoilt_act
        return agent


SPOILT = list(itertools.product(["observation", "reward", "action"], [math.nan, math.inf, -math.inf]))


@pytest.mark.parametrize("what, value", SPOILT)
def test_a_diverged_episode_keeps_what_it_collected(what, value, monkeypatch):
    """It is marked, what comes after does not count, and no other episode notices."""
    spoiler = Spoiler(what, value, 30, 1, monkeypatch)
    returns, diverged = dmash.evaluate(spoiler.agent(), small_config(), [{}, {}, {}], rollouts=2)
    np.testing.assert_array_equal(returns, [[100, 100], [29, 100], [100, 100]])
    np.testing.assert_array_equal(diverged, [[False, False], [True, False], [False, False]])


@pytest.mark.parametrize("what, value", SPOILT)
def test_a_diverged_warm_up_does_not_mark_its_episode(what, value, monkeypatch):
    spoiler = Spoiler(what, value, 20, 0, monkeypatch)
    returns, diverged = dmash.evaluate(spoiler.agent(), small_config(), [{}, {}, {}], rollouts=1)
    np.testing.assert_array_equal(returns, np.full((3, 1), 100.0))
    assert not diverged.any()


@pytest.mark.parametrize("what, value", SPOILT)
def test_collecting_what_is_not_finite_is_an_error(what, value, monkeypatch):
    spoiler = Spoiler(what, value, 30, 1, monkeypatch)
    agent = spoiler.agent()
    rollout = dmash.Rollout(agent, aib_envs.VectorEnv("di_inv", [{}, {}, {}], seed=0), noisy=True, capacity=200)
    for _ in range(29):
        rollout.collect()
    with pytest.raises(FloatingPointError, match=f"^{what} is not finite$"):
        rollout.collect()
    assert rollout.replay.t == 24 + 29 and rollout.replay.rows.isfinite().all()


def test_an_episode_that_begins_diverged(monkeypatch):
    def initial_state(task, i, rng):
        return np.array([0.02, 0.03, 0, 0]) if i != 1 else np.array([0, math.nan, 0, 0])

    monkeypatch.setattr(aib_envs.DoubleIntegrator, "initial_state", initial_state)
    agent = Recorder(2)
    returns, diverged = dmash.evaluate(agent, agent.cfg, [{}, {}, {}])
    assert all(s.isfinite().all() and told.isfinite().all() for s, told, _ in agent.calls)
    assert returns[:, 0].tolist() == [100, 0, 100] and diverged[:, 0].tolist() == [False, True, False]
    with pytest.raises(FloatingPointError, match="^observation is not finite$"):
        dmash.Rollout(agent, aib_envs.VectorEnv("di_inv", [{}, {}], seed=0), noisy=True).reset()


def test_a_simulation_that_diverges_in_evaluation_is_marked(tmp_path, monkeypatch):
    """MuJoCo's own: a cartpole that starts far too fast, between two that do not."""
    monkeypatch.chdir(tmp_path)  # MuJoCo notes it in a file where it is
    agent = Recorder(1, env="cartpole_inv", K=20)
    cfg = agent.cfg
    contexts, ordinary = [{}, {}, {"length": 0.8}], aib_envs.Cartpole.initial_state
    undisturbed, none = dmash.evaluate(agent, cfg, contexts)
    too_fast = np.array([0.0, 0.0, 1e11, 1e11])
    monkeypatch.setattr(
        aib_envs.Cartpole, "initial_state", lambda self, i, rng: too_fast if i == 1 else ordinary(self, i, rng)
    )
    returns, diverged = dmash.evaluate(agent, cfg, contexts)
    assert not none.any() and diverged[:, 0].tolist() == [False, True, False]
    np.testing.assert_array_equal(returns[[0, 2]], undisturbed[[0, 2]])
    assert np.isfinite(returns).all() and 0 <= returns[1, 0] < 100 < undisturbed[1, 0]
    with pytest.raises(FloatingPointError, match="is not finite"):
        rollout = dmash.Rollout(agent, aib_envs.VectorEnv("cartpole_inv", contexts, seed=0), noisy=True, capacity=99)
        for _ in range(40):
            rollout.collect()


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
    diverged = [f"diverged_{name}" for name in dmash.SETS]
    assert list(metrics[0]) == ["step", "env_steps", "seconds", "steps_per_second", *losses, *dmash.SETS, *diverged]
    assert all(row[name] == "0" for row in metrics for name in diverged)
    assert [row["step"] for row in metrics] == ["20", "40"]
    assert metrics[-1]["env_steps"] == str(4 * (24 + 60 + 40))  # the warm-up counts too
    assert list(contexts[0]) == ["step", "set", "index", "mass", "action_factor", "return", "diverged"]
    assert len(contexts) == 2 * 3 * 4
    for name in dmash.SETS:
        returns = [float(row["return"]) for row in contexts if (row["step"], row["set"]) == ("40", name)]
        assert float(metrics[-1][name]) == pytest.approx(np.mean(returns), abs=1e-3)
    config = json.loads((run / "config.json").read_text())
    assert (config["method"], config["env"], config["K"], config["steps"]) == ("dma_star_sh", "di_inv", 24, 40)
    assert {"version", "torch", "numpy", "mujoco", "gymnasium"} <= set(config) and config["torch"] == torch.__version__
    assert (run / "policy.pt").stat().st_size < 5e6


def test_policy_holds_what_acting_needs_and_no_more(run):
    state = torch.load(run / "policy.pt", weights_only=True)
    assert set(state) == {"settings", "version", "step", "agent"} and state["step"] == 40
    assert {name.split(".")[0] for name in state["agent"]} == {"g", "h", "pi"}
    trained = torch.load(run / "checkpoint.pt", weights_only=True)["agent"]
    cfg, agent = dmash.load_policy(run)
    assert (cfg.env, cfg.steps, agent.step) == ("di_inv", 40, 40)
    for name, weight in state["agent"].items():
        assert torch.equal(agent.state_dict()[name], weight) and torch.equal(trained[name], weight)


def test_snapshots_keep_the_policy_of_every_evaluation(tmp_path, run):
    assert dmash.main([*small_arguments(tmp_path), "--snapshots"]) == 0
    folder = tmp_path / run.name
    steps = [int(row["step"]) for row in read(run / "metrics.csv")]
    assert sorted(path.name for path in (folder / "policies").iterdir()) == [f"{step}.pt" for step in steps]
    for step in steps:
        cfg, agent = dmash.load_policy(folder / "policies" / f"{step}.pt")
        found = dmash.by_set(dmash.evaluate_sets(agent, cfg, 1), "return")
        row = next(row for row in read(folder / "metrics.csv") if int(row["step"]) == step)
        assert agent.step == step and found == pytest.approx({name: float(row[name]) for name in found}, rel=1e-5)
    assert not (run / "policies").exists()


def test_loading_and_evaluating_leave_global_state_alone(run):
    before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
    cfg, agent = dmash.load_policy(run / "policy.pt")
    contexts = aib_envs.context_sets(cfg.env, 3)["eval_out"]
    returns, diverged = dmash.evaluate(agent, cfg, contexts, rollouts=2)
    assert returns.shape == diverged.shape == (3, 2) and not diverged.any()
    after = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_eval_reproduces_the_last_row_of_the_run(run, capsys, tmp_path):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    shutil.copy(run / "policy.pt", tmp_path / "given_away.pt")
    last = read(run / "metrics.csv")[-1]
    for path in (run, tmp_path / "given_away.pt"):
        assert dmash.main(["--eval", str(path), "--rollouts", "1", "--threads", "1", "--per-context"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"di_inv, dma_star_sh, seed 1, step 40, version {dmash.code_version()}"
        assert lines[-1] == "AER over 4 contexts x 1 rollouts:  " + "  ".join(
            f"{name} {float(last[name]):.1f}" for name in dmash.SETS
        )
        assert len(lines) == 3 + 3 * 4 and lines[1] == "set,index,mass,action_factor,return,diverged"
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}


def test_the_agent_in_the_repository_balances_normal_and_inverted_motors():
    """Beyond the train range of lengths, too: a change that breaks what a policy computes shows here."""
    path = HERE / "results/quick_fresh/cartpole_inv__dma_star_sh__quick__s4/policy.pt"
    if not path.is_file():
        pytest.skip("results/ is not here")
    cfg, agent = dmash.load_policy(path)
    returns, _ = dmash.evaluate(agent, cfg, [{"length": x, "action_factor": f} for x in (0.4, 1.0) for f in (1, -1)])
    assert path.stat().st_size < 5e6 and returns.min() > 800, returns


def test_a_policy_in_another_folder_says_whose_it_is(run, tmp_path, capsys):
    assert dmash.main(small_arguments(tmp_path, seed=2, method="dr", steps=2)) == 0
    other = tmp_path / "di_inv__dr__s2"
    shutil.copy(run / "policy.pt", other / "policy.pt")
    capsys.readouterr()
    assert dmash.main(["--eval", str(other), "--rollouts", "1"]) == 0
    assert capsys.readouterr().out.startswith("di_inv, dma_star_sh, seed 1, step 40, ")


def test_an_evaluation_tells_a_dynamics_loss_where_there_is_a_dynamics_model(tmp_path, capsys):
    for method in ("dma_star", "dr"):
        assert dmash.main(small_arguments(tmp_path, method=method, steps=2)) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step 2 "))
        assert ("  dynamics loss " in line) == (method == "dma_star") and "  alpha " in line and "nan" not in line


def test_same_seed_same_metrics_bit_for_bit(run, tmp_path):
    assert dmash.main(small_arguments(tmp_path)) == 0
    assert same_run(tmp_path / run.name, run)


class StopAfter:
    """Stands for catch_signals and for what it gives: raises Stopped when called more than n times."""

    def __init__(self, n):
        self.left = n

    def __enter__(self):
        return self.stop

    def __exit__(self, *error):
        pass

    def stop(self):
        self.left -= 1
        if self.left < 0:
            raise dmash.Stopped


def stopping_after(n):
    return lambda: StopAfter(n)


def same_run(ours, theirs):
    """Whether two finished run folders hold the same results, bit for bit and times aside."""
    states = [dmash.load(folder / "checkpoint.pt") for folder in (ours, theirs)]
    for state in states:
        state.pop("seconds"), state.pop("version"), state["settings"].pop("out")
        for evaluation in state["history"]:
            evaluation["metrics"]["seconds"] = evaluation["metrics"]["steps_per_second"] = 0
    policies = [dmash.load(folder / "policy.pt")["agent"] for folder in (ours, theirs)]
    return (
        timeless(read(ours / "metrics.csv")) == timeless(read(theirs / "metrics.csv"))
        and (ours / "per_context.csv").read_bytes() == (theirs / "per_context.csv").read_bytes()
        and all(torch.equal(weight, policies[1][name]) for name, weight in policies[0].items())
        and as_text(states[0]) == as_text(states[1])
    )


@pytest.mark.parametrize(
    "stops, step, evaluated",
    [
        ((30,), 0, []),  # among the random steps: nothing to keep
        ((61,), 1, []),
        ((80,), 20, []),  # before an evaluation
        ((95,), 20, []),  # in its warm-up
        ((130,), 20, []),  # in the middle of it
        ((205,), 20, [20]),  # after it
        ((67, 15, 129, 2), 26, [20]),  # again and again
        ((300,), 40, [20]),  # in the last evaluation
    ],
)
def test_a_stopped_and_resumed_run_equals_the_undisturbed_one(stops, step, evaluated, run, tmp_path, monkeypatch):
    """It asks 60 times in the random steps, 20 times in as many gradient steps, 1 + 24 + 100 times before and in an
    evaluation with its warm-up, and so on. An episode ends at step 40."""
    folder = tmp_path / run.name
    for i, stop in enumerate(stops):
        with monkeypatch.context() as patch:
            patch.setattr(dmash, "catch_signals", stopping_after(stop))
            assert dmash.main(["--resume", str(folder)] if i else small_arguments(tmp_path)) == 0
    state = dmash.load(folder / "checkpoint.pt")
    assert (state["step"], [evaluation["metrics"]["step"] for evaluation in state["history"]]) == (step, evaluated)
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
            patch.setattr(dmash, "catch_signals", stopping_after(5 + stop))
            assert dmash.main(small_arguments(tmp_path / name, **arguments)) == 0
    folder = f"{env_id}__dma_star_sh__s1"
    assert dmash.main(["--resume", str(tmp_path / "stopped" / folder)]) == 0
    assert same_run(tmp_path / "whole" / folder, tmp_path / "stopped" / folder)


def delete(path):
    path.unlink()


def garble(*, of=bytes, to):
    """Puts bytes in place of a file's."""
    return lambda path: path.write_bytes(to(path.read_bytes()))


@pytest.mark.parametrize(
    "damage",
    [
        delete,
        garble(to=lambda data: data.rstrip(b"\n")),  # as some editors leave it
        garble(to=lambda data: data[:-10]),  # a torn last line
        garble(to=lambda data: b"\xef\xbb\xbf" + data),  # a byte order mark
        garble(to=lambda data: data.split(b"\n", 1)[1]),  # no header
        garble(to=lambda data: data.replace(b"\n", b"\r\n").replace(b",", b";")),
        garble(to=lambda data: b""),
        garble(to=lambda data: b"\x00\xff" * 50),
    ],
)
@pytest.mark.parametrize("name", ["metrics.csv", "per_context.csv", "config.json", "policy.pt"])
def test_what_follows_from_the_checkpoint_is_made_again(name, damage, run, folder):
    """Whatever became of the other files: between two parts of a run, or after its end."""
    damage(folder / name)
    assert dmash.main(["--resume", str(folder)]) == 0
    assert same_run(folder, run)
    configs = [json.loads((where / "config.json").read_text()) for where in (folder, run)]
    assert all(config.pop("version") for config in configs) and configs[0] == configs[1]


def test_rows_after_an_older_checkpoint_are_named_and_made_again(run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / run.name
    with monkeypatch.context() as patch:
        patch.setattr(dmash, "catch_signals", stopping_after(205))
        assert dmash.main(small_arguments(tmp_path)) == 0
    older = (folder / "checkpoint.pt").read_bytes()
    assert dmash.main(["--resume", str(folder)]) == 0
    (folder / "checkpoint.pt").write_bytes(older)
    capsys.readouterr()
    assert dmash.main(["--resume", str(folder)]) == 0
    assert f"{folder}: rows after this checkpoint, to be made again: 40\n" in capsys.readouterr().out
    assert same_run(folder, run)


def test_a_kill_in_the_middle_of_a_save_loses_nothing(run, folder):
    (folder / "checkpoint.pt.partial").write_bytes(b"half")
    assert dmash.main(["--resume", str(folder)]) == 0
    assert same_run(folder, run)


def test_a_kill_before_the_first_checkpoint_leaves_a_folder_to_start_in(run, tmp_path):
    (tmp_path / run.name).mkdir()
    (tmp_path / run.name / "checkpoint.pt.partial").write_bytes(b"half")
    assert dmash.main(small_arguments(tmp_path)) == 0
    assert same_run(tmp_path / run.name, run)


def test_a_checkpoint_is_saved_without_a_copy_of_the_replay(run):
    rollout = dmash.Run(small_config(), "unused").rollout
    for _ in range(10):
        rollout.collect(random=True)
    ring, saved = rollout.replay.rows, rollout.replay.state_dict()["rows"]
    assert saved.data_ptr() == ring.data_ptr() and torch.equal(saved, ring[: rollout.replay.t])
    assert saved.untyped_storage().nbytes() == saved.numel() * 4  # else torch would write the whole ring


def test_code_that_changed_between_two_parts_of_a_run_shows(folder, monkeypatch):
    monkeypatch.setattr(dmash, "code_version", lambda: "other")
    before = json.loads((folder / "config.json").read_text())["version"]
    for _ in range(2):
        assert dmash.main(["--resume", str(folder)]) == 0
    assert json.loads((folder / "config.json").read_text())["version"] == f"{before} + other"


def test_steps_may_be_raised_on_resume(folder, capsys):
    assert dmash.main(["--resume", str(folder), "--steps", "50"]) == 0
    assert [row["step"] for row in read(folder / "metrics.csv")] == ["20", "40", "50"]
    assert json.loads((folder / "config.json").read_text())["steps"] == 50
    capsys.readouterr()
    assert dmash.main(["--resume", str(folder), "--steps", "45"]) == 2
    assert "--steps 45: must be a whole number in [50, 1e9]" in capsys.readouterr().err


def test_a_run_may_be_asked_for_twice(run, tmp_path, capsys, monkeypatch):
    """--go-on starts a run, goes on with it, or finds it complete: status 0 each time, and the undisturbed result."""
    arguments, folder = [*small_arguments(tmp_path), "--go-on"], tmp_path / run.name
    with monkeypatch.context() as patch:
        patch.setattr(dmash, "catch_signals", stopping_after(80))
        assert dmash.main(arguments) == 0
    assert dmash.load(folder / "checkpoint.pt")["step"] == 20 and "stopped at step 20" in capsys.readouterr().out
    assert dmash.main([*arguments, "--steps", "20"]) == 2  # evaluated there, but on the way to 40
    assert "--steps 20: must be a whole number in [40, 1e9]" in capsys.readouterr().err
    assert dmash.main(arguments) == 0 and same_run(run, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    assert dmash.main(arguments) == 0
    assert capsys.readouterr().out == f"{folder}: complete, 40 steps\n"
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}  # nothing is touched
    assert dmash.main([*arguments, "--threads", "2", "--steps", "30"]) == 0  # it has these, and made them with 1 thread
    assert dmash.main([*arguments, "--gamma", ".5"]) == 2
    assert capsys.readouterr().err == f"dmash.py: error: --gamma 0.5: {folder} holds a run with --gamma 0.99\n"
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        assert dmash.main([*arguments, "--device", "cuda"]) == 2  # rather than train on the CPU without a word
    assert capsys.readouterr().err == f"dmash.py: error: --device cuda: {folder} holds a run with --device cpu\n"
    assert dmash.main([*arguments, "--steps", "50"]) == 0 and read(folder / "metrics.csv")[-1]["step"] == "50"
    (folder / "checkpoint.pt").write_bytes(b"")
    assert dmash.main(arguments) == 2 and "checkpoint.pt cannot be read" in capsys.readouterr().err
    assert dmash.main(["--resume", str(folder), "--go-on"]) == 2
    assert "--go-on: not with --resume" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="signals of this kind are not sent on Windows")
def test_sigterm_saves_and_a_second_process_is_refused(run, tmp_path):
    command_line = [sys.executable, str(HERE / "dmash.py"), *small_arguments(tmp_path, steps=100_000)]
    process = subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / run.name
    assert process.stdout.readline() == f"{folder}: 60 random steps, then 100,000 gradient steps; threads: 1\n"
    assert process.stdout.readline().startswith("step 20 ")
    refused = command("--resume", folder)
    assert refused.returncode == 2 and refused.stderr == f"dmash.py: error: {folder} is in use by another process\n"
    there = {name.removesuffix(".partial") for name in os.listdir(folder)}  # it may be saving just now
    assert there == set(dmash.FILES)  # nothing that looks stale and could be removed
    process.terminate()
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0 and error == ""
    assert out.splitlines()[-1].endswith(f"to go on: python {HERE / 'dmash.py'} --resume {folder}")
    assert dmash.load(folder / "checkpoint.pt")["step"] >= 20


@pytest.mark.skipif(os.name == "nt", reason="signals of this kind are not sent on Windows")
def test_a_signal_that_the_parent_said_to_ignore_stops_nothing(run, tmp_path):
    """As `nohup` and shells do for background jobs."""
    script = [sys.executable, str(HERE / "dmash.py"), *small_arguments(tmp_path)]
    ignore = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = subprocess.Popen(script, stdout=subprocess.PIPE, text=True, preexec_fn=ignore)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline().startswith("step 20 ") and process.wait(timeout=60) == 0
    assert same_run(tmp_path / run.name, run)
    process.stdout.close()


def test_another_seed_gives_another_run(run, tmp_path):
    assert dmash.main(small_arguments(tmp_path, seed=2)) == 0
    assert timeless(read(tmp_path / "di_inv__dma_star_sh__s2" / "metrics.csv")) != timeless(read(run / "metrics.csv"))


def test_training_predicts_the_dynamics_and_reads_the_sign():
    """Dynamics steps on real transitions predict far better than 'nothing changes' does; fed with the code of the
    other actuator sign, the model predicts the opposite, which is worse than 'nothing changes'."""
    cfg = small_config(contexts=8, batch=64, hidden=64, bottleneck=8, dynamics_lr=1e-3, mask=0.0)
    run = dmash.Run(cfg, "unused")
    agent, rollout = run.agent, run.rollout
    for _ in range(300):
        rollout.collect(random=True)
    losses = []
    for _ in range(800):
        batch = rollout.replay.sample(cfg.batch)
        loss = dmash.dynamics_loss(agent.f, agent.tell(batch.tau, batch.c, noisy=True)[1], batch)
        losses.append(dmash.minimise(loss, agent.optimizers["dynamics"]).item())
    assert np.mean(losses[-20:]) < 0.1 * np.mean(losses[:5])
    batch = rollout.replay.sample(400)
    nothing = batch.ds.square().mean()
    sign = torch.tensor(rollout.envs.task.c["action_factor"].tolist()).repeat_interleave(50)
    with torch.no_grad():
        z, _ = agent.g(batch.tau, noisy=False)
        right = dmash.dynamics_loss(agent.f, agent.h(z), batch)
        flipped = torch.where(sign.unsqueeze(-1) > 0, z[sign < 0].mean(0), z[sign > 0].mean(0))
        wrong = dmash.dynamics_loss(agent.f, agent.h(flipped), batch)
    assert right < 0.1 * nothing and wrong > nothing


@pytest.mark.parametrize("method", dmash.METHODS)
def test_every_method_trains_and_resumes_exactly(method, run, tmp_path, monkeypatch):
    """Gradient steps move every weight of every network; a stopped and resumed run equals the undisturbed one."""
    whole, folder = (tmp_path / out / f"di_inv__{method}__s1" for out in ("whole", "stopped"))
    arguments = [small_arguments(path.parent, method=method, steps=6, eval_every=3) for path in (whole, folder)]
    assert dmash.main(arguments[0]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(dmash, "catch_signals", stopping_after(60 + 3 + 125 + 1))  # random, gradient, evaluation
        assert dmash.main(arguments[1]) == 0
    assert dmash.load(folder / "checkpoint.pt")["step"] == 4
    assert dmash.main(["--resume", str(folder)]) == 0
    assert same_run(folder, whole)
    fresh = dmash.Run(small_config(method=method), "unused").agent.state_dict()
    trained = dmash.load(whole / "checkpoint.pt")["agent"]
    assert set(fresh) == set(trained)
    for name, weight in fresh.items():
        assert not torch.equal(weight, trained[name]), name


@pytest.mark.parametrize("method", ["dma_star_sh", "dma_star_h"])
def test_no_gradient_step_leaves_tensors_behind(method, tmp_path):
    """Small ones that stay pin the memory that is freed around them: dma_star_h grew to 7 GB."""

    def tensors(run):
        for _ in range(4):
            run.gradient_step()
        gc.collect()
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    run = dmash.Run(small_config(method=method), tmp_path)
    for _ in range(30):
        run.rollout.collect(random=True)
    assert tensors(run) == tensors(run) and len(run.losses["critic_loss"]) == 8


def test_plots(run, tmp_path, monkeypatch):
    """One panel of returns, one per binary dimension, one per other dimension, and a single one if those are many."""
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib, which is optional, is not installed").Figure
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    for env_id, panels in (("di_inv", 3), ("ode", 3), ("ode_20", 2), ("cartpole_inv", 3)):
        drawn = dmash.Run(small_config(env=env_id), tmp_path / "costs $5")
        drawn.step, drawn.step_seconds, drawn.losses["critic_loss"] = 1, 1.0, torch.zeros(1)
        fake = lambda agent, cfg, contexts, *_, **__: (
            np.ones((len(contexts), 1)),
            np.zeros((len(contexts), 1), dtype=bool),
        )
        monkeypatch.setattr(dmash, "evaluate", fake)
        drawn.evaluate()
        assert len(dmash.draw(figure, drawn).axes) == panels
    (tmp_path / "costs $5").mkdir()
    dmash.plot(drawn)
    assert (tmp_path / "costs $5" / "curve.png").exists()


def test_command_line_end_to_end_without_matplotlib_and_tqdm(tmp_path):
    """As a script in a process of its own, in which both optional packages are missing."""
    code = "import sys; sys.modules['matplotlib'] = sys.modules['tqdm'] = None; import dmash; sys.exit(dmash.main())"
    done = command(*small_arguments(tmp_path, steps=4, eval_every=2), code=code)
    assert done.returncode == 0 and done.stderr == ""
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:3]] == [["step", "2"], ["step", "4"]]
    assert not (tmp_path / "di_inv__dma_star_sh__s1" / "curve.png").exists()
    again = command(*small_arguments(tmp_path, steps=4, eval_every=2))
    assert again.returncode == 2 and "already holds a run" in again.stderr  # nothing is overwritten
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
        "diverged",
    ]


def test_tables_of_environments_and_methods(capsys):
    lines = aib_envs.table().splitlines()
    assert [line.split()[0] for line in lines] == ["id", *aib_envs.ENVS]
    assert lines[5].split()[:6] == ["cartpole_inv", "Cartpole", "non-overlapping", "1000", "128", "100000"]
    assert lines[5].endswith("length 0.5, [0.3, 0.85], [0.1, 2]; action_factor in {-1, 1}")
    done = subprocess.run([sys.executable, HERE / "aib_envs.py"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines() == lines
    assert dmash.main(["--list-methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["--method", *dmash.METHODS]
    assert lines[7].split()[:6] == ["da", "DA", "true", "adapter", "nothing", "own"]


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


def test_numbers_may_be_text_also_with_an_exponent():
    cfg = dmash.Config(steps="1e5", seed="4294967295", gamma="1", critic_lr=1)
    assert (cfg.steps, cfg.seed, cfg.gamma, cfg.critic_lr) == (100_000, 4294967295, 1.0, 1.0)
    assert [type(value) for value in (cfg.steps, cfg.seed, cfg.gamma, cfg.critic_lr)] == [int, int, float, float]


def test_quick_is_a_named_set_of_settings(tmp_path, capsys):
    """In the folder's name, in config.json, in --help; what is given beside it comes first."""
    cfg = dmash.quick(env="reacher_easy_inv", polyak=0.5)
    assert cfg.quick and cfg.steps == 20_000 and cfg.polyak == 0.5
    assert all(getattr(cfg, name) == value for name, value in dmash.QUICK.items() if name != "polyak")
    paper = dmash.Config()
    assert not paper.quick and all(getattr(paper, name) != value for name, value in dmash.QUICK.items())
    assert dmash.main(["--quick", *small_arguments(tmp_path, steps=2, eval_every=2)]) == 0
    folder = tmp_path / "di_inv__dma_star_sh__quick__s1"
    config = json.loads((folder / "config.json").read_text())
    assert config["quick"] and config["polyak"] == dmash.QUICK["polyak"] and config["eval_every"] == 2
    assert {name.split(".")[0] for name in dmash.load(folder / "policy.pt")["agent"]} == {"g", "h", "pi", "pi_average"}
    assert dmash.main(["--resume", str(folder), "--steps", "3"]) == 0
    capsys.readouterr()
    assert dmash.main(["--eval", str(folder), "--rollouts", "1"]) == 0
    assert dmash.main(["--resume", str(folder), "--quick"]) == 2
    assert "--quick: not with --resume" in capsys.readouterr().err
    assert all(
        f"{name} {value}" in " ".join(dmash.build_parser().format_help().split()) for name, value in dmash.QUICK.items()
    )


def test_help_names_every_setting():
    done = command("--help")
    assert done.returncode == 0
    assert all(dmash.flag(name) in done.stdout for name in dmash.Config.__dataclass_fields__)
    places = [done.stdout.index(f"\n{heading}:\n") for heading in dmash.HEADINGS.values()]
    assert places == sorted(places) and set(dmash.HEADINGS) <= set(dmash.Config.__dataclass_fields__)
    assert all(symbol in done.stdout[places[-1] :] for symbol in ("γ", "ρ", "α₁", "α₂", "α₃", "α, temperature"))


BAD_COMMANDS = [
    ("--env cartpole", "unknown environment 'cartpole' (did you mean cartpole_inv?)"),
    ("--env nonsense", "unknown environment 'nonsense'; known: di_inv, di_friction, di_perm, ode, cartpole_inv, "),
    ("--env ./my_module:my_env", "--env ./my_module:my_env: the 'package' argument is required"),
    ("--stepz 5", "unrecognized arguments: --stepz 5"),
    ("extra", "unrecognized arguments: extra"),
    ("--steps 0", "--steps 0: must be a whole number in [1, 1e9]"),
    ("--steps -5", "--steps -5: must be a whole number in [1, 1e9]"),
    ("--steps 1.5", "--steps 1.5: must be a whole number in [1, 1e9]"),
    ("--steps many", "--steps many: must be a whole number in [1, 1e9]"),
    ("--steps", "expected one argument"),
    ("--seed -1", "--seed -1: must be a whole number in [0, 4294967295]"),
    ("--gamma 1.5", "--gamma 1.5: must be a number in [0, 1]"),
    ("--gamma nan", "--gamma nan: must be a number in [0, 1]"),
    ("--polyak 0", "--polyak 0: must be a number in (0, 1]"),
    ("--mask -0.1", "--mask -0.1: must be a number in [0, 1]"),
    ("--subsample 0", "--subsample 0: must be a number in (0, 1]"),
    ("--critic-lr 0", "--critic-lr 0: must be a number in (0, 1]"),
    ("--actor-lr inf", "--actor-lr inf: must be a number in (0, 1]"),
    ("--K 0", "--K 0: must be a whole number in [1, 1e6]"),
    ("--env di_inv --K 101", "--K 101: must be at most the horizon, 100 for di_inv"),
    ("--buffer 128", "--buffer 128: must be more than --K, here 128"),
    ("--batch 19", "--batch 19: must be at least --contexts, here 20"),
    ("--d-z 6", "--d-z 6: must be a multiple of 4"),
    ("--method dma_sta_sh", "unknown method 'dma_sta_sh' (did you mean dma_star_sh?)"),
    ("--method da --mask 0.4", "--mask 0.4: da has no encoder"),
    ("--threads 0", "--threads 0: must be a whole number in [1, 1024]"),
    ("--device gpu", "--device gpu: not usable here; allowed: cpu"),
    ("--per-context", "--per-context: allowed only with --eval RUN"),
    ("--eval nowhere", "nowhere: no such file; allowed: a run folder with a policy.pt, or such a file"),
    ("--eval nowhere --steps 5", "--steps: not with --eval"),
    ("--eval nowhere --list-methods", "not allowed with argument --eval"),
    ("--eval nowhere --resume elsewhere", "not allowed with argument --eval"),
    ("--resume nowhere", "--resume nowhere: no run folder"),
    ("--resume nowhere --seed 3", "--seed: not with --resume, which allows --steps"),
    ("--resume nowhere --method dr", "--method: not with --resume, which allows --steps"),
    ("--device meta", "--device meta: not usable here; allowed: cpu"),
    ("--out /dev/null", "/dev/null/cartpole_inv__dma_star_sh__s1: Not a directory"),
    ("--env", "expected one argument"),
    ("--env ode_21", "unknown environment 'ode_21' (did you mean ode_2?)"),
    ("--steps 1e-3", "--steps 1e-3: must be a whole number in [1, 1e9]"),
    ("--steps inf", "--steps inf: must be a whole number in [1, 1e9]"),
    ("--steps 10000000000", "--steps 10000000000: must be a whole number in [1, 1e9]"),
    ("--seed one", "--seed one: must be a whole number in [0, 4294967295]"),
    ("--seed 4294967296", "--seed 4294967296: must be a whole number in [0, 4294967295]"),
    ("--contexts 0", "--contexts 0: must be a whole number in [1, 1000]"),
    ("--eval-every 0", "--eval-every 0: must be a whole number in [1, 1e9]"),
    ("--rollouts 0", "--rollouts 0: must be a whole number in [1, 1000]"),
    ("--mask 1.01", "--mask 1.01: must be a number in [0, 1]"),
    ("--mask half", "--mask half: must be a number in [0, 1]"),
    ("--subsample 1.1", "--subsample 1.1: must be a number in (0, 1]"),
    ("--dynamics-lr -1", "--dynamics-lr -1: must be a number in (0, 1]"),
    ("--alpha-lr -1e-3", "expected one argument"),
    (
        "--env di_inv --contexts 1000 --batch 1000 --buffer 1000000000 --steps 1 --random-steps 30",
        "not enough memory for these settings",
    ),
    ("--eval=", "policy.pt: no such file"),
    ("--resume=", "--resume .: no run folder"),
    ("--list-methods --gamma 0.9", "--gamma: not with --list-methods, which allows no setting"),
    ("--device hpu", "--device hpu: not usable here; allowed: cpu"),
    ("--hidden 100000", "--hidden 100000: must be a whole number in [1, 10000]"),
    ("--list-methods --resume x", "not allowed with argument --list-methods"),
    ("--resume nowhere --per-context", "--per-context: allowed only with --eval RUN"),
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


def resaved(**changes):
    """A policy file with sound check sums and other contents."""
    return lambda data: saved(torch.load(io.BytesIO(data), weights_only=True) | changes)


SETTINGS = dataclasses.asdict(small_config())
DAMAGES = [
    (lambda data: data[: len(data) // 2], "policy.pt cannot be read"),
    (lambda data: b"", "policy.pt cannot be read"),
    (None, "no such file"),
    (lambda data: saved([1]), "policy.pt cannot be read"),
    (resaved(settings=SETTINGS | {"gamma": 7}), "policy.pt cannot be read (--gamma 7: must be a number in [0, 1])"),
    (resaved(settings=SETTINGS | {"gamme": 1}), "policy.pt cannot be read"),
    (resaved(settings=SETTINGS | {"env": [1]}), "policy.pt cannot be read"),
    (resaved(settings=SETTINGS | {"env": "cartpool"}), "policy.pt cannot be read (unknown environment 'cartpool'"),
    (resaved(settings=SETTINGS | {"hidden": 128}), "policy.pt cannot be read"),
    (resaved(agent={}), "policy.pt cannot be read (no g.embed.weight)"),
    (resaved(step="x"), "policy.pt cannot be read"),
]


@pytest.mark.parametrize("damage, message", DAMAGES)
def test_damaged_policies_are_named_as_such(damage, message, folder, capsys):
    path = folder / "policy.pt"
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
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
    dmash.Run(small_config(), "unused")
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
            dmash.load(path)  # raises if it is damaged
        if status == -signal.SIGKILL:
            begun = (folder / "checkpoint.pt").exists()
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
@pytest.mark.parametrize("when", ["first", "later"])
def test_a_full_disk_stops_the_run_and_loses_nothing(when, run, tmp_path, monkeypatch):
    """A limit on the size of a file: no room for the first checkpoint.pt, or for the one of the first evaluation."""
    with monkeypatch.context() as patch:
        patch.setattr(dmash, "catch_signals", stopping_after(61))
        assert dmash.main(small_arguments(tmp_path / "other")) == 0
    limit = 10_000 if when == "first" else (tmp_path / "other" / run.name / "checkpoint.pt").stat().st_size
    code = "import resource as r, sys, dmash; r.setrlimit(r.RLIMIT_FSIZE, ({0}, {0})); sys.exit(dmash.main())"
    done = command(*small_arguments(tmp_path), code=code.format(limit))
    folder = tmp_path / run.name
    assert done.returncode == 2
    assert done.stderr == f"dmash.py: error: {folder / 'checkpoint.pt'}: File too large\n", done.stderr
    assert not list(folder.glob("*.partial"))
    assert (folder / "checkpoint.pt").exists() == (when == "later")
    if when == "later":
        assert dmash.load(folder / "checkpoint.pt")["step"] == 0
    assert dmash.main(["--resume", str(folder)] if when == "later" else small_arguments(tmp_path)) == 0
    assert same_run(folder, run)


@pytest.mark.skipif(os.name == "nt", reason="an open folder cannot be removed on Windows")
def test_a_folder_that_vanishes_is_told(run, tmp_path, monkeypatch, capsys):
    evaluate = dmash.evaluate

    def vanish(*args, **kwargs):
        shutil.rmtree(tmp_path / run.name)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(dmash, "evaluate", vanish)
    assert dmash.main(small_arguments(tmp_path)) == 2
    message = f"{tmp_path / run.name / 'checkpoint.pt'}: No such file or directory"
    assert capsys.readouterr().err == f"dmash.py: error: {message}\n"


@pytest.mark.skipif(os.name == "nt", reason="these permissions are not known to Windows")
def test_a_folder_that_cannot_be_written(run):
    """As a user without rights on it. It can still be evaluated."""
    code = """if True:
        import os, sys, dmash, torch.utils.serialization
        dmash.Run(dmash.Config("di_inv"), "unused")  # what is imported late may be out of that user's reach
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
        assert new.returncode == 2
        assert new.stderr == f"dmash.py: error: {there}/di_inv__dma_star_sh__s2: Permission denied\n"
        assert resumed.returncode == 2
        assert resumed.stderr == f"dmash.py: error: {folder}/checkpoint.pt: Permission denied\n"
        assert evaluated.returncode == 0 and evaluated.stderr == ""
        assert sorted(os.listdir(folder)) == sorted(os.listdir(run))


def test_flipped_bits_are_found(run, tmp_path):
    """Wherever a bit of a checkpoint is flipped: the file is refused, or the bit meant nothing."""
    data, rng = (run / "checkpoint.pt").read_bytes(), np.random.default_rng(0)
    whole, refused = dmash.load(run / "checkpoint.pt"), 0
    places = [*rng.integers(len(data), size=15), *rng.integers(2000, size=5), *(len(data) - rng.integers(2000, size=5))]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.integers(8)
        (tmp_path / "checkpoint.pt").write_bytes(damaged)
        try:
            state = dmash.load(tmp_path / "checkpoint.pt")
        except Exception:
            refused += 1
        else:
            assert as_text(state) == as_text(whole), place
    assert refused >= 15


WRONG_CHECKPOINTS = [
    (lambda data: data[: len(data) // 2], ""),
    (lambda data: b"", ""),
    (lambda data: b"x" * 1000, ""),
    (lambda data: data[:1_000_000] + bytes([data[1_000_000] ^ 1]) + data[1_000_001:], "is damaged"),
    (lambda data: saved({"g": 1}), "'settings'"),
    (lambda data: saved([1, 2]), ""),
    (lambda data: saved({"settings": SETTINGS | {"out": "x"}}), "'step'"),
    (resaved(settings=SETTINGS | {"hidden": 128}), ""),
    (resaved(settings={name: SETTINGS[name] for name in ("env", "seed")} | {"gamme": 1}), "'gamme'"),
    (resaved(settings=SETTINGS | {"device": "cuda:99"}), "--device cuda:99: not usable here"),
    (resaved(step="x"), "step 'x', evaluated at 40, of 40"),
    (resaved(step=40.5), "step 40.5, evaluated at 40, of 40"),
    (resaved(step=75), "step 75, evaluated at 40, of 40"),
    (resaved(step=39), "step 39, evaluated at 40, of 40"),
    (resaved(losses={}), "'dynamics_loss'"),
    (resaved(history=[{"metrics": {}}]), "'step'"),
    (resaved(rollout={}), "'replay'"),
    (resaved(generators=[]), ""),
]


@pytest.mark.parametrize("damage, reason", WRONG_CHECKPOINTS)
def test_damaged_and_foreign_checkpoints_are_refused(damage, reason, folder, capsys):
    path = folder / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert dmash.main(["--resume", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dmash.py: error: {folder}/checkpoint.pt cannot be read (") and reason in error
    assert error.count("\n") == 1
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def as_text(state):
    return str(tree_map_only(torch.Tensor, lambda value: value.numpy().tobytes(), state))


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("rows", [1, 2])
def test_a_run_without_its_checkpoint_is_neither_resumed_nor_written_over(rows, folder, capsys):
    (folder / "checkpoint.pt").unlink()
    lines = (folder / "metrics.csv").read_text().splitlines(keepends=True)
    (folder / "metrics.csv").write_text("".join(lines[: 1 + rows]))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert dmash.main(["--resume", str(folder)]) == 2
    assert f"--resume {folder}: no run folder (it has no checkpoint.pt)" in capsys.readouterr().err
    assert dmash.main(small_arguments(folder.parent)) == 2
    assert f"{folder} already holds a run (policy.pt, config.json, metrics.csv" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("file, option", [("policy.pt", "--eval"), ("checkpoint.pt", "--resume")])
def test_a_checkpoint_from_a_stranger_runs_no_code(file, option, folder, tmp_path, capsys):
    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "attacked"),))

    (folder / file).write_bytes(saved({"g": Attack()}))
    assert dmash.main([option, str(folder)]) == 2
    assert f"{file} cannot be read" in capsys.readouterr().err and not (tmp_path / "attacked").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_output_that_cannot_be_written_is_told_once():
    with open("/dev/full", "w") as full:
        script = [sys.executable, str(HERE / "dmash.py"), "--list-methods"]
        done = subprocess.run(script, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "dmash.py: error: output: No space left on device\n")


@pytest.mark.skipif(os.name == "nt", reason="streams are closed like this by Unix shells")
@pytest.mark.parametrize("closing", ["1>&-", "2>&-", "1>&- 2>&-"])
def test_closed_streams_cost_nothing(closing, run, tmp_path):
    line = " ".join([sys.executable, str(HERE / "dmash.py"), *small_arguments(tmp_path)])
    done = subprocess.run(f"{line} {closing}", shell=True, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert same_run(tmp_path / run.name, run)


def test_a_console_that_cannot_show_a_name_costs_nothing(run, tmp_path):
    out = tmp_path / "läufe"
    done = command(*small_arguments(out, steps=2), environment={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "") and "l\\xe4ufe" in done.stdout


def test_a_picture_that_cannot_be_drawn_costs_a_line(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, which is optional, is not installed")
    done = command(*small_arguments(tmp_path, steps=2), environment={"MPLBACKEND": "nonsense"})
    assert (done.returncode, done.stderr) == (0, "") and "\ncurve.png is not drawn (" in done.stdout
    assert len(done.stdout.splitlines()) == 4


@pytest.mark.parametrize("changes", [{}, {"steps": 30, "batch": 16}])
def test_a_folder_that_holds_a_run_is_refused(changes, run, capsys):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert dmash.main(small_arguments(run.parent, **changes)) == 2
    assert capsys.readouterr().err == (
        f"dmash.py: error: {run} already holds a run ({', '.join(dmash.FILES)}); choose another --seed or --out, "
        f"or go on with --resume {run}\n"
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
    agent.Q_target.Q1.head.bias.data[0] = math.nan
    return losses


def poison_loss(name, when):
    """The same for one of the loss functions: its value, the first where there are two."""
    function, calls = getattr(dmash, name), []

    def poisoned(*args):
        calls.append(1)
        result = function(*args)
        if len(calls) < when:
            return result
        return (result[0] * math.nan, *result[1:]) if isinstance(result, tuple) else result / 0

    return dmash, name, poisoned


NOT_FINITE = {  # what goes wrong at gradient step 30: 24 warm-up steps and 60 random ones come before the first
    "observation": lambda: poison(lambda envs, out: (out[0] * np.nan, *out[1:]), (aib_envs.VectorEnv, "step"), 114),
    "reward": lambda: poison(lambda envs, out: (out[0], out[1] + np.inf, out[2]), (aib_envs.VectorEnv, "step"), 114),
    "action": lambda: poison(lambda agent, a: a * math.nan, (dmash.Agent, "act"), 30),
    "dynamics_loss": lambda: poison_loss("dynamics_loss", 30),
    "critic_loss": lambda: poison_loss("critic_loss", 30),
    "actor_loss": lambda: poison_loss("actor_loss", 29),  # twice at every second step
    "weight Q_target.Q1.head.bias": lambda: poison(nan_weight, (dmash.Agent, "update"), 40),
}


@pytest.mark.parametrize("name", NOT_FINITE)
def test_numbers_that_go_wrong_stop_the_run(name, run, tmp_path, capsys, monkeypatch):
    folder = tmp_path / run.name
    with monkeypatch.context() as patch:
        patch.setattr(dmash, "evaluate", lambda agent, cfg, contexts, *_, **__: np.zeros((2, len(contexts), 1), int))
        patch.setattr(*NOT_FINITE[name]())
        assert dmash.main(small_arguments(tmp_path)) == 1
    step = 40 if name.startswith("weight") else 30
    message = f"step {step}: {name} is not finite; the run stops, the last checkpoint in {folder} is untouched"
    assert capsys.readouterr().err == f"dmash.py: error: {message}\n"
    assert [dmash.load(folder / file)["step"] for file in ("checkpoint.pt", "policy.pt")] == [20, 20]
    assert dmash.main(["--resume", str(folder)]) == 0  # without the fault


def test_a_gpu_s_losses_are_looked_at_every_hundred_steps(tmp_path, monkeypatch):
    """Here a CPU that is taken for a GPU: a loss that went wrong once, at step 30, stops the run at step 100."""
    run = dmash.Run(small_config(out=str(tmp_path), random_steps=30), tmp_path)
    run.cfg.device = "cuda"
    update = dmash.Agent.update

    def poisoned(agent, batch, step):
        losses = update(agent, batch, step)
        return losses | {"critic_loss": losses["critic_loss"] * (math.nan if step == 30 else 1)}

    monkeypatch.setattr(dmash.Agent, "update", poisoned)
    run.rollout.collect(random=True)
    with pytest.raises(FloatingPointError, match="critic_loss is not finite"):
        for _ in range(150):
            run.gradient_step()
    assert run.step == 100


def test_a_simulation_that_diverges_stops_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # MuJoCo notes it in a file where it is
    too_fast = np.array([0.0, 0.0, 1e11, 1e11])
    monkeypatch.setattr(aib_envs.Cartpole, "initial_state", lambda self, i, rng: too_fast)
    assert dmash.main(small_arguments(tmp_path / "runs", env="cartpole_inv")) == 1
    assert capsys.readouterr().err.endswith("__s1 is untouched\n")


def test_an_evaluation_that_diverges_is_told_and_training_goes_on(run, tmp_path, monkeypatch, capsys):
    """The lightest mass of eval_out flies off: its column counts it, its return is what came before."""
    advance = aib_envs.DoubleIntegrator.advance

    def fly_off(task, actions):
        advance(task, actions)
        task.p[task.c["mass"] < 0.2] = np.nan

    monkeypatch.setattr(aib_envs.DoubleIntegrator, "advance", fly_off)
    assert dmash.main(small_arguments(tmp_path)) == 0
    lines, rows = capsys.readouterr().out.splitlines(), read(tmp_path / run.name / "metrics.csv")
    assert [line.endswith("  1 evaluation episodes diverged") for line in lines] == [False, True, True, False]
    assert [[row[f"diverged_{name}"] for name in dmash.SETS] for row in rows] == [["0", "0", "1"]] * 2
    assert all(row[name] != "nan" for row in rows for name in dmash.SETS)
    contexts = read(tmp_path / run.name / "per_context.csv")
    assert [row["mass"] for row in contexts if row["diverged"] == "1"] == ["0.1", "0.1"]
    policies = [dmash.load(folder / "policy.pt")["agent"] for folder in (tmp_path / run.name, run)]
    assert all(torch.equal(weight, policies[1][name]) for name, weight in policies[0].items())


@pytest.mark.parametrize("missing", [AttributeError, OSError, TypeError])
def test_a_system_without_mallopt_costs_nothing(missing, monkeypatch):
    """musl and macOS have none, elsewhere there is no such library, on Windows not even the question."""

    def library(name):
        raise missing

    monkeypatch.setattr(dmash.ctypes, "CDLL", library)
    dmash.keep_freed_memory()


def test_averages_of_dead_units_become_zero():
    """And not numbers below 1e-38, which a CPU is slow with: after 100,000 steps they are a third of Adam's averages.
    In all of torch's threads."""
    code = """if True:
        import torch, dmash, test_dmash
        dmash.Run(test_dmash.small_config(threads=2), ".")
        weight = torch.ones(2**20, requires_grad=True)
        weight.grad = torch.zeros(2**20)
        adam = torch.optim.Adam([weight], fused=True)
        adam.step()
        bits = adam.state[weight]["exp_avg"].view(torch.int32)
        bits.fill_(1000)  # 1.4e-42
        adam.step()
        print(bits.count_nonzero().item())"""
    done = command(code=code)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_signal_handlers_are_put_back():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]  # also where one was ignored
    try:
        with dmash.catch_signals() as stop:
            stop()
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(dmash.Stopped):
                stop()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        assert [signal.getsignal(number) for number in numbers] == [signal.default_int_handler] * 2
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------
# python test_dmash.py: the tables of the README
# ---------------------------------------------------------------------------------------------------------------


def main():
    """Prints how far each environment is from its reference, what a step of 20 contexts costs, and faults survived."""
    sys.path.insert(0, str(HERE / "studies"))
    from benchmark import vector_step_times

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
        vector, bare = vector_step_times(env_id, 20)
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
