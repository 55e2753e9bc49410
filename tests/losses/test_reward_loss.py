"""The loss of reward models against its formula, worked out from single hidden states in float64."""

import pytest
import torch

from rwkv_rlhf.losses import LOSSES
from rwkv_rlhf.losses.reward import answer_scores
from rwkv_rlhf.ops.starts import Starts
from tests.support.loss_cases import ANSWERS, MARGINS, STARTS, config, head_and_hidden, judged_batch, scalar_head


@pytest.mark.parametrize("centring", [0.0, 0.3])
@pytest.mark.parametrize("margin", [False, True])
def test_formula(margin, centring):
    """sum over pairs of -log sigmoid(r_c - r_r - m) + centring (r_c + r_r)^2, r = w . hidden of an answer's last token.

    Any other token, or a margin of the wrong sign, trains a judge of something else.
    """
    scalar = scalar_head("rm")
    head, hidden = head_and_hidden(len(ANSWERS))
    r = [(hidden[end - 1] * scalar.weight[0]).sum() for end in STARTS[1:].tolist()]
    truth = 0.0
    for pair in range(2):
        ahead = r[2 * pair] - r[2 * pair + 1] - (MARGINS[pair] if margin else 0)
        truth = truth - (1 / (1 + (-ahead).exp())).log() + centring * (r[2 * pair] + r[2 * pair + 1]) ** 2
    chosen = config(loss="rm", rm_margin=margin, rm_centring=centring)
    found, metrics = LOSSES["rm"].from_hidden(head, hidden, judged_batch(), chosen, scalar)
    torch.testing.assert_close(found, truth)
    inputs = (scalar.weight, hidden)
    for a, b in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(truth, inputs)):
        torch.testing.assert_close(a, b)
    want = {"loss": truth, "chosen_reward": r[0] + r[2], "reject_reward": r[1] + r[3]}
    want |= {"reward_margin": r[0] - r[1] + r[2] - r[3]}
    for name, value in want.items():
        torch.testing.assert_close(metrics[name], value.detach())
    assert float(metrics["accuracy"]) == float(r[0] > r[1]) + float(r[2] > r[3])


def test_a_new_head_prefers_nothing():
    """Zero at first: rewards of 0, an accuracy of one half, a loss of log 2 a pair, whatever the seed."""
    scalar = scalar_head("rm")
    torch.nn.init.zeros_(scalar.weight)
    _, metrics = LOSSES["rm"].from_hidden(*head_and_hidden(len(ANSWERS)), judged_batch(), config(loss="rm"), scalar)
    assert float(metrics["accuracy"]) == 1.0 and float(metrics["reward_margin"]) == 0
    assert float(metrics["loss"]) == pytest.approx(2 * 0.6931471805599453)


def test_the_score_is_that_of_the_last_token():
    """By hand: segments of 2, 1 and 3 tokens."""
    assert answer_scores(torch.arange(6.0), Starts([0, 2, 3, 6])).tolist() == [1.0, 2.0, 5.0]
