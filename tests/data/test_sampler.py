"""Orders and steps: every example once a pass, on any number of ranks, the same after a resume."""

from collections import Counter

import numpy as np
import pytest

from rwkv_rlhf.data.batch import PairExample, TextExample
from rwkv_rlhf.data.sampler import (
    MagicPrime,
    RandomSlices,
    Sequential,
    Shuffled,
    Steps,
    check_magic_prime,
    is_prime,
    magic_prime,
)


class Numbered:
    """n documents; document i holds i % 3 + 1 trained tokens, its first token is i."""

    def __init__(self, n, masked=False):
        self.n, self.masked = n, masked

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        tokens = np.full(i % 3 + 2, i)
        return TextExample(tokens, np.ones(len(tokens), dtype=bool) if self.masked else None)

    def trained(self, i):
        return i % 3 + 1


def test_every_example_once_a_pass():
    """The older programs drew with replacement and called it an epoch."""
    order = Shuffled(7, seed=3)
    passes = [[order(p) for p in range(start, start + 7)] for start in (0, 7, 14)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert passes[0] != passes[1]
    again = Shuffled(7, seed=3)
    assert [again(p) for p in range(20, -1, -1)][::-1] == [i for one in passes for i in one]
    assert [Shuffled(7, seed=4)(p) for p in range(7)] != passes[0]
    assert [Sequential(3)(p) for p in range(5)] == [0, 1, 2, 0, 1]


def test_random_slices_are_a_function_of_the_position():
    """So a resumed run goes on with the slices that the other would have seen."""
    draws = [RandomSlices(10, 5)(p) for p in range(2000)]
    assert draws[1500] == RandomSlices(10, 5)(1500)
    counts = Counter(draws)
    assert set(counts) == set(range(10))
    assert min(counts.values()) > 120


def test_the_magic_permutation():
    """Every slot exactly once in p positions, by the formula of RWKV-LM."""
    p = magic_prime(1000, 10)
    assert p == 89  # 97 = 1 mod 3 and 98, 99 are no primes
    order = MagicPrime(p)
    assert sorted(order(k) for k in range(p)) == list(range(p))
    factor = int(p * (5**0.5 - 1) / 2)
    assert [order(k) for k in range(5)] == [(factor * (k + 1) ** 3) % p for k in range(5)]


def test_the_magic_permutation_of_a_huge_corpus():
    """k^3 leaves 64 bits; in Python integers it stays right."""
    p = magic_prime(332 * 10**9, 4096)
    assert p % 3 == 2
    assert is_prime(p)
    order = MagicPrime(p)
    near = [order(k) for k in range(p - 1000, p)]
    assert len(set(near)) == 1000
    assert order(p - 1) == 0
    assert order(p) == order(0)


def test_primes_against_a_sieve():
    """A composite `prime` would leave slots out and repeat others."""
    sieve = [n for n in range(2000) if n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))]
    assert [n for n in range(2000) if is_prime(n)] == sieve
    for tokens in range(1, 400):
        want = max((n for n in sieve if n % 3 == 2 and n <= tokens // 7 - 1), default=0)
        assert magic_prime(tokens, 7) == want


def test_a_given_magic_prime_is_checked():
    """A prime for another corpus or ctx_len trains on a part of the data only."""
    assert check_magic_prime(0, 1000, 10) == check_magic_prime(89, 1000, 10) == 89
    for wrong, message in ((88, "not a prime"), (97, "2 mod 3"), (83, "does not fit"), (101, "does not fit")):
        with pytest.raises(ValueError, match=f"--magic_prime {wrong} .*{message}.*89"):
            check_magic_prime(wrong, 1000, 10)
    with pytest.raises(ValueError, match="at least 30 tokens"):
        check_magic_prime(0, 29, 10)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_a_step_without_overlap(world):
    """Each rank drew the same samples in the tradition; here the union is one pass, and all ranks know the total."""
    examples = Numbered(24)
    seen, totals = Counter(), {}
    for rank in range(world):
        steps = Steps(examples, Shuffled(24, 1), micro_bsz=2, accumulate=2, rank=rank, world=world)
        for k in range(24 // (2 * world)):
            batch = steps.micro_batch(k)
            seen.update(batch.tokens[batch.starts[:-1]].tolist())
            totals.setdefault(k // 2, set()).add(batch.total)
    assert seen == dict.fromkeys(range(24), 1)
    assert all(len(total) == 1 for total in totals.values())
    assert sum(total.pop() for total in totals.values()) == sum(examples.trained(i) for i in range(24))


def test_micro_batches_do_not_depend_on_what_was_asked_before():
    """Resumable: micro-batch 17 of a fresh object is the one of a run that got there."""
    first, second = (Steps(Numbered(10), Shuffled(10, 1), 3, 2) for _ in range(2))
    batches = [first.micro_batch(k) for k in range(20)]
    again = second.micro_batch(17)
    assert again.tokens.tolist() == batches[17].tokens.tolist()
    assert again.total == batches[17].total
    assert second.indices(17) == [second.order(p) for p in (51, 52, 53)]
    step = [batches[k] for k in (16, 17)]
    assert sum(int((b.targets >= 0).sum()) for b in step) == step[0].total == step[1].total


def test_pairs_count_as_one():
    """The step's total is its number of pairs."""

    class Pairs(list):
        def trained(self, i):
            return 1

    steps = Steps(Pairs([PairExample([1], [2], [3])] * 5), Sequential(5), 2, 3, rank=1, world=2)
    assert steps.micro_batch(0).total == 12.0


def test_mistakes_are_named():
    """A step of nothing is refused with its flag."""
    with pytest.raises(ValueError, match="--micro_bsz 0"):
        Steps(Numbered(3), Sequential(3), 0, 1)
    with pytest.raises(ValueError, match="no example"):
        Steps(Numbered(0), lambda p: 0, 1, 1)
