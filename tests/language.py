"""The glossary of CONTRIBUTING.md as a checker: `python tests/language.py PATH...` prints each word that has a better
one.

It reads prose: Markdown, comments, docstrings, names of tests, and strings with a space in them, such as messages and
help. Names in backquotes, expressions in braces, and strings without a space are code and are not read.
"""

from __future__ import annotations

import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOTS = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "Makefile",
    "pyproject.toml",
    "setup.py",
    "train.py",
    "Dockerfile",
)
FOLDERS = ("neox", "csrc", "tests", "docs", "benchmarks", "configs", "demo", "examples", "launch")
SUFFIXES = {".py", ".pyi", ".md", ".h", ".cpp", ".cu", ".cuh", ".yml", ".toml", ".sh", ".txt"}
SPARED = ("tests/language.py", "tests/test_language.py")  # they quote the words

# word -> what to write. A pattern is matched without regard to case, at word boundaries.
GLOSSARY = {
    r"look(s|ed|ing)?(?! ?-?(up|ahead|around|behind))": "poll, check, read, inspect, or: seem",
    r"signs? of life|pulses?": "heartbeat",
    r"told|tells?|telling": "report, log, print; distinguish",
    r"says?|said|saying": "report, state, print, name, show",
    r"foretell(s|ing)?|foretold": "predict",
    r"on purpose": "injected, deliberately",
    r"(go|goes|going|went|gone) on": "continue, resume",
    r"taken up": "restored, resumed",
    r"gone": "missing, exited",
    r"beside": "next to, besides, in addition to",
    r"anew": "rebuild, retry, repeat, from scratch",
    r"alike": "identical, in the same way, both",
    r"mend(s|ed|ing)?": "fix, repair",
    r"kept": "retained, stored, saved",
    r"places?": "position, rank, location, site",
    r"pieces?": "shard, segment, chunk, part",
    r"(?<!its )(?<!their )(?<!your )(?<!our )(?<!'s )(?<!s' )own": "local, separate, its own",
    r"behind": "after, end (exclusive), past",
    r"whole": "complete, full, entire, all of",
    r"(is|are) no (number|boolean|integer|string|list|mapping|float|file|folder|dataset|checkpoint|key|text)s?": (
        "not a number, not a boolean"
    ),
    r"data (are|were|have)": "data is, data was, data has",
    r"so many": "that many, up to N",
    r"(these|those) are few": "there are few",
    r"them that": "those that",
    r"none: (none|no|there)": "None if there is none",
    r"without a word|last word": "without reporting an error",
    r"borne|taken apart|takes? apart|share out|shared out|cut over": "tolerated; disassembled, split; partition; shard",
    r"what is not (in|a|an|the|there|of)|is not there|are not there|be not": "anything that is not; missing",
}
# Uses that a word may have besides: terms of the field, and English that no other word says better.
ALLOWED = (
    r"look(s|ed|ing)?[ -](up|ahead|around|behind)|lookups?",
    r"in[ -]place|out[ -]of[ -]place|decimal places?|takes? place|placeholders?",
    r"as a whole|on the whole|whole numbers?|whole[- ]words?",
    r"behind (a|an|the) (flag|proxy|switch|option)|left behind",
    r"sentence ?pieces?|word ?pieces?",
    r"(its|their|your|our|my|one's|'s) own",
)
BANNED = {
    re.compile(rf"(?<![\w/-])(?:{pattern})(?![\w/-])", re.IGNORECASE): better for pattern, better in GLOSSARY.items()
}
PASS = re.compile("|".join(rf"\b(?:{pattern})\b" for pattern in ALLOWED), re.IGNORECASE)
CODE = re.compile(r"`[^`\n]*`|\]\([^)\s]*\)|https?://\S+")
C_TEXT = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
STRING = re.compile(r"^([A-Za-z]*)('''|\"\"\"|'|\")(.*)\2$", re.DOTALL)

Finding = tuple[int, str, str]


def blanked(text: str, pattern: re.Pattern[str]) -> str:
    """The text with all that matches replaced by stops, line feeds excepted, so that line numbers stay."""
    return pattern.sub(lambda match: re.sub(r"[^\n]", ".", match.group()), text)


def python_prose(text: str) -> Iterator[tuple[int, str]]:
    """(first line, text) of comments, strings of more than one word, and names of tests."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
        elif token.type == tokenize.STRING:
            prefix, _, body = STRING.match(token.string).groups()
            body = blanked(body, re.compile(r"\{[^{}]*\}")) if "f" in prefix.lower() else body
            if " " in body.strip():
                yield token.start[0], body
        elif token.type == getattr(tokenize, "FSTRING_MIDDLE", None) and " " in token.string.strip():
            yield token.start[0], token.string
        elif token.type == tokenize.NAME and token.string.startswith("test_"):
            yield token.start[0], token.string.replace("_", " ")


def native_prose(text: str) -> Iterator[tuple[int, str]]:
    """(first line, text) of the comments and strings of more than one word in C++ and CUDA sources."""
    for match in C_TEXT.finditer(text):
        if match.group()[0] == "/" or " " in match.group():
            yield text.count("\n", 0, match.start()) + 1, match.group()


def script_prose(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of what follows a `#`."""
    for number, line in enumerate(text.splitlines(), 1):
        if "#" in line:
            yield number, line[line.index("#") :]


def markdown_prose(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of a page; of code blocks only what follows a `#`."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, line
        elif "#" in line:
            yield number, line[line.index("#") :]


READERS = {".py": python_prose, ".pyi": python_prose, ".md": markdown_prose, ".txt": markdown_prose}
READERS |= dict.fromkeys((".h", ".cpp", ".cu", ".cuh"), native_prose)


def findings(name: str, text: str) -> Iterator[Finding]:
    """(line, word, what to write) for each word of the glossary's left column in a file's prose."""
    for first, prose in READERS.get(Path(name).suffix, script_prose)(text):
        prose = blanked(blanked(prose, CODE), PASS)
        for pattern, better in BANNED.items():
            for match in pattern.finditer(prose):
                yield first + prose.count("\n", 0, match.start()), match.group(), better


def sources() -> list[Path]:
    """The files of the repository that hold prose."""
    found = [ROOT / name for name in ROOTS if (ROOT / name).is_file()]
    for folder in FOLDERS:
        found += [path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES and path.is_file()]
    return [
        path
        for path in found
        if str(path.relative_to(ROOT)) not in SPARED
        and not {"_ops", "__pycache__", "run"} & set(path.parts[len(ROOT.parts) :])
    ]


def files_of(words: list[str]) -> list[Path]:
    """The files that a command line names; folders stand for what they hold."""
    every = sources()
    if not words:
        return every
    named = [Path(word).resolve() for word in words]
    return [path for path in every if any(path == name or name in path.parents for name in named)]


def main(words: list[str]) -> int:
    """Print the findings in the named files and folders, or in all; 1 if there are any."""
    count = 0
    for path in files_of(words):
        for line, word, better in sorted(findings(path.name, path.read_text(encoding="utf-8"))):
            print(f"{path.relative_to(ROOT)}:{line}: {word!r}: {better}")
            count += 1
    print(f"{count} findings", file=sys.stderr)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
