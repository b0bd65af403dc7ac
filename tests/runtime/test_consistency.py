"""Processes with different configs, data or versions are stopped; every one names the key that differs."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

import neox
from neox.config.schema.data import DataSource
from neox.errors import ConfigError
from neox.runtime.consistency import check_consistency, fingerprint, fingerprint_run
from tests.fork_server import Forks, fork_server, free_port
from tests.train.corpus import config_text, make_config, make_corpus


class Told:
    """The other processes, as `RankGroup.all_gather_json` gives them: each answers in its turn."""

    def __init__(self, *others: dict):
        self.others = others

    def all_gather_json(self, message):
        if isinstance(message, dict):
            return [message, *self.others]
        return [message, *(str(i) for i in range(len(self.others)))]


def test_the_differing_key_is_named_with_its_values_and_ranks():
    with pytest.raises(ConfigError) as problem:
        check_consistency(
            {"optimizer.lr": "0.1", "a": "1"},
            Told({"optimizer.lr": "0.1", "a": "1"}, {"optimizer.lr": "0.2", "a": "1"}),
        )
    assert problem.value.where == "optimizer.lr"
    assert problem.value.got == "optimizer.lr: 0.1 on rank 0, 0.2 on rank 2"


def test_facts_hold_config_data_and_versions(tmp_path):
    make_corpus(tmp_path)
    known = fingerprint_run(make_config(tmp_path, tmp_path / "run"))
    assert known["optimizer.lr"] == "0.003"
    assert (known["version of neox"], known["version of torch"]) == (neox.__version__, torch.__version__)
    assert known[f"{tmp_path}/valid.bin"] == fingerprint(tmp_path / "valid.bin") != known[f"{tmp_path}/train.bin"]
    assert {f"{tmp_path}/train.idx", f"{tmp_path}/valid.bin", "version of torch"} <= set(known)
    before = fingerprint(tmp_path / "train.bin")
    raw = bytearray((tmp_path / "train.bin").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "train.bin").write_bytes(raw)
    assert fingerprint(tmp_path / "train.bin") != before
    assert fingerprint(tmp_path / "none").startswith("unreadable")


def test_a_fingerprint_is_of_the_size_and_of_both_ends(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(200000))
    seen = {fingerprint(file)}
    for at in (0, 65535, 200000 - 65536):
        file.write_bytes(bytes(at) + b"x" + bytes(200000 - at - 1))
        seen.add(fingerprint(file))
    file.write_bytes(bytes(200001))
    assert len(seen | {fingerprint(file)}) == 5
    file.write_bytes(bytes(65536) + b"x" + bytes(200000 - 65537))  # the middle is not read
    assert fingerprint(file) in seen


def test_every_file_that_a_config_names_is_compared(tmp_path):
    source = DataSource(path="a", labels="b", rejected="c", rejected_labels="d")
    more = {"train": (source,), "validation": (DataSource(path="e"),), "test": (DataSource(path="f"),)}
    config = make_config(tmp_path, tmp_path / "run")
    data = config.data.model_copy(update={**more, "path": "g", "text": ("h.jsonl",)})
    tokenizer = config.tokenizer.model_copy(update={"file": "tokenizer.json"})
    known = fingerprint_run(config.model_copy(update={"data": data, "tokenizer": tokenizer}))
    assert {f"{name}{end}" for name in "abcdefg" for end in (".idx", ".bin")} <= set(known)
    assert known["h.jsonl"] == known["tokenizer.json"] == "unreadable: No such file or directory"


@pytest.mark.parametrize(("number", "end"), [(5, "k4"), (6, "k4 and 1 more")])
def test_no_more_than_five_keys_are_listed(number, end):
    with pytest.raises(ConfigError) as problem:
        check_consistency({f"k{i}": "1" for i in range(number)}, Told({}))
    assert problem.value.where.endswith(end)
    assert problem.value.got.startswith("k0: 1 on rank 0, None on rank 1, k1: ")
    assert "k5" not in problem.value.got


def test_processes_that_agree_pass():
    class Same:
        def all_gather_json(self, message):
            assert isinstance(message, str), "only digests are exchanged"
            return [message, message]

    check_consistency({"a": "1"}, Same())


def test_what_is_compared_depends_on_keys_and_values_and_not_on_their_order():
    digests = []

    class Same:
        def all_gather_json(self, message):
            digests.append(message)
            return [message, message]

    for known in ({"a": "1", "b": "2"}, {"b": "2", "a": "1"}, {"a": "2", "b": "1"}, {"a": "1"}, {"a": "12", "b": ""}):
        check_consistency(known, Same())
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_a_key_that_only_another_process_has_is_named():
    with pytest.raises(ConfigError) as problem:
        check_consistency({"b": "1"}, Told({"b": "1"}, {"a": "x", "b": "1"}, {"b": "2"}))
    assert problem.value.where == "a, b"
    assert problem.value.got == "a: None on rank 0, x on rank 2, b: 1 on rank 0, 2 on rank 3"


def ranks(folder: Path, confs: list[Path], numbers: tuple[int, ...]) -> Forks:
    """Processes of one run with a config and a rank each."""
    server, pids, logs = fork_server(), [], []
    shared = {"WORLD_SIZE": str(len(confs)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for i, (conf, number) in enumerate(zip(confs, numbers, strict=True)):
        logs.append(folder / f"output-{i}.txt")
        variables = {"RANK": str(number), "LOCAL_RANK": str(number), **shared}
        pids.append(server.ask({"argv": ["train", "--conf", str(conf)], "variables": variables, "log": str(logs[-1])}))
    server.pids += pids
    return Forks(server, pids, logs)


@pytest.mark.distributed
def test_a_run_with_two_configs_is_refused(tmp_path):
    make_corpus(tmp_path / "data")
    text = config_text(tmp_path / "data", tmp_path / "run")
    for name, content in (("a.yml", text), ("b.yml", text.replace('"lr": 0.003', '"lr": 0.004'))):
        (tmp_path / name).write_text(content)
    results = ranks(tmp_path, [tmp_path / "a.yml", tmp_path / "b.yml"], (0, 1)).results()
    assert [result.returncode for result in results] == [2, 2]
    both = "".join(result.output for result in results)
    assert "where=optimizer.lr; got=optimizer.lr: 0.003 on rank 0, 0.004 on rank 1" in both
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.distributed
def test_a_rank_that_is_there_twice_is_refused(tmp_path):
    make_corpus(tmp_path / "data")
    (tmp_path / "a.yml").write_text(config_text(tmp_path / "data", tmp_path / "run"))
    processes = ranks(tmp_path, [tmp_path / "a.yml"] * 4, (0, 1, 1, 3))
    processes.wait_for(lambda: "rank 1 twice" in processes.output(1) + processes.output(2), 90.0)
    processes.signal(signal.SIGKILL)
