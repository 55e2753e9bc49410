"""Rewards of whole answers, against each answer run alone through a plain model."""

import pytest
import torch

from rwkv_rlhf.checkpoints.loading import BuildOptions, build_model
from rwkv_rlhf.data.batch import PairExample
from rwkv_rlhf.losses.pairs import AnswerValues
from rwkv_rlhf.model import VERSIONS
from rwkv_rlhf.plan import plan_for
from rwkv_rlhf.scoring.rewards import answer_rewards, margins_of, pair_rewards, reward_figures
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.metrics import METRICS
from tests.support.models import build, random_tensors


def answers():
    """Prompts of different lengths with three answers each."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda n: torch.randint(300, (n,), generator=generator).tolist()  # noqa: E731
    lengths = ((9, 4, 7, 1), (1, 3, 2, 5), (5, 12, 1, 2))
    return [draw(p) for p, *_ in lengths], [[draw(n) for n in some] for _, *some in lengths]


@torch.no_grad()
def by_hand(tensors, prompts, some):
    """w . hidden after the last token of prompt + answer, each sequence alone."""
    model = build(tensors, torch.float64, wkv_backend="naive").eval()
    weight = tensors["score_head.weight"][0].double()
    rows = [[torch.tensor([[*prompt, *answer]]) for answer in each] for prompt, each in zip(prompts, some)]
    return torch.stack([torch.stack([model(row)[0][0, -1] @ weight for row in each]) for each in rows])


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("version", VERSIONS)
def test_rewards_are_those_of_each_answer_alone(version, chunk):
    """Packed, forked and in chunks: otherwise an answer's reward depends on what it is scored together with."""
    tensors = random_tensors(version, n_layer=2, heads="score_head")
    prompts, some = answers()
    found = answer_rewards(build(tensors, torch.float64), prompts, some, chunk=chunk, alone=True)
    torch.testing.assert_close(found, by_hand(tensors, prompts, some).float(), rtol=1e-5, atol=1e-5)


def test_pairs_are_scored_in_their_order():
    """(chosen, reject) must not be swapped: the model would be measured upside down."""
    tensors = random_tensors("x070", n_layer=2, heads="score_head")
    prompts, some = answers()
    pairs = [PairExample(prompt, each[0], each[1]) for prompt, each in zip(prompts, some)]
    found = torch.stack(list(pair_rewards(build(tensors), pairs)), 1)
    torch.testing.assert_close(found, by_hand(tensors, prompts, some)[:, :2].float(), rtol=1e-3, atol=1e-3)


def test_figures_of_pairs():
    """By hand: rewards 2, -1, 0.5 against 1, 0, 0.5; a tie counts one half. Every name is in the table of metrics."""
    rewards = AnswerValues(torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 0.0, 0.5]))
    found = reward_figures(rewards, None, Config(loss="rm"))
    want = {"accuracy": 0.5, "reward_margin": 0.0, "chosen_reward": 0.5, "reject_reward": 0.5, "pairs": 3}
    want |= {"reward": 0.5, "reward_min": -1.0, "reward_max": 2.0}
    want["loss"] = (0.3132616875 + 1.3132616875 + 0.6931471806) / 3  # log(1 + e^-1), log(1 + e), log 2
    assert found == pytest.approx(want) and set(found) <= set(METRICS)


def test_margins_must_be_there_when_they_are_asked_for():
    """--rm_margin 1 on a file without margins would train as without, and nobody would know."""
    with_one, without = PairExample([1], [2], [3], margin=1.5), PairExample([1], [2], [3])
    assert margins_of([without], Config(loss="rm")) is None
    assert margins_of([with_one], Config(loss="rm", rm_margin=True)).tolist() == [1.5]
    with pytest.raises(ValueError, match="1 of 2 pairs"):
        margins_of([with_one, without], Config(loss="rm", rm_margin=True))


def test_a_model_without_a_score_head_is_refused():
    """Rewards of a model that was never trained to judge would be taken at their word."""
    prompts, some = answers()
    with pytest.raises(ValueError, match="score_head"):
        answer_rewards(build(random_tensors("x070", n_layer=2)), prompts, some)


@pytest.mark.parametrize(
    ("peft", "trains"), [("full", {"ln_out.weight", "blocks.0.att.key.weight"}), ("lora", {"blocks.0.att.key.lora_A"})]
)
def test_a_plan_trains_the_score_head_and_leaves_the_other_one(peft, trains):
    """The head of the tokens gets no gradient: trained all the same, it would only decay, and DDP waits for it."""
    config = Config(loss="rm", peft=peft, lr_init=3e-4, lr_final=1e-5, weight_decay=0.1)
    plan = plan_for(config, 2)
    model, _ = build_model(random_tensors("x070", n_layer=2), BuildOptions(torch.float32, plan=plan))
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains | {"score_head.weight"} <= learning and not any(name.startswith("head.") for name in learning)
    assert plan.group("score_head.weight", "x070", True) == (3e-4, 1e-5, 0.0)
    assert bool((model.score_head.weight == 0).all())
