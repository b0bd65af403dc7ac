"""Corpora of bad input, from files to datasets, by both encoders: each gets the result that docs/data.md documents,
and the rest of the file is read.
"""

from __future__ import annotations

import base64
import gzip
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
import tokenizers
import zstandard

from neox._native import core
from neox.data.store.indexed import IndexedDataset
from neox.data.text.byte_level import text_encoder
from neox.data.text.encoding import Encoding
from neox.data.text.preprocess import Options, Summary, preprocess
from neox.data.text.tokenizer import Tokenizer, TokenizerFile, train_tokenizer
from neox.errors import DataError

FIRST, LAST = "the first of all", "the last of all 😀"
LONG = [f"{i} " + "".join(chr(97 + i * k * k % 26) for k in range(60)) for i in range(3000)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """native.json, and library.json, which csrc/data does not encode."""
    made = tmp_path_factory.mktemp("bad")
    native = train_tokenizer([FIRST, LAST, "é日 words of a text"] * 3, 300, made / "native.json")
    library = tokenizers.Tokenizer.from_file(native.file)
    steps = [tokenizers.pre_tokenizers.Digits(True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    library.save(str(made / "library.json"))
    return made


def line(text: str) -> bytes:
    return orjson.dumps({"text": text}) + b"\n"


def between(*middle: bytes) -> bytes:
    return line(FIRST) + b"".join(part + b"\n" for part in middle) + line(LAST)


# what -> (content of a .jsonl file, texts between the first and the last, {line: start of the reason}, blank lines,
# empty documents)
CORPORA: dict[str, tuple[bytes, list[str], dict[int, str], int, int]] = {
    "invalid UTF-8": (between(b'{"text": "a\xff"}', b'{"text": "b"}', b'{"text": "\xc3\x28\xed\xa0\x80"}'), ["b"], {2: "not JSON", 4: "not JSON"}, 0, 0),
    "lone surrogates": (between(b'{"text": "\\ud800"}', b'{"text": "\\udc00 b"}', b'{"text": "\\ud83d\\ude00"}'), ["😀"], {2: "not JSON", 3: "not JSON"}, 0, 0),
    "byte order mark": (b"\xef\xbb\xbf" + between(b'{"text": "b"}'), ["b"], {}, 0, 0),
    "CRLF": (between(b'{"text": "a"}', b"", b'{"text": "b"}').replace(b"\n", b"\r\n"), ["a", "b"], {}, 1, 0),
    "NUL": (between(b'{"text": "a\\u0000b"}', b'{"text": "a\x00b"}', b"\x00"), ["a\0b"], {3: "not JSON", 4: "not JSON"}, 0, 0),
    "missing key": (between(b'{"body": "a"}', b"{}", b'{"text": "b"}'), ["b"], {2: "no key 'text'", 3: "no key 'text'"}, 0, 0),
    "nested": (
        between(b"[" * 100_000, b'{"text": {"text": "a"}}', b'{"x": [{"text": "no"}], "text": "b"}', b'{"text": ' + b"[" * 3000 + b"]" * 3000 + b"}"),
        ["b"],
        {2: "not JSON: depth", 3: "the value of 'text' is not a string: dict", 5: "not JSON: depth"},
        0,
        0,
    ),
    "empty documents": (between(b'{"text": ""}', b"", b"   ", b'{"text": "b"}', b'{"text": ""}'), ["b"], {}, 2, 2),
    "a key twice": (between(b'{"text": 1, "text": "b"}', b'{"text": "a", "text": 1}'), ["b"], {3: "the value of 'text' is not a string"}, 0, 0),
    "no string, no object": (between(b'{"text": null}', b'{"text": "b"}', b"7"), ["b"], {2: "the value of 'text' is not a string: NoneType", 4: "a JSON int"}, 0, 0),
    "as Python writes it": (
        between(
            b'{"text": "nan", "score": NaN}',
            b'{"x": [Infinity, -Infinity], "text": "infinity"}',
            b'{"text": "exponent", "x": 1e999, "y": -1.5E-7}',
            b'{"n": ' + b"9" * 10_000 + b', "text": "digits"}',
            b'{"other": "\\ud800", "text": "surrogate elsewhere"}',
            b'{"other": "\\ud800", "text": NaN}',
            b'{"text": nan}',
        ),
        ["nan", "infinity", "exponent", "digits", "surrogate elsewhere"],
        {7: "the value of 'text' is not a string: float", 8: "not JSON"},
        0,
        0,
    ),
    "no line end": (between(b'{"text": "b"}')[:-1], ["b"], {}, 0, 0),
}  # fmt: skip


def run(path: Path, tokenizer: str, policy: str) -> tuple[Summary, list[str]]:
    """The summary, and the texts of the dataset; its documents end in the end-of-document token."""
    out = path.parent / f"{path.name}-{Path(tokenizer).stem}-{policy}"
    summary = preprocess([str(path)], out, Encoding(tokenizer), Options(bad_lines=policy, block_bytes=1 << 16))
    assert (summary.encoder == "native") == (Path(tokenizer).stem == "native")
    dataset, made_by = IndexedDataset(out), Tokenizer(tokenizer)
    assert dataset.verify() == [] and all(document[-1] == made_by.eod_id for document in dataset)
    return summary, [made_by.decode(document[:-1]) for document in dataset]


@pytest.mark.parametrize("encoder", ["native", "library"])
@pytest.mark.parametrize("what", CORPORA)
def test_lines(folder, tmp_path, what, encoder):
    content, texts, bad, blank, empty = CORPORA[what]
    tokenizer, path = str(folder / f"{encoder}.json"), tmp_path / "in.jsonl"
    path.write_bytes(content)
    summary, found = run(path, tokenizer, "skip")
    assert found == [FIRST, *texts, LAST]
    assert (summary.bad_lines, summary.blank_lines, summary.empty_documents) == (len(bad), blank, empty)
    for example, (number, reason) in zip(summary.bad_examples, bad.items(), strict=True):
        assert example["where"] == f"{path}:{number}" and example["reason"].startswith(reason)
    kept, _ = run(path, tokenizer, "quarantine")
    records = [orjson.loads(record) for record in Path(kept.quarantine).read_bytes().splitlines()] if bad else []
    assert [record["line"] for record in records] == list(bad) and (kept.quarantine is None) == (not bad)
    lines = content.split(b"\n")
    assert all(base64.b64decode(record["content_base64"]) == lines[record["line"] - 1] for record in records)
    if bad:
        with pytest.raises(DataError, match=rf"bad line; where=.*in\.jsonl:{min(bad)}; got="):
            run(path, tokenizer, "fail")


@pytest.mark.parametrize("encoder", ["native", "library"])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_that_are_cut_off(folder, tmp_path, suffix, encoder):
    content = b"".join(map(line, LONG))
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}[suffix](content)
    path = tmp_path / f"in.jsonl{suffix}"
    path.write_bytes(packed[: len(packed) * 3 // 4])
    summary, found = run(path, str(folder / f"{encoder}.json"), "skip")
    assert found == LONG[: len(found)] and len(found) > 100 and summary.bad_lines == 1
    assert (
        summary.bad_examples[0]["where"] == f"{path}:{len(found) + 1}"
        and "compressed data is damaged" in summary.bad_examples[0]["reason"]
    )


def test_a_line_of_a_gigabyte_is_passed_over_in_bounded_memory(folder, tmp_path):
    """2^30 bytes, compressed to a small file; the lines around it are read, with no more memory than the longest
    line that is read needs.
    """
    path = tmp_path / "in.jsonl.zst"
    with open(path, "wb") as file, zstandard.ZstdCompressor().stream_writer(file) as packed:
        packed.write(line(FIRST) + b'{"text": "')
        for _ in range(1 << 10):
            packed.write(b"y" * (1 << 20))
        packed.write(b'"}\n' + line(LAST))
    code = (
        "import json, re, sys; from dataclasses import asdict\n"
        "from neox.data.text.encoding import Encoding; from neox.data.text.preprocess import Options, preprocess\n"
        "summary = preprocess([sys.argv[1]], sys.argv[2], Encoding(sys.argv[3]), Options(bad_lines='quarantine'))\n"
        # not ru_maxrss, which begins with the peak of the process that started this one
        "peak = int(re.search('VmHWM: *\t *([0-9]+)', open('/proc/self/status').read())[1])\n"
        "print(json.dumps([asdict(summary), peak]))"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "out"), str(folder / "native.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    summary, kilobytes = json.loads(done.stdout)
    assert (summary["documents"], summary["bad_lines"]) == (2, 1)
    assert summary["bad_examples"] == [{"where": f"{path}:2", "reason": f"line is longer than {1 << 28} bytes"}]
    assert kilobytes < 1_000_000


PATHOLOGICAL = {"a letter": "a", "spaces": " ", "emoji": "😀", "line ends": "\n", "digits": "7", "quotes": "'"}


def seconds(encode: Callable[[str], object], text: str, runs: int) -> float:
    """CPU time of the fastest run."""
    times = []
    for _ in range(runs):
        began = time.process_time()
        encode(text)
        times.append(time.process_time() - began)
    return min(times)


@pytest.fixture(scope="module")
def merges_of_runs(tmp_path_factory) -> Path:
    """A tokenizer that merges runs of each of these characters, as those trained on large corpora do."""
    runs = [unit * n for unit in PATHOLOGICAL.values() for n in (2, 4, 8, 16, 32)]
    tokenizer = train_tokenizer(runs * 5, 400, tmp_path_factory.mktemp("runs") / "t.json")
    assert max(len(tokenizer.encode(run)) for run in runs) <= 4
    return Path(tokenizer.file)


@pytest.mark.parametrize("encoder", ["native", "library"])
@pytest.mark.parametrize("what", PATHOLOGICAL)
def test_time_is_linear_on_one_character_again_and_again(merges_of_runs, what, encoder):
    """Eight times the text takes eight times as long; if merging checked every pair again it would be 64 times."""
    file, size = merges_of_runs, 40_000 if encoder == "native" else 8_000
    if encoder == "native":
        here = core.EncodeThreads(text_encoder(TokenizerFile(file).content, specials_as_text=False, wide=True), 0)

        def encode(text: str) -> object:
            return here.text(text.encode(), -1).result()

    else:
        encode = Tokenizer(file).encode
    unit = PATHOLOGICAL[what]
    short = unit * (size // len(unit.encode()))
    assert seconds(encode, short * 8, 2) < 22 * seconds(encode, short, 4) + 0.005
