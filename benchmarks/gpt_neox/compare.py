"""Train the same YAML files with the original GPT-NeoX and with neox on this CPU, and compare:
`python compare.py CHECKOUT`.

CHECKOUT is a clone of EleutherAI/gpt-neox; its code runs in processes of its own (upstream.py), and builds its C++
helper in its folder. For each form of forms.py GPT-NeoX trains 20 steps and saves steps 0 and 20. Then

- `neox import` of step 20 must give GPT-NeoX's logits on a probe,
- `neox train` with the same YAML file, from the imported step 0 and in the same parallel layout, must give its loss at
  every step.

A row per form; exit code 1 where a difference is above --logits or --losses. Nothing but this environment is needed
(pybind11 and make build the helper); a form takes half a minute to two minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from forms import FORMS, STEPS, documents, probe_tokens, processes, write_form, write_tokenizer

from neox.generate.generate import load_model

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TIMEOUT = 900
EXTENSIONS = tempfile.TemporaryDirectory(prefix="gpt-neox-extensions-")  # of this process, which removes it


def main() -> int:
    """Compare the forms that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="clone of EleutherAI/gpt-neox")
    parser.add_argument(
        "--forms",
        nargs="+",
        default=list(FORMS),
        choices=FORMS,
        metavar="NAME",
        help=f"default: all of {', '.join(FORMS)}",
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the files here; default: a temporary folder")
    parser.add_argument(
        "--logits", type=float, default=1e-5, help="largest difference of logits (default: %(default)g)"
    )
    parser.add_argument(
        "--losses", type=float, default=2e-6, help="largest difference of losses (default: %(default)g)"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings for neox train on top of the YAML files"
    )
    args = parser.parse_args()
    work = (args.keep or Path(tempfile.mkdtemp(prefix="gpt-neox-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    try:
        prepare(args.checkout, work)
        print(
            f"{'form':<20} {'logits differ by':>17} {'losses differ by':>17}   last loss of GPT-NeoX, neox", flush=True
        )
        failed = [name for name in args.forms if not compare(name, args, work)]
    finally:
        if args.keep is None:
            shutil.rmtree(work)
    print(f"FAIL: {', '.join(failed)}" if failed else f"all {len(args.forms)} forms agree")
    return 1 if failed else 0


def prepare(checkout: Path, work: Path) -> None:
    """The tokenizer, and the dataset, which GPT-NeoX writes."""
    write_tokenizer(work / "tokenizer.json")
    job = work / "data-job.json"
    job.write_text(json.dumps({"data": str(work / "data"), "documents": documents()}))
    run_ranks([sys.executable, str(HERE / "upstream.py"), str(checkout), str(job)], 1, work / "data")


def compare(name: str, args: argparse.Namespace, work: Path) -> bool:
    """Train a form in both programs; prints a row, and returns whether they agree."""
    folder = work / name
    theirs = train_theirs(name, args.checkout, work)
    logits = logits_difference(folder)
    ours = train_ours(folder, folder / f"{name}.yml", processes(FORMS[name]), args.set)
    losses = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
    print(f"{name:<20} {logits:>17.2e} {losses:>17.2e}   {theirs[-1]:.6f}, {ours[-1]:.6f}", flush=True)
    return logits <= args.logits and losses <= args.losses


def train_theirs(name: str, checkout: Path, work: Path, changes: dict[str, object] | None = None) -> list[float]:
    """Losses of GPT-NeoX; its checkpoints, the YAML file and `logits.npy` are left in the form's folder."""
    folder = work / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yaml = write_form(name, folder, work / "data", work / "tokenizer.json", changes or {})
    job = folder / "job.json"
    job.write_text(json.dumps({"conf": [str(yaml)], "out": str(folder), "tokens": probe_tokens()}))
    run_ranks(
        [sys.executable, str(HERE / "upstream.py"), str(checkout), str(job)],
        processes(FORMS[name]),
        folder / "upstream",
    )
    return json.loads((folder / "losses.json").read_text())


def logits_difference(folder: Path) -> float:
    """Import the last step and compare its logits on the probe."""
    neox("import", "--from", folder / "checkpoints" / f"global_step{STEPS}", "--out", folder / "imported")
    want = torch.from_numpy(numpy.load(folder / "logits.npy"))
    with torch.inference_mode():
        got = load_model(folder / "imported")(torch.tensor(probe_tokens())).float()
    return float((got - want[..., : got.shape[-1]]).abs().max())


def train_ours(folder: Path, yaml: Path, ranks: int, settings: list[str]) -> list[float]:
    """Losses of neox, from the imported step 0."""
    neox("import", "--from", folder / "checkpoints" / "global_step0", "--conf", yaml, "--out", folder / "start")
    settings = [f"run.dir={folder / 'run'}", f"checkpoint.init_from={folder / 'start'}", *settings]
    run_ranks([sys.executable, str(ROOT / "train.py"), "--conf", str(yaml), "--set", *settings], ranks, folder / "ours")
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records]


def neox(*arguments: object) -> None:
    """Run a command of neox; ends this program where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "neox.cli.main", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    if done.returncode:
        raise SystemExit(f"neox {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}")


def run_ranks(command: list[str], ranks: int, logs: Path) -> None:
    """Run a command on some processes, their output in files; ends this program where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
        "PYTHONWARNINGS": "ignore",
        # DeepSpeed compiles an operator for it; in torch's shared folder, the lock of a killed process stops everyone.
        "TORCH_EXTENSIONS_DIR": EXTENSIONS.name,
    }
    running, files = [], []
    for rank in range(ranks):
        variables = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        files.append(Path(f"{logs}-{rank}.log"))
        with files[-1].open("w") as sink:
            running.append(subprocess.Popen(command, env=os.environ | variables, stdout=sink, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(TIMEOUT) for process in running]
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
    if any(codes):
        worst = next(i for i, code in enumerate(codes) if code)
        raise SystemExit(
            f"{' '.join(command)}\nexit codes {codes}\n" + files[worst].read_text(errors="replace")[-4000:]
        )


if __name__ == "__main__":
    sys.exit(main())
