"""Out of memory: one sentence with the flags that would help this run most."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.constraints import trains_on_text

# what the CPU's allocators say; the GPU's have a class of their own
WORDS = ("not enough memory", "can't allocate memory", "cannot allocate memory", "std::bad_alloc")


class OutOfMemory(RuntimeError):
    """Memory ran out; the message names the flags that would help."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that host or device memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | OutOfMemory):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in WORDS)


def advice(config: Config) -> list[str]:
    """Up to three settings for this run, those that save most first; {name} stands for a flag."""
    c = config
    size, parts = c.micro_bsz, c.accumulate_grad_batches
    longest = c.ctx_len if trains_on_text(c) or not c.loss else c.rlhf_max_corpus_len
    frozen = bool(c.layer_profile) or c.peft in tables.ADAPTERS or c.peft == "state"
    found = (
        (not c.grad_cp, "{grad_cp} 1"),
        (frozen and c.storage == "none", "{quant} 1 {quant_mode} nf4"),
        (not frozen, "{peft} lora"),
        (size > 1, f"{{micro_bsz}} {max(1, size // 2)} {{accumulate_grad_batches}} {parts * 2}"),
        (not c.chunk and longest > 512, "{infctx} 1 {chunk_ctx} 512"),
        (c.chunk > 256 and c.infctx, f"{{chunk_ctx}} {c.chunk // 2}"),
        (c.precision in ("fp32", "fp64"), "{precision} bf16"),
        (c.head_chunk > 128, f"{{head_chunk}} {max(128, c.head_chunk // 4)}"),
        (bool(c.chunk) and not c.state_offload, "{state_offload} 1"),
        (longest > 256, f"{{{'ctx_len' if longest == c.ctx_len else 'rlhf_max_corpus_len'}}} {longest // 2}"),
        (True, "fewer trained layers in {layer_profile}"),
    )
    return [text for useful, text in found if useful][:3]


@contextmanager
def explained(config: Config) -> Iterator[None]:
    """Inside, running out of memory becomes one OutOfMemory with the three flags that save this run most."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        flags = ", ".join(advice(config))
        raise OutOfMemory(
            f"out of memory. Try, most effective first: {flags}. The checkpoints and resume points written so far are "
            "intact"
        ) from error
