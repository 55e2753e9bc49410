"""Losses beside those of other libraries, where they are installed."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from rwkv_rlhf.losses import LOSSES
from rwkv_rlhf.losses.pairs import PairScores
from tests.support.loss_cases import (
    C,
    V,
    config,
    head_and_hidden,
    pair_batch,
    rated_batch,
    same_as,
)


@pytest.mark.parametrize("name", ["dpo", "orpo"])
def test_liger_agrees(name):
    """An independent implementation, where it is installed."""
    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    length, beta = 4, 0.3
    head, hidden = head_and_hidden(4 * length, torch.float32)
    targets = torch.randint(V, (4 * length,))
    reference = None
    order = torch.tensor([0, 2, 1, 3])  # theirs: all chosen answers, then all rejected ones
    theirs = hidden.view(4, length, C)[order], targets.view(4, length)[order]
    if name == "orpo":
        other = chunked.LigerFusedLinearORPOLoss(beta=beta, compiled=False)(head.weight, theirs[0], theirs[1])[0]
        settings = {"orpo_alpha": beta}
    else:
        teacher = torch.randn_like(head.weight)
        made = chunked.LigerFusedLinearDPOLoss(beta=beta, compute_nll_loss=False, use_ref_model=True, compiled=False)
        other = made(head.weight, theirs[0], theirs[1], None, theirs[0].detach(), teacher)[0]
        logits = (hidden @ teacher.T).log_softmax(1).gather(1, targets[:, None])[:, 0]
        reference = logits.view(2, 2, length).sum(2).detach()
        settings = {"dpo_beta": beta, "dpo_alpha": 0.0}
    batch = pair_batch(targets, torch.arange(5) * length, reference)
    ours, _ = LOSSES[name].from_hidden(head, hidden, batch, config(**settings))
    torch.testing.assert_close(ours / 2, other, rtol=1e-5, atol=1e-5)
    got, want = torch.autograd.grad(ours / 2, head.weight)[0], torch.autograd.grad(other, head.weight)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


class Trainer:
    """What TRL's loss methods ask of their trainer; everything else is None."""

    def __init__(self, **settings):
        same = SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value, gather=lambda value: value)
        self.__dict__.update(
            settings, accelerator=same, model=SimpleNamespace(training=True), _total_train_tokens=0, _tp_size=1
        )
        self._metrics = defaultdict(lambda: defaultdict(list))

    def __getattr__(self, name):
        return None


def answered(logits, inputs):
    """What TRL's models give it of `logits` (answers, tokens, V): numbers of the answers' next tokens."""
    logp, labels = logits[:, :-1].log_softmax(2), inputs["input_ids"][:, 1:]
    trained = inputs["completion_mask"][:, 1:].bool()
    return SimpleNamespace(
        log_probs=logp.gather(2, labels[:, :, None])[:, :, 0] * trained,
        entropy=-(logp.exp() * logp).sum(2),
        log_sum_sq_probs=(2 * logp).logsumexp(2).detach(),
        mean_logits=logits[:, :-1].mean(2).detach(),
        is_top1=logits[:, :-1].argmax(2) == labels,
        label_mask=trained,
    )


def trl_batch(length=4):
    """Four answers of `length` tokens as ours and, behind a prompt of one token, as TRL's: chosen ones first."""
    head, hidden = head_and_hidden(4 * length)
    targets, base = torch.randint(V, (4 * length,)), -torch.rand(4, dtype=torch.float64) * 9 - 3
    ours = pair_batch(targets, torch.arange(5) * length, base.view(2, 2))
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
    other = method(made, lambda **_: answered(logits, inputs), inputs, False)
    if name == "wpo":
        ours, metrics = LOSSES["wpo"].from_hidden(head, hidden, batch, config(wpo_beta=beta))
        assert metrics["pair_weight"].item() < 2  # no weight was at its limit of 1, which this trl no longer has
    else:
        chosen = config(dpo_beta=beta, dpo_alpha=0.0, dpo_loss=name, dpo_label_smoothing=eps)
        ours, _ = LOSSES["dpo"].from_hidden(head, hidden, batch, chosen)
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
    other = method(made, lambda **_: answered(logits, inputs), inputs, False)
    batch = rated_batch(1.5, batch.targets, batch.starts, batch.reference, (True, False, True, False))
    settings = config(kto_beta=beta, kto_desirable_weight=weights[0], kto_undesirable_weight=weights[1])
    ours, metrics = LOSSES["kto"].from_hidden(head, hidden, batch, settings)
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
    found = LOSSES["orpo"].preference(PairScores(chosen, reject, ones, ones), None, config())
    torch.testing.assert_close(-0.3 * found.sum(), other, rtol=1e-5, atol=1e-5)
