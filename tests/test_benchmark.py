"""Tests of studies/benchmark.py: short, and with small settings."""

import shutil
import sys

import pytest
from untrained import ROOT, SMALL, refusal

sys.path.insert(0, str(ROOT / "studies"))
import benchmark  # noqa: E402

import aib_envs  # noqa: E402
import dmash  # noqa: E402

SETTINGS = SMALL | dict(env="di_inv", policy_average=0)
WORDS = [f"{dmash.flag(name)}={value}" for name, value in SETTINGS.items()]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Few and short turns."""
    monkeypatch.setattr(benchmark, "STEPS", 2)
    monkeypatch.setattr(benchmark, "TURNS", 4)
    monkeypatch.setattr(benchmark, "METHOD_TURNS", 2)


def printed(capfd, *words):
    """The words of each line that benchmark.py prints."""
    assert benchmark.main([*WORDS, *words]) == 0
    return [line.split() for line in capfd.readouterr().out.splitlines()]


def test_phases_sum_to_the_total(capfd):
    _, rate, *rows = printed(capfd)
    ms = {phase: float(number) for phase, number, _ in rows}
    total = ms.pop("total")
    assert list(ms) == benchmark.PHASES
    assert sum(ms.values()) == pytest.approx(total, abs=0.01 * len(ms))  # two decimals each
    assert float(rate[-1]) == pytest.approx(1000 / total, rel=0.01)


@pytest.mark.parametrize("method", ["dma_star_sh", "da"])
def test_time_is_counted_in_the_phase_that_spends_it(method, monkeypatch):
    """On a clock that stands still but for what is planted: another time in each part of a step."""
    run, steps, now = benchmark.warm_run(dmash.Config(**SETTINGS, method=method)), 100, 0

    def plant(owner, name, ticks):
        function = getattr(owner, name)

        def call(*args, **kwargs):
            nonlocal now
            now += ticks
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    names = "dynamics_loss", "critic_loss", "actor_loss", "temperature_loss", "require_finite"
    for i, name in enumerate([*names, "move_towards"]):
        plant(dmash, name, 10**i)
    plant(run.agent, "infer", 10**6)
    plant(run.agent, "act", 10**7)
    plant(run.rollout.envs, "step", 10**8)
    plant(run.rollout.replay, "sample", 10**9)
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now)
    seconds, total = benchmark.phase_seconds(run, steps)
    acted = steps + run.cfg.K  # an episode with its warm-up
    expected = {"acting": acted * (10**6 + 10**7), "environments": acted * 10**8}
    expected |= {"batch": steps * 10**9, "dynamics": 0, "critic": steps * 10}
    expected |= {"actor": steps * 1100, "targets": steps * 10**5, "rest": steps * 10**4}
    expected["dynamics" if run.agent.f else "critic"] += steps * 10**6  # where an update begins
    if run.agent.f:
        expected["dynamics"] += steps
    assert seconds == expected
    assert total == sum(seconds.values())


@pytest.mark.parametrize("env, has_models", [("di_inv", False), ("cartpole_inv", True)])
def test_vector_step_against_the_bare_mj_step_calls(env, has_models):
    vector, bare = benchmark.vector_step_times(env, contexts=3, steps=20)
    assert vector > 0
    assert bare > 0 if has_models else bare is None


def test_environments_lists_them_all(monkeypatch, capfd):
    times = {"di_inv": (1.0, None), "walker": (3.0, 2.0)}
    monkeypatch.setattr(benchmark, "vector_step_times", lambda env, n: times.get(env, (n, 1.0)))
    _, *rows = printed(capfd, "--environments")
    cells = {row[0]: row[1:] for row in rows}
    assert list(cells) == [env for env in aib_envs.ENVS if not env.startswith("ode_")]
    assert cells["di_inv"] == ["1.00", "–", "–"]
    assert cells["walker"] == ["3.00", "2.00", "1.50"]
    assert cells["cartpole_inv"] == ["20.00", "1.00", "20.00"]


def test_methods_lists_them_all(capfd):
    _, _, *rows = printed(capfd, "--methods")
    assert [row[0] for row in rows] == list(dmash.METHODS)
    cells = {row[0]: row[-4:] for row in rows}
    assert all(float(rate) > 0 for rate, *_ in cells.values())
    assert cells["da"][1] == cells["da"][3] == "1.00"
    agent = dmash.new_agent(dmash.Config(**SETTINGS))
    networks = agent.g, agent.h, agent.f, agent.pi, agent.Q
    size = sum(p.numel() for network in networks for p in network.parameters())
    assert cells["dma_star_sh"][2] == f"{size:,}"


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
    assert "its code does not run" in capfd.readouterr().err


def test_bad_input_is_one_line(capsys):
    for arguments, message in (
        (["--method", "dma_star_shh"], "unknown method 'dma_star_shh'"),
        (["--against", "nowhere"], "--against nowhere: no dmash.py there"),
        (["--steps", "3"], "unrecognized arguments: --steps 3"),  # it would have no effect
    ):
        assert message in refusal(benchmark, arguments, capsys)
