"""Vocabularies and merges as the native encoder reads them: both forms of a merge, tokens that may be missing, and what
is refused.
"""

from __future__ import annotations

import random

import pytest
from tokenizers import models

from neox._native import core
from neox.data.text.byte_level import byte_of_letter

LETTERS = "".join(byte_of_letter())
VOCAB = {letter: number for number, letter in enumerate(LETTERS)} | {
    "ab": 256,
    "abc": 257,
    "Ġa": 258,
    "abcabcabc": 300,
    "abcabcabd": 301,
    "abcabc": 302,
    "abd": 303,
    "<|end|>": 400,
    "😀": 401,
    "日": 402,
    "a b": 403,
}
MERGES = ["Ġ a", "a b", "ab c", "ab d", "abc abc", "abcabc abc", "abcabc abd"]


def encode(text: str, merges: list, vocab: dict[str, int] | None = None, letters: str = LETTERS) -> list[int]:
    encoder = core.TextEncoder(letters, vocab or VOCAB, merges, "gpt2", False, [], {}, True)
    return core.EncodeThreads(encoder, 0).text(text.encode(), -1).result()[0].tolist()


@pytest.mark.parametrize("form", [str, lambda merge: merge.split(), lambda merge: tuple(merge.split())])
def test_merges_are_texts_or_pairs(form):
    merges = [form(merge) for merge in MERGES]
    for text, wanted in {
        "abc": [257],
        "abcabcabc": [300],
        "abcabcabd": [301],
        "abcabc abd": [302, 258, 98, 100],
        "b a c": [98, 258, LETTERS.index("Ġ"), 99],
        "é": [LETTERS.index("Ã"), LETTERS.index("©")],
    }.items():
        assert encode(text, merges) == wanted, text


def test_a_merge_has_the_rank_of_its_position():
    vocab = {**VOCAB, "bc": 500}
    assert encode("abc", ["a b", "b c"], vocab) == [256, 99] and encode("abc", ["b c", "a b"], vocab) == [97, 500]


def without(*tokens: str) -> dict[str, int]:
    return {token: number for token, number in VOCAB.items() if token not in tokens}


def test_only_bytes_that_no_utf8_has_may_be_missing():
    never = [LETTERS[byte] for byte in (0xC0, 0xC1, *range(0xF5, 0x100))]
    assert encode("abc", MERGES, without(*never)) == [257]
    for byte in (0, 0x61, 0x7F, 0x80, 0xBF, 0xC2, 0xF4):
        with pytest.raises(ValueError, match=f"byte {byte} is not in the vocabulary"):
            encode("abc", [], without(LETTERS[byte]))


@pytest.mark.parametrize(
    ("merge", "error", "message"),
    [
        ("ab", ValueError, "merge ab has no space"),
        ("a b c", ValueError, "merge a b c is of tokens that are not in the vocabulary"),
        ("a x", ValueError, "is of tokens that are not in the vocabulary"),  # not the result
        ("ab zz", ValueError, "is of tokens that are not in the vocabulary"),  # nor a side
        ("ax b", ValueError, "is of tokens that are not in the vocabulary"),
        ("a 日", ValueError, "is of tokens that are not in the vocabulary"),  # no letter of a byte
        ("a 😀", ValueError, "is of tokens that are not in the vocabulary"),
        (["a"], ValueError, "is not a pair"),
        (["a", "b", "c"], ValueError, "is not a pair"),
        (["a", 5], ValueError, "is not of strings"),
        (["a b", "c"], ValueError, "is of tokens that are not in the vocabulary"),
        (["a", " b"], ValueError, "is of tokens that are not in the vocabulary"),
        (5, TypeError, "int"),
    ],
)
def test_other_merges_are_refused(merge, error, message):
    for merges in ([merge], [*MERGES, merge]):
        with pytest.raises(error, match=message):
            encode("abc", merges)


def test_ids_have_limits():
    largest = (1 << 20) - 2
    for text, token in (("abc", "abc"), ("z", "z")):
        assert encode(text, MERGES, {**VOCAB, token: largest}) == [largest]
        with pytest.raises(ValueError, match=rf"id {largest + 1} of a (merge|byte)"):
            encode(text, MERGES, {**VOCAB, token: largest + 1})
    for merge in ("ab d", "a bd"):  # as a side of a merge
        vocab = {**VOCAB, "bd": 500, "ab": 501, max(merge.split(), key=len): largest + 1}
        with pytest.raises(ValueError, match=f"id {largest + 1} of a merge"):
            encode("abc", [merge], vocab)
    assert encode("abc", MERGES, {**VOCAB, "zz": 2**32 - 1}) == [257]  # of no merge
    for number in (-1, 2**32):
        with pytest.raises(ValueError, match=f"id {number} of a token"):
            encode("abc", MERGES, {**VOCAB, "zz": number})
    with pytest.raises(TypeError):
        encode("abc", MERGES, {**VOCAB, "zz": "5"})
    with pytest.raises(TypeError, match="a token is not a string"):
        encode("abc", MERGES, {**VOCAB, 5: 5})


def test_large_vocabularies_are_searched_correctly():
    """Tokens of up to 20 letters, of which many have the first eight or more in common."""
    rng = random.Random(1)
    words = ["".join(rng.choices("abc", k=rng.randrange(2, 21))) for _ in range(400)]
    tokens = sorted({word[:n] for word in words for n in range(2, len(word) + 1)}, key=len)
    vocab = {letter: number for number, letter in enumerate(LETTERS)}
    vocab |= {token: 1000 + i for i, token in enumerate(tokens)}
    merges = [(token[:-1], token[-1]) for token in tokens]
    threads = core.EncodeThreads(core.TextEncoder(LETTERS, vocab, merges, "gpt2", False, [], {}, True), 0)
    library = models.BPE(vocab, merges)
    for word in words:
        wanted = [token.id for token in library.tokenize(word)]
        assert threads.text(word.encode(), -1).result()[0].tolist() == wanted, word
