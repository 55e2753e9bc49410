"""The commands on the pages are commands of this program: what a reader copies must not end in "unknown flag"."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from rwkv_rlhf.settings import command_line as cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "layerprofile" / "README.md", *sorted((ROOT / "example").rglob("README.md"))]
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^python (\S+)\.py (.*)$", re.MULTILINE)


def commands():
    """(page, script, words) of each command in a block of code; those that leave something out ("...") are none."""
    for page in PAGES:
        for block in BLOCK.findall(page.read_text(encoding="utf-8")):
            for script, words in COMMAND.findall(block.replace("\\\n", " ")):
                if "..." not in words and "/" not in script:
                    yield pytest.param(script, shlex.split(words), id=f"{page.parent.name}-{script}-{words[:60]}")


FOUND = list(commands())


def test_the_pages_were_read():
    assert len(FOUND) > 30 and {"train", "merge", "chat", "make_binidx"} <= {case.values[0] for case in FOUND}


@pytest.mark.parametrize(("script", "words"), FOUND)
def test_a_command_on_a_page_is_understood(script, words):
    """If this breaks, a newcomer's first command ends in a usage error."""
    if script == "train":
        cli.parse(words)
        return
    module = importlib.import_module(script)
    parse = getattr(module, "parse", None) or module.parser().parse_args
    parse(words)


@pytest.mark.parametrize(("script", "words"), FOUND)
def test_files_that_a_command_reads_are_there(script, words):
    """If this breaks, a page names a file that the project does not ship."""
    for word in words:
        if word.startswith(("example/", "layerprofile/")) and "/output_" not in word:
            assert (ROOT / word).exists(), word
