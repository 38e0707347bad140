"""Tests of studies/runs.py, compare.py and compare_figures.py."""

import itertools
import json
import os
import re
import shlex
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import compare
import compare_figures
import numpy as np
import pytest
import runs as reader
from untrained import ROOT, refusal

import aib_envs
import dmash

# ---- Statistics, against scipy -----------------------------------------------------------------

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "x, y",
    [
        ([3.0, 3.0, 3.0, 2.0], [3.0, 3.0, 1.0, 1.0]),  # ties
        (RNG.normal(0, 1, 9), RNG.normal(1, 3, 6)),
    ],
)
def test_statistics_are_those_of_scipy(x, y):
    """Student's and Welch's intervals, p over all splits, and Mann and Whitney's U."""
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    _, *ends = compare.contrast([1], [x])
    student = stats.ttest_1samp(x, 0)
    assert ends == pytest.approx(list(student.confidence_interval()), rel=1e-5)
    point, *ends = compare.contrast([1, -1], [x, y])
    welch = stats.ttest_ind(x, y, equal_var=False)
    assert point == pytest.approx(np.mean(x) - np.mean(y))
    assert ends == pytest.approx(list(welch.confidence_interval()), rel=1e-5)

    def distance(a, b):
        return abs(np.mean(a) - np.mean(b))

    test = stats.permutation_test((x, y), distance, n_resamples=np.inf, alternative="greater")
    assert compare.permutation_p(x, y) == pytest.approx(test.pvalue, abs=1e-12)
    better = stats.mannwhitneyu(x, y).statistic / (len(x) * len(y))
    assert compare.probability_of_improvement(x, np.array(y)) == pytest.approx(better)


def test_interval_of_a_mean_over_environments_covers_95_percent():
    """Known normal samples of unequal spread; by chance 95 % lies between 93.5 and 96.5 here."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(1000):
        samples = [rng.normal(7, *of) for of in ((1, 5), (9, 5), (3, 3), (3, 10))]
        _, low, high = compare.contrast((0.5, -0.5, 0.5, -0.5), samples)
        hits += low <= 0 <= high
    assert 935 <= hits <= 965


def test_holm_by_hand():
    corrected = compare.holm([0.01, 0.04, 0.03, 0.005])
    assert corrected == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert compare.holm([0.5, 0.9]) == [1, 1]
    assert compare.holm([]) == []


# ---- plan --------------------------------------------------------------------------------------


def said_by(arguments, capsys):
    """What compare.py prints."""
    assert compare.main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def test_plan_has_a_line_for_each_run_seeds_outermost(capsys):
    words = "plan --envs di_inv ode --methods dr concat --seeds 11-12 7 --out".split()
    lines = said_by([*words, "a b's $HOME"], capsys).splitlines()
    runs = itertools.product((11, 12, 7), ("di_inv", "ode"), ("dr", "concat"))
    for line, (seed, env, method) in zip(lines, runs, strict=True):
        run = f"python dmash.py --env {env} --method {method} --seed {seed} --out".split()
        assert shlex.split(line) == [*run, "a b's $HOME", "--threads", "1", "--go-on"]
    words = "plan --envs ode --methods dr --seeds 1 --threads 2".split()
    assert said_by(words, capsys).endswith(" --seed 1 --threads 2 --go-on\n")


# ---- Runs for the tests ------------------------------------------------------------------------


def make_run(root, env, method, seed, level, done=10, **config):
    """A run folder as dmash.py writes it: returns of `level`, and 3 less on eval_out."""
    cfg = dmash.Config(**dmash.QUICK, env=env, method=method, seed=seed, steps=10)
    folder = root / f"{env}__{method}__quick__s{seed}{config.get('departures', '')}"
    folder.mkdir(parents=True)
    versions = dict.fromkeys(reader.VERSIONS, "2.0")
    (folder / "config.json").write_text(json.dumps(asdict(cfg) | versions | config))
    metrics, contexts = [], []
    for step in range(5, done + 1, 5):
        row = {"step": step, "env_steps": 7_654_300 + step, "seconds": 2.0 * step}
        row["train"] = row["eval_in"] = level * step / 10
        row["eval_out"] = row["train"] - 3
        metrics.append(row | {"dynamics_loss": np.nan})
        for name, values in aib_envs.context_sets(env).items():
            for i, context in enumerate(values):
                ids = {"step": step, "set": name, "index": i}
                contexts.append(ids | context | {"return": row[name] + i - 9.5})
    if metrics:
        (folder / "metrics.csv").write_text(dmash.csv_text(metrics))
        (folder / "per_context.csv").write_text(dmash.csv_text(contexts))
    return folder


def rows_of(name, place):
    """The rows of a table of the runs in a place, its head first."""
    head, _, *rows = compare.MAKERS[name](reader.read_runs([place])).splitlines()
    return [head, *rows]


@pytest.fixture(scope="module")
def five_seeds(tmp_path_factory):
    """dma_star_sh has 50 to 90, concat 40 less, da 5 less; dr has 30 and three seeds."""
    root = tmp_path_factory.mktemp("runs")
    for env in ("di_inv", "di_friction", "ode"):
        for seed, level in enumerate((90, 50, 80, 70, 60), 11):
            make_run(root, env, "dma_star_sh", seed, level)
            make_run(root, env, "concat", seed, level - 40)
            make_run(root, env, "da", seed, level - 5)
        for seed in (11, 12, 13):
            make_run(root, env, "dr", seed, 30)
        make_run(root, env, "dr", 14, 30, done=5)
    return root


# ---- Tables ------------------------------------------------------------------------------------


def test_returns_by_method_and_environment(five_seeds):
    head, nothing, most, ours, concat, _, dr = rows_of("table 1", five_seeds)
    assert head == "| method | di_inv, 10 steps | di_friction, 10 steps | ode, 10 steps |"
    assert nothing.startswith("| no action | 0.0 | 0.0 | ")
    assert most == "| largest possible | 100 | 100 | 200 |"
    # the standard deviation is 15.81; t = 2.776 with four degrees of freedom
    assert ours == f"| DMA*-SH |{' 69.0 [49.4, 88.6] (5) |' * 3}"
    assert concat == f"| Concat |{' 29.0 [9.4, 48.6] (5) |' * 3}"
    assert dr == f"| DR |{' 29.0 [29.0, 29.0] (3) |' * 3}"  # the unfinished one aside
    ours = rows_of("table 2", five_seeds)[3]
    assert ours.startswith("| DMA*-SH | 67.0 [")


def test_differences_have_interval_p_and_speed(five_seeds):
    _, concat, _, dr, *others = rows_of("table 3", five_seeds)
    difference = "+40.0 [+16.9, +63.1] | 0.016"  # t = 2.306 with eight degrees of freedom
    cells = f"5, 5 | {difference} | {difference} | 0.5 | 0.5"  # 10 steps in 20 seconds
    assert concat == f"| di_inv, 10 steps | Concat | {cells} |"
    assert dr.startswith("| di_inv, 10 steps | DR | 5, 3 | +40.0 [")
    assert len(others) == 6


def test_claims_need_five_seeds_and_holm(five_seeds, monkeypatch):
    _, dr, concat, _ = rows_of("claims", five_seeds)
    cells = " +40.0 [+20.4, +59.6] p 0.036 (5, 3) |" * 3
    assert dr == f"| DMA*-SH beats DR |{cells} too few seeds (3 of 3) |"
    cells = " +40.0 [+16.9, +63.1] p 0.016 (5, 5) |" * 3
    assert concat == f"| DMA*-SH beats Concat |{cells} inconclusive (3 of 3) |"
    _, concat, _ = rows_of("claims in short", five_seeds)
    # p = 4 / 252, one of six tested claims, three of them equal
    cells = " +40.0 [+16.9, +63.1] (0.095) |" * 3
    assert concat == f"| DMA*-SH beats Concat |{cells} inconclusive (3 of 3) |"
    monkeypatch.setattr(compare, "MOST_SPLITS", 251)
    concat = rows_of("claims", five_seeds)[2]
    assert concat.endswith(" p – (5, 5) | too many seeds for an exact p (3 of 3) |")


def test_aggregates_weigh_environments_alike(five_seeds):
    _, concat, _, _ = rows_of("aggregates", five_seeds)
    assert concat.startswith("| Concat | 3 | ")
    for score, cells in (("mean", concat.split(" | ")[2:6]), ("eval_out", concat.split(" | ")[6:])):
        ode = 40 / (200 - compare.no_action("ode", score))
        assert cells[0].startswith(f"+{(0.4 + 0.4 + ode) / 3:.3f} [+")
        assert cells[1] == "0.98"  # of 25 pairs 24 are above, 1 is equal
        assert cells[2] == f"+{(0.4 + ode) / 2:.3f} without di_inv"
        assert cells[3].startswith("+0.400 without ode")
    runs, others = reader.read_runs([five_seeds]), reader.read_runs([five_seeds])
    for run in others:
        del run.settings["quick"]
    both = compare.aggregates_table(runs + others)
    assert "\n| Concat, `--quick` | 3 |" in both
    assert "\n| Concat, paper's settings | 3 |" in both


def test_published_score_is_the_larger_of_the_last_two_in_each_set(tmp_path):
    for seed in (1, 2, 3):
        path = make_run(tmp_path, "cartpole_inv", "dma_star_sh", seed, 900) / "metrics.csv"
        path.write_text(path.read_text().replace(",450,", ",990,", 1))  # train, at step 5
    _, row = rows_of("published scores", tmp_path)
    assert row.endswith(" | DMA*-SH | 3 | 899 [899, 899] | 929 [929, 929] | 967 |")


@pytest.fixture(scope="module")
def departed(tmp_path_factory):
    """Five seeds of two methods in two environments, with departures and without."""
    root = tmp_path_factory.mktemp("departed")
    for seed, (env, size) in itertools.product(range(5), (("di_inv", 1), ("di_perm", 0.5))):
        for method, plain, published in (("dma_star_sh", 80, 70), ("concat", 60, 90)):
            make_run(root, env, method, seed, plain * size)
            make_run(root, env, method, seed, published * size, departures="published")
    return root


def test_departures_are_set_beside_the_same_method_without(departed):
    _, _, concat, *_ = rows_of("departures", departed)
    assert " | Concat, published | 5, 5 | +30.0 [+30.0, +30.0] | 0.008 | " in concat
    _, _, published, *_ = rows_of("table 3", departed)  # nothing across departures
    assert " | Concat, published | 5, 5 | −20.0 [−20.0, −20.0] | " in published


def test_verdicts(departed):
    _, plain, published = rows_of("claims", departed)
    assert plain.endswith(" | consistent with the paper (2 of 2) |")
    assert published.startswith("| DMA*-SH beats Concat, published | −20.0 [")
    assert published.endswith(" | against it (2 of 2) |")


def test_artefacts_have_leads_and_means_over_environments(departed):
    _, *rows = rows_of("artefacts", departed)
    assert [" ".join(re.findall(r"([+−][\d.]+) \[", row)) for row in rows] == [
        "−10.0",  # DMA*-SH on di_inv
        "−5.0",  # on di_perm
        "−0.075",  # the mean
        "+30.0 +20.0 −20.0 −40.0",  # Concat
        "+15.0 +10.0 −10.0 −20.0",
        "+0.225 +0.150 −0.150 −0.300",
    ]
    assert rows[2] == "| DMA*-SH, published | mean of 2 | −0.075 [−0.075, −0.075] | – | – | – |"
    assert rows_of("artefacts in short", departed)[1:] == rows[2::3]


def test_only_equal_settings_are_compared(tmp_path):
    others = [
        dict(threads=7, out="there", snapshots=True, buffer=98765),
        dict(buffer=9000),  # which forgets
        dict(nested=[1, {"a": "x|y"}]),
        dict(quick=False),
    ]
    for level, settings in enumerate([{}, *others]):
        make_run(tmp_path, "di_inv", "dr", level, level + 1, **settings)
    make_run(tmp_path, "di_inv", "dma_star_sh", 1, 80)
    make_run(tmp_path, "di_inv", "dma_star_sh", 6, 96, mask=0.1)
    head, _, _, ours, masked, dr = [row[2:-2].split(" | ") for row in rows_of("table 1", tmp_path)]
    assert (ours[0], masked[0], dr[0]) == ("DMA*-SH", "DMA*-SH, mask 0.1", "DR")
    titles = dict(zip(dr, head))
    assert titles.keys() == {"DR", "0.5 (2)", "2.0 (1)", "3.0 (1)", "4.0 (1)"}
    main = head.index(titles["0.5 (2)"])
    assert (ours[main], masked[main]) == ("79.0 (1)", "95.0 (1)")
    assert 'nested [1, {"a": "x\\|y"}]' in titles["3.0 (1)"]
    assert "paper's settings" in titles["4.0 (1)"]


# ---- add, and reports of tables and folders ------------------------------------------------------


def test_tables_and_folders_give_the_same_report_byte_for_byte(five_seeds, tmp_path, capsys):
    tables, first = tmp_path / "tables", tmp_path / "first"
    folders = sorted(five_seeds.iterdir())
    said_by(["add", *folders[:3], "--experiment", "first", "--to", tables], capsys)
    shutil.copytree(tables, first)
    said = said_by(["add", *folders[3:], "--experiment", "more", "--to", tables], capsys)
    assert said.count("not finished, left out") == 3
    assert "51 runs more, 54 in all" in said
    finished = [folder for folder in folders if not folder.match("*__dr__quick__s14")]
    places = finished[::-1], [tables], [first, *finished[3:]]
    assert len({compare.report_text(reader.read_runs(of)) for of in places}) == 1

    _, row, *_ = (tables / "runs.csv").read_text().splitlines()
    assert row.startswith("first/di_friction__concat__quick__s11,first,di_friction,concat,11,")
    assert row.endswith(",2.0,2.0,2.0,2.0,2.0")  # the versions
    assert ",7654305," in (tables / "metrics.csv").read_text()  # all digits
    reader.write_tables(first, reader.read_tables(tables)[::-1])
    for name in reader.TABLES:
        assert (first / name).read_bytes() == (tables / name).read_bytes()
    assert (tables / "contexts.csv.gz").read_bytes()[4:8] == bytes(4)  # gzip: no time of day
    with pytest.raises(dmash.BadInput, match="no finished run"):
        compare.add([five_seeds / "ode__dr__quick__s14"], "b", tables)


def test_reports_go_between_marks_and_a_check_fails_when_they_drift(five_seeds, tmp_path, capsys):
    said_by(["add", five_seeds, "--experiment", "quick", "--to", tmp_path], capsys)
    document = tmp_path / "README.md"
    text = "<!-- table 1 of quick -->\n<!-- end -->\n<!-- claims of quick -->\nold\n<!-- end -->"
    document.write_text(text)
    write = ["report", tmp_path, "--into", document]
    assert "not those of the runs" in refusal(compare, [*write, "--check"], capsys)
    assert document.read_text() == text
    assert said_by(write, capsys) == f"{document}: 2 tables\n"
    runs = reader.read_runs([tmp_path])
    first, second = compare.MAKERS["table 1"](runs), compare.MAKERS["claims"](runs)
    new = text.replace("-->\n<", f"-->\n{first}<", 1).replace("old\n", second)
    assert document.read_text() == new
    said_by([*write, "--check"], capsys)
    for right, wrong, message in (
        ("claims", "claim", "no table 'claim'"),
        ("of quick", "of slow", "no experiment 'slow'"),
        ("<!-- end -->", "", "needs a line"),  # the next table must not be taken for its end
    ):
        document.write_text(new.replace(right, wrong, 1))
        assert message in refusal(compare, write, capsys)


def test_no_action_measures_the_named_environments_again(tmp_path, monkeypatch, capsys):
    table = Path(shutil.copy(compare.NO_ACTION, tmp_path))
    before = table.read_text()
    monkeypatch.setattr(compare, "NO_ACTION", table)
    said_by(["no-action", "--envs", "di_inv"], capsys)
    assert sorted(table.read_text().split()) == sorted(before.split())


def test_the_tables_of_results_are_those_of_their_documents(capsys):
    for name in ("README.md", "appendix.md"):
        document = ROOT / "results" / name
        said_by(["report", ROOT / "results", "--into", document, "--check"], capsys)


def test_what_is_refused_in_one_line(five_seeds, tmp_path, capsys):
    run = five_seeds / "ode__dr__quick__s11"
    said_by(["add", run, "--experiment", "a", "--to", tmp_path], capsys)
    plan = "plan --methods dr --envs"
    for words, message in (
        (f"{plan} cartpole --seeds 1", "unknown environment 'cartpole'"),
        (f"{plan} ode --seeds 15-11", "--seeds: invalid seeds value: '15-11'"),
        (f"{plan} ode --seeds 1,2", "--seeds: invalid seeds value: '1,2'"),
        (f"{plan} ode --seeds 1 --stepss 3", "unrecognized arguments: --stepss 3"),
        (f"{plan} ode --seeds 1 --seed 3", "--seed: not here; allowed:"),
        (f"add {run} --experiment b --to {tmp_path}", "the same run as a/ode__dr"),
        (f"report {tmp_path} --experiments c", "no experiment 'c'; known: a"),
        (f"report {tmp_path}/nowhere", "nowhere: no run there; allowed:"),
        (f"report {run} --check", "--check: only with --into"),
        (f"report {run} --outt x", "unrecognized arguments: --outt"),
        (f"report {run} --into {tmp_path}/no.md", "no.md: No such file"),
    ):
        assert message in refusal(compare, words.split(), capsys)
    packed = tmp_path / "contexts.csv.gz"
    packed.write_bytes(packed.read_bytes()[:10] + bytes(30))
    assert "contexts.csv.gz, line 1: " in refusal(compare, ["report", tmp_path], capsys)


def test_names_that_would_break_a_table_or_are_no_text(tmp_path, capsys):
    folder = make_run(tmp_path / "runs", "di_inv", "dr", 1, 50, version="a|b\n\x1b")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"dr"', '"one|of\\nmine"'))
    folder.rename(folder.with_name(os.fsdecode(b"\xff|\n")))
    text = compare.report_text(reader.read_runs([tmp_path]))
    assert "\n| one\\|of mine | 49.0 (1) |\n" in text
    assert compare.digits_of("my_module:my_env") == 1
    assert "\x1b" not in text
    said_by(["add", tmp_path / "runs", "--experiment", "odd", "--to", tmp_path], capsys)
    (run,) = reader.read_tables(tmp_path)
    assert (run.name, run.method) == ("odd/\\xff|\n", "one|of\nmine")


# ---- What the reader refuses -------------------------------------------------------------------


def line_again(text):
    return text + text.splitlines()[-1] + "\n"


def without_the_last_line(text):
    return "\n".join(text.splitlines()[:-1]) + "\n"


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
        ("metrics.csv", replaced("\n5,", "\n15,"), "line 3: step 10.0 stands after 15.0"),
        ("metrics.csv", replaced("eval_in", "eval"), "no column eval_in"),
        ("metrics.csv", replaced(",50,", ",inf,"), "line 3: train is no finite number"),
        ("metrics.csv", replaced(",50,", ",good,"), "line 3: could not convert"),
        ("per_context.csv", without_the_last_line, "a context of eval_out is missing"),
        ("per_context.csv", replaced(",51.5\n", ",57.5\n"), "the mean of train is not that"),
        ("../tables/runs.csv", line_again, "runs.csv, line 3: run e/di_inv__dr__quick__s2 stands"),
        ("../tables/metrics.csv", without_the_last_line, "the mean of train is not that"),
    ],
)
def test_a_run_that_cannot_be_read_is_named(name, change, message, tmp_path, capsys):
    """In its folder, or in tables."""
    run = make_run(tmp_path, "di_inv", "dr", 2, 50)
    said_by(["add", run, "--experiment", "e", "--to", tmp_path / "tables"], capsys)
    path = run / name
    path.write_text(change(path.read_text()))
    said = refusal(compare, ["report", path.parent, "--out", tmp_path / "out"], capsys)
    assert message in said
    assert "di_inv__dr__quick__s2" in said
    assert not (tmp_path / "out").exists()


def test_earlier_evaluations_and_columns_of_ones_own_do_no_harm(tmp_path):
    path = make_run(tmp_path, "di_inv", "dr", 1, 50) / "per_context.csv"
    path.write_text(path.read_text().replace("mass", "colour of the car"))
    make_run(tmp_path, "di_inv", "dr", 2, 50, done=0)
    whole, begun = reader.read_runs([tmp_path])
    assert len(whole.contexts) == 60
    assert "colour of the car" in whole.contexts[0]
    assert begun.metrics == begun.contexts == []
    third = reader.read_run(make_run(tmp_path, "di_inv", "dr", 3, 50))
    other_order = [dict(reversed(row.items())) for row in third.contexts]  # as in the tables
    assert len(compare.blocks_of([third, replace(third, contexts=other_order)])) == 1
    with pytest.raises(dmash.BadInput, match="di_inv: its runs have different contexts"):
        compare.blocks_of(reader.read_runs([tmp_path]))


# ---- Figures -----------------------------------------------------------------------------------


def drawn(place):
    blocks = compare.blocks_of(reader.read_runs([place]))
    return dict(compare_figures.all_of(blocks, compare.returns_without_action))


def lines_of(ax):
    """The heights of each line, by its label."""
    return {line.get_label(): list(line.get_ydata()) for line in ax.lines}


def single_seeds(ax):
    """The places and heights of what is drawn as points, one for each seed."""
    line = next(line for line in ax.lines if line.get_linestyle() == "None")
    return list(zip(*line.get_data()))


def test_figures_show_every_seed_and_no_action(five_seeds, tmp_path, capsys):
    labels = {}
    for name, figure in drawn(five_seeds).items():
        learning, *others = figure.axes
        lines = lines_of(learning)
        assert lines["no action"] == pytest.approx([compare.no_action(name, "mean")] * 2)
        assert lines["DMA*-SH"] == pytest.approx([34, 69])  # 35 and 70, less 1
        assert len(single_seeds(learning)) == 10  # five seeds, two evaluations
        measured = compare.returns_without_action(name).values()
        for ax in others:
            assert [text.get_text() for text in ax.texts] == ["trained"]
            idle = lines_of(ax)["no action"]
            assert min(measured) <= min(idle) <= max(idle) <= max(measured)
        labels[name] = [(ax.get_title(), ax.get_xlabel()) for ax in others]
    assert labels == {
        "di_inv": [("not inverted", "mass"), ("inverted", "mass")],
        "di_friction": [("", "mass"), ("", "friction")],
        "ode": [("", "distance from the centre")],
    }
    said = said_by(["report", five_seeds, "--out", tmp_path], capsys)
    assert said == f"{tmp_path}: report.md and figures of 57 runs\n"
    assert {path.stem for path in tmp_path.glob("*.png")} == labels.keys()


def test_points_are_the_returns_of_each_context_and_the_trained_range_is_grey(tmp_path):
    make_run(tmp_path, "cartpole_inv", "dma_star_sh", 1, -2000)
    (run,) = reader.read_runs([tmp_path])
    length, _ = aib_envs.ENVS["cartpole_inv"].context
    found = set()
    for ax in drawn(tmp_path)["pole_length"].axes:
        found |= set(single_seeds(ax))
        assert ax.get_ylim()[0] < -2000
        (shade,) = ax.patches
        ends = shade.get_x(), shade.get_x() + shade.get_width()
        assert ends == pytest.approx(length.train)
    assert found == {(row["length"], row["return"]) for row in run.contexts}


def test_at_most_five_methods_a_panel_and_no_hue_twice(tmp_path):
    for method in dmash.METHODS:
        make_run(tmp_path, "di_inv", method, 1, 50)
    figure = drawn(tmp_path)["di_inv"]
    rows = [ax for ax in figure.axes if ax.get_ylabel()]
    assert len(rows) == 1 + len(dmash.METHODS) - 5
    assert [ax.get_title() for ax in rows[1:4]] == ["DMA*-H", "DMA", "DMA-Pearl"]
    for ax in figure.axes:
        lines = [line for line in ax.lines if line.get_label() not in ("no action", "_")]
        assert 2 <= len(lines) <= 5
        assert len({line.get_color() for line in lines}) == len(lines)
    dashes = {str(linestyle) for _, _, linestyle in compare_figures.LOOKS.values()}
    assert len(dashes) == len(compare_figures.LOOKS)  # these alone tell them apart in grey
