"""DMA*-SH: dynamics-aligned shared hypernetworks for contextual reinforcement learning.

Dynamics depend on a hidden context: a motor may be wired backwards, a pole may be longer. An
encoder reads the last K transitions and turns them into a code z. A hypernetwork turns z into ω,
the weights of one small adapter. The dynamics model, the policy and both critics all carry this
adapter. One loss trains encoder and hypernetwork: the dynamics model's prediction error. For the
losses of policy and critics, ω is a constant. At evaluation nothing is trained (zero-shot).

Axes, in every shape below: B samples (when acting: N), N contexts, K transitions in a window, L of
them read, M different ω. d_s, d_a, d_c: size of state, action, context. Numbers are default sizes.
`noisy` means as in training: subsets of windows are random, inputs are masked, actions sampled.

    window of K past transitions (s, a, δs)
        │  τ (B, L, 2 d_s + d_a)      L = ⌊0.2 K⌋ of them
        ▼
    encoder g_φ ── z (B, 8) ─▶ hypernetwork h_η ── ω ─┬─▶ dynamics model f_{θ,ω}
                                                      ├─▶ policy π_{ξ,ω}
                                                      └─▶ critics Q_{ζ,ω}
    dynamics loss (Eq. 1): trains φ, η, θ        policy loss: ξ        Bellman error: ζ

Algorithm 2 repeats these lines; their numbers are ours. α₁, α₂, α₃ are Adam's learning rates, α is
the temperature. ρ is SAC's τ, the rate of the target critics; here τ is what is read of a window.

    1  one step in each context: z ← g_φ(τ), ω ← h_η(z), a ~ π_{ξ,ω}(·|s); store (s, a, δs, r)
    2  sample a batch with windows; z ← g_φ(τ), ω ← h_η(z)
    3  (φ, θ, η) ← (φ, θ, η) − α₃ ∇ℒ_{φ,θ,η}, where ℒ is the error of predicting s' − s    (Eq. 1)
    4  ω ← stop-gradient(ω)                                                                (Eq. 2)
    5  ζ ← ζ − α₂ ∇ℒ_ζ, where ℒ compares Q with r + γ (min Q̄_{ζ̄,ω}(s', a') − α log π_{ξ,ω}(a'|s'))
    6  every second step do twice: {ξ ← ξ − α₁ ∇ℒ_ξ, where ℒ is SAC's policy loss; α by its loss}
    7  ζ̄ ← ζ̄ + ρ (ζ − ζ̄)

Lines 5 and 6 use the ω of line 2, although line 3 has changed φ and η since. The published code
computes ω again. `Run.gradient_step` calls `Rollout.collect` (1), `Replay.sample`, `Agent.update`.

A warm-up precedes every episode: K steps of the policy without updates fill the window. Then the
environment is reset and the window stays. Training learns from these steps, too (our choice);
evaluation counts none of their rewards. Methods without an encoder have warm-ups as well, to see as
much data. A run begins with 5,000 random steps per context. Random warm-ups come on top.

Paper: Benad, Banerjee, Röder, Ay, Butz, Eppe, "Dynamics-Aligned Shared Hypernetworks for Contextual
RL under Discontinuous Shifts", arXiv 2602.06550. Equations have its numbers. To start: --help.
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import hashlib
import io
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
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

__version__ = "2.0"

# ---- Settings -----------------------------------------------------------------------------------


def option(default, help, low=None, high=1e12):
    """A setting: its default, its text in --help and, for numbers, the lowest and highest value."""
    limits = None if low is None else (low, high)
    return field(default=default, metadata={"help": help, "limits": limits})


@dataclass
class Config:
    """All settings. Defaults are the paper's, but for `buffer`. `complete` fills in each None."""

    env: str = option("cartpole_inv", "python aib_envs.py shows all; or module:id, or gymnasium:id")
    method: str = option("dma_star_sh", "method of the comparison; --list-methods shows all")
    seed: int = option(1, "seed of networks, noise, batches and initial states", 0, 2**32 - 1)
    quick: bool = option(False, "learn in minutes: a tenth of the steps, and faster settings")
    steps: int = option(None, "gradient steps (default: by environment)", 1)
    out: str = option("runs", "where the run folder, <env>__<method>[__quick]__s<seed>, is made")
    device: str = option("cpu", "torch device: cpu, cuda or cuda:<number>")
    threads: int = option(None, "torch CPU threads (default: torch's; --eval: the run's)", 1, 1024)
    eval_every: int = option(5000, "gradient steps between evaluations", 1)
    eval_rollouts: int = option(1, "episodes per context at each evaluation but the last", 1, 1000)
    rollouts: int = option(10, "episodes per context at the last evaluation and --eval", 1, 1000)
    snapshots: bool = option(False, "keep the policy of every evaluation, as policies/<step>.pt")
    contexts: int = option(20, "contexts in each of the sets train, eval_in and eval_out", 1, 1000)
    K: int = option(None, "past transitions in a window (default: by environment, 24 or 128)", 1)
    subsample: float = option(0.2, "L / K, the share of the window that is read", 1e-6, 1)
    mask: float = option(None, "probability of masking s, a or δs (default: by method)", 0, 1)
    encoder_hidden: int = option(32, "width of the LSTM of the encoder g_φ", 1)
    d_z: int = option(8, "size of the code z", 1)
    hyper_hidden: int = option(64, "width of the hidden layers of the hypernetwork h_η", 1)
    bottleneck: int = option(32, "width of the adapter g_adapter(x; ω)", 1)
    hidden: int = option(256, "width d_x of f, π and Q", 1)
    gamma: float = option(0.99, "γ, discount factor", 0, 1)
    polyak: float = option(0.005, "ρ, rate of the target critics' moving average", 1e-6, 1)
    batch: int = option(256, "transitions in a batch, rounded down to a multiple of contexts", 1)
    dynamics_lr: float = option(3e-4, "α₃, learning rate of φ, η and θ", 1e-9, 1)
    critic_lr: float = option(1e-3, "α₂, learning rate of the critics", 1e-9, 1)
    actor_lr: float = option(3e-4, "α₁, learning rate of the policy", 1e-9, 1)
    alpha_lr: float = option(1e-3, "learning rate of log α", 1e-9, 1)
    alpha: float = option(1.0, "α, temperature, at the start", 1e-6, 100)
    policy_average: float = option(0.0, "rate of a moving average of π for evaluation; 0: no", 0, 1)
    buffer: int = option(None, "replay, steps per context (default: 100,000 + warm-ups)", 1)
    random_steps: int = option(5000, "random steps per context before the first gradient step", 0)

    def __post_init__(self):
        complete(self)

    @property
    def L(self):
        return max(1, int(self.subsample * self.K + 1e-9))  # in floats 0.29 * 100 is below 29


# What --quick sets besides the steps. In Python: Config(**QUICK). quick=True sets only the steps.
QUICK = {"quick": True, "policy_average": 0.005, "eval_every": 1000, "polyak": 0.05, "alpha": 0.1}
QUICK |= {"alpha_lr": 2e-3, "actor_lr": 1e-3, "dynamics_lr": 1e-3}

# ---- Context encoder g_φ: τ -> code z -----------------------------------------------------------


def subsample(B, K, L, noisy, device=None):
    """Which L of the K transitions in a window are read: their positions, (B, L).

    If `noisy`, a random subset in random order: the context is constant, so the order tells nothing
    about it. Else evenly spaced, oldest first.
    """
    if noisy:
        return torch.rand(B, K, device=device).topk(L).indices  # topk sorts by the random numbers
    even = torch.arange(L, device=device) * (K - 1) // max(L - 1, 1)  # ⌊i (K − 1) / (L − 1)⌋
    return even.expand(B, L)


def mask_inputs(tau, d_s, d_a, p):
    """Random input masking: at each time step, each of s, a and δs becomes zero with probability p.

    Unlike in dropout, what is left is not scaled up. tau (B, L, 2 d_s + d_a), keep_s, … (B, L, 1).
    """
    B, L, _ = tau.shape
    keep_s, keep_a, keep_ds = (torch.rand(B, L, 3, device=tau.device) >= p).split(1, -1)
    s, a, ds = tau.split([d_s, d_a, d_s], -1)
    return torch.cat([s * keep_s, a * keep_a, ds * keep_ds], -1)


def avg_l1_norm(x):
    """x / mean_i |x_i| over the last axis."""
    return x / x.abs().mean(-1, keepdim=True).clamp(min=1e-8)


def sim_norm(x, group):
    """Softmax within each group of `group` neighbouring numbers of the last axis."""
    groups = x.unflatten(-1, (-1, group))  # (B, 2, 4)
    return groups.softmax(-1).flatten(-2)


class ContextEncoder(nn.Module):
    """g_φ: masking -> linear -> AvgL1Norm -> LSTM, its last hidden state -> linear -> SimNorm."""

    GROUP = 4  # numbers in one softmax of SimNorm

    def __init__(self, d_s, d_a, d_z, hidden, mask, input_norm, output_norm):
        super().__init__()
        self.d_s, self.d_a, self.mask = d_s, d_a, mask
        self.input_norm, self.output_norm = input_norm, output_norm
        self.embed = nn.Linear(2 * d_s + d_a, hidden, bias=False)
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
        self.project = nn.Linear(hidden, d_z, bias=False)

    def read(self, tau, noisy):
        """The LSTM's last hidden state (B, 32). Inputs are masked if `noisy`."""
        if noisy:
            tau = mask_inputs(tau, self.d_s, self.d_a, self.mask)
        e = self.embed(tau)  # (B, L, 32)
        if self.input_norm:
            e = avg_l1_norm(e)
        _, (last, _) = self.lstm(e)  # last (1, B, 32): there is one layer
        return last[0]

    def forward(self, tau, noisy):
        """tau (B, L, 2 d_s + d_a) -> z (B, 8)."""
        z = self.project(self.read(tau, noisy))
        if self.output_norm:
            z = sim_norm(z, self.GROUP)
        return z


# ---- Hypernetwork h_η: z -> ω, and the adapter made of ω ----------------------------------------


class Omega(NamedTuple):
    """ω, the weights of M adapters.

    Each sample has its own window, so its own z and ω: M = B. In DA the true contexts c take the
    place of z: M = N, and samples of a context share one ω. The matrices are Eq. 3's, transposed.
    """

    W_down: torch.Tensor  # (M, 256, 32)
    b_down: torch.Tensor  # (M, 1, 32)
    W_up: torch.Tensor  # (M, 32, 256)
    b_up: torch.Tensor  # (M, 1, 256)

    def detach(self):  # named as a tensor's: z or c may stand in for ω
        return Omega(*(w.detach() for w in self))


class Hypernetwork(nn.Module):
    """h_η: two hidden layers, then a linear head for each tensor of ω."""

    def __init__(self, d_z=8, hidden=64, d_x=256, bottleneck=32):
        super().__init__()
        self.shapes = ((d_x, bottleneck), (1, bottleneck), (bottleneck, d_x), (1, d_x))
        layers = [nn.Linear(d_z, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(hidden, math.prod(shape)) for shape in self.shapes)

    def forward(self, z):
        """z (M, 8), or c (M, d_c), -> ω."""
        y = self.trunk(z)  # (M, 64)
        tensors = [head(y).unflatten(-1, shape) for head, shape in zip(self.heads, self.shapes)]
        return Omega(*tensors)


def adapter(x, omega):
    """The adapter of Eq. 3: g_adapter(x; ω) = W_up ReLU(W_down x + b_down) + b_up.

    x (M, B / M, 256) -> (M, B / M, 256): x[i] goes through adapter i. In DMA*-SH, B / M is 1.
    """
    down = F.relu(torch.baddbmm(omega.b_down, x, omega.W_down))  # baddbmm(b, x, W) is b + x W
    return torch.baddbmm(omega.b_up, down, omega.W_up)


# ---- The three users of ω: dynamics model f_{θ,ω}, policy π_{ξ,ω}, critics Q_{ζ,ω} --------------


class Network(nn.Module):
    """Trunk -> x, x̃ = x + g_adapter(x; ω) (Eq. 3), ReLU, head.

    `given` is the shared ω or, without a shared hypernetwork, z (B, 8) or the true contexts c
    (N, d_c). Other code calls it `omega` in each case. `use`: "concat" appends it to the input,
    "adapter" makes the adapter of it, "none" ignores it. `make_own()`: this network's own h_η.
    """

    def __init__(self, d_in, d_out, d_x=256, use="adapter", d_context=0, make_own=None):
        super().__init__()
        self.use, self.own = use, None
        if use == "adapter" and make_own is not None:
            self.own = make_own()
        if use == "concat":
            d_in = d_in + d_context
        self.trunk = nn.Sequential(nn.Linear(d_in, d_x), nn.ReLU(), nn.Linear(d_x, d_x))
        self.head = nn.Linear(d_x, d_out)

    def forward(self, inputs, given):
        """inputs (B, d_in) -> (B, d_out)."""
        if self.use == "concat":
            # z has a row for each sample, c one for each context. Samples are ordered by context.
            context = given.repeat_interleave(len(inputs) // len(given), 0)  # (B, 8) or (B, d_c)
            inputs = torch.cat([inputs, context], -1)
        x = self.trunk(inputs)  # (B, 256), no activation yet
        if self.use == "adapter":
            omega = given if self.own is None else self.own(given)
            M = len(omega.b_up)  # M < B in DA: samples are grouped by context
            x = x.unflatten(0, (M, -1))  # (M, B / M, 256)
            x = x + adapter(x, omega)  # Eq. 3
            x = x.flatten(0, 1)  # (B, 256)
        return self.head(F.relu(x))


class DynamicsModel(Network):
    """f_{θ,ω}: predicts δs = s' − s."""

    def __init__(self, d_s, d_a, **options):
        super().__init__(d_s + d_a, d_s, **options)

    def forward(self, s, a, omega):
        return super().forward(torch.cat([s, a], -1), omega)  # (B, d_s)


class Actor(Network):
    """π_{ξ,ω}: a Gaussian squashed by tanh; actions are in [−1, 1]."""

    LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # as in CleanRL's SAC

    def __init__(self, d_s, d_a, **options):
        super().__init__(d_s, 2 * d_a, **options)

    def forward(self, s, omega):
        """Mean and log standard deviation of the Gaussian, (B, d_a) each."""
        mu, log_std = super().forward(s, omega).chunk(2, -1)
        unit = (log_std.tanh() + 1) / 2  # in [0, 1]
        return mu, self.LOG_STD_MIN + (self.LOG_STD_MAX - self.LOG_STD_MIN) * unit

    def sample(self, s, omega):
        """An action (B, d_a) by the reparameterisation trick, and its log-probability (B,)."""
        mu, log_std = self(s, omega)
        noise = torch.randn_like(mu)
        u = mu + log_std.exp() * noise
        log_prob_u = -(noise**2) / 2 - log_std - math.log(2 * math.pi) / 2
        # log of da / du = 1 − tanh²u, in a form that is exact also where tanh saturates.
        log_derivative = 2 * (math.log(2) - u - F.softplus(-2 * u))
        return u.tanh(), (log_prob_u - log_derivative).sum(-1)

    def mean(self, s, omega):
        """The action without noise, (B, d_a)."""
        return self(s, omega)[0].tanh()


class Critics(nn.Module):
    """Q_{ζ,ω}: both critics."""

    def __init__(self, d_s, d_a, **options):
        super().__init__()
        self.Q1 = Network(d_s + d_a, 1, **options)
        self.Q2 = Network(d_s + d_a, 1, **options)

    def forward(self, s, a, omega):
        sa = torch.cat([s, a], -1)
        return torch.cat([self.Q1(sa, omega), self.Q2(sa, omega)], -1)  # (B, 2)


# ---- Losses -------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """B transitions, ordered by context, and τ of the window before each."""

    s: torch.Tensor  # (B, d_s)
    a: torch.Tensor  # (B, d_a)
    ds: torch.Tensor  # (B, d_s), δs = s' − s
    r: torch.Tensor  # (B,)
    tau: torch.Tensor  # (B, L, 2 d_s + d_a); None where there is no encoder
    c: torch.Tensor  # (N, d_c), the true contexts, which Concat and DA read


def dynamics_loss(f, omega, batch):
    """Eq. 1: ℒ_{φ,θ,η}, the mean over samples and dimensions of (f_{θ,ω}(s, a) − δs)²."""
    return F.mse_loss(f(batch.s, batch.a, omega), batch.ds)


def critic_loss(pi, Q, Q_target, alpha, omega, batch, gamma):
    """ℒ_ζ: SAC's Bellman error, summed over both critics. s' has the context of s, so its ω."""
    with torch.no_grad():
        s2 = batch.s + batch.ds  # (B, d_s), s'
        a2, log_prob = pi.sample(s2, omega)
        v2 = Q_target(s2, a2, omega).amin(-1) - alpha * log_prob  # (B,)
        target = batch.r + gamma * v2  # no (1 − done): a time limit is no terminal state
    q = Q(batch.s, batch.a, omega)  # (B, 2)
    return (q - target.unsqueeze(-1)).square().mean(0).sum()


def actor_loss(pi, Q, alpha, omega, batch):
    """Returns ℒ_ξ, the mean of α log π(a|s) − min Q(s, a) with a ~ π, and log π(a|s), (B,)."""
    a, log_prob = pi.sample(batch.s, omega)
    q = Q(batch.s, a, omega).amin(-1)  # (B,)
    return (alpha * log_prob - q).mean(), log_prob.detach()


def temperature_loss(log_alpha, log_prob, target_entropy):
    """Descent raises α while the entropy, −mean log_prob, is below its target, else lowers it."""
    return -(log_alpha.exp() * (log_prob + target_entropy)).mean()


# ---- The agent and its update (Algorithm 2) -----------------------------------------------------


@torch.no_grad()
def move_towards(average, network, rate):
    """p̄ ← p̄ + rate (p − p̄), for each weight p̄ of `average` and p of `network`."""
    for p_average, p in zip(average.parameters(), network.parameters()):
        p_average.lerp_(p, rate)


class Agent(nn.Module):
    """The networks of a method, their optimizers, and `update`. d_c is the size of a context c."""

    def __init__(self, cfg, d_s, d_a, d_c):
        super().__init__()
        self.cfg, self.target_entropy = cfg, -float(d_a)  # SAC's rule of thumb
        self.method = method = METHODS[cfg.method]  # below; DMA*-SH: z, adapter, adapter, shared
        d_context = {"z": cfg.d_z, "c": d_c, "none": 0}[method.context]

        def make_hypernetwork():
            return Hypernetwork(d_context, cfg.hyper_hidden, cfg.hidden, cfg.bottleneck)

        options = dict(d_x=cfg.hidden, d_context=d_context)
        if method.hypernetwork == "own":
            options["make_own"] = make_hypernetwork  # for each network that carries an adapter

        self.g = self.h = self.f = None  # None stays where the method has no such network.
        if method.context == "z":
            Encoder = GaussianEncoder if method.beta else ContextEncoder  # the former: DMA-Pearl
            norms = method.input_norm, method.output_norm
            self.g = Encoder(d_s, d_a, cfg.d_z, cfg.encoder_hidden, cfg.mask, *norms)  # φ
        if method.hypernetwork == "shared":
            self.h = make_hypernetwork()  # η
        if method.f != "none":
            self.f = DynamicsModel(d_s, d_a, use=method.f, **options)  # θ
        self.pi = Actor(d_s, d_a, use=method.rl, **options)  # ξ
        self.pi_average = None  # not in the paper; --quick evaluates it, as it is steadier
        if cfg.policy_average:
            self.pi_average = copy.deepcopy(self.pi).requires_grad_(False)
        self.Q = Critics(d_s, d_a, use=method.rl, **options)  # ζ
        self.Q_target = copy.deepcopy(self.Q).requires_grad_(False)  # ζ̄
        self.log_alpha = nn.Parameter(torch.tensor(cfg.alpha).log())
        self.to(cfg.device)

        def adam(lr, *networks):
            present = nn.ModuleList(network for network in networks if network is not None)
            return torch.optim.Adam(present.parameters(), lr, fused=True)  # fused is faster

        self.optimizers = {
            "critic": adam(cfg.critic_lr, self.Q),
            "actor": adam(cfg.actor_lr, self.pi),
            "temperature": torch.optim.Adam([self.log_alpha], cfg.alpha_lr, fused=True),
        }
        if self.f is not None:
            self.optimizers["dynamics"] = adam(cfg.dynamics_lr, self.g, self.h, self.f)

    @property
    def alpha(self):
        return self.log_alpha.detach().exp()

    def infer(self, tau, noisy, c=None):
        """Returns z (B, 8) and ω, for tau (B, L, 2 d_s + d_a).

        Without a shared hypernetwork, z takes the place of ω. Without an encoder, z is None and the
        true contexts c (N, d_c) take the place of ω. DR gets them, too, but uses none.
        """
        if self.g is None:
            return None, c
        z = self.g(tau, noisy)
        return z, (z if self.h is None else self.h(z))

    @torch.no_grad()
    def act(self, s, omega, noisy):
        """Actions (N, d_a) in s (N, d_s): sampled if `noisy`, else the mean."""
        if noisy:
            return self.pi.sample(s, omega)[0]
        pi = self.pi if self.pi_average is None else self.pi_average
        return pi.mean(s, omega)

    def update(self, batch, step):
        """One gradient step; `step` counts from 1. Returns a dict of 0-d tensors: α and losses."""
        optimizers, losses = self.optimizers, {}

        # 2  z ← g_φ(τ), ω ← h_η(z)
        _, omega = self.infer(batch.tau, noisy=True, c=batch.c)

        # 3  (φ, θ, η) ← (φ, θ, η) − α₃ ∇ℒ_{φ,θ,η} (Eq. 1)
        if self.f is not None:
            loss = dynamics_loss(self.f, omega, batch)
            losses["dynamics_loss"] = loss.detach()
            if self.method.beta:
                # DMA-Pearl alone; line 2 has set kl. As published: both factors have gradients.
                loss = loss * (1 + self.method.beta * self.g.kl)
            optimizers["dynamics"].zero_grad()
            loss.backward()
            optimizers["dynamics"].step()

        # 4  ω ← stop-gradient(ω) (Eq. 2): the losses below reach neither φ nor the η that all share
        omega = omega.detach()

        # 5  ζ ← ζ − α₂ ∇ℒ_ζ
        loss = critic_loss(self.pi, self.Q, self.Q_target, self.alpha, omega, batch, self.cfg.gamma)
        losses["critic_loss"] = loss.detach()
        optimizers["critic"].zero_grad()
        loss.backward()
        optimizers["critic"].step()

        # 6  every second step do twice: ξ ← ξ − α₁ ∇ℒ_ξ; then α by its loss, from the same actions
        if step % 2 == 0:
            self.Q.requires_grad_(False)  # ∂Q/∂a is needed, and ∂Q/∂ζ would only cost time
            for _ in range(2):
                loss, log_prob = actor_loss(self.pi, self.Q, self.alpha, omega, batch)
                losses["actor_loss"] = loss.detach()
                optimizers["actor"].zero_grad()
                loss.backward()
                optimizers["actor"].step()

                loss = temperature_loss(self.log_alpha, log_prob, self.target_entropy)
                optimizers["temperature"].zero_grad()
                loss.backward()
                optimizers["temperature"].step()

                if self.pi_average is not None:  # an extra of --quick
                    move_towards(self.pi_average, self.pi, self.cfg.policy_average)
            self.Q.requires_grad_(True)

        # 7  ζ̄ ← ζ̄ + ρ (ζ − ζ̄)
        move_towards(self.Q_target, self.Q, self.cfg.polyak)
        return losses | {"alpha": self.alpha}


# ---- The methods of the comparison --------------------------------------------------------------


class Method(NamedTuple):
    """One row of METHODS: what the networks are told of the context, and how."""

    paper: str  # name in the paper, or "ablation"
    context: str  # z: inferred by the encoder; c: the true one; none
    rl: str  # what π and Q do with it: adapter, concat, none
    f: str  # what f does with it: adapter, concat; none: this method has no f
    hypernetwork: str  # shared: trained by Eq. 1; own: in each network with an adapter; none
    mask: float  # probability p of `mask_inputs`
    input_norm: bool  # AvgL1Norm in the encoder
    output_norm: bool  # SimNorm in the encoder
    beta: float = 0.0  # β, weight of the KL factor; above 0 the code is Gaussian


METHODS = {
    #                         paper   context  π and Q    f    hypernetwork mask   in    out  beta
    "dma_star_sh":    Method("DMA*-SH",   "z", "adapter", "adapter", "shared", 0.4, True,  True),
    "dma_star_h":     Method("DMA*-H",    "z", "adapter", "adapter", "own",    0.4, True,  True),
    "dma_star":       Method("DMA*",      "z", "concat",  "concat",  "none",   0.2, True,  True),
    "dma":            Method("DMA",       "z", "concat",  "concat",  "none",   0.0, False, False),
    "dma_pearl":      Method("DMA-Pearl", "z", "concat",  "concat",  "none", 0.0, False, False, .4),
    "concat":         Method("Concat",    "c", "concat",  "none",    "none",   0.0, False, False),
    "da":             Method("DA",        "c", "adapter", "none",    "own",    0.0, False, False),
    "dr":             Method("DR",     "none", "none",    "none",    "none",   0.0, False, False),
    "rl_adapters":    Method("ablation",  "z", "adapter", "concat",  "own",    0.4, True,  True),
    "dma_sh":         Method("ablation",  "z", "adapter", "adapter", "shared", 0.0, False, False),
    "no_mask":        Method("ablation",  "z", "adapter", "adapter", "shared", 0.0, True,  True),
    "no_input_norm":  Method("ablation",  "z", "adapter", "adapter", "shared", 0.4, False, True),
    "no_output_norm": Method("ablation",  "z", "adapter", "adapter", "shared", 0.4, True,  False),
}  # fmt: skip


class GaussianEncoder(ContextEncoder):
    """The encoder of DMA-Pearl, with the layer norms of the published code.

    z is a sample of a Gaussian. `kl` is this Gaussian's divergence from N(0, I), mean over B, d_z.
    """

    def __init__(self, d_s, d_a, d_z, *options):
        super().__init__(d_s, d_a, d_z, *options)
        self.variance = nn.Linear(self.project.in_features, d_z, bias=False)
        self.mean_norm, self.variance_norm = nn.LayerNorm(d_z), nn.LayerNorm(d_z)

    def forward(self, tau, noisy):
        """z (B, 8): a sample if `noisy`, else the mean."""
        last = self.read(tau, noisy)
        mean = self.mean_norm(self.project(last))
        variance = F.softplus(self.variance_norm(self.variance(last)))
        self.kl = ((variance + mean.square() - 1 - variance.log()) / 2).mean()
        if noisy:
            return mean + variance.sqrt() * torch.randn_like(mean)
        return mean


# ---- Replay: one stream of transitions per context, in time order -------------------------------


class Replay:
    """Transitions t = 0, 1, … of N contexts: [s, a, δs, r] in row t modulo the capacity.

    The window of transition t is rows t−K … t−1 of its context: past transitions only. It may begin
    before a reset, as a reset keeps the context. Rows before the first transition are zeros, as if
    masked. No state is terminal: episodes end by their time limit.
    """

    def __init__(self, c, capacity, d_s, d_a, K, L):
        """c (N, d_c): the true contexts. L = 0: nothing reads windows."""
        self.c, self.N, self.capacity = c, len(c), capacity
        self.d_s, self.d_a, self.K, self.L = d_s, d_a, K, L
        self.rows = torch.zeros(capacity, self.N, 2 * d_s + d_a + 1, device=c.device)
        self.t = 0  # transitions written so far, per context

    def add(self, s, a, r, s2):
        """One transition of every context: s, s2 (N, d_s), a (N, d_a), r (N,)."""
        self.rows[self.t % self.capacity] = torch.cat([s, a, s2 - s, r.unsqueeze(-1)], -1)
        self.t += 1

    def windows(self, n, t, noisy):
        """τ (B, L, 2 d_s + d_a), for i < B of the window of transition t[i] in context n[i]."""
        if self.L == 0:
            return None
        i = subsample(len(t), self.K, self.L, noisy, self.rows.device)  # (B, L)
        past = (t.unsqueeze(-1) - self.K + i) % self.capacity
        return self.rows[past, n.unsqueeze(-1), :-1]  # past is (B, L), n (B, 1); all but the reward

    def latest(self, noisy):
        """τ (N, L, 2 d_s + d_a) for the next action in each context."""
        n = torch.arange(self.N, device=self.rows.device)
        return self.windows(n, torch.full_like(n, self.t), noisy)

    def sample(self, size):
        """A Batch: of each context, `size // N` transitions that have a whole window."""
        n = torch.arange(self.N, device=self.rows.device).repeat_interleave(size // self.N)
        oldest = max(0, self.t - self.capacity) + self.K  # the first with a whole window
        t = torch.randint(oldest, self.t, n.shape, device=self.rows.device)
        rows = self.rows[t % self.capacity, n]  # (B, 2 d_s + d_a + 1)
        s, a, ds, r = rows.split([self.d_s, self.d_a, self.d_s, 1], -1)
        return Batch(s, a, ds, r.squeeze(-1), self.windows(n, t, noisy=True), self.c)


# ---- Acting, and zero-shot evaluation -----------------------------------------------------------


class Rollout:
    """Acts in all contexts at once. The last K transitions of its replay are the window.

    If `noisy`, it collects for training, and a number that is not finite raises FloatingPointError.
    Else it evaluates: zeros replace such numbers, and `diverged` (N,) marks the context.
    """

    def __init__(self, agent, envs, noisy, capacity=None):
        cfg = agent.cfg
        self.agent, self.envs, self.noisy = agent, envs, noisy
        L = 0 if agent.g is None else cfg.L
        self.replay = Replay(self.tensor(envs.c), capacity or cfg.K, envs.d_s, envs.d_a, cfg.K, L)
        self.s = torch.zeros(envs.N, envs.d_s, device=cfg.device)
        self.done, self.diverged = True, np.zeros(envs.N, dtype=bool)

    def collect(self, random=False):
        """One step for training. If the episode has ended, a new one begins first: K steps more."""
        if self.done:
            self.begin_episode(random=random)
        self.step(random)

    def begin_episode(self, warm_up=True, random=False):
        """The warm-up: a reset, K steps that fill the window, and a reset. The window stays."""
        self.reset()
        if warm_up:
            for _ in range(self.replay.K):
                self.step(random)
        self.reset()

    def reset(self):
        self.done = False
        self.diverged[:] = False
        self.s = self.tensor(self.finite("observation", self.envs.reset()))

    @torch.no_grad()
    def step(self, random=False):
        """Line 1 of Algorithm 2: one step in every context; `random`: uniform actions.

        Sets `done` at the horizon. Returns s (N, d_s), a (N, d_a), r (N,) and ω.
        """
        s, omega = self.s, None
        if random:
            a = 2 * torch.rand(self.envs.N, self.envs.d_a, device=s.device) - 1
        else:
            tau = self.replay.latest(self.noisy)
            _, omega = self.agent.infer(tau, self.noisy, self.replay.c)
            a = self.agent.act(s, omega, self.noisy)
        actions = self.finite("action", a.cpu().numpy())  # what is executed and stored
        s2, r, self.done = self.envs.step(actions)
        a, r = self.tensor(actions), self.tensor(self.finite("reward", r))
        self.s = self.tensor(self.finite("observation", s2))
        self.replay.add(s, a, r, self.s)
        return s, a, r, omega

    def finite(self, name, values):
        """Sets rows of `values` (N, ...) that are not finite to 0. In training it raises."""
        broken = ~np.isfinite(values.reshape(self.envs.N, -1)).all(-1)  # (N,)
        if self.noisy and broken.any():
            raise FloatingPointError(f"{name} is not finite")
        self.diverged |= broken
        values[broken] = 0
        return values

    def tensor(self, array):
        return torch.from_numpy(array).to(self.agent.cfg.device, torch.float32)


def evaluate(
    agent: Agent, cfg: Config, contexts: list, rollouts: int = 1, seed: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Zero-shot returns of `rollouts` episodes in each of `contexts`, a list of dicts.

    Returns two arrays (contexts, rollouts): the returns, where rewards from a divergence on count
    as 0, and whether the episode had one. Of `cfg` only env and seed matter. `seed` (cfg's if None)
    decides the initial states; those of the first rollout do not depend on `rollouts`.
    """
    stream = [cfg.seed if seed is None else seed, 1]  # training has [seed, 0]
    envs = aib_envs.VectorEnv(cfg.env, list(contexts) * rollouts, seed=stream)
    rollout, returns = Rollout(agent, envs, noisy=False), np.zeros(envs.N)  # N: all episodes
    rollout.begin_episode()
    while not rollout.done:
        _, _, r, _ = rollout.step()
        returns += np.where(rollout.diverged, 0, r.cpu().numpy())
    return returns.reshape(rollouts, -1).T, rollout.diverged.reshape(rollouts, -1).T


# =================================================================================================
# The method ends here. What follows starts, saves and draws runs.
# =================================================================================================

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]
try:
    from tqdm import tqdm
except ImportError:
    tqdm = None  # type: ignore[assignment]


class BadInput(ValueError):
    """A value or a file of the user that is not usable. The message is one line."""


class Stopped(Exception):
    """Ctrl-C or SIGTERM stopped the run, which can go on. The argument is the signal's number."""


def complete(cfg):
    """Fills in what the environment and the method decide, and checks every setting of a Config."""
    try:
        spec = aib_envs.lookup(cfg.env)
    except (ValueError, ImportError, TypeError, gymnasium.error.Error) as error:
        raise BadInput(f"--env {cfg.env}: {one_line(error)}") from None
    if cfg.method not in METHODS:
        raise BadInput(aib_envs.unknown("method", cfg.method, METHODS))
    method = METHODS[cfg.method]
    if cfg.K is None:
        cfg.K = spec.K
    cfg.K = number("--K", cfg.K, int, 1, spec.horizon)
    defaults = {
        "steps": spec.steps // 10 if cfg.quick else spec.steps,
        "mask": method.mask,
        "threads": torch.get_num_threads(),
        "buffer": 100_000 * (cfg.K + spec.horizon) // spec.horizon,  # warm-ups are extra
    }
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if value is None:
            value = defaults[f.name]
        if f.metadata["limits"] is not None:
            value = number(flag(f.name), value, f.type, *f.metadata["limits"])
        setattr(cfg, f.name, value)

    def require(ok, name, rule):
        if not ok:
            raise BadInput(f"{flag(name)} {getattr(cfg, name)}: must be {rule}")

    require(cfg.buffer > cfg.K, "buffer", f"more than --K, here {cfg.K}")
    require(cfg.batch >= cfg.contexts, "batch", f"at least --contexts, here {cfg.contexts}")
    require(cfg.mask == 0 or method.context == "z", "mask", f"0: {cfg.method} has no encoder")
    require(cfg.d_z % ContextEncoder.GROUP == 0, "d_z", f"a multiple of {ContextEncoder.GROUP}")
    try:
        torch.zeros(1, device=cfg.device).item()
    except (RuntimeError, AssertionError):  # the latter where torch has no GPU support
        allowed = "cpu, or a GPU that is there: cuda or cuda:<number>"
        raise BadInput(f"--device {cfg.device}: must be {allowed}") from None


def number(name, value, kind, low, high=1e12):
    """`value`, which may be text such as 1e5, as an int or a float (`kind`) from low to high."""
    try:
        x = float(value)
    except ValueError:
        x = math.nan
    if low <= x <= high and kind(x) == x:
        return kind(x)
    what = "whole number" if kind is int else "number"
    raise BadInput(f"{name} {value}: must be a {what} from {low:.10g} to {high:.10g}")


def flag(name):
    return "--" + name.replace("_", "-")


def run_folder(cfg):
    name = cfg.env.replace(":", ".").replace("/", ".") + f"__{cfg.method}"
    if cfg.quick:
        name += "__quick"
    return Path(cfg.out) / f"{name}__s{cfg.seed}"


def new_agent(cfg):
    spec = aib_envs.lookup(cfg.env)
    return Agent(cfg, spec.cls.d_s, spec.cls.d_a, len(spec.context))


# ---- A run --------------------------------------------------------------------------------------

SETS = ("train", "eval_in", "eval_out")
LOSSES = ("dynamics_loss", "critic_loss", "actor_loss", "alpha")
PLAIN = ("step", "metrics", "per_context", "losses")  # in the checkpoint as they are


class Run:
    """A run, and all that it must remember to go on as if it had never stopped.

    `Run.start` and `Run.resume` train it. A number that is not finite raises FloatingPointError.
    A table, policy or checkpoint is replaced as a whole; a resume writes all of them anew.
    """

    def __init__(self, cfg, folder):
        torch.set_num_threads(cfg.threads)
        torch.set_flush_denormal(True)  # Adam makes numbers below 1e-38, with which CPUs are slow.
        torch.manual_seed(cfg.seed)
        keep_freed_memory()
        self.cfg, self.folder, self.version = cfg, Path(folder), code_version()
        self.agent = new_agent(cfg)
        contexts = aib_envs.context_sets(cfg.env, cfg.contexts)["train"]
        envs = aib_envs.VectorEnv(cfg.env, contexts, seed=[cfg.seed, 0])
        self.rollout = Rollout(self.agent, envs, noisy=True, capacity=cfg.buffer)
        self.step = 0  # gradient steps done
        self.metrics, self.per_context = [], []  # the rows of both tables
        self.signal, self.evaluating = None, False
        self.began = time.perf_counter()
        self.losses = {name: [] for name in LOSSES}  # of the gradient steps since an evaluation

    @classmethod
    def start(cls, cfg):
        """Trains in a new folder."""
        run = cls(cfg, run_folder(cfg))
        run.folder.mkdir(parents=True, exist_ok=True)
        with lock(run.folder) as run.inode:
            for path in run.folder.iterdir():
                if path.suffix != ".partial":  # which a run leaves that is killed at its start
                    ways = f"choose another --seed or --out, or go on with --resume {run.folder}"
                    raise BadInput(f"{path} is already there; {ways}")
            run.train()

    @classmethod
    def resume(cls, folder, steps=None, expected=None):
        """Trains on from the checkpoint in `folder`, to a larger number of `steps` if given.

        `expected` is the Config that --go-on asks for. BadInput if the run has other settings, but
        for steps, out and threads.
        """
        path = Path(folder) / "checkpoint.pt"
        if not path.is_file():
            raise BadInput(f"--resume {folder}: no run folder (it has no {path.name})")
        with lock(folder) as inode:
            with reading(path):
                state = load(path)
                run = cls(Config(**state["settings"]), folder)
                run.inode = inode
                run.load_state_dict(state)
            if expected is not None:
                for name, value in asdict(expected).items():
                    there = getattr(run.cfg, name)
                    if value != there and name not in ("steps", "out", "threads"):
                        holds = f"{folder} holds a run with {flag(name)} {there}"
                        raise BadInput(f"{flag(name)} {value}: {holds}")
                steps = max(expected.steps, run.cfg.steps)
            if steps is not None:
                run.cfg.steps = number("--steps", steps, int, run.cfg.steps)
            run.train()

    @property
    def last_evaluation(self):
        """The step of the last evaluation, 0 before the first."""
        return self.metrics[-1]["step"] if self.metrics else 0

    def train(self):
        """Trains to `cfg.steps`, or until a signal. Evaluates and saves on the way."""
        cfg = self.cfg
        self.save()
        say(f"{self.folder}: step {self.step:,} of {cfg.steps:,}; threads: {cfg.threads}")
        try:
            with handle_signals(self.on_signal), contextlib.suppress(Stopped):
                if self.step == 0:
                    for _ in progress("random steps", 0, cfg.random_steps, self.recent_return):
                        self.rollout.collect(random=True)
                        self.between_steps()
                self.between_steps()  # a resumed run makes the evaluation that was broken off
                for _ in progress("gradient steps", self.step, cfg.steps, self.recent_return):
                    self.gradient_step()
                    self.between_steps()
        except FloatingPointError as error:
            kept = f"the last checkpoint in {self.folder} is untouched"
            raise FloatingPointError(f"step {self.step:,}: {error}; {kept}") from None
        if self.step > self.last_evaluation:  # stopped between two evaluations
            self.save()
        if self.metrics:
            plot(self)
        if self.last_evaluation < cfg.steps:
            command = shlex.join([sys.executable, sys.argv[0], f"--resume={self.folder}"])
            print(f"stopped at step {self.step:,}; to go on: {command}")
            raise Stopped(self.signal)
        print(f"complete: {', '.join(sorted(path.name for path in self.folder.iterdir()))}")

    def on_signal(self, signum, frame):
        """SIGINT or SIGTERM stops the run after this gradient step; a second one stops at once.

        An evaluation is broken off. It changes nothing, and the resumed run makes it again.
        """
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signum
        if self.evaluating:
            raise Stopped(signum)

    def recent_return(self):
        """The sum of rewards in the last `horizon` steps of training, mean over contexts."""
        replay = self.rollout.replay
        steps = min(self.rollout.envs.horizon, replay.capacity, replay.t)
        t = torch.arange(replay.t - steps, replay.t) % replay.capacity
        return f"training return {replay.rows[t, :, -1].sum(0).mean():.1f}"

    def between_steps(self):
        """Stops if a signal has come. Else evaluates and saves, if it is time."""
        if self.signal is not None:
            raise Stopped(self.signal)
        cfg = self.cfg
        due = self.step % cfg.eval_every == 0 or self.step == cfg.steps
        if due and self.step > self.last_evaluation:
            self.evaluate()
            self.save()
            say(summary(self.metrics[-1], cfg.steps))

    def gradient_step(self):
        """One step of all contexts, after a warm-up if an episode begins, and one update."""
        self.step += 1
        self.rollout.collect()
        losses = self.agent.update(self.rollout.replay.sample(self.cfg.batch), self.step)
        require_finite(losses)
        for name, value in losses.items():
            self.losses[name].append(value.item())

    def evaluate(self):
        """Adds an evaluation to both tables."""
        cfg = self.cfg
        rollouts = cfg.eval_rollouts
        if self.step == cfg.steps:
            rollouts = cfg.rollouts
            say(f"last evaluation: {rollouts} episodes in each context …")
        self.evaluating = True
        results = evaluate_sets(self.agent, cfg, rollouts)
        self.evaluating = False
        row = {
            "step": self.step,
            "env_steps": self.rollout.replay.t * cfg.contexts,
            "seconds": time.perf_counter() - self.began,
        }
        for name, values in self.losses.items():
            row[name] = sum(values) / len(values) if values else math.nan
            values.clear()
        for name in SETS:
            row[name] = float(np.mean(of_set(results, name, "return")))
        for name in SETS:
            row[f"diverged_{name}"] = sum(of_set(results, name, "diverged"))
        self.metrics.append(row)
        self.per_context += [{"step": self.step, **result} for result in results]

    def save(self):
        """Writes all files, the checkpoint first. Writes none if a weight is not finite."""
        if os.stat(self.folder).st_ino != self.inode:
            raise BadInput(f"{self.folder} was replaced by another folder while this run went on")
        state = self.state_dict()
        require_finite(state["agent"])
        policy = {name: state[name] for name in ("settings", "version", "step")}
        policy["agent"] = acting(state["agent"])
        config = state["settings"] | {"version": self.version}
        for package in (torch, np, mujoco, gymnasium):
            config[package.__name__] = package.__version__
        files = {"checkpoint.pt": state, "policy.pt": policy}
        files["config.json"] = json.dumps(config, indent=2) + "\n"
        if self.metrics:
            files["metrics.csv"] = csv_text(self.metrics)
            files["per_context.csv"] = csv_text(self.per_context)
        if self.cfg.snapshots and self.step == self.last_evaluation > 0:
            (self.folder / "policies").mkdir(exist_ok=True)
            files[f"policies/{self.step}.pt"] = policy
        for name, content in files.items():
            replace_file(self.folder / name, content)

    def state_dict(self):
        """Tensors, numbers, strings, lists and dicts, so that loading it can run no code."""
        optimizers, rollout, replay = self.agent.optimizers, self.rollout, self.rollout.replay
        state = {name: getattr(self, name) for name in PLAIN}
        generators = [torch.get_rng_state()]
        if self.cfg.device.startswith("cuda"):
            generators.append(torch.cuda.get_rng_state(self.cfg.device))
        return state | {
            "settings": asdict(self.cfg),
            "version": self.version,
            "seconds": time.perf_counter() - self.began,
            "agent": self.agent.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
            "replay": replay.rows[: replay.t].clone(),  # of a view, torch.save would store all rows
            "t": replay.t,
            "envs": rollout.envs.state_dict(),
            "done": rollout.done,
            "s": rollout.s,
            "generators": generators,
        }

    def load_state_dict(self, state):
        """Takes over a checkpoint; an exception if it is not one of such a run."""
        if state.keys() != self.state_dict().keys():
            raise ValueError("written by another version of dmash.py")
        if state["version"] != self.version:
            print(f"saved by version {state['version']!r}, goes on with {self.version!r}")
        for name in PLAIN:
            setattr(self, name, state[name])
        self.began -= state["seconds"]
        self.agent.load_state_dict(state["agent"])
        for name, optimizer in self.agent.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        rollout, replay = self.rollout, self.rollout.replay
        replay.t = state["t"]
        replay.rows[: replay.t] = state["replay"]
        rollout.s[:] = state["s"]
        rollout.envs.load_state_dict(state["envs"])
        rollout.done = state["done"]
        if rollout.envs.t is None and not rollout.done:
            print(f"a new episode begins: the state of {self.cfg.env} cannot be saved")
            rollout.done = True
        generator, *gpus = state["generators"]
        torch.set_rng_state(generator)
        for gpu in gpus:
            torch.cuda.set_rng_state(gpu, self.cfg.device)


def evaluate_sets(agent, cfg, rollouts):
    """A dict for each context of the three sets: set, index, its values, mean return, diverged."""
    sets = aib_envs.context_sets(cfg.env, cfg.contexts)
    contexts = [context for name in SETS for context in sets[name]]
    returns, diverged = evaluate(agent, cfg, contexts, rollouts)
    rows = [{"set": name, "index": i} | c for name in SETS for i, c in enumerate(sets[name])]
    for i, row in enumerate(rows):
        row["return"] = float(returns[i].mean())
        row["diverged"] = int(diverged[i].sum())
    return rows


def of_set(rows, name, column):
    """The values of a column in the rows of one set."""
    return [row[column] for row in rows if row["set"] == name]


def acting(weights):
    """Those of an agent's weights that acting needs: what policy.pt holds."""
    parts = ("g.", "h.", "pi.", "pi_average.")
    return {name: value for name, value in weights.items() if name.startswith(parts)}


def require_finite(tensors):
    """FloatingPointError names the first of the tensors that holds a nan or an infinity."""
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise FloatingPointError(f"{name} is not finite")


def keep_freed_memory():
    """Lets glibc keep the memory of a gradient step for the next one.

    Otherwise the memory is given back, asked for again and cleared, page by page.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # systems without glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, its largest value


@contextlib.contextmanager
def handle_signals(handler):
    """SIGINT and SIGTERM call `handler` in the block, if this is the main thread."""
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(number, handler)
                stack.callback(signal.signal, number, before)
        yield


def summary(row, steps):
    """The line printed at an evaluation. Its pace includes evaluations and random steps."""
    rate = row["step"] / row["seconds"]
    text = f"step {row['step']:,}  return:"
    for name in SETS:
        text += f"  {name} {row[name]:.1f}"
    if not math.isnan(row["dynamics_loss"]):
        text += f"  dynamics loss {row['dynamics_loss']:.2e}"
    text += f"  alpha {row['alpha']:.3f}  {rate:.1f} steps/s"
    text += f"  {(steps - row['step']) / rate / 60:.0f} min left"
    diverged = sum(row[f"diverged_{name}"] for name in SETS)
    if diverged:
        text += f"  {diverged} evaluation episodes diverged"
    return text


def say(line):
    """Prints a line at once, above the progress bar if there is one."""
    if tqdm is None:
        print(line)
    else:
        tqdm.write(line)
    sys.stdout.flush()


def progress(what, done, total, note):
    """Yields once for each step to do, and shows how far it is, with `note()` added.

    On a terminal it shows tqdm's bar. In a log, or without tqdm, a line comes every 30 seconds.
    """
    if tqdm is not None and sys.stderr.isatty():
        bar = tqdm(range(done, total), what, total, initial=done)
        for i in bar:
            yield
            if i % 100 == 0:
                bar.set_postfix_str(note(), refresh=False)
        return
    begin = told = time.perf_counter()
    for i in range(done + 1, total + 1):
        yield
        now = time.perf_counter()
        if now - told >= 30:
            told = now
            rate = (i - done) / (now - begin)
            left = (total - i) / rate / 60
            pace = f"{rate:.1f} a second, {left:.0f} min left"
            say(f"{i:,} of {total:,} {what}, {pace}, {note()}")


# ---- Files --------------------------------------------------------------------------------------


def code_version():
    """A hash of both source files and, where git tracks them, the commit that last changed them."""
    files = [Path(__file__).resolve(), Path(aib_envs.__file__).resolve()]
    version = hashlib.sha256(files[0].read_bytes() + files[1].read_bytes()).hexdigest()[:12]
    command = ["git", "-C", files[0].parent, "log", "-1", "--format= %h", "--", *files]
    with contextlib.suppress(OSError):  # no git
        version += subprocess.run(command, capture_output=True, text=True).stdout.rstrip()
    return version


@contextlib.contextmanager
def lock(folder):
    """Holds the folder in the block; BadInput if another process holds it.

    Gives the inode, by which `Run.save` sees that another folder has taken its place. Nothing is
    held where folders have no locks (Windows, some network disks).
    """
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BadInput(f"{folder} is in use by another process") from None
            except OSError:  # a network disk without locks
                pass
        yield os.stat(folder).st_ino


def replace_file(path, content):
    """Writes text or, by torch.save, anything else. If that fails, the old file stays: BadInput."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        partial.unlink(missing_ok=True)
        raise BadInput(f"{path} cannot be written ({one_line(error)})") from None


def load(path):
    """Loads to the CPU what torch.save wrote. No code in the file is run."""
    with zipfile.ZipFile(path) as archive:  # torch.load does not look at the check sums in it
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def reading(path):
    """Makes BadInput that names the file of any error in the block, which reads it."""
    try:
        yield
    except Exception as error:
        raise BadInput(f"{path} cannot be read ({one_line(error)})") from None


def one_line(error):
    """An error in one line. A stranger's text must not steer the terminal."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(filter(str.isprintable, text))[:200]


def csv_text(rows):
    """The text of a CSV file with a line for each dict; floats have 6 digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in row.values()])
    return text.getvalue()


# ---- A trained policy in other programs ----------------------------------------------------------


def load_policy(path: str | Path, device: str = "cpu") -> tuple[Config, Agent]:
    """The Config and the trained Agent of a run folder or a policy file.

    g, h and π are the trained ones; f and Q have random weights. agent.step and agent.version tell
    the step and the code that saved it. BadInput names what cannot be read. Torch's generator stays
    as it is.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "policy.pt"
    if not path.is_file():
        raise BadInput(f"{path}: must be a policy file, or a run folder that holds policy.pt")
    Config(device=device)  # refuses a device that is not usable, before the file is to blame
    with reading(path), torch.random.fork_rng(devices=[]):
        state = load(path)
        cfg = Config(**state["settings"] | {"device": device})
        agent = new_agent(cfg)
        if acting(agent.state_dict()).keys() != state["agent"].keys():
            raise ValueError("its weights are not those of this method in this version")
        agent.load_state_dict(state["agent"], strict=False)
        agent.step, agent.version = int(state["step"]), str(state["version"])
    return cfg, agent


class Policy:
    """A trained agent for a loop of one's own: numpy in, numpy out, one environment or N at once.

    It keeps the window of the last K transitions that it saw. Training and evaluation fill the
    window by a warm-up of K steps before an episode. Here the window begins empty, so the first
    actions know nothing of the context. `z` (N, 8) is the last code.
    """

    def __init__(self, cfg: Config, agent: Agent) -> None:
        if agent.method.context == "c":
            raise BadInput(f"{cfg.method} must be told the context, which a Policy does not know")
        self.cfg, self.agent = cfg, agent
        self.reset()

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> "Policy":
        """From a run folder or a policy file."""
        return cls(*load_policy(path, device))

    def reset(self, forget: bool = True) -> None:
        """To be called at the start of an episode. `forget` empties the window, for a new context.

        A window that is kept lacks the last transition, whose end `act` never saw.
        """
        self.last: list[torch.Tensor] = []  # the last observation and action
        if forget:
            self.window: Replay | None = None
            self.z: np.ndarray | None = None

    @torch.no_grad()
    def act(self, s: np.ndarray) -> np.ndarray:
        """The action (d_a,) in [-1, 1] for an observation (d_s,), or (N, d_a) for (N, d_s)."""
        cfg, agent = self.cfg, self.agent
        rows = torch.from_numpy(np.array(s, np.float32, ndmin=2)).to(cfg.device)  # (N, d_s), a copy
        if self.window is None:
            cls = aib_envs.lookup(cfg.env).cls
            L = 0 if agent.g is None else cfg.L
            no_context = torch.zeros(len(rows), 0, device=cfg.device)
            self.window = Replay(no_context, cfg.K, cls.d_s, cls.d_a, cfg.K, L)
        if self.last:
            s_last, a_last = self.last
            self.window.add(s_last, a_last, rows[:, 0], rows)  # any reward, as nothing reads it
        z, omega = agent.infer(self.window.latest(noisy=False), noisy=False)
        a = agent.act(rows, omega, noisy=False)
        self.last = [rows, a]
        if z is not None:
            self.z = z.cpu().numpy()
        return a.cpu().numpy().reshape(*np.shape(s)[:-1], -1).copy()  # the caller may change it


# ---- Picture ------------------------------------------------------------------------------------


def plot(run):
    """Draws curve.png: returns over steps, and the last returns against the first context value."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("curve.png is not drawn: it needs matplotlib (pip install matplotlib)")
        return
    dim = aib_envs.lookup(run.cfg.env).context[0]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    curves, last = figure.subplots(1, 2, sharey=True)
    steps = [row["step"] for row in run.metrics]
    rows = [row for row in run.per_context if row["step"] == run.last_evaluation]
    for name in SETS:
        curves.plot(steps, [row[name] for row in run.metrics], ".-", label=name)
        last.plot(of_set(rows, name, dim.name), of_set(rows, name, "return"), "o")
    curves.set_title(run.folder.resolve().name, parse_math=False)
    curves.set(xlabel="gradient steps", ylabel="average episodic return")
    curves.legend()
    last.axvspan(*dim.train, color="0.92", zorder=0)
    last.set(xlabel=dim.name, title="last evaluation; grey: trained on")
    figure.savefig(run.folder / "curve.png", dpi=110)


# ---- Command line -------------------------------------------------------------------------------

EXAMPLES = """
  python dmash.py --env cartpole_inv --quick
  python dmash.py --resume runs/cartpole_inv__dma_star_sh__quick__s1
  python dmash.py --eval runs/cartpole_inv__dma_star_sh__quick__s1 --per-context
"""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are BadInput."""

    def error(self, message):
        raise BadInput(message)


def build_parser():
    """No argument has a default, so that one sees which were given."""
    parser = Parser(
        "dmash.py",
        usage="%(prog)s [options]",
        description=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--eval", metavar="RUN", help="evaluate a run folder or a policy file")
    modes.add_argument("--resume", metavar="RUN", help="go on with a run; --steps may be raised")
    modes.add_argument("--go-on", action="store_true", help="start the run, or go on with it")
    modes.add_argument("--list-methods", action="store_true", help="print the table of methods")
    modes.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("--per-context", action="store_true", help="with --eval: every context")
    for f in fields(Config):
        kind = {"action": "store_true"}
        text = f.metadata["help"]
        if f.type is not bool:
            kind = {"metavar": f.type.__name__.upper()}
        if f.default:
            text += f" (default: {f.default})"
        parser.add_argument(flag(f.name), help=text, **kind)
    return parser


def exit_status(program, command):
    """Runs `command()`. Returns the exit status; an error is one line, with the program's name.

    0: done. 2: bad input or an unusable file. 1: a number is not finite, or the reader of the
    output has left. 128 + n: stopped by signal n.
    """
    try:
        command()
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader of our output has left: nothing to tell it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Stopped as stopped:
        return 128 + stopped.args[0]
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except FloatingPointError as error:
        message, status = error, 1
    except OSError as error:
        message, status = f"{error.filename or 'output'}: {error.strerror or error}", 2
    except (BadInput, aib_envs.BadEnvironment) as error:
        message, status = error, 2
    print(f"{program}: error: {message}", file=sys.stderr)
    return status


def main(argv=None):
    """The command line. Returns the exit status."""
    return exit_status("dmash.py", lambda: run_command(vars(build_parser().parse_args(argv))))


ALLOWED_WITH = {
    "eval": {"per_context", "rollouts", "threads", "device"},
    "resume": {"steps"},
    "list_methods": set(),
    "version": set(),
}


def run_command(given):
    """Runs what the command line asks for. `given` has the arguments that stood there, by name."""
    for mode, allowed in ALLOWED_WITH.items():
        for name in given:
            if mode in given and name not in (mode, *allowed):
                raise BadInput(f"{flag(name)}: not allowed with {flag(mode)}")
    if "eval" in given:
        print_evaluation(given.pop("eval"), **given)
    elif "resume" in given:
        Run.resume(given["resume"], given.get("steps"))
    elif "list_methods" in given:
        for name, row in ({"--method": Method._fields} | METHODS).items():
            print(f"{name:16}" + "".join(f"{cell!s:13}" for cell in row))
    elif "version" in given:
        print(__version__, code_version())
    elif "per_context" in given:
        raise BadInput("--per-context: allowed only with --eval RUN")
    else:
        go_on = given.pop("go_on", False)
        if "quick" in given:
            given = QUICK | given
        cfg = Config(**given)
        if go_on and (run_folder(cfg) / "checkpoint.pt").is_file():
            Run.resume(run_folder(cfg), expected=cfg)
        else:
            Run.start(cfg)


def print_evaluation(path, per_context=False, device="cpu", **settings):
    """Prints the average episodic return (AER) of each set and, if asked, of every context."""
    cfg, agent = load_policy(path, device)
    cfg = replace(cfg, **settings)
    torch.set_num_threads(cfg.threads)
    print(f"{cfg.env}, {cfg.method}, seed {cfg.seed}, step {agent.step:,}, {agent.version!r}")
    say(f"{cfg.contexts} contexts x {cfg.rollouts} rollouts in each set …")
    results = evaluate_sets(agent, cfg, cfg.rollouts)
    if per_context:
        print(csv_text(results), end="")
    parts = [f"{name} {np.mean(of_set(results, name, 'return')):.1f}" for name in SETS]
    diverged = sum(result["diverged"] for result in results)
    if diverged:
        parts.append(f"{diverged} episodes diverged")
    print(f"average episodic return: {'  '.join(parts)}")


if __name__ == "__main__":
    sys.exit(main())
