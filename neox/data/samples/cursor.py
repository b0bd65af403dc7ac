"""The data cursor of a checkpoint: the datasets that its count of samples refers to, their order and blending.

A resume compares the cursor with the data of the config. Unchanged sources continue after their last sample, also with
different weights. Any other difference is an error, because the same count would mean different samples (docs/data.md,
"Changing the data of a run").
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from neox.config.schema import Config
from neox.config.values import to_builtins
from neox.data.samples.blend import BlendPhase, PhasedBlend, normalise_weights
from neox.data.store.indexed import IndexedDataset
from neox.data.text.tokenizer import file_hash
from neox.errors import CheckpointError, DataError
from neox.files import JsonObject, JsonValue

# number and size of the evenly spaced parts of a .bin without a sidecar that are hashed
SPOTS, SPOT_BYTES = 64, 1 << 16
SHOWN = 4  # differences or sources per message
# a different value changes every sample
REORDERS = ("data.seq_length", "data.order", "data.packing", "train.seed", "data.text")
Span = tuple[int, int]


@dataclass(frozen=True)
class FileIdentity:
    """A dataset by its content, independent of its path.

    Attributes:
        index: XXH64 of .idx, in hex digits.
        tokens: digest of .bin: `blocks-...` of the checksums in the sidecar, or `spots-...` of the parts that were
            read.
        num_documents: for messages, as is num_tokens.
    """

    index: str
    tokens: str
    num_documents: int
    num_tokens: int

    def same(self, other: FileIdentity) -> bool:
        """Whether the digests agree. If only one of both has a sidecar, only the index is compared."""
        comparable = self.tokens.split("-")[0] == other.tokens.split("-")[0]
        return self.index == other.index and (self.tokens == other.tokens or not comparable)

    def describe(self) -> str:
        """The dataset in a message."""
        return f"{self.num_documents:,} documents of {self.num_tokens:,} tokens ({self.index[:8]}, {self.tokens[-8:]})"


def identify(dataset: IndexedDataset) -> FileIdentity:
    """The identity of a dataset, from its sidecar, else from its index and at most SPOTS x SPOT_BYTES of .bin.

    Without a sidecar, a change of a larger .bin that keeps its lengths and is outside of these spots is not detected.
    Reading all of it at every start would cost minutes for a large corpus.

    Raises:
        DataError: the dataset cannot be read.
    """
    index = f"{dataset.checksum():016x}"
    if dataset.sidecar is not None:
        sums = ",".join(f"{value:016x}" for value in dataset.sidecar.block_sums)
        digest = f"blocks-{hashlib.sha256(sums.encode()).hexdigest()[:32]}"
    else:
        size = dataset.num_tokens * dataset.dtype.itemsize
        digest = f"spots-{_spots(dataset.bin_path, size)}"
    return FileIdentity(index, digest, dataset.num_documents, dataset.num_tokens)


def _spots(path: str, size: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    complete = size <= SPOTS * SPOT_BYTES
    starts = (
        range(0, size, SPOT_BYTES) if complete else [(size - SPOT_BYTES) * spot // (SPOTS - 1) for spot in range(SPOTS)]
    )
    try:
        with open(path, "rb") as file:
            for start in starts:
                file.seek(start)
                digest.update(file.read(SPOT_BYTES))
    except OSError as error:
        raise DataError("dataset cannot be read", where=path, got=error.strerror) from error
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Source:
    """One source of the training samples.

    Attributes:
        path: prefix of its tokens, or data.text; used in messages and not for identity.
        weight: its weight in the config.
        files: role (tokens, labels, rejected, rejected_labels) -> identity; None if unknown (a checkpoint of an earlier
            version).
        span: its documents (for order: neox, sequences) [first, last); None if unknown.
        epochs: for order: neox, the epochs of its arrays, on which their content depends; else None, as if unknown.
        samples: samples per epoch; None if unknown.
    """

    path: str
    weight: float
    files: Mapping[str, FileIdentity] | None = None
    span: Span | None = None
    epochs: int | None = None
    samples: int | None = None

    def same(self, other: Source) -> bool:
        """Whether both give the same samples in the same order, under the same settings."""
        if self.files is None or other.files is None:
            return self.path == other.path
        files = self.files.keys() == other.files.keys() and all(
            identity.same(other.files[role]) for role, identity in self.files.items()
        )
        return files and self.span == other.span and self.epochs == other.epochs

    def same_tokens(self, other: Source) -> bool:
        """Whether both read the same dataset, in any order and any part of it."""
        if self.files is None or other.files is None:
            return self.path == other.path
        return self.files["tokens"].same(other.files["tokens"])

    def to_json(self) -> JsonObject:
        """The JSON value in a checkpoint."""
        files = {
            role: [file.index, file.tokens, file.num_documents, file.num_tokens]
            for role, file in (self.files or {}).items()
        }
        span = None if self.span is None else list(self.span)
        return {
            "path": self.path,
            "weight": self.weight,
            "files": files,
            "span": span,
            "epochs": self.epochs,
            "samples": self.samples,
        }

    @classmethod
    def from_json(cls, value: JsonObject) -> Source:
        """Parse a value that was validated by neox.checkpoint.state."""
        files = {role: FileIdentity(*parts) for role, parts in value["files"].items()}
        span = None if value["span"] is None else tuple(value["span"])
        return cls(value["path"], value["weight"], files or None, span, value["epochs"], value["samples"])


@dataclass(frozen=True)
class Cursor:
    """What a count of samples refers to.

    Attributes:
        settings: key -> value of everything that the samples depend on besides their sources.
        sources: the sources of the training set.
        phases: how they were blended; the last phase is the current one.
    """

    settings: JsonObject
    sources: tuple[Source, ...]
    phases: tuple[BlendPhase, ...]

    def to_json(self) -> JsonObject:
        """The JSON value in a checkpoint."""
        phases = [[phase.first, list(phase.weights), list(phase.taken)] for phase in self.phases]
        return {
            "settings": dict(self.settings),
            "sources": [source.to_json() for source in self.sources],
            "stretches": phases,
        }

    @classmethod
    def from_json(cls, value: JsonObject) -> Cursor:
        """Parse a value that was validated by neox.checkpoint.state."""
        phases = tuple(BlendPhase(first, tuple(weights), tuple(taken)) for first, weights, taken in value["stretches"])
        return cls(value["settings"], tuple(map(Source.from_json, value["sources"])), phases)

    @classmethod
    def of_config(cls, config: Config) -> Cursor:
        """The cursor of a checkpoint without one, from its config, without the content of the files."""
        data = config.data
        named = [(source.path, source.weight) for source in data.train] or [(data.path or "data.text", 1.0)]
        sources = tuple(Source(path, weight) for path, weight in named)
        return cls(settings_of(config, tokenizer=None), sources, (first_phase(sources),))


@dataclass(frozen=True)
class SavedCursor:
    """The data cursor of the checkpoint that a run resumes from.

    Attributes:
        where: the checkpoint, for messages.
        consumed: samples read before it.
        cursor: its data cursor.
        accept: accept differences (checkpoint.accept_data_change).
    """

    where: str
    consumed: int
    cursor: Cursor
    accept: bool = False


@dataclass
class Continuation:
    """How the data of a run continues from a checkpoint.

    Attributes:
        phases: phases of the blend.
        lines: changes to log.
    """

    phases: tuple[BlendPhase, ...]
    lines: list[str] = field(default_factory=list)


def first_phase(sources: Sequence[Source]) -> BlendPhase:
    """The first phase of the blend of a new run."""
    weights = normalise_weights([source.weight for source in sources]).tolist() if sources else []
    return BlendPhase(0, tuple(weights), (0,) * len(sources))


def settings_of(config: Config, tokenizer: str | None, text: str | None = None) -> JsonObject:
    """The settings that samples depend on besides their sources. `tokenizer` and `text` are hashes; None if unknown."""
    data = config.data
    return {
        "data.seq_length": data.seq_length,
        "data.order": data.order,
        "data.packing": data.packing,
        "train.seed": config.train.seed,
        "data.document_mask": data.document_mask,
        "data.fim": to_builtins(data.fim) if data.fim.rate else None,
        "tokenizer.file": tokenizer,
        "data.text": text,
        "data.split": None if data.train else data.split,
    }


def tokenizer_of(config: Config) -> str | None:
    """Hash of the tokenizer of the config; None if it has none.

    Raises:
        DataError: it cannot be read.
    """
    return None if config.tokenizer.file is None else file_hash(config.tokenizer.file)


def continue_from(saved: SavedCursor, now: Cursor, validation: Sequence[Source]) -> Continuation:
    """How a run with the data of `now` continues from a checkpoint.

    Args:
        saved: the cursor of the checkpoint.
        now: the cursor of the config; its phases are ignored.
        validation: sources of the validation set.

    Raises:
        CheckpointError: the data differs from that of the checkpoint, and the difference is not accepted.
    """
    if not saved.consumed:
        return Continuation((first_phase(now.sources),))
    before = saved.cursor
    taken = PhasedBlend(before.phases).taken(saved.consumed).tolist()
    changed = changed_settings(before, now)
    partner = {} if any(key in REORDERS for key in changed) else matched_sources(before.sources, now.sources)
    ended = [number for number, count in enumerate(taken) if count and number not in partner]
    if not changed and not ended:
        return reblended(saved, now, partner, taken)
    lines = differences(before, now, changed, ended) + consequences(before, now, taken, ended, validation)
    if not saved.accept:
        raise CheckpointError(
            "the data of the run differs from that of its checkpoint",
            where=saved.where,
            got=", ".join(lines),
            want=f"the data that the {saved.consumed:,} samples of the checkpoint were read from",
            do="revert the change, choose another run.dir, or accept it once by --set "
            "checkpoint.accept_data_change=true",
        )
    lines = [f"accepted by checkpoint.accept_data_change: {line}" for line in lines]
    return Continuation((new_phase(saved, now, partner, taken),), lines)


def changed_settings(before: Cursor, now: Cursor) -> dict[str, tuple[JsonValue, JsonValue]]:
    """Key -> (value before, value now) of the settings that differ.

    A value that is unknown on either side is not compared.

    data.split is compared by the documents that it selects; by its text only if those of the checkpoint are unknown.
    """
    changed = {
        key: (before.settings.get(key), value)
        for key, value in now.settings.items()
        if before.settings.get(key) != value
    }
    for key in ("tokenizer.file", "data.text"):
        if None in changed.get(key, ()):
            del changed[key]
    if "data.split" in changed and (
        None in changed["data.split"] or all(source.files is not None for source in before.sources)
    ):
        del changed["data.split"]
    return changed


def matched_sources(before: Sequence[Source], now: Sequence[Source]) -> dict[int, int]:
    """Number of an unchanged source before -> its number now, the same one if possible. Each matches at most once."""
    partner: dict[int, int] = {}
    for old, source in enumerate(before):
        free = [new for new, candidate in enumerate(now) if new not in partner.values() and source.same(candidate)]
        if free:
            partner[old] = old if old in free else free[0]
    return partner


def new_phase(saved: SavedCursor, now: Cursor, partner: Mapping[int, int], taken: Sequence[int]) -> BlendPhase:
    """The phase that starts at the checkpoint: matched sources continue, the others begin."""
    counts = [0] * len(now.sources)
    for old, new in partner.items():
        counts[new] = taken[old]
    return BlendPhase(saved.consumed, first_phase(now.sources).weights, tuple(counts))


def reblended(saved: SavedCursor, now: Cursor, partner: Mapping[int, int], taken: Sequence[int]) -> Continuation:
    """The blend of a run whose sources are unchanged, added, or removed before they were read. Weights may differ."""
    phases = saved.cursor.phases
    weights = first_phase(now.sources).weights
    in_place = all(partner.get(old) == old for old in range(len(taken)))
    if in_place and same_shares(phases[-1].weights, weights):
        return Continuation(phases)
    phase = new_phase(saved, now, partner, taken)
    added = (0,) * (len(weights) - len(taken))
    earlier = (
        [BlendPhase(old.first, old.weights + added, old.taken + added) for old in phases if old.first < saved.consumed]
        if in_place
        else []
    )
    before, after = normalise_weights(phases[-1].weights), normalise_weights(weights)
    olds = {new: old for old, new in partner.items()}
    parts = []
    for number, source in enumerate(now.sources):
        share = f"{after[number]:.4g}" if number not in olds else f"{before[olds[number]]:.4g} -> {after[number]:.4g}"
        parts.append(f"{source.path} at its sample {phase.taken[number]:,} (share {share})")
    more = f" and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
    line = (
        f"data.train: the blend changes at sample {saved.consumed:,}, each source continues after its last sample, "
        f"without repeats or skips: "
    )
    return Continuation((*earlier, phase), [line + ", ".join(parts[:SHOWN]) + more])


def same_shares(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two lists of weights are proportional.

    Raises:
        DataError: bad weights.
    """
    return len(one) == len(other) and np.allclose(
        normalise_weights(one), normalise_weights(other), rtol=1e-12, atol=0.0
    )


def differences(
    before: Cursor, now: Cursor, changed: Mapping[str, tuple[object, object]], ended: Iterable[int]
) -> list[str]:
    """Descriptions of the differences."""
    lines = [f"{key}: {shown(old)} -> {shown(new)}" for key, (old, new) in changed.items()]
    if any(key in REORDERS for key in changed):
        return lines  # every source has a different order, even if it is unchanged
    per_source = []
    for number in ended:
        source = before.sources[number]
        current = next((candidate for candidate in now.sources if source.same_tokens(candidate)), None)
        named = next((candidate for candidate in now.sources if candidate.path == source.path), None)
        if current is not None:
            per_source.append(
                reading(source, current, before.settings.get("data.split"), now.settings.get("data.split"))
            )
        elif named is not None:
            per_source.append(f"the content of {source.path} changed: {content(source)} -> {content(named)}")
        else:
            per_source.append(f"{source.path} is no longer read")
    more = [f"and {len(per_source) - SHOWN} more sources"] if len(per_source) > SHOWN else []
    return lines + per_source[:SHOWN] + more


def reading(source: Source, current: Source, split: str | None, new_split: str | None) -> str:
    """How the same dataset is read differently."""
    if source.span != current.span:
        splits = "" if split == new_split else f"data.split {split} -> {new_split}: "
        return f"{splits}training reads documents {bounds(source.span)} of {source.path} -> {bounds(current.span)}"
    if source.epochs != current.epochs:
        return f"data.order neox: the order of {source.path} has {source.epochs} epochs -> {current.epochs}"
    return f"labels or rejected answers of {source.path} changed"


def consequences(
    before: Cursor, now: Cursor, taken: Sequence[int], ended: Iterable[int], validation: Sequence[Source]
) -> list[str]:
    """How many samples would be repeated or lost if the run continued."""
    lines, ended = [], list(ended)
    length = before.settings["data.seq_length"]
    for number in ended:
        source, count = before.sources[number], taken[number]
        current = next((candidate for candidate in now.sources if source.same_tokens(candidate)), None)
        same_name = any(candidate.path == source.path for candidate in now.sources)
        read = f"{count:,} samples ({count * length:,} tokens) read of {source.path}"
        if current is not None:
            lines.append(f"the {read} would be repeated among new ones, and none would be lost")
        elif same_name:
            left = (
                ""
                if source.samples is None
                else f", the other {source.samples - count % source.samples:,} of its epoch would be lost"
            )
            lines.append(f"what the new content shares with the {read} would be repeated{left}")
        else:
            left = "" if source.samples is None else f"{source.samples - count % source.samples:,} "
            lines.append(
                f"the {left}remaining samples of the epoch of {source.path} would be lost, and none would be repeated"
            )
        lines += [
            moved(source, held_out)
            for held_out in validation
            if source.same_tokens(held_out) and overlap(source.span, held_out.span)
        ]
    more = [f"and likewise for {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return lines[:SHOWN] + more or ["no sample would be repeated or lost, but each would be built differently"]


def moved(source: Source, held_out: Source) -> str:
    """Documents that move from training to validation."""
    return (
        f"documents {bounds(overlap(source.span, held_out.span))} of {source.path} were training data and would be "
        f"validation data"
    )


def overlap(one: Span | None, other: Span | None) -> Span | None:
    """The intersection of two ranges; None if it is empty or unknown."""
    if one is None or other is None or max(one[0], other[0]) >= min(one[1], other[1]):
        return None
    return max(one[0], other[0]), min(one[1], other[1])


def bounds(span: Span | None) -> str:
    """A range in a message."""
    return "(not recorded)" if span is None else f"{span[0]:,} to {span[1] - 1:,}"


def content(source: Source) -> str:
    """The dataset of a source in a message."""
    return "(not recorded)" if source.files is None else source.files["tokens"].describe()


def shown(value: object) -> str:
    """The value of a setting in a message."""
    return value[:16] if isinstance(value, str) else str(value)
