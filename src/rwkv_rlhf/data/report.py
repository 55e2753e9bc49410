"""What was read, kept, cut and left out: every count that the program owes its user about a data file."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np  # flags are read without it

from rwkv_rlhf.settings.counted import counted, predicated

log = logging.getLogger(__name__)

TOKEN = "token"


class RowError(ValueError):
    """One row cannot be used: a sentence for the user, and the short reason under which skips are counted."""

    def __init__(self, sentence: str, reason: str):
        super().__init__(sentence)
        self.reason = reason


@dataclass
class DataReport:
    """Counts of one opened data file.

    Attributes:
        source: the file's name as the user gave it.
        skip_bad: bad rows are counted instead of raised. quiet: without a warning for the first of them.
        rows: rows (documents, records) found in the file.
        examples: examples that training can draw from.
        trained: how many units train; unit: what they are, target tokens of text or whole examples ("pair").
        skipped: reason -> rows left out.
        truncated: part (prompt, chosen, reject) -> rows cut to the cap.
        remarked: what is odd about rows that were kept ("repeat another one") -> rows.
        lengths: tokens of each row that was kept (a pair: prompt plus its longer answer), after cutting.
        notices: sentences for the user, each said once.
        found: what each file was recognised as, and which of its keys nobody read.
    """

    source: str
    skip_bad: bool = False
    quiet: bool = False
    rows: int = 0
    examples: int = 0
    trained: int = 0
    unit: str = TOKEN
    skipped: Counter[str] = field(default_factory=Counter)
    truncated: Counter[str] = field(default_factory=Counter)
    remarked: Counter[str] = field(default_factory=Counter)
    lengths: list[int] | np.ndarray = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)

    def bad(self, where: str, error: RowError) -> None:
        """A row that cannot be used: raises ValueError `where: sentence`, or under skip_bad counts the reason."""
        if not self.skip_bad:
            raise ValueError(f"{where}: {error}; correct it, or leave such rows out with --skip_bad 1") from error
        self.skip(error.reason)
        if self.skipped.total() <= 5 and not self.quiet:
            log.warning("skipped %s: %s", where, error)

    def skip(self, reason: str) -> None:
        """Counts a row that is left out for a harmless reason."""
        self.skipped[reason] += 1

    def remark(self, what: str, applies: bool = True) -> None:
        """Counts a row that is kept although it is odd, if the remark applies."""
        if applies:
            self.remarked[what] += 1

    def cut(self, part: str, applies: bool = True) -> None:
        """Counts a row of which `part` was cut to the cap, if it was."""
        if applies:
            self.truncated[part] += 1

    def add_length(self, tokens: int) -> None:
        """Counts a row that is kept by its tokens."""
        assert isinstance(self.lengths, list)
        self.lengths.append(tokens)

    def notice(self, sentence: str) -> None:
        """Keeps and logs a sentence, once."""
        if sentence not in self.notices:
            self.notices.append(sentence)
            log.info("%s", sentence)

    @property
    def longest(self) -> int:
        """Tokens of the longest row, 0 without any."""
        import numpy as np

        return int(np.max(self.lengths)) if len(self.lengths) else 0

    def histogram(self) -> list[tuple[int, int, int]]:
        """(from, below, rows) over lengths; the bounds are powers of two, empty ones at the ends left out."""
        if not len(self.lengths):
            return []
        import numpy as np

        bins = np.bincount(np.frexp(np.maximum(0, self.lengths))[1])  # 1 -> 1, 2 and 3 -> 2, 4 to 7 -> 3
        first = int(np.flatnonzero(bins)[0])
        return [((1 << b) >> 1, 1 << b, int(bins[b])) for b in range(first, len(bins))]

    def lines(self, trained: bool = True) -> list[str]:
        """The report as text, one fact a line; notices were logged when they arose. trained: with their count."""
        learnt = f", {counted(self.trained, 'token')} to learn" if trained and self.unit == TOKEN else ""
        examples = counted(self.examples, "example" if self.unit == TOKEN else self.unit)
        out = [f"{self.source}: {counted(self.rows, 'row')}, {examples}{learnt}"]
        out += [f"  {sentence}" for sentence in self.found]
        if len(self.lengths):
            import numpy as np

            shortest, mean = int(np.min(self.lengths)), float(np.mean(self.lengths))
            out.append(f"  lengths: {shortest} to {self.longest} tokens, mean {mean:.1f}")
            out += [f"    {low:>8} - {high - 1:<8} {count}" for low, high, count in self.histogram()]
        out += [f"  skipped {count}: {reason}" for reason, count in self.skipped.items()]
        out += [f"  {part} cut in {counted(count, 'row')}" for part, count in self.truncated.items() if count]
        return out + [f"  {predicated(count, 'row', what)}" for what, count in self.remarked.items() if count]
