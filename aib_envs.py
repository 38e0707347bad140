"""The Actuator Inversion Benchmark (AIB): environments whose hidden context may flip an actuator.

A context `c` is fixed during an episode and changes the dynamics only; the agent never observes it.

    env = make("cartpole_inv", length=0.7, action_factor=-1)     # one gymnasium.Env
    sets = context_sets("cartpole_inv")                          # {"train": [{...}, ...], "eval_in": ..., "eval_out": ...}
    envs = VectorEnv("cartpole_inv", sets["train"])              # one environment a context, stepped together

The table ENVS at the end of this file declares every environment once; `make`, `context_sets` and all checks
read it. To add an environment: write a class below with the sections model, measurements, reset, observation,
reward in that order, and give it a row in ENVS.
"""

import difflib
import math
from dataclasses import dataclass
from typing import NamedTuple

import gymnasium
import mujoco
import numpy as np

# ---------------------------------------------------------------------------------------------------------------
# Contexts
# ---------------------------------------------------------------------------------------------------------------


class ContextDim(NamedTuple):
    """One context dimension. `extrapolation` is None for a binary one: both values of `train` are in every set."""

    name: str
    default: float
    train: tuple[float, float]
    extrapolation: tuple[float, float] | None = None
    positive: bool = False  # physically impossible at or below zero

    @property
    def binary(self):
        return self.extrapolation is None

    def check(self, value):
        """Returns `value` as a float; ValueError names it if it is not finite or physically impossible."""
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or (self.positive and number <= 0):
            allowed = "a finite number above 0" if self.positive else "a finite number"
            raise ValueError(f"context {self.name}={value!r}: must be {allowed}")
        return number


MASS = ContextDim("mass", 1.0, (0.5, 1.5), (0.1, 2.0), positive=True)
ACTION_FACTOR = ContextDim("action_factor", 1.0, (-1.0, 1.0))  # multiplies the action: -1 inverts every actuator
POLE_LENGTH = ContextDim("length", 0.5, (0.3, 0.85), (0.1, 2.0), positive=True)  # half the pole, m


def coefficient(i):
    """c_i of the ODE environments."""
    return ContextDim(f"c{i}", 0.0, (-5.0, 5.0), (-10.0, 10.0))


def context_sets(env_id, n=20, seed=0):
    """The three pairwise disjoint context sets, each a list of `n` context dicts.

    A continuous dimension has 50 values: evenly spaced over the train range (train); over that range shrunk by 1 %
    of its width at both ends (eval_in); 25 below and 25 above it, at least 1 % away, up to the extrapolation limits
    (eval_out). A binary dimension keeps both values. Up to two dimensions, `n` evenly spaced entries of the sorted
    mesh are taken; with more dimensions, `n` random draws of a generator seeded with `seed`.

    Returns {"train": [...], "eval_in": [...], "eval_out": [...]}. Raises ValueError for an unknown id or n < 1.
    """
    dims = lookup(env_id).context
    if not (isinstance(n, (int, np.integer)) and n >= 1):
        raise ValueError(f"n={n!r}: the number of contexts must be a whole number of at least 1")

    def values(dim, which):
        if dim.binary:
            return np.array(dim.train)
        (low, high), (far_low, far_high) = dim.train, dim.extrapolation
        margin = 0.01 * (high - low)
        if which == "train":
            return np.linspace(low, high, 50)
        if which == "eval_in":
            return np.linspace(low + margin, high - margin, 50)
        return np.concatenate([np.linspace(far_low, low - margin, 25), np.linspace(high + margin, far_high, 25)])

    rng = np.random.default_rng(seed)

    def draw(which):
        axes = [values(dim, which) for dim in dims]
        if len(dims) > 2:
            chosen = np.stack([rng.choice(axis, n) for axis in axes], axis=-1)  # (n, dims)
        else:
            mesh = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(dims))  # sorted
            chosen = mesh[np.linspace(0, len(mesh) - 1, n).astype(int)]
        return [{dim.name: float(value) for dim, value in zip(dims, row)} for row in chosen]

    return {which: draw(which) for which in ("train", "eval_in", "eval_out")}


# ---------------------------------------------------------------------------------------------------------------
# What all environments share
# ---------------------------------------------------------------------------------------------------------------


class ContextualEnv(gymnasium.Env):
    """An environment with a context, a fixed horizon and no terminal state.

    A subclass sets `self.observation_space` and `self.action_space` and defines, in this order: the model (its
    constructor), measurements, `initial_state`, `set_state`, `advance`, `observation` and `reward`.
    """

    metadata = {"render_modes": []}

    def __init__(self, context, horizon):
        self.context, self.horizon = context, horizon
        self.t = 0
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (self.d_s,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (self.d_a,), np.float32)

    def reset(self, *, seed=None, options=None):
        """Starts an episode, from `options["state"]` if given. Returns (observation, {"context": dict})."""
        super().reset(seed=seed)
        self.t = 0
        state = self.initial_state() if not options or "state" not in options else options["state"]
        state = np.asarray(state, dtype=np.float64)
        if state.shape != (self.state_size,) or not np.isfinite(state).all():
            raise ValueError(f"state {state.tolist()}: must be {self.state_size} finite numbers")
        self.set_state(state)
        return self.observation(), {"context": dict(self.context)}

    def step(self, action):
        """One step of `action`, (d_a,) in [-1, 1]. Never terminates; truncates at the horizon."""
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (self.d_a,) or not np.isfinite(action).all():
            raise ValueError(f"action {action.tolist()}: must be {self.d_a} finite numbers")
        self.advance(action)
        self.t += 1
        return self.observation(), self.reward(), False, self.t >= self.horizon, {"context": dict(self.context)}


# ---------------------------------------------------------------------------------------------------------------
# Toy environments
# ---------------------------------------------------------------------------------------------------------------


class DoubleIntegrator(ContextualEnv):
    """A point mass in the plane, pushed by a force; it is to reach the origin and stay there.

    Context: mass (kg), action_factor. Observation and state [p (2), v (2)]. Reward 1 within .1 of the origin.
    """

    d_s, d_a, state_size = 4, 2, 4
    DT = 0.1  # s
    GOAL_RADIUS = 0.1  # m

    def initial_state(self):
        corner = self.np_random.choice([-1.0, 1.0], size=2)
        return np.concatenate([corner * self.np_random.uniform(0.8, 1.0, size=2), np.zeros(2)])  # at rest

    def set_state(self, state):
        self.p, self.v = state[:2].copy(), state[2:].copy()

    def advance(self, action):
        force = np.clip(self.context["action_factor"] * action, -1, 1)
        self.p = np.clip(self.p + self.DT * self.v, -1, 1)  # first, with the old velocity
        self.v = np.clip(self.v + self.DT * force / self.context["mass"], -1, 1)

    def observation(self):
        return np.concatenate([self.p, self.v]).astype(np.float32)

    def reward(self):
        return float(np.linalg.norm(self.p) <= self.GOAL_RADIUS)


class ODE(ContextualEnv):
    """A scalar x driven by Re(c_0 a + c_1 a^2 + ...) with the action read as a complex number a; to be held at 0.

    Context: c0, c1, ... Observation and state [x]. Reward in tiers of |x|.
    """

    d_s, d_a, state_size = 1, 2, 1
    DT = 0.01  # s
    TIERS = ((0.05, 1.0), (0.1, 1 / 2), (0.2, 1 / 3), (0.5, 1 / 4), (2.0, 0.05))  # (|x| below, reward)

    def initial_state(self):
        return self.np_random.uniform(-1.0, 1.0, size=1)

    def set_state(self, state):
        self.x = float(state[0])

    def advance(self, action):
        a = complex(*action)
        slope = sum(c * a ** (i + 1) for i, c in enumerate(self.context.values())).real
        self.x = min(max(self.x + self.DT * slope, -20.0), 20.0)

    def observation(self):
        return np.array([self.x], dtype=np.float32)

    def reward(self):
        return next((reward for below, reward in self.TIERS if abs(self.x) < below), 0.0)


# ---------------------------------------------------------------------------------------------------------------
# DeepMind Control tasks, on models of our own
# ---------------------------------------------------------------------------------------------------------------


def tolerance(x, margin):
    """1 at x = 0, falling like a Gaussian to .1 at |x| = margin."""
    return 0.1 ** ((x / margin) ** 2)


class Cartpole(ContextualEnv):
    """DMC cartpole balance: keep the pole upright and the cart in the middle, with little force.

    Context: length (half the pole, m; its mass stays .1 kg), action_factor.
    Observation [x, cos θ, sin θ, ẋ, θ̇]; state [x, θ, ẋ, θ̇] (qpos, qvel), θ = 0 upright. Reward in [0, 1].
    """

    d_s, d_a, state_size = 5, 1, 4
    MODEL = """
    <mujoco model="cartpole">
      <option timestep="0.01" integrator="RK4"><flag contact="disable"/></option>
      <worldbody>
        <body name="cart" pos="0 0 1">
          <joint name="slider" type="slide" axis="1 0 0" limited="true" range="-1.8 1.8" solreflimit=".08 1"
                 damping="5e-4"/>
          <geom type="box" size=".2 .15 .1" mass="1"/>
          <body name="pole">
            <joint name="hinge" type="hinge" axis="0 1 0" damping="2e-6"/>
            <geom type="capsule" fromto="0 0 0 0 0 {pole}" size=".045" mass=".1"/>
          </body>
        </body>
      </worldbody>
      <actuator><motor joint="slider" gear="10" ctrllimited="true" ctrlrange="-1 1"/></actuator>
    </mujoco>"""

    def __init__(self, context, horizon):
        super().__init__(context, horizon)
        self.model = mujoco.MjModel.from_xml_string(self.MODEL.format(pole=2 * context["length"]))
        self.data = mujoco.MjData(self.model)

    def initial_state(self):
        rng = self.np_random
        return np.concatenate([[rng.uniform(-0.1, 0.1), rng.uniform(-0.034, 0.034)], 0.01 * rng.standard_normal(2)])

    def set_state(self, state):
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:], self.data.qvel[:] = state[:2], state[2:]

    def advance(self, action):
        self.data.ctrl[:] = self.context["action_factor"] * action
        mujoco.mj_step(self.model, self.data)  # observation and reward need nothing but the new qpos and qvel

    def observation(self):
        (x, theta), (dx, dtheta) = self.data.qpos, self.data.qvel
        return np.array([x, math.cos(theta), math.sin(theta), dx, dtheta], dtype=np.float32)

    def reward(self):
        (x, theta), (_, dtheta), (force,) = self.data.qpos, self.data.qvel, self.data.ctrl
        upright = (1 + math.cos(theta)) / 2
        centered = (1 + tolerance(x, margin=2)) / 2
        small_control = (4 + max(0.0, 1 - force**2)) / 5
        small_velocity = (1 + tolerance(dtheta, margin=5)) / 2
        return float(upright * centered * small_control * small_velocity)


# ---------------------------------------------------------------------------------------------------------------
# The table of environments
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnvSpec:
    """One row of the benchmark: the paper's name, the class, the context dimensions, steps an episode."""

    paper_name: str
    cls: type
    context: tuple[ContextDim, ...]
    horizon: int


ENVS = {
    "di_inv": EnvSpec("DI", DoubleIntegrator, (MASS, ACTION_FACTOR), 100),
    "ode": EnvSpec("ODE", ODE, (coefficient(0), coefficient(1)), 200),
    "cartpole_inv": EnvSpec("Cartpole", Cartpole, (POLE_LENGTH, ACTION_FACTOR), 1000),
}


def unknown(kind, name, known):
    """The one-line message for a name that is not in a table, with the closest known one."""
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"unknown {kind} {str(name)!r}{hint}; known: {', '.join(known)}"


def lookup(env_id):
    """The EnvSpec of `env_id`; ValueError for an unknown id."""
    if env_id not in ENVS:
        raise ValueError(unknown("environment", env_id, list(ENVS)))
    return ENVS[env_id]


def make(env_id, **context):
    """The environment `env_id` in the context given by name; what is not named has its default.

    Raises ValueError for an unknown id or context name and for a physically impossible value.
    """
    spec = lookup(env_id)
    names = [dim.name for dim in spec.context]
    for name in context:
        if name not in names:
            raise ValueError(unknown(f"context of {env_id}", name, names))
    return spec.cls({dim.name: dim.check(context.get(dim.name, dim.default)) for dim in spec.context}, spec.horizon)


class VectorEnv:
    """One environment a context, reset and stepped together (the horizon is fixed, so they end together)."""

    def __init__(self, env_id, contexts, seed):
        self.envs = [make(env_id, **context) for context in contexts]
        self.d_s, self.d_a, self.horizon = self.envs[0].d_s, self.envs[0].d_a, self.envs[0].horizon
        seeds = np.random.SeedSequence(seed).generate_state(len(self.envs))
        for env, env_seed in zip(self.envs, seeds):
            env.reset(seed=int(env_seed))

    def reset(self):
        """Observations (N, d_s)."""
        return np.stack([env.reset()[0] for env in self.envs])

    def step(self, actions):
        """Actions (N, d_a). Returns observations (N, d_s), rewards (N,) and whether the horizon is reached."""
        results = [env.step(action) for env, action in zip(self.envs, actions)]
        s, r, _, truncated, _ = zip(*results)
        return np.stack(s), np.array(r, dtype=np.float32), truncated[0]
