"""The distillation loss against plain formulas over full logits in float64; its scores against the definition.

Legend: T tokens, C width, V vocabulary, K teacher's logits per token.
"""

import math

import pytest
import torch
from torch import nn

from rwkv_rlhf.data.batch import IGNORE
from rwkv_rlhf.losses import LOSSES
from rwkv_rlhf.losses.distill import distillation, divergence, softened
from rwkv_rlhf.losses.tokens import RequiredStats, token_scores
from rwkv_rlhf.settings.config import Config
from tests.support.heads import CHUNKS, HEADS, TARGETS, C, V, gradients, hidden_states
from tests.support.loss_cases import text_batch

K = 4


def teacher_rows(k=K, dtype=torch.float64):
    """A teacher's logits of every position: (all of them, the k largest, their tokens, log-sum-exp)."""
    full = 2 * torch.randn(len(TARGETS), V, dtype=dtype)
    values, indices = full.topk(k, dim=1)
    return full, values, indices, full.logsumexp(1)


def batch_of(targets, values, indices, lse=None):
    return text_batch(targets, top_values=values, top_indices=indices, top_lse=lse)


def config_of(**changes):
    return Config(**({"head_chunk": 4, "l2wrap": False, "smoothing": 0.1, "temperature": 2.0, "alpha": 0.3} | changes))


def plain_loss(logits, targets, values, indices, lse, c):
    """The formulas of the module's docstring written with probabilities, position by position."""
    total = torch.zeros((), dtype=torch.float64)
    for row, target in enumerate(targets.tolist()):
        if target == IGNORE:
            continue
        p = logits[row].exp() / logits[row].exp().sum()
        ce = -(1 - c.smoothing) * p[target].log() - c.smoothing * p.log().mean()
        student = p[indices[row]]
        teacher = (values[row] - lse[row]).exp() if c.kd_tail else values[row].exp()
        if c.kd_tail:
            student, teacher = (torch.cat([x, (1 - x.sum())[None]]) for x in (student, teacher))
        s, t = (x ** (1 / c.temperature) / (x ** (1 / c.temperature)).sum() for x in (student, teacher))
        m = (s + t) / 2
        kl = {
            "forward": (t * (t / s).log()).sum(),
            "reverse": (s * (s / t).log()).sum(),
            "js": ((t * (t / m).log()).sum() + (s * (s / m).log()).sum()) / 2,
        }[c.kd]
        total = total + c.alpha * ce + (1 - c.alpha) * c.temperature**2 * kl
    return total


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("kind", HEADS)
def test_gathered_scores_and_gradients_equal_full_logits(kind, chunk):
    """Scores at the teacher's tokens come through chunks; a wrong one trains towards another teacher. The target, the
    largest logit and doubled tokens among the K included."""
    head, hidden = HEADS[kind](), hidden_states()
    at = torch.randint(V, (len(TARGETS), K))
    at[0, 1], at[1, 0] = TARGETS[0], at[1, 1]
    mix, weights = torch.randn(3, len(TARGETS), dtype=torch.float64), torch.randn(len(TARGETS), K, dtype=torch.float64)
    stats = RequiredStats(mean=True, max=True)
    found = token_scores(head, hidden, TARGETS, stats, gather=at, head_chunk=chunk)
    tokens, picked = found[:3], found.gathered
    same = token_scores(head, hidden, TARGETS, stats, head_chunk=chunk)
    assert found.log_square is None and same.gathered is None
    for a, b in zip(tokens, same[:3], strict=True):
        assert torch.equal(a, b)
    trained = (TARGETS != IGNORE)[:, None]
    logits = head(hidden)
    truth = logits.log_softmax(1).gather(1, at) * trained
    torch.testing.assert_close(picked, truth, rtol=1e-12, atol=1e-12)
    value = (weights * picked).sum() + sum((m * s).sum() for m, s in zip(mix, tokens))
    logp = logits.log_softmax(1)
    mask = trained[:, 0].double()
    wanted = (
        (weights * truth).sum()
        + (mix[0] * mask * logp.gather(1, TARGETS.clamp_min(0)[:, None])[:, 0]).sum()
        + (mix[1] * mask * logp.mean(1)).sum()
        + (mix[2] * mask * logits.amax(1)).sum()
    )
    for a, b in zip(gradients(value, head, hidden), gradients(wanted, head, hidden), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_masked_positions_do_not_reach_the_head():
    """Prompts cost nothing, whatever stands there: NaN in the hidden states, tokens that do not exist."""
    head, seen, at = HEADS["plain"](), [], torch.randint(V, (len(TARGETS), K))
    head.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    masked = (TARGETS == IGNORE)[:, None]
    hidden = torch.where(masked, torch.nan, hidden_states())
    scores = token_scores(head, hidden, TARGETS, gather=torch.where(masked, 10**6, at), head_chunk=3)
    assert sum(seen) == int((TARGETS != IGNORE).sum())
    assert bool(torch.isfinite(scores.gathered).all()) and bool((scores.gathered[masked[:, 0]] == 0).all())
    assert bool((scores.logp[masked[:, 0]] == 0).all())


def test_gradcheck_of_gathered_scores():
    """Finite differences know no algebra: they judge the formula itself."""
    head, hidden, at = HEADS["lora"](), hidden_states(), torch.randint(V, (len(TARGETS), K))
    params = [p for p in head.parameters() if p.requires_grad]
    scores = lambda h, *_: token_scores(head, h, TARGETS, gather=at, head_chunk=4).gathered  # noqa: E731
    assert torch.autograd.gradcheck(scores, (hidden, *params))


@pytest.mark.parametrize("kd", ["forward", "reverse", "js"])
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.0), (2.0, 0.5), (0.7, 1.0)])
def test_the_loss_and_its_gradient_are_the_plain_formula(kd, tail, temperature, alpha):
    """Value and gradient in float64, masked positions included, for every divergence and the tail bucket."""
    head, hidden = HEADS["plain"](), hidden_states()
    _, values, indices, lse = teacher_rows()
    c = config_of(kd=kd, kd_tail=tail, temperature=temperature, alpha=alpha)
    value, metrics = LOSSES["distillation"].from_hidden(head, hidden, batch_of(TARGETS, values, indices, lse), c)
    truth = plain_loss(head(hidden), TARGETS, values, indices, lse, c)
    torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(metrics["loss"], alpha * metrics["ce"] + (1 - alpha) * metrics["kd"])
    for a, b in zip(gradients(value, head, hidden), gradients(truth, head, hidden), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_student_that_agrees_has_no_divergence():
    """0 at the teacher itself, above 0 elsewhere, and symmetric for js only."""
    full, values, indices, lse = teacher_rows()
    picked = full.log_softmax(1).gather(1, indices)
    other = torch.randn(len(TARGETS), V, dtype=torch.float64).log_softmax(1).gather(1, indices)
    for tail in (False, True):
        for kd in ("forward", "reverse", "js"):
            same = distillation(picked, values, lse, temperature=2.0, kd=kd, tail=tail)
            assert float(same.abs().max()) < 1e-12
            assert bool((distillation(other, values, lse, temperature=2.0, kd=kd, tail=tail) > 0).all())
    a, b = softened(values, 2.0, False), softened(other, 2.0, False)
    torch.testing.assert_close(divergence(a, b, "js"), divergence(b, a, "js"))
    torch.testing.assert_close(divergence(a, b, "forward"), divergence(b, a, "reverse"))


def test_a_worked_example():
    """Two tokens, by hand: teacher 3:1, student 1:1, temperature 1: KL = 3/4 ln 3/2 + 1/4 ln 1/2."""
    picked = torch.tensor([[0.2, 0.2]]).log()
    values = torch.tensor([[math.log(3.0), 0.0]])
    want = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(distillation(picked, values, temperature=1.0)) == pytest.approx(want, rel=1e-6)
    # teacher .6 and .2, so .2 elsewhere; student .2, .2, so .6 elsewhere
    want = 0.6 * math.log(3) + 0.2 * math.log(1) + 0.2 * math.log(1 / 3)
    found = distillation(picked, values, torch.tensor([math.log(5.0)]), temperature=1.0, tail=True)
    assert float(found) == pytest.approx(want, rel=1e-6)


def test_the_whole_vocabulary_leaves_no_rest_and_no_nan():
    """K = V, and a student as sure as float32 can be: the tail bucket is empty, not infinite."""
    _, values, _, lse = teacher_rows(V, torch.float32)
    sure = torch.full((len(TARGETS), V), -200.0)
    sure[:, 0] = 0.0
    sure.requires_grad_()
    for kd in ("forward", "reverse", "js"):
        value = distillation(sure, values, lse, temperature=2.0, kd=kd, tail=True).sum()
        value.backward()
        assert bool(torch.isfinite(value)) and bool(torch.isfinite(sure.grad).all())


def test_all_masked_and_bfloat16_are_harmless():
    """A micro-batch of prompts only: loss and gradient 0; bf16 hidden states: float32 scores near the float64 ones."""
    head, hidden = HEADS["plain"](), hidden_states()
    _, values, indices, lse = teacher_rows()
    nothing = torch.full_like(TARGETS, IGNORE)
    value, _ = LOSSES["distillation"].from_hidden(
        head, hidden, batch_of(nothing, values, indices, lse), config_of(l2wrap=True)
    )
    assert value.item() == 0 and all(bool((g == 0).all()) for g in gradients(value, head, hidden))
    small = nn.Linear(C, V, bias=False, dtype=torch.bfloat16)
    hidden = hidden.detach().bfloat16().requires_grad_()
    batch = batch_of(TARGETS, values.float(), indices, lse.float())
    value, _ = LOSSES["distillation"].from_hidden(small, hidden, batch, config_of())
    wide = nn.Linear(C, V, bias=False, dtype=torch.float64)
    wide.weight.data.copy_(small.weight.data)
    far = hidden.detach().double().requires_grad_()
    truth, _ = LOSSES["distillation"].from_hidden(wide, far, batch_of(TARGETS, values, indices, lse), config_of())
    torch.testing.assert_close(value.double(), truth, rtol=1e-2, atol=0)
    found, exact = gradients(value, small, hidden)[0].double(), gradients(truth, wide, far)[0]
    assert float((found - exact).norm() / exact.norm()) < 2e-2


def test_mistakes_are_named():
    """A tail without the mass it needs, a token that the student does not have, an unknown divergence."""
    _, values, indices, _ = teacher_rows()
    with pytest.raises(ValueError, match="--kd_tail 1 needs the log-sum-exp"):
        distillation(values, values, None, tail=True)
    with pytest.raises(ValueError, match="--kd sideways is unknown"):
        distillation(values, values, kd="sideways")
    with pytest.raises(ValueError, match="teacher's token id 13 is outside the model's vocabulary of 13"):
        token_scores(HEADS["plain"](), hidden_states(), TARGETS, gather=indices.clone().fill_(V))
