"""The controller of the KL penalty, against the published rule worked out by hand."""

import pytest

from rwkv_rlhf.rl.kl import KLController, moved_too_far


@pytest.mark.parametrize(
    "kl,coef",
    [
        (6.0, 0.2),  # on target
        (6.6, 0.2 * (1 + 0.1 * 256 / 10000)),  # 10% above it
        (60.0, 0.2 * (1 + 0.2 * 256 / 10000)),  # far above: 20% counts
        (0.0, 0.2 * (1 - 0.2 * 256 / 10000)),
    ],
)
def test_weight_follows_the_target(kl, coef):
    """A controller with the wrong sign or without its clip lets the policy run away within a few rollouts."""
    controller = KLController(0.2, target=6.0, horizon=10000)
    controller.update(kl, 256)
    assert controller.coef == pytest.approx(coef, rel=1e-12)


def test_fixed_weight_stays():
    """--adap_kl_ctrl 0 promises one weight from the first rollout to the last."""
    controller = KLController(0.05, adaptive=False)
    controller.update(100.0, 256)
    assert controller.coef == 0.05


def test_passes_end_at_one_and_a_half_targets():
    """--early_stopping ends the passes above 1.5 * --target_kl, not at it."""
    assert not moved_too_far(0.15, 0.1)
    assert moved_too_far(0.1501, 0.1)
