"""llama.cpp (by the package xllamacpp) runs a GGUF file; `lora` names an adapter that it lays over it."""

import json
import os
import sys

import xllamacpp


def main() -> None:
    """Answers one request."""
    asked = json.loads(sys.stdin.read())
    params = xllamacpp.CommonParams()
    params.model.path = asked["path"]
    params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers = 512, 1, False, 0
    if asked.get("lora"):
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(asked["lora"], 1.0)]
    server = xllamacpp.Server(params)
    # what is told are the model's own probabilities, but only when the sampled token is whole text: this one is
    text = [[asked["tokens"][-1], 1e4]]
    request = {"prompt": asked["tokens"], "max_tokens": 1, "logprobs": asked["top"], "logit_bias": text}
    answer = server.handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    if "choices" not in answer:
        sys.stdout.write(json.dumps({"error": str(answer)}) + "\n")
        return
    likeliest = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    found = {"ids": [one["id"] for one in likeliest], "logprobs": [one["logprob"] for one in likeliest]}
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    os._exit(0)  # all is said, and the server's threads may end the process badly


if __name__ == "__main__":
    main()
