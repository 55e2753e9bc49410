"""How a document becomes examples: cut into consecutive pieces that overlap by one token."""

from collections.abc import Iterator

import numpy as np

NOTHING_TRAINED = "no trained token (a single token, or no assistant turn)"


def pieces(begin: int, end: int, ctx_len: int, before: np.ndarray | None) -> Iterator[tuple[int, int, int]]:
    """(begin, end, trained targets) of each piece of the document at begin..end-1 that trains anything.

    ctx_len: most inputs of a piece, 0 = never cut. before: trained tokens before each position, so that a piece is
    counted without looking at its tokens; None = all are trained.
    """
    for at in range(begin, end - 1, ctx_len or max(1, end - begin)):
        stop = min(end, at + ctx_len + 1) if ctx_len else end
        trained = stop - at - 1 if before is None else int(before[stop] - before[at + 1])
        if trained:
            yield at, stop, trained
