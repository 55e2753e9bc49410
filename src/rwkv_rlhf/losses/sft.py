"""Supervised fine-tuning and pre-training: cross-entropy with label smoothing (Szegedy et al., arXiv 1512.00567,
section 7; the uniform prior over the vocabulary).

Legend: T tokens, C width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rwkv_rlhf.losses.kinds import Metrics, TextLoss
from rwkv_rlhf.losses.tokens import L2WRAP, TokenScores, weighted_nll


def sft(scores: TokenScores, smoothing: float = 0.0) -> Tensor:
    """Loss of each token, (T,): -(1 - smoothing) log p_y - (smoothing / V) sum_k log p_k; 0 at ignored positions."""
    if smoothing == 0:
        return -scores.logp
    return -(1 - smoothing) * scores.logp - smoothing * scores.mean_logp


class SFT(TextLoss):
    """Cross-entropy. Metrics: loss, and nll, the plain negative log-likelihood."""

    settings = ("smoothing",)

    def __call__(self, scores: TokenScores, batch: Any, *, smoothing: float = 0.0) -> tuple[Tensor, Metrics]:
        value = sft(scores, smoothing).sum()
        return value, {"loss": value.detach(), "nll": -scores.logp.detach().sum()}

    def from_hidden(
        self, head: nn.Module, hidden: Tensor, batch: Any, *, chunk: int, l2wrap: bool, smoothing: float = 0.0
    ) -> tuple[Tensor, Metrics]:
        # float16 gradients live by the loss scale, which only the backward pass knows.
        if not torch.is_grad_enabled() or hidden.dtype == torch.float16:
            return super().from_hidden(head, hidden, batch, chunk=chunk, l2wrap=l2wrap, smoothing=smoothing)
        # Each token's weight is known beforehand, so the gradients need no second pass over the logits.
        weight = L2WRAP if l2wrap else 0.0
        value, metrics = weighted_nll(
            head, hidden, batch.targets, chunk=chunk, smoothing=smoothing, l2wrap_weight=weight
        )
        if not l2wrap:
            del metrics["l2wrap"]
        return value, metrics
