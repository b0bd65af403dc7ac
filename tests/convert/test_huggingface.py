from __future__ import annotations

import datetime
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from neox.config.schema import ModelConfig
from neox.convert.huggingface import compare, from_huggingface, to_huggingface
from neox.data.text.tokenizer import Tokenizer, train_tokenizer
from neox.errors import CheckpointError, ConfigError, DataError, EnvironmentProblem
from neox.generate.generate import generate
from neox.generate.sampling import SamplingParams
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from tests.convert.models import MODELS
from tests.gpt_neox_tokenizer import write_gpt_neox_tokenizer

TOLERANCE = 2e-5  # fp32, absolute, on logits of order 1


def ours(model) -> GPT:
    config, weights = from_huggingface(model)
    gpt = GPT(config, Mesh.single("meta")).materialize("cpu", initialize=False)
    gpt.load_weights(weights)
    return gpt.eval()


def tokens(vocab_size: int, shape=(2, 37)) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=MODELS, scope="module")
def theirs(request):
    return MODELS[request.param]()


def test_logits_equal_transformers(theirs):
    ids = tokens(101)
    with torch.no_grad():
        want = theirs(ids).logits
        got = ours(theirs)(ids)
    assert want.abs().max() > 0.5
    assert (got - want).abs().max() <= TOLERANCE


def test_export_loads_and_import_gives_the_same_bits(theirs, tmp_path):
    config, weights = from_huggingface(theirs)
    to_huggingface(config, weights, tmp_path / "out", max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert compare(tmp_path / "out", ours(theirs)) <= TOLERANCE
    again, read = from_huggingface(tmp_path / "out")
    assert again == config
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    "name",
    [
        "neox-parallel-25",
        "neox-sequential-100",
        "gpt2",
        "llama-mqa-biases-geglu",
        "qwen3-window-bias",
        "mistral-window",
        "stablelm-parallel-bias",
    ],
)
def test_gradients_equal_transformers(name):
    model = MODELS[name]()
    config, _ = from_huggingface(model)
    gpt = ours(model)
    ids = tokens(101)
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    torch.nn.functional.cross_entropy(
        model(ids).logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    ).backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad  # so that the weight mapping carries the gradients over
    gpt(ids, targets).sum().backward()
    _, want = from_huggingface(model)
    got = {
        name: layout.unpad(parameter.grad)
        for (name, parameter), layout in zip(gpt.named_parameters(), gpt.shard_specs().values(), strict=True)
    }
    assert got.keys() == want.keys()
    for key, gradient in got.items():
        scale = want[key].abs().max().item()
        assert scale > 0, key
        assert (gradient - want[key]).abs().max().item() <= 2e-5 * max(scale, 1.0), key
    assert config.num_layers == 3


def test_trained_llama(shared_data):
    """A published model of 260,032 parameters: logits, and the greedy continuation of a prompt."""
    from transformers import AutoModelForCausalLM

    folder = shared_data / "llama-260k"
    model = ours(folder)
    assert model.num_parameters() == 260_032
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = tokens(512, (3, 101))
    with torch.no_grad():
        assert (model(ids) - theirs(ids).logits).abs().max() <= TOLERANCE
    prompt = [1, 403, 407]
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert generate(model, [prompt], SamplingParams(60, 0))[0] == expected[0, len(prompt) :].tolist()


def test_bf16_export_holds_rounded_weights(tmp_path):
    config, weights = from_huggingface(MODELS["neox-parallel-25"]())
    to_huggingface(config, weights.items(), tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    _, read = from_huggingface(tmp_path)
    assert all(torch.equal(read[name], weights[name].bfloat16()) for name in weights)


def test_tokenizer_and_end_of_document_id(tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    config = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=384, vocab_multiple=1)
    gpt = GPT(config, Mesh.single())
    file = write_gpt_neox_tokenizer(tmp_path / "t.json")
    to_huggingface(config, gpt.logical_weights(), tmp_path / "out", tokenizer_file=file)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("Hello  world\n")["input_ids"]) == "Hello  world\n"
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == 0


def test_compare_sees_a_wrong_weight(tmp_path):
    model = MODELS["gpt2"]()
    config, weights = from_huggingface(model)
    weights["layers.1.attention.qkv.bias"] = weights["layers.1.attention.qkv.bias"] + 0.01
    to_huggingface(config, weights, tmp_path)
    assert compare(tmp_path, ours(model)) > 1e-4


def test_compare_refuses_a_folder_that_lacks_a_weight(tmp_path):
    model = MODELS["llama"]()
    to_huggingface(*from_huggingface(model), tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if name != "model.norm.weight"}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="does not load completely"):
        compare(tmp_path, ours(model))


def test_compare_of_nan_is_not_below_any_bound(tmp_path):
    model = MODELS["llama"]()
    config, weights = from_huggingface(model)
    weights["norm.weight"] = weights["norm.weight"] * float("nan")
    to_huggingface(config, weights, tmp_path)
    assert not compare(tmp_path, ours(model)) <= 1e9


def test_old_config_keys_are_read(tmp_path):
    config, weights = from_huggingface(MODELS["neox-parallel-50"]())
    to_huggingface(config, weights, tmp_path)
    old = json.loads((tmp_path / "config.json").read_text())
    del old["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert from_huggingface(tmp_path)[0] == config


def test_config_without_weights():
    config, weights = from_huggingface(MODELS["qwen3"]().config)
    assert config.qk_norm and config.head_dim == 14 and weights == {}


@pytest.fixture
def folder(tmp_path):
    to_huggingface(*from_huggingface(MODELS["llama"]()), tmp_path)
    return tmp_path


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_weight(folder):
    edit(folder, num_hidden_layers=4)
    with pytest.raises(
        CheckpointError,
        match=re.escape(
            "weight is missing; where=model.layers.3.input_layernorm.weight; got=weights of 3 layers; "
            "want=the weights of LlamaForCausalLM with 4 layers, by num_hidden_layers of config.json"
        ),
    ):
        from_huggingface(folder)


def test_unknown_weight(folder):
    edit(folder, num_hidden_layers=2)
    with pytest.raises(
        CheckpointError,
        match=r"weights are unknown; where=model\.layers\.2.*; got=9 tensors; weights of 3 layers; "
        r"want=.*with 2 layers, by num_hidden_layers of config\.json",
    ):
        from_huggingface(folder)


def test_wrong_shape_is_found(folder):
    edit(folder, intermediate_size=93)
    with pytest.raises(CheckpointError, match=r"another shape; where=model.layers.0.mlp"):
        ours(folder)


def test_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        from_huggingface(folder)


def test_index_that_points_outside(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    with pytest.raises(CheckpointError, match="index is damaged"):
        from_huggingface(folder)


def test_pickled_weights_are_read_where_there_are_no_others(folder):
    config, want = from_huggingface(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights.*pytorch_model\.bin"):
        from_huggingface(folder)
    tensors |= {
        "model.layers.0.rotary_emb.inv_freq": torch.ones(2),
        "model.layers.0.attention.bias": torch.ones(1, 1, dtype=torch.bool),
    }
    names = sorted(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, held in parts.items():
        torch.save({name: tensors[name] for name in held}, folder / file)
    table = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(table))
    got_config, got = from_huggingface(folder)
    assert got_config == config
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    (folder / "pytorch_model.bin.index.json").unlink()
    torch.save(tensors | {"more": datetime.timedelta(1)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"more than tensors.*got=datetime\.timedelta"):
        from_huggingface(folder)


def test_config_that_is_no_json(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        from_huggingface(folder)


def test_export_refuses_to_overwrite(folder):
    with pytest.raises(CheckpointError, match="would overwrite"):
        to_huggingface(*from_huggingface(MODELS["llama"]()), folder)


def test_export_refuses_incomplete_weights(tmp_path):
    config, weights = from_huggingface(MODELS["llama"]())
    del weights["norm.weight"]
    with pytest.raises(CheckpointError, match=r"weights are missing; where=norm\.weight"):
        to_huggingface(config, weights, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_export_refuses_unknown_weights(tmp_path):
    config, weights = from_huggingface(MODELS["llama"]())
    with pytest.raises(CheckpointError, match="does not belong"):
        to_huggingface(config, weights | {"extra": torch.ones(1)}, tmp_path)


@pytest.mark.parametrize("vocab_size", [300, 299])
def test_export_takes_a_tokenizer_that_just_fits(tmp_path, vocab_size):
    file = train_tokenizer([f"word {n} and another" for n in range(200)], 300, tmp_path / "t.json").file
    assert Tokenizer(file).vocab_size == 300
    config = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=vocab_size, vocab_multiple=1)
    weights = list(GPT(config, Mesh.single()).logical_weights())
    if vocab_size == 300:
        to_huggingface(config, weights, tmp_path / "out", tokenizer_file=Path(file))
        assert (tmp_path / "out" / "tokenizer.json").is_file()
    else:
        with pytest.raises(
            DataError,
            match=r"tokenizer does not match the model; .*got=ids up to 299; want=ids below "
            r"model\.vocab_size 299",
        ):
            to_huggingface(config, weights, tmp_path / "out", tokenizer_file=Path(file))


def test_export_refuses_a_dtype(tmp_path):
    config, weights = from_huggingface(MODELS["llama"]())
    with pytest.raises(ConfigError, match="dtype"):
        to_huggingface(config, weights, tmp_path, dtype=torch.float64)


def test_odd_rotary_channels_are_refused():
    with pytest.raises(ConfigError, match="odd number of rotary channels"):
        from_huggingface(MODELS["neox-parallel-25"]().config.__class__(hidden_size=60, num_attention_heads=5))


@pytest.mark.parametrize(
    "table",
    [
        ["model.safetensors"],
        None,
        {},
        {"a": 1},
        {"a": None},
        {"a": ["model.safetensors"]},
        {"a": "../model.safetensors"},
        {"a": "/etc/x.safetensors"},
    ],
)
def test_index_that_is_damaged(folder, table):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(CheckpointError, match="index is damaged"):
        from_huggingface(folder)


def test_a_pipe_in_place_of_the_weights_is_not_opened(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        from_huggingface(folder)


def test_a_git_lfs_pointer_is_named(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        from_huggingface(folder)


def test_many_layers_are_refused_before_anything_is_made_for_them(folder):
    edit(folder, num_hidden_layers=2_000_000_000)
    with pytest.raises(ConfigError, match=r"model.num_layers; got=2000000000; want=.*10000"):
        from_huggingface(folder)
    edit(folder, num_hidden_layers=10_000)
    with pytest.raises(CheckpointError, match="10,000 layers"):
        from_huggingface(folder)


@pytest.mark.parametrize(
    "change", [lambda x: x[0], lambda x: x[0, 0], lambda x: x.to(torch.int8), lambda x: x.flatten(), lambda x: x[:0]]
)
def test_embeddings_that_are_no_matrix_of_numbers(folder, change):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = change(tensors["model.embed_tokens.weight"]).clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"another shape|not floating-point"):
        from_huggingface(folder)


def test_a_missing_transformers_names_the_option_that_does_without_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    model = GPT(ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=11))
    with pytest.raises(EnvironmentProblem, match="pip install transformers, or pass --no-check"):
        compare(tmp_path, model)
