"""neox tokenizer train, as a user calls it."""

from __future__ import annotations

import json

import pytest

from neox.cli.main import main
from neox.data.text.tokenizer import Tokenizer


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
