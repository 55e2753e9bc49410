"""What an algorithm of reinforcement learning brings to the loop (rl/loop.py), which knows none of them.

Another one is one file with a subclass of `Algorithm`, its loss (losses/), and the entry in `settings/tables.py:LOSSES`
whose `implementation` names the loss and whose `algorithm` names the subclass. It says how often prompts are answered
and samples trained on (`cycle`), how answers are sampled (`sampling`), what else must be known of their tokens before
the policy changes (`numbers`: a value head's values), and what rewards mean for each token (`judge`: advantages,
returns). What `numbers` and `judge` give by name are fields of its batch (`batch`, a subclass of `PolicyBatch`), so the
loss finds them there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from rwkv_rlhf.data.policy_batch import PolicyBatch
from rwkv_rlhf.generation.sampling_params import SamplingParams
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.rl.rollout import Group
from rwkv_rlhf.settings.config import Config


class Cycle(NamedTuple):
    """One rollout and what is learnt from it: `passes` passes of `steps` optimizer steps each."""

    steps: int
    passes: int

    @property
    def total(self) -> int:
        """Optimizer steps from one rollout to the next."""
        return self.steps * self.passes


class Judged(NamedTuple):
    """A rollout whose samples have all numbers that the batch asks for, and what is logged of it."""

    groups: list[Group]
    figures: dict[str, float]


class Algorithm(ABC):
    """One run's algorithm; it may keep a state between rollouts (a KL controller). Every rank has one and calls it with
    the same arguments, except for `numbers`.

    batch: what micro-batches are. needs_reference: whether `reference_logp`, each token's log-probability under the
    start model, is to be known; needs_old: whether `old_logp` is, also where only one step follows a rollout. refills:
    how often prompts whose groups are not kept are replaced by others.
    """

    batch: ClassVar[type[PolicyBatch]] = PolicyBatch

    def __init__(self, config: Config) -> None:
        self.config = config
        self.needs_reference = False
        self.needs_old = False
        self.refills = 0

    @abstractmethod
    def cycle(self) -> Cycle:
        """How rollouts and optimizer steps alternate. A step takes micro_bsz prompts of each micro-batch and rank."""

    @abstractmethod
    def sampling(self) -> SamplingParams:
        """How answers are sampled: `samples` to each prompt; stop texts are the template's."""

    @property
    @abstractmethod
    def temperature(self) -> float:
        """Of the softmax that log-probabilities are taken of; the loss's own, and that of `sampling`."""

    def kept(self, groups: Sequence[Group]) -> list[bool]:
        """Which groups have something to teach. Others are replaced as long as `refills` allows it."""
        return [True] * len(groups)

    def numbers(self, model: RWKV, batch: PolicyBatch) -> dict[str, Tensor]:
        """More numbers (A,) of each token, by field of the batch, under the policy that sampled; without gradient."""
        return {}

    @abstractmethod
    def judge(self, groups: Sequence[Group]) -> Judged:
        """Every sample of a rollout (all ranks') with `advantages` (tokens,), and more, among its numbers."""

    def enough(self, record: dict[str, Any]) -> bool:
        """Whether the rest of the rollout's steps is left out, after the step with this record of metrics.jsonl."""
        return False

    def state(self) -> dict[str, Any]:
        """What a resumed run must know: plain values and tensors."""
        return {}

    def take_state(self, state: dict[str, Any]) -> None:  # noqa: B027  # most have none
        """Go on from there."""
