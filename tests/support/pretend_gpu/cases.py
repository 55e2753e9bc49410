"""What tests let a process with a pretend GPU do, in functions of plain values that give the waits.

PYTHONPATH=src python -m tests.support.pretend_gpu.cases --load_model M ...    # the waits of an optimizer step
"""

import collections
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.support.pretend_gpu.tensors import DEVICE, PretendGpu, Wait


class Waits(NamedTuple):
    """Of a run: all waits in their order, and those of each optimizer step, from the end of the one before."""

    all: list[Wait]
    steps: list[list[Wait]]


def run(words: Sequence[object]) -> Waits:
    """`train.py` with these words, in this process."""
    from rwkv_rlhf.commands.train import ranked
    from rwkv_rlhf.settings.command_line import parse
    from rwkv_rlhf.training.module import TrainingModule

    DEVICE.waits.clear()
    ends: list[int] = []
    close = TrainingModule._close_record

    def closed(module: TrainingModule) -> None:
        close(module)
        ends.append(len(DEVICE.waits))

    TrainingModule._close_record = closed  # type: ignore[method-assign]
    try:
        with PretendGpu():
            status = ranked(parse([str(word) for word in words]))
    finally:
        TrainingModule._close_record = close  # type: ignore[method-assign]
    assert status is None, status
    waits = list(DEVICE.waits)
    return Waits(waits, [waits[begin:end] for begin, end in itertools.pairwise(ends)])


def sample(model: Path, options: dict[str, object]) -> tuple[list[list[int]], Waits]:
    """Tokens after some prompts, and the waits of each token's step."""
    from rwkv_rlhf.checkpoints.loading import BuildOptions, load_model
    from rwkv_rlhf.generation.sampler import Sampler
    from rwkv_rlhf.generation.sampling_params import SamplingParams

    steps: list[list[Wait]] = []
    with PretendGpu():
        sampler = Sampler(load_model(model, BuildOptions(device="cuda"))[0])
        DEVICE.waits.clear()

        def said(sequence: int, token: int) -> None:
            if DEVICE.waits:
                steps.append(list(DEVICE.waits))
                DEVICE.waits.clear()

        prompts = [[5, 7, 9], [3], [250, 1, 2, 8]]
        done = sampler.generate(prompts, SamplingParams(**options), on_token=said)
    return [one.tokens for one in done], Waits([wait for step in steps for wait in step], steps)


def merge(words: Sequence[object]) -> list[Wait]:
    """`merge.py` with these words."""
    from rwkv_rlhf.commands import merge as command

    DEVICE.waits.clear()
    with PretendGpu():
        assert not command.main([str(word) for word in words])
    return list(DEVICE.waits)


def main(words: Sequence[str]) -> None:
    """Print the waits of the last optimizer step of a run."""
    from tests.support.pretend_gpu.process import install, restarted

    restarted(["-m", "tests.support.pretend_gpu.cases", *words])
    install()
    last = run(words).steps[-1]
    print(f"waits in one optimizer step: {len(last)}")
    for wait, count in collections.Counter(last).most_common():
        print(f"{count:5} {wait.file}:{wait.line} {wait.function}: {wait.what}")


if __name__ == "__main__":
    main(sys.argv[1:])
