"""Reward functions as a user would write them, for runs in tests: --reward_funcs tests/support/rewards.py:odd,short."""


def odd(prompts, completions, completion_ids, **columns):
    """The share of odd ids: what an untrained model says already differs in it."""
    assert len(prompts) == len(completions) == len(completion_ids) == len(columns["chosen"])
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def short(completion_ids):
    """Fewer tokens are better; where the first id is even it says nothing."""
    return [-len(ids) / 10 if ids[0] % 2 else None for ids in completion_ids]


def broken(prompts, completions, completion_ids, **columns):
    """What goes wrong in people's functions, by the answer."""
    raise KeyError("answer")
