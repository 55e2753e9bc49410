"""How much memory a run takes, part by part, before it takes it.

Legend: C width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rwkv_rlhf.checkpoints.loading import block_of
from rwkv_rlhf.checkpoints.merging import shapes
from rwkv_rlhf.layers.adapters.pissa import ROWS
from rwkv_rlhf.layers.linear import TokenTable
from rwkv_rlhf.layers.placing import Layout, matrices
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.ops.logprob import BLOCK_ON_GPU
from rwkv_rlhf.plan import is_token_table
from rwkv_rlhf.precision import DTYPES, NAMES
from rwkv_rlhf.scoring.infinite_context import ChunkedRows
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.training.optimizers import state_of
from rwkv_rlhf.training.start import Start

DROPPED = 1.6  # values that an adapter with dropout keeps of each channel of its input: the rest of it, and the mask
# Of activations and logits, what glibc's heap holds in vain on a CPU; recomputed blocks come and go (measured).
HOLES = {False: 0.25, True: 1.0}
MASKS = 2.0  # values of each channel that the two dropouts of a block keep
PASSING = 12  # gradients of the width C that are under way inside a block
TWIN = 56  # bytes of each channel while a plain twin is computed again in float32 for its gradient (counted)


def weights_by_storage(model: nn.Module) -> dict[str, int]:
    """Bytes of everything that stays in memory with the model: by packed storage or dtype, and what trains."""
    found: Counter[str] = Counter()
    for _, layer in matrices(model):
        if layer.adaptation is not None:
            own = [getattr(layer, part) for part in (*layer.tensors, *layer.initial)]
            found["adapters"] += sum(map(_bytes, own))
        if layer.store is not None:
            found[f"weights {layer.store.mode}"] += layer.store.bytes()
    adapters = {id(getattr(layer, part)) for _, layer in matrices(model) for part in layer.tensors}
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            trains = ", training" if parameter.requires_grad else ""
            found[f"weights {NAMES.get(parameter.dtype, parameter.dtype)}{trains}"] += _bytes(parameter)
    return dict(found)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of a step by what they are for: on the device that computes, and beside it on the host."""

    device: dict[str, int]
    host: dict[str, int]


def memory_by_part(config: Config, model: RWKV, tokens: int, *, gpu: bool) -> Estimate:
    """What a step over `tokens` tokens takes, the micro-batch's `micro_bsz` rows together, by part.

    `model` may lie on the meta device. Counted are weights, gradients, moments and the states of the cuts; activations
    follow from what a block keeps for its backward pass (`block_bytes`), with --grad_cp 1 the input of each block and
    one block whole. A live teacher counts as its file.
    """
    width = DTYPES[config.precision].itemsize
    trained = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and not is_token_table(name))
    here = min(tokens, config.chunk or tokens)  # tokens that run together
    count = slots(config, tokens) if config.chunk else 0
    state = state_bytes(model)
    # the loss gives each gradient once: with chunks there is the sum so far, and what the newest chunk adds
    twice = 2 if config.chunk and tokens > here else 1
    gradients = twice * (4 * trained + row_bytes(model, tokens * config.accumulate_grad_batches))
    boundary = state * count
    rows = config.micro_bsz * (3 if config.loss_facts.data == "pairs" else 1)
    parts = weights_by_storage(model) | {
        "matrix being unpacked": width
        * max([0, *(layer.shape.numel() for _, layer in matrices(model) if layer.store is not None)]),
        "gradients": gradients,
        "optimizer": state_of(config.optim, model).bytes,
        "activations": activation_bytes(config, model, here, gpu),
        "states": 4 * state * rows,
        "head": head_bytes(config, model, here, gpu),
    }
    if config.loss_facts.teacher:
        logits = 6 * 4 * tokens * config.top_k  # values, indices (8 bytes), the student's scores and their gradients
        parts["teacher"] = logits + (Path(config.teacher_model).stat().st_size if config.teacher_model else 0)
    host = {"tokens and targets": 16 * tokens}
    away = host if gpu and config.state_offload else parts
    if boundary:
        away[f"states at {count:,} cuts"] = boundary
    if gpu:
        return Estimate(parts, host)
    moving = parts["activations"] + parts["head"]
    return Estimate(parts | host | {"holes in the heap": int(HOLES[config.grad_cp] * moving)}, {})


def row_bytes(model: RWKV, tokens: int) -> int:
    """At most so many bytes have the gradients of trained tables by token, a row for each token that occurs."""
    learnt = [layer for _, layer in matrices(model) if isinstance(layer, TokenTable) and layer.weight.requires_grad]
    return sum((4 * layer.out_features + 8) * min(tokens, layer.in_features) for layer in learnt)


def slots(config: Config, tokens: int) -> int:
    """How many states the cuts of a micro-batch of `tokens` tokens keep: of text, or of a third prompt per pair."""
    rows = config.micro_bsz
    chunked = ChunkedRows(config.chunk)
    each = tokens // rows
    if config.loss_facts.data == "text":
        chunked.add(torch.empty(each * rows, device="meta"), torch.arange(rows + 1) * each)
        return chunked.slots
    prompt, answer = each - 2 * (each // 3), each // 3
    ends = chunked.add(torch.empty(prompt * rows, device="meta"), torch.arange(rows + 1) * prompt, keep=True)
    begin = [slot for slot in ends for _ in range(2)]
    chunked.add(torch.empty(2 * answer * rows, device="meta"), torch.arange(2 * rows + 1) * answer, begin=begin)
    return chunked.slots


def state_bytes(model: RWKV) -> int:
    """Bytes of the state of one sequence."""
    return sum(map(_bytes, model.initial_state(1).tensors()))


def block_bytes(model: RWKV, width: int, layer: int) -> int:
    """Bytes that block `layer` keeps for the backward pass, per token, when activations take `width` bytes.

    Counted with saved-tensor hooks with the compiled kernels (tests/training/test_memory.py counts again): multiples of
    the width C, what the recurrence keeps in float32, and what adapters keep of their inputs.
    """
    sizes = model.sizes
    facts = tables.VERSIONS[sizes.version]
    block = model.blocks[layer]
    extra: float = sizes.low_rank.get("deep", 0) ** 2  # a token's matrix of DeepEmbed
    for _, matrix in matrices(block):
        if matrix.adaptation is not None:
            extra += matrix.in_features * (DROPPED if matrix.adaptation.dropout else 0.0)
            extra += matrix.out_features * tables.ADAPTERS[matrix.adaptation.mode].output_copies
    if model.dropout:
        extra += MASKS * sizes.n_embd
    return int(width * (facts.activations * sizes.n_embd + extra) + facts.recurrence_bytes * sizes.dim_att)


def activation_bytes(config: Config, model: RWKV, tokens: int, gpu: bool) -> int:
    """What the graph of `tokens` tokens holds when the backward pass begins, and the gradients inside one block."""
    width, sizes = DTYPES[config.precision].itemsize, model.sizes
    blocks = [
        block_bytes(model, width, layer) * tokens + _casts(block, width) for layer, block in enumerate(model.blocks)
    ]
    inside = max(PASSING * width, TWIN * gpu) * tokens * sizes.n_embd
    if not config.grad_cp:
        return sum(blocks) + inside
    return max(blocks) + inside + (sizes.n_layer + 1) * tokens * sizes.n_embd * width


def _casts(block: nn.Module, width: int) -> int:
    """Bytes of the copies in the compute dtype that the graph holds of matrices whose masters are float32."""
    if width >= 4:
        return 0
    named = [(name, p) for name, p in block.named_parameters() if p.requires_grad and p.dim() == 2]
    return sum(width * p.numel() for name, p in named if not is_token_table(name))


def head_bytes(config: Config, model: RWKV, tokens: int, gpu: bool) -> int:
    """A chunk of logits, hidden states with their gradient, and the copy of a trained head in the compute dtype.

    A loss that predicts no token has no logits.
    Without the kernels of the CPU also a float32 block of logits and their exponentials.
    """
    width, head = DTYPES[config.precision].itemsize, model.head
    if not config.loss_facts.predicts:  # nothing but a product with one vector in float32
        return 2 * 4 * tokens * head.in_features
    logits = min(tokens, config.head_chunk) * head.out_features
    cast = head.weight is not None and head.weight.element_size() != width
    wide = 2 * 4 * min(logits, BLOCK_ON_GPU) if gpu else 0
    return logits * width + wide + 2 * tokens * head.in_features * width + (head.shape.numel() * width if cast else 0)


def loading_peak(start: Start) -> int:
    """Estimated bytes of host memory at the peak of loading: the model, one block of the file, and one matrix at work.

    On a GPU the model itself does not count.
    """
    file = shapes(start.read())
    blocks: Counter[str] = Counter()
    for name, tensor in file.items():
        blocks[block_of(name)] += _bytes(tensor)
    on_host = start.model.emb.weight.device.type == "cpu"
    held = sum(weights_by_storage(start.model).values()) if on_host else 0
    return held + max(blocks.values()) + working(start.report.layout, file, cold=start.cold is not None)


def working(layout: Layout, file: Mapping[str, Tensor], *, cold: bool = False) -> int:
    """Bytes beside the stored form while the most demanding matrix is split, measured or packed."""
    largest = 0
    for name, tensor in file.items():
        layer = name.removesuffix(".weight")
        need = 0
        if layer in layout.adapted:
            facts = tables.ADAPTERS[layout.adapted[layer].mode]
            need = facts.loading_bytes * tensor.numel()
            if facts.loading_rows:  # in float64, three times
                need += 3 * 8 * min(ROWS, len(tensor)) * tensor.shape[1]
        if layer in layout.packed:
            need = max(need, min(tables.STORAGES[layout.store].packing, 20 * tensor.numel()))
        if cold and tensor.dim() == 2:  # the base's, the update, and their sum
            need += 8 * tensor.numel()
        largest = max(largest, need)
    return largest
