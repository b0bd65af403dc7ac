"""Ids of special tokens in a model folder of theirs: config.json and generation_config.json."""

from __future__ import annotations

from pathlib import Path

from neox.config.schema import SpecialIds
from neox.convert.config_keys import Json, Key, read_json, read_keys
from neox.convert.families import family_named

GENERATION = "generation_config.json"
STOP_KEYS = {"eos_token_id": Key("ids", None, nullable=True)}


def read_special_ids(folder: Path) -> SpecialIds:
    """The ids that transformers takes from a model folder, with the defaults of the architecture's class.

    Raises:
        ConfigError: an id is not a whole number or a list of them.
        CheckpointError: a file cannot be read.
    """
    theirs = read_json(folder / "config.json")
    table = family_named(theirs.get("model_type")).keys
    ids = read_keys({key: table[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}, theirs)
    eos = ids["eos_token_id"]
    found = SpecialIds(bos=ids["bos_token_id"], eos=tuple(eos) if isinstance(eos, list) else eos, pad=ids["pad_token_id"])
    if not (folder / GENERATION).exists():
        return found
    stop = read_keys(STOP_KEYS, read_json(folder / GENERATION), GENERATION)["eos_token_id"]
    stop = () if stop is None else (stop,) if isinstance(stop, int) else tuple(stop)
    return found.model_copy(update={"stop": tuple(sorted(set(stop) - found.ends()))})


def ids_to_json(ids: SpecialIds) -> Json:
    """bos_token_id, eos_token_id and pad_token_id of a config.json."""
    return {"bos_token_id": ids.bos, "eos_token_id": list(ids.eos) if isinstance(ids.eos, tuple) else ids.eos, "pad_token_id": ids.pad}


def generation_config(ids: SpecialIds) -> Json:
    """A generation_config.json for a folder that has none: generation ends where it did before."""
    eos = ids.ends() if ids.stop else None
    content = ids_to_json(ids) | ({"eos_token_id": sorted(eos)} if eos else {})
    return {key: value for key, value in content.items() if key != "pad_token_id" or value is not None}
