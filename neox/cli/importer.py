"""Import a Hugging Face model or a checkpoint of GPT-NeoX.

OUT becomes the folder of a run at step 0 with weights only. Generate, evaluate and export from it, or continue training
with --set checkpoint.init_from=OUT. It appears only after it is complete and, for a Hugging Face model, transformers
computes the same logits on real text (--no-check skips that).

example: neox import --from path/to/pythia-160m --out pythia
         neox import --from checkpoints/global_step143000 --conf 160M.yml --out pythia
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from neox.checkpoint.find import resolve
from neox.checkpoint.reader import Checkpoint
from neox.cli.export import make_stage, publish
from neox.config.load import load
from neox.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    PrecisionConfig,
    RunConfig,
    SpecialIds,
    TokenizerConfig,
    TrainConfig,
)
from neox.config.values import dump
from neox.convert.foreign import describe
from neox.convert.gpt_neox import (
    config_files,
    embedding_rows,
    is_gpt_neox_checkpoint,
    open_gpt_neox_checkpoint,
    step_folder,
)
from neox.convert.huggingface import LOGIT_TOLERANCE, SETTINGS_FILES, compare, open_huggingface, probe_tokens
from neox.convert.source import WeightSource, save_weights
from neox.convert.special_ids import read_special_ids
from neox.data.text.tokenizer import Tokenizer
from neox.errors import CheckpointError, ConfigError
from neox.model.checks import with_supported_attention
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh

PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `neox import`."""
    parser.add_argument(
        "--from",
        required=True,
        metavar="DIR",
        dest="source",
        help="Hugging Face model folder, or checkpoint of GPT-NeoX",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to create; it must be missing or empty")
    parser.add_argument(
        "--conf",
        nargs="+",
        default=[],
        metavar="FILE",
        help="config of a GPT-NeoX checkpoint; default: *.yml in it or in its folder configs",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="single values for --conf",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="`tokenizers` JSON file; default: tokenizer.json of DIR, or tokenizer.file of --conf",
    )
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare logits with transformers, or compute a loss (default)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Import and return 0. Raises CheckpointError, ConfigError, DataError, DiskError, EnvironmentProblem."""
    source, out = Path(args.source), Path(args.out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(
            "import would overwrite files", where=out, want="a missing or empty folder", do="choose another --out"
        )
    gpt_neox = is_gpt_neox_checkpoint(source)
    if not gpt_neox and not (source / "config.json").is_file():
        raise describe(source) or CheckpointError(
            "not a model",
            where=source,
            got=None if os.path.lexists(source) else "no such folder",
            want="a folder with config.json, or a checkpoint of GPT-NeoX",
            do="download the model first: hf download NAME --local-dir DIR",
        )
    config, weights = (read_gpt_neox if gpt_neox else read_huggingface)(source, args, out)
    stage = make_stage(out)
    try:
        save_weights(config, weights, stage / "checkpoints")
        (stage / "config.lock.yml").write_text(dump(config), encoding="utf-8")
        copy_tokenizer(args, source, config, stage)
        report = check(stage, None if gpt_neox else source) if args.check else {}
        publish(stage, out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    if config.tokenizer.file is None:
        print("note: the import has no tokenizer; generate, evaluate and export take --tokenizer FILE", file=sys.stderr)
    parameters = GPT(config.model, Mesh.single("meta")).num_parameters()
    if args.json:
        print(json.dumps({"out": args.out, "parameters": parameters, **report}))
    else:
        print(
            f"wrote {args.out}: {parameters:,} parameters"
            + "".join(f"; {name.replace('_', ' ')} {value:.2g}" for name, value in report.items())
        )
    return 0


def run_config(
    model: ModelConfig, weights: Mapping[str, WeightSource], tokenizer: TokenizerConfig, out: Path
) -> Config:
    """Return the config of a run that continues training this model."""
    dtype = next(iter(weights.values())).dtype
    return Config(
        model=model,
        tokenizer=tokenizer,
        data=DataConfig(seq_length=min(model.max_position_embeddings, 2048)),
        precision=PrecisionConfig.model_validate({"dtype": PRECISIONS.get(dtype, "fp32")}),
        train=TrainConfig(micro_batch_size=1),
        run=RunConfig(dir=str(out)),
    )


def read_huggingface(source: Path, args: argparse.Namespace, out: Path) -> tuple[Config, dict[str, WeightSource]]:
    """Read config and weights of a Hugging Face folder."""
    if args.conf or args.overrides:
        raise ConfigError(
            "Hugging Face model with a config on the command line",
            where="--conf, --set",
            do="omit them; use --set when you continue training",
        )
    model, weights = open_huggingface(source)
    ids, file = read_special_ids(source), tokenizer_of(args, source)
    section = (
        {} if file is None else {"file": str(out / "tokenizer.json"), "eod_token": end_token(Tokenizer(file), ids)}
    )
    return run_config(model, weights, TokenizerConfig(**section, special_ids=ids), out), weights


def end_token(tokenizer: Tokenizer, ids: SpecialIds) -> str | None:
    """Return tokenizer.eod_token of the run.

    It is None if the token is found by name, else the first id that stops generation and that the tokenizer has.
    """
    if tokenizer.eod_id is not None:
        return None
    ends = (*((ids.eos,) if isinstance(ids.eos, int) else ids.eos or ()), *ids.stop)
    return next((token for token in map(tokenizer.token_text, ends) if token is not None), None)


def read_gpt_neox(source: Path, args: argparse.Namespace, out: Path) -> tuple[Config, dict[str, WeightSource]]:
    """Read config and weights of a checkpoint of GPT-NeoX."""
    folder = step_folder(source) or source
    files = args.conf or config_files(folder)
    if not files:
        want = "*.yml in it or in its folder configs"
        raise ConfigError("checkpoint has no config", where=folder, want=want, do="pass its YAML files with --conf")
    loaded = load(files, args.overrides, embedding_rows=embedding_rows(folder))
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    named = loaded.config.tokenizer
    if args.tokenizer is None and named.file is not None and Path(named.file).is_file():
        args.tokenizer = named.file
    weights = open_gpt_neox_checkpoint(folder, loaded.config.model)
    has_tokenizer = tokenizer_of(args, source) is not None
    section = TokenizerConfig(
        file=str(out / "tokenizer.json") if has_tokenizer else None,
        eod_token=named.eod_token if has_tokenizer else None,
    )
    return run_config(loaded.config.model, weights, section, out), weights


def tokenizer_of(args: argparse.Namespace, source: Path) -> Path | None:
    """Return the tokenizer to import; None if there is none.

    Raises:
        ConfigError: --tokenizer names a missing file.
    """
    if args.tokenizer is not None and not Path(args.tokenizer).is_file():
        raise ConfigError("tokenizer file is missing", where="--tokenizer", got=args.tokenizer)
    file = Path(args.tokenizer) if args.tokenizer is not None else source / "tokenizer.json"
    return file if file.is_file() else None


def copy_tokenizer(args: argparse.Namespace, source: Path, config: Config, stage: Path) -> None:
    """Copy the tokenizer and the settings of the source, so that an export has them."""
    file = tokenizer_of(args, source)
    if file is None or config.tokenizer.file is None:
        return
    size = Tokenizer(file).vocab_size
    if size > config.model.vocab_size:
        raise ConfigError(
            "tokenizer ids exceed the vocabulary", where=file, got=size, want=f"at most {config.model.vocab_size}"
        )
    shutil.copyfile(file, stage / "tokenizer.json")
    for name in SETTINGS_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, stage / name)


def check(stage: Path, theirs: Path | None) -> dict[str, float]:
    """Run the imported model: compare it with transformers on the source, else compute a loss on real text.

    Raises:
        CheckpointError: logits differ by more than LOGIT_TOLERANCE, or are not finite.
    """
    with Checkpoint(resolve(stage)) as checkpoint:
        config = with_supported_attention(ModelConfig(**checkpoint.model_config), torch.float32, "cpu")
        model = GPT(config, Mesh.single("meta")).materialize("cpu", initialize=False)
        model.load_weights((name, checkpoint.tensor(name)) for name in checkpoint.names())
    model.eval()
    tokens = probe_tokens(model.config, stage / "tokenizer.json")
    if theirs is None:
        with torch.inference_mode():
            loss = float(model(tokens[:, :-1], tokens[:, 1:]).mean())
        if not math.isfinite(loss):
            raise CheckpointError(
                "loss of the imported model is not finite", got=loss, do="check the checkpoint and its config"
            )
        return {"loss_on_probe": loss, "loss_of_uniform_guess": math.log(model.config.vocab_size)}
    difference = compare(theirs, model, tokens=tokens)
    if not difference <= LOGIT_TOLERANCE:
        raise CheckpointError(
            "imported model computes different logits",
            where=theirs,
            got=difference,
            want=f"a difference of at most {LOGIT_TOLERANCE}",
        )
    return {"max_logit_difference": difference}
