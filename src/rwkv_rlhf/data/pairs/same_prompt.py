"""Whether two examples answer the same prompt: by what was said, not by the tokens, which hold a template's words."""

import hashlib
import json
from collections.abc import Sequence

from rwkv_rlhf.data.batch import PairExample
from rwkv_rlhf.data.conversation import Turn
from rwkv_rlhf.data.policy_batch import PromptExample

DIGITS = 16  # 64 bits


def conversation_id(turns: Sequence[Turn]) -> str:
    """The same text for the same turns, in every run and whatever the template."""
    said = [(turn.role, turn.text) for turn in turns]  # not whether an earlier answer is learnt
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:DIGITS]


def prompt_key(example: PairExample | PromptExample) -> object:
    """Equal for examples of one prompt; by the tokens where the file does not say what they were made of."""
    return example.conversation or tuple(example.prompt)


def number_prompts(examples: Sequence[PairExample]) -> str:
    """The prompt of each example as a number, "0 0 1 ...", in order; "" where a conversation is unknown."""
    if not all(example.conversation for example in examples):
        return ""
    numbers: dict[str, int] = {}
    return " ".join(str(numbers.setdefault(example.conversation, len(numbers))) for example in examples)
