"""Bytes that a process sends in one training step under each layout, counted, against the least that the layout's
algorithm allows.

Counted: every collective and message that torch.distributed is asked for in one step of a real engine (fp32, gloo, up
to four processes), each weighed by what a ring sends for it: all-reduce 2 (n - 1)/n S, all-gather, reduce-scatter and
all-to-all (n - 1)/n S of a full tensor of S bytes, a message S, a broadcast or reduce S (n - 1)/n. The least:
neox.plan.communication, whose formula stands in the row's setting. Rows with "stage" are of one pipeline stage. A ratio
of 1 means that nothing beyond the least is sent; small sums (loss, norm, stop flag, clipping) are counted too. Nothing
is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from measure import Options, Row, show

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
LENGTH, MICRO, ACCUMULATION = 64, 2, 4


@dataclass(frozen=True)
class Case:
    """A layout: sizes of the axes, ZeRO stage, sequence parallelism; what is left of the processes is data-parallel."""

    name: str
    processes: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    sequence: bool = False
    zero: int = 0

    def config(self) -> Config:
        """The run."""
        return Config.model_validate(
            {
                "model": MODEL,
                "data": {"seq_length": LENGTH},
                "precision": {"dtype": "fp32"},
                "parallel": {
                    "tensor": self.tensor,
                    "pipeline": self.pipeline,
                    "context": self.context,
                    "sequence": self.sequence,
                },
                "zero": {"stage": self.zero},
                "train": {"micro_batch_size": MICRO, "gradient_accumulation": ACCUMULATION, "train_iters": 2},
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


# c10d operator -> (weight times (n - 1)/n, position of the argument that holds the tensors, whether they are one
# member's share of it)
COLLECTIVES = {
    "allreduce_": (2.0, 0, False),
    "allreduce_coalesced_": (2.0, 0, False),
    "broadcast_": (1.0, 0, False),
    "reduce_": (1.0, 0, False),
    "_allgather_base_": (1.0, 0, False),
    "allgather_": (1.0, 1, True),
    "allgather_into_tensor_coalesced_": (1.0, 0, False),
    "_reduce_scatter_base_": (1.0, 1, False),
    "reduce_scatter_": (1.0, 1, False),
    "reduce_scatter_tensor_coalesced_": (1.0, 1, False),
    "alltoall_base_": (1.0, 1, False),
    "alltoall_": (1.0, 1, False),
    "gather_": (1.0, 1, True),
}
SILENT = ("recv_", "recv_any_source_", "barrier", "monitored_barrier_")


class Counter(TorchDispatchMode):
    """Counts what this process asks of its process groups, whoever asks: they all go through torch's dispatcher."""

    def __init__(self):
        super().__init__()
        self.sent: dict[str, float] = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "c10d":
            self.note(operator.overloadpacket.__name__, args)
        return operator(*args, **(kwargs or {}))

    def note(self, name: str, args: tuple) -> None:
        """Take note of one operator.

        Raises:
            RuntimeError: one that this table does not know: nothing is left uncounted.
        """
        if name in SILENT:
            return
        if name == "send":
            count = size_of(args[0])
        elif name in COLLECTIVES:
            weight, position, share = COLLECTIVES[name]
            group = next(
                argument
                for argument in args
                if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type())
            )
            members = dist.ProcessGroup.unbox(group).size()
            count = weight * (members - 1) / members * size_of(args[position]) * (members if share else 1)
        else:
            raise RuntimeError(f"an operator that is not counted: c10d.{name}")
        self.sent[name] = self.sent.get(name, 0.0) + count


def size_of(tensors: object) -> int:
    """Bytes of a tensor, or of the tensors in nested lists."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(size_of(each) for each in tensors)


def run_case(case: Case) -> dict:
    """One process: two steps of a layout, of which the second is counted."""
    # only here: it brings in DeepSpeed, which writes to the output at its import, ahead of the JSON
    from neox.engine.engine import Engine

    config = case.config()
    mesh = create_mesh(case.tensor, case.pipeline, context=case.context, sequence=case.sequence)
    engine = Engine(config, mesh, GPT(config.model, mesh))
    generator = torch.Generator().manual_seed(mesh.dp_rank)

    def micro_batch() -> Batch:
        tokens, targets = torch.randint(0, MODEL["vocab_size"], (2, MICRO, LENGTH), generator=generator)
        return Batch(
            tokens=tokens, targets=targets, segment_ids=None, position_ids=None, sample_ids=torch.arange(MICRO)
        )

    engine.train_step([micro_batch() for _ in range(ACCUMULATION)])
    with Counter() as counter:
        engine.train_step([micro_batch() for _ in range(ACCUMULATION)])
    return {"stage": mesh.pp_rank, "sent": counter.sent}


def child(processes: int, out: str) -> None:
    """One process of a group: runs all its cases; the launcher's variables identify it."""
    dist.init_process_group("gloo")
    answers = []
    for case in CASES:
        if case.processes == processes:
            gathered: list = [None] * processes
            dist.all_gather_object(gathered, run_case(case))
            answers.append(gathered)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(answers))
    dist.barrier()
    dist.destroy_process_group()


def count(processes: int) -> list[list[dict]]:
    """What every process sent, for each case of that many processes, from new processes.

    Raises:
        RuntimeError: a process failed; its output is in the message.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "answers.json"
        command = [sys.executable, __file__, "--child", str(processes), str(out)]
        shared = {
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        logs = [(Path(folder) / f"{rank}.txt").open("w+") for rank in range(processes)]
        children = [
            subprocess.Popen(
                command,
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=log,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            codes = [process.wait(900) for process in children]
        finally:
            for process in children:
                process.kill()
        if any(codes):
            texts = [log.seek(0) or log.read() for log in logs]
            raise RuntimeError(f"{processes} processes: exit codes {codes}\n" + "\n".join(texts))
        return json.loads(out.read_text())


def formula(rows: list[Traffic]) -> str:
    """What the least consists of, as count x kind(size in bytes)."""
    return " + ".join(f"{row.count} x {row.kind}({row.size:.0f})" for row in rows) or "nothing"


def compare(processes: tuple[int, ...]) -> Iterator[Row]:
    """A row per layout and pipeline stage: the process that sent most."""
    for number in processes:
        cases = [case for case in CASES if case.processes == number]
        for case, answers in zip(cases, count(number), strict=True):
            layout = resolve(case.config(), number)
            for stage in layout.stages:
                most = max(
                    (each["sent"] for each in answers if each["stage"] == stage.number),
                    key=lambda sent: sum(sent.values()),
                )
                parts = traffic(case.config(), layout, stage, least=True)
                least, sent = sum(row.sent for row in parts), sum(most.values())
                where = f", stage {stage.number}" if case.pipeline > 1 else ""
                kinds = ", ".join(f"{kind} {size / 1e3:.1f}" for kind, size in sorted(most.items()))
                setting = f"{number} processes{where}: {formula(parts)}; counted, kB: {kinds}"
                yield Row(
                    case.name, setting, sent / 1e3, least / 1e3, "least", least / sent if sent else 1.0, "kB/step"
                )


def main() -> None:
    """Reads the command line, prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    parser.add_argument("--quick", action="store_true", help="two processes alone: under a minute on an idle machine")
    # the processes that this one starts
    parser.add_argument("--child", nargs=2, metavar=("PROCESSES", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(int(args.child[0]), args.child[1])
        return
    show(compare((2,) if args.quick else (2, 4)), Options(json=args.json, quick=args.quick, threads=1))


if __name__ == "__main__":
    main()
