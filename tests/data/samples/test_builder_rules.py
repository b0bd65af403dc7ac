"""What each part of the data section becomes: documents, labels, pairs, blends, fill in the middle, caches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from neox.config.schema import Config
from neox.data.samples.blend import BlendedDataset, BlendPhase, MixedDataset
from neox.data.samples.builder import (
    BLEND_MARGIN,
    RunDatasets,
    blended,
    build_datasets,
    documents_of_parts,
    notes,
    run_text,
)
from neox.data.samples.documents import DocumentDataset, LabelledDataset, PairDataset
from neox.data.samples.fim import FimDataset
from neox.data.samples.order import EpochDataset, GptNeoxOrderDataset
from neox.data.samples.packing import PackedDataset
from neox.data.store.indexed import IndexedDataset, IndexedWriter
from neox.data.text.tokenizer import train_tokenizer
from neox.errors import DataError

FIM_TOKENS = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")


def config(data: dict, folder: Path, vocab_size: int = 1000, **sections: object) -> Config:
    run = {"run": {"dir": str(folder / "run")}}
    return Config.model_validate(
        {"model": {"vocab_size": vocab_size}, "data": {"seq_length": 16, **data}, **run, **sections}
    )


def labels_of(corpus: IndexedDataset) -> list[np.ndarray]:
    return [np.where(np.arange(document.size) % 2, document.astype(np.int64), -100) for document in corpus]


@pytest.fixture
def labels(corpus, make_dataset) -> str:
    return make_dataset(labels_of(corpus), "labels", "int32").prefix


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ({}, EpochDataset),
        ({"order": "neox"}, GptNeoxOrderDataset),
        ({"packing": "document"}, DocumentDataset),
        ({"packing": "best_fit"}, PackedDataset),
    ],
)
@pytest.mark.parametrize("labelled", [False, True])
def test_the_kind_of_dataset_of_a_source(corpus, labels, tmp_path, data, kind, labelled):
    source = {"path": corpus.prefix, **({"labels": labels} if labelled else {})}
    made = config({"train": [source], "validation": [source], **data}, tmp_path)
    parts = build_datasets(made, {"train": 10, "validation": 10})
    concatenated = data.get("packing") is None
    for dataset in parts.values():
        assert type(dataset) is (LabelledDataset if labelled and concatenated else kind)
        sample = dataset[3]
        if labelled:
            learned = sample.labels != -100
            assert 0 < learned.sum() < 12 and (sample.labels[learned] == sample.tokens[learned]).all()
    assert parts["train"][3].tokens.tolist() == parts["validation"][3].tokens.tolist()


@pytest.mark.parametrize("data", [{}, {"order": "neox"}, {"packing": "best_fit"}])
@pytest.mark.parametrize("mask", [False, True])
def test_document_mask_and_seed_reach_every_order(corpus, tmp_path, data, mask):
    def made(seed: int) -> list[list[int]]:
        values = config({"train": [corpus.prefix], "document_mask": mask, **data}, tmp_path, train={"seed": seed})
        dataset = build_datasets(values, {"train": 10})["train"]
        assert (dataset[0].segment_ids is not None) == mask and dataset[0].tokens.size == 17
        return [dataset[i].tokens.tolist() for i in range(10)]

    assert made(1) == made(1) != made(2)


def test_pairs_with_labels_of_both(corpus, make_dataset, tmp_path):
    answers = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    prefixes = {
        "path": make_dataset(answers, "chosen").prefix,
        "rejected": make_dataset([[*row[::-1], 10] for row in answers], "rejected").prefix,
        "labels": make_dataset([[-100, *row[1:]] for row in answers], "chosen_labels", "int32").prefix,
        "rejected_labels": make_dataset(
            [[-100, *row[::-1][1:], 10] for row in answers], "other_labels", "int32"
        ).prefix,
    }
    made = config({"train": [prefixes]}, tmp_path, train={"objective": "dpo"})
    dataset = build_datasets(made, {"train": 3})["train"]
    assert isinstance(dataset, PairDataset) and len(dataset) == 3
    for document, row in enumerate(answers):
        pair = dataset.pair(document)
        for sample, tokens in ((pair.chosen, row), (pair.rejected, [*row[::-1], 10])):
            assert sample.tokens[: len(tokens)].tolist() == tokens and sample.tokens.size == 17
            assert sample.labels[: len(tokens)].tolist() == [-100, *tokens[1:]]
    cursor = RunDatasets(made, {"train": 3}).cursor
    assert set(cursor.sources[0].files) == {"tokens", "labels", "rejected", "rejected_labels"}
    nothing = make_dataset([[-100] * (len(row) + 1) for row in answers], "nothing", "int32").prefix
    made = config({"train": [{**prefixes, "rejected_labels": nothing}]}, tmp_path, train={"objective": "dpo"})
    with pytest.raises(DataError, match=r"no document has a token to learn; where=.*nothing\.bin documents 0 to 3"):
        build_datasets(made, {"train": 3})


@pytest.mark.parametrize("role", ["path", "rejected"])
def test_ids_of_both_answers_are_checked(make_dataset, tmp_path, role):
    """Labels hold -100 and are not."""
    rows = {name: [[1, 2], [3, 99 if name == role else 4]] for name in ("path", "rejected")}
    prefixes = {name: make_dataset(documents, name).prefix for name, documents in rows.items()}
    made = config({"train": [prefixes]}, tmp_path, vocab_size=99, train={"objective": "dpo"})
    with pytest.raises(
        DataError, match=rf"outside the vocabulary; where=.*{role}\.bin document 1 offset 1; got=largest id 99"
    ):
        build_datasets(made, {"train": 1})


def test_labels_of_a_source_without_weight_are_not_read(corpus, make_dataset, tmp_path):
    nothing = make_dataset([[-100] * document.size for document in corpus], "nothing", "int32").prefix
    sources = [{"path": corpus.prefix, "labels": nothing, "weight": 0}, {"path": corpus.prefix, "labels": nothing}]
    with pytest.raises(DataError, match="no document has a token to learn"):
        build_datasets(config({"train": sources}, tmp_path), {"train": 4})
    sources[1] = {"path": corpus.prefix}
    assert len(build_datasets(config({"train": sources}, tmp_path), {"train": 4})) == 1


def test_fill_in_the_middle_is_for_training(corpus, tmp_path):
    tokenizer = train_tokenizer(["a b c"], 262, tmp_path / "t.json", special_tokens=FIM_TOKENS)
    tokens = make_text(tmp_path / "text", tokenizer)
    labels = [np.where(np.arange(row.size), row.astype(np.int64), -100) for row in tokens]
    with IndexedWriter(tmp_path / "learned", "int32") as writer:
        for row in labels:
            writer.add_document(row)
    for rate in (0.0, 1.0):
        data = {"fim": {"rate": rate}, "train": [tokens.prefix], "validation": [tokens.prefix]}
        made = config(data, tmp_path, vocab_size=300, tokenizer={"file": tokenizer.file})
        parts = build_datasets(made, {"train": 5, "validation": 5})
        assert isinstance(parts["train"], FimDataset) == (rate > 0) and isinstance(parts["validation"], EpochDataset)
    again = FimDataset(parts["validation"], parts["train"]._transform, tokens.checksum(), made.train.seed, False)
    assert [parts["train"][i].tokens.tolist() for i in range(5)] == [again[i].tokens.tolist() for i in range(5)]
    data["train"] = [{"path": tokens.prefix, "labels": str(tmp_path / "learned")}]
    made = config(data, tmp_path, vocab_size=300, tokenizer={"file": tokenizer.file})
    assert isinstance(build_datasets(made, {"train": 5})["train"], LabelledDataset)


def make_text(prefix: Path, tokenizer) -> IndexedDataset:
    with IndexedWriter(prefix, "uint16") as writer:
        for number in range(20):
            writer.add_document(tokenizer.encode("a b c " * (number + 3)))
    return IndexedDataset(prefix)


def test_what_a_run_logs_about_its_packing(corpus, make_dataset, tmp_path):
    other = make_dataset([[1] * 20, [2] * 9], "other")
    sources = {"train": [corpus.prefix, other.prefix], "validation": [other.prefix]}
    made = build_datasets(config({**sources, "packing": "best_fit"}, tmp_path), {"train": 4, "validation": 4})
    lines = notes(made)
    assert [line.split(" documents in ")[0] for line in lines] == [
        f"train: {corpus.prefix}: 101",
        f"train: {other.prefix}: 2",
        f"validation: {other.prefix}: 2",
    ]
    assert "1 documents cut" in lines[1]
    assert notes(build_datasets(config(sources, tmp_path), {"train": 4})) == []
    tokenizer = train_tokenizer(["a b c"], 262, tmp_path / "t.json", special_tokens=FIM_TOKENS)
    text = make_text(tmp_path / "text", tokenizer)
    data = {"train": [text.prefix], "packing": "best_fit", "fim": {"rate": 0.5}}
    values = config(data, tmp_path, vocab_size=300, tokenizer={"file": tokenizer.file})
    assert [
        line.startswith(f"train: {text.prefix}: 20 documents") for line in notes(build_datasets(values, {"train": 4}))
    ] == [True]


def test_blends_of_datasets(corpus):
    epoch, packed = EpochDataset(corpus, (0, 101), 16, 1), PackedDataset(corpus, (0, 101), 16, 1)
    start, later = BlendPhase(0, (1.0,), (0,)), BlendPhase(10, (1.0,), (3,))
    assert blended([epoch], [1.0], None) is blended([epoch], [1.0], ()) is blended([epoch], [1.0], (start,)) is epoch
    for phases in ((later,), (start, later)):
        changed = blended([epoch], [1.0], phases)
        assert type(changed) is BlendedDataset and changed[12].tokens.tolist() == epoch[5].tokens.tolist()
    assert type(blended([epoch, epoch], [1.0, 1.0], None)) is BlendedDataset
    mixed = blended([epoch, packed], [0.25, 0.75], None)
    assert type(mixed) is MixedDataset and [seen.samples for seen in mixed.coverage(8)] == [2, 6]
    assert len(mixed) == len(epoch) + len(packed)


@pytest.fixture
def sequences(tmp_path) -> IndexedDataset:
    """Ten documents of two sequences of 20 tokens."""
    with IndexedWriter(tmp_path / "sequences", "uint16") as writer:
        for document in range(10):
            for part in range(2):
                writer.add(np.arange(20) + 40 * document + 20 * part)
            writer.end_document()
    return IndexedDataset(tmp_path / "sequences")


@pytest.mark.parametrize(
    ("data", "spans", "tokens"),
    [
        ({}, [(0, 5), (5, 8), (8, 10)], [200, 120, 80]),
        ({"order": "neox", "packing": "best_fit"}, [(0, 5), (5, 8), (8, 10)], [200, 120, 80]),
        ({"order": "neox"}, [(0, 5), (5, 8), (8, 10)], [200, 120, 80]),
        ({"order": "neox", "split": "11,5,4"}, [(0, 6), (6, 8), (8, 10)], [220, 100, 80]),
    ],
)
def test_a_split_divides_documents_or_sequences(sequences, tmp_path, data, spans, tokens):
    """`order: neox` divides sequences: a document belongs to the part that has its first one."""
    made = config({"path": sequences.prefix, "split": "5,3,2", **data}, tmp_path)
    found = documents_of_parts(made)
    assert list(found) == ["train", "validation", "test"] and [span for [(_, span)] in found.values()] == spans
    parts = build_datasets(made, {"train": 5, "validation": 5, "test": 5})
    if data.get("packing"):
        for dataset, span in zip(parts.values(), spans, strict=True):
            pieces = [piece for i in range(len(dataset)) for piece in dataset.slices(i)]
            assert {piece.document for piece in pieces} == set(range(*span))
        return
    first = 0
    for part, count in zip(("train", "validation", "test"), tokens, strict=True):
        seen = np.unique(np.concatenate([parts[part][i].tokens for i in range(min(len(parts[part]), 40))]))
        assert first <= seen.min() and seen.max() < first + count and len(parts[part]) >= (count - 1) // 16
        first += count


def test_documents_of_listed_sources(corpus, make_dataset, tmp_path):
    other = make_dataset([[1] * 20] * 3, "other")
    data = {"train": [corpus.prefix, other.prefix], "test": [other.prefix]}
    found = documents_of_parts(config(data, tmp_path))
    assert {part: [(dataset.prefix, span) for dataset, span in sources] for part, sources in found.items()} == {
        "train": [(corpus.prefix, (0, 101)), (other.prefix, (0, 3))],
        "test": [(other.prefix, (0, 3))],
    }
    assert found["train"][1][0] is found["test"][0][0]  # opened once


def test_text_is_stored_with_the_run_or_in_the_cache_that_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    data = {"text": [str(tmp_path / "a.txt")]}
    tokenizer = {"file": "t.json", "eod_token": "<end>"}
    found = run_text(config(data, tmp_path, tokenizer=tokenizer))
    assert (found.folder, found.files) == (tmp_path / "run" / "text", [str(tmp_path / "a.txt")])
    assert (found.tokenizer, found.eod_token) == ("t.json", "<end>")
    cached = run_text(config({**data, "text_cache": str(tmp_path / "cache")}, tmp_path, tokenizer=tokenizer))
    assert cached.folder == tmp_path / "cache"
    assert run_text(config({"path": "p"}, tmp_path)) is None
    with pytest.raises(DataError, match="no such input; where=nowhere; .*do=check data.text"):
        run_text(config({"text": ["nowhere"]}, tmp_path, tokenizer=tokenizer))


@pytest.mark.parametrize("named", [False, True])
def test_arrays_are_cached_next_to_the_data_or_where_it_is_named(corpus, tmp_path, named):
    data = {"train": [corpus.prefix], "order": "neox", **({"index_cache": str(tmp_path / "named")} if named else {})}
    build_datasets(config(data, tmp_path), {"train": 4})
    assert (tmp_path / "named").exists() == named == (not (tmp_path / "index_cache").exists())


def test_arrays_are_cached_in_the_run_if_the_folder_of_the_data_refuses(corpus, tmp_path):
    (tmp_path / "index_cache").write_text("not a folder")
    build_datasets(config({"train": [corpus.prefix], "packing": "best_fit"}, tmp_path), {"train": 4})
    assert len(list((tmp_path / "run" / "index_cache").glob("*/manifest.json"))) == 1


def test_a_source_of_a_blend_has_samples_for_its_share_and_a_margin(corpus, make_dataset, tmp_path):
    """A source alone has what the run needs; a source of a list has half a percent more, as in GPT-NeoX."""
    assert BLEND_MARGIN == 1.005
    needed = (corpus.num_tokens - 1) // 16  # of one epoch
    for data, samples, epochs in (
        ({"path": corpus.prefix, "split": "1,0,0"}, needed, 1),
        ({"path": corpus.prefix, "split": "1,0,0"}, needed + 1, 2),
        ({"train": [corpus.prefix]}, needed, 2),
        ({"train": [corpus.prefix]}, needed - 2, 1),
    ):
        cursor = RunDatasets(config({**data, "order": "neox"}, tmp_path), {"train": samples}).cursor
        (source,) = cursor.sources
        assert (source.epochs, source.span) == (epochs, (0, 101))
        assert source.samples == (epochs * corpus.num_tokens - 1) // 16 // epochs
    (source,) = RunDatasets(config({"train": [corpus.prefix]}, tmp_path), {"train": 5}).cursor.sources
    assert (source.epochs, source.samples, source.path, source.weight) == (None, needed, corpus.prefix, 1.0)
    named = RunDatasets(config({"path": corpus.prefix, "split": "1,0,0"}, tmp_path), {"train": 5}).cursor
    assert named.settings["data.split"] == "1,0,0" and named.phases == (BlendPhase(0, (1.0,), (0,)),)
