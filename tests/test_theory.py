"""Tests of studies/theory.py: each theorem as an assertion, on small settings."""

from functools import partial

import numpy as np
import pytest
import theory
import torch
from untrained import refusal, save_untrained, succeed


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_a1_an_adapter_is_the_product_and_a_network_on_s_and_z_errs_by_its_pieces():
    numbers, _ = theory.a1(0, steps=200, n=129)
    exact, pieces, inside, mean, ratio = numbers.values()
    # One of the two units is 0 and the other ±s, which float32 multiplies by z as s·z itself.
    assert exact == 0
    assert pieces > 10
    assert inside < 1e-9  # rounding, 1e-16, divided by δ² = 2e-4, of a few sums
    assert 0.5 < mean < 1.5  # the corners of the whole square are fitted: the edges bend
    assert ratio > 1 - 1e-9


def test_a2_inversion_and_permutation_are_adapters():
    numbers, _ = theory.a2(0)
    inverted, swapped, policy_flipped, policy_swapped, as_drawn = numbers.values()
    assert inverted == 0  # x - 2x rounds nothing
    assert max(swapped, policy_flipped, policy_swapped) < 1e-5  # float32, sums of 64 numbers
    assert as_drawn > 0.1


def test_a5_a_bottleneck_passes_its_width_and_no_more():
    numbers, _ = theory.a5(0, steps=600, m=4, restarts=4)
    ranks, near, far = numbers.values()
    assert ranks[:3] == [1, 2, 4]
    assert (np.array(ranks) <= [1, 2, 4, 8, 16, 32]).all()
    floor = np.maximum(1 - np.arange(1, 9) / 4, 0)
    assert (np.array(near) > 0.98 * floor).all()  # second moments of 20,000 numbers: 1 %
    assert near[3] < 0.1 < near[2]  # m units do in the range,
    assert far[3] > 0.1  # but not beyond it


def test_a6_equal_parameters_and_noise_that_reaches_the_output_in_proportion():
    numbers, _ = theory.a6(0, steps=300, networks=2, n=2000)
    (adapted, concatenated), *found = numbers.values()
    assert abs(concatenated / adapted - 1) < 0.02
    for errors in found[5::2]:  # of −1 ≤ z ≤ 1: adapter and concatenation, (σ, networks)
        assert errors.diff(dim=0).min() > 0
        assert errors[0].max() < 0.05
        expected = 0.3 * 0.5 * (2 / np.pi) ** 0.5  # of s·z at σ = .3: σ E|s| E|ε|
        assert errors[4].mean().item() == pytest.approx(expected, rel=0.15)


def test_a15_holds_for_codes_of_windows(tmp_path):
    run = save_untrained(tmp_path, "dma_star_sh")
    numbers, _ = theory.a15(0, run, steps=140, n=300)
    for *parts, left in numbers.values():
        assert min(parts) > 0
        assert abs(left) < 1e-12


def test_a17_the_bound_holds_and_is_lower_without_noise_and_without_u():
    numbers, _ = theory.a17(0, steps=(0, 200), n=30)
    (of_z, of_mean), *found = numbers.values()
    assert of_mean == pytest.approx(1)
    assert of_z == pytest.approx(1 + 2 * 0.25 * 0.5)  # the variance of five even values is .5
    explained = []  # share of the variance that the code explains at the start
    for numbers in (found[:6], found[6:]):  # U without effect, with one
        variance, inner, bound, variance2, inner2, bound2 = numbers
        assert (inner < variance).all() and (variance <= bound).all()  # of Z
        assert (inner2 < variance2).all() and (variance2 <= bound2).all()  # of its mean per mode
        assert (bound2 < bound).all()
        explained += [1 - inner[0] / variance[0], 1 - inner2[0] / variance2[0]]
    # V₀ is no constant: with the mean per mode, what Z told of U becomes a part of it.
    assert explained[3] < 0.7 * explained[2]


# ---- The program --------------------------------------------------------------------------------


def test_numbers_are_printed_and_figures_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    two = {"a1": partial(theory.a1, steps=5), "a2": theory.a2}
    monkeypatch.setattr(theory, "THEOREMS", two)
    succeed(theory, "--out", tmp_path, "--seed", 0)
    assert (tmp_path / "a1.png").stat().st_size > 5000
    torch.manual_seed(0)
    numbers, _ = theory.a2(0)
    lines = [f"    {what}: {x:.3g}" for what, x in numbers.items()]
    assert capsys.readouterr().out.split("\n\n")[1].splitlines() == ["a2", *lines]
    assert (theory.TRAINED / "policy.pt").is_file()  # which a15 reads


def test_bad_input_gets_one_line(capsys):
    for arguments, named in (
        (["a7"], "'a7'"),
        (["--seed", "x"], "--seed x"),
        (["a2", "--out", __file__], __file__),
    ):
        assert named in refusal(theory, arguments, capsys)
