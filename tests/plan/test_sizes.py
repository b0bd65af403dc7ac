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
