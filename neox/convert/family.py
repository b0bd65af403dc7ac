"""What a Hugging Face architecture is to neox: keys of its config.json, and one rule per parameter.

In this package "ours" is a name or value of neox, and "theirs" one of Hugging Face.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from neox.config.schema import ModelConfig
from neox.convert.config_keys import Key
from neox.convert.family_rules import Rule, same
from neox.errors import ConfigError
from neox.files import JsonObject

UNGATED_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}  # neox -> Hugging Face
THEIR_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
THEIR_GATES = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "relu": "reglu"}


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture.

    Attributes:
        model_type: as in config.json.
        architecture: class name, as in config.json.
        keys: the keys of config.json that it reads, with the defaults of the class and the meaning of null.
        misfits: neox config -> settings that the architecture does not support; empty if all are supported.
        to_json: neox config -> the keys of config.json that are specific to the architecture.
        from_json: values of all keys -> fields of the neox config.
        rules: neox config -> neox parameter name -> Rule.
        aliases: other names of keys.
    """

    model_type: str
    architecture: str
    keys: dict[str, Key]
    misfits: Callable[[ModelConfig], list[str]]
    to_json: Callable[[ModelConfig], JsonObject]
    from_json: Callable[[JsonObject], JsonObject]
    rules: Callable[[ModelConfig], dict[str, Rule]]
    aliases: dict[str, str] = field(default_factory=dict)


def unlike(config: ModelConfig, **wanted: object) -> list[str]:
    """List the keys of a config whose value is not the wanted one, or one of a tuple of wanted ones."""
    fields = config.model_dump()
    return [
        f"{key}={fields[key]}"
        for key, want in wanted.items()
        if fields[key] not in (want if isinstance(want, tuple) else (want,))
    ]


def lookup(table: dict[str, str], value: str, where: str) -> str:
    """The neox name of an activation.

    Raises:
        ConfigError: the table lacks it.
    """
    if value not in table:
        raise ConfigError("activation is not supported", where=where, got=value[:80], want=", ".join(table))
    return table[value]


def with_biases(ours: str, theirs: str, bias: bool = True) -> Iterator[tuple[str, Rule]]:
    """The rules of a weight, and of its bias if it has one, stored in the same form."""
    for kind in ("weight", "bias") if bias else ("weight",):
        yield f"{ours}.{kind}", same(f"{theirs}.{kind}")
