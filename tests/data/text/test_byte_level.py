"""Our byte-level encoder against `tokenizers`: every id, on hostile and on real text, for every kind of file that it
takes; the others refused by name.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import orjson
import pytest
import tokenizers
import zstandard
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from neox._native import core
from neox.data.text import byte_level
from neox.data.text.byte_level import GPT2_PATTERN, LLAMA_PATTERN, Unsupported, text_encoder
from neox.data.text.reading import parse_line
from neox.data.text.tokenizer import TokenizerFile

QWEN_PATTERN = LLAMA_PATTERN.replace("{1,3}", "")
ATOMS = [
    *"abcdefghijklmnopqrstuvwxyzABCSTMDLVRE",
    *"0123456789",
    *" \t\n\r\v\f\x1c\x85\xa0\u2003\u3000\u2028\u200b\ufeff\x00",
    *"'’\"!?.,;:-_()[]{}<>|/\\@#$%^&*+=~`",
    *["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'LL", "'ſ", "'rE", " '", "''"],
    *["  ", "   ", "     ", " " * 23, " " * 24, " " * 25, " " * 49, "\n\n", "\r\n", "\n    ", "\t\t"],
    *"éèñßøÅàþȺſµªº²½Ⅷ٣४௧𝟘日本語中文字かなカナ한글각ㅎ가나ไทยहिन्दीதமிழ்עבריתعربيΩΣςя",
    *"\u0300\u0301\u0323\u0327\u0345\u0338\u093c\u09be\u09c7\u0bbe\u0cd5\u0d3e\u1161\u11a8\u3099\u309a\u05b4\u0651\u064b\U0001d165\U00011127",
    *[
        "e\u0301",
        "가\u11a8",
        "\u1100\u1161\u11a8",
        "か\u3099",
        "\u1e9b\u0323",
        "\u0958",
        "\u2126",
        "\u212b",
        "\uf900",
        "\U0002f800",
        "\u0344",
    ],
    *["😀", "👩‍👩‍👧", "🇩🇪", "\U0001f3fd", "\U000e0101", "\ue000", "\uffff", "\U0010ffff"],
    *[
        "<|endoftext|>",
        "<|endoftext|",
        "<|",
        "|>",
        "<|pad|>",
        "hello",
        "world",
        "the",
        " the",
        "return",
        "the the",
        "ing",
        "tion",
    ],
]


def hostile(rng: random.Random, most: int = 40) -> str:
    """A random text; runs of one atom are common."""
    parts = []
    for _ in range(rng.randrange(most)):
        parts.append(rng.choice(ATOMS) * (1 if rng.random() < 0.8 else rng.randrange(1, 12)))
    return "".join(parts)


def bpe(
    path: Path,
    pattern: str,
    *,
    nfc: bool = False,
    added: tuple[AddedToken, ...] = (),
    ignore_merges: bool = False,
    size: int = 1500,
) -> TokenizerFile:
    """Trains a tokenizer whose merges cross as many of ATOMS as they can."""
    rng = random.Random(1)
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    if pattern == GPT2_PATTERN:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((hostile(rng, 60) for _ in range(400)), trainer)
    tokenizer.add_tokens(list(added))
    tokenizer.save(str(path))
    return TokenizerFile(path)


def disagreement(file: TokenizerFile, path: Path, texts: list[str], specials_as_text: bool = False) -> str | None:
    """The first text that gets other ids."""
    ours = core.EncodeThreads(text_encoder(file.content, specials_as_text, wide=True), 0)
    theirs = tokenizers.Tokenizer.from_file(str(path))
    theirs.encode_special_tokens = specials_as_text
    for text, encoding in zip(texts, theirs.encode_batch(texts, add_special_tokens=False), strict=True):
        if ours.text(text.encode(), -1).result()[0].tolist() != encoding.ids:
            return text
    return None


SPACES = tuple(AddedToken(" " * n, normalized=True) for n in range(24, 1, -1))
KINDS = {
    "gpt2": (GPT2_PATTERN, {}),
    "neox": (GPT2_PATTERN, {"nfc": True, "added": (AddedToken("<|pad|>", special=True, normalized=False), *SPACES)}),
    "many_added": (
        GPT2_PATTERN,
        {
            "added": tuple(
                AddedToken(text, normalized=False)
                for text in ("the", "the the", "th", "ing", "日本", "!?", "x", "<|pad|>")
            )
        },
    ),
    "llama": (LLAMA_PATTERN, {"ignore_merges": True}),
    "qwen": (QWEN_PATTERN, {"nfc": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_tokenizers_on_hostile_text(kind, tmp_path):
    pattern, options = KINDS[kind]
    file = bpe(tmp_path / "t.json", pattern, **options)
    rng = random.Random(2)
    texts = [hostile(rng) for _ in range(4000)] + ["", " ", "\n", "a", "  ", "'", "é", *ATOMS]
    assert disagreement(file, tmp_path / "t.json", texts) is None
    assert disagreement(file, tmp_path / "t.json", texts[:500], specials_as_text=True) is None


@pytest.mark.parametrize("name", ["gpt-neox-20b", "gpt2"])
def test_ids_are_those_of_tokenizers_on_real_text(name, shared_data):
    path = shared_data / "tokenizers" / f"{name}.json"
    lines = zstandard.open(shared_data / "text" / "multilingual.jsonl.zst").read().splitlines()[::40]
    texts = [orjson.loads(line)["text"][:20_000] for line in lines] + [
        Path(json.__file__).read_text(),
        Path(random.__file__).read_text(),
    ]
    rng = random.Random(3)
    assert disagreement(TokenizerFile(path), path, [*texts, *(hostile(rng) for _ in range(1000))]) is None


def test_long_and_short_words_are_merged_identically(tmp_path):
    file = bpe(tmp_path / "t.json", GPT2_PATTERN, size=4000)
    rng = random.Random(4)
    words = ["".join(rng.choice("abst日é") for _ in range(n)) for n in (*range(1, 40), 255, 256, 257, 300, 1000, 5000)]
    assert disagreement(file, tmp_path / "t.json", [*words, "a" * 3000, "ab" * 3000, "'" * 700, "日" * 900]) is None


def test_ids_around_16_bits_are_cached_correctly(tmp_path):
    """Words are remembered with 16 or with 32 bits per id: a vocabulary whose ids lie on both sides, words of up to
    23 ids, each met again.
    """
    path = tmp_path / "t.json"
    content = json.loads(json.dumps(bpe(path, GPT2_PATTERN).content))
    content["model"]["vocab"] = {token: number + 65_100 for token, number in content["model"]["vocab"].items()}
    for token in content["added_tokens"]:
        token["id"] += 65_100
    path.write_text(json.dumps(content))
    rng = random.Random(7)
    words = ["".join(rng.choice("aeiqxzé日") for _ in range(rng.randrange(1, 24))) for _ in range(3000)]
    texts = [hostile(rng) for _ in range(500)] + [" ".join(rng.choice(words) for _ in range(50)) for _ in range(500)]
    assert disagreement(TokenizerFile(path), path, texts) is None


def test_classes_and_normal_form_are_those_of_the_library():
    codes = [code for code in (*range(0x32000), *range(0xE0000, 0xE0200)) if not 0xD800 <= code < 0xE000]
    text = "".join(map(chr, codes))
    for pattern in (GPT2_PATTERN, LLAMA_PATTERN):
        theirs = [piece for piece, _ in pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)]
        assert core.split_words(text, byte_level.PATTERNS[pattern]) == theirs
    nfc = normalizers.NFC().normalize_str
    assert core.nfc("\n".join(text)) == nfc("\n".join(text))
    marks = [
        chr(code) for code in codes if code >= 0x300 and nfc("a" + chr(code) + "\u0334") != "a" + chr(code) + "\u0334"
    ]
    rng = random.Random(5)
    mixed = "\n".join(
        "".join(rng.choice((rng.choice(marks), rng.choice(ATOMS), chr(rng.choice(codes)))) for _ in range(9))
        for _ in range(20_000)
    )
    assert len(marks) > 700 and core.nfc(mixed) == nfc(mixed)


def test_lines_are_parsed_or_left_to_the_caller(tmp_path):
    encoder = core.EncodeThreads(text_encoder(bpe(tmp_path / "t.json", GPT2_PATTERN).content, False, wide=False), 0)
    nested = b'{"meta": {"text": "no", "x": [1.5, true, null, "\\n"]}, "text": "c\\u00e9\\ud83d\\ude00\\n"}'
    content = b"\n".join([b'{"text": "a b"}', b" \r", b'{"text": ""}', b'{"text": 1}', nested, b'{"text": "end"}'])
    tokens, sizes, blank, empty, unsure = encoder.lines(content, b"text", 7).result()
    texts = ["a b", "cé😀\n", "end"]
    wanted = [[*encoder.text(text.encode(), -1).result()[0].tolist(), 7] for text in texts]
    assert (
        tokens.tolist() == [token for ids in wanted for token in ids]
        and sizes.tolist() == [len(ids) for ids in wanted]
        and tokens.dtype == np.uint16
    )
    assert (blank, empty) == (1, 1)
    assert [(content[first:last], line, document) for first, last, line, document in unsure] == [(b'{"text": 1}', 3, 1)]


def test_what_is_accepted_is_what_the_full_parser_reads(tmp_path):
    """Mutated lines: a text is taken only where the parser of lines that the native reader leaves gives the same
    text.
    """
    encoder = core.EncodeThreads(text_encoder(bpe(tmp_path / "t.json", GPT2_PATTERN).content, False, wide=False), 0)
    rng = random.Random(6)
    seeds = [
        b'{"text": "caf\xc3\xa9 \\"q\\" \\u00e9 \\ud83d\\ude00 and some more words of text", '
        b'"n": [1, -2.5, {"text": "x"}], "t": true}',
        b'{"a": null, "text": "\xe6\x97\xa5\xe6\x9c\xac\\n\\t\\/", "text": "second", "z": "\xf0\x9f\x98\x80"}',
        b'  {"k":0.125,"text":"' + b"plain text of more than sixteen bytes " * 3 + b'"}\r',
    ]
    pieces = [
        b'"',
        b"\\",
        b"\\u",
        b"\\ud800",
        b"\xff",
        b"\xc3",
        b"\xed\xa0\x80",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"1e5",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"123456789012345678901",
        b"00",
        b"-",
        b" ",
        b"\x00",
        b"\x1f",
        b"\xef\xbb\xbf",
    ]
    taken = 0
    for _ in range(20_000):
        line = bytearray(rng.choice(seeds))
        for _ in range(rng.randrange(3)):
            at = rng.randrange(len(line))
            line[at : at + rng.choice((0, 0, 1, 3))] = rng.choice(pieces)
        tokens, sizes, _, empty, unsure = encoder.lines(bytes(line), b"text", -1).result()
        if unsure:
            continue
        taken += 1
        text, reason = parse_line(bytes(line), "text")
        assert reason is None
        assert tokens.tolist() == encoder.text(text.encode(), -1).result()[0].tolist() and sizes.size + empty == 1
    assert 4000 < taken < 19_000


ADDED = {"id": 9, "content": "x", "normalized": False, "special": False}


def split_by(pattern: str, behavior: str = "Isolated", invert: bool = False, **options: bool) -> dict:
    """The pre-tokenizer of Llama's form with one thing changed."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, **options}
    return {"type": "Sequence", "pretokenizers": [split, level]}


LARGE_ID = ["a a"]  # a merge whose result gets an id that is too large


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": {"type": "WordPiece"}}, "model WordPiece"),
        ({"model": {"dropout": 0.1}}, "option dropout"),
        ({"model": {"byte_fallback": True}}, "option byte_fallback"),
        ({"model": {"vocab": {"a": 0}, "merges": []}}, "is not in the vocabulary"),
        ({"model": {"merges": ["zz zzz"]}}, "unexpected content"),
        ({"model": {"merges": LARGE_ID}}, "id 1048575 of a merge"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}},
            "normalizer Seq",
        ),
        ({"normalizer": {"type": "NFKC"}}, "normalizer NFKC"),
        ({"model": {"continuing_subword_prefix": "##"}}, "option continuing_subword_prefix"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "option end_of_word_suffix"),
        ({"pre_tokenizer": split_by(LLAMA_PATTERN, behavior="Removed")}, "split pattern"),
        ({"pre_tokenizer": split_by(LLAMA_PATTERN, invert=True)}, "split pattern"),
        ({"pre_tokenizer": split_by(LLAMA_PATTERN + "|x")}, "split pattern"),
        ({"pre_tokenizer": split_by(LLAMA_PATTERN, use_regex=True)}, r"pre-tokenizer Split \+ ByteLevel"),
        ({"pre_tokenizer": split_by(LLAMA_PATTERN, add_prefix_space=True)}, "a space is added"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
            "pre-tokenizer ByteLevel",
        ),
        ({"added_tokens": [{**ADDED, "single_word": True}]}, "white space around it"),
        ({"added_tokens": [{**ADDED, "rstrip": True}]}, "white space around it"),
        ({"added_tokens": [{**ADDED, "content": "x" * (1 << 16)}, {**ADDED, "id": 10}]}, "2 added tokens"),
        ({"pre_tokenizer": None}, "no pre-tokenizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer Whitespace"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}}, "a space is added"),
        (
            {"added_tokens": [{"id": 9, "content": "x", "lstrip": True, "normalized": False, "special": False}]},
            "white space around it",
        ),
        (
            {
                "normalizer": {"type": "NFC"},
                "added_tokens": [{"id": 9, "content": "e\u0301", "normalized": True, "special": False}],
            },
            "changed by the normalizer",
        ),
    ],
)
def test_other_tokenizers_are_refused_with_the_reason(change, reason, tmp_path):
    content = bpe(tmp_path / "t.json", GPT2_PATTERN, size=300).content
    if change.get("model", {}).get("merges") is LARGE_ID:
        content["model"]["vocab"]["aa"] = (1 << 20) - 1
    for key, value in change.items():
        content[key] = {**content["model"], **value} if key == "model" else value
    with pytest.raises(Unsupported, match=reason):
        text_encoder(content, False, wide=False)


def test_what_is_as_good_as_a_known_form():
    byte_level_step = {"type": "ByteLevel", "add_prefix_space": False}
    for pre_tokenizer, pattern in (
        (byte_level_step, "gpt2"),  # `use_regex` is on if it is missing
        ({"type": "Sequence", "pretokenizers": [{**byte_level_step, "use_regex": True}]}, "gpt2"),
        (split_by(GPT2_PATTERN), "gpt2"),
        (split_by(LLAMA_PATTERN), "llama"),
        (split_by(QWEN_PATTERN), "qwen"),
    ):
        assert byte_level.split_pattern(pre_tokenizer) == pattern
    nfc = {"type": "NFC"}
    kinds = [byte_level.normaliser(each) for each in (None, nfc, {"type": "Sequence", "normalizers": [nfc]})]
    assert kinds == [False, True, True]
    byte_level.require_supported_model({"dropout": None, "byte_fallback": False, "end_of_word_suffix": ""})
    assert (
        sum(len(text) for text, *_ in byte_level.added_tokens([{**ADDED, "content": "x" * (1 << 16)}], False, False))
        == 1 << 16
    )


def test_added_tokens_are_matched_and_encoded_by_their_options():
    """(matched in the normalised text, encoded as text): special tokens are text only if asked."""
    tokens = [
        {**ADDED, "normalized": normalized, "special": special}
        for normalized in (False, True)
        for special in (False, True)
    ]
    for as_text in (False, True):
        found = byte_level.added_tokens(tokens, True, as_text)
        assert found == [(b"x", 9, each["normalized"], as_text and each["special"]) for each in tokens]
    decomposed = {**ADDED, "content": "e\u0301"}
    assert byte_level.added_tokens([decomposed], True, False) == [("e\u0301".encode(), 9, False, False)]
    assert byte_level.added_tokens([{**decomposed, "normalized": True}], False, False)[0][2]


def test_letters_of_bytes_are_those_of_gpt2():
    letters = byte_level.byte_of_letter()
    assert set(letters) == set(pre_tokenizers.ByteLevel.alphabet()) and list(letters.values()) == list(range(256))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("!~ \n\x00\x7f", "¡¬®ÿ\xad\xa0", "日😀"):
        (piece,) = [word for word, _ in level.pre_tokenize_str(text)]
        assert bytes(letters[letter] for letter in piece) == text.encode()
    assert byte_level.whole_word_tokens({"Ġa": 5, "日": 6, "b": 7}) == {b" a": 5, b"b": 7}
