"""Weights & Biases and Comet by their real packages, offline; a service that fails ends no run, and a key is in no
file.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from neox.config.schema import WandbConfig
from neox.errors import EnvironmentProblem
from neox.train import trackers
from neox.train.trackers import Trackers, load, open_trackers, run_id
from tests.distributed import environment
from tests.train.corpus import make_config, records

KEY = "0123456789abcdef0123456789abcdef01234567"
BLOCK = 32768
QUICK = ("train.train_iters=3", "evaluate.interval=0")


def train_once(config, folder: Path) -> str:
    """A run in a process of its own, with keys in the environment; returns what it printed."""
    conf = folder / "config.yml"
    conf.write_text(config)
    secrets = environment(WANDB_API_KEY=KEY, COMET_API_KEY=KEY, HOME=folder)
    done = subprocess.run(
        [sys.executable, "train.py", "--conf", str(conf)], env=secrets, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def files_with(text: str, folder: Path) -> list[Path]:
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            if path.suffix == ".zip":
                with zipfile.ZipFile(path) as archive:
                    content = b"".join(archive.read(name) for name in archive.namelist())
            if text.encode() in content:
                found.append(path)
    return found


def log_records(path: Path) -> list[bytes]:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    data, at, parts, out = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # complete, or the last chunk
            out.append(parts)
            parts = b""
    return out


def test_wandb_offline_holds_the_run_and_no_key(corpus, tmp_path):
    pytest.importorskip("wandb", reason="needs wandb: pip install neox-train[wandb]")
    from wandb.proto import wandb_internal_pb2

    text = json.loads(corpus_text(corpus, tmp_path / "run"))
    text["logging"]["wandb"] = {"project": "counting", "mode": "offline"}
    printed = train_once(json.dumps(text), tmp_path)
    assert f"Weights & Biases: {tmp_path / 'run' / 'wandb'}; upload by `wandb sync`" in printed
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert (tmp_path / "run" / "wandb.id").read_text().strip() in written.name
    losses = {}
    for data in log_records(written):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            losses[row["_step"]] = row["loss"]
    assert losses == {row["step"]: row["loss"] for row in records(tmp_path / "run")}
    assert files_with(KEY, tmp_path) == [] and KEY not in printed


def test_comet_offline_holds_the_run_and_no_key(corpus, tmp_path):
    pytest.importorskip("comet_ml", reason="needs comet_ml: pip install neox-train[comet]")
    text = json.loads(corpus_text(corpus, tmp_path / "run"))
    text["logging"]["comet"] = {"project": "counting", "mode": "offline", "tags": ["small"], "name": "first"}
    printed = train_once(json.dumps(text), tmp_path)
    (written,) = (tmp_path / "run" / "comet").glob("*.zip")
    with zipfile.ZipFile(written) as archive:
        messages = [json.loads(line) for line in archive.read("messages.json").decode().splitlines()]
    metrics = [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"]
    losses = {metric["step"]: metric["metricValue"] for metric in metrics if metric["metricName"] == "loss"}
    assert losses == {row["step"]: row["loss"] for row in records(tmp_path / "run")}
    assert files_with(KEY, tmp_path) == [] and KEY not in printed


def corpus_text(corpus: Path, run: Path) -> str:
    from neox.config.values import to_builtins

    return json.dumps(to_builtins(make_config(corpus, run, *QUICK)))


class Failing:
    """A service that gives up at step 2."""

    def __init__(self):
        self.steps = []

    def log(self, step, numbers):
        if step == 2:
            raise ConnectionError("lost\nand more")
        self.steps.append((step, dict(numbers)))

    def finish(self):
        raise AssertionError("never reached: it was left behind")


def test_a_service_that_fails_is_left_behind(corpus, tmp_path, monkeypatch):
    service, said = Failing(), []
    monkeypatch.setattr(trackers, "open_trackers", lambda *_: [service])
    services = Trackers(make_config(corpus, tmp_path), tmp_path, said.append)
    for step in (1, 2, 3):
        services.log({"step": step, "loss": 0.5, "grad_norm": None})
    services.close()
    assert service.steps == [(1, {"loss": 0.5})]
    assert said == ["Failing stopped recording: lost"]


def test_a_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        EnvironmentProblem, match=r"wandb is not installed; where=logging.wandb.*pip install neox-train\[wandb\]"
    ):
        load("wandb")


def test_an_id_is_made_once(tmp_path):
    assert run_id(tmp_path / "id", lambda: "abc") == "abc"
    assert run_id(tmp_path / "id", lambda: "other") == "abc"


def test_without_a_key_the_run_is_recorded_offline(corpus, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb: pip install neox-train[wandb]")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    monkeypatch.setenv("NETRC", os.fspath(tmp_path / "none"))
    said: list[str] = []
    config = make_config(corpus, tmp_path / "run", 'logging.wandb={"project": "x"}')
    (tmp_path / "run").mkdir()
    assert config.logging.wandb == WandbConfig(project="x")
    (service,) = open_trackers(config, tmp_path / "run", said.append)
    service.finish()
    assert said[0].startswith("Weights & Biases cannot be reached (") and said[0].endswith("): recording offline")
    assert "wandb sync" in said[1]
