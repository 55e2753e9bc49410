"""What an answer to a row is asked for: the conversation before it."""

from __future__ import annotations

from rwkv_rlhf.data.conversation import Turn
from rwkv_rlhf.data.items import Found
from rwkv_rlhf.data.shapes.record import Chat, Document


def waiting_turns(found: Found) -> tuple[Turn, ...]:
    """The conversation of a row that an answer follows: of a chat, its words before the last answer.

    Raises ValueError for a document.
    """
    if isinstance(found.item, Document):
        raise ValueError(f"{found.where}: this is a document, and prompts are needed")
    turns = found.item.turns
    if isinstance(found.item, Chat):
        answers = [at for at, turn in enumerate(turns) if turn.role == "assistant"]
        turns = turns[: answers[-1]] if answers and answers[-1] == len(turns) - 1 else turns
    return turns
