"""Sums of traffic, by hand; and against the bytes that a benchmark counts in real steps."""

from __future__ import annotations

import importlib
import json
import sys
from types import ModuleType

import pytest

from neox.config.load import load_config
from neox.plan.communication import traffic, wire_bytes
from neox.plan.sizes import resolve
from tests.distributed import run_ranks

STREAM = 2048 * 768 * 2  # bytes of [1, s, h] in bf16


def sent(*overrides: str, world: int, stage: int = 0, lower_bound: bool = False) -> dict[str, float]:
    config = load_config(
        "pythia/160M.yml", overrides=["train.micro_batch_size=1", "train.global_batch_size=null", *overrides]
    )
    layout = resolve(config, world)
    out: dict[str, float] = {}
    for row in traffic(config, layout, layout.stages[stage], lower_bound=lower_bound):
        out[row.axis] = out.get(row.axis, 0.0) + row.sent
    return out


def test_a_ring_sends_its_share():
    assert wire_bytes("all_reduce", 100.0, 4) == 150.0
    assert wire_bytes("all_gather", 100.0, 4) == wire_bytes("reduce_scatter", 100.0, 4) == 75.0
    assert wire_bytes("send", 100.0, 4) == 100.0


def test_one_process_sends_nothing():
    assert sent(world=1) == {}


def test_tensor_parallelism_sums_streams():
    """Parallel residual: one sum forward and two backward per block, one each for embedding and head; the loss sums
    16 bytes a token.
    """
    assert sent("parallel.tensor=2", world=2)["tensor"] == (12 * 3 + 2) * STREAM + 16 * 2048


def test_sequence_parallelism_adds_only_the_regathering_of_inputs():
    plain, cut = (
        sent("parallel.tensor=4", world=4)["tensor"],
        sent("parallel.tensor=4", "parallel.sequence=true", world=4)["tensor"],
    )
    again = 0.75 * (12 * 2 + 1) * STREAM
    vectors = 1.5 * 2 * (12 * 6 + 2) * 768
    assert cut == pytest.approx(plain + again + vectors)


def test_a_stage_sends_the_stream_forward_and_its_gradient_back():
    pipeline = ("parallel.pipeline=3", "train.gradient_accumulation=5")
    assert [sent(*pipeline, world=3, stage=i)["pipeline"] for i in range(3)] == [5 * STREAM, 10 * STREAM, 5 * STREAM]


@pytest.mark.parametrize(("zero", "per_parameter"), [(1, 2 * 2 + 2), (2, 2 * 3 * 2 + 2), (3, 3 * (2 + 2))])
def test_replicas_send_gradients_and_weights(zero, per_parameter):
    total = sent(f"zero.stage={zero}", "train.gradient_accumulation=3", world=4)["data"]
    assert total == pytest.approx(0.75 * per_parameter * 162_322_944)


@pytest.mark.parametrize(("zero", "per_parameter"), [(1, 2 + 2), (2, 3 * 2 + 2), (3, 3 * (2 + 2))])
def test_the_lower_bound_reduce_scatters_gradients(zero, per_parameter):
    total = sent(f"zero.stage={zero}", "train.gradient_accumulation=3", world=4, lower_bound=True)["data"]
    assert total == pytest.approx(0.75 * per_parameter * 162_322_944)


def test_what_cannot_stay_gathered_is_gathered_twice():
    small, large = (sent("zero.stage=3", f"model.num_layers={layers}", world=4)["data"] for layers in (12, 200))
    count = 162_322_944 + 188 * (162_322_944 - 2 * 50304 * 768 - 2 * 768) / 12
    assert small == pytest.approx(0.75 * (2 + 2) * 162_322_944) and large == pytest.approx(0.75 * (2 + 2 * 2) * count)


def rows(*overrides: str, world: int = 2, stage: int = 0) -> list[tuple]:
    config = load_config(
        "pythia/160M.yml", overrides=["train.micro_batch_size=4", "train.global_batch_size=null", *overrides]
    )
    layout = resolve(config, world)
    return [
        (row.what, row.kind, row.size, row.count, row.members)
        for row in traffic(config, layout, layout.stages[stage])
        if row.axis != "data"
    ]


FULL = "train.activation_checkpointing=full"
LOSS = ("statistics of the loss", "all_reduce", 16 * 4 * 2048, 1, 2)


@pytest.mark.parametrize(("overrides", "passes"), [((), 2), ((FULL,), 3)])
def test_context_parallelism_exchanges_heads_in_every_pass(overrides, passes):
    assert rows("parallel.context=2", *overrides) == [
        ("queries, keys, values", "all_to_all", 3 * 4 * STREAM / 2, passes * 12, 2),
        ("outputs of the heads", "all_to_all", 4 * STREAM / 2, passes * 12, 2),
    ]


def test_blocks_one_after_the_other_have_two_sums():
    assert rows("parallel.tensor=2", "model.parallel_residual=false", "model.qk_norm=true") == [
        ("outputs of the blocks, embedding", "all_reduce", 4 * STREAM, 2 * 12 + 1, 2),
        ("gradients of the inputs", "all_reduce", 4 * STREAM, 2 * 12 + 1, 2),
        ("gradients of the heads' norms", "all_reduce", 64 * 2, 2 * 12, 2),
        LOSS,
    ]


def test_recomputed_blocks_sum_again_what_dropout_needs():
    assert rows("parallel.tensor=2", "model.hidden_dropout=0.1", FULL) == [
        ("outputs of the blocks, embedding", "all_reduce", 4 * STREAM, 4 * 12 + 1, 2),
        ("gradients of the inputs", "all_reduce", 4 * STREAM, 2 * 12 + 1, 2),
        LOSS,
    ]


def test_recomputed_blocks_under_sequence_parallelism():
    assert rows("parallel.tensor=2", "parallel.sequence=true", FULL) == [
        ("outputs of the blocks, embedding", "reduce_scatter", 4 * STREAM, 12 + 1, 2),
        ("inputs of the blocks, head", "all_gather", 4 * STREAM, 4 * 12 + 1, 2),
        ("gradients of the inputs", "reduce_scatter", 4 * STREAM, 2 * 12 + 1, 2),
        ("inputs for the weights' gradients", "all_gather", 4 * STREAM, 2 * 12 + 1, 2),
        ("gradients of the outputs", "all_gather", 4 * STREAM, 12 + 1, 2),
        ("gradients of norms and output biases", "all_reduce", (12 * 6 + 2) * 768 * 2, 1, 2),
        LOSS,
    ]


def test_a_tied_embedding_is_sent_once_and_its_gradient_in_fp32():
    table = 50304 * 768
    first, last = (rows("parallel.pipeline=2", "model.tie_embeddings=true", stage=stage) for stage in (0, 1))
    assert first == [("residual stream", "send", 4 * STREAM, 1, 2), ("tied embedding", "send", 2 * table, 1, 2)]
    assert last == [
        ("its gradient", "send", 4 * STREAM, 1, 2),
        ("gradient of the tied embedding", "send", 4 * table, 1, 2),
    ]


def test_the_last_stage_has_the_head_and_the_loss():
    options = ("parallel.tensor=2", "parallel.pipeline=3", "train.gradient_accumulation=2", "zero.stage=1")
    first, middle, last = (rows(*options, world=6, stage=stage) for stage in range(3))
    layers = [int((count - end) / 2) for (_, _, _, count, _), end in ((first[0], 2), (middle[0], 0), (last[0], 0))]
    assert sum(layers) == 12
    for found, blocks, ends in ((first, layers[0], (1, 0)), (middle, layers[1], (0, 0)), (last, layers[2], (0, 1))):
        assert found[:2] == [
            ("outputs of the blocks, embedding", "all_reduce", 4 * STREAM, 2 * (blocks + ends[0]), 2),
            ("gradients of the inputs", "all_reduce", 4 * STREAM, 2 * (2 * blocks + ends[1]), 2),
        ]
    message = ("send", 4 * STREAM, 2, 3)
    assert first[2:] == [("residual stream", *message)]
    assert middle[2:] == [("residual stream", *message), ("its gradient", *message)]
    assert last[2:] == [("statistics of the loss", "all_reduce", 16 * 4 * 2048, 2, 2), ("its gradient", *message)]


def test_vectors_of_blocks_one_after_the_other_under_sequence_parallelism():
    """Two sums of a block, and learned positions among the parameters of which a member sees a part."""
    found = rows("parallel.tensor=2", "parallel.sequence=true", "model.parallel_residual=false",
                 "model.position_embedding=learned", "model.rotary_pct=1", "model.qk_norm=true")  # fmt: skip
    vectors = 12 * (6 * 768 + 2 * 64) + 2 * 768 + 2048 * 768
    assert found == [
        ("outputs of the blocks, embedding", "reduce_scatter", 4 * STREAM, 2 * 12 + 1, 2),
        ("inputs of the blocks, head", "all_gather", 4 * STREAM, 2 * 12 + 1, 2),
        ("gradients of the inputs", "reduce_scatter", 4 * STREAM, 2 * 12 + 1, 2),
        ("inputs for the weights' gradients", "all_gather", 4 * STREAM, 2 * 12 + 1, 2),
        ("gradients of the outputs", "all_gather", 4 * STREAM, 2 * 12 + 1, 2),
        ("gradients of norms and output biases", "all_reduce", vectors * 2, 1, 2),
        LOSS,
    ]


@pytest.mark.parametrize(
    ("dropout", "full", "sums"), [("0", False, 1), ("0.1", False, 2), ("0", True, 1), ("0.1", True, 4)]
)
def test_the_sums_of_parallel_residuals(dropout, full, sums):
    """Dropout acts on each branch, so each is summed; what the recomputation sums again is what dropout needs."""
    more = (FULL,) if full else ()
    found = rows("parallel.tensor=2", f"model.hidden_dropout={dropout}", *more)
    assert found[0][3] == sums * 12 + 1


def replicated(*overrides: str, world: int = 4, lower_bound: bool = False) -> list[tuple]:
    config = load_config(
        "pythia/160M.yml", overrides=["train.micro_batch_size=1", "train.global_batch_size=null", *overrides]
    )
    layout = resolve(config, world)
    found = traffic(config, layout, layout.stages[0], lower_bound=lower_bound)
    return [(row.what, row.kind, row.size, row.count, row.members) for row in found if row.axis == "data"]


@pytest.mark.parametrize(
    ("options", "reduction", "gathers"),
    [
        (("zero.stage=0", "precision.dtype=fp32"), ("all_reduce", 4, 1), None),
        (("zero.stage=0",), ("all_reduce", 2, 1), (2, 1)),  # stage 1 in effect
        (("zero.stage=1",), ("all_reduce", 2, 1), (2, 1)),
        (("zero.stage=1", "precision.dtype=fp32"), ("all_reduce", 4, 1), (4, 1)),
        (("zero.stage=2",), ("all_reduce", 2, 3), (2, 1)),
        (("zero.stage=3",), ("reduce_scatter", 2, 3), (2, 3)),
    ],
)
def test_the_collectives_of_the_replicas(options, reduction, gathers):
    kind, element, count = reduction
    total = 162_322_944
    for lower_bound in (False, True):
        wanted = "reduce_scatter" if lower_bound and gathers else kind
        rest = [] if gathers is None else [("weights", "all_gather", gathers[0] * total, gathers[1], 4)]
        assert replicated(*options, "train.gradient_accumulation=3", lower_bound=lower_bound) == [
            ("gradients", wanted, element * total, count, 4),
            *rest,
        ]


def test_members_of_a_context_group_are_replicas():
    assert [row[4] for row in replicated("parallel.context=2")] == [4, 4]
    assert replicated("parallel.context=2", world=2)[0][4] == 2 and replicated(world=1) == []


def test_a_tied_embedding_is_divided_over_the_tensor_group():
    options = ("parallel.pipeline=2", "model.tie_embeddings=true", "parallel.tensor=2", "precision.dtype=fp32")
    table = 50432 // 2 * 768
    first, last = (rows(*options, world=4, stage=stage)[-1] for stage in (0, 1))
    assert first == ("tied embedding", "send", 4 * table, 1, 2)
    assert last == ("gradient of the tied embedding", "send", 4 * table, 1, 2)


def benchmark() -> ModuleType:
    """benchmarks/train/bench_scaling.py; it adds its folder to sys.path."""
    return importlib.import_module("benchmarks.train.bench_scaling")


def count_sent(out: str) -> None:
    """Entry of a process: runs every layout of two processes."""
    benchmark().run_rank(2, out)


@pytest.mark.distributed
def test_what_two_processes_send_is_what_is_planned(tmp_path, monkeypatch):
    """Counted at torch's dispatcher. DeepSpeed's ZeRO 1 and 2 all-reduce, and send more than the lower bound."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    run_ranks("tests.plan.test_communication:count_sent", 2, tmp_path, [tmp_path / "out.json"])
    monkeypatch.setattr(benchmark(), "count", lambda processes: json.loads((tmp_path / "out.json").read_text()))
    rows = list(benchmark().compare((2,)))
    over = {"data parallel, ZeRO 1": 6 / 4, "data parallel, ZeRO 2": 9 / 5}
    assert len(rows) == 9 and {row.name for row in rows} > set(over)
    for row in rows:
        assert row.ours == pytest.approx(row.peer * over.get(row.name, 1.0), rel=0.01), row.name
