"""Small batches of every kind of loss, and the probabilities that the formulas of the tests begin with.

Legend: T tokens, n pairs, A answer tokens, C width, V vocabulary.
"""

from dataclasses import fields

import torch
from torch import nn

from rwkv_rlhf.data.batch import IGNORE, AnswerBatch, JudgedBatch, PairBatch, RatedBatch, TextBatch
from rwkv_rlhf.data.policy_batch import PolicyBatch
from rwkv_rlhf.layers.linear import Linear
from rwkv_rlhf.losses import LOSSES
from rwkv_rlhf.losses.tokens import TokenScores
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.implementations import load
from rwkv_rlhf.settings.tables import LOSSES as FACTS

C, V = 5, 11
CHUNKS = (1, 3, 1000)
# chosen_0 (one token not trained), reject_0, chosen_1, reject_1 (a single token); token 0 is a real token.
STARTS = torch.tensor([0, 4, 6, 11, 12])
ANSWERS = torch.tensor([3, IGNORE, 0, 7, 10, 0, 1, 2, 3, 4, 0, 9])
TEXT = torch.tensor([3, IGNORE, 0, 7, 10, 0, IGNORE, 2])
REFERENCE = torch.tensor([[-7.0, -5.5], [-11.0, -2.0]], dtype=torch.float64)
MARGINS = torch.tensor([0.5, 2.0], dtype=torch.float64)
PAIR_LOSSES = [name for name in LOSSES if FACTS[name].data == "pairs" and FACTS[name].predicts]


def head_and_hidden(rows, dtype=torch.float64):
    return nn.Linear(C, V, bias=False, dtype=dtype), torch.randn(rows, C, dtype=dtype, requires_grad=True)


def config(**changes):
    """The settings that losses read, at the program's defaults."""
    return Config(**({"smoothing": 0.0, "kd_tail": True} | changes))


def text_batch(targets=TEXT, **teacher):
    return TextBatch(targets.clamp(min=0), targets, torch.tensor([0, len(targets)]), float(len(targets)), **teacher)


def taught_batch():
    """With the three largest logits of a teacher that is sure of other tokens."""
    values, indices = torch.randn(len(TEXT), V, dtype=torch.float64).topk(3, dim=1)
    return text_batch(top_values=values, top_indices=indices, top_lse=values.logsumexp(1) + 0.5)


def answers_of(targets, starts, per_prompt):
    """The token tensors of answers to prompts of one token."""
    no_prompts = torch.zeros((len(starts) - 1) // per_prompt + 1, dtype=torch.int64)
    return torch.zeros(0, dtype=torch.int64), no_prompts, targets.clamp(min=0), targets, starts


def pair_batch(targets=ANSWERS, starts=STARTS, reference=REFERENCE):
    return PairBatch(*answers_of(targets, starts, 2), reference=reference, total=float(len(starts) // 2))


def judged_batch(starts=STARTS, margins=MARGINS):
    """Pairs that are judged as wholes: no token of them is predicted."""
    targets = torch.full((int(starts[-1]),), IGNORE)
    return JudgedBatch(*answers_of(targets, starts, 2), reference=None, total=float(len(margins)), margins=margins)


def scalar_head(name):
    """What `from_hidden` must be given beside the head: the loss's scalar head, with a weight that is not zero."""
    if not FACTS[name].scalar_head:
        return None
    head = Linear(C, 1).double()
    torch.nn.init.normal_(head.weight)
    return head


def rated_batch(kl=0.4, targets=ANSWERS, starts=STARTS, reference=REFERENCE, good=(True, False, False, True)):
    """The answers as rated ones: good, bad, bad, good."""
    return RatedBatch(
        *answers_of(targets, starts, 1),
        reference=reference.flatten(),
        total=float(len(good)),
        good=torch.tensor(good),
        good_total=float(sum(good)),
        kl=torch.tensor(kl, dtype=reference.dtype),
    )


def policy_batch(targets=ANSWERS, starts=STARTS, kind=PolicyBatch, **numbers):
    """The answers as four samples, two to each prompt, with numbers (A,) that nothing is at its limit of."""
    draw = torch.Generator().manual_seed(5)
    own = {field.name for field in fields(AnswerBatch)} | {"trained_total"}
    known = {
        name: (0.5 if name == "reference_logp" else 0.0) - 2 + torch.randn(len(targets), generator=draw).double()
        for name in (field.name for field in fields(kind) if field.name not in own)
    }
    return kind(
        *answers_of(targets, starts, 2),
        reference=None,
        total=float(len(starts) - 1),
        trained_total=float((targets != IGNORE).sum()),
        **(known | numbers),
    )


def batch_of(name):
    """A batch of the kind that the loss takes."""
    if FACTS[name].data == "pairs" and not FACTS[name].predicts:
        return judged_batch()
    if FACTS[name].data == "prompts":
        return policy_batch(kind=load(FACTS[name].algorithm).batch)
    return {"text": taught_batch, "pairs": pair_batch, "rated": rated_batch}[FACTS[name].data]()


def scored_answers(*sums_and_counts):
    """(scores of tokens, targets, starts) of answers of which each has a sum of log-probabilities and a token count."""
    logp = torch.cat([torch.full((count,), total / count) for total, count in sums_and_counts])
    counts = torch.tensor([0, *(count for _, count in sums_and_counts)])
    return TokenScores(logp), torch.zeros(len(logp), dtype=torch.int64), counts.cumsum(0)


def probabilities(head, hidden):
    """softmax by its definition: e^z / sum e^z."""
    z = hidden @ head.weight.T
    return z, z.exp() / z.exp().sum(1, keepdim=True)


def token_logps(head, hidden):
    """One list per answer of the log-probabilities of its trained tokens, token by token."""
    _, p = probabilities(head, hidden)
    answers = []
    for begin, end in zip(STARTS[:-1].tolist(), STARTS[1:].tolist()):
        answers.append([p[t, ANSWERS[t]].log() for t in range(begin, end) if ANSWERS[t] != IGNORE])
    return answers


def same_as(found, truth, head, hidden):
    """Equal values, and equal gradients of the head's weight (or none, of both) and of the hidden states, to 1e-6."""
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-6)
    got = torch.autograd.grad(found, (head.weight, hidden), allow_unused=True)
    want = torch.autograd.grad(truth, (head.weight, hidden), allow_unused=True)
    for a, b in zip(got, want):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
