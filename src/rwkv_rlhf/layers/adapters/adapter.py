"""What every adapter is and must do. Each adapter has a file of its own in this folder, and a line in `ADAPTERS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from rwkv_rlhf.layers.adaptation import Adaptation
from rwkv_rlhf.layers.linear import Matrix, StorageSpec


class Adapter(Matrix):
    """A frozen matrix and a few small tensors that change what it does. Base of `class X(Adapter, Linear)`.

    A subclass names its tensors, gives their shapes and first values (`tensor_shapes`, `first_values`), applies them
    (`forward`) and merges them into the matrix (`merged`). Three things must hold on every storage:
    with the first values it does what the matrix alone does; `forward(x)` is `x @ merged().T`; only its tensors learn.

    tensors: names of its parameters; the rank of a checkpoint is read from the first one.
    factor_b: those that LoRA+ (arXiv 2402.12354) trains at a higher rate.
    initial: buffers outside the state dict, one for each of `tensors`, in which it keeps what it began with, if it
    cannot be merged without.
    """

    adaptation: Adaptation
    rank_axis = 0  # of the first of `tensors`

    def __init__(self, in_features: int, out_features: int, adaptation: Adaptation) -> None:
        """On the meta device, until `load_weight`. Raises RankError when the matrix cannot have this rank."""
        super().__init__(in_features, out_features, device="meta")
        self.adaptation = adaptation
        self.check_rank()
        for name, shape in self.tensor_shapes().items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))

    @classmethod
    def wrap(cls, layer: Matrix, adaptation: Adaptation) -> Self:
        """An adapter for a matrix of the shape of `layer`. Raises RankError."""
        return cls(layer.in_features, layer.out_features, adaptation)

    @classmethod
    def rank_of(cls, tensor: Tensor) -> int:
        """The rank, from the first of `tensors`."""
        return tensor.shape[cls.rank_axis]

    def check_rank(self) -> None:
        """Raise RankError when the matrix cannot have this rank. Any rank is legal unless a subclass says otherwise."""

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each of `tensors`."""
        raise NotImplementedError

    def first_values(self, spec: StorageSpec) -> Mapping[str, Tensor]:
        """First value of each of `tensors`: the layer then does what its matrix, already loaded, does alone."""
        return {name: torch.zeros(shape) for name, shape in self.tensor_shapes().items()}

    def load_weight(self, weight: Tensor, spec: StorageSpec) -> None:
        """Hold the matrix `weight` as `spec` says, frozen, and give the adapter's own tensors their first values."""
        super().load_weight(weight, spec)
        for name, value in self.first_values(spec).items():
            setattr(self, name, nn.Parameter(value.to(device=spec.device, dtype=spec.master)))

    def on_meta(self, spec: StorageSpec) -> None:
        super().on_meta(spec)
        for name, shape in self.tensor_shapes().items():
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=spec.master, device="meta")))
        for buffer, name in zip(self.initial, self.tensors, strict=False):
            self.register_buffer(buffer, getattr(self, name).detach(), persistent=False)

    def adopt_form(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the form that the adapter's `tensors` of a checkpoint have, where an older program had another."""

    def merged(self) -> Tensor:
        """The matrix with the adapter merged into it, as `Matrix.merged`."""
        raise NotImplementedError
