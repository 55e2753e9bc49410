"""`--doctor 1`: what this machine has, which kernel runs where and why, and whether each one is right.

Nothing is trained or written, except that kernels are compiled into their cache.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain

import torch
from rich.console import Console
from rich.table import Table

from rwkv_rlhf.host_cores import host_cores
from rwkv_rlhf.host_memory import host_bytes
from rwkv_rlhf.ops import build, compiling, cpu, gpu
from rwkv_rlhf.ops.check import Finding, chosen, findings, speeds
from rwkv_rlhf.ops.fastest import SLOW, fastest_precision, product_rate, slowness
from rwkv_rlhf.ops.product_table import KNOWN, figures_of, kept_seconds, processor, ways_for
from rwkv_rlhf.ops.product_ways import SMALLEST
from rwkv_rlhf.precision import DTYPES, NAMES
from rwkv_rlhf.reports.words import size
from rwkv_rlhf.settings.counted import counted
from rwkv_rlhf.settings.optional import OPTIONAL
from rwkv_rlhf.training.verdict import verdict

GIB = 1 << 30
WIDTH = 120
DISAGREEMENT = 1  # exit status


def doctor() -> int | None:
    """Print the examination; returns the exit status: None when every kernel that can run here agrees."""
    console = Console(soft_wrap=True, highlight=False, width=WIDTH)
    parts = {"machine": (machine(), space(), rates(), ways()), "packages": (packages(),), "compilers": (compilers(),)}
    for title, lines in (parts | {"kernel cache": (cache(),)}).items():
        console.print(f"[bold]{title}[/bold]")
        for name, text in chain.from_iterable(lines):
            console.print(f"  {name:<10} {text}", markup=False)
    console.print("[bold]kernels[/bold] (each against the plain loop in float64, values and gradients)")
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    found = []
    for finding in findings(devices):
        found.append(finding)
        if finding.failure:
            console.print(f"  {finding.case} on {finding.device} broke: {finding.failure}", markup=False)
    ran = [finding for finding in found if not finding.refusal]
    if ran:
        console.print(table(ran))
    if any(finding.backend == "cpu" for finding in ran):
        console.print(f"  CPU kernels {origin()}", markup=False)
    for case, reason in refusals(found):
        console.print(f"  {case}: {reason}", markup=False)
    console.print("[bold]speed[/bold] (forward and backward; B x T x H x N)")
    for speed in speeds(found):
        shape = " x ".join(map(str, speed.shape))
        figures = f"{speed.milliseconds:9.2f} ms {speed.gigabytes:8.1f} GB/s"
        about = f"{speed.op} {speed.backend:<6} {speed.device:<6} {NAMES[speed.dtype]}  {shape:<18}"
        console.print(f"  {about} {figures}", markup=False)
    console.print(f"  {chosen(devices)}", markup=False)
    console.print("[bold]verdict[/bold]")
    console.print(f"  {said(devices)}", markup=False)
    wrong = [finding for finding in found if not finding.agrees]
    if wrong:
        names = ", ".join(dict.fromkeys(f"{f.case} ({f.backend}, {NAMES[f.dtype]})" for f in wrong))
        console.print(f"NOT RIGHT: {names}. Train with --wkv_backend naive, and report this table.", markup=False)
        return DISAGREEMENT
    console.print("every kernel that can run here agrees" if ran else "no compiled kernel can run here")
    return None


def machine() -> Iterator[tuple[str, str]]:
    """Processor, PyTorch and GPUs."""
    yield "processor", f"{platform.machine()}, {cpu.instruction_set()}, {counted(torch.get_num_threads(), 'thread')}"
    times = slowness("bf16", "cpu")
    yield (
        "precision",
        f"{fastest_precision('cpu')} on the CPU: a product in bf16 takes {times:.1f} times as long as in fp32",
    )
    built_for = torch.version.cuda and f"CUDA {torch.version.cuda}"
    built_for = built_for or (torch.version.hip and f"ROCm {torch.version.hip}") or "CPU only"
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "torch", f"{torch.__version__}, built for {built_for}"
    for i in range(torch.cuda.device_count()):
        device = torch.device("cuda", i)
        about = torch.cuda.get_device_properties(device)
        yield f"GPU {i}", f"{about.name}, {about.total_memory / GIB:.0f} GiB, {gpu.architecture(device)}"
    if not torch.cuda.device_count():
        nvidia = shutil.which("nvidia-smi") is not None
        reason = "the driver is there, but this torch cannot use it" if nvidia else "none that torch can use"
        yield "GPU", f"{reason}; training runs on the processor"


def space() -> Iterator[tuple[str, str]]:
    """Memory, disk and cores."""
    disk = shutil.disk_usage(".")
    yield "memory", size(host_bytes()) if host_bytes() else "not known"
    yield "disk", f"{size(disk.free)} free of {size(disk.total)} where this was typed"
    yield "cores", f"{host_cores()}"


def rates() -> Iterator[tuple[str, str]]:
    """Products in each precision, on all cores and on the GPU."""
    devices = [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]
    for device in devices:
        names = ("bf16", "fp32") if device.type == "cpu" else ("bf16", "fp16", "fp32")
        found = ", ".join(f"{name} {product_rate(name, device) / 1e9:,.3g}" for name in names)
        yield "products", f"{device.type}: {found} GFLOP/s"


def ways() -> Iterator[tuple[str, str]]:
    """What each way of multiplying by a matrix reaches on one core, and which one trains (--products auto)."""
    for name in ("bf16", "fp32"):
        if slowness(name, "cpu") < SLOW:
            dtype = DTYPES[name]
            origin = "known of this processor" if processor() in KNOWN else "measured here"
            for product, figures in figures_of(kept_seconds(dtype), ways_for(dtype, SMALLEST)):
                yield "", f"{name} {product}, {origin}, by rows: {figures}"


def packages() -> Iterator[tuple[str, str]]:
    """What is installed beside the necessary, and what for."""
    have = [name for name in OPTIONAL if importlib.util.find_spec(name) is not None]
    yield "installed", ", ".join(f"{name} ({OPTIONAL[name]})" for name in have) or "none"
    lacking = [f"{name} ({purpose})" for name, purpose in OPTIONAL.items() if name not in have]
    if lacking:
        yield "missing", ", ".join(lacking)


def said(devices: list[torch.device]) -> str:
    """The verdict on the GPU, or on the processor where there is none."""
    device = devices[-1]
    gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if gpu else host_bytes()
    precision = fastest_precision(device.type)
    return verdict(memory, precision, gpu=gpu, rate=lambda: product_rate(precision, device))


def compilers() -> Iterator[tuple[str, str]]:
    """Each compiler with its version, or what is missing without it."""
    try:
        command, version = build.compiler()
        yield "C++", f"{version} ({command})"
    except build.BuildError as error:
        here = cpu.instruction_set()
        missing = [name for name in build.host_kernels() if build.packaged(name, here) is None]
        slow = "Until then the kernels run as plain PyTorch, 50 times slower and more"
        yield "C++", f"{error}. {slow if missing else 'The installation brings the kernels and needs none'}"
    for name, purpose in (("nvcc", "NVIDIA"), ("hipcc", "AMD")):
        try:
            path = gpu.compiler(name)
        except build.BuildError:
            yield name, f"not found: {purpose} GPUs would run plain PyTorch"
            continue
        done = subprocess.run([path, "--version"], capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if "release" in line or "version" in line.lower()]
        yield name, f"{(lines or ['no version given'])[-1].strip()} ({path})"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield "--compile", compiling.refusal(device) or f"torch.compile has what it needs for {device.type}"


def cache() -> Iterator[tuple[str, str]]:
    """Where compiled kernels lie, and locks that somebody holds at this moment."""
    try:
        folder = build.cache_folder()
    except build.BuildError as error:
        yield "folder", str(error)
        return
    yield "folder", f"{folder}, {counted(len(list(folder.glob('*/*.so'))), 'binary', 'binaries')}"
    for lock in sorted(folder.glob("*/lock")):
        if build.held(lock):
            wait = f"{build.LOCK_PATIENCE:.0f} s"
            yield "lock", f"{lock} is held: another process compiles. A run waits at most {wait} and then goes on"


def table(found: list[Finding]) -> Table:
    """What ran: error of the worst tensor against its limit, and times of forward and backward together."""
    out = Table(box=None, pad_edge=False)
    for title in ("", "backend", "device", "dtype", "worst", "error", "limit", "ms", "plain ms", ""):
        right = title in ("error", "limit", "ms", "plain ms")
        out.add_column(title, justify="right" if right else "left", no_wrap=True)
    for f in found:
        numbers = (f"{f.error:.1e}", f"{f.limit:.0e}", f"{f.milliseconds:.2f}", f"{f.plain_milliseconds:.1f}")
        verdict = "ok" if f.agrees else "BROKEN" if f.failure else "WRONG"
        out.add_row(f"  {f.case}", f.backend, f.device, NAMES[f.dtype], f.worst, *numbers, verdict)
    return out


def origin() -> str:
    """Where the CPU kernels that ran come from, in words."""
    isa = cpu.instruction_set()
    if all(build.packaged(name, isa) for name in build.host_kernels()):
        return f"for {isa} from the installation"
    return f"for {isa} compiled on this machine"


def refusals(found: list[Finding]) -> Iterator[tuple[str, str]]:
    """Kernels that cannot run here and why, each reason once."""
    reasons: dict[str, list[str]] = {}
    for f in found:
        if f.refusal:
            reasons.setdefault(f"the {f.backend} kernel does not run: {f.refusal}", []).append(f.case)
    for reason, cases in reasons.items():
        yield ", ".join(dict.fromkeys(cases)), reason
