"""A small GPT trained in fp16 by the engine, against the same training written out in plain PyTorch: fp32 master
weights, a dynamic loss scale, skipped updates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from neox.config.schema import Config
from neox.data.samples.loader import Batch
from neox.engine.engine import Engine
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from tests.engine.toy import Stored, gathered
from tests.half_kernels import HalfKernels

STEPS, WINDOW, POWER = 24, 4, 20
VOCAB, LENGTH, ROWS = 64, 16, 4


ADAMW = {"lr": 0.01, "gradient_clipping": 0.5, "weight_decay": 0.1}
SGD = {"type": "sgd", "lr": 0.2, "momentum": 0.0, "gradient_clipping": 0.0, "weight_decay": 0.0}


def make_config(stage: int, accumulation: int, optimizer: dict) -> Config:
    """Warm-up and decay by updates, so that a schedule that counts skipped steps is seen."""
    return Config.model_validate(
        {
            "model": {
                "num_layers": 2,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "vocab_size": VOCAB,
                "max_position_embeddings": LENGTH,
                "rotary_pct": 0.5,
                "parallel_residual": True,
            },
            "optimizer": optimizer,
            "schedule": {"rule": "gpt_neox", "type": "linear", "warmup_iters": 3, "decay_iters": 30},
            "precision": {"dtype": "fp16", "initial_scale_power": POWER, "loss_scale_window": WINDOW},
            "zero": {"stage": stage},
            "train": {"train_iters": STEPS, "micro_batch_size": ROWS, "gradient_accumulation": accumulation},
        }
    )


def batches(step: int, accumulation: int) -> list[Batch]:
    """Micro-batches of a step: text that counts upwards."""
    generator = torch.Generator().manual_seed(step)
    out = []
    for index in range(accumulation):
        first = torch.randint(VOCAB, (ROWS, 1), generator=generator)
        tokens = (first + torch.arange(LENGTH + 1) * (1 + first % 3)) % VOCAB
        ids = torch.arange(ROWS) + (step * accumulation + index) * ROWS
        out.append(Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None, None, ids))
    return out


@dataclass
class PlainTraining:
    """Mixed-precision training as in Micikevicius et al. (arXiv 1710.03740, sections 3.1 and 3.2), in PyTorch alone."""

    config: Config
    accumulation: int
    scale: float = 2.0**POWER
    good: int = -1  # updates since the last overflow or growth
    updates: int = 0
    model: GPT = field(init=False)

    def __post_init__(self) -> None:
        self.model = GPT(self.config.model, Mesh.single())
        self.masters = {name: p.detach().clone().requires_grad_() for name, p in self.model.named_parameters()}
        matrices = [p for p in self.masters.values() if p.ndim > 1]
        vectors = [p for p in self.masters.values() if p.ndim <= 1]
        settings = self.config.optimizer
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        if settings.type == "sgd":
            self.optimizer = torch.optim.SGD(groups, lr=settings.lr)
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
        self.round()

    def round(self) -> None:
        """The weights of the forward pass are the masters in fp16."""
        for name, p in self.model.named_parameters():
            p.data = self.masters[name].detach().half()

    def rate(self) -> float:
        """The learning rate of the next update: warm-up, then linear decay."""
        schedule, peak = self.config.schedule, self.config.optimizer.lr
        warmup, decay = schedule.warmup_iters, schedule.decay_iters or 0
        if self.updates <= warmup:
            return peak * max(1, self.updates) / warmup
        return peak * (decay - self.updates) / (decay - warmup)

    def step(self, parts: list[Batch]) -> dict[str, float | bool]:
        """One step: gradients of the scaled loss in fp16, summed and unscaled in fp32, clipped, applied."""
        scale, lr, total = self.scale, self.rate(), 0.0
        count = sum(batch.targets.numel() for batch in parts)
        grads = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        for batch in parts:
            self.model.zero_grad()
            loss = self.model(batch.tokens, batch.targets).sum() / count
            (loss * scale).backward()
            total += float(loss.detach())
            for name, p in self.model.named_parameters():
                assert p.grad is not None and p.grad.dtype == torch.float16
                grads[name] += p.grad.float()
        for name, grad in grads.items():
            # stages 0 and 1 reduce the sum of the micro-batches over the replicas in fp16
            grads[name] = (grad.half().float() if self.config.zero.stage < 2 else grad) / scale
        norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads.values()))
        skipped = not math.isfinite(norm)
        if skipped:
            # DeepSpeed does not count the first update after an overflow: the scale grows after one more than WINDOW
            self.scale, self.good = max(scale / 2, 1.0), -1
        else:
            self.good += 1
            if self.good == WINDOW:
                self.scale, self.good = scale * 2, 0
            self.apply(grads, norm, lr)
        return {"loss": total, "scale": scale, "skipped": skipped, "lr": lr, "norm": norm}

    def apply(self, grads: dict[str, torch.Tensor], norm: float, lr: float) -> None:
        """Clip, update the masters, round."""
        clip = self.config.optimizer.gradient_clipping
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for name, master in self.masters.items():
            master.grad = grads[name] * (min(1.0, clip / (norm + 1e-6)) if clip else 1.0)
        self.optimizer.step()
        self.updates += 1
        self.round()


@pytest.fixture(autouse=True)
def half_kernels() -> Iterator[HalfKernels]:
    """The operators take fp16."""
    with HalfKernels() as mode:
        yield mode


def engine_of(config: Config) -> Engine:
    return Engine(config, Mesh.single(), GPT(config.model, Mesh.single()))


def run(engine: Engine, accumulation: int, steps: int) -> list[dict[str, float | bool]]:
    """Trains, and returns what every step used."""
    out = []
    for _ in range(steps):
        scale = engine.updater.loss_scale
        result = engine.train_step(batches(engine.step, accumulation))
        out.append(
            {
                "loss": result.loss,
                "scale": scale,
                "skipped": result.skipped,
                "lr": result.lr,
                "norm": result.grad_norm,
            }
        )
    return out


CASES = [(0, 1, ADAMW), (1, 2, ADAMW), (1, 1, SGD), (2, 2, SGD), (3, 1, SGD)]


@pytest.mark.parametrize(("stage", "accumulation", "optimizer"), CASES)
def test_training_in_fp16_is_that_of_plain_pytorch(stage, accumulation, optimizer, half_kernels):
    """With SGD, a step with another multiple of its gradient is seen in the weights."""
    config = make_config(stage, accumulation, optimizer)
    plain = PlainTraining(config, accumulation)
    initial = {name: p.detach().clone() for name, p in plain.masters.items()}
    want = [plain.step(batches(step, accumulation)) for step in range(STEPS)]
    engine = engine_of(config)
    got = run(engine, accumulation, STEPS)
    assert {"attention_qkv", "attention_qkv_backward", "norm", "norm_backward", "rotary_qkv_"} <= half_kernels.seen
    for name in ("scale", "skipped"):
        assert [row[name] for row in got] == [row[name] for row in want], name
    skipped = [row["skipped"] for row in want]
    scales = [row["scale"] for row in want]
    assert skipped[0] and sum(skipped) < STEPS / 2  # it overflows at first
    assert any(late and not early for early, late in itertools.pairwise(skipped))  # and after growth
    assert any(later > earlier for earlier, later in itertools.pairwise(scales))
    assert [row["lr"] for row in got] == pytest.approx([row["lr"] for row in want], rel=1e-6)
    for mine, other in zip(got, want, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=2e-3)
        assert other["skipped"] or mine["norm"] == pytest.approx(other["norm"], rel=2e-2)
    assert got[-1]["loss"] < 0.95 * got[0]["loss"]
    weights = gathered(engine)
    for name, master in plain.masters.items() if optimizer is SGD else ():  # Adam moves weights without a gradient too
        mine, other = weights[f"weight/{name}"].flatten(), master.detach().flatten()
        moved = float((other - initial[name].flatten()).abs().max())
        assert float((mine - other[: len(mine)]).abs().max()) < 0.05 * moved, name  # without the vocabulary's padding


@pytest.mark.parametrize("stage", [1, 3])
def test_the_scale_is_restored_with_its_window(stage):
    """Saved in the middle of a window: a resume that forgets the count of good steps grows the scale too late."""
    config = make_config(stage, 1, ADAMW)
    straight = engine_of(config)
    history = run(straight, 1, STEPS)
    growths = [step for step in range(1, STEPS) if history[step]["scale"] > history[step - 1]["scale"]]
    for saved_at in (1, growths[0] - 1):
        first = engine_of(config)
        run(first, 1, saved_at)
        resumed = engine_of(config)
        resumed.restore(Stored({key: value.clone() for key, value in gathered(first).items()}, first.state_dict()))
        assert resumed.updater.loss_scale == history[saved_at]["scale"]
        assert run(resumed, 1, STEPS - saved_at) == history[saved_at:]
