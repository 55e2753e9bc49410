"""Alternates between sampling and training inside an ordinary run: a micro-batch asks for its answers, and when those
of the last rollout are used up, the policy of the moment answers the next prompts.

The run's own loop stays what it is: its data are positions (`PromptSteps`), which `Rollouts` turns into batches. What a
resumed run must know is small and lies in every resume point: where in the prompts it stands, and the samples that are
not used up yet.

Legend: n prompts of a rollout, G answers to each, A answer tokens of a batch.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from rwkv_rlhf.data.policy_batch import Answer, PolicyBatch, PromptBatch, PromptExample, pack_policy, per_answer
from rwkv_rlhf.data.prompts import Prompts
from rwkv_rlhf.data.sampler import Order
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.distributed.watchdog import heartbeat
from rwkv_rlhf.generation.sampler import NoNumbers, Sampler
from rwkv_rlhf.rl.algorithm import Algorithm
from rwkv_rlhf.rl.rewards import RewardError, Rewards
from rwkv_rlhf.rl.rollout import Asked, Group, Sample, roll_out
from rwkv_rlhf.rl.start_values import StartValues
from rwkv_rlhf.scoring.evaluation import evaluating
from rwkv_rlhf.scoring.finite import broken_tensor, refuse_not_finite
from rwkv_rlhf.scoring.forward import answer_logp
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.exit_status import Failure
from rwkv_rlhf.settings.metrics import REWARDS

log = logging.getLogger(__name__)

QUIET = 10  # rollouts without any signal after which the user is told once


class PromptSteps:
    """Whole optimizer steps over prompts: what `Steps` is for examples that are known beforehand.

    Args:
        examples: prompts. order: position -> index. size: prompts of a micro-batch. passes: over each rollout, so that
            a prompt is in as many optimizer steps. The others as `Steps` has them.
    """

    def __init__(
        self,
        examples: Prompts,
        order: Order,
        micro_bsz: int,
        accumulate: int,
        rank: int = 0,
        world: int = 1,
        passes: int = 1,
    ) -> None:
        self.examples, self.order, self.passes = examples, order, passes
        self.micro_bsz, self.accumulate, self.rank, self.world = micro_bsz, accumulate, rank, world

    @property
    def samples_per_step(self) -> int:
        """Prompts of one optimizer step, over micro-batches and ranks."""
        return self.accumulate * self.world * self.micro_bsz

    def micro_batch(self, k: int) -> PromptBatch:
        """The k-th micro-batch of this rank, counted from the very start of training: its answers are still to come."""
        return PromptBatch(k % self.accumulate)

    def share(self, step: int, part: int) -> range:
        """Which prompts of a rollout, in the order of a pass, are in part `part` of its `step`-th step on this rank."""
        first = step * self.samples_per_step + (part * self.world + self.rank) * self.micro_bsz
        return range(first, first + self.micro_bsz)


class Diverged(Failure):
    """The policy is too far from where it began."""


class Rollouts:
    """The samples of the moment, and who makes new ones.

    Attributes:
        figures: what is logged of the last rollout, by the names of METRICS.
        listeners: called with (number of the rollout, its groups) when it is judged.
    """

    def __init__(
        self,
        config: Config,
        algorithm: Algorithm,
        rewards: Rewards,
        sampler: Sampler,
        steps: PromptSteps,
        start: StartValues | None = None,
    ) -> None:
        assert (start is not None) == algorithm.needs_reference
        self.config, self.algorithm, self.rewards, self.sampler = config, algorithm, rewards, sampler
        self.steps, self.start = steps, start
        self.cycle = algorithm.cycle()
        self.prompts = self.cycle.steps * steps.samples_per_step  # of one rollout, over all ranks
        self.position = config.epoch_begin * config.steps_per_epoch * steps.samples_per_step // self.cycle.passes
        self.rollouts = 0  # so far
        self.step = 0  # optimizer steps of this rollout that are done
        self.quiet = 0  # rollouts without a signal, one after the other
        self.groups: list[Group] = []
        self.figures: dict[str, float] = {}
        self.seconds = 0.0  # spent on rollouts since somebody asked
        self.listeners: list[Callable[[int, list[Group]], object]] = []

    # --- for the module

    def __call__(self, batch: PromptBatch) -> PolicyBatch:
        """The micro-batch that stands in the place of `batch`, on the host."""
        if not self.groups or (self.step == self.cycle.total and batch.part == 0):
            self._collect()
        turn, step = divmod(self.step, self.cycle.steps)
        order = self._order(turn)
        mine = [self.groups[order[n]] for n in self.steps.share(step, batch.part)]
        return self._packed(mine, self._of_step(step, order))

    def take_seconds(self) -> float:
        """Seconds that rollouts (sampling, rewards, scoring) have taken since the last call."""
        found, self.seconds = self.seconds, 0.0
        return found

    def step_done(self, record: dict[str, Any]) -> None:
        """An optimizer step is over; `record` is what was logged of it."""
        self.step += 1
        if self.algorithm.enough(record):
            self.step = self.cycle.total

    def state(self) -> dict[str, Any]:
        """What a resumed run must know: plain values and CPU tensors."""
        return {
            "position": self.position,
            "rollouts": self.rollouts,
            "step": self.step,
            "quiet": self.quiet,
            "figures": dict(self.figures),
            "algorithm": self.algorithm.state(),
            "prompts": [group[0].asked.position for group in self.groups],
            "groups": [[sample.plain() for sample in group] for group in self.groups],
        }

    def take_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was called."""
        for name in ("position", "rollouts", "step", "quiet", "figures"):
            setattr(self, name, state[name])
        self.algorithm.take_state(state["algorithm"])
        self.groups = [
            [Sample(self._asked(position), **plain) for plain in group]
            for position, group in zip(state["prompts"], state["groups"], strict=True)
        ]

    # --- batches of a rollout

    def _order(self, turn: int) -> Sequence[int]:
        """Which group comes when in pass `turn`: the first in the order of the prompts, later ones shuffled."""
        if turn == 0:
            return range(len(self.groups))
        drawn = np.random.default_rng([self.config.seed, self.rollouts, turn])
        return [int(n) for n in drawn.permutation(len(self.groups))]

    def _of_step(self, step: int, order: Sequence[int]) -> list[Group]:
        size = self.steps.samples_per_step
        return [self.groups[n] for n in order[step * size : (step + 1) * size]]

    def _packed(self, groups: Sequence[Group], whole: Sequence[Group]) -> PolicyBatch:
        """A batch of `groups`; `whole` are those of its optimizer step."""
        samples = [sample for group in whole for sample in group]
        return pack_policy(
            self.algorithm.batch,
            [group[0].asked.example.prompt for group in groups],
            [[Answer(sample.ids, sample.trained, sample.numbers) for sample in group] for group in groups],
            total=float(len(samples)),
            trained_total=float(sum(len(sample.ids) for sample in samples if sample.trained)),
        )

    # --- a new rollout

    def _collect(self) -> None:
        """Sample, reward, score and judge the answers to the next prompts."""
        if not self.rollouts and (name := broken_tensor(self.sampler.model)):
            raise ValueError(f"{name} of {{load_model}} {self.config.load_model} holds nan or inf: the file is damaged")
        begun = time.perf_counter()
        kept: list[Group] = []
        spare: list[Group] = []
        for _ in range(1 + self.algorithm.refills):
            new = self._sampled(self.prompts - len(kept))
            for group, keep in zip(new, self.algorithm.kept(new), strict=True):
                (kept if keep else spare).append(group)
            if len(kept) == self.prompts:
                break
        every = [sample for group in (*kept, *spare) for sample in group]
        seconds = time.perf_counter() - begun
        self.groups = sorted(kept + spare[: self.prompts - len(kept)], key=lambda group: group[0].asked.position)
        self.step, self.rollouts = 0, self.rollouts + 1
        logp = torch.cat([sample.logp for sample in every])
        if self.rollouts > 1 and not bool(logp.isfinite().all()):
            raise self._lost()
        refuse_not_finite("the log-probability of a sampled token", logp, self.sampler.model)
        self.figures = sample_figures(every) | {"mixed_groups": mixed_share([*kept, *spare])}
        self.figures["sampled_tokens_per_s"] = sum(len(sample.ids) for sample in every) / max(seconds, 1e-9)
        self._score()
        judged = self.algorithm.judge(self.groups)
        self.groups = judged.groups
        self.figures |= judged.figures
        self._watch()
        for listener in self.listeners:
            listener(self.rollouts, self.groups)
        self.seconds += time.perf_counter() - begun

    def _asked(self, position: int) -> Asked:
        example = self.steps.examples[self.steps.order(position)]
        assert isinstance(example, PromptExample)
        return Asked(position, example)

    def _sampled(self, prompts: int) -> list[Group]:
        """Rewarded answers to the next prompts, each sampled by one rank and known to all."""
        asked = [self._asked(self.position + number) for number in range(prompts)]
        self.position += prompts
        mine, problem = asked[self.steps.rank :: self.steps.world], ""
        at_once = self.config.sample_at_once
        try:
            groups = roll_out(self.sampler, mine, self.algorithm.sampling(), seed=self.config.seed, at_once=at_once)
        except NoNumbers as error:
            if not self.rollouts:
                raise
            raise self._lost() from error
        try:
            rewarded = iter(self.rewards([sample for group in groups for sample in group]))
            groups = [[next(rewarded) for _ in group] for group in groups]
        except RewardError as error:  # said by all ranks together, so that all can save
            problem = str(error)
        if not ranks.is_distributed():
            everyone, problems = groups, [problem]
        else:
            sent = ranks.all_gather(([[sample.plain() for sample in group] for group in groups], problem))
            problems = [one for _, one in sent]
            plain = [sent[number % self.steps.world][0][number // self.steps.world] for number in range(prompts)]
            everyone = [[Sample(one, **each) for each in group] for one, group in zip(asked, plain)]
        if any(problems):
            raise RewardError(next(filter(None, problems)))
        return everyone

    def _lost(self) -> Diverged:
        """Of a policy that began whole and whose logits are no numbers any more."""
        return Diverged(
            f"the policy's logits are no numbers after {self.rollouts} rollouts: it has diverged. Lower {{lr_init}} "
            "or raise the weight of the KL penalty. The checkpoints written so far are intact"
        )

    def _score(self) -> None:
        """Give every sample the numbers that are known before the policy changes, each scored by one rank.

        The policy's own log-probabilities are none of them where the rollout's only step makes the same ones; those of
        the first rollout are compared with the sampler's all the same.
        """
        first, old = self.rollouts == 1, self.cycle.total > 1 or self.algorithm.needs_old
        found: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        if first or old or self.start is not None or type(self.algorithm).numbers is not Algorithm.numbers:
            with evaluating(self.sampler.model):
                for step, part in itertools.product(range(self.cycle.steps), range(self.steps.accumulate)):
                    rows = self.steps.share(step, part)
                    some = [self.groups[row] for row in rows]
                    places = [(row, copy) for row, group in zip(rows, some) for copy in range(len(group))]
                    found |= zip(places, self._numbers(self._packed(some, self.groups), old=first or old))
        known = {place: numbers for part in ranks.all_gather(found) for place, numbers in part.items()}
        if first:
            self._compare(known)
        left_out = set() if old else {"old_logp"}

        def scored(row: int, copy: int, sample: Sample) -> Sample:
            new = {name: values for name, values in known.get((row, copy), {}).items() if name not in left_out}
            return dataclasses.replace(sample, numbers={**sample.numbers, **new})

        self.groups = [
            [scored(row, copy, sample) for copy, sample in enumerate(group)] for row, group in enumerate(self.groups)
        ]

    def _numbers(self, batch: PolicyBatch, old: bool) -> list[dict[str, torch.Tensor]]:
        """The numbers of each answer of a batch; `old`: with `old_logp`."""
        heartbeat("scoring sampled answers")
        model, c = self.sampler.model, self.config
        batch = batch.to(next(model.parameters()).device)
        how: dict[str, Any] = {"head_chunk": c.head_chunk, "chunk": c.chunk, "temperature": self.algorithm.temperature}
        found = {"old_logp": answer_logp(model, batch, **how)} if old else {}
        with torch.no_grad():
            found |= self.algorithm.numbers(model, batch)
        if self.start is not None:
            with self.start.back():
                found["reference_logp"] = answer_logp(model, batch, **how)
        parts = {name: per_answer(values, batch.starts) for name, values in found.items()}
        return [{name: values[n] for name, values in parts.items()} for n in range(batch.starts.numel() - 1)]

    def _compare(self, known: dict[tuple[int, int], dict[str, torch.Tensor]]) -> None:
        """Say how far apart the sampler's and the trainer's probabilities are."""
        gaps = [self.groups[row][copy].logp - numbers["old_logp"] for (row, copy), numbers in known.items()]
        gap = torch.cat(gaps).abs()
        self.figures["sampler_gap"] = float(gap.max())
        log.info("sampler and trainer: max |log ratio| %.1e over %d sampled tokens", gap.max(), len(gap))

    def _watch(self) -> None:
        """Say once that rewards teach nothing; raise Diverged when the policy is too far from the start model."""
        samples = [sample for group in self.groups for sample in group]
        self.quiet = 0 if self.figures["mixed_groups"] else self.quiet + 1
        if self.quiet == QUIET:
            log.warning(
                "in %d rollouts all answers to a prompt had the same reward, so nothing is learnt: try easier prompts, "
                "more answers to each, a higher temperature, or a reward that tells answers apart",
                QUIET,
            )
        if not all("reference_logp" in sample.numbers for sample in samples):
            return
        apart = torch.cat([sample.logp - sample.numbers["reference_logp"] for sample in samples]).mean()
        if self.config.max_kl and float(apart) > self.config.max_kl:
            raise Diverged(
                f"KL to the start model is {float(apart):.3g} nats a token in rollout {self.rollouts}, above --max_kl "
                f"{self.config.max_kl:g}: lower --lr_init or raise the weight of the KL penalty. The checkpoints "
                "written so far are intact"
            )


def mixed_share(groups: Sequence[Group]) -> float:
    """Share of groups whose answers have different rewards; of single answers, whether those differ."""
    if all(len(group) == 1 for group in groups):
        groups = [[sample for group in groups for sample in group]]
    return sum(len({sample.reward for sample in group}) > 1 for group in groups) / len(groups)


def sample_figures(samples: Sequence[Sample]) -> dict[str, float]:
    """What is logged of answers, in training and held out alike; names and units as in METRICS."""
    rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float64)
    tokens = sum(len(sample.ids) for sample in samples)
    found = {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()) if len(samples) > 1 else 0.0,
        "completion_length": tokens / len(samples),
        "truncated": sum(not sample.finished for sample in samples) / len(samples),
        "entropy": sum(sample.entropy * len(sample.ids) for sample in samples) / tokens,
    }
    for name in samples[0].rewards:
        known = [value for sample in samples if (value := sample.rewards[name]) is not None]
        if known:
            found[f"{REWARDS}{name}"] = sum(known) / len(known)
    return found
