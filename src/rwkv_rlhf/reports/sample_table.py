"""What a rollout answered, into samples.jsonl."""

from __future__ import annotations

from pathlib import Path

from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.reports.harmless import Harmless
from rwkv_rlhf.reports.metrics import append_json
from rwkv_rlhf.reports.samples import SAMPLES
from rwkv_rlhf.rl.rollout import Group

GROUPS = 4  # prompts of a rollout whose answers are kept


class SampleTable:
    """Appends the answers to the first prompts of every `every`-th rollout, 0 = of none."""

    def __init__(self, folder: Path, every: int) -> None:
        self.path, self.every = folder / SAMPLES, every
        self.harmless = Harmless(f"{SAMPLES} lacks answers")

    def __call__(self, rollout: int, groups: list[Group]) -> None:
        """A rollout is judged."""
        if not self.every or (rollout - 1) % self.every or not ranks.is_rank_zero():
            return
        with self.harmless():
            self._append(rollout, groups[:GROUPS])

    def _append(self, rollout: int, groups: list[Group]) -> None:
        for group in groups:
            for sample in group:
                line = {"rollout": rollout, "prompt": sample.asked.example.cue, "answer": sample.text}
                line |= {"reward": sample.reward, "rewards": dict(sample.rewards), "tokens": len(sample.ids)}
                line |= {"finished": sample.finished, "trained": sample.trained}
                if "advantages" in sample.numbers:
                    line["advantage"] = float(sample.numbers["advantages"].mean())
                append_json(self.path, line)
