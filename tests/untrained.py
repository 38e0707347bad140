"""Small agents that were never trained, for the tests of studies that read policies and runs."""

import csv
from pathlib import Path

import torch

import dmash

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(
    contexts=4, batch=16, threads=1, hidden=16, hyper_hidden=8, bottleneck=4, policy_average=0.01
)


def untrained(method, env="di_inv", **settings):
    torch.manual_seed(0)
    agent = dmash.new_agent(dmash.Config(env=env, method=method, **SMALL | settings))
    agent.step = 0
    return agent


def save_untrained(out, method, env="di_inv"):
    """The folder of an untrained run, made in `out`."""
    cfg = dmash.Config(env=env, method=method, out=str(out), **SMALL)
    folder = dmash.run_folder(cfg)
    folder.mkdir()
    run = dmash.Run(cfg, folder)
    run.inode = folder.stat().st_ino
    run.save()
    return folder


def succeed(program, *arguments):
    """Runs a study with these arguments, to its end."""
    assert program.main(list(map(str, arguments))) == 0


def table(path):
    """The rows of a CSV file."""
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def refusal(program, arguments, capsys):
    """What a study says when it refuses arguments: one line, and exit status 2."""
    assert program.main(list(map(str, arguments))) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1, said
    return said.err
