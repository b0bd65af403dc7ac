"""Whether a run fits into memory: refused or warned before the first step, with a size that fits; a failed
allocation is explained.
"""

from __future__ import annotations

import json
import sys

import pytest
import torch

from neox.config.load import load_config
from neox.errors import MemoryExhausted
from neox.parallel.mesh import Mesh
from neox.plan.devices import COMPILER, DEVICES, cpu
from neox.plan.fit import estimate
from neox.train import fit_check
from neox.train.fit_check import (
    Room,
    check_fit,
    explain_exhaustion,
    largest_batch,
    last_that,
    measure_room,
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


@pytest.mark.parametrize("used", [0.899, 0.901, 1.099, 1.101])
def test_from_which_share_of_the_memory_on_a_run_is_warned_and_refused(monkeypatch, used):
    with_memory(monkeypatch, planned_bytes(config(), 1, 0, "cpu") / used)
    if used > 1.1:
        with pytest.raises(MemoryExhausted):
            check_fit(config(), Mesh.single())
    else:
        assert (check_fit(config(), Mesh.single()) is not None) == (used > 0.9)


@pytest.mark.parametrize(
    ("keys", "extra"),
    [
        (("zero.stage=2",), 0.0),
        (("zero.stage=3",), COMPILER),
        (("parallel.pipeline=2", "zero.stage=0", "precision.dtype=fp32"), 0.0),
    ],
)
def test_the_plan_of_a_process_is_that_of_its_stage_with_what_its_device_reserves(keys, extra):
    one = config("train.micro_batch_size=8", "train.gradient_accumulation=4", *keys)
    for kind, device in (("cpu", cpu(2)), ("cuda", DEVICES[0])):
        stages = estimate(one, 2, device).memories
        for number, stage in enumerate(stages):
            expected = stage.peak + device.reserve + (extra if kind == "cpu" else 0.0)
            assert planned_bytes(one, 2, number, kind) == expected
    assert len({stage.peak for stage in stages}) == len(stages)


def others_have(monkeypatch, *rows: tuple[float, float, float]) -> None:
    """Stands for the other processes: host, planned and available bytes of each; host 0 is this process's own."""

    def all_gather(out, row):
        out[0].copy_(row)
        for number, (host, need, free) in enumerate(rows, 1):
            out[number].copy_(torch.tensor([[host or float(row[0, 0]), need, free]], dtype=torch.float64))

    monkeypatch.setattr("torch.distributed.all_gather", all_gather)


@pytest.mark.parametrize(
    ("have", "rows", "expected"),
    [
        (1e15, [(7, 10, 50), (0, 5, 1e15), (7, 30, 40)], (40, 40, 2)),
        (1e15, [(7, 30, 40), (0, 5, 1e15), (7, 10, 50)], (40, 40, 2)),
        (1e15, [(7, 10, 50), (8, 30, 90), (9, 30, 100)], (30, 90, 1)),
        (2e9, [(7, 10, 50), (0, 5, 1e9), (7, 30, 40)], (None, 1e9, 2)),
        (1e15, [(7, 10, 50), (8, 1e6, 0), (7, 30, 40)], None),  # a host that does not report its memory
    ],
)
def test_the_fullest_host_counts_with_all_of_its_processes(monkeypatch, have, rows, expected):
    with_memory(monkeypatch, have)
    others_have(monkeypatch, *rows)
    room = measure_room(config(), Mesh(dp=4))
    if expected is None:
        assert room is None
    else:
        need = planned_bytes(config(), 4, 0, "cpu") + 5 if expected[0] is None else expected[0]
        assert room == Room(need, *expected[1:])


def test_processes_of_a_host_share_a_location(monkeypatch):
    places = []

    def all_gather(out, row):
        places.append(float(row[0, 0]))
        for each in out:
            each.copy_(row)

    monkeypatch.setattr("torch.distributed.all_gather", all_gather)
    with_memory(monkeypatch, 1e15)
    for host, rank in (("a", 0), ("a", 3), ("b", 1)):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        assert measure_room(config(), Mesh(dp=4, rank=rank)).processes == 4
    assert places[0] == places[1] != places[2]


def best_of(advised: str, kind: str = "cpu") -> tuple[float, float]:
    """Planned bytes of the micro-batch size that an error proposes, and of the next one."""
    micro = int(advised.partition("train.micro_batch_size=")[2].partition(",")[0])
    return tuple(planned_bytes(config(f"train.micro_batch_size={micro + more}"), 1, 0, kind) for more in (0, 1))


def test_processes_of_a_host_share_its_memory(monkeypatch):
    need = 2 * planned_bytes(config(), 1, 0, "cpu")
    monkeypatch.setattr(fit_check, "measure_room", lambda *_: Room(need, need / 2, 2))
    with pytest.raises(MemoryExhausted, match=r"where=2 process\(es\) on one host") as caught:
        check_fit(config(), Mesh.single())
    assert f"got={need / GB:.2f} GB planned" in caught.value.line()
    fits, too_large = best_of(caught.value.do)
    assert fits <= 0.9 * need / 4 < too_large


def test_a_gpu_that_is_too_small_is_a_warning(monkeypatch):
    """Its plan has not been verified by measurement."""
    monkeypatch.setattr(fit_check, "measure_room", lambda *_: Room(300e9, 100e9, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    warning = check_fit(config(), Mesh.single("cuda"))
    assert warning.startswith(
        "memory may not be enough on one GPU of NVIDIA H100 80GB HBM3: 300.00 GB planned with micro_batch_size 4096, "
        "100.00 GB available; --set train.micro_batch_size="
    )
    monkeypatch.setattr(fit_check, "measure_room", lambda *_: Room(300e9, 1e6, 1))
    assert "; one sample does not fit either: train.activation_checkpointing: full" in check_fit(
        config(), Mesh.single("cuda")
    )


@pytest.mark.parametrize(("available", "share"), [(5e9, None), (1e15, 0.75)])
def test_a_failed_allocation_is_advised_by_what_there_is_or_by_a_part_of_the_plan(monkeypatch, available, share):
    """Where the plan fits and memory did not suffice, the plan was too low."""
    with_memory(monkeypatch, available)
    monkeypatch.setattr(fit_check, "in_use", lambda: 3e9)
    planned = planned_bytes(config(), 1, 0, "cpu")
    found = explain_exhaustion(MemoryError("x" * 300), config(), Mesh.single())
    assert found.where == "rank 0"
    assert found.got == (
        f"3.00 GB in use, {available / 1e9:.2f} GB available; {planned / 1e9:.2f} GB planned; {'x' * 200}"
    )
    fits, too_large = best_of(found.do)
    assert fits <= (0.9 * 8e9 if share is None else share * planned) < too_large


@pytest.mark.parametrize(("name", "have"), [("NVIDIA H100 80GB HBM3", 80e9), ("unknown", 85e9)])
def test_a_failed_allocation_of_a_gpu_is_explained_by_what_torch_allocated(monkeypatch, name, have):
    memory = {"mem_get_info": (1e9, 85e9), "memory_allocated": 70e9, "max_memory_allocated": 75e9}
    for function, value in {**memory, "get_device_name": name}.items():
        monkeypatch.setattr(torch.cuda, function, lambda device, value=value: value)
    found = explain_exhaustion(MemoryError("x"), config("train.micro_batch_size=32768"), Mesh.single("cuda"))
    assert found.got.startswith("70.00 GB in use, 75.00 GB at the peak, 1.00 of 85.00 GB free; ")
    fits, too_large = best_of(found.do, "cuda")
    assert fits <= 0.9 * have < too_large


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
