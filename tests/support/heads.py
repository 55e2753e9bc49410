"""Small heads of every kind, hidden states and targets for them.

Legend: C width, V vocabulary.
"""

import torch
from torch import nn

from rwkv_rlhf.data.batch import IGNORE

C, V = 6, 13


TARGETS = torch.tensor([0, 3, IGNORE, 12, 2, IGNORE, 5, 0, 7])


CHUNKS = (1, 3, 1000)


class LowRankHead(nn.Module):
    """A frozen matrix, two trained factors and dropout: what an adapter looks like from outside."""

    def __init__(self, dtype=torch.float64, dropout=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(V, C, dtype=dtype), requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(2, C, dtype=dtype))
        self.lora_B = nn.Parameter(torch.randn(V, 2, dtype=dtype))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        weight = self.weight.to(x.dtype), self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return x @ weight[0].T + 2.0 * (self.dropout(x) @ weight[1].T) @ weight[2].T


class SavedOutput(nn.Linear):
    """A head whose backward pass needs its own output: a soft cap on the logits."""

    def forward(self, x):
        return torch.tanh(super().forward(x))


def plain(dtype=torch.float64):
    return nn.Linear(C, V, bias=False, dtype=dtype)


HEADS = {
    "plain": plain,
    "frozen": lambda: plain().requires_grad_(False),
    "lora": LowRankHead,
    "bias": lambda: nn.Linear(C, V, dtype=torch.float64),
    "softcap": lambda: SavedOutput(C, V, bias=False, dtype=torch.float64),
}


def hidden_states(dtype=torch.float64):
    return torch.randn(len(TARGETS), C, dtype=dtype, requires_grad=True)


def gradients(value, head, hidden):
    inputs = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    return torch.autograd.grad(value, inputs, allow_unused=True)
