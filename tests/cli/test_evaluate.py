"""`neox evaluate`: the figures it prints are those of neox.evaluate, and what a wrong command line gets."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch

from neox.cli import evaluate as cli
from neox.cli.main import main
from neox.config.schema import ModelConfig
from neox.data.store.indexed import IndexedDataset, IndexedWriter
from neox.data.text.tokenizer import Tokenizer, train_tokenizer
from neox.evaluate.perplexity import Perplexity, evaluate
from neox.generate.generate import load_model
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from tests.generate.checkpoints import save_model

DOCUMENTS = ["the quick brown fox", "jumps over the lazy dog", "naïve café"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """run/ with a small random model, and the dataset `text`."""
    root = tmp_path_factory.mktemp("evaluate")
    train_tokenizer(DOCUMENTS * 30, 300, root / "tokenizer.json")
    tokenizer = Tokenizer(root / "tokenizer.json")
    model = GPT(
        ModelConfig(
            num_layers=1,
            hidden_size=32,
            num_attention_heads=2,
            vocab_size=tokenizer.vocab_size,
            max_position_embeddings=64,
        ),
        Mesh.single(),
    )
    save_model(root / "run", model, tokenizer=str(root / "tokenizer.json"))
    with IndexedWriter(root / "text", "uint16") as writer:
        for document in DOCUMENTS:
            writer.add_document([*tokenizer.encode(document), tokenizer.eod_id])
    return root


def call(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


def test_json_and_text_agree_with_the_function(place, capsys):
    assert call("--checkpoint", place / "run", "--data", place / "text", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    tokenizer = Tokenizer(place / "tokenizer.json")
    expected = evaluate(load_model(place / "run"), IndexedDataset(place / "text"), seq_length=32, tokenizer=tokenizer)
    assert report["loss"] == expected.loss and report["bits_per_byte"] == expected.bits_per_byte
    assert report["documents"] == 3 and report["bytes"] == sum(len(document.encode()) for document in DOCUMENTS)
    assert call("--checkpoint", place / "run", "--data", place / "text") == 0
    printed = capsys.readouterr().out
    assert f"loss {expected.loss:.4f}" in printed and f"bits per byte {expected.bits_per_byte:.4f}" in printed


def test_no_task_and_few_shots_below_zero_are_refused(place, capsys):
    assert call("--checkpoint", place / "run", "--tasks", " , ") == 2
    assert "error[2] no task; where=--tasks" in capsys.readouterr().err
    assert call("--checkpoint", place / "run", "--tasks", "a", "--num-fewshot", -1) == 2
    assert "option out of range; where=--num-fewshot; got=-1; want=at least 0" in capsys.readouterr().err


def test_documents_without_text_have_no_bits_per_byte(place, tmp_path, capsys):
    with IndexedWriter(tmp_path / "d", "uint16") as writer:
        writer.add_document([Tokenizer(place / "tokenizer.json").eod_id] * 3)
    assert call("--checkpoint", place / "run", "--data", tmp_path / "d") == 0
    printed = capsys.readouterr().out
    assert "perplexity" in printed and "0 bytes" in printed and "bits per byte" not in printed


def test_either_data_or_tasks(place, capsys):
    assert call("--checkpoint", place / "run") == 2
    assert "specify either data or tasks; where=neox evaluate; got=neither" in capsys.readouterr().err
    assert call("--checkpoint", place / "run", "--data", place / "text", "--tasks", "lambada_openai") == 2
    assert "got=both" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--seq-length", "--batch-size", "--max-documents", "--limit"])
def test_counts_below_one_are_refused(place, capsys, option):
    for value in (0, -1):
        assert call("--checkpoint", place / "run", "--data", place / "text", option, value) == 2
        assert f"option out of range; where={option}; got={value}" in capsys.readouterr().err


def test_a_missing_device_is_named(place, capsys):
    assert call("--checkpoint", place / "run", "--data", place / "text", "--device", "abacus") == 2
    assert capsys.readouterr().err.startswith("error[2] device cannot be used; where=--device; got=abacus")


def test_missing_data_is_named(place, capsys):
    assert call("--checkpoint", place / "run", "--data", place / "nothing") == 3
    assert "nothing" in capsys.readouterr().err


def test_data_of_another_tokenizer_are_refused(place, tmp_path, capsys):
    for name, made_by, code in (("ours", Tokenizer(place / "tokenizer.json").hash, 0), ("other", "0" * 64, 3)):
        with IndexedWriter(tmp_path / name, "uint16", tokenizer_hash=made_by) as writer:
            writer.add_document([1, 2, 3, 0])
        assert call("--checkpoint", place / "run", "--data", tmp_path / name) == code
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("error[3] dataset was built with a different tokenizer; where=")
    )


TASK = """
task: local_pairs
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/pairs.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{{{[good, bad]}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def test_tasks_of_the_harness(place, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (the extra eval)")
    (tmp_path / "pairs.jsonl").write_text(
        "\n".join(json.dumps({"good": text, "bad": text[::-1]}) for text in DOCUMENTS)
    )
    (tmp_path / "pairs.yaml").write_text(TASK.format(folder=tmp_path))
    assert call("--checkpoint", place / "run", "--tasks", "local_pairs", "--task-files", tmp_path, "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["n-samples"]["local_pairs"]["effective"] == 3
    assert call("--checkpoint", place / "run", "--tasks", "local_pairs", "--task-files", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split()[:3] == ["local_pairs", "acc", f"{found['results']['local_pairs']['acc,none']:.4f}"]
    assert lines[-1].split()[-1] == "3"


def test_data_or_tasks(place, capsys):
    assert call("--checkpoint", place / "run") == 2
    assert call("--checkpoint", place / "run", "--data", place / "text", "--tasks", "x") == 2
    assert "--data PREFIX and --tasks A,B" in capsys.readouterr().err
    assert call("--checkpoint", place / "run", "--tasks", "x", "--task-files", place / "none") == 2
    assert "error[2] no such folder; where=--task-files" in capsys.readouterr().err


@pytest.fixture
def told(monkeypatch):
    """What the functions that the command calls receive."""
    calls = {}

    def note(name, result):
        def function(*arguments, **options):
            calls[name] = (arguments, options)
            return result

        monkeypatch.setattr(cli, name, function)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    note("load_model", "model")
    note("evaluate", Perplexity(1.25, 3.490343, None, 1000, None, 1))
    note("run_tasks", {"results": {"t": {"acc,none": 0.5}}, "other": torch.float32})
    return calls


def test_options_reach_the_evaluation(place, told, capsys):
    options = ["--seq-length", 7, "--batch-size", 3, "--max-documents", 2, "--dtype", "bf16"]
    assert call("--checkpoint", place / "run", "--data", place / "text", *options) == 0
    (model, dataset), found = told["evaluate"]
    assert (model, dataset.prefix) == ("model", str(place / "text"))
    tokenizer, progress = found.pop("tokenizer"), found.pop("on_batch")
    assert found == {"seq_length": 7, "batch_size": 3, "max_documents": 2}
    assert tokenizer.file == str(place / "tokenizer.json") and progress is cli.show_progress
    assert told["load_model"][1] == {"dtype": torch.bfloat16, "mesh": Mesh.single("cpu")}
    checkpoint = place / "run" / "checkpoints" / "step_00000001"
    assert capsys.readouterr().out == (
        f"{checkpoint} on {place / 'text'}: 1 document, 1,000 tokens\nloss 1.2500  perplexity 3.490\n"
    )
    assert call("--checkpoint", place / "run", "--data", place / "text", "--json") == 0
    found = told["evaluate"][1]
    assert (found["seq_length"], found["batch_size"], found["max_documents"]) == (32, 8, None)
    assert told["load_model"][1]["dtype"] == torch.float32
    assert json.loads(capsys.readouterr().out) == {
        "loss": 1.25,
        "perplexity": 3.490343,
        "bits_per_byte": None,
        "tokens": 1000,
        "bytes": None,
        "documents": 1,
    }


def test_options_reach_the_tasks(place, told, tmp_path, capsys):
    options = ["--num-fewshot", 0, "--limit", 4, "--batch-size", 5, "--task-files", tmp_path, "--dtype", "bf16"]
    assert call("--checkpoint", place / "run", "--tasks", "a, b,,c", *options, "--json") == 0
    (model, tokenizer, names), found = told["run_tasks"]
    assert (model, names, tokenizer.file) == ("model", ["a", "b", "c"], str(place / "tokenizer.json"))
    assert found == {"task_files": str(tmp_path), "num_fewshot": 0, "limit": 4, "batch_size": 5}
    assert told["load_model"][1]["dtype"] == torch.bfloat16
    assert json.loads(capsys.readouterr().out)["other"] == "torch.float32"
    assert call("--checkpoint", place / "run", "--tasks", "a") == 0
    assert told["run_tasks"][1] == {"task_files": None, "num_fewshot": None, "limit": None, "batch_size": 8}
    assert capsys.readouterr().out.splitlines()[1].split() == ["t", "acc", "0.5000"]


@pytest.mark.parametrize("arguments", [["--data", "text"], ["--tasks", "a"]])
def test_other_processes_print_nothing(place, told, monkeypatch, capsys, arguments):
    monkeypatch.setattr(cli, "join_layout", lambda args, config: replace(Mesh.single("cpu"), rank=1, pp=2))
    monkeypatch.chdir(place)
    for more in ([], ["--json"]):
        assert call("--checkpoint", place / "run", *arguments, *more) == 0
        assert capsys.readouterr().out == ""
    assert "evaluate" not in told or told["evaluate"][1]["on_batch"] is None


def test_the_table_of_tasks():
    results = {
        "long_name": {
            "alias": "x",
            "acc,none": 0.5,
            "acc_stderr,none": 0.25,
            "ppl,strict": 12.0,
            "ppl_stderr,strict": "N/A",
        },
        "b": {"acc,none": 1, "acc_stderr,other": 0.5, "samples": 3, "text,none": "no number"},
    }
    assert cli.table(results, {"long_name": {"effective": 70}}).splitlines() == [
        "task       metric  value    stderr  questions",
        "long_name  acc     0.5000   0.2500  70",
        "long_name  ppl     12.0000          70",
        "b          acc     1.0000",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_for_terminals(monkeypatch, terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", stream)
    cli.show_progress(1, 2)
    cli.show_progress(2, 2)
    assert stream.getvalue() == ("\r1/2 windows\r2/2 windows\n" if terminal else "")
