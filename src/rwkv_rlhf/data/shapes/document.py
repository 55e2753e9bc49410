"""Documents: {"text": ...}, learnt byte for byte."""

from __future__ import annotations

from rwkv_rlhf.data.report import RowError
from rwkv_rlhf.data.shapes.record import Document, Record


def read(record: Record) -> list[Document]:
    """The text as it stands. RowError for what is no text."""
    text = record.values.get("text")
    record.read.add("text")
    if not isinstance(text, str):
        raise RowError("text must be a string", "unreadable")
    return [Document(text)]
