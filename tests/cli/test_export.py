from __future__ import annotations

import argparse
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch

from neox.checkpoint.reshard import Fragment
from neox.checkpoint.retention import start_lineage
from neox.checkpoint.save import Content, save
from neox.cli import export
from neox.cli.main import main
from neox.config.schema import Config, SpecialIds
from neox.config.values import dump
from neox.errors import ConfigError, DiskError
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from tests.gpt_neox_tokenizer import write_gpt_neox_tokenizer

MODEL = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "init_std": 0.2,
    "vocab_multiple": 64,
}


def write_checkpoint(root, tokenizer_file: str | None, vocab_size: int, dtype: str = "fp32", **options) -> None:
    """A checkpoint of one process with random weights, as a run leaves it."""
    config = Config(
        model={**MODEL, "vocab_size": vocab_size, **options},
        tokenizer={"file": tokenizer_file},
        precision={"dtype": dtype},
    )
    fragments = []
    for name, weight in GPT(config.model, Mesh.single()).logical_weights():
        slices = tuple((0, size) for size in weight.shape)
        fragments.append(Fragment(name, "weight", tuple(weight.shape), slices, 0, weight.numel(), weight.flatten()))
    save(
        root / "checkpoints",
        Content(
            3,
            {"step": 3},
            start_lineage(root / "checkpoints"),
            config_lock=dump(config),
            model_config=config.model.model_dump(mode="json"),
        ),
        fragments,
        rng={"cpu": torch.get_rng_state()},
    )


@pytest.fixture
def run_folder(tmp_path):
    write_checkpoint(tmp_path / "run", None, 101)
    return tmp_path / "run"


def call(*arguments) -> int:
    return main(["export", *map(str, arguments)])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", None])
def test_export_checked(run_folder, tmp_path, capsys, dtype):
    out = tmp_path / "deep" / "out"
    arguments = ["--checkpoint", run_folder, "--out", out, "--no-tokenizer", "--check", "--json"]
    assert call(*arguments, *([] if dtype is None else ["--dtype", dtype])) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["out"] == str(out)
    assert 0 < report["max_logit_difference"] <= 1e-4
    assert json.loads((out / "config.json").read_text())["dtype"] == {"bf16": "bfloat16"}.get(dtype, "float32")
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o755


def test_dtype_is_that_of_the_run(tmp_path):
    write_checkpoint(
        tmp_path / "run",
        None,
        101,
        dtype="bf16",
        norm="rmsnorm",
        activation="swiglu",
        qkv_bias=False,
        attention_out_bias=False,
        mlp_bias=False,
    )
    assert call("--checkpoint", tmp_path / "run", "--out", tmp_path / "out", "--no-tokenizer") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("llama", "bfloat16")


def test_tokenizer_of_the_run_is_exported(tmp_path):
    from transformers import AutoTokenizer

    write_checkpoint(tmp_path / "run", str(write_gpt_neox_tokenizer(tmp_path / "t.json")), 323)
    assert call("--checkpoint", tmp_path / "run", "--out", tmp_path / "out") == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 0


def test_differing_logits_leave_nothing_and_exit_4(run_folder, tmp_path, capsys, monkeypatch):
    for difference in (2e-4, float("nan")):
        monkeypatch.setattr(export, "compare", lambda out, model, difference=difference: difference)
        assert call("--checkpoint", run_folder, "--out", tmp_path / "out", "--no-tokenizer", "--check") == 4
        assert "error[4] exported model computes different logits" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_damaged_weight_is_found(run_folder, tmp_path, capsys):
    shard = next((run_folder / "checkpoints").glob("*/*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1  # within the largest weights
    shard.write_bytes(data)
    assert call("--checkpoint", run_folder, "--out", tmp_path / "out", "--no-tokenizer") == 4
    assert "error[4]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_out_is_never_overwritten(run_folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert call("--checkpoint", run_folder, "--out", tmp_path / "out", "--no-tokenizer") == 4
    assert "would overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine").read_text() == "x"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "no tokenizer to export"),
        (["--tokenizer", "nowhere.json"], 2, "tokenizer file is missing"),
    ],
)
def test_tokenizer_must_be_found_or_declined(run_folder, tmp_path, capsys, arguments, code, message):
    assert call("--checkpoint", run_folder, "--out", tmp_path / "out", *arguments) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_checkpoint(tmp_path, capsys):
    assert call("--checkpoint", tmp_path, "--out", tmp_path / "out") == 4
    assert "no checkpoint found" in capsys.readouterr().err


def test_an_unwritable_folder(run_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert call("--checkpoint", run_folder, "--out", tmp_path / "file" / "out", "--no-tokenizer") == 5
    assert "error[5]" in capsys.readouterr().err


def test_model_that_no_architecture_holds(tmp_path, capsys):
    write_checkpoint(tmp_path / "run", None, 101, position_embedding="alibi")
    assert call("--checkpoint", tmp_path / "run", "--out", tmp_path / "out", "--no-tokenizer") == 2
    assert "position_embedding=alibi" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_synced_before_it_appears(tmp_path, monkeypatch):
    stage, synced = export.make_stage(tmp_path / "deep" / "out"), []
    assert stage.parent == tmp_path / "deep" and stage.name.startswith(".out-") and stage.is_dir()
    (stage / "a").write_text("x")
    (stage / "b").write_text("y")
    fsync = os.fsync

    def note(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    (tmp_path / "deep" / "out").mkdir()  # an empty folder is replaced
    count = len(os.listdir("/proc/self/fd"))
    export.publish(stage, tmp_path / "deep" / "out")
    assert sorted(synced[:-1]) == [f"{stage}/a", f"{stage}/b"] and synced[-1] == str(stage)
    assert os.listdir(tmp_path / "deep") == ["out"] and len(os.listdir("/proc/self/fd")) == count
    assert stat.S_IMODE((tmp_path / "deep" / "out").stat().st_mode) == 0o755
    stage = export.make_stage(tmp_path / "deep" / "out")
    with pytest.raises(DiskError, match="export cannot be written; where=.*/deep/out; got=.*not empty"):
        export.publish(stage, tmp_path / "deep" / "out")


def test_the_tokenizer_of_the_command_line_wins(tmp_path):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("{}")
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    config = Config(model={"vocab_size": 10}, tokenizer={"file": a})
    for options, wanted in (((None, False), a), ((b, False), b), ((b, True), None)):
        args = argparse.Namespace(tokenizer=options[0], no_tokenizer=options[1])
        assert export.tokenizer_file(args, config) == (None if wanted is None else Path(wanted))
    with pytest.raises(ConfigError, match="tokenizer file is missing; where=.*c.json; do=start in the working folder"):
        export.tokenizer_file(argparse.Namespace(tokenizer=str(tmp_path / "c.json"), no_tokenizer=False), config)


@pytest.mark.parametrize("file", [False, True])
def test_a_file_or_a_link_is_not_replaced(run_folder, tmp_path, capsys, file):
    out = tmp_path / "out"
    out.write_text("x") if file else out.mkdir()
    code = call("--checkpoint", run_folder, "--out", out, "--no-tokenizer", "--no-check")
    assert code == (4 if file else 0)
    shown = capsys.readouterr()
    if file:
        assert "export would overwrite files" in shown.err and out.read_text() == "x"
    else:
        assert shown.out == f"wrote {out}\n" and (out / "config.json").is_file()


def test_what_the_writer_and_the_comparison_receive(tmp_path, monkeypatch, capsys):
    """Weights of the run's dtype, the tokenizer, its end and the ids that an import recorded; a loss of precision is
    compared too.
    """
    write_checkpoint(tmp_path / "run", str(write_gpt_neox_tokenizer(tmp_path / "t.json")), 323, dtype="bf16")
    told, compared = [], []
    ids = SpecialIds(bos=1, eos=2)
    config = Config(
        model={**MODEL, "vocab_size": 323},
        tokenizer={"file": str(tmp_path / "t.json"), "eod_token": "<|padding|>", "special_ids": ids},
        precision={"dtype": "bf16"},
    )
    monkeypatch.setattr(export, "loads", lambda text: config)

    def write(model_config, weights, stage, **options):
        told.append((model_config, dict(weights), options))
        (stage / "x").write_text("")

    monkeypatch.setattr(export, "to_huggingface", write)
    monkeypatch.setattr(export, "compare", lambda stage, model: compared.append(model) or 5e-5)
    out = tmp_path / "out"
    assert call("--checkpoint", tmp_path / "run", "--out", out) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"wrote {out}; logits differ from those of transformers by at most 5e-05"
    )
    ((model_config, weights, options),) = told
    assert model_config == config.model and options == {
        "tokenizer_file": tmp_path / "t.json",
        "eod_token": "<|padding|>",
        "dtype": torch.bfloat16,
        "special_ids": ids,
    }
    for name, weight in compared[0].logical_weights():
        assert torch.equal(weight, weights[name].bfloat16().float()) and weights[name].dtype == torch.float32
    monkeypatch.setattr(export, "compare", lambda stage, model: 1e-4)  # the tolerance itself
    assert call("--checkpoint", tmp_path / "run", "--out", tmp_path / "b", "--dtype", "fp32", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "out": str(tmp_path / "b"),
        "max_logit_difference": 1e-4,
    }
    assert told[1][2]["dtype"] == torch.float32
