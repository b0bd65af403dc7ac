"""Checks of a model's arguments: shapes, vocabulary, positions, activation checkpointing, attention kernels."""

from __future__ import annotations

from dataclasses import replace

import torch

from neox.config.rules import Environment
from neox.config.rules.model import attention_kernels
from neox.config.schema import Config, ModelConfig
from neox.config.validate import problem
from neox.config.values import flatten
from neox.errors import ConfigError, DataError
from neox.model.dtypes import DTYPES
from neox.targets import IGNORED


def check_inputs(tokens: torch.Tensor, targets: torch.Tensor | None, vocab_size: int, *, read_on_gpu: bool) -> None:
    """Raise DataError unless tokens, and targets of the same shape, are int64 [b, s] within the vocabulary.

    Args:
        tokens: int64 [b, s].
        targets: int64 [b, s], or IGNORED; None without targets.
        vocab_size: v.
        read_on_gpu: whether values on a GPU are read, which waits for it. On a CPU they always are.
    """
    check_ids("token", tokens, vocab_size, read_on_gpu)
    if targets is None:
        return
    if targets.shape != tokens.shape:
        raise DataError(
            "targets do not fit the tokens", where="GPT", got=tuple(targets.shape), want=tuple(tokens.shape)
        )
    check_ids("target", targets.masked_fill(targets == IGNORED, 0), vocab_size, read_on_gpu)


def check_ids(what: str, ids: torch.Tensor, vocab_size: int, read_on_gpu: bool) -> None:
    """Raise DataError unless ids are int64 [b, s] within the vocabulary.

    Args:
        what: "token" or "target", for the message.
        ids: int64 [b, s].
        vocab_size: v.
        read_on_gpu: as for `check_inputs`.
    """
    if ids.dim() != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
        got = f"{ids.dtype} {tuple(ids.shape)}"
        raise DataError(
            f"{what} ids have the wrong shape or dtype", where="GPT", got=got, want="int64 [batch, sequence], not empty"
        )
    if ids.is_meta or torch.compiler.is_compiling() or not (ids.is_cpu or read_on_gpu):
        return
    low, high = torch.stack(torch.aminmax(ids)).tolist()  # one transfer from the device
    if low < 0 or high >= vocab_size:
        raise DataError(
            f"{what} id outside the vocabulary",
            where="GPT",
            got=low if low < 0 else high,
            want=f"0 .. {vocab_size - 1}",
            do="use the tokenizer that the model was made for",
        )


def check_positions(config: ModelConfig, start: int, length: int, position_ids: torch.Tensor | None) -> int:
    """The number of positions in use: one more than the highest.

    Args:
        config: the architecture.
        start: position of the first token.
        length: s.
        position_ids: [b, s] or None. They are read on the CPU only; on a GPU they are taken to be below start + length.

    Raises:
        DataError: a position outside max_position_embeddings, where positions are limited (rotary, learned).
    """
    low, high = start, start + length - 1
    if position_ids is not None and position_ids.is_cpu and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in torch.aminmax(position_ids))
    readable = position_ids is None or position_ids.is_cpu
    limited = config.position_embedding in ("rotary", "learned") and readable
    if limited and (low < 0 or high >= config.max_position_embeddings):
        raise DataError(
            "sequence longer than the model's positions",
            where="model.max_position_embeddings",
            got=f"position {low if low < 0 else high}",
            want=f"0 .. {config.max_position_embeddings - 1}",
            do="shorten the input or raise model.max_position_embeddings",
        )
    return high + 1


def check_activation_checkpointing(mode: str) -> None:
    """Raise ConfigError for an unknown mode of activation checkpointing."""
    if mode not in ("none", "selective", "full"):
        raise ConfigError(
            "unknown activation checkpointing",
            where="train.activation_checkpointing",
            got=mode,
            want="none, selective or full",
        )


def with_supported_attention(model: ModelConfig, dtype: torch.dtype, device: str) -> ModelConfig:
    """The config for inference: attention_backend `auto` if the kernels of the training do not support dtype or device.

    Raises:
        ConfigError: `auto` has no such kernels either.
    """
    names = {value: name for name, value in DTYPES.items()}
    if dtype not in names:
        return model
    config = Config.model_validate({"model": model, "precision": {"dtype": names[dtype]}})
    if not any(attention_kernels(config, Environment(1, device))):
        return model
    config = config.model_copy(update={"model": model.model_copy(update={"attention_backend": "auto"})})
    for conflict in attention_kernels(config, Environment(1, device)):
        raise problem(replace(conflict, do="--dtype bf16"), dict(flatten(config)), {})
    return config.model
