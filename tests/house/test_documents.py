"""The project's papers are true: what they name is there, and the plan of the house is the house."""

import ast
import importlib
import re
import subprocess
from pathlib import Path

from rwkv_rlhf import __version__
from rwkv_rlhf.commands import COMMANDS
from rwkv_rlhf.losses import LOSSES
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.command_line import train_parser
from rwkv_rlhf.settings.exports import EXPORTS
from rwkv_rlhf.settings.flags import CONFIGS, ELSEWHERE
from rwkv_rlhf.settings.formats import FORMATS
from rwkv_rlhf.settings.metrics import METRICS
from rwkv_rlhf.settings.pipeline import STAGES
from tests.support.source_files import PACKAGE, PAGES, ROOT, SRC, name_of, nodes_of, tree_of

ARCHITECTURE = ROOT / "docs" / "architecture.md"
CHANGELOG = ROOT / "CHANGELOG.md"  # history: what it names may be gone
WRITTEN = re.compile(r"`+([^`\n]+)`+")
OTHER_PROGRAMS = ("bash ", "pip ", "python tests/", "python benchmarks/", "torchrun ", "accelerate ")


def tracked():
    """Every file of the project that is text, also those that are not committed yet."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in names if (ROOT / name).is_file() and not name.endswith((".png", ".gitkeep"))]


def words(page):
    """(place, what stands between backticks) on a page, its blocks of code left out."""
    inside = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        inside ^= line.lstrip().startswith("```")
        if not inside:
            yield from ((f"{name_of(page)}:{number}", word) for word in WRITTEN.findall(line))


def found(path):
    """Where a path of a page leads: from the project's root, from the package, or None."""
    return next((place / path for place in (ROOT, PACKAGE) if (place / path).exists()), None)


def is_path(word):
    """Whether a word means a file or folder of the project, and not one that a run makes."""
    top = word.split("/")[0]
    return re.fullmatch(r"[\w.-]+(/[\w.-]*)+", word) is not None and top != "out" and found(top) is not None


def test_paths_on_the_pages_exist():
    """If this breaks, a newcomer looks for a file that was moved."""
    pages = [page for page in PAGES if page != CHANGELOG]
    said = [(place, word.partition(":")[0]) for page in pages for place, word in words(page)]
    lost = [f"{place}: {path}" for place, path in said if is_path(path) and found(path) is None]
    assert not lost, "\n" + "\n".join(lost)
    assert sum(is_path(path) for _, path in said) > 100


def test_paths_in_the_sources_exist():
    """If this breaks, a comment sends its reader to a file that was moved."""
    inside = {path.relative_to(ROOT).parts for path in tracked()}  # not what runs and builds leave here
    folders = "|".join(sorted({parts[0] for parts in inside if len(parts) > 1 and not parts[0].startswith(".")}))
    named = re.compile(rf"(?<![\w/.-])((?:{folders})/[\w./-]*\w\.(?:py|md|cpp|cu|h|csv|sh|txt|toml))\b")
    said = [
        (path, name)
        for path in tracked()
        if path.suffix in (".py", ".cpp", ".cu", ".h", ".sh", ".toml", ".yaml")
        for name in named.findall(path.read_text(encoding="utf-8"))
    ]
    lost = [f"{name_of(path)}: {name}" for path, name in said if not (ROOT / name).exists() and "/output_" not in name]
    assert len(said) > 20 and not lost, "\n" + "\n".join(lost)


def defined(tree, names):
    """Whether a file defines `Class.method` or the like, at its top level or in that class."""
    for node in ast.iter_child_nodes(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        here = {getattr(node, "name", ""), *(getattr(target, "id", "") for target in targets)}
        if names[0] in here:
            return len(names) == 1 or defined(node, names[1:])
    return False


def test_functions_on_the_pages_exist():
    """`training/fit.py:fit` is a function of that file; if this breaks, the walk of a step leads nowhere."""
    said = [
        (place, *word.split(":")) for page in PAGES for place, word in words(page) if re.search(r"\.py:[A-Za-z]", word)
    ]
    assert len(said) > 40
    lost = [
        f"{place}: {path}:{name}" for place, path, name in said if not defined(tree_of(found(path)), name.split("."))
    ]
    assert not lost, "\n" + "\n".join(lost)


def test_names_in_the_architecture_exist():
    """If this breaks, the glossary explains a word that the code no longer has."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (*PACKAGE.rglob("*.py"), ROOT / "train.py"))
    names = {word for _, word in words(ARCHITECTURE) if re.fullmatch(r"[A-Za-z]\w*_\w+|[A-Z]\w+", word)}
    lost = {name for name in names if not re.search(rf"\b{name}\b", text)}
    assert len(names) >= 8 and not lost


def test_flags_on_the_pages_exist():
    """If this breaks, a page advises a flag that ends in a usage error."""
    parsers = [train_parser()]
    for name in COMMANDS:
        module = importlib.import_module(f"rwkv_rlhf.commands.{name}")
        parsers += [module.parser()] if hasattr(module, "parser") else []
    known = {flag for parser in parsers for flag in parser.known_flags()}
    known |= set(re.findall(r"--\w+", (PACKAGE / "commands" / "merge.py").read_text()))
    known |= {f"--to_{name}" for name in EXPORTS}
    spelled = [*ELSEWHERE, *(one for stage in STAGES.values() for one in stage.spellings)]
    known |= {f"--{one.said.split()[0]}" for one in spelled} | {f"--{flag}" for flag in CONFIGS}  # they are read too
    pages = [page for page in PAGES if page.parent != ROOT or page.name == "README.md"]
    pages = [page for page in pages if page.name != "extending.md"]  # toys
    said = [
        (place, flag)
        for page in pages
        for place, word in words(page)
        if not word.startswith(OTHER_PROGRAMS)
        for flag in re.findall(r"--[a-z]\w+", word)
    ]
    lost = [f"{place}: {flag}" for place, flag in said if flag not in known]
    assert len(said) > 100 and not lost, "\n" + "\n".join(lost)


def test_the_plan_of_the_house_is_the_house():
    """If this breaks, a room was added, renamed or removed without its line in docs/architecture.md."""
    plan = re.search(r"## Rooms\n\n```\n(.*?)```", ARCHITECTURE.read_text(encoding="utf-8"), re.DOTALL)[1]
    rooms = re.findall(r"^  (\S+)", plan, re.MULTILINE)
    inside = [path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    assert sorted(rooms) == sorted(p.name + "/" * p.is_dir() for p in inside if not p.name.startswith("__"))
    folders = {path.relative_to(ROOT).parts[0] for path in tracked() if path.parent != ROOT}
    named = {folder.split("/")[0] for folder in re.findall(r"^([\w/]+/)", plan, re.MULTILINE)}
    assert named == {folder for folder in folders if not folder.startswith(".")}


def test_the_import_order_is_that_of_the_house_rule():
    """If this breaks, the page teaches another order than the one that a test enforces."""
    block = re.search(
        r"## Which way imports point\n.*?```\n(.*?)```", ARCHITECTURE.read_text(encoding="utf-8"), re.DOTALL
    )[1]
    floors = [tuple(floor.strip(" {}\n").split(", ")) for floor in block.split("<")]
    rule = tree_of(Path(__file__).with_name("test_house.py"))
    (order,) = (
        node.value for node in rule.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ORDER"
    )
    assert floors == [*ast.literal_eval(order), ("scripts",)]


def test_numbers_of_kinds():
    """If this breaks, the first paragraph counts what is no longer there."""
    text = " ".join(ARCHITECTURE.read_text(encoding="utf-8").split())
    counted = {
        "versions of RWKV": tables.VERSIONS,
        "losses": LOSSES,
        "adapters": tables.ADAPTERS,
        "packed storages": tables.STORAGES,
        "file formats": FORMATS,
        "strategies": tables.STRATEGIES,
    }
    for what, table in counted.items():
        assert f" {len(table)} {what}" in text, f"{len(table)} {what}"
    assert {"reward_margin", "logp_margin"} <= METRICS.keys()


def test_every_kind_is_on_its_page():
    """If this breaks, something new can be asked for, and no page says so."""
    pages = {path: (ROOT / path).read_text(encoding="utf-8") for path in map(name_of, PAGES)}
    wanted = {f"`{name}`": "docs/layer-profiles.md" for name in (*tables.ADAPTERS, "full", "freeze")}
    wanted |= {f"{name}": "README.md" for name in tables.STORAGES}
    wanted |= {f"({name}": "README.md" for name, facts in tables.VERSIONS.items() if facts.new}
    wanted |= {f"| `{name}` |": "docs/formats.md" for name in FORMATS}
    wanted |= {f"| `{name}` |": "docs/metrics.md" for name in METRICS}
    lost = [f"{page}: {what}" for what, page in wanted.items() if what not in pages[page]]
    tasks = "".join(text for page, text in pages.items() if page.startswith("docs/"))
    lost += [f"docs/: --{name} 1" for name in LOSSES if f"--{name} 1" not in tasks]
    assert not lost, "\n" + "\n".join(lost)
    suffixes = {suffix for facts in FORMATS.values() for suffix in facts.suffixes}
    assert all(f"`{suffix}`" in pages["docs/formats.md"] for suffix in suffixes)


def test_no_file_speaks_of_a_document_that_is_not_here():
    """If this breaks, a reader is sent to a page that he cannot have."""
    files = tracked()
    pages = {name_of(path) for path in files if path.suffix == ".md"}
    lost = []
    for path in files:
        if path.suffix in (".jsonl", ".csv", ".sh"):
            continue
        for name in re.findall(r"[\w./-]*\w\.md\b", path.read_text(encoding="utf-8")):
            near = {name, f"{name_of(path.parent)}/{name}"}
            if not near & pages and not any(page.endswith(f"/{name}") for page in pages):
                lost.append(f"{name_of(path)}: {name}")
    assert not lost, "\n" + "\n".join(sorted(set(lost)))


def test_the_changelog_knows_this_version():
    """If this breaks, a version goes out of which nobody is told what is new."""
    assert re.search(
        rf"^## \[(Unreleased\] \({re.escape(__version__)}\)|{re.escape(__version__)}\])", CHANGELOG.read_text(), re.M
    )


def test_what_troubleshooting_quotes_is_said():
    """If this breaks, somebody looks for his error message on the page and does not find it."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [text for row in page.splitlines() if row.startswith("|") for text in WRITTEN.findall(row.split("|")[1])]
    texts = [node.value for path in SRC for node in nodes_of(path) if isinstance(node, ast.Constant)]
    said = "\0".join(" ".join(text.split()) for text in texts if isinstance(text, str))
    lost = [text for text in quoted if not text.startswith(("--", "{")) and text not in said]
    assert len(quoted) >= 15 and not lost, lost
