"""Learning rates over a run, by hand."""

import pytest

from rwkv_rlhf.data.sampler import Sequential, Steps
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.training.choices import with_pass
from rwkv_rlhf.training.length import optimizer_steps, schedule_of
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


@pytest.mark.parametrize(
    ("initial", "final", "half"), [(0.1, 0.001, 0.01), (0.1, 0.0, 0.05), (0.1, -1.0, 0.1), (0.0, 0.1, 0.0)]
)
def test_weight_decay_half_way(initial, final, half):
    """If this breaks, --weight_decay_final is not RWKV-LM's formula, or what has no decay gets one."""
    schedule = Schedule(warmup=10, total=110, kind="cosine")
    assert [schedule.decay(step, initial, final) for step in (0, 5, 10)] == [initial] * 3
    assert schedule.decay(60, initial, final) == pytest.approx(half)
    assert schedule.decay(500, initial, final) == pytest.approx(final if final >= 0 and initial else initial)


def test_the_schedule_of_rwkv_lm_by_hand():
    """A command of RWKV-LM trains at its rates: cosine over all tokens, and a warm-up of this run's own steps."""
    first, later = Schedule(10, 110, "rwkv-lm"), Schedule(10, 110, "rwkv-lm", offset=60)
    assert first.rate(0, 6e-4, 6e-5) == pytest.approx(6e-6)
    assert first.rate(5, 6e-4, 6e-5) == pytest.approx(6e-4 * (0.01 + 0.99 * 0.5))
    assert first.rate(10, 6e-4, 6e-5) == pytest.approx(6e-4)
    assert first.rate(60, 6e-4, 6e-5) == pytest.approx(3.3e-4)
    assert first.rate(110, 6e-4, 6e-5) == first.rate(999, 6e-4, 6e-5) == pytest.approx(6e-5)
    assert later.rate(0, 6e-4, 6e-5) == pytest.approx(0.01 * 3.3e-4) and later.rate(50, 6e-4, 6e-5) == pytest.approx(
        6e-5
    )
    assert Schedule(-1, 100, "rwkv-lm").rate(0, 1e-3, 1e-4) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("words", "epochs", "steps"),
    [
        ({"epochs": 3.0}, [3, 3], 9),  # 10 examples, 4 to a step: a pass is 3 steps
        ({"epochs": 0.5}, [3, 1], 2),
        ({"epochs": 2.0, "save_steps": 4}, [4, 2], 6),
    ],
)
def test_a_run_of_so_many_passes(words, epochs, steps):
    """If this breaks, --epochs trains too long or too short, or a mini-epoch is not what a save counts."""
    examples = Steps([0] * 10, Sequential(10), 2, 2)
    config = Config(micro_bsz=2, accumulate_grad_batches=2, loss="dpo", given=frozenset(words), **words)
    config = with_pass(config, examples)
    assert [config.steps_per_epoch, config.epoch_count] == epochs
    assert optimizer_steps(config, examples) == steps == schedule_of(config, examples).total
