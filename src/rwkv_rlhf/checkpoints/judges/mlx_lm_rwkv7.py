"""mlx-lm runs a folder in Hugging Face's layout, in float32."""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model


def main() -> None:
    """Answers one request."""
    asked = json.loads(sys.stdin.read())
    model, _ = load_model(Path(asked["path"]), strict=True)
    model.set_dtype(mx.float32)
    logits = model(mx.array([asked["tokens"]]))[0, -1]
    logprobs = logits - mx.logsumexp(logits)
    likeliest = mx.argsort(-logprobs)[: asked["top"]]
    answer = {"ids": likeliest.tolist(), "logprobs": logprobs[likeliest].tolist()}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
