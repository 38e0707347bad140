"""Exercises of a course: hands out stubs and bugs, and marks what comes back.

    python exercises/make.py stub adapter critic_loss --out homework
    python exercises/make.py bug random --out hunt
    python exercises/make.py mark class/*/homework --tasks adapter critic_loss
    python exercises/make.py mark class/*/hunt --tasks bug

README.md, beside this file, says what the exercises are. Marking takes about five seconds for each
task of each folder, ten for `bug`, and longer on a busy computer.
"""

import argparse
import ast
import csv
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from bugs import BUGS

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = ["pytest", "unittest", "sys.modules"]  # with them a student's file could alter tests

STUBS = {  # function or class of dmash.py: the tests of test_dmash.py that say when it is right
    "avg_l1_norm": ["test_avg_l1_norm_by_hand"],
    "sim_norm": ["test_sim_norm_by_hand"],
    "mask_inputs": [
        "test_mask_inputs_zeroes_whole_vectors_at_the_stated_rate",
        "test_mask_inputs_does_not_scale_what_is_left",
    ],
    "Hypernetwork": ["test_hypernetwork_equals_a_loop_over_samples"],
    "adapter": ["test_adapter_and_its_gradients_equal_a_loop_over_samples"],
    "Actor.sample": [
        "test_actor_sample_has_the_log_probability_of_torch_distributions",
        "test_actor_sample_is_distributed_as_its_gaussian_and_reparameterised",
        "test_actor_sample_is_exact_where_tanh_saturates",
    ],
    "critic_loss": ["test_critic_loss_by_hand", "test_critic_loss_trains_the_critics_alone"],
    "Replay.windows": [
        "test_windows_hold_past_transitions_of_their_own_context",
        "test_windows_before_the_first_transitions_are_zeros",
        "test_windows_are_read_at_random_for_training_and_evenly_for_evaluation",
        "test_windows_reach_over_resets_and_transitions_do_not",
        "test_windows_are_not_cut_where_no_encoder_reads_them",
    ],
    "Agent.update": [
        "test_gradient_routing[dma_star_sh]",
        "test_update_equals_algorithm_2_in_another_way[dma_star_sh]",
        "test_update_moves_the_target_critics_by_rho",
        "test_update_averages_the_policy_where_asked",
    ],
}
TASKS = STUBS | {"bug": sorted({bug.test for bug in BUGS.values()})}


def read(folder):
    """The text of dmash.py. Some editors on Windows begin a file with a byte-order mark."""
    return (folder / "dmash.py").read_text(encoding="utf-8-sig")


def hand_out(folder, source, *tests):
    """A new folder with the source as dmash.py, and what it needs."""
    folder.mkdir(parents=True)
    (folder / "dmash.py").write_text(source, encoding="utf8")
    for name in ("aib_envs.py", "exercises/point.py", *tests):
        shutil.copy(ROOT / name, folder)


# ---- Stubs and bugs -----------------------------------------------------------------------------


def find(source, name):
    """The syntax tree of a function, a class, or a method (Class.method)."""
    node = ast.parse(source)
    for part in name.split("."):
        found = [child for child in node.body if getattr(child, "name", None) == part]
        if len(found) != 1:
            raise ValueError(f"{name} stands {len(found)} times in dmash.py")
        node = found[0]
    return node


def stub(source, name):
    """The source, in which a function or all methods of a class raise NotImplementedError.

    Signatures, docstrings and the numbered lines of an algorithm stay.
    """
    lines = source.split("\n")
    nodes = ast.walk(find(source, name))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
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


def make_stubs(names, out):
    source = read(ROOT)
    tests = []
    for name in names:
        source = stub(source, name)
        tests += [f"{out}/test_dmash.py::{test}" for test in STUBS[name]]
    hand_out(out, source, "test_dmash.py")
    print(f"{out}/dmash.py: fill in {', '.join(names)}.")
    print("Only what stands inside is marked: no helper, import or constant outside counts.")
    print("When this passes, you are right:")
    print(shlex.join(["python", "-m", "pytest", "-q", *tests]))


def make_bugs(name, out, seed):
    """Without tests, which would tell the bug at once."""
    if name == "random":
        name = random.Random(seed).choice(list(BUGS))
    folders = {out: name}
    if name == "all":
        folders = {out / f"{number:02}": name for number, name in enumerate(BUGS, 1)}
    for folder, name in folders.items():
        hand_out(folder, plant(read(ROOT), BUGS[name]))
        print(f"{folder}/dmash.py: one line or a few are wrong. Which?")


# ---- Marks --------------------------------------------------------------------------------------


def transplant(source, name):
    """The teacher's dmash.py with a student's function or class `name` in it."""
    ours = read(ROOT)
    old, new = [ast.get_source_segment(text, find(text, name)) for text in (ours, source)]
    return ours.replace(old, new)


def run_tests(task, source, timeout):
    """What is wrong with a source in each case of the task's tests ("" if nothing is).

    They run in a process of their own. The answer is empty if it crashes, takes too long, or leaves
    before all tests are done.
    """
    tests = [f"test_dmash.py::{test}" for test in TASKS[task]]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        place = Path(folder) / "marked"
        hand_out(place, source, "test_dmash.py")
        command = [sys.executable, "-m", "pytest", "--junitxml=report.xml", *tests]
        silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        try:
            subprocess.run(command, cwd=place, env=one_thread, timeout=timeout, **silent)
            suite = ElementTree.parse(place / "report.xml").find("testsuite")
        except (subprocess.TimeoutExpired, OSError):  # a process that crashed wrote no report
            return {}
    cases = suite.findall("testcase")
    if suite.get("tests") != str(len(cases)):  # interrupted in one of them
        return {}
    reasons = {}
    for case in cases:
        name = case.get("name")
        reasons[name] = ""
        for failure in case:  # or a skip; at most one
            message = failure.get("message", "").splitlines()
            differences = [line.strip() for line in message[1:] if re.search(r"diff\w*:", line)]
            reasons[name] = ": ".join([name, *message[:1], *differences[:1]])
    return reasons


def mark(folder, task, timeout):
    """How many cases pass on a student's dmash.py, and what is wrong with it ("" if nothing is)."""
    try:
        source = read(folder)
        if task != "bug":
            source = transplant(source, task)
        code = ast.unparse(ast.parse(source))  # without comments, which may name anything
    except OSError:
        return 0, "no dmash.py"
    except Exception as error:  # whatever a student's file makes its reader raise
        return 0, f"{type(error).__name__}: {error}"
    for word in FORBIDDEN:
        if word in code:
            return 0, f"names {word}"
    cases = run_tests(task, source, timeout)
    if not cases:
        return 0, "crashed, left, or took too long (see --timeout)"
    wrong = [reason for reason in cases.values() if reason]
    return len(cases) - len(wrong), next(iter(wrong), "")


def print_marks(folders, tasks, timeout, as_csv):
    """A row for each task of each folder. Returns the exit status: 0 if all tests pass."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    status = 0

    def show(*row):
        if as_csv:
            writer.writerow(row)
        else:
            print("{:15} {:>8} {:>7}  {}  {}".format(*row), flush=True)

    show("task", "passed", "points", "folder", "reason")
    for task in tasks:
        ours = run_tests(task, read(ROOT), timeout)
        if not ours or any(ours.values()):
            command = f"{sys.executable} -m pytest test_dmash.py"
            slow = f"or take more than {timeout} seconds (--timeout)"
            raise SystemExit(f"{task}: your own files fail, {slow}; try {command}")
        for folder in folders:
            passed, reason = mark(folder, task, timeout)
            points = int(passed == len(ours))
            if points == 0:
                status = 1
            show(task, f"{passed} of {len(ours)}", points, folder, reason)
    return status


def bug(name):
    """Refuses other names, without telling those of the bugs."""
    if name not in [*BUGS, "all", "random"]:
        raise argparse.ArgumentTypeError("must be random, all, or the name of one in bugs.py")
    return name


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("stub", help="empty functions, to be filled in")
    command.add_argument("names", nargs="+", choices=STUBS, metavar="NAME", help=", ".join(STUBS))
    command.add_argument("--out", type=Path, required=True, help="a new folder")
    command.set_defaults(run=make_stubs)
    command = commands.add_parser("bug", help="one silent bug, to be found")
    command.add_argument("name", type=bug, help="random, all, or the name of one in bugs.py")
    command.add_argument("--out", type=Path, required=True, help="a new folder; all: one for each")
    command.add_argument("--seed", type=int, help="of random: the same seed, the same bug")
    command.set_defaults(run=make_bugs)
    usage = "%(prog)s FOLDER [FOLDER ...] --tasks TASK [TASK ...] [--timeout SECONDS] [--csv]"
    command = commands.add_parser("mark", help="run this repository's tests", usage=usage)
    command.add_argument("folders", nargs="+", type=Path, help="each with a student's dmash.py")
    command.add_argument("--tasks", nargs="+", choices=TASKS, required=True, help="to be marked")
    command.add_argument("--timeout", type=float, default=60, help="seconds for a task (60)")
    command.add_argument("--csv", action="store_true", dest="as_csv", help="print a CSV table")
    command.set_defaults(run=print_marks)
    given = vars(parser.parse_args(argv))
    run = given.pop("run")
    try:
        return run(**given)
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")


if __name__ == "__main__":
    sys.exit(main())
