"""Matrices: every adapter on every storage, judged by plain products in float64."""

import math
import sys
from dataclasses import replace

import pytest
import torch

from src.layers import ADAPTERS
from src.layers.adaptation import Adaptation, seeded
from src.layers.linear import Embedding, Linear, Placement
from src.layers.placing import apply_plan, plan_layout
from src.layers.stores import STORES, store_class
from src.model import VERSIONS
from src.model.checkpoint import build_model, kept, trainable
from src.plan import make_plan
from tests.conftest import any_initial_tensors

IN, OUT, RANK = 96, 64, 8  # rows of 96 do not end where the blocks of 64 of 4-bit storage do

adapters = pytest.mark.parametrize("mode", ADAPTERS)
stores = pytest.mark.parametrize("store", STORES)


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def adapted(mode: str, store: str, *, dtype=torch.float32, learnt: bool = True, dropout: float = 0.0) -> Linear:
    """An adapter over a random matrix; with `learnt` its own tensors are random too."""
    if store != "none":
        pytest.importorskip("bitsandbytes")
    plain = Linear(IN, OUT, device="meta")
    layer = ADAPTERS[mode].linear.over(plain, Adaptation.make(mode, RANK, 2.0 * RANK, dropout))
    layer.take(matrix(OUT, IN), Placement(dtype, store=store, generator=seeded(0, "here")))
    if learnt:
        with torch.no_grad():
            for part in layer.tensors:
                getattr(layer, part).add_(matrix(*getattr(layer, part).shape, seed=5))
    return layer


@adapters
@stores
def test_an_untrained_adapter_is_the_base_model(mode, store):
    """Training would start from a damaged model."""
    layer = adapted(mode, store, learnt=False)
    x = matrix(3, 5, IN, seed=1)
    torch.testing.assert_close(layer(x), x @ layer.dense().T)
    torch.testing.assert_close(layer.merged(), layer.dense(torch.float32).detach())


@adapters
@stores
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merged_matrix_does_what_the_layer_does(mode, store, dtype):
    """A merged model would answer otherwise than what was trained."""
    layer = adapted(mode, store, dtype=dtype)
    x = matrix(3, 5, IN, seed=1).to(dtype)
    wanted = x.double() @ layer.merged().double().T
    error = (layer(x).double() - wanted).norm() / wanted.norm()
    assert layer.merged().dtype == torch.float32
    assert layer(x).dtype == dtype
    assert error < (1e-6 if dtype == torch.float32 else 1e-2)


@adapters
@stores
def test_only_the_adapter_learns_and_gradients_reach_the_input(mode, store):
    """A packed layer in the middle of the model would cut off everything below it."""
    layer = adapted(mode, store)
    x = matrix(3, 5, IN, seed=1).requires_grad_()
    upstream = matrix(3, 5, OUT, seed=2)
    (layer(x) * upstream).sum().backward()
    learning = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert learning == set(layer.tensors)
    assert all(getattr(layer, name).grad.abs().sum() > 0 for name in layer.tensors)
    torch.testing.assert_close(x.grad, upstream @ layer.merged(), rtol=1e-4, atol=1e-6)


@adapters
@stores
def test_the_state_dict_holds_the_tradition_s_names_only(mode, store):
    """Other programs read these files by name; packed matrices have no place in them."""
    layer = adapted(mode, store)
    assert set(layer.state_dict()) == {*layer.tensors, *(["weight"] if store == "none" else [])}


@stores
def test_a_packed_matrix_is_never_kept_dense(store):
    """Memory would be that of the dense model: autograd must unpack again in backward, not hold the matrix."""
    layer = adapted("lora", store)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.shape) or t, lambda t: t):
        y = layer(matrix(3, IN, seed=1).requires_grad_())
    if store != "none":
        assert (OUT, IN) not in held and (IN, OUT) not in held
        assert sum(b.numel() * b.element_size() for b in layer.store.buffers()) < OUT * IN * 0.6
    assert y.requires_grad


def worst_step(store: str) -> float:
    """Half the widest gap between the levels of a storage, relative to the largest value of a block."""
    levels = {"nf4": [-1.0, -0.6962], "fp4": [-1.0, -0.6667]}[store]
    return (levels[1] - levels[0]) / 2


@pytest.mark.parametrize("store", [name for name in STORES if name != "none"])
@pytest.mark.parametrize("shape", [(OUT, IN), (3, 7), (1, 64), (70, 1000)])
def test_packing_errs_by_half_a_level_at_most(store, shape):
    """Blocks that are mixed up, or the tail of a matrix that is lost, would be a silent other model."""
    pytest.importorskip("bitsandbytes")
    weight = matrix(*shape)
    back = STORES[store].pack(weight).unpack()
    assert back.shape == weight.shape
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    largest = flat.abs().amax(1, keepdim=True).expand_as(flat).flatten()[: weight.numel()].view(shape)
    assert ((back - weight).abs() <= largest * worst_step(store) * 1.001 + 1e-7).all()


@pytest.mark.parametrize("store", [name for name in STORES if name != "none"])
def test_packing_does_not_depend_on_the_dtype_or_on_chunks(store, monkeypatch):
    """The merged model and the trained one pack the same file; they must get the same matrix."""
    pytest.importorskip("bitsandbytes")
    weight = matrix(70, 1000).bfloat16()
    packed = STORES[store].pack(weight)
    monkeypatch.setattr("src.layers.nf4.CHUNK", 1024)
    again = STORES[store].pack(weight.float())
    assert torch.equal(packed.packed, again.packed) and torch.equal(packed.absmax, again.absmax)


@pytest.mark.parametrize("store", [name for name in STORES if name != "none"])
def test_a_cast_of_the_model_leaves_block_scales_alone(store):
    """`model.to(bfloat16)`, which trainers do, would round the scale of every block."""
    layer = adapted("lora", store)
    before = layer.dense()
    layer.to(torch.bfloat16)
    assert layer.lora_A.dtype == torch.bfloat16
    assert torch.equal(layer.dense(), before)


def test_dropout_acts_in_training_only_and_keeps_the_mean():
    """Evaluation with dropout on would be noise."""
    layer = adapted("lora", "none", dropout=0.5)
    x = matrix(4, IN, seed=1)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    torch.manual_seed(0)
    runs = torch.stack([layer(x) for _ in range(2000)])
    assert not torch.equal(runs[0], runs[1])
    torch.testing.assert_close(runs.mean(0), x @ layer.merged().T, atol=0.02, rtol=0)


def test_scaling_is_alpha_over_rank_or_its_root():
    """A wrong scale is a wrong learning rate, and a wrong merge."""
    assert Adaptation.make("lora", 16, 32).scaling == 2.0
    assert Adaptation.make("lora", 16, 32, rslora=True).scaling == 8.0


def test_first_factors_are_kaiming_and_depend_on_the_name_only():
    """Two runs with one seed must start alike whatever else the plan adapts."""
    layer = adapted("lora", "none", learnt=False)
    again = adapted("lora", "none", learnt=False)
    bound = 1 / math.sqrt(IN)
    assert torch.equal(layer.lora_A, again.lora_A)
    assert 0.9 * bound < layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not layer.lora_B.any()
    assert not torch.equal(torch.rand(9, generator=seeded(0, "a")), torch.rand(9, generator=seeded(0, "b")))


@pytest.mark.parametrize("mode", [mode for mode, kinds in ADAPTERS.items() if kinds.embedding])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_s_adapter_starts_as_the_base_and_merges(mode, dtype):
    """The adapter of an embedding row was once silently not loaded."""
    table = ADAPTERS[mode].embedding.over(Embedding(50, 16, device="meta"), Adaptation.make(mode, 4, 8))
    table.take(matrix(50, 16), Placement(dtype, generator=seeded(0, "emb")))
    tokens = torch.tensor([[3, 3, 49], [0, 1, 2]])
    assert torch.equal(table(tokens), table.weight[tokens])
    with torch.no_grad():
        for part in table.tensors:
            getattr(table, part).add_(matrix(*getattr(table, part).shape, seed=3))
    torch.testing.assert_close(table(tokens, torch.float32), table.merged()[tokens])
    table(tokens).float().sum().backward()
    assert table.weight.grad is None and all(getattr(table, part).grad.abs().sum() > 0 for part in table.tensors)


def test_bfloat16_activations_over_float32_masters():
    """A trained float32 matrix must serve a bfloat16 run, with its gradient in float32."""
    layer = Linear(IN, OUT)
    layer.take(matrix(OUT, IN), Placement(torch.float32))
    layer.weight.requires_grad_()
    y = layer(matrix(4, IN, seed=1).bfloat16())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32


def test_lora_agrees_with_the_peft_library():
    """Adapters trained elsewhere must mean the same here."""
    peft = pytest.importorskip("peft", reason="peft is a test dependency of its own (requirements-test.txt)")
    layer = adapted("lora", "none")
    dense = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=False))
    dense[0].weight.data.copy_(layer.weight)
    other = peft.get_peft_model(dense, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"]))
    theirs = other.base_model.model[0]
    theirs.lora_A["default"].weight.data.copy_(layer.lora_A)
    theirs.lora_B["default"].weight.data.copy_(layer.lora_B)
    x = matrix(3, IN, seed=1)
    torch.testing.assert_close(layer(x), theirs(x))
    theirs.merge()
    torch.testing.assert_close(layer.merged(), theirs.base_layer.weight.data)


def test_missing_bitsandbytes_is_one_sentence_with_the_way_out(monkeypatch):
    """A user without it must learn which pip line or which flag helps."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"pip install bitsandbytes\S* or pass --quant 0"):
        STORES["nf4"].pack(matrix(4, 64))


def test_an_unknown_storage_names_the_legal_ones():
    with pytest.raises(ValueError, match=r"--quant_mode int3: .*none, nf4, fp4"):
        store_class("int3")


def tiny(version: str = "x070") -> dict[str, torch.Tensor]:
    tensors = any_initial_tensors(version, 2, 64, 40, 32, 0)
    return {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in tensors.items()}


def lora_plan(**changes):
    return make_plan("lora", 2, **({"rank": 4, "alpha": 8.0, "lr_init": 1e-4, "lr_final": 1e-5} | changes))


def test_a_plan_decides_what_trains_what_is_packed_and_in_which_dtype():
    """bfloat16 LayerNorms never move at these learning rates; packed emb or full rows would be another model."""
    pytest.importorskip("bitsandbytes")
    plan = lora_plan(layers="1")
    model, report = build_model(tiny(), compute_dtype=torch.bfloat16, plan=plan, quant="nf4")
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
    pytest.importorskip("bitsandbytes")
    plan = make_plan("full", 2, lr_init=1e-4, lr_final=1e-5)
    model, report = build_model(tiny(), compute_dtype=torch.bfloat16, plan=plan, quant="nf4")
    assert not report.layout.packed and all(p.requires_grad for p in model.parameters())


def test_limited_lora_trains_adapters_only():
    model, _ = build_model(tiny(), compute_dtype=torch.float32, plan=lora_plan(), limited=True)
    assert all("lora_" in name for name in trainable(model))


def test_a_row_that_finds_nothing_to_do_is_reported():
    """A profile that silently trains nothing costs the user a night."""
    plan = lora_plan()
    plan.rows["1"] = replace(plan.rows["1"], reject=("blocks",))
    model, report = build_model(tiny(), compute_dtype=torch.float32, plan=plan)
    assert report.layout.unmatched == ("1",) and "1" in report.lines()[-1]
    assert not any(name.startswith("blocks.1.") for name in trainable(model))


def rejecting(*parts: str, layer: str = "1"):
    plan = lora_plan(dropout=0.0)
    plan.rows[layer] = replace(plan.rows[layer], reject=parts)
    return plan


def test_a_rejected_part_that_matches_nothing_is_reported():
    """`att.recptance` would freeze nothing, and nobody would know."""
    plan = rejecting("att.recptance", "att.receptance", "ln2", "lora_A", "head", "blocks.0")
    model, report = build_model(tiny(), compute_dtype=torch.float32, plan=plan)
    said = tuple(f"1 (RejectParts {part})" for part in ("att.recptance", "head", "blocks.0"))
    assert report.layout.unmatched == said and ", ".join(said) in report.lines()[-1]
    plan = rejecting("lora_A", "emb.weight", layer="emb")  # a frozen row has no adapter
    assert plan_layout(model, plan).unmatched == ("emb (RejectParts lora_A)",)


def test_rejected_factors_of_an_adapter_stay_as_they_began():
    """`lora_A` in RejectParts was accepted and did nothing."""
    model, report = build_model(tiny(), compute_dtype=torch.float32, plan=rejecting("key.lora_A"))
    held = {"blocks.1.att.key.lora_A", "blocks.1.ffn.key.lora_A"}
    learning = trainable(model)
    assert not held & learning.keys() and "blocks.1.att.key.lora_B" in learning
    assert "blocks.0.att.key.lora_A" in learning and "blocks.1.att.value.lora_A" in learning
    assert kept(model).keys() == learning.keys() | held
    assert report.trained == sum(p.numel() for p in learning.values())
    model.head(model(torch.arange(24).view(2, 12))[0]).logsumexp(-1).sum().backward()
    assert all(dict(model.named_parameters())[name].grad is None for name in held)


def test_an_adapter_that_may_not_learn_is_left_out():
    """It would cost memory and do nothing."""
    model, report = build_model(tiny(), compute_dtype=torch.float32, plan=rejecting("lora_"))
    assert report.layout.adapted and not any(name.startswith("blocks.1.") for name in report.layout.adapted)
    assert "blocks.1.ln1.weight" in trainable(model)


@stores
@pytest.mark.parametrize("version", VERSIONS)
def test_an_adapted_model_starts_as_the_plain_one_and_all_that_trains_gets_a_gradient(version, store):
    if store != "none":
        pytest.importorskip("bitsandbytes")
    tensors, tokens = tiny(version), torch.arange(24).view(2, 12)
    plain, _ = build_model(tensors, compute_dtype=torch.float32, quant=store)
    options = {"compute_dtype": torch.float32, "plan": lora_plan(dropout=0.0), "quant": store}
    model, _ = build_model(tensors, **options)
    hidden, _ = model(tokens)
    torch.testing.assert_close(model.head(hidden), plain.head(plain(tokens)[0]))
    model.head(hidden).logsumexp(-1).sum().backward()
    assert [name for name, p in trainable(model).items() if p.grad is None] == []


def test_a_model_that_is_already_there_is_adapted_the_same_way():
    """`apply_plan` on a finished model and `build_model` from a file are two doors to one room."""
    tensors = tiny()
    model, _ = build_model(tensors, compute_dtype=torch.float32)
    apply_plan(model, lora_plan(), compute_dtype=torch.float32, seed=7)
    other, _ = build_model(tensors, compute_dtype=torch.float32, plan=lora_plan(), seed=7)
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]) and mine[name].requires_grad == theirs[name].requires_grad, name
