"""The native encoder for byte-level BPE (csrc/data/text_encoder.h): which `tokenizers` files it supports."""

from __future__ import annotations

from neox._native import core

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {GPT2_PATTERN: "gpt2", LLAMA_PATTERN: "llama", LLAMA_PATTERN.replace("{1,3}", ""): "qwen"}
MAX_ADDED_BYTES = 1 << 16  # of all added tokens together; each byte is a node of a search tree of 1 KiB


class Unsupported(Exception):
    """The reason why a tokenizer needs the `tokenizers` library."""


def byte_of_letter() -> dict[str, int]:
    """Letter of a byte-level vocabulary -> the byte it stands for, in the order of the bytes.

    Printable bytes stand for themselves, the others are U+0100 and up (GPT-2).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


def text_encoder(content: dict, specials_as_text: bool, wide: bool) -> core.TextEncoder:
    """The encoder for a parsed `tokenizers` file.

    Args:
        content: the parsed file.
        specials_as_text: encode special tokens that occur in the text as text.
        wide: give int32 ids instead of uint16.

    Raises:
        Unsupported: the file is not byte-level BPE with a known split pattern; the message names the difference.
    """
    try:
        pattern = split_pattern(content.get("pre_tokenizer"))
        normalise = normaliser(content.get("normalizer"))
        model = content["model"]
        require_supported_model(model)
        added = added_tokens(content.get("added_tokens") or [], normalise, specials_as_text)
        whole = whole_word_tokens(model["vocab"]) if model.get("ignore_merges") else {}
        letters = "".join(byte_of_letter())
        return core.TextEncoder(letters, model["vocab"], model["merges"], pattern, normalise, added, whole, wide)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise Unsupported(f"unexpected content of the file: {error!r}") from error


def split_pattern(pre_tokenizer: dict | None) -> str:
    """Name of the pattern that splits text into words."""
    if pre_tokenizer is None:
        raise Unsupported("no pre-tokenizer")
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    kinds = [step["type"] for step in steps]
    if steps[-1].get("add_prefix_space"):
        raise Unsupported("a space is added before the text")
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt2"
    if kinds != ["Split", "ByteLevel"] or steps[1].get("use_regex", True):
        raise Unsupported(f"pre-tokenizer {' + '.join(kinds)}")
    split = steps[0]
    if split["behavior"] != "Isolated" or split.get("invert") or PATTERNS.get(split["pattern"].get("Regex")) is None:
        raise Unsupported(f"split pattern {split['pattern']}")
    return PATTERNS[split["pattern"]["Regex"]]


def normaliser(normalizer: dict | None) -> bool:
    """Whether text is normalised to form C."""
    if normalizer is None:
        return False
    if normalizer["type"] == "NFC" or (
        normalizer["type"] == "Sequence" and [step["type"] for step in normalizer["normalizers"]] == ["NFC"]
    ):
        return True
    raise Unsupported(f"normalizer {normalizer['type']}")


def require_supported_model(model: dict) -> None:
    """Raise Unsupported for a model that is not BPE, or BPE with unsupported options."""
    if model.get("type", "BPE") != "BPE":
        raise Unsupported(f"model {model['type']}")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise Unsupported(f"option {option} of BPE")


def added_tokens(tokens: list[dict], normalise: bool, specials_as_text: bool) -> list[tuple[bytes, int, bool, bool]]:
    """(text, id, matched in the normalised text, encoded as text) of each added token."""
    added = []
    for token in tokens:
        text = token["content"]
        if any(token.get(option) for option in ("single_word", "lstrip", "rstrip")):
            raise Unsupported(f"added token {text!r} includes the white space around it")
        if normalise and token["normalized"] and core.nfc(text) != text:
            raise Unsupported(f"added token {text!r} is changed by the normalizer")
        added.append(
            (text.encode(), token["id"], bool(token["normalized"]), specials_as_text and bool(token["special"]))
        )
    if sum(len(text) for text, *_ in added) > MAX_ADDED_BYTES:
        raise Unsupported(f"{len(added)} added tokens")
    return added


def whole_word_tokens(vocab: dict[str, int]) -> dict[bytes, int]:
    """Bytes -> id of the tokens that encode a complete word without merges."""
    letters = byte_of_letter()
    return {
        bytes(letters[letter] for letter in token): number
        for token, number in vocab.items()
        if all(letter in letters for letter in token)
    }
