"""Whether a run fits into memory: refused or warned before the first step, with a size that fits; a failed
allocation is explained.
"""

from __future__ import annotations

import json
import sys

import pytest

from neox.config.load import load_config
from neox.errors import MemoryExhausted
from neox.parallel.mesh import Mesh
from neox.train import fit_check
from neox.train.fit_check import (
    check_fit,
    explain_exhaustion,
    largest_batch,
    last_that,
    planned_bytes,
)
from neox.train.memory import available_bytes
from tests.fork_server import Result, fork_server
from tests.train.corpus import config_text, make_corpus

GB = 10**9


def config(*overrides: str):
    return load_config(
        "pythia/14M.yml", overrides=["train.global_batch_size=null", "train.micro_batch_size=4096", *overrides]
    )


def with_memory(monkeypatch, size: float) -> None:
    monkeypatch.setattr(fit_check, "available_bytes", lambda: size)


def test_a_batch_that_cannot_fit_is_refused_with_the_largest_that_does(monkeypatch):
    with_memory(monkeypatch, 23 * GB)
    with pytest.raises(
        MemoryExhausted,
        match="does not fit into memory.*GB planned with micro_batch_size 4096.*at most the 23.00 GB available",
    ) as caught:
        check_fit(config(), Mesh.single())
    best = int(caught.value.do.partition("train.micro_batch_size=")[2].partition(",")[0])
    assert 1 <= best < 4096
    needs = [planned_bytes(config(f"train.micro_batch_size={micro}"), 1, 0, "cpu") for micro in (best, best + 1)]
    assert needs[0] <= 0.9 * 23 * GB < needs[1]
    assert check_fit(config(f"train.micro_batch_size={best}"), Mesh.single()) is None


def test_close_to_the_limit_is_a_warning(monkeypatch):
    with_memory(monkeypatch, planned_bytes(config(), 1, 0, "cpu"))
    assert "memory may not be enough on 1 process(es) on one host" in check_fit(config(), Mesh.single())
    with_memory(monkeypatch, 0)  # the system does not report it
    assert check_fit(config(), Mesh.single()) is None


def test_a_global_batch_that_is_given_stays():
    whole = config("train.global_batch_size=4096")
    have = planned_bytes(config("train.micro_batch_size=700"), 1, 0, "cpu")
    assert largest_batch(whole, 1, "cpu", have) == {"train.micro_batch_size": 512, "train.gradient_accumulation": 8}
    assert largest_batch(config(), 1, "cpu", have)["train.micro_batch_size"] >= 700
    assert largest_batch(config(), 1, "cpu", 1e6) is None


def test_last_that():
    assert [last_that(lambda n, most=most: n <= most, [1, 2, 4, 8]) for most in (0, 1, 5, 9)] == [None, 1, 4, 8]
    assert last_that(bool, []) is None


def test_a_failed_allocation_is_explained():
    found = explain_exhaustion(MemoryError("x"), config(), Mesh.single())
    assert "GB in use" in found.got and "GB planned; x" in found.got and "--set train.micro_batch_size=" in found.do


def group(folder, limit: str, usage: int) -> None:
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text(limit)
    (folder / "memory.current").write_text(str(usage))
    (folder / "memory.stat").write_text("anon 5\ninactive_file 100\n")


def test_the_limits_of_control_groups_count(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 50 kB\nSwapFree: 10 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    assert available_bytes(tmp_path) == 60 * 1024
    group(tmp_path / "sys/fs/cgroup/job/step", "max", 0)
    assert available_bytes(tmp_path) == 60 * 1024
    group(tmp_path / "sys/fs/cgroup/job-of-another", "1", 0)
    (tmp_path / "sys/fs/cgroup/job/memory.max").write_text("20000")
    (tmp_path / "sys/fs/cgroup/job/memory.current").write_text("15000")
    (tmp_path / "sys/fs/cgroup/job/memory.stat").write_text("inactive_file 100\n")
    assert available_bytes(tmp_path) == 20000 - 15000 + 100
    assert available_bytes(tmp_path / "nowhere") is None


def train(tmp_path, *changes: str, fault: str = "") -> Result:
    if not (tmp_path / "a.yml").exists():
        make_corpus(tmp_path)
        (tmp_path / "a.yml").write_text(config_text(tmp_path, tmp_path / "run"))
    (result,) = fork_server().start(["--conf", tmp_path / "a.yml", "--set", *changes], tmp_path, fault=fault).results()
    return result


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="available memory is read from /proc")
def test_a_run_ends_with_code_6_before_its_first_step_or_in_it(tmp_path):
    result = train(
        tmp_path, "train.micro_batch_size=10000000", "train.global_batch_size=null", "train.gradient_accumulation=1"
    )
    assert result.returncode == 6, result.output
    assert "error[6] the run does not fit into memory" in result.output and "Traceback" not in result.output
    assert not (tmp_path / "run/metrics.jsonl").exists()
    result = train(tmp_path, "train.train_iters=3", fault="oom@0:backward:5")
    assert result.returncode == 6, result.output
    assert "error[6] not enough memory; where=rank 0; got=" in result.output and "CUDA out of memory" in result.output
    assert "GB in use" in result.output and "GB planned" in result.output and "Traceback" not in result.output
    assert len([json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]) == 1
