"""The scripts of the tradition at the top level: each runs its command from a bare clone."""

import runpy
import subprocess
import sys

import pytest

from rwkv_rlhf.commands import COMMANDS, NAMED, main
from rwkv_rlhf.settings.config import PROGRAM_VERSION
from tests.support.source_files import ROOT, SCRIPTS


def said_by(capsys, monkeypatch, script, *words):
    """(exit status, stdout) of a script, run as Python runs it."""
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(script), run_name="__main__")
    return done.value.code or 0, capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_and_its_command_are_one_program(script, capsys, monkeypatch):
    """If this breaks, an old script is gone, or does what another one does."""
    status, out = said_by(capsys, monkeypatch, script, "--help")
    with pytest.raises(SystemExit) as done:
        main([NAMED[script.stem], "--help"])
    want = capsys.readouterr().out
    assert (status, done.value.code) == (0, 0) and out.partition(" --flag")[2] == want.partition(" --flag")[2] != ""
    status, out = said_by(capsys, monkeypatch, script, "--version")
    assert status == 0 and PROGRAM_VERSION in out


def test_the_list_of_commands(capsys):
    """`rwkv-rlhf` alone lists every command; a wrong one is a sentence."""
    with pytest.raises(SystemExit) as done:
        main([])
    out, _ = capsys.readouterr()
    assert done.value.code in (0, None) and all(f"\n  {name} " in out for name in COMMANDS)
    with pytest.raises(SystemExit) as done:
        main(["trian"])
    out, err = capsys.readouterr()
    assert done.value.code == 2 and not out and err.count("\n") == 1 and "trian" in err and "train" in err


@pytest.mark.slow
def test_a_bare_clone_needs_no_installation(tmp_path):
    """If this breaks, `git clone` and `python train.py` no longer work from any folder, or need PYTHONPATH."""
    words = [sys.executable, str(ROOT / "train.py"), "--version"]
    done = subprocess.run(words, cwd=tmp_path, env={}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and PROGRAM_VERSION in done.stdout, done.stderr
    assert {name for command in COMMANDS.values() for name in command.scripts} == {path.stem for path in SCRIPTS}
