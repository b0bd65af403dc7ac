r"""The manifest of a checkpoint: what is stored where. It is written last, and checked before anything in it is used.

`manifest.json` is one line of JSON with a fixed frame around its body, so that the checksum covers exact bytes:

    {"format":"neox-checkpoint","version":2,"sha256":"<64 hex digits of the body>","body":<body>}\n
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from neox.checkpoint.reshard import Slices, check_coverage, slice_shape
from neox.checkpoint.state import PROCESS_LIMIT, START_LIMIT, STEP_LIMIT, check_state
from neox.checkpoint.storage import LOCAL, Storage, read_file
from neox.errors import CheckpointError
from neox.files import JsonObject

FORMAT = "neox-checkpoint"
VERSION = 2
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 1 << 30  # bytes; 100,000 tensors in 1,024 shards need a tenth of it
BLOCK = 4 << 20  # bytes under one checksum
DIGESTS = {1: "sha256", 2: "xxh3"}  # version -> checksum of a block: SHA-256, or XXH3 with 64 bits
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
MAX_DIMENSIONS = 32
RNG_KIND = "rng"

SHARD_NAME = re.compile(r"shard_([0-9a-f]{16})_(\d{5,})_(\d{4,})\.safetensors")
_FRAME = re.compile(rb'\{"format":"([a-z-]+)","version":(\d{1,9}),"sha256":"([0-9a-f]{64})","body":')
_TAIL = b"}\n"
_HEX = re.compile(r"[0-9a-f]{64}")
_DIGITS = {"sha256": _HEX, "xxh3": re.compile(r"[0-9a-f]{16}")}


def shard_name(save_id: str, rank: int, index: int) -> str:
    """File name of the index-th shard of a rank.

    Unique to the save, so that saving a step again never touches the old files.
    """
    return f"shard_{save_id}_{rank:05d}_{index:04d}.safetensors"


@dataclass(frozen=True)
class Lineage:
    """Which start of which run wrote a checkpoint.

    Args:
        id: 32 hex digits, new at every start of training.
        generation: number of this start in its checkpoint folder, larger than that of every checkpoint found there.
        ancestors: (lineage id, step) of the checkpoint that this start resumed from, then of the one that the earlier
            start resumed from, and so on.
    """

    id: str
    generation: int
    ancestors: tuple[tuple[str, int], ...] = ()

    @property
    def parent(self) -> tuple[str, int] | None:
        """(lineage id, step) of the checkpoint that this start resumed from."""
        return self.ancestors[0] if self.ancestors else None

    def includes(self, other: Lineage, step: int) -> bool:
        """Whether a checkpoint of `other` at `step` is an ancestor of this lineage."""
        return other.id == self.id or any(other.id == name and step <= last for name, last in self.ancestors)


@dataclass(frozen=True)
class TensorInfo:
    """A logical tensor: dtype in safetensors spelling, shape without padding."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """A stored segment: flat range [start, stop) of a slice of tensor kind/name, at byte `offset` of its file's data.

    `blocks` are the checksums of its bytes in hex digits, one per BLOCK bytes.
    """

    kind: str
    name: str
    slices: Slices
    start: int
    stop: int
    offset: int
    blocks: tuple[str, ...]

    @property
    def key(self) -> str:
        """Its key in the safetensors header."""
        return segment_key(self.kind, self.name, self.slices, self.start, self.stop)


def segment_key(kind: str, name: str, slices: Slices, start: int, stop: int) -> str:
    """The key of a segment in the safetensors header, such as `weight/norm.bias[0:64]0:32`; unique in a checkpoint."""
    box = ",".join(f"{low}:{high}" for low, high in slices)
    return f"{kind}/{name}[{box}]{start}:{stop}"


def stored_shape(slices: Slices, start: int, stop: int) -> tuple[int, ...]:
    """Shape of a segment in a shard: that of its slice if it covers the slice, else flat."""
    shape = slice_shape(slices)
    return shape if (start, stop) == (0, math.prod(shape)) else (stop - start,)


@dataclass(frozen=True)
class ShardFile:
    """One shard: size, length and SHA-256 of its header (length field included), and its segments in file order."""

    name: str
    size: int
    header: int
    header_sha256: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Manifest:
    """The metadata of a checkpoint. `tensors` maps (kind, name) to what is stored; names of kind "rng" are rank/key."""

    step: int
    save_id: str
    lineage: Lineage
    world_size: int
    layout: JsonObject
    state: JsonObject
    config_lock: str
    model_config: JsonObject
    tensors: dict[tuple[str, str], TensorInfo]
    files: tuple[ShardFile, ...]
    block: int = BLOCK
    digest: str = DIGESTS[VERSION]

    def segments(self) -> Iterator[tuple[ShardFile, Segment]]:
        """Every segment with its file."""
        for file in self.files:
            for segment in file.segments:
                yield file, segment


def encode(manifest: Manifest) -> bytes:
    """The bytes of manifest.json. Raises CheckpointError where the caller's state or config is not plain JSON."""
    body = {
        "step": manifest.step,
        "save": manifest.save_id,
        "lineage": {
            "id": manifest.lineage.id,
            "generation": manifest.lineage.generation,
            "ancestors": [list(item) for item in manifest.lineage.ancestors],
        },
        "world_size": manifest.world_size,
        "layout": to_plain_json(manifest.layout, "layout"),
        "state": to_plain_json(manifest.state, "state"),
        "model": to_plain_json(manifest.model_config, "model"),
        "config": manifest.config_lock,
        "block": manifest.block,
        "tensors": [
            [kind, name, info.dtype, list(info.shape)] for (kind, name), info in sorted(manifest.tensors.items())
        ],
        "files": [encode_file(file) for file in manifest.files],
    }
    raw = json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
    digest = hashlib.sha256(raw).hexdigest()
    return f'{{"format":"{FORMAT}","version":{VERSION},"sha256":"{digest}","body":'.encode() + raw + _TAIL


def to_plain_json(value: object, where: str) -> object:
    """The value as JSON returns it, tuples as lists.

    Raises CheckpointError for values that JSON would change or refuse.
    """
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise CheckpointError("keys of a checkpoint's state must be strings", where=where, got=list(value)[:10])
        return {key: to_plain_json(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain_json(item, f"{where}[{index}]") for index, item in enumerate(value)]
    finite = isinstance(value, float) and math.isfinite(value)
    if value is None or finite or type(value) in (str, bool, int):
        return value
    raise CheckpointError(
        "not plain JSON",
        where=where,
        got=f"{type(value).__name__} {str(value)[:60]}",
        want="dict, list, str, int, finite float, bool or None",
    )


def encode_file(file: ShardFile) -> JsonObject:
    """A shard's record as plain JSON."""
    entries = [
        [s.kind, s.name, [list(pair) for pair in s.slices], s.start, s.stop, s.offset, list(s.blocks)]
        for s in file.segments
    ]
    return {
        "name": file.name,
        "size": file.size,
        "header": file.header,
        "header_sha256": file.header_sha256,
        "entries": entries,
    }


def read_manifest(folder: Path, *, storage: Storage = LOCAL) -> Manifest:
    """Reads and checks folder/manifest.json. Raises CheckpointError."""
    path = folder / MANIFEST
    return decode(read_file(path, MANIFEST_LIMIT, storage=storage), path)


def decode(raw: bytes, where: Path | str = MANIFEST) -> Manifest:
    """Parses and checks a manifest: frame, checksum, types, file names, and that every tensor is covered exactly once.

    Raises CheckpointError.
    """
    frame = _FRAME.match(raw)
    if frame is None or not raw.endswith(_TAIL) or frame[1].decode() != FORMAT:
        raise CheckpointError(
            "not a manifest", where=where, got=f"{len(raw)} bytes: {raw[:40]!r}", want=f"the frame of format {FORMAT}"
        )
    version = int(frame[2])
    if version not in DIGESTS:
        raise CheckpointError(
            "unknown checkpoint version",
            where=where,
            got=version,
            want=f"at most {VERSION}",
            do="use the release of neox that wrote it",
        )
    body = raw[frame.end() : -len(_TAIL)]
    actual = hashlib.sha256(body).hexdigest()
    if actual != frame[3].decode():
        raise CheckpointError(
            "manifest is damaged", where=where, got=f"sha256 {actual}", want=f"sha256 {frame[3].decode()}"
        )
    try:
        return _decode_body(_Reader(parse_json(body), "body"), DIGESTS[version])
    except CheckpointError as error:
        raise CheckpointError(error.what, where=f"{where} {error.where}", got=error.got, want=error.want) from error


def parse_json(raw: bytes) -> object:
    """JSON from an untrusted file: no duplicate keys, no NaN, no nesting that exhausts the stack.

    Raises CheckpointError.
    """
    try:
        return json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("not valid JSON", where="", got=str(error)[:200]) from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"duplicate key {twice!r}")
    return out


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number")


class _Reader:
    """A parsed JSON value with its path; typed access raises CheckpointError."""

    def __init__(self, value: object, where: str):
        self.value = value
        self.where = where

    def fail(self, want: str) -> CheckpointError:
        return CheckpointError("manifest is malformed", where=self.where, got=repr(self.value)[:80], want=want)

    def get(self, key: str | int) -> _Reader:
        if isinstance(self.value, dict) and key in self.value:
            return _Reader(self.value[key], f"{self.where}.{key}")
        raise self.fail(f"an object with key {key!r}")

    def items(self, count: int | None = None) -> list[_Reader]:
        if not isinstance(self.value, list) or (count is not None and len(self.value) != count):
            raise self.fail("a list" if count is None else f"a list of {count}")
        return [_Reader(value, f"{self.where}[{index}]") for index, value in enumerate(self.value)]

    def number(self) -> int:
        value = self.value
        if type(value) is not int or not 0 <= value < 1 << 62:
            raise self.fail("an integer of at least 0")
        return value

    def below(self, limit: int, least: int = 0) -> int:
        value = self.number()
        if not least <= value < limit:
            raise self.fail(f"an integer from {least} to {limit - 1}")
        return value

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.fail("a string")
        return self.value

    def table(self) -> JsonObject:
        if not isinstance(self.value, dict):
            raise self.fail("an object")
        return self.value

    def match(self, rule: Callable[[str], object], want: str) -> str:
        if not rule(self.text()):
            raise self.fail(want)
        return self.text()


def decode_file(value: object, tensors: dict[tuple[str, str], TensorInfo]) -> ShardFile:
    """A new shard's record from plain JSON. Raises CheckpointError where it is malformed."""
    return _decode_file(_Reader(value, "file"), tensors, BLOCK, DIGESTS[VERSION])


def _decode_body(body: _Reader, digest: str) -> Manifest:
    lineage = body.get("lineage")
    layout = body.get("layout")
    for axis in layout.table():
        layout.get(axis).below(PROCESS_LIMIT)
    ancestors = tuple(
        (one.text(), step.below(STEP_LIMIT))
        for one, step in (item.items(2) for item in lineage.get("ancestors").items())
    )
    tensors = dict(_decode_tensor(item) for item in body.get("tensors").items())
    block = body.get("block").number()
    if not block:
        raise body.get("block").fail("bytes per checksum, above 0")
    manifest = Manifest(
        step=body.get("step").below(STEP_LIMIT),
        save_id=body.get("save").text(),
        lineage=Lineage(lineage.get("id").text(), lineage.get("generation").below(START_LIMIT), ancestors),
        world_size=body.get("world_size").below(PROCESS_LIMIT, 1),
        layout=layout.table(),
        state=body.get("state").table(),
        config_lock=body.get("config").text(),
        model_config=body.get("model").table(),
        tensors=tensors,
        files=tuple(_decode_file(item, tensors, block, digest) for item in body.get("files").items()),
        block=block,
        digest=digest,
    )
    check_manifest(manifest)
    check_state(manifest.state, manifest.step)
    return manifest


def _decode_tensor(item: _Reader) -> tuple[tuple[str, str], TensorInfo]:
    kind, name, dtype, shape = item.items(4)
    if len(shape.items()) > MAX_DIMENSIONS:
        raise shape.fail(f"at most {MAX_DIMENSIONS} dimensions")
    info = TensorInfo(
        dtype.match(ITEM_BYTES.__contains__, f"one of {list(ITEM_BYTES)}"),
        tuple(size.number() for size in shape.items()),
    )
    return (kind.text(), name.text()), info


def _decode_file(item: _Reader, tensors: dict[tuple[str, str], TensorInfo], block: int, digest: str) -> ShardFile:
    name = item.get("name").match(SHARD_NAME.fullmatch, "shard_<save>_<rank>_<index>.safetensors")
    header = item.get("header_sha256").match(_HEX.fullmatch, "64 hex digits")
    segments = tuple(_decode_segment(one, tensors, block, digest) for one in item.get("entries").items())
    return ShardFile(name, item.get("size").number(), item.get("header").number(), header, segments)


def _decode_segment(item: _Reader, tensors: dict[tuple[str, str], TensorInfo], block: int, digest: str) -> Segment:
    kind, name, slices, start, stop, offset, blocks = item.items(7)
    if (kind.text(), name.text()) not in tensors:
        raise item.fail("a tensor of the table")
    box = tuple((low.number(), high.number()) for low, high in (pair.items(2) for pair in slices.items()))
    digests = tuple(one.match(_DIGITS[digest].fullmatch, f"hex digits of {digest}") for one in blocks.items())
    segment = Segment(kind.text(), name.text(), box, start.number(), stop.number(), offset.number(), digests)
    size = (segment.stop - segment.start) * ITEM_BYTES[tensors[kind.text(), name.text()].dtype]
    if size <= 0 or len(digests) != -(-size // block):
        raise item.fail(f"a range that is not empty and one checksum per {block} bytes")
    return segment


def check_manifest(manifest: Manifest) -> None:
    """Raises CheckpointError unless file names are unique, segments contiguous, and tensors covered exactly once."""
    names = [file.name for file in manifest.files]
    if len(set(names)) != len(names):
        raise CheckpointError("a file is listed twice", where=MANIFEST, got=max(names, key=names.count))
    covered: dict[tuple[str, str], list[tuple[Slices, int, int]]] = {key: [] for key in manifest.tensors}
    for file in manifest.files:
        end = 0
        for segment in file.segments:
            if segment.offset != end:
                raise CheckpointError(
                    "segments of a file are not contiguous",
                    where=f"{file.name}: {segment.key}",
                    got=f"offset {segment.offset}",
                    want=f"offset {end}",
                )
            end += (segment.stop - segment.start) * ITEM_BYTES[manifest.tensors[segment.kind, segment.name].dtype]
            covered[segment.kind, segment.name].append((segment.slices, segment.start, segment.stop))
        if file.header < 8 or file.header + end != file.size:
            raise CheckpointError(
                "file size does not match its segments",
                where=file.name,
                got=f"{file.size} bytes",
                want=f"{file.header} of the header and {end} of the segments",
            )
    check_segments(manifest.tensors, covered)


def check_segments(
    table: dict[tuple[str, str], TensorInfo], segments: dict[tuple[str, str], list[tuple[Slices, int, int]]]
) -> None:
    """Raises one CheckpointError that lists every tensor that is not covered exactly once."""
    problems = []
    for (kind, name), info in table.items():
        try:
            check_coverage(name, kind, info.shape, segments[kind, name])
        except CheckpointError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        shown = ", ".join(
            f"{error.where}: {error.what}, have {error.got}, want {error.want}" for error in problems[:50]
        )
        more = f", and {len(problems) - 50} more" if len(problems) > 50 else ""
        raise CheckpointError(f"{len(problems)} tensors are not covered exactly once", got=shown + more)
