"""LAMBADA as RWKV's scripts measure it: how likely, and how often the likeliest, is the last word of a passage.

Perplexity is exp of minus the mean, over passages, of the last word's summed log-probability; accuracy is the share of
passages all of whose last word's tokens are the likeliest ones. The passage runs behind the end of a document (0), and
passage and last word, with the space before it, are tokenised apart.
Source: RWKV-LM, RWKV-v7/run_lambada (and ChatRWKV, v2/benchmark.py), on OpenAI's lambada_test.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from rwkv_rlhf.files import parse_json, read_bytes
from rwkv_rlhf.tasks.text_model import TextModel


def passages(path: Path) -> Iterator[str]:
    """The texts of a file: JSON lines with `text`, or plain lines. Raises ValueError with the line."""
    lines = read_bytes(path).decode("utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        text: object = line.strip()  # of JSON it stays as it is: a line break inside belongs to the last word
        if path.suffix.lower() in (".jsonl", ".json"):
            try:
                record = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: this is no JSON ({error})") from error
            text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str) or " " not in text.strip() or text.endswith(" "):
            raise ValueError(f"{path}:{number}: expected a passage of several words, in JSON under the key text")
        yield text


def lambada(model: TextModel, path: Path, limit: int = 0) -> dict[str, float]:
    """perplexity, accuracy and passages, of the first `limit` passages (0 = all). Raises ValueError for a file that
    holds none."""
    found = [text.rsplit(" ", 1) for text in passages(path)]
    found = found[:limit] if limit else found
    if not found:
        raise ValueError(f"{path} holds no passage")
    scores = model.likelihoods([model.apart(before, f" {last}") for before, last in found])
    mean = sum(score.logp for score in scores) / len(scores)
    accuracy = sum(1 for score in scores if score.greedy) / len(scores)
    return {"perplexity": math.exp(min(-mean, 700.0)), "accuracy": accuracy, "passages": len(scores)}
