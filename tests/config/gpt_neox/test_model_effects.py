"""The complete effect of a key of a model: every native value that it changes, every note and every problem."""

from __future__ import annotations

import pytest

from neox.config.gpt_neox.files import translate
from neox.config.gpt_neox.keys import GPT_NEOX_KEYS
from neox.config.gpt_neox.model import expand
from neox.config.gpt_neox.translation import DEFAULT, Given
from tests.config.gpt_neox.sample_files import BASE
from tests.config.gpt_neox.test_model import result

PLAIN = result({})[0]
PADDED = "model.vocab_size: 50304, the 50277 ids padded to a multiple of 128, as in the weights of GPT-NeoX"
UNKNOWN_SIZE = (
    "vocabulary size is unknown; where=a.yml:1 vocab_file; got='x.json'; want=vocab_file: a `tokenizers` JSON file; "
    "do=--set model.vocab_size=... or tokenizer.file=..."
)
FLASH = {"attention_config": [[["flash"], "all"]]}


def effect(changes: dict, native: dict | None = None) -> dict:
    """The values below `model.` and `tokenizer.` that changes of the base file give or change; None for one taken."""
    values, _, problems = result(changes, native)
    assert problems == []
    missing = dict.fromkeys(PLAIN.keys() - values.keys())
    changed = missing | {key: value for key, value in values.items() if key not in PLAIN or PLAIN[key] != value}
    return {key.removeprefix("model."): value for key, value in changed.items()}


def test_the_values_of_the_base_file():
    """Defaults of GPT-NeoX's argument classes, and the keys of the file."""
    model = {key.removeprefix("model."): value for key, value in PLAIN.items() if key.startswith("model.")}
    assert model == {
        "num_layers": 2,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "parallel_residual": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_std": 0.02,
        "mlp_bias": True,
        "shared_residual_norm": False,
        "tie_embeddings": False,
        "init": "normal",
        "output_init": "scaled_normal",
        "norm": "layernorm",
        "norm_eps": 1e-5,
        "activation": "gelu",
        "intermediate_size": 192,
        "position_embedding": "rotary",
        "rotary_pct": 0.5,
        "rope_theta": 10000,
        "qkv_bias": True,
        "attention_out_bias": True,
        "vocab_size": 50304,
    }


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"num_layers": 3}, {"num_layers": 3}),
        ({"num_kv_heads": 2}, {"num_kv_heads": 2}),
        ({"hidden_dropout": 0.1}, {"hidden_dropout": 0.1}),
        ({"attention_dropout": 0.1}, {"attention_dropout": 0.1}),
        ({"init_method_std": 0.1}, {"init_std": 0.1}),
        ({"use_bias_in_mlp": False}, {"mlp_bias": False}),
        ({"use_bias_in_attn_linear": False}, {"qkv_bias": False, "attention_out_bias": False}),
        ({"gpt_j_tied": True}, {}),
        ({"gpt_j_residual": True}, {"parallel_residual": True}),
        ({"gpt_j_residual": True, "gpt_j_tied": True}, {"parallel_residual": True, "shared_residual_norm": True}),
        ({"no_weight_tying": False}, {"tie_embeddings": True}),
        *(({"init_method": name}, {"init": name}) for name in ("scaled_normal", "small_init", "wang_init")),
        *(({"output_layer_init_method": name}, {"output_init": name}) for name in ("normal", "small_init")),
        ({"layernorm_epsilon": 3}, {"norm_eps": 3}),
        ({"rms_norm_epsilon": 3}, {}),
        ({"norm": "rmsnorm", "layernorm_epsilon": 3}, {"norm": "rmsnorm", "norm_eps": 1e-8}),
        ({"norm": "TE_RMSNorm", "use_bias_in_norms": False}, {"norm": "rmsnorm", "norm_eps": 1e-8}),
        *(
            ({"activation": theirs}, {"activation": ours})
            for theirs, ours in {"relu": "relu", "SiLU": "silu", "swish": "silu"}.items()
        ),
        ({"activation": "GELU", "bias_gelu_fusion": True}, {"activation": "gelu_tanh"}),
        ({"onnx_safe": True}, {}),
        # the width of the MLP: hidden_size is 48
        ({"intermediate_size": 100}, {"intermediate_size": 100}),
        ({"expansion_factor": 3}, {"intermediate_size": 144}),
        ({"expansion_factor": 2.71}, {"intermediate_size": 130}),  # 130.08
        ({"mlp_multiple_of": 32}, {}),
        ({"intermediate_size": 193, "mlp_multiple_of": 64}, {"intermediate_size": 256}),
        ({"intermediate_size": 128, "mlp_multiple_of": 64}, {"intermediate_size": 128}),
        ({"activation": "swiglu"}, {"activation": "swiglu", "intermediate_size": 64}),
        ({"activation": "reglu", "mlp_multiple_of": 24}, {"activation": "reglu", "intermediate_size": 72}),
        ({"activation": "geglu", "expansion_factor": 6}, {"activation": "geglu", "intermediate_size": 96}),
        # positions and attention
        *(
            ({"pos_emb": kind}, {"position_embedding": kind, "rotary_pct": None, "rope_theta": None})
            for kind in ("learned", "alibi", "none")
        ),
        ({"rotary_pct": None}, {"rotary_pct": 1.0}),
        (FLASH, {}),
        ({"attention_config": ["flash", "global"]}, {}),
        ({"sliding_window_width": 0, **FLASH}, {"sliding_window": 1}),
        ({"sliding_window_width": 5, "pipe_parallel_size": 1}, {"sliding_window": 6, "parallel.pipeline": None}),
        # vocabulary: 50277 ids
        ({"make_vocab_size_divisible_by": 50277}, {"vocab_size": 50277}),
        ({"make_vocab_size_divisible_by": 50276}, {"vocab_size": 100552}),
        ({"model_parallel_size": 0}, {}),
        ({"tokenizer_type": "HFGPT2Tokenizer", "vocab_file": None, "make_vocab_size_divisible_by": 1},
         {"vocab_size": 50257}),
    ],
    ids=lambda value: ",".join(value)[:60],
)  # fmt: skip
def test_a_key_has_its_effect_and_no_other(changes, wanted):
    found = effect(changes)
    assert found == {key: value for key, value in wanted.items() if key != "parallel.pipeline"}


@pytest.mark.parametrize(
    ("changes", "native", "problem"),
    [
        ({"init_method": "x"}, "model.init", "initialisation is not supported; where=a.yml:1 init_method; got='x'; "
         "want=normal, scaled_normal, small_init, wang_init; do=--set model.init=..."),
        ({"output_layer_init_method": "x"}, "model.output_init", "initialisation is not supported; "
         "where=a.yml:1 output_layer_init_method; got='x'; want=normal, scaled_normal, small_init, wang_init; "
         "do=--set model.output_init=..."),
        ({"norm": "x"}, None, "norm is not supported; where=a.yml:1 norm; got='x'; want=layernorm or rmsnorm"),
        ({"use_bias_in_norms": False}, None, "layernorm without a bias is not supported; where=a.yml:1 "
         "use_bias_in_norms; got=false; want=true, or norm: rmsnorm"),
        ({"activation": "x"}, None, "activation is not supported; where=a.yml:1 activation; got='x'; "
         "want=gelu, relu, silu, swish, geglu, reglu, swiglu"),
        ({"intermediate_size": 96, "expansion_factor": 2}, "model.intermediate_size", "MLP width is given twice; "
         "where=a.yml:1 expansion_factor; got=2; want=intermediate_size or expansion_factor"),
        ({"intermediate_size": 65, "mlp_multiple_of": 64, "activation": "swiglu"}, None, None),
        ({"intermediate_size": 65, "mlp_multiple_of": 32}, "model.intermediate_size", "invalid file: GPT-NeoX gives "
         "the two MLP matrices different widths, 128 and 96; where=a.yml:1 intermediate_size; got=65; want=one width "
         "for both; do=intermediate_size: 195 for a gated width of 65, or --set model.intermediate_size=65"),
        ({"mlp_multiple_of": 64, "hidden_size": 80}, "model.intermediate_size", "invalid file: GPT-NeoX gives the two "
         "MLP matrices different widths, 384 and 320; where=a.yml:1 hidden_size; got=80; want=one width for both; "
         "do=intermediate_size: 960 for a gated width of 320, or --set model.intermediate_size=320"),
        ({"pos_emb": "rpe"}, "model.position_embedding", "position embedding is not supported; where=a.yml:1 pos_emb; "
         "got='rpe'; want=rotary, learned, alibi or none"),
        ({"attention_config": ["flash"]}, "model.num_layers", "invalid file: attention types do not match the layers; "
         "where=a.yml:1 attention_config; got=['flash']; want=2 types; the list has 1"),
        ({"attention_config": [[["local", "bsl"], 1]]}, None, "attention is not supported: bsl, local; where=a.yml:1 "
         "attention_config; got=[[['local', 'bsl'], 1]]; want=global or flash in every layer"),
        ({"sliding_window_width": 7}, "model.sliding_window", "with pipe_parallel_size: 0 GPT-NeoX ignores the window "
         "of global attention; where=a.yml:1 sliding_window_width; got=7; want=pipe_parallel_size: 1, flash attention, "
         "or no sliding_window_width; do=--set model.sliding_window=8 trains with the window, unlike GPT-NeoX; =null "
         "trains without, like GPT-NeoX"),
        ({"vocab_file": "x.json"}, "model.vocab_size", UNKNOWN_SIZE),
        ({"vocab_file": "x.json"}, "tokenizer.file", UNKNOWN_SIZE),
    ],
    ids=lambda value: ",".join(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_problem_is_reported_unless_a_native_key_decides(changes, native, problem):
    assert result(changes)[2] == ([] if problem is None else [f"error[2] {problem}"])
    if native is not None:
        assert result(changes, {tuple(native.split(".")): 2})[2] == []
    elif problem is not None:
        assert len(result(changes, {("model", name): 2 for name in ("norm", "activation", "init")})[2]) == 1


@pytest.mark.parametrize(
    ("changes", "notes"),
    [
        ({}, []),
        ({"gpt_j_tied": True}, ["a.yml:1 gpt_j_tied: no effect without gpt_j_residual, as in GPT-NeoX"]),
        ({"gpt_j_tied": True, "gpt_j_residual": True}, []),
        ({"bias_gelu_fusion": True}, ["a.yml:1 bias_gelu_fusion: GPT-NeoX's fused kernel computes the tanh form of "
                                      "GeLU: model.activation: gelu_tanh"]),
        ({"bias_gelu_fusion": True, "activation": "relu"}, []),
        ({"sliding_window_width": 7, **FLASH}, ["a.yml:1 sliding_window_width: a window of 7 in GPT-NeoX has 8 keys, "
                                                "the query itself included: model.sliding_window: 8"]),
        ({"activation": "swiglu", "intermediate_size": 96}, ["a.yml:1 intermediate_size: gated: GPT-NeoX computes a "
         "width of 32 from 96 (a third, rounded up to mlp_multiple_of 1)"]),
    ],
    ids=lambda value: ",".join(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_the_notes_of_a_model(changes, notes):
    found = [note for note in result(changes)[1] if "vocab_file" not in note]
    assert found == [*notes, PADDED]


def test_the_notes_of_a_vocabulary():
    def notes(changes: dict) -> list[str]:
        return result({"make_vocab_size_divisible_by": 1} | changes)[1]

    assert notes({}) == [
        "a.yml:1 vocab_file: file not found; assumed to be the tokenizer of GPT-NeoX-20B. Generation from text needs "
        "tokenizer.file"
    ]
    end = "50257 ids; set tokenizer.file to generate from text, or to use another tokenizer"
    assert notes({"vocab_file": None, "tokenizer_type": "HFGPT2Tokenizer"}) == [
        f"tokenizer_type is HFGPT2Tokenizer: {end}"
    ]
    assert notes({"vocab_file": None, "tokenizer_type": None}) == [
        f"tokenizer_type is by default GPT2BPETokenizer: {end}"
    ]
    padded = result({"model_parallel_size": 2, "make_vocab_size_divisible_by": 100})[1]
    assert padded[-1] == (
        "model.vocab_size: 50400, the 50277 ids padded to a multiple of 200, as in the weights of GPT-NeoX"
    )


@pytest.mark.parametrize(
    ("config", "layers", "kinds"),
    [
        ([], 2, []),
        ([[["a", "b"], "all"]], 5, ["a", "b"] * 2),  # rounded down
        ([[["a"], 3], [["b"], "all"]], 3, ["a"] * 3),
        ([[["a"], 4], [["b"], "all"]], 3, ["a"] * 4),
        (["a", [["b"], 2], "c"], 4, ["a", "b", "b", "c"]),
        ([[["a"], 0]], 4, []),
        ([[["a"], "all"]], None, []),
    ],
)
def test_attention_types_of_every_layer(config, layers, kinds):
    assert expand(config, layers) == kinds


@pytest.mark.parametrize(
    "config", ["flash", {}, [3], [["a", 2]], [[["a"]]], [[["a"], 1, 2]], [[[], 2]], [[["a"], "x"]]]
)
def test_attention_types_in_another_form(config):
    with pytest.raises(ValueError, match="times a number or all"):
        expand(config, 2)


def test_model_values_have_the_line_of_the_key_that_they_come_from():
    changes = {
        "gpt_j_residual": True,
        "gpt_j_tied": True,
        "init_method": "normal",
        "norm": "layernorm",
        "layernorm_epsilon": 1,
        "bias_gelu_fusion": True,
        "expansion_factor": 3,
        "rotary_emb_base": 5,
        "use_bias_in_attn_linear": True,
        "sliding_window_width": 3,
        **FLASH,
    }
    given = {key: Given(value, "a.yml", line) for line, (key, value) in enumerate((BASE | changes).items(), 1)}
    settings, _, problems = translate(given, {})
    assert problems == []
    names = {item.line: key for key, item in given.items()}
    sources = {".".join(item.path).removeprefix("model."): names.get(item.line) for item in settings}
    expected = {
        "num_layers": "num_layers",
        "mlp_bias": None,
        "parallel_residual": "gpt_j_residual",
        "shared_residual_norm": "gpt_j_tied",
        "tie_embeddings": "no_weight_tying",
        "init": "init_method",
        "output_init": None,
        "norm": "norm",
        "norm_eps": "layernorm_epsilon",
        "activation": "bias_gelu_fusion",
        "intermediate_size": "expansion_factor",
        "position_embedding": "pos_emb",
        "rotary_pct": "rotary_pct",
        "rope_theta": "rotary_emb_base",
        "qkv_bias": "use_bias_in_attn_linear",
        "attention_out_bias": "use_bias_in_attn_linear",
        "sliding_window": "sliding_window_width",
        "vocab_size": "vocab_file",
    }
    assert {key: sources[key] for key in expected} == expected
    assert all((item.source == DEFAULT) == (item.line == 0) for item in settings)


def test_every_renamed_key_is_copied_to_its_native_key():
    """With the default of GPT-NeoX if the file lacks it, and without a value if there is no default."""
    renamed = {name: rule for name, rule in GPT_NEOX_KEYS.items() if rule.kind == "renamed"}
    numbers = {name: 100 + index for index, name in enumerate(renamed)}
    given = {name: Given(value, "a.yml", 3) for name, value in (numbers | {"seed": None}).items()}
    settings, _, _ = translate(given, {})
    values = {".".join(item.path): item.value for item in settings}
    for name, rule in renamed.items():
        assert values[rule.to[0]] == (1234 if name == "seed" else numbers[name]), name
    assert "data.path" not in PLAIN and PLAIN["train.seed"] == 1234
