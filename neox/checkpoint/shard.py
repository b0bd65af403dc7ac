"""Safetensors shards: a writer that computes checksums while it streams, and a header reader that validates everything.

Layout of a file: 8 bytes little-endian header length, JSON header padded with spaces so that data begins at a multiple
of 64, then the tensors end to end in header order (https://huggingface.co/docs/safetensors). The largest element size
comes first, so that every tensor is aligned.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

import torch

from neox._native import core
from neox.checkpoint.manifest import (
    BLOCK,
    ITEM_BYTES,
    Segment,
    ShardFile,
    TensorInfo,
    parse_json,
    segment_key,
    stored_shape,
)
from neox.checkpoint.reshard import Fragment
from neox.checkpoint.storage import LOCAL, Storage
from neox.errors import CheckpointError
from neox.files import FileWriter

HEADER_LIMIT = 100_000_000  # bytes, the limit of the safetensors format
ALIGNMENT = 64
_INLINE = 1 << 18  # bytes below which passing a digest to a thread costs more than it saves

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(fragment: Fragment) -> str:
    """Dtype of a fragment's data in safetensors spelling."""
    return DTYPE_NAMES[fragment.data.dtype]


def num_bytes(fragment: Fragment) -> int:
    """Bytes of a fragment's data."""
    return (fragment.stop - fragment.start) * ITEM_BYTES[dtype_name(fragment)]


def build_header(segments: Sequence[Fragment]) -> bytes:
    """Length field, JSON and padding of a shard with these segments in this order."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for segment in segments:
        key = segment_key(segment.kind, segment.name, segment.slices, segment.start, segment.stop)
        table[key] = {
            "dtype": dtype_name(segment),
            "shape": list(stored_shape(segment.slices, segment.start, segment.stop)),
            "data_offsets": [offset, offset + num_bytes(segment)],
        }
        offset += num_bytes(segment)
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    if len(text) > HEADER_LIMIT:
        raise CheckpointError(
            "too many tensors for one shard", got=f"header of {len(text)} bytes", want=f"at most {HEADER_LIMIT}"
        )
    return len(text).to_bytes(8, "little") + text


def write_shard(path: Path, segments: Sequence[Fragment], threads: Executor, *, storage: Storage = LOCAL) -> ShardFile:
    """Write one shard durably, except for its folder's entry; digests run on `threads` concurrently with the writes.

    Raises DiskError.
    """
    header = build_header(segments)
    stored, offset = [], 0
    with FileWriter(
        path, need=len(header) + sum(num_bytes(segment) for segment in segments), storage=storage
    ) as writer:
        writer.write(header)
        for segment in segments:
            view = tensor_bytes(segment.data)
            digests = start_digests(view, BLOCK, threads)
            writer.write(view)
            blocks = tuple(digest if isinstance(digest, str) else digest.result() for digest in digests)
            stored.append(
                Segment(segment.kind, segment.name, segment.slices, segment.start, segment.stop, offset, blocks)
            )
            offset += num_bytes(segment)
        writer.commit()
    return ShardFile(path.name, writer.size, len(header), hashlib.sha256(header).hexdigest(), tuple(stored))


def tensor_bytes(data: torch.Tensor) -> memoryview:
    """The bytes of a flat tensor, copied to the host if necessary."""
    host = data.detach().to("cpu").contiguous().view(-1)
    return host.view(torch.uint8).numpy().data


def start_digests(view: memoryview, block: int, threads: Executor) -> list:
    """The checksum of each block: hex strings, or futures of them for large data."""
    parts = [view[begin : begin + block] for begin in range(0, len(view), block)]
    if len(view) < _INLINE:
        return [checksum(part) for part in parts]
    return [threads.submit(checksum, part) for part in parts]


def checksum(data: bytes | memoryview) -> str:
    """The checksum of a block: XXH3 with 64 bits, as 16 hex digits."""
    return f"{core.xxh3(data):016x}"


def check_header(raw: bytes | memoryview, size: int, where: object) -> dict[str, tuple[TensorInfo, int]]:
    """Read an untrusted safetensors header: key -> (dtype and shape, offset in the data).

    Args:
        raw: the file, or its beginning up to the end of the header at least.
        size: bytes of the complete file.
        where: name of the file in errors.

    Raises:
        CheckpointError: the header is longer than the file or the format's limit, is not JSON, or has a key twice or a
            key that is a path; or its tensors overlap, leave gaps, or do not fill the file exactly.
    """
    length = int.from_bytes(raw[:8], "little")
    if size < 8:
        raise CheckpointError("file is empty or too short for a header", where=where, got=f"{size} bytes")
    if length > min(size - 8, HEADER_LIMIT):
        raise CheckpointError(
            "header is longer than the file allows",
            where=where,
            got=f"{length} bytes",
            want=f"at most {min(size - 8, HEADER_LIMIT)}",
        )
    try:
        table = parse_json(bytes(raw[8 : 8 + length]))
    except CheckpointError as error:
        raise CheckpointError("header is not valid JSON", where=where, got=error.got) from error
    if not isinstance(table, dict):
        raise CheckpointError("header is not an object", where=where)
    table.pop("__metadata__", None)
    found = {key: _check_tensor(key, value, where) for key, value in table.items()}
    end = 0
    for key, (_, begin, stop) in sorted(found.items(), key=lambda item: (item[1][1], item[1][2])):
        if begin != end:
            rule = "overlap" if begin < end else "leave a gap"
            raise CheckpointError(
                f"tensors {rule}", where=f"{where}: {key}", got=f"offset {begin}", want=f"offset {end}"
            )
        end = stop
    if 8 + length + end != size:
        raise CheckpointError(
            "tensors do not fill the file", where=where, got=f"{size} bytes", want=f"{8 + length + end} bytes"
        )
    return {key: (info, begin) for key, (info, begin, _) in found.items()}


def _check_tensor(key: str, value: object, where: object) -> tuple[TensorInfo, int, int]:
    location = f"{where}: {key!r}"
    if ".." in key or key.startswith("/") or "\0" in key or "\\" in key:
        raise CheckpointError("tensor name is a path", where=location)
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            "tensor is malformed", where=location, got=repr(value)[:80], want="dtype, shape, data_offsets"
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    numbers = (
        isinstance(shape, list)
        and isinstance(offsets, list)
        and all(type(n) is int and 0 <= n < 1 << 62 for n in shape + offsets)
    )
    if not numbers or len(offsets) != 2 or not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(
            "tensor is malformed",
            where=location,
            got=repr(value)[:80],
            want=f"dtype of {list(ITEM_BYTES)}, shape and offsets from 0 on",
        )
    size = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != size:
        raise CheckpointError(
            "tensor size contradicts its shape",
            where=location,
            got=f"{offsets[1] - offsets[0]} bytes",
            want=f"{size} bytes",
        )
    return TensorInfo(dtype, tuple(shape)), offsets[0], offsets[1]
