"""Tests of runs: files, exact resume, faults, the command line, policies in loops of one's own.

A run that was disturbed must equal, bit for bit, one that was not.
"""

import csv
import dataclasses
import gc
import inspect
import io
import itertools
import json
import math
import os
import pydoc
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch.utils._pytree import tree_map_only
from untrained import untrained

import aib_envs
import dmash

ROOT = Path(dmash.__file__).resolve().parent
FILES = ["checkpoint.pt", "config.json", "metrics.csv", "per_context.csv", "policy.pt"]
INT = signal.SIGINT
TERM = signal.SIGTERM

# An episode has 12 steps, a warm-up 6. A run calls Rollout.step 6 + 10 times before gradient step 1
# and 6 times at the beginning of steps 3 and 15. An evaluation after step 10, of 6 + 12 calls, is
# calls 33 to 50, the last one calls 67 to 84.
SMALL = dict(env="ode", contexts=4, batch=32, random_steps=10, steps=20, eval_every=10)
SMALL |= dict(rollouts=1, threads=1, hidden=16, bottleneck=4, subsample=0.5)
TABLE = aib_envs.ENVS
SHORT = {env_id: dataclasses.replace(spec, horizon=12, K=6) for env_id, spec in TABLE.items()}

not_on_windows = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals or files")


# ---- Helpers ------------------------------------------------------------------------------------


def arguments(out, *flags, **changes):
    """A command line that trains for a second."""
    settings = SMALL | changes | {"out": out}
    return [f"{dmash.flag(name)}={value}" for name, value in settings.items()] + list(flags)


def folder_of(out, env="ode", method="dma_star_sh", **rest):
    return Path(out) / f"{env.replace(':', '.')}__{method}__s1"


def train(out, *flags, status=0, **changes):
    """Runs the command. Returns its folder."""
    assert dmash.main(arguments(out, *flags, **changes)) == status
    return folder_of(out, **changes)


def resume(folder, *flags, status=0):
    assert dmash.main([f"--resume={folder}", *flags]) == status


def at_call(patch, owner, name, n, change):
    """Call number n of a function returns change(its result, *its arguments)."""
    function = getattr(owner, name)
    calls = itertools.count(1)

    def changed(*args, **kwargs):
        result = function(*args, **kwargs)
        return change(result, *args) if next(calls) == n else result

    patch.setattr(owner, name, changed)


def stop(out, call, number=INT, **changes):
    """A run begins or goes on, and gets a signal in that call of Rollout.step. Its folder."""
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, dmash.Rollout, "step", call, lambda *_: signal.raise_signal(number))
        return train(out, "--go-on", status=128 + number, **changes)


def error_of(capsys):
    """What stands after the program's name in the one line of an error."""
    error = capsys.readouterr().err
    assert error.startswith("dmash.py: error: ") and error.count("\n") == 1, error
    return error.removeprefix("dmash.py: error: ").rstrip("\n")


def read(path):
    """The rows of a table, without the times."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.pop("seconds", None)
    return rows


def column(rows, name):
    return [float(row[name]) for row in rows]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def checkpoint(folder):
    return dmash.load(folder / "checkpoint.pt")


def bits(state):
    """A hash of everything in nested dicts, the bits of the tensors included."""
    return hash(str(tree_map_only(torch.Tensor, lambda value: value.numpy().tobytes(), state)))


def results(folder):
    """All that a run computed, without times, and without what a later version writes otherwise."""
    state = checkpoint(folder)
    del state["seconds"], state["version"], state["settings"]["out"]
    for row in state["metrics"]:
        del row["seconds"]
    tables = [read(folder / name) for name in ("metrics.csv", "per_context.csv")]
    return [*tables, bits(dmash.load(folder / "policy.pt")["agent"]), bits(state)]


def merged(there, new):
    """Nested dicts, with the entries of `new`."""
    if not isinstance(new, dict):
        return new
    return there | {name: merged(there.get(name), value) for name, value in new.items()}


def write_into(path, new):
    torch.save(merged(dmash.load(path), new), path)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing would take a third of the time."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.fixture(scope="module", autouse=True)
def short_episodes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aib_envs, "ENVS", SHORT)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, not to be changed."""
    return train(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def folder(run, tmp_path):
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(run, tmp_path / run.name))


# ---- Files of a run -----------------------------------------------------------------------------


def test_run_folder(run):
    assert set(FILES) <= set(os.listdir(run)) <= {*FILES, "curve.png"}
    metrics = read(run / "metrics.csv")
    rows = read(run / "per_context.csv")
    assert ",".join(metrics[0]) == (
        "step,env_steps,dynamics_loss,critic_loss,actor_loss,alpha,train,eval_in,eval_out,"
        "diverged_train,diverged_eval_in,diverged_eval_out"
    )
    assert ",".join(rows[0]) == "step,set,index,c0,c1,return,diverged"
    assert column(metrics, "step") == [10, 20]
    assert column(metrics, "env_steps") == [4 * 32, 4 * 48]  # with the warm-ups
    places = [(row["step"], row["set"], row["index"]) for row in rows]
    assert places == list(itertools.product(["10", "20"], dmash.SETS, "0123"))
    means = np.reshape(column(rows, "return"), (2, 3, 4)).mean(-1)
    assert_allclose(np.transpose([column(metrics, name) for name in dmash.SETS]), means, rtol=1e-4)
    assert len(set(means[1])) == 3
    config = config_of(run)
    assert config.items() >= {"env": "ode", "K": 6, "steps": 20, "batch": 32}.items()
    assert (config["torch"], config["version"]) == (torch.__version__, dmash.code_version())
    # The replay is a ring of 150,000 rows, most of them empty.
    assert (run / "checkpoint.pt").stat().st_size < 2e6


def test_a_policy_holds_what_acting_needs_and_no_more(run):
    """Loading it leaves global state alone, and so does acting."""
    generator = torch.get_rng_state()
    torch.set_num_threads(2)
    policy = dmash.Policy.load(run)
    policy.act(np.zeros(1))
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.get_num_threads() == 2
    state = torch.load(run / "policy.pt", weights_only=True)
    assert set(state) == {"settings", "version", "step", "agent"}
    assert {name.split(".")[0] for name in state["agent"]} == {"g", "h", "pi"}
    assert dataclasses.asdict(policy.cfg) == state["settings"]
    assert (policy.agent.step, policy.agent.version) == (20, state["version"])


def test_snapshots_keep_the_policy_of_every_evaluation(tmp_path):
    folder = train(tmp_path, "--snapshots")
    assert sorted(os.listdir(folder / "policies")) == ["10.pt", "20.pt"]
    sets = aib_envs.context_sets("ode", 4)
    found = []
    contexts = [context for name in dmash.SETS for context in sets[name]]
    for step in (10, 20):
        cfg, agent = dmash.load_policy(folder / f"policies/{step}.pt")
        found.extend(dmash.evaluate(agent, cfg, contexts)[0].flatten())
    assert_allclose(column(read(folder / "per_context.csv"), "return"), found, rtol=1e-5)


def test_eval_prints_the_last_evaluation_and_writes_nothing(folder, capsys):
    """A policy from a stranger cannot forge a line."""
    write_into(folder / "policy.pt", {"version": "x\nstep 9\x1b[2J"})
    before = contents(folder)
    assert dmash.main(["--eval", str(folder), "--per-context"]) == 0
    first, second, head, *rows, last = capsys.readouterr().out.splitlines()
    assert first == r"ode, dma_star_sh, seed 1, step 20, 'x\nstep 9\x1b[2J'"
    assert second == "4 contexts x 1 rollouts in each set …"  # shows that it works
    table = (folder / "per_context.csv").read_text().splitlines()
    assert [f"step,{head}", *(f"20,{row}" for row in rows)] == [table[0], *table[-12:]]
    assert last.startswith("average episodic return: train ")
    assert contents(folder) == before


def test_importing_has_no_side_effect(tmp_path, capfd):
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
    subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, check=True, timeout=300)
    assert capfd.readouterr() == ("", "")


def test_the_package():
    """Two modules, without torch unless asked for; one version, a command and a citation."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = package["project"]
    assert package["tool"]["setuptools"]["py-modules"] == ["aib_envs", "dmash"]
    names = [re.split("[<>=]", line)[0] for line in project["dependencies"]]
    assert names == ["gymnasium", "mujoco", "numpy"]
    (needed_to_train,) = project["optional-dependencies"]["train"]
    assert needed_to_train.startswith("torch>=")
    assert f"gymnasium=={gymnasium.__version__}\n" in (ROOT / "requirements.txt").read_text()
    assert project["scripts"] == {"dmash": "dmash:main"}
    assert project["version"] == dmash.__version__
    software, _, paper = (ROOT / "CITATION.cff").read_text().partition("preferred-citation:")
    assert f'version: "{dmash.__version__}"' in software
    assert "2602.06550" in paper


PUBLIC = """
    dmash.Config dmash.Policy dmash.Policy.load dmash.Policy.reset dmash.Policy.act
    dmash.load_policy dmash.evaluate
    aib_envs.make aib_envs.context_sets aib_envs.register
    aib_envs.RandomContext aib_envs.AddContext
    aib_envs.ActuatorInversion aib_envs.ActuatorPermutation
    aib_envs.VectorEnv aib_envs.ContextualEnv aib_envs.ContextualVectorEnv
"""


@pytest.mark.parametrize("name", PUBLIC.split())
def test_what_is_public_has_type_hints(name):
    for parameter in inspect.signature(pydoc.locate(name)).parameters.values():
        assert parameter.name == "self" or parameter.annotation is not parameter.empty


def test_version_tells_the_code_and_no_other_project_s_commit(tmp_path, monkeypatch, capsys):
    for module in (dmash, aib_envs):
        monkeypatch.setattr(module, "__file__", shutil.copy(module.__file__, tmp_path))

    def git(words):
        line = f"git -c user.name=a -c user.email=a@b.c {words}"
        return subprocess.check_output(line.split(), cwd=tmp_path, text=True).strip()

    alone = dmash.code_version()
    assert len(alone) == 12
    git("init -q")
    git("commit -q --allow-empty -m course")  # does not track the two files
    assert dmash.code_version() == alone
    git("add .")
    git("commit -q -m code")
    commit = git("log -1 --format=%h")
    assert dmash.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{dmash.__version__} {alone} {commit}\n"
    versions = {alone}
    for path in tmp_path.glob("*.py"):
        path.write_text(path.read_text() + "\n")
        versions.add(dmash.code_version()[:12])
    assert len(versions) == 3


# ---- Exact resume -------------------------------------------------------------------------------

STOPS = [  # calls of Rollout.step at which signals come, step of the checkpoint
    ([10], INT, 0),  # among the random steps
    ([21], INT, 3),  # in the warm-up of an episode of training
    ([32], TERM, 10),  # in the step before an evaluation
    ([45], TERM, 10),  # in the middle of the evaluation
    ([18, 12, 33], TERM, 17),  # again and again
    ([75], INT, 20),  # in the last evaluation
]


@not_on_windows
@pytest.mark.parametrize("calls, number, step", STOPS)
def test_a_stopped_run_resumes_exactly(calls, number, step, run, tmp_path, capsys):
    for call in calls:
        folder = stop(tmp_path, call, number)
    state = checkpoint(folder)
    assert state["step"] == step
    evaluations = [row["step"] for row in state["metrics"]]
    assert evaluations == list(range(10, step, 10))
    assert f"\nstopped at step {step}; to go on: " in capsys.readouterr().out
    resume(folder)
    assert results(folder) == results(run)


@pytest.mark.parametrize("env_id", [name for name in SHORT if not name.startswith("ode_")])
def test_every_environment_trains_and_resumes_in_mid_episode(env_id, tmp_path):
    """With a moving average of the policy, and with a replay that is full and written again."""
    changes = dict(env=env_id, policy_average=0.1, buffer=20, contexts=2, steps=8, eval_every=4)
    whole = train(tmp_path / "whole", **changes)
    stopped = stop(tmp_path / "stopped", 22 + 3, **changes)
    resume(stopped)
    assert results(stopped) == results(whole)


def test_an_environment_of_gymnasium_resumes_with_a_new_episode(tmp_path, capsys):
    folder = stop(tmp_path, 6 + 10 + 4, env="gymnasium:Pendulum-v1", K=6)
    capsys.readouterr()
    resume(folder)
    told = "a new episode begins: the state of gymnasium:Pendulum-v1 cannot be saved"
    assert capsys.readouterr().out.splitlines()[0] == told
    assert len(read(folder / "metrics.csv")) == 2
    assert checkpoint(folder)["t"] == 6 + 10 + 4 + 6 + 16


def test_terminal_states_met_later_stop_a_run_in_one_line(tmp_path, monkeypatch, capsys):
    def terminate(task, actions):
        raise aib_envs.BadEnvironment("has terminal states")

    aib_envs.lookup("gymnasium:Pendulum-v1")  # which tries an episode
    monkeypatch.setattr(aib_envs.GymnasiumTask, "advance", terminate)
    train(tmp_path, status=2, env="gymnasium:Pendulum-v1")
    assert error_of(capsys) == "has terminal states"


def test_all_files_are_made_again_from_the_checkpoint(run, folder, capsys):
    """Also those of a complete run; with fewer steps than it has, it is complete, too."""
    go_on = arguments(folder.parent, "--go-on", steps=15, threads=2)
    for way in ([f"--resume={folder}"], go_on):
        for name in FILES[1:]:
            (folder / name).unlink()
        assert dmash.main(way) == 0
        assert "\ncomplete: checkpoint.pt, config.json, " in capsys.readouterr().out
        assert results(folder) == results(run)
        assert config_of(folder) == config_of(run)


@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_a_run_killed_while_it_writes_a_file_goes_on(n, run, tmp_path):
    """The first save writes three files, each later one five. File 9 is the last checkpoint."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        # In the place of SIGKILL: nothing in dmash.py catches it.
        at_call(patch, os, "fsync", n, lambda *_: sys.exit())
        train(tmp_path)
    assert len(list(tmp_path.glob("*/*.partial"))) == 1
    folder = train(tmp_path, "--go-on")
    assert results(folder) == results(run)


def test_a_run_goes_on_with_other_code_and_more_steps(folder, monkeypatch, capsys):
    """But not with fewer steps or other settings."""
    old = dmash.code_version()
    monkeypatch.setattr(dmash, "code_version", lambda: "other")
    resume(folder, "--steps", "25")
    assert f"saved by version {old!r}, goes on with 'other'\n" in capsys.readouterr().out
    config = config_of(folder)
    assert (config["version"], config["steps"]) == ("other", 25)
    train(folder.parent, "--go-on", steps=30)
    assert column(read(folder / "metrics.csv"), "step") == [10, 20, 25, 30]
    resume(folder, "--steps", "22", status=2)
    assert error_of(capsys).startswith("--steps 22: must be a whole number from 30 ")
    train(folder.parent, "--go-on", status=2, gamma=0.5)
    assert error_of(capsys) == f"--gamma 0.5: {folder} holds a run with --gamma 0.99"


@not_on_windows
@pytest.mark.parametrize("number, status", [(TERM, 143), (signal.SIGKILL, -9)])
def test_a_process_holds_its_folder_until_a_signal_ends_it(
    number, status, tmp_path, monkeypatch, capsys
):
    """What is left of it goes on."""
    monkeypatch.setattr(aib_envs, "ENVS", TABLE)
    line = [sys.executable, str(ROOT / "dmash.py"), *arguments(tmp_path, steps=3_000)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    folder = folder_of(tmp_path)
    assert "step 0 of 3,000" in process.stdout.readline()
    assert process.stdout.readline().startswith("step 10 ")
    resume(folder, status=2)
    assert error_of(capsys) == f"{folder} is in use by another process"
    train(tmp_path, status=2)
    assert error_of(capsys) == f"{folder} is in use by another process"
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == status
    stop(tmp_path, 60, steps=3_000)


@not_on_windows
def test_the_line_that_says_how_to_go_on_works(tmp_path, monkeypatch, capsys):
    """As a shell reads it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dmash.py"])
    folder = stop("-it's a b", 17)
    line = capsys.readouterr().out.splitlines()[-1].partition("to go on: ")[2]
    words = subprocess.check_output(f"printf '%s\\n' {line}", shell=True, text=True).splitlines()
    assert words[:2] == [sys.executable, "dmash.py"]
    assert dmash.main(words[2:]) == 0
    assert len(read(folder / "metrics.csv")) == 2


@not_on_windows
def test_a_second_signal_stops_at_once_and_handlers_are_put_back(tmp_path, monkeypatch):
    def twice(*_):
        signal.raise_signal(INT)
        signal.raise_signal(TERM)

    handlers = signal.getsignal(INT), signal.getsignal(TERM)
    at_call(monkeypatch, dmash.Rollout, "step", 17, twice)
    folder = train(tmp_path, status=130)
    assert checkpoint(folder)["step"] == 0
    assert handlers == (signal.getsignal(INT), signal.getsignal(TERM))


def test_a_thread_other_than_the_main_one_trains(run, tmp_path):
    thread = threading.Thread(target=train, args=[tmp_path])
    thread.start()
    thread.join()
    assert results(folder_of(tmp_path)) == results(run)


# ---- What is shown ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dma_star", "dr"])
def test_an_evaluation_prints_a_line(method, tmp_path, capsys):
    """Without matplotlib another one says how to get the picture."""
    train(tmp_path, method=method)
    _, first, begins, second, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("step 10  ") and second.startswith("step 20  ")
    assert begins == "last evaluation: 1 episodes in each context …"
    assert ("  dynamics loss " in first) == (method == "dma_star")
    assert "nan" not in first
    assert rest == [
        "curve.png is not drawn: it needs matplotlib (pip install matplotlib)",
        f"complete: {', '.join(FILES)}",
    ]


def test_the_picture(folder, monkeypatch, capsys):
    """It is drawn again, and the closing list names it."""
    monkeypatch.undo()
    figures = pytest.importorskip("matplotlib.figure")
    drawn = []
    at_call(monkeypatch, figures.Figure, "savefig", 1, lambda _, figure, *__: drawn.append(figure))
    (folder / "curve.png").unlink()
    resume(folder)
    assert f"complete: {', '.join(sorted([*FILES, 'curve.png']))}\n" in capsys.readouterr().out
    curves, last = drawn[0].axes
    metrics = read(folder / "metrics.csv")
    rows = read(folder / "per_context.csv")[-12:]
    for name, curve in zip(dmash.SETS, curves.lines, strict=True):
        expected = column(metrics, "step"), column(metrics, name)
        assert_allclose(curve.get_data(), expected, rtol=1e-4)
    dots = np.concatenate([line.get_data() for line in last.lines], axis=1)
    assert_allclose(dots, (column(rows, "c0"), column(rows, "return")), rtol=1e-4)


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


def test_tqdm_s_bar_shows_the_training_return(tmp_path, monkeypatch):
    pytest.importorskip("tqdm")
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    train(tmp_path)
    for bar in ("random steps: 100%", "gradient steps: 100%"):
        assert ", training return " in stream.getvalue().rpartition(bar)[2].splitlines()[0]


@pytest.mark.parametrize("buffer, stored", [(100, 12), (8, 8)])
def test_the_training_return_is_that_of_the_last_episode(buffer, stored):
    """Or of what is stored of it."""
    run = dmash.Run(dmash.Config(**SMALL | {"buffer": buffer}), "unused")
    for _ in range(2):
        run.rollout.begin_episode(random=True)
        rewards = [run.rollout.step(random=True)[2] for _ in range(12)]
    expected = sum(rewards[-stored:]).mean()
    assert expected > 0.1
    assert run.recent_return() == f"training return {expected:.1f}"


def test_table_of_methods(capsys):
    assert dmash.main(["--list-methods"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["--method", *dmash.METHODS]
    assert rows[7] == "da DA c adapter none own 0.0 False False 0.0".split()


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit, match="0"):
        dmash.main(["--help"])
    text = capsys.readouterr().out
    for name in dmash.Config.__dataclass_fields__:
        assert f"  {dmash.flag(name)}" in text


# ---- The command line ---------------------------------------------------------------------------


def test_quick(tmp_path):
    """What is given beside it comes first. A number may be text with an exponent."""
    assert dmash.Config(**dmash.QUICK, env="reacher_easy_inv").steps == 20_000
    assert dmash.main(arguments(tmp_path, "--quick", polyak=0.5, eval_every="1e1")) == 0
    folder = tmp_path / "ode__dma_star_sh__quick__s1"
    config = config_of(folder)
    given = {"quick": True, "eval_every": 10, "polyak": 0.5}
    assert config.items() >= (dmash.QUICK | given).items()
    resume(folder, "--steps", "21")


BAD_COMMANDS = [
    ("--env cartpole", "--env cartpole: unknown environment 'cartpole' (did you mean cartpole_"),
    ("--env my_module:mine", "--env my_module:mine: No module named 'my_module'"),
    ("--env gymnasium:Nonsense-v0", "--env gymnasium:Nonsense-v0: "),
    ("--method dma_sta_sh", "unknown method 'dma_sta_sh' (did you mean dma_star_sh?)"),
    ("--step 5", "unrecognized arguments: --step 5"),
    ("--steps 1.5", "--steps 1.5: must be a whole number from 1 to 1"),
    ("--alpha 1e-50", "--alpha 1e-50: must be a number from 1e-06 to 100"),
    ("--env di_inv --K 13", "--K 13: must be a whole number from 1 to 12"),
    ("--buffer 6", "--buffer 6: must be more than --K, here 6"),
    ("--batch 19", "--batch 19: must be at least --contexts, here 20"),
    ("--method da --mask 0.4", "--mask 0.4: must be 0: da has no encoder"),
    ("--d-z 6", "--d-z 6: must be a multiple of 4"),
    ("--device meta", "--device meta: must be cpu, or a GPU that is there"),
    ("--out /dev/null", "/dev/null/cartpole_inv__dma_star_sh__s1: Not a directory"),
    ("--per-context", "--per-context: allowed only with --eval RUN"),
    ("--resume x --seed 3", "--seed: not allowed with --resume"),
    ("--version --quick", "--quick: not allowed with --version"),
    ("--eval nowhere", "nowhere: must be a policy file, or a run folder that holds policy.pt"),
    ("--resume nowhere", "--resume nowhere: no run folder (it has no checkpoint.pt)"),
]


@pytest.mark.parametrize("line, message", BAD_COMMANDS)
def test_bad_input_gets_one_line_and_status_2(line, message, capsys, tmp_path, monkeypatch):
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
    full = "dmash.py: error: output: No space left on device\n"
    for place, status, told in ((send, 1, ""), ("/dev/full", 2, full)):
        monkeypatch.setattr(sys, "stdout", open(place, "w", buffering=1))
        assert dmash.main(["--list-methods"]) == status
        assert capsys.readouterr().err == told


# ---- Faults -------------------------------------------------------------------------------------


class Attack:
    """Makes a folder when a careless reader unpickles it."""

    def __reduce__(self):
        return os.mkdir, ("attacked",)


DAMAGED = [  # a file, what is written into its nested dicts, and the reason that is told
    ("policy.pt", {"step": Attack()}, ""),
    ("policy.pt", {"agent": {"g.x": torch.zeros(1)}}, "its weights are not those of this method"),
    ("policy.pt", {"settings": {"gamme": 1}}, "'gamme'"),
    ("policy.pt", {"settings": {"gamma": "\x1b[31m"}}, "--gamma [31m: must be a number"),
    ("checkpoint.pt", {"step": Attack()}, ""),
    ("checkpoint.pt", {"sums_of_losses": 0}, "written by another version of dmash.py"),
    ("checkpoint.pt", {"settings": {"hidden": 128}}, "size mismatch for "),
    ("checkpoint.pt", {"settings": {"device": "cuda:99"}}, "--device cuda:99: must be cpu, or"),
]


@pytest.mark.parametrize("name, damage, reason", DAMAGED)
def test_damaged_and_foreign_files_are_refused(name, damage, reason, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder.parent)
    write_into(folder / name, damage)
    before = contents(folder)
    mode = "--eval" if name == "policy.pt" else "--resume"
    assert dmash.main([mode, str(folder)]) == 2
    message = error_of(capsys)
    assert message.startswith(f"{folder / name} cannot be read (") and reason in message
    assert message.isprintable()
    assert contents(folder) == before
    assert os.listdir() == [folder.name]  # no code in a file was run


def test_torn_files_and_flipped_bits_are_refused(folder, capsys):
    path = folder / "checkpoint.pt"
    data = path.read_bytes()
    weight = checkpoint(folder)["agent"]["h.trunk.0.weight"]
    flipped = bytearray(data)
    flipped[data.index(weight.numpy().tobytes())] ^= 1
    for torn in (b"", data[: len(data) // 2], flipped):
        path.write_bytes(torn)
        resume(folder, status=2)
        assert f"{path} cannot be read (" in error_of(capsys)


def test_a_folder_that_holds_a_file_is_left_alone(tmp_path, capsys):
    path = folder_of(tmp_path) / "metrics.csv"
    path.parent.mkdir()
    path.write_text("kept")
    train(tmp_path, status=2)
    ways = f"choose another --seed or --out, or go on with --resume {path.parent}"
    assert error_of(capsys) == f"{path} is already there; {ways}"
    assert contents(path.parent) == {"metrics.csv": b"kept"}


def test_a_full_disk_stops_the_run_and_loses_nothing(run, tmp_path, capsys):
    """Files may not grow beyond the size of the first checkpoint."""
    resource = pytest.importorskip("resource")
    folder = stop(tmp_path, 10)
    names = sorted(os.listdir(folder))
    path = folder / "checkpoint.pt"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, hard))
    try:
        resume(folder, status=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error_of(capsys).startswith(f"{path} cannot be written (")
    assert sorted(os.listdir(folder)) == names
    assert dmash.load(path)["step"] == 0
    resume(folder)
    assert results(folder) == results(run)


@not_on_windows
def test_a_folder_that_was_replaced_stops_the_run(tmp_path, monkeypatch, capsys):
    folder = folder_of(tmp_path)

    def replace(result, *_):
        folder.rename(tmp_path / "moved")
        folder.mkdir()
        return result

    at_call(monkeypatch, dmash, "evaluate", 1, replace)
    train(tmp_path, status=2)
    told = f"{folder} was replaced by another folder while this run went on"
    assert error_of(capsys) == told
    assert not os.listdir(folder)


def break_loss(losses, *_):
    return losses | {"actor_loss": torch.tensor(math.inf)}


def break_target(losses, agent, *_):
    agent.Q_target.Q1.head.bias.data.fill_(math.nan)
    return losses


NOT_FINITE = [  # what is told, of which step, and what breaks it there
    ("actor_loss", 6, break_loss),
    ("Q_target.Q1.head.bias", 10, break_target),
]


@pytest.mark.parametrize("name, step, change", NOT_FINITE)
def test_numbers_that_are_not_finite_stop_the_run(name, step, change, run, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, dmash.Agent, "update", step, change)
        folder = train(tmp_path, status=1)
    kept = f"the last checkpoint in {folder} is untouched"
    assert error_of(capsys) == f"step {step}: {name} is not finite; {kept}"
    assert checkpoint(folder)["step"] == 0
    resume(folder)  # without the fault
    assert results(folder) == results(run)


def test_an_evaluation_that_diverges_is_told_and_training_goes_on(
    run, tmp_path, monkeypatch, capsys
):
    """One context of eval_out flies off. Its return is what came before."""
    advance = aib_envs.ODE.advance

    def fly_off(task, actions):
        advance(task, actions)
        task.s[task.c["c0"] < -9] = np.nan

    monkeypatch.setattr(aib_envs.ODE, "advance", fly_off)
    folder = train(tmp_path)
    assert capsys.readouterr().out.count("  1 evaluation episodes diverged\n") == 2
    for row in read(folder / "metrics.csv"):
        assert [row[f"diverged_{name}"] for name in dmash.SETS] == ["0", "0", "1"]
        assert "nan" not in row.values()
    rows = read(folder / "per_context.csv")
    assert [row["c0"] for row in rows if row["diverged"] == "1"] == ["-10", "-10"]
    assert bits(checkpoint(folder)["agent"]) == bits(checkpoint(run)["agent"])


@pytest.mark.parametrize("missing", [AttributeError, OSError, TypeError])
def test_a_system_without_mallopt_costs_nothing(missing, monkeypatch):
    def library(name):
        raise missing

    monkeypatch.setattr(dmash.ctypes, "CDLL", library)
    dmash.keep_freed_memory()


def test_numbers_near_zero_become_zero():
    """Numbers below 1e-38, as Adam makes them, would make a CPU slow."""
    torch.set_flush_denormal(False)
    assert torch.tensor(1e-38) / 100 > 0
    dmash.Run(dmash.Config(**SMALL), "unused")
    assert torch.tensor(1e-38) / 100 == 0


@pytest.mark.parametrize("method", ["dma_star_sh", "dma_star_h"])
def test_run_leaves_no_tensors_behind(method):
    """They would pin the memory that is freed around them."""
    run = dmash.Run(dmash.Config(**SMALL, method=method), "unused")
    for _ in range(10):
        run.rollout.collect(random=True)
    counts = []
    for _ in range(2):
        for _ in range(4):
            run.gradient_step()
        gc.collect()
        counts.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
    assert counts[0] == counts[1]


# ---- Policies in a loop of one's own ------------------------------------------------------------


@pytest.mark.parametrize("method", ["dma_star_sh", "dma_star", "dma_pearl", "dr"])
def test_a_policy_acts_as_a_rollout_does(method):
    """On the same transitions; N environments at once, and each of them alone."""
    agent = untrained(method, subsample=0.5)
    envs = aib_envs.VectorEnv("di_inv", [{}, {"action_factor": -1}], seed=0)
    rollout = dmash.Rollout(agent, envs, noisy=False)
    rollout.begin_episode(warm_up=False)
    together, first, second = [dmash.Policy(agent.cfg, agent) for _ in range(3)]
    for _ in range(12):
        s, a, *_ = rollout.step()
        s = s.numpy()
        action = together.act(s)
        assert action.dtype == np.float32
        assert_array_equal(action, a)
        assert_allclose([first.act(s[0]), second.act(s[1])], a, atol=1e-6)
        # A loop may write its next observation into the same array, and scale the action in place.
        s[:] = action[:] = 0
    assert (together.z is None) == (method == "dr")


def test_a_policy_keeps_its_window_over_episodes_unless_it_forgets(run):
    """Compared with the encoder on transitions that are counted here."""
    policy = dmash.Policy.load(run)
    rng = np.random.default_rng(0)
    for forget in (True, False, True):
        policy.reset(forget)
        if forget:
            seen = [np.zeros(1 + 2 + 1)] * 6
        before = None
        for s in rng.normal(size=(10, 1)).astype(np.float32):
            if before is not None:
                seen.append(np.concatenate([*before, s - before[0]]))
            before = s, policy.act(s)
            tau = torch.from_numpy(np.float32(seen[-6:])[[0, 2, 5]])  # 3 of 6, evenly spaced
            z = policy.agent.g(tau.unsqueeze(0), noisy=False)
            assert_allclose(policy.z, z.detach(), atol=1e-6)


def test_a_policy_of_a_method_that_must_be_told_is_refused():
    agent = untrained("concat")
    with pytest.raises(dmash.BadInput, match="concat must be told the context"):
        dmash.Policy(agent.cfg, agent)
