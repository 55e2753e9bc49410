"""Documents cut into segments of at most ctx_len inputs, which overlap by one token, so that every token after the
first of a document is predicted exactly once."""

import numpy as np

from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.settings.counted import counted

NOTHING_TRAINED = "no trained token (a single token, or no assistant turn)"


class CutDocuments:
    """Examples that are documents or segments of them, in file order; a subclass knows where the tokens are.

    Attributes:
        report: what was read and left out.
        segments: (examples, 4) int64: document, begin, end and trained targets of each example.
    """

    def __init__(self, ctx_len: int, report: DataReport) -> None:
        self.report = report
        self._ctx_len = ctx_len
        self._found: list[tuple[int, int, int, int]] = []

    def _cut(self, document: int, begin: int, end: int, before: np.ndarray | None) -> None:
        """Adds the segments of the document at begin..end-1 that train anything.

        before: trained tokens before each position, so that a segment is counted without looking at its tokens; None =
        all are trained.
        """
        self.report.add_length(end - begin)
        known, size = len(self._found), self._ctx_len
        for at in range(begin, end - 1, size or max(1, end - begin)):
            stop = min(end, at + size + 1) if size else end
            trained = stop - at - 1 if before is None else int(before[stop] - before[at + 1])
            if trained:
                self._found.append((document, at, stop, trained))
        if len(self._found) == known:
            self.report.skip(NOTHING_TRAINED)

    def _close(self) -> None:
        """All documents are there. Raises ValueError when none of them trains anything."""
        if not self._found:
            raise ValueError(
                f"{self.report.source}: holds no text to train on ({counted(self.report.rows, 'row')} read)"
            )
        self.segments = np.asarray(self._found, dtype=np.int64)
        del self._found
        self.report.examples, self.report.trained = len(self.segments), int(self.segments[:, 3].sum())

    def __len__(self) -> int:
        return len(self.segments)

    def trained(self, index: int) -> int:
        """Trained targets of an example."""
        return int(self.segments[index, 3])

    def length(self, index: int) -> int:
        """Tokens of an example."""
        return int(self.segments[index, 2] - self.segments[index, 1])

    def group(self, index: int) -> object:
        """Segments of one document must not be torn apart by a held-out split."""
        return int(self.segments[index, 0])


def trained_before(mask: np.ndarray | None) -> np.ndarray | None:
    """(n + 1,) int64 trained tokens before each position of a mask (n,); None for none."""
    return None if mask is None else np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
