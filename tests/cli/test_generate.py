"""`neox generate`: what it prints, from which tokenizer, and what a wrong command line gets."""

from __future__ import annotations

import io
import json
import re
import signal
import socket

import pytest

from neox.cli.main import main
from neox.config.schema import ModelConfig
from neox.data.text.tokenizer import Tokenizer, train_tokenizer
from neox.errors import DataError
from neox.generate.generate import generate, load_model
from neox.generate.sampling import SamplingParams
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from tests.fork_server import fork_server, free_port
from tests.generate.checkpoints import save_model
from tests.generate.sentencepiece import write_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog, naïve café, 東京 " * 40


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run with a small random model and a tokenizer of its own."""
    root = tmp_path_factory.mktemp("generate")
    train_tokenizer([TEXT], 300, root / "tokenizer.json")
    vocab_size = Tokenizer(root / "tokenizer.json").vocab_size
    model = GPT(
        ModelConfig(
            num_layers=2,
            hidden_size=32,
            num_attention_heads=2,
            vocab_size=vocab_size,
            max_position_embeddings=64,
            init_std=0.3,
        ),
        Mesh.single(),
    )
    save_model(root / "run", model, tokenizer=str(root / "tokenizer.json"))
    return root / "run"


def call(*arguments: object) -> int:
    return main(["generate", *map(str, arguments)])


def test_json_holds_prompt_text_and_tokens(run_folder, capsys):
    assert (
        call(
            "--checkpoint",
            run_folder,
            "--prompt",
            "the fox",
            "--prompt",
            "café",
            "--max-new-tokens",
            9,
            "--temperature",
            0,
            "--json",
        )
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    tokenizer = Tokenizer(run_folder.parent / "tokenizer.json")
    prompts = [tokenizer.encode("the fox"), tokenizer.encode("café")]
    expected = generate(load_model(run_folder), prompts, SamplingParams(9, 0), eod_id=tokenizer.eod_id)
    assert [entry["tokens"] for entry in report] == expected
    assert [entry["prompt"] for entry in report] == ["the fox", "café"]
    assert [entry["text"] for entry in report] == [tokenizer.decode(tokens) for tokens in expected]


def test_one_prompt_is_streamed_and_equals_the_full_text(run_folder, capsys):
    options = ["--checkpoint", run_folder, "--prompt", "東京", "--max-new-tokens", 25, "--seed", 5]
    assert call(*options, "--json") == 0
    expected = json.loads(capsys.readouterr().out)[0]["text"]
    assert call(*options) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("東京" + expected.rstrip("\ufffd"))


def test_prompts_from_a_file(run_folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("the\n\nfox\n", encoding="utf-8")
    assert (
        call(
            "--checkpoint",
            run_folder,
            "--prompt-file",
            tmp_path / "prompts.txt",
            "--max-new-tokens",
            3,
            "--temperature",
            0,
        )
        == 0
    )
    lines = capsys.readouterr().out
    assert lines.count("--- the") == 1 and lines.count("--- fox") == 1


def test_lines_of_a_prompt_file_end_in_newlines_alone(run_folder, tmp_path, capsys):
    lines = ["first\u2028on", "second\x0con", "third\x85on", "fourth\x1con", "fifth\ron"]
    (tmp_path / "prompts.txt").write_bytes("\n".join(lines).encode() + b"\r\n\nlast\r\n")
    assert (
        call("--checkpoint", run_folder, "--prompt-file", tmp_path / "prompts.txt", "--max-new-tokens", 1, "--jsonl")
        == 0
    )
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.rstrip("\n").split("\n")] == [*lines, "last"]


def test_a_prompt_beyond_the_positions_is_refused_before_the_model_is_loaded(run_folder, capsys, monkeypatch):
    monkeypatch.setattr("neox.cli.generate.load_model", None)
    assert (
        call(
            "--checkpoint", run_folder, "--prompt", "the", "--prompt", "the fox " * 40, "--max-new-tokens", 9, "--jsonl"
        )
        == 2
    )
    printed = capsys.readouterr()
    assert not printed.out and "where=prompt 1; got=" in printed.err and printed.err.count("\n") == 1


@pytest.fixture(scope="module")
def llama_run(tmp_path_factory):
    """A run whose tokenizer puts <s> before a text and drops a text's first space when it decodes."""
    root = tmp_path_factory.mktemp("llama")
    vocab_size = Tokenizer(write_tokenizer(root)).vocab_size
    sizes = {
        "num_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "init_std": 0.3,
    }
    save_model(
        root / "run",
        GPT(ModelConfig(vocab_size=vocab_size, **sizes), Mesh.single()),
        tokenizer=str(root / "tokenizer.json"),
    )
    return root / "run"


def test_prompts_get_the_tokens_that_the_tokenizer_puts_before_a_text(llama_run, capsys, monkeypatch):
    tokenizer, model = Tokenizer(llama_run.parent / "tokenizer.json"), load_model(llama_run)
    for options, first in (([], [1]), (["--no-bos"], [])):
        expected = generate(model, [first + tokenizer.encode("river stone")], SamplingParams(8, 0), eod_id=2)[0]
        arguments = ["--checkpoint", llama_run, "--max-new-tokens", 8, "--temperature", 0, *options]
        assert call(*arguments, "--prompt", "river stone", "--json") == 0
        entry = json.loads(capsys.readouterr().out)[0]
        assert entry["tokens"] == expected
        assert entry["prompt"] + entry["text"] == tokenizer.decode(tokenizer.encode("river stone") + expected)
        assert call(*arguments, "--prompt", "river stone") == 0
        assert capsys.readouterr().out.startswith(entry["prompt"])
        monkeypatch.setattr("sys.stdin", io.StringIO("river stone"))
        assert call(*arguments, "--interactive") == 0
        assert capsys.readouterr().out.rstrip("\n")[-1:] == entry["text"][-1:]


def test_stop_texts_begin_with_the_space_that_follows_the_prompt(llama_run, capsys):
    arguments = [
        "--checkpoint",
        llama_run,
        "--prompt",
        "river stone",
        "--max-new-tokens",
        8,
        "--temperature",
        0,
        "--json",
    ]
    assert call(*arguments) == 0
    whole = json.loads(capsys.readouterr().out)[0]["text"]
    stop = whole[:3]
    assert call(*arguments, "--stop", stop) == 0
    assert json.loads(capsys.readouterr().out)[0]["text"] == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "no prompt; where=neox generate; want=--prompt TEXT, --prompt-file FILE, --unconditional N or "
            "--interactive",
        ),
        (["--prompt", "a", "--temperature", "-1"], "sampling parameter out of range; where=temperature"),
        (["--prompt", "a", "--batch-size", "0"], "option out of range; where=--batch-size; got=0; want=at least 1"),
        (["--unconditional", "0"], "option out of range; where=--unconditional; got=0; want=at least 1"),
        (["--unconditional", "-1"], "option out of range; where=--unconditional; got=-1; want=at least 1"),
        (["--prompt", "a", "--unconditional", "1"], "conflicting options.*exactly one of"),
        (["--prompt", "a", "--tokenizer", "nowhere.json"], r"nowhere\.json"),
        (
            ["--prompt-file", "nowhere.txt"],
            "cannot read the prompts; where=nowhere.txt; got=No such file or directory;",
        ),
        (["--prompt", ""], "empty prompt"),
        (["--prompt", "a", "--device", "abacus"], "device cannot be used; where=--device; got=abacus"),
        (["--prompt", "a", "--device", "meta"], "device cannot be used; where=--device; got=meta"),
    ],
)
def test_wrong_options_get_one_line(run_folder, capsys, arguments, message):
    assert call("--checkpoint", run_folder, *arguments) != 0
    printed, error = capsys.readouterr()
    assert printed == ""
    assert error.startswith("error[") and error.count("\n") == 1
    assert re.search(message, error)


def test_a_missing_checkpoint(tmp_path, capsys):
    assert call("--checkpoint", tmp_path / "nowhere", "--prompt", "a") == 4
    assert "no checkpoint found" in capsys.readouterr().err


def test_a_tokenizer_that_moved_is_named(run_folder, tmp_path, capsys):
    model = load_model(run_folder)
    save_model(tmp_path / "run", model, tokenizer=str(tmp_path / "missing.json"))
    assert call("--checkpoint", tmp_path / "run", "--prompt", "a") == 2
    assert (
        "missing.json; do=start in the working folder of the run, or pass --tokenizer FILE" in capsys.readouterr().err
    )


def test_json_lines_in_any_batch_size_to_a_file(run_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("the\nfox\nlazy dog\n", encoding="utf-8")
    options = ["--checkpoint", run_folder, "--prompt-file", tmp_path / "prompts.txt", "--max-new-tokens", 6, "--jsonl"]
    for size in (1, 2, 3):
        assert call(*options, "--batch-size", size, "--out", tmp_path / f"{size}.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "1.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == ["the", "fox", "lazy dog"]
    assert (
        (tmp_path / "1.jsonl").read_text() == (tmp_path / "2.jsonl").read_text() == (tmp_path / "3.jsonl").read_text()
    )
    assert call(*options, "--out", tmp_path / "nowhere" / "x") == 5


def test_unconditional_texts_begin_after_the_end_of_document(run_folder, capsys):
    assert call("--checkpoint", run_folder, "--unconditional", 3, "--max-new-tokens", 5, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    tokenizer = Tokenizer(run_folder.parent / "tokenizer.json")
    expected = generate(load_model(run_folder), [[tokenizer.eod_id]] * 3, SamplingParams(5), eod_id=tokenizer.eod_id)
    assert [row["tokens"] for row in rows] == expected
    assert len({row["text"] for row in rows}) > 1


def test_a_stop_text_ends_before_it(run_folder, capsys):
    options = ["--checkpoint", run_folder, "--prompt", "the", "--max-new-tokens", 30, "--temperature", 0]
    assert call(*options, "--json") == 0
    whole = json.loads(capsys.readouterr().out)[0]["text"]
    stop = whole[len(whole) // 2]
    assert call(*options, "--stop", stop, "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["text"] == whole.split(stop)[0]
    assert call(*options, "--stop", stop) == 0
    assert capsys.readouterr().out == f"the{whole.split(stop)[0]}\n"


def test_a_dialogue_remembers_and_forgets(run_folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the fox\nthe fox\n/reset\nthe fox\n/quit\nnever read\n"))
    assert call("--checkpoint", run_folder, "--interactive", "--max-new-tokens", 8, "--temperature", 0) == 0
    text = capsys.readouterr().out
    tokenizer = Tokenizer(run_folder.parent / "tokenizer.json")
    first = generate(
        load_model(run_folder), [tokenizer.encode("the fox\n")], SamplingParams(8, 0), eod_id=tokenizer.eod_id
    )[0]
    second = generate(
        load_model(run_folder),
        [tokenizer.encode("the fox\n") + first + tokenizer.encode("the fox\n")],
        SamplingParams(8, 0),
        eod_id=tokenizer.eod_id,
    )[0]
    answers = [tokenizer.decode(tokens) for tokens in (first, second, first)]
    assert text == "".join(f"{answer}\n" for answer in answers)


@pytest.mark.parametrize("option", [["--json"], ["--jsonl"], ["--out", "answers.txt"]])
def test_options_without_effect_on_a_dialogue_are_refused(run_folder, capsys, option):
    assert call("--checkpoint", run_folder, "--interactive", *option) == 2
    assert f"option does not apply to a dialogue; where={option[0]}" in capsys.readouterr().err
    assert call("--checkpoint", run_folder, "--prompt", "a", "--json", "--jsonl") == 2
    assert "want=--json or --jsonl" in capsys.readouterr().err


def test_text_that_is_not_utf8_is_refused(run_folder, capsys, monkeypatch):
    typed = io.TextIOWrapper(io.BytesIO(b"the fox\n\xff\xfe\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", typed)
    assert call("--checkpoint", run_folder, "--interactive", "--max-new-tokens", 2) == 2
    assert "error[2] input is not UTF-8; where=standard input; got=byte 0xff" in capsys.readouterr().err
    assert call("--checkpoint", run_folder, "--prompt", "a\udcff") == 2
    assert r"error[2] prompt is not UTF-8; where=--prompt; got=a\xff" in capsys.readouterr().err


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(run_folder, tmp_path, capsys):
    train_tokenizer([TEXT, "and more words of another corpus " * 9], 330, tmp_path / "other.json")
    assert call("--checkpoint", run_folder, "--prompt", "a", "--tokenizer", tmp_path / "other.json") == 2
    assert "tokenizer ids exceed the vocabulary of the model; where=--tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("prompts", [["--prompt", "a"], ["--prompt", "a", "--prompt", "b", "--jsonl"]])
def test_a_full_disk_under_the_output_file_is_named(run_folder, capsys, prompts):
    assert call("--checkpoint", run_folder, *prompts, "--max-new-tokens", 3, "--out", "/dev/full") == 5
    assert capsys.readouterr().err == (
        "error[5] cannot write the texts; where=/dev/full; got=No space left on device; do=choose another --out\n"
    )


def test_one_kind_of_prompt(run_folder, capsys):
    assert call("--checkpoint", run_folder, "--prompt", "a", "--interactive") == 2
    assert call("--checkpoint", run_folder, "--unconditional", 0) == 2
    assert "exactly one of" in capsys.readouterr().err


def test_a_list_cut_short_by_an_error_is_not_printed(run_folder, capsys, monkeypatch):
    def fail_at_the_second(model, batch, *args, streams, **options):
        if 1 in streams:
            raise DataError("an error halfway")
        return generate(model, batch, *args, streams=streams, **options)

    monkeypatch.setattr("neox.cli.generate.generate", fail_at_the_second)
    assert (
        call(
            "--checkpoint",
            run_folder,
            "--prompt",
            "fox",
            "--prompt",
            "fox",
            "--batch-size",
            1,
            "--max-new-tokens",
            3,
            "--json",
        )
        == 3
    )
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error[3]")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_it_after_the_texts_that_are_finished(run_folder, tmp_path, number):
    asked = 4000
    options = [
        "--checkpoint",
        run_folder,
        "--unconditional",
        asked,
        "--max-new-tokens",
        40,
        "--temperature",
        1.5,
        "--batch-size",
        1,
    ]
    out = tmp_path / "texts.jsonl"
    running = fork_server().command(["generate", *options, "--jsonl", "--out", out], tmp_path)
    running.wait_for(lambda: out.exists() and out.read_text().count("\n") >= 3)
    running.signal(number)
    assert running.wait() == [10], running.output()
    rows = [json.loads(line) for line in out.read_text().splitlines()]  # complete lines only
    assert 3 <= len(rows) < asked
    assert (
        f"error[10] generation stopped by a signal; where={out}; got={number.name}; {len(rows)} of {asked} texts are "
        f"written" in running.output()
    )
    listed = tmp_path / "texts.json"
    running = fork_server().command(["generate", *options, "--json", "--out", listed], tmp_path)
    running.wait_for(listed.exists)
    running.signal(number)
    assert running.wait() == [10], running.output()
    again = json.loads(listed.read_text())
    assert len(again) < asked and all(a == b for a, b in zip(again, rows, strict=False))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_ends_a_process_that_waits_for_its_peers(run_folder, tmp_path, rank):
    """One of two processes is started; the other one never joins."""
    with socket.create_server(("127.0.0.1", 0)) as listener:  # in the position of a rank 0 that does not answer
        port = listener.getsockname()[1] if rank else free_port()
        listener.setblocking(False)

        def is_waiting() -> bool:
            try:
                connection = listener.accept()[0] if rank else socket.create_connection(("127.0.0.1", port))
            except OSError:
                return False
            connections.append(connection)
            return True

        connections: list[socket.socket] = []
        launcher = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "LOCAL_WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        command = [
            "generate",
            "--checkpoint",
            str(run_folder),
            "--prompt",
            "the fox",
            "--max-new-tokens",
            "4",
            "--tensor",
            "2",
        ]
        running = fork_server().fork(
            {"argv": command}, tmp_path, 1, {name: str(value) for name, value in launcher.items()}
        )
        running.wait_for(is_waiting)
        running.signal(signal.SIGTERM)
        assert running.wait(30) == [10], running.output()
    assert (
        "error[10] stopped by a signal before all processes joined; where=neox generate; got=SIGTERM"
        in running.output()
    )
