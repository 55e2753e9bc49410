"""Peak extra memory and time of the head with its loss, forward and backward, against full logits.

The last two methods are distillation on a teacher's 100 largest logits, from full logits and through the chunked head.

Each case runs in a process of its own. Extra memory is the high-water mark of resident memory above its level before
the first counted run, and the same less the gradients that any method must return (of hidden states, and of a trained
weight in float32). Beside the times stands the machine's own rate at one of the head's products in the same process.

    python benchmarks/head.py [--rows 4096] [--json PATH]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from rwkv_rlhf.data.batch import TextBatch
from rwkv_rlhf.layers.linear import Linear
from rwkv_rlhf.losses import LOSSES
from rwkv_rlhf.losses.distill import distillation
from rwkv_rlhf.losses.tokens import token_scores, weighted_nll
from rwkv_rlhf.settings.config import Config

MIB = 2**20
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
METHODS = ("full logits", "token_scores", "weighted_nll", "distillation, full logits", "distillation")
K = 100


class LowRank(nn.Module):
    """A frozen matrix with two trained factors of rank 16, called as any module."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(16, weight.shape[1]) * 0.01)
        self.lora_B = nn.Parameter(torch.randn(weight.shape[0], 16) * 0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = x @ self.lora_A.to(x.dtype).T
        return torch.addmm(F.linear(x, self.weight), inner, self.lora_B.to(x.dtype).T)


def resident() -> dict[str, int]:
    """Resident memory now and at its highest, in bytes."""
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return {name: int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}


def make_head(kind: str, dtype: torch.dtype, vocabulary: int, width: int) -> nn.Module:
    """The head as the trainer holds it: trained matrices are float32 masters, frozen ones in the dtype computed in."""
    weight = torch.randn(vocabulary, width) * 0.02
    if kind == "lora":
        return LowRank(weight.to(dtype))
    head = Linear(width, vocabulary, device="meta")
    head.weight = nn.Parameter(weight if kind == "trained" else weight.to(dtype), requires_grad=kind == "trained")
    return head


def batch_of(rows: int, vocabulary: int) -> TextBatch:
    """Random targets and a teacher with random opinions, its K largest logits of each position."""
    targets = torch.randint(vocabulary, (rows,))
    teacher = {"top_values": torch.randn(rows, K), "top_indices": torch.randint(vocabulary, (rows, K))}
    return TextBatch(targets, targets, torch.tensor([0, rows]), float(rows), **teacher)


def loss_of(method: str, head: nn.Module, hidden: torch.Tensor, batch: TextBatch, chunk: int) -> torch.Tensor:
    """Summed loss by one of the methods."""
    targets = batch.targets
    if method == "distillation":
        config = Config(loss="distillation", head_chunk=chunk, l2wrap=False, smoothing=0.0)
        return LOSSES["distillation"].from_hidden(head, hidden, batch, config).value
    if method == "distillation, full logits":
        logp = head(hidden).float().log_softmax(1)
        divergence = distillation(logp.gather(1, batch.top_indices), batch.top_values).sum()
        return 0.5 * F.nll_loss(logp, targets, reduction="sum") + 0.5 * divergence
    if method == "full logits":
        return F.cross_entropy(head(hidden).float(), targets, reduction="sum")
    if method == "token_scores":
        return -token_scores(head, hidden, targets, head_chunk=chunk).logp.sum()
    return weighted_nll(head, hidden, targets, head_chunk=chunk).value


def measure(case: dict) -> dict:
    """One case in this process."""
    torch.set_num_threads(case["threads"])
    torch.manual_seed(0)
    dtype = DTYPES[case["dtype"]]
    head = make_head(case["head"], dtype, case["vocabulary"], case["width"])
    hidden = torch.randn(case["rows"], case["width"]).to(dtype).requires_grad_()
    batch = batch_of(case["rows"], case["vocabulary"])
    loss_of(case["method"], head, hidden[:16], batch.chunk(slice(16)), 16).backward()  # libraries, thread pools
    returned = sum(p.numel() * p.element_size() for p in (hidden, *head.parameters()) if p.requires_grad)
    times, extra = [], 0
    for _ in range(case["repeat"]):
        hidden.grad = None
        head.zero_grad(set_to_none=True)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts anew
        before, began = resident()["VmRSS"], time.perf_counter()
        loss = loss_of(case["method"], head, hidden, batch, case["chunk"])
        loss.backward()
        times.append(time.perf_counter() - began)
        extra = max(extra, resident()["VmHWM"] - before)
    chunk_bytes = case["chunk"] * case["vocabulary"] * dtype.itemsize
    return case | {
        "seconds": min(times),
        "extra_mib": extra / MIB,
        "beyond_gradients_mib": (extra - returned) / MIB,
        "chunks": (extra - returned) / chunk_bytes,
        "product_gflops": product_rate(case, dtype),
        "loss": float(loss.detach()) / case["rows"],
    }


def product_rate(case: dict, dtype: torch.dtype) -> float:
    """GFLOP/s of one chunk of logits."""
    a, b = torch.randn(case["chunk"], case["width"]).to(dtype), torch.randn(case["vocabulary"], case["width"]).to(dtype)
    out = torch.empty(len(a), len(b), dtype=dtype)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        torch.mm(a, b.t(), out=out)
        times.append(time.perf_counter() - began)
    return 2 * len(a) * len(b) * case["width"] / min(times) / 1e9


def main() -> None:
    """Run every case, print the Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rows", 4096), ("width", 768), ("vocabulary", 65536), ("chunk", 1024), ("repeat", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=[*DTYPES], help="only this dtype")
    parser.add_argument("--method", choices=METHODS, help="only this method")
    parser.add_argument("--json", metavar="PATH", help="also write the measurements there")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    case, path, only, only_method = (given.pop(name) for name in ("case", "json", "dtype", "method"))
    if case:
        print(json.dumps(measure(json.loads(case))))
        return
    print("| dtype | head | method | s | extra MiB | beyond gradients | in chunks of logits | products' GFLOP/s |")
    print("|---|---|---|---|---|---|---|---|")
    results = []
    for dtype in [only] if only else DTYPES:
        for head in ("frozen", "trained", "lora"):
            for method in [only_method] if only_method else METHODS:
                wanted = given | {"dtype": dtype, "head": head, "method": method}
                command = [sys.executable, __file__, "--case", json.dumps(wanted)]
                environment = os.environ | {"OMP_NUM_THREADS": str(given["threads"])}
                done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
                r = json.loads(done.stdout.splitlines()[-1])
                results.append(r)
                print(
                    f"| {dtype} | {head} | {method} | {r['seconds']:.2f} | {r['extra_mib']:.0f} | "
                    f"{r['beyond_gradients_mib']:.0f} | {r['chunks']:.2f} | {r['product_gflops']:.0f} |",
                    flush=True,
                )
    if path:
        Path(path).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
