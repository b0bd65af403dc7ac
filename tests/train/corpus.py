"""A small indexed dataset with something to learn, and configs that train a tiny model on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from neox.config.load import loads
from neox.config.schema import Config
from neox.data import IndexedWriter
from neox.runtime.signals import StopSignals

VOCAB = 120
DROPOUT = ("model.hidden_dropout=0.1", "model.attention_dropout=0.1")


def make_corpus(folder: Path) -> None:
    """Write folder/train and folder/valid: documents that count upwards in small random steps."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, documents in (("train", 300), ("valid", 60)):
        with IndexedWriter(folder / name, "uint16", vocab_size=VOCAB, eod_id=0) as writer:
            for _ in range(documents):
                steps = rng.integers(1, 4, size=rng.integers(20, 90))
                writer.add_document(np.concatenate([np.cumsum(steps) % (VOCAB - 1) + 1, [0]]))


def config_text(corpus: Path, run: Path) -> str:
    """A config of 20 steps as YAML (JSON is YAML)."""
    values = {
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "vocab_size": VOCAB,
            "max_position_embeddings": 32,
            "rotary_pct": 0.25,
            "parallel_residual": True,
        },
        "data": {
            "train": [str(corpus / "train")],
            "validation": [str(corpus / "valid")],
            "seq_length": 32,
            "document_mask": True,
        },
        "optimizer": {"lr": 0.003},
        "schedule": {"type": "cosine", "warmup_iters": 3, "min_lr": 0.0001},
        "precision": {"dtype": "fp32"},
        "zero": {"stage": 0},
        "train": {"train_iters": 20, "global_batch_size": 8, "micro_batch_size": 2},
        "checkpoint": {"save_interval": 10},
        "evaluate": {"interval": 10, "iters": 2},
        "logging": {"interval": 5, "tensorboard": False},
        "run": {"dir": str(run)},
    }
    return json.dumps(values)


def make_config(corpus: Path, run: Path, *overrides: str) -> Config:
    """The config of `config_text` with `section.key=value` overrides; values in JSON, or bare words."""
    values = json.loads(config_text(corpus, run))
    for override in overrides:
        path, text = override.split("=", 1)
        *sections, key = path.split(".")
        mapping = values
        for section in sections:
            mapping = mapping.setdefault(section, {})
        try:
            mapping[key] = json.loads(text)
        except ValueError:
            mapping[key] = text
    return loads(json.dumps(values))


def records(run: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[tuple]:
    """The metrics of each step that must match bit for bit between two equivalent runs."""
    return [
        (r["step"], r["loss"], r["lr"], r["grad_norm"], r["tokens"], r["samples"], r.get("validation_loss"))
        for r in records(run)
    ]


class StopAfter(StopSignals):
    """Stands for a signal that arrives during the n-th step: it is polled once per step."""

    def __init__(self, steps: int):
        super().__init__()
        self.left = steps

    @property
    def requested(self) -> bool:
        self.left -= 1
        return self.left <= 0
