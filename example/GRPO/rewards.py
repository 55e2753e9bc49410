"""What an answer to a sum is worth: functions with TRL's signature, named by --reward_funcs."""


def exact(prompts, completions, completion_ids, answer, **columns):
    """1 for the right number and nothing else. `answer` is the column of that name in the file of prompts."""
    return [float(said == right) for said, right in zip(completions, answer)]


def number(completions, **columns):
    """1 for any number: a little of this reward (--reward_weights) points the way before the sums are right."""
    return [float(said.isdigit()) for said in completions]
