"""Indexed datasets: byte compatibility, structural checks, damage, durability."""

from __future__ import annotations

import hashlib
import os
import random
import re
import resource
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from neox.data.store.indexed import IndexedDataset, IndexedWriter, token_dtype
from neox.errors import DataError, DiskError
from tests.data.samples.gpt_neox_arrays import GPT_NEOX

HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document borders
# Files that Megatron wrote. Of the second only the index is compared, which depends on the lengths alone.
AG_NEWS_TARGETS = (
    "int32",
    [[126148, 2]] * 78 + [[199808, 530, 28770, 2]] * 22,
    {
        ".bin": "acfa0c5e01e59987e1969844fe3eb45c69cff8cdb77c01ca7676afe6c40f58ab",
        ".idx": "440ccf148725f3367a8be486c36f07caa4579f265b03aae855ef75c33065b7ce",
    },
)
OPENWEBTEXT = (
    "uint16",
    [np.zeros(size, dtype=np.int64) for size in GPT_NEOX["sizes"]],
    {".idx": "6c66639d39299e15605f39283e4b08849cf1ea4172c0abce900849a5762c8e5c"},
)


@pytest.mark.parametrize(("dtype", "documents", "digests"), [AG_NEWS_TARGETS, OPENWEBTEXT], ids=["int32", "uint16"])
def test_written_files_are_those_of_megatron_byte_for_byte(tmp_path, dtype, documents, digests):
    with IndexedWriter(tmp_path / "d", dtype) as writer:
        for document in documents:
            writer.add_document(document)
    found = {suffix: hashlib.sha256((tmp_path / f"d{suffix}").read_bytes()).hexdigest() for suffix in digests}
    assert found == digests
    dataset = IndexedDataset(tmp_path / "d")
    assert dataset.verify() == [] and dataset.dtype.name == dtype and len(dataset) == len(documents)
    assert all(np.array_equal(dataset[i], documents[i]) for i in range(len(dataset)))


@pytest.mark.parametrize(("dtype", "code"), [("<i4", 4), ("<u2", 8)])
def test_files_that_follow_the_format_are_read(tmp_path, dtype, code):
    """Written here by the definition of the format, without neox."""
    rng = np.random.default_rng(code)
    sizes = rng.integers(0, 60, 1000).astype("<i4")
    tokens = rng.integers(0, 50_000, sizes.sum()).astype(dtype)
    ends = np.cumsum(sizes, dtype="<i8")
    pointers = (ends - sizes) * tokens.itemsize
    raw = HEADER.pack(b"MMIDIDX\0\0", 1, code, 1000, 1001) + sizes.tobytes() + pointers.tobytes()
    (tmp_path / "d.idx").write_bytes(raw + np.arange(1001, dtype="<i8").tobytes())
    (tmp_path / "d.bin").write_bytes(tokens.tobytes())
    dataset = IndexedDataset(tmp_path / "d")
    assert np.array_equal(dataset.sizes, sizes) and dataset.documents.tolist() == list(range(1001))
    assert (dataset.dtype, dataset.num_documents, dataset.num_tokens) == (np.dtype(dtype), 1000, tokens.size)
    for i in (0, 1, 500, 999):
        assert np.array_equal(dataset[i], tokens[ends[i] - sizes[i] : ends[i]])
        assert not dataset[i].flags.writeable
    assert np.array_equal(dataset[-1], dataset[999])
    with pytest.raises(IndexError, match="1000 is out of range"):
        dataset[1000]


def test_documents_of_several_sequences_and_without_any(tmp_path):
    with IndexedWriter(tmp_path / "d", "int32") as writer:
        writer.add([1, 2, 3])
        writer.end_document()
        writer.end_document()
        writer.add([4])
        writer.add([])
        writer.add([5, 6])
        writer.end_document()
    dataset = IndexedDataset(tmp_path / "d")
    assert dataset.documents.tolist() == [0, 1, 1, 4]
    assert dataset.sizes.tolist() == [3, 1, 0, 2]
    tokens, segments = dataset.read(0, 6, True)
    assert tokens.tolist() == [1, 2, 3, 4, 5, 6] and segments.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.locate(4) == (2, 1)
    assert dataset[2].size == 0


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_every_token_type_keeps_its_extremes_and_refuses_more(tmp_path, dtype):
    low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    with IndexedWriter(tmp_path / "d", dtype) as writer:
        writer.add_document(np.array([low, high, 0]))
    dataset = IndexedDataset(tmp_path / "d")
    assert dataset[0].tolist() == [low, high, 0] and dataset.read(0, 3)[0].tolist() == [low, high, 0]
    if dtype != "int64":
        with (
            pytest.raises(DataError, match=rf"does not fit the token type.*token 1; got={high + 1}"),
            IndexedWriter(tmp_path / "e", dtype) as writer,
        ):
            writer.add_document(np.array([0, high + 1]))


def test_more_sequences_and_tokens_than_a_buffer_holds(tmp_path):
    """The index is written from its own sizes, 262,144 at a time, and a merge copies 1 MiB at a time."""
    sizes = np.random.default_rng(5).integers(0, 4, 600_000).astype(np.int32)
    tokens = (np.arange(int(sizes.sum())) % 60_000).astype(np.uint16)
    with IndexedWriter(tmp_path / "d", "uint16") as writer:
        writer.add_documents(tokens, sizes)
    with IndexedWriter(tmp_path / "merged", "uint16") as writer:
        writer.add_document([7])
        writer.add_dataset(IndexedDataset(tmp_path / "d"))
    ends = np.cumsum(sizes, dtype=np.int64)
    for name, skipped in (("d", 0), ("merged", 1)):
        dataset = IndexedDataset(tmp_path / name)
        assert dataset.verify() == [] and len(dataset) == sizes.size + skipped
        assert np.array_equal(dataset.sizes[skipped:], sizes)
        assert np.array_equal(dataset.read(skipped, tokens.size)[0], tokens)
        for i in (0, 262_143, 262_144, 262_145, 524_288, sizes.size - 1):
            assert np.array_equal(dataset[i + skipped], tokens[ends[i] - sizes[i] : ends[i]])


def test_a_writer_knows_what_it_has_and_records_the_tokenizer(tmp_path):
    with IndexedWriter(tmp_path / "d", "uint16", tokenizer_hash="ab", vocab_size=99, eod_id=3) as writer:
        assert (writer.num_documents, writer.num_tokens, writer.largest_id) == (0, 0, -1)
        writer.add_document([5, 70, 3])
        writer.add([6])
        assert (writer.num_documents, writer.num_tokens, writer.largest_id) == (1, 4, 70)
        writer.end_document()
    sidecar = IndexedDataset(tmp_path / "d").sidecar
    assert (sidecar.tokenizer_hash, sidecar.vocab_size, sidecar.eod_id, sidecar.source) == ("ab", 99, 3, None)
    assert (sidecar.dtype, sidecar.num_sequences, sidecar.num_documents, sidecar.num_tokens) == ("uint16", 2, 2, 4)
    assert (sidecar.largest_id, sidecar.bin_bytes) == (70, 8)


def test_token_type_follows_the_largest_id():
    assert [token_dtype(largest) for largest in (0, 65_499, 65_500, 65_543, 2**31 - 1)] == [
        "uint16",
        "uint16",
        "int32",
        "int32",
        "int32",
    ]
    with pytest.raises(DataError, match="too large"):
        token_dtype(2**31)


def test_nothing_carries_the_final_name_before_finish(tmp_path):
    writer = IndexedWriter(tmp_path / "d", "uint16")
    writer.add_document([1, 2])
    assert not (tmp_path / "d.bin").exists() and not (tmp_path / "d.idx").exists()
    with pytest.raises(DataError, match=r"d\.idx"):
        IndexedDataset(tmp_path / "d")
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_an_exception_abandons(tmp_path):
    with pytest.raises(KeyError), IndexedWriter(tmp_path / "d", "uint16") as writer:
        writer.add_document([1])
        raise KeyError("stop")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_dataset_is_replaced_only_when_asked(make_dataset, tmp_path):
    make_dataset([[1, 2, 3]])
    with pytest.raises(DataError, match="dataset already exists"):
        IndexedWriter(tmp_path / "corpus", "uint16")
    assert make_dataset([[7]], overwrite=True)[0].tolist() == [7]


def test_unfinished_document_and_use_after_finish_are_refused(tmp_path):
    writer = IndexedWriter(tmp_path / "d", "uint16")
    writer.add([1])
    with pytest.raises(DataError, match="was not ended"):
        writer.finish()
    writer.end_document()
    writer.finish()
    with pytest.raises(DataError, match="already finished"):
        writer.add([1])


def test_a_write_that_fails_is_a_disk_error_and_leaves_nothing(tmp_path):
    """The limit on a file's size stands for a full disk: the write itself fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with (
            pytest.raises(DiskError, match=r"cannot write; where=.*d\.bin\.partial; got=File too large"),
            IndexedWriter(tmp_path / "d", "uint16") as writer,
        ):
            writer.add_document(np.zeros(3000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("fault", ["missing", "folder", "fifo", "dangling link", "no permission"])
def test_unreadable_files_are_named_with_the_reason(corpus, suffix, fault):
    path = Path(corpus.prefix + suffix)
    content = path.read_bytes()
    path.unlink()
    reason = {
        "missing": "No such file",
        "folder": "a folder",
        "fifo": "a FIFO",
        "dangling link": "No such file",
        "no permission": "Permission denied",
    }[fault]
    if fault == "folder":
        path.mkdir()
    elif fault == "fifo":
        os.mkfifo(path)
    elif fault == "dangling link":
        path.symlink_to("nowhere")
    elif fault == "no permission":
        if os.geteuid() == 0:
            pytest.skip("root may read every file")
        path.write_bytes(content)
        path.chmod(0)
    with pytest.raises(DataError, match=rf"cannot open data file; where=.*corpus\{suffix}; got={reason}"):
        IndexedDataset(corpus.prefix)


@pytest.mark.parametrize(
    ("prefix", "reason"), [("n" * 300, "File name too long"), ("../nowhere/../corpus", "No such file")]
)
def test_names_that_lead_nowhere(tmp_path, prefix, reason):
    with pytest.raises(DataError, match=rf"cannot open data file; where=.*{prefix}\.idx; got={reason}"):
        IndexedDataset(tmp_path / prefix)
    with pytest.raises(DataError, match="invalid path of a dataset; where=.*got=a NUL character"):
        IndexedDataset(f"{tmp_path}/{prefix}\0.idx")


@pytest.mark.parametrize(
    ("name", "do"), [("corpus.bin", "name .*/corpus$"), ("corpus.idx", "name .*/corpus$"), ("a.jsonl", "run neox prep")]
)
def test_a_file_is_not_a_prefix(corpus, name, do):
    path = Path(corpus.prefix).with_name(name)
    path.touch()
    with pytest.raises(DataError, match=rf"not the prefix of a dataset; where={path}; got=a file; want=.*; do={do}"):
        IndexedDataset(path)
    shutil.copy(corpus.bin_path, f"{path}.bin")
    shutil.copy(f"{corpus.prefix}.idx", f"{path}.idx")
    assert len(IndexedDataset(path)) == len(corpus)  # a dataset may have any name


def test_bin_of_another_length_names_sizes_and_document(corpus):
    path = Path(corpus.bin_path)
    content = path.read_bytes()
    cut = corpus.first_token_of_document(60) + 1
    path.write_bytes(content[: 2 * cut])
    with pytest.raises(
        DataError,
        match=rf"does not fit its index; where=.*corpus\.bin; got={2 * cut} bytes, cut in document 60; "
        rf"want={len(content)} bytes",
    ):
        IndexedDataset(corpus.prefix)
    path.write_bytes(content + b"x")
    with pytest.raises(DataError, match=rf"got={len(content) + 1} bytes; want={len(content)} bytes"):
        IndexedDataset(corpus.prefix)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"X", "not an index file"),
        (9, b"\x02", "unsupported version of the index file; .*got=2; want=1"),
        (17, b"\x06", "token type .*not supported; .*code 6"),
        (17, b"\x07", "code 7"),
        (17, b"\x04", "index file is damaged; where=.*sequence 1; .*offset"),
        (18, b"\xff" * 8, "wrong size"),
        (26, b"\xff" * 8, "wrong size"),
        (34, struct.pack("<i", -1), "sequence 0; got=size -1"),
        (34 + 12 * 101, struct.pack("<q", 1), "document border 0; got=1; want=0"),
        (34 + 12 * 101 + 8 * 101, struct.pack("<q", 100), "document border 101; got=100; want=101"),
        (34 + 12 * 101 + 8 * 50, struct.pack("<q", -1), "document border 50; got=-1"),
        (34 + 12 * 101 + 8 * 50, struct.pack("<q", 2**40), "document border 50"),
    ],
)
def test_damage_to_each_part_of_the_index_is_found_and_named(corpus, offset, value, message):
    path = Path(f"{corpus.prefix}.idx")
    Path(f"{corpus.prefix}.json").unlink()
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        IndexedDataset(corpus.prefix)
    assert str(path) in str(caught.value)


def test_truncated_index_at_every_length(corpus):
    path = Path(f"{corpus.prefix}.idx")
    content = path.read_bytes()
    for length in range(len(content)):
        os.truncate(path, 0)
        path.write_bytes(content[:length])
        with pytest.raises(DataError):
            IndexedDataset(corpus.prefix)


def test_with_a_sidecar_no_damage_passes(corpus):
    """Any changed bit of .idx is refused; with the structural check alone a few would pass."""
    path = Path(f"{corpus.prefix}.idx")
    content = path.read_bytes()
    generator = random.Random(5)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(DataError):
            IndexedDataset(corpus.prefix)


def test_sidecar_of_another_dataset_is_refused(make_dataset, tmp_path):
    make_dataset([[1, 2]], name="a")
    make_dataset([[1, 2, 3]], name="b")
    shutil.copyfile(tmp_path / "a.json", tmp_path / "b.json")
    with pytest.raises(DataError, match="sidecar does not belong"):
        IndexedDataset(tmp_path / "b")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_json_file_of_others_is_ignored_and_not_overwritten(corpus, tmp_path, overwrite):
    content = b'{"text": "a corpus that is named like the dataset"}\n'
    path = Path(f"{corpus.prefix}.json")
    path.write_bytes(content)
    dataset = IndexedDataset(corpus.prefix)
    assert dataset.sidecar is None and dataset.verify() == [] and dataset[3].tolist() == corpus[3].tolist()
    (tmp_path / "new.json").write_bytes(content)
    for prefix in (tmp_path / "new", corpus.prefix) if overwrite else (tmp_path / "new",):
        with pytest.raises(DataError, match="is not a sidecar of neox and would be overwritten; where=.*json"):
            IndexedWriter(prefix, "uint16", overwrite=overwrite)
    assert path.read_bytes() == content == (tmp_path / "new.json").read_bytes() and not list(tmp_path.glob("*.partial"))


def test_a_flipped_bit_of_bin_is_found_by_verify_and_by_the_first_read_of_its_block(tmp_path):
    with IndexedWriter(tmp_path / "big", "uint16") as writer:
        for _ in range(5):
            writer.add_document(np.arange(400_000) % 5000)
    path = tmp_path / "big.bin"
    content = bytearray(path.read_bytes())
    content[2_500_000] ^= 4
    path.write_bytes(content)
    dataset = IndexedDataset(tmp_path / "big")
    assert dataset.verify() == [(2 << 20, 3 << 20)]
    assert dataset.read(0, 1000)[0][:3].tolist() == [0, 1, 2]
    with pytest.raises(
        DataError,
        match=rf"checksum differs; where=.*big\.bin bytes {2 << 20} to {3 << 20}; got=block 2, starting in document 2",
    ):
        dataset.read(1_100_000, 10)


def test_a_file_cut_short_while_open_is_an_error_and_not_a_bus_error(corpus):
    os.truncate(corpus.bin_path, 10)
    with pytest.raises(DataError, match=r"changed while it was open; where=.*corpus\.bin; got=10 bytes"):
        corpus.read(0, corpus.num_tokens)
    with pytest.raises(DataError, match="changed while it was open"):
        corpus[3]


@pytest.mark.parametrize("file", ["bin", "idx"])
def test_every_read_finds_that_a_file_was_cut_short_while_open(corpus, tmp_path, file):
    """Within the last page a map reads zeros where the file ends, without any signal: a merge must not copy them."""
    order, zeros = np.arange(101, dtype=np.int32), np.zeros(1, np.int64)
    path = f"{corpus.prefix}.{file}"
    os.truncate(path, os.path.getsize(path) - 2)

    def merge() -> None:
        with IndexedWriter(tmp_path / "merged", "uint16") as writer:
            writer.add_dataset(corpus)

    reads = {
        "sequence": lambda: corpus[3],
        "read": lambda: corpus.read(0, corpus.num_tokens),
        "read_ordered": lambda: corpus.read_ordered(order, 0, 0, corpus.num_tokens),
        "read_spans": lambda: corpus.read_spans(zeros, zeros + corpus.num_tokens),
        "document_statistics": lambda: corpus.document_statistics(0, 101, None),
        "merge": merge,
    }
    for name, read in reads.items():
        with pytest.raises(DataError, match=rf"changed while it was open; where=.*corpus\.{file}"):
            read()
            pytest.fail(name)
    assert not list(tmp_path.glob("merged*"))


def test_reads_outside_are_refused(corpus):
    for first, count in ((-1, 1), (0, -1), (corpus.num_tokens, 1), (2**63 - 1, 2**63 - 1)):
        with pytest.raises(IndexError, match="out of range"):
            corpus.read(first, count)
    with pytest.raises(DataError, match="order names a sequence that does not exist"):
        corpus.read_ordered(np.array([101], dtype=np.int32), 0, 0, 1)
    with pytest.raises(DataError, match="order names a sequence that does not exist"):
        corpus.read_ordered(np.array([-1], dtype=np.int64), 0, 0, 1)
    with pytest.raises(DataError, match="runs past the end"):
        corpus.read_ordered(np.arange(3, dtype=np.int32), 0, 0, 1000)


def test_merging_joins_documents_and_refuses_other_types(make_dataset, tmp_path):
    first = make_dataset([[1, 2], []], name="first")
    second = make_dataset([[3], [4, 5]], name="second")
    empty = make_dataset([], name="empty")
    wide = make_dataset([[6]], name="wide", dtype="int32")
    with IndexedWriter(tmp_path / "merged", "uint16") as writer:
        for dataset in (first, empty, second):
            writer.add_dataset(dataset)
        with pytest.raises(DataError, match=r"different token types.*where=.*wide\.idx; got=int32; want=uint16"):
            writer.add_dataset(wide)
    merged = IndexedDataset(tmp_path / "merged")
    assert [merged[i].tolist() for i in range(len(merged))] == [[1, 2], [], [3], [4, 5]]
    assert merged.documents.tolist() == [0, 1, 2, 3, 4]


def test_ids_beyond_a_vocabulary_are_located(make_dataset):
    dataset = make_dataset([[1, 2], [3, 9, 4]])
    assert dataset.find_bad_token(9) == 3 and dataset.locate(3) == (1, 1)
    assert dataset.find_bad_token(10) is None


def test_the_folder_of_a_dataset_is_made(tmp_path):
    with IndexedWriter(tmp_path / "new" / "folder" / "text", "uint16") as writer:
        writer.add_document(np.array([1, 2]))
    assert IndexedDataset(tmp_path / "new" / "folder" / "text")[0].tolist() == [1, 2]
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot create the folder of a dataset"):
        IndexedWriter(tmp_path / "file" / "text", "uint16")


def test_a_multimodal_dataset_of_megatron_core_is_named(make_dataset):
    prefix = make_dataset([[1, 2], [3], [4, 5, 6]]).prefix
    os.unlink(f"{prefix}.json")
    with open(f"{prefix}.idx", "ab") as file:
        file.write(np.array([0, 1, 0], dtype=np.int8).tobytes())  # the mode of each sequence
    with pytest.raises(
        DataError,
        match="dataset is multimodal; where=.*got=3 sequence modes, as megatron-core writes .*do=preprocess the text",
    ):
        IndexedDataset(prefix)


def test_an_abandoned_writer_that_resumed_leaves_nothing(tmp_path):
    first = IndexedWriter(tmp_path / "a", "uint16")
    first.add_document(np.arange(5))
    progress = first.sync()
    first.keep()
    del first
    assert len(list(tmp_path.iterdir())) == 2
    IndexedWriter(tmp_path / "a", "uint16", resume=progress).abandon()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("prefix", ["", ".", "..", "folder/", "folder/.", "folder/.."])
def test_a_dataset_without_a_name_is_refused_before_anything_is_made(tmp_path, monkeypatch, prefix):
    monkeypatch.chdir(tmp_path)
    for use in (IndexedDataset, lambda name: IndexedWriter(name, "uint16")):
        with pytest.raises(DataError, match=rf"name of a dataset is missing; where={re.escape(prefix) or repr('')}; "):
            use(prefix)
    assert not list(tmp_path.iterdir())


def test_a_name_without_a_folder_is_in_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with IndexedWriter("d", "uint16") as writer:
        writer.add_document([1])
    assert sorted(os.listdir()) == ["d.bin", "d.idx", "d.json"]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("dangling", [False, True])
def test_either_file_is_an_existing_dataset(tmp_path, suffix, dangling):
    path = tmp_path / f"d{suffix}"
    if dangling:
        path.symlink_to("nowhere")
    else:
        path.write_bytes(b"")
    with pytest.raises(DataError, match=rf"dataset already exists; where=.*d\{suffix}; do=.*--overwrite"):
        IndexedWriter(tmp_path / "d", "uint16")
    assert list(tmp_path.iterdir()) == [path]
