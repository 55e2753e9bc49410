"""Let a reward model score a file of answers.

python score.py --load_model R --input IN.jsonl --output OUT.jsonl

Each line of the input is an object with `prompt` (optionally `system`) and `answer` or `completion`, or with
`messages` whose last one is the assistant's: what chat.py --output writes will do. Each line of the output is the same
object with `reward`, a number that means something beside other rewards of the same model only.
"""

import json
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from rwkv_rlhf.commands.parsers.score import parser
from rwkv_rlhf.data.conversation import Turn, refuse_nul
from rwkv_rlhf.data.json_rows import read_jsonl
from rwkv_rlhf.data.messages import Notes
from rwkv_rlhf.data.report import DataReport, RowError
from rwkv_rlhf.data.shapes.answer import parse_answer
from rwkv_rlhf.data.shapes.question import question_turns
from rwkv_rlhf.data.shapes.record import Record
from rwkv_rlhf.data.templates.named import find_templates
from rwkv_rlhf.data.templates.template import Template
from rwkv_rlhf.data.tokenizer import Tokenizer
from rwkv_rlhf.files import atomic_write, check_writable, refuse_same_file, without_nan
from rwkv_rlhf.generation.opening import open_model
from rwkv_rlhf.scoring.finite import refuse_not_finite
from rwkv_rlhf.scoring.rewards import answer_rewards
from rwkv_rlhf.settings.counted import counted
from rwkv_rlhf.settings.shapes import PROMPT, SHAPES

log = logging.getLogger("score")

ANSWER = ("answer", "completion")  # names that mean the same


class Answered(NamedTuple):
    """Where an object of the input stands, the object, its conversation, and the answer to that."""

    where: str
    record: dict[str, Any]
    turns: tuple[Turn, ...]
    answer: str


def answered(where: str, values: dict[str, Any], notes: Notes) -> Answered:
    """One object of the input. Raises RowError when prompt or answer is missing or empty."""
    record = Record(values, SHAPES["completion"], notes)
    if "messages" in values:
        turns = record.turns(("messages",)) if isinstance(values["messages"], list) else []
        if len(turns) < 2 or turns[-1].role != "assistant":
            raise RowError("messages must be a list that ends with the assistant's answer to a user", "unreadable")
        before, text = turns[:-1], turns[-1].text
    else:
        name = next((name for name in ANSWER if values.get(name) is not None), ANSWER[0])
        answer = parse_answer(record, (name,))
        before, text = [*question_turns(record, PROMPT), *answer.before], answer.text
    asked = record.asked(before)
    refuse_nul([Turn("assistant", text)])
    return Answered(where, values, asked, text)


def read_answers(path: str, skip_bad: bool) -> list[Answered]:
    """What is to be scored, in the file's order. Raises ValueError with file and line, and when there is nothing."""
    report, notes = DataReport(path, skip_bad=skip_bad), Notes()
    found = []
    for where, values in read_jsonl(path, report):
        try:
            found.append(answered(where, values, notes))
        except RowError as error:
            report.bad(where, error)
    if not found:
        raise ValueError(f"{path} holds no answer to score ({counted(report.rows, 'row')} read)")
    for line in notes.lines():
        log.info("%s", line)
    for reason, count in report.skipped.items():
        log.info("skipped %d: %s", count, reason)
    return found


class Tokenised(NamedTuple):
    """Prompts, and of each its one answer with the tokens that end it."""

    prompts: list[list[int]]
    answers: list[tuple[list[int], ...]]


def tokenised(found: Sequence[Answered], template: Template, tokenizer: Tokenizer) -> Tokenised:
    """As training has them: prompt and answer tokenised apart. Raises ValueError for what a template refuses."""
    prompts: list[list[int]] = []
    answers: list[tuple[list[int], ...]] = []
    for one in found:
        try:
            prompt, (text,) = template.render(one.turns, [one.answer])
        except RowError as error:
            raise ValueError(f"{one.where}: {error}") from error
        prompts.append(template.ids(prompt, tokenizer))
        answers.append(([*template.ids(text, tokenizer), *template.end_ids],))
    return Tokenised(prompts, answers)


def main(argv: Sequence[str]) -> None:
    """Reads, scores, writes."""
    flags = parser().parse_args(argv)
    refuse_same_file(flags.input, flags.output, "--output")
    template = find_templates(flags.template)[0].template
    found = read_answers(flags.input, flags.skip_bad)
    check_writable(flags.output)
    model, tokenizer = open_model(flags.load_model, flags.load_adapter, flags.strategy, flags.vocab_file)
    scored = answer_rewards(model, *tokenised(found, template, tokenizer))[:, 0]
    refuse_not_finite("a reward", scored, model)
    rewards = scored.tolist()
    with atomic_write(flags.output) as file:
        for one, reward in zip(found, rewards, strict=True):
            line = json.dumps(without_nan(one.record | {"reward": reward}), ensure_ascii=False, allow_nan=False)
            file.write((line + "\n").encode("utf-8", errors="replace"))
    mean = sum(rewards) / len(rewards)
    log.info(
        "%d answers scored into %s: rewards from %.4g to %.4g, mean %.4g",
        *(len(rewards), flags.output, min(rewards), max(rewards), mean),
    )
