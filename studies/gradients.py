"""What would the RL losses teach encoder and hypernetwork, and does the dynamics loss agree?

    python studies/gradients.py --env di_inv --method dma_star_sh --quick
    python studies/gradients.py draw RUN [RUN ...] --out FILE.png

The first command trains like dmash.py and takes all of its flags, also --resume and --go-on for
runs that it began. Weights and returns are the same, bit for bit. A run takes a third longer.

In the 200 updates before each evaluation the program also computes the gradients that Eq. 2 stops,
and throws them away: shadow gradients. They are those of the update's own batch, masks and noise,
before any weight moves. Their mean E and population variance Var over these updates are a row of
gradients.csv in the run folder:

    z_pi, eta_pi, xi_pi    ‖∇_z L_π‖, ‖∇_η L_π‖, ‖∇_ξ L_π‖ of the policy's loss, through all its ω
    z_d, phi_d             ‖∇_z L_d‖, ‖∇_φ L_d‖ of the dynamics loss (Eq. 1, without a KL term)
    cos_d_pi, cos_pi_Q     cos(∇_η L_d, ∇_η L_π), cos(∇_η L_π, ∇_η L_Q)

Losses are means over the batch, so the rows of ∇_z are of the size of 1/B. ξ is the policy's trunk
and head. Where each network has its own hypernetwork (dma_star_h), η is the policy's. No two losses
share it, so the cosines are empty. Without any hypernetwork all of η is empty.

The second command takes seconds. It draws the tables of such runs.
"""

import math
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import runs as reader
import torch
from runs import dmash

UPDATES = 200  # before an evaluation, of which gradients are taken
NUMBERS = {  # of one update, and how they are written in the figure
    "z_pi": r"$\Vert\nabla_z L_\pi\Vert$",
    "eta_pi": r"$\Vert\nabla_\eta L_\pi\Vert$",
    "xi_pi": r"$\Vert\nabla_\xi L_\pi\Vert$",
    "z_d": r"$\Vert\nabla_z L_d\Vert$",
    "phi_d": r"$\Vert\nabla_\phi L_d\Vert$",
    "cos_d_pi": r"$\cos(\nabla_\eta L_d, \nabla_\eta L_\pi)$",
    "cos_pi_Q": r"$\cos(\nabla_\eta L_\pi, \nabla_\eta L_Q)$",
}
PANELS = ["E_z_pi", "E_eta_pi", "E_cos_d_pi", "E_cos_pi_Q"]  # the paper's
PANELS += ["Var_z_pi", "Var_xi_pi", "Var_z_d", "Var_phi_d"]

# ---- Shadow gradients ---------------------------------------------------------------------------


def gradient(loss, parameters):
    """∇loss with respect to some tensors, as one vector. Writes no `.grad`."""
    parts = torch.autograd.grad(loss, list(parameters), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


def norm(loss, parameters):
    return gradient(loss, parameters).norm().item()


def cosine(x, y):
    return (x @ y / (x.norm() * y.norm())).item()


def shadow(agent, batch):
    """Of the NUMBERS, those that the method has.

    This is Agent.update without line 4, the stop-gradient. It draws from torch's generator what
    the update of `batch` draws.
    """
    pi, Q, alpha = agent.pi, agent.Q, agent.alpha
    z, omega = agent.infer(batch.tau, True, batch.c)
    L_d = dmash.dynamics_loss(agent.f, omega, batch)
    L_Q = dmash.critic_loss(pi, Q, agent.Q_target, alpha, omega, batch, agent.cfg.gamma)
    L_pi, _ = dmash.actor_loss(pi, Q, alpha, omega, batch)
    numbers = {
        "z_pi": norm(L_pi, [z]),
        "xi_pi": norm(L_pi, [*pi.trunk.parameters(), *pi.head.parameters()]),
        "z_d": norm(L_d, [z]),
        "phi_d": norm(L_d, agent.g.parameters()),
    }
    if agent.h is not None:
        eta = list(agent.h.parameters())
        eta_pi = gradient(L_pi, eta)
        numbers["eta_pi"] = eta_pi.norm().item()
        numbers["cos_d_pi"] = cosine(gradient(L_d, eta), eta_pi)
        numbers["cos_pi_Q"] = cosine(eta_pi, gradient(L_Q, eta))
    elif pi.own is not None:
        numbers["eta_pi"] = norm(L_pi, pi.own.parameters())
    return numbers


def row_of(step, shadows):
    """A row of gradients.csv: mean and variance of the numbers of some updates."""
    row = {"step": step, "updates": len(shadows)}
    for name in NUMBERS:
        values = [numbers[name] for numbers in shadows if name in numbers]
        row[f"E_{name}"] = float(np.mean(values)) if values else ""
        row[f"Var_{name}"] = float(np.var(values)) if values else ""
    return row


class ShadowRun(dmash.Run):
    """A run that looks at each batch before its agent's update does."""

    def __init__(self, cfg, folder):
        if dmash.METHODS[cfg.method].context != "z":
            allowed = "methods that infer the context"
            raise dmash.BadInput(f"--method {cfg.method}: has no encoder; allowed: {allowed}")
        super().__init__(cfg, folder)
        self.gradients = []  # the rows of gradients.csv
        self.shadows = []  # numbers of the updates since the last evaluation
        self.plain_update = self.agent.update
        self.agent.update = self.update

    def update(self, batch, step):
        cfg = self.cfg
        to_evaluation = min(-step % cfg.eval_every, cfg.steps - step)
        if to_evaluation < UPDATES:
            gpus = [] if cfg.device == "cpu" else [cfg.device]
            with torch.random.fork_rng(devices=gpus):
                self.shadows.append(shadow(self.agent, batch))
        return self.plain_update(batch, step)

    def evaluate(self):
        super().evaluate()
        self.gradients.append(row_of(self.step, self.shadows))
        self.shadows = []

    def save(self):
        super().save()
        if self.gradients:
            dmash.replace_file(self.folder / "gradients.csv", dmash.csv_text(self.gradients))

    def state_dict(self):
        return super().state_dict() | {"gradients": self.gradients, "shadows": self.shadows}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.gradients, self.shadows = state["gradients"], state["shadows"]


# ---- Figure -------------------------------------------------------------------------------------


def read(folder):
    """The run in a folder, and the rows of its gradients.csv."""
    rows = reader.read_table(folder / "gradients.csv", ("step", "E_z_pi", "Var_z_pi"), texts=())
    if not rows:
        raise dmash.BadInput(f"{folder}: gradients.csv has no rows yet")
    return reader.read_run(folder), rows


def column(rows, name):
    """nan where it is blank."""
    return np.array([row.get(name, math.nan) for row in rows])


def figure(runs):
    """A panel for each of PANELS, a line for each run.

    Cosines have a band of a standard deviation over updates.
    """
    from compare_figures import style
    from figures import Figure

    figure = Figure(figsize=(15, 6.4), layout="constrained")
    for ax, name in zip(figure.subplots(2, 4, sharex=True).flat, PANELS):
        of, number = name.split("_", 1)
        ax.set(title=f"{of} {NUMBERS[number]}", xlabel="gradient steps")
        band = number.startswith("cos")
        if band:
            ax.set_ylim(-1, 1)
        else:
            ax.set_yscale("log")
        for run, rows in runs:
            x, y = column(rows, "step"), column(rows, name)
            look = style(reader.paper_name(run.method))
            look["label"] = f"{run.method}, {run.env}, seed {run.seed}"
            ax.plot(x, y, **look)
            if band:
                std = np.sqrt(column(rows, f"Var_{number}"))
                ax.fill_between(x, y - std, y + std, color=look["color"], alpha=0.2, linewidth=0)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, handlelength=4)
    return figure


def draw(folders, out):
    runs = [read(folder) for folder in reader.distinct(folders)]
    out.parent.mkdir(parents=True, exist_ok=True)
    figure(runs).savefig(out, dpi=110, format="png")


# ---- Command line -------------------------------------------------------------------------------


def main(argv=None):
    """The command line. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["draw"]:
        parser = dmash.Parser("gradients.py draw", allow_abbrev=False)
        parser.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="run folders")
        parser.add_argument("--out", required=True, type=Path, help="a PNG file")
        return dmash.exit_status("gradients.py", lambda: draw(**vars(parser.parse_args(argv[1:]))))
    parser = dmash.build_parser()
    parser.prog, parser.description = "gradients.py", __doc__

    def command():
        with mock.patch.object(dmash, "Run", ShadowRun):
            dmash.run_command(vars(parser.parse_args(argv)))

    return dmash.exit_status("gradients.py", command)


if __name__ == "__main__":
    sys.exit(main())
