"""Memory while a packed model is loaded, in a process of its own, where what was imported and run before is known.

`loading_peak.py BASE MODE QUANT` writes, in bytes: the peak, what is left, the plan's peak, the plan's weights.
"""

import sys
from pathlib import Path

import torch

from rwkv_rlhf.layers.stores import store_class
from rwkv_rlhf.ops.product_table import ways_for
from rwkv_rlhf.ops.product_ways import SMALLEST
from rwkv_rlhf.settings.command_line import parse
from rwkv_rlhf.training.memory import loading_peak, weights_by_storage
from rwkv_rlhf.training.start import start
from tests.support.memory import forget_the_peak, resident


def main(base, mode, quant):
    """Loads small things first, so that libraries are there."""
    small = torch.randn(64, 64)
    store_class("nf4").pack(small).unpack()
    torch.linalg.svd(torch.linalg.qr(small).Q)
    ways_for(torch.bfloat16, SMALLEST)
    config = parse(["--load_model", base, "--peft", mode, "--data_file", "x", "--quant_mode", quant, "--lora_r", "16"])
    before = resident("VmRSS")
    forget_the_peak()
    ready = start(config, Path(base).parent)
    peak, after = resident("VmHWM") - before, resident("VmRSS") - before
    print(peak, after, loading_peak(ready), *weights_by_storage(ready.model).values())


if __name__ == "__main__":
    main(*sys.argv[1:])
