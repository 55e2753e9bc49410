"""The commands on the pages and in the examples are commands of this program: what a reader copies must work."""

import importlib
from collections.abc import Iterator

from rwkv_rlhf.commands import COMMANDS, NAMED
from rwkv_rlhf.settings.command_line import parse, train_parser
from tests.support.source_files import PAGES, ROOT, SHELL
from tests.support.written_commands import WRITTEN_IN, Written

OUTPUT_FLAGS = ("--output", "--output_csv", "--output_save", "--proj_dir")


def mistake(command: Written) -> str:
    """What its parser says of a command, or ""."""
    if "/" in command.name:  # a piece of an example, with arguments of its own
        return "" if (ROOT / f"{command.name}.py").is_file() else "there is no such file"
    if command.name not in NAMED:
        return "there is no such command"
    try:
        if NAMED[command.name] != "train":
            module = importlib.import_module(f"rwkv_rlhf.commands.{NAMED[command.name]}")
            (getattr(module, "parse", None) or module.parser().parse_args)(command.words)
        elif "..." in command.words:  # an excerpt: its flags exist, its constraints cannot be judged
            train_parser().parse_args([word for word in command.words if word != "..."])
        else:
            parse(command.words)
    except ValueError as error:
        return str(error)
    except SystemExit as done:  # --help
        return "" if done.code == 0 else f"status {done.code}"
    return ""


def test_the_pages_were_read():
    """If this breaks, the tests below look at nothing."""
    found = [command for path in PAGES for command in WRITTEN_IN[path]]
    assert len(found) >= 40 and {"train", "merge", "chat", "make_binidx"} <= {command.name for command in found}
    silent = [path for path in SHELL if path.is_relative_to(ROOT / "example") and not WRITTEN_IN[path]]
    assert not silent


def test_every_written_command_parses():
    """A command in an example or a page that does not parse costs a newcomer the first hour."""
    found = [(command, mistake(command)) for commands in WRITTEN_IN.values() for command in commands]
    wrong = [f"{command.place}: {command.name}: {text}" for command, text in found if text]
    assert not wrong, "\n" + "\n".join(wrong)


def paths_in(commands: list[Written]) -> Iterator[tuple[str, str, bool]]:
    """Place, path, and whether it is written, of each path under example/ or layerprofile/ in commands."""
    for command in commands:
        for flag, word in zip(["", *command.words], command.words):
            if ".py:" in word:  # functions of a file
                word = word.partition(":")[0]
            if word.startswith(("example/", "layerprofile/")):
                yield command.place, word, flag in OUTPUT_FLAGS


def test_inputs_of_written_commands_exist():
    """A command that reads a file which nobody wrote ends in an error, however well it parses."""
    absent = []
    for path, commands in WRITTEN_IN.items():
        before = [other for other in SHELL if other.parent == path.parent and (path.suffix == ".md" or other < path)]
        made = {word for other in before for _, word, written in paths_in(WRITTEN_IN[other]) if written}
        for place, word, written in paths_in(commands):
            if written:
                made.add(word)
            elif word not in made and not (ROOT / word).exists():
                absent.append(f"{place}: there is no {word}")
    assert not absent, "\n" + "\n".join(absent)


def test_every_command_is_shown_somewhere():
    """A command that no page and no example shows is one that nobody finds, and that nothing here parses."""
    shown = {NAMED[command.name] for commands in WRITTEN_IN.values() for command in commands if command.name in NAMED}
    assert shown == COMMANDS.keys()
