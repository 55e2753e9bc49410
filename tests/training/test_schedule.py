"""Learning rates over a run, by hand."""

import pytest

from rwkv_rlhf.training.schedule import Schedule


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.2e-3), (5, 0.6e-3), (10, 1e-3), (60, (1e-3 * 1e-5) ** 0.5), (110, 1e-5), (500, 1e-5)]
)
def test_schedule_by_hand(step, rate):
    """If this breaks, the learning rate is not the documented one at the ends, in warm-up, or half-way."""
    assert Schedule(warmup=10, total=110).rate(step, 1e-3, 1e-5) == pytest.approx(rate)


@pytest.mark.parametrize(("kind", "half"), [("linear", 0.55e-3), ("cosine", 0.55e-3), ("constant", 1e-3)])
def test_other_schedules_half_way(kind, half):
    """If this breaks, --lr_schedule does something else than its name."""
    assert Schedule(0, 100, kind).rate(50, 1e-3, 1e-4) == pytest.approx(half)
    assert Schedule(0, 100).rate(50, 1e-3, 0.0) == pytest.approx(0.5e-3)  # an end at 0 is a straight line
