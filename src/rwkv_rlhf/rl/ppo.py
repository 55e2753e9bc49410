"""PPO in the loop: one answer to each prompt, a value before each token, advantages between the two.

As in Ziegler et al. (arXiv 1909.08593) and its successors: the reward of a token is -coef * (log policy - log
reference), and the last one's the answer's score besides; advantages are GAE's, whitened over the rollout; the weight
of the penalty follows the divergence. The loss is `losses/ppo.py`, the reference the model that training began from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rwkv_rlhf.data.policy_batch import PolicyBatch
from rwkv_rlhf.generation.sampling_params import SamplingParams
from rwkv_rlhf.losses.kl import kl_estimate
from rwkv_rlhf.losses.ppo import ValueBatch
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.rl.advantages import explained_variance, gae, token_rewards, whiten
from rwkv_rlhf.rl.algorithm import Algorithm, Cycle, Judged
from rwkv_rlhf.rl.kl import KLController, moved_too_far
from rwkv_rlhf.rl.rollout import Group, Sample
from rwkv_rlhf.scoring.forward import token_scalars
from rwkv_rlhf.settings.config import Config

VALUE_HEAD = "value_head"


class PPO(Algorithm):
    """What is sampled and judged; `controller` holds the weight of the KL penalty."""

    batch = ValueBatch

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        self.needs_reference = self.needs_old = True
        self.controller = KLController(c.init_kl_coef, c.adap_kl_target, c.horizon, c.adap_kl_ctrl)

    def cycle(self) -> Cycle:
        c = self.config
        return Cycle(steps=c.batch_size // (c.micro_bsz * c.accumulate_grad_batches), passes=c.ppo_epochs)

    def sampling(self) -> SamplingParams:
        return SamplingParams(temperature=1.0, max_tokens=self.config.output_max_length, entropy=True)

    @property
    def temperature(self) -> float:
        return 1.0

    def numbers(self, model: RWKV, batch: PolicyBatch) -> dict[str, Tensor]:
        return {"old_values": token_scalars(model, batch, VALUE_HEAD, self.config.chunk)}

    def score(self, sample: Sample) -> float:
        """What an answer is worth at its last token: its reward, less what the settings take off."""
        c = self.config
        score = sample.reward - c.reward_baseline
        if not sample.finished:
            score -= c.missing_eos_penalty
        return min(max(score, -c.reward_clip), c.reward_clip) if c.reward_clip else score

    def judge(self, groups: Sequence[Group]) -> Judged:
        c = self.config
        samples = [sample for group in groups for sample in group]
        lengths = [len(sample.ids) for sample in samples]
        starts = torch.tensor([0, *lengths]).cumsum(0)
        old, reference, values = (
            torch.cat([sample.numbers[name] for sample in samples])
            for name in ("old_logp", "reference_logp", "old_values")
        )
        divergence = kl_estimate(old, reference, "k1")
        rewards = token_rewards(
            torch.tensor([self.score(s) for s in samples]), divergence, starts, self.controller.coef
        )
        if c.whiten_rewards:
            rewards = whiten(rewards, shift=False)
        found = gae(rewards, values, starts, gamma=c.gamma, lam=c.lam)
        figures = {
            "kl": float(kl_estimate(old, reference, "k3").mean()),
            "kl_coef": self.controller.coef,
            "explained_variance": explained_variance(values, found.returns),
        }
        self.controller.update(float(divergence.sum()) / len(samples), len(samples))
        parts = zip(whiten(found.advantages).split(lengths), found.returns.split(lengths), strict=True)

        def judged(sample: Sample) -> Sample:
            advantages, returns = next(parts)
            return dataclasses.replace(sample, numbers={**sample.numbers, "advantages": advantages, "returns": returns})

        return Judged([[judged(sample) for sample in group] for group in groups], figures)

    def enough(self, record: dict[str, Any]) -> bool:
        """With --early_stopping: when the policy has left the one that sampled."""
        return self.config.early_stopping and moved_too_far(record["update_kl"], self.config.target_kl)

    def state(self) -> dict[str, Any]:
        return {"kl_coef": self.controller.coef}

    def take_state(self, state: dict[str, Any]) -> None:
        self.controller.coef = state["kl_coef"]
