"""Text to datasets: the same bytes for any number of workers, bad lines by policy, nothing left after a failure or a
kill.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import tokenizers

from neox.data.store.indexed import IndexedDataset, IndexedWriter
from neox.data.text.encoding import Encoding
from neox.data.text.preprocess import Options, Summary, restore_partial_names
from neox.data.text.preprocess import preprocess as preprocess_files
from neox.data.text.tokenizer import Tokenizer, train_tokenizer
from neox.errors import ConfigError, DataError, DiskError, MemoryExhausted

TEXTS = [f"document {i} has {'word ' * (i * 31 % 97)}and é日😀" for i in range(300)]


def preprocess(files: list[str], out: Path, encoding: Encoding, progress=None, **options: object) -> Summary:
    """`preprocess_files` with the fields of Options as keywords."""
    return preprocess_files(files, out, encoding, Options(**options), progress)


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    return train_tokenizer(TEXTS, 400, tmp_path / "t.json")


@pytest.fixture
def lines(tmp_path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in TEXTS))
    return path


def test_documents_are_the_tokenizers_ids_and_eod(tokenizer, lines, tmp_path):
    summary = preprocess([str(lines)], tmp_path / "out", Encoding(tokenizer.file))
    dataset = IndexedDataset(tmp_path / "out")
    reference = tokenizers.Tokenizer.from_file(tokenizer.file)
    assert len(dataset) == summary.documents == 300 and dataset.num_tokens == summary.tokens
    for i, text in enumerate(TEXTS):
        assert dataset[i].tolist() == [*reference.encode(text).ids, tokenizer.eod_id]
    sidecar = dataset.sidecar
    assert (sidecar.tokenizer_hash, sidecar.vocab_size, sidecar.eod_id, sidecar.largest_id) == (
        tokenizer.hash,
        400,
        0,
        max(map(max, dataset)),
    )
    assert summary.text_bytes == lines.stat().st_size and summary.dtype == "uint16"


def test_output_is_the_same_for_any_number_of_workers(tokenizer, lines, tmp_path):
    content = lines.read_bytes().splitlines(keepends=True)
    content[100] = b"{bad}\n"
    files = [lines, tmp_path / "b.jsonl.gz", tmp_path / "c.txt"]
    lines.write_bytes(b"".join(content))
    files[1].write_bytes(gzip.compress(b"".join(content[:50])))
    files[2].write_text(TEXTS[0] * 300)
    results = []
    for workers in (0, 1, 3):
        summary = preprocess(
            [str(file) for file in files],
            tmp_path / f"out{workers}",
            Encoding(tokenizer.file),
            workers=workers,
            bad_lines="quarantine",
            block_bytes=3000,
        )
        suffixes = (".bin", ".idx", ".json", ".quarantine.jsonl")
        results.append([(tmp_path / f"out{workers}{suffix}").read_bytes() for suffix in suffixes])
        assert (summary.documents, summary.bad_lines) == (350, 1)
    assert results[0] == results[1] == results[2]


def test_bad_lines_by_policy(tokenizer, lines, tmp_path):
    content = lines.read_bytes().splitlines(keepends=True)
    content[4:5] = [b'{"text": "\xff"}\n', b"\n", b'{"text": 3}\n', b'{"text": ""}\n']
    lines.write_bytes(b"".join(content))
    with pytest.raises(DataError, match=r"bad line; where=.*in\.jsonl:5; got=not JSON: str is not valid UTF-8.*do=fix"):
        preprocess([str(lines)], tmp_path / "out", Encoding(tokenizer.file))
    assert not list(tmp_path.glob("out*"))
    skipped = preprocess([str(lines)], tmp_path / "out", Encoding(tokenizer.file), bad_lines="skip")
    assert (skipped.documents, skipped.bad_lines, skipped.blank_lines, skipped.empty_documents) == (299, 2, 1, 1)
    assert [example["where"] for example in skipped.bad_examples] == [
        f"{lines}:5",
        f"{lines}:7",
    ] and skipped.quarantine is None
    assert dict(skipped.bad_reasons) == {"not JSON": 1, "the value of 'text' is not a string": 1}
    kept = preprocess([str(lines)], tmp_path / "out", Encoding(tokenizer.file), bad_lines="quarantine", overwrite=True)
    records = [orjson.loads(line) for line in Path(kept.quarantine).read_bytes().splitlines()]
    assert [base64.b64decode(record["content_base64"]) for record in records] == [b'{"text": "\xff"}', b'{"text": 3}']
    assert [record["line"] for record in records] == [5, 7]
    with pytest.raises(ConfigError, match="unknown policy"):
        preprocess([str(lines)], tmp_path / "x", Encoding(tokenizer.file), bad_lines="ignore")


def test_quarantine_leaves_no_file_without_bad_lines(tokenizer, lines, tmp_path):
    summary = preprocess([str(lines)], tmp_path / "out", Encoding(tokenizer.file), bad_lines="quarantine")
    assert summary.quarantine is None and sorted(path.name for path in tmp_path.glob("out*")) == [
        "out.bin",
        "out.idx",
        "out.json",
    ]


def test_options(tokenizer, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"body": "a<|endoftext|>b"}\n')
    preprocess([str(path)], tmp_path / "a", Encoding(tokenizer.file, append_eod=False, json_key="body"))
    assert IndexedDataset(tmp_path / "a")[0].tolist() == tokenizer.encode("a<|endoftext|>b")
    preprocess([str(path)], tmp_path / "b", Encoding(tokenizer.file, json_key="body", specials_as_text=True))
    tokens = IndexedDataset(tmp_path / "b")[0].tolist()
    assert tokens[-1] == tokenizer.eod_id and tokenizer.eod_id not in tokens[:-1]


def test_widest_id_decides_the_dtype(tmp_path):
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 65_543, "</s>": 1}, unk_token="a"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.save(str(tmp_path / "gap.json"))
    (tmp_path / "in.txt").write_text("b a b")
    summary = preprocess([str(tmp_path / "in.txt")], tmp_path / "out", Encoding(str(tmp_path / "gap.json")))
    assert summary.dtype == "int32" and IndexedDataset(tmp_path / "out")[0].tolist() == [65_543, 0, 65_543, 1]


def test_nothing_to_write_is_an_error(tokenizer, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('\n{"text": ""}\n')
    with pytest.raises(
        DataError, match=r"input has no documents; where=.*in\.jsonl; got=0 bad, 1 blank, 1 empty in 1 file"
    ):
        preprocess([str(path)], tmp_path / "out", Encoding(tokenizer.file))
    assert not list(tmp_path.glob("out*"))


def test_existing_output_and_missing_eod(tokenizer, lines, tmp_path):
    (tmp_path / "out.idx").write_text("mine")
    with pytest.raises(DataError, match=r"dataset already exists; where=.*out\.idx"):
        preprocess([str(lines)], tmp_path / "out", Encoding(tokenizer.file))
    assert (tmp_path / "out.idx").read_text() == "mine"
    with pytest.raises(DiskError, match=r"cannot create the folder of a dataset; where=.*in\.jsonl; got=File exists"):
        preprocess([str(lines)], lines / "out", Encoding(tokenizer.file))
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    plain.save(str(tmp_path / "plain.json"))
    with pytest.raises(ConfigError, match="no end-of-document token"):
        preprocess([str(lines)], tmp_path / "new", Encoding(str(tmp_path / "plain.json")))


def test_the_folder_is_created_first(tokenizer, lines, tmp_path):
    lines.write_bytes(b"{bad\n" + lines.read_bytes())
    summary = preprocess(
        [str(lines)], tmp_path / "new" / "folder" / "out", Encoding(tokenizer.file), bad_lines="quarantine"
    )
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "out.bin",
        "out.idx",
        "out.json",
        "out.quarantine.jsonl",
    ]
    assert summary.documents == len(TEXTS)


def words(tmp_path: Path) -> str:
    """A tokenizer that our encoder does not know."""
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "word": 1, "</s>": 2}, unk_token="a"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.save(str(tmp_path / "words.json"))
    return str(tmp_path / "words.json")


def test_the_library_encodes_unsupported_tokenizers_with_one_warning(lines, tmp_path, caplog):
    file = words(tmp_path)
    results = []
    for workers in (0, 2):
        caplog.clear()
        summary = preprocess(
            [str(lines)], tmp_path / f"out{workers}", Encoding(file), workers=workers, block_bytes=3000
        )
        assert summary.encoder == "tokenizers (pre-tokenizer Whitespace)" and summary.documents == 300
        assert sum("encoded by the tokenizers library" in record.message for record in caplog.records) == 1
        results.append([(tmp_path / f"out{workers}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")])
    assert results[0] == results[1]


def test_a_killed_worker_is_an_error_and_not_a_hang(lines, tmp_path):
    lines.write_bytes(lines.read_bytes() * 20)

    def kill_one(_: object) -> None:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        for child in children:
            # other children of this process come and go
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(int(child), signal.SIGKILL)

    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        pytest.skip("needs /proc/self/task/PID/children")
    with pytest.raises(MemoryExhausted, match="a worker process died"):
        preprocess(
            [str(lines)], tmp_path / "out", Encoding(words(tmp_path)), workers=1, progress=kill_one, block_bytes=500
        )
    assert not list(tmp_path.glob("out*"))


def test_kill_9_leaves_nothing_that_opens_and_a_rerun_is_complete(tokenizer, lines, tmp_path, repository):
    lines.write_bytes(lines.read_bytes() * 30)
    command = [
        sys.executable,
        "-m",
        "neox.cli.main",
        "preprocess",
        "--input",
        str(lines),
        "--tokenizer",
        tokenizer.file,
        "--out",
        str(tmp_path / "out"),
    ]
    for workers in ("0", "2"):
        process = subprocess.Popen([*command, "--workers", workers], cwd=repository, start_new_session=True)
        deadline = time.monotonic() + 60
        while not (tmp_path / "out.bin.partial").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
        process.wait()
        assert not (tmp_path / "out.idx").exists() and not (tmp_path / "out.json").exists()
        with pytest.raises(DataError):
            IndexedDataset(tmp_path / "out")
        deadline = time.monotonic() + 30
        while _group_lives(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _group_lives(process.pid), "workers outlive their parent"
    summary = preprocess([str(lines)], tmp_path / "out", Encoding(tokenizer.file))
    assert summary.documents == 9_000 and IndexedDataset(tmp_path / "out").verify() == []
    assert not list(tmp_path.glob("*.partial"))


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_two_runs_with_the_same_output_do_not_interfere(tokenizer, lines, tmp_path):
    """The second is refused, and the first ends as usual."""
    whole = preprocess([str(lines)], tmp_path / "whole", Encoding(tokenizer.file), block_bytes=2000)
    refused = []

    def second(_: object) -> None:
        for resume in (False, True):
            with pytest.raises(
                DataError, match=r"another process is writing this file; where=.*out\.bin\.partial"
            ) as error:
                preprocess([str(lines)], tmp_path / "out", Encoding(tokenizer.file), block_bytes=2000, resume=resume)
            refused.append(error)

    first = preprocess(
        [str(lines)],
        tmp_path / "out",
        Encoding(tokenizer.file),
        block_bytes=2000,
        save_seconds=0,
        resume=True,
        progress=second,
    )
    assert len(refused) > 10 and first.documents == whole.documents
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"out{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


SUFFIXES = (".bin", ".idx", ".json", ".quarantine.jsonl")


def interrupted(blocks: int):
    """A progress function that ends the run after that many blocks, as Ctrl-C does."""
    seen = 0

    def count(_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == blocks:
            raise KeyboardInterrupt

    return count


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_gives_the_bytes_of_a_run_in_one_go(tokenizer, lines, tmp_path, workers):
    content = lines.read_bytes().splitlines(keepends=True)
    content[3], content[200] = b"{bad}\n", b"{}\n"
    lines.write_bytes(b"".join(content))
    options = {"bad_lines": "quarantine", "block_bytes": 2000}
    whole = preprocess([str(lines)], tmp_path / "whole", Encoding(tokenizer.file), **options)
    tries = 0
    while True:
        try:
            summary = preprocess(
                [str(lines)],
                tmp_path / "out",
                Encoding(tokenizer.file),
                workers=workers,
                resume=True,
                progress=interrupted(7),
                save_seconds=0,
                **options,
            )
            break
        except KeyboardInterrupt:
            tries += 1
            assert not (tmp_path / "out.idx").exists() and (tmp_path / "out.progress.json").exists()
            for suffix in (".bin", ".idx"):  # what was written after the last save does not matter
                with open(tmp_path / f"out{suffix}.partial", "ab") as file:
                    file.write(b"torn")
    assert tries >= 3 and (summary.documents, summary.tokens, summary.bad_lines) == (
        whole.documents,
        whole.tokens,
        whole.bad_lines,
    ) == (298, whole.tokens, 2)
    for suffix in SUFFIXES:
        assert (tmp_path / f"out{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("out*")) == sorted(f"out{suffix}" for suffix in SUFFIXES)


def test_a_kill_between_the_last_renames_of_a_short_run(tokenizer, lines, tmp_path, monkeypatch):
    """A run that ends before its first save is due can be resumed too: the progress is saved before any file gets
    its name.
    """
    whole = preprocess([str(lines)], tmp_path / "whole", Encoding(tokenizer.file))
    finish = IndexedWriter.finish

    def killed(writer: IndexedWriter) -> None:
        finish(writer)
        (tmp_path / "out.json").unlink()
        (tmp_path / "out.idx").rename(tmp_path / "out.idx.partial")
        os._exit(9)

    monkeypatch.setattr(IndexedWriter, "finish", killed)
    child = os.fork()
    if child == 0:
        preprocess([str(lines)], tmp_path / "out", Encoding(tokenizer.file))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.bin", "out.idx.partial", "out.progress.json"]
    assert (
        preprocess([str(lines)], tmp_path / "out", Encoding(tokenizer.file), resume=True).documents == whole.documents
    )
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"out{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_resume_after_a_kill_between_the_last_renames(tokenizer, lines, tmp_path):
    """.bin has its final name, .idx may have it, and the progress exists: the run resumes and ends as usual."""
    options = {"block_bytes": 2000, "save_seconds": 0, "resume": True}
    whole = preprocess([str(lines)], tmp_path / "whole", Encoding(tokenizer.file), block_bytes=2000)
    for published in ((".bin",), (".bin", ".idx")):
        with pytest.raises(KeyboardInterrupt):
            preprocess([str(lines)], tmp_path / "out", Encoding(tokenizer.file), progress=interrupted(9), **options)
        for suffix in published:
            (tmp_path / f"out{suffix}.partial").rename(tmp_path / f"out{suffix}")
        assert (
            preprocess([str(lines)], tmp_path / "out", Encoding(tokenizer.file), **options).documents == whole.documents
        )
        for suffix in (".bin", ".idx", ".json"):
            assert (tmp_path / f"out{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
            (tmp_path / f"out{suffix}").unlink()
    restore_partial_names(str(tmp_path / "whole"))  # the names that a finished dataset would get back
    assert sorted(path.name for path in tmp_path.glob("whole*")) == [
        "whole.bin.partial",
        "whole.idx.partial",
        "whole.json",
    ]


def test_resume_of_a_run_that_was_done_is_done(tokenizer, lines, tmp_path):
    """A kill may come when all is written and the process is about to end; whoever starts it again cannot know."""
    lines.write_bytes(b"{bad}\n\n" + lines.read_bytes())
    options = {"resume": True, "bad_lines": "skip"}
    first = preprocess([str(lines)], tmp_path / "out", Encoding(tokenizer.file), workers=2, block_bytes=2000, **options)
    written = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("out*")}
    again = preprocess([str(lines)], tmp_path / "out", Encoding(tokenizer.file), **options)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("out*")} == written
    assert (
        replace(again, seconds=0.0, bad_examples=[]) == replace(first, seconds=0.0, bad_examples=[])
        and again.bad_lines == again.blank_lines == 1
    )
    for other in ({"resume": True}, {"bad_lines": "skip"}):  # other options; no word of resuming
        with pytest.raises(DataError, match="dataset already exists"):
            preprocess([str(lines)], tmp_path / "out", Encoding(tokenizer.file), **other)
    content = lines.read_bytes()
    lines.write_bytes(content.replace(b"word", b"wore"))  # as long as before
    os.utime(lines, ns=(0, (tmp_path / "out.idx").stat().st_mtime_ns + 1))
    with pytest.raises(DataError, match="dataset already exists"):
        preprocess([str(lines)], tmp_path / "out", Encoding(tokenizer.file), **options)


def test_resume_of_another_run_is_refused_and_of_none_starts_from_the_beginning(tokenizer, lines, tmp_path):
    options = {"block_bytes": 2000, "save_seconds": 0, "resume": True}
    with pytest.raises(KeyboardInterrupt):
        preprocess([str(lines)], tmp_path / "out", Encoding(tokenizer.file), progress=interrupted(5), **options)
    with pytest.raises(DataError, match="progress belongs to another run"):
        preprocess([str(lines)], tmp_path / "out", Encoding(tokenizer.file, append_eod=False), **options)
    os.truncate(tmp_path / "out.bin.partial", 10)
    with pytest.raises(
        DataError,
        match=r"unfinished file is shorter than its recorded progress; where=.*out\.bin\.partial; got=10 bytes",
    ):
        preprocess([str(lines)], tmp_path / "out", Encoding(tokenizer.file), **options)
    summary = preprocess([str(lines)], tmp_path / "out", Encoding(tokenizer.file), block_bytes=2000)
    assert (
        summary.documents == 300
        and not (tmp_path / "out.progress.json").exists()
        and not list(tmp_path.glob("*.partial"))
    )
    assert preprocess([str(lines)], tmp_path / "fresh", Encoding(tokenizer.file), **options).documents == 300


def test_resume_after_kill_9(tokenizer, lines, tmp_path, repository):
    lines.write_bytes(lines.read_bytes() * 150)
    preprocess([str(lines)], tmp_path / "whole", Encoding(tokenizer.file))
    run = (
        "import sys; from neox.data.text.encoding import Encoding; from neox.data.text.preprocess import Options, "
        "preprocess\n"
        "preprocess([sys.argv[1]], sys.argv[2], Encoding(sys.argv[3]), Options(workers=2, resume=True, "
        "save_seconds=0.02, block_bytes=20000))"
    )
    command = [sys.executable, "-c", run, str(lines), str(tmp_path / "out"), tokenizer.file]
    kills = 0
    for pause in (0.0, 0.05, 0.15):
        process = subprocess.Popen(command, cwd=repository)
        before = (tmp_path / "out.progress.json").stat().st_mtime_ns if (tmp_path / "out.progress.json").exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            notes = tmp_path / "out.progress.json"
            if notes.exists() and notes.stat().st_mtime_ns != before:
                break
            time.sleep(0.002)
        time.sleep(pause)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 1
    last = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"out{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


@pytest.mark.parametrize("letter", ["a", " ", "\n", "😀", "日", "'", "\u0301", "a\u0301"])
def test_pathological_text_takes_linear_time(tokenizer, tmp_path, letter):
    seconds = []
    for size in (500_000, 2_000_000):
        (tmp_path / "in.txt").write_text(letter * (size // len(letter.encode())))
        started = time.process_time()
        preprocess([str(tmp_path / "in.txt")], tmp_path / "out", Encoding(tokenizer.file), overwrite=True)
        seconds.append(time.process_time() - started)
    assert seconds[1] < 6 * seconds[0] + 0.5
    ids = IndexedDataset(tmp_path / "out")[0][:-1].tolist()
    assert tokenizer.decode(ids) == (tmp_path / "in.txt").read_text()
