"""Tests of studies/inside.py and its estimators."""

import csv
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "studies")]
import inside  # noqa: E402
import mutual_information  # noqa: E402

import aib_envs  # noqa: E402
import dmash  # noqa: E402


def config(**settings):
    small = dict(env="di_inv", contexts=4, threads=1, hidden=32, hyper_hidden=8, bottleneck=4)
    return dmash.Config(**small | settings)


def agent_of(**settings):
    torch.manual_seed(1)
    return dmash.new_agent(config(**settings))


def run_of(folder, **settings):
    """A run folder of an untrained agent."""
    cfg = config(out=str(folder), **settings)
    run = dmash.Run(cfg, dmash.run_folder(cfg))
    run.folder.mkdir(parents=True)
    with dmash.lock(run.folder) as run.inode:
        run.save()
    return run.folder


# ---- Estimators: known values, which scatter by some .02 with 2,000 samples ---------------------


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.95])
def test_information_of_gaussians(rho):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2000, 2))
    y = rho * x + math.sqrt(1 - rho**2) * rng.normal(size=(2000, 2))
    constant = np.full((2000, 1), 3.0)
    for other in (y, np.hstack([y * [1000, 0.001] + [7, 0], constant])):
        found = mutual_information.continuous(x, other)
        assert found == pytest.approx(-math.log(1 - rho**2), abs=0.08)


@pytest.mark.parametrize("apart", [0.0, 1.0, 3.0, 50.0])
def test_information_of_a_binary_mode(apart):
    """Normal distributions around 0 and `apart`: the entropy of their mixture minus that of one."""
    s = np.arange(2000) % 2
    x = np.random.default_rng(2).normal(size=(2000, 1)) + apart * s[:, None]
    grid = np.linspace(-8, apart + 8, 20_001)
    density = np.exp(-(grid**2) / 2) + np.exp(-((grid - apart) ** 2) / 2)
    density /= math.sqrt(8 * math.pi)
    entropy = -np.sum(density * np.log(density + 1e-300)) * (grid[1] - grid[0])
    expected = entropy - math.log(2 * math.pi * math.e) / 2
    if apart in (0, 50):
        assert expected == pytest.approx({0: 0, 50: math.log(2)}[apart], abs=1e-4)
    assert mutual_information.discrete(x, s) == pytest.approx(expected, abs=0.04)


def test_a_mode_in_a_continuous_vector_adds_its_information():
    """I(Z;C) by the chain rule, as inside.csv lets a reader check."""
    rng = np.random.default_rng(3)
    s = np.arange(2000) % 2
    u = rng.uniform(size=2000)
    z = np.stack([s + 0.01 * rng.normal(size=2000), u + 0.1 * rng.normal(size=2000)], -1)
    whole = mutual_information.continuous(z, np.stack([u, s], -1))
    within = [mutual_information.continuous(z[s == m], u[s == m, None]) for m in (0, 1)]
    assert whole == pytest.approx(math.log(2) + np.mean(within), abs=0.05)


def test_variability_and_its_parts():
    """Theorem A.15 by numpy's covariances, group by group. The groups have different sizes."""
    rng = np.random.default_rng(4)
    c = rng.integers(6, size=400)
    s = c % 2
    z = rng.normal(size=(400, 8)) * (1 + c[:, None]) + c[:, None] ** 2

    def trace(x):
        return np.trace(np.cov(x.T, bias=True)) / 8

    contexts = [c == i for i in range(6)]
    modes = [s == m for m in (0, 1)]
    means = np.stack([z[own].mean(0) for own in contexts])[c]  # (400, 8)
    noise = sum(own.mean() * trace(z[own]) for own in contexts)
    spread = sum(own.mean() * trace(means[own]) for own in modes)
    separation = trace(np.stack([z[own].mean(0) for own in modes])[s])
    found = mutual_information.variability(z, s, c)
    assert found == pytest.approx((trace(z), noise, spread, separation), rel=1e-9)
    assert found[0] == pytest.approx(sum(found[1:]), rel=1e-9)


# ---- Codes, actions, the cross-table ------------------------------------------------------------


def test_windows_are_those_of_their_context():
    """In the double integrator a window tells its context: mass times sign = .1 a / δv."""
    agent = agent_of()
    space = inside.Space("di_inv")
    windows = []

    def infer(tau, noisy, c=None):
        windows.append(tau)
        ratio = (0.1 * tau[..., 4:6] / tau[..., 8:10]).flatten(1).median(1).values
        return torch.stack([ratio.abs(), ratio.sign()], -1).repeat(1, 4), None

    agent.infer = infer
    pushes = itertools.cycle((0.5, -0.5))  # never at the largest speed
    agent.act = lambda s, omega, noisy: torch.full((len(s), 2), next(pushes))
    z = inside.gather(agent, space.few, 2, 100)[..., :2]
    assert z.shape == (6, 10, 2)  # two episodes, read every 24 of 100 steps
    expected = np.array([[context["mass"], context["action_factor"]] for context in space.few])
    assert z == pytest.approx(expected[:, None].repeat(10, 1), rel=1e-3)
    first, second, *_ = windows[::24]
    assert not torch.isin(second[0, 0], first[0]).all()


@pytest.mark.parametrize("env", ["di_inv", "di_perm", "ode", "di_friction"])
def test_contexts_are_drawn_from_their_sets(env):
    space = inside.Space(env)
    for which in dmash.SETS:
        contexts = space.draw(which, 2000, np.random.default_rng(0))
        assert list(contexts[0]) == [dim.name for dim in aib_envs.ENVS[env].context]
        s, u = space.split(contexts)
        assert np.ptp(np.bincount(s)) == 0
        assert len(np.unique(u)) == u.size
        for dim, x in zip(space.continuous, u.T):
            low, high = dim.train
            margin = {"train": 0, "eval_in": 0.01, "eval_out": -0.01}[which] * (high - low)
            trained = (x >= low + margin) & (x <= high - margin)
            if which == "eval_out":
                assert not trained.any()
                low, high = dim.extrapolation
            else:
                assert trained.all()
            edge = 0.02 * (high - low)
            assert low <= x.min() < low + edge and high - edge < x.max() <= high
            # Uniform: as much as lies below the middle of the range.
            share = 0.4 / 0.88 if low == 0.1 else 0.5
            assert np.mean(x < (low + high) / 2) == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("method, size", [("dma_star_sh", 6), ("dma_pearl", 8)])
def test_a_softmax_of_four_numbers_counts_as_three(method, size, monkeypatch):
    seen = []

    def estimate(z, other):
        seen.append((*z.shape, len(other)))
        return 0.0

    monkeypatch.setattr(mutual_information, "continuous", estimate)
    monkeypatch.setattr(mutual_information, "discrete", estimate)
    agent = agent_of(method=method)
    _, _, codes = inside.information(agent, inside.Space("di_inv"), "train", 20)
    assert codes.shape == (20, 8)  # whole, to be drawn
    one_mode = (10, size, 10)
    assert seen == [(20, size, 20), one_mode, one_mode, (20, size, 20)]


@pytest.mark.parametrize("env", ["di_inv", "di_perm"])
@pytest.mark.parametrize("undoing", [True, False])
def test_undone_is_one_where_the_policy_undoes_the_mode(env, undoing):
    agent = agent_of(env=env, method="concat")

    def act(s, c, noisy):
        a = s[:, :2].clamp(-0.9, 0.9)
        second = c[:, 1:].repeat_interleave(len(s) // len(c), 0) == 1
        other = -a if env == "di_inv" else a.flip(-1)
        return torch.where(second, a, other) if undoing else a

    agent.act = act
    values, a, s, found = inside.mean_actions(agent, inside.Space(env))
    expected = np.clip(s[:, :2], -0.9, 0.9)
    assert a[1] == pytest.approx(np.stack([expected] * len(values)), abs=1e-6)
    if undoing:
        assert found["undone"] == pytest.approx(1)
    else:
        assert found["undone"] < 0.9


def test_a_cell_of_the_cross_table_is_acting_in_one_context_told_of_another(monkeypatch):
    monkeypatch.setattr(inside, "CROSS_EPISODES", 2)
    monkeypatch.setattr(aib_envs.DoubleIntegrator, "reward", lambda task: task.state()[:, 0])
    agent = agent_of(method="concat")
    contexts = inside.Space("di_inv").few
    returns, own = inside.cross_table(agent, contexts)
    for c, told, episode in ((1, 5, 0), (4, 0, 1), (2, 2, 1)):
        envs = aib_envs.VectorEnv("di_inv", [contexts[c]], seed=0)
        envs.rngs = [np.random.default_rng([agent.cfg.seed, 3, episode, c])]
        s = envs.reset()
        total = 0.0
        done = False
        while not done:
            c_told = torch.tensor([list(contexts[told].values())])
            s, r, done = envs.step(agent.act(torch.from_numpy(s), c_told, False).numpy())
            total += r.item()
        assert returns[c, told, episode] == pytest.approx(total, abs=1e-3)
    # Where c is given, nothing is inferred: acting beside is acting in the same context.
    assert own[:, [1, 0]] == pytest.approx(returns[range(6), range(6)], abs=1e-3)


# ---- The program --------------------------------------------------------------------------------


def look(monkeypatch, out, *runs):
    """The rows of inside.csv."""
    monkeypatch.setattr(inside, "EPISODES", 1)
    monkeypatch.setattr(inside, "CROSS_EPISODES", 2)
    arguments = [*map(str, runs), "--windows", "100", "--out", str(out)]
    assert inside.main(arguments) == 0
    return list(csv.DictReader((out / "inside.csv").read_text().splitlines()))


def test_all_files_are_written(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    ours = run_of(tmp_path)
    da = run_of(tmp_path, method="da")
    out = tmp_path / "out"
    (ours / "policies").mkdir()
    for step in (100, 20):
        policy = torch.load(ours / "policy.pt") | {"step": step}
        torch.save(policy, ours / "policies" / f"{step}.pt")
    (ours / "metrics.csv").write_text("step,train,eval_in,eval_out\n0,1,2,3\n20,4,5,6\n")
    rows = look(monkeypatch, out, ours, da)
    figures = [f"{ours.name}_{kind}.png" for kind in ("codes", "adapter", "training")]
    names = {"inside.csv", "side_by_side.png", f"{da.name}_adapter.png", *figures}
    assert {file.name for file in out.iterdir()} == names
    of_ours = [row for row in rows if row["run"] == ours.name]
    value = {(row["step"], row["set"], row["quantity"]): row["value"] for row in of_ours}
    for which in dmash.SETS:
        parts = [float(value["0", which, part]) for part in ("noise", "spread", "separation")]
        assert float(value["0", which, "variability"]) == pytest.approx(sum(parts), abs=1e-6)
    assert value["20", "snapshot", "I(Z;S)"] == value["100", "snapshot", "I(Z;S)"]
    assert value["0", "eval_out", "return"] == "3"
    assert inside.returns_beside(ours / "policies" / "20.pt", 20)["train"] == 4
    cells = [row for row in of_ours if row["quantity"] == "cosine"]
    assert len(cells) == 36
    assert {row["value"] for row in cells if row["context"] == row["other"]} == {"1"}
    of_da = {row["quantity"] for row in rows if row["run"] == da.name}
    assert of_da >= {"undone", "return, best", "return, other mode"}
    assert not of_da & {"variability", "cosine", "I(Z;C)"}


def test_numbers_need_no_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "inside_figures", None)
    out = tmp_path / "out"
    rows = look(monkeypatch, out, run_of(tmp_path, env="ode", method="dma_pearl"))
    assert "no figures are drawn" in capsys.readouterr().out
    assert [file.name for file in out.iterdir()] == ["inside.csv"]
    quantities = {row["quantity"] for row in rows}
    assert {"I(Z;C)", "cosine, same mode"} <= quantities  # ode has one mode
    assert not {"I(Z;S)", "I(Z;U|S)", "undone", "return, other mode"} & quantities


def test_runs_of_one_name_and_other_settings_are_told_apart(tmp_path):
    places = [run_of(tmp_path / str(d_z), d_z=d_z) for d_z in (4, 8)]
    assert list(inside.read(places)) == ["di_inv__dma_star_sh__s1", "di_inv__dma_star_sh__s1__2"]


def test_refusals_are_one_line(tmp_path, capsys):
    ours = run_of(tmp_path)
    dr = run_of(tmp_path, method="dr")
    (tmp_path / "file").touch()
    for arguments, message in (
        ([], "required: RUN"),
        ([tmp_path / "nowhere"], "nowhere: must be a policy file, or a run folder"),
        ([ours, dr], "di_inv__dr__s1: dr is told nothing of the context; allowed: any other"),
        ([ours, ours / "policy.pt"], "give only one of them"),
        ([ours, "--windows", "50"], "--windows 50: must be a whole number from 100 to 5000"),
        ([ours, "--out", tmp_path / "file"], "file: File exists"),
    ):
        assert inside.main([str(word) for word in arguments]) == 2
        said = capsys.readouterr()
        assert message in said.err and said.err.count("\n") == 1 and said.out == ""
