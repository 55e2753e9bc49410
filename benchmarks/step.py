"""One training step on this machine: tokens per second, peak memory, where the time goes.

python benchmarks/step.py [--json PATH]             # the table: full and LoRA r 16, ctx 512 and 1024, fp32 and bf16
python benchmarks/step.py --only full,bf16,512      # one row
python benchmarks/step.py --version x060            # another version than RWKV-7
python benchmarks/step.py --products torch          # as PyTorch multiplies, instead of this processor's table
python benchmarks/step.py --pairs 1                 # DPO with LoRA r 16 on pairs of 51 tokens, 4 a step
python benchmarks/step.py --peers 1                 # full fp32 steps of ctx 512 beside other programs, in turns

Random weights, L12-D768, 65536 tokens, the trainer's own model, losses, optimizer and clipping. Every row runs in a
process of its own, so that the peak is its own: VmHWM, which counts the interpreter and the libraries. The machine's
rate is the best 2048-cube product of the row's type in the same process, by any way of ops/product_ways.py. Model
FLOPs: 6N per token (4N + 6N_adapter for LoRA), N without the embedding. `cp` recomputes blocks (--grad_cp 1). Beside
others: RWKV-7 and rwkv7-hf, RWKV-4 and transformers' model of it, each in a process of its own (stepping.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
LAYERS, WIDTH, VOCAB = 12, 768, 65536
PEERS = {"x070": "rwkv7-hf", "x040": "transformers"}  # version -> who has it too
ROWS = [(mode, kind, ctx) for mode in ("full", "lora") for kind in ("bf16", "fp32") for ctx in (512, 1024)]


def rate(dtype) -> float:
    """Best product of two 2048 x 2048 matrices of this type, FLOP/s."""
    import torch

    from rwkv_rlhf.ops.product_ways import WAYS, refusal

    x, w = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    ways = [way for name, way in WAYS.items() if not refusal(name, dtype)]
    best = min(_timed(partial(way, x, w)) for _ in range(12) for way in ways)
    return 2 * 2048**3 / best


def kinds() -> tuple[str, ...]:
    """The types that are worth a row here: a processor that is slow in bf16 would take ten minutes for one of them."""
    from rwkv_rlhf.ops.fastest import SLOW, slowness

    return ("bf16", "fp32") if slowness("bf16", "cpu") < SLOW else ("fp32",)


def _timed(work) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def peak_mib() -> float:
    """High-water mark of this process's resident memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return float("nan")


def prepare(mode: str, kind: str, grad_cp: bool, loss: str, version: str, products: str, size=(LAYERS, WIDTH, VOCAB)):
    """Model, loss settings and optimizer as train.py makes them. size: layers, width, vocabulary."""
    import torch

    from rwkv_rlhf.checkpoints.loading import BuildOptions, build_model
    from rwkv_rlhf.host_memory import keep_pages
    from rwkv_rlhf.model.initial import initial_tensors
    from rwkv_rlhf.ops.product_table import ways_for
    from rwkv_rlhf.ops.product_ways import Ways
    from rwkv_rlhf.plan import make_plan
    from rwkv_rlhf.settings.config import Config
    from rwkv_rlhf.training.optimizers import adamw, parameter_groups

    keep_pages()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[kind]
    layers, width, vocab = size
    tensors = initial_tensors(version, layers, width, vocab, 64, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, value in tensors.items():  # nothing at zero, so that every product is a real one
        if value.dim() == 2 and not value.any():
            tensors[name] = torch.randn(value.shape, generator=generator) * 0.02
        tensors[name] = tensors[name].to(dtype) if value.dim() == 2 else tensors[name]
    plan = make_plan(mode, layers, rank=16, alpha=32.0, dropout=0.0, lr_init=1e-5, lr_final=1e-5, weight_decay=0.0)
    names = list(tensors)
    model, _ = build_model(tensors, BuildOptions(dtype, plan=plan, grad_cp=grad_cp))
    for name in names:
        del tensors[name]
    model.take_ways(ways_for(dtype, WIDTH) if products == "auto" else Ways.all(products))
    model.train()
    optimizer = adamw(parameter_groups(model, plan, version, True), (0.9, 0.99), 1e-8)
    return model, optimizer, Config(loss=loss), dtype


def timed_steps(model, optimizer, config, hidden_of, batches) -> dict[str, list[float]]:
    """Seconds of forward, backward and update of one optimizer step per batch."""
    from rwkv_rlhf.losses import LOSSES

    times: dict[str, list[float]] = {"forward": [], "backward": [], "update": []}
    for batch in batches:
        a = time.perf_counter()
        loss = LOSSES[config.loss].from_hidden(model.head, hidden_of(model, batch), batch, config).value / batch.total
        b = time.perf_counter()
        loss.backward()
        c = time.perf_counter()
        update(optimizer)
        d = time.perf_counter()
        for name, spent in zip(times, (b - a, c - b, d - c)):
            times[name].append(spent)
    return times


def text_batches(ctx: int, vocab: int):
    """Rows of `ctx` random tokens without an end."""
    import torch

    from rwkv_rlhf.data.batch import TextBatch

    generator = torch.Generator().manual_seed(3)
    while True:
        row = torch.randint(1, vocab, (ctx + 1,), generator=generator)
        yield TextBatch(row[:-1], row[1:], torch.tensor([0, ctx]), float(ctx))


def measure_text(mode: str, kind: str, ctx: int, grad_cp: bool, steps: int, version: str, products: str) -> dict:
    """Single-row steps of `ctx` tokens."""
    from rwkv_rlhf.scoring.forward import text_hidden

    model, optimizer, config, dtype = prepare(mode, kind, grad_cp, "sft", version, products)
    batches = itertools.islice(text_batches(ctx, VOCAB), steps + 1)
    times = timed_steps(model, optimizer, config, text_hidden, batches)
    return summary(model, times, ctx, dtype, peak_mib())


def update(optimizer) -> None:
    """Clip at 1.0 and step, as the trainer does."""
    import torch

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if float(norm) > 1.0:
        torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure_pairs(kind: str, steps: int, version: str, products: str) -> dict:
    """DPO with LoRA r 16: 4 pairs a step, 51 tokens a sequence (prompt 24, answer 27), the reference's scores known."""
    import torch

    from rwkv_rlhf.data.batch import PairExample, pack_pairs
    from rwkv_rlhf.scoring.forward import answer_hidden

    model, optimizer, config, _ = prepare("lora", kind, False, "dpo", version, products)
    generator = torch.Generator().manual_seed(3)

    def ids(n: int) -> list[int]:
        return torch.randint(1, VOCAB, (n,), generator=generator).tolist()

    batches = (
        pack_pairs([PairExample(ids(24), ids(27), ids(27), (-290.0, -290.0)) for _ in range(4)])
        for _ in range(steps + 1)
    )
    times = timed_steps(model, optimizer, config, answer_hidden, batches)
    whole = [sum(parts) for parts in zip(*times.values())][1:]
    return {"pairs_per_s": 4 / statistics.median(whole), "best_pairs_per_s": 4 / min(whole), "peak_mib": peak_mib()}


def summary(model, times, ctx: int, dtype, peak: float) -> dict:
    """Medians and bests without the first step, and the share of the machine's own product rate."""
    whole = [sum(parts) for parts in zip(*times.values())][1:]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    matrices = sum(p.numel() for p in model.parameters()) - model.emb.weight.numel()
    full = model.head.weight.requires_grad
    per_token = 6 * matrices if full else 4 * (matrices - trained) + 6 * trained
    product = rate(dtype)
    best = min(whole)
    return {
        "tokens_per_s": ctx / statistics.median(whole),
        "best_tokens_per_s": ctx / best,
        **{name: statistics.median(spent[1:]) for name, spent in times.items()},
        "peak_mib": peak,
        "gflops": per_token * ctx / best / 1e9,
        "rate_gflops": product / 1e9,
        "share": per_token * ctx / best / product,
        "parameters": matrices + model.emb.weight.numel(),
    }


def beside_peers(steps: int, ctx: int, size: tuple[int, int, int]) -> dict:
    """Prints one row a side; the seconds of its steps by version and side."""
    from stepping import Work, missing, spread, warm

    found: dict[str, list[float]] = {}
    print("| full fp32 | side | seconds a step (fastest - slowest) | tok/s | peak MiB |\n|---|---|---|---|---|")
    for version, peer in PEERS.items():
        if why := missing(peer):
            print(f"({why})")
        works = [Work(name, "full", version, ctx, *size) for name in ("ours", peer) if not missing(name)]
        times: dict[str, list[float]] = {work.side: [] for work in works}
        with warm({work.side: (work, dict(os.environ)) for work in works}) as sides:
            for _ in range(steps):
                for name, side in sides.items():
                    times[name].append(side())
            peaks = {name: side("peak") for name, side in sides.items()}
        for name, seconds in times.items():
            rate = ctx / statistics.median(seconds)
            print(f"| {version} | {name} | {spread(seconds)} | {rate:.1f} | {peaks[name]:.0f} |", flush=True)
            found[f"{version},{name}"] = seconds
    return found


def size_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of another size than L12-D768."""
    for name, value in (("layers", LAYERS), ("width", WIDTH), ("vocab", VOCAB)):
        parser.add_argument(f"--{name}", type=int, default=value)


def in_process(words: list[str]) -> dict:
    """Run one row in a fresh interpreter."""
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--grad_cp", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=0)
    parser.add_argument("--peers", type=int, default=0)
    parser.add_argument("--ctx", type=int, default=512, help="of the steps beside others [512]")
    size_flags(parser.add_argument_group("another size of model, beside others"))
    parser.add_argument("--version", default="x070")
    parser.add_argument("--products", default="auto", choices=("auto", "torch", "onednn"))
    parser.add_argument("--raw", default="")
    parser.add_argument("--json", default="")
    flags = parser.parse_args()
    shared = flags.steps, flags.version, flags.products
    words = ["--steps", str(flags.steps), "--version", flags.version, "--products", flags.products]
    if flags.raw:  # one row, in this process
        mode, kind, ctx = flags.raw.split(",")
        if mode == "pairs":
            print(json.dumps(measure_pairs(kind, *shared)))
        else:
            print(json.dumps(measure_text(mode, kind, int(ctx), bool(flags.grad_cp), *shared)))
        return
    results = {}
    if flags.peers:
        results = beside_peers(flags.steps, flags.ctx, (flags.layers, flags.width, flags.vocab))
    elif flags.pairs:
        print("| DPO, LoRA r 16 | pairs/s median | best | peak MiB |\n|---|---|---|---|")
        for kind in kinds():
            found = in_process(["--raw", f"pairs,{kind},51", *words])
            results[f"pairs,{kind}"] = found
            rates = f"{found['pairs_per_s']:.1f} | {found['best_pairs_per_s']:.1f}"
            print(f"| {kind} | {rates} | {found['peak_mib']:.0f} |")
    else:
        print("| what | type | ctx | cp | tok/s | best | forward / backward / update s | peak MiB | GFLOP/s | share |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        rows = [tuple(flags.only.split(","))] if flags.only else [row for row in ROWS if row[1] in kinds()]
        for mode, kind, ctx in rows:
            r = results[f"{mode},{kind},{ctx}"] = in_process(
                ["--raw", f"{mode},{kind},{ctx}", "--grad_cp", str(flags.grad_cp), *words]
            )
            split = f"{r['forward']:.2f} / {r['backward']:.2f} / {r['update']:.2f}"
            rates = f"{r['tokens_per_s']:.0f} | {r['best_tokens_per_s']:.0f}"
            print(
                f"| {mode} | {kind} | {ctx} | {flags.grad_cp} | {rates} | {split} | {r['peak_mib']:.0f} | "
                f"{r['gflops']:.0f} | {r['share']:.0%} of {r['rate_gflops']:.0f} |",
                flush=True,
            )
    if flags.json:
        Path(flags.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
