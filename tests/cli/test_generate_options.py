"""`neox generate`: which options reach the sampling, the model and the output."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from neox.cli import generate as cli
from neox.cli.main import main
from neox.config.schema import ModelConfig
from neox.data.text.tokenizer import Tokenizer, train_tokenizer
from neox.errors import ConfigError, DiskError, StoppedBySignal
from neox.generate.sampling import SamplingParams
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from tests.generate.checkpoints import save_model
from tests.generate.sentencepiece import write_tokenizer

SIZES = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 99, "init_std": 0.3}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of a small random model, whose tokenizer has a second special token."""
    root = tmp_path_factory.mktemp("options")
    tokenizer = train_tokenizer(["the quick brown fox"] * 9, 290, root / "tokenizer.json", special_tokens=["<end>"])
    model = GPT(ModelConfig(vocab_size=tokenizer.vocab_size, **SIZES), Mesh.single())
    save_model(root / "run", model, tokenizer=str(root / "tokenizer.json"))
    return root / "run"


@pytest.fixture
def told(monkeypatch):
    """What a fake model receives; it answers each prompt with the tokens of " fox" and of its number."""
    seen = SimpleNamespace(calls=[], loaded=[])

    def generate(model, prompts, params, **options):
        options["on_token"](0, 1)
        seen.calls.append((prompts, params, options))
        return [[5, 6]] * len(prompts)

    def load_model(path, **options):
        seen.loaded.append((path, options))
        return "model"

    monkeypatch.setattr(cli, "generate", generate)
    monkeypatch.setattr(cli, "load_model", load_model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return seen


def call(*arguments: object) -> int:
    return main(["generate", *map(str, arguments)])


def test_options_reach_the_sampling_and_the_model(run_folder, told, capsys):
    sampling = ["--max-new-tokens", 7, "--temperature", 0.5, "--top-k", 3, "--top-p", 0.25, "--seed", 11]
    assert (
        call("--checkpoint", run_folder, "--prompt", "fox", *sampling, "--dtype", "bf16", "--no-cache", "--json") == 0
    )
    ((prompts, params, options),) = told.calls
    tokenizer = Tokenizer(run_folder.parent / "tokenizer.json")
    assert prompts == [tokenizer.encode("fox")] and params == SamplingParams(7, 0.5, 3, 0.25, 11)
    assert (options["use_cache"], options["eod_id"], options["is_done"]) == (False, tokenizer.end_ids, None)
    assert list(options["streams"]) == [0] and json.loads(capsys.readouterr().out)[0]["tokens"] == [5, 6]
    ((path, loaded),) = told.loaded
    assert path.name == "step_00000001" and loaded["dtype"] == torch.bfloat16
    assert loaded["mesh"] == Mesh.single("cpu")


def test_the_defaults_are_those_of_the_help(run_folder, told):
    prompts = [word for name in "abcdefghi" for word in ("--prompt", name)]
    assert call("--checkpoint", run_folder, *prompts) == 0
    assert [len(batch) for batch, *_ in told.calls] == [8, 1]
    _, params, options = told.calls[1]
    assert params == SamplingParams(64, 1.0, None, None, 1234) and options["use_cache"] is True
    assert list(options["streams"]) == [8] and told.loaded[0][1]["dtype"] == torch.float32


def test_prompts_of_the_command_line_precede_those_of_the_file(run_folder, told, tmp_path, capsys):
    (tmp_path / "more.txt").write_bytes("c 東\r\n\n d \n".encode())
    words = ["--prompt", "a", "--prompt", "b", "--prompt-file", tmp_path / "more.txt"]
    out = tmp_path / "out.jsonl"
    assert call("--checkpoint", run_folder, *words, "--jsonl", "--out", out, "--batch-size", 3) == 0
    lines = out.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["a", "b", "c 東", " d "]
    assert '"c 東"' in lines[2] and capsys.readouterr().out == ""
    assert [(len(batch), list(options["streams"])) for batch, _, options in told.calls] == [(3, [0, 1, 2]), (1, [3])]
    text = Tokenizer(run_folder.parent / "tokenizer.json").decode([5, 6])
    assert call("--checkpoint", run_folder, *words) == 0
    assert capsys.readouterr().out == "".join(f"--- {prompt}{text}\n" for prompt in ("a", "b", "c 東", " d "))


def test_an_existing_file_is_replaced_on_request_only(run_folder, told, tmp_path, capsys):
    out = tmp_path / "mine.yml"
    out.write_text("run: {dir: runs/mine}")
    words = ["--checkpoint", run_folder, "--prompt", "a", "--out", out]
    assert call(*words) == 2 and out.read_text() == "run: {dir: runs/mine}" and not told.loaded
    assert f"file already exists; where=--out {out}; do=choose another --out, or pass" in capsys.readouterr().err
    assert call(*words, "--overwrite") == 0 and out.read_text().startswith("a")
    out.write_text("")  # as mktemp leaves it
    assert call(*words) == 0 and out.read_text().startswith("a")
    assert call("--checkpoint", run_folder, "--prompt", "a", "--out", "/dev/null") == 0
    assert call(*words[:4], "--overwrite") == 2 and "option has no effect; where=--overwrite" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_found_before_the_model_is_loaded(run_folder, told, tmp_path, capsys):
    words = ["--checkpoint", run_folder, "--prompt", "a", "--out"]
    assert call(*words, tmp_path / "none" / "x.txt") == 5 and not told.loaded
    assert f"where={tmp_path}/none/x.txt; got={tmp_path}/none does not exist; do=choose" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:  # root may write everywhere
        patch.setattr(os, "access", lambda path, mode: not (mode == os.W_OK and path == tmp_path))
        assert call(*words, tmp_path / "x.txt") == 5 and not told.loaded
    assert f"got={tmp_path} cannot be written; do=choose" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prompts.jsonl", "a.JSON", "x.ndjson"])
def test_prompts_in_json_are_refused(run_folder, told, tmp_path, capsys, name):
    (tmp_path / name).write_text('{"prompt": "hello"}\n')
    assert call("--checkpoint", run_folder, "--prompt-file", tmp_path / name) == 2 and not told.loaded
    error = capsys.readouterr().err
    assert f"the prompts are JSON; where=--prompt-file {tmp_path / name}" in error and "do=write the prompts" in error
    (tmp_path / "code.txt").write_text('{"a": 1}\n')  # a prompt for a model of code
    (tmp_path / name).write_text("plain\n")
    for file in ("code.txt", name):
        assert call("--checkpoint", run_folder, "--prompt-file", tmp_path / file) == 0


def test_a_line_feed_among_the_stops_is_written_as_n(run_folder, told, capsys):
    assert call("--checkpoint", run_folder, "--prompt", "a", "--stop", "\\n\\n", "--stop", "x") == 0
    is_done = told.calls[0][2]["is_done"]
    tokenizer = Tokenizer(run_folder.parent / "tokenizer.json")
    for text, ends in (("\n", False), ("\n\n", True), ("ax", True), ("n", False), ("\\n\\n", False)):
        assert is_done(0, tokenizer.encode(text)) is ends


def test_ids_that_end_a_text_and_the_name_of_the_end(run_folder, tmp_path):
    """Of the run's config, also with a tokenizer of the command line; ids as many as the model has are accepted."""
    file = run_folder.parent / "tokenizer.json"
    model = GPT(ModelConfig(vocab_size=Tokenizer(file).vocab_size, **SIZES), Mesh.single())
    path = save_model(tmp_path / "run", model, tokenizer=str(file))
    assert cli.run_tokenizer(path, None).end_ids == Tokenizer(file).end_ids
    assert cli.run_tokenizer(path, str(file)).vocab_size == model.config.vocab_size
    config = {"model": {"vocab_size": 1000}, "tokenizer": {"file": str(file), "eod_token": "<end>"}}
    config["tokenizer"]["special_ids"] = {"eos": [5, 7]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "Checkpoint", lambda path: SimpleNamespace(config_lock=json.dumps(config), state={}))
        of_run, given = cli.run_tokenizer(path, None), cli.run_tokenizer(path, str(file))
        assert of_run.eod_id == Tokenizer(file).token_id("<end>") and of_run.end_ids == {of_run.eod_id, 5, 7}
        assert given.eod_id == 0 and given.end_ids == {0, 5, 7}
        config["model"]["vocab_size"] = given.vocab_size - 1
        with pytest.raises(ConfigError, match=f"got={given.vocab_size}; want=at most {given.vocab_size - 1}; do=pass"):
            cli.run_tokenizer(path, str(file))
        config["tokenizer"] = {}
        with pytest.raises(ConfigError, match="the run has no tokenizer; where=.*: tokenizer.file; do=pass"):
            cli.run_tokenizer(path, None)


def test_another_tokenizer_than_that_of_the_training_data_is_reported(run_folder, tmp_path, capsys, monkeypatch):
    file = run_folder.parent / "tokenizer.json"
    other = train_tokenizer(["other words"] * 9, 270, tmp_path / "other.json").file
    config = json.dumps({"model": {"vocab_size": 1000}, "tokenizer": {"file": str(file)}})
    state = {"data": {"settings": {"tokenizer.file": Tokenizer(file).hash}}}
    monkeypatch.setattr(cli, "Checkpoint", lambda path: SimpleNamespace(config_lock=config, state=state))
    cli.run_tokenizer(tmp_path, None), cli.run_tokenizer(tmp_path, str(file))
    assert capsys.readouterr().err == ""
    cli.run_tokenizer(tmp_path, str(other))
    assert capsys.readouterr().err == (
        f"note: {other} is not the tokenizer of the training data: its ids may mean other tokens\n"
    )
    monkeypatch.setenv("RANK", "1")  # one of several processes reports it
    cli.run_tokenizer(tmp_path, str(other))
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("RANK")
    for unknown in ({}, {"data": None}, {"data": {"settings": {"tokenizer.file": None}}}):
        state.clear(), state.update(unknown)
        cli.run_tokenizer(tmp_path, str(other))
    assert capsys.readouterr().err == ""


def test_the_tokens_before_a_text_without_a_prompt(tmp_path, run_folder):
    llama, ours = Tokenizer(write_tokenizer(tmp_path)), Tokenizer(run_folder.parent / "tokenizer.json")
    assert cli.first_tokens(llama) == [1] and cli.first_tokens(ours) == [ours.eod_id]
    assert cli.first_tokens(llama, bos=False) == [llama.eod_id] == [2]
    with pytest.raises(ConfigError, match="no start token; where=a.json; want=an end-of-document token"):
        cli.first_tokens(SimpleNamespace(template_tokens=([], []), eod_id=None, file="a.json"))


def writer(signals, *options: str) -> cli.Writer:
    """A writer with the options of a command line, whose texts are written into `out`."""
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    args = parser.parse_args(["--checkpoint", "x", "--batch-size", "1", *options])
    tokenizer = SimpleNamespace(template_tokens=([], []), end_ids={0}, decode=lambda tokens, **_: "t" * len(tokens))
    return cli.Writer(args, ("model", tokenizer, SamplingParams()), io.StringIO(), signals)


ROWS = [json.dumps({"prompt": name, "text": "tt", "tokens": [5, 6]}) for name in "ab"]


@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        (
            "--json",
            '[{"prompt": "a", "text": "tt", "tokens": [5, 6]}, {"prompt": "b", "text": "tt", "tokens": [5, 6]}]\n',
        ),
        (
            "--jsonl",
            '{"prompt": "a", "text": "tt", "tokens": [5, 6]}\n{"prompt": "b", "text": "tt", "tokens": [5, 6]}\n',
        ),
        ("--stop=@", "--- att\n--- btt\n"),
    ],
)
def test_a_signal_ends_it_after_the_finished_texts(monkeypatch, option, wanted):
    signals = SimpleNamespace(received=None)
    made = writer(signals, option)
    calls = []

    def generate(model, prompts, params, *, on_token, **options):
        calls.append(prompts)
        on_token(0, 5)
        if len(calls) == 3:
            signals.received = signal.SIGTERM
        on_token(0, 6)
        return [[5, 6]]

    monkeypatch.setattr(cli, "generate", generate)
    with pytest.raises(StoppedBySignal) as caught:
        made.write(["a", "b", "c", "d"], [[1]] * 4)
    assert made.out.getvalue() == wanted and caught.value.exit_code == 10 and len(calls) == 3
    assert caught.value.where == "standard output" and caught.value.got == "SIGTERM; 2 of 4 texts are written"


def test_a_streamed_text_ends_its_line_after_a_signal(monkeypatch):
    signals = SimpleNamespace(received=None)
    made = writer(signals, "--out", "answers.txt")

    def generate(model, prompts, params, *, on_token, **options):
        on_token(0, 5)
        signals.received = signal.SIGINT
        on_token(0, 6)

    monkeypatch.setattr(cli, "generate", generate)
    with pytest.raises(StoppedBySignal, match="where=answers.txt; got=SIGINT; 0 of 1 texts are written"):
        made.write(["a"], [[1]])
    assert made.out.getvalue() == "att\n"


def test_other_processes_write_nothing(run_folder, told, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "join_layout", lambda args, config: replace(Mesh.single("cpu"), rank=1, tp=2))
    assert call("--checkpoint", run_folder, "--prompt", "a", "--json", "--out", tmp_path / "x") == 0
    assert not (tmp_path / "x").exists() and capsys.readouterr().out == "" and len(told.calls) == 1
    assert call("--checkpoint", run_folder, "--interactive") == 2
    want = (
        "error[2] a dialogue runs on one process; where=--interactive, --tensor, --pipeline; got=2 processes; want=one"
    )
    assert capsys.readouterr().err.startswith(want)


def test_a_signal_while_processes_join_ends_the_process(monkeypatch, capsys):
    class Signals:
        actions: list

        def __init__(self):
            self.actions = []

        def end_at_once(self, action):
            self.actions.append(action)

    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    args, signals = argparse.Namespace(tensor=2, pipeline=1), Signals()
    monkeypatch.setattr(cli, "join_layout", lambda args, config: signals.actions[-1](signal.SIGUSR1) or "mesh")
    assert cli.join_or_stop(args, None, signals) == "mesh"
    assert ended == [10] and signals.actions[1:] == [None]
    assert capsys.readouterr().err == (
        "error[10] stopped by a signal before all processes joined; where=neox generate; got=SIGUSR1; do=start again\n"
    )
    monkeypatch.setattr(cli, "join_layout", lambda args, config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.join_or_stop(argparse.Namespace(tensor=1, pipeline=2), None, signals)
    assert len(signals.actions) == 4 and signals.actions[3] is None
    monkeypatch.setattr(cli, "join_layout", lambda args, config: "alone")
    assert cli.join_or_stop(argparse.Namespace(tensor=1, pipeline=1), None, signals) == "alone"
    assert cli.join_or_stop(args, None, None) == "alone" and len(signals.actions) == 4


class Talk:
    """A session that answers in capitals."""

    def __init__(self):
        self.heard = []

    def respond(self, text, write):
        self.heard.append(text)
        write(text.strip().upper())

    def reset(self):
        self.heard.append(None)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_dialogue_reads_lines_until_quit(monkeypatch, capsys, terminal):
    typed = io.StringIO("one\n\n /reset \ntwo\n  /quit\nthree\n")
    typed.isatty = lambda: terminal
    monkeypatch.setattr("sys.stdin", typed)
    talk = Talk()
    assert cli.converse(talk) == 0
    assert talk.heard == ["one\n", "\n", None, "two\n"]
    prompt = "> " if terminal else ""
    assert capsys.readouterr().out == f"{prompt}ONE\n{prompt}\n{prompt}{prompt}TWO\n{prompt}"
    monkeypatch.setattr("sys.stdin", io.StringIO("last"))
    assert cli.converse(talk) == 0 and talk.heard[-1] == "last"


def test_a_dialogue_has_the_options_of_the_command(run_folder, told, monkeypatch):
    made = []
    monkeypatch.setattr(cli, "converse", lambda session: made.append(session) or 3)
    options = ["--stop", "\\n", "--no-bos", "--seed", 4, "--max-new-tokens", 5]
    assert call("--checkpoint", run_folder, "--interactive", *options) == 3
    (session,) = made
    assert (session.model, session.stops, session.first) == ("model", ["\n"], [])
    assert session.params == SamplingParams(5, 1.0, None, None, 4)


def test_an_output_file_that_fails_later_is_named(tmp_path):
    with (
        pytest.raises(DiskError, match="where=.*/f; got=r; do=choose another --out"),
        cli.open_output(str(tmp_path / "f")),
    ):
        raise OSError(5, "r")
    with pytest.raises(KeyError), cli.open_output(str(tmp_path / "f")) as file:
        file.write("東")
        raise KeyError
    assert (tmp_path / "f").read_bytes() == "東".encode()


@pytest.mark.parametrize(
    ("content", "got"), [(b"a\n\xff\n", "'utf-8' codec can't decode byte 0xff"), (None, "a folder, not a regular file")]
)
def test_a_prompt_file_that_cannot_be_read_is_named(run_folder, tmp_path, capsys, content, got):
    path = tmp_path / "prompts"
    path.mkdir() if content is None else path.write_bytes(content)
    assert call("--checkpoint", run_folder, "--prompt-file", path) == 2
    assert f"error[2] cannot read the prompts; where={path}; got={got}" in capsys.readouterr().err
    (tmp_path / "empty").write_text("\n\n")
    assert call("--checkpoint", run_folder, "--prompt-file", tmp_path / "empty") == 2
    assert "error[2] no prompt" in capsys.readouterr().err
