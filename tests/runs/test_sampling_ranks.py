"""Commands that sample share their rows among processes: the output is that of one."""

import json

import pytest

from tests.support.files import ROWS, write_csv
from tests.support.processes import started

pytestmark = pytest.mark.slow


def finished(*words):
    process = started(*words)
    try:
        _, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    return err


def test_two_processes_write_what_one_writes(base_model, vocab_file, tmp_path):
    """If this breaks, --devices 2 loses rows, mixes their order, or samples other answers."""
    model = ["--load_model", base_model, "--vocab_file", vocab_file, "--strategy", "cpu fp32", "--max_tokens", 8]
    source = write_csv(tmp_path / "in.csv", ROWS)
    prompts = tmp_path / "in.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(5)))
    for devices in (1, 2):
        rejects = ["--input_csv", source, "--output_csv", tmp_path / f"out{devices}.csv", "--devices", devices]
        err = finished("rlhf_generate_reject_csv.py", *model, *rejects)
        assert "4 rejects sampled, 1 kept" in err and err.count("wrote 5 rows") == 1
        answers = ["--prompt_file", prompts, "--output", tmp_path / f"out{devices}.jsonl", "--devices", devices]
        finished("chat.py", *model, *answers)
    assert (tmp_path / "out1.csv").read_bytes() == (tmp_path / "out2.csv").read_bytes()
    one, two = ((tmp_path / f"out{devices}.jsonl").read_text().splitlines() for devices in (1, 2))
    assert [json.loads(line)["tokens"] for line in one] == [json.loads(line)["tokens"] for line in two]
    assert not list(tmp_path.glob("*.part-*"))
