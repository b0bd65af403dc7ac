"""Converted weights as a checkpoint of step 0."""

from __future__ import annotations

import pytest
import torch

from neox.checkpoint.reader import Checkpoint
from neox.config.schema import Config
from neox.config.values import dump, to_builtins
from neox.convert import source
from neox.convert.source import WeightSource, save_weights
from neox.convert.state import InMemoryTensors
from neox.errors import CheckpointError
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh

CONFIG = Config(model={"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 30})


def sources(dtype: torch.dtype = torch.float32) -> dict[str, WeightSource]:
    weights = dict(GPT(CONFIG.model, Mesh.single()).logical_weights())
    return {name: WeightSource(lambda tensor=tensor: tensor.to(dtype), dtype) for name, tensor in weights.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_keep_their_dtype_and_bits(tmp_path, dtype):
    wanted = sources(dtype)
    with Checkpoint(save_weights(CONFIG, wanted, tmp_path)) as checkpoint:
        assert checkpoint.state == {"step": 0, "weights_only": True}
        assert checkpoint.model_config == to_builtins(CONFIG.model)
        assert checkpoint.manifest.config_lock == dump(CONFIG) and len(checkpoint.manifest.files) == 1
        for name, made in wanted.items():
            assert torch.equal(checkpoint.tensor(name), made())


def test_missing_and_unknown_weights_are_named(tmp_path):
    wanted = sources()
    wanted["more"] = wanted.pop("norm.weight")
    with pytest.raises(CheckpointError, match=r"more, norm\.weight"):
        save_weights(CONFIG, wanted, tmp_path)


def test_the_first_of_many_wrong_names_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"where=a, b, c, d; got=\d+ weights; want=\d+$"):
        save_weights(CONFIG, sources() | dict.fromkeys("hgfedcba", sources()["norm.weight"]), tmp_path)


def test_large_models_are_cut_into_files(tmp_path, monkeypatch):
    assert source.SHARD_BYTES == 4 << 30
    monkeypatch.setattr(source, "SHARD_BYTES", 4000)
    with Checkpoint(save_weights(CONFIG, sources(), tmp_path)) as checkpoint:
        assert len(checkpoint.manifest.files) > 2


def test_held_tensors_have_the_face_of_files():
    held = InMemoryTensors({"a": torch.ones(2, dtype=torch.float16)})
    assert (held.names(), held.dtype("a")) == (["a"], torch.float16)
    assert torch.equal(held.tensor("a"), torch.ones(2, dtype=torch.float16))
