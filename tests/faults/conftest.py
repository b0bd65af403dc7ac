"""What the fault tests share: the fork server, a corpus, uninterrupted runs to compare with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.runs import LONG, SHORT, Setting, arguments
from tests.fork_server import ForkServer, fork_server
from tests.train.corpus import make_corpus


@pytest.fixture(scope="session")
def server() -> ForkServer:
    return fork_server()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder)
    return folder


def straight_run(server, corpus, folder: Path, setting: Setting) -> Path:
    """A run that nothing disturbs."""
    training = server.start(arguments(corpus, folder / "run", setting), folder, ranks=setting.ranks)
    assert training.wait() == [0] * setting.ranks, training.outputs()
    return folder / "run"


@pytest.fixture(scope="session")
def straight(server, corpus, tmp_path_factory):
    """The SHORT run of one process."""
    return straight_run(server, corpus, tmp_path_factory.mktemp("straight"), SHORT)


@pytest.fixture(scope="session")
def long_straight(server, corpus, tmp_path_factory):
    """The LONG run of one process."""
    return straight_run(server, corpus, tmp_path_factory.mktemp("long"), LONG)
