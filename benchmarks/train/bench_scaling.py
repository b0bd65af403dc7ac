"""Counts the bytes that a process sends in one training step under each layout, and compares them with the layout's
lower bound.

The step is one of a real engine (fp32, gloo, up to four processes). Every collective and message is counted at torch's
dispatcher, with the bytes that a ring sends for it: 2 (n - 1)/n S for an all-reduce, (n - 1)/n S for an all-gather,
reduce-scatter, all-to-all, broadcast or reduce of a full tensor of S bytes, and S for a message. The lower bound comes
from neox.plan.communication; its terms are in the row's setting. At a ratio of 1 the step sends no more than the bound.
Small sums (loss, norm, stop flag, clipping) are counted too. Rows with "stage" are of one pipeline stage. Nothing is
timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from measure import Options, Row, new_parser, report
from ranks import run_ranks

from neox.config.schema import Config
from neox.data import Batch
from neox.model.gpt import GPT
from neox.parallel.mesh import create_mesh
from neox.plan.communication import Traffic, traffic
from neox.plan.sizes import resolve

MODEL = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 8,
    "vocab_size": 1000,
    "max_position_embeddings": 64,
    "parallel_residual": True,
}
SEQ_LENGTH, MICRO_BATCH, ACCUMULATION = 64, 2, 4


@dataclass(frozen=True)
class Case:
    """A parallel layout. The processes that tensor, pipeline and context do not use are data-parallel."""

    name: str
    processes: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    sequence: bool = False
    zero: int = 0

    def config(self) -> Config:
        """The config of a run in this layout."""
        parallel = {
            "tensor": self.tensor,
            "pipeline": self.pipeline,
            "context": self.context,
            "sequence": self.sequence,
        }
        return Config.model_validate(
            {
                "model": MODEL,
                "data": {"seq_length": SEQ_LENGTH},
                "precision": {"dtype": "fp32"},
                "parallel": parallel,
                "zero": {"stage": self.zero},
                "train": {"micro_batch_size": MICRO_BATCH, "gradient_accumulation": ACCUMULATION, "train_iters": 2},
                "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
            }
        )


CASES = (
    *(Case(f"data parallel, ZeRO {zero}", 2, zero=zero) for zero in (0, 1, 2, 3)),
    *(Case(f"data parallel, ZeRO {zero}", 4, zero=zero) for zero in (0, 1, 2, 3)),
    Case("tensor parallel", 2, tensor=2),
    Case("tensor parallel", 4, tensor=4),
    Case("sequence parallel", 2, tensor=2, sequence=True),
    Case("sequence parallel", 4, tensor=4, sequence=True),
    Case("pipeline parallel", 2, pipeline=2),
    Case("pipeline parallel", 4, pipeline=4),
    Case("context parallel", 2, context=2),
    Case("context parallel", 4, context=4),
    Case("tensor x pipeline", 4, tensor=2, pipeline=2),
)


@dataclass(frozen=True)
class Collective:
    """How many bytes a ring of n members sends for a c10d operator.

    Attributes:
        weight: factor of (n - 1)/n and the bytes of the full tensor.
        position: of the argument that holds the tensors.
        is_shard: whether that argument holds one member's shard instead of the full tensor.
    """

    weight: float
    position: int
    is_shard: bool = False


COLLECTIVES = {
    "allreduce_": Collective(2.0, 0),
    "allreduce_coalesced_": Collective(2.0, 0),
    "broadcast_": Collective(1.0, 0),
    "reduce_": Collective(1.0, 0),
    "_allgather_base_": Collective(1.0, 0),
    "allgather_": Collective(1.0, 1, is_shard=True),
    "allgather_into_tensor_coalesced_": Collective(1.0, 0),
    "_reduce_scatter_base_": Collective(1.0, 1),
    "reduce_scatter_": Collective(1.0, 1),
    "reduce_scatter_tensor_coalesced_": Collective(1.0, 1),
    "alltoall_base_": Collective(1.0, 1),
    "alltoall_": Collective(1.0, 1),
    "gather_": Collective(1.0, 1, is_shard=True),
}
SEND_NOTHING = ("recv_", "recv_any_source_", "barrier", "monitored_barrier_")


class TrafficCounter(TorchDispatchMode):
    """Sums the bytes that this process sends, by c10d operator. Collectives of neox and of DeepSpeed both go through
    torch's dispatcher.
    """

    def __init__(self):
        super().__init__()
        self.sent: dict[str, float] = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "c10d":
            name = operator.overloadpacket.__name__
            if name not in SEND_NOTHING:
                self.sent[name] = self.sent.get(name, 0.0) + bytes_sent(name, args)
        return operator(*args, **(kwargs or {}))


def bytes_sent(name: str, args: tuple) -> float:
    """Bytes that this process sends for one call of a c10d operator.

    Raises:
        RuntimeError: COLLECTIVES lacks the operator.
    """
    if name == "send":
        return size_of(args[0])
    if name not in COLLECTIVES:
        raise RuntimeError(f"COLLECTIVES lacks an operator; got=c10d.{name}")
    collective = COLLECTIVES[name]
    group = next(
        argument
        for argument in args
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type())
    )
    members = dist.ProcessGroup.unbox(group).size()
    full = size_of(args[collective.position]) * (members if collective.is_shard else 1)
    return collective.weight * (members - 1) / members * full


def size_of(tensors: object) -> int:
    """Bytes of a tensor, or of the tensors in nested lists."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(size_of(each) for each in tensors)


def run_case(case: Case) -> dict:
    """Run two steps of a layout as one of its processes, and count the second."""
    # imported here, because DeepSpeed prints at its import, ahead of the JSON
    from neox.engine.engine import Engine

    config = case.config()
    mesh = create_mesh(case.tensor, case.pipeline, context=case.context, sequence=case.sequence)
    engine = Engine(config, mesh, GPT(config.model, mesh))
    generator = torch.Generator().manual_seed(mesh.dp_rank)

    def micro_batch() -> Batch:
        tokens, targets = torch.randint(0, MODEL["vocab_size"], (2, MICRO_BATCH, SEQ_LENGTH), generator=generator)
        return Batch(
            tokens=tokens, targets=targets, segment_ids=None, position_ids=None, sample_ids=torch.arange(MICRO_BATCH)
        )

    engine.train_step([micro_batch() for _ in range(ACCUMULATION)])
    with TrafficCounter() as counter:
        engine.train_step([micro_batch() for _ in range(ACCUMULATION)])
    return {"stage": mesh.pp_rank, "sent": counter.sent}


def cases_of(processes: int) -> list[Case]:
    """The layouts of that many processes."""
    return [case for case in CASES if case.processes == processes]


def run_rank(processes: int, out: str) -> None:
    """Run all layouts as one of the processes. Rank 0 writes what each of them sent, as JSON."""
    dist.init_process_group("gloo")
    counts = []
    for case in cases_of(processes):
        gathered: list = [None] * processes
        dist.all_gather_object(gathered, run_case(case))
        counts.append(gathered)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(counts))
    dist.barrier()
    dist.destroy_process_group()


def count(processes: int) -> list[list[dict]]:
    """What each process sent, for each layout of that many processes. Starts the processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counts.json"
        command = [sys.executable, __file__, "--rank", str(processes), str(out)]
        run_ranks(command, processes, Path(folder) / "rank", {"DS_ACCELERATOR": "cpu"})
        return json.loads(out.read_text())


def terms(rows: Sequence[Traffic]) -> str:
    """The terms of the lower bound, as count x kind(size in bytes)."""
    return " + ".join(f"{row.count} x {row.kind}({row.size:.0f})" for row in rows) or "nothing"


def compare(processes: Sequence[int]) -> Iterator[Row]:
    """A row per layout and pipeline stage, of the process of the stage that sends most."""
    for number in processes:
        for case, counts in zip(cases_of(number), count(number), strict=True):
            layout = resolve(case.config(), number)
            for stage in layout.stages:
                sent = max(
                    (each["sent"] for each in counts if each["stage"] == stage.number),
                    key=lambda by_operator: sum(by_operator.values()),
                )
                bound = traffic(case.config(), layout, stage, lower_bound=True)
                total, minimum = sum(sent.values()), sum(row.sent for row in bound)
                where = f", stage {stage.number}" if case.pipeline > 1 else ""
                by_operator = ", ".join(f"{name} {size / 1e3:.1f}" for name, size in sorted(sent.items()))
                setting = f"{number} processes{where}: {terms(bound)}; counted, kB: {by_operator}"
                yield Row(
                    case.name,
                    setting,
                    total / 1e3,
                    minimum / 1e3,
                    "lower bound",
                    minimum / total if total else 1.0,
                    "kB/step",
                )


def main() -> None:
    """Parse the command line and print the rows."""
    parser = new_parser(__doc__, "two processes only: under a minute on an idle machine")
    parser.add_argument("--rank", nargs=2, metavar=("PROCESSES", "OUT"), help=argparse.SUPPRESS)  # started by `count`
    args = parser.parse_args()
    if args.rank:
        run_rank(int(args.rank[0]), args.rank[1])
        return
    report(compare((2,) if args.quick else (2, 4)), Options(json=args.json, quick=args.quick))


if __name__ == "__main__":
    main()
