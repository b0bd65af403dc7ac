"""The parameters that a run trains, and those it adds to its base: LoRA adapters, the head of a reward model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from neox.config.schema import LoraConfig, ModelConfig

if TYPE_CHECKING:  # the plan computes shapes without torch
    from torch import nn

ADAPTERS = ("lora_a", "lora_b")
SCORE, HEAD = "score.weight", "head.weight"


@runtime_checkable
class Adaptable(Protocol):
    """A matrix that can get an adapter."""

    def add_adapter(self, rank: int, scale: float) -> None:
        """Add B A of this rank, scaled."""
        ...


def add_adapters(blocks: Iterable[nn.Module], lora: LoraConfig) -> None:
    """Add adapters to the matrices that `lora.targets` names; targets that a block lacks are ignored."""
    for block in blocks:
        modules = dict(block.named_modules())
        for target in lora.targets:
            matrix = modules.get(target)
            if isinstance(matrix, Adaptable):
                matrix.add_adapter(lora.rank, lora.alpha / lora.rank)


def adapter_shapes(lora: LoraConfig, block: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of the adapters of a block by name, given those of its other parameters."""
    shapes: dict[str, tuple[int, ...]] = {}
    for target in lora.targets:
        if f"{target}.weight" in block:
            rows, columns = block[f"{target}.weight"]
            shapes |= {f"{target}.lora_a": (lora.rank, columns), f"{target}.lora_b": (rows, lora.rank)}
    return shapes


def is_adapter(name: str) -> bool:
    """Whether a parameter is a factor of an adapter."""
    return name.rpartition(".")[2] in ADAPTERS


def is_trained(config: ModelConfig, name: str) -> bool:
    """Whether a run trains a parameter: any, or with LoRA only adapters and the head of a reward model."""
    return config.lora is None or is_adapter(name) or name == SCORE


def is_added(name: str) -> bool:
    """Whether the weights that a run starts from may lack a parameter, which then starts at its initial value."""
    return is_adapter(name) or name == SCORE
