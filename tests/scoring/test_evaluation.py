"""Held-out figures: under one name training and evaluation say one thing, and it is what the table of metrics says."""

import dataclasses

import pytest
import torch

from rwkv_rlhf.data.batch import PairExample, RatedExample, pack_pairs, pack_rated
from rwkv_rlhf.losses import LOSSES
from rwkv_rlhf.losses.pairs import PairScores
from rwkv_rlhf.scoring.divergence import mismatch_ratio
from rwkv_rlhf.scoring.evaluation import pair_figures, rated_figures, score_pairs
from rwkv_rlhf.scoring.forward import batch_loss
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.metrics import METRICS
from tests.support.models import build, random_tensors

# a reward model's figures are in test_rewards.py
PREFERENCES = [n for n in LOSSES if tables.LOSSES[n].data in ("pairs", "rated") and tables.LOSSES[n].predicts]
# what training means by these is another thing: the objective, and what went through the model
OTHERWISE = {"loss", "tokens"}
WORDS = {"dpo": ({}, {"dpo_loss": "ipo"}, {"dpo_logp": "mean", "dpo_beta": 0.3}), "orpo": ({}, {"orpo_mode": "sum"})}
CASES = [(name, words) for name in PREFERENCES for words in WORDS.get(name, ({},))]


def examples():
    """Six pairs of different lengths."""
    draw = torch.Generator().manual_seed(5)
    lengths = ((9, 4, 7), (1, 3, 2), (5, 12, 1), (2, 6, 6), (7, 2, 9), (3, 5, 4))
    return [PairExample(*(torch.randint(300, (n,), generator=draw).tolist() for n in three)) for three in lengths]


def taken_apart(pairs):
    """The answers of the pairs one by one, good and bad; each with an answer to another prompt."""
    others = [*pairs[1:], pairs[0]]
    good = [RatedExample(pair.prompt, pair.chosen, other.chosen, good=True) for pair, other in zip(pairs, others)]
    return good + [RatedExample(p.prompt, p.reject, other.reject, good=False) for p, other in zip(pairs, others)]


def with_reference(model, pairs):
    sums = score_pairs(model, pairs, head_chunk=64).sums()
    return [dataclasses.replace(pair, reference=tuple(two)) for pair, two in zip(pairs, sums.tolist())], sums


def batch_of(name, model, pairs):
    """The pairs as one micro-batch of the loss, and as the examples that are held out."""
    if tables.LOSSES[name].data == "pairs":
        pairs, reference = with_reference(model, pairs)
        return pack_pairs(pairs), pairs, reference
    rated, reference = with_reference(model, taken_apart(pairs))
    return pack_rated(rated, others=[rated]), rated, reference


@pytest.mark.parametrize(("name", "words"), CASES)
def test_training_and_held_out_say_the_same_of_the_same_pairs(name, words):
    """Where training starts and after some steps: every name that both log has one value. If this breaks, a curve shows
    two things under one name, as margins once were rewards here and nats there."""
    model = build(random_tensors("x070", n_layer=2))
    loss, config = LOSSES[name], Config(loss=name, head_chunk=64, **words)
    batch, held_out, reference = batch_of(name, model, examples())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.02)
    for step in range(4):
        if tables.LOSSES[name].data == "rated":
            batch = dataclasses.replace(batch, kl=mismatch_ratio(model, batch.others, head_chunk=64).clamp_min(0))
        value, metrics = batch_loss(model, batch, loss, config).per(batch.total)
        scores = score_pairs(model, held_out, head_chunk=64)
        if tables.LOSSES[name].data == "rated":
            good = torch.tensor([example.good for example in held_out])
            figures = rated_figures(scores, good, reference, config)
        else:
            figures = pair_figures(scores, reference, loss, config)
        shared = (set(metrics) & set(figures)) - OTHERWISE
        assert {"accuracy", "reward_margin", "chosen_reward", "reject_reward", "chosen_logp", "reject_logp"} <= shared
        assert ("logp_margin" in shared) == tables.LOSSES[name].reference
        assert {key: float(metrics[key]) for key in shared} == pytest.approx(
            {key: figures[key] for key in shared}, rel=1e-5, abs=1e-6
        )
        assert set(metrics) | set(figures) <= set(METRICS)
        assert figures["reward_margin"] == pytest.approx(figures["chosen_reward"] - figures["reject_reward"], abs=1e-5)
        if step == 0 and tables.LOSSES[name].reference:  # the policy is its reference: nothing is won or lost yet
            assert figures["accuracy"] == 0.5 and figures["reward_margin"] == figures["logp_margin"] == 0
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert figures["logp_margin"] != 0


def test_kto_says_of_pairs_what_it_says_of_their_answers():
    """KTO takes pairs apart to train; held-out pairs are scored as pairs. Rewards and margins are the same numbers."""
    model, config = build(random_tensors("x070", n_layer=2)), Config(loss="kto", kto_beta=0.3)
    pairs, rated = examples(), taken_apart(examples())
    _, base_of_pairs = with_reference(model, pairs)
    _, base_of_rated = with_reference(model, rated)
    with torch.no_grad():
        model.head.weight.mul_(1.2)
    whole = pair_figures(score_pairs(model, pairs, head_chunk=64), base_of_pairs, LOSSES["kto"], config)
    good = torch.tensor([example.good for example in rated])
    apart = rated_figures(score_pairs(model, rated, head_chunk=64), good, base_of_rated, config)
    names = {"reward_margin", "chosen_reward", "reject_reward", "logp_margin", "chosen_logp", "reject_logp", "loss"}
    assert names <= set(whole) & set(apart)
    assert {name: whole[name] for name in names} == pytest.approx({name: apart[name] for name in names}, rel=1e-4)


@pytest.mark.parametrize("good", [True, False])
def test_answers_of_one_class_have_no_figures_of_the_other(good):
    """If this breaks, bad answers alone are said to have a loss of -0 and a perplexity of 1, over 0 tokens."""
    scores, reference = scores_of([(-10.0, -14.0), (-6.0, -5.0)]), torch.tensor([[-11.0, -13.0], [-5.0, -5.0]])
    for base in (reference, None):
        figures = rated_figures(scores, torch.tensor([good, good]), base, Config(loss="kto"))
        assert figures["answers"] == 2
        assert ({"loss", "perplexity", "tokens"} <= set(figures)) == good
        assert ("chosen_logp" in figures) == (good and base is not None)
        assert ("reject_logp" in figures) == (not good and base is not None)


def test_figures_without_a_reference_or_a_loss():
    """--eval_only on a model alone: the raw preference, in nats, and no reward that nobody defines; with a reference
    the same names are against it. By hand: sums -10, -14 and -6, -5, reference -11, -13 and -5, -5."""
    scores = scores_of([(-10.0, -14.0), (-6.0, -5.0)])
    raw = pair_figures(scores, None, LOSSES["sft"], Config())
    want = {"accuracy": 0.5, "logp_margin": 1.5, "chosen_logp": -8, "reject_logp": -9.5, "loss": 4, "tokens": 4}
    assert {name: raw[name] for name in want} == pytest.approx(want)
    assert not {"reward_margin", "chosen_reward", "raw_accuracy"} & set(raw)
    reference = torch.tensor([[-11.0, -13.0], [-5.0, -5.0]])
    against = pair_figures(scores, reference, LOSSES["sft"], Config())
    want = {"accuracy": 0.5, "logp_margin": 0.5, "logp_accuracy": 0.5, "raw_accuracy": 0.5}  # margins 2 and -1
    assert {name: against[name] for name in want} == pytest.approx(want)
    for name in ("dpo", "simpo"):  # DPO's reward needs the reference, SimPO's does not
        figures = pair_figures(scores, None, LOSSES[name], Config(loss=name))
        assert ("reward_margin" in figures) == (name == "simpo") and figures["logp_margin"] == pytest.approx(1.5)


def scores_of(sums):
    """Scores of answers of two tokens each."""
    columns = torch.tensor(sums).unbind(1)
    return PairScores(*columns, *(torch.full((len(sums),), 2) for _ in range(2)))
