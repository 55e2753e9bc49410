"""The PEFT library as judge: the same tensors mean the same, and files go both ways."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from rwkv_rlhf.checkpoints.exporters.peft import from_peft, to_peft
from rwkv_rlhf.commands import merge
from rwkv_rlhf.layers.adaptation import Adaptation, seeded
from rwkv_rlhf.layers.adapters import ADAPTERS
from rwkv_rlhf.layers.linear import Embedding, Linear, StorageSpec

peft = pytest.importorskip("peft", reason="peft is a test dependency of its own (requirements-test.txt)")

IN, OUT, RANK = 96, 64, 8
AB = {"A": (4, 64), "B": (64, 4)}


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed, "matrix")) * 0.05


def pair(mode: str, config, adaptation: Adaptation):
    """Our layer, theirs, over the same matrix, with the same tensors."""
    dense = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=False))
    dense[0].weight.data.copy_(matrix(OUT, IN))
    theirs = peft.get_peft_model(dense, config).base_model.model[0]
    begun = {f"{part}_init": tensor.detach().clone() for part, tensor in parts_of(theirs).items()}
    layer = ADAPTERS[mode].linear.wrap(Linear(IN, OUT, device="meta"), adaptation)
    layer.load_weight(matrix(OUT, IN), StorageSpec(torch.float32, generator=seeded(0, "here"), initial=begun))
    for n, (part, tensor) in enumerate(parts_of(theirs).items()):
        moved = getattr(layer, part).data.add_(matrix(*tensor.shape, seed=5 + n))
        tensor.data.copy_(moved)
    return layer, theirs


def parts_of(theirs) -> dict[str, torch.nn.Parameter]:
    if hasattr(theirs, "miss_block"):
        return {"miss": theirs.miss_block["default"]}
    parts = {"lora_A": theirs.lora_A["default"].weight, "lora_B": theirs.lora_B["default"].weight}
    if "default" in theirs.lora_magnitude_vector:
        parts["lora_M"] = theirs.lora_magnitude_vector["default"].weight
    return parts


def lora(**options):
    return peft.LoraConfig(**({"r": RANK, "lora_alpha": 3 * RANK, "target_modules": ["0"]} | options))


def miss(rank: int, dropout: float = 0.0):
    return peft.MissConfig(r=rank, miss_dropout=dropout, target_modules=["0"])


CASES = {
    "lora": ("lora", lora(), Adaptation.make("lora", RANK, 3 * RANK)),
    "rslora": ("lora", lora(use_rslora=True), Adaptation.make("lora", RANK, 3 * RANK, rslora=True)),
    "lora-dropout": ("lora", lora(lora_dropout=0.3), Adaptation.make("lora", RANK, 3 * RANK, 0.3)),
    "dora": ("dora", lora(use_dora=True), Adaptation.make("dora", RANK, 3 * RANK)),
    "dora-rslora": ("dora", lora(use_dora=True, use_rslora=True), Adaptation.make("dora", RANK, 24, rslora=True)),
    "dora-dropout": ("dora", lora(use_dora=True, lora_dropout=0.3), Adaptation.make("dora", RANK, 3 * RANK, 0.3)),
    "pissa": ("pissa", lora(init_lora_weights="pissa", lora_alpha=RANK), Adaptation.make("pissa", RANK, 1)),
    "miss": ("miss", miss(RANK), Adaptation.make("miss", RANK, 1)),
    "miss-odd-rank": ("miss", miss(7), Adaptation.make("miss", 7, 1)),
    "miss-dropout": ("miss", miss(7, 0.3), Adaptation.make("miss", 7, 1, 0.3)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_layer_does_and_learns_what_peft_s_layer_does(case):
    """Adapters trained elsewhere must mean the same here, and train alike."""
    mode, config, adaptation = CASES[case]
    layer, theirs = pair(mode, config, adaptation)
    torch.testing.assert_close(layer.weight, theirs.base_layer.weight, rtol=1e-4, atol=1e-6)
    x, upstream = matrix(3, IN, seed=1), matrix(3, OUT, seed=2)
    results = []
    for each, parts in ((layer, {part: getattr(layer, part) for part in layer.tensors}), (theirs, parts_of(theirs))):
        torch.manual_seed(0)
        own = x.clone().requires_grad_()
        y = each.train()(own)
        y.backward(upstream)
        results.append({"y": y.detach(), "x": own.grad} | {part: p.grad for part, p in parts.items()})
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    theirs.merge()
    torch.testing.assert_close(layer.merged(), theirs.base_layer.weight.data, rtol=1e-4, atol=1e-6)


class Model(torch.nn.Module):
    """Two matrices and a table, with names as deep as those of a language model."""

    def __init__(self, linear, embedding):
        super().__init__()
        self.emb = embedding(50, IN)
        self.blocks = torch.nn.ModuleList([torch.nn.ModuleDict({"key": linear(IN, OUT)}) for _ in range(2)])

    def forward(self, tokens):
        x = self.emb(tokens)
        return self.blocks[0]["key"](x) + self.blocks[1]["key"](x)


SHAPES = {"emb": (50, IN), "blocks.0.key": (OUT, IN), "blocks.1.key": (OUT, IN)}


def our_model(adapted: dict[str, Adaptation]) -> tuple[Model, dict, dict]:
    """A model with adapters that have moved, their tensors, and their initial factors."""
    with torch.device("meta"):
        model = Model(Linear, Embedding)
    tensors, initial = {}, {}
    for n, (name, shape) in enumerate(SHAPES.items()):
        layer = model.get_submodule(name)
        if name in adapted:
            kinds = ADAPTERS[adapted[name].mode]
            layer = (kinds.embedding if name == "emb" else kinds.linear).wrap(layer, adapted[name])
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._modules[leaf] = layer
        layer.load_weight(matrix(*shape, seed=n), StorageSpec(torch.float32, generator=seeded(0, name)))
        for part in layer.tensors:
            tensor = getattr(layer, part)
            tensor.data.add_(matrix(*tensor.shape, seed=9 + n))
            tensors[f"{name}.{part}"] = tensor.detach()
        initial |= {f"{name}.{part}": getattr(layer, part) for part in layer.initial}
    return model, tensors, initial


def their_model(folder) -> torch.nn.Module:
    model = Model(lambda i, o: torch.nn.Linear(i, o, bias=False), torch.nn.Embedding)
    for n, (name, shape) in enumerate(SHAPES.items()):
        model.get_submodule(name).weight.data.copy_(matrix(*shape, seed=n))
    return peft.PeftModel.from_pretrained(model, folder)


def whole(mode: str, rank: int = RANK, **options) -> dict[str, Adaptation]:
    return {name: Adaptation.make(mode, rank, 2.0 * rank, **options) for name in SHAPES if name != "emb"}


FILES = {
    "lora of different ranks and scales, with a table": whole("lora")
    | {"blocks.1.key": Adaptation.make("lora", 4, 20), "emb": Adaptation.make("lora", 2, 2)},
    "one layer only": {"blocks.1.key": Adaptation.make("lora", 4, 20)},
    "rslora": whole("lora", rslora=True) | {"blocks.1.key": Adaptation.make("lora", 4, 20, rslora=True)},
    "dora": whole("dora"),
    "miss": whole("miss", 7),
    "pissa": whole("pissa") | {"emb": Adaptation.make("pissa", 3, 1)},
    "pissa beside lora": whole("pissa") | {"blocks.1.key": Adaptation.make("lora", 4, 20)},
}


@pytest.mark.parametrize("case", FILES)
def test_a_converted_adapter_runs_in_peft_and_comes_back(case, tmp_path):
    """A converted file that loads but answers otherwise is worse than none."""
    adapted = FILES[case]
    model, tensors, initial = our_model(adapted)
    found, config, left = to_peft(tensors | {"blocks.0.ln1.weight": torch.ones(3)}, adapted, initial)
    assert left == ["blocks.0.ln1.weight"]
    save_file(found, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tokens = torch.tensor([[0, 7, 49]])
    theirs = their_model(tmp_path).eval()
    torch.testing.assert_close(model.eval()(tokens), theirs(tokens), rtol=1e-4, atol=1e-6)

    theirs.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    back, how = from_peft(load_file(tmp_path / "saved" / "adapter_model.safetensors"), config)
    if "pissa" in case:
        assert {a.mode for a in how.values()} == {"lora"} and how["blocks.0.key"].rank == 2 * RANK
        again, names, _ = our_model(how)
        for name, tensor in back.items():
            again.get_parameter(name).data.copy_(tensor)
        torch.testing.assert_close(again.eval()(tokens), theirs(tokens), rtol=1e-4, atol=1e-6)
        assert back.keys() == names.keys()
    else:
        assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in back)
        assert {n: (a.mode, a.rank) for n, a in how.items()} == {n: (a.mode, a.rank) for n, a in adapted.items()}
        assert all(how[name].scaling == pytest.approx(adapted[name].scaling) for name in adapted)


@pytest.mark.parametrize("layers", [["key"], ["key", "emb"]], ids=["table alone", "table with an adapter"])
def test_a_folder_saved_with_the_embedding_is_taken_if_the_table_is_the_base_s(layers, script, base_model, tmp_path):
    """PEFT's save_embedding_layers=True writes the base's table too: that is no reason to refuse an adapter."""
    base = torch.load(base_model, weights_only=True)
    table = base["emb.weight"]
    model = Model(lambda i, o: torch.nn.Linear(i, o, bias=False), torch.nn.Embedding)
    model.emb = torch.nn.Embedding(*table.shape, _weight=table.clone())
    model.blocks = torch.nn.ModuleList(
        torch.nn.ModuleDict({"att": torch.nn.ModuleDict({"key": torch.nn.Linear(64, 64, bias=False)})}) for _ in "ab"
    )
    model.get_input_embeddings, model.get_output_embeddings = lambda: model.emb, lambda: None
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=layers))
    theirs.save_pretrained(tmp_path / "peft", save_embedding_layers=True)
    file = tmp_path / "peft" / "adapter_model.safetensors"
    saved = load_file(file)
    (name,) = [name for name in saved if "lora" not in name]  # PEFT wrote the table
    words = ("--base_model", base_model, "--from_peft", tmp_path / "peft", "--output", tmp_path / "rwkv-0.pth")
    status, _, err = script(merge.main, *words)
    assert status == 0, err
    assert not [name for name in torch.load(tmp_path / "rwkv-0.pth", weights_only=True) if name.endswith("weight")]
    save_file(saved | {name: saved[name] + 0.1}, file)
    status, _, err = script(merge.main, *words)
    assert status == 2 and "is another table than that of the base model" in err and "modules_to_save" in err


def test_a_table_that_was_trained_whole_comes_along(script, base_model, tmp_path):
    """If this breaks, what modules_to_save names is left out, and the model answers as before its training."""
    base = torch.load(base_model, weights_only=True)
    key = {f"base_model.model.blocks.0.att.key.lora_{side}.weight": torch.ones(shape) for side, shape in AB.items()}
    (tmp_path / "peft").mkdir()
    save_file(
        key | {"base_model.model.emb.weight": base["emb.weight"] + 1}, tmp_path / "peft" / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "lora_alpha": 4, "modules_to_save": ["emb"]}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    words = ("--base_model", base_model, "--from_peft", tmp_path / "peft", "--output", tmp_path / "rwkv-0.pth")
    status, _, err = script(merge.main, *words)
    assert status == 0, err
    assert torch.equal(torch.load(tmp_path / "rwkv-0.pth", weights_only=True)["emb.weight"], base["emb.weight"] + 1)


def test_what_peft_cannot_hold_is_refused():
    """A silent half of an adapter would be another model."""
    _, tensors, initial = our_model(whole("lora") | {"blocks.1.key": Adaptation.make("dora", 4, 4)})
    mixed = whole("lora") | {"blocks.1.key": Adaptation.make("dora", 4, 4)}
    with pytest.raises(ValueError, match="cannot hold modes lora, dora together"):
        to_peft(tensors, mixed)
    with pytest.raises(ValueError, match="mode bone has no form"):
        to_peft(our_model(whole("bone"))[1], whole("bone"))
    with pytest.raises(ValueError, match=r"blocks\.0\.key\.lora_A_init is missing"):
        to_peft(our_model(whole("pissa"))[1], whole("pissa"), initial)
    _, tensors, _ = our_model(whole("dora"))
    tensors["blocks.0.key.lora_M"] = torch.ones(1, IN)
    with pytest.raises(ValueError, match=r"blocks\.0\.key\.lora_M has one length a column"):
        to_peft(tensors, whole("dora"))
    uneven = whole("miss") | {"blocks.1.key": Adaptation.make("miss", 4, 4)}
    with pytest.raises(ValueError, match="one rank for all layers"):
        to_peft(our_model(uneven)[1], uneven)
    with pytest.raises(ValueError, match="no adapter"):
        to_peft({}, {})


@pytest.mark.parametrize(
    "config, words",
    [
        ({"peft_type": "VERA"}, "peft_type VERA is not one of LORA, MISS"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}, "begun as pissa_niter_4 belongs to a changed"),
        ({"peft_type": "MISS", "init_weights": "bat"}, "begun as bat"),
        ({"peft_type": "LORA", "fan_in_fan_out": True}, "fan_in_fan_out has no form"),
        ({"peft_type": "LORA", "init_lora_weights": "gaussian"}, "holds no adapter"),
    ],
)
def test_files_of_peft_that_mean_something_else_are_refused(config, words):
    """Read as if they were ours, they would be merged into nonsense."""
    with pytest.raises(ValueError, match=words):
        from_peft({"base_model.model.head.weight": matrix(4, IN)}, config | {"lora_alpha": 4})
