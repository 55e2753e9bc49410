"""Group relative policy optimisation and its kin: clipped ratios of sampled tokens, weighed by advantages.

With rho_t = pi(y_t) / pi_old(y_t) of each token, A its answer's advantage, low and high the limits:

    clip     -min(rho_t A, clip(rho_t, 1 - low, 1 + high) A)          Shao et al., arXiv 2402.03300, equation 3; the two
                                                                      limits apart: DAPO, arXiv 2503.14476, equation 10
    delta    rho_t is first cut at delta, for A < 0 too               INTELLECT-2, arXiv 2505.07291, section 3.4
    cispo    -sg(min(rho_t, high)) A log pi(y_t)                      MiniMax-M1, arXiv 2506.13585, equation 4
    gspo     rho = exp(mean_t log rho_t), one for the whole answer    Zheng et al., arXiv 2507.18071, equation 7

The means over tokens and answers that go with them are functions of their own; `settings/policy_tables.py` says which
belongs to which name. The gradient flows through log pi(y_t) only; old log-probabilities and advantages are constants.

Legend: A answer tokens, S answers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_rlhf.data.batch import IGNORE
from rwkv_rlhf.data.policy_batch import PolicyBatch
from rwkv_rlhf.losses.kinds import Loss, LossValue
from rwkv_rlhf.losses.kl import kl_estimate, weighted_kl
from rwkv_rlhf.losses.pairs import segment_sums
from rwkv_rlhf.losses.tokens import RequiredStats, TokenScores
from rwkv_rlhf.ops.starts import Starts
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.implementations import load
from rwkv_rlhf.settings.policy_tables import GRPO_LOSSES


class Limits(NamedTuple):
    """Of ratios: `low` below 1, `high` above it (cispo: the largest ratio), `delta` whatever the advantage (0 = no)."""

    low: float
    high: float
    delta: float = 0.0


def limits_of(config: Config) -> Limits:
    """What the settings say; a high limit that is not given is the objective's own, or the low one."""
    own = GRPO_LOSSES[config.grpo_loss].high
    high = config.grpo_epsilon_high or (config.grpo_epsilon if own is None else own)
    return Limits(config.grpo_epsilon, high, config.grpo_delta)


def token_ratio(log_ratio: Tensor, batch: PolicyBatch) -> Tensor:
    """(A,) ratios of single tokens from their logarithms (A,)."""
    return log_ratio.exp()


def answer_ratio(log_ratio: Tensor, batch: PolicyBatch) -> Tensor:
    """(A,) the geometric mean of the ratios of an answer's tokens, at each of its tokens."""
    counts = trained_tokens(batch).to(log_ratio.dtype).clamp_min(1)
    means = segment_sums(log_ratio, batch.segments) / counts
    return at_tokens(means, batch.segments).exp()


class Surrogate(NamedTuple):
    """(A,) each: what is minimised, and whether a limit has cut the token's ratio."""

    values: Tensor
    cut: Tensor


def clipped(ratio: Tensor, logp: Tensor, advantages: Tensor, limits: Limits) -> Surrogate:
    """The clipped surrogate: a token whose ratio has gone far enough in its advantage's direction has no gradient."""
    inside = ratio.clamp(1 - limits.low, 1 + limits.high)
    cut = ((ratio > 1 + limits.high) & (advantages > 0)) | ((ratio < 1 - limits.low) & (advantages < 0))
    if limits.delta:
        cut = cut | ((ratio > limits.delta) & (advantages < 0))
        ratio = ratio.clamp(max=limits.delta)
    return Surrogate(-torch.minimum(ratio * advantages, inside * advantages), cut)


def cispo(ratio: Tensor, logp: Tensor, advantages: Tensor, limits: Limits) -> Surrogate:
    """Log-likelihood weighed by ratios that have no gradient: every token keeps one."""
    return Surrogate(-ratio.clamp(max=limits.high).detach() * advantages * logp, ratio > limits.high)


def trained_tokens(batch: PolicyBatch) -> Tensor:
    """(S,) trained tokens of each answer."""
    return segment_sums((batch.targets != IGNORE).double(), batch.segments)


def at_tokens(values: Tensor, segments: Starts) -> Tensor:
    """Numbers (S,) of answers, at each of their tokens: (A,)."""
    return values.repeat_interleave(segments.lengths_on(values.device), output_size=segments[-1])


# Sums over the answers of a micro-batch which, divided by `batch.total`, add up to the mean over the optimizer step.


def mean_of_answers(values: Tensor, batch: PolicyBatch, config: Config) -> Tensor:
    """The mean over each answer's tokens, summed over answers: short and long ones weigh the same."""
    sums = segment_sums(values, batch.segments)
    return (sums / trained_tokens(batch).to(sums.dtype).clamp_min(1)).sum()


def mean_of_step(values: Tensor, batch: PolicyBatch, config: Config) -> Tensor:
    """Every token of the optimizer step weighs the same."""
    return values.sum() * (batch.total / batch.trained_total)


def mean_of_length(values: Tensor, batch: PolicyBatch, config: Config) -> Tensor:
    """Divided by the longest answer that was allowed: no answer's tokens weigh more because it is short."""
    return values.sum() / config.grpo_gen_length


def mean_of_batch(values: Tensor, batch: PolicyBatch, config: Config) -> Tensor:
    """Every token of the micro-batch weighs the same, and micro-batches do."""
    answers = len(batch.segments) - 1
    return values.sum() * (answers / max(1, batch.trained.count))


class GRPO(Loss[PolicyBatch]):
    """objective + grpo_kl_beta * KL(policy || reference) under the objective's own mean, - entropy_coef * the mean
    entropy of a token.

    Metrics: loss, and means over trained tokens: `kl` where there is a reference, `clip_fraction`.
    """

    def temperature(self, config: Config) -> float:
        """Probabilities are those that were sampled from."""
        return config.grpo_gen_temperature

    def required_stats(self, config: Config) -> RequiredStats:
        return super().required_stats(config)._replace(entropy=config.entropy_coef > 0)

    def __call__(self, scores: TokenScores, batch: PolicyBatch, config: Config) -> LossValue:
        facts = GRPO_LOSSES[config.grpo_loss]
        trained = batch.targets != IGNORE
        old = scores.logp.detach() if batch.old_logp is None else batch.old_logp
        ratio = load(facts.ratio)(torch.where(trained, scores.logp - old, 0.0), batch)
        values, cut = load(facts.surrogate)(ratio, scores.logp, batch.advantages, limits_of(config))
        tokens = {"clip_fraction": cut.to(values.dtype)}
        if config.grpo_kl_beta:
            assert batch.reference_logp is not None, "a KL penalty without log-probabilities of a reference"
            if config.grpo_kl_unbiased:
                kl = weighted_kl(scores.logp, batch.reference_logp, old, config.grpo_kl)
            else:
                kl = kl_estimate(scores.logp, batch.reference_logp, config.grpo_kl)
            values = values + config.grpo_kl_beta * kl
        if batch.reference_logp is not None:
            tokens["kl"] = kl_estimate(scores.logp.detach(), batch.reference_logp, "k3")
        value = load(facts.mean)(torch.where(trained, values, 0.0), batch, config)
        share = batch.total / batch.trained_total
        if config.entropy_coef:
            assert scores.entropy is not None
            value = value - config.entropy_coef * share * scores.entropy.sum()
        found = {name: torch.where(trained, each, 0.0).sum() * share for name, each in tokens.items()}
        return LossValue(value, {"loss": value.detach()} | {name: each.detach() for name, each in found.items()})
