"""Losses of scores that one can work out by hand, and of scores at the edge of what floating point holds."""

import math

import pytest
import torch
from torch import nn

from rwkv_rlhf.data.batch import IGNORE
from rwkv_rlhf.losses import LOSSES
from rwkv_rlhf.losses.dpo import dpo
from rwkv_rlhf.losses.orpo import log1mexp, log_odds
from rwkv_rlhf.losses.pairs import AnswerValues, PairScores, pair_metrics, pair_scores
from rwkv_rlhf.losses.sft import sft
from rwkv_rlhf.losses.tokens import RequiredStats, TokenScores, token_scores, weighted_nll
from tests.support.loss_cases import (
    TEXT,
    V,
    config,
    head_and_hidden,
    pair_batch,
    rated_batch,
    same_as,
    scored_answers,
    text_batch,
)


def test_kto_by_hand():
    """beta 0.5, z = 1, r = 3 and -1: both are 1 on their side of z in rewards, each loss 1 - sigmoid(1) = 0.268941.

    Rewards 1.5 and -0.5 are 2 apart, log-ratios 4 nats. The metrics are sums over two answers."""
    scores, targets, starts = scored_answers((-4.0, 2), (-5.0, 1))
    batch = rated_batch(1.0, targets, starts, torch.tensor([-7.0, -4.0]), (True, False))
    value, metrics = LOSSES["kto"](scores, batch, config(kto_beta=0.5, kto_undesirable_weight=2.0))
    assert value.item() == pytest.approx(3 * 0.268941, abs=1e-5)
    want = {"accuracy": 2, "reward_margin": 4, "logp_margin": 8, "chosen_reward": 3, "reject_reward": -1}
    want |= {"chosen_logp": -8, "reject_logp": -10, "kto_kl": 2}
    assert {key: metrics[key].item() for key in want} == pytest.approx(want)


def test_kto_of_good_answers_alone_knows_no_margin():
    """A step without a bad answer has no mean over bad answers: a 0 in its place would be a margin that nobody has."""
    scores, targets, starts = scored_answers((-4.0, 2), (-5.0, 1))
    batch = rated_batch(1.0, targets, starts, torch.tensor([-7.0, -4.0]), (True, True))
    metrics = LOSSES["kto"](scores, batch, config(kto_beta=0.5)).metrics
    assert metrics["chosen_reward"].item() == pytest.approx(1.0) and metrics["accuracy"].item() == 1
    assert not {"reject_reward", "reject_logp", "reward_margin", "logp_margin"} & set(metrics)


def by_hand(name, reference=None, chosen=(-10.0, 4), reject=(-14.0, 7), **settings):
    """The loss of one pair: -10 nats over 4 tokens against -14 over 7, or others."""
    scores, targets, starts = scored_answers(chosen, reject)
    return LOSSES[name](scores, pair_batch(targets, starts, reference), config(**settings))


def test_simpo_by_hand():
    """Means -2.5 and -2, beta 2, gamma 1: -log sigmoid(-5 + 4 - 1) = log(1 + e^2)."""
    value, metrics = by_hand("simpo")
    assert value.item() == pytest.approx(math.log(1 + math.exp(2)), abs=1e-6)
    assert metrics["accuracy"].item() == 0 and metrics["reward_margin"].item() == pytest.approx(-1.0)


def test_dpo_by_hand():
    """h = (-10 - -14) - (-11 - -13) = 2; beta 0.5: -log sigmoid(1) = log(1 + 1/e) = 0.31326; rewards 0.5 and -0.5.
    CE(chosen) = 10 / 4 = 2.5, so the sum is 0.31326 + 0.1 * 2.5 = 0.56326."""
    value, metrics = by_hand("dpo", torch.tensor([[-11.0, -13.0]]), dpo_beta=0.5, dpo_alpha=0.1)
    assert value.item() == pytest.approx(math.log(1 + math.exp(-1)) + 0.25, abs=1e-6)
    want = {"accuracy": 1, "reward_margin": 1, "chosen_reward": 0.5, "reject_reward": -0.5, "ce": 2.5}
    want |= {"chosen_logp": -10, "reject_logp": -14, "logp_margin": 2, "logp_accuracy": 1, "raw_accuracy": 1}
    assert {key: metrics[key].item() for key in want} == pytest.approx(want)


def test_ipo_by_hand():
    """Over 4 and 7 tokens: h = (-10 + 11) / 4 - (-14 + 13) / 7 = 1/4 + 1/7, to be driven to 1 / (2 * 0.5) = 1."""
    settings = {"dpo_beta": 0.5, "dpo_alpha": 0.0, "dpo_loss": "ipo"}
    value, metrics = by_hand("dpo", torch.tensor([[-11.0, -13.0]]), **settings)
    assert value.item() == pytest.approx((1 / 4 + 1 / 7 - 1) ** 2, abs=1e-6)
    assert metrics["reward_margin"].item() == pytest.approx(0.5 * (1 / 4 + 1 / 7))
    assert metrics["logp_margin"].item() == pytest.approx(2)  # nats of whole answers, whatever the loss is about


def test_orpo_by_hand():
    """P_c = 1/2 and P_r = 1/4 have odds 1 and 1/3: -log sigmoid(log 3) = log(4/3); CE = log 2."""
    answers = {"chosen": (3 * math.log(0.5), 3), "reject": (2 * math.log(0.25), 2)}
    value, metrics = by_hand("orpo", **answers, orpo_alpha=0.5)
    assert value.item() == pytest.approx(math.log(2) + 0.5 * math.log(4 / 3), abs=1e-6)
    assert metrics["reward_margin"].item() == pytest.approx(math.log(3), abs=1e-5)


def test_scores_in_a_file_do_not_judge_a_loss_without_a_reference():
    """A .save holds some model's scores: ORPO trains the same with them as without, and says so."""
    reference = torch.tensor([[-1.0, -50.0]])
    known, unknown = (by_hand("orpo", given) for given in (reference, None))
    assert torch.equal(known.value, unknown.value) and known.metrics == unknown.metrics
    assert not {"logp_margin", "logp_accuracy", "raw_accuracy"} & set(known.metrics)


def test_sft_by_hand():
    """log p = -1 and -3, mean log p = -2 and -5, eps 0.1: 0.9 * 4 + 0.1 * 7 = 4.3."""
    scores = TokenScores(torch.tensor([-1.0, 0.0, -3.0]), torch.tensor([-2.0, 0.0, -5.0]), None)
    value, _ = LOSSES["sft"](scores, text_batch(torch.zeros(3, dtype=torch.int64)), config(smoothing=0.1))
    assert value.item() == pytest.approx(4.3)


def test_untrained_policy_has_accuracy_one_half():
    """At step 0 policy = reference: no pair may count as won or lost."""
    equal = torch.tensor([1.0, -2.0, 3.0, 0.0])
    scores = PairScores(equal, equal, torch.ones(4), torch.ones(4))
    nearly = pair_metrics(scores, AnswerValues(equal, equal + torch.tensor([0.0, 5e-7, 0.0, -5e-7])))
    assert nearly["accuracy"].item() == 2.0
    decided = pair_metrics(scores, AnswerValues(equal + torch.tensor([1e-3, -1e-3, 0.0, 1.0]), equal))
    assert decided["accuracy"].item() == 2.5


def test_orpo_survives_certainty_and_impossibility():
    """p -> 1 made log(1 - p) infinite, summed scores of -1000 underflow: values and gradients stay finite."""
    for value in (0.0, -1e-9, -1e-6, -1e-3, -0.69, -0.70, -50.0, -1000.0):
        x = torch.tensor([value], requires_grad=True)
        odds = log_odds(x)
        odds.sum().backward()
        assert torch.isfinite(odds).all() and torch.isfinite(x.grad).all()
        if value <= -1e-6:
            want = value - math.log(-math.expm1(value))
            assert odds.item() == pytest.approx(want, rel=1e-6, abs=1e-6)
    x = torch.linspace(-30, -1e-3, 200, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log1mexp, (x,))


def test_long_answers_are_summed_in_float32():
    """900 tokens of bfloat16 states: summed in bfloat16 the score is off by nats (trap 4), here by none."""
    count, width, vocabulary = 900, 16, 300
    head = nn.Linear(width, vocabulary, bias=False).bfloat16()
    hidden = torch.randn(count, width).bfloat16()
    targets = torch.randint(vocabulary, (count,))
    logp = token_scores(head, hidden, targets, head_chunk=128).logp
    found = pair_scores(
        torch.cat([logp, logp[:1]]), torch.cat([targets, targets[:1]]), torch.tensor([0, count, count + 1])
    )
    exact = head(hidden).double().log_softmax(1).gather(1, targets[:, None]).sum()
    assert found.chosen_sum.dtype == torch.float32
    assert abs(found.chosen_sum.double() - exact).item() < 1e-3
    low = torch.zeros((), dtype=torch.bfloat16)
    for value in logp.bfloat16():
        low = low + value
    assert abs(low.double() - exact).item() > 1.0


def test_pair_scores_keep_answers_apart():
    """If this breaks, tokens of one answer count for its neighbour."""
    logp = torch.tensor([-1.0, 0.0, -2.0, -4.0, -8.0, -16.0, -32.0], requires_grad=True)
    targets = torch.tensor([5, IGNORE, 0, 1, 1, 2, 0])
    scores = pair_scores(logp, targets, torch.tensor([0, 3, 4, 6, 7]))
    assert scores.chosen_sum.tolist() == [-3.0, -24.0] and scores.reject_sum.tolist() == [-4.0, -32.0]
    assert scores.chosen_count.tolist() == [2, 2] and scores.reject_count.tolist() == [1, 1]
    (scores.chosen_sum @ torch.tensor([1.0, 2.0]) + scores.reject_sum @ torch.tensor([3.0, 4.0])).backward()
    assert logp.grad.tolist() == [1, 1, 1, 3, 2, 2, 4]
    empty = pair_scores(logp[:3], targets[:3], torch.tensor([0, 3, 3]))
    assert empty.reject_sum.item() == 0 and empty.reject_mean.item() == 0


def test_three_products_give_the_same_as_four():
    """SFT's short path against token scores and the plain sum, in float32 as in training."""
    head, hidden = head_and_hidden(len(TEXT), torch.float32)
    scores = token_scores(head, hidden, TEXT, RequiredStats(mean=True, max=True), head_chunk=3)
    plain = sft(scores.logp, scores.mean_logp, smoothing=0.1).sum()
    truth = plain + 0.5e-4 * scores.max_logit.square().sum()
    found = weighted_nll(head, hidden, TEXT, head_chunk=3, smoothing=0.1, l2wrap_weight=0.5e-4)
    same_as(found.value, truth, head, hidden)


def test_float16_gradients_profit_from_the_loss_scale():
    """The gradient of an unlikely token is below float16's smallest number; scaled by 2^16 it is not."""
    head = nn.Identity()
    hidden = torch.zeros(1, V, dtype=torch.float16)
    hidden[0, 0] = 20.0
    hidden.requires_grad_()
    value, _ = LOSSES["sft"].from_hidden(head, hidden, text_batch(torch.tensor([0])), config(l2wrap=False))
    (value * 65536).backward()
    assert hidden.grad[0, 1].item() == pytest.approx(65536 * math.exp(-20.0), rel=1e-2)


def test_mistakes_are_named():
    """If this breaks, a value that makes no loss is not told with its flag."""
    h = torch.zeros(2)
    for arguments, flag in (((0.1, "sigmoyd"), "--dpo_loss"), ((0.0,), "--dpo_beta")):
        with pytest.raises(ValueError, match=flag):
            dpo(h, *arguments)
    with pytest.raises(ValueError, match="--dpo_label_smoothing"):
        dpo(h, 0.1, "robust", 0.5)
    with pytest.raises(ValueError, match="--orpo_mode"):
        LOSSES["orpo"].rewards(PairScores(h - 1, h - 2, h + 1, h + 1), None, config(orpo_mode="median"))
