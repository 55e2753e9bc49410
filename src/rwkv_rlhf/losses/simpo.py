"""Simple preference optimisation without a reference (Meng, Xia, Chen, arXiv 2405.14734, equations 3-6).

With s the mean log-probability of an answer's tokens, the implicit reward is beta s, and

    -log sigmoid(beta s_c - beta s_r - gamma) + alpha * CE(chosen)

gamma is the target margin of rewards, in their units. The paper has alpha = 0, beta from 2.0 to 2.5, and advises
gamma = beta / 2 to start from: the defaults are 2.0 and 1.0. (Older RWKV programs multiplied both terms by alpha.)

Legend: n pairs.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from rwkv_rlhf.losses.kinds import Metrics, PairLoss
from rwkv_rlhf.losses.pairs import PairScores, preference_metrics


class SimPO(PairLoss):
    """Length-normalised preference loss with a target margin, + simpo_alpha * CE(chosen).

    Metrics: loss and its parts `simpo` and `ce` (before alpha), and those of `preference_metrics` with the rewards
    beta * mean log-probability, so that `margin` is what gamma asks for.
    """

    settings = ("simpo_alpha", "simpo_beta", "simpo_gamma")

    def __call__(
        self,
        scores: PairScores,
        batch: Any,
        *,
        simpo_alpha: float = 0.0,
        simpo_beta: float = 2.0,
        simpo_gamma: float = 1.0,
    ) -> tuple[Tensor, Metrics]:
        """Sum over the pairs; nothing of `batch` is used."""
        chosen, reject = simpo_beta * scores.chosen_mean(), simpo_beta * scores.reject_mean()
        preference = -F.logsigmoid(chosen - reject - simpo_gamma).sum()
        entropy = -scores.chosen_mean().sum()
        value = preference + simpo_alpha * entropy if simpo_alpha else preference
        metrics = {"loss": value.detach(), "simpo": preference.detach(), "ce": entropy.detach()}
        return value, metrics | preference_metrics(scores, chosen, reject)
