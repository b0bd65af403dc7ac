"""neox preprocess, as a user calls it."""

from __future__ import annotations

import json

import pytest

from neox.cli.main import main
from neox.data.indexed import IndexedDataset
from neox.data.tokenizer import train_tokenizer


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "one two"}\n{"text": "three"}\n{oops}\n')
    (tmp_path / "in" / "b.py").write_text("print('four')\n")
    train_tokenizer(["one two three four"], 300, tmp_path / "t.json")
    return tmp_path


def call(corpus, *options: str) -> int:
    return main(["preprocess", "--input", str(corpus / "in"), "--tokenizer", str(corpus / "t.json"), "--out", str(corpus / "out"), "--workers", "0", *options])


def test_summary_in_words_and_json(corpus, capsys):
    assert call(corpus, "--bad-lines", "skip") == 0
    printed = capsys.readouterr()
    assert "2 documents" in printed.out and "1 bad, 0 blank, 0 empty" in printed.out and "a.jsonl:3: not JSON" in printed.out
    assert printed.err == ""
    assert call(corpus, "--bad-lines", "skip", "--json", "--overwrite", "--suffix", ".py", "--suffix", ".jsonl") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["documents"], summary["files"], summary["bad_lines"]) == (3, 2, 1)
    assert len(IndexedDataset(corpus / "out")) == 3


def test_a_bad_line_stops_with_code_3(corpus, capsys):
    assert call(corpus) == 3
    error = capsys.readouterr().err
    assert error.startswith("error[3] bad line; where=") and "a.jsonl:3; got=not JSON" in error and len(error.splitlines()) == 1
    assert not (corpus / "out.idx").exists()


def test_quarantine_is_named(corpus, capsys):
    assert call(corpus, "--bad-lines", "quarantine") == 0
    assert f"bad lines are kept in {corpus / 'out'}.quarantine.jsonl" in capsys.readouterr().out


def test_bad_options(corpus, capsys):
    assert call(corpus, "--workers", "-1") == 2
    assert "error[2] bad number of workers; where=--workers; got=-1" in capsys.readouterr().err
    assert call(corpus, "--suffix", ".md") == 3
    assert "folder has no input files" in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["preprocess", "--help"])
    assert stopped.value.code == 0 and "example: neox preprocess --input" in capsys.readouterr().out


def test_conversations_and_pairs(corpus, capsys):
    talk = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]
    (corpus / "chat.jsonl").write_text(json.dumps({"messages": talk, "chosen": talk, "rejected": [talk[0], {"role": "assistant", "content": "three"}]}) + "\n")
    options = ["preprocess", "--input", str(corpus / "chat.jsonl"), "--tokenizer", str(corpus / "t.json"), "--out", str(corpus / "out"), "--workers", "0"]
    assert main([*options, "--chat", "--chat-template", "plain"]) == 0
    assert "1 documents" in capsys.readouterr().out
    tokens, labels = IndexedDataset(corpus / "out")[0].tolist(), IndexedDataset(corpus / "out_labels")[0].tolist()
    assert len(tokens) == len(labels) and {a for a, b in zip(tokens, labels, strict=True) if b == -100} and set(labels) - {-100} <= set(tokens)
    assert main([*options, "--chat", "--pairs", "--chat-template", "plain", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["documents"] == 1 and 0 < summary["learned"] < summary["tokens"]
    for name in ("chosen", "chosen_labels", "rejected", "rejected_labels"):
        assert len(IndexedDataset(corpus / f"out_{name}")) == 1
    for arguments, message in (
        (["--pairs"], "option without --chat; where=--pairs"),
        (["--chat"], "no chat template"),
        (["--chat", "--chat-template", "plain", "--resume"], "where=--resume"),
    ):
        assert main([*options, *arguments]) == 2
        assert message in capsys.readouterr().err
