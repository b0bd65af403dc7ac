"""`neox train`: what it prepares, and how a process that cannot join notifies the others."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from neox.cli import train as cli
from neox.cli.main import main, parse
from neox.errors import ConfigError, DataError, EnvironmentProblem
from neox.runtime.launch import LaunchInfo
from tests.config.gpt_neox.sample_files import BASE, flow_text

CONF = {"model": {"vocab_size": 10}, "data": {"train": ["none"]}, "train": {"micro_batch_size": 1}}


@pytest.fixture
def environment(monkeypatch, request):
    """A machine without a GPU; the variables that a run sets are removed afterwards."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    request.addfinalizer(lambda before=dict(os.environ): (os.environ.clear(), os.environ.update(before)))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "FAULT", "DS_ACCELERATOR", *cli.RECORDER_SIZES):
        os.environ.pop(name, None)
    return os.environ


@pytest.fixture
def conf(tmp_path):
    (tmp_path / "a.yml").write_text(json.dumps(CONF))
    return str(tmp_path / "a.yml")


def arguments(*words: str):
    _, parser, rest = parse(["train", *words])
    return parser.parse_args(rest)


@pytest.mark.parametrize(("gpu", "device", "recorder"), [(False, "cpu", "0"), (True, "cuda", None)])
def test_libraries_know_the_device(environment, conf, monkeypatch, gpu, device, recorder):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    seen = []
    monkeypatch.setattr(cli, "validate", lambda *told: seen.append(told))
    launch = LaunchInfo(rank=3, local_rank=1, world_size=4)
    config, found = cli.prepare(arguments(conf, "--set", "train.seed=5", "--set", "run.dir=x"), launch)
    assert (found, config.train.seed, config.run.dir) == (device, 5, "x")
    ((checked, size, where, origins),) = seen
    assert checked is config and (size, where) == (4, device) and str(origins["train.seed"]) == "--set"
    assert (environment["DS_ACCELERATOR"], environment["LOCAL_RANK"]) == (device, "1")
    assert environment.get("TORCH_FR_BUFFER_SIZE") == recorder
    environment.update(DS_ACCELERATOR="mine", LOCAL_RANK="7")
    cli.prepare(arguments(conf), launch)
    assert (environment["DS_ACCELERATOR"], environment["LOCAL_RANK"]) == ("mine", "7")


@pytest.mark.parametrize("rank", [0, 1])
def test_notes_are_printed_once(environment, tmp_path, monkeypatch, capsys, rank):
    (tmp_path / "old.yml").write_text(flow_text(BASE))
    monkeypatch.setattr(cli, "validate", lambda *told: None)
    cli.prepare(arguments(str(tmp_path / "old.yml")), LaunchInfo(rank=rank, world_size=2))
    lines = capsys.readouterr().err.splitlines()
    assert (len(lines) > 0) == (rank == 0) and all(line.startswith("note: ") for line in lines)


def test_a_run_gets_what_was_prepared(environment, conf, monkeypatch):
    told = []
    module = SimpleNamespace(start=lambda *args, **options: told.append((args, options)) or 12)
    monkeypatch.setitem(sys.modules, "neox.train.start", module)
    environment["FAULT"] = "kill@0:step:3"
    assert main(["train", conf, "--debug"]) == 12
    (((config, launch, device), options),) = told
    assert (config.data.train[0].path, launch, device) == ("none", LaunchInfo(source=launch.source), "cpu")
    assert options["debug"] is True and options["signals"].until_exit and options["injector"] is not None
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # until the process has exited


@pytest.mark.parametrize("size", [1, 2])
def test_an_error_of_several_processes_is_sent_to_them(environment, conf, monkeypatch, size, capsys):
    def start(*args, **options):
        raise DataError("missing")

    monkeypatch.setitem(sys.modules, "neox.train.start", SimpleNamespace(start=start))
    told = []

    def refuse(error, launch, signals, debug):
        assert signals.at_once.func is cli.end_while_joining and signals.at_once.args == (launch,)
        told.append((error, launch, debug))
        return 9

    monkeypatch.setattr(cli, "refuse", refuse)
    if size > 1:
        names = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 9}
        environment.update({name: str(value) for name, value in names.items()})
    assert main(["train", conf]) == (3 if size == 1 else 9)
    assert [(str(error), launch.rank, debug) for error, launch, debug in told] == (
        [] if size == 1 else [("error[3] missing", 1, False)]
    )


@pytest.fixture
def posts(monkeypatch):
    """Calls of the store's protocol, in order; `answers` are those of post_refusal."""
    seen = SimpleNamespace(calls=[], answers=[], answered=1)

    def post(launch, notice, patience, stop=None):
        seen.calls.append(("post", launch.rank, patience, notice))
        return seen.answers.pop(0) if seen.answers else None

    def serve(launch, notice, patience, stop=None):
        seen.calls.append(("serve", launch.address, patience, notice))
        return seen.answered

    monkeypatch.setattr(cli, "post_refusal", post)
    monkeypatch.setattr(cli, "serve_refusal", serve)
    return seen


class Signals:
    requested = False

    def __init__(self):
        self.actions = []

    def end_at_once(self, action):
        self.actions.append(action)


@pytest.mark.parametrize(
    ("rank", "agent", "answers", "calls", "printed"),
    [
        (0, False, [], [("serve", "host", 60.0)], True),
        (0, True, [], [("post", 0, 60.0)], True),
        (1, False, [True], [("post", 1, 3.0)], False),
        (1, False, [False], [("post", 1, 3.0)], True),
        (1, False, [None], [("post", 1, 3.0), ("post", 1, 60.0)], True),
        (1, True, [None], [("post", 1, 3.0), ("post", 1, 60.0)], True),
        (1, True, [True], [("post", 1, 3.0)], False),
    ],
)
def test_an_error_is_printed_once_and_posted_to_those_who_wait(posts, capsys, rank, agent, answers, calls, printed):
    posts.answers = list(answers)
    launch = LaunchInfo(rank=rank, world_size=2, address="host", agent_store=agent)
    signals = Signals()
    assert cli.refuse(ConfigError("wrong", where="a.yml"), launch, signals, debug=False) == 2
    assert [call[:3] for call in posts.calls] == calls
    assert all((call[3]["rank"], call[3]["code"]) == (rank, 2) for call in posts.calls)
    assert posts.calls[0][3]["line"] == "error[2] wrong; where=a.yml"
    assert capsys.readouterr().err == ("error[2] wrong; where=a.yml\n" if printed else "")
    assert signals.actions == ([None] if printed else [])


@pytest.mark.parametrize("debug", [False, True])
def test_a_bug_is_posted_with_its_traceback(posts, capsys, debug):
    launch = LaunchInfo(rank=0, world_size=2)
    assert cli.refuse(ZeroDivisionError("ours"), launch, Signals(), debug=debug) == 1
    assert (posts.calls[0][3]["code"], posts.calls[0][3]["line"]) == (1, "ZeroDivisionError: ours")
    error = capsys.readouterr().err
    assert error.endswith("ZeroDivisionError: ours\n") and "error[" not in error
    assert cli.refuse(DataError("missing"), launch, Signals(), debug=debug) == 3
    error = capsys.readouterr().err
    assert error.endswith("error[3] missing\n") and ("DataError" in error) == debug


@pytest.mark.parametrize(
    ("rank", "agent", "answered", "calls"),
    [
        (0, False, 1, [("serve", "127.0.0.1", 1.0)]),
        (0, False, 0, [("serve", "127.0.0.1", 1.0), ("post", 0, 0.0)]),
        (0, True, 0, [("post", 0, 0.0)]),
        (1, False, 0, [("post", 1, 0.0)]),
    ],
)
def test_a_signal_before_all_have_joined(posts, monkeypatch, capsys, rank, agent, answered, calls):
    posts.answered, ended, slept = answered, [], []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(time, "sleep", slept.append)
    launch = LaunchInfo(rank=rank, world_size=3, address="host", agent_store=agent)
    cli.end_while_joining(launch, signal.SIGTERM)
    line = (
        "error[10] stopped by a signal before all processes had joined, so there is nothing to save; "
        f"where=rank {rank} of 3; got=SIGTERM; do=start again"
    )
    assert ended == [10] and capsys.readouterr().err == f"{line}\n"
    assert slept == [0.5] * (len(calls) - 1)  # for the others to read it
    assert [call[:3] for call in posts.calls] == calls
    assert all((call[3]["code"], call[3]["line"], call[3]["rank"]) == (10, line, rank) for call in posts.calls)


@pytest.mark.parametrize("name", cli.RECORDER_SIZES)
def test_a_size_of_the_recorder_has_at_most_nine_digits(name):
    cli.check_recorder_sizes({name: "9" * 9, "OTHER": "x"})
    for wrong in ("9" * 10, "\u0661", "\u00b2", " 1"):
        with pytest.raises(EnvironmentProblem, match=f"where={name}"):
            cli.check_recorder_sizes({name: wrong})
