"""Commands that sample share their rows among processes: the output is that of one."""

import json

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


def test_two_processes_answer_a_file_as_one_does(script, model, tmp_path):
    """If this breaks, chat.py --devices 2 writes answers beside other prompts."""
    prompts = tmp_path / "in.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(5)))
    assert script(chat.main, *model, "--prompt_file", prompts, "--output", tmp_path / "one.jsonl")[0] == 0
    finished("chat.py", *model, "--prompt_file", prompts, "--output", tmp_path / "two.jsonl", "--devices", 2)
    one, two = (read_jsonl(tmp_path / f"{name}.jsonl") for name in ("one", "two"))
    assert [(line["prompt"], line["tokens"]) for line in one] == [(line["prompt"], line["tokens"]) for line in two]
