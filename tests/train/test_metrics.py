"""metrics.jsonl: full precision, nothing twice after a resume, and what the numbers are measured against."""

import json
import os
import resource
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from neox.errors import DiskError
from neox.train.metrics import DROPPED, MetricsLog, drop_after, measured_flops, memory_gb, peak_flops, vector_flops


def write(folder, steps):
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "loss": n / 3}) + "\n" for n in steps))


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_records_keep_full_precision(tmp_path):
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    log.write({"step": 1, "loss": 1 / 3, "lr": 1e-4 / 7})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 1 / 3, "lr": 1e-4 / 7}


def test_resuming_moves_later_records_aside(tmp_path):
    write(tmp_path, range(1, 11))
    log = MetricsLog(tmp_path, 6, tensorboard=False)
    assert log.dropped == 4
    log.write({"step": 7})
    log.close()
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5, 6, 7]
    assert steps(tmp_path / "metrics.dropped.jsonl") == [7, 8, 9, 10]
    assert drop_after(tmp_path, 5) == 2
    assert steps(tmp_path / "metrics.dropped.jsonl") == [7, 8, 9, 10, 6, 7]
    assert not list(tmp_path.glob("*.tmp*"))


def test_nothing_to_move_leaves_the_file_alone(tmp_path):
    assert drop_after(tmp_path, 3) == 0
    write(tmp_path, [1, 2, 3])
    before = (tmp_path / "metrics.jsonl").stat()
    assert drop_after(tmp_path, 3) == 0
    assert (tmp_path / "metrics.jsonl").stat().st_mtime_ns == before.st_mtime_ns
    assert not (tmp_path / "metrics.dropped.jsonl").exists()


DAMAGED = [b'{"step": 3, "lo', b'{"step": 3}', b"\xff\xfe\n", b"[]\n", b"\n", b'{"step": "3"}\n', b'{"step": NaN}\n']


@pytest.mark.parametrize("tail", [*DAMAGED, b"[" * 100_000 + b"\n"])
def test_a_line_cut_short_by_a_crash_goes_too(tmp_path, tail):
    write(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    drop_after(tmp_path, 5)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]
    assert (tmp_path / "metrics.dropped.jsonl").exists()


def test_tensorboard_gets_the_numbers(tmp_path):
    log = MetricsLog(tmp_path, 0, tensorboard=True)
    log.write({"step": 1, "loss": 2.5, "grad_norm": None})
    log.close()
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert read.Tags()["scalars"] == ["loss"]  # neither the step nor what is null
    assert [(entry.step, entry.value) for entry in read.Scalars("loss")] == [(1, 2.5)]


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(DiskError, match=r"cannot be written.*metrics\.jsonl"):
        MetricsLog(tmp_path / "gone", 0, tensorboard=False)


@pytest.mark.parametrize("tensorboard", [True, False])
def test_a_disk_that_fills_up_is_an_error_and_not_a_hang(tmp_path, tensorboard):
    log = MetricsLog(tmp_path, 0, tensorboard=tensorboard)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DiskError, match=r"records cannot be written.*metrics\.jsonl; got=File too large"):
            for step in range(1, 100):
                log.write({"step": step, "loss": 1 / step})
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.file.closed and step > 1


@pytest.mark.parametrize("tensorboard", [True, False])
def test_lost_records_are_counted_and_no_line_is_torn(tmp_path, tensorboard):
    told: list[str] = []
    log = MetricsLog(tmp_path, 0, tensorboard=tensorboard, report=told.append)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    log.write({"step": 1, "loss": 0.5})
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 9, limits[1]))
    try:
        for step in (2, 3, 4):
            log.write({"step": step, "loss": 1 / step})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.write({"step": 5, "loss": 0.25})
    log.close()
    assert steps(log.path) == [1, 5]
    assert len(told) == 2 and told[0].startswith("training continues without this record: error[5]")
    assert told[1] == "3 records were lost, of steps 2 to 4: the disk refused them"


def test_the_speed_of_an_unknown_gpu_is_of_a_product_that_fills_it(monkeypatch):
    """On a GPU: 8192^3, once before the clock, each time between events. The product itself is left out here."""
    calls = []
    monkeypatch.setattr(torch, "linspace", lambda *bounds, device, dtype: torch.empty(1, dtype=dtype).expand(bounds[2]))
    monkeypatch.setattr(torch, "empty_like", lambda a: a)
    monkeypatch.setattr(torch, "mm", lambda a, b, out: calls.append(a.shape))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("event")

        def synchronize(self):
            calls.append("synchronize")

        def elapsed_time(self, end):
            return 2.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert measured_flops(torch.device("cuda"), torch.float32, rounds=3) == pytest.approx(2 * 8192**3 / 2e-3)
    assert calls == ["event", torch.Size([8192, 8192]), "event", "synchronize"] * 4


def test_a_product_is_computed_once_more_than_it_is_timed(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "mm", lambda a, b, out: calls.append((a.dtype, tuple(a.shape))))
    assert measured_flops(torch.device("cpu"), torch.bfloat16, size=16, rounds=3) > 0
    assert calls == [(torch.bfloat16, (16, 16))] * 4


def test_peak_and_memory_are_positive_and_leave_the_random_stream_alone():
    before = torch.get_rng_state()
    assert measured_flops(torch.device("cpu"), torch.float32, size=64, rounds=1) > 1e6
    assert peak_flops(torch.device("cpu"), torch.bfloat16) > 1e6
    assert 0.01 < memory_gb(torch.device("cpu")) < 1000
    assert torch.equal(before, torch.get_rng_state())


def test_the_peak_of_a_cpu_is_at_least_that_of_its_vector_units(monkeypatch):
    """A product measured on a busy machine is slower than a step, and MFU was 129 %."""
    monkeypatch.setattr("neox.train.metrics.measured_flops", lambda *_: 1.0)
    vector = vector_flops(torch.float32)
    assert peak_flops(torch.device("cpu"), torch.float32) == max(1.0, vector)
    assert vector_flops(torch.bfloat16) in (vector, 2 * vector)
    monkeypatch.setattr("neox.train.metrics.measured_flops", lambda *_: 1e20)
    assert peak_flops(torch.device("cpu"), torch.float32) == 1e20


@pytest.mark.parametrize(
    ("flags", "dtype", "per_cycle"),
    [
        ({"avx512f", "avx2", "fma"}, torch.float32, 64),
        ({"avx2", "fma"}, torch.float32, 32),
        ({"avx2"}, torch.float32, 0),
        ({"avx512f", "avx512_bf16"}, torch.bfloat16, 128),
        ({"avx512f", "avx512_bf16"}, torch.float32, 64),
        ({"avx512f"}, torch.bfloat16, 64),
    ],
)
def test_the_speed_of_vector_units(monkeypatch, flags, dtype, per_cycle):
    """Two fused multiply-adds of a vector per cycle, at the highest clock, on every thread."""
    monkeypatch.setattr("neox.train.metrics.cpu_flags", lambda: flags)
    monkeypatch.setattr("neox.train.metrics.cpuinfo", lambda key: ["1000.5", "2000.0"] if key == "cpu MHz" else [])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert vector_flops(dtype) == per_cycle * 2e9 * 3


def test_the_peak_of_a_known_gpu_is_that_of_its_data_sheet(monkeypatch):
    monkeypatch.setattr("neox.train.metrics.measured_flops", lambda device, dtype: 7.0)
    for name, peaks in (("NVIDIA H100 80GB HBM3", (989e12, 67e12)), ("NVIDIA Unknown", (7.0, 7.0))):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        found = [peak_flops(torch.device("cuda"), dtype) for dtype in (torch.bfloat16, torch.float32)]
        assert found == pytest.approx(peaks, rel=0.01)


def test_memory_of_a_gpu_is_what_torch_allocated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2_500_000_000)
    assert memory_gb(torch.device("cuda")) == 2.5


def test_a_fifo_in_place_of_the_records_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(DiskError, match="records cannot be written; where=.*metrics.jsonl; got=a FIFO"):
        MetricsLog(tmp_path, 0, tensorboard=False)


def test_a_file_that_was_removed_or_replaced_under_the_run_is_noticed(tmp_path):
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    log.check_same_file()
    (tmp_path / "metrics.jsonl").rename(tmp_path / "elsewhere")
    with pytest.raises(DiskError, match="the run's folder was removed or replaced"):
        log.check_same_file()
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DiskError, match="removed or replaced"):
        log.check_same_file()
    log.close()


def test_resuming_keeps_the_last_good_step_in_tensorboard(tmp_path, monkeypatch):
    for time, done, last in ((1000, 0, 5), (2000, 3, 6)):
        monkeypatch.setattr("time.time_ns", lambda time=time: time * 10**9)
        log = MetricsLog(tmp_path, done, tensorboard=True)
        for step in range(done + 1, last + 1):
            log.write({"step": step, "loss": time + step})
        log.close()
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(entry.step, entry.value) for entry in read.Scalars("loss")] == [
        (1, 1001),
        (2, 1002),
        (3, 1003),
        (4, 2004),
        (5, 2005),
        (6, 2006),
    ]


def test_records_survive_a_rewrite_that_fails(tmp_path):
    """The shorter file replaces the longer one in one move, or not at all."""
    write(tmp_path, range(1, 101))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DiskError):
            drop_after(tmp_path, 98)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    drop_after(tmp_path, 98)
    assert steps(tmp_path / "metrics.jsonl") == list(range(1, 99)) and steps(tmp_path / "metrics.dropped.jsonl")[
        -2:
    ] == [99, 100]


def test_a_cut_line_does_not_join_the_next_one_that_is_dropped(tmp_path):
    for step in (3, 4):
        write(tmp_path, [1, 2])
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(f'{{"step": {step}, "lo')
        assert drop_after(tmp_path, 5) == 1
    write(tmp_path, [1, 2, 6])
    assert drop_after(tmp_path, 5) == 1
    assert (tmp_path / "metrics.dropped.jsonl").read_text().splitlines() == [
        '{"step": 3, "lo',
        '{"step": 4, "lo',
        '{"step": 6, "loss": 2.0}',
    ]


def test_the_best_of_the_timed_products_counts_and_the_first_is_not_timed(monkeypatch):
    seconds = iter([0.5, 4.0, 2.0, 8.0])
    monkeypatch.setattr("neox.train.metrics.seconds_on_cpu", lambda call: next(seconds))
    assert measured_flops(torch.device("cpu"), torch.float32, size=8, rounds=3) == 2 * 8**3 / 2.0
    monkeypatch.setattr("neox.train.metrics.seconds_on_cpu", lambda call: 1.0)
    assert measured_flops(torch.device("cpu"), torch.float32, rounds=1) == 2 * 768**3


def test_which_product_stands_for_an_unknown_device(monkeypatch):
    """A CPU's is of fp32 whatever the run computes in: its bf16 product may be an emulation."""
    monkeypatch.setattr("neox.train.metrics.vector_flops", lambda dtype: 0.0)
    speeds = {("cpu", torch.float32): 2.0, ("cuda", torch.bfloat16): 3.0, ("meta", torch.bfloat16): 4.0}
    monkeypatch.setattr("neox.train.metrics.measured_flops", lambda device, dtype: speeds[device.type, dtype])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Unknown")
    assert [peak_flops(torch.device(name), torch.bfloat16) for name in ("cpu", "cuda", "meta")] == [2.0, 3.0, 4.0]


def test_without_a_reported_clock_the_vector_units_have_no_speed(monkeypatch):
    monkeypatch.setattr("neox.train.metrics.cpuinfo", lambda key: [])
    assert vector_flops(torch.float32) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc reports the peak too")
def test_memory_is_the_peak_that_the_kernel_reports():
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    assert memory_gb(torch.device("cpu")) == pytest.approx(peak / 1e9, rel=0.02)


def test_records_are_on_the_disk_aside_before_they_leave_the_file(tmp_path, monkeypatch):
    write(tmp_path, [1, 2, 3])
    before, synced = (tmp_path / "metrics.jsonl").read_bytes(), []

    def sync(descriptor):
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        synced.append((name, (tmp_path / "metrics.jsonl").read_bytes() == before, steps(tmp_path / DROPPED)))

    monkeypatch.setattr(os, "fsync", sync)
    assert drop_after(tmp_path, 1) == 2
    assert synced[0] == (DROPPED, True, [2, 3])
    (tmp_path / DROPPED).unlink()
    (tmp_path / DROPPED).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DiskError, match="records cannot be written; where=.*metrics.dropped.jsonl"):
        MetricsLog(tmp_path, 0, tensorboard=False)
    assert steps(tmp_path / "metrics.jsonl") == [1] and not (tmp_path / "elsewhere").exists()


def test_each_row_of_lost_records_is_reported_with_its_end(tmp_path):
    told: list[str] = []
    log = MetricsLog(tmp_path, 0, tensorboard=False, report=told.append)
    file, full = log.file, open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    for step in range(1, 7):
        log.file = file if step in (1, 4) else full
        log.write({"step": step})
    log.file = file
    log.close()
    full.close()
    assert steps(log.path) == [1, 4]
    assert told[1::2] == [
        "2 records were lost, of steps 2 to 3: the disk refused them",
        "2 records were lost, of steps 5 to 6: the disk refused them",
    ]
    assert len(told) == 4 and all("got=No space left on device" in line for line in told[::2])


def test_a_record_that_is_not_json_is_no_line(tmp_path):
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write({"step": 1, "loss": float("nan")})
    log.close()
    assert log.path.read_bytes() == b""
