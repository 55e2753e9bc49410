"""What a person reads at the end of a command that failed."""

import importlib

import pytest

from rwkv_rlhf.commands import run_command
from rwkv_rlhf.settings.exit_status import FAILED, Failure, exit_status, sentence_of


def test_sentences_of_ours_have_no_class_name():
    """If this breaks, a stopped run says RuntimeError, as if the program were broken."""
    assert sentence_of(Failure("stopped by SIGTERM")) == "stopped by SIGTERM"
    assert sentence_of(ValueError("no such file")) == "no such file"
    assert sentence_of(RuntimeError("of a library")) == "RuntimeError: of a library"
    assert exit_status(Failure("x")) == FAILED


@pytest.mark.parametrize("command", ["chat", "merge"])
def test_without_torch_there_is_a_sentence(command, monkeypatch, capsys):
    """If this breaks, a machine without the packages shows a traceback that ends in ModuleNotFoundError."""

    def missing(name):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(SystemExit) as left:
        run_command(command, [])
    said = capsys.readouterr().err
    assert left.value.code == FAILED and "Traceback" not in said
    assert said == "error: the package torch is not installed: pip install -r requirements.txt, or pip install .\n"
