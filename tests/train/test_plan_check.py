"""The plan of a run and its measurements."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch

from neox.config.load import load_config
from neox.parallel.mesh import Mesh
from neox.plan.devices import COMPILER, cpu
from neox.plan.fit import estimate
from neox.train.plan_check import Comparison, PlanCheck
from tests.distributed import run_command
from tests.train.corpus import make_corpus


def test_planned_and_measured_are_reported():
    lines = Comparison(3, 1, (1.1e9, 1.0e9), 1.3e9, (2.0, 2.5)).lines()
    assert lines == [
        "memory: 1.100 GB planned, 1.000 GB measured (plan 10.0 % high), 1.300 GB resident, on rank 3, stage 1",
        "step: 2 s planned, 2.5 s measured, median (plan 20.0 % low)",
    ]
    assert Comparison(0, 0, (1.0, None), 0.0, (None, 1.0)).lines() == []


def test_what_was_not_measured_has_no_line_and_is_null_in_the_file(tmp_path):
    one = Comparison(2, 1, (1.1e9, None), 1.3e9, (2.0, 2.5))
    assert [line.partition(":")[0] for line in one.lines()] == ["step"]
    one.write(tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text()) == {
        "memory_bytes": {"planned": 1.1e9, "measured": None, "resident": 1.3e9},
        "step_seconds": {"planned": 2.0, "measured": 2.5},
        "rank": 2,
        "stage": 1,
    }
    assert [
        [line.partition(":")[0] for line in Comparison(0, 0, (1e9, 2e9), 3e9, seconds).lines()]
        for seconds in ((None, 2.5), (2.0, None), (2.0, 2.5))
    ] == [["memory"], ["memory"], ["memory", "step"]]


class Measured:
    """Stands for the memory of a process."""

    def __init__(self, peak: int | None = 500, resident: int = 700):
        self.peak, self.bytes, self.calls = peak, resident, []

    def poll(self):
        self.calls.append("poll")

    def stop_polling(self):
        self.calls.append("stop")

    def peak_bytes(self):
        return self.peak

    def resident(self):
        return self.bytes


def make_check(*keys: str, mesh: Mesh | None = None, **memory) -> PlanCheck:
    """A check of a small run, with 500 bytes in use."""
    overrides = ["train.global_batch_size=8", "train.micro_batch_size=2", "checkpoint.save_interval=10", *keys]
    check = PlanCheck(load_config("pythia/14M.yml", overrides=overrides), mesh or Mesh.single())
    check.memory.stop_polling()
    check.memory = Measured(**memory)
    return check


def test_the_first_two_steps_are_not_timed_and_polling_ends_with_the_fifth():
    check = make_check()
    assert check.compare(1e12).step_time[1] is None
    check.memory.calls.clear()
    for step, seconds in enumerate((100.0, 50.0, 4.0, 1.0, 3.0, 2.0, 9.0), 1):
        check.note_step(seconds)
        assert check.memory.calls == ["stop"] * (step >= 5)
    assert check.compare(1e12).step_time[1] == 3.0  # the median of five
    for _ in range(1000):
        check.note_step(7.0)
    assert check.compare(1e12).step_time[1] == 7.0 and len(check.times) == 1000


@pytest.mark.parametrize(
    ("steps", "phase", "counts"),
    [(0, "save", True), (4, "save", True), (5, "save", False), (0, "saved", False), (4, "step", False)],
)
def test_a_checkpoint_counts_if_memory_is_polled_while_it_is_saved(steps, phase, counts):
    check = make_check("checkpoint.save_iters=[3]")
    for _ in range(steps):
        check.note_step(1.0)
    check.enter(phase, 1)
    for _ in range(9):
        check.note_step(1.0)
    check.enter("save")  # too late to be measured; what came before stays
    saving = check.polled_config().checkpoint
    assert (saving.save_interval, tuple(saving.save_iters)) == ((10, (3,)) if counts else (0, ()))
    assert check.config.checkpoint.save_interval == 10
    with_copies, without = (
        estimate(config, 1, cpu(1)).memories[0].peak for config in (check.config, make_check().polled_config())
    )
    assert check.compare(1e12).memory[0] == cpu(1).reserve + (with_copies if counts else without)
    assert with_copies > without


@pytest.mark.parametrize(
    ("keys", "extra"),
    [
        (("zero.stage=0", "precision.dtype=fp32"), 0.0),
        (("zero.stage=2", "precision.dtype=bf16"), 0.0),
        (("zero.stage=3", "precision.dtype=bf16"), COMPILER),
    ],
)
def test_a_run_is_compared_with_its_plan_on_this_machine_at_the_measured_speed(keys, extra):
    check = make_check(*keys)
    check.note_save()
    expected = estimate(check.config, 1, dataclasses.replace(cpu(1), flops=3e12, flops_fp32=3e12))
    found = check.compare(3e12)
    assert found == Comparison(
        0, 0, (expected.memories[0].peak + cpu(1).reserve + extra, 500.0), 700.0, (expected.time.total, None)
    )
    assert check.memory.calls[-2:] == ["poll", "stop"]
    assert make_check(peak=None).compare(3e12).memory[1] is None


@pytest.mark.parametrize("fullest", [0, 1, 2, 3])
def test_the_process_with_the_largest_peak_is_compared_with_the_plan_of_its_stage(monkeypatch, fullest):
    """Stages first: ranks 2 and 3 hold the second one. The speed is that which the first process measured."""
    mesh = Mesh(dp=2, pp=2, rank=1)

    def all_gather(out, row):
        assert row.tolist() == [[500.0, 0.0, 1.0, 700.0]]
        for rank, each in enumerate(out):
            peak = 900.0 if rank == fullest else 100.0 + rank
            facts = [peak, float(rank // 2), 3e12 if rank == 0 else 1.0, 1000.0 + rank]
            each.copy_(torch.tensor([facts], dtype=torch.float64))

    monkeypatch.setattr("torch.distributed.all_gather", all_gather)
    check = make_check("parallel.pipeline=2", mesh=mesh)
    check.note_save()
    plan = estimate(check.config, 4, dataclasses.replace(cpu(4), flops=3e12, flops_fp32=3e12))
    found = check.compare(1.0)
    stage = fullest // 2
    assert (found.rank, found.stage, found.resident) == (fullest, stage, 1000.0 + fullest)
    assert found.memory == (plan.memories[stage].peak + cpu(4).reserve, 900.0)
    assert found.step_time[0] == plan.time.total
    assert plan.memories[0].peak != plan.memories[1].peak


def test_a_gpu_that_is_not_in_the_table_has_no_planned_time(monkeypatch):
    check = make_check()
    check.mesh = Mesh.single("cuda")
    for name, known in (("NVIDIA H100 80GB HBM3", 989e12), ("unknown", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        device = check.device(1.0)
        assert (device and device.flops) == (known and pytest.approx(known, rel=0.01))


@pytest.mark.distributed
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library is asked what is in use")
@pytest.mark.parametrize(
    "extra",
    [{}, {"train.train_iters": 7, "checkpoint.save_interval": 6}, {"zero.stage": 3}, {"model.lora": "{rank: 4}"}],
    ids=["plain", "saved later", "stage 3", "adapters"],
)
def test_planned_memory_is_within_a_tenth_of_a_real_run(tmp_path, extra):
    """Even if the copies of the first checkpoint come after the steps during which memory is polled, and with the
    imports of stage 3.
    """
    make_corpus(tmp_path)
    settings = {
        "model.num_layers": 4,
        "model.hidden_size": 128,
        "model.num_attention_heads": 4,
        "model.vocab_size": 16000,
        "model.max_position_embeddings": 128,
        "data.train": f"[{tmp_path / 'train'}]",
        "data.seq_length": 128,
        "precision.dtype": "fp32",
        "train.micro_batch_size": 16,
        "train.train_iters": 3,
        "run.dir": tmp_path / "run",
        **extra,
    }
    config = tmp_path / "config.yml"
    config.write_text("logging: {interval: 1}\n")
    command = ["train", "--conf", config, "--set", *(f"{key}={value}" for key, value in settings.items())]
    result = run_command(1, tmp_path, command)
    assert "GB planned" in result.output and "s planned" in result.output
    content = (tmp_path / "run" / "plan.json").read_text()
    found = json.loads(content)
    assert found["memory_bytes"]["planned"] == pytest.approx(found["memory_bytes"]["measured"], rel=0.1)
    assert found["step_seconds"]["measured"] > 0
    if not extra:  # started again at its end it makes no step, and measures nothing
        again = run_command(1, tmp_path, command)
        assert "done: step 3 of 3" in again.output and "GB planned" not in again.output
        assert (tmp_path / "run" / "plan.json").read_text() == content
