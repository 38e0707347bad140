"""Tests of studies/inside.py and its estimators."""

import csv
import itertools
import math
import sys

import inside
import mutual_information
import numpy as np
import pytest
import torch

import aib_envs
import dmash

SMALL = dict(env="di_inv", contexts=4, batch=16, threads=1, hidden=32, hyper_hidden=8, bottleneck=4)


def agent_of(**settings):
    torch.manual_seed(1)
    return dmash.new_agent(dmash.Config(**SMALL | settings))


def run_of(folder, **settings):
    """A run folder of an untrained agent."""
    cfg = dmash.Config(**SMALL | dict(out=str(folder)) | settings)
    cfg.folder.mkdir(parents=True)
    dmash.Run(cfg, cfg.folder).save()
    return cfg.folder


# ---- Estimators: known values, which scatter by some .02 with 2,000 samples -------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.95])
def test_information_of_gaussians(rho):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2000, 2))
    y = rho * x + math.sqrt(1 - rho**2) * rng.normal(size=(2000, 2))
    scaled = np.stack(
        [1000 * y[:, 0] + 7, y[:, 1] / 1000, np.full(2000, 3.0)], -1
    )  # the last tells nothing
    for other in (y, scaled):
        assert mutual_information.continuous(x, other) == pytest.approx(
            -math.log(1 - rho**2), abs=0.08
        )


@pytest.mark.parametrize("apart", [0.0, 1.0, 3.0, 50.0])
def test_information_of_a_binary_mode(apart):
    """Normal distributions around 0 and `apart`: the entropy of their mixture, an integral, minus that of one."""
    rng, s = np.random.default_rng(2), np.arange(2000) % 2
    x = rng.normal(size=(2000, 1)) + apart * s[:, None]
    grid = np.linspace(-8, apart + 8, 20_001)
    density = sum(np.exp(-((grid - mean) ** 2) / 2) for mean in (0, apart)) / math.sqrt(8 * math.pi)
    mixture = -np.sum(density * np.log(density + 1e-300)) * (grid[1] - grid[0])
    expected = mixture - math.log(2 * math.pi * math.e) / 2
    assert expected == pytest.approx({0: 0, 50: math.log(2)}.get(apart, expected), abs=1e-4)
    assert mutual_information.discrete(x, s) == pytest.approx(expected, abs=0.04)


def test_a_mode_in_a_continuous_vector_adds_its_information():
    """I(Z;C) by the chain rule, as inside.csv lets a reader check."""
    rng, s = np.random.default_rng(3), np.arange(2000) % 2
    u = rng.uniform(size=2000)
    z = np.stack([s + 0.01 * rng.normal(size=2000), u + 0.1 * rng.normal(size=2000)], -1)
    within = np.mean([mutual_information.continuous(z[s == m], u[s == m][:, None]) for m in (0, 1)])
    whole = mutual_information.continuous(z, np.stack([u, s], -1))
    assert whole == pytest.approx(math.log(2) + within, abs=0.05)


def test_variability_and_its_parts():
    """Theorem A.15 by numpy's covariances, group by group, with groups of different sizes."""
    rng = np.random.default_rng(4)
    c = rng.integers(6, size=400)
    s, z = c % 2, rng.normal(size=(400, 8)) * (1 + c[:, None]) + c[:, None] ** 2

    def trace(x, weights=None):
        return np.trace(np.cov(x.T, bias=True, aweights=weights)) / 8

    sizes, means = np.bincount(c), np.stack([z[c == i].mean(0) for i in range(6)])
    modes, size = np.stack([z[s == m].mean(0) for m in (0, 1)]), np.bincount(s)
    noise = sum(n / 400 * trace(z[c == i]) for i, n in enumerate(sizes))
    spread = sum(size[m] / 400 * trace(means[m::2], sizes[m::2]) for m in (0, 1))
    found = mutual_information.variability(z, s, c)
    assert found == pytest.approx((trace(z), noise, spread, trace(modes, size)), rel=1e-9)
    assert found[0] == pytest.approx(sum(found[1:]), rel=1e-9)


# ---- Codes, actions, the cross-table ----------------------------------------------------------------------------


def test_windows_are_those_of_their_context():
    """In the double integrator a window tells its context: mass times sign = .1 a / δv."""
    agent, space, windows = agent_of(), inside.Space("di_inv"), []

    def read(tau, noisy):
        windows.append(tau)
        ratio = (0.1 * tau[..., 4:6] / tau[..., 8:10]).flatten(1).median(1).values
        return torch.stack([ratio.abs(), ratio.sign()], -1), None

    agent.infer = read
    pushes = itertools.cycle((0.5, -0.5))  # never at the largest speed
    agent.act = lambda s, told, noisy: torch.full((len(s), 2), next(pushes))
    z = inside.gather(agent, space.few, 2, 100)
    assert z.shape == (6, 10, 2) and len(windows) == 5  # two episodes, read every 24 of 100 steps
    expected = [[context["mass"], context["action_factor"]] for context in space.few]
    assert z == pytest.approx(np.array(expected)[:, None].repeat(10, 1), rel=1e-3)
    assert not torch.isin(windows[1][0, 0], windows[0][0]).all()  # the second window is another one


@pytest.mark.parametrize("env", ["di_inv", "di_perm", "ode", "di_friction"])
def test_contexts_are_drawn_from_their_sets(env):
    space = inside.Space(env)
    for which in dmash.SETS:
        contexts = space.draw(which, 2000, np.random.default_rng(0))
        assert list(contexts[0]) == [dim.name for dim in aib_envs.ENVS[env].context]
        s, u = space.split(contexts)
        assert np.ptp(np.bincount(s)) == 0 and len(np.unique(u)) == u.size
        for dim, x in zip(space.graded, u.T):
            trained = (x >= dim.train[0]) & (x <= dim.train[1])
            assert trained.all() if which != "eval_out" else not trained.any()
            low, high = dim.train if which != "eval_out" else dim.extrapolation
            assert (
                low <= x.min() < low + 0.02 * (high - low)
                and high - 0.02 * (high - low) < x.max() <= high
            )
            middle = np.mean(
                x < (low + high) / 2
            )  # uniform: as much of the range as lies below its middle
            assert middle == pytest.approx(0.4 / 0.88 if low == 0.1 else 0.5, abs=0.05)


@pytest.mark.parametrize("method, size", [("dma_star_sh", 6), ("dma_pearl", 8)])
def test_a_softmax_of_four_numbers_counts_as_three(method, size, monkeypatch):
    seen = []
    for name in ("continuous", "discrete"):
        monkeypatch.setattr(
            mutual_information, name, lambda z, other: seen.append((z.shape, len(other))) or 0.0
        )
    _, _, codes = inside.information(agent_of(method=method), inside.Space("di_inv"), "train", 20)
    assert codes.shape == (20, 8)  # whole, to be drawn
    assert seen == [
        ((20, size), 20),
        ((10, size), 10),
        ((10, size), 10),
        ((20, size), 20),
    ]  # each mode, and all


@pytest.mark.parametrize("env, sign", [("di_inv", "action_factor"), ("di_perm", "swap")])
def test_undone_is_one_where_the_policy_undoes_the_mode(env, sign):
    agent = agent_of(env=env, method="concat")

    def act(s, told, noisy):
        a, mode = (
            s[:, :2].clamp(-0.9, 0.9),
            told[:, 1].repeat_interleave(len(s) // len(told))[:, None],
        )
        return (
            torch.where(mode == 1, a, -a if sign == "action_factor" else a.flip(-1))
            if undoing
            else a
        )

    agent.act = act
    for undoing in (True, False):
        values, a, s, found = inside.mean_actions(agent, inside.Space(env))
        assert a.shape == (2, len(values), len(s), 2)
        assert a[1] == pytest.approx(
            np.clip(s[:, :2], -0.9, 0.9)[None].repeat(len(values), 0), abs=1e-6
        )
        assert found["undone"] == pytest.approx(1) if undoing else found["undone"] < 0.9


def test_a_cell_of_the_cross_table_is_acting_in_one_context_told_of_another(monkeypatch):
    monkeypatch.setattr(inside, "CROSS_EPISODES", 2)
    monkeypatch.setattr(aib_envs.DoubleIntegrator, "reward", lambda task: task.state()[:, 0])
    agent, contexts = agent_of(method="concat"), inside.Space("di_inv").few
    returns, own = inside.cross_table(agent, contexts)
    for c, told, episode in ((1, 5, 0), (4, 0, 1), (2, 2, 1)):
        envs = aib_envs.VectorEnv("di_inv", [contexts[c]], seed=0)
        envs.rngs = [np.random.default_rng([agent.cfg.seed, 3, episode, c])]
        s, total, done = envs.reset(), 0.0, False
        while not done:
            a = agent.act(torch.from_numpy(s), torch.tensor([list(contexts[told].values())]), False)
            s, r, done = envs.step(a.numpy())
            total += r.item()
        assert returns[c, told, episode] == pytest.approx(total, abs=1e-3)
    assert own[:, [1, 0]] == pytest.approx(
        returns[range(6), range(6)], abs=1e-3
    )  # told c: nothing to infer


# ---- The program ------------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(inside, "EPISODES", 1)
    monkeypatch.setattr(inside, "CROSS_EPISODES", 2)


def test_all_files_are_written(short, tmp_path):
    pytest.importorskip("matplotlib")
    ours, da, out = run_of(tmp_path), run_of(tmp_path, method="da"), tmp_path / "out"
    (ours / "policies").mkdir()
    for step in (100, 20):
        torch.save(
            torch.load(ours / "policy.pt") | {"step": step}, ours / "policies" / f"{step}.pt"
        )
    (ours / "metrics.csv").write_text("step,train,eval_in,eval_out\n0,1,2,3\n20,4,5,6\n")
    assert inside.main([str(ours), str(da), "--windows", "100", "--out", str(out)]) == 0
    figures = [f"{ours.name}_{kind}.png" for kind in ("codes", "adapter", "training")]
    names = {"inside.csv", "side_by_side.png", f"{da.name}_adapter.png", *figures}
    assert {file.name for file in out.iterdir()} == names
    rows = list(csv.DictReader((out / "inside.csv").read_text().splitlines()))
    value = {
        (row["step"], row["set"], row["quantity"]): float(row["value"])
        for row in rows
        if row["run"] == ours.name
    }
    for which in dmash.SETS:
        parts = (value["0", which, part] for part in ("noise", "spread", "separation"))
        assert value["0", which, "variability"] == pytest.approx(sum(parts), abs=1e-6)
    assert value["20", "snapshot", "I(Z;S)"] == value["100", "snapshot", "I(Z;S)"]
    assert (
        value["0", "eval_out", "return"] == 3
        and inside.returns_beside(ours / "policies" / "20.pt", 20)["train"] == 4
    )
    of_da = {row["quantity"] for row in rows if row["run"] == da.name}
    assert of_da >= {"undone", "return, best", "return, other mode"} and not of_da & {
        "variability",
        "cosine",
        "I(Z;C)",
    }
    cells = [row for row in rows if row["run"] == ours.name and row["quantity"] == "cosine"]
    assert len(cells) == 36 and {
        row["value"] for row in cells if row["context"] == row["other"]
    } == {"1"}


def test_numbers_need_no_matplotlib(short, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "inside_figures", None)
    run, out = run_of(tmp_path, env="ode", method="dma_pearl"), tmp_path / "out"
    assert inside.main([str(run), "--windows", "100", "--out", str(out)]) == 0
    assert "no figures are drawn" in capsys.readouterr().out
    assert [file.name for file in out.iterdir()] == ["inside.csv"]
    quantities = {
        row["quantity"] for row in csv.DictReader((out / "inside.csv").read_text().splitlines())
    }
    assert {
        "I(Z;C)",
        "cosine, same mode",
    } <= quantities  # without a binary context there is one mode
    assert not {"I(Z;S)", "I(Z;U|S)", "undone", "return, other mode"} & quantities


def test_runs_of_one_name_and_other_settings_are_told_apart(tmp_path):
    places = [run_of(tmp_path / str(d_z), d_z=d_z) for d_z in (4, 8)]
    assert list(inside.read(places)) == ["di_inv__dma_star_sh__s1", "di_inv__dma_star_sh__s1__2"]


def test_refusals_are_one_line(tmp_path, capsys):
    ours, dr = run_of(tmp_path), run_of(tmp_path, method="dr")
    (tmp_path / "file").touch()
    for arguments, message in (
        ([], "required: RUN"),
        ([tmp_path / "nowhere"], "nowhere: no such file; allowed: a run folder"),
        (
            [ours, dr],
            "di_inv__dr__s1: dr is told nothing of the context; allowed: any other method",
        ),
        ([ours, ours / "policy.pt"], "give only one of them"),
        ([ours, "--windows", "50"], "--windows 50: must be a whole number in [100, 5000]"),
        ([ours, "--out", tmp_path / "file"], "file: File exists"),
    ):
        assert inside.main([str(word) for word in arguments]) == 2
        said = capsys.readouterr()
        assert message in said.err and said.err.count("\n") == 1 and said.out == "", said
