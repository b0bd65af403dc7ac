"""Finds input files, and decides whether each is read as JSON lines or as one document."""

from __future__ import annotations

import logging
import os
import re
import shlex
from collections import Counter
from collections.abc import Sequence

import orjson

from neox.errors import DataError
from neox.printing import counted, printable

LINES_SUFFIXES = (".jsonl", ".ndjson", ".jl", ".jsonlines", ".json")  # one JSON object per line
CODECS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz"}
# Taken from a folder by default. A .json file without compression there is more often a tokenizer or a description of
# the data.
FOLDER_SUFFIXES = (".jsonl", ".txt", ".ndjson", ".jl", ".jsonlines", *(f".json{codec}" for codec in CODECS))
FORMS = ("auto", "jsonl", "txt")
NAMED = 3  # files that a warning names

PARQUET = (
    "import sys, pandas; pandas.read_parquet(sys.argv[1]).to_json(sys.argv[2], orient='records', lines=True, "
    "force_ascii=False)"
)
ARROW = "import sys, datasets; datasets.Dataset.from_file(sys.argv[1]).to_json(sys.argv[2], force_ascii=False)"
SAVED = "import sys, datasets; datasets.load_from_disk(sys.argv[1]).to_json(sys.argv[2], force_ascii=False)"
SAVED_SPLITS = (
    "import sys, datasets; [part.to_json(sys.argv[2] + '/' + name + '.jsonl') for name, part in "
    "datasets.load_from_disk(sys.argv[1]).items()]"
)
ARRAY = (
    "import sys, json; sys.stdout.writelines(json.dumps(row) + '\\n' for row in json.load(open(sys.argv[1], "
    "encoding='utf-8')))"
)
ROWS = (
    "import sys, csv, json; csv.field_size_limit(2**31 - 1); "
    "sys.stdout.writelines(json.dumps(row) + '\\n' for row in csv.DictReader(open(sys.argv[1], encoding='utf-8', "
    "newline=''){delimiter}))"
)
# suffix -> name, argument of csv.DictReader
TABLES = {".csv": ("a CSV table", ""), ".tsv": ("a TSV table", ", delimiter='\\t'")}

FOREIGN_SUFFIXES = {".parquet": "a Parquet file", ".arrow": "an Arrow file", ".feather": "an Arrow file"}
ARCHIVES = {
    ".zip": "a zip archive",
    ".tar": "a tar archive",
    ".tgz": "a tar archive",
    ".7z": "a 7z archive",
    ".rar": "a rar archive",
}
OTHER_CODECS = {".lz4": "lz4", ".br": "brotli", ".lzma": "lzma", ".z": "compress", ".snappy": "snappy", ".lzo": "lzo"}
MAGIC = (  # first bytes of files of other kinds, whatever their name
    (b"PAR1\x15", "a Parquet file"),
    (b"ARROW1\0", "an Arrow file"),
    (b"PK\x03\x04", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a rar archive"),
    (b"\x1f\x8b\x08", "gzip data under a name without .gz"),
    (b"\x28\xb5\x2f\xfd", "zstd data under a name without .zst"),
    (b"\xfd7zXZ\0", "xz data under a name without .xz"),
    (b"\x04\x22\x4d\x18", "lz4 data"),
)

log = logging.getLogger("neox.data")


def codec_of(path: str) -> str | None:
    """Compression of a file by its suffix: "gzip", "zstd", "bz2", "xz", or None."""
    return CODECS.get(os.path.splitext(path)[1].lower())


def uncompressed_name(path: str) -> str:
    """The name in lower case, without folder and compression suffix."""
    stem, suffix = os.path.splitext(os.path.basename(path).lower())
    return stem if suffix in CODECS else stem + suffix


def find_files(inputs: Sequence[str], suffixes: Sequence[str] = FOLDER_SUFFIXES, source: str = "--input") -> list[str]:
    """Find the files that inputs name: files, and files in folders with one of `suffixes`, compressed or not.

    Folders are searched at any depth, sorted by name; suffixes ignore case. Linked folders are followed. A file that is
    reached twice, by its name, a link or a hard link, is taken once. Hidden files and folders, and files with other
    suffixes, are left out of folders. Each of these is reported as a warning.

    Args:
        inputs: names of files and folders.
        suffixes: of the files that are taken from folders.
        source: option or config key that gave the inputs, for error messages.

    Raises:
        DataError: an input is missing, is neither a file nor a folder, or is of a kind that is not read (Parquet,
            archives, ...), or a folder has no such file.
    """
    finder = _InputFinder(suffixes, source)
    for name in inputs:
        if os.path.isdir(name):
            finder.add_folder(name)
        elif os.path.isfile(name):
            refuse_by_name(name)
            finder.add(name)
        elif os.path.lexists(name):
            dangling = os.path.islink(name) and not os.path.exists(name)
            if dangling:
                raise DataError(
                    "no such input", where=name, got="a dangling link", want="a file or a folder", do=f"check {source}"
                )
            raise DataError("input is neither a file nor a folder", where=name)
        else:
            raise DataError("no such input", where=name, want="a file or a folder", do=f"check {source}")
    finder.report()
    return finder.files


class _InputFinder:
    """Collects input files, and what is left out."""

    def __init__(self, suffixes: Sequence[str], source: str):
        self.files: list[str] = []
        self._source = source
        self._select = "--suffix" if source == "--input" else "neox preprocess --suffix"
        self._suffixes = tuple(suffix.lower() for suffix in suffixes)
        self._seen: dict[tuple[int, int], str] = {}  # (device, inode) -> the name it was taken under
        self._twice: list[str] = []
        self._hidden: list[str] = []
        self._loops: list[str] = []
        self._special: list[str] = []
        self._others: Counter[str] = Counter()  # suffix -> files

    def add(self, path: str) -> None:
        """Take a file, unless it was already taken."""
        if self._is_new(path):
            self.files.append(path)
        else:
            self._twice.append(path)

    def _is_new(self, path: str) -> bool:
        found = os.stat(path)
        key = (found.st_dev, found.st_ino)
        return found.st_ino == 0 or self._seen.setdefault(key, path) is path  # 0: a file system without inodes

    def add_folder(self, folder: str) -> None:
        """Take the files of a folder.

        Raises:
            DataError: there are none.
        """
        before, others, on_path = len(self.files) + len(self._twice), Counter(self._others), {_identity(folder)}
        self._walk(folder, on_path)
        if len(self.files) + len(self._twice) == before:
            self._refuse_empty(folder, self._others - others)

    def _walk(self, folder: str, on_path: set[tuple[int, int]]) -> None:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError("cannot read folder", where=folder, got=error.strerror) from error
        refuse_saved_dataset(folder, {entry.name for entry in entries})
        below = []
        for entry in entries:
            if entry.name.startswith("."):
                self._hidden.append(entry.path)
            elif entry.is_dir():
                below.append(entry.path)
            elif not entry.is_file():
                self._special.append(entry.path)
            elif self._is_wanted(entry.name):
                self.add(entry.path)
            else:
                self._others[os.path.splitext(entry.name)[1].lower() or "no suffix"] += 1
        for path in below:
            identity = _identity(path)
            if identity in on_path:
                self._loops.append(path)
            else:
                self._walk(path, on_path | {identity})

    def _is_wanted(self, name: str) -> bool:
        return uncompressed_name(name).endswith(self._suffixes) or name.lower().endswith(self._suffixes)

    def _refuse_empty(self, folder: str, others: Counter[str]) -> None:
        got = f"{sum(others.values())} other files{_counts(others)}"
        want = f"files that end in {', '.join(self._suffixes)} (also with {', '.join(CODECS)})"
        foreign = [suffix for suffix in others if suffix in FOREIGN_SUFFIXES]
        if foreign:
            do = f"convert each: {conversion(FOREIGN_SUFFIXES[foreign[0]], f'FILE{foreign[0]}')}"
        else:
            suffix = next((name for name, _ in others.most_common() if name.startswith(".")), ".py")
            do = (
                f"select the suffix: {self._select} {suffix}"
                if "no suffix" not in others
                else f"name the files themselves in {self._source}"
            )
        raise DataError("folder has no input files", where=folder, got=got, want=want, do=do)

    def report(self) -> None:
        """Log what was left out."""
        if self._others:
            log.warning(
                "left out of folders: %s of other suffixes%s; %s selects others",
                counted(sum(self._others.values()), "file"),
                _counts(self._others),
                self._select,
            )
        for paths, what in (
            (self._hidden, "hidden, left out"),
            (self._special, "neither files nor folders, left out"),
            (self._loops, "links to a folder that they are in, not followed"),
            (self._twice, "reached twice, read once"),
        ):
            if paths:
                more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
                log.warning("%s: %s%s", what, ", ".join(map(printable, paths[:NAMED])), more)


def _identity(folder: str) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _counts(suffixes: Counter[str]) -> str:
    """` (.md 7, .png 5)`, the most frequent first."""
    named = ", ".join(f"{printable(suffix)} {count}" for suffix, count in suffixes.most_common(8))
    return f" ({named}{', ...' if len(suffixes) > 8 else ''})" if named else ""


def conversion(kind: str, path: str) -> str:
    """The command that converts a file of another kind to JSON lines."""
    code, packages = (PARQUET, "pandas pyarrow") if "Parquet" in kind else (ARROW, "datasets")
    target = os.path.splitext(path)[0] + ".jsonl"
    return f'pip install {packages}; python -c "{code}" {shlex.quote(path)} {shlex.quote(target)}'


def refuse_by_name(path: str) -> None:
    """Raise DataError for a file whose suffix is that of a kind that is not read."""
    stem, suffix = os.path.splitext(path.lower())
    inner = os.path.splitext(stem)[1]
    _refuse(
        path,
        FOREIGN_SUFFIXES.get(suffix) or ARCHIVES.get(suffix) or (ARCHIVES.get(inner) if suffix in CODECS else None),
    )
    if suffix in OTHER_CODECS:
        _refuse(path, f"{OTHER_CODECS[suffix]} data")


def _refuse(path: str, kind: str | None) -> None:
    if kind is None:
        return
    if kind in FOREIGN_SUFFIXES.values():
        do = conversion(kind, path)
    elif "archive" in kind:
        do = "unpack it and name the folder"
    elif "under a name" in kind:
        suffix = kind.rpartition(" ")[2]
        do = f"mv {shlex.quote(path)} {shlex.quote(path + suffix)}"
    else:
        do = f"decompress it, or compress it with one of {', '.join(CODECS)}"
    raise DataError("input of this kind is not read", where=path, got=kind, want="JSON lines or text", do=do)


def refuse_saved_dataset(folder: str, names: set[str]) -> None:
    """Raise DataError for a folder written by `save_to_disk` of Hugging Face datasets."""
    splits = "dataset_dict.json" in names
    if not splits and not {"state.json", "dataset_info.json"} <= names:
        return
    code, target = (SAVED_SPLITS, folder.rstrip("/") + "-jsonl") if splits else (SAVED, folder.rstrip("/") + ".jsonl")
    make_target = f"mkdir -p {shlex.quote(target)}; " if splits else ""
    do = f'pip install datasets; {make_target}python -c "{code}" {shlex.quote(folder)} {shlex.quote(target)}'
    raise DataError(
        "folder holds a dataset of Hugging Face datasets",
        where=folder,
        got="Arrow files of save_to_disk",
        want="JSON lines or text",
        do=do,
    )


def read_as_lines(path: str, start: bytes, form: str = "auto") -> bool:
    """Whether a file is JSON lines and not one document.

    The name decides: .jsonl, .ndjson, .jl, .jsonlines and .json are JSON lines. A file without a suffix, or with a
    number as its suffix (part-00000), is JSON lines if its first line is a JSON object. Any other file is one document.

    Args:
        path: the file.
        start: the first decompressed bytes: all of them, or enough for a first line of usual length.
        form: one of FORMS; other than "auto", it decides alone.

    Raises:
        DataError: the file is of another kind (Parquet, a JSON array, ...), or its first line is a JSON object but its
            name is that of a text file.
    """
    _refuse(path, next((kind for magic, kind in MAGIC if start.startswith(magic)), None))
    if form != "auto":
        return form == "jsonl"
    name = uncompressed_name(path)
    refuse_table(path, os.path.splitext(name)[1])
    first, _, rest = start.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    if name.endswith(LINES_SUFFIXES):
        refuse_one_value(path, first.strip(), bool(rest))
        return True
    if not looks_like_an_object(first.strip(), bool(rest)):
        return False
    suffix = os.path.splitext(name)[1][1:]
    if not suffix or suffix.isdigit():
        return True
    got = f"a first line that is a JSON object, in a file with suffix .{suffix}"
    raise DataError(
        "file may be JSON lines or one document",
        where=path,
        got=got,
        do="rename it to .jsonl or .txt; or pass --format jsonl or --format txt to neox preprocess",
    )


def refuse_table(path: str, suffix: str) -> None:
    """Raise DataError for a table of comma- or tab-separated values, which would become one document."""
    if suffix not in TABLES:
        return
    kind, delimiter = TABLES[suffix]
    end = path.lower().rindex(suffix)
    code = ROWS.format(delimiter=delimiter)
    first = "decompress it; " if codec_of(path) else ""
    do = (
        f'{first}python -c "{code}" {shlex.quote(path[: end + len(suffix)])} > {shlex.quote(path[:end] + ".jsonl")}; '
        f"or pass --format txt to neox preprocess"
    )
    raise DataError("file is a table", where=path, got=kind, want="JSON lines or text", do=do)


def refuse_one_value(path: str, first: bytes, more: bool) -> None:
    """Raise DataError for a JSON file with one array, or one object over several lines.

    Args:
        path: the file.
        first: its first line.
        more: whether more lines follow.
    """
    if first.startswith(b"[") and not _is_list_of_values(first):
        target = re.sub(r"(\.[a-z0-9]+)?$", ".jsonl", path, count=1) if not path.endswith(".jsonl") else f"{path}.jsonl"
        do = f'python -c "{ARRAY}" {shlex.quote(path)} > {shlex.quote(target)}'
        raise DataError("file is one JSON array and not JSON lines", where=path, want="one JSON object per line", do=do)
    if more and first.startswith(b"{") and first.endswith((b"{", b",", b"[", b":")):
        do = "write each object on one line; or pass --format txt to neox preprocess for files of one document each"
        raise DataError(
            "file is one JSON object over several lines", where=path, want="one JSON object per line", do=do
        )


def _is_list_of_values(line: bytes) -> bool:
    """Whether a line is a complete JSON array without objects: a bad line, not the start of an array of rows."""
    try:
        return not any(isinstance(item, dict) for item in orjson.loads(line))
    except (orjson.JSONDecodeError, TypeError):
        return False


def looks_like_an_object(line: bytes, complete: bool) -> bool:
    """Whether a line is a JSON object with a key, or, if it is not complete, the start of one."""
    try:
        return line.startswith(b"{") and bool(orjson.loads(line))
    except orjson.JSONDecodeError:
        return not complete and re.match(rb'\{\s*"[^"\\]*"\s*:', line) is not None
