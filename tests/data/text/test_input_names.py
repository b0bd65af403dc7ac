"""How the name and the first bytes of a file decide how it is read."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from neox.data.text.input_files import (
    FOLDER_SUFFIXES,
    codec_of,
    conversion,
    find_files,
    looks_like_an_object,
    read_as_lines,
    refuse_by_name,
    uncompressed_name,
)
from neox.errors import DataError

OBJECT = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("path", "codec", "name"),
    [
        ("a.jsonl", None, "a.jsonl"),
        ("dir.gz/A.JSONL.GZ", "gzip", "a.jsonl"),
        ("a.zst", "zstd", "a"),
        ("a.b.zstd", "zstd", "a.b"),
        ("a.bz2", "bz2", "a"),
        ("a.txt.xz", "xz", "a.txt"),
        ("a.gz.txt", None, "a.gz.txt"),
        ("a.jsonl.gz.gz", "gzip", "a.jsonl.gz"),
        ("gz", None, "gz"),
    ],
)
def test_compression_is_the_last_suffix(path, codec, name):
    assert (codec_of(path), uncompressed_name(path)) == (codec, name)


@pytest.mark.parametrize(
    ("name", "start", "lines"),
    [
        *((f"a.{suffix}", b"{", True) for suffix in ("jsonl", "ndjson", "jl", "jsonlines", "json", "JSON", "jsonl.xz")),
        ("a.jsonl", b"plain", True),
        ("part-00000", OBJECT, True),
        ("shard.0007", OBJECT, True),
        ("shard.7.gz", OBJECT, True),
        ("part-00000", b"plain\n" + OBJECT, False),
        ("part-00000", b"{}\n", False),
        ("part-00000", b"[1]\n", False),
        ("part-00000", b'{"text": "cut off', True),
        ("part-00000", b'{"text": "bad\n' + OBJECT, False),
        ("part-00000", b'{ "a b" : [1, 2', True),
        ("part-00000", b'{"a', False),
        ("part-00000", b"", False),
        ("a.txt", b"plain", False),
        ("a.md", b"{not JSON}\n", False),
        ("a.jsonl.txt", b"plain", False),
    ],
)
def test_json_lines_or_one_document(name, start, lines):
    assert read_as_lines(name, start) is lines
    assert read_as_lines(name, start, "txt") is False and read_as_lines(name, start, "jsonl") is True


@pytest.mark.parametrize(
    ("line", "complete", "found"),
    [
        (b'{"a": 1}', True, True),
        (b"{}", True, False),
        (b"{}", False, False),
        (b"[1]", True, False),
        (b'{"a": ', True, False),
        (b'{"a": ', False, True),
        (b'{"a\\"b": ', False, False),
        (b"{a: ", False, False),
        (b' {"a": 1}', True, False),
    ],
)
def test_what_seems_to_be_an_object(line, complete, found):
    assert looks_like_an_object(line, complete) is found


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b'[{"text": "a"},\n', "one JSON array"),
        (b"[\n", "one JSON array"),
        (b'[{"text": "a"}]', "one JSON array"),
        (b'[1, {"a": 2}]\n', "one JSON array"),
        (b"{\n...", "one JSON object over several lines"),
        (b'{"a":\n...', "one JSON object over several lines"),
        (b'{"a": 1,\n...', "one JSON object over several lines"),
        (b'{"a": [\n...', "one JSON object over several lines"),
        (b'\xef\xbb\xbf \n[{"text": "a"}]\n', "one JSON array"),
    ],
)
def test_one_json_value_is_not_json_lines(start, message):
    with pytest.raises(DataError, match=rf"file is {message}.*; where=a\.json; "):
        read_as_lines("a.json", start)


@pytest.mark.parametrize("start", [b"[1, 2]\n", b"[]", b'{"a": 1}\n', b"{", b'{"a": [', b'{"a": "x,\n', b"5\n"])
def test_what_may_be_json_lines(start):
    assert read_as_lines("a.json", start)


@pytest.mark.parametrize(
    ("name", "kind", "do"),
    [
        ("a.PARQUET", "a Parquet file", "pandas.read_parquet"),
        ("a.feather", "an Arrow file", "Dataset.from_file"),
        ("a.tgz", "a tar archive", "unpack it"),
        ("a.tar", "a tar archive", "unpack it"),
        ("a.tar.xz", "a tar archive", "unpack it"),
        ("a.zip.gz", "a zip archive", "unpack it"),
        ("a.rar", "a rar archive", "unpack it"),
        ("a.7z", "a 7z archive", "unpack it"),
        *(
            (f"a.jsonl{suffix}", f"{codec} data", "decompress it")
            for suffix, codec in (
                (".lz4", "lz4"),
                (".br", "brotli"),
                (".lzma", "lzma"),
                (".Z", "compress"),
                (".snappy", "snappy"),
                (".lzo", "lzo"),
            )
        ),
    ],
)
def test_kinds_that_are_refused_by_name(tmp_path, name, kind, do):
    (tmp_path / name).write_bytes(OBJECT)
    with pytest.raises(DataError, match=rf"input of this kind is not read; where=.*; got={kind}; .*do=.*{do}"):
        find_files([str(tmp_path / name)])


@pytest.mark.parametrize("name", ["a.parquet.txt", "tar", "a.tar.txt", "zip.jsonl", "a.parquet.gz"])
def test_names_that_only_contain_such_a_suffix(name):
    refuse_by_name(name)


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"PAR1\x15", "a Parquet file"),
        (b"ARROW1\0\0", "an Arrow file"),
        (b"PK\x03\x04", "a zip archive"),
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        (b"Rar!\x1a\x07\x01", "a rar archive"),
        (b"\x1f\x8b\x08", "gzip data under a name without .gz"),
        (b"\x28\xb5\x2f\xfd", "zstd data under a name without .zst"),
        (b"\xfd7zXZ\0", "xz data under a name without .xz"),
        (b"\x04\x22\x4d\x18", "lz4 data"),
    ],
)
@pytest.mark.parametrize("form", ["auto", "jsonl", "txt"])
def test_kinds_that_are_refused_by_their_first_bytes(start, kind, form):
    with pytest.raises(DataError, match=rf"where=a b\.txt; got={kind}; ") as found:
        read_as_lines("a b.txt", start + b"...", form)
    if "under a name" in kind:
        assert found.value.do == f"mv 'a b.txt' 'a b.txt.{kind.rpartition('.')[2]}'"


def test_commands_name_files_as_a_shell_takes_them():
    for kind, package in (("a Parquet file", "pandas pyarrow"), ("an Arrow file", "datasets")):
        command = conversion(kind, "my data/it's.parquet")
        assert command.startswith(f"pip install {package}; python -c ")
        assert command.endswith(""" 'my data/it'"'"'s.parquet' 'my data/it'"'"'s.jsonl'""")


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        *((f"a{suffix}", True) for suffix in FOLDER_SUFFIXES),
        *((f"a.TXT{codec}", True) for codec in (".gz", ".zst", ".zstd", ".bz2", ".XZ")),
        ("a.jsonl.gz", True),
        ("a.json", False),
        ("a.txt.lz4", False),
        ("atxt", False),
        ("a.txt.old", False),
    ],
)
def test_what_is_taken_from_a_folder(tmp_path, name, taken):
    (tmp_path / name).write_text("")
    (tmp_path / "other.txt").write_text("")
    found = [Path(path).name for path in find_files([str(tmp_path)])]
    assert found == sorted({"other.txt", *([name] if taken else [])})


def test_suffixes_ignore_case_on_both_sides(tmp_path):
    for name in ("a.PY", "b.py", "c.txt"):
        (tmp_path / name).write_text("")
    assert [Path(path).name for path in find_files([str(tmp_path)], (".Py",))] == ["a.PY", "b.py"]


def test_folders_come_after_the_files_next_to_them(tmp_path):
    for name in ("b/z.txt", "b/a/y.txt", "a/x.txt", "c.txt", "a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    found = [Path(path).relative_to(tmp_path).as_posix() for path in find_files([str(tmp_path)])]
    assert found == ["a.txt", "c.txt", "a/x.txt", "b/z.txt", "b/a/y.txt"]


def test_a_link_to_a_folder_on_the_way_is_a_loop_and_to_another_is_not(tmp_path, caplog):
    deep = tmp_path / "in" / "sub" / "deep"
    deep.mkdir(parents=True)
    (tmp_path / "in" / "beside").mkdir()
    for folder in (deep, tmp_path / "in" / "beside"):
        (folder / "a.txt").write_text("")
    (deep / "loop").symlink_to("../../sub")
    (deep / "other").symlink_to("../../beside")
    with caplog.at_level(logging.WARNING):
        found = find_files([str(tmp_path / "in")])
    assert found == [f"{tmp_path}/in/beside/a.txt", f"{deep}/a.txt"]
    assert f"links to a folder that they are in, not followed: {deep}/loop" in caplog.text
    assert f"reached twice, read once: {deep}/other/a.txt" in caplog.text


def test_a_folder_whose_files_were_all_taken_before_is_not_empty(tmp_path, caplog):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("")
    with caplog.at_level(logging.WARNING):
        assert find_files([str(tmp_path / "in"), str(tmp_path / "in")]) == [str(tmp_path / "in" / "a.txt")]
    assert f"reached twice, read once: {tmp_path}/in/a.txt" in caplog.text


@pytest.mark.parametrize("count", [3, 4, 5])
def test_three_files_of_a_kind_are_named(tmp_path, caplog, count):
    for number in range(count):
        (tmp_path / f".h{number}.txt").write_text("")
    (tmp_path / "a.txt").write_text("")
    with caplog.at_level(logging.WARNING):
        find_files([str(tmp_path)])
    (message,) = [record.getMessage() for record in caplog.records]
    named = ", ".join(f"{tmp_path}/.h{number}.txt" for number in range(3))
    assert message == f"hidden, left out: {named}" + (f" and {count - 3} more" if count > 3 else "")


@pytest.mark.parametrize("kinds", [8, 9])
def test_eight_suffixes_are_counted(tmp_path, caplog, kinds):
    for number in range(kinds):
        for copy in range(2 if number == 4 else 1):
            (tmp_path / f"{copy}.s{number}").write_text("")
    (tmp_path / "a.txt").write_text("")
    with caplog.at_level(logging.WARNING):
        find_files([str(tmp_path)])
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"left out of folders: {kinds + 1} files of other suffixes (.s4 2, ")
    assert message.count(".s") == 8 and (", ..." in message) == (kinds > 8)


def test_nothing_is_reported_if_all_is_read(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("")
    with caplog.at_level(logging.WARNING):
        assert len(find_files([str(tmp_path)])) == 1
    assert not caplog.records


@pytest.mark.parametrize(
    ("names", "got", "do"),
    [
        ([], "0 other files", "select the suffix: --suffix .py"),
        (["a.c", "b.c", "x.h"], "3 other files \\(.c 2, .h 1\\)", "select the suffix: --suffix .c"),
        (["README", "a.c"], "2 other files \\(.*no suffix 1.*\\)", "name the files themselves in --input"),
        (
            ["a.arrow", "b.c", "c.c"],
            r"3 other files \(\.c 2, \.arrow 1\)",
            "convert each: pip install datasets; .*FILE.arrow FILE.jsonl",
        ),
    ],
)
def test_the_files_of_a_folder_without_input_are_counted(tmp_path, names, got, do):
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    for name in ("a.txt", "b.md"):
        (tmp_path / "first" / name).write_text("")
    for name in names:
        (tmp_path / "second" / name).write_text("")
    with pytest.raises(DataError, match=rf"folder has no input files; where=.*second; got={got}; .*do={do}"):
        find_files([str(tmp_path / "first"), str(tmp_path / "second")])


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (["dataset_dict.json"], True),
        (["state.json", "dataset_info.json"], True),
        (["state.json"], False),
        (["dataset_info.json"], False),
    ],
)
def test_a_saved_dataset_is_known_by_its_files(tmp_path, names, refused):
    for name in (*names, "a.txt"):
        (tmp_path / name).write_text("{}")
    if not refused:
        assert find_files([str(tmp_path)]) == [str(tmp_path / "a.txt")]
        return
    with pytest.raises(DataError, match="folder holds a dataset of Hugging Face datasets") as found:
        find_files([f"{tmp_path}/"])
    target = f"{tmp_path}-jsonl" if "dataset_dict.json" in names else f"{tmp_path}.jsonl"
    assert str(found.value.do).endswith(f" {tmp_path}/ {target}")
    assert ("mkdir -p" in str(found.value.do)) == ("dataset_dict.json" in names)
