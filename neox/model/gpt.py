"""The language model: embedding, blocks, final norm, output head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from neox.config.schema import ModelConfig
from neox.model.adapters import add_adapters, is_trained
from neox.model.attention import Context
from neox.model.block import Block, make_block
from neox.model.checks import check_activation_checkpointing, check_inputs, check_positions
from neox.model.decode import decoding_layers
from neox.model.embedding import Embedding
from neox.model.kv_cache import KVCache
from neox.model.norm import make_norm
from neox.model.partition import stage_layers
from neox.model.positional import RotaryTable
from neox.model.sharded import ShardedModel
from neox.parallel.collectives import gather_from
from neox.parallel.cross_entropy import vocab_parallel_cross_entropy
from neox.parallel.embedding import ScoreHead, TiedCopy, VocabParallelHead, project_to_vocabulary
from neox.parallel.mesh import ONE_PROCESS, Mesh


class GPT(ShardedModel):
    """A GPT-style language model: `model(tokens)` gives logits, `model(tokens, targets)` the loss of each token.

    Under pipeline parallelism this is one stage: the first has the embedding, the last the final norm and the head, and
    parameters keep the names that they have in the complete model. `neox.model.pipeline` runs all stages as one model.

    Args:
        config: the architecture.
        mesh: layout over processes; by default this process alone, on the CPU. Parameters are created on mesh.device,
            which may be "meta" (see `materialize`).
        dtype: dtype of parameters and activations.
        seed: seed of the initial weights.
        activation_checkpointing: "none"; "selective": the backward recomputes the activation of each MLP; "full": it
            recomputes every block.
        partition: how blocks are divided among pipeline stages (`partition_layers`).

    Raises:
        ConfigError: the sizes contradict each other or do not divide over the mesh.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 1234,
        activation_checkpointing: str = "none",
        partition: str | Sequence[int] = "parameters",
    ):
        super().__init__(config, ONE_PROCESS if mesh is None else mesh, seed)
        mesh = self.mesh
        check_activation_checkpointing(activation_checkpointing)
        self.recompute_blocks = activation_checkpointing == "full"
        recompute_mlp = activation_checkpointing == "selective"
        first, end = stage_layers(config, mesh, partition)
        self.rotary = RotaryTable(config) if config.position_embedding == "rotary" else None
        self.embedding = Embedding(config, mesh, dtype=dtype) if mesh.first_stage else None
        self.layers = nn.ModuleDict(
            {str(i): make_block(config, mesh, i, dtype=dtype, recompute_mlp=recompute_mlp) for i in range(first, end)}
        )
        self.norm = make_norm(config, mesh, dtype) if mesh.last_stage else None
        self.score: ScoreHead | None = None
        self.head: VocabParallelHead | None = None
        table = (config.vocab_size, config.padded_vocab_size(mesh.tp), config.hidden_size, mesh)
        if mesh.last_stage and config.output == "score":
            self.score = ScoreHead(config.hidden_size, mesh, dtype=dtype)
        elif mesh.last_stage and not config.tie_embeddings:
            self.head = VocabParallelHead(*table, dtype=dtype)
        elif mesh.last_stage and not mesh.first_stage:
            self.tied = TiedCopy(*table, dtype=dtype)
        if config.lora is not None:
            add_adapters(self.layers.values(), config.lora)
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(is_trained(config, name))
        if mesh.device.type != "meta":
            self.initialize()
            self.sum_partial_gradients()

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        segment_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: KVCache | None = None,
        received: torch.Tensor | None = None,
        expected_dloss: float | None = None,
        checked: bool = False,
    ) -> torch.Tensor:
        """Logits of the next token, or with targets the loss of each token.

        Args:
            tokens: int64 [b, s]; with context parallelism this process's part of the sequence.
            targets: int64 [b, s]; IGNORED (-100) has loss 0.
            segment_ids: int32 [b, t], cached tokens included; attention is only between equal ids.
            position_ids: int64 [b, s]; by default positions count from the first token of the sequence or cache.
            cache: keys and values of earlier tokens; those of these tokens are added.
            received: output of the previous pipeline stage, `boundary_shape`; None on the first stage.
            expected_dloss: the gradient that every token's loss will get, where it is known (ops.cross_entropy).
            checked: the caller has checked that the ids are in the vocabulary. Otherwise evaluation reads them from a
                GPU, which the host waits for.

        Returns:
            Logits [b, s, v] in the model's dtype; with targets, losses fp32 [b s]. A reward model returns scores fp32
            [b, s, 1]; with targets, [b s]. A pipeline stage that is not the last returns its residual stream.

        Raises:
            DataError: ids outside the vocabulary, or positions outside max_position_embeddings.
        """
        check_inputs(tokens, targets, self.config.vocab_size, read_on_gpu=not (self.training or checked))
        length = tokens.shape[1]
        start = self.mesh.context_start(length) if cache is None else cache.length
        num_positions = check_positions(self.config, start, length, position_ids)
        context = Context(segment_ids=segment_ids, cache=cache)
        if self.rotary is not None:
            context = context.rotated(self.rotary, start, length, position_ids, num_positions, tokens.device)
        stream = cast(torch.Tensor, received) if self.embedding is None else self.embedding(tokens, start, position_ids)
        delta: torch.Tensor | None = None
        blocks = cast("Iterable[Block]", self.layers.values())
        if cache is not None:
            blocks = decoding_layers(blocks, tokens.numel(), cache)
        for block in blocks:
            if self.recompute_blocks and torch.is_grad_enabled():
                stream, delta = checkpoint(block, stream, delta, context, use_reentrant=False)
            else:
                stream, delta = block(stream, delta, context)
        if cache is not None:
            cache.advance(length)
        if self.norm is None:
            return stream if delta is None else stream + delta
        hidden = (self.norm(stream) if delta is None else self.norm(delta, stream))[0]
        if self.score is not None:
            return self.score(hidden) if targets is None else self.score(hidden).flatten()
        logits, v = self.project(hidden), self.config.vocab_size
        if targets is None:
            return gather_from(logits, -1, self.mesh.tp_group)[..., :v]
        return vocab_parallel_cross_entropy(logits, targets, self.mesh, vocab_size=v, expected_dloss=expected_dloss)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normed hidden states [b, s, h] -> logits [b, s, v/tp], padding columns included."""
        if self.head is not None:
            return self.head(hidden)
        if self.tied is not None:
            return self.tied(hidden)
        return project_to_vocabulary(hidden, cast("Embedding", self.embedding).word.weight, self.mesh)

    def boundary_shape(self, tokens: torch.Tensor) -> tuple[int, int, int]:
        """Shape of what one pipeline stage passes to the next for these tokens [b, s]."""
        return tokens.shape[0], self.mesh.local_sequence(tokens.shape[1]), self.config.hidden_size
