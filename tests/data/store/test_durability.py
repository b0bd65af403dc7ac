"""What a crash leaves of a dataset: every state of the disk that a power failure allows at any call, by the model
that checkpoints are tested with.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from neox.data.store.indexed import IndexedDataset, IndexedWriter
from neox.errors import DataError
from tests.checkpoint.faults import Disk, fingerprint, materialise
from tests.fork_server import environment

OLD = [[1, 2, 3], [4, 5]]
AS_LONG = [[1, 2, 3, 4], [5, 6]]
NEW = [[7], [8, 9, 10], [11, 12]]
WRITE = """
import sys
import numpy as np
from neox.data.store.indexed import IndexedWriter
with IndexedWriter(sys.argv[1], "uint16", overwrite=True) as writer:
    for document in {documents}:
        writer.add_document(np.array(document))
"""


@pytest.fixture(scope="module")
def recorder(tmp_path_factory) -> Path:
    """The library that records a process's calls."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = tmp_path_factory.mktemp("recorder") / "record_calls.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", library, Path(__file__).with_name("record_calls.c"), "-ldl"],
        check=True,
    )
    return library


def recorded(recorder: Path, top: Path, program: str, *arguments: str) -> list[tuple]:
    """The calls with which a Python program changes files below `top`, as tests.checkpoint.faults.Disk takes them."""
    log = top.parent / "calls.txt"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        env = environment(
            LD_PRELOAD=recorder, NEOX_RECORD_FD=descriptor, NEOX_RECORD_TOP=top, PYTHONDONTWRITEBYTECODE="1"
        )
        subprocess.run(
            [sys.executable, "-c", program, *arguments], env=env, check=True, timeout=300, pass_fds=[descriptor]
        )
    finally:
        os.close(descriptor)
    calls: list[tuple] = []
    for line in log.read_text().splitlines():
        kind, path, *rest = line.split("\t")
        if kind == "write":
            calls.append(("write_at", Path(path), int(rest[0]), bytes.fromhex(rest[1])))
        else:
            calls.append((kind, Path(path), *map(Path, rest)))
    return calls


def documents_of(prefix: Path) -> list[list[int]] | None:
    """The documents of a dataset; None where there is none, or what there is is refused."""
    try:
        dataset = IndexedDataset(prefix)
        return [dataset[i].tolist() for i in range(len(dataset))]
    except DataError:
        return None


@pytest.mark.parametrize("old", [None, OLD, AS_LONG], ids=["new", "replaced", "replaced by one of as many tokens"])
def test_after_a_crash_a_dataset_is_the_old_one_or_the_new_one_or_refused(recorder, tmp_path, old):
    top = tmp_path / "data"
    top.mkdir()
    if old is not None:
        with IndexedWriter(top / "corpus", "uint16") as writer:
            for document in old:
                writer.add_document(np.array(document))
    disk = Disk(top)
    calls = recorded(recorder, top, WRITE.format(documents=NEW), str(top / "corpus"))
    assert documents_of(top / "corpus") == NEW
    assert {"create", "write_at", "sync", "rename", "sync_dir"} <= {call[0] for call in calls}
    crash, done = tmp_path / "crash", set()
    for count in range(len(calls) + 1):
        if count:
            disk.apply(calls[count - 1])
        for text, tree in disk.crashes():
            state = (count == len(calls), fingerprint(tree))
            if state in done:
                continue
            done.add(state)
            materialise(tree, crash)
            found = documents_of(crash / "corpus")
            where = f"after {count} of {len(calls)} calls ({calls[count - 1][:2] if count else 'none'}), {text}"
            assert found in (None, old, NEW), where
            assert count < len(calls) or found == NEW, where
            shutil.rmtree(crash)
    assert len(done) > 10
