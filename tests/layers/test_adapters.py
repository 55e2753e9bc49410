"""Adapters on every storage, judged by the dense formula of each, written here a second time in float64.

Legend: r rank.
"""

import math

import pytest
import torch

from rwkv_rlhf.checkpoints.loading import BuildOptions, plain_model
from rwkv_rlhf.layers.adaptation import Adaptation, RankError, seeded
from rwkv_rlhf.layers.adapters import ADAPTERS
from rwkv_rlhf.layers.adapters.pissa import principal_factors, residual
from rwkv_rlhf.layers.linear import Embedding, Linear, StorageSpec
from rwkv_rlhf.layers.stores import STORES
from rwkv_rlhf.model.initial import initial_tensors
from rwkv_rlhf.model.layout import plan_layout
from rwkv_rlhf.model.sizes import sizes_of
from rwkv_rlhf.plan import make_plan

IN, OUT, RANK = 96, 64, 8

adapters = pytest.mark.parametrize("mode", ADAPTERS)
stores = pytest.mark.parametrize("store", ["none", *STORES])
tables = pytest.mark.parametrize("mode", [mode for mode, kinds in ADAPTERS.items() if kinds.embedding])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float64: 1e-6}  # merged matrices are float32


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed, "matrix")) * 0.05


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def spec(dtype=torch.float32, store: str = "none", name: str = "here", **options) -> StorageSpec:
    master = torch.float64 if dtype == torch.float64 else torch.float32
    return StorageSpec(dtype, store=store, master=master, generator=seeded(0, name), **options)


def adapted(mode: str, store: str = "none", dtype=torch.float32, *, learnt=True, rank=RANK, dropout=0.0) -> Linear:
    """An adapter over a random matrix; with `learnt` its own tensors have moved."""
    if store in ("nf4", "fp4"):
        pytest.importorskip("bitsandbytes")
    plain = Linear(IN, OUT, device="meta")
    layer = ADAPTERS[mode].linear.wrap(plain, Adaptation.make(mode, rank, 2.0 * rank, dropout))
    layer.load_weight(matrix(OUT, IN), spec(dtype, store))
    return moved(layer) if learnt else layer


def moved(layer):
    with torch.no_grad():
        for n, part in enumerate(layer.tensors):
            getattr(layer, part).add_(matrix(*getattr(layer, part).shape, seed=5 + n).to(getattr(layer, part).dtype))
    return layer


def formula(mode: str, weight: torch.Tensor, tensors: dict, scaling: float) -> torch.Tensor:
    """The applied matrix from the frozen one (out, in), by the papers; differentiable."""
    if mode == "lora":
        return weight + scaling * tensors["lora_B"] @ tensors["lora_A"]
    if mode == "pissa":
        return weight + tensors["lora_B"] @ tensors["lora_A"]
    if mode == "dora":
        moved = weight + scaling * tensors["lora_B"] @ tensors["lora_A"]
        return tensors["lora_M"][:, None] * moved / moved.detach().norm(dim=1, keepdim=True)
    rows = []
    if mode == "miss":
        for i in range(weight.shape[1]):
            rows.append(weight[:, i] + tensors["miss"][i % len(tensors["miss"])])
        return torch.stack(rows, 1)
    bone = tensors["bone"]
    r = bone.shape[-1]
    for a in range(weight.shape[0] // r):
        row = []
        for b in range(weight.shape[1] // r):
            block = weight[a * r : (a + 1) * r, b * r : (b + 1) * r]
            row.append(block + block @ bone[b] + bone[b])
        rows.append(torch.cat(row, 1))
    return torch.cat(rows)


@adapters
@stores
@dtypes
def test_an_untrained_adapter_is_the_base_model(mode, store, dtype):
    """Training would start from a damaged model."""
    layer = adapted(mode, store, dtype, learnt=False)
    plain = Linear(IN, OUT, device="meta")
    plain.load_weight(matrix(OUT, IN), spec(dtype, store))
    x = matrix(3, 5, IN, seed=1).to(dtype)
    if mode != "pissa":
        assert torch.equal(layer(x), plain(x))
        torch.testing.assert_close(layer.merged(), plain.merged(), rtol=1e-6, atol=0)
    elif store == "none":
        assert distance(layer(x), plain(x)) < TOLERANCE[dtype] and distance(layer.merged(), plain.merged()) < 3e-3
    else:  # only the rest of the matrix is packed
        rest = matrix(OUT, IN) - layer.lora_B_init.float() @ layer.lora_A_init.float()
        wanted = STORES[store].pack(rest).unpack().double() + layer.lora_B.double() @ layer.lora_A.double()
        assert distance(layer.merged(), wanted) < 1e-4 and distance(layer.merged(), matrix(OUT, IN)) < 0.11


@adapters
@stores
@dtypes
def test_the_merged_matrix_is_the_formula_and_does_what_the_layer_does(mode, store, dtype):
    """A merged model would answer otherwise than what was trained."""
    layer = adapted(mode, store, dtype)
    x = matrix(3, 5, IN, seed=1).to(dtype)
    tensors = {part: getattr(layer, part).detach().double() for part in layer.tensors}
    assert layer.merged().dtype == torch.float32 and layer(x).dtype == dtype
    assert distance(layer.merged(), formula(mode, layer.dense().double(), tensors, layer.adaptation.scaling)) < 1e-6
    assert distance(layer(x), x.double() @ layer.merged().double().T) < TOLERANCE[dtype]
    assert distance(layer.merged(), layer.dense()) > 0.05


@adapters
@stores
@dtypes
def test_only_the_adapter_learns_and_gradients_are_those_of_the_formula(mode, store, dtype):
    """A wrong factor in a gradient trains on, only worse."""
    layer = adapted(mode, store, dtype)
    x, upstream = matrix(3, 5, IN, seed=1).to(dtype).requires_grad_(), matrix(3, 5, OUT, seed=2).to(dtype)
    layer(x).backward(upstream)
    assert {name for name, parameter in layer.named_parameters() if parameter.requires_grad} == set(layer.tensors)
    tensors = {part: getattr(layer, part).detach().double().requires_grad_() for part in layer.tensors}
    exact = x.detach().double().requires_grad_()
    dense = formula(mode, layer.dense().detach().double(), tensors, layer.adaptation.scaling)
    (exact @ dense.T).backward(upstream.double())
    limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-6 if store != "none" else 1e-12}[dtype]
    assert distance(x.grad, exact.grad) < limit
    for part, judge in tensors.items():
        assert getattr(layer, part).grad.dtype == getattr(layer, part).dtype
        assert distance(getattr(layer, part).grad, judge.grad) < limit, part


@adapters
@stores
def test_the_state_dict_holds_the_tradition_s_names_only(mode, store):
    """Other programs read these files by name; packed matrices and initial factors have no place in them."""
    layer = adapted(mode, store)
    assert set(layer.state_dict()) == {*layer.tensors, *(["weight"] if store == "none" else [])}
    assert set(layer.factor_b) <= set(layer.tensors) and set(layer.initial) <= set(dict(layer.named_buffers()))
    assert layer.rank_of(getattr(layer, layer.tensors[0])) == RANK


@adapters
@stores
def test_autograd_keeps_no_dense_matrix(mode, store):
    """Memory would be that of the dense model: autograd may keep a dense matrix that is a parameter, not a copy."""
    layer = adapted(mode, store)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        layer(matrix(3, IN, seed=1).requires_grad_())
    own = {layer.weight.data_ptr()} if store == "none" else set()
    assert not [t for t in held if {*t.shape} == {OUT, IN} and t.data_ptr() not in own]


@adapters
@stores
def test_a_cast_of_the_model_casts_the_adapter_only(mode, store):
    """`model.to(bfloat16)`, which trainers do, would round what the merge needs exactly."""
    layer = adapted(mode, store)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer.to(torch.bfloat16)
    assert {getattr(layer, part).dtype for part in layer.tensors} == {torch.bfloat16}
    for name, buffer in layer.named_buffers():
        assert buffer.dtype == before[name].dtype and torch.equal(buffer.float(), before[name].float()), name
    x = matrix(3, IN, seed=1).bfloat16()
    assert distance(layer(x), x.double() @ layer.merged().double().T) < 0.02


@pytest.mark.parametrize("mode", ["lora", "dora", "miss"])
def test_dropout_acts_in_training_only_and_keeps_the_mean(mode):
    """Evaluation with dropout on would be noise."""
    layer = adapted(mode, dropout=0.5)
    x = matrix(4, IN, seed=1)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    torch.manual_seed(0)
    runs = layer(x.expand(3000, 4, IN))
    assert not torch.equal(runs[0], runs[1])
    torch.testing.assert_close(runs.mean(0), x @ layer.merged().T, atol=0.03, rtol=0)


@pytest.mark.parametrize("mode", ["pissa", "bone"])
def test_modes_without_dropout_ignore_it(mode):
    """A profile row holds a Dropout whatever its mode; here it would damage the base itself."""
    layer = adapted(mode, dropout=0.5).train()
    x = matrix(4, IN, seed=1)
    assert torch.equal(layer(x), layer(x))


def test_scaling_is_alpha_over_rank_or_its_root_or_one():
    """A wrong scale is a wrong learning rate, and a wrong merge."""
    assert Adaptation.make("lora", 16, 32).scaling == Adaptation.make("dora", 16, 32).scaling == 2.0
    assert Adaptation.make("lora", 16, 32, rslora=True).scaling == 8.0
    assert {Adaptation.make(mode, 16, 32, rslora=True).scaling for mode in ("pissa", "bone", "miss")} == {1.0}


def test_first_factors_are_kaiming_and_depend_on_the_name_only():
    """Two runs with one seed must start alike whatever else the plan adapts."""
    layer, again = adapted("lora", learnt=False), adapted("lora", learnt=False)
    bound = 1 / math.sqrt(IN)
    assert torch.equal(layer.lora_A, again.lora_A)
    assert 0.9 * bound < layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not layer.lora_B.any()
    assert not torch.equal(torch.rand(9, generator=seeded(0, "a")), torch.rand(9, generator=seeded(0, "b")))


def test_bfloat16_activations_over_float32_masters():
    """A trained float32 matrix must serve a bfloat16 run, with its gradient in float32."""
    layer = Linear(IN, OUT)
    layer.load_weight(matrix(OUT, IN), StorageSpec(torch.float32))
    layer.weight.requires_grad_()
    y = layer(matrix(4, IN, seed=1).bfloat16())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32


# --- PiSSA


def test_pissa_s_factors_are_the_best_of_their_rank():
    """With other factors the frozen rest is larger, and packing it errs more."""
    u, _, vh = torch.linalg.svd(matrix(OUT, IN), full_matrices=False)
    weight = u @ torch.diag(0.8 ** torch.arange(OUT)) @ vh
    a, b = principal_factors(weight, RANK, 4, seeded(0, "here"))
    assert a.shape == (RANK, IN) and b.shape == (OUT, RANK)
    u, s, vh = torch.linalg.svd(weight.double())
    best = u[:, :RANK] @ torch.diag(s[:RANK]) @ vh[:RANK]
    assert distance(b @ a, best) < 1e-4
    torch.testing.assert_close(a @ a.T, torch.diag(s[:RANK]).float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(b.T @ b, torch.diag(s[:RANK]).float(), atol=1e-4, rtol=0)
    whole = principal_factors(weight, OUT, 0, None)
    assert distance(whole[1] @ whole[0], weight) < 1e-5


def test_pissa_s_rest_is_rounded_once():
    """Sums in the order of one machine would be another frozen matrix on the next one."""
    weight, a, b = matrix(600, 40).bfloat16(), matrix(RANK, 40, seed=1), matrix(600, RANK, seed=2)
    exact = weight.double() - b.double() @ a.double()
    assert torch.equal(residual(weight, a, b, torch.float32), exact.float())


def test_pissa_s_rest_of_a_shared_file_is_not_rounded_to_its_dtype():
    """The check of a merge uses the file's matrices as they lie there; the rest of one is no matrix of the file."""
    layer = ADAPTERS["pissa"].linear.wrap(Linear(IN, OUT, device="meta"), Adaptation.make("pissa", RANK, 1))
    weight = matrix(OUT, IN).bfloat16()
    layer.load_weight(weight, spec(torch.bfloat16, share=True))
    assert layer.weight.dtype == torch.float32 and distance(layer.merged(), weight) < 1e-6


def test_pissa_s_factors_depend_on_seed_and_name_only():
    """A run that is repeated would start elsewhere, or disturb the order of its data."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = adapted("pissa", learnt=False)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = adapted("pissa", learnt=False)
    assert torch.equal(first.lora_A, second.lora_A) and torch.equal(first.weight, second.weight)
    third = ADAPTERS["pissa"].linear.wrap(Linear(IN, OUT, device="meta"), Adaptation.make("pissa", RANK, 1))
    third.load_weight(matrix(OUT, IN), spec(name="there", svd_niter=1))
    assert not torch.equal(first.lora_A, third.lora_A)


@stores
@dtypes
def test_pissa_resumed_from_its_initial_factors_is_the_same_model(store, dtype):
    """A second decomposition, or a second subtraction, would freeze another rest of the matrix."""
    layer = adapted("pissa", store, dtype)
    initial = {name: getattr(layer, name) for name in layer.initial}
    again = ADAPTERS["pissa"].linear.wrap(Linear(IN, OUT, device="meta"), layer.adaptation)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads % 2 + 1)  # other sums in the products
    try:
        again.load_weight(matrix(OUT, IN), spec(dtype, store, "elsewhere", initial=initial))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(again.dense(), layer.dense()) and torch.equal(again.lora_A, layer.lora_A_init)
    again.load_state_dict({part: getattr(layer, part).detach() for part in layer.tensors}, strict=False)
    assert torch.equal(again.merged(), layer.merged())
    assert not torch.equal(layer.lora_A, layer.lora_A_init)  # training does not move what it began with


# --- embeddings


@tables
@dtypes
def test_an_embedding_s_adapter_starts_as_the_base_and_merges(mode, dtype):
    """The adapter of an embedding row was once silently not loaded."""
    table = ADAPTERS[mode].embedding.wrap(Embedding(50, 16, device="meta"), Adaptation.make(mode, 4, 8))
    table.load_weight(matrix(50, 16), spec(dtype))
    tokens = torch.tensor([[3, 3, 49], [0, 1, 2]])
    if mode == "lora":
        assert torch.equal(table(tokens), table.weight[tokens])
    assert distance(table(tokens), matrix(50, 16)[tokens]) < (5e-3 if dtype == torch.bfloat16 else 1e-6)
    moved(table)
    assert distance(table(tokens, torch.float32), table.merged()[tokens]) < 1e-6
    wanted = table.dense().double() + table.adaptation.scaling * (table.lora_B.double() @ table.lora_A.double()).T
    assert distance(table.merged(), wanted.detach()) < 1e-6
    table(tokens).float().sum().backward()
    assert table.weight.grad is None and all(getattr(table, part).grad.abs().sum() > 0 for part in table.tensors)
    assert set(table.state_dict()) == {"weight", *table.tensors}


# --- DoRA


def test_dora_leaves_rows_of_zeros_alone():
    """A fresh RWKV-7 has matrices of zeros; a norm of zero would make them NaN."""
    layer = ADAPTERS["dora"].linear.wrap(Linear(IN, OUT, device="meta"), Adaptation.make("dora", RANK, 8))
    layer.load_weight(torch.zeros(OUT, IN), spec())
    x = matrix(3, IN, seed=1)
    y = layer(x)
    y.sum().backward()
    assert not y.any() and not layer.merged().any()
    assert all(getattr(layer, part).grad.isfinite().all() for part in layer.tensors)


def test_dora_s_norms_follow_the_factors():
    """Norms that are remembered from before a step would be another model."""
    layer = adapted("dora").eval()
    x = matrix(3, IN, seed=1)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first) and layer._remembered is not None
        layer.lora_B.mul_(2)
        assert distance(layer(x), x @ layer.merged().T) < 1e-6
        layer.train()
        layer.lora_A.data.mul_(2)  # as optimizers do that leave no trace
        layer.eval()
        assert distance(layer(x), x @ layer.merged().T) < 1e-6
    with torch.inference_mode():
        assert distance(layer(x), x @ layer.merged().T) < 1e-6
    layer(x).sum().backward()
    assert layer.lora_A.grad.abs().sum() > 0


@stores
@dtypes
def test_old_adapters_with_a_length_for_each_column_mean_what_they_meant(store, dtype):
    """Read as lengths of rows, an adapter of the older program would scale the wrong side of every square matrix."""
    layer = adapted("dora", store, dtype, learnt=False)
    layer.per_column()
    x = matrix(3, 5, IN, seed=1).to(dtype)
    assert (
        layer.lora_M.shape == (1, IN) and distance(layer(x), x.double() @ layer.dense().double().T) < TOLERANCE[dtype]
    )
    moved(layer)
    dense = layer.dense().double() + 2.0 * layer.lora_B.double() @ layer.lora_A.double()
    wanted = (layer.lora_M.double() * dense / (dense.norm(dim=0) + 1e-6)).detach()
    assert distance(layer.merged(), wanted) < 1e-6 and distance(layer(x), x.double() @ wanted.T) < TOLERANCE[dtype]
    layer(x).sum().backward()
    assert all(getattr(layer, part).grad.abs().sum() > 0 for part in layer.tensors)


# --- ranks that do not fit


def test_a_rank_that_does_not_fit_is_refused_by_layer_rank_and_shape():
    """The user must learn which number to change before hours of loading."""
    plain = Linear(IN, OUT, device="meta")
    for mode, rank, words in (
        ("bone", 12, r"rank 12 must divide both sides of the 64 x 96 matrix, so it must divide 32"),
        ("pissa", 65, r"rank 65 is more than the 64 x 96 matrix has: at most 64"),
        ("miss", 97, r"rank 97 is more than the 96 inputs"),
    ):
        with pytest.raises(RankError, match=words):
            ADAPTERS[mode].linear.wrap(plain, Adaptation.make(mode, rank, 1))
    tensors = initial_tensors("x070", 1, 64, 40, 32, 0)
    model = plain_model(sizes_of(tensors), BuildOptions(torch.float32))
    plan = make_plan("bone", 1, rank=24, alpha=1.0, lr_init=1e-4, lr_final=1e-5)
    with pytest.raises(ValueError, match=r"layer blocks\.0\.att\.\w+: mode bone: rank 24 .* 64 x 64 .* divide 64"):
        plan_layout(model, plan)


@pytest.mark.parametrize("rank", [7, 40, IN])
def test_miss_takes_ranks_that_do_not_divide_the_inputs(rank):
    """PEFT does, so such adapters exist."""
    layer = adapted("miss", rank=rank)
    x = matrix(3, 5, IN, seed=1)
    tensors = {"miss": layer.miss.detach().double()}
    assert distance(layer.merged(), formula("miss", layer.dense().double(), tensors, 1.0)) < 1e-6
    assert distance(layer(x), x @ layer.merged().T) < 1e-6
