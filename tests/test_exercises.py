"""Tests of exercises/: the page, the stubs, the bugs and the marks.

Pytest runs on students' files in processes of its own, two at a time. Each test waits for the one
that it is about.
"""

import ast
import codeop
import csv
import re
import shlex
import shutil
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "exercises")]
import make  # noqa: E402

import aib_envs  # noqa: E402
import dmash  # noqa: E402

SOUND = make.read(ROOT)
PAGE = (ROOT / "exercises" / "README.md").read_text(encoding="utf8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)  # language, text
GRADE_1, _, GRADES_2_3 = PAGE.partition("## Grade 2")
WALK = BLOCK.findall(GRADE_1)
AGENT = ROOT / "results" / "agent"
LIMIT = 60  # seconds for the tests of one task


EVERY_TEST = sorted({test for tests in make.TASKS.values() for test in tests})
EMPTY = make.stub(SOUND, "adapter")
CHEATS = {
    "leaves": "os._exit(0)",
    "skips": "__import__('pytest').skip()",
    "ends the session": "__import__('pytest').exit('enough', returncode=0)",
    "crashes": "ctypes.string_at(0)",
}


def cheat(line):
    """A dmash.py whose `adapter` does this."""
    return EMPTY.replace("raise NotImplementedError", line)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """What runs beside the tests, the longest first: the walk, and the cases that pass on …"""
    pool, jobs = ThreadPoolExecutor(2), {}
    if AGENT.is_dir():
        folder = tmp_path_factory.mktemp("walk") / "repository"
        jobs["walk"] = pool.submit(run_walk, folder)
    jobs["sound"] = pool.submit(make.passing, SOUND, EVERY_TEST, LIMIT)
    for name, tests in make.STUBS.items():
        jobs[f"stub {name}"] = pool.submit(make.passing, make.stub(SOUND, name), tests, LIMIT)
    for name, bug in make.BUGS.items():
        jobs[f"bug {name}"] = pool.submit(make.passing, make.plant(SOUND, bug), [bug.test], LIMIT)
    [test] = make.STUBS["adapter"]
    for name, line in CHEATS.items():
        jobs[f"cheat {name}"] = pool.submit(make.passing, cheat(line), [test], LIMIT)
    at_once = "import os\nos._exit(0)\n"
    jobs["cheat at once"] = pool.submit(make.passing, at_once, [test], LIMIT)
    yield jobs
    pool.shutdown(cancel_futures=True)


# ---- Grade 1: each output on the page comes from the lines above it -----------------------------

NUMBER = r"-?\d+(?:,\d{3})*\.?\d*(?:e[-+]\d+)?"
MARK = "-- the next block --"


def same(shown, printed):
    """Whether the text is the same, "…" standing for any text, and numbers with a point are near.

    Another processor rounds otherwise: they may differ by 0.06 or a fifth, those with an exponent
    by a factor of two.
    """
    shown, printed = " ".join(shown.split()), " ".join(printed.split())
    parts = []
    for part in re.split(f"(…|{NUMBER})", shown):
        if part == "…":
            part = ".*?"
        elif re.fullmatch(NUMBER, part):
            part = f" ?({NUMBER})"
        else:
            part = re.escape(part).replace(r"\ ", " ?")
        parts.append(part)
    found = re.search("".join(parts), printed)
    if found is None:
        return False
    numbers = re.findall(NUMBER, shown.replace("…", " "))
    for x, y in zip(numbers, found.groups(), strict=True):
        a, b = [float(text.replace(",", "")) for text in (x, y)]
        if "." not in x and a != b:
            return False
        if "e" in x:
            if not a / 2 < b < 2 * a:
                return False
        elif abs(a - b) > max(0.06, 0.2 * abs(a)):
            return False
    return True


def run_shell(text, folder):
    python = shlex.quote(sys.executable)
    text = re.sub(r"^python ", lambda found: f"{python} ", text, flags=re.M)
    done = subprocess.run(["bash", "-c", text], cwd=folder, capture_output=True, text=True)
    return done.stdout + done.stderr


def run_walk(folder):
    """What each block of grade 1 that is not output prints, in order."""
    folder.mkdir()
    for name in ("dmash.py", "aib_envs.py", "test_dmash.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "exercises", folder / "exercises")
    shutil.copytree(AGENT, folder / "results" / "agent")
    printed = {}
    shell = [text for language, text in WALK if language == "bash"]
    python = [text for language, text in WALK if language == "python"]
    for text in shell:
        printed[text] = run_shell(text, folder)
    debugger = "".join(text for language, text in WALK if language == "pdb")
    commands = re.findall(r"^\(Pdb\) (.*\n)", debugger, re.M)
    script = f"\nprint({MARK!r}, flush=True)\n".join(python)
    process = [sys.executable, "-c", script]
    options = dict(input="".join(commands), capture_output=True, text=True)
    done = subprocess.run(process, cwd=folder, **options)
    outputs = done.stdout.split(MARK + "\n")
    assert len(outputs) == len(python), done.stderr
    return printed | dict(zip(python, outputs))


@pytest.mark.skipif(not AGENT.is_dir(), reason="results/agent is not here")
def test_each_output_of_the_page_comes_from_the_lines_above_it(jobs):
    printed, compared = jobs["walk"].result(), 0
    for (above, code), (language, shown) in zip(WALK, WALK[1:]):
        if language == "text":
            assert same(shown, printed[code]), f"{code}\nprints\n{printed[code]}"
            compared += 1
        if language == "pdb":
            outputs = printed[code].split("(Pdb) ")[1:]
            pieces = shown.split("(Pdb) ")[1:]
            for piece, output in zip(pieces, outputs, strict=True):
                command, _, expected = piece.partition("\n")
                if command.startswith("p "):
                    assert same(expected, output), f"{command}\nprints\n{output}"
                    compared += 1
    assert compared >= 12


def test_each_step_of_the_walk_is_a_command_or_at_most_six_lines():
    assert re.findall(r"^\*\*(\d+)\. ", GRADE_1, re.M) == [str(n) for n in range(1, 11)]
    steps = re.split(r"^\*\*\d+\. ", GRADE_1, flags=re.M)
    for step in steps[1:]:
        lines = [text.splitlines() for language, text in BLOCK.findall(step) if language != "text"]
        assert sum(map(len, lines)) <= 6 or "(Pdb)" in step, step


def test_each_block_of_the_walk_can_be_typed_at_the_prompt_of_python():
    """There a blank line ends a loop, and nothing else does."""
    for text in [text for language, text in WALK if language == "python"]:
        typed = []
        for line in [*text.splitlines(), ""]:
            typed.append(line)
            if codeop.compile_command("\n".join(typed)) is not None:
                typed = []
        assert typed == [], text


# ---- Grade 2: stubs, bugs -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def cases():
    """The cases of each test, in the teacher's files."""
    every = make.cases_of(EVERY_TEST)
    of_test = {}
    for test in EVERY_TEST:
        of_test[test] = {case for case in every if test in (case, case.partition("[")[0])}
    return of_test


def test_every_task_is_passed_by_the_sound_code(jobs, cases):
    assert jobs["sound"].result() == (set().union(*cases.values()), "")


@pytest.mark.parametrize("name", make.STUBS)
def test_a_stub_fails_every_test_of_its_task(name, jobs, cases):
    assert all(cases[test] for test in make.STUBS[name])
    assert jobs[f"stub {name}"].result() == (set(), "")


def functions(source):
    """Syntax trees by name: of functions as f, of methods as Class.f."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            found |= {f"{node.name}.{method.name}": method for method in methods}
    return found


@pytest.mark.parametrize("task", make.STUBS)
def test_a_stub_keeps_signature_and_docstring_and_all_other_functions(task):
    stubbed = make.stub(SOUND, task)
    before, after = functions(SOUND), functions(stubbed)
    assert before.keys() == after.keys()
    emptied = {name for name in before if name == task or name.startswith(f"{task}.")}
    assert emptied
    for name, function in before.items():
        if name in emptied:
            assert ast.dump(after[name].args) == ast.dump(function.args)
            assert ast.get_docstring(after[name]) == ast.get_docstring(function)
            assert ast.unparse(after[name].body[-1]) == "raise NotImplementedError"
            assert len(after[name].body) <= 2
        else:
            assert ast.dump(after[name]) == ast.dump(function)
    for line in ("# 2  z ←", "# 3  (φ, θ, η) ←", "# 4  ω ←", "# 5  ζ ←", "# 6  every", "# 7  ζ̄ ←"):
        assert stubbed.count(line) == SOUND.count(line) == 1


@pytest.mark.parametrize("name", make.BUGS)
def test_a_bug_is_noticed_by_its_test(name, jobs, cases):
    passed, problem = jobs[f"bug {name}"].result()
    assert passed < cases[make.BUGS[name].test]
    assert problem == ""


@pytest.mark.parametrize("name", make.BUGS)
def test_a_bug_that_no_longer_applies_is_an_error(name):
    [(old, _), *_] = make.BUGS[name].changes.items()
    for text in ("", old + old):
        with pytest.raises(ValueError, match="times in dmash.py"):
            make.plant(text, make.BUGS[name])


@pytest.fixture
def registered(monkeypatch):
    """What a test imports and registers is forgotten after it."""
    monkeypatch.setattr(aib_envs, "ENVS", dict(aib_envs.ENVS))
    registry = gymnasium.envs.registration.registry.copy()
    monkeypatch.setattr(gymnasium.envs.registration, "registry", registry)
    yield
    sys.modules.pop("point", None)


@pytest.mark.parametrize("name", make.BUGS)
def test_a_bug_does_not_stop_training(name, registered, tmp_path):
    """A few steps, in this process."""
    module = types.ModuleType("planted")
    module.__file__ = dmash.__file__
    sys.modules["planted"] = module
    exec(make.plant(SOUND, make.BUGS[name]), vars(module))
    del sys.modules["planted"]
    settings = dict(contexts=2, batch=8, hidden=16, bottleneck=4, random_steps=10, threads=1)
    run = module.Run(module.Config(env="point:point", **settings), tmp_path)
    for _ in range(10):
        run.rollout.collect(random=True)
    for _ in range(45):  # past the end of an episode
        run.gradient_step()


# ---- Marks --------------------------------------------------------------------------------------


def command(*arguments):
    script = [sys.executable, ROOT / "exercises" / "make.py", *arguments]
    return subprocess.run(script, capture_output=True, text=True)


def run_tests(printed):
    """The pytest command that `make.py stub` printed. Returns its exit status."""
    words = shlex.split(printed.splitlines()[-1])
    assert words[:3] == ["python", "-m", "pytest"]
    return subprocess.run([sys.executable, *words[1:]], capture_output=True).returncode


def test_the_command_of_a_stub_fails_at_first_and_passes_with_a_solution(tmp_path):
    done = command("stub", "avg_l1_norm", "sim_norm", "--out", tmp_path / "homework")
    assert done.returncode == 0
    assert run_tests(done.stdout) == 1
    (tmp_path / "homework" / "dmash.py").write_text(SOUND, encoding="utf8")
    assert run_tests(done.stdout) == 0


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    for words in (["stub", "adapter"], ["bug", "random"]):
        done = command(*words, "--out", tmp_path)
        assert (done.returncode, done.stderr) == (1, f"--out {tmp_path}: File exists\n")
    assert not list(tmp_path.iterdir())


def test_bugs_are_handed_out_without_their_names_and_without_tests(tmp_path):
    assert command("bug", "random", "--out", tmp_path / "one").returncode == 0
    done = command("bug", "all", "--out", tmp_path / "all")
    folders = sorted((tmp_path / "all").iterdir())
    planted = [make.plant(SOUND, bug) for bug in make.BUGS.values()]
    assert [make.read(folder) for folder in folders] == planted
    assert make.read(tmp_path / "one") in planted
    for folder in [*folders, tmp_path / "one"]:
        assert sorted(path.name for path in folder.iterdir()) == FILES
        assert not any(name in make.read(folder) for name in make.BUGS)
    assert not any(name in done.stdout for name in make.BUGS)


FILES = ["aib_envs.py", "dmash.py", "point.py"]


@pytest.mark.parametrize("name", [*CHEATS, "at once"])
def test_code_that_avoids_the_tests_passes_none(name, jobs):
    passed, problem = jobs[f"cheat {name}"].result()
    assert passed == set()
    if name == "skips":
        assert problem == ""
    else:
        assert problem == "crashed"


def test_an_endless_loop_is_stopped_with_its_children(tmp_path):
    beat = tmp_path / "beat"
    child = f"while sleep 0.2; do touch {shlex.quote(str(beat))}; done"
    source = f"import subprocess\nsubprocess.Popen({child!r}, shell=True)\nwhile True:\n    pass\n"
    begin = time.perf_counter()
    assert make.passing(source, make.STUBS["adapter"], 8) == (set(), "timed out")
    assert time.perf_counter() - begin < 40
    beat.unlink(missing_ok=True)
    time.sleep(1)
    assert not beat.exists()


UNUSABLE = {
    b"def adapter(:": "not Python",
    b"x = 1": "no adapter in dmash.py",
    b"\0": "not Python",
    "ä".encode("latin1"): "not Python",
}


@pytest.mark.parametrize("text", UNUSABLE)
def test_a_file_that_cannot_be_used_passes_nothing_and_says_why(text, tmp_path):
    assert make.mark(tmp_path, "adapter", ["a case"], LIMIT) == (0, "no dmash.py")
    (tmp_path / "dmash.py").write_bytes(text)
    assert make.mark(tmp_path, "adapter", ["a case"], LIMIT) == (0, UNUSABLE[text])


ALTERING = {
    "import _pytest.python; _pytest.python.Function.runtest = lambda self: None": "pytest",
    "__import__('unittest').TestCase": "unittest",
    "sys.modules['test_dmash'] = None": "sys.modules",
}


@pytest.mark.parametrize("line", ALTERING)
def test_code_that_could_alter_the_tests_is_refused(line, tmp_path):
    """The first of them passes all tests where it is run."""
    expected = (0, f"names {ALTERING[line]}")
    (tmp_path / "dmash.py").write_text(f"{SOUND}\n{line}\n", encoding="utf8")
    assert make.mark(tmp_path, "bug", ["a case"], LIMIT) == expected
    (tmp_path / "dmash.py").write_text(cheat(line), encoding="utf8")
    assert make.mark(tmp_path, "adapter", ["a case"], LIMIT) == expected


def test_a_file_that_cannot_be_imported_is_told_from_a_wrong_one():
    assert make.passing("1 / 0", make.STUBS["adapter"], LIMIT) == (set(), "import failed")


def test_one_task_is_marked_without_the_others():
    """Its function alone is put into the teacher's file."""
    two = make.stub(EMPTY, "critic_loss")
    assert make.transplant(two, "adapter") == EMPTY
    assert make.transplant(two, "sim_norm") == SOUND
    assert make.transplant("import os\nos._exit(0)\n" + SOUND, "Actor.sample") == SOUND


def test_a_repaired_bug_is_marked_as_a_whole_file(tmp_path, monkeypatch):
    seen = []

    def passing(source, tests, timeout):
        seen.append((source, tests, timeout))
        return {"one", "two"}, ""

    monkeypatch.setattr(make, "passing", passing)
    text = "anything  # with pytest"
    (tmp_path / "dmash.py").write_text(text, encoding="utf-8-sig")  # with a byte-order mark
    assert make.mark(tmp_path, "bug", ["one", "three", "two", "four"], 9) == (2, "three")
    assert seen == [(text, make.TASKS["bug"], 9)]
    assert make.TASKS["bug"] == sorted({bug.test for bug in make.BUGS.values()})


def test_a_class_is_marked_by_the_tests_of_the_teacher(tmp_path):
    """One right, one wrong, and one that edits its tests and leaves with status 0."""
    [test] = make.STUBS["adapter"]
    for name, source in (("ann", SOUND), ("bob", EMPTY), ("eve", cheat("os._exit(0)"))):
        make.hand_out(tmp_path / name, source, with_tests=True)
    (tmp_path / "eve" / "test_dmash.py").write_text("def test_all():\n    pass\n")
    folders = [tmp_path / name for name in ("ann", "bob", "eve")]
    done = command("mark", *folders, "--tasks", "adapter", "--csv")
    assert done.returncode == 1
    assert list(csv.reader(done.stdout.splitlines())) == [
        ["folder", "task", "passed", "points", "reason"],
        [str(folders[0]), "adapter", "2 of 2", "1", ""],
        [str(folders[1]), "adapter", "0 of 2", "0", f"{test}[1]"],
        [str(folders[2]), "adapter", "0 of 2", "0", "crashed"],
    ]
    done = command("mark", folders[0], "--tasks", "adapter")
    assert done.returncode == 0
    header, adapter = [line.split() for line in done.stdout.splitlines()]
    assert header == ["folder", "task", "passed", "points", "reason"]
    assert adapter == [str(folders[0]), "adapter", "2", "of", "2", "1"]


def test_a_wrong_mark_command_is_an_error_before_anything_is_run(tmp_path):
    gone = tmp_path / "gone"
    done = command("mark", tmp_path, gone, "--tasks", "adapter")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{gone}: no such folder\n")
    done = command("mark", tmp_path)
    assert done.returncode == 2
    assert done.stderr.endswith("the following arguments are required: --tasks\n")
    done = command("mark", "--tasks", "adapter", tmp_path)
    assert done.returncode == 2
    assert done.stderr.endswith(f"{tmp_path} is no task. Folders stand before --tasks\n")


def test_columns_stand_under_their_names_for_any_length_of_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = [Path("a"), Path("long" * 15)]
    for folder in folders:
        folder.mkdir()
    assert make.print_marks(folders, ["sim_norm"], as_csv=False, timeout=LIMIT) == 1
    header, *rows = capsys.readouterr().out.splitlines()
    for row in rows:
        assert row.index("sim_norm") == header.index("task")
        assert row.index("no dmash.py") == header.index("reason")


def test_a_seed_draws_the_same_bug_again_and_seeds_draw_many(tmp_path):
    drawn = []
    for seed in (*range(10), *range(10)):
        folder = tmp_path / str(len(drawn))
        make.make_bugs("random", folder, seed)
        drawn.append(make.read(folder))
    assert drawn[:10] == drawn[10:]
    assert len(set(drawn)) >= 4


# ---- Grade 3 ------------------------------------------------------------------------------------


def test_the_commands_of_the_page_are_those_of_the_programs(registered, tmp_path, monkeypatch):
    commands = re.findall(r"^python (\S+) ((?:.*\\\n)*.*)$", GRADES_2_3, re.M)
    assert len(commands) >= 8  # here the folder of exercises is on Python's path
    for program, text in commands:
        text = text.replace("\\\n", " ").replace("$k", "8")
        words = shlex.split(text.replace("exercises.point:", "point:"), comments=True)
        if program == "dmash.py":
            given = vars(dmash.build_parser().parse_args(words))
            assert dmash.Config(**given).env == given["env"]
        elif words[0] in ("stub", "bug"):
            monkeypatch.chdir(tmp_path)
            assert command(*words).returncode == 0
        else:
            assert (ROOT / program).is_file()


def test_the_page_names_every_stub_and_no_bug():
    assert re.findall(r"^\| `([\w.]+)` \|", PAGE, re.M) == list(make.STUBS)
    assert not any(f"`{name}`" in PAGE for name in make.BUGS)


def test_the_page_tells_how_many_cases_mark_a_bug():
    assert f"{len(make.cases_of(make.TASKS['bug']))} cases in all" in PAGE
