"""Numbers as a person reads them: times, sizes, figures. The same on the screen and on the page."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

MINUTE, HOUR, DAY = 60, 3600, 86400


def duration(seconds: float) -> str:
    """40 s, 6 min, 2 h 05 min, 3 d 4 h."""
    if seconds < 1.5 * MINUTE:
        return f"{max(0, round(seconds))} s"
    if seconds < HOUR:
        return f"{round(seconds / MINUTE)} min"
    minutes = round(seconds / MINUTE)
    if seconds < DAY:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def size(count: float) -> str:
    """A number of bytes in KiB, MiB or GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.1f} GiB" if count < 1000 else f"{count:,.0f} GiB"


def figure(value: float) -> str:
    """Four digits; rates as powers of ten; no minus before what is rounded to 0."""
    return f"{value:z.4g}"


def change(before: float, after: float) -> str:
    """From one figure to another, in as many digits as it takes to see a change of a hundredth."""
    largest = max(abs(before), abs(after))
    digits = 0 if largest >= 1000 else 2 if largest >= 0.1 else 4
    return f"{before:z.{digits}f} -> {after:z.{digits}f}"


def short_count(value: float) -> str:
    """A speed in few letters: 658, 1.1k, 23k."""
    if value < 1000:
        return f"{value:.0f}"
    return f"{value / 1000:.1f}k" if value < 10_000 else f"{value / 1000:.0f}k"


def command(name: str) -> str:
    """How the command `name` is typed where this process was started: as a script, or as one of the installed ones."""
    return f"rwkv-rlhf {name}" if Path(sys.argv[0].split(" ")[0]).name == "rwkv-rlhf" else f"python {name}.py"


def pasted(words: Iterable[str]) -> str:
    """Words as a shell reads them back, also names of files that are not UTF-8."""
    return " ".join(shlex.quote(word) if word.isprintable() else _by_byte(word) for word in words)


def _by_byte(word: str) -> str:
    """A word in bash's quotes in which a byte may stand as its number."""
    plain = {byte: chr(byte) for byte in range(32, 127) if chr(byte) not in "'\\"}
    return "$'" + "".join(plain.get(byte, f"\\x{byte:02x}") for byte in os.fsencode(word)) + "'"
