"""What would the RL losses teach the encoder and the hypernetwork, and does the dynamics loss pull the same way?

    python studies/gradients.py --env di_inv --method dma_star_sh --quick    a run; a third longer than with dmash.py
    python studies/gradients.py draw RUNS... --out FILE.png                  figure and table of such runs; seconds

The first trains, with the command line of dmash.py; weights and returns are the same, bit for bit. In the 200 updates
before each evaluation it also computes the gradients that Eq. 2 stops, and throws them away: shadow gradients. They are
those of the mean losses of the update's own batch, with its masks and noise, before any weight moves; one number an
update. Mean E and population variance Var over these updates are a row of gradients.csv in the run folder:

    z_pi, eta_pi, xi_pi    ‖∇_z L_π‖, ‖∇_η L_π‖, ‖∇_ξ L_π‖: the policy's loss, through its own ω and the critics'
    z_d, phi_d             ‖∇_z L_d‖, ‖∇_φ L_d‖: the dynamics loss (Eq. 1; without dma_pearl's KL term)
    cos_d_pi, cos_pi_Q     cos(∇_η L_d, ∇_η L_π), cos(∇_η L_π, ∇_η L_Q)

∇_z holds a row per sample, of the size of 1/B. ξ is the policy's trunk and head. Where each network has a hypernetwork
of its own (dma_star_h), η is the policy's, from which the critics' ω do not come, and the cosines are empty: no two
losses have an η in common. Without a hypernetwork all of η is empty.

--resume and --go-on of this program go on with the rows too. metrics.csv counts the shadow gradients' time.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dmash  # noqa: E402

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
PANELS = "E_z_pi E_eta_pi E_cos_d_pi E_cos_pi_Q Var_z_pi Var_xi_pi Var_z_d Var_phi_d".split()  # the paper's
COLUMNS = ("step", *PANELS, "Var_cos_d_pi", "Var_cos_pi_Q")  # of gradients.csv, those that are drawn

# ---- Shadow gradients -------------------------------------------------------------------------------------------


def gradients(loss, **groups):
    """∇loss with respect to each group of tensors, flat, by the group's name. Writes no `.grad`."""
    parts = iter(torch.autograd.grad(loss, [x for group in groups.values() for x in group], retain_graph=True))
    return {name: torch.cat([next(parts).flatten() for _ in group]) for name, group in groups.items() if group}


def cosine(x, y):
    return (x @ y / (x.norm() * y.norm())).item()


def shadow(agent, batch):
    """Of the NUMBERS, those that the method has. Draws from torch's generator what the update of `batch` draws."""
    pi, Q, alpha = agent.pi, agent.Q, agent.alpha
    z, told, _ = agent.tell(batch.tau, batch.c, noisy=True)  # not detached: what follows is Agent.update without line 4
    L_d = dmash.dynamics_loss(agent.f, told, batch)
    L_Q = dmash.critic_loss(pi, Q, agent.Q_target, alpha, told, batch, agent.cfg.gamma)
    L_pi, _ = dmash.actor_loss(pi, Q, alpha, told, batch)
    shared = list(agent.h.parameters()) if agent.h else []
    own = list(pi.own.parameters()) if pi.own else []
    of_pi = gradients(L_pi, z=[z], eta=shared or own, xi=[*pi.trunk.parameters(), *pi.head.parameters()])
    of_d = gradients(L_d, z=[z], eta=shared, phi=list(agent.g.parameters()))
    numbers = {f"{name}_pi": g.norm().item() for name, g in of_pi.items()}
    numbers |= {f"{name}_d": of_d[name].norm().item() for name in ("z", "phi")}
    if shared:
        numbers["cos_d_pi"] = cosine(of_d["eta"], of_pi["eta"])
        numbers["cos_pi_Q"] = cosine(of_pi["eta"], gradients(L_Q, eta=shared)["eta"])
    return numbers


def row(step, shadows):
    """A row of gradients.csv: mean and variance of the numbers of some updates."""
    columns = {"step": step, "updates": len(shadows)}
    for name in NUMBERS:
        values = [numbers[name] for numbers in shadows if name in numbers]
        columns[f"E_{name}"] = float(np.mean(values)) if values else ""
        columns[f"Var_{name}"] = float(np.var(values)) if values else ""
    return columns


class ShadowAgent(dmash.Agent):
    def __init__(self, cfg, *sizes):
        super().__init__(cfg, *sizes)
        self.shadows = []  # numbers of the updates since the last evaluation

    def update(self, batch, step):
        cfg = self.cfg
        if min(-step % cfg.eval_every, cfg.steps - step) < UPDATES:  # steps to the next evaluation
            with torch.random.fork_rng(devices=[cfg.device] if cfg.device != "cpu" else []):
                self.shadows.append(shadow(self, batch))
        return super().update(batch, step)


class ShadowRun(dmash.Run):
    def __init__(self, cfg, folder):
        encoding = [name for name, method in dmash.METHODS.items() if method.context == "inferred"]
        if cfg.method not in encoding:
            raise dmash.BadInput(f"--method {cfg.method}: has no encoder; allowed: {', '.join(encoding)}")
        super().__init__(cfg, folder)

    def evaluate(self, stop=lambda: None):
        super().evaluate(stop)
        self.history[-1]["gradients"] = row(self.step, self.agent.shadows)
        self.agent.shadows = []

    def save(self):
        super().save()
        if rows := [evaluation["gradients"] for evaluation in self.history if "gradients" in evaluation]:
            text = dmash.csv_text(rows)
            dmash.replace_file(self.folder / "gradients.csv", lambda file: file.write(text.encode()))

    def state_dict(self):
        return super().state_dict() | {"shadows": self.agent.shadows}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.agent.shadows = state.get("shadows", [])  # none in a checkpoint of dmash.py


# ---- Figure -----------------------------------------------------------------------------------------------------


def read(folder):
    """The method of a run, its name in the legend, and the columns of its gradients.csv, nan where one is empty."""
    if not (folder / "gradients.csv").is_file():
        raise dmash.BadInput(f"{folder}: has no gradients.csv; allowed: run folders that this program has trained")
    with dmash.reading(folder / "gradients.csv"):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        rows = list(csv.DictReader((folder / "gradients.csv").read_text(encoding="utf-8").splitlines()))
        columns = {name: np.array([float(row[name] or "nan") for row in rows]) for name in COLUMNS}
        return config["method"], "{method}, {env}, seed {seed}".format(**config), columns


def figure(runs):
    """A panel for each of PANELS, a line for each run; cosines with a band of a standard deviation over updates."""
    from compare_figures import style
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 6.4), layout="constrained")
    for ax, name in zip(figure.subplots(2, 4, sharex=True).flat, PANELS):
        of, number = name.split("_", 1)
        ax.set(title=f"{of} {NUMBERS[number]}", xlabel="gradient steps")
        ax.set(**dict(ylim=(-1, 1)) if "cos" in name else dict(yscale="log"))
        for method, label, columns in runs:
            x, y = columns["step"], columns[name]
            ax.plot(x, y, **style(method) | {"label": label})
            if "cos" in name:
                std = np.sqrt(columns[f"Var_{number}"])
                ax.fill_between(x, y - std, y + std, color=style(method)["color"], alpha=0.2, linewidth=0)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, handlelength=4)
    return figure


def draw(folders, out):
    """Writes the figure; prints the numbers of the last step that all runs have."""
    if out.suffix != ".png":
        raise dmash.BadInput(f"--out {out}: must end in .png")
    runs = [read(folder) for folder in folders]
    if common := set.intersection(*(set(columns["step"]) for *_, columns in runs)):
        print(f"{f'step {max(common):,.0f}':<12}" + "  ".join(label for _, label, _ in runs))
    for name in PANELS if common else ():
        values = [(label, columns[name][columns["step"] == max(common)][0]) for _, label, columns in runs]
        print(f"{name:<12}" + "  ".join(f"{value:<{len(label)}.3g}" for label, value in values))
    try:
        picture = figure(runs)
    except ImportError as error:
        return print(f"no figure is drawn ({error})")
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(out, dpi=110)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] != ["draw"]:
        before, dmash.Agent, dmash.Run = (dmash.Agent, dmash.Run), ShadowAgent, ShadowRun
        try:
            return dmash.main(argv)
        finally:
            dmash.Agent, dmash.Run = before
    parser = dmash.Parser("gradients.py draw", allow_abbrev=False)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUNS", help="of runs made by this program")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.png", help="the figure")
    return dmash.exit_status("gradients.py", lambda: draw(**vars(parser.parse_args(argv[1:]))))


if __name__ == "__main__":
    sys.exit(main())
