"""Reference log-probabilities of a DPO run: those of all answers by the initial model, computed before the first step
and stored in run.dir/reference.

The loss measures against them, so no second model is needed during training. A resumed run reads them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from neox.data.samples.blend import MixedDataset
from neox.data.samples.documents import PairDataset
from neox.data.samples.loader import Loader
from neox.data.samples.sample import Dataset, Pair
from neox.engine.engine import Engine
from neox.engine.evaluation import log_probabilities
from neox.errors import CheckpointError
from neox.files import make_dirs, write_durably
from neox.parallel.mesh import Mesh


class InOrder:
    """The pairs of a dataset by number, padded with the last one so that all processes have as many batches."""

    def __init__(self, pairs: PairDataset):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        return self.pairs.pair(min(index, len(self.pairs) - 1))

    def describe(self, index: int, token: int) -> str:
        """Name a pair."""
        return f"{self.pairs.chosen.dataset.bin_path} pair {min(index, len(self.pairs) - 1)} token {token}"


def pair_datasets(datasets: dict[str, Dataset]) -> Iterator[PairDataset]:
    """The datasets of pairs of all parts of a run, including those of blends."""
    for dataset in datasets.values():
        parts = dataset.parts if isinstance(dataset, MixedDataset) else (dataset,)
        yield from (part for part in parts if isinstance(part, PairDataset))


def file_of(folder: Path, pairs: PairDataset, seq_length: int) -> Path:
    """The file of a dataset's numbers.

    Its name identifies the content of the dataset and the length at which answers are truncated.
    """
    chosen, rejected = pairs.checksums()
    return folder / f"{chosen:016x}-{rejected:016x}-{seq_length}.npy"


def compute(pairs: PairDataset, engine: Engine, mesh: Mesh, micro_batch_size: int, vocab_size: int) -> np.ndarray:
    """Log-probabilities fp32 [pairs, 2] by the current model.

    Every process calls it, computes a share, and gets all of them.
    """
    out = torch.zeros(len(pairs), 2, dtype=torch.float32)
    loader = Loader(
        InOrder(pairs),
        micro_batch_size=micro_batch_size,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp,
        prefetch=1,
        vocab_size=vocab_size,
    )
    with loader:
        for _ in range(0, len(pairs), micro_batch_size * mesh.dp):
            (batch,) = next(loader)
            inside = batch.sample_ids < len(pairs)
            out[batch.sample_ids[inside]] = log_probabilities(engine, batch).view(-1, 2)[inside]
    if mesh.dp_group is not None:
        out = out.to(mesh.device)
        dist.all_reduce(out, group=mesh.dp_group)
    return out.cpu().numpy()


def set_references(
    datasets: dict[str, Dataset], folder: Path, engine: Engine, *, micro_batch_size: int, fresh: bool
) -> int:
    """Set the reference of every dataset of pairs: computed and stored if the run is `fresh`, else read.

    Returns the number of pairs.

    Raises:
        CheckpointError: the run resumes and a file is missing or damaged.
        DiskError: it cannot be written.
    """
    config, mesh = engine.config, engine.mesh
    total = 0
    for pairs in pair_datasets(datasets):
        path = file_of(folder, pairs, config.data.seq_length)
        if fresh:
            pairs.reference = compute(pairs, engine, mesh, micro_batch_size, config.model.vocab_size)
            if mesh.rank == 0:
                content = io.BytesIO()
                np.save(content, pairs.reference, allow_pickle=False)
                make_dirs(folder)
                write_durably(path, content.getvalue(), sole_writer=True)
        else:
            pairs.reference = read(path, len(pairs))
        total += len(pairs)
    return total


def read(path: Path, count: int) -> np.ndarray:
    """Read stored log-probabilities, fp32 [count, 2].

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        values = np.load(path, allow_pickle=False)
        if values.shape != (count, 2) or values.dtype != np.float32:
            raise ValueError(f"{values.dtype} {values.shape}")
    except (OSError, ValueError, EOFError) as error:
        do = "restore it; or start a new run from the weights of this checkpoint by checkpoint.init_from"
        raise CheckpointError(
            "reference log-probabilities are missing or damaged",
            where=path,
            got=error,
            want=f"float32 [{count}, 2]",
            do=do,
        ) from error
    return values
