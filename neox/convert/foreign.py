"""Identification of checkpoints that neox cannot read, by the names of their files."""

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

DEPTH = 3  # levels of folders that are searched
LARGEST_LISTING = 20_000  # names; enough to identify any checkpoint

TO_HUGGINGFACE = "convert it to a Hugging Face folder with config.json and safetensors, and import that"


@dataclass(frozen=True)
class Format:
    """A checkpoint format that neox does not read.

    Attributes:
        what: its name.
        pattern: matches the path of a file that only this format has, relative to the folder.
        do: what to do instead.
    """

    what: str
    pattern: re.Pattern[str]
    do: str


def _format(what: str, pattern: str, do: str) -> Format:
    return Format(what, re.compile(r"(?:.*/)?" + pattern), do)


FORMATS = (
    _format(
        "PEFT adapter without its base model",
        r"adapter_config\.json",
        "merge it first: PeftModel.from_pretrained(base, DIR).merge_and_unload()",
    ),
    _format(
        "distributed checkpoint of Megatron-core",
        r"(common\.pt|iter_\d+/[^/]*\.distcp|[^/]+/\.zarray)",
        f"{TO_HUGGINGFACE}: Megatron-LM tools/checkpoint/convert.py --loader core --saver hf, or Megatron Bridge "
        "export_ckpt",
    ),
    _format(
        "distributed checkpoint of torch (DCP)",
        r"(\.metadata|__\d+_\d+\.distcp)",
        "python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIR model.pt; then load model.pt into the "
        f"model that wrote it, and {TO_HUGGINGFACE}",
    ),
    _format(
        "checkpoint of Megatron-LM",
        r"(mp_rank_\d+(_\d+)*/(model_optim_rng|model_rng|distrib_optim)\.pt|latest_checkpointed_iteration\.txt)",
        f"{TO_HUGGINGFACE}: Megatron-LM tools/checkpoint/convert.py --loader mcore --saver hf",
    ),
    _format(
        "checkpoint of DeepSpeed ZeRO",
        r"((bf16_)?zero_pp_rank_\d+_mp_rank_\d+_(model|optim)_states\.pt|zero_to_fp32\.py)",
        "python zero_to_fp32.py DIR OUT gathers its weights; load them into the model that wrote it, and "
        f"{TO_HUGGINGFACE}",
    ),
    _format(
        "universal checkpoint of DeepSpeed",
        r"zero/.+/fp32\.pt",
        f"load it into the model that wrote it, and {TO_HUGGINGFACE}",
    ),
    _format(
        "model in GGUF",
        r"[^/]+\.gguf",
        f"get the original safetensors, or {TO_HUGGINGFACE}: from_pretrained(DIR, gguf_file=FILE)",
    ),
    _format(
        "checkpoint in the format of Meta or Mistral",
        r"(consolidated(\.\d+)?\.(pth|safetensors)|params\.json)",
        f"{TO_HUGGINGFACE}: transformers' convert_llama_weights_to_hf.py or convert_mistral_weights_to_hf.py",
    ),
    _format("checkpoint of litgpt", r"lit_model\.pth", f"{TO_HUGGINGFACE}: litgpt convert_from_litgpt"),
    _format(
        "checkpoint of NeMo",
        r"([^/]+\.nemo|model_config\.yaml|model_weights)",
        f"{TO_HUGGINGFACE} with NeMo's exporter",
    ),
    _format(
        "JAX checkpoint",
        r"(_CHECKPOINT_METADATA|_METADATA|flax_model\.msgpack|checkpoint_\d+)",
        f"{TO_HUGGINGFACE} with the program that wrote it",
    ),
    _format(
        "TensorFlow checkpoint",
        r"(tf_model\.h5|model\.ckpt[^/]*|saved_model\.pb)",
        f"{TO_HUGGINGFACE}: from_pretrained(DIR, from_tf=True)",
    ),
    _format("ONNX model", r"[^/]+\.onnx", "get the original safetensors"),
    _format(
        "dataset",
        r"[^/]+\.(arrow|parquet|jsonl)(\.gz|\.zst)?",
        "use neox preprocess for training data; neox import takes a model",
    ),
)


def describe(folder: Path) -> CheckpointError | None:
    """Return an error that identifies a folder or file, or None if its format is unknown."""
    if folder.is_file():
        return CheckpointError(
            "a file, not the folder of a model",
            where=folder,
            want="a folder with config.json and weights",
            do="pass the folder",
        )
    names = list(itertools.islice(_listing(folder), LARGEST_LISTING))
    if (
        any(re.fullmatch(r"(checkpoints/)?(step_\d+/)?manifest\.json", name) for name in names)
        or "config.lock.yml" in names
    ):
        do = "pass it to generate, evaluate and export with --checkpoint, and to training with checkpoint.init_from"
        return CheckpointError("a run or checkpoint of neox", where=folder, want="a model of another program", do=do)
    for each in FORMATS:
        found = next((name for name in names if each.pattern.fullmatch(name)), None)
        if found is not None:
            return CheckpointError(
                f"{each.what} is not supported", where=folder, got=_detail(folder, found), do=each.do
            )
    inner = sorted({str(Path(name).parent) for name in names if Path(name).name == "config.json" and "/" in name})
    if inner:
        got = ", ".join(inner[:4])
        return CheckpointError(
            "the model is in a subfolder", where=folder, got=got, do=f"pass that folder: --from {folder / inner[-1]}"
        )
    return None


def _detail(folder: Path, found: str) -> str:
    """Return the identifying file and, for an adapter, its base model."""
    if Path(found).name != "adapter_config.json":
        return found
    try:
        return f"{found}, base model {brief(read_json(folder / found).get('base_model_name_or_path'))}"
    except CheckpointError:
        return found


def _listing(folder: Path) -> Iterator[str]:
    """Yield paths of files and folders down to DEPTH, relative to the folder. Links to folders are not followed."""
    base = str(folder)
    for root, folders, files in os.walk(base):
        relative = os.path.relpath(root, base)
        prefix = "" if relative == "." else relative + "/"
        folders.sort()
        yield from (prefix + name for name in (*sorted(files), *folders))
        if prefix.count("/") >= DEPTH:
            folders.clear()
