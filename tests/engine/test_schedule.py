"""Schedules against their closed forms, at and beyond their ends."""

import itertools
import math

import pytest

from neox.config.schema import OptimizerConfig, ScheduleConfig
from neox.engine.schedule import Schedule, build_schedule

PEAK, LOW = 3e-3, 3e-4


def schedule(kind, warmup=10, decay=110, cooldown=0):
    return Schedule(kind, PEAK, LOW, warmup, decay, cooldown)


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
        assert s.learning_rate(n) == pytest.approx(LOW + (PEAK - LOW) * (1 + math.cos(math.pi * (n - 10) / 100)) / 2, rel=1e-12)


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
    s = build_schedule(ScheduleConfig(type="cosine", min_lr=1e-5), OptimizerConfig(lr=1e-3), train_iters=50)
    assert (s.decay_iters, s.peak) == (50, 1e-3)
    assert s.learning_rate(50) == pytest.approx(1e-5)
    assert build_schedule(ScheduleConfig(decay_iters=20), OptimizerConfig(), 50).decay_iters == 20
