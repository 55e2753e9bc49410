"""Which example comes when: orders that are functions of a position, and the optimizer steps cut from them.

Nothing here has a state to save: position k gives the same example in a run that was killed and resumed as in one that
was not, and on any number of ranks the positions are shared out without overlap.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from rwkv_rlhf.data.batch import (
    Batch,
    JudgedPair,
    PairBatch,
    PairExample,
    RatedBatch,
    RatedExample,
    TextBatch,
    TextExample,
    pack_judged,
    pack_pairs,
    pack_rated,
    pack_texts,
)
from rwkv_rlhf.data.joined_documents import ContextWarmup, shorten

Sample = TextExample | PairExample | list[TextExample]  # a list: documents that run as one row


class Examples(Protocol):
    """Anything with a length, samples by index, and a cheap count of what each trains."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...
    def trained(self, index: int) -> int: ...


class Order(Protocol):
    """position (0, 1, 2, ... without end) -> index of an example."""

    def __call__(self, position: int) -> int: ...


class Shuffled:
    """One seeded permutation for each pass over n examples, without replacement."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed = _at_least_one(n), seed
        self._passes: OrderedDict[int, np.ndarray] = OrderedDict()

    def __call__(self, position: int) -> int:
        turn, offset = divmod(position, self.n)
        if turn not in self._passes:
            while len(self._passes) >= 2:  # a step may straddle two passes
                self._passes.popitem(last=False)
            self._passes[turn] = np.random.default_rng([self.seed, turn]).permutation(self.n)
        return int(self._passes[turn][offset])


class Sequential:
    """The examples in file order, over and over."""

    def __init__(self, n: int):
        self.n = _at_least_one(n)

    def __call__(self, position: int) -> int:
        return position % self.n


class RandomSlices:
    """Uniform draws with replacement: the tradition's sampling of a token stream."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed = _at_least_one(n), seed

    def __call__(self, position: int) -> int:
        return int(np.random.default_rng([self.seed, position]).integers(self.n))


class MagicPrime:
    """The stateless permutation of RWKV-LM: (f * k^3) mod p with k = position + 1, f = floor(p (sqrt5 - 1) / 2).

    p = 2 mod 3 makes cubing a permutation of 0..p-1, so p positions meet every index once. In Python integers: k^3
    leaves 64 bits at k = 2.1 million.
    """

    def __init__(self, p: int):
        if not is_prime(p) or p % 3 != 2:
            raise ValueError(f"--magic_prime {p} is not a prime that is 2 mod 3")
        self.p = self.n = p
        # isqrt keeps f exact where a float product would round
        self.factor = (math.isqrt(5 * p * p) - p) // 2

    def __call__(self, position: int) -> int:
        k = position + 1
        return self.factor * k**3 % self.p


def _at_least_one(n: int) -> int:
    if n < 1:
        raise ValueError("there is no example to train on")
    return n


_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def is_prime(n: int) -> bool:
    """Miller-Rabin with the twelve smallest primes, which is exact below 3.3e24."""
    if n < 2:
        return False
    for small in _WITNESSES:
        if n % small == 0:
            return n == small
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for witness in _WITNESSES:
        x = pow(witness, odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def magic_prime(tokens: int, ctx_len: int) -> int:
    """The largest prime that is 2 mod 3 and not above floor(tokens / ctx_len) - 1; 0 when there is none."""
    for n in range(tokens // ctx_len - 1, 1, -1):
        if n % 3 == 2 and is_prime(n):
            return n
    return 0


def check_magic_prime(p: int, tokens: int, ctx_len: int) -> int:
    """`p`, or the largest legal prime when p is 0.

    Raises:
        ValueError: no prime fits, p is no prime that is 2 mod 3, or p does not fit the corpus (0.9 < p / slots <= 1).
    """
    slots, best = (tokens - 1) // ctx_len, magic_prime(tokens, ctx_len)
    if not best:
        raise ValueError(
            f"{tokens} tokens are too few for slices of --ctx_len {ctx_len}: at least {3 * ctx_len} tokens are needed"
        )
    if p == 0 or p == best:
        return best
    if not is_prime(p) or p % 3 != 2:
        raise ValueError(f"--magic_prime {p} is not a prime that is 2 mod 3; {best} fits this corpus (0 finds it)")
    if not 0.9 * slots < p <= slots:
        raise ValueError(f"--magic_prime {p} does not fit {slots} slices of --ctx_len {ctx_len}; {best} does")
    return p


class Steps:
    """Whole optimizer steps over examples in a given order.

    Step s takes accumulate * world * micro_bsz samples from position s * that on; micro-batch a of rank r takes the
    micro_bsz samples from (a * world + r) * micro_bsz on. A sample is one example, or a list of text examples.

    Args:
        examples: what to draw from. order: position -> index.
        micro_bsz, accumulate: samples per micro-batch and micro-batches per step and rank.
        rank, world: this process, of how many.
        warmup: most inputs of a sample at each step (text only); None = samples are never shortened.
    """

    def __init__(
        self,
        examples: Examples,
        order: Order,
        micro_bsz: int,
        accumulate: int,
        rank: int = 0,
        world: int = 1,
        warmup: ContextWarmup | None = None,
    ):
        for flag, value in (("micro_bsz", micro_bsz), ("accumulate_grad_batches", accumulate)):
            if value < 1:
                raise ValueError(f"--{flag} {value}: must be at least 1")
        assert 0 <= rank < world
        _at_least_one(len(examples))
        self.examples, self.order, self.warmup = examples, order, warmup
        self.micro_bsz, self.accumulate, self.rank, self.world = micro_bsz, accumulate, rank, world
        self._total = (-1, 0.0)

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step, over micro-batches and ranks."""
        return self.accumulate * self.world * self.micro_bsz

    def _positions(self, k: int) -> range:
        step, part = divmod(k, self.accumulate)
        first = step * self.samples_per_step + (part * self.world + self.rank) * self.micro_bsz
        return range(first, first + self.micro_bsz)

    def indices(self, k: int) -> list[int]:
        """Indices of the samples in micro-batch k, for messages and replay."""
        return [self.order(position) for position in self._positions(k)]

    def _texts(self, sample: Sample, step: int) -> list[TextExample]:
        """The documents of a sample of text, as long as this step has them."""
        assert not isinstance(sample, PairExample)
        documents = sample if isinstance(sample, list) else [sample]
        if self.warmup is None or self.warmup.done(step):
            return documents
        return shorten(documents, self.warmup(step))

    def _indices_of_step(self, step: int) -> list[int]:
        first = step * self.samples_per_step
        return [self.order(position) for position in range(first, first + self.samples_per_step)]

    def step_total(self, step: int) -> float:
        """Trained tokens (or pairs) of optimizer step `step`, over micro-batches and ranks; at least 1.

        Without a trained token the step's loss and gradient are 0, not 0 / 0.
        """
        if self._total[0] != step:
            indices = self._indices_of_step(step)
            if self.warmup is None or self.warmup.done(step):
                count = sum(self.examples.trained(index) for index in indices)
            else:
                count = sum(text.trained() for index in indices for text in self._texts(self.examples[index], step))
            self._total = (step, float(max(1, count)))
        return self._total[1]

    def micro_batch(self, k: int) -> Batch:
        """The k-th micro-batch of this rank, counted from the very start of training."""
        step = k // self.accumulate
        samples, total = [self.examples[index] for index in self.indices(k)], self.step_total(step)
        if rated := [sample for sample in samples if isinstance(sample, RatedExample)]:
            return self._rated(k, rated, total)
        if judged := [sample for sample in samples if isinstance(sample, JudgedPair)]:
            return pack_judged(judged, total)
        if pairs := [sample for sample in samples if isinstance(sample, PairExample)]:
            return pack_pairs(pairs, total)
        return pack_texts([text for sample in samples for text in self._texts(sample, step)], total)

    def _rated(self, k: int, rated: Sequence[RatedExample], total: float) -> RatedBatch:
        """Rated answers; the step's first micro-batch carries what the whole step's divergence is estimated from."""
        step, part = divmod(k, self.accumulate)

        def examples(indices: Sequence[int]) -> list[RatedExample]:
            found = [self.examples[index] for index in indices]
            return [example for example in found if isinstance(example, RatedExample)]

        good = sum(1 for example in examples(self._indices_of_step(step)) if example.good)
        mine = range(k, k + self.accumulate) if part == 0 else ()
        return pack_rated(rated, total, good, [examples(self.indices(one)) for one in mine])


class MixedSteps:
    """Pairs and, in the same micro-batches, general text; each keeps its own order and total.

    Args:
        pairs, general: with equal micro_bsz, accumulate, rank and world.
    """

    def __init__(self, pairs: Steps, general: Steps):
        self.pairs, self.general = pairs, general
        self.examples, self.samples_per_step = pairs.examples, pairs.samples_per_step

    def indices(self, k: int) -> list[int]:
        """Indices of the pairs in micro-batch k."""
        return self.pairs.indices(k)

    def micro_batch(self, k: int) -> PairBatch:
        """The k-th micro-batch: pairs, with text under `general`."""
        pairs, general = self.pairs.micro_batch(k), self.general.micro_batch(k)
        assert isinstance(pairs, PairBatch) and isinstance(general, TextBatch)
        return replace(pairs, general=general)
