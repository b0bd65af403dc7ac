"""Write a checkpoint as a Hugging Face model: config.json, safetensors, tokenizer files.

OUT appears only after it is complete and, without --no-check, transformers computes the same logits from it.

example: neox export --checkpoint runs/default --out exported
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from neox.checkpoint.find import resolve
from neox.checkpoint.lora_merge import open_weights
from neox.checkpoint.reader import Checkpoint
from neox.config.load import loads
from neox.config.schema import Config, ModelConfig
from neox.convert.huggingface import LOGIT_TOLERANCE, compare, to_huggingface
from neox.errors import CheckpointError, ConfigError, DiskError
from neox.model.checks import with_supported_attention
from neox.model.dtypes import DTYPES
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `neox export`."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="checkpoint, or a folder of checkpoints or of a run (its newest checkpoint)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to create; it must be missing or empty")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="dtype of the written weights; default: precision.dtype of the run"
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="`tokenizers` JSON file; default: tokenizer.file of the run"
    )
    parser.add_argument("--no-tokenizer", action="store_true", help="write no tokenizer files")
    help_check = (
        f"compare logits with transformers on real text; exit code 4 if they differ by more than {LOGIT_TOLERANCE} "
        "(default)"
    )
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help=help_check)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Export and return 0. Raises CheckpointError, ConfigError, DataError, DiskError, EnvironmentProblem."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # no progress bars of transformers in a pipe
    out = Path(args.out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(
            "export would overwrite files", where=out, want="a missing or empty folder", do="choose another --out"
        )
    with open_weights(resolve(args.checkpoint)) as checkpoint:
        config = loads(checkpoint.config_lock)
        dtype = DTYPES[args.dtype or config.precision.dtype]
        stage = make_stage(out)
        try:
            difference = _export(checkpoint, config, stage, dtype, tokenizer_file(args, config), args.check)
            publish(stage, out)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    if args.json:
        print(json.dumps({"out": args.out, "max_logit_difference": difference}))
    else:
        print(
            f"wrote {args.out}"
            + ("" if difference is None else f"; logits differ from those of transformers by at most {difference:.2g}")
        )
    return 0


def tokenizer_file(args: argparse.Namespace, config: Config) -> Path | None:
    """Return the tokenizer to export; None with --no-tokenizer.

    Raises:
        ConfigError: neither the run nor the command line has one, or the file is missing.
    """
    if args.no_tokenizer:
        return None
    name = args.tokenizer or config.tokenizer.file
    if name is None:
        raise ConfigError(
            "no tokenizer to export", where="tokenizer.file of the run", do="pass --tokenizer FILE, or --no-tokenizer"
        )
    if not Path(name).is_file():
        raise ConfigError(
            "tokenizer file is missing",
            where=name,
            do="start in the working folder of the run, or pass --tokenizer FILE or --no-tokenizer",
        )
    return Path(name)


def _export(
    checkpoint: Checkpoint, config: Config, stage: Path, dtype: torch.dtype, tokenizer: Path | None, check: bool
) -> float | None:
    """Write the model into `stage`. With `check` return the largest difference of logits.

    Raises:
        CheckpointError: weights are missing, or the logits differ by more than LOGIT_TOLERANCE or are not finite.
    """
    model_config = ModelConfig(**checkpoint.model_config)
    model = GPT(with_supported_attention(model_config, torch.float32, "cpu"), Mesh.single("meta"))
    specs = model.shard_specs()
    checkpoint.check((name, "weight", spec.shape) for name, spec in specs.items())

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name in specs:
            yield name, checkpoint.tensor(name)

    to_huggingface(
        model_config,
        weights(),
        stage,
        tokenizer_file=tokenizer,
        eod_token=config.tokenizer.eod_token,
        dtype=dtype,
        special_ids=config.tokenizer.special_ids,
    )
    if not check:
        return None
    model.materialize("cpu", initialize=False).load_weights((name, tensor.to(dtype)) for name, tensor in weights())
    difference = compare(stage, model)
    if not difference <= LOGIT_TOLERANCE:
        raise CheckpointError(
            "exported model computes different logits",
            where=checkpoint.path,
            got=difference,
            want=f"a difference of at most {LOGIT_TOLERANCE}",
            do="report this as a bug",
        )
    return difference


def make_stage(out: Path) -> Path:
    """Create a folder next to `out`, on the same file system."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise DiskError("export cannot be written", where=out.parent, got=error, do="choose another --out") from error


def publish(stage: Path, out: Path) -> None:
    """Sync the completed folder to disk and rename it to `out`."""
    try:
        for path in [*stage.iterdir(), stage]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        stage.chmod(0o755)
        stage.rename(out)
    except OSError as error:
        raise DiskError(
            "export cannot be written", where=out, got=error, do="free space or choose another --out"
        ) from error
