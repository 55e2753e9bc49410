"""Whether a model gives numbers: a start model with NaN in it trains nothing, and its scores poison what is kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.settings.exit_status import Failure


class NotFinite(Failure):
    """Scores are no numbers, though every weight is one."""


def broken_tensor(model: nn.Module) -> str:
    """The name of the first tensor with NaN or infinity in it, "" for none; also "" where ranks hold parts of them.

    A packed matrix has the name that it has in the file.
    """
    if ranks.is_sharded(model):
        return ""
    tensors = {n: x.detach() for n, x in (*model.named_parameters(), *model.named_buffers()) if x.is_floating_point()}
    whole = torch.stack([tensor.float().isfinite().all() for tensor in tensors.values()]).tolist()  # waits once
    name = next((name for name, finite in zip(tensors, whole) if not finite), "")
    return f"{name.split('.store.')[0]}.weight" if ".store." in name else name


def refuse_not_finite(what: str, scores: Tensor, model: nn.Module) -> None:
    """Raises ValueError when `scores` (what) are no numbers because a tensor of `model` is not, else NotFinite."""
    if bool(torch.isfinite(scores).all()):
        return
    if name := broken_tensor(model):
        raise ValueError(f"{what}: not a number, because {name} of the model holds nan or inf: the file is damaged")
    raise NotFinite(f"{what}: not a number, though every weight is one: try --precision fp32")
