"""Files -> examples -> packed batches; FORMATS says what can be read."""

import os
from pathlib import Path

from rwkv_rlhf.data.pairs.dataset import PAIR_FORMATS, open_pairs, pair_type
from rwkv_rlhf.data.pairs.rated import is_rated, is_rated_record, open_rated, unpair
from rwkv_rlhf.data.pairs.text_pairs import is_pair_record
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.rows import read_jsonl
from rwkv_rlhf.data.text.documents import TEXT_FORMATS, open_slices, open_text, text_type
from rwkv_rlhf.data.text.h5 import holds_pairs, open_h5

# data type -> what it holds: text, pairs, or either (the first row tells)
FORMATS: dict[str, str] = {
    name: "either" if name in TEXT_FORMATS and name in PAIR_FORMATS else "text" if name in TEXT_FORMATS else "pairs"
    for name in (*TEXT_FORMATS, *PAIR_FORMATS)
}

__all__ = [
    "FORMATS",
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
    name = data_type or Path(path).suffix.lower().lstrip(".")
    if name in ("h5", "hdf5"):
        return "pairs" if holds_pairs(path) else "text"
    if not data_type and name not in FORMATS and Path(path).is_file():
        name = pair_type(path)
    if FORMATS.get(name) == "pairs":
        return "pairs"
    if text_type(path, data_type) != "jsonl":
        return "text"
    for _, record in read_jsonl(path, DataReport(str(path), skip_bad=True)):
        return "pairs" if is_pair_record(record) or is_rated_record(record) else "text"
    return "text"
