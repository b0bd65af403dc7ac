"""`neox data`: the numbers and positions that it prints."""

from __future__ import annotations

import json

import numpy as np
import pytest

from neox.cli import data as cli
from neox.cli.main import main
from neox.data.store.indexed import IndexedDataset, IndexedWriter
from neox.data.text.tokenizer import train_tokenizer

DOCUMENTS = [[1, 2, 3, 0], [7] * 30 + [0], [], [5, 0, 5], [1, 2, 3, 0]]


def write(path, documents=DOCUMENTS, dtype="uint16", **sidecar) -> str:
    with IndexedWriter(path, dtype, **sidecar) as writer:
        for document in documents:
            writer.add_document(document)
    return str(path)


def said(capsys, *words: object, code: int = 0):
    assert main(["data", *map(str, words), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def printed(capsys, *words: object, code: int = 0) -> list[str]:
    assert main(["data", *map(str, words)]) == code
    return capsys.readouterr().out.splitlines()


def test_every_number_of_a_dataset(tmp_path, capsys):
    prefix = write(tmp_path / "d", dtype="int32", eod_id=0, vocab_size=40, tokenizer_hash="ab" * 32)
    found = said(capsys, "inspect", prefix)
    lengths = [4, 31, 0, 3, 4]
    assert (found["documents"], found["tokens"], found["bytes"], found["dtype"]) == (5, 42, 168, "int32")
    assert found["sidecar"] == "present, and matches the files" and found["prefix"] == prefix
    wanted = {"tokenizer_hash": "ab" * 32, "vocab_size": 40, "eod_id": 0, "largest_id": 7}
    assert {name: found[name] for name in wanted} == wanted
    low, high = np.percentile(lengths, [10, 90])
    assert found["document_tokens"] == (
        f"shortest 0, 10 % below {low:,.0f}, median 4, 90 % below {high:,.0f}, longest 31, mean 8.4"
    )
    assert sum(row["documents"] for row in found["histogram"]) == 5
    assert (found["smallest_id_found"], found["largest_id_found"]) == (0, 7)
    assert (found["eod_tokens"], found["eod_share"], found["eod_per_document"]) == (4, 4 / 42, 0.8)
    assert found["documents_that_end_in_eod"] == 3
    assert found["duplicates"]["documents"] == 1 and found["duplicates"]["tokens"] == 4
    assert "samples" not in found


def test_the_end_of_document_is_the_recorded_one_or_the_tokenizers(tmp_path, capsys):
    """A dataset made with --eod-token ends its documents in another token than the tokenizer's default."""
    tokenizer = train_tokenizer(["hello"], 300, tmp_path / "t.json")
    plain, other = write(tmp_path / "plain"), write(tmp_path / "other", eod_id=5)
    (tmp_path / "plain.json").unlink()
    found = said(capsys, "inspect", plain)
    assert "eod_tokens" not in found and found["sidecar"] == "none: only the structure can be checked"
    assert said(capsys, "inspect", other)["eod_tokens"] == 2
    assert said(capsys, "inspect", plain, "--tokenizer", tmp_path / "t.json")["eod_tokens"] == 4
    assert said(capsys, "inspect", other, "--tokenizer", tmp_path / "t.json")["eod_tokens"] == 2
    assert tokenizer.eod_id == 0


def test_a_large_dataset_is_scanned_when_asked(tmp_path, capsys, monkeypatch):
    prefix = write(tmp_path / "d", eod_id=0)
    for limit, scanned in ((84, True), (83, False)):
        monkeypatch.setattr(cli, "SCANNED_BYTES", limit)
        found = said(capsys, "inspect", prefix)
        assert ("duplicates" in found, "scan" in found) == (scanned, not scanned)
    assert "duplicates" in said(capsys, "inspect", prefix, "--scan")
    found = said(capsys, "inspect", prefix, "--no-scan")
    assert "duplicates" not in found and "scan" not in found
    assert cli.SCANNED_BYTES == 83


def test_samples_are_spread_over_the_documents(tmp_path, capsys):
    documents = [[number] * (number + 1) for number in range(30)]
    prefix = write(tmp_path / "d", documents)
    assert said(capsys, "inspect", prefix, "--samples", 3)["samples"] == [
        "document 0 (1 token): 0",
        f"document 14 (15 tokens): {' '.join(['14'] * 15)}",
        f"document 29 (30 tokens): {' '.join(['29'] * 20)}",
    ]
    assert len(said(capsys, "inspect", prefix, "--samples", 99)["samples"]) == 30
    assert said(capsys, "inspect", prefix, "--samples", 1)["samples"] == ["document 0 (1 token): 0"]


def test_a_sample_is_the_beginning_of_a_text(tmp_path, capsys):
    tokenizer = train_tokenizer(["plain"], 257, tmp_path / "t.json")
    text = "ab" * 150
    prefix = write(tmp_path / "d", [tokenizer.encode(text)], tokenizer_hash=tokenizer.hash)
    (sample,) = said(capsys, "inspect", prefix, "--samples", 1, "--tokenizer", tmp_path / "t.json")["samples"]
    assert sample == f"document 0 (300 tokens): {text[:200]!r}"


def test_results_as_text(capsys):
    rows = [
        {"from": 1, "to": 2, "documents": 1, "tokens": 1},
        {"from": 2, "to": 4, "documents": 0, "tokens": 0},
        {"from": 4, "to": 8, "documents": 2000, "tokens": 12000},
    ]
    cli.show({"a": 1234, "b": None, "c": 0.5, "d": ["x", "y"], "e": {"n": 5000, "s": "t"}, "histogram": rows}, False)
    out = capsys.readouterr().out.splitlines()
    assert out[:9] == ["a: 1,234", "b: None", "c: 0.5", "d:", "  x", "  y", "e:", "  n: 5,000", "  s: t"]
    assert out[9] == "histogram:"
    words = [line.split() for line in out[10:]]
    assert [row[:8] for row in words] == [
        ["1", "to", "1", "tokens", "1", "documents", "1", "tokens"],
        ["2", "to", "3", "tokens", "0", "documents", "0", "tokens"],
        ["4", "to", "7", "tokens", "2,000", "documents", "12,000", "tokens"],
    ]
    assert [row[8:] for row in words] == [["#"], [], ["#" * 40]]  # some documents have some bar
    assert list(cli.bars([])) == []


@pytest.mark.parametrize(("size", "code"), [(8, 0), (7, 3)])
def test_ids_up_to_the_vocabulary_are_intact(tmp_path, capsys, size, code):
    prefix = write(tmp_path / "d")
    (found,) = said(capsys, "verify", prefix, "--vocab-size", size, code=code)
    assert found["ok"] is (code == 0) and found["prefix"] == prefix and found["damaged"] == []
    assert found["state"] == ("intact" if code == 0 else "id 7 in document 1 offset 0 is outside a vocabulary of 7")


def test_each_dataset_is_verified_and_the_first_error_is_the_exit(tmp_path, capsys):
    good, bad = write(tmp_path / "good"), write(tmp_path / "bad")
    (tmp_path / "good.json").unlink(missing_ok=True)
    with open(f"{bad}.bin", "r+b") as file:
        file.write(b"\xee")
    assert main(["data", "verify", f"{bad}-none", bad, good, "--vocab-size", "9"]) == 3
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0].startswith(f"{bad}-none: cannot open data file; where={bad}-none")
    assert lines[1:] == [
        f"{bad}: 1 block with wrong checksums in {bad}.bin, first bytes 0 to 84",
        f"{good}: structure is intact; no sidecar, so no checksums to compare",
    ]
    assert shown.err.startswith(f"error[3] cannot open data file; where={bad}-none")
    assert [each["ok"] for each in said(capsys, "verify", good, bad, code=3)] == [True, False]


def test_overlap_of_two_of_one_name_and_its_words(tmp_path, capsys):
    one, other = write(tmp_path / "one", eod_id=0), write(tmp_path / "other", [[9, 0], [1, 2, 3]], eod_id=0)
    assert printed(capsys, "overlap", one, other, code=3) == [
        f"1 of 2 documents of {other} (3 tokens) are in {one}",
        f"  {other} document 1 is {one} document 0",
    ]
    assert printed(capsys, "overlap", other, one, code=3) == [
        f"2 of 5 documents of {one} (8 tokens) are in {other}",
        f"  {one} document 0 is {other} document 1",
        f"  {one} document 4 is {other} document 1",
    ]
    (found,) = said(capsys, "overlap", one, one, code=3)
    assert (found["in"], found["from"], found["documents"], found["of"]) == (one, f"{one} (second)", 4, 5)
    clean = write(tmp_path / "clean", [[8, 8]], eod_id=0)
    assert printed(capsys, "overlap", one, clean) == [f"0 of 1 documents of {clean} (0 tokens) are in {one}"]
    for words in ([], [one], [one, one, one], [one, one, "--conf", "x.yml"]):
        assert main(["data", "overlap", *words]) == 2
        assert "error[2] specify two datasets, or a config; where=neox data overlap" in capsys.readouterr().err


def test_overlap_is_of_one_tokenizer(tmp_path, capsys):
    one, other = (write(tmp_path / name, tokenizer_hash=name * 64) for name in "ab")
    assert main(["data", "overlap", one, other]) == 3
    assert (
        f"error[3] datasets were built with different tokenizers; where={other}; got=tokenizer hash {'b' * 16}; "
        f"want={'a' * 16} as {one}" in capsys.readouterr().err
    )


def test_a_merged_dataset_has_the_tokenizer_that_all_name(tmp_path, capsys):
    made = {"tokenizer_hash": "a" * 64, "vocab_size": 40, "eod_id": 0}
    one, two = write(tmp_path / "one", **made), write(tmp_path / "two", **made)
    bare = write(tmp_path / "bare")
    found = said(capsys, "merge", one, two, "--out", tmp_path / "m")
    wanted = {"out": str(tmp_path / "m"), "datasets": 2, "documents": 10, "tokens": 84, "dtype": "uint16"}
    assert found == wanted
    sidecar = IndexedDataset(tmp_path / "m").sidecar
    assert (sidecar.tokenizer_hash, sidecar.vocab_size, sidecar.eod_id) == ("a" * 64, 40, 0)
    found = said(capsys, "merge", one, bare, one, "--out", tmp_path / "m", "--overwrite")
    assert (found["datasets"], found["documents"]) == (3, 15)
    sidecar = IndexedDataset(tmp_path / "m").sidecar
    assert (sidecar.tokenizer_hash, sidecar.vocab_size, sidecar.eod_id) == (None, None, None)
    assert cli.common_tokenizer([IndexedDataset(one)], "").eod_id == 0
    assert not cli.same_file(str(tmp_path / "x"), str(tmp_path / "x")) and cli.same_file(f"{one}.bin", f"{one}.bin")


@pytest.mark.parametrize(
    "words",
    [
        ["which", "--step", "0"],
        ["which", "--step", "1", "--batch", "0"],
        ["which", "--step", "1", "--world-size", "0"],
        ["which", "--document", "-1"],
        ["which", "--step", "1", "--rank", "-1"],
        ["seen", "--step", "0"],
        ["seen", "--batch", "0"],
    ],
)
def test_questions_about_a_run_have_ranges(tmp_path, capsys, words):
    assert main(["data", *words, "--run", str(tmp_path)]) == 2
    option, value = words[-2:]
    least = 0 if option in ("--document", "--rank") else 1
    assert f"where={option}; got={value}; want=at least {least}" in capsys.readouterr().err
