"""Writes csrc/data/unicode_tables.inc: what the letters, numbers and spaces of a split pattern are, and the tables of
normalisation form C.

    python csrc/data/unicode_tables.py

Everything is asked of the installed `tokenizers`, whose ids the encoder must give: its regular expressions and its
normaliser follow a Unicode version of their own. tests/data/text/test_byte_level.py compares the built tables with the
library that a user has.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

LAST = 0x110000
SURROGATES = range(0xD800, 0xE000)
HANGUL = range(0xAC00, 0xD7A4)  # composed by arithmetic
CLASSES = {"kLetter": r"\p{L}", "kNumber": r"\p{N}", "kSpace": r"\s"}
LOW_MARK, HIGH_MARK = "\u0334", "\u0345"  # marks of combining class 1 and 240, the lowest and the highest

NFC = normalizers.NFC().normalize_str
NFD = normalizers.NFD().normalize_str


def code_points() -> Iterator[int]:
    """All scalar values."""
    return (code for code in range(LAST) if code not in SURROGATES)


def ranges(codes: Iterable[int]) -> list[tuple[int, int]]:
    """Sorted numbers as [first, last] ranges."""
    found: list[list[int]] = []
    for code in codes:
        if found and found[-1][1] == code - 1:
            found[-1][1] = code
        else:
            found.append([code, code])
    return [(first, last) for first, last in found]


def matching(pattern: str) -> list[int]:
    """Code points that a one-character pattern matches."""
    codes = list(code_points())
    kept = pre_tokenizers.Split(Regex(pattern + "+"), "removed").pre_tokenize_str("".join(map(chr, codes)))
    unmatched = {code for _, (first, last) in kept for code in codes[first:last]}
    return [code for code in codes if code not in unmatched]


def each(codes: list[int], before: str, after: str, normalise) -> list[str]:
    """normalise(before + c + after) of every c, in batches: a new line stands between them, which nothing combines
    with.
    """
    results: list[str] = []
    for first in range(0, len(codes), 4096):
        joined = "\n".join(before + chr(code) + after for code in codes[first : first + 4096])
        results += normalise(joined).split("\n")
    return results


def is_moved(marks: str) -> bool:
    """Whether marks are reordered after a letter."""
    return NFD("a" + marks) != "a" + marks


def combining_classes(codes: list[int]) -> dict[int, int]:
    """Canonical combining class of every code point that has one, found from the known marks that it is reordered
    with.
    """
    # those that the library knows: Python may follow a later Unicode version
    marks: dict[int, str] = {}
    for mark in map(chr, code_points()):
        if unicodedata.combining(mark) and (is_moved(mark + LOW_MARK) or is_moved(HIGH_MARK + mark)):
            marks.setdefault(unicodedata.combining(mark), mark)
    above_lowest = each(codes, "a", LOW_MARK, NFD)
    below_highest = each(codes, "a" + HIGH_MARK, "", NFD)
    found = {}
    for code, low, high in zip(codes, above_lowest, below_highest, strict=True):
        plain = NFD(chr(code)) if low != "a" + chr(code) + LOW_MARK else chr(code)
        if len(plain) > 1 or (low == "a" + plain + LOW_MARK and high == "a" + HIGH_MARK + plain):
            continue
        # classes below that of `code`
        passed = [k for k, mark in marks.items() if is_moved(plain + mark)]
        # and at or below it
        held = [k for k, mark in marks.items() if k > max(passed, default=0) and not is_moved(mark + plain)]
        found[code] = min(held)
    return found


def write(path: Path) -> None:
    """Write the tables."""
    codes = [code for code in code_points() if code not in HANGUL and chr(code) != "\n"]
    classes = combining_classes(codes)
    decomposed = {code: form for code, form in zip(codes, each(codes, "", "", NFD), strict=True) if form != chr(code)}
    composed = {code: form for code, form in zip(codes, each(codes, "", "", NFC), strict=True) if form != chr(code)}
    pairs = sorted(
        (NFC(form[:-1]), form[-1], code) for code, form in decomposed.items() if len(form) > 1 and code not in composed
    )
    assert all(len(first) == 1 and NFC(first + second) == chr(code) for first, second, code in pairs)
    jamo = [*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)]  # vowels and finals compose with what stands before them
    unstable = ranges(sorted({*composed, *classes, *(ord(second) for _, second, _ in pairs), *jamo}))

    lines = [
        f"// Written by csrc/data/unicode_tables.py from tokenizers {tokenizers.__version__}. Not to be edited.",
        "// clang-format off",
    ]
    for name, pattern in CLASSES.items():
        lines += array(
            f"constexpr Range {name}Ranges[]",
            (f"{{{first:#x},{last:#x}}}" for first, last in ranges(matching(pattern))),
        )
    lines += array("constexpr Range kUnstableRanges[]", (f"{{{first:#x},{last:#x}}}" for first, last in unstable))
    lines += array("constexpr Mark kMarks[]", (f"{{{code:#x},{k}}}" for code, k in sorted(classes.items())))
    forms = (f"{{{code:#x},{{{','.join(f'{ord(c):#x}' for c in form)}}}}}" for code, form in sorted(decomposed.items()))
    lines += array("constexpr Decomposition kDecompositions[]", forms)
    lines += array(
        "constexpr Composition kCompositions[]",
        (f"{{{ord(first):#x},{ord(second):#x},{code:#x}}}" for first, second, code in pairs),
    )
    path.write_text("\n".join(lines) + "\n")


def array(declaration: str, entries: Iterable[str], width: int = 155) -> Iterator[str]:
    """Lines of a C++ array."""
    yield f"{declaration} = {{"
    line = ""
    for entry in entries:
        if len(line) + len(entry) >= width:
            yield "    " + line
            line = ""
        line += entry + ","
    yield "    " + line
    yield "};"


if __name__ == "__main__":
    write(Path(__file__).with_name("unicode_tables.inc"))
