"""Draws the README's picture from the run that `make demo` leaves:
`python demo/picture.py runs/demo/run docs/images/demo-run.svg`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from neox.report.plot import Line, plot

STYLE = (
    "svg { background: #fff } text { font: 11px system-ui, sans-serif; fill: #444 } text.n { font-weight: 600 } .g { "
    "stroke: #ddd }"
)
TITLE = "make demo: loss of a 5 M parameter model, killed with SIGKILL after step {kill} and resumed from step {saved}"


def read_steps(path: Path) -> list[dict]:
    """Read a metrics file; returns its objects in the order of steps."""
    return sorted(map(json.loads, path.read_text(encoding="utf-8").splitlines()), key=lambda entry: entry["step"])


def picture(run_dir: Path) -> str:
    """Plot the loss before the kill and after the resume, and the validation loss. Returns SVG text."""
    steps, dropped = read_steps(run_dir / "metrics.jsonl"), read_steps(run_dir / "metrics.dropped.jsonl")
    saved, kill = dropped[0]["step"] - 1, dropped[-1]["step"]
    before = [entry for entry in steps if entry["step"] <= saved] + dropped
    lines = [
        Line("before the kill", [(entry["step"], entry["loss"]) for entry in before]),
        Line(
            "resumed: identical where they overlap",
            [(entry["step"], entry["loss"]) for entry in steps if entry["step"] > saved],
            1,
        ),
        Line(
            "validation",
            [(entry["step"], entry["validation_loss"]) for entry in steps if entry.get("validation_loss")],
            2,
            dots=True,
        ),
    ]
    svg = re.search(r"<svg.*</svg>", plot(TITLE.format(kill=kill, saved=saved), lines), re.DOTALL).group()
    return (
        svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", f"><style>{STYLE}</style>", 1)
        + "\n"
    )


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(picture(source), encoding="utf-8")
