"""Tests of studies/theory.py: each theorem as an assertion, on small settings."""

import sys
from functools import partial

import numpy as np
import pytest
import theory
import torch

TINY = dict(
    a1=partial(theory.a1, steps=200, n=129),
    a2=theory.a2,
    a5=partial(theory.a5, steps=600, m=4, restarts=4),
    a6=partial(theory.a6, steps=300, networks=2, n=2000),
    a15=partial(theory.a15, steps=140, n=300),
    a17=partial(theory.a17, steps=(0, 200), n=30),
)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """What a run of the program with small settings writes, and the numbers of each theorem, in order."""
    out, found = tmp_path_factory.mktemp("theory"), {}

    def keeping(name, seed):
        numbers, panels = TINY[name](seed)
        found[name] = list(numbers.values())
        return numbers, panels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theory, "THEOREMS", {name: partial(keeping, name) for name in TINY})
        patch.setattr(torch, "set_num_threads", lambda n: None)
        assert theory.main(["--out", str(out), "--seed", "0"]) == 0
    return found | {"out": out}


def test_the_program_writes_the_text_and_a_figure_of_each_theorem(numbers):
    pytest.importorskip("matplotlib")
    text = (numbers["out"] / "theory.txt").read_text(encoding="utf-8")
    assert [block.split()[0] for block in text.strip().split("\n\n")] == list(TINY)
    for name in TINY:
        assert (numbers["out"] / f"{name}.png").stat().st_size > 5000, name


def test_a1_an_adapter_is_the_product_and_a_network_on_s_and_z_errs_by_its_pieces(numbers):
    exact, pieces, inside, mean, ratio = numbers["a1"]
    assert exact == 0  # one of the two units is 0 and the other ±s, which float32 multiplies by z like s·z itself
    assert pieces > 10 and inside < 1e-9  # rounding, 1e-16, divided by δ² = 2e-4, of a few sums
    assert 0.5 < mean < 1.5  # the corners of the whole square are fitted: the bend is there, on the edges
    assert ratio > 1 - 1e-9


def test_the_best_affine_fit_of_the_product_misses_a_quarter_of_the_squared_side():
    delta = 0.3
    u, v = (0.7 + delta * np.stack(np.meshgrid(*2 * [np.linspace(0, 1, 31)]))).reshape(2, -1)
    affine = np.stack([u, v, np.ones_like(u)], 1)
    best = np.linalg.lstsq(affine, u * v, rcond=None)[0]
    assert np.abs(affine @ best - u * v).max() == pytest.approx(delta**2 / 4, abs=1e-12)
    for change in np.random.default_rng(0).normal(size=(1000, 3)) * 0.01:
        assert np.abs(affine @ (best + change) - u * v).max() > delta**2 / 4


def test_a2_inversion_and_permutation_are_adapters(numbers):
    inverted, swapped, policy_flipped, policy_swapped, as_drawn = numbers["a2"]
    assert inverted == 0  # x - 2x rounds nothing
    assert max(swapped, policy_flipped, policy_swapped) < 1e-5  # float32, sums of 64 numbers of order 1
    assert as_drawn > 0.1


def test_a5_a_bottleneck_passes_its_width_and_no_more(numbers):
    ranks, near, far = numbers["a5"]
    assert all(rank <= k for rank, k in zip(ranks, [1, 2, 4, 8, 16, 32])) and ranks[:3] == [1, 2, 4]
    floor = [max(1 - k / 4, 0) for k in range(1, 9)]
    assert all(x > 0.98 * least for x, least in zip(near, floor))  # second moments of 20,000 numbers: 1 %
    assert near[3] < 0.1 < near[2] and far[3] > 0.1  # m units do in the range, not beyond it


def test_a6_equal_parameters_and_noise_that_reaches_the_output_in_proportion(numbers):
    adapted, concatenated = numbers["a6"][0]
    assert abs(concatenated / adapted - 1) < 0.02
    for errors in numbers["a6"][6::2]:  # −1 ≤ z ≤ 1, adapter and concatenation, (σ, networks)
        assert errors.diff(dim=0).min() > 0 and errors[0].max() < 0.05
        expected = 0.3 * 0.5 * (2 / np.pi) ** 0.5  # of s·z at σ = .3: σ E|s| E|ε|
        assert errors[4].mean().item() == pytest.approx(expected, rel=0.15)


def test_a15_holds_for_codes_of_windows(numbers):
    for total, within, spread, between, left in numbers["a15"]:
        assert min(total, within, spread, between) > 0 and abs(left) < 1e-12


def test_a17_the_bound_holds_and_is_lower_without_noise_and_without_u(numbers):
    (of_z, of_mean), *rows = numbers["a17"]
    assert of_mean == pytest.approx(1) and of_z == pytest.approx(1 + 2 * 0.25 * 0.5)  # var of 5 even values: .5
    for i in range(0, 12, 6):  # U without effect, with: of Z, then of its mean
        variance, inner, bound, variance2, inner2, bound2 = rows[i : i + 6]
        assert (variance <= bound).all() and (variance2 <= bound2).all() and (bound2 < bound).all()
        assert (inner < variance).all() and (inner2 < variance2).all()
    told = [1 - rows[i + 1][0] / rows[i][0] for i in (6, 9)]  # share of the variance that the code explains
    assert told[1] < 0.7 * told[0]  # V₀ is no constant: what Z told of U goes over into it


@pytest.mark.parametrize(
    "arguments, named",
    [(["a7"], "'a7'"), (["--seed", "x"], "--seed x"), (["--what"], "--what"), (["a2", "--out", __file__], __file__)],
)
def test_bad_input_gets_one_line(arguments, named, capsys):
    assert theory.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("theory.py: error: ")
    assert named in said.err


def test_without_matplotlib_the_numbers_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert theory.main(["a2", "--out", str(tmp_path)]) == 0
    assert "no figures are drawn" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["theory.txt"]
