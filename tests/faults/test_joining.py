"""Before all processes have joined: one that fails, refuses, never comes, or is asked to end.

The others learn of it within seconds. A restart by torchrun is in tests/train/test_loop.py.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

import pytest

from tests.distributed import ROOT, Processes
from tests.faults.runs import PAIR, TINY, Setting, arguments
from tests.fork_server import environment, free_port

pytestmark = pytest.mark.distributed

BRIEF = Setting(
    2, (*TINY, "train.train_iters=2", "schedule.warmup_iters=0", "evaluate.interval=0", "checkpoint.save_interval=0")
)


@pytest.mark.parametrize(("absent", "number"), [(0, signal.SIGINT), (1, signal.SIGTERM)])
def test_a_signal_ends_a_process_that_waits(server, corpus, tmp_path, absent, number):
    training = server.start(
        arguments(corpus, tmp_path / "run", PAIR), tmp_path, ranks=2, fault=f"kill@{absent}:start:1"
    )
    here = 1 - absent
    training.wait_for(lambda: f"rank {absent} of 2 has not joined" in training.output(here))
    training.signal(number, here)
    codes = training.wait()
    assert codes[here] == 10, training.outputs()
    assert training.output(here).count("error[10] stopped by a signal before all processes had joined") == 1
    assert not (tmp_path / "run" / "checkpoints").exists(), "nothing was begun"


@pytest.mark.parametrize("absent", [0, 1])
def test_the_limit_holds_from_the_first_line_on(server, corpus, tmp_path, absent):
    training = server.start(
        arguments(corpus, tmp_path / "run", PAIR, "guard.hang_timeout=3"),
        tmp_path,
        ranks=2,
        fault=f"kill@{absent}:start:1",
    )
    codes = training.wait()
    assert codes[1 - absent] == 12, training.outputs()
    line = f"error[12] rank {absent} of 2 has not joined; where=rank {1 - absent}, store at 127.0.0.1:"
    assert line in training.output(1 - absent)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_before_it_joins_ends_the_others(server, corpus, tmp_path, rank):
    training = server.start(arguments(corpus, tmp_path / "run", PAIR), tmp_path, ranks=2, fault=f"raise@{rank}:start:1")
    assert training.wait() == [1, 1], training.outputs()
    assert "Traceback" in training.output(rank)
    assert (
        f"rank {rank} did not start, so this process ends: RuntimeError: fault raise@{rank}:start:1"
        in training.output(1 - rank)
    )


def test_a_signal_to_one_that_waits_ends_all(server, corpus, tmp_path):
    training = server.start(
        arguments(
            corpus,
            tmp_path / "run",
            Setting(
                3,
                (
                    *PAIR.overrides,
                    "train.micro_batch_size=1",
                    "train.global_batch_size=3",
                    "train.gradient_accumulation=1",
                ),
            ),
        ),
        tmp_path,
        ranks=3,
        fault="kill@2:start:1",
    )
    training.wait_for(lambda: "rank 2 of 3 has not joined" in training.output(0))
    training.signal(signal.SIGTERM, 1)
    assert training.wait() == [10, 10, -signal.SIGKILL], training.outputs()
    assert "rank 1 did not start, so this process ends: error[10]" in training.output(0)


def by_hand(folder, ranks, train_arguments, path_of_last="") -> Processes:
    """Processes of train.py with the variables that a user would set.

    The last one finds its modules in `path_of_last` first.
    """
    shared = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, str(ROOT / "train.py"), *map(str, train_arguments)]
    envs = [environment(**shared, RANK=rank, LOCAL_RANK=rank) for rank in range(ranks)]
    if path_of_last:
        envs[-1]["PYTHONPATH"] = os.pathsep.join([str(path_of_last), envs[-1]["PYTHONPATH"]])
    return Processes([command] * ranks, envs, folder)


def test_a_wrong_config_is_reported_once(tmp_path):
    wrong = tmp_path / "wrong.yml"
    wrong.write_text("model: {num_layer: 2}\n")
    results = by_hand(tmp_path, 3, ["--conf", wrong]).wait(60)
    assert [result.returncode for result in results] == [2, 2, 2], results
    assert "unknown key" in results[0].output
    assert [result.output for result in results[1:]] == ["", ""]


def test_a_package_that_cannot_be_imported_on_one_host_ends_all(corpus, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "torch.py").write_text(
        "raise ImportError('libcudart.so.13: cannot open shared object file', name='torch')\n"
    )
    results = by_hand(tmp_path, 2, arguments(corpus, tmp_path / "run", BRIEF), broken).wait(120)
    assert [result.returncode for result in results] == [14, 14], results
    assert "error[14] package cannot be imported" in results[1].output
    assert "rank 1 did not start, so this process ends: error[14] package cannot be imported" in results[0].output


def test_a_port_in_use_is_one_line(server, corpus, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        request = {"argv": ["train", *map(str, arguments(corpus, tmp_path / "run", PAIR))]}
        variables = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        log = tmp_path / "output.txt"
        pid = server.ask({**request, "variables": variables, "log": str(log)})
        server.pids.append(pid)
        end = time.monotonic() + 60
        while server.poll([pid])[0] is None and time.monotonic() < end:
            time.sleep(0.05)
        assert server.poll([pid]) == [14], log.read_text()
    (line,) = [line for line in log.read_text().splitlines() if "error" in line.lower()]
    assert (
        line.startswith(f"error[14] rank 0 cannot listen on its port; where=127.0.0.1:{port}")
        and "Address already in use" in line
    )
    assert "Traceback" not in log.read_text()
