"""Tests of studies/benchmark.py: short, and with small settings."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "studies")]
import benchmark  # noqa: E402

import aib_envs  # noqa: E402
import dmash  # noqa: E402

SMALL = "--env di_inv --contexts 4 --batch 16 --threads 1 --hidden 32 --hyper-hidden 8"
SMALL = f"{SMALL} --bottleneck 4".split()


@pytest.fixture
def short(monkeypatch):
    """Few and short turns."""
    monkeypatch.setattr(benchmark, "STEPS", 2)
    monkeypatch.setattr(benchmark, "TURNS", {"methods": 2, "against": 4})


def refusal(arguments, capsys):
    """What `benchmark.py` says when it refuses arguments: one line, and exit status 2."""
    assert benchmark.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1, said
    assert said.err.startswith("benchmark.py: error: ")
    return said.err


@pytest.mark.parametrize("method", ["dma_star_sh", "dr"])
def test_benchmark_prints_every_phase_and_the_phases_sum_to_the_total(method, capsys):
    benchmark.main([*"--env di_inv --contexts 4 --batch 16 --threads 1 --method".split(), method])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    ms = {words[0]: float(words[1]) for words in lines if words[-1] == "ms" and len(words) == 3}
    total = ms.pop("total")
    assert list(ms) == benchmark.PHASES
    assert sum(ms.values()) == pytest.approx(total, abs=0.01 * len(ms))  # two decimals each
    assert (ms["dynamics"] > 0) == (method == "dma_star_sh")
    first = [words[0] for words in lines]
    for word in "gradient vector peak update matrix ratio".split():
        assert word in first, word


@pytest.mark.parametrize("method", ["dma_star_sh", "da", "dr"])
def test_time_is_counted_in_the_phase_that_spends_it(method, monkeypatch):
    """On a clock that stands still but for what is planted: another time in each part of a step."""
    cfg, now = (
        dmash.Config(env="di_inv", method=method, contexts=4, batch=16, threads=1, hidden=8),
        0,
    )
    run, steps = benchmark.warm_run(cfg), 100  # one episode

    def plant(owner, name, ticks):
        function = getattr(owner, name)

        def call(*args, **kwargs):
            nonlocal now
            now += ticks
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    names = "dynamics_loss", "critic_loss", "actor_loss", "temperature_loss", "require_finite"
    for i, name in enumerate(names):
        plant(dmash, name, 10**i)
    plant(run.agent, "infer", 10**5)
    plant(run.agent, "act", 10**6)
    plant(run.rollout.envs, "step", 10**7)
    plant(run.rollout.replay, "sample", 10**8)
    plant(dmash, "move_towards", 10**9)  # of the targets
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now)
    seconds, total = benchmark.phase_seconds(run, steps)
    acted = steps + cfg.K  # with the warm-up
    expected = {
        "acting": acted * (10**5 + 10**6),
        "environments": acted * 10**7,
        "batch": steps * 10**8,
    }
    expected |= {"dynamics": 0, "critic": steps * 10, "actor": steps * (10**2 + 10**3)}
    expected["dynamics" if run.agent.f else "critic"] += (
        steps * 10**5
    )  # told at the start of an update
    expected["dynamics"] += steps if run.agent.f else 0
    assert seconds == expected | {"targets": steps * 10**9, "rest": steps * 10**4}
    assert total == sum(seconds.values())


@pytest.mark.parametrize("env, has_models", [("di_inv", False), ("cartpole_inv", True)])
def test_vector_step_against_the_bare_mj_step_calls(env, has_models):
    vector, bare = benchmark.vector_step_times(env, contexts=3, steps=20)
    assert vector > 0 and (bare > 0 if has_models else bare is None)


def test_environments_lists_them_all(monkeypatch, capsys):
    times = {"di_inv": (1.0, None), "walker": (3.0, 2.0)}
    seen = []

    def step_times(env, contexts):
        seen.append((env, contexts))
        return times.get(env, (2.0, 1.0))

    monkeypatch.setattr(benchmark, "vector_step_times", step_times)
    assert benchmark.main(["--environments"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]}
    assert set(rows) == {env for env in aib_envs.ENVS if not env.startswith("ode_")}
    assert seen == [(env, 20) for env in rows]
    assert rows["di_inv"] == ["1.00", "–", "–"] and rows["walker"] == ["3.00", "2.00", "1.50"]


def test_methods_lists_them_all(short, capsys):
    benchmark.main([*SMALL, "--methods"])
    _, head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head[0] == "--method" and [row[0] for row in rows] == list(dmash.METHODS)
    table = {
        row[0]: (float(row[-4]), row[-3], int(row[-2].replace(",", "")), row[-1]) for row in rows
    }
    assert all(rate > 0 for rate, *_ in table.values())
    assert table["da"][1] == table["da"][3] == "1.00"
    agent = dmash.new_agent(
        dmash.Config(env="di_inv", contexts=4, hidden=32, hyper_hidden=8, bottleneck=4)
    )
    networks = [agent.g, agent.h, agent.f, agent.pi, agent.Q]
    assert table["dma_star_sh"][2] == sum(
        p.numel() for network in networks for p in network.parameters()
    )


def against(folder, capfd):
    """Milliseconds here and there, and the ratio."""
    benchmark.main([*SMALL, "--against", str(folder)])
    here, there, ratio = [line.split() for line in capfd.readouterr().out.splitlines()[1:]]
    assert (here[:2], there[:2], ratio[0]) == (["this", "checkout"], ["the", "other"], "ratio")
    return float(here[2]), float(there[2]), float(ratio[1])


def test_a_checkout_against_itself(short, capfd):
    here, there, ratio = against(ROOT, capfd)
    assert here > 0 and there > 0 and ratio > 0


def test_against_runs_the_code_of_the_other_folder(short, capfd, tmp_path):
    """A copy in which a gradient step takes 0.1 s more, and in which a setting has another name."""
    shutil.copy(ROOT / "aib_envs.py", tmp_path)
    text = (ROOT / "dmash.py").read_text().replace("polyak", "averaging")
    text, main = text.split('if __name__ == "__main__":')
    slow = (
        "step = Run.gradient_step\nRun.gradient_step = lambda run: (time.sleep(0.1), step(run))\n"
    )
    (tmp_path / "dmash.py").write_text(f"{text}{slow}")
    here, there, ratio = against(tmp_path, capfd)
    assert there > 100 and ratio < 1
    assert "polyak" in refusal([*SMALL, "--polyak", "0.01", "--against", str(tmp_path)], capfd)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--env cartpole", "unknown environment 'cartpole'"),
        ("--method dma_star_shh", "unknown method 'dma_star_shh'"),
        ("--batch many", "--batch many: must be a whole number"),
        ("--steps 5", "unrecognized arguments: --steps 5"),
        ("--methods --method dr", "--method: not with --methods"),
        ("--methods --against .", "not allowed with argument"),
        ("--environments --K 3", "--K: not with --environments"),
        (f"--against {ROOT / 'studies'}", f"--against {ROOT / 'studies'}: no dmash.py there"),
        ("--against nowhere", "--against nowhere: no dmash.py there"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert message in refusal(arguments.split(), capsys)


def test_benchmark_runs_from_any_folder_without_installing(tmp_path):
    command = [sys.executable, str(ROOT / "studies" / "benchmark.py"), "--env", "cartpole"]
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stdout == "" and refused.stderr.count("\n") == 1, (
        refused.stderr
    )
    assert not list(tmp_path.iterdir())


def test_help_names_the_settings_that_have_an_effect(capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--help"])
    text = capsys.readouterr().out
    assert not stop.value.code and "--batch" in text and "--steps" not in text
