"""A point on a line whose motor may be wired backwards: an environment that is learned in a minute.

    python dmash.py --env exercises.point:point --quick --steps 1500

The hidden context is the motor's gain and its sign. The point starts at a distance of 0.5 to 1 from
the goal at 0. The reward is 1 at the goal and falls to 0 at a distance of 1. With the wrong sign,
the point runs away.
"""

import numpy as np

import aib_envs

GAIN = aib_envs.ContextDim("gain", 1.0, train=(0.5, 1.5), extrapolation=(0.2, 2.0))


class Point(aib_envs.Task):
    """N points side by side. State and observation are the place x; the action is its velocity."""

    d_s, d_a, state_size = 1, 1, 1
    dt = 0.1  # s

    def initial_state(self, i, rng):
        return rng.choice([-1.0, 1.0], size=1) * rng.uniform(0.5, 1.0, size=1)

    def set_state(self, state):
        self.x = state.copy()  # (N, 1)

    def state(self):
        return self.x.copy()

    def advance(self, actions):
        """The base class has multiplied the actions by the sign of each context."""
        gain = self.c["gain"][:, np.newaxis]
        self.x = np.clip(self.x + self.dt * gain * actions, -2.0, 2.0)

    observation = state

    def reward(self):
        return np.maximum(0.0, 1.0 - np.abs(self.x[:, 0]))

    def picture(self, i):
        goal, place = np.zeros(2), np.array([self.x[i, 0], 0.0])
        discs = [
            aib_envs.Shape(goal, goal, 0.1, aib_envs.GREEN),
            aib_envs.Shape(place, place, 0.1, aib_envs.BLUE),
        ]
        return aib_envs.View(goal, 4.4), discs


aib_envs.register("point", Point, [GAIN, aib_envs.ACTION_FACTOR], 50, K=20, steps=15_000)
