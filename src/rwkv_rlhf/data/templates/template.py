"""How a conversation becomes text: the names of the speakers, the cue that an answer follows, the mark that ends it.

The tradition is `User: {p}\\n\\nAssistant:` and then ` {answer}\\n\\n`. Prompt and answer are tokenised apart, so
training sees the very tokens that sampling continues from.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rwkv_rlhf.data.conversation import TOOLS, Turn
from rwkv_rlhf.data.report import RowError
from rwkv_rlhf.data.tokenizer import Tokenizer

_THINK = "<think>"
# how a template that has no form of its own lists tools: one a line, then how they are called
_TOOLS = """These tools can be called, one is described on each line:
{tools}
A call is one JSON object between two marks:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""
# a turn's text without blank lines, as conversation.py:normalise leaves it
JINJA = (
    "{{%- for message in messages -%}}"
    "{{%- set name = '{user}' if message['role'] == 'user' else "
    "'{system}' if message['role'] == 'system' else '{assistant}' -%}}"
    "{{{{- name + ': ' -}}}}"
    "{{%- set text = message['content'].replace('\\r\\n', '\\n').replace('\\r', '\\n').strip() -%}}"
    "{{%- for line in text.split('\\n') if line.strip() -%}}"
    "{{{{- line -}}}}{{{{- '\\n\\n' if loop.last else '\\n' -}}}}"
    "{{%- endfor -%}}"
    "{{%- endfor -%}}"
    "{{%- if add_generation_prompt -%}}{{{{- '{cue}' -}}}}{{%- endif -%}}"
)

FLOWER = "\u273f"  # ends a turn, and what a speaker is called, in RWKV-7 G1h
FLOWER_JINJA = (
    "{%- for message in messages -%}"
    "{%- set name = 'Bot' if message['role'] == 'assistant' else "
    "'System' if message['role'] == 'system' else 'User' -%}"
    "{%- set tool = message['role'] == 'tool' -%}"
    "{%- if not (tool and loop.previtem and loop.previtem['role'] == 'tool') -%}"
    "{{- ('' if loop.first else '\n') + name + '\u273f' -}}"
    "{%- endif -%}"
    "{%- if tool -%}{{- '\n<tool_response>\n' -}}{%- endif -%}"
    "{%- set text = message['content'].replace('\r\n', '\n').replace('\r', '\n').strip() -%}"
    "{%- for line in text.split('\n') if line.strip() -%}"
    "{{- line -}}{{- '\n' if not loop.last else '' if tool else '\u273f' -}}"
    "{%- endfor -%}"
    "{%- if tool -%}"
    "{{- '\n</tool_response>' -}}"
    "{{- '' if loop.nextitem and loop.nextitem['role'] == 'tool' else '\u273f' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '\nBot\u273f<think' -}}{%- endif -%}"
)


class Rendered(NamedTuple):
    """A prompt as text, and the answers as they follow it, with what ends them."""

    prompt: str
    answers: list[str]


class Span(NamedTuple):
    """A piece of a chat that is tokenised by itself; `answer`: the assistant says it, and `trained`: it is learnt."""

    text: str
    answer: bool
    trained: bool = True


def with_tools_said(turns: Sequence[Turn]) -> list[Turn]:
    """The turns with a list of tools as part of the system text."""
    if not turns or turns[0].role != TOOLS:
        return list(turns)
    tools = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in json.loads(turns[0].text))
    said, rest = _TOOLS.format(tools=tools), list(turns[1:])
    if rest and rest[0].role == "system":
        said, rest = f"{rest[0].text}\n{said}", rest[1:]
    return [Turn("system", said), *rest]


@dataclass(frozen=True)
class Template:
    """One way to write a conversation.

    Attributes:
        user, assistant, system, tool: names of the speakers; empty strings for bare text.
        end: text that closes an answer.
        end_ids: token ids after that text (plain text has no mark of its own, so it takes the end of document, 0).
        think: answers follow the g1 models' think or no-think cue.
        whole_conversation: a turn's text depends on the turns around it, so a conversation must be written as one.
    """

    user: str = "User"
    assistant: str = "Assistant"
    system: str = "System"
    tool: str = "Tool"
    end: str = "\n\n"
    end_ids: tuple[int, ...] = ()
    think: bool = False
    whole_conversation: bool = False

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """What ends sampling as it ends an answer; none of bare text."""
        return (self.end,) if self.end else ()

    def as_jinja(self) -> str:
        """The same as a chat template in Jinja, for other programs; "" for bare text, which has none.

        It writes what `history` and `prompt` write of normalised turns. The mark in front is by which llama.cpp knows
        this template without Jinja.
        """
        if not self.assistant:
            return ""
        mark = "{#- rwkv-world -#}" if self == WORLD else ""
        return mark + JINJA.format(
            user=self.user, system=self.system, assistant=self.assistant, cue=f"{self.assistant}:{self._cue(())}"
        )

    def _turn(self, turn: Turn) -> str:
        name = {"user": self.user, "assistant": self.assistant, "tool": self.tool}.get(turn.role, self.system)
        return f"{name}: {turn.text}\n\n" if name else f"{turn.text}\n"

    def history(self, turns: Sequence[Turn]) -> str:
        """Finished turns, each with its closing mark."""
        return "".join(map(self._turn, with_tools_said(turns)))

    def prompt(self, turns: Sequence[Turn], answers: Sequence[str] = ()) -> str:
        """The conversation so far and the cue for an answer; `answers` decide g1's think or no-think cue."""
        if not self.assistant:
            return "\n".join(turn.text for turn in with_tools_said(turns))
        return self.history(turns) + f"{self.assistant}:" + self._cue(answers)

    def _cue(self, answers: Sequence[str]) -> str:
        if not self.think:
            return ""
        thoughts = [answer.startswith(_THINK) for answer in answers]
        if all(thoughts):
            return " <think"
        return "" if any(thoughts) else " <think>\n</think"

    def _answers(self, answers: Sequence[str]) -> list[str]:
        if not self.assistant:
            return [answer + self.end for answer in answers]
        cue = self._cue(answers)
        if cue == " <think":
            return [answer.removeprefix("<think") + self.end for answer in answers]
        lead = ">\n" if cue else " "
        return [lead + answer + self.end for answer in answers]

    def render(self, turns: Sequence[Turn], answers: Sequence[str]) -> Rendered:
        """The prompt, and each of `answers` as it follows it. Raises RowError where a template refuses them."""
        return Rendered(self.prompt(turns, answers), self._answers(answers))

    def ids(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """Token ids of a text that this template wrote."""
        return tokenizer.encode(text)

    def marks(self, tokenizer: Tokenizer) -> list[str]:
        """Special tokens that this template writes and the vocabulary has no ids for."""
        return []

    def spans(self, turns: Sequence[Turn]) -> Iterator[Span]:
        """A whole chat: everything between two answers is one span."""
        waiting: list[Turn] = []
        for turn in turns:
            if turn.role != "assistant":
                waiting.append(turn)
                continue
            prompt, (answer,) = self.render(waiting, [turn.text])
            yield Span(prompt, False)
            yield Span(answer, True, turn.trained)
            waiting = []
        if waiting:
            yield Span(self.history(waiting), False)


@dataclass(frozen=True)
class FlowerTemplate(Template):
    """That of RWKV-7 G1h and later: System, User or Bot and a text, FLOWER behind both, a line break between turns.

    Source: the chat template of RWKV's vLLM engine. A thought is begun with `<think`, or left out with
    `<think></think`; what tools answer is said by the user, between marks, several answers in one turn.
    """

    assistant: str = "Bot"
    tool: str = "User"
    end: str = FLOWER
    think: bool = True
    whole_conversation: bool = True

    def as_jinja(self) -> str:
        """As `Template.as_jinja`."""
        return FLOWER_JINJA

    def _turn(self, turn: Turn) -> str:
        name = {"user": self.user, "assistant": self.assistant, "tool": self.tool}.get(turn.role, self.system)
        return f"{name}{FLOWER}{self._plain(turn.text)}{FLOWER}"

    def _plain(self, text: str) -> str:
        if FLOWER in text:
            raise RowError(f"a text holds {FLOWER}, which ends a turn in the template g1h", "refused by the template")
        return text

    def history(self, turns: Sequence[Turn]) -> str:
        """Finished turns, a line break between them."""
        said: list[Turn] = []
        for turn in with_tools_said(turns):
            if turn.role != "tool":
                said.append(turn)
                continue
            result = f"\n<tool_response>\n{turn.text}\n</tool_response>"
            before = said.pop().text if said and said[-1].role == "tool" else ""
            said.append(Turn("tool", before + result))
        return "\n".join(map(self._turn, said))

    def prompt(self, turns: Sequence[Turn], answers: Sequence[str] = ()) -> str:
        """As `Template.prompt`."""
        return self.history(turns) + ("\n" if turns else "") + self.assistant + FLOWER + self._cue(answers)

    def _cue(self, answers: Sequence[str]) -> str:
        thoughts = [answer.startswith(_THINK) for answer in answers]
        if all(thoughts):
            return "<think"
        return "" if any(thoughts) else "<think></think"

    def _answers(self, answers: Sequence[str]) -> list[str]:
        cue = self._cue(answers)
        if cue == "<think":
            return [self._plain(answer.removeprefix("<think")) + self.end for answer in answers]
        return [(">" if cue else "") + self._plain(answer) + self.end for answer in answers]

    def spans(self, turns: Sequence[Turn]) -> Iterator[Span]:
        """As `Template.spans`; the line break before a turn belongs to it."""
        for number, span in enumerate(super().spans(turns)):
            yield span if span.answer or number == 0 else span._replace(text="\n" + span.text)


class Share(NamedTuple):
    """A template and the share of rows that are written with it."""

    share: float
    template: Template


WORLD = Template()
PLAIN = Template(user="", assistant="", system="", tool="", end="", end_ids=(0,))

# --template -> what rows are written with; their shares sum to 1
TEMPLATES: dict[str, tuple[Share, ...]] = {
    "world": (Share(1.0, WORLD),),
    "mixed": (
        Share(0.8, WORLD),
        Share(0.1, Template(user="Question", assistant="Answer")),
        Share(0.1, Template(user="Input", assistant="Response")),
    ),
    "g1": (Share(1.0, Template(think=True)),),
    "g1h": (Share(1.0, FlowerTemplate()),),
    "plain": (Share(1.0, PLAIN),),
}
