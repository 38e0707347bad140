"""Tests of studies/adaptation.py, with small agents that were never trained."""

import math

import adaptation
import numpy as np
import pytest
import torch
from untrained import refusal, save_untrained, succeed, table, untrained

import aib_envs
import dmash

# ---- The switch ---------------------------------------------------------------------------------


def test_mirrored_is_the_other_mode_or_the_other_end_of_the_train_range():
    mirrored = adaptation.mirrored
    assert mirrored("di_perm", {"mass": 1.2, "swap": 1.0}) == {"mass": 1.2, "swap": 0.0}
    assert mirrored("ode", {"c0": -5.0, "c1": 2.0}) == {"c0": 5.0, "c1": 2.0}


@pytest.mark.parametrize("env", ["di_inv", "cartpole_inv", "reacher_hard_perm"])
def test_switch_is_what_set_context_does_and_a_second_one_undoes_it(env):
    contexts = aib_envs.context_sets(env, 4)["train"]
    envs = aib_envs.VectorEnv(env, contexts, seed=0)
    rollout = dmash.Rollout(untrained("concat", env), envs, noisy=False)
    rollout.begin_episode(warm_up=False)
    single = aib_envs.make(env, **contexts[1])
    single.reset(options={"state": envs.task.state()[1]})
    if env.startswith("reacher"):
        single.task.target = envs.task.target[1:2].copy()
    for context in (adaptation.mirrored(env, contexts[1]), contexts[1]):
        adaptation.switch(rollout)
        single.set_context(**context)
        _, a, r, omega = rollout.step()
        assert omega[1].tolist() == pytest.approx(list(context.values()))
        s2, reward, *_ = single.step(a[1].numpy())
        np.testing.assert_allclose(rollout.s[1], s2, rtol=1e-5, atol=1e-6)
        assert r[1].item() == pytest.approx(reward, abs=1e-6)


# ---- What is seen after a switch, and in short windows ------------------------------------------

K = 24  # of di_inv; an episode has 100 steps
CONTEXTS = aib_envs.context_sets("di_inv", 4)["train"]


def test_a_twin_has_the_window_of_its_mirror_image_and_the_state_of_the_switched(seen):
    agent = untrained("dma_star_sh")
    contexts = CONTEXTS + [adaptation.mirrored("di_inv", context) for context in CONTEXTS]
    for after in ("switch", "twin"):
        assert adaptation.rewards(agent, contexts, after=after).shape == (50, 8)
    tau, (s, *_) = seen[K + 50]
    tau_twin, (s_twin, *_) = seen[K + 100 + K + 50]
    assert torch.equal(s, s_twin)
    assert torch.equal(tau[[4, 5, 6, 7, 0, 1, 2, 3]], tau_twin)
    assert not torch.equal(tau, tau_twin)


@pytest.mark.parametrize("keep", [0, 1, 7, K])
def test_a_short_window_is_that_of_a_replay_with_no_more_transitions(keep, seen):
    agent = untrained("dma_star_sh")
    adaptation.rewards(agent, CONTEXTS, keep=keep)
    *before, (tau, _) = seen
    few = dmash.Replay(torch.zeros(4, 2), K, 4, 2, K, agent.cfg.L)
    for _, transition in before[len(before) - keep :]:
        few.add(*transition)
    assert torch.equal(tau, few.latest(noisy=False))


@pytest.mark.parametrize(
    "found, expected",
    [
        ([0.96] * 40, 0),
        ([0.0] * 5 + [1.0] * 35, 14),  # a zero leaves the mean after ten steps
        ([1.0] * 20 + [0.9] * 20, math.inf),
    ],
)
def test_steps_to_counts_until_the_moving_mean_stays_at_95_percent(found, expected):
    for reference in (1, -1):  # of it, 5 % is 0.05 in both
        curve = np.array(found) + reference - 1
        assert adaptation.steps_to(curve, 0 * curve + reference) == expected


# ---- The program --------------------------------------------------------------------------------


def test_a_table_in_which_the_controls_lose_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    runs = [save_untrained(tmp_path, method) for method in ("dma_star_sh", "dr", "concat")]
    succeed(adaptation, *runs, "--out", out)
    assert len(capsys.readouterr().out.splitlines()) == 3
    rows = table(out / "adaptation.csv")
    assert {row["mode"] for row in rows} == {"all", "action_factor=-1", "action_factor=1"}
    ks = [row["k"] for row in rows if row["method"] == "dma_star_sh" and row["mode"] == "all"]
    assert ks == ["", "", "0", "2", "4", "8", "16", "24"]
    for row in rows:
        lost = float(row["lost"])
        if row["method"] != "dma_star_sh":
            assert lost == 0 and row["steps"] in ("0", "")
        per_step = float(row["reference"]) - float(row["reward"])
        assert lost == pytest.approx(50 * per_step, abs=1e-3)


def test_an_environment_without_modes_goes_between_the_ends(monkeypatch):
    seen = []

    def rewards(agent, contexts, **how):
        seen.append([context["gravity"] for context in contexts])
        return np.tile(seen[-1], (250, 1))

    monkeypatch.setattr(adaptation, "rewards", rewards)
    rows = adaptation.study(untrained("dr", "walker"))
    ends = [4.91, 14.71] * 2 + [14.71, 4.91] * 2  # as many as trained on
    assert all(gravities == pytest.approx(ends) for gravities in seen)
    assert {row["mode"] for row in rows} == {"all", "gravity=4.91", "gravity=14.71"}
    found = {row["question"]: row["reward"] for row in rows if row["mode"] == "gravity=4.91"}
    assert found["start"] == pytest.approx(4.91)
    assert found["switch"] == pytest.approx(14.71)  # the mode is the new one


def test_bad_input_is_refused_in_one_line(tmp_path, capsys):
    di = save_untrained(tmp_path, "dr")
    walker = save_untrained(tmp_path, "dr", "walker")
    assert "one environment" in refusal(adaptation, [di, walker], capsys)
    assert "given twice" in refusal(adaptation, [di, di / "policy.pt"], capsys)
