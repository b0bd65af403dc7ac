"""`neox generate`: continue prompts with a trained model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from neox.checkpoint.load import Checkpoint, resolve
from neox.config.load import loads
from neox.data.tokenizer import Tokenizer
from neox.errors import ConfigError
from neox.generate.generate import generate, load_model
from neox.generate.sampling import SamplingParams

EXAMPLE = """example:
  neox generate --checkpoint runs/demo --prompt "def main():" --max-new-tokens 100 --temperature 0.8 --top-p 0.95
  neox generate --checkpoint runs/demo --prompt-file prompts.txt --temperature 0 --json"""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNDECODED = "\ufffd"  # what a tokenizer shows for a character whose last bytes are not there yet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `neox generate`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE
    parser.add_argument("--checkpoint", required=True, help="run folder (its newest checkpoint), or one checkpoint folder")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; may be given several times")
    parser.add_argument("--prompt-file", help="file with one prompt per line")
    parser.add_argument("--tokenizer", help="tokenizer file; default: tokenizer.file of the run")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens generated at most per prompt (default 64)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely token (default 1)")
    parser.add_argument("--top-k", type=int, help="draw from the k most likely tokens")
    parser.add_argument("--top-p", type=float, help="draw from the most likely tokens that hold this probability together")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the draws (default 1234)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="dtype of the weights (default fp32)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--no-cache", action="store_true", help="recompute all tokens at every step (slow; to check the cache)")
    parser.add_argument("--json", action="store_true", help="print one JSON list of {prompt, text, tokens}")


def usable_device(name: str) -> str:
    """The device, once a number was read from it.

    Raises:
        ConfigError: torch does not know it, or this machine has none.
    """
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError("device cannot be used", where="--device", got=f"{name}: {reason}", want="cpu, or cuda on a machine with a GPU") from error
    return name


def run_tokenizer(checkpoint: Path, file: str | None) -> Tokenizer:
    """The tokenizer a checkpoint was trained with, or the one named instead.

    Raises:
        ConfigError: neither is there.
    """
    if file is not None:
        return Tokenizer(file)
    section = loads(Checkpoint(checkpoint).config_lock).tokenizer
    if section.file is None:
        raise ConfigError("the run names no tokenizer", where=f"{checkpoint}: tokenizer.file", do="give --tokenizer FILE")
    if not Path(section.file).is_file():
        raise ConfigError("the run's tokenizer is not there", where=f"{checkpoint}: tokenizer.file", got=section.file, do="give --tokenizer FILE")
    return Tokenizer(section.file, section.eod_token)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Prompts of the command line and of the prompt file.

    Raises:
        ConfigError: none given, or a file that cannot be read.
    """
    prompts = list(args.prompt)
    if args.prompt_file is not None:
        try:
            lines = Path(args.prompt_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("cannot read the prompts", where=args.prompt_file, got=error, want="a UTF-8 text file, one prompt per line") from error
        prompts += [line for line in lines if line]
    if not prompts:
        raise ConfigError("no prompt", where="neox generate", want="--prompt TEXT or --prompt-file FILE")
    return prompts


class _Printer:
    """Prints the text of a single prompt while it is generated, whole characters only."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = 0

    def __call__(self, prompt: int, token: int) -> None:
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if text.endswith(UNDECODED):
            return
        sys.stdout.write(text[self._shown :])
        sys.stdout.flush()
        self._shown = len(text)


def run(args: argparse.Namespace) -> int:
    """Generate and print; returns the exit code."""
    params = SamplingParams(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    prompts = read_prompts(args)
    device = usable_device(args.device)
    checkpoint = resolve(args.checkpoint)
    tokenizer = run_tokenizer(checkpoint, args.tokenizer)
    model = load_model(checkpoint, dtype=DTYPES[args.dtype], device=device)
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    streams = len(prompts) == 1 and not args.json
    if streams:
        sys.stdout.write(prompts[0])
    printer = _Printer(tokenizer) if streams else None
    results = generate(model, encoded, params, eod_id=tokenizer.eod_id, use_cache=not args.no_cache, on_token=printer)
    texts = [tokenizer.decode(tokens) for tokens in results]
    if args.json:
        print(json.dumps([{"prompt": p, "text": t, "tokens": r} for p, t, r in zip(prompts, texts, results, strict=True)], ensure_ascii=False))
    elif streams:
        print()
    else:
        for prompt, text in zip(prompts, texts, strict=True):
            print(f"--- {prompt}{text}")
    return 0
