"""Launchers that are killed: no process is left over, complete checkpoints remain, and the next start resumes."""

import os
import signal

import psutil
import pytest

from tests.distributed import start_training
from tests.distributed import train as launch
from tests.faults.runs import ENDLESS, Setting, arguments, complete, damaged
from tests.train.corpus import records

pytestmark = [pytest.mark.distributed, pytest.mark.faults]


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it, top down."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


@pytest.mark.parametrize(
    ("launcher", "ranks", "victim"),
    [
        ("deepspeed", 2, "deepspeed"),
        ("deepspeed", 2, "deepspeed.launcher.launch"),
        ("deepspeed", 1, "deepspeed"),
        ("torchrun", 2, "torch.distributed.run"),
    ],
)
def test_a_killed_launcher_ends_all(corpus, tmp_path, launcher, ranks, victim):
    setting = Setting(ranks, (*ENDLESS, "checkpoint.save_interval=3"))
    running = start_training(launcher, ranks, tmp_path, arguments(corpus, tmp_path / "run", setting))
    metrics = tmp_path / "run" / "metrics.jsonl"
    running.wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 6, 400)
    processes = family(running.processes[0].pid)
    (target,) = [
        one for one in processes if any(word == victim or word.endswith(f"/{victim}") for word in one.cmdline())
    ]
    try:
        os.kill(target.pid, signal.SIGKILL)
        running.processes[0].wait(120)  # else it is a zombie that waits for us
        _, alive = psutil.wait_procs(processes[1:], timeout=120)
        assert alive == [], running.outputs()
    finally:
        for one in psutil.wait_procs(processes, timeout=0.1)[1]:
            one.kill()
    lines = [line for line in running.output().splitlines() if line.startswith("error[")]
    # its agent holds the store too
    words = ("error[13] launcher exited", *(["error[13] the first process exited"] if launcher == "torchrun" else []))
    assert lines and all(line.startswith(words) for line in lines), running.outputs()
    assert damaged(tmp_path / "run") == []
    kept = max(int(name[5:]) for name in complete(tmp_path / "run"))
    more = ["train.train_iters=" + str(kept + 4), "schedule.decay_iters=100000"]
    launch(
        "python" if ranks == 1 else launcher, ranks, tmp_path, arguments(corpus, tmp_path / "run", setting, *more)
    ).check()
    assert [row["step"] for row in records(tmp_path / "run")] == list(range(1, kept + 5))
