"""--eval_tasks: every task that a run names, and what came out."""

from __future__ import annotations

import math
from pathlib import Path

from rwkv_rlhf.settings.eval_tasks import EvalTasks
from rwkv_rlhf.tasks.lambada import lambada
from rwkv_rlhf.tasks.text_model import TextModel


def measure(tasks: EvalTasks, model: TextModel, limit: int = 0) -> dict[str, float]:
    """ "TASK/FIGURE" -> number, of the first `limit` examples of each task (0 = all).

    Raises ValueError for a file or a task that cannot be read, and for a figure that is no number.
    """
    found: dict[str, float] = {}
    for path in tasks.lambada:
        name = "lambada" if len(tasks.lambada) == 1 else Path(path).stem
        found |= {f"{name}/{figure}": value for figure, value in lambada(model, Path(path), limit).items()}
    if tasks.harness:
        from rwkv_rlhf.tasks.harness import harness_figures

        found |= harness_figures(tasks.harness, model, limit)
    bad = [name for name, value in found.items() if not math.isfinite(value)]
    if bad:
        raise ValueError(f"{{eval_tasks}}: {bad[0]} is no finite number: the model's logits are damaged")
    return found
