"""Which files are read and how: none is left out, read twice or taken for text without a warning."""

from __future__ import annotations

import gzip
import json
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from neox.data.text.input_files import find_files, read_as_lines
from neox.data.text.reading import parse, read_blocks
from neox.errors import DataError

LINES = b'{"text": "a"}\n{"text": "b"}\n'


def texts(folder: Path, *names: str, form: str = "auto") -> list[str]:
    """The documents of some files, or of the folder."""
    files = find_files([str(folder / name) for name in names] or [str(folder)])
    return [text for block in read_blocks(files, form=form) for item in block for text in parse(item, "text").texts]


def test_folders_are_walked_in_order_by_suffix(tmp_path):
    for name in ("b/2.jsonl.zst", "b/1.txt", "a/x.py", "c.jsonl", "a/y.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "d.txt").symlink_to(tmp_path / "b" / "1.txt")
    names = [Path(path).relative_to(tmp_path).as_posix() for path in find_files([str(tmp_path)])]
    assert names == ["c.jsonl", "d.txt", "b/2.jsonl.zst"]
    assert find_files([str(tmp_path / "a" / "y.md"), str(tmp_path)], (".py",)) == [
        str(tmp_path / "a" / "y.md"),
        str(tmp_path / "a" / "x.py"),
    ]


def test_missing_inputs(tmp_path):
    (tmp_path / "a.py").write_text("")
    with pytest.raises(
        DataError,
        match=r"folder has no input files; .*got=1 other files \(\.py 1\); want=files that end in \.jsonl, .*--suffix "
        r"\.py",
    ):
        find_files([str(tmp_path)])
    with pytest.raises(DataError, match="no such input; where=nowhere"):
        find_files(["nowhere"])
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"no such input; .*got=a dangling link"):
        find_files([str(tmp_path / "link")])
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        find_files([str(tmp_path / "fifo")])
    with pytest.raises(DataError, match=r"cannot read input; where=.*missing\.txt; got=No such file"):
        list(read_blocks([str(tmp_path / "missing.txt")]))


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "A.JSONL",
        "a.ndjson",
        "a.jl",
        "a.jsonlines",
        "a.json",
        "part-00000",
        "shard.0001",
        "A.JSONL.GZ",
        "part-00000.gz",
    ],
)
def test_json_lines_are_known_by_name_in_any_case_or_by_their_first_line(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(LINES) if name.lower().endswith("gz") else LINES)
    assert texts(tmp_path, name) == ["a", "b"]


@pytest.mark.parametrize("before", [b"\xef\xbb\xbf", b"\n", b" \n\t", b"\xef\xbb\xbf\r\n"])
@pytest.mark.parametrize("name", ["part-00000", "a.jsonl"])
def test_a_byte_order_mark_and_blank_lines_do_not_hide_the_first_object(tmp_path, name, before):
    (tmp_path / name).write_bytes(before + LINES)
    assert texts(tmp_path, name) == ["a", "b"]
    (tmp_path / "a.txt").write_bytes(before + LINES)
    with pytest.raises(DataError, match="JSON lines or one document"):
        texts(tmp_path, "a.txt")


def test_a_folder_gives_json_lines_under_all_their_names(tmp_path, caplog):
    names = ["a.jsonl", "b.json.gz", "c.ndjson", "d.JSONL", "e.jl", "f.jsonlines", "g.TXT"]
    for name in names:
        content = json.dumps({"text": name}).encode() + b"\n"
        (tmp_path / name).write_bytes(
            gzip.compress(content) if name.endswith("gz") else name.encode() if name.endswith("TXT") else content
        )
    (tmp_path / "tokenizer.json").write_text("{}")  # not data
    assert texts(tmp_path) == sorted(names)
    with caplog.at_level(logging.WARNING):
        find_files([str(tmp_path)])
    assert "1 file of other suffixes (.json 1)" in caplog.text


@pytest.mark.parametrize(
    ("source", "missing", "suffix"),
    [
        ("--input", "do=check --input", "do=select the suffix: --suffix .py"),
        ("data.text", "do=check data.text", "do=select the suffix: neox preprocess --suffix .py"),
    ],
)
def test_errors_name_what_gave_the_inputs(tmp_path, source, missing, suffix):
    (tmp_path / "a.py").write_text("1")
    with pytest.raises(DataError, match=missing):
        find_files(["nowhere"], source=source)
    with pytest.raises(DataError, match=suffix):
        find_files([str(tmp_path)], source=source)


@pytest.mark.parametrize("name", ["a.jsonl.txt", "a.txt", "a.py", "a.txt.gz"])
def test_json_lines_under_the_name_of_a_text_are_asked_about(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(LINES) if name.endswith("gz") else LINES)
    with pytest.raises(
        DataError, match="JSON lines or one document; .*do=rename it to .jsonl or .txt; or pass --format"
    ):
        texts(tmp_path, name)
    assert texts(tmp_path, name, form="jsonl") == ["a", "b"]
    assert texts(tmp_path, name, form="txt") == [LINES.decode()]


@pytest.mark.parametrize(
    "content", ["plain text", "{not JSON}\n", "{\n}", "{}\n", "[1, 2]\n", '"text"', "", '{"a"} is a set\n']
)
def test_text_stays_text(tmp_path, content):
    for name in ("a.txt", "LICENSE"):
        (tmp_path / name).write_text(content)
        assert texts(tmp_path, name) == [content]


def test_a_first_line_beyond_the_start_of_a_file_is_json_where_it_begins_so(tmp_path):
    (tmp_path / "part-0").write_text(json.dumps({"text": "x" * 100_000}) + "\n")
    assert texts(tmp_path, "part-0") == ["x" * 100_000]


def test_one_json_value_is_refused_with_the_command_that_converts_it(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}, {"text": "é\u2028"}]))
    with pytest.raises(DataError, match="one JSON array and not JSON lines; .*do=python -c") as found:
        texts(tmp_path, "a.json")
    assert os.system(found.value.do) == 0  # noqa: S605
    assert texts(tmp_path, "a.jsonl") == ["a", "é\u2028"]
    (tmp_path / "b.json").write_text(json.dumps([{"text": "a"}], indent=1))
    with pytest.raises(DataError, match="one JSON array"):
        texts(tmp_path, "b.json")
    (tmp_path / "c.json").write_text(json.dumps({"text": "a"}, indent=1))
    with pytest.raises(DataError, match="one JSON object over several lines"):
        texts(tmp_path, "c.json")
    (tmp_path / "d.jsonl").write_text('["a"]\n[]\n5\n{"text": "a"}\n')  # bad lines, not an array
    assert texts(tmp_path, "d.jsonl") == ["a"]


@pytest.mark.parametrize(
    ("name", "content", "kind", "do"),
    [
        ("a.parquet", b"PAR1\x15", "a Parquet file", "pandas"),
        ("a.bin", b"PAR1\x15", "a Parquet file", "pandas"),
        ("a.arrow", b"\xff\xff\xff\xff", "an Arrow file", "datasets"),
        ("a.zip", b"", "a zip archive", "unpack"),
        ("a.tar.gz", b"", "a tar archive", "unpack"),
        ("a.jsonl", b"PK\x03\x04", "a zip archive", "unpack"),
        ("a.jsonl", gzip.compress(LINES, mtime=0), "gzip data under a name without .gz", "mv .*a.jsonl .*a.jsonl.gz"),
        ("a.jsonl.lz4", b"", "lz4 data", "compress it with one of .gz, .zst"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path, name, content, kind, do):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"input of this kind is not read; .*got={kind}; .*do=.*{do}"):
        texts(tmp_path, name)


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("b.TSV", "\t")])
def test_a_table_is_refused_with_the_command_that_converts_it(tmp_path, name, separator):
    (tmp_path / name).write_text(f'id{separator}text\n7{separator}"one, ""two""\nthree ü"\n', encoding="utf-8")
    with pytest.raises(DataError, match="file is a table") as refused:
        texts(tmp_path, name)
    command, _, other = str(refused.value.do).rpartition("; or pass ")
    assert other == "--format txt to neox preprocess"
    subprocess.run(command.replace("python", shlex.quote(sys.executable), 1), shell=True, check=True)  # noqa: S602 - the command in the error message
    assert texts(tmp_path, f"{name[0]}.jsonl") == ['one, "two"\nthree ü']
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress(b"text\na\n"))
    with pytest.raises(DataError, match=r"file is a table; .*do=decompress it; .*c\.csv > .*c\.jsonl"):
        texts(tmp_path, "c.csv.gz")


def test_folders_of_other_libraries_are_named(tmp_path):
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "x.parquet").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"no input files; .*got=1 other files \(.parquet 1\); .*do=convert each: pip install pandas"
    ):
        texts(tmp_path, "table")
    (tmp_path / "saved" / "train").mkdir(parents=True)
    for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json"):
        (tmp_path / "saved" / "train" / name).write_text("{}")
    with pytest.raises(
        DataError,
        match="Hugging Face datasets; .*got=Arrow files of save_to_disk; .*load_from_disk.*saved/train "
        ".*saved/train.jsonl",
    ):
        texts(tmp_path, "saved/train")
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(DataError, match=r"mkdir -p .*saved-jsonl; python -c .*load_from_disk.*items\(\)"):
        texts(tmp_path, "saved")


def test_linked_folders_are_followed_and_loops_are_not(tmp_path, caplog):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "b.txt").write_text("b")
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "in" / "more").symlink_to("../disk")
    (tmp_path / "in" / "sub" / "loop").symlink_to("..")
    with caplog.at_level(logging.WARNING):
        assert texts(tmp_path, "in") == ["a", "b"]
    assert "links to a folder that they are in, not followed" in caplog.text and "sub/loop" in caplog.text


def test_a_file_is_read_once_and_what_is_left_out_is_reported(tmp_path, caplog):
    folder = tmp_path / "in"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("a.txt", ".hidden.txt", ".ipynb_checkpoints/a-checkpoint.txt", "b.md", "c.MD", "README"):
        (folder / name).write_text("a")
    os.link(folder / "a.txt", folder / "z.txt")
    os.mkfifo(folder / "fifo.txt")
    with caplog.at_level(logging.WARNING):
        assert texts(tmp_path, "in", "in/a.txt", "in/../in/a.txt") == ["a"]
    for part in (
        "3 files of other suffixes (.md 2, no suffix 1)",
        f"hidden, left out: {folder}/.hidden.txt, {folder}/.ipynb_checkpoints",
        f"neither files nor folders, left out: {folder}/fifo.txt",
        f"reached twice, read once: {folder}/z.txt, {folder}/a.txt, {folder}/../in/a.txt",
    ):
        assert part in caplog.text


def test_names_that_are_not_utf8_are_found_and_reported(tmp_path, caplog):
    folder = os.fsencode(tmp_path)
    Path(os.fsdecode(folder + b"/caf\xe9.jsonl")).write_bytes(LINES)
    Path(os.fsdecode(folder + b"/x.\xe9")).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert texts(tmp_path) == ["a", "b"]
    assert "(.\\xe9 1)" in caplog.text


def test_the_form_that_is_named_decides_alone():
    assert read_as_lines("a.jsonl", b"[", "jsonl") and not read_as_lines("a.jsonl", LINES, "txt")
