"""Pairs without a prompt whose two answers are transcripts of a conversation, as hh-rlhf has them."""

from __future__ import annotations

from typing import Any

from rwkv_rlhf.data.report import RowError
from rwkv_rlhf.data.shapes.preference import make_pair
from rwkv_rlhf.data.shapes.record import Pair, Record
from rwkv_rlhf.data.transcripts import split_transcript
from rwkv_rlhf.settings.shapes import CHOSEN, REJECT


def looks(values: dict[str, Any]) -> bool:
    """Whether both answers are transcripts."""
    texts = [next((values[name] for name in names if name in values), None) for names in (CHOSEN, REJECT)]
    return all(isinstance(text, str) and split_transcript(text) is not None for text in texts)


def read(record: Record) -> list[Pair]:
    """The turns that both begin with are the prompt; the last turns are the two answers."""
    sides = []
    for names in (CHOSEN, REJECT):
        turns = split_transcript(record.text(*names))
        if turns is None:
            raise RowError(f"{names[0]} is no transcript that begins with Human: (or User:)", "no transcript")
        if turns[-1].role != "assistant":
            raise RowError(f"{names[0]} ends without an answer", f"no answer in {names[0]}")
        sides.append(turns)
    chosen, rejected = sides
    if chosen[:-1] != rejected[:-1]:
        raise RowError("chosen and reject answer different conversations", "different conversations")
    return [make_pair(record, chosen[:-1], chosen[-1].text, rejected[-1].text)]
