"""From the `data` section of a config to the datasets of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from neox._native import core
from neox.config.schema import Config, DataConfig, DataSource
from neox.config.validate import check_sources
from neox.data.samples.blend import BlendedDataset, BlendPhase, MixedDataset, PhasedBlend, normalise_weights
from neox.data.samples.cursor import Cursor, SavedCursor, Source, continued, first_phase, identify, same_shares, settings_of, tokenizer_of
from neox.data.samples.documents import DocumentDataset, LabelledDataset, PairDataset, check_labels, check_same_documents
from neox.data.samples.fim import FimDataset, Transform
from neox.data.samples.index_cache import PACKING_NAMES, cache_key, cached_order
from neox.data.samples.order import EpochDataset, GptNeoxOrderDataset, check_tokens, gpt_neox_order, split_ranges
from neox.data.samples.packing import PackedDataset, Packing, pack_documents
from neox.data.samples.sample import BatchReader, Dataset
from neox.data.store.indexed import IndexedDataset
from neox.data.text.input_files import find_files
from neox.data.text.text_cache import text_key, tokenized
from neox.data.text.tokenizer import file_hash
from neox.errors import ConfigError, DataError

PARTS = ("train", "validation", "test")
BLEND_MARGIN = 1.005  # upstream asks each dataset of a blend for this much more than its share


def build_datasets(config: Config, num_samples: dict[str, int]) -> dict[str, Dataset]:
    """The datasets that a run reads from its first sample on; see `RunDatasets`."""
    return RunDatasets(config, num_samples).parts


class RunDatasets:
    """The datasets that a run reads, and what a count of their samples means.

    Args:
        num_samples: samples needed of "train", "validation" and "test"; parts that are absent or 0 are not built.
            Only `order: neox` makes its order for that number; `order: epoch` is unbounded.
        saved: the data cursor of the checkpoint that the run resumes from; None: it begins.

    Attributes:
        parts: part -> dataset, for the parts that the config has.
        cursor: for the checkpoints of the run.
        lines: what changed since the checkpoint.

    Raises:
        ConfigError: not one of data.path, data.text and data.train, a bad split, or a tokenizer without the tokens of fill in the middle.
        DataError: files that are missing, damaged, from another tokenizer, with ids beyond the vocabulary, or too short; an empty split.
        CheckpointError: the data is not that of the checkpoint. Nothing was written by then: no tokenized text, no arrays of an order or packing.
    """

    def __init__(self, config: Config, num_samples: dict[str, int], saved: SavedCursor | None = None):
        check_sources(config)
        wanted = {part: num_samples[part] for part in PARTS if num_samples.get(part, 0) > 0}
        text = Path(text_prefix(config)).name if config.data.text else None
        settings = settings_of(config, tokenizer_of(config), text)
        if saved is not None and text is not None and saved.cursor.settings.get("data.text") not in (None, text):
            unread = (Source("data.text", 1.0),)  # nothing is tokenized for a start that is refused
            continued(saved, Cursor(settings, unread, (first_phase(unread),)), ())
        path = prefix_to_split(config)
        opened = _open_all(config, path, list(wanted))
        rows = {part: _rows(config, opened, path, part) for part in wanted}
        validation = [_described(config, opened, row) for row in rows.get("validation", ())]
        needed = _needed(config, rows.get("train", ()), wanted.get("train", 0))
        sources = [_described(config, opened, row, count) for row, count in zip(rows.get("train", ()), needed, strict=True)]
        if saved is not None and any(source.epochs for source in sources):
            sources = _keep_epochs(config, opened, sources, rows["train"], saved, wanted["train"])
        self.cursor = Cursor(settings, tuple(sources), (first_phase(sources),))
        self.lines: list[str] = []
        if saved is not None:
            found = continued(saved, self.cursor, validation)
            self.cursor, self.lines = replace(self.cursor, phases=found.phases), found.lines
        self.parts: dict[str, Dataset] = {}
        for part in (part for part in wanted if rows[part]):
            made = self._made(config, opened, part, rows[part], wanted[part])
            if part == "train":
                per_epoch = [len(one) // (source.epochs or 1) for one, source in zip(made, self.cursor.sources, strict=True)]
                sources = [replace(source, samples=count) for source, count in zip(self.cursor.sources, per_epoch, strict=True)]
                self.cursor = replace(self.cursor, sources=tuple(sources))
            weights = normalise_weights([row.source.weight for row in rows[part]]).tolist()
            self.parts[part] = mixed(made, weights, self.cursor.phases if part == "train" else None)

    def _made(self, config: Config, opened: dict[str, IndexedDataset], part: str, rows: Sequence[PartSource], samples: int) -> list[Dataset]:
        """The datasets of a part, one per source."""
        needed = _needed(config, rows, samples)
        if part == "train":
            lengths = [source.epochs for source in self.cursor.sources]
            needed = [
                count if epochs is None else _samples_of(config, opened[row.source.path], row.span, epochs, count)
                for row, epochs, count in zip(rows, lengths, needed, strict=True)
            ]
        return [_source(config, opened, part, row, count) for row, count in zip(rows, needed, strict=True)]


class PartSource(NamedTuple):
    """A source of a part: its files, the documents (order: neox: sequences) [first, last) of them, and its name for messages."""

    source: DataSource
    span: tuple[int, int]
    name: str


def _rows(config: Config, opened: dict[str, IndexedDataset], path: str | None, part: str) -> list[PartSource]:
    """The sources of a part. Raises DataError where data.split leaves none of the documents, ConfigError for bad weights."""
    data = config.data
    if path is not None:
        return [PartSource(DataSource(path=path), _split_part(config, opened[path], part), "data.text" if data.text else path)]
    rows = [PartSource(source, (0, _units(data, opened[source.path])), source.path) for source in _sources(data, part)]
    if rows:
        try:
            normalise_weights([row.source.weight for row in rows])
        except DataError as error:
            raise ConfigError(error.what, where=f"data.{part}: {error.where or ''}", got=error.got, want=error.want) from error
    return rows


def _needed(config: Config, rows: Sequence[PartSource], samples: int) -> list[int]:
    """Samples that a run needs of each source."""
    if not config.data.train:
        return [samples] * len(rows)
    shares = normalise_weights([row.source.weight for row in rows]) if rows else []
    return [math.ceil(samples * share * BLEND_MARGIN) for share in shares]


def _described(config: Config, opened: dict[str, IndexedDataset], row: PartSource, samples: int = 0) -> Source:
    """A source by its content. samples: that are needed of it, which the arrays of `order: neox` depend on."""
    roles = {"tokens": row.source.path, "labels": row.source.labels, "rejected": row.source.rejected, "rejected_labels": row.source.rejected_labels}
    files = {role: identify(opened[prefix]) for role, prefix in roles.items() if prefix is not None}
    neox = config.data.order == "neox" and config.data.packing == "concatenate" and row.source.rejected is None and samples
    epochs = _epochs(config, opened[row.source.path], row.span, samples) if neox else None
    return Source(row.name, row.source.weight, files, row.span, epochs)


def _epochs(config: Config, dataset: IndexedDataset, span: tuple[int, int], samples: int) -> int:
    """Epochs of the arrays of `order: neox` that have so many samples."""
    tokens = dataset.first_token(span[1]) - dataset.first_token(span[0])
    check_tokens(dataset, span, tokens, config.data.seq_length)
    return core.epochs_needed(tokens, config.data.seq_length, samples)


def _samples_of(config: Config, dataset: IndexedDataset, span: tuple[int, int], epochs: int, samples: int) -> int:
    """The samples to ask `gpt_neox_order` for, so that its arrays have that many epochs: `samples` where these give them already."""
    if _epochs(config, dataset, span, samples) == epochs:
        return samples
    return (epochs * (dataset.first_token(span[1]) - dataset.first_token(span[0])) - 1) // config.data.seq_length


def _keep_epochs(
    config: Config, opened: dict[str, IndexedDataset], sources: list[Source], rows: Sequence[PartSource], saved: SavedCursor, samples: int
) -> list[Source]:
    """The sources with as many epochs of `order: neox` as in the checkpoint, where these hold what the run still reads of them."""
    before = saved.cursor
    taken = PhasedBlend(before.phases).taken(saved.consumed).tolist()
    weights = [row.source.weight for row in rows]
    reweighted = not same_shares(before.phases[-1].weights, weights)
    rest = max(samples - saved.consumed, 0)
    found = []
    for source, row, share in zip(sources, rows, normalise_weights(weights), strict=True):
        dataset = opened[row.source.path]
        old = next((number for number, one in enumerate(before.sources) if one.files and replace(source, epochs=one.epochs).same(one)), None)
        if old is not None:
            needed = taken[old] + math.ceil(rest * share) + 1
            epochs = _epochs(config, dataset, row.span, needed) if reweighted else source.epochs
            source = replace(source, epochs=max(epochs, before.sources[old].epochs or 1))
        found.append(source)
    return found


def prefix_to_split(config: Config) -> str | None:
    """Prefix of the dataset that data.split cuts: data.path, or what data.text becomes, now or before. None where there are lists of sources."""
    data = config.data
    if not data.text:
        return data.path
    return tokenized(data.text, config.tokenizer.file, config.tokenizer.eod_token, _text_folder(config))


def text_prefix(config: Config) -> str:
    """Prefix of the dataset that data.text becomes; it need not be there. Raises DataError."""
    return str(_text_folder(config) / text_key(find_files(config.data.text), config.tokenizer.file, config.tokenizer.eod_token))


def _text_folder(config: Config) -> Path:
    return Path(config.data.text_cache) if config.data.text_cache is not None else Path(config.run.dir) / "text"


def documents_of_parts(config: Config) -> dict[str, list[tuple[IndexedDataset, tuple[int, int]]]]:
    """The documents [first, last) of each dataset that "train", "validation" and "test" are made of, as far as the config has them. Raises as above."""
    data = config.data
    check_sources(config)
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


def _split_part(config: Config, dataset: IndexedDataset, part: str) -> tuple[int, int]:
    """The range of a part of data.path. `order: neox` cuts sequences, as upstream does; `order: epoch` cuts documents."""
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
    return span


def mixed(datasets: list[Dataset], weights: list[float], phases: Sequence[BlendPhase] | None) -> Dataset:
    """One dataset of several; the only one itself where the run began with it."""
    if len(datasets) == 1 and (not phases or [phase.first for phase in phases] == [0]):
        return datasets[0]
    by_rows = all(isinstance(dataset, BatchReader) for dataset in datasets)
    return BlendedDataset(datasets, weights, phases) if by_rows else MixedDataset(datasets, weights, phases)


def _units(data: DataConfig, dataset: IndexedDataset) -> int:
    """What a dataset is cut into: sequences in GPT-NeoX's order, else documents."""
    return len(dataset) if data.order == "neox" and data.packing == "concatenate" else dataset.num_documents


def _source(config: Config, opened: dict[str, IndexedDataset], part: str, row: PartSource, samples: int) -> Dataset:
    """One source of a part, its samples made as data.packing says; those of the training set go through fill in the middle."""
    data = config.data
    dataset, labels = opened[row.source.path], opened.get(row.source.labels)
    longest = data.seq_length + 1 if data.packing == "document" or row.source.rejected is not None else None
    for tokens, learned in ((row.source.path, row.source.labels), (row.source.rejected, row.source.rejected_labels)):
        if learned is not None and row.source.weight:
            check_same_documents(opened[tokens], opened[learned], "labels")
            check_labels(opened[learned], row.span, longest)
    if row.source.rejected is not None:
        rejected = (opened[row.source.rejected], opened.get(row.source.rejected_labels))
        return PairDataset((dataset, labels), rejected, data.seq_length, config.train.seed)
    if data.packing == "document":
        made = DocumentDataset(dataset, labels, data.seq_length, config.train.seed, row.span)
    elif data.packing == "best_fit":
        made = _packed(config, (dataset, labels), row.span)
    else:
        made = _ordered(config, dataset, row.span, samples)
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


def _ordered(config: Config, dataset: IndexedDataset, span: tuple[int, int], samples: int) -> EpochDataset | GptNeoxOrderDataset:
    """Documents (epoch) or sequences (neox) [first, last) in the order of the config."""
    data, seed = config.data, config.train.seed
    if data.order == "epoch":
        return EpochDataset(dataset, span, data.seq_length, seed, data.document_mask)
    first, last = span
    check_tokens(dataset, span, dataset.first_token(last) - dataset.first_token(first), data.seq_length)

    def build() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return gpt_neox_order(dataset.sizes, np.arange(first, last), data.seq_length, samples, seed)

    key = cache_key(idx=dataset.checksum(), first=first, last=last, seq_length=data.seq_length, num_samples=samples, seed=seed)
    return GptNeoxOrderDataset(dataset, cached_order(_cache_folders(config, dataset), key, build), data.seq_length, data.document_mask)
