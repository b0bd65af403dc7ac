"""Conversion of weights on demand, and the checkpoint of an import: one parameter is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from neox.checkpoint.lazy_tensor import LazyTensor, lazy_fragment
from neox.checkpoint.retention import start_lineage
from neox.checkpoint.save import Content, save
from neox.config.schema import Config
from neox.config.values import dump, to_builtins
from neox.errors import CheckpointError
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh

SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class WeightSource:
    """A neox parameter that is read and converted on demand.

    Attributes:
        make: reads and converts the parameter.
        dtype: dtype of the result.
    """

    make: Callable[[], torch.Tensor]
    dtype: torch.dtype

    def __call__(self) -> torch.Tensor:
        """Read and convert the parameter."""
        return self.make()


def save_weights(config: Config, weights: Mapping[str, WeightSource], root: Path) -> Path:
    """Write a checkpoint of step 0 with weights only. One tensor is in memory at a time.

    Args:
        config: config of the run that may start from the checkpoint.
        weights: every parameter by name.
        root: folder of checkpoints.

    Returns:
        the folder of the checkpoint.

    Raises:
        CheckpointError: parameters are missing, unknown or of another shape.
        DiskError: the checkpoint cannot be written.
    """
    specs = GPT(config.model, Mesh.single("meta")).shard_specs()
    wrong = sorted(specs.keys() ^ weights.keys())
    if wrong:
        raise CheckpointError(
            "weights do not match the model",
            where=", ".join(wrong[:4]),
            got=f"{len(weights)} weights",
            want=f"{len(specs)}",
        )
    content = Content(
        0,
        {"step": 0, "weights_only": True},
        start_lineage(root),
        config_lock=dump(config),
        model_config=to_builtins(config.model),
    )
    fragments = [
        lazy_fragment(name, LazyTensor(source.make, tuple(specs[name].shape), source.dtype))
        for name, source in weights.items()
    ]
    return save(root, content, fragments, shard_bytes=SHARD_BYTES)
