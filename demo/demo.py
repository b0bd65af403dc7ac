"""The complete workflow on real text: `make demo`.

The corpus is the source code of Python's standard library. The demo trains a tokenizer, preprocesses, trains with
DeepSpeed, SIGKILLs the run halfway and resumes it, evaluates on held-out files, generates, and exports to Hugging Face.
Every step is a command that a user would type. It prints a table of PASS/FAIL lines, and exits with 1 if one failed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/demo.yml"
HELD_OUT_EVERY = 20  # one file in this many is held out
OVERLAP = 12  # steps computed twice: once before the kill, once after the resume
LOSS_BOUND = 0.60  # validation loss as a fraction of the loss of the first step
LOGIT_BOUND = 1e-4  # maximum difference of logits between neox and Hugging Face
COMMAND_TIMEOUT = 3600  # seconds; a training of the demo takes minutes, and more than 900 s on a busy machine


class DemoFailed(Exception):
    """A command failed, so the demo cannot continue."""


@dataclass
class Report:
    """Results of the checks."""

    lines: list[tuple[str, bool, str]] = field(default_factory=list)

    def check(self, name: str, passed: bool, detail: str) -> None:
        """Record and print one result."""
        self.lines.append((name, passed, detail))
        print(f"    {'PASS' if passed else 'FAIL'}  {detail}", flush=True)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(passed for _, passed, _ in self.lines)

    def show(self, seconds: float) -> None:
        """Print the table."""
        print("\n" + "-" * 100)
        for name, passed, detail in self.lines:
            print(f"{'PASS' if passed else 'FAIL'}  {name:<34} {detail}")
        print("-" * 100)
        print(
            f"{'PASS' if self.passed else 'FAIL'}  {sum(p for _, p, _ in self.lines)} of {len(self.lines)} checks, "
            f"{seconds:.0f} s"
        )


def command_line(*words: object) -> list[str]:
    """Return a command as a list of strings."""
    return [str(word) for word in words]


def neox(*words: object) -> list[str]:
    """Return `neox ...` with the running Python."""
    return command_line(sys.executable, "-m", "neox.cli.main", *words)


def train_command() -> list[str]:
    """Return `deepspeed --num_gpus 2 train.py --conf configs/demo.yml` with the running Python."""
    launcher = Path(sys.executable).with_name("deepspeed")
    return command_line(sys.executable, launcher, "--num_gpus", 2, ROOT / "train.py", "--conf", CONFIG)


def run(command: list[str], *, capture: bool = False) -> str:
    """Run a command in the repository root. Show its output, or return it with `capture`.

    Raises:
        DemoFailed: the exit code is not zero, or the command takes too long.
    """
    print("  $ " + " ".join(shown(word) for word in command), flush=True)
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment(),
            timeout=COMMAND_TIMEOUT,
            stdout=subprocess.PIPE if capture else None,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        raise DemoFailed(f"took longer than {COMMAND_TIMEOUT} s: {' '.join(command)}") from late
    if done.returncode != 0:
        raise DemoFailed(f"exit code {done.returncode}: {' '.join(command)}")
    return done.stdout or ""


def shown(word: str) -> str:
    """Format a word of a command as the user would type it."""
    word = word.replace(str(Path(sys.executable).parent) + "/", "").replace(str(ROOT) + "/", "")
    return f'"{word}"' if " " in word else word


def environment() -> dict[str, str]:
    """Return the environment of the commands: half of the cores for each of the two training processes."""
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))
    env["PATH"] = str(Path(sys.executable).parent) + os.pathsep + env.get("PATH", "")
    env["PYTHONPATH"] = str(ROOT) + (os.pathsep + env["PYTHONPATH"] if env.get("PYTHONPATH") else "")
    return env


def standard_library() -> list[Path]:
    """List the sources of the standard library in a fixed order, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
    found = [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]
    return [path for path in found if path.stat().st_size > 0]


def write_corpus(folder: Path) -> tuple[Path, Path]:
    """Write train.jsonl.gz and heldout.jsonl with one source file per line, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    train, heldout = folder / "train.jsonl.gz", folder / "heldout.jsonl"
    counts = [0, 0]
    with gzip.open(train, "wt", encoding="utf-8", compresslevel=3) as many, heldout.open("w", encoding="utf-8") as few:
        for number, path in enumerate(standard_library()):
            text = path.read_text(encoding="utf-8", errors="replace")
            held = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            (few if held else many).write(json.dumps({"text": text}) + "\n")
            counts[held] += len(text)
    print(
        f"  {counts[0] / 1e6:.1f} MB to train on, {counts[1] / 1e6:.1f} MB held out, from "
        f"{sysconfig.get_paths()['stdlib']}"
    )
    return train, heldout


def read_metrics(run_dir: Path) -> dict[int, dict]:
    """Return step -> line of metrics.jsonl, without an incomplete last line."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return {entry["step"]: entry for entry in map(json.loads, lines)}


def train_until_killed(run_dir: Path, checkpoint_step: int, kill_step: int) -> dict[int, dict]:
    """Start training and SIGKILL every process at `kill_step`. Return the metrics until then."""
    command = train_command()
    print("  $ " + " ".join(shown(word) for word in command) + f"        (killed at step {kill_step})", flush=True)
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True)
    deadline = time.monotonic() + COMMAND_TIMEOUT
    try:
        while kill_step not in read_metrics(run_dir):
            if process.poll() is not None:
                raise DemoFailed(f"training ended with exit code {process.returncode} before step {kill_step}")
            if time.monotonic() > deadline:
                raise DemoFailed(f"training did not reach step {kill_step} in {COMMAND_TIMEOUT} s")
            time.sleep(0.05)
    finally:
        kill_tree(process)
    metrics = read_metrics(run_dir)
    print(
        f"  killed every process with SIGKILL at step {max(metrics)}; the newest checkpoint is of step "
        f"{checkpoint_step}"
    )
    return metrics


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL the launcher and all its children. The launcher starts each rank in a separate session."""
    children = descendants(process.pid)
    for pid in [process.pid, *children]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # already exited
    process.wait()


def descendants(pid: int) -> list[int]:
    """Return the process ids of all children, grandchildren, ..."""
    table = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = [tuple(map(int, line.split())) for line in table.splitlines()]
    found, frontier = [], {pid}
    while frontier:
        frontier = {child for child, parent in parents if parent in frontier}
        found += sorted(frontier)
    return found


def check_resume(report: Report, before: dict[int, dict], after: dict[int, dict], checkpoint_step: int) -> None:
    """Check that the overlapping steps match bit for bit. JSON preserves every bit of a float."""
    twice = [step for step in before if step > checkpoint_step and step in after]
    different = [
        step
        for step in twice
        if any(before[step][key] != after[step][key] for key in ("loss", "grad_norm", "lr", "samples"))
    ]
    span = f"steps {min(twice)}-{max(twice)}" if twice else "no step"
    detail = f"{span} computed twice, {len(different)} differ in loss, gradient norm, lr or samples"
    report.check("resume is bitwise", len(twice) >= OVERLAP and not different, detail)


def prepare(work: Path, report: Report) -> None:
    """Train the tokenizer and preprocess the data."""
    print("\n[1] corpus and tokenizer")
    train, heldout = write_corpus(work / "corpus")
    run(neox("tokenizer", "train", "--input", train, "--vocab-size", 4096, "--out", work / "tokenizer.json"))
    print("\n[2] preprocess")
    for source, name in ((train, "train"), (heldout, "heldout")):
        run(
            neox(
                "preprocess",
                "--input",
                source,
                "--tokenizer",
                work / "tokenizer.json",
                "--out",
                work / "data" / name,
                "--workers",
                2,
            )
        )
        run(neox("data", "verify", work / "data" / name))
    report.check("data", True, "tokenized, indexed, checksums verified")


def train(work: Path, report: Report) -> None:
    """Train, kill, resume and finish."""
    print("\n[3] train, killed halfway")
    run_dir = work / "run"
    settings = json.loads(run(neox("config", "show", CONFIG, "--json"), capture=True))["config"]
    save_interval, train_iters = settings["checkpoint"]["save_interval"], settings["train"]["train_iters"]
    checkpoint_step = train_iters // 2 // save_interval * save_interval
    before = train_until_killed(run_dir, checkpoint_step, checkpoint_step + OVERLAP)
    print("\n[4] resume and finish")
    run(train_command())
    after = read_metrics(run_dir)
    check_resume(report, before, after, checkpoint_step)
    steps = sorted(after)
    report.check(
        "every step once", steps == list(range(1, train_iters + 1)), f"metrics.jsonl has steps {steps[0]}-{steps[-1]}"
    )
    speed = sorted(entry["tokens_per_s"] for entry in after.values())[len(after) // 2]
    first, last = before[1]["loss"], after[train_iters]["loss"]
    finite = all(math.isfinite(entry["loss"]) for entry in after.values())
    report.check(
        "training",
        finite and last < first,
        f"loss {first:.3f} -> {last:.3f} in {train_iters} steps, {speed:,.0f} tokens/s",
    )


def use(work: Path, report: Report) -> None:
    """Evaluate, generate, export and verify."""
    run_dir = work / "run"
    print("\n[5] evaluate on held-out files")
    result = json.loads(
        run(
            neox(
                "evaluate",
                "--checkpoint",
                run_dir,
                "--data",
                work / "data" / "heldout",
                "--max-documents",
                12,
                "--json",
            ),
            capture=True,
        )
    )
    first = read_metrics(run_dir)[1]["loss"]
    share = result["loss"] / first
    detail = (
        f"{result['loss']:.3f}, {100 * share:.0f} % of the first step's {first:.3f} (bound {100 * LOSS_BOUND:.0f} %)"
    )
    report.check("validation loss", share < LOSS_BOUND, detail)
    report.check(
        "bits per byte",
        0 < result["bits_per_byte"] < 8,
        f"{result['bits_per_byte']:.3f} over {result['bytes']:,} bytes",
    )
    print("\n[6] generate")
    prompt = "def __init__(self"
    sample = run(
        neox(
            "generate",
            "--checkpoint",
            run_dir,
            "--prompt",
            prompt,
            "--max-new-tokens",
            80,
            "--temperature",
            0.7,
            "--top-p",
            0.95,
        ),
        capture=True,
    )
    print("\n".join("    | " + line for line in sample.splitlines()))
    greedy = [
        neox(
            "generate",
            "--checkpoint",
            run_dir,
            "--prompt",
            prompt,
            "--max-new-tokens",
            40,
            "--temperature",
            0,
            "--json",
            *extra,
        )
        for extra in ([], ["--no-cache"])
    ]
    cached, uncached = (json.loads(run(command, capture=True))[0]["tokens"] for command in greedy)
    report.check(
        "generation",
        len(sample) > len(prompt) and cached == uncached,
        f"{len(cached)} greedy tokens, identical with and without the cache",
    )
    print("\n[7] export to Hugging Face")
    exported = json.loads(
        run(neox("export", "--checkpoint", run_dir, "--out", work / "huggingface", "--check", "--json"), capture=True)
    )
    difference = exported["max_logit_difference"]
    report.check(
        "export", difference <= LOGIT_BOUND, f"AutoModelForCausalLM loads it, largest logit difference {difference:.1e}"
    )
    print("\n[8] verify the checkpoint")
    run(neox("checkpoint", "verify", run_dir))
    report.check("checkpoint", True, "all checksums match")


def main() -> int:
    """Run all steps. Return 0 if all checks passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    os.chdir(ROOT)
    work = Path("runs/demo")  # as in configs/demo.yml
    shutil.rmtree(work, ignore_errors=True)
    report, start = Report(), time.monotonic()
    try:
        for part in (prepare, train, use):
            part(work, report)
    except DemoFailed as failure:
        report.check("stopped", False, str(failure))
    report.show(time.monotonic() - start)
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
