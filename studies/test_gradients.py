"""Tests of studies/gradients.py: short, and on small settings."""

import copy
import csv
import math

import gradients
import numpy as np
import pytest
import torch

import dmash

SMALL = dict(env="di_inv", contexts=4, batch=16, threads=1, hidden=16, hyper_hidden=8, bottleneck=4, random_steps=30)


def command(folder, method="dma_star_sh", **settings):
    """SMALL and more as words of the command line."""
    settings = SMALL | dict(method=method, rollouts=1, out=folder) | settings
    return [str(word) for name, value in settings.items() for word in (dmash.flag(name), value)]


def started(kind, folder, **settings):
    """A run of class `kind`, past its random steps."""
    run = kind(dmash.Config(**SMALL | settings), folder)
    for _ in range(40):
        run.rollout.collect(random=True)
    return run


def tensors(x):
    """All tensors and numbers in a checkpoint, but for its times."""
    if isinstance(x, dict):
        return [t for name, value in x.items() if name not in ("seconds", "shadows") for t in tensors(value)]
    return [t for value in x for t in tensors(value)] if isinstance(x, (list, tuple)) else [x]


@pytest.mark.parametrize("method", ["dma_star_sh", "dma_star_h", "dma_pearl", "both_into_eta"])
def test_training_is_the_same_with_and_without_shadow_gradients(method, tmp_path, monkeypatch):
    runs, states = [], []
    for kind in (dmash.Run, gradients.ShadowRun):
        runs.append(run := started(kind, tmp_path, method=method, steps=6))
        for _ in range(6):
            run.gradient_step()
        states.append(tensors(run.state_dict()))  # with the generator, which the runs share
        monkeypatch.setattr(dmash, "Agent", gradients.ShadowAgent)
    plain, shadowed = states
    assert len(runs[1].agent.shadows) == 6 and len(plain) == len(shadowed) > 100
    for x, y in zip(plain, shadowed):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    for x, y in zip(*(run.agent.parameters() for run in runs)):
        assert (x.grad is None and y.grad is None) or torch.equal(x.grad, y.grad)


@pytest.fixture
def case(request, tmp_path):
    """An agent in float64 after two steps of training, and a batch."""
    run = started(dmash.Run, tmp_path, method=request.param)
    run.gradient_step(), run.gradient_step()
    batch = run.rollout.replay.sample(16)
    return run.agent.double(), dmash.Batch(*(x.double() for x in batch))


def losses(agent, batch, move=None):
    """z and the three losses, each with all of its graph, for one draw of masks and noise; z may be moved."""
    torch.manual_seed(5)
    z, _, _ = agent.tell(batch.tau, batch.c, noisy=True)
    z = z if move is None else z + move
    z.retain_grad() if z.requires_grad else None
    told = agent.h(z) if agent.h else z
    L_d = dmash.dynamics_loss(agent.f, told, batch)
    L_Q = dmash.critic_loss(agent.pi, agent.Q, agent.Q_target, agent.alpha, told, batch, agent.cfg.gamma)
    return z, {"d": L_d, "Q": L_Q, "pi": dmash.actor_loss(agent.pi, agent.Q, agent.alpha, told, batch)[0]}


def by_backward(agent, batch, name):
    """A copy of the agent that holds the gradients of a loss, and that of z."""
    agent = copy.deepcopy(agent)
    agent.zero_grad()
    z, values = losses(agent, batch)
    values[name].backward()
    return agent, z.grad


def flat(tensors):
    return np.concatenate([x.grad.numpy().ravel() for x in tensors])


def cosine(x, y):
    return x @ y / math.sqrt((x @ x) * (y @ y))


@pytest.mark.parametrize("case", ["dma_star_sh", "dma_star_h", "rl_adapters", "dma_star"], indirect=True)
def test_numbers_against_backward_without_the_stop_gradient(case):
    agent, batch = case
    agent.zero_grad()
    torch.manual_seed(5)
    numbers = gradients.shadow(agent, batch)
    assert all(p.grad is None for p in agent.parameters())
    (d, z_d), (pi, z_pi), (Q, _) = (by_backward(agent, batch, name) for name in ("d", "pi", "Q"))
    own = [p for name, p in pi.pi.named_parameters() if "own" in name]
    xi = [p for name, p in pi.pi.named_parameters() if "own" not in name]
    norm = np.linalg.norm
    expected = {"z_pi": norm(z_pi), "xi_pi": norm(flat(xi)), "z_d": norm(z_d), "phi_d": norm(flat(d.g.parameters()))}
    if own:
        expected["eta_pi"] = norm(flat(own))
    if agent.h:
        of_d, of_pi, of_Q = (flat(copied.h.parameters()) for copied in (d, pi, Q))
        expected |= {"eta_pi": norm(of_pi), "cos_d_pi": cosine(of_d, of_pi), "cos_pi_Q": cosine(of_pi, of_Q)}
    assert numbers == pytest.approx(expected, rel=1e-9)
    assert bool(own) == (agent.method.hypernetwork == "own") and min(abs(x) for x in numbers.values()) > 0


@pytest.mark.parametrize("case", ["dma_star_sh", "dma_star_h"], indirect=True)
def test_gradients_of_z_against_finite_differences(case):
    """Through every ω that the loss uses: that of π and those of both critics."""
    agent, batch = case
    torch.manual_seed(5)
    numbers, slopes, step = gradients.shadow(agent, batch), {"pi": [], "d": []}, 1e-6
    with torch.no_grad():
        for move in step * torch.eye(16 * 8, dtype=torch.float64).unflatten(-1, (16, 8)):
            (_, above), (_, below) = losses(agent, batch, move), losses(agent, batch, -move)
            for name, of in slopes.items():
                of.append((above[name] - below[name]).item() / (2 * step))
    for name, of in slopes.items():
        assert numbers[f"z_{name}"] == pytest.approx(np.linalg.norm(of), rel=1e-4)


@pytest.mark.parametrize("case", ["dma_star_sh"], indirect=True)
def test_cosine_of_a_loss_with_itself_and_with_its_opposite(case, monkeypatch):
    agent, batch = case
    plain = dmash.dynamics_loss
    nothing = 0 * sum(p.sum() for p in agent.pi.parameters())
    monkeypatch.setattr(dmash, "critic_loss", lambda pi, Q, T, alpha, told, b, gamma: 3 * plain(agent.f, told, b))
    monkeypatch.setattr(dmash, "actor_loss", lambda pi, Q, alpha, told, b: (nothing - plain(agent.f, told, b), None))
    monkeypatch.setattr(dmash, "dynamics_loss", lambda f, told, b: -2 * plain(f, told, b))
    numbers = gradients.shadow(agent, batch)
    assert (numbers["cos_d_pi"], numbers["cos_pi_Q"]) == pytest.approx((1, -1))
    assert numbers["z_d"] == pytest.approx(2 * numbers["z_pi"])


def table(folder, method):
    with open(folder / f"di_inv__{method}__s1" / "gradients.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("method", ["dma_star_sh", "dma_star_h"])
def test_a_row_per_evaluation_of_the_updates_before_it(method, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gradients, "UPDATES", 3)
    seen, plain, before = [], gradients.shadow, (dmash.Agent, dmash.Run)
    monkeypatch.setattr(gradients, "shadow", lambda *arguments: seen.append(plain(*arguments)) or seen[-1])
    assert gradients.main(command(tmp_path, method, steps=12, eval_every=5)) == 0
    assert (dmash.Agent, dmash.Run) == before
    rows = table(tmp_path, method)
    assert [(row["step"], row["updates"]) for row in rows] == [("5", "3"), ("10", "3"), ("12", "2")]
    for row, numbers in zip(rows, (seen[:3], seen[3:6], seen[6:])):
        for name in gradients.NUMBERS:
            values = [of[name] for of in numbers if name in of]
            found = [row[f"{of}_{name}"] for of in ("E", "Var")]
            if values:
                mean = sum(values) / len(values)
                spread = sum((x - mean) ** 2 for x in values) / len(values)
                assert [float(x) for x in found] == pytest.approx([mean, spread], rel=1e-5)
            else:
                assert found == ["", ""] and method == "dma_star_h" and "cos" in name
    assert len(seen) == 8
    # and drawn
    picture = tmp_path / "new" / "a.png"
    assert gradients.main(["draw", str(tmp_path / f"di_inv__{method}__s1"), "--out", str(picture)]) == 0
    said = capsys.readouterr().out
    assert picture.read_bytes()[:4] == b"\x89PNG" and "step 12" in said and f"{method}, di_inv, seed 1" in said


def test_a_run_stopped_between_evaluations_has_the_rows_of_one_that_was_not(tmp_path, monkeypatch):
    settings = dict(steps=6, eval_every=3)
    assert gradients.main(command(tmp_path / "whole", **settings)) == 0
    steps, plain = [], dmash.Run.gradient_step

    def stopping(run):
        if run.step == 5 and not steps:
            raise dmash.Stopped
        plain(run)

    monkeypatch.setattr(dmash.Run, "gradient_step", stopping)
    assert gradients.main(command(tmp_path / "halves", **settings)) == 0
    assert [row["step"] for row in table(tmp_path / "halves", "dma_star_sh")] == ["3"]
    steps.append(5)
    assert gradients.main(command(tmp_path / "halves", **settings, seed=1) + ["--go-on"]) == 0
    assert table(tmp_path / "halves", "dma_star_sh") == table(tmp_path / "whole", "dma_star_sh")


def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, capsys):
    for arguments, message in (
        (command(tmp_path, "concat"), "--method concat: has no encoder; allowed: dma_star_sh, dma_star_h"),
        (["draw", str(tmp_path), "--out", "a.png"], "has no gradients.csv"),
        (["draw", str(tmp_path), "--out", "a.pdf"], "a.pdf: must end in .png"),
        (["draw"], "required: RUNS, --out"),
    ):
        assert gradients.main(arguments) == 2
        said = capsys.readouterr()
        assert message in said.err and said.err.count("\n") == 1 and not list(tmp_path.iterdir())
