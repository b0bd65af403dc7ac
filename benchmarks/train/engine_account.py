"""The account (account.py) of a step of the engine: the model, and what neox.engine and DeepSpeed run around it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from unittest import mock

import torch
import torch.distributed as dist
from account import Account
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from torch.testing._internal.distributed.fake_pg import FakeStore

from neox.config.schema import Config
from neox.data.samples.loader import Batch
from neox.engine.engine import Engine
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from neox.phases import Observer, Phases
from tests.cuda.fake_cuda import PACKAGES, FakeCuda

NEOX, DEEPSPEED = (PACKAGES[name] for name in ("neox", "deepspeed"))
ENGINE = tuple(str(folder) for folder in (DEEPSPEED, NEOX / "engine"))
MODEL = tuple(str(NEOX / part) for part in ("model", "ops", "parallel", "engine/objective.py"))


class EngineAccount(Account, Observer):
    """An account with the phases "forward" and "backward" of the model, and "engine" for all other operators."""

    def enter(self, phase: str, step: int | None = None) -> None:
        """Record the phase that the engine enters, if it is one of the model."""
        if phase in ("forward", "backward"):
            self.phase = phase

    def phase_of_call(self) -> str:
        """The phase by the innermost function on the stack that belongs to the model or to the engine.

        Autograd runs backward formulas in a separate thread. There only hooks have such a function on the stack, and
        everything else belongs to the model.
        """
        paths = (path for path in stack_files() if path.startswith(MODEL + ENGINE))
        return self.phase if next(paths, MODEL[0]).startswith(MODEL) else "engine"


def stack_files() -> Iterator[str]:
    """The source file of each function on the stack, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_filename
        frame = frame.f_back


def account_of_engine(config: Config) -> EngineAccount:
    """The account of one step of `neox train` on one GPU."""
    with FakeCuda(), EngineAccount() as account:
        train(account, config)
    return account


def train(account: EngineAccount, config: Config) -> None:
    """Make two steps of one micro-batch. Only the second is counted: the first also allocates the optimizer state."""
    tokens = torch.zeros(config.train.micro_batch_size or 1, config.data.seq_length, dtype=torch.int64)
    batch = Batch(tokens, tokens.clone(), None, None, torch.arange(len(tokens)))
    set_accelerator(CUDA_Accelerator())
    if not dist.is_initialized():  # DeepSpeed keeps using the first group of the process
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    mesh = Mesh.single(torch.device("cuda", 0))
    with mock.patch.object(GPT, "initialize", lambda self: None):
        model = GPT(config.model, mesh)
    engine = Engine(config, mesh, model, phases=Phases(account))
    for _ in range(2):
        account.start()
        engine.train_step([batch])
