"""Schedules by their formulas, at their edges, and as functions of the step alone."""

import math
import pickle

import pytest

from movae_fast.schedules import (
    Capacity,
    Cycles,
    LearningRate,
    LossSchedule,
    Stages,
    annealing_by_epoch,
    restarted,
)


def test_the_schedule_of_stages():
    stages = Stages(1, 3, steps=10, fade_in=4, pre_kl=0.5)
    assert [stages.stage(s) for s in (0, 9, 10, 19, 20, 29)] == [1, 1, 2, 2, 3, 3]
    assert [stages.alpha(s) for s in (0, 9, 10, 11, 13, 14, 19, 20)] == [1, 1, 0, 0.25, 0.75, 1, 1, 0]
    assert [s for s in range(31) if stages.ends(s)] == [10, 20, 30]
    assert [s for s in range(30) if stages.starts(s)] == [0, 10, 20]
    alone = Stages(2, 2, steps=10, fade_in=4, pre_kl=0.5)
    assert (alone.stage(7), alone.alpha(1), alone.ends(10)) == (2, 0.25, True)
    assert Stages(1, 3, 10, 0, 0.5).alpha(10) == 1.0


def test_cyclic_annealing():
    linear = Cycles("linear", steps=40, cycles=4, least=0.1, most=1.0, ratio=0.5)
    assert [linear(s) for s in (0, 5, 9, 10, 45)] == pytest.approx([0.1, 1.0, 1.0, 0.1, 1.0])
    assert linear(1) == pytest.approx(0.1 + 0.9 / 5)
    cosine = Cycles("cosine", 40, 4, 0.0, 2.0, 1.0)
    assert [cosine(s) for s in (0, 5, 8)] == pytest.approx([0, 1, 1 - math.cos(0.8 * math.pi)])
    sigmoid = Cycles("sigmoid", 40, 4, 0.0, 1.0, 1.0)
    assert [sigmoid(s) for s in (0, 5)] == pytest.approx([1 / (1 + math.exp(6)), 0.5])


def test_a_ladder_s_total_is_that_of_its_stages():
    assert Stages(1, 3, 10, 4, 0.5).total == 30
    assert Stages(2, 2, 10, 4, 0.5).total == 10


def test_capacity_grows_to_its_greatest_and_stays():
    capacity = Capacity(25.0, 100)
    assert [capacity(s) for s in (0, 50, 100, 101, 10**9)] == [0.0, 12.5, 25.0, 25.0, 25.0]


def test_the_dimension_wise_kl_s_factor_begins_above_zero():
    assert [LossSchedule(4).dwkl_factor(s) for s in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert [LossSchedule(n).dwkl_factor(0) for n in (0, 1)] == [1.0, 1.0]  # nothing to wait for


def test_a_restarted_schedule_is_whole_in_every_stage():
    rate = LearningRate("cosine", steps=10, warmup=3)
    again = restarted(rate, 10)
    assert [again(s) for s in range(30)] == 3 * [rate(s) for s in range(10)]


def test_epochs_of_annealing_begin_anew_with_a_stage():
    for kind in ("monotonic", "cyclic"):
        factor = annealing_by_epoch(kind, steps=41, steps_per_epoch=2)
        values = [factor(s) for s in range(123)]
        assert values == 3 * values[:41]
        assert [values[s] for s in range(0, 40, 2)] == [values[s] for s in range(1, 41, 2)]
        assert (min(values), max(values)) == (0.0, 1.0)


@pytest.mark.parametrize(
    "schedule",
    [
        LearningRate("cosine", 20, warmup=4, unit=2, least=0.1),
        LearningRate("multi_step", 20, milestones=(5, 12), gamma=0.3),
        LearningRate("none", 20),
        Cycles("sigmoid", 20, 3, 0.0, 1.0, 0.7),
        Capacity(2.0, 7),
        LossSchedule(7).dwkl_factor,
        Stages(1, 3, 7, 3, 0.5).alpha,
        Stages(1, 3, 7, 3, 0.5).stage,
    ],
    ids=str,
)
def test_a_schedule_remembers_nothing(schedule):
    """Asked backwards, twice, or after a restart from a pickle, the step alone decides."""
    forwards = [schedule(s) for s in range(25)]
    assert [schedule(s) for s in reversed(range(25))] == forwards[::-1]
    assert [pickle.loads(pickle.dumps(schedule))(s) for s in range(25)] == forwards
    assert all(math.isfinite(value) for value in forwards)
