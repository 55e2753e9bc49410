"""A vocabulary in tokenizer.json's form on its way to other programs: as it is, or as llama.cpp holds byte pairs.

llama.cpp has no regular expressions of a file: it knows ways to cut a text by name. Written is the one of GPT-2, which
the 20B vocabulary has, and which the package `tokenizers` calls ByteLevel.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

GPT_2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}  # how a text is cut
# of the model "BPE": settings that change what a text becomes, and the values with which they do not
PLAIN = {"dropout": (None, 0), "continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, "")}
PLAIN |= {"byte_fallback": (None, False), "ignore_merges": (None, False)}


class BytePairs(NamedTuple):
    """words: as the file writes them, by id. marks: id -> whether it is special, of those that stand for themselves.
    merges: "a b", the first ones first. composes: whether text is brought into composed form (NFC) before."""

    words: Mapping[int, str]
    marks: Mapping[int, bool]
    merges: list[str]
    composes: bool


def byte_pairs(text: str) -> BytePairs:
    """What llama.cpp holds of a tokenizer.json. Raises ValueError, one sentence, where that is not all of it."""
    found: dict[str, Any] = json.loads(text)
    for said in differences(found):
        raise ValueError(
            f"--to gguf holds a tokenizer.json with byte pairs (BPE) that cuts text as GPT-2 does; {said}: --to hf "
            "takes it as it is"
        )
    inner = opened(text)
    words = {number: word for word, number in inner.get_vocab(with_added_tokens=True).items()}
    marks = {number: one.special for number, one in inner.get_added_tokens_decoder().items()}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in found["model"]["merges"]]
    return BytePairs(words, marks, merges, bool(found.get("normalizer")))


def opened(text: str) -> Any:
    """The content of a tokenizer.json as the package `tokenizers` takes it, whose ids those of the training are."""
    return importlib.import_module("tokenizers").Tokenizer.from_str(text)


def differences(found: Mapping[str, Any]) -> Iterator[str]:
    """What llama.cpp would do otherwise, in words."""
    model, cut, normal = (found.get(name) or {} for name in ("model", "pre_tokenizer", "normalizer"))
    if model.get("type") != "BPE":
        yield f"the model of this one is {model.get('type')}"
    for name, plain in PLAIN.items():
        if model.get(name) not in plain:
            yield f"this one has {name} {model[name]!r}"
    if {name: cut.get(name, value) for name, value in GPT_2.items()} != GPT_2 or not cut:
        yield f"this one has the pre_tokenizer {cut.get('type')} with settings of its own"
    if normal and normal.get("type") != "NFC":
        yield f"this one has the normalizer {normal.get('type')}"


def without_additions(text: str) -> str:
    """A tokenizer.json that adds no marks to a text, as nothing was added in training."""
    found: dict[str, Any] = json.loads(text)
    adding = (found.get("post_processor") or {}).get("type") not in (None, "ByteLevel")
    return json.dumps(found | {"post_processor": None}, ensure_ascii=False, indent=2) if adding else text


def mark_of(text: str, number: int) -> str:
    """The mark that has the id `number`; "" where that is an ordinary word, or none."""
    mark = opened(text).get_added_tokens_decoder().get(number)
    return mark.content if mark else ""
