"""House rules, read from the source text: a broken one makes the next change harder, not this one wrong."""

import ast
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.command_line import kinds, parse, train_parser
from rwkv_rlhf.settings.config import settings
from rwkv_rlhf.settings.not_built import NOT_BUILT

ROOT = Path(__file__).resolve().parents[2]
SRC = sorted((ROOT / "src").rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
OTHERS = sorted(path for top in ("example", "benchmarks") for path in (ROOT / top).rglob("*.py"))
NATIVE = sorted(path for path in (ROOT / "cuda").rglob("*") if path.suffix in (".cpp", ".cu", ".h", ".cuh"))
SHELL = sorted(path for top in ("example", "tests", ".ci") for path in (ROOT / top).rglob("*.sh"))
PAGES = sorted(path for path in ROOT.glob("*.md")) + sorted((ROOT / "example").rglob("*.md"))

OUTPUT_FLAGS = ("--output", "--output_csv", "--output_save", "--proj_dir")
LONGEST_FILE = 400
LONGEST_FUNCTION = 80
SETTINGS = {"config", "laws", "unbuilt"}
# room -> the rooms of src/ that it may import, besides itself
MAY_IMPORT = {
    "flags": set(),
    "files": set(),
    "config": SETTINGS,
    "laws": SETTINGS,
    "unbuilt": SETTINGS,
    "plan": {"config", "files"},
    "ops": set(),
    "layers": {"plan"},
    "model": {"config", "files", "plan", "ops", "layers"},
    "losses": {"ops", "model"},
    "data": {"config", "files"},
    "rl": {*SETTINGS, "files", "plan", "ops", "layers", "model", "losses", "data"},
    "training": {*SETTINGS, "files", "plan", "ops", "layers", "model", "losses", "data", "rl"},
    "cli": {*SETTINGS, "flags"},
}
NO_TORCH = {"config", "laws", "unbuilt", "flags", "plan", "cli", "files"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "src").with_suffix("").parts[0]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=name_of)


def imported(tree: ast.Module) -> Iterator[str]:
    """Every module that the file imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield node.module
            if node.module == "src":
                yield from (f"src.{alias.name}" for alias in node.names)


@each(SRC + SCRIPTS + TESTS + OTHERS + NATIVE + SHELL)
def test_a_file_is_short(path):
    """A file that one cannot read at a sitting is split by meaning."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


@each(SRC + SCRIPTS)
def test_a_function_is_short(path):
    """A function does one thing."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"line {node.lineno}: {node.name}"


@each([path for path in SRC if path.parent != ROOT / "src" or path.name != "__init__.py"])
def test_imports_point_one_way(path):
    """A room below must not know a room above."""
    room = room_of(path)
    allowed = {room, *MAY_IMPORT[room]}
    for module in imported(tree_of(path)):
        parts = module.split(".")
        if parts[0] == "src" and len(parts) > 1:
            assert parts[1] in allowed, f"{room} imports {module}"
        assert room not in NO_TORCH or parts[0] not in ("torch", "pytorch_lightning"), f"{room} imports {module}"


@each([path for path in SRC if path.name != "launch.py"])  # which reads what torchrun and srun tell each process
def test_no_environment_variables(path):
    """What a run does is on its command line, not in variables that nobody sees."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr not in ("environ", "getenv", "putenv", "setdefault"), f"line {node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {"environ", "getenv"} & {alias.name for alias in node.names}, f"line {node.lineno}"


@each(SRC + SCRIPTS)
def test_no_conditional_definitions(path):
    """A class or function exists once, whatever the machine: one process can hold every version."""
    for node in tree_of(path).body:
        if isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.While):
            inside = [n for n in ast.walk(node) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
            assert not inside, f"line {inside[0].lineno}: {inside[0].name}"


@each(SRC + SCRIPTS + OTHERS + TESTS)
def test_no_bare_except(path):
    """A bare except hides Ctrl+C and the cause; an exception that is swallowed whole hides it too."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}"
            broad = isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            silent = all(isinstance(line, ast.Pass) for line in node.body)
            assert not (broad and silent), f"line {node.lineno}"


@each(SRC)
def test_no_print(path):
    """The library logs; what a script prints is its output."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"line {node.lineno}"


@each(SRC + SCRIPTS + TESTS + OTHERS + NATIVE + SHELL)
def test_ascii_and_no_place_of_one_machine(path):
    """Plain ASCII, and no path that exists on one machine only."""
    text = path.read_text(encoding="utf-8")
    assert text.isascii(), f"line {next(i for i, line in enumerate(text.splitlines(), 1) if not line.isascii())}"
    found = re.search(r"/(?:work|root|home)/\w", text)
    assert found is None, found


@each(SRC)
def test_names_say_what_is_inside(path):
    """`utils` grows without end."""
    assert not re.search(r"util|misc|helper|^new_|_v2", path.stem)


@each(SRC)
def test_public_functions_are_documented(path):
    """A caller reads shapes, units and errors at the definition, and the type of what comes back."""
    for node in tree_of(path).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"line {node.lineno}: {node.name} has no docstring"
            assert node.returns is not None, f"line {node.lineno}: {node.name} has no return type"
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"line {node.lineno}: class {node.name} has no docstring"
            for method in (n for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")):
                assert method.returns is not None, f"line {method.lineno}: {node.name}.{method.name} has no return type"


def flag_lines() -> list[str]:
    """Each flag with its type and default, as tests/flags.txt holds them."""
    fields = settings()
    types = {name: kind.__name__ for name, kind in kinds().items()}
    lines = []
    for flag in train_parser().known_flags():
        name = {"my_testing": "version", "rlhf_train_file": "pair_file"}.get(flag[2:], flag[2:])
        lines.append(f"{flag} {types[name]} {fields[name].default!r}" if name in fields else flag)
    return sorted(lines)


def test_the_command_line_is_frozen():
    """Others script against these flags. A new one is added to tests/flags.txt by hand; none goes away."""
    frozen = (ROOT / "tests" / "flags.txt").read_text(encoding="utf-8").splitlines()
    assert flag_lines() == frozen


def test_every_setting_is_read():
    """A flag that nobody reads is a silent no-op: it is read, refused as not built, or belongs to a missing loss."""
    readers = [path for path in SRC if room_of(path) not in (*SETTINGS, "flags", "cli")] + SCRIPTS
    read = {node.attr for path in readers for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)}
    read |= {
        node.value
        for path in readers
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Constant)
        if isinstance(node.value, str)
    }  # names in tables, for getattr
    config = tree_of(ROOT / "src" / "config.py")
    derived = {node.attr for node in ast.walk(config) if isinstance(node, ast.Attribute)}
    refused = {part.setting for part in NOT_BUILT}
    missing = {name for facts in tables.LOSSES.values() if not facts.implementation for name in facts.settings}
    companions = {"ds_bucket_mb", "svd_niter", "state_output_mode", "ctx_warmup_steps", "reward_model"}
    unread = set(settings()) - read - derived - refused - missing - companions - {"debug"}
    assert not unread


def commands(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, script and rest of each `python <script>.py ...` in a shell file or in a page's code blocks."""
    lines = path.read_text(encoding="utf-8").splitlines()
    inside, at = path.suffix == ".sh", 0
    while at < len(lines):
        line, first = lines[at], at + 1
        at += 1
        if path.suffix == ".md" and line.lstrip().startswith("```"):
            inside = not inside
            continue
        while line.endswith("\\") and at < len(lines):
            line, at = line[:-1] + " " + lines[at], at + 1
        python = r"\s*(?:[A-Z_]+=\S+ )*[\"']?(?:\S*python3?|\$\{?\w+\}?)[\"']? "
        if inside and (match := re.match(python + r"(\S+\.py)\b(.*)", line)):
            yield first, match[1], match[2]


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
    """The words behind a script's name, up to a pipe or a redirection."""
    plain = filled(text, variables)
    words = shlex.split(re.split(r"\s(?:[|;]|&&|\d?>|<)", plain + " ")[0], comments=True)
    return [word for word in words if word]


def parse_as(script: str, words: list[str]) -> None:
    """Parse `words` as `script` would. Raises ValueError, or SystemExit for --help."""
    if script == "train.py":
        if "..." in words:  # an excerpt: its flags exist, its laws cannot be judged
            train_parser().parse_args([word for word in words if word != "..."])
        else:
            parse(words, built=False)
        return
    module = importlib.import_module(script.removesuffix(".py"))
    module = sys.modules[module.main.__module__]  # a script may be another one under an older name
    if hasattr(module, "parser"):
        module.parser().parse_args(words)
    else:
        module.parse(words)


@each(SHELL + PAGES)
def test_every_written_command_parses(path):
    """A command in an example or a page that does not parse costs a newcomer the first hour."""
    variables = variables_of(path)
    found = list(commands(path))
    assert found or not (path.suffix == ".sh" and path.is_relative_to(ROOT / "example"))
    for line, script, text in found:
        assert (ROOT / script).is_file(), f"{name_of(path)}:{line}: there is no {script}"
        if "/" in script:  # a piece of an example, with arguments of its own
            continue
        try:
            parse_as(script, words_of(text, variables))
        except ValueError as mistake:
            pytest.fail(f"{name_of(path)}:{line}: {script}: {mistake}")
        except SystemExit as done:
            assert done.code == 0


def paths_in(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Line, path, and whether it is written, of each path under example/ or layerprofile/ in the commands of a file."""
    variables = variables_of(path)
    for line, _, text in commands(path):
        words = words_of(text, variables)
        for flag, word in zip(["", *words], words):
            if word.startswith(("example/", "layerprofile/")):
                yield line, word, flag in OUTPUT_FLAGS


@each(SHELL + PAGES)
def test_inputs_of_written_commands_exist(path):
    """A command that reads a file which nobody wrote ends in an error, however well it parses."""
    before = [other for other in SHELL if other.parent == path.parent and (path.suffix == ".md" or other < path)]
    made = {word for other in before for _, word, written in paths_in(other) if written}
    for line, word, written in paths_in(path):
        if written:
            made.add(word)
        else:
            assert word in made or (ROOT / word).exists(), f"{name_of(path)}:{line}: there is no {word}"


def test_every_command_is_shown_somewhere():
    """A command that no page and no example shows is one that nobody finds, and that nothing here parses."""
    shown = {script for path in SHELL + PAGES for _, script, _ in commands(path)}
    modules = {path.name: importlib.import_module(path.stem) for path in SCRIPTS}
    own = {name for name, module in modules.items() if module.main.__module__ in (module.__name__, "__main__")}
    assert own <= shown
