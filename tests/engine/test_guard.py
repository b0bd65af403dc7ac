"""Policies for loss spikes and numbers that are not finite, on the engine with a toy model."""

import dataclasses
import json
import math

import pytest
import torch

from neox.config.schema import GuardConfig
from neox.engine.guard import MIN_LOSSES, Guard, non_finite_error
from neox.errors import NonFinite
from neox.parallel.mesh import Mesh
from neox.phases import Phases
from neox.testing.faults import FaultInjector, parse
from tests.engine.toy import gathered, make_config, make_engine, micro_batches, run


def guard(**values) -> Guard:
    return Guard(GuardConfig(**values))


def test_a_spike_is_measured_against_the_median_of_good_losses():
    one = guard(spike_factor=2.0, spike_window=20)
    for loss in (4.0, 3.9, 4.1, 4.0, 3.8, 4.2, 4.0):
        assert not one.is_spike(100.0), "too few losses"
        one.accept(loss)
    one.accept(4.0)
    assert len(one.losses) == MIN_LOSSES
    assert one.is_spike(8.01) and not one.is_spike(8.0)
    assert "8.4 is 2.1 times the median of the last 8" in one.describe_spike(8.4)
    assert not guard(loss_spike="off").is_spike(1e9)


@pytest.mark.parametrize("window", [1, 2, MIN_LOSSES - 1, MIN_LOSSES, MIN_LOSSES + 1])
def test_a_short_window_finds_spikes_once_it_is_full(window):
    one = guard(spike_factor=2.0, spike_window=window)
    for _ in range(min(window, MIN_LOSSES)):
        assert not one.is_spike(100.0)
        one.accept(1.0)
    assert one.is_spike(2.01) and not one.is_spike(2.0)


def test_the_window_forgets_the_oldest_loss_also_after_a_restore():
    one, other = guard(spike_factor=2.0, spike_window=3), guard(spike_factor=2.0, spike_window=3)
    for loss in (9.0, 9.0, 9.0, 1.0, 1.0):
        one.accept(loss)
    other.restore(one.state_dict())
    for each in (one, other):
        each.accept(1.0)
        assert list(each.losses) == [1.0, 1.0, 1.0] and each.is_spike(2.01)
    shorter = guard(spike_window=2)
    shorter.restore({"losses": [1.0, 2.0, 3.0], "skipped": 1})
    assert list(shorter.losses) == [2.0, 3.0] and shorter.skipped == 1


def test_what_is_not_finite_never_enters_the_window():
    """Else every later comparison is false."""
    one = guard(non_finite="skip", spike_factor=2.0)
    for _ in range(MIN_LOSSES):
        one.accept(1.0)
    one.note_non_finite(NonFinite("x"))
    assert all(math.isfinite(loss) for loss in one.losses)
    assert one.is_spike(2.5)
    assert one.skipped == 1
    one.accept(1.0)
    assert one.skipped == 0


def test_stop_raises_and_skip_counts():
    with pytest.raises(NonFinite, match="planted"):
        guard().note_non_finite(NonFinite("planted"))
    one = guard(non_finite="skip", max_skipped=2)
    one.note_non_finite(NonFinite("planted"))
    one.note_non_finite(NonFinite("planted"))
    with pytest.raises(NonFinite, match="planted.*at most 2 steps skipped in a row"):
        one.note_non_finite(NonFinite("planted"))


def test_the_state_survives_a_checkpoint():
    one, other = guard(spike_window=4), guard(spike_window=4)
    for loss in (1.0, 0.1 + 0.2, 1e-300, 4.0, 5.0):
        one.accept(loss)
    one.skipped = 2
    other.restore(json.loads(json.dumps(one.state_dict())))
    assert (other.losses, other.skipped) == (one.losses, 2)
    other.restore({})
    assert (list(other.losses), other.skipped) == ([], 0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("what", ["nan@0:loss:3", "inf@0:loss_number:3", "nan@0:gradient:3", "huge@0:gradient:3"])
def test_a_skipped_step_changes_no_byte_and_the_next_one_is_applied(stage, dtype, what):
    if what.startswith("huge") and stage == 3:
        pytest.skip("DeepSpeed's norm of stage 3 does not overflow there: the update is clipped, and applied")
    config = make_config(zero={"stage": stage}, precision={"dtype": dtype}, guard={"non_finite": "skip"})
    engine = make_engine(config, Mesh.single(), phases=Phases(FaultInjector(parse(what))))
    run(engine, 1, 2)
    before = {key: value.clone() for key, value in gathered(engine).items()}
    result = engine.train_step(micro_batches(2, engine.mesh, 1))
    assert result.skipped and not result.spike and "is not finite" in result.problem
    assert (engine.step, engine.updates) == (3, 2)
    for key, value in gathered(engine).items():
        assert torch.equal(value, before[key]), key
    assert not engine.train_step(micro_batches(3, engine.mesh, 1)).skipped
    assert not torch.equal(gathered(engine)["weight/norm.weight"], before["weight/norm.weight"])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("policy", ["warn", "skip"])
def test_a_spike(stage, policy):
    config = make_config(zero={"stage": stage}, guard={"loss_spike": policy, "spike_factor": 2.0})
    engine = make_engine(config, Mesh.single(), phases=Phases(FaultInjector(parse("times10@0:loss_number:10"))))
    run(engine, 1, 9)
    before = gathered(engine)["weight/norm.weight"].clone()
    result = engine.train_step(micro_batches(9, engine.mesh, 1))
    assert result.spike and "times the median of the last 9" in result.problem
    assert result.skipped == (policy == "skip")
    assert torch.equal(gathered(engine)["weight/norm.weight"], before) == (policy == "skip")
    after = engine.train_step(micro_batches(10, engine.mesh, 1))
    assert not after.skipped and not after.spike


def test_spikes_that_do_not_end_stop_the_run():
    config = make_config(guard={"loss_spike": "skip", "spike_factor": 2.0, "max_skipped": 3})
    engine = make_engine(config, Mesh.single(), phases=Phases(FaultInjector(parse("times10@0:loss_number:10+"))))
    with pytest.raises(NonFinite, match="loss spike did not recover.*at most 3"):
        run(engine, 1, 20)
    assert engine.updates == 9


def test_an_overflow_is_not_a_skipped_spike():
    """An fp16 update that overflows at a spike, which is only to be reported, is skipped by the loss scaler."""
    precision = {"dtype": "fp16", "initial_scale_power": 30}
    config = make_config(precision=precision, guard={"loss_spike": "warn", "spike_factor": 2.0, "max_skipped": 1})
    engine = make_engine(config, Mesh.single())
    for _ in range(MIN_LOSSES):
        engine.updater.guard.accept(1e-3)
    results = [engine.train_step(micro_batches(step, engine.mesh, 1)) for step in range(3)]
    assert all(result.skipped and result.spike for result in results)
    assert engine.updater.guard.skipped == 0


@pytest.mark.parametrize("losses", [[0.0] * 8, [0.0] * 5 + [3.0] * 3, [-1.0] * 8])
def test_a_median_that_is_not_positive_measures_nothing(losses):
    one = guard(spike_factor=2.0)
    for loss in losses:
        one.accept(loss)
    assert not one.is_spike(5.0) and not one.is_spike(0.0)
    one.accept(math.nan)
    assert list(one.losses) == losses


def masked(batches, *ignored: int):
    """The batches, those with these numbers without a target."""
    return [
        dataclasses.replace(batch, targets=torch.full_like(batch.targets, -100)) if i in ignored else batch
        for i, batch in enumerate(batches)
    ]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_without_targets_changes_nothing(stage):
    """Neither decay nor momentum moves a weight, the guard's window stays, and the next step is that of a run
    without it.
    """
    config = make_config(zero={"stage": stage})
    mesh = Mesh.single()
    engines = [make_engine(config, mesh, accumulation=2) for _ in range(2)]
    one = engines[0]
    for engine in engines:
        run(engine, 2, 3)
    before = gathered(one)
    result = one.train_step(masked(micro_batches(3, mesh, 2), 0, 1))
    assert (
        math.isnan(result.loss)
        and result.skipped
        and result.tokens == 0
        and "no token" in result.problem
        and not result.spike
    )
    assert len(one.updater.guard.losses) == 3 and one.updater.guard.skipped == 0 and one.updates == 3 and one.step == 4
    after = gathered(one)
    assert before.keys() == after.keys() and all(torch.equal(value, before[name]) for name, value in after.items())
    partly = [engine.train_step(masked(micro_batches(4, mesh, 2), 0)) for engine in engines]
    assert partly[0].loss == partly[1].loss and partly[0].tokens > 0 and partly[0].grad_norm == partly[1].grad_norm


@pytest.mark.parametrize(("policy", "skips"), [("off", False), ("warn", False), ("skip", True), ("rollback", True)])
def test_which_policies_skip_a_spike(policy, skips):
    one = guard(loss_spike=policy, spike_factor=2.0)
    assert one.skips_spikes == skips
    for _ in range(MIN_LOSSES):
        one.accept(1.0)
    assert one.is_spike(9.0) == (policy != "off")


def test_skipped_updates_are_counted_in_a_row():
    """Both non-finite ones and spikes; the error is that of the last one, with all its parts."""
    one = guard(non_finite="skip", max_skipped=2)
    for _ in range(3):
        one.note_non_finite(NonFinite("a"))
        one.count_skipped(NonFinite("b"))
        assert one.skipped == 2
        one.accept(1.0)
        assert one.skipped == 0
    one.skipped = 2
    with pytest.raises(NonFinite) as caught:
        one.count_skipped(NonFinite("what", where="here", got="this", want="that", do="so"))
    parts = caught.value.parts()
    assert (parts["what"], parts["where"], parts["got"], parts["do"]) == ("what", "here", "this", "so")
    assert parts["want"] == "at most 2 steps skipped in a row (guard.max_skipped)"


def test_a_spike_alone_does_not_stop_a_run_that_stops_at_what_is_not_finite():
    one = guard(non_finite="stop", loss_spike="skip", max_skipped=1)
    one.count_skipped(NonFinite("a"))
    assert one.skipped == 1


def test_an_accepted_loss_that_is_not_finite_ends_the_row_and_is_no_loss():
    one = guard()
    one.skipped = 3
    one.accept(math.inf)
    assert (one.skipped, list(one.losses)) == (0, [])


def test_the_error_lists_the_samples_of_all_micro_batches_in_order():
    error = non_finite_error(
        "loss", math.nan, 7, [torch.tensor([9, 2]), torch.tensor([30]), torch.tensor([4])], Mesh.single()
    )
    assert error.what == "the loss is not finite"
    assert error.where == "rank 0: step 7"
    assert error.got == "nan, samples [2, 4, 9, 30]"
    assert error.exit_code == NonFinite("x").exit_code and "neox data which" in error.do


def test_the_median_of_an_even_number_of_losses_lies_between_two():
    one = guard(spike_factor=2.0, spike_window=8)
    for loss in (1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0):
        one.accept(loss)
    assert one.is_spike(4.01) and not one.is_spike(4.0)
    assert one.describe_spike(5.0) == "loss 5 is 2.5 times the median of the last 8"
