"""Lets the tests import the modules of the folder above and of studies/, and look at rollouts."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "studies")]
import dmash  # noqa: E402


@pytest.fixture
def seen(monkeypatch):
    """Of each step of the rollouts to come: the window and the transition, τ and (s, a, r, s')."""
    seen = []
    step = dmash.Rollout.step

    def noting(rollout, random=False):
        tau = rollout.replay.latest(noisy=False)
        s, a, r, omega = step(rollout, random)
        seen.append((tau, (s, a, r, rollout.s)))
        return s, a, r, omega

    monkeypatch.setattr(dmash.Rollout, "step", noting)
    return seen
