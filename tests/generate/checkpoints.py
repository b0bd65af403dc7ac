"""A checkpoint of a model that was never trained, for tests that read one."""

from __future__ import annotations

import json
from pathlib import Path

from neox.checkpoint.reshard import Fragment
from neox.checkpoint.retention import start_lineage
from neox.checkpoint.save import save
from neox.config.load import dump
from neox.config.schema import Config, DataConfig, TokenizerConfig
from neox.model.gpt import GPT


def save_model(run_dir: Path, model: GPT, *, tokenizer: str | None = None, model_config: dict | None = None) -> Path:
    """Save the weights of a model as step 1 of a run and return the checkpoint folder."""
    config = Config(model=model.config, tokenizer=TokenizerConfig(file=tokenizer), data=DataConfig(seq_length=32) if tokenizer else DataConfig())
    fragments = []
    for name, parameter in model.named_parameters():
        rows = min(parameter.shape[0], model.config.vocab_size) if name in ("embedding.word.weight", "head.weight") else parameter.shape[0]
        shape = (rows, *parameter.shape[1:])
        data = parameter.detach()[:rows].flatten()
        fragments.append(Fragment(name, "weight", shape, tuple((0, size) for size in shape), 0, data.numel(), data))
    return save(
        run_dir / "checkpoints",
        step=1,
        fragments=fragments,
        state={"step": 1, "consumed": 0, "tokens": 0},
        rng={},
        config_lock=dump(config),
        model_config=model_config or json.loads(model.config.model_dump_json()),
        rank=0,
        world_size=1,
        keep=0,
        lineage=start_lineage(run_dir / "checkpoints", None),
    )
