"""How deep the call stack is between the command and the first matrix product: what a reader, a debugger or a
profiler has to walk through.
"""

from __future__ import annotations

import json
import traceback
from pathlib import Path

from torch.utils._python_dispatch import TorchDispatchMode

import neox
from neox.cli.main import main
from tests.distributed import run_ranks
from tests.train.corpus import config_text, make_corpus

# Frames of this package from neox.cli.train.run: to the model (exclusive), and to the caller of the product
# (inclusive).
TO_THE_MODEL, LIMIT = 7, 12
PACKAGE = Path(neox.__file__).parent
PRODUCTS = {"mm", "addmm", "bmm", "linear", "matmul"}


class FirstProduct(TorchDispatchMode):
    """The frames of this package at the first product of a step."""

    def __init__(self):
        super().__init__()
        self.frames: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not self.frames and function.overloadpacket.__name__ in PRODUCTS:
            stack = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(PACKAGE)]
            frames = [f"{Path(frame.filename).relative_to(PACKAGE)}:{frame.name}" for frame in stack]
            if "engine/engine.py:train_step" in frames:  # not the product that measures the CPU
                self.frames = frames[frames.index("cli/train.py:run") :]
        return function(*args, **(kwargs or {}))


def record(out: str, *options: str) -> None:
    """Entry of a process: trains, and writes the exit code and the frames to `out`."""
    with FirstProduct() as first:
        code = main(["train", *options])
    Path(out).write_text(json.dumps([code, first.frames]))


def test_few_frames_are_between_the_command_and_the_first_product(tmp_path):
    make_corpus(tmp_path / "corpus")
    (tmp_path / "tiny.yml").write_text(config_text(tmp_path / "corpus", tmp_path / "run"))
    options = [
        "--conf",
        tmp_path / "tiny.yml",
        "--set",
        "train.train_iters=3",
        "evaluate.interval=0",
        "checkpoint.save_interval=0",
    ]
    run_ranks("tests.train.test_frames:record", 1, tmp_path, [tmp_path / "out", *options])
    code, frames = json.loads((tmp_path / "out").read_text())
    assert code == 0 and frames[0] == "cli/train.py:run"
    assert frames.index("model/gpt.py:forward") <= TO_THE_MODEL, "\n".join(frames)
    assert len(frames) <= LIMIT, "\n".join(frames)
