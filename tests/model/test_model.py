"""The model against independent runners: a user's merged file must mean the same elsewhere as it does here."""

import dataclasses
import re

import pytest
import torch

from rwkv_rlhf.checkpoints.loading import BuildOptions, build_model
from rwkv_rlhf.model import VERSIONS
from rwkv_rlhf.model.initial import initial_tensors
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.model.sizes import sizes_of
from rwkv_rlhf.model.state import State
from tests.support.models import build, random_tensors
from tests.support.processes import PACKAGE, package_kind, rwkv_package

TOKENS = [5, 0, 17, 299, 3, 3, 42, 7, 0, 101, 250, 9]
SHAPES = [(64, 128), (32, 64)]  # head size, width; the package cannot run a single head of x050


@pytest.fixture(scope="module", params=VERSIONS)
def tensors(request):
    """A checkpoint of each version."""
    return random_tensors(request.param)


def test_a_packed_pass_never_waits_for_the_device(tensors):
    """On a device without values (meta) nothing can be read: on a GPU each reading empties its queue, in each block.

    Documents of 0, 2, 0 and 3 tokens, from no state and from one; values and gradients.
    """
    with torch.device("meta"):
        model = RWKV(sizes_of(tensors))
        tokens = torch.zeros(1, 5, dtype=torch.int64)
    starts = torch.tensor([0, 0, 2, 2, 5])
    _, state = model(tokens, None, starts)
    hidden, _ = model(tokens, state, starts)
    hidden.sum().backward()
    assert all(part.device.type == "meta" for part in model.initial_state(2).tensors())


def bonus_as_logarithm(tensors):
    """The same model with the bonus of the current token written as RWKV-5.0 and 5.1 also have it."""
    name = "att.time_faaaa"
    positive = {key: value.abs() + 0.1 if name in key else value for key, value in tensors.items()}
    logs = {key.replace(name, "att.time_first"): v.log() if name in key else v for key, v in positive.items()}
    return positive, logs


def package_logits(folder, checkpoints, kind):
    """Logits of the `rwkv` package for TOKENS, in one pass and token by token, of each checkpoint."""
    paths = [str(folder / f"model-{number}") for number in range(len(checkpoints))]
    for path, tensors in zip(paths, checkpoints):
        torch.save(tensors, path + ".pth")
    return [torch.tensor(logits) for logits in rwkv_package("every", TOKENS, paths, **PACKAGE[kind])]


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """version -> list of (checkpoint, the package's logits); the package must be imported anew for each kind."""
    found = {}
    for kind in PACKAGE:
        named = [
            (version, random_tensors(version, head_size=size, n_embd=width))
            for version in VERSIONS
            for size, width in SHAPES
            if package_kind(version) == kind
        ]
        for version in ("x050", "x051") if kind == "older" else ():
            named += [(version, tensors) for tensors in bonus_as_logarithm(random_tensors(version))]
        folder = tmp_path_factory.mktemp("package")
        for (version, tensors), logits in zip(named, package_logits(folder, [t for _, t in named], kind)):
            found.setdefault(version, []).append((tensors, logits))
    return found


@torch.no_grad()
def own_logits(model):
    """The same two of ours."""
    whole = model.head(model(torch.tensor([TOKENS]))[0])[0]
    state, one_by_one = None, []
    for token in TOKENS:
        hidden, state = model(torch.tensor([[token]]), state)
        one_by_one.append(model.head(hidden)[0, 0])
    return [whole, torch.stack(one_by_one)]


@pytest.mark.slow
@pytest.mark.xdist_group("rwkv_package")
@pytest.mark.parametrize("version", VERSIONS)
def test_logits_agree_with_the_rwkv_package(version, judged):
    """If this breaks, models trained here behave differently in every other RWKV program."""
    for tensors, theirs in judged[version]:
        for ours, other in zip(own_logits(build(tensors)), theirs):
            assert float((ours - other).abs().max() / (other.max() - other.min())) <= 1e-5


def test_carried_state_equals_one_long_pass(tensors):
    """If this breaks, chunked context and chat drift away from what was trained."""
    model = build(tensors, torch.float64)
    tokens = torch.tensor([TOKENS, TOKENS[::-1]])
    whole, end = model(tokens)
    first, state = model(tokens[:, :5])
    second, end_of_two = model(tokens[:, 5:], state)
    assert torch.allclose(torch.cat([first, second], 1), whole, atol=1e-10)
    for one, two in zip(end, end_of_two):
        assert all(torch.allclose(x, y, atol=1e-10) for x, y in zip(one, two))


def test_packed_documents_do_not_see_each_other(tensors):
    """If this breaks, packing leaks one document into the next, in values or in gradients."""
    model = build(tensors, torch.float64)
    starts = torch.tensor([0, 4, 4, 9, 12])  # the second document is empty
    packed, state = model(torch.tensor([TOKENS]), None, starts)
    weights = torch.randn(packed.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (packed * weights).sum().backward()
    together = {name: p.grad.to_dense().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for segment, (begin, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist())):
        if begin == end:
            for layer in state:  # of x040 the two sums, whose scale pp is e^-1e38
                sums = layer.wkv[..., :2] if layer.wkv.dim() == 3 else layer.wkv
                assert not any(part[segment].any() for part in (layer.att_shift, sums, layer.ffn_shift))
            continue
        alone, own_state = model(torch.tensor([TOKENS[begin:end]]))
        assert torch.allclose(packed[:, begin:end], alone, atol=1e-10)
        for layer, own in zip(state, own_state):
            assert all(torch.allclose(x[segment], y[0], atol=1e-10) for x, y in zip(layer, own))
        (alone * weights[:, begin:end]).sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(together[name], p.grad.to_dense(), atol=1e-9), name


def test_forked_state_carries_both_gradients_back(tensors):
    """If this breaks, running a prompt once for both answers of a pair trains something else."""
    model = build(tensors, torch.float64)
    prompt, chosen, reject = TOKENS[:5], TOKENS[5:9], TOKENS[8:]

    def loss(hidden):
        return (hidden * torch.linspace(-1, 1, hidden.shape[1], dtype=torch.float64)[:, None]).sum()

    _, state = model(torch.tensor([prompt]))
    answers = torch.tensor([chosen + reject])
    starts = torch.tensor([0, len(chosen), len(chosen) + len(reject)])
    hidden, _ = model(answers, state.select(torch.tensor([0, 0])), starts)
    (loss(hidden[:, : len(chosen)]) + 2 * loss(hidden[:, len(chosen) :])).backward()
    forked = {name: p.grad.to_dense().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    one = model(torch.tensor([prompt + chosen]))[0][:, len(prompt) :]
    two = model(torch.tensor([prompt + reject]))[0][:, len(prompt) :]
    (loss(one) + 2 * loss(two)).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(forked[name], p.grad.to_dense(), atol=1e-9), name


def test_rows_of_a_state_can_be_taken_apart_and_put_together(tensors):
    """If this breaks, a prompt's state reaches the answer of another prompt, or half of it is lost on the way."""
    model = build(tensors)
    tokens = torch.tensor([TOKENS[:4], TOKENS[4:8], TOKENS[8:]])
    with torch.no_grad():
        _, state = model(tokens)
        chosen = State.concatenated([state.row(2), state.row(0)])
        same = state.select(torch.tensor([2, 0]))
        (alone, _), (forked, _) = model(torch.tensor([[7]]), state.row(2)), model(torch.tensor([[7], [7]]), chosen)
    assert (state.rows, chosen.rows, len(state.tensors())) == (3, 2, 9)
    for one, two, double in zip(chosen.tensors(), same.tensors(), (chosen + same).tensors(), strict=True):
        assert torch.equal(one, two) and torch.equal(double, 2 * one)
    again = State.from_tensors(state.tensors())
    assert all(a.wkv is b.wkv and a.ffn_shift is b.ffn_shift for a, b in zip(again, state))
    assert torch.allclose(forked[:1], alone, atol=1e-6)


@pytest.mark.parametrize("frozen_embedding", [False, True])
def test_recomputed_blocks_give_the_same_gradient(tensors, frozen_embedding):
    """If this breaks, --grad_cp 1 changes what is learned, or loses a block's gradient under a frozen embedding."""
    gradients = []
    for grad_cp in (False, True):
        model = build(tensors, torch.float64, grad_cp=grad_cp)
        model.emb.weight.requires_grad_(not frozen_embedding)
        model(torch.tensor([TOKENS]))[0].pow(2).sum().backward()
        gradients.append({name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 30
    for name, value in gradients[0].items():
        assert torch.allclose(value, gradients[1][name], atol=1e-12), name


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_gradients_of_training_are_those_of_float64(tensors, dtype, allowed):
    """If this breaks, a kernel or a cast gives some tensor of this version a gradient that is not its own."""
    found = []
    tensors = {name: value.to(dtype).float() for name, value in tensors.items()}
    for compute in (torch.float64, dtype):
        model = build(tensors, torch.float64 if compute == torch.float64 else torch.float32)
        model.compute_dtype = compute
        starts = torch.tensor([0, 5, 12])
        hidden, state = model(torch.tensor([TOKENS]), None, starts)
        later, _ = model(torch.tensor([[4, 8, 15]]), state, torch.tensor([0, 1, 3]))
        loss = torch.cat([hidden, later], 1).double()
        (loss * torch.linspace(-1, 1, loss.numel(), dtype=torch.float64).view(loss.shape)).sum().backward()
        found.append({name: p.grad.to_dense().double() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() >= {"emb.weight", "blocks.2.ffn.value.weight"}
    # of all blocks together where RWKV-5.0 has two numbers in a block, whose rounding alone is a matter of luck
    alike: dict[str, list[str]] = {}
    for name, gradient in found[0].items():
        alike.setdefault(re.sub(r"blocks\.\d+\.", "", name) if gradient.numel() < 8 else name, []).append(name)
    for kind, names in alike.items():
        exact, other = (torch.cat([gradients[name].flatten() for name in names]) for gradients in found)
        assert float((other - exact).norm() / exact.norm()) <= allowed, kind


def test_no_tokens_leave_the_state_alone(tensors):
    """If this breaks, pairs whose prompt is a single token crash."""
    model = build(tensors)
    _, state = model(torch.tensor([TOKENS]))
    hidden, same = model(torch.zeros(1, 0, dtype=torch.long), state, torch.tensor([0, 0]))
    assert hidden.shape == (1, 0, 64)
    assert isinstance(same, State) and same is state


MADE = ("x040", "x052", "x060", "x070")


def orthogonal(matrix, gain, rows=True):
    """Whether the rows (or columns) are orthogonal and `gain` long."""
    product = matrix @ matrix.T if rows else matrix.T @ matrix
    return torch.allclose(product, torch.eye(len(product)) * gain**2, atol=1e-5)


@pytest.mark.parametrize("version", MADE)
def test_initial_values_are_the_traditions(version):
    """If this breaks, training from zero starts somewhere nobody has tried."""
    tensors = initial_tensors(version, 2, 64, 200, 32, seed=3)
    again = initial_tensors(version, 2, 64, 200, 32, seed=3)
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert tensors["emb.weight"].abs().max() <= 1e-4
    assert orthogonal(tensors["head.weight"], 0.5 * (200 / 64) ** 0.5, rows=False)
    assert not tensors["blocks.0.att.output.weight"].any() and not tensors["blocks.1.ffn.value.weight"].any()
    assert orthogonal(tensors["blocks.1.att.value.weight"], 1.0)
    if version != "x040":
        assert orthogonal(tensors["blocks.1.att.key.weight"], 0.1)
        assert orthogonal(tensors["blocks.1.ffn.key.weight"], 1.0, rows=False)
        assert torch.allclose(tensors["blocks.0.att.ln_x.weight"], torch.full((64,), 0.5**0.7))
    if version != "x070":
        assert not tensors["blocks.1.ffn.receptance.weight"].any()
    build_model(tensors, BuildOptions(torch.float32))  # names and shapes are exactly those of the version


def test_initial_values_of_x070():
    """If this breaks, models made here begin elsewhere than RWKV-LM's, and learn worse."""
    tensors = initial_tensors("x070", 2, 64, 200, 32, seed=3)
    assert float(tensors["blocks.0.att.w0"][0, 0, 0]) == pytest.approx(-6 + 0.5 - 2.5)
    assert float(tensors["blocks.1.att.w0"][0, 0, -1]) == pytest.approx(0 + 0.5 + 2.5)
    assert torch.all(tensors["blocks.0.att.k_a"] == 1.02) and torch.all(tensors["blocks.1.att.r_k"] == -0.04)
    assert tensors["blocks.0.att.w1"].shape == (64, 32) and tensors["blocks.0.att.g1"].shape == (64, 32)


def test_initial_values_of_x060():
    """Channel 16 of 64 has c/C = 1/4; block 1 of 2 has depth 1 and height 1/2."""
    tensors = initial_tensors("x060", 2, 64, 200, 32, seed=3)
    shares = {"x": 0.5, "w": 0.5, "k": 0.5, "v": 0.5 - 0.3, "r": 1 - 0.25**0.25, "g": 1 - 0.25**0.25}
    for name, share in shares.items():
        assert float(tensors[f"blocks.1.att.time_maa_{name}"][0, 0, 16]) == pytest.approx(share, abs=1e-6), name
    assert float(tensors["blocks.1.ffn.time_maa_k"][0, 0, 16]) == pytest.approx(1 - 0.25**0.125)
    for name, inner in (("maa", (5, 32, 64)), ("decay", (64, 64))):
        assert not tensors[f"blocks.0.att.time_{name}_w1"].any()
        second = tensors[f"blocks.0.att.time_{name}_w2"]
        assert second.shape == inner and 0.009 < second.abs().max() <= 0.01
    assert tensors["blocks.0.att.time_decay"].shape == (1, 1, 64)
    assert orthogonal(tensors["blocks.0.att.gate.weight"], 0.1)
    assert tensors["blocks.0.ffn.key.weight"].shape == (224, 64)


def test_initial_values_of_x052():
    """If this breaks, models made here begin elsewhere than RWKV-LM's, and learn worse."""
    tensors = initial_tensors("x052", 2, 64, 200, 32, seed=3)
    decay, bonus = tensors["blocks.1.att.time_decay"], tensors["blocks.1.att.time_faaaa"]
    assert decay.shape == bonus.shape == (2, 32)
    assert decay.flatten()[[0, -1]].tolist() == pytest.approx([-6, -1])
    assert bonus.flatten()[[0, -1]].tolist() == pytest.approx([1, 0])
    assert tensors["blocks.0.att.time_faaaa"].flatten()[:4].tolist() == pytest.approx([0, 0.1, -0.1, 0])
    assert float(tensors["blocks.1.att.time_mix_v"][0, 0, 16]) == pytest.approx(0.25**0.5 + 0.3)
    assert orthogonal(tensors["blocks.0.att.receptance.weight"], 1.0)
    assert tensors["blocks.0.ffn.key.weight"].shape == (224, 64)


def test_initial_values_of_x040():
    """If this breaks, models made here begin elsewhere than RWKV-LM's, and learn worse."""
    tensors = initial_tensors("x040", 2, 64, 200, seed=3)
    assert tensors["blocks.1.att.time_decay"][[0, -1]].tolist() == pytest.approx([-5, 3])
    first = torch.tensor(0.3).log().item()
    assert tensors["blocks.0.att.time_first"][:4].tolist() == pytest.approx([first, first + 0.5, first - 0.5, first])
    assert not any(tensors[f"blocks.1.att.{name}.weight"].any() for name in ("key", "receptance"))
    assert orthogonal(tensors["blocks.0.ffn.key.weight"], 2.0, rows=False)


def test_versions_that_nobody_makes_are_named():
    """RWKV-5.0 and 5.1 are read, not made."""
    with pytest.raises(ValueError, match="--my_testing x051: new models are made as x040, x052, x060, x070"):
        initial_tensors("x051", 2, 64, 200)


@pytest.mark.parametrize("version", VERSIONS)
def test_attention_may_have_another_width_than_the_model(version):
    """If this breaks, files made with --dim_att are misread or crash."""
    sizes = dataclasses.replace(sizes_of(random_tensors(version)), dim_att=32)
    model = RWKV(sizes)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    assert sizes_of(model.state_dict()) == sizes
    hidden, state = model(torch.tensor([TOKENS]))
    assert hidden.isfinite().all() and state[0].wkv.shape[1] == 32 // sizes.head_size


def test_dropout_of_the_stream_is_where_rwkv_lm_has_it(tensors):
    """If this breaks, --dropout trains another network than RWKV-LM does: of the embedding, and of the whole stream
    after each half of a block (RWKV-v5/src/model.py, drop0 and drop1); nothing while a model is only asked."""
    share = 0.3
    model, plain = build(tensors, dropout=share), build(tensors)
    tokens = torch.tensor([TOKENS])
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens)[0], plain(tokens)[0])
        torch.manual_seed(3)
        got = model.train()(tokens)[0]
        torch.manual_seed(3)
        drop = torch.nn.Dropout(share)
        x, carried = drop(plain.emb(tokens)), plain.blocks[0].at_first(tokens)
        for block in plain.blocks:
            if block.first:
                x = block.ln0(x)
                carried = block.begun(x, carried)
            y, carried, _ = block.att(block.ln1(x), carried, None, None, None, "auto")
            x = drop(x + y)
            x = drop(x + block.ffn(block.ln2(x), carried, None, None))
        assert torch.allclose(got, plain.ln_out(x), atol=1e-5)
        assert not torch.allclose(got, plain(tokens)[0], atol=0.1)


def test_dropout_draws_the_same_when_blocks_are_recomputed():
    """If this breaks, --grad_cp 1 gives gradients of another mask than that of the loss. The same bits."""
    tensors = random_tensors()
    found = []
    for grad_cp in (False, True):
        model = build(tensors, dropout=0.5, grad_cp=grad_cp).train()
        torch.manual_seed(3)
        model(torch.tensor([TOKENS]))[0].square().sum().backward()
        found.append([p.grad.to_dense() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) > 20 and all(torch.equal(*pair) for pair in zip(*found, strict=True))
