"""What the compilers say about cuda/*.cu and ops/triton: registers, spills and shared memory of every kernel.

    python benchmarks/static_gpu.py [--ops wkv7] [--kernels wkv7] [--architectures 90 gfx90a] [--all]

Needs nvcc, hipcc or Triton (benchmarks/static_triton.py), no GPU; what is missing is said. Prints one Markdown row for
each kernel of cuda/ that is new or differs from the architecture before it (--all prints all), and one for each of
Triton's (those whose names begin with one of --kernels) and architecture. Then the kernels that spill; one of them that
runs forward ends it with status 1.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from rwkv_rlhf.ops import gpu
from rwkv_rlhf.ops.build import Recipe

CUDA = ("80", "86", "89", "90", "100", "120")
HIP = ("gfx908", "gfx90a", "gfx942")


class Kernel(NamedTuple):
    """One compiled kernel. Spills: bytes per thread in memory, written plus read (AMD: bytes of scratch memory)."""

    op: str
    architecture: str
    name: str
    registers: int
    spills: int
    shared: int

    @property
    def forward(self) -> bool:
        """Whether inference runs it: backward kernels say so, or have `true` for the reversed sweep."""
        return "backward" not in self.name and "columns" not in self.name and "true" not in self.name


def listing(recipe: Recipe, *flags: str) -> str:
    """What a compiler says about a recipe. Raises RuntimeError with the first lines if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        line = [*recipe.command, *flags, str(recipe.source), "-o", str(Path(folder) / "x.so")]
        done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(" ".join(done.stderr.split()[:30]))
    return subprocess.run(["c++filt"], input=done.stderr, capture_output=True, text=True).stdout


def short(name: str) -> str:
    """`rows<64, 4, false, bf16>` of a whole signature."""
    name = re.sub(r"rwkv::|\(anonymous namespace\)::|^void ", "", name)
    return name.partition("(")[0]


def cuda_kernels(op: str, architecture: str) -> Iterator[Kernel]:
    """From `ptxas -v`."""
    text = listing(gpu.cuda_recipe(op, architecture), "-Xptxas", "-v")
    pattern = (
        r"entry function '(.+?)' for.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers(.*?)\n"
    )
    for name, stores, loads, registers, rest in re.findall(pattern, text, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        yield Kernel(
            op, architecture, short(name), int(registers), int(stores) + int(loads), int(shared[1]) if shared else 0
        )


def hip_kernels(op: str, architecture: str) -> Iterator[Kernel]:
    """From the kernel resource remarks of clang; registers are vector registers and accumulators."""
    text = listing(gpu.hip_recipe(op, architecture), "-Rpass-analysis=kernel-resource-usage")
    for part in text.split("Function Name: ")[1:]:
        numbers = {name: int(value) for name, value in re.findall(r"remark: +([\w ]+?)(?: \[\S+\])?: (\d+)", part)}
        registers = numbers["VGPRs"] + numbers.get("AGPRs", 0)
        name = short(part.partition(" [-R")[0])
        yield Kernel(op, architecture, name, registers, numbers["ScratchSize"], numbers["LDS Size"])


def main() -> None:
    """Compile, print, and judge the forward kernels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", default=sorted(path.stem for path in gpu.SOURCES.glob("*.cu")))
    parser.add_argument("--architectures", nargs="+", default=[*CUDA, *HIP])
    parser.add_argument("--kernels", nargs="+", default=[""])
    parser.add_argument("--all", action="store_true")
    args = parser.parse_args()
    spilled, last = [], {}
    print("| op | arch | kernel | registers | spill bytes | static shared bytes |\n|---|---|---|---:|---:|---:|")
    for op in args.ops:
        for architecture in args.architectures:
            hip = architecture.startswith("gfx")
            try:
                found = list((hip_kernels if hip else cuda_kernels)(op, architecture))
            except RuntimeError as error:  # a BuildError, where there is no compiler, is one
                print(f"| {op} | {architecture} | skipped: {error} | | | |")
                continue
            for kernel in found:
                if kernel.name == "probe":
                    continue
                spilled += [kernel] if kernel.forward and kernel.spills else []
                if args.all or last.get((op, kernel.name)) != kernel[3:]:
                    print("| " + " | ".join(str(x) for x in kernel) + " |", flush=True)
                last[op, kernel.name] = kernel[3:]
    rows = triton_rows(args.kernels, args.architectures)
    bad = [f"{x.op} {x.name} {x.architecture}" for x in spilled]
    bad += [f"Triton's {x.name} {x.architecture}" for x in rows if x.forward and x.spills]
    backward = [f"{x.name} {x.architecture}, {x.spills} bytes" for x in rows if not x.forward and x.spills]
    print(f"\nTriton's backward kernels that spill: {'; '.join(backward) or 'none'}")
    if bad:
        sys.exit(f"forward kernels that spill: {', '.join(bad)}")


def triton_rows(kernels: list[str], architectures: list[str]) -> list[Any]:
    """What static_triton.py finds for those of the architectures that it knows; none where Triton is missing."""
    try:
        import static_triton  # beside this file
    except ImportError as error:
        print(f"\nTriton's kernels skipped: {error}")
        return []
    print()
    known = [name for name in architectures if name in (*static_triton.CUDA, *static_triton.HIP)]
    return static_triton.table(kernels, known)


if __name__ == "__main__":
    main()
