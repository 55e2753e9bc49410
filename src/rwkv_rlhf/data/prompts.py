"""Prompts without answers, for losses that sample their own: any file of rows with prompt (or messages)."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import Any, overload

from rwkv_rlhf.data.conversation import parse_messages, refuse_nul
from rwkv_rlhf.data.pairs.text_pairs import PROMPT, complete_prompt, parse_prompt
from rwkv_rlhf.data.pairs.tokenising import cap_prompt
from rwkv_rlhf.data.policy_batch import PromptExample
from rwkv_rlhf.data.report import DataReport, RowError
from rwkv_rlhf.data.rows import has_rows, read_rows
from rwkv_rlhf.data.templates.named import TEMPLATE_SEED, draw_template, find_templates
from rwkv_rlhf.data.templates.template import Template
from rwkv_rlhf.data.tokenizer import Tokenizer
from rwkv_rlhf.settings.formats import names_of_formats

MESSAGES = "messages"  # in place of prompt: a conversation that ends with a turn of the user
NOT_HANDED_ON = {*PROMPT, MESSAGES, "completion", "completions", "completion_ids"}


class Prompts(Sequence[PromptExample]):
    """Prompts in file order. report: what was read, cut and left out."""

    def __init__(self, prompts: Sequence[PromptExample], report: DataReport) -> None:
        if not prompts:
            raise ValueError(f"{report.source}: holds no usable prompt ({report.rows} rows read)")
        self._prompts, self.report = prompts, report
        report.examples = report.trained = len(prompts)
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
        """Equal prompts must not be torn apart by a held-out split."""
        return tuple(self._prompts[index].prompt)


def _tokenise(record: dict[str, Any], where: str, template: Template, tokenizer: Tokenizer) -> PromptExample:
    raw = next((record[name] for name in (*PROMPT, MESSAGES) if record.get(name) is not None), None)
    asked = parse_prompt(record)
    if not asked and isinstance(record.get(MESSAGES), list):
        asked = parse_messages(record[MESSAGES], MESSAGES)
    turns = complete_prompt(asked, record)
    if turns[-1].role != "user":
        raise RowError("the conversation must end with a turn of the user, which is to be answered", "no open question")
    refuse_nul(turns)
    cue = raw if isinstance(raw, str) and not template.assistant else template.prompt(turns)
    columns = {name: value for name, value in record.items() if name not in NOT_HANDED_ON}
    return PromptExample(tokenizer.encode(cue), raw, columns, cue, template.end, not template.assistant, where)


def open_prompts(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    template: str = "world",
    max_len: int = 1024,
    seed: int = TEMPLATE_SEED,
    skip_bad: bool = False,
) -> Prompts:
    """Prompts of a CSV, JSONL or parquet file; columns beside prompt (or question, messages) and system are kept.

    max_len: --rlhf_max_corpus_len, 0 = none; a longer prompt keeps its end. Raises ValueError with file and line.
    """
    find_templates(template)
    if not has_rows(path):
        raise ValueError(f"{path}: not a file of prompts; one of {', '.join(names_of_formats('rated'))}")
    report, rng = DataReport(str(path), skip_bad=skip_bad), random.Random(seed)
    prompts = []
    for where, record in read_rows(path, report, ((*PROMPT, MESSAGES),)):
        try:
            example = _tokenise(record, where, draw_template(template, rng), tokenizer)
        except RowError as error:
            report.bad(where, error)
            continue
        if max_len and len(example.prompt) > max_len:
            report.cut("prompt")
            fields = vars(example) | {"prompt": cap_prompt(example.prompt, max_len)}
            example = PromptExample(**fields)
        prompts.append(example)
    return Prompts(prompts, report)
