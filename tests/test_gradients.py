"""Tests of studies/gradients.py: short, and on small settings."""

import copy
import csv
import statistics

import gradients
import numpy as np
import pytest
import torch
from untrained import SMALL, refusal

import dmash

SETTINGS = SMALL | dict(env="di_inv", random_steps=30, rollouts=1)


def train(folder, *words, **settings):
    """The exit status of a training command."""
    settings = SETTINGS | dict(out=folder) | settings
    arguments = [f"{dmash.flag(name)}={value}" for name, value in settings.items()]
    return gradients.main([*arguments, *words])


def table(folder, method="dma_star_sh"):
    text = (folder / f"di_inv__{method}__s1" / "gradients.csv").read_text()
    return list(csv.DictReader(text.splitlines()))


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
    """A copy of the agent that holds the gradients of a loss, and that of z."""
    agent = copy.deepcopy(agent)
    z, values = losses(agent, batch)
    z.retain_grad()
    values[name].backward()
    return agent, z.grad.numpy()


def flat(parameters):
    return np.concatenate([p.grad.numpy().ravel() for p in parameters])


def cosine(x, y):
    return x @ y / np.sqrt((x @ x) * (y @ y))


ADAPTED = ["dma_star_sh", "dma_star_h"]


@pytest.mark.parametrize("case", [*ADAPTED, "dma_star"], indirect=True)
def test_numbers_against_backward_without_the_stop_gradient(case):
    agent, batch, numbers = case
    assert all(p.grad is None for p in agent.parameters())
    d, z_d = by_backward(agent, batch, "d")
    pi, z_pi = by_backward(agent, batch, "pi")
    Q, _ = by_backward(agent, batch, "Q")
    own = [p for name, p in pi.pi.named_parameters() if "own" in name]
    xi = [p for name, p in pi.pi.named_parameters() if "own" not in name]
    vectors = {"z_pi": z_pi, "xi_pi": flat(xi), "z_d": z_d, "phi_d": flat(d.g.parameters())}
    cosines = {}
    if own:
        vectors["eta_pi"] = flat(own)
    if pi.h is not None:
        of_d, of_pi, of_Q = (flat(agent.h.parameters()) for agent in (d, pi, Q))
        vectors["eta_pi"] = of_pi
        cosines = {"cos_d_pi": cosine(of_d, of_pi), "cos_pi_Q": cosine(of_pi, of_Q)}
    norms = {name: np.linalg.norm(vector) for name, vector in vectors.items()}
    assert numbers == pytest.approx(norms | cosines, rel=1e-9)
    assert 0 not in numbers.values()


@pytest.mark.parametrize("case", ADAPTED, indirect=True)
def test_gradients_of_z_against_finite_differences(case):
    """Through every ω that the loss uses: that of π and those of both critics."""
    agent, batch, numbers = case
    slopes = {"pi": [], "d": []}
    for move in 1e-6 * torch.eye(16 * 8, dtype=torch.float64).unflatten(-1, (16, 8)):
        _, above = losses(agent, batch, move)
        _, below = losses(agent, batch, -move)
        for name, values in slopes.items():
            values.append((above[name] - below[name]).item() / 2e-6)
    for name, values in slopes.items():
        assert numbers[f"z_{name}"] == pytest.approx(np.linalg.norm(values), rel=1e-4)


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
    rows = table(tmp_path, method)
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

    picture = tmp_path / "new" / "a.png"
    run = f"{tmp_path}/di_inv__{method}__s1"
    assert gradients.main(["draw", run, "--out", str(picture)]) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_run_stopped_between_evaluations_has_the_rows_of_one_that_was_not(tmp_path, monkeypatch):
    settings = dict(steps=6, eval_every=3)
    assert train(tmp_path / "whole", **settings) == 0
    plain = dmash.Run.gradient_step

    def stopping(run):
        plain(run)
        if run.step == 5:
            run.on_signal(15, None)

    with monkeypatch.context() as patch:
        patch.setattr(dmash.Run, "gradient_step", stopping)
        assert train(tmp_path / "halves", **settings) == 128 + 15
    assert [row["step"] for row in table(tmp_path / "halves")] == ["3"]
    assert train(tmp_path / "halves", "--go-on", **settings) == 0
    assert table(tmp_path / "halves") == table(tmp_path / "whole")


def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    draw = ["draw", run, "--out", tmp_path / "a.png"]
    assert "gradients.csv: No such file" in refusal(gradients, draw, capsys)
    updates = [dict.fromkeys(gradients.NUMBERS, x) for x in (0.25, 0.5)]
    whole = dmash.csv_text([gradients.row_of(step, updates) for step in (5, 10)])
    for text, message in (
        (whole[:-1], "the last line is torn"),
        (whole.splitlines()[0] + "\n", "has no rows"),
        (whole, "config.json"),
    ):
        (run / "gradients.csv").write_text(text)
        assert message in refusal(gradients, draw, capsys)
    assert "given twice" in refusal(gradients, ["draw", run, *draw[1:]], capsys)
    assert "concat: has no encoder" in refusal(gradients, ["--method", "concat"], capsys)
    assert list(tmp_path.iterdir()) == [run]
