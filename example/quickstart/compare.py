"""Prints answers of two models side by side and ends with the held-out preference accuracy of both.

    python example/quickstart/compare.py before.jsonl after.jsonl eval_before/metrics.jsonl eval_after/metrics.jsonl

The answers come from chat.py, the accuracies from train.py --eval_only 1. Exit status 1 if the second is below 0.9.
"""

import json
import sys
import textwrap
from pathlib import Path

TARGET = 0.9
WIDTHS = (32, 40, 44)


def read_jsonl(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def table(rows: list[tuple[str, str, str]]) -> str:
    """Rows of three cells, wrapped to columns of fixed width."""
    lines = []
    for row in rows:
        cells = [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, WIDTHS, strict=True)]
        height = max(map(len, cells))
        cells = [cell + [""] * (height - len(cell)) for cell in cells]
        for parts in zip(*cells, strict=True):
            lines.append("  ".join(part.ljust(width) for part, width in zip(parts, WIDTHS, strict=True)).rstrip())
    return "\n".join(lines)


def accuracy(path: str) -> float:
    """The share of pairs whose chosen answer the model finds likelier, of the last evaluation in a metrics file."""
    return [record for record in read_jsonl(path) if record.get("event") == "eval"][-1]["accuracy"]


def main() -> int:
    before, after, eval_before, eval_after = sys.argv[1:]
    answers = zip(read_jsonl(before), read_jsonl(after), strict=True)
    rows = [("question", "before", "after"), tuple("-" * width for width in WIDTHS)]
    print(table(rows + [(old["prompt"], old["answer"], new["answer"]) for old, new in answers]))
    start, end = accuracy(eval_before), accuracy(eval_after)
    print(f"\nheld-out preference accuracy: {start:.2f} -> {end:.2f}")
    return 0 if end >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
