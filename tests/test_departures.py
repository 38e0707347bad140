"""Tests of studies/departures.py: each departure against what the published code does."""

import copy
import itertools
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "studies")]
import departures  # noqa: E402

import aib_envs  # noqa: E402
import dmash  # noqa: E402

K, T = 24, 100  # of di_inv
SMALL = (
    "--env di_inv --contexts 4 --batch 16 --threads 1 --hidden 8 --hyper-hidden 8 --bottleneck 4"
)
SMALL = f"{SMALL} --random-steps 130 --rollouts 1"


def trained(name, folder, steps=120, **settings):
    """A run past 150 random steps and 120 gradient steps, which lead over two resets.

    name: a method, a dot and its departures; of a method alone, a run of dmash.py as it stands.
    """
    method, dot, departures_of_it = name.partition(".")
    small = dict(env="di_inv", method=method, contexts=4, batch=64, hidden=8, subsample=1)
    small |= dict(threads=1, seed=3, hyper_hidden=8, bottleneck=4, encoder_hidden=8)
    if dot:
        small["departures"] = departures_of_it
    run = dmash.Run(dmash.Config(**small | settings), folder)
    for _ in range(150):
        run.rollout.collect(random=True)
    for _ in range(steps):
        run.gradient_step()
    return run


@pytest.fixture
def departing(request, tmp_path):
    with departures.departed(request.param.partition(".")[2]):
        yield trained(request.param, tmp_path)


def departs(*methods):
    return pytest.mark.parametrize("departing", methods, indirect=True)


def times_of(batch, replay):
    """When each transition of a batch happened, (N, size / N), by looking for it in the replay."""
    found = torch.cat([batch.s, batch.a, batch.ds], -1).unflatten(0, (replay.N, -1))
    rows = replay.rows[..., :-1].transpose(0, 1)  # (N, capacity, ·)
    rows = rows[:, : replay.t]
    same = (found.unsqueeze(2) == rows.unsqueeze(1)).all(-1)  # (N, size / N, capacity)
    assert (same.sum(-1) == 1).all()
    row = same.int().argmax(-1)
    return replay.t - 1 - (replay.t - 1 - row) % replay.capacity


def flat(values):
    """All tensors of a state dict, one after the other."""
    if torch.is_tensor(values):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    if not isinstance(values, list):
        return []
    return [tensor for value in values for tensor in flat(value)]


@pytest.mark.parametrize("method", ["dma_star_sh", "dma_pearl", "concat"])
def test_without_a_departure_nothing_changes(method, tmp_path):
    plain = trained(method, tmp_path)
    with departures.departed(""):
        other = trained(f"{method}.", tmp_path)
    assert type(other.agent) is not type(plain.agent)
    assert type(other.rollout.replay) is not type(plain.rollout.replay)
    assert torch.equal(other.rollout.replay.rows, plain.rollout.replay.rows)
    weights = plain.agent.state_dict()
    for name, weight in other.agent.state_dict().items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.parametrize("name", departures.PUBLISHED)
def test_each_departure_changes_the_run(name, tmp_path):
    plain = trained("dma_star", tmp_path)
    with departures.departed(name):
        other = trained(f"dma_star.{name}", tmp_path)
    assert not torch.equal(other.agent.Q.Q1.head.weight, plain.agent.Q.Q1.head.weight)


@departs("dma_star_sh.included", "dma_star.published")
def test_included_windows_end_with_the_transition_itself(departing):
    replay = departing.rollout.replay
    batch = replay.sample(64)
    itself = torch.cat([batch.s, batch.a, batch.ds], -1).unsqueeze(1)  # windows are in any order
    assert (batch.tau == itself).all(-1).any(-1).all()
    past = replay.latest(False)
    assert (
        past[:, -1:] == replay.rows[replay.t - 1, :, :-1].unsqueeze(1)
    ).all()  # acting knows no more


@departs("dma_star_sh.terminal", "concat.terminal", "dma_star.terminal+same_index")
def test_terminal_targets_end_where_episodes_end(departing, monkeypatch):
    replay, agent = departing.rollout.replay, departing.agent
    batch = replay.sample(2048)
    ends = sum(times_of(batch, replay) == time for time in (K + T - 1, 2 * (K + T) - 1)).flatten()
    assert 0 < ends.sum() < 200
    told = []
    plain = dmash.critic_loss

    def noting(*args):
        told.append((args, torch.get_rng_state(), plain(*args)))
        return told[0][2]

    monkeypatch.setattr(dmash, "critic_loss", noting)
    before = copy.deepcopy([agent.pi, agent.Q, agent.Q_target])
    agent.update(batch, 1)
    (_, _, _, alpha, omega, *_), state, found = told[0]
    torch.set_rng_state(state)
    pi, Q, Q_target = before
    a2, log_prob = pi.sample(batch.s2, omega)
    value = Q_target(batch.s2, a2, omega).min(1).values - alpha * log_prob
    target = (batch.r + (1 - ends) * 0.99 * value).detach()
    q = Q(batch.s, batch.a, omega)
    expected = (q[:, 0] - target).square().mean() + (q[:, 1] - target).square().mean()
    assert torch.allclose(found, expected)


@departs("dma_star_sh.fresh", "dma_star.published", "dma_pearl.fresh")
def test_fresh_draws_give_each_loss_a_code_of_its_own(departing, monkeypatch):
    told, drawn, learned = [], [], []

    def note(name, position):
        plain = getattr(dmash, name)

        def noting(*args):
            code = args[position]
            told.append(code.b_up if isinstance(code, dmash.Omega) else code)
            result = plain(*args)
            drawn.append(result)
            return result

        monkeypatch.setattr(dmash, name, noting)

    for name, position in {"dynamics_loss": 1, "critic_loss": 4, "actor_loss": 3}.items():
        note(name, position)
    plain_loss = dmash.temperature_loss
    monkeypatch.setattr(
        dmash, "temperature_loss", lambda *args: learned.append(args[1]) or plain_loss(*args)
    )
    windows = []
    batch = departing.rollout.replay.sample(64)
    read = batch.windows
    batch.windows = lambda: windows.append(read()) or windows[-1]
    departing.agent.update(batch, 2)
    assert len(told) == 4 and [code.requires_grad for code in told] == [True, False, False, False]
    for one, other in itertools.combinations(told, 2):
        assert not torch.allclose(one, other)
    again = 4 if departing.cfg.method == "dma_pearl" else 3  # and once for its KL term
    assert len(windows) == again
    for one, other in itertools.combinations([batch.tau, *windows], 2):
        assert not torch.equal(one, other)
        assert torch.equal(
            one.sort(1).values, other.sort(1).values
        )  # the whole window, subsample 1
    for (_, logp), fresh in zip(drawn[2:], learned):
        assert not fresh.requires_grad and not torch.allclose(logp, fresh)


@departs("dma_star_sh.apart", "da.apart", "dma_star.published")
def test_warm_ups_apart_fill_windows_but_no_batch(departing, monkeypatch):
    rollout, replay, agent = departing.rollout, departing.rollout.replay, departing.agent
    # 150 random steps without a warm-up, the rest of that episode, then a warm-up and an episode
    assert replay.t == 150 + 120 + K and departing.step == 120
    times = times_of(replay.sample(4096), replay)
    if "finished" in rollout.names:
        assert set(times.flatten().tolist()) == set(range(K, 200))
    else:
        warm_up = range(200, 200 + K)
        assert set(times.flatten().tolist()) == set(range(K, replay.t)) - set(warm_up)
    if agent.g:
        n, first = torch.zeros(1, dtype=torch.long), torch.tensor([200 + K])
        window = replay.rows[200 : 200 + K, 0, :-1]
        assert torch.equal(replay.windows(n, first, False)[0], window)
    acted = []
    act = agent.act
    monkeypatch.setattr(
        agent, "act", lambda s, told, noisy: acted.append(noisy) or act(s, told, noisy)
    )
    rollout.begin_episode()
    rollout.step()
    assert acted == [False] * K + [True]
    rollout.begin_episode(random=True)
    assert len(acted) == K + 1 and rollout.replay.t == 150 + 120 + 2 * K + 1


@departs("dma_star.same_index", "dr.same_index", "dma_star_sh.published")
def test_same_index_draws_the_same_times_in_all_contexts_but_the_first(departing):
    replay = departing.rollout.replay
    times = times_of(replay.sample(48), replay)  # (4, 12)
    assert torch.equal(times[1], times[2]) and torch.equal(times[1], times[3])
    assert not torch.equal(times[0], times[1])
    assert len(times.unique()) > 15


def test_same_index_in_numbers_of_the_paper(tmp_path):
    """Some 24 different times in a batch of 240, where independent draws give 234 pairs or so."""
    with departures.departed("same_index"):
        cfg = dmash.Config("ode", method="dr", departures="same_index", hidden=8, threads=1)
        run = dmash.Run(cfg, tmp_path)
        for _ in range(1000):
            run.rollout.collect(random=True)
        replay = run.rollout.replay
        times = times_of(replay.sample(256), replay)
    assert times.shape == (20, 12) and 20 < len(times.unique()) <= 24


@departs("dma_star.same_start", "concat.published")
def test_same_start_in_training_and_evaluation(departing, monkeypatch):
    rollout = departing.rollout
    starts = []
    for _ in range(3):
        rollout.reset()
        starts.append(rollout.s)
        assert (rollout.s == rollout.s[:1]).all()
    assert not torch.equal(starts[0], starts[1])
    seen = []
    reset = dmash.Rollout.reset
    monkeypatch.setattr(dmash.Rollout, "reset", lambda one: reset(one) or seen.append(one.s))
    contexts = aib_envs.context_sets("di_inv", 4)["eval_out"]
    returns, diverged = dmash.evaluate(departing.agent, departing.cfg, contexts, rollouts=2)
    assert (
        returns.shape == diverged.shape == (4, 2) and len(seen) == 4
    )  # a warm-up and an episode each
    assert all((s == s[:1]).all() for s in seen)
    assert len({tuple(s[0].tolist()) for s in seen}) == 4
    first, _ = dmash.evaluate(departing.agent, departing.cfg, contexts)
    assert (first[:, 0] == returns[:, 0]).all()
    other, _ = dmash.evaluate(departing.agent, departing.cfg, contexts, seed=4)
    assert len(seen) == 8 and not torch.equal(seen[4], seen[6]) and other.shape == (4, 1)


@departs("dma_star.finished", "concat.finished+same_index")
def test_finished_batches_hold_no_transition_of_the_running_episode(departing):
    replay = departing.rollout.replay
    assert replay.t == 150 + 120 + 3 * K  # the third of three episodes with their warm-ups runs
    times = times_of(replay.sample(8192), replay)
    assert times.max() == 2 * (K + T) - 1 and times.min() == K


def test_finished_needs_an_episode(tmp_path, capsys):
    command = f"{SMALL} --as finished --steps 2 --out {tmp_path} --random-steps 90".split()
    assert departures.main(command) == 2
    assert "error: --random-steps: must fill an episode" in capsys.readouterr().err


def test_a_ring_that_wraps_around(tmp_path):
    """The oldest rows are lost, and the marks with them."""
    with departures.departed("terminal+apart+finished"):
        run = trained("dr.terminal+apart+finished", tmp_path, steps=400, buffer=300)
        replay = run.rollout.replay
        assert replay.t == 150 + 400 + 4 * K
        oldest = replay.t - 300 + K
        starts = 200 + K, 200 + T + 2 * K, 200 + 2 * T + 3 * K  # of the three finished episodes
        expected = [time for start in starts for time in range(start, start + T) if time >= oldest]
        assert replay.times().tolist() == expected
        batch = replay.sample(4096)
        times = times_of(batch, replay).flatten()
        ended = sum(times == start + T - 1 for start in starts)
        assert torch.equal(batch.discounts, 1.0 - ended) and ended.any()


@departs("dma_star_sh.epsilon")
def test_epsilon_in_the_log_probability(departing):
    agent, batch = departing.agent, departing.rollout.replay.sample(64)
    _, omega = agent.infer(batch.tau, False)
    s = 100 * batch.s  # where tanh saturates
    torch.manual_seed(0)
    a, logp = agent.pi.sample(s, omega)
    torch.manual_seed(0)
    mu, log_std = agent.pi(s, omega)
    normal = torch.distributions.Normal(mu, log_std.exp())
    u = normal.rsample()
    expected = (normal.log_prob(u) - torch.log(1 - u.tanh() ** 2 + 1e-6)).sum(-1)
    assert torch.allclose(a, u.tanh()) and torch.allclose(logp, expected, rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    plain = departures.EpsilonActor.__base__.sample(agent.pi, s, omega)[1]
    assert not torch.allclose(logp, plain, rtol=1e-4, atol=1e-4)


@departs(*(f"dma_star_sh.{name}" for name in departures.INTO_ETA))
def test_rl_losses_that_reach_eta_are_stepped_as_by_hand(departing):
    """An update with the policy against one by hand, in which each loss has an Adam of its own."""
    lr = departing.cfg.dynamics_lr
    run = departing
    run.agent.optimizers = dmash.new_agent(run.cfg).optimizers  # Adam's averages begin at zero
    agent = departures.Agent(run.cfg, 4, 2, 2)
    agent.load_state_dict(run.agent.state_dict())
    hand = copy.deepcopy(agent)
    batch = run.rollout.replay.sample(64)
    torch.manual_seed(0)
    agent.update(batch, 2)

    torch.manual_seed(0)
    name = run.cfg.departures
    adams = {loss: torch.optim.Adam(hand.h.parameters(), lr) for loss in ("critic", "actor")}
    rest = torch.optim.Adam([*hand.g.parameters(), *hand.h.parameters(), *hand.f.parameters()], lr)
    critics = torch.optim.Adam(hand.Q.parameters(), run.cfg.critic_lr)
    policy = torch.optim.Adam(hand.pi.parameters(), run.cfg.actor_lr)
    temperature = torch.optim.Adam([hand.log_alpha], run.cfg.alpha_lr)

    def minimise(loss, *optimizers):
        for optimizer in (*adams.values(), rest, critics, policy, temperature):
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    z, omega = hand.infer(batch.tau, True)
    z = z.detach()
    minimise((hand.f(batch.s, batch.a, omega) - batch.ds).square().mean(), rest)
    if name in ("critic_into_eta", "both_into_eta"):
        networks = hand.pi, hand.Q, hand.Q_target, hand.alpha
        loss = dmash.critic_loss(*networks, hand.h(z), batch, 0.99)
        minimise(loss, critics, adams["critic"])
    else:
        networks = hand.pi, hand.Q, hand.Q_target, hand.alpha
        minimise(dmash.critic_loss(*networks, omega.detach(), batch, 0.99), critics)
    for _ in range(2):
        told = omega.detach() if name == "critic_into_eta" else hand.h(z)
        a, log_prob = hand.pi.sample(batch.s, told)
        for_critics = told.detach() if name == "through_pi" else told
        loss = (hand.alpha * log_prob - hand.Q(batch.s, a, for_critics).amin(1)).mean()
        if name == "critic_into_eta":
            minimise(loss, policy)
        else:
            minimise(loss, policy, adams["actor"])
        minimise(-(hand.log_alpha.exp() * (log_prob.detach() - 2)).mean(), temperature)
    for (weight, found), expected in zip(agent.named_parameters(), hand.parameters()):
        if not weight.startswith("Q_target"):
            assert torch.allclose(found, expected, atol=1e-6), weight


def test_into_eta_takes_a_shared_hypernetwork(capsys):
    assert departures.main("--as both_into_eta --method dma_star".split()) == 2
    assert "both_into_eta: dma_star has no shared hypernetwork" in capsys.readouterr().err


@departs("concat.scaled", "da.scaled")
def test_scaled_contexts_span_one_in_training_and_more_beyond(departing, monkeypatch):
    agent, told = departing.agent, departing.rollout.replay.sample(64).c
    least, most = told.aminmax(dim=0)
    assert torch.equal(least, -torch.ones(2)) and torch.equal(most, torch.ones(2))
    assert torch.equal(departing.rollout.step()[3], told)  # what acting is told
    contexts = [{"mass": 1.25, "action_factor": -1.0}, {"mass": 2.0, "action_factor": 1.0}]
    low, high = aib_envs.MASS.train
    seen = []
    act = agent.act
    monkeypatch.setattr(
        agent, "act", lambda s, told, noisy: seen.append(told) or act(s, told, noisy)
    )
    dmash.evaluate(agent, departing.cfg, contexts)
    expected = [
        [(c["mass"] - (low + high) / 2) / (high - low) * 2, c["action_factor"]] for c in contexts
    ]
    assert torch.allclose(seen[0], torch.tensor(expected))


# ---- The command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, method",
    [
        ("--as published --method dma_star", "dma_star.published"),
        ("--method concat --as same_index+terminal", "concat.same_index+terminal"),
        ("--as=fresh --method=dr", "dr.fresh"),
        ("--as epsilon", "dma_star_sh.epsilon"),
        ("--as epsilon+scaled --method da", "da.epsilon+scaled"),
        ("--as " + "+".join(reversed(departures.PUBLISHED)), "dma_star_sh.published"),
        ("--method through_pi", "dma_star_sh.through_pi"),
        ("--method fresh --as both_into_eta", "dma_star_sh.both_into_eta+fresh"),
    ],
)
def test_a_departure_trains_goes_on_and_leaves_dmash_as_it_was(words, method, tmp_path, capsys):
    """A run in two parts, of which the second knows the checkpoint alone, against one in one."""
    command = f"{words} {SMALL} --eval-every 2".split()
    before = dict(vars(dmash))
    assert departures.main([*command, "--steps", "4", "--out", str(tmp_path / "whole")]) == 0
    assert departures.main([*command, "--steps", "2", "--out", str(tmp_path)]) == 0
    assert {key for key in before if before[key] is not vars(dmash)[key]} == set()
    folder = tmp_path / f"di_inv__{method}__s1"
    for name in ("policy.pt", "config.json", "metrics.csv", "per_context.csv"):
        (folder / name).unlink()
    assert departures.main(["--resume", str(folder), "--steps", "4"]) == 0
    assert departures.main(["--eval", str(folder), "--rollouts", "1"]) == 0
    assert f"di_inv, {method.partition('.')[0]}, seed 1, step 4, " in capsys.readouterr().out
    states = [
        dmash.load(place / folder.name / "checkpoint.pt")
        for place in (tmp_path, tmp_path / "whole")
    ]
    parts, whole = (
        flat({name: s[name] for name in ("agent", "optimizers", "rollout")}) for s in states
    )
    assert len(parts) == len(whole) and all(map(torch.equal, parts, whole))


def test_a_run_goes_on_by_the_same_line(tmp_path, capsys):
    command = f"--as published --method dma_star {SMALL} --out {tmp_path} --go-on --steps".split()
    assert departures.main([*command, "1"]) == 0 and departures.main([*command, "2"]) == 0
    assert "step 2 " in capsys.readouterr().out


def test_a_run_that_was_stopped_goes_on_by_the_line_it_prints(tmp_path, monkeypatch, capsys):
    command = f"--as terminal {SMALL} --steps 4 --out {tmp_path}".split()
    folder = tmp_path / "di_inv__dma_star_sh.terminal__s1"
    with monkeypatch.context() as patch:
        step = dmash.Run.gradient_step

        def interrupted(run):
            step(run)
            signal.raise_signal(signal.SIGINT)

        patch.setattr(dmash.Run, "gradient_step", interrupted)
        assert departures.main(command) == 128 + signal.SIGINT
    last = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(last)
    assert "stopped at step 1;" in last and words[-1] == f"--resume={folder}"
    assert departures.main(words[-1:]) == 0
    assert "step 4 " in capsys.readouterr().out
    blank = shutil.copytree(folder, tmp_path / "a copy")
    assert departures.main([f"--eval={blank}", "--rollouts", "1"]) == 0
    assert departures.main(["--eval", str(folder / "policy.pt"), "--rollouts", "1"]) == 0
    assert departures.main(["--resume", str(blank)]) == 0


def test_help_tells_each_departure(capsys):
    with pytest.raises(SystemExit) as stop:
        departures.main(["--help"])
    assert stop.value.code == 0
    words = capsys.readouterr().out.split()
    assert set(departures.DEPARTURES) <= set(words)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--method dr", "--as: required, one of published, included, terminal, fresh, apart"),
        ("--as terminals --method dr", "unknown departure 'terminals' (did you mean terminal?)"),
        ("--as terminal --method drr", "unknown method 'drr'"),
        ("--as terminal+ --method dr", "unknown departure ''"),
        ("--as", "--as: expected one argument"),
        ("--as terminal --stepss 3", "unrecognized arguments: --stepss 3"),
        ("--resume nowhere", "nowhere cannot be read ("),
    ],
)
def test_bad_input_is_one_line(words, message, capsys):
    assert departures.main(words.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("departures.py: error: ") and message in said and said.count("\n") == 1
