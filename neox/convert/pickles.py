"""Pickled tensors of other programs: checkpoints of GPT-NeoX, and the `.bin` files of Hugging Face models.

Pickles are read with weights_only, and only in this module. In addition to what torch allows, a file may use the
globals of pickled NumPy arrays, because GPT-NeoX stores the state of NumPy's generator next to the weights. Any other
global is an error that names it.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy
import torch
from numpy._core.multiarray import _reconstruct

from neox.convert.state import InMemoryTensors, State, check_tensor, named_tensors
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


def read_pickle(path: Path) -> object:
    """Read a file of torch.save that has tensors, NumPy arrays and builtin values only.

    Raises:
        CheckpointError: the file is not of torch.save, is damaged, or uses other classes or functions.
    """
    try:
        require_regular(path)
        with path.open("rb") as file:
            pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
        if pointer:
            raise CheckpointError(
                "Git LFS pointer instead of the content",
                where=path,
                do="git lfs pull, or hf download NAME --local-dir DIR",
            )
        with torch.serialization.safe_globals(list(SAFE_GLOBALS)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            "file cannot be read", where=path, got=error.strerror or type(error).__name__, do="copy it again"
        ) from error
    except Exception as error:  # torch does not wrap all errors of the unpickler
        if refused := REFUSED_GLOBAL.search(str(error)):
            what, got, do = (
                "file contains more than tensors",
                refused[1],
                "save only the tensors, or do not trust the file",
            )
        else:
            what, got, do = (
                "file cannot be read",
                "a damaged file, or one that torch.save did not write",
                "copy it again",
            )
        raise CheckpointError(
            what, where=path, got=got, want="tensors, NumPy arrays and builtin values", do=do
        ) from error


class PickledTensors(InMemoryTensors):
    """Tensors by name of several `.bin` files. Their data is memory-mapped if the format allows it.

    Raises:
        CheckpointError: a file cannot be read, or a name is in two files.
    """

    def __init__(self, paths: Iterable[Path]):
        tensors: State = {}
        for path in paths:
            more = named_tensors(read_pickle(path), path)
            both = sorted(more.keys() & tensors.keys())
            if both:
                raise CheckpointError("weight is in two files", where=both[0], got=path.name)
            tensors |= more
        super().__init__(tensors)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor. Raises CheckpointError if it cannot be read as weights."""
        found = super().tensor(name)
        check_tensor(found, name)
        return found
