"""What Triton's compilers say about ops/triton: registers, spills, shared memory and matrix instructions.

    python benchmarks/static_triton.py [--kernels wkv7 pointwise] [--architectures 80 90 gfx942]

Compiles every kernel ahead of time, for bfloat16 tensors and the tiles that ops/triton chooses. Needs Triton, no GPU.
Prints one Markdown row for each kernel and architecture. Spills are instructions' bytes in the code, not traffic:
those of values that are the same in every turn of a loop are written once.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rwkv_rlhf.ops.triton import channel_state, elementwise, logprob, matrix_state, pieces, pointwise, recurrences, rows

CUDA = ("80", "89", "90", "100")
HIP = ("gfx90a", "gfx942")
BLACKWELL = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas-blackwell"
# Arguments that are no tensors of activations
FLOATS = (
    "u state last kept maps found dlast du dstate states inverses sums "
    "mixes v0 dv0 k_k k_a a0 parts r_k weight bias dmixes dlast"
)
TYPES = dict.fromkeys(FLOATS.split(), "*fp32") | dict.fromkeys(("starts", "pieces", "targets", "argmax"), "*i64")
TYPES |= dict.fromkeys(["lse", "target_logit", "logit_sum", "max_logit", "g_logp", "g_mean", "g_max"], "*fp32")
TYPES |= dict.fromkeys(("H", "C", "V", "rows", "count"), "i32") | {"stride": "i64", "marks": "*i32"}
MIXES = 6  # of RWKV-7's attention


class Row(NamedTuple):
    """What is known of a compiled kernel. failure: the compiler's words, "" = it was compiled."""

    name: str
    architecture: str
    registers: str
    spills: int
    shared: int
    instructions: str
    seconds: float
    failure: str = ""

    @property
    def forward(self) -> bool:
        """Whether inference runs it."""
        return "backward" not in self.name and self.name != "row_grad"


class Case(NamedTuple):
    """A kernel with its constants and the types of arguments that differ from TYPES and bfloat16."""

    name: str
    function: Any
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 1
    types: dict[str, Any] = {}  # noqa: RUF012
    cut: recurrences.Tiles | None = None  # of a backward program, whose warps depend on the device


def cases() -> Iterator[Case]:
    """Every kernel of ops/triton, the matrix states with heads of 64 in one program and in two, and of 128."""
    for version in (7, 6, 5):
        for size, programs in ((64, 1 << 20), (64, 1), (128, 1 << 20)):
            cut = recurrences.tiles(size, programs, 132)
            base = {"VERSION": version, "N": size, "VB": cut.values, "L": cut.chunk, "GROUP": recurrences.GROUP}
            label = f"N {size}, values {cut.values}"
            vectors = {"w": "*fp32", "dw": "*fp32"} if version == 5 else {}
            parts = dict.fromkeys(("dr", "dw", "dk", "da", "db"), "*fp32") if cut.values < size else {}
            forward = base | {"KEEP": True}
            yield Case(f"wkv{version} forward, {label}", matrix_state.forward, forward, cut.warps, types=vectors)
            yield Case(
                f"wkv{version} backward, {label}",
                matrix_state.backward,
                base,
                cut.warps,
                types=parts | vectors,
                cut=cut,
            )
            yield from piece_cases(version, size, cut, vectors)
    floats = dict.fromkeys(("w", "dw"), "*fp32")
    channels = {"BLOCK": recurrences.CHANNELS, "GROUP": recurrences.CHANNEL_GROUP}
    warps = recurrences.CHANNELS // 32
    yield Case("wkv4 forward", channel_state.forward, channels | {"KEEP": True}, warps, types=floats)
    yield Case("wkv4 backward", channel_state.backward, channels, warps, types=floats)
    tile = {"ROWS": elementwise.ROWS, "BLOCK": elementwise.BLOCK}
    mix = tile | {"M": MIXES, "HAS_LAST": True}
    grads = {"last": "*bf16", "dlast": "*bf16"}
    yield Case("token_mix", pointwise.token_mix, mix, types=grads | {"out": ("*bf16",) * MIXES})
    grads = grads | {"grads": ("*bf16",) * MIXES}
    yield Case("token_mix_backward", pointwise.token_mix_backward, mix, types=grads)
    yield Case("value_gate", pointwise.value_gate, tile)
    yield Case("value_gate_backward", pointwise.value_gate_backward, tile)
    head = {**elementwise.head(64), "EPS": 1e-5}
    for name in ("delta_keys", "gated_norm"):
        yield Case(name, getattr(pointwise, name), head)
        yield Case(f"{name}_backward", getattr(pointwise, f"{name}_backward"), head)
    for width in (768, 4096):
        lanes = elementwise.lanes(width)
        warps, constants = lanes.pop("num_warps"), lanes | {"EPS": 1e-5}
        yield Case(f"residual_norm, C {width}", pointwise.residual_norm, constants, warps)
        yield Case(f"residual_norm_backward, C {width}", pointwise.residual_norm_backward, constants, warps)
    yield Case("relu_squared", pointwise.relu_squared, {"BLOCK": elementwise.LINE})
    yield Case("relu_squared_backward", pointwise.relu_squared_backward, {"BLOCK": elementwise.LINE})
    yield Case("row_stats", rows.row_stats, {"BLOCK": logprob.BLOCK})
    yield Case("row_grad", rows.row_grad, {"BLOCK": logprob.BLOCK})


def piece_cases(version: int, size: int, cut: recurrences.Tiles, vectors: dict[str, Any]) -> Iterator[Case]:
    """The kernels of rows in pieces. WKV-7's are the same for all tiles, and `join` is for those of all versions."""
    narrow = cut.values < min(size, 64)
    values = recurrences.HALF_TILE if version == 7 else cut.values
    for way, back in (("forward", False), ("backward", True)):
        base = {"VERSION": version, "N": size, "VB": values, "BACK": back}
        if version != 7 or not narrow:
            name = f"wkv{version} sweep {way}, N {size}, values {values}"
            yield Case(name, pieces.sweep, base | {"L": cut.chunk}, cut.warps, types=vectors)
        if not narrow:
            join = recurrences.join_tiles(size)
            name = f"wkv{version} join {way}, N {size}, values {join['VB']}"
            how = join.pop("num_warps"), join.pop("num_stages")
            yield Case(name, pieces.join, base | join, *how)


def compiled(case: Case, architecture: str) -> Any:
    """The kernel for an architecture, its pointers multiples of 16 bytes as torch's are."""
    hip = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if hip else GPUTarget("cuda", int(architecture), 32)
    constants, names = dict(case.constants), case.function.arg_names
    if "COARSE" in names:
        constants |= {"COARSE": tl.bfloat16, "FINE": "ieee" if hip else "tf32"}
    elif "FINE" in names:
        constants["FINE"] = "ieee" if hip else "tf32x3"
    signature = {
        name: "constexpr" if name in constants else case.types.get(name, TYPES.get(name, "*bf16")) for name in names
    }
    attrs: dict[tuple[int, ...], Any] = {}
    for at, kind in enumerate(signature.values()):
        places = [(at, i) for i in range(len(kind))] if isinstance(kind, tuple) else [(at,)]
        for place in places:
            if (kind[place[1]] if len(place) > 1 else kind).startswith("*"):
                attrs[place] = [["tt.divisibility", 16]]
    fixed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=case.function, signature=signature, constexprs=fixed, attrs=attrs)
    warps = case.warps if case.cut is None else recurrences.backward_warps(case.cut, 0 if hip else int(architecture))
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": case.stages})


def report(kernel: Any) -> tuple[str, int, int, str]:
    """Registers, spilled bytes, shared bytes, and matrix instructions of a compiled kernel."""
    shared = kernel.metadata.shared
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        count = {name: re.search(rf"\.{name}:\s+(\d+)", text) for name in ("vgpr_count", "vgpr_spill_count")}
        scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)
        instructions = sorted(set(re.findall(r"v_mfma_(\w+)", text)))
        return count["vgpr_count"][1], int(scratch[1]), shared, ", ".join(instructions)
    text = kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(text)
        architecture = re.search(r"\.target (\w+)", text)[1]
        line = [BLACKWELL, "-v", f"--gpu-name={architecture}", source, "-o", Path(folder) / "kernel.cubin"]
        done = subprocess.run(line, capture_output=True, text=True)
    said = done.stderr + done.stdout
    spills = sum(int(x) for x in re.findall(r"(\d+) bytes spill", said))
    registers = re.search(r"Used (\d+) registers", said)
    found = re.findall(r"(wgmma|tcgen05\.mma|mma\.sync)\S*?(m\d+n\d+k\d+)?\S*?\.(tf32|bf16|f16)\b", text)
    instructions = sorted({f"{name} {shape} {kind}".replace("  ", " ") for name, shape, kind in found})
    return registers[1] if registers else "?", spills, shared, ", ".join(instructions)


def table(kernels: Sequence[str], architectures: Sequence[str]) -> list[Row]:
    """Compile and print the kernels whose names begin with one of `kernels`."""
    print(f"Triton {triton.__version__}\n")
    print("| kernel | arch | registers | spill bytes | shared bytes | matrix instructions | compile s |")
    print("|---|---|---:|---:|---:|---|---:|")
    found = []
    for case in cases():
        if not case.name.startswith(tuple(kernels)):
            continue
        for architecture in architectures:
            began = time.perf_counter()
            try:
                about = report(compiled(case, architecture))
                row = Row(case.name, architecture, *about, time.perf_counter() - began)
                text = f"{row.registers} | {row.spills} | {row.shared} | {row.instructions} | {row.seconds:.0f}"
            except Exception as error:  # of several compilers; the table goes on
                row = Row(case.name, architecture, "", 0, 0, "", 0, str(error).splitlines()[0][:80])
                text = f"failed: {row.failure} | | | | "
            print(f"| {row.name} | {row.architecture} | {text} |", flush=True)
            found.append(row)
    return found


def main() -> None:
    """Compile and print; kernels whose name begins with one of --kernels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", default=[""])
    parser.add_argument("--architectures", nargs="+", default=[*CUDA, *HIP])
    args = parser.parse_args()
    table(args.kernels, args.architectures)


if __name__ == "__main__":
    main()
