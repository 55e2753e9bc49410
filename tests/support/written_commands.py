"""The commands that the pages and the examples show, as a reader would copy them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support.source_files import PAGES, SHELL, name_of

PYTHON = r"\s*(?:[A-Z_]+=\S+ )*[\"']?(?:\S*python3?|\$\{?\w+\}?)[\"']? "
WRITTEN = re.compile(PYTHON + r"(?:-m rwkv_rlhf (\w+)|(\S+)\.py)\b(.*)|\s*rwkv-rlhf (\w+)\b(.*)")


class Written(NamedTuple):
    """A command as somebody wrote it: `words` are those behind its name, with the shell's variables filled in."""

    place: str
    name: str
    words: list[str]


def written_in(path: Path) -> Iterator[Written]:
    """Each command in a shell file or in a page's blocks of code."""
    lines = path.read_text(encoding="utf-8").splitlines()
    inside, at, variables = path.suffix == ".sh", 0, variables_of(path)
    while at < len(lines):
        line, first = lines[at], at + 1
        at += 1
        if path.suffix == ".md" and line.lstrip().startswith("```"):
            inside = not inside
            continue
        while line.endswith("\\") and at < len(lines):
            line, at = line[:-1] + " " + lines[at], at + 1
        if inside and (match := WRITTEN.match(line)):
            name, text = match[1] or match[2] or match[4], match[3] or match[5] or ""
            yield Written(f"{name_of(path)}:{first}", name, words_of(text, variables))


def variables_of(path: Path) -> dict[str, str]:
    """Shell variables that a file sets, with the default where one is taken from an argument."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", path.read_text(encoding="utf-8"))
    found: dict[str, str] = {}
    for name, value in re.findall(r"^\s*(?:export )?(\w+)=[\"']?([^\"'\s]*)", text, re.M):
        found.setdefault(name, filled(value, found))
    return found


def filled(text: str, variables: dict[str, str]) -> str:
    """`text` with shell variables filled in, 1 where unknown."""
    return re.sub(r"\$\{?(\w+|@)\}?", lambda m: variables.get(m[1], "" if m[1] == "@" else "1"), text)


def words_of(text: str, variables: dict[str, str]) -> list[str]:
    """The words behind a command's name, up to a pipe or a redirection."""
    plain = filled(text, variables)
    words = shlex.split(re.split(r"\s(?:[|;]|&&|\d?>|<)", plain + " ")[0], comments=True)
    return [word for word in words if word]


WRITTEN_IN = {path: list(written_in(path)) for path in SHELL + PAGES}
