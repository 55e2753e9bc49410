"""Shapes of records: which keys say what, and who reads them. A literal table; no file is opened here.

A shape is recognised by its keys (`data/shapes/recognise.py`), whatever file they stand in. A new one is an entry here
and, where its structure is new too, one module in `data/shapes/`.
"""

from __future__ import annotations

from dataclasses import dataclass

Names = tuple[str, ...]  # keys that mean the same; the first is the one that messages name

PROMPT: Names = ("prompt", "question")
CHOSEN: Names = ("chosen", "chosen_messages")
REJECT: Names = ("reject", "rejected", "rejected_messages")
SYSTEM: Names = ("system", "system_prompt")
LABEL: Names = ("label", "kto_tag")
SCORES: tuple[Names, Names] = (
    ("score_chosen", "chosen_score"),
    ("score_rejected", "rejected_score", "score_reject"),
)

MARGIN = "margin"  # by how much the chosen answer is better, where that is no difference of scores

THINKING = ("keep", "drop")  # what --thinking may say

# kind of what a shape holds -> what messages call it
KINDS: dict[str, str] = {
    "text": "documents or chats",
    "pairs": "preference pairs",
    "rated": "rated answers",
    "prompts": "prompts without answers",
}


@dataclass(frozen=True)
class ShapeFacts:
    """A shape of records by its keys.

    help: what messages and pages call it. kind: one of KINDS. needs: keys that must be there, the question before the
    answer. reader: read(record) -> items. joins: keys whose text is joined to the question by a blank line. asks: keys
    of the question where it may stand elsewhere too. without: keys that make it another shape. looks: of a shape that
    keys alone do not tell, looks(values) -> whether the values do. ours: one file may mix shapes of these.
    """

    help: str
    kind: str
    needs: tuple[Names, ...]
    reader: str
    joins: Names = ()
    asks: Names = ()
    without: Names = ()
    looks: str = ""
    ours: bool = False


_ANSWERED = ".data.shapes.answered:read"
_CONVERSATIONS: Names = ("conversations", "conversation")


SHAPES: dict[str, ShapeFacts] = {
    # documents and chats
    "text": ShapeFacts("documents", "text", (("text",),), ".data.shapes.document:read", ours=True),
    "messages": ShapeFacts("chats of messages", "text", (("messages",),), ".data.shapes.chat:read", ours=True),
    "sharegpt": ShapeFacts("ShareGPT conversations", "text", (_CONVERSATIONS,), ".data.shapes.chat:read"),
    "completion": ShapeFacts("prompts with a completion", "text", (("prompt",), ("completion",)), _ANSWERED, ours=True),
    "alpaca": ShapeFacts("Alpaca instructions", "text", (("instruction",), ("output",)), _ANSWERED, joins=("input",)),
    "dolly": ShapeFacts(
        "dolly instructions", "text", (("instruction",), ("response",)), _ANSWERED, joins=("context", "input")
    ),
    "query": ShapeFacts("queries with a response", "text", (("query",), ("response",)), _ANSWERED),
    "question": ShapeFacts(
        "questions with an answer", "text", (("question",), ("answer",)), _ANSWERED, joins=("context",)
    ),
    "response": ShapeFacts("prompts with a response", "text", (("prompt",), ("response",)), _ANSWERED),
    "input_output": ShapeFacts(
        "inputs with an output", "text", (("input",), ("output",)), _ANSWERED, without=("instruction",)
    ),
    # preference pairs
    "preference": ShapeFacts(
        "preference pairs", "pairs", (CHOSEN, REJECT), ".data.shapes.preference:read", asks=PROMPT, ours=True
    ),
    "transcripts": ShapeFacts(
        "pairs of transcripts (Human: and Assistant:)",
        "pairs",
        (CHOSEN, REJECT),
        ".data.shapes.transcript_pairs:read",
        without=(*PROMPT, "messages"),
        looks=".data.shapes.transcript_pairs:looks",
    ),
    "sharegpt_pairs": ShapeFacts(
        "ShareGPT conversations with two answers",
        "pairs",
        (_CONVERSATIONS, CHOSEN, REJECT),
        ".data.shapes.preference:read",
    ),
    "alpaca_pairs": ShapeFacts(
        "Alpaca instructions with two answers",
        "pairs",
        (("instruction",), CHOSEN, REJECT),
        ".data.shapes.preference:read",
        joins=("input",),
    ),
    "openai_pairs": ShapeFacts(
        "OpenAI preference pairs",
        "pairs",
        (("input",), ("preferred_output",), ("non_preferred_output",)),
        ".data.shapes.openai_pairs:read",
    ),
    "ranked": ShapeFacts(
        "ranked answers (the best against each other one)",
        "pairs",
        (("prompt", "question", "instruction"), ("responses", "completions", "answers")),
        ".data.shapes.ranked:read",
        looks=".data.shapes.ranked:looks",
    ),
    # rated answers
    "rated": ShapeFacts(
        "rated answers", "rated", (("completion",), LABEL), ".data.shapes.rated:read", asks=PROMPT, ours=True
    ),
    "rated_chats": ShapeFacts(
        "rated chats",
        "rated",
        (("messages", "conversations"), LABEL),
        ".data.shapes.rated:read_chat",
        without=("completion", "chosen"),
    ),
    # prompts
    "prompt": ShapeFacts(
        "prompts",
        "prompts",
        (PROMPT,),
        ".data.shapes.answered:read_prompt",
        without=("completion", "response", "answer", "output", *CHOSEN, *REJECT, "completions", "responses", "answers"),
    ),
}
