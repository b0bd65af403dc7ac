"""Models and engines on a fake GPU. Run as a program, in a process of its own:

    python -m tests.cuda.fake_runs OUT [FORM]

runs a pairwise choice of engines and everything else, or every engine of a form. It writes, for every run, what the
host waited for (tests.cuda.fake_cuda), or the error that ended it, as JSON. The runs "start", "account" and "copies"
write what the start of an engine, a step and a copy ask of the device (benchmarks/train/engine_account.py).
"""

from __future__ import annotations

from tests.cuda import fake_device  # noqa: F401  # isort: skip  # before torch

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

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
from tests.cuda.fake_setups import LENGTH, ROWS, Setup, every_setup, pairwise_setups
from tests.model.models import FORMS, SIZES

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "train"))
import account
import engine_account

GPU = torch.device("cuda", 0)
COPIES = ("aten.clone", "aten.copy_", "aten._to_copy", "aten.slice_backward", "aten.select_backward")
Answer = dict[str, list]  # kind of event -> [site:line, count] of each


def make_model(config: ModelConfig, mesh: Mesh, **options) -> GPT:
    """A model without initial values: they take time, and nothing is computed."""
    with mock.patch.object(GPT, "initialize", lambda self: None):
        return GPT(config, mesh, **options)


def generate_text(form: str, prompts: list[list[int]]) -> None:
    """Three tokens for each prompt, greedily: a fake GPU has no generator of random numbers."""
    model = make_model(ModelConfig(**(SIZES | FORMS[form])), Mesh.single(GPU), dtype=torch.bfloat16).eval()
    with mock.patch("neox.generate.generate.prompt_generator", lambda *_: None):
        generate(model, prompts, SamplingParams(max_new_tokens=3, temperature=0))


def micro_batch(documents: bool) -> Batch:
    """One micro-batch, in host memory as the loader leaves it."""
    tokens = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    segments, positions = (tokens.int(), tokens.clone()) if documents else (None, None)
    return Batch(tokens, tokens.clone(), segments, positions, torch.arange(ROWS))


def make_engine(setup: Setup) -> Engine:
    """An engine of one rank of a set-up."""
    config = setup.config()
    layout = config.parallel
    with _disable_current_modes():  # the ranks of a group are elements of a tensor: a fake one has no values
        mesh = create_mesh(layout.tensor, layout.pipeline, context=layout.context, sequence=layout.sequence, device=GPU)
    model = make_model(config.model, mesh, activation_checkpointing=config.train.activation_checkpointing)
    return Engine(config, mesh, model)


def agreeing_ranks(gpu: FakeCuda) -> contextlib.AbstractContextManager[None]:
    """Let stage 3 find equal lists on all ranks, which a fake group does not exchange. Each comparison is a read."""

    def same(values: list[int]) -> list[int]:
        gpu.note("read")
        return values

    return mock.patch.multiple(
        "deepspeed.runtime.zero.utils", assert_lst_len_same_as_other_ranks=same, get_lst_from_rank0=same
    )


def train_engine(setup: Setup, gpu: FakeCuda) -> dict[str, Answer]:
    """A step, and, in long set-ups, another one and an evaluation. Returns what the host waited for in each."""
    parts: dict[str, Answer] = {}
    dist.init_process_group("fake", store=FakeStore(), rank=setup.rank, world_size=setup.world_size)
    try:
        with agreeing_ranks(gpu):
            engine = make_engine(setup)
            take(gpu)
            batches = [micro_batch(setup.documents)] * setup.accumulation
            for step in (1, 2) if setup.is_long else (1,):
                result = engine.train_step(batches)
                assert (result.step, result.skipped, engine.updates) == (step, False, step)
                parts[f"step {step} {setup.name}"] = take(gpu)
            if setup.is_long:
                evaluate(engine, batches)
                parts[f"evaluation {setup.name}"] = take(gpu)
        return parts
    finally:
        close_process_group()


def in_the_model(row: account.Row) -> bool:
    """Whether an operator of the model copies activations or their gradients."""
    return row.name in COPIES and row.phase != "engine" and len(row.shape) > 1


def bf16_config() -> Config:
    """A small model in bf16 with ZeRO 1."""
    return Config.model_validate(
        {
            "model": SIZES | FORMS["neox"] | {"attention_backend": "native"},
            "optimizer": {"lr": 0.003, "gradient_clipping": 0.5},
            "precision": {"dtype": "bf16"},
            "data": {"seq_length": LENGTH},
            "train": {"micro_batch_size": ROWS, "train_iters": 10},
        }
    )


def peak_of_start() -> dict[str, Answer]:
    """Bytes on the GPU at the peak while an engine is made, next to the number of its parameters."""
    config = bf16_config()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        with account.Account() as counted:
            model = make_model(config.model, Mesh.single(GPU))
            elements = sum(parameter.numel() for parameter in model.parameters())
            Engine(config, Mesh.single(GPU), model)
            return {"start": {"parameters": [["elements", elements]], "memory": [["peak", counted.memory.peak]]}}
    finally:
        close_process_group()


def account_for_step() -> dict[str, Answer]:
    """Copies of the model, and launches and bytes around the model, in a bf16 step with ZeRO 1 on one GPU."""
    config = bf16_config()
    try:
        with engine_account.EngineAccount() as counted:
            engine_account.train(counted, config)
    finally:
        close_process_group()
    sizes = [parameter.numel() for parameter in GPT(config.model, Mesh.single("meta")).parameters()]
    return {
        "account": {
            "parameters": [["tensors", len(sizes)], ["elements", sum(sizes)]],
            "engine": [[what, counted.total(what, "engine")] for what in ("launches", "moved")],
            "copies": [[row.name, list(row.shape)] for row in counted.rows if in_the_model(row)],
        }
    }


def account_for_copies() -> dict[str, Answer]:
    """[launches, bytes read, bytes written] of the operators of each case."""
    out: Answer = {}
    with account.Account() as counted:
        for name, (inputs, call, _) in account_cases.COPIES.items():
            tensors = [torch.empty(shape, dtype=dtype, device=GPU) for shape, dtype in inputs]
            counted.start()
            call(*tensors)
            out[name] = [[row.cost.launches, row.cost.read, row.cost.written] for row in counted.rows]
    return {"copies": out}


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


def runs(gpu: FakeCuda, setups: list[Setup]) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, function) of every run of the engines; without engines, of everything else."""
    for setup in setups:
        yield setup.name, partial(train_engine, setup, gpu)
    if setups:
        return
    for form in FORMS:
        yield f"generate {form} one", partial(generate_text, form, [[1, 2, 3]])
    for form in ("neox", "qwen3-window", "alibi"):
        yield f"generate {form} ragged", partial(generate_text, form, [[1, 2, 3], [4]])
    for name, fault in planted().items():
        yield f"planted {name}", fault
    yield "start", peak_of_start
    yield "account", account_for_step
    yield "copies", account_for_copies


def take(gpu: FakeCuda) -> Answer:
    """The events since the last call."""
    out: Answer = {}
    for event, count in sorted(gpu.events.items()):
        out.setdefault(event.kind, []).append([f"{event.site}:{event.line}", count])
    gpu.events.clear()
    return out


def main(out: str, form: str = "") -> None:
    """Run the pairwise set-ups and everything else, or every set-up of a form."""
    os.environ["LOCAL_RANK"] = "0"
    answers: dict[str, Answer | str] = {}
    with FakeCuda() as gpu:
        set_accelerator(CUDA_Accelerator())
        setups = [setup for setup in every_setup() if setup.form == form] if form else pairwise_setups()
        for name, run in (*(() if form else runs(gpu, [])), *runs(gpu, setups)):
            take(gpu)
            try:
                parts = run()
            except Exception:
                answers[name] = traceback.format_exc()
                continue
            answers |= parts if isinstance(parts, dict) else {name: take(gpu)}
    Path(out).write_text(json.dumps(answers, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
