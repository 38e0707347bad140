"""Tests of exercises/: the page, the stubs, the bugs and the marks.

Stubs and bugs are planted in this process. Marking is tested on a small function of its own.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "exercises"))
import make  # noqa: E402

import dmash  # noqa: E402

SOUND = make.read(ROOT)
PAGE = (ROOT / "exercises" / "README.md").read_text(encoding="utf8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)  # language, text
GRADE_1, _, GRADES_2_3 = PAGE.partition("## Grade 2")
WALK = BLOCK.findall(GRADE_1)
AGENT = ROOT / "results" / "agent"
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


# ---- Grade 1: each output on the page comes from the lines above it -----------------------------

NUMBER = r"-?\d+(?:,\d{3})*\.?\d*(?:e[-+]\d+)?"
MARK = "-- the next block --"


def near(shown, printed):
    """Another processor rounds otherwise. A number with a point may differ by 0.06 or a fifth, one
    with an exponent by a factor of two."""
    a, b = [float(text.replace(",", "")) for text in (shown, printed)]
    if "e" in shown:
        return a / 2 < b < 2 * a
    if "." in shown:
        return b == pytest.approx(a, rel=0.2, abs=0.06)
    return a == b


def same(shown, printed):
    """Whether the text is the same, "…" standing for any text, and its numbers are near."""
    text = " ".join(re.sub(NUMBER, "@", shown).split())
    pattern = re.escape(text).replace(r"\ ", " ?").replace("…", ".*?")
    pattern = pattern.replace("@", f" ?({NUMBER})")
    found = re.fullmatch(pattern, " ".join(printed.split()))
    return found is not None and all(map(near, re.findall(NUMBER, shown), found.groups()))


# The prompt of Python, which reads from a file as from a student: a blank line ends a loop.
PROMPT = "import code, sys; sys.ps1 = sys.ps2 = ''; code.interact('', exitmsg='')"


def run_walk(folder):
    """What each block of grade 1 that is not output prints."""
    make.hand_out(folder, SOUND, "test_dmash.py")
    shutil.copytree(ROOT / "exercises", folder / "exercises")
    shutil.copytree(AGENT, folder / "results" / "agent")

    def output(*command, typed=""):
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ONE_THREAD, text=True)
        return subprocess.run(command, cwd=folder, input=typed, **options).stdout

    printed = {}
    blocks = []
    typed = ""
    for language, text in WALK:
        if language == "bash":
            printed[text] = output("bash", "-c", text.replace("python ", f"{sys.executable} "))
        if language == "python":
            blocks.append(text)
            typed += f"print({MARK!r})\n{text}\n"
        if language == "pdb":
            typed += "".join(re.findall(r"^\(Pdb\) (.*\n)", text, re.M))
    _, *outputs = output(sys.executable, "-c", PROMPT, typed=typed).split(MARK + "\n")
    return printed | dict(zip(blocks, outputs, strict=True))


@pytest.mark.skipif(not AGENT.is_dir(), reason="results/agent is not here")
def test_each_output_of_the_page_comes_from_the_lines_above_it(tmp_path):
    printed = run_walk(tmp_path / "repository")
    compared = 0
    for (_, code), (language, shown) in zip(WALK, WALK[1:]):
        if language == "pdb":
            shown = re.sub(r"^\(Pdb\) p .*", "(Pdb)", shown, flags=re.M)  # commands are not printed
            shown = re.sub(r"^\(Pdb\) \w{2}.*", "…", shown, flags=re.M)
        if language in ("text", "pdb"):
            assert same(shown, printed[code]), f"{code}\nprints\n{printed[code]}"
            compared += 1
    assert compared >= 10


def test_each_step_of_the_walk_is_a_command_or_at_most_six_lines():
    _, *steps = re.split(r"^\*\*(\d+)\. ", GRADE_1, flags=re.M)
    assert steps[::2] == [str(n) for n in range(1, 11)]
    for step in steps[1::2]:
        lines = "".join(text for language, text in BLOCK.findall(step) if language != "text")
        assert lines.count("\n") <= 6 or "(Pdb)" in lines, step


# ---- Grade 2: stubs, bugs -----------------------------------------------------------------------


@pytest.fixture
def passed(monkeypatch):
    """Puts a source in the place of the module dmash, in this process, and runs tests on it.

    Returns for each case whether it passed, as a plugin of pytest notes it.
    """

    def run(source, tests):
        module = types.ModuleType("dmash")
        module.__file__ = dmash.__file__
        monkeypatch.setitem(sys.modules, "dmash", module)
        exec(source, vars(module))
        monkeypatch.setitem(sys.modules, "test_dmash", None)
        del sys.modules["test_dmash"]  # so that it is imported again; afterwards it is as before
        cases = []

        def note(report):
            if report.when == "call":
                cases.append(report.passed)

        paths = [f"{ROOT}/test_dmash.py::{test}" for test in tests]
        quiet = ["-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
        pytest.main([*quiet, *paths], [types.SimpleNamespace(pytest_runtest_logreport=note)])
        return cases

    return run


def test_the_sound_code_passes_all_tasks(passed):
    stub_tests = [test for tests in make.STUBS.values() for test in tests]
    assert set(passed(SOUND, stub_tests)) == {True}
    cases = passed(SOUND, make.TASKS["bug"])
    assert set(cases) == {True}
    assert f"{len(cases)} cases in all" in PAGE


@pytest.mark.parametrize("name", make.STUBS)
def test_a_stub_fails_every_test_of_its_task(name, passed):
    assert set(passed(make.stub(SOUND, name), make.STUBS[name])) == {False}


@pytest.mark.parametrize("name", make.STUBS)
def test_a_stub_keeps_all_but_the_bodies_of_functions(name):
    """Signatures, docstrings, lines 2 to 7 of Algorithm 2, and all that stands elsewhere."""
    stubbed = make.stub(SOUND, name)
    node = make.find(SOUND, name)
    expected = ast.parse(SOUND)
    emptied = range(node.lineno, node.end_lineno)
    for function in ast.walk(expected):
        if isinstance(function, ast.FunctionDef) and function.lineno in emptied:
            start = int(ast.get_docstring(function) is not None)
            function.body[start:] = ast.parse("raise NotImplementedError").body
    assert ast.dump(ast.parse(stubbed)) == ast.dump(expected)
    numbered = [re.findall(r"^ +# \d  .*", source, re.M) for source in (SOUND, stubbed)]
    assert numbered[0] == numbered[1]
    assert len(numbered[0]) == 6


@pytest.mark.parametrize("name", make.BUGS)
def test_a_bug_is_noticed_by_its_test_and_does_not_stop_training(name, passed, tmp_path):
    bug = make.BUGS[name]
    assert False in passed(make.plant(SOUND, bug), [bug.test])
    planted = sys.modules["dmash"]
    settings = dict(contexts=2, batch=8, hidden=16, bottleneck=4, K=5, random_steps=10, threads=1)
    run = planted.Run(planted.Config(env="di_inv", **settings), tmp_path)
    for _ in range(10):
        run.rollout.collect(random=True)
    for _ in range(100):  # past the end of an episode
        run.gradient_step()


def test_a_bug_that_no_longer_applies_is_an_error():
    for text in ("", SOUND + SOUND):
        with pytest.raises(ValueError, match="times in dmash.py"):
            make.plant(text, make.BUGS["no_entropy"])


# ---- What is handed out -------------------------------------------------------------------------


def test_a_stub_is_handed_out_once_and_its_command_passes_with_a_solution(tmp_path):
    def run(*command):
        return subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD)

    folder = tmp_path / "homework"
    command = [sys.executable, make.__file__, "stub", "avg_l1_norm", "sim_norm", "--out", folder]
    printed = run(*command).stdout
    assert make.read(folder) == make.stub(make.stub(SOUND, "avg_l1_norm"), "sim_norm")
    (folder / "dmash.py").write_text(SOUND, encoding="utf8")
    again = run(*command)
    assert again.stderr.endswith(f"error: {folder}: File exists\n")
    assert again.returncode == 2
    python, *words = shlex.split(printed.splitlines()[-1])
    assert python == "python"
    assert "2 passed" in run(sys.executable, *words).stdout


def test_bugs_are_handed_out_without_their_names_and_without_tests(tmp_path, capsys):
    make.main(["bug", "all", "--out", str(tmp_path)])
    folders = sorted(tmp_path.iterdir())
    planted = [make.plant(SOUND, bug) for bug in make.BUGS.values()]
    assert [make.read(folder) for folder in folders] == planted
    texts = [capsys.readouterr().out, *planted]
    assert not any(name in text for name in make.BUGS for text in texts)
    files = {path.name for folder in folders for path in folder.iterdir()}
    assert files == {"aib_envs.py", "dmash.py", "point.py"}


def test_a_seed_draws_the_same_bug_again_and_seeds_draw_many(tmp_path):
    def draw(seed, name):
        make.make_bugs("random", tmp_path / name, seed)
        return make.read(tmp_path / name)

    drawn = [draw(seed, str(seed)) for seed in range(10)]
    assert draw(3, "again") == drawn[3]
    assert len(set(drawn)) >= 4


# ---- Marks --------------------------------------------------------------------------------------

DOUBLE = "def double(x):\n    return 2 * x\n"
TWO_TESTS = """
import dmash

def test_zero():
    assert dmash.double(0) == 0

def test_three():
    assert dmash.double(3) == 6
"""


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    """A repository with one small function, since marking does not depend on what is marked."""
    root = tmp_path / "teacher"
    (root / "exercises").mkdir(parents=True)
    files = {"dmash.py": DOUBLE, "test_dmash.py": TWO_TESTS, "aib_envs.py": ""}
    files["exercises/point.py"] = ""
    for name, text in files.items():
        (root / name).write_text(text)
    monkeypatch.setattr(make, "ROOT", root)
    tests = ["test_zero", "test_three"]
    monkeypatch.setattr(make, "TASKS", {"double": tests, "bug": tests})


STOPPED = "crashed, left, or took too long (see --timeout)"


def inside(line):
    """A student's file with this line in the function, which alone counts."""
    return f"import helper\n\ndef double(x):\n    {line}\n\n1 / 0\n".encode()


ANSWERS = [  # task, dmash.py, cases passed, how the reason begins
    ("double", inside("return x + x"), 2, ""),
    ("double", inside("exit(0)"), 0, "test_zero"),
    ("double", inside("__import__('ctypes').string_at(0)"), 0, STOPPED),
    ("double", inside("while True: __import__('time').sleep(1)"), 0, STOPPED),
    ("double", inside("raise KeyboardInterrupt"), 0, STOPPED),
    ("double", b"def double(:", 0, "SyntaxError"),
    ("double", b"x = 1", 0, "ValueError: double stands 0 times"),
    ("bug", b"\xef\xbb\xbf# no pytest\ntwo = 2\ndef double(x): return two * x", 2, ""),
    ("double", "ä".encode("latin-1"), 0, "UnicodeDecodeError: 'utf-8' codec can't decode byte"),
    ("bug", b"1 / 0", 0, "test_dmash"),  # it cannot be imported
    ("bug", b"exit(0)", 0, ""),  # pytest's own name for it is the reason
    ("bug", b"import sys; sys.modules['test_dmash'] = None", 0, "names sys.modules"),
]


@pytest.mark.parametrize("task, text, passed, reason", ANSWERS)
def test_what_a_student_hands_in_is_marked(task, text, passed, reason, teacher, tmp_path):
    (tmp_path / "dmash.py").write_bytes(text)
    marked = make.mark(tmp_path, task, timeout=10)
    assert marked[0] == passed
    assert marked[1].startswith(reason)


MARKS = f"""task,passed,points,folder,reason
double,2 of 2,1,ann,
double,1 of 2,0,bob,test_three: assert 3 == 6
double,0 of 2,0,eve,"{STOPPED}"
double,0 of 2,0,gone,no dmash.py
"""


def test_a_class_is_marked_by_the_tests_of_the_teacher(teacher, tmp_path, monkeypatch, capsys):
    """One right, one wrong, and one that edits its tests and leaves with status 0."""
    cheat = "def double(x): __import__('os')._exit(0)"
    for name, text in (("ann", DOUBLE), ("bob", "def double(x): return x"), ("eve", cheat)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dmash.py").write_text(text)
    (tmp_path / "eve" / "test_dmash.py").write_text("def test_three(): pass")
    monkeypatch.chdir(tmp_path)
    assert make.main(["mark", "ann", "bob", "eve", "gone", "--tasks", "double", "--csv"]) == 1
    assert capsys.readouterr().out == MARKS
    assert make.main(["mark", "ann", "--tasks", "double", "bug"]) == 0
    words = "task passed points folder reason double 2 of 2 1 ann bug 2 of 2 1 ann".split()
    assert capsys.readouterr().out.split() == words


def test_nobody_is_marked_by_tests_that_the_teacher_does_not_pass(teacher, tmp_path):
    (make.ROOT / "dmash.py").write_text("1 / 0")
    with pytest.raises(SystemExit, match="your own files fail"):
        make.main(["mark", str(tmp_path), "--tasks", "bug"])


def test_only_the_function_of_the_task_is_taken_from_a_student():
    """A method, too, and a class."""
    for name in ("adapter", "Actor.sample", "Hypernetwork"):
        stubbed = make.stub(SOUND, name)
        student = "import os\nos._exit(0)\n" + make.stub(stubbed, "sim_norm")
        assert make.transplant(student, name) == stubbed


# ---- Grade 3, and the page as a whole -----------------------------------------------------------


def test_the_commands_of_the_page_are_those_of_the_programs(tmp_path, monkeypatch):
    commands = re.findall(r"^python (\S+) ((?:.*\\\n)*.*)$", GRADES_2_3, re.M)
    assert len(commands) >= 8
    monkeypatch.chdir(tmp_path)
    for program, text in commands:
        text = text.replace("\\\n", " ").replace("$k", "8")
        text = re.sub(r"(exercises\.)?point:point", "di_inv", text)  # the walk trains on it
        words = shlex.split(text, comments=True)
        if program == "dmash.py":
            given = vars(dmash.build_parser().parse_args(words))
            assert dmash.Config(**given).env == given["env"]
        elif words[0] in ("stub", "bug"):
            make.main(words)
        else:
            assert (ROOT / program).is_file()


def test_the_page_names_every_stub_and_no_bug():
    assert re.findall(r"^\| `([\w.]+)` \|", PAGE, re.M) == list(make.STUBS)
    assert not any(f"`{name}`" in PAGE for name in make.BUGS)
