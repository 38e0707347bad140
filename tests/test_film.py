"""Tests of studies/film.py, with small agents that were never trained."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "studies"))
import film  # noqa: E402
from untrained import refusal, save_untrained, untrained  # noqa: E402

import aib_envs  # noqa: E402
import dmash  # noqa: E402


def test_outline_is_at_the_radius_from_the_line():
    start = np.array([1.0, 2.0])
    end = np.array([4.0, 6.0])
    points = film.outline(aib_envs.Shape(start, end, 0.5, aib_envs.RED))
    along = np.clip((points - start) @ (end - start) / 25, 0, 1)[:, None]
    nearest = start + along * (end - start)
    distances = np.linalg.norm(points - nearest, axis=-1)
    np.testing.assert_allclose(distances, 0.5)
    assert points.min(0) == pytest.approx([0.5, 1.5], abs=0.02)
    assert points.max(0) == pytest.approx([4.5, 6.5], abs=0.02)


def test_a_film_shows_the_switch_and_holds_still(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(film, "STEPS", 6)
    run = save_untrained(tmp_path, "dma_star_sh")
    path = tmp_path / "new" / "film.gif"
    assert film.main([str(run), "--out", str(path)]) == 0
    said = capsys.readouterr().out
    assert "normal, mass 1: return" in said
    assert "then inverted, mass 1, ω frozen: " in said
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


@pytest.mark.parametrize("method, there", [("dma_star_sh", True), ("dr", False)])
def test_a_film_has_z_where_the_agent_infers_it(method, there):
    contexts = [{"gravity": g, "actuator_strength": 1.0} for g in (5.0, 14.0)]
    shot = film.shoot(untrained(method, "walker", K=2), contexts, 2)
    assert (shot.z is not None) == there
    corners = film.boxes(shot, ratio=1.5)
    assert corners.shape == (2, 2, 2, 2)
    width, height = (corners[..., 1, :] - corners[..., 0, :])[0, 0]
    assert width == pytest.approx(1.5 * height)


def test_what_goes_far_is_followed():
    def centres(*places):
        pictures = []
        for x in places:
            foot, head = np.array([[x, 0.0], [x, 1.0]])
            view = aib_envs.View(foot, 2.0)
            body = aib_envs.Shape(foot, head, 0.1, aib_envs.RED)
            pictures.append([(view, [body])])
        shot = film.Film(None, pictures, None, None, r=np.zeros((2, 1)))
        corners = film.boxes(shot, 1.0)
        return corners.mean(-2)[:, 0, 0].tolist()

    assert centres(0.0, 5.0) == [0, 5]
    assert centres(0.0, 1.0) == [0.5, 0.5]


@pytest.mark.parametrize("method", ["dma_star_sh", "dma_star"])
def test_omega_of_the_last_column_is_frozen_at_the_switch(method, monkeypatch):
    """It acts as the first column does up to the switch, and then on the last ω before it."""
    agent = untrained(method, "cartpole_inv", K=8)
    contexts = film.both_contexts("cartpole_inv")
    contexts.append(contexts[0])
    used = []
    act = agent.act

    def noting(s, omega, noisy):
        rows = omega
        if method == "dma_star_sh":
            rows = omega.b_up.flatten(1)
        used.append(rows)
        return act(s, omega, noisy)

    monkeypatch.setattr(agent, "act", noting)
    frozen = film.shoot(agent, contexts, 20, freeze=True)
    signs = [[context["action_factor"] for context in row] for row in frozen.contexts]
    assert signs == [[1, -1, 1]] * 10 + [[-1, 1, -1]] * 10
    omega = torch.stack(used[8:])  # after the warm-up
    assert torch.equal(omega[:10, 0], omega[:10, 2])
    assert (omega[10:, 2] == omega[9, 2]).all()
    assert len(omega[9:, 0].unique(dim=0)) == 11
    inferred = film.shoot(agent, contexts, 20)
    assert (frozen.a[:10, 0] == frozen.a[:10, 2]).all()
    assert (inferred.a[:, 0] == inferred.a[:, 2]).all()
    assert (inferred.a[:, :2] == frozen.a[:, :2]).all()


def test_poles_start_tilted_and_are_pushed(monkeypatch):
    monkeypatch.setattr(film, "EVERY", 4)
    seen = []
    step = dmash.Rollout.step

    def noting(rollout, random=False):
        before = rollout.envs.task.state(), rollout.s.numpy()
        result = step(rollout, random)
        seen.append((*before, rollout.envs.task.state()))
        return result

    monkeypatch.setattr(dmash.Rollout, "step", noting)
    contexts = film.both_contexts("cartpole_inv")
    film.shoot(untrained("dr", "cartpole_inv", K=2), contexts, 10)
    episode = seen[2:]  # after the warm-up
    after = np.array([film.START["cartpole_inv"]] * 2)
    push = np.array(film.PUSH["cartpole_inv"])
    for t, (before, s, after_step) in enumerate(episode):
        sign = {3: 1, 7: -1}.get(t, 0)
        np.testing.assert_allclose(before - after, [sign * push] * 2, atol=1e-9)
        angle = np.arctan2(s[:, 2], s[:, 1])
        speed = s[:, 4]
        np.testing.assert_allclose(angle, before[:, 1], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(speed, before[:, 3], rtol=1e-4, atol=1e-6)
        after = after_step


def test_without_modes_the_contexts_are_the_ends_of_the_train_range():
    gravities = [context["gravity"] for context in film.both_contexts("walker")]
    assert gravities == pytest.approx([4.91, 14.71])


def test_bad_input_is_refused_in_one_line(tmp_path, capsys):
    di = save_untrained(tmp_path, "dr")
    assert "nowhere" in refusal(film, [tmp_path / "nowhere"], capsys)
    assert ".gif" in refusal(film, [di, "--out", "film.mp4"], capsys)
    assert "policy.pt" in refusal(film, [di, "--out", di / "policy.pt/film.gif"], capsys)
