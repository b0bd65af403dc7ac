"""Reading: any layout into any other, and only the blocks that are needed."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from neox.checkpoint.manifest import BLOCK, MANIFEST, Manifest, TensorInfo, encode, shard_name
from neox.checkpoint.reader import Checkpoint, differences
from neox.checkpoint.reshard import full_slices, slice_shape
from neox.checkpoint.save import rng_fragment
from neox.checkpoint.shard import write_shard
from neox.errors import CheckpointError
from tests.checkpoint.builders import LINEAGE, cut_fragments, flip_bit, make_state, save_one, tp_slices


def test_everything_saved_is_read(tmp_path):
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
    with pytest.raises(
        CheckpointError, match=r"shard is damaged.*shard_.*weight/w.*got=xxh3 [0-9a-f]{16}; want=xxh3 [0-9a-f]{16}"
    ):
        checkpoint.read("w", start=5)


def test_a_read_fills_an_existing_tensor(tmp_path):
    state = make_state()
    checkpoint = Checkpoint(save_one(tmp_path, state=state))
    (name, kind), value = max(state.items(), key=lambda item: item[1].numel())
    place = ((1, value.shape[0]), *((0, size) for size in value.shape[1:]))
    want = value[1:].reshape(-1)[2:-1]
    # the stored dtype; another one; not contiguous
    for dtype, step in ((value.dtype, 1), (torch.float64, 1), (value.dtype, 2)):
        out = torch.zeros(step * want.numel(), dtype=dtype)[::step]
        checkpoint.read_into(out, name, kind, place, 2, want.numel() + 2)
        assert torch.equal(out, want.to(dtype))
    with pytest.raises(CheckpointError, match="slice outside the tensor"):
        checkpoint.read_into(torch.zeros(4), name, kind, ((0, 10**6),) * value.dim(), 0, 4)


@pytest.mark.parametrize("open_files", [1, 64])
def test_async_reads_are_complete_at_the_end(tmp_path, monkeypatch, open_files):
    monkeypatch.setattr("neox.checkpoint.reader.OPEN_FILES", open_files)
    monkeypatch.setattr("neox.checkpoint.reader.READS_AHEAD", 3)
    state = make_state() | {
        (f"large.{i}", "weight"): torch.arange(i, BLOCK // 4 * 2 + 10 + i, dtype=torch.float32) for i in range(3)
    }
    path = save_one(tmp_path, state=state, shard_bytes=BLOCK)
    out = {key: torch.zeros_like(value) for key, value in state.items()}

    def read() -> None:
        with Checkpoint(path) as checkpoint, checkpoint.async_reads():
            for (name, kind), value in out.items():
                checkpoint.read_into(value.view(-1), name, kind, full_slices(tuple(value.shape)), 0, value.numel())

    read()
    assert all(torch.equal(out[key], value) for key, value in state.items())
    shard = max(path.glob("*.safetensors"), key=os.path.getsize)
    flip_bit(shard, (os.path.getsize(shard) - 4) * 8)
    with pytest.raises(CheckpointError, match=r"shard is damaged.*large"):
        read()


def test_what_read_returns_is_complete_among_async_reads_too(tmp_path, monkeypatch):
    state = make_state()
    with Checkpoint(save_one(tmp_path, state=state)) as checkpoint, checkpoint.async_reads():
        monkeypatch.setattr(checkpoint._reads._threads, "submit", lambda read: pytest.fail("left for later"))
        for (name, kind), value in state.items():
            assert torch.equal(checkpoint.read(name, kind), value.view(-1))


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr("neox.checkpoint.reader.OPEN_FILES", 2)
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
    assert "tensors do not fit the model" in line and "got=3 tensors: " in line
    assert "weight/embedding.word.weight: have [19, 6] want [20, 6]" in line
    assert "weight/extra: have nothing want [1]" in line
    assert "weight/scale: have [] want nothing" in line
    several = [(f"a{number}", "exp_avg", (1,)) for number in range(9)]
    listed = r"got=\d+ tensors: weight/extra: .*exp_avg/a1: have nothing want \[1\], .*and \d+ more; do="
    with pytest.raises(CheckpointError, match=listed):
        checkpoint.check([*good, ("extra", "weight", (1,)), *several])


def test_tp_slices_of_the_builder_cover(tmp_path):
    """The builder's cut is a partition: else the layout tests would prove nothing."""
    parts = [tp_slices((19, 6), 3, rank) for rank in range(3)]
    assert sum(torch.Size(slice_shape(part)).numel() for part in parts) == 19 * 6


def test_the_generator_states_of_a_rank_are_its_own(tmp_path):
    """Rank 1 of twelve is not rank 11."""
    held = [rng_fragment(rank, name, torch.tensor([rank])) for rank in range(12) for name in ("cpu", "cuda/1")]
    with ThreadPoolExecutor(1) as threads:
        file = write_shard(tmp_path / shard_name("0" * 16, 0, 0), held, threads)
    tensors = {("rng", one.name): TensorInfo("I64", (1,)) for one in held}
    manifest = Manifest(1, "0" * 16, LINEAGE, 12, {}, {}, "", {}, tensors, (file,))
    (tmp_path / MANIFEST).write_bytes(encode(manifest))
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.names() == [] and checkpoint.kinds("1/cpu") == [] and checkpoint.stored_shapes({"rng"}) == {}
        for rank in (0, 1, 11):
            assert {name: int(value) for name, value in checkpoint.rng(rank).items()} == {"cpu": rank, "cuda/1": rank}
        for rank in (-1, 12):
            with pytest.raises(CheckpointError, match=f"got=rank {rank}; want=0 to 11"):
                checkpoint.rng(rank)


def test_an_empty_range_and_an_empty_tensor(tmp_path):
    state = make_state() | {("none", "weight"): torch.zeros(0, 3, dtype=torch.bfloat16)}
    with Checkpoint(save_one(tmp_path, state=state)) as checkpoint:
        none = checkpoint.tensor("none")
        assert none.shape == (0, 3) and none.dtype == torch.bfloat16
        for at in (0, 7, 19 * 6):
            assert checkpoint.read("embedding.word.weight", start=at, stop=at).shape == (0,)
        for bad in ((-1, 3), (4, 3), (0, 19 * 6 + 1)):
            with pytest.raises(CheckpointError, match=f"flat range outside the slice; .*got={bad[0]}:{bad[1]}"):
                checkpoint.read("embedding.word.weight", start=bad[0], stop=bad[1])


@pytest.mark.parametrize("count", [1, 6, 7])
def test_six_differences_are_listed(tmp_path, count):
    checkpoint = Checkpoint(save_one(tmp_path, state={("a", "weight"): torch.ones(1)}))
    wanted = [("a", "weight", (1,)), *((f"b{number}", "weight", (2,)) for number in range(count))]
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check(wanted)
    line = caught.value.line()
    assert f"got={count} tensor{'s' if count > 1 else ''}: weight/b0" in line
    assert line.count("have nothing") == min(count, 6) and (" more" in line) == (count == 7)


def test_differences_are_both_ways_and_weights_come_first():
    have = {("exp_avg", "a"): (1,), ("weight", "b"): (2, 3), ("weight", "same"): (4,), ("weight", "c"): ()}
    want = {("exp_avg", "a"): (2,), ("weight", "b"): (3, 2), ("weight", "same"): (4,), ("count", "z"): (1,)}
    assert differences(have, want) == [
        "weight/b: have [2, 3] want [3, 2]",
        "weight/c: have [] want nothing",
        "count/z: have nothing want [1]",
        "exp_avg/a: have [1] want [2]",
    ]


def test_leftovers_of_interrupted_saves_are_accepted_and_nothing_else(tmp_path):
    path = save_one(tmp_path)
    (shard,) = path.glob("*.safetensors")
    own = shard.name.split("_")[1]
    accepted = (shard_name("0" * 16, 0, 0), shard_name("0" * 16, 0, 0) + ".tmp", shard.name + ".tmp", MANIFEST + ".tmp")
    for name in accepted:
        (path / name).touch()
    Checkpoint(path)
    refused = (shard_name(own, 3, 0), shard_name(own, 0, 1), "manifest.json.tmp.tmp", "notes", ".hidden")
    for name in refused:
        (path / name).touch()
    with pytest.raises(CheckpointError, match="checkpoint is damaged") as caught:
        Checkpoint(path)
    assert caught.value.got == ", ".join(f"{name}: not part of the checkpoint" for name in sorted(refused))
    assert caught.value.want == "1 shards and manifest.json"


def test_every_file_at_fault_is_named_with_its_fault(tmp_path):
    path = save_one(tmp_path, shard_bytes=100)
    first, second, third, *_ = [file.name for file in Checkpoint(path).manifest.files]
    size = (path / second).stat().st_size
    (path / first).unlink()
    os.truncate(path / second, size - 1)
    (path / third).rename(tmp_path / "moved")
    (path / third).symlink_to(tmp_path / "moved")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(path)
    faults = [f"{first}: missing", f"{second}: {size - 1} bytes, want {size}", f"{third}: not a regular file"]
    assert caught.value.got == ", ".join(faults)


def test_a_folder_named_for_another_step_is_refused(tmp_path):
    path = save_one(tmp_path, 5).rename(tmp_path / "step_00000006")
    with pytest.raises(CheckpointError, match="folder holds another step; .*got=step 5; want=step_00000005"):
        Checkpoint(path)
    with Checkpoint(path.rename(tmp_path / "best")) as checkpoint:
        assert checkpoint.step == 5


def test_the_tensors_nearest_to_a_missing_one_are_named(tmp_path):
    checkpoint = Checkpoint(save_one(tmp_path))
    with pytest.raises(CheckpointError, match=r"where=.*: momentum/scale; got=\['exp_avg', 'weight'\]"):
        checkpoint.info("scale", "momentum")
    with pytest.raises(CheckpointError, match=r"where=.*: weight/no; got=4 tensors, \['embedding.word.weight', "):
        checkpoint.info("no")


@pytest.mark.parametrize("place", ["shape", "device"])
def test_a_read_of_another_length_than_its_target_is_an_error(tmp_path, place):
    checkpoint = Checkpoint(save_one(tmp_path))
    out = torch.zeros(5, dtype=torch.float32 if place == "shape" else torch.float64)
    with pytest.raises(RuntimeError):
        checkpoint.read_into(out, "embedding.word.weight", "weight", ((0, 19), (0, 6)), 0, 7)
