"""Rollouts: who answers what, with which numbers, and what a resumed run goes on with."""

import dataclasses
import itertools
import logging

import numpy as np
import pytest
import torch

from rwkv_rlhf.checkpoints.loading import BuildOptions, build_model
from rwkv_rlhf.data.batch import IGNORE
from rwkv_rlhf.data.policy_batch import PolicyBatch, PromptBatch, PromptExample
from rwkv_rlhf.data.prompts import Prompts
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.sampler import Sequential
from rwkv_rlhf.generation.sampler import Sampler
from rwkv_rlhf.rl.algorithm import Algorithm, Cycle, Judged
from rwkv_rlhf.rl.grpo import GRPO
from rwkv_rlhf.rl.loop import Diverged, PromptSteps, Rollouts
from rwkv_rlhf.rl.rewards import Judge, Rewards
from rwkv_rlhf.rl.rollout import Asked, roll_out
from rwkv_rlhf.rl.start_values import StartValues
from rwkv_rlhf.settings.config import Config
from tests.support.models import random_tensors

V, COPIES, LONGEST = 60, 3, 7


@pytest.fixture(scope="module")
def model():
    tensors = random_tensors(n_layer=2, vocab_size=V)
    return build_model(tensors, BuildOptions(torch.float32))[0].requires_grad_(True).eval()


def prompts(count=8):
    examples = [
        PromptExample([2 + n, 7, 9 + n][: 1 + n % 3], f"p{n}", {"n": n}, f"p{n}", "", True, f"in.jsonl:{n + 1}")
        for n in range(count)
    ]
    return Prompts(examples, DataReport("in.jsonl"))


def odd(samples):
    return [sum(token % 2 for token in sample.ids) / len(sample.ids) for sample in samples]


def rollouts_of(model, reward=odd, algorithm=GRPO, micro_bsz=2, accumulate=2, **settings):
    settings = {"grpo_gen_count": COPIES, "grpo_gen_length": LONGEST, "random_seed": 4, "grpo_kl_beta": 0.0} | settings
    config = Config(loss="grpo", micro_bsz=micro_bsz, accumulate_grad_batches=accumulate, **settings)
    steps = PromptSteps(prompts(), Sequential(8), micro_bsz, accumulate)
    made = algorithm(config)
    start = StartValues(model) if made.needs_reference else None
    return Rollouts(config, made, Rewards({"odd": Judge(reward)}), Sampler(model), steps, start)


def step_of(rollouts):
    """The micro-batches of an optimizer step."""
    found = [rollouts(PromptBatch(part)) for part in range(rollouts.steps.accumulate)]
    rollouts.step_done({})
    return found


def ids_of(batch):
    """The answers of a batch, by what they follow."""
    return [tuple(part.tolist()) for part in batch.targets.split(batch.starts.diff().tolist())]


def one_pass(model, prompt, answer, temperature=1.0):
    """Log-probability of each id of an answer by one plain pass."""
    with torch.no_grad():
        hidden, _ = model(torch.tensor([prompt + answer[:-1]]))
        logp = torch.log_softmax(model.head(hidden[0]).double() / temperature, -1)[len(prompt) - 1 :]
    return logp.gather(1, torch.tensor(answer)[:, None])[:, 0].float()


def test_each_prompt_is_answered_once_and_every_answer_trained_once(model):
    """If this breaks, prompts are left out or trained twice, or a step's total is wrong and with it the gradient."""
    rollouts = rollouts_of(model, grpo_rollout_steps=2)
    seen = []
    for _ in range(2):
        for batch in step_of(rollouts):
            assert isinstance(batch, PolicyBatch) and batch.total == 4 * COPIES and batch.answers_per_prompt() == COPIES
            seen += ids_of(batch)
    assert rollouts.rollouts == 1 and rollouts.position == 8
    assert seen == [tuple(sample.ids) for group in rollouts.groups for sample in group]
    trained = [sum(len(s.ids) for group in rollouts.groups[n : n + 4] for s in group) for n in (0, 4)]
    step_of(rollouts)
    assert rollouts.rollouts == 2 and rollouts.position == 16
    assert batch.trained_total == trained[1]


def test_passes_are_shuffled_over_all_of_a_rollout(model):
    """The second pass has the same answers in other steps; every number goes with its answer."""
    rollouts = rollouts_of(model, grpo_rollout_steps=2, grpo_passes=2)
    steps = [step_of(rollouts) for _ in range(4)]
    assert rollouts.rollouts == 1
    whole = [[(ids, row.tolist()) for batch in step for ids, row in zip(ids_of(batch), rows(batch))] for step in steps]
    assert sorted(whole[0] + whole[1]) == sorted(whole[2] + whole[3]) and sorted(whole[0]) != sorted(whole[2])


def rows(batch):
    return torch.stack([batch.old_logp, batch.advantages], 1).split(batch.starts.diff().tolist())


def test_old_probabilities_are_the_trainers_own_and_near_the_samplers(model, caplog):
    """Target: 1e-5 in float32. With one step to a rollout none are kept: the pass that trains makes the same ones."""
    caplog.set_level(logging.INFO)
    rollouts = rollouts_of(model, grpo_passes=2, grpo_gen_temperature=0.8)
    batch = step_of(rollouts)[0]
    assert "max |log ratio|" in caplog.text and 0 < rollouts.figures["sampler_gap"] <= 1e-5
    for group in rollouts.groups:
        for sample in group:
            truth = one_pass(model, sample.asked.example.prompt, sample.ids, 0.8)
            torch.testing.assert_close(sample.numbers["old_logp"], truth, atol=1e-5, rtol=0)
            torch.testing.assert_close(sample.logp, truth, atol=1e-5, rtol=0)
    assert batch.old_logp is not None
    assert step_of(rollouts_of(model))[0].old_logp is None


def test_the_reference_is_the_model_that_training_began_from(model):
    """If this breaks, the KL penalty pulls towards something else: the model of the moment, or an adapter half off."""
    rollouts = rollouts_of(model, grpo_kl_beta=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = step_of(rollouts)[0]
    assert first.reference_logp is not None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    try:
        for batch in step_of(rollouts):
            prompts = batch.prompts.split(batch.prompt_starts.diff().tolist())
            parts = zip(ids_of(batch), batch.reference_logp.split(batch.starts.diff().tolist()))
            moved = [
                one_pass(model, [*prompts[n // COPIES].tolist(), int(batch.answers[batch.starts[n]])], list(ids))
                for n, ids in enumerate(ids_of(batch))
            ]
            with rollouts.start.back():
                for n, (ids, found) in enumerate(parts):
                    asked = [*prompts[n // COPIES].tolist(), int(batch.answers[batch.starts[n]])]
                    torch.testing.assert_close(found, one_pass(model, asked, list(ids)), atol=1e-5, rtol=0)
                    assert (found - moved[n]).abs().max() > 1e-4
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(before[name])


def test_answers_depend_on_the_seed_and_the_position_only(model):
    """If this breaks, two ranks, another batch size or a resumed run sample other answers than one process."""
    whole = rollouts_of(model, grpo_rollout_steps=2)
    step_of(whole)
    asked = [Asked(position, prompts()[position]) for position in (5, 2)]
    alone = roll_out(Sampler(model), asked, whole.algorithm.sampling(), seed=4, at_once=2)
    for group, position in zip(alone, (5, 2)):
        assert [sample.ids for sample in group] == [sample.ids for sample in whole.groups[position]]
        assert len({tuple(sample.ids) for sample in group}) == COPIES


def test_truncated_answers_are_left_out(model):
    """--grpo_mask_truncated: their targets are ignored and nothing of them counts; truncated is what was cut."""
    rollouts = rollouts_of(model, grpo_mask_truncated=True, grpo_gen_length=30, grpo_passes=2)
    batches = step_of(rollouts)
    samples = [sample for group in rollouts.groups for sample in group]
    cut = [not sample.finished for sample in samples]
    assert 0 < sum(cut) < len(cut) and rollouts.figures["truncated"] == pytest.approx(sum(cut) / len(cut))
    assert all(len(sample.ids) == 30 for sample in samples if not sample.finished)
    found = [ids for batch in batches for ids in ids_of(batch)]
    assert [set(ids) == {IGNORE} for ids in found] == cut
    assert batches[0].trained_total == sum(len(sample.ids) for sample in samples if sample.finished)
    numbers = torch.cat([batch.advantages for batch in batches]).split([len(sample.ids) for sample in samples])
    assert all(bool((part == 0).all()) for part, masked in zip(numbers, cut) if masked)


def test_dynamic_sampling_replaces_groups_without_a_signal(model):
    """DAPO: prompts whose answers all have one reward make room for others; too few, and some of them stay."""

    def uneven(samples):  # only answers to every other prompt differ in reward
        return [float(s.copy == 0) if s.asked.example.columns["n"] % 2 else 1.0 for s in samples]

    rollouts = rollouts_of(model, uneven, grpo_dynamic=3)
    step_of(rollouts)
    assert [group[0].asked.position for group in rollouts.groups] == [1, 3, 5, 7]
    assert rollouts.position in (7, 8) and rollouts.figures["mixed_groups"] == pytest.approx(0.5, abs=0.08)
    stuck = rollouts_of(model, lambda samples: [1.0] * len(samples), grpo_dynamic=1)
    step_of(stuck)
    assert [group[0].asked.position for group in stuck.groups] == [0, 1, 2, 3] and stuck.position == 8


def test_figures_by_hand(model):
    """If this breaks, the curves of a run show something else than their names say."""
    opinions = {"odd": Judge(odd), "first": Judge(lambda samples: [None if s.copy else 2.0 for s in samples], 0.5)}
    rollouts = rollouts_of(model)
    rollouts.rewards = Rewards(opinions)
    step_of(rollouts)
    samples = [sample for group in rollouts.groups for sample in group]
    rewards = [o + (0 if s.copy else 1) for o, s in zip(odd(samples), samples)]
    figures = rollouts.figures
    assert figures["reward"] == pytest.approx(np.mean(rewards))
    assert figures["reward_std"] == pytest.approx(np.std(rewards, ddof=1))
    assert figures["rewards/odd"] == pytest.approx(np.mean(odd(samples))) and figures["rewards/first"] == 2
    assert figures["completion_length"] == pytest.approx(np.mean([len(s.ids) for s in samples]))
    assert 0 < figures["entropy"] < np.log(V) and figures["mixed_groups"] == 1


@pytest.mark.parametrize("done", range(5))
def test_a_resumed_rollout_goes_on_with_the_same_batches(model, done):
    """In the middle of a rollout or between two: the same answers, numbers and order, from plain values only."""
    settings = {"grpo_passes": 2, "grpo_kl_beta": 0.1, "grpo_dynamic": 1}
    whole, again = (rollouts_of(model, **settings) for _ in range(2))
    for _ in range(done):
        step_of(whole)
    state = whole.state()
    assert all(isinstance(value, int | dict | list) for value in state.values())
    again.take_state(state)
    for _ in range(3):
        for one, two in zip(step_of(whole), step_of(again)):
            for field in dataclasses.fields(one):
                a, b = getattr(one, field.name), getattr(two, field.name)
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    drop = {"sampled_tokens_per_s"}
    assert {k: v for k, v in whole.figures.items() if k not in drop} == {
        k: v for k, v in again.figures.items() if k not in drop
    }


class Toy(Algorithm):
    """What another algorithm brings: here values of its own, and an end to a rollout after two of its steps."""

    def cycle(self):
        return Cycle(steps=1, passes=5)

    def sampling(self):
        return dataclasses.replace(GRPO(self.config).sampling(), samples=2)

    temperature = 1.0

    def numbers(self, model, batch):
        return {"old_logp": torch.full((len(batch.targets),), -3.0)}

    def judge(self, groups):
        judged = [
            [
                dataclasses.replace(s, numbers={**s.numbers, "advantages": torch.arange(len(s.ids)) + s.reward})
                for s in group
            ]
            for group in groups
        ]
        return Judged(judged, {"toy": 1.5})

    def enough(self, record):
        return record.get("step") == 2


def test_another_algorithm_plugs_in(model):
    """If this breaks, a new algorithm needs a change of the loop: its numbers reach its batch, it may end a rollout."""
    rollouts = rollouts_of(model, algorithm=Toy, micro_bsz=4, accumulate=1)
    for step in itertools.count(1):
        batch = rollouts(PromptBatch(0))
        if rollouts.rollouts == 2:
            break
        assert batch.answers_per_prompt() == 2 and rollouts.figures["toy"] == 1.5
        assert torch.equal(batch.old_logp, torch.full((len(batch.targets),), -3.0))
        assert batch.advantages[1] - batch.advantages[0] == 1 or batch.starts[1] == 1
        rollouts.step_done({"step": step})
    assert step == 3


def test_a_policy_that_has_gone_too_far_ends_the_run(model):
    """Before it trains on: the last good checkpoint is worth more than a model that says one word."""
    rollouts = rollouts_of(model, grpo_kl_beta=0.1, max_kl=0.5)
    for tensor in rollouts.start._kept.values():
        tensor.mul_(3)
    with pytest.raises(Diverged, match=r"KL to the start model is .* above --max_kl 0.5: lower --lr_init"):
        rollouts(PromptBatch(0))


def test_a_policy_whose_logits_are_no_numbers_has_diverged(model):
    """In mid-run that is no damaged file, as which it was refused: the run ends, and its checkpoints stay."""
    rollouts, kept = rollouts_of(model), model.ln_out.weight.detach().clone()
    step_of(rollouts)
    try:
        model.ln_out.weight.data.fill_(float("nan"))
        with pytest.raises(Diverged, match=r"no numbers after 1 rollouts: it has diverged. Lower {lr_init}"):
            step_of(rollouts)
        with pytest.raises(ValueError, match="the file is damaged"):
            step_of(rollouts_of(model))
    finally:
        model.ln_out.weight.data.copy_(kept)


def test_rewards_that_teach_nothing_are_said_once(model, caplog):
    """A run whose rewards are all equal looks busy and learns nothing."""
    rollouts = rollouts_of(model, lambda samples: [0.0] * len(samples), grpo_gen_length=1)
    for _ in range(22):
        step_of(rollouts)
    assert caplog.text.count("had the same reward, so nothing is learnt") == 1
