"""Folders of GPT-NeoX: which step is taken, which files make it up, and tensors that only some of them have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neox.config.schema import ModelConfig
from neox.convert.gpt_neox import Layers, config_files, embedding_rows, open_gpt_neox_checkpoint, step_folder
from neox.errors import CheckpointError
from tests.convert.gpt_neox_checkpoints import write_gpt_neox
from tests.convert.test_gpt_neox import WORDS, change, make, torch_file


def written(folder: Path, kind: str, tp: int = 2, by_layer: bool = True) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    config, weights = make(kind)
    write_gpt_neox(folder, weights, config, tp, by_layer=by_layer, padded_rows=64, old_names=False)
    return config, weights


def opened(folder: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    return {name: source() for name, source in open_gpt_neox_checkpoint(folder, config).items()}


@pytest.mark.parametrize(
    ("steps", "latest", "found"),
    [
        ((7, 10, 100), "global_step10\n", "global_step10"),
        ((7, 10, 100), "global_step12", "global_step100"),  # a step that is no longer there
        ((9, 10), None, "global_step10"),
        ((9, 10), "../elsewhere/global_step9", "global_step10"),
        ((9, 10), "", "global_step10"),
        ((), None, None),
    ],
)
def test_the_step_of_latest_is_taken_or_else_the_newest(tmp_path, steps, latest, found):
    for step in steps:
        (tmp_path / f"global_step{step}").mkdir()
        (tmp_path / f"global_step{step}" / "mp_rank_00_model_states.pt").touch()
    (tmp_path / "global_step5000").touch()  # no folder
    (tmp_path / "global_step6000.old").mkdir()
    if latest is not None:
        (tmp_path / "latest").write_text(latest)
    assert step_folder(tmp_path) == (None if found is None else tmp_path / found)


def test_files_next_to_latest_are_the_step(tmp_path):
    (tmp_path / "layer_00-model_00-model_states.pt").touch()
    (tmp_path / "global_step9").mkdir()
    (tmp_path / "global_step9" / "mp_rank_00_model_states.pt").touch()
    assert step_folder(tmp_path) == tmp_path
    assert step_folder(tmp_path / "layer_00-model_00-model_states.pt") is None


def test_config_files_are_those_of_the_folder_configs_or_else_next_to_the_weights(tmp_path):
    for name in ("b.yml", "a.yaml", "c.json", "d.yml.bak"):
        (tmp_path / name).touch()
    (tmp_path / "folder.yml").mkdir()
    assert config_files(tmp_path) == [tmp_path / "a.yaml", tmp_path / "b.yml"]
    (tmp_path / "configs").mkdir()
    assert config_files(tmp_path) == [tmp_path / "a.yaml", tmp_path / "b.yml"]
    (tmp_path / "configs" / "z.yml").touch()
    assert config_files(tmp_path) == [tmp_path / "configs" / "z.yml"]
    assert config_files(tmp_path / "absent") == []


@pytest.mark.parametrize("by_layer", [True, False], ids=["layer files", "rank files"])
@pytest.mark.parametrize("tp", [1, 2])
def test_rows_of_the_embedding_are_counted_over_all_ranks(tmp_path, tp, by_layer):
    written(tmp_path, "neox", tp, by_layer)
    assert embedding_rows(tmp_path / "global_step7") == 64


def test_rows_of_an_embedding_that_is_none(tmp_path):
    for state, rows in (({"a": torch.ones(2)}, None), ({WORDS: torch.ones(2)}, None), ({WORDS: torch.ones(9, 2)}, 9)):
        torch.save(state, tmp_path / "layer_00-model_00-model_states.pt")
        assert embedding_rows(tmp_path) == rows


def test_numbers_of_layers_that_have_parameters(tmp_path):
    written(tmp_path / "files", "neox")
    written(tmp_path / "ranks", "tied-learned", by_layer=False)
    layers = [Layers(tmp_path / name / "global_step7") for name in ("files", "ranks")]
    assert [each.tp for each in layers] == [2, 2]
    assert [each.numbers() for each in layers] == [[0, 2, 3, 5, 6], [0, 2, 3, 5]]
    assert layers[0].states(3)[1]["attention.dense.weight"].shape == (24, 12)
    assert layers[0].states(3) is layers[0].states(3) and layers[0].states(2) is not layers[0].states(3)
    for each in layers:
        with pytest.raises(CheckpointError, match="layer is missing"):
            each.states(4)


@pytest.mark.parametrize("rank", [0, 1])
def test_buffers_of_old_versions_are_left_out(tmp_path, rank):
    config, weights = written(tmp_path, "neox")
    buffers = ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq", "mlp.linear1._extra_state")
    change(torch_file(tmp_path, 2, rank), lambda state: state.update(dict.fromkeys(buffers, torch.ones(1))))
    read = opened(tmp_path, config)
    assert all(torch.equal(read[name], weight) for name, weight in weights.items())
    change(torch_file(tmp_path, 2, 0), lambda state: state.update({"attention.more.bias": torch.ones(1)}))
    change(torch_file(tmp_path, 2, 1), lambda state: state.update({"attention.more.bias": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"do not belong.*where=layer 2: attention\.more\.bias; got=1 tensor;"):
        opened(tmp_path, config)


def rank_file(folder: Path, rank: int) -> Path:
    return folder / "global_step7" / f"mp_rank_{rank:02d}_model_states.pt"


def test_rank_files_may_name_the_module(tmp_path):
    config, weights = written(tmp_path, "neox", by_layer=False)
    for rank in range(2):
        state = torch.load(rank_file(tmp_path, rank), weights_only=True)
        state["module"] = {f"module.{name}": tensor for name, tensor in state["module"].items()} | {"a": torch.ones(1)}
        torch.save(state, rank_file(tmp_path, rank))
    read = opened(tmp_path, config)
    assert all(torch.equal(read[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_layer_that_one_rank_file_lacks(tmp_path, rank):
    config, _ = written(tmp_path, "neox", by_layer=False)
    state = torch.load(rank_file(tmp_path, rank), weights_only=True)
    kept = {name: tensor for name, tensor in state["module"].items() if not name.startswith("sequential.3.")}
    torch.save({"module": kept}, rank_file(tmp_path, rank))
    with pytest.raises(CheckpointError, match=r"layer is missing; where=sequential\.3"):
        opened(tmp_path, config)


@pytest.mark.parametrize("content", [{"module": None}, {"module": {}}, {"module": {"a": torch.ones(1)}}, {}])
def test_rank_files_without_weights(tmp_path, content):
    config, _ = written(tmp_path, "neox", tp=1, by_layer=False)
    torch.save(content, rank_file(tmp_path, 0))
    with pytest.raises(CheckpointError, match="no weights in the file; where=.*mp_rank_00.*layer_"):
        opened(tmp_path, config)


def test_an_output_projection_cut_along_its_columns(tmp_path):
    config, weights = written(tmp_path, "neox")
    padded = torch.cat([weights["head.weight"], torch.zeros(14, 24).half()])
    for rank, columns in enumerate(padded.chunk(2, dim=1)):
        torch.save({"final_linear.weight": columns.clone()}, torch_file(tmp_path, 6, rank))
    assert torch.equal(opened(tmp_path, config)["head.weight"], weights["head.weight"])


def test_the_copy_of_a_tied_embedding_is_not_needed(tmp_path):
    config, weights = written(tmp_path, "tied-learned")
    for rank in range(2):
        torch.save({WORDS: torch.load(torch_file(tmp_path, 0, rank))[WORDS]}, torch_file(tmp_path, 6, rank))
    read = opened(tmp_path, config)
    assert read.keys() == weights.keys() and torch.equal(
        read["embedding.word.weight"], weights["embedding.word.weight"]
    )
    torch.save({"final_linear.weight": torch.ones(3, 3)}, torch_file(tmp_path, 6, 0))
    torch.save({"final_linear.weight": torch.ones(3, 3)}, torch_file(tmp_path, 6, 1))
    with pytest.raises(CheckpointError, match=r"do not belong to the model; where=layer 6: final_linear\.weight"):
        opened(tmp_path, config)


def test_an_untied_model_does_not_take_the_embedding_for_its_head(tmp_path):
    config, _ = written(tmp_path, "tied-learned")
    for rank in range(2):
        torch.save({WORDS: torch.load(torch_file(tmp_path, 0, rank))[WORDS]}, torch_file(tmp_path, 6, rank))
    with pytest.raises(CheckpointError, match=r"weight is missing; where=layer 6: final_linear\.weight"):
        opened(tmp_path, config.model_copy(update={"tie_embeddings": False}))


@pytest.mark.parametrize(
    ("kind", "changes", "problem"),
    [
        ("neox", {"hidden_size": 40}, r"another shape; where=layer 0: word_embeddings\.weight; got="),
        (
            "neox",
            {"intermediate_size": 90},
            r"layer 2: mlp\.linear1\.weight; got=\(96, 24\); want=\(90, 24\) over all ranks",
        ),
        ("llama-gqa", {"num_kv_heads": 1}, "attention.query_key_value.weight"),
        ("llama-gqa", {"num_kv_heads": 4}, "attention.query_key_value.weight; got="),
        ("neox", {"vocab_size": 65}, "vocabulary is smaller than that of the model; .*got=64; want=at least 65 rows"),
    ],
)
def test_sizes_that_are_not_those_of_the_config(tmp_path, kind, changes, problem):
    config, _ = written(tmp_path, kind)
    with pytest.raises(CheckpointError, match=problem):
        opened(tmp_path, config.model_copy(update=changes))


@pytest.mark.parametrize("factor", [1.0 + 2**-10, 0.9, 1.1])
def test_stored_slopes_may_differ_by_their_rounding_alone(tmp_path, factor):
    config, _ = written(tmp_path, "alibi", tp=1)
    change(
        torch_file(tmp_path, 3),
        lambda state: state.update({key: (state[key] * factor).half() for key in state if key.endswith("slopes")}),
    )
    if factor < 1.01 and factor > 1:
        opened(tmp_path, config)
        return
    with pytest.raises(CheckpointError, match="slopes differ; where=layer 3"):
        opened(tmp_path, config)


def test_slopes_that_are_not_stored_are_not_checked(tmp_path):
    config, weights = written(tmp_path, "alibi", tp=1)
    for layer in (2, 3):
        change(torch_file(tmp_path, layer), lambda state: state.pop("attention.alibi_embed.slopes"))
    assert opened(tmp_path, config).keys() == weights.keys()
