"""Models and engines on a fake GPU. Run as a program, in a process of its own:

    python -m tests.cuda.fake_runs OUT

writes, for every run, what the host waited for (tests.cuda.fake_cuda), or the error that ended it, as JSON. The runs
"account" and "copies" write what a step and a copy ask of the device (benchmarks/train/engine_account.py).
"""

from __future__ import annotations

from tests.cuda import fake_device  # noqa: F401  # isort: skip  # before torch

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from torch.testing._internal.distributed.fake_pg import FakeStore

from neox.config.schema import Config, ModelConfig
from neox.data.samples.loader import Batch
from neox.engine.engine import Engine
from neox.engine.evaluation import evaluate
from neox.generate.generate import generate
from neox.generate.sampling import SamplingParams
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh, create_mesh
from tests.conftest import close_process_group
from tests.cuda import account_cases
from tests.cuda.fake_cuda import FakeCuda
from tests.model.models import FORMS, SIZES

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "train"))
import account
import engine_account

ROWS, LENGTH, VOCAB = 2, 16, SIZES["vocab_size"]
GPU = torch.device("cuda", 0)
COPIES = ("aten.clone", "aten.copy_", "aten._to_copy", "aten.slice_backward", "aten.select_backward")
Answer = dict[str, list]  # kind of event -> [site:line, count] of each


@dataclass(frozen=True)
class Layout:
    """Precision and layout of an engine, and its rank."""

    dtype: str
    zero: int
    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    sequence: bool = False
    form: str = "neox"
    rank: int = 0

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def name(self) -> str:
        sizes = "".join(f" {key}{value}" for key in ("tp", "pp", "dp", "cp") if (value := getattr(self, key)) > 1)
        return f"{self.form} {self.dtype} zero{self.zero}{sizes}{' sp' * self.sequence} rank{self.rank}"


PRECISIONS = (("fp32", 0), ("bf16", 1), ("bf16", 2), ("bf16", 3), ("fp16", 1), ("fp16", 2))
LAYOUTS = [
    *(Layout(dtype, zero, dp=2) for dtype, zero in PRECISIONS),
    Layout("bf16", 1, form="llama"),
    Layout("fp32", 0, tp=2),
    Layout("bf16", 1, tp=2, sequence=True, form="llama"),
    Layout("fp16", 2, tp=2),
    Layout("fp32", 0, pp=2, form="gpt2", rank=1),
    *(Layout("bf16", 1, pp=2, rank=rank) for rank in (0, 1)),
    Layout("bf16", 1, cp=2),
]


def make_model(form: str, mesh: Mesh, **options) -> GPT:
    """A small model in a form, without initial values: they take time, and nothing is computed."""
    with mock.patch.object(GPT, "initialize", lambda self: None):
        return GPT(ModelConfig(**(SIZES | FORMS[form])), mesh, **options)


def train_model(form: str, checkpointing: str, documents: bool, backend: str) -> None:
    """Forward and backward of a model alone."""
    config = FORMS[form] | {"attention_backend": backend}
    with mock.patch.dict(FORMS, {form: config}):
        model = make_model(form, Mesh.single(GPU), dtype=torch.bfloat16, activation_checkpointing=checkpointing).train()
    tokens = torch.zeros(ROWS, LENGTH, dtype=torch.int64, device=GPU)
    packed = {"segment_ids": tokens.int(), "position_ids": tokens} if documents else {}
    model(tokens, tokens, **packed).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.device == GPU, name


def generate_text(form: str, prompts: list[list[int]]) -> None:
    """Three tokens for each prompt, greedily: a fake GPU has no generator of random numbers."""
    model = make_model(form, Mesh.single(GPU), dtype=torch.bfloat16).eval()
    with mock.patch("neox.generate.generate.prompt_generator", lambda *_: None):
        generate(model, prompts, SamplingParams(max_new_tokens=3, temperature=0))


def micro_batch() -> Batch:
    """One micro-batch, in host memory as the loader leaves it."""
    tokens = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    return Batch(tokens, tokens.clone(), None, None, torch.arange(ROWS))


def make_engine(layout: Layout, accumulation: int) -> Engine:
    """An engine of one rank of a layout."""
    config = Config.model_validate(
        {
            "model": SIZES | FORMS[layout.form],
            "optimizer": {"lr": 0.003, "gradient_clipping": 0.5},
            "precision": {"dtype": layout.dtype},
            "parallel": {
                "tensor": layout.tp, "pipeline": layout.pp, "context": layout.cp, "sequence": layout.sequence
            },
            "zero": {"stage": layout.zero},
            "train": {"micro_batch_size": ROWS, "gradient_accumulation": accumulation, "train_iters": 10},
            "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 100}},
        }
    )  # fmt: skip
    mesh = create_mesh(layout.tp, layout.pp, context=layout.cp, sequence=layout.sequence, device=GPU)
    return Engine(config, mesh, make_model(layout.form, mesh))


def agreeing_ranks(gpu: FakeCuda) -> contextlib.AbstractContextManager[None]:
    """Let stage 3 find equal lists on all ranks, which a fake group does not exchange. Each comparison is a read."""

    def same(values: list[int]) -> list[int]:
        gpu.note("read")
        return values

    return mock.patch.multiple(
        "deepspeed.runtime.zero.utils", assert_lst_len_same_as_other_ranks=same, get_lst_from_rank0=same
    )


def train_engine(layout: Layout, gpu: FakeCuda) -> None:
    """Two steps, of which the second counts, and an evaluation."""
    accumulation = max(2, layout.pp)
    dist.init_process_group("fake", store=FakeStore(), rank=layout.rank, world_size=layout.world_size)
    try:
        with agreeing_ranks(gpu):
            engine = make_engine(layout, accumulation)
            batches = [micro_batch()] * accumulation
            engine.train_step(batches)
            gpu.events.clear()
            result = engine.train_step(batches)
            counted = gpu.events.copy()
            evaluate(engine, batches)
        assert (result.step, result.skipped, engine.updates) == (2, False, 2)
        gpu.events.clear()
        gpu.events.update(counted)
    finally:
        close_process_group()


def in_the_model(row: account.Row) -> bool:
    """Whether an operator of the model copies activations or their gradients."""
    return row.name in COPIES and row.phase != "engine" and len(row.shape) > 1


def account_for_step() -> Answer:
    """Copies of the model, and launches and bytes around the model, in a bf16 step with ZeRO 1 on one GPU."""
    config = Config.model_validate(
        {
            "model": SIZES | FORMS["neox"] | {"attention_backend": "native"},
            "optimizer": {"lr": 0.003, "gradient_clipping": 0.5},
            "precision": {"dtype": "bf16"},
            "data": {"seq_length": LENGTH},
            "train": {"micro_batch_size": ROWS, "train_iters": 10},
        }
    )
    try:
        with engine_account.EngineAccount() as counted:
            engine_account.train(counted, config)
    finally:
        close_process_group()
    sizes = [parameter.numel() for parameter in GPT(config.model, Mesh.single("meta")).parameters()]
    return {
        "parameters": [["tensors", len(sizes)], ["elements", sum(sizes)]],
        "engine": [[what, counted.total(what, "engine")] for what in ("launches", "moved")],
        "copies": [[row.name, list(row.shape)] for row in counted.rows if in_the_model(row)],
    }


def account_for_copies() -> Answer:
    """[launches, bytes read, bytes written] of the operators of each case."""
    out: Answer = {}
    with account.Account() as counted:
        for name, (inputs, call, _) in account_cases.COPIES.items():
            tensors = [torch.empty(shape, dtype=dtype, device=GPU) for shape, dtype in inputs]
            counted.start()
            call(*tensors)
            out[name] = [[row.cost.launches, row.cost.read, row.cost.written] for row in counted.rows]
    return out


def planted() -> dict[str, Callable[[], object]]:
    """Faults, each of which must be found."""
    on_gpu, on_host = torch.ones(3, device=GPU), torch.ones(3)
    return {
        "item": lambda: on_gpu.sum().item(),
        "tolist": on_gpu.tolist,
        "bool": lambda: bool((on_gpu > 0).all()),
        "equal": lambda: torch.equal(on_gpu, on_gpu),
        "nonzero": on_gpu.nonzero,
        "synchronize": torch.cuda.synchronize,
        "stream": torch.cuda.current_stream().synchronize,
        "event": torch.cuda.Event().synchronize,
        "cpu": on_gpu.cpu,
        "to": lambda: on_host.to(GPU, non_blocking=True),
        "pinned": lambda: on_host.pin_memory().to(GPU, non_blocking=True),
        "tensor": lambda: torch.tensor([1.0, 2.0], device=GPU),
        "copy": lambda: on_gpu.copy_(torch.ones(3)),
        "two devices": lambda: on_gpu + on_host,
    }


def runs(gpu: FakeCuda) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, function) of every run."""
    for form in FORMS:
        for checkpointing in ("none", "selective", "full"):
            documents = checkpointing != "none" and form != "alibi"
            backend = "sdpa" if checkpointing == "full" and "softcap" not in form else "native"
            name = f"model {form} {checkpointing} {backend}{' documents' * documents}"
            yield name, partial(train_model, form, checkpointing, documents, backend)
        yield f"generate {form} one", partial(generate_text, form, [[1, 2, 3]])
    for form in ("neox", "qwen3-window", "alibi"):
        yield f"generate {form} ragged", partial(generate_text, form, [[1, 2, 3], [4]])
    for name, fault in planted().items():
        yield f"planted {name}", fault
    yield "account", account_for_step
    yield "copies", account_for_copies
    for layout in LAYOUTS:
        yield f"engine {layout.name}", partial(train_engine, layout, gpu)


def main(out: str, only: str = "") -> None:
    """Run everything whose name contains `only`."""
    os.environ["LOCAL_RANK"] = "0"
    answers: dict[str, Answer | str] = {}
    with FakeCuda() as gpu:
        set_accelerator(CUDA_Accelerator())
        for name, run in runs(gpu):
            if only not in name:
                continue
            gpu.events.clear()
            try:
                result = run()
            except Exception:
                answers[name] = traceback.format_exc()
                continue
            if isinstance(result, dict):
                answers[name] = result
                continue
            answer: Answer = {}
            for event, count in sorted(gpu.events.items()):
                answer.setdefault(event.kind, []).append([f"{event.site}:{event.line}", count])
            answers[name] = answer
    Path(out).write_text(json.dumps(answers, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
