"""A model that answers, for the scripts: strategy words -> device and dtype, checkpoint (and adapter) -> model."""

from __future__ import annotations

import logging

import torch

from src.data.tokenizer import Tokenizer, load_tokenizer
from src.layers.placing import Layout
from src.model.checkpoint import load_model, read_tensors
from src.model.rwkv import RWKV
from src.training.allocator import keep_pages, return_pages
from src.training.merging import load_combined

log = logging.getLogger(__name__)

STRATEGY_HELP = "device and precision: cuda or cpu, fp16, bf16 or fp32; auto = GPU in bf16, else CPU in fp32"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.bfloat16}


def parse_strategy(text: str) -> tuple[str, torch.dtype, str]:
    """'cuda fp16' and the like -> (device, dtype of computation, a notice for the user or "").

    Without a GPU `cuda` becomes the CPU, in float32 unless bf16 was asked for: 16-bit products are slow on many CPUs.
    fp16 on a GPU becomes bf16, the 16-bit type that the kernels know. Raises ValueError for other words.
    """
    gpu = torch.cuda.is_available()
    words = (("cuda bf16" if gpu else "cpu fp32") if text == "auto" else text).split()
    device, _, number = words[0].partition(":") if words else ("", "", "")
    precision = words[1] if len(words) > 1 else "fp32"
    legal = device in ("cuda", "cpu") and precision in DTYPES and len(words) <= 2 and (not number or number.isdigit())
    if not legal:
        raise ValueError(
            f"--strategy {text!r}: expected auto, or a device (cuda, cpu) and a precision (fp16, bf16, fp32)"
        )
    if device == "cuda" and not gpu:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        name = "bf16" if precision == "bf16" else "fp32"
        return "cpu", dtype, f"--strategy {text!r}: no GPU is visible here, running on the CPU in {name}"
    if device == "cpu" and precision == "fp16":
        return "cpu", torch.float32, f"--strategy {text!r}: fp16 is not for CPUs, running in fp32"
    notice = f"--strategy {text!r}: computing in bf16" if precision == "fp16" else ""
    return words[0], DTYPES[precision], notice


def as_trained(path: str, quant: str) -> Layout:
    """Small tensors in float32 and matrices packed as `quant`, as training holds them when adapters learn.

    Scores in the same precision are then those of the first training step.
    """
    tensors = read_tensors(path)
    matrices = {name for name, tensor in tensors.items() if name.endswith(".weight") and tensor.dim() == 2}
    packed = {name.removesuffix(".weight") for name in matrices - {"emb.weight"}} if quant != "none" else set()
    return Layout(trained=frozenset(tensors.keys() - matrices), packed=frozenset(packed), store=quant)


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
    """The frozen model of a checkpoint, with an adapter laid over it if one is named, and its tokenizer.

    `scaling` (alpha / rank) or `alpha` speak for an adapter without a sidecar; `initial_file` and `cold` are PiSSA's
    initial factors and the cold adapter below, where the sidecar's are not found. `quant` packs the matrices
    of a model without adapter.
    Raises ValueError for files that are missing, damaged or do not fit each other, and for unknown strategy words.
    """
    device, dtype, notice = parse_strategy(strategy)
    if notice:
        log.info("%s", notice)
    return_pages()
    if adapter:
        said = {"scaling": scaling, "alpha": alpha, "initial_file": initial_file, "cold": cold}
        model = load_combined(path, adapter, compute_dtype=dtype, device=device, **said)[0]
    else:
        model = load_model(path, compute_dtype=dtype, device=device, layout=as_trained(path, quant))[0]
    model.requires_grad_(False).eval()
    if device == "cpu":
        keep_pages()
    return model, load_tokenizer(model.sizes.vocab_size, vocab_file or None)
