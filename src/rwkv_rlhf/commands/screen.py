"""The terminal of a conversation: lines that are typed, with history where there is a terminal, and answers."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rwkv_rlhf.commands.conversation import Said, Screen
from rwkv_rlhf.settings.counted import counted

NARROW = 80  # columns below which two answers stand one below the other
ReadLine = Callable[[], str]


def line_reader(history: str, words: Sequence[str]) -> ReadLine:
    """What asks for the next line, which may be several: of prompt_toolkit on a terminal where it is installed.

    history: the file that keeps what was typed, "" for none. words: that are completed. EOFError at the end.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return typed_line
    if importlib.util.find_spec("prompt_toolkit") is None:
        if importlib.util.find_spec("readline") is not None:
            importlib.import_module("readline")  # gives input() its line editing
        return typed_line
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    kept: History = FileHistory(history) if history else InMemoryHistory()
    completer = WordCompleter(list(words), sentence=True)
    session: PromptSession[str] = PromptSession(
        history=kept, key_bindings=keys, completer=completer, complete_while_typing=False
    )
    return lambda: session.prompt("> ")


def typed_line() -> str:
    """A line of the input; one that ends with a backslash goes on in the next."""
    lines = [input("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(". "))
    return "\n".join(lines)


def remark(said: Said, limit: int) -> str:
    """What is to be said of an answer, in lines."""
    cut = "" if said.finished else "(stopped)\n" if said.stopped else f"(cut at /max {limit})\n"
    return f"{cut}({counted(said.tokens, 'token')}, {said.tokens / max(said.seconds, 1e-9):.1f} tokens/s)\n"


class Lines:
    """Answers as they come, one below the other; with several models each under its name."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def begin(self, number: int) -> None:
        """As `Screen.begin`."""
        if len(self.names) > 1:
            sys.stdout.write(f"[{self.names[number]}]\n")

    def more(self, text: str) -> None:
        """As `Screen.more`."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def end(self, number: int, said: Said, limit: int) -> None:
        """As `Screen.end`."""
        sys.stdout.write(f"\n{remark(said, limit)}\n")
        sys.stdout.flush()

    def close(self) -> None:
        """As `Screen.close`."""


class Columns:
    """Two answers side by side."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.texts = names, [""] * len(names)
        self.number = 0
        self.live = Live(console=Console(), refresh_per_second=8)

    def _table(self) -> Table:
        table = Table(expand=True)
        for name in self.names:
            table.add_column(Text(name), ratio=1)
        table.add_row(*(Text(text) for text in self.texts))
        return table

    def begin(self, number: int) -> None:
        """As `Screen.begin`."""
        self.number = number
        if number == 0:
            self.texts = [""] * len(self.names)
            self.live.start()

    def more(self, text: str) -> None:
        """As `Screen.more`."""
        self.texts[self.number] += text
        self.live.update(self._table())

    def end(self, number: int, said: Said, limit: int) -> None:
        """As `Screen.end`."""
        self.more(f"\n{remark(said, limit)}")

    def close(self) -> None:
        """As `Screen.close`."""
        self.live.stop()


def screen_of(names: Sequence[str]) -> Screen:
    """Columns for two models on a terminal that is wide enough, else lines."""
    wide = sys.stdout.isatty() and shutil.get_terminal_size().columns >= NARROW
    return Columns(names) if len(names) > 1 and wide else Lines(names)


def check_history(path: str) -> None:
    """Raises ValueError where the history could not be kept."""
    if path and not Path(path).parent.is_dir():
        raise ValueError(f"--history {path}: there is no folder {Path(path).parent}")
