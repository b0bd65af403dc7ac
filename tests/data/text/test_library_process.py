"""The `tokenizers` library in another process: the ids that it gives here, and an answer to everything that may happen to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from neox.data.lazy import Lazy
from neox.data.text.encoding import Encoding, HFEncoder, NativeEncoder
from neox.data.text.library_process import LibraryProcess
from neox.data.text.reading import TextChunk
from neox.data.text.tokenizer import Tokenizer, TokenizerFile, train_tokenizer

TEXTS = ["", "some words and more words", "é日😀 <|endoftext|> \x00 \t\n", "x" * 100_000]


@pytest.fixture
def file(tmp_path) -> str:
    return train_tokenizer(TEXTS[1:3] * 9, 300, tmp_path / "t.json").file


@pytest.mark.parametrize("specials_as_text", [False, True])
def test_ids_are_those_of_the_library_here(file, specials_as_text):
    here = Tokenizer(file, specials_as_text=specials_as_text)
    with LibraryProcess(file, specials_as_text) as there:
        assert [there.encode(text) for text in TEXTS] == [here.encode(text) for text in TEXTS]
    assert (here.eod_id in here.encode(TEXTS[2])) is not specials_as_text


@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_a_bad_file_gives_no_ids_and_says_nothing(tmp_path, content, capfd):
    if content is not None:
        (tmp_path / "bad.json").write_bytes(content)
    with LibraryProcess(str(tmp_path / "bad.json"), False) as there:
        assert there.encode("text") is None and there.encode("text") is None
    assert capfd.readouterr() == ("", "")


def test_a_process_that_cannot_be_started_gives_no_ids(file, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with LibraryProcess(file, False) as there:
        assert there.encode("text") is None and there.pid is None


def test_blocks_are_compared_here_where_the_process_is_gone(file):
    encoding = Encoding(file)
    block = [TextChunk("a.txt", 0, TEXTS[1].encode() * 50)]
    with LibraryProcess(file, False) as there:
        native = NativeEncoder(encoding, TokenizerFile(file), there)
        os.kill(there.pid, signal.SIGKILL)
        found = native.start(0, block, native.threads(0)).result()
    assert not native.differs and "_library" in vars(native)
    assert found.tokens.tolist() == HFEncoder(encoding)(block).tokens.tolist()


def test_nothing_is_loaded_here_while_the_process_lives(file):
    with LibraryProcess(file, False) as there:
        native = NativeEncoder(Encoding(file), TokenizerFile(file), there)
        native.start(0, [TextChunk("a.txt", 0, TEXTS[1].encode())], native.threads(0)).result()
    assert not native.differs and "_library" not in vars(native)


def test_ids_of_the_process_that_differ_are_noticed(file, tmp_path):
    """A process with another tokenizer stands for an encoder that is wrong; what the library gives for the right file is written."""
    other = train_tokenizer(["entirely different, with other merges: some words"] * 9, 290, tmp_path / "other.json").file
    block = [TextChunk("a.txt", 0, TEXTS[1].encode())]
    with LibraryProcess(other, False) as there:
        native = NativeEncoder(Encoding(file), TokenizerFile(file), there)
        found = native.start(0, block, native.threads(0)).result()
    assert native.differs and found.tokens.tolist() == HFEncoder(Encoding(file))(block).tokens.tolist()


def test_it_ends_with_its_parent(file):
    code = (
        "import sys; from neox.data.text.library_process import LibraryProcess as P\n"
        "p = P(sys.argv[1], False); p.encode('a'); print(p.pid, flush=True); input()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{child}"), "it outlives its parent"


def test_a_lazy_module_is_imported_when_it_is_used():
    code = "import sys; from neox.data.lazy import Lazy; m = Lazy('wave'); before = 'wave' in sys.modules; m.Error; print(before, 'wave' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False True\n"
    numpy = Lazy("numpy")
    assert numpy.ndarray is numpy.ndarray and "ndarray" in vars(numpy)
    with pytest.raises(AttributeError):
        _ = numpy.nothing_of_that_name


def test_the_command_sets_threads_to_work_before_it_loads_what_is_large():
    code = "import sys, neox.cli.preprocess; print([name for name in ('numpy', 'tokenizers', 'torch', 'jinja2', 'rich') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
