"""Manifests with a right checksum and a wrong state: refused with checkpoint and field.

What would be refused is never written.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import sys
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


WRONG += [
    (f"loss_scale.{key}", value)
    for key, value in (
        ("cur_scale", -1.0),
        ("cur_scale", math.inf),
        ("cur_iter", -1),
        ("last_overflow_iter", "x"),
        ("cur_hysteresis", 1.5),
    )
]
WRONG += [(f"pending.{key}", "x") for key in ("loss", "lr", "grad_norm", "step_time", "tokens", "samples")]
WRONG += [(f"pending.{key}", None) for key in ("lr", "step_time")]
WRONG += [("guard.losses", [value]) for value in (math.inf, -math.inf, math.nan, True, None)]
WRONG += [("step", 99), ("step", 10**15), ("updates", 10**15)]


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


SOURCES = {
    "path": (3, None),
    "weight": ("x", math.nan, None),
    "files": ([], {"tokens": []}, {"tokens": ["a", "b", 3]}, {"tokens": ["a", "b", 3, -1]}, {"tokens": ["a", 1, 3, 4]}),
    "span": (3, [0], [0, 1, 2], [0, -1], [0, None]),
    "epochs": (0, 1.5, -1, "x"),
    "samples": (0, True, 2**53),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, wrong in SOURCES.items() for value in wrong])
def test_a_wrong_field_of_a_source_is_named(key, value):
    state = copy.deepcopy(STATE)
    state["data"]["sources"][1][key] = value
    with pytest.raises(CheckpointError, match="the checkpoint's state is malformed") as problem:
        check_state(state, 100)
    assert problem.value.where.startswith(f"body.state.data.sources[1].{key}")


@pytest.mark.parametrize("key", SOURCES)
def test_a_missing_field_of_a_source_is_named(key):
    state = copy.deepcopy(STATE)
    del state["data"]["sources"][1][key]
    with pytest.raises(CheckpointError, match=f"where=body.state.data.sources\\[1\\].{key}; .*the key is missing"):
        check_state(state, 100)


STRETCHES = {
    "fewer weights than sources": [40, [1.0], [20, 20]],
    "fewer counts than sources": [40, [1.0, 1.0], [20]],
    "more weights than sources": [40, [1.0, 1.0, 1.0], [20, 20]],
    "negative weight": [40, [3.0, -1.0], [20, 20]],
    "no weight": [40, [0.0, 0.0], [20, 20]],
    "weights beyond a double": [40, [sys.float_info.max, sys.float_info.max], [20, 20]],
    "not a count": [40, [1.0, 1.0], [20, 0.5]],
    "not a first sample": [-1, [1.0, 1.0], [20, 20]],
}


@pytest.mark.parametrize("name", STRETCHES)
def test_a_wrong_stretch_is_named_by_its_number(name):
    state = changed(STATE, "data.stretches", [STATE["data"]["stretches"][0], STRETCHES[name]])
    with pytest.raises(CheckpointError) as problem:
        check_state(state, 100)
    assert problem.value.where.startswith("body.state.data.stretches[1]")


@pytest.mark.parametrize("firsts", [(0, 801), (40, 40), (40, 0), (5, 4)])
def test_stretches_ascend_up_to_what_was_consumed(firsts):
    stretches = [[first, [1.0, 1.0], [0, 0]] for first in firsts]
    with pytest.raises(
        CheckpointError, match=r"data.stretches; got=\[.*want=ascending numbers of samples, at most 800"
    ):
        check_state(changed(STATE, "data.stretches", stretches), 100)


def test_files_without_tokens_are_those_of_another_source():
    state = copy.deepcopy(STATE)
    state["data"]["sources"][1]["files"] = {"mask": ["a", "b", 1, 2]}
    with pytest.raises(CheckpointError, match=r"where=body.state.data.sources\[1\].files; .*tokens among them"):
        check_state(state, 100)


VALID = [
    ("step", 100),
    ("updates", 0),
    ("updates", 10**15 - 1),
    ("tokens", 2**53 - 1),
    ("pending", None),
    ("pending.loss", 2),
    ("guard", {}),
    ("guard.losses", []),
    ("guard.losses", [sys.float_info.max, -sys.float_info.max, 0]),
    ("loss_scale.cur_scale", 2.0**-20),
    ("loss_scale.last_overflow_iter", -1),
    ("data.stretches", [[0, [1.0, 0.0], [0, 0]], [800, [0.0, 1e-300], [500, 300]]]),
    ("data.sources", [{**SOURCE, "files": {}, "span": None, "epochs": 1, "samples": None, "weight": -0.5}] * 2),
    ("data.settings", {"data.seq_length": 1}),
]


@pytest.mark.parametrize(("key", "value"), VALID, ids=str)
def test_the_smallest_and_largest_values_pass(key, value):
    check_state(changed(STATE, key, value), 100)


def test_weights_alone_need_no_counters_and_what_they_have_is_checked():
    for state in ({}, {"consumed": 3}, {"data": STATE["data"], "consumed": 800}):
        check_state(state, 100)
    for state, where in (
        ({"consumed": -1}, "body.state.consumed"),
        ({"step": 99}, "body.state.step"),
        ({"data": STATE["data"]}, "body.state.data.stretches"),  # nothing consumed, and a stretch from sample 40 on
        ([], "body.state"),
    ):
        with pytest.raises(CheckpointError) as problem:
            check_state(state, 100)
        assert problem.value.where == where


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
    """A disk that damages something when the manifest gets its final name."""

    def __init__(self, damage):
        self.damage = damage

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        if target.name == "manifest.json":
            self.damage(target, max(target.parent.glob("shard_*")))


DAMAGE = {
    "shard_": lambda manifest, shard: os.truncate(shard, shard.stat().st_size - 1),
    "No such file": lambda manifest, shard: shard.unlink(),
    "another manifest": lambda manifest, shard: manifest.write_bytes(manifest.read_bytes().replace(b"101", b"102")),
    "file is missing": lambda manifest, shard: manifest.unlink(),
}


@pytest.mark.parametrize("got", DAMAGE)
def test_a_failed_read_back_removes_no_checkpoint(tmp_path, got):
    save_one(tmp_path, content=STATE)
    with pytest.raises(DiskError, match=f"the checkpoint reads back differently from what was written; .*got=.*{got}"):
        save_one(
            tmp_path, step=101, keep=1, content={**STATE, "step": 101, "pending": None}, storage=Forgetful(DAMAGE[got])
        )
    assert Checkpoint(tmp_path / "step_00000100").step == 100
    assert (tmp_path / "latest").read_text().strip() == "step_00000100"
