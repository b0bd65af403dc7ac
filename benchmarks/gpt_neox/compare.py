"""Train the same YAML files with the original GPT-NeoX and with neox on this CPU, and compare:
`python compare.py CHECKOUT`.

CHECKOUT is a clone of EleutherAI/gpt-neox. Its code runs in separate processes (upstream.py), and builds its C++ helper
in the clone with pybind11 and make. For each form of forms.py GPT-NeoX trains 20 steps and saves steps 0 and 20. Then

- `neox import` of step 20 must give GPT-NeoX's logits on the probe tokens;
- `neox train` with the same YAML file, from the imported step 0 and in the same parallel layout, must give its loss at
  every step.

It prints a row per form, and exits with 1 if a difference is above --logits or --losses. A form takes half a minute to
two minutes. No package beyond neox's own is needed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from forms import FORMS, STEPS, documents, probe_tokens, processes, write_form, write_tokenizer
from ranks import run_ranks

from neox.generate.generate import load_model

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TIMEOUT = 900  # seconds of a command
# DeepSpeed compiles an operator for GPT-NeoX. In torch's shared folder the lock of a killed process blocks all others.
EXTENSIONS = tempfile.TemporaryDirectory(prefix="gpt-neox-extensions-")
VARIABLES = {"TORCH_EXTENSIONS_DIR": EXTENSIONS.name, "PYTHONWARNINGS": "ignore"}


def main() -> int:
    """Compare the forms given by --forms. Return 1 if one differs."""
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
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of neox train that override the YAML files"
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
    """Write the tokenizer, and by GPT-NeoX the dataset."""
    write_tokenizer(work / "tokenizer.json")
    job = work / "data-job.json"
    job.write_text(json.dumps({"data": str(work / "data"), "documents": documents()}))
    run_upstream(checkout, job, 1, work / "data")


def compare(name: str, args: argparse.Namespace, work: Path) -> bool:
    """Train a form with both, print its row, and return whether they agree."""
    folder = work / name
    expected = train_upstream(name, args.checkout, work)
    logits = logits_difference(folder)
    losses = train_neox(folder, folder / f"{name}.yml", processes(FORMS[name]), args.set)
    difference = max(abs(a - b) for a, b in zip(expected, losses, strict=True))
    print(f"{name:<20} {logits:>17.2e} {difference:>17.2e}   {expected[-1]:.6f}, {losses[-1]:.6f}", flush=True)
    return logits <= args.logits and difference <= args.losses


def train_upstream(name: str, checkout: Path, work: Path, changes: dict[str, object] | None = None) -> list[float]:
    """Train with GPT-NeoX, which writes its checkpoints and `logits.npy` to the form's folder. Return its losses."""
    folder = work / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yaml = write_form(name, folder, work / "data", work / "tokenizer.json", changes or {})
    job = folder / "job.json"
    job.write_text(json.dumps({"conf": [str(yaml)], "out": str(folder), "tokens": probe_tokens()}))
    run_upstream(checkout, job, processes(FORMS[name]), folder / "upstream")
    return json.loads((folder / "losses.json").read_text())


def logits_difference(folder: Path) -> float:
    """Import the last step; return the largest difference of its logits on the probe tokens."""
    neox("import", "--from", folder / "checkpoints" / f"global_step{STEPS}", "--out", folder / "imported")
    want = torch.from_numpy(numpy.load(folder / "logits.npy"))
    with torch.inference_mode():
        got = load_model(folder / "imported")(torch.tensor(probe_tokens())).float()
    return float((got - want[..., : got.shape[-1]]).abs().max())


def train_neox(folder: Path, yaml: Path, ranks: int, settings: list[str]) -> list[float]:
    """Train with neox from the imported step 0. Return its losses."""
    neox("import", "--from", folder / "checkpoints" / "global_step0", "--conf", yaml, "--out", folder / "start")
    settings = [f"run.dir={folder / 'run'}", f"checkpoint.init_from={folder / 'start'}", *settings]
    run_ranks(
        [sys.executable, str(ROOT / "train.py"), "--conf", str(yaml), "--set", *settings],
        ranks,
        folder / "neox",
        VARIABLES,
    )
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records]


def neox(*arguments: object) -> None:
    """Run a command of neox. Ends the program if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "neox.cli.main", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    if done.returncode:
        raise SystemExit(f"neox {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}")


def run_upstream(checkout: Path, job: Path, ranks: int, logs: Path) -> None:
    """Run upstream.py on some processes."""
    run_ranks([sys.executable, str(HERE / "upstream.py"), str(checkout), str(job)], ranks, logs, VARIABLES, TIMEOUT)


if __name__ == "__main__":
    sys.exit(main())
