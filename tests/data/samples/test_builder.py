"""From a config to datasets."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from neox.config.schema import Config
from neox.data.samples.blend import BlendedDataset
from neox.data.samples.builder import build_datasets, documents_of_parts
from neox.data.samples.order import gpt_neox_order
from neox.data.store.indexed import IndexedDataset
from neox.errors import ConfigError, DataError
from neox.printing import counted

ALL = {"train": 40, "validation": 10, "test": 10}


def config(data: dict, vocab_size: int = 1000, tmp_path: Path | None = None, **sections: object) -> Config:
    run = {} if tmp_path is None else {"run": {"dir": str(tmp_path / "run")}}
    return Config.model_validate(
        {"model": {"vocab_size": vocab_size}, "data": {"seq_length": 16, **data}, **run, **sections}
    )


def test_lists_and_missing_parts(corpus):
    datasets = build_datasets(config({"train": [corpus.prefix], "validation": corpus.prefix}), ALL)
    assert sorted(datasets) == ["train", "validation"]
    assert len(datasets["train"]) == (corpus.num_tokens - 1) // 16
    assert sorted(
        build_datasets(config({"train": [corpus.prefix], "validation": corpus.prefix}), {"train": 5, "validation": 0})
    ) == ["train"]


def test_split_parts_do_not_overlap(corpus):
    datasets = build_datasets(config({"path": corpus.prefix, "split": "6,2,2"}), ALL)
    cuts = [corpus.first_token_of_document(d) for d in (0, 61, 81, 101)]
    for part, (low, high) in zip(("train", "validation", "test"), itertools.pairwise(cuts), strict=True):
        starts = [datasets[part]._first_token(i) for i in range(len(datasets[part]))]
        assert low <= min(starts) and max(starts) + 17 <= high


def test_parts_without_documents_are_not_listed(corpus):
    parts = documents_of_parts(config({"path": corpus.prefix, "split": "1,0,1"}))
    assert [(part, span) for part, [(_, span)] in parts.items()] == [("train", (0, 51)), ("test", (51, 101))]


def test_order_does_not_depend_on_the_length_of_the_run(corpus):
    short, long = (build_datasets(config({"train": [corpus.prefix]}), {"train": n})["train"] for n in (1, 10_000))
    assert all(np.array_equal(short[i].tokens, long[i].tokens) for i in range(0, 500, 7))


def test_neox_order_of_one_path_equals_the_arrays_and_its_cache(corpus, tmp_path):
    made = config({"path": corpus.prefix, "split": "6,2,2", "order": "neox"}, tmp_path=tmp_path, train={"seed": 9})
    dataset = build_datasets(made, ALL)["train"]
    order = gpt_neox_order(corpus.sizes, np.arange(61), 16, 40, 9)
    for found, wanted in zip((dataset._documents, dataset._samples, dataset._shuffle), order, strict=True):
        np.testing.assert_array_equal(found, wanted)
        assert isinstance(found, np.memmap)
    assert len(list((tmp_path / "index_cache").glob("*/manifest.json"))) == 3


def test_neox_blend_asks_each_source_for_its_share_and_a_margin(make_dataset, tmp_path):
    prefixes = [make_dataset([np.arange(100)], name=str(k)).prefix for k in range(2)]
    sources = [{"path": prefixes[0], "weight": 3.0}, {"path": prefixes[1], "weight": 1.0}]
    dataset = build_datasets(config({"train": sources, "order": "neox"}, tmp_path=tmp_path), {"train": 200})["train"]
    assert isinstance(dataset, BlendedDataset)
    for source, share in zip(dataset.parts, (0.75, 0.25), strict=True):
        asked = math.ceil(200 * share * 1.005)
        assert asked <= len(source) < asked + 100 // 16 + 1
    for i in range(200):
        dataset[i]


def test_order_cache_follows_the_content(make_dataset, tmp_path):
    def tokens() -> np.ndarray:
        made = config({"train": [str(tmp_path / "corpus")], "order": "neox"}, tmp_path=tmp_path)
        return build_datasets(made, {"train": 3})["train"]._samples

    make_dataset([[1] * 50, [2] * 30])
    first = np.array(tokens())
    make_dataset([[1] * 10, [2] * 20, [3] * 50], overwrite=True)
    assert not np.array_equal(first, tokens())


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({}, ConfigError, "no training data; where=data.train, data.path, data.text"),
        ({"train": ["a"], "path": "b"}, ConfigError, "data is given twice; where=data.path, data.train"),
        ({"path": "b", "validation": ["a"]}, ConfigError, "data is given twice; where=data.path, data.validation"),
        ({"train": ["nowhere/a"]}, DataError, r"cannot open data file; where=nowhere/a\.idx; got=No such file"),
    ],
)
def test_contradictory_data_sections(data, error, message):
    with pytest.raises(error, match=message):
        build_datasets(config(data), ALL)


@pytest.mark.parametrize("order", ["epoch", "neox"])
def test_empty_split_and_short_corpus(make_dataset, tmp_path, order):
    prefix = make_dataset([[1] * 30, [2] * 20]).prefix
    with pytest.raises(
        DataError,
        match=r"split leaves no documents for validation; where=.*corpus\.bin, data\.split=1,0,0; got=0 of 2 documents",
    ):
        build_datasets(
            config({"path": prefix, "split": "1,0,0", "order": order}, tmp_path=tmp_path), {"train": 1, "validation": 1}
        )
    with pytest.raises(DataError, match=r"shorter than one sample; .*got=50 tokens in 2 documents; want=at least 65"):
        build_datasets(config({"train": [prefix], "order": order, "seq_length": 64}, tmp_path=tmp_path), {"train": 1})
    assert list(
        build_datasets(
            config({"path": prefix, "split": "1,0,0", "order": order}, tmp_path=tmp_path), {"train": 1, "validation": 0}
        )
    ) == ["train"]


@pytest.mark.parametrize("packing", ["concatenate", "best_fit", "document"])
@pytest.mark.parametrize("documents", [[], [[], [], []], [[5]]])
def test_corpora_without_a_sample_are_refused_and_not_waited_for(make_dataset, tmp_path, documents, packing):
    prefix = make_dataset(documents).prefix
    made = config({"train": [prefix], "packing": packing}, tmp_path=tmp_path)
    got = f"{counted(sum(map(len, documents)), 'token')} in {counted(len(documents), 'document')}"
    with pytest.raises(
        DataError, match=rf"(shorter than one sample|no document has a token to learn); where=.*corpus\.bin.*got={got}"
    ):
        build_datasets(made, {"train": 5})


def test_a_source_that_is_smaller_than_its_share_is_read_again(make_dataset, tmp_path):
    """Exact shares, by further epochs, for both orders."""
    prefixes = [
        make_dataset([np.arange(size) % 500 + base], name=str(base)).prefix for size, base in ((40, 0), (4000, 100))
    ]
    for order in ("epoch", "neox"):
        sources = [{"path": prefixes[0], "weight": 1}, {"path": prefixes[1], "weight": 1}]
        dataset = build_datasets(config({"train": sources, "order": order}, tmp_path=tmp_path), {"train": 100})["train"]
        small = [sample for sample in (dataset[i].tokens for i in range(100)) if sample[0] < 50]
        assert len(small) == 50 and dataset.coverage(100)[0].epochs > 15


def test_weights_all_zero_name_the_section(corpus):
    with pytest.raises(ConfigError, match=r"is not positive and finite; where=data\.train"):
        build_datasets(config({"train": [{"path": corpus.prefix, "weight": 0}]}), ALL)


def test_ids_beyond_the_vocabulary_are_found_before_training(make_dataset):
    prefix = make_dataset([[1] * 20, [3] * 10 + [77] + [3] * 10]).prefix
    with pytest.raises(
        DataError,
        match=r"outside the vocabulary; where=.*corpus\.bin document 1 offset 10; got=largest id 77; want=0 to 76",
    ):
        build_datasets(config({"train": [prefix]}, vocab_size=77), {"train": 1})
    assert build_datasets(config({"train": [prefix]}, vocab_size=78), {"train": 1})


def test_data_of_another_tokenizer_are_refused(make_dataset, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text('{"a": 1}')
    prefix = make_dataset([[1] * 20], tokenizer_hash="f" * 64).prefix
    with pytest.raises(DataError, match=r"different tokenizer; where=.*corpus\.json; got=tokenizer hash ffff"):
        build_datasets(config({"train": [prefix]}, tokenizer={"file": str(file)}), {"train": 1})


def test_data_without_a_sidecar_work(corpus):
    Path(f"{corpus.prefix}.json").unlink()
    without = build_datasets(config({"train": [corpus.prefix]}), {"train": 1})["train"]
    assert isinstance(IndexedDataset(corpus.prefix).checksum(), int) and without[3].tokens.shape == (17,)


def cached_name(corpus, cache: Path, seed: int = 9, samples: int = 40, **data: object) -> str:
    """Name of the one folder of index arrays that a config leaves in a cache of its own."""
    build_datasets(
        config({"path": corpus.prefix, "index_cache": str(cache), "split": "9,1,0", **data}, train={"seed": seed}),
        {"train": samples},
    )
    (found,) = [path.name for path in cache.iterdir() if path.is_dir()]
    return found


def test_names_of_index_arrays_are_pinned_and_every_setting_is_in_them(corpus, make_dataset, tmp_path):
    """A setting that the name lacks gives one run the arrays of another. A name that changes makes every run build
    its arrays again.
    """
    other = make_dataset([corpus[i][::-1] if i else [5] for i in range(101)], "other")
    packing = {
        "as it is": cached_name(corpus, tmp_path / "g", packing="best_fit"),
        "documents": cached_name(corpus, tmp_path / "h", packing="best_fit", split="8,2,0"),
        "seq_length": cached_name(corpus, tmp_path / "i", packing="best_fit", seq_length=17),
        "data": cached_name(other, tmp_path / "j", packing="best_fit"),
    }
    order = {
        "as it is": cached_name(corpus, tmp_path / "a", order="neox"),
        "documents": cached_name(corpus, tmp_path / "b", order="neox", split="8,2,0"),
        "seq_length": cached_name(corpus, tmp_path / "c", order="neox", seq_length=17),
        "seed": cached_name(corpus, tmp_path / "d", order="neox", seed=10),
        "samples": cached_name(corpus, tmp_path / "e", order="neox", samples=41),
        "data": cached_name(other, tmp_path / "f", order="neox"),
    }
    assert len({*order.values(), *packing.values()}) == len(order) + len(packing)
    assert (order["as it is"], packing["as it is"]) == ("9c5da9e2f70cfd73a53a492d", "cc53221b029269da84783509")


def test_index_arrays_of_two_parts_of_a_split_are_two(corpus, tmp_path):
    """Of equal length, so that only the range distinguishes them."""
    cache = tmp_path / "cache"
    for packing, order in (("best_fit", "epoch"), ("concatenate", "neox")):
        made = config(
            {"path": corpus.prefix, "index_cache": str(cache), "split": "1,1,0", "packing": packing, "order": order}
        )
        parts = build_datasets(made, {"train": 10, "validation": 10})
        documents = [
            {piece.document for i in range(5) for piece in parts[part].slices(i)} for part in ("train", "validation")
        ]
        assert not documents[0] & documents[1]


@pytest.mark.parametrize("sidecar", [True, False])
@pytest.mark.parametrize(
    ("packing", "learned", "refused"),
    [
        ("document", None, True),
        ("document", 30, True),
        ("document", 10, False),
        ("best_fit", 30, False),
        ("concatenate", 30, False),
        ("concatenate", 0, True),
    ],
)
def test_labels_from_which_nothing_is_learned(make_dataset, tmp_path, sidecar, packing, learned, refused):
    """A sample of one document is truncated after 17 tokens; the first token of a document is not a target."""
    tokens = [np.arange(1, 41)] * 12
    labels = [
        np.where(np.arange(40) == (learned if number == 7 else None), one, -100) for number, one in enumerate(tokens)
    ]
    files = [
        make_dataset(rows, name, kind).prefix for name, kind, rows in (("t", "uint16", tokens), ("l", "int32", labels))
    ]
    if not sidecar:
        (tmp_path / "l.json").unlink()
    made = config(
        {"train": [{"path": files[0], "labels": files[1]}], "packing": packing},
        tmp_path=tmp_path,
        train={"objective": "sft"},
    )
    if not refused:
        assert build_datasets(made, {"train": 4})["train"] is not None
        return
    with pytest.raises(DataError, match="no document has a token to learn; where=.*l.bin documents 0 to 12"):
        build_datasets(made, {"train": 4})
