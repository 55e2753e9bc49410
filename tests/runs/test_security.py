"""What the program never does: talk to anybody, or disturb a second run of itself."""

import json
import os
import shlex
import subprocess
import sys

import pytest
import torch

from tests.support.files import JINJA, VOCAB
from tests.support.processes import PROGRAMS, end_of, environment, started
from tests.support.source_files import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(390)]


def everything(folder, base, vocab, pairs, texts):
    """Each program, one after the other."""
    model, words = f"--load_model {base}", f"--vocab_file {vocab}"
    (folder / "empty.csv").write_text("prompt,chosen,reject\nsay a,gladly,\nsay b,of course,\n")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.jsonl").write_bytes(texts.read_bytes())
    (folder / "prompts.jsonl").write_text('{"prompt": "say a"}\n')
    (folder / "chat.jinja").write_text(JINJA)
    # a folder of such a name once made a trainer upload its checkpoints to somebody
    run = f"{folder}/14b-run1/world/7b"
    small = f"{model} {words} --precision fp32 --quant 0 --ctx_len 64 --epoch_steps 2 --epoch_count 1 --micro_bsz 2"
    lines = {
        "rlhf_generate_reject_csv": f"{model} {words} --input_csv {folder}/empty.csv --output_csv {folder}/full.csv"
        " --strategy 'cpu fp32' --max_tokens 4",
        "PrepareOrpoDataset": f"--input_csv {pairs} --output_save {folder}/orpo.save --target_pair_count 8 {words}"
        f" --vocab_size {VOCAB} --template {folder}/chat.jinja",
        "rlhf_dpo_generate_save": f"{model} {words} --input_csv {pairs} --output_save {folder}/dpo.save"
        " --target_pair_count 8 --strategy 'cpu fp32'",
        "sft_generate_h5": f"--input {folder}/texts --output_h5 {folder}/sft.h5 {words} --vocab_size {VOCAB}",
        "distillation_generate_h5": f"{model} {words} --input {folder}/texts --output_h5 {folder}/kd.h5 --top_k 4"
        " --strategy 'cpu fp32'",
        "make_binidx": f"--input {texts} --output {folder}/corpus --vocab_size {VOCAB} {words}",
        "train": f"{small} --dpo 1 --peft lora --rlhf_train_file {folder}/dpo.save --proj_dir {run}",
        "merge": f"--base_model {base} --lora_checkpoint {run}/rwkv-0.pth --output {folder}/merged.pth",
        "chat": f"--load_model {folder}/merged.pth {words} --prompt_file {folder}/prompts.jsonl"
        f" --output {folder}/answers.jsonl --max_tokens 3 --strategy 'cpu fp32'",
    }
    return [(name, shlex.split(line)) for name, line in lines.items()]


def test_nobody_is_called(tmp_path, base_model, vocab_file, pairs_csv, text_jsonl):
    """If this breaks, a training or a script tells somebody about itself, or fetches something, unasked."""
    commands = everything(tmp_path, base_model, vocab_file, pairs_csv, text_jsonl)
    watched = environment(first_path=PROGRAMS.parent / "no_network", REACHED=tmp_path / "reached.txt")

    def call(*words):
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, env=watched, cwd=tmp_path, capture_output=True, text=True, timeout=500)

    probe = call("-c", "import socket; socket.create_connection(('example.invalid', 80))")
    assert "no connection in this test" in probe.stderr and (tmp_path / "reached.txt").read_text()
    (tmp_path / "reached.txt").unlink()
    done = call(PROGRAMS / "every_command.py", json.dumps(commands))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "answers.jsonl").read_text()
    assert not (tmp_path / "reached.txt").exists(), (tmp_path / "reached.txt").read_text()


def test_two_runs_at_once_share_data_and_caches(tmp_path, base_model, vocab_file, pairs_csv):
    """If this breaks, a second run on the same machine, data and kernels' cache damages the first one or itself."""
    small = ["--load_model", base_model, "--vocab_file", vocab_file, "--precision", "fp32", "--quant", 0]
    small += ["--ctx_len", 64, "--epoch_steps", 2, "--epoch_count", 1, "--micro_bsz", 2, "--dpo", 1, "--peft", "lora"]
    small += ["--rlhf_train_file", pairs_csv, "--dpo_beta", 0.1]
    before = {path: path.read_bytes() for path in (base_model, vocab_file, pairs_csv)}
    beside = {path: sorted(os.listdir(path.parent)) for path in before}

    words = (ROOT / "train.py", *small, "--proj_dir")
    end_of(*(started(*words, tmp_path / name, cwd=tmp_path) for name in ("one", "two")))
    one, two = (torch.load(tmp_path / name / "rwkv-0.pth", weights_only=True) for name in ("one", "two"))
    assert one and one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert {path: path.read_bytes() for path in before} == before
    assert {path: sorted(os.listdir(path.parent)) for path in before} == beside
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]  # no file of a fixed name where both were started
