"""Reading: any layout into any other, damage refused with file and tensor named, and the choice of where to resume."""

import hashlib
import itertools
import json
import logging
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from neox.checkpoint.load import Checkpoint, digest, find, problems, resolve, verify
from neox.checkpoint.manifest import BLOCK, Lineage
from neox.checkpoint.reshard import slice_shape, whole
from neox.checkpoint.retention import start_lineage
from neox.errors import CheckpointError
from tests.checkpoint.builders import cut_fragments, make_state, save_one, tp_slices


def test_everything_comes_back(tmp_path):
    state = make_state()
    with Checkpoint(save_one(tmp_path, 7, state)) as checkpoint:
        assert checkpoint.step == 7
        assert checkpoint.state == {"step": 7, "consumed": 56}
        assert checkpoint.config_lock == "train: {seed: 1}\n"
        assert checkpoint.model_config == {"num_layers": 1}
        assert checkpoint.names() == sorted({name for name, _ in state})
        assert checkpoint.kinds("layers.0.norm1.bias") == ["count", "exp_avg", "exp_avg_sq", "weight"]
        for (name, kind), value in state.items():
            found = checkpoint.tensor(name, kind)
            assert found.dtype == value.dtype
            assert torch.equal(found, value)
        assert torch.equal(checkpoint.rng(0)["cpu"], torch.arange(33, dtype=torch.uint8))
        with pytest.raises(CheckpointError, match="no generator states"):
            checkpoint.rng(1)


@pytest.mark.parametrize(("tp", "dp", "zero"), [(1, 1, True), (1, 3, True), (2, 1, False), (3, 2, True)])
def test_reads_serve_any_layout(tmp_path, tp, dp, zero):
    state = make_state()
    checkpoint = Checkpoint(save_one(tmp_path, state=state))
    for tp_rank, dp_rank in itertools.product(range(tp), range(dp)):
        for want in cut_fragments(state, tp=tp, tp_rank=tp_rank, dp=dp, dp_rank=dp_rank, zero=zero):
            assert torch.equal(checkpoint.read(want.name, want.kind, want.slices, want.start, want.stop), want.data)


def test_a_read_verifies_the_blocks_it_touches_and_no_other(tmp_path):
    value = torch.arange(BLOCK // 4 * 2 + 10, dtype=torch.float32)
    path = save_one(tmp_path, state={("w", "weight"): value}, rng={})
    (shard,) = path.glob("*.safetensors")
    flip_bit(shard, (os.path.getsize(shard) - 4) * 8)
    checkpoint = Checkpoint(path)
    assert torch.equal(checkpoint.read("w", start=5, stop=1000), value[5:1000])
    with pytest.raises(CheckpointError, match=r"shard is damaged.*shard_.*weight/w.*got=xxh3 [0-9a-f]{16}; want=xxh3 [0-9a-f]{16}"):
        checkpoint.read("w", start=5)


def test_a_read_goes_into_memory_that_is_there(tmp_path):
    state = make_state()
    checkpoint = Checkpoint(save_one(tmp_path, state=state))
    (name, kind), value = max(state.items(), key=lambda item: item[1].numel())
    place = ((1, value.shape[0]), *((0, size) for size in value.shape[1:]))
    want = value[1:].reshape(-1)[2:-1]
    for dtype, step in ((value.dtype, 1), (torch.float64, 1), (value.dtype, 2)):  # the stored dtype; another one; not contiguous
        out = torch.zeros(step * want.numel(), dtype=dtype)[::step]
        checkpoint.read_into(out, name, kind, place, 2, want.numel() + 2)
        assert torch.equal(out, want.to(dtype))
    with pytest.raises(CheckpointError, match="slice outside the tensor"):
        checkpoint.read_into(torch.zeros(4), name, kind, ((0, 10**6),) * value.dim(), 0, 4)


@pytest.mark.parametrize("open_files", [1, 64])
def test_reads_that_wait_for_each_other_at_the_end_alone(tmp_path, monkeypatch, open_files):
    monkeypatch.setattr("neox.checkpoint.load.OPEN_FILES", open_files)
    monkeypatch.setattr("neox.checkpoint.load.READS_AHEAD", 3)
    state = make_state() | {(f"large.{i}", "weight"): torch.arange(i, BLOCK // 4 * 2 + 10 + i, dtype=torch.float32) for i in range(3)}
    path = save_one(tmp_path, state=state, shard_bytes=BLOCK)
    out = {key: torch.zeros_like(value) for key, value in state.items()}

    def read() -> None:
        with Checkpoint(path) as checkpoint, checkpoint.together():
            for (name, kind), value in out.items():
                checkpoint.read_into(value.view(-1), name, kind, whole(tuple(value.shape)), 0, value.numel())

    read()
    assert all(torch.equal(out[key], value) for key, value in state.items())
    shard = max(path.glob("*.safetensors"), key=os.path.getsize)
    flip_bit(shard, (os.path.getsize(shard) - 4) * 8)
    with pytest.raises(CheckpointError, match=r"shard is damaged.*large"):
        read()


def as_version_1(path: Path) -> None:
    """Rewrite a manifest as releases before XXH3 wrote it, blocks of 16 MB under SHA-256."""
    body = json.loads((path / "manifest.json").read_text())["body"]
    body["block"] = 16 << 20
    for file in body["files"]:
        raw = (path / file["name"]).read_bytes()[file["header"] :]
        for entry, following in zip(file["entries"], [*file["entries"][1:], None], strict=True):
            data = raw[entry[5] : following[5] if following else len(raw)]
            entry[6] = [hashlib.sha256(data[begin : begin + (16 << 20)]).hexdigest() for begin in range(0, len(data), 16 << 20)]
    text = json.dumps(body, separators=(",", ":"))
    frame = f'{{"format":"neox-checkpoint","version":1,"sha256":"{hashlib.sha256(text.encode()).hexdigest()}","body":'
    (path / "manifest.json").write_text(f"{frame}{text}}}\n")


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


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr("neox.checkpoint.load.OPEN_FILES", 2)
    state = make_state()
    path = save_one(tmp_path, state=state, shard_bytes=100)
    assert len(list(path.glob("*.safetensors"))) > 4
    open_before = len(os.listdir("/proc/self/fd"))
    with Checkpoint(path) as checkpoint:
        for (name, kind), value in state.items():
            assert torch.equal(checkpoint.tensor(name, kind), value)
            assert len(os.listdir("/proc/self/fd")) <= open_before + 2
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_missing_tensors_and_addresses(tmp_path):
    checkpoint = Checkpoint(save_one(tmp_path))
    with pytest.raises(CheckpointError, match=r"not in the checkpoint.*momentum/scale"):
        checkpoint.read("scale", "momentum")
    with pytest.raises(CheckpointError, match="slice outside the tensor"):
        checkpoint.read("embedding.word.weight", "weight", ((0, 20), (0, 6)))


def test_check_lists_the_differences_weights_first(tmp_path):
    checkpoint = Checkpoint(save_one(tmp_path))
    good = [(name, "weight", checkpoint.info(name).shape) for name in checkpoint.names()]
    checkpoint.check(good)
    changed = [("embedding.word.weight", "weight", (20, 6)), ("extra", "weight", (1,)), *good[1:-1]]
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check(changed)
    line = caught.value.line()
    assert "3 tensors do not fit" in line
    assert "weight/embedding.word.weight: have [19, 6] want [20, 6]" in line
    assert "weight/extra: have nothing want [1]" in line
    assert "weight/scale: have [] want nothing" in line
    several = [(f"a{number}", "exp_avg", (1,)) for number in range(9)]
    with pytest.raises(CheckpointError, match=r"^(?=.*got=weight/extra: ).*exp_avg/a1: have nothing want \[1\], .*and \d+ more; do="):
        checkpoint.check([*good, ("extra", "weight", (1,)), *several])


def flip_bit(path, bit):
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def _load_all(path):
    with Checkpoint(path) as checkpoint:
        for kind, name in checkpoint.manifest.tensors:
            checkpoint.tensor(name, kind)


def test_any_flipped_bit_is_refused_by_load_and_by_verify(tmp_path):
    """One bit in each of 300 places over all files, and every bit of the shard's length field and the manifest's frame."""
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


def test_a_header_that_only_means_the_same_is_damage(tmp_path):
    """Its padding says nothing, and JSON allows a line feed where a space was: the checksum alone tells."""
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
    offset = next(file.header + entry.offset for file, entry in Checkpoint(path).manifest.entries() if entry.name == "scale" and entry.kind == "exp_avg")
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


def test_find_auto_takes_the_newest_good_one(tmp_path, caplog):
    assert find(tmp_path / "nothing", "auto") is None
    old, new = save_one(tmp_path, 99999), save_one(tmp_path, 100000)
    assert find(tmp_path, "auto") == new
    (shard,) = new.glob("*.safetensors")
    flip_bit(shard, 8 * os.path.getsize(shard) - 1)
    with caplog.at_level(logging.WARNING):
        assert find(tmp_path, "auto") == old
    assert "passed over" in caplog.text
    assert shard.name in caplog.text
    with pytest.raises(CheckpointError, match="good by their manifests: step_00099999"):
        find(tmp_path, str(new))


@pytest.mark.parametrize("resume", ["auto", "must"])
@pytest.mark.parametrize("damage", ["no manifest", "garbage manifest", "no shard", "no folder"])
def test_a_lost_checkpoint_never_means_step_0(tmp_path, resume, damage):
    path = save_one(tmp_path)
    if damage == "no manifest":
        (path / "manifest.json").unlink()
    elif damage == "garbage manifest":
        (path / "manifest.json").write_bytes(b"\x00" * 100)
    elif damage == "no shard":
        next(path.glob("*.safetensors")).unlink()
    else:
        shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="step_00000100"):
        find(tmp_path, resume)


@pytest.mark.parametrize("hint", [b"", b"garbage\xff", b"step_00000777\n"])
def test_the_hint_decides_nothing(tmp_path, hint):
    path = save_one(tmp_path)
    (tmp_path / "latest").write_bytes(hint)
    assert find(tmp_path, "auto") == path


def test_find_must_and_never(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint to resume from.*does not exist"):
        find(tmp_path / "nothing", "must")
    assert find(tmp_path, "never") is None
    path = save_one(tmp_path)
    assert find(tmp_path, "must") == path
    with pytest.raises(CheckpointError, match=r"never.*step_00000100"):
        find(tmp_path, "never")


def test_find_explicit_path(tmp_path):
    path = save_one(tmp_path / "run dir é" / "checkpoints", 9)
    newer = save_one(tmp_path / "run dir é" / "checkpoints", 10)
    (tmp_path / "link").symlink_to(tmp_path / "run dir é")
    assert find(tmp_path, str(path) + "/") == path
    assert find(tmp_path, str(newer.parent)) == newer
    assert resolve(newer.parent.parent) == newer
    assert resolve(tmp_path / "link").name == newer.name
    with pytest.raises(CheckpointError, match=r"no checkpoint here.*run dir é"):
        find(tmp_path, str(tmp_path / "wrong" / "path"))


@pytest.mark.parametrize("hint", [True, False])
def test_a_damaged_newest_is_no_older_one(tmp_path, hint):
    """Its manifest does not say its generation: that it is the newest is told by the hint, or by its step."""
    old, new = save_one(tmp_path / "checkpoints", 9), save_one(tmp_path / "checkpoints", 10)
    raw = (new / "manifest.json").read_bytes()
    (new / "manifest.json").write_bytes(raw[: len(raw) // 2])
    if not hint:
        (tmp_path / "checkpoints" / "latest").unlink()
    for path in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(CheckpointError, match=r"not a manifest; where=.*step_00000010.*good by their manifests: step_00000009; name one of them"):
            resolve(path)
        with pytest.raises(CheckpointError, match="not a manifest"):
            find(tmp_path / "other", str(path))
    assert resolve(old) == old


def test_a_damaged_older_one_is_in_nobodys_way(tmp_path):
    old, new = save_one(tmp_path, 9), save_one(tmp_path, 10)
    (old / "manifest.json").write_bytes(b"{")
    assert resolve(tmp_path) == new


def test_newest_is_by_lineage_not_by_step(tmp_path):
    first = Lineage("aa" * 16, 0)
    for step in (10, 20, 30):
        save_one(tmp_path, step, lineage=first)
    second = start_lineage(tmp_path, tmp_path / "step_00000010")
    assert second.generation == 1
    assert second.parent == (first.id, 10)
    path = save_one(tmp_path, 15, lineage=second)
    os.utime(path / "manifest.json", (0, 0))
    assert find(tmp_path, "auto") == path


def test_tp_slices_of_the_builder_cover(tmp_path):
    """The builder's cut is a partition: else the layout tests would prove nothing."""
    parts = [tp_slices((19, 6), 3, rank) for rank in range(3)]
    assert sum(torch.Size(slice_shape(part)).numel() for part in parts) == 19 * 6
