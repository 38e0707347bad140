"""Do the paper's theorems hold for the classes of dmash.py, in numbers?

    python studies/theory.py                    all of them; a minute or two on one thread
    python studies/theory.py a1 a6 --seed 2     some of them, with other random numbers

The program prints numbers, and writes a figure of the first theorem by matplotlib, a1.png in --out.
Theorems have the numbers of the paper's second version. The docstrings of a1, a2, a5, a6, a15 and
a17 say what is claimed, built and measured, and when the claim holds. These functions return the
numbers by what they are, and a figure or None.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from command_line import parser_of
from figures import Figure
from mutual_information import variability
from runs import aib_envs, dmash
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap

TRAINED = Path(__file__).resolve().parents[1] / "results/agent"

# ---- What several theorems need -----------------------------------------------------------------


def uniform(*shape):
    """Random numbers between -1 and 1."""
    return 2 * torch.rand(shape) - 1


def largest(x):
    return x.abs().max().item()


def train(parameters, loss, steps, lr):
    """Adam on loss(), which draws its own batch. The learning rate falls linearly to 0."""
    optimizer = torch.optim.Adam(parameters, lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def adapter(x, omega):
    """Eq. 3 for x (B, d_x) -> (B, d_x). Each row of ω serves an equal share of the rows of x."""
    x = x.unflatten(0, (len(omega.b_up), -1))  # (rows of ω, share, d_x)
    return dmash.adapter(x, omega).flatten(0, 1)


@torch.no_grad()
def hypernetwork_by_hand(U, V):
    """A Hypernetwork of z (B, 1) whose adapter is g(x; h(z)) = z·U V x, for all x and z.

    U is (d_x, r), V is (r, d_x). The bottleneck needs 2 r units: V x = ReLU(V x) - ReLU(-V x).
    The up-weights are z·[U, -U]. The trunk passes z on as the pair ReLU(z), ReLU(-z).
    """
    h = dmash.Hypernetwork(d_z=1, hidden=2, d_x=len(U), bottleneck=2 * len(V))
    for p in h.parameters():
        p.zero_()
    first, _, second, _ = h.trunk
    first.weight[0] = 1
    first.weight[1] = -1
    second.weight.copy_(torch.eye(2))
    W_down, _, W_up, _ = h.heads
    W_down.bias.copy_(torch.cat([V, -V]).T.flatten())  # a bias, as it does not depend on z
    up = torch.cat([U, -U], 1).T.flatten()
    W_up.weight[:, 0] = up
    W_up.weight[:, 1] = -up
    return h


# ---- A.1: the product s·z -----------------------------------------------------------------------


def a1(seed, steps=1500, n=257):
    """A.1: the adapter can be the product s·z exactly; a ReLU network on [s; z] cannot.

    Claim: two ReLU units give g(s; h(z)) = s·z. A ReLU network f on [s; z] is affine on each of
    its linear pieces. Take a square of side δ inside one piece. The alternating sum of f over its
    corners is 0, that of s·z is δ². So f errs by at least δ²/4 at one of the four corners.
    Built: a hypernetwork by hand, and a network on [s; z] that is trained on s·z in [-1, 1]².
    Measured: the adapter's largest error; the pieces of f on a grid of n × n points; and of all
    squares inside one piece the mixed second difference of f and the largest error at a corner.
    It holds if the first number is 0 and the mixed difference inside pieces is 0 but for rounding.
    The last number must be at least 1.
    """
    s, z = 100 * torch.randn(2, 10000, 1)
    one = torch.ones(1, 1)
    omega = hypernetwork_by_hand(one, one)(z)
    exact = largest(adapter(s, omega) - s * z)

    f = dmash.Network(1, 1, d_x=16, use="concat", d_context=1)

    def loss():
        s, z = uniform(2, 256, 1)
        return (f(s, z) - s * z).square().sum()

    train(f.parameters(), loss, steps, 3e-3)
    error, piece = errors_and_pieces(f, n)
    delta, mixed, mixed_everywhere, least, median = squares_inside_pieces(error, piece)
    floor = delta**2 / 4
    numbers = {
        "adapter, s and z up to 400: largest error": exact,
        "network on [s; z]: linear pieces": piece.max() + 1,
        "its mixed second difference inside a piece (s·z: 1), at most": mixed.max(),
        "its mean over all cells": mixed_everywhere[0],
        "largest error in a square inside a piece / (δ²/4), at least": (least / floor).min(),
    }
    # In the picture, the edges of the pieces stay white.
    whole_cell = (corners(piece, 1) == piece[1:, 1:]).all(0)
    image = np.where(whole_cell, np.abs(error[1:, 1:]), np.nan).T
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = left.imshow(image, "cividis", origin="lower", extent=(-1, 1, -1, 1))
    figure.colorbar(shown, ax=left)
    left.set(title="error of a network on [s; z]; white: its edges", xlabel="s", ylabel="z")
    right.loglog(delta, median, "o-", color="#0072B2", label="median square")
    right.loglog(delta, least, "^-", color="#D55E00", label="least")
    right.loglog(delta, floor, "x-", color="k", label="δ²/4")
    right.set(title="squares inside a piece", xlabel="side δ", ylabel="largest error at a corner")
    right.legend()
    return numbers, figure


@torch.no_grad()
def errors_and_pieces(f, n):
    """f(s, z) - s·z on a grid of [-1, 1]², and the number of the linear piece; (n, n) each."""
    line = torch.linspace(-1, 1, n, dtype=torch.float64)
    sz = torch.cartesian_prod(line, line)  # (n², 2)
    s, z = sz.split(1, 1)
    error = f.double()(s, z) - s * z
    units = torch.cat([f.trunk[0](sz), f.trunk(sz)], 1)  # both layers before their ReLU
    # On a piece the same units are on.
    _, piece = torch.unique(units > 0, dim=0, return_inverse=True)
    return error.view(n, n).numpy(), piece.view(n, n).numpy()


def corners(values, k):
    """The four corners of all squares of k cells a side: (4, n - k, n - k)."""
    return np.stack([values[:-k, :-k], values[k:, :-k], values[:-k, k:], values[k:, k:]])


def squares_inside_pieces(error, piece):
    """Five arrays with a number for each size of square, as long as one lies inside a piece.

    Side δ; largest mixed second difference of f; its mean over all squares; and of the largest
    error at the corners of a square, the least and the median.
    """
    n = len(error)
    rows = []
    for k in range(1, n):
        # A piece is convex: a square lies inside it if its corners do.
        at = corners(piece, k)
        inside = (at == at[0]).all(0)
        if not inside.any():
            break
        delta = 2 * k / (n - 1)
        e = corners(error, k)
        mixed = 1 + (e[0] - e[1] - e[2] + e[3]) / delta**2  # that of s·z is 1
        largest_mixed = np.abs(mixed[inside]).max()
        worst = np.abs(e).max(0)[inside]
        rows.append((delta, largest_mixed, mixed.mean(), worst.min(), np.median(worst)))
    return np.array(rows).T


# ---- A.2: operators -----------------------------------------------------------------------------


@torch.no_grad()
def a2(seed, m=64):
    """A.2: behind the skip connection, the adapter W = T(z) - I is the operator T(z) on x.

    Claim: W = -2 I inverts x, and W = P - I swaps its halves. A policy's head reads ReLU(x̃). ReLU
    commutes with P: if head(P x) = R head(x), the policy's output turns by R. ReLU does not
    commute with inversion, unless x = (y, -y), where inversion is P.
    Built: both adapters by hand, and three policies. "Flipped" has x = (y, -y) and a symmetric
    head, "swapped" a symmetric head alone, "flipped, as drawn" has neither.
    Measured: errors of x̃, and of the policy's means and log stds, adapter on against off.
    It holds if the first four numbers are 0 but for rounding and the last one is not.
    """
    half = torch.eye(m // 2)
    inversion = hypernetwork_by_hand(-2 * torch.eye(m), torch.eye(m))
    swap = hypernetwork_by_hand(torch.cat([half, -half]), torch.cat([-half, half], 1))
    on = torch.ones(1, 1)  # z
    x = torch.randn(10000, m)
    s = torch.randn(400, 5)
    inverted = x + adapter(x, inversion(on))
    swapped = x + adapter(x, swap(on))
    numbers = {
        f"x of {m} numbers, inverted: largest error": largest(inverted + x),
        "its halves swapped": largest(swapped - x.roll(m // 2, 1)),
    }

    flip = torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0]))  # R for two means and two log stds
    exchange = torch.eye(4)[[1, 0, 3, 2]]
    flipped_policy, swapped_policy, drawn_policy = (dmash.Actor(5, 2, d_x=m) for _ in range(3))
    make_symmetric(flipped_policy.head, flip)
    make_symmetric(swapped_policy.head, exchange)
    for p in flipped_policy.trunk[2].parameters():
        p[m // 2 :] = -p[: m // 2]  # x = (y, -y)

    for name, pi, h, R in (
        ("flipped", flipped_policy, inversion, flip),
        ("swapped", swapped_policy, swap, exchange),
        ("flipped, as drawn", drawn_policy, inversion, flip),
    ):
        goal = torch.cat(pi(s, h(0 * on)), 1) @ R.T  # (400, 4)
        found = torch.cat(pi(s, h(on)), 1)
        numbers[f"policy {name}: largest error of means and log stds"] = largest(found - goal)
    return numbers, None


def make_symmetric(head, R):
    """Makes head(P x) = R head(x), P the swap of x's halves: the mean of head(x), R head(P x)."""
    half = head.in_features // 2
    head.weight.copy_((head.weight + R @ head.weight.roll(half, 1)) / 2)
    head.bias.copy_((head.bias + R @ head.bias) / 2)


# ---- A.5: the bottleneck ------------------------------------------------------------------------


def a5(seed, steps=2000, m=8, restarts=3):
    """A.5: a bottleneck of width k passes maps of rank k, and two units do for s·z (see a1).

    Claim: g(x; ω) - b_up lies in the span of the k rows of W_up. So of -2x, x isotropic in R^m, it
    misses a share of at least 1 - k/m. Inside a range m units miss nothing, since |x| ≤ 1 makes
    x = ReLU(x + 1) - 1. Everywhere it takes 2 m units, as in a2: far out, the units that are on at
    x and at -x are not the same.
    Built: adapters of random ω; and adapters of 1 to 2 m units that are trained on -2x.
    Measured: ranks of ∂g/∂x; shares of -2x missed, in the range trained on and in ten times that.
    It holds if no rank is above its width and no share is below 1 - k/m. In the first range m
    units must miss nearly nothing, in the second range they must miss something.
    """
    widths = [1, 2, 4, 8, 16, 32]
    ranks = [largest_rank(k) for k in widths]

    units = torch.arange(1, 2 * m + 1)
    k = units.repeat(restarts)
    rows = len(k)  # adapters trained side by side, row i with k[i] units
    cut = (units <= k[:, None]).unsqueeze(-1)  # (rows, 2 m, 1), True or False
    shapes = dmash.Hypernetwork(d_x=m, bottleneck=2 * m).shapes
    weights = [nn.Parameter(torch.randn(rows, *shape) / m**0.5) for shape in shapes]

    def error(x):
        """Of all adapters for the same x (B, m): (rows, B, m)."""
        W_down, b_down, W_up, b_up = weights
        x = x.repeat(rows, 1)
        y = adapter(x, dmash.Omega(W_down, b_down, W_up * cut, b_up))
        return (y + 2 * x).unflatten(0, (rows, -1))

    def loss():
        return error(uniform(64, m)).square().sum()

    def share_missed(scale):
        """For 1 to 2 m units, by the best of the restarts."""
        x = scale * uniform(20000, m)
        missed = error(x).detach().square().mean((1, 2))
        share = missed / (2 * x).square().mean()
        return share.view(restarts, -1).amin(0).tolist()

    train(weights, loss, steps, 1e-2)
    near = share_missed(1)
    far = share_missed(10)
    what = f"share of −2x missed by 1 … {2 * m} units, trained, m = {m}, best of {restarts}"
    numbers = {f"rank of ∂g/∂x at widths {widths}, at most": ranks}
    numbers[what] = near
    numbers["the same, in ten times the range trained on"] = far
    return numbers, None


def largest_rank(width):
    """The largest rank of ∂g/∂x at 300 points, for one random ω of a bottleneck."""
    h = dmash.Hypernetwork(d_x=64, bottleneck=width).double()
    omega = h(torch.randn(1, 8).double())
    x = 3 * torch.randn(300, 1, 64).double()
    jacobians = vmap(jacrev(adapter), (0, None))(x, omega)  # (300, 1, 64, 1, 64)
    return torch.linalg.matrix_rank(jacobians[:, 0, :, 0]).max().item()


# ---- A.6: noise of the code ---------------------------------------------------------------------

SIGMAS = [0, 0.01, 0.03, 0.1, 0.3, 1]


def a6(seed, steps=1000, networks=8, n=10000):
    """A.6, an argument of the paper: noise of z flips a network on [s; z], but not an adapter.

    Claim: a network on [s; z] switches pieces to follow the mode, so noise flips its output near
    an edge. The output of a network with an adapter moves in proportion to the noise.
    Built: several networks of both kinds. They have equally many parameters and learn s·z from the
    same data, once with z = ±1 and once with all z in [-1, 1].
    Measured: the mean error under noise σε of z, ε normal; the steepest slope by z at s = 1.
    It holds if the concatenation's errors and slopes are clearly larger. They are not.
    """
    d_x = min(range(1, 120), key=size_difference)
    sizes = [size(with_adapter()), size(with_concatenation(d_x))]
    numbers = {"parameters, adapter and concatenation": sizes, "noise σ": SIGMAS}
    kinds = {"adapter": with_adapter, "concatenation": partial(with_concatenation, d_x)}
    line = torch.linspace(-1.5, 1.5, 301).expand(networks, -1).unsqueeze(-1)  # in steps of 1/100
    for task, draw_z in (("z = ±1", uniform_sign), ("−1 ≤ z ≤ 1", uniform)):
        for kind, make in kinds.items():
            members = [make() for _ in range(networks)]
            torch.manual_seed(seed)  # the same data for both kinds
            f = learn_product(members, draw_z, steps)
            s = uniform(networks, n, 1)
            z = draw_z(networks, n, 1)
            noise = torch.randn_like(z)
            errors = []
            for sigma in SIGMAS:
                error = f(s, z + sigma * noise) - s * z
                errors.append(error.abs().mean((1, 2)))
            slopes = f(torch.ones_like(line), line).diff(dim=1) * 100
            numbers[f"{task}, {kind}: E|f(s, z + σε) − s·z|"] = torch.stack(errors)
            numbers[f"{task}, {kind}: largest |∂f/∂z|, s = 1"] = slopes.abs().amax(1).T
    return numbers, None


def uniform_sign(*shape):
    return uniform(*shape).sign()


def with_adapter():
    return dmash.Network(1, 1, d_x=32, make_own=partial(dmash.Hypernetwork, 1, 16, 32, 4))


def with_concatenation(d_x):
    return dmash.Network(1, 1, d_x=d_x, use="concat", d_context=1)


def size(network):
    return sum(p.numel() for p in network.parameters())


def size_difference(d_x):
    return abs(size(with_concatenation(d_x)) - size(with_adapter()))


def learn_product(networks, draw_z, steps):
    """Trains networks of one kind side by side, each on data of its own.

    Returns them as a function f of s and z (networks, B, 1), which is (networks, B, 1).
    """
    weights, _ = stack_module_state(networks)
    call = vmap(partial(functional_call, networks[0]))

    def loss():
        s = uniform(len(networks), 64, 1)
        z = draw_z(len(networks), 64, 1)
        return (call(weights, (s, z)) - s * z).square().sum()

    train(weights.values(), loss, steps, 3e-3)

    @torch.no_grad()
    def f(s, z):
        return call(weights, (s, z))

    return f


# ---- A.15: the parts of Variability -------------------------------------------------------------


def a15(seed, run=TRAINED, steps=200, n=4000):
    """A.15: Variability is within-context noise, within-mode spread and between-mode separation.

    Claim: tr Cov(Z) = E tr Cov(Z|C) + E_S tr Cov(E[Z|C] | S) + tr Cov(E[Z|S]).
    Built: codes of n windows, drawn while the policy of `run` acts in its training contexts. They
    come from its encoder and from an untrained one. Windows are read as in training, masked and
    in random order, and as in evaluation.
    Measured: both sides, each part by itself.
    It holds if nothing but rounding is left when the parts are subtracted from the total.
    """
    cfg, agent = dmash.load_policy(run)
    contexts = aib_envs.context_sets(cfg.env, cfg.contexts)["train"]
    envs = aib_envs.VectorEnv(cfg.env, contexts, seed=[seed, 2])
    rollout = dmash.Rollout(agent, envs, noisy=False, capacity=cfg.K + steps)
    for _ in range(steps):  # the first one begins with a warm-up of K steps
        rollout.collect()
    c = torch.randint(envs.N, (n,))
    t = torch.randint(cfg.K, cfg.K + steps + 1, (n,))
    binary = [dim.binary for dim in aib_envs.lookup(cfg.env).context]
    modes = envs.c[c, binary.index(True)]
    numbers = {}
    for name, encoder in (("untrained", dmash.new_agent(cfg)), ("trained", agent)):
        for windows, noisy in (("masked", True), ("plain", False)):
            with torch.no_grad():
                z, _ = encoder.infer(rollout.replay.windows(c, t, noisy), noisy)
            values = variability(z.numpy(), modes, c.numpy())
            left = values[0] - sum(values[1:])
            parts = "total, noise, spread, separation, what is left"
            numbers[f"{name} encoder, {windows} windows: {parts}"] = [*values, left]
    return numbers, None


# ---- A.17, A.18: variance of the policy gradient ------------------------------------------------


def a17(seed, steps=(0, 100, 300, 1000), n=200):
    """A.17, A.18: less noise and less of U in Z lower a bound on the policy gradient's variance.

    Claim: if tr Cov(G_Z) ≤ V₀ + L_m² tr Cov(Z), the bound falls when Z is replaced by its mean per
    mode. So does the information about U: here I(U; Z) falls from ln 5 to 0.
    Built: a policy steers (class Steering), once where U has no effect and once where it has one.
    It learns with Z = (S, U/2, noise/2). G_Z is the gradient by ξ of one sample.
    Measured: tr Cov(G), its part E tr Cov(G|Z), and the bound, of Z and of its mean per mode. Both
    are of the same policy and random numbers. V₀ is E tr Cov(G|Z) and L_m the Lipschitz constant
    of E[G|Z], each the larger of the two codes'.
    It holds if tr Cov(G) is below its bound, and the bound is lower for the mean per mode.
    """
    five = torch.linspace(-1, 1, 5)
    c = torch.cartesian_prod(torch.tensor([-1.0, 1.0]), five, five)  # (50, 3): S, U, noise
    codes = c * torch.tensor([[[1, 0.5, 0.5]], [[1, 0, 0]]])  # (2, 50, 3): Z, its mean per mode
    traces = codes.var(1, correction=0).sum(1).numpy()
    numbers = {"tr Cov(Z), of Z and of its mean per mode": traces}
    for kappa, title in ((0, "U without effect"), (0.8, "strength 1 + .8 U")):
        model = Steering(kappa)
        loss = partial(model.batch_loss, codes[0], c)
        found = []
        for more in np.diff(steps, prepend=0):
            train(model.pi.parameters(), loss, more, 3e-3)
            for z in codes:
                torch.manual_seed(seed)
                found.append(moments(model.gradients(z, c, n), z))
        found = np.array(found).reshape(len(steps), len(codes), 3)
        variance, inner, lipschitz = found.transpose(2, 1, 0)  # (codes, steps) each
        bound = inner.max(0) + lipschitz.max(0) ** 2 * traces[:, None]
        after = f"after {list(steps)} steps"
        for i, code in enumerate(("Z", "mean per mode")):
            what = f"{title}, {code}"
            numbers[f"{what}: tr Cov(G) {after}"] = variance[i]
            numbers[f"{what}: of it E tr Cov(G | Z) {after}"] = inner[i]
            numbers[f"{what}: bound {after}"] = bound[i]
    return numbers, None


class Steering(nn.Module):
    """A task of one step: in context (S, U) an action moves the state s, which is to become 0.

    The action counts with sign S and strength 1 + κU. The loss is SAC's policy loss. The weights
    ξ of the policy are trained, the hypernetwork's stay as they were drawn.
    """

    def __init__(self, kappa):
        super().__init__()
        self.kappa = kappa
        self.pi = dmash.Actor(1, 1, d_x=16)
        self.h = dmash.Hypernetwork(3, 16, 16, 4).requires_grad_(False)

    def forward(self, s, z, c):
        """The loss of samples s (B, 1), with codes z (B, 3) in contexts c (B, 3)."""
        effect = c[:, :1] * (1 + self.kappa * c[:, 1:2])

        def Q(s, a, omega):
            return -(0.5 * s + effect * a).square()

        batch = dmash.Batch(s, *[None] * 5)
        loss, _ = dmash.actor_loss(self.pi, Q, 0.01, self.h(z), batch)
        return loss

    def batch_loss(self, z, c):
        s = uniform(128, 1)
        i = torch.randint(len(c), (128,))
        return self(s, z[i], c[i])

    def gradients(self, z, c, n):
        """The loss's gradients by ξ of n single samples in each row of z, c: (rows, n, |ξ|)."""
        weights = self.pi.state_dict(prefix="pi.")

        def loss(weights, s, z, c):
            return functional_call(self, weights, (s[None], z[None], c[None]))

        of_samples = vmap(grad(loss), (None, 0, None, None), randomness="different")
        of_rows = vmap(of_samples, (None, None, 0, 0), randomness="same")
        parts = of_rows(weights, uniform(n, 1), z, c)
        return torch.cat([part.flatten(2) for part in parts.values()], 2)


def moments(G, z):
    """tr Cov(G), E tr Cov(G|Z) and the Lipschitz constant of E[G|Z].

    G (rows, n, |ξ|) are the gradients of the codes z (rows, 3), some of which may be equal.
    """
    _, n, d = G.shape
    values, code = torch.unique(z, dim=0, return_inverse=True)
    label = code.repeat_interleave(n)
    variance, inner, _, _ = variability(G.flatten(0, 1), label, label)
    means = torch.stack([G[code == i].mean((0, 1)) for i in range(len(values))])
    slopes = torch.pdist(means) / torch.pdist(values)
    return variance * d, inner * d, slopes.max()


# ---- Output and command line --------------------------------------------------------------------

THEOREMS = {"a1": a1, "a2": a2, "a5": a5, "a6": a6, "a15": a15, "a17": a17}


def show(x):
    """A number or a list of them; of each row of a matrix, mean and standard deviation."""
    if np.ndim(x) == 2:
        return ", ".join(f"{row.mean():.4f} ± {row.std():.4f}" for row in x)
    return ", ".join(f"{number:.3g}" for number in np.ravel(x))


def run_command(args):
    seed = dmash.number("--seed", args.seed, int, 0, 4294967295)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # these tensors are small
    names = args.names
    if "all" in names:
        names = THEOREMS
    for name in names:
        torch.manual_seed(seed)
        numbers, figure = THEOREMS[name](seed)
        print(name)
        for what, x in numbers.items():
            print(f"    {what}: {show(x)}")
        print(flush=True)
        if figure is not None:
            figure.savefig(args.out / f"{name}.png", dpi=90)


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = parser_of("theory.py", __doc__)
    names = [*THEOREMS, "all"]
    parser.add_argument("names", nargs="*", choices=names, default="all", help="default: all")
    out = "results/inside/theory"
    parser.add_argument("--out", type=Path, default=out, help="folder (default: %(default)s)")
    parser.add_argument("--seed", default=1, help="of everything random (default: %(default)s)")
    return dmash.exit_status("theory.py", lambda: run_command(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
