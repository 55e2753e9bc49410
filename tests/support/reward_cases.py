"""Reward functions that do one thing each, rightly or wrongly, for tests/rl/test_rewards.py."""

import json

import torch


def exact(prompts, completions, completion_ids, answer, **kwargs):
    return [1.0 if text == right else 0.0 for text, right in zip(completions, answer)]


def told(prompts, completions, completion_ids, **columns):
    print(json.dumps([prompts, completions, completion_ids, columns]))
    return [0.5] * len(prompts)


def narrow(completions):
    return [len(text) for text in completions]


def tensor(completions, **kwargs):
    return torch.tensor([0.25] * len(completions))


def raises(completions, **kwargs):
    return [1 / (text != "3") for text in completions]


def too_few(completions, **kwargs):
    return [1.0]


def text(completions, **kwargs):
    return ["good"] * len(completions)


def nan(completions, **kwargs):
    return [float("nan") if text == "3" else 1.0 for text in completions]


def one_number(**kwargs):
    return 1.0


def silent(completions, **kwargs):
    return [None if text == "3" else 1.0 for text in completions]


def leaves(completions, **columns):
    raise SystemExit(1)


def asks(completions, level):
    return level
