"""neox tokenizer train, as a user calls it."""

from __future__ import annotations

import json

import pytest

from neox.cli import tokenizer as cli
from neox.cli.main import main
from neox.data.text.reading import BadLine
from neox.data.text.tokenizer import Tokenizer
from neox.errors import DataError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "the cat sat on the mat"}\n{"body": "no text"}\n')
    (tmp_path / "in" / "b.txt").write_text("the cat " * 50)
    return tmp_path


def call(folder, *options: str) -> int:
    return main(["tokenizer", "train", "--input", str(folder / "in"), "--out", str(folder / "t.json"), *options])


def test_trains_and_reports(folder, capsys):
    assert call(folder, "--vocab-size", "262", "--bad-lines", "skip", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    tokenizer = Tokenizer(folder / "t.json")
    assert result == {"out": str(folder / "t.json"), "vocab_size": 262, "eod_id": 0, "hash": tokenizer.hash, "files": 2}
    before = (folder / "t.json").read_bytes()
    assert call(folder, "--vocab-size", "5000", "--bad-lines", "skip", "--eod-token", "</s>") == 3
    assert (
        "error[3] tokenizer already exists; where=" in capsys.readouterr().err
        and (folder / "t.json").read_bytes() == before
    )
    assert call(folder, "--vocab-size", "5000", "--bad-lines", "skip", "--eod-token", "</s>", "--overwrite") == 0
    printed = capsys.readouterr().out
    assert "from 2 files, </s> is 0" in printed and "of the 5,000 requested tokens" in printed


def test_a_bad_line_stops_with_code_3_and_keeps_nothing(folder, capsys):
    assert call(folder, "--vocab-size", "300") == 3
    assert "error[3] bad line; where=" in (error := capsys.readouterr().err) and "a.jsonl:2; got=no key 'text'" in error
    assert not (folder / "t.json").exists()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--vocab-size", "1000000000000"], "vocabulary is too large; where=--vocab-size"),
        (["--vocab-size", "99999999999999999999999"], "vocabulary is too large; where=--vocab-size"),
        (["--vocab-size", "300", "--eod-token", ""], "special token is empty"),
        (["--vocab-size", "300", "--special-token", ""], "special token is empty"),
    ],
)
def test_impossible_vocabularies_are_refused(folder, capsys, arguments, what):
    """The library would abort the process for the first."""
    assert call(folder, *arguments, "--bad-lines", "skip") == 2
    assert f"error[2] {what}" in capsys.readouterr().err and not (folder / "t.json").exists()


def test_a_small_vocabulary_is_refused(folder, capsys):
    assert call(folder, "--vocab-size", "100") == 2
    assert "at least 257" in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["tokenizer", "train", "--help"])
    assert "example: neox tokenizer train" in capsys.readouterr().out


def test_options_reach_the_training(folder, monkeypatch, capsys):
    told = {}

    def train(texts, size, out, **options):
        told.update(options, texts=list(texts), size=size, out=out)
        return Tokenizer(made)

    assert call(folder, "--vocab-size", "262", "--bad-lines", "skip") == 0
    made = str(folder / "t.json")
    capsys.readouterr()
    monkeypatch.setattr(cli, "train_tokenizer", train)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    options = ["--overwrite", "--special-token", "<a>", "--special-token", "<b>", "--json-key", "body"]
    assert call(folder, "--vocab-size", "300", *options, "--suffix", ".jsonl", "--bad-lines", "skip") == 0
    assert told == {
        "texts": ["no text"],
        "size": 300,
        "out": made,
        "eod_token": "<|endoftext|>",
        "special_tokens": ["<a>", "<b>"],
        "show_progress": False,
    }
    assert capsys.readouterr().out == (
        f"{made}: 262 tokens from 1 file, <|endoftext|> is 0\nthe text gave only 262 of the 300 requested tokens\n"
    )
    assert call(folder, "--vocab-size", "262", "--overwrite", "--format", "txt", "--bad-lines", "skip") == 0
    assert len(told["texts"]) == 2 and told["texts"][0].startswith('{"text"') and told["special_tokens"] == []
    assert "requested" not in capsys.readouterr().out


def test_documents_of_every_line_and_the_first_bad_one(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{oops}\n{"text": "two"}\n[]\n{"text": "three"}\n')
    files = [str(tmp_path / "a.jsonl")]
    assert list(cli.documents(files, "text", "skip")) == ["one", "two", "three"]
    with pytest.raises(DataError, match=r"bad line; where=.*a\.jsonl:2; got=not JSON.*; do=fix the input, or leave"):
        list(cli.documents(files, "text", "fail"))
    bad = BadLine("a.gz", 0, "cut short", b"")
    monkeypatch.setattr(cli, "read_blocks", lambda files, form: [[bad]])
    with pytest.raises(DataError, match=r"bad file; where=a\.gz; got=cut short"):
        list(cli.documents(files, "text", "fail"))
    assert list(cli.documents(files, "text", "skip")) == []


def test_a_link_to_nowhere_is_not_overwritten(folder, capsys):
    (folder / "t.json").symlink_to(folder / "nowhere")
    assert call(folder, "--vocab-size", "262", "--bad-lines", "skip") == 3
    assert "do=choose another --out, or pass --overwrite" in capsys.readouterr().err
    assert not (folder / "nowhere").exists()
