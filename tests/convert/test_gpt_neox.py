"""Checkpoints of GPT-NeoX at several tensor sizes, in both layouts, against the weights they were cut from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from neox.config.schema import ModelConfig
from neox.convert.gpt_neox import is_gpt_neox_checkpoint, open_gpt_neox_checkpoint, step_folder
from neox.errors import CheckpointError
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from tests.convert.gpt_neox_checkpoints import write_gpt_neox

SIZES = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "vocab_size": 50, "max_position_embeddings": 16}
LLAMA = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "qkv_bias": False,
    "attention_out_bias": False,
    "mlp_bias": False,
    "intermediate_size": 40,
}
MODELS = {
    "neox": {"parallel_residual": True, "rotary_pct": 0.5},
    "neox-shared-norm": {"parallel_residual": True, "shared_residual_norm": True},
    "alibi": {"position_embedding": "alibi"},
    "tied-learned": {"position_embedding": "learned", "tie_embeddings": True},
    "llama-gqa": LLAMA | {"num_kv_heads": 2},
    "llama-biases": LLAMA | {"mlp_bias": True, "qkv_bias": True, "num_kv_heads": 2},
}


def make(kind: str) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    config = ModelConfig(**(SIZES | MODELS[kind]))
    generator = torch.Generator().manual_seed(5)
    layouts = GPT(config, Mesh.single("meta")).shard_specs()
    return config, {name: torch.randn(layout.shape, generator=generator).half() for name, layout in layouts.items()}


@pytest.mark.parametrize("by_layer", [True, False], ids=["layer files", "rank files"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_comes_back(tmp_path, kind, tp, by_layer):
    config, weights = make(kind)
    write_gpt_neox(tmp_path, weights, config, tp, by_layer=by_layer, padded_rows=64, old_names=kind == "neox")
    sources = open_gpt_neox_checkpoint(tmp_path, config)
    assert sources.keys() == weights.keys()
    for name, source in sources.items():
        assert source.dtype == torch.float16
        assert torch.equal(source(), weights[name]), name


def test_heads_of_four_ranks(tmp_path):
    config, weights = make("neox")
    write_gpt_neox(tmp_path, weights, config, 4, by_layer=True, padded_rows=52, old_names=False)
    assert all(
        torch.equal(source(), weights[name])
        for name, source in open_gpt_neox_checkpoint(tmp_path / "global_step7", config).items()
    )


@pytest.fixture
def old(tmp_path):
    config, weights = make("neox")
    write_gpt_neox(tmp_path, weights, config, 2, by_layer=True, padded_rows=50, old_names=False)
    return tmp_path, config


def test_the_folder_is_found(old, tmp_path):
    folder, _ = old
    assert is_gpt_neox_checkpoint(folder) and step_folder(folder) == folder / "global_step7"
    (folder / "latest").unlink()
    (folder / "global_step10").mkdir()
    assert step_folder(folder) is None  # not the older one in silence
    (folder / "global_step10" / "mp_rank_00_model_states.pt").touch()
    assert step_folder(folder) == folder / "global_step10"
    assert not is_gpt_neox_checkpoint(folder / "nowhere")


def test_what_is_missing_is_named(old):
    folder, config = old
    (folder / "global_step7" / "layer_03-model_01-model_states.pt").rename(folder / "gone")
    with pytest.raises(CheckpointError, match="tensor-parallel rank are missing"):
        open_gpt_neox_checkpoint(folder, config)
    (folder / "global_step7" / "layer_03-model_00-model_states.pt").rename(folder / "missing too")
    with pytest.raises(CheckpointError, match="layer_03"):
        open_gpt_neox_checkpoint(folder, config)


def test_another_model_is_refused(old):
    folder, config = old
    with pytest.raises(CheckpointError, match=r"do not belong to the model.*attention.dense.bias"):
        open_gpt_neox_checkpoint(folder, config.model_copy(update={"attention_out_bias": False}))
    with pytest.raises(CheckpointError, match=r"mlp|layer 3"):
        open_gpt_neox_checkpoint(folder, config.model_copy(update={"num_layers": 1}))
    with pytest.raises(CheckpointError, match="vocabulary is smaller"):
        open_gpt_neox_checkpoint(folder, config.model_copy(update={"vocab_size": 51}))["embedding.word.weight"]()


def test_copies_that_drifted_apart_are_averaged(old):
    folder, config = old
    path = folder / "global_step7" / "layer_03-model_01-model_states.pt"
    state = torch.load(path, weights_only=True)
    first = state["input_layernorm.weight"].clone()
    state["input_layernorm.weight"] *= 3
    torch.save(state, path)
    assert torch.equal(open_gpt_neox_checkpoint(folder, config)["layers.1.norm1.weight"](), first * 2)


def test_gpt_neox_has_no_parallel_residual_with_attention_where_the_mlp_has_no_biases(old):
    folder, config = old
    with pytest.raises(CheckpointError, match="omits the attention from the sum"):
        open_gpt_neox_checkpoint(folder, config.model_copy(update={"mlp_bias": False}))


def test_slopes_of_alibi_are_checked(tmp_path):
    config, weights = make("alibi")
    write_gpt_neox(tmp_path, weights, config, 2, by_layer=True, padded_rows=50, old_names=False)
    path = tmp_path / "global_step7" / "layer_02-model_01-model_states.pt"
    state = torch.load(path, weights_only=True)
    state["attention.alibi_embed.slopes"] = state["attention.alibi_embed.slopes"] * 1.1
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="slopes differ"):
        open_gpt_neox_checkpoint(tmp_path, config)


class Foreign:
    """A class that a pickle could name."""


def test_a_pickle_that_holds_more_than_tensors_is_not_run(old):
    folder, config = old
    torch.save({"norm1": Foreign()}, folder / "global_step7" / "layer_00-model_00-model_states.pt")
    with pytest.raises(CheckpointError, match=r"contains more than tensors.*layer_00.*got=[\w.]+\.Foreign;"):
        open_gpt_neox_checkpoint(folder, config)
    (folder / "global_step7" / "layer_00-model_00-model_states.pt").write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match="file cannot be read"):
        open_gpt_neox_checkpoint(folder, config)


def torch_file(folder: Path, number: int, rank: int = 0) -> Path:
    return folder / "global_step7" / f"layer_{number:02d}-model_{rank:02d}-model_states.pt"


def change(path: Path, edit) -> None:
    state = torch.load(path, weights_only=True)
    edit(state)
    torch.save(state, path)


WORDS = "word_embeddings.weight"


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda state: state.update({WORDS: state[WORDS][0].clone()}), "shape"),
        (lambda state: state.update({WORDS: torch.tensor(1.0)}), "shape"),
        (lambda state: state.update({3: torch.zeros(2)}), "not a name; .*got=3"),
        (lambda state: state.update({(1, 2): torch.zeros(2)}), "not a name"),
        (lambda state: state.update({WORDS: state[WORDS].to_sparse()}), "got=sparse_coo"),
        (lambda state: state.update({WORDS: state[WORDS].to("meta")}), "meta tensor"),
        (lambda state: state.update({WORDS: state[WORDS].to(torch.int8)}), "got=int8"),
        (lambda state: state.update({WORDS: state[WORDS].to(torch.float8_e4m3fn)}), "got=float8_e4m3fn"),
        (lambda state: state.update({WORDS: state[WORDS].to(torch.complex64)}), "got=complex64"),
        (lambda state: state.update({WORDS: torch.zeros(1, 1).expand(1 << 20, 1 << 20)}), "over 4 bytes"),
        (lambda state: state.update({WORDS: state[WORDS].tolist()}), "missing on rank 0"),
        (lambda state: state.pop(WORDS), "missing on rank 0"),
    ],
)
def test_tensors_that_are_no_weights(old, edit, match):
    folder, config = old
    change(torch_file(folder, 0), edit)
    with pytest.raises(CheckpointError, match=match):
        for source in open_gpt_neox_checkpoint(folder, config).values():
            source()


def test_a_state_that_is_no_dictionary(old):
    folder, config = old
    torch.save([torch.zeros(2)], torch_file(folder, 0))
    with pytest.raises(CheckpointError, match="not a state dict"):
        open_gpt_neox_checkpoint(folder, config)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda state: state.pop("attention.dense.weight"), "missing on rank {}"),
        (lambda state: state.update({"attention.dense.weight": torch.zeros(24, 7)}), "different shapes"),
    ],
)
def test_a_rank_that_differs_is_named(old, rank, edit, match):
    folder, config = old
    change(torch_file(folder, 2, rank), edit)
    with pytest.raises(CheckpointError, match=match.format(rank)):
        open_gpt_neox_checkpoint(folder, config)


def test_a_pipe_in_place_of_a_file_is_not_opened(old):
    folder, config = old
    torch_file(folder, 0).unlink()
    os.mkfifo(torch_file(folder, 0))
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_gpt_neox_checkpoint(folder, config)
