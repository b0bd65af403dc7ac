"""Indexed datasets: PREFIX.bin and PREFIX.idx in the format of GPT-NeoX and Megatron-LM, and their sidecar.

numpy is imported where it is used: its import is a third of the time of `neox preprocess --help`, and a run of
`neox preprocess` imports it while the first blocks are encoded.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

from neox._native import core
from neox.data.store.sidecar import BLOCK_BYTES, Sidecar, is_foreign, read_sidecar, sidecar_path, write_sidecar
from neox.errors import DataError, DiskError

if TYPE_CHECKING:
    import numpy as np

# inputs, targets, segment ids or None, position ids or None; see neox.data.samples.sample.BatchArrays
RowArrays: TypeAlias = "tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]"

SMALL_VOCABULARY = 65_500  # Megatron-LM writes ids below this as uint16


def token_dtype(largest_id: int) -> str:
    """Token type of a dataset with ids up to `largest_id`, added tokens included: uint16 below 65,500, else int32.

    Raises:
        DataError: the id does not fit int32.
    """
    if largest_id >= 2**31:
        raise DataError("token id is too large for the format", got=largest_id, want=f"below {2**31}")
    return "uint16" if largest_id < SMALL_VOCABULARY else "int32"


def numpy_dtype(name: str) -> np.dtype:
    """numpy's type of a name."""
    import numpy as np

    return np.dtype(name)


def sums_before(sizes: np.ndarray) -> np.ndarray:
    """The sum of the sizes before each one, then of all: int64 [len(sizes) + 1]."""
    import numpy as np

    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def make_folder(folder: str) -> None:
    """Create the folder of a dataset and its parents; "" is the current folder.

    Raises:
        DiskError: it cannot be created.
    """
    try:
        os.makedirs(folder or os.curdir, exist_ok=True)
    except OSError as problem:
        raise DiskError(
            "cannot create the folder of a dataset", where=folder, got=problem.strerror, do="choose another --out"
        ) from problem


def check_prefix(prefix: str) -> None:
    """Check that a prefix has a name that `.bin` can be appended to.

    Raises:
        DataError: it is empty, or a folder.
    """
    if os.path.basename(prefix) in ("", os.curdir, os.pardir):
        raise DataError(
            "name of a dataset is missing",
            where=prefix or "''",
            want="a path without suffix, such as data/corpus for data/corpus.bin",
            do="append a name",
        )


def check_existing(prefix: str) -> None:
    """Check that a prefix is not the name of a file itself: of a text, or of a dataset's .bin or .idx.

    Raises:
        DataError: it is, and no dataset has that name in front of its suffixes.
    """
    check_prefix(prefix)
    if os.path.isfile(prefix) and not os.path.lexists(f"{prefix}.idx"):
        stem, suffix = os.path.splitext(prefix)
        raise DataError(
            "not the prefix of a dataset",
            where=prefix,
            got="a file",
            want="a path without suffix, such as data/corpus for data/corpus.bin and data/corpus.idx",
            do=f"name {stem}"
            if suffix in (".bin", ".idx")
            else "run neox preprocess on it, and name what it had as --out",
        )


class IndexedDataset:
    """A tokenized corpus, memory-mapped.

    `len(dataset)` is its number of sequences; `dataset[i]` is a read-only numpy view of the tokens of sequence i.
    Opening checks the complete structure of the index, the size of .bin, and, if there is a sidecar, that it belongs to
    both files. Blocks of .bin are compared with the checksums of the sidecar when `read` first touches them.

    Args:
        prefix: path without suffix.

    Raises:
        DataError: a file is missing, unreadable, truncated or damaged, or does not match the others.
    """

    def __init__(self, prefix: str | os.PathLike[str]):
        self.prefix = os.fspath(prefix)
        if "\0" in self.prefix:  # the system would end the name there
            raise DataError("invalid path of a dataset", where=repr(self.prefix), got="a NUL character")
        check_existing(self.prefix)
        self._core = core.Dataset(os.fsencode(self.prefix))
        self.dtype = numpy_dtype(self._core.dtype)
        self.num_documents: int = self._core.num_documents
        self.num_tokens: int = self._core.num_tokens
        self.sidecar = read_sidecar(self.prefix)
        self._length: int = self._core.num_sequences
        if self.sidecar is not None:
            self._check_sidecar(self.sidecar)
            self._core.guard(self.sidecar.block_bytes, list(self.sidecar.block_sums))

    @property
    def bin_path(self) -> str:
        """Path of the file with the tokens."""
        return f"{self.prefix}.bin"

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each sequence: int32 [len(self)], memory-mapped."""
        return self._core.sizes

    @property
    def documents(self) -> np.ndarray:
        """First sequence of each document, then the number of sequences: int64 [num_documents + 1], memory-mapped."""
        return self._core.documents

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> np.ndarray:
        position = index + self._length if index < 0 else index
        return self._core.sequence(position)

    def __repr__(self) -> str:
        return (
            f"IndexedDataset({self.prefix!r}, {self.num_documents} documents, {self.num_tokens} tokens, {self.dtype})"
        )

    def checksum(self) -> int:
        """XXH64 of .idx, which identifies the content in caches.

        Opening compared it with the value of the sidecar, if any.
        """
        return self._core.idx_checksum() if self.sidecar is None else self.sidecar.idx_sum

    def read(self, first: int, count: int, segments: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens [first, first + count) of the dataset.

        Returns:
            tokens int64 [count], and with `segments` the running number of each token's document, int32 [count].

        Raises:
            DataError: a checksum differs, or the file was truncated since it was opened.
            IndexError: outside the dataset.
        """
        return self._core.read(first, count, segments)

    def read_ordered(
        self, order: np.ndarray, position: int, offset: int, count: int, segments: bool = False
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """`count` tokens of the concatenated sequences order[position:], without the first `offset`; see `read`."""
        return self._core.read_ordered(order, position, offset, count, segments)

    def read_rows(self, firsts: np.ndarray, rows: np.ndarray, out: RowArrays) -> int:
        """Read samples of s + 1 tokens, sample i from token firsts[i] into row rows[i] of the arrays [b, s].

        Returns:
            The largest id; 2^64 - 1 if an id is negative.
        """
        return self._core.read_rows(firsts, rows, *out)

    def read_ordered_rows(
        self, order: np.ndarray, positions: np.ndarray, offsets: np.ndarray, rows: np.ndarray, out: RowArrays
    ) -> int:
        """As `read_rows`, with sample i from token offsets[i] of sequence order[positions[i]]; see `read_ordered`."""
        return self._core.read_ordered_rows(order, positions, offsets, rows, *out)

    def read_spans(self, firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Tokens [firsts[i], firsts[i] + counts[i]) of the dataset for all i, concatenated, int64."""
        return core.read_spans(self._core, firsts, counts)

    def document_statistics(
        self, first: int, last: int, eod_id: int | None
    ) -> tuple[int | None, int | None, int, int, np.ndarray]:
        """Read documents [first, last) once.

        Returns:
            smallest id, largest id, occurrences of `eod_id`, documents that end in it, and uint64 [last - first] hashes
            of the ids of each document without a final `eod_id`. A hash does not depend on the token type.

        Raises:
            DataError: the dataset is damaged.
        """
        return core.document_statistics(self._core, first, last, -1 if eod_id is None else eod_id)

    def document_starts(self) -> np.ndarray:
        """Number of tokens before each document, then of all tokens: int64 [num_documents + 1]."""
        return sums_before(self.sizes)[self.documents]

    def first_token(self, sequence: int) -> int:
        """Number of tokens before a sequence; num_tokens for sequence == len."""
        return self._core.first_token(sequence)

    def first_token_of_document(self, document: int) -> int:
        """Number of tokens before a document; num_tokens for document == num_documents."""
        return self._core.first_token_of_document(document)

    def first_sequence(self, document: int) -> int:
        """First sequence of a document; len for document == num_documents."""
        return self._core.first_sequence(document)

    def locate(self, token: int) -> tuple[int, int]:
        """(document, offset in it) of a token of the dataset."""
        document = self._core.document_of_token(token)
        return document, token - self._core.first_token_of_document(document)

    def find_bad_token(self, vocab_size: int) -> int | None:
        """First token of the dataset whose id is negative or >= vocab_size; None if there is none.

        Reads all of .bin.
        """
        found = self._core.find_bad_token(vocab_size)
        return None if found == self.num_tokens else found

    def check_tokenizer(self, tokenizer_hash: str, file: object) -> None:
        """Check that the dataset was built with a tokenizer.

        Without a sidecar the check passes, because nothing is known.

        Args:
            tokenizer_hash: hash of the tokenizer, see `neox.data.text.tokenizer.file_hash`.
            file: its file, for the message.

        Raises:
            DataError: the sidecar names a different tokenizer.
        """
        if self.sidecar is None or self.sidecar.tokenizer_hash in (None, tokenizer_hash):
            return
        raise DataError(
            "dataset was built with a different tokenizer",
            where=sidecar_path(self.prefix),
            got=f"tokenizer hash {self.sidecar.tokenizer_hash[:16]}",
            want=f"{tokenizer_hash[:16]} ({file})",
            do="name the tokenizer of the dataset, or run neox preprocess again",
        )

    def verify(self) -> list[tuple[int, int]]:
        """Compare all of .bin with the checksums of the sidecar.

        Returns:
            The damaged byte ranges [first, last); empty without a sidecar.
        """
        if self.sidecar is None:
            return []
        size = self.sidecar.block_bytes
        return [
            (block * size, min((block + 1) * size, self.sidecar.bin_bytes)) for block in self._core.damaged_blocks()
        ]

    def _check_sidecar(self, sidecar: Sidecar) -> None:
        ours = (
            self.dtype.name,
            self._length,
            self.num_documents,
            self.num_tokens,
            self.num_tokens * self.dtype.itemsize,
        )
        theirs = (sidecar.dtype, sidecar.num_sequences, sidecar.num_documents, sidecar.num_tokens, sidecar.bin_bytes)
        where = sidecar_path(self.prefix)
        do = "restore the three files from one source, or delete the sidecar to continue without checksums"
        if ours != theirs:
            raise DataError("sidecar does not belong to this dataset", where=where, got=theirs, want=ours, do=do)
        found = self._core.idx_checksum()
        if found != sidecar.idx_sum:
            raise DataError(
                "index file is damaged: checksum differs",
                where=f"{self.prefix}.idx",
                got=f"{found:016x}",
                want=f"{sidecar.idx_sum:016x}",
                do=do,
            )


class IndexedWriter:
    """Writes PREFIX.bin, PREFIX.idx and PREFIX.json.

    No file has its final name before `finish`; a failure leaves no file.

    As a context manager it finishes on success and abandons on an exception.

    Args:
        prefix: path without suffix.
        dtype: token type, `token_dtype(largest possible id)`.
        overwrite: replace an existing dataset, which otherwise is an error.
        tokenizer_hash: recorded in the sidecar, as are vocab_size, eod_id and the attribute `source`. All are
            attributes and may be set later.
        resume: what `sync` returned to a process that has ended. The writer continues with the partial files of that
            process.

    Raises:
        DataError: the dataset already exists, PREFIX.json is somebody else's file, the partial files are shorter than
            `resume` states, or an id does not fit the token type.
        DiskError: the folder cannot be written or is full.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        dtype: str,
        *,
        overwrite: bool = False,
        tokenizer_hash: str | None = None,
        vocab_size: int | None = None,
        eod_id: int | None = None,
        resume: tuple[int, int, int] | None = None,
    ):
        self.prefix = os.fspath(prefix)
        check_prefix(self.prefix)
        existing = [path for path in (f"{self.prefix}.idx", f"{self.prefix}.bin") if os.path.lexists(path)]
        if existing and not overwrite:
            raise DataError("dataset already exists", where=existing[0], do="choose another --out, or pass --overwrite")
        make_folder(os.path.dirname(self.prefix))
        self._check_sidecar_path()
        name = os.fsencode(self.prefix)
        self._core = (
            core.Writer(name, dtype, BLOCK_BYTES) if resume is None else core.Writer(name, dtype, BLOCK_BYTES, resume)
        )
        self.tokenizer_hash, self.vocab_size, self.eod_id = tokenizer_hash, vocab_size, eod_id
        self.source: dict[str, object] | None = None
        self._open = True

    def _check_sidecar_path(self) -> None:
        path = sidecar_path(self.prefix)
        try:
            foreign = is_foreign(path)
        except OSError as error:
            raise DiskError("cannot replace sidecar", where=path, got=error.strerror) from error
        if foreign:
            raise DataError(
                "PREFIX.json is not a sidecar of neox and would be overwritten",
                where=path,
                do="choose another --out, or move the file",
            )

    @property
    def num_documents(self) -> int:
        """Documents so far."""
        return self._core.num_documents

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return self._core.num_tokens

    @property
    def largest_id(self) -> int:
        """Largest id so far; -1 without tokens."""
        return self._core.largest_id

    def add(self, tokens: np.ndarray) -> None:
        """Add one sequence to the current document: integers, any dtype."""
        import numpy as np

        self._core.add_sequence(np.asarray(tokens, dtype=np.int64))

    def end_document(self) -> None:
        """End the current document, which holds the sequences added since the last call."""
        self._core.end_document()

    def add_document(self, tokens: np.ndarray) -> None:
        """Add a document of one sequence."""
        self.add(tokens)
        self.end_document()

    def add_documents(self, tokens: np.ndarray, sizes: np.ndarray) -> None:
        """Add documents of one sequence each: `tokens` in the dtype of the dataset, split by `sizes`."""
        import numpy as np

        self._core.add_documents(np.ascontiguousarray(tokens), sizes)

    def add_dataset(self, dataset: IndexedDataset) -> None:
        """Append all documents of another dataset.

        Raises:
            DataError: its token type differs, or its tokens differ from the checksums of its sidecar.
        """
        self._core.add_dataset(dataset._core)

    def finish(self) -> Sidecar:
        """Make the dataset durable under its final names: .bin, then .idx, then .json."""
        path = sidecar_path(self.prefix)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise DiskError("cannot replace sidecar", where=path, got=error.strerror) from error
        self._core.finish()
        self._open = False
        sidecar = Sidecar(
            dtype=self._core.dtype,
            num_sequences=self._core.num_sequences,
            num_documents=self._core.num_documents,
            num_tokens=self._core.num_tokens,
            largest_id=self._core.largest_id,
            bin_bytes=self._core.num_tokens * numpy_dtype(self._core.dtype).itemsize,
            idx_sum=core.file_checksum(os.fsencode(f"{self.prefix}.idx")),
            block_sums=tuple(self._core.block_sums),
            tokenizer_hash=self.tokenizer_hash,
            vocab_size=self.vocab_size,
            eod_id=self.eod_id,
            source=self.source,
        )
        write_sidecar(self.prefix, sidecar)
        return sidecar

    def sync(self) -> tuple[int, int, int]:
        """Make the partial files durable. Only for documents of one sequence.

        Returns:
            The argument `resume` of a later writer.
        """
        return self._core.sync()

    def keep(self) -> None:
        """Leave the partial files when the writer is abandoned."""
        self._core.keep()

    def abandon(self) -> None:
        """Remove the partial files."""
        self._core.abandon()
        self._open = False

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abandon()
        elif self._open:
            try:
                self.finish()
            except BaseException:
                self.abandon()
                raise
