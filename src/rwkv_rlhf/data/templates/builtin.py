"""How a conversation becomes text: the names of the speakers, the cue that an answer follows, the mark that ends it.

A turn is (role, text) with role `system`, `user` or `assistant`. The tradition is `User: {p}\\n\\nAssistant:` and then
` {answer}\\n\\n`: prompt and answer are tokenised apart, so training sees the very tokens that sampling continues from.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Turn = tuple[str, str]
ROLES = ("system", "user", "assistant")
_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
_THINK = "<think>"


def normalise(text: str) -> str:
    """Strips, turns CRLF and CR into LF, and runs of blank lines into one newline.

    A blank line ends a turn in every template of the tradition, so none may stand inside one.
    """
    return _BLANK_LINES.sub("\n", text.replace("\r\n", "\n").replace("\r", "\n").strip())


@dataclass(frozen=True)
class Form:
    """One way to write a conversation.

    Attributes:
        user, assistant, system: names of the speakers; empty strings for bare text.
        end: text that closes an answer.
        end_ids: token ids after that text (plain text has no mark of its own, so it takes the end of document, 0).
        think: answers follow the g1 models' think or no-think cue.
        whole: a turn's text depends on the turns around it, so a conversation must be written as one.
    """

    user: str = "User"
    assistant: str = "Assistant"
    system: str = "System"
    end: str = "\n\n"
    end_ids: tuple[int, ...] = ()
    think: bool = False
    whole: bool = False

    def _turn(self, role: str, text: str) -> str:
        name = {"user": self.user, "assistant": self.assistant, "system": self.system}[role]
        return f"{name}: {text}\n\n" if name else f"{text}\n"

    def history(self, turns: Sequence[Turn]) -> str:
        """Finished turns, each with its closing mark."""
        return "".join(self._turn(role, text) for role, text in turns)

    def prompt(self, turns: Sequence[Turn], answers: Sequence[str] = ()) -> str:
        """The conversation so far and the cue for an answer; `answers` decide g1's think or no-think cue."""
        if not self.assistant:
            return "\n".join(text for _, text in turns)
        return self.history(turns) + f"{self.assistant}:" + self._cue(answers)

    def _cue(self, answers: Sequence[str]) -> str:
        if not self.think:
            return ""
        thoughts = [answer.startswith(_THINK) for answer in answers]
        if all(thoughts):
            return " <think"
        return "" if any(thoughts) else " <think>\n</think"

    def answers(self, answers: Sequence[str]) -> list[str]:
        """The text of each answer as it follows `prompt(turns, answers)`."""
        if not self.assistant:
            return [answer + self.end for answer in answers]
        cue = self._cue(answers)
        if cue == " <think":
            return [answer.removeprefix("<think") + self.end for answer in answers]
        lead = ">\n" if cue else " "
        return [lead + answer + self.end for answer in answers]

    def written(self, turns: Sequence[Turn], answers: Sequence[str]) -> tuple[str, list[str]]:
        """The prompt and the answers that follow it."""
        return self.prompt(turns, answers), self.answers(answers)

    def pieces(self, turns: Sequence[Turn]) -> Iterator[tuple[str, bool]]:
        """A chat as pieces of text, each tokenised apart: (text, whether it is an answer of the assistant)."""
        waiting: list[Turn] = []
        for role, text in turns:
            if role != "assistant":
                waiting.append((role, text))
                continue
            prompt, (answer,) = self.written(waiting, [text])
            yield prompt, False
            yield answer, True
            waiting = []
        if waiting:
            yield self.history(waiting), False


WORLD = Form()
PLAIN = Form(user="", assistant="", system="", end="", end_ids=(0,))

# name -> (share, form) pairs; a template with one form always uses it
TEMPLATES: dict[str, tuple[tuple[float, Form], ...]] = {
    "world": ((1.0, WORLD),),
    "mixed": (
        (0.8, WORLD),
        (0.1, Form(user="Question", assistant="Answer")),
        (0.1, Form(user="Input", assistant="Response")),
    ),
    "g1": ((1.0, Form(think=True)),),
    "plain": ((1.0, PLAIN),),
}
