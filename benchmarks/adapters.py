"""What each adapter and each storage costs: tokens per second and peak memory of a training step, one switch a row.

python benchmarks/adapters.py [--json PATH]                # L12-D768, ctx 1024, bf16, on the CPU
python benchmarks/adapters.py --layers 2 --width 128 --ctx 128 --vocab 1024 --steps 2      # a quick look
python benchmarks/adapters.py --gpu 1                      # 0.4B and 1.5B on a GPU, beside RWKV-PEFT's published table

The ladder begins with full training and switches one thing a row: first the adapter, over bf16 matrices, then, with
LoRA, the storage. Random RWKV-7 weights from a file, loaded, trained and clipped as train.py does, AdamW, one row of
random tokens. Every row runs in a process of its own. CPU memory is VmHWM, which counts interpreter and libraries (some
450 MiB), in two spans: while loading, and from then on. GPU memory is what PyTorch reserved at most in the steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
ADAPTED = ("full", "lora", "pissa", "bone", "dora", "miss", "state")
PACKED = ("int8", "fp8", "nf4", "fp4")
RANKS = {"bone": 64, "miss": 64}  # as many numbers to train as the others have with 16 in square matrices
# RWKV-PEFT's README: GB at ctx 1024, micro_bsz 1, by size and storage; the shapes of those models
PUBLISHED = {
    "0.4B": (24, 1024, {"none": 3.4, "int8": 2.9, "nf4": 2.7}),
    "1.5B": (24, 2048, {"none": 5.6, "int8": 4.6, "nf4": 3.9}),
}
TARGET = 0.8


def peak_mib(forget: bool = False) -> float:
    """High-water mark of this process's resident memory, in MiB; `forget` begins a new span."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    return found


def write_base(path: Path, layers: int, width: int, vocab: int) -> None:
    """A bf16 checkpoint of RWKV-7 in which no matrix is zero."""
    import torch

    from rwkv_rlhf.checkpoints.tensor_files import write_tensors
    from rwkv_rlhf.model.initial import initial_tensors

    tensors = initial_tensors("x070", layers, width, vocab, 64, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, value in tensors.items():
        if value.dim() == 2 and not value.any():
            value = torch.randn(value.shape, generator=generator) * 0.02
        tensors[name] = value.bfloat16()
    write_tensors(tensors, path)


def measure(base: str, mode: str, quant: str, ctx: int, steps: int, rank: int, device: str, grad_cp: bool) -> dict:
    """One row of the ladder, in this process."""
    import dataclasses

    import torch

    from rwkv_rlhf.checkpoints.loading import BuildOptions, load_model
    from rwkv_rlhf.data.batch import TextBatch
    from rwkv_rlhf.host_memory import keep_pages, return_pages
    from rwkv_rlhf.losses import LOSSES
    from rwkv_rlhf.plan import make_plan
    from rwkv_rlhf.scoring.forward import text_hidden
    from rwkv_rlhf.settings.config import Config
    from rwkv_rlhf.training.memory import weights_by_storage
    from rwkv_rlhf.training.optimizers import adamw, parameter_groups

    rank = rank or RANKS.get(mode, 16)
    plan = make_plan(mode, _layers(base), rank=rank, alpha=2.0 * rank, dropout=0.0, lr_init=1e-5, lr_final=1e-5)
    plan = dataclasses.replace(plan, states=("att.time_state",) if mode == "state" else ())
    return_pages()
    begin = time.perf_counter()
    build = {"plan": plan, "quant": quant, "device": device, "grad_cp": grad_cp}
    model, report = load_model(base, BuildOptions(torch.bfloat16, **build))
    loaded = time.perf_counter() - begin
    loading = peak_mib(forget=True)
    if device == "cpu":
        keep_pages()
    model.train()
    optimizer = adamw(parameter_groups(model, plan, "x070", True), (0.9, 0.99), 1e-8)
    config = Config(loss="sft")
    generator = torch.Generator().manual_seed(3)
    spent = []
    for _ in range(steps + 1):
        row = torch.randint(1, model.sizes.vocab_size, (ctx + 1,), generator=generator)
        batch = TextBatch(row[:-1], row[1:], torch.tensor([0, ctx]), float(ctx))
        batch = batch.to(device) if device != "cpu" else batch
        begin = time.perf_counter()
        hidden = text_hidden(model, batch)
        loss = LOSSES["sft"].from_hidden(model.head, hidden, batch, config).value / batch.total
        loss.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device != "cpu":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - begin)
    peak = peak_mib() if device == "cpu" else torch.cuda.max_memory_reserved() / 2**20
    return {
        "tokens_per_s": ctx / statistics.median(spent[1:]),
        "best_tokens_per_s": ctx / min(spent[1:]),
        "peak_mib": peak,
        "loading_mib": loading,
        "load_s": loaded,
        "trained": report.trained,
        "weights_mib": sum(weights_by_storage(model).values()) / 2**20,
    }


def _layers(base: str) -> int:
    from rwkv_rlhf.checkpoints.loading import file_sizes

    return file_sizes(base).n_layer


def bytes_per_parameter(width: int) -> dict[str, float]:
    """Bytes that each storage takes for one number of a width x width matrix."""
    import torch

    from rwkv_rlhf.layers.stores import STORES

    weight = torch.randn(width, width, dtype=torch.bfloat16)
    packed = {mode: store.pack(weight).bytes() / weight.numel() for mode, store in STORES.items()}
    return {"none (bf16)": 2.0} | packed


def in_process(base: Path, mode: str, quant: str, flags: argparse.Namespace, device: str) -> dict:
    """Run one row in a fresh interpreter."""
    words = ["--raw", f"{mode},{quant}", "--base", str(base), "--device", device, "--ctx", str(flags.ctx)]
    words += ["--steps", str(flags.steps), "--rank", str(flags.rank), "--grad_cp", str(flags.grad_cp)]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def ladder(flags: argparse.Namespace, folder: Path) -> dict:
    """The table of the CPU."""
    base = folder / "base.pth"
    write_base(base, flags.layers, flags.width, flags.vocab)
    results = {}
    print("| what | storage | trains | tok/s | best | step peak MiB | loading peak MiB | load s | weights MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = [(mode, "none") for mode in ADAPTED] + [("lora", quant) for quant in PACKED]
    for mode, quant in rows:
        r = results[f"{mode},{quant}"] = in_process(base, mode, quant, flags, "cpu")
        rates = f"{r['tokens_per_s']:.0f} | {r['best_tokens_per_s']:.0f}"
        memory = f"{r['peak_mib']:.0f} | {r['loading_mib']:.0f} | {r['load_s']:.1f} | {r['weights_mib']:.0f}"
        print(f"| {mode} | {quant} | {r['trained']:,} | {rates} | {memory} |", flush=True)
    print("\n| storage | bytes per parameter |\n|---|---|")
    results["bytes"] = bytes_per_parameter(flags.width)
    for mode, size in results["bytes"].items():
        print(f"| {mode} | {size:.4f} |")
    return results


def published(flags: argparse.Namespace, folder: Path) -> dict:
    """The table of the GPU: LoRA over three storages, in GB beside what RWKV-PEFT says."""
    results = {}
    print("| size | storage | tok/s | peak GB | RWKV-PEFT GB | ratio |\n|---|---|---|---|---|---|")
    for size, (layers, width, cells) in PUBLISHED.items():
        base = folder / "base.pth"
        write_base(base, layers, width, flags.vocab)
        for quant, theirs in cells.items():
            r = results[f"{size},{quant}"] = in_process(base, "lora", quant, flags, "cuda")
            ours = r["peak_mib"] * 2**20 / 1e9
            met = "" if ours <= TARGET * theirs else f", not {TARGET}"
            print(
                f"| {size} | {quant} | {r['tokens_per_s']:.0f} | {ours:.2f} | {theirs} | {ours / theirs:.2f}{met} |",
                flush=True,
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 12), ("width", 768), ("vocab", 65536), ("ctx", 1024), ("steps", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rank", type=int, default=0, help="of the adapters [16; Bone and MiSS 64; 64 with --gpu]")
    parser.add_argument("--grad_cp", type=int, default=1)
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--raw", default="", help=argparse.SUPPRESS)
    parser.add_argument("--base", default="", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", help=argparse.SUPPRESS)
    parser.add_argument("--json", default="")
    flags = parser.parse_args()
    if flags.raw:  # one row, in this process
        mode, quant = flags.raw.split(",")
        row = (mode, quant, flags.ctx, flags.steps, flags.rank, flags.device, bool(flags.grad_cp))
        print(json.dumps(measure(flags.base, *row)))
        return
    if flags.gpu and not flags.rank:
        flags.rank = 64
    with tempfile.TemporaryDirectory() as folder:
        results = (published if flags.gpu else ladder)(flags, Path(folder))
    if flags.json:
        Path(flags.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
