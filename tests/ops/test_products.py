"""Products of a few rows with a matrix: the C++ kernel against float64, and where layers use it."""

import pytest
import torch

from rwkv_rlhf.layers.linear import Linear, StorageSpec
from rwkv_rlhf.layers.stores.int8 import Int8
from rwkv_rlhf.ops import products
from rwkv_rlhf.ops.backends import BACKENDS
from rwkv_rlhf.ops.products import BLOCK, MOST_ROWS, product

LIMITS = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def error(found, exact):
    """RMS(difference) / RMS(exact)."""
    return float((found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@pytest.fixture(autouse=True)
def _kernel():
    """Without a compiler everything here would judge PyTorch."""
    if refusal := BACKENDS["cpu"].refusal("products", torch.device("cpu"), torch.float32, (1, 64)):
        pytest.skip(f"the kernel cannot be built here: {refusal}")


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("weights", LIMITS, ids=str)
def test_the_kernel_is_the_product(dtype, weights):
    """Any number of rows, columns that fill no register, outputs that fill no tile: else a token's logits are wrong."""
    for rows in (1, 2, 3, 4, 7, 16, 19):
        for inputs, outputs in ((64, 32), (37, 21), (5, 1), (129, 50), (768, 3)):
            x = torch.randn(rows, inputs).to(dtype)
            weight = torch.randn(outputs, inputs).to(weights)
            exact = x.double() @ weight.double().T
            assert error(product(x, weight, backend="cpu"), exact) < LIMITS[dtype], (rows, inputs, outputs)
            assert error(product(x, weight, backend="naive"), exact) < max(LIMITS[dtype], LIMITS[weights])


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_integers_with_scales(dtype):
    """The matrix that training over int8 applied is the one that decoding applies."""
    for rows, inputs, outputs in ((1, 64, 33), (3, 192, 20), (16, 768, 7)):
        store = Int8.pack(torch.randn(outputs, inputs))
        x = torch.randn(rows, inputs).to(dtype)
        exact = x.double() @ store.unpack().double().T
        for backend in ("cpu", "naive"):
            assert error(product(x, store.packed, store.scale, backend), exact) < 2 * LIMITS[dtype]
    with pytest.raises(ValueError, match=f"blocks of {BLOCK} integers do not fill rows of 96"):
        product(torch.randn(1, 96), store.packed, store.scale)


def test_a_row_is_the_same_beside_others_and_for_any_number_of_threads():
    """If this breaks, a sampled answer depends on the rest of its batch, or on the machine's other work."""
    weight, x = torch.randn(3000, 200), torch.randn(MOST_ROWS, 200)
    store = Int8.pack(torch.randn(3000, 192))
    threads = torch.get_num_threads()
    for matrix, scale, rows in (
        (weight, None, x),
        (weight.bfloat16(), None, x),
        (store.packed, store.scale, x[:, :192]),
    ):
        together = product(rows, matrix, scale)
        for count in (1, 2, 5):
            assert torch.equal(product(rows[:count], matrix, scale), together[:count])
        torch.set_num_threads(3 - min(threads, 2))
        try:
            assert torch.equal(product(rows, matrix, scale), together)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("store", ["none", "int8"])
def test_layers_decode_with_it_and_train_without(store, monkeypatch):
    """One token of a few rows without a gradient takes the kernel; whatever trains, or scores what trains, does not."""
    used = []
    monkeypatch.setattr(products, "product", lambda *given: used.append(1) or product(*given))
    layer, weight = Linear(128, 40), torch.randn(40, 128)
    layer.load_weight(weight, StorageSpec(torch.float32, store=store))
    x = torch.randn(6, 1, 128)
    with torch.no_grad():
        assert error(layer(x), x.double() @ layer.merged().double().T) < 1e-6 and len(used) == 1
        layer(torch.randn(MOST_ROWS + 1, 128)), layer(x[:0]), layer(x.view(1, 6, 128)), layer(x[0, 0])
    assert len(used) == 1
    x.requires_grad_()
    layer(x).sum().backward()
    assert error(x.grad, layer.merged().double().sum(0).expand_as(x)) < 1e-6
