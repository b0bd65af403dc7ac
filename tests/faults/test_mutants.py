"""Random damage to a checkpoint's files: the error names file and tensor, and a resume falls back with a warning."""

import logging
import random
import shutil
from pathlib import Path

import pytest

from neox.checkpoint.find import find
from neox.checkpoint.reader import Checkpoint
from neox.checkpoint.verify import problems
from neox.errors import CheckpointError
from tests.checkpoint.builders import make_state, save_one


def flip(path: Path, draw: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)


def truncate(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def empty(path: Path, draw: random.Random) -> None:
    path.write_bytes(b"")


def delete(path: Path, draw: random.Random) -> None:
    path.unlink()


def lengthen(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 600)))


def garbage(path: Path, draw: random.Random) -> None:
    path.write_bytes(draw.randbytes(draw.choice([path.stat().st_size, draw.randrange(1, 3000)])))


def overwrite(path: Path, draw: random.Random) -> None:
    """A few bytes replaced, as by a stray write; at least one of them by another."""
    raw = bytearray(path.read_bytes())
    begin = draw.randrange(len(raw))
    for i in range(begin, min(begin + draw.randrange(1, 40), len(raw))):
        raw[i] ^= draw.randrange(1, 256)
    path.write_bytes(raw)


def zero_block(path: Path, draw: random.Random) -> None:
    """A run of bytes lost to zeros, as after a crash of the disk; nothing happens where they were zero."""
    raw = bytearray(path.read_bytes())
    begin = draw.randrange(len(raw))
    stop = min(begin + draw.randrange(1, 512), len(raw))
    if not any(raw[begin:stop]):
        return flip(path, draw)
    raw[begin:stop] = bytes(stop - begin)
    return path.write_bytes(raw)


def link(path: Path, draw: random.Random) -> None:
    kept = path.with_name("kept")
    path.rename(kept)
    path.symlink_to(kept)


def folder(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


def foreign(path: Path, draw: random.Random) -> None:
    (path.parent / draw.choice(["extra.bin", "shard.safetensors", "manifest.json.bak", "ü ber"])).write_bytes(
        draw.randbytes(9)
    )


MUTATIONS = (flip, flip, flip, truncate, empty, delete, lengthen, garbage, overwrite, zero_block, link, folder, foreign)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("pristine")
    save_one(root, 1, make_state(1), shard_bytes=300)
    save_one(root, 2, make_state(2), shard_bytes=300)
    return root


def tensor_at(mutant: Path, original: Path, name: str) -> str | None:
    """kind/name of the tensor whose bytes first differ; None where that is in a header, or no shard."""
    a, b = (mutant / name).read_bytes(), (original / name).read_bytes()
    first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    with Checkpoint(original) as checkpoint:
        for file, entry in checkpoint.manifest.segments():
            width = checkpoint.tensor(entry.name, entry.kind).element_size() if entry.kind != "rng" else 1
            begin = file.header + entry.offset
            if file.name == name and first is not None and begin <= first < begin + (entry.stop - entry.start) * width:
                return f"{entry.kind}/{entry.name}"
    return None


def check_mutant(pristine: Path, root: Path, seed: int, caplog) -> None:
    draw = random.Random(seed)
    shutil.copytree(pristine, root)
    good, bad = root / "step_00000001", root / "step_00000002"
    victim = draw.choice(sorted(bad.iterdir()))
    mutate = draw.choice(MUTATIONS)
    mutate(victim, draw)
    about = f"seed {seed}: {mutate.__name__} of {victim.name}"
    found = problems(bad)
    assert found, about
    text = found[0].line()
    if mutate is not foreign:
        assert victim.name in text, f"{about}: {text}"
    if (
        victim.is_file()
        and victim.suffix == ".safetensors"
        and victim.stat().st_size == (pristine / bad.name / victim.name).stat().st_size
        and mutate is flip
    ):
        tensor = tensor_at(bad, pristine / bad.name, victim.name)
        assert tensor is None or tensor in text, f"{about}: {tensor} not in {text}"
    with pytest.raises(CheckpointError):
        find(root, str(bad))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert find(root, "auto") == good, about
    assert any("skipped checkpoint" in record.message for record in caplog.records), about
    shutil.rmtree(root)


def test_a_hundred_mutants_are_refused(pristine, tmp_path, caplog):
    for seed in range(100):
        check_mutant(pristine, tmp_path / "root", seed, caplog)


@pytest.mark.faults
def test_a_thousand_mutants_are_refused(pristine, tmp_path, caplog):
    for seed in range(1000, 2000):
        check_mutant(pristine, tmp_path / "root", seed, caplog)
