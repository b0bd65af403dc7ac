"""What a run of preprocessing counts, saves and reports, and when."""

from __future__ import annotations

import numpy as np
import orjson
import pytest

from neox.data.store.indexed import IndexedDataset, IndexedWriter
from neox.data.text.encoding import EncodedBlock, Encoding
from neox.data.text.preprocess import (
    EXAMPLES,
    SAVE_SECONDS,
    WAITING,
    Options,
    Summary,
    finished_summary,
    in_order,
    preprocess,
    require_documents,
    restore_partial_names,
)
from neox.data.text.progress import InputIdentity, ProgressFile
from neox.data.text.reading import BLOCK_BYTES, BadLine
from neox.data.text.tokenizer import Tokenizer, train_tokenizer
from neox.errors import ConfigError, DataError

TEXTS = [f"document {i}" for i in range(40)]


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    return train_tokenizer(TEXTS, 300, tmp_path / "t.json")


def write_lines(path, texts: list[str] = TEXTS) -> str:
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    return str(path)


class Result:
    """A result that notes when it is asked for."""

    def __init__(self, number: int, log: list[str]):
        self.number, self.log = number, log
        log.append(f"start {number}")

    def result(self) -> int:
        self.log.append(f"take {self.number}")
        return self.number


@pytest.mark.parametrize(("ahead", "waiting"), [(0, 1), (1, 2), (3, 4), (99, 5)])
def test_results_come_in_order_with_a_limit_in_flight(ahead, waiting):
    log: list[str] = []
    assert list(in_order((Result(number, log) for number in range(5)), ahead)) == list(range(5))
    taken = [entry for entry in log if entry.startswith("take")]
    assert taken == [f"take {number}" for number in range(5)]
    flying = [sum(1 if entry.startswith("start") else -1 for entry in log[: i + 1]) for i in range(len(log))]
    assert max(flying) == waiting and list(in_order([], ahead)) == []


def test_defaults_are_those_of_the_documentation():
    assert Options() == Options(0, "fail", False, False, BLOCK_BYTES, SAVE_SECONDS) and SAVE_SECONDS == 20.0
    assert (WAITING, EXAMPLES) == (4, 20)
    assert [Options(bad_lines=policy).bad_lines for policy in ("fail", "skip", "quarantine")] == [
        "fail",
        "skip",
        "quarantine",
    ]
    with pytest.raises(ConfigError, match="where=--bad-lines; got=Skip; want=fail, skip, quarantine"):
        Options(bad_lines="Skip")


def test_bad_lines_are_counted_by_reason_and_the_first_are_named():
    summary = Summary("out", "uint16", 1)
    for number in range(1, 31):
        reason = f"not JSON: at {number}" if number % 3 else "no key 'text'"
        summary.add_bad(BadLine("a.jsonl", number, reason, b""))
    assert summary.bad_lines == 30 and summary.bad_reasons == {"not JSON": 20, "no key 'text'": 10}
    assert [example["where"] for example in summary.bad_examples] == [f"a.jsonl:{number}" for number in range(1, 21)]
    assert summary.bad_examples[1] == {"where": "a.jsonl:2", "reason": "not JSON: at 2"}


def test_blocks_are_added_up():
    summary = Summary("out", "uint16", 2)
    for tokens, sizes in ((5, [2, 3]), (1, [1])):
        summary.add(EncodedBlock(np.zeros(tokens), np.array(sizes), [], blank=1, empty=3, text_bytes=10 * tokens))
    counts = (summary.documents, summary.tokens, summary.text_bytes, summary.blank_lines, summary.empty_documents)
    assert counts == (3, 6, 60, 2, 6) and (summary.bad_lines, summary.files) == (0, 2)


def test_input_without_documents_names_three_files():
    summary = Summary("out", "uint16", 4, bad_lines=1, blank_lines=2, empty_documents=3)
    with pytest.raises(DataError, match="where=a, b, c; got=1 bad, 2 blank, 3 empty in 4 files$"):
        require_documents(summary, list("abcd"))
    summary.documents = 1
    require_documents(summary, list("abcd"))


def test_names_are_given_back_only_where_none_is_left(tmp_path):
    for name in ("out.idx", "out.bin", "out.bin.partial", "out.quarantine.jsonl", "out.json", "out.idx2"):
        (tmp_path / name).write_text(name)
    restore_partial_names(str(tmp_path / "out"))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "out.idx.partial": "out.idx",
        "out.bin": "out.bin",
        "out.bin.partial": "out.bin.partial",
        "out.quarantine.jsonl.partial": "out.quarantine.jsonl",
        "out.json": "out.json",
        "out.idx2": "out.idx2",
    }


def test_progress_is_reported_and_saved_after_each_block(tokenizer, tmp_path):
    file, seen = write_lines(tmp_path / "in.jsonl"), []

    def note(summary: Summary) -> None:
        saved = tmp_path / "out.progress.json"
        content = orjson.loads(saved.read_bytes()) if saved.exists() else {"blocks": 0, "summary": {"documents": 0}}
        seen.append((summary.documents, content["blocks"], content["summary"]["documents"], summary.seconds))

    options = Options(block_bytes=200, save_seconds=0)
    summary = preprocess([file], tmp_path / "out", Encoding(tokenizer.file), options, note)
    assert [blocks for _, blocks, _, _ in seen] == list(range(1, len(seen) + 1)) and len(seen) > 3
    assert all(documents == saved for documents, _, saved, _ in seen) and seen[-1][0] == summary.documents == 40
    times = [seconds for *_, seconds in seen]
    assert times == sorted(times) and times[0] > 0 and times[-1] <= summary.seconds
    seen.clear()
    again = Options(block_bytes=200, save_seconds=1000, overwrite=True)
    preprocess([file], tmp_path / "out", Encoding(tokenizer.file), again, note)
    assert len(seen) > 3 and {blocks for _, blocks, _, _ in seen} == {0}


def test_a_run_without_resume_leaves_no_progress(tokenizer, tmp_path):
    file = write_lines(tmp_path / "in.jsonl")

    def stop(summary: Summary) -> None:
        if summary.documents > 20:
            raise KeyboardInterrupt

    for resume, left in ((True, {"out.bin.partial", "out.idx.partial", "out.progress.json"}), (False, set())):
        with pytest.raises(KeyboardInterrupt):
            preprocess(
                [file],
                tmp_path / "out",
                Encoding(tokenizer.file),
                Options(block_bytes=200, save_seconds=0, resume=resume),
                stop,
            )
        assert {path.name for path in tmp_path.glob("out*")} == left
    with pytest.raises(KeyboardInterrupt):  # nothing was saved, so nothing can be resumed
        preprocess([file], tmp_path / "out", Encoding(tokenizer.file), Options(block_bytes=200, resume=True), stop)
    assert not list(tmp_path.glob("out*"))


def interrupted(tokenizer, folder) -> tuple[str, Options]:
    """The input of a run that was interrupted after twenty documents, and the options that resume it."""
    file = write_lines(folder / "in.jsonl")

    def stop(summary: Summary) -> None:
        if summary.documents > 20:
            raise KeyboardInterrupt

    options = Options(block_bytes=200, save_seconds=0, resume=True)
    with pytest.raises(KeyboardInterrupt):
        preprocess([file], folder / "out", Encoding(tokenizer.file), options, stop)
    return file, options


def test_the_seconds_of_an_interrupted_run_count(tokenizer, tmp_path):
    file, options = interrupted(tokenizer, tmp_path)
    path = tmp_path / "out.progress.json"
    content = orjson.loads(path.read_bytes())
    content["summary"]["seconds"] = 1000.0
    path.write_bytes(orjson.dumps(content))
    seen = []
    summary = preprocess(
        [file], tmp_path / "out", Encoding(tokenizer.file), options, lambda each: seen.append(each.seconds)
    )
    assert 1000 < seen[0] <= summary.seconds < 1900 and summary.documents == 40
    assert [IndexedDataset(tmp_path / "out")[i].size > 0 for i in range(40)] == [True] * 40


def test_the_summary_of_a_finished_dataset(tokenizer, tmp_path):
    files = [write_lines(tmp_path / "in.jsonl"), write_lines(tmp_path / "more.jsonl", ["", "x"])]
    (tmp_path / "in.jsonl").write_bytes(b"{bad\n\n" + (tmp_path / "in.jsonl").read_bytes())
    encoding = Encoding(tokenizer.file)
    first = preprocess(files, tmp_path / "out", encoding, Options(bad_lines="skip"))
    settings = {**encoding.settings(), "tokenizer": tokenizer.hash, "bad_lines": "skip"}
    source = InputIdentity(files, settings, 1).source
    assert IndexedDataset(tmp_path / "out").sidecar.source == {
        "hash": source,
        "files": 2,
        "text_bytes": first.text_bytes,
        "blank_lines": 1,
        "empty_documents": 1,
        "bad_lines": 1,
        "bad_reasons": {"not JSON": 1},
    }
    found = finished_summary(str(tmp_path / "out"), source, files)
    assert found is not None and found.out == str(tmp_path / "out") and found.dtype == "uint16" and found.files == 2
    for name in ("documents", "tokens", "text_bytes", "blank_lines", "empty_documents", "bad_lines", "bad_reasons"):
        assert getattr(found, name) == getattr(first, name), name
    assert (found.documents, found.empty_documents) == (41, 1)
    assert finished_summary(str(tmp_path / "out"), "other", files) is None
    assert finished_summary(str(tmp_path / "none"), source, files) is None


def test_the_form_of_the_input_and_its_length_are_passed_on(tokenizer, tmp_path):
    (tmp_path / "in.txt").write_bytes(orjson.dumps({"text": "a"}) + b"\n")
    for form, text in (("jsonl", "a"), ("txt", '{"text":"a"}\n')):
        preprocess([str(tmp_path / "in.txt")], tmp_path / form, Encoding(tokenizer.file, form=form))
        assert tokenizer.decode(IndexedDataset(tmp_path / form)[0]) == text + "<|endoftext|>"


def test_the_named_end_of_document_token_is_used_and_recorded(tmp_path):
    made = train_tokenizer(TEXTS, 300, tmp_path / "u.json", special_tokens=["<end>"])
    preprocess([write_lines(tmp_path / "in.jsonl")], tmp_path / "out", Encoding(made.file, "<end>"))
    dataset = IndexedDataset(tmp_path / "out")
    assert {int(document[-1]) for document in dataset} == {1} and dataset.sidecar.eod_id == 1


def test_a_run_that_fails_leaves_the_dataset_that_it_would_have_replaced(tokenizer, tmp_path):
    file = write_lines(tmp_path / "in.jsonl")
    preprocess([file], tmp_path / "out", Encoding(tokenizer.file))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out*")}
    (tmp_path / "bad.jsonl").write_text('{"text": "new"}\n{oops\n')
    for options in (Options(overwrite=True), Options(overwrite=True, bad_lines="quarantine")):
        (tmp_path / "empty.jsonl").write_text("{oops\n")
        name = "bad.jsonl" if options.bad_lines == "fail" else "empty.jsonl"
        with pytest.raises(DataError, match="bad line|input has no documents"):
            preprocess([str(tmp_path / name)], tmp_path / "out", Encoding(tokenizer.file), options)
        assert {path.name: path.read_bytes() for path in tmp_path.glob("out*")} == before
    preprocess([str(tmp_path / "bad.jsonl")], tmp_path / "out", Encoding(tokenizer.file), Options(0, "skip", True))
    assert len(IndexedDataset(tmp_path / "out")) == 1


def test_a_run_is_resumed_with_the_tokenizer_that_it_began_with(tokenizer, tmp_path):
    """By its content, whatever the path."""
    file, options = interrupted(tokenizer, tmp_path)
    moved = (tmp_path / "t.json").rename(tmp_path / "moved.json")
    train_tokenizer(TEXTS, 299, tmp_path / "t.json", special_tokens=["<more>"])
    with pytest.raises(DataError, match="progress belongs to another run"):
        preprocess([file], tmp_path / "out", Encoding(tokenizer.file), options)
    for other in (Options(block_bytes=200, bad_lines="skip", resume=True), Options(block_bytes=100, resume=True)):
        with pytest.raises(DataError, match="progress belongs to another run"):
            preprocess([file], tmp_path / "out", Encoding(str(moved)), other)
    assert preprocess([file], tmp_path / "out", Encoding(str(moved)), options).documents == 40
    assert [tokenizer.decode(ids) for ids in IndexedDataset(tmp_path / "out")] == [
        f"{text}<|endoftext|>" for text in TEXTS
    ]


def test_files_get_their_names_before_the_progress_goes(tokenizer, tmp_path, monkeypatch):
    """A kill at any of these moments can be resumed: bad lines first, then the dataset, then the progress."""
    file = write_lines(tmp_path / "in.jsonl")
    (tmp_path / "in.jsonl").write_bytes(b"{bad\n" + (tmp_path / "in.jsonl").read_bytes())
    names = []
    finish, remove = IndexedWriter.finish, ProgressFile.remove

    def note(call):
        def noted(self):
            names.append({path.name.removeprefix("out.") for path in tmp_path.glob("out*")})
            return call(self)

        return noted

    monkeypatch.setattr(IndexedWriter, "finish", note(finish))
    monkeypatch.setattr(ProgressFile, "remove", note(remove))
    preprocess([file], tmp_path / "out", Encoding(tokenizer.file), Options(bad_lines="quarantine"))
    partial = {"bin.partial", "idx.partial", "progress.json", "quarantine.jsonl"}
    assert names[1:] == [partial, {"bin", "idx", "json", "progress.json", "quarantine.jsonl"}]
