"""A conversation with one model, or with two at once: what each remembers, and the commands that begin with a slash."""

from __future__ import annotations

import dataclasses
import difflib
import json
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch

from rwkv_rlhf.checkpoints.tensor_files import read_tensors, write_tensors
from rwkv_rlhf.data.conversation import Turn, normalise
from rwkv_rlhf.data.items import read_items
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.shapes.record import Chat, Document
from rwkv_rlhf.data.shapes.stable import stable_form
from rwkv_rlhf.data.templates.named import find_templates
from rwkv_rlhf.data.templates.template import Template
from rwkv_rlhf.data.tokenizer import Tokenizer
from rwkv_rlhf.files import atomic_write
from rwkv_rlhf.generation.answers import AnswerStream, after_cue
from rwkv_rlhf.generation.rows import Completion
from rwkv_rlhf.generation.sampler import Sampler
from rwkv_rlhf.generation.sampling_params import SamplingParams, option_types, options
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.model.state import State
from rwkv_rlhf.settings.command_line import TYPE_WORDS
from rwkv_rlhf.settings.counted import counted

SHORT = {"/temp": "temperature", "/max": "max_tokens"}  # the other options by their names: /top_p 0.5
KEPT = 16  # turns whose state is kept for /undo; a state is megabytes
TALK = "conversation"  # the name of what was said among the tensors of a state
COMMANDS = {
    "/system TEXT": "what the model is told first; nothing = no system text",
    "/retry": "another answer to the last turn",
    "/undo": "take the last turn and its answer back",
    "/reset": "forget the conversation",
    "/save FILE": "write the conversation as a line of JSON, which training reads too",
    "/load FILE": "go on with a conversation of a file",
    "/state": "save FILE.safetensors, or load it: what the model remembers, without reading all again",
    "/model PATH": "talk to another model: a checkpoint, or the folder of a run",
    "/template NAME": "how the conversation is written",
    "/think on|off": "whether the model thinks before it answers, where the template knows that",
    "/set": "the settings",
}
Load = Callable[[str], tuple[RWKV, Tokenizer]]


class Memory(NamedTuple):
    """What was said, the state after it (None: it must be read again), and tokens that the model has not seen yet."""

    said: tuple[Turn, ...] = ()
    state: State | None = None
    pending: tuple[int, ...] = ()


class Said(NamedTuple):
    """How an answer went. stopped: by Ctrl+C."""

    tokens: int
    seconds: float
    finished: bool
    stopped: bool


class Screen(Protocol):
    """Where answers are shown."""

    def begin(self, number: int) -> None:
        """Model `number` answers now."""

    def more(self, text: str) -> None:
        """More of its answer."""

    def end(self, number: int, said: Said, limit: int) -> None:
        """Its answer has ended; `limit` is /max."""

    def close(self) -> None:
        """All have answered, or the turn is given up."""


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl+C was pressed inside the block; a second one raises as ever."""
    pressed: list[int] = []

    def press(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


class Voice:
    """One model in a conversation."""

    def __init__(self, name: str, model: RWKV, tokenizer: Tokenizer) -> None:
        self.name, self.tokenizer = name, tokenizer
        self.sampler = Sampler(model, tokenizer)
        self.memory = Memory()
        self.before: deque[Memory] = deque(maxlen=KEPT)

    def say(
        self,
        text: str,
        template: Template,
        params: SamplingParams,
        *,
        seed: int,
        think: bool,
        show: Callable[[str], None],
        stopped: Callable[[], bool],
    ) -> Said:
        """One turn of the user, and the answer. What was answered when it is stopped stays in the conversation."""
        was = self.memory
        turns = [Turn("user", text)]
        again = was.state is None or template.whole_conversation  # it cannot write one turn alone
        asked = [*was.said, *turns] if again else turns
        cue = template.prompt(asked, () if think else ("",))
        prompt = [] if again else [*was.pending]
        prompt += template.ids(cue, self.tokenizer)
        stream = AnswerStream(cue, params, self.tokenizer, bare=not template.assistant)

        def hear(sample: int, so_far: Completion) -> bool:
            show(stream.add(so_far.tokens[-1]))
            return not stopped()

        begun = time.perf_counter()
        one = self.sampler.generate(
            [prompt], params, seeds=[seed], state=None if again else was.state, keep_state=True, hear=hear
        )[0]
        show(stream.end())
        answer = after_cue(cue, one.text).strip()
        pending = one.tokens[-1:] + ([] if one.finished else template.ids(template.end, self.tokenizer))
        self.before.append(was)
        self.memory = Memory((*was.said, *turns, Turn("assistant", answer)), one.state, tuple(pending))
        return Said(len(one.tokens), time.perf_counter() - begun, one.finished, stopped())

    def undo(self) -> str:
        """Forgets the last turn and its answer; gives the turn's text. Raises ValueError when there is none."""
        said = self.memory.said
        if len(said) < 2 or said[-1].role != "assistant" or said[-2].role != "user":
            raise ValueError("there is no turn to take back")
        known = self.before.pop() if self.before else None
        same = known is not None and known.said == said[:-2]
        self.memory = known if known is not None and same else Memory(said[:-2])
        return said[-2].text

    def read_again(self, said: Sequence[Turn]) -> None:
        """The conversation is now `said`, to be read with the next turn."""
        self.memory = Memory(tuple(said))
        self.before.clear()

    def save_state(self, path: str) -> None:
        """Writes what the model remembers. Raises ValueError when that is nothing yet."""
        if self.memory.state is None:
            raise ValueError("there is no state yet: say something first")
        said = json.dumps([self.memory.said, self.memory.pending]).encode()
        tensors = {f"state.{n}": tensor for n, tensor in enumerate(self.memory.state.tensors())}
        write_tensors(tensors | {TALK: torch.tensor([*said], dtype=torch.uint8)}, path)

    def load_state(self, path: str) -> None:
        """The inverse of `save_state`. Raises ValueError for a file that is none, or of another model's size."""
        found = dict(read_tensors(path))
        if TALK not in found:
            raise ValueError(f"{path} is not a state of a conversation, which /state save writes")
        known = self.sampler.model.initial_state(1).tensors()
        tensors = [found.get(f"state.{n}") for n in range(len(known))]
        if len(found) != len(known) + 1 or any(
            mine is None or mine.shape != its.shape for mine, its in zip(tensors, known)
        ):
            raise ValueError(f"{path} is the state of a model of another size")
        said, pending = json.loads(bytes(found[TALK].tolist()))
        state = State.from_tensors([mine.to(its) for mine, its in zip(tensors, known) if mine is not None])
        self.memory = Memory(tuple(Turn(*turn) for turn in said), state, tuple(pending))
        self.before.clear()


class Talk:
    """The conversation of a person with one voice or two.

    template, params: as the flags say, until a command changes them. load: opens the model behind a path.
    """

    def __init__(
        self,
        template: str,
        params: SamplingParams,
        voices: Sequence[Voice],
        screen: Screen,
        load: Load,
        about: str = "",
    ) -> None:
        self.voices, self.screen, self.load, self.about = [*voices], screen, load, about
        self.params, self.think, self.turns = params, True, 0
        self.template_name, self.template = template, find_templates(template)[0].template

    def say(self, text: str) -> None:
        """One turn of the user, and the answers."""
        self.turns += 1
        was = [voice.memory for voice in self.voices]
        try:
            with stoppable() as stopped:
                for number, voice in enumerate(self.voices):
                    self._answer(number, voice, text, stopped)
        except BaseException:  # the turn is forgotten, by all
            for voice, memory in zip(self.voices, was, strict=True):
                voice.memory = memory
            raise
        finally:
            self.screen.close()

    def _answer(self, number: int, voice: Voice, text: str, stopped: Callable[[], bool]) -> None:
        self.screen.begin(number)
        said = voice.say(
            text,
            self.template,
            self.params,
            seed=self.params.seed + self.turns,
            think=self.think,
            show=self.screen.more,
            stopped=stopped,
        )
        self.screen.end(number, said, self.params.max_tokens)

    def command(self, line: str) -> str | None:
        """A line that begins with a slash: what there is to tell, None to leave. Raises ValueError."""
        word, _, value = line.partition(" ")
        value = value.strip()
        if word == "/quit":
            return None
        if (name := SHORT.get(word, word[1:])) in option_types():
            return self.option(name, number(word, value, option_types()[name]), word)
        doing = {
            "/system": self.system,
            "/retry": self.retry,
            "/undo": self.undo,
            "/reset": self.reset,
            "/save": self.save,
            "/load": self.load_file,
            "/state": self.state,
            "/model": self.model,
            "/template": self.use_template,
            "/think": self.thinking,
            "/set": lambda _: self.settings(),
            "/help": lambda _: help_text(),
        }
        if word not in doing:
            known = [*doing, *SHORT, *(f"/{name}" for name in option_types()), "/quit"]
            near = difflib.get_close_matches(word, known, 1, cutoff=0.75)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"there is no command {word}{meant} (/help lists them)")
        return doing[word](value)

    def option(self, name: str, value: Any, word: str) -> str:
        """A setting of sampling, which `word` changes."""
        typed: dict[str, Any] = {name: value}
        try:
            self.params = dataclasses.replace(self.params, **typed)
        except ValueError as mistake:
            raise ValueError(str(mistake).replace(f"--{name}", word)) from mistake
        return f"{name} {getattr(self.params, name):g}\n"

    def reset(self, _: str) -> str:
        """Forget everything but the system text."""
        for voice in self.voices:
            voice.read_again([turn for turn in voice.memory.said if turn.role == "system"])
        told = any(voice.memory.said for voice in self.voices)
        return f"the conversation is forgotten{', the system text stays' if told else ''}\n"

    def system(self, text: str) -> str:
        """The system text; the conversation is read again."""
        for voice in self.voices:
            rest = [turn for turn in voice.memory.said if turn.role != "system"]
            voice.read_again([Turn("system", normalise(text)), *rest] if text else rest)
        return "the system text is set\n" if text else "there is no system text now\n"

    def undo(self, _: str) -> str:
        """Take the last turn back."""
        texts = [voice.undo() for voice in self.voices]
        return f"taken back: {texts[0][:60]}\n"

    def retry(self, _: str) -> str:
        """Another answer to the last turn."""
        texts = [voice.undo() for voice in self.voices]
        self.say(texts[0])
        return ""

    def save(self, path: str) -> str:
        """The conversation as a line of JSON, one for each model."""
        named(path, "/save")
        lines = [json.dumps(stable_form(Chat(voice.memory.said)), ensure_ascii=False) for voice in self.voices]
        with atomic_write(path) as file:
            file.write("".join(f"{line}\n" for line in lines).encode(errors="replace"))
        return f"saved: {path}\n"

    def load_file(self, path: str) -> str:
        """A conversation of a file; with two models, a line for each, or the same one for both."""
        named(path, "/load")
        items = [found.item for found in read_items(path, DataReport(path), ("text",))]
        chats = [item.turns for item in items if not isinstance(item, Document)]
        if not chats:
            raise ValueError(f"{path} holds no conversation")
        for number, voice in enumerate(self.voices):
            voice.read_again(chats[number if len(chats) == len(self.voices) else 0])
        return f"{counted(len(chats[0]), 'turn')} loaded, to be read with the next one\n"

    def state(self, value: str) -> str:
        """/state save FILE, /state load FILE."""
        doing, _, path = value.partition(" ")
        if doing not in ("save", "load") or not path or len(self.voices) > 1:
            raise ValueError("/state save FILE.safetensors, or /state load FILE.safetensors, with one model")
        (voice,) = self.voices
        (voice.save_state if doing == "save" else voice.load_state)(path.strip())
        return f"{'saved' if doing == 'save' else 'loaded'}: {path.strip()}\n"

    def model(self, path: str) -> str:
        """Another model in place of the first; it reads the conversation with the next turn."""
        named(path, "/model")
        voice = Voice(Path(path).stem, *self.load(path))
        voice.read_again(self.voices[0].memory.said)
        self.voices[0] = voice
        return f"{voice.name} listens now\n"

    def use_template(self, name: str) -> str:
        """Another template; the conversation is read again."""
        try:
            self.template, self.template_name = find_templates(name)[0].template, name
        except ValueError as mistake:
            raise ValueError(str(mistake).replace("--template", "/template")) from mistake
        self.params = dataclasses.replace(self.params, stop_texts=self.template.stop_texts)
        for voice in self.voices:
            voice.read_again(voice.memory.said)
        return f"template {name}; the conversation is read again with the next turn\n"

    def thinking(self, value: str) -> str:
        """Whether the model thinks before it answers."""
        if value not in ("on", "off"):
            raise ValueError("/think on, or /think off")
        turn = (Turn("user", "?"),)
        if self.template.prompt(turn, ("",)) == self.template.prompt(turn, ("<think>",)):
            raise ValueError(f"the template {self.template_name} has no form for thinking")
        self.think = value == "on"
        return f"thinking before an answer: {value}\n"

    def settings(self) -> str:
        """What decides the answers."""
        values = ", ".join(f"{field.name} {getattr(self.params, field.name):g}" for field in options())
        names = " and ".join(voice.name for voice in self.voices)
        return f"{names}{self.about}, template {self.template_name}\n{values}\n"


def named(path: str, word: str) -> None:
    """Raises ValueError where a command has no file."""
    if not path:
        raise ValueError(f"{word} needs the name of a file")


def number(word: str, text: str, kind: type) -> Any:
    """What is typed behind a command; ValueError, in a sentence, for what is no number."""
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{word} {text!r}: expected {TYPE_WORDS[kind]}") from None


def help_text() -> str:
    """The commands of a conversation."""
    short = {name: word for word, name in SHORT.items()}
    lines = dict(COMMANDS)
    lines |= {f"{short.get(o.name, f'/{o.name}')} X": o.metadata["help"] for o in options()}
    lines |= {"/help": "this list", "/quit": "leave (also Ctrl+D)"}
    return "".join(f"{word:18}{text}\n" for word, text in lines.items())
