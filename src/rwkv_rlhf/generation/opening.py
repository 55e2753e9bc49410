"""Opens what a command runs: device and dtype from --strategy, the model from a checkpoint and perhaps an adapter."""

from __future__ import annotations

import logging
from pathlib import Path

from rwkv_rlhf.checkpoints.adapter_files import AdapterFlags
from rwkv_rlhf.checkpoints.loading import BuildOptions, as_trained, load_model
from rwkv_rlhf.checkpoints.merging import load_combined
from rwkv_rlhf.checkpoints.named_model import named_model
from rwkv_rlhf.data.tokenizer import Tokenizer, load_tokenizer
from rwkv_rlhf.host_memory import keep_pages, return_pages
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.ops.product_table import ways_for
from rwkv_rlhf.precision import parse_strategy

log = logging.getLogger(__name__)


def open_model(
    path: str,
    adapter: str,
    strategy: str,
    vocab_file: str,
    *,
    scaling: float | None = None,
    alpha: float | None = None,
    initial_file: str = "",
    cold: str = "",
    quant: str = "none",
) -> tuple[RWKV, Tokenizer]:
    """The frozen model of a checkpoint or of a run's folder, with an adapter laid over it if one is named, and its
    tokenizer.

    `scaling` (alpha / rank) or `alpha` stand in for the sidecar of an adapter that has none; `initial_file` and `cold`
    are PiSSA's initial factors and the cold adapter below, where the sidecar's are not found. `quant`, or the strategy,
    packs the matrices of a model without adapter.
    Raises ValueError for files that are missing, damaged or do not fit each other, and for unknown strategy words.
    """
    choice = parse_strategy(strategy)
    if choice.notice:
        log.info("%s", choice.notice)
    return_pages()
    if path and Path(path).is_dir() and not adapter:
        named = named_model(path)
        path, adapter = str(named.base), str(named.adapter or "")
    quant = storage_of(strategy, quant)
    if adapter:
        if choice.store != "none":
            raise ValueError(
                f"--strategy {strategy!r}: over a model that runs under an adapter matrices stay as in training: merge "
                "the adapter first (python merge.py), or give a strategy of fp32, bf16 or fp16"
            )
        options, flags = BuildOptions(choice.dtype, device=choice.device), AdapterFlags(scaling=scaling, alpha=alpha)
        model, _ = load_combined(path, adapter, options, flags, initial_file=initial_file, cold=cold)
    else:
        layout = as_trained(path, quant)
        model, _ = load_model(path, BuildOptions(choice.dtype, device=choice.device, layout=layout))
    model.requires_grad_(False).eval()
    if choice.device == "cpu":
        keep_pages()
        model.take_ways(ways_for(model.compute_dtype, model.sizes.n_embd))
    return model, load_tokenizer(model.sizes.vocab_size, vocab_file or None)


def storage_of(strategy: str, quant: str) -> str:
    """How the matrices of a model are stored, by --strategy or --quant_mode. Raises ValueError where they differ."""
    store = parse_strategy(strategy).store
    if "none" not in (store, quant) and store != quant:
        raise ValueError(f"--strategy {strategy!r} and --quant_mode {quant}: two storages of the same matrices")
    return quant if store == "none" else store
