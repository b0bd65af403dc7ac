"""The data cursor: what continues exactly where it was, and what is refused, with its numbers."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from neox.config.load import loads
from neox.data.samples.builder import RunDatasets
from neox.data.samples.cursor import Cursor, FileIdentity, SavedCursor, identify
from neox.data.samples.order import EpochDataset
from neox.data.store.indexed import IndexedDataset, IndexedWriter
from neox.data.text.tokenizer import train_tokenizer
from neox.errors import CheckpointError, DataError

SEQ, WANTED = 16, {"train": 200, "validation": 4}


def documents(seed: int, count: int = 60, base: int = 0) -> list[np.ndarray]:
    """Documents of 5 to 30 tokens; the lengths depend on neither seed nor base."""
    sizes = np.random.default_rng(7).integers(5, 30, count)
    return [np.random.default_rng(seed + number).integers(0, 500, size) + base for number, size in enumerate(sizes)]


def config_of(folder, data: dict, tokenizer: dict | None = None, **train):
    values = {
        "model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 8000},
        "data": {"seq_length": SEQ, **data},
        "tokenizer": tokenizer or {},
        "train": {"train_iters": 50, "micro_batch_size": 2, **train},
        "run": {"dir": str(folder / "run")},
    }
    return loads(json.dumps(values))


def saved_after(config, consumed: int, *, accept: bool = False, before: SavedCursor | None = None) -> SavedCursor:
    """What a checkpoint of the run stores after `consumed` samples, read back from JSON."""
    cursor = RunDatasets(config, WANTED, before).cursor
    return SavedCursor("step_1", consumed, Cursor.from_json(json.loads(json.dumps(cursor.to_json()))), accept)


@pytest.fixture
def sources(make_dataset):
    """Three datasets that share no token."""
    return {name: make_dataset(documents(0, base=base), name) for name, base in (("a", 0), ("b", 1000), ("c", 2000))}


def weighted(sources, **weights) -> dict:
    return {"train": [{"path": sources[name].prefix, "weight": weight} for name, weight in weights.items()]}


def tokens_of(dataset, first: int, last: int) -> list[tuple[int, ...]]:
    return [tuple(dataset[number].tokens.tolist()) for number in range(first, last)]


def read_of(found: list[tuple[int, ...]], base: int) -> list[tuple[int, ...]]:
    return [tokens for tokens in found if base <= tokens[0] < base + 500]


def test_weights_change_and_each_source_continues(sources, tmp_path):
    orders = {name: EpochDataset(sources[name], (0, 60), SEQ, 1234) for name in sources}
    found = tokens_of(RunDatasets(config_of(tmp_path, weighted(sources, a=1, b=1)), WANTED).parts["train"], 0, 40)
    second = saved_after(config_of(tmp_path, weighted(sources, a=1, b=1)), 40)
    run = RunDatasets(config_of(tmp_path, weighted(sources, a=9, b=1)), WANTED, second)
    assert "a at its sample 20 (share 0.5 -> 0.9)" in run.lines[0] and "without repeats or skips" in run.lines[0]
    found += tokens_of(run.parts["train"], 40, 80)
    third = saved_after(config_of(tmp_path, weighted(sources, a=9, b=1)), 80, before=second)
    assert RunDatasets(config_of(tmp_path, weighted(sources, a=18, b=2)), WANTED, third).lines == []  # the same shares
    run = RunDatasets(config_of(tmp_path, weighted(sources, a=1, b=0, c=1)), WANTED, third)
    found += tokens_of(run.parts["train"], 80, 120)
    for name, base, count in (("a", 0, 20 + 36 + 20), ("b", 1000, 20 + 4), ("c", 2000, 20)):
        assert read_of(found, base) == tokens_of(orders[name], 0, count)
    assert [seen.samples for seen in run.parts["train"].coverage(120)] == [76, 24, 20]
    document = run.parts["train"].slices(5)[0]
    assert 5 in run.parts["train"].find(document.source, document.document, 120)
    for number in range(120):
        for piece in run.parts["train"].slices(number)[:1]:
            assert number in run.parts["train"].find(piece.source, piece.document, 120)


def test_a_resume_without_a_change_is_the_same_run(sources, tmp_path):
    config = config_of(tmp_path, weighted(sources, a=2, b=1))
    straight = tokens_of(RunDatasets(config, WANTED).parts["train"], 0, 90)
    saved = saved_after(config, 30)
    saved = saved_after(config, 60, before=saved)
    resumed = RunDatasets(config, WANTED, saved)
    assert resumed.lines == [] and tokens_of(resumed.parts["train"], 60, 90) == straight[60:]


@pytest.mark.parametrize("order", ["epoch", "neox"])
def test_one_source_becomes_two_and_changes_position(sources, tmp_path, order):
    data = {"order": order}
    config = config_of(tmp_path, weighted(sources, a=1) | data)
    first = tokens_of(RunDatasets(config, WANTED).parts["train"], 0, 30)
    run = RunDatasets(config_of(tmp_path, weighted(sources, b=1, a=1) | data), WANTED, saved_after(config, 30))
    both = tokens_of(run.parts["train"], 30, 60)
    whole = tokens_of(RunDatasets(config, WANTED).parts["train"], 0, 45)
    assert first + read_of(both, 0) == whole and len(read_of(both, 1000)) == 15
    assert "b at its sample 0 (share 0.5)" in run.lines[0]
    with pytest.raises(DataError, match="it is unknown how the sample was read"):
        run.parts["train"][29]


CHANGES = {
    "train.seed: 1234 -> 9": ({}, {"seed": 9}),
    "data.seq_length: 16 -> 8": ({"seq_length": 8}, {}),
    "data.packing: concatenate -> document": ({"packing": "document"}, {}),
    "data.packing: concatenate -> best_fit": ({"packing": "best_fit"}, {}),
    "data.order: epoch -> neox": ({"order": "neox"}, {}),
    "data.document_mask: False -> True": ({"document_mask": True}, {}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_settings_that_the_samples_depend_on(sources, tmp_path, what):
    data, train = CHANGES[what]
    saved = saved_after(config_of(tmp_path, weighted(sources, a=1)), 40)
    config = config_of(tmp_path, weighted(sources, a=1) | data, **train)
    with pytest.raises(CheckpointError, match="the data of the run differs from that of its checkpoint") as problem:
        RunDatasets(config, WANTED, saved)
    assert what in problem.value.got and "checkpoint.accept_data_change=true" in problem.value.do
    if "document_mask" in what:
        assert "no sample would be repeated or lost" in problem.value.got
    else:
        assert re.search(
            r"the 40 samples \(640 tokens\) read of .*a would be repeated among new ones, and none would be lost",
            problem.value.got,
        )
    # refused before anything is written
    assert not (tmp_path / "run").exists() and not (tmp_path / "index_cache").exists()
    run = RunDatasets(config, WANTED, SavedCursor(saved.where, 40, saved.cursor, accept=True))
    assert run.lines[0] == f"accepted by checkpoint.accept_data_change: {what}"
    begin = 40 if "document_mask" in what else 0  # a different order starts from the beginning, the same one continues
    assert tokens_of(run.parts["train"], 40, 45) == tokens_of(
        RunDatasets(config, WANTED).parts["train"], begin, begin + 5
    )


def test_what_the_order_does_not_depend_on(sources, tmp_path):
    saved = saved_after(config_of(tmp_path, weighted(sources, a=1)), 40)
    for path in tmp_path.glob("a.*"):
        shutil.move(path, tmp_path / path.name.replace("a.", "elsewhere."))
    moved = {"train": [str(tmp_path / "elsewhere")], "prefetch": 0}
    longer = {"train_iters": 5000, "micro_batch_size": 7, "gradient_accumulation": 3}
    run = RunDatasets(config_of(tmp_path, moved, **longer), {"train": 5000 * 21}, saved)
    assert run.lines == [] and len(run.cursor.phases) == 1


@pytest.mark.parametrize("sidecar", [True, False])
def test_another_content_under_the_same_name(make_dataset, tmp_path, sidecar):
    prefix = make_dataset(documents(0), "a").prefix
    if not sidecar:
        (tmp_path / "a.json").unlink()
    config = config_of(tmp_path, {"train": [prefix]})
    saved = saved_after(config, 40)
    make_dataset(documents(900), "a", overwrite=True)  # other tokens, documents of the same lengths
    if not sidecar:
        (tmp_path / "a.json").unlink()
    with pytest.raises(
        CheckpointError,
        match="the content of .*a changed: 60 documents of .*what the new content shares with the 40 samples",
    ):
        RunDatasets(config, WANTED, saved)


def test_labels_and_a_source_that_is_no_longer_read(make_dataset, sources, tmp_path):
    saved = saved_after(config_of(tmp_path, weighted(sources, a=1, b=1)), 40)
    with pytest.raises(
        CheckpointError, match=r"b is no longer read, the \d+ remaining samples of the epoch of .*b would be lost"
    ):
        RunDatasets(config_of(tmp_path, weighted(sources, a=1)), WANTED, saved)
    labels = make_dataset([np.where(np.arange(one.size) % 2, -100, one) for one in documents(0)], "labels", "int32")
    labelled = {"train": [{"path": sources["a"].prefix, "labels": labels.prefix}, {"path": sources["b"].prefix}]}
    with pytest.raises(CheckpointError, match="labels or rejected answers of .*a changed"):
        RunDatasets(config_of(tmp_path, labelled), WANTED, saved)


def test_a_split_moves_documents_to_validation(sources, tmp_path):
    path = sources["a"].prefix
    saved = saved_after(config_of(tmp_path, {"path": path, "split": "9,1,0"}), 40)
    # the same documents
    assert RunDatasets(config_of(tmp_path, {"path": path, "split": "90,10,0"}), WANTED, saved).lines == []
    with pytest.raises(CheckpointError) as problem:
        RunDatasets(config_of(tmp_path, {"path": path, "split": "8,2,0"}), WANTED, saved)
    assert "data.split 9,1,0 -> 8,2,0: training reads documents 0 to 53" in problem.value.got
    assert (
        "documents 48 to 53 of " in problem.value.got
        and "were training data and would be validation data" in problem.value.got
    )


def test_neox_order_keeps_its_epochs_or_is_refused(sources, tmp_path):
    data = weighted(sources, a=1) | {"order": "neox"}
    cursor = RunDatasets(config_of(tmp_path, data), {"train": 20}).cursor
    epoch = cursor.sources[0].samples
    saved = SavedCursor("step_1", 15, cursor)
    assert RunDatasets(config_of(tmp_path, data), {"train": epoch - 1}, saved).cursor.sources[0].epochs == 1
    with pytest.raises(CheckpointError, match="data.order neox: the order of .*a has 1 epochs -> 2"):
        RunDatasets(config_of(tmp_path, data), {"train": epoch + 5}, saved)
    two = SavedCursor("step_1", 15, RunDatasets(config_of(tmp_path, data), {"train": epoch + 5}).cursor)
    # a shorter run reads on in the order that was made
    shorter = RunDatasets(config_of(tmp_path, data), {"train": 20}, two)
    assert shorter.cursor.sources[0].epochs == 2
    straight = RunDatasets(config_of(tmp_path, data), {"train": epoch + 5}).parts["train"]
    assert tokens_of(shorter.parts["train"], 15, 20) == tokens_of(straight, 15, 20)


@pytest.mark.parametrize("more", [20, 55, 57, 58, 59, 60, 90])
def test_neox_order_keeps_its_epochs_under_other_weights_as_long_as_they_suffice(sources, tmp_path, more):
    """Each source changes its position too. What the run accepts it can read to its end."""
    data = {"order": "neox"}
    before = config_of(tmp_path, weighted(sources, a=1, b=1) | data)
    cursor = RunDatasets(before, {"train": 40}).cursor
    assert [source.epochs for source in cursor.sources] == [1, 1]
    epoch = cursor.sources[1].samples
    now = config_of(tmp_path, weighted(sources, b=9, a=1) | data)
    needed = 15 + 0.9 * more  # of b, give or take one
    try:
        run = RunDatasets(now, {"train": 30 + more}, SavedCursor("step_1", 30, cursor))
    except CheckpointError as problem:
        assert needed > epoch - 3 and f"the order of {sources['b'].prefix} has 1 epochs -> 2" in problem.got
        assert sources["a"].prefix not in problem.got
        return
    assert needed < epoch + 1 and [source.epochs for source in run.cursor.sources] == [1, 1]
    read = tokens_of(run.parts["train"], 30, 30 + more)
    straight = RunDatasets(before, {"train": 40}).parts["train"].parts
    wanted = [tuple(straight[1][15 + i].tokens.tolist()) for i in range(len(read_of(read, 1000)))]
    assert read_of(read, 1000) == wanted and abs(len(wanted) - 0.9 * more) <= 1


def test_neox_order_of_a_dataset_that_is_listed_twice(sources, tmp_path):
    """Each entry has the epochs of its own share, and an unchanged config is resumed."""
    prefix = sources["a"].prefix
    data = {"train": [{"path": prefix, "weight": 3}, {"path": prefix, "weight": 1}], "order": "neox"}
    config = config_of(tmp_path, data)
    epoch = RunDatasets(config, {"train": 4}).cursor.sources[0].samples
    straight = RunDatasets(config, {"train": 2 * epoch})
    assert [source.epochs for source in straight.cursor.sources] == [2, 1]
    resumed = RunDatasets(config, {"train": 2 * epoch}, SavedCursor("step_1", 15, straight.cursor))
    assert resumed.cursor == straight.cursor and not resumed.lines


def test_text_is_compared_before_it_is_tokenized(tmp_path):
    vocabulary = {letter: number for number, letter in enumerate(["<|endoftext|>", *"abcdefgh "])}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
    }
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": None}
    (tmp_path / "tok.json").write_text(json.dumps({**tokenizer, "model": model}))
    (tmp_path / "t.txt").write_text("abc defg " * 200)
    values = {"text": [str(tmp_path / "t.txt")], "split": "1,0,0"}
    config = config_of(tmp_path, values, tokenizer={"file": str(tmp_path / "tok.json")})
    saved = SavedCursor("step_1", 10, RunDatasets(config, {"train": 20}).cursor)
    before = sorted((tmp_path / "run").rglob("*"))
    (tmp_path / "t.txt").write_text("abc defg " * 201)
    with pytest.raises(
        CheckpointError, match=r"data.text: .* -> .*, the 10 samples \(160 tokens\) read of data.text would be repeated"
    ):
        RunDatasets(config, {"train": 20}, saved)
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_files_of_data_text_are_listed_once(tmp_path, caplog):
    """A warning about what is left out of a folder appears once per start."""
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.md", ".hidden"):
        (tmp_path / "texts" / name).write_text("some words " * 99)
    tokenizer = train_tokenizer(["some words"], 270, tmp_path / "tok.json").file
    config = config_of(tmp_path, {"text": [str(tmp_path / "texts")], "split": "1,0,0"}, tokenizer={"file": tokenizer})
    RunDatasets(config, {"train": 20})
    warnings = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(warnings) == len(set(warnings)) == 2


def test_a_checkpoint_without_a_cursor_is_compared_by_its_config(sources, tmp_path):
    config = config_of(tmp_path, weighted(sources, a=1, b=1))
    saved = SavedCursor("step_1", 40, Cursor.of_config(config))
    run = RunDatasets(config_of(tmp_path, weighted(sources, a=9, b=1)), WANTED, saved)
    assert run.cursor.phases[-1].taken == (20, 20) and run.cursor.sources[0].files is not None
    with pytest.raises(CheckpointError, match="train.seed: 1234 -> 9"):
        RunDatasets(config_of(tmp_path, weighted(sources, a=1, b=1), seed=9), WANTED, saved)
    split = SavedCursor(
        "step_1", 40, Cursor.of_config(config_of(tmp_path, {"path": sources["a"].prefix, "split": "9,1,0"}))
    )
    with pytest.raises(CheckpointError, match="data.split: 9,1,0 -> 8,2,0"):
        RunDatasets(config_of(tmp_path, {"path": sources["a"].prefix, "split": "8,2,0"}), WANTED, split)


def test_nothing_read_is_nothing_lost(sources, tmp_path):
    saved = saved_after(config_of(tmp_path, weighted(sources, a=1)), 0)
    assert RunDatasets(config_of(tmp_path, weighted(sources, b=1), seed=5), WANTED, saved).lines == []


def test_identity_of_large_files_without_a_sidecar(tmp_path):
    """Read at evenly spaced positions: both ends count, the name of the file does not, and a sidecar added later is
    not a difference.
    """
    tokens = np.random.default_rng(0).integers(0, 500, 3 << 20)
    for name, changed in (("a", None), ("b", None), ("first", 0), ("last", -1)):
        content = tokens.copy()
        if changed is not None:
            content[changed] += 1
        with IndexedWriter(tmp_path / name, "uint16") as writer:
            writer.add_document(content)
        if name != "b":
            (tmp_path / f"{name}.json").unlink()
    a, b, first, last = (identify(IndexedDataset(tmp_path / name)) for name in ("a", "b", "first", "last"))
    assert isinstance(a, FileIdentity) and a.same(b) and not a.same(first) and not a.same(last) and not first.same(last)
