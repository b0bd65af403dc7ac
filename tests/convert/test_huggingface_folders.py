"""Exported folders file by file, and imported ones as other programs write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from neox.config.schema import ModelConfig, SpecialIds
from neox.convert.huggingface import (
    compare,
    config_from_json,
    from_huggingface,
    open_huggingface,
    probe_tokens,
    to_huggingface,
)
from neox.data.text.tokenizer import Tokenizer
from neox.errors import CheckpointError, ConfigError, DiskError
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from tests.gpt_neox_tokenizer import write_gpt_neox_tokenizer

GPT2 = {"position_embedding": "learned", "tie_embeddings": True}


def random_model(**options) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    sizes = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 384, "vocab_multiple": 1}
    config = ModelConfig(**(sizes | options))
    generator = torch.Generator().manual_seed(1)
    specs = GPT(config, Mesh.single("meta")).shard_specs()
    return config, {name: torch.randn(spec.shape, generator=generator) for name, spec in specs.items()}


def read_json(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_files_are_as_large_as_they_may_be_and_no_larger(tmp_path):
    config, weights = random_model(vocab_size=16)  # most tensors have 64 bytes, or a multiple
    for limit in (64, 1 << 10, 3 << 10, 3 * 1024 + 64):
        folder = tmp_path / str(limit)
        to_huggingface(config, weights, folder, max_shard_bytes=limit)
        index = read_json(folder, "model.safetensors.index.json")
        files = sorted(folder.glob("model-*.safetensors"))
        held = [load_file(file) for file in files]
        sizes = [[tensor.nbytes for tensor in tensors.values()] for tensors in held]
        assert [file.name for file in files] == [
            f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
        ]
        assert all(sum(size) <= limit or len(size) == 1 for size in sizes)
        # a file ends only where the next tensor does not fit; order is that of the weights
        order = list(index["weight_map"])
        for file, tensors, following in zip(files, held, held[1:], strict=False):
            first = min(following, key=order.index)
            assert sum(tensor.nbytes for tensor in tensors.values()) + following[first].nbytes > limit, file
        assert index["metadata"]["total_size"] == sum(map(sum, sizes)) == sum(w.nbytes for w in weights.values())
        assert index["weight_map"] == {
            name: file.name for file, tensors in zip(files, held, strict=True) for name in tensors
        }
        assert same(from_huggingface(folder)[1], weights)


def test_all_weights_in_one_file_need_no_index(tmp_path):
    config, weights = random_model(vocab_size=16)
    to_huggingface(config, weights, tmp_path, max_shard_bytes=sum(weight.nbytes for weight in weights.values()))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


def test_where_an_export_may_be_written(tmp_path):
    config, weights = random_model(vocab_size=16)
    (tmp_path / "empty").mkdir()
    to_huggingface(config, weights, tmp_path / "empty")
    to_huggingface(config, weights, tmp_path / "new" / "below")
    (tmp_path / "file").touch()
    for name in ("file", "empty"):
        with pytest.raises(CheckpointError, match=f"would overwrite files; where=.*{name}"):
            to_huggingface(config, weights, tmp_path / name)


def test_a_tokenizer_without_settings_gets_them(tmp_path):
    config, weights = random_model(max_position_embeddings=96)
    file = write_gpt_neox_tokenizer(tmp_path / "t.json")
    to_huggingface(config, weights, tmp_path / "out", tokenizer_file=file)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == Path(file).read_bytes()
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    assert read_json(tmp_path / "out", "special_tokens_map.json") == names
    assert read_json(tmp_path / "out", "tokenizer_config.json") == names | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 96,
        "clean_up_tokenization_spaces": False,
    }
    for name in ("config.json", "generation_config.json"):
        found = read_json(tmp_path / "out", name)
        assert (found["bos_token_id"], found["eos_token_id"], found.get("pad_token_id")) == (0, 0, None)


def test_settings_next_to_a_tokenizer_are_copied(tmp_path):
    config, weights = random_model()
    file = write_gpt_neox_tokenizer(tmp_path / "tokenizer.json")
    given = {"tokenizer_config.json": "{}", "chat_template.jinja": "x", "generation_config.json": '{"top_k": 3}'}
    for name, text in given.items():
        (tmp_path / name).write_text(text)
    to_huggingface(config, weights, tmp_path / "out", tokenizer_file=file)
    assert {name: (tmp_path / "out" / name).read_text() for name in given} == given
    assert not (tmp_path / "out" / "special_tokens_map.json").exists()
    assert read_json(tmp_path / "out", "config.json")["eos_token_id"] == 0


def test_ids_of_an_imported_model_and_a_token_by_name(tmp_path):
    config, weights = random_model()
    file = write_gpt_neox_tokenizer(tmp_path / "t.json")
    ids = SpecialIds(bos=1, eos=(2, 3), pad=4, stop=(5,))
    to_huggingface(config, weights, tmp_path / "ids", tokenizer_file=file, special_ids=ids)
    assert read_json(tmp_path / "ids", "config.json")["eos_token_id"] == [2, 3]
    assert read_json(tmp_path / "ids", "generation_config.json")["eos_token_id"] == [2, 3, 5]
    token = next(name for name in ("a", "b", "!") if Tokenizer(str(file)).token_id(name) is not None)
    to_huggingface(config, weights, tmp_path / "named", tokenizer_file=file, eod_token=token)
    assert read_json(tmp_path / "named", "config.json")["eos_token_id"] == Tokenizer(str(file)).token_id(token) != 0
    assert read_json(tmp_path / "named", "tokenizer_config.json")["eos_token"] == token


def test_names_that_only_some_programs_write(tmp_path):
    """Published GPT-2 has no prefix, transformers 5 calls the head of GPT-NeoX lm_head, tied models may have a copy."""
    buffers = {"h.0.attn.bias": torch.ones(1), "h.0.attn.masked_bias": torch.ones(1)}
    for kind, options, renamed, more in (
        ("gpt2", GPT2, lambda name: name.removeprefix("transformer."), buffers),
        ("tied", GPT2, lambda name: name, {"lm_head.weight": torch.ones(1)}),
        ("neox", {}, lambda name: name.replace("embed_out", "lm_head"), {}),
        ("tied neox", {"tie_embeddings": True}, lambda name: name, {"embed_out.weight": torch.ones(1)}),
    ):
        config, weights = random_model(vocab_size=16, **options)
        to_huggingface(config, weights, tmp_path / kind)
        file = tmp_path / kind / "model.safetensors"
        save_file({renamed(name): tensor for name, tensor in load_file(file).items()} | more, file)
        read, got = from_huggingface(tmp_path / kind)
        assert read == config.model_copy(update={"vocab_multiple": read.vocab_multiple}) and same(got, weights), kind


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.self_attn.bias", "rotary_emb.inv_freq"])
def test_other_names_are_no_weights_of_the_model(tmp_path, name):
    config, weights = random_model(vocab_size=16)
    to_huggingface(config, weights, tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {name: torch.ones(1)}, file)
    if name == "lm_head.weight":  # in place of embed_out, not next to it
        with pytest.raises(CheckpointError, match="shape"):
            from_huggingface(tmp_path)
        return
    with pytest.raises(CheckpointError, match=f"weights are unknown; where={name}; got=1 tensor; want=.*GPTNeoX"):
        from_huggingface(tmp_path)


def test_a_weight_keeps_its_dtype(tmp_path):
    config, weights = random_model(vocab_size=16)
    to_huggingface(config, weights, tmp_path, dtype=torch.float16)
    _, sources = open_huggingface(tmp_path)
    assert {source.dtype for source in sources.values()} == {torch.float16}
    assert torch.equal(sources["norm.weight"](), weights["norm.weight"].half())
    assert read_json(tmp_path, "config.json")["torch_dtype"] == "float16"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "weights are quantized; .*got='gptq'"),
        ({"quantization_config": {"bits": 4}}, "got='quantized weights'"),
        ({"quantization_config": {}}, "weights are quantized"),
        ({"num_key_value_heads": 5}, r"where=config\.json: num_key_value_heads; got=5"),
        ({"hidden_size": 10**9, "num_hidden_layers": 10_001}, r"where=config\.json: model\.num_layers; got=10001"),
    ],
)
def test_a_config_that_is_refused_names_its_key(changes, problem):
    base = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    with pytest.raises(ConfigError, match=problem):
        config_from_json(base | changes)
    read = config_from_json(base | {"quantization_config": None, "initializer_range": 0.03, "attention_dropout": None})
    assert (read.init_std, read.attention_dropout, read.head_dim, read.norm) == (0.03, 0.0, 4, "rmsnorm")
    assert config_from_json(base).init_std == 0.02


def test_names_of_gpt2_itself_come_before_the_common_ones():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    common = {"hidden_size": 8, "num_hidden_layers": 9, "num_attention_heads": 1, "max_position_embeddings": 9}
    assert config_from_json({"model_type": "gpt2"} | sizes | common) == config_from_json({"model_type": "gpt2"} | sizes)


@pytest.mark.parametrize("mode", [True, False])
def test_a_comparison_is_without_dropout_and_leaves_the_mode(tmp_path, mode):
    config, weights = random_model(vocab_size=16, hidden_dropout=0.5, attention_dropout=0.5)
    to_huggingface(config, weights, tmp_path)
    model = GPT(config, Mesh.single())
    model.load_weights(weights)
    model.train(mode)
    assert compare(tmp_path, model) <= 1e-4
    assert model.training == mode
    weights["norm.bias"] = weights["norm.bias"] + 1.0
    model.load_weights(weights)
    tokens = torch.tensor([[3, 1, 2]])
    assert compare(tmp_path, model, tokens=tokens) > 0.1 and model.training == mode


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({}, 128),
        ({"sliding_window": 200}, 232),
        ({"max_position_embeddings": 100}, 100),
        ({"sliding_window": 9}, 41),
        ({"sliding_window": 200, "max_position_embeddings": 50}, 50),
    ],
)
def test_probes_are_longer_than_the_window_and_fit_the_model(tmp_path, options, length):
    config, _ = random_model(**options)
    drawn = probe_tokens(config, tmp_path / "absent")
    assert (drawn.shape, drawn.dtype) == ((2, length), torch.int64)
    assert len(drawn.unique()) > 20 and int(drawn.min()) >= 0 and int(drawn.max()) < 384
    file = write_gpt_neox_tokenizer(tmp_path / "t.json")
    text = probe_tokens(config, Path(file))
    assert text.shape == drawn.shape and not torch.equal(text, drawn)
    prose, code = (Tokenizer(str(file)).decode(row.tolist()) for row in text)
    assert prose.startswith("It was a bright cold morning") and code.startswith("def area(radius):")
    for vocab_size in (100, int(text.max())):
        small = config.model_copy(update={"vocab_size": vocab_size})
        assert int(probe_tokens(small, Path(file)).max()) < vocab_size


def test_an_export_that_transformers_cannot_load_is_named(tmp_path):
    config, weights = random_model(vocab_size=16)
    with pytest.raises(CheckpointError, match=f"export does not load in transformers; where={tmp_path}"):
        compare(tmp_path, GPT(config, Mesh.single()))
    to_huggingface(config, weights, tmp_path / "out")
    content = read_json(tmp_path / "out", "config.json") | {"intermediate_size": 63}
    (tmp_path / "out" / "config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match="does not load"):
        compare(tmp_path / "out", GPT(config, Mesh.single()))


def test_a_folder_that_cannot_be_made(tmp_path):
    config, weights = random_model(vocab_size=16)
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="export cannot be written; where=.*file/below"):
        to_huggingface(config, weights, tmp_path / "file" / "below")


def test_an_export_that_fails_has_no_config(tmp_path):
    config, weights = random_model(vocab_size=16)

    def failing():
        yield from list(weights.items())[:3]
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskError, match=r"export cannot be written; .*No space left.*; do=free space"):
        to_huggingface(config, failing(), tmp_path)
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "model.safetensors").exists()
