"""A checkpoint of a model that was never trained, for tests that read one."""

from __future__ import annotations

import json
from pathlib import Path

from neox.checkpoint.reshard import Fragment
from neox.checkpoint.retention import start_lineage
from neox.checkpoint.save import Content, save
from neox.config.schema import Config, DataConfig, TokenizerConfig
from neox.config.values import dump
from neox.model.gpt import GPT


def save_model(run_dir: Path, model: GPT, *, tokenizer: str | None = None, model_config: dict | None = None) -> Path:
    """Save the weights of a model as step 1 of a run and return the checkpoint folder."""
    config = Config(
        model=model.config,
        tokenizer=TokenizerConfig(file=tokenizer),
        data=DataConfig(seq_length=32) if tokenizer else DataConfig(),
    )
    fragments = []
    for name, weight in model.logical_weights():
        slices = tuple((0, size) for size in weight.shape)
        fragments.append(Fragment(name, "weight", tuple(weight.shape), slices, 0, weight.numel(), weight.flatten()))
    return save(
        run_dir / "checkpoints",
        Content(
            1,
            {"step": 1, "consumed": 0, "tokens": 0},
            start_lineage(run_dir / "checkpoints", None),
            config_lock=dump(config),
            model_config=model_config or json.loads(model.config.model_dump_json()),
        ),
        fragments,
    )
