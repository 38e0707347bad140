"""Tests of studies/adaptation.py, with small agents that were never trained."""

import csv
import functools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "studies")]
import adaptation  # noqa: E402
from untrained import SMALL, refusal, save_untrained, untrained  # noqa: E402

import aib_envs  # noqa: E402
import dmash  # noqa: E402


@pytest.fixture
def saved(tmp_path):
    return functools.partial(save_untrained, tmp_path)


# ---- The switch ---------------------------------------------------------------------------------


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
        _, a, r, omega = rollout.step()
        assert torch.equal(omega, rollout.replay.c)
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
        ((_, states[after], read[after]),) = [
            entry for entry in seen[agent.cfg.K :] if entry[0] == 50
        ]
    assert torch.equal(states["switch"], states["twin"])
    mirror_image = [4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11]
    assert torch.equal(read["switch"][mirror_image], read["twin"])
    assert not torch.equal(read["switch"], read["twin"])


# ---- Short windows ------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 7, 24])
def test_a_short_window_is_that_of_a_replay_with_no_more_transitions(keep):
    K, L, d_s, d_a = 24, 4, 3, 2
    few = dmash.Replay(torch.zeros(5, 1), K, d_s, d_a, K, L)
    whole = adaptation.ShortReplay(few, keep)
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
    [
        ([1.0] * 40, 0),
        ([0.0] * 5 + [1.0] * 35, 14),
        ([1.0] * 20 + [0.9] * 20, math.inf),
        ([0.96] * 40, 0),
    ],
)
def test_steps_to_counts_until_the_moving_mean_stays_at_95_percent(found, expected):
    assert (
        adaptation.steps_to(np.array(found), np.ones(40)) == expected
    )  # a zero leaves the mean after ten steps


def test_adaptation_writes_a_table_and_a_figure_and_the_controls_lose_nothing(
    saved, tmp_path, capsys
):
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
        assert float(row["lost"]) == pytest.approx(
            50 * (float(row["reference"]) - float(row["reward"])), abs=1e-3
        )


def test_runs_of_several_lengths_of_window_have_lines_of_their_own(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    runs = []
    for K in (8, 12):
        cfg = dmash.Config(
            env="di_inv", method="dma_star", out=str(tmp_path / str(K)), K=K, **SMALL
        )
        folder = dmash.run_folder(cfg)
        folder.mkdir(parents=True)
        run = dmash.Run(cfg, folder)
        run.inode = folder.stat().st_ino
        run.save()
        runs.append(str(folder))
    assert adaptation.main([*runs, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/adaptation.png").exists()


def test_adaptation_of_an_environment_without_modes_goes_between_the_ends(monkeypatch):
    seen = []

    def rewards(agent, contexts, rollouts, **how):
        seen.append([context["gravity"] for context in contexts])
        return np.ones((250, len(contexts) * rollouts))

    monkeypatch.setattr(adaptation, "rewards", rewards)
    rows, _ = adaptation.study(untrained("dr", "walker"), rollouts=2)
    assert set(map(tuple, np.round(seen, 6))) == {
        (4.91, 14.71) * 2 + (14.71, 4.91) * 2
    }  # as many as trained on
    assert {row["mode"] for row in rows} == {"all", "gravity=4.91", "gravity=14.71"}


def test_without_matplotlib_numbers_are_written(saved, tmp_path, monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert adaptation.main([str(saved("dr")), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/adaptation.csv").exists() and "no figure" in capsys.readouterr().out


def test_bad_input_is_refused_in_one_line(saved, tmp_path, capsys):
    di, walker = saved("dr"), saved("dr", "walker")
    assert "nowhere" in refusal(adaptation, [tmp_path / "nowhere"], capsys)
    assert "one environment" in refusal(adaptation, [di, walker], capsys)
    assert "given twice" in refusal(adaptation, [di, di], capsys)
    assert "given twice" in refusal(adaptation, [di, di / "policy.pt"], capsys)
    assert "--rollouts 0" in refusal(adaptation, [di, "--rollouts", 0], capsys)
    (tmp_path / "file").touch()
    assert "file" in refusal(adaptation, [di, "--out", tmp_path / "file"], capsys)
