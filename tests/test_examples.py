"""Every example runs, on a corpus of the documentation's own pages, and does what its first lines promise."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fork_server import fork_server

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
STEPS = 4


# A command of an example, in bash: it leaves its name and arguments in $ASK and waits for its exit code and output.
# A fork of a warm process answers them (tests/fork_server.py); each would else import torch and deepspeed for itself.
ASKING = """#!/usr/bin/env bash
if [ "${0##*/}" = python ] && [ "${1##*/}" != train.py ]; then exec %s "$@"; fi
mkfifo "$ASK/$$.answer"
printf '%%s\\0' "${0##*/}" "$@" > "$ASK/$$.part" && mv "$ASK/$$.part" "$ASK/$$.request"
code=$(cat "$ASK/$$.answer")
cat "$ASK/$$.output"
exit "$code"
"""


def answer(request: Path) -> None:
    """Run the command of a request: `neox ...`, `python train.py ...` or `torchrun --nproc-per-node N train.py ...`."""
    program, *words = request.read_text(encoding="utf-8").split("\0")[:-1]
    ranks = 1
    if program != "neox":
        script = [Path(word).name for word in words].index("train.py")
        options, words = words[:script], ["train", *words[script + 1 :]]
        assert options == ([] if program == "python" else ["--standalone", "--nproc-per-node", options[-1]])
        ranks = int(options[-1]) if options else 1
    results = fork_server().command(words, request.parent / request.stem, ranks=ranks).results(600)
    request.with_suffix(".output").write_text("".join(result.output for result in results), encoding="utf-8")
    request.unlink()
    request.with_suffix(".answer").write_text(str(max(abs(result.returncode) for result in results)))


def run(name: str, folder: Path, *words: object, **variables: str) -> str:
    """Run a script of examples/ with small sizes and return its output; `folder` is for the commands it starts."""
    (folder / "bin").mkdir()
    for program in ("neox", "python", "torchrun"):
        (folder / "bin" / program).write_text(ASKING % shlex.quote(sys.executable))
        (folder / "bin" / program).chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "ASK": str(folder),
        "STEPS": str(STEPS),
        **variables,
    }
    command = ["bash", str(EXAMPLES / name), *map(str, words)]
    with (folder / "printed").open("wb") as sink:
        script = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        while script.poll() is None:
            for request in folder.glob("*.request"):
                answer(request)
            time.sleep(0.01)
    finally:
        with contextlib.suppress(ProcessLookupError):  # its commands too, where an answer failed
            os.killpg(script.pid, signal.SIGKILL)
        script.wait()
    printed = (folder / "printed").read_text(encoding="utf-8")
    assert script.returncode == 0, printed
    return printed


def losses(run_dir: Path) -> list[float]:
    """The loss of every step, in order."""
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def module(name: str):
    """An example that is a Python module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """What examples/own_data.sh writes."""
    folder = tmp_path_factory.mktemp("my data")
    (folder / "texts").mkdir()
    for page in sorted((ROOT / "docs").glob("[a-m]*.md")):
        (folder / "texts" / f"{page.stem}.txt").write_bytes(page.read_bytes())
    out = run("own_data.sh", tmp_path_factory.mktemp("commands"), folder / "texts", folder, VOCAB="600", CONTEXT="64")
    assert "FITS" in out and "bits per byte" in out and "\nThe " in out
    return folder


def test_training_on_a_folder_of_text_learns(own):
    assert len(losses(own / "run")) == STEPS
    assert losses(own / "run")[-1] < losses(own / "run")[0]


def test_fine_tune_starts_from_the_model(own, tmp_path):
    turns = [
        [{"role": "user", "content": f"Count from {i}."}, {"role": "assistant", "content": f"{i} {i + 1}"}]
        for i in range(30)
    ]
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps({"messages": turn}) + "\n" for turn in turns), encoding="utf-8"
    )
    out = run("fine_tune.sh", tmp_path, own / "run", tmp_path / "chats.jsonl", tmp_path)
    assert f"weights of {own}/run/checkpoints/step_{STEPS:08}" in out
    assert len(losses(tmp_path / "run")) == STEPS


@pytest.mark.distributed
def test_another_layout_continues_the_run(own, tmp_path):
    out = run("resume_on_another_layout.sh", tmp_path, own / "config.yml", tmp_path / "moved", STEPS="2")
    assert re.findall(r"ZeRO (\d)", out) == ["1", "2", "1"]
    assert [int(step) for step in re.findall(r"^step +(\d+)  loss", out, re.MULTILINE)] == list(range(1, 7))
    # the same weights and data in both layouts
    assert losses(tmp_path / "moved")[0] == pytest.approx(losses(own / "run")[0], rel=1e-5)


def test_operators_compute_what_torch_computes(capsys):
    module("operator_in_your_model").main()
    output, gradient = (float(value) for value in re.findall(r"(\d\.\de-\d+)$", capsys.readouterr().out, re.MULTILINE))
    assert 0 < output < 5e-6 and gradient < 1e-6


def test_the_custom_loop_makes_the_steps_of_a_run(own, capsys):
    module("custom_loop").main([str(own / "config.yml"), "--steps", "3"])
    found = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(found) == 3 and found[0] == pytest.approx(losses(own / "run")[0], abs=1e-4)
    assert found[-1] < found[0]


def test_every_example_is_listed_and_tested():
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    tests = Path(__file__).read_text(encoding="utf-8")
    scripts = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")]
    assert [name for name in scripts if name not in page or name.removesuffix(".py") not in tests] == []
