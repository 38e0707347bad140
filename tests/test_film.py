"""Tests of studies/film.py, with small agents that were never trained."""

import film
import numpy as np
import pytest
import torch
from PIL import Image
from untrained import refusal, save_untrained, succeed, untrained

import aib_envs


def test_outline_is_at_the_radius_from_the_line():
    start = np.array([1.0, 2.0])
    end = np.array([4.0, 6.0])
    points = film.outline(aib_envs.Shape(start, end, 0.5, aib_envs.RED))
    along = np.clip((points - start) @ (end - start) / 25, 0, 1)
    nearest = start + along[:, None] * (end - start)
    assert np.linalg.norm(points - nearest, axis=-1) == pytest.approx(0.5)
    assert np.ptp(points, axis=0) == pytest.approx([4, 5], abs=0.04)  # round at both ends


def test_a_film_shows_the_switch_and_holds_still(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(film, "STEPS", 6)
    run = save_untrained(tmp_path, "dma_star_sh")
    path = tmp_path / "new" / "film.gif"
    succeed(film, run, "--out", path)
    said = capsys.readouterr().out
    assert "mass 1, not inverted: return" in said
    assert "then mass 1, inverted, ω frozen: " in said
    gif = Image.open(path)
    assert gif.n_frames == 6
    assert gif.info["loop"] == 0
    assert gif.size[0] == 1200
    pictures = []
    for i in range(6):
        gif.seek(i)
        pictures.append(np.asarray(gif.convert("RGB")).astype(int))
    for still in (slice(0, 25), slice(-20, None)):  # the heading, and the labels of the axes
        parts = [picture[still] for picture in pictures]
        assert np.ptp(parts, axis=0).max() == 0
        assert np.ptp(parts[0]) > 0
    modes = [(0, 114, 178)] * 3 + [(213, 94, 0)] * 3  # COLOURS[0] and [1], up to the palette
    for half, expected in ((slice(0, 400), modes), (slice(440, 800), modes[::-1])):
        for picture, colour in zip(pictures, expected):
            # The first that is not white on a line across is the picture's left edge.
            across = picture[160, half]
            edge = across[np.argmax(across.sum(-1) < 500) + 1]
            assert np.abs(edge - colour).max() < 40, (edge, colour)


def test_a_film_of_an_agent_that_infers_nothing_has_two_columns_and_no_z(tmp_path, monkeypatch):
    monkeypatch.setattr(film, "STEPS", 2)
    path = tmp_path / "film.gif"
    succeed(film, save_untrained(tmp_path, "dr"), "--out", path)
    assert Image.open(path).size == (900, 540)


@pytest.mark.parametrize("x, centres", [(5.0, [0, 5]), (1.0, [0.5, 0.5])])
def test_what_goes_far_is_followed(x, centres):
    pictures = []
    for foot in np.array([[0, 0], [x, 0]]):
        body = aib_envs.Shape(foot, foot + [0, 1], 0.1, aib_envs.RED)
        pictures.append([(aib_envs.View(foot, 2.0), [body])])
    shot = film.Film(0.01, None, pictures, None, None, r=np.zeros((2, 1)))
    corners = film.boxes(shot, ratio=1.5)[:, 0]
    assert corners.mean(1)[:, 0] == pytest.approx(centres)
    width, height = corners[0, 1] - corners[0, 0]
    assert width == pytest.approx(1.5 * height)


@pytest.mark.parametrize("method", ["dma_star_sh", "dma_star"])
def test_omega_of_the_last_column_is_frozen_at_the_switch(method, monkeypatch):
    """It acts as the first column does up to the switch, and then on the last ω before it."""
    agent = untrained(method, "cartpole_inv", K=8)
    contexts = film.both_contexts("cartpole_inv")
    contexts.append(contexts[0])
    used = []
    act = agent.act

    def noting(s, omega, noisy):
        used.append(omega if method == "dma_star" else omega.b_up[:, 0])
        return act(s, omega, noisy)

    monkeypatch.setattr(agent, "act", noting)
    frozen = film.shoot(agent, contexts, 20, freeze=True)
    omega = torch.stack(used[8:])  # after the warm-up
    assert torch.equal(omega[:10, 0], omega[:10, 2])
    assert (omega[10:, 2] == omega[9, 2]).all()
    assert len(omega[9:, 0].unique(dim=0)) == 11
    inferred = film.shoot(agent, contexts, 20)
    assert (inferred.a[:, 0] == inferred.a[:, 2]).all()
    assert (inferred.a[:, :2] == frozen.a[:, :2]).all()


def test_poles_start_tilted_and_are_pushed(seen, monkeypatch):
    monkeypatch.setattr(film, "EVERY", 4)
    puts = []
    put = film.put

    def noting(rollout, state):
        task = rollout.envs.task
        before = task.state()
        put(rollout, state)
        after, s = task.state(), rollout.s.numpy()
        puts.append((len(seen), after, after - before))
        assert np.arctan2(s[:, 2], s[:, 1]) == pytest.approx(after[:, 1], abs=1e-6)
        assert s[:, 4] == pytest.approx(after[:, 3], abs=1e-6)

    monkeypatch.setattr(film, "put", noting)
    contexts = film.both_contexts("cartpole_inv")
    film.shoot(untrained("dr", "cartpole_inv", K=2), contexts, 10)
    (t0, first, _), (t1, _, push), (t2, _, back) = puts
    assert (t0, t1, t2) == (2, 5, 9)  # a warm-up of two steps, then before steps 0, 3 and 7
    assert (first == film.START).all()
    assert np.allclose([push, -back], film.PUSH, rtol=0)


def test_without_modes_the_contexts_are_the_ends_of_the_train_range():
    gravities = [context["gravity"] for context in film.both_contexts("walker")]
    assert gravities == pytest.approx([4.91, 14.71])


def test_bad_input_is_refused_in_one_line(tmp_path, capsys):
    di = save_untrained(tmp_path, "dr")
    assert "nowhere" in refusal(film, [tmp_path / "nowhere"], capsys)
    assert ".gif" in refusal(film, [di, "--out", "film.mp4"], capsys)
    pendulum = save_untrained(tmp_path, "dr", "gymnasium:Pendulum-v1")
    assert "has no picture" in refusal(film, [pendulum], capsys)
