"""Every shipped config: loads, validates, has the published shape, parameter count and training settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

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


PYTHIA = {name: name.split("/")[1].replace("-", ".") for name in WITH_A_COUNT if name.startswith("pythia/")}


def upstream_yaml(path: Path) -> dict:
    """An upstream config as a flat mapping with underscores; one published file lacks a comma."""
    text = path.read_text().replace('[[["flash"], 36]]\n', '[[["flash"], 36]],\n')
    return {key.replace("-", "_"): value for key, value in yaml.safe_load(text).items()}


@pytest.mark.parametrize("name", sorted(PYTHIA))
def test_pythia_is_trained_as_published(name, shared_data):
    size = PYTHIA[name]
    theirs = upstream_yaml(shared_data / "upstream-configs" / "pythia" / "models" / size / f"pythia-{size.lower()}.yml")
    config = load([name]).config
    params = theirs["optimizer"]["params"]
    ours = {
        "num_layers": config.model.num_layers,
        "hidden_size": config.model.hidden_size,
        "num_attention_heads": config.model.num_attention_heads,
        "seq_length": config.data.seq_length,
        "max_position_embeddings": config.model.max_position_embeddings,
        "rotary_pct": config.model.rotary_pct,
        "no_weight_tying": not config.model.tie_embeddings,
        "gpt_j_residual": config.model.parallel_residual,
        "min_lr": config.schedule.min_lr,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "train_iters": config.train.train_iters,
        "lr_decay_iters": config.schedule.decay_iters,
        "weight_decay": config.optimizer.weight_decay,
        "gradient_clipping": config.optimizer.gradient_clipping,
    }
    assert {key: theirs[key] for key in ours} == ours
    assert (params["lr"], tuple(params["betas"]), params["eps"]) == (
        config.optimizer.lr,
        config.optimizer.betas,
        config.optimizer.eps,
    )
    assert theirs["warmup"] * theirs["train_iters"] == config.schedule.warmup_iters
    assert (theirs.get("init_method", "normal"), theirs.get("output_layer_init_method", "scaled_normal")) == (
        config.model.init,
        config.model.output_init,
    )


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("neox-20b", "20B"),
        ("1-3B", "1-3B"),
        ("gpt3/125M", "125M"),
        ("gpt3/2-7B", "2-7B"),
        ("gpt3/13B", "13B"),
        ("gpt3/175B", "175B"),
    ],
)
def test_shape_is_the_one_of_the_yaml_of_that_name(name, file, shared_data):
    theirs = upstream_yaml(shared_data / "upstream-configs" / "gpt-neox" / "configs" / f"{file}.yml")
    config = load([name]).config
    for key in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"):
        assert dict(config.model)[key] == theirs[key]
    assert config.optimizer.lr == theirs["optimizer"]["params"]["lr"]
