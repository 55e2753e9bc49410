"""Each loss against its published formula, written out here from raw logits in float64, values and gradients."""

import dataclasses

import pytest
import torch
from torch import nn

from rwkv_rlhf.data.batch import IGNORE
from rwkv_rlhf.losses import LOSSES
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import Config, settings
from rwkv_rlhf.settings.metrics import METRICS
from tests.support.loss_cases import (
    ANSWERS,
    CHUNKS,
    PAIR_LOSSES,
    REFERENCE,
    STARTS,
    TEXT,
    V,
    batch_of,
    config,
    head_and_hidden,
    pair_batch,
    probabilities,
    rated_batch,
    same_as,
    scalar_head,
    text_batch,
    token_logps,
)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("l2wrap", [True, False])
def test_sft_formula(chunk, smoothing, l2wrap):
    """sum_t -(1-eps) log p_y - (eps/V) sum_k log p_k, + 0.5e-4 max_k z_k^2, over trained tokens."""
    head, hidden = head_and_hidden(len(TEXT))
    z, p = probabilities(head, hidden)
    loss = wrap = nll = torch.zeros((), dtype=torch.float64)
    for t in [t for t in range(len(TEXT)) if TEXT[t] != IGNORE]:
        log_p = p[t].log()
        nll = nll - log_p[TEXT[t]]
        loss = loss - (1 - smoothing) * log_p[TEXT[t]] - smoothing / V * log_p.sum()
        wrap = wrap + 0.5e-4 * z[t].max() ** 2
    chosen = config(head_chunk=chunk, smoothing=smoothing, l2wrap=None if l2wrap else False)
    found, metrics = LOSSES["sft"].from_hidden(head, hidden, text_batch(), chosen)
    same_as(found, loss + wrap * l2wrap, head, hidden)
    torch.testing.assert_close(metrics["loss"], loss.detach())  # the penalty is never part of the logged loss
    torch.testing.assert_close(metrics["nll"], nll.detach())
    assert ("l2wrap" in metrics) == l2wrap
    with torch.no_grad():
        evaluated, quiet = LOSSES["sft"].from_hidden(head, hidden, text_batch(), chosen)
    torch.testing.assert_close(evaluated, found.detach())
    assert quiet.keys() == metrics.keys()
    for key, value in metrics.items():
        torch.testing.assert_close(quiet[key], value)


def test_l2wrap_has_the_traditions_gradient():
    """RWKV-LM adds 1e-4 * max logit to the gradient at each position's largest logit (there divided by B*T)."""
    head, hidden = nn.Identity(), torch.randn(len(TEXT), V, dtype=torch.float64, requires_grad=True)
    batch = text_batch()
    on, _ = LOSSES["sft"].from_hidden(head, hidden, batch, config())
    off, _ = LOSSES["sft"].from_hidden(head, hidden, batch, config(l2wrap=False))
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
    whole, _ = LOSSES["sft"].from_hidden(head, hidden, text_batch(targets), config(smoothing=0.1))
    parts = [
        LOSSES["sft"].from_hidden(head, hidden[part], text_batch(targets[part]), config(smoothing=0.1))[0]
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
    chosen = config(
        head_chunk=chunk, dpo_beta=beta, dpo_alpha=alpha, dpo_loss=loss, dpo_logp=logp, dpo_label_smoothing=eps
    )
    found, metrics = LOSSES["dpo"].from_hidden(head, hidden, pair_batch(), chosen)
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
    chosen = config(head_chunk=chunk, orpo_alpha=alpha, orpo_mode=mode)
    found, metrics = LOSSES["orpo"].from_hidden(head, hidden, pair_batch(), chosen)
    same_as(found, truth, head, hidden)
    torch.testing.assert_close(metrics["loss"], metrics["ce"] + alpha * metrics["orpo"])


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
    chosen = config(head_chunk=chunk, simpo_alpha=alpha, simpo_beta=beta, simpo_gamma=gamma)
    found, metrics = LOSSES["simpo"].from_hidden(head, hidden, pair_batch(), chosen)
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
    chosen = config(head_chunk=chunk, cpo_alpha=alpha, cpo_beta=beta)
    found, metrics = LOSSES["cpo"].from_hidden(head, hidden, pair_batch(), chosen)
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
    found, metrics = LOSSES["wpo"].from_hidden(
        head, hidden, pair_batch(), config(head_chunk=chunk, wpo_alpha=alpha, wpo_beta=beta)
    )
    same_as(found, truth, head, hidden)
    torch.testing.assert_close(metrics["loss"], metrics["wpo"] + alpha * metrics["ce"])
    assert 0 < metrics["pair_weight"].item() <= 2


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
    chosen = config(head_chunk=chunk, kto_beta=beta, kto_desirable_weight=desirable, kto_undesirable_weight=undesirable)
    found, metrics = LOSSES["kto"].from_hidden(head, hidden, batch, chosen)
    same_as(found, truth, head, hidden)
    means = {name: metrics[name].item() / batch.total for name in ("kto_kl", "chosen_reward", "reject_reward")}
    want = {
        "kto_kl": kl,
        "chosen_reward": (rewards[0] + rewards[3]) / 2,
        "reject_reward": (rewards[1] + rewards[2]) / 2,
    }
    assert means == pytest.approx(want)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_l2wrap_of_pairs_averages_over_the_pairs_tokens(name):
    """Off unless asked for; then a mean over trained positions, of each pair."""
    head, hidden = head_and_hidden(len(ANSWERS))
    plain, metrics = LOSSES[name].from_hidden(head, hidden, pair_batch(), config())
    assert "l2wrap" not in metrics
    z, _ = probabilities(head, hidden)
    squares = z.amax(1) ** 2 * (ANSWERS != IGNORE)
    penalty = 0.5e-4 * (squares[:6].sum() / 5 + squares[6:].sum() / 6)
    found, metrics = LOSSES[name].from_hidden(head, hidden, pair_batch(), config(l2wrap=True))
    same_as(found, plain + penalty, head, hidden)
    torch.testing.assert_close(metrics["loss"], plain.detach())
    torch.testing.assert_close(metrics["l2wrap"], penalty.detach())


class Watched(Config):
    """Settings that remember which of them were read."""

    def __getattribute__(self, name):
        if name in settings():
            object.__getattribute__(self, "__dict__").setdefault("read", set()).add(name)
        return object.__getattribute__(self, name)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_does_what_its_entry_says(name):
    """If this breaks, the command line asks for data, a reference, a teacher or settings that the loss does not use, or
    does not ask for those that it uses."""
    facts, loss, batch, scalar = tables.LOSSES[name], LOSSES[name], batch_of(name), scalar_head(name)
    head, hidden = head_and_hidden(len(batch.targets))
    watched = Watched(loss=name)
    vars(watched)["read"] = set()  # not what filling in defaults has read
    _, metrics = loss.from_hidden(head, hidden, batch, watched, scalar)
    assert vars(watched)["read"] <= {*facts.settings, "smoothing", "l2wrap", "head_chunk"}
    assert ("smoothing" in vars(watched)["read"]) == (facts.smoothing > 0)
    assert ("l2wrap" in metrics) == facts.l2wrap
    lacking = text_batch() if facts.data == "text" else dataclasses.replace(batch, reference=None)
    if facts.reference or facts.teacher:
        with pytest.raises(AssertionError, match="reference" if facts.reference else "teacher"):
            loss.from_hidden(head, hidden, lacking, watched)
    else:
        loss.from_hidden(head, hidden, lacking, watched, scalar)


@pytest.mark.parametrize("name", LOSSES)
def test_what_a_loss_logs_is_in_the_table_of_metrics(name):
    """If this breaks, a number is logged that no curve, no progress bar and no page can say the meaning of."""
    batch = batch_of(name)
    head, hidden = head_and_hidden(len(batch.targets))
    metrics = LOSSES[name].from_hidden(head, hidden, batch, config(l2wrap=True), scalar_head(name)).metrics
    assert set(metrics) <= set(METRICS)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_ignores_the_chunk_length(name):
    """Parametrised over the table: a loss that notices chunking fails here without a test of its own."""
    batch, scalar = batch_of(name), scalar_head(name)
    head, hidden = head_and_hidden(len(batch.targets))
    whole, parts = LOSSES[name].from_hidden(head, hidden, batch, config(smoothing=0.1, l2wrap=True), scalar)
    assert "loss" in parts and not any(value.requires_grad for value in parts.values())
    for chunk in CHUNKS[:2]:
        found, metrics = LOSSES[name].from_hidden(
            head, hidden, batch, config(smoothing=0.1, l2wrap=True, head_chunk=chunk), scalar
        )
        again, _ = LOSSES[name].from_hidden(head, hidden, batch, config(smoothing=0.1, l2wrap=True), scalar)
        same_as(found, again, head, hidden)
        for key, value in parts.items():
            torch.testing.assert_close(metrics[key], value)
    torch.testing.assert_close(whole, again)
