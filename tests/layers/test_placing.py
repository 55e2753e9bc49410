"""What a plan makes of a model: which matrices are adapted, packed, trained."""

from dataclasses import replace

import pytest
import torch

from rwkv_rlhf.checkpoints.loading import BuildOptions, build_model, checkpoint_tensors, trainable
from rwkv_rlhf.layers.adapters import ADAPTERS
from rwkv_rlhf.layers.linear import Linear
from rwkv_rlhf.layers.stores import STORES
from rwkv_rlhf.model import VERSIONS
from rwkv_rlhf.model.layout import plan_layout
from rwkv_rlhf.plan import make_plan
from tests.support.models import any_initial_tensors

stores = pytest.mark.parametrize("store", ["none", *STORES])


def tiny(version: str = "x070") -> dict[str, torch.Tensor]:
    tensors = any_initial_tensors(version, 2, 64, 40, 32, 0)
    return {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in tensors.items()}


def lora_plan(**changes):
    return make_plan("lora", 2, **({"rank": 4, "alpha": 8.0, "lr_init": 1e-4, "lr_final": 1e-5} | changes))


def test_a_plan_decides_what_trains_what_is_packed_and_in_which_dtype():
    """bfloat16 LayerNorms never move at these learning rates; packed emb or full rows would be another model."""
    pytest.importorskip("bitsandbytes")
    plan = lora_plan(layers="1")
    model, report = build_model(tiny(), BuildOptions(torch.bfloat16, plan=plan, quant="nf4"))
    learning = trainable(model)
    assert {name for name in learning if "lora_" in name} == {
        f"blocks.1.{part}.lora_{side}"
        for part in ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
        for side in "AB"
    }
    assert "blocks.1.ln1.weight" in learning and "blocks.1.att.w1" in learning and "blocks.0.ln1.weight" not in learning
    assert {p.dtype for p in learning.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert model.head.weight is None and model.blocks[0].ffn.key.weight is None and model.emb.weight is not None
    assert report.layout.packed == {name for name, layer in model.named_modules() if isinstance(layer, Linear)}
    assert report.trained == sum(p.numel() for p in learning.values())
    assert report.dtypes["head.weight"] == torch.float32


def test_full_rows_are_never_packed():
    """If this breaks, matrices that shall train are quantised and cannot."""
    pytest.importorskip("bitsandbytes")
    plan = make_plan("full", 2, lr_init=1e-4, lr_final=1e-5)
    model, report = build_model(tiny(), BuildOptions(torch.bfloat16, plan=plan, quant="nf4"))
    assert not report.layout.packed and all(p.requires_grad for p in model.parameters())


def test_limited_lora_trains_adapters_only():
    """If this breaks, --limited_lora 1 changes more of the model than it says."""
    model, _ = build_model(tiny(), BuildOptions(torch.float32, plan=lora_plan(), limited=True))
    assert all("lora_" in name for name in trainable(model))


def test_a_row_that_finds_nothing_to_do_is_reported():
    """A profile that silently trains nothing costs the user a night."""
    plan = lora_plan()
    plan.rows["1"] = replace(plan.rows["1"], reject=("blocks",))
    model, report = build_model(tiny(), BuildOptions(torch.float32, plan=plan))
    assert report.layout.unmatched == ("1",) and "1" in report.lines()[-1]
    assert not any(name.startswith("blocks.1.") for name in trainable(model))


def rejecting(*parts: str, layer: str = "1"):
    plan = lora_plan(dropout=0.0)
    plan.rows[layer] = replace(plan.rows[layer], reject=parts)
    return plan


def test_a_rejected_part_that_matches_nothing_is_reported():
    """`att.recptance` would freeze nothing, and nobody would know."""
    plan = rejecting("att.recptance", "att.receptance", "ln2", "lora_A", "head", "blocks.0")
    model, report = build_model(tiny(), BuildOptions(torch.float32, plan=plan))
    said = tuple(f"1 (RejectParts {part})" for part in ("att.recptance", "head", "blocks.0"))
    assert report.layout.unmatched == said and ", ".join(said) in report.lines()[-1]
    plan = rejecting("lora_A", "emb.weight", layer="emb")  # a frozen row has no adapter
    assert plan_layout(model, plan).unmatched == ("emb (RejectParts lora_A)",)


def test_rejected_factors_of_an_adapter_stay_as_they_began():
    """`lora_A` in RejectParts was accepted and did nothing."""
    model, report = build_model(tiny(), BuildOptions(torch.float32, plan=rejecting("key.lora_A")))
    held = {"blocks.1.att.key.lora_A", "blocks.1.ffn.key.lora_A"}
    learning = trainable(model)
    assert not held & learning.keys() and "blocks.1.att.key.lora_B" in learning
    assert "blocks.0.att.key.lora_A" in learning and "blocks.1.att.value.lora_A" in learning
    assert checkpoint_tensors(model).keys() == learning.keys() | held
    assert report.trained == sum(p.numel() for p in learning.values())
    model.head(model(torch.arange(24).view(2, 12))[0]).logsumexp(-1).sum().backward()
    assert all(dict(model.named_parameters())[name].grad is None for name in held)


def test_an_adapter_that_may_not_learn_is_left_out():
    """It would cost memory and do nothing."""
    model, report = build_model(tiny(), BuildOptions(torch.float32, plan=rejecting("lora_")))
    assert report.layout.adapted and not any(name.startswith("blocks.1.") for name in report.layout.adapted)
    assert "blocks.1.ln1.weight" in trainable(model)


# every adapter in one version, every version with one adapter
MODELS = [*((v, "lora") for v in VERSIONS), *(("x070", m) for m in ADAPTERS if m != "lora")]


@stores
@pytest.mark.parametrize("version, mode", MODELS)
def test_an_adapted_model_starts_as_the_plain_one_and_all_that_trains_gets_a_gradient(version, mode, store):
    """If this breaks, training begins from another model than the base, or a part that shall learn does not."""
    if store in ("nf4", "fp4"):
        pytest.importorskip("bitsandbytes")
    tensors, tokens = tiny(version), torch.arange(24).view(2, 12)
    plain, _ = build_model(tensors, BuildOptions(torch.float32, quant=store))
    plan = make_plan(mode, 2, rank=4, alpha=8.0, dropout=0.0, lr_init=1e-4, lr_final=1e-5)
    model, _ = build_model(tensors, BuildOptions(torch.float32, plan=plan, quant=store))
    hidden, _ = model(tokens)
    if mode != "pissa" or store == "none":  # PiSSA packs less of the matrix, and errs less
        torch.testing.assert_close(model.head(hidden), plain.head(plain(tokens)[0]))
    model.head(hidden).logsumexp(-1).sum().backward()
    assert [name for name, p in trainable(model).items() if p.grad is None] == []
