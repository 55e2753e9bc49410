"""The scripts of the tradition at the top level: each runs its command from a bare clone."""

import json
import re
import runpy
import subprocess
import sys

import pytest
import torch

from rwkv_rlhf.checkpoints.tensor_files import read_tensors
from rwkv_rlhf.commands import COMMANDS, NAMED, main, run_command
from rwkv_rlhf.commands.old_scripts import OLD_SCRIPTS, translated
from rwkv_rlhf.settings.config import PROGRAM_VERSION
from tests.support.merging import run_merge, trained
from tests.support.processes import run_program
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


@pytest.mark.parametrize(
    ("script", "words", "means"),
    [
        (
            "merge_lora",
            "32 B.pth L.pth O.pth",
            "--lora_alpha 32 --base_model B.pth --lora_checkpoint L.pth --output O.pth",
        ),
        (
            "merge_lora",
            "--use-gpu 32 B.pth L.pth O.pth",
            "--lora_alpha 32 --base_model B.pth --lora_checkpoint L.pth --output O.pth --device cuda",
        ),
        (
            "merge_pissa",
            "B.pth I.pth L.pth O.pth",
            "--base_model B.pth --lora_init I.pth --lora_checkpoint L.pth --output O.pth",
        ),
        ("merge_bone", "--base_model B.pth --quant nf4", "--base_model B.pth --quant nf4"),
        (
            "merge_disha",
            "--base_model B --peft_checkpoint D --output O --quant nf4",
            "--base_model B --lora_checkpoint D --output O --quant nf4",
        ),
        (
            "merge_state",
            "--base_model B --state_checkpoint S --output O",
            "--base_model B --lora_checkpoint S --output O",
        ),
        ("make_data", "data/demo.jsonl 3 4096", "--input data/demo.jsonl --repeats 3 --ctx_len 4096 --output demo"),
        ("make_data", "--help", "--help"),
    ],
)
def test_old_scripts_are_called_as_ever(script, words, means):
    """If this breaks, a line of an old notebook merges something else, with another alpha."""
    added = " ".join(OLD_SCRIPTS[script].added) if "--help" not in words else ""
    assert " ".join(translated(script, words.split())) == f"{means} {added}".strip()


def test_an_old_script_merges_and_refuses(tmp_path, script):
    """The words of RWKV-LM-LoRA do what merge.py does; too few of them are a sentence."""
    base, checkpoint, _ = trained(tmp_path, "lora")
    wanted = run_merge(base, checkpoint, tmp_path / "one.pth")
    checkpoint.with_suffix(".json").unlink()
    with pytest.raises(SystemExit) as done:
        run_command("merge_lora", ["16", str(base), str(checkpoint), str(tmp_path / "two.pth")])
    found = read_tensors(tmp_path / "two.pth")
    assert not done.value.code and all(torch.equal(found[name], wanted[name]) for name in wanted)
    status, _, err = script(lambda words: translated("merge_pissa", words) and None, "B.pth", "L.pth")
    assert status == 2 and "merge_pissa.py takes BASE_MODEL LORA_INIT LORA_CHECKPOINT OUTPUT, not 2 words" in err


@pytest.mark.parametrize("mode", ["bone", "miss"])
def test_a_file_of_disha_is_merged_as_its_program_does(mode, tmp_path):
    """RWKV-PEFT calls both of them `disha`: if this breaks, its files are refused, or merged by the other's formula."""
    base, checkpoint, _ = trained(tmp_path, mode, limited=True)
    checkpoint.with_suffix(".json").unlink()
    theirs = {name.replace(f".{mode}", ".disha"): tensor for name, tensor in read_tensors(checkpoint).items()}
    torch.save(theirs, tmp_path / "disha.pth")
    words = ["--base_model", base, "--peft_checkpoint", tmp_path / "disha.pth", "--output", tmp_path / "m.pth"]
    with pytest.raises(SystemExit) as done:
        run_command("merge_disha", [str(word) for word in words])
    assert not done.value.code
    found = read_tensors(tmp_path / "m.pth")
    for name, weight in read_tensors(base).items():
        update = theirs.get(name.replace(".weight", ".disha"))
        if update is not None and mode == "bone":  # W_ab + W_ab D_b + D_b
            r = update.shape[-1]
            blocks = [
                torch.cat([w + w @ d + d for w in weight[:, b * r : (b + 1) * r].split(r)])
                for b, d in enumerate(update)
            ]
            weight = torch.cat(blocks, 1)
        elif update is not None:  # every r inputs the same strip
            weight = weight + update.T.repeat(1, weight.shape[1] // len(update))
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)


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


MISTAKES = {  # command -> a line with a path that is not there, or of a command that reads no file with a wrong value
    "train": "--load_model no.pth --dpo 1 --rlhf_train_file no.csv",
    "merge": "--base_model no.pth --lora_checkpoint no.pth --output merged.pth",
    "export": "--load_model no.pth --to hf --output folder",
    "chat": "--load_model no.pth",
    "serve": "--load_model no.pth",
    "label": "--load_model no.pth --output pairs.jsonl",
    "score": "--load_model no.pth --input no.jsonl --output out.jsonl",
    "generate_rejects": "--load_model no.pth --input_csv no.csv",
    "score_pairs": "--load_model no.pth --input_csv no.csv",
    "prepare_pairs": "--input_csv no.csv",
    "sft_h5": "--input no.jsonl",
    "distillation_h5": "--load_model no.pth --input no.jsonl",
    "convert": "--input no.jsonl --output out.jsonl",
    "make_binidx": "--input no.jsonl --output corpus",
    "make_profile": "--make no --layers 2",
    "finetune_clm": "--model_name_or_path no.pth --dataset_name no.jsonl",
    "reward_modeling": "--model_name_or_path no.pth --dataset_name no.jsonl",
    "rl_training": "--model_name no.pth --dataset_name no.jsonl --reward_model_name no.pth",
    "merge_peft_adapter": "--adapter_model_name no.pth --output_name folder",
    "report": "no",
    "config": "--config no.yaml",
}
OF_VALUES = {  # values that are no legal ones, after a model that need not be there
    "chat": ["--top_p 3", "--template no", "--batch_size 0", "--output out.jsonl", "--prompt_file no.jsonl"],
    "generate_rejects": ["--tries 0 --input_csv no.csv", "--input_csv no.csv --output_csv no.save"],
    "serve": ["--temperature -1", "--batch_size 0"],
}


@pytest.fixture(scope="module")
def quick_answers():
    """Of each command: what it says to --help, --version, an unknown flag, and the lines above."""
    lines = {
        name: [["--help"], ["--version"], ["--no_flag"], words.split()]
        + [["--load_model", "no.pth", *value.split()] for value in OF_VALUES.get(name, ())]
        for name, words in MISTAKES.items()
    }
    return json.loads(run_program("quick_answers", json.dumps(lines), fresh=True))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_mistakes_need_no_pytorch(quick_answers, command):
    """If this breaks, --help or a typing error of this command takes as long as PyTorch takes to be imported."""
    helped, version, unknown, mistake, *values = quick_answers[command]
    assert (helped[0], version[0], unknown[0], mistake[0]) == (0, 0, 2, 2)
    assert "no" in re.findall(r"\w+", mistake[1]), mistake
    assert all(status == 2 and said.startswith("error: --") for status, said, _ in values)
    assert not any(imported for *_, imported in quick_answers[command])
