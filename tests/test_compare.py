"""Tests of studies/runs.py, compare.py and compare_figures.py."""

import csv
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "studies")]
import compare  # noqa: E402
import runs as reader  # noqa: E402

import aib_envs  # noqa: E402
import dmash  # noqa: E402

# ---- Statistics, against scipy -----------------------------------------------------------------

RNG = np.random.default_rng(0)
SAMPLES = [
    ([3.0, 1.0, 4.0, 1.0, 5.0], [9.0, 2.0, 6.0]),
    ([3.0, 3.0, 3.0, 2.0], [3.0, 3.0, 1.0, 1.0]),  # ties
    (RNG.normal(0, 1, 6), RNG.normal(1, 3, 9)),
    (RNG.normal(900, 5, 3), RNG.normal(850, 90, 4)),
    ([1e6 + 1, 1e6 + 2, 1e6 + 3], [1e6, 1e6 + 4, 1e6 + 2]),
]


@pytest.mark.parametrize("dof", [1, 1.7, 2, 4, 8.3, 30, 400])
@pytest.mark.parametrize("p", [0.6, 0.9, 0.975, 0.9995])
def test_quantiles_of_t(p, dof):
    assert compare.t_quantile(p, dof) == pytest.approx(stats.t.ppf(p, dof), rel=2e-5)


@pytest.mark.parametrize("x, y", SAMPLES)
def test_interval_of_a_difference_is_welchs(x, y):
    expected = stats.ttest_ind(x, y, equal_var=False).confidence_interval(0.95)
    point, *ends = compare.contrast([1, -1], [x, y])
    assert point == pytest.approx(np.mean(x) - np.mean(y))
    assert ends == pytest.approx(list(expected), rel=1e-5)


def test_interval_of_a_mean_is_students():
    x = SAMPLES[2][1]
    expected = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert compare.contrast([1], [x])[1:] == pytest.approx(list(expected), rel=1e-5)


def test_interval_of_a_mean_over_environments_covers_95_percent():
    """Known normal samples of unequal spread; by chance 95 % lies between 93.5 and 96.5 here."""
    rng = np.random.default_rng(1)
    spreads, sizes, weights = (1, 9, 3, 3), (5, 5, 3, 10), (0.5, -0.5, 0.5, -0.5)
    hits = 0
    for _ in range(1000):
        drawn = [rng.normal(7, spread, size) for spread, size in zip(spreads, sizes)]
        _, low, high = compare.contrast(weights, drawn)
        hits += low <= 0 <= high
    assert 935 <= hits <= 965


def test_few_or_equal_values_have_no_interval_or_none_of_width():
    assert compare.contrast([1], [[2.0, 4.0]])[0] == 3
    assert np.isnan(compare.contrast([1, -1], [[2.0, 4.0], [1.0] * 5])[1:]).all()
    assert compare.contrast([1, -1], [[2.0] * 3, [1.0] * 3]) == (1, 1, 1)


@pytest.mark.parametrize("x, y", SAMPLES)
def test_p_is_that_of_all_splits(x, y):
    def difference(a, b, axis):
        return abs(np.mean(a, axis=axis) - np.mean(b, axis=axis))

    options = {"vectorized": True, "n_resamples": np.inf, "alternative": "greater"}
    expected = stats.permutation_test((x, y), difference, **options)
    assert compare.permutation_p(x, y) == pytest.approx(expected.pvalue, abs=1e-12)
    assert compare.permutation_p(y, x) == pytest.approx(expected.pvalue, abs=1e-12)


def test_holm_by_hand():
    assert compare.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert compare.holm([0.5, 0.9]) == [1, 1] and compare.holm([]) == []


@pytest.mark.parametrize("x, y", SAMPLES)
def test_probability_of_improvement_is_mann_whitneys(x, y):
    expected = stats.mannwhitneyu(x, y).statistic / (len(x) * len(y))
    assert compare.probability_of_improvement(np.array(x), np.array(y)) == pytest.approx(expected)


def test_memory_does_not_grow_with_the_square_of_the_seeds():
    x, y = RNG.normal(size=4000), RNG.normal(size=4000)
    tracemalloc.start()
    assert 0 < compare.probability_of_improvement(x, y) < 1
    assert math.isnan(compare.permutation_p(x, y))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6  # 4,000² numbers are 128 MB


# ---- plan --------------------------------------------------------------------------------------


def said_by(arguments, capsys, status=0):
    """What compare.py prints; in one line if it refuses."""
    assert compare.main([str(word) for word in arguments]) == status
    said = capsys.readouterr()
    if status:
        assert said.err.count("\n") == 1 and said.err.startswith("compare.py: error: "), said
        return said.err
    return said.out


def planned(text, capsys):
    """The words behind `python dmash.py` of each line."""
    lines = [
        shlex.split(line) for line in said_by(["plan", *shlex.split(text)], capsys).splitlines()
    ]
    assert all(words[:2] == ["python", "dmash.py"] and words[-1] == "--go-on" for words in lines)
    return [words[2:-1] for words in lines]


def test_plan_has_a_line_for_each_run_seeds_outermost(capsys):
    lines = planned("--envs di_inv ode --methods dr concat --seeds 11-12 7 12", capsys)
    expected = []
    for seed in ("11", "12", "7"):
        for env in ("di_inv", "ode"):
            for method in ("dr", "concat"):
                words = ["--env", env, "--method", method, "--seed", seed, "--threads", "1"]
                expected.append(words)
    assert lines == expected


def test_plan_passes_settings_on_and_takes_the_threads_given(capsys):
    text = "--quick --steps 1e4 --threads 2 --out 'my \"runs\" $HOME' --alpha-lr .002"
    (words,) = planned(f"--envs cartpole_inv --methods dma_star_sh --seeds 3 {text}", capsys)
    assert words == [
        "--env",
        "cartpole_inv",
        "--method",
        "dma_star_sh",
        "--seed",
        "3",
        *shlex.split(text),
    ]


def test_plan_is_worked_through_by_xargs_and_line_by_line(tmp_path, capsys):
    """As the docstring of compare.py says, with a `python` that only tells what it was given."""
    fake, plan = tmp_path / "python", "plan --envs di_inv --methods dr --seeds 1-2".split()
    fake.write_text('#!/bin/sh\nline=$(printf "<%s>" "$@")\necho "$line"\n')  # in one piece
    fake.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "2"}

    def told(pipe, *given):
        lines = said_by([*plan, *given], capsys)
        (tmp_path / "plan.txt").write_text(lines)
        shell = dict(shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
        return sorted(subprocess.run(pipe, input=lines, **shell).stdout.splitlines())

    lines = [f"<dmash.py><--env><di_inv><--method><dr><--seed><{seed}>" for seed in (1, 2)]
    plain = [f"{line}<--quick><--threads><1><--go-on>" for line in lines]
    assert told("xargs -P 2 -I{} sh -c '{}'", "--quick") == plain
    odd = [f"{line}<--out><a b's $HOME><--threads><1><--go-on>" for line in lines]
    given = ("--out", "a b's $HOME")
    assert told("tr '\\n' '\\0' | xargs -0 -P 2 -I{} sh -c '{}'", *given) == odd
    assert told('sed -n "${SLURM_ARRAY_TASK_ID}p" plan.txt | sh', *given) == odd[1:]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--envs cartpole --methods dr --seeds 1", "unknown environment 'cartpole'"),
        ("--envs ode --methods drr --seeds 1", "unknown method 'drr'"),
        ("--envs ode --methods dr --seeds 15-11", "--seeds 15-11: must be"),
        ("--envs ode --methods dr --seeds 1,2", "--seeds 1,2: must be seeds"),
        ("--envs ode --methods dr --seeds 1-4000000000", "--seeds 1-4000000000: must be"),
        ("--envs ode --methods dr --seeds 4294967296", "--seed 4294967296: must be"),
        ("--envs ode --methods dr --seeds 1 --steps many", "--steps"),
        ("--envs ode --methods dr concat --seeds 1 --mask .3", "dr has no encoder"),
        ("--envs ode --methods dr --seeds 1 --stepss 3", "unrecognized arguments: --stepss 3"),
        ("--envs ode --methods dr --seeds 1 --seed 3", "--seed: not here; allowed:"),
        ("--envs ode --methods dr --seeds 1 --resume x", "--resume: not here; allowed:"),
        ("--envs ode --methods dr --seeds 1 --out 'a\nb'", "must be one line"),
        ("--envs ode --seeds 1", "the following arguments are required: --methods"),
    ],
)
def test_bad_plan_is_one_line(arguments, message, capsys):
    assert message in said_by(["plan", *shlex.split(arguments)], capsys, status=2)


def test_plan_stops_quietly_when_nobody_reads(tmp_path):
    words = "plan --envs ode di_inv di_perm --methods dr --seeds 1-1000".split()
    command = shlex.join([sys.executable, str(ROOT / "studies/compare.py"), *words])
    done = subprocess.run(f"{command} | head -n 1", shell=True, cwd=tmp_path, capture_output=True)
    assert done.stdout.count(b"\n") == 1 and done.stderr == b"" and not list(tmp_path.iterdir())


# ---- Runs for the tests ------------------------------------------------------------------------


def make_run(root, env, method, seed, level, steps=10, done=None, folder=None, n=4, **config):
    """A run folder as dmash.py writes it: returns of `level`, and 3 less on eval_out."""
    cfg = dmash.quick(env=env, method=method, seed=seed, steps=steps, contexts=n, threads=1)
    folder = Path(root) / (folder or f"{env}__{method}__quick__s{seed}")
    folder.mkdir(parents=True)
    metrics, contexts = [], []
    for step in range(5, (steps if done is None else done) + 1, 5):
        row = {
            "step": step,
            "env_steps": 7_654_300 + step,
            "seconds": 2.0 * step,
            "dynamics_loss": math.nan,
        }
        for name, values in aib_envs.context_sets(env, n).items():
            row[name] = level * step / steps - 3 * (name == "eval_out")
            for i, c in enumerate(values):
                ids = {"step": step, "set": name, "index": i}
                contexts.append({**ids, **c, "return": row[name] + i - (n - 1) / 2, "diverged": 1})
        metrics.append(row)
    versions = dict(version="v1", torch="2.0", numpy="2.0", mujoco="3.0", gymnasium="1.0")
    (folder / "config.json").write_text(json.dumps(asdict(cfg) | versions | config))
    for name, rows in (("metrics.csv", metrics), ("per_context.csv", contexts)):
        if rows:
            (folder / name).write_text(dmash.csv_text(rows))
    return folder


def rows_of(text):
    """The rows of a table, its head first."""
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line[:1] == "|"]
    return [lines[0], *lines[2:]]


@pytest.fixture(scope="module")
def five_seeds(tmp_path_factory):
    """dma_star_sh has 50 to 90, concat 40 less, da 5 less, dr half of it without the last seeds."""
    root = tmp_path_factory.mktemp("runs")
    for env in ("di_inv", "di_friction", "ode"):
        for i, level in enumerate((90, 50, 80, 70, 60)):
            make_run(root, env, "dma_star_sh", 11 + i, level, n=20)
            make_run(root, env, "concat", 11 + i, level - 40, n=20)
            make_run(root, env, "da", 11 + i, level - 5, n=20)
            if i < 4:
                make_run(root, env, "dr", 11 + i, level / 2, done=10 if i < 3 else 5, n=20)
    return root


def tables_of(places, **options):
    runs = reader.read_runs([str(place) for place in places], **options)
    return {name: rows_of(make(runs)) for name, make in compare.MAKERS.items()}


# ---- Tables ------------------------------------------------------------------------------------


def test_returns_by_method_and_environment(five_seeds):
    tables = tables_of([five_seeds])
    head, nothing, largest, *rows = tables["table 1"]
    assert head == ["method", "di_inv, 10 steps", "di_friction, 10 steps", "ode, 10 steps"]
    assert nothing[0] == "no action" and nothing[1:3] == ["0.0", "0.0"] and float(nothing[3]) > 30
    assert largest[1:] == ["100", "100", "200"]
    assert [row[0] for row in rows] == ["DMA*-SH", "Concat", "DA", "DR"]
    ends = stats.ttest_1samp(np.array([90, 50, 80, 70, 60]) - 1, 0).confidence_interval()
    assert rows[0][1] == f"69.0 [{ends.low:.1f}, {ends.high:.1f}] (5)"
    assert rows[3][1].startswith("35.7 [") and rows[3][1].endswith(" (3)")  # unfinished ones aside
    assert tables["table 2"][3][1].startswith("67.0 [")


def test_differences_have_interval_p_and_speed(five_seeds):
    _, *rows = tables_of([five_seeds])["table 3"]
    cells = {(row[0].split(",")[0], row[1]): row[2:] for row in rows}
    assert len(cells) == len(rows) == 12
    assert cells["di_inv", "DMA*-SH"] == ["5, 5", "", "", "", "", "0.5"]  # 10 steps in 20 seconds
    x = np.array([90.0, 50, 80, 70, 60])
    ends = stats.ttest_ind(x, x - 40, equal_var=False).confidence_interval()
    expected = f"+40.0 [+{ends.low:.1f}, +{ends.high:.1f}]"
    assert cells["di_inv", "Concat"] == ["5, 5", expected, "0.016", expected, "0.016", "0.5"]
    assert cells["di_inv", "DR"][:2] == ["5, 3", cells["di_inv", "DR"][1]]


def test_verdicts_need_five_seeds_and_holm(five_seeds, tmp_path):
    tables = tables_of([five_seeds])
    _, *rows = tables["claims"]
    assert len(rows) == 9 and len(tables["claims, extrapolation"]) == 10
    verdicts = {(row[0].split()[-1], row[1].split(",")[0]): row[2:] for row in rows}
    kinds = {"randomisation": "dr", "concatenated": "concat", "context": "da"}
    for (last, _), (setting, seeds, _, p, corrected, words) in verdicts.items():
        assert setting == "`--quick`"
        if kinds[last] == "dr":
            assert (seeds, corrected, words) == ("5, 3", "–", "too few seeds")
        if kinds[last] == "concat":  # p = 4 / 252, one of six tested claims, three of them equal
            assert (p, corrected, words) == ("0.016", "0.095", "inconclusive")
        if kinds[last] == "da":
            assert words == "inconclusive"
    for seed in range(16, 20):  # one environment, nine seeds
        make_run(tmp_path, "di_inv", "dma_star_sh", seed, 70)
        make_run(tmp_path, "di_inv", "concat", seed, 71)
    for seed in range(11, 20):
        make_run(tmp_path, "di_perm", "dma_star_sh", seed, 70 + seed)
        make_run(tmp_path, "di_perm", "dma_star", seed, 90 + seed)
    _, *rows = tables_of([five_seeds, tmp_path])["claims"]
    words = {(row[1], row[0]): row[-1] for row in rows}
    assert words["di_perm, 10 steps", "It beats the inferred code, concatenated"] == "against it"
    for seed in range(11, 20):
        make_run(tmp_path, "di_perm", "dr", seed, 10 + seed)
    _, *rows = tables_of([tmp_path])["claims"]
    assert [row[-1] for row in rows] == ["consistent with the paper", "too few seeds", "against it"]


def test_more_seeds_than_all_splits_can_be_tried_for(tmp_path):
    for seed in range(14):
        make_run(tmp_path, "di_inv", "dma_star_sh", seed, 60 + seed)
        make_run(tmp_path, "di_inv", "dr", seed, 20 + seed)
    (_, row) = tables_of([tmp_path])["claims"]
    assert row[5:] == ["–", "–", "too many seeds for an exact p"]


def test_aggregates_weigh_environments_alike(five_seeds):
    _, *rows = tables_of([five_seeds])["aggregates"]
    cells = {(row[0], row[1], row[2]): row[3:] for row in rows}
    nothing = compare.no_action("ode", "mean")
    without = {"di_inv": 0.4, "di_friction": 0.4, "ode": 40 / (200 - nothing)}
    expected = sum(without.values()) / 3
    cell = cells["Concat", "mean of the sets", "3"]
    assert cell[0].startswith(f"+{expected:.3f} [+")
    assert cell[1] == f"+{(expected * 3 - 0.4) / 2:.3f} without di_inv"
    assert cell[2] == "+0.400 without ode"
    assert cell[3] == "0.98"  # of 25 pairs 24 are above, 1 is equal
    assert len(cells) == 6  # three methods, two scores


def test_published_score_is_the_larger_of_the_last_two_in_each_set(tmp_path):
    for seed in (1, 2, 3):
        folder = make_run(tmp_path, "cartpole_inv", "dma_star_sh", seed, 900)
        text = (folder / "metrics.csv").read_text().splitlines()
        head = text[0].split(",")
        cells = text[-2].split(",")
        cells[head.index("train")] = "990"  # the one before the last
        (folder / "metrics.csv").write_text("\n".join([text[0], ",".join(cells), text[-1], ""]))
    _, row = tables_of([tmp_path])["published scores"]
    assert row[1:] == ["DMA*-SH", "3", "899 [899, 899]", "929 [929, 929]", "967"]


def test_departures_are_set_beside_the_same_method_without(tmp_path):
    for seed in range(1, 6):
        for method, level in (("dma_star_sh", 80), ("concat", 60)):
            make_run(tmp_path, "di_inv", method, seed, level)
            published = dict(departures="published", folder=f"{method}{seed}")
            make_run(
                tmp_path, "di_inv", method, seed, level - 20 * (method == "concat"), **published
            )
    tables = tables_of([tmp_path])
    assert [row[0] for row in tables["table 1"][3:]] == [
        "DMA*-SH",
        "Concat",
        "DMA*-SH, published",
        "Concat, published",
    ]
    assert [row[1:4] for row in tables["departures"][1:]] == [
        ["DMA*-SH, published", "5, 5", "+0.0 [+0.0, +0.0]"],
        ["Concat, published", "5, 5", "−20.0 [−20.0, −20.0]"],
    ]
    gains = {row[1]: row[3] for row in tables["table 3"][1:]}
    assert len(gains) == len(tables["table 3"]) - 1 == 4  # none across departures
    assert gains["Concat"].startswith("+20.0") and gains["Concat, published"].startswith("+40.0")
    settings = [row[2] for row in tables["claims"][1:]]
    assert settings == ["`--quick`", "`--quick`, published"]


def test_only_equal_settings_are_compared(tmp_path):
    make_run(tmp_path, "di_inv", "dma_star_sh", 1, 80)
    make_run(tmp_path, "di_inv", "dr", 1, 40)
    make_run(tmp_path, "di_inv", "dr", 2, 40, buffer=98765, threads=7, out="there", snapshots=True)
    make_run(tmp_path, "di_inv", "dr", 3, 99, folder="a", alpha=0.07)
    make_run(tmp_path, "di_inv", "dr", 4, 98, folder="b", steps=15)
    make_run(tmp_path, "di_inv", "dr", 5, 97, folder="c", nested=[1, {"a": "x|y"}])
    make_run(tmp_path, "di_inv", "dma_star_sh", 6, 96, folder="d", mask=0.1)
    make_run(tmp_path, "di_inv", "dr", 7, 95, folder="e", quick=False)
    head, _, _, ours, masked, dr = tables_of([tmp_path])["table 1"]
    assert (ours[0], masked[0], dr[0]) == ("DMA*-SH", "DMA*-SH, mask 0.1", "DR")
    cells = dict(zip(head, dr))
    (main,) = [title for title, text in cells.items() if text == "39.0 (2)"]
    assert dict(zip(head, ours))[main] == "79.0 (1)" and dict(zip(head, masked))[main] == "95.0 (1)"
    assert sorted(cells.values()) == [
        "39.0 (2)",
        "94.0 (1)",
        "96.0 (1)",
        "97.0 (1)",
        "98.0 (1)",
        "DR",
    ]
    (nested,) = [title for title, text in cells.items() if text == "96.0 (1)"]
    assert 'nested [1, {"a": "x\\' in nested  # its | is escaped, and cut by rows_of
    assert "paper's settings" in next(title for title, text in cells.items() if text == "94.0 (1)")


def test_settings_that_mean_the_same_are_equal():
    for same in (
        (1e-3, 0.001),
        (1, 1.0, "1"),
        (False, None, ""),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    ):
        assert len({reader.as_text(value) for value in same}) == 1
    for other in ((1, True), (0, False), (0.1, 0.10001)):
        assert reader.as_text(other[0]) != reader.as_text(other[1])


def test_a_replay_that_forgets_is_another_setting(tmp_path):
    for seed, buffer in ((1, 20_020), (2, 10_020), (3, 9_000)):  # 5,000 random steps and 10 steps
        make_run(tmp_path, "di_inv", "dr", seed, 40, buffer=buffer)
    assert len({run.compared for run in reader.read_runs([tmp_path])}) == 2


# ---- add, and reports of tables and folders ------------------------------------------------------


def test_tables_and_folders_give_the_same_report_byte_for_byte(five_seeds, tmp_path, capsys):
    tables = tmp_path / "tables"
    parts = [five_seeds / "di_inv__dr__quick__s11", five_seeds / "ode__dr__quick__s11"]
    said_by(["add", *parts, "--experiment", "first", "--to", tables], capsys)
    rest = [folder for folder in sorted(five_seeds.iterdir()) if folder not in parts]
    first = shutil.copytree(tables, tmp_path / "first")
    said = said_by(["add", *rest, "--experiment", "more", "--to", tables], capsys)
    assert said.count("not finished, left out") == 3 and "52 runs more, 54 in all" in said
    finished = [
        folder for folder in five_seeds.iterdir() if not folder.name.endswith("dr__quick__s14")
    ]
    some = [first, *(folder for folder in finished if folder not in parts)]
    texts = set()
    for places in (finished, sorted(finished, reverse=True), [tables], some):
        texts.add(compare.report_text(reader.read_runs(places)))
    assert len(texts) == 1
    runs = list(csv.DictReader((tables / "runs.csv").open()))
    assert len(runs) == 54 and runs[0]["experiment"] == "first" and runs[0]["seed"] == "11"
    assert {run["alpha_lr"] for run in runs} == {"0.002"} and "out" not in runs[0]
    assert {run["torch"] for run in runs} == {"2.0"}
    metrics = list(csv.DictReader((tables / "metrics.csv").open()))
    assert {row["env_steps"] for row in metrics} == {"7654305", "7654310"}  # all digits

    before = [(tables / name).read_bytes() for name in reader.TABLES]
    again = reader.read_tables(tables)
    reader.write_tables(tables, again[::-1])
    assert [(tables / name).read_bytes() for name in reader.TABLES] == before
    assert before[2][4:8] == bytes(4)  # gzip: no time of day


def test_add_refuses_the_same_run_twice_and_takes_unfinished_ones_if_told(
    five_seeds, tmp_path, capsys
):
    run, half = five_seeds / "ode__dr__quick__s11", five_seeds / "ode__dr__quick__s14"
    to = ["--to", tmp_path]
    said_by(["add", run, half, "--experiment", "a", "--unfinished", *to], capsys)
    assert [run.finished for run in reader.read_tables(tmp_path)] == [True, False]
    assert "the same run as a/ode__dr" in said_by(["add", run, "--experiment", "b", *to], capsys, 2)
    assert "given twice" in said_by(["add", run, run / ".", "--experiment", "b", *to], capsys, 2)
    assert "the same run as" in said_by(["report", run, tmp_path], capsys, 2)
    assert "--experiment A b: allowed:" in said_by(
        ["add", run, "--experiment", "A b", *to], capsys, 2
    )
    assert "no experiment 'c'; known: a" in said_by(
        ["report", tmp_path, "--experiments", "c"], capsys, 2
    )


def test_reports_go_between_marks_and_a_check_fails_when_they_drift(five_seeds, tmp_path, capsys):
    said_by(["add", five_seeds, "--experiment", "quick", "--to", tmp_path], capsys)
    document = tmp_path / "README.md"
    text = "<!-- table 1 of quick -->\n<!-- end -->\nwords\n<!-- claims -->\nold\n<!-- end -->\n"
    document.write_text(text)
    check = ["report", tmp_path, "--into", document, "--check"]
    assert "not those of the runs" in said_by(check, capsys, status=2)
    assert document.read_text() == text
    said_by(check[:-1], capsys)
    new = document.read_text()
    runs = reader.read_runs([tmp_path])
    assert compare.MAKERS["table 1"](runs) in new and compare.MAKERS["claims"](runs) in new
    assert "\nold\n" not in new and "\nwords\n" in new
    said_by(check, capsys)
    document.write_text(new.replace("69.0", "69.1", 1))
    said_by(check, capsys, status=2)
    for wrong in (new.replace("claims", "claim"), "no marks", new.replace("of quick", "of slow")):
        document.write_text(wrong)
        said_by(check[:-1], capsys, status=2)
        assert document.read_text() == wrong


def test_the_tables_of_results_are_those_of_their_document(capsys):
    for document in (ROOT / "results").glob("*.md"):
        if "<!-- end -->" in document.read_text():
            said_by(["report", ROOT / "results", "--into", document, "--check"], capsys)


def test_report_refuses_in_one_line(five_seeds, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for arguments, message in (
        ([tmp_path / "nowhere"], "nowhere: no run there; allowed:"),
        ([five_seeds, tmp_path / "empty"], "empty: no run there"),
        ([], "required: RUNS"),
        ([five_seeds, "--outt", "x"], "unrecognized arguments: --outt"),
        ([five_seeds, "--check"], "--check: only with --into"),
        ([five_seeds, "--out", tmp_path / "file"], "file: File exists"),
        ([five_seeds, "--into", tmp_path / "no.md"], "no.md: No such file"),
    ):
        assert message in said_by(["report", *arguments], capsys, status=2)


def test_names_that_would_break_a_table_or_are_no_text(five_seeds, tmp_path, capsys):
    odd = os.fsdecode(b"\xff|\n")
    folder = make_run(tmp_path, "di_inv", "dr", 1, 50, folder=odd, version="a|b\n\x1b[31m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"method": "one|of\nmine"}))
    said_by(["report", tmp_path, "--out", tmp_path / "out"], capsys)
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| one")]
    assert rows[0].startswith("| one\\|of mine | 49.0 (1) |") and "\x1b" not in text
    said_by(["add", tmp_path, "--experiment", "odd", "--to", tmp_path / "tables"], capsys)
    (run,) = reader.read_tables(tmp_path / "tables")
    assert run.name == "odd/\\xff|\n" and run.method == "one|of\nmine"


# ---- What the reader refuses -------------------------------------------------------------------


def spoil(name, change=None):
    def spoiled(folder):
        path = folder / name
        if change is None:
            path.unlink()
        else:
            path.write_text(change(path.read_text()))

    return spoiled


def without_line(number):
    def change(text):
        lines = text.splitlines(keepends=True)
        del lines[number]
        return "".join(lines)

    return change


def swapped(first, second):
    def change(text):
        lines = text.splitlines(keepends=True)
        lines[first], lines[second] = lines[second], lines[first]
        return "".join(lines)

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (spoil("config.json", lambda text: text[:50]), "config.json: "),
        (spoil("config.json", lambda text: "[]"), "config.json: "),
        (spoil("config.json", lambda text: "[" * 100_000), "config.json: "),
        (
            spoil("config.json", lambda text: text.replace('"seed": 2', '"seed": "2"')),
            "seed is '2'",
        ),
        (
            spoil("config.json", lambda text: text.replace('"steps": 10', '"steps": true')),
            "steps is",
        ),
        (
            spoil("metrics.csv", lambda text: text[:-9]),
            "metrics.csv, line 1: the last line is torn",
        ),
        (spoil("metrics.csv", lambda text: text[:-9] + "\n"), "metrics.csv, line 3: "),
        (spoil("metrics.csv", lambda text: text + "11,1\n"), "line 4: 2 cells under 7 columns"),
        (
            spoil("metrics.csv", lambda text: text + text.splitlines()[-1] + "\n"),
            "step 10 stands twice",
        ),
        (spoil("metrics.csv", swapped(1, 2)), "line 3: step 5 stands after step 10"),
        (spoil("metrics.csv", lambda text: text.replace("eval_in", "eval")), "no column eval_in"),
        (spoil("metrics.csv", lambda text: text.replace("eval_in", "train")), "no column eval_in"),
        (
            spoil("metrics.csv", lambda text: text.replace(",50", ",inf")),
            "train is no finite number",
        ),
        (spoil("metrics.csv", lambda text: text.replace(",50", ",")), "train is no finite number"),
        (spoil("metrics.csv", lambda text: text.replace(",50", ",good")), "could not convert"),
        (spoil("metrics.csv", lambda text: ""), "metrics.csv, line 1: "),
        (spoil("metrics.csv", lambda text: text + "\0\n"), "metrics.csv, line "),
        (
            lambda folder: (folder / "metrics.csv").write_bytes(b"step\n\xff\n"),
            "metrics.csv, line 1: ",
        ),
        (spoil("per_context.csv"), "per_context.csv: No such file or directory"),
        (spoil("per_context.csv", without_line(-1)), "a context of eval_out is missing"),
        (spoil("per_context.csv", without_line(-3)), "a context of eval_out is missing"),
        (spoil("per_context.csv", without_line(14)), "a context of train is missing"),
        (spoil("per_context.csv", swapped(-1, -2)), "stands after"),
        (
            spoil("per_context.csv", lambda text: text + text.splitlines()[-1] + "\n"),
            "stands twice",
        ),
        (spoil("per_context.csv", lambda text: text.replace(",set,", ",sets,")), "no column set"),
        (spoil("per_context.csv", lambda text: text.replace("eval_out", "far")), "not all of"),
        (spoil("per_context.csv", lambda text: text.replace(",51.5,", ",57.5,")), "the mean of"),
        (lambda folder: shutil.copytree(folder, folder.parent / "copy"), "the same run as"),
    ],
)
def test_a_run_that_cannot_be_read_is_named(change, message, tmp_path, capsys):
    root = tmp_path / "runs"
    make_run(root, "di_inv", "dr", 1, 60)
    change(make_run(root, "di_inv", "dr", 2, 50))
    said = said_by(["report", root, "--out", tmp_path / "out"], capsys, status=2)
    assert message in said and "di_inv__dr__quick__s2" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "table, change, message",
    [
        ("runs.csv", lambda text: text + text.splitlines()[-1] + "\n", "runs.csv, line 4: "),
        ("metrics.csv", lambda text: text + text.splitlines()[-1] + "\n", "metrics.csv, line 6: "),
        ("metrics.csv", without_line(-1), "contexts, but no evaluation at step 10"),
        (
            "metrics.csv",
            lambda text: text.replace("e/di_inv__dr__quick__s2", "e/else"),
            "no run 'e/else'",
        ),
    ],
)
def test_tables_that_cannot_be_read_are_named(table, change, message, tmp_path, capsys):
    for seed in (1, 2):
        make_run(tmp_path / "runs", "di_inv", "dr", seed, 50)
    said_by(["add", tmp_path / "runs", "--experiment", "e", "--to", tmp_path], capsys)
    spoil(table, change)(tmp_path)
    assert message in said_by(["report", tmp_path, "--out", tmp_path / "out"], capsys, status=2)


def test_rows_of_earlier_evaluations_and_columns_of_ones_own_do_no_harm(tmp_path):
    folder = make_run(tmp_path, "di_inv", "dr", 1, 50)
    text = (folder / "per_context.csv").read_text()
    (folder / "per_context.csv").write_text(text.replace("mass", "colour of the car"))
    run = reader.read_run(folder)
    assert run.finished and len(run.contexts) == 12 and "colour of the car" in run.contexts[0]
    assert reader.read_run(make_run(tmp_path, "di_inv", "dr", 2, 50, done=0)).metrics == []


# ---- Figures -----------------------------------------------------------------------------------


@pytest.fixture
def figures():
    pytest.importorskip("matplotlib")
    import compare_figures

    return compare_figures


def test_figures_show_every_seed_and_no_action(figures, five_seeds):
    runs = reader.read_runs([five_seeds])
    drawn = dict(figures.all_of(compare.blocks_of(runs), compare.returns_without_action))
    assert list(drawn) == ["di_inv", "di_friction", "ode"]
    for name, figure in drawn.items():
        learning = figure.axes[0]
        lines = {line.get_label(): line for line in learning.lines}
        assert set(lines) >= {"DMA*-SH", "Concat", "DA", "DR", "no action"}
        level = compare.no_action(name, "mean")
        assert lines["no action"].get_linestyle() == "--"
        assert set(np.round(lines["no action"].get_ydata(), 6)) == {round(level, 6)}
        assert list(lines["DMA*-SH"].get_ydata()) == pytest.approx([34, 69])  # 35 and 70, less 1
        points = [line for line in learning.lines if line.get_linestyle() == "None"]
        assert len(points[0].get_xdata()) == 10  # five seeds, two evaluations
        for ax in figure.axes[1:]:
            assert [text.get_text() for text in ax.texts] == ["trained"] and len(ax.patches) == 1
    titles = [(ax.get_title(), ax.get_xlabel()) for ax in drawn["di_inv"].axes[1:]]
    assert titles == [("not inverted", "mass"), ("inverted", "mass")]
    titles = [ax.get_xlabel() for ax in drawn["di_friction"].axes[1:]]
    assert titles == ["mass", "friction"] and drawn["ode"].axes[1].get_xlabel().startswith(
        "distance"
    )
    inverted = drawn["di_inv"].axes[2]
    shade = inverted.patches[0].get_extents().transformed(inverted.transData.inverted()).intervalx
    masses = [row["mass"] for row in runs[0].contexts if row["set"] == "train"]
    assert tuple(shade) == pytest.approx((min(masses), max(masses)))


def test_points_are_the_returns_of_each_context(figures, tmp_path):
    make_run(tmp_path, "cartpole_inv", "dma_star_sh", 1, 2000, n=20)
    runs = reader.read_runs([tmp_path])
    drawn = dict(figures.all_of(compare.blocks_of(runs), compare.returns_without_action))
    assert list(drawn) == ["cartpole_inv", "pole_length"]
    nothing = compare.returns_without_action("cartpole_inv").values()
    expected = {(row["length"], row["return"]) for row in runs[0].contexts}
    found = set()
    for ax in drawn["pole_length"].axes:
        (points,) = [line for line in ax.lines if line.get_linestyle() == "None"]
        found |= set(zip(points.get_xdata(), points.get_ydata()))
        (idle,) = [line for line in ax.lines if line.get_label() == "no action"]
        assert min(nothing) <= min(idle.get_ydata()) and max(idle.get_ydata()) <= max(nothing)
    assert found == expected and len(found) >= 59  # a length of eval_in may be one of train


def test_at_most_five_methods_a_panel_and_no_hue_twice(figures, tmp_path):
    for method in dmash.METHODS:
        make_run(tmp_path, "di_inv", method, 1, 50)
    runs = reader.read_runs([tmp_path])
    ((_, figure),) = figures.all_of(compare.blocks_of(runs), compare.returns_without_action)
    rows = [ax for ax in figure.axes if ax.get_ylabel()]
    assert len(rows) == 1 + len(dmash.METHODS) - 5
    for ax in figure.axes:
        lines = [line for line in ax.lines if line.get_label()[0] != "_"]
        methods = [line for line in lines if line.get_label() != "no action"]
        assert 2 <= len(methods) <= 5
        for kind in ("get_color", "get_marker"):
            assert len({getattr(line, kind)() for line in methods}) == len(methods)
    names = [ax.get_title() for ax in rows[1:]]
    assert names[:3] == ["DMA*-H", "DMA", "DMA-Pearl"]
    styles = [figures.LOOKS[name] for name in figures.LOOKS]
    assert len({str(look[2]) for look in styles}) == len(
        styles
    )  # the line alone tells them in grey


def test_without_matplotlib_the_report_is_written(five_seeds, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "compare_figures", None)
    said = said_by(["report", five_seeds, "--out", tmp_path], capsys)
    assert "no figures are drawn" in said and (tmp_path / "report.md").exists()
