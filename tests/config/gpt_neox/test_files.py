"""Loading of GPT-NeoX files: detection, merging, layers, errors, and every file that GPT-NeoX and Pythia ship."""

from __future__ import annotations

import pytest
import yaml

from neox.config.gpt_neox.files import collect, is_gpt_neox
from neox.config.load import Loaded, load
from neox.config.parse import Reader
from neox.errors import ConfigError, NeoxError
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from tests.config.gpt_neox.sample_files import BASE, flow_text, gpt_neox_shapes


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def _write(name: str, values: dict, dash: bool = False) -> str:
        (tmp_path / name).write_text(flow_text(values, dash))
        return name

    return _write


def leaves(text: str):
    return Reader("x").read(text)


@pytest.mark.parametrize(
    ("text", "detected"),
    [
        ('{"num-layers": 2, "hidden-size": 8}', True),
        ("num_layers: 2", True),
        ("{optimizer: {type: Adam, params: {lr: 1e-3}}}", True),
        ("precision: bfloat16", True),
        ("{precision: bfloat16, seed: 3}", True),
        ("model: {num_layers: 2}", False),
        ("model: {vocab_size: 8}\nnum_layers: 3", False),
        ("optimizer: {type: adamw, lr: 1e-3}", False),
        ("precision: {dtype: fp32}", False),
        ("include: other.yml", False),
        ("lern_rate: 3", False),
        ("deepspeed: true", True),
        ("profile: true", True),
        ("deepspeed: {}", False),
        ("deepspeed: {flops_profiler: {enabled: true}}", False),
        ("precision: null", False),
        ("profile: null", False),
    ],
)
def test_detection_of_gpt_neox_files(text, detected):
    assert is_gpt_neox(leaves(text)) is detected


def test_values_below_a_key_are_nested_again():
    given = collect(leaves('a: 1\n"fp16": {"enabled": True, "loss_scale": 0}\n'), "f.yml")
    assert given["fp16"].value == {"enabled": True, "loss_scale": 0}
    assert (given["fp16"].source, given["fp16"].line) == ("f.yml", 2)
    block = collect(leaves("fp16:\n  enabled: true\n  loss_scale: 0\nnum_layers: 2\n"), "f.yml")
    assert (block["fp16"].line, block["num_layers"].line) == (2, 4)


@pytest.mark.parametrize("dash", [False, True])
def test_flow_style_hyphens_comments_and_booleans(write, dash):
    config = load([write("a.yml", BASE, dash)]).config
    assert (config.model.num_layers, config.model.hidden_size, config.model.tie_embeddings) == (2, 48, False)
    assert config.data.order == "neox"
    assert config.train.micro_batch_size == 4


def test_files_are_merged_and_the_later_one_wins(write):
    write("a.yml", BASE)
    write("b.yml", {"seq-length": 32, "data-path": "corpus", "hidden_size": 96})
    config = load(["a.yml", "b.yml"]).config
    assert (config.data.seq_length, config.data.path, config.model.hidden_size) == (32, "corpus", 96)
    # values that depend on several keys are computed after all files are read
    assert config.model.intermediate_size == 4 * 96


def test_native_files_and_settings_take_precedence(write, tmp_path):
    write("a.yml", BASE)
    (tmp_path / "mine.yml").write_text("train: {train_iters: 7}\nrun: {dir: here}\n")
    loaded = load(["a.yml", "mine.yml"], ["model.num_layers=3"])
    assert (loaded.config.train.train_iters, loaded.config.run.dir, loaded.config.model.num_layers) == (7, "here", 3)
    assert str(loaded.origins["model.num_layers"]) == "--set"
    assert [str(origin) for origin, _ in loaded.origins["model.num_layers"].overridden] == ["a.yml:3"]
    assert str(loaded.origins["model.hidden_size"]) == "a.yml:4"
    assert str(loaded.origins["optimizer.lr"]) == "GPT-NeoX default"


def refusal(*files: str, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load(files, overrides)
    return caught.value.line()


def test_a_gpt_neox_file_after_a_native_one_is_refused(write, tmp_path):
    write("a.yml", BASE)
    (tmp_path / "mine.yml").write_text("train: {train_iters: 7}\n")
    assert (
        "files out of order; where=a.yml; got=a GPT-NeoX file after mine.yml; want=GPT-NeoX files before native ones"
        in refusal("mine.yml", "a.yml")
    )


def test_a_partial_config_names_the_missing_keys(write):
    text = refusal(write("a.yml", {"data_path": "x", "hidden_size": 8}))
    assert (
        "incomplete GPT-NeoX config; where=a.yml; want=num_layers, num_attention_heads, max_position_embeddings" in text
    )


def test_all_problems_are_reported_at_once_with_their_lines(write):
    text = refusal(
        write("a.yml", BASE | {"atention_dropout": 0.1, "moe_num_experts": 8, "use_mup": True, "hidden_dropout": "x"})
    )
    lines = text.splitlines()
    assert len(lines) == 4
    assert (
        "unknown key of GPT-NeoX; where=a.yml:15 atention_dropout; got=0.1; do=did you mean attention_dropout?" in text
    )
    assert "where=a.yml:16 moe_num_experts; got=8" in text and "where=a.yml:17 use_mup" in text
    assert "where=a.yml:18 model.hidden_dropout" in text


def test_a_missing_comma_is_reported():
    reader = Reader("a.yml")
    reader.read('{"a": 1\n "b": 2}')
    assert "a.yml:2" in reader.problems[0].line() and "comma" in reader.problems[0].line()


PARTIAL_FILES = [
    "cpu_mock_config",
    "docker/pythia-paths",
    "eleutherai_cluster",
    "llama/train_config",
    "local_setup",
    "local_setup_comet",
    "local_setup_wandb",
    "prof",
    "slurm_local",
    "sparse",
    "text_generation",
]
REFUSED_FILES = {  # file -> key in the error
    "configs/125M-dmoe": "moe_num_experts",
    "configs/gmlp_small": "attention_config",
    "configs/rwkv/170M": "attention_config",
    "configs/mistral/7B": "intermediate_size",
    "configs/llemma/7B": "decay_lr_to",
    "configs/llemma/34B": "attention_type",
    "models/12B/pythia-12b-deduped": "attention_config",
    "models/12B/pythia-12b": "not YAML",
    **{f"configs/mamba/mamba-{size}": "attention_config" for size in ("130M", "370M", "790M", "1.4B", "2.8B")},
    **{f"post-training/configs/llama3-8b-{kind}": "train_impl" for kind in ("kto", "reinforce")},
    **{f"configs/{name}": "incomplete GPT-NeoX config" for name in PARTIAL_FILES},
}
INVALID_FILES = ("configs/mistral/7B", "configs/llemma/7B", "configs/llemma/34B", "models/12B/pythia-12b-deduped")


def load_shipped(path) -> Loaded:
    """Load a shipped file. If it does not define the vocabulary size, use 50304."""
    try:
        return load([path])
    except NeoxError as error:
        if "vocabulary size is unknown" not in error.line():
            raise
        return load([path], ["model.vocab_size=50304"])


def test_every_shipped_file_loads_to_its_model_or_is_refused_by_name(shared_data):
    folder = shared_data / "upstream-configs"
    paths = {
        str(path.relative_to(folder).with_suffix("")).partition("/")[2]: path
        for path in sorted(folder.glob("**/*.yml"))
    }
    assert len(paths) == 84
    loaded_count = 0
    for name, path in paths.items():
        if name in REFUSED_FILES:
            with pytest.raises(ConfigError) as caught:
                load_shipped(path)
            assert REFUSED_FILES[name] in caught.value.line(), name
            assert ("invalid file" in caught.value.line()) == (name in INVALID_FILES), name
            continue
        config = load_shipped(path).config
        values = {key.replace("-", "_"): value for key, value in yaml.safe_load(path.read_text()).items()}
        model = GPT(config.model, Mesh.single("meta"))
        assert sorted(tuple(layout.shape) for layout in model.shard_specs().values()) == gpt_neox_shapes(
            values, config.model.vocab_size
        ), name
        loaded_count += 1
    assert loaded_count == 84 - len(REFUSED_FILES)


GATED = BASE | {"norm": "rmsnorm", "activation": "swiglu", "use_bias_in_attn_linear": False, "mlp_multiple_of": 256}


@pytest.mark.parametrize(
    ("shape", "real"),  # layers, width, heads, KV heads as in GPT-NeoX's files for Code Llama
    [((48, 8192, 64, 8), 22016), ((32, 4096, 32, None), 11008)],
    ids=["34B", "7B"],
)
def test_a_note_names_files_that_describe_another_model(write, shape, real):
    names = ("num_layers", "hidden_size", "num_attention_heads", "num_kv_heads")
    file = write("llama.yml", GATED | {key: value for key, value in zip(names, shape, strict=True) if value})
    loaded = load([file], ["model.vocab_size=32000"])
    assert any(f"whose width is {real}" in note for note in loaded.notes)
    right = load([file], ["model.vocab_size=32000", f"model.intermediate_size={real}"])
    assert right.config.model.intermediate_size == real


def pairs(folder: str) -> dict[str, object]:
    """The data keys of GPT-NeoX's file for an objective on pairs."""
    kinds = {"pos": "chosen", "neg": "rejected"}
    files = {"train": "train", "valid": "val", "test": "val"}
    return {"dataset_impl": "pairwise", "allow_chopped": False} | {
        f"{side}_{part}_{label}data_paths": [f"data/{folder}_{file}_{kind}_{label}document"]
        for side, kind in kinds.items()
        for part, file in files.items()
        for label in ("", "label_")
    }


def test_post_training_files_set_objective_and_data(write):
    sft = {f"{part}_data_paths": [f"data/sft_{part}_document"] for part in ("train", "valid", "test")}
    sft |= {f"{part}_label_data_paths": [f"data/sft_{part}_label_document"] for part in ("train", "valid", "test")}
    kinds = {
        "sft": sft,
        "dpo": {"train_impl": "dpo", "dpo_fp32": True, "dpo_beta": 0.01, **pairs("dpo")},
        "rm": {"train_impl": "rm", **pairs("rm")},
    }
    read = {
        kind: load([write(f"{kind}.yml", BASE | {"pack_impl": "unpacked"} | values)], ["model.vocab_size=32000"]).config
        for kind, values in kinds.items()
    }
    assert {kind: config.train.objective for kind, config in read.items()} == {
        "sft": "sft",
        "dpo": "dpo",
        "rm": "reward",
    }
    assert {config.data.packing for config in read.values()} == {"document"}
    assert read["sft"].data.train[0].labels == "data/sft_train_label_document"
    pair = read["dpo"].data.validation[0]
    assert (pair.path, pair.labels) == ("data/dpo_val_chosen_document", "data/dpo_val_chosen_label_document")
    assert (pair.rejected, pair.rejected_labels) == (
        "data/dpo_val_rejected_document",
        "data/dpo_val_rejected_label_document",
    )
    assert read["dpo"].train.dpo_beta == 0.01 and read["rm"].model.output == "score"


@pytest.mark.parametrize(
    ("text", "detected"),
    [
        ("", False),
        ("include: [a]\nnum_layers: 2", True),
        ("include: [a]\noptimizer: {params: {}}", True),
        ("optimizer: {type: Adam, params: {lr: 1}}\nmodel: {num_layers: 2}", False),
        ("optimizer: {params: {lr: 1}}\nprecision: {dtype: bf16}", True),
        ("checkpoint: {save_interval: 3}", False),
        ("checkpoint: {save_interval: 3}\nseq_length: 3", True),
        ("tokenizer: {file: t.json}\nzero_optimization: {stage: 1}", True),
        ("zero: {stage: 1}\nzero_optimization: {stage: 1}", False),
        ("precision: {}", False),
        ("deepspeed: null\nprofile: null", False),
        ("deepspeed: null\nprofile: false", True),
    ],
)
def test_detection_by_the_keys_that_only_one_side_has(text, detected):
    assert is_gpt_neox(leaves(text)) is detected


def test_a_key_of_several_leaves_has_the_line_of_the_first():
    given = collect(leaves("optimizer:\n  params:\n    lr: 1\n    eps: 2\n  type: Lion\nlog_dir: x\n"), "f.yml")
    assert {name: (item.value, item.source, item.line) for name, item in given.items()} == {
        "optimizer": ({"params": {"lr": 1, "eps": 2}, "type": "Lion"}, "f.yml", 3),
        "log_dir": ("x", "f.yml", 6),
    }


def test_a_key_replaces_the_mapping_of_an_earlier_file(write):
    write("a.yml", BASE | {"optimizer": {"type": "Adam", "params": {"lr": 0.1, "eps": 0.2}}})
    write("b.yml", {"optimizer": {"type": "Lion", "params": {"lr": 0.3}}, "seq_length": 8})
    optimizer = load(["a.yml", "b.yml"]).config.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.eps) == ("lion", 0.3, 1e-8)


def test_gpt_neox_files_before_and_after_each_other(write, tmp_path):
    """A native file between them is no reason to refuse the second."""
    write("a.yml", BASE)
    write("b.yml", {"seq_length": 8})
    (tmp_path / "mine.yml").write_text("data: {seq_length: 16}\n")
    assert load(["a.yml", "b.yml", "mine.yml"]).config.data.seq_length == 16
    assert load(["a.yml", "mine.yml", "b.yml"]).config.data.seq_length == 16  # native settings win


def test_nothing_is_translated_if_the_model_is_incomplete(write):
    file = write("a.yml", {"hidden_size": 8, "activation": "bogus", "zzz": 1})
    lines = refusal(file).splitlines()
    assert [line.partition(";")[0] for line in lines] == [
        "error[2] unknown key of GPT-NeoX",
        "error[2] incomplete GPT-NeoX config",
    ]


def test_items_of_native_files_keep_their_lines_above_gpt_neox_files(write, tmp_path):
    write("a.yml", BASE)
    (tmp_path / "mine.yml").write_text("data:\n  train:\n  - a\n  - path: b\n    weight: -1\n")
    assert "where=mine.yml:5 data.train.1.weight" in refusal("a.yml", "mine.yml")
