"""Ids of special tokens in config.json and generation_config.json of a Hugging Face model."""

from __future__ import annotations

from pathlib import Path

from neox.config.schema import SpecialIds
from neox.convert.config_keys import Key, read_json, read_keys
from neox.convert.families import family_named
from neox.files import JsonObject

GENERATION = "generation_config.json"
STOP_KEYS = {"eos_token_id": Key("ids", None, nullable=True)}


def read_special_ids(folder: Path) -> SpecialIds:
    """Read the ids that transformers would use for a model folder, with the defaults of the architecture.

    Raises:
        ConfigError: an id is not a whole number or a list of whole numbers.
        CheckpointError: a file cannot be read.
    """
    theirs = read_json(folder / "config.json")
    table = family_named(theirs.get("model_type")).keys
    ids = read_keys({key: table[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}, theirs)
    eos = ids["eos_token_id"]
    found = SpecialIds(
        bos=ids["bos_token_id"], eos=tuple(eos) if isinstance(eos, list) else eos, pad=ids["pad_token_id"]
    )
    if not (folder / GENERATION).exists():
        return found
    stop = read_keys(STOP_KEYS, read_json(folder / GENERATION), GENERATION)["eos_token_id"]
    stop = () if stop is None else (stop,) if isinstance(stop, int) else tuple(stop)
    return found.model_copy(update={"stop": tuple(sorted(set(stop) - found.ends()))})


def ids_to_json(ids: SpecialIds) -> JsonObject:
    """Return bos_token_id, eos_token_id and pad_token_id for a config.json."""
    return {
        "bos_token_id": ids.bos,
        "eos_token_id": list(ids.eos) if isinstance(ids.eos, tuple) else ids.eos,
        "pad_token_id": ids.pad,
    }


def generation_config(ids: SpecialIds) -> JsonObject:
    """Return a generation_config.json, so that an exported model stops at the same tokens."""
    eos = ids.ends() if ids.stop else None
    content = ids_to_json(ids) | ({"eos_token_id": sorted(eos)} if eos else {})
    return {key: value for key, value in content.items() if key != "pad_token_id" or value is not None}
