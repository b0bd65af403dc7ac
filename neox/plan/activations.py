"""What a micro-batch leaves in memory between its forward and its backward, tensor by tensor, as the operators save it.

tests/plan/test_activations.py compares these sums to what autograd holds, byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass

from neox.config.schema import Config, ModelConfig
from neox.plan.sizes import Layout, MicroBatch, Stage, micro_batch

IDS = 8  # bytes of a token id


@dataclass(frozen=True)
class Activations:
    """Bytes of one stage.

    Attributes:
        kept: of one micro-batch from its forward to its backward, logits aside.
        whole: the same without activation checkpointing.
        logits: of the loss, which its gradient overwrites; 0 on a stage that is not the last.
        recomputed: what the backward of one block makes anew.
        working: gradients and copies that the backward of one block has beside that.
        boundary: residual stream between blocks and stages.
        in_flight: micro-batches that are kept at once under 1F1B.
    """

    kept: int
    whole: int
    logits: int
    recomputed: int
    working: int
    boundary: int
    in_flight: int

    @property
    def resident(self) -> int:
        """Of all micro-batches in flight."""
        return self.kept * self.in_flight


def attention_bytes(model: ModelConfig, micro: MicroBatch, context_parallel: bool) -> int:
    """Projection, outputs of the heads, and lse; per-head norms also keep what they read (queries in a copy) and what they wrote."""
    total = micro.qkv + micro.heads + micro.lse
    if context_parallel:
        total += micro.heads  # the output projection reads them after the exchange, the attention's backward before
    if model.qk_norm:
        total += micro.heads + micro.queries_keys + micro.queries_keys // (micro.element * model.head_dim) * 4
    return total


def mlp_bytes(model: ModelConfig, micro: MicroBatch, selective: bool) -> int:
    """What the activation reads, and what it wrote; with selective checkpointing the former alone."""
    reads = 2 if model.gated else 0 if model.activation == "relu" and not selective else 1
    return (reads + (0 if selective else 1)) * micro.inner


def block_bytes(model: ModelConfig, micro: MicroBatch, context_parallel: bool, selective: bool = False) -> int:
    """One block without full checkpointing: sums and outputs of its norms, attention, MLP."""
    if model.parallel_residual:
        norms = (2 if model.shared_residual_norm else 3) * micro.stream + micro.statistics
    else:
        norms = 4 * micro.stream + 2 * micro.statistics
    return norms + attention_bytes(model, micro, context_parallel) + mlp_bytes(model, micro, selective)


def working_bytes(model: ModelConfig, micro: MicroBatch) -> int:
    """The larger of what the backward of the MLP and of the attention holds beside saved tensors, and the gradients of the stream."""
    mlp = (3 if model.gated else 2) * micro.inner
    attention = 2 * micro.qkv + micro.heads  # the gradient is copied before it is rotated back
    return max(mlp, attention) + 3 * micro.whole


def activations(config: Config, layout: Layout, stage: Stage) -> Activations:
    """Activations of one stage of a layout."""
    model, how = config.model, config.train.activation_checkpointing
    micro = micro_batch(config, layout)
    first, last = stage.number == 0, stage.number == layout.pp - 1
    plain = block_bytes(model, micro, layout.cp > 1)
    block = plain
    if how == "full":
        block = (1 if model.hidden_dropout else 2) * micro.stream
    elif how == "selective":
        block = block_bytes(model, micro, layout.cp > 1, selective=True)
    ends = IDS * micro.tokens if first else 0
    if first and model.hidden_dropout:
        ends += micro.stream
    if last:
        # The sum and the output of the final norm; targets, and four statistics of every token.
        ends += 2 * micro.stream + micro.statistics + (IDS + 16) * micro.tokens
    kept = stage.blocks * block + ends
    if how == "full" and not model.hidden_dropout:
        # The first block gets a stream and nothing to add; with parallel residuals it hands that very stream to the second.
        kept -= (2 if model.parallel_residual and stage.blocks > 1 else 1) * micro.stream
    return Activations(
        kept=kept,
        whole=stage.blocks * plain + ends,
        logits=micro.logits if last else 0,
        recomputed=max(plain - block, 0),
        working=working_bytes(model, micro),
        boundary=micro.stream,
        in_flight=min(layout.pp - stage.number, layout.batch.gradient_accumulation),
    )
