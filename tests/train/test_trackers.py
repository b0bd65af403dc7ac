"""Weights & Biases and Comet by their real packages, offline; a service that fails ends no run, and a key is in no
file.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import zipfile
from pathlib import Path

import pytest

from neox.config.schema import WandbConfig
from neox.config.values import flatten
from neox.errors import EnvironmentProblem
from neox.train import trackers
from neox.train.trackers import Trackers, load, open_trackers, run_id
from tests.fork_server import fork_server
from tests.train.corpus import make_config, records

KEY = "0123456789abcdef0123456789abcdef01234567"
BLOCK = 32768
QUICK = ("train.train_iters=3", "evaluate.interval=0")


def train_once(config, folder: Path) -> str:
    """A run in a process of its own, with keys in the environment; returns what it printed."""
    conf = folder / "config.yml"
    conf.write_text(config)
    secrets = {"WANDB_API_KEY": KEY, "COMET_API_KEY": KEY, "HOME": str(folder)}
    (done,) = fork_server().command(["train", "--conf", conf], folder, variables=secrets).results()
    return done.check().output


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


@pytest.mark.parametrize(("name", "extra"), [("wandb", "wandb"), ("comet_ml", "comet")])
def test_the_extra_of_a_missing_package_is_named(monkeypatch, name, extra):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EnvironmentProblem, match=rf"{name} is not installed; where=logging.{extra};.*\[{extra}\]"):
        load(name)


def test_a_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        EnvironmentProblem, match=r"wandb is not installed; where=logging.wandb.*pip install neox-train\[wandb\]"
    ):
        load("wandb")


def test_an_id_is_made_once(tmp_path):
    assert run_id(tmp_path / "id", lambda: "abc") == "abc"
    assert run_id(tmp_path / "id", lambda: "other") == "abc"
    (tmp_path / "id").write_text("")  # a crash right after its creation
    assert run_id(tmp_path / "id", lambda: "other") == "other"


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


class Service:
    """Stands for the packages: notes every call, and fails to start online if it is asked to."""

    def __init__(self, fails: bool = False):
        self.calls = []
        self.fails = fails
        self.offline, self.url = False, "https://example.org/run"

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            if self.fails and kwargs.get("mode") != "offline" and name in ("init", "Experiment"):
                raise ConnectionError("no route\nto host")
            return kwargs if name == "Settings" else self

        return call

    def of(self, name):
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


def opened(monkeypatch, corpus, folder, service, section):
    monkeypatch.setattr(trackers, "load", lambda name: service)
    said = []
    config = make_config(corpus, folder, f"logging.{section}")
    (tracker,) = open_trackers(config, folder, said.append)
    return tracker, said, config


def test_what_wandb_is_started_with(corpus, tmp_path, monkeypatch):
    section = 'wandb={"project": "p", "entity": "e", "group": "g", "name": "n", "host": "https://h"}'
    tracker, said, config = opened(monkeypatch, corpus, tmp_path, service := Service(), section)
    ((_, login),) = service.of("login")
    assert login == {"key": None, "host": "https://h", "timeout": 1, "verify": False, "relogin": False, "force": True}
    ((_, init),) = service.of("init")
    settings = init.pop("settings")
    assert init == {
        "mode": "online",
        "project": "p",
        "entity": "e",
        "group": "g",
        "name": "n",
        "dir": os.fspath(tmp_path),
        "id": (tmp_path / "wandb.id").read_text().strip(),
        "resume": "allow",
        "config": dict(flatten(config)),
    }
    assert len(init["id"]) == 8
    assert settings == {
        "console": "off",
        "save_code": False,
        "disable_git": True,
        "silent": True,
        "init_timeout": 60,
        "login_timeout": 60,
        "base_url": "https://h",
    }
    assert said == ["Weights & Biases: https://example.org/run"]
    tracker.log(3, {"loss": 0.5})
    tracker.finish()
    assert service.of("log") == [(({"loss": 0.5},), {"step": 3})] and service.of("finish") == [((), {})]


def test_a_wandb_that_cannot_be_reached_records_offline(corpus, tmp_path, monkeypatch):
    _, said, _ = opened(monkeypatch, corpus, tmp_path, service := Service(fails=True), 'wandb={"project": "p"}')
    first, second = (kwargs for _, kwargs in service.of("init"))
    assert (first.pop("mode"), second.pop("mode")) == ("online", "offline") and first == second
    assert said[0] == "Weights & Biases cannot be reached (no route): recording offline"
    assert "base_url" not in first["settings"]  # the package's own, or that of WANDB_BASE_URL


def test_an_offline_wandb_that_does_not_start_is_an_error(corpus, tmp_path, monkeypatch):
    service = Service()
    service.init = lambda **_: 1 / 0
    with pytest.raises(EnvironmentProblem, match=r"wandb does not start; where=logging\.wandb; got=division by zero"):
        opened(monkeypatch, corpus, tmp_path, service, 'wandb={"mode": "offline"}')
    assert service.of("login") == []


def test_what_comet_is_started_with(corpus, tmp_path, monkeypatch):
    section = 'comet={"project": "p", "workspace": "w", "name": "n", "tags": ["a", "b"]}'
    tracker, said, config = opened(monkeypatch, corpus, tmp_path, service := Service(), section)
    ((_, started),) = service.of("Experiment")
    assert (started.pop("project_name"), started.pop("workspace")) == ("p", "w")
    assert started.pop("display_summary_level") == 0
    assert len(started) == 9 and not any(started.values())
    assert service.of("OfflineExperiment") == [] and said == ["Comet: https://example.org/run"]
    assert service.of("set_name") == [(("n",), {})] and service.of("add_tags") == [((["a", "b"],), {})]
    assert service.of("log_parameters") == [((dict(flatten(config)),), {})]
    tracker.log(3, {"loss": 0.5})
    tracker.finish()
    assert service.of("log_metrics") == [(({"loss": 0.5},), {"step": 3})] and service.of("end") == [((), {})]


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_comet_that_is_offline_or_cannot_be_reached(corpus, tmp_path, monkeypatch, mode):
    service = Service(fails=True)
    service.url = None
    _, said, _ = opened(monkeypatch, corpus, tmp_path, service, f'comet={{"mode": "{mode}"}}')
    ((_, started),) = service.of("OfflineExperiment")
    assert started["offline_directory"] == os.fspath(tmp_path / "comet") and (tmp_path / "comet").is_dir()
    assert len(service.of("Experiment")) == (mode == "online") and service.of("set_name") == []
    unreachable = ["Comet cannot be reached (no route): recording offline"] if mode == "online" else []
    assert said == [*unreachable, f"Comet: {tmp_path / 'comet'}"]


def test_all_services_are_closed_although_one_fails(corpus, tmp_path, monkeypatch):
    class Good:
        finished = 0

        def finish(self):
            self.finished += 1

    said, good = [], Good()
    monkeypatch.setattr(trackers, "open_trackers", lambda *_: [Failing(), good])
    services = Trackers(make_config(corpus, tmp_path), tmp_path, said.append)
    services.close()
    services.close()
    assert good.finished == 1
    assert said == ["Failing stopped recording: never reached: it was left behind"]


def test_a_refused_login_records_offline(corpus, tmp_path, monkeypatch):
    service = Service()
    service.login = lambda **_: False
    service.offline = True
    _, said, _ = opened(monkeypatch, corpus, tmp_path, service, 'wandb={"project": "p"}')
    assert [kwargs["mode"] for _, kwargs in service.of("init")] == ["offline"]
    assert said == [
        "Weights & Biases cannot be reached (no key: set WANDB_API_KEY, or run `wandb login`): recording offline",
        f"Weights & Biases: {tmp_path / 'wandb'}; upload by `wandb sync`",
    ]


def test_every_service_that_is_configured_is_opened(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "load", lambda name: Service())
    sections = ('logging.wandb={"project": "p"}', 'logging.comet={"project": "p"}')
    names = ["Wandb", "Comet"]
    for part in (slice(0, 0), slice(0, 1), slice(1, 2), slice(0, 2)):
        services = open_trackers(make_config(corpus, tmp_path, *sections[part]), tmp_path, print)
        assert [type(service).__name__ for service in services] == names[part]


def test_a_service_that_fails_costs_the_others_no_step(corpus, tmp_path, monkeypatch):
    class Good:
        def __init__(self):
            self.steps = []

        def log(self, step, numbers):
            self.steps.append((step, numbers))

    services = [Good(), Failing(), Good()]
    monkeypatch.setattr(trackers, "open_trackers", lambda *_: list(services))
    recording = Trackers(make_config(corpus, tmp_path), tmp_path, print)
    for step in (1, 2, 3):
        recording.log({"step": step, "loss": 0.0, "grad_norm": None})
    assert services[0].steps == services[2].steps == [(step, {"loss": 0.0}) for step in (1, 2, 3)]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("\n one\ntwo"), "one"),
        (ValueError(), "ValueError"),
        (ConnectionError("  "), "ConnectionError"),
        (OSError("x" * 300), "x" * 200),
    ],
)
def test_an_error_is_one_line(error, text):
    assert trackers.first_line(error) == text


def test_a_stored_id_is_read_without_its_line_end(tmp_path):
    (tmp_path / "id").write_text("  abc\n")
    assert run_id(tmp_path / "id", lambda: pytest.fail("there is one")) == "abc"
    assert run_id(tmp_path / "new", lambda: "def") == (tmp_path / "new").read_text().strip() == "def"
