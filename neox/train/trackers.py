"""Experiment trackers: Weights & Biases and Comet, if `logging.wandb` and `logging.comet` configure them.

Training does not depend on them. If a service cannot be reached at the start, the run is recorded offline in run.dir,
and a line shows how to upload it. A later failure ends the recording, not the run. The packages read keys themselves,
from WANDB_API_KEY, COMET_API_KEY or their configuration files: no config, log or checkpoint contains one.
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

from neox.config.schema import CometConfig, Config, WandbConfig
from neox.config.values import flatten
from neox.errors import EnvironmentProblem
from neox.train.metrics import Record

WAIT = 60  # seconds that a service has to answer, at the start and at the end
Report = Callable[[str], object]


class Tracker(Protocol):
    """One service."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record the numbers of a step."""

    def finish(self) -> None:
        """Send what is left, and end."""


class Wandb:
    """A run on Weights & Biases. Its id is stored in run.dir/wandb.id, so that a resumed run continues the same record.

    Args:
        settings: `logging.wandb`.
        config: of the run, shown with it.
        folder: run.dir.
        report: reports where the records are.
    """

    def __init__(self, settings: WandbConfig, config: Config, folder: Path, report: Report):
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
        quiet = {
            "console": "off",
            "save_code": False,
            "disable_git": True,
            "silent": True,
            "init_timeout": WAIT,
            "login_timeout": WAIT,
        }
        if settings.host is not None:
            quiet["base_url"] = settings.host
        try:
            if settings.mode == "online" and not package.login(
                key=None, host=settings.host, timeout=1, verify=False, relogin=False, force=True
            ):
                raise RuntimeError("no key: set WANDB_API_KEY, or run `wandb login`")
            self.run = package.init(mode=settings.mode, settings=package.Settings(**quiet), **common)
        except Exception as error:  # the package raises several kinds, none of which may end a training
            if settings.mode == "offline":
                raise EnvironmentProblem(
                    "wandb does not start", where="logging.wandb", got=first_line(error)
                ) from error
            report(f"Weights & Biases cannot be reached ({first_line(error)}): recording offline")
            self.run = package.init(mode="offline", settings=package.Settings(**quiet), **common)
        where = f"{folder / 'wandb'}; upload by `wandb sync`" if self.run.offline else self.run.url
        report(f"Weights & Biases: {where}")

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
        report: reports where the records are.
    """

    def __init__(self, settings: CometConfig, config: Config, folder: Path, report: Report):
        package = load("comet_ml")
        common = {
            "project_name": settings.project,
            "workspace": settings.workspace,
            "display_summary_level": 0,
            **dict.fromkeys(
                (
                    "log_code",
                    "log_graph",
                    "auto_param_logging",
                    "auto_metric_logging",
                    "parse_args",
                    "auto_output_logging",
                ),
                False,
            ),
            **dict.fromkeys(("log_env_details", "log_git_metadata", "log_git_patch"), False),
        }
        offline = partial(offline_experiment, package, folder / "comet", common)
        if settings.mode == "offline":
            self.experiment = offline()
        else:
            try:
                self.experiment = package.Experiment(**common)
            except Exception as error:  # see Wandb
                report(f"Comet cannot be reached ({first_line(error)}): recording offline")
                self.experiment = offline()
        if settings.name is not None:
            self.experiment.set_name(settings.name)
        self.experiment.add_tags(list(settings.tags))
        self.experiment.log_parameters(dict(flatten(config)))
        report(f"Comet: {self.experiment.url or folder / 'comet'}")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record the numbers of a step."""
        self.experiment.log_metrics(dict(numbers), step=step)

    def finish(self) -> None:
        """Send what is left, and end."""
        self.experiment.end()


def offline_experiment(package: ModuleType, folder: Path, common: Mapping[str, object]) -> Any:
    """An experiment stored in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return package.OfflineExperiment(offline_directory=os.fspath(folder), **common)


def load(name: str) -> ModuleType:
    """Import a package of the extras. Raises EnvironmentProblem if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = "comet" if name == "comet_ml" else name
        do = f"pip install neox-train[{extra}], or remove logging.{extra} from the config"
        raise EnvironmentProblem(f"{name} is not installed", where=f"logging.{extra}", got=error, do=do) from error


def run_id(path: Path, make: Callable[[], str]) -> str:
    """The id stored in a file; created the first time."""
    with contextlib.suppress(FileNotFoundError):
        stored = path.read_text(encoding="utf-8").strip()
        if stored:  # not if a crash or a full disk left the file empty
            return stored
    created = make()
    path.write_text(created + "\n", encoding="utf-8")
    return created


def first_line(error: BaseException) -> str:
    """The first line of an error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def open_trackers(config: Config, folder: Path, report: Report) -> list[Tracker]:
    """The services that the config asks for, started.

    Raises:
        EnvironmentProblem: a package is not installed.
    """
    section = config.logging
    found: list[Tracker] = []
    if section.wandb is not None:
        found.append(Wandb(section.wandb, config, folder, report))
    if section.comet is not None:
        found.append(Comet(section.comet, config, folder, report))
    return found


class Trackers:
    """The services of a run. One that fails is reported once and closed."""

    def __init__(self, config: Config, folder: Path, report: Report):
        self._report = report
        self._open = open_trackers(config, folder, report)

    def log(self, record: Record) -> None:
        """Record a step."""
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
        """Stop using a service that raises."""
        try:
            yield
        except Exception as error:  # the run continues whatever a service does
            self._open.remove(tracker)
            self._report(f"{type(tracker).__name__} stopped recording: {first_line(error)}")
