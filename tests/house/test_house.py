"""House rules, read from the source text: a broken one makes the next change harder, not this one wrong.

One test a rule. It looks at every file and lists every place that breaks it.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from rwkv_rlhf.settings.command_line import kinds, train_parser
from rwkv_rlhf.settings.config import settings
from rwkv_rlhf.settings.field import OnResume
from tests.support.source_files import (
    NATIVE,
    OTHERS,
    PACKAGE,
    ROOT,
    SCRIPTS,
    SHELL,
    SRC,
    TESTS,
    name_of,
    nodes_of,
    room_of,
    tree_of,
)

LONGEST_FILE = 500
LONGEST_FUNCTION = 80
# each may import those before it; those on one line do not know each other
ORDER = (
    ("files", "precision", "host_cores", "host_memory", "transfers"),
    ("settings",),
    ("plan",),
    ("distributed",),
    ("ops",),
    ("layers",),
    ("model",),
    ("checkpoints",),
    ("data",),
    ("losses",),
    ("scoring",),
    ("generation",),
    ("tasks",),
    ("serving",),
    ("rl",),
    ("reports",),
    ("training",),
    ("commands",),
)
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}
NO_TORCH = {"files", "host_cores", "settings", "plan"}  # so that --help and a typing error do not wait for torch
SAME = OnResume.SAME
DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def none(broken: Iterable[tuple[Path, int, str]]) -> None:
    """Fails with every place where a rule is broken."""
    lines = [f"{name_of(path)}:{line}: {text}" for path, line, text in broken]
    assert not lines, "\n" + "\n".join(lines)


def is_kernel(node: ast.AST) -> bool:
    """Whether a function is compiled by Triton: it runs on a device, and its values have no Python types."""
    return "triton.jit" in [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]


def walk(*groups: list[Path]) -> Iterator[tuple[Path, ast.AST]]:
    """Every node of every file."""
    for group in groups:
        for path in group:
            yield from ((path, node) for node in nodes_of(path))


def imported(node: ast.AST) -> list[str]:
    """The modules that an import statement names; `from a import b` names a and a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def test_files_are_short():
    """A file that one cannot read at a sitting is split by meaning."""
    lengths = (
        (path, len(path.read_text().splitlines())) for path in (*SRC, *SCRIPTS, *TESTS, *OTHERS, *NATIVE, *SHELL)
    )
    none((path, length, "too long") for path, length in lengths if length > LONGEST_FILE)


def test_functions_are_short():
    """A function does one thing."""
    none(
        (path, node.lineno, f"{node.name} has {node.end_lineno - node.lineno + 1} lines")
        for path, node in walk(SRC, SCRIPTS)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_kernel(node)
        if node.end_lineno - node.lineno >= LONGEST_FUNCTION
    )


def test_every_room_has_its_place_in_the_order():
    """A room that the order does not know could import anything."""
    assert {room_of(path) for path in SRC} - {"__init__", "__main__"} == FLOOR.keys()


def test_imports_point_one_way():
    """A room below must not know a room above."""

    def broken() -> Iterator[tuple[Path, int, str]]:
        for path, node in walk(SRC):
            room = room_of(path)
            if isinstance(node, ast.ImportFrom) and node.level:
                yield path, node.lineno, "relative import"
            for module in imported(node):
                package, _, rest = module.partition(".")
                other = rest.split(".")[0]
                known = package == "rwkv_rlhf" and room in FLOOR and other in FLOOR
                if known and other != room and FLOOR[other] >= FLOOR[room]:
                    yield path, node.lineno, f"{room} imports {module}"
                if room in NO_TORCH and package in ("torch", "pytorch_lightning"):
                    yield path, node.lineno, f"{room} imports {module}"

    none(broken())


def edges() -> dict[str, set[str]]:
    """The files of the package that each file imports, by module name; `from package import file` is about the file."""
    paths = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in SRC}
    modules = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    found: dict[str, set[str]] = {module: set() for module in modules}
    for module, path in modules.items():
        for node in nodes_of(path):
            if isinstance(node, ast.ImportFrom):
                inside = [f"{node.module}.{alias.name}" for alias in node.names]
                found[module].update(name if name in modules else str(node.module) for name in inside)
            else:
                found[module].update(imported(node))
    return {module: asked & modules.keys() for module, asked in found.items()}


def test_no_circle_between_two_files():
    """Two files that need each other are one file in two pieces: neither can be read, tested or moved alone."""
    asked = edges()

    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            for name in asked[waiting.pop()] - seen:
                seen.add(name)
                waiting.append(name)
        return seen

    circles = [module for module in asked if module in reached(module)]
    assert not circles, "\n".join(f"{module} reaches itself" for module in circles)


def test_no_test_imports_a_test():
    """Shared things live in tests/support; a test that leans on another cannot be moved or run by itself."""
    none(
        (path, node.lineno, module)
        for path, node in walk(TESTS)
        for module in imported(node)
        if module == "conftest" or (module.startswith("tests.") and re.search(r"\.(test_\w+|conftest)$", module))
    )


def test_every_test_folder_names_a_room():
    """Who changes a room finds its tests in the folder of the same name."""
    folders = {path.parent.relative_to(ROOT / "tests") for path in TESTS if path.name.startswith("test_")}
    strange = {folder for folder in folders - {Path("house"), Path("runs")} if not (PACKAGE / folder).is_dir()}
    assert not strange, sorted(map(str, strange))


def test_tests_say_what_they_guard():
    """Who sees a test fail must learn from it what is broken for a user, and whether it may be changed."""
    none(
        (path, node.lineno, f"{node.name} has no docstring")
        for path, node in walk(TESTS)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and not ast.get_docstring(node)
    )


def test_programs_are_files():
    """A program in a string is neither linted nor found by who renames what it uses."""

    def program(text: str) -> bool:
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            return False
        return len(tree.body) > 2 and any(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body)

    none(
        (path, node.lineno, "a program in a string")
        for path, node in walk(SRC, SCRIPTS, OTHERS, TESTS)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and program(node.value)
    )


def test_no_environment_variables():
    """What a run does is on its command line, not in variables that nobody sees.

    The exceptions: a launcher's own, and what is inherited and must do nothing.
    """
    exceptions = {PACKAGE / "distributed" / "launch.py", PACKAGE / "settings" / "surroundings.py"}

    def broken() -> Iterator[tuple[Path, int, str]]:
        for path, node in walk([path for path in SRC if path not in exceptions]):
            names = [ast.unparse(node)] if isinstance(node, ast.Attribute) else imported(node)
            for name in {f"os.{word}" for word in ("environ", "environb", "getenv", "putenv")}.intersection(names):
                yield path, node.lineno, name

    none(broken())


def test_no_conditional_definitions():
    """A class or function exists once, whatever the machine: one process can hold every version."""
    none(
        (path, inside.lineno, inside.name)
        for path in (*SRC, *SCRIPTS)
        for node in tree_of(path).body
        if isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.While)
        for inside in ast.walk(node)
        if isinstance(inside, DEFINITIONS)
    )


def test_no_bare_except():
    """A bare except hides Ctrl+C and the cause; an exception that is swallowed whole hides it too."""

    def broken() -> Iterator[tuple[Path, int, str]]:
        for path, node in walk(SRC, SCRIPTS, OTHERS, TESTS):
            if isinstance(node, ast.ExceptHandler):
                broad = isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
                if node.type is None:
                    yield path, node.lineno, "bare except"
                elif broad and all(isinstance(line, ast.Pass) for line in node.body):
                    yield path, node.lineno, "an exception is swallowed"

    none(broken())


def test_no_print():
    """The library logs; what a command prints is its output."""
    none(
        (path, node.lineno, "print")
        for path, node in walk([path for path in SRC if room_of(path) != "commands"])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    )


def test_ascii_and_no_place_of_one_machine():
    """Plain ASCII, and no path that exists on one machine only."""

    def broken() -> Iterator[tuple[Path, int, str]]:
        for path in (*SRC, *SCRIPTS, *TESTS, *OTHERS, *NATIVE, *SHELL):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if not line.isascii():
                    yield path, number, "not ASCII"
                if re.search(r"/(?:work|root|home)/\w", line):
                    yield path, number, "a path of one machine"

    none(broken())


def test_names_say_what_is_inside():
    """`utils` grows without end."""
    none((path, 1, path.stem) for path in SRC if re.search(r"util|misc|helper|^new_|_v2", path.stem))


def test_public_functions_are_documented():
    """A caller reads shapes, units and errors at the definition, and the type of what comes back."""

    def broken() -> Iterator[tuple[Path, int, str]]:
        for path in SRC:
            for node in tree_of(path).body:
                if not isinstance(node, DEFINITIONS) or node.name.startswith("_"):
                    continue
                if not ast.get_docstring(node):
                    yield path, node.lineno, f"{node.name} has no docstring"
                methods = node.body if isinstance(node, ast.ClassDef) else [node]
                for method in methods:
                    public = isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
                    if public and not method.returns and not is_kernel(method):
                        yield path, method.lineno, f"{method.name} has no return type"

    none(broken())


def flag_lines() -> list[str]:
    """Each flag as tests/flags.txt holds it: type, default, and what a resumed run may do with it (nothing: SAME)."""
    fields = settings()
    types = {name: kind.__name__ for name, kind in kinds().items()}
    lines = []
    for flag in train_parser().known_flags():
        name = {"my_testing": "version", "rlhf_train_file": "pair_file", "version": ""}.get(flag[2:], flag[2:])
        if name in fields:
            resume = fields[name].metadata["resume"]
            flag += f" {types[name]} {fields[name].default!r}" + (f" {resume.name}" if resume is not SAME else "")
        lines.append(flag)
    return sorted(lines)


def test_the_command_line_is_frozen():
    """Others script against these flags. A new one is added to tests/flags.txt by hand; none goes away."""
    frozen = (ROOT / "tests" / "flags.txt").read_text(encoding="utf-8").splitlines()
    assert flag_lines() == frozen


def test_every_setting_is_read():
    """A flag that nobody reads is a silent no-op: it is read."""
    read = set()
    for _, node in walk([path for path in SRC if room_of(path) != "settings"], SCRIPTS):
        if isinstance(node, ast.Attribute):
            read.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # names in tables, for getattr
            read.add(node.value)
    config = tree_of(PACKAGE / "settings" / "config.py")
    derived = {node.attr for node in ast.walk(config) if isinstance(node, ast.Attribute)}
    companions = {"ds_bucket_mb", "svd_niter", "state_output_mode", "ctx_warmup_steps", "reward_model"}
    unread = set(settings()) - read - derived - companions - {"debug"}
    assert not unread
