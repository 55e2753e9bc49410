"""MiSS (arXiv 2409.15371, as in the PEFT library): the update repeats one r-wide strip across the inputs.

Legend: r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwkv_rlhf.layers.adaptation import Adaptation, RankError
from rwkv_rlhf.layers.linear import Linear, StorageSpec


class MiSS(Linear):
    """y = x W^T + (sum of the r-wide pieces of drop(x)) miss, with `miss` (r, out), zero at first. No scale.

    Input i is updated by row i mod r of `miss`; r need not divide the number of inputs.
    """

    tensors = ("miss",)

    def __init__(self, in_features: int, out_features: int, adaptation: Adaptation, device=None, dtype=None) -> None:
        super().__init__(in_features, out_features, device, dtype)
        self.adaptation = adaptation
        self.miss = nn.Parameter(torch.empty(adaptation.rank, out_features, device=device))

    @staticmethod
    def rank_of(miss: Tensor) -> int:
        """The rank, from the first of `tensors`."""
        return miss.shape[0]

    @classmethod
    def wrap(cls, linear: Linear, adaptation: Adaptation) -> MiSS:
        """An adapter for the shape of `linear`, on the meta device. Raises RankError for r above the inputs."""
        if adaptation.rank > linear.in_features:
            raise RankError(f"rank {adaptation.rank} is more than the {linear.in_features} inputs of the matrix")
        return cls(linear.in_features, linear.out_features, adaptation, device="meta")

    def load_weight(self, weight: Tensor, spec: StorageSpec) -> None:
        super().load_weight(weight, spec)
        self.miss = nn.Parameter(torch.zeros(self.miss.shape, device=spec.device, dtype=spec.master))

    def merged(self) -> Tensor:
        rows = torch.arange(self.in_features, device=self.miss.device) % self.adaptation.rank
        return super().merged() + self.miss.detach().float()[rows].t()

    def forward(self, x: Tensor) -> Tensor:
        y, rank = self.base(x), self.adaptation.rank
        whole = F.dropout(F.pad(x, (0, -self.in_features % rank)), self.adaptation.dropout, self.training)
        pieces = whole.unflatten(-1, (-1, rank)).sum(-2)
        return torch.addmm(y.reshape(-1, self.out_features), pieces.reshape(-1, rank), self.miss.to(x.dtype)).view(
            y.shape
        )
