"""How much memory a run takes, part by part, before it takes it.

Legend: T tokens, C width, V vocabulary, m numbers of the largest matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from src.config import Config
from src.layers.pissa import ROWS
from src.layers.placing import Layout, matrices
from src.layers.stores import STORES
from src.losses import LOSSES
from src.training.merging import base_reader, shapes
from src.training.start import Start

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
# bytes beside matrix and packed matrix while one is packed: pieces of 2^20 or 2^22 numbers as a few float32 copies
PACKING = {"nf4": 20 << 20, "fp4": 20 << 20, "int8": 32 << 20, "fp8": 32 << 20}


def weights_by_storage(model: nn.Module) -> dict[str, int]:
    """Bytes of everything that stays in memory with the model: by packed storage or dtype, and what trains."""
    found: Counter[str] = Counter()
    for name, layer in matrices(model):
        if layer.adaptation is not None:
            own = [getattr(layer, part) for part in (*layer.tensors, *layer.initial)]
            found["adapters"] += sum(map(_bytes, own))
        if getattr(layer, "store", None) is not None:
            assert name and layer.store.mode in STORES
            found[f"weights {layer.store.mode}"] += layer.store.bytes()
    adapters = {id(getattr(layer, part)) for _, layer in matrices(model) for part in layer.tensors}
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            trains = ", training" if parameter.requires_grad else ""
            found[f"weights {NAMES.get(parameter.dtype, parameter.dtype)}{trains}"] += _bytes(parameter)
    return dict(found)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def memory_by_part(config: Config, start: Start, tokens: int) -> dict[str, int]:
    """Estimated bytes at the peak of a step over `tokens` tokens, by what they are for.

    Weights are counted; moments and gradients follow from what trains; activations use about 30 values of the width
    per token and layer (one with --grad_cp 1, plus one layer being recomputed). A live teacher counts as its file.
    """
    width = {"bf16": 2, "fp32": 4, "fp64": 8}[config.precision]
    sizes = start.sizes
    trained = sum(p.numel() for p in start.model.parameters() if p.requires_grad)
    per_layer = 30 * tokens * sizes.n_embd * width
    layers = per_layer + (sizes.n_layer - 1) * tokens * sizes.n_embd * width
    rows = min(tokens, config.head_chunk)
    state = sizes.n_layer * sizes.n_embd * sizes.head_size * 4
    teacher = {}
    if config.loss == "distillation":
        logits = 6 * 4 * tokens * config.top_k  # values, indices (8 bytes), the student's scores and their gradients
        teacher["teacher"] = logits + (Path(config.teacher_model).stat().st_size if config.teacher_model else 0)
    return teacher | {
        **weights_by_storage(start.model),
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "activations": layers if config.grad_cp else per_layer * sizes.n_layer,
        "states": 2 * state * config.micro_bsz * (2 if LOSSES[config.loss].kind == "pairs" else 1),
        "head": 2 * rows * sizes.vocab_size * width,
    }


def loading_peak(start: Start) -> int:
    """Estimated bytes of host memory at the peak of loading: the model, one block of the file, and one matrix at work.

    On a GPU the model itself does not count.
    """
    file = shapes(base_reader(start.path, start.cold)())
    blocks: Counter[str] = Counter()
    for name, tensor in file.items():
        blocks[".".join(name.split(".")[:2])] += _bytes(tensor)
    on_host = start.model.emb.weight.device.type == "cpu"
    held = sum(weights_by_storage(start.model).values()) if on_host else 0
    return held + max(blocks.values()) + working(start.report.layout, file, cold=start.cold is not None)


def working(layout: Layout, file: Mapping[str, Tensor], *, cold: bool = False) -> int:
    """Bytes beside the stored form while the most demanding matrix is split, measured or packed."""
    largest = 0
    for name, tensor in file.items():
        layer = name.removesuffix(".weight")
        mode = layout.adapted[layer].mode if layer in layout.adapted else ""
        need = 0
        if mode == "pissa":  # the matrix or its residual in float32, and some rows of it in float64, three times
            need = 4 * tensor.numel() + 3 * 8 * min(ROWS, len(tensor)) * tensor.shape[1]
        if mode == "dora":  # the norms of its rows
            need = 4 * tensor.numel()
        if layer in layout.packed:
            need = max(need, min(PACKING[layout.store], 20 * tensor.numel()))
        if cold and tensor.dim() == 2:  # the base's, the update, and their sum
            need += 8 * tensor.numel()
        largest = max(largest, need)
    return largest
