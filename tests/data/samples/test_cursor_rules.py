"""The rules of the data cursor one by one: what is the same data, what a difference costs, what a checkpoint stores."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from neox.config.schema import Config
from neox.data.samples.blend import BlendPhase
from neox.data.samples.cursor import (
    SPOT_BYTES,
    SPOTS,
    Continuation,
    Cursor,
    FileIdentity,
    SavedCursor,
    Source,
    bounds,
    changed_settings,
    continue_from,
    first_phase,
    identify,
    matched_sources,
    overlap,
    reading,
    same_shares,
    settings_of,
    tokenizer_of,
)
from neox.data.store.indexed import IndexedDataset, IndexedWriter
from neox.errors import CheckpointError, DataError

A, B = FileIdentity("a" * 16, "blocks-" + "1" * 32, 2, 30), FileIdentity("b" * 16, "blocks-" + "2" * 32, 1, 9)
BASE = Source("a", 1.0, {"tokens": A}, (0, 5), None, 7)
SETTINGS = {
    "data.seq_length": 16,
    "data.order": "epoch",
    "data.packing": "concatenate",
    "train.seed": 1,
    "data.document_mask": False,
    "data.fim": None,
    "tokenizer.file": None,
    "data.text": None,
    "data.split": None,
}


def cursor(*sources: Source, phases: tuple[BlendPhase, ...] = (), **settings: object) -> Cursor:
    changed = {key.replace("_", ".", 1): value for key, value in settings.items()}
    return Cursor({**SETTINGS, **changed}, sources, phases or (first_phase(sources),))


def named(name: str, **changes: object) -> Source:
    """A source whose content is its name."""
    return replace(BASE, path=name, files={"tokens": FileIdentity(name, f"blocks-{name}", 2, 30)}, **changes)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (("i", "blocks-1"), ("i", "blocks-1"), True),
        (("i", "blocks-1"), ("i", "blocks-2"), False),
        (("i", "blocks-1"), ("j", "blocks-1"), False),
        (("i", "spots-1"), ("i", "spots-2"), False),
        (("i", "blocks-1"), ("i", "spots-2"), True),  # only one has a sidecar
        (("i", "blocks-1"), ("j", "spots-1"), False),
    ],
)
def test_files_are_the_same_if_their_digests_agree(one, other, same):
    assert FileIdentity(*one, 2, 30).same(FileIdentity(*other, 3, 40)) is same
    assert FileIdentity(*other, 3, 40).same(FileIdentity(*one, 2, 30)) is same


def test_the_identity_of_a_dataset_is_pinned(tmp_path):
    """Checkpoints store it: sums of the blocks of .bin from the sidecar, or evenly spaced parts of it and its size."""
    assert (SPOTS, SPOT_BYTES) == (64, 65_536)
    tokens = np.random.default_rng(0).integers(0, 500, SPOTS * SPOT_BYTES // 2 + 70_000).astype(np.uint16)
    with IndexedWriter(tmp_path / "large", "uint16") as writer:
        writer.add_document(tokens)
        sums = writer.finish().block_sums
    dataset = IndexedDataset(tmp_path / "large")
    index = f"{dataset.checksum():016x}"
    digest = hashlib.sha256(",".join(f"{value:016x}" for value in sums).encode()).hexdigest()[:32]
    assert identify(dataset) == FileIdentity(index, f"blocks-{digest}", 1, tokens.size)
    (tmp_path / "large.json").unlink()
    content = tokens.tobytes()
    starts = [(len(content) - SPOT_BYTES) * spot // (SPOTS - 1) for spot in range(SPOTS)]
    spots = str(len(content)).encode() + b"".join(content[start : start + SPOT_BYTES] for start in starts)
    assert identify(IndexedDataset(tmp_path / "large")).tokens == f"spots-{hashlib.sha256(spots).hexdigest()[:32]}"
    with IndexedWriter(tmp_path / "small", "uint16") as writer:
        writer.add_document(tokens[:50_000])
    (tmp_path / "small.json").unlink()
    small = IndexedDataset(tmp_path / "small")
    digest = hashlib.sha256(b"100000" + content[:100_000]).hexdigest()[:32]
    assert identify(small).tokens == f"spots-{digest}"
    (tmp_path / "small.bin").unlink()
    with pytest.raises(DataError, match=r"dataset cannot be read; where=.*small\.bin; got=No such file"):
        identify(small)


def test_how_a_dataset_is_described():
    found = FileIdentity("0123456789abcdef", "blocks-" + "0" * 24 + "fedcba98", 1234, 5_678_901)
    assert found.describe() == "1,234 documents of 5,678,901 tokens (01234567, fedcba98)"


@pytest.mark.parametrize(
    ("changes", "same", "same_tokens"),
    [
        ({}, True, True),
        ({"path": "b", "weight": 2.0, "samples": 8}, True, True),
        ({"span": (0, 6)}, False, True),
        ({"epochs": 2}, False, True),
        ({"files": {"tokens": B}}, False, False),
        ({"files": {"tokens": A, "labels": A}}, False, True),
        ({"files": {"tokens": B, "labels": A}}, False, False),
        ({"files": None, "span": None}, True, True),  # unknown: compared by path
        ({"files": None, "path": "b"}, False, False),
    ],
)
def test_which_sources_give_the_same_samples(changes, same, same_tokens):
    other = replace(BASE, **changes)
    assert BASE.same(other) is other.same(BASE) is same
    assert BASE.same_tokens(other) is other.same_tokens(BASE) is same_tokens


def test_every_file_of_a_source_is_compared():
    for role in ("tokens", "labels", "rejected", "rejected_labels"):
        files = dict.fromkeys(("tokens", "labels", "rejected", "rejected_labels"), A)
        assert not replace(BASE, files=files).same(replace(BASE, files={**files, role: B}))


def test_what_a_checkpoint_stores_of_the_cursor_is_pinned():
    phases = (BlendPhase(0, (1.0, 3.0), (0, 0)), BlendPhase(40, (1.0, 1.0), (10, 30)))
    unknown = Source("b", 3.0)
    made = cursor(replace(BASE, epochs=3), unknown, phases=phases)
    stored = json.loads(json.dumps(made.to_json()))
    assert stored == {
        "settings": SETTINGS,
        "sources": [
            {
                "path": "a",
                "weight": 1.0,
                "files": {"tokens": ["a" * 16, "blocks-" + "1" * 32, 2, 30]},
                "span": [0, 5],
                "epochs": 3,
                "samples": 7,
            },
            {"path": "b", "weight": 3.0, "files": {}, "span": None, "epochs": None, "samples": None},
        ],
        "stretches": [[0, [1.0, 3.0], [0, 0]], [40, [1.0, 1.0], [10, 30]]],
    }
    assert Cursor.from_json(stored) == made and Cursor.from_json(stored).sources[1].files is None


def test_the_settings_that_samples_depend_on():
    values = {
        "model": {"vocab_size": 1000},
        "data": {"seq_length": 32, "order": "neox", "path": "p", "split": "8,1,1", "document_mask": True},
        "train": {"seed": 5},
    }
    found = {
        "data.seq_length": 32,
        "data.order": "neox",
        "data.packing": "concatenate",
        "train.seed": 5,
        "data.document_mask": True,
        "data.fim": None,
        "tokenizer.file": "t",
        "data.text": "x",
        "data.split": "8,1,1",
    }
    assert settings_of(Config.model_validate(values), "t", "x") == found
    assert tokenizer_of(Config.model_validate(values)) is None
    values["data"] = {"train": ["p"], "split": "8,1,1", "packing": "best_fit", "fim": {"rate": 0.5, "spm_rate": 0.25}}
    values["tokenizer"] = {"file": "t.json"}
    found = settings_of(Config.model_validate(values), None)
    assert found["data.split"] is found["data.text"] is None and found["data.packing"] == "best_fit"
    assert (found["data.fim"]["rate"], found["data.fim"]["spm_rate"]) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("data", "sources"),
    [
        ({"path": "p"}, [("p", 1.0)]),
        ({"text": ["t.txt"]}, [("data.text", 1.0)]),
        ({"train": [{"path": "a", "weight": 3}, "b"]}, [("a", 3.0), ("b", 1.0)]),
    ],
)
def test_the_cursor_of_a_config_alone(data, sources):
    found = Cursor.of_config(
        Config.model_validate({"model": {"vocab_size": 9}, "data": data, "tokenizer": {"file": "t.json"}})
    )
    assert found.sources == tuple(Source(*source) for source in sources)
    total = sum(weight for _, weight in sources)
    shares = tuple(weight / total for _, weight in sources)
    assert found.phases == (BlendPhase(0, shares, (0,) * len(sources)),)
    assert found.settings["tokenizer.file"] is found.settings["data.text"] is None


@pytest.mark.parametrize(
    ("before", "now", "changed"),
    [
        ({}, {}, []),
        ({}, {"train_seed": 2}, ["train.seed"]),
        ({}, {"data_fim": {"rate": 0.5}}, ["data.fim"]),
        ({"tokenizer_file": "x"}, {"tokenizer_file": "y"}, ["tokenizer.file"]),
        ({"tokenizer_file": "x"}, {}, []),  # unknown now
        ({}, {"tokenizer_file": "y"}, []),
        ({"data_text": "x"}, {"data_text": "y"}, ["data.text"]),
        ({"data_text": "x"}, {}, []),
        ({"data_split": "9,1,0"}, {"data_split": "8,2,0"}, []),  # the documents are compared instead
    ],
)
def test_settings_are_compared_where_both_are_known(before, now, changed):
    found = changed_settings(cursor(BASE, **before), cursor(BASE, **now))
    assert list(found) == changed
    unknown = changed_settings(cursor(BASE, Source("b", 1.0), **before), cursor(BASE, **now))
    assert list(unknown) == (["data.split"] if "data_split" in now else changed)


@pytest.mark.parametrize(
    ("before", "now", "partner"),
    [
        ("ab", "ab", {0: 0, 1: 1}),
        ("ab", "ba", {0: 1, 1: 0}),
        ("ab", "cb", {1: 1}),
        ("aa", "aa", {0: 0, 1: 1}),
        ("aa", "a", {0: 0}),
        ("ba", "aa", {1: 1}),  # the same number if possible
        ("a", "ba", {0: 1}),
        ("a", "", {}),
    ],
)
def test_unchanged_sources_are_matched_once(before, now, partner):
    assert matched_sources([named(name) for name in before], [named(name) for name in now]) == partner


def continued(before: Cursor, now: Cursor, consumed: int, *validation: Source, accept: bool = False) -> Continuation:
    return continue_from(SavedCursor("step_1", consumed, before, accept), now, validation)


def got(before: Cursor, now: Cursor, consumed: int, *validation: Source) -> str:
    with pytest.raises(CheckpointError) as problem:
        continued(before, now, consumed, *validation)
    assert problem.value.where == "step_1" and f"the {consumed:,} samples" in str(problem.value.want)
    return str(problem.value.got)


def test_the_blend_of_the_same_shares_continues():
    phases = (BlendPhase(0, (0.5, 0.5), (0, 0)), BlendPhase(10, (0.75, 0.25), (5, 5)))
    before = cursor(named("a"), named("b"), phases=phases)
    now = cursor(named("a", weight=6.0), named("b", weight=2.0))
    assert continued(before, now, 30) == Continuation(phases)
    assert continued(before, cursor(named("a"), named("c")), 0) == Continuation((BlendPhase(0, (0.5, 0.5), (0, 0)),))


def test_phases_up_to_the_checkpoint_stay():
    """Those that begin at it or later have no samples; added sources have none in earlier ones."""
    first, second = BlendPhase(0, (0.5, 0.5), (0, 0)), BlendPhase(40, (0.75, 0.25), (20, 20))
    before = cursor(named("a"), named("b"), phases=(first, second))
    now = cursor(named("a"), named("b", weight=3.0))
    assert continued(before, now, 40).phases == (first, BlendPhase(40, (0.25, 0.75), (20, 20)))
    assert continued(before, now, 41).phases == (first, second, BlendPhase(41, (0.25, 0.75), (21, 20)))
    added = continued(before, cursor(named("a"), named("b"), named("c", weight=2.0)), 44)
    assert added.phases == (
        BlendPhase(0, (0.5, 0.5, 0.0), (0, 0, 0)),
        BlendPhase(40, (0.75, 0.25, 0.0), (20, 20, 0)),
        BlendPhase(44, (0.25, 0.25, 0.5), (23, 21, 0)),
    )
    moved = continued(before, cursor(named("c"), named("b"), named("a")), 44)
    assert moved.phases == (BlendPhase(44, (1 / 3,) * 3, (0, 21, 23)),)
    (line,) = moved.lines
    assert "the blend changes at sample 44" in line
    assert line.endswith(
        "c at its sample 0 (share 0.3333), b at its sample 21 (share 0.25 -> 0.3333), a at its sample 23 "
        "(share 0.75 -> 0.3333)"
    )


def test_four_sources_of_a_blend_are_named():
    before = cursor(*map(named, "abcd"))
    (line,) = continued(before, cursor(*(named(name, weight=1.0 + (name == "a")) for name in "abcd")), 8).lines
    assert "d at its sample 2" in line and "more" not in line
    (line,) = continued(before, cursor(*map(named, "abcdef")), 8).lines
    assert "d at its sample 2" in line and "e at" not in line and line.endswith(" and 2 more")


def test_a_source_that_was_not_read_may_be_taken_out():
    before = cursor(named("a"), named("b", weight=0.0))
    assert continued(before, cursor(named("a")), 10).phases[-1] == BlendPhase(10, (1.0,), (10,))
    assert "b is no longer read" in got(cursor(named("a"), named("b")), cursor(named("a")), 10)


@pytest.mark.parametrize(("consumed", "left"), [(3, 4), (6, 1), (16, 5)])
def test_what_is_lost_is_the_rest_of_the_epoch(consumed, left):
    """An epoch of `a` has 7 samples of 16 tokens."""
    before = cursor(named("a"))
    gone = got(before, cursor(named("b")), consumed)
    assert gone == (
        f"a is no longer read, the {left} remaining samples of the epoch of a would be lost, and none would be repeated"
    )
    read = f"the {consumed} samples ({16 * consumed} tokens) read of a"
    other = got(before, cursor(replace(named("b"), path="a")), consumed)
    assert (
        f"what the new content shares with {read} would be repeated, the other {left} of its epoch would be lost"
        in other
    )
    assert (
        "the content of a changed: 2 documents of 30 tokens (a, blocks-a) -> 2 documents of 30 tokens (b, blocks-b)"
        in other
    )
    unknown = cursor(named("a", samples=None))
    assert "a is no longer read, the remaining samples of the epoch" in got(unknown, cursor(named("b")), consumed)
    again = got(before, cursor(named("a", span=(2, 5))), consumed)
    assert f"{read} would be repeated among new ones, and none would be lost" in again
    assert "training reads documents 0 to 4 of a -> 2 to 4" in again and "data.split" not in again


def test_tokens_are_counted_by_the_earlier_length():
    found = got(cursor(named("a")), cursor(named("a"), data_seq_length=64), 10)
    assert found.startswith("data.seq_length: 16 -> 64, the 10 samples (160 tokens) read of a")


def test_differences_are_named_up_to_four_sources():
    found = got(cursor(*map(named, "abcdef")), cursor(named("z")), 60)
    assert [f"{name} is no longer read" in found for name in "abcdef"] == [True] * 4 + [False] * 2
    assert "and 2 more sources" in found and "and likewise for 2 more" in found
    found = got(cursor(*map(named, "abcd")), cursor(named("z")), 60)
    assert "d is no longer read" in found and "more" not in found


def test_training_documents_that_become_validation_documents_are_named():
    before, now = cursor(named("a", span=(0, 9))), cursor(named("a", span=(0, 6)))
    found = got(before, now, 10, named("a", span=(6, 20)), named("b", span=(0, 20)))
    assert found.count("would be validation data") == 1
    assert "documents 6 to 8 of a were training data and would be validation data" in found
    assert "validation data" not in got(before, now, 10, named("a", span=(9, 20)))


def test_other_labels_and_other_epochs_are_named():
    files = {"tokens": A, "labels": A}
    before = cursor(replace(BASE, files=files))
    now = cursor(replace(BASE, files={**files, "labels": B}))
    assert "labels or rejected answers of a changed" in got(before, now, 10)
    epochs = got(cursor(named("a", epochs=1)), cursor(named("a", epochs=3)), 10)
    assert "data.order neox: the order of a has 1 epochs -> 3" in epochs


def test_an_accepted_difference_starts_a_phase():
    before = cursor(named("a"), named("b"))
    found = continued(before, cursor(named("c"), named("b")), 10, accept=True)
    assert found.phases == (BlendPhase(10, (0.5, 0.5), (0, 5)),)
    assert [line.split(": ")[0] for line in found.lines] == ["accepted by checkpoint.accept_data_change"] * 2
    other = continued(before, cursor(named("a"), named("b"), train_seed=2), 10, accept=True)
    assert other.phases == (BlendPhase(10, (0.5, 0.5), (0, 0)),)  # another order: from the start


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ([1, 1], [2, 2], True),
        ([0.1, 0.2], [1, 2], True),
        ([1, 0], [5, 0], True),
        ([1, 1], [1, 1.000001], False),
        ([1, 1], [1, 1, 0], False),
        ([1], [1, 1], False),
        ([1, 0], [1, 1e-15], False),
    ],
)
def test_shares_are_the_same_if_weights_are_proportional(one, other, same):
    assert same_shares(one, other) is same_shares(other, one) is same


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ((0, 5), (5, 9), None),
        ((0, 6), (5, 9), (5, 6)),
        ((2, 4), (0, 9), (2, 4)),
        ((3, 3), (0, 9), None),
        (None, (0, 9), None),
    ],
)
def test_documents_that_two_ranges_share(one, other, both):
    assert overlap(one, other) == overlap(other, one) == both


def test_a_range_is_named_by_its_first_and_last_document():
    assert [bounds(span) for span in ((0, 1), (1000, 2001), None)] == ["0 to 0", "1,000 to 2,000", "(not recorded)"]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ({}, {"span": (0, 6)}, "data.split 1 -> 2: training reads documents 0 to 4 of a -> 0 to 5"),
        ({"epochs": 2}, {"epochs": 3}, "data.order neox: the order of a has 2 epochs -> 3"),
        ({"epochs": None}, {"epochs": 1}, "data.order neox: the order of a has None epochs -> 1"),
        ({"epochs": 2}, {"epochs": 2, "files": {"tokens": A, "labels": A}}, "labels or rejected answers of a changed"),
    ],
)
def test_how_a_dataset_is_read_differently(old, new, line):
    assert reading(replace(BASE, **old), replace(BASE, **new), "1", "2") == line
