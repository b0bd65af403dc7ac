"""Checkpoints of a run: restoring, saving by schedule, and rolling back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from neox.checkpoint.background import Saver
from neox.checkpoint.find import find, resolve
from neox.checkpoint.lora_merge import open_weights
from neox.checkpoint.manifest import Lineage
from neox.checkpoint.reader import Checkpoint
from neox.checkpoint.storage import Storage
from neox.config.schema import Config
from neox.config.values import dump, to_builtins
from neox.data.samples.cursor import Cursor
from neox.engine.engine import Engine
from neox.errors import DiskError, NonFinite
from neox.train.metrics import Record
from neox.train.recorder import Recorder
from neox.train.resume import Resumed, describe_changes, model_changes, naming_changes
from neox.train.rng_state import get_generators, same_ranks
from neox.train.run_dir import RunDir, note_checkpoint

CLOSE_SECONDS = 5.0


@dataclass
class RunState:
    """What a checkpoint stores of a run, besides the state of the engine and of the data.

    Attributes:
        tokens: tokens of all steps so far.
        pending: record of the last step, if a signal interrupted its evaluation.
    """

    tokens: int = 0
    pending: Record | None = None


class Checkpointer:
    """Saves and restores a run. Every process makes the same calls in the same order.

    Args:
        config: the run.
        engine: whose state is saved.
        state: counters of the run.
        cursor: identity of the training data.
        run_dir: the folder of the run.
        recorder: reports what was saved.
        lineage: of this start of training.
        storage: file system of the checkpoints.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        state: RunState,
        cursor: Cursor,
        run_dir: RunDir,
        recorder: Recorder,
        *,
        lineage: Lineage,
        storage: Storage,
    ):
        self.config = config
        self.engine = engine
        self.state = state
        self.cursor = cursor
        self.run_dir = run_dir
        self.recorder = recorder
        self.mesh = mesh = engine.mesh
        self.layout = {"tp": mesh.tp, "pp": mesh.pp, "dp": mesh.dp, "cp": mesh.cp, "zero": config.zero.stage}
        self.config_lock = dump(config)
        self.saved_step = -1
        self.rollbacks = 0
        self.saver = Saver(
            run_dir.checkpoints,
            keep=config.checkpoint.keep,
            lineage=lineage,
            rank=mesh.rank,
            world_size=mesh.world_size,
            background=config.checkpoint.in_background,
            storage=storage,
        )

    def restore(self, resumed: Resumed | None, data_changes: Iterable[str] = ()) -> dict[str, torch.Tensor] | None:
        """Restore a checkpoint, or take the weights of checkpoint.init_from. The run's folder does not change.

        Args:
            resumed: the checkpoint to resume; None to start at step 0.
            data_changes: lines about data that differs from the checkpoint's.

        Returns:
            The states of the random generators; None if the checkpoint has none for this rank.
        """
        rng = None
        if resumed is not None:
            with Checkpoint(resumed.path) as checkpoint:
                with naming_changes(model_changes(checkpoint, self.config)):
                    self.engine.restore(checkpoint)
                # A state belongs to a rank of a layout. In another layout, rank 1 may have to draw what rank 0 draws,
                # from which it differed before.
                if same_ranks(checkpoint.layout, self.layout):
                    rng = checkpoint.rng(self.mesh.rank) or None  # a converted checkpoint may have none
            self.state.tokens, self.state.pending = resumed.state["tokens"], resumed.state.get("pending")
            for line in (*describe_changes(resumed, self.config, self.mesh.world_size), *data_changes):
                self.recorder.report(line)
            # else the checkpoint is another run's
            if resumed.path.parent.resolve() == self.run_dir.checkpoints.resolve():
                self.saved_step = self.engine.step
        elif self.config.checkpoint.init_from is not None:
            self.take_weights(resolve(self.config.checkpoint.init_from))
        self.saver.reserve(self.engine.fragments())
        return rng

    def take_weights(self, path: Path) -> None:
        """Start from the weights of another run's checkpoint, and report how the two models differ."""
        with open_weights(path) if self.config.model.lora is None else Checkpoint(path) as checkpoint:
            changes = model_changes(checkpoint, self.config)
            with naming_changes(changes):
                self.engine.take_weights(checkpoint)
            for line in (f"weights of {checkpoint.path}, step {checkpoint.step}", *changes):
                self.recorder.report(line)

    def is_due(self, step: int) -> bool:
        """Whether the config asks for a checkpoint of this step."""
        every = self.config.checkpoint.save_interval
        return bool(every and step % every == 0) or step in self.config.checkpoint.save_iters

    def save(self, consumed: int, *, wait: bool) -> None:
        """Begin a checkpoint of the last step.

        Args:
            consumed: samples that the steps so far have read.
            wait: return when the checkpoint is complete.

        Raises:
            DiskError: this checkpoint or the one before could not be written, and `wait` is set or
                checkpoint.on_save_error is `stop`.
        """
        self.engine.phases.enter("save")
        self.recorder.check_files()
        self.saver.join()
        self.collect_saves()
        state = {
            **self.engine.state_dict(),
            "consumed": consumed,
            "tokens": self.state.tokens,
            "data": self.cursor.to_json(),
        }
        if self.state.pending is not None:
            state["pending"] = self.state.pending
        try:
            self.saver.save(
                self.engine.step,
                self.engine.fragments(),
                state=state,
                rng=get_generators(self.mesh.device),
                config_lock=self.config_lock,
                model_config=to_builtins(self.config.model),
                layout=self.layout,
            )
        except DiskError as error:
            self.handle_failure(error, wait=wait)
        if wait:
            self.saver.join()
        self.engine.phases.enter("saved")
        self.collect_saves(wait=wait)

    def collect_saves(self, *, wait: bool = False) -> None:
        """Report the checkpoints that were completed, or failed, since the last call. Raises as `save`."""
        for outcome in self.saver.outcomes():
            if outcome.error is not None:
                self.handle_failure(outcome.error, wait=wait)
                continue
            self.saved_step = outcome.step
            try:
                if self.mesh.rank == 0 and outcome.folder is not None:
                    note_checkpoint(self.run_dir, outcome.folder)
            except DiskError as error:
                self.handle_failure(error, wait=wait)
            self.recorder.report(f"saved {outcome.folder}")

    def handle_failure(self, error: BaseException, *, wait: bool) -> None:
        """Apply checkpoint.on_save_error, which is about disks only, to a save that failed."""
        if wait or self.config.checkpoint.on_save_error == "stop" or not isinstance(error, DiskError):
            raise error
        self.recorder.report(f"training continues without this checkpoint: {error.line()}")

    def roll_back(self, step: int) -> Path:
        """Restore the newest checkpoint after a loss spike at `step`; the data is not rolled back.

        Returns the checkpoint.

        Raises:
            NonFinite: no checkpoint exists, or guard.max_skipped rollbacks were made since the start.
        """
        self.saver.join()
        self.collect_saves()
        found = find(self.run_dir.checkpoints, "auto", rank=self.mesh.rank, world_size=self.mesh.world_size)
        self.rollbacks += 1
        where, limit = f"step {step}", self.config.guard.max_skipped
        do = "lower the learning rate, or inspect the data"
        if found is None:
            what, want = "loss spike, and no checkpoint to roll back to", "a checkpoint of an earlier step"
            raise NonFinite(what, where=where, got="no checkpoint", want=want, do=do)
        if self.rollbacks > limit:
            got, want = f"{self.rollbacks - 1} rollbacks in this start", f"at most guard.max_skipped = {limit}"
            raise NonFinite("loss spike, and no rollback left", where=where, got=got, want=want, do=do)
        with Checkpoint(found) as checkpoint:
            self.engine.restore(checkpoint)
            self.state.tokens = checkpoint.state["tokens"]
        self.saved_step = self.engine.step
        return found

    def close(self) -> None:
        """Wait CLOSE_SECONDS for a checkpoint that is being written.

        After an error, the other processes may have exited.
        """
        self.saver.join(CLOSE_SECONDS)
