"""The trainings of the fault tests, and what must hold of their folders after whatever happened to them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from neox.checkpoint.retention import scan
from neox.checkpoint.verify import digest, problems
from tests.train.corpus import DROPOUT, config_text, curve

TINY = ("model.num_layers=2", "model.hidden_size=16", "model.num_attention_heads=2")


@dataclass(frozen=True)
class Setting:
    """A training: processes, and overrides of the config of tests.train.corpus."""

    ranks: int = 1
    overrides: tuple[str, ...] = ()


SHORT = Setting(1, (*TINY, *DROPOUT, "train.train_iters=8", "checkpoint.save_interval=2", "evaluate.interval=4"))
LONG = Setting(
    1,
    (
        *TINY,
        *DROPOUT,
        "train.train_iters=60",
        "checkpoint.save_interval=2",
        "checkpoint.keep=2",
        "evaluate.interval=15",
    ),
)
PAIR = Setting(2, (*TINY, "train.train_iters=8", "checkpoint.save_interval=2", "evaluate.interval=4", "zero.stage=1"))
ENDLESS = (*TINY, "train.train_iters=100000", "checkpoint.save_interval=0", "evaluate.interval=0")


def arguments(corpus: Path, run: Path, setting: Setting, *more: str) -> list[object]:
    """The arguments of `neox train`; the config lies next to the run's folder."""
    run.parent.mkdir(parents=True, exist_ok=True)
    conf = run.parent / f"{run.name}.yml"
    conf.write_text(config_text(corpus, run))
    return ["--conf", conf, "--set", *setting.overrides, *more]


def newest(run: Path) -> Path:
    """The checkpoint that a resume would take, by its manifest."""
    return [one for one in scan(run / "checkpoints") if one.manifest][-1].path


def complete(run: Path) -> dict[str, str]:
    """Checkpoints without any problem, by name: their save ids."""
    return {
        one.path.name: one.manifest.save_id
        for one in scan(run / "checkpoints")
        if one.manifest and not problems(one.path)
    }


def damaged(run: Path) -> list[str]:
    """Checkpoints that were published, and have problems."""
    return [str(problems(one.path)[0]) for one in scan(run / "checkpoints") if one.has_manifest and problems(one.path)]


def assert_same_run(run: Path, straight: Path) -> None:
    """Same curve, same final tensors, same random streams, each bit for bit."""
    assert curve(run) == curve(straight)
    assert newest(run).name == newest(straight).name
    assert digest(newest(run)) == digest(newest(straight))
