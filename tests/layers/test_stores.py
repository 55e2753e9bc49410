"""Storages of frozen matrices: what is packed must come back, and nothing dense may stay."""

import logging
import sys

import pytest
import torch

from rwkv_rlhf.layers.adaptation import seeded
from rwkv_rlhf.layers.linear import Linear, StorageSpec
from rwkv_rlhf.layers.stores import STORES, fp8, nf4, store_class

IN, OUT = 96, 64  # rows of 96 do not end where the blocks of 64 do

PACKING = list(STORES)
packing = pytest.mark.parametrize("store", PACKING)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


@pytest.fixture(autouse=True)
def _libraries(request):
    names = request.node.callspec.params.values() if hasattr(request.node, "callspec") else ()
    if {"nf4", "fp4"} & {name for name in names if isinstance(name, str)}:
        pytest.importorskip("bitsandbytes")


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed, "matrix")) * 0.05


def packed_layer(store: str, dtype=torch.float32) -> Linear:
    layer = Linear(IN, OUT, device="meta")
    layer.load_weight(matrix(OUT, IN), StorageSpec(dtype, store=store))
    return layer


def largest_in_block(weight: torch.Tensor, store: str) -> torch.Tensor:
    """The largest magnitude of the block that each value is packed in."""
    if store == "fp8":
        return weight.abs().amax(1, keepdim=True).expand_as(weight)
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    return flat.abs().amax(1, keepdim=True).expand_as(flat).flatten()[: weight.numel()].view(weight.shape)


# half the widest gap between two levels, relative to the largest value of a block
WORST_STEP = {"nf4": (1 - 0.6962) / 2, "fp4": (1 - 0.6667) / 2, "int8": 0.5 / 127, "fp8": 16 / 448}


@packing
@pytest.mark.parametrize("shape", [(OUT, IN), (3, 7), (1, 64), (70, 1000)])
def test_packing_errs_by_half_a_level_at_most(store, shape):
    """Blocks that are mixed up, or the tail of a matrix that is lost, would be a silent other model."""
    weight = matrix(*shape)
    back = STORES[store].pack(weight).unpack()
    assert back.shape == weight.shape
    assert ((back - weight).abs() <= largest_in_block(weight, store) * WORST_STEP[store] * 1.001 + 1e-7).all()


@packing
def test_packing_does_not_depend_on_the_dtype_or_on_chunks(store, monkeypatch):
    """The merged model and the trained one pack the same file; they must get the same matrix."""
    weight = matrix(70, 1000).bfloat16()
    packed = STORES[store].pack(weight)
    monkeypatch.setattr(sys.modules[STORES[store].pack.__module__], "CHUNK", 1024)
    again = STORES[store].pack(weight.double())
    assert all(torch.equal(one, two) for one, two in zip(packed.buffers(), again.buffers()))


@packing
@dtypes
def test_every_dtype_unpacks_the_same_numbers_rounded_once(store, dtype):
    """A bfloat16 run and its float32 merge must hold the same matrix."""
    packed = STORES[store].pack(matrix(70, 100))
    assert packed.unpack(dtype).dtype == dtype
    assert torch.equal(packed.unpack(dtype), packed.unpack(torch.float32).to(dtype))


@packing
@dtypes
def test_a_packed_product_and_its_gradient_are_those_of_the_dense_matrix(store, dtype):
    """A packed layer in the middle of the model would cut off, or bend, everything below it."""
    layer = packed_layer(store, dtype)
    x = matrix(3, 5, IN, seed=1).to(dtype).requires_grad_()
    upstream = matrix(3, 5, OUT, seed=2).to(dtype)
    y = layer(x)
    y.backward(upstream)
    assert y.dtype == x.grad.dtype == dtype
    tolerance = {"rtol": 0.02, "atol": 0.002} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-6}
    dense = layer.merged().to(dtype)
    torch.testing.assert_close(y, x @ dense.T, **tolerance)
    torch.testing.assert_close(x.grad, upstream @ dense, **tolerance)
    assert not list(layer.parameters())


@packing
def test_autograd_keeps_no_dense_matrix(store):
    """Memory would be that of the dense model: autograd must unpack again in backward, not hold the matrix."""
    layer = packed_layer(store)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.shape) or t, lambda t: t):
        y = layer(matrix(3, IN, seed=1).requires_grad_())
    assert y.requires_grad and (OUT, IN) not in held and (IN, OUT) not in held


@packing
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_cast_of_the_model_leaves_the_packed_matrix_alone(store, cast):
    """`model.to(bfloat16)`, which trainers do, would round the scale of every block."""
    layer = packed_layer(store)
    before = layer.dense()
    kinds = [buffer.dtype for buffer in layer.store.buffers()]
    layer.to(cast)
    assert [buffer.dtype for buffer in layer.store.buffers()] == kinds
    assert torch.equal(layer.dense(), before)
    assert all(buffer.device.type == "meta" for buffer in layer.to("meta").store.buffers())


@packing
def test_zero_matrices_and_zero_rows_stay_zero(store):
    """Matrices that begin as zero (a fresh RWKV-7 has them) must not become NaN."""
    weight = matrix(5, 192)
    weight[2:4] = 0
    back = STORES[store].pack(weight).unpack()
    assert not back[2:4].any() and back.isfinite().all() and back[0].any()
    assert not STORES[store].pack(torch.zeros(2, 64)).unpack().any()


@pytest.mark.parametrize("store, wanted", [("nf4", 0.5625), ("fp4", 0.5625), ("int8", 1.0625), ("fp8", 1 + 4 / 1024)])
def test_bytes_per_parameter(store, wanted):
    """The plan's estimate of memory counts on these."""
    assert STORES[store].pack(matrix(64, 1024)).bytes() / (64 * 1024) == pytest.approx(wanted)


@pytest.mark.parametrize("store", ["nf4", "fp4"])
def test_four_bit_packing_on_a_cpu_is_that_of_bitsandbytes(store):
    """The same model packed elsewhere would be another one."""
    functional = pytest.importorskip("bitsandbytes").functional
    generator = seeded(0, store)
    part = torch.randn(500, 64, generator=generator) * torch.rand(500, 1, generator=generator) * 3
    part[1], part[2, 5:] = 0, 0
    code = functional.get_4bit_type(store, device="cpu").sort().values
    middles = (code[1:] + code[:-1]) / 2
    part[3, 0], part[3, 1:16] = 1.0, middles  # exactly between two levels, and a rounding beside
    part[4, 0], part[4, 1:16] = 1.0, torch.nextafter(middles, torch.tensor(2.0))
    rows, largest = nf4._pack_on_cpu(part, store)
    theirs, state = functional.quantize_4bit(part, blocksize=64, quant_type=store)
    assert torch.equal(rows, theirs) and torch.equal(largest, state.absmax)
    assert nf4._pack_on_cpu(torch.full((1, 64), torch.nan), store)[0].shape == (32, 1)  # no crash in a table


def test_int8_is_bitsandbytes_format_and_never_a_worse_level():
    """A matrix packed here can be read there; of two levels the nearer one is taken."""
    functional = pytest.importorskip("bitsandbytes").functional
    weight = matrix(64, 512)
    packed = STORES["int8"].pack(weight)
    theirs, state = functional.quantize_blockwise(weight, code=functional.create_linear_map(), blocksize=64)
    integers = packed.packed.int()
    state.absmax = packed.scale.flatten() * 127
    ours = (integers + 127 + (integers > 0)).to(torch.uint8).view(weight.shape)  # its map holds zero twice
    torch.testing.assert_close(functional.dequantize_blockwise(ours, state), packed.unpack(), rtol=1e-6, atol=1e-8)
    error, other = packed.unpack() - weight, functional.dequantize_blockwise(theirs, state) - weight
    assert ((error - other).abs() > 1e-6).float().mean() < 0.003
    assert (error.abs() <= other.abs() + 1e-7).all()


def test_fp8_numbers_are_those_of_the_cast():
    """Unpacking on a CPU reads the bits by itself."""
    every = torch.arange(256, dtype=torch.uint8).view(1, -1)
    finite = every[(every & 0x7F) != 0x7F].view(1, -1)
    packed = fp8.FP8(finite.shape, packed=finite.view(torch.float8_e4m3fn), scale=torch.tensor([[0.37]]))
    assert torch.equal(packed.unpack(), finite.view(torch.float8_e4m3fn).float() * torch.tensor(0.37))


def test_fp8_says_once_which_product_it_uses(monkeypatch, caplog):
    """A user with a new GPU must learn why it is not faster, but not once a layer."""
    for cached in (fp8.why_dequantised, fp8._say):
        cached.cache_clear()
    layer = packed_layer("fp8")
    with caplog.at_level(logging.INFO, "rwkv_rlhf.layers.stores.fp8"):
        layer(matrix(2, IN)), layer(matrix(2, IN)), packed_layer("fp8")(matrix(3, IN))
    assert [record.message for record in caplog.records] == [
        "fp8 matrices are dequantised for each product: cpu has no fast fp8 product"
    ]
    device, shape = torch.device("cuda", 7), torch.Size((64, 96))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert fp8.why_dequantised(device, torch.bfloat16, shape) == (
        "fp8 matrices are dequantised for each product: this GPU has capability 8.0, not 8.9"
    )
    fp8.why_dequantised.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(fp8, "_refusal", lambda _: "no kernel")
    assert "no kernel" in fp8.why_dequantised(device, torch.bfloat16, shape)
    assert not fp8.chosen_product(device, torch.bfloat16, shape)
    fp8.why_dequantised.cache_clear()
    monkeypatch.setattr(fp8, "_refusal", lambda _: "")
    assert fp8.why_dequantised(device, torch.bfloat16, shape) == ""
    assert fp8.chosen_product(device, torch.bfloat16, shape)
    assert "float32" in fp8.why_dequantised(device, torch.float32, shape)
    assert "(60, 96)" in fp8.why_dequantised(device, torch.bfloat16, torch.Size((60, 96)))
    fp8.why_dequantised.cache_clear()


def test_the_trial_of_the_native_product_ends_in_a_sentence(monkeypatch):
    """A GPU without the kernel must fall back, not stop the run."""
    fp8._refusal.cache_clear()
    assert fp8._refusal(torch.device("cpu")) == ""

    def refuse(*_, **__):
        raise RuntimeError("no such kernel\nstack")

    fp8._refusal.cache_clear()
    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    assert fp8._refusal(torch.device("cpu")) == "no such kernel"
    fp8._refusal.cache_clear()


def test_the_native_fp8_product_is_the_dequantised_one_but_for_the_rounding_of_inputs(monkeypatch):
    """A swapped scale would be another model on new GPUs only."""
    layer = packed_layer("fp8", torch.bfloat16)
    x = (matrix(3, 5, IN, seed=1) * torch.tensor([1.0, 30.0, 1e-3]).view(3, 1, 1)).bfloat16()
    x[0, 1] = 0
    x.requires_grad_()
    dequantised = layer(x.detach()).float()
    monkeypatch.setattr(fp8, "chosen_product", lambda *_: True)
    y = layer(x)
    assert y.dtype == torch.bfloat16 and not y[0, 1].any() and not torch.equal(y.float(), dequantised)
    errors = (y.float() - dequantised).norm(dim=-1) / dequantised.norm(dim=-1).clamp(min=1e-9)
    assert errors.max() < 0.06
    rows, scale = fp8.row_scaled(x.detach().view(-1, IN))
    wanted = (rows.float() * scale) @ layer.merged().T
    torch.testing.assert_close(y.detach().float().view(-1, OUT), wanted, rtol=0.01, atol=1e-5)
    y.sum().backward()
    torch.testing.assert_close(x.grad[1, 2].float(), layer.merged().sum(0), rtol=0.02, atol=0.01)
    assert layer(x[:0]).shape == (0, 5, OUT)


@pytest.mark.parametrize("store", ["nf4", "fp4"])
def test_missing_bitsandbytes_is_one_sentence_with_the_way_out(store, monkeypatch):
    """A user without it must learn which pip line or which flag helps."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"pip install bitsandbytes\S* or pass --quant 0"):
        STORES[store].pack(matrix(4, 64))


def test_unpacking_leaves_loggers_alone(monkeypatch):
    """Setting a level clears the caches of all loggers: a millisecond for each matrix, of each layer, in each pass."""
    pytest.importorskip("bitsandbytes")
    packed = STORES["nf4"].pack(matrix(4, 64))
    monkeypatch.setattr(logging.Logger, "setLevel", lambda *_: pytest.fail("a level is set"))
    packed.unpack()


def test_an_unknown_storage_names_the_legal_ones():
    """If this breaks, a sidecar of a newer program ends in a KeyError."""
    with pytest.raises(ValueError, match=r"storage int3 .*none, nf4, fp4, int8, fp8"):
        store_class("int3")
