"""Context without limit: chunks must give exactly what one long pass gives, or long documents train something else."""

import pytest
import torch

from src.data.batch import PairExample, TextExample, pack_pairs, pack_texts
from src.losses.tokens import token_scores
from src.model import VERSIONS
from src.training.context import Pieces, piecewise
from src.training.forward import pair_hidden, text_hidden
from tests.test_model import build, random_tensors

WEIGHTS = torch.Generator()


def texts(*lengths):
    generator = torch.Generator().manual_seed(4)
    return pack_texts([TextExample(torch.randint(300, (n,), generator=generator).numpy()) for n in lengths])


def pairs():
    generator = torch.Generator().manual_seed(5)
    draw = lambda n: torch.randint(300, (n,), generator=generator).tolist()  # noqa: E731
    return pack_pairs([PairExample(draw(p), draw(c), draw(r)) for p, c, r in ((9, 4, 7), (1, 3, 2), (5, 12, 1))])


def gradients(model, value):
    model.zero_grad()
    value.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def weigh(parts):
    generator = torch.Generator().manual_seed(6)
    return sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum() for x in parts)


def scorer(model, targets):
    def score(hidden, here):
        scores = token_scores(model.head, hidden, targets[here], want_mean=True, want_max=True)
        return scores.logp, scores.mean_logp, scores.max_logit

    return score


def text_pieces(batch, length):
    pieces = Pieces(length)
    pieces.add_row(batch.tokens, batch.starts)
    return pieces


def pair_pieces(batch, length):
    pieces = Pieces(length)
    ends = pieces.add_row(batch.prompts, batch.prompt_starts, keep=True, scored=False)
    pieces.add_row(batch.answers, batch.starts, begin=[slot for slot in ends for _ in range(2)])
    return pieces


def compare(model, whole, parts, limit):
    for one, two in zip(whole, parts, strict=True):
        assert torch.allclose(one, two, rtol=limit, atol=limit)
    want, got = gradients(model, weigh(whole)), gradients(model, weigh(parts))
    assert want.keys() == got.keys() and len(want) > 3
    for name, grad in want.items():
        scale = grad.abs().max().clamp_min(1e-3)
        assert float((grad - got[name]).abs().max() / scale) <= limit, name


@pytest.mark.parametrize("length", [1, 5, 7, 100])
@pytest.mark.parametrize("version", VERSIONS)
def test_packed_documents_in_chunks_equal_one_pass(version, length):
    model = build(random_tensors(version, n_layer=2), torch.float64)
    batch = texts(8, 1, 2, 14, 3)
    score = scorer(model, batch.targets)
    whole = score(text_hidden(model, batch), slice(None))
    compare(model, whole, piecewise(model, text_pieces(batch, length), score), 1e-10)


@pytest.mark.parametrize("length", [1, 4, 100])
@pytest.mark.parametrize("version", VERSIONS)
def test_pairs_in_chunks_equal_one_pass(version, length):
    """Prompts run once and are forked; the empty prompt begins anew."""
    model = build(random_tensors(version, n_layer=2), torch.float64)
    batch = pairs()
    score = scorer(model, batch.targets)
    whole = score(pair_hidden(model, batch), slice(None))
    compare(model, whole, piecewise(model, pair_pieces(batch, length), score), 1e-10)
