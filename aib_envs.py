"""The Actuator Inversion Benchmark (AIB): environments whose hidden context may flip or swap actuators.

A context `c` is fixed during an episode and changes the dynamics only; the agent never observes it.

    env = make("cartpole_inv", length=0.7, action_factor=-1)   # one gymnasium.Env
    gymnasium.make("aib_envs:aib/cartpole_inv-v0", length=0.7, action_factor=-1)                  # the same
    gymnasium.make_vec("aib_envs:aib/cartpole_inv-v0", num_envs=20, contexts="train")             # side by side
    sets = context_sets("cartpole_inv")                        # {"train": [{...}, ...], "eval_in": [...], ...}
    envs = VectorEnv("cartpole_inv", sets["train"], seed=0)    # as dmash.py trains: with explicit resets

Every environment is a `Task`, written once for N instances side by side; `ContextualEnv` (N = 1), `VectorEnv` and
`ContextualVectorEnv` are thin views of it. A task class reads in the same order everywhere: constants, model,
measurements, reset, observation, reward. `register` enters it with its contexts and horizon in the table ENVS, for
`make`, `context_sets` and all checks. `RandomContext` and `AddContext` wrap an environment for other agents.
"""

import copy
import dataclasses
import difflib
import functools
import importlib
import itertools
import math
from pathlib import Path
from typing import NamedTuple

import gymnasium
import mujoco
import numpy as np
from gymnasium.utils import RecordConstructorArgs

# ---------------------------------------------------------------------------------------------------------------
# Values from outside, contexts above all
# ---------------------------------------------------------------------------------------------------------------

NOT_A_NUMBER = (TypeError, ValueError, OverflowError, RuntimeError)  # text, 10**400, a tensor that has a gradient


def shown(value):
    """`value` in a message of one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else text[:97] + "..."


def finite(name, value, shape):
    """`value` as an array of that shape; ValueError if it is not that many finite numbers."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except NOT_A_NUMBER:
        array = np.array(math.nan)
    if array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"{name} {shown(value)}: must be {' x '.join(map(str, shape))} finite numbers")
    return array


def named(what, values):
    if not isinstance(values, dict):
        raise ValueError(f"{what} {shown(values)}: must be a dict of values by name")
    return values


def unknown(kind, name, known):
    """The one-line message for a name that is not in a table, with the closest known one."""
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"unknown {kind} {str(name)!r}{hint}; known: {', '.join(known)}"


class ContextDim(NamedTuple):
    """One context dimension. `extrapolation` is None for a binary one: both values of `train` are in every set."""

    name: str
    default: float
    train: tuple[float, float]
    extrapolation: tuple[float, float] | None = None
    positive: bool = False  # physically impossible at or below zero
    below: float = math.inf  # and from here on
    only: tuple[float, ...] | None = None  # the only values that mean anything

    @property
    def binary(self):
        return self.extrapolation is None

    def distance(self, value):
        """From the middle of the train range, 1 at its ends."""
        low, high = self.train
        return abs(2 * value - low - high) / (high - low)

    def check(self, value):
        """Returns `value` as a float; ValueError names it if it is not finite or physically impossible."""
        try:
            number = float(value)
        except NOT_A_NUMBER:
            number = math.nan
        if self.only is not None:
            ok, allowed = number in self.only, " or ".join(f"{v:g}" for v in self.only)
        elif self.positive:
            ok = 0 < number < self.below
            allowed = "a finite number above 0" + f" and below {self.below:g}" * math.isfinite(self.below)
        else:
            ok, allowed = math.isfinite(number), "a finite number"
        if not ok or isinstance(value, (str, bool)):
            raise ValueError(f"context {self.name}={shown(value)}: must be {allowed}")
        return number


MASS = ContextDim("mass", 1.0, (0.5, 1.5), (0.1, 2.0), positive=True)  # kg
FRICTION = ContextDim("friction", 1.0, (0.5, 1.5), (0.1, 2.0))  # kg/s
ACTION_FACTOR = ContextDim("action_factor", 1.0, (-1.0, 1.0))  # multiplies the action: -1 inverts every actuator
SIGN_X, SIGN_Y = (ContextDim(f"sign_{axis}", 1.0, (-1.0, 1.0)) for axis in "xy")  # the first and second actuator
SWAP = ContextDim("swap", 0.0, (0.0, 1.0), only=(0.0, 1.0))  # 1 exchanges the first two actuators
POLE_LENGTH = ContextDim("length", 0.5, (0.3, 0.85), (0.1, 2.0), positive=True)  # half the pole, m
LENGTH_SCALE = ContextDim("length", 1.0, (0.8, 1.2), (0.4, 1.6), positive=True)  # multiplies limb lengths
CUP_GRAVITY = ContextDim("gravity", 9.81, (8.0, 12.0), (1.0, 20.0))  # m/s²
STRING_LENGTH = ContextDim("distance", 0.3, (0.24, 0.36), (0.1, 0.5), positive=True, below=0.9)  # m, to the ground
GRAVITY = ContextDim("gravity", 9.81, (4.91, 14.71), (0.98, 19.62))  # m/s²
STRENGTH = ContextDim("actuator_strength", 1.0, (0.5, 1.5), (0.1, 2.0))  # multiplies the actuators' gear


def coefficients(k):
    """c_0 ... c_{k-1} of the ODE environments."""
    return tuple(ContextDim(f"c{i}", 0.0, (-5.0, 5.0), (-10.0, 10.0)) for i in range(k))


def context_sets(env_id, n=20, seed=0):
    """The three pairwise disjoint context sets, each a list of `n` context dicts.

    A continuous dimension has 50 values: evenly spaced over the train range (train); over that range shrunk by 1 %
    of its width at both ends (eval_in); 25 below and 25 above it, at least 1 % away, up to the extrapolation limits
    (eval_out). Up to two continuous dimensions, `n` evenly spaced entries of their sorted mesh are taken; with more,
    `n` random draws of a generator seeded with `seed`. An n above the size of the mesh repeats contexts.

    Binary values, and the combinations of several, take turns; but beside one or two continuous dimensions, n = 20
    gives the published sets, in which the two values of a binary dimension stand 11 to 9.

    Returns {"train": [...], "eval_in": [...], "eval_out": [...]}. Raises ValueError for an unknown id or n < 1.
    """
    dims = lookup(env_id).context
    graded, binary = ([dim for dim in dims if dim.binary == which] for which in (False, True))
    turns = list(itertools.product(*(dim.train for dim in binary)))  # combinations of binary values
    if not (isinstance(n, (int, np.integer)) and n >= 1):
        raise ValueError(f"n={n!r}: the number of contexts must be a whole number of at least 1")

    def values(dim, which):
        (low, high), (far_low, far_high) = dim.train, dim.extrapolation
        margin = 0.01 * (high - low)
        if which == "train":
            return np.linspace(low, high, 50)
        if which == "eval_in":
            return np.linspace(low + margin, high - margin, 50)
        return np.concatenate([np.linspace(far_low, low - margin, 25), np.linspace(high + margin, far_high, 25)])

    rng = np.random.default_rng(seed)

    def draw(which):
        axes, turn = [values(dim, which) for dim in graded], np.arange(n)
        if len(graded) > 2:
            chosen = zip(*[rng.choice(axis, n) for axis in axes])
        else:
            mesh = list(itertools.product(*axes))  # sorted
            entries = np.linspace(0, len(mesh) * len(turns) - 1, n).astype(int)  # binary values side by side in it
            chosen = [mesh[entry // len(turns)] for entry in entries]
            if graded and n == 20 and len(turns) == 2:
                turn = entries
        rows = [dict(zip(graded + binary, (*row, *turns[t % len(turns)]))) for row, t in zip(chosen, turn)]
        return [{dim.name: float(row[dim]) for dim in dims} for row in rows]

    return {which: draw(which) for which in ("train", "eval_in", "eval_out")}


# ---------------------------------------------------------------------------------------------------------------
# Actuator wrappers, for these environments and any other
# ---------------------------------------------------------------------------------------------------------------


class ActuatorInversion(gymnasium.ActionWrapper, RecordConstructorArgs):
    """Multiplies each action by `signs`, a scalar or one number per actuator (-1 inverts).

    ActuatorInversion(gymnasium.make("Pendulum-v1"), -1). The action space must be symmetric about zero, for what is
    inverted to stay inside it; ValueError if it is not, or if `signs` has neither size 1 nor one entry per actuator.
    """

    def __init__(self, env, signs):
        RecordConstructorArgs.__init__(self, signs=signs)
        gymnasium.ActionWrapper.__init__(self, env)
        space = env.action_space
        self.signs = np.array(signs, dtype=np.float64)
        if not isinstance(space, gymnasium.spaces.Box) or not np.array_equal(space.low, -space.high):
            raise ValueError(f"action space {shown(space)}: must be a Box symmetric about zero")
        if self.signs.shape not in ((), (1,), space.shape) or not np.isfinite(self.signs).all():
            raise ValueError(f"signs {shown(signs)}: must be a finite number, or one for each of {space.shape}")

    def action(self, action):
        return (finite("action", action, self.action_space.shape) * self.signs).astype(self.action_space.dtype)


class ActuatorPermutation(gymnasium.ActionWrapper, RecordConstructorArgs):
    """Sends entry `order[i]` of the action to actuator i.

    ValueError if `order` is no permutation of the actuators, or exchanges actuators whose bounds differ.
    """

    def __init__(self, env, order):
        RecordConstructorArgs.__init__(self, order=order)
        gymnasium.ActionWrapper.__init__(self, env)
        space, self.order = env.action_space, np.array(order)
        if not (isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1):
            raise ValueError(f"action space {shown(space)}: must be a Box of one axis")
        (size,) = space.shape
        numbers = self.order.dtype.kind in "iu" and self.order.shape == (size,)
        if not numbers or sorted(self.order.tolist()) != list(range(size)):
            raise ValueError(f"order {shown(order)}: must be a permutation of 0 ... {size - 1}")
        if not all(np.array_equal(bound[self.order], bound) for bound in (space.low, space.high)):
            raise ValueError(f"order {shown(order)}: must leave actuators with other bounds in place, {shown(space)}")

    def action(self, action):
        return finite("action", action, self.action_space.shape)[self.order].astype(self.action_space.dtype)


# ---------------------------------------------------------------------------------------------------------------
# What all environments share
# ---------------------------------------------------------------------------------------------------------------


class Task:
    """N instances of an environment, one per context, stepped together. Arrays have one row per instance.

    A subclass gives the sizes d_s, d_a, state_size and the time of a step, dt (s), and defines, in this order: its
    model (`build`), measurements, `initial_state`, `set_state`, `state`, `advance`, `observation`, `reward`, `picture`.
    """

    def __init__(self, contexts):
        self.contexts = [dict(context) for context in contexts]
        self.N = len(self.contexts)
        self.build()

    def build(self):
        """Makes everything that depends on the contexts, from nominal values."""
        self.c = {name: np.array([context[name] for context in self.contexts]) for name in self.contexts[0]}
        self.signs = np.ones((self.N, self.d_a))
        for name, actuators in {"action_factor": range(self.d_a), "sign_x": [0], "sign_y": [1]}.items():
            if name in self.c:
                self.signs[:, actuators] *= self.c[name][:, None]
        order = np.arange(self.d_a)  # a swap exchanges the first two
        self.order = np.where(self.c["swap"][:, None] == 1, [1, 0, *order[2:]], order) if "swap" in self.c else None

    def with_contexts(self, contexts):
        """This task in other contexts, still to be given a state. This one stays as it is, also where the other cannot
        be built (ValueError)."""
        other = copy.copy(self)
        other.contexts = [dict(context) for context in contexts]
        other.build()
        return other

    def snapshot(self):
        """All that the next step depends on, as one array (N, ...): here the physical state."""
        return self.state()

    def restore(self, snapshot):
        self.set_state(snapshot)

    def reset(self, rngs):
        """Starts an episode in every instance, each from its own numpy Generator."""
        self.set_state(np.stack([self.initial_state(i, rng) for i, rng in enumerate(rngs)]))

    def step(self, actions):
        """One step of actions (N, d_a); then `observation` and `reward` are those of the new state.

        What an actuator gets, after the context flipped or swapped it, is clipped to [-1, 1] here, in every task.
        """
        actions = np.asarray(actions, dtype=np.float64) * self.signs  # float32 powers and products would differ
        if self.order is not None:
            actions = actions[np.arange(self.N)[:, None], self.order]
        self.advance(np.minimum(np.maximum(actions, -1.0), 1.0))  # faster than np.clip


# ---------------------------------------------------------------------------------------------------------------
# Pictures, drawn without OpenGL: every environment moves in a plane
# ---------------------------------------------------------------------------------------------------------------

RED, GREEN, BLUE, GREY = (200, 80, 70), (120, 180, 110), (70, 100, 170), (150, 150, 150)


class Shape(NamedTuple):
    """A line with round ends: a capsule, or a disc where both ends are one point. Metres."""

    start: np.ndarray  # (2,)
    end: np.ndarray  # (2,)
    radius: float
    colour: tuple[int, int, int]


class View(NamedTuple):
    """What a square picture shows. Metres."""

    centre: np.ndarray  # (2,)
    width: float


def draw(view, shapes, size=256):
    """The picture, (size, size, 3), uint8; later shapes cover earlier ones."""
    picture = np.full((size, size, 3), 245, dtype=np.uint8)
    ticks = (np.arange(size) + 0.5) / size - 0.5
    x, y = view.centre[0] + view.width * ticks, view.centre[1] - view.width * ticks[:, None]  # (size,), (size, 1)
    for start, end, radius, colour in shapes:
        (dx, dy), length = end - start, np.sum((end - start) ** 2)
        along = np.clip(((x - start[0]) * dx + (y - start[1]) * dy) / max(length, 1e-12), 0, 1)  # nearest point's place
        picture[np.hypot(x - start[0] - along * dx, y - start[1] - along * dy) <= radius] = colour
    return picture


# ---------------------------------------------------------------------------------------------------------------
# Toy environments
# ---------------------------------------------------------------------------------------------------------------


class DoubleIntegrator(Task):
    """A point mass in the plane, pushed by a force; it is to reach the origin and stay there.

    Context: mass, and action_factor, friction, swap or a sign for each axis. Observation and state [p (2), v (2)];
    reward 1 within .1 m.
    """

    d_s, d_a, state_size = 4, 2, 4
    dt = 0.1  # s
    GOAL_RADIUS = 0.1  # m

    def initial_state(self, i, rng):
        corner = rng.choice([-1.0, 1.0], size=2)
        return np.concatenate([corner * rng.uniform(0.8, 1.0, size=2), np.zeros(2)])  # at rest

    def set_state(self, state):
        self.p, self.v = state[:, :2].copy(), state[:, 2:].copy()

    def state(self):
        return np.concatenate([self.p, self.v], axis=-1)

    def advance(self, actions):
        mass = self.c["mass"][:, None]
        keep = 1 - self.dt * self.c["friction"][:, None] / mass if "friction" in self.c else 1.0
        self.p = np.clip(self.p + self.dt * self.v, -1, 1)  # first, with the old velocity
        self.v = np.clip(self.v * keep + self.dt * actions / mass, -1, 1)

    observation = state

    def reward(self):
        return (np.linalg.norm(self.p, axis=-1) <= self.GOAL_RADIUS).astype(float)

    def picture(self, i):
        goal, p = np.zeros(2), self.p[i]
        return View(goal, 2.4), [Shape(goal, goal, self.GOAL_RADIUS, GREEN), Shape(p, p, 0.05, BLUE)]


class ODE(Task):
    """A scalar x driven by Re(c_0 a + c_1 a^2 + ...) with the action read as a complex number a; to be held at 0.

    Context: c0, c1, ... Observation and state [x]. Reward in tiers of |x|.
    """

    d_s, d_a, state_size = 1, 2, 1
    dt = 0.01  # s
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
        return np.select([np.abs(self.x) < below for below in self.TIERS], list(self.TIERS.values()))

    def picture(self, i):
        x, goal, end = np.array([[self.x[i], 0.0], [min(self.TIERS), 0.0], [20.0, 0.0]])
        shapes = [Shape(-end, end, 0.01, GREY), Shape(-goal, goal, 0.04, GREEN), Shape(x, x, 0.06, BLUE)]
        return View(np.clip(x, -18, 18) * 0.9, 4.0), shapes


# ---------------------------------------------------------------------------------------------------------------
# DeepMind Control tasks, on models of our own
# ---------------------------------------------------------------------------------------------------------------


def near(x, margin):
    """1 at x = 0, falling like a Gaussian to .1 at |x| = margin."""
    return 0.1 ** ((x / margin) ** 2)


class MujocoTask(Task):
    """A task on MuJoCo models. State: qpos, then qvel.

    A subclass gives `xml(context)`, written from nominal values each time, and SUBSTEPS. A task that reads SENSORS
    needs them for the new state, which mj_step leaves one step behind: there, positions and velocities are integrated
    first (mj_step2), then what follows from them is computed (mj_step1).
    """

    SUBSTEPS, SENSORS = 1, False
    AXES = (0, 2)  # the world axes that a picture shows, right and up

    def build(self):
        super().build()
        try:
            self.models = [self.model(context) for context in self.contexts]
        except (ValueError, mujoco.FatalError) as error:
            raise ValueError(f"contexts {shown(self.contexts)}: {' '.join(str(error).split())}") from None
        for model in self.models:  # a simulation that diverges shows it, instead of starting anew unseen
            model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
        self.datas = [mujoco.MjData(model) for model in self.models]
        self.pairs = list(zip(self.models, self.datas))
        self.view()

    def view(self):
        """Makes views into the simulations, once: looking them up costs more than a copy."""
        self.ctrls, self.qposes, self.qvels = zip(*((data.ctrl, data.qpos, data.qvel) for data in self.datas))

    def __setstate__(self, state):
        vars(self).update(state)  # in a copy or out of a pickle, views are cut off from what they are views of
        self.view()

    @property
    def dt(self):
        return self.models[0].opt.timestep * self.SUBSTEPS

    def model(self, context):
        return mujoco.MjModel.from_xml_string(self.xml(context))

    def measure(self):
        self.qpos, self.qvel = np.array(self.qposes), np.array(self.qvels)  # (N, nq), (N, nv)

    def speed(self):
        """What the first sensor tells: the forward velocity of the centre of mass, m/s, (N,)."""
        return np.array([data.sensordata[0] for data in self.datas])

    def set_state(self, state):
        for (model, data), row in zip(self.pairs, state):
            mujoco.mj_resetData(model, data)
            data.qpos[:], data.qvel[:] = row[: model.nq], row[model.nq :]
            mujoco.mj_forward(model, data)
        self.measure()

    def state(self):
        return np.concatenate([self.qpos, self.qvel], axis=-1)

    WHOLE = mujoco.mjtState.mjSTATE_INTEGRATION  # with what the constraint solver starts from

    def snapshot(self):
        snapshot = np.empty((self.N, mujoco.mj_stateSize(self.models[0], self.WHOLE)))
        for (model, data), row in zip(self.pairs, snapshot):
            mujoco.mj_getState(model, data, row, self.WHOLE)
        return snapshot

    def restore(self, snapshot):
        for (model, data), row in zip(self.pairs, snapshot):
            mujoco.mj_setState(model, data, row, self.WHOLE)
            mujoco.mj_step1(model, data)
        self.measure()

    def advance(self, actions):
        for ctrl, action in zip(self.ctrls, actions):  # a loop of its own: faster than between the simulations
            ctrl[...] = action
        for model, data in self.pairs:
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
        """Every geom of the model but the ground, as it is now."""
        model, data = self.pairs[i]
        mujoco.mj_kinematics(model, data)
        axes, shapes = list(self.AXES), []
        if (model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE).any():
            shapes.append(Shape(np.array([-1000.0, -0.01]), np.array([1000.0, -0.01]), 0.01, GREY))
        for g in range(model.ngeom):
            size, along = model.geom_size[g], data.geom_xmat[g].reshape(3, 3)[:, 2]
            if model.geom_type[g] == mujoco.mjtGeom.mjGEOM_BOX:
                along, size = data.geom_xmat[g].reshape(3, 3)[:, 0], (size[2], size[0])
            if model.geom_type[g] != mujoco.mjtGeom.mjGEOM_PLANE:
                half = 0 * along if model.geom_type[g] == mujoco.mjtGeom.mjGEOM_SPHERE else size[1] * along
                ends = data.geom_xpos[g] - half, data.geom_xpos[g] + half
                shapes.append(Shape(*(end[axes] for end in ends), size[0], BLUE if g % 2 else RED))
        return View(self.centre(i), self.WIDTH), shapes

    def centre(self, i):
        """What a picture is centred on: the body that the others hang on, at a fixed height."""
        return np.array([self.datas[i].xpos[1][0], 0.35 * self.WIDTH])


class Cartpole(MujocoTask):
    """DMC cartpole balance: keep the pole upright and the cart in the middle, with little force.

    Context: length (half the pole, m; its mass stays .1 kg), action_factor.
    Observation [x, cos θ, sin θ, ẋ, θ̇]; state [x, θ, ẋ, θ̇], θ = 0 upright. Reward in [0, 1].
    """

    d_s, d_a, state_size = 5, 1, 4
    WIDTH = 4.5  # m

    def xml(self, context):
        return f"""
        <mujoco model="cartpole">
          <option timestep="0.01" integrator="RK4"><flag contact="disable"/></option>
          <worldbody>
            <body name="cart" pos="0 0 1">
              <joint name="slider" type="slide" axis="1 0 0" limited="true" range="-1.8 1.8" solreflimit=".08 1"
                     damping="5e-4"/>
              <geom type="box" size=".2 .15 .1" mass="1"/>
              <body name="pole">
                <joint name="hinge" type="hinge" axis="0 1 0" damping="2e-6"/>
                <geom type="capsule" fromto="0 0 0 0 0 {2 * context["length"]}" size=".045" mass=".1"/>
            </body></body>
          </worldbody>
          <actuator><motor joint="slider" gear="10" ctrllimited="true" ctrlrange="-1 1"/></actuator>
        </mujoco>"""

    def initial_state(self, i, rng):
        return np.concatenate([[rng.uniform(-0.1, 0.1), rng.uniform(-0.034, 0.034)], 0.01 * rng.standard_normal(2)])

    def observation(self):
        (x, theta), (dx, dtheta) = self.qpos.T, self.qvel.T
        return np.stack([x, np.cos(theta), np.sin(theta), dx, dtheta], axis=-1)

    def reward(self):
        (x, theta), dtheta, force = self.qpos.T, self.qvel[:, 1], np.array(self.ctrls)[:, 0]
        upright = (1 + np.cos(theta)) / 2
        centered = (1 + near(x, margin=2)) / 2
        small_control = (4 + np.maximum(0.0, 1 - force**2)) / 5
        small_velocity = (1 + near(dtheta, margin=5)) / 2
        return upright * centered * small_control * small_velocity


class Reacher(MujocoTask):
    """DMC reacher: bring the finger of a two-link arm to a target, big (easy) or small (hard).

    Context: length (scales both links), and action_factor or swap.
    Observation [shoulder, wrist, finger to target (2), velocities (2)]; reward 1 while the finger touches the target.
    """

    d_s, d_a, state_size = 6, 2, 4
    AXES, WIDTH = (0, 1), 0.8  # m
    LINK = 0.12  # m, shoulder to wrist and wrist to finger
    FINGER = 0.01  # m, radius
    TARGET = 0.05  # m, radius

    def __init__(self, contexts):
        self.target = np.zeros((len(contexts), 2))
        super().__init__(contexts)

    def xml(self, context):
        scale = context["length"]
        return f"""
        <mujoco model="reacher">
          <option timestep="0.02"><flag contact="disable"/></option>
          <default>
            <joint type="hinge" axis="0 0 1" damping="0.01"/>
            <motor gear=".05" ctrllimited="true" ctrlrange="-1 1"/>
          </default>
          <worldbody>
            <body name="arm" pos="0 0 .01">
              <geom type="capsule" fromto="0 0 0 {0.12 * scale} 0 0" size=".01"/>
              <joint name="shoulder"/>
              <body name="hand" pos="{0.12 * scale} 0 0">
                <geom type="capsule" fromto="0 0 0 {0.1 * scale} 0 0" size=".01"/>
                <joint name="wrist" limited="true" range="-160 160"/>
                <body name="finger" pos="{0.12 * scale} 0 0"><geom type="sphere" size=".01"/></body>
            </body></body>
          </worldbody>
          <actuator><motor joint="shoulder"/><motor joint="wrist"/></actuator>
        </mujoco>"""

    def measure(self):
        super().measure()
        directions = self.qpos.cumsum(-1)  # of both links, (N, 2)
        (x1, x2), (y1, y2) = np.cos(directions).T, np.sin(directions).T
        self.to_target = self.target - (self.LINK * self.c["length"] * np.array([x1 + x2, y1 + y2])).T

    def initial_state(self, i, rng):
        qpos = self.random_joints(self.models[i], rng)
        angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.2)
        self.target = self.target.copy()  # not that of with_contexts' other task
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
        return (np.hypot(*self.to_target.T) <= self.TARGET + self.FINGER).astype(float)

    def picture(self, i):
        view, shapes = super().picture(i)
        return view, [Shape(self.target[i], self.target[i], self.TARGET, GREEN)] + shapes

    def centre(self, i):
        return np.zeros(2)


class HardReacher(Reacher):
    """Reacher with a small target."""

    TARGET = 0.015  # m, radius


class BallInCup(MujocoTask):
    """DMC ball in cup: swing a ball on a string into a cup that moves in the vertical plane.

    Context: gravity, distance (of the string, m). Observation and state [cup x, z, ball x, z, velocities (4)].
    Reward 1 while the ball is in the cup.
    """

    d_s, d_a, state_size = 8, 2, 8
    SUBSTEPS, WIDTH = 10, 1.2  # m

    def xml(self, context):
        string = context["distance"]
        return f"""
        <mujoco model="ball in cup">
          <option gravity="0 0 {-context["gravity"]}"/>
          <default>
            <motor gear="5" ctrllimited="true" ctrlrange="-1 1"/>
            <joint type="slide"/>
            <default class="cup"><joint damping="3" stiffness="20"/><geom type="capsule" size=".008"/></default>
          </default>
          <worldbody>
            <geom name="ground" type="plane" size=".6 .2 10"/>
            <body name="cup" pos="0 0 .6" childclass="cup">
              <joint name="cup_x" axis="1 0 0"/><joint name="cup_z" axis="0 0 1"/>
              <geom fromto="-.05 0 0 -.05 0 -.075"/>
              <geom fromto="-.05 0 -.075 -.025 0 -.1"/>
              <geom fromto="-.025 0 -.1 .025 0 -.1"/>
              <geom fromto=".025 0 -.1 .05 0 -.075"/>
              <geom fromto=".05 0 -.075 .05 0 0"/>
              <site name="cup" pos="0 0 -.108" size=".005"/>
            </body>
            <body name="ball" pos="0 0 {0.2 + 0.3 - string}">
              <joint name="ball_x" axis="1 0 0"/><joint name="ball_z" axis="0 0 1"/>
              <geom type="sphere" size=".025"/><site name="ball" size=".005"/>
            </body>
          </worldbody>
          <tendon>
            <spatial limited="true" range="0 {string}"><site site="ball"/><site site="cup"/></spatial>
          </tendon>
          <actuator><motor joint="cup_x"/><motor joint="cup_z"/></actuator>
        </mujoco>"""

    def ball_to_target(self):
        """From the ball's centre to the middle of the cup, (N, 2)."""
        cup_x, cup_z, ball_x, ball_z = self.qpos.T
        return np.stack([cup_x - ball_x, (0.6 - 0.05 + cup_z) - (0.5 - self.c["distance"] + ball_z)], axis=-1)

    def initial_state(self, i, rng):
        model, data = self.pairs[i]
        while True:  # until the ball touches nothing
            mujoco.mj_resetData(model, data)
            data.qpos[2:] = rng.uniform(-0.2, 0.2), rng.uniform(0.2, 0.5)
            mujoco.mj_forward(model, data)
            if data.ncon == 0:
                return np.concatenate([data.qpos, data.qvel])

    def reward(self):
        inside = np.abs(self.ball_to_target()) < 0.05 - 0.025  # half the cup less the ball's radius
        return inside.all(axis=-1).astype(float)


class Cheetah(MujocoTask):
    """DMC cheetah run: a planar two-legged runner, rewarded for speed up to 10 m/s.

    Context: length (scales the legs; the total mass stays 14 kg), action_factor.
    Observation: qpos without the horizontal position, then qvel. Reward in [0, 1].
    """

    d_s, d_a, state_size = 17, 6, 18
    SENSORS, WIDTH = True, 3.0  # m
    SPEED = 10.0  # m/s, for full reward
    SETTLE = 200  # steps
    MASS = 14.0  # kg

    def xml(self, context):
        s = context["length"]

        def leg(name, body, joint, position, angle, half, child=""):
            """A body with its hinge and capsule: offset (x, z), (range, stiffness, damping), geom position (x, z)."""
            (x, z), (low, high, stiffness, damping), (gx, gz) = body, joint, position
            return f"""
            <body name="{name}" pos="{x} 0 {z}">
              <joint name="{name}" range="{low} {high}" stiffness="{stiffness}" damping="{damping}"/>
              <geom pos="{gx * s} 0 {gz * s}" euler="0 {angle} 0" size=".046 {half * s}"/>{child}
            </body>"""

        bfoot = leg("bfoot", (-0.28 * s, -0.14 * s), (-230, 50, 120, 3), (0.03, -0.097), -15, 0.094)
        bshin = leg("bshin", (0.16 * s, -0.25 * s), (-50, 50, 180, 4.5), (-0.14, -0.07), -116, 0.15, bfoot)
        bthigh = leg("bthigh", (-0.5, 0), (-30, 60, 240, 6), (0.1, -0.13), -218, 0.145, bshin)
        ffoot = leg("ffoot", (0.13 * s, -0.18 * s), (-28, 28, 60, 1.5), (0.045, -0.07), -34, 0.07)
        fshin = leg("fshin", (-0.14 * s, -0.24 * s), (-70, 50, 120, 3), (0.065, -0.09), -34, 0.106, ffoot)
        fthigh = leg("fthigh", (0.5, 0), (-57, 0.4, 180, 4.5), (-0.07, -0.12), 30, 0.133, fshin)
        gears = {"bthigh": 120, "bshin": 90, "bfoot": 60, "fthigh": 90, "fshin": 60, "ffoot": 30}
        motors = "".join(f'<motor joint="{joint}" gear="{gear}"/>' for joint, gear in gears.items())
        return f"""
        <mujoco model="cheetah">
          <option timestep="0.01"/>
          <default>
            <motor ctrllimited="true" ctrlrange="-1 1"/>
            <geom type="capsule" friction=".4 .1 .1"/>
            <joint limited="true" damping=".01" armature=".1" stiffness="8" type="hinge" axis="0 1 0"/>
            <default class="root"><joint limited="false" damping="0" armature="0" stiffness="0"/></default>
          </default>
          <worldbody>
            <geom name="ground" type="plane" conaffinity="1" pos="98 0 0" size="100 .8 .5" friction="1 .005 .0001"/>
            <body name="torso" pos="0 0 .7">
              <joint name="rootx" type="slide" axis="1 0 0" class="root"/>
              <joint name="rootz" type="slide" axis="0 0 1" class="root"/>
              <joint name="rooty" axis="0 1 0" class="root"/>
              <geom fromto="-.5 0 0 .5 0 0" size=".046"/>
              <geom pos=".6 0 .1" euler="0 50 0" size=".046 .15"/>{bthigh}{fthigh}
            </body>
          </worldbody>
          <actuator>{motors}</actuator>
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
        mujoco.mj_step2(model, data)  # as in dm_control, still with the forces of the default pose
        mujoco.mj_step(model, data, self.SETTLE - 1)  # falls to the ground
        return np.concatenate([data.qpos, data.qvel])

    def observation(self):
        return np.concatenate([self.qpos[:, 1:], self.qvel], axis=-1)

    def reward(self):
        return np.clip(self.speed() / self.SPEED, 0, 1)


class Walker(MujocoTask):
    """DMC walker walk: a planar biped, rewarded for an upright torso at height and 1 m/s.

    Context: gravity, actuator_strength. Observation: torso height, cosine and sine of each of the seven bodies'
    angles, qvel. Reward in [0, 1].
    """

    d_s, d_a, state_size = 24, 6, 18
    SUBSTEPS, SENSORS, WIDTH = 10, True, 3.0  # m
    HEIGHT = 1.2  # m
    SPEED = 1.0  # m/s

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

        gears = {"hip": 100, "knee": 50, "ankle": 20}
        joints = [(f"{side}_{name}", gear) for side in ("right", "left") for name, gear in gears.items()]
        strength = context["actuator_strength"]
        motors = "".join(f'<motor joint="{joint}" gear="{gear * strength}"/>' for joint, gear in joints)
        return f"""
        <mujoco model="walker">
          <option timestep="0.0025" gravity="0 0 {-context["gravity"]}"/>
          <default>
            <motor ctrllimited="true" ctrlrange="-1 1"/>
            <geom type="capsule" contype="1" conaffinity="0" friction=".7 .1 .1"/>
            <joint axis="0 -1 0" damping=".1" armature=".01" limited="true" solimplimit="0 .99 .01"/>
            <default class="root"><joint limited="false" damping="0" armature="0"/></default>
          </default>
          <worldbody>
            <geom name="ground" type="plane" conaffinity="1" pos="248 0 0" size="250 .8 .2"/>
            <body name="torso" pos="0 0 1.3">
              <joint name="rootz" axis="0 0 1" type="slide" class="root"/>
              <joint name="rootx" axis="1 0 0" type="slide" class="root"/>
              <joint name="rooty" axis="0 1 0" type="hinge" class="root"/>
              <geom size=".07 .3"/>{leg("right", -0.05)}{leg("left", 0.05)}
            </body>
          </worldbody>
          <actuator>{motors}</actuator>
          <sensor><subtreelinvel body="torso"/></sensor>
        </mujoco>"""

    def height(self):
        return 1.3 + self.qpos[:, 0]

    def angles(self):
        """Of torso, right thigh, leg, foot, left thigh, leg, foot about the y axis, (N, 7)."""
        torso, right, left = self.qpos[:, 2:3], self.qpos[:, 3:6], self.qpos[:, 6:9]
        return np.concatenate([torso, torso - right.cumsum(-1), torso - left.cumsum(-1)], axis=-1)

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


# ---------------------------------------------------------------------------------------------------------------
# Gymnasium: its locomotion tasks, never terminating, and any other environment without terminal states
# ---------------------------------------------------------------------------------------------------------------


class GymTask(MujocoTask):
    """A locomotion task of Gymnasium on its own model file, without its terminal states.

    Context: gravity, actuator_strength. Observation: qpos without the horizontal position, qvel clipped to ±10.
    Reward: forward speed (m/s), + 1 while healthy, - .001 |a|².
    """

    SUBSTEPS, WIDTH = 4, 3.0  # m
    NOISE = 5e-3  # of the starting state

    def model(self, context):
        model = mujoco.MjModel.from_xml_path(str(Path(gymnasium.__file__).parent / "envs/mujoco/assets" / self.FILE))
        model.opt.gravity[2] = -context["gravity"]
        model.actuator_gear *= context["actuator_strength"]  # of a model just loaded
        return model

    def initial_state(self, i, rng):
        rest = np.concatenate([self.models[i].qpos0, np.zeros(self.models[i].nv)])
        return rest + rng.uniform(-self.NOISE, self.NOISE, size=self.state_size)

    def advance(self, actions):
        before = self.qpos[:, 0]
        super().advance(actions)
        self.velocity = (self.qpos[:, 0] - before) / self.dt

    def observation(self):
        return np.concatenate([self.qpos[:, 1:], np.clip(self.qvel, -10, 10)], axis=-1)

    def reward(self):
        return self.velocity + self.healthy() - 1e-3 * np.square(np.array(self.ctrls)).sum(-1)


class WalkerGym(GymTask):
    """Gymnasium's Walker2d-v5."""

    d_s, d_a, state_size = 17, 6, 18
    FILE = "walker2d_v5.xml"

    def healthy(self):
        height, angle = self.qpos[:, 1], self.qpos[:, 2]
        return (0.8 < height) & (height < 2.0) & (-1.0 < angle) & (angle < 1.0)


class HopperGym(GymTask):
    """Gymnasium's Hopper-v5."""

    d_s, d_a, state_size = 11, 3, 12
    FILE = "hopper.xml"

    def healthy(self):
        height, angle = self.qpos[:, 1], self.qpos[:, 2]
        others = np.abs(np.concatenate([self.qpos, self.qvel], axis=-1)[:, 2:])
        return (0.7 < height) & (-0.2 < angle) & (angle < 0.2) & (others < 100).all(axis=-1)


class BadEnvironment(ValueError):
    """An environment that cannot be trained on."""


class GymnasiumTask(Task):
    """An environment of Gymnasium without terminal states, whose actuators are what is hidden.

    Context: actuator_strength and action_factor, which multiply the action; -1 ... 1 spans the environment's bounds.
    Its physical state can neither be read nor set. `gymnasium_spec` makes the class for an id.
    """

    state_size = 0

    def __init__(self, contexts):
        # -1: no time limit in it; the views count the horizon
        make = lambda: gymnasium.wrappers.RescaleAction(gymnasium.make(self.gymnasium_id, max_episode_steps=-1), -1, 1)
        self.envs = gymnasium.vector.SyncVectorEnv([make] * len(contexts))
        super().__init__(contexts)

    def reset(self, rngs):
        self.s, _ = self.envs.reset(seed=[int(rng.integers(2**31)) for rng in rngs])

    def set_state(self, state):
        pass

    def state(self):
        return np.zeros((self.N, 0))

    def advance(self, actions):
        actions = np.clip(actions * self.c["actuator_strength"][:, None], -1, 1)
        self.s, self.r, terminated, truncated, _ = self.envs.step(actions.astype(np.float32))
        if terminated.any() or truncated.any():
            raise BadEnvironment(f"gymnasium:{self.gymnasium_id} has terminal states: the method knows none but time")

    def observation(self):
        return self.s

    def reward(self):
        return self.r

    def picture(self, i):
        raise ValueError(f"gymnasium:{self.gymnasium_id}: no picture here, but by gymnasium.make")


@functools.cache
def gymnasium_spec(gymnasium_id):
    """The EnvSpec of any environment of Gymnasium; ValueError says why it will not do. One random episode is tried."""
    env = gymnasium.make(gymnasium_id)
    horizon, spaces = env.spec.max_episode_steps, (env.observation_space, env.action_space)
    boxes = all(isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1 for space in spaces)
    if not (boxes and env.action_space.is_bounded() and env.action_space.dtype.kind == "f" and horizon):
        what = "Boxes of one axis as spaces, bounded float actions and a horizon (max_episode_steps)"
        raise BadEnvironment(f"gymnasium:{gymnasium_id}: must have {what}")
    d_s, d_a = (space.shape[0] for space in spaces)
    sizes = dict(gymnasium_id=gymnasium_id, d_s=d_s, d_a=d_a, dt=1 / (env.metadata.get("render_fps") or 30))
    spec = EnvSpec(type(gymnasium_id, (GymnasiumTask,), sizes), (STRENGTH, ACTION_FACTOR), horizon, NON)
    rng, task = np.random.default_rng(0), spec.cls([{"actuator_strength": 1.0, "action_factor": 1.0}])
    task.reset([rng])
    for _ in range(horizon):
        task.step(rng.uniform(-1, 1, (1, d_a)))
    return spec


# ---------------------------------------------------------------------------------------------------------------
# The table of environments
# ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """One row of the benchmark: the class, context dimensions, steps per episode, whether one context-unaware policy
    does well in every context (overlapping), the paper's window and gradient steps, and its name there."""

    cls: type
    context: tuple[ContextDim, ...]
    horizon: int
    kind: str
    K: int = 24  # past transitions in a window
    steps: int = 100_000  # gradient steps of a run
    paper_name: str = "-"


ENVS = {}
NON, WEAK, OVER = "non-overlapping", "weakly non-overlapping", "overlapping"


def register(env_id, cls, context, horizon, kind=NON, **rest):
    """Adds an environment, a row of EnvSpec: for `make`, for Gymnasium as aib/<env_id>-v0, for dmash.py as
    --env <module>:<env_id>, module being the one that calls this. ValueError says what is wrong with the class."""
    default = {dim.name: dim.default for dim in context}

    def require(ok, what):
        if not ok:
            raise ValueError(f"environment {env_id!r}: {cls.__name__} {what}")

    for name in ("d_s", "d_a", "state_size"):
        require(isinstance(getattr(cls, name, None), int), f"must give {name}, a whole number")
    for name in ("dt", "initial_state", "set_state", "state", "advance", "observation", "reward", "picture"):
        require(getattr(cls, name, None) is not None, f"has no {name}")
    require(cls.d_a > 1 or not {"swap", "sign_y"} & default.keys(), "has no two actuators")
    task = cls([default] * 2)
    task.reset([np.random.default_rng(0)] * 2)
    task.step(np.zeros((2, cls.d_a)))
    for name, size in (("state", (2, cls.state_size)), ("observation", (2, cls.d_s)), ("reward", (2,))):
        shape = np.shape(getattr(task, name)())
        require(shape == size, f"gives a {name} of shape {shape} for two instances: must be {size}")
    ENVS[env_id] = EnvSpec(cls, tuple(context), horizon, kind, **rest)
    views = dict(entry_point="aib_envs:ContextualEnv", vector_entry_point="aib_envs:ContextualVectorEnv")
    gymnasium.register(f"aib/{env_id}-v0", **views, max_episode_steps=horizon, kwargs={"env_id": env_id})


DMC, GYM = dict(K=128, steps=200_000), dict(K=128, steps=500_000)
register("di_inv", DoubleIntegrator, (MASS, ACTION_FACTOR), 100, NON, paper_name="DI")
register("di_friction", DoubleIntegrator, (MASS, FRICTION), 100, OVER, paper_name="DI-Friction")
register("di_perm", DoubleIntegrator, (MASS, SWAP), 100, NON, paper_name="DI-Perm")
register("ode", ODE, coefficients(2), 200, WEAK, paper_name="ODE")
register("cartpole_inv", Cartpole, (POLE_LENGTH, ACTION_FACTOR), 1000, NON, K=128, paper_name="Cartpole")
register("cheetah_inv", Cheetah, (LENGTH_SCALE, ACTION_FACTOR), 1000, NON, **DMC, paper_name="Cheetah")
register("reacher_easy_inv", Reacher, (LENGTH_SCALE, ACTION_FACTOR), 1000, NON, **DMC, paper_name="Reacher(E)")
register("reacher_hard_inv", HardReacher, (LENGTH_SCALE, ACTION_FACTOR), 1000, NON, **DMC, paper_name="Reacher(H)")
register("reacher_hard_perm", HardReacher, (LENGTH_SCALE, SWAP), 1000, NON, **DMC, paper_name="Reacher(H)-Perm")
register("ball_in_cup", BallInCup, (CUP_GRAVITY, STRING_LENGTH), 1000, OVER, **DMC, paper_name="BallInCup")
register("walker", Walker, (GRAVITY, STRENGTH), 1000, OVER, **DMC, paper_name="Walker")
register("walker_gym", WalkerGym, (GRAVITY, STRENGTH), 1000, OVER, **GYM, paper_name="WalkerGym")
register("hopper_gym", HopperGym, (GRAVITY, STRENGTH), 1000, OVER, **GYM, paper_name="HopperGym")
for _k in range(1, 21):
    register(f"ode_{_k}", ODE, coefficients(_k), 200, WEAK, paper_name=f"ODE-{_k}")
# Beyond the paper: two signs, so that a pair of them can be new where each sign is known
register("di_signs", DoubleIntegrator, (MASS, SIGN_X, SIGN_Y), 100, NON)


def lookup(env_id):
    """The EnvSpec of an id of the table, of "module:id", where importing the module registers the id, or of
    "gymnasium:id", for an environment of Gymnasium. ValueError, ImportError, TypeError (./module:id) or Gymnasium's
    own for an unknown one."""
    module, _, name = str(env_id).rpartition(":")
    if module.split(":")[0] == "gymnasium":
        return gymnasium_spec(str(env_id).removeprefix("gymnasium:"))
    if module:
        importlib.import_module(module)
    if name not in ENVS:
        raise ValueError(unknown("environment", name, list(ENVS)))
    return ENVS[name]


def full_context(env_id, context):
    """`context` checked, with the defaults of what it does not name, in the order of the table."""
    dims = lookup(env_id).context
    for name in named("context", context):
        if name not in [dim.name for dim in dims]:
            raise ValueError(unknown(f"context of {env_id}", name, [dim.name for dim in dims]))
    return {dim.name: dim.check(context.get(dim.name, dim.default)) for dim in dims}


def contexts_of(env_id, contexts, n=20, base={}):
    """A list of contexts, or the set of `n` of that name, checked and in full, with the values of `base` before the
    defaults."""
    found = context_sets(env_id, n).get(contexts) if isinstance(contexts, str) else contexts
    if not isinstance(found, (list, tuple)) or not found:
        raise ValueError(f"contexts {shown(contexts)}: must be a list of at least one, or train, eval_in or eval_out")
    return [full_context(env_id, base | named("context", context)) for context in found]


# ---------------------------------------------------------------------------------------------------------------
# The views of a task: one Gymnasium environment, and all contexts together
# ---------------------------------------------------------------------------------------------------------------


def box(size, largest=float(np.finfo(np.float32).max)):
    return gymnasium.spaces.Box(-largest, largest, (size,), np.float32)


def need_reset(env, call):
    if env.t is None:
        raise gymnasium.error.ResetNeeded(f"{env.env_id}: call reset() before {call}()")


class ContextualEnv(gymnasium.Env):
    """One environment of the benchmark as a Gymnasium environment.

    The context is in `info["context"]` and never in the observation. There is no terminal state; an episode is
    truncated at `horizon`, which is left to gymnasium.make's TimeLimit where that makes the environment. ValueError
    for an unknown id or context and for values that mean nothing.

    reset(options={"state": array, "target": (x, y), "context": {...}}), each optional: a state to start from (qpos,
    qvel; [p, v]; [x]), the reacher's target, context values to change. `set_context` changes them mid-episode.
    """

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, env_id, render_mode=None, horizon=math.inf, **context):
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode {render_mode!r}: must be None or 'rgb_array'")
        self.env_id, self.render_mode, self.horizon = env_id, render_mode, horizon
        self.task, self.t = lookup(env_id).cls([full_context(env_id, context)]), None  # t None: not yet reset
        self.metadata = self.metadata | {"render_fps": round(1 / self.task.dt)}
        self.observation_space, self.action_space = box(self.task.d_s), box(self.task.d_a, 1.0)

    @property
    def context(self):
        return dict(self.task.contexts[0])

    def state(self):
        """The physical state, float64: what reset(options={"state": ...}) takes."""
        need_reset(self, "state")
        return self.task.state()[0]

    def set_context(self, **context):
        """Changes context values now and keeps the physical state."""
        task = self.task.with_contexts([full_context(self.env_id, self.context | context)])
        need_reset(self, "set_context")
        task.set_state(self.task.state())
        self.task = task

    def reset(self, *, seed=None, options=None):
        options = dict(named("options", {} if options is None else options))
        context = full_context(self.env_id, self.context | named("context", options.pop("context", {})))
        sizes = {"state": self.task.state_size, "target": len(np.ravel(getattr(self.task, "target", ())))}
        given = {name: finite(name, options.pop(name), (n,))[None] for name, n in sizes.items() if name in options}
        if options:
            raise ValueError(unknown("option", next(iter(options)), ["state", "target", "context"]))
        task = self.task if context == self.context else self.task.with_contexts([context])
        super().reset(seed=seed)
        self.task = task
        self.task.reset([self.np_random])
        if "target" in given:
            self.task.target = given["target"].copy()
        if given:
            self.task.set_state(given.get("state", self.task.state()))
        self.t = 0
        return self.observation(), {"context": self.context}

    def observation(self):
        return self.task.observation()[0].astype(np.float32)

    def step(self, action):
        """One step of `action`, (d_a,); what an actuator gets is clipped to [-1, 1]."""
        need_reset(self, "step")
        self.task.step(finite("action", action, (self.task.d_a,))[None])
        self.t += 1
        truncated = self.t >= self.horizon
        return self.observation(), float(self.task.reward()[0]), False, truncated, {"context": self.context}

    def render(self):
        """The picture, (256, 256, 3), or None without a render mode."""
        need_reset(self, "render")
        return draw(*self.task.picture(0)) if self.render_mode else None


def make(env_id, **options):
    """The environment `env_id` in the context given by name; what is not named has its default."""
    env = ContextualEnv(env_id, **{"horizon": lookup(env_id).horizon} | options)
    if spec := gymnasium.registry.get(f"aib/{env_id}-v0"):
        env.spec = dataclasses.replace(spec, max_episode_steps=env.horizon, kwargs={"env_id": env_id} | env.context)
    return env


def contextual(env):
    """The ContextualEnv that `env` wraps."""
    if not isinstance(env.unwrapped, ContextualEnv):
        raise ValueError(f"{shown(env)}: must be an environment of aib_envs, with a context")
    return env.unwrapped


class RandomContext(gymnasium.Wrapper, RecordConstructorArgs):
    """Draws a context at each reset, by the environment's generator, from a list (what that does not name stays as the
    environment has it now) or the set of that name."""

    def __init__(self, env, contexts="train"):
        RecordConstructorArgs.__init__(self, contexts=contexts)
        gymnasium.Wrapper.__init__(self, env)
        self.contexts = contexts_of(contextual(env).env_id, contexts, base=env.unwrapped.context)

    def reset(self, *, seed=None, options=None):
        """Values in options["context"] take the place of drawn ones."""
        if seed is not None:
            self.env.reset(seed=seed)  # a context and a state of the same seed would be drawn alike
        context = self.contexts[self.np_random.integers(len(self.contexts))]
        options = {"context": {}} | named("options", options or {})
        return self.env.reset(options=options | {"context": context | named("context", options["context"])})


class AddContext(gymnasium.ObservationWrapper, RecordConstructorArgs):
    """Tells the context, (d_c,), in the order of the table: at the end of the observation or, with a `key`, beside it,
    as {"observation": ..., key: ...}."""

    def __init__(self, env, key=None):
        RecordConstructorArgs.__init__(self, key=key)
        gymnasium.ObservationWrapper.__init__(self, env)
        space, self.key = box(len(contextual(env).context)), key
        if key is not None:
            self.observation_space = gymnasium.spaces.Dict({"observation": env.observation_space, key: space})
        elif len(env.observation_space.shape or ()) == 1:
            self.observation_space = box(env.observation_space.shape[0] + space.shape[0])
        else:
            raise ValueError(f"observation space {shown(env.observation_space)}: needs a key, as it has not one axis")

    def observation(self, observation):
        context = np.float32(list(self.unwrapped.context.values()))
        if self.key is None:
            return np.append(observation, context).astype(np.float32)
        return {"observation": observation, self.key: context}


class VectorEnv:
    """One instance per context, reset and stepped together (the horizon is fixed, so they end together)."""

    def __init__(self, env_id, contexts, seed):
        self.env_id, self.horizon = env_id, lookup(env_id).horizon
        self.task = lookup(env_id).cls(contexts_of(env_id, contexts))
        self.N, self.d_s, self.d_a = self.task.N, self.task.d_s, self.task.d_a
        self.c = np.array([list(context.values()) for context in self.task.contexts], dtype=np.float32)  # (N, d_c)
        self.rngs = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(self.N)]
        self.t = None  # not yet reset

    def reset(self):
        """Starts an episode everywhere. Observations (N, d_s)."""
        self.task.reset(self.rngs)
        self.t = 0
        return self.task.observation().astype(np.float32)

    def step(self, actions):
        """Actions (N, d_a). Returns observations (N, d_s), rewards (N,) and whether the horizon is reached."""
        need_reset(self, "step")
        self.task.step(finite("actions", actions, (self.N, self.d_a)))
        self.t += 1
        observation, reward = self.task.observation(), self.task.reward()
        return observation.astype(np.float32), reward.astype(np.float32), self.t >= self.horizon

    def state_dict(self):
        """Everything that the next steps and resets depend on, in plain lists and numbers."""
        states = [rng.bit_generator.state for rng in self.rngs]
        return {"t": self.t, "rngs": states, "task": None if self.t is None else self.task.snapshot().tolist()}

    def load_state_dict(self, state):
        self.t = state["t"] if self.task.state_size else None  # of no size: it could not be kept, a reset is needed
        if self.t is not None:
            self.task.restore(np.array(state["task"]))
        for rng, rng_state in zip(self.rngs, state["rngs"]):
            rng.bit_generator.state = rng_state


class ContextualVectorEnv(gymnasium.vector.VectorEnv):
    """The VectorEnv of training as a vector environment of Gymnasium, which gymnasium.make_vec makes.

    contexts: a list of `num_envs` contexts, or a set's name; values of the context given by name hold in all of them.
    All episodes end together; the step after that begins new ones, whatever its actions (autoreset in the next step).
    infos["context"] has an array (num_envs,) per dimension. A seed starts instance i as seed + i starts a single one.
    """

    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP}

    def __init__(self, env_id, num_envs=1, contexts=None, max_episode_steps=None, **context):
        contexts = contexts_of(env_id, [{}] * num_envs if contexts is None else contexts, num_envs)
        if len(contexts) != num_envs:
            raise ValueError(f"num_envs={num_envs}: must be the number of contexts, here {len(contexts)}")
        self.envs, self.num_envs = VectorEnv(env_id, [each | context for each in contexts], seed=None), num_envs
        self.envs.horizon = max_episode_steps or self.envs.horizon
        self.single_observation_space, self.single_action_space = box(self.envs.d_s), box(self.envs.d_a, 1.0)
        spaces = self.single_observation_space, self.single_action_space
        self.observation_space, self.action_space = (gymnasium.vector.utils.batch_space(x, num_envs) for x in spaces)

    def reset(self, *, seed=None, options=None):
        """`seed`: a number, or one for each instance. Returns observations (num_envs, d_s) and infos."""
        if options:
            raise ValueError(f"options {shown(options)}: a vector environment has none")
        if seed is not None:
            seeds = [seed + i for i in range(self.num_envs)] if np.ndim(seed) == 0 else seed
            if len(seeds) != self.num_envs:
                raise ValueError(f"seed {shown(seed)}: must be a number, or {self.num_envs} of them")
            rngs = zip(seeds, self.envs.rngs)  # None: goes on
            self.envs.rngs = [rng if each is None else np.random.default_rng(each) for each, rng in rngs]
        return self.envs.reset(), self.infos()

    def infos(self):
        """As SyncVectorEnv gives them, with a mask beside each array."""
        there = np.ones(self.num_envs, dtype=bool)
        context = {name: values.copy() for name, values in self.envs.task.c.items()}
        return {"context": context | {f"_{name}": there.copy() for name in context}, "_context": there}

    def step(self, actions):
        if self.envs.t == self.envs.horizon:
            observations, rewards, done = self.envs.reset(), np.zeros(self.num_envs), False
        else:
            observations, rewards, done = self.envs.step(actions)
        terminated, truncated = np.zeros(self.num_envs, dtype=bool), np.full(self.num_envs, done)
        return observations, rewards.astype(np.float64), terminated, truncated, self.infos()


def table():
    """The table of environments as text, a line each."""

    def describe(dim):
        if dim.binary:
            return f"{dim.name} in {{{dim.train[0]:g}, {dim.train[1]:g}}}"
        (low, high), (far_low, far_high) = dim.train, dim.extrapolation
        return f"{dim.name} {dim.default:g}, [{low:g}, {high:g}], [{far_low:g}, {far_high:g}]"

    row = "{:<18} {:<16} {:<23} {:>7} {:>4} {:>7}  {}".format
    lines = [row("id", "paper", "kind", "horizon", "K", "steps", "contexts: default, train range, extrapolation range")]
    for env_id, spec in ENVS.items():
        dims = [describe(dim) for dim in spec.context[:2]]
        dims += [f"and so on to {spec.context[-1].name}"] * (len(spec.context) > 2)
        lines.append(row(env_id, spec.paper_name, spec.kind, spec.horizon, spec.K, spec.steps, "; ".join(dims)))
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
