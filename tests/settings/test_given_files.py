"""Files that a command line names are looked at at once, not when the model is loaded and scored."""

import subprocess
import sys

import pytest

from rwkv_rlhf.commands.train import check_given
from rwkv_rlhf.settings.command_line import parse
from rwkv_rlhf.settings.given_files import check_given_files, named_files
from tests.support.source_files import ROOT

SLOW = ("torch", "pytorch_lightning", "numpy", "triton")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with one empty file of each kind."""
    monkeypatch.chdir(tmp_path)
    for name in ("m.pth", "d.jsonl", "p.csv", "c.bin", "c.idx", "v.txt", "s.save"):
        (tmp_path / name).write_text("")


OK = (
    "--load_model m.pth --data_file d.jsonl --val_file p.csv",
    "--load_model m.pth --data_file c --vocab_file v.txt",
    "--load_model m.pth --data_file c.bin --data_type binidx",
    "--load_model m.pth --dpo 1 --rlhf_train_file p.csv --data_file none.jsonl",  # which is not read
    "--load_model 0 --train_stage 3 --data_file d.jsonl",
    "--load_model none.pth --doctor 1",
    "--load_model m.pth --data_file d.jsonl:2,p.csv:0.5",
    "--load_model m.pth --ppo 1 --rlhf_train_file p.csv --reward_model .",  # the folder of a run
    "--load_model m.pth --data_file *.jsonl --val_file .",
)
WRONG = {
    "--load_model none.pth --data_file d.jsonl": r"\{load_model\} none\.pth does not exist",
    "--load_model p.csv --data_file d.jsonl": r"\{load_model\} p\.csv is a table",
    "--load_model m.pth --data_file none.jsonl": r"\{data_file\} none\.jsonl does not exist",
    "--load_model . --data_file d.jsonl": r"\. is a folder with no model",
    "--load_model m.pth --data_file s.save": r"\{data_file\} s\.save: save files hold no text; one of \.csv",
    "--load_model m.pth --data_file d.jsonl:2,none.csv": r"\{data_file\} none\.csv does not exist",
    "--load_model m.pth --data_file m.pth": r"\{data_file\} m\.pth is a checkpoint, expected data",
    "--load_model m.pth --data_file d.jsonl --val_file none.csv": r"\{val_file\} none\.csv does not exist",
    "--load_model m.pth --dpo 1 --rlhf_train_file m.pth": r"\{pair_file\} m\.pth is a checkpoint, expected data",
    "--load_model m.pth --data_file d.jsonl --vocab_file .": r"\{vocab_file\} \. is a folder",
    "--load_model m.pth --grpo 1 --rlhf_train_file p.csv --reward_funcs none.py:f": r"there is no file none\.py",
    "--load_model m.pth --ppo 1 --rlhf_train_file p.csv --reward_model none.pth": r"\{reward_model\} none\.pth",
    "--load_model m.pth --data_file d.jsonl --vocab_file none.json": r"\{vocab_file\} none\.json does not exist",
}


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("words", [*OK, *WRONG])
def test_what_is_not_there_is_said_at_once(words):
    """If this breaks, a missing corpus is found after the reference scores of an hour."""
    config = parse(words.split())
    assert set(named_files(config)) or config.load_model in ("", "0")
    if words not in WRONG:
        check_given_files(config)
        return
    with pytest.raises(ValueError, match=WRONG[words]):
        check_given_files(config)


def test_a_template_is_looked_at_before_anything_is_loaded():
    """If this breaks, a template that is not there is said after the model is read and the data are scored."""
    for name, said in (("none.jinja", r"none\.jinja"), ("wrold", "--template wrold is not known; one of world")):
        with pytest.raises(ValueError, match=said):
            check_given(parse(["--doctor", "1", "--template", name]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--load_model", "none.pth", "--data_file", "d.jsonl"], "--load_model none.pth does not exist"),
        (["--doctor", "1", "--template", "none.jinja"], "none.jinja"),
    ],
)
def test_a_wrong_path_does_not_wait_for_torch(words, said):
    """If this breaks, a typing error in a path costs ten seconds."""
    command = [sys.executable, "-X", "importtime", ROOT / "train.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and said in done.stderr
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not imported & {*SLOW} - ({"numpy"} if "--template" in words else set())
