"""Programs that run an exported model in other people's libraries and say what it answers.

Each runs in a process of its own, as these libraries may end it. On stdin: {"path", "tokens", "top"}. The last line on
stdout: {"ids", "logprobs"}, the `top` likeliest tokens after `tokens` and their natural-log probabilities; or
{"error"}. Nothing of this program is imported.
"""
