"""DMA*-SH: dynamics-aligned shared hypernetworks for contextual reinforcement learning, in one file.

A hidden context (an arm's length, a flipped actuator) changes the dynamics. An encoder reads it from the last K
transitions; a hypernetwork turns what it read into the weights of one small adapter; the dynamics model, the policy
and both critics all carry that same adapter. Only the dynamics model's prediction error trains the two; to the RL
losses the adapter is a constant. Nothing is trained at evaluation, on contexts never seen before (zero-shot).

    window of K past transitions (s, a, δs)
        │  τ (B, L, 2 d_s + d_a)      L = ⌊0.2 K⌋ of them
        ▼
    encoder g_φ ───── z (B, 8) ─────▶ hypernetwork h_η ───── ω ─┬──▶ dynamics model f_{θ,ω}   trains φ, η, θ  (Eq. 1)
                                                                ├──▶ policy π_{ξ,ω}           trains ξ only   (Eq. 2)
                                                                └──▶ critics Q_{ζ,ω}          trains ζ only   (Eq. 2)

    python dmash.py --env cartpole_inv                              train, evaluate, save and plot one run
    python dmash.py --resume runs/cartpole_inv__dma_star_sh__s1     go on with a run that was stopped or killed
    python dmash.py --eval runs/cartpole_inv__dma_star_sh__s1       returns on the three context sets
    python dmash.py --benchmark                                     where the time of a gradient step goes

Paper: Benad, Banerjee, Röder, Ay, Butz, Eppe, "Dynamics-Aligned Shared Hypernetworks for Contextual RL under
Discontinuous Shifts", arXiv 2602.06550. Equations and algorithms are cited by its numbers.

Axes, in every shape below: B samples, N contexts, K transitions a window, L of them read, n networks side by side.
"""

import argparse
import contextlib
import copy
import csv
import io
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import aib_envs

# ---------------------------------------------------------------------------------------------------------------
# Context encoder g_φ: window τ -> context code z
# ---------------------------------------------------------------------------------------------------------------


def subsample(B, K, L, train, device=None):
    """Which L of K window positions the encoder reads, (B, L): a random subset in random order, drawn per sample,
    in training mode; evenly spaced, oldest first, at evaluation (with L = 1: the oldest)."""
    if train:
        return torch.rand(B, K, device=device).topk(L).indices
    return torch.linspace(0, K - 1, L, device=device).round().long().expand(B, L)


def mask_inputs(tau, d_s, d_a, p):
    """Random input masking: at each time step, each of the vectors s, a, δs becomes zero with probability p."""
    B, L, _ = tau.shape
    keep = (torch.rand(B, L, 3, device=tau.device) >= p).float()
    vector = torch.tensor([0] * d_s + [1] * d_a + [2] * d_s, device=tau.device)  # which of the three an entry is in
    return tau * keep.index_select(-1, vector)  # (B, L, 3) -> (B, L, 2 d_s + d_a)


def avg_l1_norm(x):
    """x / mean_i |x_i| over the last axis."""
    return x / x.abs().mean(-1, keepdim=True).clamp(min=1e-8)


def sim_norm(x, group):
    """Softmax within each group of `group` numbers of the last axis."""
    return x.unflatten(-1, (-1, group)).softmax(-1).flatten(-2)


class ContextEncoder(nn.Module):
    """g_φ: masking -> linear -> AvgL1Norm -> LSTM, its last hidden state -> linear -> SimNorm."""

    def __init__(self, d_s, d_a, d_z=8, hidden=32, group=4, mask=0.4):
        super().__init__()
        self.d_s, self.d_a, self.group, self.mask = d_s, d_a, group, mask
        self.embed = nn.Linear(2 * d_s + d_a, hidden, bias=False)
        self.lstm = nn.LSTM(hidden, hidden)
        self.project = nn.Linear(hidden, d_z, bias=False)

    def forward(self, tau, train):
        """tau (B, L, 2 d_s + d_a) -> z (B, d_z). Masks only if `train`."""
        if train:
            tau = mask_inputs(tau, self.d_s, self.d_a, self.mask)
        x = avg_l1_norm(self.embed(tau))  # (B, L, 32)
        _, (h, _) = self.lstm(x.transpose(0, 1))  # time first is faster; h (1, B, 32)
        return sim_norm(self.project(h[0]), self.group)


# ---------------------------------------------------------------------------------------------------------------
# Hypernetwork h_η: z -> ω, and the adapter made of ω
# ---------------------------------------------------------------------------------------------------------------


class Omega(NamedTuple):
    """ω, the adapter's weights, one adapter a sample. Row vectors multiply from the left."""

    W_down: torch.Tensor  # (B, 256, 32)
    b_down: torch.Tensor  # (B, 1, 32)
    W_up: torch.Tensor  # (B, 32, 256)
    b_up: torch.Tensor  # (B, 1, 256)

    def detach(self):
        return Omega(*(w.detach() for w in self))


class Hypernetwork(nn.Module):
    """h_η: z (B, d_z) -> Omega.

    One linear head a tensor: a single one would copy ω (16 MB) to split it. A head is one matrix whose last row is
    its bias, met by a constant 1 in h: adding biases to ω apart would pass over it once more each way.
    """

    def __init__(self, d_z=8, hidden=64, d_x=256, bottleneck=32):
        super().__init__()
        self.shapes = Omega((d_x, bottleneck), (1, bottleneck), (bottleneck, d_x), (1, d_x))
        self.trunk = nn.Sequential(nn.Linear(d_z, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        bound = hidden**-0.5  # PyTorch's default for weights and biases of nn.Linear
        self.heads = nn.ParameterList(
            torch.empty(hidden + 1, math.prod(shape)).uniform_(-bound, bound) for shape in self.shapes
        )

    def forward(self, z):
        h = F.pad(self.trunk(z), (0, 1), value=1.0)  # (B, 65)
        return Omega(*((h @ head).unflatten(-1, shape) for head, shape in zip(self.heads, self.shapes)))


def adapter(x, omega):
    """Eq. 3: g_adapter(x; ω) = W_up ReLU(W_down x + b_down) + b_up, x (B, n, 256), one ω for all n networks."""
    down = F.relu(torch.baddbmm(omega.b_down, x, omega.W_down))  # (B, n, 32)
    return torch.baddbmm(omega.b_up, down, omega.W_up)  # (B, n, 256)


# ---------------------------------------------------------------------------------------------------------------
# The three users of ω: dynamics model f_{θ,ω}, policy π_{ξ,ω}, critics Q_{ζ,ω}
# ---------------------------------------------------------------------------------------------------------------


class Linears(nn.Module):
    """n linear layers side by side, each with its own weights and PyTorch's default initialisation."""

    def __init__(self, n, d_in, d_out):
        super().__init__()
        bound = d_in**-0.5
        self.weight = nn.Parameter(torch.empty(n, d_in, d_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n, 1, d_out).uniform_(-bound, bound))

    def forward(self, x):
        """x (n, B, d_in) -> (n, B, d_out)."""
        return torch.baddbmm(self.bias, x, self.weight)


class AdaptedNetwork(nn.Module):
    """n networks side by side: trunk -> x, x̃ = x + g_adapter(x; ω) (Eq. 3), ReLU, head."""

    def __init__(self, d_in, d_out, d_x=256, n=1):
        super().__init__()
        self.n = n
        self.trunk = nn.Sequential(Linears(n, d_in, d_x), nn.ReLU(), Linears(n, d_x, d_x))
        self.head = Linears(n, d_x, d_out)

    def forward(self, inputs, omega):
        """inputs (B, d_in) -> (n, B, d_out)."""
        x = self.trunk(inputs.expand(self.n, -1, -1))  # (n, B, 256), no activation yet
        x = x.transpose(0, 1)  # (B, n, 256)
        x = F.relu(x + adapter(x, omega))
        return self.head(x.transpose(0, 1))


class DynamicsModel(AdaptedNetwork):
    """f_{θ,ω}: predicts δs = s' - s."""

    def __init__(self, d_s, d_a, d_x=256):
        super().__init__(d_s + d_a, d_s, d_x)

    def forward(self, s, a, omega):
        return super().forward(torch.cat([s, a], -1), omega).squeeze(0)  # (B, d_s)


class Actor(AdaptedNetwork):
    """π_{ξ,ω}: a Gaussian squashed by tanh; actions in [-1, 1]."""

    def __init__(self, d_s, d_a, d_x=256, log_std_min=-5.0, log_std_max=2.0):
        super().__init__(d_s, 2 * d_a, d_x)
        self.log_std_min, self.log_std_max = log_std_min, log_std_max

    def forward(self, s, omega):
        """Mean and log standard deviation before the tanh, (B, d_a) each."""
        mu, log_std = super().forward(s, omega).squeeze(0).chunk(2, -1)
        low, high = self.log_std_min, self.log_std_max
        return mu, low + (high - low) * (log_std.tanh() + 1) / 2

    def sample(self, s, omega):
        """An action (B, d_a) by the reparameterisation trick, and its log-probability (B,)."""
        mu, log_std = self(s, omega)
        noise = torch.randn_like(mu)
        u = mu + log_std.exp() * noise
        logp_u = -(noise**2) / 2 - log_std - math.log(2 * math.pi) / 2
        log_dtanh = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh²u), exact also where tanh saturates
        return u.tanh(), (logp_u - log_dtanh).sum(-1)

    def mean(self, s, omega):
        return self(s, omega)[0].tanh()


class Critics(AdaptedNetwork):
    """Q_{ζ,ω}: both critics at once."""

    def __init__(self, d_s, d_a, d_x=256):
        super().__init__(d_s + d_a, 1, d_x, n=2)

    def forward(self, s, a, omega):
        return super().forward(torch.cat([s, a], -1), omega).squeeze(-1).T  # (B, 2)


# ---------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------

METHOD = "dma_star_sh"

# Environment: (K, gradient steps).
PER_ENV = {
    "cartpole_inv": (128, 100_000),
    **dict.fromkeys(("cheetah_inv", "ball_in_cup", "walker"), (128, 200_000)),
    **dict.fromkeys(("reacher_easy_inv", "reacher_hard_inv", "reacher_hard_perm"), (128, 200_000)),
    **dict.fromkeys(("walker_gym", "hopper_gym"), (128, 500_000)),
}
PER_ENV |= {env: (24, 100_000) for env in aib_envs.ENVS if env not in PER_ENV}  # the toy environments


def option(default, help, allowed=None):
    """A setting with its help line and, for numbers, the interval of allowed values."""
    return field(default=default, metadata={"help": help, "allowed": allowed})


@dataclass
class Config:
    """Every setting; the defaults are the paper's. K and steps default to the environment's row of PER_ENV."""

    env: str = option("cartpole_inv", "environment; --list-envs shows all")
    seed: int = option(1, "seed of everything random", "[0, 4294967295]")
    steps: int = option(None, "gradient steps (default: by environment)", "[1, 1e9]")
    out: str = option("runs", "folder in which the run folder <env>__<method>__s<seed> is made")
    device: str = option("cpu", "torch device, such as cpu or cuda")
    threads: int = option(None, "torch CPU threads (default: torch's choice)", "[1, 1024]")
    eval_every: int = option(5000, "gradient steps between evaluations", "[1, 1e9]")
    eval_rollouts: int = option(1, "episodes per context at evaluations on the way", "[1, 1000]")
    rollouts: int = option(10, "episodes per context at the last evaluation and with --eval", "[1, 1000]")
    contexts: int = option(20, "contexts in each of the sets train, eval_in and eval_out", "[1, 1000]")
    # window and encoder
    K: int = option(None, "past transitions in a window (default: by environment)", "[1, 1e6]")
    subsample: float = option(0.2, "share of the window that the encoder reads", "(0, 1]")
    mask: float = option(0.4, "probability of masking each input vector of the encoder", "[0, 1]")
    encoder_hidden: int = option(32, "width of the encoder's LSTM", "[1, 10000]")
    d_z: int = option(8, "size of the context code z", "[1, 10000]")
    simnorm_group: int = option(4, "numbers in one softmax group of SimNorm", "[1, 10000]")
    # hypernetwork, adapter and the networks that carry it
    hyper_hidden: int = option(64, "width of the hypernetwork's two hidden layers", "[1, 10000]")
    bottleneck: int = option(32, "width of the adapter", "[1, 10000]")
    hidden: int = option(256, "width of the dynamics model, the policy and the critics", "[1, 10000]")
    # SAC
    gamma: float = option(0.99, "discount factor", "[0, 1]")
    tau: float = option(0.005, "rate of the target critics' moving average", "(0, 1]")
    batch: int = option(256, "transitions in a batch, rounded down to a multiple of --contexts", "[1, 1e6]")
    dynamics_lr: float = option(3e-4, "learning rate of encoder, hypernetwork and dynamics model", "(0, 1]")
    critic_lr: float = option(1e-3, "learning rate of the critics", "(0, 1]")
    actor_lr: float = option(3e-4, "learning rate of the policy", "(0, 1]")
    alpha_lr: float = option(1e-3, "learning rate of the temperature", "(0, 1]")
    actor_every: int = option(2, "every so many steps the policy is updated, so many times", "[1, 1000]")
    log_std_min: float = option(-5.0, "lower end of the policy's log standard deviation", "(-inf, inf)")
    log_std_max: float = option(2.0, "upper end of it", "(-inf, inf)")
    buffer: int = option(100_000, "replay capacity per context, in transitions", "[1, 1e9]")
    random_steps: int = option(5000, "steps of uniformly random actions before the first gradient step", "[0, 1e9]")

    def __post_init__(self):
        """Fills in the environment's defaults and checks every value; BadInput names the first bad one."""
        try:
            spec = aib_envs.lookup(str(self.env))
        except ValueError as error:
            raise BadInput(str(error)) from None
        K, steps = PER_ENV[self.env]
        self.K = K if self.K is None else self.K
        self.steps = steps if self.steps is None else self.steps
        self.threads = torch.get_num_threads() if self.threads is None else self.threads
        for f in fields(self):
            value, allowed = getattr(self, f.name), f.metadata["allowed"]
            if not (isinstance(value, f.type) or (f.type is float and isinstance(value, int))):
                raise BadInput(f"{flag(f.name)} {value!r}: must be of type {f.type.__name__}")
            if allowed and not inside(value, allowed):
                raise BadInput(f"{flag(f.name)} {value}: must be in {allowed}")
        for ok, message in (
            (self.K <= spec.horizon, f"--K {self.K}: must be at most the horizon, {spec.horizon} for {self.env}"),
            (self.buffer > self.K, f"--buffer {self.buffer}: must be more than --K, here {self.K}"),
            (self.batch >= self.contexts, f"--batch {self.batch}: must be at least --contexts, here {self.contexts}"),
            (
                self.d_z % self.simnorm_group == 0,
                f"--d-z {self.d_z}: must be a multiple of --simnorm-group, here {self.simnorm_group}",
            ),
            (
                self.log_std_min < self.log_std_max,
                f"--log-std-min {self.log_std_min}: must be below --log-std-max, here {self.log_std_max}",
            ),
        ):
            if not ok:
                raise BadInput(message)
        try:
            kind = torch.empty(0, device=self.device).device.type
        except (RuntimeError, AssertionError):
            kind = None
        if kind not in ("cpu", "cuda"):
            raise BadInput(f"--device {self.device}: not usable here; allowed: {', '.join(devices())}")
        self.device = "cpu" if kind == "cpu" else self.device  # cpu:0 is the cpu

    @property
    def L(self):
        return max(1, int(self.subsample * self.K))

    @property
    def folder(self):
        return Path(self.out) / f"{self.env}__{METHOD}__s{self.seed}"


class BadInput(ValueError):
    """Something wrong from outside, a value or a file; its message is the one line that the user sees."""


def inside(value, allowed):
    """Whether a number lies in an interval such as "(0, 1]"."""
    low, high = (float(end) for end in allowed[1:-1].split(","))
    return low < value < high or (allowed[0] == "[" and value == low) or (allowed[-1] == "]" and value == high)


def flag(name):
    return "--" + name.replace("_", "-")


def devices():
    return ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]


# ---------------------------------------------------------------------------------------------------------------
# Replay: one stream of transitions a context, in time order
# ---------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """`size // N` transitions of each of the N contexts, with the window before each."""

    s: torch.Tensor  # (B, d_s)
    a: torch.Tensor  # (B, d_a)
    ds: torch.Tensor  # (B, d_s), δs = s' - s
    r: torch.Tensor  # (B,)
    tau: torch.Tensor  # (B, L, 2 d_s + d_a)

    @property
    def s2(self):
        return self.s + self.ds


class Replay:
    """Transitions of N contexts that step together. Row t of a context's ring holds its t-th [s, a, δs, r].

    The window of transition t is rows t-K ... t-1 of the same context: past transitions only, whatever episode they
    come from (the context outlives the episode). Rows not yet written are zeros, as if masked. No terminal flag is
    kept: there are no terminal states, and a time limit does not end the return.
    """

    def __init__(self, N, capacity, d_s, d_a, K, L, device=None):
        self.N, self.capacity, self.d_s, self.d_a, self.K, self.L = N, capacity, d_s, d_a, K, L
        self.rows = torch.zeros(N, capacity, 2 * d_s + d_a + 1, device=device)
        self.t = 0  # transitions written so far, per context

    def add(self, s, a, r, s2):
        """One transition of every context: s, s2 (N, d_s), a (N, d_a), r (N,)."""
        self.rows[:, self.t % self.capacity] = torch.cat([s, a, s2 - s, r.unsqueeze(-1)], -1)
        self.t += 1

    def state_dict(self):
        """The filled part of the rings and the count."""
        return {"rows": self.rows[:, : min(self.t, self.capacity)].clone(), "t": self.t}

    def load_state_dict(self, state):
        self.t = state["t"]
        self.rows[:, : min(self.t, self.capacity)] = state["rows"]

    def windows(self, n, t, train):
        """The windows before transitions t (B,) of contexts n (B,), subsampled: (B, L, 2 d_s + d_a)."""
        i = subsample(len(t), self.K, self.L, train, self.rows.device)  # (B, L)
        past = (t.unsqueeze(-1) - self.K + i) % self.capacity
        return self.rows[n.unsqueeze(-1), past, :-1]

    def latest(self, train):
        """The windows that end with the last transition of each context: (N, L, 2 d_s + d_a)."""
        n = torch.arange(self.N, device=self.rows.device)
        return self.windows(n, torch.full_like(n, self.t), train)

    def sample(self, size):
        """A Batch of `size // N` transitions of each context, uniform over those whose whole window is stored."""
        n = torch.arange(self.N, device=self.rows.device).repeat_interleave(size // self.N)
        oldest = max(0, self.t - self.capacity) + self.K
        t = torch.randint(oldest, self.t, n.shape, device=self.rows.device)
        s, a, ds, r = self.rows[n, t % self.capacity].split([self.d_s, self.d_a, self.d_s, 1], -1)
        return Batch(s, a, ds, r.squeeze(-1), self.windows(n, t, train=True))


# ---------------------------------------------------------------------------------------------------------------
# Losses. Each returns a scalar and, where something else needs it, one more value.
# ---------------------------------------------------------------------------------------------------------------


def dynamics_loss(f, omega, batch):
    """Eq. 1: ‖δŝ - δs‖², mean over samples and dimensions. The only loss that reaches φ and η, through ω."""
    s, a, ds = batch.s, batch.a, batch.ds
    return F.mse_loss(f(s, a, omega), ds)


def critic_loss(pi, Q, Q_target, alpha, omega, batch, gamma):
    """SAC's Bellman error, summed over the two critics; the target carries the same ω, of the window before s."""
    s, a, r, s2 = batch.s, batch.a, batch.r, batch.s2
    omega = omega.detach()  # Eq. 2
    with torch.no_grad():
        a2, logp_a2 = pi.sample(s2, omega)
        v2 = Q_target(s2, a2, omega).amin(1) - alpha * logp_a2  # (B,)
        backup = r + gamma * v2  # always bootstraps: a time limit is no terminal state
    q = Q(s, a, omega)  # (B, 2)
    assert backup.shape == q.shape[:1], (backup.shape, q.shape)
    return (q - backup.unsqueeze(-1)).square().mean(0).sum()


def actor_loss(pi, Q, alpha, omega, batch):
    """SAC's policy loss, and the log-probabilities (B,) of the actions it drew."""
    s = batch.s
    omega = omega.detach()  # Eq. 2
    a, logp = pi.sample(s, omega)
    q = Q(s, a, omega).amin(1)  # (B,)
    return (alpha * logp - q).mean(), logp.detach()


def temperature_loss(log_alpha, logp, target_entropy):
    """Raises α while the policy's entropy is below its target."""
    return -(log_alpha.exp() * (logp + target_entropy)).mean()


# ---------------------------------------------------------------------------------------------------------------
# The agent and its update (Algorithm 2)
# ---------------------------------------------------------------------------------------------------------------


def minimise(optimizer, loss):
    """One step of `optimizer`. Gradients are computed for its own parameters and no others, which saves the critics'
    in the policy's step. An RL loss would reach η only without its detach and with η in its optimizer."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


class Agent:
    """The networks, their optimizers, and one method a line of Algorithm 2."""

    def __init__(self, cfg, d_s, d_a):
        self.cfg, self.target_entropy = cfg, -float(d_a)
        to = cfg.device
        self.g = ContextEncoder(d_s, d_a, cfg.d_z, cfg.encoder_hidden, cfg.simnorm_group, cfg.mask).to(to)  # φ
        self.h = Hypernetwork(cfg.d_z, cfg.hyper_hidden, cfg.hidden, cfg.bottleneck).to(to)  # η
        self.f = DynamicsModel(d_s, d_a, cfg.hidden).to(to)  # θ
        self.pi = Actor(d_s, d_a, cfg.hidden, cfg.log_std_min, cfg.log_std_max).to(to)  # ξ
        self.Q = Critics(d_s, d_a, cfg.hidden).to(to)  # ζ
        self.Q_target = copy.deepcopy(self.Q).requires_grad_(False)
        self.log_alpha = torch.zeros((), device=to, requires_grad=True)

        def adam(lr, *parameters):
            return torch.optim.Adam(parameters, lr=lr, fused=True)

        self.dynamics_opt = adam(cfg.dynamics_lr, *self.g.parameters(), *self.h.parameters(), *self.f.parameters())
        self.critic_opt = adam(cfg.critic_lr, *self.Q.parameters())
        self.actor_opt = adam(cfg.actor_lr, *self.pi.parameters())
        self.alpha_opt = adam(cfg.alpha_lr, self.log_alpha)

    @property
    def alpha(self):
        return self.log_alpha.detach().exp()

    @torch.no_grad()
    def act(self, s, tau, train):
        """Actions (N, d_a) for s (N, d_s) and windows tau: sampled, with masking, if `train`; else the mean action."""
        omega = self.h(self.g(tau, train))
        return self.pi.sample(s, omega)[0] if train else self.pi.mean(s, omega)

    def update(self, batch, step):
        """One gradient step: Eq. 1 on φ, η, θ, then SAC on ζ and ξ with the same ω, a constant there.

        That ω, from before the dynamics step and with one draw of masks, serves critics and policy. Returns the losses
        and α as 0-d tensors; no actor_loss on the steps that leave the policy alone.
        """
        losses = {}
        losses["dynamics_loss"], omega = self.dynamics_step(batch)
        losses["critic_loss"] = self.critic_step(batch, omega)
        if step % self.cfg.actor_every == 0:
            losses["actor_loss"] = self.actor_step(batch, omega)
        self.target_step()
        return losses | {"alpha": self.alpha}

    def dynamics_step(self, batch):
        """(φ, η, θ) <- (φ, η, θ) - α₃ ∇L. Returns the loss and the ω it used, detached."""
        omega = self.h(self.g(batch.tau, train=True))
        loss = dynamics_loss(self.f, omega, batch)
        minimise(self.dynamics_opt, loss)
        return loss.detach(), omega.detach()

    def critic_step(self, batch, omega):
        """ζ <- ζ - α₂ ∇L."""
        loss = critic_loss(self.pi, self.Q, self.Q_target, self.alpha, omega, batch, self.cfg.gamma)
        minimise(self.critic_opt, loss)
        return loss.detach()

    def actor_step(self, batch, omega):
        """ξ <- ξ - α₁ ∇L and the temperature, `actor_every` times: on average once a gradient step."""
        for _ in range(self.cfg.actor_every):
            loss, logp = actor_loss(self.pi, self.Q, self.alpha, omega, batch)
            minimise(self.actor_opt, loss)
            minimise(self.alpha_opt, temperature_loss(self.log_alpha, logp, self.target_entropy))
        return loss.detach()

    @torch.no_grad()
    def target_step(self):
        """Moves the target critics by τ towards the critics."""
        torch._foreach_lerp_(list(self.Q_target.parameters()), list(self.Q.parameters()), self.cfg.tau)

    NETWORKS = ("g", "h", "f", "pi", "Q", "Q_target")
    OPTIMIZERS = ("dynamics_opt", "critic_opt", "actor_opt", "alpha_opt")

    def state_dict(self):
        """The networks and the temperature: what acting and evaluating need."""
        state = {name: getattr(self, name).state_dict() for name in self.NETWORKS}
        return state | {"log_alpha": self.log_alpha.detach()}

    def load_state_dict(self, state):
        for name in self.NETWORKS:
            getattr(self, name).load_state_dict(state[name])
        with torch.no_grad():
            self.log_alpha.copy_(state["log_alpha"])


# ---------------------------------------------------------------------------------------------------------------
# Acting, and zero-shot evaluation
# ---------------------------------------------------------------------------------------------------------------


class Rollout:
    """Acts in all contexts at once and writes the replay, whose last K transitions are the window to act on.

    train=True collects: the encoder masks and subsamples at random, actions are sampled. train=False evaluates.
    """

    def __init__(self, agent, envs, replay, train):
        self.agent, self.envs, self.replay, self.train = agent, envs, replay, train
        self.done = True

    def collect(self, random=False):
        """One step of an endless sequence of episodes."""
        if self.done:
            self.begin_episode(random)
        self.step(random)

    def begin_episode(self, random=False, stop=()):
        """Warm-up: K steps fill the window with the current policy's transitions; then a reset. The window stays."""
        self.reset()
        for _ in range(self.replay.K):
            if stop:
                return
            self.step(random)
        self.reset()
        self.done = False

    def reset(self):
        s = self.envs.reset()
        require_finite({"observation": s})
        self.s = self.tensor(s)

    def step(self, random=False):
        """One step in every context; random: uniform actions. Sets `done` at the horizon. Returns rewards (N,)."""
        if random:
            a = 2 * torch.rand(len(self.s), self.envs.d_a, device=self.s.device) - 1
        else:
            a = self.agent.act(self.s, self.replay.latest(self.train), self.train)
            require_finite({"action": a})
        s2, r, self.done = self.envs.step(a.cpu().numpy())
        require_finite({"observation": s2, "reward": r})
        s2 = self.tensor(s2)
        self.replay.add(self.s, a, self.tensor(r), s2)
        self.s = s2
        return r

    def tensor(self, array):
        return torch.from_numpy(array).to(self.replay.rows.device)

    def state_dict(self):
        s = None if self.done else self.s
        return {"replay": self.replay.state_dict(), "envs": self.envs.state_dict(), "done": self.done, "s": s}

    def load_state_dict(self, state):
        self.replay.load_state_dict(state["replay"])
        self.envs.load_state_dict(state["envs"])
        self.done, self.s = state["done"], state["s"]


def require_finite(values):
    """FloatingPointError names the first of the tensors or arrays that holds a nan or an infinity."""
    for name, value in values.items():
        if not torch.isfinite(torch.as_tensor(value)).all():
            raise FloatingPointError(f"{name} is not finite")


SETS = ("train", "eval_in", "eval_out")


def new_rollout(cfg, agent, envs, capacity, train):
    replay = Replay(envs.N, capacity, envs.d_s, envs.d_a, cfg.K, cfg.L, cfg.device)
    return Rollout(agent, envs, replay, train)


def evaluate(agent, cfg, rollouts, stop=()):
    """Zero-shot returns on the three context sets, mean over `rollouts` episodes each: (3, contexts), in SETS' order.
    None if `stop` came to hold something in the meantime.

    Draws nothing from torch's generator, and the same initial states every time: evaluating changes no training run.
    """
    sets = aib_envs.context_sets(cfg.env, cfg.contexts)
    contexts = [context for name in SETS for context in sets[name] for _ in range(rollouts)]
    envs = aib_envs.VectorEnv(cfg.env, contexts, seed=[cfg.seed, 1])
    rollout = new_rollout(cfg, agent, envs, capacity=cfg.K, train=False)
    rollout.begin_episode(stop=stop)
    returns = np.zeros(len(contexts))
    while not (stop or rollout.done):
        returns += rollout.step()
    return None if stop else returns.reshape(len(SETS), cfg.contexts, rollouts).mean(-1)


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------


def set_up(cfg):
    """Threads and seed, and the agent."""
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    task = aib_envs.lookup(cfg.env).cls
    return Agent(cfg, task.d_s, task.d_a)


def start(cfg):
    """The agent, and the rollout that collects."""
    agent = set_up(cfg)
    envs = aib_envs.VectorEnv(cfg.env, aib_envs.context_sets(cfg.env, cfg.contexts)["train"], seed=[cfg.seed, 0])
    return agent, new_rollout(cfg, agent, envs, cfg.buffer, train=True)


LOSSES = ("dynamics_loss", "critic_loss", "actor_loss", "alpha")


class Run:
    """A run and everything that it must remember to go on as if it had never stopped."""

    def __init__(self, cfg, folder):
        self.cfg, self.folder, self.lock = cfg, folder, None
        self.agent, self.rollout = start(cfg)
        self.step, self.evaluated = 0, 0  # gradient steps done; and done at the last evaluation
        self.losses = {name: [] for name in LOSSES}  # since then
        self.seconds, self.step_seconds = 0.0, 0.0  # in all; and since then, evaluation left out

    @property
    def evaluation_due(self):
        return self.step > self.evaluated and (self.step % self.cfg.eval_every == 0 or self.step == self.cfg.steps)

    def gradient_step(self):
        """One step of all contexts and one update of the networks."""
        begin = time.perf_counter()
        self.step += 1
        self.rollout.collect()
        losses = self.agent.update(self.rollout.replay.sample(self.cfg.batch), self.step)
        require_finite(losses)
        for name, value in losses.items():
            self.losses[name].append(value)
        self.step_seconds += time.perf_counter() - begin

    def record(self, returns):
        """Writes the rows of an evaluation, returns (3, contexts), and a checkpoint. Returns the row of metrics.csv."""
        self.require_finite_weights()
        row = {"step": self.step, "env_steps": self.rollout.replay.t * self.rollout.replay.N, "seconds": self.seconds}
        row["steps_per_second"] = len(self.losses["dynamics_loss"]) / self.step_seconds
        row |= {name: torch.stack(v).mean().item() if v else math.nan for name, v in self.losses.items()}
        row |= {name: set_returns.mean() for name, set_returns in zip(SETS, returns)}
        self.evaluated, self.losses, self.step_seconds = self.step, {name: [] for name in LOSSES}, 0.0
        append(self.folder / "metrics.csv", [row])
        append(self.folder / "per_context.csv", per_context_rows(self.cfg, self.step, returns))
        self.save()
        return row

    def require_finite_weights(self):
        for network in self.agent.NETWORKS:
            state = getattr(self.agent, network).state_dict()
            require_finite({f"weight {network}.{name}": value for name, value in state.items()})

    def state_dict(self):
        """Tensors, numbers, strings, lists and dicts, so that loading it can run no code."""
        generators = [torch.get_rng_state()]
        if self.cfg.device != "cpu":
            generators.append(torch.cuda.get_rng_state(self.cfg.device))
        return {
            "config": asdict(self.cfg),
            **{name: getattr(self, name) for name in self.COUNTERS},
            "losses": {name: torch.tensor(values) for name, values in self.losses.items()},
            "agent": self.agent.state_dict(),
            "optimizers": {name: getattr(self.agent, name).state_dict() for name in self.agent.OPTIMIZERS},
            "rollout": self.rollout.state_dict(),
            "generators": generators,
        }

    COUNTERS = ("step", "evaluated", "seconds", "step_seconds")

    def load_state_dict(self, state):
        for name in self.COUNTERS:
            setattr(self, name, state[name])
        self.losses = {name: list(values.unbind()) for name, values in state["losses"].items()}
        self.agent.load_state_dict(state["agent"])
        for name in self.agent.OPTIMIZERS:
            getattr(self.agent, name).load_state_dict(state["optimizers"][name])
        self.rollout.load_state_dict(state["rollout"])
        torch.set_rng_state(state["generators"][0].cpu())
        if self.cfg.device != "cpu":
            torch.cuda.set_rng_state(state["generators"][1].cpu(), self.cfg.device)

    def save(self):
        """policy.pt and checkpoint.pt; the checkpoint before it is kept. Neither if a weight is not finite."""
        self.require_finite_weights()
        write_file(self.agent.state_dict() | {"step": self.step}, self.folder / "policy.pt")
        write_file(self.state_dict(), self.folder / "checkpoint.pt", keep=self.folder / "checkpoint.previous.pt")


def train(run):
    """Trains from the start, or from where `run` was restored, to the evaluation after `cfg.steps`, or until SIGINT or
    SIGTERM; saves in either case. BadInput if a file cannot be written, FloatingPointError if a number is not finite:
    what was written before stays as it is."""
    with run.lock, catch_signals() as stop:
        try:
            learn(run, stop)
        except OSError as error:
            raise BadInput(
                f"step {run.step:,}: cannot write {error.filename or 'output'} ({error.strerror}); the run stops, "
                f"its earlier files are intact; to go on: python dmash.py --resume {run.folder}"
            ) from None
        except FloatingPointError as error:
            raise FloatingPointError(
                f"step {run.step:,}: {error}; the run stops, the last checkpoint in {run.folder} is untouched"
            ) from None


def learn(run, stop):
    """Random steps, then gradient steps and evaluations, until all are done or `stop` holds something."""
    cfg, began = run.cfg, time.perf_counter() - run.seconds
    for _ in range(cfg.random_steps if run.step == 0 else 0):
        run.rollout.collect(random=True)
        if stop:
            break
    with progress_bar(run.step, cfg.steps) as bar:
        while not stop and run.evaluated < cfg.steps:
            if not run.evaluation_due:
                run.gradient_step()
                bar.update()
                continue
            returns = evaluate(run.agent, cfg, cfg.rollouts if run.step == cfg.steps else cfg.eval_rollouts, stop)
            run.seconds = time.perf_counter() - began
            if returns is not None:
                row = run.record(returns)
                bar.write(summary(row, cfg.steps))
                sys.stdout.flush()
    run.seconds = time.perf_counter() - began
    if run.evaluated == cfg.steps:
        drawn = plot(run.folder)
        print(f"{run.folder}: metrics.csv, per_context.csv, policy.pt, checkpoint.pt{', curve.png' * drawn}")
        return
    if run.step > run.evaluated:  # else it is saved; the random steps alone are made again rather than kept
        run.save()
    print(f"stopped at step {run.step:,}; to go on: python dmash.py --resume {run.folder}")


@contextlib.contextmanager
def catch_signals():
    """A list that SIGINT and SIGTERM put something into while the block runs. The second of a kind leaves at once."""
    caught, before = [], {}

    def handler(number, frame):
        caught.append(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def summary(row, steps):
    """The line printed at an evaluation."""
    minutes = (steps - row["step"]) / row["steps_per_second"] / 60
    sets = "  ".join(f"{name} {row[name]:.1f}" for name in SETS)
    return (
        f"step {row['step']:,}  return: {sets}  dynamics loss {row['dynamics_loss']:.2e}  alpha {row['alpha']:.3f}"
        f"  {row['steps_per_second']:.1f} steps/s  {minutes:.0f} min left"
    )


def progress_bar(initial, total):
    """tqdm's bar with rate and time left, where there is a terminal and tqdm; else one that shows nothing."""
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            return tqdm(initial=initial, total=total, unit="step", smoothing=0.05)
    return NoBar()


class NoBar(contextlib.nullcontext):
    """Stands for the progress bar where there is none."""

    def __enter__(self):
        return self

    def update(self):
        pass

    write = staticmethod(print)


# ---------------------------------------------------------------------------------------------------------------
# The run folder
# ---------------------------------------------------------------------------------------------------------------

RESULTS = ("metrics.csv", "per_context.csv", "policy.pt", "checkpoint.pt", "checkpoint.previous.pt")


def new_run(cfg):
    """A Run in a new folder. BadInput if the folder holds a run already or cannot be written."""
    run, folder = Run(cfg, cfg.folder), cfg.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        run.lock = lock(folder)
        if (folder / "config.json").exists():
            there = differences(read_config(folder, "--out"), asdict(cfg))
            raise BadInput(
                f"{folder} already holds {f'a run with other settings ({there})' if there else 'this run'}; "
                f"choose another --seed or --out, or go on with --resume {folder} (where --steps may be raised)"
            )
        if left := [name for name in RESULTS if (folder / name).exists()]:
            raise BadInput(f"{folder} already holds {', '.join(left)}; choose another --seed or --out")
        replace_file(folder / "config.json", config_text(cfg))
    except OSError as error:
        raise BadInput(f"--out {cfg.out}: cannot write {folder} ({error.strerror})") from None
    print(f"{folder}: {cfg.random_steps:,} random steps, then {cfg.steps:,} gradient steps", flush=True)
    return run


def resume_run(folder, steps=None):
    """The Run in `folder` as its last checkpoint left it, with more `steps` if given; rows that were written after
    that checkpoint are dropped, to be written again. BadInput names what cannot be read."""
    folder = Path(folder)
    cfg = Config(**read_config(folder, "--resume"))
    if steps is not None and steps < cfg.steps:
        raise BadInput(f"--steps {steps}: may only be raised on --resume, here from {cfg.steps}")
    cfg = replace(cfg, steps=steps or cfg.steps)
    run = Run(cfg, folder)
    run.lock = lock(folder)
    checkpoint, previous = folder / "checkpoint.pt", folder / "checkpoint.previous.pt"
    if previous.exists() and not checkpoint.exists():  # killed between the two moves of replace_file
        checkpoint = previous
    if checkpoint.exists():
        spare = checkpoint != previous and previous.exists()
        hint = f"; if you move it away, --resume goes on from {previous.name}" if spare else ""
        with reading(checkpoint, "--resume", hint):
            state = load(checkpoint, cfg.device)
            there = differences(state["config"], asdict(cfg), but=("steps", "out"))
            if not there:
                run.load_state_dict(state)
        if there:
            raise BadInput(f"--resume {folder}: {checkpoint.name} is of a run with other settings ({there})")
    kept = {}
    for path in (folder / "metrics.csv", folder / "per_context.csv"):
        if path.exists():
            with reading(path, "--resume"):
                header, *lines = path.read_text().splitlines(keepends=True)
                at = [int(line.split(",")[0]) for line in lines]  # each row's step
            if not checkpoint.exists() and max(at, default=0) > cfg.eval_every:
                raise BadInput(f"--resume {folder}: no checkpoint.pt, but {path.name} goes to step {max(at)}")
            whole_lines = [(line, step) for line, step in zip(lines, at) if line.endswith("\n")]
            kept[path] = header + "".join(line for line, step in whole_lines if step <= run.evaluated)
    for path, text in kept.items():
        replace_file(path, text.encode())
    if steps:
        replace_file(folder / "config.json", config_text(cfg))
    print(f"{folder}: going on from step {run.step:,} of {cfg.steps:,}", flush=True)
    return run


def differences(there, here, but=("out",)):
    """Which settings differ, in words; "" if none do."""
    names = [name for name in here if name not in but and there.get(name) != here[name]]
    return ", ".join(f"{flag(name)} {there.get(name)} there and {here[name]} here" for name in names)


def lock(folder):
    """An open file that holds the folder for this process until it is closed, or the process ends, however it ends.
    BadInput if another process holds it."""
    file = open(folder / "lock", "w")
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # what a lock held elsewhere raises, here and on Windows
        raise BadInput(f"{folder} is in use by another process") from None
    return file


def config_text(cfg):
    return (json.dumps({"method": METHOD} | asdict(cfg), indent=2) + "\n").encode()


def replace_file(path, data, keep=None):
    """Writes bytes beside `path`, has them reach the disk, moves what was at `path` to `keep` and them to `path`.
    OSError names `path`."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_file(state, path, keep=None):
    """torch.save by `replace_file`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    replace_file(path, buffer.getbuffer(), keep)


def load(path, device):
    """What write_file wrote, read without running any code in it."""
    with zipfile.ZipFile(path) as archive:  # torch.load does not look at the check sums that torch.save wrote
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} is damaged")
    return torch.load(path, map_location=device, weights_only=True)


@contextlib.contextmanager
def reading(path, option, hint=""):
    """Whatever a damaged or foreign file makes its reader raise becomes a BadInput that names the file."""
    try:
        yield
    except Exception as error:
        raise BadInput(f"{option} {path.parent}: {path.name} cannot be read ({one_line(error)}){hint}") from None


def one_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def read_config(folder, option):
    """The settings of a run folder. BadInput if there are none, or not such ones."""
    path = folder / "config.json"
    if not path.is_file():
        raise BadInput(f"{option} {folder}: no run folder (it has no {path.name})")
    with reading(path, option):
        settings = json.loads(path.read_text())
        if settings.pop("method") != METHOD or set(settings) != {f.name for f in fields(Config)}:
            raise ValueError("its settings are not those of this program")
        return settings


def per_context_rows(cfg, step, returns):
    """One dict a context, from returns (3, contexts)."""
    sets = aib_envs.context_sets(cfg.env, cfg.contexts)
    return [
        {"step": step, "set": name, "index": i, **context, "return": set_returns[i]}
        for name, set_returns in zip(SETS, returns)
        for i, context in enumerate(sets[name])
    ]


def append(path, rows):
    """Appends dicts to a CSV file, with a header if it is new; floats to 6 digits. All of them, or OSError."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    if not path.exists():
        writer.writerow(rows[0])
    writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row.values()] for row in rows)
    replace_file(path, (path.read_bytes() if path.exists() else b"") + text.getvalue().encode())


def load_run(folder, **changes):
    """The Config and the trained Agent of a run folder, some settings changed. BadInput names what cannot be read."""
    folder = Path(folder)
    cfg = Config(**(read_config(folder, "--eval") | changes))
    path = folder / "policy.pt"
    if not path.is_file():
        raise BadInput(f"--eval {folder}: no {path.name}; it is written with each checkpoint")
    agent = set_up(cfg)
    with reading(path, "--eval"):
        agent.load_state_dict(load(path, cfg.device))
    return cfg, agent


def read_csv(path):
    """The rows of a CSV file as dicts, numbers as floats."""

    def number(text):
        try:
            return float(text)
        except ValueError:
            return text

    with open(path, newline="") as file:
        return [{name: number(value) for name, value in row.items()} for row in csv.DictReader(file)]


def plot(folder):
    """Draws curve.png: returns over steps by set and by binary context, and the last returns against each context
    value (triangles: inverted or swapped). Returns whether it could: False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    metrics, contexts = read_csv(folder / "metrics.csv"), read_csv(folder / "per_context.csv")
    spec = aib_envs.lookup(json.loads((folder / "config.json").read_text())["env"])
    binary = [dim for dim in spec.context if dim.binary]
    colours = dict(zip(SETS, ("tab:blue", "tab:green", "tab:red")))
    panels = 1 + len(binary) + len(spec.context)
    figure = Figure(figsize=(3.6 * panels, 3.2), layout="constrained")
    axes = iter(np.atleast_1d(figure.subplots(1, panels, sharey=True)))
    steps = [row["step"] for row in metrics]

    ax = next(axes)
    for name in SETS:
        ax.plot(steps, [row[name] for row in metrics], ".-", color=colours[name], label=name)
    ax.set(xlabel="gradient steps", ylabel="average episodic return", title=folder.resolve().name)
    for dim in binary:
        ax = next(axes)
        for value, name in itertools.product(dim.train, SETS):
            rows = [c for c in contexts if c["set"] == name and c[dim.name] == value]
            returns = [[c["return"] for c in rows if c["step"] == step] for step in steps]
            line = ".-" if value == dim.default else ".--"
            label = f"{dim.name} = {value:g}" if name == "train" else None
            ax.plot(steps, [np.mean(r) if r else np.nan for r in returns], line, color=colours[name], label=label)
        ax.set(xlabel="gradient steps", title=f"by {dim.name}")
    for dim in spec.context:
        ax = next(axes)
        for c in contexts:
            if c["step"] == steps[-1]:
                changed = any(c[other.name] != other.default for other in binary)
                ax.plot(c[dim.name], c["return"], "v" if changed else "o", color=colours[c["set"]], alpha=0.7)
        if not dim.binary:
            ax.axvspan(*dim.train, color="0.92", zorder=0)  # the train range
        ax.set(xlabel=dim.name, title="last evaluation")
    for ax in figure.axes[: 1 + len(binary)]:
        ax.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    replace_file(folder / "curve.png", picture.getbuffer())
    return True


# ---------------------------------------------------------------------------------------------------------------
# Benchmark
# ---------------------------------------------------------------------------------------------------------------


def benchmark(cfg):
    """Times the phases of a gradient step over one episode with its warm-up, evaluation left out; prints a table."""
    agent, rollout = start(cfg)
    for _ in range(cfg.K):
        rollout.collect(random=True)  # so that batches can be drawn
    phases = dict.fromkeys(("acting", "environments", "batch", "dynamics", "critic", "actor", "targets"), 0.0)

    def timed(phase, function):
        def call(*args, **kwargs):
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            if cfg.device != "cpu":
                torch.cuda.synchronize(cfg.device)
            phases[phase] += time.perf_counter() - begin
            return result

        return call

    agent.act = timed("acting", agent.act)
    rollout.replay.latest = timed("acting", rollout.replay.latest)
    rollout.envs.step = timed("environments", rollout.envs.step)
    rollout.replay.sample = timed("batch", rollout.replay.sample)
    for phase, name in (
        ("dynamics", "dynamics_step"),
        ("critic", "critic_step"),
        ("actor", "actor_step"),
        ("targets", "target_step"),
    ):
        setattr(agent, name, timed(phase, getattr(agent, name)))

    def run(steps):
        for step in range(1, steps + 1):
            rollout.collect()
            agent.update(rollout.replay.sample(cfg.batch), step)

    run(20)  # the first steps allocate
    steps = aib_envs.lookup(cfg.env).horizon
    phases.update(dict.fromkeys(phases, 0.0))
    begin = time.perf_counter()
    run(steps)
    seconds = time.perf_counter() - begin
    spent = phases | {"rest": seconds - sum(phases.values())}  # a copy: counting operations below runs updates
    update = sum(spent[phase] for phase in ("dynamics", "critic", "actor", "targets")) / steps
    flop, rate = update_flop(agent, rollout), matmul_rate(cfg.device)
    print(f"{cfg.env}: K = {cfg.K}, {cfg.contexts} contexts, {cfg.threads} threads on {cfg.device}, {steps} steps")
    print(f"gradient steps/s   {steps / seconds:8.1f}")
    for phase, phase_seconds in spent.items():
        print(f"  {phase:<14} {phase_seconds / steps * 1e3:9.2f} ms")
    vector, bare = vector_step_times(cfg.env, cfg.contexts)
    against = f", {vector / bare:.2f} times the bare mj_step calls in it" if bare else ""
    print(f"vector step        {vector:8.3f} ms for {cfg.contexts} contexts{against}")
    print(f"peak memory        {peak_memory():8.0f} MB")
    print(f"update             {update * 1e3:8.2f} ms for {flop / 1e9:.2f} GFLOP")
    print(f"matrix multiply    {rate / 1e9:8.0f} GFLOP/s: the same operations in {flop / rate * 1e3:.2f} ms")
    print(f"ratio              {update * rate / flop:8.1f}")


def vector_step_times(env, contexts, steps=300):
    """Milliseconds of one step of all contexts, and of the mj_step calls alone that it must make (None without
    MuJoCo). Both from the same starts and with the same actions, taking turns; the medians."""
    envs = aib_envs.VectorEnv(env, aib_envs.context_sets(env, contexts)["train"], seed=0)
    envs.reset()
    twin = aib_envs.lookup(env).cls(envs.task.contexts)
    twin.set_state(envs.task.state())
    has_models, times = isinstance(twin, aib_envs.MujocoTask), ([], [])
    for actions in np.random.default_rng(0).uniform(-1, 1, (steps, contexts, envs.d_a)):
        begin = time.perf_counter()
        envs.step(actions)
        middle = time.perf_counter()
        if has_models:
            for (model, data), action in zip(twin.pairs, actions):
                data.ctrl = action
                mujoco.mj_step(model, data, twin.SUBSTEPS)
        times[0].append(middle - begin)
        times[1].append(time.perf_counter() - middle)
    vector, bare = (1e3 * float(np.median(series)) for series in times)
    return vector, bare if has_models else None


def update_flop(agent, rollout):
    """Floating-point operations of the matrix multiplications in one update, mean over a cycle of actor_every."""
    from torch.utils.flop_counter import FlopCounterMode

    cfg = agent.cfg
    batch = rollout.replay.sample(cfg.batch)
    with FlopCounterMode(display=False) as counter:
        for step in range(cfg.actor_every):
            agent.update(batch, step)
    flop = counter.get_total_flops() / cfg.actor_every
    B, L, _ = batch.tau.shape
    return flop + 3 * B * L * 2 * 8 * cfg.encoder_hidden**2  # the counter misses the LSTM: 3 passes, 2 x 4 gates


def matmul_rate(device):
    """FLOP/s of the best of 20 products of two 1024 x 1024 matrices."""
    a, best = torch.randn(1024, 1024, device=device), math.inf
    for _ in range(20):
        begin = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - begin)
    return 2 * 1024**3 / best


def peak_memory():
    """Largest resident memory of this process so far, MB; nan where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ---------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)


def build_parser():
    parser = Parser(
        prog="dmash.py",
        description="DMA*-SH: train, evaluate and plot one run.",
        allow_abbrev=False,
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--eval", metavar="RUN_FOLDER", help="evaluate the policy of a run instead of training")
    modes.add_argument("--resume", metavar="RUN_FOLDER", help="go on with a run; --steps may be raised")
    modes.add_argument(
        "--benchmark", action="store_true", help="time the phases of a gradient step instead of training"
    )
    modes.add_argument("--list-envs", action="store_true", help="print the table of environments instead of training")
    parser.add_argument("--per-context", action="store_true", help="with --eval: print the return of every context")

    def converter(f):
        kind = {int: "a whole number", float: "a number"}.get(f.type)

        def convert(text):
            try:
                return whole(text) if f.type is int else f.type(text)
            except ValueError:
                raise argparse.ArgumentTypeError(f"{text!r}: must be {kind} in {f.metadata['allowed']}") from None

        return convert

    for f in fields(Config):
        about = [] if f.default is None else [f"default: {f.default}"]
        about += [f"allowed: {f.metadata['allowed']}"] if f.metadata["allowed"] else []
        parser.add_argument(
            flag(f.name),
            type=converter(f),
            default=argparse.SUPPRESS,  # so that what was given can be told from what was not
            metavar=f.type.__name__.upper(),
            help=f.metadata["help"] + (f" ({'; '.join(about)})" if about else ""),
        )
    return parser


def whole(text):
    """A whole number, also written as 1e5. ValueError if it is none."""
    try:
        return int(text)
    except ValueError:
        if not float(text).is_integer():
            raise
        return int(float(text))


def list_envs():
    """Prints the table of environments."""

    def describe(dim):
        if dim.binary:
            return f"{dim.name} in {{{dim.train[0]:g}, {dim.train[1]:g}}}"
        (low, high), (far_low, far_high) = dim.train, dim.extrapolation
        return f"{dim.name} {dim.default:g}, [{low:g}, {high:g}], [{far_low:g}, {far_high:g}]"

    row = "{:<18} {:<16} {:<23} {:>7} {:>4} {:>7}  {}".format
    print(row("id", "paper", "kind", "horizon", "K", "steps", "contexts: default, train range, extrapolation range"))
    for env, spec in aib_envs.ENVS.items():
        dims = [describe(dim) for dim in spec.context[:2]] + [f"and so on to {spec.context[-1].name}"] * (
            len(spec.context) > 2
        )
        print(row(env, spec.paper_name, spec.kind, spec.horizon, *PER_ENV[env], "; ".join(dims)))


FOR_RUNS = ("steps", "out", "eval_every", "eval_rollouts", "rollouts", "random_steps")
ALLOWED_WITH = {
    "--eval": ("rollouts", "threads", "device"),
    "--resume": ("steps",),
    "--list-envs": (),
    "--benchmark": [f.name for f in fields(Config) if f.name not in FOR_RUNS],
}


def main(argv=None):
    """The command line. Returns the exit status: 0; 2 for bad input or a file that cannot be used, 1 for a number that
    is not finite, each told in one line; 130 after a second Ctrl-C."""
    try:
        parser = build_parser()
        given, rest = parser.parse_known_args(argv)
        if rest:
            flags = [option for action in parser._actions for option in action.option_strings]
            raise BadInput(aib_envs.unknown("argument", rest[0], flags))
        settings = vars(given)
        modes = ("eval", "resume", "benchmark", "list_envs", "per_context")
        run_folder, unfinished, timing, listing, table = (settings.pop(name) for name in modes)
        if table and run_folder is None:
            raise BadInput("--per-context: allowed only with --eval RUN_FOLDER")
        used = {"--eval": run_folder is not None, "--resume": unfinished is not None}
        used |= {"--list-envs": listing, "--benchmark": timing}
        mode = next((mode for mode in used if used[mode]), None)  # argparse lets through one at most
        for name in settings if mode else ():
            if name not in ALLOWED_WITH[mode]:
                allowed = ", ".join(map(flag, ALLOWED_WITH[mode])) or "nothing else"
                raise BadInput(f"{flag(name)}: not with {mode}, which allows {allowed}")
        if run_folder is not None:
            print_evaluation(*load_run(run_folder, **settings), table)
        elif listing:
            list_envs()
        elif timing:
            benchmark(Config(**settings))
        else:
            train(new_run(Config(**settings)) if unfinished is None else resume_run(unfinished, **settings))
        sys.stdout.flush()
    except BadInput as error:
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
    else:
        return 0
    print(f"dmash.py: error: {message}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # nothing more can be written there: what is left must not fail again at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def print_evaluation(cfg, agent, table):
    """The average episodic return (AER) of each set and, if `table`, of each context."""
    returns = evaluate(agent, cfg, cfg.rollouts)
    if table:
        rows = per_context_rows(cfg, 0, returns)
        names = [dim.name for dim in aib_envs.lookup(cfg.env).context]
        print("set      index  " + "".join(f"{name:>15}" for name in names) + f"{'return':>10}")
        for row in rows:
            values = "".join(f"{row[name]:15.4g}" for name in names)
            print(f"{row['set']:<8} {row['index']:5}  {values}{row['return']:10.1f}")
    print(f"AER over {cfg.contexts} contexts x {cfg.rollouts} rollouts:", end="")
    print("".join(f"  {name} {set_returns.mean():.1f}" for name, set_returns in zip(SETS, returns)))


if __name__ == "__main__":
    sys.exit(main())
