"""PiSSA (arXiv 2404.02948): the factors begin as the principal part of the matrix, and the rest of it is frozen.

Legend: r rank, V vocabulary, C width, m x n shape of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rwkv_rlhf.layers.adaptation import RankError
from rwkv_rlhf.layers.adapters.lora import LoRA, LoRAEmbedding, LowRank
from rwkv_rlhf.layers.linear import StorageSpec
from rwkv_rlhf.precision import wide_dtype

OVERSAMPLING = 8  # directions beyond r that the search follows, as Halko et al. advise
ROWS = 512  # rows whose residual is computed at once, in float64


def principal_factors(
    weight: Tensor, rank: int, iterations: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """(m, n) -> A = sqrt(S) V^T (r, n) and B = U sqrt(S) (m, r) of its rank-r singular values, float32.

    Randomised subspace iteration (arXiv 0909.4061, algorithms 4.4 and 5.1): `iterations` passes over W W^T with r + 8
    directions, drawn on the CPU from `generator`, so that every device begins with the same numbers.
    """
    weight = weight.detach().float()
    width = min(rank + OVERSAMPLING, *weight.shape)
    probe = torch.randn(weight.shape[1], width, generator=generator).to(weight.device)
    left = torch.linalg.qr(weight @ probe).Q
    for _ in range(iterations):
        right = torch.linalg.qr(weight.t() @ left).Q
        left = torch.linalg.qr(weight @ right).Q
    # left^T W = R^T right^T: the decomposition of a small matrix gives that of the large one
    right, small = torch.linalg.qr(weight.t() @ left)
    u, s, vh = torch.linalg.svd(small.t())
    u, s, v = left @ u[:, :rank], s[:rank], right @ vh[:rank].t()
    # a pair of vectors may change its sign with the number of threads: the largest of each v is made positive
    root = s.sqrt() * v.gather(0, v.abs().argmax(0, keepdim=True)).sign()
    return (v * root).t().contiguous(), u * root


def residual(weight: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """W - B A (m, n) in `dtype`. Summed in float64: the order of sums, which is the machine's, rounds away."""
    rest = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    a = a.double()
    for begin in range(0, len(weight), ROWS):
        rows = slice(begin, begin + ROWS)
        rest[rows] = weight[rows].double() - b[rows].double() @ a
    return rest


class PrincipalFactors(LowRank):
    """LoRA's factors begun as the principal part B0 A0 of the matrix; R = W - B0 A0 is frozen (and packed).

    A0 and B0 are kept as the buffers `lora_A_init` (r, in) and `lora_B_init` (out, r): R, and so the merged matrix,
    cannot be made again without them. No scale, no dropout.
    """

    initial = ("lora_A_init", "lora_B_init")
    lora_A_init: Tensor
    lora_B_init: Tensor

    def check_rank(self) -> None:
        rank, shape = self.adaptation.rank, self.shape
        if rank > min(shape):
            raise RankError(f"rank {rank} is more than the {shape[0]} x {shape[1]} matrix has: at most {min(shape)}")

    def first_values(self, spec: StorageSpec) -> Mapping[str, Tensor]:
        return {"lora_A": self.lora_A_init.clone(), "lora_B": self.lora_B_init.clone()}

    def load_weight(self, weight: Tensor, spec: StorageSpec) -> None:
        weight = self.as_weight(weight.detach().to(spec.device))
        for name, factor in zip(self.initial, self._factors(weight, spec)):
            self.register_buffer(name, factor.detach().to(device=spec.device, dtype=spec.master), persistent=False)
        rest = residual(weight, self.lora_A_init, self.lora_B_init, wide_dtype(spec.dtype))
        if spec.share:  # the rest is no tensor of the file: where those are used as they lie there, it stays unrounded
            spec = replace(spec, share=False, dtype=torch.promote_types(spec.dtype, torch.float32))
        super().load_weight(self.as_weight(rest).contiguous(), spec)

    def _factors(self, weight: Tensor, spec: StorageSpec) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of the matrix (out, in): those of `spec.initial`, or computed.

        A matrix of zeros, as a new RWKV has them, has no principal part, and two factors of zeros would never learn: it
        begins as LoRA does.
        """
        if spec.initial is not None:
            a, b = (spec.initial[name] for name in self.initial)
            shapes = self.tensor_shapes()
            assert a.shape == shapes["lora_A"] and b.shape == shapes["lora_B"], (a.shape, b.shape)
            return a, b
        a, b = principal_factors(weight, self.adaptation.rank, spec.svd_niter, spec.generator)
        if not b.any():
            a, b = super().first_values(spec).values()
        return a, b


class PiSSA(PrincipalFactors, LoRA):
    """y = x R^T + (x A^T) B^T."""


class PiSSAEmbedding(PrincipalFactors, LoRAEmbedding):
    """Row t of R + (B A)^T."""
