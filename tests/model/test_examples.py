"""The examples of docs/model.md run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)


def test_the_examples_of_the_page_run(repository):
    found = blocks((repository / "docs" / "model.md").read_text(encoding="utf-8"))
    assert len(found) == 4
    assert all(block.count("\n") <= 10 for block in found)
    checks = [
        "assert logits.shape == (2, 128, 5000) and losses.shape == (254,)",
        *["assert y.shape == (2, 16, 64) and y.std() > 1e-4"] * 3,
    ]
    script = "\n".join(f"{block}\n{check}\n" for block, check in zip(found, checks, strict=True))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, cwd=repository)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", ["```python\nx = 1\n```\n", "a\n```python\nx = 1\n```\nb\n"])
def test_blocks_of_a_page(text):
    assert blocks(text) == ["x = 1\n"]
