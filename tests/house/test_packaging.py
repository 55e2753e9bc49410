"""What pip installs: pyproject.toml and requirements.txt say the same."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement

from tests.support.source_files import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pinned(name):
    """Package -> version of a file of requirements."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(re.split(r"[;#]", line)[0].strip().split("==") for line in lines)


def test_requirements_are_the_core_and_all_extras():
    """If this breaks, `pip install rwkv-lm-rlhf[all]` and the environment of the tests are not the same program.

    What only talking to a model needs is pinned in requirements-test.txt.
    """
    extras = PROJECT["optional-dependencies"]
    named = {extra: [Requirement(line) for line in lines] for extra, lines in extras.items()}
    (itself,) = (asked for asked in named["all"] if asked.name == PROJECT["name"])
    assert itself.extras == named.keys() - {"all"}
    asked = [Requirement(line) for line in PROJECT["dependencies"]]
    asked += [one for ones in named.values() for one in ones if one.name != PROJECT["name"]]
    pins, tested = pinned("requirements.txt"), pinned("requirements-test.txt")
    wanted = {one.name for one in asked}
    assert pins.keys() <= wanted and wanted - pins.keys() == wanted & tested.keys()
    pins |= tested
    assert not [str(one) for one in asked if not one.specifier.contains(pins[one.name])]


def test_an_error_message_names_a_package_of_an_extra():
    """If this breaks, a user is told to install a package that no extra knows."""
    lines = [line for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()) for line in lines]
    known = {Requirement(line).name for line in lines}
    # these come with PyTorch and the rwkv package
    known |= {"jinja2", "triton", "tokenizers"}
    said = {
        name
        for path in (ROOT / "src").rglob("*.py")
        for name in re.findall(r"pip install (\w[\w-]+)", path.read_text(encoding="utf-8"))
    }
    assert len(said) > 5 and said <= known


@pytest.mark.xdist_group("grouped")
def test_groups_stay_in_one_process(request):
    """If this breaks, a runner that does not know groups makes what tests share once for each of its processes."""
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@grouped")
