"""Sampling on a CPU: tokens/s of 1 to 128 answers at once, and prefill, beside the `rwkv` package in the same run.

python benchmarks/sampling.py                     # fp32, bf16, int8, nf4; some minutes for RWKV-7 L12-D768
python benchmarks/sampling.py --only fp32,1       # one row, and the package beside it
python benchmarks/sampling.py --layers 2 --width 128 --vocab 1000 --repeats 1      # seconds: does it run?

Random weights. The sides take turns; figures are medians, with the slowest and fastest turn. Decoding counts what comes
after the first token of each answer: model, head, pick and all that the sampler does. `limit` is the share of what
memory allows: the weights' bytes (no embedding) by the rate at which this machine reads in the same run. Prefill runs
512 tokens of one prompt; its share is of the rate of large products in the same run. Types without instructions here
are left out with a line.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rl

from rwkv_rlhf.settings.surroundings import take_over

take_over()  # threads wait as those of a command do; before PyTorch is imported

import torch  # noqa: E402

from rwkv_rlhf.ops import cpu  # noqa: E402

PACKED = ("int8", "nf4")  # with fp32 activations
KINDS, SIZES, PREFILL, PROMPT = ("fp32", "bf16", *PACKED), (1, 8, 32, 128), 512, 16
FEWER = 8  # tokens of each answer where many run at once
READ = 1 << 27  # numbers that are summed to know how fast memory is read
BF16 = {"avx512_bf16", "amx_bf16"}  # what Linux calls instructions for bf16 products


def model_of(tensors: dict[str, torch.Tensor], kind: str) -> Any:
    """The model in fp32, bf16, or packed with fp32 activations."""
    from rwkv_rlhf.checkpoints.loading import BuildOptions, build_model
    from rwkv_rlhf.precision import DTYPES

    quant = kind if kind in PACKED else "none"
    dtype = DTYPES["fp32" if kind in PACKED else kind]
    return build_model(tensors, BuildOptions(dtype, quant=quant))[0].eval()


def weight_bytes(model: Any) -> int:
    """What a token reads of the model."""
    held = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in held) - model.emb.weight.nbytes


def ids(count: int, tokens: int, vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, vocab, (count, tokens), generator=generator).tolist()


def decoding(model: Any, size: int, tokens: int, vocab: int) -> float:
    """Tokens/s of `size` answers behind the first token of each."""
    from rwkv_rlhf.generation.sampler import Sampler
    from rwkv_rlhf.generation.sampling_params import SamplingParams

    stamps: list[float] = []
    params = SamplingParams(max_tokens=tokens + 1, stop_texts=(), stop_ids=())
    hear = lambda *_: stamps.append(time.perf_counter()) or True  # noqa: E731
    Sampler(model).generate(ids(size, PROMPT, vocab), params, hear=hear)
    return size * tokens / (stamps[-1] - stamps[size - 1])


@torch.no_grad()
def prefill(model: Any, vocab: int) -> float:
    """Tokens/s of a prompt."""
    prompt = torch.tensor(ids(1, PREFILL, vocab))
    begun = time.perf_counter()
    model.head(model(prompt)[0][:, -1])
    return PREFILL / (time.perf_counter() - begun)


class Peer:
    """The `rwkv` package in a process of its own, which waits while the other side is measured."""

    def __init__(self, path: str, kind: str, vocab: int) -> None:
        variables = {**os.environ, "RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
        command = [sys.executable, __file__, "--serve_peer", path, kind, str(vocab)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
        )

    def __call__(self, what: str, tokens: int) -> float:
        """Tokens/s."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{what} {tokens}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:  # the package prints too
            if line.startswith("RATE "):
                return float(line.split()[1])
        raise ValueError("the `rwkv` package ended: its words are above")

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def serve_peer(path: str, kind: str, vocab: int) -> None:
    """Answers "prefill N" and "decode N" on the standard input with tokens/s."""
    from rwkv.model import RWKV

    model, state = RWKV(model=path, strategy=f"cpu {kind}"), None
    for line in sys.stdin:
        what, count = line.split()
        (prompt,) = ids(1, int(count) if what == "prefill" else PROMPT, vocab)
        if what == "decode":
            logits, state = model.forward(prompt, None)
        begun = time.perf_counter()
        if what == "prefill":
            model.forward(prompt, None)
        else:
            for _ in range(int(count)):
                token = int(torch.multinomial(torch.softmax(logits.float(), 0), 1))
                logits, state = model.forward([token], state)
        print("RATE", int(count) / (time.perf_counter() - begun), flush=True)


def read_rate(memory: torch.Tensor) -> float:
    """GB/s of one pass over it."""
    begun = time.perf_counter()
    memory.sum()
    return 1e-9 * memory.nbytes / (time.perf_counter() - begun)


def product_rate(kind: str) -> float:
    """GFLOP/s of a large product."""
    x = torch.ones(1536, 1536, dtype=torch.bfloat16 if kind == "bf16" else torch.float32)
    begun = time.perf_counter()
    x @ x
    return 2e-9 * len(x) ** 3 / (time.perf_counter() - begun)


def in_turns(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each side gives, `repeats` times one after the other, after one time for warmth."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, measure in sides.items():
            rate = measure()
            if turn:
                found[name].append(rate)
    return found


def measured(
    kind: str, sizes: Sequence[int], tensors: dict[str, torch.Tensor], peer: Peer | None, words: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of one type; size 0 is prefill."""
    model, memory, rows = model_of(tensors, kind), torch.ones(READ), []
    heavy = weight_bytes(model)
    matrices = sum(t.numel() for name, t in tensors.items() if t.dim() == 2 and name != "emb.weight")
    for size in sizes:
        count = min(words.tokens, FEWER) if size > 8 else words.tokens
        what = f"{size} at once" if size else f"prefill of {PREFILL}"
        sides: dict[str, Callable[[], float]] = {"limit": lambda: read_rate(memory)}
        if size:
            sides["ours"] = lambda size=size, count=count: decoding(model, size, count, words.vocab)
        else:
            sides = {"limit": lambda: product_rate(kind), "ours": lambda: prefill(model, words.vocab)}
        if peer is not None and size in (0, 1):
            order = ("decode", count) if size else ("prefill", PREFILL)
            sides["rwkv package"] = lambda order=order: peer(*order)
        rates = in_turns(sides, words.repeats)
        best = max(rates.pop("limit"))
        for side, values in rates.items():
            middle = statistics.median(values)
            used = heavy * middle / max(1, size) * 1e-9 if size else 2e-9 * matrices * middle
            row = {"type": kind, "what": what, "side": side, "tokens/s": middle, "slowest": min(values)}
            row |= {"fastest": max(values), "limit": best, "share": used / best}
            rows.append(row)
            spread = f"{middle:.1f} ({min(values):.1f} - {max(values):.1f})"
            unit = "GB/s" if size else "GFLOP/s"
            print(f"| {kind} | {what} | {side} | {spread} | {used / best:.0%} of {best:.1f} {unit} |", flush=True)
    return rows


def main() -> None:
    """Measures what is asked for and prints it as it comes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", default="", help="one row: fp32,8; 0 is prefill")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of each answer; at most 8 of many [24]")
    parser.add_argument("--repeats", type=int, default=3, help="turns that count [3]")
    parser.add_argument("--peer", default="1", help="0 = without the `rwkv` package")
    for name in ("layers", "width", "vocab"):
        parser.add_argument(f"--{name}", type=int, default=getattr(rl, name.upper()), help="of the model")
    parser.add_argument("--json", default="", help="write the rows there too")
    parser.add_argument("--serve_peer", nargs=3, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.serve_peer:
        path, kind, vocab = words.serve_peer
        return serve_peer(path, kind, int(vocab))
    only, _, size = words.only.partition(",")
    fast_bf16 = bool(BF16 & (cpu.processor_flags() or set()))
    tensors, rows = rl.tensors(words.layers, words.width, words.vocab), []
    print(f"{cpu.instruction_set()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| type | what | side | tokens/s (slowest - fastest) | share of the limit |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path, peer = f"{folder}/model", None
        if words.peer == "1":
            torch.save(tensors, f"{path}.pth")
        for kind in (only,) if only else KINDS:
            if kind == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
                print("(nf4: left out, bitsandbytes is not installed)")
                continue
            sizes = [int(size)] if size else [0, *SIZES]
            if kind == "bf16" and not fast_bf16 and not size:
                sizes = [size for size in sizes if size in (1, 8)]
                print("(bf16 prefill, 32, 128 and the package: left out, no bf16 products here)")
            if words.peer == "1" and kind not in PACKED and (kind == "fp32" or fast_bf16):
                peer = Peer(path, kind, words.vocab)
            rows += measured(kind, sizes, tensors, peer, words)
            if peer is not None:
                peer.close()
                peer = None
    if words.json:
        Path(words.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
