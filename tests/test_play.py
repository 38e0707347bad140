"""Tests of play.py: the page's JavaScript against PyTorch and MuJoCo, and the page in a browser."""

import base64
import html
import json
import re
import shutil
import subprocess

import numpy as np
import play
import pytest
import torch
from adaptation import switch
from untrained import ROOT, refusal, save_untrained, succeed, untrained

import aib_envs
import dmash

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
browser = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(browser is None, reason="needs Chromium")

TEMPLATE = play.TEMPLATE.read_text(encoding="utf-8")
PAGE = ROOT / "results" / "play.html"
PREPARE = """
const input = JSON.parse(require("fs").readFileSync(0, "utf8"));
const floats = (text) => new Float32Array(Uint8Array.from(Buffer.from(text, "base64")).buffer);
const weights = Object.entries(input.weights).map(([name, text]) => [name, floats(text)]);
const agent = new Agent({ weights: Object.fromEntries(weights) });
"""


def new_agent(method="dma_star_sh", env="cartpole_inv", **settings):
    """An untrained agent. Its codes differ more from window to window than by chance alone."""
    agent = untrained(method, env, **settings)
    if agent.g is not None:
        agent.g.project.weight.data *= 5
    return agent


def element(text, name):
    """What stands in the element of a page that has this id."""
    found = re.search(rf'id="{name}"[^>]*>(.*?)</(script|pre)>', text, re.DOTALL)
    return found[1]


def in_node(program, agent=None, **values):
    """What `program` returns, run after the page's own JavaScript, all but what needs a browser.

    Weights go there as float32.
    """
    values["weights"] = {}
    if agent is not None:
        values |= {"K": agent.cfg.K, "L": agent.cfg.L}
        for name, tensor in play.acting_weights(agent).items():
            values["weights"][name] = base64.b64encode(tensor.numpy().tobytes()).decode()
    script = element(TEMPLATE, "model")
    whole = f"{script}{PREPARE}console.log(JSON.stringify((() => {{{program}}})()));"
    text = json.dumps(values)
    done = subprocess.run(["node", "-e", whole], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def near(ours, theirs, tolerance):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


# ---- Physics against MuJoCo and the environments ------------------------------------------------

ADVANCE = """
const task = TASKS[input.env];
const found = { states: [], observations: [], rewards: [] };
input.states.forEach((start, i) => {
  let state = start;
  const c = input.contexts[i];
  const path = input.actions.map((action) => {
    const motors = motorsOf(action, c);
    state = task.advance(state, motors, [0, 0], c);
    return { state, s: Array.from(task.observation(state)), r: task.reward(state, motors) };
  });
  found.states.push(path.map((at) => at.state));
  found.observations.push(path.map((at) => at.s));
  found.rewards.push(path.map((at) => at.r));
});
return found;
"""


def both_ways(env, contexts, states, actions):
    """States, observations and rewards by the page's script and by the environment, (N, T, ...)."""
    task = aib_envs.lookup(env).cls(contexts)
    task.set_state(states)
    rows = []
    for action in actions:
        task.step(np.tile(action, (len(contexts), 1)))
        rows.append((task.state(), task.observation(), task.reward()))
    theirs = [np.stack(values, 1) for values in zip(*rows)]
    found = in_node(
        ADVANCE, env=env, contexts=contexts, states=states.tolist(), actions=actions.tolist()
    )
    ours = [np.array(values) for values in found.values()]
    return ours, theirs


@needs_node
def test_cartpole_moves_as_in_mujoco():
    rng = np.random.default_rng(0)
    lengths = np.linspace(0.1, 2, 12).tolist()
    contexts = [{"length": x, "action_factor": sign} for x in lengths for sign in (1.0, -1.0)]
    states = rng.uniform(-1, 1, (24, 4)) * [0.3, np.pi, 0.5, 3]
    to_ends = states + np.sign(states[:, :1]) * [1.5, 0, 2, 0]  # of the rail: the cart stops there
    starts = np.vstack([states, to_ends])
    actions = rng.uniform(-1.2, 1.2, (100, 1))
    ours, theirs = both_ways("cartpole_inv", contexts * 2, starts, actions)
    reach = np.abs(theirs[0][..., 0]).max(1)
    assert reach[:24].max() < 1.8 < reach[24:].min()
    for own, other, tolerance in zip(ours, theirs, (1e-6, 2e-6, 1e-6)):  # observations are float32
        near(own[:24], other[:24], tolerance)
        near(own[24:], other[24:], 1e-5)


@needs_node
@pytest.mark.parametrize("env", ["di_inv", "di_perm"])
def test_double_integrator_moves_by_its_own_rule(env):
    rng = np.random.default_rng(1)
    contexts = aib_envs.context_sets(env, 12)["eval_out"]
    states = rng.uniform(-1, 1, (12, 4)) * [0.2, 0.2, 0.3, 0.3]
    ours, theirs = both_ways(env, contexts, states, rng.uniform(-1.2, 1.2, (60, 2)))
    assert theirs[2].min() < theirs[2].max() and np.abs(theirs[0]).max() == 1  # rewards, and walls
    near(ours[0], theirs[0], 1e-12)
    np.testing.assert_array_equal(ours[2], theirs[2])


# ---- Networks and acting against PyTorch --------------------------------------------------------

NETWORKS = """
return input.windows.map((rows, i) => {
  const window = new Window(input.K, input.L, rows[0].length);
  rows.forEach((row) => window.add(Float32Array.from(row)));
  const { z, omega } = agent.infer(window);
  const s = Float32Array.from(input.states[i]);
  const a = agent.act(s, omega, input.contexts[i], input.d_a);
  const tensors = omega && Object.values(omega).map((tensor) => Array.from(tensor));
  return { z: z && Array.from(z), omega: tensors, a: Array.from(a) };
});
"""


@needs_node
@pytest.mark.parametrize(
    "method, env, settings",
    [
        # the paper's sizes
        ("dma_star_sh", "cartpole_inv", dict(hidden=256, hyper_hidden=64, bottleneck=32)),
        ("dma_star_sh", "di_inv", {"policy_average": 0.0}),
        ("concat", "cartpole_inv", {}),
        ("dr", "cartpole_inv", {}),
    ],
)
def test_networks_compute_what_pytorch_computes(method, env, settings):
    agent = new_agent(method, env, **settings)
    if agent.pi_average is not None:
        agent.pi_average.head.bias.data += 0.1  # it acts, and differs from the policy
    contexts = aib_envs.context_sets(env, 5)["train"]
    envs = aib_envs.VectorEnv(env, contexts, seed=0)
    states = torch.randn(5, envs.d_s)
    replay = dmash.Rollout(agent, envs, noisy=False).replay
    replay.rows.normal_()
    windows = replay.rows[..., :-1].transpose(0, 1)  # all but the rewards
    with torch.no_grad():
        z, omega = agent.infer(replay.latest(noisy=False), False, replay.c)
    a = agent.act(states, omega, noisy=False)
    found = in_node(
        NETWORKS,
        agent,
        windows=windows.tolist(),
        states=states.tolist(),
        contexts=contexts,
        d_a=envs.d_a,
    )
    assert a.std(0).max() > 0.01
    near([row["a"] for row in found], a, 1e-5)
    if z is not None:
        assert z.std(0).max() > 0.01
        near([row["z"] for row in found], z, 1e-5)
        for i, tensor in enumerate(omega):
            near([row["omega"][i] for row in found], tensor.flatten(1), 1e-5)


@needs_node
def test_warm_up_and_flip_as_in_an_evaluation():
    agent = new_agent()
    context = {"length": 0.7, "action_factor": 1.0}
    state = [0.05, 0.02, 0.0, -0.01]
    envs = aib_envs.VectorEnv("cartpole_inv", [context], seed=0)
    envs.task.initial_state = lambda i, rng: np.array(state)
    rollout = dmash.Rollout(agent, envs, noisy=False)
    rollout.begin_episode()
    actions = []
    for t in range(60):
        if t == 30:
            switch(rollout)
        actions.append(rollout.step()[1].item())
    program = """
    const world = new World(input, agent, input.context, generator(0));
    world.task = { ...world.task, initialState: () => input.state };
    world.start(input.state);
    world.warmUp();
    const actions = [];
    for (let t = 0; t < 60; t++) {
      if (t === 30) {
        world.setContext(mirrored(world.c));
      }
      world.step();
      actions.push(world.action[0]);
    }
    return { actions, state: world.state };
    """
    codes = [[0] * 8, [1] * 8]
    found = in_node(program, agent, env="cartpole_inv", codes=codes, context=context, state=state)
    near(found["actions"], actions, 1e-4)
    near(found["state"], envs.task.state()[0], 1e-4)


@needs_node
def test_float16_is_decoded_as_numpy_does():
    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)]
    text = play.as_text(torch.from_numpy(values.astype(np.float32)))
    found = in_node("return Array.from(decodeWeights({ x: input.text }).x);", text=text)
    np.testing.assert_array_equal(found, values)


# ---- The program --------------------------------------------------------------------------------


def test_the_page_holds_the_agents_and_the_environment(tmp_path, capsys):
    run = save_untrained(tmp_path, "dma_star_sh", "di_perm")
    rival = save_untrained(tmp_path, "concat", "di_perm")
    out = tmp_path / "new" / "page.html"
    succeed(play, run, "--against", rival, "--out", out)
    text = out.read_text(encoding="utf-8")
    assert "{{" not in text
    assert f"{len(text.encode()) / 1e6:.2f} MB" in capsys.readouterr().out
    data = json.loads(element(text, "data"))
    assert len(data["rewards"]) == 2
    assert [agent["method"] for agent in data["agents"]] == ["DMA*-SH", "Concat"]
    mass, swap = data["dims"]
    assert mass == {"name": "mass", "usual": 1.0, "train": [0.5, 1.5], "all": [0.1, 2.0]}
    assert swap == {"name": "swap", "usual": 0.0, "train": [0.0, 1.0]}


def test_codes_of_each_wiring_and_what_float16_costs(seen):
    agent = new_agent(env="di_inv")
    codes, cost = play.watch(agent)
    steps = seen[-play.STEPS :]  # all but the warm-up
    contexts = aib_envs.context_sets("di_inv", 4)["train"]
    signs = np.array([context["action_factor"] for context in contexts])
    z = np.mean([agent.g(tau, noisy=False).tolist() for tau, _ in steps], 0)  # (4, 8)
    near(codes, [z[signs == 1].mean(0), z[signs == -1].mean(0)], 1e-5)

    for parameter in agent.parameters():
        half = parameter.detach().numpy().astype(np.float16)
        parameter.data = torch.from_numpy(half.astype(np.float32))
    changes = []
    for tau, (s, a, _, _) in steps:
        _, omega = agent.infer(tau, noisy=False)
        changes.append((agent.act(s, omega, noisy=False) - a).abs().max().item())
    assert 0 < cost == pytest.approx(max(changes), abs=1e-6)


def test_mean_rewards_are_told_apart_by_wiring(monkeypatch):
    def evaluate(agent, cfg, contexts):
        swapped = np.array([context["swap"] for context in contexts])
        return 25 + 50 * swapped[:, None], None  # of 100 steps

    monkeypatch.setattr(dmash, "evaluate", evaluate)
    assert play.mean_rewards(new_agent("dr", "di_perm")) == [0.25, 0.75]


def test_what_the_page_cannot_show_is_refused_in_one_line(tmp_path, capsys):
    good = save_untrained(tmp_path, "dma_star_sh", "cartpole_inv")
    ode = save_untrained(tmp_path, "dma_star_sh", "ode")
    dr = save_untrained(tmp_path, "dr")
    for arguments, reason in (
        ([ode], "is of ode; the page can show cartpole_inv, di_inv, di_perm"),
        ([dr], "is of dr; the page can show dma_star_sh"),
        ([good, "--against", good], "is of dma_star_sh; the page can show dr, concat"),
        ([good, "--against", dr], "is of di_inv"),
    ):
        out = tmp_path / "page.html"
        assert reason in refusal(play, [*arguments, "--out", out], capsys)
        assert not out.exists()


# ---- The page in a browser ----------------------------------------------------------------------

FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
--disable-background-networking --disable-component-update --hide-scrollbars
--enable-logging=stderr""".split()


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """What the browser writes, after it has shown a page without an error in the console."""
    profile = tmp_path_factory.mktemp("profile")

    def browse(address, *options):
        command = [browser, *FLAGS, f"--user-data-dir={profile}", *options, address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "CONSOLE" not in done.stderr, done.stderr
        return done.stdout

    return browse


def report_of(browse, page):
    """What a page wrote down after it had driven its own controls."""
    text = browse(f"{page.as_uri()}#test", "--dump-dom")
    report = json.loads(html.unescape(element(text, "report")))
    assert "error" not in report, report
    return report


def test_the_page_in_the_repository_is_made_from_this_template():
    text = PAGE.read_text()
    data = element(text, "data")
    assert text == TEMPLATE.replace("{{DATA}}", data)
    assert len(text.encode()) < 4e6
    assert "http" not in text.replace(data, "")  # nothing comes from a network


@needs_browser
def test_the_agent_follows_three_flips_and_every_control_does_what_it_says(browse):
    report = report_of(browse, PAGE)
    run = report["run"]
    assert run["lowest"] > 0.9  # cos θ: the pole stays up
    assert run["mean"] > 0.8
    assert len(run["crossed"]) == 3 and all(1 <= steps <= 40 for steps in run["crossed"])
    assert [force for force in run["pushed"] if force] == [0.4, -0.4]
    assert run["said"][0] == "The pole stands. Now flip the motor."
    crossed = f"z crossed over after {run['crossed'][0]} steps."
    assert run["said"][5] == f"The motor was flipped 100 steps ago. {crossed}"
    assert run["said"][9] == "You pushed the pole in its middle."

    controls = report["controls"]
    expected = {
        "flip by button": [True, False],
        "flip by key": [False, True],
        "length": [0.5, 1.2],
        "pause by key": [False, True],
        "pause by button": [True, False],
        "step by key": [0, 1],
        "step by button": [1, 2],
        "speed": [1, 0.2],
        "push by button": [0, -0.4],
        "the slider's keys": [-0.4, -0.4],
        "forget": [128, 0],
        "reset": [2, 0],
        "window after reset": [128, 128],
        "freeze": [False, True],
        "omega while frozen": [True],
        "z while frozen": [False],
        "freeze button": ["Stop inferring: freeze ω", "Infer ω again"],
        "omega afterwards": [False],
        "after freezing": ["You let it infer ω again 1 step ago."],
        "drag": [0, 0.2],
        "told of a pull": ["You pushed the pole in its middle."],
        "release": [0.2, 0],
        "other motor": [True, False],
        "reset with the motor reversed": [
            "The pole stands, with the motor still reversed. Now flip it back."
        ],
        "turn": [False, True],
        "steered right": [0.5],
        "steered nowhere": [0],
        "wiring shown": ["Wiring hidden"],
        "length of a turn": [10, True],
        "after the turn": [True, False],
    }
    assert controls | expected == controls
    before, after = controls["flip during a turn"]
    assert before == after
    assert "1.20 m, outside of what training showed" in controls["told"][0]
    flipped, lines = controls["a flip while frozen"]
    assert "but ω is frozen" in lines[0] and re.search(r"z crossed over after \d+ steps", lines[0])
    assert flipped == [True, True]  # z crosses over, the pole falls
    assert lines[1].endswith("The pole is still down.")
    usual, reversed_motor = json.loads(element(PAGE.read_text(), "data"))["rewards"]
    assert usual < 0.8 < reversed_motor  # of DR
    assert controls["beside"][0].endswith("balance with one only: motor reversed.")
    agent, reader = controls["scores"]
    assert agent > 800 and 0 < reader < 200  # the reader's points end with the fall
    assert controls["points at the fall"][0] == pytest.approx(reader)
    words = f"You got {reader:.0f} points, the agent {agent:.0f} of 1000. Your pole fell after"
    assert controls["verdict"][0].startswith(words)
    *clock, after_an_hour = report["clock"]
    assert clock == [20, 10, 0] and 24 <= after_an_hour <= 25  # a quarter of a second at most
    assert report["milliseconds"] < 10  # a step takes less time than it simulates


@needs_browser
@pytest.mark.parametrize("env, done", [("di_inv", "flipped"), ("di_perm", "swapped")])
def test_the_page_of_a_double_integrator_runs(tmp_path, browse, env, done):
    text, _ = play.page(new_agent(env=env))
    page = tmp_path / "page.html"
    page.write_text(text, encoding="utf-8")
    report = report_of(browse, page)
    assert report["controls"]["length"] == [1, 1.2]
    assert report["controls"]["flip by key"] == [False, True]
    assert report["controls"]["length of a turn"] == [10, True]
    assert done in report["run"]["said"][5]


@needs_browser
@pytest.mark.parametrize("width, height", [(390, 844), (1280, 800)])
def test_a_picture_of_the_page_is_not_blank(tmp_path, browse, width, height):
    Image = pytest.importorskip("PIL.Image")
    path = tmp_path / "page.png"
    size = f"--window-size={width},{height}"
    browse(PAGE.as_uri(), size, "--virtual-time-budget=500", f"--screenshot={path}")
    picture = np.asarray(Image.open(path).convert("L"), dtype=float)
    assert picture.shape == (height, width)
    for part in np.array_split(picture, 4):  # from top to bottom: words, pictures, controls
        assert part.std() > 5
    assert 0.02 < (np.abs(picture - np.median(picture)) > 60).mean() < 0.5
