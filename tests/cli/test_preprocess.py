"""neox preprocess, as a user calls it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from neox.cli import preprocess as cli
from neox.cli.main import main
from neox.data.store.indexed import IndexedDataset
from neox.data.text.chat import ChatEncoding, ChatSummary
from neox.data.text.encoding import Encoding
from neox.data.text.input_files import FOLDER_SUFFIXES
from neox.data.text.preprocess import Options, Summary
from neox.data.text.tokenizer import train_tokenizer


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "one two"}\n{"text": "three"}\n{oops}\n')
    (tmp_path / "in" / "b.py").write_text("print('four')\n")
    train_tokenizer(["one two three four"], 300, tmp_path / "t.json")
    return tmp_path


def call(corpus, *options: str) -> int:
    return main(
        [
            "preprocess",
            "--input",
            str(corpus / "in"),
            "--tokenizer",
            str(corpus / "t.json"),
            "--out",
            str(corpus / "out"),
            "--workers",
            "0",
            *options,
        ]
    )


def test_summary_in_words_and_json(corpus, capsys):
    assert call(corpus, "--bad-lines", "skip") == 0
    printed = capsys.readouterr()
    assert (
        "2 documents" in printed.out
        and "1 bad, 0 blank, 0 empty" in printed.out
        and "a.jsonl:3: not JSON" in printed.out
    )
    assert call(corpus, "--bad-lines", "skip", "--json", "--overwrite", "--suffix", ".py", "--suffix", ".jsonl") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["documents"], summary["files"], summary["bad_lines"]) == (3, 2, 1)
    assert len(IndexedDataset(corpus / "out")) == 3


@pytest.mark.parametrize("set_by_the_user", [None, "glibc.malloc.check=0"])
def test_the_environment_stays_as_it_was(corpus, monkeypatch, set_by_the_user):
    """Processes that are started later do not inherit the allocator's arguments of the workers."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if set_by_the_user:
        monkeypatch.setenv("GLIBC_TUNABLES", set_by_the_user)
    before = dict(os.environ)
    assert call(corpus, "--bad-lines", "skip") == 0
    assert call(corpus, "--overwrite") == 3
    assert dict(os.environ) == before


def test_a_bad_line_stops_with_code_3(corpus, capsys):
    assert call(corpus) == 3
    error = capsys.readouterr().err
    assert (
        error.startswith("error[3] bad line; where=")
        and "a.jsonl:3; got=not JSON" in error
        and len(error.splitlines()) == 1
    )
    assert not (corpus / "out.idx").exists()


def test_quarantine_is_named(corpus, capsys):
    assert call(corpus, "--bad-lines", "quarantine") == 0
    assert f"bad lines are stored in {corpus / 'out'}.quarantine.jsonl" in capsys.readouterr().out


def test_a_bos_is_prepended_when_asked_for(corpus, capsys):
    train_tokenizer(["one two three four"], 300, corpus / "t.json", special_tokens=["<s>", "<start>"])
    assert (
        call(corpus, "--bad-lines", "skip") == 0
        and call(corpus, "--bad-lines", "skip", "--overwrite", "--no-prepend-bos") == 0
    )
    plain = IndexedDataset(corpus / "out")
    documents = [plain[i].tolist() for i in range(2)]
    for options, bos in ((["--prepend-bos"], 1), (["--prepend-bos", "--bos-token", "<start>"], 2)):
        assert call(corpus, "--bad-lines", "skip", "--overwrite", *options) == 0
        assert [IndexedDataset(corpus / "out")[i].tolist() for i in range(2)] == [
            [bos, *document] for document in documents
        ]
    capsys.readouterr()
    assert call(corpus, "--overwrite", "--prepend-bos", "--bos-token", "<nowhere>") == 2
    assert "error[2] tokenizer has no beginning-of-sequence token; where=" in capsys.readouterr().err
    assert call(corpus, "--overwrite", "--bos-token", "<s>") == 2
    assert "error[2] option needs --prepend-bos; where=--bos-token" in capsys.readouterr().err
    assert call(corpus, "--overwrite", "--chat", "--prepend-bos") == 2
    assert "error[2] option does not apply to conversations; where=--prepend-bos" in capsys.readouterr().err


def test_bad_options(corpus, capsys):
    assert call(corpus, "--workers", "-1") == 2
    assert "error[2] option out of range; where=--workers; got=-1; want=at least 0" in capsys.readouterr().err
    assert call(corpus, "--suffix", ".md") == 3
    assert "folder has no input files" in capsys.readouterr().err


def test_file_names_that_are_not_utf8_go_through_every_output(corpus, capfd):
    folder = os.fsencode(corpus) + b"/caf\xe9"
    os.mkdir(folder)
    Path(os.fsdecode(folder + b"/caf\xe9.jsonl")).write_text('{"text": "one"}\n{oops}\n')
    name = os.fsdecode(folder)
    options = [
        "--tokenizer",
        str(corpus / "t.json"),
        "--workers",
        "0",
        "--input",
        name,
        "--out",
        f"{name}/out",
        "--resume",
    ]
    for more in (["--bad-lines", "quarantine", "--json"], ["--bad-lines", "skip", "--overwrite"]):
        assert main(["preprocess", *options, *more]) == 0
        printed = capfd.readouterr().out
        assert "caf\\xe9.jsonl:2" in (
            json.loads(printed)["bad_examples"][0]["where"] if printed.startswith("{") else printed
        )
    (kept,) = Path(f"{name}/out.quarantine.jsonl").read_text().splitlines()
    assert json.loads(kept)["file"].endswith("caf\\xe9/caf\\xe9.jsonl")
    assert main(["preprocess", *options, "--overwrite"]) == 3
    assert "caf\\xe9.jsonl:2; got=not JSON" in capfd.readouterr().err
    assert main(["data", "inspect", f"{name}/out", "--json"]) == 0 and main(["data", "inspect", f"{name}/out"]) == 0


def test_input_that_is_read_once_or_left_out_is_reported(corpus, capfd):
    command = [
        sys.executable,
        "-m",
        "neox.cli.main",
        "preprocess",
        "--input",
        str(corpus / "in"),
        str(corpus / "in" / "a.jsonl"),
        "--bad-lines",
        "skip",
    ]
    done = subprocess.run(
        [*command, "--tokenizer", str(corpus / "t.json"), "--out", str(corpus / "out"), "--workers", "0"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "2 documents" in done.stdout
    assert (
        "left out of folders: 1 file of other suffixes (.py 1)" in done.stderr
        and "reached twice, read once: " in done.stderr
    )


def test_the_form_of_the_input_can_be_named(corpus, capsys):
    path = corpus / "lines.txt"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    common = [
        "preprocess",
        "--input",
        str(path),
        "--tokenizer",
        str(corpus / "t.json"),
        "--out",
        str(corpus / "out"),
        "--workers",
        "0",
        "--json",
    ]
    assert main(common) == 3
    assert "file may be JSON lines or one document" in capsys.readouterr().err
    for form, documents in (("jsonl", 2), ("txt", 1)):
        assert main([*common, "--format", form, "--overwrite"]) == 0
        assert json.loads(capsys.readouterr().out)["documents"] == documents
    assert (
        main(
            [
                "tokenizer",
                "train",
                "--input",
                str(path),
                "--format",
                "jsonl",
                "--vocab-size",
                "300",
                "--out",
                str(corpus / "u.json"),
            ]
        )
        == 0
    )


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["preprocess", "--help"])
    assert stopped.value.code == 0 and "example: neox preprocess --input" in capsys.readouterr().out


def test_conversations_and_pairs(corpus, capsys):
    talk = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]
    (corpus / "chat.jsonl").write_text(
        json.dumps({"messages": talk, "chosen": talk, "rejected": [talk[0], {"role": "assistant", "content": "three"}]})
        + "\n"
    )
    options = [
        "preprocess",
        "--input",
        str(corpus / "chat.jsonl"),
        "--tokenizer",
        str(corpus / "t.json"),
        "--out",
        str(corpus / "out"),
        "--workers",
        "0",
    ]
    assert main([*options, "--chat", "--chat-template", "plain"]) == 0
    assert "1 document, " in capsys.readouterr().out
    tokens, labels = IndexedDataset(corpus / "out")[0].tolist(), IndexedDataset(corpus / "out_labels")[0].tolist()
    assert (
        len(tokens) == len(labels)
        and {a for a, b in zip(tokens, labels, strict=True) if b == -100}
        and set(labels) - {-100} <= set(tokens)
    )
    assert main([*options, "--chat", "--pairs", "--chat-template", "plain", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["documents"] == 1 and 0 < summary["learned"] < summary["tokens"]
    for name in ("chosen", "chosen_labels", "rejected", "rejected_labels"):
        assert len(IndexedDataset(corpus / f"out_{name}")) == 1
    for arguments, message in (
        (["--pairs"], "option needs --chat; where=--pairs"),
        (["--chat"], "no chat template"),
        (["--chat", "--chat-template", "plain", "--resume"], "where=--resume"),
    ):
        assert main([*options, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_bad_line_under_worker_processes_is_one_line(tmp_path):
    """Without an orderly exit Python reports leaked semaphores after it."""
    train_tokenizer(["hello world " * 20], 300, tmp_path / "t.json")
    (tmp_path / "a.jsonl").write_text('{"text": "no messages"}\n')
    command = [
        sys.executable,
        "-m",
        "neox.cli.main",
        "preprocess",
        "--chat",
        "--chat-template",
        "chatml",
        "--workers",
        "1",
    ]
    command += ["--input", "a.jsonl", "--tokenizer", "t.json", "--out", "o"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 3 and done.stderr.startswith("error[3] bad line; where=a.jsonl:1")
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.fixture
def told(monkeypatch):
    """What the functions that the command calls receive."""
    calls = {}

    def note(name, result):
        def function(*arguments):
            calls[name] = arguments
            return result

        monkeypatch.setattr(cli, name, function)

    note("find_files", ["f"])
    note("preprocess", Summary("out", "uint16", 1))
    note("preprocess_chat", ChatSummary("out", "uint16", 1))
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 3, 5})
    return calls


SHORT = ["preprocess", "--input", "a", "b", "--tokenizer", "t.json", "--out", "o"]


def test_the_defaults_of_text(told):
    assert main(SHORT) == 0
    assert told["find_files"] == (["a", "b"], tuple(FOLDER_SUFFIXES))
    assert told["preprocess"] == (["f"], "o", Encoding("t.json"), Options(3, "fail", False, False), None)
    assert "preprocess_chat" not in told


def test_options_of_text_reach_the_encoding(told):
    options = ["--suffix", ".x", "--suffix", ".y", "--format", "txt", "--json-key", "body", "--no-append-eod"]
    options += ["--eod-token", "<e>", "--prepend-bos", "--bos-token", "<b>", "--special-tokens", "text"]
    options += ["--workers", "0", "--bad-lines", "skip", "--overwrite", "--resume", "--json"]
    assert main([*SHORT, *options]) == 0
    assert told["find_files"] == (["a", "b"], (".x", ".y"))
    _, _, encoding, how, _ = told["preprocess"]
    assert how == Options(0, "skip", True, True)
    assert encoding == Encoding(
        tokenizer="t.json",
        eod_token="<e>",
        append_eod=False,
        json_key="body",
        specials_as_text=True,
        form="txt",
        prepend_bos=True,
        bos_token="<b>",
    )


def test_options_of_conversations_reach_the_encoding(told, tmp_path):
    (tmp_path / "template").write_text("{{ messages }}")
    chat = ["--chat", "--chat-template", str(tmp_path / "template"), "--workers", "2", "--overwrite"]
    assert main([*SHORT, *chat]) == 0
    template = "{{ messages }}"
    wanted = ChatEncoding("t.json", None, template, ("messages",), True, False, "auto")
    assert told["preprocess_chat"] == (["f"], "o", wanted, Options(2, "fail", True, False), None)
    more = ["--eod-token", "<e>", "--no-append-eod", "--last-only", "--format", "jsonl"]
    assert main([*SHORT, *chat, *more, "--json-key", "talk"]) == 0
    assert told["preprocess_chat"][2] == ChatEncoding("t.json", "<e>", template, ("talk",), False, True, "jsonl")
    assert main([*SHORT, *chat, *more, "--pairs"]) == 0
    assert told["preprocess_chat"][2].keys == ("chosen", "rejected") and "preprocess" not in told


@pytest.mark.parametrize(
    ("options", "where", "do"),
    [
        (["--pairs"], "--pairs", "add --chat"),
        (["--last-only"], "--last-only", "add --chat"),
        (["--chat-template", "x"], "--chat-template", "add --chat"),
        (["--bos-token", "x"], "--bos-token", "add --prepend-bos"),
        (["--chat", "--resume"], "--resume", "leave it out"),
        (["--chat", "--special-tokens", "text"], "--special-tokens text", "leave it out, because the chat template"),
        (["--chat", "--prepend-bos"], "--prepend-bos", "leave it out, because the chat template"),
        (["--chat", "--bos-token", "x"], "--bos-token", "leave it out, because the chat template"),
    ],
)
def test_options_without_the_one_that_they_need(told, capsys, options, where, do):
    assert main([*SHORT, *options]) == 2
    error = capsys.readouterr().err.strip()
    assert f"where={where}; do={do}" in error and (error.endswith("leave it out") or do != "leave it out")


def test_workers_get_large_pages_unless_the_user_sets_others(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    with pytest.raises(KeyError), cli.large_pages():
        assert os.environ["GLIBC_TUNABLES"] == cli.LARGE_PAGES
        raise KeyError
    assert "GLIBC_TUNABLES" not in os.environ
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    with cli.large_pages():
        assert os.environ["GLIBC_TUNABLES"] == ""
    assert os.environ["GLIBC_TUNABLES"] == ""


def test_a_summary_in_words():
    summary = ChatSummary("out", "int32", 2, 3000, 40_000, 2_500_000, 1, 2, 1003, seconds=2.0, encoder="native")
    summary.learned, summary.quarantine = 500, "q"
    summary.bad_reasons = {"not JSON": 1000, "no key": 3}
    summary.bad_examples = [{"where": "a:3", "reason": "no key 'x'"}]
    assert cli.report(summary).splitlines() == [
        "out: 3,000 documents, 40,000 tokens (int32) from 2 files",
        "2.5 MB in 2.0 s: 1.2 MB/s, encoder: native",
        "left out: 1,003 bad, 1 blank, 2 empty",
        "learned: 500 of 40,000 tokens",
        "  3 x no key",
        "  1,000 x not JSON",
        "  a:3: no key 'x'",
        "bad lines are stored in q",
    ]
    assert cli.progress_line(summary) == "3,000 documents, 40,000 tokens, 2 MB (1.2 MB/s), 1,003 bad"
    assert cli.progress_line(Summary("o", "d", 1, text_bytes=10**6)).startswith("0 documents, 0 tokens, 1 MB (1000")
    assert cli.report(Summary("o", "uint16", 1)).count("\n") == 2


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_alone(monkeypatch, terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    with cli.progress_bar() as show:
        assert (show is not None) == terminal
        if terminal:
            show(Summary("o", "uint16", 1, documents=3))
    assert ("3 documents" in stream.getvalue()) == terminal
