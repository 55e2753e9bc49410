"""What tests let a process with a pretend GPU do, in functions of plain values that give the waits.

PYTHONPATH=src python -m tests.support.pretend_gpu.cases --load_model M ...    # the waits of an optimizer step
"""

import collections
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.pretend_gpu.tensors import DEVICE, PretendGpu, Wait


class Waits(NamedTuple):
    """Of a run: all waits in their order, and those of each optimizer step, from the end of the one before."""

    all: list[Wait]
    steps: list[list[Wait]]


def run(words: Sequence[object], bad_step: int | None = None) -> Waits:
    """`train.py` with these words, in this process; the loss of the micro-batch `bad_step` (from 0) is not a number."""
    from rwkv_rlhf.commands.train import ranked
    from rwkv_rlhf.settings.command_line import parse
    from rwkv_rlhf.training import module
    from rwkv_rlhf.training.module import TrainingModule

    DEVICE.waits.clear()
    ends: list[int] = []
    close, batch_loss = TrainingModule._close_record, module.batch_loss
    runs = itertools.count()

    def closed(trained: module.TrainingModule) -> None:
        close(trained)
        ends.append(len(DEVICE.waits))

    def loss(*arguments: Any) -> Any:
        value, metrics = batch_loss(*arguments)
        return module.LossValue(value * (float("nan") if next(runs) == bad_step else 1.0), metrics)

    TrainingModule._close_record, module.batch_loss = closed, loss  # type: ignore[method-assign]
    try:
        with PretendGpu():
            status = ranked(parse([str(word) for word in words]))
    finally:
        TrainingModule._close_record, module.batch_loss = close, batch_loss  # type: ignore[method-assign]
    assert status is None, status
    waits = list(DEVICE.waits)
    return Waits(waits, [waits[begin:end] for begin, end in itertools.pairwise(ends)])


def sample(model: Path, options: dict[str, object]) -> tuple[list[list[int]], Waits]:
    """Tokens after some prompts, and the waits of each token's step."""
    import torch

    from rwkv_rlhf.checkpoints.loading import BuildOptions, load_model
    from rwkv_rlhf.generation.sampler import Sampler
    from rwkv_rlhf.generation.sampling_params import SamplingParams

    steps: list[list[Wait]] = []
    with PretendGpu():
        sampler = Sampler(load_model(model, BuildOptions(torch.float32, device="cuda"))[0])
        DEVICE.waits.clear()

        def said(sample: int, so_far: object) -> bool:
            if DEVICE.waits:
                steps.append(list(DEVICE.waits))
                DEVICE.waits.clear()
            return True

        prompts = [[5, 7, 9], [3], [250, 1, 2, 8]]
        done = sampler.generate(prompts, SamplingParams(**options), hear=said)
    return [one.tokens for one in done], Waits([wait for step in steps for wait in step], steps)


def mixed() -> str:
    """What an operation on two devices says."""
    import torch

    from tests.support.pretend_gpu.tensors import MixedDevices

    with PretendGpu():
        try:
            torch.ones(2, device="cuda") + torch.ones(2)
        except MixedDevices as error:
            return str(error)
    return ""


def unread() -> tuple[float, float, list[str]]:
    """A number that is copied to the host: before anybody waited, after, and the reasons of the waits."""
    import torch

    from rwkv_rlhf.transfers import Fetched, to_device

    DEVICE.waits.clear()
    with PretendGpu():
        there = to_device(torch.tensor([1.0, 2.0]), "cuda")
        fetched = Fetched(there.sum())
        early = float(fetched.host)
        late = fetched.tolist()
        bool(there.any())
        there[there > 1].tolist()
        torch.tensor([1.0], device="cuda")
        torch.ones(3).to("cuda")
        there.cpu()
    return early, late, [wait.what for wait in DEVICE.waits]


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
