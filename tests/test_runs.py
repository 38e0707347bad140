"""Tests of runs: files, exact resume, faults, the command line, policies in loops of one's own.

A run that was disturbed must equal, bit for bit, one that was not.
"""

import csv
import dataclasses
import gc
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map_only

import aib_envs
import dmash

ROOT = Path(dmash.__file__).resolve().parent
FILES = ["checkpoint.pt", "config.json", "metrics.csv", "per_context.csv", "policy.pt"]
SMALL = dict(env="di_inv", contexts=4, batch=32, random_steps=30, steps=40, eval_every=20)
SMALL |= dict(rollouts=1, threads=1, hidden=64, bottleneck=8)
# Here an episode has 40 steps, and a warm-up 10. With SMALL a run calls Rollout.step 10 + 30 times
# before its first gradient step. Gradient step 11 begins an episode. An evaluation takes 50 calls.
HORIZON, K = 40, 10
TABLE = aib_envs.ENVS  # with episodes of full length

not_on_windows = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals or files")


# ---- Helpers ------------------------------------------------------------------------------------


def arguments(out, *flags, **changes):
    """A command line that trains for seconds."""
    settings = SMALL | changes | {"out": out}
    return [f"{dmash.flag(name)}={value}" for name, value in settings.items()] + list(flags)


def folder_of(out, env="di_inv", method="dma_star_sh", seed=1, **rest):
    return Path(out) / f"{env.replace(':', '.')}__{method}__s{seed}"


def train(out, *flags, status=0, **changes):
    """Runs the command. Returns its folder."""
    assert dmash.main(arguments(out, *flags, **changes)) == status
    return folder_of(out, **changes)


def resume(folder, *flags, status=0):
    assert dmash.main([f"--resume={folder}", *flags]) == status


def error_of(capsys):
    """What stands after the program's name in the one line of an error."""
    error = capsys.readouterr().err
    assert error.startswith("dmash.py: error: ") and error.count("\n") == 1, error
    return error.removeprefix("dmash.py: error: ").rstrip("\n")


def command(*words, code=None, cwd=ROOT, **options):
    """A process of its own."""
    script = [str(ROOT / "dmash.py")] if code is None else ["-c", code]
    line = [sys.executable, *script, *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, timeout=300, **options)


def read(path):
    """The rows of a table, without the times."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.pop("seconds", None)
        row.pop("steps_per_second", None)
    return rows


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def as_text(state):
    """Everything in a checkpoint, the bits of its tensors included."""
    return str(tree_map_only(torch.Tensor, lambda value: value.numpy().tobytes(), state))


def state_of(folder):
    """A checkpoint without times, and without what a later version may write otherwise."""
    state = dmash.load(folder / "checkpoint.pt")
    del state["seconds"], state["version"], state["settings"]["out"]
    for evaluation in state["history"]:
        evaluation["metrics"]["seconds"] = evaluation["metrics"]["steps_per_second"] = 0
    return state


def assert_same_run(ours, theirs):
    """Two run folders hold the same results, bit for bit."""
    for name in ("metrics.csv", "per_context.csv"):
        assert read(ours / name) == read(theirs / name)
    agents = [dmash.load(folder / "policy.pt")["agent"] for folder in (ours, theirs)]
    assert as_text(agents[0]) == as_text(agents[1])
    assert as_text(state_of(ours)) == as_text(state_of(theirs))


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def change_file(path, change):
    """Writes what `change` makes of the dict in the file."""
    path.write_bytes(saved(change(dmash.load(path))))


def from_call(patch, owner, name, n, change):
    """From its call number n on, a function returns change(its result, its first argument)."""
    function, calls = getattr(owner, name), itertools.count(1)

    def changed(*args, **kwargs):
        result = function(*args, **kwargs)
        if next(calls) >= n:
            return change(result, args[0])
        return result

    patch.setattr(owner, name, changed)


def at_call(patch, owner, name, n, action):
    """Calls `action` once, after call number n of a function."""
    pending = [action]

    def change(result, first):
        if pending:
            pending.pop()()
        return result

    from_call(patch, owner, name, n, change)


def stopping(patch, call, number=signal.SIGINT):
    """The run gets a signal in that call of Rollout.step."""
    at_call(patch, dmash.Rollout, "step", call, lambda: signal.raise_signal(number))


def no_evaluation(agent, cfg, contexts, *rest):
    return np.zeros((2, len(contexts), 1))


plot = dmash.plot


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing would take a third of the time."""
    monkeypatch.setattr(dmash, "plot", lambda run: None)


@pytest.fixture(scope="module", autouse=True)
def episodes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aib_envs, "ENVS", with_episodes(HORIZON, K))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, not to be changed."""
    return train(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def folder(run, tmp_path):
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(run, tmp_path / run.name))


def with_episodes(horizon, K):
    """The table, in which every environment has such episodes."""
    table = {}
    for env_id, spec in TABLE.items():
        table[env_id] = dataclasses.replace(spec, horizon=horizon, K=K)
    return table


@pytest.fixture
def full_episodes(monkeypatch):
    monkeypatch.setattr(aib_envs, "ENVS", TABLE)


@pytest.fixture
def short_episodes(monkeypatch):
    monkeypatch.setattr(aib_envs, "ENVS", with_episodes(12, 6))


@pytest.fixture
def registered(monkeypatch):
    """What a test registers or imports is forgotten after it."""
    monkeypatch.setattr(aib_envs, "ENVS", dict(aib_envs.ENVS))
    registry = gymnasium.envs.registration.registry.copy()
    monkeypatch.setattr(gymnasium.envs.registration, "registry", registry)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_module", None)


# ---- Files of a run -----------------------------------------------------------------------------


def test_run_folder(run):
    assert set(FILES) <= set(os.listdir(run)) <= {*FILES, "curve.png"}
    metrics = read(run / "metrics.csv")
    losses = ["dynamics_loss", "critic_loss", "actor_loss", "alpha"]
    diverged = ["diverged_train", "diverged_eval_in", "diverged_eval_out"]
    sets = ["train", "eval_in", "eval_out"]
    assert list(metrics[0]) == ["step", "env_steps", *losses, *sets, *diverged]
    assert [row["step"] for row in metrics] == ["20", "40"]
    assert [row[name] for row in metrics for name in diverged] == ["0"] * 6
    assert metrics[0]["env_steps"] == str(4 * (10 + 30 + 10 + 20))  # the warm-ups count
    assert metrics[1]["env_steps"] == str(4 * (10 + 30 + 10 + 40))
    rows = read(run / "per_context.csv")
    assert list(rows[0]) == ["step", "set", "index", "mass", "action_factor", "return", "diverged"]
    assert len(rows) == 2 * 3 * 4
    for name in sets:
        last = [row for row in rows if row["step"] == "40" and row["set"] == name]
        mean = np.mean([float(row["return"]) for row in last])
        assert float(metrics[1][name]) == pytest.approx(mean, abs=1e-3)
    config = json.loads((run / "config.json").read_text())
    assert config.items() >= {"env": "di_inv", "K": 10, "steps": 40, "batch": 32}.items()
    assert config["torch"] == torch.__version__
    assert config["version"] == dmash.code_version()


def test_a_policy_holds_what_acting_needs_and_no_more(run):
    state = torch.load(run / "policy.pt", weights_only=True)
    assert set(state) == {"settings", "version", "step", "agent"}
    assert {name.split(".")[0] for name in state["agent"]} == {"g", "h", "pi"}
    trained = dmash.load(run / "checkpoint.pt")["agent"]
    cfg, agent = dmash.load_policy(run)
    assert (cfg.env, cfg.steps, agent.step, agent.version) == ("di_inv", 40, 40, state["version"])
    for name, weight in state["agent"].items():
        assert torch.equal(agent.state_dict()[name], weight)
        assert torch.equal(trained[name], weight)


def test_snapshots_keep_the_policy_of_every_evaluation(tmp_path, run):
    policies = train(tmp_path, "--snapshots") / "policies"
    assert sorted(os.listdir(policies)) == ["20.pt", "40.pt"]
    for row in read(run / "metrics.csv"):
        cfg, agent = dmash.load_policy(policies / f"{row['step']}.pt")
        assert agent.step == int(row["step"])
        returns = dmash.by_set(dmash.evaluate_sets(agent, cfg, 1), "return")
        assert returns == pytest.approx({name: float(row[name]) for name in returns}, rel=1e-5)


def test_eval_reproduces_the_last_row_and_writes_nothing(run, capsys, tmp_path):
    before = contents(run)
    given_away = shutil.copy(run / "policy.pt", tmp_path / "given_away.pt")
    row = read(run / "metrics.csv")[-1]
    for path in (run, given_away):
        assert dmash.main(["--eval", str(path), "--per-context", "--rollouts", "1"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("di_inv, dma_star_sh, seed 1, step 40, ")
        assert lines[1].startswith("4 contexts x 1 rollouts in each set")  # shows that it works
        assert lines[2] == "set,index,mass,action_factor,return,diverged"
        assert len(lines) == 3 + 3 * 4 + 1
        means = "  ".join(f"{name} {float(row[name]):.1f}" for name in dmash.SETS)
        assert lines[-1] == f"average episodic return: {means}"
    assert contents(run) == before


def test_a_stranger_s_version_is_printed_harmlessly(folder, capsys):
    change_file(folder / "policy.pt", lambda state: state | {"version": "x\nstep 9\x1b[2J"})
    assert dmash.main(["--eval", str(folder)]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.endswith(r"'x\nstep 9\x1b[2J'")


def test_the_same_seed_gives_the_same_run_and_another_seed_another(run, tmp_path):
    assert_same_run(train(tmp_path), run)
    other = train(tmp_path, seed=2)
    assert read(other / "metrics.csv") != read(run / "metrics.csv")


def test_a_library_leaves_global_state_alone(run):
    def world():
        return torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype()

    before = world()
    cfg, agent = dmash.load_policy(run / "policy.pt")
    contexts = aib_envs.context_sets(cfg.env, 3)["eval_out"]
    returns, diverged = dmash.evaluate(agent, cfg, contexts, rollouts=2)
    dmash.Policy(cfg, agent).act(np.zeros(4))
    assert returns.shape == diverged.shape == (3, 2)
    assert world() == before


def test_importing_has_no_side_effect(tmp_path):
    """The libraries do what they do by themselves before."""
    code = """if True:
        import os, random, sys
        import gymnasium, mujoco, numpy, torch
        def world():
            generators = random.getstate(), str(numpy.random.get_state()), torch.get_rng_state()
            return str((dict(os.environ), os.listdir(), torch.get_num_threads(), *generators))
        before, modules = world(), set(sys.modules)
        sys.path.insert(0, sys.argv[1])
        import aib_envs, dmash
        assert before == world()
        new = {name.split(".")[0] for name in set(sys.modules) - modules}
        assert not new & {"matplotlib", "OpenGL", "glfw"}, new"""
    done = command(ROOT, code=code, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_version(tmp_path, monkeypatch, capsys):
    """It tells the code, wherever the two files lie."""
    for name in ("dmash.py", "aib_envs.py"):
        shutil.copy(ROOT / name, tmp_path)
        monkeypatch.setattr(sys.modules[Path(name).stem], "__file__", str(tmp_path / name))
    alone = dmash.code_version()
    assert len(alone) == 12 and int(alone, 16) >= 0

    def git(*words):
        user = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(["git", *user, *words], cwd=tmp_path, capture_output=True, text=True)
        return done.stdout.strip()

    # Another project's repository around the files, which it does not track.
    (tmp_path / "course.txt").touch()
    git("init")
    git("add", "course.txt")
    git("commit", "-m", "the course")
    git("tag", "v7")
    assert dmash.code_version() == alone
    with monkeypatch.context() as patch:
        patch.setenv("GIT_DIR", str(ROOT / ".git"))
        assert dmash.code_version() == alone
    git("add", ".")
    git("commit", "-m", "the code")
    assert dmash.code_version() == f"{alone} {git('rev-parse', '--short', 'HEAD')}"
    with open(tmp_path / "aib_envs.py", "a") as file:
        file.write("\n")
    assert dmash.code_version()[:12] != alone
    with pytest.raises(SystemExit):
        dmash.main(["--version"])
    assert capsys.readouterr().out == f"{dmash.__version__} {dmash.code_version()}\n"


# ---- Exact resume -------------------------------------------------------------------------------

INT, TERM = signal.SIGINT, signal.SIGTERM
STOPS = [  # calls of Rollout.step at which signals come, step of the checkpoint, evaluations in it
    ([20], INT, 0, []),  # among the random steps
    ([41], TERM, 1, []),
    ([55], INT, 11, []),  # in the warm-up of an episode of training
    ([70], TERM, 20, []),  # in the step before an evaluation
    ([75], INT, 20, []),  # in the evaluation's warm-up
    ([100], TERM, 20, []),  # in the middle of the evaluation
    ([121], INT, 21, [20]),
    ([43, 20, 60], TERM, 23, [20]),  # again and again
    ([150], INT, 40, [20]),  # in the last evaluation
]


@not_on_windows
@pytest.mark.parametrize("calls, number, step, evaluations", STOPS)
def test_a_stopped_run_resumes_exactly(
    calls, number, step, evaluations, run, tmp_path, monkeypatch, capsys
):
    folder = folder_of(tmp_path)
    for call in calls:
        with monkeypatch.context() as patch:
            stopping(patch, call, number)
            assert dmash.main(arguments(tmp_path, "--go-on")) == 128 + number
        assert f"\nstopped at step {dmash.load(folder / 'checkpoint.pt')['step']}; to go on: " in (
            capsys.readouterr().out
        )
    state = dmash.load(folder / "checkpoint.pt")
    assert state["step"] == step
    assert [evaluation["metrics"]["step"] for evaluation in state["history"]] == evaluations
    resume(folder)
    assert_same_run(folder, run)


TINY = dict(
    K=6, contexts=2, batch=4, random_steps=5, steps=12, eval_every=9, hidden=16, subsample=0.5
)


@pytest.mark.parametrize("env_id", [name for name in aib_envs.ENVS if name[:4] != "ode_"])
def test_every_environment_trains_and_resumes_in_mid_episode(
    env_id, short_episodes, tmp_path, monkeypatch
):
    whole = train(tmp_path / "whole", env=env_id, **TINY)
    row = read(whole / "metrics.csv")[-1]
    assert np.isfinite([float(row[name]) for name in dmash.SETS]).all()
    dims = [dim.name for dim in aib_envs.ENVS[env_id].context]
    columns = ["step", "set", "index", *dims, "return", "diverged"]
    assert list(read(whole / "per_context.csv")[0]) == columns
    with monkeypatch.context() as patch:
        stopping(patch, 6 + 5 + 4)
        stopped = train(tmp_path / "stopped", env=env_id, status=130, **TINY)
    resume(stopped)
    assert_same_run(stopped, whole)


@pytest.mark.parametrize("method", dmash.METHODS)
def test_every_method_trains_and_resumes(method, short_episodes, tmp_path, monkeypatch):
    """With a moving average of the policy, too. Every weight is trained."""
    changes = TINY | dict(method=method, policy_average=0.1)
    whole = train(tmp_path / "whole", **changes)
    with monkeypatch.context() as patch:
        stopping(patch, 6 + 5 + 4)
        stopped = train(tmp_path / "stopped", status=130, **changes)
    resume(stopped)
    assert_same_run(stopped, whole)
    cfg, agent = dmash.load_policy(whole)
    assert (agent.g is None) == (method in ("concat", "da", "dr"))
    fresh = dmash.Run(cfg, "unused").agent.state_dict()
    for name, weight in dmash.load(whole / "checkpoint.pt")["agent"].items():
        assert not torch.equal(weight, fresh[name]), name


MY_MODULE = """
import aib_envs
aib_envs.register("mine", aib_envs.DoubleIntegrator, [aib_envs.MASS], 12)
"""


def test_an_environment_of_a_module_trains(registered, tmp_path, monkeypatch, capsys):
    changes = TINY | dict(env="my_module:mine")
    train(tmp_path, status=2, **changes)
    assert error_of(capsys) == "--env my_module:mine: No module named 'my_module'"
    (tmp_path / "my_module.py").write_text(MY_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    folder = train(tmp_path, **changes)
    assert list(read(folder / "per_context.csv")[0])[3] == "mass"
    train(tmp_path, status=2, **changes | dict(env="my_module:mime"))
    assert "unknown environment 'mime' (did you mean mine?)" in error_of(capsys)
    # A process that has the policy alone imports the module by itself.
    del sys.modules["my_module"], aib_envs.ENVS["mine"]
    del gymnasium.envs.registration.registry["aib/mine-v0"]
    capsys.readouterr()
    assert dmash.main(["--eval", str(folder), "--rollouts=1"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("my_module:mine, dma_star_sh, seed 1, step 12, ")


def test_an_environment_of_gymnasium_trains_and_resumes(tmp_path, monkeypatch, capsys):
    changes = TINY | dict(env="gymnasium:Pendulum-v1")
    with monkeypatch.context() as patch:
        stopping(patch, 6 + 5 + 4)
        folder = train(tmp_path, status=130, **changes)
    capsys.readouterr()
    resume(folder)
    told = "a new episode begins: the state of gymnasium:Pendulum-v1 cannot be saved"
    assert capsys.readouterr().out.splitlines()[0] == told
    assert len(read(folder / "metrics.csv")) == 2
    assert dmash.load(folder / "checkpoint.pt")["rollout"]["replay"]["t"] == 6 + 5 + 4 + 6 + 8


def test_terminal_states_met_later_stop_a_run_in_one_line(tmp_path, monkeypatch, capsys):
    def terminate(task, actions):
        raise aib_envs.BadEnvironment("has terminal states")

    monkeypatch.setattr(aib_envs.GymnasiumTask, "advance", terminate)
    train(tmp_path, status=2, env="gymnasium:Pendulum-v1")
    assert error_of(capsys) == "has terminal states"


def garble(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("damage", [Path.unlink, garble])
@pytest.mark.parametrize("way", ["--resume", "--go-on"])
def test_all_files_are_made_again_from_the_checkpoint(way, damage, run, folder):
    """Also those of a complete run."""
    for name in FILES[1:]:
        damage(folder / name)
    if way == "--resume":
        resume(folder)
    else:
        train(folder.parent, "--go-on")
    assert_same_run(folder, run)
    configs = [json.loads((where / "config.json").read_text()) for where in (folder, run)]
    assert configs[0] == configs[1] | {"out": configs[0]["out"]}


class Killed(BaseException):
    """Stands for SIGKILL: nothing in dmash.py catches it."""


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_a_run_killed_between_two_files_of_a_save_goes_on(n, run, tmp_path, monkeypatch):
    """The first save writes three files, each later one five."""

    def kill():
        raise Killed

    with monkeypatch.context() as patch:
        at_call(patch, os, "replace", n, kill)
        with pytest.raises(Killed):
            train(tmp_path)
    folder = train(tmp_path, "--go-on")
    assert_same_run(folder, run)


def test_a_kill_in_the_middle_of_a_file_loses_nothing(run, folder, tmp_path):
    (folder / "checkpoint.pt.partial").write_bytes(b"half")
    resume(folder)
    assert_same_run(folder, run)
    other = folder_of(tmp_path / "other")
    other.mkdir(parents=True)
    (other / "checkpoint.pt.partial").write_bytes(b"half")
    train(tmp_path / "other")
    assert_same_run(other, run)


def in_child(line, seconds=None):
    """The command in a forked process, killed after so many seconds. Returns its exit code."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(dmash.main(line))
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def survive_kills(out, kills):
    """Kills short runs at random times, and resumes each to its end.

    Returns the last step evaluated at each kill.
    """
    sys.modules["matplotlib"] = None  # importing it would take most of the time
    aib_envs.ENVS = with_episodes(12, 6)
    changes = dict(steps=24, eval_every=4, hidden=16, contexts=2)
    rng, found = np.random.default_rng(0), []
    for name in ("warm-up", "whole"):  # the first run also imports what torch imports late
        begin = time.perf_counter()
        whole = train(out / name, **changes)
        duration = time.perf_counter() - begin
    for kill in range(kills):
        line = arguments(out / str(kill), "--go-on", **changes)
        folder = folder_of(out / str(kill))
        in_child(line, duration * rng.random())
        rows = []
        if (folder / "metrics.csv").exists():
            rows = read(folder / "metrics.csv")
        assert rows == read(whole / "metrics.csv")[: len(rows)]
        for path in folder.glob("*.pt"):
            dmash.load(path)  # raises if it is damaged
        assert in_child(line) == 0
        assert_same_run(folder, whole)
        found.append(len(rows))
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are killed where processes can fork")
def test_runs_killed_at_random_times_resume_to_the_same_end(tmp_path):
    """In a new process torch has no threads yet, so that a fork is safe."""
    code = """if True:
        import conftest, pathlib, sys, test_runs
        found = test_runs.survive_kills(pathlib.Path(sys.argv[1]), 12)
        print(found, file=sys.stderr)"""
    done = command(tmp_path, code=code, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stderr)
    assert len(found) == 12
    assert len(set(found)) >= 3, found  # the kills came at different times


def test_a_checkpoint_is_saved_without_the_empty_rows_of_the_replay(run):
    """The replay has 124,000 rows in a ring."""
    assert (run / "checkpoint.pt").stat().st_size < 5e6
    assert (run / "policy.pt").stat().st_size < 1e6


def test_code_that_changed_between_two_parts_of_a_run_is_told(folder, monkeypatch, capsys):
    old = dmash.code_version()
    monkeypatch.setattr(dmash, "code_version", lambda: "other")
    resume(folder)
    assert f"begun by version {old!r}, goes on with 'other'\n" in capsys.readouterr().out
    assert json.loads((folder / "config.json").read_text())["version"] == "other"


def test_steps_may_be_raised_on_resume(folder, capsys):
    resume(folder, "--steps", "50")
    assert [row["step"] for row in read(folder / "metrics.csv")] == ["20", "40", "50"]
    assert json.loads((folder / "config.json").read_text())["steps"] == 50
    capsys.readouterr()
    resume(folder, "--steps", "45", status=2)
    assert error_of(capsys).startswith("--steps 45: must be a whole number from 50 ")


def test_go_on(folder, run, capsys):
    """It finds a run complete, goes on with it, or refuses other settings."""
    out = folder.parent
    train(out, "--go-on")
    assert "\ncomplete: checkpoint.pt, config.json, " in capsys.readouterr().out
    train(out, "--go-on", steps=30, threads=2)  # the run has these steps
    assert_same_run(folder, run)
    train(out, "--go-on", status=2, gamma=0.5)
    assert error_of(capsys) == f"--gamma 0.5: {folder} holds a run with --gamma 0.99"
    train(out, "--go-on", steps=50)
    assert read(folder / "metrics.csv")[-1]["step"] == "50"
    (folder / "checkpoint.pt").write_bytes(b"")
    train(out, "--go-on", status=2)
    assert "checkpoint.pt cannot be read" in error_of(capsys)


@not_on_windows
def test_a_second_process_is_refused_and_sigterm_saves(tmp_path, capsys):
    line = [sys.executable, str(ROOT / "dmash.py"), *arguments(tmp_path, steps=100_000)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = folder_of(tmp_path)
    assert "step 0 of 100,000" in process.stdout.readline()
    assert process.stdout.readline().startswith("step 20 ")
    resume(folder, status=2)
    assert error_of(capsys) == f"{folder} is in use by another process"
    train(tmp_path, status=2)
    assert error_of(capsys) == f"{folder} is in use by another process"
    process.terminate()
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (143, "")
    assert out.splitlines()[-1].startswith("stopped at step ")
    assert dmash.load(folder / "checkpoint.pt")["step"] >= 20


@not_on_windows
@pytest.mark.parametrize("out", ["a b", "it's", "-dash"])
def test_the_line_that_says_how_to_go_on_works(out, tmp_path, monkeypatch, capsys):
    """As a shell reads it. The run is then complete."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "dmash.py")])
    with monkeypatch.context() as patch:
        stopping(patch, 43)
        train(out, status=130, steps=4, eval_every=4)
    line = capsys.readouterr().out.splitlines()[-1].partition("to go on: ")[2]
    words = subprocess.run(f"printf '%s\\n' {line}", shell=True, capture_output=True, text=True)
    assert words.stdout.splitlines()[:2] == [sys.executable, str(ROOT / "dmash.py")]
    assert dmash.main(words.stdout.splitlines()[2:]) == 0
    assert len(read(folder_of(out) / "metrics.csv")) == 1


@not_on_windows
def test_a_second_signal_stops_at_once_and_handlers_are_put_back(tmp_path, monkeypatch):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)

    at_call(monkeypatch, dmash.Rollout, "step", 43, twice)
    folder = train(tmp_path, status=130)
    assert dmash.load(folder / "checkpoint.pt")["step"] == 0
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_thread_other_than_the_main_one_trains(run, tmp_path):
    thread = threading.Thread(target=train, args=[tmp_path])
    thread.start()
    thread.join()
    assert_same_run(folder_of(tmp_path), run)


# ---- What is shown ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dma_star", "dr"])
def test_an_evaluation_prints_a_line(method, short_episodes, tmp_path, capsys):
    train(tmp_path, **TINY | dict(method=method))
    lines = capsys.readouterr().out.splitlines()
    assert [line[:8] for line in lines[1:3]] == ["step 9  ", "step 12 "]
    assert ("  dynamics loss " in lines[1]) == (method == "dma_star")
    assert "nan" not in lines[1]


def test_without_tqdm_a_line_comes_every_30_seconds(monkeypatch, capsys):
    now = [0]
    monkeypatch.setattr(dmash, "tqdm", None)
    monkeypatch.setattr(dmash, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for _ in dmash.progress("gradient steps", 100, 400, lambda: "training return 7.0"):
        now[0] += 0.5  # so that 2 steps a second are done
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 300 / 2 / 30
    # 240 steps are left after the first.
    pace = "2.0 a second, 2 min left, training return 7.0"
    assert lines[0] == f"160 of 400 gradient steps, {pace}"


def test_tqdm_s_bar_shows_the_training_return(monkeypatch):
    pytest.importorskip("tqdm")
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in dmash.progress("gradient steps", 0, 300, lambda: "training return 7.0"):
        pass
    assert "training return 7.0" in stream.getvalue()


def test_the_training_return_is_that_of_the_last_episode(short_episodes, monkeypatch):
    rewards = []

    def record(result, envs):
        rewards.append(result[1])
        return result

    from_call(monkeypatch, aib_envs.VectorEnv, "step", 1, record)
    run = dmash.Run(dmash.Config(**TINY | dict(env="cartpole_inv", threads=1)), "unused")
    for _ in range(2 * 12):
        run.rollout.collect(random=True)
    expected = np.sum(rewards[-12:], axis=0).mean()
    assert expected > 0.1
    assert run.recent_return() == f"training return {expected:.1f}"


def test_the_picture(run, tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    drawn = []
    monkeypatch.setattr(dmash, "plot", plot)
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    train(tmp_path / "costs $5")
    curves, last = drawn[0].axes
    rows = read(run / "metrics.csv")
    for line, name in zip(curves.lines, dmash.SETS):
        assert line.get_xydata()[:, 0].tolist() == [20, 40]
        expected = [float(row[name]) for row in rows]
        np.testing.assert_allclose(line.get_xydata()[:, 1], expected, rtol=1e-4)
    rows = [row for row in read(run / "per_context.csv") if row["step"] == "40"]
    points = np.concatenate([line.get_xydata() for line in last.lines])
    expected = [[float(row["mass"]), float(row["return"])] for row in rows]
    np.testing.assert_allclose(points, expected, rtol=1e-4)


def test_without_matplotlib_a_line_says_how_to_get_the_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dmash, "plot", plot)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = train(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "curve.png is not drawn: it needs matplotlib (pip install matplotlib)"
    assert lines[-1] == f"complete: {', '.join(FILES)}"
    assert sorted(os.listdir(folder)) == FILES


def test_table_of_methods(capsys):
    assert dmash.main(["--list-methods"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["--method", *dmash.METHODS]
    assert lines[7] == ["da", "DA", "c", "adapter", "none", "own", "0.0", "False", "False", "0.0"]


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as stopped:
        dmash.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for name in dmash.Config.__dataclass_fields__:
        assert f"  {dmash.flag(name)}" in text


# ---- The command line ---------------------------------------------------------------------------


def test_numbers_may_be_text_with_an_exponent():
    cfg = dmash.Config(steps="1e5", seed="4294967295", gamma="1", critic_lr=1)
    values = [cfg.steps, cfg.seed, cfg.gamma, cfg.critic_lr]
    assert values == [100_000, 4294967295, 1.0, 1.0]
    assert [type(value) for value in values] == [int, int, float, float]


def test_quick(short_episodes, tmp_path):
    """What is given beside it comes first."""
    cfg = dmash.quick(env="reacher_easy_inv", polyak=0.5)
    assert (cfg.quick, cfg.steps, cfg.polyak, cfg.alpha) == (True, 20_000, 0.5, 0.1)
    assert not dmash.Config().quick
    assert dmash.main(arguments(tmp_path, "--quick", **TINY)) == 0
    folder = tmp_path / "di_inv__dma_star_sh__quick__s1"
    config = json.loads((folder / "config.json").read_text())
    given = {"quick": True, "eval_every": 9, "polyak": dmash.QUICK["polyak"]}
    assert config.items() >= given.items()
    names = {name.split(".")[0] for name in dmash.load(folder / "policy.pt")["agent"]}
    assert names == {"g", "h", "pi", "pi_average"}
    resume(folder, "--steps", "13")
    assert dmash.main(["--eval", str(folder), "--rollouts", "1"]) == 0


BAD_COMMANDS = [
    (
        "--env cartpole",
        "--env cartpole: unknown environment 'cartpole' (did you mean cartpole_inv?)",
    ),
    ("--env ./my_module:my_env", "--env ./my_module:my_env: "),
    ("--env gymnasium:Nonsense-v0", "--env gymnasium:Nonsense-v0: "),
    ("--method dma_sta_sh", "unknown method 'dma_sta_sh' (did you mean dma_star_sh?)"),
    ("--stepz 5", "unrecognized arguments: --stepz 5"),
    ("--step 5", "unrecognized arguments: --step 5"),
    ("extra", "unrecognized arguments: extra"),
    ("--steps", "argument --steps: expected one argument"),
    ("--steps many", "--steps many: must be a whole number from 1 to 1"),
    ("--steps 1.5", "--steps 1.5: must be a whole number from 1 to 1"),
    ("--steps inf", "--steps inf: must be a whole number from 1 to 1"),
    ("--seed -1", "--seed -1: must be a whole number from 0 to 4294967295"),
    ("--gamma nan", "--gamma nan: must be a number from 0 to 1"),
    ("--alpha 1e-50", "--alpha 1e-50: must be a number from 1e-06 to 100"),
    ("--env di_inv --K 101", "--K 101: must be at most the horizon of di_inv, 100"),
    ("--buffer 128", "--buffer 128: must be more than --K, here 128"),
    ("--batch 19", "--batch 19: must be at least --contexts, here 20"),
    ("--method da --mask 0.4", "--mask 0.4: must be 0: da has no encoder"),
    ("--d-z 6", "--d-z 6: must be a multiple of 4"),
    ("--device gpu", "--device gpu: must be cpu, or a GPU that is there"),
    ("--device meta", "--device meta: must be cpu, or a GPU that is there"),
    ("--out a\0b", "--out a\0b: must be the name of a folder"),
    ("--out /dev/null", "/dev/null/cartpole_inv__dma_star_sh__s1: Not a directory"),
    ("--per-context", "--per-context: allowed only with --eval RUN"),
    ("--eval x --resume y", "argument --resume: not allowed with argument --eval"),
    ("--eval x --steps 5", "--steps: not allowed with --eval"),
    ("--resume x --seed 3", "--seed: not allowed with --resume"),
    ("--list-methods --quick", "--quick: not allowed with --list-methods"),
    ("--eval nowhere", "nowhere: must be a policy file, or a run folder that holds policy.pt"),
    ("--resume nowhere", "--resume nowhere: no run folder (it has no checkpoint.pt)"),
]


@pytest.mark.parametrize("line, message", BAD_COMMANDS)
def test_bad_input_gets_one_line_and_status_2(
    line, message, full_episodes, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dmash.Run, "train", None)  # a line that is not refused fails at once
    assert dmash.main(line.split(" ")) == 2
    assert error_of(capsys).startswith(message)
    assert not os.listdir()


@not_on_windows
def test_output_that_nobody_takes(monkeypatch, capsys):
    """The reader of a pipe that has left, as `head` does, is told nothing. A full disk is told."""
    receive, send = os.pipe()
    os.close(receive)
    with os.fdopen(send, "w") as left, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", left)
        assert dmash.main(["--list-methods"]) == 1
    assert capsys.readouterr().err == ""
    full = open("/dev/full", "w", buffering=1)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert dmash.main(["--list-methods"]) == 2
    assert error_of(capsys) == "output: No space left on device"


# ---- Faults -------------------------------------------------------------------------------------


def with_settings(**changes):
    return lambda state: state | {"settings": state["settings"] | changes}


def with_weight(state):
    return state | {"agent": state["agent"] | {"g.attention.weight": torch.zeros(1)}}


def without_weight(state):
    state["agent"].popitem()
    return state


DAMAGED_POLICIES = [
    (lambda state: [1], ""),
    (lambda state: state | {"agent": {}}, "its weights are not those"),
    (with_weight, "its weights are not those of this method"),
    (without_weight, "its weights are not those of this method"),
    (with_settings(gamma=7), "--gamma 7: must be a number from 0 to 1"),
    (with_settings(gamme=1), "'gamme'"),
    (with_settings(env=[1]), ""),
    (with_settings(env="cartpool"), "unknown environment 'cartpool'"),
    (with_settings(hidden=128), ""),
]


@pytest.mark.parametrize("change, reason", DAMAGED_POLICIES)
def test_damaged_and_foreign_policies_are_refused(change, reason, folder, capsys):
    path = folder / "policy.pt"
    change_file(path, change)
    assert dmash.main(["--eval", str(folder)]) == 2
    message = error_of(capsys)
    assert message.startswith(f"{path} cannot be read (") and reason in message


def older(state):
    """As a version that had no column of diverged episodes wrote it."""
    state["losses"] = state.pop("sums")
    return state


DAMAGED_CHECKPOINTS = [
    (lambda state: {"g": 1}, "settings"),
    (older, "written by another version of dmash.py"),
    (with_settings(hidden=128), ""),
    (with_settings(device="cuda:99"), "--device cuda:99: must be cpu, or a GPU"),
    (lambda state: state | {"rollout": {}}, "replay"),
    (lambda state: state | {"generators": []}, ""),
]


@pytest.mark.parametrize("change, reason", DAMAGED_CHECKPOINTS)
def test_damaged_and_foreign_checkpoints_are_refused(change, reason, folder, capsys):
    path = folder / "checkpoint.pt"
    change_file(path, change)
    before = contents(folder)
    resume(folder, status=2)
    message = error_of(capsys)
    assert message.startswith(f"{path} cannot be read (") and reason in message
    assert contents(folder) == before


def test_torn_files_are_refused_and_flipped_bits_found(run, folder, capsys):
    path = folder / "checkpoint.pt"
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for torn in (b"", b"x" * 1000, data[: len(data) // 2]):
        path.write_bytes(torn)
        resume(folder, status=2)
        assert "checkpoint.pt cannot be read (" in error_of(capsys)
    whole, refused = as_text(dmash.load(run / "checkpoint.pt")), 0
    places = [*rng.integers(len(data), size=15), *rng.integers(2000, size=5)]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            state = dmash.load(path)
        except Exception:
            refused += 1
        else:
            assert as_text(state) == whole  # the bit meant nothing
    assert refused >= 12


@pytest.mark.parametrize("name, mode", [("policy.pt", "--eval"), ("checkpoint.pt", "--resume")])
def test_a_stranger_s_file_runs_no_code(name, mode, folder, tmp_path, capsys):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    (folder / name).write_bytes(saved({"g": Attack()}))
    assert dmash.main([mode, str(folder)]) == 2
    assert f"{name} cannot be read" in error_of(capsys)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_folder_that_holds_a_run_is_left_alone(name, folder, capsys):
    """Also if only one of its files is left."""
    for other in folder.iterdir():
        if other.name != name:
            other.unlink()
    before = contents(folder)
    train(folder.parent, status=2)
    ways = f"choose another --seed or --out, or go on with --resume {folder}"
    assert error_of(capsys) == f"{folder / name} is already there; {ways}"
    assert contents(folder) == before


@not_on_windows
def test_a_full_disk_stops_the_run_and_loses_nothing(run, tmp_path, monkeypatch, capsys):
    """Files may not grow beyond the size of a first checkpoint, or not even there."""
    resource = pytest.importorskip("resource")
    with monkeypatch.context() as patch:
        stopping(patch, 20)
        first = train(tmp_path / "other", status=130) / "checkpoint.pt"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, there in ((10_000, []), (first.stat().st_size, sorted(FILES[:2] + FILES[-1:]))):
        capsys.readouterr()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            folder = train(tmp_path, status=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        path = folder / "checkpoint.pt"
        assert error_of(capsys).startswith(f"{path} cannot be written (")
        assert sorted(os.listdir(folder)) == there
    assert dmash.load(path)["step"] == 0
    resume(folder)
    assert_same_run(folder, run)


@not_on_windows
def test_a_folder_that_cannot_be_written(run, capsys):
    """It can still be evaluated. The superuser becomes nobody for the test."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as there:
        folder = Path(shutil.copytree(run, Path(there) / run.name))
        folder.chmod(0o555)
        Path(there).chmod(0o555)
        if user == 0:
            os.seteuid(65534)
        try:
            train(there, status=2, seed=2)
            assert error_of(capsys) == f"{folder_of(there, seed=2)}: Permission denied"
            resume(folder, status=2)
            assert error_of(capsys).startswith(f"{folder}/checkpoint.pt cannot be written (")
            assert dmash.main(["--eval", str(folder), "--rollouts", "1"]) == 0
        finally:
            os.seteuid(user)
            folder.chmod(0o755)
            Path(there).chmod(0o755)
        assert contents(folder) == contents(run)


@not_on_windows
@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_vanishes_or_is_another_stops_the_run(
    replaced, tmp_path, monkeypatch, capsys
):
    folder = folder_of(tmp_path)

    def vanish():
        shutil.rmtree(folder)
        if replaced:
            folder.mkdir()

    at_call(monkeypatch, dmash, "evaluate", 1, vanish)
    train(tmp_path, status=2)
    message = f"{folder}: No such file or directory"
    if replaced:
        message = f"{folder} was replaced by another folder while this run went on"
        assert not os.listdir(folder)
    assert error_of(capsys) == message


def not_a_number(result, first):
    """nan in place of a tensor, or of the first thing in a tuple."""
    if isinstance(result, tuple):
        return result[0] * math.nan, *result[1:]
    return result * math.nan


def endless_reward(result, envs):
    s, r, done = result
    return s, r + math.inf, done


def broken_target(losses, agent):
    agent.Q_target.Q1.head.bias.data[0] = math.nan
    return losses


NOT_FINITE = [  # what is told at which step, the function, its call at gradient step 25, the change
    ("observation", 25, aib_envs.VectorEnv, "step", 40 + 10 + 25, not_a_number),
    ("reward", 25, aib_envs.VectorEnv, "step", 40 + 10 + 25, endless_reward),
    ("action", 25, dmash.Agent, "act", 10 + 25, not_a_number),
    ("dynamics_loss", 25, dmash, "dynamics_loss", 25, not_a_number),
    ("critic_loss", 25, dmash, "critic_loss", 25, not_a_number),
    ("actor_loss", 26, dmash, "actor_loss", 25, not_a_number),
    ("weight Q_target.Q1.head.bias", 40, dmash.Agent, "update", 25, broken_target),
]


@pytest.mark.parametrize("name, step, owner, function, call, change", NOT_FINITE)
def test_numbers_that_are_not_finite_stop_the_run(
    name, step, owner, function, call, change, run, tmp_path, capsys, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(dmash, "evaluate", no_evaluation)
        if name.startswith("weight"):  # losses that follow from it would be told first
            patch.setattr(dmash, "critic_loss", lambda pi, Q, *rest: Q.Q1.head.bias.sum())
        from_call(patch, owner, function, call, change)
        folder = train(tmp_path, status=1)
    kept = f"the last checkpoint in {folder} is untouched"
    assert error_of(capsys) == f"step {step}: {name} is not finite; {kept}"
    for file in ("checkpoint.pt", "policy.pt"):
        assert dmash.load(folder / file)["step"] == 20
    resume(folder)  # without the fault


def test_an_evaluation_that_diverges_is_told_and_training_goes_on(
    run, tmp_path, monkeypatch, capsys
):
    """The lightest mass of eval_out flies off. Its return is what came before."""
    advance = aib_envs.DoubleIntegrator.advance

    def fly_off(task, actions):
        advance(task, actions)
        task.p[task.c["mass"] < 0.2] = np.nan

    monkeypatch.setattr(aib_envs.DoubleIntegrator, "advance", fly_off)
    folder = train(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    for line in lines[1:3]:
        assert line.endswith("  1 evaluation episodes diverged")
    for row in read(folder / "metrics.csv"):
        assert [row[f"diverged_{name}"] for name in dmash.SETS] == ["0", "0", "1"]
        assert "nan" not in row.values()
    rows = read(folder / "per_context.csv")
    assert [row["mass"] for row in rows if row["diverged"] == "1"] == ["0.1", "0.1"]
    policies = [dmash.load(where / "policy.pt")["agent"] for where in (folder, run)]
    assert as_text(policies[0]) == as_text(policies[1])


@pytest.mark.parametrize("missing", [AttributeError, OSError, TypeError])
def test_a_system_without_mallopt_costs_nothing(missing, monkeypatch):
    def library(name):
        raise missing

    monkeypatch.setattr(dmash.ctypes, "CDLL", library)
    dmash.keep_freed_memory()


def test_averages_of_dead_units_become_zero():
    """Numbers below 1e-38 would make a CPU slow."""
    dmash.Run(dmash.Config(**SMALL), "unused")
    weight = torch.ones(2**12, requires_grad=True)
    weight.grad = torch.zeros(2**12)
    adam = torch.optim.Adam([weight], fused=True)
    adam.step()
    bits = adam.state[weight]["exp_avg"].view(torch.int32)
    bits.fill_(1000)  # 1.4e-42
    adam.step()
    assert not bits.any()


# ---- Policies in a loop of one's own ------------------------------------------------------------


@pytest.mark.parametrize("method", ["dma_star_sh", "dma_star", "dma_pearl", "dr"])
def test_a_policy_acts_as_a_rollout_does(method, short_episodes, tmp_path):
    """On the same transitions; N environments at once, and each of them alone."""
    path = train(tmp_path, **TINY | dict(method=method))
    cfg, agent = dmash.load_policy(path)
    contexts = [{"action_factor": factor} for factor in (1, -1)]
    rollout = dmash.Rollout(agent, aib_envs.VectorEnv(cfg.env, contexts, seed=0), noisy=False)
    rollout.begin_episode(warm_up=False)
    together, *alone = [dmash.Policy.load(path) for _ in range(3)]
    for _ in range(12):
        s = rollout.s.numpy()
        tau = rollout.replay.latest(noisy=False)
        _, a, *_ = rollout.step()
        action = together.act(s)
        assert action.dtype == np.float32
        np.testing.assert_array_equal(action, a)
        for i, policy in enumerate(alone):
            np.testing.assert_allclose(policy.act(s[i]), a[i], atol=1e-6)
    if agent.g is None:
        assert together.z is None
    else:
        z = agent.g(tau, noisy=False)
        np.testing.assert_allclose(together.z, z.detach(), atol=1e-6)
        assert together.z.shape == (2, 8)


def test_a_policy_keeps_its_window_over_episodes_unless_it_forgets(run):
    """Compared with the encoder on transitions that are counted here."""
    policy = dmash.Policy.load(run)
    cfg, agent = policy.cfg, policy.agent
    rng = np.random.default_rng(0)
    for forget in (True, False, True):
        policy.reset(forget)
        if forget:
            seen = [np.zeros(4 + 2 + 4)] * cfg.K
        before = None
        for _ in range(20):
            s = rng.normal(size=4).astype(np.float32)
            if before is not None:
                seen.append(np.concatenate([*before, s - before[0]]))
            before = s, policy.act(s)
            places = np.linspace(0, cfg.K - 1, cfg.L).astype(int)
            tau = np.float32(seen[-cfg.K :])[places]
            z = agent.g(torch.from_numpy(tau).unsqueeze(0), noisy=False)
            np.testing.assert_allclose(policy.z, z.detach(), atol=1e-6)


def test_a_policy_of_a_method_that_must_be_told_is_refused(short_episodes, tmp_path):
    folder = train(tmp_path, **TINY | dict(method="concat"))
    with pytest.raises(dmash.BadInput, match="concat must be told the context"):
        dmash.Policy.load(folder)


AGENT = ROOT / "results/agent/policy.pt"


@pytest.mark.parametrize("method", ["dma_star_sh", "dma_star_h"])
def test_run_leaves_no_tensors_behind(method, tmp_path):
    """They would pin the memory that is freed around them."""
    run = dmash.Run(dmash.Config(**SMALL, method=method), tmp_path)

    def tensors_after_four_steps():
        for _ in range(4):
            run.gradient_step()
        gc.collect()
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    for _ in range(30):
        run.rollout.collect(random=True)
    assert tensors_after_four_steps() == tensors_after_four_steps()


def test_a_pole_stays_up_when_the_motor_flips(full_episodes):
    """A loop of Gymnasium's. An agent that goes on with its last code lets the pole fall."""
    means = {}
    for adapts in (True, False):
        policy = dmash.Policy.load(AGENT)
        env = gymnasium.make("aib_envs:aib/cartpole_inv-v0")
        s, _ = env.reset(seed=1)
        rewards = []
        for t in range(500):
            if t == 250:
                env.unwrapped.set_context(action_factor=-1)
                _, omega = policy.agent.infer(policy.window.latest(False), noisy=False)
            a = policy.act(s)
            if t >= 250 and not adapts:
                a = policy.agent.act(torch.from_numpy(s).unsqueeze(0), omega, False)[0].numpy()
            s, r, *_ = env.step(a)
            rewards.append(r)
        means[adapts] = np.mean(rewards[-200:])
    assert means[True] > 0.8 and means[False] < 0.4, means
