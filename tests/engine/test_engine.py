"""The engine on a toy model: the same training under every ZeRO stage, world size and accumulation; what is not
finite.
"""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from neox.engine.evaluation import evaluate
from neox.errors import CheckpointError, NonFinite
from neox.parallel.mesh import Mesh
from neox.phases import Observer, Phases
from tests.distributed import run_ranks
from tests.engine.toy import Stored, engine_padding, gathered, make_config, make_engine, micro_batches, run

STEPS = 20


@pytest.fixture(scope="module")
def reference():
    """One process, stage 0, no accumulation, 20 steps."""
    engine = make_engine(make_config(), Mesh.single())
    return {
        "history": run(engine, 1, STEPS),
        "tensors": gathered(engine),
        "validation": evaluate(engine, micro_batches(777, engine.mesh, 2)),
    }


def assert_same_history(got, want, tolerance=1e-5):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * tolerance)
        assert (a["lr"], a["tokens"]) == (b["lr"], b["tokens"])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_every_stage_and_accumulation_gives_the_same_training_in_one_process(reference, stage, accumulation):
    engine = make_engine(make_config(zero={"stage": stage}), Mesh.single(), accumulation)
    assert_same_history(run(engine, accumulation, STEPS), reference["history"])
    assert engine_padding(engine) == 0.0


@pytest.mark.distributed
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_stage_gives_the_same_training_over_two_processes(reference, tmp_path, accumulation):
    settings = {"stages": [0, 1, 2, 3], "accumulation": accumulation, "steps": STEPS}
    run_ranks("tests.engine.toy:train_ranks", 2, tmp_path, [json.dumps(settings), tmp_path / "out.json"])
    for answer in json.loads((tmp_path / "out.json").read_text()).values():
        assert_same_history(answer["history"], reference["history"])
        assert answer["validation"] == pytest.approx(reference["validation"], rel=1e-5)
        assert answer["padding"] == 0.0
        for key, value in reference["tensors"].items():
            torch.testing.assert_close(torch.tensor(answer["tensors"][key]), value, rtol=1e-3, atol=1e-5)


@pytest.mark.distributed
def test_saved_by_two_processes_at_stage_1_resumed_by_one_at_stage_3(reference, tmp_path):
    settings = {"stages": [1], "accumulation": 2, "steps": 8}
    run_ranks("tests.engine.toy:train_ranks", 2, tmp_path, [json.dumps(settings), tmp_path / "out.json"])
    answer = json.loads((tmp_path / "out.json").read_text())["1"]
    engine = make_engine(make_config(zero={"stage": 3}), Mesh.single(), 2)
    engine.restore(Stored({key: torch.tensor(value) for key, value in answer["tensors"].items()}, answer["state"]))
    assert_same_history(run(engine, 2, STEPS - 8), reference["history"][8:])


LAYOUTS = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3), ("fp16", 2)]
RESUMED = [("adamw", *layout) for layout in LAYOUTS] + [
    (kind, *layout) for kind in ("lion", "sgd") for layout in LAYOUTS[::3]
]
RESUMED += [("muon", "fp32", 0), ("muon", "bf16", 1), ("muon", "fp32", 3)]


@pytest.mark.parametrize(("kind", "dtype", "stage"), RESUMED)
def test_resume_is_bitwise(kind, dtype, stage):
    config = make_config(
        zero={"stage": stage},
        precision={"dtype": dtype},
        optimizer={"type": kind, "lr": 0.01, "gradient_clipping": 0.1},
    )
    straight = make_engine(config, Mesh.single(), 2)
    run(straight, 2, 4)
    stored = Stored({key: value.clone() for key, value in gathered(straight).items()}, straight.state_dict())
    resumed = make_engine(config, Mesh.single(), 2)
    resumed.restore(stored)
    assert run(straight, 2, 4) == run(resumed, 2, 4)
    for key, value in gathered(straight).items():
        assert torch.equal(value, gathered(resumed)[key]), key


def test_the_loss_is_weighted_by_targets_over_the_global_batch():
    engine = make_engine(make_config(), Mesh.single(), 4)
    batches = micro_batches(0, engine.mesh, 4)
    counts = [int((b.targets != -100).sum()) for b in batches]
    assert len(set(counts)) > 1
    per_batch = [float(engine.model(b.tokens, b.targets).sum()) for b in batches]
    result = engine.train_step(batches)
    assert result.loss == pytest.approx(sum(per_batch) / sum(counts), rel=1e-6)
    assert result.tokens == sum(counts)
    assert abs(result.loss - sum(s / c for s, c in zip(per_batch, counts, strict=True)) / 4) > 1e-4


@pytest.mark.parametrize(("dtype", "stage"), LAYOUTS)
def test_the_gradient_of_every_loss_is_the_one_that_the_model_expected(dtype, stage):
    """To the bit: cross_entropy leaves that gradient in the logits and has to work again for any other."""
    engine = make_engine(make_config(zero={"stage": stage}, precision={"dtype": dtype}), Mesh.single(), 2)
    run(engine, 2, 3)
    assert len(engine.model.expected_dloss) == 6
    for expected_dloss, dloss in engine.model.expected_dloss:
        assert (dloss == torch.tensor(expected_dloss, dtype=torch.float32)).all(), (expected_dloss, dloss)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_gradients_are_clipped_to_the_norm(stage):
    free = make_engine(
        make_config(
            zero={"stage": stage},
            optimizer={"type": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "gradient_clipping": 0.0},
        ),
        Mesh.single(),
    )
    tight = make_engine(
        make_config(
            zero={"stage": stage},
            optimizer={"type": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "gradient_clipping": 0.05},
        ),
        Mesh.single(),
    )
    before = {key: value.clone() for key, value in gathered(free).items() if key.startswith("weight")}
    norms = [run(engine, 1, 1)[0]["grad_norm"] for engine in (free, tight)]
    assert norms[0] == pytest.approx(norms[1])  # the norm that is reported is that before clipping
    lr = free.updater.lr_schedule.learning_rate(1)
    moved = [
        math.sqrt(sum(float(((gathered(engine)[key] - value) / lr).square().sum()) for key, value in before.items()))
        for engine in (free, tight)
    ]
    assert moved[0] == pytest.approx(norms[0], rel=1e-4)
    assert moved[1] == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_keeps_the_initial_weights_unrounded_in_its_masters(stage):
    engine = make_engine(make_config(zero={"stage": stage}, precision={"dtype": "bf16"}), Mesh.single())
    want = dict(make_engine(make_config(), Mesh.single()).model.named_parameters())
    for name, value in gathered(engine).items():
        if name.startswith("weight/"):
            p = want[name.split("/")[1]].detach()
            assert torch.equal(value.view(-1), p.reshape(-1)[: value.numel()])
    assert next(engine.model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_follows_fp32(reference, stage):
    engine = make_engine(make_config(zero={"stage": stage}, precision={"dtype": "bf16"}), Mesh.single(), 2)
    for got, want in zip(run(engine, 2, STEPS), reference["history"], strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=2e-3)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=3e-2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp16_scales_the_loss_and_clips_what_is_unscaled(reference, stage):
    """The toy runs in fp16 on a CPU; the model's own kernels need a GPU for it."""
    for power in (4, 10, 15):
        engine = make_engine(
            make_config(zero={"stage": stage}, precision={"dtype": "fp16", "initial_scale_power": power}),
            Mesh.single(),
            2,
        )
        for got, want in zip(run(engine, 2, STEPS), reference["history"], strict=True):
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-3)
            assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=2e-2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp16_skips_what_overflows_and_lowers_the_scale(stage):
    engine = make_engine(
        make_config(zero={"stage": stage}, precision={"dtype": "fp16", "initial_scale_power": 30}), Mesh.single()
    )
    before = gathered(engine)["weight/norm.weight"].clone()
    first = engine.train_step(micro_batches(0, engine.mesh, 1))
    assert first.skipped
    assert torch.equal(before, gathered(engine)["weight/norm.weight"])
    assert (engine.step, engine.updates, engine.updater.loss_scale) == (1, 0, 2.0**29)
    while first.skipped:
        first = engine.train_step(micro_batches(engine.step, engine.mesh, 1))
    assert engine.updates == 1
    assert not torch.equal(before, gathered(engine)["weight/norm.weight"])
    engine.model.poison = (0, "gradient", math.nan)
    with pytest.raises(NonFinite, match="gradient is not finite"):  # at the smallest scale it is no overflow any more
        for _ in range(40):
            engine.train_step(micro_batches(1, engine.mesh, 1))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "poison", [("loss", math.nan), ("loss", math.inf), ("gradient", math.nan), ("gradient", math.inf)]
)
def test_what_is_not_finite_is_found_before_the_update(stage, dtype, poison):
    engine = make_engine(make_config(zero={"stage": stage}, precision={"dtype": dtype}), Mesh.single())
    run(engine, 1, 1)
    before = {key: value.clone() for key, value in gathered(engine).items()}
    engine.model.poison = (0, *poison)
    with pytest.raises(
        NonFinite, match=rf"the {poison[0]} is not finite.*step 2.*samples \[8, 9, 10, 11, 12, 13, 14, 15\]"
    ):
        engine.train_step(micro_batches(1, engine.mesh, 1))
    assert engine.step == 1
    for key, value in gathered(engine).items():
        assert torch.equal(value, before[key]), key


@pytest.mark.distributed
def test_all_processes_decide_the_same_when_one_is_poisoned(tmp_path):
    settings = {"stages": [0, 1, 2, 3], "dtypes": ["fp32", "bf16"]}
    run_ranks("tests.engine.toy:poison_ranks", 2, tmp_path, [json.dumps(settings), tmp_path / "out"])
    first, second = (json.loads((tmp_path / f"out.{rank}").read_text()) for rank in (0, 1))
    for a, b in zip(first, second, strict=True):
        for answer in (a, b):
            assert answer["error"] is not None, answer
            assert answer["unchanged"], answer
            assert "samples [8, 9, 10, 11, 12, 13, 14, 15]" in answer["error"]
        assert a["error"].replace("rank 0", "") == b["error"].replace("rank 1", "")


def test_the_wish_to_stop_comes_back():
    engine = make_engine(make_config(), Mesh.single())
    assert not engine.train_step(micro_batches(0, engine.mesh, 1)).stop
    assert engine.train_step(micro_batches(1, engine.mesh, 1), stop=True).stop


def test_a_checkpoint_of_another_model_or_optimizer_is_refused():
    engine = make_engine(make_config(), Mesh.single())
    run(engine, 1, 1)
    tensors, state = gathered(engine), engine.state_dict()
    fewer = {key: value for key, value in tensors.items() if not key.endswith("norm.weight")}
    with pytest.raises(CheckpointError, match="do not fit"):
        engine.restore(Stored(fewer, state))
    with pytest.raises(CheckpointError, match="another optimizer.*got=lion; want=adamw"):
        engine.restore(Stored(tensors, state | {"optimizer": "lion"}))


def test_the_step_of_the_documentation_runs_without_a_launcher(repository):
    """Fewer than twenty lines, no launcher, no dataset, no run folder; the loss falls."""
    page = (repository / "docs" / "training.md").read_text(encoding="utf-8")
    program = page.partition("```python\n")[2].partition("```")[0]
    assert "engine.train_step" in program and program.count("\n") < 20
    alone = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=repository, env=alone, timeout=300
    )
    assert done.returncode == 0, done.stderr
    losses = [
        float(line.partition("loss=")[2].partition(",")[0])
        for line in done.stdout.splitlines()
        if line.startswith("StepResult")
    ]
    assert len(losses) == 3 and losses[2] < losses[0]


class Recorder(Observer):
    """Notes the phases that a step enters."""

    def __init__(self):
        self.seen = []

    def enter(self, phase, step=None):
        self.seen.append((phase, step))


def test_a_step_announces_its_phases_in_order():
    recorder = Recorder()
    engine = make_engine(make_config(), Mesh.single(), 2, phases=Phases(recorder))
    run(engine, 2, 2)
    micro_batch = [("forward", None), ("backward", None)]
    steps = [[("step", n), *micro_batch, *micro_batch, ("update", None), ("updated", None)] for n in (1, 2)]
    assert recorder.seen == steps[0] + steps[1]
    recorder.seen.clear()
    evaluate(engine, micro_batches(3, engine.mesh, 2))
    assert recorder.seen == [("evaluate", None), ("forward", None), ("forward", None)]


def test_counters_and_the_guard_are_saved_and_restored_too():
    """Steps, updates and the losses of the guard; nothing of a loss scale, which only fp16 has."""
    config = make_config(guard={"non_finite": "skip"})
    engine = make_engine(config, Mesh.single())
    run(engine, 1, 2)
    engine.model.poison = (0, "loss", math.nan)
    assert engine.train_step(micro_batches(2, engine.mesh, 1)).skipped
    state = engine.state_dict()
    assert state == {
        "step": 3,
        "updates": 2,
        "optimizer": "adamw",
        "guard": {"losses": list(engine.updater.guard.losses), "skipped": 1},
    }
    assert len(state["guard"]["losses"]) == 2
    other = make_engine(config, Mesh.single())
    other.restore(Stored({key: value.clone() for key, value in gathered(engine).items()}, state))
    assert other.state_dict() == state
    assert (other.step, other.updates, other.deepspeed.global_steps) == (3, 2, 3)


def test_one_process_asks_itself():
    engine = make_engine(make_config(), Mesh.single())
    assert engine.any_process(True) is True and engine.any_process(False) is False
    engine.check_replicas()
    assert engine.everyone is None
