"""Tests of studies/gradients.py: short, and on small settings."""

import statistics

import gradients
import numpy as np
import pytest
import torch
from untrained import SMALL, refusal, succeed, table

import dmash

SETTINGS = SMALL | dict(env="di_inv", random_steps=30, rollouts=1)


def train(folder, *words, **settings):
    """The exit status of a training command."""
    settings = SETTINGS | dict(out=folder) | settings
    arguments = [f"{dmash.flag(name)}={value}" for name, value in settings.items()]
    return gradients.main([*arguments, *words])


def trained(kind, folder, steps, **settings):
    """A run of class `kind`, past its random steps and some gradient steps."""
    run = kind(dmash.Config(**SETTINGS, **settings), folder)
    for _ in range(40):
        run.rollout.collect(random=True)
    for _ in range(steps):
        run.gradient_step()
    return run


@pytest.mark.parametrize("method", ["dma_star_sh", "dma_pearl"])
def test_training_is_the_same_with_and_without_shadow_gradients(method, tmp_path):
    plain = trained(dmash.Run, tmp_path, 6, method=method)
    generator = torch.get_rng_state()
    run = trained(gradients.ShadowRun, tmp_path, 6, method=method, eval_every=6)
    assert len(run.shadows) == 6
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(run.rollout.replay.rows, plain.rollout.replay.rows)
    for other, expected in zip(run.agent.parameters(), plain.agent.parameters()):
        assert torch.equal(other, expected)


# ---- The numbers of one update ------------------------------------------------------------------


@pytest.fixture
def case(request, tmp_path):
    """An agent in float64 after two steps of training, a batch, and the numbers of its update."""
    run = trained(dmash.Run, tmp_path, 2, method=request.param)
    batch = dmash.Batch(*(x.double() for x in run.rollout.replay.sample(16)))
    agent = run.agent.double()
    agent.zero_grad()
    torch.manual_seed(5)
    return agent, batch, gradients.shadow(agent, batch)


def losses(agent, batch, move=0):
    """z and the three losses with the same masks and noise, each with all of its graph."""
    torch.manual_seed(5)
    z, _ = agent.infer(batch.tau, noisy=True)
    z = z + move
    omega = z if agent.h is None else agent.h(z)
    pi, Q, alpha = agent.pi, agent.Q, agent.alpha
    L_d = dmash.dynamics_loss(agent.f, omega, batch)
    L_Q = dmash.critic_loss(pi, Q, agent.Q_target, alpha, omega, batch, agent.cfg.gamma)
    L_pi, _ = dmash.actor_loss(pi, Q, alpha, omega, batch)
    return z, {"d": L_d, "Q": L_Q, "pi": L_pi}


def by_backward(agent, batch, name):
    """The gradients of a loss by z and by the parameters, flat and by name."""
    agent.zero_grad()
    z, values = losses(agent, batch)
    z.retain_grad()
    values[name].backward()
    tensors = {"z": z, **dict(agent.named_parameters())}
    return {name: x.grad.flatten() for name, x in tensors.items() if x.grad is not None}


def part(gradients, *starts):
    """Of the parameters whose names start so, as one vector."""
    return np.concatenate([x for name, x in gradients.items() if name.startswith(starts)])


def cosine(x, y):
    return x @ y / np.sqrt((x @ x) * (y @ y))


ADAPTED = ["dma_star_sh", "dma_star_h"]


@pytest.mark.parametrize("case", [*ADAPTED, "dma_star"], indirect=True)
def test_numbers_against_backward_without_the_stop_gradient(case):
    agent, batch, numbers = case
    assert all(p.grad is None for p in agent.parameters())
    d, pi, Q = (by_backward(agent, batch, name) for name in ("d", "pi", "Q"))
    vectors = {"z_pi": pi["z"], "xi_pi": part(pi, "pi.trunk", "pi.head")}
    vectors |= {"z_d": d["z"], "phi_d": part(d, "g.")}
    cosines = {}
    if agent.method.hypernetwork != "none":
        vectors["eta_pi"] = part(pi, "h.", "pi.own")
    if agent.method.hypernetwork == "shared":
        cosines["cos_d_pi"] = cosine(part(d, "h."), part(pi, "h."))
        cosines["cos_pi_Q"] = cosine(part(pi, "h."), part(Q, "h."))
    norms = {name: np.linalg.norm(vector) for name, vector in vectors.items()}
    assert numbers == pytest.approx(norms | cosines, rel=1e-9)
    assert 0 not in numbers.values()


@pytest.mark.parametrize("case", ADAPTED, indirect=True)
def test_gradients_of_z_against_finite_differences(case):
    """Through every ω that the loss uses: that of π and those of both critics."""
    agent, batch, numbers = case
    slopes = []  # of both losses
    for move in 1e-6 * torch.eye(16 * 8, dtype=torch.float64).unflatten(-1, (16, 8)):
        _, above = losses(agent, batch, move)
        _, below = losses(agent, batch, -move)
        slopes.append([(above[name] - below[name]).item() / 2e-6 for name in ("pi", "d")])
    found = numbers["z_pi"], numbers["z_d"]
    assert found == pytest.approx(np.linalg.norm(slopes, axis=0), rel=1e-4)


# ---- The program --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ADAPTED)
def test_a_row_per_evaluation_of_the_updates_before_it(method, tmp_path, monkeypatch):
    seen = []
    plain = gradients.shadow

    def shadow(*case):
        seen.append(plain(*case))
        return seen[-1]

    monkeypatch.setattr(gradients, "UPDATES", 3)
    monkeypatch.setattr(gradients, "shadow", shadow)
    before = dmash.Run
    assert train(tmp_path, method=method, steps=12, eval_every=5) == 0
    assert dmash.Run is before
    run = tmp_path / f"di_inv__{method}__s1"
    rows = table(run / "gradients.csv")
    assert [(row["step"], row["updates"]) for row in rows] == [("5", "3"), ("10", "3"), ("12", "2")]
    assert len(seen) == 8
    for row, updates in zip(rows, (seen[:3], seen[3:6], seen[6:])):
        for name in gradients.NUMBERS:
            values = [numbers[name] for numbers in updates if name in numbers]
            mean, variance = "", ""
            if values:
                mean = f"{statistics.fmean(values):.6g}"
                variance = f"{statistics.pvariance(values):.6g}"
            assert (row[f"E_{name}"], row[f"Var_{name}"]) == (mean, variance)

    (curve,) = gradients.figure([gradients.read(run)]).axes[0].lines
    points = [[float(row["step"]), float(row["E_z_pi"])] for row in rows]
    assert curve.get_xydata().tolist() == points
    picture = tmp_path / "new" / "a.picture"
    succeed(gradients, "draw", run, "--out", picture)
    assert picture.exists()


def test_a_run_stopped_between_evaluations_has_the_rows_of_one_that_was_not(tmp_path, monkeypatch):
    settings = dict(steps=6, eval_every=3)
    name = "di_inv__dma_star_sh__s1/gradients.csv"
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train(whole, **settings) == 0
    plain = dmash.Run.gradient_step

    def stopping(run):
        plain(run)
        if run.step == 5:
            run.on_signal(15, None)

    monkeypatch.setattr(dmash.Run, "gradient_step", stopping)
    assert train(halves, **settings) == 128 + 15
    monkeypatch.undo()
    assert [row["step"] for row in table(halves / name)] == ["3"]
    assert train(halves, "--go-on", **settings) == 0
    assert table(halves / name) == table(whole / name)


def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    draw = ["draw", run, "--out", tmp_path / "a.png"]
    assert "gradients.csv: No such file" in refusal(gradients, draw, capsys)
    head = "step,E_z_pi,Var_z_pi\n"
    for text, message in (
        (head + "5,1,2", "the last line is torn"),
        (head, "has no rows"),
        (head + "5,1,2\n", "config.json"),
    ):
        (run / "gradients.csv").write_text(text)
        assert message in refusal(gradients, draw, capsys)
    assert "concat: has no encoder" in refusal(gradients, ["--method", "concat"], capsys)
    assert list(tmp_path.iterdir()) == [run]
