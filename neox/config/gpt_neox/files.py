"""GPT-NeoX's flat YAML files as settings of ours: upstream's meaning, upstream's defaults, every quirk spelt out.

All upstream files of one command are one mapping, as upstream merges them (a later file wins here; upstream refuses twice the same
key). What they say lies below native files and `--set`, which may also answer a question that the upstream file leaves open.
Facts: EleutherAI/gpt-neox, `megatron/neox_arguments` and `megatron/model/transformer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neox.config.gpt_neox import model, training
from neox.config.gpt_neox.keys import GPT_NEOX_KEYS
from neox.config.gpt_neox.translation import Given, Translated, Translation
from neox.config.parse import Leaf
from neox.config.schema import Config
from neox.errors import ConfigError

SHARED_NAMES = ("optimizer", "precision", "profile", "checkpoint", "deepspeed", "tokenizer", "include")  # top-level keys of both kinds of file


def is_upstream(leaves: list[Leaf]) -> bool:
    """Whether a file is GPT-NeoX's: it has keys of upstream and none of our sections."""
    shared = {leaf.path[0] for leaf in leaves if leaf.path[0] in SHARED_NAMES}
    upstream = {leaf.path[0] for leaf in leaves if leaf.path[0] in GPT_NEOX_KEYS} - shared
    native = {leaf.path[0] for leaf in leaves if leaf.path[0] in Config.model_fields} - shared
    if any(
        leaf.path[:2] == ("optimizer", "params") or (leaf.path in (("precision",), ("profile",), ("deepspeed",)) and leaf.value not in (None, {}))
        for leaf in leaves
    ):
        upstream |= shared
    return bool(upstream) and not native


def collect(leaves: list[Leaf], source: str) -> dict[str, Given]:
    """The leaves of an upstream file as one flat mapping, values below a key nested again."""
    tree: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for leaf in leaves:
        lines.setdefault(leaf.path[0], leaf.line)
        inner = tree
        for name in leaf.path[:-1]:
            inner = inner.setdefault(name, {})
        inner[leaf.path[-1]] = leaf.value
    return {name: Given(value, source, lines[name]) for name, value in tree.items()}


def translate(
    given: Mapping[str, Given], native: Mapping[tuple[str, ...], Any], embedding_rows: int | None = None
) -> tuple[list[Translated], list[str], list[ConfigError]]:
    """Native settings from upstream ones.

    Args:
        given: the merged upstream files.
        native: what native files and `--set` say; a problem of a key that they decide is none.

        embedding_rows: of the checkpoint that the files describe, where there is one.

    Returns:
        Settings; notes for people, a line each; problems.
    """
    work = Translation(given, native, embedding_rows)
    work.unknown_and_unsupported()
    if work.complete():
        for step in (*model.STEPS, *training.STEPS):
            step(work)
    return work.settings, work.notes, work.problems
