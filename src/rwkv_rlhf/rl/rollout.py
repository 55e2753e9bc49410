"""Answers of the policy to prompts: each prompt runs once, its state is forked to its answers, and all are sampled
together (generation/sampler.py).

What is sampled depends on the run's seed, the prompt's position and the copy alone, not on what else is in the batch or
which rank does it (up to the rounding of batched products).
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rwkv_rlhf.data.conversation import normalise
from rwkv_rlhf.data.policy_batch import PromptExample
from rwkv_rlhf.generation.answers import after_cue
from rwkv_rlhf.generation.prefixes import PrefixCache
from rwkv_rlhf.generation.rows import Completion, Request
from rwkv_rlhf.generation.sampler import Sampler
from rwkv_rlhf.generation.sampling import sequence_seed
from rwkv_rlhf.generation.sampling_params import SamplingParams


@dataclass(frozen=True)
class Asked:
    """A prompt of a rollout, and its position in the run's order of prompts."""

    position: int
    example: PromptExample


@dataclass(frozen=True)
class Sample:
    """One answer, and what became known of it.

    Attributes:
        ids: at least one token, those of the stop included. text: before the stop, stripped unless the prompt is bare.
        logp: (tokens,) float32 log-probabilities under the sampler, the whole distribution at its temperature.
        entropy: mean entropy of that distribution over the tokens, nats.
        finished: it ended by itself; otherwise it was cut at the longest length.
        rewards: by function or model, None where one has no opinion. reward: their weighted sum.
        trained: whether the loss looks at it. numbers: (tokens,) float32 by field of the batch (`PolicyBatch`).
    """

    asked: Asked
    copy: int
    ids: list[int]
    text: str
    logp: Tensor
    entropy: float
    finished: bool
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    reward: float = 0.0
    trained: bool = True
    numbers: Mapping[str, Tensor] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """All but the prompt, as plain values and CPU tensors: between ranks and in resume points."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "asked"}
        return found | {"rewards": dict(self.rewards), "numbers": dict(self.numbers)}


Group = list[Sample]  # the answers to one prompt


def sample_of(asked: Asked, copy: int, one: Completion) -> Sample:
    """What was sampled after a prompt."""
    text = after_cue(asked.example.cue, one.text)
    return Sample(
        asked,
        copy,
        one.tokens,
        text if asked.example.bare else normalise(text),
        torch.tensor(one.logprobs, dtype=torch.float32),
        sum(one.entropies) / max(1, len(one.entropies)),
        one.finished,
    )


def roll_out(
    sampler: Sampler, prompts: Sequence[Asked], params: SamplingParams, *, seed: int, at_once: int
) -> list[Group]:
    """`params.samples` answers to each prompt, in the order of `prompts`; at most `at_once` are sampled together.

    An answer ends with the stop of its prompt's template or the end of document, or at params.max_tokens.
    """
    prefixes = PrefixCache(sampler.model)
    prefixes.add_common([one.example.prompt for one in prompts])
    queue: deque[Request] = deque()
    for row, one in enumerate(prompts):
        rest, state = prefixes.find(one.example.prompt)
        how = dataclasses.replace(params, stop_texts=(one.example.stop,) if one.example.stop else ())
        queue.append(Request(rest, how, sequence_seed(sequence_seed(seed, one.position), 0), row, state))
    done = sampler.stream(queue, at_once=at_once)
    found = {(one.request.key, one.copy): one.completion for one in done}
    return [
        [sample_of(one, copy, found[row, copy]) for copy in range(params.samples)] for row, one in enumerate(prompts)
    ]
