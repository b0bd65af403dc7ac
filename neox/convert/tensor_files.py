"""Reading and writing of safetensors files, with one tensor in memory at a time.

Files are not memory-mapped, because mapped pages count as memory of the process once they are accessed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import torch

from neox.checkpoint.manifest import ITEM_BYTES, TensorInfo
from neox.checkpoint.shard import DTYPE_NAMES, DTYPES, HEADER_LIMIT, check_header, tensor_bytes
from neox.errors import CheckpointError
from neox.files import open_regular

ENTRY_BYTES = 160  # bytes of one tensor in a header, without its name
ALIGNMENT = 64
LFS_POINTER = b"version https://git-lfs"


def _read_header(path: Path) -> tuple[dict[str, tuple[TensorInfo, int]], int]:
    """Return the tensors of a file with their offsets in the data, and the offset of the data.

    Raises CheckpointError.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            file.seek(0)
            raw = file.read(8 + min(length, HEADER_LIMIT, size))
        if raw.startswith(LFS_POINTER):
            raise CheckpointError(
                "Git LFS pointer instead of the content",
                where=path,
                do="git lfs pull, or hf download NAME --local-dir DIR",
            )
        return check_header(raw, size, path), 8 + length
    except OSError as error:
        raise CheckpointError(
            "weights cannot be read", where=path, got=error.strerror, do="copy the file again"
        ) from error
    except CheckpointError as error:
        got = error.what if error.got is None else f"{error.what}: {error.got}"
        raise CheckpointError(
            "weights cannot be read", where=error.where, got=got, want=error.want, do=error.do or "copy the file again"
        ) from error


class TensorFiles:
    """Tensors by name in several files. Headers are checked at once, data is read on demand.

    Raises:
        CheckpointError: a file is missing or damaged, or a name is in two files.
    """

    def __init__(self, paths: Iterable[Path]):
        self._entries: dict[str, tuple[Path, TensorInfo, int]] = {}
        for path in paths:
            table, begin = _read_header(path)
            for name, (info, offset) in table.items():
                if name in self._entries:
                    raise CheckpointError(
                        "weight is in two files", where=name, got=f"{self._entries[name][0].name}, {path.name}"
                    )
                self._entries[name] = (path, info, begin + offset)

    def names(self) -> list[str]:
        """All tensors, in the order of the files."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._entries[name][1].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return DTYPES[self._entries[name][1].dtype]

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor.

        Raises:
            CheckpointError: the file cannot be read.
        """
        path, info, offset = self._entries[name]
        count = torch.Size(info.shape).numel()
        data = bytearray(count * ITEM_BYTES[info.dtype])
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                view, done = memoryview(data), 0
                while done < len(data):
                    read = file.readinto(view[done:])
                    if not read:
                        raise OSError("the file is shorter than its header states")
                    done += read
        except OSError as error:
            raise CheckpointError(
                "weights cannot be read", where=f"{path}: {name}", got=error, do="copy the file again"
            ) from error
        if count == 0:
            return torch.empty(info.shape, dtype=DTYPES[info.dtype])
        return torch.frombuffer(data, dtype=DTYPES[info.dtype]).view(info.shape)


class TensorFileWriter:
    """Writes one file tensor by tensor. Space for the header, which precedes the data, is reserved.

    Args:
        path: file to create.
        names: every name that may be added; they determine the size of the header.
    """

    def __init__(self, path: Path, names: Iterable[str]):
        room = 8 + ENTRY_BYTES + sum(len(json.dumps(name)) + ENTRY_BYTES for name in names)
        self._begin = -(-room // ALIGNMENT) * ALIGNMENT
        self._table: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._file = path.open("wb")
        self._file.seek(self._begin)
        self.size = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor."""
        view = tensor_bytes(tensor)
        self._table[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.size, self.size + len(view)],
        }
        self._file.write(view)
        self.size += len(view)

    def close(self) -> None:
        """Write the header, which completes the file."""
        text = json.dumps(self._table, separators=(",", ":")).encode()
        text += b" " * (self._begin - 8 - len(text))
        self._file.seek(0)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.close()

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
