"""Tiny chats and preferences with something to learn, and runs on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from neox.config.schema import Config
from neox.data import IndexedWriter
from tests.train.corpus import VOCAB, make_config

PAIRS, CHATS = 96, 200


def make_answers(folder: Path) -> None:
    """folder/chat and its labels: a question of noise, then an answer that counts upwards, which alone is learned.
    folder/chosen and rejected, with labels: the same question, answers that count upwards and downwards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)

    def question() -> np.ndarray:
        return rng.integers(1, VOCAB, size=rng.integers(3, 9))

    def count(step: int) -> np.ndarray:
        return (rng.integers(1, VOCAB) + step * np.arange(rng.integers(6, 14))) % (VOCAB - 1) + 1

    def write(name: str, rows: list[tuple[np.ndarray, np.ndarray]]) -> None:
        with (
            IndexedWriter(folder / name, "uint16", vocab_size=VOCAB) as tokens,
            IndexedWriter(folder / f"{name}_labels", "int32") as labels,
        ):
            for asked, answer in rows:
                tokens.add_document(np.concatenate([asked, answer]))
                labels.add_document(np.concatenate([np.full_like(asked, -100), answer]))

    write("chat", [(question(), count(1)) for _ in range(CHATS)])
    asked = [question() for _ in range(PAIRS)]
    write("chosen", [(text, count(1)) for text in asked])
    write("rejected", [(text, count(-1)) for text in asked])


def chat_config(data: Path, run: Path, *overrides: str) -> Config:
    """A supervised run on the chats."""
    source = f'[{{"path": "{data}/chat", "labels": "{data}/chat_labels"}}]'
    return make_config(
        data,
        run,
        f"data.train={source}",
        f"data.validation={source}",
        "train.objective=sft",
        "data.packing=document",
        "train.micro_batch_size=4",
        *overrides,
    )


def pair_config(data: Path, run: Path, objective: str, *overrides: str) -> Config:
    """A run on the pairs."""
    names = {"path": "chosen", "labels": "chosen_labels", "rejected": "rejected", "rejected_labels": "rejected_labels"}
    inside = ", ".join(f'"{key}": "{data}/{name}"' for key, name in names.items())
    sources = (f"data.train=[{{{inside}}}]", f"data.validation=[{{{inside}}}]")
    settings = (f"train.objective={objective}", "data.document_mask=false", "train.micro_batch_size=4")
    return make_config(data, run, *sources, *settings, *overrides)
