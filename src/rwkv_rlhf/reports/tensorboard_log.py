"""tensorboard/: the figures of a run for TensorBoard; training and held-out figures of one name lie over each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from rwkv_rlhf.reports.logger import TRAINING, numbers

FOLDER = "tensorboard"


class TensorBoardLog:
    """Two runs of TensorBoard in the folder of one of ours: `train` and `held_out`."""

    name = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER
        self._writers: dict[str, SummaryWriter] = {}

    def add(self, record: dict[str, Any]) -> None:
        """Its figures. What an earlier start of the run, or another run, wrote of later steps is no longer shown."""
        kind, step = "train" if record["event"] == TRAINING else "held_out", record["step"]
        if kind not in self._writers:
            self._writers[kind] = SummaryWriter(str(self.folder / kind), purge_step=step)
        for name, value in numbers(record).items():
            self._writers[kind].add_scalar(name, value, step)

    def close(self) -> None:
        """Write what waits."""
        for writer in self._writers.values():
            writer.close()
