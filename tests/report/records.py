"""Folders of runs as the train loop leaves them, with what a report should show."""

from __future__ import annotations

import json
from pathlib import Path

from neox.config.schema import Config
from neox.config.values import dump


def write_run(
    folder: Path, *, steps: int = 120, lr: float = 1e-3, spike: int | None = 80, skipped: int | None = 30
) -> Path:
    """A run of falling loss with a spike and a skipped update."""
    folder.mkdir(parents=True)
    config = Config(
        model={"vocab_size": 100},
        data={"train": [{"path": "<a>", "weight": 3.0}, "b"]},
        optimizer={"lr": lr},
        train={"train_iters": steps},
    )
    (folder / "config.lock.yml").write_text(dump(config))
    rows = []
    for step in range(1, steps + 1):
        loss = 4.0 - step / steps + (6.0 if step == spike else 0.0)
        row = {
            "step": step,
            "loss": loss,
            "lr": lr * step / steps,
            "grad_norm": None if step == skipped else 1.0 / step,
            "tokens": 256 * step,
        }
        row |= {
            "tokens_per_s": 1000.0 + step,
            "mfu": 0.4,
            "memory_gb": 1.5,
            "step_time": 0.5,
            "samples": step,
            "tflops": 1.0,
        }
        if step % 40 == 0:
            row["validation_loss"] = loss + 0.1
        rows.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "log.txt").write_text("step 1/120 loss 4\nresumed from runs/x at step 60\n<b>step</b> 61\n")
    return folder
