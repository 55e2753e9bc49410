"""Simple preference optimisation without a reference (Meng, Xia, Chen, arXiv 2405.14734, equations 3-6).

With s the mean log-probability of an answer's tokens, the implicit reward is beta s, and

    -log sigmoid(beta s_c - beta s_r - gamma) + alpha * CE(chosen)

gamma is the target margin of rewards, in their units. The paper has alpha = 0, beta from 2.0 to 2.5, and advises
gamma = beta / 2 to start from: the defaults are 2.0 and 1.0. (Older RWKV programs multiplied both terms by alpha.)

Legend: n pairs.
"""

from torch import Tensor
from torch.nn import functional as F

from rwkv_rlhf.losses.kinds import PairLoss, TermWeights
from rwkv_rlhf.losses.pairs import AnswerValues, PairScores
from rwkv_rlhf.settings.config import Config


def simpo(margin: Tensor, *, gamma: float) -> Tensor:
    """Preference loss (n,) of the margins of rewards (n,)."""
    return -F.logsigmoid(margin - gamma)


class SimPO(PairLoss):
    """Length-normalised preference loss with a target margin, + simpo_alpha * CE(chosen).

    Rewards: beta * mean log-probability, so that `reward_margin` is what gamma asks for.
    """

    term = "simpo"

    def rewards(self, scores: PairScores, reference: Tensor | None, config: Config) -> AnswerValues:
        return AnswerValues(config.simpo_beta * scores.chosen_mean, config.simpo_beta * scores.reject_mean)

    def preference(self, scores: PairScores, reference: Tensor | None, config: Config) -> Tensor:
        return simpo(self.rewards(scores, reference, config).margin(), gamma=config.simpo_gamma)

    def weights(self, config: Config) -> TermWeights:
        return TermWeights(preference=1.0, ce=config.simpo_alpha)
