"""Products of a few rows with a matrix: the C++ kernel against float64, and where layers use it."""

import pytest
import torch

from rwkv_rlhf.layers.linear import Linear, StorageSpec
from rwkv_rlhf.layers.stores import STORES
from rwkv_rlhf.layers.stores.int8 import Int8
from rwkv_rlhf.ops import products
from rwkv_rlhf.ops.backends import BACKENDS
from rwkv_rlhf.ops.products import BLOCK, MOST_ROWS, Packed, product
from tests.support.product_cases import error, runnable_sets, stored_matrices, use_set

LIMITS = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
SHAPES = ((64, 32), (37, 21), (5, 1), (129, 50), (192, 20), (768, 3))  # inputs, outputs


@pytest.fixture(autouse=True)
def _kernel():
    """Without a compiler everything here would judge PyTorch."""
    if refusal := BACKENDS["cpu"].refusal("products", torch.device("cpu"), torch.float32, (1, 64)):
        pytest.skip(f"the kernel cannot be built here: {refusal}")


@pytest.fixture(params=runnable_sets())
def instructions(request, monkeypatch):
    """Each instruction set of this processor in turn: most users have another one."""
    use_set(monkeypatch, request.param)
    return request.param


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_the_kernel_is_the_product(dtype, instructions):
    """Any number of rows, columns that fill no register, outputs that fill no tile: else a token's logits are wrong."""
    for rows in (1, 2, 3, 4, 7, 16, 19, 131):
        for inputs, outputs in SHAPES if rows < 131 else SHAPES[-2:]:
            x = torch.randn(rows, inputs).to(dtype)
            for name, matrix, dense in stored_matrices(outputs, inputs):
                exact = x.double() @ dense.double().T
                assert error(product(x, matrix, backend="cpu"), exact) < LIMITS[dtype], (name, rows, inputs, outputs)


def test_the_twin_is_the_product():
    """The judge of `--doctor 1` must be right itself, for every way of storing a matrix."""
    for inputs, outputs in SHAPES:
        x = torch.randn(3, inputs)
        for name, matrix, dense in stored_matrices(outputs, inputs):
            exact = x.double() @ dense.double().T
            limit = LIMITS[torch.float32 if name != "bf16" else torch.bfloat16]
            assert error(product(x, matrix, backend="naive"), exact) < limit, (name, inputs, outputs)
    with pytest.raises(ValueError, match=f"blocks of {BLOCK} weights do not fill rows of 96"):
        store = Int8.pack(torch.randn(4, 96))
        product(torch.randn(1, 96), Packed(store.packed, store.scale))


@pytest.mark.parametrize("mode", STORES)
def test_a_store_is_the_matrix_that_it_says(mode):
    """The matrix that training over a packed store applied is the one that decoding applies."""
    if mode in ("nf4", "fp4"):
        pytest.importorskip("bitsandbytes")
    store, x = STORES[mode].pack(torch.randn(20, 192)), torch.randn(3, 192)
    packed = store.operand()
    assert packed is not None and torch.equal(packed.dense().view(20, 192), store.unpack())
    assert error(product(x, packed), x.double() @ store.unpack().double().T) < 1e-6
    assert STORES[mode].pack(torch.randn(20, 96)).operand() is None  # blocks that do not fill a row


def test_a_row_is_the_same_beside_others_and_for_any_number_of_threads(instructions):
    """If this breaks, a sampled answer depends on the rest of its batch, or on the machine's other work."""
    x = torch.randn(MOST_ROWS, 192)
    threads = torch.get_num_threads()
    for name, matrix, _ in stored_matrices(3000, 192):
        together = product(x, matrix)
        for count in (1, 2, 5):
            assert torch.equal(product(x[:count], matrix), together[:count]), name
            assert torch.equal(product(x[-count:], matrix), together[-count:]), name
        many = product(torch.cat((x, x, x)), matrix)
        assert torch.equal(many[: MOST_ROWS + 3], product(torch.cat((x, x[:3])), matrix)), name
        torch.set_num_threads(3 - min(threads, 2))
        try:
            assert torch.equal(product(x, matrix), together), name
            assert torch.equal(product(torch.cat((x, x, x)), matrix), many), name
        finally:
            torch.set_num_threads(threads)


def test_numbers_of_any_size(instructions):
    """What is split or widened keeps its value, large or small; else a model with outliers says something else."""
    for name, matrix, dense in stored_matrices(50, 192):
        for size in (1e-30, 1e30):
            x = torch.randn(20, 192) * torch.logspace(-3, 3, 192) * size
            exact = x.double() @ dense.double().T
            for rows in (3, 20):
                assert error(product(x[:rows], matrix, backend="cpu"), exact[:rows]) < 1e-6, (name, size, rows)


def test_the_libraries_of_pytorch_find_their_matrix_unit_as_they_left_it():
    """Both use its registers on the same threads: if ours stayed set up, the next bf16 product would be wrong."""
    x, weight = torch.randn(64, 256).bfloat16(), torch.randn(96, 256).bfloat16()
    expected = torch.nn.functional.linear(x, weight)
    for _ in range(3):
        product(x, weight, backend="cpu")
        assert torch.equal(torch.nn.functional.linear(x, weight), expected)


@pytest.mark.parametrize("store", ["none", "int8", "fp8"])
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
