"""Checks that all processes of a run have the same config, data and versions, before anything is computed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

import neox
from neox.checkpoint.consensus import RankGroup
from neox.config.schema import Config
from neox.config.values import flatten
from neox.errors import ConfigError

EDGE = 1 << 16  # bytes at either end of a file that are hashed
SHOWN = 5  # differing keys that an error names


def fingerprint(path: Path) -> str:
    """A cheap identity of a file's content: its size, and a digest of its first and last 64 KiB."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(EDGE))
            file.seek(max(size - EDGE, 0))
            digest.update(file.read(EDGE))
    except OSError as error:
        return f"unreadable: {error.strerror}"
    return f"{size} bytes, {digest.hexdigest()[:16]}"


def fingerprint_run(config: Config) -> dict[str, str]:
    """Everything that must be identical on every process, as text by name."""
    known = {key: json.dumps(value, default=str) for key, value in flatten(config)}
    data = config.data
    sources = [source for part in (data.train, data.validation, data.test) for source in part]
    named = [
        data.path,
        *(
            prefix
            for source in sources
            for prefix in (source.path, source.labels, source.rejected, source.rejected_labels)
        ),
    ]
    prefixes = [prefix for prefix in named if prefix is not None]
    known |= {
        f"{prefix}{suffix}": fingerprint(Path(prefix + suffix)) for prefix in prefixes for suffix in (".idx", ".bin")
    }
    known |= {path: fingerprint(Path(path)) for path in data.text}
    if config.tokenizer.file is not None:
        known[config.tokenizer.file] = fingerprint(Path(config.tokenizer.file))
    return known | {"version of neox": neox.__version__, "version of torch": torch.__version__}


def check_consistency(known: Mapping[str, str], peers: RankGroup) -> None:
    """Compare with the other processes. All processes call it. Only a digest is exchanged unless digests differ.

    Raises:
        ConfigError: on every process, with the keys that differ, their values and ranks.
    """
    digest = hashlib.sha256(json.dumps(dict(known), sort_keys=True).encode()).hexdigest()
    digests = peers.all_gather_json(digest)
    if len(set(digests)) == 1:
        return
    everyone = peers.all_gather_json(dict(known))
    keys = [
        key for key in sorted({key for one in everyone for key in one}) if len({one.get(key) for one in everyone}) > 1
    ]
    lines = []
    for key in keys[:SHOWN]:
        other = next(rank for rank, one in enumerate(everyone) if one.get(key) != everyone[0].get(key))
        lines.append(f"{key}: {everyone[0].get(key)} on rank 0, {everyone[other].get(key)} on rank {other}")
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    raise ConfigError(
        "config, data or versions differ between processes",
        where=", ".join(keys[:SHOWN]) + more,
        got="; ".join(lines).replace(";", ","),
        want="the same config, data and versions everywhere",
        do="start every host with the same files",
    )
