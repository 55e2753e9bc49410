"""Answers that are good or bad on their own (KTO): prompt, completion, label; or the two answers of a pair, apart.

Each answer is given the answer to another prompt, once and for all: from those KTO estimates how far the policy has
moved, and their reference scores are computed with its own.
"""

import dataclasses
import os
import random
from collections.abc import Sequence
from typing import Any

from rwkv_rlhf.data.batch import PairExample, RatedExample
from rwkv_rlhf.data.items import Reading, kind_of_rows, read_items
from rwkv_rlhf.data.pairs.dataset import Pairs
from rwkv_rlhf.data.pairs.same_prompt import conversation_id, prompt_key
from rwkv_rlhf.data.pairs.tokenising import cap_prompt
from rwkv_rlhf.data.report import DataReport, RowError
from rwkv_rlhf.data.rows import has_rows
from rwkv_rlhf.data.shapes.record import Rated
from rwkv_rlhf.data.sources import sources_of
from rwkv_rlhf.data.templates.named import TEMPLATE_SEED, draw_template, find_templates, say_plain_marks
from rwkv_rlhf.data.templates.template import Template
from rwkv_rlhf.data.tokenizer import Tokenizer
from rwkv_rlhf.settings.counted import counted


def is_rated(path: str | os.PathLike[str], shape: str = "") -> bool:
    """Whether a file holds rated answers, by its first row (or by --format `shape`).

    Raises ValueError when it cannot be read.
    """
    first = sources_of(path)[0].path
    return has_rows(first) and kind_of_rows(first, shape) == "rated"


def _tokenise(row: Rated, template: Template, tokenizer: Tokenizer) -> RatedExample:
    prompt, (text,) = template.render(row.turns, [row.completion])
    answer = [*template.ids(text, tokenizer), *template.end_ids]
    key = conversation_id(row.turns)
    return RatedExample(template.ids(prompt, tokenizer), answer, [], good=row.good, conversation=key)


def mismatched(examples: Sequence[RatedExample], source: str, seed: int) -> list[RatedExample]:
    """The examples, each with the answer of an example of another prompt as `reject`.

    Prompts are put in a seeded order, then every answer moves on by the size of the largest group: no answer can stay
    with its prompt, unless one prompt has more than half of all answers; those borrow from the rest in turn.
    Raises ValueError when there is only one prompt.
    """
    keys = [prompt_key(example) for example in examples]
    groups: dict[object, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    if len(groups) < 2:
        raise ValueError(f"{source}: KTO needs answers to at least two different prompts; there is one")
    some = list(groups.values())
    random.Random(seed).shuffle(some)
    order = [index for group in some for index in group]
    step = max(map(len, some))
    largest = max(some, key=len)
    rest = [index for group in some if group is not largest for index in group]
    found: dict[int, list[int]] = {}
    for at, index in enumerate(order):
        other = order[(at + step) % len(order)]
        if keys[other] == keys[index]:  # only in a group of more than half of all
            other = rest[at % len(rest)]
        found[index] = examples[other].chosen
    return [dataclasses.replace(example, reject=found[i]) for i, example in enumerate(examples)]


def _finished(
    examples: Sequence[RatedExample],
    report: DataReport,
    ctx_len: int,
    seed: int,
    about: dict[str, Any] | None = None,
) -> Pairs:
    """Mismatched, counted and warned about."""
    if not examples:
        raise ValueError(f"{report.source}: holds no usable answer ({counted(report.rows, 'row')} read)")
    rated = Pairs(mismatched(examples, report.source, seed), report, ctx_len, about)
    good = sum(1 for example in examples if example.good)
    report.notice(f"{report.source}: {good} good and {counted(len(examples) - good, 'bad answer')}")
    return rated


def open_rated(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    template: str = "world",
    max_len: int = 1024,
    ctx_len: int = 0,
    seed: int = TEMPLATE_SEED,
    skip_bad: bool = False,
    reading: Reading | None = None,
) -> Pairs:
    """Rated answers of a CSV, JSONL or parquet file with prompt, completion and label (and system, if any).

    Arguments and errors as `open_pairs`.
    """
    find_templates(template)
    report, rng = DataReport(str(path), skip_bad=skip_bad), random.Random(seed)
    say_plain_marks(template, tokenizer, report)
    examples, seen = [], set()
    last = None
    for where, row, _ in read_items(path, report, ("rated",), reading):
        assert isinstance(row, Rated)
        try:
            example = _tokenise(row, draw_template(template, rng), tokenizer)
        except RowError as error:
            report.bad(where, error)
            continue
        again, last = row is last, row  # of a file with a weight
        report.remark("repeat another one", hash(row) in seen and not again)
        seen.add(hash(row))
        if max_len:
            report.cut("prompt", len(example.prompt) > max_len)
            report.cut("completion", len(example.chosen) > max_len)
            prompt = cap_prompt(example.prompt, max_len)
            example = dataclasses.replace(example, prompt=prompt, chosen=example.chosen[:max_len])
        examples.append(example)
    return _finished(examples, report, ctx_len, seed)


def unpair(pairs: Pairs, seed: int = TEMPLATE_SEED) -> Pairs:
    """The two answers of each pair as a good and a bad one; reference scores are dropped, they lack a part."""
    halves = []
    for index in range(len(pairs)):
        pair: PairExample = pairs[index]
        for answer, good in ((pair.chosen, True), (pair.reject, False)):
            halves.append(RatedExample(pair.prompt, answer, [], good=good, conversation=pair.conversation))
    return _finished(halves, pairs.report, pairs.ctx_len, seed, pairs.sidecar)
