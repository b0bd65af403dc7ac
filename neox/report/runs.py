"""The record of a run in its folder: metrics, config, log."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType

from neox.config.load import loads
from neox.config.schema import Config
from neox.config.values import flatten
from neox.errors import DataError
from neox.files import LARGEST_RECORD, JsonObject, JsonValue, parse_json, read_bytes, read_json, read_text

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
        skipped = [
            row["step"]
            for row in self.rows
            if self.config.computes_grad_norm and "grad_norm" in row and row["grad_norm"] is None
        ]
        found = [f"step {step}: update skipped" for step in skipped]
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
    log = path / "log.txt"
    try:
        lines = read_bytes(path / "metrics.jsonl", LARGEST_RECORD).split(b"\n")
        config = loads(read_text(path / "config.lock.yml"), str(path / "config.lock.yml"))
        text = read_bytes(log, LARGEST_RECORD).decode(errors="replace").splitlines() if os.path.isfile(log) else []
    except UnicodeDecodeError as error:
        raise DataError("config of the run is damaged", where=path / "config.lock.yml", got=error) from error
    except OSError as error:
        raise DataError(
            "not the folder of a run",
            where=error.filename or path,
            got=error.strerror,
            want="metrics.jsonl and config.lock.yml",
            do="pass the folder run.dir",
        ) from error
    rows = []
    while lines and not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(read_row(line))
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # an incomplete line at the end of a running training
                break
            raise DataError("metrics cannot be read", where=f"{path / 'metrics.jsonl'}:{number}", got=error) from error
    if not rows:
        raise DataError("no steps recorded", where=path / "metrics.jsonl", do="wait for the first step")
    events = [line for line in text if any(word in line for word in INCIDENTS)]
    return RunRecord(str(folder), config, rows, events, read_plan(path / "plan.json"))


def read_row(line: bytes) -> JsonObject:
    """Parse a line of metrics.jsonl: an object of numbers, texts and null, with `step` and `loss`.

    Raises:
        ValueError, KeyError, TypeError: it is something else.
    """
    row = parse_json(line)
    if not isinstance(row, dict) or isinstance(row["step"], bool) or not isinstance(row["step"], int):
        raise TypeError("not an object with a step")
    if not isinstance(row["loss"], (int, float, NoneType)):  # null: a skipped step
        raise TypeError(f"loss is {row['loss']!r}")
    if not isinstance(row.get("tokens", 0), int):
        raise TypeError(f"tokens is {row['tokens']!r}")
    return row


def read_plan(path: Path) -> JsonObject:
    """Read plan.json of a run; empty if the run has not completed.

    Raises:
        DataError: the file is damaged.
    """
    if not os.path.isfile(path):
        return {}
    try:
        content = read_json(path)
        found = {
            key: {which: content[key][which] for which in ("planned", "measured")}
            for key in ("memory_bytes", "step_seconds")
        }
        wrong = [value for each in found.values() for value in each.values() if not is_number(value)]
        if wrong:
            raise TypeError(f"{wrong[0]!r} is not a number")
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError("cannot read plan.json", where=path, got=error, do="remove it") from error


def is_number(value: JsonValue) -> bool:
    """Whether a JSON value is a number, or null for one that is unknown."""
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def differences(runs: list[RunRecord]) -> list[tuple[str, list[str]]]:
    """List the config keys that differ between runs, with their values."""
    flat = [dict(flatten(run.config)) for run in runs]
    keys = dict.fromkeys(key for each in flat for key in each)
    rows = [(key, [str(each.get(key, "")) for each in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
