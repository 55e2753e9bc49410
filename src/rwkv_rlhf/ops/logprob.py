"""Row-wise pieces of log-softmax: what a loss needs of a block of logits, and the block's gradient, written in place.

`naive` is plain PyTorch on any device and dtype; `cpu` is cuda/cpu/logprob.cpp, one pass over a row in float32
arithmetic without a float32 copy of bfloat16 logits.

Legend: n rows (tokens), V vocabulary.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_rlhf.ops import cpu
from rwkv_rlhf.ops.backends import choose
from rwkv_rlhf.precision import wide_dtype

# The twin widens so many logits at a time (16 MiB in float32; on a GPU, where each operation must be worth its launch,
# 128), so that bfloat16 chunks never have a full wide copy.
BLOCK_ELEMENTS, BLOCK_ON_GPU = 1 << 22, 1 << 25


class RowStats(NamedTuple):
    """Of each row: log-sum-exp, the target's logit, sum and maximum of the logits (float32; float64 of float64), and
    the maximum's index (int64; some index of it where several logits tie)."""

    lse: Tensor
    target_logit: Tensor
    logit_sum: Tensor
    max_logit: Tensor
    argmax: Tensor


def row_stats(logits: Tensor, targets: Tensor, backend: str = "auto", *, checked: bool = False) -> RowStats:
    """Statistics of each row of `logits` (n,V), any float dtype; `targets` (n,) int64 in [0, V). No gradient.

    log p(target) = target_logit - lse; the mean over the vocabulary of log p = logit_sum / V - lse.
    Raises ValueError for a target outside the vocabulary, unless the targets are `checked` (a GPU is waited for).
    """
    assert logits.dim() == 2 and targets.shape == logits.shape[:1], (logits.shape, targets.shape)
    name, _ = choose("logprob", logits.device, logits.dtype, tuple(logits.shape), backend)
    if name == "cpu":
        return _host_stats(logits, targets)
    if not checked:
        check_range(targets, logits.shape[1])
    if name == "triton":
        from rwkv_rlhf.ops.triton import logprob as kernels  # importing Triton takes a second

        return RowStats(*kernels.row_stats(logits, targets))
    wide = wide_dtype(logits.dtype)
    n = logits.shape[0]
    lse, target, total, top = (logits.new_empty(n, dtype=wide) for _ in range(4))
    argmax = torch.empty_like(targets)
    for part in _blocks(logits):
        block = logits[part].to(wide)
        top[part], argmax[part] = block.max(dim=1)
        target[part] = block.gather(1, targets[part, None])[:, 0]
        total[part] = block.sum(dim=1)
        lse[part] = torch.logsumexp(block, dim=1)
    return RowStats(lse, target, total, top, argmax)


def row_grad_(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    g_logp: Tensor,
    g_mean: Tensor,
    argmax: Tensor,
    g_max: Tensor,
    backend: str = "auto",
) -> Tensor:
    """Overwrite `logits` (n,V) with the gradient of a loss with respect to them, and return it.

    With p = exp(logits - lse) and a row's upstream gradients of log p(target), of the vocabulary's mean log p and of
    the largest logit: d = g_logp * (onehot(target) - p) + g_mean * (1/V - p) + g_max * onehot(argmax).
    `targets`, `argmax` (n,) int64; the others (n,) in the dtype that `row_stats` returned.
    """
    assert logits.dim() == 2 and targets.shape == logits.shape[:1], (logits.shape, targets.shape)
    name, _ = choose("logprob", logits.device, logits.dtype, tuple(logits.shape), backend)
    if name == "cpu" and logits.stride(1) == 1:
        vectors = [x.contiguous() for x in (targets, lse, g_logp, g_mean, argmax, g_max)]
        kinds = [(x.shape, x.dtype) for x in vectors]
        index, number = (targets.shape, torch.int64), (targets.shape, torch.float32)
        if kinds != [index, number, number, number, index, number]:
            raise ValueError(f"row_grad_: each row needs two int64 indices and four float32 numbers, not {kinds}")
        sizes = (*logits.shape, logits.stride(0))
        cpu.call("logprob", "rwkv_row_grad", logits.dtype, [logits, *vectors], sizes)
        return logits
    if name == "triton":
        from rwkv_rlhf.ops.triton import logprob as kernels

        return kernels.row_grad_(logits, targets, lse, g_logp, g_mean, argmax, g_max)
    for part in _blocks(logits):
        block = logits[part].to(lse.dtype)
        block.sub_(lse[part, None]).exp_().mul_(-(g_logp[part] + g_mean[part])[:, None])
        block.add_((g_mean[part] / logits.shape[1])[:, None])
        block.scatter_add_(1, targets[part, None], g_logp[part, None])
        block.scatter_add_(1, argmax[part, None], g_max[part, None])
        logits[part] = block.to(logits.dtype)
    return logits


def check_range(tokens: Tensor, vocabulary: int, what: str = "token id") -> None:
    """Raises ValueError, naming `what`, for a token of any shape outside the vocabulary."""
    if tokens.numel():
        low, high = torch.stack(tokens.aminmax()).tolist()
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            raise ValueError(f"{what} {wrong} is outside the model's vocabulary of {vocabulary}")


def _host_stats(logits: Tensor, targets: Tensor) -> RowStats:
    """`row_stats` by the C++ kernel, which looks at the range of the targets itself."""
    if targets.dtype != torch.int64 or not targets.is_cpu:
        raise ValueError(f"targets must be int64 on the CPU, not {targets.dtype} on {targets.device}")
    dense = logits if logits.stride(1) == 1 else logits.contiguous()
    lse = torch.empty(len(targets), dtype=torch.float32)
    target_logit, logit_sum, max_logit = (torch.empty_like(lse) for _ in range(3))
    found = RowStats(lse, target_logit, logit_sum, max_logit, torch.empty(len(targets), dtype=torch.int64))
    tensors, sizes = (dense, targets.contiguous(), *found), (*logits.shape, dense.stride(0))
    try:
        cpu.call("logprob", "rwkv_row_stats", logits.dtype, tensors, sizes)
    except RuntimeError:
        check_range(targets, logits.shape[1])
        raise
    return found


def _blocks(logits: Tensor) -> Iterator[slice]:
    elements = BLOCK_ON_GPU if logits.is_cuda else BLOCK_ELEMENTS
    step = max(1, elements // max(1, logits.shape[1]))
    for start in range(0, logits.shape[0], step):
        yield slice(start, start + step)
