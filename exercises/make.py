"""Exercises of a course: hands out stubs and bugs, and marks what comes back.

    python exercises/make.py stub adapter critic_loss --out homework
    python exercises/make.py bug random --out hunt
    python exercises/make.py mark class/*/homework --tasks adapter critic_loss
    python exercises/make.py mark class/*/hunt --tasks bug

README.md, beside this file, says what the exercises are. Marking takes about five seconds for each
task of each folder, and longer on a busy computer.
"""

import argparse
import ast
import contextlib
import csv
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from bugs import BUGS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
FORBIDDEN = ["pytest", "unittest", "sys.modules"]  # with them a student's file could alter tests

STUBS = {  # function or class of dmash.py: the tests of test_dmash.py that say when it is right
    "avg_l1_norm": ["test_avg_l1_norm_by_hand"],
    "sim_norm": ["test_sim_norm_by_hand"],
    "mask_inputs": [
        "test_mask_inputs_zeroes_whole_vectors_at_the_stated_rate",
        "test_mask_inputs_does_not_scale_what_is_left",
    ],
    "Hypernetwork": [
        "test_hypernetwork_gives_omega_with_its_shapes",
        "test_hypernetwork_equals_a_loop_over_samples",
    ],
    "adapter": ["test_adapter_and_its_gradients_equal_a_loop_over_samples"],
    "Actor.sample": [
        "test_actor_sample_has_the_log_probability_of_torch_distributions",
        "test_actor_sample_is_distributed_as_its_gaussian_and_reparameterised",
        "test_actor_sample_is_finite_where_tanh_saturates",
    ],
    "critic_loss": ["test_critic_loss_by_hand", "test_critic_loss_trains_the_critics_alone"],
    "Replay.windows": [
        "test_windows_hold_past_transitions_of_their_own_context",
        "test_windows_before_the_first_transitions_are_zeros",
        "test_windows_are_read_at_random_for_training_and_evenly_for_evaluation",
    ],
    "Agent.update": [
        "test_gradient_routing[dma_star_sh]",
        "test_update_equals_algorithm_2_in_another_way[dma_star_sh]",
        "test_update_moves_the_target_critics_by_rho",
    ],
}
TASKS = STUBS | {"bug": sorted({bug.test for bug in BUGS.values()})}


def read(folder):
    """The text of dmash.py. Some editors on Windows begin a file with a byte-order mark."""
    return (folder / "dmash.py").read_text(encoding="utf-8-sig")


# ---- Stubs and bugs -----------------------------------------------------------------------------


def find(source, name):
    """The syntax tree of a function, a class, or a method (Class.method)."""
    node = ast.parse(source)
    for part in name.split("."):
        named = [child for child in node.body if isinstance(child, (ast.FunctionDef, ast.ClassDef))]
        node = {child.name: child for child in named}[part]
    return node


def stub(source, name):
    """The source, in which a function or all methods of a class raise NotImplementedError.

    Signatures, docstrings and the numbered lines of an algorithm stay.
    """
    lines = source.split("\n")
    functions = [find(source, name)]
    if isinstance(functions[0], ast.ClassDef):
        functions = [child for child in functions[0].body if isinstance(child, ast.FunctionDef)]
    for function in reversed(functions):  # the last one first, so that line numbers stay true
        first = function.body[0]
        start = first.lineno - 1
        if ast.get_docstring(function) is not None:
            start = first.end_lineno
        body = lines[start : function.end_lineno]
        kept = [line for line in body if re.match(r" *# \d  ", line)]
        error = " " * first.col_offset + "raise NotImplementedError"
        lines[start : function.end_lineno] = [*kept, error]
    return "\n".join(lines)


def plant(source, bug):
    """The source with a bug. ValueError if a text to replace does not stand there exactly once."""
    for old, new in bug.changes.items():
        if source.count(old) != 1:
            raise ValueError(f"stands {source.count(old)} times in dmash.py: {old!r}")
        source = source.replace(old, new)
    return source


def hand_out(folder, source, with_tests):
    """A new folder with the source as dmash.py, and what it needs."""
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise SystemExit(f"--out {folder}: {error.strerror}") from None
    (folder / "dmash.py").write_text(source, encoding="utf8")
    shutil.copy(ROOT / "aib_envs.py", folder)
    shutil.copy(HERE / "point.py", folder)
    if with_tests:
        shutil.copy(ROOT / "test_dmash.py", folder)


def make_stubs(names, folder):
    source, tests = read(ROOT), []
    for name in names:
        source = stub(source, name)
        tests += [f"{folder}/test_dmash.py::{test}" for test in STUBS[name]]
    hand_out(folder, source, with_tests=True)
    print(f"{folder}/dmash.py: fill in {', '.join(names)}.")
    print("Only what stands inside is marked: no helper, import or constant outside counts.")
    print("When this passes, you are right:")
    print(shlex.join(["python", "-m", "pytest", "-q", *tests]))


def make_bugs(name, folder, seed):
    """Without tests, which would tell the bug at once."""
    names, folders = [name], [folder]
    if name == "random":
        names = [random.Random(seed).choice(list(BUGS))]
    if name == "all":
        names = list(BUGS)
        folders = [folder / f"{number:02}" for number in range(1, len(BUGS) + 1)]
    for name, folder in zip(names, folders):
        hand_out(folder, plant(read(ROOT), BUGS[name]), with_tests=False)
        print(f"{folder}/dmash.py: one line or a few are wrong. Which?")


# ---- Marks --------------------------------------------------------------------------------------


def transplant(source, name):
    """The teacher's dmash.py with a student's function or class `name` in it."""
    ours = read(ROOT)
    old, new = find(ours, name), find(source, name)
    lines = ours.split("\n")
    lines[old.lineno - 1 : old.end_lineno] = source.split("\n")[new.lineno - 1 : new.end_lineno]
    return "\n".join(lines)


def cases_of(tests):
    """The names of all cases of these tests, in order: a parametrised test has several."""
    command = [*PYTEST, "--collect-only", *(f"test_dmash.py::{test}" for test in tests)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"your own files are broken:\n{done.stdout}")
    return [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]


def passing(source, tests, timeout):
    """The names of the cases that pass, and what stopped the tests ("" if nothing did).

    They run on this source in a process of their own.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        place = Path(folder) / "marked"
        hand_out(place, source, with_tests=True)
        report = Path(folder) / "report.xml"
        command = [*PYTEST, f"--junitxml={report}", *(f"test_dmash.py::{test}" for test in tests)]
        silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process = subprocess.Popen(command, cwd=place, start_new_session=True, **silent)
        problem = "crashed"
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            problem = "timed out"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
        process.wait()
        # A process that crashed, was killed or left by os._exit has written no report.
        try:
            [suite] = ElementTree.parse(report).iter("testsuite")
        except (OSError, ElementTree.ParseError, ValueError):
            return set(), problem
    cases = suite.findall("testcase")
    if suite.get("tests") != str(len(cases)):  # pytest.exit() left one of them
        return set(), "crashed"
    if [case.get("name") for case in cases] == ["test_dmash"]:  # the file of the tests itself
        return set(), "import failed"
    passed = {case.get("name") for case in cases if len(case) == 0}  # else: a failure or a skip
    return passed, ""


def mark(folder, task, cases, timeout):
    """How many of the cases pass on a student's dmash.py, and the reason if not all do."""
    try:
        source = read(folder)
        if task != "bug":
            source = transplant(source, task)
        code = ast.unparse(ast.parse(source))  # without comments, which may name anything
    except OSError:
        return 0, "no dmash.py"
    except KeyError:
        return 0, f"no {task} in dmash.py"
    except Exception:  # whatever else a student's file makes the reader raise
        return 0, "not Python"
    for word in FORBIDDEN:
        if code.count(word) > read(ROOT).count(word):
            return 0, f"names {word}"
    passed, reason = passing(source, TASKS[task], timeout)
    failed = [case for case in cases if case not in passed]
    if failed and reason == "":
        reason = failed[0]
    return len(cases) - len(failed), reason


def print_marks(folders, tasks, as_csv, timeout):
    """A row for each task of each folder. Returns the exit status: 0 if all tests pass."""
    for folder in folders:
        if not folder.is_dir():
            print(f"{folder}: no such folder", file=sys.stderr)
            return 2
    cases = {task: cases_of(TASKS[task]) for task in tasks}
    width = max(len(str(folder)) for folder in ["folder", *folders])
    writer = csv.writer(sys.stdout, lineterminator="\n")

    def show(folder, *row):
        if as_csv:
            writer.writerow([folder, *row])
        else:
            print(f"{folder!s:{width}}", "{:15} {:>8} {:>7}  {}".format(*row), flush=True)

    status = 0
    show("folder", "task", "passed", "points", "reason")
    for folder in folders:
        for task in tasks:
            passed, reason = mark(folder, task, cases[task], timeout)
            points = 1
            if passed < len(cases[task]):
                points, status = 0, 1
            show(folder, task, f"{passed} of {len(cases[task])}", points, reason)
    return status


def task_name(word):
    if word not in TASKS:
        raise argparse.ArgumentTypeError(f"{word} is no task. Folders stand before --tasks")
    return word


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("stub", help="empty functions, to be filled in")
    command.add_argument("names", nargs="+", choices=STUBS, metavar="NAME", help=", ".join(STUBS))
    command.add_argument("--out", type=Path, required=True, help="a new folder")
    command = commands.add_parser("bug", help="one silent bug, to be found")
    command.add_argument("name", choices=[*BUGS, "all", "random"])
    command.add_argument("--out", type=Path, required=True, help="a new folder; all: one for each")
    command.add_argument("--seed", type=int, help="of random: the same seed, the same bug")
    usage = "%(prog)s FOLDER [FOLDER ...] --tasks TASK [TASK ...] [--timeout SECONDS] [--csv]"
    command = commands.add_parser("mark", help="run this repository's tests", usage=usage)
    command.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    command.add_argument("--tasks", nargs="+", type=task_name, required=True, help=", ".join(TASKS))
    command.add_argument(
        "--timeout", type=float, default=60, help="seconds on the clock for a task (60)"
    )
    command.add_argument("--csv", action="store_true", help="print a CSV table")
    given = parser.parse_args()
    if given.command == "stub":
        make_stubs(given.names, given.out)
    if given.command == "bug":
        make_bugs(given.name, given.out, given.seed)
    if given.command == "mark":
        return print_marks(given.folders, given.tasks, given.csv, given.timeout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
