"""PiSSA (arXiv 2404.02948): the factors begin as the principal part of the matrix, and the rest of it is frozen.

Legend: r rank, V vocabulary, C width, m x n shape of a matrix.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from rwkv_rlhf.layers.adaptation import Adaptation, RankError
from rwkv_rlhf.layers.adapters.lora import LoRA, LoRAEmbedding, first_factors
from rwkv_rlhf.layers.linear import Embedding, Linear, StorageSpec
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


def _split(weight: Tensor, rank: int, spec: StorageSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(W - B A, A, B) of (m, n), the factors in the master dtype: those of `spec.initial` or computed.

    A matrix of zeros, as a new RWKV has them, has no principal part, and two factors of zeros would never learn: it
    begins as LoRA does.
    """
    weight = weight.detach().to(spec.device)
    if spec.initial is None:
        a, b = principal_factors(weight, rank, spec.svd_niter, spec.generator)
        if not b.any():
            a, b = first_factors(weight.shape[1], len(weight), rank, spec)
    else:
        a, b = (spec.initial[name] for name in PiSSA.initial)
        assert a.shape == (rank, weight.shape[1]) and b.shape == (len(weight), rank), (a.shape, b.shape)
    a, b = (factor.detach().to(device=spec.device, dtype=spec.master) for factor in (a, b))
    dtype = wide_dtype(spec.dtype)
    return residual(weight, a, b, dtype), a, b


def _unshared(spec: StorageSpec) -> StorageSpec:
    """The residual is no tensor of the file: where those are used as they lie there, it stays unrounded."""
    dtype = torch.promote_types(spec.dtype, torch.float32) if spec.share else spec.dtype
    return replace(spec, share=False, dtype=dtype)


def _begin(layer: PiSSA | PiSSAEmbedding, a: Tensor, b: Tensor) -> None:
    for name, factor in zip(("lora_A", "lora_B"), (a, b)):
        layer.register_buffer(f"{name}_init", factor, persistent=False)
        setattr(layer, name, nn.Parameter(factor.clone()))


def _check_rank(rank: int, shape: tuple[int, int]) -> None:
    if rank > min(shape):
        raise RankError(f"rank {rank} is more than the {shape[0]} x {shape[1]} matrix has: at most {min(shape)}")


class PiSSA(LoRA):
    """y = x R^T + (x A^T) B^T, R = W - B0 A0 frozen (and packed), A0 and B0 the initial factors. No scale, no dropout.

    A0 and B0 are the buffers `lora_A_init` (r, in) and `lora_B_init` (out, r): R, and so the merged matrix, cannot be
    made again without them.
    """

    initial = ("lora_A_init", "lora_B_init")

    @classmethod
    def wrap(cls, linear: Linear, adaptation: Adaptation) -> PiSSA:
        _check_rank(adaptation.rank, (linear.out_features, linear.in_features))
        return super().wrap(linear, adaptation)

    def load_weight(self, weight: Tensor, spec: StorageSpec) -> None:
        rest, a, b = _split(weight, self.adaptation.rank, spec)
        Linear.load_weight(self, rest, _unshared(spec))
        _begin(self, a, b)


class PiSSAEmbedding(LoRAEmbedding):
    """Row t of R + (B A)^T, R = W - (B0 A0)^T: as `PiSSA` with the table (V, C) transposed."""

    initial = PiSSA.initial

    @classmethod
    def wrap(cls, embedding: Embedding, adaptation: Adaptation) -> PiSSAEmbedding:
        _check_rank(adaptation.rank, (embedding.num_embeddings, embedding.embedding_dim))
        return super().wrap(embedding, adaptation)

    def load_weight(self, weight: Tensor, spec: StorageSpec) -> None:
        rest, a, b = _split(weight.t(), self.adaptation.rank, spec)
        Embedding.load_weight(self, rest.t().contiguous(), _unshared(spec))
        _begin(self, a, b)
