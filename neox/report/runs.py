"""The record of a run in its folder: metrics, config, log."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from neox.config.load import loads
from neox.config.schema import Config
from neox.config.values import flatten
from neox.errors import DataError
from neox.files import JsonObject

# Parts of the lines in log.txt that are incidents.
INCIDENTS = (
    "resumed from",
    "without this checkpoint",
    "without this record",
    "stopped",
    "error[",
    " -> ",
    "weights of",
)
SPIKE = 1.5  # x median of the losses before it
WINDOW = 50  # steps of the median


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        name: folder as given by the user.
        config: config of the last start.
        rows: metrics.jsonl, one mapping per step.
        events: lines of log.txt about anything but steps.
        plan: plan.json of a completed run: planned and measured bytes and seconds.
    """

    name: str
    config: Config
    rows: list[JsonObject]
    events: list[str]
    plan: JsonObject = field(default_factory=dict)

    def series(self, key: str) -> list[tuple[float, float]]:
        """Return (step, value) of every step that has a value."""
        return [(float(row["step"]), float(row[key])) for row in self.rows if isinstance(row.get(key), (int, float))]

    def incidents(self) -> list[str]:
        """List skipped updates, loss spikes, and incidents in the log."""
        found = [
            f"step {row['step']}: update skipped"
            for row in self.rows
            if "grad_norm" in row and row["grad_norm"] is None
        ]
        losses = self.series("loss")
        for i in range(WINDOW, len(losses)):
            middle = statistics.median(value for _, value in losses[i - WINDOW : i])
            if middle > 0 and losses[i][1] > SPIKE * middle:
                found.append(
                    f"step {losses[i][0]:.0f}: loss {losses[i][1]:.4g}, {losses[i][1] / middle:.2g} times the "
                    f"median of the {WINDOW} steps before"
                )
        return [*found, *self.events]

    def summary(self) -> dict[str, str]:
        """Summarise the run."""
        last, validation, speed = self.rows[-1], self.series("validation_loss"), self.series("tokens_per_s")
        out = {
            "steps": f"{last['step']:,} of {self.config.train.train_iters:,}",
            "tokens": f"{last.get('tokens', 0):,}",
            "last loss": f"{last['loss']:.4f}"
            if last["loss"] is not None
            else "no target"
            if last.get("targets") == 0
            else "not finite",
        }
        if validation:
            best = min(validation, key=lambda point: point[1])
            out |= {
                "last validation loss": f"{validation[-1][1]:.4f}",
                "best validation loss": f"{best[1]:.4f} at step {best[0]:.0f}",
            }
        if speed:
            out["tokens/s, median"] = f"{statistics.median(value for _, value in speed):,.0f}"
        out["time of the steps"] = f"{sum(value for _, value in self.series('step_time')) / 3600:.2f} h"
        memory = self.series("memory_gb")
        if memory:
            out["peak memory of a process"] = f"{max(value for _, value in memory):.2f} GB"
        for key, name, size, unit in (
            ("memory_bytes", "memory", 1e9, "GB"),
            ("step_seconds", "time of a step", 1.0, "s"),
        ):
            planned, measured = (self.plan.get(key, {}).get(which) for which in ("planned", "measured"))
            if planned and measured:
                out[f"{name}, planned and measured"] = (
                    f"{planned / size:.3g} and {measured / size:.3g} {unit} ({100 * (planned / measured - 1):+.0f} %)"
                )
        model = self.config.model
        out["model"] = (
            f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} heads, "
            f"vocabulary {model.vocab_size:,}"
        )
        return out


def read_run(folder: str | Path) -> RunRecord:
    """Read the folder of a run.

    Raises:
        DataError: metrics or config are missing or cannot be read.
    """
    path = Path(folder)
    try:
        lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        config = loads((path / "config.lock.yml").read_text(encoding="utf-8"), str(path / "config.lock.yml"))
        log = path / "log.txt"
        text = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    except OSError as error:
        raise DataError(
            "not the folder of a run",
            where=error.filename or path,
            got=error.strerror,
            want="metrics.jsonl and config.lock.yml",
            do="pass the folder run.dir",
        ) from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            float(row["step"])
            float(row["loss"] or 0.0)  # null: a skipped step
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # an incomplete line at the end of a running training
                break
            raise DataError("metrics cannot be read", where=f"{path / 'metrics.jsonl'}:{number}", got=error) from error
        rows.append(row)
    if not rows:
        raise DataError("no steps recorded", where=path / "metrics.jsonl", do="wait for the first step")
    events = [line for line in text if any(word in line for word in INCIDENTS)]
    return RunRecord(str(folder), config, rows, events, read_plan(path / "plan.json"))


def read_plan(path: Path) -> JsonObject:
    """Read plan.json of a run; empty if the run has not completed.

    Raises:
        DataError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            key: {which: content[key][which] for which in ("planned", "measured")}
            for key in ("memory_bytes", "step_seconds")
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError("cannot read plan.json", where=path, got=error, do="remove it") from error


def differences(runs: list[RunRecord]) -> list[tuple[str, list[str]]]:
    """List the config keys that differ between runs, with their values."""
    flat = [dict(flatten(run.config)) for run in runs]
    keys = dict.fromkeys(key for each in flat for key in each)
    rows = [(key, [str(each.get(key, "")) for each in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
