"""Tests of the studies: short, and on small settings."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import benchmark
import departures
import pytest
import torch

import aib_envs
import dmash

HERE = Path(__file__).resolve().parent
SMALL = "--env di_inv --contexts 4 --batch 16 --threads 1 --hidden 32 --hyper-hidden 8 --bottleneck 4".split()


@pytest.fixture
def short(monkeypatch):
    """Few and short turns."""
    monkeypatch.setattr(benchmark, "STEPS", 2)
    monkeypatch.setattr(benchmark, "TURNS", {"methods": 2, "against": 4})


def refusal(arguments, capsys):
    """What `benchmark.py` says when it refuses arguments: one line, and exit status 2."""
    with pytest.raises(SystemExit) as stop:
        benchmark.main(arguments)
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == "" and said.err.count("\n") == 1, said
    assert said.err.startswith("benchmark.py: error: ")
    return said.err


@pytest.mark.parametrize("method", ["dma_star_sh", "dr"])
def test_benchmark_prints_every_phase_and_the_phases_sum_to_the_total(method, capsys):
    benchmark.main([*"--env di_inv --contexts 4 --batch 16 --threads 1 --method".split(), method])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    ms = {words[0]: float(words[1]) for words in lines if words[-1] == "ms" and len(words) == 3}
    total = ms.pop("total")
    assert tuple(ms) == benchmark.PHASES
    assert sum(ms.values()) == pytest.approx(total, abs=0.01 * len(ms))  # two decimals each
    assert (ms["dynamics"] > 0) == (method == "dma_star_sh")
    first = [words[0] for words in lines]
    for word in "gradient vector peak update matrix ratio".split():
        assert word in first, word


@pytest.mark.parametrize("method", ["dma_star_sh", "both_into_eta", "dr"])
def test_time_is_counted_in_the_phase_that_spends_it(method, monkeypatch):
    """On a clock that stands still but for what is planted: a different time in each part of a gradient step."""
    cfg, now = dmash.Config(env="di_inv", method=method, contexts=4, batch=16, threads=1, hidden=8), 0
    run, steps = benchmark.warm_run(cfg), 100  # one episode

    def plant(owner, name, ticks):
        function = getattr(owner, name)

        def call(*args, **kwargs):
            nonlocal now
            now += ticks
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    names = "dynamics_loss", "critic_loss", "actor_loss", "temperature_loss", "require_finite"
    for i, name in enumerate(names):
        plant(dmash, name, 10**i)
    plant(run.agent, "tell", 10**5)
    plant(run.agent, "act", 10**6)
    plant(run.rollout.envs, "step", 10**7)
    plant(run.rollout.replay, "sample", 10**8)
    plant(dmash.torch, "_foreach_lerp_", 10**9)  # of the targets
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now)
    seconds, total = benchmark.phase_seconds(run, steps)
    acted = steps + cfg.K  # with the warm-up
    expected = {"acting": acted * (10**5 + 10**6), "environments": acted * 10**7, "batch": steps * 10**8}
    expected |= {"dynamics": 0, "critic": steps * 10, "actor": steps * (10**2 + 10**3)}
    expected["dynamics" if run.agent.f else "critic"] += steps * 10**5  # told at the start of an update
    expected["dynamics"] += steps if run.agent.f else 0
    assert seconds == expected | {"targets": steps * 10**9, "rest": steps * 10**4}
    assert total == sum(seconds.values())


@pytest.mark.parametrize("env, has_models", [("di_inv", False), ("cartpole_inv", True)])
def test_vector_step_against_the_bare_mj_step_calls(env, has_models):
    vector, bare = benchmark.vector_step_times(env, contexts=3, steps=20)
    assert vector > 0 and (bare > 0 if has_models else bare is None)


def test_methods_lists_them_all(short, capsys):
    benchmark.main([*SMALL, "--methods"])
    _, head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head[0] == "--method" and [row[0] for row in rows] == list(dmash.METHODS)
    table = {row[0]: (float(row[-4]), row[-3], int(row[-2].replace(",", "")), row[-1]) for row in rows}
    assert all(rate > 0 for rate, *_ in table.values())
    assert table["da"][1] == table["da"][3] == "1.00"
    agent = dmash.new_agent(dmash.Config(env="di_inv", contexts=4, hidden=32, hyper_hidden=8, bottleneck=4))
    networks = [agent.g, agent.h, agent.f, agent.pi, agent.Q]
    assert table["dma_star_sh"][2] == sum(p.numel() for network in networks for p in network.parameters())


def against(folder, capfd):
    """Milliseconds here and there, and the ratio."""
    benchmark.main([*SMALL, "--against", str(folder)])
    here, there, ratio = [line.split() for line in capfd.readouterr().out.splitlines()[1:]]
    assert (here[:2], there[:2], ratio[0]) == (["this", "checkout"], ["the", "other"], "ratio")
    return float(here[2]), float(there[2]), float(ratio[1])


def test_a_checkout_against_itself(short, capfd):
    here, there, ratio = against(HERE.parent, capfd)
    assert here > 0 and there > 0 and ratio > 0


def test_against_runs_the_code_of_the_other_folder(short, capfd, tmp_path):
    """A copy in which a gradient step takes 0.1 s more, and in which a setting has another name."""
    shutil.copy(HERE.parent / "aib_envs.py", tmp_path)
    text = (HERE.parent / "dmash.py").read_text().replace("polyak", "averaging")
    text, main = text.split('if __name__ == "__main__":')
    slow = "step = Run.gradient_step\nRun.gradient_step = lambda run: (time.sleep(0.1), step(run))\n"
    (tmp_path / "dmash.py").write_text(f"{text}{slow}")
    here, there, ratio = against(tmp_path, capfd)
    assert there > 100 and ratio < 1
    assert "polyak" in refusal([*SMALL, "--polyak", "0.01", "--against", str(tmp_path)], capfd)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--env cartpole", "unknown environment 'cartpole'"),
        ("--method dma_star_shh", "unknown method 'dma_star_shh'"),
        ("--batch many", "--batch many: must be a whole number"),
        ("--steps 5", "unrecognized arguments: --steps 5"),
        ("--methods --method dr", "--method: not with --methods"),
        ("--methods --against .", "not allowed with argument"),
        (f"--against {HERE}", f"--against {HERE}: no dmash.py there"),
        ("--against nowhere", "--against nowhere: no dmash.py there"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert message in refusal(arguments.split(), capsys)


def test_benchmark_runs_from_any_folder_without_installing(tmp_path):
    command = [sys.executable, str(HERE / "benchmark.py"), "--env", "cartpole"]
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stdout == "" and refused.stderr.count("\n") == 1, refused.stderr
    assert not list(tmp_path.iterdir())


def test_help_names_the_settings_that_have_an_effect(capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--help"])
    text = capsys.readouterr().out
    assert not stop.value.code and "--batch" in text and "--steps" not in text


# ---- departures.py --------------------------------------------------------------------------------------------------


@pytest.fixture
def departing(request, tmp_path):
    """A run of a departure, past the random steps and 120 gradient steps: over a reset, as an episode has 100."""
    with departures.departed(request.param):
        cfg = dmash.Config(env="di_inv", method=request.param, contexts=4, batch=64, hidden=8, subsample=1, threads=1)
        run = dmash.Run(cfg, tmp_path)
        for _ in range(150):
            run.rollout.collect(random=True)
        for _ in range(120):
            run.gradient_step()
        yield run


@pytest.mark.parametrize("departing", ["included"], indirect=True)
def test_included_windows_end_with_the_transition_itself(departing):
    batch = departing.rollout.replay.sample(64)
    itself = torch.cat([batch.s, batch.a, batch.ds], -1).unsqueeze(1)  # (B, 1, 2 d_s + d_a); the window is in any order
    assert (batch.tau == itself).all(-1).any(-1).all()
    last = departing.rollout.replay.rows[departing.rollout.replay.t - 1, :, :-1].unsqueeze(1)
    assert (departing.rollout.replay.latest(False)[:, -1:] == last).all()  # acting cannot know more


@pytest.mark.parametrize("departing", ["terminal"], indirect=True)
def test_terminal_targets_end_where_episodes_end(departing, monkeypatch):
    replay = departing.rollout.replay
    batches = [replay.sample(1024) for _ in range(4)]
    ends = torch.cat([batch.s2[batch.goes_on == 0] for batch in batches])
    lasts = replay.rows[[123, 247]]  # warm-up 24, horizon 100, twice
    known = lasts[..., :4] + lasts[..., 6:10]  # s + δs
    assert len(ends) and all((known.reshape(-1, 4) == end).all(-1).any() for end in ends)
    batch, agent = batches[0], departing.agent
    batch.goes_on[:] = 0
    told = agent.tell(batch.tau, batch.c, False)[1]
    loss = dmash.critic_loss(agent.pi, agent.Q, agent.Q_target, agent.alpha, told, batch, 0.99)
    q = agent.Q(batch.s, batch.a, told)
    assert torch.allclose(loss, (q - batch.r.unsqueeze(-1)).square().mean(0).sum())


@pytest.mark.parametrize("departing", ["fresh"], indirect=True)
def test_fresh_masks_give_each_loss_an_omega_of_its_own(departing, monkeypatch):
    seen = []
    for name in ("dynamics_loss", "critic_loss", "actor_loss"):
        function = getattr(dmash, name)

        def spy(*args, function=function):
            seen.append(next(a for a in args if isinstance(a, dmash.Omega)))
            return function(*args)

        monkeypatch.setattr(dmash, name, spy)
    departing.agent.update(departing.rollout.replay.sample(64), 2)
    assert len(seen) == len({omega.b_up.detach().sum().item() for omega in seen}) == 4
    assert [omega.b_up.requires_grad for omega in seen] == [True, False, False, False]


@pytest.mark.parametrize("departing", ["apart"], indirect=True)
def test_warm_ups_apart_are_read_but_not_learned_from(departing):
    rollout, replay = departing.rollout, departing.rollout.replay
    assert replay.t == 150 + 120 and replay.recent.t == replay.t + 24  # one warm-up, the first that is not random
    rollout.begin_episode()
    assert replay.t == 150 + 120 and replay.recent.t == replay.t + 48 and rollout.noisy
    window, rows = rollout.replay.latest(False), replay.recent.rows.transpose(0, 1)[..., :-1]
    assert torch.equal(window.sort(1).values, rows.sort(1).values)


@pytest.mark.parametrize("departing", ["through_pi"], indirect=True)
def test_through_pi_teaches_eta_by_the_policys_omega_alone(departing):
    agent, batch = departing.agent, departing.rollout.replay.sample(64)
    z, told, _ = agent.tell(batch.tau, batch.c, False)

    def slopes(loss_of, told):
        """∇_η of a policy loss, of one draw of noise."""
        torch.manual_seed(0)
        loss, _ = loss_of(agent.pi, agent.Q, agent.alpha, told, batch)
        return torch.autograd.grad(loss, list(agent.h.parameters()), retain_graph=True)

    def by_hand(pi, Q, alpha, told, batch):
        a, logp = pi.sample(batch.s, told)
        return (alpha * logp - Q(batch.s, a, told.detach()).amin(1)).mean(), None

    found, right, plain = (slopes(f, told) for f in (dmash.actor_loss, by_hand, departures.PLAIN_ACTOR_LOSS))
    assert agent.reopened("actor", z, None).b_up.requires_grad  # as in actor_into_eta
    assert all(torch.allclose(x, y) for x, y in zip(found, right))
    assert not all(torch.allclose(x, y) for x, y in zip(found, plain))


@pytest.mark.parametrize("departing", ["scaled_concat", "scaled_da"], indirect=True)
def test_scaled_contexts_span_one_in_training_and_more_beyond(departing, monkeypatch):
    agent, told = departing.agent, departing.rollout.replay.sample(64).c
    assert torch.equal(told.aminmax(dim=0)[0], -torch.ones(2)) and torch.equal(told.aminmax(dim=0)[1], torch.ones(2))
    assert torch.equal(departing.rollout.step()[3], told)  # what acting is told
    contexts = [{"mass": 1.25, "action_factor": -1.0}, {"mass": 2.0, "action_factor": 1.0}]
    middle = (aib_envs.MASS.train[0] + aib_envs.MASS.train[1]) / 2
    seen = []
    monkeypatch.setattr(agent, "act", lambda s, told, noisy, act=agent.act: seen.append(told) or act(s, told, noisy))
    dmash.evaluate(agent, departing.cfg, contexts)
    expected = [[(c["mass"] - middle) / (aib_envs.MASS.train[1] - middle), c["action_factor"]] for c in contexts]
    assert torch.allclose(seen[0], torch.tensor(expected))


@pytest.mark.parametrize("name", departures.DEPARTURES)
def test_a_departure_trains_goes_on_and_leaves_dmash_as_it_was(name, tmp_path, capsys):
    command = (
        f"--method={name} {' '.join(SMALL[:6])} --random-steps 30 --rollouts 1 --hidden 8 --out {tmp_path}".split()
    )
    before = dict(vars(dmash))
    assert departures.main([*command, "--steps", "2"]) == 0
    assert departures.main([*command, "--steps", "4", "--go-on"]) == 0
    assert {key for key in before if before[key] is not vars(dmash)[key]} == set()
    assert "step 4 " in capsys.readouterr().out and (tmp_path / f"di_inv__{name}__s1" / "policy.pt").is_file()


def test_a_departure_that_was_stopped_goes_on_by_the_line_it_prints(tmp_path, monkeypatch, capsys):
    command = f"--method terminal {' '.join(SMALL)} --random-steps 30 --rollouts 1 --steps 4 --out {tmp_path}".split()
    folder = tmp_path / "di_inv__terminal__s1"
    monkeypatch.setattr(sys, "argv", ["studies/departures.py", *command])
    with monkeypatch.context() as patch:
        step = dmash.Run.gradient_step
        patch.setattr(dmash.Run, "gradient_step", lambda run: step(run) or signal.raise_signal(signal.SIGINT))
        assert departures.main(command) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"to go on: python studies/departures.py --resume {folder}")
    assert departures.main(last.split("departures.py ")[1].split()) == 0 and "step 4 " in capsys.readouterr().out
    assert departures.main(["--eval", str(folder), "--rollouts", "1"]) == 0
    assert capsys.readouterr().out.startswith("di_inv, terminal, seed 1, step 4,")
    blank = shutil.copytree(folder, tmp_path / "a copy")
    assert departures.main([f"--eval={blank}", "--rollouts", "1"]) == departures.main(["--resume", str(blank)]) == 0
    capsys.readouterr()
    assert departures.main(["--help"]) == 0 and capsys.readouterr().out.startswith(departures.__doc__)


def test_departures_refuse_other_methods(capsys):
    for words in (["--method", "dr"], ["--env", "ode", "--method"], []):
        assert departures.main(words) == 2
    assert "allowed: --method included, terminal, fresh, apart" in capsys.readouterr().err
    assert departures.main(["--resume", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("departures.py: error: nowhere cannot be read (")
