"""Examples and the packed batches made of them: many rows laid end to end, with the starts where states reset.

T tokens, P prompt tokens, A answer tokens, S segments, n pairs. Targets that carry no loss hold IGNORE; token 0 is a
token like any other. All token tensors are int64.

A batch may lie on a GPU. What the host must know of it to fill the GPU's queue stays with it on the host: where
segments begin (`starts`, `segments`) and which positions carry a loss (`trained`).
"""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch

from rwkv_rlhf.ops.starts import Starts
from rwkv_rlhf.transfers import to_device

IGNORE = -100
ON_HOST = {"on_host": True}  # a field that stays on the host


@dataclass(frozen=True)
class TopK:
    """A teacher's K largest logits after each of L tokens (row t is about token t + 1).

    values (L, K) float32, natural logits. indices (L, K) integers: the tokens that they belong to. lse (L,) float32:
    log-sum-exp of all the teacher's logits, or None where nobody stored it.
    """

    values: np.ndarray
    indices: np.ndarray
    lse: np.ndarray | None = None

    def rows(self, begin: int, end: int) -> "TopK":
        """The rows of tokens begin..end-1."""
        return TopK(self.values[begin:end], self.indices[begin:end], None if self.lse is None else self.lse[begin:end])

    def largest(self, k: int) -> "TopK":
        """The k largest of each row, largest first; `self` when it holds no more than that."""
        if k >= self.values.shape[1]:
            return self
        order = np.argsort(-self.values, axis=1, kind="stable")[:, :k]
        return TopK(np.take_along_axis(self.values, order, 1), np.take_along_axis(self.indices, order, 1), self.lse)


@dataclass(frozen=True)
class TextExample:
    """tokens (L,) integers; mask (L,) bool or None: which tokens are trained as targets (the first never is); teacher:
    rows for all L tokens, if a teacher was asked."""

    tokens: np.ndarray
    mask: np.ndarray | None = None
    teacher: TopK | None = None

    def first(self, tokens: int) -> "TextExample":
        """The example cut to its first `tokens` tokens."""
        if tokens >= len(self.tokens):
            return self
        mask = None if self.mask is None else self.mask[:tokens]
        return TextExample(self.tokens[:tokens], mask, None if self.teacher is None else self.teacher.rows(0, tokens))

    def trained(self) -> int:
        """How many targets carry a loss."""
        if self.mask is None:
            return max(0, len(self.tokens) - 1)
        return int(np.count_nonzero(self.mask[1:]))

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        top = self.teacher
        arrays = [self.tokens, self.mask, *([] if top is None else [top.values, top.indices, top.lse])]
        return sum(array.nbytes for array in arrays if array is not None)


@dataclass(frozen=True)
class PairExample:
    """Token ids of a prompt and its two answers; reference (chosen, reject) summed log-probabilities if known.

    conversation: the same for examples of one prompt, whatever the template; "" = not known.
    margin: by how much the file rates the chosen answer higher, in its own units; None where it does not say.
    """

    prompt: list[int]
    chosen: list[int]
    reject: list[int]
    reference: tuple[float, float] | None = None
    _: KW_ONLY
    margin: float | None = None
    conversation: str = field(default="", compare=False)


@dataclass(frozen=True)
class JudgedPair(PairExample):
    """A pair whose answers are judged as wholes, after their last token, and of which no token is predicted."""


@dataclass(frozen=True)
class RatedExample(PairExample):
    """One answer, `chosen`, that is good or bad; `reject` is the answer to another prompt, from which KTO estimates its
    divergence. `reference`: summed log-probabilities of both after this prompt."""

    _: KW_ONLY
    good: bool = True


class Trained:
    """The positions of a batch, or of a chunk of one, that carry a loss, known to the host."""

    def __init__(self, rows: torch.Tensor | None, count: int) -> None:
        """`rows` (M,) int64 on the host, rising; None for all of `count` positions."""
        self.rows, self.count = rows, count if rows is None else len(rows)
        self._copies: dict[torch.device, torch.Tensor] = {}

    @classmethod
    def of(cls, targets: torch.Tensor) -> Self:
        """Those of targets (T,); a GPU is waited for."""
        keep = targets != IGNORE
        return cls(None if bool(keep.all()) else keep.nonzero()[:, 0].cpu(), len(targets))

    def on(self, device: torch.device) -> torch.Tensor | None:
        """`rows` on a device, copied there once."""
        if self.rows is not None and device not in self._copies:
            self._copies[device] = to_device(self.rows, device)
        return None if self.rows is None else self._copies[device]

    def chunk(self, span: slice) -> "Trained":
        """Those of the positions `span`, counted from its beginning."""
        if self.rows is None:
            return Trained(None, span.stop - span.start)
        first, end = torch.searchsorted(self.rows, torch.tensor([span.start, span.stop])).tolist()
        whole = end - first == span.stop - span.start
        return Trained(None if whole else self.rows[first:end] - span.start, end - first)


@dataclass(frozen=True)
class _Movable:
    known: ClassVar[tuple[str, ...]] = ()  # what the host keeps of a batch that is moved

    def to(self, device: torch.device | str) -> Self:
        """The batch with its tensors on `device`, those of batches inside it too, but for what the host must know.

        Copies to a GPU are not waited for.
        """
        return self._mapped(lambda tensor: to_device(tensor, device))

    def pin_memory(self) -> Self:
        """The batch in memory from which a GPU copies while the host goes on."""
        return self._mapped(torch.Tensor.pin_memory)

    def having(self, **changes: Any) -> Self:
        """The batch with other values in fields that `known` does not come from."""
        return self._with_known(replace(self, **changes))

    def _mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        def mapped(value: object) -> object:
            if isinstance(value, tuple):
                return tuple(map(mapped, value))
            if isinstance(value, _Movable):
                return value._mapped(change)
            return change(value) if isinstance(value, torch.Tensor) else value

        moved = {f.name: mapped(getattr(self, f.name)) for f in fields(self) if not f.metadata.get("on_host")}
        return self._with_known(replace(self, **moved))

    def _with_known(self, other: Self) -> Self:
        vars(other).update({name: getattr(self, name) for name in self.known})
        return other


class _Packed(_Movable):
    """Targets in segments. What both are is a field of the batches below."""

    known: ClassVar[tuple[str, ...]] = ("segments", "trained")
    targets: torch.Tensor
    starts: torch.Tensor

    @cached_property
    def segments(self) -> Starts:
        """`starts` as the operations take them."""
        return Starts(self.starts.tolist())

    @cached_property
    def trained(self) -> Trained:
        """Which targets carry a loss."""
        return Trained.of(self.targets)


@dataclass(frozen=True)
class TextBatch(_Packed):
    """Packed text.

    Attributes:
        tokens: (T,) inputs. targets: (T,) the next token of each, IGNORE where not trained.
        starts: (S+1,) cumulative lengths of the segments.
        total: trained tokens of the whole optimizer step, over micro-batches and ranks; at least 1.
        top_values, top_indices, top_lse: (T, K) float32, (T, K), (T,) float32: a teacher's opinion of each target, as
            in `TopK`; None without one.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    starts: torch.Tensor = field(metadata=ON_HOST)
    total: float
    top_values: torch.Tensor | None = None
    top_indices: torch.Tensor | None = None
    top_lse: torch.Tensor | None = None

    def chunk(self, span: slice) -> Self:
        """The tokens `span` with their targets; `starts` stay those of the whole."""
        named = ("tokens", "targets", "top_values", "top_indices", "top_lse")
        found = {name: getattr(self, name) for name in named}
        chunk = replace(self, **{name: x[span] for name, x in found.items() if x is not None})
        vars(chunk)["trained"] = self.trained.chunk(span)
        return chunk


@dataclass(frozen=True)
class AnswerBatch(_Packed):
    """Packed answers: each prompt runs once, its final state is forked to its answers, equally many for each prompt.

    Attributes:
        prompts: (P,) every prompt without its last token. prompt_starts: (n+1,); a segment may be empty.
        answers: (A,) inputs, prompt by prompt: the prompt's last token, then the answer without its own last.
        targets: (A,) the answers. starts: (S+1,) of S answers.
        reference: float32 summed log-probabilities of the answers, or None when any is not known.
        total: prompts of the whole optimizer step, over micro-batches and ranks.
    """

    known: ClassVar[tuple[str, ...]] = (*_Packed.known, "prompt_segments")
    prompts: torch.Tensor
    prompt_starts: torch.Tensor = field(metadata=ON_HOST)
    answers: torch.Tensor
    targets: torch.Tensor
    starts: torch.Tensor = field(metadata=ON_HOST)
    reference: torch.Tensor | None
    total: float

    @cached_property
    def prompt_segments(self) -> Starts:
        """`prompt_starts` as the operations take them."""
        return Starts(self.prompt_starts.tolist())

    def answers_per_prompt(self) -> int:
        """How many answers each prompt has."""
        return (self.starts.numel() - 1) // (self.prompt_starts.numel() - 1)


@dataclass(frozen=True)
class PairBatch(AnswerBatch):
    """Preference pairs: answers chosen_0, reject_0, chosen_1, ..., starts (2n+1,), reference (n, 2).

    Attributes:
        general: general text that the same step learns, or None.
    """

    general: TextBatch | None = None


@dataclass(frozen=True, kw_only=True)
class JudgedBatch(PairBatch):
    """Pairs whose answers are judged as wholes: `answers` holds each answer's last token too, all targets are IGNORE.

    Attributes:
        margins: (n,) float32, by how much the file rates the chosen answers higher; 0 where it does not say.
    """

    margins: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class RatedBatch(AnswerBatch):
    """Single answers that are good or bad: starts (n+1,), reference (n,).

    Attributes:
        good: (n,) bool, the label of each answer.
        good_total: good answers of the whole optimizer step (`total`: all of them).
        others: in the first micro-batch of a step, answers to other prompts, for all of this rank's micro-batches.
        kl: () KTO's divergence, estimated from them, once it is known.
    """

    good: torch.Tensor
    good_total: float
    others: tuple[AnswerBatch, ...] = ()
    kl: torch.Tensor | None = None


Batch = TextBatch | AnswerBatch


def _starts(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths, dtype=np.int64).tolist()], dtype=torch.int64)


def _flat(segments: Sequence[Sequence[int]]) -> torch.Tensor:
    """Lists of ids end to end, (sum of lengths,) int64."""
    return torch.tensor([number for segment in segments for number in segment], dtype=torch.int64)


def pack_texts(examples: Sequence[TextExample], total: float | None = None) -> TextBatch:
    """Packs texts: inputs are tokens[:-1] of each, targets tokens[1:]; an example of one token adds an empty segment.

    Args:
        total: trained tokens of the whole step; the batch's own count when None.
    """
    lengths = [max(0, len(e.tokens) - 1) for e in examples]
    tokens = np.empty(sum(lengths), dtype=np.int64)
    targets = np.empty_like(tokens)
    at = 0
    for example, length in zip(examples, lengths):
        segment = slice(at, at + length)
        tokens[segment] = example.tokens[:length]
        targets[segment] = example.tokens[1 : length + 1]
        if example.mask is not None:
            targets[segment][~example.mask[1 : length + 1]] = IGNORE
        at += length
    # an all-masked step must not divide by 0; its loss and gradient are 0
    total = float(max(1, sum(e.trained() for e in examples))) if total is None else float(total)
    batch = TextBatch(torch.from_numpy(tokens), torch.from_numpy(targets), _starts(lengths), total)
    teachers = _teachers(examples)
    if not teachers:
        return batch
    top = _joined_teacher([teacher.rows(0, length) for teacher, length in zip(teachers, lengths)])
    return replace(
        batch,
        top_values=torch.from_numpy(top.values.astype(np.float32, copy=False)),
        top_indices=torch.from_numpy(top.indices.astype(np.int64, copy=False)),
        top_lse=None if top.lse is None else torch.from_numpy(top.lse.astype(np.float32, copy=False)),
    )


def _teachers(examples: Sequence[TextExample]) -> list[TopK]:
    """The teacher's rows of each example; [] when any lacks them."""
    found = [e.teacher for e in examples if e.teacher is not None]
    return found if len(found) == len(examples) else []


def _joined_teacher(teachers: Sequence[TopK]) -> TopK:
    lse = [teacher.lse for teacher in teachers if teacher.lse is not None]
    return TopK(
        np.concatenate([teacher.values for teacher in teachers]),
        np.concatenate([teacher.indices for teacher in teachers]),
        np.concatenate(lse) if len(lse) == len(teachers) else None,
    )


def glue(examples: Sequence[TextExample]) -> TextExample:
    """Documents end to end as one row without a reset between them (the tradition's `--reset_state 0`).

    At a joint the teacher's row after the last token of a document is about the first token of the next.
    """
    tokens = np.concatenate([np.asarray(e.tokens, dtype=np.int64) for e in examples])
    teachers = _teachers(examples)
    teacher = _joined_teacher(teachers) if teachers else None
    if all(e.mask is None for e in examples):
        return TextExample(tokens, None, teacher)
    masks = [np.ones(len(e.tokens), dtype=bool) if e.mask is None else e.mask for e in examples]
    return TextExample(tokens, np.concatenate(masks), teacher)


def pack_pairs(examples: Sequence[PairExample], total: float | None = None) -> PairBatch:
    """Packs pairs; `total` is the step's number of pairs, the batch's own when None.

    Raises:
        ValueError: an empty prompt or answer (the readers refuse them with file and line before).
    """
    for example in examples:
        if not (example.prompt and example.chosen and example.reject):
            raise ValueError("a preference pair needs a prompt and two answers of at least one token")
    return PairBatch(
        *forked([e.prompt for e in examples], [(e.chosen, e.reject) for e in examples]),
        reference=_references(examples),
        total=float(len(examples) if total is None else total),
    )


class _Answers(NamedTuple):
    """The token tensors of an `AnswerBatch`, its first fields."""

    prompts: torch.Tensor
    prompt_starts: torch.Tensor
    answers: torch.Tensor
    targets: torch.Tensor
    starts: torch.Tensor


def forked(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]) -> _Answers:
    """Prompts that each run once and their answers, equally many for each prompt."""
    inputs = [[prompt[-1], *answer[:-1]] for prompt, some in zip(prompts, answers) for answer in some]
    targets = [answer for some in answers for answer in some]
    return _Answers(
        prompts=_flat([prompt[:-1] for prompt in prompts]),
        prompt_starts=_starts([len(prompt) - 1 for prompt in prompts]),
        answers=_flat(inputs),
        targets=_flat(targets),
        starts=_starts([len(answer) for answer in targets]),
    )


def pack_whole(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]) -> AnswerBatch:
    """Packs prompts and their whole answers, equally many for each prompt, to be judged after their last token."""
    inputs = [[prompt[-1], *answer] for prompt, some in zip(prompts, answers, strict=True) for answer in some]
    tokens = _flat(inputs)
    return AnswerBatch(
        prompts=_flat([prompt[:-1] for prompt in prompts]),
        prompt_starts=_starts([len(prompt) - 1 for prompt in prompts]),
        answers=tokens,
        targets=torch.full_like(tokens, IGNORE),
        starts=_starts([len(answer) for answer in inputs]),
        reference=None,
        total=float(len(prompts)),
    )


def pack_judged(examples: Sequence[JudgedPair], total: float | None = None) -> JudgedBatch:
    """Packs pairs that are judged as wholes; `total` is the step's number of pairs, the batch's own when None."""
    whole = pack_whole([e.prompt for e in examples], [(e.chosen, e.reject) for e in examples])
    shared = {f.name: getattr(whole, f.name) for f in fields(AnswerBatch)}
    margins = torch.tensor([e.margin or 0.0 for e in examples], dtype=torch.float32)
    return JudgedBatch(**shared | {"total": float(len(examples) if total is None else total)}, margins=margins)


def _references(examples: Sequence[PairExample]) -> torch.Tensor | None:
    """(n, 2) float32 reference scores of both answers; None if any example lacks them."""
    known = [e.reference for e in examples if e.reference is not None]
    return torch.tensor(known, dtype=torch.float32) if known and len(known) == len(examples) else None


def pack_rated(
    examples: Sequence[RatedExample],
    total: float | None = None,
    good_total: float | None = None,
    others: Sequence[Sequence[RatedExample]] = (),
) -> RatedBatch:
    """Packs rated answers; `total` and `good_total` count the step's, the batch's own when None.

    Args:
        others: the examples of each micro-batch of the step, whose answers to other prompts go along.
    """
    good = [e.good for e in examples]
    reference = _references(examples)
    return RatedBatch(
        *forked([e.prompt for e in examples], [(e.chosen,) for e in examples]),
        reference=None if reference is None else reference[:, 0],
        total=float(len(examples) if total is None else total),
        good=torch.tensor(good),
        good_total=float(sum(good) if good_total is None else good_total),
        others=tuple(map(_to_other_prompts, others)),
    )


def _to_other_prompts(examples: Sequence[RatedExample]) -> AnswerBatch:
    """The answers to other prompts that come with rated answers."""
    reference = _references(examples)
    return AnswerBatch(
        *forked([e.prompt for e in examples], [(e.reject,) for e in examples]),
        reference=None if reference is None else reference[:, 1],
        total=float(len(examples)),
    )


def pack(examples: Sequence[TextExample] | Sequence[PairExample], total: float | None = None) -> Batch:
    """Packs examples of any kind (one kind at a time)."""
    if rated := [e for e in examples if isinstance(e, RatedExample)]:
        return pack_rated(rated, total)
    if judged := [e for e in examples if isinstance(e, JudgedPair)]:
        return pack_judged(judged, total)
    if pairs := [e for e in examples if isinstance(e, PairExample)]:
        return pack_pairs(pairs, total)
    return pack_texts([e for e in examples if isinstance(e, TextExample)], total)
