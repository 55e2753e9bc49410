"""Any data that train.py reads -> one JSON object a line, in the stable form that train.py reads too.

Documents: {"text"}. Chats: {"messages": [{"role", "content"}]}, with `thinking` beside an answer that has some and
`weight` 0 on one that is not learnt. Pairs: {"messages", "chosen", "rejected"}. Rated answers: {"messages",
"completion", "label"}. With --dry_run 1 nothing is written: what would be is counted, and three rows are shown.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from rwkv_rlhf.commands.flag_values import reading_of
from rwkv_rlhf.commands.parsers.convert import parser
from rwkv_rlhf.data.items import read_items
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.shapes.stable import stable_form
from rwkv_rlhf.data.sources import refuse_sources
from rwkv_rlhf.files import atomic_write
from rwkv_rlhf.settings.counted import counted
from rwkv_rlhf.settings.shapes import KINDS

log = logging.getLogger("convert")

SAMPLES = 3  # rows that --dry_run shows
SHOWN = 400  # characters of each text in them


def shortened(value: Any) -> Any:
    """The same with long texts cut, for a look."""
    if isinstance(value, dict):
        return {key: shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shortened(item) for item in value]
    if isinstance(value, str) and len(value) > SHOWN:
        return f"{value[: SHOWN // 2]} ... {value[-SHOWN // 2 :]}"
    return value


def main(argv: Sequence[str]) -> None:
    """Reads and writes row by row; the output appears when all of it is there."""
    flags = parser().parse_args(argv)
    report = DataReport(flags.input, skip_bad=flags.skip_bad)
    forms = (stable_form(found.item) for found in read_items(flags.input, report, tuple(KINDS), reading_of(flags)))
    if flags.dry_run:
        for form in forms:
            report.examples += 1
            if report.examples <= SAMPLES:
                sys.stdout.write(json.dumps(shortened(form), ensure_ascii=False, indent=1) + "\n")
    else:
        refuse_sources(flags.input, flags.output, "--output")
        with atomic_write(flags.output) as file:
            for form in forms:
                report.examples += 1
                file.write((json.dumps(form, ensure_ascii=False) + "\n").encode("utf-8", errors="replace"))
            if not report.examples:
                raise ValueError(
                    f"{flags.input}: holds nothing that could be converted ({counted(report.rows, 'row')} read)"
                )
    for line in report.lines(trained=False):
        log.info("%s", line)
    if not flags.dry_run:
        log.info("wrote %d objects to %s", report.examples, flags.output)
