"""Tests of studies/unseen.py."""

import csv
import itertools
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "studies")]
import runs as reader  # noqa: E402
import unseen  # noqa: E402
from test_compare import make_run  # noqa: E402

import aib_envs  # noqa: E402
import dmash  # noqa: E402

PM = "di_signs_without_pm"
TINY = "--contexts 4 --batch 16 --threads 1 --hidden 32 --hyper-hidden 8 --bottleneck 4"
TINY = [*TINY.split(), *"--K 4 --random-steps 6 --eval-every 2 --rollouts 1 --steps 2".split()]


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def pairs(contexts):
    return [(float(context["sign_x"]), float(context["sign_y"])) for context in contexts]


@pytest.mark.parametrize("env, left_out", [(PM, (1, -1)), ("di_signs_without_mp", (-1, 1))])
def test_one_pair_is_left_out_of_training_and_evaluated_apart(env, left_out):
    """The others in equal shares; masses of the train range, none in two sets."""
    for n in (1, 6, 20, 50):
        sets = unseen.context_sets(env, n)
        assert [len(contexts) for contexts in sets.values()] == [n] * 3 and list(sets) == list(
            dmash.SETS
        )
        for name in ("train", "eval_in"):
            counts = {
                pair: pairs(sets[name]).count(pair) for pair in itertools.product((1, -1), repeat=2)
            }
            assert counts.pop(left_out) == 0 and max(counts.values()) - min(counts.values()) <= 1
        assert set(pairs(sets["eval_out"])) == {left_out}
        masses = {
            name: {context["mass"] for context in contexts} for name, contexts in sets.items()
        }
        assert all(0.5 <= mass <= 1.5 for mass in set.union(*masses.values()))
        assert not masses["train"] & masses["eval_out"] and len(masses["eval_out"]) == n
    assert unseen.context_sets("di_inv") == aib_envs.context_sets("di_inv")


def test_a_run_without_a_pair_trains_goes_on_and_is_evaluated(tmp_path, capsys):
    """With its sets each time; dmash.py, which does not know them, refuses to go on with it."""
    before, plain = dict(aib_envs.ENVS), aib_envs.context_sets
    command = ["--env", PM, "--method", "concat", *TINY, "--out", str(tmp_path)]
    folder = tmp_path / f"{PM}__concat__s1"
    assert unseen.main(command) == unseen.main([*command, "--go-on"]) == 0
    assert unseen.main(["--resume", str(folder), "--steps", "4"]) == 0
    rows, evaluations = read(folder / "per_context.csv"), 2
    assert len(rows) == evaluations * 3 * 4
    for row, pair in zip(rows, pairs(rows)):
        assert (pair == (1, -1)) == (row["set"] == "eval_out")
    capsys.readouterr()
    assert unseen.main(["--eval", str(folder), "--per-context", "--threads", "1"]) == 0
    head, _, *lines = capsys.readouterr().out.splitlines()
    told = list(csv.DictReader(lines[:-1]))
    assert (
        head.startswith(f"{PM}, concat") and [row["set"] for row in told[-4:]] == ["eval_out"] * 4
    )
    assert pairs(told) == pairs(rows[:12])
    assert aib_envs.ENVS == before and aib_envs.context_sets is plain
    assert dmash.main(["--resume", str(folder)]) == 2 and PM in capsys.readouterr().err


def test_plan_has_each_run_once_and_no_other(capsys):
    assert unseen.main("plan --seeds 11-13 --quick --threads 1".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(set(lines)) == len(lines) == 4 * 5 * 3
    assert lines[0].startswith(
        "python studies/unseen.py --env di_signs_without_pp --method dma_star_sh --seed 11 "
    )
    assert all("--seed 11 " in line for line in lines[:20]) and lines[-1].endswith(
        "--quick --threads 1 --go-on"
    )


def test_report_by_hand(tmp_path, monkeypatch, capsys):
    """Means over runs, with Student's interval."""
    for env in unseen.LEFT_OUT:
        monkeypatch.setitem(aib_envs.ENVS, env, aib_envs.ENVS["di_signs"])
    for env, seed, level in ((PM, 1, 50), (PM, 2, 70), ("di_signs_without_mm", 1, 30)):
        make_run(tmp_path / "runs", env, "concat", seed, level)
    make_run(tmp_path / "runs", PM, "dr", 1, 20)
    make_run(tmp_path / "runs", PM, "dr", 2, 20, done=5)
    make_run(tmp_path / "runs", "di_inv", "dr", 1, 99)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert unseen.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("4 runs; 2 more") and "no figure is drawn" in text
    # the standard deviation of 50, 70 and 30 is 20; t = 4.303 with two degrees of freedom
    assert "| Concat | 3 | 2 | 50.0 [0.3, 99.7] | 50.0 [0.3, 99.7] | 47.0 [−2.7, 96.7] |" in text
    assert "| DR | 1 | 1 | 20.0 | 20.0 | 17.0 |" in text
    rows = read(tmp_path / "unseen.csv")
    found = {(r["env"], r["seed"], r["eval_out"]) for r in rows if r["method"] == "concat"}
    assert found == {("di_signs_without_mm", "1", "27"), (PM, "1", "47"), (PM, "2", "67")}


@pytest.mark.parametrize("env_id", aib_envs.ENVS)
def test_sweeps_vary_one_dimension_far_beyond_its_ranges(env_id):
    dims = aib_envs.ENVS[env_id].context
    panels = {}
    for panel, context in unseen.sweeps(dims):
        assert aib_envs.full_context(env_id, context) == context  # accepted as it is
        panels.setdefault((panel["panel"], panel["varied"]), []).append(context)
    signs = [dim for dim in dims if dim.binary]
    for dim in dims:
        of_dim = [contexts for (_, varied), contexts in panels.items() if varied == dim.name]
        if dim.only:
            assert not of_dim
            continue
        assert len(of_dim) == 2 ** len([sign for sign in signs if sign is not dim])
        for contexts in of_dim:
            values = [context[dim.name] for context in contexts]
            if dim.binary:
                assert {0, 0.25, -0.5, 1, -1, 2} <= set(values)
            else:
                counted = [unseen.where(dim, value) for value in values]
                assert set(counted) == {"train range", "extrapolation range", "beyond"}
                assert min(values) < dim.extrapolation[0] and max(values) > dim.extrapolation[1]
            others = [
                {name: value for name, value in c.items() if name != dim.name} for c in contexts
            ]
            assert all(other == others[0] for other in others) and values == sorted(values)
            assert all(
                other.get(d.name, d.default) == d.default
                for other in others
                for d in dims
                if not d.binary
            )
    assert len(panels) == len({title for title, _ in panels})


@pytest.mark.parametrize("drawn", [True, False])
def test_beyond_by_hand(drawn, tmp_path, monkeypatch, capsys):
    """Two runs of one method and one of another; a return is seed times mass and sign."""
    if drawn:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    asked = []

    def loaded(path):
        method, seed = str(path)[:-1], str(path)[-1]
        cfg = dmash.Config(env="di_inv", method=method, seed=seed)
        return cfg, type("Agent", (), {"step": 7})

    def evaluate(agent, cfg, contexts, rollouts):
        asked.append(rollouts)
        returns = np.array(
            [cfg.seed * (c["mass"] + 1000 * (c["action_factor"] == -1)) for c in contexts]
        )
        return returns[:, None] + [-1, 1], returns[:, None] < [0, 1]  # (contexts, 2)

    monkeypatch.setattr(dmash, "load_policy", loaded)
    monkeypatch.setattr(dmash, "evaluate", evaluate)
    assert unseen.main(["beyond", "dr1", "dr3", "da1", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert asked == [unseen.ROLLOUTS] * 3 and "di_inv, dr, seed 3, step 7 of 100,000" in text
    rows = read(tmp_path / "out" / "beyond_di_inv.csv")
    masses = [
        float(row["mass"]) for row in rows if row["varied"] == "mass" and row["method"] == "DA"
    ]
    masses = np.array(masses[: len(masses) // 2])
    inside = masses[(0.5 <= masses) & (masses <= 1.5)].mean()
    near = masses[((0.1 <= masses) & (masses < 0.5)) | ((1.5 < masses) & (masses <= 2))].mean()
    far = masses[(masses < 0.1) | (masses > 2)].mean()
    for sign, more in ((1, 0), (-1, 1000)):
        table = text.split(f"di_inv: mass, action_factor {sign}\n\n")[1].split("\n\n")[0]
        assert table.startswith("| method | seeds | train range | extrapolation range | beyond |")
        for method, seeds, seed in (("DR", 2, 2), ("DA", 1, 1)):  # the mean of seeds 1 and 3
            cells = " | ".join(f"{seed * (value + more):.1f}" for value in (inside, near, far))
            assert f"| {method} | {seeds} | {cells} |" in table
    strengths = text.split("di_inv: action_factor\n")[1]
    assert (
        strengths.split()[:15:2] == ["|"] * 8
        and strengths.split()[5:18:2] == "±0 ±0.1 ±0.25 ±0.5 ±1 ±1.5 ±2".split()
    )
    assert "| DA | 1 | 1.0 | 1.0 | 1.0 | 1.0 | 501.0 | 1.0 | 1.0 |" in strengths
    assert all(float(row["diverged"]) == (float(row["return"]) < 1) for row in rows)
    assert (
        (tmp_path / "out" / "beyond_di_inv.png").exists()
        == drawn
        == ("no figure is drawn" not in text)
    )


def test_policies_of_other_settings_are_told_apart_and_none_counts_twice():
    def labels(*settings):
        made = [asdict(dmash.Config(env="di_inv", **of)) for of in settings]
        return unseen.policy_labels(made)

    star, wide = dict(method="dma_star", seed=1), dict(method="dma_star", seed=2, K=12, mask=0.4)
    assert labels(star, dict(method="dma_star_sh")) == ["DMA*", "DMA*-SH"]
    assert labels(star, wide) == ["DMA*, K 24, mask 0.2", "DMA*, K 12, mask 0.4"]
    with pytest.raises(dmash.BadInput, match="di_inv, DMA., seed 1: the same run twice"):
        labels(star, star | {"out": "elsewhere"})


def test_runs_of_other_settings_are_told_apart(tmp_path, capsys):
    for env in (PM, "di_signs_without_mm"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(aib_envs.ENVS, env, aib_envs.ENVS["di_signs"])
            make_run(tmp_path / "runs", env, "dr", 1, 50)
            make_run(tmp_path / "runs", env, "concat", 1, 60, polyak=0.005)
    assert unseen.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert (
        "| Concat, polyak 0.005 | 2 | 2 | 60.0 |" in said
        and "| DR, polyak 0.05 | 2 | 2 | 50.0 |" in said
    )


def test_figures_show_every_run_and_shade_the_ranges():
    Figure = pytest.importorskip("matplotlib.figure").Figure
    dims = aib_envs.ENVS["di_inv"].context
    rows = []
    for method, level in (("dr", 1), ("dr", 3), ("da", 5)):
        for panel, context in unseen.sweeps(dims):
            rows.append({"method": method, "return": level * context["mass"], **panel, **context})
    figure = Figure()
    unseen.draw_beyond(figure, "di_inv", {dim.name: dim for dim in dims}, rows)
    normal, inverted, strength = figure.axes
    for ax in (normal, inverted):
        slopes = {}
        for line in ax.lines:
            slopes[line.get_label()] = line.get_ydata()[0] / line.get_xdata()[0]
        assert slopes == pytest.approx({"dr": 2, "da": 5})
        ends = []
        for patch in ax.patches:
            box = patch.get_extents().transformed(ax.transData.inverted())
            ends.append(tuple(box.intervalx))
        assert ends == [pytest.approx((0.1, 2)), pytest.approx((0.5, 1.5))]
    marks = [line.get_xdata()[0] for line in strength.lines if len(line.get_xdata()) == 2]
    assert marks == [-1, 1] and not strength.patches

    runs = []
    for i in (1, 2):
        metrics = [{"eval_in": 10 * i, "eval_out": i}]
        runs.append(reader.Run("", "", "", "dr", i, {}, {}, metrics, [], Path()))
    figure = Figure()
    unseen.draw_report(figure, {"dr": runs, "da": runs[:1]})
    (ax,) = figure.axes
    assert [list(line.get_ydata()) for line in ax.lines] == [[10, 20], [1, 2], [10], [1]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "required: plan | report | beyond | --env ENV"),
        ("--method dr", "argument plan | report | beyond | --env ENV"),
        ("plan --seeds 3-1", "--seeds 3-1: must be"),
        ("plan --seeds 1 --steps 0", "--steps 0: must be"),
        ("plan --seeds 1 --env di_inv", "--env: not here"),
        ("report nowhere --out x", "nowhere: no run there"),
        ("report {runs} --out x", "no finished run of di_signs_without_pp, "),
        ("report {runs}", "required: --out"),
        ("report {runs} --out x --rollouts 3", "unrecognized arguments: --rollouts 3"),
        ("beyond nowhere --out x", "nowhere: must be a policy file"),
        ("beyond {runs}/di_inv__dr__quick__s1 --out x", "policy.pt: must be a policy file"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run("runs", "di_inv", "dr", 1, 60)
    assert unseen.main(arguments.format(runs="runs").split()) == 2
    said = capsys.readouterr()
    assert (
        said.out == "" and said.err.count("\n") == 1 and said.err.startswith("unseen.py: error: ")
    )
    assert message in said.err and not (tmp_path / "x").exists()
