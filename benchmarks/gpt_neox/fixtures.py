"""Write the checkpoints of tests/convert/gpt_neox with the original GPT-NeoX: `python fixtures.py CHECKOUT OUT`.

Each is a form of forms.py at an even smaller size, trained on this CPU as in compare.py. OUT receives the folders of
steps as GPT-NeoX wrote them, without the optimizer's files; the logits and losses that GPT-NeoX computed; the dataset
that its builder wrote; and the tokenizer.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from compare import prepare, train_upstream
from forms import STEPS

STORED_STEPS = {
    "pythia-mp2-pp0": (0, STEPS),  # a file per rank
    "pythia-mp2-pp1": (STEPS,),  # a file per layer and rank
    "llama-mp2": (STEPS,),
    "gptj_tied-mp2": (STEPS,),
    "alibi-mp2": (STEPS,),
    "gpt2": (STEPS,),
}
SMALL = {
    "hidden_size": 16,
    "zero_optimization": {"stage": 1},
}  # at stage 1 the optimizer state is in separate files, which are not stored
CHANGES = {
    "pythia-mp2-pp0": {"rotary_pct": 0.5},
    "pythia-mp2-pp1": {"rotary_pct": 0.5},
    "llama-mp2": {"intermediate_size": 120},
}


def main() -> int:
    """Train the forms and copy what the tests read."""
    checkout, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpt-neox-") as folder:
        work = Path(folder)
        prepare(checkout, work)
        for name in ("data.bin", "data.idx", "tokenizer.json"):
            shutil.copyfile(work / name, out / name)
        for name, steps in STORED_STEPS.items():
            losses = train_upstream(name, checkout, work, SMALL | CHANGES.get(name, {}))
            target = out / name
            shutil.rmtree(target, ignore_errors=True)
            for step in steps:
                shutil.copytree(
                    work / name / "checkpoints" / f"global_step{step}",
                    target / f"global_step{step}",
                    ignore=shutil.ignore_patterns("*optim*"),
                )
            shutil.copyfile(work / name / "logits.npy", target / "logits.npy")
            (target / "losses.json").write_text(json.dumps(losses) + "\n")
            print(name, sum(path.stat().st_size for path in target.rglob("*") if path.is_file()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
