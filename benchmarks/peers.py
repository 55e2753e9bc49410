"""Kernels of other projects, for `benchmarks/kernels.py --device cuda --peer NAME=FOLDER`: nothing of them is here.

NAME is a key of `PEERS`, FOLDER a checkout: github.com/fla-org/flash-linear-attention, github.com/BlinkDL/RWKV-LM or
github.com/johanwind/wind_rwkv. Each takes our inputs (raw decays), turned beforehand into the decay that it wants; what
it cannot do (a length, a dtype, a device) shows as the error it raises.

B batch, T tokens, H heads, N head size
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

RATE = math.exp(-0.5)
CHUNK = 16  # tokens between the states that RWKV-LM's kernel keeps; it is compiled in
FLAGS = ["--use_fast_math", "-O3", "-Xptxas", "-O3", "--extra-device-vectorization"]

# A run takes the inputs that `prepare` made of ours and returns y.
Run = Callable[..., Tensor]
Prepare = Callable[[list[Tensor]], list[Tensor]]


def fla(folder: Path, size: int) -> dict[str, dict[str, tuple[Prepare, Run]]]:
    """Triton kernels of flash-linear-attention (`fla.ops`)."""
    sys.path.insert(0, str(folder))
    from fla.ops.rwkv6 import chunk_rwkv6
    from fla.ops.rwkv7 import chunk_rwkv7

    def seven(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return chunk_rwkv7(r, w, k, v, a, b, lower_bound=-RATE, safe_gate=True, chunk_size=64)[0]

    def six(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
        return chunk_rwkv6(r, k, v, w, u, scale=1.0)[0]

    return {
        "wkv7": {"fla chunk_rwkv7": (lambda x: _with(x, 1, log_decay7(x[1])), seven)},
        "wkv6": {"fla chunk_rwkv6": (lambda x: _with(x, 3, -x[3].float().exp()), six)},
    }


def rwkv_lm(folder: Path, size: int) -> dict[str, dict[str, tuple[Prepare, Run]]]:
    """RWKV-LM's kernel for training RWKV-7 on an H100 (`rwkv7_clampw_v3`), which takes the raw decay as ours does."""
    from torch.utils.cpp_extension import load

    sources = folder / "RWKV-v7" / "train_temp" / "cuda"
    files = [str(sources / name) for name in ("rwkv7_clampw_v3_for_h100.cu", "rwkv7_clampw_v3.cpp")]
    flags = [*FLAGS, f"-D_N_={size}", f"-D_CHUNK_LEN_={CHUNK}"]
    load(name="rwkv7_clampw_v3", sources=files, is_python_module=False, extra_cuda_cflags=flags)

    class Clampw(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            batch, tokens, heads, size = inputs[0].shape
            y = torch.empty_like(inputs[0])
            wide = {"dtype": torch.float32, "device": y.device}
            states = torch.empty(batch, heads, tokens // CHUNK, size, size, **wide)
            sa = torch.empty(batch, tokens, heads, size, **wide)
            torch.ops.rwkv7_clampw_v3.forward(*inputs, y, states, sa)
            ctx.save_for_backward(*inputs, states, sa)
            return y

        @staticmethod
        def backward(ctx, dy):
            *inputs, states, sa = ctx.saved_tensors
            grads = [torch.empty_like(x) for x in inputs]
            torch.ops.rwkv7_clampw_v3.backward(*inputs, dy, states, sa, *grads)
            return tuple(grads)

    return {"wkv7": {"RWKV-LM clampw_v3": (list, Clampw.apply)}}


def wind(folder: Path, size: int) -> dict[str, dict[str, tuple[Prepare, Run]]]:
    """wind_rwkv's chunked bfloat16 kernel and its float32 one for long heads."""
    sys.path.insert(0, str(folder))
    from wind_rwkv.rwkv7 import (
        attn_backstepping_longhead,
        attn_chunked_cuda,
        load_backstepping_longhead,
        load_chunked_cuda,
    )

    load_chunked_cuda(size)
    load_backstepping_longhead(size)

    def prepare(x: list[Tensor]) -> list[Tensor]:
        return _with(x, 1, (-log_decay7(x[1])).log())

    return {
        "wkv7": {
            "wind chunked": (prepare, lambda *x: attn_chunked_cuda(*x)[0]),
            "wind longhead": (prepare, lambda *x: attn_backstepping_longhead(*x)[0]),
        }
    }


PEERS = {"fla": fla, "rwkv_lm": rwkv_lm, "wind": wind}


def load_peers(given: list[str], size: int) -> dict[str, dict[str, tuple[Prepare, Run]]]:
    """op -> name -> (prepare, run) of the peers in `given`, each "NAME=FOLDER". Raises ValueError for a wrong one."""
    found: dict[str, dict[str, tuple[Prepare, Run]]] = {}
    for text in given:
        name, _, folder = text.partition("=")
        if name not in PEERS or not Path(folder).is_dir():
            known = ", ".join(PEERS)
            raise ValueError(f"--peer {text}: give NAME=FOLDER with NAME one of {known} and FOLDER a checkout")
        try:
            made = PEERS[name](Path(folder).resolve(), size)
        except (ImportError, OSError, RuntimeError) as failure:  # its own needs or its build: ours are measured anyway
            print(f"--peer {name}: {str(failure).strip().partition(chr(10))[0]}", file=sys.stderr)
            continue
        for op, runs in made.items():
            found.setdefault(op, {}).update(runs)
    return found


def log_decay7(x: Tensor) -> Tensor:
    """The logarithm of WKV-7's decay for the raw network output, float32."""
    return -RATE * torch.sigmoid(x.float())


def _with(inputs: list[Tensor], index: int, changed: Tensor) -> list[Tensor]:
    """`inputs` with one replaced, in the dtype of its neighbours, as leaves that ask for a gradient."""
    new = [*inputs[:index], changed, *inputs[index + 1 :]]
    return [x.detach().to(inputs[0].dtype).requires_grad_() for x in new]
