"""Where does the time of a gradient step go? What do methods cost? Is another checkout faster?

    python studies/benchmark.py --env cartpole_inv    milliseconds by phase         1 to 2 minutes
    python studies/benchmark.py --methods             speed and size of methods     2 to 5 minutes
    python studies/benchmark.py --environments        cost of environments          a minute
    python studies/benchmark.py --against FOLDER      two checkouts, taking turns   1 to 3 minutes

The first times one episode with its warm-up. Its phases are acting (encoder, hypernetwork and
policy in every context), environments, batch, dynamics (encoder, hypernetwork, f and their
optimizer), critic, actor (with the temperature), targets, and the rest (storing transitions).
Evaluation is left out.

`--environments` prints a step of 20 contexts against the bare mj_step calls in it.

FOLDER holds the dmash.py and aib_envs.py of another commit, such as git worktree makes. It runs
with the settings of this one. Two processes take turns, one asleep while the other works, so that a
busy machine slows both alike. The ratio is that of the milliseconds of two turns. Below 1,
this checkout is the faster.
"""

import argparse
import copy
import multiprocessing
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path

import mujoco
import numpy as np
import torch
from command_line import parser_of
from runs import aib_envs, dmash

PHASES = "acting environments batch dynamics critic actor targets rest".split()
STEPS = 20  # gradient steps in a turn
TURNS = 30  # of each checkout
METHOD_TURNS = 5
# settings without effect here
UNUSED = "quick steps random_steps out eval_every eval_rollouts rollouts snapshots".split()


def warm_run(cfg):
    """A run, in memory only, past its first gradient steps, which allocate."""
    run = dmash.Run(cfg, cfg.out)
    for _ in range(cfg.K):
        run.rollout.collect(random=True)  # so that batches can be drawn
    seconds_of(run, STEPS)
    return run


def seconds_of(run, steps):
    """Seconds that gradient steps take."""
    begin = time.perf_counter()
    for _ in range(steps):
        run.gradient_step()
    wait_for(run.cfg.device)
    return time.perf_counter() - begin


def wait_for(device):
    if device != "cpu":
        torch.cuda.synchronize(device)


# ---- The phases of a gradient step --------------------------------------------------------------


class Clock:
    """Cuts time into pieces, each counted once.

    A cut adds what passed since the cut before to the phase that it names.
    """

    def __init__(self, device):
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def cut(self, phase):
        wait_for(self.device)
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now

    def cut_around(self, owner, name, before, during):
        """From now on, each call of the owner's function makes two cuts."""
        function = getattr(owner, name)

        def call(*args):
            self.cut(before)
            result = function(*args)
            self.cut(during)
            return result

        setattr(owner, name, call)


def phase_seconds(run, steps):
    """Seconds of gradient steps by phase, and in all. The run keeps making cuts afterwards."""
    clock, rollout = Clock(run.cfg.device), run.rollout
    clock.cut_around(rollout.envs, "reset", "rest", "environments")
    clock.cut_around(rollout.envs, "step", "acting", "environments")
    clock.cut_around(rollout, "step", "rest", "rest")  # what the environments' cuts leave of it
    clock.cut_around(rollout.replay, "sample", "rest", "batch")
    clock.cut_around(run.agent, "update", "rest", "targets")  # what the optimizers' cuts leave
    for name, optimizer in run.agent.optimizers.items():  # whose steps end their phases
        phase = "actor" if name == "temperature" else name
        clock.cut_around(optimizer, "step", phase, phase)
    clock.last = time.perf_counter()
    total = seconds_of(run, steps)
    clock.cut("rest")
    return clock.seconds, total


def print_phases(cfg):
    """Times one episode with its warm-up and prints where the time went."""
    run, steps = warm_run(cfg), aib_envs.lookup(cfg.env).horizon
    seconds, total = phase_seconds(run, steps)
    settings = f"K = {cfg.K}, {cfg.contexts} contexts, batch {cfg.batch}"
    machine = f"{cfg.threads} threads on {cfg.device}"
    print(f"{cfg.env}, {cfg.method}: {settings}, {machine}, {steps} gradient steps")
    print(f"gradient steps/s   {steps / total:8.1f}")
    for phase, value in (seconds | {"total": total}).items():
        print(f"  {phase:<14} {value / steps * 1e3:9.2f} ms")


# ---- Method against method, environment against environment --------------------------------------


def vector_step_times(env, contexts, steps=300):
    """Milliseconds of a step of all contexts, and of the bare mj_step calls in it (or nan).

    Both go from the same starts and with the same actions, taking turns. These are the medians.
    """
    envs = aib_envs.VectorEnv(env, aib_envs.context_sets(env, contexts)["train"], seed=0)
    envs.reset()
    twin = copy.deepcopy(envs.task)
    has_models = isinstance(twin, aib_envs.MujocoTask)
    vector, bare = [], []
    for actions in np.random.default_rng(0).uniform(-1, 1, (steps, contexts, envs.d_a)):
        begin = time.perf_counter()
        envs.step(actions)
        vector.append(time.perf_counter() - begin)
        if has_models:
            begin = time.perf_counter()
            for data, action in zip(twin.datas, actions):
                data.ctrl = action
                mujoco.mj_step(data.model, data, twin.SUBSTEPS)
            bare.append(time.perf_counter() - begin)
    return 1e3 * np.median(vector), 1e3 * np.median(bare or [np.nan])


def print_methods(settings):
    """A row per method: gradient steps/s and trained parameters."""
    runs = [warm_run(dmash.Config(**settings | {"method": name})) for name in dmash.METHODS]
    turns = []
    for _ in range(METHOD_TURNS):
        turns.append([seconds_of(run, STEPS) for run in runs])
    cfg = runs[0].cfg
    median = f"median of {METHOD_TURNS} turns of {STEPS} gradient steps"
    print(f"{cfg.env}, {cfg.threads} threads on {cfg.device}: {median}")
    print("--method         paper     steps/s  parameters")
    for run, rate in zip(runs, STEPS / np.median(turns, 0)):
        trained = [p.numel() for p in run.agent.parameters() if p.requires_grad]
        name = f"{run.cfg.method:<16} {run.agent.method.paper:<9}"
        print(name, f"{rate:7.1f} {sum(trained) - 1:11,}")  # without α


def print_environments():
    """A row per environment: a step of 20 contexts, and the bare mj_step calls in it."""
    print("--env              vector step, ms bare mj_step, ms  ratio")
    for env in aib_envs.ENVS:
        if env.startswith("ode_"):
            continue
        vector, bare = vector_step_times(env, 20)
        print(f"{env:<18} {vector:14.2f} {bare:16.2f} {vector / bare:6.2f}", flush=True)


# ---- Checkout against checkout ------------------------------------------------------------------


def print_against(folder, settings):
    """Milliseconds per gradient step of this checkout and of the one in `folder`, and the ratio."""
    for name in ("dmash.py", "aib_envs.py"):
        if not (folder / name).is_file():
            raise dmash.BadInput(f"--against {folder}: no {name} there")
    cfg, here = dmash.Config(**settings), Path(dmash.__file__).parent
    folders = {"this checkout": here, "the other": folder.resolve()}
    ms = np.zeros((TURNS, len(folders)))
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, fresh) as first, ProcessPoolExecutor(1, fresh) as second:
        workers = first, second
        for worker, place in zip(workers, folders.values()):
            with dmash.reading(f"--against {folder}: its code"):
                worker.submit(begin_run, str(place), asdict(cfg)).result()
        for of_turn in ms:
            for i, worker in enumerate(workers):
                of_turn[i] = worker.submit(take_turn, STEPS).result() / STEPS * 1e3
    turns = f"{len(ms)} turns of {STEPS} gradient steps"
    print(f"{cfg.env}, {cfg.method}, {cfg.threads} threads on {cfg.device}: {turns}")
    for (name, place), median in zip(folders.items(), np.median(ms, 0)):
        print(f"{name:<14} {median:8.2f} ms per gradient step (median), {place}")
    low, middle, high = np.quantile(ms[:, 0] / ms[:, 1], (0.25, 0.5, 0.75))
    print(f"{'ratio':<14} {middle:8.3f} (median; quartiles {low:.3f} and {high:.3f})")


def begin_run(folder, settings):
    """In a process of its own: from now on dmash is that of a folder. A run begins with it.

    Settings that this dmash does not have are left out.
    """
    global dmash, run
    del sys.modules["dmash"], sys.modules["aib_envs"]
    warnings.simplefilter("ignore")  # that its environments are registered for the second time
    sys.path.insert(0, folder)
    import dmash

    known = {f.name for f in fields(dmash.Config)}
    settings = {name: value for name, value in settings.items() if name in known}
    run = warm_run(dmash.Config(**settings))


def take_turn(steps):
    return seconds_of(run, steps)


# ---- Command line -------------------------------------------------------------------------------


def run_command(argv):
    parser = parser_of("benchmark.py", __doc__)
    parser.argument_default = argparse.SUPPRESS  # what is not given is not a setting
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--methods", action="store_true", help="compare all methods")
    modes.add_argument("--environments", action="store_true", help="compare all environments")
    modes.add_argument("--against", type=Path, metavar="FOLDER", help="compare with a checkout")
    for f in fields(dmash.Config):
        if f.name not in UNUSED:
            parser.add_argument(dmash.flag(f.name), help=f.metadata["help"])
    settings = vars(parser.parse_args(argv))
    if "environments" in settings:
        print_environments()
    elif settings.pop("methods", False):
        print_methods(settings)
    elif "against" in settings:
        print_against(settings.pop("against"), settings)
    else:
        print_phases(dmash.Config(**settings))


def main(argv=None):
    """The command line. Returns the exit status."""
    return dmash.exit_status("benchmark.py", lambda: run_command(argv))


if __name__ == "__main__":
    sys.exit(main())
