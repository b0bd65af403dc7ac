"""Builds the datasets of a run from the `data` section of its config."""

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
from neox.data.samples.cursor import (
    Cursor,
    SavedCursor,
    Source,
    continue_from,
    first_phase,
    identify,
    matched_sources,
    same_shares,
    settings_of,
    tokenizer_of,
)
from neox.data.samples.documents import (
    DocumentDataset,
    LabelledDataset,
    PairDataset,
    check_labels,
    check_same_documents,
)
from neox.data.samples.fim import FimDataset, Transform
from neox.data.samples.index_cache import PACKING_NAMES, cache_key, cached_order
from neox.data.samples.order import EpochDataset, GptNeoxOrderDataset, check_tokens, gpt_neox_order, split_ranges
from neox.data.samples.packing import PackedDataset, Packing, pack_documents
from neox.data.samples.sample import BatchReader, Dataset
from neox.data.store.indexed import IndexedDataset
from neox.data.text.input_files import find_files
from neox.data.text.text_cache import RunText, tokenize
from neox.data.text.tokenizer import file_hash
from neox.errors import ConfigError, DataError

PARTS = ("train", "validation", "test")
BLEND_MARGIN = 1.005  # GPT-NeoX requests this factor more than its share from each dataset of a blend


def build_datasets(config: Config, num_samples: dict[str, int]) -> dict[str, Dataset]:
    """The datasets of a new run, by part; see `RunDatasets`."""
    return RunDatasets(config, num_samples).parts


class RunDatasets:
    """The datasets of a run, and what a count of their samples means.

    Args:
        config: the config of the run.
        num_samples: samples needed of "train", "validation" and "test". A part that is missing or 0 is not built. Only
            `order: neox` computes its order for that number; `order: epoch` is unbounded.
        saved: the data cursor of the checkpoint that the run resumes from; None for a new run.

    Attributes:
        parts: part -> dataset, for the parts that the config has.
        cursor: the data cursor for the checkpoints of the run.
        lines: what has changed since the checkpoint.

    Raises:
        ConfigError: not exactly one of data.path, data.text and data.train, a bad split, or a tokenizer without the
            tokens of fill in the middle.
        DataError: a dataset is missing, damaged, built with a different tokenizer or too short, or has ids outside the
            vocabulary; or a split is empty.
        CheckpointError: the data differs from that of the checkpoint. No file has been written by then.
    """

    def __init__(self, config: Config, num_samples: dict[str, int], saved: SavedCursor | None = None):
        check_sources(config)
        wanted = {part: num_samples[part] for part in PARTS if num_samples.get(part, 0) > 0}
        text = run_text(config)
        settings = settings_of(config, tokenizer_of(config), None if text is None else text.key)
        if saved is not None and text is not None and saved.cursor.settings.get("data.text") not in (None, text.key):
            unread = (Source("data.text", 1.0),)  # a refused start must not tokenize the text
            continue_from(saved, Cursor(settings, unread, (first_phase(unread),)), ())
        path = config.data.path if text is None else tokenize(text)
        opened = _open_all(config, path, list(wanted))
        part_sources = {part: _part_sources(config, opened, path, part) for part in wanted}
        train, num_train = part_sources.get("train", []), wanted.get("train", 0)
        sources = [
            _cursor_source(config, opened, source, count)
            for source, count in zip(train, _samples_per_source(config, train, num_train), strict=True)
        ]
        if saved is not None and any(source.epochs for source in sources):
            sources = _keep_epochs(config, opened, sources, train, saved, num_train)
        self.cursor = Cursor(settings, tuple(sources), (first_phase(sources),))
        self.lines: list[str] = []
        if saved is not None:
            validation = [_cursor_source(config, opened, source) for source in part_sources.get("validation", ())]
            continuation = continue_from(saved, self.cursor, validation)
            self.cursor, self.lines = replace(self.cursor, phases=continuation.phases), continuation.lines
        self.parts: dict[str, Dataset] = {}
        for part in wanted:
            if not part_sources[part]:
                continue
            datasets = self._build_part(config, opened, part, part_sources[part], wanted[part])
            if part == "train":
                self._note_samples_per_epoch(datasets)
            weights = normalise_weights([part_source.source.weight for part_source in part_sources[part]]).tolist()
            self.parts[part] = blended(datasets, weights, self.cursor.phases if part == "train" else None)

    def _build_part(
        self,
        config: Config,
        opened: dict[str, IndexedDataset],
        part: str,
        part_sources: Sequence[PartSource],
        samples: int,
    ) -> list[Dataset]:
        """The datasets of a part, one per source."""
        needed = _samples_per_source(config, part_sources, samples)
        if part == "train":
            lengths = [source.epochs for source in self.cursor.sources]
            needed = [
                count
                if epochs is None
                else _samples_for_epochs(config, opened[part_source.source.path], part_source.span, epochs, count)
                for part_source, epochs, count in zip(part_sources, lengths, needed, strict=True)
            ]
        return [
            _build_source(config, opened, part, part_source, count)
            for part_source, count in zip(part_sources, needed, strict=True)
        ]

    def _note_samples_per_epoch(self, datasets: Sequence[Dataset]) -> None:
        """Add the number of samples per epoch to the cursor's sources."""
        sources = [
            replace(source, samples=len(dataset) // (source.epochs or 1))
            for dataset, source in zip(datasets, self.cursor.sources, strict=True)
        ]
        self.cursor = replace(self.cursor, sources=tuple(sources))


class PartSource(NamedTuple):
    """A source of a part: its files, documents (for order: neox, sequences) [first, last), and name in messages."""

    source: DataSource
    span: tuple[int, int]
    name: str


def _part_sources(config: Config, opened: dict[str, IndexedDataset], path: str | None, part: str) -> list[PartSource]:
    """The sources of a part.

    Raises:
        DataError: data.split leaves no document for it.
        ConfigError: bad weights.
    """
    data = config.data
    if path is not None:
        return [
            PartSource(
                DataSource(path=path, weight=1.0, labels=None, rejected=None, rejected_labels=None),
                _split_part(config, opened[path], part),
                "data.text" if data.text else path,
            )
        ]
    part_sources = [
        PartSource(source, (0, _split_units(data, opened[source.path])), source.path)
        for source in _configured_sources(data, part)
    ]
    if part_sources:
        try:
            normalise_weights([part_source.source.weight for part_source in part_sources])
        except DataError as error:
            raise ConfigError(
                error.what, where=f"data.{part}: {error.where or ''}", got=error.got, want=error.want
            ) from error
    return part_sources


def _samples_per_source(config: Config, part_sources: Sequence[PartSource], samples: int) -> list[int]:
    """Number of samples that a run needs of each source."""
    if not config.data.train:
        return [samples] * len(part_sources)
    shares = normalise_weights([part_source.source.weight for part_source in part_sources]) if part_sources else []
    return [math.ceil(samples * share * BLEND_MARGIN) for share in shares]


def _cursor_source(
    config: Config, opened: dict[str, IndexedDataset], part_source: PartSource, samples: int = 0
) -> Source:
    """A source by its content. `samples` is the number needed of it, which the arrays of `order: neox` depend on."""
    source, data = part_source.source, config.data
    roles = {
        "tokens": source.path,
        "labels": source.labels,
        "rejected": source.rejected,
        "rejected_labels": source.rejected_labels,
    }
    files = {role: identify(opened[prefix]) for role, prefix in roles.items() if prefix is not None}
    in_gpt_neox_order = data.order == "neox" and data.packing == "concatenate" and source.rejected is None
    epochs = None
    if samples and in_gpt_neox_order:
        epochs = _epochs(config, opened[source.path], part_source.span, samples)
    return Source(part_source.name, source.weight, files, part_source.span, epochs)


def _epochs(config: Config, dataset: IndexedDataset, span: tuple[int, int], samples: int) -> int:
    """Epochs of the arrays of `order: neox` for that many samples."""
    tokens = dataset.first_token(span[1]) - dataset.first_token(span[0])
    check_tokens(dataset, span, tokens, config.data.seq_length)
    return core.epochs_needed(tokens, config.data.seq_length, samples)


def _samples_for_epochs(
    config: Config, dataset: IndexedDataset, span: tuple[int, int], epochs: int, samples: int
) -> int:
    """The number of samples for which the arrays of `gpt_neox_order` have `epochs` epochs; `samples` if it is one."""
    if _epochs(config, dataset, span, samples) == epochs:
        return samples
    return (epochs * (dataset.first_token(span[1]) - dataset.first_token(span[0])) - 1) // config.data.seq_length


def _keep_epochs(
    config: Config,
    opened: dict[str, IndexedDataset],
    sources: list[Source],
    part_sources: Sequence[PartSource],
    saved: SavedCursor,
    samples: int,
) -> list[Source]:
    """The sources, with the epochs of `order: neox` in the checkpoint if they suffice for what the run still reads."""
    before = saved.cursor
    taken = PhasedBlend(before.phases).taken(saved.consumed).tolist()
    weights = [part_source.source.weight for part_source in part_sources]
    reweighted = not same_shares(before.phases[-1].weights, weights)
    remaining = max(samples - saved.consumed, 0)
    partner = matched_sources(_without_epochs(before.sources), _without_epochs(sources))
    for old, new in partner.items():
        saved_source, part_source = before.sources[old], part_sources[new]
        if saved_source.files is None:
            continue
        epochs = sources[new].epochs
        if reweighted:
            needed = taken[old] + math.ceil(remaining * normalise_weights(weights)[new]) + 1
            epochs = _epochs(config, opened[part_source.source.path], part_source.span, needed)
        sources[new] = replace(sources[new], epochs=max(epochs or 1, saved_source.epochs or 1))
    return sources


def _without_epochs(sources: Sequence[Source]) -> list[Source]:
    return [replace(source, epochs=None) for source in sources]


def run_text(config: Config) -> RunText | None:
    """The text that the run tokenizes itself (data.text); None if there is none.

    Raises:
        DataError: a file is missing or of a kind that is not read.
    """
    data, tokenizer = config.data, config.tokenizer
    if not data.text:
        return None
    folder = Path(config.run.dir) / "text" if data.text_cache is None else Path(data.text_cache)
    return RunText(find_files(data.text, source="data.text"), str(tokenizer.file), tokenizer.eod_token, folder)


def documents_of_parts(config: Config) -> dict[str, list[tuple[IndexedDataset, tuple[int, int]]]]:
    """The documents [first, last) of each dataset in "train", "validation" and "test".

    Raises:
        ConfigError, DataError: see `RunDatasets`.
    """
    data = config.data
    check_sources(config)
    text = run_text(config)
    path = data.path if text is None else tokenize(text)
    if path is None:
        named = {part: [source.path for source in _configured_sources(data, part)] for part in PARTS}
        opened = {prefix: IndexedDataset(prefix) for prefixes in named.values() for prefix in prefixes}
        complete = {prefix: (dataset, (0, dataset.num_documents)) for prefix, dataset in opened.items()}
        return {part: [complete[prefix] for prefix in prefixes] for part, prefixes in named.items() if prefixes}
    dataset = IndexedDataset(path)
    units = _split_units(data, dataset)
    spans = split_ranges(data.split, units)
    if units != dataset.num_documents:  # sequences: the documents that begin in a span
        spans = [tuple(np.searchsorted(dataset.documents[:-1], span).tolist()) for span in spans]
    return {part: [(dataset, span)] for part, span in zip(PARTS, spans, strict=True) if span[0] < span[1]}


def notes(datasets: dict[str, Dataset]) -> list[str]:
    """What a run logs about its datasets at its start: the fill rate of packed samples."""
    parts = [
        (name, part)
        for name, dataset in datasets.items()
        for part in (dataset.parts if isinstance(dataset, MixedDataset) else [dataset])
    ]
    packed = [(name, part.samples if isinstance(part, FimDataset) else part) for name, part in parts]
    return [f"{name}: {part.note()}" for name, part in packed if isinstance(part, PackedDataset)]


def _configured_sources(data: DataConfig, part: str) -> tuple[DataSource, ...]:
    return {"train": data.train, "validation": data.validation, "test": data.test}[part]


def _open_all(config: Config, path: str | None, parts: list[str]) -> dict[str, IndexedDataset]:
    """Open each prefix once and check it against the config. `path` is the dataset that data.split divides."""
    data = config.data
    sources = [source for part in parts for source in _configured_sources(data, part)]
    prefixes = (
        [path]
        if path is not None
        else [prefix for source in sources for prefix in (source.path, source.rejected) if prefix]
    )
    opened: dict[str, IndexedDataset] = {}
    for prefix in prefixes:
        if prefix not in opened:
            opened[prefix] = IndexedDataset(prefix)
            _check_vocabulary(opened[prefix], config)
    for prefix in [prefix for source in sources for prefix in (source.labels, source.rejected_labels) if prefix]:
        opened.setdefault(prefix, IndexedDataset(prefix))
    return opened


def _check_vocabulary(dataset: IndexedDataset, config: Config) -> None:
    """Check the ids and the tokenizer in the sidecar against the config.

    Without a sidecar the loader checks each batch.
    """
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
            do="use the tokenizer of the dataset, or raise model.vocab_size",
        )
    if config.tokenizer.file is not None and sidecar.tokenizer_hash is not None:
        dataset.check_tokenizer(file_hash(config.tokenizer.file), config.tokenizer.file)


def _split_part(config: Config, dataset: IndexedDataset, part: str) -> tuple[int, int]:
    """The range of a part of the dataset.

    `order: neox` divides sequences, as GPT-NeoX does; `order: epoch` divides documents.
    """
    data = config.data
    unit = _split_units(data, dataset)
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


def blended(datasets: list[Dataset], weights: list[float], phases: Sequence[BlendPhase] | None) -> Dataset:
    """The blend of several datasets; a single one is returned as it is if the run started with it."""
    if len(datasets) == 1 and (not phases or [phase.first for phase in phases] == [0]):
        return datasets[0]
    readers = [dataset for dataset in datasets if isinstance(dataset, BatchReader)]
    return (
        BlendedDataset(readers, weights, phases)
        if len(readers) == len(datasets)
        else MixedDataset(datasets, weights, phases)
    )


def _split_units(data: DataConfig, dataset: IndexedDataset) -> int:
    """The number of units that data.split divides: sequences in GPT-NeoX's order, else documents."""
    return len(dataset) if data.order == "neox" and data.packing == "concatenate" else dataset.num_documents


def _build_source(
    config: Config, opened: dict[str, IndexedDataset], part: str, part_source: PartSource, samples: int
) -> Dataset:
    """The dataset of one source, packed by data.packing; for training, with fill in the middle."""
    data, source, span = config.data, part_source.source, part_source.span
    dataset, labels = opened[source.path], _labels(opened, source.labels)
    longest = data.seq_length + 1 if data.packing == "document" or source.rejected is not None else None
    for tokens, learned in ((source.path, source.labels), (source.rejected, source.rejected_labels)):
        if tokens is not None and learned is not None and source.weight:
            check_same_documents(opened[tokens], opened[learned], "labels")
            check_labels(opened[learned], span, longest)
    if source.rejected is not None:
        rejected = (opened[source.rejected], _labels(opened, source.rejected_labels))
        return PairDataset((dataset, labels), rejected, data.seq_length, config.train.seed)
    if data.packing == "document":
        result = DocumentDataset(dataset, labels, data.seq_length, config.train.seed, span)
    elif data.packing == "best_fit":
        result = _build_packed(config, (dataset, labels), span)
    else:
        result = _build_ordered(config, dataset, span, samples)
        result = result if labels is None else LabelledDataset(result, dataset, labels)
    if part != "train" or not data.fim.rate or isinstance(result, LabelledDataset):
        return result
    return FimDataset(
        result, Transform(data.fim, config.tokenizer), dataset.checksum(), config.train.seed, data.document_mask
    )


def _labels(opened: dict[str, IndexedDataset], prefix: str | None) -> IndexedDataset | None:
    return None if prefix is None else opened.get(prefix)


def _build_packed(
    config: Config, files: tuple[IndexedDataset, IndexedDataset | None], span: tuple[int, int]
) -> PackedDataset:
    """Documents [first, last), best-fit packed. The packing is cached."""
    data = config.data
    dataset, labels = files
    key = cache_key(packing=1, idx=dataset.checksum(), first=span[0], last=span[1], seq_length=data.seq_length)

    def packed() -> Packing:
        return cached_order(
            _cache_folders(config, dataset), key, lambda: pack_documents(dataset, span, data.seq_length), PACKING_NAMES
        )

    return PackedDataset(
        dataset,
        span,
        data.seq_length,
        config.train.seed,
        document_mask=data.document_mask,
        labels=labels,
        packed=packed,
    )


def _cache_folders(config: Config, dataset: IndexedDataset) -> list[Path]:
    """Folders for index arrays, in order of preference."""
    if config.data.index_cache is not None:
        return [Path(config.data.index_cache)]
    return [Path(dataset.prefix).parent / "index_cache", Path(config.run.dir) / "index_cache"]


def _build_ordered(
    config: Config, dataset: IndexedDataset, span: tuple[int, int], samples: int
) -> EpochDataset | GptNeoxOrderDataset:
    """Documents (order: epoch) or sequences (order: neox) [first, last) in the order of the config."""
    data, seed = config.data, config.train.seed
    if data.order == "epoch":
        return EpochDataset(dataset, span, data.seq_length, seed, data.document_mask)
    first, last = span
    check_tokens(dataset, span, dataset.first_token(last) - dataset.first_token(first), data.seq_length)

    def build() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return gpt_neox_order(dataset.sizes, np.arange(first, last), data.seq_length, samples, seed)

    key = cache_key(
        idx=dataset.checksum(), first=first, last=last, seq_length=data.seq_length, num_samples=samples, seed=seed
    )
    return GptNeoxOrderDataset(
        dataset, cached_order(_cache_folders(config, dataset), key, build), data.seq_length, data.document_mask
    )
