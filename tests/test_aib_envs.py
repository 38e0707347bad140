"""Tests of aib_envs.py: each compares with something computed another way (an oracle)."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import os
import pickle
import re
import subprocess
import sys
import textwrap
import warnings
from unittest import mock
from xml.etree import ElementTree

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env, data_equivalence
from numpy.testing import assert_allclose, assert_array_equal

import aib_envs
from aib_envs import (
    ACTION_FACTOR,
    MASS,
    SWAP,
    ActuatorInversion,
    ActuatorPermutation,
    AddContext,
    BadEnvironment,
    ContextDim,
    RandomContext,
    VectorEnv,
    coefficients,
    context_sets,
    make,
    register,
)

# ode_3 ... ode_19 differ from their neighbours in the number of coefficients only.
IDS = [env_id for env_id in aib_envs.ENVS if env_id not in {f"ode_{k}" for k in range(3, 20)}]
each_environment = pytest.mark.parametrize("env_id", IDS)
ResetNeeded = gymnasium.error.ResetNeeded


@contextlib.contextmanager
def refused(text, error=ValueError):
    """The lines below must end in this error, whose message is one line that holds the text."""
    with pytest.raises(error, match=re.escape(text)) as caught:
        yield caught
    assert "\n" not in str(caught.value)


def assert_same(ours, expected):
    """Equal types and values, bit for bit, through dicts and tuples."""
    assert data_equivalence(ours, expected, exact=True)


def started(env_id, seed=0, **options):
    env = make(env_id, **options)
    env.reset(seed=seed)
    return env


def make_vec(env_id, num_envs, **options):
    return gymnasium.make_vec(f"aib_envs:aib/{env_id}-v0", num_envs=num_envs, **options)


def sync_vec(env_id, contexts, **options):
    """Gymnasium's own vector environment of single environments, one per context."""
    name = f"aib/{env_id}-v0"
    calls = [functools.partial(gymnasium.make, name, **c, **options) for c in contexts]
    return gymnasium.vector.SyncVectorEnv(calls)


def dims_of(env_id):
    return aib_envs.ENVS[env_id].context


def default_of(env_id):
    return {dim.name: dim.default for dim in dims_of(env_id)}


def start_of(task):
    """The options of a reset that starts where the single instance of `task` is now."""
    options = {"state": task.state()[0]}
    if task.target_size:
        options["target"] = task.target[0].copy()
    return options


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    with mock.patch.dict(aib_envs.ENVS), mock.patch.dict(gymnasium.registry):
        yield


# --------------------------------------------------------------------------------------------------
# Dynamics: by hand, and against the reference environments
# --------------------------------------------------------------------------------------------------


def one_step(env, state, action):
    env.reset(seed=0, options={"state": state})
    s2, r, *_ = env.step(action)
    return s2, r


def test_double_integrator_by_hand():
    env = make("di_inv", mass=0.5, action_factor=-1)
    s2, r = one_step(env, [0.5, -0.2, 0.3, -0.4], [0.6, -1.0])
    # p + .1 v with the old v; v + .1 * -a / .5
    assert_allclose(s2, [0.53, -0.24, 0.3 - 0.12, -0.4 + 0.2], rtol=1e-6)
    s2, r = one_step(env, [0.99, -0.99, 1.0, -1.0], [-0.5, 0.5])
    assert s2.tolist() == [1, -1, 1, -1]  # clipped
    assert one_step(env, [0.1, 0.0, -0.5, 0.99], [0, 0])[1] == 0  # at distance .111
    assert one_step(env, [0.1, 0.0, -0.5, 0.0], [0, 0])[1] == 1
    rough = make("di_friction", mass=0.5, friction=2)
    s2, r = one_step(rough, [0.0, 0.0, 0.5, -1.0], [0.0, 1.0])
    # v - .1 * 2 v / .5 + .1 a / .5
    assert_allclose(s2[2:], [0.5 - 0.2, -1 + 0.4 + 0.2], rtol=1e-6)


def test_ode_by_hand():
    """Each coefficient with its power, whatever context stands before it."""
    register("late", aib_envs.ODE, [ACTION_FACTOR, *coefficients(3)], 50)
    env = make("late", action_factor=-1, c0=2, c1=-3, c2=4)
    s2, r = one_step(env, [0.4], [-0.5, 0.25])
    a = 0.5 - 0.25j
    assert_allclose(s2, [0.4 + 0.01 * (2 * a - 3 * a**2 + 4 * a**3).real], rtol=1e-6)
    env = make("ode", c0=10)
    tiers = {0.04: 1, 0.06: 1 / 2, 0.15: 1 / 3, 0.3: 1 / 4, -1.5: 0.05, -2.5: 0}
    for x, reward in tiers.items():
        assert one_step(env, [x], [0, 0])[1] == reward
    assert one_step(env, [19.99], [1, 0])[0] == [20]


def scale(root, tag, names, attribute, *factors):
    for name in names:
        element = root.find(f".//{tag}[@name='{name}']")
        values = [float(value) * by for value, by in zip(element.get(attribute).split(), factors)]
        element.set(attribute, " ".join(map(repr, values)))


def edit_cartpole(root, context):
    pole = root.find(".//default[@class='pole']/geom")
    pole.set("fromto", f"0 0 0 0 0 {2 * context['length']!r}")


def edit_reacher(root, context):
    by = context["length"]
    scale(root, "geom", ["arm", "hand"], "fromto", 1, 1, 1, by, 1, 1)
    scale(root, "body", ["hand", "finger"], "pos", by, 1, 1)


def edit_cheetah(root, context):
    by = context["length"]
    limbs = ["bthigh", "bshin", "bfoot", "fthigh", "fshin", "ffoot"]
    scale(root, "geom", limbs, "pos", by, 1, by)
    scale(root, "geom", limbs, "size", 1, by)
    scale(root, "body", ["bshin", "bfoot", "fshin", "ffoot"], "pos", by, 1, by)


def edit_ball_in_cup(root, context):
    string = context["distance"]
    root.find(".//spatial[@name='string']").set("range", f"0 {string!r}")
    root.find(".//body[@name='ball']").set("pos", f"0 0 {0.2 + 0.3 - string!r}")


def set_fields(model, context):
    """Of the compiled model."""
    if "gravity" in context:
        model.opt.gravity[2] = -context["gravity"]
    model.actuator_gear[:] *= context.get("actuator_strength", 1)


# id: domain and task of dm_control, and the edit of its XML
DM_CONTROL = {
    "cartpole_inv": ("cartpole", "balance", edit_cartpole),
    "reacher_easy_inv": ("reacher", "easy", edit_reacher),
    "reacher_hard_inv": ("reacher", "hard", edit_reacher),
    "reacher_hard_perm": ("reacher", "hard", edit_reacher),
    "cheetah_inv": ("cheetah", "run", edit_cheetah),
    "ball_in_cup": ("ball_in_cup", "catch", edit_ball_in_cup),
    "walker": ("walker", "walk", None),
}
GYMNASIUM = {"walker_gym": "Walker2d-v5", "hopper_gym": "Hopper-v5"}


class DmControl:
    """A task of dm_control in a context."""

    def __init__(self, env_id, context):
        domain, task, edit = DM_CONTROL[env_id]
        reason = "dm_control, the oracle, is not installed"
        suite = pytest.importorskip("dm_control.suite", reason=reason)
        module = getattr(suite, domain)
        xml, assets = module.get_model_and_assets()
        root = ElementTree.fromstring(xml)
        if edit:
            edit(root, context)
        edited = ElementTree.tostring(root), assets
        with mock.patch.object(module, "get_model_and_assets", return_value=edited):
            self.env = suite.load(domain, task, {"random": 0})
        self.physics = self.env.physics
        set_fields(self.physics.model, context)
        self.context = context
        self.target = np.zeros(0)
        if domain == "reacher":
            self.target = self.physics.named.model.geom_pos["target"][:2]  # a view
        self.env.reset()

    def start(self):
        """State, and target of a reacher."""
        return np.hstack([self.physics.get_state(), self.target])

    def set_state(self, state, target=()):
        self.target[:] = target
        with self.physics.reset_context():
            self.physics.set_state(state)

    def step(self, action):
        action = action * self.context.get("action_factor", 1)
        if self.context.get("swap"):
            action = action[::-1]
        result = self.env.step(action)
        parts = result.observation
        return np.hstack([parts[name] for name in sorted(parts)]), result.reward


class GymnasiumOwn:
    """A locomotion environment of Gymnasium in a context."""

    def __init__(self, env_id, context):
        pytest.importorskip("imageio", reason="Gymnasium's MuJoCo tasks do not load without it")
        name = GYMNASIUM[env_id]
        self.env = gymnasium.make(name, terminate_when_unhealthy=False).unwrapped
        set_fields(self.env.model, context)
        self.env.reset(seed=0)

    def start(self):
        return np.hstack([self.env.data.qpos, self.env.data.qvel])

    def set_state(self, state):
        self.env.reset()
        self.env.set_state(*np.split(state, [self.env.model.nq]))

    def step(self, action):
        return self.env.step(action)[:2]


REFERENCES = dict.fromkeys(DM_CONTROL, DmControl) | dict.fromkeys(GYMNASIUM, GymnasiumOwn)
each_reference = pytest.mark.parametrize("env_id", REFERENCES)


@each_reference
def test_steps_equal_the_reference(env_id):
    """Single steps from states along random episodes: in the default context, and in every
    combination of the ends of train and extrapolation range."""
    default = default_of(env_id)
    ends = [dim.train + (dim.extrapolation or ()) for dim in dims_of(env_id)]
    for i, values in enumerate([default.values(), *itertools.product(*ends)]):
        context = dict(zip(default, values))
        env = started(env_id, i, **context)
        reference = REFERENCES[env_id](env_id, context)
        task = env.task
        rng = np.random.default_rng(i)
        for k in range(40):
            start = start_of(task)
            if k % 20 == 10:  # far from where an episode leads
                start["state"] += 0.1 * rng.normal(size=task.state_size)
            action = rng.uniform(-1, 1, task.d_a)
            if k % 3 == 0:
                action = np.sign(action)
            env.reset(options=start)
            reference.set_state(**start)
            _, r, *_ = env.step(action)
            s2, r2 = reference.step(action)
            ours = np.hstack([task.observation()[0], *start_of(task).values(), r])
            assert_allclose(ours, np.hstack([s2, reference.start(), r2]), rtol=0, atol=1e-6)


@each_reference
def test_resets_are_distributed_as_in_the_reference(env_id):
    """The Kolmogorov-Smirnov test of each entry of state and target, and the support."""
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    env = started(env_id)
    reference = REFERENCES[env_id](env_id, default_of(env_id))
    ours = []
    theirs = []
    for _ in range(2000):
        env.reset()
        reference.env.reset()
        ours.append(np.hstack([*start_of(env.task).values()]))
        theirs.append(reference.start())
    assert (stats.ks_2samp(ours, theirs, method="asymp").pvalue > 0.001).all()
    margin = 0.15 * np.ptp(theirs, axis=0) + 1e-9
    assert (ours > np.min(theirs, axis=0) - margin).all()
    assert (ours < np.max(theirs, axis=0) + margin).all()
    if env.task.target_size:
        radii = np.hypot(*np.transpose(ours)[-2:])
        assert 0.05 <= radii.min() and radii.max() <= 0.2


# --------------------------------------------------------------------------------------------------
# Contexts and the table
# --------------------------------------------------------------------------------------------------


def grid(dim, which):
    """The values of a continuous dimension in a set, sorted."""
    low, high = dim.train
    margin = (high - low) / 100
    if which == "train":
        return np.linspace(low, high, 50)
    if which == "eval_in":
        return np.linspace(low + margin, high - margin, 50)
    lowest, highest = dim.extrapolation
    below = np.linspace(lowest, low - margin, 25)
    return [*below, *np.linspace(high + margin, highest, 25)]


@pytest.mark.parametrize("env_id", aib_envs.ENVS)
def test_context_sets(env_id):
    """Disjoint and without repetition, and evenly spaced entries of the mesh, rounded down, where
    it has one or two continuous dimensions. The binary values take turns; in the 20 of the paper
    they are in the mesh."""
    dims = dims_of(env_id)
    continuous = [dim for dim in dims if not dim.binary]
    turns = list(itertools.product(*(dim.train for dim in dims if dim.binary)))
    for n in (1, 7, 20, 33):
        sets = context_sets(env_id, n)
        seen = [tuple(context.values()) for contexts in sets.values() for context in contexts]
        assert len(seen) == len(set(seen)) == 3 * n and sets == context_sets(env_id, n)
        for which, contexts in sets.items():
            grids = [grid(dim, which) for dim in continuous]
            if len(grids) > 2:
                values = np.array([list(context.values()) for context in contexts])
                assert np.isclose(values[..., None], grids).any(axis=-1).all()
                continue
            mesh = list(itertools.product(*grids, turns))
            for i, context in enumerate(contexts):
                *values, binary = mesh[i * (len(mesh) - 1) // max(1, n - 1)]
                if n != 20 or len(turns) != 2:
                    binary = turns[i % len(turns)]
                assert list(context) == [dim.name for dim in dims]
                assert_allclose(list(context.values()), [*values, *binary], rtol=1e-12)


def test_binary_values_take_turns_in_any_environment():
    """Alone, before a continuous dimension, and beside so many that contexts are drawn."""
    cases = [("alone", [], 20), ("first", [MASS], 5), ("drawn", coefficients(3), 20)]
    for env_id, dims, n in cases:
        register(env_id, aib_envs.ODE, [ACTION_FACTOR, *dims], 50)
        for contexts in context_sets(env_id, n).values():
            turns = [context["action_factor"] for context in contexts]
            assert turns == [(-1, 1)[i % 2] for i in range(n)]
            assert list(contexts[0]) == list(default_of(env_id))


PRINT = [sys.executable, aib_envs.__file__]


def test_the_table_in_the_docstring_is_true_and_printed():
    printed = subprocess.run(PRINT, capture_output=True, text=True).stdout
    assert printed == aib_envs.__doc__ + "\n"
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    table = dict(aib_envs.ENVS)
    first_in = {}
    for k in range(1, 21):
        expected = dataclasses.replace(table["ode"], context=tuple(coefficients(k)))
        assert table.pop(f"ode_{k}") == expected
    expected = []
    for env_id, spec in table.items():
        names = ", ".join(default_of(env_id))
        expected.append(f"{env_id} {names} {spec.horizon} {spec.kind} {spec.K} {spec.steps} ")
        for dim in spec.context:
            first_in.setdefault(dim, env_id)
    for dim, env_id in first_in.items():
        expected.append(f"{dim.name} {env_id} {dim.default} {dim.train} {dim.extrapolation} ")
    for row in expected:
        assert any(line.startswith(row) for line in lines), row


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device here")
def test_output_that_nobody_takes():
    """A reader that has gone, as `head` has before the table comes, is told nothing. A full disk is
    told in one line."""
    receive, send = os.pipe()
    os.close(receive)
    full = b"aib_envs.py: error: No space left on device\n"
    for place, status, told in ((send, 0, b""), (os.open("/dev/full", os.O_WRONLY), 1, full)):
        done = subprocess.run(PRINT, stdout=place, stderr=subprocess.PIPE)
        os.close(place)
        assert (done.returncode, done.stderr) == (status, told)


# --------------------------------------------------------------------------------------------------
# The single and the vector environment
# --------------------------------------------------------------------------------------------------


@each_environment
def test_an_episode_by_the_conventions(env_id):
    """Its twin shows that actions are clipped, and that pictures leave the physics alone."""
    horizon = aib_envs.ENVS[env_id].horizon
    context = context_sets(env_id)["train"][6]
    env = make(env_id, render_mode="rgb_array", **context)
    twin = started(env_id, 3, **context)
    assert twin.render() is None
    s, info = env.reset(seed=3)
    first = s.copy()
    picture = env.render()
    seen = []
    for t, action in enumerate(np.random.default_rng(0).uniform(-3, 3, (horizon, env.task.d_a))):
        env.state()[:] = 0  # a copy
        step = env.step(action)
        assert_same(step, twin.step(action.clip(-1, 1)))
        s2, r, terminated, truncated, info = step
        assert s2 in env.observation_space and np.isfinite(r)
        assert env_id.endswith("gym") or 0 <= r <= 1
        assert not terminated and truncated == (t == horizon - 1)
        seen.append(s2)
        if t == 30:
            last = env.render()
    assert (np.ptp(seen, axis=0) > 0).all()  # No element is constant.
    assert np.ptp(picture) > 0 and not np.array_equal(picture, last)
    if isinstance(env.task, aib_envs.MujocoTask):
        seconds = env.task.datas[0].time / horizon
        assert env.metadata["render_fps"] == pytest.approx(1 / seconds)
    assert_array_equal(s, first)  # An observation handed out is never written to again.
    assert not np.array_equal(env.reset()[0], first)
    info["context"].clear()
    assert env.context == context


INF = np.inf
BOUNDS = {
    "di_inv": 1,
    "ode": 20,
    "cartpole_inv": [INF, 1, 1, INF, INF],
    "ball_in_cup": INF,
    "walker": [INF] + [1] * 14 + [INF] * 9,
    "walker_gym": [INF] * 8 + [10] * 9,
    "hopper_gym": [INF] * 5 + [10] * 6,
    "gymnasium:Pendulum-v1": [1, 1, 8],
}


@pytest.mark.parametrize("env_id", BOUNDS)
def test_bounds_of_observations_are_true(env_id):
    """Those of the physics, else infinite: wild states of large velocities stay inside them."""
    env = started(env_id)
    rng = np.random.default_rng(0)
    space = env.observation_space
    assert_array_equal(space.high, np.float32(BOUNDS[env_id]))
    assert_array_equal(space.low, -space.high)
    for _ in range(20):
        if env.task.state_size:
            env.reset(options={"state": 8 * rng.normal(size=env.task.state_size)})
        assert env.step(rng.uniform(-1, 1, env.task.d_a))[0] in space


def test_vector_env_as_training_uses_it():
    """Contexts as they are, in the order of the table, with the defaults of what is not named;
    observations in float32, as Gymnasium's, rewards in float64; all episodes end together."""
    contexts = [{"action_factor": -1, "mass": 0.7}, {}, {"action_factor": -1}]
    envs = VectorEnv("di_inv", contexts, seed=0)
    assert_same(envs.c, np.float32([[0.7, -1], [1, 1], [1, -1]]))
    envs.reset()
    for t in range(1, 101):
        s, r, done = envs.step(np.full((3, 2), 0.3))
        assert done == (t == 100)
    assert (s.dtype, r.dtype, r.shape) == (np.float32, np.float64, (3,))


@each_environment
def test_context_switches_keep_the_state_or_rebuild(env_id):
    """As a fresh environment of the new context, from the same state or from the same seed. The
    task of the old context is left alone."""
    new = context_sets(env_id, n=2)["eval_out"][1]
    env = started(env_id)
    fresh = make(env_id, **new)
    action = np.full(env.task.d_a, 0.5)
    for _ in range(5):
        env.step(action)
    task = env.task
    start = start_of(task)
    env.set_context(**new)
    fresh.reset(options=start)
    assert_same(env.state(), start["state"])
    assert_same(env.step(action), fresh.step(action))
    assert env.t == 6
    default = {"context": default_of(env_id)}
    assert_same(env.reset(seed=7, options=default), make(env_id).reset(seed=7))
    assert_same(env.reset(seed=7, options={"context": new}), fresh.reset(seed=7))
    assert_same(start_of(task), start)


def test_a_picture_shows_lines_and_discs_where_they_are():
    """A pixel is coloured where its distance from the line is at most the radius."""
    start = np.array([-0.5, -0.2])
    end = np.array([0.3, 0.6])
    view = aib_envs.View(np.array([0.1, 0.2]), 2.0)
    picture = aib_envs.draw(view, [aib_envs.Shape(start, end, 0.2, aib_envs.RED)], size=40)
    places = np.linspace(start, end, 2001)
    for row, column in np.ndindex(40, 40):
        point = view.centre + [(column + 0.5) / 20 - 1, 1 - (row + 0.5) / 20]
        inside = np.linalg.norm(places - point, axis=1).min() <= 0.2
        assert (tuple(picture[row, column]) == aib_envs.RED) == inside


def unpickled(env):
    return pickle.loads(pickle.dumps(env))


def restored(env):
    if isinstance(env, gymnasium.Env):
        other = make(env.env_id, **env.context)
    else:
        other = VectorEnv(env.env_id, env.task.contexts, seed=9)
    other.load_state_dict(env.state_dict())
    assert other.t == env.t
    return other


@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled, restored])
@each_environment
def test_copies_go_on_like_the_original(env_id, copied):
    """A copy made before the first reset, after it or in mid-episode: bit for bit, and each by
    itself. Observations are too coarse to show what a contact starts its solver from."""

    def play(env):
        parts = []
        for action in actions:
            parts += [*env.step(action)[:2], env.state()]
        parts += [env.reset()[0], env.step(actions[0])[0]]
        return np.concatenate(parts, axis=None)

    contexts = context_sets(env_id, 2)["eval_out"]
    vector, single = VectorEnv(env_id, contexts, seed=1), make(env_id, **contexts[0])
    for env, shape in ((vector, [2, vector.d_a]), (single, [vector.d_a])):
        actions = np.random.default_rng(0).uniform(-1, 1, (4, *shape))
        early = copied(env)
        assert_array_equal(early.reset()[0], env.reset()[0])
        begun = copied(env)
        expected = play(env)
        assert_array_equal(play(early), expected)
        assert_array_equal(play(begun), expected)
        env.step(actions[1])
        assert_array_equal(play(copied(env)), play(env))


# --------------------------------------------------------------------------------------------------
# Bad values
# --------------------------------------------------------------------------------------------------


def test_bad_contexts_are_refused():
    for value in (math.nan, math.inf, "x", True):
        with refused("must be a finite number"):
            make("ode", c0=value)
    with refused("length=0: must be above 0"):
        make("cartpole_inv", length=0)
    with refused("distance=1.2: must be above 0 and below 0.9"):
        make("ball_in_cup", distance=1.2)


def test_bad_names_numbers_and_options_are_refused():
    with refused("unknown environment 'cartpole' (did you mean cartpole_inv?)"):
        make("cartpole")
    with refused("render_mode 'human': must be None or 'rgb_array'"):
        make("ode", render_mode="human")
    with refused("horizon=0: must be a whole number of at least 1"):
        make("ode", horizon=0)
    with refused("n=2.5: must be a whole number of at least 1"):
        context_sets("ode", 2.5)
    for options, text in [
        ({"stat": 1}, "unknown option 'stat' (did you mean state?)"),
        ({"state": np.zeros(99)}, "...: must be 1 finite numbers"),
        ({"context": None}, "None: must be a dict with names of c0, c1"),
        ({"context": {"c9": 0}}, "'c9'"),
        (5, "5: must be a dict with names of state, target, context"),
    ]:
        with refused(text):
            make("ode").reset(options=options)


def test_bad_values_of_vector_environments_are_refused():
    envs = make_vec("di_inv", 2)
    for wrong in ([], 5, "test"):
        with refused("must be a list of at least one, or train, eval_in or eval_out"):
            VectorEnv("ode", wrong, seed=0)
    state = VectorEnv("ode", [{}] * 2, seed=0).state_dict()
    with refused("a state of 2 instances: must be of 3"):
        VectorEnv("ode", [{}] * 3, seed=0).load_state_dict(state)
    with refused("num_envs=2: must be the number of contexts"):
        envs.reset(options={"contexts": [{}]})
    with refused("unknown option 'state'; known: contexts"):
        envs.reset(options={"state": 1})
    before = envs.get_attr("context")
    with refused("mass=-1: must be above 0"):
        envs.reset(options={"contexts": [{"mass": 1.2}, {"mass": -1}]})
    assert envs.get_attr("context") == before
    for wrong in (0, -2):
        with refused(f"horizon={wrong}: must be a whole number"):
            make_vec("di_inv", 2, max_episode_steps=wrong)


def test_bad_values_of_wrappers_are_refused():
    env = make("di_inv")
    ranges = [
        ((0.3, -0.8), "range of mass (0.3, -0.8): must go up"),
        ((0, 0.8), "mass=0: must be above 0"),
        (0.5, "range of mass 0.5: must be 2 finite numbers"),
    ]
    for ends, text in ranges:
        with refused(text):
            RandomContext(env, {"mass": ends})
    for wrapper in (RandomContext, AddContext):
        with refused("must be an environment of aib_envs"):
            wrapper(gymnasium.make("Pendulum-v1"))
    with refused("signs [1, 2, 3]: must be 2 finite numbers"):
        ActuatorInversion(env, [1, 2, 3])
    for wrong in ([0, 0], [1, 0, 2], [True, False], [[1, 0]]):
        with refused("must be a permutation of 0 ... 1"):
            ActuatorPermutation(env, wrong)
    bounds = np.float32([1, 2])
    uneven = gymnasium.wrappers.RescaleAction(env, -bounds, bounds)
    with refused("order [1, 0]: must leave actuators with other bounds in place"):
        ActuatorPermutation(uneven, [1, 0])


def test_an_unknown_keyword_is_a_type_error_that_lists_the_contexts():
    """As Python's convention and other people's libraries expect; a bad value is none."""
    calls = [
        functools.partial(make, "cartpole_inv"),
        functools.partial(gymnasium.make, "aib_envs:aib/cartpole_inv-v0"),
        functools.partial(make_vec, "cartpole_inv", 2),
        started("cartpole_inv").set_context,
    ]
    known = "(did you mean length?); known: length, action_factor"
    for call in calls:
        with refused(f"unexpected keyword argument 'lenght' {known}", TypeError):
            call(lenght=1)
        with refused("length=-1") as error:
            call(length=-1)
        assert not isinstance(error.value, TypeError)


def test_step_before_reset_is_told():
    env = make("di_inv")
    for call in (env.set_context, env.state, env.render):
        with refused(f"call reset() before {call.__name__}()", ResetNeeded):
            call()
    for envs, actions in ((env, [0, 0]), (make_vec("di_inv", 2), np.zeros((2, 2)))):
        with refused("call reset() before step()", ResetNeeded):
            envs.step(actions)


def test_bad_actions_leave_the_environment_unharmed():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    env, twin = started("di_inv"), started("di_inv")
    with_gradient = torch.zeros(2, requires_grad=True)
    for bad in ([0] * 3, "left", [object()] * 2, [math.nan, 0], [0, math.inf], with_gradient):
        with refused("must be 1 x 2 finite numbers"):
            env.step(bad)
    good = [0.5, -0.5]
    for same in (good, torch.tensor(good), np.array(good, dtype=object)):
        assert_same(env.step(same), twin.step(np.array(good)))


@pytest.mark.parametrize("length", [1e-9, 1e300])
def test_a_context_that_cannot_be_built_changes_nothing(length):
    env, twin = started("reacher_easy_inv"), started("reacher_easy_inv")
    with refused("contexts [{'length': "):
        env.set_context(length=length)
    with refused("contexts [{'length': "):
        env.reset(seed=5, options={"context": {"length": length}})
    assert_same(env.step([0.5, 0.5]), twin.step([0.5, 0.5]))
    assert_same(env.reset(), twin.reset())


# --------------------------------------------------------------------------------------------------
# Gymnasium: its checker, its clock, its vector environments
# --------------------------------------------------------------------------------------------------


def checked(env, *more):
    """Gymnasium's checker, every warning of it an error, but that a bound is infinite."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in ("A Box observation space .*infinity", *more):
            warnings.filterwarnings("ignore", f"(?s).*{text}")
        check_env(env, skip_render_check=bool(more))


@each_environment
def test_gymnasium_checker_passes_without_a_warning(env_id):
    checked(gymnasium.make(f"aib/{env_id}-v0").unwrapped)


@each_environment
def test_the_horizon_is_gymnasium_s(env_id):
    name = f"aib/{env_id}-v0"
    assert gymnasium.spec(name).max_episode_steps == aib_envs.ENVS[env_id].horizon
    # By one clock, the one that was asked for.
    assert gymnasium.make(name).unwrapped.horizon == math.inf
    for env in (gymnasium.make(name, max_episode_steps=12), make(env_id, horizon=12)):
        env.reset(seed=0)
        action = np.zeros(env.action_space.shape)
        assert [env.step(action)[3] for _ in range(12)] == [False] * 11 + [True]
        assert env.spec.max_episode_steps == 12


@each_environment
def test_make_vec_equals_sync_vector_env(env_id):
    """So contexts, limit and render mode reach the instances, and rewards are float64."""
    contexts = context_sets(env_id, 3)["eval_out"]
    options = {"max_episode_steps": 4, "render_mode": "rgb_array"}
    ours = make_vec(env_id, 3, contexts=contexts, **options)
    sync = sync_vec(env_id, contexts, **options)
    for name in ("observation_space", "action_space"):
        assert getattr(ours, name) == getattr(sync, name)
        assert getattr(ours, f"single_{name}") == getattr(sync, f"single_{name}")
    assert ours.metadata == sync.metadata
    sync.action_space.seed(0)
    for seed in (3, None):
        assert_same(ours.reset(seed=seed), sync.reset(seed=seed))
        assert ours.np_random_seed == sync.np_random_seed
        for _ in range(9):  # The next reset comes right after a truncation.
            actions = sync.action_space.sample()
            assert_same(ours.step(actions), sync.step(actions))
    assert ours.get_attr("context") == sync.get_attr("context")
    assert_same(ours.render(), sync.render())


def test_max_episode_steps_of_make_vec():
    """-1 is Gymnasium's word for no limit."""

    def ends(envs):
        envs.reset(seed=0)
        return [t for t in range(1, 202) if envs.step(np.zeros((2, 2)))[3].all()]

    assert ends(make_vec("di_inv", 2, max_episode_steps=-1)) == []
    envs = make_vec("di_inv", 2)
    assert ends(envs) == [100, 201]  # Step 101 begins the next episode.
    envs.set_attr("horizon", 60)
    assert ends(envs) == [60, 121, 182]


def test_contexts_of_make_vec_by_the_name_of_a_set_by_values_or_at_reset():
    envs = make_vec("cartpole_inv", 20, contexts="train")
    train = context_sets("cartpole_inv")["train"]
    assert envs.get_attr("context") == tuple(train)
    _, infos = envs.reset(seed=0)
    assert infos["context"]["length"].tolist() == [context["length"] for context in train]
    envs = make_vec("di_inv", 2, mass=0.6)
    envs.reset(seed=4, options={"contexts": [{"mass": 0.7}, {"action_factor": -1}]})
    second = {"mass": 0.6, "action_factor": -1}
    assert envs.get_attr("context") == ({"mass": 0.7, "action_factor": 1}, second)
    single, actions = started("di_inv", 5, **second), np.full((2, 2), 0.3)
    assert_same(envs.step(actions)[0][1], single.step(actions[1])[0])


# --------------------------------------------------------------------------------------------------
# Wrappers, and other people's agents
# --------------------------------------------------------------------------------------------------


def test_actuator_wrappers_on_any_environment():
    """As the environment inside, with the action changed. What was given is not kept."""
    signs = np.array([1.0, -1.0])
    order = np.array([1, 0])
    cases = [
        (ActuatorInversion(gymnasium.make("Pendulum-v1"), -1), [0.7], [-0.7]),
        (ActuatorInversion(make("di_inv"), signs), [0.2, 0.8], [0.2, -0.8]),
        (ActuatorPermutation(make("di_inv"), order), [0.2, 0.8], [0.8, 0.2]),
    ]
    signs *= -1
    order[:] = 0
    for env, action, expected in cases:
        env.reset(seed=0)
        s2, r, *_ = env.step(np.float32(action))
        env.env.reset(seed=0)
        assert_same((s2, r), env.env.step(np.float32(expected))[:2])
        with refused("action [0.2, 0.2, 0.2]: must be "):
            env.step([0.2] * 3)


WRAPPED = [
    lambda: ActuatorPermutation(ActuatorInversion(gymnasium.make("Pendulum-v1"), -1), [0]),
    lambda: ActuatorPermutation(make("hopper_gym", gravity=5), np.array([2, 0, 1])),
    lambda: ActuatorInversion(make("di_inv"), np.array([1.0, -1.0])),
    lambda: make("di_inv", horizon=-1, render_mode="rgb_array"),
    lambda: AddContext(RandomContext(gymnasium.make("aib/ode-v0"), {"c1": (2.0, 3.0)})),
    lambda: AddContext(RandomContext(make("cartpole_inv", length=1.2), "eval_in"), key="c"),
]


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_environments_are_rebuilt_from_their_spec_as_json(wrapped):
    env = wrapped()
    spec = gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json())
    again = gymnasium.make(spec)
    assert again.render_mode == env.render_mode
    assert env.observation_space == again.observation_space
    assert env.action_space == again.action_space
    env.action_space.seed(0)
    for seed in (3, None, None):
        assert_same(env.reset(seed=seed), again.reset(seed=seed))
        action = env.action_space.sample()
        assert_same(env.step(action), again.step(action))
    checked(again, "different from the unwrapped", "symmetric and normalized")


@each_environment
def test_random_contexts_and_contexts_that_are_told(env_id):
    contexts = context_sets(env_id)["eval_out"]
    told = AddContext(RandomContext(gymnasium.make(f"aib/{env_id}-v0"), "eval_out"))
    keyed = RandomContext(AddContext(make(env_id), key="context"), contexts)
    drawn = []
    for seed in (3, *[None] * 7):
        s, info = told.reset(seed=seed)
        parts, info2 = keyed.reset(seed=seed)
        assert info == info2 and info["context"] in contexts
        drawn.append(tuple(info["context"].values()))
        assert_same(s, np.float32([*parts["observation"], *drawn[-1]]))
        assert_same(parts["context"], np.float32(drawn[-1]))
    assert len(set(drawn)) > 4
    stacked = AddContext(gymnasium.wrappers.FrameStackObservation(make(env_id), 2))
    assert stacked.reset()[0] in stacked.observation_space


def test_ranges_are_drawn_from_uniformly_and_apart_from_the_state():
    """Of one seed each, starts and contexts are not correlated. What is not named stays as it was
    when the environment was wrapped."""
    env = RandomContext(make("ode", c1=2), {"c0": (-1, 3)})
    pairs = []
    assert env.reset(options={"context": {"c1": 4}})[1]["context"]["c1"] == 4
    for seed in range(1000):
        s, info = env.reset(seed=seed)
        assert info["context"]["c1"] == 2
        pairs.append((s[0], info["context"]["c0"]))
    starts, drawn = np.transpose(pairs)
    # The Kolmogorov-Smirnov distance; one in a thousand exceeds this by chance.
    assert np.abs(np.sort(drawn) - np.linspace(-1, 3, 1000)).max() < 4 * 1.95 / math.sqrt(1000)
    assert abs(np.corrcoef(starts, drawn)[0, 1]) < 0.1


def test_a_binary_dimension_has_one_of_the_two_ends():
    env = RandomContext(make("di_perm"), {"swap": (0, 1)})
    assert {env.reset(seed=seed)[1]["context"]["swap"] for seed in range(20)} == {0, 1}


def test_stable_baselines3_trains():
    """The example of the README, with fewer steps."""
    sb3 = pytest.importorskip("stable_baselines3", reason="Stable-Baselines3 is not installed")
    env = AddContext(RandomContext(make("cartpole_inv")))
    model = sb3.SAC("MlpPolicy", env, learning_starts=20, batch_size=8, seed=0).learn(30)
    assert np.isfinite(model.predict(env.reset()[0])[0]).all()


def test_torchrl_makes_and_steps():
    envs = pytest.importorskip("torchrl.envs", reason="torchrl is not installed")
    env = envs.GymEnv("aib_envs:aib/di_inv-v0")
    envs.check_env_specs(env)
    assert env.rollout(3)["observation"].shape == (3, 4)


# --------------------------------------------------------------------------------------------------
# Environments of one's own, and of Gymnasium
# --------------------------------------------------------------------------------------------------


class Motor(aib_envs.ODE):
    """What somebody might add: a position that one of two actuators moves, with a hidden gain."""

    dt = 0.05

    def advance(self, actions):
        self.s = self.s + self.dt * self.c["gain"][:, None] * actions[:, :1]


GAIN = ContextDim("gain", 1.0, (0.5, 1.5), (0.1, 2.0))


def test_register_an_environment_of_one_s_own():
    register("motor", Motor, [GAIN, ACTION_FACTOR], 50, "overlapping", K=10, steps=500)
    spec = aib_envs.ENVS["motor"]
    assert (spec.K, spec.steps, spec.horizon, spec.kind) == (10, 500, 50, "overlapping")
    env = gymnasium.make("aib/motor-v0", render_mode="rgb_array", gain=0.7)
    checked(env.unwrapped)
    s, _ = env.reset(seed=0)
    assert_allclose(env.step(np.float32([0.5, 0]))[0], s + 0.05 * 0.7 * 0.5, rtol=1e-5)
    assert env.metadata["render_fps"] == 20 and env.spec.max_episode_steps == 50
    assert make_vec("motor", 20, contexts="eval_in").reset(seed=0)[0].shape == (20, 1)


def refused_row(text, cls=Motor, context=(GAIN,), horizon=50, env_id="motor", **more):
    before = dict(aib_envs.ENVS)
    with refused(f"environment {env_id!r}: ") as error:
        register(env_id, cls, context, horizon, **more)
    assert text in str(error.value)
    assert aib_envs.ENVS == before and f"aib/{env_id}-v0" not in gymnasium.registry


def refused_class(text, **parts):
    refused_row(text, type("Changed", (Motor,), parts))


def refused_dim(text, name="gain", train=(0.5, 1.5), extrapolation=(0.1, 2.0), **more):
    refused_row(text, context=[ContextDim(name, 1.0, train, extrapolation, **more)])


def test_register_says_what_is_wrong_with_a_class():
    empty = type("Empty", (aib_envs.Task,), {"d_s": 2, "d_a": 1, "state_size": 2})
    refused_row("Empty has no advance, initial_state, reward, dt", empty)
    refused_class("Changed.d_s=None: must be a whole number of at least 1", d_s=None)
    refused_class("gives state of shape (5, 1) for five instances: must be (5, 3)", state_size=3)
    refused_class("gives observation of shape (5, 1) for five instances: must be (5, 3)", d_s=3)
    refused_class("gives reward of shape () for five instances", reward=lambda self: 1.0)
    # Both ends of eval_out are tried, of which 0.1 is the lower one.
    four = "gives reward of shape (4,) for five instances"
    refused_class(four, reward=lambda self: self.s[self.c["gain"] > 0.1, 0])
    refused_row("Single has no two actuators", type("Single", (Motor,), {"d_a": 1}), [GAIN, SWAP])


def test_register_says_what_means_nothing_in_a_row():
    for env_id in ("", "x:di_inv", "a b", "x\ny", None):
        refused_row("must be letters, digits, - and _", env_id=env_id)
    for wrong in (0, 30.5, True):
        refused_row(f"horizon={wrong!r}: must be a whole number of at least 1", horizon=wrong)
    refused_row("K=0: must be a whole number", K=0)
    refused_row("steps=0: must be a whole number", steps=0)
    refused_row("contexts []: must be at least one", context=[])
    refused_row("each with a name of its own", context=[GAIN, GAIN])
    wider = "must be ranges that go up, the second at least 1 % wider at both ends"
    for train in ((1.5, 0.5), (1.0, 1.0)):
        refused_dim(wider, train=train)
        refused_dim(wider, train=train, extrapolation=None)
    for extrapolation in ((0.6, 1.4), (2.0, 0.1), (0.5, 2.0)):
        refused_dim(wider, extrapolation=extrapolation)
    refused_dim("gain=inf: must be a finite number", train=(0.5, math.inf))
    refused_dim("gain=-0.1: must be above 0", extrapolation=(-0.1, 2.0), above=0)
    reserved = "run set step index return diverged horizon render_mode env_id seed state wrappers"
    for name in ("a b", *reserved.split()):
        refused_dim(f"context {name!r}: the name is reserved, or no identifier", name=name)


def test_actions_are_multiplied_then_swapped_then_clipped():
    """What three actuators get of one action, in the docstring's example of a new environment."""
    example = aib_envs.__doc__.split("register it:")[1].split("`python")[0]
    exec(textwrap.dedent(example), {"__name__": __name__})
    spec = aib_envs.ENVS["sliders"]
    dims = *spec.context, SWAP, ACTION_FACTOR, aib_envs.SIGN_X, aib_envs.SIGN_Y
    register("three", spec.cls, dims, 50)
    contexts = [
        {"sign_y": -1, "sign_z": -1},
        {"swap": 1, "sign_x": -1},
        {"action_factor": -5, "sign_x": -1},
    ]
    envs = VectorEnv("three", contexts, seed=0)
    s = envs.reset()
    after, *_ = envs.step([[0.1, 0.2, 0.3]] * 3)
    pushes = [[0.1, -0.2, -0.3], [0.2, -0.1, 0.3], [0.5, -1.0, -1.0]]
    assert_allclose((after - s) / 0.05, pushes, atol=1e-5)


MODULE = """
import aib_envs
class Mine(aib_envs.DoubleIntegrator):
    pass
aib_envs.register("mine", Mine, [aib_envs.MASS], 50)
"""


def test_an_id_belongs_to_its_module(tmp_path, monkeypatch):
    """Found in the current folder; another class under the same id is refused, in one line."""
    (tmp_path / "mod_a.py").write_text(MODULE)
    (tmp_path / "mod_b.py").write_text(MODULE)
    (tmp_path / "mod_table.py").write_text(MODULE.replace('"mine"', '"di_inv"'))
    (tmp_path / "mod_exit.py").write_text("import sys; sys.exit(0)")
    monkeypatch.chdir(tmp_path)
    make("mod_a:mine")
    for _ in range(2):
        with refused("'mine': belongs to Mine of the module mod_a"):
            make("mod_b:mine")
    assert type(make("mine").task).__module__ == "mod_a"
    with refused("'di_inv': belongs to DoubleIntegrator of the module aib_envs"):
        make("mod_table:di_inv")
    with refused("di_inv belongs to the module aib_envs"):
        make("mod_a:di_inv")
    with refused("mod_exit ends the program while it is imported", ImportError):
        make("mod_exit:mine")
    with refused("mod_c", ModuleNotFoundError):
        make("mod_c:mine")


def test_an_environment_of_a_module_lives_in_a_spawned_worker(tmp_path, monkeypatch):
    """The worker has only the spec, and finds the module by it."""
    (tmp_path / "mod_spawn.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    env = make("mod_spawn:mine", mass=0.7)
    assert gymnasium.spec("aib/mine-v0").kwargs == {"env_id": "mod_spawn:mine"}
    calls = [functools.partial(gymnasium.make, env.spec)]
    worker = gymnasium.vector.AsyncVectorEnv(calls, context="spawn")
    env.reset(seed=0)
    worker.reset(seed=0)
    action = np.float32([0.3, -0.3])
    assert_same(worker.step(action[None])[0][0], env.step(action)[0])
    worker.close()


def test_any_environment_of_gymnasium_has_hidden_actuators():
    env_id = "gymnasium:Pendulum-v1"
    spec = aib_envs.lookup(env_id)
    assert (spec.K, spec.steps, spec.horizon) == (24, 100_000, 200)
    env = started(env_id, 7, actuator_strength=0.5)
    plain = gymnasium.make("Pendulum-v1")
    seed = np.random.default_rng(7).integers(2**31)
    plain.reset(seed=int(seed))
    for factor, action in ((1, 0.6), (-1, 0.8), (-1, 2.0)):
        env.set_context(action_factor=factor)
        s2, r, *_ = env.step([action])
        # Half of the largest torque, which is 2.
        expected, reward, *_ = plain.step(np.float32([factor * min(action, 1)]))
        assert_allclose([*s2, r], [*expected, reward], rtol=1e-5, atol=1e-6)
    envs = VectorEnv(env_id, [{}, {"action_factor": -1}], seed=0)
    envs.rngs = [np.random.default_rng(7) for _ in range(2)]
    envs.reset()
    first, second = envs.step([[0.5], [-0.5]])[0]
    assert_same(first, second)


def test_an_environment_of_gymnasium_ends_by_its_horizon_alone():
    """A reset unasked for would be stored as dynamics."""

    def ending():
        return gymnasium.wrappers.TimeLimit(gymnasium.make("Pendulum-v1"), 5)

    def whole():
        space = gymnasium.spaces.Box(-2, 2, (1,), np.int64)
        return gymnasium.wrappers.TransformAction(gymnasium.make("Pendulum-v1"), None, space)

    gymnasium.register("Ending-v0", ending, max_episode_steps=20)
    gymnasium.register("Whole-v0", whole, max_episode_steps=20)
    with refused("gymnasium:Ending-v0 ends its own episodes", BadEnvironment):
        make("gymnasium:Ending-v0")
    for env_id in ("gymnasium:Whole-v0", "gymnasium:CartPole-v1"):
        with refused(f"{env_id}: must have Boxes of one axis as spaces", BadEnvironment):
            make(env_id)
    env = started("gymnasium:Pendulum-v1", horizon=250)
    truncated = [env.step([0.5])[3] for _ in range(250)]
    assert truncated == [False] * 249 + [True]


def test_a_missing_library_of_gymnasium_s_is_named(monkeypatch):
    """None in sys.modules is how Python marks a module that must not be found."""
    aib_envs.gymnasium_spec.cache_clear()
    for name in list(sys.modules):
        if name.startswith(("gymnasium.envs.mujoco", "imageio")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "imageio", None)
    with refused("(pip install imageio)", BadEnvironment) as error:
        make("gymnasium:Hopper-v5")
    assert str(error.value).startswith("gymnasium:Hopper-v5: ")
    monkeypatch.setattr(sys, "path", [])
    aib_envs.lookup("di_inv")
    assert sys.path == []
    with refused("gymnasium:nowhere:X-v0: ", BadEnvironment) as error:
        make("gymnasium:nowhere:X-v0")
    assert sys.path == [""]  # The module was looked for in the current folder, too.
    assert "pip install" not in str(error.value)


def test_terminal_states_of_gymnasium_s_mujoco_tasks_are_told():
    pytest.importorskip("imageio", reason="Gymnasium's MuJoCo tasks do not load without it")
    with refused("InvertedPendulum-v5 ends its own episodes", BadEnvironment):
        make("gymnasium:InvertedPendulum-v5")
