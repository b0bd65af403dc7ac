"""The tables of characters of the native encoder: what writes them, all pairs that compose or are reordered, and the
words of hostile texts.
"""

from __future__ import annotations

import importlib.util
import random
import re
from pathlib import Path

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers

from neox._native import core
from neox.data.text import byte_level
from tests.data.text.test_byte_level import QWEN_PATTERN, hostile

ROOT = Path(__file__).resolve().parents[3]
TABLES = ROOT / "csrc" / "data" / "unicode_tables.inc"
NFC, NFD = normalizers.NFC().normalize_str, normalizers.NFD().normalize_str
PART = 0x1200  # code points of the tables that are written again


def tables(text: str) -> dict[str, list[list[int]]]:
    """Name -> entries, as lists of their numbers."""
    found = {}
    for name, body in re.findall(r"constexpr \w+ (k\w+)\[\] = \{\n(.*?)\n\};", text, re.DOTALL):
        entries = re.findall(r"\{(0x[^{}]*(?:\{[^{}]*\})?[^{}]*)\}", body)
        found[name] = [[int(number, 0) for number in re.findall(r"\w+", entry)] for entry in entries]
    return found


def test_the_tables_are_what_their_script_writes(tmp_path, monkeypatch):
    """For the characters below U+1200, with the ranges that end there cut off."""
    spec = importlib.util.spec_from_file_location("unicode_tables", TABLES.with_suffix(".py"))
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.LAST == 0x110000 and range(0xD800, 0xE000) == script.SURROGATES
    assert range(0xAC00, 0xAC00 + 19 * 21 * 28) == script.HANGUL
    monkeypatch.setattr(script, "LAST", PART)
    script.write(tmp_path / "tables.inc")
    text = (tmp_path / "tables.inc").read_text()
    written, stored = tables(text), tables(TABLES.read_text())
    assert list(written) == list(stored) and sum(map(len, written.values())) > 1400
    for name, entries in stored.items():
        if name.endswith("Ranges"):
            wanted = [[first, min(last, PART - 1)] for first, last in entries if first < PART]
        else:
            wanted = [entry for entry in entries if entry[2 if name == "kCompositions" else 0] < PART]
        assert written[name] == wanted, name
    head = TABLES.read_text().splitlines()[:3]
    assert text.splitlines()[1:3] == head[1:]
    assert re.fullmatch(
        r"// Written by csrc/data/unicode_tables\.py from tokenizers [\d.]+\. Not to be edited\.", head[0]
    )
    assert max(map(len, text.splitlines())) <= 160


def test_every_pair_that_composes_does():
    codes = [*range(0x3100), *range(0xAC00, 0xD7A4, 29), *range(0xF900, 0xFB50), *range(0x10000, 0x20000)]
    codes = [code for code in [*codes, *range(0x2F800, 0x2FA20)] if chr(code) != "\n"]
    apart = NFD("\n".join(map(chr, codes))).split("\n")
    changed = [part for part, code in zip(apart, codes, strict=True) if part != chr(code)]
    assert len(changed) > 2000
    text = "\n".join(changed)
    assert core.nfc(text) == NFC(text)


def test_every_mark_is_ordered_among_those_of_each_class():
    stored = tables(TABLES.read_text())["kMarks"]
    one_of = {number: chr(code) for code, number in stored}
    assert len(stored) > 800 and len(one_of) > 50
    others = [one_of[number] for number in sorted(one_of)]
    text = "\n".join(
        "q" + pair for code, _ in stored for mark in others for pair in (chr(code) + mark, mark + chr(code))
    )
    assert core.nfc(text) == NFC(text)


@pytest.mark.parametrize("pattern", [byte_level.GPT2_PATTERN, byte_level.LLAMA_PATTERN, QWEN_PATTERN])
def test_words_of_hostile_texts_are_those_of_the_pattern(pattern):
    rng = random.Random(8)
    edges = [
        "",
        " ",
        "a",
        "'",
        "\n",
        "1",
        "12345",
        "a1",
        "'s",
        "'S",
        "'ſ",
        "x'LL y",
        " 's",
        "!\n\n a",
        " \n \n",
        "\n ",
        "é1",
    ]
    texts = edges + [hostile(rng) for _ in range(1500)]
    theirs = pre_tokenizers.Split(Regex(pattern), "isolated")
    name = byte_level.PATTERNS[pattern]
    for text in texts:
        assert core.split_words(text, name) == [piece for piece, _ in theirs.pre_tokenize_str(text)], text


@pytest.mark.parametrize("name", ["kLetter", "kNumber", "kSpace"])
def test_classes_hold_to_the_last_code_point(name):
    """Words of one class and of another between digits or letters: each range of the tables, and what is next to it."""
    ranges = tables(TABLES.read_text())[f"{name}Ranges"]
    edges = {code for first, last in ranges for code in (first - 1, first, last, last + 1)}
    text = "".join(f"!{chr(code)}" for code in sorted(edges) if 0 <= code < 0x110000 and not 0xD800 <= code < 0xE000)
    for pattern in (byte_level.GPT2_PATTERN, byte_level.LLAMA_PATTERN):
        theirs = pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)
        assert core.split_words(text, byte_level.PATTERNS[pattern]) == [piece for piece, _ in theirs]
