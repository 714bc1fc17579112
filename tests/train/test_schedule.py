from itertools import pairwise

import pytest

from sparsemoe.train.schedule import TimeBudget, learning_rate_factor


def test_warms_up_then_falls_to_the_end():
    factors = [learning_rate_factor(s, 100, 10, 0.1) for s in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(1.0) == factors[10]
    assert all(a < b for a, b in pairwise(factors[:10]))
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert factors[55] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)
    assert learning_rate_factor(200, 100, 10, 0.1) == pytest.approx(0.1)


def test_edges():
    assert learning_rate_factor(0, 10, 0, 0.0) == 1.0
    assert learning_rate_factor(50, None, 10, 0.1) == 1.0
    assert learning_rate_factor(5, 5, 5, 0.1) == 1.0


def run(step_seconds, deadline: float) -> tuple[int, float, list]:
    """Steps of a pretended run, its end on the pretended clock, and its estimates."""
    now = 0.0
    budget = TimeBudget(deadline, skip=5, clock=lambda: now)
    totals, step = [], 0
    while not totals or totals[-1] is None or step < totals[-1]:
        now += step_seconds(step)
        step += 1
        totals.append(budget.total_steps(step))
    return step, now, totals


def test_budget_holds_as_many_steps_as_fit():
    step, now, totals = run(lambda step: 3.0 if step < 5 else 0.5, deadline=100.0)
    assert totals[:5] == [None] * 5
    assert 99 < now <= 100 and step == 175
    assert set(totals[6:]) <= {174, 175, 176}


def test_budget_follows_a_machine_that_slows_down():
    step, now, totals = run(lambda step: 0.1 if step < 300 else 0.4, deadline=100.0)
    assert 99 < now < 101
    assert totals[20] > 900 and step == totals[-1] < 600


def test_budget_that_is_over_at_once():
    assert run(lambda step: 10.0, deadline=1.0)[0] == 1
