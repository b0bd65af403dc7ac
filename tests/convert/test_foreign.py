"""Folders of other programs are named, with what to do, instead of "not a model"."""

from __future__ import annotations

import json
import os

import pytest
import torch
import torch.distributed.checkpoint as dcp

from neox.cli.main import main
from neox.convert import foreign
from neox.convert.foreign import describe

FOLDERS = {
    "torch (DCP)": ["step-100/.metadata", "step-100/__0_0.distcp"],
    "Megatron-core": [
        "iter_0000100/common.pt",
        "iter_0000100/metadata.json",
        "iter_0000100/.metadata",
        "iter_0000100/__0_0.distcp",
    ],
    "Megatron-LM": ["latest_checkpointed_iteration.txt", "iter_0000100/mp_rank_00/model_optim_rng.pt"],
    "Megatron-LM ": ["release/mp_rank_01_003/model_optim_rng.pt"],
    "DeepSpeed ZeRO": ["latest", "zero_to_fp32.py", "global_step5/zero_pp_rank_0_mp_rank_00_model_states.pt"],
    "DeepSpeed ZeRO ": ["global_step5/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"],
    "universal checkpoint of DeepSpeed": ["zero/layer.weight/fp32.pt", "zero/layer.weight/exp_avg.pt"],
    "GGUF": ["model-Q4_K_M.gguf"],
    "Meta or Mistral": ["params.json", "consolidated.00.pth", "tokenizer.model"],
    "litgpt": ["lit_model.pth", "model_config.yaml", "tokenizer.json"],
    "NeMo": ["model_config.yaml", "model_weights/x"],
    "JAX": ["_CHECKPOINT_METADATA", "default/x"],
    "ONNX": ["model.onnx"],
    "run or checkpoint of neox": ["config.lock.yml", "checkpoints/step_00000003/manifest.json"],
    "in a subfolder": ["snapshots/abc/config.json", "snapshots/abc/model.safetensors"],
    "dataset": ["data-00000-of-00001.arrow", "dataset_info.json"],
}


def make(folder, names) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}", encoding="utf-8")


@pytest.mark.parametrize("what", FOLDERS)
def test_a_folder_is_named(what, tmp_path, capsys):
    make(tmp_path / "from", FOLDERS[what])
    assert main(["import", "--from", str(tmp_path / "from"), "--out", str(tmp_path / "out")]) == 4
    printed = capsys.readouterr().err
    assert what.strip() in printed and "do=" in printed and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_adapter_names_its_base_model(tmp_path):
    make(tmp_path, ["adapter_model.safetensors"])
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}), encoding="utf-8")
    assert "base model 'org/base'" in describe(tmp_path).line()
    (tmp_path / "adapter_config.json").write_text("[" * 100_000, encoding="utf-8")
    assert "PEFT adapter" in describe(tmp_path).line()


@pytest.mark.filterwarnings("ignore:torch.distributed")
def test_what_torch_writes_is_known(tmp_path):
    dcp.save({"model": {"weight": torch.zeros(2)}}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert "torch (DCP)" in describe(tmp_path / "dcp").line()


def test_a_trainer_folder_whose_weights_deepspeed_holds_is_named(tmp_path, capsys):
    make(tmp_path / "from", ["global_step5/zero_pp_rank_0_mp_rank_00_model_states.pt"])
    sizes = {
        "vocab_size": 8,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    (tmp_path / "from" / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}), encoding="utf-8")
    assert main(["import", "--from", str(tmp_path / "from"), "--out", str(tmp_path / "out")]) == 4
    assert "DeepSpeed ZeRO" in capsys.readouterr().err


def test_files_links_in_a_circle_and_unknown_folders(tmp_path):
    (tmp_path / "model.gguf").touch()
    assert "pass the folder" in describe(tmp_path / "model.gguf").line()
    (tmp_path / "empty").mkdir()
    os.symlink(tmp_path / "empty", tmp_path / "empty" / "loop")
    assert describe(tmp_path / "empty") is None
    assert describe(tmp_path / "absent") is None


def test_how_deep_a_file_may_lie(tmp_path):
    for depth, known in ((3, True), (4, False)):
        folder = tmp_path / str(depth)
        make(folder, ["/".join(["a"] * depth) + "/model.gguf"])
        assert (describe(folder) is not None) == known


def test_no_more_names_are_read_than_identify_a_checkpoint(tmp_path, monkeypatch):
    make(tmp_path, ["a", "b", "model.gguf"])
    for limit, known in ((2, False), (3, True)):
        monkeypatch.setattr(foreign, "LARGEST_LISTING", limit)
        assert (describe(tmp_path) is not None) == known


def test_several_models_in_subfolders(tmp_path):
    make(tmp_path, [f"{name}/config.json" for name in "cbade"])
    found = describe(tmp_path)
    assert (found.got, found.do) == ("a, b, c, d", f"pass that folder: --from {tmp_path / 'e'}")
    assert found.where == tmp_path


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("tf_model.h5", "TensorFlow checkpoint"),
        ("model.ckpt-7.index", "TensorFlow checkpoint"),
        ("saved_model.pb", "TensorFlow checkpoint"),
        ("flax_model.msgpack", "JAX checkpoint"),
        ("checkpoint_700", "JAX checkpoint"),
        ("7/_METADATA", "JAX checkpoint"),
        ("a.nemo", "checkpoint of NeMo"),
        ("model_weights/x", "checkpoint of NeMo"),
        ("lit_model.pth", "checkpoint of litgpt"),
        ("consolidated.pth", "format of Meta or Mistral"),
        ("consolidated.safetensors", "format of Meta or Mistral"),
        ("a/b/x.gguf", "model in GGUF"),
        ("train.jsonl.zst", "dataset"),
        ("a.parquet", "dataset"),
        ("b.jsonl", "dataset"),
        ("iter_12/x.distcp", "Megatron-core"),
        ("model.w/.zarray", "Megatron-core"),
        ("mp_rank_00/distrib_optim.pt", "checkpoint of Megatron-LM"),
        ("mp_rank_00_001_002/model_rng.pt", "checkpoint of Megatron-LM"),
        ("zero_pp_rank_12_mp_rank_03_optim_states.pt", "DeepSpeed ZeRO"),
        ("manifest.json", "a run or checkpoint of neox"),
        ("step_00000012/manifest.json", "a run or checkpoint of neox"),
        ("checkpoints/step_3/manifest.json", "a run or checkpoint of neox"),
        ("config.lock.yml", "a run or checkpoint of neox"),
        ("other/manifest.json", None),
        ("xgguf", None),
        ("params.json.old", None),
        ("checkpoint_x", None),
        ("config.json", None),
        ("model.safetensors", None),
        ("zero/fp32.pt", None),
    ],
)
def test_a_single_file_identifies_the_format(name, what, tmp_path):
    make(tmp_path, [name])
    found = describe(tmp_path)
    if what is None:
        assert found is None
        return
    assert what in found.line() and found.where == tmp_path and found.do
    if "neox" not in what:
        assert found.got in (name, name.split("/")[0])  # a folder can identify it, too


def test_links_to_folders_are_not_followed(tmp_path):
    make(tmp_path / "elsewhere", ["a.gguf"])
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "link").symlink_to(tmp_path / "elsewhere")
    assert describe(tmp_path / "from") is None


def test_a_model_next_to_models_in_subfolders_names_the_subfolders_alone(tmp_path):
    make(tmp_path, ["config.json", "one/config.json"])
    assert (describe(tmp_path).got, describe(tmp_path).what) == ("one", "the model is in a subfolder")
