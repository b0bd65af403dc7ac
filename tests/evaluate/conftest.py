"""Fixtures of the tests that run lm-evaluation-harness."""

import pytest


@pytest.fixture
def without_launcher(monkeypatch):
    """An environment that no launcher has set: with LOCAL_RANK, which other tests set for DeepSpeed, accelerate would
    wait for a process group.
    """
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
