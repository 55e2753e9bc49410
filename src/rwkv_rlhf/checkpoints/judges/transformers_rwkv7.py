"""transformers (with the model of the package rwkv7-hf) runs a folder in Hugging Face's layout, in float32."""

import json
import sys

import torch
from rwkv7_hf import RWKV7ForCausalLM


def main() -> None:
    """Answers one request."""
    asked = json.loads(sys.stdin.read())
    model, about = RWKV7ForCausalLM.from_pretrained(asked["path"], dtype=torch.float32, output_loading_info=True)
    wrong = {kind: sorted(map(str, names))[:4] for kind, names in about.items() if names}
    if wrong:
        sys.stdout.write(json.dumps({"error": f"tensors do not fit: {wrong}"}) + "\n")
        return
    with torch.no_grad():
        logits = model.eval()(torch.tensor([asked["tokens"]])).logits[0, -1].float()
    likeliest = logits.log_softmax(0).topk(asked["top"])
    sys.stdout.write(json.dumps({"ids": likeliest.indices.tolist(), "logprobs": likeliest.values.tolist()}) + "\n")


if __name__ == "__main__":
    main()
