"""All pipeline stages run as one model, without gradients. With one stage the transfers are no-ops."""

from __future__ import annotations

import torch

from neox.errors import ConfigError
from neox.model.gpt import GPT
from neox.model.kv_cache import KVCache
from neox.parallel.p2p import broadcast_from_last_stage, recv_forward, send_forward


def logits(
    model: GPT,
    tokens: torch.Tensor,
    *,
    segment_ids: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cache: KVCache | None = None,
    checked: bool = False,
) -> torch.Tensor:
    """Logits of the complete model, on every process: all of them call it with the same arguments.

    Arguments and errors as for `GPT.forward`.

    Returns:
        [b, s, v] in the model's dtype; with `model.output: score`, fp32 [b, s, 1].
    """
    mesh, dtype = model.mesh, next(model.parameters()).dtype
    received = recv_forward(model.boundary_shape(tokens), dtype, mesh)
    out = model(
        tokens,
        segment_ids=segment_ids,
        position_ids=position_ids,
        cache=cache,
        received=received,
        checked=checked,
    )
    if model.config.output == "score":
        return _from_last_stage(model, out, (*tokens.shape, 1), torch.float32)
    return _from_last_stage(model, out, (*tokens.shape, model.config.vocab_size), dtype)


def token_losses(model: GPT, tokens: torch.Tensor, targets: torch.Tensor, *, checked: bool = False) -> torch.Tensor:
    """Loss of each token under the complete model, fp32 [b s], on every process: all of them call it.

    Arguments as for `GPT.forward`, tokens and targets [b, s].

    Raises:
        ConfigError: a reward model, which has no such losses.
        DataError: as `GPT.forward`.
    """
    if model.config.output == "score":
        raise ConfigError("a reward model predicts no tokens", where="model.output", got="score", want="tokens")
    received = recv_forward(model.boundary_shape(tokens), next(model.parameters()).dtype, model.mesh)
    out = model(tokens, targets, received=received, checked=checked)
    return _from_last_stage(model, out, (tokens.numel(),), torch.float32)


def _from_last_stage(model: GPT, out: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Pass a stage's output on, and take the result of the last stage."""
    if model.mesh.last_stage:
        return broadcast_from_last_stage(out, shape, dtype, model.mesh)
    send_forward(out, model.mesh)
    return broadcast_from_last_stage(None, shape, dtype, model.mesh)
