"""Tests of aib_envs.py: each compares with something computed another way (an oracle)."""

import copy
import functools
import itertools
import math
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
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
    DoubleIntegrator,
    RandomContext,
    VectorEnv,
    context_sets,
    make,
)

HERE = Path(__file__).parents[1]
# ode_3 ... ode_19 differ from their neighbours in the number of coefficients only.
IDS = [env_id for env_id in aib_envs.ENVS if env_id not in {f"ode_{k}" for k in range(3, 20)}]
each_environment = pytest.mark.parametrize("env_id", IDS)
ResetNeeded = gymnasium.error.ResetNeeded


def started(env_id, seed=0, **options):
    env = make(env_id, **options)
    env.reset(seed=seed)
    return env


def make_vec(env_id, num_envs, **options):
    return gymnasium.make_vec(f"aib_envs:aib/{env_id}-v0", num_envs=num_envs, **options)


def sync_vec(env_id, contexts, **options):
    """Gymnasium's own vector environment of single environments, one per context."""
    calls = [
        functools.partial(gymnasium.make, f"aib/{env_id}-v0", **c, **options) for c in contexts
    ]
    return gymnasium.vector.SyncVectorEnv(calls)


def dims_of(env_id):
    return aib_envs.ENVS[env_id].context


def default_of(env_id):
    return {dim.name: dim.default for dim in dims_of(env_id)}


def target_of(task, i=0):
    """The option that gives a reset the reacher's target, where there is one."""
    return {"target": task.target[i].copy()} if task.target_size else {}


@pytest.fixture
def registered(monkeypatch):
    """What a test registers or imports is forgotten after it."""
    monkeypatch.setattr(aib_envs, "ENVS", dict(aib_envs.ENVS))
    registry = gymnasium.envs.registration.registry.copy()
    monkeypatch.setattr(gymnasium.envs.registration, "registry", registry)
    monkeypatch.setattr(gymnasium, "registry", registry)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("mod_"):
            del sys.modules[name]


# --------------------------------------------------------------------------------------------------
# Dynamics: by hand, recorded, and against the reference environments
# --------------------------------------------------------------------------------------------------


def one_step(env, state, action):
    env.reset(seed=0, options={"state": np.array(state)})
    s2, r, terminated, _, _ = env.step(np.array(action))
    assert not terminated and s2.dtype == np.float32
    return s2, r


def test_double_integrator_by_hand():
    env = make("di_inv", mass=0.5, action_factor=-1)
    s2, r = one_step(env, [0.5, -0.2, 0.3, -0.4], [0.6, -1.0])
    # p + .1 v with the old v; v + .1 * clip(-a) / .5
    assert_allclose(s2, [0.53, -0.24, 0.3 - 0.12, -0.4 + 0.2], rtol=1e-6)
    assert r == 0.0
    s2, r = one_step(env, [0.1, 0.0, -0.5, 0.99], [0.0, -1.0])
    assert_allclose(s2, [0.05, 0.099, -0.5, 1.0], rtol=1e-6)  # v is clipped at 1
    assert r == 0.0  # at distance .111
    assert one_step(env, [0.1, 0.0, -0.5, 0.0], [0.0, 0.0])[1] == 1.0
    s2, _ = one_step(env, [0.99, -0.99, 1.0, -1.0], [0.0, 0.0])
    assert s2[:2].tolist() == [1.0, -1.0]  # p is clipped too


def test_ode_by_hand():
    env = make("ode", c0=2.0, c1=-3.0)
    s2, r = one_step(env, [0.4], [0.5, -0.25])
    # Re(2 a - 3 a^2), a = .5 - .25i: 2 * .5 - 3 * (.25 - .0625) = .4375
    assert_allclose(s2, [0.4 + 0.004375], rtol=1e-6)
    assert r == 0.25
    tiers = {0.04: 1, 0.06: 1 / 2, 0.15: 1 / 3, 0.3: 1 / 4, 1.5: 0.05, 2.5: 0, -0.04: 1, -19.9: 0}
    for x, reward in tiers.items():
        assert one_step(env, [x], [0.0, 0.0])[1] == reward
    assert one_step(make("ode", c0=10.0), [19.99], [1.0, 0.0])[0] == [20.0]


# length, action_factor; state; action; next observation; reward: from the reference environment
CARTPOLE_STEPS = """
.3 -1  .020060623 -.226369539 -.114903159 -.458260721   .365500637
    .018741977 .973478326 -.228779257 -.148820475 -.43272457  .952068559
.3 -1  -.38143505 .92491718 -.895787365 4.749734228   -.893602041
    -.389967147 .56302201 .826441901 -.810602711 4.820853938  .351581873
.1 -1  .133016017 -.795044588 1.014104593 -9.114582302   -1
    .143607365 .629184744 -.777255787 1.103803398 -9.933346505  .323950889
.1 -1  .439941131 -3.914023887 1.382655654 -16.387327954   1
    .453406753 -.593346556 .804947119 1.310937102 -16.221964448  .076792189
2 1  .144087194 -.018832602 .699281212 -.262551213   -.901999884
    .150640935 .999773199 -.02129673 .611470225 -.230612856  .829719708
2 1  .157871009 -.029442524 .842420106 -.304411392   .162232598
    .166375333 .999471206 -.032516269 .858448261 -.311503998  .982223626
"""


def test_cartpole_reproduces_recorded_steps():
    for row in np.array(CARTPOLE_STEPS.split(), float).reshape(6, 13):
        env = make("cartpole_inv", length=row[0], action_factor=row[1])
        ours, r = one_step(env, row[2:6], row[6:7])
        assert_allclose([*ours, r], row[7:], atol=1e-6)


def scale(element, attribute, *factors):
    values = [float(value) * by for value, by in zip(element.get(attribute).split(), factors)]
    element.set(attribute, " ".join(map(repr, values)))


def edit_cartpole(root, length, action_factor):
    scale(root.find(".//default[@class='pole']/geom"), "fromto", 0, 0, 0, 0, 0, 2 * length)


def edit_reacher(root, length, **actuators):
    for name in ("arm", "hand"):
        scale(root.find(f".//geom[@name='{name}']"), "fromto", 1, 1, 1, length, 1, 1)
    for name in ("hand", "finger"):
        scale(root.find(f".//body[@name='{name}']"), "pos", length, 1, 1)


def edit_cheetah(root, length, action_factor):
    for name in ("bthigh", "bshin", "bfoot", "fthigh", "fshin", "ffoot"):
        scale(root.find(f".//geom[@name='{name}']"), "pos", length, 1, length)
        scale(root.find(f".//geom[@name='{name}']"), "size", 1, length)
    for name in ("bshin", "bfoot", "fshin", "ffoot"):
        scale(root.find(f".//body[@name='{name}']"), "pos", length, 1, length)


def edit_ball_in_cup(root, gravity, distance):
    ElementTree.SubElement(root, "option", gravity=f"0 0 {-gravity!r}")
    root.find(".//spatial[@name='string']").set("range", f"0 {distance!r}")
    root.find(".//body[@name='ball']").set("pos", f"0 0 {0.2 + 0.3 - distance!r}")


def edit_walker(root, gravity, actuator_strength):
    root.find("./option").set("gravity", f"0 0 {-gravity!r}")
    for motor in root.findall("./actuator/motor"):
        scale(motor, "gear", actuator_strength)


# id: (dm_control module, task class and its arguments, substeps, edit of the XML)
DM_CONTROL = {
    "cartpole_inv": ("cartpole", "Balance", dict(swing_up=False, sparse=False), 1, edit_cartpole),
    "reacher_easy_inv": ("reacher", "Reacher", dict(target_size=0.05), 1, edit_reacher),
    "reacher_hard_inv": ("reacher", "Reacher", dict(target_size=0.015), 1, edit_reacher),
    "reacher_hard_perm": ("reacher", "Reacher", dict(target_size=0.015), 1, edit_reacher),
    "cheetah_inv": ("cheetah", "Cheetah", {}, 1, edit_cheetah),
    "ball_in_cup": ("ball_in_cup", "BallInCup", {}, 10, edit_ball_in_cup),
    "walker": ("walker", "PlanarWalker", dict(move_speed=1), 10, edit_walker),
}
GYMNASIUM = {"walker_gym": "Walker2d-v5", "hopper_gym": "Hopper-v5"}
ORACLES = [*DM_CONTROL, *GYMNASIUM]


class DmControl:
    """A dm_control task, one context."""

    def __init__(self, env_id, context):
        module, task, arguments, self.substeps, edit = DM_CONTROL[env_id]
        reason = "dm_control, the oracle, is not installed"
        module = pytest.importorskip(f"dm_control.suite.{module}", reason=reason)
        xml, assets = module.get_model_and_assets()
        root = ElementTree.fromstring(xml)
        edit(root, **context)
        self.physics = module.Physics.from_xml_string(ElementTree.tostring(root), assets)
        self.task = getattr(module, task)(random=0, **arguments)
        self.context = context
        self.reset()

    def reset(self):
        with self.physics.reset_context():
            self.task.initialize_episode(self.physics)
        return self.state()

    def state(self):
        return self.physics.get_state().copy()

    def set_state(self, state, target=None):
        if target is not None:
            self.physics.named.model.geom_pos["target", ["x", "y"]] = target
        with self.physics.reset_context():
            self.physics.set_state(state)

    def step(self, action):
        action = action * self.context.get("action_factor", 1)
        if self.context.get("swap"):
            action = action[::-1]
        self.task.before_step(action, self.physics)
        self.physics.step(self.substeps)
        parts = self.task.get_observation(self.physics)
        order = ("height", "orientations", "velocity") if "orientations" in parts else parts
        observation = np.concatenate([np.ravel(parts[name]) for name in order])
        return observation, self.task.get_reward(self.physics)


class GymnasiumOwn:
    """A locomotion environment of Gymnasium, one context."""

    def __init__(self, env_id, context):
        pytest.importorskip("imageio", reason="Gymnasium's MuJoCo tasks do not load without it")
        self.env = gymnasium.make(GYMNASIUM[env_id], terminate_when_unhealthy=False).unwrapped
        self.env.model.opt.gravity[2] = -context["gravity"]
        self.env.model.actuator_gear[:] *= context["actuator_strength"]
        self.env.reset(seed=0)

    def reset(self):
        self.env.reset()
        return self.state()

    def state(self):
        return np.concatenate([self.env.data.qpos, self.env.data.qvel])

    def set_state(self, state, target=None):
        self.env.reset()
        self.env.set_state(state[: self.env.model.nq], state[self.env.model.nq :])

    def step(self, action):
        return self.env.step(action)[:2]


def oracle(env_id, context):
    kind = DmControl if env_id in DM_CONTROL else GymnasiumOwn
    return kind(env_id, context)


@pytest.mark.parametrize("env_id", ORACLES)
def test_steps_equal_the_reference(env_id, steps=40):
    """Single steps from states along random episodes: in the default context, and in every
    combination of the ends of train and extrapolation range."""
    ends = [dim.train + (dim.extrapolation or ()) for dim in dims_of(env_id)]
    contexts = [dict(zip(default_of(env_id), values)) for values in itertools.product(*ends)]
    for i, context in enumerate([default_of(env_id), *contexts]):
        rng = np.random.default_rng(i)
        env, reference = started(env_id, i, **context), oracle(env_id, context)
        task = env.task
        for k in range(steps):
            if k % 20 == 10:  # far from where an episode leads
                noise = 0.1 * rng.normal(size=task.state_size)
                env.reset(options={"state": env.state() + noise})
            action = rng.uniform(-1, 1, task.d_a)
            if k % 3 == 0:
                action = rng.choice([-1.0, 1.0], task.d_a)
            start = {"state": env.state()} | target_of(task)
            env.reset(options=start)
            reference.set_state(**start)
            _, r, *_ = env.step(action)
            s2, r2 = reference.step(action)
            assert_allclose(env.task.observation()[0], s2, rtol=0, atol=1e-6)
            assert_allclose(env.state(), reference.state(), rtol=0, atol=1e-6)
            assert abs(r - r2) < 1e-6


@pytest.mark.parametrize("env_id", ORACLES)
def test_resets_are_distributed_as_in_the_reference(env_id, n=2000):
    """The Kolmogorov-Smirnov distance in each dimension of the state, and the support."""
    env, reference = started(env_id), oracle(env_id, default_of(env_id))
    ours, theirs = np.empty((2, n, env.task.state_size))
    for i in range(n):
        env.reset()
        ours[i] = env.state()
        theirs[i] = reference.reset()
    for x, y in zip(ours.T, theirs.T):
        grid = np.concatenate([x, y])
        counts = [np.searchsorted(np.sort(values), grid, "right") for values in (x, y)]
        distance = np.abs(counts[0] - counts[1]).max() / n
        assert distance < 1.95 * math.sqrt(2 / n)  # one in a thousand exceeds this by chance
        margin = 0.15 * np.ptp(y) + 1e-9
        assert x.min() > y.min() - margin and x.max() < y.max() + margin


def test_reacher_targets_lie_on_a_ring():
    env = started("reacher_easy_inv")
    targets = []
    for _ in range(2000):
        env.reset()
        targets.append(env.task.target[0].copy())
    radii = np.hypot(*np.transpose(targets))
    assert radii.min() >= 0.05 and radii.max() <= 0.2 and abs(np.median(radii) - 0.125) < 0.005
    assert np.abs(np.mean(targets, axis=0)).max() < 0.01


@each_environment
def test_every_context_dimension_changes_a_trajectory(env_id):
    def trajectory(**context):
        env, rng = started(env_id, 3, **context), np.random.default_rng(0)
        return np.array([env.step(rng.uniform(-1, 1, env.task.d_a))[0] for _ in range(30)])

    default = trajectory()
    for dim in dims_of(env_id):
        other = dim.train[0] if dim.train[0] != dim.default else dim.train[1]
        assert np.abs(trajectory(**{dim.name: other}) - default).max() > 1e-3, dim.name
        assert_array_equal(trajectory(**{dim.name: dim.default}), default)


INVERTED = {
    ("di_inv", "action_factor", -1): lambda action: -action,
    ("cheetah_inv", "action_factor", -1): lambda action: -action,
    ("di_perm", "swap", 1): lambda action: action[::-1],
    ("reacher_hard_perm", "swap", 1): lambda action: action[::-1],
    ("di_signs", "sign_x", -1): lambda action: action * [-1, 1],
    ("di_signs", "sign_y", -1): lambda action: action * [1, -1],
}


def test_inversion_and_permutation_by_context():
    """A flipped or swapped actuator does what the flipped or swapped action does without it."""
    rng = np.random.default_rng(0)
    for (env_id, name, value), same in INVERTED.items():
        plain, changed = started(env_id), started(env_id, **{name: value})
        for _ in range(10):
            action = rng.uniform(-1, 1, plain.task.d_a)
            assert_array_equal(plain.step(action)[0], changed.step(same(action))[0])


@each_environment
def test_actions_are_clipped_everywhere(env_id):
    """An actuator gets at most 1, whatever the agent sends."""
    context = context_sets(env_id)["train"][3]
    env, twin = started(env_id, **context), started(env_id, **context)
    action = np.array([50, -3, 0.5, 1.5, -1.01, 7])[: env.task.d_a]
    for _ in range(3):
        assert data_equivalence(env.step(action), twin.step(action.clip(-1, 1)), exact=True)


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_simulation_that_diverges_shows_it(tmp_path, monkeypatch):
    """MuJoCo by itself would start anew, and the observation would look right."""
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log there.
    env = started("cartpole_inv")
    env.reset(options={"state": [0, 0, 1e200, 1e200]})
    assert not np.abs(env.step([0])[0]).max() < 1e6


# --------------------------------------------------------------------------------------------------
# Contexts and the table
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", aib_envs.ENVS)
def test_context_sets(env_id):
    sets = context_sets(env_id)
    assert list(sets) == ["train", "eval_in", "eval_out"] and sets == context_sets(env_id)
    seen = [tuple(context.values()) for contexts in sets.values() for context in contexts]
    assert len(seen) == len(set(seen)) == 60  # pairwise disjoint, no repetition
    for dim in dims_of(env_id):
        values = [np.array([context[dim.name] for context in sets[name]]) for name in sets]
        if dim.binary:
            for v in values:
                assert set(v) == set(dim.train) and abs(np.mean(v == dim.train[0]) - 0.5) <= 0.1
            continue
        (low, high), (lowest, highest) = dim.train, dim.extrapolation
        margin = 0.01 * (high - low) - 1e-9
        train, inside, out = values
        assert train.min() >= low and train.max() <= high
        assert inside.min() >= low + margin and inside.max() <= high - margin
        assert ((out <= low - margin) | (out >= high + margin)).all()
        assert out.min() >= lowest - 1e-9 and out.max() <= highest + 1e-9
        assert (out < low).any() and (out > high).any()


def mesh(env_id, which):
    """All contexts of a set in up to two dimensions, sorted."""
    values = []
    for dim in dims_of(env_id):
        (low, high), (lowest, highest) = dim.train, dim.extrapolation or dim.train
        margin = 0.01 * (high - low)
        if dim.binary:
            values.append(dim.train)
        elif which == "eval_out":
            below = [lowest + i * (low - margin - lowest) / 24 for i in range(25)]
            above = [high + margin + i * (highest - high - margin) / 24 for i in range(25)]
            values.append(below + above)
        else:
            if which == "eval_in":
                low, high = low + margin, high - margin
            values.append([low + i * (high - low) / 49 for i in range(50)])
    return list(itertools.product(*values))


FLAT = [env_id for env_id in aib_envs.ENVS if len(dims_of(env_id)) <= 2]
BINARY = [env_id for env_id in FLAT if any(dim.binary for dim in dims_of(env_id))]


@pytest.mark.parametrize("env_id", FLAT)
def test_twenty_contexts_are_the_published_ones(env_id):
    """Evenly spaced entries of the sorted mesh, rounded down. So are other numbers where no
    dimension is binary."""
    for n in [20] if env_id in BINARY else [1, 3, 7, 20, 33]:
        for which, contexts in context_sets(env_id, n).items():
            entries = mesh(env_id, which)
            for i, context in enumerate(contexts):
                expected = entries[i * (len(entries) - 1) // max(1, n - 1)]
                assert tuple(context.values()) == pytest.approx(expected, rel=1e-12)
                assert list(context) == list(default_of(env_id))


@pytest.mark.parametrize("env_id", BINARY)
def test_both_values_of_a_binary_dimension_get_their_share(env_id):
    """Whatever the number of contexts; only the published 20 stand 11 to 9."""
    (dim,) = [dim for dim in dims_of(env_id) if dim.binary]
    meshes = {name: mesh(env_id, name) for name in ("train", "eval_in", "eval_out")}
    for n in (1, 2, 3, 4, 5, 7, 19, 20, 21, 25, 40, 50, 99, 100, 101, 120):
        distinct = []
        for name, contexts in context_sets(env_id, n).items():
            counts = [sum(c[dim.name] == value for c in contexts) for value in dim.train]
            assert sum(counts) == len(contexts) == n
            assert sorted(counts) == [9, 11] if n == 20 else abs(counts[0] - counts[1]) <= 1
            entries = {tuple(np.round(list(context.values()), 9)) for context in contexts}
            assert len(entries) == n or n > 100  # no repetition
            allowed = {tuple(np.round(entry, 9)) for entry in meshes[name]}
            assert entries <= allowed
            if n > 1:  # from one end of the mesh to the other
                ends = [next(iter(contexts[i].values())) for i in (0, -1)]
                assert ends == pytest.approx([min(allowed)[0], max(allowed)[0]])
            distinct += entries
        assert len(set(distinct)) == len(distinct)  # disjoint


def test_all_pairs_of_signs_get_their_share():
    """Five each of twenty; and masses from one end of the range to the other."""
    for n in (1, 4, 7, 20, 50, 200):
        for contexts in context_sets("di_signs", n).values():
            signs = [(context["sign_x"], context["sign_y"]) for context in contexts]
            counts = [signs.count(pair) for pair in itertools.product((-1, 1), repeat=2)]
            assert sum(counts) == n and max(counts) - min(counts) <= 1
            assert len({tuple(context.values()) for context in contexts}) == n
            masses = [context["mass"] for context in contexts]
            assert masses == sorted(masses) and (n == 1 or masses[-1] - masses[0] > 0.9)


def test_binary_values_take_turns_in_any_environment(registered):
    """Alone, before a continuous dimension, and beside so many that contexts are drawn."""
    continuous = [ContextDim(f"c{i}", 0.0, (-1.0, 1.0), (-2.0, 2.0)) for i in range(3)]
    for env_id, dims in {"alone": [], "first": [MASS], "drawn": continuous}.items():
        aib_envs.register(env_id, Slider, [ACTION_FACTOR, *dims], 50)
        for n in (1, 4, 5, 19, *([20] if env_id != "first" else [])):
            for contexts in context_sets(env_id, n).values():
                assert list(contexts[0]) == ["action_factor", *(dim.name for dim in dims)]
                turns = [context["action_factor"] for context in contexts]
                assert turns == [(-1.0, 1.0)[i % 2] for i in range(n)]


def test_window_and_gradient_steps_of_the_paper():
    for env_id, spec in aib_envs.ENVS.items():
        K, steps = 128, 200_000
        if env_id.startswith(("di_", "ode")):
            K, steps = 24, 100_000
        elif env_id == "cartpole_inv":
            steps = 100_000
        elif env_id.endswith("_gym"):
            steps = 500_000
        assert (spec.K, spec.steps) == (K, steps)


def test_the_table_in_the_docstring_is_true_and_printed():
    command = [sys.executable, HERE / "aib_envs.py"]
    printed = subprocess.run(command, capture_output=True, text=True).stdout
    assert printed == aib_envs.__doc__ + "\n"
    lines = [line.split() for line in printed.splitlines()]
    first_in = {}
    for env_id, spec in aib_envs.ENVS.items():
        if env_id.startswith("ode_"):
            continue
        row = f"{env_id} {', '.join(default_of(env_id))} {spec.horizon} {spec.kind} {spec.K}"
        expected = f"{row} {spec.steps} {spec.paper_name}".split()
        assert [line for line in lines if line[:1] == [env_id]] == [expected]
        for dim in spec.context:
            first_in.setdefault(dim, env_id)
    for dim, env_id in first_in.items():
        row = f"{dim.name} {env_id} {dim.default} {dim.train} {dim.extrapolation}".split()
        assert any(line[: len(row)] == row for line in lines)


def test_a_reader_that_stops_early_sees_no_traceback():
    """As `python aib_envs.py | head -1`, where the reader has gone before the table comes."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, HERE / "aib_envs.py"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.stderr == b""


# --------------------------------------------------------------------------------------------------
# The single and the vector environment
# --------------------------------------------------------------------------------------------------


@each_environment
def test_environment_conventions(env_id):
    spec, env = aib_envs.ENVS[env_id], make(env_id)
    s, info = env.reset(seed=1)
    assert info["context"] == default_of(env_id)
    first = s.copy()
    env.action_space.seed(0)
    for t in range(1, spec.horizon + 1):
        s2, r, terminated, truncated, info = env.step(env.action_space.sample())
        assert env.observation_space.contains(s2) and np.isfinite(r)
        assert env_id.endswith("gym") or 0 <= r <= 1
        assert not terminated and truncated == (t == spec.horizon)
    assert np.array_equal(s, first)  # an observation handed out is never written to again
    assert np.array_equal(env.reset(seed=1)[0], first)
    assert not np.array_equal(env.reset()[0], first)
    info["context"].clear()
    assert env.context


BOUNDS = {
    "di_inv": [1] * 4,
    "ode": [20],
    "cartpole_inv": [np.inf, 1, 1, np.inf, np.inf],
    "cheetah_inv": [np.inf] * 17,
    "reacher_hard_inv": [np.inf] * 6,
    "ball_in_cup": [np.inf] * 8,
    "walker": [np.inf] + [1] * 14 + [np.inf] * 9,
    "walker_gym": [np.inf] * 8 + [10] * 9,
    "hopper_gym": [np.inf] * 5 + [10] * 6,
    "gymnasium:Pendulum-v1": [1, 1, 8],
}


@pytest.mark.parametrize("env_id", BOUNDS)
def test_bounds_of_observations_are_true(env_id):
    """Those of the physics, else infinite: wild states of large velocities stay inside them."""
    space, rng = make(env_id).observation_space, np.random.default_rng(0)
    assert_array_equal(space.high, np.float32(BOUNDS[env_id]))
    assert_array_equal(space.low, -space.high)
    told = AddContext(make(env_id)).observation_space
    assert np.isfinite(space.sample()).all() and np.isinf(told.high[len(space.high) :]).all()
    env = started(env_id)
    for _ in range(20):
        if env.task.state_size:
            env.reset(options={"state": 8 * rng.normal(size=env.task.state_size)})
        assert env.step(rng.uniform(-1, 1, env.task.d_a))[0] in space


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@each_environment
def test_vector_env_equals_single_environments(env_id, dtype):
    """Same contexts and states, same steps, bit for bit, whatever the type of the actions."""
    contexts = context_sets(env_id, n=4)["eval_out"]
    envs = VectorEnv(env_id, contexts, seed=0)
    envs.reset()
    singles = [make(env_id, **context) for context in contexts]
    for i, single in enumerate(singles):
        single.reset(options={"state": envs.task.state()[i]} | target_of(envs.task, i))
    rng = np.random.default_rng(0)
    for _ in range(20):
        actions = rng.uniform(-1, 1, (4, envs.d_a)).astype(dtype)
        s2, r, done = envs.step(actions)
        assert s2.dtype == r.dtype == np.float32 and not done
        for i, single in enumerate(singles):
            ours, reward, *_ = single.step(actions[i])
            assert_array_equal(s2[i], ours)
            assert np.float32(reward) == r[i]


def test_vector_env_tells_the_contexts_in_the_order_of_the_table():
    """Raw, with the defaults of what is not named: (N, d_c)."""
    contexts = [{"action_factor": -1, "length": 0.7}, {}, {"action_factor": -1}]
    c = VectorEnv("cartpole_inv", contexts, seed=0).c
    assert c.dtype == np.float32
    assert_array_equal(c, np.float32([[0.7, -1], [0.5, 1], [0.5, -1]]))
    assert VectorEnv("ode_20", [{"c19": 3}] * 2, seed=0).c.shape == (2, 20)


@pytest.mark.parametrize("steps", [None, 0, 7])
def test_vector_env_goes_on_from_a_saved_state(steps):
    """Also from before its first reset."""

    def play(envs):
        seen = []
        if steps is not None:
            seen = [envs.step(push)[0] for _ in range(5)]
        return [*seen, envs.reset(), envs.step(push)[0]]

    contexts, push = [{}, {"length": 0.8}], np.full((2, 1), 0.3)
    envs, other = (VectorEnv("cartpole_inv", contexts, seed=seed) for seed in (3, 4))
    if steps is not None:
        envs.reset()
        for _ in range(steps):
            envs.step(-push)
    state = envs.state_dict()
    other.load_state_dict(state)
    assert_array_equal(play(other), play(envs))
    assert envs.t == other.t == 1
    with pytest.raises(ValueError, match="a state of 2 instances: must be of 3"):
        VectorEnv("cartpole_inv", [{}] * 3, seed=0).load_state_dict(state)


@each_environment
def test_context_switches_keep_the_state_or_rebuild(env_id):
    """set_context goes on from the same state as a fresh environment of that context; reset
    rebuilds."""
    new = context_sets(env_id, n=2)["eval_out"][1]
    env, fresh = started(env_id), make(env_id, **new)
    action = np.full(env.task.d_a, 0.5)
    for _ in range(5):
        env.step(action)
    state, t = env.state(), env.envs.t
    env.set_context(**new)
    assert env.context == fresh.context and env.envs.t == t
    assert_array_equal(env.state(), state)
    fresh.reset(options={"state": state} | target_of(env.task))
    assert_array_equal(env.step(action)[0], fresh.step(action)[0])

    again = make(env_id)
    first, info = again.reset(seed=7, options={"context": new})
    assert info["context"] == fresh.context
    assert_array_equal(first, fresh.reset(seed=7)[0])
    back, _ = again.reset(seed=7, options={"context": default_of(env_id)})
    assert_array_equal(back, make(env_id).reset(seed=7)[0])


def test_a_task_in_other_contexts_leaves_the_first_one_alone():
    task = VectorEnv("reacher_easy_inv", [{}, {}], seed=0).task
    task.reset([np.random.default_rng(0)] * 2)
    target = task.target.copy()
    other = task.with_contexts(task.contexts)
    other.reset([np.random.default_rng(1)] * 2)
    assert np.array_equal(task.target, target) and not np.array_equal(other.target, target)


@each_environment
def test_observations_vary_and_pictures_are_drawn(env_id):
    """No constant element, no shared memory, a picture that leaves the physics alone, and a film
    in real time."""
    context = context_sets(env_id)["train"][6]
    env = gymnasium.make(f"aib/{env_id}-v0", render_mode="rgb_array", **context).unwrapped
    twin = started(env_id, 3, **context)
    assert twin.render() is None
    seen, pictures, rng = [env.reset(seed=3)[0]], [], np.random.default_rng(0)
    for t in range(61):
        action = rng.uniform(-1, 1, env.task.d_a)
        if t % 20 == 0:
            pictures.append(env.render())
        seen.append(env.step(action)[0])
        assert_array_equal(seen[-1], twin.step(action)[0])
    assert (np.ptp(seen, axis=0) > 0).all()
    assert not any(np.shares_memory(a, b) for a, b in zip(seen, seen[1:]))
    assert pictures[0].shape == (256, 256, 3) and pictures[0].dtype == np.uint8
    assert len(np.unique(pictures[0].reshape(-1, 3), axis=0)) > 1
    assert not np.array_equal(pictures[0], pictures[-1])
    seconds = 0.1 if "di" in env_id else 0.01
    if isinstance(env.task, aib_envs.MujocoTask):
        before = env.task.datas[0].time
        env.step(action)
        seconds = env.task.datas[0].time - before
    assert env.metadata["render_fps"] == pytest.approx(1 / seconds)


def test_a_picture_shows_lines_and_discs_where_they_are():
    """A pixel is coloured where its distance from the line is at most the radius."""
    start, end = np.array([-0.5, -0.2]), np.array([0.3, 0.6])
    view = aib_envs.View(np.array([0.1, 0.2]), 2.0)
    picture = aib_envs.draw(view, [aib_envs.Shape(start, end, 0.2, aib_envs.RED)], size=40)
    places = start + np.linspace(0, 1, 2001)[:, None] * (end - start)
    for row, column in itertools.product(range(40), repeat=2):
        point = view.centre + [(column + 0.5) / 20 - 1, 1 - (row + 0.5) / 20]
        inside = np.linalg.norm(places - point, axis=1).min() <= 0.2
        assert (tuple(picture[row, column]) == aib_envs.RED) == inside


COPIES = {"copy": copy.deepcopy, "pickle": lambda env: pickle.loads(pickle.dumps(env))}


@pytest.mark.parametrize("copied", COPIES)
@each_environment
def test_copies_go_on_like_the_original(env_id, copied):
    """A copy made before the first reset, after it or in mid-episode: bit for bit, and each by
    itself."""
    context = context_sets(env_id)["train"][3]
    single, vector = make(env_id, **context), VectorEnv(env_id, [context, {}], seed=1)
    single.np_random = np.random.default_rng(2)

    def play(env, actions):
        return [np.hstack([np.ravel(x) for x in env.step(action)[:2]]) for action in actions]

    def restart(env):
        return np.ravel(env.reset()[0])

    for env, shape in ((single, [vector.d_a]), (vector, [2, vector.d_a])):
        actions = np.random.default_rng(0).uniform(-1, 1, (7, *shape))
        copies = [COPIES[copied](env)]
        restart(env)
        copies.append(COPIES[copied](env))
        seen = play(env, actions[:4])
        copies.append(COPIES[copied](env))
        seen += [*play(env, actions[4:]), restart(env), *play(env, actions[:1])]
        restart(copies[0])
        for twin, begin in zip(copies, (0, 0, 4)):
            again = [*play(twin, actions[begin:]), restart(twin), *play(twin, actions[:1])]
            assert all(np.array_equal(x, y) for x, y in zip(seen[begin:], again, strict=True))


# --------------------------------------------------------------------------------------------------
# Bad values
# --------------------------------------------------------------------------------------------------

BAD_CONTEXTS = [
    ("cartpole_inv", "length", 0, "length=0: must be above 0"),
    ("di_inv", "mass", math.nan, "mass=nan: must be a finite number"),
    ("ode", "c0", "x", "c0='x': must be a finite number"),
    ("ode", "c0", True, "c0=True: must be a finite number"),
    ("ode", "c0", 10**400, "...: must be a finite number"),
    ("di_perm", "swap", 0.5, "swap=0.5: must be one of (0.0, 1.0)"),
    ("reacher_easy_inv", "length", -1, "length=-1: must be above 0"),
    ("ball_in_cup", "distance", 1.2, "distance=1.2: must be above 0 and below 0.9"),
    ("walker", "gravity", math.inf, "gravity=inf: must be a finite number"),
    ("cartpole_inv", "lenght", 1, "unexpected keyword argument 'lenght' (did you mean length?)"),
    ("di_inv", "render_mode", "human", "render_mode 'human': must be None or 'rgb_array'"),
    ("di_inv", "horizon", 0, "horizon=0: must be a whole number of at least 1"),
]
BAD_OPTIONS = [
    ({"stat": 1}, "unknown option 'stat' (did you mean state?)"),
    ({"target": [1, 2]}, "target [1, 2]: must be 0 finite numbers"),
    ({"state": [1, 2]}, "state [1, 2]: must be 1 finite numbers"),
    ({"state": [10**400]}, "must be 1 finite numbers"),
    ({"state": np.zeros(99)}, "...: must be 1 finite numbers"),
    (5, "options 5: must be a dict of values by name"),
    ({"context": None}, "context None: must be a dict of values by name"),
    ({"context": {"c9": 0}}, "'c9'"),
]


def permuted(env_id, order, bounds=None):
    env = make(env_id)
    if bounds:
        env = gymnasium.wrappers.RescaleAction(env, -np.float32(bounds), np.float32(bounds))
    return ActuatorPermutation(env, order)


def stacked():
    return gymnasium.wrappers.FrameStackObservation(make("ode"), 4)


def random_context(contexts):
    return RandomContext(make("cartpole_inv"), contexts)


def reset_vec(**options):
    return make_vec("di_inv", 2).reset(**options)


NO_LIST = "must be a list of at least one, or train, eval_in or eval_out"
BAD_CALLS = [
    (lambda: make("cartpole"), "unknown environment 'cartpole' (did you mean cartpole_inv?)"),
    (lambda: make([1]), "unknown environment '[1]'; known: di_inv, "),
    (lambda: context_sets("ode", 0), "n=0: must be a whole number of at least 1"),
    (lambda: context_sets("ode", 2.5), "n=2.5: must be a whole number of at least 1"),
    (lambda: make("di_inv").set_context(mass=-1), "mass=-1: must be above 0"),
    (lambda: VectorEnv("ode", [], seed=0), f"contexts []: {NO_LIST}"),
    (lambda: VectorEnv("ode", 5, seed=0), f"contexts 5: {NO_LIST}"),
    (lambda: VectorEnv("ode", [5], seed=0), "5: must be a dict of values by name"),
    (lambda: make_vec("di_inv", 2, contexts=[{}]), "num_envs=2: must be the number of contexts"),
    (lambda: reset_vec(seed=[1]), "seed [1]: must be a number, or 2 of them"),
    (lambda: reset_vec(options={"state": 1}), "unknown option 'state'; known: contexts"),
    (lambda: reset_vec(options={"contexts": [{}]}), "num_envs=2: must be the number of contexts"),
    (lambda: random_context("test"), f"contexts 'test': {NO_LIST}"),
    (lambda: random_context({"lenght": (0.3, 0.8)}), "did you mean length?"),
    (lambda: random_context({"length": (0.3, -0.8)}), "range of length (0.3, -0.8): must go up"),
    (lambda: random_context({"length": (0, 0.8)}), "length=0.0: must be above 0"),
    (lambda: random_context({"length": 0.5}), "range of length 0.5: must be 2 finite numbers"),
    (lambda: RandomContext(make("di_perm"), {"swap": (0, 1)}), "swap=0.5: must be one"),
    (lambda: ActuatorInversion(make("di_inv"), [1, 2, 3]), "signs [1, 2, 3]: must be"),
    (lambda: permuted("di_inv", [0, 0]), "order [0, 0]: must be a permutation of 0 ... 1"),
    (lambda: permuted("hopper_gym", [1, 0]), "order [1, 0]: must be a permutation of 0 ... 2"),
    (lambda: permuted("di_inv", [True, False]), "must be a permutation of 0 ... 1"),
    (lambda: permuted("di_inv", [[1, 0]]), "order [[1, 0]]: must be a permutation of 0 ... 1"),
    (lambda: permuted("di_inv", 1), "order 1: must be a permutation of 0 ... 1"),
    (lambda: permuted("di_inv", [1, 0], bounds=[1.0, 2.0]), "leave actuators with other bounds in"),
    (lambda: RandomContext(gymnasium.make("Pendulum-v1")), "an environment of aib_envs"),
    (lambda: AddContext(gymnasium.make("Pendulum-v1")), "an environment of aib_envs"),
    (lambda: AddContext(stacked()), "needs a key, as it has not one axis"),
    (lambda: make("gymnasium:CartPole-v1"), "CartPole-v1: must have Boxes of one axis as spaces"),
]
for values, text in BAD_OPTIONS:
    BAD_CALLS.append((lambda values=values: make("ode").reset(options=values), text))
for env_id, name, value, text in BAD_CONTEXTS:
    BAD_CALLS.append((lambda env_id=env_id, c={name: value}: make(env_id, **c), text))


@pytest.mark.parametrize("call, message", BAD_CALLS)
def test_bad_values_name_what_is_allowed(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_keyword_is_a_type_error_that_lists_the_contexts():
    """As Python's convention and other people's libraries expect; a bad value is none."""
    calls = [
        lambda **x: make("cartpole_inv", **x),
        lambda **x: gymnasium.make("aib_envs:aib/cartpole_inv-v0", **x),
        lambda **x: make_vec("cartpole_inv", 2, **x),
        lambda **x: started("cartpole_inv").set_context(**x),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="unexpected keyword argument 'frameskip'") as error:
            call(frameskip=1)
        assert "length, action_factor" in str(error.value)
        with pytest.raises(ValueError, match="length=-1") as error:
            call(length=-1)
        assert not isinstance(error.value, TypeError)


def test_step_before_reset_is_told():
    calls = [
        lambda env: env.step(np.zeros(2)),
        lambda env: env.set_context(mass=1),
        lambda env: env.state(),
        lambda env: env.render(),
    ]
    for call in calls:
        with pytest.raises(ResetNeeded, match="call reset"):
            call(make("di_inv"))
    for envs in (VectorEnv("di_inv", [{}, {}], seed=0), make_vec("di_inv", 2)):
        with pytest.raises(ResetNeeded, match="call reset"):
            envs.step(np.zeros((2, 2)))


@each_environment
def test_bad_actions_leave_the_environment_unharmed(env_id):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    env, twin = started(env_id), started(env_id)
    vector = VectorEnv(env_id, [{}], seed=0)
    vector.reset()
    d_a = env.task.d_a
    with_gradient = torch.zeros(d_a, requires_grad=True)
    wrong = [np.zeros(d_a + 1), "left", None, np.full(d_a, np.nan), [np.inf] * d_a, with_gradient]
    for bad in (*wrong, [object()] * d_a):
        with pytest.raises(ValueError, match="finite numbers$"):
            env.step(bad)
        with pytest.raises(ValueError, match="finite numbers$"):
            vector.step([bad])
    good = np.full(d_a, 0.5)
    for same in (good.tolist(), torch.tensor(good), np.array(list(good), dtype=object)):
        assert_array_equal(env.step(same)[0], twin.step(good)[0])
    vector.step([good.tolist()])


@pytest.mark.parametrize("env_id", ["cartpole_inv", "reacher_easy_inv"])
@pytest.mark.parametrize("length", [1e-9, 1e300])
def test_a_context_that_cannot_be_built_changes_nothing(env_id, length):
    env, twin = started(env_id), started(env_id)
    bad = {"length": length}
    calls = [
        lambda: make(env_id, **bad),
        lambda: env.set_context(**bad),
        lambda: env.reset(seed=5, options={"context": bad}),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^contexts \[\{'length': .*\}\]: .*$") as error:
            call()
        assert "\n" not in str(error.value)
    assert env.context == twin.context
    action = [0.5] * env.task.d_a
    for _ in range(3):
        assert_array_equal(env.step(action)[0], twin.step(action)[0])
    assert_array_equal(env.reset()[0], twin.reset()[0])


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


def test_gymnasium_make_and_make_vec():
    env = gymnasium.make("aib_envs:aib/cartpole_inv-v0", length=0.7, action_factor=-1)
    assert env.reset(seed=0)[1]["context"] == {"length": 0.7, "action_factor": -1.0}
    envs = make_vec("di_inv", 3, vectorization_mode="sync", mass=0.5)
    assert envs.reset(seed=0)[0].shape == (3, 4)
    assert envs.step(envs.action_space.sample())[0].shape == (3, 4)


@each_environment
def test_the_horizon_is_gymnasium_s(env_id):
    name, horizon = f"aib/{env_id}-v0", aib_envs.ENVS[env_id].horizon
    assert gymnasium.spec(name).max_episode_steps == horizon
    for env in (gymnasium.make(name), make(env_id)):
        timed = gymnasium.wrappers.TimeAwareObservation(env, normalize_time=False, flatten=False)
        assert timed.observation_space["time"].high == horizon
    env = gymnasium.make(name, max_episode_steps=12)
    env.reset(seed=0)
    action = np.zeros(env.action_space.shape, np.float32)
    # By one clock, the one that was asked for.
    assert [env.step(action)[3] for _ in range(12)] == [False] * 11 + [True]
    assert not env.unwrapped.step(action)[3]
    short = started(env_id, horizon=2)
    assert [short.step(action)[3] for _ in range(2)] == [False, True]
    assert short.spec.max_episode_steps == 2


@each_environment
def test_make_vec_equals_sync_vector_env(env_id):
    """In all that it returns and draws, rewards in float64; an episode also begins by itself."""
    contexts = context_sets(env_id, 3)["eval_out"]
    options = dict(max_episode_steps=4, render_mode="rgb_array")
    ours = make_vec(env_id, 3, contexts=contexts, **options)
    sync = sync_vec(env_id, contexts, **options)
    assert isinstance(ours, gymnasium.vector.VectorEnv) and ours.num_envs == 3
    assert ours.metadata["autoreset_mode"] is sync.metadata["autoreset_mode"]
    for kind in ("observation_space", "action_space"):
        assert getattr(ours, kind) == getattr(sync, kind)
        assert getattr(ours, f"single_{kind}") == getattr(sync, f"single_{kind}")
    sync.action_space.seed(0)
    for seed in (5, [7, 1, 7]):
        assert data_equivalence(ours.reset(seed=seed), sync.reset(seed=seed), exact=True)
        assert ours.np_random_seed == sync.np_random_seed
        for _ in range(9):  # The next reset comes right after a truncation.
            actions = sync.action_space.sample()
            assert data_equivalence(ours.step(actions), sync.step(actions), exact=True)
    for name in ("context", "state", "env_id", "render", "render_mode", "np_random_seed"):
        assert data_equivalence(ours.call(name), sync.call(name), exact=True)
    assert ours.get_attr("context") == sync.get_attr("context")
    assert ours.metadata["render_fps"] == sync.envs[0].metadata["render_fps"]
    assert data_equivalence(ours.render(), sync.render(), exact=True)
    ours.close(), sync.close()
    assert ours.closed


def test_max_episode_steps_of_make_vec():
    """-1 is Gymnasium's word for no limit; 0 means nothing; set_attr changes what all share."""
    envs, actions = make_vec("di_inv", 2, max_episode_steps=-1), np.zeros((2, 2))
    envs.reset(seed=0)
    assert not any(envs.step(actions)[3].any() for _ in range(250))
    envs = make_vec("di_inv", 2)
    envs.reset(seed=0)
    assert [envs.step(actions)[3].all() for _ in range(100)] == [False] * 99 + [True]
    envs.reset()
    assert envs.render() is None
    envs.set_attr("horizon", 3)
    assert [envs.step(actions)[3].all() for _ in range(4)] == [False, False, True, False]
    assert envs.get_attr("horizon") == (3, 3)
    with pytest.raises(ValueError, match="must be one value for all instances"):
        envs.set_attr("horizon", [3, 4])
    for wrong in (0, -2, 2.5):
        with pytest.raises(ValueError, match=f"max_episode_steps={wrong}: must be a whole"):
            make_vec("di_inv", 2, max_episode_steps=wrong)


def test_contexts_of_make_vec_by_the_name_of_a_set_by_values_or_at_reset():
    envs = make_vec("cartpole_inv", 20, contexts="train")
    assert envs.context == context_sets("cartpole_inv")["train"] and envs.horizon == 1000
    _, infos = envs.reset(seed=0)
    assert_array_equal(np.float32(infos["context"]["length"]), envs.envs.c[:, 0])
    infos["context"]["length"][:] = 0
    assert envs.step(envs.action_space.sample())[4]["context"]["length"].all()
    envs = make_vec("di_inv", 2, mass=0.6)
    assert envs.context == [{"mass": 0.6, "action_factor": 1.0}] * 2
    s, infos = envs.reset(seed=4, options={"contexts": [{"mass": 0.7}, {"action_factor": -1}]})
    assert infos["context"]["mass"].tolist() == [0.7, 0.6]
    assert infos["context"]["action_factor"].tolist() == [1, -1]
    second = make("di_inv", mass=0.6, action_factor=-1)
    assert_array_equal(s[1], second.reset(seed=5)[0])
    actions = np.full((2, 2), 0.3)
    s, r, *_ = envs.step(actions)
    assert_array_equal(s[1], second.step(actions[1])[0])


def test_vector_wrappers_work():
    vector, sums = gymnasium.wrappers.vector, np.zeros(3)
    envs = make_vec("cartpole_inv", 3, contexts="train", max_episode_steps=5)
    envs = vector.NormalizeObservation(vector.RecordEpisodeStatistics(envs))
    envs.reset(seed=0)
    for t in range(1, 13):
        s, r, _, truncated, infos = envs.step(envs.action_space.sample())
        sums = sums * (t != 6) + r
        assert truncated.all() == (t in (5, 11))
        if truncated.all():
            assert_allclose(infos["episode"]["r"], sums)
    assert np.abs(s.mean()) < 3 and infos["context"]["length"].shape == (3,)


def test_vector_seeds_of_none_go_on():
    envs, single = make_vec("di_inv", 2), started("di_inv", 2**70)
    envs.reset(seed=2**70)
    first, second = envs.reset(seed=[None, 5])[0]
    assert_array_equal(first, single.reset()[0])
    assert_array_equal(second, single.reset(seed=5)[0])


def test_vector_steps_are_much_faster_than_gymnasium_s():
    """In processor time, the best of some tries. They are about three times as fast."""
    contexts = context_sets("cartpole_inv")["train"]
    sync = sync_vec("cartpole_inv", contexts)
    ours = make_vec("cartpole_inv", 20, contexts=contexts)
    actions, best = np.zeros((20, 1), np.float32), {}
    for envs in (ours, sync) * 5:
        envs.reset(seed=0)
        begin = time.process_time()
        for _ in range(40):
            envs.step(actions)
        best[envs] = min(best.get(envs, math.inf), time.process_time() - begin)
    assert best[sync] > 2 * best[ours]


# --------------------------------------------------------------------------------------------------
# Wrappers, and other people's agents
# --------------------------------------------------------------------------------------------------


def test_actuator_wrappers_on_any_environment():
    flipped, plain = (gymnasium.make("Pendulum-v1") for _ in range(2))
    flipped = ActuatorInversion(flipped, -1)
    flipped.reset(seed=0), plain.reset(seed=0)
    seen, expected = flipped.step(np.float32([0.7]))[0], plain.step(np.float32([-0.7]))[0]
    assert_array_equal(seen, expected)
    plain = make("di_inv")
    signs, order = np.array([1.0, -1.0]), np.array([1, 0])
    signed = ActuatorInversion(make("di_inv"), signs)
    swapped = ActuatorPermutation(make("di_inv"), order)
    signs *= -1  # What was given is not kept.
    order[:] = 0
    for wrapped, same in ((signed, [0.2, -0.8]), (swapped, [0.8, 0.2])):
        wrapped.reset(seed=0), plain.reset(seed=0)
        seen, expected = wrapped.step(np.array([0.2, 0.8]))[0], plain.step(np.array(same))[0]
        assert_allclose(seen, expected, atol=1e-7)
        for wrong in ([0.2], [0.2, 0.8, 0.3]):
            with pytest.raises(ValueError, match="must be 2 finite numbers"):
                wrapped.step(wrong)


WRAPPED = [
    lambda: ActuatorInversion(gymnasium.make("Pendulum-v1"), -1),
    lambda: ActuatorPermutation(gymnasium.make("Pendulum-v1"), [0]),
    lambda: ActuatorPermutation(make("hopper_gym", gravity=5), [2, 0, 1]),
    lambda: RandomContext(gymnasium.make("aib/ode-v0"), [{"c1": 2.0}, {"c0": 1.0}]),
    lambda: RandomContext(gymnasium.make("aib/ode-v0"), {"c1": (2.0, 3.0)}),
    lambda: AddContext(make("di_inv", mass=1.2)),
    lambda: AddContext(RandomContext(make("cartpole_inv"), "eval_in"), key="c"),
]


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_wrappers_are_rebuilt_from_their_spec(wrapped):
    env = wrapped()
    again = gymnasium.make(env.spec)
    assert env.observation_space == again.observation_space
    assert env.action_space == again.action_space
    for space in (env.action_space, again.action_space):
        space.seed(0)
    for seed in (3, None, None):
        assert data_equivalence(env.reset(seed=seed), again.reset(seed=seed), exact=True)
        steps = [x.step(x.action_space.sample()) for x in (env, again)]
        assert data_equivalence(*steps, exact=True)
    checked(again, "different from the unwrapped", "symmetric and normalized")


@each_environment
def test_random_contexts_and_contexts_that_are_told(env_id):
    sets = context_sets(env_id)
    told = gymnasium.make(f"aib/{env_id}-v0")
    told = AddContext(RandomContext(told, "eval_out"))
    keyed = AddContext(make(env_id), key="context")
    keyed = RandomContext(keyed, sets["eval_out"])
    drawn = []
    for seed in (3, *[None] * 7):
        (s, info), (s2, info2) = told.reset(seed=seed), keyed.reset(seed=seed)
        assert info == info2 and info["context"] in sets["eval_out"]
        drawn.append(tuple(info["context"].values()))
        action = np.zeros(told.action_space.shape, np.float32)
        for x, y in ((s, s2), (told.step(action)[0], keyed.step(action)[0])):
            assert_array_equal(x, np.float32([*y["observation"], *drawn[-1]]))
            assert_array_equal(y["context"], np.float32(drawn[-1]))
            assert x in told.observation_space and y in keyed.observation_space
    assert len(set(drawn)) > 4 and tuple(told.reset(seed=3)[1]["context"].values()) == drawn[0]
    fixed = sets["train"][0]
    assert told.reset(options={"context": fixed})[1]["context"] == fixed


def test_random_contexts_of_ranges_are_uniform_and_of_the_seed():
    env = RandomContext(make("ode"), {"c0": (-1.0, 3.0)})
    first = env.reset(seed=1)[1]["context"]
    assert env.reset(seed=1)[1]["context"] == first and first["c1"] == 0.0
    drawn = np.sort([env.reset()[1]["context"]["c0"] for _ in range(1000)])
    # The Kolmogorov-Smirnov distance; one in a thousand exceeds this by chance.
    assert np.abs(drawn - np.linspace(-1, 3, 1000)).max() < 4 * 1.95 / math.sqrt(1000)


def test_a_random_context_leaves_what_it_does_not_name():
    env = RandomContext(make("cartpole_inv", length=0.8), [{"action_factor": -1}])
    assert env.reset(seed=0)[1]["context"] == {"length": 0.8, "action_factor": -1}
    env.reset(options={"context": {"length": 0.4}})
    # What the environment had when it was wrapped.
    assert env.reset()[1]["context"]["length"] == 0.8


def test_a_random_context_and_state_are_independent():
    """Of one seed each: starts and contexts are not correlated."""
    env, pairs = RandomContext(make("ode"), "train"), []
    for seed in range(400):
        s, info = env.reset(seed=seed)
        pairs.append((s[0], info["context"]["c0"]))
    assert abs(np.corrcoef(np.transpose(pairs))[0, 1]) < 0.15
    assert len({c0 for _, c0 in pairs}) > 15


def test_a_told_context_keeps_the_type_of_its_space():
    env = AddContext(gymnasium.wrappers.DtypeObservation(make("di_inv"), np.float64))
    assert env.reset(seed=0)[0] in env.observation_space


@pytest.mark.parametrize("told", [False, True])
def test_stable_baselines3_trains(told):
    """The example of the README, with fewer steps."""
    sb3 = pytest.importorskip("stable_baselines3", reason="Stable-Baselines3 is not installed")
    env = RandomContext(make("cartpole_inv"))
    if told:
        env = AddContext(env)
    model = sb3.SAC("MlpPolicy", env, learning_starts=20, batch_size=8, seed=0).learn(30)
    assert model.num_timesteps == 30
    assert env.observation_space.contains(model.get_env().reset()[0])
    assert np.isfinite(model.predict(env.reset()[0])[0]).all()


def test_torchrl_makes_and_steps():
    envs = pytest.importorskip("torchrl.envs", reason="torchrl is not installed")
    env = envs.GymEnv("aib_envs:aib/di_inv-v0")
    envs.check_env_specs(env)
    assert env.rollout(3)["observation"].shape == (3, 4)


# --------------------------------------------------------------------------------------------------
# Environments of one's own, and of Gymnasium
# --------------------------------------------------------------------------------------------------


class Slider(aib_envs.Task):
    """What somebody might add: a mass on a rail, to be held at 0, with a hidden gain."""

    d_s, d_a, state_size, dt = 2, 1, 2, 0.05

    def initial_state(self, i, rng):
        return rng.uniform(-1, 1, 2)

    def set_state(self, state):
        self.x = state.copy()

    def state(self):
        return self.x.copy()

    def advance(self, actions):
        self.x[:, 1] += self.dt * self.c.get("gain", 1) * actions[:, 0]
        self.x[:, 0] += self.dt * self.x[:, 1]

    observation = state

    def reward(self):
        return np.exp(-(self.x[:, 0] ** 2))

    def picture(self, i):
        place = np.array([self.x[i, 0], 0])
        shape = aib_envs.Shape(place, place, 0.1, aib_envs.BLUE)
        return aib_envs.View(np.zeros(2), 4.0), [shape]


GAIN = ContextDim("gain", 1.0, (0.5, 1.5), (0.1, 2.0))


def test_register_an_environment_of_one_s_own(registered):
    dims = [GAIN, ACTION_FACTOR]
    aib_envs.register("slider", Slider, dims, 50, "non-overlapping", K=10, steps=500)
    spec = aib_envs.ENVS["slider"]
    assert (spec.K, spec.steps, spec.horizon, spec.kind) == (10, 500, 50, "non-overlapping")
    sets = context_sets("slider")
    seen = {tuple(context.values()) for contexts in sets.values() for context in contexts}
    assert len(seen) == 60
    env = gymnasium.make("aib/slider-v0", render_mode="rgb_array", gain=0.7)
    checked(env.unwrapped)
    assert env.reset(seed=0)[1]["context"] == {"gain": 0.7, "action_factor": 1.0}
    assert env.render().std() > 0
    assert env.metadata["render_fps"] == 20 and env.spec.max_episode_steps == 50
    assert make_vec("slider", 20, contexts="eval_in").reset(seed=0)[0].shape == (20, 2)


MISSING = object()
WRONG_CLASSES = [
    ({"d_s": None}, "Slider.d_s=None: must be a whole number of at least 1"),
    ({"d_a": 0}, "Slider.d_a=0: must be a whole number of at least 1"),
    ({"state_size": 2.5}, "Slider.state_size=2.5: must be a whole number of at least 1"),
    ({"state_size": 3}, "gives state of shape (2, 2) for two instances: must be (2, 3)"),
    ({"d_s": 3}, "gives observation of shape (2, 2) for two instances: must be (2, 3)"),
    ({"reward": lambda self: self.x}, "gives reward of shape (2, 2) for two instances: must be"),
    ({"reward": lambda self: 1.0}, "gives reward of shape () for two instances: must be (2,)"),
    *(({name: MISSING}, f"Slider has no {name}") for name in ("picture", "dt", "initial_state")),
]


def wrong_dim(name="gain", default=1.0, train=(0.5, 1.5), extrapolation=(0.1, 2.0), **more):
    return {"context": [ContextDim(name, default, train, extrapolation, **more)]}


RANGES = "must be ranges that go up, the second at least 1 % wider at both ends"
WHOLE = "must be a whole number of at least 1"
WRONG_ROWS = [
    *(({"horizon": wrong}, f"horizon={wrong!r}: {WHOLE}") for wrong in (0, 30.5, None, "30", True)),
    *(({name: 0}, f"{name}=0: {WHOLE}") for name in ("K", "steps")),
    (wrong_dim(train=(1.5, 0.5)), RANGES),
    (wrong_dim(train=(1.0, 1.0)), RANGES),
    (wrong_dim(train=(1.0, 1.0), extrapolation=None), RANGES),
    (wrong_dim(extrapolation=(0.6, 1.4)), RANGES),
    (wrong_dim(extrapolation=(2.0, 0.1)), RANGES),
    (wrong_dim(extrapolation=(0.5, 2.0)), RANGES),
    (wrong_dim(train=(0.5, math.inf)), "gain=inf: must be a finite number"),
    (wrong_dim(default="1"), "gain='1': must be a finite number"),
    (wrong_dim(extrapolation=(-0.1, 2.0), positive=True), "gain=-0.1: must be above 0"),
    (wrong_dim(name="a b"), "context 'a b': the name is reserved, or no identifier"),
    ({"context": []}, "contexts []: must be at least one"),
    ({"context": [GAIN, GAIN]}, "each with a name of its own"),
    ({"context": [GAIN, SWAP]}, "has no two actuators"),
]
RESERVED = "set step index return diverged horizon render_mode env_id seed state target".split()
for name in RESERVED:
    WRONG_ROWS.append((wrong_dim(name=name), f"context {name!r}: the name is reserved"))


@pytest.mark.parametrize("changes, message", WRONG_CLASSES + WRONG_ROWS)
def test_register_says_what_means_nothing(changes, message, registered):
    before = dict(aib_envs.ENVS)
    row = {"context": [GAIN], "horizon": 50, "K": 10, "steps": 5}
    parts = {name: part for name, part in vars(Slider).items() if not name.startswith("_")}
    for name, value in changes.items():
        (row if name in row else parts)[name] = value
    parts = {name: part for name, part in parts.items() if part is not MISSING}
    cls = type("Slider", (aib_envs.Task,), parts)
    with pytest.raises(ValueError) as error:
        aib_envs.register("slider", cls, **row)
    assert str(error.value).startswith("environment 'slider': ") and message in str(error.value)
    assert aib_envs.ENVS == before and "aib/slider-v0" not in gymnasium.registry


def test_signs_go_by_their_names(registered):
    x, y, mass = aib_envs.SIGN_X, aib_envs.SIGN_Y, MASS
    aib_envs.register("y", DoubleIntegrator, [mass, y], 50)
    aib_envs.register("both", DoubleIntegrator, [mass, x, ACTION_FACTOR], 50)
    aib_envs.register("late", aib_envs.ODE, [ACTION_FACTOR, *aib_envs.coefficients(2)], 50)
    action = np.array([0.3, 0.7])
    for env_id, context, signs in (
        ("y", {"sign_y": -1}, [1, -1]),
        ("both", {"action_factor": -1}, [-1, -1]),
        ("both", {"action_factor": -1, "sign_x": -1}, [1, -1]),
        ("late", {"c1": 2, "action_factor": -1}, [-1, -1]),
    ):
        plain, signed = started("di_inv"), started(env_id, **context)
        if env_id == "late":  # A coefficient keeps its power, whatever stands before it.
            plain = started("ode", c1=2)
        assert_array_equal(plain.step(action)[0], signed.step(action * signs)[0])


def test_a_third_actuator_has_a_sign_of_its_own_and_no_swap(registered):
    """As the docstring of the file says how to add one."""
    seen = []
    parts = dict(d_a=3, advance=lambda self, actions: seen.extend(actions.tolist()))
    parts["multiplies"] = aib_envs.Task.multiplies | {"sign_z": [2]}
    sign_z = ContextDim("sign_z", 1.0, (-1.0, 1.0))
    aib_envs.register("three", type("Three", (Slider,), parts), [GAIN, SWAP, sign_z], 50)
    seen.clear()
    envs = VectorEnv("three", [{"swap": 1}, {"sign_z": -1}], seed=0)
    envs.reset()
    envs.step([[0.1, 0.2, 0.3]] * 2)
    assert seen == [[0.2, 0.1, 0.3], [0.1, 0.2, -0.3]]


MODULE = """
import aib_envs
class Mine(aib_envs.DoubleIntegrator):
    dt = {dt}
aib_envs.register("mine", Mine, [aib_envs.MASS], 50)
"""


def test_an_id_belongs_to_its_module(registered, tmp_path, monkeypatch):
    """Found in the current folder; another class under the same id is refused, in one line."""
    for name, dt in (("mod_a", 0.1), ("mod_b", 0.2)):
        (tmp_path / f"{name}.py").write_text(MODULE.format(dt=dt))
    (tmp_path / "mod_exit.py").write_text("import sys; sys.exit(0)")
    (tmp_path / "mod_table.py").write_text(MODULE.format(dt=1).replace('"mine"', '"di_inv"'))
    monkeypatch.chdir(tmp_path)
    assert make("mod_a:mine").task.dt == 0.1
    assert make("mine").spec.kwargs["env_id"] == "mod_a:mine"
    for again in range(2):
        with pytest.raises(ValueError, match="'mine': belongs to Mine of the module mod_a"):
            make("mod_b:mine")
        assert make("mod_a:mine").task.dt == 0.1
    with pytest.raises(ValueError, match="'di_inv': belongs to DoubleIntegrator of the module aib"):
        make("mod_table:di_inv")
    with pytest.raises(ValueError, match="di_inv belongs to the module aib_envs"):
        make("mod_a:di_inv")
    with pytest.raises(ImportError, match="mod_exit ends the program while it is imported"):
        make("mod_exit:mine")
    with pytest.raises(ModuleNotFoundError, match="mod_c"):
        make("mod_c:mine")


def first_step(spec):
    env = gymnasium.make(spec)
    env.reset(seed=0)
    return env.step(np.zeros(2))[0].tolist()


def test_an_environment_of_a_module_lives_in_a_spawned_worker(registered, tmp_path, monkeypatch):
    """Which has only the spec."""
    (tmp_path / "mod_a.py").write_text(MODULE.format(dt=0.1))
    monkeypatch.chdir(tmp_path)
    spec = make("mod_a:mine", mass=0.7).spec
    assert gymnasium.spec("aib/mine-v0").kwargs == {"env_id": "mod_a:mine"}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(first_step, [spec]) == first_step(spec)


def test_any_environment_of_gymnasium_has_hidden_actuators():
    env_id = "gymnasium:Pendulum-v1"
    contexts = [{}, {"actuator_strength": 0.5}, {"action_factor": -1}]
    envs, plain = VectorEnv(env_id, contexts, seed=0), gymnasium.make("Pendulum-v1")
    starts = [np.random.default_rng(child) for child in np.random.SeedSequence(0).spawn(3)]
    spec = aib_envs.lookup(env_id)
    assert (spec.K, spec.steps, spec.horizon) == (24, 100_000, 200)
    s = envs.reset()
    seen = [envs.step(np.full((3, 1), action)) for action in (0.6, -0.8, 2.0)]
    assert not np.array_equal(envs.reset(), s) and seen[0][0].dtype == np.float32
    for i, factor in enumerate((1, 0.5, -1)):
        seed = int(starts[i].integers(2**31))
        assert_array_equal(plain.reset(seed=seed)[0], s[i])
        for (s2, r, _), action in zip(seen, (0.6, -0.8, 1.0)):
            ours, reward, *_ = plain.step(np.float32([2 * factor * action]))
            assert_allclose(s2[i], ours, rtol=1e-5, atol=1e-6)
            assert r[i] == pytest.approx(reward, rel=1e-5)
    env = make(env_id, actuator_strength=0.5)
    assert_array_equal(env.reset(seed=1)[0], make(env_id).reset(seed=1)[0])
    env.set_context(action_factor=-1)
    context = env.step([0.3])[4]["context"]
    assert context == {"actuator_strength": 0.5, "action_factor": -1.0}


class Ends(gymnasium.Env):
    """Counts its steps. Its own end comes after some of them, and its actions have a type."""

    observation_space = gymnasium.spaces.Box(-100, 100, (1,), np.float32)

    def __init__(self, after=5, dtype=np.float32):
        self.after = after
        self.action_space = gymnasium.spaces.Box(-2, 2, (1,), dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.float32([0]), {}

    def step(self, action):
        self.t += 1
        return np.float32([self.t]), 1.0, False, self.t == self.after, {}


def test_an_environment_of_gymnasium_ends_by_its_horizon_alone(registered):
    """A reset unasked for would be stored as dynamics."""
    kinds = {"Ends-v0": {}, "Whole-v0": dict(after=99, dtype=np.int64), "Long-v0": dict(after=99)}
    for env_id, options in kinds.items():
        gymnasium.register(env_id, Ends, max_episode_steps=20, kwargs=options)
    wrong = {
        "Ends-v0": " has terminal states: the method knows",
        "Whole-v0": ": must have .* bounded float actions",
    }
    for env_id, message in wrong.items():
        with pytest.raises(BadEnvironment, match=f"^gymnasium:{env_id}{message}.*$"):
            make(f"gymnasium:{env_id}")
    env = started("gymnasium:Long-v0", horizon=50)
    steps = [env.step([0.5]) for _ in range(50)]
    assert [int(s[0]) for s, *_ in steps] == list(range(1, 51))
    assert [truncated for *_, truncated, _ in steps] == [False] * 49 + [True]


def test_a_missing_library_of_gymnasium_s_is_named(monkeypatch):
    """None in sys.modules is how Python marks a module that must not be found."""
    aib_envs.gymnasium_spec.cache_clear()
    for name in list(sys.modules):
        if name.startswith(("gymnasium.envs.mujoco", "imageio")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "imageio", None)
    message = r"^gymnasium:Hopper-v5: .* \(pip install imageio\)$"
    with pytest.raises(BadEnvironment, match=message):
        make("gymnasium:Hopper-v5")


def test_terminal_states_of_gymnasium_s_mujoco_tasks_are_told():
    pytest.importorskip("imageio", reason="Gymnasium's MuJoCo tasks do not load without it")
    with pytest.raises(BadEnvironment, match="InvertedPendulum-v5 has terminal states"):
        make("gymnasium:InvertedPendulum-v5")


# --------------------------------------------------------------------------------------------------
# The package
# --------------------------------------------------------------------------------------------------


def test_installing_takes_two_modules_and_no_torch():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((HERE / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["py-modules"] == ["aib_envs", "dmash"]
    needed = project["project"]["dependencies"]
    assert sorted(re.split("[<>=]", text)[0] for text in needed) == ["gymnasium", "mujoco", "numpy"]
    (torch,) = project["project"]["optional-dependencies"]["train"]
    assert torch.startswith("torch>=")
    assert f"gymnasium=={gymnasium.__version__}\n" in (HERE / "requirements.txt").read_text()


@pytest.mark.parametrize("minor", [10, 11, 12, 13])
def test_both_files_compile(minor):
    folders = [*os.get_exec_path(), *Path.home().glob(f".pyenv/versions/3.{minor}.*/bin")]
    found = [Path(folder) / f"python3.{minor}" for folder in folders]
    pythons = [path for path in found if path.exists() and "shims" not in path.parts]
    if not pythons:
        pytest.skip(f"there is no Python 3.{minor} here")
    for file in (HERE / "dmash.py", HERE / "aib_envs.py"):
        code = f"compile(open({str(file)!r}, encoding='utf-8').read(), 'file', 'exec')"
        assert subprocess.run([pythons[0], "-c", code], capture_output=True).returncode == 0


def test_type_hints_hold():
    pytest.importorskip("mypy", reason="mypy is not installed")
    command = [sys.executable, "-m", "mypy", "aib_envs.py"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
