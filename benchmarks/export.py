"""Time and peak memory of exports, without the judge: a random RWKV-7 in bf16, to each target in a process of its own.

python benchmarks/export.py [--layers 24] [--width 2048] [--folder F]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from rwkv_rlhf.checkpoints.loading import plain_model  # noqa: E402
from rwkv_rlhf.checkpoints.tensor_files import write_tensors  # noqa: E402
from rwkv_rlhf.model.rwkv7 import low_rank_sizes  # noqa: E402
from rwkv_rlhf.model.sizes import Sizes  # noqa: E402

CASES = (("gguf", "f16", "m.gguf"), ("gguf", "q8_0", "q.gguf"), ("hf", "bf16", "hf"), ("web_rwkv", "f16", "m.st"))


def write_model(path: Path, layers: int, width: int) -> int:
    """A model of random numbers; returns how many."""
    sizes = Sizes("x070", layers, width, 65536, 64, width, 4 * width, low_rank_sizes(width))
    shapes = dict(plain_model(sizes, torch.float32).named_parameters())
    write_tensors({name: torch.randn(shape.shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, path)
    return sum(shape.numel() for shape in shapes.values())


def run(*words: object) -> tuple[float, float]:
    """(seconds, peak GiB) of a process. Peaks count pages of the mapped file too, which the system may take back.

    This process stays small: a child's peak counts what its parent had when it was started.
    """
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, words
    return time.monotonic() - start, usage.ru_maxrss / 2**20


def main() -> None:
    """Prints a table."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--layers", type=int, default=24)
    flags.add_argument("--width", type=int, default=2048)
    flags.add_argument("--folder", default=None)
    flags.add_argument("--write", default="", help="only write the model there")
    args = flags.parse_args()
    if args.write:
        print(f"{write_model(Path(args.write), args.layers, args.width) / 1e9:.2f} billion parameters", flush=True)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        model = Path(place) / "model.pth"
        run(__file__, "--write", model, "--layers", args.layers, "--width", args.width)
        base, _ = run("-c", "import torch, safetensors.torch")
        size = model.stat().st_size / 2**30
        print(f"{size:.1f} GiB in bf16; import of torch {base:.1f} s")
        print("| target | type | s | peak GiB | file GiB |\n|---|---|---|---|---|")
        for target, dtype, name in CASES:
            output = Path(place) / name
            words = ["--load_model", model, "--to", target, "--dtype", dtype, "--output", output, "--check", 0]
            seconds, peak = run("export.py", *words)
            files = [output] if output.is_file() else list(output.iterdir())
            size = sum(file.stat().st_size for file in files) / 2**30
            print(f"| {target} | {dtype} | {seconds:.0f} | {peak:.2f} | {size:.2f} |", flush=True)
            for file in files:
                file.unlink()


if __name__ == "__main__":
    main()
