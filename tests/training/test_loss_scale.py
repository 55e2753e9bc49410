"""Half precision: the loss is scaled as torch.amp.GradScaler would, and a step that overflows changes nothing."""

import torch
from torch import nn

from rwkv_rlhf.training import loss_scale
from rwkv_rlhf.training.loss_scale import LossScale


def test_the_scale_moves_as_pytorchs_does(monkeypatch):
    """If this breaks, runs in fp16 overflow again and again, or lose small gradients for good."""
    monkeypatch.setattr(loss_scale, "STEPS", 3)
    judge = torch.amp.GradScaler("cpu", growth_interval=3)
    p = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([p], lr=0.1)
    ours = LossScale()
    for good in map(int, "1111110110010001111111"):
        judge.scale(p.sum() * (1.0 if good else torch.inf)).backward()
        if good:
            ours.took_step()
        else:
            assert ours.overflowed()
        judge.step(optimizer)
        judge.update()
        optimizer.zero_grad()
        assert (ours.scale, ours.good) == (judge.get_scale(), judge._get_growth_tracker())
    assert ours.overflows == 6
    again = LossScale()
    again.load_state_dict(ours.state_dict())
    assert vars(again) == vars(ours)


def test_unscaling_is_exact():
    """If this breaks, the gradient that is clipped and logged is not the gradient of the loss."""
    ours, grads = LossScale(), [torch.randn(5), torch.randn(2, 3)]
    scaled = [grad * ours.scale for grad in grads]
    ours.unscale_(scaled)
    ours.unscale_([])  # of a step whose loss was no number
    assert all(torch.equal(*pair) for pair in zip(grads, scaled, strict=True))


def test_a_scale_that_helps_no_more_is_told():
    """If this breaks, a run whose gradient is no number goes on for ever without learning."""
    ours = LossScale()
    assert [ours.overflowed() for _ in range(31)] == [True] * 29 + [False] * 2
