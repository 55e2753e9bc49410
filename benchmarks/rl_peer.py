"""The `rwkv` package sampling one answer: `rl_peer.py MODEL TYPE TOKENS` prints tokens/s; for benchmarks/rl.py.

MODEL comes without its ending; RWKV_V7_ON=1 says that it is an RWKV-7.
"""

import argparse
import time

import torch


def main(path: str, kind: str, tokens: int) -> None:
    """Times a prompt of 16 tokens and `tokens` sampled ones, after one run of the prompt for warmth."""
    from rwkv.model import RWKV

    model = RWKV(model=path, strategy=f"cpu {kind}")
    prompt = [int(n) for n in torch.randint(1, 256, (16,))]
    model.forward(prompt, None)
    begun = time.perf_counter()
    logits, state = model.forward(prompt, None)
    for _ in range(tokens):
        token = int(torch.multinomial(torch.softmax(logits.float(), 0), 1))
        logits, state = model.forward([token], state)
    print(tokens / (time.perf_counter() - begun))


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("model", help="path without .pth")
    flags.add_argument("type", choices=("fp32", "bf16"))
    flags.add_argument("tokens", type=int)
    words = flags.parse_args()
    main(words.model, words.type, words.tokens)
