"""Hugging Face architectures that neox imports and exports: conversion of their configs and weights.

A family converts configs both ways, and has one rule per neox parameter, so that weights are converted tensor by tensor
in either direction. Sources: the published configs and weight names of the architectures.
"""

from __future__ import annotations

from neox.config.schema import ModelConfig
from neox.convert.family import Family
from neox.convert.gpt_families import GPT_FAMILIES
from neox.convert.llama_families import LLAMA_FAMILIES
from neox.errors import ConfigError

FAMILIES: tuple[Family, ...] = (*GPT_FAMILIES, *LLAMA_FAMILIES)


def family_for(config: ModelConfig) -> Family:
    """Return the architecture that represents this config exactly.

    Raises:
        ConfigError: there is none; names the settings that the closest one does not support.
    """
    if config.output == "score":
        raise ConfigError("reward models cannot be exported", where="model.output", got="score", want="tokens")
    ranked = sorted(FAMILIES, key=lambda family: len(family.misfits(config)))
    misfits = ranked[0].misfits(config)
    if misfits:
        raise ConfigError(
            "no Hugging Face architecture represents this model",
            where="model",
            got=", ".join(misfits),
            want=f"settings that {ranked[0].architecture}, the closest architecture, supports",
        )
    return ranked[0]


def family_named(model_type: object) -> Family:
    """Return the architecture of a model_type in config.json.

    Raises:
        ConfigError: it is not supported.
    """
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    raise ConfigError(
        "architecture is not supported",
        where="config.json: model_type",
        got=model_type,
        want=", ".join(family.model_type for family in FAMILIES),
    )
