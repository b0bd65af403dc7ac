"""How the samples of a global batch are distributed over micro-batches and data-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchLayout:
    """The distribution of a global batch: micro_batch_size samples to each of dp data-parallel ranks in turn.

    tp and cp are the sizes of tensor and context parallelism.
    """

    micro_batch_size: int
    dp: int
    tp: int = 1
    cp: int = 1

    def samples(self, micro_batch: int, dp_rank: int) -> range:
        """The samples of one micro-batch of a data-parallel rank, counted from the start of the global batch."""
        first = (micro_batch * self.dp + dp_rank) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)

    def locate(self, sample: int) -> tuple[int, int, int]:
        """(micro-batch, data-parallel rank, row) of a sample of the global batch: the inverse of `samples`."""
        part, row = divmod(sample, self.micro_batch_size)
        micro_batch, dp_rank = divmod(part, self.dp)
        return micro_batch, dp_rank, row

    def dp_rank(self, rank: int) -> int:
        """Data-parallel rank of a global rank."""
        return rank // (self.tp * self.cp) % self.dp
