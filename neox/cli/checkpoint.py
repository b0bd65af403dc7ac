"""Inspect, verify, hash or convert checkpoints.

PATH is a checkpoint, or a folder of checkpoints or of a run (its newest is taken).

inspect  what is in it: step, lineage, layout, counters, tensors; of a folder, all its checkpoints
verify   read every byte and compare every checksum; exit code 4 and each problem on a line if it is damaged
hash     SHA-256 of every logical tensor, the same whatever layout wrote it
convert  rewrite it to --out with unsharded tensors: all of it (a resume from it is bitwise), or --weights-only,
         which --dtype may round; files of at most --shard-gb. Memory for one tensor at a time

example: neox checkpoint verify runs/default/checkpoints/step_00001000
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path

import torch

from neox.checkpoint.find import damaged, resolve
from neox.checkpoint.lazy_tensor import LazyTensor, lazy_fragment
from neox.checkpoint.manifest import ITEM_BYTES, RNG_KIND, Manifest, read_manifest
from neox.checkpoint.reader import Checkpoint
from neox.checkpoint.reshard import Fragment
from neox.checkpoint.retention import StepFolder, is_complete, scan, start_lineage
from neox.checkpoint.save import Content, save
from neox.checkpoint.shard import DTYPES as STORED_DTYPES
from neox.checkpoint.verify import digest, problems
from neox.errors import CheckpointError, ConfigError
from neox.files import JsonObject
from neox.model.dtypes import DTYPES
from neox.printing import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `neox checkpoint`."""
    parser.add_argument("action", choices=("inspect", "verify", "hash", "convert"), help="what to do")
    parser.add_argument("path", metavar="PATH", help="checkpoint, folder of checkpoints, or folder of a run")
    parser.add_argument(
        "--out", metavar="DIR", help="convert: folder of checkpoints to write to, such as RUN/checkpoints"
    )
    parser.add_argument(
        "--weights-only", action="store_true", help="convert: omit optimizer state, counters and generator states"
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="convert, with --weights-only: dtype of the weights")
    parser.add_argument(
        "--shard-gb",
        type=float,
        default=4.0,
        metavar="GB",
        help="convert: maximum size of a file, 2^30 bytes (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON value instead of text")


def run(args: argparse.Namespace) -> int:
    """Run the action and return the exit code. Raises CheckpointError."""
    if args.action == "convert":
        return convert(args)
    actions = {"inspect": inspect, "verify": verify_all, "hash": hash_tensors}
    return actions[args.action](Path(args.path), args.json)


def inspect(path: Path, as_json: bool) -> int:
    """Print the content of a checkpoint, and the list of checkpoints if `path` is a folder of several."""
    chosen = resolve(path)
    about = describe(chosen, read_manifest(chosen))
    if chosen != path:
        about["checkpoints"] = [_summary(folder) for folder in scan(chosen.parent)]
    if as_json:
        print(json.dumps(about))
        return 0
    for key, value in about.items():
        if key not in ("tensors", "checkpoints"):
            if key == "state":
                # the losses of the spike window, which --json includes
                value = {name: part for name, part in value.items() if name != "guard"}
            print(f"{key:<14}{value if isinstance(value, (str, int)) else json.dumps(value)}")
    print("tensors")
    for name, kinds in about["tensors"].items():
        print(f"  {name}  " + "  ".join(f"{kind} {tensor['dtype']}{tensor['shape']}" for kind, tensor in kinds.items()))
    for line in about.get("checkpoints", []):
        print(f"{line['name']:<14}generation {line['generation']}  {line['status']}")
    return 0


def describe(path: Path, manifest: Manifest) -> JsonObject:
    """The content of a manifest as plain JSON."""
    tensors: dict[str, JsonObject] = {}
    for (kind, name), info in sorted(manifest.tensors.items(), key=lambda item: (item[0][1], item[0][0])):
        if kind != RNG_KIND:
            tensors.setdefault(name, {})[kind] = {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "bytes": math.prod(info.shape) * ITEM_BYTES[info.dtype],
            }
    lineage = manifest.lineage
    return {
        "path": str(path),
        "step": manifest.step,
        "lineage": lineage.id,
        "generation": lineage.generation,
        "resumed_from": None if lineage.parent is None else {"lineage": lineage.parent[0], "step": lineage.parent[1]},
        "world_size": manifest.world_size,
        "layout": manifest.layout,
        "state": manifest.state,
        "files": len(manifest.files),
        "bytes": sum(file.size for file in manifest.files),
        "parameters": sum(math.prod(kinds["weight"]["shape"]) for kinds in tensors.values() if "weight" in kinds),
        "tensors": tensors,
    }


def _summary(folder: StepFolder) -> JsonObject:
    if folder.manifest is None:
        status = str(folder.problem) if folder.has_manifest else "unfinished save"
        return {"name": folder.path.name, "step": folder.step, "generation": None, "status": status}
    status = "complete" if is_complete(folder) else "files are missing or have another size"
    return {
        "name": folder.path.name,
        "step": folder.step,
        "generation": folder.manifest.lineage.generation,
        "status": status,
    }


def verify_all(path: Path, as_json: bool) -> int:
    """Check every byte of a checkpoint, and if `path` is a folder of several, the manifests of the others.

    Print each problem. Returns 0 or 4.
    """
    chosen = resolve(path)
    found = problems(chosen)
    if chosen != path:
        found += [folder.problem for folder in damaged(chosen.parent) if folder.problem]
    if as_json:
        parts = [problem.parts() for problem in found]
        print(json.dumps({"path": str(chosen), "good": not found, "problems": parts}))
    elif found:
        print("\n".join(problem.line() for problem in found), file=sys.stderr)
    else:
        manifest = read_manifest(chosen)
        size = sum(file.size for file in manifest.files)
        print(
            f"good: {chosen}: {counted(len(manifest.files), 'shard')}, {size} bytes, "
            f"{counted(len(manifest.tensors), 'tensor')}"
        )
    return CheckpointError.exit_code if found else 0


def hash_tensors(path: Path, as_json: bool) -> int:
    """Print the digest of every logical tensor."""
    digests = digest(resolve(path))
    print(json.dumps(digests) if as_json else "\n".join(f"{value}  {key}" for key, value in digests.items()))
    return 0


def convert(args: argparse.Namespace) -> int:
    """Rewrite a checkpoint after verifying every byte of it, and return 0.

    Raises:
        ConfigError: an option is missing, out of range, or does not fit the others.
        CheckpointError: the checkpoint is damaged, or the target exists.
        DiskError: the target cannot be written.
    """
    if args.out is None:
        raise ConfigError("convert needs a folder to write to", where="--out", do="give --out DIR")
    if args.dtype and not args.weights_only:
        raise ConfigError(
            "dtype can be changed for weights only", where="--dtype", got=args.dtype, do="add --weights-only"
        )
    if not 0 < args.shard_gb < 1 << 20:
        raise ConfigError(
            "size of a file is out of range", where="--shard-gb", got=args.shard_gb, want="above 0, below 2^20"
        )
    source = resolve(args.path)
    found = problems(source)
    if found:
        raise found[0]
    target = Path(args.out) / source.name
    if target.exists():
        raise CheckpointError("checkpoint already exists", where=target, do="choose another --out")
    with Checkpoint(source) as checkpoint:
        written = save(
            args.out,
            Content(
                checkpoint.step,
                {"step": checkpoint.step, "weights_only": True} if args.weights_only else checkpoint.state,
                start_lineage(args.out),
                config_lock=checkpoint.config_lock,
                model_config=checkpoint.model_config,
                layout={} if checkpoint.world_size > 1 else checkpoint.layout,
            ),
            converted(checkpoint, args.weights_only, DTYPES.get(args.dtype)),
            rng={} if args.weights_only or checkpoint.world_size > 1 else checkpoint.rng(0),
            shard_bytes=max(int(args.shard_gb * (1 << 30)), 1),
        )
    manifest = read_manifest(written)
    size = sum(file.size for file in manifest.files)
    if args.json:
        print(json.dumps({"path": str(written), "files": len(manifest.files), "bytes": size}))
    else:
        print(f"wrote {written}: {counted(len(manifest.files), 'file')}, {size} bytes")
    return 0


def converted(checkpoint: Checkpoint, weights_only: bool, dtype: torch.dtype | None) -> list[Fragment]:
    """Every tensor as one fragment that is read when it is written."""
    out = []
    for name in checkpoint.names():
        for kind in ("weight",) if weights_only else checkpoint.kinds(name):
            shape, stored = checkpoint.info(name, kind).shape, STORED_DTYPES[checkpoint.info(name, kind).dtype]
            wanted = dtype if dtype is not None and stored.is_floating_point else stored
            value = LazyTensor(partial(read, checkpoint, name, kind, wanted), shape, wanted)
            out.append(lazy_fragment(name, value, kind))
    return out


def read(checkpoint: Checkpoint, name: str, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """Read a tensor and convert its dtype."""
    return checkpoint.tensor(name, kind).to(dtype)
