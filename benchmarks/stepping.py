"""Training steps on demand, each side in a process of its own that sleeps between its turns: step.py, neighbours.py.

    python benchmarks/stepping.py ours full x070 512 --layers 2 --width 128 --vocab 500

makes one step for each line on standard input and answers with its seconds, or with the peak of its memory (MiB) for
the line "peak". Random weights and tokens, fp32, one row. A step is forward with the loss, backward, clipping at 1.0
and AdamW. The sides are the trainer's own model, rwkv7-hf's RWKV-7 and transformers' RWKV-4.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import step

Key = TypeVar("Key", bound=Hashable)
ANSWER = "MEASURED "
PACKAGES = {"rwkv7-hf": "rwkv7_hf", "transformers": "transformers"}  # side -> what it imports


class Work(NamedTuple):
    """What every step of a side is."""

    side: str  # "ours" or a key of PACKAGES
    mode: str  # "full" or "lora"
    version: str
    tokens: int
    layers: int = step.LAYERS
    width: int = step.WIDTH
    vocab: int = step.VOCAB

    def words(self) -> list[str]:
        """As this program takes them."""
        names = ("layers", "width", "vocab")
        sizes = [word for name in names for word in (f"--{name}", str(getattr(self, name)))]
        return [self.side, self.mode, self.version, str(self.tokens), *sizes]


def missing(side: str) -> str:
    """What to install for a side that cannot run here; "" where it can."""
    package = PACKAGES.get(side, "torch")
    return "" if importlib.util.find_spec(package) else f"{side} is left out: pip install {side}"


class Side:
    """A process that makes steps. It is stopped between them, so that threads which wait in a loop disturb nobody."""

    def __init__(self, work: Work, variables: dict[str, str]) -> None:
        """variables: the whole environment of the process."""
        command = [sys.executable, __file__, *work.words()]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=variables, **pipes)

    def __call__(self, what: str = "step") -> float:
        """Seconds of one more step; MiB for "peak"."""
        assert self.process.stdin and self.process.stdout
        os.kill(self.process.pid, signal.SIGCONT)
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:  # libraries print too
            if line.startswith(ANSWER):
                os.kill(self.process.pid, signal.SIGSTOP)
                return float(line.removeprefix(ANSWER))
        raise RuntimeError("a side ended: its words are above")


@contextmanager
def warm(sides: Mapping[Key, tuple[Work, dict[str, str]]]) -> Iterator[dict[Key, Side]]:
    """Sides of these (work, environment) that have made two steps each (the first grows the heap); ends them all."""
    made: dict[Key, Side] = {}
    try:
        for key, (work, variables) in sides.items():
            made[key] = Side(work, variables)
            for _ in range(2):
                made[key]()
        yield made
    finally:
        for side in made.values():
            side.process.kill()
            side.process.wait()


@contextmanager
def busy() -> Iterator[None]:
    """Beside a program that keeps one core busy."""
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    time.sleep(0.2)  # in which it starts
    try:
        yield
    finally:
        neighbour.kill()
        neighbour.wait()


def spread(values: list[float], form: str = ".2f") -> str:
    """`median (least - most)`."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} - {max(values):{form}})"


def ours(work: Work) -> Callable[[], object]:
    """A step of the trainer."""
    from rwkv_rlhf.scoring.forward import text_hidden

    size = (work.layers, work.width, work.vocab)
    model, optimizer, config, _ = step.prepare(work.mode, "fp32", False, "sft", work.version, "auto", size)
    batches = step.text_batches(work.tokens, work.vocab)
    return lambda: step.timed_steps(model, optimizer, config, text_hidden, [next(batches)])


def theirs(work: Work) -> Callable[[], object]:
    """The same step of another program's model: its own loss over whole logits, the trainer's clipping and AdamW."""
    import torch

    torch.manual_seed(1)
    if work.side == "rwkv7-hf":
        from rwkv7_hf.native_model import NativeRWKV7Config, NativeRWKV7ForCausalLM

        ranks = {"decay_low_rank_dim": 64, "gate_low_rank_dim": 128, "a_low_rank_dim": 64, "v_low_rank_dim": 32}
        sizes = {"vocab_size": work.vocab, "hidden_size": work.width, "num_hidden_layers": work.layers}
        model = NativeRWKV7ForCausalLM(NativeRWKV7Config(**sizes, **ranks, head_dim=64, use_cache=False))
    else:
        from transformers import RwkvConfig, RwkvForCausalLM

        sizes = {"vocab_size": work.vocab, "hidden_size": work.width, "num_hidden_layers": work.layers}
        model = RwkvForCausalLM(RwkvConfig(**sizes, context_length=max(1024, work.tokens), use_cache=False))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    batches = step.text_batches(work.tokens, work.vocab)

    def one() -> None:
        tokens = next(batches).tokens[None]
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        step.update(optimizer)

    return one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=("ours", *PACKAGES))
    parser.add_argument("mode", choices=("full", "lora"))
    parser.add_argument("version")
    parser.add_argument("tokens", type=int)
    step.size_flags(parser)
    work = Work(**vars(parser.parse_args()))
    one = ours(work) if work.side == "ours" else theirs(work)
    for line in sys.stdin:
        begun = time.perf_counter()
        if line.strip() != "peak":
            one()
        print(ANSWER, step.peak_mib() if line.strip() == "peak" else time.perf_counter() - begun, flush=True)


if __name__ == "__main__":
    main()
