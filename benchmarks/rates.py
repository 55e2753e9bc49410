"""Rates of the machine to compare with: float32 multiply-adds in registers, and matrix products."""

import ctypes
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from rwkv_rlhf.ops.build import FLAGS, ISA_FLAGS, compiler
from rwkv_rlhf.ops.cpu import instruction_set

LANES = {"AMX": 16, "AVX512": 16, "AVX2": 8}
CHAINS, TURNS = 10, 4_000_000  # enough independent sums to hide the latency of one, few enough for the registers
OPENMP = ("-fopenmp", "-fvisibility=default")
SOURCE = """
typedef float vec __attribute__((vector_size({lanes} * 4)));
extern "C" void multiply_add(int threads, long turns, float* out) {{
    #pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {{
        vec x = vec{{}} + out[0], y = vec{{}} + out[1], sum = vec{{}};
        vec {names};
        for (long turn = 0; turn < turns; ++turn) {{ {body} }}
        {total}
        out[2 + thread] = sum[0];
    }}
}}
"""


def fma_gflops(threads: int) -> float:
    """Best rate of float32 multiply-adds whose operands never leave the registers, 2 operations each."""
    lanes = LANES.get(instruction_set(), 4)
    names = [f"a{n}" for n in range(CHAINS)]
    text = SOURCE.format(
        lanes=lanes,
        names=", ".join(f"{a} = x" for a in names),
        body=" ".join(f"{a} = {a} * x + y;" for a in names),
        total=" ".join(f"sum += {a};" for a in names),
    )
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "rate.cpp"), Path(folder, "rate.so")
        source.write_text(text)
        flags = (*FLAGS, *ISA_FLAGS[instruction_set()])
        subprocess.run([compiler()[0], *flags, *OPENMP, str(source), "-o", str(target)], check=True)
        run = ctypes.CDLL(str(target)).multiply_add
    out = torch.full((2 + threads,), 0.5)
    best = math.inf
    for _ in range(12):
        start = time.perf_counter()
        run(threads, ctypes.c_long(TURNS), ctypes.c_void_p(out.data_ptr()))
        best = min(best, time.perf_counter() - start)
    return 2e-9 * threads * lanes * CHAINS * TURNS / best


def gemm_gflops(device: torch.device, size: int = 1536, seconds: float = 2.0) -> float:
    """Best float32 rate of a square matrix product."""
    a = torch.randn(size, size, device=device)
    best, began = math.inf, time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2e-9 * size**3 / best
