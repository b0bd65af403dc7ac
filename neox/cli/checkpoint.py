"""Inspect, verify or hash checkpoints. PATH is a checkpoint, or a folder of checkpoints or of a run (its newest is taken).

inspect  what is in it: step, lineage, layout, counters, tensors; of a folder, all its checkpoints
verify   read every byte and compare every checksum; exit code 4 and each problem on a line if it is damaged
hash     SHA-256 of every logical tensor, the same whatever layout wrote it

example: neox checkpoint verify runs/default/checkpoints/step_00001000
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from neox.checkpoint.load import damaged, digest, problems, resolve
from neox.checkpoint.manifest import ITEM_BYTES, RNG_KIND, Manifest, read_manifest
from neox.checkpoint.retention import complete, scan
from neox.errors import CheckpointError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `neox checkpoint`."""
    parser.add_argument("action", choices=("inspect", "verify", "hash"), help="what to do")
    parser.add_argument("path", metavar="PATH", help="checkpoint, folder of checkpoints, or folder of a run")
    parser.add_argument("--json", action="store_true", help="print one JSON value instead of text")


def run(args: argparse.Namespace) -> int:
    """Runs the action; returns the exit code. Raises CheckpointError."""
    actions = {"inspect": inspect, "verify": verify_all, "hash": hash_tensors}
    return actions[args.action](Path(args.path), args.json)


def inspect(path: Path, as_json: bool) -> int:
    """Prints what a checkpoint holds, after the list of its neighbours where `path` is a folder of several."""
    chosen = resolve(path)
    about = describe(chosen, read_manifest(chosen))
    if chosen != path:
        about["checkpoints"] = [_summary(one) for one in scan(chosen.parent)]
    if as_json:
        print(json.dumps(about))
        return 0
    for key, value in about.items():
        if key not in ("tensors", "checkpoints"):
            print(f"{key:<14}{value if isinstance(value, (str, int)) else json.dumps(value)}")
    print("tensors")
    for name, kinds in about["tensors"].items():
        print(f"  {name}  " + "  ".join(f"{kind} {one['dtype']}{one['shape']}" for kind, one in kinds.items()))
    for line in about.get("checkpoints", []):
        print(f"{line['name']:<14}generation {line['generation']}  {line['status']}")
    return 0


def describe(path: Path, manifest: Manifest) -> dict[str, Any]:
    """What a manifest says, as plain JSON."""
    tensors: dict[str, dict[str, Any]] = {}
    for (kind, name), info in sorted(manifest.tensors.items(), key=lambda item: (item[0][1], item[0][0])):
        if kind != RNG_KIND:
            tensors.setdefault(name, {})[kind] = {"dtype": info.dtype, "shape": list(info.shape), "bytes": math.prod(info.shape) * ITEM_BYTES[info.dtype]}
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


def _summary(one) -> dict[str, Any]:
    if one.manifest is None:
        status = str(one.problem) if one.started else "unfinished save"
        return {"name": one.path.name, "step": one.step, "generation": None, "status": status}
    status = "complete" if complete(one) else "files missing or of another size"
    return {"name": one.path.name, "step": one.step, "generation": one.manifest.lineage.generation, "status": status}


def verify_all(path: Path, as_json: bool) -> int:
    """Checks every byte of a checkpoint, and the manifests of those beside it where `path` is a folder of several; prints each problem. Returns 0 or 4."""
    chosen = resolve(path)
    found = problems(chosen) + ([one.problem for one in damaged(chosen.parent)] if chosen != path else [])
    if as_json:
        parts = [{key: None if value is None else str(value) for key, value in vars(problem).items()} for problem in found]
        print(json.dumps({"path": str(chosen), "good": not found, "problems": parts}))
    elif found:
        print("\n".join(problem.line() for problem in found), file=sys.stderr)
    else:
        manifest = read_manifest(chosen)
        print(f"good: {chosen}: {len(manifest.files)} shards, {sum(file.size for file in manifest.files)} bytes, {len(manifest.tensors)} tensors")
    return CheckpointError.exit_code if found else 0


def hash_tensors(path: Path, as_json: bool) -> int:
    """Prints the digest of every logical tensor."""
    digests = digest(resolve(path))
    print(json.dumps(digests) if as_json else "\n".join(f"{value}  {key}" for key, value in digests.items()))
    return 0
