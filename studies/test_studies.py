"""Tests of the studies: short, and on small settings."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import aer
import benchmark
import compare
import departures
import numpy as np
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


# ---- compare.py plan --------------------------------------------------------------------------------------------


def said_by_compare(arguments, capsys, status=0):
    """What `compare.py` prints; in one line if it refuses."""
    assert compare.main([str(word) for word in arguments]) == status
    said = capsys.readouterr()
    if status:
        assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("compare.py: error: "), said
    return said.err if status else said.out


def planned(text, capsys):
    """The words behind `python dmash.py` of each line."""
    lines = [shlex.split(line) for line in said_by_compare(["plan", *shlex.split(text)], capsys).splitlines()]
    assert all(words[:2] == ["python", "dmash.py"] and words[-1] == "--go-on" for words in lines)
    return [words[2:-1] for words in lines]


def test_plan_has_a_line_for_each_run_seeds_outermost(capsys):
    lines = planned("--envs di_inv ode --methods dr concat --seeds 11-12 7 12", capsys)
    seen = [
        tuple(vars(dmash.build_parser().parse_args(words))[name] for name in ("seed", "env", "method"))
        for words in lines
    ]
    expected = [
        (seed, env, method) for seed in "11 12 7".split() for env in ("di_inv", "ode") for method in ("dr", "concat")
    ]
    assert seen == expected


def test_settings_come_through_plan_as_dmash_reads_them(capsys):
    text = "--quick --steps 1e4 --threads 1 --out 'my \"runs\" $HOME' --alpha-lr .002"
    (words,) = planned(f"--envs cartpole_inv --methods dma_star_sh --seeds 3 {text}", capsys)
    settings = {k: v for k, v in vars(dmash.build_parser().parse_args(words)).items() if v not in (None, False)}
    assert settings.pop("quick")
    there = dict(env="cartpole_inv", seed=3, steps=10_000, threads=1, out='my "runs" $HOME', alpha_lr=0.002)
    assert dmash.quick(**settings) == dmash.quick(**there)


def test_plan_is_worked_through_by_xargs_and_line_by_line(tmp_path, capsys):
    """As the docstring of compare.py says, with a `python` that only tells what it was given."""
    fake, plan = tmp_path / "python", "plan --envs di_inv --methods dr --seeds 1-2".split()
    fake.write_text('#!/bin/sh\nline=$(printf "<%s>" "$@")\necho "$line"\n')  # in one piece, as two write at once
    fake.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "2"}

    def told(pipe, *given):
        lines = said_by_compare([*plan, *given], capsys)
        (tmp_path / "plan.txt").write_text(lines)
        shell = dict(shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
        return sorted(subprocess.run(pipe, input=lines, **shell).stdout.splitlines())

    lines = [f"<dmash.py><--env><di_inv><--method><dr><--seed><{seed}>" for seed in (1, 2)]
    assert told("xargs -P 2 -I{} sh -c '{}'", "--quick") == [f"{line}<--quick><--go-on>" for line in lines]
    odd = [f"{line}<--out><a b's $HOME><--go-on>" for line in lines]
    assert told("tr '\\n' '\\0' | xargs -0 -P 2 -I{} sh -c '{}'", "--out", "a b's $HOME") == odd
    assert told('sed -n "${SLURM_ARRAY_TASK_ID}p" plan.txt | sh', "--out", "a b's $HOME") == odd[1:]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            "--envs cartpole --methods dr --seeds 1",
            "unknown environment 'cartpole' (did you mean cartpole_inv?); known:",
        ),
        ("--envs ode --methods drr --seeds 1", "unknown method 'drr' (did you mean dr?); known:"),
        (
            "--envs ode --methods dr --seeds 15-11",
            "--seeds 15-11: must be seeds such as 1 2 3, or ranges such as 11-15",
        ),
        ("--envs ode --methods dr --seeds 1,2", "--seeds 1,2: must be seeds"),
        ("--envs ode --methods dr --seeds 1-4000000000", "--seeds 1-4000000000: must be"),
        ("--envs ode --methods dr --seeds 4294967296", "--seed 4294967296: must be a whole number in [0, 4294967295]"),
        ("--envs ode --methods dr --seeds 1 --steps many", "--steps many: must be a whole number in [1, 1e9]"),
        ("--envs ode --methods dr concat --seeds 1 --mask .3", "--mask 0.3: dr has no encoder"),
        ("--envs ode --methods dr --seeds 1 --stepss 3", "unrecognized arguments: --stepss 3"),
        ("--envs ode --methods dr --seeds 1 --seed 3", "--seed: not here; allowed:"),
        ("--envs ode --methods dr --seeds 1 --resume x", "--resume: not here; allowed:"),
        ("--envs ode --methods dr --seeds 1 --out 'a\nb'", "must be one line"),
        ("--envs ode --seeds 1", "the following arguments are required: --methods"),
    ],
)
def test_bad_plan_is_one_line(arguments, message, capsys):
    assert message in said_by_compare(["plan", *shlex.split(arguments)], capsys, status=2)


# ---- compare.py report ------------------------------------------------------------------------------------------


def make_run(root, env, method, seed, level, steps=10, done=None, folder=None, **config):
    """A run folder as dmash.py writes it: returns `level` on train and eval_in, `level` - 4 on eval_out."""
    cfg = dmash.quick(env=env, method=method, seed=seed, steps=steps, contexts=4, threads=1)
    folder, metrics, contexts = Path(root) / (folder or cfg.folder.name), [], []
    folder.mkdir(parents=True)
    for step in range(5, (steps if done is None else done) + 1, 5):
        row = {"step": step, "env_steps": 4 * step, "seconds": 60.0 * seed, "dynamics_loss": float("nan")}
        for name, sets in aib_envs.context_sets(env, 4).items():
            row[name] = level * step / steps - 4 * (name == "eval_out")
            for i, c in enumerate(sets):
                contexts.append(
                    {"step": step, "set": name, "index": i, **c, "return": row[name] + i - 1.5, "diverged": 1}
                )
        metrics.append(row | {f"diverged_{name}": 4 for name in aer.SETS})
    versions = dict(version="v1", torch="2.0", numpy="2.0", mujoco="3.0", gymnasium="1.0")
    (folder / "config.json").write_text(json.dumps(asdict(cfg) | versions | config))
    for name, rows in (("metrics.csv", metrics), ("per_context.csv", contexts)):
        if rows:
            (folder / name).write_text(dmash.csv_text(rows))
    return folder


def report(capsys, *places, out, figures=False):
    """The parts of report.md by heading, the rows of report.csv; figures, which take longer, only where they matter."""
    with pytest.MonkeyPatch.context() as patch:
        if not figures:
            patch.setitem(sys.modules, "compare_figures", None)
        said_by_compare(["report", *places, "--out", out], capsys)
    parts = [part.split("\n", 1) for part in (out / "report.md").read_text().split("\n#")]
    return {head.strip("# "): text for head, text in parts}, list(csv.DictReader((out / "report.csv").open()))


def rows(text):
    """The other cells of each row of a table by its first one."""
    lines = [line[2:-2].replace("`", "").split(" | ") for line in text.splitlines() if line[:1] == "|"]
    return {line[0]: line[1:] for line in lines[2:]}


def test_tables_of_compare_agree_with_the_code_they_stand_for():
    for env, spec in aib_envs.ENVS.items():
        if env not in ("walker_gym", "hopper_gym"):
            kind = "overlapping" if spec.kind == aib_envs.OVER else "non-overlapping"
            assert aer.BOUNDS[kind][env] == spec.horizon, env
    assert set(aer.BOUND) == set(aib_envs.ENVS) - {"walker_gym", "hopper_gym"}
    plain = [method for method in dmash.METHODS if method not in departures.DEPARTURES]
    assert aer.METHODS == [*plain, *departures.DEPARTURES] and aer.SETS == dmash.SETS
    names = {f.name for f in fields(dmash.Config)}
    assert {*aer.APART, *aer.OWN} - set(aer.VERSIONS) <= names and not names & set(aer.VERSIONS)


def test_interquartile_mean_by_hand():
    for scores, mean in (([7], 7), ([1, 3], 2), ([1, 2, 6], 3), ([9, 1, 2, 4], 3), ([50, 1, 2, 3, -50], 2)):
        assert aer.iqm([np.array(scores, float)]) == mean
    strata = [np.array([0.0, 1, 2, 3]), np.array([4.0, 5, 6, 70])]  # all scores together
    assert aer.iqm(strata) == 3.5
    samples = [np.stack([x, x + 1]) for x in strata]
    assert aer.iqm(samples).tolist() == [3.5, 4.5]


X = [[0.45, 0.73, 0.66], [0.78, 0.93, 0.63], [0.94, 0.88, 0.56], [0.76, 0.94, 0.51], [0.56, 0.74, 0.79]]
Y = [[0.45, 0.86, 0.27], [0.76, 0.82, 0.8], [0.43, 0.53, 0.63], [0.41, 0.89, 0.72], [0.7, 0.62, 0.75]]


RLIABLE = (  # 1.2.0, with arch 7.2.0 and numpy 2.4.6: point, low and high of 50,000 samples
    (0.7255555555555556, 0.6477777777777779, 0.8088888888888888),
    (0.6622222222222223, 0.5533333333333332, 0.7533333333333334),
    (0.6333333333333333, 0.43333333333333335, 0.8133333333333334),
)


def rliable_numbers():
    """IQM of X, of Y, and P(X > Y), with intervals, by the package, or what it gave where it is not installed."""
    try:
        from rliable import library, metrics
    except ImportError:
        return RLIABLE
    scores = {"x": np.array(X), "y": np.array(Y)}
    found = library.get_interval_estimates(scores, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=2000)
    odds = lambda x, y: np.array([metrics.probability_of_improvement(x, y)])
    more = library.get_interval_estimates({"odds": tuple(scores.values())}, odds, reps=2000)
    points, ends = ({**of_one, **of_two} for of_one, of_two in zip(found, more))
    return [(points[name][0], *ends[name][:, 0]) for name in ("x", "y", "odds")]


def test_statistics_are_those_of_rliable():
    x, y = (list(np.array(scores).T) for scores in (X, Y))  # seeds x environments
    ours = [aer.estimate(aer.iqm, x), aer.estimate(aer.iqm, y), aer.estimate(aer.improvement, x, y)]
    for mine, theirs, fixed in zip(ours, rliable_numbers(), RLIABLE):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-9) and mine[0] == pytest.approx(fixed[0], abs=1e-9)
        assert mine[1:] == pytest.approx(fixed[1:], abs=0.015)  # Monte-Carlo error of 2,000 samples
        assert mine[1:] == pytest.approx(theirs[1:], abs=0.03)


def test_samples_draw_seeds_within_an_environment():
    """Two environments without spread, far from each other, give an interval without width."""
    apart = [np.array([1.0, 1, 1]), np.array([9.0, 9, 9])]
    assert aer.estimate(aer.iqm, apart) == [5, 5, 5]
    middle, low, high = aer.estimate(aer.iqm, [np.array([1.0, 3])])
    assert (middle, low, high) == (2, 1, 3)
    assert np.isnan(aer.estimate(aer.iqm, [np.array([1.0])])[1:]).all()
    one, two = [np.array([1.0])], [np.array([1.0, 3])]
    assert np.isnan(aer.estimate(aer.gain, one, two)[1:]).all() and np.isnan(aer.estimate(aer.gain, two, one)[1:]).all()


def test_the_two_samples_of_a_comparison_are_drawn_apart():
    """The ratio of a sample to an equal one varies, as it would not if both drew the same seeds."""
    same = [np.array([1.0, 2, 3, 4, 5])]
    gain, low, high = aer.estimate(aer.gain, same, same)
    assert gain == 0 and low < -0.2 and high > 0.2


def test_probability_of_improvement_by_hand():
    ours, other = [np.array([2.0, 4]), np.array([1.0])], [np.array([1.0, 2, 5]), np.array([3.0])]
    assert aer.improvement(ours, other) == pytest.approx(((1 + 0.5 + 0 + 1 + 1 + 0) / 6 + 0) / 2)


def test_ahead_or_behind_is_what_the_last_evaluation_and_the_last_three_say():
    def runs(*histories):
        return [aer.Run(None, {}, [dict.fromkeys(aer.SCORES, x) | {"train": 0} for x in h], []) for h in histories]

    ours = runs((0, 50, 50, 60), (0, 51, 51, 65), (0, 52, 52, 70))
    everywhere = "eval_in, eval_out, mean"
    for other, found in (
        (runs((99, 40, 40, 40), *2 * [(99, 45, 45, 59)]), f"ahead: {everywhere}"),  # before the last three: past
        (runs((0, 80, 80, 71), *2 * [(0, 90, 80, 90)]), f"behind: {everywhere}"),
        (runs((0, 80, 80, 40), *2 * [(0, 80, 80, 59)]), "–"),  # only at the end
        (runs((0, 40, 40, 61), *2 * [(0, 40, 40, 62)]), "–"),  # only before it
        (runs(*2 * [(0, 40, 40, 40)]), "–"),  # too few seeds
        ([], "–"),
    ):
        assert aer.standing(ours, other) == found
        other_way = dict(ahead="behind", behind="ahead")
        assert aer.standing(other, ours) == re.sub("ahead|behind", lambda word: other_way[word[0]], found)


@pytest.fixture(scope="module")
def five_seeds(tmp_path_factory):
    """Runs on the double integrators: dma_star_sh 50 to 90, concat 5 lower, dr half of it and without the last seed."""
    root = tmp_path_factory.mktemp("runs")
    for env in ("di_inv", "di_friction"):
        for i, level in enumerate((90, 50, 80, 70, 60)):
            make_run(root, env, "dma_star_sh", 11 + i, level)
            make_run(root, env, "concat", 11 + i, level - 5)
            if i < 4:
                make_run(root, env, "dr", 11 + i, level / 2, done=10 if env == "di_inv" or i < 3 else 5)
    return root


def test_report_averages_finished_runs_over_seeds(five_seeds, tmp_path, capsys):
    parts, runs = report(capsys, five_seeds, out=tmp_path / "new" / "out")
    assert "28 runs, 27 of them finished. Versions: v1 (28 runs)." in parts["Comparison"]
    returns = rows(parts["di_friction, 10 steps"])
    seeds, train, eval_in, eval_out, mean, standing, minutes, note = returns["dma_star_sh"]
    assert (seeds, standing, minutes, note) == ("5 of 5", "–", "13.0", "")
    assert returns["concat"][5] == "–" and returns["dr"][5] == "ahead: train, eval_in, eval_out, mean"
    assert train == eval_in and [float(cell.split()[0]) for cell in (train, eval_out, mean)] == [70, 66, 68.7]
    low, high = (float(end) for end in train.split("[")[1].strip("]").split(","))
    assert 50 <= low < 60 and 80 < high <= 90
    assert rows(parts["di_inv, 10 steps"])["dr"][0] == "4 of 5"
    assert rows(parts["di_inv, 10 steps"])["dr"][-1] == "seed 15 missing"
    assert returns["dr"][:2] == ["3 of 5", "36.7 [25.0, 45.0]"]  # of three seeds, the mean: (45 + 25 + 40) / 3
    assert returns["dr"][-1] == "seed 14 unfinished, at 5; seed 15 missing"
    assert len(runs) == 28 and list(runs[0]) == (
        "env method seed steps K mask buffer train eval_in eval_out mean minutes diverged version folder".split()
    )
    row = next(row for row in runs if row["folder"] == "di_inv__concat__quick__s12")
    expected = dict(env="di_inv", method="concat", seed="12", steps="10", K="24", mask="0.0", buffer="124000")
    expected |= dict(train="45", eval_in="45", eval_out="41")
    expected |= dict(mean="43.6667", minutes="12", diverged="12", version="v1", folder="di_inv__concat__quick__s12")
    assert row == expected
    (half,) = [row for row in runs if not row["train"]]
    assert (half["env"], half["method"], half["seed"], half["steps"]) == ("di_friction", "dr", "14", "10")


def test_report_over_environments(five_seeds, tmp_path, capsys):
    parts, _ = report(capsys, five_seeds, out=tmp_path)
    text = parts["Scaled returns in 2 environments"]
    assert "di_inv (4), di_friction (3)" in text  # seeds that all three have
    scaled = {tuple(line.split(" | ")[:2]): line.split(" | ")[2:] for line in text.splitlines() if line[:3] == "| n"}
    assert list(scaled) == [("| non-overlapping", f"`{m}`") for m in ("dma_star_sh", "concat", "dr")]
    assert scaled["| non-overlapping", "`dr`"][0].startswith("0.375")  # of .45, .25, .4, .35: without ends
    gains = [line.strip("| ").split(" | ") for line in parts["Gain of `dma_star_sh`"].splitlines() if line[:3] == "| `"]
    kinds = {(method, kind.split(":")[0]): cells for method, kind, *cells in gains}
    assert list(kinds) == [(f"`{m}`", k) for m in ("concat", "dr") for k in ("all", "non-overlapping", "overlapping")]
    assert gains[0][1] == "all: di_inv (5), di_friction (5)" and gains[3][1] == "all: di_inv (4), di_friction (3)"
    train, eval_in, eval_out, mean, late = kinds["`dr`", "all"]
    # interquartile mean of `train`: 74 and 37; at step 5 half of that; eval_out is 4 lower
    assert mean.startswith("+103.7% [") and late.startswith("+105.0% [")  # (74 - 4/3) / (37 - 4/3), 3/4 of 74 and 37
    assert train.startswith("+100.0% [") and train.endswith("(paper +50.0%)") and "paper" not in eval_in + mean
    assert eval_out.endswith("(paper +58.1%)") and kinds["`concat`", "all"][2].endswith("(paper +11.5%)")
    assert kinds["`concat`", "overlapping"][0].startswith("+7.7% [")  # 70 / 65
    odds = rows(parts["Probability that `dma_star_sh` is better"])
    # of 5 x 5 pairs 50 … 90 against 45 … 85, 15 are above; dr has seeds of its own
    assert odds["concat"][:2] == ["di_inv, di_friction", odds["concat"][2]] and odds["concat"][1].startswith("0.60 [")
    assert odds["dr"][1] == "1.00 [1.00, 1.00]"


def test_an_environment_without_a_bound_enters_no_aggregate(tmp_path, capsys):
    for env in ("di_inv", "ode", "hopper_gym"):
        for method in ("dma_star_sh", "dr"):
            make_run(tmp_path / "runs", env, method, 1, 50 if method == "dr" else 60)
    parts, _ = report(capsys, tmp_path / "runs", out=tmp_path)
    assert "di_inv (1), ode (1)." in parts["Scaled returns in 2 environments"]
    assert "`dr` | 0.375 |" in parts["Scaled returns in 2 environments"]  # 50 of 100, and of 200
    assert "hopper_gym" not in parts["Scaled returns in 2 environments"] + parts["Gain of `dma_star_sh`"]
    assert rows(parts["hopper_gym, 10 steps"])["dr"][1] == "50.0"
    assert rows(parts["Probability that `dma_star_sh` is better"])["dr"][0] == "di_inv, ode, hopper_gym"


def test_a_method_is_aggregated_with_those_that_have_its_environments(tmp_path, capsys):
    for method, envs in (("dma_star_sh", ("di_inv", "ode", "di_perm")), ("dr", ("di_inv", "ode")), ("da", ("ode",))):
        for env in envs:
            make_run(tmp_path / "runs", env, method, 1, 50)
    parts, _ = report(capsys, tmp_path / "runs", out=tmp_path)
    assert [head for head in parts if head.startswith("Scaled")] == ["Scaled returns in 2 environments"]
    assert "`da`" not in parts["Scaled returns in 2 environments"]
    assert "`da` | non-overlapping: ode (1)" in parts["Gain of `dma_star_sh`"]


def test_what_is_not_comparable_is_kept_apart(tmp_path, capsys):
    root = tmp_path / "runs"
    for seed in (1, 2):
        make_run(root, "di_inv", "dma_star_sh", seed, 80)
        make_run(root, "di_inv", "dr", seed, 40, version=f"v{seed}", numpy="2.0" if seed == 1 else "2.1")
    make_run(root, "di_inv", "dr", 3, 60, steps=15)
    make_run(root / "other", "di_inv", "dr", 1, 20, alpha=0.07, batch=64, out="elsewhere", threads=2)
    make_run(root / "other", "di_inv", "dma_star_sh", 3, 20, mask=0.1)
    parts, runs = report(capsys, root, out=tmp_path)
    alike = f"batch 256, alpha {dmash.quick().alpha}"
    longer, other = f"di_inv, 15 steps, {alike}", "di_inv, 10 steps, batch 64, alpha 0.07"
    main = rows(parts[f"di_inv, 10 steps, {alike}"])
    assert list(main) == ["dma_star_sh", "dma_star_sh, mask 0.1", "dr"]
    assert main["dr"][:2] == ["2 of 3", "40.0 [40.0, 40.0]"] and main["dma_star_sh, mask 0.1"][1] == "20.0"
    assert main["dma_star_sh"][-1] == "seed 3 missing; version v1: seed 1, 2; numpy 2.0: seed 1, 2"
    versions = "version v1: seed 1; version v2: seed 2; numpy 2.0: seed 1; numpy 2.1: seed 2"
    assert main["dr"][-1] == f"seed 3 missing; {versions}"
    for title, value in ((longer, "60.0"), (other, "20.0")):
        assert "Not comparable with the other 2 tables of this environment." in parts[title]
        assert list(rows(parts[title])) == ["dr"] and rows(parts[title])["dr"][:2] == ["1 of 1", value]
    assert "`dr` | non-overlapping: di_inv (2) | +100.0%" in parts["Gain of `dma_star_sh`"]  # of the mask of most runs
    assert {row["folder"] for row in runs} >= {"other/di_inv__dr__quick__s1", "di_inv__dr__quick__s1"}


def test_masks_are_told_apart_between_environments_too(tmp_path, capsys):
    """And with K and buffer, whose defaults depend on the environment, below each title and in report.csv."""
    for env, mask in (("di_inv", 0.4), ("di_perm", 0.4), ("ode", 0.2)):
        make_run(tmp_path / "runs", env, "dma_star_sh", 1, 60, mask=mask, K=6)
        make_run(tmp_path / "runs", env, "dr", 1, 50, K=6)
    parts, runs = report(capsys, tmp_path / "runs", out=tmp_path)
    title = next(title for title in parts if title.startswith("ode"))
    assert set(rows(parts[title])) == {"dma_star_sh, mask 0.2", "dr"}
    assert "`dr` | non-overlapping: di_inv (1), di_perm (1) |" in parts["Gain of `dma_star_sh`"]
    assert "mask 0.4 (dma_star_sh).\n" in parts[next(title for title in parts if title.startswith("di_inv"))]
    assert {(row["env"], row["K"], row["mask"]) for row in runs if row["method"] != "dr"} == {
        ("di_inv", "6", "0.4"),
        ("di_perm", "6", "0.4"),
        ("ode", "6", "0.2"),
    }


def test_of_several_lengths_the_one_with_most_runs_is_aggregated(tmp_path, capsys):
    for seed, steps, level in ((1, 10, 50), (2, 10, 50), (3, 15, 90), (4, 5, 90)):
        make_run(tmp_path / "runs", "ode", "dma_star_sh", seed, 2 * level, steps=steps)
        make_run(tmp_path / "runs", "ode", "dr", seed, 50, steps=steps)
    parts, _ = report(capsys, tmp_path / "runs", out=tmp_path)
    assert "that with most finished runs counts" in parts["Over environments"]
    assert "`dr` | non-overlapping: ode (2) | +100.0%" in parts["Gain of `dma_star_sh`"]


def test_settings_are_aggregated_apart(tmp_path, capsys):
    for env in ("di_inv", "ode"):
        for method in ("dma_star_sh", "dr"):
            for alpha in (0.3, 0.5):
                level = 80 * alpha * (2 if method == "dma_star_sh" else 1)
                make_run(tmp_path / "runs" / str(alpha), env, method, 1, level, alpha=alpha)
    out = tmp_path / "out"
    report(capsys, tmp_path / "runs", out=out)
    text = (out / "report.md").read_text()
    for alpha in (0.3, 0.5):
        part = text.split(f"## Over environments, alpha {alpha}\n")[1].split("\n## ")[0]
        assert "+100.0%" in part and "di_inv (1), ode (1)" in part


def test_same_runs_same_bytes(five_seeds, tmp_path, capsys):
    """In whatever order, by whatever path, and from another place."""
    files = []
    copied = shutil.copytree(five_seeds, tmp_path / "elsewhere" / "copy")
    one_by_one = sorted(five_seeds.iterdir(), reverse=True)
    for i, places in enumerate(([five_seeds], one_by_one, [five_seeds, *one_by_one[:3]], [copied])):
        report(capsys, *places, out=tmp_path / str(i))
        files.append([(tmp_path / str(i) / name).read_bytes() for name in ("report.md", "report.csv")])
    assert files[0] == files[1] == files[2] == files[3]
    assert str(tmp_path).encode() not in b"".join(files[3])
    for i, folder in enumerate(sorted(copied.iterdir(), reverse=True)):
        folder.rename(copied / str(i))
    report(capsys, copied, out=tmp_path)
    assert (tmp_path / "report.md").read_bytes() == files[0][0]


@pytest.mark.parametrize("missing", ["torch mujoco gymnasium dmash aib_envs", "torch mujoco gymnasium matplotlib"])
def test_report_needs_numpy_alone(five_seeds, tmp_path, missing):
    block = f"import sys; sys.modules.update(dict.fromkeys({missing.split()})); sys.path.insert(0, {str(HERE)!r}); "
    command = [sys.executable, "-c", f"{block}import compare; sys.exit(compare.main(sys.argv[1:]))"]
    done = subprocess.run([*command, "report", five_seeds, "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "`dma_star_sh`" in (tmp_path / "report.md").read_text() and (tmp_path / "report.csv").exists()
    assert ("no figures are drawn" in done.stdout) == ("matplotlib" in missing)
    refused = subprocess.run(
        [*command, *"plan --envs ode --methods dr --seeds 1".split()], capture_output=True, text=True
    )
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and refused.stdout == ""


def test_figures_are_those_that_the_report_shows(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for seed in (1, 2):
        for env in ("di_inv", "ode_3"):
            make_run(tmp_path / "runs", env, "dma_star_sh", seed, 50)
    make_run(tmp_path / "runs", "ode_3", "no_mask", 1, 50)  # an ablation, drawn beside dma_star_sh
    make_run(tmp_path / "runs", "di_inv", "dr", 1, 50, steps=15, done=5)
    make_run(tmp_path / "runs", "di_perm", "dr", 1, 50, done=0)
    out = tmp_path / "out"
    report(capsys, tmp_path / "runs", out=out, figures=True)
    names = {"curves.png", "contexts_di_inv_1.png", "contexts_ode_3.png", "ablations_ode_3.png"}  # two are not finished
    assert {file.name for file in out.glob("*.png")} == names and all(
        (out / name).stat().st_size > 5000 for name in names
    )
    text = (out / "report.md").read_text()
    assert all(f"({name})" in text for name in names) and text.count(".png") == 4
    _, figures = compare.report(aer.read_runs([tmp_path / "runs"]))
    drawn = {name: sorted({run.method for run in what[-1]}) for name, what in figures.items() if "ode" in name}
    assert drawn == {"contexts_ode_3.png": ["dma_star_sh"], "ablations_ode_3.png": ["dma_star_sh", "no_mask"]}


@pytest.mark.parametrize(
    "env, panels",
    [
        ("cartpole_inv", [("length", "normal"), ("length", "inverted")]),
        ("di_perm", [("mass", "normal"), ("mass", "swapped")]),
        ("walker", [("gravity", ""), ("actuator_strength", "")]),
        ("ode", [("distance from the centre", "")]),
        ("ode_3", [("distance from the centre", "")]),
    ],
)
def test_context_figure_shows_each_context_once(env, panels, tmp_path):
    pytest.importorskip("matplotlib")
    import compare_figures

    for seed in (1, 2):
        make_run(tmp_path, env, "dma_star_sh", seed, 10 * seed)
    runs = aer.read_runs([tmp_path])
    axes = compare_figures.contexts("title", runs).axes
    assert [(ax.get_xlabel(), ax.get_title()) for ax in axes] == panels
    dims, seen = {dim.name: dim for dim in aib_envs.ENVS[env].context}, 0
    signs = {
        "normal": {"action_factor": 1, "swap": 0},
        "inverted": {"action_factor": -1},
        "swapped": {"swap": 1},
        "": {},
    }
    for ax, (name, sign) in zip(axes, panels):
        (line,), (shade,), far = ax.lines, ax.patches, name not in dims
        low, high = shade.get_extents().transformed(ax.transData.inverted()).intervalx
        assert (low, high) == pytest.approx((0, 1) if far else dims[name].train, rel=0.2)  # 4 of the 50 values
        found = [row for row in runs[0].contexts if all(row.get(k, v) == v for k, v in signs[sign].items())]
        places = [max(dim.distance(row[dim.name]) for dim in dims.values()) if far else row[name] for row in found]
        # the second run has twice the level of the first, less 4 on eval_out, and the same from context to context
        expected = sorted((x, row["return"] + 5) for x, row in zip(places, found))
        if not far:
            assert [*zip(*line.get_data())] == [pytest.approx(point) for point in expected]
        seen += len(line.get_xdata())
    assert seen == 12 * (len(panels) if env == "walker" else 1)  # there each panel shows all contexts


def test_three_graded_dimensions_are_shown_by_distance(tmp_path):
    pytest.importorskip("matplotlib")
    import compare_figures

    run = aer.read_run(make_run(tmp_path, "walker", "dr", 1, 50))
    run = run._replace(contexts=[row | {"third": row["gravity"] / 2} for row in run.contexts])
    assert [ax.get_xlabel() for ax in compare_figures.contexts("title", [run]).axes] == ["distance from the centre"]


def test_a_context_of_signs_alone_has_a_figure(tmp_path):
    pytest.importorskip("matplotlib")
    import compare_figures

    run = aer.read_run(make_run(tmp_path, "di_inv", "dr", 1, 50))
    for row in run.contexts:
        del row["mass"]
    labels = [ax.get_xlabel() for ax in compare_figures.contexts("title", aer.with_labels([run])).axes]
    assert labels == ["place in the set"] * 2


def test_a_method_looks_the_same_in_all_figures_and_like_no_other(five_seeds):
    pytest.importorskip("matplotlib")
    import compare_figures

    looks = [compare_figures.style(method) for method in (*aer.METHODS, "one_of_my_own")]
    for kinds in (("color", "linestyle"), ("marker",)):
        assert len({tuple(look[kind] for kind in kinds) for look in looks}) == len(looks), kinds
    blocks = aer.blocks_of([run for run in aer.read_runs([five_seeds]) if run.finished])
    figures = [compare_figures.curves(blocks), *(compare_figures.contexts(*item) for item in blocks.items())]
    for ax in (ax for figure in figures for ax in figure.axes):
        assert [line.get_label() for line in ax.lines] == ["dma_star_sh", "concat", "dr"]
        for line in ax.lines:
            look = compare_figures.style(line.get_label())
            assert (line.get_color(), line.get_marker()) == (look["color"], look["marker"])
    curve = figures[0].axes[0].lines[0]  # steps 5 and 10; IQM over seeds of the mean of the three sets
    assert list(curve.get_xdata()) == [5, 10] and list(curve.get_ydata()) == pytest.approx([35 - 4 / 3, 70 - 4 / 3])


def spoil(name, text=None):
    def change(folder):
        path = folder / name
        path.unlink() if text is None else path.write_text(text(path.read_text()))

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (spoil("config.json", lambda text: text[:50]), "config.json: cannot be read ("),
        (spoil("config.json", lambda text: "[]"), "config.json: cannot be read ("),
        (
            spoil("config.json", lambda text: text.replace('"seed"', '"need"')),
            "config.json: cannot be read (its seed is",
        ),
        (spoil("metrics.csv", lambda text: text[: text.rindex(",") - 1]), "metrics.csv: cannot be read ("),
        (
            spoil("metrics.csv", lambda text: text.replace("eval_in", "eval")),
            "metrics.csv: cannot be read (no column eval_in)",
        ),
        (
            spoil("metrics.csv", lambda text: text.replace("50", "inf")),
            "metrics.csv: cannot be read (a train that is no",
        ),
        (
            spoil("metrics.csv", lambda text: text.replace("50", "good")),
            "metrics.csv: cannot be read (could not convert",
        ),
        (spoil("metrics.csv", lambda text: ""), "metrics.csv: cannot be read (no column"),
        (spoil("metrics.csv", lambda text: text + "\0"), "metrics.csv: cannot be read ("),
        (spoil("per_context.csv"), "per_context.csv: No such file or directory"),
        (spoil("per_context.csv", lambda text: text[: len(text) // 2]), "per_context.csv: cannot be read ("),
        (spoil("per_context.csv", lambda text: text.replace(",set,", ",sets,")), "per_context.csv: cannot be read ("),
        (
            spoil("per_context.csv", lambda text: text.replace("eval_out", "far")),
            "per_context.csv: cannot be read (not all",
        ),
        (lambda folder: shutil.copytree(folder, folder.parent / "copy"), "the same run as"),
    ],
)
def test_a_run_that_cannot_be_read_is_named(change, message, tmp_path, capsys):
    root = tmp_path / "runs"
    make_run(root, "di_inv", "dr", 1, 60)
    change(make_run(root, "di_inv", "dr", 2, 50))
    said = said_by_compare(["report", root, "--out", tmp_path / "out"], capsys, status=2)
    assert message in said and "di_inv__dr__quick__s2" in said and not (tmp_path / "out").exists()


def test_report_refuses_in_one_line(five_seeds, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for arguments, message in (
        ([tmp_path / "nowhere"], "nowhere: no run there; allowed:"),
        ([five_seeds, tmp_path / "empty"], "empty: no run there"),
        ([], "required: RUNS"),
        ([five_seeds, "--outt", "x"], "unrecognized arguments: --outt"),
        ([five_seeds, "--out", tmp_path / "file"], "file: File exists"),
        ([five_seeds, "--out", tmp_path / "file" / "x"], "x: Not a directory"),
    ):
        assert message in said_by_compare(["report", *arguments], capsys, status=2)


def test_compare_runs_from_any_folder_and_stops_quietly_when_nobody_reads(tmp_path):
    words = [sys.executable, HERE / "compare.py", *"plan --envs ode di_inv di_perm --methods dr --seeds 1-1000".split()]
    done = subprocess.run(f"{shlex.join(map(str, words))} | head -n 1", shell=True, cwd=tmp_path, capture_output=True)
    assert done.stdout.count(b"\n") == 1 and done.stderr == b""
    assert not list(tmp_path.iterdir())
