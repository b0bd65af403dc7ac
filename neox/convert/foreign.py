"""What a folder is that holds no model we read: checkpoints of other programs, known by the names of their files."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from neox.config.problems import brief
from neox.convert.config_keys import read_json
from neox.errors import CheckpointError

DEPTH = 3  # levels of folders that are listed
LARGEST_LISTING = 20_000  # names; a checkpoint with more of them is known by the first

TO_HUGGINGFACE = "convert it to a Hugging Face folder with config.json and safetensors, and import that"


@dataclass(frozen=True)
class Kind:
    """A form of checkpoint that is not read.

    Attributes:
        what: its name.
        pattern: matches the path of a file that only this form has, relative to the folder.
        do: what to do instead.
    """

    what: str
    pattern: re.Pattern[str]
    do: str


def _kind(what: str, pattern: str, do: str) -> Kind:
    return Kind(what, re.compile(r"(?:.*/)?" + pattern), do)


KINDS = (
    _kind("PEFT adapter without its base model", r"adapter_config\.json", "merge it first: PeftModel.from_pretrained(base, DIR).merge_and_unload()"),
    _kind(
        "distributed checkpoint of Megatron-core",
        r"(common\.pt|iter_\d+/[^/]*\.distcp|[^/]+/\.zarray)",
        f"{TO_HUGGINGFACE}: Megatron-LM tools/checkpoint/convert.py --loader core --saver hf, or Megatron Bridge export_ckpt",
    ),
    _kind(
        "distributed checkpoint of torch (DCP)",
        r"(\.metadata|__\d+_\d+\.distcp)",
        f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIR model.pt; then load model.pt into the model that wrote it, and {TO_HUGGINGFACE}",
    ),
    _kind(
        "checkpoint of Megatron-LM",
        r"(mp_rank_\d+(_\d+)*/(model_optim_rng|model_rng|distrib_optim)\.pt|latest_checkpointed_iteration\.txt)",
        f"{TO_HUGGINGFACE}: Megatron-LM tools/checkpoint/convert.py --loader mcore --saver hf",
    ),
    _kind(
        "checkpoint of DeepSpeed ZeRO",
        r"((bf16_)?zero_pp_rank_\d+_mp_rank_\d+_(model|optim)_states\.pt|zero_to_fp32\.py)",
        f"python zero_to_fp32.py DIR OUT gathers its weights; load them into the model that wrote it, and {TO_HUGGINGFACE}",
    ),
    _kind("universal checkpoint of DeepSpeed", r"zero/.+/fp32\.pt", f"load it into the model that wrote it, and {TO_HUGGINGFACE}"),
    _kind("model in GGUF", r"[^/]+\.gguf", f"get the safetensors that it was made from, or {TO_HUGGINGFACE}: from_pretrained(DIR, gguf_file=FILE)"),
    _kind(
        "checkpoint in Meta's or Mistral's own form",
        r"(consolidated(\.\d+)?\.(pth|safetensors)|params\.json)",
        f"{TO_HUGGINGFACE}: transformers' convert_llama_weights_to_hf.py or convert_mistral_weights_to_hf.py",
    ),
    _kind("checkpoint of litgpt", r"lit_model\.pth", f"{TO_HUGGINGFACE}: litgpt convert_from_litgpt"),
    _kind("checkpoint of NeMo", r"([^/]+\.nemo|model_config\.yaml|model_weights)", f"{TO_HUGGINGFACE} with NeMo's exporter"),
    _kind("JAX checkpoint", r"(_CHECKPOINT_METADATA|_METADATA|flax_model\.msgpack|checkpoint_\d+)", f"{TO_HUGGINGFACE} with the program that wrote it"),
    _kind("TensorFlow checkpoint", r"(tf_model\.h5|model\.ckpt[^/]*|saved_model\.pb)", f"{TO_HUGGINGFACE}: from_pretrained(DIR, from_tf=True)"),
    _kind("ONNX model", r"[^/]+\.onnx", "get the safetensors that it was made from"),
    _kind("dataset", r"[^/]+\.(arrow|parquet|jsonl)(\.gz|\.zst)?", "neox preprocess makes training data; neox import takes a model"),
)


def describe(folder: Path) -> CheckpointError | None:
    """The error that says what a folder or file is; None where nothing in it is known."""
    if folder.is_file():
        return CheckpointError("a file, not a model's folder", where=folder, want="a folder with config.json and its weights", do="give the folder")
    names = list(itertools.islice(_listing(folder), LARGEST_LISTING))
    if any(re.fullmatch(r"(checkpoints/)?(step_\d+/)?manifest\.json", name) for name in names) or "config.lock.yml" in names:
        do = "generate, evaluate and export take it with --checkpoint; training takes checkpoint.init_from"
        return CheckpointError("a run or checkpoint of neox itself", where=folder, want="a model of another program", do=do)
    for kind in KINDS:
        found = next((name for name in names if kind.pattern.fullmatch(name)), None)
        if found is not None:
            return CheckpointError(f"a {kind.what}, which is not read", where=folder, got=_detail(folder, found), do=kind.do)
    inner = sorted({str(Path(name).parent) for name in names if Path(name).name == "config.json" and "/" in name})
    if inner:
        got = ", ".join(inner[:4])
        return CheckpointError("the model is in a folder below", where=folder, got=got, do=f"give that folder: --from {folder / inner[-1]}")
    return None


def _detail(folder: Path, found: str) -> str:
    """The file that gave it away and, for an adapter, the model that it belongs to."""
    if Path(found).name != "adapter_config.json":
        return found
    try:
        return f"{found}, base model {brief(read_json(folder / found).get('base_model_name_or_path'))}"
    except CheckpointError:
        return found


def _listing(folder: Path) -> Iterator[str]:
    """Paths of files and folders down to DEPTH, relative to the folder; links to folders are not followed."""
    base = str(folder)
    for root, folders, files in os.walk(base):
        relative = os.path.relpath(root, base)
        prefix = "" if relative == "." else relative + "/"
        folders.sort()
        yield from (prefix + name for name in (*sorted(files), *folders))
        if prefix.count("/") >= DEPTH:
            folders.clear()
