"""Keys that are missing or null mean what transformers takes them for: its own configuration classes read the same
JSON.
"""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from neox.convert.families import FAMILIES
from neox.convert.huggingface import config_from_json, from_huggingface
from neox.errors import ConfigError
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from tests.convert.models import llama, mistral, qwen2

SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
}
GPT2_SIZES = {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96}
CASES = [
    (family.model_type, key, change)
    for family in FAMILIES
    for key in family.keys
    if key not in ("hidden_size", "n_embd", "initializer_range")  # the width must be there; the other has no effect
    for change in ("missing", "null")
]
ONLY_OLD = {("mistral", "num_key_value_heads")}  # transformers 4 takes null as "as many as query heads"


def changed(model_type: str, key: str, change: str) -> dict:
    base = {"model_type": model_type, **(GPT2_SIZES if model_type == "gpt2" else SIZES)}
    return base | {key: None} if change == "null" else {name: value for name, value in base.items() if name != key}


def theirs(content: dict, folder) -> dict:
    """What transformers makes of a config.json, as JSON with every key."""
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return AutoConfig.from_pretrained(folder).to_dict()


@pytest.mark.parametrize(("model_type", "key", "change"), CASES)
def test_missing_keys_and_null_have_the_meaning_of_the_class_in_transformers(model_type, key, change, tmp_path):
    content = changed(model_type, key, change)
    try:
        full = theirs(content, tmp_path)
        wanted = config_from_json(full)
    except (StrictDataclassError, ConfigError):  # theirs refuses it, or computes with None
        if (model_type, key) in ONLY_OLD:
            assert config_from_json(content).num_kv_heads == 32
            return
        with pytest.raises(ConfigError):
            config_from_json(content)
        return
    assert config_from_json(content) == wanted


@pytest.mark.parametrize(
    ("model_type", "changes", "window"),
    [
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": 9}, 9),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 9}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}, 9),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}, None),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0, "layer_types": None}, 4096),
    ],
)
def test_windows(model_type, changes, window, tmp_path):
    content = {"model_type": model_type, **SIZES, **changes}
    assert config_from_json(content).sliding_window == window
    assert config_from_json(theirs(content, tmp_path)).sliding_window == window


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (mistral, {"sliding_window": None}),
        (mistral, {"head_dim": None, "rope_scaling": None}),
        (qwen2, {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}),
        (llama, {"head_dim": None, "num_key_value_heads": None, "rope_scaling": None, "attention_dropout": None}),
    ],
)
def test_logits_of_folders_with_nulls(make, changes, tmp_path):
    options = {
        key: value
        for key, value in changes.items()
        if key in ("sliding_window", "use_sliding_window", "max_window_layers")
    }
    model = make(**options)
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(content | changes), encoding="utf-8")
    config, weights = from_huggingface(tmp_path)
    ours = GPT(config, Mesh.single())
    ours.load_weights(weights)
    tokens = torch.randint(101, (2, 37), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(tokens), model(tokens).logits, rtol=0, atol=2e-5)


def test_gpt2_takes_the_common_names_of_its_sizes(tmp_path):
    content = {
        "model_type": "gpt2",
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 33,
    }
    config = config_from_json(content)
    assert config == config_from_json(theirs(content, tmp_path))
    assert (config.hidden_size, config.num_layers, config.num_attention_heads, config.max_position_embeddings) == (
        64,
        3,
        4,
        33,
    )


def test_keys_of_another_family_are_not_read():
    """Mistral and Qwen2 have no such keys: transformers builds them without these biases in any case."""
    assert not config_from_json({"model_type": "mistral", **SIZES, "attention_bias": True, "mlp_bias": True}).mlp_bias
    assert not config_from_json({"model_type": "qwen2", **SIZES, "attention_bias": True}).attention_out_bias
