"""One table of facts: what it says of a class is what the class does, and nothing is listed a second time."""

import re

import pytest
import torch

from rwkv_rlhf.layers.adapters import ADAPTERS
from rwkv_rlhf.layers.stores import STORES
from rwkv_rlhf.model import VERSIONS
from rwkv_rlhf.model.blocks import Block
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import settings
from rwkv_rlhf.settings.exports import EXPORTS
from rwkv_rlhf.settings.field import choices_of
from rwkv_rlhf.settings.groups import GROUPS, grouped_settings
from rwkv_rlhf.settings.help import EXAMPLES
from rwkv_rlhf.settings.implementations import load
from rwkv_rlhf.settings.optimizers import OPTIMIZERS


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_what_its_entry_says(name):
    """If this breaks, an adapter is saved, decayed, merged or exported as if it had other tensors."""
    facts, classes = tables.ADAPTERS[name], ADAPTERS[name]
    for kind in (classes.linear, classes.embedding):
        if kind is not None:
            assert (kind.tensors, kind.factor_b, kind.initial) == (facts.tensors, facts.factor_b, facts.initial)
    assert set(facts.decays) <= set(facts.tensors) and set(facts.factor_b) <= set(facts.tensors)
    assert not facts.sign or facts.sign in facts.tensors


def test_signs_tell_adapters_apart():
    """If this breaks, a checkpoint without a sidecar is read as another adapter."""
    signs = [facts.sign for facts in tables.ADAPTERS.values() if facts.sign]
    assert len(signs) == len(set(signs))


@pytest.mark.parametrize("name", STORES)
def test_a_storage_takes_the_bytes_that_its_entry_says(name):
    """If this breaks, the memory that a dry run prints is not what packed matrices take."""
    packed = STORES[name].pack(torch.randn(64, 1024))
    assert STORES[name].mode == name
    assert packed.bytes() / (64 * 1024) == pytest.approx(tables.STORAGES[name].bytes_per_number, rel=0.01)


@pytest.mark.parametrize("name", VERSIONS)
def test_a_version_has_a_block(name):
    """If this breaks, a version that the command line knows has no model."""
    assert issubclass(VERSIONS[name], Block)
    assert re.fullmatch(r"x0\d\da?", name) and tables.VERSIONS[name].activations > 0


@pytest.mark.parametrize("table", [tables.STRATEGIES, OPTIMIZERS, EXPORTS], ids=["strategy", "optim", "export"])
def test_what_is_built_can_be_loaded(table):
    """If this breaks, a run ends in an import error after its model was loaded."""
    for facts in table.values():
        assert not facts.implementation or callable(load(facts.implementation))


def test_settings_of_losses_exist_once():
    """If this breaks, a flag belongs to two losses that have nothing in common, or to none and is read by nobody."""
    for facts in tables.LOSSES.values():
        assert len(facts.settings) == len(set(facts.settings)) and set(facts.settings) <= set(settings())
    alone = [name for facts in tables.LOSSES.values() if facts.data != "prompts" for name in facts.settings]
    assert len(alone) == len(set(alone))


def test_the_help_knows_every_setting():
    """If this breaks, a flag is in no group of --help, or its example belongs to a flag that is gone."""
    grouped = [name for names in grouped_settings().values() for name in names]
    assert grouped == list(settings()) and all(grouped_settings().values())
    assert set(EXAMPLES) <= set(settings()) and {about.first for about in GROUPS.values()} <= set(settings())


@pytest.mark.parametrize("word", [*GROUPS, "lr_init", "rlhf_train_file", "my_testing", "dpo", "prefix_tuning"])
def test_help_of_a_word(word, script):
    """`--help GROUP` and `--help FLAG` print text, default, range and an example, and leave with 0."""
    from rwkv_rlhf.commands import train

    status, out, err = script(train.main, "--help", word)
    assert status == 0 and not err and word.split("_")[0] in out
    if word == "lr_init":
        assert "default:  0.0001" in out and "range:    >= 0" in out and "example:" in out


def test_help_of_an_unknown_word_names_the_near_ones(script):
    """If this breaks, a typing mistake behind --help ends in a traceback or a list of two hundred flags."""
    from rwkv_rlhf.commands import train

    status, _, err = script(train.main, "--help", "lr_inti")
    assert status == 2 and "near it: lr_init" in err and "the groups are model" in err


def test_choices_follow_the_tables(monkeypatch):
    """If this breaks, a new entry of a table is refused by the command line."""
    monkeypatch.setitem(tables.STORAGES, "toy", tables.STORAGES["int8"])
    monkeypatch.setitem(tables.ADAPTERS, "toy", tables.ADAPTERS["miss"])
    assert "toy" in choices_of(settings()["quant_mode"]) and "toy" in choices_of(settings()["peft"])
