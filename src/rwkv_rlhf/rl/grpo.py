"""GRPO and its kin in the loop: groups of answers, judged against each other. The loss is `losses/grpo.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from rwkv_rlhf.generation.sampling_params import SamplingParams
from rwkv_rlhf.rl.algorithm import Algorithm, Cycle, Judged
from rwkv_rlhf.rl.group_advantages import group_advantages, mixed, overlong_penalty
from rwkv_rlhf.rl.rollout import Group
from rwkv_rlhf.settings.config import Config


def rewards_of(groups: Sequence[Group]) -> torch.Tensor:
    """(n, G) float32."""
    return torch.tensor([[sample.reward for sample in group] for group in groups], dtype=torch.float32)


class GRPO(Algorithm):
    """Advantages are those of `rl/group_advantages.py`, one number for all tokens of an answer."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.needs_reference = config.grpo_kl_beta > 0
        self.refills = config.grpo_dynamic

    def cycle(self) -> Cycle:
        return Cycle(self.config.grpo_rollout_steps, self.config.grpo_passes)

    def sampling(self) -> SamplingParams:
        c = self.config
        return SamplingParams(
            temperature=c.grpo_gen_temperature,
            top_p=c.grpo_gen_topp,
            max_tokens=c.grpo_gen_length,
            samples=c.grpo_gen_count,
            scored_temperature=c.grpo_gen_temperature,
            entropy=True,
        )

    @property
    def temperature(self) -> float:
        return self.config.grpo_gen_temperature

    def kept(self, groups: Sequence[Group]) -> list[bool]:
        """With --grpo_dynamic: groups of mixed rewards; the others' advantages are 0."""
        return mixed(self._rewards(groups)).tolist() if self.refills else super().kept(groups)

    def _rewards(self, groups: Sequence[Group]) -> torch.Tensor:
        """(n, G) rewards, less what too long answers lose."""
        c, rewards = self.config, rewards_of(groups)
        if not c.grpo_overlong_buffer:
            return rewards
        lengths = torch.tensor([[len(sample.ids) for sample in group] for group in groups])
        return rewards + overlong_penalty(lengths, c.grpo_gen_length, c.grpo_overlong_buffer)

    def judge(self, groups: Sequence[Group]) -> Judged:
        c, rewards = self.config, self._rewards(groups)
        advantages = group_advantages(rewards, c.grpo_advantage, c.grpo_scale)
        judged = [
            [
                dataclasses.replace(
                    sample,
                    trained=sample.finished or not c.grpo_mask_truncated,
                    numbers={**sample.numbers, "advantages": advantages[row, copy].expand(len(sample.ids)).clone()},
                )
                for copy, sample in enumerate(group)
            ]
            for row, group in enumerate(groups)
        ]
        return Judged(judged, {})
