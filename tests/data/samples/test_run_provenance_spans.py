"""The spans of a run between changes of its config, and the steps in metrics.jsonl."""

from __future__ import annotations

import json

import numpy as np
import pytest

from neox.config.load import loads
from neox.config.values import dump
from neox.data.samples.batch_layout import BatchLayout
from neox.data.samples.builder import RunDatasets
from neox.data.samples.run_provenance import CheckpointRecord, RunProvenance, config_spans
from neox.errors import CheckpointError, ConfigError, DataError

SEQ = 16


@pytest.fixture
def sources(make_dataset) -> list[str]:
    sizes = np.random.default_rng(1).integers(5, 30, 40)
    return [make_dataset([np.arange(size) for size in sizes], name).prefix for name in ("a", "b")]


def config_of(run, data: dict, **train):
    values = {
        "model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 8000},
        "data": {"seq_length": SEQ, **data},
        "train": {"train_iters": 6, "micro_batch_size": 4, **train},
        "run": {"dir": str(run)},
    }
    return loads(json.dumps(values))


def leave(run, config, rows: list[tuple[int, int, int]]) -> RunProvenance:
    """A run whose steps were (step, samples, tokens in samples)."""
    run.mkdir(exist_ok=True)
    (run / "config.lock.yml").write_text(dump(config))
    lines = [{"step": step, "samples": samples, "tokens": tokens * SEQ} for step, samples, tokens in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RunProvenance(run)


def test_a_span_ends_at_the_last_checkpoint_of_its_config(sources, tmp_path):
    one, other = (config_of(tmp_path / "run", {"train": [source]}) for source in sources)
    cursor = RunDatasets(one, {"train": 24}).cursor.to_json()
    written = [
        CheckpointRecord(1, 4, dump(one), cursor, "first", 1),
        CheckpointRecord(2, 8, dump(one), cursor, "second", 1),
        CheckpointRecord(3, 12, dump(one), None, "third", 2),  # another cursor
        CheckpointRecord(5, 20, dump(other), None, "fifth", 8),
    ]
    spans = list(config_spans(written, other, 4))
    assert [(span.last, span.world_size) for span in spans] == [(2, 1), (3, 2), (5, 8), (None, 8)]
    assert [span.config.data.train[0].path for span in spans] == [sources[0], sources[0], sources[1], sources[1]]
    assert [(span._saved.where, span._saved.consumed) for span in spans] == [
        ("second", 8),
        ("third", 12),
        ("fifth", 20),
        ("fifth", 20),
    ]
    (alone,) = config_spans([], one, 4)
    assert (alone.last, alone.world_size, alone._saved) == (None, None, None)
    assert len(alone.dataset) == RunDatasets(one, {"train": 24}).cursor.sources[0].samples


def test_steps_belong_to_the_span_of_their_checkpoint(sources, tmp_path):
    one = config_of(tmp_path / "run", {"train": [sources[0]]})
    both = config_of(tmp_path / "run", {"train": [{"path": sources[0], "weight": 0}, sources[1]]})
    leave(tmp_path / "run", both, [(step, 4 * step, 4 * step) for step in range(1, 7)])
    cursor = RunDatasets(one, {"train": 24}).cursor
    written = [CheckpointRecord(3, 12, dump(one), cursor.to_json(), "third", 1)]
    data = RunProvenance(tmp_path / "run", written=written)
    assert [data.config_span(step).last for step in (1, 3, 4, 99)] == [3, 3, None, None]
    assert data.written == written and data.sources() == sources
    layout = BatchLayout(4, 1)
    for step in range(1, 7):
        read = {piece.source for row in data.batch_of(step, layout) for piece in row.slices}
        assert read == {sources[0] if step <= 3 else sources[1]}
    numbers = {step for document in range(40) for step, _ in data.steps_of(sources[0], document)}
    assert numbers == {1, 2, 3}
    numbers = {step for document in range(40) for step, _ in data.steps_of(sources[1], document)}
    assert numbers == {4, 5, 6}


def test_an_accepted_change_of_the_data_is_looked_up_too(sources, tmp_path):
    one = config_of(tmp_path / "run", {"train": [sources[0]]})
    other = config_of(tmp_path / "run", {"train": [sources[1]]}, seed=77)
    cursor = RunDatasets(one, {"train": 24}).cursor.to_json()
    written = [CheckpointRecord(3, 12, dump(one), cursor, "third", 1)]
    for accept in (False, True):
        checkpoint = other.checkpoint.model_copy(update={"accept_data_change": accept})
        changed = other.model_copy(update={"checkpoint": checkpoint})
        leave(tmp_path / "run", changed, [(step, 4 * step, 4 * step) for step in range(1, 5)])
        data = RunProvenance(tmp_path / "run", written=written)
        assert data.batch_of(2, BatchLayout(4, 1))[0].slices[0].source == sources[0]
        if accept:
            assert data.batch_of(4, BatchLayout(4, 1))[0].slices[0].source == sources[1]
        else:
            with pytest.raises(CheckpointError, match="differs from that of its checkpoint"):
                data.batch_of(4, BatchLayout(4, 1))


def test_samples_of_a_step_have_a_row_of_the_batch(sources, tmp_path):
    config = config_of(tmp_path / "run", {"train": [sources[0]]})
    data = leave(tmp_path / "run", config, [(1, 8, 8), (2, 16, 16)])
    rows = data.batch_of(2, BatchLayout(2, 2))
    places = [(row.sample, row.micro_batch, row.dp_rank, row.row) for row in rows]
    assert places == [(8 + m * 4 + rank * 2 + row, m, rank, row) for m in (0, 1) for rank in (0, 1) for row in (0, 1)]
    assert [row.slices for row in rows] == [data.config_span(2).dataset.slices(sample) for sample in range(8, 16)]


def test_steps_of_a_run_that_continues_another(sources, tmp_path):
    """Its first record has the tokens of the steps before it, which are not its own."""
    config = config_of(tmp_path / "run", {"train": [sources[0]]})
    data = leave(tmp_path / "run", config, [(11, 44, 44), (12, 48, 48)])
    assert [data.span(step) for step in (11, 12, 13, 14)] == [(40, 44), (44, 48), (48, 52), (52, 56)]
    assert (data.last_step, data.consumed, data.batch) == (12, 48, 4)
    with pytest.raises(
        DataError, match=r"the step is not recorded; where=.*metrics\.jsonl; got=10; want=one of 11 to 12"
    ):
        data.span(10)
    alone = leave(
        tmp_path / "run", config_of(tmp_path / "run", {"train": [sources[0]]}, global_batch_size=4), [(11, 44, 44)]
    )
    assert alone.span(11) == (40, 44)


def test_a_step_that_is_missing_among_the_records_is_not_recorded(sources, tmp_path):
    data = leave(tmp_path / "run", config_of(tmp_path / "run", {"train": [sources[0]]}), [(1, 4, 4), (3, 12, 8)])
    assert data.span(3) == (8, 12)
    with pytest.raises(DataError, match="got=2; want=one of 1 to 3"):
        data.span(2)
    for step in (0, -1):
        with pytest.raises(ConfigError, match=f"no such step; where=--step; got={step}; want=1 or more"):
            data.span(step)


def test_the_batch_of_steps_to_come(sources, tmp_path):
    """The one that is given, else that of the config, else that of the last step."""
    data = {"train": [sources[0]]}
    leave(tmp_path / "run", config_of(tmp_path / "run", data), [(1, 4, 4), (2, 12, 12)])
    assert RunProvenance(tmp_path / "run").batch == 8 and RunProvenance(tmp_path / "run").span(3) == (12, 20)
    assert RunProvenance(tmp_path / "run", 3).span(4) == (15, 18)
    sized = leave(tmp_path / "run", config_of(tmp_path / "run", data, global_batch_size=4), [(1, 8, 8)])
    assert sized.batch == 4 and sized.span(1) == (0, 8) and sized.span(2) == (8, 12)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert RunProvenance(tmp_path / "run").span(2) == (4, 8) and RunProvenance(tmp_path / "run").consumed == 0


@pytest.mark.parametrize(
    "line", ["5", "{", '{"step": 1, "samples": 4}', '{"step": "x", "samples": 4, "tokens": 4}', '{"step": 1e400}']
)
def test_records_that_cannot_be_read_are_named(sources, tmp_path, line):
    leave(tmp_path / "run", config_of(tmp_path / "run", {"train": [sources[0]]}), [(1, 4, 4)])
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(line)
    assert RunProvenance(tmp_path / "run").last_step == 1  # the last line is being written
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"metrics of the run cannot be read; where=.*metrics\.jsonl"):
        RunProvenance(tmp_path / "run")
