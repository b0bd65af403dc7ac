"""Text for terminals and logs: paths and values that may hold bytes that are not UTF-8."""

from __future__ import annotations

import os


def printable(path: str | os.PathLike[str]) -> str:
    r"""A path as text that every Unicode encoding accepts: bad bytes become \xNN, lone surrogates \uNNNN."""
    text = os.fspath(path)
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return "".join(map(_printable_character, text))


def counted(count: int, noun: str) -> str:
    """A count with its noun: "1 token", "2,048 tokens", "2 processes"."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{count:,} {noun if count == 1 else plural}"


def json_line(value: object) -> str:
    """A value as JSON on one line, for output. Names that are not UTF-8 are written as `printable` writes them."""
    import orjson  # here, because every command imports this module, and orjson is a fifth of the time of `neox --help`

    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        return orjson.dumps(_printable_value(value)).decode()


def _printable_value(value: object) -> object:
    if isinstance(value, dict):
        return {_printable_value(key): _printable_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_printable_value(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def _printable_character(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python represents a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if 0xD800 <= code <= 0xDFFF else character
