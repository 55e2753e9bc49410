"""PPO between sampling and training: what a rollout's samples are worth, token by token in plain numbers."""

import pytest
import torch

from rwkv_rlhf.data.policy_batch import PromptExample
from rwkv_rlhf.rl.ppo import PPO
from rwkv_rlhf.rl.rollout import Asked, Sample
from rwkv_rlhf.settings.config import Config

LENGTHS = (3, 1, 4)
NUMBERS = ("old_logp", "reference_logp", "old_values")


def config(**changes):
    return Config(loss="ppo", reward_model="R", **changes)


def groups():
    """Three answers, the last one cut short."""
    draw = torch.Generator().manual_seed(2)
    made = []
    for number, length in enumerate(LENGTHS):
        numbers = {name: torch.randn(length, generator=draw) - 1 for name in NUMBERS}
        asked = Asked(number, PromptExample([1], "p", {}, "", "", False, "here"))
        reward = (2.0, -1.0, 7.0)[number]
        how = {"logp": torch.zeros(length), "entropy": 0.0, "finished": number < 2, "numbers": numbers}
        made.append([Sample(asked, 0, [5] * length, "", reward=reward, **how)])
    return made


@pytest.mark.parametrize("clip", [0.0, 1.5])
def test_judged_as_the_papers_say(clip):
    """Rewards -coef (logp - ref) and the score at the end, GAE, whitening over all tokens: by hand in plain Python."""
    scores = {"reward_baseline": 0.5, "missing_eos_penalty": 2.0, "reward_clip": clip}
    judged = PPO(config(gamma=0.9, lam=0.8, init_kl_coef=0.3, **scores)).judge(groups())
    raw, returns = [], []
    for (sample,), score in zip(groups(), (1.5, -1.5, 4.5)):
        score = max(-clip, min(clip, score)) if clip else score
        old, reference, values = (sample.numbers[name].tolist() for name in NUMBERS)
        rewards = [-0.3 * (a - b) for a, b in zip(old, reference)]
        rewards[-1] += score
        later = 0.0
        own = []
        for t in reversed(range(len(rewards))):
            following = values[t + 1] if t + 1 < len(values) else 0.0
            later = rewards[t] + 0.9 * following - values[t] + 0.9 * 0.8 * later
            own.insert(0, later)
        raw += own
        returns += [a + v for a, v in zip(own, values)]
    mean = sum(raw) / len(raw)
    deviation = (sum((a - mean) ** 2 for a in raw) / (len(raw) - 1)) ** 0.5
    found = [sample for (sample,) in judged.groups]
    advantages = torch.cat([sample.numbers["advantages"] for sample in found]).tolist()
    assert advantages == pytest.approx([(a - mean) / deviation for a in raw], rel=1e-4)
    assert torch.cat([sample.numbers["returns"] for sample in found]).tolist() == pytest.approx(returns, rel=1e-4)
    assert [len(sample.numbers["advantages"]) for sample in found] == list(LENGTHS)


def test_the_weight_of_the_penalty_follows_the_answers_divergence():
    """The controller sees the mean sum over an answer, after the rollout was judged with the weight as it was.

    A resumed run has the weight of the stopped one.
    """
    algorithm = PPO(config(init_kl_coef=0.2, adap_kl_target=1.0, horizon=100))
    judged = algorithm.judge(groups())
    apart = [float((s.numbers["old_logp"] - s.numbers["reference_logp"]).sum()) for (s,) in groups()]
    error = max(-0.2, min(0.2, sum(apart) / 3 / 1.0 - 1))
    assert judged.figures["kl_coef"] == 0.2
    assert algorithm.controller.coef == pytest.approx(0.2 * (1 + error * 3 / 100))
    again = PPO(config(init_kl_coef=0.2))
    again.take_state(algorithm.state())
    assert again.controller.coef == algorithm.controller.coef


def test_rollouts_and_passes():
    """--batch_size samples in updates of mini_batch_size x accumulation, --ppo_epochs passes, --steps in all."""
    chosen = config(batch_size=24, mini_batch_size=3, accumulate_grad_batches=2, ppo_epochs=5, steps=100, save_freq=2)
    assert PPO(chosen).cycle() == (4, 5)
    # 5 rollouts of 24 samples, in mini-epochs of two: micro-batches of 3, five passes
    assert (chosen.micro_bsz, chosen.epoch_steps, chosen.epoch_count, chosen.epoch_save) == (3, 2 * 5 * 8, 3, 1)
    whole = config(batch_size=24, mini_batch_size=3, steps=100)
    assert (whole.epoch_steps, whole.epoch_count) == (5 * 4 * 8, 1)
    typed = config(batch_size=24, mini_batch_size=3, epoch_steps=7, given=frozenset({"epoch_steps"}))
    assert typed.epoch_steps == 7


@pytest.mark.parametrize(("stopping", "kl", "enough"), [(True, 0.16, True), (True, 0.14, False), (False, 9.0, False)])
def test_early_stopping(stopping, kl, enough):
    """Above 1.5 * --target_kl, with --early_stopping 1 only."""
    assert PPO(config(early_stopping=stopping, target_kl=0.1)).enough({"update_kl": kl}) is enough
