"""The chunked head against full logits in float64: if these fail, every loss trains on wrong numbers.

Legend: T tokens, C width, V vocabulary.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rwkv_rlhf.data.batch import IGNORE
from rwkv_rlhf.losses.head import is_product
from rwkv_rlhf.losses.tokens import RequiredStats, token_scores, weighted_nll
from rwkv_rlhf.ops import logprob
from tests.support.heads import CHUNKS, HEADS, TARGETS, C, LowRankHead, V, gradients, hidden_states, plain

BOTH = RequiredStats(mean=True, max=True)


def full_scores(head, hidden, targets):
    """log p(target), mean over k of log p_k, max logit, straight from softmax's definition over full logits."""
    logits = head(hidden)
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    trained = (targets != IGNORE).to(logits.dtype)
    picked = p[torch.arange(len(targets)), targets.clamp_min(0)]
    return picked.log() * trained, p.log().mean(1) * trained, logits.amax(1) * trained


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("kind", HEADS)
def test_scores_and_gradients_equal_full_logits(kind, chunk):
    """If this breaks, --head_chunk changes what is learnt."""
    head, hidden = HEADS[kind](), hidden_states()
    mix = torch.randn(3, len(TARGETS), dtype=torch.float64)
    found = token_scores(head, hidden, TARGETS, BOTH, head_chunk=chunk)
    truth = full_scores(head, hidden, TARGETS)
    for name, a, b in zip(found._fields, found, truth):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)
    got = gradients(sum((m * s).sum() for m, s in zip(mix, found)), head, hidden)
    want = gradients(sum((m * s).sum() for m, s in zip(mix, truth)), head, hidden)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("kind", HEADS)
def test_gradients_formed_in_forward_equal_recomputed_ones(kind, chunk):
    """SFT's cheaper path may not change what is learnt, smoothing, weights, L2Wrap and upstream scale included."""
    head, hidden = HEADS[kind](), hidden_states()
    weights = torch.rand(len(TARGETS), dtype=torch.float64)
    found = weighted_nll(head, hidden, TARGETS, weights, head_chunk=chunk, smoothing=0.1, l2wrap_weight=0.3)
    got = gradients(found.value * 2.5, head, hidden)
    logp, mean_logp, top = full_scores(head, hidden, TARGETS)
    loss, wrap = (weights * (-0.9 * logp - 0.1 * mean_logp)).sum(), (0.3 * weights * top**2).sum()
    torch.testing.assert_close(found.value, loss + wrap)
    torch.testing.assert_close(found.loss, loss.detach())
    torch.testing.assert_close(found.nll, -(weights * logp).sum().detach())
    torch.testing.assert_close(found.l2wrap, wrap.detach())
    assert not any(part.requires_grad for part in found[1:])
    for a, b in zip(got, gradients((loss + wrap) * 2.5, head, hidden), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_gradcheck_of_scores(kind):
    """If this breaks, the gradients are not those of the scores: finite differences say so."""
    head, hidden = HEADS[kind](), hidden_states()
    params = [p for p in head.parameters() if p.requires_grad]

    def scores(hidden, *_):
        return token_scores(head, hidden, TARGETS, BOTH, head_chunk=4)[:3]

    assert torch.autograd.gradcheck(scores, (hidden, *params))


@pytest.mark.parametrize("kind", HEADS)
def test_a_frozen_head_and_frozen_hidden_states_get_no_gradient(kind):
    """If this breaks, a frozen head learns, or memory is spent on gradients that nobody uses."""
    for run in (lambda *a: token_scores(*a).logp.sum(), lambda *a: weighted_nll(*a).value):
        head, hidden = HEADS[kind]().requires_grad_(False), hidden_states()
        run(head, hidden, TARGETS).backward()
        assert all(p.grad is None for p in head.parameters())
        assert hidden.grad is not None
        head, hidden = HEADS[kind](), hidden_states().detach()
        value = run(head, hidden, TARGETS)
        if any(p.requires_grad for p in head.parameters()):
            value.backward()
        assert hidden.grad is None


@pytest.mark.parametrize(
    "run", [lambda *a: token_scores(*a, head_chunk=2).logp.sum(), lambda *a: weighted_nll(*a, head_chunk=2).value]
)
def test_each_parameter_receives_its_gradient_once(run):
    """DDP and ZeRO stop with 'marked ready only once' when a parameter's gradient arrives chunk by chunk."""
    head, hidden, arrivals = LowRankHead(), hidden_states(), []
    for name, parameter in head.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrivals.append(name))
    run(head, hidden, TARGETS).backward()
    assert sorted(arrivals) == ["lora_A", "lora_B"]


def test_ignored_positions_do_not_reach_the_head():
    """If this breaks, prompts cost a row of logits for each token, or count in a loss."""
    head, seen = plain(), []
    head.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    hidden = hidden_states()
    scores = token_scores(head, hidden, TARGETS, BOTH)
    assert sum(seen) == int((TARGETS != IGNORE).sum())
    assert all(bool((score[TARGETS == IGNORE] == 0).all()) for score in scores[:3])
    poisoned = torch.where((TARGETS == IGNORE)[:, None], torch.nan, hidden)
    assert torch.equal(token_scores(head, poisoned, TARGETS).logp, scores.logp)


def test_token_zero_is_trained():
    """Id 0 ends a document; masking it (target != 0) is the old programs' trap 5."""
    head, hidden, zeros = plain(), hidden_states(), torch.zeros_like(TARGETS)
    logp = token_scores(head, hidden, zeros).logp
    torch.testing.assert_close(logp, head(hidden).log_softmax(1)[:, 0])
    assert bool((logp != 0).all())


@pytest.mark.parametrize("kind", HEADS)
def test_no_trained_position_is_harmless(kind):
    """A micro-batch that is all prompt gives a loss of 0 and zero gradients, so other ranks do not wait for it."""
    head, hidden, nothing = HEADS[kind](), hidden_states(), torch.full_like(TARGETS, IGNORE)
    scores = token_scores(head, hidden, nothing, BOTH)
    total = weighted_nll(head, hidden, nothing, smoothing=0.1, l2wrap_weight=1.0).value
    for value in (sum(score.sum() for score in scores[:3]), total):
        assert value.item() == 0
        assert all(bool((g == 0).all()) for g in gradients(value, head, hidden))


def test_dropout_is_replayed_in_the_backward_pass():
    """Otherwise the gradient belongs to another dropout mask than the loss."""
    head, hidden = LowRankHead(dropout=0.5), hidden_states()
    targets = TARGETS.clamp_min(0)
    torch.manual_seed(3)
    truth = full_scores(lambda x: torch.cat([head(row) for row in x.split(2)]), hidden, targets)[0].sum()
    want = gradients(truth, head, hidden)
    torch.manual_seed(3)
    found = token_scores(head, hidden, targets, head_chunk=4).logp.sum()
    drawn = torch.rand(1)
    got = gradients(found, head, hidden)
    assert not torch.equal(torch.rand(1), drawn)
    torch.testing.assert_close(found, truth)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_bfloat16_hidden_states_give_float32_scores_and_float32_master_gradients():
    """If this breaks, losses and the masters' gradients are rounded to three digits."""
    head, hidden = LowRankHead(torch.float32), hidden_states(torch.bfloat16)
    scores = token_scores(head, hidden, TARGETS, BOTH)
    truth = full_scores(lambda x: head(x).double(), hidden, TARGETS)
    for a, b in zip(scores, truth):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    scores.logp.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert head.lora_A.grad.dtype == head.lora_B.grad.dtype == torch.float32


def test_weight_gradient_is_summed_over_chunks_in_float32():
    """Summed in bfloat16, hundreds of chunks would lose all but the first 256."""
    rows = 400
    head = plain(torch.bfloat16)
    hidden = torch.randn(1, C, dtype=torch.bfloat16).expand(rows, C).contiguous()
    targets = torch.ones(rows, dtype=torch.int64)
    once = torch.autograd.grad(token_scores(head, hidden[:1], targets[:1]).logp.sum(), head.weight)[0]
    many = torch.autograd.grad(token_scores(head, hidden, targets, head_chunk=1).logp.sum(), head.weight)[0]
    torch.testing.assert_close(many, (once.float() * rows).bfloat16(), rtol=1e-2, atol=0)


def test_second_backward_through_weighted_nll_is_refused():
    """If this breaks, a second backward pass gives a gradient of what is no longer kept."""
    head, hidden = plain(), hidden_states()
    total = weighted_nll(head, hidden, TARGETS).value
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        total.backward()


def test_only_heads_without_adapter_or_hook_take_the_short_path():
    """A hook gathers sharded weights; an adapter changes the product: both must run as modules."""
    from rwkv_rlhf.layers.linear import Linear

    assert is_product(plain()) and is_product(Linear(C, V))
    assert not any(is_product(HEADS[kind]()) for kind in ("lora", "bias", "softcap"))
    hooked = plain()
    hooked.register_forward_pre_hook(lambda *_: None)
    assert not is_product(hooked)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("store", ["none", "nf4"])
def test_heads_of_the_model(store, adapter):
    """Packed or dense, with or without LoRA: the scores are those of the head called as a module."""
    from rwkv_rlhf.layers.adaptation import Adaptation
    from rwkv_rlhf.layers.adapters.lora import LoRA
    from rwkv_rlhf.layers.linear import Linear, StorageSpec

    if store != "none":
        pytest.importorskip("bitsandbytes")
    head = Linear(C, V, device="meta")
    head = LoRA.wrap(head, Adaptation.make("lora", 2, 4.0)) if adapter else head
    head.load_weight(torch.randn(V, C), StorageSpec(torch.float32, store=store))
    if adapter:
        nn.init.normal_(head.lora_B)
    hidden = hidden_states(torch.float32)
    found, truth = (
        token_scores(head, hidden, TARGETS, head_chunk=4).logp.sum(),
        full_scores(head, hidden, TARGETS)[0].sum(),
    )
    torch.testing.assert_close(found, truth)
    for a, b in zip(gradients(found, head, hidden), gradients(truth, head, hidden), strict=True):
        torch.testing.assert_close(a, b)


def test_mistakes_are_named():
    """If this breaks, a token outside the vocabulary is an index error somewhere in the head."""
    with pytest.raises(ValueError, match="token id 13 is outside the model's vocabulary of 13"):
        token_scores(plain(), hidden_states(), TARGETS.clone().fill_(V))
    with pytest.raises(ValueError, match="chunk is 0"):
        token_scores(plain(), hidden_states(), TARGETS, head_chunk=0)


@pytest.mark.parametrize("backend", ["naive", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 13, 64, 1000, 65536])
def test_row_pieces_against_float64(backend, dtype, width):
    """Both backends against the definition, at widths off the vector length, large logits and ties included."""
    if backend == "cpu" and logprob.choose("logprob", torch.device("cpu"), dtype, (1, 1))[0] != "cpu":
        pytest.skip("the C++ library cannot be built here")
    rows = 5
    logits = (torch.randn(rows, width) * torch.tensor([0.1, 1.0, 10.0, 100.0, 1e4])[:, None]).to(dtype)
    targets = torch.randint(width, (rows,))
    truth = logits.double()
    stats = logprob.row_stats(logits, targets, backend)
    assert all(value.dtype == torch.float32 for value in stats[:4])
    torch.testing.assert_close(stats.lse.double(), torch.logsumexp(truth, 1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.target_logit.double(), truth.gather(1, targets[:, None])[:, 0], rtol=0, atol=0)
    scale = truth.abs().sum(1)
    assert bool(((stats.logit_sum.double() - truth.sum(1)).abs() <= 1e-6 * scale).all())
    torch.testing.assert_close(stats.max_logit.double(), truth.amax(1), rtol=0, atol=0)
    assert torch.equal(logits.gather(1, stats.argmax[:, None])[:, 0], logits.amax(1))

    upstream = torch.randn(3, rows)
    onehot, top = F.one_hot(targets, width), F.one_hot(stats.argmax, width)
    p = (truth - stats.lse.double()[:, None]).exp()
    g_logp, g_mean, g_max = upstream.double()[:, :, None]
    want = g_logp * (onehot - p) + g_mean * (1 / width - p) + g_max * top
    result = logprob.row_grad_(logits, targets, stats.lse, *upstream[:2], stats.argmax, upstream[2], backend)
    assert result.data_ptr() == logits.data_ptr()
    exact = 2**-8 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(result.double(), want, rtol=exact, atol=exact * 1e-2 if width > 1 else 1e-6)


@pytest.mark.parametrize("backend", ["naive", "cpu"])
def test_rows_with_infinities_and_nan_do_not_pass_for_healthy_ones(backend):
    """-inf logits are masked tokens with probability 0; a NaN must surface, not turn into some number."""
    if backend == "cpu" and logprob.choose("logprob", torch.device("cpu"), torch.float32, (1, 1))[0] != "cpu":
        pytest.skip("the C++ library cannot be built here")
    logits = torch.randn(3, 40)
    logits[0, 7:30] = -torch.inf
    logits[1, 39] = torch.nan
    logits[2, 20] = torch.inf
    want = torch.logsumexp(logits, 1)
    stats = logprob.row_stats(logits, torch.zeros(3, dtype=torch.int64), backend)
    torch.testing.assert_close(stats.lse[0], want[0])
    assert torch.isnan(stats.lse[1])
    assert not torch.isfinite(stats.lse[2])
