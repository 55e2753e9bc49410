"""--dry_run 1: its table counts every number of the model, and it opens every file that the run would."""

import re

import pytest

from rwkv_rlhf.commands import train
from rwkv_rlhf.training.dry_run import room_of


@pytest.fixture
def words(base_model, vocab_file, text_jsonl, tmp_path):
    """A dry run of SFT."""
    return [
        *("--load_model", base_model, "--vocab_file", vocab_file, "--data_file", text_jsonl, "--dry_run", 1),
        *("--proj_dir", tmp_path / "out", "--peft", "lora", "--precision", "fp32"),
    ]


def test_packed_matrices_are_counted(script, words):
    """If this breaks, the parameter table lacks the matrices that are packed, so its sums are wrong."""
    found = []
    for how in (("--quant", 0), ("--quant_mode", "int8")):
        status, out, err = script(train.main, *words, *how)
        assert status == 0, err
        found.append(re.findall(r"^(\w+) +([\d,]+) train +([\d,]+) frozen", out, re.MULTILINE))
    dense, packed = map(sorted, found)
    assert dense == packed and len(dense) == 5


def test_a_tensor_is_counted_where_it_belongs():
    """If this breaks, DeepEmbed's tables (s_emb), most of a block, are shown as the model's embedding."""
    rooms = {"emb.weight": "emb", "blocks.0.ffn.s_emb.weight": "ffn", "blocks.0.att.key.lora_A": "att"}
    rooms |= {
        "blocks.0.ln0.weight": "norms",
        "head.weight": "head",
        "score_head.weight": "head",
        "blocks.1.att.key": "att",
    }
    assert {name: room_of(name) for name in rooms} == rooms


def test_the_held_out_file_is_opened(script, words, tmp_path):
    """If this breaks, a run that a dry run found right ends at its first mini-epoch."""
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n')
    status, _, err = script(train.main, *words, "--val_file", tmp_path / "bad.jsonl")
    assert status == 2 and "bad.jsonl:1" in err


def test_all_processes_of_the_run_are_counted(script, words, caplog):
    """If this breaks, a dry run for several devices promises a fraction of the passes that the run will make."""
    caplog.set_level("INFO")
    found = []
    for devices in (1, 4):
        caplog.clear()
        status, out, err = script(train.main, *words, "--devices", devices, "--epoch_steps", 20, "--epoch_count", 1)
        assert status == 0, err
        length = re.search(r"are ([\d.]+) passes", caplog.text)
        found.append((float(length[1]), int(re.search(r"([\d,]+) samples", out)[1])))
    assert found == [(0.5, 20), (2.0, 80)]
