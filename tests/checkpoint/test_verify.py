"""Verification: any damage is refused, with file and tensor named."""

import gc
import hashlib
import itertools
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from neox.checkpoint.find import find
from neox.checkpoint.manifest import BLOCK
from neox.checkpoint.reader import Checkpoint, check_folder
from neox.checkpoint.storage import Storage
from neox.checkpoint.verify import digest, problems, verify
from neox.errors import CheckpointError
from tests.checkpoint.builders import cut_fragments, flip_bit, make_state, save_one


def as_version_1(path: Path) -> None:
    """Rewrite a manifest as releases before XXH3 wrote it, blocks of 16 MB under SHA-256."""
    body = json.loads((path / "manifest.json").read_text())["body"]
    body["block"] = 16 << 20
    for file in body["files"]:
        raw = (path / file["name"]).read_bytes()[file["header"] :]
        for entry, following in zip(file["entries"], [*file["entries"][1:], None], strict=True):
            data = raw[entry[5] : following[5] if following else len(raw)]
            entry[6] = [
                hashlib.sha256(data[begin : begin + (16 << 20)]).hexdigest() for begin in range(0, len(data), 16 << 20)
            ]
    text = json.dumps(body, separators=(",", ":"))
    frame = f'{{"format":"neox-checkpoint","version":1,"sha256":"{hashlib.sha256(text.encode()).hexdigest()}","body":'
    (path / "manifest.json").write_text(f"{frame}{text}}}\n")


def _load_all(path):
    with Checkpoint(path) as checkpoint:
        for kind, name in checkpoint.manifest.tensors:
            checkpoint.tensor(name, kind)


def test_a_checkpoint_of_version_1_is_read_and_checked(tmp_path):
    state = make_state() | {("large", "weight"): torch.arange(BLOCK // 4 * 5, dtype=torch.float32)}
    path = save_one(tmp_path, state=state)
    before = digest(path)
    as_version_1(path)
    assert digest(path) == before
    assert verify(path).num_tensors > 3 and find(tmp_path, "must") == path
    with Checkpoint(path) as checkpoint:
        assert all(torch.equal(checkpoint.tensor(name, kind), value) for (name, kind), value in state.items())
        assert torch.equal(checkpoint.read("large", start=5, stop=BLOCK), state["large", "weight"][5:BLOCK])
    shard = max(path.glob("*.safetensors"), key=os.path.getsize)
    flip_bit(shard, (os.path.getsize(shard) - 4) * 8)
    with pytest.raises(CheckpointError, match=r"shard is damaged.*got=sha256 [0-9a-f]{64}; want=sha256 [0-9a-f]{64}"):
        verify(path)


def test_any_flipped_bit_is_refused_by_load_and_by_verify(tmp_path):
    """One bit at each of 300 positions in all files, and every bit of the shard's length and the manifest's frame."""
    path = save_one(tmp_path)
    generator = random.Random(1)
    for file in sorted(path.iterdir()):
        size = 8 * file.stat().st_size
        for bit in [*range(64), *range(size - 16, size), *(generator.randrange(size) for _ in range(150))]:
            flip_bit(file, bit)
            with pytest.raises(CheckpointError, match=file.name):
                verify(path)
            with pytest.raises(CheckpointError, match=file.name):
                _load_all(path)
            flip_bit(file, bit)
    assert verify(path).num_files == 1


def test_an_equivalent_header_with_other_bytes_is_damage(tmp_path):
    """Its padding is meaningless, and JSON allows a line feed instead of a space: only the checksum detects it."""
    path = save_one(tmp_path)
    (shard,) = path.glob("*.safetensors")
    (file,) = Checkpoint(path).manifest.files
    raw = bytearray(shard.read_bytes())
    assert raw[file.header - 1] == ord(" ")
    raw[file.header - 1] = ord("\n")
    shard.write_bytes(raw)
    with pytest.raises(CheckpointError, match=f"shard is damaged; where=.*{shard.name}: header"):
        verify(path)
    with pytest.raises(CheckpointError, match=f"shard is damaged; where=.*{shard.name}: header"):
        _load_all(path)


def test_damage_names_the_tensor(tmp_path):
    path = save_one(tmp_path)
    (shard,) = path.glob("*.safetensors")
    offset = next(
        file.header + entry.offset
        for file, entry in Checkpoint(path).manifest.segments()
        if entry.name == "scale" and entry.kind == "exp_avg"
    )
    flip_bit(shard, 8 * offset)
    (problem,) = problems(path)
    assert "exp_avg/scale[]0:1" in problem.line()


@pytest.mark.parametrize("damage", ["truncate", "grow", "empty", "delete", "link", "folder", "pipe"])
def test_damaged_files_are_refused(tmp_path, damage):
    path = save_one(tmp_path)
    for file in sorted(path.iterdir()):
        shutil.copytree(path, tmp_path / "spare")
        raw = file.read_bytes()
        file.unlink()
        if damage in ("truncate", "grow", "empty"):
            file.write_bytes({"truncate": raw[:-1], "grow": raw + b"\0", "empty": b""}[damage])
        elif damage == "link":
            file.symlink_to(tmp_path / "spare" / file.name)
        elif damage == "folder":
            file.mkdir()
        elif damage == "pipe":
            os.mkfifo(file)
        with pytest.raises(CheckpointError, match=file.name):
            verify(path)
        with pytest.raises(CheckpointError, match=file.name):
            Checkpoint(path)
        shutil.rmtree(path)
        (tmp_path / "spare").rename(path)
    verify(path)


def test_foreign_file_in_a_checkpoint_is_refused(tmp_path):
    path = save_one(tmp_path)
    (shard,) = path.glob("*.safetensors")
    shutil.copy(shard, path / "copy.safetensors")
    with pytest.raises(CheckpointError, match=r"copy.safetensors: not part of the checkpoint"):
        Checkpoint(path)


def test_digests_do_not_depend_on_the_layout(tmp_path):
    state = make_state()
    one = digest(save_one(tmp_path / "a", state=state))
    fragments = [
        piece
        for tp_rank, dp_rank in itertools.product(range(2), range(3))
        for piece in cut_fragments(state, tp=2, tp_rank=tp_rank, dp=3, dp_rank=dp_rank, zero=True)
    ]
    cut = save_one(tmp_path / "b", fragments=fragments, shard_bytes=64)
    assert len(list(cut.glob("*.safetensors"))) > 10
    assert digest(cut) == one
    state["scale", "weight"] = state["scale", "weight"] + 1
    changed = digest(save_one(tmp_path / "c", state=state))
    assert {key for key in one if one[key] != changed[key]} == {"weight/scale"}


def test_ranks_divide_the_files_and_every_problem_is_counted(tmp_path):
    path = save_one(tmp_path, shard_bytes=500)
    files = Checkpoint(path).manifest.files
    assert len(files) > 2
    report = verify(path)
    assert (report.path, report.step, report.num_files) == (path, 100, len(files))
    assert report.num_bytes == sum(file.stat().st_size for file in path.glob("*.safetensors"))
    for file in files[:2]:
        flip_bit(path / file.name, 8 * file.size - 1)
    found = [[problem.where for problem in problems(path, part=part, parts=2)] for part in (0, 1)]
    assert [len(each) for each in found] == [1, 1]
    assert files[0].name in str(found[0]) and files[1].name in str(found[1])
    with pytest.raises(CheckpointError, match=rf"shard is damaged \(and 1 more problem\); where=.*{files[0].name}"):
        verify(path)


def test_digests_are_of_dtype_shape_and_bytes(tmp_path, monkeypatch):
    value = torch.arange(60, dtype=torch.bfloat16).view(5, 12)
    path = save_one(tmp_path, state={("a", "weight"): value})
    content = b"BF16 [5, 12]\n" + value.view(torch.uint8).numpy().tobytes()
    wanted = {"weight/a": hashlib.sha256(content).hexdigest()}
    assert digest(path) == wanted
    monkeypatch.setattr("neox.checkpoint.verify.DIGEST_BYTES", 14)  # several reads, the last one shorter
    assert digest(path) == wanted


def test_a_report_counts_what_was_verified(tmp_path):
    state = {("a", "weight"): torch.ones(3), ("a", "exp_avg"): torch.ones(3), ("b", "weight"): torch.ones(2)}
    report = verify(save_one(tmp_path, 4, state, rng={"cpu": torch.ones(1), "cuda": torch.ones(2)}))
    assert (report.step, report.num_files, report.num_tensors) == (4, 1, 5)


def test_verification_closes_its_files(tmp_path):
    path = save_one(tmp_path, shard_bytes=100)
    flip_bit(next(path.glob("*.safetensors")), 8 * 70)  # of a header
    gc.collect()  # what other tests left
    before = len(os.listdir("/proc/self/fd"))
    assert len(problems(path)) == 1
    with pytest.raises(CheckpointError):
        digest(path)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_damaged_header_does_not_hide_damage_in_other_files(tmp_path):
    path = save_one(tmp_path, shard_bytes=100)
    first, *_, last = Checkpoint(path).manifest.files
    flip_bit(path / first.name, 8 * 70)
    flip_bit(path / last.name, 8 * last.size - 1)
    assert [str(problem.where).split(":")[0] for problem in problems(path)] == [
        f"{path}/{first.name}",
        f"{path}/{last.name}",
    ]
    with pytest.raises(CheckpointError, match=r"and 1 more problem\)"):
        verify(path)


def test_every_rank_reports_a_manifest_that_it_cannot_use(tmp_path):
    path = save_one(tmp_path, shard_bytes=500)
    next(path.glob("*.safetensors")).unlink()
    for part in range(3):
        (problem,) = problems(path, part=part, parts=3)
        assert "checkpoint is damaged" in problem.line()


def test_a_digest_names_each_tensor_by_kind_and_name_in_order(tmp_path):
    state = {("b", "weight"): torch.ones(2), ("a", "weight"): torch.ones(2), ("b", "exp_avg"): torch.zeros(0)}
    found = digest(save_one(tmp_path, state=state))
    assert list(found) == ["exp_avg/b", "weight/a", "weight/b"]
    assert found["weight/a"] == found["weight/b"]
    assert found["exp_avg/b"] == hashlib.sha256(b"F32 [0]\n").hexdigest()


class Opened(Storage):
    """Notes the files that are opened for reading."""

    def __init__(self):
        self.names = []

    def open_read(self, path):
        self.names.append(path.name)
        return super().open_read(path)


@pytest.mark.parametrize("read", [verify, problems, Checkpoint])
def test_every_file_is_opened_by_the_storage_that_is_given(tmp_path, read):
    path = save_one(tmp_path, shard_bytes=500)
    shards = {file.name for file in path.glob("*.safetensors")}
    storage = Opened()
    found = read(path, storage=storage)
    if read is Checkpoint:
        assert storage.names == ["manifest.json"]
        for name in found.names():
            for kind in found.kinds(name):
                found.tensor(name, kind)
        shards -= {file.name for file, one in found.manifest.segments() if one.kind == "rng"}
    assert shards <= set(storage.names) and "manifest.json" in storage.names


def test_a_folder_that_vanished_is_an_error_of_the_checkpoint(tmp_path):
    manifest = Checkpoint(save_one(tmp_path)).manifest
    with pytest.raises(CheckpointError, match="file is missing; where=.*/gone"):
        check_folder(tmp_path / "gone", manifest)
