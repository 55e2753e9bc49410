"""Fresh models of every version. Nothing but PyTorch is needed: tests/gpu_check.py runs where there is nothing else."""

from rwkv_rlhf.model.initial import initial_tensors


def any_initial_tensors(version, *sizes):
    """`initial_tensors`, of x050 and x051 too, which nobody makes any more: x052 with one number per head."""
    if version not in ("x050", "x051"):
        return initial_tensors(version, *sizes)
    tensors = initial_tensors("x052", *sizes)
    tensors = {name: t[:, 0] if name.endswith(("_decay", "_faaaa")) else t for name, t in tensors.items()}
    gate = ("mix_g", "gate.weight") if version == "x050" else ()
    return {name: t for name, t in tensors.items() if not name.endswith(gate)}
