"""NaN, infinity and overflow in one process's losses, gradients and weights: all processes detect them in time."""

import itertools

import pytest

from neox.checkpoint.verify import digest
from tests.faults.runs import TINY, Setting, arguments, newest
from tests.train.corpus import records

pytestmark = pytest.mark.distributed

BASE = (*TINY, "train.train_iters=5", "checkpoint.save_interval=1", "evaluate.interval=0", "model.num_layers=2")
LAYOUTS = {
    "dp2 zero0": (2, ("zero.stage=0",)),
    "dp2 zero1": (2, ("zero.stage=1",)),
    "dp2 zero2": (2, ("zero.stage=2",)),
    "dp2 zero3": (2, ("zero.stage=3",)),
    "pp2 zero1": (2, ("zero.stage=1", "parallel.pipeline=2")),
    "tp2 zero0": (2, ("zero.stage=0", "parallel.tensor=2")),
}
VALUES = [
    ("nan", "loss"),
    ("inf", "loss"),
    ("nan", "loss_number"),
    ("inf", "loss_number"),
    ("nan", "gradient"),
    ("inf", "gradient"),
    ("huge", "gradient"),
]
QUICK = [
    ("dp2 zero1", "nan", "loss"),
    ("dp2 zero3", "inf", "gradient"),
    ("pp2 zero1", "inf", "loss_number"),
    ("dp2 zero2", "inf", "loss_number"),
]
PER_STEP = {"loss": 2, "gradient": 2, "loss_number": 1}  # visits of a site per step: micro-batches of a process


def skipped(server, corpus, folder, layout: str, kind: str, site: str, rank: int, dtype: str) -> None:
    """Step 3 is poisoned and skipped: the next checkpoint holds the bytes of the previous one; training continues."""
    ranks, overrides = LAYOUTS[layout]
    per_step = PER_STEP[site] if site == "loss_number" else accumulation(layout)
    setting = Setting(ranks, (*BASE, *overrides, f"precision.dtype={dtype}", "guard.non_finite=skip"))
    fault = f"{kind}@{rank}:{site}:{2 * per_step + 1}"
    training = server.start(arguments(corpus, folder / "run", setting), folder, ranks=ranks, fault=fault)
    assert training.wait() == [0] * ranks, f"{fault}\n{training.outputs()}"
    rows = records(folder / "run")
    assert [row["step"] for row in rows if row["grad_norm"] is None] == [3], f"{fault}: {rows}"
    assert "step 3: the " in training.output() and "the update is skipped" in training.output()
    before, after, later = (digest(folder / "run" / "checkpoints" / f"step_{step:08d}") for step in (2, 3, 4))
    assert before == after, fault
    assert before != later


def accumulation(layout: str) -> int:
    """Micro-batches of a step on one process: 8 samples, 2 at a time."""
    return 2 if layout.startswith("dp2") else 4


@pytest.mark.parametrize(("layout", "kind", "site"), QUICK)
def test_a_poisoned_step_is_skipped(server, corpus, tmp_path, layout, kind, site):
    skipped(server, corpus, tmp_path, layout, kind, site, rank=1, dtype="fp32")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("layout", "kind", "site", "dtype"),
    [
        (layout, *value, dtype)
        for layout, value, dtype in itertools.product(LAYOUTS, VALUES, ("fp32", "bf16"))
        if ((layout, *value) not in QUICK or dtype == "bf16") and (layout, value[0]) != ("dp2 zero3", "huge")
    ],
)
def test_a_poisoned_step_is_skipped_in_every_layout(server, corpus, tmp_path, layout, kind, site, dtype):
    if layout == "tp2 zero0" and (site in ("loss", "loss_number") or kind == "huge"):
        # the process that speaks for the tensor group, and has the half of the vocabulary that the corpus uses: 1e30
        # times no gradient is none
        rank = 0
    else:
        rank = 1
    skipped(server, corpus, tmp_path, layout, kind, site, rank, dtype)


@pytest.mark.parametrize(("layout", "fault"), [("dp2 zero1", "nan@1:gradient:5"), ("pp2 zero1", "nan@0:parameter:3")])
def test_a_poisoned_step_ends_the_run(server, corpus, tmp_path, layout, fault):
    stopped(server, corpus, tmp_path, layout, fault)


@pytest.mark.faults
@pytest.mark.parametrize(("layout", "kind", "rank"), list(itertools.product(LAYOUTS, ("nan", "inf"), (0, 1))))
def test_a_poisoned_weight_ends_the_run(server, corpus, tmp_path, layout, kind, rank):
    stopped(server, corpus, tmp_path, layout, f"{kind}@{rank}:parameter:3")


def stopped(server, corpus, folder, layout, fault):
    ranks, overrides = LAYOUTS[layout]
    training = server.start(
        arguments(corpus, folder / "run", Setting(ranks, (*BASE, *overrides))), folder, ranks=ranks, fault=fault
    )
    assert training.wait() == [11] * ranks, f"{fault}\n{training.outputs()}"
    lines = [line for rank in range(ranks) for line in training.output(rank).splitlines() if line.startswith("error[")]
    assert len(lines) == 1, lines
    assert (
        "is not finite" in lines[0] and "step 3" in lines[0] and "samples [16, 17, 18, 19, 20, 21, 22, 23]" in lines[0]
    )
    assert newest(folder / "run").name == "step_00000002"
    if ":parameter:" in fault:
        assert "the weight is not finite" in lines[0] and f" on rank {fault.split('@')[1][0]}" in lines[0]


def test_too_many_in_a_row_end_the_run(server, corpus, tmp_path):
    setting = Setting(1, (*BASE, "guard.non_finite=skip", "guard.max_skipped=2", "train.train_iters=20"))
    training = server.start(arguments(corpus, tmp_path / "run", setting), tmp_path, fault="nan@0:loss_number:4+")
    assert training.wait() == [11], training.outputs()
    assert "at most 2 steps skipped in a row" in training.output()
    assert [row["step"] for row in records(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_a_spike_rolls_back_to_the_newest_checkpoint_and_continues_with_other_data(server, corpus, tmp_path):
    overrides = (
        *TINY,
        "train.train_iters=16",
        "checkpoint.save_interval=4",
        "evaluate.interval=0",
        "guard.loss_spike=rollback",
        "zero.stage=1",
    )
    setting = Setting(2, overrides)
    training = server.start(
        arguments(corpus, tmp_path / "run", setting), tmp_path, ranks=2, fault="times10@*:loss_number:11"
    )
    assert training.wait() == [0, 0], training.outputs()
    text = training.output()
    assert "step 11: loss" in text and "times the median of the last 10, the update is skipped" in text
    assert (
        f"rolled back to {tmp_path / 'run' / 'checkpoints' / 'step_00000008'}; the data continues at sample 88" in text
    )
    rows = records(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 17))
    assert [row["samples"] for row in rows] == [8 * n for n in range(1, 9)] + [88 + 8 * n for n in range(1, 9)]
    assert len((tmp_path / "run" / "metrics.dropped.jsonl").read_text().splitlines()) == 2


def test_a_spike_without_a_checkpoint_ends_the_run(server, corpus, tmp_path):
    setting = Setting(
        1,
        (
            *TINY,
            "train.train_iters=16",
            "checkpoint.save_iters=[15]",
            "checkpoint.save_interval=0",
            "guard.loss_spike=rollback",
        ),
    )
    training = server.start(arguments(corpus, tmp_path / "run", setting), tmp_path, fault="times10@0:loss_number:11")
    assert training.wait() == [11], training.outputs()
    assert (
        "error[11] loss spike, and no checkpoint to roll back to; where=step 11; got=no checkpoint" in training.output()
    )


def test_a_flipped_bit_in_one_replica_is_found_within_the_interval(server, corpus, tmp_path):
    setting = Setting(2, (*BASE, "zero.stage=0", "train.train_iters=30", "guard.drift_interval=4"))
    training = server.start(
        arguments(corpus, tmp_path / "run", setting), tmp_path, ranks=2, fault="times10@1:parameter:6"
    )
    assert training.wait() == [11, 11], training.outputs()
    lines = [line for rank in (0, 1) for line in training.output(rank).splitlines() if line.startswith("error[")]
    assert len(lines) == 1
    assert "replicas have drifted apart; where=step 8; got=embedding.word.weight on rank 0, 1" in lines[0], lines[0]
