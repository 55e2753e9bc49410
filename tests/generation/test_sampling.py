"""Sampling: what is sampled, with which probability, when it ends, and that nobody else in the batch matters."""

import math
from collections import deque

import pytest
import torch
from torch import nn

from rwkv_rlhf.checkpoints.loading import BuildOptions, build_model
from rwkv_rlhf.data.tokenizer import load_tokenizer
from rwkv_rlhf.generation import sampler
from rwkv_rlhf.generation.prefixes import PrefixCache
from rwkv_rlhf.generation.rows import Request
from rwkv_rlhf.generation.sampler import Sampler
from rwkv_rlhf.generation.sampling import BY_LEVELS, candidate_counts, nucleus, penalise, pick, sequence_seed
from rwkv_rlhf.generation.sampling_params import SamplingParams
from rwkv_rlhf.generation.stops import Stops
from rwkv_rlhf.model.initial import initial_tensors
from rwkv_rlhf.model.state import LayerState, State
from tests.support.files import VOCAB

V = 70


class Letters:
    """One token per byte; id 0 is the end of a document."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(i for i in ids if i)

    def decode(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")


class Chain(nn.Module):
    """The next token depends on the last one only: `table` (V, V) holds the logits. Counts the rows of each step."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.rows: list[int] = []

    def forward(self, tokens, state=None, starts=None):
        rows = tokens.shape[0] if starts is None else len(starts) - 1
        self.rows.append(rows)
        zero = torch.zeros(rows, 1)
        return nn.functional.one_hot(tokens, len(self.table)).float(), State((LayerState(zero, zero, zero),))

    def head(self, hidden):
        return hidden @ self.table


def script(text: str, size: int = 128) -> Chain:
    """A chain that surely says `text` (each character followed by the next one; repeats not allowed)."""
    table = torch.zeros(size, size)
    for here, after in zip(text.encode(), text.encode()[1:], strict=False):
        table[here, after] = 50.0
    return Chain(table)


@pytest.fixture(scope="module", params=["x040", "x060", "x070"])
def model(request):
    """x040 has a state of another form than the later versions."""
    tensors = initial_tensors(request.param, 2, 64, V, 64, 5)
    draw = torch.Generator().manual_seed(0)
    tensors = {name: t + 0.1 * torch.randn(t.shape, generator=draw) for name, t in tensors.items()}
    tensors["head.weight"] *= 4  # a decided opinion at every step
    return build_model(tensors, BuildOptions(torch.float32))[0]


def one_pass(model, prompt, tokens):
    """Log-probability of each of `tokens` by one plain pass over everything."""
    with torch.no_grad():
        hidden, _ = model(torch.tensor([prompt + tokens[:-1]]))
        logp = torch.log_softmax(model.head(hidden[0]).double(), -1)[len(prompt) - 1 :]
    return [float(row[token]) for row, token in zip(logp, tokens, strict=True)]


def generate(model, prompts, *, tokenizer=None, seeds=None, state=None, keep_state=False, **settings):
    """As a command would, with the settings as words."""
    more = {"seeds": seeds, "state": state, "keep_state": keep_state}
    return Sampler(model, tokenizer).generate(prompts, SamplingParams(**settings), **more)


PROMPTS = [[3, 9, 4], [17], [5, 6, 7, 8, 9, 10, 11]]
OPEN = {"stop_texts": (), "stop_ids": ()}


def test_logprobs_are_those_of_the_model_itself(model):
    """A trainer would learn from wrong probabilities if the temperature, cuts or penalties leaked into them."""
    wild = {"temperature": 1.7, "top_p": 0.8, "frequency": 0.7, "presence": 0.3, "banned": (1,)}
    for prompt, one in zip(PROMPTS, generate(model, PROMPTS, max_tokens=12, seed=3, **wild, **OPEN), strict=True):
        assert len(one.tokens) == 12 and not one.finished
        assert one.logprobs == pytest.approx(one_pass(model, prompt, one.tokens), abs=2e-4)


def test_memory_is_that_of_the_answers_not_of_their_limit(model, monkeypatch):
    """If this breaks, --max_tokens 1000000000 asks for 8 GB a sequence, or a longer limit samples another answer."""
    monkeypatch.setattr(sampler, "PLACES", 4)
    many = generate(model, PROMPTS, max_tokens=20, seed=4, frequency=0.3, **OPEN)
    stop = {"stop_texts": (), "stop_ids": (many[0].tokens[-1],)}
    few = generate(model, PROMPTS[:1], max_tokens=20, seed=4, frequency=0.3, **stop)
    huge = generate(model, PROMPTS[:1], max_tokens=10**9, seed=4, frequency=0.3, **stop)
    assert huge[0].tokens == few[0].tokens == many[0].tokens[: len(few[0].tokens)]
    generator = torch.Generator().manual_seed(9)
    apart = [torch.rand(1, n, generator=generator, dtype=torch.float64) for n in (64, 64, 128)]
    together = torch.rand(256, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    assert torch.equal(torch.cat(apart, 1)[0], together)  # however often an answer is given more places


def test_places_that_grow_are_the_same_in_a_batch_that_others_join(model, monkeypatch):
    """If this breaks, an answer that joins others in the middle draws other numbers than alone."""
    monkeypatch.setattr(sampler, "PLACES", 4)
    alone = [generate(model, [prompt], max_tokens=20, seeds=[n], **OPEN)[0] for n, prompt in enumerate(PROMPTS)]
    queue = deque(
        Request(prompt, SamplingParams(max_tokens=20, **OPEN), sequence_seed(n, 0), n)
        for n, prompt in enumerate(PROMPTS)
    )
    found = {one.request.key: one.completion.tokens for one in Sampler(model).stream(queue, at_once=2)}
    assert [found[n] for n in range(3)] == [one.tokens for one in alone]


def test_temperature_0_takes_the_likeliest_token_every_time(model):
    """The greedy answer must be the one that a plain pass over the whole text predicts."""
    for prompt, one in zip(PROMPTS, generate(model, PROMPTS, max_tokens=8, temperature=0, **OPEN), strict=True):
        said = list(prompt)
        for token in one.tokens:
            with torch.no_grad():
                hidden, _ = model(torch.tensor([said]))
            assert token == int(model.head(hidden[0, -1]).argmax())
            said.append(token)


def test_an_answer_does_not_depend_on_the_rest_of_the_batch(model):
    """The same row with the same seed gives the same answer in any batch, so a resumed run goes on unchanged."""
    settings = {
        "max_tokens": 20,
        "temperature": 1.0,
        "top_p": 0.9,
        "frequency": 0.5,
        "stop_texts": (),
        "stop_ids": (2, 3, 4, 5),
    }
    together = generate(model, PROMPTS, seeds=[11, 12, 13], **settings)
    for prompt, seed, one in zip(PROMPTS, (11, 12, 13), together, strict=True):
        assert generate(model, [prompt], seeds=[seed], **settings)[0].tokens == one.tokens


def test_the_seed_decides_and_rows_differ(model):
    """Equal prompts with one seed must not all get one answer; the same call must repeat itself."""
    calls = [generate(model, [[7, 8]] * 4, max_tokens=12, seed=seed, **OPEN) for seed in (1, 1, 2)]
    said = [[one.tokens for one in call] for call in calls]
    assert said[0] == said[1] and said[0] != said[2]
    assert len({tuple(tokens) for tokens in said[0]}) == 4


def test_samples_of_a_prompt_share_its_run(model):
    """GRPO's groups: prompt-major order, different answers, the same probabilities as single runs."""
    out = generate(model, PROMPTS[:2], max_tokens=6, samples=3, seed=4, **OPEN)
    assert len(out) == 6 and len({tuple(one.tokens) for one in out[:3]}) == 3
    for row, one in enumerate(out):
        assert one.logprobs == pytest.approx(one_pass(model, PROMPTS[row // 3], one.tokens), abs=2e-4)


def test_a_stop_text_ends_a_sequence_even_across_tokens():
    """`ab` is never one token here; the answer ends before it and what follows is not sampled."""
    chain = script("xyzabcd")
    one = generate(chain, [[ord("x")]], max_tokens=20, temperature=0, stop_texts=("ab",), tokenizer=Letters())[0]
    assert one.finished and one.text == "yz" and Letters().decode(one.tokens) == "yzab"


def test_finished_sequences_leave_the_batch():
    """A short answer must not cost the steps of a long one."""
    chain = script("abcdefgh\x01")
    out = generate(chain, [[ord("g")], [ord("a")]], max_tokens=30, temperature=0, stop_ids=(1,), stop_texts=())
    assert [len(one.tokens) for one in out] == [2, 8] and all(one.finished for one in out)
    assert chain.rows == [2, 2] + [1] * 6


def test_a_waiting_prompt_takes_the_place_of_one_that_ended():
    """Continuous batching: two places, three prompts; the third runs when the first has ended, beside the second."""
    chain = script("abcdefgh\x01")
    prompts = [[ord("g")], [ord("a")], [ord("f")]]
    sampler, settings = Sampler(chain), {"max_tokens": 30, "temperature": 0, "stop_ids": (1,), "stop_texts": ()}
    queue = deque(Request(prompt, SamplingParams(**settings), 0, row) for row, prompt in enumerate(prompts))
    done = list(sampler.stream(queue, at_once=2))
    assert [one.request.key for one in done] == [0, 2, 1]
    assert [len(one.completion.tokens) for one in done] == [2, 3, 8]
    # two prompts, two steps, the third prompt, steps of two until it has ended, then steps of one
    assert chain.rows == [2, 2, 2, 1, 2, 2, 1, 1, 1]


def test_what_is_asked_later_runs_too():
    """A command asks again for an answer that was no good while the others still run."""
    chain = script("abcdefgh\x01")
    params = SamplingParams(max_tokens=30, temperature=0, stop_ids=(1,), stop_texts=())
    queue = deque([Request([ord("g")], params, 0, "first"), Request([ord("a")], params, 0, "long")])
    found = []
    for one in Sampler(chain).stream(queue, at_once=2):
        found.append((one.request.key, len(one.completion.tokens)))
        if one.request.key == "first":
            queue.append(Request([ord("f")], params, 0, "again"))
    assert found == [("first", 2), ("again", 3), ("long", 8)]


def test_places_change_nothing(model):
    """Any number of places gives the same answers: other neighbours, other places in the batch, mixed settings."""
    ways = [
        {"max_tokens": 9, "top_p": 0.9, "samples": 3},
        {"max_tokens": 14, "temperature": 1.5, "frequency": 0.7, "presence": 0.2},
        {"max_tokens": 5, "temperature": 0},
    ]

    def sampled(at_once):
        queue = deque(
            Request(prompt, SamplingParams(stop_texts=(), stop_ids=(2, 3, 4, 5), **ways[row % 3]), 100 * row, row)
            for row, prompt in enumerate(PROMPTS * 3)
        )
        done = Sampler(model).stream(queue, at_once=at_once)
        return {(one.request.key, one.copy): one.completion.tokens for one in done}

    whole = sampled(0)
    assert len(whole) == 15 and all(sampled(at_once) == whole for at_once in (1, 2, 5))


def test_a_shared_beginning_runs_once(model):
    """A system text before every prompt: its state is kept, the answers are those of the whole prompts."""
    shared = [(7 * n) % 60 + 2 for n in range(20)]
    prompts = [[*shared, *rest] for rest in PROMPTS]
    cache = PrefixCache(model)
    assert cache.add_common(prompts) == 20 and cache.add_common(prompts[:1]) == 0
    params = SamplingParams(max_tokens=6, temperature=0, **OPEN)
    rests = [cache.find(prompt) for prompt in prompts]
    assert [list(rest.prompt) for rest in rests] == PROMPTS
    queue = deque(Request(rest.prompt, params, 0, row, rest.state) for row, rest in enumerate(rests))
    found = {one.request.key: one.completion for one in Sampler(model).stream(queue)}
    for row, whole in enumerate(generate(model, prompts, max_tokens=6, temperature=0, **OPEN)):
        assert found[row].tokens == whole.tokens
        assert found[row].logprobs == pytest.approx(whole.logprobs, abs=1e-4)
    assert list(cache.find(shared).prompt) == shared and cache.add_common([[1, 2], [1, 3]]) == 0


def test_scores_at_the_sampling_temperature(model):
    """What a trainer compares with its own: the whole distribution at that temperature, and its entropy."""
    settings = {"temperature": 0.7, "scored_temperature": 0.7, "entropy": True, "max_tokens": 8}
    one = generate(model, [PROMPTS[0]], seed=1, **settings, **OPEN)[0]
    with torch.no_grad():
        hidden, _ = model(torch.tensor([PROMPTS[0] + one.tokens[:-1]]))
        logits = model.head(hidden[0]).double()[len(PROMPTS[0]) - 1 :] / 0.7
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    assert one.logprobs == pytest.approx([float(row[token].log()) for row, token in zip(p, one.tokens)], abs=2e-4)
    assert one.entropies == pytest.approx((-(p * p.log()).sum(1)).tolist(), abs=2e-4)


def test_end_of_document_ends_without_being_said():
    """Token 0 stops generation and is no part of the text."""
    table = torch.zeros(128, 128)
    table[ord("a"), ord("b")] = table[ord("b"), 0] = 50.0
    one = generate(Chain(table), [[ord("a")]], max_tokens=9, temperature=0, tokenizer=Letters())[0]
    assert one.finished and one.tokens == [ord("b"), 0] and one.text == "b"


def test_half_a_character_is_left_out(vocab_file):
    """If this breaks, rejects that were cut inside a character of several tokens end in a question mark in a box."""
    stops = Stops(SamplingParams(), load_tokenizer(VOCAB, str(vocab_file)))
    tokens = [byte + 1 for byte in "a\u732b".encode()]
    assert [stops.text(tokens[:n]) for n in range(1, 5)] == ["a", "a", "a", "a\u732b"]


def test_state_goes_on_where_the_conversation_was(model):
    """A chat that keeps the state must answer as if it had read everything again."""
    first = generate(model, [[3, 9, 4]], max_tokens=5, seed=1, keep_state=True, **OPEN)[0]
    second = [5, 6]
    whole = generate(model, [[3, 9, 4, *first.tokens, *second]], max_tokens=6, temperature=0, **OPEN)[0]
    carried = [first.tokens[-1], *second]
    kept = generate(model, [carried], max_tokens=6, temperature=0, state=first.state, **OPEN)[0]
    assert kept.tokens == whole.tokens
    assert kept.logprobs == pytest.approx(whole.logprobs, abs=1e-4)


def test_training_mode_is_restored_and_nothing_is_tracked(model):
    """Dropout must be off while sampling and on again afterwards."""
    model.train()
    one = generate(model, [[1]], max_tokens=2, keep_state=True, **OPEN)[0]
    assert model.training and not one.state[0].wkv.requires_grad
    model.eval()


def shares(logits: list[float], params: SamplingParams, draws: int = 4000) -> list[float]:
    """How often each token is picked over evenly spaced draws: the probabilities, to 1/draws."""
    grid = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    picked = pick(torch.tensor([logits]).expand(draws, -1), grid, params).ids
    return (torch.bincount(picked, minlength=len(logits)) / draws).tolist()


def test_temperature_is_applied_to_what_top_p_leaves():
    """Hand computed: p = 0.5, 0.3, 0.2; top_p 0.7 keeps two; temperature 1/2 squares them: 25 to 9."""
    logits = [math.log(0.2), math.log(0.5), math.log(0.3)]
    assert shares(logits, SamplingParams(top_p=0.7, temperature=0.5)) == pytest.approx([0, 25 / 34, 9 / 34], abs=1e-3)
    assert shares(logits, SamplingParams()) == pytest.approx([0.2, 0.5, 0.3], abs=1e-3)
    assert shares(logits, SamplingParams(top_k=2)) == pytest.approx([0, 5 / 8, 3 / 8], abs=1e-3)
    assert shares(logits, SamplingParams(top_p=0.5)) == pytest.approx([0, 1, 0], abs=1e-3)


def test_top_p_over_a_flat_distribution_keeps_enough_tokens():
    """With 5000 nearly equal tokens, 0.9 of the mass is thousands of tokens, far more than are sorted at first."""
    probs = torch.softmax(torch.linspace(0, 0.1, 5000), 0)[None]
    tried = []
    for candidates in candidate_counts(SamplingParams(top_p=0.9), 5000):
        kept, ids, enough = nucleus(probs, 0.9, candidates)
        tried.append(candidates)
        if enough.all():
            break
    assert tried == [128, 1024, 5000]
    assert 0.9 <= float(kept.sum()) < 0.9 + float(probs.max()) + 1e-4
    assert len(set(ids[kept > 0].tolist())) == int((kept > 0).sum())


def test_a_wide_choice_is_not_sorted_and_picks_the_same():
    """Sorting a vocabulary for a flat distribution took a quarter of a token's time: the draw must still pick what it
    picks of all tokens sorted. Equal probabilities have no order, so numbers are compared."""
    generator = torch.Generator().manual_seed(5)
    for spread, size in ((0.5, 20000), (1.5, 20000), (4.0, 5000), (12.0, 700)):
        logits = torch.randn(40, size, generator=generator) * spread
        logits[1::2, 3] = float("-inf")  # banned
        probs = torch.softmax(logits, 1)
        draws = torch.rand(40, dtype=torch.float64, generator=generator)
        draws[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
        for top_p in (0.05, 0.5, 0.9, 0.9999, 1 - 1e-9):
            for temperature in (1.0, 0.7, 1.5):
                params = SamplingParams(top_p=top_p, temperature=temperature)
                found, expected = pick(logits, draws, params, BY_LEVELS), pick(logits, draws, params)
                here = found.enough  # a level may hold too many
                assert here.float().mean() > (0.3 if spread < 1 else 0.9), (spread, top_p)
                same = probs.gather(1, found.ids[:, None]) == probs.gather(1, expected.ids[:, None])
                assert same[:, 0][here].all(), (spread, top_p, temperature)


def test_what_levels_cannot_tell_is_sorted():
    """With thousands of equal tokens a level holds too many; the sampler must go on to the next count."""
    params = SamplingParams(top_p=0.9)
    assert list(candidate_counts(params, 5000, by_levels=True)) == [128, BY_LEVELS, 5000]
    assert list(candidate_counts(SamplingParams(top_p=0.9, top_k=300), 5000, by_levels=True)) == [128, 300]
    assert not pick(torch.zeros(2, 5000), torch.tensor([0.1, 0.7]).double(), params, BY_LEVELS).enough.any()


def test_a_draw_next_to_1_never_picks_a_forbidden_token():
    """Rounding at the end of the cumulative sum must not reach a banned or cut token."""
    logits = penalise(
        torch.zeros(1, 9), torch.empty(1, 0, dtype=torch.int64), torch.empty(1, 0).bool(), SamplingParams(banned=(8, 7))
    )
    draw = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert int(pick(logits, draw, SamplingParams(banned=(8, 7))).ids) == 6
    assert int(pick(logits, draw, SamplingParams(top_p=0.2)).ids) in range(7)


def test_penalties_decay_as_in_the_tradition():
    """Counts are multiplied by the decay at every token and grow by 1: computed here with a dict, token by token."""
    said, params = [4, 2, 4, 4, 1], SamplingParams(presence=0.25, frequency=0.5, penalty_decay=0.9)
    counts: dict[int, float] = {}
    for token in said:
        counts = {key: value * 0.9 for key, value in counts.items()}
        counts[token] = counts.get(token, 0) + 1
    expected = [-(0.25 + 0.5 * counts[token]) if token in counts else 0.0 for token in range(6)]
    first = torch.tensor([[token not in said[:place] for place, token in enumerate(said)]])
    found = penalise(torch.zeros(1, 6), torch.tensor([said]), first, params)
    assert found[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_frequency_penalty_prevents_loops():
    """A chain that only wants to repeat itself must move on under a penalty."""
    table = torch.zeros(8, 8)
    table.fill_diagonal_(2.0)
    plain = generate(Chain(table), [[3]], max_tokens=6, temperature=0, **OPEN)[0].tokens
    moved = generate(Chain(table), [[3]], max_tokens=6, temperature=0, frequency=5.0, **OPEN)[0].tokens
    assert plain == [3] * 6 and len(set(moved)) == 6


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "--top_p 1.5: must be above 0 and at most 1"),
        ({"top_k": -1}, "top_k"),
        ({"penalty_decay": -0.1}, "penalty_decay"),
        ({"frequency": float("nan")}, "--frequency nan: must be finite"),
        ({"samples": 0}, "samples"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seeds": [1, 2]}, "seeds"),
        ({"stop_texts": ("x",)}, "tokenizer"),
    ],
)
def test_settings_out_of_range_are_named(model, wrong, word):
    """One sentence instead of a crash inside a kernel."""
    with pytest.raises(ValueError, match=word):
        generate(model, [[1]], **({"max_tokens": 2, **OPEN} | wrong))


def test_an_empty_prompt_and_a_broken_model_are_named(model):
    """Neither may end in nonsense text."""
    with pytest.raises(ValueError, match="prompt 2"):
        generate(model, [[1], []], max_tokens=2, **OPEN)
    with pytest.raises(ValueError, match="not finite"):
        generate(Chain(torch.full((8, 8), float("nan"))), [[1]], max_tokens=2, **OPEN)


def test_sequence_seeds_do_not_collide():
    """Rows and tries get different generators."""
    assert len({sequence_seed(seed, row) for seed in range(30) for row in range(300)}) == 9000
