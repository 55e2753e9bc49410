"""Reference scores of preference pairs: what the start model thinks of exactly what is trained on.

They are computed on the training kernel before the first step, when the policy still is the start model (adapters at
zero, dense tensors at their first values), so no second model is ever in memory; then cached by the hashes of model,
data and arithmetic.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rwkv_rlhf.checkpoints.tensor_files import read_tensors, write_tensors
from rwkv_rlhf.data.batch import PairExample
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.scoring.evaluation import evaluating, score_pairs
from rwkv_rlhf.scoring.finite import refuse_not_finite

log = logging.getLogger(__name__)


def reference_key(model_hash: str, pairs: Sequence[PairExample], arithmetic: str) -> str:
    """Hash of everything that the scores depend on: the base file, every token of every pair, the arithmetic."""
    digest = hashlib.sha256(f"{model_hash} {arithmetic} {len(pairs)}".encode())
    for pair in pairs:
        for part in (pair.prompt, pair.chosen, pair.reject):
            digest.update(torch.tensor([len(part), *part], dtype=torch.int64).numpy().tobytes())
    return digest.hexdigest()[:24]


def cached_scores(path: Path, pairs: int) -> Tensor | None:
    """(pairs, 2) float32 scores of a cache file; None, with a warning, when it is damaged, and when there is none."""
    if not path.exists():
        return None
    try:
        sums = read_tensors(path)["sums"].float()
        if tuple(sums.shape) == (pairs, 2) and bool(torch.isfinite(sums).all()):
            return sums
    except (ValueError, KeyError) as error:
        log.warning("%s cannot be read (%s)", path, error)
    log.warning("%s is damaged: its scores are computed anew", path)
    return None


def reference_scores(
    model: RWKV,
    pairs: Sequence[PairExample],
    *,
    model_hash: str,
    arithmetic: str,
    folder: Path,
    head_chunk: int,
    chunk: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """(n, 2) float32 summed log-probabilities of (chosen, reject) under `model` as it stands.

    Read from `folder/cache` when the same scores were computed there before; `arithmetic` says how the model's tensors
    are held (storage, masters, device). With `chunk` rows run in chunks of so many tokens, as in training.
    """
    computed = f"{arithmetic} {model.compute_dtype} {model.wkv_backend} {chunk} {model.ways.as_json() or ''}".rstrip()
    key = reference_key(model_hash, pairs, computed)
    path = folder / "cache" / f"reference-{key}.pth"
    found = ranks.broadcast_from_zero(lambda: cached_scores(path, len(pairs)))
    if found is not None:
        log.info("reference scores of %d pairs: from %s", len(pairs), path)
        return found
    log.info("reference scores of %d pairs: computing (kept in %s)", len(pairs), path)
    with evaluating(model):
        sums = score_pairs(model, pairs, head_chunk=head_chunk, chunk=chunk, progress=progress).sums()
    refuse_not_finite("a reference score", sums, model)
    if ranks.is_rank_zero():
        path.parent.mkdir(exist_ok=True)
        write_tensors({"sums": sums}, path)
    return sums
