"""The peers of bench_preprocess.py: programs that tokenise JSON lines into .bin/.idx, each with other libraries.

python preprocess_peers.py gigatoken --tokenizer FILE --eod ID --out PREFIX FILE...
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
from collections.abc import Iterable, Iterator

import numpy as np
import orjson
import zstandard


def lines_of(files: Iterable[str]) -> Iterator[bytes]:
    """The lines of plain and of zstd files."""
    for file in files:
        with (
            io.BufferedReader(zstandard.open(file, "rb"), 1 << 20)
            if file.endswith(".zst")
            else open(file, "rb") as source
        ):
            yield from source


def write_dataset(prefix: str, documents: Iterable[np.ndarray]) -> None:
    """Write uint16 documents as .bin and .idx, without checks."""
    sizes = []
    with open(f"{prefix}.bin", "wb") as file:
        for ids in documents:
            sizes.append(ids.size)
            file.write(ids.tobytes())
    offsets = np.concatenate([[0], np.cumsum(np.array(sizes[:-1], dtype=np.int64) * 2)])
    with open(f"{prefix}.idx", "wb") as file:
        file.write(
            b"MMIDIDX\0\0"
            + (1).to_bytes(8, "little")
            + b"\x08"
            + len(sizes).to_bytes(8, "little")
            + (len(sizes) + 1).to_bytes(8, "little")
        )
        for array in (
            np.array(sizes, dtype=np.int32),
            offsets.astype(np.int64),
            np.arange(len(sizes) + 1, dtype=np.int64),
        ):
            file.write(array.tobytes())


def run_gigatoken(files: list[str], tokenizer_file: str, out: str, eod: int, workers: int) -> None:
    """orjson, gigatoken and numpy on one thread, the fastest pipeline that existing libraries give."""
    import gigatoken

    if workers != 1:
        raise SystemExit("gigatoken runs on one core; do=--workers 1")
    tokenizer = gigatoken.Tokenizer(tokenizer_file)
    end = np.array([eod], dtype=np.uint16)

    def documents() -> Iterator[np.ndarray]:
        for line in lines_of(files):
            text = orjson.loads(line)["text"]
            yield np.concatenate([tokenizer.encode(text.encode()).astype(np.uint16), end])

    write_dataset(out, documents())


def load_tokenizer(tokenizer_file: str) -> None:
    """Load the tokenizer in a worker process."""
    import tokenizers

    encode_line.tokenizer = tokenizers.Tokenizer.from_file(tokenizer_file)


def encode_line(line: bytes) -> list[int]:
    """The ids of a JSON line, in a worker process."""
    return encode_line.tokenizer.encode(orjson.loads(line)["text"], add_special_tokens=False).ids


def run_tokenizers(files: list[str], tokenizer_file: str, out: str, eod: int, workers: int) -> None:
    """`tokenizers` on several processes, as GPT-NeoX's preprocess_data.py uses it."""
    with multiprocessing.get_context("spawn").Pool(workers, load_tokenizer, (tokenizer_file,)) as pool:
        ids = pool.imap(encode_line, lines_of(files), chunksize=16)
        write_dataset(out, (np.array([*document, eod], dtype=np.uint16) for document in ids))


def main() -> None:
    """Run one peer."""
    peers = {"gigatoken": run_gigatoken, "tokenizers": run_tokenizers}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=peers)
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSON lines, plain or .zst")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--eod", type=int, required=True, help="id to append to each document")
    parser.add_argument("--out", required=True, metavar="PREFIX")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    peers[args.peer](args.files, args.tokenizer, args.out, args.eod, args.workers)


if __name__ == "__main__":
    main()
