"""The project's own files, for the rules of tests/house/ and tests/runs/test_security.py."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "rwkv_rlhf"
SRC = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(path for path in ROOT.glob("*.py") if path.name != "setup.py")
TESTS = sorted((ROOT / "tests").rglob("*.py"))
OTHERS = sorted(path for top in ("example", "benchmarks") for path in (ROOT / top).rglob("*.py"))
OTHERS.append(ROOT / "setup.py")
NATIVE = sorted(path for path in (ROOT / "cuda").rglob("*") if path.suffix in (".cpp", ".cu", ".h", ".cuh"))
SHELL = sorted(path for top in ("example", "tests", ".ci") for path in (ROOT / top).rglob("*.sh"))
PAGES = sorted(path for top in ("example", "layerprofile", "docs") for path in (ROOT / top).rglob("*.md"))
PAGES += sorted(ROOT.glob("*.md"))


def name_of(path: Path) -> str:
    """The path from the project's root."""
    return str(path.relative_to(ROOT))


def room_of(path: Path) -> str:
    """The first part of a path inside of the package: a room, or a file that stands alone."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """The parsed file; nobody changes it."""
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """Everything in `tree_of(path)`."""
    return tuple(ast.walk(tree_of(path)))
