"""Memory of training steps in a process of its own: `step_peak.py FLAGS` writes the peak and the plan's, in bytes.

What stays small (libraries, a tiny model's first step) is there before counting begins.
"""

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


def run(words, layers, width, vocabulary, tokens):
    """Two steps of a fresh model; the bytes that the plan says."""
    config = parse(words)
    plan = plan_for(config, layers)
    made = initial_tensors(config.version, layers, width, vocabulary, 64)
    form = {"compute_dtype": DTYPES[config.precision], "plan": plan, "quant": config.storage, "grad_cp": config.grad_cp}
    return_pages()
    model, _ = build_model(made, BuildOptions(**form))
    del made
    keep_pages()
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
    """A small run, then the one that counts."""
    run(words, 2, 64, 128, 16)
    before = resident("VmRSS")
    forget_the_peak()
    estimate = run(words, 2, 256, 2048, 512)
    print(resident("VmHWM") - before, estimate)


if __name__ == "__main__":
    main(sys.argv[1:])
