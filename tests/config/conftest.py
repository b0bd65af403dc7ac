"""Fixtures of the config tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def write(tmp_path, monkeypatch) -> Callable[[str, str | bytes], str]:
    """Write files into the working folder of the test: write(name, text) -> name."""
    monkeypatch.chdir(tmp_path)

    def _write(name: str, text: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return _write
