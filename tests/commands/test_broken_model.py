"""A model file with NaN in it, and other ways to numbers that are none: said at once, with nothing saved."""

import json
import math

import pytest
import torch

from rwkv_rlhf.commands import score_pairs, train
from rwkv_rlhf.files import write_json
from rwkv_rlhf.reports.metrics import append_json
from rwkv_rlhf.scoring.finite import NotFinite, broken_tensor, refuse_not_finite
from tests.support.source_files import ROOT

BROKEN = "blocks.1.att.key.weight"


@pytest.fixture
def broken(base_model, tmp_path):
    """The base model with one NaN."""
    tensors = torch.load(base_model, weights_only=True)
    tensors[BROKEN][3, 5] = math.nan
    torch.save(tensors, tmp_path / "broken.pth")
    return tmp_path / "broken.pth"


@pytest.mark.parametrize(
    "words",
    [
        ("--sft", 1, "--epoch_steps", 3),
        ("--sft", 1, "--epoch_steps", 3, "--peft", "lora", "--quant", 1, "--quant_mode", "nf4"),
        ("--dpo", 1, "--peft", "lora"),
        ("--rm", 1, "--peft", "lora"),
        ("--grpo", 1, "--peft", "lora", "--reward_funcs", f"{ROOT}/tests/support/rewards.py:odd"),
    ],
)
def test_a_start_model_with_nan_trains_nothing(words, refused, typed, broken, text_jsonl, pairs_csv, tmp_path):
    """If this breaks, three steps that were left out end in rwkv-final and status 0, or NaN scores are kept."""
    data = ("--data_file", text_jsonl) if "--sft" in words else ("--rlhf_train_file", pairs_csv)
    refused([*typed, *words, *data, "--load_model", broken], BROKEN, "holds nan or inf")
    assert not list(tmp_path.glob("out/cache/*"))


def test_scores_of_a_model_with_nan(refused, script, typed, broken, text_jsonl, pairs_csv, vocab_file, tmp_path):
    """If this breaks, --eval_only prints what is no JSON and succeeds, and a .save holds NaN."""
    for held_out in (text_jsonl, pairs_csv):
        words = [*typed, "--load_model", broken, "--eval_only", 1, "--val_file", held_out]
        status, out, err = script(train.main, *words)
        assert (status, out) == (2, "") and BROKEN in err
    words = ["--load_model", broken, "--vocab_file", vocab_file, "--input_csv", pairs_csv, "--strategy", "cpu fp32"]
    refused([*words, "--output_save", tmp_path / "a.save"], BROKEN, main=score_pairs.main)
    assert not (tmp_path / "a.save").exists()


def test_what_is_blamed():
    """Weights that are numbers and scores that are none: the precision, or the values."""
    model = torch.nn.Linear(2, 2)
    refuse_not_finite("a score", torch.zeros(3), model)
    with pytest.raises(NotFinite, match=r"a score: .* try --precision fp32"):
        refuse_not_finite("a score", torch.tensor([1.0, math.inf]), model)
    model.register_buffer("scale", torch.tensor([math.inf]))
    assert broken_tensor(model) == "scale"


def test_no_json_holds_nan(tmp_path):
    """If this breaks, a record is no JSON for every other program."""
    value = {"a": math.nan, "b": [1.0, -math.inf, {"c": (math.inf, "nan")}], "d": 2}
    write_json(tmp_path / "a.json", value)
    append_json(tmp_path / "b.jsonl", value)
    for path in tmp_path.iterdir():
        found = json.loads(path.read_text(), parse_constant=pytest.fail)
        assert found == {"a": None, "b": [1.0, None, {"c": [None, "nan"]}], "d": 2}
