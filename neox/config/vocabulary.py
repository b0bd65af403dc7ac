"""Vocabulary size and token ids of a tokenizer file, without the `tokenizers` package."""

from __future__ import annotations

from neox.files import read_json


def tokenizer_vocab_size(file: str) -> int:
    """Return the largest id + 1 of a `tokenizers` JSON file, including added tokens. Raises as `tokenizer_ids`."""
    return max(tokenizer_ids(file).values()) + 1


def tokenizer_ids(file: str) -> dict[str, int]:
    """Return token -> id of a `tokenizers` JSON file, including added tokens.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a tokenizer.
    """
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError("missing `model`")
    vocabulary = content["model"].get("vocab")
    if isinstance(vocabulary, dict):
        ids = dict(vocabulary)
    elif isinstance(vocabulary, list):
        ids = {
            str(entry[0] if isinstance(entry, list) and entry else entry): number
            for number, entry in enumerate(vocabulary)
        }
    else:
        raise ValueError("missing `model.vocab`")
    added = content.get("added_tokens") or []
    if not isinstance(added, list):
        raise ValueError("`added_tokens` is not a list")
    ids |= {str(token.get("content")): token.get("id") for token in added if isinstance(token, dict)}
    if not ids or not all(type(number) is int and number >= 0 for number in ids.values()):
        raise ValueError("token ids that are not numbers")
    return ids
