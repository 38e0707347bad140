"""The Actuator Inversion Benchmark (AIB): environments whose hidden context may reverse actuators.

A context is fixed during an episode. It changes the dynamics only, and the agent never observes it.

    env = make("cartpole_inv", length=0.7, action_factor=-1)  # one gymnasium.Env
    sets = context_sets("cartpole_inv")                       # {"train": [{...}, ...], ...}
    envs = VectorEnv("cartpole_inv", sets["train"], seed=0)   # side by side, as dmash.py trains
    gymnasium.make("aib_envs:aib/cartpole_inv-v0", length=0.7, action_factor=-1)
    gymnasium.make_vec("aib_envs:aib/cartpole_inv-v0", num_envs=20, contexts="train")

The environments (K: transitions in a window; steps: gradient steps of a run; both as in the paper):

id                paper           kind                      T   K  steps  contexts
di_inv            DI              non-overlapping         100  24 100000  mass, action_factor
di_friction       DI-Friction     overlapping             100  24 100000  mass, friction
di_perm           DI-Perm         non-overlapping         100  24 100000  mass, swap
ode               ODE             weakly non-overlapping  200  24 100000  c0, c1
cartpole_inv      Cartpole        non-overlapping        1000 128 100000  length, action_factor
cheetah_inv       Cheetah         non-overlapping        1000 128 200000  length, action_factor
reacher_easy_inv  Reacher(E)      non-overlapping        1000 128 200000  length, action_factor
reacher_hard_inv  Reacher(H)      non-overlapping        1000 128 200000  length, action_factor
reacher_hard_perm Reacher(H)-Perm non-overlapping        1000 128 200000  length, swap
ball_in_cup       BallInCup       overlapping            1000 128 200000  gravity, distance
walker            Walker          overlapping            1000 128 200000  gravity, actuator_strength
walker_gym        WalkerGym       overlapping            1000 128 500000  gravity, actuator_strength
hopper_gym        HopperGym       overlapping            1000 128 500000  gravity, actuator_strength
di_signs          -               non-overlapping         100  24 100000  mass, sign_x, sign_y
ode_1 ... ode_20 are as ode, with the contexts c0 ... c(k-1) in ode_k.

context           first in        default  train         extrapolation (None: two values)
mass              di_inv              1.0  (0.5, 1.5)    (0.1, 2.0)
action_factor     di_inv              1.0  (-1.0, 1.0)   None
friction          di_friction         1.0  (0.5, 1.5)    (0.1, 2.0)
swap              di_perm             0.0  (0.0, 1.0)    None
c0                ode                 0.0  (-5.0, 5.0)   (-10.0, 10.0)
c1                ode                 0.0  (-5.0, 5.0)   (-10.0, 10.0)
length            cartpole_inv        0.5  (0.3, 0.85)   (0.1, 2.0)
length            cheetah_inv         1.0  (0.8, 1.2)    (0.4, 1.6)
gravity           ball_in_cup        9.81  (8.0, 12.0)   (1.0, 20.0)
distance          ball_in_cup         0.3  (0.24, 0.36)  (0.1, 0.5)
gravity           walker             9.81  (4.91, 14.71) (0.98, 19.62)
actuator_strength walker              1.0  (0.5, 1.5)    (0.1, 2.0)
sign_x            di_signs            1.0  (-1.0, 1.0)   None
sign_y            di_signs            1.0  (-1.0, 1.0)   None

The file in its order: the contexts, the table, the context sets; then `Task`, of which every
environment is a subclass, written once for N instances side by side; then the tasks; then their
views for Gymnasium (`ContextualEnv`, `ContextualVectorEnv`), for training (`VectorEnv`), and the
wrappers; last, `register` and the checks of all values that come from outside.
"""

import copy
import dataclasses
import difflib
import functools
import importlib
import itertools
import math
import os
import sys
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import mujoco  # type: ignore[import-untyped]
import numpy as np
from gymnasium.utils import RecordConstructorArgs

# --------------------------------------------------------------------------------------------------
# Contexts
# --------------------------------------------------------------------------------------------------


class ContextDim(NamedTuple):
    """One context dimension.

    A dimension without an extrapolation range is binary: both values of `train` are in every set.
    """

    name: str
    default: float
    train: tuple[float, float]
    extrapolation: tuple[float, float] | None = None
    positive: bool = False  # Values at or below zero are physically impossible.
    below: float = inf  # Values from here on are impossible too, if it is positive.
    only: tuple[float, ...] | None = None  # No other values mean anything.

    @property
    def binary(self):
        return self.extrapolation is None

    def distance(self, value):
        """The distance from the middle of the train range, which is 1 at its ends."""
        low, high = self.train
        return abs(2 * value - low - high) / (high - low)


MASS = ContextDim("mass", 1.0, (0.5, 1.5), (0.1, 2.0), positive=True)  # kg
FRICTION = ContextDim("friction", 1.0, (0.5, 1.5), (0.1, 2.0))  # kg/s
# The action factor multiplies the action, so that -1 inverts every actuator.
ACTION_FACTOR = ContextDim("action_factor", 1.0, (-1.0, 1.0))
SIGN_X = ContextDim("sign_x", 1.0, (-1.0, 1.0))  # multiplies the first action
SIGN_Y = ContextDim("sign_y", 1.0, (-1.0, 1.0))  # multiplies the second action
SWAP = ContextDim("swap", 0.0, (0.0, 1.0), only=(0.0, 1.0))  # 1 exchanges the first two actuators
POLE_LENGTH = ContextDim("length", 0.5, (0.3, 0.85), (0.1, 2.0), positive=True)  # half the pole, m
SCALE = ContextDim("length", 1.0, (0.8, 1.2), (0.4, 1.6), positive=True)  # multiplies limbs
CUP_GRAVITY = ContextDim("gravity", 9.81, (8.0, 12.0), (1.0, 20.0))  # m/s²
# The string, in m, is shorter than the way from the cup to the ground.
STRING = ContextDim("distance", 0.3, (0.24, 0.36), (0.1, 0.5), positive=True, below=0.9)
GRAVITY = ContextDim("gravity", 9.81, (4.91, 14.71), (0.98, 19.62))  # m/s²
STRENGTH = ContextDim("actuator_strength", 1.0, (0.5, 1.5), (0.1, 2.0))  # multiplies the gears


def coefficients(k):
    """c_0 ... c_{k-1} of the ODE environments."""
    return [ContextDim(f"c{i}", 0.0, (-5.0, 5.0), (-10.0, 10.0)) for i in range(k)]


C0, C1 = coefficients(2)

Contexts = str | Sequence[dict[str, float]]  # the name of a set, or contexts


# --------------------------------------------------------------------------------------------------
# The table of environments
# --------------------------------------------------------------------------------------------------

# Overlapping: one policy that ignores the context does well in every context.
NON, WEAK, OVER = "non-overlapping", "weakly non-overlapping", "overlapping"


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """One row of the table."""

    cls: type
    context: tuple[ContextDim, ...]
    horizon: int  # steps of an episode
    kind: str
    K: int = 24  # past transitions in a window
    steps: int = 100_000  # gradient steps of a run
    paper_name: str = "-"
    module: str = "aib_envs"  # where it is registered


ENVS: dict[str, EnvSpec] = {}  # filled by `register`, at the end of this file

# id, class of the task, contexts, horizon, K, steps, name in the paper, kind.
# di_signs is not in the paper. With two signs, a pair of them can be new where each is known.
TABLE = """
di_inv            DoubleIntegrator MASS,ACTION_FACTOR         100  24 100_000 DI              NON
di_friction       DoubleIntegrator MASS,FRICTION              100  24 100_000 DI-Friction     OVER
di_perm           DoubleIntegrator MASS,SWAP                  100  24 100_000 DI-Perm         NON
ode               ODE              C0,C1                      200  24 100_000 ODE             WEAK
cartpole_inv      Cartpole         POLE_LENGTH,ACTION_FACTOR 1000 128 100_000 Cartpole        NON
cheetah_inv       Cheetah          SCALE,ACTION_FACTOR       1000 128 200_000 Cheetah         NON
reacher_easy_inv  Reacher          SCALE,ACTION_FACTOR       1000 128 200_000 Reacher(E)      NON
reacher_hard_inv  HardReacher      SCALE,ACTION_FACTOR       1000 128 200_000 Reacher(H)      NON
reacher_hard_perm HardReacher      SCALE,SWAP                1000 128 200_000 Reacher(H)-Perm NON
ball_in_cup       BallInCup        CUP_GRAVITY,STRING        1000 128 200_000 BallInCup       OVER
walker            Walker           GRAVITY,STRENGTH          1000 128 200_000 Walker          OVER
walker_gym        WalkerGym        GRAVITY,STRENGTH          1000 128 500_000 WalkerGym       OVER
hopper_gym        HopperGym        GRAVITY,STRENGTH          1000 128 500_000 HopperGym       OVER
di_signs          DoubleIntegrator MASS,SIGN_X,SIGN_Y         100  24 100_000 -               NON
"""


# --------------------------------------------------------------------------------------------------
# The context sets
# --------------------------------------------------------------------------------------------------


def context_sets(env_id: str, n: int = 20, seed: int = 0) -> dict[str, list[dict[str, float]]]:
    """The three pairwise disjoint context sets, each a list of `n` contexts.

    A continuous dimension has 50 values in each set, as `set_values` says. With one or two
    continuous dimensions, a set takes `n` evenly spaced entries of their sorted mesh. With more,
    it takes `n` random entries, by a generator seeded with `seed`. An `n` above the size of the
    mesh repeats contexts. Binary values, and the combinations of several, take turns.

    Returns {"train": [...], "eval_in": [...], "eval_out": [...]}. An unknown id, or an `n` that is
    no whole number of at least 1, is a ValueError.
    """
    dims = lookup(env_id).context
    whole("n", n)
    rng = np.random.default_rng(seed)
    return {name: context_set(dims, name, n, rng) for name in ("train", "eval_in", "eval_out")}


def set_values(dim, name):
    """The 50 values of a continuous dimension in a set.

    train: evenly spaced over the train range. eval_in: the same, with 1 % of the width cut off at
    both ends. eval_out: 25 values below and 25 above the train range, at least 1 % of its width
    away from it, up to the extrapolation limits.
    """
    low, high = dim.train
    margin = 0.01 * (high - low)
    if name == "train":
        return np.linspace(low, high, 50)
    if name == "eval_in":
        return np.linspace(low + margin, high - margin, 50)
    lowest, highest = dim.extrapolation
    below = np.linspace(lowest, low - margin, 25)
    above = np.linspace(high + margin, highest, 25)
    return np.concatenate([below, above])


def context_set(dims, name, n, rng):
    continuous = [dim for dim in dims if not dim.binary]
    binary = [dim for dim in dims if dim.binary]
    axes = [set_values(dim, name) for dim in continuous]
    combinations = list(itertools.product(*(dim.train for dim in binary)))
    turns = np.arange(n)
    if len(continuous) > 2:
        rows = list(zip(*[rng.choice(axis, n) for axis in axes]))
    else:
        mesh = list(itertools.product(*axes))
        # Every entry of the mesh stands there once for each combination of binary values.
        entries = np.linspace(0, len(mesh) * len(combinations) - 1, n).astype(int)
        rows = [mesh[entry // len(combinations)] for entry in entries]
        # The published sets, of 20, take the binary value of the entry too, so that the two values
        # stand 11 to 9. With another n that rule may take one value only, so there they take turns.
        if continuous and n == 20 and len(combinations) == 2:
            turns = entries
    contexts = []
    for row, turn in zip(rows, turns):
        values = dict(zip(continuous + binary, row + combinations[turn % len(combinations)]))
        contexts.append({dim.name: float(values[dim]) for dim in dims})
    return contexts


# --------------------------------------------------------------------------------------------------
# What all environments share
# --------------------------------------------------------------------------------------------------


class Task:
    """N instances of an environment, one per context, stepped together.

    Arrays have one row per instance. A subclass gives the sizes and `dt` below, and defines, in
    this order: its model (`build`), measurements, `initial_state`, `set_state`, `state`, `advance`,
    `observation`, `reward`, `picture`.
    """

    d_s: int  # size of an observation
    d_a: int  # number of actuators
    state_size: int  # size of the physical state
    dt: Any  # s, the time of a step
    high: Any = inf  # the largest observation: a number, or one per element
    low: Any = None  # the smallest one; None: the negative of the largest
    target_size = 0  # size of a target that `reset` of the environment may set

    def __init__(self, contexts):
        self.contexts = [dict(context) for context in contexts]
        self.N = len(self.contexts)
        self.build()

    def build(self):
        """Makes everything that depends on the contexts, always from nominal values."""
        self.c = {}
        for name in self.contexts[0]:
            self.c[name] = np.array([context[name] for context in self.contexts])
        self.signs = np.ones((self.N, self.d_a))
        if "action_factor" in self.c:
            self.signs *= self.c["action_factor"][:, None]
        if "sign_x" in self.c:
            self.signs[:, 0] *= self.c["sign_x"]
        if "sign_y" in self.c:
            self.signs[:, 1] *= self.c["sign_y"]

    def with_contexts(self, contexts):
        """This task in other contexts, which still needs a state. This one stays as it is.

        A context that cannot be built is a ValueError.
        """
        other = copy.copy(self)
        Task.__init__(other, contexts)  # A subclass's own would forget the reacher's target.
        return other

    def spaces(self):
        """The spaces of observations and actions of one instance."""
        return box(self.d_s, self.high, self.low), box(self.d_a, 1.0)

    def snapshot(self):
        """All that the next step depends on, as one array (N, ...): here the physical state."""
        return self.state()

    def restore(self, snapshot):
        self.set_state(snapshot)

    def reset(self, rngs):
        """Starts an episode in every instance, each from its own numpy Generator."""
        states = [self.initial_state(i, rng) for i, rng in enumerate(rngs)]
        self.set_state(np.stack(states))

    def step(self, actions):
        """One step of actions (N, d_a); then `observation` and `reward` are of the new state.

        This is where the benchmark inverts and swaps actuators: the context first multiplies each
        action, then exchanges them, and what an actuator gets is clipped to [-1, 1]. The wrappers
        `ActuatorInversion` and `ActuatorPermutation` are for other environments.
        """
        # A float32 action would be rounded at each product, unlike the same action in float64.
        actions = np.asarray(actions, dtype=np.float64) * self.signs
        if "swap" in self.c:
            swapped = self.c["swap"] == 1
            actions[swapped, :2] = actions[swapped, 1::-1]
        # For arrays this small, minimum and maximum are faster than np.clip.
        self.advance(np.minimum(np.maximum(actions, -1.0), 1.0))


# --------------------------------------------------------------------------------------------------
# Pictures, drawn without OpenGL: every environment moves in a plane
# --------------------------------------------------------------------------------------------------

RED = (200, 80, 70)
GREEN = (120, 180, 110)
BLUE = (70, 100, 170)
GREY = (150, 150, 150)


class Shape(NamedTuple):
    """A line with round ends: a capsule, or a disc where both ends are one point. Metres."""

    start: np.ndarray  # (2,)
    end: np.ndarray  # (2,)
    radius: float
    colour: tuple[int, int, int]


GROUND = Shape(np.array([-1000.0, -0.01]), np.array([1000.0, -0.01]), 0.01, GREY)


class View(NamedTuple):
    """What a square picture shows. Metres."""

    centre: np.ndarray  # (2,)
    width: float


def draw(view, shapes, size=256):
    """The picture, (size, size, 3), uint8. Later shapes cover earlier ones."""
    picture = np.full((size, size, 3), 245, dtype=np.uint8)
    ticks = (np.arange(size) + 0.5) / size - 0.5
    x = view.centre[0] + view.width * ticks  # (size,)
    y = view.centre[1] - view.width * ticks[:, None]  # (size, 1)
    for start, end, radius, colour in shapes:
        line = end - start
        dx, dy = line
        share = ((x - start[0]) * dx + (y - start[1]) * dy) / max(line @ line, 1e-12)
        share = np.clip(share, 0, 1)  # of the line before the point that is nearest, (size, size)
        distance = np.hypot(x - start[0] - share * dx, y - start[1] - share * dy)
        picture[distance <= radius] = colour
    return picture


# --------------------------------------------------------------------------------------------------
# Toy environments
# --------------------------------------------------------------------------------------------------


class DoubleIntegrator(Task):
    """A point mass in the plane, pushed by a force, is to reach the origin and stay there.

    | index | observation, which is also the state | unit |
    |---|---|---|
    | 0, 1 | position x, y, clipped to [-1, 1] | m |
    | 2, 3 | velocity x, y, clipped to [-1, 1] | m/s |

    Action: the force x, y, in N, each in [-1, 1]. Reward: 1 within 0.1 m of the origin, else 0.
    Start: at rest in one of the four corners, each |coordinate| uniform in [0.8, 1].
    Context: mass (kg), and either action_factor, friction (kg/s), swap, or sign_x and sign_y.
    """

    d_s = 4
    d_a = 2
    state_size = 4
    dt = 0.1  # s
    high = 1.0
    GOAL_RADIUS = 0.1  # m

    def initial_state(self, i, rng):
        corner = rng.choice([-1.0, 1.0], size=2)
        position = corner * rng.uniform(0.8, 1.0, size=2)
        return np.concatenate([position, np.zeros(2)])

    def set_state(self, state):
        self.p = state[:, :2].copy()
        self.v = state[:, 2:].copy()

    def state(self):
        return np.concatenate([self.p, self.v], axis=-1)

    def advance(self, actions):
        mass = self.c["mass"][:, None]
        friction = self.c.get("friction", np.zeros(self.N))[:, None]
        keep = 1 - self.dt * friction / mass
        # The position moves first, with the old velocity.
        self.p = np.clip(self.p + self.dt * self.v, -1, 1)
        self.v = np.clip(self.v * keep + self.dt * actions / mass, -1, 1)

    observation = state

    def reward(self):
        return (np.linalg.norm(self.p, axis=-1) <= self.GOAL_RADIUS).astype(float)

    def picture(self, i):
        goal = np.zeros(2)
        p = self.p[i]
        shapes = [Shape(goal, goal, self.GOAL_RADIUS, GREEN), Shape(p, p, 0.05, BLUE)]
        return View(goal, 2.4), shapes


class ODE(Task):
    """A scalar x is driven by Re(c_0 a + c_1 a² + ...), and is to be held at 0.

    | index | observation, which is also the state | unit |
    |---|---|---|
    | 0 | x, clipped to [-20, 20] | – |

    Action: real and imaginary part of a complex number a, each in [-1, 1].
    Reward: in [0, 1], by |x|: below 0.05 it is 1, below 0.1 1/2, below 0.2 1/3, below 0.5 1/4,
    below 2 0.05, else 0. Start: uniform in [-1, 1]. Context: c0, c1, ..., without a unit.
    """

    d_s = 1
    d_a = 2
    state_size = 1
    dt = 0.01  # s
    high = 20.0
    TIERS = {0.05: 1.0, 0.1: 1 / 2, 0.2: 1 / 3, 0.5: 1 / 4, 2.0: 0.05}  # |x| below: reward

    def initial_state(self, i, rng):
        return rng.uniform(-1.0, 1.0, size=1)

    def set_state(self, state):
        self.x = state[:, 0].copy()

    def state(self):
        return self.x[:, None].copy()

    def advance(self, actions):
        a = actions[:, 0] + 1j * actions[:, 1]
        slope = sum(c * a ** (k + 1) for k, c in enumerate(self.c.values())).real
        self.x = np.clip(self.x + self.dt * slope, -20.0, 20.0)

    observation = state

    def reward(self):
        reached = [np.abs(self.x) < below for below in self.TIERS]
        return np.select(reached, list(self.TIERS.values()))

    def picture(self, i):
        x = np.array([self.x[i], 0.0])
        goal = np.array([min(self.TIERS), 0.0])
        end = np.array([20.0, 0.0])
        line = Shape(-end, end, 0.01, GREY)
        shapes = [line, Shape(-goal, goal, 0.04, GREEN), Shape(x, x, 0.06, BLUE)]
        return View(np.clip(x, -18, 18) * 0.9, 4.0), shapes


# --------------------------------------------------------------------------------------------------
# DeepMind Control tasks, on models of our own
# --------------------------------------------------------------------------------------------------


def near(x, margin):
    """1 at x = 0, falling like a Gaussian to 0.1 at |x| = margin."""
    return 0.1 ** ((x / margin) ** 2)


class MujocoTask(Task):
    """A task on MuJoCo models, one per context. The state is qpos, then qvel.

    A subclass gives `xml(context)`, which is written from nominal values each time, and SUBSTEPS.
    A task whose reward reads sensors sets SENSORS, because mj_step leaves them one step behind.
    There, positions and velocities are integrated first (mj_step2), then what follows from them
    is computed (mj_step1).
    """

    SUBSTEPS = 1
    SENSORS = False
    AXES = [0, 2]  # the world axes that a picture shows, to the right and up
    WIDTH = 3.0  # m, of a picture
    # The whole state, with what the constraint solver starts from.
    WHOLE = mujoco.mjtState.mjSTATE_INTEGRATION

    def build(self):
        super().build()
        try:
            self.models = [self.model(context) for context in self.contexts]
        except (ValueError, mujoco.FatalError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"contexts {shown(self.contexts)}: {reason}") from None
        for model in self.models:
            # Without this, a simulation that diverges would start anew, and nobody would see it.
            model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
        self.datas = [mujoco.MjData(model) for model in self.models]
        self.pairs = list(zip(self.models, self.datas))

    @property
    def dt(self):
        return self.models[0].opt.timestep * self.SUBSTEPS

    def model(self, context):
        return mujoco.MjModel.from_xml_string(self.xml(context))

    def measure(self):
        self.qpos = np.array([data.qpos for data in self.datas])  # (N, nq)
        self.qvel = np.array([data.qvel for data in self.datas])  # (N, nv)

    def speed(self):
        """What the first sensor tells: the forward velocity of the centre of mass, m/s, (N,)."""
        return np.array([data.sensordata[0] for data in self.datas])

    def set_state(self, state):
        for (model, data), row in zip(self.pairs, state):
            mujoco.mj_resetData(model, data)
            data.qpos[:] = row[: model.nq]
            data.qvel[:] = row[model.nq :]
            mujoco.mj_forward(model, data)
        self.measure()

    def state(self):
        return np.concatenate([self.qpos, self.qvel], axis=-1)

    def snapshot(self):
        size = mujoco.mj_stateSize(self.models[0], self.WHOLE)
        snapshot = np.empty((self.N, size))
        for (model, data), row in zip(self.pairs, snapshot):
            mujoco.mj_getState(model, data, row, self.WHOLE)
        return snapshot

    def restore(self, snapshot):
        for (model, data), row in zip(self.pairs, snapshot):
            mujoco.mj_setState(model, data, row, self.WHOLE)
            mujoco.mj_step1(model, data)
        self.measure()

    def advance(self, actions):
        for (model, data), action in zip(self.pairs, actions):
            data.ctrl[:] = action
            if self.SENSORS:
                mujoco.mj_step2(model, data)
                if self.SUBSTEPS > 1:
                    mujoco.mj_step(model, data, self.SUBSTEPS - 1)
                mujoco.mj_step1(model, data)
            else:
                mujoco.mj_step(model, data, self.SUBSTEPS)
        self.measure()

    observation = state

    @staticmethod
    def random_joints(model, rng):
        """qpos with limited joints uniform in their range and unlimited hinges in [-π, π]."""
        qpos = np.zeros(model.nq)
        for j in range(model.njnt):
            if model.jnt_limited[j]:
                qpos[j] = rng.uniform(*model.jnt_range[j])
            elif model.jnt_type[j] == mujoco.mjtJoint.mjJNT_HINGE:
                qpos[j] = rng.uniform(-np.pi, np.pi)
        return qpos

    def picture(self, i):
        """Every geom of the model as it is now, and the ground as a line."""
        model, data = self.pairs[i]
        mujoco.mj_kinematics(model, data)
        shapes = []
        for g in range(model.ngeom):
            kind = model.geom_type[g]
            size = model.geom_size[g]
            rotation = data.geom_xmat[g].reshape(3, 3)
            if kind == mujoco.mjtGeom.mjGEOM_PLANE:
                shapes.append(GROUND)
                continue
            radius = size[0]
            half = size[1] * rotation[:, 2]  # to the end of a capsule; 0 for a sphere
            if kind == mujoco.mjtGeom.mjGEOM_BOX:
                radius = size[2]
                half = size[0] * rotation[:, 0]
            start = (data.geom_xpos[g] - half)[self.AXES]
            end = (data.geom_xpos[g] + half)[self.AXES]
            shapes.append(Shape(start, end, radius, BLUE if g % 2 else RED))
        return View(self.centre(i), self.WIDTH), shapes

    def centre(self, i):
        """The middle of a picture: the body that the others hang on, at a fixed height."""
        return np.array([self.datas[i].xpos[1][0], 0.35 * self.WIDTH])


class Cartpole(MujocoTask):
    """DMC cartpole balance: keep the pole upright and the cart in the middle, with little force.

    | index | observation | unit |
    |---|---|---|
    | 0 | position x of the cart; the rail's ends, at ±1.8 m, are springs | m |
    | 1, 2 | cosine and sine of the pole's angle θ, which is 0 upright | – |
    | 3 | velocity of the cart | m/s |
    | 4 | velocity of θ | rad/s |

    State: x, θ and their velocities. Action: the force u on the cart, in units of 10 N, in [-1, 1].
    Reward: (1 + cos θ)/2 · (1 + near(x, 2))/2 · (4 + max(0, 1 - u²))/5 · (1 + near(θ's velocity,
    5))/2, in [0, 1]. Start: x uniform within 0.1 m, θ within 0.034 rad, velocities normal with
    standard deviation 0.01. Context: length (half the pole, m; its mass stays 0.1 kg) and
    action_factor.
    """

    d_s = 5
    d_a = 1
    state_size = 4
    high = [inf, 1.0, 1.0, inf, inf]
    WIDTH = 4.5  # m

    def xml(self, context):
        return f"""
        <mujoco model="cartpole">
          <option timestep="0.01" integrator="RK4"><flag contact="disable"/></option>
          <worldbody>
            <body name="cart" pos="0 0 1">
              <joint name="slider" type="slide" axis="1 0 0" limited="true" range="-1.8 1.8"
                     solreflimit=".08 1" damping="5e-4"/>
              <geom type="box" size=".2 .15 .1" mass="1"/>
              <body name="pole">
                <joint name="hinge" type="hinge" axis="0 1 0" damping="2e-6"/>
                <geom type="capsule" fromto="0 0 0 0 0 {2 * context["length"]}" size=".045"
                      mass=".1"/>
            </body></body>
          </worldbody>
          <actuator>
            <motor joint="slider" gear="10" ctrllimited="true" ctrlrange="-1 1"/>
          </actuator>
        </mujoco>"""

    def initial_state(self, i, rng):
        qpos = [rng.uniform(-0.1, 0.1), rng.uniform(-0.034, 0.034)]
        qvel = 0.01 * rng.standard_normal(2)
        return np.concatenate([qpos, qvel])

    def observation(self):
        x, theta = self.qpos.T
        dx, dtheta = self.qvel.T
        return np.stack([x, np.cos(theta), np.sin(theta), dx, dtheta], axis=-1)

    def reward(self):
        x, theta = self.qpos.T
        force = np.array([data.ctrl[0] for data in self.datas])
        upright = (1 + np.cos(theta)) / 2
        centered = (1 + near(x, margin=2)) / 2
        small_control = (4 + np.maximum(0.0, 1 - force**2)) / 5
        small_velocity = (1 + near(self.qvel[:, 1], margin=5)) / 2
        return upright * centered * small_control * small_velocity


class Reacher(MujocoTask):
    """DMC reacher: bring the finger of a two-link arm to a target, big (easy) or small (hard).

    | index | observation | unit |
    |---|---|---|
    | 0, 1 | angles of shoulder and wrist | rad |
    | 2, 3 | from the finger to the target, x, y | m |
    | 4, 5 | velocities of shoulder and wrist | rad/s |

    State: the angles and their velocities. Action: torques of shoulder and wrist, in units of
    0.05 Nm, each in [-1, 1]. Reward: 1 while the finger touches the target, else 0.
    Start: at rest, shoulder uniform in ±π, wrist in ±160°; the target 0.05 to 0.2 m from the
    shoulder. Context: length (scales both links, without a unit), and action_factor or swap.
    """

    d_s = 6
    d_a = 2
    state_size = 4
    target_size = 2
    AXES = [0, 1]
    WIDTH = 0.8  # m
    LINK = 0.12  # m, from shoulder to wrist and from wrist to finger
    FINGER = 0.01  # m, its radius
    TARGET = 0.05  # m, its radius

    def __init__(self, contexts):
        self.target = np.zeros((len(contexts), 2))
        super().__init__(contexts)

    def xml(self, context):
        scale = context["length"]
        link = self.LINK * scale
        return f"""
        <mujoco model="reacher">
          <option timestep="0.02"><flag contact="disable"/></option>
          <default>
            <joint type="hinge" axis="0 0 1" damping="0.01"/>
            <motor gear=".05" ctrllimited="true" ctrlrange="-1 1"/>
          </default>
          <worldbody>
            <body name="arm" pos="0 0 .01">
              <geom type="capsule" fromto="0 0 0 {link} 0 0" size=".01"/>
              <joint name="shoulder"/>
              <body name="hand" pos="{link} 0 0">
                <geom type="capsule" fromto="0 0 0 {0.1 * scale} 0 0" size=".01"/>
                <joint name="wrist" limited="true" range="-160 160"/>
                <body name="finger" pos="{link} 0 0">
                  <geom type="sphere" size="{self.FINGER}"/>
                </body>
            </body></body>
          </worldbody>
          <actuator><motor joint="shoulder"/><motor joint="wrist"/></actuator>
        </mujoco>"""

    def measure(self):
        super().measure()
        directions = self.qpos.cumsum(-1)  # of both links, (N, 2)
        (x1, x2), (y1, y2) = np.cos(directions).T, np.sin(directions).T
        finger = self.LINK * self.c["length"] * np.array([x1 + x2, y1 + y2])
        self.to_target = self.target - finger.T

    def initial_state(self, i, rng):
        qpos = self.random_joints(self.models[i], rng)
        angle = rng.uniform(0, 2 * np.pi)
        radius = rng.uniform(0.05, 0.2)
        # A task of `with_contexts` still shares the array of the first one.
        self.target = self.target.copy()
        self.target[i] = radius * np.sin(angle), radius * np.cos(angle)
        return np.concatenate([qpos, np.zeros(2)])

    def snapshot(self):
        return np.concatenate([self.target, super().snapshot()], axis=-1)

    def restore(self, snapshot):
        self.target = snapshot[:, :2].copy()
        super().restore(snapshot[:, 2:])

    def observation(self):
        return np.concatenate([self.qpos, self.to_target, self.qvel], axis=-1)

    def reward(self):
        distance = np.hypot(*self.to_target.T)
        return (distance <= self.TARGET + self.FINGER).astype(float)

    def picture(self, i):
        view, shapes = super().picture(i)
        target = Shape(self.target[i], self.target[i], self.TARGET, GREEN)
        return view, [target, *shapes]

    def centre(self, i):
        return np.zeros(2)


class HardReacher(Reacher):
    """Reacher with a small target; all else is as there."""

    TARGET = 0.015  # m, its radius


class BallInCup(MujocoTask):
    """DMC ball in cup: swing a ball on a string into a cup that moves in the vertical plane.

    | index | observation, which is also the state | unit |
    |---|---|---|
    | 0, 1 | x, z of the cup, from where it rests | m |
    | 2, 3 | x, z of the ball, from where it rests | m |
    | 4 – 7 | their velocities | m/s |

    Action: forces x, z on the cup, in units of 5 N, each in [-1, 1].
    Reward: 1 while the ball is in the cup, else 0. Start: at rest, the ball at x uniform in ±0.2,
    z in [0.2, 0.5], where it touches nothing. Context: gravity (m/s²), distance (the string, m).
    """

    d_s = 8
    d_a = 2
    state_size = 8
    SUBSTEPS = 10
    WIDTH = 1.2  # m
    CUP = 0.6  # m, height of the cup's opening at rest
    HALF = 0.05  # m, half the cup's width; its middle is as far below the opening
    BALL = 0.025  # m, radius
    STRING_TOP = 0.5  # m, height that the ball hangs from, so that it rests lower by the string

    def xml(self, context):
        string = context["distance"]
        return f"""
        <mujoco model="ball in cup">
          <option gravity="0 0 {-context["gravity"]}"/>
          <default>
            <motor gear="5" ctrllimited="true" ctrlrange="-1 1"/>
            <joint type="slide"/>
            <default class="cup">
              <joint damping="3" stiffness="20"/>
              <geom type="capsule" size=".008"/>
            </default>
          </default>
          <worldbody>
            <geom name="ground" type="plane" size=".6 .2 10"/>
            <body name="cup" pos="0 0 {self.CUP}" childclass="cup">
              <joint name="cup_x" axis="1 0 0"/><joint name="cup_z" axis="0 0 1"/>
              <geom fromto="{-self.HALF} 0 0 {-self.HALF} 0 -.075"/>
              <geom fromto="{-self.HALF} 0 -.075 -.025 0 -.1"/>
              <geom fromto="-.025 0 -.1 .025 0 -.1"/>
              <geom fromto=".025 0 -.1 {self.HALF} 0 -.075"/>
              <geom fromto="{self.HALF} 0 -.075 {self.HALF} 0 0"/>
              <site name="cup" pos="0 0 -.108" size=".005"/>
            </body>
            <body name="ball" pos="0 0 {self.STRING_TOP - string}">
              <joint name="ball_x" axis="1 0 0"/><joint name="ball_z" axis="0 0 1"/>
              <geom type="sphere" size="{self.BALL}"/><site name="ball" size=".005"/>
            </body>
          </worldbody>
          <tendon>
            <spatial limited="true" range="0 {string}">
              <site site="ball"/><site site="cup"/>
            </spatial>
          </tendon>
          <actuator><motor joint="cup_x"/><motor joint="cup_z"/></actuator>
        </mujoco>"""

    def ball_to_target(self):
        """From the ball's centre to the middle of the cup, (N, 2)."""
        cup_x, cup_z, ball_x, ball_z = self.qpos.T
        middle_z = self.CUP - self.HALF + cup_z
        ball_height = self.STRING_TOP - self.c["distance"] + ball_z
        return np.stack([cup_x - ball_x, middle_z - ball_height], axis=-1)

    def initial_state(self, i, rng):
        model, data = self.pairs[i]
        while True:
            mujoco.mj_resetData(model, data)
            data.qpos[2:] = rng.uniform(-0.2, 0.2), rng.uniform(0.2, 0.5)
            mujoco.mj_forward(model, data)
            if data.ncon == 0:  # The ball touches nothing.
                return np.concatenate([data.qpos, data.qvel])

    def reward(self):
        inside = np.abs(self.ball_to_target()) < self.HALF - self.BALL
        return inside.all(axis=-1).astype(float)


class Cheetah(MujocoTask):
    """DMC cheetah run: a planar runner on two legs, rewarded for speed up to 10 m/s.

    | index | observation | unit |
    |---|---|---|
    | 0 | height z of the torso, from where the model has it | m |
    | 1 | pitch of the torso | rad |
    | 2 – 4 | angles of the back thigh, shin, foot | rad |
    | 5 – 7 | angles of the front thigh, shin, foot | rad |
    | 8, 9 | velocities x, z of the torso | m/s |
    | 10 – 16 | velocities of the seven angles | rad/s |

    State: x of the torso, then the observation. Action: torques of the six joints, each in
    [-1, 1], in units of the motor's gear. Reward: speed of the centre of mass / (10 m/s), clipped
    to [0, 1]. Start: joints uniform in their ranges, then 200 steps without action.
    Context: length (scales the legs, without a unit; the mass stays 14 kg) and action_factor.
    """

    d_s = 17
    d_a = 6
    state_size = 18
    SENSORS = True
    SPEED = 10.0  # m/s, for full reward
    SETTLE = 200  # steps
    MASS = 14.0  # kg

    def xml(self, context):
        s = context["length"]
        return f"""
        <mujoco model="cheetah">
          <option timestep="0.01"/>
          <default>
            <motor ctrllimited="true" ctrlrange="-1 1"/>
            <geom type="capsule" friction=".4 .1 .1"/>
            <joint limited="true" damping=".01" armature=".1" stiffness="8" type="hinge"
                   axis="0 1 0"/>
            <default class="root">
              <joint limited="false" damping="0" armature="0" stiffness="0"/>
            </default>
          </default>
          <worldbody>
            <geom name="ground" type="plane" conaffinity="1" pos="98 0 0" size="100 .8 .5"
                  friction="1 .005 .0001"/>
            <body name="torso" pos="0 0 .7">
              <joint name="rootx" type="slide" axis="1 0 0" class="root"/>
              <joint name="rootz" type="slide" axis="0 0 1" class="root"/>
              <joint name="rooty" axis="0 1 0" class="root"/>
              <geom fromto="-.5 0 0 .5 0 0" size=".046"/>
              <geom pos=".6 0 .1" euler="0 50 0" size=".046 .15"/>
              <body name="bthigh" pos="-.5 0 0">
                <joint name="bthigh" range="-30 60" stiffness="240" damping="6"/>
                <geom pos="{0.1 * s} 0 {-0.13 * s}" euler="0 -218 0" size=".046 {0.145 * s}"/>
                <body name="bshin" pos="{0.16 * s} 0 {-0.25 * s}">
                  <joint name="bshin" range="-50 50" stiffness="180" damping="4.5"/>
                  <geom pos="{-0.14 * s} 0 {-0.07 * s}" euler="0 -116 0" size=".046 {0.15 * s}"/>
                  <body name="bfoot" pos="{-0.28 * s} 0 {-0.14 * s}">
                    <joint name="bfoot" range="-230 50" stiffness="120" damping="3"/>
                    <geom pos="{0.03 * s} 0 {-0.097 * s}" euler="0 -15 0" size=".046 {0.094 * s}"/>
              </body></body></body>
              <body name="fthigh" pos=".5 0 0">
                <joint name="fthigh" range="-57 .4" stiffness="180" damping="4.5"/>
                <geom pos="{-0.07 * s} 0 {-0.12 * s}" euler="0 30 0" size=".046 {0.133 * s}"/>
                <body name="fshin" pos="{-0.14 * s} 0 {-0.24 * s}">
                  <joint name="fshin" range="-70 50" stiffness="120" damping="3"/>
                  <geom pos="{0.065 * s} 0 {-0.09 * s}" euler="0 -34 0" size=".046 {0.106 * s}"/>
                  <body name="ffoot" pos="{0.13 * s} 0 {-0.18 * s}">
                    <joint name="ffoot" range="-28 28" stiffness="60" damping="1.5"/>
                    <geom pos="{0.045 * s} 0 {-0.07 * s}" euler="0 -34 0" size=".046 {0.07 * s}"/>
              </body></body></body>
            </body>
          </worldbody>
          <actuator>
            <motor joint="bthigh" gear="120"/>
            <motor joint="bshin" gear="90"/>
            <motor joint="bfoot" gear="60"/>
            <motor joint="fthigh" gear="90"/>
            <motor joint="fshin" gear="60"/>
            <motor joint="ffoot" gear="30"/>
          </actuator>
          <sensor><subtreelinvel body="torso"/></sensor>
        </mujoco>"""

    def model(self, context):
        model = super().model(context)
        mujoco.mj_setTotalmass(model, self.MASS)
        mujoco.mj_setConst(model, mujoco.MjData(model))
        return model

    def initial_state(self, i, rng):
        model, data = self.pairs[i]
        mujoco.mj_resetData(model, data)
        mujoco.mj_forward(model, data)
        limited = model.jnt_limited == 1
        data.qpos[limited] = rng.uniform(*model.jnt_range[limited].T)
        # As in dm_control, the first step still has the forces of the default pose. Then the
        # runner falls to the ground.
        mujoco.mj_step2(model, data)
        mujoco.mj_step(model, data, self.SETTLE - 1)
        return np.concatenate([data.qpos, data.qvel])

    def observation(self):
        return np.concatenate([self.qpos[:, 1:], self.qvel], axis=-1)

    def reward(self):
        return np.clip(self.speed() / self.SPEED, 0, 1)


class Walker(MujocoTask):
    """DMC walker walk: a planar biped, rewarded for an upright torso at height and 1 m/s.

    | index | observation | unit |
    |---|---|---|
    | 0 | height of the torso | m |
    | 1 – 14 | cosine and sine of each body's angle: torso; right thigh, leg, foot; left | – |
    | 15, 16 | velocities z, x of the torso | m/s |
    | 17 | velocity of the torso's angle | rad/s |
    | 18 – 23 | velocities of the right hip, knee, ankle; left | rad/s |

    State: z (from 1.3 m), x, angle of the torso, six joints, then their velocities.
    Action: torques of the six joints, each in [-1, 1], in units of the motor's gear.
    Reward: (3 standing + upright)/4 · (5 moving + 1)/6, in [0, 1], where standing is 1 from 1.2 m
    on, upright (1 + cosine of the torso's angle)/2, and moving speed / (1 m/s) clipped to [0, 1].
    Start: at rest, joints uniform in their ranges, the torso's angle in ±π.
    Context: gravity (m/s²) and actuator_strength (multiplies the gears, without a unit).
    """

    d_s = 24
    d_a = 6
    state_size = 18
    high = [inf] + [1.0] * 14 + [inf] * 9
    SUBSTEPS = 10
    SENSORS = True
    TORSO = 1.3  # m, height of the torso in the model
    HEIGHT = 1.2  # m, for full reward
    SPEED = 1.0  # m/s, for full reward

    def xml(self, context):
        def leg(side, y):
            return f"""
            <body name="{side}_thigh" pos="0 {y} -.3">
              <joint name="{side}_hip" range="-20 100"/>
              <geom pos="0 0 -.225" size=".05 .225"/>
              <body name="{side}_leg" pos="0 0 -.7">
                <joint name="{side}_knee" pos="0 0 .25" range="-150 0"/>
                <geom size=".04 .25"/>
                <body name="{side}_foot" pos=".06 0 -.25">
                  <joint name="{side}_ankle" pos="-.06 0 0" range="-45 45"/>
                  <geom zaxis="1 0 0" size=".05 .1"/>
            </body></body></body>"""

        def motors(side):
            strength = context["actuator_strength"]
            return f"""
            <motor joint="{side}_hip" gear="{100 * strength}"/>
            <motor joint="{side}_knee" gear="{50 * strength}"/>
            <motor joint="{side}_ankle" gear="{20 * strength}"/>"""

        return f"""
        <mujoco model="walker">
          <option timestep="0.0025" gravity="0 0 {-context["gravity"]}"/>
          <default>
            <motor ctrllimited="true" ctrlrange="-1 1"/>
            <geom type="capsule" contype="1" conaffinity="0" friction=".7 .1 .1"/>
            <joint axis="0 -1 0" damping=".1" armature=".01" limited="true"
                   solimplimit="0 .99 .01"/>
            <default class="root"><joint limited="false" damping="0" armature="0"/></default>
          </default>
          <worldbody>
            <geom name="ground" type="plane" conaffinity="1" pos="248 0 0" size="250 .8 .2"/>
            <body name="torso" pos="0 0 {self.TORSO}">
              <joint name="rootz" axis="0 0 1" type="slide" class="root"/>
              <joint name="rootx" axis="1 0 0" type="slide" class="root"/>
              <joint name="rooty" axis="0 1 0" type="hinge" class="root"/>
              <geom size=".07 .3"/>{leg("right", y=-0.05)}{leg("left", y=0.05)}
            </body>
          </worldbody>
          <actuator>{motors("right")}{motors("left")}</actuator>
          <sensor><subtreelinvel body="torso"/></sensor>
        </mujoco>"""

    def height(self):
        return self.TORSO + self.qpos[:, 0]

    def angles(self):
        """Of torso, right thigh, leg, foot, left thigh, leg, foot about the y axis, (N, 7)."""
        torso = self.qpos[:, 2:3]
        right = torso - self.qpos[:, 3:6].cumsum(-1)
        left = torso - self.qpos[:, 6:9].cumsum(-1)
        return np.concatenate([torso, right, left], axis=-1)

    def initial_state(self, i, rng):
        return np.concatenate([self.random_joints(self.models[i], rng), np.zeros(9)])

    def observation(self):
        angles = self.angles()
        orientations = np.stack([np.cos(angles), np.sin(angles)], axis=-1).reshape(self.N, -1)
        return np.concatenate([self.height()[:, None], orientations, self.qvel], axis=-1)

    def reward(self):
        standing = near(np.maximum(0, self.HEIGHT - self.height()), margin=self.HEIGHT / 2)
        upright = (1 + np.cos(self.angles()[:, 0])) / 2
        moving = np.clip(self.speed() / self.SPEED, 0, 1)
        return (3 * standing + upright) / 4 * (5 * moving + 1) / 6


# --------------------------------------------------------------------------------------------------
# Gymnasium: its locomotion tasks, never terminating, and any other environment
# --------------------------------------------------------------------------------------------------


class GymTask(MujocoTask):
    """A locomotion task of Gymnasium on its own model file, without its terminal states.

    Action: torques of the joints, each in [-1, 1], in units of the motor's gear.
    Reward: forward speed (m/s), plus 1 while healthy, minus 0.001 |action|²; it has no bounds.
    Start: the model's pose with uniform noise of ±0.005 on every entry of the state.
    Context: gravity (m/s²) and actuator_strength (multiplies the gears, without a unit).
    """

    SUBSTEPS = 4
    FILE: str  # of the model
    NOISE = 5e-3  # of the starting state

    def model(self, context):
        folder = Path(gymnasium.__file__).parent / "envs/mujoco/assets"
        model = mujoco.MjModel.from_xml_path(str(folder / self.FILE))
        model.opt.gravity[2] = -context["gravity"]
        model.actuator_gear *= context["actuator_strength"]
        return model

    def initial_state(self, i, rng):
        model = self.models[i]
        rest = np.concatenate([model.qpos0, np.zeros(model.nv)])
        return rest + rng.uniform(-self.NOISE, self.NOISE, size=self.state_size)

    def advance(self, actions):
        before = self.qpos[:, 0]
        super().advance(actions)
        self.velocity = (self.qpos[:, 0] - before) / self.dt

    def observation(self):
        return np.concatenate([self.qpos[:, 1:], np.clip(self.qvel, -10, 10)], axis=-1)

    def reward(self):
        action = np.array([data.ctrl for data in self.datas])
        cost = 1e-3 * np.square(action).sum(-1)
        return self.velocity + self.healthy() - cost


class WalkerGym(GymTask):
    """Gymnasium's Walker2d-v5.

    | index | observation | unit |
    |---|---|---|
    | 0 | height of the torso | m |
    | 1 | angle of the torso | rad |
    | 2 – 4 | angles of the right thigh, leg, foot | rad |
    | 5 – 7 | angles of the left thigh, leg, foot | rad |
    | 8, 9 | velocities x, z of the torso, clipped to ±10 | m/s |
    | 10 – 16 | velocities of the seven angles, clipped to ±10 | rad/s |

    State: x of the torso, then the observation with velocities as they are.
    Healthy: height between 0.8 and 2 m, angle of the torso within ±1 rad. All else: see GymTask.
    """

    d_s = 17
    d_a = 6
    state_size = 18
    high = [inf] * 8 + [10.0] * 9
    FILE = "walker2d_v5.xml"

    def healthy(self):
        height, angle = self.qpos[:, 1:3].T
        return (0.8 < height) & (height < 2.0) & (-1.0 < angle) & (angle < 1.0)


class HopperGym(GymTask):
    """Gymnasium's Hopper-v5.

    | index | observation | unit |
    |---|---|---|
    | 0 | height of the torso | m |
    | 1 | angle of the torso | rad |
    | 2 – 4 | angles of the thigh, leg, foot | rad |
    | 5, 6 | velocities x, z of the torso, clipped to ±10 | m/s |
    | 7 – 10 | velocities of the four angles, clipped to ±10 | rad/s |

    State: x of the torso, then the observation with velocities as they are.
    Healthy: height above 0.7 m, angle of the torso within ±0.2 rad, every other entry of the state
    but x within ±100. All else: see GymTask.
    """

    d_s = 11
    d_a = 3
    state_size = 12
    high = [inf] * 5 + [10.0] * 6
    FILE = "hopper.xml"

    def healthy(self):
        height, angle = self.qpos[:, 1:3].T
        others = np.abs(self.state()[:, 2:])
        upright = (0.7 < height) & (-0.2 < angle) & (angle < 0.2)
        return upright & (others < 100).all(axis=-1)


class BadEnvironment(ValueError):
    """An environment that cannot be trained on. The message is one line."""


class GymnasiumTask(Task):
    """An environment of Gymnasium without terminal states, whose actuators are what is hidden.

    Observation, reward and start are those of the environment. An action of -1 ... 1 spans its
    bounds. Context: actuator_strength and action_factor, which multiply the action, without a unit.
    The physical state can neither be read nor set. `gymnasium_spec` makes the class for an id.
    """

    state_size = 0
    gymnasium_id: str

    def __init__(self, contexts):
        def make_one():
            # -1 means no time limit of its own: the views count the steps.
            env = gymnasium.make(self.gymnasium_id, max_episode_steps=-1)
            return gymnasium.wrappers.RescaleAction(env, -1, 1)

        self.envs = gymnasium.vector.SyncVectorEnv([make_one] * len(contexts))
        super().__init__(contexts)

    def reset(self, rngs):
        seeds = [int(rng.integers(2**31)) for rng in rngs]
        self.s, _ = self.envs.reset(seed=seeds)

    def set_state(self, state):
        pass

    def state(self):
        return np.zeros((self.N, 0))

    def advance(self, actions):
        actions = np.clip(actions * self.c["actuator_strength"][:, None], -1, 1)
        self.s, self.r, terminated, truncated, _ = self.envs.step(actions.astype(np.float32))
        if terminated.any() or truncated.any():
            reason = "has terminal states: the method knows none but time"
            raise BadEnvironment(f"gymnasium:{self.gymnasium_id} {reason}")

    def observation(self):
        return self.s

    def reward(self):
        return self.r

    def picture(self, i):
        raise ValueError(f"gymnasium:{self.gymnasium_id}: no picture here, but by gymnasium.make")


@functools.cache
def gymnasium_spec(gymnasium_id):
    """The EnvSpec of an environment of Gymnasium, in which one random episode is tried.

    BadEnvironment says why another will not do.
    """
    try:
        env = gymnasium.make(gymnasium_id)
    except ImportError as error:
        reason = f"{error} (pip install {error.name})"
        raise BadEnvironment(f"gymnasium:{gymnasium_id}: {reason}") from None
    horizon = env.spec.max_episode_steps
    seen = env.observation_space
    acted = env.action_space
    boxes = all(isinstance(x, gymnasium.spaces.Box) and len(x.shape) == 1 for x in (seen, acted))
    if not (boxes and acted.is_bounded() and acted.dtype.kind == "f" and horizon):
        what = "Boxes of one axis as spaces, bounded float actions and a horizon"
        raise BadEnvironment(f"gymnasium:{gymnasium_id}: must have {what} (max_episode_steps)")
    cls = type(gymnasium_id, (GymnasiumTask,), {"gymnasium_id": gymnasium_id})
    cls.d_s = seen.shape[0]
    cls.d_a = acted.shape[0]
    cls.dt = 1 / (env.metadata.get("render_fps") or 30)
    cls.low = seen.low
    cls.high = seen.high
    task = cls([{"actuator_strength": 1.0, "action_factor": 1.0}])
    rng = np.random.default_rng(0)
    task.reset([rng])
    for _ in range(horizon):
        task.step(rng.uniform(-1, 1, (1, cls.d_a)))
    return EnvSpec(cls, (STRENGTH, ACTION_FACTOR), horizon, NON)


# --------------------------------------------------------------------------------------------------
# The views of a task: one Gymnasium environment, or all contexts together
# --------------------------------------------------------------------------------------------------


class ContextualEnv(gymnasium.Env):
    """One environment of the benchmark as a Gymnasium environment.

    The context is in `info["context"]` and never in the observation. There is no terminal state.
    An episode is truncated after `horizon` steps, or never without one; gymnasium.make leaves that
    to its own TimeLimit. A bad value is a ValueError.

    reset(options={"state": array, "target": (x, y), "context": {...}}), each optional: the state to
    start from, the reacher's target, context values to change. `set_context` changes them in
    mid-episode.
    """

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(
        self,
        env_id: str,
        render_mode: str | None = None,
        horizon: float = inf,
        **context: float,
    ):
        check_render_mode(render_mode)
        if horizon != inf:
            whole("horizon", horizon)
        self.env_id = env_id
        self.render_mode = render_mode
        self.horizon = horizon
        self.task = lookup(env_id).cls([full_context(env_id, context)])
        self.t: Any = None  # None: not yet reset
        self.metadata = self.metadata | {"render_fps": round(1 / self.task.dt)}
        self.observation_space, self.action_space = self.task.spaces()

    @property
    def context(self):
        return dict(self.task.contexts[0])

    def state(self):
        """The physical state, float64: what reset(options={"state": ...}) takes."""
        need_reset(self, "state")
        return self.task.state()[0]

    def set_context(self, **context: float) -> None:
        """Changes context values now and keeps the physical state."""
        task = self.task.with_contexts([full_context(self.env_id, context, self.context)])
        need_reset(self, "set_context")
        task.set_state(self.task.state())
        self.task = task

    def reset(self, *, seed=None, options=None):
        options = dict(named("options", options or {}))
        check_names("option", options, ["state", "target", "context"])
        context = full_context(self.env_id, options.get("context", {}), self.context)
        sizes = {"state": self.task.state_size, "target": self.task.target_size}
        for name in options.keys() & sizes.keys():
            options[name] = finite(name, options[name], (sizes[name],))[None]
        task = self.task
        if context != self.context:
            task = task.with_contexts([context])
        super().reset(seed=seed)
        self.task = task
        task.reset([self.np_random])
        if "target" in options:
            task.target = options["target"].copy()
            task.set_state(task.state())
        if "state" in options:
            task.set_state(options["state"])
        self.t = 0
        return self.observation(), {"context": self.context}

    def observation(self):
        return self.task.observation()[0].astype(np.float32)

    def step(self, action):
        """One step of `action`, (d_a,); what an actuator gets is clipped to [-1, 1]."""
        need_reset(self, "step")
        self.task.step(finite("action", action, (self.task.d_a,))[None])
        self.t += 1
        reward = float(self.task.reward()[0])
        truncated = self.t >= self.horizon
        return self.observation(), reward, False, truncated, {"context": self.context}

    def render(self):
        """The picture, (256, 256, 3), or None without a render mode."""
        need_reset(self, "render")
        if self.render_mode is None:
            return None
        return draw(*self.task.picture(0))


def make(env_id: str, **options: Any) -> ContextualEnv:
    """The environment in the context given by name; what is not named has its default."""
    options = {"horizon": lookup(env_id).horizon} | options
    env = ContextualEnv(env_id, **options)
    spec = gymnasium.registry.get(gymnasium_name(env_id))
    if spec is not None:
        kwargs = spec.kwargs | env.context
        env.spec = dataclasses.replace(spec, max_episode_steps=options["horizon"], kwargs=kwargs)
    return env


class VectorEnv:
    """One instance per context, reset and stepped together, as dmash.py trains.

    The horizon is the same everywhere, so that all episodes end together.
    """

    def __init__(self, env_id: str, contexts: Contexts, seed: Any):
        spec = lookup(env_id)
        self.env_id = env_id
        self.horizon = spec.horizon
        self.task = spec.cls([full_context(env_id, each) for each in listed(env_id, contexts)])
        self.N = self.task.N
        self.d_s = self.task.d_s
        self.d_a = self.task.d_a
        self.t: Any = None  # None: not yet reset
        children = np.random.SeedSequence(seed).spawn(self.N)
        self.rngs = [np.random.default_rng(child) for child in children]

    @property
    def c(self):
        """The contexts, (N, d_c), in the order of the table."""
        rows = [list(context.values()) for context in self.task.contexts]
        return np.array(rows, dtype=np.float32)

    def reset(self) -> np.ndarray:
        """Starts an episode everywhere. Returns observations (N, d_s)."""
        self.task.reset(self.rngs)
        self.t = 0
        return self.task.observation().astype(np.float32)

    def step(self, actions) -> tuple[np.ndarray, np.ndarray, bool]:
        """Actions (N, d_a). Returns observations, rewards (N,), whether the horizon is reached."""
        need_reset(self, "step")
        self.task.step(finite("actions", actions, (self.N, self.d_a)))
        self.t += 1
        observations = self.task.observation().astype(np.float32)
        rewards = self.task.reward().astype(np.float32)
        return observations, rewards, self.t >= self.horizon

    def state_dict(self):
        """Everything that the next steps and resets depend on, in plain lists and numbers."""
        snapshot = None
        if self.t is not None:
            snapshot = self.task.snapshot().tolist()
        states = [rng.bit_generator.state for rng in self.rngs]
        return {"t": self.t, "rngs": states, "task": snapshot}

    def load_state_dict(self, state):
        if len(state["rngs"]) != self.N:
            raise ValueError(f"a state of {len(state['rngs'])} instances: must be of {self.N}")
        self.t = state["t"]
        if self.task.state_size == 0:
            self.t = None  # The state could not be kept, so a reset is needed.
        if self.t is not None:
            self.task.restore(np.array(state["task"]))
        for rng, rng_state in zip(self.rngs, state["rngs"]):
            rng.bit_generator.state = rng_state


class ContextualVectorEnv(gymnasium.vector.VectorEnv):
    """The VectorEnv of training as a vector environment of Gymnasium, for gymnasium.make_vec.

    contexts: a list of `num_envs` contexts, or the name of a set; context values given by name
    hold in all of them. max_episode_steps: -1 means no limit, None the horizon of the table.
    All episodes end together. The step after that begins new ones, whatever its actions.
    infos["context"] has an array (num_envs,) per dimension. With a seed, instance i starts as a
    single environment with seed + i.
    """

    metadata = {
        "render_modes": ["rgb_array"],
        "autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        env_id: str,
        num_envs: int = 1,
        contexts: Contexts | None = None,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        **context: float,
    ):
        check_render_mode(render_mode)
        if contexts is None:
            contexts = [{}] * num_envs
        contexts = listed(env_id, contexts, num_envs)
        contexts = [named("context", each) | context for each in contexts]
        self.env_id = env_id
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.envs = VectorEnv(env_id, contexts, seed=None)
        self.horizon: float = self.envs.horizon
        if max_episode_steps == -1:
            self.horizon = inf
        elif max_episode_steps is not None:
            self.horizon = whole("max_episode_steps", max_episode_steps)
        self.done = False
        self.seeds = [-1] * num_envs  # Gymnasium's sign of an unknown seed.
        task = self.envs.task
        self.metadata = self.metadata | {"render_fps": round(1 / task.dt)}
        self.single_observation_space, self.single_action_space = task.spaces()
        batch_space = gymnasium.vector.utils.batch_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    @property
    def context(self):
        return [dict(context) for context in self.envs.task.contexts]

    @property
    def np_random_seed(self):
        return tuple(self.seeds)

    def state(self):
        """The physical states, (num_envs, state_size)."""
        need_reset(self.envs, "state")
        return self.envs.task.state()

    def reset(self, *, seed=None, options=None):
        """`seed`: a number, or one (or None: go on) for each instance.

        options={"contexts": [...]}: context values to change, a dict for each instance.
        Returns observations (num_envs, d_s) and infos.
        """
        options = named("options", options or {})
        check_names("option", options, ["contexts"])
        given = listed(self.env_id, options.get("contexts", self.context), self.num_envs)
        pairs = zip(given, self.context)
        contexts = [full_context(self.env_id, each, old) for each, old in pairs]
        seeds = seed
        if seed is None:
            seeds = [None] * self.num_envs
        elif np.ndim(seed) == 0:
            seeds = [seed + i for i in range(self.num_envs)]
        if len(seeds) != self.num_envs:
            raise ValueError(f"seed {shown(seed)}: must be a number, or {self.num_envs} of them")
        if contexts != self.context:
            self.envs.task = self.envs.task.with_contexts(contexts)
        for i, each in enumerate(seeds):
            if each is not None:
                self.envs.rngs[i] = np.random.default_rng(each)
                self.seeds[i] = each
        self.done = False
        return self.envs.reset(), self.infos()

    def infos(self):
        """As SyncVectorEnv gives them, with a mask beside each array."""
        context = {name: values.copy() for name, values in self.envs.task.c.items()}
        for name in self.envs.task.c:
            context[f"_{name}"] = np.ones(self.num_envs, dtype=bool)
        return {"context": context, "_context": np.ones(self.num_envs, dtype=bool)}

    def step(self, actions):
        if self.done:
            observations = self.envs.reset()
            rewards = np.zeros(self.num_envs)
            self.done = False
        else:
            observations, _, _ = self.envs.step(actions)
            rewards = self.envs.task.reward().astype(np.float64)
            self.done = self.envs.t >= self.horizon
        terminated = np.zeros(self.num_envs, dtype=bool)
        truncated = np.full(self.num_envs, self.done)
        return observations, rewards, terminated, truncated, self.infos()

    def render(self):
        """A picture of each instance, or None without a render mode."""
        need_reset(self.envs, "render")
        if self.render_mode is None:
            return None
        return tuple(draw(*self.envs.task.picture(i)) for i in range(self.num_envs))

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple:
        """What each instance has, or gives, by this name, as SyncVectorEnv's call.

        A sequence has an entry for each instance. All else is shared, and repeated.
        """
        value = getattr(self, name)
        if callable(value):
            value = value(*args, **kwargs)
        if isinstance(value, (list, tuple, np.ndarray)):
            return tuple(value)
        return (value,) * self.num_envs

    def get_attr(self, name: str) -> tuple:
        return self.call(name)

    def set_attr(self, name: str, values: Any) -> None:
        """Sets what all instances share."""
        if isinstance(values, (list, tuple)):
            raise ValueError(f"{name} {shown(values)}: must be one value for all instances")
        setattr(self, name, values)


# --------------------------------------------------------------------------------------------------
# Wrappers: contexts at random or told; inverted and permuted actuators of any environment
# --------------------------------------------------------------------------------------------------


class RandomContext(gymnasium.Wrapper, RecordConstructorArgs):
    """Draws a context at each reset, by the environment's generator.

    `contexts` is a list, the name of a set, or a dict of ranges, {"length": (0.3, 0.85)}, each of
    which is drawn from uniformly. What it does not name stays as the environment has it now.
    """

    def __init__(self, env: gymnasium.Env, contexts: Any = "train"):
        RecordConstructorArgs.__init__(self, contexts=contexts)
        gymnasium.Wrapper.__init__(self, env)
        inner = contextual(env)
        self.ranges = {}
        if isinstance(contexts, dict):
            check_ranges(inner.env_id, contexts)
            self.ranges = dict(contexts)
            contexts = [{}]
        self.contexts = []
        for context in listed(inner.env_id, contexts):
            self.contexts.append(full_context(inner.env_id, context, inner.context))

    def reset(self, *, seed=None, options=None):
        """Values in options["context"] take the place of drawn ones."""
        if seed is not None:
            # Otherwise the context and the state would be drawn from the same random numbers.
            self.env.reset(seed=seed)
        options = dict(options or {})
        context = dict(self.contexts[self.np_random.integers(len(self.contexts))])
        for name, (low, high) in self.ranges.items():
            context[name] = self.np_random.uniform(low, high)
        options["context"] = context | options.get("context", {})
        return self.env.reset(options=options)


class AddContext(gymnasium.ObservationWrapper, RecordConstructorArgs):
    """Tells the context, (d_c,), in the order of the table.

    It stands at the end of the observation or, with a `key`, beside it, as {"observation": ...,
    key: ...}.
    """

    def __init__(self, env: gymnasium.Env, key: str | None = None):
        RecordConstructorArgs.__init__(self, key=key)
        gymnasium.ObservationWrapper.__init__(self, env)
        self.key = key
        seen = env.observation_space
        told = box(len(contextual(env).context))
        if key is not None:
            self.observation_space = gymnasium.spaces.Dict({"observation": seen, key: told})
        elif isinstance(seen, gymnasium.spaces.Box) and len(seen.shape) == 1:
            low = np.append(seen.low, told.low)
            high = np.append(seen.high, told.high)
            self.observation_space = box(len(low), high, low)
        else:
            raise ValueError(
                f"observation space {shown(seen)}: needs a key, as it has not one axis"
            )

    def observation(self, observation):
        context = np.float32(list(self.unwrapped.context.values()))
        if self.key is None:
            return np.append(observation, context).astype(np.float32)
        return {"observation": observation, self.key: context}


class ActuatorInversion(gymnasium.ActionWrapper, RecordConstructorArgs):
    """Multiplies each action by `signs`, a number or one per actuator; -1 inverts.

    ActuatorInversion(gymnasium.make("Pendulum-v1"), -1). The action space must be symmetric about
    zero, so that an inverted action stays inside it; another, and bad signs, are a ValueError.
    The benchmark's own environments do the same in `Task.step`, by their context.
    """

    def __init__(self, env: gymnasium.Env, signs: Any):
        RecordConstructorArgs.__init__(self, signs=signs)
        gymnasium.ActionWrapper.__init__(self, env)
        space = env.action_space
        if not isinstance(space, gymnasium.spaces.Box) or (space.low != -space.high).any():
            raise ValueError(f"action space {shown(space)}: must be a Box symmetric about zero")
        if np.size(signs) == 1:
            signs = np.full(space.shape, signs)
        self.signs = finite("signs", signs, space.shape).copy()

    def action(self, action):
        space = self.action_space
        return (finite("action", action, space.shape) * self.signs).astype(space.dtype)


class ActuatorPermutation(gymnasium.ActionWrapper, RecordConstructorArgs):
    """Sends entry `order[i]` of the action to actuator i.

    An order that is no permutation, or exchanges actuators with other bounds, is a ValueError.
    The benchmark's own environments do the same in `Task.step`, by their context.
    """

    def __init__(self, env: gymnasium.Env, order: Any):
        RecordConstructorArgs.__init__(self, order=order)
        gymnasium.ActionWrapper.__init__(self, env)
        space = env.action_space
        self.order = np.array(order)
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise ValueError(f"action space {shown(space)}: must be a Box of one axis")
        (size,) = space.shape
        numbers = self.order.dtype.kind in "iu" and self.order.shape == (size,)
        if not numbers or sorted(self.order.tolist()) != list(range(size)):
            raise ValueError(f"order {shown(order)}: must be a permutation of 0 ... {size - 1}")
        for bound in (space.low, space.high):
            if (bound[self.order] != bound).any():
                kept = "leave actuators with other bounds in place"
                raise ValueError(f"order {shown(order)}: must {kept}, {shown(space)}")

    def action(self, action):
        space = self.action_space
        return finite("action", action, space.shape)[self.order].astype(space.dtype)


# --------------------------------------------------------------------------------------------------
# Registration, and checks of values from outside
# --------------------------------------------------------------------------------------------------

# Columns of dmash.py's tables, and arguments and options of the environments.
RESERVED = (
    "set step index return diverged self id env_id num_envs contexts context max_episode_steps "
    "horizon render_mode seed options state target"
).split()


def register(
    env_id: str,
    cls: type,
    context: Sequence[ContextDim],
    horizon: int,
    kind: str = NON,
    **rest: Any,
) -> None:
    """Adds an environment, a row of EnvSpec; `rest` may name K, steps and paper_name.

    It is there for `make`, for Gymnasium as aib/<env_id>-v0, and for dmash.py as --env
    <module>:<env_id>, where module is the one that calls this. A ValueError says what is wrong.
    """
    module = sys._getframe(1).f_globals["__name__"]
    if module == "__mp_main__":  # the main module in a process that multiprocessing spawned
        module = "__main__"
    spec = EnvSpec(cls, tuple(context), horizon, kind, module=module, **rest)
    try:
        check_spec(env_id, spec)
    except ValueError as error:
        raise ValueError(f"environment {env_id!r}: {error}") from None
    if module != __name__:
        env_id = f"{module}:{env_id}"
    gymnasium.register(
        gymnasium_name(env_id),
        entry_point="aib_envs:ContextualEnv",
        vector_entry_point="aib_envs:ContextualVectorEnv",
        max_episode_steps=horizon,
        kwargs={"env_id": env_id},
    )
    ENVS[env_id.rpartition(":")[2]] = spec


def check_spec(env_id, spec):
    cls = spec.cls
    known = ENVS.get(env_id)
    if known and (known.module, known.cls.__qualname__) != (spec.module, cls.__qualname__):
        raise ValueError(f"belongs to {known.cls.__qualname__} of the module {known.module}")
    for name in ("horizon", "K", "steps"):
        whole(name, getattr(spec, name))
    for name in ("d_s", "d_a"):
        whole(f"{cls.__name__}.{name}", getattr(cls, name, None))
    names = [dim.name for dim in spec.context]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"contexts {names}: must be at least one, each with a name of its own")
    for dim in spec.context:
        check_dim(dim)
    for (
        name
    ) in "state_size dt initial_state set_state state advance observation reward picture".split():
        if getattr(cls, name, None) is None:
            raise ValueError(f"{cls.__name__} has no {name}")
    if cls.d_a == 1 and {"swap", "sign_y"} & set(names):
        raise ValueError(f"{cls.__name__} has no two actuators")
    task = cls([{dim.name: dim.default for dim in spec.context}] * 2)
    task.reset([np.random.default_rng(0)] * 2)
    task.step(np.zeros((2, cls.d_a)))
    shapes = {"state": (2, cls.state_size), "observation": (2, cls.d_s), "reward": (2,)}
    for name, expected in shapes.items():
        shape = np.shape(getattr(task, name)())
        if shape != expected:
            gives = f"{cls.__name__} gives {name} of shape {shape}"
            raise ValueError(f"{gives} for two instances: must be {expected}")


def check_dim(dim):
    if dim.name in RESERVED or not str(dim.name).isidentifier():
        raise ValueError(f"context {dim.name!r}: the name is reserved, or no identifier")
    for value in (dim.default, *dim.train, *(dim.extrapolation or ())):
        allowed_value(dim, value)
    low, high = dim.train
    lowest, highest = dim.extrapolation or (-inf, inf)
    margin = 0.01 * (high - low)
    if not lowest <= low - margin < high + margin <= highest:
        ranges = f"train {dim.train}, extrapolation {dim.extrapolation}"
        allowed = "ranges that go up, the second at least 1 % wider at both ends"
        raise ValueError(f"context {dim.name}, {ranges}: must be {allowed}")


def gymnasium_name(env_id):
    return f"aib/{env_id.rpartition(':')[2]}-v0"


def lookup(env_id: str) -> EnvSpec:
    """The EnvSpec of an id of the table, of "module:id" or of "gymnasium:id".

    Importing the module, which may stand in the current folder, registers the id. An unknown id is
    a ValueError, ImportError, TypeError (./module:id) or an error of Gymnasium's own.
    """
    module, _, name = str(env_id).rpartition(":")
    if module.split(":")[0] == "gymnasium":
        return gymnasium_spec(str(env_id).removeprefix("gymnasium:"))
    if module:
        if "" not in sys.path:
            sys.path.append("")  # the current folder
        importlib.invalidate_caches()
        try:
            importlib.import_module(module)
        except SystemExit:
            raise ImportError(f"{module} ends the program while it is imported") from None
    if name not in ENVS:
        raise ValueError(unknown("environment", name, list(ENVS)))
    spec = ENVS[name]
    # A package may register its environments in a module of its own.
    if module and not f"{spec.module}.".startswith(f"{module}."):
        raise ValueError(f"environment {env_id!r}: {name} belongs to the module {spec.module}")
    return spec


def full_context(env_id, context, base={}):
    """`context` checked, in the order of the table.

    What it does not name has its value in `base` or else its default.
    """
    dims = {dim.name: dim for dim in lookup(env_id).context}
    kind = "context, or unexpected keyword argument"
    check_names(kind, named("context", context), list(dims), UnknownContext)
    values = base | context
    return {name: allowed_value(dim, values.get(name, dim.default)) for name, dim in dims.items()}


def listed(env_id, contexts, n=None):
    """A list of contexts (of `n`, if that is given), or the set of that name."""
    if isinstance(contexts, str):
        contexts = context_sets(env_id, n or 20).get(contexts, contexts)
    if not isinstance(contexts, (list, tuple)) or not contexts:
        allowed = "a list of at least one, or train, eval_in or eval_out"
        raise ValueError(f"contexts {shown(contexts)}: must be {allowed}")
    if len(contexts) != (n or len(contexts)):
        raise ValueError(f"num_envs={n}: must be the number of contexts, here {len(contexts)}")
    return contexts


def allowed_value(dim, value):
    """`value` as a float; ValueError if it is not finite or physically impossible."""
    try:
        number = float(value)
    except NOT_A_NUMBER:
        number = math.nan
    must_be = f"context {dim.name}={shown(value)}: must be"
    if isinstance(value, (str, bool)) or not math.isfinite(number):
        raise ValueError(f"{must_be} a finite number")
    if dim.positive and not 0 < number < dim.below:
        raise ValueError(f"{must_be} above 0 and below {dim.below:g}")
    if dim.only and number not in dim.only:
        raise ValueError(f"{must_be} one of {dim.only}")
    return number


def check_ranges(env_id, ranges):
    for name, values in ranges.items():
        low, high = finite(f"range of {name}", values, (2,)).tolist()
        if low > high:
            raise ValueError(f"range of {name} {shown(values)}: must go up")
        # The middle is no allowed value where there are only two.
        for value in (low, (low + high) / 2, high):
            full_context(env_id, {name: value})


def check_render_mode(render_mode):
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f"render_mode {render_mode!r}: must be None or 'rgb_array'")


def need_reset(env, call):
    if env.t is None:
        raise gymnasium.error.ResetNeeded(f"{env.env_id}: call reset() before {call}()")


def contextual(env):
    """The ContextualEnv that `env` wraps."""
    if not isinstance(env.unwrapped, ContextualEnv):
        raise ValueError(f"{shown(env)}: must be an environment of aib_envs, with a context")
    return env.unwrapped


def box(size, high=inf, low=None):
    high = np.broadcast_to(np.float32(high), size)
    if low is None:
        low = -high
    return gymnasium.spaces.Box(np.float32(low), high, (size,), np.float32)


# What float() and numpy raise for a text, for 10**400, for a tensor that has a gradient.
NOT_A_NUMBER = (TypeError, ValueError, OverflowError, RuntimeError)


def finite(name, value, shape):
    """`value` as an array of that shape; ValueError if it is not that many finite numbers."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except NOT_A_NUMBER:
        array = np.array(math.nan)
    if array.shape != shape or not np.isfinite(array).all():
        size = " x ".join(map(str, shape))
        raise ValueError(f"{name} {shown(value)}: must be {size} finite numbers")
    return array


def whole(name, value):
    """`value`, if it is a whole number of at least 1, else ValueError."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={shown(value)}: must be a whole number of at least 1")
    return value


class UnknownContext(TypeError, ValueError):
    """A context name that the environment does not have.

    As a keyword it is a TypeError, by Python's convention; in a dict it is a ValueError.
    """


def named(what, values):
    if not isinstance(values, dict):
        raise ValueError(f"{what} {shown(values)}: must be a dict of values by name")
    return values


def check_names(kind, values, known, error=ValueError):
    for name in values:
        if name not in known:
            raise error(unknown(kind, name, known))


def shown(value):
    """`value` in a message of one line."""
    text = " ".join(repr(value).split())
    if len(text) > 100:
        text = text[:97] + "..."
    return text


def unknown(kind, name, known):
    """The one-line message for a name that is not in a table, with the closest known one."""
    hint = ""
    close = difflib.get_close_matches(str(name), known, n=1)
    if close:
        hint = f" (did you mean {close[0]}?)"
    return f"unknown {kind} {str(name)!r}{hint}; known: {', '.join(known)}"


# --------------------------------------------------------------------------------------------------
# The table, registered and printed
# --------------------------------------------------------------------------------------------------


def register_table():
    """Enters the rows of TABLE, whose words are names of this file, and ode_1 ... ode_20."""
    for row in TABLE.split("\n")[1:-1]:
        env_id, cls, context, horizon, K, steps, paper_name, kind = row.split()
        register(
            env_id,
            globals()[cls],
            [globals()[name] for name in context.split(",")],
            int(horizon),
            globals()[kind],
            K=int(K),
            steps=int(steps),
            paper_name=paper_name,
        )
    for k in range(1, 21):
        register(f"ode_{k}", ODE, coefficients(k), 200, WEAK, paper_name=f"ODE-{k}")


register_table()


def table():
    """The table of environments and, below it, that of their contexts, as text."""
    row = "{:<17} {:<15} {:<22} {:>4} {:>3} {:>6}  {}".format
    lines = [row("id", "paper", "kind", "T", "K", "steps", "contexts")]
    first_in = {}
    for env_id, spec in ENVS.items():
        if spec.paper_name.startswith("ODE-"):
            continue
        numbers = spec.horizon, spec.K, spec.steps
        names = ", ".join(dim.name for dim in spec.context)
        lines.append(row(env_id, spec.paper_name, spec.kind, *numbers, names))
        for dim in spec.context:
            first_in.setdefault(dim, env_id)
    row = "{:<17} {:<15} {:>7}  {:<13} {}".format
    lines.append("ode_1 ... ode_20 are as ode, with the contexts c0 ... c(k-1) in ode_k.\n")
    lines.append(row("context", "first in", "default", "train", "extrapolation (None: two values)"))
    for dim, env_id in first_in.items():
        lines.append(row(dim.name, env_id, dim.default, str(dim.train), str(dim.extrapolation)))
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        os.write(sys.stdout.fileno(), f"{table()}\n".encode())
    except BrokenPipeError:
        pass  # The reader, such as `head`, has gone.
