"""Whole commands where a person types them: in a notebook's cell, without a home, in an old locale, under odd names."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.files import read_jsonl
from tests.support.source_files import ROOT

pytestmark = pytest.mark.slow

# another program's modules of the same names as ours, which come first
OTHERS = ("files", "settings", "commands", "data", "model", "training", "layers", "losses", "reports")


@pytest.fixture
def surroundings(tmp_path):
    """What a notebook in a container hands down: a backend for plots, no home, an ASCII locale, foreign modules."""
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in OTHERS:
        (foreign / f"{name}.py").write_text("raise ImportError('another program')\n")
    kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS", "VIRTUAL_ENV") if name in os.environ}
    return kept | {
        **{"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONPATH": str(foreign)},
        **{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "CUDA_VISIBLE_DEVICES": ""},
    }


@pytest.mark.timeout(600)
def test_a_run_in_a_notebooks_surroundings_under_a_name_that_is_not_utf8(
    surroundings, base_model, vocab_file, text_jsonl, tmp_path
):
    """If this breaks, nothing starts from a notebook, or a file's name ends a run before its first resume point."""
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    named = {
        name: folder + b"/" + name + b"\xff" + end
        for name, end in ((b"m", b".pth"), (b"v", b".txt"), (b"d", b".jsonl"))
    }
    for source, target in zip((base_model, vocab_file, text_jsonl), named.values()):
        shutil.copy(source, target)
    model, vocab, data = named.values()
    words = ["--load_model", model, "--vocab_file", vocab, "--data_file", data, "--val_file", data]
    words += [
        "--proj_dir",
        folder + b"/out",
        "--sft",
        "1",
        "--epoch_steps",
        "2",
        "--epoch_save",
        "1",
        "--ctx_len",
        "32",
    ]
    command = [sys.executable, ROOT / "train.py", *words, "--peft", "lora", "--quant", "0", "--resume", "auto"]
    here = tmp_path / "here"
    here.mkdir()
    for epochs in ("2", "3"):
        done = subprocess.run([*command, "--epoch_count", epochs], cwd=here, env=surroundings, capture_output=True)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"resuming from" in done.stderr and b"training goes on" not in done.stderr
    out = Path(os.fsdecode(folder)) / "out"
    assert len(read_jsonl(out / "metrics.jsonl", "train")) == 6
    assert {"rwkv-2.pth", "rwkv-2.json", "rwkv-final.pth", "report.html", "curves.png", "run.json"} <= set(
        os.listdir(out)
    )
    assert not list(here.iterdir())  # no folder called ~
