"""Hooks of mkdocs: the page of messages is made from the sources, and names of pages become links."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "rwkv_rlhf"
NAME = "messages"  # of the page
SENTENCE = 4  # words: shorter texts are names
HEAD = """\
# Messages

Every sentence with which the program refuses something, by the file that says it. `…` stands for a value, `{name}` for
the flag of that setting. What to do about the most frequent ones: [Troubleshooting](troubleshooting.md).
"""


def spelled(node: ast.expr) -> str:
    """The text of a literal, with `…` for what is filled in."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(spelled(part) if isinstance(part, ast.Constant) else "…" for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return spelled(left) + spelled(right)
    return "…"


def sentences(path: Path) -> list[str]:
    """What a file says when it refuses: the texts of exceptions and of constraints, in order, each once."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name.endswith(("Error", "Loss", "Memory")) or name in (
                "wrong",
                "Damaged",
                "Constraint",
                "Mismatch",
                "warning",
            ):
                texts = [" ".join(spelled(one).split()) for one in node.args]
                found += [text for text in texts if len(text.split()) >= SENTENCE]
    return list(dict.fromkeys(found))


def messages() -> Iterator[str]:
    """The lines of the page."""
    yield HEAD
    for path in sorted(PACKAGE.rglob("*.py")):
        if said := sentences(path):
            yield f"\n## {path.relative_to(PACKAGE)}\n"
            yield from (f"- `` {text} ``" for text in said)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The page of messages joins those that lie in docs/."""
    files.append(File.generated(config, NAME + ".md", content="\n".join(messages()) + "\n"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """`docs/data.md` in a text is a link."""
    return re.sub(r"(?<![\w/`])`docs/([\w-]+\.md)`", r"[\1](\1)", markdown)
