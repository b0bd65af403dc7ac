"""Fill in the middle: what comes out is the document, its middle last; rates, fragments, room, order of random
numbers, other tokenizers.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import tokenizers
import torch

from neox._native import core
from neox.config.schema import FimConfig, TokenizerConfig
from neox.data.samples.documents import PADDING, DocumentDataset
from neox.data.samples.fim import Draws, FimDataset, HFCodec, NativeCodec, Transform
from neox.data.samples.loader import Loader
from neox.data.samples.order import EpochDataset
from neox.data.samples.packing import PackedDataset
from neox.data.text.tokenizer import Tokenizer, TokenizerFile, train_tokenizer
from neox.errors import ConfigError

SENTINELS = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|file_sep|>")
TEXTS = [f"def f_{i}(x):\n    return 'é日😀 {i * i}' * {i}  # {'word ' * (i % 13)}\n" for i in range(120)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(TEXTS, 420, tmp_path_factory.mktemp("fim") / "t.json", special_tokens=SENTINELS)


@pytest.fixture
def files(tokenizer, make_dataset):
    return make_dataset([[*tokenizer.encode(text), tokenizer.eod_id] for text in TEXTS])


def transform(tokenizer: Tokenizer, **options) -> Transform:
    return Transform(FimConfig(rate=1.0, **options), TokenizerConfig(file=tokenizer.file))


def undone(tokenizer: Tokenizer, ids: list[int]) -> tuple[str, str, str, str]:
    """(kind, prefix, middle, suffix) of a transformed text."""
    prefix, middle, suffix = (tokenizer.token_id(token) for token in SENTINELS[:3])
    assert [ids.count(token) for token in (prefix, middle, suffix)] == [1, 1, 1] and ids[0] == prefix
    if ids[1] == suffix:
        rest, last = ids[2 : ids.index(middle)], ids[ids.index(middle) + 1 :]
        return "spm", "", tokenizer.decode(last), tokenizer.decode(rest)
    at = ids.index(suffix), ids.index(middle)
    return (
        "psm",
        tokenizer.decode(ids[1 : at[0]]),
        tokenizer.decode(ids[at[1] + 1 :]),
        tokenizer.decode(ids[at[0] + 1 : at[1]]),
    )


def test_the_document_is_complete_with_its_middle_last(tokenizer):
    fim, kinds, lengths = transform(tokenizer), [], []
    for number, text in enumerate(TEXTS):
        ids = np.array([*tokenizer.encode(text), tokenizer.eod_id])
        out = fim.document(ids, 1000, Draws(number)).tolist()
        assert out[-1] == tokenizer.eod_id and out.count(tokenizer.eod_id) == 1
        kind, prefix, middle, suffix = undone(tokenizer, out[:-1])
        assert prefix + middle + suffix == text
        kinds.append(kind)
        lengths.append(len(middle))
    assert 40 <= kinds.count("spm") <= 80 and min(lengths) < 10 and max(lengths) > 60


def test_parts_are_encoded_separately(tokenizer):
    """A model is asked with the ids of the prefix as text, not with those that it had inside the document."""
    fim = transform(tokenizer, spm_rate=0.0)
    cut_words = 0
    for number, text in enumerate(TEXTS):
        ids = np.array(tokenizer.encode(text))
        out = fim.document(ids, 1000, Draws(number)).tolist()
        _, prefix, middle, suffix = undone(tokenizer, out)
        names = [tokenizer.token_id(token) for token in SENTINELS[:3]]
        assert out == [
            names[0],
            *tokenizer.encode(prefix),
            names[2],
            *tokenizer.encode(suffix),
            names[1],
            *tokenizer.encode(middle),
        ]
        cut_words += len(out) > ids.size + 3
    assert cut_words > 20  # some cuts fell inside a token


def test_rates_are_shares(tokenizer):
    prefix = tokenizer.token_id(SENTINELS[0])
    ids = np.array(tokenizer.encode(TEXTS[5]))
    for rate in (0.0, 0.3, 1.0):
        fim = Transform(FimConfig(rate=rate, spm_rate=0.9), TokenizerConfig(file=tokenizer.file))
        out = [fim.document(ids, 1000, Draws(i)).tolist() for i in range(400)]
        changed = [ids for ids in out if prefix in ids]
        assert abs(len(changed) / 400 - rate) < 0.08 and all(one == ids.tolist() for one in out if prefix not in one)
        spm = sum(one[1] == tokenizer.token_id(SENTINELS[2]) for one in changed)
        assert not changed or abs(spm / len(changed) - 0.9) < 0.1


def test_room_is_taken_off_the_suffix_and_the_middle_stays(tokenizer):
    fim, text = transform(tokenizer), TEXTS[100] * 3
    ids = np.array([*tokenizer.encode(text), tokenizer.eod_id])
    short = left = 0
    for seed in range(100):
        out = fim.document(ids, ids.size, Draws(seed)).tolist()
        assert len(out) <= ids.size and out[-1] == tokenizer.eod_id
        if out == ids.tolist():
            left += 1  # the suffix was too short to make room
            continue
        _, prefix, middle, suffix = undone(tokenizer, out[:-1])
        assert text.startswith(prefix + middle) and suffix.rstrip("�") in text
        short += len(prefix + middle + suffix) < len(text)
    assert short > 50 and 0 < left < 30
    assert fim.document(ids, 2, Draws(1)).tolist() == ids[:2].tolist() and fim.document(ids, 0, Draws(1)).size == 0


def test_fragments_between_dividers(tokenizer):
    fim = transform(tokenizer, split_sample="<|file_sep|>", fragment_rate=0.5)
    divider, prefix = tokenizer.token_id("<|file_sep|>"), tokenizer.token_id(SENTINELS[0])
    text = "<|file_sep|>".join(TEXTS[:8])
    changed = 0
    for seed in range(30):
        out = fim.document(np.array([*tokenizer.encode(text), tokenizer.eod_id]), 5000, Draws(seed)).tolist()
        assert out.pop() == tokenizer.eod_id
        cuts = [-1, *[i for i, token in enumerate(out) if token == divider], len(out)]
        fragments = [out[low + 1 : high] for low, high in pairwise(cuts)]
        assert len(fragments) == 8
        for fragment, wanted in zip(fragments, TEXTS, strict=False):
            is_changed = prefix in fragment
            changed += is_changed
            assert ("".join(undone(tokenizer, fragment)[1:]) if is_changed else tokenizer.decode(fragment)) == wanted
    assert 80 < changed < 160


def test_what_begins_with_no_prefix_is_left(tokenizer):
    fim = transform(tokenizer, no_prefix="def f_1")
    for number, text in enumerate(TEXTS):
        ids = np.array(tokenizer.encode(text))
        assert (fim.document(ids, 1000, Draws(number)).tolist() == ids.tolist()) == text.startswith("def f_1")


def test_characters_torn_by_the_sample_stay_where_they_are(tokenizer):
    codec = NativeCodec(TokenizerFile(tokenizer.file))
    ids = tokenizer.encode("日本語 é")
    for first in range(len(ids)):
        for last in range(first + 1, len(ids) + 1):
            found = codec.text(ids[first:last])
            if found is not None:
                assert found[1] in "日本語 é" and (first > 0 or found[0] == 0)
    assert codec.text([10**6]) is None and codec.text([]) is None
    fim = transform(tokenizer)
    for seed in range(20):
        out = fim.document(np.array(ids[1:]), 100, Draws(seed)).tolist()
        torn = codec.text(ids[1:])[0]
        assert out[:torn] == ids[1 : 1 + torn] and out[torn] == tokenizer.token_id(SENTINELS[0])


def test_ids_torn_at_the_start_count_in_the_room(tokenizer):
    """What goes beyond the room is taken off the suffix, so that the end-of-document token stays."""
    fim, codec = transform(tokenizer), NativeCodec(TokenizerFile(tokenizer.file))
    ids = [*tokenizer.encode("日" + TEXTS[60])[1:], tokenizer.eod_id]
    torn = codec.text(ids[:-1])[0]
    assert torn > 0
    transformed = 0
    for seed in range(60):
        out = fim.document(np.array(ids), len(ids), Draws(seed)).tolist()
        assert len(out) <= len(ids) and out[-1] == tokenizer.eod_id and out[:torn] == ids[:torn]
        transformed += out != ids
    assert transformed > 30


def test_another_kind_of_tokenizer(tmp_path, tokenizer):
    """What csrc/data cannot encode goes through the library."""
    library = tokenizers.Tokenizer.from_file(tokenizer.file)
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    library.save(str(tmp_path / "other.json"))
    other = Tokenizer(tmp_path / "other.json")
    fim = transform(other)
    assert isinstance(fim._codec, HFCodec)
    out = fim.document(np.array(other.encode(TEXTS[3])), 1000, Draws(1)).tolist()
    assert "".join(undone(other, out)[1:]) == TEXTS[3]


def test_missing_tokens(tokenizer, tmp_path):
    plain = train_tokenizer(TEXTS, 300, tmp_path / "plain.json")
    with pytest.raises(
        ConfigError,
        match=r"not in the vocabulary; where=data\.fim\.prefix_token, .*plain\.json; got=<\|fim_prefix\|>; "
        r"do=.*--special-token",
    ):
        transform(plain)
    with pytest.raises(ConfigError, match=r"data\.fim\.split_sample"):
        transform(tokenizer, split_sample="<nope>")


@pytest.mark.parametrize("kind", ["concatenate", "best_fit", "document"])
def test_samples(files, tokenizer, kind):
    """Of every packing: length, what is learned, segments, and that a sample is a function of its number."""
    whole = (0, len(TEXTS))
    samples = {
        "concatenate": lambda: EpochDataset(files, whole, 200, 1, True),
        "best_fit": lambda: PackedDataset(files, whole, 200, 1, document_mask=True),
        "document": lambda: DocumentDataset(files, None, 200, 1),
    }[kind]()
    dataset = FimDataset(samples, transform(tokenizer), 7, 1, document_mask=True)
    assert len(dataset) == len(samples)
    transformed = documents = 0
    for index in range(25):
        tokens, segments, labels, _ = dataset[index]
        assert tokens.shape == labels.shape == (201,) and segments.shape == (200,)
        learned = labels != -100
        assert np.array_equal(labels[learned], tokens[learned])
        starts = np.flatnonzero(np.diff(segments)) + 1
        if kind == "concatenate":
            padding = np.flatnonzero(~learned)
            assert padding.size < 12 and np.array_equal(padding, np.arange(201 - padding.size, 201))
        elif kind == "best_fit":
            assert not learned[starts].any()
        transformed += int((tokens == tokenizer.token_id(SENTINELS[0])).sum())
        documents += len(samples.slices(index))
        again = dataset[index]
        assert np.array_equal(again.tokens, tokens) and np.array_equal(again.labels, labels)
    assert transformed > 0.7 * documents
    assert dataset.slices(3) == samples.slices(3) and "after fill in the middle" in dataset.describe(3, 5)


@pytest.mark.parametrize("kind", ["best_fit", "document"])
def test_padding_is_not_a_document(tokenizer, make_dataset, kind):
    """Padded samples: padding stays at the end, in a segment of its own, and no label is learned there."""
    files = make_dataset([tokenizer.encode(text) for text in TEXTS[:4]])
    made = (
        PackedDataset(files, (0, 4), 4096, 1, document_mask=True)
        if kind == "best_fit"
        else DocumentDataset(files, None, 4096, 1)
    )
    sample = FimDataset(made, transform(tokenizer), 7, 1, document_mask=True)[0]
    documents = 4 if kind == "best_fit" else 1
    used = int((sample.tokens != PADDING).nonzero()[0][-1]) + 1
    assert used < 4000 and (sample.tokens[used:] == PADDING).all() and (sample.labels[used:] == -100).all()
    assert int((sample.tokens == tokenizer.token_id(SENTINELS[0])).sum()) == documents
    assert (
        sample.segment_ids.max() == documents
        and (sample.segment_ids[used:] == documents).all()
        and sample.segment_ids[used - 1] == documents - 1
    )


def test_resume_and_ranks_give_the_same_batches(files, tokenizer):
    dataset = FimDataset(
        EpochDataset(files, (0, len(TEXTS)), 64, 1, True), transform(tokenizer), 7, 1, document_mask=True
    )

    def step(consumed: int, dp: int) -> torch.Tensor:
        batches = [
            next(Loader(dataset, micro_batch_size=4 // dp, dp_rank=rank, dp_size=dp, start=consumed, prefetch=0))[0]
            for rank in range(dp)
        ]
        return torch.cat(
            [
                torch.stack([batch.tokens, batch.targets, batch.position_ids, batch.segment_ids.long()], dim=1)
                for batch in batches
            ]
        )

    with Loader(dataset, micro_batch_size=4) as loader:
        for consumed in range(0, 24, 4):
            batch = next(loader)[0]
            wanted = torch.stack([batch.tokens, batch.targets, batch.position_ids, batch.segment_ids.long()], dim=1)
            assert all(torch.equal(step(consumed, dp), wanted) for dp in (1, 2))


def test_random_numbers_are_pinned():
    """A change of these numbers changes the data of every resumed run: never change them."""
    draws = Draws(1234)
    assert [draws.below(1000) for _ in range(6)] == PINNED
    shares = [Draws(i).happens(0.25) for i in range(4000)]
    assert abs(sum(shares) / 4000 - 0.25) < 0.03


def test_the_transform_of_a_sample_is_pinned(tokenizer, files):
    """The seed and the data both choose what becomes of a sample."""
    samples = EpochDataset(files, (0, len(TEXTS)), 200, 1, True)
    keys = [
        FimDataset(samples, transform(tokenizer), checksum, seed, True)._key
        for checksum, seed in ((7, 1), (8, 1), (7, 2))
    ]
    assert keys == [12685755375415042387, 3167579367964742092, 17376287802516322724]
    assert all(
        len(
            {tuple(FimDataset(samples, transform(tokenizer), *one, True)[i].tokens) for one in ((7, 1), (8, 1), (7, 2))}
        )
        == 3
        for i in range(5)
    )


PINNED = [223, 936, 101, 51, 997, 370]


class Cuts:
    """Draws that transform every document at these two cuts, and note the bounds that they were asked for."""

    def __init__(self, *cuts: int):
        self.cuts, self.bounds = list(cuts), []

    def happens(self, rate: float) -> bool:
        return rate > 0

    def below(self, bound: int) -> int:
        self.bounds.append(bound)
        return self.cuts.pop(0)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 9), (9, 0), (9, 9), (2, 5)])
def test_both_cuts_lie_anywhere_up_to_the_end_of_the_text(tokenizer, first, second):
    fim, draws = transform(tokenizer, spm_rate=0.0), Cuts(first, second)
    text = "def f_1(x"
    out = fim.document(np.array(tokenizer.encode(text)), 1000, draws).tolist()
    assert draws.bounds == [10, 10]
    low, high = sorted((first, second))
    assert undone(tokenizer, out)[1:] == (text[:low], text[low:high], text[high:])


def test_ids_inside_a_character_alone_have_no_text(tokenizer):
    codec = NativeCodec(TokenizerFile(tokenizer.file))
    inside = [number for number, content in codec._bytes.items() if content and all(0x80 <= b < 0xC0 for b in content)]
    assert len(inside) >= 64
    assert codec.text(inside[:3]) is None
    assert codec.text([*inside[:2], *tokenizer.encode("x")]) == (2, "x")


def test_what_is_asked_of_the_samples_is_answered_by_them(files, tokenizer):
    samples = EpochDataset(files, (0, len(TEXTS)), 64, 1)
    dataset = FimDataset(samples, transform(tokenizer), 7, 1, document_mask=False)
    (first, *_) = samples.slices(3)
    assert 3 in dataset.find(first.source, first.document, 10)
    assert (
        dataset.find(first.source, first.document, 10).tolist()
        == samples.find(first.source, first.document, 10).tolist()
    )
    assert dataset.coverage(9) == samples.coverage(9) and dataset.coverage(9)[0].tokens == 9 * 64
    documents = ", ".join(f"{part.source}.bin document {part.document}" for part in samples.slices(3))
    assert dataset.describe(3, 5) == f"sample 3 of {documents}, after fill in the middle"
    assert dataset[3].segment_ids is None and dataset[3].tokens.tolist() != dataset[3 + len(dataset)].tokens.tolist()


def test_draws_count_from_one_and_use_all_of_the_range():
    draws = Draws(99)
    assert [draws.below(10) for _ in range(3)] == [core.mix(99, number) * 10 >> 64 for number in (1, 2, 3)]
    assert {Draws(key).below(3) for key in range(60)} == {0, 1, 2} and {Draws(key).below(1) for key in range(9)} == {0}
    assert not any(Draws(key).happens(0.0) for key in range(99)) and all(Draws(key).happens(1.0) for key in range(99))
    assert sum(Draws(key).happens(1e-3) for key in range(999)) < 9


@pytest.mark.parametrize("spm", [0.0, 1.0])
@pytest.mark.parametrize("over", [0, 1])
def test_the_suffix_makes_room_to_its_last_token(tokenizer, spm, over):
    """With one token less than prefix, middle and sentinels need, the document stays as it is."""
    fim = transform(tokenizer, spm_rate=spm)
    text = "def f_1(x): return 5"
    head, middle, tail = text[:4], text[4:9], text[9:]
    sizes = [len(tokenizer.encode(part)) for part in (head, middle, tail)]
    names = [tokenizer.token_id(token) for token in SENTINELS[:3]]
    ids = np.array([*tokenizer.encode(text), tokenizer.eod_id])
    for kept in range(sizes[2], -1, -1):
        room = sizes[0] + sizes[1] + kept + 3 + 1  # the end-of-document token stays last
        out = fim.document(ids, room, Cuts(4, 9)).tolist()
        suffix = tokenizer.encode(tail)[:kept]
        first, second = tokenizer.encode(head), tokenizer.encode(middle)
        psm = [names[0], *first, names[2], *suffix, names[1], *second]
        assert out == [*([names[0], names[2], *suffix, names[1], *first, *second] if spm else psm), tokenizer.eod_id]
    if over:
        room = sizes[0] + sizes[1] + 3
        assert fim.document(ids, room, Cuts(4, 9)).tolist() == ids[:room].tolist()


def test_a_document_that_ends_in_another_token_is_all_body(tokenizer):
    fim = transform(tokenizer, spm_rate=0.0)
    ids = np.array(tokenizer.encode("ab"))
    assert fim.eod_id == tokenizer.eod_id and ids[-1] != fim.eod_id
    out = fim.document(ids, 100, Cuts(1, 1)).tolist()
    names = [tokenizer.token_id(token) for token in SENTINELS[:3]]
    assert out == [names[0], *tokenizer.encode("a"), names[2], *tokenizer.encode("b"), names[1]]
    assert fim.document(np.array([tokenizer.eod_id]), 100, Cuts(0, 0)).tolist() == [tokenizer.eod_id]
    assert fim.document(np.empty(0, dtype=np.int64), 100, Cuts(0, 0)).size == 0
    named = Transform(FimConfig(rate=1.0), TokenizerConfig(file=tokenizer.file, eod_token="a"))
    assert named.eod_id == tokenizer.token_id("a")


def test_a_divider_stays_before_its_fragment(tokenizer):
    """The first fragment has none; what is left of the room is that of the fragments after it."""
    fim = transform(tokenizer, split_sample="<|file_sep|>", fragment_rate=1.0, spm_rate=0.0)
    names = [tokenizer.token_id(token) for token in SENTINELS]
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    ids = np.array([*a, names[3], *b])
    first, second = [names[0], *a, names[2], names[1]], [names[0], *b, names[2], names[1]]
    out = fim.document(ids, 9, Cuts(1, 1, 1, 1)).tolist()
    assert out == [*first, names[3], *second]
    assert fim.document(ids, 8, Cuts(1, 1, 1, 1)).tolist() == [*first, names[3], *b]  # no room for the sentinels
    ended = np.append(ids, tokenizer.eod_id)  # which takes one token of the room
    assert fim.document(ended, 9, Cuts(1, 1, 1, 1)).tolist() == [*first, names[3], *b, tokenizer.eod_id]
    assert fim.document(ended, 10, Cuts(1, 1, 1, 1)).tolist() == [*first, names[3], *second, tokenizer.eod_id]
    whole = transform(tokenizer, split_sample=None, spm_rate=0.0).document(ids, 20, Cuts(1, 1)).tolist()
    assert whole[:3] == [names[0], *a, names[2]] and whole.count(names[0]) == 1
