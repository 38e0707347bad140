"""Where does the time of a gradient step go, what do the methods cost, and is this checkout faster than another?

    python studies/benchmark.py --env cartpole_inv    each phase of a gradient step, in milliseconds     1 to 2 minutes
    python studies/benchmark.py --methods             gradient steps/s and parameters of every method    2 to 5 minutes
    python studies/benchmark.py --against FOLDER      this checkout and the one in FOLDER, taking turns  1 to 3 minutes

The first times one episode with its warm-up: acting (encoder, hypernetwork and policy in every context), environments,
batch, dynamics (encoder, hypernetwork, f and their optimizer), critic, actor (with the temperature), targets, rest
(storing transitions, checking numbers). Then: a step of all contexts against the bare mj_step calls in it, the peak
memory, and the update against its matrix multiplications at the rate of a large one. Evaluation is left out.

FOLDER holds the dmash.py and aib_envs.py of another commit (git worktree add FOLDER COMMIT makes one), which runs with
the settings of this one. Two processes take turns, one asleep while the other works, so that a busy machine slows both
alike. The ratio is that of the milliseconds of two turns side by side: below 1, this checkout is the faster.
"""

import argparse
import contextlib
import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import mujoco
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import aib_envs  # noqa: E402
import dmash  # noqa: E402

PHASES = ("acting", "environments", "batch", "dynamics", "critic", "actor", "targets", "rest")
STEPS = 20  # gradient steps in a turn
TURNS = {"methods": 5, "against": 30}
# settings without effect here
UNUSED = ("quick", "steps", "out", "eval_every", "eval_rollouts", "rollouts", "snapshots", "random_steps")


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


# ---- The phases of a gradient step ------------------------------------------------------------------------------


def phase_seconds(run, steps):
    """Seconds of gradient steps by phase, and in all. Time is cut into pieces, each counted once: a cut adds what
    passed since the cut before to the phase that it names. The run keeps making cuts afterwards."""
    seconds, last = dict.fromkeys(PHASES, 0.0), time.perf_counter()

    def cut(phase):
        nonlocal last
        wait_for(run.cfg.device)
        now = time.perf_counter()
        seconds[phase] += now - last
        last = now

    def cut_around(owner, name, before, during):
        function = getattr(owner, name)

        def call(*args):
            cut(before)
            result = function(*args)
            cut(during)
            return result

        setattr(owner, name, call)

    cut_around(run.rollout.envs, "reset", "rest", "environments")
    cut_around(run.rollout.envs, "step", "acting", "environments")
    cut_around(run.rollout, "step", "rest", "rest")  # what the environments' cuts leave of it
    cut_around(run.rollout.replay, "sample", "rest", "batch")
    cut_around(run.agent, "update", "rest", "targets")  # what the optimizers' cuts leave of it
    for name, optimizer in run.agent.optimizers.items():  # whose steps end their phases
        phase = "actor" if name == "temperature" else name
        cut_around(optimizer, "step", phase, phase)
    last = time.perf_counter()
    total = seconds_of(run, steps)
    cut("rest")
    return seconds, total


def print_phases(cfg):
    """Times one episode with its warm-up and prints where the time went."""
    run, steps = warm_run(cfg), aib_envs.lookup(cfg.env).horizon
    seconds, total = phase_seconds(run, steps)
    ms = {phase: value / steps * 1e3 for phase, value in seconds.items()} | {"total": total / steps * 1e3}
    memory = peak_memory()  # before the operations are counted, which takes more
    flop, rate = update_flop(run), matmul_rate(cfg.device)
    update = sum(ms[phase] for phase in ("dynamics", "critic", "actor", "targets"))
    vector, bare = vector_step_times(cfg.env, cfg.contexts)
    times = f", {vector / bare:.2f} times the bare mj_step calls in it" if bare else ""
    setting = f"K = {cfg.K}, {cfg.contexts} contexts, batch {cfg.batch}, {cfg.threads} threads on {cfg.device}"
    print(f"{cfg.env}, {cfg.method}: {setting}, {steps} gradient steps")
    print(f"gradient steps/s   {steps / total:8.1f}")
    for phase, value in ms.items():
        print(f"  {phase:<14} {value:9.2f} ms")
    print(f"vector step        {vector:8.3f} ms for {cfg.contexts} contexts{times}")
    print(f"peak memory        {memory:8.0f} MB")
    print(f"update             {update:8.2f} ms for {flop / 1e9:.2f} GFLOP")
    print(f"matrix multiply    {rate / 1e9:8.0f} GFLOP/s: the same operations in {flop / rate * 1e3:.2f} ms")
    print(f"ratio              {update / 1e3 * rate / flop:8.1f}")


def vector_step_times(env, contexts, steps=300):
    """Milliseconds of one step of all contexts, and of the mj_step calls alone that it must make (None without
    MuJoCo). Both from the same starts and with the same actions, taking turns; the medians."""
    envs = aib_envs.VectorEnv(env, aib_envs.context_sets(env, contexts)["train"], seed=0)
    envs.reset()
    twin = aib_envs.lookup(env).cls(envs.task.contexts)
    twin.set_state(envs.task.state())
    has_models, times = isinstance(twin, aib_envs.MujocoTask), ([], [])
    for actions in np.random.default_rng(0).uniform(-1, 1, (steps, contexts, envs.d_a)):
        begin = time.perf_counter()
        envs.step(actions)
        middle = time.perf_counter()
        if has_models:
            for (model, data), action in zip(twin.pairs, actions):
                data.ctrl = action
                mujoco.mj_step(model, data, twin.SUBSTEPS)
        times[0].append(middle - begin)
        times[1].append(time.perf_counter() - middle)
    vector, bare = (1e3 * float(np.median(series)) for series in times)
    return vector, bare if has_models else None


def update_flop(run):
    """Floating-point operations of the matrix multiplications in an update, mean of one without and one with actor."""
    batch = run.rollout.replay.sample(run.cfg.batch)
    with FlopCounterMode(display=False) as counter:
        for step in (1, 2):
            run.agent.update(batch, step)
    # missed: the LSTM, if there is one (else L is 0): 3 passes, 2 x 4 gates
    lstm = 3 * len(batch.s) * run.cfg.L * 2 * 8 * run.cfg.encoder_hidden**2
    return counter.get_total_flops() / 2 + lstm


def matmul_rate(device):
    """FLOP/s of the best of 20 products of two 1024 x 1024 matrices."""
    a, best = torch.randn(1024, 1024, device=device), math.inf
    for _ in range(20):
        begin = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - begin)
    return 2 * 1024**3 / best


def peak_memory():
    """Largest resident memory of this process so far, MB; nan where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ---- Method against method, checkout against checkout -----------------------------------------------------------


def print_methods(settings):
    """A row per method: gradient steps/s and trained parameters, both also relative to those of `da`."""
    runs = {name: warm_run(dmash.Config(**settings, method=name)) for name in dmash.METHODS}
    turns = [[seconds_of(run, STEPS) for run in runs.values()] for _ in range(TURNS["methods"])]
    rate = dict(zip(runs, STEPS / np.median(turns, 0)))
    size = {n: sum(p.numel() for p in run.agent.parameters() if p.requires_grad) - 1 for n, run in runs.items()}  # - α
    cfg = runs["da"].cfg
    print(f"{cfg.env}, {cfg.threads} threads on {cfg.device}: median of {len(turns)} turns of {STEPS} gradient steps")
    row = "{:<16} {:<9} {:>7} {:>6} {:>11} {:>6}".format
    print(row("--method", "paper", "steps/s", "of da", "parameters", "of da"))
    for name, method in dmash.METHODS.items():
        speed, share = rate[name] / rate["da"], size[name] / size["da"]
        print(row(name, method.paper, f"{rate[name]:.1f}", f"{speed:.2f}", f"{size[name]:,}", f"{share:.2f}"))


WORK = "import sys; sys.path.insert(0, sys.argv[1]); import dmash, benchmark; benchmark.work(*sys.argv[1:])"


def print_against(folder, settings):
    """Milliseconds per gradient step of this checkout and of the one in `folder`, and their ratio."""
    if missing := [name for name in ("dmash.py", "aib_envs.py") if not (folder / name).is_file()]:
        raise dmash.BadInput(f"--against {folder}: no {missing[0]} there; allowed: the folder of another checkout")
    cfg, here, n = dmash.Config(**settings), Path(__file__).resolve().parent, TURNS["against"]
    folders, ms = (here.parent, folder.resolve()), np.zeros((n, 2))
    commands = [[sys.executable, "-c", WORK, str(place), json.dumps(asdict(cfg)), *settings] for place in folders]
    pipes = dict(cwd=here, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(subprocess.Popen(command, **pipes)) for command in commands]
        for worker in workers:
            if (answer := worker.stdout.readline().strip()) != "ready":
                raise dmash.BadInput(f"--against {folder}: {answer or 'its code does not run'}")
        for turn in range(n):
            for i in (0, 1) if turn % 2 else (1, 0):
                print(STEPS, file=workers[i].stdin, flush=True)
                ms[turn, i] = float(workers[i].stdout.readline()) / STEPS * 1e3
    print(f"{cfg.env}, {cfg.method}, {cfg.threads} threads on {cfg.device}: {n} turns of {STEPS} gradient steps")
    for name, place, median in zip(("this checkout", "the other"), folders, np.median(ms, 0)):
        print(f"{name:<14} {median:8.2f} ms per gradient step (median), {place}")
    low, middle, high = np.quantile(ms[:, 0] / ms[:, 1], (0.25, 0.5, 0.75))
    print(f"{'ratio':<14} {middle:8.3f} (median; quartiles {low:.3f} and {high:.3f})")


def work(folder, settings, *given):
    """A process of --against, with the dmash of `folder`: says that it is ready, then answers each number of gradient
    steps with their seconds. Settings that its dmash does not have are left out, unless they were given."""
    names = {f.name for f in fields(dmash.Config)} | set(given)
    try:
        run = warm_run(dmash.Config(**{name: value for name, value in json.loads(settings).items() if name in names}))
    except (dmash.BadInput, TypeError) as error:
        return print(error)
    print("ready", flush=True)
    for line in sys.stdin:
        print(seconds_of(run, int(line)), flush=True)


# ---- Command line -----------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser("benchmark.py", description=__doc__, formatter_class=layout, allow_abbrev=False)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--methods", action="store_true", help="compare all methods")
    modes.add_argument("--against", type=Path, metavar="FOLDER", help="compare with another checkout")
    for f in fields(dmash.Config):
        if f.name not in UNUSED:
            kind = {"action": "store_true"} if f.type is bool else {}
            parser.add_argument(dmash.flag(f.name), **kind, default=argparse.SUPPRESS, help=f.metadata["help"])
    settings = vars(parser.parse_args(argv))
    methods, against = settings.pop("methods"), settings.pop("against")
    try:
        if methods and "method" in settings:
            raise dmash.BadInput("--method: not with --methods, which times every one")
        if methods:
            print_methods(settings)
        elif against:
            print_against(against, settings)
        else:
            print_phases(dmash.Config(**settings))
    except dmash.BadInput as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
