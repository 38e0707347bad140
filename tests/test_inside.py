"""Tests of studies/inside.py and its estimators."""

import dataclasses
import itertools
import math
import runpy
import sys

import inside
import mutual_information
import numpy as np
import pytest
import torch
from runs import group
from untrained import ROOT, refusal, save_untrained, succeed, table, untrained

import aib_envs
import dmash

# ---- Estimators: known values, which scatter by some .02 with 2,000 samples ---------------------


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.95])
def test_information_of_gaussians(rho):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2000, 2))
    y = rho * x + math.sqrt(1 - rho**2) * rng.normal(size=(2000, 2))
    rescaled = np.hstack([1000 * y + 7, np.full((2000, 1), 3.0)])  # and a constant
    found = mutual_information.continuous(x, rescaled)
    assert found == pytest.approx(-math.log(1 - rho**2), abs=0.04)


@pytest.mark.parametrize("apart", [0.0, 1.0, 50.0])
def test_information_of_a_binary_mode(apart):
    """Normal distributions around 0 and `apart`: the entropy of S minus that of S given X."""
    s = np.arange(2000) % 2
    x = np.random.default_rng(2).normal(size=(2000, 1)) + apart * s[:, None]
    grid = np.linspace(-8, 8, 10_001)
    ratio = np.exp(apart * grid - apart**2 / 2)  # of the densities of the two modes
    doubt = np.average(np.log(1 + ratio), weights=np.exp(-(grid**2) / 2))
    found = mutual_information.discrete(x, s)
    assert found == pytest.approx(math.log(2) - doubt, abs=0.04)


def test_a_mode_in_a_continuous_vector_adds_its_information():
    """I(Z;C) by the chain rule, as inside.csv lets a reader check."""
    rng = np.random.default_rng(3)
    c = np.stack([rng.uniform(size=2000), np.arange(2000) % 2], -1)
    z = c + [0.1, 0.01] * rng.normal(size=(2000, 2))
    whole = mutual_information.continuous(z, c)
    within = [mutual_information.continuous(z[m::2], c[m::2]) for m in (0, 1)]
    assert whole == pytest.approx(math.log(2) + np.mean(within), abs=0.05)


def test_variability_and_its_parts():
    """Theorem A.15 by numpy's covariances, group by group. The groups have different sizes."""
    rng = np.random.default_rng(4)
    c = rng.integers(6, size=400)
    s = c % 2
    z = rng.normal(size=(400, 8)) * (1 + c[:, None]) + c[:, None] ** 2

    def trace(x):
        return np.trace(np.cov(x.T, bias=True)) / 8

    def within(groups, x):
        return np.mean([trace(x[groups == i]) for i in groups])

    of_context = np.stack([z[c == i].mean(0) for i in c])  # (400, 8)
    of_mode = np.stack([z[s == i].mean(0) for i in s])
    parts = trace(z), within(c, z), within(s, of_context), trace(of_mode)
    assert mutual_information.variability(z, s, c) == pytest.approx(parts, rel=1e-9)


# ---- Codes, actions, the cross-table ------------------------------------------------------------


def test_windows_are_those_of_their_context(seen):
    """In the double integrator a window tells its context: mass times sign = .1 a / δv."""
    agent = untrained("dma_star_sh", d_z=4)

    def infer(tau, noisy, c=None):
        ratios = 0.1 * tau[..., 4:6] / tau[..., 8:10]
        ratio = ratios.flatten(1).median(1).values
        return torch.stack([ratio.abs(), ratio.sign()] * 2, -1), None

    agent.infer = infer
    pushes = itertools.cycle((0.5, -0.5))  # never at the largest speed
    agent.act = lambda s, omega, noisy: torch.full((len(s), 2), next(pushes))
    contexts = inside.Space("di_inv").few
    z = inside.gather(agent, contexts, 2, 100)[..., :2]
    assert z.shape == (6, 10, 2)  # two episodes, read every 24 of 100 steps
    for codes, context in zip(z, contexts):
        assert codes == pytest.approx(np.array([[*context.values()]] * 10), rel=1e-3)
    first, second = seen[24][0], seen[48][0]
    assert not torch.isin(second[0, 0], first[0]).all()


@pytest.mark.parametrize("env", ["di_perm", "di_friction"])
def test_contexts_are_drawn_from_their_sets(env):
    space = inside.Space(env)
    ranges = {"train": [(0.5, 1.5)], "eval_in": [(0.51, 1.49)]}
    ranges["eval_out"] = [(0.1, 0.49), (1.51, 2.0)]
    for which, parts in ranges.items():
        contexts = space.draw(which, 2000, np.random.default_rng(0))
        s, u = space.split(contexts)
        assert np.ptp(np.bincount(s)) == 0
        total = sum(high - low for low, high in parts)
        for x in u.T:
            found = 0
            for low, high in parts:
                counts, _ = np.histogram(x, 10, (low, high))
                found += counts.sum()
                share = (high - low) / total / 10  # of each tenth of a part
                assert counts / 2000 == pytest.approx(share, abs=0.025)
            assert found == 2000


@pytest.mark.parametrize("method, size", [("dma_star_sh", 6), ("dma_pearl", 8)])
def test_a_softmax_of_four_numbers_counts_as_three(method, size, monkeypatch):
    seen = []

    def estimate(z, other):
        seen.append((*z.shape, len(other)))
        return 0.0

    monkeypatch.setattr(mutual_information, "continuous", estimate)
    monkeypatch.setattr(mutual_information, "discrete", estimate)
    _, _, codes = inside.measure(untrained(method), inside.Space("di_inv"), "train", 20)
    assert codes.shape == (20, 8)  # whole, to be drawn
    assert seen == [(20, size, 20), (10, size, 10), (10, size, 10), (20, size, 20)]


@pytest.mark.parametrize("env", ["di_inv", "di_perm"])
@pytest.mark.parametrize("undoing", [True, False])
def test_undone_is_one_where_the_policy_undoes_the_mode(env, undoing):
    agent = untrained("concat", env)

    def act(s, c, noisy):
        a = s[:, :2].clamp(-0.9, 0.9)
        if not undoing:
            return a
        other = -a if env == "di_inv" else a.flip(-1)
        second = c[:, 1:].repeat_interleave(len(s) // len(c), 0) == 1
        return torch.where(second, a, other)

    agent.act = act
    found = inside.undone(agent, inside.Space(env))
    assert (found["undone"] > 1 - 1e-6) == undoing


def test_a_cell_of_the_cross_table_is_acting_in_one_context_told_of_another(seen, monkeypatch):
    monkeypatch.setattr(inside, "CROSS_EPISODES", 2)
    monkeypatch.setattr(aib_envs.DoubleIntegrator, "reward", lambda task: task.state()[:, 0])
    agent = untrained("concat")
    contexts = inside.Space("di_inv").few
    returns = inside.cross_table(agent, contexts)
    _, (starts, *_) = seen[agent.cfg.K]  # of the episodes whose ω is read
    for c, told, episode in ((1, 5, 0), (4, 0, 1), (2, 2, 1)):
        envs = aib_envs.VectorEnv("di_inv", [contexts[c]], seed=0)
        envs.rngs = [np.random.default_rng([agent.cfg.seed, 3, episode, c])]
        rollout = dmash.Rollout(agent, envs, noisy=False)
        rollout.replay.c = torch.tensor([list(contexts[told].values())])
        rollout.reset()
        assert torch.equal(rollout.s[0], starts[6 * (1 - episode) + c])  # of another episode
        total = 0
        while not rollout.done:
            _, _, r, _ = rollout.step()
            total += r.item()
        assert returns[c, told, episode] == pytest.approx(total, abs=1e-3)


# ---- The program --------------------------------------------------------------------------------


def test_all_files_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(inside, "EPISODES", 1)
    monkeypatch.setattr(inside, "CROSS_EPISODES", 2)
    ours = save_untrained(tmp_path, "dma_star_sh")
    da = save_untrained(tmp_path, "da")
    pearl = save_untrained(tmp_path, "dma_pearl", "ode")
    (ours / "policies").mkdir()
    for step in (100, 20):
        policy = torch.load(ours / "policy.pt") | {"step": step}
        torch.save(policy, ours / "policies" / f"{step}.pt")
    out = tmp_path / "out"
    succeed(inside, ours, da, pearl, "--windows", 100, "--out", out)
    figures = {f"{run.name}_codes.png" for run in (ours, pearl)}
    assert {file.name for file in out.iterdir()} == {"inside.csv", *figures}

    by_run = group(table(out / "inside.csv"), lambda row: row["run"])
    quantities = group(by_run[ours.name], lambda row: row["quantity"])

    def column(name):
        return np.array([float(row["value"]) for row in quantities[name]])

    parts = column("noise") + column("spread") + column("separation")
    assert column("variability") == pytest.approx(parts, abs=1e-6)
    *_, early, late = quantities["I(Z;S)"]
    assert (early["set"], early["step"]) == ("snapshot", "20")
    assert late["step"] == "100"
    assert late["value"] == early["value"]
    cosines = quantities["cosine"]
    assert len(cosines) == 36
    assert {row["value"] for row in cosines if row["context"] == row["other"]} == {"1"}
    of_da = {row["quantity"] for row in by_run[da.name]}
    assert of_da >= {"undone", "return, best", "return, other mode"}
    assert not of_da & {"variability", "cosine", "I(Z;C)"}
    of_one_mode = {row["quantity"] for row in by_run[pearl.name]}
    assert of_one_mode >= {"I(Z;C)", "cosine, same mode"}
    assert not of_one_mode & {"I(Z;S)", "I(Z;U|S)", "undone", "return, other mode"}


def test_runs_of_one_name_are_told_apart(tmp_path):
    folder = save_untrained(tmp_path, "dma_star_sh")
    assert list(inside.read([folder, folder / "policy.pt"])) == [folder.name, f"{folder.name}__2"]


def test_refusals_are_one_line(tmp_path, monkeypatch, capsys):
    ours = save_untrained(tmp_path, "dma_star_sh")
    assert "--windows 50: must be a whole" in refusal(inside, [ours, "--windows", 50], capsys)
    signs = dataclasses.replace(aib_envs.ENVS["di_inv"], context=(aib_envs.SIGN_X,))
    monkeypatch.setitem(aib_envs.ENVS, "di_inv", signs)
    assert "di_inv: has no continuous context" in refusal(inside, [ours], capsys)


def test_without_matplotlib_a_study_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "figures", raising=False)
    monkeypatch.setattr(sys, "argv", ["film.py"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(f"{ROOT}/studies/film.py")
    needs = "film.py: error: needs matplotlib (pip install matplotlib)\n"
    assert capsys.readouterr().err == needs
