"""The wheel: what is inside, and that it runs from any folder on a machine without a compiler."""

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from rwkv_rlhf import __version__
from rwkv_rlhf.commands import COMMANDS
from rwkv_rlhf.ops import build
from tests.support.source_files import NATIVE, PACKAGE, ROOT, SRC

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("wheel")]
BUILD = "import sys, setuptools.build_meta as backend; print(getattr(backend, sys.argv[1])(sys.argv[2]))"


def built(kind, clone, folder, **variables):
    """(the file, stderr) of a wheel or sdist made from `clone`: setuptools called as pip calls it."""
    folder.mkdir(exist_ok=True)
    words = [sys.executable, "-c", BUILD, f"build_{kind}", str(folder)]
    done = subprocess.run(words, cwd=clone, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / done.stdout.splitlines()[-1], done.stderr


def pip(*words, **variables):
    """pip, without a network."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words), "--no-deps", "--no-index"]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The project's files, so that a build leaves nothing among them."""
    folder = tmp_path_factory.mktemp("clone")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory):
    """Made by pip from the source archive. The compiler does not optimise, which would take minutes."""
    try:
        command, _ = build.compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("wheel")
    quick = folder / "c++"
    quick.write_text(f'#!/bin/sh\nexec {command} "$@" -O0\n')
    quick.chmod(0o755)
    archive, _ = built("sdist", clone, folder)
    pip("wheel", "--no-build-isolation", "-w", folder, archive, CXX=str(quick), XDG_CACHE_HOME=str(folder / "cache"))
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """installed(*words) -> (exit status, stdout, stderr) of `rwkv-rlhf`, in an empty folder, without any other program.

    It lives in an environment of its own, which sees the packages of this one.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "env", symlinks=True)
    python = folder / "env" / "bin" / "python"
    pip("--python", python, "install", wheel)
    (own,) = (folder / "env").glob("lib/python*/site-packages")
    (own / "others.pth").write_text("".join(f"{path}\n" for path in site.getsitepackages()))
    (folder / "empty").mkdir()

    def run(*words):
        place = {"PATH": str(folder / "empty"), "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
        command = [str(python.with_name("rwkv-rlhf")), *words]
        done = subprocess.run(command, cwd=folder / "empty", env=place, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    return run


def test_what_is_inside(wheel):
    """If this breaks, an installed program lacks a kernel, or carries what belongs to nobody's machine."""
    assert wheel.name.split("-", 2)[2] == f"py3-none-{sysconfig.get_platform().replace('-', '_')}.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        about = archive.read(f"rwkv_lm_rlhf-{__version__}.dist-info/WHEEL").decode()
    pages = [path for path in PACKAGE.rglob("*") if path.suffix in (".html", ".css", ".js")]
    wanted = [f"rwkv_rlhf/{path.relative_to(PACKAGE).as_posix()}" for path in (*SRC, *pages)]
    wanted += [f"rwkv_rlhf/{path.relative_to(ROOT).as_posix()}" for path in NATIVE]
    kinds = [(path.stem, isa) for path in (ROOT / "cuda" / "cpu").glob("*.cpp") for isa in build.instruction_sets()]
    built = {build.packaged_path(*kind) for kind in kinds}
    wanted += [f"rwkv_rlhf/cuda/{path.relative_to(build.KERNELS).as_posix()}" for path in built]
    assert sorted(name for name in names if ".dist-info/" not in name) == sorted(wanted)
    assert {Path(name).parts[0] for name in names} == {"rwkv_rlhf", f"rwkv_lm_rlhf-{__version__}.dist-info"}
    assert "Root-Is-Purelib: false" in about and len(kinds) >= 6


def test_kernels_come_from_the_wheel(installed):
    """If this breaks, a user without a compiler trains 50 times slower, or with a kernel that is wrong."""
    status, out, err = installed("train", "--doctor", "1")
    assert status == 0, out + err
    (line,) = (line for line in out.splitlines() if "CPU kernels " in line)
    assert line.endswith(" from the installation")
    assert "no C++ compiler" in out and "The installation brings the kernels" in out
    assert " 0 binaries" in out and "every kernel that can run here agrees" in out


def test_the_console_script(installed):
    """If this breaks, `rwkv-rlhf` is not there, or is not the program of the scripts."""
    status, out, _ = installed("--help")
    assert status == 0 and all(f"\n  {name} " in out for name in COMMANDS)
    assert installed("--version")[1] == installed("train", "--version")[1] == f"RWKV-LM-RLHF {__version__}\n"
    for name, flag in (("train", "--layer_profile"), ("merge", "--lora_checkpoint"), ("chat", "--load_model")):
        status, out, err = installed(name, "--help")
        assert status == 0 and out.startswith(f"usage: rwkv-rlhf {name} ") and flag in out, err
    status, out, err = installed("trian")
    assert status == 2 and not out and err.count("\n") == 1 and "unknown command trian" in err


def test_without_a_compiler_the_wheel_is_for_any_machine(clone, tmp_path):
    """If this breaks, `pip install` fails where there is no compiler, or a wheel claims kernels that it lacks."""
    made, said = built("wheel", clone, tmp_path / "out", CXX="no-such-compiler")
    assert made.name == f"rwkv_lm_rlhf-{__version__}-py3-none-any.whl"
    (warning,) = (line for line in said.splitlines() if "no compiled kernels" in line)
    assert warning.startswith("WARNING") and "no-such-compiler" in warning
    with zipfile.ZipFile(made) as archive:
        names = archive.namelist()
    assert "rwkv_rlhf/cuda/cpu/wkv7.cpp" in names and not any(name.endswith(".so") for name in names)
