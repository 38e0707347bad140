"""Tests of studies/benchmark.py: short, and with small settings."""

import shutil

import benchmark
import pytest
from untrained import ROOT, SMALL, refusal

import aib_envs
import dmash

SETTINGS = SMALL | dict(env="di_inv", policy_average=0)
WORDS = [f"{dmash.flag(name)}={value}" for name, value in SETTINGS.items()]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Few and short turns."""
    for name, number in (("STEPS", 2), ("TURNS", 4), ("METHOD_TURNS", 2)):
        monkeypatch.setattr(benchmark, name, number)


def printed(capfd, *words):
    """The words of each line that benchmark.py prints."""
    assert benchmark.main([*WORDS, *words]) == 0
    return [line.split() for line in capfd.readouterr().out.splitlines()]


@pytest.mark.parametrize("method", ["dma_star_sh", "da"])
def test_time_is_counted_in_the_phase_that_spends_it(method, monkeypatch, capfd):
    """On a clock that stands still but for what is planted: another time in each part of a step."""
    now = 0

    def plant(owner, name, ticks):
        function = getattr(owner, name)

        def call(*args, **kwargs):
            nonlocal now
            now += ticks
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    names = "dynamics_loss", "critic_loss", "actor_loss", "temperature_loss", "require_finite"
    for i, name in enumerate([*names, "move_towards"]):
        plant(dmash, name, 2**i)
    plant(dmash.Agent, "infer", 64)
    plant(dmash.Agent, "act", 128)
    plant(aib_envs.VectorEnv, "step", 256)
    plant(dmash.Replay, "sample", 512)
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now / 1e4)
    _, rate, *rows = printed(capfd, "--method", method)
    ticks = {phase: 10 * float(ms) for phase, ms, _ in rows}  # of a gradient step
    total = ticks.pop("total")
    acted = 1.24  # 100 steps of an episode and 24 of its warm-up, in 100 gradient steps
    expected = {"acting": acted * (64 + 128), "environments": acted * 256, "batch": 512}
    expected |= {"dynamics": 1 + 64, "critic": 2, "actor": 4 + 8, "targets": 32, "rest": 16}
    if method == "da":  # which has no dynamics model: an update begins with the critics
        expected |= {"dynamics": 0, "critic": 2 + 64}
    assert list(ticks) == benchmark.PHASES
    assert ticks == pytest.approx(expected, abs=0.1)  # two decimals of a millisecond
    assert sum(ticks.values()) == pytest.approx(total, abs=1)
    assert float(rate[-1]) == pytest.approx(1e4 / total, abs=0.05)


@pytest.mark.parametrize("env, has_models", [("di_inv", False), ("cartpole_inv", True)])
def test_vector_step_against_the_bare_mj_step_calls(env, has_models):
    vector, bare = benchmark.vector_step_times(env, contexts=3, steps=20)
    assert vector > 0
    assert (bare > 0) == has_models  # nan is not


def test_environments_lists_them_all(monkeypatch, capfd):
    times = {"di_inv": (1.0, float("nan")), "walker": (3.0, 2.0)}
    monkeypatch.setattr(benchmark, "vector_step_times", lambda env, n: times.get(env, (n, 1.0)))
    _, *rows = printed(capfd, "--environments")
    cells = {row[0]: row[1:] for row in rows}
    assert list(cells) == [env for env in aib_envs.ENVS if not env.startswith("ode_")]
    assert cells["di_inv"] == ["1.00", "nan", "nan"]
    assert cells["walker"] == ["3.00", "2.00", "1.50"]
    assert cells["cartpole_inv"] == ["20.00", "1.00", "20.00"]


def test_methods_lists_them_all(capfd):
    _, _, *rows = printed(capfd, "--methods")
    assert [row[0] for row in rows] == list(dmash.METHODS)
    cells = {row[0]: row[-2:] for row in rows}
    assert all(float(rate) > 0 for rate, _ in cells.values())
    agent = dmash.new_agent(dmash.Config(**SETTINGS))
    networks = agent.g, agent.h, agent.f, agent.pi, agent.Q
    size = sum(p.numel() for network in networks for p in network.parameters())
    assert cells["dma_star_sh"][1] == f"{size:,}"


def test_against_runs_the_code_of_the_other_folder(capfd, tmp_path):
    """A copy in which a gradient step takes 0.1 s more, and in which a setting has another name."""
    shutil.copy(ROOT / "aib_envs.py", tmp_path)
    text = (ROOT / "dmash.py").read_text().replace("polyak", "averaging")
    text = text.replace("        self.step += 1\n", "        self.step += 1; time.sleep(0.1)\n")
    (tmp_path / "dmash.py").write_text(text)
    _, here, there, ratio = printed(capfd, f"--against={tmp_path}")
    assert here[:2] == ["this", "checkout"]
    assert there[:2] == ["the", "other"]
    assert 0 < float(here[2]) < 100 < float(there[2])
    assert 0 < float(ratio[1]) < 1
    (tmp_path / "dmash.py").write_text("print(1 / 0)")
    assert benchmark.main([*WORDS, f"--against={tmp_path}"]) == 2
    assert "its code cannot be read (division by zero)" in capfd.readouterr().err


def test_bad_input_is_one_line(capsys):
    for arguments, message in (
        (["--method", "dma_star_shh"], "unknown method 'dma_star_shh'"),
        (["--against", "nowhere"], "--against nowhere: no dmash.py there"),
        (["--steps", "3"], "unrecognized arguments: --steps 3"),  # it would have no effect
    ):
        assert message in refusal(benchmark, arguments, capsys)
