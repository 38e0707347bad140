"""Tests of studies/unseen.py."""

import csv
import itertools

import numpy as np
import pytest
import unseen
from test_compare import make_run
from untrained import refusal, succeed, table

import aib_envs
import dmash

PM, MM = "di_signs_without_pm", "di_signs_without_mm"
TINY = "--contexts 4 --batch 16 --threads 1 --hidden 32 --hyper-hidden 8 --bottleneck 4"
TINY += " --K 4 --random-steps 6 --eval-every 2 --rollouts 1 --steps 2"


def pairs(contexts):
    return [(float(context["sign_x"]), float(context["sign_y"])) for context in contexts]


# ---- Training without a pair --------------------------------------------------------------------


@pytest.mark.parametrize("env, left_out", [(PM, (1, -1)), ("di_signs_without_mp", (-1, 1))])
def test_one_pair_is_left_out_of_training_and_evaluated_apart(env, left_out):
    """The others in equal shares; masses of the train range, none in two sets."""
    sets = unseen.context_sets(env, 20)
    assert list(sets) == list(dmash.SETS)
    masses = {name: {context["mass"] for context in contexts} for name, contexts in sets.items()}
    for values in masses.values():
        assert 0.5 <= min(values) and max(values) <= 1.5
    for name in ("train", "eval_in"):
        kept = set(itertools.product((1, -1), repeat=2)) - {left_out}
        counts = [pairs(sets[name]).count(pair) for pair in kept]
        assert sorted(counts) == [6, 7, 7]
    assert pairs(sets["eval_out"]) == [left_out] * 20
    assert len(masses["eval_out"]) == 20
    assert not masses["train"] & masses["eval_out"]


def test_a_run_without_a_pair_trains_goes_on_and_is_evaluated(tmp_path, capsys):
    """With its sets each time; dmash.py, which does not know them, refuses to go on with it."""
    before = dict(aib_envs.ENVS)
    plain = aib_envs.context_sets
    folder = tmp_path / f"{PM}__concat__s1"
    succeed(unseen, "--env", PM, "--method", "concat", *TINY.split(), "--out", tmp_path)
    succeed(unseen, "--resume", folder, "--steps", 4)
    rows = table(folder / "per_context.csv")
    assert len(rows) == 2 * 3 * 4  # two evaluations
    for row, pair in zip(rows, pairs(rows)):
        assert (pair == (1, -1)) == (row["set"] == "eval_out")
    capsys.readouterr()
    succeed(unseen, "--eval", folder, "--per-context", "--threads", 1)
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith(f"{PM}, concat")
    assert pairs(csv.DictReader(lines[:-1])) == pairs(rows[:12])
    assert aib_envs.ENVS == before
    assert aib_envs.context_sets is plain
    assert PM in refusal(dmash, ["--resume", folder], capsys)


def test_report_by_hand(tmp_path, monkeypatch, capsys):
    """Means over runs, with Student's interval. Methods of other settings are told apart."""
    for env in unseen.LEFT_OUT:
        monkeypatch.setitem(aib_envs.ENVS, env, aib_envs.ENVS["di_signs"])
    runs = tmp_path / "runs"
    for env, seed, level in ((PM, 1, 50), (PM, 2, 70), (MM, 1, 30)):
        make_run(runs, env, "concat", seed, level, K=12)  # a setting of the whole method
    make_run(runs, PM, "dr", 1, 20)
    make_run(runs, MM, "dr", 1, 30, polyak=0.005)
    make_run(runs, PM, "dr", 2, 20, done=5)
    make_run(runs, "di_inv", "dr", 1, 99)
    succeed(unseen, "report", runs, "--out", tmp_path)
    text = capsys.readouterr().out
    assert text.startswith("5 of 7 runs ")
    # the standard deviation of 50, 70 and 30 is 20; t = 4.303 with two degrees of freedom
    cells = "50.0 [0.3, 99.7] | 50.0 [0.3, 99.7] | 47.0 [−2.7, 96.7]"
    assert f"| Concat, polyak 0.05 | 3 | 2 | {cells} |" in text
    assert "| DR, polyak 0.05 | 1 | 1 | 20.0 | 20.0 | 17.0 |" in text
    assert "| DR, polyak 0.005 | 1 | 1 | 30.0 | 30.0 | 27.0 |" in text
    rows = table(tmp_path / "unseen.csv")
    found = {(r["env"], r["seed"], r["eval_out"]) for r in rows if r["method"] == "concat"}
    assert found == {(MM, "1", "27"), (PM, "1", "47"), (PM, "2", "67")}


# ---- Far beyond the ranges ----------------------------------------------------------------------


def test_sweeps_vary_one_dimension_far_beyond_its_ranges():
    """From a quarter of the lower to four times the upper limit, as far as that is accepted."""
    masses = np.geomspace(0.1 / 4, 2 * 4, unseen.POINTS)
    strings = np.geomspace(0.1 / 4, 0.99 * 0.9, unseen.POINTS)
    for env_id, panels, title, values in (
        ("di_signs", 8, "mass, sign_x 1, sign_y -1", masses),
        ("di_signs", 8, "sign_y, sign_x -1", unseen.STRENGTHS),
        ("di_perm", 2, "mass, swap 1", masses),  # swap has no other values
        ("ode", 2, "c1", np.linspace(-40, 40, unseen.POINTS)),
        ("ball_in_cup", 2, "distance", strings),
    ):
        sweeps = list(unseen.sweeps(aib_envs.ENVS[env_id].context))
        assert len({panel["panel"] for panel, _ in sweeps}) == panels
        found = [context for panel, context in sweeps if panel["panel"] == title]
        varied, *fixed = title.split(", ")
        given = {}
        for word in fixed:
            name, sign = word.split()
            given[name] = float(sign)
        for context, value in zip(found, values, strict=True):
            assert context == aib_envs.full_context(env_id, given | {varied: float(value)})


def test_beyond_by_hand(tmp_path, monkeypatch, capsys):
    """A return is the seed times the mass, and 1000 more in the mass if the motor is reversed."""

    def loaded(path):
        method, seed = str(path)[:-1], str(path)[-1]
        cfg = dmash.Config(env="di_inv", method=method, seed=seed)
        return cfg, type("Agent", (), {"step": 7})

    def evaluate(agent, cfg, contexts, rollouts):
        assert rollouts == unseen.ROLLOUTS
        values = [c["mass"] + 1000 * (c["action_factor"] == -1) for c in contexts]
        returns = cfg.seed * np.array(values)[:, None]
        return returns + [-1, 1], returns < [0, 1]  # (contexts, 2)

    monkeypatch.setattr(dmash, "load_policy", loaded)
    monkeypatch.setattr(dmash, "evaluate", evaluate)
    succeed(unseen, "beyond", "dr1", "dr3", "da1", "--out", tmp_path)
    text = capsys.readouterr().out
    assert "di_inv, dr, seed 3, step 7 of 100,000" in text
    panel = text.split("di_inv: mass, action_factor -1\n\n")[1].split("\n\n")[0]
    assert panel.startswith("| method | seeds | train range | extrapolation range | beyond |")
    masses = np.geomspace(0.1 / 4, 2 * 4, unseen.POINTS)
    trained = (0.5 <= masses) & (masses <= 1.5)
    near = (0.1 <= masses) & (masses <= 2) & ~trained
    means = [1000 + masses[part].mean() for part in (trained, near, ~trained & ~near)]
    for method, seeds, seed in (("DR", 2, 2), ("DA", 1, 1)):  # the mean of seeds 1 and 3
        cells = " | ".join(f"{seed * mean:.1f}" for mean in means)
        assert f"| {method} | {seeds} | {cells} |" in panel
    strengths = text.split("di_inv: action_factor\n")[1]
    assert "| ±0 | ±0.1 | ±0.25 | ±0.5 | ±1 | ±1.5 | ±2 |" in strengths
    assert "| DA | 1 | 1.0 | 1.0 | 1.0 | 1.0 | 501.0 | 1.0 | 1.0 |" in strengths
    for row in table(tmp_path / "beyond_di_inv.csv"):
        assert float(row["diverged"]) == (float(row["return"]) < 1)


def test_bad_input_is_one_line(tmp_path, capsys):
    make_run(tmp_path / "runs", "di_inv", "dr", 1, 60)
    for words, message in (
        ("repot", "invalid choice: 'repot'"),
        (f"report {tmp_path}/runs --out x", "no finished run of di_signs_without_pp, "),
    ):
        said = refusal(unseen, words.split(), capsys)
        assert said.startswith("unseen.py: error: ") and message in said
