"""Each loss against its published formula, written out here from raw logits in float64, values and gradients.

Legend: T tokens, n pairs, A answer tokens, C width, V vocabulary.
"""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from src.losses import LOSSES, step_loss
from src.losses.dpo import dpo
from src.losses.orpo import log1mexp, log_odds
from src.losses.pairs import PairScores, pair_scores, preference_metrics
from src.losses.tokens import IGNORE, TokenScores, token_scores, weighted_nll

C, V = 5, 11
CHUNKS = (1, 3, 1000)
# chosen_0 (one token not trained), reject_0, chosen_1, reject_1 (a single token); token 0 is a real token.
STARTS = torch.tensor([0, 4, 6, 11, 12])
ANSWERS = torch.tensor([3, IGNORE, 0, 7, 10, 0, 1, 2, 3, 4, 0, 9])
TEXT = torch.tensor([3, IGNORE, 0, 7, 10, 0, IGNORE, 2])
REFERENCE = torch.tensor([[-7.0, -5.5], [-11.0, -2.0]], dtype=torch.float64)
PAIR_LOSSES = sorted(name for name, loss in LOSSES.items() if loss.kind == "pairs")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def head_and_hidden(rows, dtype=torch.float64):
    return nn.Linear(C, V, bias=False, dtype=dtype), torch.randn(rows, C, dtype=dtype, requires_grad=True)


def config(**changes):
    """The settings that losses read, at the program's defaults."""
    values = {
        "head_chunk": 1024,
        "l2wrap": None,
        "smoothing": 0.0,
        "dpo_beta": 0.01,
        "dpo_alpha": 0.1,
        "dpo_loss": "sigmoid",
        "dpo_logp": "sum",
        "dpo_label_smoothing": 0.0,
        "orpo_alpha": 0.01,
        "orpo_mode": "mean",
        "temperature": 2.0,
        "alpha": 0.5,
        "kd": "forward",
        "kd_tail": True,
        "simpo_alpha": 0.0,
        "simpo_beta": 2.0,
        "simpo_gamma": 1.0,
        "cpo_alpha": 1.0,
        "cpo_beta": 0.1,
        "kto_beta": 0.1,
        "kto_desirable_weight": 1.0,
        "kto_undesirable_weight": 1.0,
        "wpo_alpha": 0.0,
        "wpo_beta": 0.01,
    }
    return SimpleNamespace(**(values | changes))


def pair_batch():
    return SimpleNamespace(targets=ANSWERS, starts=STARTS, reference=REFERENCE, total=2.0)


def text_batch():
    """With the three largest logits of a teacher that is sure of other tokens."""
    values, indices = torch.randn(len(TEXT), V, dtype=torch.float64).topk(3, dim=1)
    return SimpleNamespace(targets=TEXT, top_values=values, top_indices=indices, top_lse=values.logsumexp(1) + 0.5)


def rated_batch(kl=0.4):
    """The four answers as rated ones: good, bad, bad, good."""
    return SimpleNamespace(
        targets=ANSWERS,
        starts=STARTS,
        reference=REFERENCE.flatten(),
        good=torch.tensor([True, False, False, True]),
        good_total=2.0,
        total=4.0,
        kl=torch.tensor(kl, dtype=torch.float64),
    )


def batch_of(name):
    """A batch of the kind that the loss takes."""
    return {"text": text_batch, "pairs": pair_batch, "rated": rated_batch}[LOSSES[name].kind]()


def probabilities(head, hidden):
    """softmax by its definition: e^z / sum e^z."""
    z = hidden @ head.weight.T
    return z, z.exp() / z.exp().sum(1, keepdim=True)


def token_logps(head, hidden):
    """One list per answer of the log-probabilities of its trained tokens, token by token."""
    _, p = probabilities(head, hidden)
    answers = []
    for begin, end in zip(STARTS[:-1].tolist(), STARTS[1:].tolist()):
        answers.append([p[t, ANSWERS[t]].log() for t in range(begin, end) if ANSWERS[t] != IGNORE])
    return answers


def same_as(found, truth, head, hidden):
    """Equal values, and equal gradients of the head's weight and of the hidden states, to 1e-6."""
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-6)
    got = torch.autograd.grad(found, (head.weight, hidden))
    want = torch.autograd.grad(truth, (head.weight, hidden))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", ["", "sft"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("l2wrap", [True, False])
def test_sft_formula(name, chunk, smoothing, l2wrap):
    """sum_t -(1-eps) log p_y - (eps/V) sum_k log p_k, + 0.5e-4 max_k z_k^2, over trained tokens."""
    head, hidden = head_and_hidden(len(TEXT))
    z, p = probabilities(head, hidden)
    loss = wrap = nll = torch.zeros((), dtype=torch.float64)
    for t in [t for t in range(len(TEXT)) if TEXT[t] != IGNORE]:
        log_p = p[t].log()
        nll = nll - log_p[TEXT[t]]
        loss = loss - (1 - smoothing) * log_p[TEXT[t]] - smoothing / V * log_p.sum()
        wrap = wrap + 0.5e-4 * z[t].max() ** 2
    settings = config(head_chunk=chunk, smoothing=smoothing, l2wrap=None if l2wrap else False)
    found, metrics = step_loss(LOSSES[name], head, hidden, SimpleNamespace(targets=TEXT), settings)
    same_as(found, loss + wrap * l2wrap, head, hidden)
    torch.testing.assert_close(metrics["loss"], loss.detach())  # the penalty is never part of the logged loss
    torch.testing.assert_close(metrics["nll"], nll.detach())
    assert ("l2wrap" in metrics) == l2wrap
    with torch.no_grad():
        evaluated, quiet = step_loss(LOSSES[name], head, hidden, SimpleNamespace(targets=TEXT), settings)
    torch.testing.assert_close(evaluated, found.detach())
    assert quiet.keys() == metrics.keys()
    for key, value in metrics.items():
        torch.testing.assert_close(quiet[key], value)


def test_l2wrap_has_the_traditions_gradient():
    """RWKV-LM adds 1e-4 * max logit to the gradient at each position's largest logit (there divided by B*T)."""
    head, hidden = nn.Identity(), torch.randn(len(TEXT), V, dtype=torch.float64, requires_grad=True)
    batch = SimpleNamespace(targets=TEXT)
    on, _ = step_loss(LOSSES["sft"], head, hidden, batch, config())
    off, _ = step_loss(LOSSES["sft"], head, hidden, batch, config(l2wrap=False))
    added = torch.autograd.grad(on, hidden)[0] - torch.autograd.grad(off, hidden)[0]
    want = torch.zeros_like(added)
    for t in range(len(TEXT)):
        if TEXT[t] != IGNORE:
            want[t, hidden[t].argmax()] = 1e-4 * hidden[t].detach().max()
    torch.testing.assert_close(added, want)


def test_accumulated_sft_equals_one_batch():
    """Micro-batches of 1 and 7 trained tokens weigh by tokens, L2Wrap included, not half and half."""
    head, hidden = head_and_hidden(8)
    targets = torch.tensor([5, IGNORE, IGNORE, 1, 2, 3, 4, 0])
    whole, _ = step_loss(LOSSES["sft"], head, hidden, SimpleNamespace(targets=targets), config(smoothing=0.1))
    parts = [
        step_loss(LOSSES["sft"], head, hidden[part], SimpleNamespace(targets=targets[part]), config(smoothing=0.1))[0]
        for part in (slice(0, 3), slice(3, 8))
    ]
    same_as(sum(parts) / 6, whole / 6, head, hidden)


DPO_CASES = [
    (loss, logp, eps)
    for loss in ("sigmoid", "hinge", "ipo", "robust")
    for logp in ("sum", "mean")
    for eps in (0.0, 0.15)
]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("loss,logp,eps", DPO_CASES)
def test_dpo_formula(loss, logp, eps, chunk):
    """sum over pairs of dpo_alpha * CE(chosen) + l(h), h = (s_c - s_r) - (b_c - b_r), from single probabilities."""
    beta, alpha = 0.3, 0.1
    head, hidden = head_and_hidden(len(ANSWERS))
    answers = token_logps(head, hidden)
    truth = 0.0
    for pair in range(2):
        chosen, reject = answers[2 * pair], answers[2 * pair + 1]
        m_c, m_r = (len(chosen), len(reject)) if logp == "mean" or loss == "ipo" else (1, 1)
        h = (sum(chosen) - REFERENCE[pair, 0]) / m_c - (sum(reject) - REFERENCE[pair, 1]) / m_r
        sigma = 1 / (1 + (-beta * h).exp())
        if loss == "sigmoid":  # cDPO: -(1-eps) log s(bh) - eps log s(-bh), s(-x) = 1 - s(x)
            value = -(1 - eps) * sigma.log() - eps * (1 - sigma).log()
        elif loss == "robust":  # rDPO: (-(1-eps) log s(bh) + eps log s(-bh)) / (1 - 2 eps)
            value = (-(1 - eps) * sigma.log() + eps * (1 - sigma).log()) / (1 - 2 * eps)
        elif loss == "hinge":
            value = (1 - eps) * (1 - beta * h).clamp(min=0) + eps * (1 + beta * h).clamp(min=0)
        else:  # (h - 1/(2 beta))^2 and, for a swapped pair, (-h - 1/(2 beta))^2
            value = (1 - eps) * (h - 1 / (2 * beta)) ** 2 + eps * (h + 1 / (2 * beta)) ** 2
        truth = truth + value - alpha * sum(chosen) / len(chosen)
    settings = config(
        head_chunk=chunk, dpo_beta=beta, dpo_alpha=alpha, dpo_loss=loss, dpo_logp=logp, dpo_label_smoothing=eps
    )
    found, metrics = step_loss(LOSSES["dpo"], head, hidden, pair_batch(), settings)
    same_as(found, truth, head, hidden)
    torch.testing.assert_close(metrics["loss"], metrics["dpo"] + alpha * metrics["ce"])


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_orpo_formula(mode, chunk):
    """sum over pairs of -mean log p(chosen) - alpha log sigmoid(log (odds_c / odds_r)), odds = P / (1 - P)."""
    alpha = 0.25
    head, hidden = head_and_hidden(len(ANSWERS))
    answers = token_logps(head, hidden)
    truth = 0.0
    for chosen, reject in zip(answers[0::2], answers[1::2]):
        m_c, m_r = (len(chosen), len(reject)) if mode == "mean" else (1, 1)
        p_c, p_r = (sum(chosen) / m_c).exp(), (sum(reject) / m_r).exp()
        ratio = (p_c / (1 - p_c)) / (p_r / (1 - p_r))
        truth = truth - sum(chosen) / len(chosen) - alpha * (ratio / (1 + ratio)).log()  # sigmoid(log x) = x / (1 + x)
    settings = config(head_chunk=chunk, orpo_alpha=alpha, orpo_mode=mode)
    found, metrics = step_loss(LOSSES["orpo"], head, hidden, pair_batch(), settings)
    same_as(found, truth, head, hidden)
    torch.testing.assert_close(metrics["loss"], metrics["ce"] + alpha * metrics["odds"])


def sigmoid(x):
    """By its definition."""
    return 1 / (1 + (-x).exp())


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_simpo_formula(alpha, chunk):
    """sum over pairs of -log sigmoid(beta/|c| log P_c - beta/|r| log P_r - gamma) - alpha/|c| log P_c."""
    beta, gamma = 2.5, 1.4
    head, hidden = head_and_hidden(len(ANSWERS))
    answers = token_logps(head, hidden)
    truth = 0.0
    for chosen, reject in zip(answers[0::2], answers[1::2]):
        mean_c, mean_r = sum(chosen) / len(chosen), sum(reject) / len(reject)
        truth = truth - sigmoid(beta * mean_c - beta * mean_r - gamma).log() - alpha * mean_c
    settings = config(head_chunk=chunk, simpo_alpha=alpha, simpo_beta=beta, simpo_gamma=gamma)
    found, metrics = step_loss(LOSSES["simpo"], head, hidden, pair_batch(), settings)
    same_as(found, truth, head, hidden)
    torch.testing.assert_close(metrics["loss"], metrics["simpo"] + alpha * metrics["ce"])


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_cpo_formula(alpha, chunk):
    """sum over pairs of -log sigmoid(beta log P_c - beta log P_r) - alpha/|c| log P_c."""
    beta = 0.3
    head, hidden = head_and_hidden(len(ANSWERS))
    answers = token_logps(head, hidden)
    truth = 0.0
    for chosen, reject in zip(answers[0::2], answers[1::2]):
        truth = truth - sigmoid(beta * sum(chosen) - beta * sum(reject)).log() - alpha * sum(chosen) / len(chosen)
    settings = config(head_chunk=chunk, cpo_alpha=alpha, cpo_beta=beta)
    found, metrics = step_loss(LOSSES["cpo"], head, hidden, pair_batch(), settings)
    same_as(found, truth, head, hidden)
    torch.testing.assert_close(metrics["loss"], metrics["cpo"] + alpha * metrics["ce"])


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_wpo_formula(shift, alpha, chunk):
    """sum over pairs of -w_c w_r log sigmoid(beta h) - alpha/|c| log P_c with constant weights
    w = exp(mean_t log (p_t / sum_v p_v^2)), their product at most 1 (the shifted targets reach that)."""
    beta = 0.2
    head, hidden = head_and_hidden(len(ANSWERS))
    with torch.no_grad():  # the trained tokens become likely: their weights go above 1
        hidden += shift * head.weight[ANSWERS.clamp(min=0)]
    answers = token_logps(head, hidden)
    _, p = probabilities(head, hidden)
    weights = []
    for begin, end in zip(STARTS[:-1].tolist(), STARTS[1:].tolist()):
        logs = [(p[t, ANSWERS[t]] / (p[t] ** 2).sum()).log() for t in range(begin, end) if ANSWERS[t] != IGNORE]
        weights.append((sum(logs) / len(logs)).exp().item())
    truth = 0.0
    for pair in range(2):
        chosen, reject = answers[2 * pair], answers[2 * pair + 1]
        h = (sum(chosen) - sum(reject)) - (REFERENCE[pair, 0] - REFERENCE[pair, 1])
        weight = min(1.0, weights[2 * pair] * weights[2 * pair + 1])
        truth = truth - weight * sigmoid(beta * h).log() - alpha * sum(chosen) / len(chosen)
    found, metrics = step_loss(
        LOSSES["wpo"], head, hidden, pair_batch(), config(head_chunk=chunk, wpo_alpha=alpha, wpo_beta=beta)
    )
    same_as(found, truth, head, hidden)
    torch.testing.assert_close(metrics["loss"], metrics["wpo"] + alpha * metrics["ce"])
    assert 0 < metrics["weight"].item() <= 2


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("kl", [0.0, 1.7])
def test_kto_formula(kl, chunk):
    """lambda_D (1 - sigmoid(beta (r - z))) for good answers, lambda_U (1 - sigmoid(beta (z - r))) for bad ones."""
    beta, desirable, undesirable = 0.3, 1.3, 0.6
    head, hidden = head_and_hidden(len(ANSWERS))
    batch, truth, rewards = rated_batch(kl), 0.0, []
    for answer, base, good in zip(token_logps(head, hidden), batch.reference, batch.good.tolist()):
        ratio = sum(answer) - base
        rewards.append(beta * ratio.item())
        if good:
            truth = truth + desirable * (1 - sigmoid(beta * (ratio - kl)))
        else:
            truth = truth + undesirable * (1 - sigmoid(beta * (kl - ratio)))
    settings = config(
        head_chunk=chunk, kto_beta=beta, kto_desirable_weight=desirable, kto_undesirable_weight=undesirable
    )
    found, metrics = step_loss(LOSSES["kto"], head, hidden, batch, settings)
    same_as(found, truth, head, hidden)
    means = {name: metrics[name].item() / batch.total for name in ("kl", "chosen_reward", "reject_reward")}
    want = {"kl": kl, "chosen_reward": (rewards[0] + rewards[3]) / 2, "reject_reward": (rewards[1] + rewards[2]) / 2}
    assert means == pytest.approx(want)


def test_kto_by_hand():
    """beta 0.5, z = 1, r = 3 and -1: both margins are 1, each loss 1 - sigmoid(1) = 0.268941."""
    batch = SimpleNamespace(
        reference=torch.tensor([-7.0, -4.0]),
        good=torch.tensor([True, False]),
        good_total=1.0,
        total=2.0,
        kl=torch.tensor(1.0),
    )
    value, metrics = LOSSES["kto"](torch.tensor([-4.0, -5.0]), batch, kto_beta=0.5, kto_undesirable_weight=2.0)
    assert value.item() == pytest.approx(3 * 0.268941, abs=1e-5)
    assert metrics["accuracy"].item() == 2 and metrics["margin"].item() == pytest.approx(2.0)


def test_simpo_by_hand():
    """Means -2.5 and -2, beta 2, gamma 1: -log sigmoid(-5 + 4 - 1) = log(1 + e^2)."""
    scores = PairScores(*(torch.tensor([value]) for value in (-10.0, -14.0, 4, 7)))
    value, metrics = LOSSES["simpo"](scores, None)
    assert value.item() == pytest.approx(math.log(1 + math.exp(2)), abs=1e-6)
    assert metrics["accuracy"].item() == 0 and metrics["margin"].item() == pytest.approx(-1.0)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_l2wrap_of_pairs_averages_over_the_pairs_tokens(name):
    """Off unless asked for; then a mean over trained positions, of each pair."""
    head, hidden = head_and_hidden(len(ANSWERS))
    plain, metrics = step_loss(LOSSES[name], head, hidden, pair_batch(), config())
    assert "l2wrap" not in metrics
    z, _ = probabilities(head, hidden)
    squares = z.amax(1) ** 2 * (ANSWERS != IGNORE)
    penalty = 0.5e-4 * (squares[:6].sum() / 5 + squares[6:].sum() / 6)
    found, metrics = step_loss(LOSSES[name], head, hidden, pair_batch(), config(l2wrap=True))
    same_as(found, plain + penalty, head, hidden)
    torch.testing.assert_close(metrics["loss"], plain.detach())
    torch.testing.assert_close(metrics["l2wrap"], penalty.detach())


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_ignores_the_chunk_length(name):
    """Parametrised over the table: a loss that notices chunking fails here without a test of its own."""
    batch = batch_of(name)
    head, hidden = head_and_hidden(len(batch.targets))
    whole, parts = step_loss(LOSSES[name], head, hidden, batch, config(smoothing=0.1, l2wrap=True))
    assert "loss" in parts and not any(value.requires_grad for value in parts.values())
    for chunk in CHUNKS[:2]:
        found, metrics = step_loss(
            LOSSES[name], head, hidden, batch, config(smoothing=0.1, l2wrap=True, head_chunk=chunk)
        )
        again, _ = step_loss(LOSSES[name], head, hidden, batch, config(smoothing=0.1, l2wrap=True))
        same_as(found, again, head, hidden)
        for key, value in parts.items():
            torch.testing.assert_close(metrics[key], value)
    torch.testing.assert_close(whole, again)


def test_dpo_by_hand():
    """h = (-10 - -14) - (-11 - -13) = 2; beta 0.5: -log sigmoid(1) = log(1 + 1/e) = 0.31326; rewards 0.5 and -0.5.
    CE(chosen) = 10 / 4 = 2.5, so the sum is 0.31326 + 0.1 * 2.5 = 0.56326."""
    scores = PairScores(*(torch.tensor([value]) for value in (-10.0, -14.0, 4, 7)))
    batch = SimpleNamespace(reference=torch.tensor([[-11.0, -13.0]]))
    value, metrics = LOSSES["dpo"](scores, batch, dpo_beta=0.5, dpo_alpha=0.1)
    assert value.item() == pytest.approx(math.log(1 + math.exp(-1)) + 0.25, abs=1e-6)
    want = {"accuracy": 1, "margin": 1, "chosen_reward": 0.5, "reject_reward": -0.5, "ce": 2.5}
    want |= {"chosen_logp": -10, "reject_logp": -14}
    assert {key: metrics[key].item() for key in want} == pytest.approx(want)


def test_ipo_by_hand():
    """Over 4 and 7 tokens: h = (-10 + 11) / 4 - (-14 + 13) / 7 = 1/4 + 1/7, to be driven to 1 / (2 * 0.5) = 1."""
    scores = PairScores(*(torch.tensor([value]) for value in (-10.0, -14.0, 4, 7)))
    batch = SimpleNamespace(reference=torch.tensor([[-11.0, -13.0]]))
    value, _ = LOSSES["dpo"](scores, batch, dpo_beta=0.5, dpo_alpha=0.0, dpo_loss="ipo")
    assert value.item() == pytest.approx((1 / 4 + 1 / 7 - 1) ** 2, abs=1e-6)


def test_orpo_by_hand():
    """P_c = 1/2 and P_r = 1/4 have odds 1 and 1/3: -log sigmoid(log 3) = log(4/3); CE = log 2."""
    chosen, reject = 3 * math.log(0.5), 2 * math.log(0.25)
    scores = PairScores(*(torch.tensor([value]) for value in (chosen, reject, 3, 2)))
    value, metrics = LOSSES["orpo"](scores, None, orpo_alpha=0.5)
    assert value.item() == pytest.approx(math.log(2) + 0.5 * math.log(4 / 3), abs=1e-6)
    assert metrics["margin"].item() == pytest.approx(math.log(3), abs=1e-5)


def test_sft_by_hand():
    """log p = -1 and -3, mean log p = -2 and -5, eps 0.1: 0.9 * 4 + 0.1 * 7 = 4.3."""
    scores = TokenScores(torch.tensor([-1.0, 0.0, -3.0]), torch.tensor([-2.0, 0.0, -5.0]), None)
    value, _ = LOSSES["sft"](scores, None, smoothing=0.1)
    assert value.item() == pytest.approx(4.3)


def test_untrained_policy_has_accuracy_one_half():
    """At step 0 policy = reference: no pair may count as won or lost."""
    equal = torch.tensor([1.0, -2.0, 3.0, 0.0])
    scores = PairScores(equal, equal, torch.ones(4), torch.ones(4))
    nearly = preference_metrics(scores, equal, equal + torch.tensor([0.0, 5e-7, 0.0, -5e-7]))
    assert nearly["accuracy"].item() == 2.0
    decided = preference_metrics(scores, equal + torch.tensor([1e-3, -1e-3, 0.0, 1.0]), equal)
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
    logp = token_scores(head, hidden, targets, chunk=128).logp
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
    logp = torch.tensor([-1.0, 0.0, -2.0, -4.0, -8.0, -16.0, -32.0], requires_grad=True)
    targets = torch.tensor([5, IGNORE, 0, 1, 1, 2, 0])
    scores = pair_scores(logp, targets, torch.tensor([0, 3, 4, 6, 7]))
    assert scores.chosen_sum.tolist() == [-3.0, -24.0] and scores.reject_sum.tolist() == [-4.0, -32.0]
    assert scores.chosen_count.tolist() == [2, 2] and scores.reject_count.tolist() == [1, 1]
    (scores.chosen_sum @ torch.tensor([1.0, 2.0]) + scores.reject_sum @ torch.tensor([3.0, 4.0])).backward()
    assert logp.grad.tolist() == [1, 1, 1, 3, 2, 2, 4]
    empty = pair_scores(logp[:3], targets[:3], torch.tensor([0, 3, 3]))
    assert empty.reject_sum.item() == 0 and empty.reject_mean().item() == 0


def test_three_products_give_the_same_as_four():
    """SFT's short path against token scores and the plain sum, in float32 as in training."""
    head, hidden = head_and_hidden(len(TEXT), torch.float32)
    scores = token_scores(head, hidden, TEXT, chunk=3, want_mean=True, want_max=True)
    plain, _ = LOSSES["sft"](scores, None, smoothing=0.1)
    truth = plain + 0.5e-4 * scores.max_logit.square().sum()
    found, _ = weighted_nll(head, hidden, TEXT, chunk=3, smoothing=0.1, l2wrap_weight=0.5e-4)
    same_as(found, truth, head, hidden)


def test_float16_gradients_profit_from_the_loss_scale():
    """The gradient of an unlikely token is below float16's smallest number; scaled by 2^16 it is not."""
    head = nn.Identity()
    hidden = torch.zeros(1, V, dtype=torch.float16)
    hidden[0, 0] = 20.0
    hidden.requires_grad_()
    value, _ = step_loss(LOSSES["sft"], head, hidden, SimpleNamespace(targets=torch.tensor([0])), config(l2wrap=False))
    (value * 65536).backward()
    assert hidden.grad[0, 1].item() == pytest.approx(65536 * math.exp(-20.0), rel=1e-2)


def test_mistakes_are_named():
    h = torch.zeros(2)
    for arguments, flag in (((0.1, "sigmoyd"), "--dpo_loss"), ((0.0,), "--dpo_beta")):
        with pytest.raises(ValueError, match=flag):
            dpo(h, *arguments)
    with pytest.raises(ValueError, match="--dpo_label_smoothing"):
        dpo(h, 0.1, "robust", 0.5)
    with pytest.raises(ValueError, match="--orpo_mode"):
        LOSSES["orpo"](PairScores(h - 1, h - 2, h + 1, h + 1), None, orpo_mode="median")


def test_settings_of_every_loss_exist_in_the_configuration():
    """A misspelt name would stop the first training step."""
    from src.config import settings

    assert {name for loss in LOSSES.values() for name in (*loss.settings, "head_chunk", "l2wrap")} <= set(settings())


@pytest.mark.parametrize("name", ["dpo", "orpo"])
def test_liger_agrees(name):
    """An independent implementation, where it is installed."""
    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    length, beta = 4, 0.3
    head, hidden = head_and_hidden(4 * length, torch.float32)
    targets = torch.randint(V, (4 * length,))
    batch = SimpleNamespace(targets=targets, starts=torch.arange(5) * length, reference=None)
    order = torch.tensor([0, 2, 1, 3])  # theirs: all chosen answers, then all rejected ones
    theirs = hidden.view(4, length, C)[order], targets.view(4, length)[order]
    if name == "orpo":
        other = chunked.LigerFusedLinearORPOLoss(beta=beta, compiled=False)(head.weight, theirs[0], theirs[1])[0]
        ours, _ = step_loss(LOSSES["orpo"], head, hidden, batch, config(orpo_alpha=beta))
    else:
        teacher = torch.randn_like(head.weight)
        made = chunked.LigerFusedLinearDPOLoss(beta=beta, compute_nll_loss=False, use_ref_model=True, compiled=False)
        other = made(head.weight, theirs[0], theirs[1], None, theirs[0].detach(), teacher)[0]
        logits = (hidden @ teacher.T).log_softmax(1).gather(1, targets[:, None])[:, 0]
        batch.reference = logits.view(2, 2, length).sum(2).detach()
        ours, _ = step_loss(LOSSES["dpo"], head, hidden, batch, config(dpo_beta=beta, dpo_alpha=0.0))
    torch.testing.assert_close(ours / 2, other, rtol=1e-5, atol=1e-5)
    got, want = torch.autograd.grad(ours / 2, head.weight)[0], torch.autograd.grad(other, head.weight)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


class Trainer:
    """What TRL's loss methods ask of their trainer; everything else is None."""

    def __init__(self, **settings):
        same = SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value, gather=lambda value: value)
        self.__dict__.update(settings, accelerator=same, model=SimpleNamespace(training=True), _total_train_tokens=0)
        self._metrics = defaultdict(lambda: defaultdict(list))

    def __getattr__(self, name):
        return None


def trl_batch(length=4):
    """Four answers of `length` tokens as ours and, behind a prompt of one token, as TRL's: chosen ones first."""
    head, hidden = head_and_hidden(4 * length)
    targets, base = torch.randint(V, (4 * length,)), -torch.rand(4, dtype=torch.float64) * 9 - 3
    ours = SimpleNamespace(targets=targets, starts=torch.arange(5) * length, reference=base.view(2, 2), total=2.0)
    order = torch.tensor([0, 2, 1, 3])
    ids = torch.cat([torch.zeros(4, 1, dtype=torch.int64), targets.view(4, length)[order]], 1)
    logits = head(hidden).view(4, length, V)[order]
    logits = torch.cat([logits, torch.zeros(4, 1, V, dtype=logits.dtype)], 1)
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    theirs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    return head, hidden, ours, theirs, logits, base[order]


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "robust", "wpo"])
def test_trl_agrees_about_pairs(name):
    """TRL's own method on the same logits, value and gradient, where it is installed."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    method = getattr(trl.DPOTrainer, "_compute_loss", None)
    if method is None:
        pytest.skip("this trl computes the loss of DPO elsewhere")
    beta, eps = 0.3, 0.15 if name == "robust" else 0.0
    head, hidden, batch, inputs, logits, base = trl_batch()
    settings = {"beta": beta, "label_smoothing": eps, "loss_weights": [1.0], "f_divergence_type": "reverse_kl"}
    kind = {"loss_types": ["sigmoid" if name == "wpo" else name], "use_weighting": name == "wpo"}
    made = Trainer(**settings, **kind, precompute_ref_logps=True)
    inputs |= {"ref_chosen_logps": base[:2], "ref_rejected_logps": base[2:]}
    other = method(made, lambda **_: SimpleNamespace(logits=logits), inputs, False)
    if name == "wpo":
        ours, metrics = step_loss(LOSSES["wpo"], head, hidden, batch, config(wpo_beta=beta))
        assert metrics["weight"].item() < 2  # no weight was at its limit of 1, which this trl no longer has
    else:
        chosen = config(dpo_beta=beta, dpo_alpha=0.0, dpo_loss=name, dpo_label_smoothing=eps)
        ours, _ = step_loss(LOSSES["dpo"], head, hidden, batch, chosen)
    same_as(ours / 2, other, head, hidden)


def test_trl_agrees_about_kto():
    """As above, for two good and two bad answers and a divergence above 0."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    method = getattr(trl.KTOTrainer, "_compute_loss", None)
    if method is None:
        pytest.skip("this trl computes the loss of KTO elsewhere")
    beta, weights = 0.3, (1.3, 0.6)
    head, hidden, batch, inputs, logits, base = trl_batch()
    made = Trainer(beta=beta, loss_type="kto", desirable_weight=weights[0], undesirable_weight=weights[1])
    made.precompute_ref_logps = made.calculate_KL = True
    inputs |= {"label": torch.tensor([1, 1, 0, 0]), "ref_logps": base, "ref_KL_logps": torch.full((4,), -3.0)}
    made._compute_kl_logps = lambda model, batch: torch.full((4,), -1.5)
    other = method(made, lambda **_: SimpleNamespace(logits=logits), inputs, False)
    rated = {"good": torch.tensor([True, False, True, False]), "good_total": 2.0, "kl": torch.tensor(1.5)}
    batch = SimpleNamespace(**vars(batch) | rated | {"reference": batch.reference.flatten(), "total": 4.0})
    settings = config(kto_beta=beta, kto_desirable_weight=weights[0], kto_undesirable_weight=weights[1])
    ours, metrics = step_loss(LOSSES["kto"], head, hidden, batch, settings)
    same_as(ours / 4, other, head, hidden)
    found = {name: metrics[name].item() / 4 for name in ("chosen_reward", "reject_reward")}
    theirs = made._metrics["train"]
    assert found == pytest.approx({k: theirs[f"rewards/{k[:6]}{'ed' * (k[0] == 'r')}"][0] for k in found})


def test_trl_agrees_about_orpo():
    """The odds ratio of the same mean log-probabilities."""
    orpo = pytest.importorskip("trl.experimental.orpo", reason="trl is not installed, or has no ORPO")
    chosen, reject = (-torch.rand(4) * 3 - 0.1 for _ in range(2))
    other = orpo.ORPOTrainer.odds_ratio_loss(Trainer(beta=0.3), chosen, reject)[0].sum()
    ones = torch.ones(4)
    _, metrics = LOSSES["orpo"](PairScores(chosen, reject, ones, ones), None, orpo_alpha=0.3)
    torch.testing.assert_close(-0.3 * metrics["odds"], other, rtol=1e-5, atol=1e-5)
