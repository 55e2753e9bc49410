"""DoRA (arXiv 2402.09353): a length for each row of the matrix, and a low-rank update of the rows' directions.

Legend: r rank, s scaling, V = W + s B A, m lengths.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwkv_rlhf.layers.adaptation import Adaptation
from rwkv_rlhf.layers.adapters.lora import LoRA
from rwkv_rlhf.layers.linear import StorageSpec

SMALLEST = 1e-12  # a row of zeros has no direction: it stays zero
COLUMN_EXTRA = 1e-6  # what the program of the per-column variant adds to its norms


class DoRA(LoRA):
    """y = m / |V| * (x W^T + s (drop(x) A^T) B^T), a norm |V| and a length m = `lora_M` for each row (out,).

    The norm is a constant to autograd (section 4.3 of the paper). With dropout the training output is, as in the
    authors' program and in PEFT, x W^T + (m / |V| - 1) drop(x) W^T + m / |V| * s drop(x) A^T B^T.

    |V|^2 = |W|^2 + 2 s <W A^T, B> + s^2 <B A A^T, B> for each row, so that only W A^T is computed anew: a product as
    of r more tokens, and one more unpacking. |W|^2 is computed once; where no gradient is asked for, as in chat and
    validation, so is |V|.

    An older program has a norm and a length for each column, `lora_M` (1, in): see `per_column`.
    """

    tensors = (*LoRA.tensors, "lora_M")
    lora_M: nn.Parameter
    squares: Tensor  # |W|^2 of each row, or of each column

    def __init__(self, in_features: int, out_features: int, adaptation: Adaptation) -> None:
        super().__init__(in_features, out_features, adaptation)
        self.register_buffer("squares", torch.empty(out_features, device="meta"), persistent=False)
        self._remembered: tuple[tuple[object, ...], Tensor] | None = None

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        return super().tensor_shapes() | {"lora_M": (self.out_features,)}

    def first_values(self, spec: StorageSpec) -> Mapping[str, Tensor]:
        return {**super().first_values(spec), "lora_M": self._measure(1, spec.master)}

    def adopt_form(self, tensors: Mapping[str, Tensor]) -> None:
        if "lora_M" in tensors and tensors["lora_M"].dim() == 2 and self.by_row:
            self.per_column()

    def per_column(self) -> None:
        """Change, before its tensors are loaded, into the variant with one length for each column, `lora_M` (1, in).

        V = W + s B A, y = (x * m / (|V| + 1e-6)) V^T with the norms of the columns; no dropout.
        """
        lengths = self._measure(0, self.lora_A.dtype)
        self.lora_M = nn.Parameter(lengths, requires_grad=self.lora_M.requires_grad)

    def _measure(self, dim: int, dtype: torch.dtype) -> Tensor:
        """Measure the frozen matrix along `dim`; returns the lengths that leave it as it is."""
        self.squares = torch.linalg.vector_norm(self.dense(), dim=dim, dtype=dtype).detach().square_()
        self._remembered = None
        lengths = self.squares.sqrt()  # as _norms makes them, so that their quotient is exactly 1
        return lengths if dim else lengths.add_(COLUMN_EXTRA).view(1, -1)

    @property
    def by_row(self) -> bool:
        """Whether `lora_M` is (out,), not the (1, in) of the older program."""
        return self.lora_M.dim() == 1

    @torch.no_grad()
    def _norms(self, dtype: torch.dtype, remember: bool) -> Tensor:
        """|V| of each row (out,), or of each column + 1e-6 (1, in), in the dtype of `squares`; products in `dtype`."""
        a: Tensor = self.lora_A
        b: Tensor = self.lora_B
        key = (dtype, a.device, id(a), a._version, id(b), b._version) if remember else ()
        if remember and self._remembered is not None and self._remembered[0] == key:
            return self._remembered[1]
        dense, wide, s = self.dense(dtype), self.squares.dtype, self.adaptation.scaling
        if self.by_row:
            cross = (dense @ a.to(dtype).t()).to(wide)
            a, b = a.to(wide), b.to(wide)
            mixed, square = (cross * b).sum(1), ((b @ (a @ a.t())) * b).sum(1)
        else:
            cross = (b.to(dtype).t() @ dense).to(wide)
            a, b = a.to(wide), b.to(wide)
            mixed, square = (cross * a).sum(0), (((b.t() @ b) @ a) * a).sum(0)
        norms = (self.squares + 2 * s * mixed + s**2 * square).clamp_(min=0).sqrt_()
        norms = norms.clamp_(min=SMALLEST) if self.by_row else norms.add_(COLUMN_EXTRA).view(1, -1)
        self._remembered = (key, norms) if remember else None
        return norms

    def train(self, mode: bool = True) -> DoRA:
        self._remembered = None  # optimizers may write to tensors without a trace
        return super().train(mode)

    def merged(self) -> Tensor:
        direction = super().merged()
        lengths = self.lora_M.detach().float()
        if self.by_row:
            norms = torch.linalg.vector_norm(direction, dim=1).clamp_(min=SMALLEST)
            return direction.mul_((lengths / norms).view(-1, 1))
        return direction.mul_(lengths / (torch.linalg.vector_norm(direction, dim=0) + COLUMN_EXTRA))

    def forward(self, x: Tensor) -> Tensor:
        # a scale near 1 in bfloat16 could not follow small steps: it is applied in float32
        remember = not (self.training or torch.is_grad_enabled() or torch.is_inference_mode_enabled())
        scale = self.lora_M.to(self.squares.dtype) / self._norms(x.dtype, remember)
        if not self.by_row:
            x = (x * scale).to(x.dtype)
            return self.updated(self.base(x), x)
        if not (self.training and self.adaptation.dropout):
            return (self.updated(self.base(x), x) * scale).to(x.dtype)
        dropped = F.dropout(x, self.adaptation.dropout)
        whole, part = self.base(torch.stack([x, dropped])).unbind()  # one unpacking for both
        return (self.updated(part, dropped) * scale - part + whole).to(x.dtype)
