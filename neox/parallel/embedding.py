"""Word embedding and output projection with the vocabulary cut over the tensor group."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from neox import ops
from neox.parallel.collectives import copy_to, reduce_from
from neox.parallel.mesh import Layout, Mesh, split_evenly


class VocabParallelWeight(nn.Module):
    """A [v_padded/tp, h] weight. Rows at and beyond vocab_size are zero: nothing reads them, and their gradient is zero."""

    def __init__(self, vocab_size: int, padded_vocab_size: int, hidden_size: int, mesh: Mesh, *, dtype: torch.dtype):
        super().__init__()
        self.group = mesh.tp_group
        self.vocab_size = vocab_size
        self.low, self.high = split_evenly(padded_vocab_size, mesh, "the padded vocabulary")
        self.weight = nn.Parameter(torch.empty(self.high - self.low, hidden_size, dtype=dtype, device=mesh.device))
        self.layouts = {"weight": Layout.cut((vocab_size, hidden_size), 0, self.low, self.high)}


class VocabParallelEmbedding(VocabParallelWeight):
    """tokens [b, s] -> [b, s, h]: each member looks up its own rows, the sum over the group puts them together."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens int64 [b, s] -> [b, s, h]."""
        if self.group is None:
            return F.embedding(tokens, self.weight)
        elsewhere = (tokens < self.low) | (tokens >= self.high)
        rows = F.embedding((tokens - self.low).masked_fill(elsewhere, 0), self.weight)
        return reduce_from(rows.masked_fill(elsewhere[..., None], 0.0), self.group)


class VocabParallelHead(VocabParallelWeight):
    """[..., h] -> logits [..., v_padded/tp]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., h] -> [..., v_padded/tp]; columns of padding hold zero."""
        return project_to_vocabulary(x, self)


def project_to_vocabulary(x: torch.Tensor, table: VocabParallelWeight) -> torch.Tensor:
    """Logits of hidden states under a table that may be the word embedding (tied): [..., h] -> [..., v_padded/tp]."""
    return ops.linear(copy_to(x, table.group), table.weight)
