"""What was read, kept, cut and left out: every count that the program owes its user about a data file."""

import logging
from collections import Counter
from dataclasses import dataclass, field

log = logging.getLogger(__name__)


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
        trained: trained target tokens (text) or pairs.
        skipped: reason -> rows left out.
        truncated: part (prompt, chosen, reject) -> rows cut to the cap.
        remarked: what is odd about rows that were kept ("repeat another one") -> rows.
        lengths: tokens of each row that was kept (a pair: prompt plus its longer answer), after cutting.
        notices: sentences for the user, each said once.
    """

    source: str
    skip_bad: bool = False
    quiet: bool = False
    rows: int = 0
    examples: int = 0
    trained: int = 0
    skipped: Counter = field(default_factory=Counter)
    truncated: Counter = field(default_factory=Counter)
    remarked: Counter = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

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

    def notice(self, sentence: str) -> None:
        """Keeps and logs a sentence, once."""
        if sentence not in self.notices:
            self.notices.append(sentence)
            log.info("%s", sentence)

    def histogram(self) -> list[tuple[int, int, int]]:
        """(from, below, rows) over lengths; the bounds are powers of two, empty ones at the ends left out."""
        bins = Counter(max(0, length).bit_length() for length in self.lengths)
        if not bins:
            return []
        return [((1 << b) >> 1, 1 << b, bins[b]) for b in range(min(bins), max(bins) + 1)]

    def lines(self) -> list[str]:
        """The report as text, one fact a line; notices were logged when they arose."""
        out = [f"{self.source}: {self.rows} rows, {self.examples} examples, {self.trained} trained (tokens or pairs)"]
        if self.lengths:
            mean = sum(self.lengths) / len(self.lengths)
            out.append(f"  lengths: {min(self.lengths)} to {max(self.lengths)} tokens, mean {mean:.1f}")
            out += [f"    {low:>8} - {high - 1:<8} {count}" for low, high, count in self.histogram()]
        out += [f"  skipped {count}: {reason}" for reason, count in self.skipped.items()]
        out += [f"  {part} cut in {count} rows" for part, count in self.truncated.items() if count]
        return out + [f"  {count} rows {what}" for what, count in self.remarked.items() if count]

    def as_dict(self) -> dict:
        """Counts for a log: builtins only."""
        return {
            "source": self.source,
            "rows": self.rows,
            "examples": self.examples,
            "trained": self.trained,
            "skipped": dict(self.skipped),
            "truncated": dict(self.truncated),
            "remarked": dict(self.remarked),
            "longest": max(self.lengths, default=0),
            "notices": list(self.notices),
        }
