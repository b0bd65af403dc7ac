"""From a config to an exit code, in this process."""

import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from neox.errors import DataError, HangError, MemoryExhausted
from neox.parallel.mesh import Mesh
from neox.runtime.launch import LaunchInfo
from neox.runtime.signals import StopSignals
from neox.train import start as module
from neox.train.start import start
from tests.train.corpus import make_config, make_corpus

os.environ.setdefault("LOCAL_RANK", "0")


def test_a_good_run_is_0_and_a_user_error_is_one_line(tmp_path, capfd):
    make_corpus(tmp_path / "corpus")
    quick = ("train.train_iters=2", "evaluate.interval=0")
    assert (
        start(
            make_config(tmp_path / "corpus", tmp_path / "run", *quick),
            LaunchInfo(),
            "cpu",
            signals=StopSignals(),
            debug=False,
        )
        == 0
    )
    capfd.readouterr()
    missing = make_config(tmp_path / "gone", tmp_path / "other", *quick)
    assert start(missing, LaunchInfo(), "cpu", signals=StopSignals(), debug=False) == 3
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error[3] ")
    assert start(missing, LaunchInfo(), "cpu", signals=StopSignals(), debug=True) == 3
    assert "Traceback" in capfd.readouterr().err


def test_a_bug_keeps_its_traceback_below_the_line(tmp_path, capfd, monkeypatch):
    def broken(config, mesh):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(module, "check_fit", broken)
    assert start(make_config(tmp_path, tmp_path), LaunchInfo(), "cpu", signals=StopSignals(), debug=False) == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("error[1] ZeroDivisionError: a bug")
    assert any("Traceback" in line for line in lines[1:])


def test_groups_outlast_the_watchdog_as_soon_as_they_exist(tmp_path, capfd, monkeypatch):
    """NCCL's 10 minutes would end the wait for a long index build."""
    limits = []

    def end(config, mesh):
        raise ZeroDivisionError

    monkeypatch.setattr(module, "raise_group_timeouts", limits.append)
    monkeypatch.setattr(module, "check_fit", end)
    config = make_config(tmp_path, tmp_path, "guard.hang_timeout=77")
    assert start(config, LaunchInfo(), "cpu", signals=StopSignals(), debug=False) == 1
    assert limits == [77]


def test_deterministic_algorithms_are_those_of_the_run(tmp_path):
    make_corpus(tmp_path / "corpus")
    quick = ("train.train_iters=1", "evaluate.interval=0")
    chosen = []
    for wanted in ("true", "false"):
        config = make_config(tmp_path / "corpus", tmp_path / wanted, *quick, f"train.deterministic={wanted}")
        assert start(config, LaunchInfo(), "cpu", signals=StopSignals(), debug=False) == 0
        chosen.append(
            (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)
        )
    assert chosen == [(True, False), (False, False)]


def test_a_start_does_not_import_torchs_compiler(tmp_path, repository):
    """Its import takes two seconds in every process, and nothing is compiled. (Stage 3 of DeepSpeed imports it
    whatever is done.)
    """
    make_corpus(tmp_path / "corpus")
    probe = (
        "import sys; from pathlib import Path; from neox.runtime.launch import LaunchInfo\n"
        "from neox.runtime.signals import StopSignals; from neox.train.start import start\n"
        "from tests.train.corpus import make_config\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "for dtype, stage in (('fp32', 0), ('bf16', 0), ('fp32', 1), ('bf16', 2)):\n"
        "    options = (f'precision.dtype={dtype}', f'zero.stage={stage}', 'train.train_iters=1')\n"
        "    config = make_config(folder / 'corpus', folder / f'{dtype}-{stage}', *options, 'evaluate.interval=0')\n"
        "    assert start(config, LaunchInfo(), 'cpu', signals=StopSignals(), debug=True) == 0\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, cwd=repository)
    assert done.stdout.splitlines()[-1] == "False", done.stdout + done.stderr


def test_which_errors_have_a_traceback(capfd):
    cases = [
        (DataError("bad", where="x"), False, ["error[3] bad; where=x"]),
        (DataError("bad", where="x"), True, ["error[3] bad; where=x", "Traceback"]),
        (KeyError("k"), False, ["error[1] KeyError: 'k'; where=rank 4; do=this is a bug in neox", "Traceback"]),
        (RuntimeError("Broken pipe"), False, ["error[13] another process was lost; where=rank 4"]),
    ]
    for error, debug, lines in cases:
        try:
            raise error
        except Exception as caught:
            module.report(caught, 4, debug)
        printed = capfd.readouterr().err.splitlines()
        assert [text.startswith(line) for text, line in zip(printed, lines, strict=False)] == [True] * len(lines)
        assert len(printed) == 1 or len(lines) == 2


def test_only_a_failed_allocation_is_explained_by_the_plan(monkeypatch):
    explained = []
    monkeypatch.setattr(
        module, "explain_exhaustion", lambda *call: (explained.append(call), MemoryExhausted("explained"))[1]
    )
    for error in (MemoryError("x"), RuntimeError("CUDA out of memory. Tried to allocate")):
        with pytest.raises(MemoryExhausted, match="explained"), module.memory_errors("config", "mesh"):
            raise error
        assert explained.pop() == (error, "config", "mesh")
    for error in (DataError("x"), RuntimeError("shapes differ"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, module.memory_errors("config", "mesh"):
            raise error
        assert caught.value is error
    assert explained == []


class Watched:
    """Stands for the watchdog of one of several processes."""

    def __init__(self, calls):
        self.calls = calls

    def handshake(self):
        self.calls.append("handshake")

    def finish(self):
        self.calls.append("finish")

    def fail(self, error, report):
        self.calls.append("fail")
        report()
        return 13  # what another process posted first


@pytest.fixture
def several(monkeypatch):
    """Starts rank `rank` of two, whose parts are stand-ins; returns the exit code, and what was done in which order."""

    def begin(config, rank=0, fails_at="", warning=None):
        calls, signals = [], StopSignals()
        signals.end_at_once(calls.append)

        def step(name, result=None):
            def call(*arguments, **options):
                calls.append(name)
                if name == fails_at:
                    raise HangError("rank 1 of 2 has not joined") if name == "claim" else DataError("bad")
                return result

            return call

        def connect(launch, token, *, limit, heartbeat):
            calls.append(f"watch {token} {limit:.0f} {signals.at_once}")
            return Watched(calls)

        monkeypatch.setattr(module, "claim_rank", step("claim", SimpleNamespace(token="token")))
        monkeypatch.setattr(module, "connect", connect)
        monkeypatch.setattr(module, "form_process_group", step("group", Mesh(dp=2, rank=rank)))
        monkeypatch.setattr(module, "raise_group_timeouts", lambda limit: calls.append(f"timeouts {limit:.0f}"))
        monkeypatch.setattr(module, "RankGroup", lambda *ranks: calls.append(f"ranks {ranks}"))
        monkeypatch.setattr(module, "check_consistency", step("compare"))
        monkeypatch.setattr(module, "check_fit", step("fit", warning))
        monkeypatch.setattr(module, "build", step("build", contextlib.nullcontext("training")))
        monkeypatch.setattr(module, "run", lambda training: calls.append(f"run {training}"))
        monkeypatch.setattr(module, "exit_now", lambda code: calls.append(f"exit {code}"))
        launch = LaunchInfo(rank, rank, 2, "host", 7, "by hand")
        return start(config, launch, "cpu", signals=signals), calls

    return begin


JOINED = ["claim", "watch token 77 None", "group", "timeouts 77", "handshake"]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_several_processes_starts_in_this_order(several, tmp_path, capfd, rank):
    config = make_config(tmp_path, tmp_path, "guard.hang_timeout=77")
    assert several(config, rank, warning="tight") == (
        0,
        [*JOINED, f"ranks ({rank}, 2)", "compare", "fit", "build", "run training", "finish"],
    )
    out, err = capfd.readouterr()
    assert out == ("2 processes by by hand; rank 0 at host:7\n" if rank == 0 else "")
    assert err == ("note: tight\n" if rank == 0 else "")


@pytest.mark.parametrize("fails_at", ["claim", "group", "compare", "fit", "build"])
def test_an_error_of_one_of_several_processes_ends_it_with_the_code_of_all(several, tmp_path, capfd, fails_at):
    """Before it has joined, the rendezvous has notified whoever waits."""
    config = make_config(tmp_path, tmp_path, "guard.hang_timeout=77")
    code, calls = several(config, fails_at=fails_at)
    if fails_at == "claim":
        assert (code, calls) == (12, ["claim"])
        assert capfd.readouterr().err == "error[12] rank 1 of 2 has not joined\n"
    else:
        assert calls[-3:] == [fails_at, "fail", "exit 13"] and code == 13
        assert capfd.readouterr().err == "error[3] bad\n"
