"""The input of the first block: word embedding, learned positions, dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from neox.config.schema import ModelConfig
from neox.model.positional import PositionEmbedding
from neox.parallel.collectives import SEQUENCE, local_slice
from neox.parallel.embedding import VocabParallelEmbedding
from neox.parallel.mesh import ONE_PROCESS, Mesh
from neox.parallel.rng import tensor_parallel_stream


class Embedding(nn.Module):
    """Word embedding [v, h], plus learned positions where the config has them, with dropout."""

    def __init__(self, config: ModelConfig, mesh: Mesh = ONE_PROCESS, *, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.mesh = mesh
        self.dropout = config.hidden_dropout
        rows = config.padded_vocab_size(mesh.tp)
        self.word = VocabParallelEmbedding(config.vocab_size, rows, config.hidden_size, mesh, dtype=dtype)
        self.position: PositionEmbedding | None = None
        if config.position_embedding == "learned":
            self.position = PositionEmbedding(config.max_position_embeddings, config.hidden_size, mesh, dtype=dtype)

    def forward(self, tokens: torch.Tensor, start: int = 0, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Embed tokens.

        Args:
            tokens: int64 [b, s].
            start: position of the first token.
            position_ids: int64 [b, s]; default start .. start + s - 1.

        Returns:
            [b, s, h]; with sequence parallelism this process's [b, s/tp, h].
        """
        x = self.word(tokens)
        if self.position is not None:
            length = x.shape[1]
            if self.mesh.sequence:
                start += self.mesh.tp_rank * length
                if position_ids is not None and self.mesh.tp_group is not None:
                    position_ids = local_slice(position_ids, SEQUENCE, self.mesh.tp_group)
            x = x + self.position(start, length, position_ids)
        if not self.dropout or not self.training:
            return x
        with tensor_parallel_stream(self.mesh, x.device, differs=self.mesh.sequence):
            return F.dropout(x, self.dropout)
