"""From the `data` section of a config to the datasets of a run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from neox.config.schema import Config, DataConfig, DataSource
from neox.data.blend import normalise_weights
from neox.data.documents import DocumentDataset, LabelledDataset, PairDataset
from neox.data.fim import FimDataset, Transform
from neox.data.index_cache import PACKING_NAMES, cache_key, cached_order
from neox.data.indexed import IndexedDataset
from neox.data.packing import PackedDataset, Packing, pack_documents
from neox.data.sampling import BlendedDataset, Dataset, EpochDataset, MixedDataset, NeoxDataset, RowReader, check_tokens, neox_order, split_ranges
from neox.data.text_cache import tokenized
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
        ConfigError: not one of data.path, data.text and data.train, a bad split, or a tokenizer without the tokens of fill in the middle.
        DataError: files that are missing, damaged, from another tokenizer, with ids beyond the vocabulary, or too short; an empty split.
    """
    data = config.data
    _check_section(data)
    wanted = {part: num_samples[part] for part in PARTS if num_samples.get(part, 0) > 0}
    path = prefix_to_split(config)
    opened = _open_all(config, path, list(wanted))
    datasets: dict[str, Dataset] = {}
    for part, samples in wanted.items():
        if path is not None:
            datasets[part] = _split_part(config, opened[path], part, samples)
        elif _sources(data, part):
            datasets[part] = _blended_part(config, opened, part, samples)
    return datasets


def prefix_to_split(config: Config) -> str | None:
    """Prefix of the dataset that data.split cuts: data.path, or what data.text becomes, now or before. None where there are lists of sources."""
    data = config.data
    if not data.text:
        return data.path
    folder = Path(data.text_cache) if data.text_cache is not None else Path(config.run.dir) / "text"
    return tokenized(data.text, config.tokenizer.file, config.tokenizer.eod_token, folder)


def documents_of_parts(config: Config) -> dict[str, list[tuple[IndexedDataset, tuple[int, int]]]]:
    """The documents [first, last) of each dataset that "train", "validation" and "test" are made of, as far as the config has them. Raises as above."""
    data = config.data
    _check_section(data)
    path = prefix_to_split(config)
    if path is None:
        named = {part: [source.path for source in _sources(data, part)] for part in PARTS}
        opened = {prefix: IndexedDataset(prefix) for prefixes in named.values() for prefix in prefixes}
        whole = {prefix: (dataset, (0, dataset.num_documents)) for prefix, dataset in opened.items()}
        return {part: [whole[prefix] for prefix in prefixes] for part, prefixes in named.items() if prefixes}
    dataset = IndexedDataset(path)
    units = _units(data, dataset)
    spans = split_ranges(data.split, units)
    if units != dataset.num_documents:  # sequences: the documents that begin in them
        spans = [tuple(np.searchsorted(dataset.documents[:-1], span).tolist()) for span in spans]
    return {part: [(dataset, span)] for part, span in zip(PARTS, spans, strict=True) if span[0] < span[1]}


def notes(datasets: dict[str, Dataset]) -> list[str]:
    """What a run says of its datasets at its start: how full packed samples are."""
    parts = [(name, part) for name, dataset in datasets.items() for part in (dataset.parts if isinstance(dataset, MixedDataset) else [dataset])]
    packed = [(name, part.samples if isinstance(part, FimDataset) else part) for name, part in parts]
    return [f"{name}: {part.note()}" for name, part in packed if isinstance(part, PackedDataset)]


def _check_section(data: DataConfig) -> None:
    given = [name for name, value in (("path", data.path), ("text", data.text), ("train", data.train)) if value]
    if len(given) != 1:
        want = "data.train (a list), or data.path or data.text with data.split"
        raise ConfigError("training data must be named once", where="data", got=", ".join(given) or "nothing", want=want, do="--set data.train=[PREFIX]")
    if not data.train and (data.validation or data.test):
        got, do = "data.validation or data.test", f"name data.train instead of data.{given[0]}"
        raise ConfigError(f"data.{given[0]} is cut by data.split and excludes lists", where="data", got=got, do=do)


def _sources(data: DataConfig, part: str) -> tuple[DataSource, ...]:
    return {"train": data.train, "validation": data.validation, "test": data.test}[part]


def _open_all(config: Config, path: str | None, parts: list[str]) -> dict[str, IndexedDataset]:
    """Open each prefix once and check it against the config; `path`: the dataset that data.split cuts."""
    data = config.data
    sources = [source for part in parts for source in _sources(data, part)]
    prefixes = [path] if path is not None else [prefix for source in sources for prefix in (source.path, source.rejected) if prefix]
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
    if config.tokenizer.file is not None and sidecar.tokenizer_hash is not None:
        dataset.check_tokenizer(file_hash(config.tokenizer.file), config.tokenizer.file)


def _split_part(config: Config, dataset: IndexedDataset, part: str, samples: int) -> Dataset:
    """The part of data.path. `order: neox` cuts sequences, as upstream does; `order: epoch` cuts documents."""
    data = config.data
    unit = _units(data, dataset)
    span = split_ranges(data.split, unit)[PARTS.index(part)]
    if span[0] >= span[1]:
        raise DataError(
            f"split leaves no documents for {part}",
            where=f"{dataset.bin_path}, data.split={data.split}",
            got=f"0 of {unit} documents",
            want="at least 1",
            do="give the part a larger share, or set evaluate.interval to 0 if it is not needed",
        )
    return _source(config, (dataset, None), part, span, samples)


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
        else:
            datasets.append(_source(config, (dataset, labels), part, (0, _units(config.data, dataset)), math.ceil(samples * share * BLEND_MARGIN)))
    if len(datasets) == 1:
        return datasets[0]
    by_rows = all(isinstance(dataset, RowReader) for dataset in datasets)
    return BlendedDataset(datasets, list(shares)) if by_rows else MixedDataset(datasets, list(shares))


def _units(data: DataConfig, dataset: IndexedDataset) -> int:
    """What a dataset is cut into: sequences in GPT-NeoX's order, else documents."""
    return len(dataset) if data.order == "neox" and data.packing == "concatenate" else dataset.num_documents


def _source(config: Config, files: tuple[IndexedDataset, IndexedDataset | None], part: str, span: tuple[int, int], samples: int) -> Dataset:
    """One source of a part, its samples made as data.packing says; those of the training set go through fill in the middle."""
    data = config.data
    dataset, labels = files
    if data.packing == "document":
        made = DocumentDataset(dataset, labels, data.seq_length, config.train.seed, span)
    elif data.packing == "best_fit":
        made = _packed(config, files, span)
    else:
        made = _ordered(config, dataset, span, samples)
        made = made if labels is None else LabelledDataset(made, dataset, labels)
    if part != "train" or not data.fim.rate:
        return made
    return FimDataset(made, Transform(data.fim, config.tokenizer), dataset.checksum(), config.train.seed, data.document_mask)


def _packed(config: Config, files: tuple[IndexedDataset, IndexedDataset | None], span: tuple[int, int]) -> PackedDataset:
    """Documents of a range, best-fit packed; the packing is cached."""
    data = config.data
    dataset, labels = files
    key = cache_key(packing=1, idx=dataset.checksum(), first=span[0], last=span[1], seq_length=data.seq_length)

    def packed() -> Packing:
        return cached_order(_cache_folders(config, dataset), key, lambda: pack_documents(dataset, span, data.seq_length), PACKING_NAMES)

    return PackedDataset(dataset, span, data.seq_length, config.train.seed, document_mask=data.document_mask, labels=labels, packed=packed)


def _cache_folders(config: Config, dataset: IndexedDataset) -> list[Path]:
    """Where index arrays are looked for and kept."""
    if config.data.index_cache is not None:
        return [Path(config.data.index_cache)]
    return [Path(dataset.prefix).parent / "index_cache", Path(config.run.dir) / "index_cache"]


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
    return NeoxDataset(dataset, cached_order(_cache_folders(config, dataset), key, build), data.seq_length, data.document_mask)
