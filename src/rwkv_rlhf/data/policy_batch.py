"""Prompts that answers are sampled to, and packed batches of such answers with what their policy thought of them.

Legend: n prompts, G answers to each, A answer tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from rwkv_rlhf.data.batch import IGNORE, AnswerBatch, forked


@dataclass(frozen=True)
class PromptExample:
    """A prompt as token ids and as its row of the data file has it.

    raw: the value under prompt, a text or a list of messages. columns: the other columns. cue: the text of the ids.
    stop: text that ends an answer, "" = none. bare: plain text, whose answers are taken as they are.
    conversation: the same for rows of one prompt, whatever the template.
    """

    prompt: list[int]
    raw: Any
    columns: Mapping[str, Any]
    cue: str
    stop: str
    bare: bool
    where: str
    conversation: str = ""


class PromptBatch(NamedTuple):
    """A micro-batch whose answers are not sampled yet: number `part` of its optimizer step on this rank."""

    part: int


@dataclass(frozen=True, kw_only=True)
class PolicyBatch(AnswerBatch):
    """Sampled answers, G of each prompt. Targets of answers that are not trained on are IGNORE.

    Attributes:
        old_logp: (A,) float32 log-probabilities of the targets under the policy that sampled; None = those of the very
            pass that trains.
        reference_logp: (A,) float32, under the model that training began from; None where no loss asks for it.
        advantages: (A,) float32, of each token.
        total: answers of the whole optimizer step, over micro-batches and ranks (not prompts).
        trained_total: trained tokens of the whole optimizer step, at least 1.
    """

    old_logp: torch.Tensor | None
    reference_logp: torch.Tensor | None
    advantages: torch.Tensor
    trained_total: float


PolicyBatchT = TypeVar("PolicyBatchT", bound=PolicyBatch)


class Answer(NamedTuple):
    """An answer of at least one token, and numbers (tokens,) float32 of each of its tokens, by field of the batch."""

    ids: Sequence[int]
    trained: bool
    numbers: Mapping[str, torch.Tensor]


def pack_policy(
    kind: type[PolicyBatchT],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Answer]],
    total: float,
    trained_total: float,
) -> PolicyBatchT:
    """Packs sampled answers, equally many to each prompt; every one brings the same numbers. Those that the batch has a
    field for and no answer brings are None; advantages are 0 before they are known."""
    tokens = forked(prompts, [[answer.ids for answer in some] for some in answers])
    every = [answer for some in answers for answer in some]
    lengths = torch.tensor([len(answer.ids) for answer in every])
    trained = torch.tensor([answer.trained for answer in every]).repeat_interleave(lengths)
    numbers = {name: torch.cat([answer.numbers[name] for answer in every]) for name in every[0].numbers}
    known: dict[str, Any] = {"advantages": torch.zeros(len(trained)), "old_logp": None, "reference_logp": None}
    known |= {name: torch.where(trained, values, 0.0) for name, values in numbers.items()}
    return kind(
        **tokens._replace(targets=torch.where(trained, tokens.targets, IGNORE))._asdict(),
        reference=None,
        total=total,
        trained_total=max(1.0, trained_total),
        **known,
    )


def per_answer(values: torch.Tensor, starts: torch.Tensor) -> list[torch.Tensor]:
    """Numbers (A,) of a batch's tokens as one (tokens,) float32 on the host for each answer."""
    return list(values.detach().float().cpu().split(starts.diff().tolist()))
