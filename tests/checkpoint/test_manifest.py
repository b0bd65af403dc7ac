"""The manifest: survives a round trip, and nothing hostile or contradictory in it is believed."""

import dataclasses
import hashlib
import itertools
import json
import math
import pickle

import pytest

from neox.checkpoint.manifest import (
    MANIFEST,
    Lineage,
    TensorInfo,
    check_segments,
    decode,
    encode,
    parse_json,
    read_manifest,
    segment_key,
    shard_name,
    stored_shape,
    to_plain_json,
)
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


def test_what_json_would_change_is_named_by_its_path():
    good = {"a": [1, -2.5, "é", None, True, {"b": []}]}
    assert to_plain_json(good, "x") == good
    for value, path in (({"a": [1, {"b": math.inf}]}, "x.a[1].b"), ({"a": {1: 2}}, "x.a"), ([[], [b""]], "x[1][0]")):
        with pytest.raises(CheckpointError) as caught:
            to_plain_json(value, "x")
        assert caught.value.where == path


def test_a_lineage_includes_what_it_was_resumed_from_and_nothing_after():
    lineage = Lineage("c", 2, (("b", 20), ("a", 10)))
    assert lineage.parent == ("b", 20) and Lineage("c", 2).parent is None
    cases = [("c", 0), ("c", 99), ("b", 20), ("b", 19), ("a", 10), ("b", 21), ("a", 11), ("d", 1)]
    included = [lineage.includes(Lineage(name, 0), step) for name, step in cases]
    assert included == [True] * 5 + [False] * 3
    assert not Lineage("a", 0).includes(lineage, 1), "its descendants are not its ancestors"


def test_names_of_files_and_segments():
    assert shard_name("ab" * 8, 7, 3) == "shard_abababababababab_00007_0003.safetensors"
    assert shard_name("ab" * 8, 123456, 12345).endswith("_123456_12345.safetensors")
    assert segment_key("weight", "a.b", ((0, 2), (4, 6)), 1, 3) == "weight/a.b[0:2,4:6]1:3"
    assert segment_key("rng", "0/cpu", (), 0, 1) == "rng/0/cpu[]0:1"
    box = ((0, 2), (4, 7))
    assert [stored_shape(box, *part) for part in ((0, 6), (0, 5), (1, 6))] == [(2, 3), (5,), (5,)]


@pytest.mark.parametrize("count", [1, 2, 50, 51])
def test_tensors_with_holes_are_all_counted_and_fifty_are_listed(count):
    table = {("weight", f"w{number:02d}"): TensorInfo("F32", (4,)) for number in range(count)}
    with pytest.raises(CheckpointError) as caught:
        check_segments(table, {key: [(((0, 4),), 0, 3)] for key in table})
    line = caught.value.line()
    assert line.count("have 3 elements, want 4 elements") == (0 if count == 1 else min(count, 50))
    assert (f"{count} tensors are not covered exactly once" in line) == (count > 1)
    assert (" more" in line) == (count == 51)
    assert "weight/w00" in line and ("weight/w49" in line) == (count >= 50)


def test_a_block_may_be_as_large_as_a_segment(body):
    entries = [entry for file in body["files"] for entry in file["entries"]]
    sizes = [b - a for a, b in itertools.pairwise([entry[5] for entry in entries] + [_data(body)])]
    body["block"] = max(sizes)
    assert decode(sign(body)).block == max(sizes)
    body["block"] = max(sizes) - 1
    with pytest.raises(CheckpointError, match="one checksum per"):
        decode(sign(body))


def test_the_largest_numbers(body):
    """Steps, starts and processes have a limit each; 32 dimensions are allowed."""
    body["state"] = {}
    body["tensors"].append(["weight", "x", "F32", [0] + [1] * 31])
    limits = {
        ("step",): 10**15,
        ("lineage", "generation"): 1 << 40,
        ("world_size",): 1 << 24,
        ("layout", "tp"): 1 << 24,
    }
    for path, limit in limits.items():
        changed = json.loads(json.dumps(body))
        _set(path, limit - 1)(changed)
        decode(sign(changed))
        _set(path, limit)(changed)
        with pytest.raises(CheckpointError, match=f"{'.'.join(path)}; .*to {limit - 1}"):
            decode(sign(changed))


def _set(path, value):
    def change(body):
        for key in path[:-1]:
            body = body[key]
        body[path[-1]] = value

    return change


def _entry(index, value):
    return _set(("files", 0, "entries", 0, index), value)


def _data(body):
    file = body["files"][0]
    return file["size"] - file["header"]


def _append_empty(body):
    kind, name, box, *_ = body["files"][0]["entries"][-1]
    body["files"][0]["entries"].append([kind, name, box, 0, 0, _data(body), []])


HOSTILE = {
    "path in a file name": (_set(("files", 0, "name"), "../../etc/passwd"), "shard_<save>"),
    "absolute file name": (_set(("files", 0, "name"), "/etc/passwd"), "shard_<save>"),
    "negative size": (_set(("files", 0, "size"), -1), "integer"),
    "size as text": (_set(("files", 0, "size"), "12"), "integer"),
    "huge number": (_set(("files", 0, "size"), 1 << 70), "integer"),
    "header too short": (lambda body: body["files"][0].update(header=7, size=_data(body) + 7), "does not match"),
    "file too large": (lambda body: body["files"][0].update(size=body["files"][0]["size"] + 1), "does not match"),
    "header's checksum not hexadecimal": (_set(("files", 0, "header_sha256"), "A" * 64), "64 hex digits"),
    "empty segment": (_append_empty, "a range that is not empty"),
    "reversed segment": (lambda body: body["files"][0]["entries"][0].__setitem__(slice(3, 5), [9, 3]), "not empty"),
    "two checksums for one block": (
        lambda body: body["files"][0]["entries"][0][6].append("0" * 16),
        "one checksum per 4194304 bytes",
    ),
    "33 dimensions": (_set(("tensors", 0, 3), [1] * 33), "at most 32 dimensions"),
    "negative dimension": (_set(("tensors", 0, 3), [-1]), "integer"),
    "half an entry": (lambda body: body["files"][0]["entries"][0].pop(), "a list of 7"),
    "name as a number": (_set(("tensors", 0, 1), 3), "a string"),
    "config as a list": (_set(("config",), []), "a string"),
    "tensors as an object": (_set(("tensors",), {}), "a list"),
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
    with pytest.raises(CheckpointError, match="unknown checkpoint version.*got=0;"):
        decode(sign(body).replace(b'"version":2', b'"version":0'))
    with pytest.raises(CheckpointError, match="want=hex digits of sha256"):
        decode(sign(body).replace(b'"version":2', b'"version":1'))


@pytest.mark.parametrize(
    ("old", "new"), [(b"neox-checkpoint", b"other-format"), (b"}\n", b"}"), (b"}\n", b"}\n\n"), (b'{"f', b' {"f')]
)
def test_another_frame_is_not_a_manifest(body, old, new):
    with pytest.raises(CheckpointError, match=r"not a manifest; where=here; got=\d+ bytes: .*neox-checkpoint"):
        decode(sign(body).replace(old, new), "here")


def test_a_changed_body_is_damage(body):
    raw = sign(body)
    with pytest.raises(CheckpointError, match=r"manifest is damaged; where=here; got=sha256 [0-9a-f]{64}; want=sha256"):
        decode(raw.replace(b'"step":100', b'"step":101', 1), "here")


@pytest.mark.parametrize("raw", [b'{"a":1,"a":2}', b'{"a":NaN}', b"[" * 100_000, b"9" * 5000, b"\xff", b"{"])
def test_untrusted_json_is_refused(raw):
    with pytest.raises(CheckpointError, match="not valid JSON"):
        parse_json(raw)


def test_the_key_that_occurs_twice_is_named():
    with pytest.raises(CheckpointError, match="duplicate key 'b'"):
        parse_json(b'{"a":1,"b":2,"c":3,"b":4,"c":5}')
    assert parse_json(b'{"a":{"b":1},"b":2}') == {"a": {"b": 1}, "b": 2}
