"""Bone: each r x r block of the matrix is updated from itself, by one small matrix for each block of inputs.

Blocks W_ab of W, a counting outputs and b inputs: W'_ab = W_ab + W_ab Bone_b + Bone_b. Source: RWKV-PEFT, and
arXiv 2409.15371 (its block-affine form).
Legend: r rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rwkv_rlhf.layers.adaptation import RankError
from rwkv_rlhf.layers.adapters.adapter import Adapter
from rwkv_rlhf.layers.linear import Linear


class Bone(Adapter, Linear):
    """y = x W'^T with `bone` (in / r, r, r), zero at first. Neither scale nor dropout.

    W' is not built: with z_b = Bone_b x_b the outputs of block a are sum_b W_ab (x_b + z_b) + sum_b z_b, that is the
    frozen product of x + z, and one r-vector added to every block of outputs. Forward and backward cost r / out of the
    frozen product each, and no gradient of the size of W is made.
    """

    tensors = ("bone",)
    bone: nn.Parameter
    rank_axis = -1

    def check_rank(self) -> None:
        rank, sides = self.adaptation.rank, self.shape
        if sides[0] % rank or sides[1] % rank:
            raise RankError(
                f"rank {rank} must divide both sides of the {sides[0]} x {sides[1]} matrix, "
                f"so it must divide {math.gcd(*sides)}"
            )

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        rank = self.adaptation.rank
        return {"bone": (self.in_features // rank, rank, rank)}

    def merged(self) -> Tensor:
        weight, bone, rank = self.dense(torch.float32).detach(), self.bone.detach().float(), self.adaptation.rank
        blocks = weight.view(-1, rank, len(bone), rank)  # a, row of a, b, column of b
        return (blocks + torch.einsum("aibk,bkj->aibj", blocks, bone) + bone.transpose(0, 1)).view(weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        rank = self.adaptation.rank
        blocks = x.unflatten(-1, (-1, rank))
        z = torch.einsum("...bi,boi->...bo", blocks, self.bone.to(x.dtype))
        y = self.base(x + z.flatten(-2))
        summed: Tensor = y.unflatten(-1, (-1, rank)) + z.sum(-2).unsqueeze(-2)
        return summed.flatten(-2)
