"""Bytes of the live tensors of an engine, at the peak of each part of its steps. Run in processes of their own."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neox.config.schema import Config
from neox.data.samples.loader import Batch
from neox.engine.engine import Engine
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh, create_mesh
from neox.phases import Observer, Phases
from neox.plan.memory import stage_memory
from neox.plan.sizes import resolve

PARTS = {"forward": "compute", "backward": "compute", "update": "update", "updated": "after"}  # by their first phase
STEPS = 2  # the first one allocates the optimizer state


class LiveTensors(TorchDispatchMode, Observer):
    """Counts each tensor's memory from the operator that allocates it until it is freed.

    Attributes:
        now: bytes that are live.
        part: "start", "compute", "reduce", "update" or "after".
        peaks: most bytes of each part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.known: set[int] = set()
        self.peaks: dict[str, int] = {}
        self.begin("start")

    def begin(self, part: str) -> None:
        """Begin a part with what is live."""
        self.part = part
        self.peaks[part] = max(self.peaks.get(part, 0), self.now)

    def enter(self, phase: str, step: int | None = None) -> None:
        """Follow the engine."""
        if phase in PARTS:
            self.begin(PARTS[phase])

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:  # DeepSpeed remembers shapes as meta tensors
                self.add(leaf.untyped_storage())
        self.peaks[self.part] = max(self.peaks[self.part], self.now)
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count memory that is not counted yet."""
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.now += storage.nbytes()
        weakref.finalize(storage, self.free, storage._cdata, storage.nbytes()).atexit = False

    def free(self, key: int, size: int) -> None:
        """The memory was freed."""
        self.known.discard(key)
        self.now -= size


def make_config(dtype: str, zero: int, accumulation: int) -> Config:
    """A run whose weights are much larger than its activations: what is compared is the memory per parameter."""
    return Config.model_validate(
        {
            "model": {
                "num_layers": 3,
                "hidden_size": 128,
                "num_attention_heads": 4,
                "vocab_size": 1000,
                "max_position_embeddings": 16,
            },
            "data": {"seq_length": 16},
            "precision": {"dtype": dtype},
            "zero": {"stage": zero},
            "train": {"micro_batch_size": 1, "gradient_accumulation": accumulation, "train_iters": 10},
        }
    )


def peaks_of_engine(config: Config, mesh: Mesh) -> dict[str, int]:
    """The peak of every part of the start and of some steps."""
    accumulation, length = config.train.gradient_accumulation or 1, config.data.seq_length
    tokens = torch.arange(length)[None] % config.model.vocab_size
    batches = [Batch(tokens, tokens.clone(), None, None, torch.arange(1)) for _ in range(accumulation)]
    with LiveTensors() as live:
        engine = Engine(config, mesh, GPT(config.model, mesh), phases=Phases(live))
        engine.deepspeed.allreduce_gradients = beginning(live, "reduce", engine.deepspeed.allreduce_gradients)
        for _ in range(STEPS):
            engine.train_step(batches)
    return live.peaks


def beginning(live: LiveTensors, part: str, function: Callable[..., None]) -> Callable[..., None]:
    """The function, with which a part begins. It lasts until the next phase: a thread of gloo frees what it reduced."""

    def call(*args: object, **options: object) -> None:
        live.begin(part)
        function(*args, **options)

    return call


def planned_peaks(config: Config, world_size: int) -> dict[str, int]:
    """The plan of every part; after the step is what a checkpoint finds, without its copies."""
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"in_background": False})})
    layout = resolve(config, world_size)
    phases = stage_memory(config, layout, layout.stages[0], "cpu").phases
    return {
        "start": phases["start"],
        "compute": max(phases["loss"], phases["backward"]),
        "reduce": phases["reduce"],
        "update": phases["update"],
        "after": phases["checkpoint"],
    }


def measure_ranks(cases: str, out: str) -> None:
    """Entry of a process: the first one writes [planned, live] of each case, [dtype, ZeRO stage, accumulation]; live is
    the largest of all processes.
    """
    dist.init_process_group("gloo")
    mesh = create_mesh()
    found = []
    for case in json.loads(cases):
        config = make_config(*case)
        every: list[dict[str, int]] = [{}] * mesh.world_size
        dist.all_gather_object(every, peaks_of_engine(config, mesh))
        fullest = {part: max(peaks[part] for peaks in every) for part in every[0]}
        found.append([planned_peaks(config, mesh.world_size), fullest])
    if mesh.rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
