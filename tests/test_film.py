"""Tests of studies/film.py, with small agents that were never trained."""

import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "studies")]
import film  # noqa: E402
from untrained import refusal, save_untrained, untrained  # noqa: E402

import aib_envs  # noqa: E402
import dmash  # noqa: E402


@pytest.fixture
def saved(tmp_path):
    return functools.partial(save_untrained, tmp_path)


# ---- The film -----------------------------------------------------------------------------------


def test_outline_is_at_the_radius_from_the_line():
    start, end = np.array([1.0, 2.0]), np.array([4.0, 6.0])
    points = film.outline(aib_envs.Shape(start, end, 0.5, aib_envs.RED))
    along = np.clip((points - start) @ (end - start) / 25, 0, 1)[:, None]
    np.testing.assert_allclose(np.linalg.norm(points - start - along * (end - start), axis=-1), 0.5)
    assert points.min(0) == pytest.approx([0.5, 1.5], abs=0.02) and points.max(0) == pytest.approx(
        [4.5, 6.5], abs=0.02
    )
    disc = film.outline(aib_envs.Shape(start, start, 0.5, aib_envs.RED))
    np.testing.assert_allclose(np.linalg.norm(disc - start, axis=-1), 0.5)


def test_a_film_shows_the_switch_and_holds_still(saved, tmp_path, monkeypatch, capsys):
    from PIL import Image

    films, shoot = [], film.shoot
    monkeypatch.setattr(film, "shoot", lambda *args: films.append(shoot(*args)) or films[-1])
    path = tmp_path / "new" / "film.gif"
    assert film.main([str(saved("dma_star_sh")), "--out", str(path), "--seconds", "0.6"]) == 0
    said = capsys.readouterr().out
    assert "normal, mass 1: return" in said and "then inverted, mass 1, ω frozen: " in said
    (shot,) = films
    assert shot.z.shape == (6, 3, 8) and shot.a.shape == (6, 3, 2) and shot.r.shape == (6, 3)
    signs = [[context["action_factor"] for context in row] for row in shot.contexts]
    assert signs == [[1, -1, 1]] * 3 + [[-1, 1, -1]] * 3
    gif = Image.open(path)
    assert gif.n_frames == 6 and gif.info["loop"] == 0 and gif.size[0] == 1200
    pictures = []
    for i in range(6):
        gif.seek(i)
        pictures.append(np.asarray(gif.convert("RGB")).astype(int))
    assert len(np.unique(pictures[0][:25].reshape(-1, 3), axis=0)) > 1  # the heading
    for a in pictures[1:]:
        assert (a[:25] == pictures[0][:25]).all() and (
            a[-20:] == pictures[0][-20:]
        ).all()  # heading, axes' labels
    modes = [(0, 114, 178)] * 3 + [(213, 94, 0)] * 3  # COLOURS[0] and [1], up to the palette
    for half, expected in ((slice(0, 400), modes), (slice(440, 800), modes[::-1])):
        for picture, colour in zip(pictures, expected):
            across = picture[
                160, half
            ]  # the first that is not white on a line across is the picture's left edge
            edge = across[np.argmax(across.sum(-1) < 500) + 1]
            assert np.abs(edge - colour).max() < 40, (edge, colour)


@pytest.mark.parametrize("method, there", [("dma_star_sh", True), ("dr", False), ("concat", False)])
def test_a_film_has_z_where_the_agent_infers_it(method, there):
    shot = film.shoot(
        untrained(method, "walker", K=2),
        [{"gravity": g, "actuator_strength": 1.0} for g in (5.0, 14.0)],
        2,
        0,
    )
    assert (shot.z is not None) == there
    corners = film.boxes(shot, ratio=1.5)
    assert corners.shape == (2, 2, 2, 2)
    (width, height) = (corners[..., 1, :] - corners[..., 0, :])[0, 0]
    assert width == pytest.approx(1.5 * height)


def test_what_goes_far_is_followed():
    def view(x):
        return aib_envs.View(np.array([x, 0.0]), 2.0)

    def body(x):
        return [aib_envs.Shape(np.array([x, 0.0]), np.array([x, 1.0]), 0.1, aib_envs.RED)]

    pictures = [[(view(x), body(x))] for x in (0.0, 5.0)]
    shot = film.Film([[{}]] * 2, pictures, None, np.zeros((2, 1, 1)), np.zeros((2, 1)))
    assert film.boxes(shot, 1.0).mean(-2)[:, 0, 0].tolist() == [0, 5]
    near = shot._replace(pictures=[[(view(x), body(x))] for x in (0.0, 1.0)])
    assert film.boxes(near, 1.0).mean(-2)[:, 0, 0].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("method", ["dma_star_sh", "dma_star"])
def test_omega_of_the_last_column_is_frozen_at_the_switch(method, monkeypatch):
    """It acts as the first column does up to the switch, and then on the last ω before it."""
    agent = untrained(method, "cartpole_inv", K=8)
    contexts = film.contexts_from(None, "cartpole_inv")
    contexts.append(contexts[0])
    used = []
    act = agent.act

    def noting(s, omega, noisy):
        used.append((s, omega.b_up.flatten(1) if method == "dma_star_sh" else omega))
        return act(s, omega, noisy)

    monkeypatch.setattr(agent, "act", noting)
    shot = film.shoot(agent, contexts, 20, 0, freeze=True)
    s, omega = (torch.stack(values) for values in zip(*used[8:]))  # after the warm-up
    assert torch.equal(omega[:10, 0], omega[:10, 2]) and (shot.a[:10, 0] == shot.a[:10, 2]).all()
    assert (omega[10:, 2] == omega[9, 2]).all() and not torch.equal(omega[9, 0], omega[10, 0])
    assert len({tuple(row.tolist()) for row in omega[10:, 0]}) == 10
    inferred = film.shoot(agent, contexts, 20, 0)
    assert (inferred.a[:, 0] == inferred.a[:, 2]).all() and (
        inferred.a[:, :2] == shot.a[:, :2]
    ).all()


def test_poles_start_tilted_and_are_pushed(monkeypatch):
    monkeypatch.setattr(film, "EVERY", 4)
    seen = []
    step = dmash.Rollout.step

    def noting(rollout, random=False):
        seen.append((rollout.envs.task.state(), rollout.s.numpy()))
        result = step(rollout, random)
        seen.append((rollout.envs.task.state(), rollout.s.numpy()))
        return result

    monkeypatch.setattr(dmash.Rollout, "step", noting)
    contexts = film.contexts_from(None, "cartpole_inv")
    film.shoot(untrained("dr", "cartpole_inv", K=2), contexts, 10, 0)
    del seen[:4]  # the warm-up
    state, s = seen[0]
    np.testing.assert_allclose(state, [film.START["cartpole_inv"]] * 2)
    np.testing.assert_allclose(np.arctan2(s[:, 2], s[:, 1]), film.START["cartpole_inv"][1], 1e-5)
    for t in range(1, 10):
        (before, _), (after, s) = seen[2 * t - 1 : 2 * t + 1]
        push = {3: 1, 7: -1}.get(t, 0) * np.array(film.PUSH["cartpole_inv"])
        np.testing.assert_allclose(after - before, [push] * 2, atol=1e-9)
        np.testing.assert_allclose(s[:, 4], after[:, 3], rtol=1e-4, atol=1e-6)


def test_a_film_needs_matplotlib(saved, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib" in refusal(film, [saved("dr")], capsys)


def test_bad_input_is_refused_in_one_line(saved, tmp_path, capsys):
    di, friction = saved("dr"), saved("dr", "di_friction")
    assert "nowhere" in refusal(film, [tmp_path / "nowhere"], capsys)
    assert "mess" in refusal(film, [di, "--contexts", "mess=1"], capsys)
    assert "x" in refusal(film, [di, "--contexts", "mass=x"], capsys)
    said = refusal(film, [friction, "--contexts", "mass=2"], capsys)  # whose mirror image has none
    assert "mass=0.0: must be" in said
    assert "up to 4" in refusal(film, [di, "--contexts", *["mass=1"] * 5], capsys)
    assert "--seconds 99" in refusal(film, [di, "--seconds", 99], capsys)
    assert "--seed -1" in refusal(film, [di, "--seed", -1], capsys)
    assert ".gif" in refusal(film, [di, "--out", "film.mp4"], capsys)
    (tmp_path / "file").touch()
    assert "file" in refusal(film, [di, "--out", tmp_path / "file/film.gif"], capsys)
