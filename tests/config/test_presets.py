"""Every shipped config: loads, validates, has the published shape, parameter count and training settings."""

from __future__ import annotations

import pytest

from neox.config.files import PRESETS
from neox.config.load import load, loads
from neox.config.schema import ModelConfig
from neox.config.validate import validate
from neox.config.values import dump
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh

# Published counts, embeddings included (Pythia: arXiv 2304.01373, table 1 and the model cards; the others: the model
# cards' weights). GPT-3's are printed as rounded in the paper: computed from its shapes.
PARAMETERS = {
    "pythia/14M": 14_067_712,
    "pythia/31M": 30_494_720,
    "pythia/70M": 70_426_624,
    "pythia/160M": 162_322_944,
    "pythia/410M": 405_334_016,
    "pythia/1B": 1_011_781_632,
    "pythia/1-4B": 1_414_647_808,
    "pythia/2-8B": 2_775_208_960,
    "pythia/6-9B": 6_857_302_016,
    "pythia/12B": 11_846_072_320,
    "neox-20b": 20_554_567_680,
    "gpt3/125M": 125_226_240,
    "gpt3/350M": 355_871_744,
    "gpt3/760M": 760_300_032,
    "gpt3/1-3B": 1_315_723_264,
    "gpt3/2-7B": 2_651_553_280,
    "gpt3/6-7B": 6_658_404_352,
    "gpt3/13B": 12_853_386_240,
    "gpt3/175B": 174_604_259_328,
    "1-3B": 1_414_647_808,
    "llama/7B": 6_738_415_616,
    "llama/2-7B": 6_738_415_616,
    "llama/3-8B": 8_030_261_248,
    "mistral/7B": 7_241_732_096,
    "qwen3/0-6B": 596_049_920,
    "stablelm/3B-4E1T": 2_795_443_200,
}
WITH_A_COUNT = sorted(PARAMETERS)
SHIPPED = sorted(str(path.relative_to(PRESETS).with_suffix("")) for path in PRESETS.glob("**/*.yml"))
OF_THE_DEMO = ["demo"]  # the demo creates its vocabulary and data


def count_parameters(model: ModelConfig) -> int:
    """Parameters of an architecture by arithmetic alone, without padding of the vocabulary."""
    h, d, f = model.hidden_size, model.head_dim, model.intermediate_size
    norm = 2 * h if model.norm == "layernorm" else h
    qkv_rows = (model.num_attention_heads + 2 * model.num_kv_heads) * d
    attention = (
        h * qkv_rows + qkv_rows * model.qkv_bias + model.num_attention_heads * d * h + h * model.attention_out_bias
    )
    attention += 2 * d if model.qk_norm else 0
    mlp = (3 if model.gated else 2) * h * f + (((2 if model.gated else 1) * f + h) if model.mlp_bias else 0)
    norms = norm if model.shared_residual_norm else 2 * norm
    embeddings = model.vocab_size * h * (1 if model.tie_embeddings else 2)
    positions = model.max_position_embeddings * h if model.position_embedding == "learned" else 0
    return model.num_layers * (attention + mlp + norms) + embeddings + positions + norm


def test_every_shipped_config_is_listed_with_its_count():
    assert sorted([*WITH_A_COUNT, *OF_THE_DEMO]) == SHIPPED or WITH_A_COUNT == SHIPPED


@pytest.mark.parametrize("name", WITH_A_COUNT)
def test_loads_by_its_bare_name_validates_and_round_trips(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = load([f"{name}.yml"], ["data.train=[corpus]"])
    validate(loaded.config, 1, "cpu", loaded.origins)
    validate(loaded.config, 8, "cuda", loaded.origins)
    assert loads(dump(loaded.config)) == loaded.config
    assert str(loaded.origins["model.hidden_size"]).startswith(str(PRESETS / name))


@pytest.mark.parametrize("name", WITH_A_COUNT)
def test_parameter_count_is_the_published_one(name):
    assert count_parameters(load([name]).config.model) == PARAMETERS[name]


@pytest.mark.parametrize("name", WITH_A_COUNT)
def test_the_model_is_built_with_that_count(name):
    assert GPT(load([name]).config.model, Mesh.single("meta")).num_parameters() == PARAMETERS[name]


# The published training files (EleutherAI/pythia, models/): layers, width, heads, lr, min_lr, micro batch per GPU
PYTHIA = {
    "14M": (6, 128, 4, 1e-3, 1e-4, 32),
    "31M": (6, 256, 8, 1e-3, 1e-4, 32),
    "70M": (6, 512, 8, 1e-3, 1e-4, 32),
    "160M": (12, 768, 12, 6e-4, 6e-5, 32),
    "410M": (24, 1024, 16, 3e-4, 3e-5, 32),
    "1B": (16, 2048, 8, 2.5e-4, 2.5e-5, 16),
    "1-4B": (24, 2048, 16, 2e-4, 2e-5, 16),
    "2-8B": (32, 2560, 32, 1.6e-4, 1.6e-5, 16),
    "6-9B": (32, 4096, 32, 1.2e-4, 1.2e-5, 8),
    "12B": (36, 5120, 40, 1.2e-4, 1.2e-5, 8),
}


@pytest.mark.parametrize("size", PYTHIA)
def test_pythia_is_trained_as_published(size):
    config = load([f"pythia/{size}"]).config
    assert (
        config.model.num_layers,
        config.model.hidden_size,
        config.model.num_attention_heads,
        config.optimizer.lr,
        config.schedule.min_lr,
        config.train.micro_batch_size,
    ) == PYTHIA[size]
    assert config.data.seq_length == config.model.max_position_embeddings == 2048
    assert (config.model.rotary_pct, config.model.tie_embeddings, config.model.parallel_residual) == (0.25, False, True)
    large = size in ("6-9B", "12B")
    assert (config.model.init, config.model.output_init) == (
        ("normal", "scaled_normal") if large else ("small_init", "wang_init")
    )
    assert config.train.train_iters == config.schedule.decay_iters == 143_000
    assert config.schedule.warmup_iters == 0.01 * 143_000
    assert (config.optimizer.betas, config.optimizer.eps) == ((0.9, 0.95), 1e-8)
    assert (config.optimizer.weight_decay, config.optimizer.gradient_clipping) == (0.1, 1.0)


@pytest.mark.parametrize(
    ("name", "published"),  # GPT-NeoX's configs/: layers, width, heads, positions, lr
    [
        ("neox-20b", (44, 6144, 64, 2048, 9.7e-5)),
        ("1-3B", (24, 2048, 16, 2048, 2e-4)),
        ("gpt3/125M", (12, 768, 12, 2048, 6e-4)),
        ("gpt3/2-7B", (32, 2560, 32, 2048, 1.6e-4)),
        ("gpt3/13B", (40, 5120, 40, 2048, 1e-4)),
        ("gpt3/175B", (96, 12288, 96, 2048, 6e-5)),
    ],
)
def test_shape_and_rate_are_those_of_the_published_file(name, published):
    config = load([name]).config
    shape = (config.model.num_layers, config.model.hidden_size, config.model.num_attention_heads)
    assert (*shape, config.model.max_position_embeddings, config.optimizer.lr) == published
