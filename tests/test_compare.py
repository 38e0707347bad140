"""Tests of studies/runs.py, compare.py and compare_figures.py."""

import csv
import json
import os
import shlex
import shutil
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
import compare_figures  # noqa: E402
import runs as reader  # noqa: E402

import aib_envs  # noqa: E402
import dmash  # noqa: E402

# ---- Statistics, against scipy -----------------------------------------------------------------

RNG = np.random.default_rng(0)
SAMPLES = [
    ([3.0, 1.0, 4.0, 1.0, 5.0], [9.0, 2.0, 6.0]),
    ([3.0, 3.0, 3.0, 2.0], [3.0, 3.0, 1.0, 1.0]),  # ties
    (RNG.normal(0, 1, 6), RNG.normal(1, 3, 9)),
    ([1e6 + 1, 1e6 + 2, 1e6 + 3], [1e6, 1e6 + 4, 1e6 + 2]),
]
of_samples = pytest.mark.parametrize("x, y", SAMPLES)


def test_quantiles_of_t():
    for dof in (1, 1.7, 4, 30, 400):
        for p in (0.6, 0.975, 0.9995):
            expected = stats.t.ppf(p, dof)
            assert compare.t_quantile(p, dof) == pytest.approx(expected, rel=2e-5)


@of_samples
def test_intervals_are_welchs_and_students(x, y):
    point, *ends = compare.contrast([1, -1], [x, y])
    expected = stats.ttest_ind(x, y, equal_var=False).confidence_interval()
    assert point == pytest.approx(np.mean(x) - np.mean(y))
    assert ends == pytest.approx(list(expected), rel=1e-5)
    _, *ends = compare.contrast([1], [x])
    expected = stats.ttest_1samp(x, 0).confidence_interval()
    assert ends == pytest.approx(list(expected), rel=1e-5)


def test_interval_of_a_mean_over_environments_covers_95_percent():
    """Known normal samples of unequal spread; by chance 95 % lies between 93.5 and 96.5 here."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(1000):
        samples = [rng.normal(7, *of) for of in ((1, 5), (9, 5), (3, 3), (3, 10))]
        _, low, high = compare.contrast((0.5, -0.5, 0.5, -0.5), samples)
        hits += low <= 0 <= high
    assert 935 <= hits <= 965


def test_few_or_equal_values_have_no_interval_or_none_of_width():
    point, *ends = compare.contrast([1], [[2.0, 4.0]])
    assert point == 3
    assert np.isnan(ends).all()
    assert compare.contrast([1, -1], [[2.0] * 3, [1.0] * 3]) == (1, 1, 1)


@of_samples
def test_p_is_that_of_all_splits(x, y):
    def distance(a, b, axis):
        return abs(np.mean(a, axis=axis) - np.mean(b, axis=axis))

    options = dict(vectorized=True, n_resamples=np.inf, alternative="greater")
    expected = stats.permutation_test((x, y), distance, **options).pvalue
    assert compare.permutation_p(x, y) == pytest.approx(expected, abs=1e-12)
    assert compare.permutation_p(y, x) == pytest.approx(expected, abs=1e-12)


def test_holm_by_hand():
    corrected = compare.holm([0.01, 0.04, 0.03, 0.005])
    assert corrected == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert compare.holm([0.5, 0.9]) == [1, 1]
    assert compare.holm([]) == []


@of_samples
def test_probability_of_improvement_is_mann_whitneys(x, y):
    expected = stats.mannwhitneyu(x, y).statistic / (len(x) * len(y))
    assert compare.probability_of_improvement(x, np.array(y)) == pytest.approx(expected)


def test_memory_does_not_grow_with_the_square_of_the_seeds():
    x, y = RNG.normal(size=(2, 4000))
    tracemalloc.start()
    compare.probability_of_improvement(x, y)
    assert np.isnan(compare.permutation_p(x, y))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6  # 4,000² numbers are 128 MB


# ---- plan --------------------------------------------------------------------------------------


def said_by(arguments, capsys, status=0):
    """What compare.py prints; one line if it refuses."""
    assert compare.main([str(word) for word in arguments]) == status
    said = capsys.readouterr()
    if status:
        assert said.err.count("\n") == 1 and said.err.startswith("compare.py: error: "), said
    return said.out + said.err


def test_plan_has_a_line_for_each_run_seeds_outermost(capsys):
    words = "plan --envs di_inv ode --methods dr concat --seeds 11-12 7 --out".split()
    lines = said_by([*words, "a b's $HOME"], capsys).splitlines()
    expected = []
    for seed in (11, 12, 7):
        for env in ("di_inv", "ode"):
            for method in ("dr", "concat"):
                run = f"python dmash.py --env {env} --method {method} --seed {seed} --out"
                expected.append([*run.split(), "a b's $HOME", "--threads", "1", "--go-on"])
    assert [shlex.split(line) for line in lines] == expected
    words = "plan --envs ode --methods dr --seeds 1 --threads 2".split()
    assert said_by(words, capsys).endswith(" --seed 1 --threads 2 --go-on\n")


@pytest.mark.parametrize(
    "words, message",
    [
        ("--envs cartpole --methods dr --seeds 1", "unknown environment 'cartpole'"),
        ("--envs ode --methods dr --seeds 15-11", "--seeds 15-11: must be"),
        ("--envs ode --methods dr --seeds 1,2", "--seeds 1,2: must be seeds"),
        ("--envs ode --methods dr --seeds 1 --stepss 3", "unrecognized arguments: --stepss 3"),
        ("--envs ode --methods dr --seeds 1 --seed 3", "--seed: not here; allowed:"),
    ],
)
def test_bad_plan_is_one_line(words, message, capsys):
    assert message in said_by(["plan", *words.split()], capsys, status=2)


# ---- Runs for the tests ------------------------------------------------------------------------


def make_run(root, env, method, seed, level, done=10, folder=None, n=4, **config):
    """A run folder as dmash.py writes it: returns of `level`, and 3 less on eval_out."""
    cfg = dmash.quick(env=env, method=method, seed=seed, steps=10, contexts=n, threads=1)
    folder = Path(root) / (folder or f"{env}__{method}__quick__s{seed}")
    folder.mkdir(parents=True)
    versions = dict(version="v1", torch="2.0", numpy="2.0", mujoco="3.0", gymnasium="1.0")
    (folder / "config.json").write_text(json.dumps(asdict(cfg) | versions | config))
    metrics, contexts = [], []
    for step in range(5, done + 1, 5):
        row = {"step": step, "env_steps": 7_654_300 + step, "seconds": 2.0 * step}
        for name, values in aib_envs.context_sets(env, n).items():
            row[name] = level * step / 10
            if name == "eval_out":
                row[name] -= 3
            for i, context in enumerate(values):
                ids = {"step": step, "set": name, "index": i}
                contexts.append(ids | context | {"return": row[name] + i - (n - 1) / 2})
        metrics.append(row | {"dynamics_loss": np.nan})
    if metrics:
        (folder / "metrics.csv").write_text(dmash.csv_text(metrics))
        (folder / "per_context.csv").write_text(dmash.csv_text(contexts))
    return folder


def tables_of(*places):
    """The rows of each table, its head first."""
    runs = reader.read_runs(places)
    tables = {}
    for name, make in compare.MAKERS.items():
        lines = [line[2:-2].split(" | ") for line in make(runs).splitlines()]
        tables[name] = [lines[0], *lines[2:]]
    return tables


@pytest.fixture(scope="module")
def five_seeds(tmp_path_factory):
    """dma_star_sh has 50 to 90, concat 40 less, da 5 less, dr half of it without the last seeds."""
    root = tmp_path_factory.mktemp("runs")
    for env in ("di_inv", "di_friction", "ode"):
        for seed, level in enumerate((90, 50, 80, 70, 60), 11):
            make_run(root, env, "dma_star_sh", seed, level, n=20)
            make_run(root, env, "concat", seed, level - 40, n=20)
            make_run(root, env, "da", seed, level - 5, n=20)
            if seed < 15:
                make_run(root, env, "dr", seed, level / 2, done=5 if seed == 14 else 10, n=20)
    return root


# ---- Tables ------------------------------------------------------------------------------------


def test_returns_by_method_and_environment(five_seeds):
    tables = tables_of(five_seeds)
    head, nothing, largest, *rows = tables["table 1"]
    assert head == ["method", "di_inv, 10 steps", "di_friction, 10 steps", "ode, 10 steps"]
    assert nothing[:3] == ["no action", "0.0", "0.0"]
    assert float(nothing[3]) > 30
    assert largest[1:] == ["100", "100", "200"]
    assert [row[0] for row in rows] == ["DMA*-SH", "Concat", "DA", "DR"]
    ends = stats.ttest_1samp(np.array([90, 50, 80, 70, 60]) - 1, 0).confidence_interval()
    assert rows[0][1] == f"69.0 [{ends.low:.1f}, {ends.high:.1f}] (5)"
    assert rows[3][1].startswith("35.7 [")
    assert rows[3][1].endswith(" (3)")  # unfinished ones aside
    assert tables["table 2"][3][1].startswith("67.0 [")


def test_differences_have_interval_p_and_speed(five_seeds):
    _, *rows = tables_of(five_seeds)["table 3"]
    cells = {(row[0], row[1]): row[2:] for row in rows}
    assert len(cells) == len(rows) == 9
    env = "di_inv, 10 steps"
    x = np.array([90.0, 50, 80, 70, 60])
    ends = stats.ttest_ind(x, x - 40, equal_var=False).confidence_interval()
    expected = f"+40.0 [+{ends.low:.1f}, +{ends.high:.1f}]"
    speeds = ["0.5", "0.5"]  # 10 steps in 20 seconds
    assert cells[env, "Concat"] == ["5, 5", expected, "0.016", expected, "0.016", *speeds]
    assert cells[env, "DR"][0] == "5, 3"


def test_verdicts_need_five_seeds_and_holm(five_seeds, tmp_path, monkeypatch):
    tables = tables_of(five_seeds)
    _, *rows = tables["claims"]
    cells = {row[0]: row[2:] for row in rows if row[1] == "di_inv, 10 steps"}
    assert len(rows) == 9
    assert len(cells) == 3
    setting, seeds, *_, corrected, words = cells[compare.CLAIMS[0][0]]
    assert [setting, seeds, corrected, words] == ["`--quick`", "5, 3", "–", "too few seeds"]
    # p = 4 / 252, one of six tested claims, three of them equal
    assert cells[compare.CLAIMS[1][0]][3:] == ["0.016", "0.095", "inconclusive"]
    enough = [row for row in rows if row[-1] != "too few seeds"]
    assert len(enough) == 6
    head, *short = tables["claims in short"]
    assert head == ["the paper says", *tables["table 1"][0][1:], "verdict"]
    assert [row[0] for row in short] == [compare.CLAIMS[1][0], compare.CLAIMS[2][0]]
    assert short[0][1:] == ["+40.0 (0.095)"] * 3 + ["inconclusive (3 of 3)"]

    monkeypatch.setattr(compare, "MOST_SPLITS", 251)
    row = tables_of(five_seeds)["claims"][4]
    assert row[5:] == ["–", "–", "too many seeds for an exact p"]
    monkeypatch.undo()

    make_run(tmp_path, "di_inv", "concat", 0, 70)
    for seed in range(9):
        for method, level in (("dma_star_sh", 70), ("dma_star", 90), ("dr", 10)):
            make_run(tmp_path, "di_inv", method, seed, level + seed)
    words = [row[-1] for row in tables_of(tmp_path)["claims"][1:]]
    assert words == ["consistent with the paper", "too few seeds", "against it"]


def test_aggregates_weigh_environments_alike(five_seeds):
    _, *rows = tables_of(five_seeds)["aggregates"]
    cells = {row[0]: row[1:] for row in rows}
    assert cells.keys() == {"Concat", "DA", "DR"}
    for score, start in (("mean", 1), ("eval_out", 5)):
        difference, better, lowest, highest = cells["Concat"][start : start + 4]
        ode = 40 / (200 - compare.no_action("ode", score))
        assert difference.startswith(f"+{(0.4 + 0.4 + ode) / 3:.3f} [+")
        assert better == "0.98"  # of 25 pairs 24 are above, 1 is equal
        assert (lowest, highest) == (f"+{(0.4 + ode) / 2:.3f} without di_inv", "+0.400 without ode")


def test_published_score_is_the_larger_of_the_last_two_in_each_set(tmp_path):
    for seed in (1, 2, 3):
        path = make_run(tmp_path, "cartpole_inv", "dma_star_sh", seed, 900) / "metrics.csv"
        path.write_text(path.read_text().replace(",450,", ",990,", 1))  # train, at step 5
    _, row = tables_of(tmp_path)["published scores"]
    assert row[1:] == ["DMA*-SH", "3", "899 [899, 899]", "929 [929, 929]", "967"]


def test_departures_are_set_beside_the_same_method_without(tmp_path):
    for seed in range(5):
        for method, plain, changed in (("dma_star_sh", 80, 80), ("concat", 60, 40)):
            make_run(tmp_path, "di_inv", method, seed, plain)
            published = dict(departures="published", folder=f"{method}{seed}")
            make_run(tmp_path, "di_inv", method, seed, changed, **published)
    tables = tables_of(tmp_path)
    (_, *losses), (_, *gains) = tables["departures"], tables["table 3"]
    assert [row[1] for row in losses] == ["DMA*-SH, published", "Concat, published"]
    assert [row[3] for row in losses] == ["+0.0 [+0.0, +0.0]", "−20.0 [−20.0, −20.0]"]
    gains = {row[1]: row[3][:5] for row in gains}
    assert gains == {"Concat": "+20.0", "Concat, published": "+40.0"}  # none across departures
    for score in ("artefacts", "artefacts, extrapolation"):
        _, ours, concat = [[cell.split(" [")[0] for cell in row] for row in tables[score]]
        assert ours[1:] == ["published", "DMA*-SH", "5, 5", "+0.0", "1.000", "", "", ""]
        assert concat[1:6] == ["published", "Concat", "5, 5", "−20.0", "0.008"]
        assert concat[6:] == ["+20.0", "+40.0", "+20.0"]  # the lead without, with, its change
    settings = [row[2] for row in tables["claims"][1:]]
    assert settings == ["`--quick`", "`--quick`, published"]


def test_only_equal_settings_are_compared(tmp_path):
    make_run(tmp_path, "di_inv", "dma_star_sh", 1, 80)
    make_run(tmp_path, "di_inv", "dr", 1, 40)
    make_run(tmp_path, "di_inv", "dr", 2, 40, buffer=98765, threads=7, out="there", snapshots=True)
    make_run(tmp_path, "di_inv", "dr", 3, 99, folder="a", alpha=0.07)
    make_run(tmp_path, "di_inv", "dr", 4, 98, folder="b", buffer=9000)  # which forgets
    make_run(tmp_path, "di_inv", "dr", 5, 97, folder="c", nested=[1, {"a": "x|y"}])
    make_run(tmp_path, "di_inv", "dma_star_sh", 6, 96, folder="d", mask=0.1)
    make_run(tmp_path, "di_inv", "dr", 7, 95, folder="e", quick=False)
    head, _, _, ours, masked, dr = tables_of(tmp_path)["table 1"]
    assert (ours[0], masked[0], dr[0]) == ("DMA*-SH", "DMA*-SH, mask 0.1", "DR")
    titles = {cell: title for title, cell in zip(head, dr)}
    assert titles.keys() == {"DR", "39.0 (2)", "94.0 (1)", "96.0 (1)", "97.0 (1)", "98.0 (1)"}
    main = head.index(titles["39.0 (2)"])
    assert (ours[main], masked[main]) == ("79.0 (1)", "95.0 (1)")
    assert 'nested [1, {"a": "x\\|y"}]' in titles["96.0 (1)"]
    assert "paper's settings" in titles["94.0 (1)"]


# ---- add, and reports of tables and folders ------------------------------------------------------


def test_tables_and_folders_give_the_same_report_byte_for_byte(five_seeds, tmp_path, capsys):
    tables, first = tmp_path / "tables", tmp_path / "first"
    some = sorted(five_seeds.glob("*__dr__quick__s11"))
    rest = sorted(set(five_seeds.iterdir()) - set(some))
    said_by(["add", *some, "--experiment", "first", "--to", tables], capsys)
    shutil.copytree(tables, first)
    said = said_by(["add", *rest, "--experiment", "more", "--to", tables], capsys)
    assert said.count("not finished, left out") == 3
    assert "51 runs more, 54 in all" in said
    finished = [folder for folder in some + rest if not folder.name.endswith("dr__quick__s14")]
    texts = set()
    for places in (finished, finished[::-1], [tables], [first, *finished[3:]]):
        texts.add(compare.report_text(reader.read_runs(places)))
    assert len(texts) == 1

    row = next(csv.DictReader((tables / "runs.csv").open()))
    assert [row[name] for name in ("experiment", "seed", "torch")] == ["first", "11", "2.0"]
    row = next(csv.DictReader((tables / "metrics.csv").open()))
    assert row["env_steps"] == "7654305"  # all digits
    before = [(tables / name).read_bytes() for name in reader.TABLES]
    reader.write_tables(tables, reader.read_tables(tables)[::-1])
    assert [(tables / name).read_bytes() for name in reader.TABLES] == before
    assert before[2][4:8] == bytes(4)  # gzip: no time of day


def test_reports_go_between_marks_and_a_check_fails_when_they_drift(five_seeds, tmp_path, capsys):
    said_by(["add", five_seeds, "--experiment", "quick", "--to", tmp_path], capsys)
    document = tmp_path / "README.md"
    text = "<!-- table 1 of quick -->\n<!-- end -->\nwords\n<!-- claims -->\nold\n<!-- end -->\n"
    document.write_text(text)
    write = ["report", tmp_path, "--into", document]
    assert "not those of the runs" in said_by([*write, "--check"], capsys, status=2)
    assert document.read_text() == text
    assert said_by(write, capsys) == f"{document}: 2 tables\n"
    runs = reader.read_runs([tmp_path])
    first, second = compare.MAKERS["table 1"](runs), compare.MAKERS["claims"](runs)
    new = text.replace("quick -->\n", f"quick -->\n{first}").replace("old\n", second)
    assert document.read_text() == new
    said_by([*write, "--check"], capsys)
    document.write_text(new.replace("69.0", "69.1", 1))
    said_by([*write, "--check"], capsys, status=2)
    for right, wrong in (("claims", "claim"), ("of quick", "of slow")):
        document.write_text(new.replace(right, wrong))
        assert f"'{wrong.split()[-1]}'" in said_by(write, capsys, status=2)


def test_the_tables_of_results_are_those_of_their_documents(capsys):
    for name in ("README.md", "appendix.md"):
        document = ROOT / "results" / name
        said_by(["report", ROOT / "results", "--into", document, "--check"], capsys)


def test_what_is_refused_in_one_line(five_seeds, tmp_path, capsys):
    run = five_seeds / "ode__dr__quick__s11"
    said_by(["add", run, "--experiment", "a", "--to", tmp_path], capsys)
    for words, message in (
        (["add", run, "--experiment", "b", "--to", tmp_path], "the same run as a/ode__dr"),
        (["report", tmp_path, "--experiments", "c"], "no experiment 'c'; known: a"),
        (["report", tmp_path / "nowhere"], "nowhere: no run there; allowed:"),
        (["report", run, "--outt", "x"], "unrecognized arguments: --outt"),
        (["report", run, "--into", tmp_path / "no.md"], "no.md: No such file"),
    ):
        assert message in said_by(words, capsys, status=2)


def test_names_that_would_break_a_table_or_are_no_text(tmp_path, capsys):
    odd = os.fsdecode(b"\xff|\n")
    folder = make_run(tmp_path / "runs", "di_inv", "dr", 1, 50, folder=odd, version="a|b\n\x1b")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"method": "one|of\nmine"}))
    text = compare.report_text(reader.read_runs([tmp_path]))
    (row, *_) = [line for line in text.splitlines() if line.startswith("| one")]
    assert row == "| one\\|of mine | 49.0 (1) |"
    assert "\x1b" not in text
    said_by(["add", tmp_path / "runs", "--experiment", "odd", "--to", tmp_path], capsys)
    (run,) = reader.read_tables(tmp_path)
    assert run.name == "odd/\\xff|\n"
    assert run.method == "one|of\nmine"


# ---- What the reader refuses -------------------------------------------------------------------


def line_again(text):
    return text + text.splitlines()[-1] + "\n"


def without_the_last_line(text):
    return "\n".join(text.splitlines()[:-1]) + "\n"


def turned_round(text):
    head, *rows = text.splitlines()
    return "\n".join([head, *rows[::-1], ""])


def replaced(old, new):
    return lambda text: text.replace(old, new)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("config.json", lambda text: "[" * 100_000, "config.json cannot be read"),
        ("config.json", replaced('"steps": 10', '"steps": "ten"'), "config.json cannot be read"),
        ("metrics.csv", lambda text: text[:-9], "metrics.csv, line 1: the last line is torn"),
        ("metrics.csv", lambda text: text[:-9] + "\n", "metrics.csv, line 3: 5 cells under 7"),
        ("metrics.csv", line_again, "line 4: step 10.0 stands after 10.0"),
        ("metrics.csv", turned_round, "line 3: step 5.0 stands after 10.0"),
        ("metrics.csv", replaced("eval_in", "eval"), "no column eval_in"),
        ("metrics.csv", replaced(",50,", ",inf,"), "line 3: train is no finite number"),
        ("metrics.csv", replaced(",50,", ",good,"), "line 3: could not convert"),
        ("per_context.csv", without_the_last_line, "a context of eval_out is missing"),
        ("per_context.csv", replaced("10,train,2,", "5,train,9,"), "a context of train is missing"),
        ("per_context.csv", replaced(",51.5\n", ",57.5\n"), "the mean of train is not that"),
    ],
)
def test_a_run_that_cannot_be_read_is_named(name, change, message, tmp_path, capsys):
    path = make_run(tmp_path, "di_inv", "dr", 2, 50) / name
    path.write_text(change(path.read_text()))
    said = said_by(["report", tmp_path, "--out", tmp_path / "out"], capsys, status=2)
    assert message in said
    assert "di_inv__dr__quick__s2" in said
    assert not (tmp_path / "out").exists()


def test_tables_that_cannot_be_read_are_named(tmp_path, capsys):
    for seed in (1, 2):
        make_run(tmp_path / "runs", "di_inv", "dr", seed, 50)
    said_by(["add", tmp_path / "runs", "--experiment", "e", "--to", tmp_path], capsys)
    for name, change, message in (
        ("runs.csv", line_again, "runs.csv, line 4: run e/di_inv__dr__quick__s2 stands after"),
        ("metrics.csv", without_the_last_line, "the mean of train is not that of metrics.csv"),
    ):
        path = tmp_path / name
        text = path.read_text()
        path.write_text(change(text))
        assert message in said_by(["report", tmp_path], capsys, status=2)
        path.write_text(text)


def test_earlier_evaluations_and_columns_of_ones_own_do_no_harm(tmp_path):
    path = make_run(tmp_path, "di_inv", "dr", 1, 50) / "per_context.csv"
    path.write_text(path.read_text().replace("mass", "colour of the car"))
    make_run(tmp_path, "di_inv", "dr", 2, 50, done=0)
    whole, begun = reader.read_runs([tmp_path])
    assert len(whole.contexts) == 12
    assert "colour of the car" in whole.contexts[0]
    assert begun.metrics == begun.contexts == []


# ---- Figures -----------------------------------------------------------------------------------


def drawn(runs):
    blocks = compare.blocks_of(runs)
    return dict(compare_figures.all_of(blocks, compare.returns_without_action))


def single_seeds(ax):
    """What is drawn as points, one for each seed."""
    return [line for line in ax.lines if line.get_linestyle() == "None"]


def test_figures_show_every_seed_and_no_action(five_seeds, tmp_path, capsys):
    runs = reader.read_runs([five_seeds])
    figures = drawn(runs)
    labels = {}
    for name, figure in figures.items():
        learning, *others = figure.axes
        lines = {line.get_label(): line for line in learning.lines}
        level = compare.no_action(name, "mean")
        assert list(lines["no action"].get_ydata()) == pytest.approx([level, level])
        assert list(lines["DMA*-SH"].get_ydata()) == pytest.approx([34, 69])  # 35 and 70, less 1
        assert len(single_seeds(learning)[0].get_xdata()) == 10  # five seeds, two evaluations
        for ax in others:
            assert [text.get_text() for text in ax.texts] == ["trained"]
            assert len(ax.patches) == 1
        labels[name] = [(ax.get_title(), ax.get_xlabel()) for ax in others]
    assert labels == {
        "di_inv": [("not inverted", "mass"), ("inverted", "mass")],
        "di_friction": [("", "mass"), ("", "friction")],
        "ode": [("", "distance from the centre")],
    }
    inverted = figures["di_inv"].axes[2]
    shade = inverted.patches[0].get_extents().transformed(inverted.transData.inverted()).intervalx
    masses = [row["mass"] for row in runs[0].contexts if row["set"] == "train"]
    assert tuple(shade) == pytest.approx((min(masses), max(masses)))
    said = said_by(["report", five_seeds, "--out", tmp_path], capsys)
    assert said == f"{tmp_path}: report.md of 57 runs, 3 figures\n"
    assert {path.stem for path in tmp_path.glob("*.png")} == labels.keys()


def test_points_are_the_returns_of_each_context(tmp_path):
    make_run(tmp_path, "cartpole_inv", "dma_star_sh", 1, 2000, n=20)
    (run,) = reader.read_runs([tmp_path])
    found = set()
    for ax in drawn([run])["pole_length"].axes:
        (points,) = single_seeds(ax)
        found |= set(zip(points.get_xdata(), points.get_ydata()))
    assert found == {(row["length"], row["return"]) for row in run.contexts}


def test_at_most_five_methods_a_panel_and_no_hue_twice(tmp_path):
    for method in dmash.METHODS:
        make_run(tmp_path, "di_inv", method, 1, 50)
    figure = drawn(reader.read_runs([tmp_path]))["di_inv"]
    rows = [ax for ax in figure.axes if ax.get_ylabel()]
    assert len(rows) == 1 + len(dmash.METHODS) - 5
    assert [ax.get_title() for ax in rows[1:4]] == ["DMA*-H", "DMA", "DMA-Pearl"]
    for ax in figure.axes:
        lines = [line for line in ax.lines if line.get_label() not in ("no action", "_")]
        assert 2 <= len(lines) <= 5
        assert len({line.get_color() for line in lines}) == len(lines)
        assert len({line.get_marker() for line in lines}) == len(lines)
    dashes = {str(linestyle) for _, _, linestyle in compare_figures.LOOKS.values()}
    assert len(dashes) == len(compare_figures.LOOKS)  # these alone tell them apart in grey
