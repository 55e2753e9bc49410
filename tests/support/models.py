"""Fresh models of every version. Nothing but PyTorch is needed: tests/ops/test_on_gpu.py runs where little else is."""

import torch

from rwkv_rlhf.model.initial import initial_tensors
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.model.sizes import sizes_of


def any_initial_tensors(version, *sizes):
    """`initial_tensors`, of x050 and x051 too, which nobody makes any more: x052 with one number per head; of x070a."""
    if version == "x070a":
        return with_deep_embed(initial_tensors("x070", *sizes))
    if version not in ("x050", "x051"):
        return initial_tensors(version, *sizes)
    tensors = initial_tensors("x052", *sizes)
    tensors = {name: t[:, 0] if name.endswith(("_decay", "_faaaa")) else t for name, t in tensors.items()}
    gate = ("mix_g", "gate.weight") if version == "x050" else ()
    return {name: t for name, t in tensors.items() if not name.endswith(gate)}


def with_deep_embed(tensors, rank=32):
    """A checkpoint of RWKV-7 with the tables of RWKV-7a, which scale nothing yet. The `rwkv` package knows rank 32."""
    vocab, C = tensors["emb.weight"].shape
    layers = dict.fromkeys(name.split(".")[1] for name in tensors if name.startswith("blocks."))
    found = dict(tensors)
    for layer in layers:
        F = len(tensors[f"blocks.{layer}.ffn.key.weight"])
        shapes = {"s_emb.weight": (vocab, rank**2), "s_emb_x.weight": (rank**2, C), "s1": (C, rank), "s2": (rank, F)}
        found |= {f"blocks.{layer}.ffn.{name}": torch.zeros(shape) for name, shape in shapes.items()}
        found[f"blocks.{layer}.ffn.s0"] = torch.ones(1, 1, F)
    return found


def random_tensors(version="x070", n_layer=3, n_embd=64, vocab_size=300, head_size=32, seed=1, heads=""):
    """A checkpoint in which no tensor is zero, so that every path of the model shows in the logits.

    heads: a scalar head that it has besides.
    """
    tensors = any_initial_tensors(version, n_layer, n_embd, vocab_size, head_size, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, value in tensors.items():
        noise = torch.randn(value.shape, generator=generator)
        if name == "emb.weight":
            tensors[name] = noise
        elif name == "head.weight":
            tensors[name] = noise / n_embd**0.5
        elif name.endswith("s_emb.weight"):
            tensors[name] = noise * 0.3
        elif value.dim() == 2 and "r_k" not in name:
            tensors[name] = value + noise * 0.5 / max(value.shape) ** 0.5
        else:
            tensors[name] = value + noise * 0.1
    if heads:
        tensors[f"{heads}.weight"] = torch.randn(1, n_embd, generator=generator)
    return tensors


def build(tensors, dtype=torch.float32, **settings):
    """A plain model of these tensors."""
    model = RWKV(sizes_of(tensors), compute_dtype=dtype, **settings)
    model.load_state_dict({k: v for k, v in tensors.items() if k in model.state_dict()})
    return model.to(dtype)
