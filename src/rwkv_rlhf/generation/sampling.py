"""From logits to one token of each sequence: penalties, the cut of the distribution, the draw.

Legend: B sequences, V vocabulary, t tokens sampled so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_rlhf.generation.sampling_params import SamplingParams

FIRST_CANDIDATES = 128  # how many likely tokens nucleus sampling sorts before it tries more
BY_LEVELS = 0  # in place of a number of candidates: nothing but the tokens of two levels is sorted
LEVEL_BITS = 14  # by which float32 numbers of one level differ: there are 512 levels between a number and its double
LEVELS = (0x3F800000 >> LEVEL_BITS) + 1  # of the numbers from 1 down to 0
MASK_63 = (1 << 63) - 1


def sequence_seed(seed: int, index: int) -> int:
    """A well-mixed seed for sequence `index` of a run (the finaliser of splitmix64, Steele et al. 2014)."""
    x = (seed * 0x9E3779B97F4A7C15 + (index + 1) * 0xD1B54A32D192ED03) & ((1 << 64) - 1)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
    return (x ^ (x >> 31)) & MASK_63


def penalise(
    logits: Tensor, history: Tensor, first: Tensor, params: SamplingParams, length: Tensor | None = None
) -> Tensor:
    """logits (B, V) float32, history (B, t) sampled ids, first (B, t) bool: first occurrence -> (B, V), the same tensor
    where nothing changes.

    Subtracts presence + frequency * sum_i penalty_decay^(t-1-i) over the occurrences i of each token, and forbids the
    banned. Of row b only the first `length` (B,) int64 ids count, all t if None.
    """
    steps = history.shape[1] if params.penalised else 0
    if not steps and not params.banned:
        return logits
    logits = logits.clone()
    if steps:
        ends = torch.full_like(history[:, 0], steps) if length is None else length
        age = ends[:, None] - 1 - torch.arange(steps, device=logits.device)  # (B, t), below 0 behind the end
        decayed = params.penalty_decay ** age.clamp(min=0).to(logits.dtype)
        weight = params.frequency * decayed + params.presence * first.to(logits.dtype)
        logits.scatter_add_(1, history, -weight * (age >= 0))
    for token in params.banned:  # one by one: a list of ids would be copied to a GPU, which is waited for
        logits[:, token] = float("-inf")
    return logits


def candidate_counts(params: SamplingParams, vocabulary: int, by_levels: bool = False) -> Iterator[int]:
    """How many likely tokens to sort, then how many if those do not reach top_p, and so on; the last ones do.

    `by_levels`: before all are sorted, BY_LEVELS comes, where nothing but top_p cuts.
    """
    limit = min(params.top_k or vocabulary, vocabulary)
    size = min(limit, FIRST_CANDIDATES) if params.top_p < 1 and params.temperature else limit
    by_levels = by_levels and limit == vocabulary
    while size < limit:
        yield size
        if by_levels:
            yield BY_LEVELS
        size = limit if by_levels else 8 * size
    yield limit


class Nucleus(NamedTuple):
    """Of each row the likeliest tokens, likeliest first: probabilities (B, K), 0 where cut, and ids (B, K).

    `enough` (B,) bool: whether they hold all that top_p keeps; more candidates must be sorted where not.
    """

    probs: Tensor
    ids: Tensor
    enough: Tensor


def nucleus(probs: Tensor, top_p: float, candidates: int) -> Nucleus:
    """probs (B, V), cut to the fewest likely tokens whose sum reaches top_p, at least one, out of `candidates`."""
    kept, ids = probs.topk(candidates, dim=1)
    reached = kept.double().cumsum(1)
    before = reached - kept
    return Nucleus(torch.where(before < top_p, kept, torch.zeros_like(kept)), ids, reached[:, -1] >= top_p)


class Picked(NamedTuple):
    """ids (B,) int64; `enough` (B,) bool as of a `Nucleus`, None where nothing was sorted."""

    ids: Tensor
    enough: Tensor | None


def chances(probs: Tensor, likeliest: Tensor, params: SamplingParams) -> Tensor:
    """What the chances of tokens are proportional to, float64: probs (B, n) to the largest of all, likeliest (B, 1)."""
    found = probs.double() / likeliest
    return found if params.temperature == 1 else found ** (1 / params.temperature)


class Members(NamedTuple):
    """Of each row the tokens of one level, likeliest first: ids (B, M) and `chances` (B, M), 0 where top_p cuts.

    all_there (B,) bool: whether the level has no more.
    """

    ids: Tensor
    chances: Tensor
    all_there: Tensor


class ByLevels:
    """The likeliest tokens of probs (B, V), in order, without sorting them: they fall into levels by the upper bits
    of their numbers, likeliest first, and are sorted only within a level."""

    def __init__(self, probs: Tensor, params: SamplingParams) -> None:
        self.probs, self.params, self.likeliest = probs, params, probs.amax(1, keepdim=True)
        bits = probs.view(torch.int32) >> LEVEL_BITS
        self.levels = (LEVELS - 1 - bits.long()).clamp_(0, LEVELS - 1)  # NaN goes anywhere
        self.mass = self._summed(probs.double())
        self.weight = self._summed(chances(probs, self.likeliest, params))

    def _summed(self, numbers: Tensor) -> Tensor:
        """numbers (B, V) float64 -> sums (B, LEVELS + 1) of what lies before each level, and of all."""
        sums = numbers.new_zeros(len(numbers), LEVELS + 1)
        return sums.scatter_add_(1, self.levels + 1, numbers).cumsum(1)

    def members(self, level: Tensor) -> Members:
        """level (B, 1)."""
        count = min(FIRST_CANDIDATES + 1, self.probs.shape[1])
        own = torch.where(self.levels == level, self.probs, torch.zeros_like(self.probs))
        probs, ids = own.topk(count, dim=1)
        before = self.mass.gather(1, level) + probs.double().cumsum(1) - probs
        found = chances(probs, self.likeliest, self.params) * (before < self.params.top_p)
        return Members(ids, found, probs[:, -1] <= 0)

    def pick(self, draws: Tensor) -> Picked:
        """draws (B,) float64."""
        target = torch.full_like(self.mass[:, :1], self.params.top_p)
        last = (torch.searchsorted(self.mass, target) - 1).clamp_(0, LEVELS - 1)  # the level where top_p is reached
        cut = self.members(last)
        total = self.weight.gather(1, last) + cut.chances.sum(1, keepdim=True)
        aim = draws[:, None] * total
        chosen = torch.minimum((torch.searchsorted(self.weight, aim, right=True) - 1).clamp_(0, LEVELS - 1), last)
        found = self.members(chosen)
        reached = self.weight.gather(1, chosen) + found.chances.cumsum(1)
        place = torch.searchsorted(reached, aim, right=True)
        possible = found.chances.gt(0).sum(1, keepdim=True)
        place = torch.minimum(place, (possible - 1).clamp_(min=0))
        return Picked(found.ids.gather(1, place).squeeze(1), cut.all_there & found.all_there)


def pick(logits: Tensor, draws: Tensor, params: SamplingParams, candidates: int | None = None) -> Picked:
    """logits (B, V) float32, draws (B,) float64 in [0, 1) -> one token a row, each from its own row and draw only.

    As in RWKV's own sampler, top_p and top_k cut the distribution first and the temperature is applied to the rest.
    `candidates`: how many likely tokens are sorted for that, one of `candidate_counts`; None for all there are.
    """
    if params.temperature == 0:
        return Picked(logits.argmax(1), None)
    if candidates == BY_LEVELS:
        return ByLevels(torch.softmax(logits, 1), params).pick(draws)
    probs, ids, enough = torch.softmax(logits, 1), None, None
    if params.top_p < 1 or params.top_k:
        most = min(params.top_k or logits.shape[1], logits.shape[1])
        probs, ids, enough = nucleus(probs, params.top_p, candidates or most)
    probs = chances(probs, probs.amax(1, keepdim=True), params)
    reached = probs.cumsum(1)
    aim = draws[:, None] * reached[:, -1:]
    place = torch.searchsorted(reached, aim, right=True)
    # a draw next to 1 may land behind the last token that may be chosen: step back to it
    last = reached.shape[1] - 1 - probs.flip(1).gt(0).to(torch.int8).argmax(1, keepdim=True)
    place = torch.minimum(place, last)
    return Picked((place if ids is None else ids.gather(1, place)).squeeze(1), enough)
