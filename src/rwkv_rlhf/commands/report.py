"""The page of a run again, or a page of several runs beside each other.

rwkv-rlhf report RUN
rwkv-rlhf report RUN1 RUN2 --output compare.html
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rwkv_rlhf.commands.parsers.report import parser
from rwkv_rlhf.reports.metrics import METRICS

COMPARED = "compare.html"


def main(words: Sequence[str]) -> None:
    """Writes the page and says where it is. Raises ValueError for a folder that holds no run."""
    args: argparse.Namespace = parser().parse_args(words)
    for folder in args.runs:
        if not (Path(folder) / METRICS).is_file():
            raise ValueError(f"{folder} is no folder of a run: it has no {METRICS} in which a run begins")
    from rwkv_rlhf.reports.compare import write_compared
    from rwkv_rlhf.reports.page import PAGE, open_run, write_page

    runs = [open_run(Path(folder)) for folder in args.runs]
    if len(runs) == 1:
        if args.output:
            raise ValueError("--output is for a page of several runs; that of one is report.html in its folder")
        print(write_page(runs[0]))
        return
    path = Path(args.output) if args.output else runs[0].folder / COMPARED
    if path.resolve() in [(run.folder / PAGE).resolve() for run in runs]:
        raise ValueError(f"--output {path} is the page of one of the runs: give another name")
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: there is no folder {path.parent}")
    write_compared(runs, path)
    print(path)
