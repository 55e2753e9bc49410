"""Products with a model's matrices on a CPU: each way against float64, and which of them is taken."""

import pytest
import torch
from torch.nn import functional as F

from rwkv_rlhf.layers.linear import Linear, StorageSpec
from rwkv_rlhf.losses.head import Product
from rwkv_rlhf.ops import product_table, product_ways
from rwkv_rlhf.ops.product_table import KNOWN, fastest, figures_of, kept_seconds, ways_for
from rwkv_rlhf.ops.product_ways import CLASSES, LIMITS, ONEDNN, PLAIN, SMALLEST, TORCH, WAYS, Ways, class_of
from rwkv_rlhf.settings import tables

EVERYWHERE = Ways.all(ONEDNN)
N, K = SMALLEST + 44, SMALLEST + 1


@pytest.fixture(autouse=True)
def _operator():
    """Without oneDNN everything here would judge PyTorch's own way."""
    if refusal := product_ways.refusal(ONEDNN, torch.float32):
        pytest.skip(refusal)


def error(found, exact):
    """RMS(difference) / RMS(exact)."""
    return float(
        (found.detach().double() - exact.detach()).square().mean().sqrt() / exact.detach().square().mean().sqrt()
    )


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (2, 3), (40,), (2, 70), (300,)], ids=str)
def test_output_and_gradients_are_those_of_float64(dtype, shape):
    """If this breaks, a run on a processor that oneDNN serves best learns something else."""
    x = torch.randn(*shape, K).to(dtype).requires_grad_()
    weight = (torch.randn(N, K) / 16).to(dtype).requires_grad_()
    g = torch.randn(*shape, N).to(dtype)
    y = EVERYWHERE.linear(x, weight)
    assert type(y.grad_fn).__name__ != "MmBackward0" and y.dtype == dtype
    found = [y, *torch.autograd.grad(y, (x, weight), g)]
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = F.linear(*wide)
    for one, other in zip(found, [exact, *torch.autograd.grad(exact, wide, g.double())], strict=True):
        assert one.shape == other.shape and error(one, other) < LIMITS[dtype] / 2


@pytest.mark.parametrize("store", ["none", *tables.STORAGES])
def test_a_layer_multiplies_in_its_ways_however_it_is_stored(store, monkeypatch):
    """If this breaks, frozen or packed matrices keep the slow way, or have another gradient."""
    calls = []
    monkeypatch.setitem(WAYS, ONEDNN, lambda a, b: calls.append(len(a)) or product_ways.by_onednn(a, b))
    layer = Linear(SMALLEST, N, device="meta")
    layer.load_weight(torch.randn(N, SMALLEST) / 16, StorageSpec(torch.float32, store=store))
    x, g = torch.randn(30, SMALLEST, requires_grad=True), torch.randn(30, N)
    plain = layer(x)
    plain = [plain, *torch.autograd.grad(plain, x, g)]
    assert not calls
    layer.take_ways(EVERYWHERE)
    y = layer(x)
    for one, other in zip([y, *torch.autograd.grad(y, x, g)], plain, strict=True):
        assert error(one, other.double()) < 1e-6
    assert calls == [30, 30]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_the_head_multiplies_in_its_ways(dtype):
    """If this breaks, the largest matrix of a model keeps the slow way, or its gradient is lost."""
    head, hidden = Linear(SMALLEST, 5000, dtype=dtype), torch.randn(50, SMALLEST).to(dtype)
    torch.nn.init.normal_(head.weight, std=1 / 16)
    found = []
    for ways in (PLAIN, EVERYWHERE):
        head.take_ways(ways)
        product, logits = Product(head, hidden, 40, [head.weight], need_hidden=True), []
        for chunk in product.chunks:
            logits.append(product.logits(chunk).clone())
            product.push(chunk, logits[-1].sin())
        d_hidden, d_weight = product.gradients()
        found.append([torch.cat(logits), d_hidden, *d_weight])
    for plain, own in zip(*found, strict=True):
        assert own.dtype == plain.dtype and error(own.detach(), plain.detach().double()) < LIMITS[dtype]


def test_small_matrices_are_left_to_pytorch():
    """The first steps of a toy must not wait for a measurement that gains nothing."""
    x = torch.randn(9, K)
    assert not EVERYWHERE.takes(x, torch.randn(SMALLEST - 1, K)) and EVERYWHERE.takes(x, torch.randn(SMALLEST, K))
    assert not EVERYWHERE.takes(x.double(), torch.randn(SMALLEST, K).double())
    assert not PLAIN.takes(x, torch.randn(SMALLEST, K)) and not EVERYWHERE.takes(x[:0], torch.randn(SMALLEST, K))


def test_classes_of_rows():
    """If this breaks, a number of rows takes the way that is fast for another."""
    assert [class_of(n) for n in (1, 2, 4, 5, 16, 17, 64, 65, 256, 257, 9999)] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_what_a_resume_point_says_is_read_again():
    """If this breaks, a resumed run multiplies in other ways, and its bits are others."""
    ways = Ways(weight=(TORCH, TORCH, ONEDNN, ONEDNN, TORCH, TORCH))
    assert Ways.read(ways.as_json()) == ways and Ways.read({}) == PLAIN and PLAIN.as_json() == {}
    assert Ways.read({"output": [ONEDNN], "weight": ["mkl"] * len(CLASSES)}) == PLAIN


def test_a_way_must_be_a_tenth_faster():
    """If this breaks, chance decides how two runs on one machine multiply."""
    seconds = {"output": {"1": {TORCH: 1.0, ONEDNN: 0.92}, "2-4": {TORCH: 1.0, ONEDNN: 0.9}, "5-16": {ONEDNN: 1.0}}}
    assert fastest(seconds) == Ways(output=(TORCH, ONEDNN, *[TORCH] * 4))


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty folder for what is measured, and a processor that nobody knows."""
    monkeypatch.setattr(product_table, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(product_table, "processor", lambda: "Nobody 1 2")
    return tmp_path / product_table.KEPT


def test_an_unknown_processor_is_measured_once(cache, monkeypatch):
    """If this breaks, each start measures anew, and two runs may differ; or a damaged file stops every run."""
    times = {"output": {name: {TORCH: 1.0, ONEDNN: 0.5} for name in CLASSES}}
    monkeypatch.setattr(product_table, "measured", lambda dtype: times)
    assert ways_for(torch.float32, SMALLEST) == Ways(output=(ONEDNN,) * len(CLASSES))
    monkeypatch.setattr(product_table, "measured", pytest.fail)
    assert ways_for(torch.float32, SMALLEST - 1) == ways_for(torch.float64, SMALLEST) == PLAIN
    assert ways_for(torch.float32, SMALLEST) == Ways(output=(ONEDNN,) * len(CLASSES))
    for damaged in ("{", "[]", '{"Nobody 1 2": 3}', cache.read_text().replace("0.5", '"fast"')):
        cache.write_text(damaged)
        assert kept_seconds(torch.float32, lambda dtype: {}) == {}, damaged


def test_a_measurement_times_every_way_of_every_product():
    """Three seconds at most, and what is printed of it names the way that is taken first."""
    seconds = product_table.measured(torch.float32)
    assert all(
        set(times) == set(WAYS) and min(times.values()) > 0 for row in seconds.values() for times in row.values()
    )
    figures = dict(figures_of(seconds, EVERYWHERE))
    assert len(figures) == 3 and all(f"; 257 and more {ONEDNN} " in line for line in figures.values())


def test_a_build_without_the_operator_or_with_a_wrong_one_keeps_pytorchs(monkeypatch):
    """If this breaks, an operator that PyTorch took away or changed stops a run or spoils it."""
    product_ways.refusal.cache_clear()
    monkeypatch.setitem(WAYS, ONEDNN, lambda a, b: F.linear(a, b) * 1.001)
    assert "wrong products" in product_ways.refusal(ONEDNN, torch.float32)
    assert EVERYWHERE.possible(torch.float32) == PLAIN == ways_for(torch.float32, SMALLEST)
    product_ways.refusal.cache_clear()
    monkeypatch.setitem(WAYS, ONEDNN, lambda a, b: torch.ops.mkldnn.is_not_there(a, b))
    assert "no such operator" in product_ways.refusal(ONEDNN, torch.float32)
    product_ways.refusal.cache_clear()


def test_known_processors_name_ways_that_there_are():
    """A word in the table that no way has would be found on that processor only."""
    assert set(WAYS) == set(tables.PRODUCTS) - {"auto"}
    for by_dtype in KNOWN.values():
        for dtype, ways in by_dtype.items():
            assert dtype in LIMITS and Ways.read(ways.as_json()) == ways
