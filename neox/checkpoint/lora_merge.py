"""A checkpoint with low-rank adapters, read as one of the model without them: W becomes W + alpha / rank B A."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from neox.checkpoint.reader import Checkpoint
from neox.checkpoint.reshard import Slices, full_slices
from neox.checkpoint.storage import LOCAL, Storage
from neox.files import JsonObject
from neox.parallel.linear import merge_adapter

FACTORS = (".lora_a", ".lora_b")


class MergedCheckpoint(Checkpoint):
    """A Checkpoint with the adapters merged into the weights. It has no optimizer state."""

    def __init__(self, path: str | Path, *, storage: Storage = LOCAL):
        super().__init__(path, storage=storage)
        section = super().model_config["lora"]
        self._scale = section["alpha"] / section["rank"]

    @property
    def model_config(self) -> JsonObject:
        """The model section, without adapters."""
        return super().model_config | {"lora": None}

    def names(self) -> list[str]:
        """Names of the weights, sorted, without the factors of the adapters."""
        return [name for name in super().names() if not name.endswith(FACTORS)]

    def stored_shapes(self, kinds: set[str]) -> dict[tuple[str, str], tuple[int, ...]]:
        """(kind, name) -> logical shape; see Checkpoint."""
        return {key: shape for key, shape in super().stored_shapes(kinds).items() if not key[1].endswith(FACTORS)}

    def read(
        self, name: str, kind: str = "weight", slices: Slices | None = None, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """As Checkpoint.read, with the adapter of the weight added."""
        base = name.removesuffix(".weight")
        if kind != "weight" or not name.endswith(".weight") or not super().kinds(base + FACTORS[0]):
            return super().read(name, kind, slices, start, stop)
        slices = full_slices(self.info(name).shape) if slices is None else slices
        shape = tuple(high - low for low, high in slices)
        weight = super().read(name, kind, slices).view(shape)
        rank = self.info(base + FACTORS[0]).shape[0]
        a = super().read(base + FACTORS[0], kind, ((0, rank), slices[1])).view(rank, -1)
        b = super().read(base + FACTORS[1], kind, (slices[0], (0, rank))).view(-1, rank)
        return merge_adapter(weight, a, b, self._scale).flatten()[start : math.prod(shape) if stop is None else stop]

    def read_into(self, out: torch.Tensor, name: str, kind: str, slices: Slices, start: int, stop: int) -> None:
        """As Checkpoint.read_into, with the adapter of the weight added."""
        out.copy_(self.read(name, kind, slices, start, stop))


def open_weights(path: str | Path) -> Checkpoint:
    """Open a checkpoint as that of a model without adapters, whether it has any or not.

    Raises CheckpointError as Checkpoint does.
    """
    checkpoint = Checkpoint(path)
    if checkpoint.model_config.get("lora") is None:
        return checkpoint
    checkpoint.close()
    return MergedCheckpoint(path)
