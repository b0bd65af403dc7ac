"""The promise of parallelism as something to run: one small model trained in every layout, against the same model in
one process.

A cell is a form of the model and a layout. Many cells run in one group of processes, for starting Python is what takes
time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from neox.config.schema import Config
from neox.engine.engine import Engine
from neox.engine.evaluation import evaluate
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh, create_mesh
from tests.engine import mutations

os.environ.setdefault("LOCAL_RANK", "0")

STEPS, SAMPLES, LENGTH, VOCAB = 20, 8, 16, 77
COMMON = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "intermediate_size": 96,
    "vocab_size": VOCAB,
    "vocab_multiple": 8,
    "max_position_embeddings": 32,
    "init_std": 0.1,
}
LLAMA = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "num_kv_heads": 4,
    "qkv_bias": False,
    "attention_out_bias": False,
    "mlp_bias": False,
}
FORMS = {
    "neox": {"parallel_residual": True, "rotary_pct": 0.5},
    "neox-tied": {"rotary_pct": 0.5, "tie_embeddings": True},
    "llama": LLAMA,
    "llama-tied": {**LLAMA, "tie_embeddings": True, "qk_norm": True},
    "gpt2": {"position_embedding": "learned", "tie_embeddings": True},
    "gptj": {"parallel_residual": True, "shared_residual_norm": True, "num_kv_heads": 4},
}
MATRIX_FORMS = ("neox", "neox-tied", "llama", "llama-tied")


@dataclass(frozen=True)
class Cell:
    """A form of the model in a layout; what is left of the processes is data-parallel."""

    form: str
    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    zero: int = 0
    sequence: bool = False
    dtype: str = "fp32"
    documents: bool = False
    checkpointing: str = "none"
    partition: str | tuple[int, ...] = "parameters"
    mutation: str = ""
    length: int = LENGTH  # tokens of a sample
    samples: int = SAMPLES  # of a global batch

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def name(self) -> str:
        parts = [
            self.form,
            *(
                f"{key}{value}"
                for key, value in (("tp", self.tp), ("pp", self.pp), ("dp", self.dp), ("cp", self.cp))
                if value > 1
            ),
        ]
        parts += [
            f"zero{self.zero}",
            *(["sp"] if self.sequence else []),
            *([self.dtype] if self.dtype != "fp32" else []),
        ]
        parts += [*([f"{self.samples}x{self.length}"] if self.length != LENGTH else [])]
        parts += [
            *(["documents"] if self.documents else []),
            *([self.checkpointing] if self.checkpointing != "none" else []),
        ]
        return " ".join(
            parts
            + ([str(self.partition)] if self.partition != "parameters" else [])
            + ([f"broken: {self.mutation}"] if self.mutation else [])
        )

    def reference(self) -> Cell:
        """The same model and data in one process."""
        return Cell(self.form, dtype=self.dtype, documents=self.documents, length=self.length, samples=self.samples)


def matrix(processes: int, forms: Sequence[str] = MATRIX_FORMS) -> Iterator[Cell]:
    """Every layout of tp 1, 2, 4, pp 1, 2, 4, dp 1, 2 with this number of processes, each allowed ZeRO stage,
    sequence parallelism off and on.
    """
    for form in forms:
        for tp in (1, 2, 4):
            for pp in (1, 2, 4):
                for dp in (1, 2):
                    if tp * pp * dp == processes:
                        for zero in (0, 1) if pp > 1 else (0, 1, 2, 3):
                            for sequence in (False, True) if tp > 1 else (False,):
                                yield Cell(form, tp, pp, dp, zero=zero, sequence=sequence)


@dataclass(frozen=True)
class Batch:
    tokens: torch.Tensor
    targets: torch.Tensor
    sample_ids: torch.Tensor
    segment_ids: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None


def make_config(cell: Cell, steps: int) -> Config:
    return Config.model_validate(
        {
            "model": {**COMMON, "max_position_embeddings": max(cell.length, 32), **FORMS[cell.form]},
            "optimizer": {"lr": 0.003, "gradient_clipping": 0.5, "eps": 1e-6},
            "schedule": {"type": "cosine", "warmup_iters": 3, "min_lr": 1e-4},
            "precision": {"dtype": cell.dtype},
            "parallel": {"tensor": cell.tp, "pipeline": cell.pp, "sequence": cell.sequence, "context": cell.cp},
            "zero": {"stage": cell.zero},
            "train": {"train_iters": steps},
            "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 100}},
        }
    )


def global_batch(step: int, cell: Cell) -> Batch:
    """Tokens that repeat with noise (there is something to learn), targets of which a varying number is ignored, two
    documents per sample.
    """
    samples, length = cell.samples, cell.length
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, VOCAB, (samples, 1), generator=generator) + 3 * torch.arange(length + 1)
    noise = torch.randint(0, VOCAB, tokens.shape, generator=generator)
    tokens = torch.where(torch.rand(tokens.shape, generator=generator) < 0.2, noise, tokens % VOCAB)
    targets = tokens[:, 1:].clone()
    segments, positions = torch.zeros(samples, length, dtype=torch.int32), torch.arange(length).repeat(samples, 1)
    for row in range(samples):
        targets[row, : int(torch.randint(0, length, (1,), generator=generator))] = -100
        border = (3 + row) * length // LENGTH
        segments[row, border:] = 1
        positions[row, border:] -= border
    extra = (segments, positions) if cell.documents else (None, None)
    return Batch(tokens[:, :-1].contiguous(), targets, torch.arange(samples), *extra)


def accumulation(mesh: Mesh) -> int:
    """Micro-batches of a step: as many as there are stages, so that all of them work at once; their number must not
    change what is computed.
    """
    return max(2, mesh.pp)


def micro_batches(step: int, mesh: Mesh, cell: Cell) -> list[Batch]:
    """This process's micro-batches of a step, in the sample order of the loader."""
    whole = global_batch(step, cell)
    size = cell.samples // (mesh.dp * accumulation(mesh))
    out = []
    for m in range(accumulation(mesh)):
        first = (m * mesh.dp + mesh.dp_rank) * size
        out.append(Batch(*(None if t is None else t[first : first + size] for t in vars(whole).values())))
    return out


def logical(engine: Engine, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
    """Logical tensors of some kinds put together from the fragments of every process of the world, on every process."""
    shapes = {f"{kind}/{name}": shape for name, kind, shape in engine.state.tensors() if kind in kinds}
    total = {key: torch.zeros(2, *shape) for key, shape in shapes.items()}  # sum of what is held, and by how many
    for f in engine.fragments():
        if f.kind in kinds:
            local = torch.zeros(2, math.prod(high - low for low, high in f.slices))
            local[0, f.start : f.stop], local[1, f.start : f.stop] = f.data.float(), 1.0
            place = tuple(slice(low, high) for low, high in f.slices)
            total[f"{f.kind}/{f.name}"][(slice(None), *place)] += local.view(2, *(high - low for low, high in f.slices))
    if engine.mesh.world_size > 1:
        flat = torch.cat([t.view(-1) for t in total.values()])
        dist.all_reduce(flat)
        parts = flat.split([t.numel() for t in total.values()])
        total = {key: part.view(t.shape) for (key, t), part in zip(total.items(), parts, strict=True)}
    return {key: held / count for key, (held, count) in total.items()}  # what nobody holds becomes NaN


def run_cell(cell: Cell, mesh: Mesh, steps: int = STEPS) -> dict:
    """Initial weights, gradient of step 1 (as Adam's first moment has it), losses and norms of every step,
    validation loss, final weights.
    """
    config = make_config(cell, steps)
    model = GPT(config.model, mesh, seed=7, activation_checkpointing=cell.checkpointing, partition=cell.partition)
    with mutations.applied(cell.mutation):
        count = accumulation(mesh)
        sizes = {"micro_batch_size": cell.samples // (mesh.dp * count), "gradient_accumulation": count}
        engine = Engine(config.model_copy(update={"train": config.train.model_copy(update=sizes)}), mesh, model)
        initial = logical(engine, ["weight"])
        losses, norms, gradient = [], [], {}
        for step in range(steps):
            result = engine.train_step(micro_batches(step, mesh, cell))
            losses.append(result.loss)
            norms.append(result.grad_norm)
            if step == 0:
                gradient = logical(engine, ["exp_avg"])
        validation = evaluate(engine, micro_batches(999, mesh, cell))
    return {
        "initial": initial,
        "gradient": gradient,
        "losses": losses,
        "norms": norms,
        "validation": validation,
        "weights": logical(engine, ["weight"]),
    }


def compare(got: dict, want: dict) -> dict[str, float]:
    """How far a run is from the reference: every number is relative, NaN where something is missing."""

    def relative(one: Sequence[float], two: Sequence[float]) -> float:
        return max(abs(a - b) / abs(b) if a == a else math.nan for a, b in zip(one, two, strict=True))

    def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
        norm = math.sqrt(sum(float(t.double().square().sum()) for t in two.values()))
        return math.sqrt(sum(float((one[key].double() - t.double()).square().sum()) for key, t in two.items())) / norm

    return {
        "initial": float(not all(torch.equal(got["initial"][key], t) for key, t in want["initial"].items())),
        "loss": relative(got["losses"], want["losses"]),
        "norm": relative(got["norms"][:1], want["norms"][:1]),
        "gradient": distance(got["gradient"], want["gradient"]),
        "validation": relative([got["validation"]], [want["validation"]]),
        "weights": distance(got["weights"], want["weights"]),
    }


def run_cells(cells: str, references: str, out: str) -> None:
    """Entry of a process: run cells (JSON) and write how far each is from its reference.

    Args:
        cells: list of Cell fields.
        references: file that holds the runs of one process by name (torch tensors are lists).
        out: file for the answers, JSON.
    """
    dist.init_process_group("gloo")
    known = read_references(Path(references))
    answers = []
    for fields in json.loads(Path(cells).read_text()):
        cell = Cell(
            **{
                **fields,
                "partition": tuple(fields["partition"])
                if isinstance(fields["partition"], list)
                else fields["partition"],
            }
        )
        mesh = create_mesh(cell.tp, cell.pp, context=cell.cp, sequence=cell.sequence)
        want = known[cell.reference().name]
        answers.append({"name": cell.name, **compare(run_cell(cell, mesh, len(want["losses"])), want)})
        if dist.get_rank() == 0:
            Path(out).write_text(json.dumps(answers))
    dist.barrier()
    dist.destroy_process_group()


def write_references(cells: Sequence[Cell], path: Path, steps: int = STEPS) -> None:
    """Run what the cells are compared with, here, and keep it."""
    from safetensors.torch import save_file

    tensors, numbers = {}, {}
    for cell in {cell.reference() for cell in cells}:
        result = run_cell(cell, Mesh.single(), steps)
        numbers[cell.name] = {key: result[key] for key in ("losses", "norms", "validation")}
        tensors |= {
            f"{cell.name}|{part}|{key}": t.contiguous()
            for part in ("initial", "gradient", "weights")
            for key, t in result[part].items()
        }
    save_file(tensors, path, metadata={"numbers": json.dumps(numbers)})


def read_references(path: Path) -> dict[str, dict]:
    """The results that `write_references` stored, by name of the reference cell."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        out = {
            name: {**numbers, "initial": {}, "gradient": {}, "weights": {}}
            for name, numbers in json.loads(file.metadata()["numbers"]).items()
        }
        for key in list(file.keys()):
            name, part, tensor = key.split("|")
            out[name][part][tensor] = file.get_tensor(key)
    return out


def write_cells(cells: Sequence[Cell], path: Path) -> None:
    """Keep cells for `run_cells`."""
    path.write_text(json.dumps([asdict(cell) for cell in cells]))
