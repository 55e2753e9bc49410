"""Base files that lack tensors of their model: those begin at initial values (RWKV-LM's --load_partial 1)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_rlhf.checkpoints.loading import OPTIONAL, BuildOptions, block_of, plain_model
from rwkv_rlhf.model.initial import block_tensors, end_tensors
from rwkv_rlhf.model.sizes import Sizes
from rwkv_rlhf.plan import is_new

log = logging.getLogger(__name__)


def completed(
    read: Callable[[], Mapping[str, Tensor]], sizes: Sizes, source: str | Path, seed: int
) -> Callable[[], Mapping[str, Tensor]]:
    """`read`, which opens the base file `source`, with initial values in place of the tensors that it lacks.

    Each missing tensor is named in one warning; the same seed gives the same values. Raises ValueError for versions
    and shapes of which there are no initial values.
    """
    expected = dict(plain_model(sizes, BuildOptions(torch.float32)).named_parameters())
    there = read().keys()
    missing = [name for name in expected if name not in there and name not in OPTIONAL and not is_new(name)]
    if not missing:
        return read
    if sizes.dim_att != sizes.n_embd:
        raise ValueError(
            f"{source} lacks {missing[0]}, and initial values exist for attention as wide as the model only, not for "
            f"{sizes.dim_att} in {sizes.n_embd}"
        )
    values: dict[str, Tensor] = {}
    for block in dict.fromkeys(map(block_of, missing)):
        number = block.removeprefix("blocks.")
        made = block_tensors(sizes, int(number), seed) if number.isdigit() else end_tensors(sizes)
        values |= {name: made[name].reshape(expected[name].shape) for name in missing if block_of(name) == block}
    log.warning("%s lacks %d tensors, which begin at initial values: %s", source, len(missing), ", ".join(missing))
    return lambda: {**read(), **values}
