"""Prompts without answers, for losses that sample their own: any file of rows with prompt (or messages)."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Sequence
from typing import Any, overload

from rwkv_rlhf.data.conversation import is_missing
from rwkv_rlhf.data.messages import Notes
from rwkv_rlhf.data.pairs.same_prompt import conversation_id, prompt_key
from rwkv_rlhf.data.pairs.tokenising import cap_prompt
from rwkv_rlhf.data.policy_batch import PromptExample
from rwkv_rlhf.data.report import DataReport, RowError
from rwkv_rlhf.data.rows import has_rows, read_rows
from rwkv_rlhf.data.shapes.question import question_turns
from rwkv_rlhf.data.shapes.record import Record
from rwkv_rlhf.data.sources import sources_of
from rwkv_rlhf.data.templates.named import TEMPLATE_SEED, draw_template, find_templates
from rwkv_rlhf.data.templates.template import Template
from rwkv_rlhf.data.tokenizer import Tokenizer
from rwkv_rlhf.settings.counted import counted
from rwkv_rlhf.settings.formats import names_of_formats
from rwkv_rlhf.settings.shapes import PROMPT, SHAPES

MESSAGES = "messages"  # in place of prompt: a conversation that ends with a turn of the user
NOT_HANDED_ON = {*PROMPT, MESSAGES, "completion", "completions", "completion_ids"}
ASKING = (*PROMPT, MESSAGES)  # where the prompt may stand, in this order


class Prompts(Sequence[PromptExample]):
    """Prompts in file order. report: what was read, cut and left out."""

    def __init__(self, prompts: Sequence[PromptExample], report: DataReport) -> None:
        if not prompts:
            raise ValueError(f"{report.source}: holds no usable prompt ({counted(report.rows, 'row')} read)")
        self._prompts, self.report = prompts, report
        report.examples = report.trained = len(prompts)
        report.unit = "prompt"
        report.lengths = [len(one.prompt) for one in prompts]

    def __len__(self) -> int:
        return len(self._prompts)

    @overload
    def __getitem__(self, index: int) -> PromptExample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[PromptExample]: ...
    def __getitem__(self, index: int | slice) -> PromptExample | Sequence[PromptExample]:
        return self._prompts[index]

    def trained(self, index: int) -> int:
        """A prompt counts as one."""
        return 1

    def group(self, index: int) -> object:
        """Rows of one prompt must not be torn apart by a held-out split."""
        return prompt_key(self._prompts[index])


def _tokenise(
    values: dict[str, Any], where: str, template: Template, tokenizer: Tokenizer, notes: Notes
) -> PromptExample:
    key = next((name for name in ASKING if not is_missing(values.get(name))), PROMPT[0])
    record, raw = Record(values, SHAPES["prompt"], notes), values.get(key)
    asked = question_turns(record, (key,))
    if asked and asked[-1].role == "assistant":
        raise RowError("the conversation must end with a turn of the user, which is to be answered", "no open question")
    turns = record.asked(asked)
    cue = raw if isinstance(raw, str) and not template.assistant else template.prompt(turns)
    columns = {name: value for name, value in values.items() if name not in NOT_HANDED_ON}
    ids = template.ids(cue, tokenizer)
    key = conversation_id(turns)
    return PromptExample(ids, raw, columns, cue, template.end, not template.assistant, where, key)


def open_prompts(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    template: str = "world",
    max_len: int = 1024,
    seed: int = TEMPLATE_SEED,
    skip_bad: bool = False,
    drop_thinking: bool = False,
) -> Prompts:
    """Prompts of files with rows (`path`: as `sources_of` takes it); columns beside the prompt are kept.

    Unlike elsewhere rows may hold an answer too, which is a column for rewards. max_len: --rlhf_max_corpus_len, 0 =
    none; a longer prompt keeps its end. Raises ValueError with file and line.
    """
    find_templates(template)
    report, rng, notes = DataReport(str(path), skip_bad=skip_bad), random.Random(seed), Notes(drop_thinking)
    prompts: list[PromptExample] = []
    for source in sources_of(path):
        if not has_rows(source.path):
            raise ValueError(f"{source.path}: not a file of prompts; one of {', '.join(names_of_formats('rated'))}")
        copies = source.copies()
        for where, values in read_rows(source.path, report, (ASKING,)):
            try:
                example = _tokenise(values, where, draw_template(template, rng), tokenizer, notes)
            except RowError as error:
                report.bad(where, error)
                continue
            if max_len and len(example.prompt) > max_len:
                report.cut("prompt")
                example = dataclasses.replace(example, prompt=cap_prompt(example.prompt, max_len))
            prompts += [example] * next(copies)
    report.found += [f"{path}: {line}" for line in notes.lines()]
    return Prompts(prompts, report)
