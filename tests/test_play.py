"""Tests of play.py: the page's JavaScript against PyTorch and MuJoCo, and the page in a browser."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "studies")]

import play  # noqa: E402

import aib_envs  # noqa: E402
import dmash  # noqa: E402

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
browser = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(browser is None, reason="needs Chromium")

SMALL = dict(contexts=4, batch=16, threads=1, policy_average=0.01)
PREPARE = """
const input = JSON.parse(require("fs").readFileSync(0, "utf8"));
const data = input.data;
for (const agent of data.agents) {
  const lists = Object.entries(agent.weights);
  agent.weights = Object.fromEntries(lists.map(([name, list]) => [name, Float32Array.from(list)]));
}
"""


def new_agent(method="dma_star_sh", env="cartpole_inv", **settings):
    """An agent that was never trained. Its codes differ more from window to window than by chance
    alone: the encoder's last layer is scaled up."""
    torch.manual_seed(0)
    agent = dmash.new_agent(dmash.Config(env=env, method=method, **SMALL | settings))
    agent.step = 0
    if agent.g is not None:
        agent.g.project.weight.data *= 5
    return agent


def script():
    """The page's own JavaScript, all but what needs a browser."""
    text = play.TEMPLATE.read_text(encoding="utf-8")
    return re.search(r'<script id="model">(.*?)</script>', text, re.DOTALL)[1]


def in_node(program, agents=(), env="cartpole_inv", **values):
    """What `program` returns, run after the page's own script. Weights go there as float32."""
    data = {"env": env, "K": 8, "L": 3, "codes": [[0] * 8, [1] * 8], "agents": []}
    for agent in agents:
        data |= {"K": agent.cfg.K, "L": agent.cfg.L}
        weights = play.acting_weights(agent)
        lists = {name: tensor.flatten().tolist() for name, tensor in weights.items()}
        data["agents"].append(play.describe(agent) | {"weights": lists})
    whole = f"{script()}{PREPARE}console.log(JSON.stringify((() => {{{program}}})()));"
    text = json.dumps({"data": data} | values)
    done = subprocess.run(["node", "-e", whole], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---- Physics against MuJoCo and the environments ------------------------------------------------

ADVANCE = """
return input.states.map((start, i) => {
  let state = start;
  const c = input.contexts[i];
  return input.actions.map((action) => {
    const motors = motorsOf(action, c);
    state = TASKS[data.env].advance(state, motors, [0, 0], c);
    const s = Array.from(TASKS[data.env].observation(state));
    return { state, s, r: TASKS[data.env].reward(state, motors) };
  });
});
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
    values = dict(contexts=contexts, states=states.tolist(), actions=actions.tolist())
    found = in_node(ADVANCE, env=env, **values)
    ours = [np.array([[row[key] for row in rows] for rows in found]) for key in ("state", "s", "r")]
    return ours, theirs


@needs_node
def test_cartpole_moves_as_in_mujoco():
    rng = np.random.default_rng(0)
    contexts = []
    for length in np.linspace(0.1, 2, 12):
        for sign in (1.0, -1.0):
            contexts.append({"length": float(length), "action_factor": sign})
    states = rng.uniform(-1, 1, (24, 4)) * [0.3, np.pi, 0.5, 3]
    actions = rng.uniform(-1.2, 1.2, (100, 1))
    ours, theirs = both_ways("cartpole_inv", contexts, states, actions)
    assert np.abs(theirs[0][..., 0]).max() < 1.8  # within the rail
    assert np.abs(theirs[0][:, -1] - states).max() > 1  # and far from the start
    np.testing.assert_allclose(ours[0], theirs[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=2e-6)  # float32
    np.testing.assert_allclose(ours[2], theirs[2], rtol=0, atol=1e-6)


@needs_node
def test_cart_stops_at_the_ends_of_the_rail_as_in_mujoco():
    contexts = [{"length": length, "action_factor": 1.0} for length in (0.1, 0.5, 2.0)]
    states = np.array([[1.5, 0.3, 1.0, 0.0], [-1.7, 2.0, -3.0, 1.0], [1.7, 0.0, 0.0, 0.0]])
    ours, theirs = both_ways("cartpole_inv", contexts, states, np.full((100, 1), 0.9))
    assert (np.abs(theirs[0][..., 0]).max(-1) > 1.8).all()
    np.testing.assert_allclose(ours[0], theirs[0], rtol=0, atol=1e-5)


@needs_node
@pytest.mark.parametrize("env", ["di_inv", "di_perm"])
def test_double_integrator_moves_by_its_own_rule(env):
    rng = np.random.default_rng(1)
    contexts = aib_envs.context_sets(env, 12)["eval_out"]
    states = rng.uniform(-1, 1, (12, 4)) * [0.2, 0.2, 0.3, 0.3]
    actions = rng.uniform(-1.2, 1.2, (60, 2))
    ours, theirs = both_ways(env, contexts, states, actions)
    assert theirs[2].min() < theirs[2].max() and np.abs(theirs[0]).max() == 1  # rewards, and walls
    np.testing.assert_allclose(ours[0], theirs[0], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(ours[2], theirs[2])


# ---- Networks and acting against PyTorch --------------------------------------------------------

NETWORKS = """
const agent = new Agent(data.agents[0]);
return input.windows.map((rows, i) => {
  const window = new Window(data.K, data.L, rows[0].length);
  rows.forEach((row) => window.add(Float32Array.from(row)));
  const { z, omega } = agent.infer(window);
  const s = Float32Array.from(input.states[i]);
  const a = agent.act(s, omega, input.contexts[i], input.d_a);
  const tensors = omega && Object.values(omega).map((tensor) => Array.from(tensor));
  return { z: z && Array.from(z), omega: tensors, a: Array.from(a) };
});
"""


@needs_node
@pytest.mark.parametrize("env", play.ENVIRONMENTS)
@pytest.mark.parametrize("policy_average", [0.0, 0.01])
def test_networks_compute_what_pytorch_computes(env, policy_average):
    agent = new_agent(env=env, policy_average=policy_average)
    cfg = agent.cfg
    if policy_average:
        agent.pi_average.head.bias.data += 0.1  # it acts, and differs from the policy
    spec = aib_envs.lookup(env)
    d_s, d_a = spec.cls.d_s, spec.cls.d_a
    rows = torch.randn(5, cfg.K + 3, 2 * d_s + d_a)
    replay = dmash.Replay(torch.zeros(5, 2), cfg.K, d_s, d_a, cfg.K, cfg.L)
    for row in rows.unbind(1):
        s, a, ds = row.split([d_s, d_a, d_s], -1)
        replay.add(s, a, torch.zeros(5), s + ds)
    states = torch.randn(5, d_s)
    with torch.no_grad():
        z, omega = agent.infer(replay.latest(noisy=False), noisy=False)
        a = agent.act(states, omega, noisy=False)
    assert z.std(0).max() > 0.01 and a.std(0).max() > 0.01
    values = dict(windows=rows.tolist(), states=states.tolist(), contexts=[{}] * 5, d_a=d_a)
    found = in_node(NETWORKS, [agent], env, **values)
    for i, row in enumerate(found):
        np.testing.assert_allclose(row["z"], z[i], rtol=0, atol=1e-5)
        np.testing.assert_allclose(row["a"], a[i], rtol=0, atol=1e-5)
        for ours, theirs in zip(row["omega"], omega, strict=True):
            np.testing.assert_allclose(ours, theirs[i].flatten(), rtol=0, atol=1e-5)


@needs_node
@pytest.mark.parametrize("method", play.AGAINST)
def test_the_other_agents_act_as_in_pytorch(method):
    agent = new_agent(method)
    states = torch.randn(5, 5)
    contexts = aib_envs.context_sets("cartpole_inv", 5)["train"]
    c = torch.tensor([list(context.values()) for context in contexts])
    told = c if method == "concat" else None
    a = agent.act(states, told, noisy=False)
    assert a.std() > 0.01
    windows = torch.zeros(5, 1, 11).tolist()
    values = dict(windows=windows, states=states.tolist(), contexts=contexts, d_a=1)
    found = in_node(NETWORKS, [agent], **values)
    np.testing.assert_allclose([row["a"] for row in found], a, rtol=0, atol=1e-5)


@needs_node
@pytest.mark.parametrize("written", [0, 1, 5, 8, 11])
def test_the_window_reads_what_the_replay_reads(written):
    rows = torch.randn(written, 11)
    replay = dmash.Replay(torch.zeros(1, 2), 8, 5, 1, 8, 3)
    for row in rows:
        s, a, ds = row[None].split([5, 1, 5], -1)
        replay.add(s, a, torch.zeros(1), s + ds)
    program = """
    const window = new Window(8, 3, 11);
    input.rows.forEach((row) => window.add(Float32Array.from(row)));
    return window.read().map((row) => Array.from(row));
    """
    found = in_node(program, rows=rows.tolist())
    np.testing.assert_allclose(found, replay.latest(noisy=False)[0], rtol=0, atol=1e-6)


def same_start(agent, state, context):
    """A rollout of PyTorch whose episodes all start in `state`."""
    envs = aib_envs.VectorEnv(agent.cfg.env, [context], seed=0)
    envs.task.initial_state = lambda i, rng: np.array(state)
    return dmash.Rollout(agent, envs, noisy=False)


@needs_node
def test_warm_up_and_flip_as_in_an_evaluation():
    agent = new_agent()
    context = {"length": 0.7, "action_factor": 1.0}
    state = [0.05, 0.02, 0.0, -0.01]
    rollout = same_start(agent, state, context)
    rollout.begin_episode()
    actions = []
    for t in range(60):
        if t == 30:
            envs = rollout.envs
            snapshot = envs.task.snapshot()
            envs.task = envs.task.with_contexts([context | {"action_factor": -1.0}])
            envs.task.restore(snapshot)
        actions.append(rollout.step()[1].item())
    program = """
    const world = new World(data, new Agent(data.agents[0]), input.context, generator(0));
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
    found = in_node(program, [agent], context=context, state=state)
    np.testing.assert_allclose(found["actions"], actions, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found["state"], rollout.envs.task.state()[0], rtol=0, atol=1e-4)


@needs_node
def test_float16_is_decoded_as_numpy_does():
    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)]
    text = play.as_text(torch.from_numpy(values.astype(np.float32)))
    found = in_node("return Array.from(decodeWeights({ x: input.text }).x);", text=text)
    np.testing.assert_array_equal(found, values.astype(np.float64))


# ---- The program --------------------------------------------------------------------------------


def save(folder, method="dma_star_sh", env="cartpole_inv"):
    """The path of a policy file of an agent that was never trained."""
    agent = new_agent(method, env)
    acting = ("g.", "h.", "pi.", "pi_average.")
    tensors = agent.state_dict().items()
    state = {"settings": dataclasses.asdict(agent.cfg), "version": "none", "step": 0}
    state["agent"] = {name: tensor for name, tensor in tensors if name.startswith(acting)}
    path = folder / f"{method}_{env}.pt"
    torch.save(state, path)
    return path


def data_of(text):
    """What a page holds of its agents and its environment."""
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(block[1])


def test_the_page_holds_the_agents_and_the_environment(tmp_path, capsys):
    run = save(tmp_path, env="di_perm")
    rival = save(tmp_path, "concat", "di_perm")
    out = tmp_path / "new" / "page.html"
    assert play.main([str(run), "--against", str(rival), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    text = out.read_text(encoding="utf-8")
    assert "{{" not in text and len(text) < 4e6 and f"{len(text.encode()) / 1e6:.2f} MB" in said
    data = data_of(text)
    assert len(data["rewards"]) == 2
    assert [agent["method"] for agent in data["agents"]] == ["DMA*-SH", "Concat"]
    mass, swap = data["dims"]
    assert mass == {"name": "mass", "usual": 1.0, "train": [0.5, 1.5], "all": [0.1, 2.0]}
    assert swap == {"name": "swap", "usual": 0.0, "train": [0.0, 1.0]}


def test_codes_and_the_cost_of_float16_as_found_one_context_at_a_time():
    agent = new_agent(env="di_inv")
    codes, cost = play.watch(agent)
    cfg = agent.cfg
    rough = new_agent(env="di_inv")
    for parameter in rough.parameters():
        half = parameter.detach().numpy().astype(np.float16)
        parameter.data = torch.from_numpy(half.astype(np.float32))
    means = {1.0: [], -1.0: []}
    changes = []
    envs = aib_envs.VectorEnv("di_inv", aib_envs.context_sets("di_inv", 4)["train"], seed=0)
    for i, context in enumerate(envs.task.contexts):
        rng = envs.rngs[i]
        task = aib_envs.lookup("di_inv").cls([context])
        window = [torch.zeros(10)] * cfg.K
        found = []
        for t in range(cfg.K + play.STEPS):
            if t in (0, cfg.K):
                task.reset([rng])
            s = torch.from_numpy(task.observation()).float()
            positions = [i * (cfg.K - 1) // (cfg.L - 1) for i in range(cfg.L)]
            tau = torch.stack([window[position] for position in positions])[None]
            actions = []
            for each in (agent, rough):
                z, omega = each.infer(tau, noisy=False)
                actions.append(each.act(s, omega, noisy=False))
                found.append(z.detach()[0])
            task.step(actions[0].numpy())
            s2 = torch.from_numpy(task.observation()).float()
            window = window[1:] + [torch.cat([s, actions[0], s2 - s], -1)[0]]
            if t >= cfg.K:
                changes.append((actions[1] - actions[0]).abs().max().item())
        means[context["action_factor"]].append(torch.stack(found[2 * cfg.K :: 2]).mean(0))
    for code, of_wiring in zip(codes, (means[1.0], means[-1.0]), strict=True):
        np.testing.assert_allclose(code, torch.stack(of_wiring).mean(0), rtol=0, atol=1e-5)
    assert 0 < cost == pytest.approx(max(changes), abs=1e-6)


@pytest.mark.parametrize("env", play.ENVIRONMENTS)
def test_mean_rewards_are_told_apart_by_wiring(env, monkeypatch):
    def evaluate(agent, cfg, contexts):
        wirings = [(context.get("action_factor"), context.get("swap")) for context in contexts]
        usual = [wiring in [(1, None), (None, 0)] for wiring in wirings]
        returns = np.where(usual, 0.25, 0.75) * aib_envs.VectorEnv(env, contexts, seed=0).horizon
        return returns[:, None], None

    monkeypatch.setattr(dmash, "evaluate", evaluate)
    assert play.mean_rewards(new_agent("dr", env)) == pytest.approx([0.25, 0.75])


def test_what_the_page_cannot_show_is_refused_in_one_line(tmp_path, capsys):
    good = save(tmp_path)
    cases = {
        (save(tmp_path, env="ode"),): "is of ode; the page can show cartpole_inv, di_inv, di_perm",
        (save(tmp_path, "dr"),): "is of dr; the page can show dma_star_sh",
        (good, "--against", good): "is of dma_star_sh; the page can show dr, concat",
        (good, "--against", save(tmp_path, "dr", "di_inv")): "is of di_inv",
        (tmp_path / "nothing",): "nothing",
    }
    for arguments, reason in cases.items():
        out = tmp_path / "page.html"
        assert play.main([*map(str, arguments), "--out", str(out)]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and reason in said.err
        assert not out.exists()


# ---- The page in a browser ----------------------------------------------------------------------

PAGE = ROOT / "results" / "play.html"
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
--disable-background-networking --disable-component-update --hide-scrollbars
--enable-logging=stderr""".split()


def browse(tmp_path, address, *options):
    """What the browser writes, after it has shown a page without an error in the console."""
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *options, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def report_of(tmp_path, page):
    """What the page wrote down after it had driven its own controls."""
    text = browse(tmp_path, f"{page.as_uri()}#test", "--dump-dom")
    block = re.search(r'<pre id="report"[^>]*>(.*?)</pre>', text, re.DOTALL)
    report = json.loads(html.unescape(block[1]))
    assert "error" not in report, report
    return report


def test_the_page_in_the_repository_is_made_from_this_template():
    text = PAGE.read_text(encoding="utf-8")
    data = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1]
    assert text == play.TEMPLATE.read_text(encoding="utf-8").replace("{{DATA}}", data)
    assert len(text.encode()) < 4e6
    assert "http" not in text.replace(data, "")  # nothing comes from a network


@needs_browser
def test_the_agent_follows_three_flips_and_every_control_does_what_it_says(tmp_path):
    report = report_of(tmp_path, PAGE)
    run = report["run"]
    assert run["lowest"] > 0.9  # cos θ: the pole stays up
    assert run["mean"] > 0.8
    assert len(run["crossed"]) == 3 and all(1 <= steps <= 40 for steps in run["crossed"])
    assert [force for force in run["pushed"] if force] == [0.4, -0.4]
    assert run["said"][0] == "The pole stands. Now flip the motor."
    assert run["said"][5] == (
        f"The motor was flipped 100 steps ago. z crossed over after {run['crossed'][0]} steps."
    )
    assert run["said"][9] == "You pushed the pole in its middle."
    controls = report["controls"]
    changes = {
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
        "release": [0.2, 0],
        "other motor": [True, False],
        "turn": [False, True],
        "flip during a turn": [controls["flip during a turn"][0]] * 2,
        "steered right": [0.5],
        "steered nowhere": [0],
        "wiring shown": ["Wiring hidden"],
        "length of a turn": [10, True],
        "after the turn": [True, False],
    }
    assert {name: controls[name] for name in changes} == changes
    assert controls["reset with the motor reversed"] == [
        "The pole stands, with the motor still reversed. Now flip it back."
    ]
    learned = tuple(reward > 0.8 for reward in data_of(PAGE.read_text("utf-8"))["rewards"])
    ends = {
        (True, True): "is told neither.",
        (True, False): "balance with one only: motor as usual.",
        (False, True): "balance with one only: motor reversed.",
        (False, False): "never learned to balance either.",
    }
    assert controls["beside"][0].endswith(ends[learned])
    assert controls["told of a pull"] == ["You pushed the pole in its middle."]
    flipped, lines = controls["a flip while frozen"]
    assert "but ω is frozen" in lines[0] and re.search(r"z crossed over after \d+ steps", lines[0])
    assert flipped == [True, True]  # z crosses over, the pole falls
    assert lines[1].endswith("The pole is still down.")
    assert "1.20 m, outside of what training showed" in controls["told"][0]
    agent, reader = controls["scores"]
    assert agent > 800 and 0 < reader < 200  # the reader's points end with the fall
    assert controls["points at the fall"][0] == pytest.approx(reader)
    words = f"You got {reader:.0f} points, the agent {agent:.0f} of 1000. Your pole fell after"
    assert controls["verdict"][0].startswith(words)
    *clock, after_an_hour = report["clock"]
    assert clock == [20, 10, 0] and 24 <= after_an_hour <= 25  # a quarter of a second at most
    assert report["milliseconds"] < 10  # a step takes less time than it simulates


@needs_browser
@pytest.mark.parametrize("env", ["di_inv", "di_perm"])
def test_the_page_of_a_double_integrator_runs(tmp_path, env):
    text, _ = play.page(play.load(save(tmp_path, env=env), play.SHOWN))
    page = tmp_path / "page.html"
    page.write_text(text, encoding="utf-8")
    report = report_of(tmp_path, page)
    assert report["controls"]["length"] == [1, 1.2]
    assert report["controls"]["flip by key"] == [False, True]
    assert report["controls"]["length of a turn"] == [10, True]
    assert ("swapped" if env == "di_perm" else "flipped") in report["run"]["said"][5]


@needs_browser
@pytest.mark.parametrize("size", [(390, 844), (1280, 800)])
def test_a_picture_of_the_page_is_not_blank(tmp_path, size):
    Image = pytest.importorskip("PIL.Image")
    path = tmp_path / "page.png"
    window = f"--window-size={size[0]},{size[1]}"
    browse(tmp_path, PAGE.as_uri(), window, "--virtual-time-budget=500", f"--screenshot={path}")
    picture = np.asarray(Image.open(path).convert("L"), dtype=float)
    assert picture.shape == size[::-1]
    for part in np.array_split(picture, 4):  # from top to bottom: words, pictures, controls
        assert part.std() > 5
    assert 0.02 < (np.abs(picture - np.median(picture)) > 60).mean() < 0.5
