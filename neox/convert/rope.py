"""Rotary embeddings in a config.json, as transformers 4 and 5 read and write them."""

from __future__ import annotations

from neox.config.schema import ModelConfig, RopeScaling
from neox.convert.config_keys import Key, read_keys
from neox.errors import ConfigError
from neox.files import JsonObject

SCALINGS = {"linear": "linear", "dynamic": "ntk", "yarn": "yarn", "llama3": "llama3"}  # transformers -> neox

ROPE_KEYS = {
    "rope_theta": Key("positive", None),
    "partial_rotary_factor": Key("positive", None),
    "rope_type": Key("name", None),
    "type": Key("name", "default"),
}
SCALING_KEYS = {
    "linear": {"factor": Key("positive")},
    "dynamic": {"factor": Key("positive")},
    "llama3": {
        "factor": Key("positive"),
        "low_freq_factor": Key("positive"),
        "high_freq_factor": Key("positive"),
        "original_max_position_embeddings": Key("count", None),
    },
    "yarn": {
        "factor": Key("positive", nullable=True),  # null: the ratio of the two context lengths
        "original_max_position_embeddings": Key("count", None),
        "beta_fast": Key("positive", None, nullable=True),
        "beta_slow": Key("positive", None, nullable=True),
        "attention_factor": Key("positive", None, nullable=True),
        "mscale": Key("number", None, nullable=True),
        "mscale_all_dim": Key("number", None, nullable=True),
        "truncate": Key("flag", True),
    },
}
ROPE_OBJECTS = {
    "rope_scaling": Key("object", None, nullable=True),
    "rope_parameters": Key("object", None, nullable=True),
}


# writing


def rope_to_json(config: ModelConfig, partial: bool = False) -> JsonObject:
    """Return `rope_parameters` for transformers 5, and `rope_scaling` and `rope_theta` for transformers 4.

    Args:
        config: of the model.
        partial: whether the family can rotate a part of the channels; then `rope_parameters` has their fraction.
    """
    scaling = None if config.rope_scaling is None else _scaling_to_json(config, config.rope_scaling)
    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_theta}
    if partial:
        parameters["partial_rotary_factor"] = config.rotary_pct
    # Before transformers 4.43 the key was `type`.
    old = None if scaling is None else {**scaling, "type": scaling["rope_type"]}
    return {"rope_parameters": parameters, "rope_scaling": old, "rope_theta": config.rope_theta}


def _scaling_to_json(config: ModelConfig, scaling: RopeScaling) -> JsonObject:
    rope: JsonObject = {"rope_type": "dynamic" if scaling.type == "ntk" else scaling.type, "factor": scaling.factor}
    if scaling.type in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = (
            scaling.original_max_position_embeddings or config.max_position_embeddings
        )
    if scaling.type == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.type == "yarn":
        rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention_factor is not None:
            rope["attention_factor"] = scaling.attention_factor
    return rope


def rope_misfits(config: ModelConfig) -> list[str]:
    """Return what transformers does not support: NTK scaling without the original context length."""
    scaling = config.rope_scaling
    static = scaling is not None and scaling.type == "ntk" and scaling.original_max_position_embeddings is None
    return ["rope_scaling.type=ntk without original_max_position_embeddings"] if static else []


def rotates_evenly(head_dim: int, rotary_pct: float) -> bool:
    """Whether head_dim x rotary_pct is even. For odd numbers Hugging Face rotates one channel more, neox one less."""
    return int(head_dim * rotary_pct) % 2 == 0


def require_even_rotation(head_dim: int, rotary_pct: float) -> None:
    """Check the rotary channels of a config.json.

    Raises:
        ConfigError: their number is odd.
    """
    if not rotates_evenly(head_dim, rotary_pct):
        raise ConfigError(
            "odd number of rotary channels",
            where="config.json: partial_rotary_factor",
            got=f"{head_dim} x {rotary_pct}",
            want="an even number",
        )


def positions_to_json(config: ModelConfig) -> int:
    """Return max_position_embeddings for config.json; with dynamic NTK it is the original context length."""
    scaling = config.rope_scaling
    if scaling is not None and scaling.type == "ntk" and scaling.original_max_position_embeddings is not None:
        return scaling.original_max_position_embeddings
    return config.max_position_embeddings


# reading


def rope_from_json(theirs: JsonObject, theta: float, share: float) -> JsonObject:
    """Return rope_theta, rotary_pct, rope_scaling and max_position_embeddings of a neox config.

    Args:
        theirs: max_position_embeddings and, if the file has them, rope_scaling and rope_parameters. A non-empty
            rope_scaling replaces all of rope_parameters, in transformers 4 and 5.
        theta: base of the frequencies if neither object has it.
        share: fraction of the channels that is rotated if neither object has it.

    Raises:
        ConfigError: the scaling is not supported, or a value has another type.
    """
    name = "rope_scaling" if theirs.get("rope_scaling") else "rope_parameters"
    rope, where = theirs.get(name) or {}, f"config.json: {name}"
    shared = read_keys(ROPE_KEYS, rope, where)
    positions = theirs["max_position_embeddings"]
    out = {
        "rope_theta": float(shared["rope_theta"] or theta),
        "rotary_pct": float(shared["partial_rotary_factor"] or share),
        "max_position_embeddings": positions,
    }
    kind = shared["rope_type"] or shared["type"]
    if kind == "default":
        return out
    if kind not in SCALINGS:
        raise ConfigError(
            "rope scaling is not supported",
            where="config.json: rope_type",
            got=kind,
            want=f"default, {', '.join(SCALINGS)}",
        )
    values = read_keys(SCALING_KEYS[kind], rope, where)
    unsupported = [key for key in ("mscale", "mscale_all_dim") if values.get(key)] + (
        ["truncate=false"] if values.get("truncate") is False else []
    )
    if kind == "yarn" and out["rope_theta"] <= 1:
        unsupported.append(f"rope_theta {out['rope_theta']}")
    if unsupported:
        raise ConfigError("yarn option is not supported", where=where, got=", ".join(unsupported))
    if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise ConfigError(
            "invalid value",
            where=f"{where}: high_freq_factor",
            got=values["high_freq_factor"],
            want="more than low_freq_factor",
        )
    if "original_max_position_embeddings" in values:
        values["original_max_position_embeddings"] = values["original_max_position_embeddings"] or positions
    if values["factor"] is None:
        values["factor"] = positions / values["original_max_position_embeddings"]
    if kind == "dynamic":
        values["original_max_position_embeddings"] = positions
        out["max_position_embeddings"] = max(positions, int(positions * values["factor"]))
    values = {key: value for key, value in values.items() if value is not None and key in RopeScaling.attributes()}
    return out | {"rope_scaling": RopeScaling.model_validate(values | {"type": SCALINGS[kind]})}
