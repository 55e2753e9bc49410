"""What the `rwkv` package says of checkpoints: `rwkv_package.py QUESTION TOKENS PATH ...`, a JSON list on stdout.

last: logits after TOKENS. every: logits at each of TOKENS, in one pass and token by token. greedy: 12 tokens that
follow. Paths come without their ending. RWKV_V7_ON says which models there are.
"""

import json
import sys

import torch
from rwkv.model import RWKV


def last(model, tokens):
    """Logits (V,) after the tokens."""
    return model.forward(tokens, None)[0].tolist()


def every(model, tokens):
    """Two times logits (T, V)."""
    whole, state, one_by_one = model.forward(tokens, None, full_output=True)[0], None, []
    for token in tokens:
        logits, state = model.forward([token], state)
        one_by_one.append(logits)
    return [whole.tolist(), torch.stack(one_by_one).tolist()]


def greedy(model, tokens):
    """The most probable continuation."""
    answer = []
    logits, state = model.forward(tokens, None)
    for _ in range(12):
        answer.append(int(logits.argmax()))
        logits, state = model.forward([answer[-1]], state)
    return answer


if __name__ == "__main__":
    ask = {"last": last, "every": every, "greedy": greedy}[sys.argv[1]]
    said = [ask(RWKV(model=path, strategy="cpu fp32"), json.loads(sys.argv[2])) for path in sys.argv[3:]]
    print(json.dumps(said))
