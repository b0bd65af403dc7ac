"""A model small enough to train in milliseconds, with the interface of GPT that the engine uses, and runs of it for
several processes.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from neox.config.schema import Config
from neox.data.samples.loader import Batch
from neox.engine.engine import Engine
from neox.engine.evaluation import evaluate
from neox.errors import CheckpointError, NonFinite
from neox.parallel.mesh import Mesh, create_mesh
from neox.parallel.shard_spec import ShardSpec
from neox.phases import Phases

os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it; launchers and `neox train` set it

VOCAB, HIDDEN, ROWS, LENGTH = 60, 16, 64, 12  # ROWS: vocabulary with its padding


class Toy(torch.nn.Module):
    """Tied embedding, two tanh layers with a norm between: matrices, biases, norm weights, vocabulary padding."""

    def __init__(self, seed: int = 5, dropout: float = 0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.2)  # noqa: E731
        self.embedding = torch.nn.ParameterDict({"word": draw(ROWS, HIDDEN)})
        self.embedding["word"].data[VOCAB:] = 0
        self.layers = torch.nn.ModuleList(
            [torch.nn.ParameterDict({"weight": draw(HIDDEN, HIDDEN), "bias": draw(HIDDEN)}) for _ in range(2)]
        )
        self.norm = torch.nn.ParameterDict({"weight": draw(HIDDEN)})
        self.dropout = dropout
        self.poison = None  # (rank, "loss" or "gradient", value): what goes wrong where
        self.expected_dloss = []  # of every backward: the gradient that the forward expects, and the one that came

    def shard_specs(self) -> dict[str, ShardSpec]:
        out = {name: ShardSpec.replicated(*p.shape) for name, p in self.named_parameters()}
        return out | {"embedding.word": ShardSpec.sharded((VOCAB, HIDDEN), 0, 0, ROWS)}

    def logical_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: layout.shape for name, layout in self.shard_specs().items()}

    def boundary_shape(self, tokens) -> tuple[int, ...]:
        return (*tokens.shape, HIDDEN)

    def forward(self, tokens, targets, *, segment_ids=None, position_ids=None, expected_dloss=None, checked=False):
        x = F.embedding(tokens, self.embedding["word"])
        for layer in self.layers:
            x = x + torch.tanh(F.linear(x, layer["weight"], layer["bias"])) * self.norm["weight"]
            x = F.dropout(x, self.dropout, self.training)
        logits = F.linear(x, self.embedding["word"])[..., :VOCAB].float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
        if self.poison is not None and self.poison[0] == (dist.get_rank() if dist.is_initialized() else 0):
            loss = Poison.apply(loss, *self.poison[1:])
        if expected_dloss is not None:
            loss.register_hook(lambda dloss: self.expected_dloss.append((expected_dloss, dloss)))
        return loss


class Poison(torch.autograd.Function):
    """Makes one loss, or one gradient only, NaN or infinite."""

    @staticmethod
    def forward(ctx, loss, where, value):
        ctx.value = value if where == "gradient" else 0.0
        loss = loss.clone()
        if where == "loss":
            loss[-1] = value
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[-1] += ctx.value
        return grad, None, None


def make_config(**sections) -> Config:
    base = {
        "model": {"vocab_size": VOCAB},
        "optimizer": {"lr": 0.01, "gradient_clipping": 0.1},
        "schedule": {"type": "cosine", "warmup_iters": 3, "min_lr": 1e-4},
        "precision": {"dtype": "fp32"},
        "zero": {"stage": 0},
    }
    base |= {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 20}}}
    return Config.model_validate({**base, **sections})


def global_batch(step: int, samples: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets of a step's global batch; a varying number of targets per sample is ignored."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, VOCAB, (samples, LENGTH + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    for row in range(samples):
        targets[row, : int(torch.randint(0, LENGTH, (1,), generator=generator))] = -100
    return tokens[:, :-1], targets


def micro_batches(step: int, mesh: Mesh, accumulation: int, samples: int = 8) -> list[Batch]:
    """This process's micro-batches of a step, in the sample order of the loader."""
    tokens, targets = global_batch(step, samples)
    size = samples // (mesh.dp * accumulation)
    rows = [
        range((m * mesh.dp + mesh.dp_rank) * size, (m * mesh.dp + mesh.dp_rank + 1) * size) for m in range(accumulation)
    ]
    return [Batch(tokens[list(r)], targets[list(r)], None, None, torch.tensor(list(r)) + step * samples) for r in rows]


def make_engine(
    config: Config,
    mesh: Mesh,
    accumulation: int = 1,
    total_steps: int = 20,
    samples: int = 8,
    dropout: float = 0.0,
    phases: Phases | None = None,
) -> Engine:
    sizes = {
        "micro_batch_size": samples // (mesh.dp * accumulation),
        "gradient_accumulation": accumulation,
        "train_iters": total_steps,
    }
    config = config.model_copy(update={"train": config.train.model_copy(update=sizes)})
    return Engine(config, mesh, Toy(dropout=dropout), phases=phases)


def run(engine: Engine, accumulation: int, steps: int) -> list[dict]:
    """Train on and return loss, norm and rate of every step."""
    out = []
    for _ in range(steps):
        result = engine.train_step(micro_batches(engine.step, engine.mesh, accumulation))
        out.append({"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.lr, "tokens": result.tokens})
    return out


def gathered(engine: Engine) -> dict[str, torch.Tensor]:
    """All logical tensors (kind/name) put together from the fragments of every process, on every process."""
    out = {}
    for f in engine.fragments():
        flat = out.setdefault(f"{f.kind}/{f.name}", torch.zeros(f.shape).view(-1))
        flat[f.start : f.stop] = f.data.float()
    if engine.mesh.dp > 1:
        for name, kind, shape in engine.state.tensors():
            dist.all_reduce(out.setdefault(f"{kind}/{name}", torch.zeros(shape).view(-1)))
    return out


class Stored:
    """A checkpoint in memory, with the interface of neox.checkpoint.reader.Checkpoint."""

    path = "memory"

    def __init__(self, tensors: dict[str, torch.Tensor], state: dict):
        self.tensors = tensors
        self.state = json.loads(json.dumps(state))

    def check(self, wanted) -> None:
        if set(self.tensors) != {f"{kind}/{name}" for name, kind, _ in wanted}:
            raise CheckpointError("tensors do not fit")

    def async_reads(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def read_into(self, out, name, kind, slices, start, stop) -> None:
        out.copy_(self.tensors[f"{kind}/{name}"][start:stop])


def train_ranks(settings: str, out: str) -> None:
    """Entry of a process: trains under every stage named in `settings` (JSON) and writes what rank 0 saw to `out`."""
    dist.init_process_group("gloo")
    given = json.loads(settings)
    mesh = create_mesh()
    answers = {}
    for stage in given["stages"]:
        config = make_config(**given.get("sections", {}), zero={"stage": stage})
        engine = make_engine(config, mesh, given["accumulation"])
        history = run(engine, given["accumulation"], given["steps"])
        tensors = gathered(engine)
        answers[stage] = {
            "history": history,
            "tensors": {key: value.tolist() for key, value in tensors.items()},
            "state": engine.state_dict(),
            "padding": engine_padding(engine),
            "validation": evaluate(engine, micro_batches(777, mesh, 2)),
        }
    if mesh.rank == 0:
        Path(out).write_text(json.dumps(answers))
    dist.barrier()
    dist.destroy_process_group()


def engine_padding(engine: Engine) -> float:
    """Largest value among the rows of vocabulary padding that this process holds."""
    largest = 0.0
    for shard in engine.state.shards:
        if shard.stop > shard.layout.numel:
            for kind in ("weight", *engine.state.kinds[shard.name]):
                held = engine.state.tensor(shard, kind)
                if held is not None:
                    largest = max(
                        largest, float(shard.view(held, max(shard.start, shard.layout.numel), shard.stop).abs().max())
                    )
    return largest


def poison_ranks(settings: str, out: str) -> None:
    """Entry of a process: one good step, then a poisoned one on one rank, under every stage; writes what this rank
    saw.
    """
    dist.init_process_group("gloo")
    given = json.loads(settings)
    mesh = create_mesh()
    answers = []
    for stage in given["stages"]:
        for dtype in given["dtypes"]:
            for where in ("loss", "gradient"):
                engine = make_engine(make_config(zero={"stage": stage}, precision={"dtype": dtype}), mesh)
                run(engine, 1, 1)
                before = {f"{f.kind}/{f.name}": f.data.clone() for f in engine.fragments()}
                engine.model.poison = (1, where, float("nan"))
                try:
                    engine.train_step(micro_batches(1, mesh, 1))
                    error = None
                except NonFinite as problem:
                    error = problem.line()
                same = all(torch.equal(before[f"{f.kind}/{f.name}"], f.data) for f in engine.fragments())
                answers.append(
                    {
                        "stage": stage,
                        "dtype": dtype,
                        "where": where,
                        "error": error,
                        "unchanged": same,
                        "step": engine.step,
                    }
                )
    Path(f"{out}.{mesh.rank}").write_text(json.dumps(answers))
    dist.barrier()
    dist.destroy_process_group()
