"""Services that show a run: Weights & Biases and Comet, where `logging.wandb` and `logging.comet` configure them.

Training does not depend on them. Where a service cannot be reached at the start the run is recorded offline, in run.dir, and a line says how to upload
it; what fails later ends the recording, not the run. Keys are read by the packages themselves, from WANDB_API_KEY, COMET_API_KEY or their
own files: no config, log or checkpoint of ours ever holds one.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from neox.config.load import flatten
from neox.config.schema import CometConfig, Config, WandbConfig
from neox.errors import EnvironmentProblem

WAIT = 60  # seconds that a service gets to answer, at the start and at the end
Say = Callable[[str], object]


class Tracker(Protocol):
    """One service."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record the numbers of a step."""

    def finish(self) -> None:
        """Send what is left, and end."""


class Wandb:
    """A run on Weights & Biases. It has the id that is kept in run.dir/wandb.id, so that a resumed run goes on where it was.

    Args:
        settings: `logging.wandb`.
        config: of the run, shown with it.
        folder: run.dir.
        say: told where the records are.
    """

    def __init__(self, settings: WandbConfig, config: Config, folder: Path, say: Say):
        package = load("wandb")
        common = {
            "project": settings.project,
            "entity": settings.entity,
            "group": settings.group,
            "name": settings.name,
            "dir": os.fspath(folder),
            "id": run_id(folder / "wandb.id", partial(secrets.token_hex, 4)),
            "resume": "allow",
            "config": dict(flatten(config)),
        }
        quiet = {"console": "off", "save_code": False, "disable_git": True, "silent": True, "init_timeout": WAIT, "login_timeout": WAIT}
        if settings.host is not None:
            quiet["base_url"] = settings.host
        try:
            if settings.mode == "online" and not package.login(key=None, host=settings.host, timeout=1, verify=False, relogin=False, force=True):
                raise RuntimeError("no key: set WANDB_API_KEY, or run `wandb login`")
            self.run = package.init(mode=settings.mode, settings=package.Settings(**quiet), **common)
        except Exception as error:  # the package raises several kinds, none of which may end a training
            if settings.mode == "offline":
                raise EnvironmentProblem("wandb does not start", where="logging.wandb", got=first_line(error)) from error
            say(f"Weights & Biases cannot be reached ({first_line(error)}): recording offline")
            self.run = package.init(mode="offline", settings=package.Settings(**quiet), **common)
        where = f"{folder / 'wandb'}; upload by `wandb sync`" if self.run.offline else self.run.url
        say(f"Weights & Biases: {where}")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record the numbers of a step."""
        self.run.log(dict(numbers), step=step)

    def finish(self) -> None:
        """Send what is left, and end."""
        self.run.finish()


class Comet:
    """An experiment on Comet.

    Args:
        settings: `logging.comet`.
        config: of the run, shown with it.
        folder: run.dir; offline records go to run.dir/comet.
        say: told where the records are.
    """

    def __init__(self, settings: CometConfig, config: Config, folder: Path, say: Say):
        package = load("comet_ml")
        common = {
            "project_name": settings.project,
            "workspace": settings.workspace,
            "display_summary_level": 0,
            **dict.fromkeys(("log_code", "log_graph", "auto_param_logging", "auto_metric_logging", "parse_args", "auto_output_logging"), False),
            **dict.fromkeys(("log_env_details", "log_git_metadata", "log_git_patch"), False),
        }
        offline = partial_offline(package, folder / "comet", common)
        if settings.mode == "offline":
            self.experiment = offline()
        else:
            try:
                self.experiment = package.Experiment(**common)
            except Exception as error:  # see Wandb
                say(f"Comet cannot be reached ({first_line(error)}): recording offline")
                self.experiment = offline()
        if settings.name is not None:
            self.experiment.set_name(settings.name)
        self.experiment.add_tags(list(settings.tags))
        self.experiment.log_parameters(dict(flatten(config)))
        say(f"Comet: {self.experiment.url or folder / 'comet'}")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record the numbers of a step."""
        self.experiment.log_metrics(dict(numbers), step=step)

    def finish(self) -> None:
        """Send what is left, and end."""
        self.experiment.end()


def partial_offline(package: ModuleType, folder: Path, common: Mapping[str, Any]) -> Callable[[], Any]:
    """What makes an experiment that is kept in `folder`."""

    def make() -> Any:
        folder.mkdir(parents=True, exist_ok=True)
        return package.OfflineExperiment(offline_directory=os.fspath(folder), **common)

    return make


def load(name: str) -> ModuleType:
    """A package of the extras. Raises EnvironmentProblem where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = "comet" if name == "comet_ml" else name
        do = f"pip install neox-train[{extra}], or take logging.{extra} out of the config"
        raise EnvironmentProblem(f"{name} is not installed", where=f"logging.{extra}", got=error, do=do) from error


def run_id(path: Path, make: Callable[[], str]) -> str:
    """The id kept in a file; made and kept there the first time."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8").strip()
    made = make()
    path.write_text(made + "\n", encoding="utf-8")
    return made


def first_line(error: BaseException) -> str:
    """An error in a few words."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def open_trackers(config: Config, folder: Path, say: Say) -> list[Tracker]:
    """The services that the config asks for, started.

    Raises:
        EnvironmentProblem: a package is not installed.
    """
    section = config.logging
    found: list[Tracker] = []
    if section.wandb is not None:
        found.append(Wandb(section.wandb, config, folder, say))
    if section.comet is not None:
        found.append(Comet(section.comet, config, folder, say))
    return found


class Trackers:
    """The services of a run; one that fails is told of once and left behind."""

    def __init__(self, config: Config, folder: Path, say: Say):
        self._say = say
        self._open = open_trackers(config, folder, say)

    def log(self, record: Mapping[str, Any]) -> None:
        """Record what metrics.jsonl gets of a step."""
        numbers = {key: value for key, value in record.items() if key != "step" and value is not None}
        for tracker in list(self._open):
            with self.guarded(tracker):
                tracker.log(record["step"], numbers)

    def close(self) -> None:
        """End all of them."""
        for tracker in list(self._open):
            with self.guarded(tracker):
                tracker.finish()
        self._open = []

    @contextlib.contextmanager
    def guarded(self, tracker: Tracker) -> Iterator[None]:
        """Leave a service behind that raises."""
        try:
            yield
        except Exception as error:  # whatever a service does, the run goes on
            self._open.remove(tracker)
            self._say(f"{type(tracker).__name__} stopped recording: {first_line(error)}")
