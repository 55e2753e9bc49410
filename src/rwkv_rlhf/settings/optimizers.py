"""The optimizers of --optim, one entry each, as in `tables.py`.

No torch: functions are named as "module:name".
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OptimizerFacts:
    """implementation: (groups, betas, eps) -> a torch optimizer.

    state_bytes: what it keeps of each trained number, in the tensors that it takes: those of `least` numbers and more,
    and with `matrices` only the matrices of blocks; the others are AdamW's, with float32 moments. needs: the package
    that it needs. flat: whether it can take DeepSpeed's shares, which have no shape; sharded: whether it can take
    FSDP's. float64: whether it computes in float64 where the masters are. host: it runs on a processor only.
    """

    help: str
    implementation: str
    spellings: tuple[str, ...] = ()
    state_bytes: float = 8
    least: int = 0
    matrices: bool = False
    needs: str = ""
    flat: bool = True
    sharded: bool = True
    float64: bool = True
    host: bool = False


ADAMW = "adamw"
EIGHT_BITS = 2 * (1 + 4 / 256)  # two moments, each with a float32 scale for 256 numbers
OPTIMIZERS: dict[str, OptimizerFacts] = {
    ADAMW: OptimizerFacts("AdamW (arXiv 1711.05101), fused", ".training.optimizers:adamw", ("", "AdamW")),
    "adam8bit": OptimizerFacts(
        "bitsandbytes' Adam8bit (arXiv 2110.02861)",
        ".training.optimizers.by_bitsandbytes:adam8bit",
        ("Adam8bit",),
        state_bytes=EIGHT_BITS,
        least=4096,
        needs="bitsandbytes",
        sharded=False,
        float64=False,
    ),
    "adamw8bit": OptimizerFacts(
        "bitsandbytes' AdamW8bit (arXiv 2110.02861)",
        ".training.optimizers.by_bitsandbytes:adamw8bit",
        ("AdamW8bit",),
        state_bytes=EIGHT_BITS,
        least=4096,
        needs="bitsandbytes",
        sharded=False,
        float64=False,
    ),
    "lion": OptimizerFacts(
        "bitsandbytes' Lion (arXiv 2302.06675); wants a third to a tenth of AdamW's learning rate",
        ".training.optimizers.by_bitsandbytes:lion",
        ("Lion",),
        state_bytes=4,
        needs="bitsandbytes",
        sharded=False,
        float64=False,
    ),
    "muon": OptimizerFacts(
        "Muon on the matrices of the blocks, at AdamW's learning rates (arXiv 2502.16982); AdamW elsewhere",
        ".training.optimizers.muon:muon",
        state_bytes=4,
        matrices=True,
        flat=False,
        sharded=False,
    ),
    "adopt": OptimizerFacts("ADOPT (arXiv 2411.02853)", ".training.optimizers.adopt:adopt"),
    "cpu_adam": OptimizerFacts(
        "DeepSpeed's AdamW on the host, for a CPU or a strategy with offload",
        ".training.optimizers.cpu_adam:cpu_adam",
        needs="deepspeed",
        sharded=False,
        float64=False,
        host=True,
    ),
}
