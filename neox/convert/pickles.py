"""Pickled tensors of other programs: GPT-NeoX's checkpoints and the `.bin` files of Hugging Face models.

Pickles are read with weights_only, here and nowhere else in neox. Besides what torch allows there, a file may name the four globals that NumPy
arrays are pickled with: GPT-NeoX stores the state of NumPy's random numbers next to the weights. Any other global is an error that names it.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy._core.multiarray import _reconstruct

from neox.convert.state import check_tensor, named_tensors
from neox.errors import CheckpointError
from neox.files import require_regular

SAFE_GLOBALS = (
    numpy.ndarray,
    numpy.dtype,
    numpy.dtypes.UInt32DType,
    (_reconstruct, "numpy._core.multiarray._reconstruct"),  # NumPy 2
    (_reconstruct, "numpy.core.multiarray._reconstruct"),  # NumPy 1
)
REFUSED_GLOBAL = re.compile(r"(?:unsupported global:? (?:global )?|but got <class ')([\w.]+)", re.IGNORECASE)
LFS_POINTER = b"version https://git-lfs"


def read_pickle(path: Path) -> Any:
    """The content of a file of torch.save that holds tensors, NumPy arrays and plain values only.

    Raises:
        CheckpointError: it is no such file, is damaged, or names other classes or functions.
    """
    try:
        require_regular(path)
        with path.open("rb") as file:
            pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
        if pointer:
            raise CheckpointError("a Git LFS pointer instead of the contents", where=path, do="git lfs pull, or hf download NAME --local-dir DIR")
        with torch.serialization.safe_globals(list(SAFE_GLOBALS)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError("file cannot be read", where=path, got=error.strerror or type(error).__name__, do="copy it again") from error
    except Exception as error:  # torch lets the unpickler's own errors through
        if refused := REFUSED_GLOBAL.search(str(error)):
            what, got, do = "file holds more than tensors", refused[1], "save the tensors alone, or do not trust the file"
        else:
            what, got, do = "file cannot be read", "a damaged file, or none that torch.save made", "copy it again"
        raise CheckpointError(what, where=path, got=got, want="tensors, NumPy arrays and plain values", do=do) from error


class PickledTensors:
    """Tensors by name over several `.bin` files, with the interface of TensorFiles. Their data is mapped, not read, where the format allows it.

    Raises:
        CheckpointError: a file cannot be read, or a name is in two files.
    """

    def __init__(self, paths: Iterable[Path]):
        self._tensors: dict[str, torch.Tensor] = {}
        for path in paths:
            tensors = named_tensors(read_pickle(path), path)
            both = sorted(tensors.keys() & self._tensors.keys())
            if both:
                raise CheckpointError("weight is in two files", where=both[0], got=path.name)
            self._tensors |= tensors

    def names(self) -> list[str]:
        """All tensors, in the order of the files."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._tensors[name].dtype

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor. Raises CheckpointError where it cannot be read as weights."""
        check_tensor(self._tensors[name], name)
        return self._tensors[name]
