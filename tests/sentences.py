"""One sentence a line in Markdown: `python tests/sentences.py PAGE...` rewrites pages; tests/test_docs.py compares.

Tables, code blocks, headings and HTML stay as they are. A list item's further sentences are indented to its text.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|vs|cf|Fig|Eq|et al|approx|No|resp)\.|\b[A-Z]\.)$")
END = re.compile(r"(?<=[.!?])(?<!\.\.\.)\s+(?=[A-Z`\"(\[*_0-9~])|(?<=[.!?][)\"*])\s+(?=[A-Z`\"(\[*_])")
ITEM = re.compile(r"^(\s*)([-*+]|\d+\.)\s+")
UNTOUCHED = ("|", "#", "<", ":::", "![")  # how lines begin that are no prose


def sentences(text: str) -> list[str]:
    """The sentences of a paragraph; one that ends inside of backquotes or at an abbreviation continues."""
    out: list[str] = []
    for part in END.split(text):
        if out and (ABBREVIATION.search(out[-1]) or out[-1].count("`") % 2):
            out[-1] += " " + part
        else:
            out.append(part)
    return out


def reflowed(paragraph: list[str]) -> list[str]:
    """The lines of a paragraph or list item, one for each sentence."""
    item = ITEM.match(paragraph[0])
    lead = item.group() if item else re.match(r"\s*", paragraph[0]).group()
    text = " ".join([paragraph[0][len(lead) :].strip(), *(line.strip() for line in paragraph[1:])])
    return [(" " * len(lead) if number else lead) + sentence for number, sentence in enumerate(sentences(text))]


def one_a_line(page: str) -> str:
    """A page with one sentence a line; its text is the same but for line breaks."""
    out: list[str] = []
    paragraph: list[str] = []
    fenced = False

    def finish() -> None:
        if paragraph:
            out.extend(reflowed(paragraph))
            paragraph.clear()

    for line in page.split("\n"):
        fence = line.lstrip().startswith("```")
        fenced ^= fence
        prose = line.strip() and not line.lstrip().startswith(UNTOUCHED) and (paragraph or not line.startswith("    "))
        if fence or fenced or not prose:
            finish()
            out.append(line)
            continue
        if ITEM.match(line):
            finish()
        paragraph.append(line)
    finish()
    return "\n".join(out)


def main(names: list[str]) -> None:
    """Rewrite the pages."""
    for path in map(Path, names):
        path.write_text(one_a_line(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
