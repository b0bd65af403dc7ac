"""Upstream's description of a model, quirk by quirk."""

from __future__ import annotations

import pytest

from neox.config.gpt_neox.files import translate
from neox.config.gpt_neox.model import expand
from neox.config.gpt_neox.translation import Given
from neox.config.schema import ModelConfig
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from tests.config.gpt_neox.sample_files import BASE, gpt_neox_shapes


def result(changes: dict, native: dict | None = None) -> tuple[dict, list[str], list[str]]:
    """(native key -> value, notes, problems) of the base file with changes; None takes a key out."""
    values = {key: value for key, value in (BASE | changes).items() if value is not None}
    settings, notes, problems = translate(
        {key: Given(value, "a.yml", 1) for key, value in values.items()}, native or {}
    )
    return {".".join(item.path): item.value for item in settings}, notes, [problem.line() for problem in problems]


def model(changes: dict) -> dict:
    settings, _, problems = result(changes)
    assert problems == []
    return {key.removeprefix("model."): value for key, value in settings.items() if key.startswith("model.")}


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({}, "vocab_size", 50304),  # 50,277 ids to a multiple of 128
        ({"model_parallel_size": 2}, "vocab_size", 50432),
        ({"model_parallel_size": 4}, "vocab_size", 50688),
        ({"make_vocab_size_divisible_by": 1}, "vocab_size", 50277),
        ({"tokenizer_type": None, "vocab_file": None}, "vocab_size", 50304),
        ({"bias_gelu_fusion": True}, "activation", "gelu_tanh"),
        ({"bias_gelu_fusion": True, "onnx_safe": True}, "activation", "gelu"),
        ({"bias_gelu_fusion": True, "activation": "relu"}, "activation", "relu"),
        ({}, "activation", "gelu"),
        ({"activation": "swish"}, "activation", "silu"),
        ({"sliding_window_width": 15, "pipe_parallel_size": 1}, "sliding_window", 16),
        ({"sliding_window_width": 15, "attention_config": [[["flash"], "all"]]}, "sliding_window", 16),
        ({"norm": "rmsnorm"}, "norm_eps", 1e-8),
        ({"norm": "rmsnorm", "rms_norm_epsilon": 1e-6}, "norm_eps", 1e-6),
        ({"norm": "te_layernorm"}, "norm", "layernorm"),
        ({"no_weight_tying": None}, "tie_embeddings", True),
        ({"gpt_j_residual": True}, "parallel_residual", True),
        ({"gpt_j_residual": True, "gpt_j_tied": True}, "shared_residual_norm", True),
        ({"gpt_j_tied": True}, "shared_residual_norm", False),
        ({"pos_emb": None}, "position_embedding", "learned"),
        ({"rotary_emb_base": 500000}, "rope_theta", 500000),
        ({"use_bias_in_attn_linear": False}, "attention_out_bias", False),
        ({"init_method": "wang_init"}, "init", "wang_init"),
        ({}, "output_init", "scaled_normal"),
        ({"expansion_factor": 3.5}, "intermediate_size", 168),
        ({"intermediate_size": 100, "mlp_multiple_of": 32}, "intermediate_size", 128),
        (
            {
                "activation": "swiglu",
                "hidden_size": 4096,
                "num_attention_heads": 32,
                "intermediate_size": 32768,
                "mlp_multiple_of": 256,
            },
            "intermediate_size",
            11008,
        ),
        ({"activation": "swiglu", "intermediate_size": 43008}, "intermediate_size", 14336),
        ({"activation": "swiglu", "intermediate_size": 14336, "mlp_multiple_of": 14336}, "intermediate_size", 14336),
        ({"activation": "geglu"}, "intermediate_size", 64),
    ],
)
def test_implicit_behaviour_becomes_a_value(changes, key, value):
    assert model(changes)[key] == value


def test_rotary_options_are_omitted_without_rotary_positions():
    assert {"rotary_pct", "rope_theta"} & set(model({"pos_emb": "alibi"})) == set()


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"activation": "swiglu", "intermediate_size": 14336},
            ["invalid file", "4779 and 4778", "intermediate_size: 43008", "model.intermediate_size=14336"],
        ),
        ({"activation": "mish"}, ["activation", "got='mish'", "swiglu"]),
        ({"norm": "scalenorm"}, ["norm", "layernorm or rmsnorm"]),
        ({"use_bias_in_norms": False}, ["use_bias_in_norms", "rmsnorm"]),
        ({"pos_emb": "rpe"}, ["pos_emb", "got='rpe'"]),
        (
            {"gpt_j_residual": True, "use_bias_in_mlp": False},
            ["GPT-NeoX omits the attention from the sum", "gpt_j_residual", "use_bias_in_mlp: true"],
        ),
        (
            {"sliding_window_width": 15},
            ["pipe_parallel_size: 0 GPT-NeoX ignores the window of global attention", "model.sliding_window=16"],
        ),
        ({"init_method": "orthogonal"}, ["init_method", "model.init"]),
        ({"attention_config": [[["local", "global"], 1]]}, ["attention_config", "local"]),
        (
            {"attention_config": [[["flash"], 3]]},
            ["attention types do not match the layers", "2 types; the list has 3"],
        ),
        ({"attention_config": [["flash", 2]]}, ["cannot parse the attention types"]),
        (
            {"tokenizer_type": "SPMTokenizer", "vocab_file": "x.model"},
            ["vocabulary size is unknown", "x.model", "model.vocab_size"],
        ),
        ({"vocab_file": "other.json"}, ["vocabulary size is unknown"]),
        ({"intermediate_size": 96, "expansion_factor": 2.0}, ["given twice"]),
        ({"hidden_size": "48"}, ["hidden_size", "a number"]),
        ({"expansion_factor": float("inf")}, ["expansion_factor", "a finite number"]),
    ],
)
def test_unsupported_values_are_refused_by_name(changes, parts):
    _, _, problems = result(changes)
    assert problems
    assert all(part in "\n".join(problems) for part in parts)


def test_a_native_key_may_select_a_model_that_gpt_neox_would_not_build():
    changes = {"gpt_j_residual": True, "use_bias_in_mlp": False, "activation": "swiglu"}
    assert result(changes, {("model", "parallel_residual"): True})[2] == []
    assert result(changes | {"gpt_j_residual": False})[2] == []
    assert all(
        result({"sliding_window_width": 15}, {("model", "sliding_window"): value})[2] == [] for value in (16, None)
    )
    assert result(changes | {"use_bias_in_mlp": True})[2] == []


def test_a_native_value_supplies_what_the_file_lacks():
    _, _, problems = result({"activation": "swiglu", "intermediate_size": 14336, "vocab_file": "other.json"})
    assert len(problems) == 2
    native = {("model", "intermediate_size"): 14336, ("model", "vocab_size"): 100}
    assert result({"activation": "swiglu", "intermediate_size": 14336, "vocab_file": "other.json"}, native)[2] == []


def test_notes_describe_the_translation():
    notes = "\n".join(
        result({"bias_gelu_fusion": True, "sliding_window_width": 15, "pipe_parallel_size": 1, "activation": "gelu"})[1]
    )
    assert "gelu_tanh" in notes and "has 16 keys" in notes and "50277 ids padded to a multiple of 128" in notes
    shape = {
        "hidden_size": 8192,
        "num_layers": 48,
        "num_attention_heads": 64,
        "num_kv_heads": 8,
        "mlp_multiple_of": 256,
    }
    gated = "\n".join(result(shape | {"activation": "swiglu"})[1])
    assert "does not describe Code Llama 34B" in gated and "intermediate_size: 66048" in gated


@pytest.mark.parametrize(
    ("hidden", "layers", "heads", "name", "real"),
    [
        (4096, 32, 32, "Llama 7B, Code Llama 7B and Llemma 7B", 11008),
        (4096, 32, 8, "Mistral 7B and Llama 3 8B", 14336),
        (8192, 48, 8, "Code Llama 34B and Llemma 34B", 22016),
        (8192, 80, 8, "Llama 2 70B", 28672),
    ],
)
def test_a_width_that_is_not_the_published_one_is_noted(hidden, layers, heads, name, real):
    shape = {"hidden_size": hidden, "num_layers": layers, "num_attention_heads": 32, "num_kv_heads": heads}
    gated = shape | {"activation": "swiglu", "mlp_multiple_of": 256}
    wrong = f"this file does not describe {name}, whose width is {real}: set intermediate_size: {3 * real} for that"
    assert any(wrong in note for note in result(gated | {"intermediate_size": 768})[1])
    for other in (gated | {"intermediate_size": 3 * real}, gated | {"intermediate_size": 768, "num_layers": 31}):
        assert not any("does not describe" in note for note in result(other)[1])


@pytest.mark.parametrize(
    ("rows", "changes", "size"),
    [
        (50432, {}, 50432),
        (50277, {}, 50277),
        (50276, {}, 50304),  # the tokenizer that the file names has more ids
        (50200, {"tokenizer_type": None}, 50304),
        (50200, {"vocab_file": None, "tokenizer_type": "GPT2BPETokenizer"}, 50304),
        (50200, {"vocab_file": None, "tokenizer_type": None}, 50200),  # only the default has more
        (512, {"vocab_file": "other.json"}, 512),
    ],
)
def test_rows_of_a_checkpoint_are_its_vocabulary(rows, changes, size):
    values = {key: value for key, value in (BASE | changes).items() if value is not None}
    given = {key: Given(value, "a.yml", 1) for key, value in values.items()}
    settings, notes, problems = translate(given, {}, rows)
    assert problems == []
    assert {".".join(item.path): item.value for item in settings}["model.vocab_size"] == size
    assert any("the embedding rows of the checkpoint" in note for note in notes) == (size == rows)


def test_the_vocabulary_is_padded_for_every_tensor_parallel_size():
    sizes = [model({"model_parallel_size": size})["vocab_size"] for size in (None, 1, 2, 4)]
    assert sizes == [50304, 50304, 50432, 50688]


def test_an_existing_tokenizer_gives_the_vocabulary_size(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text('{"model": {"vocab": {"a": 0, "b": 299}}}')
    settings, _, problems = result({"vocab_file": str(file)})
    assert (settings["model.vocab_size"], settings["tokenizer.file"], problems) == (384, str(file), [])


@pytest.mark.parametrize(
    ("config", "layers", "kinds"),
    [
        ([[["global"], 2]], 2, ["global"] * 2),
        ([[["local", "flash"], 2]], 4, ["local", "flash"] * 2),
        ([[["flash"], "all"]], 3, ["flash"] * 3),
        ([[["global"], 1], [["flash"], "all"]], 3, ["global", "flash", "flash"]),
        (["flash", "flash"], 2, ["flash", "flash"]),
    ],
)
def test_attention_types_are_repeated(config, layers, kinds):
    assert expand(config, layers) == kinds


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gpt_j_residual": True, "gpt_j_tied": True},
        {"pos_emb": "learned", "no_weight_tying": False},
        {
            "norm": "rmsnorm",
            "activation": "swiglu",
            "use_bias_in_attn_linear": False,
            "use_bias_in_mlp": False,
            "num_kv_heads": 2,
            "mlp_multiple_of": 16,
        },
        {"activation": "geglu", "intermediate_size": 96},
    ],
)
def test_parameters_have_the_shapes_that_gpt_neox_builds(changes):
    fields = model(changes)
    shapes = [tuple(layout.shape) for layout in GPT(ModelConfig(**fields), Mesh.single("meta")).shard_specs().values()]
    assert sorted(shapes) == gpt_neox_shapes(BASE | changes, fields["vocab_size"])
