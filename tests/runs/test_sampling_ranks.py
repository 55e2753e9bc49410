"""Commands that sample share their rows among processes: the output is that of one."""

import json
import os
import signal
import time

import pytest

from rwkv_rlhf.commands import chat, generate_rejects
from tests.support.files import ROWS, read_jsonl, write_csv
from tests.support.processes import started

pytestmark = pytest.mark.slow


def finished(*words):
    process = started(*words)
    try:
        _, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    return err


@pytest.fixture
def model(base_model, vocab_file):
    return ["--load_model", base_model, "--vocab_file", vocab_file, "--strategy", "cpu fp32", "--max_tokens", 8]


def test_two_processes_write_the_rejects_that_one_writes(script, model, tmp_path):
    """If this breaks, --devices 2 loses rows, mixes their order, or samples other answers."""
    source = write_csv(tmp_path / "in.csv", ROWS)
    assert script(generate_rejects.main, *model, "--input_csv", source, "--output_csv", tmp_path / "one.csv")[0] == 0
    more = ["--input_csv", source, "--output_csv", tmp_path / "two.csv", "--devices", 2]
    err = finished("rlhf_generate_reject_csv.py", *model, *more)
    assert "4 rejects sampled, 1 kept" in err and err.count("wrote 5 rows") == 1
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    assert not list(tmp_path.glob("*.part-*"))


def test_a_killed_rank_loses_nothing_and_two_answer_a_file_as_one_does(script, model, tmp_path, caplog):
    """If this breaks, chat.py --devices 2 writes answers beside other prompts, or a machine that dies takes all of
    them along."""
    prompts, part = tmp_path / "in.jsonl", tmp_path / "two.jsonl.part-1"
    prompts.write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(40)))
    words = [*model, "--prompt_file", prompts, "--batch_size", 1, "--max_tokens", 20]
    assert script(chat.main, *words, "--output", tmp_path / "one.jsonl")[0] == 0
    process = started("chat.py", *words, "--output", tmp_path / "two.jsonl", "--devices", 2)
    while process.poll() is None and not (part.exists() and part.stat().st_size > 200):
        time.sleep(0.01)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        os.kill(int(file.read()), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "was killed by SIGKILL" in err and not (tmp_path / "two.jsonl").exists(), err
    kept = sum(len(path.read_text().splitlines()) - 1 for path in tmp_path.glob("two.jsonl.part-?"))
    caplog.set_level("INFO")
    assert script(chat.main, *words, "--output", tmp_path / "two.jsonl")[0] == 0
    assert f"{kept} answers are there from a run that was stopped" in caplog.text
    one, two = (read_jsonl(tmp_path / f"{name}.jsonl") for name in ("one", "two"))
    assert [(line["prompt"], line["tokens"]) for line in one] == [(line["prompt"], line["tokens"]) for line in two]
