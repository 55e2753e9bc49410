"""What --dry_run says of memory is what a run takes: packed models are loaded one layer at a time."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from src.model.initial import initial_tensors

ROOT = Path(__file__).resolve().parent.parent

# in a process of its own: what was imported and run once before does not count
LOADING = """
import sys
from pathlib import Path
import torch
from src.cli import parse
from src.layers.stores import store_class
from src.training.memory import loading_peak, weights_by_storage
from src.training.start import start

def field(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

small = torch.randn(64, 64)
store_class("nf4").pack(small).unpack()
torch.linalg.svd(torch.linalg.qr(small).Q)
base, mode, quant = sys.argv[1:]
words = ["--load_model", base, "--peft", mode, "--data_file", "x", "--quant_mode", quant, "--lora_r", "16"]
config = parse(words)
before = field("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
ready = start(config, Path(base).parent)
print(field("VmHWM") - before, field("VmRSS") - before, loading_peak(ready), *weights_by_storage(ready.model).values())
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Four blocks of 12.6 million parameters: large beside what an allocator wastes."""
    path = tmp_path_factory.mktemp("large") / "base.pth"
    tensors = initial_tensors("x070", 4, 1024, 2048, 64, 1)
    for name, value in tensors.items():
        noise = 0.02 * torch.randn(value.shape) if value.dim() == 2 else 0.0
        tensors[name] = (value + noise).bfloat16()
    torch.save(tensors, path)
    return path


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("mode", "quant"), [("lora", "nf4"), ("pissa", "int8")])
def test_loading_takes_what_the_plan_says(large, mode, quant):
    """If this breaks, a model that fits in memory packed does not get there: its dense form was there first."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this kernel does not forget a peak")
    pytest.importorskip("bitsandbytes")
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(large), mode, quant], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    peak, after, estimate, *weights = map(int, done.stdout.split())
    assert peak <= 1.1 * estimate, (peak, estimate)
    assert peak >= 0.8 * estimate, (peak, estimate)
    assert after <= 1.15 * sum(weights), (after, weights)
    dense = 2 * sum(tensor.numel() for tensor in torch.load(large, mmap=True, weights_only=True).values())
    assert mode == "pissa" or peak < dense


def test_the_dry_run_lists_weights_by_storage(script, base_model, vocab_file, text_jsonl, tmp_path):
    """If this breaks, a user cannot see what packing saves."""
    pytest.importorskip("bitsandbytes")
    words = ["--load_model", base_model, "--vocab_file", vocab_file, "--proj_dir", tmp_path, "--data_file", text_jsonl]
    status, out, err = script(train.main, *words, "--peft", "lora", "--quant_mode", "nf4", "--dry_run", 1)
    assert status == 0, err
    for part in ("weights nf4", "weights bf16", "weights fp32, training", "adapters", "optimizer", "while loading"):
        assert part in out
