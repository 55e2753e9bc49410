"""Answers that are good or bad on their own (KTO): prompt, completion, label; or the two answers of a pair, apart.

Each answer is given the answer to another prompt, once and for all: from those KTO estimates how far the policy has
moved, and their reference scores are computed with its own.
"""

import os
import random
from collections.abc import Sequence

from rwkv_rlhf.data.batch import PairExample, RatedExample
from rwkv_rlhf.data.items import Reading, kind_of_rows, read_items
from rwkv_rlhf.data.pairs.dataset import Pairs
from rwkv_rlhf.data.pairs.tokenising import cap_prompt
from rwkv_rlhf.data.report import DataReport, RowError
from rwkv_rlhf.data.rows import has_rows
from rwkv_rlhf.data.shapes.record import Rated
from rwkv_rlhf.data.sources import sources_of
from rwkv_rlhf.data.templates.named import TEMPLATE_SEED, draw_template, find_templates, say_plain_marks
from rwkv_rlhf.data.templates.template import Template
from rwkv_rlhf.data.tokenizer import Tokenizer


def is_rated(path: str | os.PathLike[str], shape: str = "") -> bool:
    """Whether a file holds rated answers, by its first row (or by --format `shape`).

    Raises ValueError when it cannot be read.
    """
    first = sources_of(path)[0].path
    return has_rows(first) and kind_of_rows(first, shape) == "rated"


def _tokenise(row: Rated, template: Template, tokenizer: Tokenizer) -> RatedExample:
    prompt, (text,) = template.render(row.turns, [row.completion])
    answer = [*template.ids(text, tokenizer), *template.end_ids]
    return RatedExample(template.ids(prompt, tokenizer), answer, [], good=row.good)


def mismatched(examples: Sequence[RatedExample], source: str, seed: int) -> list[RatedExample]:
    """The examples, each with the answer of an example of another prompt as `reject`.

    Prompts are put in a seeded order, then every answer moves on by the size of the largest group: no answer can stay
    with its prompt, unless one prompt has more than half of all answers; those borrow from the rest in turn.
    Raises ValueError when there is only one prompt.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(tuple(example.prompt), []).append(index)
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
        if examples[other].prompt == examples[index].prompt:  # only in a group of more than half of all
            other = rest[at % len(rest)]
        found[index] = examples[other].chosen
    return [RatedExample(e.prompt, e.chosen, found[i], good=e.good) for i, e in enumerate(examples)]


def _finished(examples: Sequence[RatedExample], report: DataReport, ctx_len: int, seed: int) -> Pairs:
    """Mismatched, counted and warned about."""
    if not examples:
        raise ValueError(f"{report.source}: holds no usable answer ({report.rows} rows read)")
    rated = Pairs(mismatched(examples, report.source, seed), report, ctx_len)
    good = sum(1 for example in examples if example.good)
    report.notice(f"{report.source}: {good} good and {len(examples) - good} bad answers")
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
        key = hash((tuple(example.prompt), tuple(example.chosen), example.good))
        report.remark("repeat another one", key in seen and not again)
        seen.add(key)
        if max_len:
            report.cut("prompt", len(example.prompt) > max_len)
            report.cut("completion", len(example.chosen) > max_len)
            example = RatedExample(cap_prompt(example.prompt, max_len), example.chosen[:max_len], [], good=example.good)
        examples.append(example)
    return _finished(examples, report, ctx_len, seed)


def unpair(pairs: Pairs, seed: int = TEMPLATE_SEED) -> Pairs:
    """The two answers of each pair as a good and a bad one; reference scores are dropped, they lack a part."""
    halves = []
    for index in range(len(pairs)):
        pair: PairExample = pairs[index]
        halves.append(RatedExample(pair.prompt, pair.chosen, [], good=True))
        halves.append(RatedExample(pair.prompt, pair.reject, [], good=False))
    return _finished(halves, pairs.report, pairs.ctx_len, seed)
