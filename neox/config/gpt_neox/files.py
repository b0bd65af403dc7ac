"""Translation of GPT-NeoX's flat YAML files to native settings, with GPT-NeoX's meaning and defaults.

All GPT-NeoX files of a command are merged to one mapping, as in GPT-NeoX. A later file wins here; GPT-NeoX rejects a
duplicate key. Native files and `--set` take precedence, and may supply values that the GPT-NeoX files lack.
Sources: EleutherAI/gpt-neox, `megatron/neox_arguments` and `megatron/model/transformer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from neox.config.gpt_neox import model, training
from neox.config.gpt_neox.keys import GPT_NEOX_KEYS
from neox.config.gpt_neox.translation import Given, Translated, Translation
from neox.config.parse import Leaf, YamlValue
from neox.config.schema import Config
from neox.errors import ConfigError

# top-level keys in both kinds of files
SHARED_NAMES = ("optimizer", "precision", "profile", "checkpoint", "deepspeed", "tokenizer", "include")


def is_gpt_neox(leaves: list[Leaf]) -> bool:
    """Whether a file is written for GPT-NeoX: it has keys of GPT-NeoX and no native section."""
    shared = {leaf.path[0] for leaf in leaves if leaf.path[0] in SHARED_NAMES}
    theirs = {leaf.path[0] for leaf in leaves if leaf.path[0] in GPT_NEOX_KEYS} - shared
    native = {leaf.path[0] for leaf in leaves if leaf.path[0] in Config.attributes()} - shared
    if any(
        leaf.path[:2] == ("optimizer", "params")
        or (leaf.path in (("precision",), ("profile",), ("deepspeed",)) and leaf.value not in (None, {}))
        for leaf in leaves
    ):
        theirs |= shared
    return bool(theirs) and not native


def collect(leaves: list[Leaf], source: str) -> dict[str, Given]:
    """Collect the leaves of a GPT-NeoX file in one flat mapping. Values below a key are nested again."""
    tree: dict[str, YamlValue] = {}
    lines: dict[str, int] = {}
    for leaf in leaves:
        lines.setdefault(leaf.path[0], leaf.line)
        inner = tree
        for name in leaf.path[:-1]:
            inner = inner.setdefault(name, {})
        inner[leaf.path[-1]] = leaf.value
    return {name: Given(value, source, lines[name]) for name, value in tree.items()}


def translate(
    given: Mapping[str, Given], native: Mapping[tuple[str, ...], YamlValue], embedding_rows: int | None = None
) -> tuple[list[Translated], list[str], list[ConfigError]]:
    """Translate GPT-NeoX settings to native ones.

    Args:
        given: the merged GPT-NeoX files.
        native: values of native files and `--set`; a problem of a key that they set is not reported.
        embedding_rows: rows of the embedding in a checkpoint that the files describe, if there is one.

    Returns:
        settings; notes for the user, one line each; problems.
    """
    work = Translation(given, native, embedding_rows)
    work.unknown_and_unsupported()
    if work.complete():
        for step in (*model.STEPS, *training.STEPS):
            step(work)
    return work.settings, work.notes, work.problems
