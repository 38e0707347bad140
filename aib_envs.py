"""The Actuator Inversion Benchmark (AIB): environments whose hidden context may reverse actuators.

These are the environments of *Dynamics-Aligned Shared Hypernetworks for Contextual RL under
Discontinuous Shifts* (arXiv 2602.06550), "the paper" below. dmash.py trains the paper's agent on
them. This file does not need it. A context is hidden: the agent does not observe it. It stays the
same during an episode, and it changes the dynamics.

    env = make("cartpole_inv", length=0.7, action_factor=-1)  # one gymnasium.Env
    sets = context_sets("cartpole_inv")                       # {"train": [{...}, ...], ...}
    envs = VectorEnv("cartpole_inv", sets["train"], seed=0)   # side by side, as dmash.py trains
    gymnasium.make("aib_envs:aib/cartpole_inv-v0", length=0.7, action_factor=-1)
    gymnasium.make_vec("aib_envs:aib/cartpole_inv-v0", num_envs=20, contexts="train")
    make("gymnasium:Pendulum-v1", action_factor=-1)           # any that never terminates

Three kinds of environments, by what one policy that ignores the context can reach:
- overlapping: such a policy does well in every context;
- non-overlapping: what is right in one context is wrong in another, so no such policy does well;
- weakly non-overlapping: no such policy does well everywhere, but similar contexts call for
  similar actions.

T is the horizon, in steps. The agent infers the context from a window of its last K transitions.
A run of dmash.py makes `steps` gradient steps. K and `steps` are the paper's.

id                contexts                  T kind                     K  steps paper
di_inv            mass, action_factor     100 non-overlapping         24 100000 DI
di_friction       mass, friction          100 overlapping             24 100000 DI-Friction
di_perm           mass, swap              100 non-overlapping         24 100000 DI-Perm
ode               c0, c1                  200 weakly non-overlapping  24 100000 ODE
cartpole_inv      length, action_factor  1000 non-overlapping        128 100000 Cartpole
cheetah_inv       length, action_factor  1000 non-overlapping        128 200000 Cheetah
reacher_easy_inv  length, action_factor  1000 non-overlapping        128 200000 Reacher(E)
reacher_hard_inv  length, action_factor  1000 non-overlapping        128 200000 Reacher(H)
reacher_hard_perm length, swap           1000 non-overlapping        128 200000 Reacher(H)-Perm
ball_in_cup       gravity, distance      1000 overlapping            128 200000 BallInCup
walker            gravity, actuator_strength 1000 overlapping        128 200000 Walker
walker_gym        gravity, actuator_strength 1000 overlapping        128 500000 WalkerGym
hopper_gym        gravity, actuator_strength 1000 overlapping        128 500000 HopperGym
di_signs          mass, sign_x, sign_y    100 non-overlapping         24 100000 -
ode_1 ... ode_20 are as ode, with the contexts c0 ... c(k-1) in ode_k; the paper has ODE-k.
The paper does not have di_signs. Its sets hold all four pairs of signs; to test a new pair, train
on contexts that leave it out.

A context has a value for each of its dimensions; one that is not given has its default. The sets
are `train`, from the train range; `eval_in`, other values of that range; `eval_out`, values outside
it, up to the limits of extrapolation. A dimension without these limits is binary: every set has
both values of `train`.

context           first in       default train         extrapolation  unit
mass              di_inv             1.0 (0.5, 1.5)    (0.1, 2.0)     kg
action_factor     di_inv             1.0 (-1.0, 1.0)   None           multiplies every action
friction          di_friction        1.0 (0.5, 1.5)    (0.1, 2.0)     kg/s
swap              di_perm            0.0 (0.0, 1.0)    None           1: exchanges two actuators
c0                ode                0.0 (-5.0, 5.0)   (-10.0, 10.0)  -
c1                ode                0.0 (-5.0, 5.0)   (-10.0, 10.0)  -
length            cartpole_inv       0.5 (0.3, 0.85)   (0.1, 2.0)     m, half the pole
length            cheetah_inv        1.0 (0.8, 1.2)    (0.4, 1.6)     multiplies the limbs
gravity           ball_in_cup       9.81 (8.0, 12.0)   (1.0, 20.0)    m/s²
distance          ball_in_cup        0.3 (0.24, 0.36)  (0.1, 0.5)     m, length of the string
gravity           walker            9.81 (4.91, 14.71) (0.98, 19.62)  m/s²
actuator_strength walker             1.0 (0.5, 1.5)    (0.1, 2.0)     multiplies the gears
sign_x            di_signs           1.0 (-1.0, 1.0)   None           multiplies the first action
sign_y            di_signs           1.0 (-1.0, 1.0)   None           multiplies the second action

To add an environment, write a subclass of `Task` in a module, say my_module.py, and register it:

    import numpy as np
    import aib_envs

    class Sliders(aib_envs.Task):  # three motors, each of which moves a position towards 0
        d_s, d_a, state_size, dt = 3, 3, 3, 0.05
        multiplies = aib_envs.Task.multiplies | {"sign_z": [2]}  # one more than Task's three

        def initial_state(self, i, rng):
            return rng.uniform(-1, 1, size=3)

        def advance(self, actions):  # (N, 3)
            self.s = self.s + self.dt * self.c["gain"][:, None] * actions

        def reward(self):
            return np.exp(-np.linalg.norm(self.s, axis=-1))

    GAIN = aib_envs.ContextDim("gain", 1.0, (0.5, 1.5), (0.1, 2.0))
    SIGN_Z = aib_envs.ContextDim("sign_z", 1.0, (-1.0, 1.0))
    aib_envs.register("sliders", Sliders, [GAIN, SIGN_Z], 200, "non-overlapping")

`python dmash.py --env my_module:sliders` trains on it, and make("my_module:sliders") makes it. To
add a dimension to an environment of this file, subclass its task and register a new id with the
old dimensions and the new one. A dimension acts in one of four ways:
- `advance` reads self.c["gain"], an array with one value per instance;
- a `MujocoTask` writes it into its model, in `xml` or `model`;
- `multiplies` names the entries of the action that it multiplies, as for the new sign above;
- its name is swap: it exchanges the first two actuators of any task.
A dimension in none of these ways has no effect, and nothing tells so.

The order of this file:
- the contexts and the context sets;
- `Task`, the base class, which steps N instances together, and the tasks;
- what shows a task to others: `VectorEnv` (for training), `ContextualEnv` (one gymnasium.Env) and
  `ContextualVectorEnv` (several of these, by the rules of Gymnasium);
- the wrappers;
- `register`, the checks of values from outside, and the calls that make the table.
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
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

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
    The last three fields limit which values are accepted at all.
    """

    name: str
    default: float
    train: tuple[float, float]
    extrapolation: tuple[float, float] | None = None
    above: float = -inf  # A value must be above this one
    below: float = inf  # and below this one.
    only: tuple[float, ...] | None = None  # The accepted values, where there are few.

    @property
    def binary(self):
        return self.extrapolation is None


# A negative friction drives, a negative gravity lifts and a negative strength inverts. All three
# can be simulated, so they are accepted. A mass or a length of 0 or less cannot.
MASS = ContextDim("mass", 1.0, (0.5, 1.5), (0.1, 2.0), above=0)
FRICTION = ContextDim("friction", 1.0, (0.5, 1.5), (0.1, 2.0))
ACTION_FACTOR = ContextDim("action_factor", 1.0, (-1.0, 1.0))
SIGN_X = ContextDim("sign_x", 1.0, (-1.0, 1.0))
SIGN_Y = ContextDim("sign_y", 1.0, (-1.0, 1.0))
SWAP = ContextDim("swap", 0.0, (0.0, 1.0), only=(0.0, 1.0))
POLE_LENGTH = ContextDim("length", 0.5, (0.3, 0.85), (0.1, 2.0), above=0)
SCALE = ContextDim("length", 1.0, (0.8, 1.2), (0.4, 1.6), above=0)
CUP_GRAVITY = ContextDim("gravity", 9.81, (8.0, 12.0), (1.0, 20.0))
# The highest start of the ball is 1 m minus the string above the ground. With 0.975 m, every start
# would touch the ground, and `BallInCup.initial_state` would search forever.
STRING = ContextDim("distance", 0.3, (0.24, 0.36), (0.1, 0.5), above=0, below=0.9)
GRAVITY = ContextDim("gravity", 9.81, (4.91, 14.71), (0.98, 19.62))
STRENGTH = ContextDim("actuator_strength", 1.0, (0.5, 1.5), (0.1, 2.0))


def coefficients(k):
    """c_0 ... c_{k-1} of the ODE environments."""
    return [ContextDim(f"c{i}", 0.0, (-5.0, 5.0), (-10.0, 10.0)) for i in range(k)]


Contexts = str | Sequence[dict[str, float]]  # the name of a set, or contexts

NON, WEAK, OVER = "non-overlapping", "weakly non-overlapping", "overlapping"


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """One row of the table of environments."""

    cls: "type[Task]"
    context: tuple[ContextDim, ...]
    horizon: int  # T, steps of an episode
    kind: str
    K: int  # transitions in a window
    steps: int  # gradient steps of a run
    module: str  # where it is registered


ENVS: dict[str, EnvSpec] = {}  # `register` fills it, at the end of this file.


# --------------------------------------------------------------------------------------------------
# The context sets
# --------------------------------------------------------------------------------------------------


def context_sets(env_id: str, n: int = 20, seed: int = 0) -> dict[str, list[dict[str, float]]]:
    """The three context sets, each a list of `n` contexts.

    A continuous dimension has 50 values in each set, as `set_values` says. The mesh is the list of
    all their combinations, the last dimension changing fastest. With one or two continuous
    dimensions, a set takes `n` evenly spaced entries of the mesh. With more, it takes `n` random
    entries, by a generator seeded with `seed`. An `n` above the size of the mesh repeats entries.
    With two continuous dimensions and some `n`, such as 8 or 50, the entries are those of the
    mesh's diagonal: where one dimension is large, so is the other. With 20 they are not.

    Context i has combination i of the binary values, modulo their number. The paper's 20 contexts
    are an exception: there a single binary dimension is the last axis of the mesh. With one
    continuous dimension its two values then occur 11 and 9 times.

    No context is in two sets, unless all dimensions are binary.

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
    if name == "eval_out":
        lowest, highest = dim.extrapolation
        below = np.linspace(lowest, low - margin, 25)
        above = np.linspace(high + margin, highest, 25)
        return np.concatenate([below, above])
    if name == "eval_in":
        low, high = low + margin, high - margin
    return np.linspace(low, high, 50)


def context_set(dims, name, n, rng):
    """One set: `n` entries of the mesh, each with one combination of the binary values."""
    continuous = [dim for dim in dims if not dim.binary]
    binary = [dim for dim in dims if dim.binary]
    axes = [set_values(dim, name) for dim in continuous]
    combinations = list(itertools.product(*(dim.train for dim in binary)))
    turns = np.arange(n)  # Context i has combination turns[i], modulo the number of combinations.
    if len(continuous) > 2:
        entries = zip(*[rng.choice(axis, n) for axis in axes])
    else:
        mesh = list(itertools.product(*axes))
        # Indices into mesh x combinations.
        places = np.linspace(0, len(mesh) * len(combinations) - 1, n).astype(int)
        entries = [mesh[place // len(combinations)] for place in places]
        # As the paper does. With another n, an even distance of `places` could give one value only.
        if continuous and n == 20 and len(combinations) == 2:
            turns = places
    contexts = []
    for entry, turn in zip(entries, turns):
        values = dict(zip(continuous + binary, entry + combinations[turn % len(combinations)]))
        contexts.append({dim.name: float(values[dim]) for dim in dims})
    return contexts


# --------------------------------------------------------------------------------------------------
# What all environments share
# --------------------------------------------------------------------------------------------------


class Task(ABC):
    """N instances of an environment, one per context, stepped together.

    Arrays have one row per instance, unless a method takes the number i of one instance.
    A subclass gives the sizes and `dt`, and defines the abstract methods. The physical state is
    `s`, unless the subclass redefines `set_state` and `state`. `reset`, `set_state` and `advance`
    assign new arrays to attributes, since copies made by `with_contexts` share the old ones.

    A step depends on the state and the actions alone. If it depends on anything else, such as the
    last action, `snapshot` and `restore` must hold that, too, or a resumed run is another one.
    """

    d_s: int  # size of an observation
    d_a: int  # number of actuators
    state_size: int  # size of the physical state
    dt: Any  # s, the time of a step: a number, or a property that gives one
    high: Any = inf  # the largest observation: a number, or one per element
    low: Any = None  # the smallest one; None: the negative of the largest
    target_size = 0  # size of options["target"] in `ContextualEnv.reset`; 0: there is no target
    # For each dimension that multiplies actions: the entries of the action, before any swap, as a
    # slice or a list of numbers below d_a. -1 inverts. Only dimensions registered for the id act.
    # A subclass extends this dict: without action_factor in it, that dimension would do nothing.
    multiplies: dict[str, Any] = {"action_factor": slice(None), "sign_x": [0], "sign_y": [1]}

    @abstractmethod
    def initial_state(self, i, rng):
        """A random state for instance i to start from, (state_size,), by the Generator `rng`."""

    @abstractmethod
    def advance(self, actions):
        """One step of the dynamics. `actions` (N, d_a) are what the actuators get, in [-1, 1]."""

    @abstractmethod
    def reward(self):
        """The rewards of the last step, (N,)."""

    def picture(self, i):
        """What `draw` draws of instance i: a View and a list of Shapes. Only `render` needs it."""
        raise BadEnvironment(f"{type(self).__name__} has no picture")

    def set_state(self, state):
        """Sets the physical state of all instances, (N, state_size)."""
        self.s = state.copy()

    def state(self):
        """A copy of the physical state, (N, state_size)."""
        return self.s.copy()

    def observation(self):
        """What the agent sees, (N, d_s): the physical state, if a subclass says nothing else."""
        return self.state()

    def __init__(self, contexts):
        self.contexts = [dict(context) for context in contexts]
        self.N = len(self.contexts)
        self.build()

    def build(self):
        """Makes everything that depends on the contexts: here `c` and `signs`."""
        self.c = {}  # The values of each context dimension, (N,), by its name.
        self.signs = np.ones((self.N, self.d_a))
        for name in self.contexts[0]:
            self.c[name] = np.array([context[name] for context in self.contexts])
            if name in self.multiplies:
                self.signs[:, self.multiplies[name]] *= self.c[name][:, None]

    def with_contexts(self, contexts):
        """A copy of this task in other contexts. It needs `set_state` or `reset` before a step.

        The copy is shallow and calls `build` again. A context that cannot be built is a ValueError.
        """
        other = copy.copy(self)
        # Not __init__ of the subclass: the copy keeps what does not depend on the contexts.
        Task.__init__(other, contexts)
        return other

    def snapshot(self):
        """All that the next step depends on, as one array (N, ...): here the physical state."""
        return self.state()

    def restore(self, snapshot):
        """Goes back to a `snapshot`."""
        self.set_state(snapshot)

    def reset(self, rngs):
        """Starts an episode in every instance, each from its own numpy Generator."""
        states = [self.initial_state(i, rng) for i, rng in enumerate(rngs)]
        self.set_state(np.stack(states))

    def step(self, actions):
        """One step of actions (N, d_a); then `observation` and `reward` are of the new state.

        This is where the benchmark inverts and swaps actuators. The context first multiplies each
        action. Then swap = 1 exchanges the first two. What an actuator gets is clipped to [-1, 1].
        The wrappers `ActuatorInversion` and `ActuatorPermutation` are for other environments.
        """
        actions = actions * self.signs
        if "swap" in self.c:
            swapped = self.c["swap"] == 1  # (N,)
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
    across = np.stack(np.meshgrid(ticks, -ticks), axis=-1)
    pixels = view.centre + view.width * across  # (size, size, 2)
    for start, end, radius, colour in shapes:
        line = end - start
        # The nearest point of the line is start + share * line. One share for each pixel.
        share = np.clip((pixels - start) @ line / max(line @ line, 1e-12), 0, 1)
        nearest = start + share[..., None] * line
        distance = np.linalg.norm(pixels - nearest, axis=-1)
        picture[distance <= radius] = colour
    return picture


# --------------------------------------------------------------------------------------------------
# Toy environments
# --------------------------------------------------------------------------------------------------


class DoubleIntegrator(Task):
    """A force pushes a point mass in the plane, which must reach the origin and stay there.

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

    def advance(self, actions):
        mass = self.c["mass"]
        # Below 0 for the smallest masses with the highest frictions, as in the paper's equations.
        keep = 1 - self.dt * self.c.get("friction", 0) / mass
        v = self.s[:, 2:]
        # The position moves with the old velocity.
        p = self.s[:, :2] + self.dt * v
        v = v * keep[:, None] + self.dt * actions / mass[:, None]
        self.s = np.hstack([p, v]).clip(-1, 1)

    def reward(self):
        return (np.linalg.norm(self.s[:, :2], axis=-1) <= self.GOAL_RADIUS).astype(float)

    def picture(self, i):
        goal = np.zeros(2)
        p = self.s[i, :2]
        shapes = [Shape(goal, goal, self.GOAL_RADIUS, GREEN), Shape(p, p, 0.05, BLUE)]
        return View(goal, 2.4), shapes


class ODE(Task):
    """dx/dt = Re(c_0 a + c_1 a² + ... + c_{k-1} a^k): hold the scalar x at 0.

    | index | observation, which is also the state | unit |
    |---|---|---|
    | 0 | x, clipped to [-20, 20] | – |

    Action: real and imaginary part of a complex number a, each in [-1, 1].
    Reward: by |x|, as TIERS says, from 1 near 0 down to 0.
    Start: uniform in [-1, 1]. Context: c0, c1, ..., without a unit.
    """

    d_s = 1
    d_a = 2
    state_size = 1
    dt = 0.01  # s
    high = 20.0
    # The reward if |x| is below. Beyond the last it is 0.
    TIERS = {0.05: 1.0, 0.1: 1 / 2, 0.2: 1 / 3, 0.5: 1 / 4, 2.0: 0.05}

    def initial_state(self, i, rng):
        return rng.uniform(-1.0, 1.0, size=1)

    def advance(self, actions):
        a = actions[:, 0] + 1j * actions[:, 1]
        # `get`, as a context may also be a sign: then there are fewer coefficients than contexts.
        terms = [self.c.get(f"c{k}", 0) * a ** (k + 1) for k in range(len(self.c))]
        slope = sum(terms).real
        self.s = np.clip(self.s + self.dt * slope[:, None], -self.high, self.high)

    def reward(self):
        reached = [np.abs(self.s[:, 0]) < below for below in self.TIERS]
        return np.select(reached, list(self.TIERS.values()))

    def picture(self, i):
        x = np.array([self.s[i, 0], 0.0])
        goal = np.array([min(self.TIERS), 0.0])
        shapes = [GROUND, Shape(-goal, goal, 0.04, GREEN), Shape(x, x, 0.06, BLUE)]
        return View(0.9 * x, 4.0), shapes  # x is not centred, so that one sees it move


# --------------------------------------------------------------------------------------------------
# DeepMind Control tasks, on models of our own
# --------------------------------------------------------------------------------------------------


def near(x, margin):
    """1 at x = 0, falling like a Gaussian to 0.1 at |x| = margin."""
    return 0.1 ** ((x / margin) ** 2)


class MujocoTask(Task):
    """A task on MuJoCo models, one per context. The state is qpos, then qvel.

    A subclass gives `xml(context)`, the text of its model, and SUBSTEPS, MuJoCo's steps in a step.
    state_size is nq + nv. d_a is the number of the model's actuators, whose ctrlrange is -1 to 1.
    `observation` and `reward` read `qpos` (N, nq), `qvel` (N, nv), `actions` (N, d_a) and `datas`.
    A model with a free or a ball joint needs an `initial_state` of its own.
    `model` writes the contexts gravity and actuator_strength into every model.
    """

    SUBSTEPS = 1
    SPEED: float  # m/s, for the full reward of a task that uses `moving`
    AXES = [0, 2]  # the world axes that a picture shows, to the right and up
    WIDTH = 3.0  # m, of a picture
    # MuJoCo's full state. Its constraint solver starts from the last solution, so that qpos and
    # qvel alone would give other last digits.
    WHOLE = mujoco.mjtState.mjSTATE_INTEGRATION

    def build(self):
        super().build()
        try:
            self.datas = [mujoco.MjData(self.model(context)) for context in self.contexts]
        except (ValueError, mujoco.FatalError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"contexts {shown(self.contexts)}: {reason}") from None

    @property
    def dt(self):
        return self.datas[0].model.opt.timestep * self.SUBSTEPS

    @abstractmethod
    def xml(self, context):
        """The text of the model in a context, a dict."""

    def model(self, context):
        model = mujoco.MjModel.from_xml_string(self.xml(context))
        # By default, MuJoCo silently resets a simulation that diverges.
        model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
        if "gravity" in context:
            model.opt.gravity[2] = -context["gravity"]
        model.actuator_gear *= context.get("actuator_strength", 1)
        return model

    def measure(self):
        self.qpos = np.array([data.qpos for data in self.datas])  # (N, nq)
        self.qvel = np.array([data.qvel for data in self.datas])  # (N, nv)

    def moving(self):
        """Speed / SPEED, clipped to [0, 1], (N,).

        The speed is the first number of the sensors, the forward velocity of the centre of mass.
        """
        speed = np.array([data.sensordata[0] for data in self.datas])
        return np.clip(speed / self.SPEED, 0, 1)

    def set_state(self, state):
        for data, row in zip(self.datas, state):
            mujoco.mj_resetData(data.model, data)
            data.qpos[:] = row[: data.model.nq]
            data.qvel[:] = row[data.model.nq :]
            mujoco.mj_forward(data.model, data)
        self.measure()

    def state(self):
        return np.hstack([self.qpos, self.qvel])

    def snapshot(self):
        size = mujoco.mj_stateSize(self.datas[0].model, self.WHOLE)
        snapshot = np.empty((self.N, size))
        for data, row in zip(self.datas, snapshot):
            mujoco.mj_getState(data.model, data, row, self.WHOLE)
        return snapshot

    def restore(self, snapshot):
        for data, row in zip(self.datas, snapshot):
            mujoco.mj_setState(data.model, data, row, self.WHOLE)
            # The sensors follow. mj_forward would run the constraint solver once more, and so
            # change what it starts from in the next step.
            mujoco.mj_step1(data.model, data)
        self.measure()

    def advance(self, actions):
        self.actions = actions
        for data, action in zip(self.datas, actions):
            data.ctrl[:] = action
            mujoco.mj_step(data.model, data, self.SUBSTEPS)
            if data.model.nsensor:
                # mj_step computes the sensors before it moves. Here they follow the new state.
                mujoco.mj_step1(data.model, data)
        self.measure()

    def initial_state(self, i, rng):
        """At rest, limited joints uniform in their range and unlimited hinges in [-π, π]."""
        model = self.datas[i].model
        state = np.zeros(self.state_size)
        limited = model.jnt_limited == 1
        ranges = np.where(limited[:, None], model.jnt_range, [-np.pi, np.pi])
        drawn = limited | (model.jnt_type == mujoco.mjtJoint.mjJNT_HINGE)
        state[: model.nq][drawn] = rng.uniform(*ranges[drawn].T)
        return state

    def picture(self, i):
        """Every geom of the model as it is now, and the ground as a line.

        Spheres and capsules have their shape. Any other geom is drawn as a capsule.
        """
        data = self.datas[i]
        model = data.model
        mujoco.mj_kinematics(model, data)  # mj_step leaves the geoms' positions one step behind.
        shapes = []
        for g in range(model.ngeom):
            if model.geom_type[g] == mujoco.mjtGeom.mjGEOM_PLANE:
                shapes.append(GROUND)
                continue
            radius, half_length, _ = model.geom_size[g]
            z_axis = data.geom_xmat[g].reshape(3, 3)[:, 2]
            half = half_length * z_axis  # from the middle to the end of a capsule; 0 for a sphere
            middle = data.geom_xpos[g]
            ends = (middle - half)[self.AXES], (middle + half)[self.AXES]
            shapes.append(Shape(*ends, radius, BLUE if g % 2 else RED))
        # The middle follows the root body sideways and has a fixed height.
        return View(np.array([data.xpos[1][0], 0.35 * self.WIDTH]), self.WIDTH), shapes


class Cartpole(MujocoTask):
    """DMC cartpole balance: keep the pole upright and the cart in the middle, with little force.

    | index | observation | unit |
    |---|---|---|
    | 0 | position x of the cart; the rail's ends, at ±1.8 m, are springs | m |
    | 1, 2 | cosine and sine of the pole's angle θ, which is 0 upright | – |
    | 3 | velocity of the cart | m/s |
    | 4 | velocity of θ | rad/s |

    State: x, θ and their velocities. Action: the force u on the cart, in units of 10 N, in [-1, 1].
    Reward, in [0, 1], where θ' is the velocity of θ:
    (1 + cos θ)/2 · (1 + near(x, 2))/2 · (4 + max(0, 1 - u²))/5 · (1 + near(θ', 5))/2.
    Start: x uniform within 0.1 m, θ within 0.034 rad, velocities normal with
    standard deviation 0.01. Context: length (half the pole, m; its mass stays 0.1 kg) and
    action_factor.
    """

    d_s = 5
    d_a = 1
    state_size = 4
    high = [inf, 1.0, 1.0, inf, inf]
    WIDTH = 4.5  # m

    def xml(self, context):
        # The cart slides and touches nothing, so that its shape matters in pictures only.
        return f"""
        <mujoco model="cartpole">
          <option timestep="0.01" integrator="RK4"><flag contact="disable"/></option>
          <worldbody>
            <body name="cart" pos="0 0 1">
              <joint name="slider" type="slide" axis="1 0 0" limited="true" range="-1.8 1.8"
                     solreflimit=".08 1" damping="5e-4"/>
              <geom type="capsule" fromto=".2 0 0 -.2 0 0" size=".1" mass="1"/>
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
        return np.column_stack([x, np.cos(theta), np.sin(theta), dx, dtheta])

    def reward(self):
        x, theta = self.qpos.T
        force = self.actions[:, 0]
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
    Start: at rest, shoulder uniform in ±π rad, wrist in ±2.79 rad; the target 0.05 to 0.2 m from
    the shoulder. Context: length (scales both links, without a unit), and action_factor or swap.
    With a length below 0.58 (hard reacher: 0.73), some targets are out of reach.
    """

    d_s = 6
    d_a = 2
    state_size = 4
    target_size = 2
    AXES = [0, 1]
    WIDTH = 0.8  # m
    LINK = 0.12  # m, from shoulder to wrist and from wrist to finger
    HAND = 0.1  # m, the part of the second link that is a capsule; the finger is beyond it
    FINGER = 0.01  # m, its radius
    TARGET = 0.05  # m, its radius

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
                <geom type="capsule" fromto="0 0 0 {self.HAND * scale} 0 0" size=".01"/>
                <joint name="wrist" limited="true" range="-160 160"/>
                <body name="finger" pos="{link} 0 0">
                  <geom type="sphere" size="{self.FINGER}"/>
                </body>
            </body></body>
          </worldbody>
          <actuator><motor joint="shoulder"/><motor joint="wrist"/></actuator>
        </mujoco>"""

    def to_target(self):
        """From the finger to the target, m, (N, 2)."""
        directions = self.qpos.cumsum(-1)  # of both links, (N, 2)
        (x1, x2), (y1, y2) = np.cos(directions).T, np.sin(directions).T
        finger = self.LINK * self.c["length"] * np.array([x1 + x2, y1 + y2])
        return self.target - finger.T

    def reset(self, rngs):
        # A new array, as a copy made by `with_contexts` shares the old one.
        self.target = np.zeros((self.N, 2))
        super().reset(rngs)

    def initial_state(self, i, rng):
        state = super().initial_state(i, rng)
        angle = rng.uniform(0, 2 * np.pi)
        radius = rng.uniform(0.05, 0.2)
        self.target[i] = radius * np.sin(angle), radius * np.cos(angle)
        return state

    def snapshot(self):
        return np.hstack([self.target, super().snapshot()])

    def restore(self, snapshot):
        self.target = snapshot[:, :2].copy()
        super().restore(snapshot[:, 2:])

    def observation(self):
        return np.hstack([self.qpos, self.to_target(), self.qvel])

    def reward(self):
        distance = np.hypot(*self.to_target().T)
        return (distance <= self.TARGET + self.FINGER).astype(float)

    def picture(self, i):
        _, shapes = super().picture(i)
        target = Shape(self.target[i], self.target[i], self.TARGET, GREEN)
        return View(np.zeros(2), self.WIDTH), [target, *shapes]


class HardReacher(Reacher):
    """Reacher with a small target, and otherwise the same."""

    TARGET = 0.015  # m, its radius


class BallInCup(MujocoTask):
    """DMC ball in cup: swing a ball on a string into a cup that moves in the vertical plane.

    | index | observation, which is also the state | unit |
    |---|---|---|
    | 0, 1 | x, z of the cup, from where it rests | m |
    | 2, 3 | x, z of the ball, from a point below the cup, at the string's length | m |
    | 4 – 7 | their velocities | m/s |

    Action: forces x, z on the cup, in units of 5 N, each in [-1, 1].
    Reward: 1 while the ball is in the cup, else 0. Start: at rest, the ball at x uniform in ±0.2,
    z in [0.2, 0.5], where it touches nothing; a string below 0.3 m may be stretched there.
    Context: gravity (m/s²), distance (the string, m).
    """

    d_s = 8
    d_a = 2
    state_size = 8
    SUBSTEPS = 10
    WIDTH = 1.2  # m
    CUP = 0.6  # m, height of the cup's opening at rest
    HALF = 0.05  # m, half the cup's width, and from the opening down to the cup's middle
    BALL = 0.025  # m, radius
    # m. The ball's state 0 is the string's length below this height. The string is tied to the cup
    # at 0.492 m. The model of DeepMind Control has these 8 mm, too.
    STRING_TOP = 0.5

    def xml(self, context):
        string = context["distance"]
        return f"""
        <mujoco model="ball in cup">
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
        return np.column_stack([cup_x - ball_x, middle_z - ball_height])

    def initial_state(self, i, rng):
        data = self.datas[i]
        while True:  # A string below 0.9 m leaves a quarter of all places free, or more.
            mujoco.mj_resetData(data.model, data)
            data.qpos[2:] = rng.uniform(-0.2, 0.2), rng.uniform(0.2, 0.5)
            mujoco.mj_forward(data.model, data)
            if data.ncon == 0:  # The ball touches nothing.
                return np.concatenate([data.qpos, data.qvel])

    def reward(self):
        inside = np.abs(self.ball_to_target()) < self.HALF - self.BALL
        return inside.all(-1).astype(float)


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
        # What MuJoCo derives from the masses when it compiles a model is computed anew.
        mujoco.mj_setConst(model, mujoco.MjData(model))
        return model

    def initial_state(self, i, rng):
        data = self.datas[i]
        model = data.model
        mujoco.mj_resetData(model, data)
        mujoco.mj_forward(model, data)
        limited = model.jnt_limited == 1
        data.qpos[limited] = rng.uniform(*model.jnt_range[limited].T)
        # As in dm_control, where nothing is computed between the new pose and the first step. So
        # that step has the forces of the default pose. Then the runner falls to the ground.
        mujoco.mj_step2(model, data)
        mujoco.mj_step(model, data, self.SETTLE - 1)
        return np.concatenate([data.qpos, data.qvel])

    def observation(self):
        return np.hstack([self.qpos[:, 1:], self.qvel])

    def reward(self):
        return self.moving()


class Walker(MujocoTask):
    """DMC walker walk: a planar biped, rewarded for an upright torso at height and 1 m/s.

    | index | observation | unit |
    |---|---|---|
    | 0 | height of the torso | m |
    | 1, 2 | cosine and sine of the torso's angle | – |
    | 3 – 8 | cosine and sine of the angles of the right thigh, leg and foot | – |
    | 9 – 14 | cosine and sine of the angles of the left thigh, leg and foot | – |
    | 15, 16 | velocities z, x of the torso | m/s |
    | 17 | velocity of the torso's angle | rad/s |
    | 18 – 20 | velocities of the right hip, knee and ankle | rad/s |
    | 21 – 23 | velocities of the left hip, knee and ankle | rad/s |

    State: z of the torso (0 at 1.3 m), its x and angle, the six joints, then all velocities.
    Action: torques of the six joints, each in [-1, 1], in units of the motor's gear.
    Reward, in [0, 1]: (3 standing + upright)/4 · (5 moving + 1)/6. Standing is 1 where the torso
    is 1.2 m high or more, and near(1.2 m − height, 0.6 m) below. Upright is (1 + cosine of the
    torso's angle)/2. Moving is speed / (1 m/s), clipped to [0, 1].
    Start: at rest, joints uniform in their ranges, the torso's angle in ±π.
    Context: gravity (m/s²) and actuator_strength (multiplies the gears, without a unit).
    """

    d_s = 24
    d_a = 6
    state_size = 18
    high = [inf] + [1.0] * 14 + [inf] * 9
    SUBSTEPS = 10
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
            return f"""
            <motor joint="{side}_hip" gear="100"/>
            <motor joint="{side}_knee" gear="50"/>
            <motor joint="{side}_ankle" gear="20"/>"""

        return f"""
        <mujoco model="walker">
          <option timestep="0.0025"/>
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
        return np.hstack([torso, right, left])

    def observation(self):
        angles = self.angles()
        orientations = np.stack([np.cos(angles), np.sin(angles)], axis=-1).reshape(self.N, -1)
        return np.column_stack([self.height(), orientations, self.qvel])

    def reward(self):
        standing = near(np.maximum(0, self.HEIGHT - self.height()), self.HEIGHT / 2)
        upright = (1 + np.cos(self.angles()[:, 0])) / 2
        return (3 * standing + upright) / 4 * (5 * self.moving() + 1) / 6


# --------------------------------------------------------------------------------------------------
# Gymnasium: its locomotion tasks without terminal states, and any other environment
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

    def xml(self, context):
        folder = Path(gymnasium.__file__).parent / "envs/mujoco/assets"
        return (folder / self.FILE).read_text()

    def initial_state(self, i, rng):
        model = self.datas[i].model
        state = rng.uniform(-self.NOISE, self.NOISE, size=self.state_size)
        state[: model.nq] += model.qpos0
        return state

    def advance(self, actions):
        before = self.qpos[:, 0]
        super().advance(actions)
        self.velocity = (self.qpos[:, 0] - before) / self.dt

    def observation(self):
        return np.hstack([self.qpos[:, 1:], np.clip(self.qvel, -10, 10)])

    def reward(self):
        cost = 1e-3 * np.square(self.actions).sum(-1)
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

    State: x of the torso, then the observation, its velocities not clipped.
    Healthy: height between 0.8 and 2 m, angle of the torso within ±1 rad.
    GymTask describes the rest.
    """

    d_s = 17
    d_a = 6
    state_size = 18
    high = [inf] * 8 + [10.0] * 9
    FILE = "walker2d_v5.xml"

    def healthy(self):
        height, angle = self.qpos[:, 1:3].T
        return (0.8 < height) & (height < 2.0) & (np.abs(angle) < 1.0)


class HopperGym(GymTask):
    """Gymnasium's Hopper-v5.

    | index | observation | unit |
    |---|---|---|
    | 0 | height of the torso | m |
    | 1 | angle of the torso | rad |
    | 2 – 4 | angles of the thigh, leg, foot | rad |
    | 5, 6 | velocities x, z of the torso, clipped to ±10 | m/s |
    | 7 – 10 | velocities of the four angles, clipped to ±10 | rad/s |

    State: x of the torso, then the observation, its velocities not clipped.
    Healthy: height above 0.7 m, angle of the torso within ±0.2 rad, every other entry of the state
    but x within ±100. GymTask describes the rest.
    """

    d_s = 11
    d_a = 3
    state_size = 12
    high = [inf] * 5 + [10.0] * 6
    FILE = "hopper.xml"

    def healthy(self):
        height, angle = self.qpos[:, 1:3].T
        others = np.abs(self.state()[:, 2:])
        return (0.7 < height) & (np.abs(angle) < 0.2) & (others < 100).all(-1)


class BadEnvironment(ValueError):
    """An environment that cannot be trained on. The message is one line."""


class GymnasiumTask(Task):
    """An environment of Gymnasium without terminal states. The context changes its actuators.

    Observation, reward and start are those of the environment. Context, without units: an action
    in [-1, 1] is multiplied by action_factor, clipped, multiplied by actuator_strength, clipped
    again, and rescaled to the environment's bounds. So no actuator gets more than these bounds.
    The physical state can neither be read nor set, and is empty here. `gymnasium_spec` makes the
    class for an id. An episode that ends before the horizon is a BadEnvironment, also in training.
    """

    state_size = 0
    gymnasium_id: str

    def __init__(self, contexts):
        def make_one():
            # -1 means no time limit of its own: VectorEnv counts the steps.
            env = gymnasium.make(self.gymnasium_id, max_episode_steps=-1)
            return gymnasium.wrappers.RescaleAction(env, -1, 1)

        self.envs = gymnasium.vector.SyncVectorEnv([make_one] * len(contexts))
        super().__init__(contexts)

    def reset(self, rngs):
        super().reset(rngs)
        seeds = [int(rng.integers(2**31)) for rng in rngs]
        self.seen, _ = self.envs.reset(seed=seeds)

    def initial_state(self, i, rng):
        return np.zeros(0)

    def advance(self, actions):
        # `Task.step` has multiplied by action_factor and clipped.
        actions = np.clip(actions * self.c["actuator_strength"][:, None], -1, 1)
        self.seen, self.r, terminated, truncated, _ = self.envs.step(actions.astype(np.float32))
        if (terminated | truncated).any():
            reason = "ends its own episodes, which no environment here may do"
            raise BadEnvironment(f"gymnasium:{self.gymnasium_id} {reason}")

    def observation(self):
        return self.seen

    def reward(self):
        return self.r


@functools.cache
def gymnasium_spec(gymnasium_id):
    """The EnvSpec of an environment of Gymnasium, after one random episode in it.

    BadEnvironment says why it cannot be used.
    """
    try:
        env = gymnasium.make(gymnasium_id)
    except ImportError as error:
        reason = str(error)
        if error.name:
            reason += f" (pip install {error.name})"
        raise BadEnvironment(f"gymnasium:{gymnasium_id}: {reason}") from None
    horizon = env.spec.max_episode_steps
    observations = env.observation_space
    actions = env.action_space
    boxes = one_axis(observations) and one_axis(actions)
    if not (boxes and actions.is_bounded() and actions.dtype.kind == "f" and horizon):
        what = "Boxes of one axis as spaces, bounded float actions and a horizon"
        raise BadEnvironment(f"gymnasium:{gymnasium_id}: must have {what} (max_episode_steps)")
    # A class of its own, since the sizes of a task are attributes of its class.
    attributes = {
        "gymnasium_id": gymnasium_id,
        "d_s": observations.shape[0],
        "d_a": actions.shape[0],
        "dt": 1 / (env.metadata.get("render_fps") or 30),
        "low": observations.low,
        "high": observations.high,
    }
    cls = type(gymnasium_id, (GymnasiumTask,), attributes)
    task = cls([{"actuator_strength": 1.0, "action_factor": 1.0}])
    rng = np.random.default_rng(0)
    task.reset([rng])
    for _ in range(horizon):
        task.step(rng.uniform(-1, 1, (1, cls.d_a)))
    return EnvSpec(cls, (STRENGTH, ACTION_FACTOR), horizon, NON, 24, 100_000, "gymnasium")


# --------------------------------------------------------------------------------------------------
# The environments: all contexts together for training, and by Gymnasium's rules
# --------------------------------------------------------------------------------------------------


class VectorEnv:
    """One instance per context, reset and stepped together, as dmash.py trains.

    It is no gymnasium.vector.VectorEnv: `step` returns observations, rewards, and whether all
    episodes end, which they do together. Each instance has its own generator, spawned from `seed`
    by numpy's SeedSequence, which takes a number or None. The subclass `ContextualEnv` keeps
    Gymnasium's rules.
    """

    def __init__(self, env_id: str, contexts: Contexts, seed: Any):
        spec = lookup(env_id)
        self.env_id = env_id
        self.horizon: float = spec.horizon
        self.task = spec.cls([full_context(env_id, each) for each in listed(env_id, contexts)])
        self.N = self.task.N
        self.d_s = self.task.d_s
        self.d_a = self.task.d_a
        self.t: Any = None  # None: not yet reset
        children = np.random.SeedSequence(seed).spawn(self.N)
        self.rngs = [np.random.default_rng(child) for child in children]

    @property
    def c(self):
        """The contexts as one array, (N, d_c), in the order of the table (Task.c is a dict)."""
        return np.column_stack(list(self.task.c.values())).astype(np.float32)

    def need_reset(self, call):
        if self.t is None:
            raise gymnasium.error.ResetNeeded(f"{self.env_id}: call reset() before {call}()")

    def reset(self) -> np.ndarray:
        """Starts an episode everywhere. Returns observations (N, d_s)."""
        self.task.reset(self.rngs)
        self.t = 0
        return self.observe()

    def observe(self):
        return self.task.observation().astype(np.float32)

    def step(self, actions) -> tuple[np.ndarray, np.ndarray, bool]:
        """Actions (N, d_a). Returns observations, rewards (N,), whether the horizon is reached."""
        self.need_reset("step")
        self.task.step(finite("actions", actions, (self.N, self.d_a)))
        self.t += 1
        return self.observe(), self.task.reward(), self.t >= self.horizon

    def state(self):
        """The physical states, (N, state_size), float64."""
        self.need_reset("state")
        return self.task.state()

    def task_in(self, contexts):
        """The task in other contexts. Values that they do not name stay as they are."""
        pairs = zip(contexts, self.task.contexts)
        contexts = [full_context(self.env_id, new, old) for new, old in pairs]
        if contexts == self.task.contexts:
            return self.task
        return self.task.with_contexts(contexts)

    def state_dict(self):
        """All that the next steps and resets need, except the contexts, as lists and numbers."""
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


class ContextualEnv(VectorEnv, gymnasium.Env):
    """A VectorEnv of one instance, by the rules of Gymnasium's environments.

    The context is in `info["context"]` and never in the observation. There is no terminal state.
    An episode is truncated after `horizon` steps. None is the horizon of the table; -1, the
    default, means never, since gymnasium.make truncates by its own TimeLimit. A bad value is a
    ValueError.

    reset(options={"state": array, "target": (x, y), "context": {...}}) takes three options: the
    state to start from, the reacher's target, and context values to change from now on.
    """

    metadata = {"render_modes": ["rgb_array"]}  # Gymnasium's name for pictures

    def __init__(
        self,
        env_id: str,
        render_mode: str | None = None,
        horizon: int | None = -1,
        **context: float,
    ):
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode {render_mode!r}: must be None or 'rgb_array'")
        VectorEnv.__init__(self, env_id, [context], seed=None)
        if horizon == -1:
            self.horizon = inf
        elif horizon is not None:
            self.horizon = whole("horizon", horizon)
        self.render_mode = render_mode
        self.metadata = self.metadata | {"render_fps": round(1 / self.task.dt)}
        self.observation_space = box(self.d_s, self.task.high, self.task.low)
        self.action_space = box(self.d_a, 1.0)
        self.np_random = self.rngs[0]

    @property
    def context(self):
        return dict(self.task.contexts[0])

    def state(self):
        """The physical state, float64: what reset(options={"state": ...}) takes."""
        return super().state()[0]

    def set_context(self, **context: float) -> None:
        """Changes context values in mid-episode and keeps the physical state.

        Of a wrapped environment it is called as env.unwrapped.set_context. It needs a reset before.
        """
        task = self.task_in([context])
        self.need_reset("set_context")
        task.set_state(self.task.state())
        self.task = task

    def reset(self, *, seed=None, options=None):
        options = dict(named("option", options or {}, ["state", "target", "context"]))
        sizes = {"state": self.task.state_size, "target": self.task.target_size}
        for name in options.keys() & sizes.keys():
            options[name] = finite(name, options[name], (sizes[name],))[None]
        task = self.task_in([options.get("context", {})])
        gymnasium.Env.reset(self, seed=seed)
        # All checks are done: a reset that fails changes nothing.
        self.task = task
        self.rngs = [self.np_random]
        super().reset()
        if "target" in options:
            task.target = options["target"].copy()
        if "state" in options:
            task.set_state(options["state"])
        return self.observe()[0], {"context": self.context}

    def step(self, action):
        """One step of `action`, (d_a,); what an actuator gets is clipped to [-1, 1]."""
        observations, rewards, truncated = super().step([action])
        return observations[0], float(rewards[0]), False, truncated, {"context": self.context}

    def render(self):
        """The picture, (256, 256, 3), or None without a render mode."""
        self.need_reset("render")
        if self.render_mode is not None:
            return draw(*self.task.picture(0))


def make(env_id: str, horizon: int | None = None, **options: Any) -> ContextualEnv:
    """The environment in the context given by name; what is not named has its default.

    `horizon`: None is that of the table, -1 never ends an episode. render_mode="rgb_array" makes
    `render` draw. An unknown name or a bad value is a ValueError, an unknown id what `lookup` says.

    Like an environment of gymnasium.make, it has a `spec` from which others can make it anew. The
    ids "gymnasium:..." are an exception, and cannot be pickled either.
    """
    env = ContextualEnv(env_id, horizon=horizon, **options)
    spec = gymnasium.registry.get(f"aib/{env_id.rpartition(':')[2]}-v0")
    if spec is not None:
        kwargs = spec.kwargs | env.context | {"render_mode": env.render_mode}
        limit: Any = env.horizon
        if limit == inf:
            limit = None  # as Gymnasium writes it
        env.spec = dataclasses.replace(spec, max_episode_steps=limit, kwargs=kwargs)
    return env


class ContextualVectorEnv(gymnasium.vector.SyncVectorEnv):
    """Instances by the rules of Gymnasium's vector environments, for gymnasium.make_vec.

    contexts: a list of `num_envs` contexts, or the name of a set of `num_envs` contexts, which are
    not the first ones of 20 (see `context_sets`). Context values given by name hold in all of them.
    max_episode_steps is the horizon of ContextualEnv. With a vectorization_mode, make_vec does not
    know `contexts`.
    All else is SyncVectorEnv's: the step after the end of an episode begins the next one.
    infos["context"] has an array (num_envs,) per dimension, and Gymnasium's mask, "_" and its name.
    envs.envs[i].set_context changes a context in mid-episode. For RandomContext in each instance,
    make_vec takes vectorization_mode="sync" and wrappers=[RandomContext].
    """

    def __init__(
        self,
        env_id: str,
        num_envs: int = 1,
        contexts: Contexts | None = None,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        **context: float,
    ):
        if contexts is None:
            contexts = [{}] * num_envs
        makers = []
        for each in listed(env_id, contexts, num_envs):
            values = full_context(env_id, each) | context
            options = env_id, render_mode, max_episode_steps
            makers.append(functools.partial(ContextualEnv, *options, **values))
        super().__init__(makers)

    def reset(self, *, seed=None, options=None):
        """options={"contexts": [...]}: a dict for each instance, of values to change from now on.

        Returns observations (num_envs, d_s) and infos.
        """
        options = named("option", options or {}, ["contexts"])
        contexts = options.get("contexts", [{}] * self.num_envs)
        contexts = listed(self.envs[0].env_id, contexts, self.num_envs)
        tasks = [env.task_in([context]) for env, context in zip(self.envs, contexts)]
        # All contexts are checked: one that is refused changes nothing.
        for env, task in zip(self.envs, tasks):
            env.task = task
        return super().reset(seed=seed)


# --------------------------------------------------------------------------------------------------
# Wrappers: contexts at random or told; inverted and permuted actuators of any environment
# --------------------------------------------------------------------------------------------------


class RandomContext(gymnasium.Wrapper, RecordConstructorArgs):
    """Draws a context at each reset, by the environment's generator.

    `contexts` is a list, the name of a set, or a dict of ranges, {"length": (0.3, 0.85)}. A range
    is drawn from uniformly; of a binary dimension, one of its two ends. A dimension that `contexts`
    does not name keeps the value that it had when the environment was wrapped.
    """

    def __init__(self, env: gymnasium.Env, contexts: Any = "train"):
        # RecordConstructorArgs puts the arguments into env.spec, so that gymnasium.make(env.spec)
        # makes the wrapped environment anew.
        RecordConstructorArgs.__init__(self, contexts=contexts)
        gymnasium.Wrapper.__init__(self, env)
        inner = contextual(env)
        self.ranges = {}
        self.binary = [dim.name for dim in lookup(inner.env_id).context if dim.binary]
        if isinstance(contexts, dict):
            for name, ends in contexts.items():
                low, high = finite(f"range of {name}", ends, (2,))
                if low > high:
                    raise ValueError(f"range of {name} {shown(ends)}: must go up")
                for value in ends:
                    full_context(inner.env_id, {name: value})
                self.ranges[name] = ends
            contexts = [{}]
        self.contexts = [
            full_context(inner.env_id, each, inner.context)
            for each in listed(inner.env_id, contexts)
        ]

    def reset(self, *, seed=None, options=None):
        """Values in options["context"] take the place of drawn ones."""
        if seed is not None:
            # The seed comes first, since the context too is drawn by the generator that it sets.
            self.env.reset(seed=seed)
        options = dict(options or {})
        context = dict(self.np_random.choice(self.contexts))
        for name, ends in self.ranges.items():
            if name in self.binary:
                context[name] = self.np_random.choice(ends)
            else:
                context[name] = self.np_random.uniform(*ends)
        # The environment checks the values themselves.
        context |= named("context", options.pop("context", {}), list(context))
        return self.env.reset(options=options | {"context": context})


class AddContext(gymnasium.ObservationWrapper, RecordConstructorArgs):
    """Shows the agent the context, (d_c,), in the order of the table.

    The context stands at the end of the observation, which is flattened. With a `key`, a name other
    than "observation", the observation becomes a dict, {"observation": ..., key: context}.
    """

    def __init__(self, env: gymnasium.Env, key: str | None = None):
        RecordConstructorArgs.__init__(self, key=key)
        gymnasium.ObservationWrapper.__init__(self, env)
        self.key = key
        plain, added = env.observation_space, box(len(contextual(env).context))
        self.both = gymnasium.spaces.Tuple([plain, added])
        if key is None:
            self.observation_space = gymnasium.spaces.flatten_space(self.both)
        else:
            self.observation_space = gymnasium.spaces.Dict({"observation": plain, key: added})

    def observation(self, observation):
        context = self.unwrapped.c[0]
        if self.key is None:
            return gymnasium.spaces.flatten(self.both, (observation, context))
        return {"observation": observation, self.key: context}


class ActuatorInversion(gymnasium.ActionWrapper, RecordConstructorArgs):
    """Multiplies each action by `signs`, a number or one per actuator; -1 inverts.

    ActuatorInversion(gymnasium.make("Pendulum-v1"), -1). The action space must be symmetric about
    zero, so that an inverted action stays inside it; another, and bad signs, are a ValueError.
    The benchmark's own environments do the same in `Task.step`, by their context.
    """

    def __init__(self, env: gymnasium.Env, signs: Any):
        gymnasium.ActionWrapper.__init__(self, env)
        space = env.action_space
        if not isinstance(space, gymnasium.spaces.Box) or (space.low != -space.high).any():
            raise ValueError(f"action space {shown(space)}: must be a Box symmetric about zero")
        if np.size(signs) == 1:
            signs = np.full(space.shape, signs)
        self.signs = finite("signs", signs, space.shape).copy()
        # Lists, as a spec written as JSON holds no arrays.
        RecordConstructorArgs.__init__(self, signs=self.signs.tolist())

    def action(self, action):
        space = self.action_space
        return (finite("action", action, space.shape) * self.signs).astype(space.dtype)


class ActuatorPermutation(gymnasium.ActionWrapper, RecordConstructorArgs):
    """Sends entry `order[i]` of the action to actuator i.

    An order that is no permutation, or exchanges actuators with different bounds, is a ValueError.
    The benchmark's own environments do the same in `Task.step`, by their context.
    """

    def __init__(self, env: gymnasium.Env, order: Any):
        gymnasium.ActionWrapper.__init__(self, env)
        space = env.action_space
        self.order = np.array(order, ndmin=1)
        if not one_axis(space):
            raise ValueError(f"action space {shown(space)}: must be a Box of one axis")
        (size,) = space.shape
        whole_numbers = self.order.dtype.kind in "iu"  # True and False are none.
        if not whole_numbers or sorted(self.order.tolist()) != list(range(size)):
            raise ValueError(f"order {shown(order)}: must be a permutation of 0 ... {size - 1}")
        bounds = np.stack([space.low, space.high])
        if (bounds[:, self.order] != bounds).any():
            kept = "leave actuators with other bounds in place"
            raise ValueError(f"order {shown(order)}: must {kept}, {shown(space)}")
        RecordConstructorArgs.__init__(self, order=self.order.tolist())

    def action(self, action):
        space = self.action_space
        return finite("action", action, space.shape)[self.order].astype(space.dtype)


# --------------------------------------------------------------------------------------------------
# Registration, and checks of values from outside
# --------------------------------------------------------------------------------------------------

# Columns of dmash.py's tables, and arguments and options of the environments.
RESERVED = (
    "run set step index return diverged self id env_id num_envs contexts context max_episode_steps "
    "horizon render_mode seed options state target disable_env_checker vectorization_mode "
    "vector_kwargs wrappers"
).split()


def register(
    env_id: str,
    cls: type[Task],
    context: Sequence[ContextDim],
    horizon: int,
    kind: str = NON,
    K: int = 24,
    steps: int = 100_000,
) -> None:
    """Adds an environment. The arguments are a row of EnvSpec; dmash.py needs K <= horizon.

    `make` then knows it, Gymnasium as aib/<env_id>-v0, and dmash.py as --env <module>:<env_id>. The
    module is the one that calls `register`. A ValueError says what is wrong with the row. Five
    instances of the class, in contexts of eval_out, are tried for one step. Their own errors pass
    through. A run that is resumed does not notice that the module has changed.
    """
    # The class would not tell the module: it may come from this file.
    module = sys._getframe(1).f_globals["__name__"]
    if module == "__mp_main__":  # the main module in a process that multiprocessing spawned
        module = "__main__"
    spec = EnvSpec(cls, tuple(context), horizon, kind, K, steps, module)
    try:
        check_spec(env_id, spec)
    except ValueError as error:
        raise ValueError(f"environment {env_id!r}: {error}") from error
    full_id = env_id
    if module != __name__:
        full_id = f"{module}:{env_id}"
    gymnasium.register(
        f"aib/{env_id}-v0",
        entry_point="aib_envs:ContextualEnv",
        vector_entry_point="aib_envs:ContextualVectorEnv",
        max_episode_steps=horizon,
        kwargs={"env_id": full_id},
    )
    ENVS[env_id] = spec


def check_spec(env_id, spec):
    """ValueError, if a value of the row is not usable or the class is no complete Task."""
    cls = spec.cls
    if not (isinstance(env_id, str) and env_id.replace("-", "_").isidentifier()):
        raise ValueError("must be letters, digits, - and _, a digit not first")
    known = ENVS.get(env_id)
    if known and (known.module, known.cls.__qualname__) != (spec.module, cls.__qualname__):
        raise ValueError(f"belongs to {known.cls.__qualname__} of the module {known.module}")
    for name in ("horizon", "K", "steps"):
        whole(name, getattr(spec, name))
    for name in ("d_s", "d_a", "state_size"):
        whole(f"{cls.__name__}.{name}", getattr(cls, name, None))
    names = [dim.name for dim in spec.context]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"contexts {names}: must be at least one, each with a name of its own")
    for dim in spec.context:
        check_dim(dim)
    missing = sorted(cls.__abstractmethods__)
    if not hasattr(cls, "dt"):
        missing.append("dt")
    if missing:
        raise ValueError(f"{cls.__name__} has no {', '.join(missing)}")
    if cls.d_a == 1 and {"swap", "sign_y"} & set(names):
        raise ValueError(f"{cls.__name__} has no two actuators")
    # Both ends of a range are among the five. An array of a wrong shape may fit 1 or d_a instances.
    rng = np.random.default_rng(0)
    task = cls(context_set(spec.context, "eval_out", 5, rng))
    task.reset([rng] * 5)
    task.step(np.zeros((5, cls.d_a)))
    shapes = {"state": (5, cls.state_size), "observation": (5, cls.d_s), "reward": (5,)}
    for name, expected in shapes.items():
        shape = np.shape(getattr(task, name)())
        if shape != expected:
            gives = f"{cls.__name__} gives {name} of shape {shape}"
            raise ValueError(f"{gives} for five instances: must be {expected}")


def check_dim(dim):
    """ValueError, if the name or the ranges of a ContextDim are not usable."""
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


def lookup(env_id: str) -> EnvSpec:
    """The EnvSpec of an id of the table, of "module:id" or of "gymnasium:id".

    Importing the module registers the id. The module may be in the current folder, if no other one
    has its name. An unknown id is a ValueError or an error of the import or of Gymnasium.
    """
    module, _, name = str(env_id).rpartition(":")
    if module and "" not in sys.path:
        sys.path.append("")  # the current folder
    if str(env_id).startswith("gymnasium:"):
        return gymnasium_spec(env_id.removeprefix("gymnasium:"))
    if module:
        try:
            importlib.import_module(module)
        except SystemExit:
            # Otherwise a module that ends the program with status 0 would look like success.
            raise ImportError(f"{module} ends the program while it is imported") from None
    if name not in ENVS:
        raise ValueError(unknown("environment", name, list(ENVS)))
    spec = ENVS[name]
    # A package may register its environments in a module of its own.
    if module and not f"{spec.module}.".startswith(f"{module}."):
        raise ValueError(f"environment {env_id!r}: {name} belongs to the module {spec.module}")
    return spec


def full_context(env_id, context, base=None):
    """`context` checked, with a value for every dimension, in the order of the table.

    A dimension that it does not name has its value in `base`, or else its default.
    """
    dims = {dim.name: dim for dim in lookup(env_id).context}
    named("context, or unexpected keyword argument", context, list(dims))
    values = (base or {}) | context
    return {name: allowed_value(dim, values.get(name, dim.default)) for name, dim in dims.items()}


def listed(env_id, contexts, n=None):
    """A list of contexts (of `n`, if that is given), or the set of that name."""
    if isinstance(contexts, str):
        contexts = context_sets(env_id, n or 20).get(contexts, contexts)
    if not isinstance(contexts, (list, tuple)) or not contexts:
        allowed = "a list of at least one, or train, eval_in or eval_out"
        raise ValueError(f"contexts {shown(contexts)}: must be {allowed}")
    if n and len(contexts) != n:
        raise ValueError(f"num_envs={n}: must be the number of contexts, here {len(contexts)}")
    return contexts


def allowed_value(dim, value):
    """`value` as a float; ValueError if it is not finite or physically impossible."""
    number = numbers(value)
    must_be = f"context {dim.name}={shown(value)}: must be"
    if isinstance(value, (str, bool)) or number.size != 1 or not np.isfinite(number).all():
        raise ValueError(f"{must_be} a finite number")
    number = number.item()
    if not dim.above < number < dim.below:
        raise ValueError(f"{must_be} above {dim.above:g} and below {dim.below:g}")
    if dim.only and number not in dim.only:
        raise ValueError(f"{must_be} one of {dim.only}")
    return number


def contextual(env):
    """The ContextualEnv that `env` wraps."""
    if not isinstance(env.unwrapped, ContextualEnv):
        raise ValueError(f"{shown(env)}: must be an environment of aib_envs, with a context")
    return env.unwrapped


def one_axis(space) -> TypeGuard[gymnasium.spaces.Box]:
    return isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1


def box(size, high=inf, low=None):
    high = np.broadcast_to(np.float32(high), size)
    if low is None:
        low = -high
    return gymnasium.spaces.Box(np.float32(low), high, (size,), np.float32)


def numbers(value):
    """`value` as an array; NaN if it is no number or none that a float can hold."""
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        # In this order: an object, a text, 10**400, a tensor that has a gradient.
        return np.array(math.nan)


def finite(name, value, shape):
    """`value` as an array of that shape; ValueError if it is not that many finite numbers."""
    array = numbers(value)
    if array.shape != shape or not np.isfinite(array).all():
        size = " x ".join(map(str, shape))
        raise ValueError(f"{name} {shown(value)}: must be {size} finite numbers")
    return array


def whole(name, value):
    """`value`, if it is a whole number of at least 1, else ValueError."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={shown(value)}: must be a whole number of at least 1")
    return value


class UnknownName(TypeError, ValueError):
    """A name that is not in a table.

    As a keyword it is a TypeError, by Python's convention; in a dict it is a ValueError.
    """


def named(kind, values, known):
    """`values`, if it is a dict whose names are all known."""
    if not isinstance(values, dict):
        raise ValueError(f"{shown(values)}: must be a dict with names of {', '.join(known)}")
    for name in values:
        if name not in known:
            raise UnknownName(unknown(kind, name, known))
    return values


def shown(value):
    """`value` in a message of one line."""
    return textwrap.shorten(repr(value), 100, placeholder="...")


def unknown(kind, name, known):
    """The one-line message for a name that is not in a table, with the closest known one."""
    hint = ""
    close = difflib.get_close_matches(str(name), known, n=1)
    if close:
        hint = f" (did you mean {close[0]}?)"
    return f"unknown {kind} {str(name)!r}{hint}; known: {', '.join(known)}"


# --------------------------------------------------------------------------------------------------
# The table: id, class, contexts, horizon, kind, K, steps
# --------------------------------------------------------------------------------------------------


register("di_inv", DoubleIntegrator, [MASS, ACTION_FACTOR], 100, NON, 24, 100_000)
register("di_friction", DoubleIntegrator, [MASS, FRICTION], 100, OVER, 24, 100_000)
register("di_perm", DoubleIntegrator, [MASS, SWAP], 100, NON, 24, 100_000)
register("ode", ODE, coefficients(2), 200, WEAK, 24, 100_000)
register("cartpole_inv", Cartpole, [POLE_LENGTH, ACTION_FACTOR], 1000, NON, 128, 100_000)
register("cheetah_inv", Cheetah, [SCALE, ACTION_FACTOR], 1000, NON, 128, 200_000)
register("reacher_easy_inv", Reacher, [SCALE, ACTION_FACTOR], 1000, NON, 128, 200_000)
register("reacher_hard_inv", HardReacher, [SCALE, ACTION_FACTOR], 1000, NON, 128, 200_000)
register("reacher_hard_perm", HardReacher, [SCALE, SWAP], 1000, NON, 128, 200_000)
register("ball_in_cup", BallInCup, [CUP_GRAVITY, STRING], 1000, OVER, 128, 200_000)
register("walker", Walker, [GRAVITY, STRENGTH], 1000, OVER, 128, 200_000)
register("walker_gym", WalkerGym, [GRAVITY, STRENGTH], 1000, OVER, 128, 500_000)
register("hopper_gym", HopperGym, [GRAVITY, STRENGTH], 1000, OVER, 128, 500_000)
register("di_signs", DoubleIntegrator, [MASS, SIGN_X, SIGN_Y], 100, NON, 24, 100_000)
for k in range(1, 21):
    register(f"ode_{k}", ODE, coefficients(k), 200, WEAK)

if __name__ == "__main__":
    try:
        # os.write notices at once that nobody reads any more, and print only when Python ends.
        os.write(sys.stdout.fileno(), f"{__doc__}\n".encode())
    except BrokenPipeError:
        pass  # The reader, such as `head`, has gone.
    except OSError as error:
        sys.exit(f"aib_envs.py: error: {error.strerror}")
