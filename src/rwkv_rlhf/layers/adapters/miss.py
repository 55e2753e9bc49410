"""MiSS (arXiv 2409.15371, as in the PEFT library): the update repeats one r-wide strip across the inputs.

Legend: r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwkv_rlhf.layers.adaptation import RankError
from rwkv_rlhf.layers.adapters.adapter import Adapter
from rwkv_rlhf.layers.linear import Linear


class MiSS(Adapter, Linear):
    """y = x W^T + (sum of the r-wide pieces of drop(x)) miss, with `miss` (r, out), zero at first. No scale.

    Input i is updated by row i mod r of `miss`; r need not divide the number of inputs.
    """

    tensors = ("miss",)
    miss: nn.Parameter

    def check_rank(self) -> None:
        if self.adaptation.rank > self.in_features:
            raise RankError(f"rank {self.adaptation.rank} is more than the {self.in_features} inputs of the matrix")

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"miss": (self.adaptation.rank, self.out_features)}

    def merged(self) -> Tensor:
        rows = torch.arange(self.in_features, device=self.miss.device) % self.adaptation.rank
        return self.dense(torch.float32).detach() + self.miss.detach().float()[rows].t()

    def forward(self, x: Tensor) -> Tensor:
        y, rank = self.base(x), self.adaptation.rank
        whole = F.dropout(F.pad(x, (0, -self.in_features % rank)), self.adaptation.dropout, self.training)
        pieces = whole.unflatten(-1, (-1, rank)).sum(-2)
        return torch.addmm(y.reshape(-1, self.out_features), pieces.reshape(-1, rank), self.miss.to(x.dtype)).view(
            y.shape
        )
