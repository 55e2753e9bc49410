"""What a run takes from the adapter that it goes on with."""

import json
import re

import pytest
import torch

from rwkv_rlhf.checkpoints.sidecar import sidecar_of, write_sidecar
from rwkv_rlhf.layers.adaptation import Adaptation
from rwkv_rlhf.layers.placing import Layout
from rwkv_rlhf.settings.command_line import parse, spelled
from rwkv_rlhf.training.adapter_choice import with_adapter

SIDES = ("lora_A", "lora_B")
NORM, SMALL, STATE = "blocks.0.ln1.weight", "blocks.0.att.x_r", "blocks.0.att.time_state"
MATRICES = ("blocks.0.att.key", "blocks.1.att.key", "blocks.0.ffn.key", "blocks.1.ffn.key")


@pytest.fixture
def saved(tmp_path):
    """saved(adapted, others, quant) writes a checkpoint with its sidecar."""

    def write(adapted, others=(NORM, SMALL), quant="none"):
        path = tmp_path / "rwkv-0.pth"
        own = {f"{name}.{side}": torch.ones(2, 2) for name in adapted for side in SIDES}
        torch.save(own | {name: torch.ones(2) for name in others}, path)
        packed = frozenset(adapted) if quant != "none" else frozenset()
        write_sidecar(sidecar_of("x070", Layout(adapted, packed, frozenset(others), quant), None, None), path)
        return path

    return write


def taken(path, *words):
    return with_adapter(parse(["--load_model", "M", "--data_file", "a.jsonl", "--load_adapter", str(path), *words]))


def lora(rank=4, alpha=8.0, names=MATRICES, **more):
    return dict.fromkeys(names, Adaptation.make("lora", rank, alpha, 0.05, **more))


def test_what_was_not_typed_is_that_of_the_adapter(saved):
    """If this breaks, going on with an adapter asks for every flag that it was trained with."""
    config = taken(saved(lora(), quant="int8"))
    assert (config.peft, config.lora_r, config.lora_alpha, config.lora_dropout) == ("lora", 4, 8.0, 0.05)
    assert config.storage == "int8" and not config.rslora and not config.limited_lora
    assert sorted(config.lora_parts.split(",")) == ["att", "ffn", "ln", "time"] and config.lora_layers == "0 1"
    assert taken(saved(lora()), "--lora_dropout", "0.2", "--quant", "1").storage == "nf4"  # typed words stay
    config = taken(saved(lora(16, 8.0, rslora=True), others=()))
    assert config.rslora and config.limited_lora and config.storage == "none"
    config = taken(saved(lora(names=("blocks.1.att.key",)), others=("blocks.1.ln1.weight",)))
    assert (config.lora_parts, config.lora_layers) == ("att,ln", "1")
    config = taken(saved({}, others=(STATE, "blocks.0.ffn.shift_state"), quant="nf4"))
    assert (config.peft, config.state, config.state_shift, config.storage) == ("state", True, True, "nf4")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lora_r", "8"], r"--lora_r 8, but --load_adapter \S+ was trained with rank 4: leave --lora_r out"),
        (["--lora_alpha", "4"], "--lora_alpha 4.0, but .* with alpha 8.0"),
        (["--peft", "bone"], "--peft bone, but .* with mode lora"),
    ],
)
def test_another_mode_rank_or_alpha_is_one_sentence(saved, words, said):
    """If this breaks, the mistake ends in shapes of tensors that nobody asked about."""
    path = saved(lora())
    with pytest.raises(ValueError) as found:
        taken(path, *words)
    assert re.search(said, spelled(str(found.value)))


def test_what_flags_cannot_say_asks_for_the_profile(saved):
    """If this breaks, layers with ranks of their own are read as if they had one."""
    path = saved(lora(names=MATRICES[:2]) | lora(8, names=MATRICES[2:]))
    with pytest.raises(ValueError, match="not all adapted alike: give that profile again"):
        taken(path)
    assert taken(path, "--layer_profile", "p.csv").lora_r == 8  # the default: the profile will say
    for other in ("emb.weight", "blocks.0.att.value.weight"):
        with pytest.raises(ValueError, match="layer_profile"):
            taken(saved(lora(), others=(other,)))


def test_without_a_sidecar_nothing_is_taken(saved):
    """If this breaks, a rank is typed for an adapter of unknown kind, and has no effect."""
    path = saved(lora())
    path.with_suffix(".json").unlink()
    assert taken(path, "--peft", "lora", "--lora_r", "4").lora_alpha == 32
    with pytest.raises(ValueError, match=r"no \.json beside it, so"):
        taken(path, "--lora_r", "4")


def test_a_plan_of_all_blocks_is_written_without_their_numbers(saved):
    """If this breaks, a run that goes on in its own folder counts as one with other settings."""
    path = saved(lora())
    side = path.with_suffix(".json")
    rows = [{"layer": name} for name in ("emb", "0", "1", "head")]
    side.write_text(json.dumps(json.loads(side.read_text()) | {"plan": rows}))
    assert taken(path).lora_layers == ""
