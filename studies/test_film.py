"""Tests of film.py and adaptation.py, with small agents that were never trained."""

import csv
import math

import adaptation
import film
import numpy as np
import pytest
import torch

import aib_envs
import dmash

SMALL = dict(contexts=4, batch=16, threads=1, hidden=16, hyper_hidden=8, bottleneck=4, policy_average=0.01)


def untrained(method, env="di_inv", **settings):
    torch.manual_seed(0)
    agent = dmash.new_agent(dmash.Config(env=env, method=method, **SMALL | settings))
    agent.step = 0
    return agent


@pytest.fixture
def saved(tmp_path):
    """The folder of an untrained run of a method."""

    def save(method, env="di_inv"):
        cfg = dmash.Config(env=env, method=method, out=tmp_path, **SMALL)
        cfg.folder.mkdir()
        dmash.Run(cfg, cfg.folder).save()
        return cfg.folder

    return save


def refusal(program, arguments, capsys):
    """What a study says when it refuses arguments: one line, and exit status 2."""
    assert program.main(list(map(str, arguments))) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1, said
    return said.err


# ---- The switch -------------------------------------------------------------------------------------------------


def test_mirrored_is_the_other_mode_or_the_other_end_of_the_train_range():
    assert adaptation.mirrored("di_perm", {"mass": 1.2, "swap": 1.0}) == {"mass": 1.2, "swap": 0.0}
    assert adaptation.mirrored("ode", {"c0": -5.0, "c1": 2.0}) == {"c0": 5.0, "c1": 2.0}


@pytest.mark.parametrize("env", ["di_inv", "cartpole_inv", "reacher_hard_perm"])
def test_switch_is_what_set_context_does_and_a_second_one_undoes_it(env):
    agent, contexts = untrained("concat", env), aib_envs.context_sets(env, 4)["train"]
    steps = []
    for switches in (0, 1, 2):
        rollout = dmash.Rollout(agent, aib_envs.VectorEnv(env, contexts, seed=0), noisy=False)
        rollout.begin_episode(warm_up=False)
        rollout.step(), rollout.step()
        single = aib_envs.make(env, **contexts[1])
        single.reset(options={"state": rollout.envs.task.state()[1]})
        if hasattr(single.task, "target"):
            single.task.target = rollout.envs.task.target[1:2].copy()
        for _ in range(switches):
            adaptation.switch(rollout)
        if switches == 1:
            single.set_context(**adaptation.mirrored(env, contexts[1]))
        assert rollout.replay.c[1].tolist() == pytest.approx(list(single.context.values()))
        _, a, r, told = rollout.step()
        assert torch.equal(told, rollout.replay.c)
        s2, reward, *_ = single.step(a[1].numpy())
        np.testing.assert_allclose(rollout.s[1], s2, rtol=1e-5, atol=1e-6)
        assert r[1].item() == pytest.approx(reward, abs=1e-6)
        steps.append(rollout.s)
    assert torch.equal(steps[0], steps[2]) and not torch.equal(steps[0], steps[1])


def test_a_twin_has_the_window_of_its_mirror_image_and_the_state_of_the_switched(monkeypatch):
    agent, contexts = untrained("dma_star_sh"), aib_envs.context_sets("di_inv", 4)["train"]
    contexts += [adaptation.mirrored("di_inv", context) for context in contexts]
    read, states = {}, {}
    for after in ("switch", "twin"):
        seen, step = [], dmash.Rollout.step

        def spy(rollout, random=False):
            seen.append((rollout.envs.t, rollout.s, rollout.replay.latest(False)))
            return step(rollout, random)

        with monkeypatch.context() as patch:
            patch.setattr(dmash.Rollout, "step", spy)
            found = adaptation.rewards(agent, contexts, rollouts=2, after=after)
        assert found.shape == (50, 16)
        ((_, states[after], read[after]),) = [entry for entry in seen[agent.cfg.K :] if entry[0] == 50]
    assert torch.equal(states["switch"], states["twin"])
    mirror_image = [4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11]
    assert torch.equal(read["switch"][mirror_image], read["twin"])
    assert not torch.equal(read["switch"], read["twin"])


# ---- Short windows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 7, 24])
def test_a_short_window_is_that_of_a_replay_with_no_more_transitions(keep):
    K, L, d_s, d_a = 24, 4, 3, 2
    whole, few = adaptation.ShortReplay(torch.zeros(5, 1), K, d_s, d_a, K, L), None
    few, whole.keep = dmash.Replay(torch.zeros(5, 1), K, d_s, d_a, K, L), keep
    for t in range(40):
        transition = torch.randn(5, d_s), torch.randn(5, d_a), torch.randn(5), torch.randn(5, d_s)
        whole.add(*transition)
        if t >= 40 - keep:
            few.add(*transition)
    tau = whole.latest(noisy=False)
    assert torch.equal(tau, few.latest(noisy=False))
    assert adaptation.read(K, L, keep).sum() == (tau[0] != 0).any(-1).sum()


@pytest.mark.parametrize(
    "found, expected",
    [([1.0] * 40, 0), ([0.0] * 5 + [1.0] * 35, 14), ([1.0] * 20 + [0.9] * 20, math.inf), ([0.96] * 40, 0)],
)
def test_steps_to_counts_until_the_moving_mean_stays_at_95_percent(found, expected):
    assert adaptation.steps_to(np.array(found), np.ones(40)) == expected  # a zero leaves the mean after ten steps


def test_adaptation_writes_a_table_and_a_figure_and_the_controls_lose_nothing(saved, tmp_path, capsys):
    runs = [str(saved(method)) for method in ("dma_star_sh", "dr", "concat")]
    assert adaptation.main([*runs, "--out", str(tmp_path / "out")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    with open(tmp_path / "out/adaptation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert (tmp_path / "out/adaptation.png").stat().st_size > 10_000
    assert {row["mode"] for row in rows} == {"all", "action_factor=-1", "action_factor=1"}
    ks = [row["k"] for row in rows if row["method"] == "dma_star_sh" and row["mode"] == "all"]
    assert ks == ["", "", "0", "2", "4", "8", "16", "24"]
    for row in rows:
        if row["method"] != "dma_star_sh":
            assert float(row["lost"]) == 0 and row["steps"] in ("0", ""), row
        assert float(row["lost"]) == pytest.approx(50 * (float(row["reference"]) - float(row["reward"])), abs=1e-3)


def test_runs_of_several_lengths_of_window_have_lines_of_their_own(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    runs = []
    for K in (8, 12):
        cfg = dmash.Config(env="di_inv", method="dma_star", out=tmp_path / str(K), K=K, **SMALL)
        cfg.folder.mkdir(parents=True)
        dmash.Run(cfg, cfg.folder).save()
        runs.append(str(cfg.folder))
    assert adaptation.main([*runs, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/adaptation.png").exists()


def test_adaptation_of_an_environment_without_modes_goes_between_the_ends(monkeypatch):
    seen = []

    def rewards(agent, contexts, rollouts, **how):
        seen.append([context["gravity"] for context in contexts])
        return np.ones((250, len(contexts) * rollouts))

    monkeypatch.setattr(adaptation, "rewards", rewards)
    rows, _ = adaptation.study(untrained("dr", "walker"), rollouts=2)
    assert set(map(tuple, np.round(seen, 6))) == {(4.91, 14.71) * 2 + (14.71, 4.91) * 2}  # as many as trained on
    assert {row["mode"] for row in rows} == {"all", "gravity=4.91", "gravity=14.71"}


def test_without_matplotlib_numbers_are_written_and_a_film_is_refused(saved, tmp_path, monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.figure", "compare_figures"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    run = str(saved("dr"))
    assert adaptation.main([run, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/adaptation.csv").exists() and "no figure" in capsys.readouterr().out
    assert "matplotlib" in refusal(film, [run], capsys)


# ---- The film ---------------------------------------------------------------------------------------------------


def test_outline_is_at_the_radius_from_the_line():
    start, end = np.array([1.0, 2.0]), np.array([4.0, 6.0])
    points = film.outline(aib_envs.Shape(start, end, 0.5, aib_envs.RED))
    along = np.clip((points - start) @ (end - start) / 25, 0, 1)[:, None]
    np.testing.assert_allclose(np.linalg.norm(points - start - along * (end - start), axis=-1), 0.5)
    assert points.min(0) == pytest.approx([0.5, 1.5], abs=0.02) and points.max(0) == pytest.approx([4.5, 6.5], abs=0.02)
    disc = film.outline(aib_envs.Shape(start, start, 0.5, aib_envs.RED))
    np.testing.assert_allclose(np.linalg.norm(disc - start, axis=-1), 0.5)


def test_a_film_shows_the_switch_and_holds_still(saved, tmp_path, monkeypatch, capsys):
    from PIL import Image

    films, shoot = [], film.shoot
    monkeypatch.setattr(film, "shoot", lambda *args: films.append(shoot(*args)) or films[-1])
    path = tmp_path / "new" / "film.gif"
    assert film.main([str(saved("dma_star_sh")), "--out", str(path), "--seconds", "0.6"]) == 0
    assert "normal, mass 1: return" in capsys.readouterr().out
    (shot,) = films
    assert shot.z.shape == (6, 2, 8) and shot.a.shape == (6, 2, 2) and shot.r.shape == (6, 2)
    assert [[c["action_factor"] for c in row] for row in shot.contexts] == [[1, -1]] * 3 + [[-1, 1]] * 3
    gif = Image.open(path)
    assert gif.n_frames == 6 and gif.info["loop"] == 0 and gif.size[0] == 900
    pictures = []
    for i in range(6):
        gif.seek(i)
        pictures.append(np.asarray(gif.convert("RGB")).astype(int))
    assert len(np.unique(pictures[0][:25].reshape(-1, 3), axis=0)) > 1  # the heading
    for a in pictures[1:]:
        assert (a[:25] == pictures[0][:25]).all() and (a[-20:] == pictures[0][-20:]).all()  # heading, axes' labels
    modes = [(0, 114, 178)] * 3 + [(213, 94, 0)] * 3  # COLOURS[0] and [1], up to the palette
    for half, expected in ((slice(0, 400), modes), (slice(470, 900), modes[::-1])):
        for picture, colour in zip(pictures, expected):
            across = picture[160, half]  # the first that is not white on a line across is the picture's left edge
            edge = across[np.argmax(across.sum(-1) < 500) + 1]
            assert np.abs(edge - colour).max() < 40, (edge, colour)


@pytest.mark.parametrize("method, there", [("dma_star_sh", True), ("dr", False), ("concat", False)])
def test_a_film_has_z_where_the_agent_infers_it(method, there):
    shot = film.shoot(
        untrained(method, "walker", K=2), [{"gravity": g, "actuator_strength": 1.0} for g in (5.0, 14.0)], 2, 0
    )
    assert (shot.z is not None) == there
    corners = film.boxes(shot, ratio=1.5)
    assert corners.shape == (2, 2, 2, 2)
    (width, height) = (corners[..., 1, :] - corners[..., 0, :])[0, 0]
    assert width == pytest.approx(1.5 * height)


def test_what_goes_far_is_followed():
    view = lambda x: aib_envs.View(np.array([x, 0.0]), 2.0)
    body = lambda x: [aib_envs.Shape(np.array([x, 0.0]), np.array([x, 1.0]), 0.1, aib_envs.RED)]
    pictures = [[(view(x), body(x))] for x in (0.0, 5.0)]
    shot = film.Film([[{}]] * 2, pictures, None, np.zeros((2, 1, 1)), np.zeros((2, 1)))
    assert film.boxes(shot, 1.0).mean(-2)[:, 0, 0].tolist() == [0, 5]
    near = shot._replace(pictures=[[(view(x), body(x))] for x in (0.0, 1.0)])
    assert film.boxes(near, 1.0).mean(-2)[:, 0, 0].tolist() == [0.5, 0.5]


def test_bad_input_is_refused_in_one_line(saved, tmp_path, capsys):
    di, walker = saved("dr"), saved("dr", "walker")
    for program in (film, adaptation):
        assert "nowhere" in refusal(program, [tmp_path / "nowhere"], capsys)
    assert "one environment" in refusal(adaptation, [di, walker], capsys)
    assert "--rollouts 0" in refusal(adaptation, [di, "--rollouts", 0], capsys)
    assert "mess" in refusal(film, [di, "--contexts", "mess=1"], capsys)
    assert "x" in refusal(film, [di, "--contexts", "mass=x"], capsys)
    assert "mass=0.0: must be" in refusal(
        film, [saved("dr", "di_friction"), "--contexts", "mass=2"], capsys
    )  # mirrored
    assert "up to 4" in refusal(film, [di, "--contexts", *["mass=1"] * 5], capsys)
    assert "--seconds 99" in refusal(film, [di, "--seconds", 99], capsys)
    assert "--seed -1" in refusal(film, [di, "--seed", -1], capsys)
    assert ".gif" in refusal(film, [di, "--out", "film.mp4"], capsys)
    (tmp_path / "file").touch()
    for program, out in ((film, "file/film.gif"), (adaptation, "file")):
        assert "file" in refusal(program, [di, "--out", tmp_path / out], capsys)
