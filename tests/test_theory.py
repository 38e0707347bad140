"""Tests of studies/theory.py: each theorem as an assertion, on small settings."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "studies")]
import theory  # noqa: E402

import dmash  # noqa: E402


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By theorem: its numbers, in order, and the panels of its figure."""
    cfg = dmash.Config(env="di_inv", contexts=4, hidden=32, hyper_hidden=8, threads=1)
    run = dmash.Run(cfg, tmp_path_factory.mktemp("run"))
    with dmash.lock(run.folder) as run.inode:
        run.save()
    found = {}
    for name, theorem in {
        "a1": partial(theory.a1, steps=200, n=129),
        "a2": theory.a2,
        "a5": partial(theory.a5, steps=600, m=4, restarts=4),
        "a6": partial(theory.a6, steps=300, networks=2, n=2000),
        "a15": partial(theory.a15, run=run.folder, steps=140, n=300),
        "a17": partial(theory.a17, steps=(0, 200), n=30),
    }.items():
        torch.manual_seed(0)
        numbers, panels = theorem(0)
        found[name] = (list(numbers.values()), panels)
    return found


@pytest.fixture
def numbers(results):
    return {name: values for name, (values, panels) in results.items()}


def test_a1_an_adapter_is_the_product_and_a_network_on_s_and_z_errs_by_its_pieces(numbers):
    exact, pieces, inside, mean, ratio = numbers["a1"]
    # One of the two units is 0 and the other ±s, which float32 multiplies by z as s·z itself.
    assert exact == 0
    assert pieces > 10
    assert inside < 1e-9  # rounding, 1e-16, divided by δ² = 2e-4, of a few sums
    assert 0.5 < mean < 1.5  # the corners of the whole square are fitted: the edges bend
    assert ratio > 1 - 1e-9


def test_the_best_affine_fit_of_the_product_misses_a_quarter_of_the_squared_side():
    delta = 0.3
    line = 0.7 + delta * np.linspace(0, 1, 31)
    u, v = np.stack(np.meshgrid(line, line)).reshape(2, -1)
    affine = np.stack([u, v, np.ones_like(u)], 1)
    best = np.linalg.lstsq(affine, u * v, rcond=None)[0]
    assert np.abs(affine @ best - u * v).max() == pytest.approx(delta**2 / 4, abs=1e-12)
    for change in np.random.default_rng(0).normal(size=(1000, 3)) * 0.01:
        assert np.abs(affine @ (best + change) - u * v).max() > delta**2 / 4


def test_a2_inversion_and_permutation_are_adapters(numbers):
    inverted, swapped, policy_flipped, policy_swapped, as_drawn = numbers["a2"]
    assert inverted == 0  # x - 2x rounds nothing
    assert max(swapped, policy_flipped, policy_swapped) < 1e-5  # float32, sums of 64 numbers
    assert as_drawn > 0.1


def test_a5_a_bottleneck_passes_its_width_and_no_more(numbers):
    ranks, near, far = numbers["a5"]
    assert ranks[:3] == [1, 2, 4]
    assert (np.array(ranks) <= [1, 2, 4, 8, 16, 32]).all()
    floor = np.maximum(1 - np.arange(1, 9) / 4, 0)
    assert (np.array(near) > 0.98 * floor).all()  # second moments of 20,000 numbers: 1 %
    assert near[3] < 0.1 < near[2]  # m units do in the range,
    assert far[3] > 0.1  # but not beyond it


def test_a6_equal_parameters_and_noise_that_reaches_the_output_in_proportion(numbers):
    adapted, concatenated = numbers["a6"][0]
    assert abs(concatenated / adapted - 1) < 0.02
    for errors in numbers["a6"][6::2]:  # of −1 ≤ z ≤ 1: adapter and concatenation, (σ, networks)
        assert errors.diff(dim=0).min() > 0
        assert errors[0].max() < 0.05
        expected = 0.3 * 0.5 * (2 / np.pi) ** 0.5  # of s·z at σ = .3: σ E|s| E|ε|
        assert errors[4].mean().item() == pytest.approx(expected, rel=0.15)


def test_a15_holds_for_codes_of_windows(numbers):
    for *parts, left in numbers["a15"]:
        assert min(parts) > 0
        assert abs(left) < 1e-12


def test_a17_the_bound_holds_and_is_lower_without_noise_and_without_u(numbers):
    of_z, of_mean = numbers["a17"][0]
    assert of_mean == pytest.approx(1)
    assert of_z == pytest.approx(1 + 2 * 0.25 * 0.5)  # the variance of five even values is .5
    explained = []  # share of the variance that the code explains at the start
    for i in (1, 7):  # U without effect, with one
        variance, inner, bound, variance2, inner2, bound2 = numbers["a17"][i : i + 6]
        assert (inner < variance).all() and (variance <= bound).all()  # of Z
        assert (inner2 < variance2).all() and (variance2 <= bound2).all()  # of its mean per mode
        assert (bound2 < bound).all()
        explained += [1 - inner[0] / variance[0], 1 - inner2[0] / variance2[0]]
    # V₀ is no constant: with the mean per mode, what Z told of U becomes a part of it.
    assert explained[3] < 0.7 * explained[2]


# ---- The program --------------------------------------------------------------------------------


def test_a_figure_of_each_theorem(results, tmp_path):
    pytest.importorskip("matplotlib")
    for name, (_, panels) in results.items():
        theory.draw(panels).savefig(tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 5000, name


def test_numbers_are_printed_and_written_also_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert theory.main(["a2", "--out", str(tmp_path), "--seed", "0"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["theory.txt"]
    text = (tmp_path / "theory.txt").read_text(encoding="utf-8")
    said = capsys.readouterr().out
    assert text.split("\n")[0] == "a2" and "no figure is drawn" in said
    torch.manual_seed(0)
    numbers, _ = theory.a2(0)
    for what, x in numbers.items():
        assert f"    {what}: {x:.3g}\n" in text and f"    {what}: {x:.3g}\n" in said
    assert (theory.TRAINED / "policy.pt").is_file()  # which a15 reads


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["a7"], "'a7'"),
        (["--seed", "x"], "--seed x"),
        (["--what"], "--what"),
        (["a2", "--out", __file__], __file__),
    ],
)
def test_bad_input_gets_one_line(arguments, named, capsys):
    assert theory.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("theory.py: error: ") and named in said.err
