"""docs/metrics.md out of the table of metrics: `python -m tests.support.metrics_page` writes it again."""

from pathlib import Path

from rwkv_rlhf.settings.metrics import METRICS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
HEAD = """\
# What is logged

`metrics.jsonl` in `--proj_dir` has one object a line: `"event":"begin"` where a run begins, `"train"` after an
optimizer step (`--log_every`), `"val"` after a mini-epoch with held-out examples (`--val_file`, `--val_split`),
`"start"` when they are scored before training, `"tasks"` of `--eval_tasks` (under `tasks`, as `TASK/FIGURE`), `"eval"`
from `--eval_only 1`. One name is one quantity in all of them, on the curves, in the progress bar, in `metrics.csv`, in
TensorBoard and at Weights & Biases (held out: `held_out/NAME`). This page is made from
`src/rwkv_rlhf/settings/metrics.py`.

| name | unit | better | meaning |
|---|---|---|---|
"""


def text() -> str:
    """What the page must say."""
    rows = (f"| `{name}` | {metric.unit} | {metric.better} | {metric.meaning} |" for name, metric in METRICS.items())
    return HEAD + "".join(row.replace("||", r"\|\|") + "\n" for row in rows)


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
