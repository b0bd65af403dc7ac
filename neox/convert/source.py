"""Weights on their way in: each parameter of ours as something that can be made when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from neox.checkpoint.lazy_tensor import LazyTensor, lazy_fragment
from neox.checkpoint.retention import start_lineage
from neox.checkpoint.save import Content, save
from neox.config.load import dump, to_builtins
from neox.config.schema import Config
from neox.errors import CheckpointError
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh

SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class Source:
    """One parameter of ours, converted when it is asked for.

    Attributes:
        make: reads and converts it.
        dtype: that it will have.
    """

    make: Callable[[], torch.Tensor]
    dtype: torch.dtype

    def __call__(self) -> torch.Tensor:
        """The tensor, made now."""
        return self.make()


class InMemoryTensors:
    """Tensors in memory, with the face of TensorFiles."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._tensors = tensors

    def names(self) -> list[str]:
        """All tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._tensors[name].dtype

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor."""
        return self._tensors[name]


def save_weights(config: Config, weights: Mapping[str, Source], root: Path) -> Path:
    """Write a checkpoint of step 0 that holds weights only, one tensor in memory at a time.

    Args:
        config: of the run that may start from it.
        weights: every parameter by name.
        root: folder of checkpoints.

    Returns:
        the checkpoint's folder.

    Raises:
        CheckpointError: parameters are missing, unknown or of another shape.
        DiskError: it cannot be written.
    """
    specs = GPT(config.model, Mesh.single("meta")).shard_specs()
    wrong = sorted(specs.keys() ^ weights.keys())
    if wrong:
        raise CheckpointError("weights do not fit the model", where=", ".join(wrong[:4]), got=f"{len(weights)} weights", want=f"{len(specs)}")
    return save(
        root,
        Content(0, {"step": 0, "weights_only": True}, start_lineage(root), config_lock=dump(config), model_config=to_builtins(config.model)),
        [lazy_fragment(name, LazyTensor(source.make, tuple(specs[name].shape), source.dtype)) for name, source in weights.items()],
        shard_bytes=SHARD_BYTES,
    )
