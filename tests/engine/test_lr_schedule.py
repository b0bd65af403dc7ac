"""Schedules against their closed forms, at and beyond their ends."""

import itertools
import math

import pytest

from neox.config.schema import OptimizerConfig, ScheduleConfig
from neox.engine.lr_schedule import LRSchedule, build_lr_schedule
from neox.parallel.mesh import Mesh
from tests.engine.toy import Stored, gathered, make_config, make_engine, micro_batches

PEAK, LOW = 3e-3, 3e-4


def schedule(kind, warmup=10, decay=110, cooldown=0):
    return LRSchedule(kind, PEAK, LOW, warmup, decay, cooldown)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd", "inverse_sqrt"])
def test_warmup_is_linear_from_zero_and_reaches_the_peak(kind):
    s = schedule(kind, cooldown=20)
    assert [s.learning_rate(n) for n in (1, 5, 9)] == pytest.approx([PEAK * 0.1, PEAK * 0.5, PEAK * 0.9])
    assert s.learning_rate(10) == pytest.approx(PEAK)


def test_linear():
    s = schedule("linear")
    assert s.learning_rate(60) == pytest.approx((PEAK + LOW) / 2)
    assert s.learning_rate(35) == pytest.approx(LOW + (PEAK - LOW) * 0.75)
    assert s.learning_rate(110) == LOW


def test_cosine():
    s = schedule("cosine")
    for n in (10, 11, 43, 60, 109, 110):
        assert s.learning_rate(n) == pytest.approx(
            LOW + (PEAK - LOW) * (1 + math.cos(math.pi * (n - 10) / 100)) / 2, rel=1e-12
        )


def test_wsd_is_flat_until_the_cooldown():
    s = schedule("wsd", cooldown=20)
    assert s.learning_rate(10) == s.learning_rate(50) == s.learning_rate(90) == PEAK
    assert s.learning_rate(100) == pytest.approx((PEAK + LOW) / 2)
    assert s.learning_rate(110) == pytest.approx(LOW)


def test_inverse_sqrt_and_its_floor():
    s = schedule("inverse_sqrt", decay=10**9)
    assert s.learning_rate(40) == pytest.approx(PEAK / 2)
    assert s.learning_rate(10**8) == LOW


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd", "inverse_sqrt", "constant"])
def test_clamped_after_the_end(kind):
    s = schedule(kind, cooldown=20)
    end = s.learning_rate(110)
    for n in (111, 150, 210, 211, 310, 10_000):
        assert s.learning_rate(n) == end
    if kind in ("linear", "cosine", "wsd"):
        assert end == pytest.approx(LOW)


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
def test_never_rises_after_warmup(kind):
    rates = [schedule(kind, cooldown=30).learning_rate(n) for n in range(10, 400)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates))


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd", "inverse_sqrt", "constant"])
def test_degenerate_lengths_stay_finite(kind):
    for warmup, decay in ((0, 1), (0, 2), (5, 5), (7, 5), (1, 1)):
        for n in range(1, 20):
            assert 0.0 <= schedule(kind, warmup, decay).learning_rate(n) <= PEAK


def test_without_warmup_the_first_step_is_near_the_peak():
    assert schedule("linear", warmup=0, decay=100).learning_rate(1) == pytest.approx(LOW + (PEAK - LOW) * 0.99)


def test_build_takes_the_length_of_the_run():
    s = build_lr_schedule(ScheduleConfig(type="cosine", min_lr=1e-5), OptimizerConfig(lr=1e-3), train_iters=50)
    assert (s.decay_iters, s.peak) == (50, 1e-3)
    assert s.learning_rate(50) == pytest.approx(1e-5)
    assert build_lr_schedule(ScheduleConfig(decay_iters=20), OptimizerConfig(), 50).decay_iters == 20


def test_gpt_neox_counts_updates_not_steps():
    rates = build_lr_schedule(
        ScheduleConfig(rule="gpt_neox", type="linear", warmup_iters=2.5, min_lr=1e-4),
        OptimizerConfig(lr=1e-3),
        train_iters=10,
    )
    assert [rates.learning_rate(n) for n in (1, 2, 3, 4)] == pytest.approx([4e-4, 4e-4, 8e-4, 1e-3 * (1 - 0.5 / 7.5)])
    assert rates.learning_rate(8, updates=3) == rates.learning_rate(4)
    assert rates.learning_rate(11) == rates.learning_rate(500) == 1e-4


def test_gpt_neox_cosine_rises_again():
    rates = build_lr_schedule(
        ScheduleConfig(rule="gpt_neox", type="cosine", decay_iters=10, min_lr=1e-4),
        OptimizerConfig(lr=1e-3),
        train_iters=20,
    )
    assert rates.learning_rate(11) == pytest.approx(1e-4)
    assert rates.learning_rate(21) == pytest.approx(1e-3)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_gpt_neox_with_nothing_to_decay_over_stays_finite(kind):
    rates = LRSchedule(kind, PEAK, LOW, 5.0, 5, rule="gpt_neox")
    assert rates.learning_rate(6) == PEAK and rates.learning_rate(7) == (PEAK if kind == "constant" else LOW)


def test_an_overflow_and_a_resume_do_not_move_gpt_neox_off_its_rule():
    """Losses that overflow in fp16: the scale starts far too high, and the first updates are skipped."""
    plan = {"rule": "gpt_neox", "type": "linear", "warmup_iters": 0.5, "decay_iters": 8}
    config = make_config(schedule=plan, precision={"dtype": "fp16", "initial_scale_power": 30})
    engine = make_engine(config, Mesh.single())

    def step() -> tuple[float, int]:
        updates = engine.updates
        return engine.train_step(micro_batches(engine.step, engine.mesh, 1)).lr, updates

    rows = [step()]
    while engine.updates < 3:
        rows.append(step())
    assert engine.step > engine.updates  # some did overflow
    state, tensors = engine.state_dict(), gathered(engine)
    engine = make_engine(config, Mesh.single())
    engine.restore(Stored(tensors, state))
    rows += [step() for _ in range(2)]
    assert rows[-1][1] == 4
    peak = config.optimizer.lr
    assert [rate for rate, _ in rows] == pytest.approx(
        [2 * peak if updates == 0 else peak * (8 - updates) / 7.5 for _, updates in rows]
    )


# schedule, step -> the share of the way from LOW to PEAK (rates below LOW are negative), by the formulas of the module
POINTS = [
    (("constant", 10, 110), 1, 0.1 * PEAK),
    (("constant", 0, 110), 1, PEAK),
    (("constant", 10, 110), 5000, PEAK),
    (("linear", 10, 110), 9, 0.9 * PEAK),
    (("linear", 10, 110), 10, PEAK),
    (("linear", 10, 110), 11, LOW + 0.99 * (PEAK - LOW)),
    (("linear", 10, 110), 109, LOW + 0.01 * (PEAK - LOW)),
    (("linear", 10, 110), 110, LOW),
    (("linear", 0, 4), 1, LOW + 0.75 * (PEAK - LOW)),
    (("linear", 5, 5), 4, 0.8 * PEAK),
    (("linear", 5, 5), 5, LOW),
    (("linear", 7, 5), 6, 6 / 7 * PEAK),
    (("linear", 7, 5), 7, LOW),
    (("cosine", 10, 110), 35, LOW + (PEAK - LOW) * (1 + math.sqrt(0.5)) / 2),
    (("cosine", 10, 110), 60, LOW + 0.5 * (PEAK - LOW)),
    (("cosine", 10, 110), 85, LOW + (PEAK - LOW) * (1 - math.sqrt(0.5)) / 2),
    (("cosine", 10, 110), 310, LOW),
    (("wsd", 10, 110, 20), 9, 0.9 * PEAK),
    (("wsd", 10, 110, 20), 91, LOW + 0.95 * (PEAK - LOW)),
    (("wsd", 10, 110, 20), 109, LOW + 0.05 * (PEAK - LOW)),
    (("wsd", 10, 110, 0), 109, PEAK),  # no cooldown: a step
    (("wsd", 10, 110, 0), 110, LOW),
    (("wsd", 10, 110, 100), 60, LOW + 0.5 * (PEAK - LOW)),
    (("wsd", 60, 110, 100), 85, LOW + 0.5 * (PEAK - LOW)),  # the cooldown begins after the warmup
    (("wsd", 60, 110, 100), 59, 59 / 60 * PEAK),
    (("inverse_sqrt", 10, 10**9), 10, PEAK),
    (("inverse_sqrt", 10, 10**9), 1000, PEAK / 10),
    (("inverse_sqrt", 0, 10**9), 1, PEAK),
    (("inverse_sqrt", 0, 10**9), 4, PEAK / 2),
    (("inverse_sqrt", 10, 10**9), 10 * 101, LOW),
    (("inverse_sqrt", 10, 10**9), 10 * 99, PEAK / math.sqrt(99)),
    (("inverse_sqrt", 10, 40), 90, PEAK / 2),  # constant after the end
]


@pytest.mark.parametrize(("plan", "step", "rate"), POINTS, ids=str)
def test_rates_at_the_borders(plan, step, rate):
    assert schedule(*plan).learning_rate(step) == pytest.approx(rate, rel=1e-12)
    assert schedule(*plan).learning_rate(step, updates=0) == pytest.approx(rate, rel=1e-12), "updates do not matter"


GPT_NEOX = [  # kind, warmup, decay, updates -> rate, by megatron/learning_rates.py with end_lr as LOW
    ("linear", 4, 12, 0, PEAK / 4),
    ("linear", 4, 12, 1, PEAK / 4),
    ("linear", 4, 12, 2, PEAK / 2),
    ("linear", 4, 12, 4, PEAK),
    ("linear", 4, 12, 5, PEAK * 7 / 8),
    ("linear", 4, 12, 11, PEAK / 8),
    ("linear", 4, 12, 12, LOW),
    ("linear", 0, 10, 0, PEAK),
    ("linear", 0, 10, 1, PEAK * 0.9),
    ("cosine", 0, 10, 0, PEAK),
    ("cosine", 4, 12, 6, LOW + (PEAK - LOW) * (1 + math.sqrt(0.5)) / 2),
    ("cosine", 4, 12, 8, (PEAK + LOW) / 2),
    ("cosine", 4, 12, 12, LOW),
    ("cosine", 4, 12, 16, (PEAK + LOW) / 2),
    ("constant", 4, 12, 3, PEAK * 0.75),
    ("constant", 4, 12, 5, PEAK),
    ("constant", 0, 12, 0, PEAK),
    ("linear", 0.5, 10.5, 0, PEAK * 2),
    ("linear", 0.5, 10.5, 1, PEAK * 0.95),
]


@pytest.mark.parametrize(("kind", "warmup", "decay", "updates", "rate"), GPT_NEOX)
def test_gpt_neox_at_the_borders(kind, warmup, decay, updates, rate):
    one = LRSchedule(kind, PEAK, LOW, warmup, decay, rule="gpt_neox")
    assert one.learning_rate(updates + 1) == pytest.approx(rate, rel=1e-12)
    assert one.learning_rate(99, updates) == pytest.approx(rate, rel=1e-12)


def test_build_passes_every_key():
    config = ScheduleConfig(type="wsd", rule="native", warmup_iters=3, decay_iters=40, cooldown_iters=7, min_lr=2e-5)
    assert build_lr_schedule(config, OptimizerConfig(lr=5e-4), 100) == LRSchedule("wsd", 5e-4, 2e-5, 3, 40, 7, "native")
    config = ScheduleConfig(type="linear", rule="gpt_neox", warmup_iters=1.5)
    assert build_lr_schedule(config, OptimizerConfig(lr=5e-4), 100) == LRSchedule(
        "linear", 5e-4, 0.0, 1.5, 100, 0, "gpt_neox"
    )
