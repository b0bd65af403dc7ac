"""A training of 20 steps through the command line, again with a kill and a resume, and generation from its checkpoint.

Its tokenizer and its text come from this repository's documentation. `train_and_resume.py --device cuda` trains in
bf16 at ZeRO 1 and, for 10 steps, in fp16; `--device cpu` trains a smaller model in fp32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import record
from gpu.calls import ROOT

STEPS, KILL_AT, SHORT = 20, 10, 10


def neox(*words: object) -> tuple[str, float]:
    """Runs `neox ...` and returns its output and its seconds. Ends this program if it fails."""
    command = [sys.executable, "-m", "neox.cli.main", *map(str, words)]
    start = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.monotonic() - start
    if done.returncode:
        print(done.stdout)
        record.add(
            {"command": " ".join(map(str, words))[:300], "exit code": done.returncode, "output": done.stdout[-2000:]}
        )
        sys.exit(f"neox {words[0]}: exit code {done.returncode}: {done.stdout.strip().splitlines()[-1:]}")
    return done.stdout, seconds


def config(folder: Path, device: str) -> Path:
    """Writes the config of the run."""
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
    """The tokenizer and the data."""
    neox(
        "tokenizer",
        "train",
        "--input",
        ROOT / "docs",
        "--suffix",
        ".md",
        "--vocab-size",
        1024,
        "--out",
        folder / "tokenizer.json",
    )
    neox(
        "preprocess",
        "--input",
        ROOT / "docs",
        "--suffix",
        ".md",
        "--tokenizer",
        folder / "tokenizer.json",
        "--out",
        folder / "text",
    )


def measured(run: Path) -> dict[str, object]:
    """First and last loss, and the median rate of the second half."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = sorted(row["tokens_per_s"] for row in rows[len(rows) // 2 :] if row.get("tokens_per_s"))
    return {
        "first loss": rows[0]["loss"],
        "last loss": rows[-1]["loss"],
        "tokens/s": rates[len(rates) // 2] if rates else None,
        "memory_gb": rows[-1].get("memory_gb"),
    }


def learned(row: dict) -> None:
    """Records a run. Ends this program if its loss did not fall."""
    record.add(row)
    print(row)
    if not row["last loss"] < row["first loss"]:
        sys.exit(f"the loss did not fall: {row['first loss']} to {row['last loss']}")


def main() -> int:
    """Returns the exit code: 0 if the resume is bitwise, the losses fall and text is generated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    device = parser.parse_args().device
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        path = config(folder, device)
        runs = ("--steps", STEPS, "--kill-at", KILL_AT, "--json", "--dir", folder / "runs")
        output, seconds = neox("verify-resume", path, *runs)
        rows = json.loads(output.strip().splitlines()[-1])
        for row in rows:
            record.add({"compared": row["name"], "equal": row["equal"]})
        learned({"run": f"{STEPS} steps", "seconds of three runs": seconds, **measured(folder / "runs" / "straight")})
        prompt = ("--prompt", "The kernels", "--max-new-tokens", 20, "--temperature", 0, "--device", device, "--json")
        output, seconds = neox("generate", "--checkpoint", folder / "runs" / "resumed", *prompt)
        record.add({"generated": json.loads(output)[0]["text"], "seconds": seconds})
        if device == "cuda":
            short = ("precision.dtype=fp16", f"train.train_iters={SHORT}", f"run.dir={folder / 'fp16'}")
            _, seconds = neox("train", "--conf", path, "--set", *short)
            learned({"run": f"{SHORT} steps in fp16", "seconds": seconds, **measured(folder / "fp16")})
    return 0


if __name__ == "__main__":
    sys.exit(main())
