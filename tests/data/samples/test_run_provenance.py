"""The data of a run, looked up afterwards, against what the loader gives: every order, packing and blend, on one and
two data-parallel ranks.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from neox.config.load import loads
from neox.config.values import dump
from neox.data.samples.batch_layout import BatchLayout
from neox.data.samples.builder import build_datasets
from neox.data.samples.loader import Loader
from neox.data.samples.run_provenance import CheckpointRecord, RunProvenance
from neox.data.store.indexed import IndexedDataset
from neox.errors import ConfigError, DataError

SEQ, STEPS = 16, 6


@pytest.fixture
def sources(make_dataset) -> list[IndexedDataset]:
    """Two datasets whose token k is k, and 5000 + k."""
    sizes = np.random.default_rng(1).integers(0, 30, 60)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return [
        make_dataset([np.arange(starts[d], starts[d + 1]) + base for d in range(60)], name)
        for name, base in (("a", 0), ("b", 5000))
    ]


def config_of(run, data: dict, **train):
    values = {
        "model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 8000},
        "data": {"seq_length": SEQ, **data},
        "train": {"train_iters": STEPS, "micro_batch_size": 2, "gradient_accumulation": 2, **train},
        "run": {"dir": str(run)},
    }
    return loads(json.dumps(values))


def leave(run, config, batches: list[int], start: int = 0) -> None:
    """The files of a run with `batches` samples in each step."""
    run.mkdir(exist_ok=True)
    (run / "config.lock.yml").write_text(dump(config))
    ends = start + np.cumsum(batches)
    rows = [{"step": step, "samples": int(end), "tokens": int(end - start) * SEQ} for step, end in enumerate(ends, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def texts(pieces, datasets: dict[str, IndexedDataset]) -> np.ndarray:
    starts = [
        (
            datasets[piece.source],
            datasets[piece.source].first_token_of_document(piece.document) + piece.offset,
            piece.tokens,
        )
        for piece in pieces
    ]
    return np.concatenate([dataset.read(first, count)[0] for dataset, first, count in starts])


DATA = {
    "epoch": lambda a, b: {"train": [a]},
    "neox": lambda a, b: {"train": [a], "order": "neox"},
    "blend": lambda a, b: {"train": [{"path": a, "weight": 3}, {"path": b, "weight": 1}]},
    "neox blend": lambda a, b: {"train": [{"path": a, "weight": 3}, {"path": b, "weight": 1}], "order": "neox"},
    "best fit": lambda a, b: {"train": [a, b], "packing": "best_fit", "document_mask": True},
    "document": lambda a, b: {"train": [b], "packing": "document"},
    "split": lambda a, b: {"path": a, "split": "6,2,2"},
}


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("kind", DATA)
def test_provenance_equals_what_the_loader_read(sources, tmp_path, kind, dp):
    config = config_of(tmp_path / "run", DATA[kind](*(dataset.prefix for dataset in sources)))
    batch = 4 * dp
    leave(tmp_path / "run", config, [batch] * STEPS)
    data, named = RunProvenance(tmp_path / "run"), {dataset.prefix: dataset for dataset in sources}
    layout = BatchLayout(2, dp)
    trained = build_datasets(config, {"train": STEPS * batch})["train"]
    seen: dict[tuple[str, int], set[int]] = {}
    loaders = [
        Loader(trained, micro_batch_size=2, gradient_accumulation=2, dp_rank=rank, dp_size=dp) for rank in range(dp)
    ]
    for step in range(1, STEPS + 1):
        rows = data.batch_of(step, layout)
        assert len(rows) == batch
        for rank, loader in enumerate(loaders):
            own = [row for row in rows if row.dp_rank == rank]
            for number, micro in enumerate(next(loader)):
                assert [row.sample for row in own if row.micro_batch == number] == micro.sample_ids.tolist()
                for row in (row for row in own if row.micro_batch == number):
                    tokens = texts(row.slices, named)[:SEQ]
                    assert (
                        micro.tokens[row.row, : tokens.size].tolist() == tokens.tolist()
                        and not micro.tokens[row.row, tokens.size :].any()
                    )
        for source, document in {piece[:2] for row in rows for piece in row.slices}:
            seen.setdefault((source, document), set()).add(step)
    for prefix in data.sources():
        for document in range(0, 60, 3):
            assert {step for step, _ in data.steps_of(prefix, document)} == seen.get((prefix, document), set())


def test_steps_of_other_sizes_to_come_and_taken_back(sources, tmp_path):
    config = config_of(tmp_path / "run", {"train": [sources[0].prefix]})
    leave(tmp_path / "run", config, [4, 4, 8, 8])
    data = RunProvenance(tmp_path / "run")
    assert [data.span(step) for step in (1, 2, 3, 4, 5, 7)] == [
        (0, 4),
        (4, 8),
        (8, 16),
        (16, 24),
        (24, 32),
        (40, 48),
    ] and data.last_step == 4
    with pytest.raises(ConfigError, match="no such step"):
        data.span(0)
    # steps 2 to 4 were rolled back
    rows = [{"step": 1, "samples": 4, "tokens": 4 * SEQ}, {"step": 2, "samples": 20, "tokens": 8 * SEQ}]
    (tmp_path / "run" / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "sam'
    )
    data = RunProvenance(tmp_path / "run")
    assert data.span(2) == (16, 20)
    samples = {
        sample for document in range(60) for _, found in data.steps_of(sources[0].prefix, document) for sample in found
    }
    assert samples == {*range(4), *range(16, 20)}


def test_a_step_is_counted_once_whatever_checkpoints_there_are(sources, tmp_path):
    config, prefix = config_of(tmp_path / "run", {"train": [sources[0].prefix]}), sources[0].prefix
    leave(tmp_path / "run", config, [4] * STEPS)
    written = [CheckpointRecord(step, 4 * step, dump(config), None, f"step {step}", 1) for step in (2, 3)]
    plain, data = RunProvenance(tmp_path / "run"), RunProvenance(tmp_path / "run", written=written)
    for document in range(60):
        assert data.steps_of(prefix, document) == plain.steps_of(prefix, document)


def test_a_run_before_its_first_step(sources, tmp_path):
    leave(tmp_path / "run", config_of(tmp_path / "run", {"train": [sources[0].prefix]}), [])
    with pytest.raises(ConfigError, match=r"the batch size is unknown; where=.*run; .*do=give --batch"):
        RunProvenance(tmp_path / "run")
    assert RunProvenance(tmp_path / "run", batch=8).span(3) == (16, 24)
    leave(tmp_path / "run", config_of(tmp_path / "run", {"train": [sources[0].prefix]}, global_batch_size=12), [])
    assert (
        RunProvenance(tmp_path / "run").span(1) == (0, 12)
        and RunProvenance(tmp_path / "run").steps_of(sources[0].prefix, 1) == []
    )


@pytest.mark.parametrize("objective", ["dpo", "reward"])
def test_a_step_of_pairs_has_half_as_many_samples_as_rows(sources, tmp_path, objective):
    config = config_of(tmp_path / "run", {"train": [sources[0].prefix]}, objective=objective)
    leave(tmp_path / "run", config, [4])
    row = {"step": 1, "samples": 4, "tokens": 4 * 2 * SEQ}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert RunProvenance(tmp_path / "run").span(1) == (0, 4)


def test_folders_that_are_no_runs(tmp_path, sources):
    with pytest.raises(ConfigError, match="not the folder of a run"):
        RunProvenance(tmp_path)
    leave(tmp_path / "run", config_of(tmp_path / "run", {"train": [sources[0].prefix]}), [4])
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(DataError, match="metrics of the run cannot be read"):
        RunProvenance(tmp_path / "run")
