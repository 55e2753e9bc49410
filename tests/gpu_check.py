"""Correctness on a GPU: every kernel, and one step of a two-layer model of each version. Run by tests/gpu.sh.

It needs nothing but PyTorch and a compiler. Kernels are judged by the plain loop in float64; a step on the GPU, by the
same step in float64 on the CPU.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from rwkv_rlhf.model import VERSIONS
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.model.sizes import sizes_of
from rwkv_rlhf.ops.check import LIMITS, findings
from rwkv_rlhf.ops.judge import error
from tests.support.models import any_initial_tensors

STEP_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
LAYERS, WIDTH, VOCABULARY, HEAD = 2, 128, 300, 64


def start_tensors(version: str) -> dict[str, Tensor]:
    """A model in which every tensor takes part: initial values with noise."""
    generator = torch.Generator().manual_seed(0)
    tensors = any_initial_tensors(version, LAYERS, WIDTH, VOCABULARY, HEAD, 0)
    return {
        name: x + torch.randn(x.shape, generator=generator) * (0.05 if x.dim() < 2 else 0.5 / max(x.shape) ** 0.5)
        for name, x in tensors.items()
    }


def step(tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """Loss and gradients of one step over two packed documents of odd lengths."""
    model = RWKV(sizes_of(tensors), compute_dtype=dtype, wkv_backend=backend)
    model.load_state_dict({name: x for name, x in tensors.items() if name in model.state_dict()})
    model.to(device, torch.float64 if dtype == torch.float64 else torch.float32)  # masters
    tokens = torch.randint(VOCABULARY, (1, 101), generator=torch.Generator().manual_seed(1)).to(device)
    hidden, _ = model(tokens[:, :-1], None, torch.tensor([0, 33, 100], device=device))
    loss = torch.nn.functional.cross_entropy(model.head(hidden)[0].to(torch.float32), tokens[0, 1:])
    loss.backward()
    return {"loss": loss, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def steps(device: torch.device) -> Iterator[dict]:
    """One row for each version and dtype: the tensor that is furthest off."""
    for version in VERSIONS:
        tensors = start_tensors(version)
        exact = step(tensors, torch.device("cpu"), torch.float64, "naive")
        for dtype, limit in STEP_LIMITS.items():
            about = {"what": f"step of {version}", "dtype": str(dtype).removeprefix("torch."), "limit": limit}
            try:
                values = step(tensors, device, dtype, "cuda")
            except (RuntimeError, ValueError) as failure:  # the driver's words, or why there is no kernel
                yield about | {"worst": first_line(failure), "error": 0.0, "agrees": False}
                continue
            # a gradient that is all but zero is judged by the size of the others
            floor = 1e-3 * max(float(x.detach().square().mean().sqrt()) for x in exact.values())
            errors = {
                name: error(values[name], x) * min(1.0, float(x.detach().square().mean().sqrt()) / floor)
                for name, x in exact.items()
                if name in values
            }
            worst = max(errors, key=errors.get)
            agrees = values.keys() == exact.keys() and errors[worst] <= limit
            yield about | {"worst": worst, "error": errors[worst], "agrees": agrees}


def kernels(device: torch.device) -> Iterator[dict]:
    """One row for each kernel and dtype."""
    for f in findings([device]):
        row = {"what": f"{f.case} ({f.backend})", "dtype": str(f.dtype).removeprefix("torch."), "agrees": f.agrees}
        row |= {"worst": f.worst, "error": f.error, "limit": LIMITS[f.dtype], "ms": f.milliseconds}
        if f.refusal or f.failure:
            row |= {"agrees": False, "worst": f.refusal or f.failure}  # on this machine each kernel must run
        yield row


def first_line(failure: Exception) -> str:
    return str(failure).strip().partition("\n")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("this PyTorch finds no GPU")
    rows = []
    print("| what | dtype | worst tensor | error | |\n|---|---|---|---|---|")
    for row in itertools.chain(kernels(device), steps(device)):
        rows.append(row)
        verdict = "ok" if row["agrees"] else "WRONG"
        print(f"| {row['what']} | {row['dtype']} | {row['worst']} | {row['error']:.1e} | {verdict} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if all(row["agrees"] for row in rows) else 1)


if __name__ == "__main__":
    main()
