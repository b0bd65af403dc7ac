"""Parameters of every stage against models built on the meta device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from neox.config.files import PRESETS
from neox.config.load import load_config
from neox.config.schema import Config
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from neox.plan.communication import pipeline_traffic
from neox.plan.sizes import micro_batch, optimizer_elements, resolve

SHIPPED = sorted(str(path.relative_to(PRESETS)) for path in PRESETS.rglob("*.yml"))
LAYOUTS = [
    {},
    {"tensor": 2},
    {"pipeline": 3},
    {"tensor": 2, "pipeline": 2, "sequence": True},
    {"pipeline": 2, "partition": "time"},
]


def shipped(name: str) -> Config:
    """A shipped config; the demo's vocabulary comes from a tokenizer that is trained first."""
    return load_config(name, overrides=["model.vocab_size=8000"] if name == "demo.yml" else [])


def built(config: Config, tp_rank: int, pp_rank: int) -> GPT:
    """One process's part of the model, on the meta device."""
    parallel = config.parallel
    rank = pp_rank * parallel.tensor + tp_rank
    mesh = replace(Mesh.single("meta"), tp=parallel.tensor, pp=parallel.pipeline, rank=rank, sequence=parallel.sequence)
    return GPT(config.model, mesh, partition=parallel.partition)


@pytest.mark.parametrize("name", SHIPPED)
def test_parameters_are_those_of_the_model(name):
    config = shipped(name)
    for parallel in LAYOUTS:
        over = {
            "parallel": config.parallel.model_copy(update=parallel),
            "train": config.train.model_copy(update={"micro_batch_size": 1, "global_batch_size": None}),
        }
        cut = config.model_copy(update=over)
        layout = resolve(cut, cut.parallel.tensor * cut.parallel.pipeline)
        for stage in layout.stages:
            model = built(cut, cut.parallel.tensor - 1, stage.number)
            assert stage.shapes == {name: tuple(p.shape) for name, p in model.named_parameters()}
            assert stage.parameters == sum(p.numel() for p in model.parameters())
            assert stage.tied == (0 if model.tied is None else model.tied.weight.numel())


def test_the_tokens_of_a_process_are_counted():
    config = shipped("pythia/70M.yml")
    config = config.model_copy(
        update={"parallel": config.parallel.model_copy(update={"tensor": 2, "context": 2, "sequence": True})}
    )
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"micro_batch_size": 4, "global_batch_size": None})}
    )
    micro = micro_batch(config, resolve(config, 8))
    assert micro.tokens == 4 * 2048 // 2
    assert micro.stream == micro.tokens // 2 * 512 * 2 and micro.full_stream == 2 * micro.stream
    assert micro.qkv == micro.tokens * 3 * 512 // 2 * 2
    assert micro.logits == micro.tokens * 50432 // 2 * 2  # 50,304 rounded up to a multiple of 256


@pytest.mark.parametrize(("kind", "moments"), [("adamw", 2), ("lion", 1), ("sgd", 1)])
def test_the_optimizers_state_is_counted(kind, moments):
    config = shipped("pythia/14M.yml")
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"type": kind})})
    (stage,) = resolve(config, 1).stages
    assert optimizer_elements(config, stage) == moments * stage.parameters


def test_muon_keeps_one_moment_of_matrices_in_blocks():
    config = shipped("pythia/14M.yml")
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"type": "muon"})})
    (stage,) = resolve(config, 1).stages
    matrices = sum(
        torch.empty(shape, device="meta").numel()
        for name, shape in stage.shapes.items()
        if name.startswith("layers.") and len(shape) == 2
    )
    assert optimizer_elements(config, stage) == 2 * stage.parameters - matrices


def objective(kind: str) -> Config:
    config = load_config("pythia/14M.yml", overrides=["train.micro_batch_size=2", "data.seq_length=64"])
    model = config.model.model_copy(update={"output": "score" if kind == "reward" else "tokens"})
    return config.model_copy(
        update={"model": model, "train": config.train.model_copy(update={"objective": kind, "global_batch_size": None})}
    )


@pytest.mark.parametrize(("kind", "rows"), [("pretrain", 2), ("sft", 2), ("dpo", 4), ("reward", 4)])
def test_a_pair_is_two_rows_and_a_reward_model_gives_scores(kind, rows):
    config = objective(kind)
    sizes = micro_batch(config, resolve(config, 1))
    assert sizes.tokens == rows * 64
    out = GPT(config.model, Mesh.single())(torch.zeros(rows, 64, dtype=torch.long))
    element = 4 if kind == "reward" else 2  # scores are fp32 in every precision; the preset trains in fp16
    assert sizes.logits == out.numel() * element


def test_a_reward_model_has_no_copy_of_a_tied_embedding():
    config = objective("reward")
    model = config.model.model_copy(update={"tie_embeddings": True})
    parallel = config.parallel.model_copy(update={"pipeline": 2})
    config = config.model_copy(update={"model": model, "parallel": parallel})
    layout = resolve(config, 2)
    assert built(config, 0, 1).tied is None and [stage.tied for stage in layout.stages] == [0, 0]
    rows = [row for stage in layout.stages for row in pipeline_traffic(config, layout, stage)]
    assert [row.what for row in rows] == ["residual stream", "its gradient"]


def cut(*overrides: str, world: int, name: str = "llama/3-8B.yml"):
    batch = ["train.micro_batch_size=3", "train.global_batch_size=null"]
    config = load_config(name, overrides=[*batch, *overrides])
    return config, resolve(config, world)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_tensor_of_a_micro_batch(dtype):
    """Llama 3 8B: width 4096, 32 heads of 128 channels over 8 pairs of keys and values, MLP 14336, 128,256 ids."""
    config, layout = cut("parallel.tensor=4", "parallel.context=2", "data.seq_length=1000", f"precision.dtype={dtype}",
                         world=16)  # fmt: skip
    element = 4 if dtype == "fp32" else 2
    tokens = 3 * 1000 // 2
    assert vars(micro_batch(config, layout)) == {
        "tokens": tokens,
        "element": element,
        "stream": tokens * 4096 * element,
        "full_stream": tokens * 4096 * element,
        "qkv": tokens * (8 + 2 * 2) * 128 * element,
        "heads": tokens * 8 * 128 * element,
        "queries_keys": tokens * (8 + 2) * 128 * element,
        "lse": tokens * 8 * 4,
        "inner": tokens * 14336 // 4 * element,
        "logits": tokens * 128_512 // 4 * element,  # rows are a multiple of 4 x 128
        "statistics": tokens * 4,  # rmsnorm has no mean
    }
    assert (layout.tp, layout.pp, layout.cp, layout.dp, layout.replicas, layout.sequence) == (4, 1, 2, 2, 4, False)
    norm = config.model.model_copy(update={"norm": "layernorm"})
    assert micro_batch(config.model_copy(update={"model": norm}), layout).statistics == tokens * 8


def test_sequence_parallelism_divides_the_stream_and_its_statistics():
    config, layout = cut("parallel.tensor=4", "parallel.sequence=true", "data.seq_length=1000", world=4)
    micro = micro_batch(config, layout)
    assert (micro.tokens, micro.full_stream, micro.stream) == (3000, 3000 * 8192, 750 * 8192)
    assert (micro.statistics, micro.lse) == (750 * 4, 3000 * 8 * 4) and layout.sequence
    _, alone = cut("parallel.sequence=true", world=4)
    assert not alone.sequence and alone.dp == 4


def test_a_head_of_keys_and_values_is_not_divided():
    config, layout = cut("model.num_kv_heads=2", "parallel.tensor=4", world=4)
    micro = micro_batch(config, layout)
    assert micro.qkv - micro.heads == 2 * micro.tokens * 128 * micro.element


def test_the_stages_of_a_pipeline():
    options = ("parallel.pipeline=4", "model.tie_embeddings=true", "parallel.partition=[9, 10, 7, 6]")
    _, layout = cut(*options, world=8)
    assert [(stage.number, stage.first, stage.end, stage.blocks) for stage in layout.stages] == [
        (0, 0, 9, 9),
        (1, 9, 19, 10),
        (2, 19, 26, 7),
        (3, 26, 32, 6),
    ]
    table = 128_256 * 4096
    assert [stage.tied for stage in layout.stages] == [0, 0, 0, table]
    assert [sorted(stage.ends) for stage in layout.stages] == [["embedding.word.weight"], [], [], ["norm.weight"]]
    assert layout.stages[1].largest == 14336 * 4096 and layout.stages[0].largest == table
    assert all(stage.trained == stage.parameters and stage.adapted == 0 for stage in layout.stages)


def test_the_parameters_of_adapters():
    options = ("model.lora={rank: 4, targets: [attention.qkv, mlp.down]}", "parallel.tensor=2")
    config, layout = cut(*options, world=2)
    (stage,) = layout.stages
    qkv, down = 3072 * 4096, 4096 * 7168
    assert stage.adapted == qkv + down
    lora = 4 * (4096 + 3072) + 4 * (7168 + 4096)
    assert {name: shape for name, shape in stage.block.items() if "lora" in name} == {
        "attention.qkv.lora_a": (4, 4096),
        "attention.qkv.lora_b": (3072, 4),
        "mlp.down.lora_a": (4, 7168),
        "mlp.down.lora_b": (4096, 4),
    }
    assert stage.trained == 32 * lora and stage.largest == 4 * 7168
    assert optimizer_elements(config, stage) == 2 * stage.trained
    assert not any("lora" in name for name in stage.frozen)
    assert {"embedding.word.weight", "head.weight", "norm.weight", "mlp.down.weight"} <= stage.frozen


def test_partitions_of_two_models_are_separate():
    for layers, sizes in ((4, [2, 2]), (6, [3, 3])):
        _, layout = cut("parallel.pipeline=2", f"model.num_layers={layers}", "model.vocab_size=128", world=2)
        assert [stage.blocks for stage in layout.stages] == sizes
    for how, sizes in (("[1, 5]", [1, 5]), ("[4, 2]", [4, 2])):
        _, layout = cut("parallel.pipeline=2", "model.num_layers=6", f"parallel.partition={how}", world=2)
        assert [stage.blocks for stage in layout.stages] == sizes
