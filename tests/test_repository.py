"""The files around the code: workflows run targets that exist, hooks run tools that are installed, metadata agrees."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

import neox

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def make_targets(workflow: dict) -> set[str]:
    """The make targets that a workflow's jobs run, with the values of its matrix."""
    found = set()
    for job in workflow["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        for step in job["steps"]:
            for target in re.findall(r"\bmake ([a-z-]+|\$\{\{ matrix\.target \}\})", step.get("run", "")):
                found |= set(matrix["target"]) if "matrix" in target else {target}
    return found


def test_bytecode_is_no_native_source(tmp_path):
    """Tests leave it next to the script of the Unicode tables; newer than the installation, it would start it again."""
    for name in ("csrc/data/byte_pair.cpp", "csrc/data/unicode_tables.inc", "csrc/data/__pycache__/unicode_tables.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    words = [
        "make",
        "--no-print-directory",
        "-f",
        str(ROOT / "Makefile"),
        "--eval",
        "print-native: ; @echo $(NATIVE)",
        "print-native",
    ]
    printed = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60).stdout
    assert set(printed.split()) == {"csrc/data/byte_pair.cpp", "csrc/data/unicode_tables.inc"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_targets_that_exist(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert make_targets(workflow) and make_targets(workflow) <= TARGETS
    assert workflow["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())


def test_an_unknown_target_is_found():
    step = {"run": "make ${{ matrix.target }} && make nothing"}
    workflow = {"jobs": {"a": {"strategy": {"matrix": {"target": ["fuzz"]}}, "steps": [step]}}}
    assert make_targets(workflow) - TARGETS == {"nothing"}


@pytest.mark.parametrize("name", ["tests", "wheels"])
def test_every_supported_python_is_tested(name):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == PYTHONS
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'requires-python = ">={PYTHONS[0]}"' in project
    assert re.findall(r"Python :: (3\.\d+)", project) == PYTHONS


def test_pre_commit_runs_the_tools_of_make_lint():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    entries = [hook["entry"].split() for repo in config["repos"] for hook in repo["hooks"]]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^lint: static-checks\b", makefile, re.MULTILINE)
    assert re.search(r"^static-checks: types style\b", makefile, re.MULTILINE)
    lint = "".join(re.findall(r"^(?:lint|style):.*\n((?:\t.*\n)+)", makefile, re.MULTILINE))
    assert all(
        re.search(tool, lint) for tool in ("ruff check", "ruff format", "clang-format", "test_layout", "test_language")
    )
    assert {" ".join(entry[:2]) for entry in entries if entry[0] == "ruff"} == {"ruff check", "ruff format"}
    assert all((ROOT / word).exists() for entry in entries for word in entry if word.endswith(".py"))


def test_version_and_license_are_stated_once():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == neox.__version__
    assert citation["license"] in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_owned_folders_exist():
    lines = (ROOT / ".github" / "CODEOWNERS").read_text(encoding="utf-8").splitlines()
    patterns = [line.split()[0] for line in lines if line and not line.startswith("#")]
    assert [pattern for pattern in patterns if pattern != "*" and not (ROOT / pattern.lstrip("/")).exists()] == []


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_ask_for_what_is_needed(name):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(form)
    assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_the_picture_shows_both_parts_of_a_killed_run(tmp_path):
    spec = importlib.util.spec_from_file_location("picture", ROOT / "demo" / "picture.py")
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
    for name, steps in (("metrics.jsonl", range(1, 9)), ("metrics.dropped.jsonl", range(5, 7))):
        rows = [
            json.dumps({"step": step, "loss": 9.0 - step, "validation_loss": 5.0 if step == 4 else None})
            for step in steps
        ]
        (tmp_path / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    root = ElementTree.fromstring(picture.picture(tmp_path))
    assert "after step 6 and resumed from step 4" in root.attrib["aria-label"]
    curves = [line.attrib["points"].split() for line in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(points) for points in curves] == [6, 4, 1]  # steps 1 to 6, then 5 to 8; one validation
    assert curves[0][4:] == curves[1][:2]


def test_the_committed_picture_is_one_of_a_run():
    root = ElementTree.parse(ROOT / "docs" / "images" / "demo-run.svg").getroot()
    assert "killed with SIGKILL" in root.attrib["aria-label"]
    assert sum(len(line.attrib["points"].split()) for line in root.iter("{http://www.w3.org/2000/svg}polyline")) > 180
