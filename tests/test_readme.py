"""What README.md shows is true: its snippets run, its commands parse, its numbers are measured."""

import re
import shlex
from pathlib import Path
from statistics import fmean, median

import compare
import numpy as np
import pytest
import runs as reader

import aib_envs
import dmash

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = " ".join(README.split())
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
(LOOP,) = [snippet for snippet in SNIPPETS if "Policy.load" in snippet]


@pytest.fixture(scope="module")
def runs():
    return reader.read_runs([ROOT / "results"])


def chosen(runs, method="dma_star_sh", env="cartpole_inv", experiment="quick", departures=""):
    kind = method, env, experiment, departures
    return [run for run in runs if (run.method, run.env, run.experiment, run.departures) == kind]


def ends(runs, score, *kind, **more):
    """The scores at the last evaluation of the runs that are `chosen` by the other arguments."""
    return [run.last(score) for run in chosen(runs, *kind, **more)]


def ladder():
    """The numbers of each step: minutes, train, eval_in, eval_out."""
    rows = re.findall(
        r"\| (see|learn|reproduce) \|[^|]*\|([^|]*)\|([^|]*)\|([^|]*)\|([^|]*)\|", README
    )
    return {name: [float(cell) for cell in cells] for name, *cells in rows}


def test_terminal_shows_what_the_program_prints(capsys, monkeypatch):
    """The same lines but for their numbers, since one episode a context is enough here."""
    monkeypatch.chdir(ROOT)
    shown = re.search(r"```text\n\$ python dmash\.py (.*?)\n(.*?)```", README, re.DOTALL)
    assert dmash.main([*shlex.split(shown[1]), "--rollouts", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == shown[2].splitlines()[0]
    assert re.sub(r"[\d.]+", "0", printed) == re.sub(r"[\d.]+", "0", shown[2])


def test_snippets_run(monkeypatch):
    """The loop has a test of its own."""
    monkeypatch.chdir(ROOT)
    for snippet in SNIPPETS:
        if snippet != LOOP:
            exec(snippet, {})


@pytest.mark.parametrize("adapts", [True, False])
def test_the_loop_of_ones_own_survives_the_reversed_motor_as_long_as_it_adapts(adapts, monkeypatch):
    """The window of the other agent takes no new transitions, so that its code stays."""
    monkeypatch.chdir(ROOT)
    loop = LOOP
    if not adapts:
        flip = "env.set_context(action_factor=-1)"
        loop = loop.replace(flip, f"{flip}; policy.window.add = lambda *row: None")
    seen = {"rewards": []}
    exec(loop + "    rewards.append(r)\n", seen)
    assert len(seen["rewards"]) == 500
    mean = np.mean(seen["rewards"][-200:])
    assert mean > 0.8 if adapts else mean < 0.4


def test_commands_have_flags_that_exist():
    commands = re.findall(r"`(python dmash\.py [^`]*)`", README)
    assert len(commands) >= 3
    for command in commands:
        given = dmash.build_parser().parse_args(shlex.split(command)[2:])
        env = getattr(given, "env", "ode")
        assert ":" in env or env in aib_envs.ENVS


def test_programs_and_links_are_there():
    for name in re.findall(r"`(\w+\.py)`", README.split("## Studies")[1]):
        assert (ROOT / "studies" / name).is_file(), name
    for target in re.findall(r"\]\((?!http)([^)#]*)", README):
        assert (ROOT / target).exists(), target


def test_methods_are_all_there():
    table = README.split("`METHODS`")[1].split("## What we found")[0]
    named = set(re.findall(r"`(\w+)`", table))
    assert named == set(dmash.METHODS) - {"dma_star_sh"}


def test_headline_is_the_main_job_s_seeds(runs):
    expected = compare.contrast([1], [ends(runs, "mean", experiment="paper_settings")])
    headline = re.search(r"\*\*(\d+) of 1000.*?interval (\d+) to (\d+)", PROSE)
    assert [int(x) for x in headline.groups()] == list(map(round, expected))

    def scored(method, experiment="paper_settings_forgetting"):
        found = chosen(runs, method, experiment=experiment)
        return f"{fmean(map(compare.published_score, found)):.0f}"

    assert f" have {scored('dma_star_sh', 'paper_settings')}." in PROSE
    mean = fmean(ends(runs, "mean", experiment="paper_settings_forgetting"))
    assert f"three seeds have {mean:.0f}, and {scored('dma_star_sh')} scored so" in PROSE
    assert f" so (Concat {scored('concat')}, DA {scored('da')})." in PROSE
    assert f"doing nothing earns {compare.no_action('cartpole_inv', 'mean'):.0f}." in PROSE


def test_ladder_sees_what_the_terminal_shows():
    shown = re.search(r"return: train (.*)  eval_in (.*)  eval_out (.*)", README)
    assert ladder()["see"][1:] == [round(float(number)) for number in shown.groups()]


@pytest.mark.parametrize(
    "step, experiment, timed",
    [("learn", "quick", "quick"), ("reproduce", "paper_settings", "paper_settings_forgetting")],
)
def test_ladder_has_the_numbers_of_the_tables(step, experiment, timed, runs):
    # Four of the five long runs were stopped for hours, which their seconds hold.
    minutes, *returns = ladder()[step]
    expected = [fmean(ends(runs, name, experiment=experiment)) for name in dmash.SETS]
    assert returns == pytest.approx(expected, abs=0.51)
    assert minutes == round(median(ends(runs, "seconds", experiment=timed)) / 60)


def test_findings_are_those_of_the_tables(runs):
    def mean(*kind):
        return fmean(ends(runs, *kind))

    def behind(method, env="ode", score="mean", *kind):
        return round(mean(score, method, env, *kind) - mean(score, "dma_star_sh", env, *kind))

    def scaled(method, *kind, envs=("di_inv", "ode", "cartpole_inv")):
        """The mean over environments, on the scale of the aggregates, but for a constant."""
        return fmean(
            mean("mean", method, env, *kind)
            / (compare.largest(env) - compare.no_action(env, "mean"))
            for env in envs
        )

    def published(method):
        return scaled(method, "published_way", "published")

    def poles(method):
        """The mean return of poles longer than trained."""
        rows = [row for run in chosen(runs, method) for row in run.contexts]
        return fmean(row["return"] for row in rows if row["length"] > 0.85)

    def unseen(score):
        envs = [f"di_signs_without_{pair}" for pair in "pp pm mp mm".split()]
        return fmean(mean(score, "dma_star_sh", env, "unseen") for env in envs)

    idle = compare.returns_without_action("cartpole_inv")
    contexts = enumerate(aib_envs.context_sets("cartpole_inv")["eval_out"])
    nothing = fmean(idle["eval_out", i] for i, context in contexts if context["length"] > 0.5)
    seven = {run.env for run in runs if run.experiment == "quick"}
    for finding in (
        f" ({behind('concat', 'ode', 'train', 'paper_settings_ode')} behind in trained contexts, "
        f"{-behind('concat', 'ode', 'eval_out', 'paper_settings_ode')} ahead in extrapolation).",
        f"longer than trained, DMA\\*-SH earns {poles('dma_star_sh'):.0f}, "
        f"DMA\\* {poles('dma_star'):.0f}, Concat (given the context) {poles('concat'):.0f}, "
        f"no action {nothing:.0f}.",
        f"is {behind('dma_star')} of 200 behind DMA\\*, "
        f"{behind('concat')} behind Concat and {behind('da')} behind DA. "
        f"On `di_inv` it is {behind('concat', 'di_inv')} of 100 behind Concat. "
        f"- On `cartpole_inv` it is {-behind('concat', 'cartpole_inv')} of 1000 ahead of Concat.",
        f"cost Concat {scaled('concat') - published('concat'):.2f} "
        f"and DA {scaled('da') - published('da'):.2f} over three environments,",
        f"it leads DA by {scaled('dma_star_sh', envs=seven) - scaled('da', envs=seven):.2f} "
        "(no action 0, largest return 1)",
        f"With them DMA\\*-SH leads Concat by {published('dma_star_sh') - published('concat'):.2f} "
        f"and DA by {published('dma_star_sh') - published('da'):.2f}.",
        f"earns {unseen('eval_out'):.0f} of 100, trained pairs {unseen('train'):.0f}.",
    ):
        assert finding in PROSE
