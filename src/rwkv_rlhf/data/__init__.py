"""Files -> examples -> packed batches; `settings/formats.py` says what can be read."""

import os
from pathlib import Path

from rwkv_rlhf.data.pairs.dataset import open_pairs, pair_type
from rwkv_rlhf.data.pairs.rated import is_rated, is_rated_record, open_rated, unpair
from rwkv_rlhf.data.pairs.text_pairs import is_pair_record
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.text.documents import open_slices, open_text, text_type
from rwkv_rlhf.data.text.h5 import open_h5
from rwkv_rlhf.settings.formats import FORMATS, format_of_name, format_of_word
from rwkv_rlhf.settings.implementations import load

__all__ = [
    "is_rated",
    "kind_of",
    "open_h5",
    "open_pairs",
    "open_rated",
    "open_slices",
    "open_text",
    "unpair",
]


def kind_of(path: str | os.PathLike[str], data_type: str = "") -> str:
    """ "pairs" or "text": what the file at `path` holds, by its data type, its suffix, or its first row.

    Raises ValueError when neither fits or the file cannot be read.
    """
    name = format_of_word(data_type) if data_type else format_of_name(path)
    if not name and not data_type and Path(path).is_file():
        name = pair_type(path)
    facts = FORMATS.get(name)
    if facts is not None and not facts.text:
        return "pairs"
    if facts is not None and facts.tells:
        return "pairs" if load(facts.tells)(path) else "text"
    text_type(path, data_type)  # refuses what is no text either
    if facts is not None and facts.rows:
        for _, record in load(facts.rows)(path, DataReport(str(path), skip_bad=True), ()):
            return "pairs" if is_pair_record(record) or is_rated_record(record) else "text"
    return "text"
