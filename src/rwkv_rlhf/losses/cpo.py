"""Contrastive preference optimisation (Xu et al., arXiv 2401.08417, equation 5): DPO with a uniform reference.

With s the summed log-probability of an answer:

    -log sigmoid(beta s_c - beta s_r) + alpha * CE(chosen)

CE, the behaviour-cloning term, is the mean over the tokens of the pair's chosen answer, as the authors' code takes
means of tokens. Their defaults are alpha = 1 and beta = 0.1.

Legend: n pairs.
"""

from torch import Tensor

from rwkv_rlhf.losses.kinds import PairLoss, TermWeights
from rwkv_rlhf.losses.pairs import AnswerValues, PairScores
from rwkv_rlhf.settings.config import Config


class CPO(PairLoss):
    """Preference loss without a reference + cpo_alpha * CE(chosen). Rewards: beta * summed log-probability."""

    term = "cpo"

    def rewards(self, scores: PairScores, reference: Tensor | None, config: Config) -> AnswerValues:
        return AnswerValues(config.cpo_beta * scores.chosen_sum, config.cpo_beta * scores.reject_sum)

    def weights(self, config: Config) -> TermWeights:
        return TermWeights(preference=1.0, ce=config.cpo_alpha)
