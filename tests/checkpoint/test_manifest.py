"""The manifest: survives a round trip, and nothing hostile or contradictory in it is believed."""

import dataclasses
import hashlib
import json
import pickle

import pytest

from neox.checkpoint.manifest import MANIFEST, Lineage, decode, encode, parse_json, read_manifest, to_plain_json
from neox.checkpoint.reader import Checkpoint
from neox.errors import CheckpointError
from tests.checkpoint.builders import save_one


def sign(body: object) -> bytes:
    """A manifest with this body and the right checksum."""
    raw = json.dumps(body, separators=(",", ":")).encode()
    return (
        b'{"format":"neox-checkpoint","version":2,"sha256":"'
        + hashlib.sha256(raw).hexdigest().encode()
        + b'","body":'
        + raw
        + b"}\n"
    )


@pytest.fixture
def body(tmp_path):
    """The body of a good manifest, to be damaged."""
    return json.loads((save_one(tmp_path) / MANIFEST).read_text())["body"]


def test_round_trip(tmp_path):
    manifest = read_manifest(save_one(tmp_path, lineage=Lineage("cd" * 16, 3, (("ef" * 16, 50), ("01" * 16, 7)))))
    assert decode(encode(manifest)) == manifest
    assert json.loads(encode(manifest))["body"]["step"] == 100
    changed = dataclasses.replace(manifest, state={"a": [1, {"b": None}], "c": 0.1, "d": "é", "e": True})
    assert decode(encode(changed)).state == changed.state


def test_the_signed_body_is_accepted(body):
    assert decode(sign(body)).step == 100


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, object(), b"x", {"a": {"b": {3}}}])
def test_state_that_json_would_change_is_refused(tmp_path, value):
    with pytest.raises(CheckpointError, match=r"state\.x"):
        save_one(tmp_path, content={"x": value})
    assert not (tmp_path / "step_00000100").exists()


def test_tuples_become_lists():
    assert to_plain_json({"a": (1, (2, 3))}, "state") == {"a": [1, [2, 3]]}


def _set(path, value):
    def change(body):
        for key in path[:-1]:
            body = body[key]
        body[path[-1]] = value

    return change


def _entry(index, value):
    return _set(("files", 0, "entries", 0, index), value)


HOSTILE = {
    "path in a file name": (_set(("files", 0, "name"), "../../etc/passwd"), "shard_<save>"),
    "absolute file name": (_set(("files", 0, "name"), "/etc/passwd"), "shard_<save>"),
    "negative size": (_set(("files", 0, "size"), -1), "integer"),
    "size as text": (_set(("files", 0, "size"), "12"), "integer"),
    "huge number": (_set(("files", 0, "size"), 1 << 70), "integer"),
    "bool for a number": (_set(("step",), True), "integer"),
    "no step": (lambda body: body.pop("step"), "'step'"),
    "list for a body part": (_set(("state",), [1]), "an object"),
    "unknown dtype": (_set(("tensors", 0, 2), "Q8"), "one of"),
    "huge shape": (_set(("tensors", 0, 3), [1 << 61]), "slice outside the tensor|not covered"),
    "many dimensions": (_set(("tensors", 0, 3), [1] * 10_000), "at most 32 dimensions"),
    "unknown tensor": (_entry(1, "nobody"), "a tensor of the table"),
    "range outside": (_entry(4, 10_000), "not contiguous"),
    "slice outside": (_entry(2, [[0, 1 << 40]]), "outside"),
    "moved segment": (_entry(5, 4), "not contiguous"),
    "no checksum": (_entry(6, []), "one checksum"),
    "checksum not hexadecimal": (_entry(6, ["z" * 64]), "hex digits of xxh3"),
    "header too long": (_set(("files", 0, "header"), 10_000_000), "does not match its segments"),
    "block of zero bytes": (_set(("block",), 0), "bytes per checksum"),
    "file twice": (lambda body: body["files"].append(body["files"][0]), "listed twice|overlap"),
    "file missing": (_set(("files",), []), "not covered exactly once"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_signed_but_hostile_manifest_is_refused(body, name):
    change, match = HOSTILE[name]
    change(body)
    with pytest.raises(CheckpointError, match=match):
        decode(sign(body))


@pytest.mark.parametrize("raw", [b"", b"{}", b"null", b"\x00" * 64, b"[" * 200_000, pickle.dumps({"step": 1})])
def test_garbage_is_refused(tmp_path, raw):
    path = save_one(tmp_path)
    (path / MANIFEST).write_bytes(raw)
    with pytest.raises(CheckpointError, match="not a manifest"):
        read_manifest(path)


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_is_not_executed(tmp_path):
    path = save_one(tmp_path)
    evil = pickle.dumps(Canary(str(tmp_path / "canary")))
    for file in path.iterdir():
        raw = file.read_bytes()
        file.write_bytes(evil)
        with pytest.raises(CheckpointError):
            Checkpoint(path)
        file.write_bytes(raw)
    assert not (tmp_path / "canary").exists()


def test_another_version_is_named(body):
    with pytest.raises(CheckpointError, match=r"unknown checkpoint version.*got=3; want=at most 2"):
        decode(sign(body).replace(b'"version":2', b'"version":3'))
    with pytest.raises(CheckpointError, match="want=hex digits of sha256"):
        decode(sign(body).replace(b'"version":2', b'"version":1'))


@pytest.mark.parametrize("raw", [b'{"a":1,"a":2}', b'{"a":NaN}', b"[" * 100_000, b"9" * 5000, b"\xff", b"{"])
def test_untrusted_json_is_refused(raw):
    with pytest.raises(CheckpointError, match="not valid JSON"):
        parse_json(raw)
