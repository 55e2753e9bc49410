"""Distillation on a teacher's largest logits: alpha * CE + (1 - alpha) * tau^2 * D(teacher, student).

Hinton, Vinyals and Dean, arXiv 1503.02531: both distributions are softened by the temperature tau, and tau^2 keeps the
size of the gradient. With v_k the teacher's K largest logits at a position, i_k their tokens, z the student's logits:

    t = softmax(v / tau)        s = softmax(z[i] / tau)            both over the K tokens only
    forward   sum_k t_k (log t_k - log s_k)
    reverse   sum_k s_k (log s_k - log t_k)
    js        half of forward(t, m) and half of forward(s, m), m = (t + s) / 2; Lin 1991

With `tail` there is one more outcome, "any other token", whose probability before softening is 1 - sum_k p_k under the
whole vocabulary's softmax, for the teacher and the student alike; the K + 1 log-probabilities are then divided by tau.
A teacher's file must hold the log-sum-exp of all its logits for that.

Legend: n trained tokens, T tokens, K teacher's logits per token.
"""

import math

import torch
from torch import Tensor

from rwkv_rlhf.data.batch import TextBatch
from rwkv_rlhf.losses.kinds import LossValue, TextLoss, token_penalty
from rwkv_rlhf.losses.orpo import log1mexp
from rwkv_rlhf.losses.sft import sft
from rwkv_rlhf.losses.tokens import TokenScores
from rwkv_rlhf.settings.config import Config

NO_REST = -1e-6  # a log-probability above this leaves nothing for the rest that float32 could tell from rounding


def softened(scores: Tensor, temperature: float, tail: bool) -> Tensor:
    """Log-distribution (n,K), or (n,K+1) with the rest of the mass, of log-probabilities `scores` (n,K)."""
    if tail:
        inside = scores.logsumexp(1, keepdim=True).clamp(max=NO_REST)
        scores = torch.cat([scores, log1mexp(inside)], 1)
    return (scores / temperature).log_softmax(1)


def _relative(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) of each row, from log-distributions (n,K)."""
    return (a.exp() * (a - b)).sum(1)


def divergence(teacher: Tensor, student: Tensor, kd: str = "forward") -> Tensor:
    """Divergence (n,) of two log-distributions (n,K), in nats. Raises ValueError for an unknown name."""
    if kd == "forward":
        return _relative(teacher, student)
    if kd == "reverse":
        return _relative(student, teacher)
    if kd == "js":
        middle = torch.logaddexp(teacher, student) - math.log(2)
        return (_relative(teacher, middle) + _relative(student, middle)) / 2
    raise ValueError(f"--kd {kd} is unknown; choose one of forward, reverse, js")


def distillation(
    picked: Tensor,
    values: Tensor,
    lse: Tensor | None = None,
    *,
    temperature: float = 2.0,
    kd: str = "forward",
    tail: bool = False,
) -> Tensor:
    """tau^2 * D of each row, (n,).

    picked (n,K): the student's log-probabilities of the teacher's tokens; values (n,K): the teacher's logits; lse (n,):
    log-sum-exp of all the teacher's logits, needed by `tail` only. Differentiable with respect to `picked`.
    Raises ValueError when `tail` misses the lse.
    """
    values = values.to(picked.dtype)
    if tail:
        if lse is None:
            raise ValueError(
                "--kd_tail 1 needs the log-sum-exp of all the teacher's logits, which files of older programs lack: "
                "make the file anew with distillation_generate_h5.py, or use --kd_tail 0"
            )
        values = values - lse.to(picked.dtype)[:, None]
    teacher, student = softened(values, temperature, tail), softened(picked, temperature, tail)
    return temperature**2 * divergence(teacher, student, kd)


class Distillation(TextLoss):
    """alpha * cross-entropy with label smoothing + (1 - alpha) * divergence from the teacher that is in the batch.

    Metrics: loss and its parts `ce` (smoothed) and `kd` (tau^2 included), and `nll`.
    """

    def __call__(self, scores: TokenScores, batch: TextBatch, config: Config) -> LossValue:
        picked, values, lse = scores.gathered, batch.top_values, batch.top_lse
        assert picked is not None and values is not None, "distillation without a teacher"
        rows = batch.trained.on(picked.device)
        if rows is not None:
            picked, values = picked[rows], values[rows]
            lse = None if lse is None else lse[rows]
        kd = distillation(picked, values, lse, temperature=config.temperature, kd=config.kd, tail=config.kd_tail).sum()
        ce = sft(scores.logp, scores.mean_logp, smoothing=config.smoothing or 0.0).sum()
        value = config.alpha * ce + (1 - config.alpha) * kd
        metrics = {"loss": value, "ce": ce, "kd": kd, "nll": -scores.logp.sum()}
        detached = {name: amount.detach() for name, amount in metrics.items()}
        return LossValue(value, detached).with_l2wrap(token_penalty(scores))

    def gathered_tokens(self, batch: TextBatch) -> Tensor | None:
        """The teacher's tokens."""
        return batch.top_indices
