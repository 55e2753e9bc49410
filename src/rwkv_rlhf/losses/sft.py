"""Supervised fine-tuning and pre-training: cross-entropy with label smoothing (Szegedy et al., arXiv 1512.00567,
section 7; the uniform prior over the vocabulary).

Legend: T tokens, C width, V vocabulary.
"""

import torch
from torch import Tensor, nn

from rwkv_rlhf.data.batch import TextBatch
from rwkv_rlhf.losses.kinds import LossValue, TextLoss, token_penalty
from rwkv_rlhf.losses.tokens import L2WRAP, TokenScores, weighted_nll
from rwkv_rlhf.settings.config import Config


def sft(logp: Tensor, mean_logp: Tensor | None = None, *, smoothing: float = 0.0) -> Tensor:
    """Loss of each token, (T,): -(1 - smoothing) log p_y - (smoothing / V) sum_k log p_k; 0 at ignored positions.

    `logp` (T,) log p_y; `mean_logp` (T,) the mean over the vocabulary of log p, needed by smoothing only.
    """
    if smoothing == 0:
        return -logp
    assert mean_logp is not None, "label smoothing without the mean over the vocabulary"
    return -(1 - smoothing) * logp - smoothing * mean_logp


class SFT(TextLoss):
    """Cross-entropy. Metrics: loss, and nll, the plain negative log-likelihood."""

    def __call__(self, scores: TokenScores, batch: TextBatch, config: Config) -> LossValue:
        value = sft(scores.logp, scores.mean_logp, smoothing=config.smoothing or 0.0).sum()
        metrics = {"loss": value.detach(), "nll": -scores.logp.detach().sum()}
        return LossValue(value, metrics).with_l2wrap(token_penalty(scores))

    def from_hidden(
        self, head: nn.Module, hidden: Tensor, batch: TextBatch, config: Config, scalar: nn.Module | None = None
    ) -> LossValue:
        # float16 gradients live by the loss scale, which only the backward pass knows
        if not torch.is_grad_enabled() or hidden.dtype == torch.float16:
            return super().from_hidden(head, hidden, batch, config)
        # each token's weight is known beforehand, so the gradients need no second pass over the logits
        wraps = self.required_stats(config).max
        found = weighted_nll(
            head,
            hidden,
            batch.targets,
            head_chunk=config.head_chunk,
            smoothing=config.smoothing or 0.0,
            l2wrap_weight=L2WRAP if wraps else 0.0,
            trained=batch.trained,
        )
        metrics = {"loss": found.loss, "nll": found.nll}
        return LossValue(found.value, metrics | {"l2wrap": found.l2wrap} if wraps else metrics)
