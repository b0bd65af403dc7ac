"""Text that a run tokenizes itself: the bytes of neox preprocess, built once for all processes, and again when the
text or the tokenizer changes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
import xxhash

from neox.data.store.indexed import IndexedDataset
from neox.data.text.encoding import Encoding
from neox.data.text.input_files import find_files
from neox.data.text.preprocess import preprocess
from neox.data.text.text_cache import RunText, is_complete, tokenize
from neox.data.text.tokenizer import file_hash, train_tokenizer
from neox.errors import DataError, DiskError

TEXTS = [f"document {i} has {'word ' * (i % 17)}" for i in range(60)]


def tokenized(paths: list[str], tokenizer: str, eod_token: str | None, folder: Path) -> str:
    """Prefix of the dataset of some files and folders."""
    return tokenize(RunText(find_files(paths), tokenizer, eod_token, folder))


@pytest.fixture
def corpus(tmp_path) -> tuple[list[str], str]:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(TEXTS[0])
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[1:]))
    return [str(folder)], train_tokenizer(TEXTS, 300, tmp_path / "t.json").file


def test_the_dataset_is_that_of_preprocess_and_is_made_once(corpus, tmp_path):
    paths, tokenizer = corpus
    prefix = tokenized(paths, tokenizer, None, tmp_path / "cache")
    preprocess([f"{paths[0]}/a.txt", f"{paths[0]}/b.jsonl"], tmp_path / "wanted", Encoding(tokenizer))
    for suffix in (".bin", ".idx", ".json"):
        assert Path(prefix + suffix).read_bytes() == (tmp_path / f"wanted{suffix}").read_bytes()
    before = Path(f"{prefix}.bin").stat()
    assert tokenized(paths, tokenizer, None, tmp_path / "cache") == prefix and Path(f"{prefix}.bin").stat() == before


def test_content_and_tokenizer_name_it(corpus, tmp_path):
    paths, tokenizer = corpus
    cache = tmp_path / "cache"
    first = tokenized(paths, tokenizer, None, cache)
    moved = tmp_path / "moved"
    Path(paths[0]).rename(moved)
    assert tokenized([str(moved)], tokenizer, None, cache) == first  # the same text elsewhere
    other = train_tokenizer(TEXTS, 280, tmp_path / "other.json").file
    assert (
        len(
            {
                first,
                tokenized([str(moved)], other, None, cache),
                tokenized([f"{moved}/b.jsonl"], tokenizer, None, cache),
            }
        )
        == 3
    )
    (moved / "a.txt").write_text(TEXTS[0].replace("document", "Document"))  # as long as before
    assert tokenized([str(moved)], tokenizer, None, cache) != first


@pytest.mark.parametrize("hurt", ["no sidecar", "no index", "cut short", "damaged index"])
def test_an_incomplete_dataset_is_rebuilt(corpus, tmp_path, hurt):
    paths, tokenizer = corpus
    prefix = tokenized(paths, tokenizer, None, tmp_path / "cache")
    wanted = Path(f"{prefix}.bin").read_bytes()
    if hurt in ("no sidecar", "no index"):
        Path(prefix + {"no sidecar": ".json", "no index": ".idx"}[hurt]).unlink()
    elif hurt == "cut short":
        Path(f"{prefix}.bin").write_bytes(wanted[:-7])
    else:
        index = bytearray(Path(f"{prefix}.idx").read_bytes())
        index[40] ^= 1
        Path(f"{prefix}.idx").write_bytes(index)
    assert tokenized(paths, tokenizer, None, tmp_path / "cache") == prefix
    assert IndexedDataset(prefix).verify() == [] and Path(f"{prefix}.bin").read_bytes() == wanted


def test_processes_that_race_make_it_once(corpus, tmp_path, repository):
    paths, tokenizer = corpus
    code = (
        "import sys, time; from pathlib import Path; from neox.data.text import text_cache\n"
        "from neox.data.text.input_files import find_files\n"
        "made = []\n"
        "real = text_cache.preprocess\n"
        "text_cache.preprocess = lambda *a, **k: made.append(1) or time.sleep(1) or real(*a, **k)\n"
        "print(len(made), text_cache.tokenize(text_cache.RunText(find_files([sys.argv[1]]), sys.argv[2], None, "
        "Path(sys.argv[3]))), len(made))"
    )
    command = [sys.executable, "-c", code, paths[0], tokenizer, str(tmp_path / "cache")]
    running = [subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate()[0].split() for process in running]
    assert all(process.returncode == 0 for process in running)
    assert len({prefix for _, prefix, _ in said}) == 1 and sum(int(count) for _, _, count in said) == 1


def test_text_that_cannot_be_used(corpus, tmp_path):
    paths, tokenizer = corpus
    with pytest.raises(DataError, match="no such input"):
        tokenized([str(tmp_path / "nowhere")], tokenizer, None, tmp_path / "cache")
    (tmp_path / "texts" / "b.jsonl").write_text('{"text": "a"}\nnot json\n')
    with pytest.raises(DataError, match=r"bad line; where=.*b\.jsonl:2"):
        tokenized(paths, tokenizer, None, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.bin*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot store tokenized text"):
        tokenized([f"{paths[0]}/a.txt"], tokenizer, None, tmp_path / "file" / "cache")


def test_the_end_of_document_token_names_it_too(corpus, tmp_path):
    paths, tokenizer = corpus
    keys = {RunText(find_files(paths), tokenizer, eod, tmp_path).key for eod in (None, "<|endoftext|>", "</s>")}
    assert len(keys) == 3


def test_the_name_is_pinned_and_has_order_and_suffixes_of_the_files(corpus, tmp_path):
    """A name that changes makes every run tokenize its text again."""
    _, tokenizer = corpus
    names = ["a.txt", "b.txt", "c.jsonl", "d.json.gz", "e.1.json.gz"]
    files = [str(tmp_path / name) for name in names]
    for number, file in enumerate(files):
        Path(file).write_text("same" if number < 4 else "more")

    def key(*used: str) -> str:
        return RunText(used, tokenizer, "<|endoftext|>", tmp_path).key

    content = [
        [suffix, 4, f"{xxhash.xxh64(text).intdigest():016x}"]
        for suffix, text in ((".txt", b"same"), (".json.gz", b"more"))
    ]
    wanted = orjson.dumps(["neox-text-1", content, file_hash(tokenizer), "<|endoftext|>"])
    assert key(files[0], files[4]) == hashlib.sha256(wanted).hexdigest()[:24]
    assert key(files[0]) == key(files[1]) and len({key(file) for file in files}) == 4
    assert key(files[0], files[4]) != key(files[4], files[0])


def test_the_end_of_document_token_that_is_named_ends_the_documents(corpus, tmp_path, caplog):
    paths, _ = corpus
    made = train_tokenizer(TEXTS, 300, tmp_path / "u.json", special_tokens=["<end>"])
    with caplog.at_level("INFO", "neox.data"):
        dataset = IndexedDataset(tokenized(paths, made.file, "<end>", tmp_path / "cache"))
    assert {int(document[-1]) for document in dataset} == {made.token_id("<end>")} == {1}
    assert f"{dataset.prefix}: 60 documents, {dataset.num_tokens} tokens in " in caplog.text


def test_a_dataset_is_complete_with_its_own_sidecar(corpus, tmp_path):
    paths, tokenizer = corpus
    prefix = Path(tokenized(paths, tokenizer, None, tmp_path / "cache"))
    assert is_complete(prefix) and not is_complete(tmp_path / "cache" / "other")
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{prefix}{suffix}", tmp_path / f"copy{suffix}")
    assert not is_complete(tmp_path / "copy")
    (tmp_path / "copy.json").write_text('{"text": "a file of somebody else"}')
    assert not is_complete(tmp_path / "copy")
