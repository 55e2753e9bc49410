"""Contrastive preference optimisation (Xu et al., arXiv 2401.08417, equation 5): DPO with a uniform reference.

With s the summed log-probability of an answer:

    -log sigmoid(beta s_c - beta s_r) + alpha * CE(chosen)

CE, the behaviour-cloning term, is the mean over the tokens of the pair's chosen answer, as the authors' code takes
means of tokens. Their defaults are alpha = 1 and beta = 0.1.

Legend: n pairs.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from rwkv_rlhf.losses.kinds import Metrics, PairLoss
from rwkv_rlhf.losses.pairs import PairScores, preference_metrics


class CPO(PairLoss):
    """Preference loss without a reference + cpo_alpha * CE(chosen).

    Metrics: loss and its parts `cpo` and `ce` (before alpha), and those of `preference_metrics` with the rewards
    beta * summed log-probability.
    """

    settings = ("cpo_alpha", "cpo_beta")

    def __call__(
        self, scores: PairScores, batch: Any, *, cpo_alpha: float = 1.0, cpo_beta: float = 0.1
    ) -> tuple[Tensor, Metrics]:
        """Sum over the pairs; nothing of `batch` is used."""
        chosen, reject = cpo_beta * scores.chosen_sum, cpo_beta * scores.reject_sum
        preference = -F.logsigmoid(chosen - reject).sum()
        entropy = -scores.chosen_mean().sum()
        value = preference + cpo_alpha * entropy if cpo_alpha else preference
        metrics = {"loss": value.detach(), "cpo": preference.detach(), "ce": entropy.detach()}
        return value, metrics | preference_metrics(scores, chosen, reject)
