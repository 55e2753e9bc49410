"""The blocks of code in docs/extending.md: read, and put into the running program as a reader would put them into the
sources.

A block of python begins with the path of the new file that it is. A block of diff changes one file: its lines must be
found there. Nothing is written: new files become modules, changed functions and classes take the place of the old ones
wherever these were imported, and new items of tables join the tables. monkeypatch takes everything back.
"""

import ast
import importlib
import importlib.util
import pkgutil
import re
import sys
import types
from typing import NamedTuple

import rwkv_rlhf
from tests.support.source_files import ROOT

PAGE = ROOT / "docs" / "extending.md"
# files that import a package at once, which may not be installed
OPTIONAL = {"rwkv_rlhf.tasks.harness": "lm_eval", "rwkv_rlhf.reports.tensorboard_log": "tensorboard"}
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A block of code: `kind` is python (a new file) or diff, `path` is from the project's root."""

    kind: str
    path: str
    text: str


def recipes():
    """Heading -> blocks, in the page's order."""
    found = {}
    for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        heading = part.split("\n", 1)[0].strip()
        found[heading] = [block_of(kind, text) for kind, text in FENCE.findall(part) if kind in ("python", "diff")]
    return {heading: blocks for heading, blocks in found.items() if blocks}


def block_of(kind, text):
    if kind == "python":
        return Block(kind, re.match(r"# (\S+\.py)\n", text)[1], text)
    return Block(kind, re.match(r"--- a/\S+\n\+\+\+ b/(\S+)\n", text)[1], text)


def patched(before, diff):
    """The text `before` with every hunk of a diff applied; each must fit in exactly one place."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
        lines = [(line[:1] or " ", line[1:]) for line in hunk.splitlines()]
        old = "".join(f"{text}\n" for sign, text in lines if sign != "+")
        new = "".join(f"{text}\n" for sign, text in lines if sign != "-")
        assert before.count(old) == 1, f"{before.count(old)} places fit\n{old}"
        before = before.replace(old, new)
    return before


def write(blocks, root):
    """Put the blocks into the files of a copy of the project."""
    for kind, path, text in blocks:
        target = root / path
        target.write_text(text if kind == "python" else patched(target.read_text(), text))


def follow(blocks, monkeypatch):
    """Put the blocks into the running program."""
    for about in pkgutil.walk_packages(rwkv_rlhf.__path__, "rwkv_rlhf."):
        needs = OPTIONAL.get(about.name)
        if not about.name.endswith("__main__") and (needs is None or importlib.util.find_spec(needs)):
            importlib.import_module(about.name)  # what is imported later would keep what is added here
    for kind, path, text in blocks:
        name = path.removeprefix("src/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if kind == "python":
            assert not (ROOT / path).exists(), f"{path} is there already"
            module = types.ModuleType(name)
            monkeypatch.setitem(sys.modules, name, module)
            exec(compile(text, path, "exec"), vars(module))
        else:
            change(sys.modules[name], (ROOT / path).read_text(), text, path, monkeypatch)


def change(module, before, diff, path, monkeypatch):
    """Run the top-level statements of `module` that a diff changes."""
    known = {ast.dump(node) for node in ast.parse(before).body}
    for node in ast.parse(patched(before, diff)).body:
        if ast.dump(node) in known:
            continue
        names = [node.name] if hasattr(node, "name") else [ast.unparse(target) for target in targets_of(node)]
        old = {name: getattr(module, name, None) for name in names}
        exec(compile(ast.Module([node], []), path, "exec"), vars(module))
        for name, was in old.items():
            new = getattr(module, name)
            setattr(module, name, was)
            if isinstance(was, dict):
                for key in new.keys() - was.keys():
                    monkeypatch.setitem(was, key, new[key])
            else:
                replace_everywhere(was, new, monkeypatch)
                monkeypatch.setattr(module, name, new)


def targets_of(node):
    return node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []


def replace_everywhere(old, new, monkeypatch):
    """Every name in the package that means `old` means `new`."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "rwkv_rlhf":
            for key, value in list(vars(module).items()):
                if value is old and old is not None:
                    monkeypatch.setattr(module, key, new)
