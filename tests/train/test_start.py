"""From a config to an exit code, in this process."""

import os
import subprocess
import sys

import torch

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
