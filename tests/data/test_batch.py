"""Packed batches, compared with batches packed by hand."""

import numpy as np
import pytest
import torch

from rwkv_rlhf.data.batch import (
    IGNORE,
    JudgedPair,
    PairExample,
    TextBatch,
    TextExample,
    Trained,
    glue,
    pack_judged,
    pack_pairs,
    pack_texts,
)


def test_packed_texts():
    """Inputs and targets are shifted by one inside each document and never across; masks sit on targets."""
    first = TextExample(np.array([5, 6, 7, 0], np.uint16), np.array([True, False, True, True]))
    batch = pack_texts([first, TextExample(np.array([8, 9]))])
    assert batch.tokens.tolist() == [5, 6, 7, 8]
    assert batch.targets.tolist() == [IGNORE, 7, 0, 9]
    assert batch.starts.tolist() == [0, 3, 4]
    assert batch.total == 3.0
    assert {t.dtype for t in (batch.tokens, batch.targets, batch.starts)} == {torch.int64}
    assert pack_texts([first], total=10).total == 10.0


def test_a_document_of_one_token_is_harmless():
    """It adds an empty segment and nothing else."""
    batch = pack_texts([TextExample(np.array([5])), TextExample(np.array([6, 7]))])
    assert (batch.tokens.tolist(), batch.targets.tolist(), batch.starts.tolist()) == ([6], [7], [0, 0, 1])
    assert batch.total == 1.0


def test_packed_pairs():
    """The prompt's last token opens both answers; a prompt of one token leaves an empty segment."""
    batch = pack_pairs([PairExample([1, 2, 3], [4, 5], [6], (-1.0, -2.0)), PairExample([7], [8], [9, 0], (-3.0, -4.0))])
    assert batch.prompts.tolist() == [1, 2]
    assert batch.prompt_starts.tolist() == [0, 2, 2]
    assert batch.answers.tolist() == [3, 4, 3, 7, 7, 9]
    assert batch.targets.tolist() == [4, 5, 6, 8, 9, 0]
    assert batch.starts.tolist() == [0, 2, 3, 4, 6]
    assert batch.reference.tolist() == [[-1.0, -2.0], [-3.0, -4.0]]
    assert batch.reference.dtype == torch.float32
    assert batch.total == 2.0


def test_pairs_that_are_judged_keep_their_last_token():
    """A reward model that never reads an answer's last token cannot tell a cut answer from a whole one."""
    pairs = [JudgedPair([1, 2, 3], [4, 5], [6], margin=0.5), JudgedPair([7], [8], [9, 0])]
    batch = pack_judged(pairs, total=4)
    assert (batch.prompts.tolist(), batch.prompt_starts.tolist()) == ([1, 2], [0, 2, 2])
    assert batch.answers.tolist() == [3, 4, 5, 3, 6, 7, 8, 7, 9, 0]
    assert batch.starts.tolist() == [0, 3, 5, 7, 10]
    assert set(batch.targets.tolist()) == {IGNORE}
    assert (batch.margins.tolist(), batch.total, batch.answers_per_prompt()) == ([0.5, 0.0], 4.0, 2)


def test_one_missing_reference_means_none():
    """Half a batch of placeholders must not be used as reference scores."""
    batch = pack_pairs([PairExample([1], [2], [3], (-1.0, -2.0)), PairExample([1], [2], [3])])
    assert batch.reference is None
    assert batch.prompts.dtype == torch.int64
    with pytest.raises(ValueError, match="at least one token"):
        pack_pairs([PairExample([], [2], [3])])


def test_glue_predicts_across_the_joint():
    """--reset_state 0: documents are one row, the first token of the second is a target."""
    row = glue([TextExample(np.array([1, 2])), TextExample(np.array([3, 4]), np.array([False, True]))])
    batch = pack_texts([row])
    assert (batch.tokens.tolist(), batch.targets.tolist()) == ([1, 2, 3], [2, IGNORE, 4])
    assert batch.starts.tolist() == [0, 3]
    assert glue([TextExample(np.array([1, 2])), TextExample(np.array([3]))]).mask is None


def test_to_moves_every_tensor_but_what_the_host_must_know():
    """A tensor left behind fails on a GPU only, starts that go along are waited for: the meta device shows it here."""
    texts = pack_texts([TextExample(np.array([1, 2]))]).to("meta")
    pairs = pack_pairs([PairExample([1], [2], [3])]).to("meta")
    tensors = [(n, v) for batch in (texts, pairs) for n, v in vars(batch).items() if isinstance(v, torch.Tensor)]
    assert len(tensors) == 8
    assert {name for name, tensor in tensors if tensor.is_cpu} == {"starts", "prompt_starts"}
    assert pairs.trained.count == 2 and list(pairs.segments) == [0, 1, 2]


@pytest.mark.parametrize("masked", [(), (0,), (2, 3), (4, 5, 6, 7), range(8)])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_trained_positions_of_chunks_are_those_of_the_whole(masked, size):
    """If this breaks, infinite context trains other tokens on a GPU than on a CPU."""
    targets = torch.arange(8)
    targets[list(masked)] = IGNORE
    batch = TextBatch(torch.arange(8), targets, torch.tensor([0, 8]), 8.0)
    found = []
    for begin in range(0, 8, size):
        span = slice(begin, min(begin + size, 8))
        known, asked = batch.trained.chunk(span), Trained.of(targets[span])
        rows = known.on(torch.device("cpu"))
        assert known.count == asked.count and (rows is None) == (asked.rows is None)
        found += [begin + row for row in (range(span.stop - begin) if rows is None else rows.tolist())]
    assert found == [row for row in range(8) if row not in masked]
    assert batch.having(total=3.0).trained is batch.trained
