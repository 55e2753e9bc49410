"""Rewards of a policy's answers to held-out prompts: one answer to each, sampled as in training."""

from __future__ import annotations

import dataclasses

from rwkv_rlhf.data.prompts import Prompts
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.generation.sampler import Sampler
from rwkv_rlhf.generation.sampling_params import SamplingParams
from rwkv_rlhf.rl.loop import sample_figures
from rwkv_rlhf.rl.rewards import Rewards
from rwkv_rlhf.rl.rollout import Asked, Sample, roll_out
from rwkv_rlhf.settings.config import Config

APART = 7919  # from the seeds of training, whose prompts have the same positions


def held_out_samples(
    sampler: Sampler, prompts: Prompts, rewards: Rewards, params: SamplingParams, config: Config
) -> list[Sample]:
    """A rewarded answer to each prompt, always from the same draws; several ranks share the prompts."""
    asked = [Asked(position, prompts[position]) for position in range(len(prompts))]
    one = dataclasses.replace(params, samples=1)
    mine = asked[ranks.rank() :: ranks.world_size()]
    groups = roll_out(sampler, mine, one, seed=config.seed + APART, at_once=config.sample_at_once)
    plain = ranks.all_gather([sample.plain() for sample in rewards([group[0] for group in groups])])
    world = ranks.world_size()
    return [Sample(one, **plain[number % world][number // world]) for number, one in enumerate(asked)]


def held_out_figures(samples: list[Sample]) -> dict[str, float | int]:
    """What is logged of them, by the names of METRICS; `loss` is the reward, of which less is worse, turned round."""
    found = sample_figures(samples)
    return {"loss": -found["reward"], "prompts": len(samples)} | found
