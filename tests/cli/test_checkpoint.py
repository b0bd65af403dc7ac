"""`neox checkpoint` from outside: output, JSON and exit codes."""

from __future__ import annotations

import json

import pytest
import torch

from neox.checkpoint.manifest import Lineage, read_manifest
from neox.checkpoint.reader import Checkpoint
from neox.checkpoint.verify import digest
from neox.cli import checkpoint as cli
from neox.cli.main import main
from neox.errors import CheckpointError
from tests.checkpoint.builders import make_state, save_one


def test_inspect_shows_the_content(tmp_path, capsys):
    path = save_one(tmp_path / "checkpoints", 9)
    save_one(tmp_path / "checkpoints", 10, layout={"tp": 1})
    assert main(["checkpoint", "inspect", str(path), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["step"] == 9
    assert about["state"] == {"step": 9, "consumed": 72}
    assert about["parameters"] == 19 * 6 + 12 * 5 + 7 + 1
    assert about["tensors"]["layers.0.norm1.bias"]["exp_avg_sq"] == {"dtype": "BF16", "shape": [7], "bytes": 14}
    assert main(["checkpoint", "inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "step_00000009" in text
    assert "generation 0  complete" in text
    assert '{"tp": 1}' in text and "state         {" in text


def test_verify_lists_every_problem_and_exits_4(tmp_path, capsys):
    path = save_one(tmp_path)
    assert main(["checkpoint", "verify", str(path)]) == 0
    assert capsys.readouterr().out.startswith("good: ")
    (shard,) = path.glob("*.safetensors")
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    raw[-70] ^= 1
    shard.write_bytes(raw)
    assert main(["checkpoint", "verify", str(path)]) == 4
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(shard.name in line and line.startswith("error[4]") for line in lines)
    assert main(["checkpoint", "verify", "--json", str(path)]) == 4
    assert json.loads(capsys.readouterr().out)["good"] is False


def test_verify_of_a_run_sees_a_damaged_manifest_of_an_older_step(tmp_path, capsys):
    old = save_one(tmp_path / "checkpoints", 9)
    save_one(tmp_path / "checkpoints", 10)
    (old / "manifest.json").write_bytes(b"{}")
    assert main(["checkpoint", "verify", str(tmp_path / "checkpoints" / "step_00000010")]) == 0
    assert main(["checkpoint", "verify", str(tmp_path)]) == 4
    assert "not a manifest; where=" + str(old) in capsys.readouterr().err


def test_hash_distinguishes_equal_and_different(tmp_path, capsys):
    state = make_state()
    one, same = save_one(tmp_path / "a", 1, state), save_one(tmp_path / "b", 2, state, shard_bytes=64)
    state["scale", "exp_avg"] = state["scale", "exp_avg"] * 2
    other = save_one(tmp_path / "c", 3, state)
    outputs = []
    for path in (one, same, other):
        assert main(["checkpoint", "hash", str(path)]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    changed = set(outputs[0].splitlines()) ^ set(outputs[2].splitlines())
    assert {line.split()[1] for line in changed} == {"exp_avg/scale"}


@pytest.mark.parametrize("action", ["inspect", "verify", "hash"])
def test_a_wrong_path_is_error_4_and_lists_what_is_there(tmp_path, capsys, action):
    save_one(tmp_path / "checkpoints")
    assert main(["checkpoint", action, str(tmp_path / "checkpoint")]) == 4
    assert "holds checkpoints" in capsys.readouterr().err


def test_convert_merges_and_keeps_every_bit(tmp_path, capsys):
    path = save_one(tmp_path / "checkpoints", 9, shard_bytes=100)
    assert (
        main(["checkpoint", "convert", str(tmp_path / "checkpoints"), "--out", str(tmp_path / "whole"), "--json"]) == 0
    )
    about = json.loads(capsys.readouterr().out)
    assert about["files"] == 1
    assert digest(about["path"]) == digest(path)
    with Checkpoint(about["path"]) as new, Checkpoint(path) as old:
        assert new.state == old.state
        assert torch.equal(new.rng(0)["cpu"], old.rng(0)["cpu"])
    assert main(["checkpoint", "convert", str(path), "--out", str(tmp_path / "small"), "--shard-gb", "1e-7"]) == 0
    assert digest(tmp_path / "small" / path.name) == digest(path)
    assert len(list((tmp_path / "small" / path.name).glob("*.safetensors"))) > 5
    assert main(["checkpoint", "convert", str(path), "--out", str(tmp_path / "whole")]) == 4
    assert "checkpoint already exists" in capsys.readouterr().err


def test_convert_to_weights_of_another_dtype(tmp_path):
    state = make_state()
    path = save_one(tmp_path / "checkpoints", 9, state)
    assert (
        main(["checkpoint", "convert", str(path), "--out", str(tmp_path / "half"), "--weights-only", "--dtype", "bf16"])
        == 0
    )
    with Checkpoint(tmp_path / "half" / path.name) as checkpoint:
        assert checkpoint.names() == sorted({name for name, _ in state})
        assert all(checkpoint.kinds(name) == ["weight"] for name in checkpoint.names())
        assert torch.equal(checkpoint.tensor("layers.0.norm1.bias"), state["layers.0.norm1.bias", "weight"].bfloat16())
        assert checkpoint.state == {"step": 9, "weights_only": True}


def test_convert_refuses_damage_and_contradictions(tmp_path, capsys):
    path = save_one(tmp_path / "checkpoints", 9)
    out = ["--out", str(tmp_path / "x")]
    for options, where in (
        ([], "where=--out; do=give --out DIR"),
        ([*out, "--dtype", "bf16"], "where=--dtype; got=bf16; do=add --weights-only"),
        ([*out, "--shard-gb", "0"], "where=--shard-gb; got=0.0; want=above 0, below 2^20"),
        ([*out, "--shard-gb", "nan"], "where=--shard-gb; got=nan; want=above 0, below 2^20"),
    ):
        assert main(["checkpoint", "convert", str(path), *options]) == 2
        assert where in capsys.readouterr().err
    (shard,) = path.glob("*.safetensors")
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    capsys.readouterr()
    assert main(["checkpoint", "convert", str(path), "--out", str(tmp_path / "x")]) == 4
    assert shard.name in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_list_of_a_folder_names_what_is_wrong(tmp_path, capsys):
    root = tmp_path / "checkpoints"
    for step in (7, 8):
        save_one(root, step)
    lineage = Lineage("bb" * 16, 1, (("aa" * 16, 8),))
    save_one(root, 9, lineage=lineage)
    (root / "step_00000001").mkdir()
    (root / "step_00000007" / "manifest.json").write_bytes(b"{}")
    next((root / "step_00000008").glob("*.safetensors")).unlink()
    assert main(["checkpoint", "inspect", str(root), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["step"], about["generation"]) == (9, 1)
    assert about["resumed_from"] == {"lineage": "aa" * 16, "step": 8}
    found = {one["step"]: (one["generation"], one["status"]) for one in about["checkpoints"]}
    assert found[1] == (None, "unfinished save") and found[9] == (1, "complete")
    assert found[8] == (0, "files are missing or have another size")
    assert found[7][0] is None and "not a manifest" in found[7][1]
    assert about["files"] == 1
    assert about["bytes"] == next((root / "step_00000009").glob("*.safetensors")).stat().st_size


def test_the_text_leaves_out_the_window_of_losses(tmp_path, capsys):
    path = save_one(tmp_path, content={"step": 100, "guard": {"losses": [1.0] * 99}})
    assert main(["checkpoint", "inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert 'state         {"step": 100}' in text and "checkpoints" not in text
    assert main(["checkpoint", "inspect", str(path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["state"]["guard"]["losses"]) == 99


def test_convert_keeps_integers_and_drops_what_belongs_to_a_process(tmp_path):
    state = {("a", "weight"): torch.ones(3), ("count", "weight"): torch.tensor([5, 6])}
    path = save_one(tmp_path / "c", 9, state, layout={"tp": 1})
    arguments = ["checkpoint", "convert", str(path), "--out", str(tmp_path / "half"), "--weights-only"]
    assert main([*arguments, "--dtype", "bf16", "--shard-gb", "1048575"]) == 0
    with Checkpoint(tmp_path / "half" / path.name) as checkpoint:
        assert checkpoint.tensor("count").tolist() == [5, 6] and checkpoint.tensor("a").dtype == torch.bfloat16
        assert (checkpoint.layout, checkpoint.model_config) == ({"tp": 1}, {"num_layers": 1})
        assert checkpoint.manifest.config_lock == "train: {seed: 1}\n"
        assert checkpoint.rng(0) == {}
    assert main([*arguments[:-2], str(tmp_path / "x"), "--shard-gb", "1048576"]) == 2


def test_every_fact_of_a_checkpoint(tmp_path, capsys):
    path = save_one(tmp_path, 9, layout={"tp": 1}, shard_bytes=100)
    about = cli.describe(path, read_manifest(path))
    shards = list(path.glob("*.safetensors"))
    assert (about["path"], about["lineage"], about["generation"], about["resumed_from"]) == (
        str(path),
        "ab" * 16,
        0,
        None,
    )
    assert (about["world_size"], about["layout"], about["files"]) == (1, {"tp": 1}, len(shards)) and len(shards) > 2
    assert about["bytes"] == sum(shard.stat().st_size for shard in shards)
    assert list(about["tensors"]) == sorted({name for name, _ in make_state()})  # no states of generators
    assert list(about["tensors"]["layers.0.norm1.bias"]) == ["count", "exp_avg", "exp_avg_sq", "weight"]
    assert about["tensors"]["scale"]["weight"] == {"dtype": "F32", "shape": [], "bytes": 4}
    assert about["tensors"]["layers.0.norm1.bias"]["count"] == {"dtype": "I64", "shape": [7], "bytes": 56}
    assert main(["checkpoint", "inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "step          9" in lines and f"path          {path}" in lines and "resumed_from  null" in lines
    assert "  scale  exp_avg F32[]  weight F32[]" in lines[lines.index("tensors") :]


def test_verify_in_words_and_json(tmp_path, capsys):
    old, path = (save_one(tmp_path / "checkpoints", step) for step in (8, 9))
    size = sum(shard.stat().st_size for shard in path.glob("*.safetensors"))
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    tensors = len(read_manifest(path).tensors)
    assert capsys.readouterr().out == f"good: {path}: 1 shard, {size} bytes, {tensors} tensors\n"
    assert main(["checkpoint", "verify", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(path), "good": True, "problems": []}
    (old / "manifest.json").write_bytes(b"{}")
    assert main(["checkpoint", "verify", str(tmp_path), "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert (found["path"], found["good"], len(found["problems"])) == (str(path), False, 1)
    assert found["problems"][0]["what"] == "not a manifest" and str(old) in found["problems"][0]["where"]


def test_hashes_as_json_and_lines(tmp_path, capsys):
    path = save_one(tmp_path)
    assert main(["checkpoint", "hash", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == digest(path) and all(len(value) == 64 for value in found.values())
    assert main(["checkpoint", "hash", str(path)]) == 0
    assert capsys.readouterr().out == "".join(f"{value}  {key}\n" for key, value in found.items())


def test_what_a_converted_checkpoint_keeps(tmp_path, capsys):
    """The states of one process; of several neither their layout nor their generators."""
    path = save_one(tmp_path / "c", 9, layout={"tp": 1}, content={"step": 9, "x": 1})
    assert main(["checkpoint", "convert", str(tmp_path), "--out", str(tmp_path / "x")]) == 4
    assert main(["checkpoint", "convert", str(tmp_path / "c"), "--out", str(tmp_path / "new")]) == 0
    new = tmp_path / "new" / path.name
    size = sum(shard.stat().st_size for shard in new.glob("*.safetensors"))
    assert capsys.readouterr().out == f"wrote {new}: 1 file, {size} bytes\n"
    with Checkpoint(new) as made, Checkpoint(path) as old:
        assert (made.state, made.layout, made.step) == ({"step": 9, "x": 1}, {"tp": 1}, 9)
        assert (made.config_lock, made.model_config) == (old.config_lock, old.model_config)
        assert made.manifest.lineage.id != old.manifest.lineage.id  # nothing that was resumed from it is its successor
        for name in old.names():
            assert made.kinds(name) == old.kinds(name)
            assert all(made.tensor(name, kind).dtype == old.tensor(name, kind).dtype for kind in old.kinds(name))


def test_a_shard_holds_as_many_bytes_as_requested(tmp_path, monkeypatch):
    path, told = save_one(tmp_path / "c", 9), []

    def note(*arguments, **options):
        told.append(options["shard_bytes"])
        raise CheckpointError("enough")

    monkeypatch.setattr(cli, "save", note)
    for words in ([], ["--shard-gb", "0.5"], ["--shard-gb", "1e-12"]):
        assert main(["checkpoint", "convert", str(path), "--out", str(tmp_path / "x"), *words]) == 4
    assert told == [4 << 30, 1 << 29, 1]


def test_layout_and_generators_of_two_processes_are_dropped(tmp_path, monkeypatch):
    path = save_one(tmp_path / "c", 9, layout={"tp": 2})
    monkeypatch.setattr(Checkpoint, "world_size", property(lambda self: 2))
    assert main(["checkpoint", "convert", str(path), "--out", str(tmp_path / "new")]) == 0
    monkeypatch.undo()
    with Checkpoint(tmp_path / "new" / path.name) as made, Checkpoint(path) as old:
        assert (made.layout, made.rng(0), made.world_size) == ({}, {}, 1) and made.state == old.state
        assert old.layout == {"tp": 2} and set(old.rng(0)) == {"cpu"}
