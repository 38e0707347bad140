"""What do the paper's theorems say about the classes of dmash.py, in numbers?

    python studies/theory.py                    all of them, in a minute or two on one thread
    python studies/theory.py a1 a6 --seed 2     some of them, with other random numbers

Prints numbers, writes them to theory.txt in --out, and draws a figure of each, a1.png and so on. The functions a1, a2,
a5, a6, a15 and a17 say what each theorem claims and how it is tried; numbered as in the paper's second version.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from mutual_information import variability
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import aib_envs  # noqa: E402
import dmash  # noqa: E402

TRAINED = ROOT / "results/quick_fresh/cartpole_inv__dma_star_sh__quick__s4"

uniform = lambda *shape: 2 * torch.rand(shape) - 1
largest = lambda x: x.abs().max().item()
product_loss = lambda f: lambda s, z: (f(s, z) - s * z).square().sum()


def train(parameters, loss, draw, steps, lr):
    """Adam on loss(*draw()), its rate falling linearly to 0."""
    optimizer = torch.optim.Adam(parameters, lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss(*draw()).backward()
        optimizer.step()


@torch.no_grad()
def by_hand(U, V):
    """A Hypernetwork of z (B, 1) whose adapter is g(x; h(z)) = z·U V x for all x and z, by 2 r units: U (d_x, r),
    V (r, d_x). V x = ReLU(V x) - ReLU(-V x), and the up-weights are linear in z, itself ReLU(z) - ReLU(-z)."""
    h = dmash.Hypernetwork(d_z=1, hidden=2, d_x=len(U), bottleneck=2 * len(V))
    for p in h.parameters():
        p.zero_()
    h.trunk[0].weight[:, 0], h.trunk[2].weight[:] = torch.tensor([1.0, -1.0]), torch.eye(2)
    heads, up = dmash.Omega(*h.heads), torch.cat([U, -U], 1).T.flatten()
    heads.W_down.bias[:], heads.W_up.weight[:] = torch.cat([V, -V]).T.flatten(), torch.stack([up, -up], 1)
    return h


# Each theorem returns its numbers, by what they are, and the panels of its figure: for each, the labels of its axes and
# an image of [-1, 1]² or curves by name, (x, y) or (x, y, s.d.).


def a1(seed, steps=1500, n=257):
    """A.1: the adapter holds f*(s, z) = s·z exactly, as g(s; h(z)). A ReLU network on [s; z] is piecewise linear. A
    piece, where the same units are on, is convex: with its corners it holds a square of side δ. Of an affine function
    their alternating sum is 0, of s·z it is δ²: at one of the four f errs by δ²/4, as the best affine function does."""
    s, z = 100 * torch.randn(2, 10000, 1)
    exact = largest(dmash.adapter(s, by_hand(torch.ones(1, 1), torch.ones(1, 1))(z)) - s * z)
    f = dmash.Network(1, 1, d_x=16, how="concat", d_told=1)
    train(f.parameters(), product_loss(f), lambda: uniform(2, 256, 1), steps, 3e-3)
    sz = torch.cartesian_prod(*torch.linspace(-1, 1, n, dtype=torch.float64).expand(2, -1))
    with torch.no_grad():
        error = (f.double()(sz[:, :1], sz[:, 1:])[:, 0] - sz.prod(1)).view(n, n).numpy()
        on = torch.cat([f.trunk[0](sz), f.trunk(sz)], 1) > 0
    piece = np.unique(np.packbits(on, axis=1), axis=0, return_inverse=True)[1].reshape(n, n)
    corners = lambda values, k: np.stack([values[:-k, :-k], values[k:, :-k], values[:-k, k:], values[k:, k:]])
    rows = []
    for k in range(1, n):  # all squares of k cells a side
        delta, e, p = 2 * k / (n - 1), corners(error, k), corners(piece, k)
        inside, mixed = (p == p[0]).all(0), 1 + (e[0] - e[1] - e[2] + e[3]) / delta**2  # of s·z it is 1
        if not inside.any():
            break
        worst = np.abs(e).max(0)[inside]
        rows.append((delta, np.abs(mixed[inside]).max(), mixed.mean(), worst.min(), np.median(worst)))
    delta, inner, mean, least, median = np.array(rows).T
    numbers = {"adapter, s and z up to 400: largest error": exact, "network on [s; z]: linear pieces": piece.max() + 1}
    numbers["its mixed second difference inside a piece (s·z: 1), at most"] = inner.max()
    numbers["its mean over all cells"] = mean[0]
    numbers["largest error in a square inside a piece / (δ²/4), at least"] = (least / (delta**2 / 4)).min()
    image = np.where((corners(piece, 1) == piece[1:, 1:]).all(0), np.abs(error[1:, 1:]), np.nan).T
    curves = {"median square": (delta, median), "least": (delta, least), "δ²/4": (delta, delta**2 / 4)}
    axes = dict(xlabel="side δ of squares inside a piece", ylabel="largest error at the corners")
    title = dict(xlabel="s", ylabel="z", title="error of a network on [s; z]; white: its edges")
    return numbers, [(title, image), (axes | dict(xscale="log", yscale="log"), curves)]


@torch.no_grad()
def a2(seed, m=64):
    """A.2: an operator T(z) on x is the adapter W = T(z) - I behind the skip connection: -2 I inverts x, P - I swaps
    its halves. A policy's head reads ReLU(x̃). ReLU commutes with P: where head(P x) = R head(x), P becomes R. It does
    not commute with inversion, unless x = (y, -y), where that is P."""
    eye, half, off, on = torch.eye(m), torch.eye(m // 2), torch.zeros(1, 1), torch.ones(1, 1)
    invert, swap = by_hand(-2 * eye, eye), by_hand(torch.cat([half, -half]), torch.cat([-half, half], 1))
    x, s, panels = torch.randn(10000, m), torch.randn(400, 5), []
    numbers = {f"x of {m} numbers, inverted: largest error": largest(x + dmash.adapter(x, invert(on)) + x)}
    numbers["its halves swapped"] = largest(x + dmash.adapter(x, swap(on)) - x.roll(m // 2, 1))
    for name, h in (("flipped", invert), ("swapped", swap), ("flipped, as drawn", invert)):
        pi = dmash.Actor(5, 2, d_x=m)
        R = torch.eye(4)[[1, 0, 3, 2]] if h is swap else torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0]))
        if name != "flipped, as drawn":
            pi.head.weight.copy_((pi.head.weight + R @ pi.head.weight.roll(m // 2, 1)) / 2)
            pi.head.bias.copy_((pi.head.bias + R @ pi.head.bias) / 2)
        for p in pi.trunk[2].parameters() if name == "flipped" else ():
            p[m // 2 :] = -p[: m // 2]
        goal, found = torch.cat(pi(s, h(off)), 1) @ R.T, torch.cat(pi(s, h(on)), 1)  # two means, two log stds
        numbers[f"policy {name}: largest error of means and log stds"] = largest(found - goal)
        label = f"{'mean of the other action' if h is swap else '−mean'}, adapter off"
        points = {"400 states": (goal[:, 0], found[:, 0]), "equal": 2 * (goal[:, 0].aminmax(),)}
        panels.append((dict(title=f"policy {name}", xlabel=label, ylabel="mean of an action, adapter on"), points))
    return numbers, panels


def a5(seed, steps=2000, m=8, restarts=3):
    """A.5: a bottleneck of width k passes maps of rank k; two units do for s·z (a1). g(x; ω) - b_up lies in the span of
    k rows of W_up: of -2x, x isotropic in R^m, it misses 1 - k/m or more. Within a range m units miss nothing: x is
    ReLU(x + 1) - 1 for |x| ≤ 1. Everywhere it takes 2 m (a2): far out, the units on at x and at -x are not the same."""
    widths, ranks, missed = [1, 2, 4, 8, 16, 32], [], []
    for k in widths:
        omega = dmash.Hypernetwork(d_x=64, bottleneck=k).double()(torch.randn(1, 8).double())
        J = vmap(jacrev(lambda x: dmash.adapter(x[None], omega)[0]))(3 * torch.randn(300, 64).double())
        ranks.append(torch.linalg.matrix_rank(J).max().item())  # J (300, 64, 64)
    k = torch.arange(1, 2 * m + 1).repeat(restarts)  # all widths at once: row i of ω has k_i units, the others cut off
    cut = (torch.arange(2 * m) < k[:, None]).float().unsqueeze(-1)
    shapes = dmash.Hypernetwork(d_x=m, bottleneck=2 * m).shapes
    weights = dmash.Omega(*(nn.Parameter(torch.randn(len(k), *shape) / m**0.5) for shape in shapes))
    omega = lambda: weights._replace(W_up=weights.W_up * cut)
    draw = lambda: (uniform(64, m).repeat(len(k), 1), -2)
    train(weights, product_loss(lambda x, _: dmash.adapter(x, omega())), draw, steps, 1e-2)
    for scale in (1, 10):
        x = scale * uniform(20000, m).repeat(len(k), 1)
        miss = (dmash.adapter(x, omega()) + 2 * x).detach().square().view(len(k), -1).mean(1) / (4 * x.square().mean())
        missed.append(miss.view(restarts, -1).amin(0).tolist())
    numbers = {f"rank of ∂g/∂x at widths {widths}, at most": ranks}
    numbers[f"share of −2x missed by 1 … {2 * m} units, trained, m = {m}, best of {restarts}"] = missed[0]
    numbers["the same, in ten times the range trained on"] = missed[1]
    k = range(1, 2 * m + 1)
    curves = {"in the range trained on": (k, missed[0]), "in ten times that": (k, missed[1])}
    curves["floor 1 − k/m"] = k, [max(1 - j / m, 0) for j in k]
    axes = dict(xlabel="width k of the bottleneck", ylabel="share of −2x missed", title=f"inverting {m} numbers")
    return numbers, [(axes, curves)]


def a6(seed, steps=1000, networks=8, n=10000):
    """A.6, argued in the paper: noise of the code flips a network on [s; z], which must switch pieces to follow
    the mode, and moves one with an adapter in proportion. Both see the same data; their parameters are equally many."""
    adapted = lambda: dmash.Network(1, 1, d_x=32, make_own=lambda: dmash.Hypernetwork(1, 16, 32, 4))
    concat = lambda d_x: dmash.Network(1, 1, d_x=d_x, how="concat", d_told=1)
    size = lambda network: sum(p.numel() for p in network.parameters())
    d_x = min(range(1, 120), key=lambda d_x: abs(size(concat(d_x)) - size(adapted())))
    sigmas, line = [0, 0.01, 0.03, 0.1, 0.3, 1], torch.linspace(-1.5, 1.5, 301)
    numbers = {"parameters, adapter and concatenation": [size(adapted()), size(concat(d_x))], "noise σ": sigmas}
    panels, profiles = [], {}
    for task, code in (("z = ±1", lambda *shape: uniform(*shape).sign()), ("−1 ≤ z ≤ 1", uniform)):
        curves = {}
        for kind, make in (("adapter", adapted), ("concatenation", lambda: concat(d_x))):
            nets = [make() for _ in range(networks)]
            p = stack_module_state(nets)[0]
            f = lambda s, z: vmap(lambda p, s, z: functional_call(nets[0], p, (s, z)))(p, s, z)
            draw = lambda B=64: (uniform(networks, B, 1), code(networks, B, 1))
            torch.manual_seed(seed)
            train(p.values(), product_loss(f), draw, steps, 3e-3)
            (s, z), noise = draw(n), torch.randn(networks, n, 1)
            with torch.no_grad():
                e = torch.stack([(f(s, z + sigma * noise) - s * z).abs().mean((1, 2)) for sigma in sigmas])
                y = f(torch.ones(networks, 301, 1), line.repeat(networks, 1)[..., None])[..., 0]
            numbers[f"{task}, {kind}: E|f(s, z + σε) − s·z|"] = e  # (σ, networks)
            numbers[f"{task}, {kind}: largest |∂f/∂z|, s = 1"] = y.diff().abs().amax(1)[None] * 100
            curves[kind] = sigmas[1:], e.mean(1)[1:], e.std(1)[1:]
            profiles.setdefault(kind, (line[::20], y.mean(0)[::20], y.std(0)[::20]))
        axes = dict(xscale="log", yscale="log", xlabel="noise σ", ylabel="E|f(s, z + σε) − s·z|, mean and s.d.")
        panels.append((axes | dict(title=f"trained on {task}"), curves))
    axes = dict(xlabel="z", ylabel="f(1, z), mean and s.d.", title="trained on z = ±1", ylim=(-1.5, 2.7))
    return numbers, [*panels, (axes, profiles)]


def a15(seed, run=TRAINED, steps=200, n=4000):
    """A.15 on codes of n windows, drawn, of the policy of `run` in its train contexts; as acting reads them, and masked
    and in random order as in training."""
    cfg, agent = dmash.load_policy(run)
    binary = [dim.binary for dim in aib_envs.lookup(cfg.env).context].index(True)
    envs = aib_envs.VectorEnv(cfg.env, aib_envs.context_sets(cfg.env, cfg.contexts)["train"], seed=[seed, 2])
    rollout = dmash.Rollout(agent, envs, noisy=False, capacity=cfg.K + steps)
    for _ in range(steps):  # after a warm-up of K
        rollout.collect()
    c, t = torch.randint(envs.N, (n,)), torch.randint(cfg.K, cfg.K + steps + 1, (n,))
    numbers, curves, parts = {}, {}, ["total", "noise", "spread", "separation"]
    for name, of in (("untrained", dmash.new_agent(cfg)), ("trained", agent)):
        for windows, noisy in (("masked", True), ("plain", False)):
            with torch.no_grad():
                z, _ = of.infer(rollout.replay.windows(c, t, noisy), noisy)
            v = variability(z.numpy(), envs.c[c, binary], c.numpy())
            numbers[f"{name} encoder, {windows} windows: {', '.join(parts)}, what is left"] = [*v, v[0] - sum(v[1:])]
            curves[f"{name}, {windows}"] = parts, v
    return numbers, [(dict(ylabel="(1/d_z) tr Cov(Z)", title=f"encoder of {cfg.env}", yscale="log"), curves)]


class Steering(nn.Module):
    """SAC's policy loss where, in context (S, U), an action of sign S and strength 1 + κU moves the state s, to be
    brought to 0. Its gradient by ξ, of one sample, is the estimator G_Z; η stays as drawn."""

    def __init__(self, kappa):
        super().__init__()
        self.kappa, self.pi = kappa, dmash.Actor(1, 1, d_x=16)
        self.h = dmash.Hypernetwork(3, 16, 16, 4).requires_grad_(False)

    def forward(self, s, z, c):
        Q = lambda s, a, _: -(0.5 * s + c[:, :1] * (1 + self.kappa * c[:, 1:2]) * a).square()
        return dmash.actor_loss(self.pi, Q, 0.01, self.h(z), dmash.Batch(s, *[None] * 5))[0]


def a17(seed, steps=(0, 100, 300, 1000), n=200):
    """A.17, A.18: if tr Cov(G_Z) ≤ V₀ + L_m² tr Cov(Z), less noise and less of U in Z lower the bound. V₀ is E tr
    Cov(G | Z) and L_m the Lipschitz constant of E[G | Z], each the larger of Z = (S, U / 2, noise / 2) and its mean per
    mode, which lets I(U; Z) fall from ln 5 to 0. The policy learns with Z; with the means, G is of the same policy and
    the same random numbers."""
    five, row = torch.linspace(-1, 1, 5), np.arange(50).repeat(n)
    c, panels = torch.cartesian_prod(torch.tensor([-1.0, 1.0]), five, five), []  # S, U, noise: 50 rows, equally likely
    codes = {"Z": c * torch.tensor([1, 0.5, 0.5]), "mean per mode": c * torch.tensor([1, 0, 0])}
    of_z = np.array([z.var(0, correction=0).sum() for z in codes.values()])
    numbers = {"tr Cov(Z), of Z and of its mean per mode": of_z}
    for kappa, title in ((0, "U without effect"), (0.8, "strength 1 + .8 U")):
        model, found, curves = Steering(kappa), [], {}
        one = grad(lambda p, s, z, c: functional_call(model, p, (s[None], z[None], c[None])))
        every = vmap(vmap(one, (None, 0, None, None), randomness="different"), (None, None, 0, 0), randomness="same")
        some = lambda: (uniform(128, 1), codes["Z"][i := torch.randint(50, (128,))], c[i])
        for before, after in zip((0, *steps), steps):
            train(model.pi.parameters(), model, some, after - before, 3e-3)
            p = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
            for name, z in codes.items():
                torch.manual_seed(seed)
                G = torch.cat([g.flatten(2) for g in every(p, uniform(n, 1), z, c).values()], 2)  # (50, n, |ξ|)
                total, noise, spread, _ = variability(G.flatten(0, 1), c[row, 0].numpy(), row)
                m = G.mean(1) if name == "Z" else G.view(2, -1, G.shape[2]).mean(1).repeat_interleave(25, 0)
                slopes = (m[:, None] - m).norm(dim=2) / (z[:, None] - z).norm(dim=2)  # 0 / 0 where codes are equal
                inner = noise + (0 if name == "Z" else spread)
                found.append((total * G.shape[2], inner * G.shape[2], slopes.nan_to_num(0, 0, 0).max()))
        variance, inner, L_m = np.array(found).reshape(-1, 2, 3).T  # (2 codes, stages) each
        bound = inner.max(0) + L_m.max(0) ** 2 * of_z[:, None]
        for name, *values in zip(codes, variance, inner, bound):
            for what, x in zip(("tr Cov(G)", "of it E tr Cov(G | Z)", "bound"), values):
                numbers[f"{title}, {name}: {what} after {list(steps)} steps"] = x
            curves |= {name: (steps, values[0]), f"bound, {name}": (steps, values[2])}
        panels.append((dict(title=title, xlabel="steps of training with Z", ylabel="tr Cov(G)", yscale="log"), curves))
    return numbers, panels


THEOREMS = dict(a1=a1, a2=a2, a5=a5, a6=a6, a15=a15, a17=a17)


def show(x):
    """A number, a list of them, or mean and standard deviation of each row."""
    if np.ndim(x) == 2:
        return ", ".join(f"{row.mean():.4f} ± {row.std():.4f}" for row in x)
    return ", ".join(f"{number:.3g}" for number in np.ravel(x))


def draw_panels(figure, panels):
    looks = list(zip(("#0072B2", "#D55E00", "k", "#009E73"), "o^xs", ("-", "--", ":", "-.")))  # colour-blind, or grey
    for ax, (axes, content) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        if isinstance(content, np.ndarray):
            image = ax.imshow(content, origin="lower", extent=(-1, 1, -1, 1), cmap="cividis", interpolation="none")
            figure.colorbar(image, ax=ax)
        else:
            for (label, (x, y, *spread)), (colour, marker, line) in zip(content.items(), looks):
                line = "" if len(x) > 50 or isinstance(x[0], str) else line
                ax.errorbar(x, y, *spread, color=colour, marker=marker, markersize=4, linestyle=line, label=label)
            ax.legend(fontsize="small")
        ax.set(**axes)


def run_command(args):
    names, out, text = args.names or list(THEOREMS), Path(args.out), ""
    for name in set(names) - set(THEOREMS):
        raise dmash.BadInput(aib_envs.unknown("theorem", name, list(THEOREMS)))
    seed = dmash.number("--seed", args.seed, int, "[0, 4294967295]")
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # these tensors are small
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        Figure = print(f"no figures are drawn ({error})")
    for name in names:
        torch.manual_seed(seed)
        numbers, panels = THEOREMS[name](seed)
        part = "\n".join([name, *(f"    {what}: {show(x)}" for what, x in numbers.items()), ""])
        print(part, flush=True)
        text += part + "\n"
        if Figure:
            figure = Figure(figsize=(1 + 4.5 * len(panels), 4), layout="constrained")
            draw_panels(figure, panels)
            figure.savefig(out / f"{name}.png", dpi=90)
    (out / "theory.txt").write_text(text, encoding="utf-8")


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = dmash.Parser(prog="theory.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(THEOREMS)} (default: all)")
    parser.add_argument("--out", default="results/inside/theory", help="folder to write into (default: %(default)s)")
    parser.add_argument("--seed", default=1, help="of everything random (default: %(default)s)")
    return dmash.exit_status("theory.py", lambda: run_command(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
