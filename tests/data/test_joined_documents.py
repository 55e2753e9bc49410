"""Several documents as one sample, and samples that grow with the step."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from rwkv_rlhf.data.batch import TextExample, TopK, pack_texts
from rwkv_rlhf.data.joined_documents import ContextWarmup, JoinedDocuments, shorten
from rwkv_rlhf.data.sampler import Sequential, Steps

K = 3


class Sized:
    """n documents; document i holds i % 4 + 2 tokens, the first of which is i."""

    def __init__(self, n, masked=False, teacher=False):
        self.n, self.masked, self.teacher = n, masked, teacher

    def __len__(self):
        return self.n

    def length(self, i):
        return i % 4 + 2

    def trained(self, i):
        return i % 4 + 1

    def __getitem__(self, i):
        tokens = np.arange(self.length(i)) + 10 * i
        mask = np.ones(len(tokens), dtype=bool) if self.masked else None
        rows = np.repeat(tokens[:, None].astype(np.float32), K, 1)
        return TextExample(tokens, mask, TopK(rows, rows.astype(np.int64), rows[:, 0]) if self.teacher else None)


@pytest.mark.parametrize("reset_state", [True, False])
@pytest.mark.parametrize("seed", [None, 1])
def test_joined_documents_fill_a_sample_and_none_is_lost(reset_state, seed):
    """At most so many documents to a sample, at most ctx_len inputs; the tradition cut off the rest."""
    sized, ctx_len = Sized(30, masked=True, teacher=True), 9
    joined = JoinedDocuments(sized, 3, ctx_len, seed, reset_state)
    members = [joined.indices(i) for i in range(len(joined))]
    assert sorted(i for group in members for i in group) == list(range(30))
    if seed is None:
        assert [i for group in members for i in group] == list(range(30))
    for index, group in enumerate(members):
        batch = pack_texts(joined[index])
        assert len(batch.tokens) <= ctx_len and len(group) <= 3
        assert joined.trained(index) == batch.total == int((batch.targets >= 0).sum())
        assert len(batch.starts) == (len(group) + 1 if reset_state else 2)
        assert batch.top_values[:, 0].tolist() == batch.tokens.tolist()
    for one, two in pairwise(members):  # no sample ends while the next document would have fitted
        size = sum(sized.length(i) - reset_state for i in [*one, two[0]]) - (not reset_state)
        assert len(one) == 3 or size > ctx_len
    whole = Steps(joined, Sequential(len(joined)), 2, 2)
    assert whole.micro_batch(0).total == sum(joined.trained(i) for i in range(4))


def test_samples_grow_with_the_step_and_the_total_follows():
    """A straight line by the step's number: a run that goes on from a save has the lengths of one that did not stop."""
    warmup = ContextWarmup(2, 12, 5)
    assert [warmup(step) for step in range(8)] == [2, 4, 6, 8, 10, 12, 12, 12]
    sized = Sized(40, masked=True)
    joined = JoinedDocuments(sized, 4, 12)
    steps = Steps(joined, Sequential(len(joined)), 1, 2, warmup=warmup)
    for step in range(7):
        parts = [steps.micro_batch(2 * step + a) for a in (0, 1)]
        full = [len(pack_texts(joined[(2 * step + a) % len(joined)]).tokens) for a in (0, 1)]
        assert [len(part.tokens) for part in parts] == [min(size, warmup(step)) for size in full]
        assert parts[0].total == parts[1].total == sum(int((part.targets >= 0).sum()) for part in parts)
    fresh = Steps(joined, Sequential(len(joined)), 1, 2, warmup=warmup)
    assert fresh.micro_batch(9).tokens.tolist() == steps.micro_batch(9).tokens.tolist()
    assert [len(e.tokens) for e in shorten(joined[0], 4)] == [2, 3, 2]


def test_a_step_without_a_trained_token_counts_as_one():
    """0 / 0 would be a NaN in the log and in every weight."""
    nothing = TextExample(np.array([1, 2, 3]), np.zeros(3, dtype=bool))

    class Masked(Sized):
        def trained(self, i):
            return 0

        def __getitem__(self, i):
            return nothing

    batch = Steps(Masked(3), Sequential(3), 1, 1).micro_batch(0)
    assert batch.total == 1.0 == pack_texts([nothing]).total
    assert pack_texts([TextExample(np.array([7]))]).starts.tolist() == [0, 0]
    assert torch.equal(batch.targets, torch.full((2,), -100))
