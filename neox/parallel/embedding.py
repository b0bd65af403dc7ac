"""Word embedding and output projection, sharded along the vocabulary over the tensor group."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from neox.parallel.collectives import SEQUENCE, gather_from
from neox.parallel.linear import column_products, reduce_partial
from neox.parallel.mesh import Mesh, split_evenly
from neox.parallel.shard_spec import ShardedLayer, ShardSpec


class VocabParallelWeight(ShardedLayer):
    """A [v/tp, h] weight over the padded vocabulary.

    Rows from vocab_size on are padding: they are zero, nothing reads them, and their gradient is zero.
    """

    def __init__(self, vocab_size: int, padded_vocab_size: int, hidden_size: int, mesh: Mesh, *, dtype: torch.dtype):
        super().__init__()
        self.mesh = mesh
        self.vocab_size = vocab_size
        self.low, self.high = split_evenly(padded_vocab_size, mesh, "the padded vocabulary")
        self.weight = nn.Parameter(torch.empty(self.high - self.low, hidden_size, dtype=dtype, device=mesh.device))
        self.sharding = {"weight": ShardSpec.sharded((vocab_size, hidden_size), 0, self.low, self.high)}


class VocabParallelEmbedding(VocabParallelWeight):
    """tokens [b, s] -> [b, s, h]: each process looks up the rows that it has, and the results are summed."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens int64 [b, s] -> [b, s, h]; with sequence parallelism the local [b, s/tp, h]."""
        if self.mesh.tp_group is None:
            return F.embedding(tokens, self.weight)
        elsewhere = (tokens < self.low) | (tokens >= self.high)
        rows = F.embedding((tokens - self.low).masked_fill(elsewhere, 0), self.weight)
        return reduce_partial(rows.masked_fill(elsewhere[..., None], 0.0), self.mesh)


class VocabParallelHead(VocabParallelWeight):
    """The output projection over the padded vocabulary."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., h] -> logits [..., v/tp]; padding columns are zero."""
        return project_to_vocabulary(x, self.weight, self.mesh)


class ScoreHead(ShardedLayer):
    """The head of a reward model: one number per position instead of logits. Its weight [1, h] is replicated."""

    def __init__(self, hidden_size: int, mesh: Mesh, *, dtype: torch.dtype):
        super().__init__()
        self.mesh = mesh
        self.weight = nn.Parameter(torch.empty(1, hidden_size, dtype=dtype, device=mesh.device))
        self.sharding = {"weight": ShardSpec.replicated(1, hidden_size, partial=mesh.sequence)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, s, h], or with sequence parallelism the local [b, s/tp, h] -> fp32 [b, s, 1]."""
        scores = F.linear(x.float(), self.weight.float())
        return gather_from(scores, SEQUENCE, self.mesh.tp_group) if self.mesh.sequence else scores


class TiedCopy:
    """The output projection of a tied model under pipeline parallelism: the last stage's copy of the word embedding.

    The first stage owns the embedding. The copy is no parameter: no optimizer steps it, no checkpoint stores it, no
    norm counts it. Its gradient is accumulated in fp32 over the micro-batches and sent to the owner, which sends the
    updated weight back (neox.engine.pipeline).

    Attributes:
        weight: [v/tp, h] over the padded vocabulary, a leaf that requires a gradient.
        spec: the slice of the logical weight.
        gradient: fp32 sum over the micro-batches since `take_gradient`; None: nothing yet.
    """

    def __init__(self, vocab_size: int, padded_vocab_size: int, hidden_size: int, mesh: Mesh, *, dtype: torch.dtype):
        low, high = split_evenly(padded_vocab_size, mesh, "the padded vocabulary")
        self.spec = ShardSpec.sharded((vocab_size, hidden_size), 0, low, high)
        self.mesh = mesh
        self.gradient: torch.Tensor | None = None
        self.weight = torch.empty(0)
        self.replace(torch.empty(high - low, hidden_size, dtype=dtype, device=mesh.device))

    def replace(self, weight: torch.Tensor) -> None:
        """Replace the weight, by one of another device or dtype."""
        self.weight = weight.detach().requires_grad_()
        self.weight.register_post_accumulate_grad_hook(self._collect)

    def _collect(self, weight: torch.Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        if gradient is None:
            return
        if self.gradient is None:
            self.gradient = gradient.float()
        else:
            self.gradient += gradient

    def take_gradient(self) -> torch.Tensor:
        """The gradient accumulated so far, fp32 [v/tp, h]; the next sum starts from zero."""
        gradient, self.gradient = self.gradient, None
        if gradient is None:
            return torch.zeros_like(self.weight, dtype=torch.float32, requires_grad=False)
        return gradient

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., h] -> logits [..., v/tp]."""
        return project_to_vocabulary(x, self.weight, self.mesh)


def project_to_vocabulary(x: torch.Tensor, weight: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """[..., h] -> logits [..., v/tp], for a table [v/tp, h] that may be the word embedding."""
    return column_products(x, mesh, (weight,), (None,))[0]
