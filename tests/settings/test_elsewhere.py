"""Spellings of other programs: each means what the table says, and docs/coming-from.md is that table."""

import json
import logging
import re

import pytest

from rwkv_rlhf.commands.stages import translated
from rwkv_rlhf.settings.command_line import UsageError, parse
from rwkv_rlhf.settings.config import settings
from rwkv_rlhf.settings.elsewhere import translate
from rwkv_rlhf.settings.flags import CONFIG_KEYS, CONFIGS, ELSEWHERE
from rwkv_rlhf.settings.pipeline import STAGES
from tests.support.elsewhere_page import PAGE, text

BASE = ["--load_model", "M", "--proj_dir", "P", "--train_data_file", "a.jsonl", "--sft", "1"]
VALUES = {"my_testing": "x060", "random_mode": "0", "rlhf_max_corpus_len": "99"}


def values_of(words):
    config = parse(words)
    return {name: getattr(config, name) for name in settings()}


@pytest.mark.parametrize("entry", ELSEWHERE, ids=lambda entry: entry.said)
def test_a_spelling_means_what_the_table_says(entry, caplog):
    """A command of another trainer trains what it would there, or says why not, and what was taken over."""
    flag = entry.said.split()[0]
    value = VALUES.get((entry.ours or "").split(" ")[0], "b.jsonl")
    more = {"distillation_train_file": ["--sft", "1"], "train_parts": [*BASE[4:], "--peft", "lora"]}
    base = [*BASE[:4], *more.get(flag, BASE[4:])]
    said = f"--{entry.said}".replace(" X", f" {value}").split()
    if entry.ours is None:
        with pytest.raises(UsageError) as mistake:
            parse([*base, *said])
        assert entry.note in str(mistake.value) and " ".join(said) in str(mistake.value)
        return
    ours = f"--{entry.ours}".replace(" X", f" {value}").split() if entry.ours else []
    with caplog.at_level(logging.WARNING):
        found = values_of([*base, *said])
    assert f"spelled as in another program: {' '.join(said)}: {' '.join(ours) or 'no effect'}" in caplog.text
    assert found == values_of([*base, *ours])


STAGED = [(name, entry) for name, stage in STAGES.items() for entry in stage.spellings if stage.words]
RUN = ["--load_model", "M", "--data_file", "a.jsonl", "--rlhf_train_file", "a.csv", "--reward_model", "R"]
TYPED = {
    "data_file": "b.jsonl",
    "rlhf_train_file": "b.csv",
    "accumulate_grad_batches": "2",
    "micro_bsz": "4",
    "vocab_file": "v.txt",
}


@pytest.mark.parametrize(("name", "entry"), STAGED, ids=lambda one: one if isinstance(one, str) else one.said)
def test_a_stage_of_the_pipeline_means_what_its_table_says(name, entry):
    """A script's command trains what it would there, from that script's defaults, or says why not."""
    ours, stage = entry.ours or "", STAGES[name]
    value = TYPED.get(ours.split(" ")[0], "3")
    said = f"--{entry.said}".replace(" X", f" {value}").split()
    if entry.ours is None:
        with pytest.raises(ValueError, match=re.escape(f"{' '.join(said)}: {entry.note}")):
            translate(said, stage.spellings)
        return
    said = [{"1": "True", "0": "false"}.get(word, word) for word in said]  # as those scripts are typed
    found = translate(said, stage.spellings)
    assert found.words == (f"--{ours}".replace(" X", f" {value}").split() if ours else [])
    assert len(found.said) == 1 and (entry.note in found.said[0])
    defaults = f"{stage.words} {stage.adapter}".split()
    values_of([*defaults, *RUN, *found.words])  # it is legal there


def test_a_token_is_not_repeated():
    """What is said at the start goes into logs, which people paste into issues."""
    for words in (["--hf_access_token", "hf_abc"], ["--hf_access_token=hf_abc"], ["--use_auth_token", "hf_abc"]):
        found = translate(words, STAGES["rl_training"].spellings)
        assert not found.words and "hf_abc" not in str(found) and "nothing is downloaded" in found.said[0]


def test_defaults_of_a_stage_give_way():
    """What is typed wins; an adapter's defaults do not disturb another plan."""
    assert values_of(translated("finetune_clm", [*RUN, "--peft", "full"]))["lora_r"] == 8
    config = parse(translated("finetune_clm", [*RUN, "--peft", "lora", "--lora_rank", "4", "--num_train_epochs", "1"]))
    assert (config.lora_r, config.lora_alpha, config.epochs, config.quant, config.loss) == (4, 16, 1, False, "sft")
    config = parse(translated("reward_modeling", [*RUN, "--save_steps", "5", "--gradient_accumulation_steps", "2"]))
    assert (config.epoch_steps, config.epoch_save, config.steps_per_epoch) == (10, 1, 5)
    with pytest.raises(UsageError, match="--use_habana: Gaudi is not supported"):
        translated("rl_training", ["--use_habana"])


def test_a_folder_as_tokenizer(tmp_path):
    """--tokenizer_name names the model's folder there: its own tokenizer is meant, if it has one."""
    words = ["--model_name", "M", "--tokenizer_name", str(tmp_path), "--seed", "1"]
    assert "--vocab_file" not in translated("rl_training", words)
    (tmp_path / "tokenizer.json").touch()
    words = translated("rl_training", words)
    assert words[words.index("--vocab_file") + 1] == str(tmp_path / "tokenizer.json")
    assert words[-2:] == ["--random_seed", "1"]


def test_settings_as_json():
    """Rank, alpha, adapter and iterations out of one word, or out of several where the shell took it apart."""
    typed = json.dumps({"pissa_load": "a.pth", "pissa_init": "i.pth", "pissa_r": 32, "svd_niter": 7})
    ours = "--peft pissa --load_adapter a.pth --load_adapter_pissa_init i.pth --lora_r 32 --svd_niter 7"
    wanted = values_of([*BASE, *ours.split()])
    assert values_of([*BASE, "--peft", "pissa", "--pissa_config", typed]) == wanted
    assert values_of([*BASE, "--peft", "pissa", "--pissa_config", *typed.split(" ")]) == wanted
    other = ["--lora_config", '{"lora_load":"", "lora_r":8, "lora_alpha":32, "lora_dropout":0.01}']
    assert values_of([*BASE, "--peft", "pissa", "--pissa_config", typed, *other]) == wanted
    bone = values_of([*BASE, "--peft", "disha", "--disha_config", '{"mode":"bone","load":"","r":64}'])
    assert bone == values_of([*BASE, "--peft", "bone", "--lora_r", "64"])
    assert set(CONFIGS.values()) - {""} <= {"lora", "dora", "pissa", "bone", "miss"} and CONFIG_KEYS


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--lora_config", "{lora_r:8}"], "--lora_config {lora_r:8}: not JSON"),
        (["--lora_config", '{"rank": 8}'], "--lora_config: rank 8 has no meaning here; the keys are r, lora_r"),
        (["--bone_config", '{"bone_mode": "bat"}'], "bone_mode 'bat' has no meaning here"),
        (["--zzzz", "1"], "unknown flag --zzzz; --help lists all flags"),
        (["--Micro_BSZ", "1"], "the nearest known flag is --micro_bsz"),
    ],
)
def test_what_cannot_be_read(words, says):
    """A flag that is like nothing is not answered with the nearest of all."""
    with pytest.raises(UsageError) as mistake:
        parse([*BASE, *words])
    assert says in str(mistake.value)


def test_a_lora_that_begins_as_pissa():
    """RWKV-PEFT's old commands say --lora --PISSA and mean one adapter."""
    assert parse([*BASE, "--lora", "--PISSA", "--svd_niter", "4"]).peft == "pissa"


def test_the_page_is_the_table():
    """If this breaks, docs/coming-from.md is old: PYTHONPATH=src python -m tests.support.elsewhere_page writes it."""
    assert PAGE.read_text(encoding="utf-8") == text()
