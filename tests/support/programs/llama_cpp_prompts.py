"""What llama.cpp makes of prompts: `llama_cpp_prompts.py MODEL.gguf PROMPTS`, a JSON list on stdout.

A prompt is a text, a list of ids, or a list of {role, content}, which the chat template of the file writes. For each:
how many tokens it is, and the 20 likeliest tokens that follow with their log-probabilities.
"""

import json
import os
import sys

import xllamacpp


def answer(server, prompt):
    """(number of tokens, [id, log-probability] of each of the likeliest) of one prompt."""
    # probabilities are told when the sampled token is whole text: the bias makes it "a", and does not touch them
    asked = {"max_tokens": 1, "logit_bias": [[98, 1e4]]}
    if isinstance(prompt, list) and isinstance(prompt[0], dict):
        asked |= {"messages": prompt, "logprobs": True, "top_logprobs": 20}
        said = server.handle_chat_completions(asked)
    else:
        said = server.handle_completions(asked | {"prompt": prompt, "logprobs": 20})
    (token,) = said["choices"][0]["logprobs"]["content"]
    return said["usage"]["prompt_tokens"], [[one["id"], one["logprob"]] for one in token["top_logprobs"]]


if __name__ == "__main__":
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers, params.use_jinja = 1024, 1, False, 0, True
    model = xllamacpp.Server(params)
    answers = [answer(model, prompt) for prompt in json.loads(sys.argv[2])]
    sys.stdout.write(json.dumps(answers) + "\n")
    sys.stdout.flush()
    os._exit(0)
