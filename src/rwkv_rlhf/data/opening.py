"""What `train.py` opens: by the kind of a file, its text or its pairs."""

import os
from pathlib import Path

from rwkv_rlhf.data.items import Reading, kind_of_rows
from rwkv_rlhf.data.pairs.dataset import open_pairs, pair_type
from rwkv_rlhf.data.pairs.rated import is_rated, open_rated, unpair
from rwkv_rlhf.data.rows import rows_format
from rwkv_rlhf.data.sources import sources_of
from rwkv_rlhf.data.text.documents import open_slices, open_text, text_type
from rwkv_rlhf.data.text.h5 import open_h5
from rwkv_rlhf.settings.formats import FORMATS, format_of_name, format_of_word
from rwkv_rlhf.settings.implementations import load

__all__ = [
    "Reading",
    "is_rated",
    "kind_of",
    "open_h5",
    "open_pairs",
    "open_rated",
    "open_slices",
    "open_text",
    "unpair",
]


def kind_of(path: str | os.PathLike[str], data_type: str = "", shape: str = "") -> str:
    """ "pairs" (rated answers too) or "text": what `path` stands for, by its data type, its suffix, or its first row.

    Raises ValueError when neither fits or the file cannot be read.
    """
    first = sources_of(path)[0].path
    name = format_of_word(data_type) if data_type else rows_format(first) or format_of_name(first)
    if not name and not data_type and Path(first).is_file():
        name = pair_type(first)
    facts = FORMATS.get(name)
    if facts is not None and not facts.text:
        return "pairs"
    if facts is not None and facts.tells:
        return "pairs" if load(facts.tells)(first) else "text"
    text_type(path, data_type)  # refuses what is no text either
    if facts is not None and facts.rows:
        return "pairs" if kind_of_rows(first, shape) in ("pairs", "rated") else "text"
    return "text"
