"""Whole runs that are judged by tasks, and that tell other places of their figures."""

import csv
import json
import logging

import pytest

from rwkv_rlhf.commands import train
from tests.support.files import jsonl, read_jsonl

pytestmark = pytest.mark.slow


@pytest.fixture
def lambada(tmp_path):
    """Passages in the words of the model's documents."""
    return jsonl(tmp_path / "lambada.jsonl", *({"text": f"line {n}: " + "abc " * n + "abc"} for n in range(1, 9)))


def test_a_run_is_judged_before_and_after(script, base_model, vocab_file, text_jsonl, lambada, tmp_path, caplog):
    """If this breaks, nobody sees what training did to a task, or the page and the loggers lack it."""
    caplog.set_level(logging.INFO)
    out = tmp_path / "out"
    model = ["--load_model", base_model, "--vocab_file", vocab_file, "--precision", "fp32", "--proj_dir", out]
    tasks = ["--eval_tasks", f"lambada:{lambada}"]
    length = ["--epoch_steps", 8, "--epoch_count", 1, "--micro_bsz", 4, "--lr_init", 3e-3, "--val_split", 0.1]
    more = ["--logger", "csv,tensorboard", "--save_format", "safetensors"]
    status, _, err = script(train.main, *model, "--data_file", text_jsonl, *length, *tasks, *more)
    assert status == 0, err
    before, after = (record["tasks"] for record in read_jsonl(out / "metrics.jsonl", "tasks"))
    assert after["lambada/perplexity"] < 0.9 * before["lambada/perplexity"] and before["lambada/passages"] == 8
    said = [line for line in caplog.messages if line.startswith("lambada: perplexity ")]
    assert said[0].endswith(" (before training)") and " -> " in said[1] and len(said) == 2
    assert "<h2>Evaluation tasks</h2>" in (out / "report.html").read_text()
    with open(out / "metrics.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [row["event"] for row in rows] == ["start", "tasks", *["train"] * 8, "val", "tasks"]
    assert float(rows[-1]["lambada/perplexity"]) == pytest.approx(after["lambada/perplexity"])
    assert {path.name for path in (out / "tensorboard").iterdir()} == {"train", "held_out"}

    model[1], model[-1] = out / "rwkv-final.safetensors", tmp_path / "alone"
    status, printed, err = script(train.main, *model, "--eval_only", 1, "--json", 1, *tasks)
    assert status == 0, err
    assert json.loads(printed)["tasks"] == pytest.approx(after, rel=1e-4)
    words = ["--eval_only", 1, "--val_file", text_jsonl, *tasks, "--eval_limit", 3]
    status, printed, err = script(train.main, *model, *words)
    held, tasked = printed.splitlines()
    assert held.startswith("held out: loss ") and held.endswith(f" tokens of {text_jsonl})")
    assert tasked.startswith("lambada: perplexity ") and tasked.endswith(", passages 3")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--eval_only", 1], "--eval_only 1 needs --val_file, the text or pairs to score, or --eval_tasks"),
        (["--eval_only", 1, "--eval_tasks", "lambada:no"], "--eval_tasks lambada:no: there is no file 'no'"),
        (["--eval_only", 1, "--val_file", "F", "--serve_report", 1], "--serve_report 1 shows a run while it trains"),
        (["--json", 1, "--data_file", "F", "--sft", 1], "--json 1 needs --eval_only 1"),
        (["--eval_limit", 1, "--data_file", "F", "--sft", 1], "--eval_limit 1 needs --eval_tasks"),
        (["--logger", "cvs", "--data_file", "F", "--sft", 1], "--logger cvs: cvs is none of csv, tensorboard"),
        (["--rm", 1, "--rlhf_train_file", "F", "--eval_tasks", "piqa"], "a reward model predicts no tokens"),
    ],
)
def test_mistakes(script, base_model, words, said):
    """If this breaks, a mistake in these flags is found out when the model is loaded, or never."""
    status, _, err = script(train.main, "--load_model", base_model, *words)
    assert status == 2 and said in err and err.count("\n") == 1
