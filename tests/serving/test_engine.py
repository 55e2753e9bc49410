"""The model's thread: answers to several, answers that nobody wants any more, a model that fails."""

import queue

import pytest
import torch

from rwkv_rlhf.data.conversation import Turn
from rwkv_rlhf.data.templates.template import TEMPLATES, WORLD
from rwkv_rlhf.data.tokenizer import load_tokenizer
from rwkv_rlhf.generation.sampling_params import SamplingParams
from rwkv_rlhf.serving.engine import Cue, Engine, shared_with_next
from tests.support.files import VOCAB
from tests.support.models import build, random_tensors


@pytest.fixture
def engine(vocab_file):
    """A small model that answers two at a time."""
    engine = Engine(build(random_tensors(vocab_size=VOCAB)), load_tokenizer(VOCAB, str(vocab_file)), 2)
    yield engine
    engine.close()


def ask(engine, tokens=6, samples=1, seed=0):
    """What is heard, until all answers have ended."""
    heard, params = queue.Queue(), SamplingParams(max_tokens=tokens, samples=samples, stop_texts=(), stop_ids=())
    ticket = engine.ask(Cue("User: a", [5, 6, 7]), params, seed, heard.put)
    return heard, ticket


def ends(heard, count=1):
    """The pieces with which answers end."""
    found = []
    while len(found) < count:
        piece = heard.get(timeout=60)
        found += [piece] if piece.done or piece.error else []
    return found


def test_more_than_there_is_room_for(engine):
    """If this breaks, a third client is never answered, or hears another one's answer."""
    asked = [ask(engine, seed=seed, samples=2) for seed in (1, 2, 1)]
    found = [{piece.sample: piece.done.tokens for piece in ends(heard, 2)} for heard, _ in asked]
    assert found[0] == found[2] != found[1] and {*found[0]} == {0, 1} and found[0][0] != found[0][1]


def test_nobody_listens_any_more(engine):
    """If this breaks, an answer that nobody reads runs to its end, or a listener that is gone ends the others'."""
    heard, ticket = ask(engine, tokens=100000)
    heard.get(timeout=60)
    ticket.cancel()

    def gone(piece):
        raise RuntimeError("the loop is closed")

    engine.ask(Cue("User: a", [5]), SamplingParams(max_tokens=3, stop_texts=()), 0, gone)
    assert len(ends(ask(engine)[0])[0].done.tokens) == 6


def test_a_model_that_fails(engine):
    """If this breaks, clients wait for ever for a model whose numbers are not finite."""
    head = engine._sampler.model.head.weight
    kept = head.detach().clone()
    with torch.no_grad():
        head.fill_(float("nan"))
        assert "not finite" in ends(ask(engine)[0])[0].error
        head.copy_(kept)
    assert len(ends(ask(engine)[0])[0].done.tokens) == 6


def test_the_next_turn_runs_only_what_is_new(vocab_file):
    """If this breaks, each turn of a conversation runs all of it again, or answers another one."""
    model, letters = build(random_tensors(vocab_size=VOCAB)), load_tokenizer(VOCAB, str(vocab_file))
    params = SamplingParams(temperature=0, max_tokens=5, stop_texts=(), stop_ids=())
    talk = [Turn("user", "tell me something about rivers"), Turn("assistant", "they flow"), Turn("user", "and lakes?")]
    for template in (WORLD, TEMPLATES["g1"][0].template, TEMPLATES["g1h"][0].template):
        remembering, plain = Engine(model, letters, 2, states=1), Engine(model, letters, 2)
        try:
            found = []
            for turns in (talk[:1], talk, talk[:1]):
                cue = Cue.of(turns, template, letters)
                cue = cue._replace(shared=shared_with_next(turns, template, letters, cue.ids))
                heard, alone = queue.Queue(), queue.Queue()
                remembering.ask(cue, params, 0, heard.put)
                plain.ask(cue, params, 0, alone.put)
                (mine,), (theirs,) = ends(heard), ends(alone)
                assert mine.done.tokens == theirs.done.tokens and mine.done.logprobs == pytest.approx(
                    theirs.done.logprobs, abs=1e-4
                )
                found.append((mine.cached, cue))
        finally:
            remembering.close()
            plain.close()
        (first, one), (second, two), (third, _) = found
        assert first == third == 0  # one state is kept: that of the longer conversation
        assert second == one.shared >= len(template.history(talk[:1]).encode()) and two.ids[:second] == one.ids[:second]
