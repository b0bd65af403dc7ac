"""Installing: what pip's isolated build finds, what a wheel holds, and what paths the Makefile copes with."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ISOLATED = ("setuptools", "pybind11")  # what pip puts into the build environment and setup.py imports first

# As pip's own sitecustomize: packages of the environment are not found in an isolated build.
SITECUSTOMIZE = """import sys, sysconfig
hidden = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
sys.path[:] = [path for path in sys.path if path not in hidden]
"""


def setup_py(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py in the checkout."""
    env = {**os.environ, "NEOX_BUILD_ISA": "portable", **variables}
    return subprocess.run(
        [sys.executable, "setup.py", *map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )


def test_an_isolated_build_finds_the_torch_of_the_environment(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    for name in ISOLATED:
        (tmp_path / name).symlink_to(Path(sysconfig.get_path("purelib")) / name)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    hidden = subprocess.run(
        [sys.executable, "-c", "import torch"], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "No module named 'torch'" in hidden.stderr
    found = setup_py("--name", PYTHONPATH=str(tmp_path))
    assert found.returncode == 0, found.stderr
    assert found.stdout.split()[-1] == "neox-train"


def installed_wheel(site: Path) -> None:
    """Build a wheel by pip, install it into a folder, and compare its modules, presets and launch files."""
    options = ["-q", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(site), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *options], check=True)
    modules = {path.relative_to(site) for path in (site / "neox").rglob("*.py") if "share" not in path.parts}
    assert modules == {path.relative_to(ROOT) for path in (ROOT / "neox").rglob("*.py")}
    share = site / "neox" / "share"
    want = {
        path.relative_to(ROOT)
        for folder in ("configs", "launch")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    } | {Path("train.py")}
    found = {path.relative_to(share) for path in share.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert found == want
    assert all((share / name).read_bytes() == (ROOT / name).read_bytes() for name in want)


FIVE_STEPS = """
include: [pythia/14M.yml]
tokenizer: {file: tokenizer.json}
model: {vocab_size: 300}
data: {path: data/mine, split: "98,2,0", seq_length: 64}
precision: {dtype: fp32}
train: {train_iters: 5, micro_batch_size: 2, gradient_accumulation: 1, global_batch_size: null}
schedule: {warmup_iters: 1, decay_iters: 5}
run: {dir: runs/mine}
"""


def test_a_wheel_holds_presets_and_launch_files_and_trains_from_an_empty_folder(tmp_path):
    """Built by pip, installed on its own, used where there is no checkout: a preset, a new project, data, five
    steps, generation.
    """
    site = tmp_path / "site"
    installed_wheel(site)
    empty = tmp_path / "empty"
    empty.mkdir()
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    env |= {"PYTHONPATH": str(site), "LOCAL_RANK": "0"}

    def run(*words: str, folder: Path = empty / "project") -> str:
        done = subprocess.run(
            [sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    neox = ("-m", "neox.cli.main")
    assert run("-c", "import neox; print(neox.__file__)", folder=empty).startswith(str(site))
    assert str(site / "neox" / "share" / "configs") in run(*neox, "config", "show", "pythia/14M.yml", folder=empty)
    assert "train.py" in run(*neox, "init", "project", folder=empty)
    made = empty / "project" / "launch" / "slurm.sh"
    assert made.read_bytes() == (ROOT / "launch" / "slurm.sh").read_bytes()
    (empty / "project" / "text.txt").write_text(
        "".join(f"Line {number} of a small text, {number**2} in all.\n" for number in range(500))
    )
    run(*neox, "tokenizer", "train", "--input", "text.txt", "--vocab-size", "300", "--out", "tokenizer.json")
    run(*neox, "preprocess", "--input", "text.txt", "--tokenizer", "tokenizer.json", "--out", "data/mine")
    (empty / "project" / "mine.yml").write_text(FIVE_STEPS)
    assert "done: step 5 of 5" in run("train.py", "--conf", "mine.yml")
    assert run(
        *neox, "generate", "--checkpoint", "runs/mine", "--prompt", "Line 7 of", "--max-new-tokens", "4"
    ).startswith("Line 7 of")


@pytest.mark.parametrize("folder", ["plain", "a b ü"])
def test_make_reads_file_names_in_a_folder_of_any_name(folder, tmp_path):
    """Stamps of a finished set-up are found whatever the checkout's path holds: there is nothing left to do."""
    checkout = tmp_path / folder
    (checkout / "csrc").mkdir(parents=True)
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "setup.py"):
        (checkout / name).write_bytes((ROOT / name).read_bytes())
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "VENV", "PY", "TORCH")
    }
    plan = subprocess.run(["make", "-n", "setup"], cwd=checkout, env=env, capture_output=True, text=True, check=False)
    assert plan.returncode == 0 and f'-m venv "{checkout}/.venv"' in plan.stdout, plan.stderr
    stamps = [line.split('"')[1] for line in plan.stdout.splitlines() if line.startswith("touch ")]
    assert len(stamps) == 2
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").touch()
    for stamp in stamps:
        (checkout / stamp).parent.mkdir(parents=True, exist_ok=True)
        (checkout / stamp).touch()
    done = subprocess.run(["make", "-n", "setup"], cwd=checkout, env=env, capture_output=True, text=True, check=False)
    assert "Nothing to be done" in done.stdout, done.stdout + done.stderr
