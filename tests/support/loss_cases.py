"""Small batches of every kind of loss, and the probabilities that the formulas of the tests begin with.

Legend: T tokens, n pairs, A answer tokens, C width, V vocabulary.
"""

from types import SimpleNamespace

import torch
from torch import nn

from rwkv_rlhf.losses import LOSSES
from rwkv_rlhf.losses.tokens import IGNORE

C, V = 5, 11
CHUNKS = (1, 3, 1000)
# chosen_0 (one token not trained), reject_0, chosen_1, reject_1 (a single token); token 0 is a real token.
STARTS = torch.tensor([0, 4, 6, 11, 12])
ANSWERS = torch.tensor([3, IGNORE, 0, 7, 10, 0, 1, 2, 3, 4, 0, 9])
TEXT = torch.tensor([3, IGNORE, 0, 7, 10, 0, IGNORE, 2])
REFERENCE = torch.tensor([[-7.0, -5.5], [-11.0, -2.0]], dtype=torch.float64)
PAIR_LOSSES = sorted(name for name, loss in LOSSES.items() if loss.kind == "pairs")


def head_and_hidden(rows, dtype=torch.float64):
    return nn.Linear(C, V, bias=False, dtype=dtype), torch.randn(rows, C, dtype=dtype, requires_grad=True)


def config(**changes):
    """The settings that losses read, at the program's defaults."""
    values = {
        "head_chunk": 1024,
        "l2wrap": None,
        "smoothing": 0.0,
        "dpo_beta": 0.01,
        "dpo_alpha": 0.1,
        "dpo_loss": "sigmoid",
        "dpo_logp": "sum",
        "dpo_label_smoothing": 0.0,
        "orpo_alpha": 0.01,
        "orpo_mode": "mean",
        "temperature": 2.0,
        "alpha": 0.5,
        "kd": "forward",
        "kd_tail": True,
        "simpo_alpha": 0.0,
        "simpo_beta": 2.0,
        "simpo_gamma": 1.0,
        "cpo_alpha": 1.0,
        "cpo_beta": 0.1,
        "kto_beta": 0.1,
        "kto_desirable_weight": 1.0,
        "kto_undesirable_weight": 1.0,
        "wpo_alpha": 0.0,
        "wpo_beta": 0.01,
    }
    return SimpleNamespace(**(values | changes))


def pair_batch():
    return SimpleNamespace(targets=ANSWERS, starts=STARTS, reference=REFERENCE, total=2.0)


def text_batch():
    """With the three largest logits of a teacher that is sure of other tokens."""
    values, indices = torch.randn(len(TEXT), V, dtype=torch.float64).topk(3, dim=1)
    return SimpleNamespace(targets=TEXT, top_values=values, top_indices=indices, top_lse=values.logsumexp(1) + 0.5)


def rated_batch(kl=0.4):
    """The four answers as rated ones: good, bad, bad, good."""
    return SimpleNamespace(
        targets=ANSWERS,
        starts=STARTS,
        reference=REFERENCE.flatten(),
        good=torch.tensor([True, False, False, True]),
        good_total=2.0,
        total=4.0,
        kl=torch.tensor(kl, dtype=torch.float64),
    )


def batch_of(name):
    """A batch of the kind that the loss takes."""
    return {"text": text_batch, "pairs": pair_batch, "rated": rated_batch}[LOSSES[name].kind]()


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
    """Equal values, and equal gradients of the head's weight and of the hidden states, to 1e-6."""
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-6)
    got = torch.autograd.grad(found, (head.weight, hidden))
    want = torch.autograd.grad(truth, (head.weight, hidden))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
