"""Context without limit: chunks must give exactly what one long pass gives, or long documents train something else."""

import dataclasses
import weakref

import pytest
import torch

from rwkv_rlhf.checkpoints.loading import BuildOptions, build_model
from rwkv_rlhf.data.batch import (
    IGNORE,
    AnswerBatch,
    JudgedPair,
    PairExample,
    TextExample,
    pack_judged,
    pack_pairs,
    pack_texts,
)
from rwkv_rlhf.data.policy_batch import Answer, pack_policy
from rwkv_rlhf.layers.adapters import ADAPTERS
from rwkv_rlhf.losses import LOSSES
from rwkv_rlhf.losses.tokens import RequiredStats, token_scores
from rwkv_rlhf.model import VERSIONS
from rwkv_rlhf.plan import make_plan
from rwkv_rlhf.scoring.forward import answer_hidden, batch_loss, in_chunks, text_hidden
from rwkv_rlhf.scoring.infinite_context import ChunkOptions, run_in_chunks
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.implementations import load
from tests.support.models import build, random_tensors


def texts(*lengths):
    generator = torch.Generator().manual_seed(4)
    return pack_texts([TextExample(torch.randint(300, (n,), generator=generator).numpy()) for n in lengths])


def pair_examples():
    generator = torch.Generator().manual_seed(5)
    draw = lambda n: torch.randint(300, (n,), generator=generator).tolist()  # noqa: E731
    return [PairExample(draw(p), draw(c), draw(r)) for p, c, r in ((9, 4, 7), (1, 3, 2), (5, 12, 1))]


def pairs():
    return pack_pairs(pair_examples())


def gradients(model, value):
    model.zero_grad()
    value.backward()
    found = {name: p.grad.to_dense().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def weigh(scores):
    generator = torch.Generator().manual_seed(6)
    draw = lambda x: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)  # noqa: E731
    return sum((x * draw(x)).sum() for x in scores.values())


def scorer(model, targets):
    def score(hidden, span):
        return token_scores(model.head, hidden, targets[span], RequiredStats(mean=True, max=True)).present()

    return score


def compare(model, whole, chunked, limit):
    assert whole.keys() == chunked.keys() and len(whole) == 3
    for name, scores in whole.items():
        assert torch.allclose(scores, chunked[name], rtol=limit, atol=limit), name
    want, got = gradients(model, weigh(whole)), gradients(model, weigh(chunked))
    assert want.keys() == got.keys() and len(want) > 3
    for name, grad in want.items():
        scale = grad.abs().max().clamp_min(1e-3)
        assert float((grad - got[name]).abs().max() / scale) <= limit, name


@pytest.mark.parametrize(
    ("version", "length"), [*((version, 5) for version in VERSIONS), *(("x070", n) for n in (1, 7, 100))]
)
def test_packed_documents_in_chunks_equal_one_pass(version, length):
    """If this breaks, --infctx 1 learns something else than one pass over the same documents."""
    model = build(random_tensors(version, n_layer=2), torch.float64)
    batch = texts(8, 1, 2, 14, 3)
    score = scorer(model, batch.targets)
    whole = score(text_hidden(model, batch), slice(None))
    compare(model, whole, run_in_chunks(model, in_chunks(batch, length), score), 1e-10)


@pytest.mark.parametrize(
    ("version", "length"), [*((version, 4) for version in VERSIONS), *(("x070", n) for n in (1, 100))]
)
def test_pairs_in_chunks_equal_one_pass(version, length):
    """Prompts run once and are forked; the empty prompt begins anew."""
    model = build(random_tensors(version, n_layer=2), torch.float64)
    batch = pairs()
    score = scorer(model, batch.targets)
    whole = score(answer_hidden(model, batch), slice(None))
    compare(model, whole, run_in_chunks(model, in_chunks(batch, length), score), 1e-10)


def long_batch():
    """A document over many chunks, one of two tokens, one without a trained token, an empty one."""
    generator = torch.Generator().manual_seed(8)
    rows = [torch.randint(300, (n,), generator=generator).numpy() for n in (23, 2, 6, 1)]
    masks = [None, None, torch.zeros(6, dtype=torch.bool).numpy(), None]
    return pack_texts([TextExample(tokens, mask) for tokens, mask in zip(rows, masks)])


def preference_batch(facts):
    if not facts.predicts:
        return pack_judged([JudgedPair(p.prompt, p.chosen, p.reject, margin=0.5) for p in pair_examples()])
    batch = pairs()
    return dataclasses.replace(batch, reference=torch.full((3, 2), -1.5) if facts.reference else None)


def sampled_batch(facts):
    """Two answers to each of three prompts, with every number that the algorithm's batch has a field for."""
    kind, generator = load(facts.algorithm).batch, torch.Generator().manual_seed(7)
    own = {field.name for field in dataclasses.fields(AnswerBatch)} | {"trained_total"}
    names = [field.name for field in dataclasses.fields(kind) if field.name not in own]

    def answer(ids):
        return Answer(ids, True, {name: torch.randn(len(ids), generator=generator).double() for name in names})

    examples = pair_examples()
    answers = [[answer(pair.chosen), answer(pair.reject)] for pair in examples]
    return pack_policy(kind, [pair.prompt for pair in examples], answers, total=6.0, trained_total=29.0)


# KTO runs in chunks in tests/runs/test_preference_runs.py, distillation in tests/runs/test_distillation.py
LOSS_CASES = [
    name for name, facts in tables.LOSSES.items() if name in LOSSES and facts.data != "rated" and not facts.teacher
]


@pytest.mark.parametrize("name", LOSS_CASES)
def test_every_loss_is_that_of_one_long_pass(name):
    """Value, metrics and gradients, in float64; a chunk without a trained token is harmless."""
    loss, text = LOSSES[name], tables.LOSSES[name].data == "text"
    model = build(random_tensors("x070", n_layer=2, heads=loss.facts.scalar_head), torch.float64)
    batch = long_batch() if text else preference_batch(loss.facts)
    if loss.facts.algorithm:
        batch = sampled_batch(loss.facts)
    found = []
    for length in (0, 4):
        config = Config(loss=name, smoothing=0.1 if text else 0.0, infctx=length > 0, chunk_ctx=length)
        value, metrics = batch_loss(model, batch, loss, config)
        found.append((value.detach(), metrics, gradients(model, value)))
    (whole, logged, want), (value, metrics, got) = found
    assert torch.allclose(whole, value, rtol=1e-10)
    assert logged.keys() == metrics.keys()
    assert all(torch.allclose(logged[k].double(), metrics[k].double(), rtol=1e-9) for k in logged)
    for key, grad in want.items():
        assert float((grad - got[key]).abs().max() / grad.abs().max().clamp_min(1e-3)) <= 1e-10, key


@pytest.mark.parametrize("rows", [[1], [1, 1], [9]])
def test_a_sample_with_nothing_to_train_is_harmless(rows):
    """Documents of one token, or all masked: the loss is 0 and so is every gradient, not NaN or a crash."""
    model = build(random_tensors("x070", n_layer=2), torch.float64)
    batch = texts(*rows)
    batch = dataclasses.replace(batch, targets=torch.full_like(batch.targets, IGNORE))
    value, metrics = batch_loss(model, batch, LOSSES["sft"], Config(loss="sft", infctx=True, chunk_ctx=4))
    assert float(value.detach()) == 0 and all(float(x) == 0 for x in metrics.values())
    if value.requires_grad:
        assert all(bool((grad == 0).all()) for grad in gradients(model, value).values())


@pytest.mark.parametrize("name", ["keeping", "sums"])
def test_memory_of_one_chunk_is_free_before_the_next(name):
    """If this breaks, two chunks' gradients lie in memory at once, which is as much as the model again."""
    model = build(random_tensors("x070", n_layer=2), torch.float64)
    batch = texts(24)
    alive: list[weakref.ref] = []

    def score(hidden, span):
        assert not any(found() is not None for found in alive), "the chunk before is still there"
        if hidden.requires_grad:
            alive[:] = [weakref.ref(hidden)]
        scores = token_scores(model.head, hidden, batch.targets[span]).logp
        return {"logp": scores.sum()[None] if name == "sums" else scores}

    found = run_in_chunks(model, in_chunks(batch, 5), score, ChunkOptions(sums=name == "sums"))
    found["logp"].sum().backward()
    assert alive


@pytest.mark.parametrize("mode", list(ADAPTERS))
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_adapters_packed_matrices_and_recomputed_blocks(mode, quant):
    """float32, with a dropout that must draw in the second run what it drew in the first."""
    torch.manual_seed(0)
    tensors = random_tensors("x060", n_layer=2, n_embd=128, head_size=64)
    plan = make_plan(mode, 2, rank=4, alpha=8.0, dropout=0.0, lr_init=1.0, lr_final=1.0)
    model, _ = build_model(tensors, BuildOptions(torch.float32, plan=plan, quant=quant, grad_cp=True))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    batch = texts(9, 14)
    score = scorer(model, batch.targets)
    compare(
        model, score(text_hidden(model, batch), slice(None)), run_in_chunks(model, in_chunks(batch, 5), score), 1e-4
    )


@pytest.mark.parametrize("where", ["adapters", "stream"])
def test_dropout_draws_the_same_in_both_runs(where):
    """If this breaks, the gradient belongs to another network than the loss."""
    shares = {"adapters": 0.0, "stream": 0.0} | {where: 0.5}
    plan = make_plan("lora", 2, rank=4, alpha=8.0, dropout=shares["adapters"], lr_init=1.0, lr_final=1.0)
    options = BuildOptions(torch.float64, plan=plan, dropout=shares["stream"])
    model, _ = build_model(random_tensors("x070", n_layer=2), options)
    model.train()
    name, weight = next((n, p) for n, p in model.named_parameters() if n.endswith("key.lora_B"))
    batch, step = texts(9, 14), 1e-6
    score = scorer(model, batch.targets)

    def value():
        torch.manual_seed(5)
        return weigh(run_in_chunks(model, in_chunks(batch, 5), score))

    slope = gradients(model, value())[name]
    with torch.no_grad():
        before = float(value())
        direction = slope / slope.norm()
        weight += step * direction
        assert (float(value()) - before) / step == pytest.approx(float(slope.norm()), rel=1e-3)


def test_truncated_cuts_the_gradient_within_a_segment_only():
    """The old behaviour: each chunk by itself, but a prompt still learns from its answers' first chunk."""
    model = build(random_tensors("x070", n_layer=2), torch.float64)
    batch = texts(12)
    score = scorer(model, batch.targets)
    truncated = gradients(model, weigh(run_in_chunks(model, in_chunks(batch, 4), score, ChunkOptions(truncated=True))))
    exact = gradients(model, weigh(score(text_hidden(model, batch), slice(None))))
    generator = torch.Generator().manual_seed(6)
    weights = [torch.randn(11, generator=generator, dtype=torch.float64) for _ in range(3)]
    state, total = None, 0
    for begin in range(0, 11, 4):
        here = slice(begin, min(begin + 4, 11))
        hidden, state = model(batch.tokens[None, here], state and state.map(torch.Tensor.detach))
        total = total + sum((x * w[here]).sum() for x, w in zip(score(hidden[0], here).values(), weights, strict=True))
    wanted = gradients(model, total)
    assert all(torch.allclose(truncated[k], wanted[k], atol=1e-10) for k in wanted)
    assert any(not torch.allclose(exact[k], wanted[k], atol=1e-4) for k in wanted)


def test_states_wait_in_host_memory_unchanged():
    """If this breaks, --state_offload 1 changes what is learnt."""
    model = build(random_tensors("x070", n_layer=2), torch.float64)
    batch = pairs()
    score = scorer(model, batch.targets)
    found = [
        gradients(model, weigh(run_in_chunks(model, in_chunks(batch, 3), score, ChunkOptions(offload=x))))
        for x in (False, True)
    ]
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_gradients_arrive_once():
    """DDP and ZeRO refuse a parameter whose gradient is ready twice in one backward pass."""
    model = build(random_tensors("x070", n_layer=2), torch.float64)
    batch, arrived = pairs(), []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    weigh(run_in_chunks(model, in_chunks(batch, 3), scorer(model, batch.targets))).backward()
    assert len(arrived) == len(set(arrived)) > 30
