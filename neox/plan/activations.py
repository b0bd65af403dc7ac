"""Activation memory of a micro-batch between its forward and backward pass, tensor by tensor as the operators save it.

tests/plan/test_activations.py compares these sums with the tensors that autograd saves, byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass

from neox.config.schema import Config, ModelConfig
from neox.plan.sizes import MicroBatch, ResolvedLayout, Stage, micro_batch

IDS = 8  # bytes of a token id


@dataclass(frozen=True)
class Activations:
    """Activations of one stage, in bytes unless stated otherwise.

    Attributes:
        saved: saved from the forward to the backward pass of one micro-batch, without logits.
        uncheckpointed: the same without activation checkpointing.
        logits: logits, which their gradient overwrites; 0 unless it is the last stage.
        recomputed: recomputed in the backward pass of one block.
        working: gradients and copies in the backward pass of one block, in addition to `recomputed`.
        boundary: residual stream between blocks and stages.
        in_flight: number of micro-batches whose activations are saved at once under 1F1B.
    """

    saved: int
    uncheckpointed: int
    logits: int
    recomputed: int
    working: int
    boundary: int
    in_flight: int

    @property
    def resident(self) -> int:
        """Bytes of all micro-batches in flight."""
        return self.saved * self.in_flight


def attention_bytes(model: ModelConfig, micro: MicroBatch, context_parallel: bool) -> int:
    """Return the bytes of the QKV projection, the head outputs and the log-sum-exp, and of query/key norms.

    Query/key norms also save their input, with the queries in a copy, and their statistics.
    """
    total = micro.qkv + micro.heads + micro.lse
    if context_parallel:
        total += micro.heads  # saved before the exchange (attention) and after it (output projection)
    if model.qk_norm:
        total += micro.heads + micro.queries_keys + micro.queries_keys // (micro.element * model.head_dim) * 4
    return total


def mlp_bytes(model: ModelConfig, micro: MicroBatch, selective: bool) -> int:
    """Return the bytes of the input and output of the activation; with selective checkpointing of the input only."""
    reads = 2 if model.gated else 0 if model.activation == "relu" and not selective else 1
    return (reads + (0 if selective else 1)) * micro.inner


def block_bytes(model: ModelConfig, micro: MicroBatch, context_parallel: bool, selective: bool = False) -> int:
    """Return the bytes of one block without full checkpointing: norms (sums and outputs), attention, MLP."""
    if model.parallel_residual:
        norms = (2 if model.shared_residual_norm else 3) * micro.stream + micro.statistics
    else:
        norms = 4 * micro.stream + 2 * micro.statistics
    return norms + attention_bytes(model, micro, context_parallel) + mlp_bytes(model, micro, selective)


def working_bytes(model: ModelConfig, micro: MicroBatch) -> int:
    """Return the temporary bytes of the backward pass: the larger of MLP and attention, and gradients of the stream."""
    mlp = (3 if model.gated else 2) * micro.inner
    attention = 2 * micro.qkv + micro.heads  # the gradient is copied before the inverse rotation
    return max(mlp, attention) + 3 * micro.full_stream


def activations(config: Config, layout: ResolvedLayout, stage: Stage) -> Activations:
    """Compute the activations of one stage."""
    model, how = config.model, config.train.activation_checkpointing
    micro = micro_batch(config, layout)
    first, last = stage.number == 0, stage.number == layout.pp - 1
    # An adapted layer saves its matrix W + scale B A, and its backward pass computes the gradient of that matrix.
    merged = micro.element * stage.adapted
    full = block_bytes(model, micro, layout.cp > 1) + merged
    block = full
    if how == "full":
        block = (1 if model.hidden_dropout else 2) * micro.stream
    elif how == "selective":
        block = block_bytes(model, micro, layout.cp > 1, selective=True) + merged
    ends = IDS * micro.tokens if first else 0
    if first and model.hidden_dropout:
        ends += micro.stream
    if last:
        # Sum and output of the final norm; targets and four statistics per token.
        ends += 2 * micro.stream + micro.statistics + (IDS + 16) * micro.tokens
    saved = stage.blocks * block + ends
    if how == "full" and not model.hidden_dropout:
        # The first block has no branch to add; with parallel residuals it passes its input stream to the second block.
        saved -= (2 if model.parallel_residual and stage.blocks > 1 else 1) * micro.stream
    return Activations(
        saved=saved,
        uncheckpointed=stage.blocks * full + ends,
        logits=micro.logits if last else 0,
        recomputed=max(full - block, 0),
        working=working_bytes(model, micro),
        boundary=micro.stream,
        in_flight=min(layout.pp - stage.number, layout.batch.gradient_accumulation),
    )
