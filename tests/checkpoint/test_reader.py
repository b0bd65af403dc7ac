"""Reading: any layout into any other, and only the blocks that are needed."""

import itertools
import os

import pytest
import torch

from neox.checkpoint.manifest import BLOCK
from neox.checkpoint.reader import Checkpoint
from neox.checkpoint.reshard import full_slices, slice_shape
from neox.errors import CheckpointError
from tests.checkpoint.builders import cut_fragments, flip_bit, make_state, save_one, tp_slices


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
