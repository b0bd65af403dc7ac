"""From the `data` section of a config to the datasets of a run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from neox.config.schema import Config, DataConfig, DataSource
from neox.data.blend import normalise_weights
from neox.data.documents import DocumentDataset, LabelledDataset, MixedDataset, PairDataset
from neox.data.index_cache import cache_key, cached_order
from neox.data.indexed import IndexedDataset
from neox.data.sampling import BlendedDataset, Dataset, EpochDataset, NeoxDataset, RowReader, check_tokens, neox_order, split_ranges
from neox.data.tokenizer import file_hash
from neox.errors import ConfigError, DataError

PARTS = ("train", "validation", "test")
BLEND_MARGIN = 1.005  # upstream asks each dataset of a blend for this much more than its share


def build_datasets(config: Config, num_samples: dict[str, int]) -> dict[str, Dataset]:
    """The datasets that a run reads.

    Args:
        num_samples: samples needed of "train", "validation" and "test"; parts that are absent or 0 are not built.
            Only `order: neox` makes its order for that number; `order: epoch` is unbounded.

    Returns:
        part -> dataset, for the parts that the config has.

    Raises:
        ConfigError: neither data.path nor data.train, both, or a bad split.
        DataError: files that are missing, damaged, from another tokenizer, with ids beyond the vocabulary, or too short; an empty split.
    """
    data = config.data
    _check_section(data)
    wanted = {part: num_samples[part] for part in PARTS if num_samples.get(part, 0) > 0}
    opened = _open_all(config, list(wanted))
    datasets: dict[str, Dataset] = {}
    for part, samples in wanted.items():
        if data.path is not None:
            datasets[part] = _split_part(config, opened[data.path], part, samples)
        elif _sources(data, part):
            datasets[part] = _blended_part(config, opened, part, samples)
    return datasets


def _check_section(data: DataConfig) -> None:
    if (data.path is None) == (not data.train):
        got, want = "both" if data.train else "neither", "data.train (a list), or data.path with data.split"
        raise ConfigError("training data must be named once", where="data", got=got, want=want, do="--set data.train=[PREFIX]")
    if data.path is not None and (data.validation or data.test):
        got, do = "data.validation or data.test", "name data.train instead of data.path"
        raise ConfigError("data.path is cut by data.split and excludes lists", where="data", got=got, do=do)


def _sources(data: DataConfig, part: str) -> tuple[DataSource, ...]:
    return {"train": data.train, "validation": data.validation, "test": data.test}[part]


def _open_all(config: Config, parts: list[str]) -> dict[str, IndexedDataset]:
    """Open each prefix once and check it against the config."""
    data = config.data
    sources = [source for part in parts for source in _sources(data, part)]
    prefixes = [data.path] if data.path is not None else [prefix for source in sources for prefix in (source.path, source.rejected) if prefix]
    opened: dict[str, IndexedDataset] = {}
    for prefix in prefixes:
        if prefix not in opened:
            opened[prefix] = IndexedDataset(prefix)
            _check_vocabulary(opened[prefix], config)
    for prefix in [prefix for source in sources for prefix in (source.labels, source.rejected_labels) if prefix]:
        opened.setdefault(prefix, IndexedDataset(prefix))
    return opened


def _check_vocabulary(dataset: IndexedDataset, config: Config) -> None:
    """What the sidecar knows about the tokenizer must fit the config. Without a sidecar the loader checks each batch."""
    sidecar = dataset.sidecar
    if sidecar is None:
        return
    if sidecar.largest_id >= config.model.vocab_size:
        bad = dataset.find_bad_token(config.model.vocab_size)
        document, offset = dataset.locate(bad) if bad is not None else (None, None)
        raise DataError(
            "token id is outside the vocabulary",
            where=f"{dataset.bin_path} document {document} offset {offset}",
            got=f"largest id {sidecar.largest_id}",
            want=f"0 to {config.model.vocab_size - 1} (model.vocab_size)",
            do="use the tokenizer that made the data, or raise model.vocab_size",
        )
    if config.tokenizer.file is None or sidecar.tokenizer_hash is None:
        return
    ours = file_hash(config.tokenizer.file)
    if ours != sidecar.tokenizer_hash:
        raise DataError(
            "data were made with another tokenizer",
            where=f"{dataset.prefix}.json",
            got=f"tokenizer hash {sidecar.tokenizer_hash[:16]}",
            want=f"{ours[:16]} ({config.tokenizer.file})",
            do="name the tokenizer that made the data as tokenizer.file, or preprocess again",
        )


def _split_part(config: Config, dataset: IndexedDataset, part: str, samples: int) -> Dataset:
    """The part of data.path. `order: neox` cuts sequences, as upstream does; `order: epoch` cuts documents."""
    data = config.data
    unit = len(dataset) if data.order == "neox" else dataset.num_documents
    span = split_ranges(data.split, unit)[PARTS.index(part)]
    if span[0] >= span[1]:
        raise DataError(
            f"split leaves no documents for {part}",
            where=f"{dataset.bin_path}, data.split={data.split}",
            got=f"0 of {unit} documents",
            want="at least 1",
            do="give the part a larger share, or set evaluate.interval to 0 if it is not needed",
        )
    return _ordered(config, dataset, span, samples)


def _blended_part(config: Config, opened: dict[str, IndexedDataset], part: str, samples: int) -> Dataset:
    sources = _sources(config.data, part)
    try:
        shares = normalise_weights([source.weight for source in sources])
    except DataError as error:
        raise ConfigError(error.what, where=f"data.{part}: {error.where or ''}", got=error.got, want=error.want) from error
    datasets = []
    for source, share in zip(sources, shares, strict=True):
        dataset, labels = opened[source.path], opened.get(source.labels)
        if source.rejected is not None:
            rejected = (opened[source.rejected], opened.get(source.rejected_labels))
            datasets.append(PairDataset((dataset, labels), rejected, config.data.seq_length, config.train.seed))
        elif config.data.packing == "documents":
            datasets.append(DocumentDataset(dataset, labels, config.data.seq_length, config.train.seed))
        else:
            unit = len(dataset) if config.data.order == "neox" else dataset.num_documents
            packed = _ordered(config, dataset, (0, unit), math.ceil(samples * share * BLEND_MARGIN))
            datasets.append(packed if labels is None else LabelledDataset(packed, dataset, labels))
    if len(datasets) == 1:
        return datasets[0]
    by_rows = all(isinstance(dataset, RowReader) for dataset in datasets)
    return BlendedDataset(datasets, list(shares)) if by_rows else MixedDataset(datasets, list(shares))


def _ordered(config: Config, dataset: IndexedDataset, span: tuple[int, int], samples: int) -> EpochDataset | NeoxDataset:
    """Documents (epoch) or sequences (neox) [first, last) in the order of the config."""
    data, seed = config.data, config.train.seed
    if data.order == "epoch":
        return EpochDataset(dataset, span, data.seq_length, seed, data.document_mask)
    first, last = span
    check_tokens(dataset, span, dataset.first_token(last) - dataset.first_token(first), data.seq_length)

    def build() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return neox_order(dataset.sizes, np.arange(first, last), data.seq_length, samples, seed)

    key = cache_key(idx=dataset.checksum(), first=first, last=last, seq_length=data.seq_length, num_samples=samples, seed=seed)
    beside = Path(dataset.prefix).parent / "index_cache"
    folders = [Path(data.index_cache)] if data.index_cache is not None else [beside, Path(config.run.dir) / "index_cache"]
    return NeoxDataset(dataset, cached_order(folders, key, build), data.seq_length, data.document_mask)
