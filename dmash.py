"""DMA*-SH: dynamics-aligned shared hypernetworks for contextual reinforcement learning, in one file.

A hidden context (an arm's length, a flipped actuator) changes the dynamics. An encoder reads it from the last K
transitions; a hypernetwork turns what it read into the weights of one small adapter; the dynamics model, the policy
and both critics all carry that same adapter. Encoder and hypernetwork are trained by the dynamics model's prediction
error alone; to the RL losses the adapter is a constant. Nothing is trained at evaluation, on contexts never seen before
(zero-shot).

    window of K past transitions (s, a, δs)
        │  τ (B, L, 2 d_s + d_a)      L = ⌊0.2 K⌋ of them
        ▼
    encoder g_φ ───── z (B, 8) ─────▶ hypernetwork h_η ───── ω ─┬──▶ dynamics model f_{θ,ω}   trains φ, η, θ  (Eq. 1)
                                                                ├──▶ policy π_{ξ,ω}           trains ξ only   (Eq. 2)
                                                                └──▶ critics Q_{ζ,ω}          trains ζ only   (Eq. 2)

Algorithm 2. Line 1 is `Rollout.step`, sampling is `Replay.sample`, the rest is `Agent.update`, line by line. A gradient
step is one step of all training contexts (line 1) and one update; an episode begins with K further steps (`Rollout.
begin_episode`), a run with 5,000 steps of random actions. α₁, α₂, α₃ are learning rates, α is the temperature.

    1  in every training context: z ← g_φ(τ), ω ← h_η(z), a ~ π_{ξ,ω}(·|s); store (s, a, δs, r)
    2  sample a batch with windows; z ← g_φ(τ), ω ← h_η(z)
    3  (φ, θ, η) ← (φ, θ, η) − α₃ ∇L_{φ,θ,η}, the error of predicting δs                             (Eq. 1)
    4  ω ← stop-gradient(ω)                                                                          (Eq. 2)
    5  ζ ← ζ − α₂ ∇L_ζ, target r + γ (min Q̄_{ζ̄,ω}(s', a') − α log π_{ξ,ω}(a'|s')), a' ~ π_{ξ,ω}(·|s')
    6  every second step, twice: ξ ← ξ − α₁ ∇L_ξ, then the temperature α
    7  ζ̄ ← ζ̄ + ρ (ζ − ζ̄), ρ the Polyak rate

What f, π and Q are given of the context is `told` in the code: ω in DMA*-SH, something else in the methods that it is
compared with (METHODS, which a first reader may skip).

    python dmash.py --env cartpole_inv                              train, evaluate, save and plot one run
    python dmash.py --env cartpole_inv --method concat              the same with another method of the comparison
    python dmash.py --resume runs/cartpole_inv__dma_star_sh__s1     go on with a run that was stopped or killed
    python dmash.py --eval runs/cartpole_inv__dma_star_sh__s1       returns on the three context sets

Paper: Benad, Banerjee, Röder, Ay, Butz, Eppe, "Dynamics-Aligned Shared Hypernetworks for Contextual RL under
Discontinuous Shifts", arXiv 2602.06550. Equations and algorithms are cited by its numbers.

Axes, in every shape below: B samples, N contexts, K transitions per window, L of them read.
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import gymnasium
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import aib_envs

# ---- The methods of the comparison: the defaults are DMA*-SH ----------


class Method(NamedTuple):
    """One method: what its networks are told about the context, and how."""

    paper: str  # its name there
    context: str = "inferred"  # inferred: the code z; true: c itself; none
    rl: str = "adapter"  # how it enters π and Q: adapter, concat, nothing
    f: str = "adapter"  # how it enters f: adapter, concat; nothing: there is no f
    hypernetwork: str = "shared"  # shared: one, trained by Eq. 1; own: one in each network, trained by its loss; none
    mask: float = 0.4  # probability of masking each input vector of the encoder
    input_norm: bool = True  # AvgL1Norm in the encoder
    output_norm: bool = True  # SimNorm in the encoder
    kl: float = 0.0  # above 0: the code is Gaussian; weight of its KL term, relative to the dynamics loss
    into_eta: str = "none"  # RL losses that reach η all the same, by way of ω in π and Q: how we read the paper


PLAIN = dict(mask=0.0, input_norm=False, output_norm=False)  # an encoder without masks and norms
CONCAT = dict(rl="concat", f="concat", hypernetwork="none")
METHODS = {
    "dma_star_sh": Method("DMA*-SH"),
    "dma_star_h": Method("DMA*-H", hypernetwork="own"),
    "dma_star": Method("DMA*", **CONCAT, mask=0.2),
    "dma": Method("DMA", **CONCAT, **PLAIN),
    "dma_pearl": Method("DMA-Pearl", **CONCAT, **PLAIN, kl=0.4),
    "concat": Method("Concat", context="true", rl="concat", f="nothing", hypernetwork="none", **PLAIN),
    "da": Method("DA", context="true", f="nothing", hypernetwork="own", **PLAIN),
    "dr": Method("DR", context="none", rl="nothing", f="nothing", hypernetwork="none", **PLAIN),
    "dma_sh": Method("ablation", **PLAIN),
    "rl_adapters": Method("ablation", f="concat", hypernetwork="own"),
    "no_mask": Method("ablation", mask=0.0),
    "no_input_norm": Method("ablation", input_norm=False),
    "no_output_norm": Method("ablation", output_norm=False),
    "critic_into_eta": Method("ablation", into_eta="critic"),
    "actor_into_eta": Method("ablation", into_eta="actor"),
    "both_into_eta": Method("ablation", into_eta="critic and actor"),
}

# ---- Context encoder g_φ: window τ -> context code z ------------------------------------------------------------


def subsample(B, K, L, noisy, device=None):
    """Which L of K window positions the encoder reads, (B, L): if `noisy`, a random subset in random order, drawn per
    sample, since the context does not depend on time; else evenly spaced, oldest first, rounded down."""
    if noisy:
        return torch.rand(B, K, device=device).topk(L).indices
    return (torch.arange(L, device=device) * (K - 1) // max(L - 1, 1)).expand(B, L)


def mask_inputs(tau, d_s, d_a, p):
    """Random input masking: at each time step, each of the vectors s, a, δs becomes zero with probability p. Unlike in
    dropout, what is left is not scaled up."""
    B, L, _ = tau.shape
    keep = (torch.rand(B, L, 3, device=tau.device) >= p).float().split(1, -1)  # for s, a, δs, (B, L, 1) each
    return tau * torch.cat([k.expand(B, L, d) for k, d in zip(keep, (d_s, d_a, d_s))], -1)


def avg_l1_norm(x):
    """x / mean_i |x_i| over the last axis."""
    return x / x.abs().mean(-1, keepdim=True).clamp(min=1e-8)


def sim_norm(x, group):
    """Softmax within each group of `group` numbers of the last axis."""
    return x.unflatten(-1, (-1, group)).softmax(-1).flatten(-2)


class ContextEncoder(nn.Module):
    """g_φ: masking -> linear -> AvgL1Norm -> LSTM, its last hidden state -> linear -> SimNorm."""

    GROUP = 4  # numbers in one softmax of SimNorm

    def __init__(self, d_s, d_a, d_z=8, hidden=32, mask=0.4, method=METHODS["dma_star_sh"]):
        super().__init__()
        self.d_s, self.d_a, self.mask, self.method = d_s, d_a, mask, method
        self.embed = nn.Linear(2 * d_s + d_a, hidden, bias=False)
        self.lstm = nn.LSTM(hidden, hidden)
        self.project = nn.Linear(hidden, d_z, bias=False)
        self.variance = nn.Linear(hidden, d_z, bias=False) if method.kl else None

    def forward(self, tau, noisy):
        """tau (B, L, 2 d_s + d_a) -> z (B, d_z), and the KL term of a Gaussian code (0 without). Masks if `noisy`."""
        if noisy:
            tau = mask_inputs(tau, self.d_s, self.d_a, self.mask)
        e = self.embed(tau)  # (B, L, 32)
        if self.method.input_norm:
            e = avg_l1_norm(e)
        _, (last, _) = self.lstm(e.transpose(0, 1))  # time first is faster; last (1, B, 32)
        z = self.project(last[0])  # (B, 8)
        if self.variance is not None:
            return gaussian_code(z, F.softplus(self.variance(last[0])), noisy)
        return (sim_norm(z, self.GROUP) if self.method.output_norm else z), 0.0


def gaussian_code(mean, variance, noisy):
    """DMA-Pearl's code: a sample of N(mean, variance) if `noisy`, else the mean; and KL(N(mean, variance) ‖ N(0, 1)),
    mean over samples and dimensions. (B, d_z) each."""
    kl = (variance + mean.square() - 1 - variance.log()) / 2
    z = mean + variance.sqrt() * torch.randn_like(mean) if noisy else mean
    return z, kl.mean()


# ---- Hypernetwork h_η: z -> ω, and the adapter made of ω --------------------------------------------------------


class Omega(NamedTuple):
    """ω, the weights of B adapters, one adapter per sample. For row vectors, which multiply from the left: the matrices
    are the transposes of Eq. 3's, which as they stand would make a gradient step 5 % slower."""

    W_down: torch.Tensor  # (B, 256, 32)
    b_down: torch.Tensor  # (B, 1, 32)
    W_up: torch.Tensor  # (B, 32, 256)
    b_up: torch.Tensor  # (B, 1, 256)

    def detach(self):
        return Omega(*(w.detach() for w in self))


class Hypernetwork(nn.Module):
    """h_η: z (B, d_z) -> Omega. One linear head per tensor of ω: cut out of one, its gradient would be copied."""

    def __init__(self, d_z=8, hidden=64, d_x=256, bottleneck=32, bfloat16=False):
        super().__init__()
        self.bfloat16 = bfloat16
        self.shapes = Omega((d_x, bottleneck), (1, bottleneck), (bottleneck, d_x), (1, d_x))
        self.trunk = nn.Sequential(nn.Linear(d_z, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(hidden, math.prod(shape)) for shape in self.shapes)

    def forward(self, z):
        y = self.trunk(z)  # (B, 64)
        with torch.autocast(y.device.type, torch.bfloat16, self.bfloat16):
            tensors = [head(y).to(y.dtype) for head in self.heads]  # (B, 256 · 32) and so on
        return Omega(*(w.unflatten(-1, shape) for w, shape in zip(tensors, self.shapes)))


def adapter(x, omega):
    """Eq. 3: g_adapter(x; ω) = W_up ReLU(W_down x + b_down) + b_up, x (B, 256) -> (B, 256).

    ω may have fewer rows than x, where neighbouring samples share a context: each row then serves as many."""
    x = x.unflatten(0, (len(omega.b_up), -1))  # (rows of ω, samples per row, 256)
    down = F.relu(torch.baddbmm(omega.b_down, x, omega.W_down))
    return torch.baddbmm(omega.b_up, down, omega.W_up).flatten(0, 1)


# ---- The three users of ω: dynamics model f_{θ,ω}, policy π_{ξ,ω}, critics Q_{ζ,ω} ------------------------------


class Network(nn.Module):
    """Trunk -> x, x̃ = x + g_adapter(x; ω) (Eq. 3), ReLU, head. `told` is ω; in other methods than DMA*-SH, something
    that is concatenated to the input, or that a hypernetwork of the network's own (`make_own`) turns into ω."""

    def __init__(self, d_in, d_out, d_x=256, how="adapter", d_told=0, make_own=None):
        super().__init__()
        self.how, self.own = how, make_own and make_own()
        d_in += d_told if how == "concat" else 0
        self.trunk = nn.Sequential(nn.Linear(d_in, d_x), nn.ReLU(), nn.Linear(d_x, d_x))
        self.head = nn.Linear(d_x, d_out)

    def forward(self, inputs, told):
        """inputs (B, d_in) -> (B, d_out)."""
        if self.how == "concat":  # [s; z], [s; a; z]; one row of c serves all samples of its context
            inputs = torch.cat([inputs, told.repeat_interleave(len(inputs) // len(told), 0)], -1)
        x = self.trunk(inputs)  # (B, 256), no activation yet
        if self.how == "adapter":
            x = x + adapter(x, self.own(told) if self.own else told)
        return self.head(F.relu(x))


class DynamicsModel(Network):
    """f_{θ,ω}: predicts δs = s' - s."""

    def __init__(self, d_s, d_a, **options):
        super().__init__(d_s + d_a, d_s, **options)

    def forward(self, s, a, told):
        return super().forward(torch.cat([s, a], -1), told)  # (B, d_s)


class Actor(Network):
    """π_{ξ,ω}: a Gaussian squashed by tanh; actions in [-1, 1]."""

    LOG_STD = (-5.0, 2.0)  # its range, by another tanh

    def __init__(self, d_s, d_a, **options):
        super().__init__(d_s, 2 * d_a, **options)

    def forward(self, s, told):
        """Mean and log standard deviation before the tanh, (B, d_a) each."""
        mu, log_std = super().forward(s, told).chunk(2, -1)
        low, high = self.LOG_STD
        return mu, low + (high - low) * (log_std.tanh() + 1) / 2

    def sample(self, s, told):
        """An action (B, d_a) by the reparameterisation trick, and its log-probability (B,)."""
        mu, log_std = self(s, told)
        noise = torch.randn_like(mu)
        u = mu + log_std.exp() * noise
        logp_u = -(noise**2) / 2 - log_std - math.log(2 * math.pi) / 2
        log_dtanh = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh²u), exact also where tanh saturates
        return u.tanh(), (logp_u - log_dtanh).sum(-1)

    def mean(self, s, told):
        return self(s, told)[0].tanh()


class Critics(nn.Module):
    """Q_{ζ,ω}: both critics."""

    def __init__(self, d_s, d_a, **options):
        super().__init__()
        self.Q1, self.Q2 = (Network(d_s + d_a, 1, **options) for _ in range(2))

    def forward(self, s, a, told):
        sa = torch.cat([s, a], -1)
        return torch.cat([self.Q1(sa, told), self.Q2(sa, told)], -1)  # (B, 2)


# ---- Losses. Each returns a scalar and, where something else needs it, one more value. --------------------------


class Batch(NamedTuple):
    """Transitions with the window before each: equal shares of N contexts, those of one context side by side."""

    s: torch.Tensor  # (B, d_s)
    a: torch.Tensor  # (B, d_a)
    ds: torch.Tensor  # (B, d_s), δs = s' - s
    r: torch.Tensor  # (B,)
    tau: torch.Tensor  # (B, L, 2 d_s + d_a); None where there is no encoder
    c: torch.Tensor  # (N, d_c), the true contexts, for the methods that are told

    s2 = property(lambda batch: batch.s + batch.ds)  # (B, d_s)


def dynamics_loss(f, told, batch):
    """Eq. 1: ‖δŝ - δs‖², mean over samples and dimensions. In DMA*-SH the only loss that reaches φ and η, through ω."""
    return F.mse_loss(f(batch.s, batch.a, told), batch.ds)


def critic_loss(pi, Q, Q_target, alpha, told, batch, gamma):
    """SAC's Bellman error, summed over the two critics. The target carries the same ω: a transition changes the state,
    not the context, so what the window before s tells holds for s' too."""
    s, a, r, s2 = batch.s, batch.a, batch.r, batch.s2
    with torch.no_grad():
        a2, logp_a2 = pi.sample(s2, told)
        v2 = Q_target(s2, a2, told).amin(1) - alpha * logp_a2  # (B,)
        target = r + gamma * v2  # always bootstraps: a time limit is no terminal state
    q = Q(s, a, told)  # (B, 2)
    assert target.shape == q.shape[:1], (target.shape, q.shape)
    return (q - target.unsqueeze(-1)).square().mean(0).sum()


def actor_loss(pi, Q, alpha, told, batch):
    """SAC's policy loss, and the log-probabilities (B,) of the actions it drew."""
    s = batch.s
    a, logp = pi.sample(s, told)
    q = Q(s, a, told).amin(1)  # (B,)
    return (alpha * logp - q).mean(), logp.detach()


def temperature_loss(log_alpha, logp, target_entropy):
    """Raises α while the policy's entropy is below its target."""
    return -(log_alpha.exp() * (logp + target_entropy)).mean()


# ---- The agent and its update (Algorithm 2) ---------------------------------------------------------------------


def stop_gradient(x):
    return None if x is None else x.detach()


def minimise(loss, optimizer):
    """One step of `optimizer`, with gradients for its parameters and no others: the policy's step, for one, computes
    none for the weights of the critics. Returns the loss, detached."""
    optimizer.zero_grad()
    loss.backward(inputs=[p for group in optimizer.param_groups for p in group["params"]])
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def average(moving, network, rate):
    """Moves the weights of `moving` by `rate` towards those of `network`."""
    torch._foreach_lerp_(list(moving.parameters()), list(network.parameters()), rate)


class Agent(nn.Module):
    """The networks of a method, their optimizers, and `update`, which is Algorithm 2. d_c: the size of a context c."""

    def __init__(self, cfg, d_s, d_a, d_c):
        super().__init__()
        self.cfg, self.method, self.target_entropy = cfg, METHODS[cfg.method], -float(d_a)
        method = self.method
        d_told = {"inferred": cfg.d_z, "true": d_c, "none": 0}[method.context]

        def hypernetwork():
            return Hypernetwork(d_told, cfg.hyper_hidden, cfg.hidden, cfg.bottleneck, cfg.bfloat16)

        def options(how):
            make_own = hypernetwork if how == "adapter" and method.hypernetwork == "own" else None
            return dict(d_x=cfg.hidden, how=how, d_told=d_told, make_own=make_own)

        self.g = self.h = self.f = None  # where a method has no such network
        if method.context == "inferred":
            self.g = ContextEncoder(d_s, d_a, cfg.d_z, cfg.encoder_hidden, cfg.mask, method)  # φ
        if method.hypernetwork == "shared":
            self.h = hypernetwork()  # η
        if method.f != "nothing":
            self.f = DynamicsModel(d_s, d_a, **options(method.f))  # θ
        self.pi = Actor(d_s, d_a, **options(method.rl))  # ξ
        self.pi_average = copy.deepcopy(self.pi).requires_grad_(False) if cfg.policy_average else None
        self.Q = Critics(d_s, d_a, **options(method.rl))  # ζ
        self.Q_target = copy.deepcopy(self.Q).requires_grad_(False)  # ζ̄
        self.log_alpha = nn.Parameter(torch.tensor(cfg.alpha).log())
        self.to(cfg.device)

        def adam(lr, *networks):
            parameters = [p for network in networks if network for p in network.parameters()]
            return torch.optim.Adam(parameters, lr, fused=True)

        self.optimizers = {"critic": adam(cfg.critic_lr, self.Q), "actor": adam(cfg.actor_lr, self.pi)}
        self.optimizers["temperature"] = torch.optim.Adam([self.log_alpha], cfg.alpha_lr, fused=True)
        if self.f:
            self.optimizers["dynamics"] = adam(cfg.dynamics_lr, self.g, self.h, self.f)
        for loss in ("critic", "actor"):
            if loss in method.into_eta:  # Adam works entry by entry: a group is as good as an optimizer of its own
                self.optimizers[loss].add_param_group({"params": list(self.h.parameters()), "lr": cfg.dynamics_lr})

    @property
    def alpha(self):
        return self.log_alpha.detach().exp()

    def tell(self, tau, c, noisy):
        """z, what f, π and Q are told about the context, and the KL term of a Gaussian code; tau (B, L, 2 d_s + d_a).

        A shared hypernetwork tells them ω = h_η(z). Other methods stop at z, tell c (N, d_c), a row per true context,
        or nothing."""
        if self.method.context != "inferred":
            return None, c if self.method.context == "true" else None, 0.0
        z, kl = self.g(tau, noisy)
        return z, self.h(z) if self.h else z, kl

    def infer(self, tau, noisy):
        """z (B, d_z) and ω, None without a shared hypernetwork, from windows tau."""
        z, told, _ = self.tell(tau, None, noisy)
        return z, told if self.h else None

    @torch.no_grad()
    def act(self, s, told, noisy):
        """Actions (N, d_a) for s (N, d_s): sampled if `noisy`, else the mean, of the averaged policy if there is."""
        return self.pi.sample(s, told)[0] if noisy else (self.pi_average or self.pi).mean(s, told)

    def reopened(self, loss, z, told):
        """`told`, a constant; in the ablations whose `loss` may reach η, ω afresh from z, with its graph."""
        return self.h(z) if loss in self.method.into_eta else told

    def update(self, batch, step):
        """One gradient step, number `step` from 1 on. Returns the losses and α as 0-d tensors: no dynamics_loss where
        there is no f, no actor_loss on the steps that leave the policy alone."""
        cfg, pi, Q, Q_target, losses = self.cfg, self.pi, self.Q, self.Q_target, {}

        # 2  z ← g_φ(τ), ω ← h_η(z). `told` is ω, of one draw of masks, for f, π, Q and the target alike
        z, told, kl = self.tell(batch.tau, batch.c, noisy=True)

        # 3  (φ, θ, η) ← (φ, θ, η) − α₃ ∇L_{φ,θ,η} (Eq. 1)
        if self.f:
            loss = dynamics_loss(self.f, told, batch)
            minimise(loss * (1 + self.method.kl * kl), self.optimizers["dynamics"])
            losses["dynamics_loss"] = loss.detach()

        # 4  ω ← stop-gradient(ω): a constant in all that follows (Eq. 2); and so is z, for those that are told z
        z, told = stop_gradient(z), stop_gradient(told)

        # 5  ζ ← ζ − α₂ ∇L_ζ
        loss = critic_loss(pi, Q, Q_target, self.alpha, self.reopened("critic", z, told), batch, cfg.gamma)
        losses["critic_loss"] = minimise(loss, self.optimizers["critic"])

        # 6  every second step, twice, so that it learns at the critics' pace: ξ ← ξ − α₁ ∇L_ξ, then the temperature
        for _ in range(2 if step % 2 == 0 else 0):
            loss, logp = actor_loss(pi, Q, self.alpha, self.reopened("actor", z, told), batch)
            losses["actor_loss"] = minimise(loss, self.optimizers["actor"])
            minimise(temperature_loss(self.log_alpha, logp, self.target_entropy), self.optimizers["temperature"])
            if self.pi_average:
                average(self.pi_average, pi, cfg.policy_average)

        # 7  ζ̄ ← ζ̄ + ρ (ζ − ζ̄)
        average(Q_target, Q, cfg.polyak)

        return losses | {"alpha": self.alpha}


# ---- Replay: one stream of transitions per context, in time order -----------------------------------------------


class Replay:
    """Transitions of N contexts that step together. Row t of the ring holds each context's t-th [s, a, δs, r].

    The window of transition t is rows t-K ... t-1 of the same context: past transitions only. It may reach back over
    a reset, as the context, which it is read for, survives one. Rows not yet written are zeros, as if masked.
    No terminal flag is kept: there are no terminal states, and a time limit does not end the return.
    """

    def __init__(self, c, capacity, d_s, d_a, K, L):
        """c (N, d_c): the true context of each stream, for the methods that are told."""
        self.c, self.N, self.capacity, self.d_s, self.d_a, self.K, self.L = c, len(c), capacity, d_s, d_a, K, L
        self.rows = torch.zeros(capacity, self.N, 2 * d_s + d_a + 1, device=c.device)
        self.t = 0  # transitions written so far, per context

    def add(self, s, a, r, s2):
        """One transition of every context: s, s2 (N, d_s), a (N, d_a), r (N,)."""
        self.rows[self.t % self.capacity] = torch.cat([s, a, s2 - s, r.unsqueeze(-1)], -1)
        self.t += 1

    def windows(self, n, t, noisy):
        """The windows before transitions t (B,) of contexts n (B,), subsampled: (B, L, 2 d_s + d_a); None if L is 0."""
        if not self.L:
            return None
        i = subsample(len(t), self.K, self.L, noisy, self.rows.device)  # (B, L)
        past = (t.unsqueeze(-1) - self.K + i) % self.capacity
        return self.rows[past, n.unsqueeze(-1), :-1]

    def latest(self, noisy):
        """The windows that end with the last transition of each context: (N, L, 2 d_s + d_a)."""
        n = torch.arange(self.N, device=self.rows.device)
        return self.windows(n, torch.full_like(n, self.t), noisy)

    def sample(self, size):
        """A Batch of `size // N` transitions of each context, uniform over those whose whole window is stored."""
        n = torch.arange(self.N, device=self.rows.device).repeat_interleave(size // self.N)
        oldest = max(0, self.t - self.capacity) + self.K
        t = torch.randint(oldest, self.t, n.shape, device=self.rows.device)
        s, a, ds, r = self.rows[t % self.capacity, n].split([self.d_s, self.d_a, self.d_s, 1], -1)
        return Batch(s, a, ds, r.squeeze(-1), self.windows(n, t, noisy=True), self.c)

    def state_dict(self):
        """The filled part of the ring and the count. On a CPU that part is no copy: 100 MB would be saved twice."""
        filled = self.rows[: min(self.t, self.capacity)].cpu().numpy()  # as torch.save writes all that a view is of
        return {"rows": torch.from_numpy(filled), "t": self.t}

    def load_state_dict(self, state):
        self.t = state["t"]
        self.rows[: min(self.t, self.capacity)] = state["rows"]


# ---- Acting, and zero-shot evaluation ---------------------------------------------------------------------------


class BadInput(ValueError):
    """Something wrong from outside, a value or a file; its message is the one line that the user sees."""


class Stopped(Exception):
    """The user wants the program to stop."""


class Rollout:
    """Acts in all contexts at once and fills a replay, whose last K transitions are the window to act on.

    noisy: collects for training (the encoder masks and subsamples at random, actions are sampled), and a number that is
    not finite is a FloatingPointError. Else it evaluates; where a simulation diverges since the last reset, `diverged`
    says so, and the instance goes on with zeros. `stop` is called before each step: it may raise Stopped.
    """

    def __init__(self, agent, envs, noisy, capacity=None, stop=lambda: None):
        cfg = agent.cfg
        self.agent, self.envs, self.noisy, self.device, self.stop = agent, envs, noisy, cfg.device, stop
        self.replay = Replay(self.tensor(envs.c), capacity or cfg.K, envs.d_s, envs.d_a, cfg.K, cfg.L)
        self.s, self.done, self.diverged = None, True, np.zeros(envs.N, dtype=bool)

    def collect(self, random=False):
        """One step of an endless sequence of episodes, at the start of one with its warm-up, which is stored too."""
        if self.done:
            self.begin_episode(random=random)
        self.step(random)

    def begin_episode(self, warm_up=True, random=False):
        """Warm-up: K steps fill the window with transitions of the current policy (or of random actions); then a reset.
        The window stays."""
        self.reset()
        for _ in range(self.replay.K if warm_up else 0):
            self.step(random)
        self.reset()

    def reset(self):
        self.done, self.diverged[:] = False, False
        self.s = self.tensor(self.finite("observation", self.envs.reset()))

    @torch.no_grad()
    def step(self, random=False):
        """Line 1 of Algorithm 2: one step in every context; random: uniform actions. Sets `done` at the horizon.
        Returns s (N, d_s), a (N, d_a), r (N,), and what the policy was told."""
        self.stop()
        s, told = self.s, None
        if random:
            a = 2 * torch.rand(len(s), self.envs.d_a, device=self.device) - 1
        else:
            _, told, _ = self.agent.tell(self.replay.latest(self.noisy), self.replay.c, self.noisy)
            a = self.agent.act(s, told, self.noisy)
        actions = self.finite("action", a.cpu().numpy())
        a = self.tensor(actions)  # where one was not finite, as zeros
        s2, r, self.done = self.envs.step(actions)
        self.s, r = self.tensor(self.finite("observation", s2)), self.tensor(self.finite("reward", r))
        self.replay.add(s, a, r, self.s)
        return s, a, r, told

    def finite(self, name, values):
        """An array (N, ...), its rows that are not finite set to zero."""
        bad = ~np.isfinite(values.reshape(len(values), -1)).all(-1)
        if bad.any():
            if self.noisy:
                raise FloatingPointError(f"{name} is not finite")
            self.diverged |= bad
            values[bad] = 0
        return values

    def tensor(self, array):
        return torch.from_numpy(array).to(self.device)

    def state_dict(self):
        return {"replay": self.replay.state_dict(), "envs": self.envs.state_dict(), "done": self.done, "s": self.s}

    def load_state_dict(self, state):
        self.replay.load_state_dict(state["replay"])
        self.envs.load_state_dict(state["envs"])
        self.done, self.s = state["done"], None if state["s"] is None else state["s"].to(self.device)


def evaluate(agent, cfg, contexts, rollouts=1, seed=None, stop=lambda: None):
    """Zero-shot returns of `rollouts` episodes in each of `contexts`, a list of dicts, and which of them diverged:
    those keep the reward collected until then. Two arrays, (contexts, rollouts). `stop` is called before each step.

    seed (default: the run's) fixes the initial states; the first of several rollouts starts where a single one does.
    Draws nothing from torch's generator: evaluating changes no training run.
    """
    if not (isinstance(rollouts, int) and rollouts >= 1 and contexts):
        raise BadInput(f"rollouts={rollouts!r} in {len(contexts)} contexts: must be at least 1 in at least 1")
    stream = [cfg.seed if seed is None else seed, 1]  # training draws from stream 0
    envs = aib_envs.VectorEnv(cfg.env, list(contexts) * rollouts, seed=stream)
    rollout, returns = Rollout(agent, envs, noisy=False, stop=stop), np.zeros(envs.N)
    rollout.begin_episode()
    while not rollout.done:
        _, _, r, _ = rollout.step()
        returns += np.where(rollout.diverged, 0, r.cpu().numpy())
    return tuple(values.reshape(rollouts, -1).T for values in (returns, rollout.diverged))


# ===============================================================================================================
# The method ends here. What follows starts, saves, resumes and draws runs.
# ===============================================================================================================

# ---- Settings -------------------------------------------------------------------------------------------------


def option(default, help, allowed=None):
    """A setting with its help line and, for numbers, the interval of allowed values."""
    return field(default=default, metadata={"help": help, "allowed": allowed})


# --quick: what sets SAC's pace, faster, for all environments and methods alike (results/README.md says how found)
QUICK = dict(polyak=0.05, actor_lr=1e-3, dynamics_lr=1e-3, alpha=0.1, alpha_lr=2e-3)
QUICK |= dict(policy_average=0.005, eval_every=1000)


@dataclass
class Config:
    """Every setting; the defaults are the paper's, those of `quick()` learn in minutes (`quick=True` alone sets
    only steps and folder). Numbers may be text."""

    env: str = option("cartpole_inv", "python aib_envs.py shows all; or module:id of your own, or gymnasium:id")
    method: str = option("dma_star_sh", "method of the comparison; --list-methods shows all")
    seed: int = option(1, "seed of everything random", "[0, 4294967295]")
    quick: bool = option(False, f"learn in minutes: steps / 10, {', '.join(f'{k} {v}' for k, v in QUICK.items())}")
    steps: int = option(None, "gradient steps (default: by environment)", "[1, 1e9]")
    out: str = option("runs", "folder in which the run folder <env>__<method>[__quick]__s<seed> is made")
    device: str = option("cpu", "torch device: cpu, cuda or cuda:<number>")
    threads: int = option(None, "torch CPU threads (default: torch's choice; of --eval, the run's)", "[1, 1024]")
    eval_every: int = option(5000, "gradient steps between evaluations", "[1, 1e9]")
    eval_rollouts: int = option(1, "episodes per context at evaluations on the way", "[1, 1000]")
    rollouts: int = option(10, "episodes per context at the last evaluation and with --eval", "[1, 1000]")
    snapshots: bool = option(False, "keep the policy of every evaluation, as policies/<step>.pt")
    contexts: int = option(20, "contexts in each of the sets train, eval_in and eval_out", "[1, 1000]")
    K: int = option(None, "past transitions in a window (default: by environment)", "[1, 1e6]")
    subsample: float = option(0.2, "L / K, the share of the window that the encoder reads", "(0, 1]")
    mask: float = option(None, "probability of masking each input vector of the encoder (default: by method)", "[0, 1]")
    encoder_hidden: int = option(32, "width of the LSTM of the encoder g_φ", "[1, 10000]")
    d_z: int = option(8, "size of the context code z", "[1, 10000]")
    hyper_hidden: int = option(64, "width of the two hidden layers of the hypernetwork h_η", "[1, 10000]")
    bottleneck: int = option(32, "width of the adapter g_adapter(x; ω)", "[1, 10000]")
    bfloat16: bool = option(False, "compute ω in bfloat16: faster on AVX512-BF16, far slower on AVX2 alone")
    hidden: int = option(256, "width of the dynamics model f_θ, the policy π_ξ and the critics Q_ζ", "[1, 10000]")
    gamma: float = option(0.99, "γ, discount factor", "[0, 1]")
    polyak: float = option(0.005, "ρ, rate of the target critics' moving average", "(0, 1]")
    batch: int = option(256, "transitions in a batch, rounded down to a multiple of --contexts", "[1, 1e6]")
    dynamics_lr: float = option(3e-4, "α₃, learning rate of encoder, hypernetwork and dynamics model", "(0, 1]")
    critic_lr: float = option(1e-3, "α₂, learning rate of the critics", "(0, 1]")
    actor_lr: float = option(3e-4, "α₁, learning rate of the policy", "(0, 1]")
    alpha_lr: float = option(1e-3, "learning rate of the temperature α", "(0, 1]")
    alpha: float = option(1.0, "α, temperature, at the start", "(0, 100]")
    policy_average: float = option(0.0, "rate of a moving average of the policy, to evaluate by; 0: none", "[0, 1]")
    buffer: int = option(None, "replay capacity per context (default: 100,000 steps, warm-ups not counted)", "[1, 1e9]")
    random_steps: int = option(5000, "random steps before the first gradient step, warm-ups not counted", "[0, 1e9]")

    def __post_init__(self):
        """Fills in the defaults of environment and method, and checks; BadInput names the first bad value."""
        try:
            spec = aib_envs.lookup(self.env)
        except (ValueError, ImportError, TypeError, gymnasium.error.Error) as error:  # TypeError: ./module:id
            ours = isinstance(error, ValueError)  # and names the environment
            raise BadInput(error if ours else f"--env {self.env}: {one_line(error)}") from None
        if self.method not in METHODS:
            raise BadInput(aib_envs.unknown("method", self.method, list(METHODS)))
        method = METHODS[self.method]
        steps = spec.steps // 10 if self.quick else spec.steps
        defaults = dict(K=spec.K, steps=steps, mask=method.mask, threads=torch.get_num_threads())
        defaults["buffer"] = 100_000 * (spec.K + spec.horizon) // spec.horizon  # K steps of warm-up in each episode
        for f in fields(self):
            value, allowed = getattr(self, f.name), f.metadata["allowed"]
            value = defaults.get(f.name) if value is None else value
            setattr(self, f.name, number(flag(f.name), value, f.type, allowed) if allowed else f.type(value))
        gpus = torch.cuda.device_count()
        usable = ["cpu"] + ["cuda", *(f"cuda:{i}" for i in range(gpus))] * (gpus > 0)
        for bad, message in (
            (self.K > spec.horizon, f"--K {self.K}: must be at most the horizon, {spec.horizon} for {self.env}"),
            (self.buffer <= self.K, f"--buffer {self.buffer}: must be more than --K, here {self.K}"),
            (self.batch < self.contexts, f"--batch {self.batch}: must be at least --contexts, here {self.contexts}"),
            (self.mask and method.context != "inferred", f"--mask {self.mask}: {self.method} has no encoder"),
            (self.d_z % ContextEncoder.GROUP, f"--d-z {self.d_z}: must be a multiple of {ContextEncoder.GROUP}"),
            (self.device not in usable, f"--device {self.device}: not usable here; allowed: {', '.join(usable)}"),
        ):
            if bad:
                raise BadInput(message)

    @property
    def L(self):
        if METHODS[self.method].context != "inferred":
            return 0  # there is no encoder to read a window
        return max(1, int(self.subsample * self.K + 1e-9))  # .29 * 100 is 28.999

    @property
    def folder(self):
        env = self.env.replace(":", ".").replace("/", ".")
        return Path(self.out) / f"{env}__{self.method}{'__quick' * self.quick}__s{self.seed}"


def quick(**settings):
    """The Config of --quick; `settings` come first."""
    return Config(quick=True, **(QUICK | settings))


def number(name, value, kind, allowed):
    """`value`, which may be text such as 1e5, as an int or float (`kind`) in an interval such as "(0, 1]"."""
    low, high = (float(end) for end in allowed[1:-1].split(","))
    with contextlib.suppress(TypeError, ValueError):
        x = float(value)
        inside = low < x < high or (x == low and allowed[0] == "[") or (x == high and allowed[-1] == "]")
        if inside and (kind is float or x.is_integer()):
            return kind(x)
    raise BadInput(f"{name} {value}: must be a {'whole ' * (kind is int)}number in {allowed}")


def flag(name):
    return "--" + name.replace("_", "-")


def new_agent(cfg):
    spec = aib_envs.lookup(cfg.env)
    return Agent(cfg, spec.cls.d_s, spec.cls.d_a, len(spec.context))


# ---- A run ----------------------------------------------------------------------------------------------------

SETS = ("train", "eval_in", "eval_out")
LOSSES = ("dynamics_loss", "critic_loss", "actor_loss", "alpha")
FILES = ("checkpoint.pt", "policy.pt", "config.json", "metrics.csv", "per_context.csv")
ACTING = ("g.", "h.", "pi.", "pi_average.")  # the weights in policy.pt


class Run:
    """A run, and all that it must remember to go on as if it had never stopped: `Run.start` and `Run.resume` train it.
    OSError names a file that cannot be written, FloatingPointError a number that is not finite; no file is left half
    written, and a resume writes all of them anew from the checkpoint."""

    def __init__(self, cfg, folder):
        torch.set_num_threads(cfg.threads)
        keep_freed_memory()
        torch.set_flush_denormal(True)  # Adam's averages for dead units sink below 1e-38, where CPUs are slow
        torch.manual_seed(cfg.seed)
        self.cfg, self.folder, self.version = cfg, Path(folder), code_version()
        self.agent = new_agent(cfg)
        contexts = aib_envs.context_sets(cfg.env, cfg.contexts)["train"]
        envs = aib_envs.VectorEnv(cfg.env, contexts, seed=[cfg.seed, 0])
        self.rollout = Rollout(self.agent, envs, noisy=True, capacity=cfg.buffer)
        self.step, self.history = 0, []  # gradient steps done; a row of metrics.csv and its contexts per evaluation
        self.losses = {name: torch.zeros(0, device=cfg.device) for name in LOSSES}  # since the last evaluation
        self.began, self.step_seconds = time.perf_counter(), 0.0  # the latter of gradient steps since then

    @classmethod
    def start(cls, cfg):
        """A run in a new folder."""
        run, folder = cls(cfg, cfg.folder), cfg.folder
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder):
            if there := [name for name in FILES if (folder / name).exists()]:
                other = f"choose another --seed or --out, or go on with --resume {folder}"
                raise BadInput(f"{folder} already holds a run ({', '.join(there)}); {other}")
            run.save()
            run.train(f"{cfg.random_steps:,} random steps, then {cfg.steps:,} gradient steps")

    @classmethod
    def resume(cls, folder, steps=None, asked=None):
        """The run in `folder` as its checkpoint left it, with more `steps` if given. `asked`, a Config: BadInput if the
        run has other settings (but for steps, out and threads), and nothing to do if it is complete."""
        folder, path = Path(folder), Path(folder) / "checkpoint.pt"
        if not path.is_file():
            raise BadInput(f"--resume {folder}: no run folder (it has no {path.name})")
        with lock(folder):
            with reading(path):
                state = load(path)
                run = cls(Config(**state["settings"]), folder)
                run.load_state_dict(state)
            for name, value in asdict(asked).items() if asked else ():
                there = getattr(run.cfg, name)
                if value != there and name not in ("steps", "out", "threads"):
                    raise BadInput(f"{flag(name)} {value}: {folder} holds a run with {flag(name)} {there}")
            if asked and run.evaluated == run.cfg.steps >= asked.steps:
                return print(f"{folder}: complete, {run.step:,} steps")
            if steps is not None:
                run.cfg.steps = number("--steps", steps, int, f"[{run.cfg.steps}, 1e9]")
            rows = (folder / "metrics.csv").read_bytes() if (folder / "metrics.csv").is_file() else b""
            if newer := [step for step in map(int, re.findall(rb"^\d{1,10}(?=,)", rows, re.M)) if step > run.evaluated]:
                print(f"{folder}: rows after this checkpoint, to be made again: {', '.join(map(str, newer))}")
            run.save()  # all that follows from the checkpoint, whatever became of it in between
            if run.rollout.envs.t is None and not run.rollout.done:
                print(f"{folder}: a new episode begins, as the state of {run.cfg.env} cannot be saved")
                run.rollout.done = True
            run.train(f"going on from step {run.step:,} of {run.cfg.steps:,}")

    @property
    def evaluated(self):
        """The step of the last evaluation, 0 before the first."""
        return self.history[-1]["metrics"]["step"] if self.history else 0

    def train(self, plan):
        """Trains to the evaluation after `cfg.steps`, or until SIGINT or SIGTERM, and saves."""
        cfg = self.cfg
        print(f"{self.folder}: {plan}; threads: {cfg.threads}", flush=True)
        try:
            with catch_signals() as stop, contextlib.suppress(Stopped), contextlib.ExitStack() as bars:
                if self.step == 0:
                    bar = bars.enter_context(progress_bar("random steps", 0, cfg.random_steps))
                    for _ in range(cfg.random_steps):
                        stop()
                        self.rollout.collect(random=True)
                        bar and bar.update()
                bar = bars.enter_context(progress_bar("gradient steps", self.step, cfg.steps))
                while self.evaluated < cfg.steps:
                    stop()
                    due = self.step % cfg.eval_every == 0 or self.step == cfg.steps
                    if due and self.step > self.evaluated:
                        self.evaluate(stop)
                        self.save()
                        (bar.write if bar else print)(summary(self.history[-1]["metrics"], cfg.steps))
                        sys.stdout.flush()
                    else:
                        self.gradient_step()
                        bar and bar.update()
            if self.step > self.evaluated:  # else it is saved; random steps are made again rather than kept
                self.save()
        except FloatingPointError as error:
            left = f"the last checkpoint in {self.folder} is untouched"
            raise FloatingPointError(f"step {self.step:,}: {error}; the run stops, {left}") from None
        if self.history:
            plot(self)
        if self.evaluated == cfg.steps:
            print(f"{self.folder}: {', '.join(FILES)}")
        else:
            print(f"stopped at step {self.step:,}; to go on: python {sys.argv[0]} --resume {self.folder}")

    def gradient_step(self):
        """One step of all contexts and one update of the networks."""
        begin = time.perf_counter()
        self.step += 1
        self.rollout.collect()
        losses = self.agent.update(self.rollout.replay.sample(self.cfg.batch), self.step)
        for name, value in losses.items():  # as one tensor: many small ones would pin the memory freed around them
            self.losses[name] = torch.cat([self.losses[name], value.view(1)])
        recent = 1 if self.cfg.device == "cpu" else 100  # to look at a GPU's numbers is to wait for it
        if self.step % recent == 0:
            require_finite({name: values[-recent:] for name, values in self.losses.items()})
        self.step_seconds += time.perf_counter() - begin

    def evaluate(self, stop=lambda: None):
        """Adds an evaluation to the history: the row of metrics.csv, and those of per_context.csv."""
        rollouts = self.cfg.rollouts if self.step == self.cfg.steps else self.cfg.eval_rollouts
        contexts = evaluate_sets(self.agent, self.cfg, rollouts, stop)
        row = {"step": self.step, "env_steps": self.rollout.replay.t * self.cfg.contexts}
        row["seconds"] = time.perf_counter() - self.began
        row["steps_per_second"] = len(self.losses["critic_loss"]) / self.step_seconds
        row |= {name: values.mean().item() for name, values in self.losses.items()}  # nan of none
        row |= by_set(contexts, "return")
        row |= {f"diverged_{name}": int(n) for name, n in by_set(contexts, "diverged", sum).items()}
        self.history.append({"metrics": row, "contexts": [{"step": self.step, **context} for context in contexts]})
        self.losses = {name: values.new_zeros(0) for name, values in self.losses.items()}
        self.step_seconds = 0.0

    def save(self):
        """All files, but none if a weight is not finite. The checkpoint comes first: all others follow from it."""
        state = self.state_dict()
        require_finite({f"weight {name}": value for name, value in state["agent"].items()})
        policy = {name: state[name] for name in ("settings", "version", "step")}
        policy["agent"] = {name: weight for name, weight in state["agent"].items() if name.startswith(ACTING)}
        versions = {package.__name__: str(package.__version__) for package in (torch, np, mujoco, gymnasium)}
        config = asdict(self.cfg) | {"version": self.version} | versions
        files = {"checkpoint.pt": state, "policy.pt": policy, "config.json": json.dumps(config, indent=2) + "\n"}
        if self.history:
            files["metrics.csv"] = csv_text([evaluation["metrics"] for evaluation in self.history])
            files["per_context.csv"] = csv_text([row for evaluation in self.history for row in evaluation["contexts"]])
        if self.cfg.snapshots and self.step == self.evaluated > 0:
            (self.folder / "policies").mkdir(exist_ok=True)
            files[f"policies/{self.step}.pt"] = policy
        for name, what in files.items():
            write = lambda file: file.write(what.encode()) if isinstance(what, str) else torch.save(what, file)
            replace_file(self.folder / name, write)

    def state_dict(self):
        """Tensors, numbers, strings, lists and dicts, so that loading it can run no code."""
        gpu = [torch.cuda.get_rng_state(self.cfg.device)] if self.cfg.device != "cpu" else []
        return {
            "settings": asdict(self.cfg),
            "version": self.version,
            "step": self.step,
            "history": self.history,
            "losses": self.losses,
            "seconds": [time.perf_counter() - self.began, self.step_seconds],
            "agent": self.agent.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.agent.optimizers.items()},
            "rollout": self.rollout.state_dict(),
            "generators": [torch.get_rng_state(), *gpu],
        }

    def load_state_dict(self, state):
        """Takes over a checkpoint; an exception if it is not one of such a run."""
        self.step, self.history = state["step"], state["history"]
        if not (type(self.step) is int and 0 <= self.evaluated <= self.step <= self.cfg.steps):
            raise ValueError(f"step {self.step!r}, evaluated at {self.evaluated!r}, of {self.cfg.steps}")
        self.losses = {name: state["losses"][name].to(self.cfg.device) for name in LOSSES}
        seconds, self.step_seconds = state["seconds"]
        self.began -= seconds
        self.agent.load_state_dict(state["agent"])
        for name, optimizer in self.agent.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.rollout.load_state_dict(state["rollout"])
        torch.set_rng_state(state["generators"][0])
        if self.cfg.device != "cpu":
            torch.cuda.set_rng_state(state["generators"][1], self.cfg.device)
        before = state["version"].split(" + ")  # code that changed between two parts of a run shows
        self.version = " + ".join(before + [self.version] * (self.version not in before))


def evaluate_sets(agent, cfg, rollouts, stop=lambda: None):
    """A dict per context of the three sets: its place, its values, its mean return and number of diverged episodes."""
    sets = aib_envs.context_sets(cfg.env, cfg.contexts)
    rows = [{"set": name, "index": i, **context} for name in SETS for i, context in enumerate(sets[name])]
    returns, diverged = evaluate(agent, cfg, sum((sets[name] for name in SETS), []), rollouts, stop=stop)
    results = zip(rows, returns.mean(-1).tolist(), diverged.sum(-1).tolist())
    return [row | {"return": mean, "diverged": count} for row, mean, count in results]


def by_set(contexts, column, of=np.mean):
    """The mean, or what `of` tells, of a column in each set; nan of an empty one."""
    found = {name: [row[column] for row in contexts if row["set"] == name] for name in SETS}
    return {name: float(of(values)) if values else math.nan for name, values in found.items()}


def require_finite(tensors):
    """FloatingPointError names the first of the tensors that holds a nan or an infinity."""
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise FloatingPointError(f"{name} is not finite")


def keep_freed_memory():
    """Has glibc keep the memory of a gradient step for the next one. Given back, it is asked for anew and cleared page
    by page, which took up to a fifth of the time. Elsewhere nothing happens."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no mallopt; no library; Windows, which wants a name
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, its largest value


@contextlib.contextmanager
def catch_signals():
    """A function that raises Stopped once SIGINT or SIGTERM came, while the block runs; the second leaves at once. A
    signal that the process was started to ignore stays ignored."""
    caught = []

    def handler(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    def stop():
        if caught:
            raise Stopped

    with contextlib.ExitStack() as restored:
        for n in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(n) != signal.SIG_IGN:
                restored.callback(signal.signal, n, signal.signal(n, handler))
        yield stop


def summary(row, steps):
    """The line printed at an evaluation."""
    sets = "  ".join(f"{name} {row[name]:.1f}" for name in SETS)
    losses = f"alpha {row['alpha']:.3f}"
    if not math.isnan(row["dynamics_loss"]):  # there is an f
        losses = f"dynamics loss {row['dynamics_loss']:.2e}  {losses}"
    rate, diverged = row["steps_per_second"], sum(row[f"diverged_{name}"] for name in SETS)
    left = f"{rate:.1f} steps/s  {(steps - row['step']) / rate / 60:.0f} min left"
    note = f"  {diverged} evaluation episodes diverged" * bool(diverged)
    return f"step {row['step']:,}  return: {sets}  {losses}  {left}{note}"


def progress_bar(what, done, total):
    """tqdm's bar with rate and time left, shown on a terminal; None where there is no tqdm."""
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        return tqdm(desc=what, initial=done, total=total, smoothing=0.05, disable=None)
    return contextlib.nullcontext()


# ---- Files ----------------------------------------------------------------------------------------------------


def code_version():
    """The git commit of this file's folder, -dirty if files were changed since; "unknown" where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--tags", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return "unknown"


@contextlib.contextmanager
def lock(folder):
    """Holds the folder while the block runs, or until the process ends, however it ends; BadInput if another process
    holds it. Nothing is held where folders have no locks (Windows, some network disks)."""
    with contextlib.ExitStack() as held:
        try:
            import fcntl

            held.callback(os.close, handle := os.open(folder, os.O_RDONLY))
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{folder} is in use by another process") from None
        except (ImportError, OSError):
            pass
        yield


def replace_file(path, write):
    """Has `write` fill a file beside `path`, has that reach the disk, and moves it to `path`. OSError names `path`."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        fault = error if isinstance(error, OSError) else error.__context__  # torch.save wraps that of a full disk
        if not isinstance(fault, OSError):
            raise
        raise OSError(fault.errno, fault.strerror, str(path)) from None


def load(path):
    """What torch.save wrote, onto the CPU. No code in it is run; but the setting `env` may name a module to import."""
    with zipfile.ZipFile(path) as archive:  # torch.load does not look at the check sums that torch.save wrote
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def reading(path):
    """Whatever a damaged or foreign file makes its reader raise becomes a BadInput that names the file."""
    try:
        yield
    except Exception as error:
        raise BadInput(f"{path} cannot be read ({one_line(error)})") from None


def one_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def load_policy(path, device="cpu"):
    """The Config and the trained Agent of a run folder or a policy file; agent.step and agent.version say of when and
    by what code. BadInput names what cannot be read. Leaves torch's generator alone."""
    path = Path(path) / "policy.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file; allowed: a run folder with a policy.pt, or such a file")
    Config(device=device)  # refuses one that is not usable, before the file is to blame
    with reading(path), torch.random.fork_rng(devices=[]):
        state = load(path)
        cfg = Config(**state["settings"] | {"device": device})
        agent = new_agent(cfg)
        if missing := {name for name in agent.state_dict() if name.startswith(ACTING)} - set(state["agent"]):
            raise ValueError(f"no {min(missing)}")
        agent.load_state_dict(state["agent"], strict=False)
        agent.step, agent.version = int(state["step"]), str(state["version"])
    return cfg, agent


def csv_text(rows):
    """Dicts of the same keys as the text of a CSV file; floats to 6 digits."""
    text = io.StringIO(newline="")
    cells = [[f"{v:.6g}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    csv.writer(text, lineterminator="\n").writerows([rows[0], *cells])
    return text.getvalue()


# ---- Picture --------------------------------------------------------------------------------------------------


def plot(run):
    """Draws curve.png if matplotlib is there: returns over steps by set and, dashed where inverted or swapped, by
    binary context; the last returns against each context value or, with more than two dimensions, against the distance
    from the centre of the train range. A picture never costs a run its end."""
    try:
        from matplotlib.figure import Figure

        draw(Figure, run).savefig(run.folder / "curve.png", dpi=110)
    except Exception as error:
        if not isinstance(error, ImportError):
            print(f"curve.png is not drawn ({one_line(error)})")


def draw(Figure, run):
    dims, colours = aib_envs.lookup(run.cfg.env).context, dict(zip(SETS, ("tab:blue", "tab:green", "tab:red")))
    steps, last = [e["metrics"]["step"] for e in run.history], run.history[-1]["contexts"]
    binary, graded = ([dim for dim in dims if dim.binary == which] for which in (True, False))
    places = [(dim.name, [row[dim.name] for row in last], dim.train) for dim in graded]  # and the train range
    if len(graded) > 2:
        distances = [max(dim.distance(row[dim.name]) for dim in graded) for row in last]
        places = [("distance from the centre", distances, (0, 1))]
    panels = 1 + len(binary) + len(places)
    figure = Figure(figsize=(3.6 * panels, 3.2), layout="constrained")
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for name in SETS:
        axes[0].plot(steps, [e["metrics"][name] for e in run.history], ".-", color=colours[name], label=name)
    axes[0].legend()
    axes[0].set(xlabel="gradient steps", ylabel="average episodic return")
    axes[0].set_title(run.folder.resolve().name, parse_math=False)
    for ax, dim in zip(axes[1:], binary):
        for value in dim.train:
            line = ".-" if value == dim.default else ".--"
            of_value = [[row for row in e["contexts"] if row[dim.name] == value] for e in run.history]
            for name in SETS:
                ax.plot(steps, [by_set(rows, "return")[name] for rows in of_value], line, color=colours[name])
        ax.set(xlabel="gradient steps", title=f"solid: {dim.name} = {dim.default:g}")
    for ax, (name, values, ends) in zip(axes[1 + len(binary) :], places):
        for row, value in zip(last, values):
            marker = "v" if any(row[dim.name] != dim.default for dim in binary) else "o"  # triangle: inverted, swapped
            ax.plot(value, row["return"], marker, color=colours[row["set"]], alpha=0.7)
        ax.axvspan(*ends, color="0.92", zorder=0)
        ax.set(xlabel=name, title="last evaluation")
    return figure


# ---- Command line ---------------------------------------------------------------------------------------------

ALLOWED_WITH = {"eval": ("rollouts", "threads", "device"), "resume": ("steps",), "list_methods": ()}
# of --help, each before the setting it begins with
HEADINGS = dict(env="run", K="window and encoder", hyper_hidden="hypernetwork, adapter and networks", gamma="SAC")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)


def build_parser():
    """No argument has a default: what was given can be told from what was not."""
    given = dict(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser = Parser("dmash.py", description="DMA*-SH: train, evaluate and plot one run.", **given)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--eval", metavar="RUN", help="evaluate the policy of a run folder, or a policy file")
    modes.add_argument("--resume", metavar="RUN", help="go on with a run; --steps may be raised")
    modes.add_argument("--list-methods", action="store_true", help="print the table of methods")
    parser.add_argument("--per-context", action="store_true", help="with --eval: print the return of every context")
    parser.add_argument("--go-on", action="store_true", help="start the run, or go on with it if it was begun")
    for f in fields(Config):
        if f.name in HEADINGS:
            group = parser.add_argument_group(HEADINGS[f.name])
        about = [f"default: {f.default}"] * (f.default is not None)
        about += [f"allowed: {f.metadata['allowed']}"] * (f.metadata["allowed"] is not None)
        text = f.metadata["help"] + (f" ({'; '.join(about)})" if about else "")
        kind = {"action": "store_true"} if f.type is bool else {"metavar": f.type.__name__.upper()}
        group.add_argument(flag(f.name), **kind, help=text)
    return parser


def exit_status(program, command):
    """Runs `command()` and returns the exit status: 0; 2 for bad input or a file that cannot be used, 1 for a number
    that is not finite, each told in one line as the error of `program`; 130 after a Ctrl-C that nothing else caught."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # None: closed
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for letters that its encoding lacks
    try:
        command()
        sys.stdout.flush()
        return 0
    except (BadInput, aib_envs.BadEnvironment) as error:
        message, status = error, 2
    except OSError as error:
        message, status = f"{error.filename or 'output'}: {error.strerror}", 2
    except FloatingPointError as error:
        message, status = error, 1
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        message, status = f"not enough memory for these settings ({one_line(error)})", 2
    except KeyboardInterrupt:
        return 130
    print(f"{program}: error: {message}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # nothing more can be written there: what is left must not fail again at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def main(argv=None):
    """The command line. Returns the exit status."""
    return exit_status("dmash.py", lambda: run_command(vars(build_parser().parse_args(argv))))


def run_command(settings):
    """Does what the arguments that were given, by name, ask for."""
    mode = next((mode for mode in ALLOWED_WITH if mode in settings), None)
    if "per_context" in settings and mode != "eval":
        raise BadInput("--per-context: allowed only with --eval RUN")
    for name in settings if mode else ():
        if name not in (mode, "per_context", *ALLOWED_WITH[mode]):
            allowed = ", ".join(map(flag, ALLOWED_WITH[mode])) or "no setting"
            raise BadInput(f"{flag(name)}: not with {flag(mode)}, which allows {allowed}")
    if mode == "eval":
        print_evaluation(settings.pop("eval"), **settings)
    elif mode == "resume":
        Run.resume(settings.pop("resume"), **settings)
    elif mode == "list_methods":
        row = ("{:<16}" + "{:<12}" * 2 + "{:<10}" * 2 + "{:<13}" * 6).format
        for name, method in {"--method": Method._fields, **METHODS}.items():
            print(row(name, *map(str, method)).rstrip())
    else:
        go_on = settings.pop("go_on", False)
        cfg = quick(**settings) if settings.pop("quick", False) else Config(**settings)
        there = go_on and (cfg.folder / "checkpoint.pt").is_file()
        Run.resume(cfg.folder, cfg.steps, asked=cfg) if there else Run.start(cfg)


def print_evaluation(path, per_context=False, device="cpu", **settings):
    """What is evaluated; the average episodic return (AER) of each set and, if `per_context`, the table of contexts."""
    cfg, agent = load_policy(path, device)
    cfg = replace(cfg, **settings)
    torch.set_num_threads(cfg.threads)
    print(f"{cfg.env}, {cfg.method}, seed {cfg.seed}, step {agent.step:,}, version {agent.version}", flush=True)
    contexts = evaluate_sets(agent, cfg, cfg.rollouts)
    if per_context:
        print(csv_text(contexts), end="")
    means = "  ".join(f"{name} {mean:.1f}" for name, mean in by_set(contexts, "return").items())
    diverged = sum(row["diverged"] for row in contexts)
    note = f"  {diverged} episodes diverged" * bool(diverged)
    print(f"AER over {cfg.contexts} contexts x {cfg.rollouts} rollouts:  {means}{note}")


if __name__ == "__main__":
    sys.exit(main())
