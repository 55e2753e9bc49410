"""Memory of training steps in a process of its own: `step_peak.py FLAGS` writes the peak and the plan's, in bytes.

What a library makes once for each shape of a product (code, for a processor with AMX 25 MB of it) is there before
counting begins: the same steps run first, with every freed page given back.
"""

import ctypes
import sys

import torch

from rwkv_rlhf.checkpoints.loading import BuildOptions, build_model
from rwkv_rlhf.data.batch import TextExample, pack_texts
from rwkv_rlhf.host_memory import keep_pages, return_pages
from rwkv_rlhf.losses import LOSSES
from rwkv_rlhf.model.initial import initial_tensors
from rwkv_rlhf.plan import plan_for
from rwkv_rlhf.precision import DTYPES
from rwkv_rlhf.scoring.forward import batch_loss
from rwkv_rlhf.settings.command_line import parse
from rwkv_rlhf.training.memory import memory_by_part
from rwkv_rlhf.training.optimizers import adamw, parameter_groups
from tests.support.memory import forget_the_peak, resident


def run(words, freed, layers=2, width=256, vocabulary=2048, tokens=512):
    """Two steps of a fresh model; the bytes that the plan says. freed: what becomes of pages from then on."""
    config = parse(words)
    plan = plan_for(config, layers)
    made = initial_tensors(config.version, layers, width, vocabulary, 64)
    form = {"compute_dtype": DTYPES[config.precision], "plan": plan, "quant": config.storage, "grad_cp": config.grad_cp}
    return_pages()
    model, _ = build_model(made, BuildOptions(**form))
    del made
    freed()
    model.train()
    groups = parameter_groups(model, plan, config.version, True)
    optimizer = adamw(groups, (0.9, 0.99), 1e-8)
    for _ in range(2):
        batch = pack_texts([TextExample(torch.randint(1, vocabulary, (tokens + 1,)).numpy())])
        value, _ = batch_loss(model, batch, LOSSES["sft"], config)
        (value / batch.total).backward()
        del value
        optimizer.step()
        optimizer.zero_grad()
    return sum(memory_by_part(config, model, tokens, gpu=False).device.values())


def main(words):
    """Once for the libraries, and once that counts."""
    run(words, return_pages)
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    forget_the_peak()
    estimate = run(words, keep_pages)
    print(resident("VmHWM") - before, estimate)


if __name__ == "__main__":
    main(sys.argv[1:])
