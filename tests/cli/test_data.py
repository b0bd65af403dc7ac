"""neox data inspect, verify and merge, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from neox.cli.main import main
from neox.data.store.indexed import IndexedDataset, IndexedWriter
from neox.data.text.tokenizer import train_tokenizer


@pytest.fixture
def prefix(tmp_path) -> str:
    tokenizer = train_tokenizer(["hello world " * 20], 300, tmp_path / "t.json")
    with IndexedWriter(
        tmp_path / "d", "uint16", tokenizer_hash=tokenizer.hash, vocab_size=tokenizer.vocab_size, eod_id=0
    ) as writer:
        for text in ("hello world", "world", "hello"):
            writer.add_document([*tokenizer.encode(text), 0])
    return str(tmp_path / "d")


def test_inspect(prefix, tmp_path, capsys):
    assert (
        main(["data", "inspect", prefix, "--tokenizer", str(tmp_path / "t.json"), "--samples", "2", "--scan", "--json"])
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert (
        result["documents"],
        result["dtype"],
        result["eod_tokens"],
        result["eod_per_document"],
        result["smallest_id_found"],
    ) == (3, "uint16", 3, 1.0, 0)
    assert result["largest_id"] == result["largest_id_found"]
    assert "hello world" in result["samples"][0] and len(result["samples"]) == 2
    assert main(["data", "inspect", prefix, "--samples", "1"]) == 0
    printed = capsys.readouterr().out
    assert (
        "documents: 3" in printed
        and "document_tokens: shortest" in printed
        and "###" in printed
        and "duplicates:\n  documents: 0" in printed
    )
    assert (
        result["histogram"][0]["documents"] > 0
        and result["duplicates"]["documents"] == 0
        and result["documents_that_end_in_eod"] == 3
    )
    assert main(["data", "inspect", prefix, "--no-scan", "--json"]) == 0
    assert "duplicates" not in json.loads(capsys.readouterr().out)


def test_inspect_refuses_another_tokenizer(prefix, tmp_path, capsys):
    other = tmp_path / "other.json"
    cut = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    other.write_text(json.dumps(json.loads((tmp_path / "t.json").read_text()) | {"truncation": cut}))
    assert main(["data", "inspect", prefix, "--tokenizer", str(other), "--samples", "1"]) == 3
    assert capsys.readouterr().err.startswith(
        f"error[3] dataset was built with a different tokenizer; where={prefix}.json"
    )


def test_overlap(prefix, tmp_path, capsys):
    with IndexedWriter(tmp_path / "held", "int32", eod_id=0) as writer:
        for document in ([1, 2, 0], IndexedDataset(prefix)[1].tolist()):
            writer.add_document(document)
    held = str(tmp_path / "held")
    assert main(["data", "overlap", prefix, held]) == 3
    printed = capsys.readouterr()
    assert f"1 of 2 documents of {held}" in printed.out
    assert printed.err.startswith(f"error[3] datasets overlap; where={held}, {prefix}; got=1 of 2 documents")
    assert main(["data", "overlap", prefix, held, "--json"]) == 3
    assert json.loads(capsys.readouterr().out)[0]["examples"] == [f"{held} document 1 is {prefix} document 1"]
    with IndexedWriter(tmp_path / "clean", "uint16", eod_id=0) as writer:
        writer.add_document([5, 5, 5])
    assert main(["data", "overlap", prefix, str(tmp_path / "clean")]) == 0
    assert main(["data", "overlap", prefix]) == 2


@pytest.mark.parametrize("order", ["epoch", "neox"])
def test_overlap_within_the_parts_of_a_config(prefix, tmp_path, capsys, order):
    with IndexedWriter(tmp_path / "whole", "uint16", eod_id=0) as writer:
        for number in (1, 2, 3, 4, 2, 5, 6, 7, 8, 4):
            writer.add_document([number, number, 0])
    model = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 300}
    values = {"model": model, "data": {"path": str(tmp_path / "whole"), "split": "4,4,2", "order": order}}
    (tmp_path / "run.yml").write_text(json.dumps(values))
    assert main(["data", "overlap", "--conf", str(tmp_path / "run.yml"), "--json"]) == 3
    found = {(row["in"], row["from"]): row["documents"] for row in json.loads(capsys.readouterr().out)}
    assert found == {("train", "validation"): 1, ("train", "test"): 1, ("validation", "test"): 0}
    values["data"] = {"train": [str(tmp_path / "whole")], "validation": [prefix]}
    (tmp_path / "run.yml").write_text(json.dumps(values))
    assert main(["data", "overlap", "--conf", str(tmp_path / "run.yml")]) == 0
    values["data"] = {"path": str(tmp_path / "whole"), "split": "1,0,0", "order": order}
    (tmp_path / "run.yml").write_text(json.dumps(values))
    capsys.readouterr()
    assert main(["data", "overlap", "--conf", str(tmp_path / "run.yml")]) == 2
    assert f"where={tmp_path}/run.yml; got=documents for train only; want=validation" in capsys.readouterr().err


def test_inspect_of_an_empty_dataset(tmp_path, capsys):
    with IndexedWriter(tmp_path / "e", "uint16"):
        pass
    assert main(["data", "inspect", str(tmp_path / "e"), "--samples", "3", "--scan"]) == 0
    assert "documents: 0" in capsys.readouterr().out


def test_verify(prefix, capsys):
    assert main(["data", "verify", prefix]) == 0
    assert capsys.readouterr().out == f"{prefix}: intact\n"
    with open(f"{prefix}.bin", "r+b") as file:
        file.write(b"\xfe")
    assert main(["data", "verify", prefix, "--json"]) == 3
    printed = capsys.readouterr()
    assert json.loads(printed.out)[0]["damaged"] == [[0, IndexedDataset(prefix).num_tokens * 2]]
    assert printed.err.startswith("error[3] dataset is damaged")


def test_verify_ids_and_missing_files(prefix, capsys):
    assert main(["data", "verify", prefix, "--vocab-size", "256"]) == 3
    assert "is outside a vocabulary of 256" in capsys.readouterr().out
    assert main(["data", "verify", prefix, f"{prefix}-none"]) == 3
    printed = capsys.readouterr()
    assert f"{prefix}: intact" in printed.out and f"{prefix}-none: cannot open data file" in printed.out
    assert printed.err.startswith("error[3] cannot open data file") and printed.err.count("error[") == 1


def test_merge(prefix, tmp_path, capsys):
    out = str(tmp_path / "m")
    assert main(["data", "merge", prefix, prefix, "--out", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 6
    merged, source = IndexedDataset(out), IndexedDataset(prefix)
    assert all(np.array_equal(merged[i], source[i % 3]) for i in range(6))
    assert merged.sidecar.tokenizer_hash == source.sidecar.tokenizer_hash and merged.verify() == []
    assert main(["data", "merge", prefix, "--out", out]) == 3
    assert "already exists" in capsys.readouterr().err
    assert main(["data", "merge", prefix, "--out", prefix, "--overwrite"]) == 2
    assert "cannot be merged into itself" in capsys.readouterr().err


def test_merge_into_an_input_by_another_name_is_refused(prefix, tmp_path, monkeypatch, capsys):
    """It would replace an input, and merging again would double it."""
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for out in ("d", "./d", "link/d", str(tmp_path / "link" / ".." / tmp_path.name / "d")):
        assert main(["data", "merge", prefix, prefix, "--out", out, "--overwrite"]) == 2
        assert "cannot be merged into itself" in capsys.readouterr().err
    assert len(IndexedDataset(prefix)) == 3


@pytest.mark.parametrize("name", ["", "/", "/.", "/.."])
def test_a_prefix_without_a_name_is_refused(tmp_path, capsys, prefix, name):
    """It would be written as the hidden files .bin and .idx."""
    out = str(tmp_path / "folder") + name if name else ""
    for arguments in (["merge", prefix, "--out", out], ["inspect", out], ["verify", out]):
        assert main(["data", *arguments]) == 3
        assert "error[3] name of a dataset is missing; where=" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()


def test_options_out_of_range(prefix, capsys):
    assert main(["data", "inspect", prefix, "--samples", "-1"]) == 2
    assert "option out of range; where=--samples; got=-1; want=at least 0" in capsys.readouterr().err
    for size in ("0", "-5"):
        assert main(["data", "verify", prefix, "--vocab-size", size]) == 2
        assert f"option out of range; where=--vocab-size; got={size}" in capsys.readouterr().err


def test_merge_does_not_give_damaged_tokens_new_checksums(prefix, tmp_path, capsys):
    out, tokens = tmp_path / "m", bytearray(Path(f"{prefix}.bin").read_bytes())
    tokens[2] ^= 1
    Path(f"{prefix}.bin").write_bytes(tokens)
    assert main(["data", "merge", prefix, "--out", str(out)]) == 3
    assert "data file is damaged: checksum differs" in capsys.readouterr().err
    assert not list(tmp_path.glob("m.*"))


def test_merge_refuses_other_tokenizers_and_types(prefix, tmp_path, capsys):
    with IndexedWriter(tmp_path / "o", "uint16", tokenizer_hash="0" * 64) as writer:
        writer.add_document([1])
    assert main(["data", "merge", prefix, str(tmp_path / "o"), "--out", str(tmp_path / "m")]) == 3
    assert "different tokenizers" in capsys.readouterr().err
    with IndexedWriter(tmp_path / "w", "int32") as writer:
        writer.add_document([1])
    assert main(["data", "merge", prefix, str(tmp_path / "w"), "--out", str(tmp_path / "m")]) == 3
    assert "different token types" in capsys.readouterr().err
    assert not (tmp_path / "m.bin").exists()


@pytest.mark.parametrize("action", ["inspect", "verify", "merge"])
def test_help(action, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["data", action, "--help"])
    assert stopped.value.code == 0 and "PREFIX" in capsys.readouterr().out
