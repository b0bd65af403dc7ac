"""Runs `neox` from text to generation: 20 training steps, the same steps with a kill and a resume, and a prompt.

The text, and so the tokenizer, is this repository's documentation. `train_and_resume.py --device cuda` trains in bf16
with ZeRO 1 and, for 10 steps, in fp16; `--device cpu` trains a smaller model in fp32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import record
from gpu.calls import ROOT

STEPS, KILL_AT, FP16_STEPS = 20, 10, 10
DIFFERS = 4  # exit code of verify-resume


class Failed(Exception):
    """A part of this program failed."""


def neox(*words: object, wanted: tuple[int, ...] = (0,)) -> tuple[str, float]:
    """Run `neox ...` and return its output and its seconds.

    Raises:
        Failed: its exit code is not one of `wanted`.
    """
    command = [sys.executable, "-m", "neox.cli.main", *map(str, words)]
    start = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.monotonic() - start
    if done.returncode not in wanted:
        print(done.stdout)
        record.add(
            {"command": " ".join(map(str, words))[:300], "exit code": done.returncode, "output": done.stdout[-2000:]}
        )
        raise Failed(f"neox {words[0]}: exit code {done.returncode}: {done.stdout.strip().splitlines()[-1:]}")
    return done.stdout, seconds


def config(folder: Path, device: str) -> Path:
    """Write the config of the run and return its path."""
    wide = device == "cuda"
    text = {
        "model": {
            "num_layers": 6 if wide else 2,
            "hidden_size": 512 if wide else 64,
            "num_attention_heads": 8 if wide else 4,
            "max_position_embeddings": 512 if wide else 64,
            "rotary_pct": 0.25,
            "parallel_residual": True,
        },
        "tokenizer": {"file": str(folder / "tokenizer.json")},
        "data": {"train": [str(folder / "text")], "seq_length": 512 if wide else 64},
        "optimizer": {"lr": 0.001},
        "schedule": {"type": "cosine", "warmup_iters": 3},
        "precision": {"dtype": "bf16" if wide else "fp32"},
        "zero": {"stage": 1},
        "train": {"train_iters": STEPS, "micro_batch_size": 8, "global_batch_size": 16 if wide else 8},
        "logging": {"tensorboard": False},
        "run": {"dir": str(folder / "unused")},
    }
    path = folder / "run.yml"
    path.write_text(json.dumps(text))  # JSON is YAML
    return path


def prepare(folder: Path) -> None:
    """Train the tokenizer and preprocess the text."""
    text, tokenizer = ("--input", ROOT / "docs", "--suffix", ".md"), folder / "tokenizer.json"
    neox("tokenizer", "train", *text, "--vocab-size", 1024, "--out", tokenizer)
    neox("preprocess", *text, "--tokenizer", tokenizer, "--out", folder / "text")


def record_losses(name: str, run: Path) -> None:
    """Record first and last loss of a run, and the median tokens/s of its second half.

    Raises:
        Failed: its loss did not decrease.
    """
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = sorted(row["tokens_per_s"] for row in rows[len(rows) // 2 :] if row.get("tokens_per_s"))
    first, last = rows[0]["loss"], rows[-1]["loss"]
    row = {"run": name, "steps": len(rows), "first loss": first, "last loss": last}
    row |= {"tokens/s": rates[len(rates) // 2] if rates else None, "memory_gb": rows[-1].get("memory_gb")}
    record.add(row)
    print(row)
    if not last < first:
        raise Failed(f"{name}: the loss did not decrease: {first} to {last}")


def kill_and_resume(folder: Path, path: Path) -> None:
    """Train without interruption, train with a kill, and resume; the resumed run must match bit for bit.

    Raises:
        Failed: they differ, or the loss did not decrease.
    """
    options = ("--steps", STEPS, "--kill-at", KILL_AT, "--json", "--dir", folder / "runs")
    straight = folder / "runs" / "straight"
    try:
        output, seconds = neox("verify-resume", path, *options, wanted=(0, DIFFERS))
        rows = json.loads(output.strip().splitlines()[-1])
        record.add({"compared": len(rows), "differ": [row["name"] for row in rows if not row["equal"]], "s": seconds})
    finally:  # also if a later run fails or runs out of time
        if (straight / "metrics.jsonl").exists():
            record_losses(f"{STEPS} steps", straight)
    if not all(row["equal"] for row in rows):
        raise Failed("the resumed run differs")


def generate(folder: Path, device: str) -> None:
    """Generate text from the newest checkpoint of these runs."""
    run = next((folder / "runs" / name for name in ("resumed", "straight") if (folder / "runs" / name).exists()), None)
    if run is None:
        raise Failed("there is no run to generate from")
    prompt = ("--prompt", "The kernels", "--max-new-tokens", 20, "--temperature", 0, "--device", device, "--json")
    output, seconds = neox("generate", "--checkpoint", run, *prompt)
    record.add({"generated": json.loads(output)[0]["text"], "seconds": seconds})


def train_fp16(folder: Path, path: Path) -> None:
    """Train in fp16 with a loss scale, which only a GPU runs."""
    options = ("precision.dtype=fp16", f"train.train_iters={FP16_STEPS}", f"run.dir={folder / 'fp16'}")
    neox("train", "--conf", path, "--set", *options)
    record_losses(f"{FP16_STEPS} steps in fp16", folder / "fp16")


def main() -> int:
    """Returns the exit code: 0 if the resume is bitwise, the losses fall and text is generated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    device = parser.parse_args().device
    problems = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = config(folder, device)
        prepare(folder)
        parts = [partial(kill_and_resume, folder, path), partial(generate, folder, device)]
        for part in [*parts, *([partial(train_fp16, folder, path)] if device == "cuda" else [])]:
            try:
                part()
            except Failed as problem:  # the other parts still run
                problems.append(str(problem))
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
