"""Manifests with a right checksum and a wrong state: refused with checkpoint and field.

What would be refused is never written.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path

import pytest

from neox.checkpoint.manifest import Lineage, read_manifest
from neox.checkpoint.reader import Checkpoint
from neox.checkpoint.state import check_state
from neox.checkpoint.storage import Storage
from neox.errors import CheckpointError, DiskError
from tests.checkpoint.builders import save_one

SOURCE = {
    "path": "a",
    "weight": 1.0,
    "files": {"tokens": ["ab", "blocks-cd", 3, 40]},
    "span": [0, 3],
    "epochs": None,
    "samples": 5,
}
STATE = {
    "step": 100,
    "updates": 99,
    "optimizer": "adamw",
    "guard": {"losses": [1.5, 2], "skipped": 0},
    "loss_scale": {"cur_scale": 65536.0, "cur_iter": 100, "last_overflow_iter": -1, "cur_hysteresis": 1},
    "consumed": 800,
    "tokens": 6400,
    "pending": {"step": 100, "loss": None, "lr": 0.1, "grad_norm": None, "tokens": 1, "samples": 800, "step_time": 0.5},
    "data": {
        "settings": {"data.seq_length": 8, "train.seed": 1},
        "sources": [SOURCE, {**SOURCE, "path": "b"}],
        "stretches": [[0, [1.0, 1.0], [0, 0]], [40, [3.0, 1.0], [20, 20]]],
    },
}
WRONG_COUNTS = (-1, 1.5, "abc", 2**70, 2**53, True, None, [], {})
WRONG = [(key, value) for key in ("step", "updates", "consumed", "tokens") for value in WRONG_COUNTS]
WRONG += [
    ("pending", value)
    for value in (1, [], {}, "x", {**STATE["pending"], "step": 7}, {**STATE["pending"], "lr": "x"}, {"step": 100})
]
WRONG += [
    ("guard.losses", [1.0, "x"]),
    ("guard.losses", 3),
    ("guard.losses", [10**400]),
    ("guard.skipped", -1),
    ("guard", []),
]
WRONG += [("loss_scale", {}), ("loss_scale.cur_scale", 0), ("loss_scale.cur_scale", "x"), ("optimizer", 3)]
WRONG += [("data", value) for value in (None, 3, {}, [])]
WRONG += [
    ("data.settings", {}),
    ("data.settings", {"data.seq_length": 0}),
    ("data.sources", []),
    ("data.sources", [{}]),
    ("data.sources", [SOURCE]),
]
WRONG += [
    ("data.stretches", value)
    for value in ([], [[0]], [[0, [1.0], [0]]], [[0, [1.0, -1.0], [0, 0]]], [[0, [0.0, 0.0], [0, 0]]])
]
WRONG += [
    ("data.stretches", value)
    for value in (
        [[5, [1.0, 1.0], [0, -1]]],
        [[801, [1.0, 1.0], [0, 0]]],
        [[5, [1.0, 1.0], [0, 0]], [5, [1.0, 1.0], [0, 0]]],
    )
]


def changed(state: dict, key: str, value: object) -> dict:
    out = copy.deepcopy(state)
    *path, last = key.split(".")
    place = out
    for part in path:
        place = place[part]
    place[last] = value
    return out


def rewritten(checkpoint: Path, change) -> None:
    """Change the body of a manifest, and give it the right checksum."""
    frame, _, body = (checkpoint / "manifest.json").read_bytes().partition(b',"body":')
    value = json.loads(body[:-2])
    change(value)
    text = json.dumps(value).encode()
    digest = hashlib.sha256(text).hexdigest().encode()
    (checkpoint / "manifest.json").write_bytes(
        frame[: frame.index(b'"sha256":"')] + b'"sha256":"' + digest + b'","body":' + text + b"}\n"
    )


def test_a_valid_state_passes():
    check_state(STATE, 100)
    check_state({"step": 100, "weights_only": True}, 100)
    check_state({**STATE, "of a later version": {"x": 1}}, 100)


@pytest.mark.parametrize(("key", "value"), WRONG, ids=str)
def test_a_wrong_field_is_named(key, value):
    with pytest.raises(CheckpointError, match="the checkpoint's state is malformed") as problem:
        check_state(changed(STATE, key, value), 100)
    assert problem.value.where.startswith(
        f"body.state.{key}".removesuffix(".sources").removesuffix(".stretches").removesuffix(".settings")
    )


@pytest.mark.parametrize("key", ["step", "updates", "consumed", "tokens"])
def test_a_missing_field_is_named(key):
    state = copy.deepcopy(STATE)
    del state[key]
    with pytest.raises(CheckpointError, match=f"where=body.state.{key}; .*missing"):
        check_state(state, 100)


BODIES = {
    "world_size": lambda body: body.update(world_size=0),
    "generation": lambda body: body["lineage"].update(generation=2**62 - 1),
    "ancestors": lambda body: body["lineage"].update(ancestors=[["a", 2**60]]),
    "layout.tp": lambda body: body.update(layout={"tp": "2"}),
    "layout.dp": lambda body: body.update(layout={"dp": -1}),
    "state.consumed": lambda body: body["state"].update(consumed=-1),
    "state.tokens": lambda body: body["state"].update(tokens=-5),
    "state": lambda body: body.update(state=[]),
    "step": lambda body: body.update(step=2**61),
}


@pytest.mark.parametrize("field", BODIES)
def test_opening_names_checkpoint_and_field(tmp_path, field):
    path = save_one(tmp_path, content=STATE)
    rewritten(path, BODIES[field])
    with pytest.raises(CheckpointError, match=rf"error\[4\] .*where=.*step_00000100/manifest.json body\..*{field}"):
        Checkpoint(path)


def test_an_unreadable_checkpoint_is_never_published(tmp_path):
    good = save_one(tmp_path, content=STATE)
    for bad in ({"content": {**STATE, "consumed": -1}}, {"lineage": Lineage("cd" * 16, 2**62 - 2)}):
        with pytest.raises(CheckpointError):
            save_one(tmp_path, **{"content": STATE, **bad})
        assert read_manifest(good).state == STATE  # neither replaced nor retired
        with pytest.raises(CheckpointError):
            save_one(tmp_path, step=101, keep=1, **{"content": {**STATE, "step": 101, "pending": None}, **bad})
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step_00000100"]


class Forgetful(Storage):
    """A disk that loses the end of a shard when the manifest gets its final name."""

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        if target.name == "manifest.json":
            shard = max(target.parent.glob("shard_*"))
            os.truncate(shard, shard.stat().st_size - 1)


def test_a_failed_read_back_removes_no_checkpoint(tmp_path):
    save_one(tmp_path, content=STATE)
    with pytest.raises(DiskError, match="the checkpoint reads back differently from what was written"):
        save_one(tmp_path, step=101, keep=1, content={**STATE, "step": 101, "pending": None}, storage=Forgetful())
    assert Checkpoint(tmp_path / "step_00000100").step == 100
    assert (tmp_path / "latest").read_text().strip() == "step_00000100"
