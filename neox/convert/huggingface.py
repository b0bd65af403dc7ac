"""Import and export of Hugging Face models: config.json, safetensors, tokenizer files.

Only `compare` needs transformers. It runs both models on the same tokens, and an export is valid only if they agree.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError

from neox.config.load import schema_problem
from neox.config.problems import brief
from neox.config.schema import ModelConfig, SpecialIds
from neox.convert.config_keys import read_json, read_keys
from neox.convert.families import Family, family_for, family_named
from neox.convert.family_keys import GPT2_ALIASES
from neox.convert.family_rules import Rule
from neox.convert.foreign import describe
from neox.convert.pickles import PickledTensors
from neox.convert.source import WeightSource
from neox.convert.special_ids import generation_config, ids_to_json
from neox.convert.state import InMemoryTensors, Tensors
from neox.convert.tensor_files import TensorFiles, TensorFileWriter
from neox.data.text.tokenizer import Tokenizer
from neox.errors import CheckpointError, ConfigError, DataError, DiskError, EnvironmentProblem
from neox.files import JsonObject
from neox.model.attention import queries_per_kv_head
from neox.model.gpt import GPT
from neox.model.shapes import logical_shapes
from neox.printing import counted

MAX_SHARD_BYTES = 4 << 30
LOGIT_TOLERANCE = 1e-4
LAYER_NUMBER = re.compile(r"\.(\d+)\.")  # in the name of a weight
# buffers of old versions
NOT_WEIGHTS = (
    ".attention.bias",
    ".attention.masked_bias",
    ".attn.bias",
    ".attn.masked_bias",
    ".rotary_emb.inv_freq",
)
PROBES = (
    'It was a bright cold morning, and nobody in the street knew that 3,142 letters had been lost. "Where to?" asked '
    "the driver; she shrugged. ",
    'def area(radius):\n    """Area of a circle."""\n    if radius < 0:\n        raise ValueError(f\'negative: '
    "{radius!r}')\n    return 3.14159 * radius**2\n",
)
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

Weights = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]


# writing


def to_huggingface(
    config: ModelConfig,
    weights: Weights,
    out: str | Path,
    *,
    tokenizer_file: str | Path | None = None,
    eod_token: str | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    special_ids: SpecialIds | None = None,
) -> None:
    """Write a model folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load.

    Args:
        config: the architecture.
        weights: every logical parameter by name, in any order; one is in memory at a time.
        out: folder to create; it must be missing or empty.
        tokenizer_file: `tokenizers` JSON to copy; its end-of-document id becomes eos_token_id.
        eod_token: as tokenizer.eod_token of the config; None: found by name.
        dtype: dtype of the written weights: float32, bfloat16 or float16.
        special_ids: ids of an imported model; None: the end-of-document id is bos and eos.
        max_shard_bytes: maximum size of a weights file, unless a single tensor is larger.

    Raises:
        ConfigError: no Hugging Face architecture represents this config.
        CheckpointError: weights are missing, unknown, or have another shape; or `out` contains files.
        DataError: the tokenizer has ids beyond the vocabulary of the model.
        DiskError: the folder cannot be written.
    """
    family, folder = family_for(config), Path(out)
    if dtype not in DTYPE_NAMES:
        raise ConfigError("dtype cannot be exported", where="dtype", got=dtype, want=", ".join(DTYPE_NAMES.values()))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(
            "export would overwrite files", where=folder, want="a missing or empty folder", do="choose another --out"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        eod = None if tokenizer_file is None else _write_tokenizer(folder, Path(tokenizer_file), eod_token, config)
        ids = SpecialIds(bos=eod, eos=eod) if special_ids is None else special_ids
        names = [name for rule in family.rules(config).values() for name in rule.names]
        _write_weights(folder, _their_tensors(config, family, weights, dtype), names, max_shard_bytes)
        if not (folder / "generation_config.json").exists():
            _write_json(folder / "generation_config.json", generation_config(ids))
        # config.json is last, so that an incomplete folder does not load.
        _write_json(folder / "config.json", config_json(config, family, dtype, ids))
    except OSError as error:
        raise DiskError(
            "export cannot be written", where=folder, got=error, do="free space or choose another --out"
        ) from error


def config_json(config: ModelConfig, family: Family, dtype: torch.dtype, ids: SpecialIds) -> JsonObject:
    """Return the content of config.json for transformers 4 and 5."""
    shared = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": DTYPE_NAMES[dtype],
        "torch_dtype": DTYPE_NAMES[dtype],
        "use_cache": True,
    }
    return shared | ids_to_json(ids) | family.to_json(config)


def _their_tensors(
    config: ModelConfig, family: Family, weights: Weights, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (Hugging Face name, tensor) for every neox parameter. Missing and unknown weights are errors."""
    rules = family.rules(config)
    total = len(rules)
    pairs = cast("Mapping[str, torch.Tensor]", weights).items() if isinstance(weights, Mapping) else weights
    for name, tensor in pairs:
        rule = rules.pop(name, None)
        if rule is None:
            raise CheckpointError(
                "weight does not belong to the model", where=name, do="check that the weights belong to this config"
            )
        for their_name, part in zip(rule.names, rule.split(tensor), strict=True):
            yield their_name, part.to(dtype=dtype, device="cpu").contiguous()
    if rules:
        raise CheckpointError(
            "weights are missing", where=", ".join(sorted(rules)[:4]), got=f"{total - len(rules)} of {total}"
        )


def _write_weights(
    folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], names: list[str], max_shard_bytes: int
) -> None:
    """Write files of at most max_shard_bytes, unless a tensor is larger, and an index if there are several."""
    shards: list[list[str]] = []
    writer: TensorFileWriter | None = None
    total = 0
    try:
        for name, tensor in tensors:
            if writer is not None and writer.size and writer.size + tensor.nbytes > max_shard_bytes:
                writer.close()
                writer = None
            if writer is None:
                writer = TensorFileWriter(folder / f"part-{len(shards)}", names)
                shards.append([])
            writer.add(name, tensor)
            shards[-1].append(name)
            total += tensor.nbytes
    finally:
        if writer is not None:
            writer.close()
    if len(shards) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(files):
        (folder / f"part-{i}").rename(folder / name)
    weight_map = {tensor: files[i] for i, names in enumerate(shards) for tensor in names}
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_tokenizer(folder: Path, file: Path, eod_token: str | None, config: ModelConfig) -> int | None:
    """Write the tokenizer files and return the end-of-document id. Settings next to the tokenizer are copied."""
    tokenizer = Tokenizer(str(file), eod_token)
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(
            "tokenizer does not match the model",
            where=file,
            got=f"ids up to {tokenizer.vocab_size - 1}",
            want=f"ids below model.vocab_size {config.vocab_size}",
        )
    shutil.copyfile(file, folder / "tokenizer.json")
    settings_files = [name for name in SETTINGS_FILES if (file.parent / name).is_file()]
    for name in settings_files:
        shutil.copyfile(file.parent / name, folder / name)
    if "tokenizer_config.json" in settings_files:
        return tokenizer.eod_id
    names: dict[str, str] = {}
    if tokenizer.eod_token is not None:
        names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), tokenizer.eod_token)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings | names)
    _write_json(folder / "special_tokens_map.json", names)
    return tokenizer.eod_id


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# reading


def from_huggingface(source: Any) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Convert a Hugging Face model to a neox config and logical weights.

    Args:
        source: a model folder (str or Path), a transformers model, or a transformers config (then there are no
            weights).

    Returns:
        config, and weights by neox parameter name in their stored dtype.

    Raises:
        ConfigError: the architecture or an option is not supported.
        CheckpointError: files or weights are missing, damaged, unknown, or have another shape.
    """
    if isinstance(source, (str, Path)):
        config, weights = open_huggingface(source)
        return config, {name: make() for name, make in weights.items()}
    if not isinstance(source, torch.nn.Module):
        return config_from_json(source.to_dict()), {}
    theirs = cast(Any, source).config.to_dict()
    config = config_from_json(theirs)
    tensors = {name: tensor.detach() for name, tensor in source.state_dict().items()}
    return config, {
        name: make()
        for name, make in _sources(config, family_named(theirs["model_type"]), InMemoryTensors(tensors)).items()
    }


def open_huggingface(folder: str | Path) -> tuple[ModelConfig, dict[str, WeightSource]]:
    """Open a model folder: return the neox config and, for each neox parameter, a function that reads and converts it.

    Raises:
        ConfigError: the architecture or an option is not supported.
        CheckpointError: files or weights are missing, damaged or unknown; the functions raise it for a wrong shape.
    """
    theirs = read_json(Path(folder) / "config.json")
    config = config_from_json(theirs)
    files = _open_weights(Path(folder))
    return config, _sources(config, family_named(theirs["model_type"]), files)


def config_from_json(theirs: JsonObject) -> ModelConfig:
    """Convert the content of a config.json to a neox config.

    Raises:
        ConfigError: the architecture or an option is not supported, or a key is missing.
    """
    family = family_named(theirs.get("model_type"))
    if theirs.get("quantization_config") is not None:
        method = theirs["quantization_config"]
        got = method.get("quant_method", "quantized weights") if isinstance(method, dict) else method
        raise ConfigError(
            "weights are quantized",
            where="config.json: quantization_config",
            got=brief(got),
            do="import the original model",
        )
    keys = read_keys(
        family.keys, {name: theirs[alias] for alias, name in family.aliases.items() if alias in theirs} | theirs
    )
    fields = {
        key: keys[key]
        for key in ("hidden_size", "num_attention_heads", "intermediate_size", "attention_dropout")
        if key in keys
    }
    fields |= {
        "vocab_size": keys["vocab_size"],
        "tie_embeddings": keys["tie_word_embeddings"],
        "init_std": keys["initializer_range"] or 0.02,
    }
    fields |= family.from_json(keys)
    heads = fields["num_attention_heads"]
    queries_per_kv_head(heads, fields.get("num_kv_heads", heads), where="config.json: num_key_value_heads")
    try:
        return ModelConfig.model_validate(fields | {"attention_dropout": fields["attention_dropout"] or 0.0})
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key = ".".join(map(str, detail["loc"]))
        raise schema_problem(detail, key, f"config.json: model.{key}") from error


def _sources(config: ModelConfig, family: Family, theirs: Tensors) -> dict[str, WeightSource]:
    """Return, for each neox parameter, a function that reads and converts it. An unused tensor is an error."""
    stored = {name: name for name in theirs.names()}
    if family.model_type == "gpt2" and "wte.weight" in stored:  # the published gpt2 files have no prefix
        stored = {f"transformer.{name}": name for name in stored}
    # name of the module in transformers 5; files have embed_out
    if family.model_type == "gpt_neox" and "lm_head.weight" in stored:
        stored["embed_out.weight"] = stored.pop("lm_head.weight")
    key = GPT2_ALIASES["num_hidden_layers"] if family.model_type == "gpt2" else "num_hidden_layers"
    layers = 1 + max((int(number[1]) for number in map(LAYER_NUMBER.search, stored) if number), default=-1)
    differ = "" if layers == config.num_layers else f" with {config.num_layers} layers, by {key} of config.json"
    if config.num_layers > len(stored):  # before creating a rule for each layer
        raise CheckpointError(
            "weights are missing",
            where=f"config.json: {key}",
            got=f"{counted(config.num_layers, 'layer')}, {counted(len(stored), 'tensor')}",
        )
    shapes = logical_shapes(config)
    sources: dict[str, WeightSource] = {}
    for name, rule in family.rules(config).items():
        missing = [their_name for their_name in rule.names if their_name not in stored]
        if missing:
            raise CheckpointError(
                "weight is missing",
                where=", ".join(missing),
                got=f"weights of {counted(layers, 'layer')}" if differ else None,
                want=f"the weights of {family.architecture}{differ}",
            )
        parts = [stored.pop(their_name) for their_name in rule.names]
        _check_parts(theirs, parts, shapes[name])
        sources[name] = WeightSource(partial(_join, rule, parts, theirs.tensor), theirs.dtype(parts[0]))
    tied = {"lm_head.weight", "embed_out.weight"} if config.tie_embeddings else set()
    left = [name for name in stored if name not in tied and not name.endswith(NOT_WEIGHTS)]
    if left:
        raise CheckpointError(
            "weights are unknown",
            where=", ".join(left[:4]),
            got=counted(len(left), "tensor") + (f"; weights of {counted(layers, 'layer')}" if differ else ""),
            want=f"the weights of {family.architecture}{differ}",
        )
    return sources


def _check_parts(theirs: Tensors, parts: list[str], shape: tuple[int, ...]) -> None:
    """Raise CheckpointError unless the tensors are floating point and match `shape` in elements and dimensions."""
    found = [theirs.shape(name) for name in parts]
    if sum(map(math.prod, found)) != math.prod(shape) or any(len(part) != len(shape) for part in found):
        raise CheckpointError(
            "weight has another shape", where=parts[0], got=found, want=f"{shape} in total, by config.json"
        )
    strange = [name for name in parts if not theirs.dtype(name).is_floating_point]
    if strange:
        got = str(theirs.dtype(strange[0])).removeprefix("torch.")
        raise CheckpointError(
            "weights are not floating-point", where=strange[0], got=got, do="import the model before quantization"
        )


def _join(rule: Rule, names: list[str], read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Convert one parameter."""
    parts = [read(name) for name in names]
    try:
        return rule.join(*parts).contiguous()
    except RuntimeError as error:
        raise CheckpointError(
            "weight has another shape",
            where=names[0],
            got=[tuple(part.shape) for part in parts],
            want="the shape given by config.json",
        ) from error


def _open_weights(folder: Path) -> Tensors:
    """Open the weights of a model folder: its safetensors files or, if it has none, its pickled files.

    Raises:
        CheckpointError: there are none, they are damaged, or an index names anything but files of the folder.
    """
    if paths := _weight_files(folder, "model.safetensors", ".safetensors"):
        return TensorFiles(paths)
    if paths := _weight_files(folder, "pytorch_model.bin", ".bin"):
        return PickledTensors(paths)
    want = "model.safetensors or pytorch_model.bin, or the index of several files"
    raise describe(folder) or CheckpointError(
        "no weights", where=folder, want=want, do="download the model: hf download NAME --local-dir DIR"
    )


def _weight_files(folder: Path, single: str, suffix: str) -> list[Path]:
    """List the weight files of one format: several if there is an index, none if there are none."""
    index = folder / f"{single}.index.json"
    if not index.exists():
        return [folder / single] if (folder / single).exists() else []
    table = read_json(index).get("weight_map")
    named = list(table.values()) if isinstance(table, dict) else [table]
    strange = [
        name
        for name in named
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(suffix) or "\0" in name
    ]
    if strange or not named:
        got = brief(strange[0]) if strange else "no weights"
        raise CheckpointError(
            "index is damaged",
            where=f"{index}: weight_map",
            got=got,
            want=f"names of {suffix} files in the folder, by tensor",
        )
    return [folder / name for name in sorted({name for name in named if isinstance(name, str)})]


# comparing


def compare(out: str | Path, model: GPT, *, tokens: torch.Tensor | None = None) -> float:
    """Run an exported folder and the neox model on the same tokens, in fp32.

    Args:
        out: the folder, loaded by `AutoModelForCausalLM.from_pretrained`.
        model: the neox model, in fp32 with the exported weights.
        tokens: int64 [b, s]; default: two sequences of real text if the folder has a tokenizer, else random ids.

    Returns:
        the largest absolute difference of logits. It is NaN if either side has one, so test `not difference <= bound`.

    Raises:
        CheckpointError: the folder does not load completely: weights are missing, unused or have another shape.
        EnvironmentProblem: transformers is not installed.
    """
    theirs = _load_theirs(out)
    if tokens is None:
        tokens = probe_tokens(model.config, Path(out) / "tokenizer.json")
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            difference = (
                theirs(tokens).logits[..., : model.config.vocab_size].float()
                - model(tokens.to(model.mesh.device)).float().cpu()
            )
    finally:
        model.train(training)
    return float(difference.abs().max())


def probe_tokens(config: ModelConfig, tokenizer_file: Path) -> torch.Tensor:
    """Return int64 [2, s]: prose and code in the ids of the tokenizer, or random ids without one.

    The sequences are longer than the attention window, if there is one.
    """
    length = min(config.max_position_embeddings, 32 + (config.sliding_window or 96))
    drawn = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    if not tokenizer_file.is_file():
        return drawn
    tokenizer = Tokenizer(tokenizer_file)
    for row, text in enumerate(PROBES):
        ids = [token for token in tokenizer.encode(text) if token < config.vocab_size]
        if ids:
            drawn[row] = torch.tensor((ids * (length // len(ids) + 1))[:length])
    return drawn


def _load_theirs(out: str | Path) -> torch.nn.Module:
    try:
        from transformers import AutoModelForCausalLM  # an optional package
    except ImportError as error:
        raise EnvironmentProblem(
            "transformers is not installed",
            got=error,
            want="transformers >= 5",
            do="pip install transformers, or pass --no-check",
        ) from error
    try:
        model, report = cast(Any, AutoModelForCausalLM).from_pretrained(
            out, dtype=torch.float32, attn_implementation="eager", local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError("export does not load in transformers", where=out, got=error) from error
    problems = {kind: sorted(map(str, names))[:4] for kind, names in report.items() if names}
    if problems:
        raise CheckpointError(
            "export does not load completely in transformers",
            where=out,
            got=problems,
            want="every weight found and used",
        )
    return model.eval()
