"""README, CONTRIBUTING and docs/: links and paths exist, commands parse, keys are known, and pages agree with the
code they describe.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from neox.cli.main import COMMANDS, parse
from neox.config.deepspeed_keys import DEEPSPEED_KEYS
from neox.config.values import known_keys
from neox.errors import ConfigError
from tests import language, sentences
from tests.source_rules import FLOORS

ROOT = Path(__file__).resolve().parent.parent
ROOT_PAGES = ("examples/README.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md")
PAGES = [*(ROOT / name for name in ROOT_PAGES), *sorted((ROOT / "docs").glob("*.md"))]
CURRENT = [page for page in PAGES if page.name != "log.md"]  # the log is history
KEY = re.compile(r"`((?:[a-z]+)\.[a-z_]+(?:\.[a-z_]+)?)(?::[^`]*)?`")
SECTIONS = {key.split(".")[0] for key in known_keys()}
# of this repository, and no pattern
PATH = re.compile(r"(?<![\w./-])(?:benchmarks|configs|csrc|demo|docs|examples|launch|neox|tests)/[\w./-]*\w")
CODE = (".py", ".h", ".cpp", ".cu", ".cuh")
FILE_ENDINGS = (".json", ".jsonl", ".yml", ".txt", ".md", ".py")  # `tokenizer.json` is a file


def links(text: str) -> list[str]:
    """Targets of the relative links of a page."""
    return [
        target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+://|#", target)
    ]


def commands(text: str) -> list[list[str]]:
    """The `neox ...` lines of a page's code blocks, as words."""
    inside, out = False, []
    for line in text.splitlines():
        if line.startswith("```"):
            inside = not inside
        elif (inside or line.startswith("    ")) and line.strip().startswith("neox "):
            out.append(shlex.split(line.strip(), comments=True)[1:])
    return out


def keys(text: str) -> list[str]:
    """Anything like a config key in backquotes: section.key, with or without a value."""
    return [key for key in KEY.findall(text) if key.split(".")[0] in SECTIONS and not key.endswith(FILE_ENDINGS)]


def paths(text: str) -> list[str]:
    """Files and folders of the repository that a page names; what a build makes is left out."""
    text = re.sub(r"\]\([^)]*\)", "]", text)  # links have a test of their own
    named = [match for match in PATH.finditer(text) if text[match.end() : match.end() + 1] not in ("*", "{", "<")]
    return [match.group() for match in named if not match.group().startswith(("neox/_ops", "neox/_data"))]


def targets(text: str) -> list[str]:
    """The targets of `make` in backquotes and at the beginning of lines of code."""
    return re.findall(r"(?:`|^ *)make ([a-z-]+)", text, re.MULTILINE)


def unparsed(words: list[str]) -> str | None:
    """Why a command line is refused; None if its command takes it."""
    try:
        _, parser, rest = parse(words)
        parser.parse_args(rest)
    except ConfigError as error:
        return error.line()
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert [target for target in links(page.read_text(encoding="utf-8")) if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_files_are_there(page):
    assert [path for path in paths(page.read_text(encoding="utf-8")) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_make_targets_exist(page):
    known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert [target for target in targets(page.read_text(encoding="utf-8")) if target not in known] == []


def test_files_named_in_the_sources_are_there():
    sources = [
        path for folder in ("neox", "csrc") for path in sorted((ROOT / folder).rglob("*")) if path.suffix in CODE
    ]
    named = {(source, path) for source in sources for path in paths(source.read_text(encoding="utf-8"))}
    assert sorted(f"{source.name}: {path}" for source, path in named if not (ROOT / path).exists()) == []
    assert len(named) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page):
    refused = {" ".join(words): unparsed(words) for words in commands(page.read_text(encoding="utf-8"))}
    assert {line: why for line, why in refused.items() if why} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_exist(page):
    known = set(known_keys()) | SECTIONS | {f"deepspeed.{name}" for name in DEEPSPEED_KEYS}
    assert [key for key in keys(page.read_text(encoding="utf-8")) if key not in known] == []


def test_what_is_wrong_is_seen():
    assert links("[a](docs/nowhere.md#part) [b](https://x.y) [c](#d)") == ["docs/nowhere.md"]
    assert paths(
        "`configs/a.yml` tests/b/test_<op>.py configs/{1,2}.yml `x/docs/c.md` neox/_ops/cuda.so [d](docs/d.md) csrc/e/."
    ) == [
        "configs/a.yml",
        "csrc/e",
    ]
    assert targets("`make nothing` and `make`, make it\n    make no-thing X=1\n") == ["nothing", "no-thing"]
    assert commands("```\nneox data inspect A  # what\n```\n    neox frob\nneox text\n") == [
        ["data", "inspect", "A"],
        ["frob"],
    ]
    assert "unknown command" in unparsed(["frob"])
    assert "unrecognized arguments: --nope" in unparsed(["data", "verify", "A", "--nope"])
    assert keys("`train.seed` `train.sead: 3` `other.key`") == ["train.seed", "train.sead"]


def test_every_command_is_described_somewhere():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in COMMANDS if not re.search(rf"\bneox {name}\b", text) and name != "train"] == []


WRAPPED = {"config-reference"}  # generated


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem not in WRAPPED], ids=lambda page: page.name)
def test_a_line_is_a_sentence(page):
    text = page.read_text(encoding="utf-8")
    assert [line for line in sentences.one_a_line(text).split("\n") if line not in text.split("\n")] == []


def test_sentences_get_lines_of_their_own():
    page = (
        "# A. B\n\nOne, e.g. this\nline. Two `a. B` (three).\n\n- Item. More.\n\n| x. Y | z |\n```\nA. B\n```\n    "
        "code. A\n"
    )
    wanted = (
        "# A. B\n\nOne, e.g. this line.\nTwo `a. B` (three).\n\n- Item.\n  More.\n\n| x. Y | z |\n```\nA. B\n```\n    "
        "code. A\n"
    )
    assert sentences.one_a_line(page) == wanted
    assert sentences.one_a_line(wanted) == wanted


def layers_of(text: str) -> dict[str, int]:
    """Package -> layer, as the picture of docs/architecture.md has them."""
    picture = re.search(r"```\nlayer\n(.*?)```", text, re.DOTALL).group(1)
    layers, layer = {}, 0
    for line in picture.splitlines():
        number, names = line[:7].strip(), line[7:].split("  ")[0]
        layer = int(number) if number else layer
        layers |= {f"neox.{name.strip()}": layer for name in names.split(",")}
    return layers


def test_the_architecture_page_shows_the_layers_that_the_imports_obey():
    shown = layers_of((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    assert shown == FLOORS


def test_the_glossary_of_contributing_is_what_the_checker_refuses():
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Glossary")[1].split("##")[0]
    refused = [
        word
        for row in table.splitlines()
        if row.startswith("| `")
        for word in re.findall(r"`([^`]+)`", row.split("|")[1])
    ]
    assert len(refused) > 20
    assert [word for word in refused if not list(language.findings("a.md", word))] == []


def root_pages() -> dict[str, str]:
    """Page of the site -> file at the root, from docs/hooks.py, which imports mkdocs."""
    pages = re.search(
        r"^PAGES = (\{.*?\})", (ROOT / "docs" / "hooks.py").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    return ast.literal_eval(pages.group(1))


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]

    def leaves(node):
        return (
            [node]
            if isinstance(node, str)
            else [leaf for child in (node.values() if isinstance(node, dict) else node) for leaf in leaves(child)]
        )

    pages = leaves(nav)
    assert len(pages) == len(set(pages))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} | set(root_pages()) == set(pages)


def test_the_site_builds_with_strict_links(tmp_path):
    pytest.importorskip("mkdocstrings", reason="needs the packages of `make docs`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "load_model" in (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
