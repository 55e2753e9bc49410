"""Let chat clients talk to a model: OpenAI's chat completions over HTTP, answers of several clients decoded together.

python serve.py --load_model M --load_adapter P/rwkv-final.pth
curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{"messages": [{"role": "user", "content": "Hi"}]}'

A client may leave out "model", or must say the name that /v1/models lists. The sampling flags hold for what a request
does not say; --max_tokens is also the longest answer that one can ask for. Ctrl+C ends the server.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

from rwkv_rlhf.commands.flag_values import opened_model, trained_template
from rwkv_rlhf.commands.parsers.serve import parser
from rwkv_rlhf.generation.sampling_params import sampling_params
from rwkv_rlhf.settings.optional import require


def main(words: Sequence[str]) -> None:
    """Serves until it is stopped."""
    flags = parser().parse_args(words)
    require("serve", "starlette", "uvicorn")
    from rwkv_rlhf.serving.completions import Service, application
    from rwkv_rlhf.serving.engine import Engine
    from rwkv_rlhf.serving.web import address, bound, is_loopback, run_app

    template = trained_template(flags)
    params = sampling_params(flags, stop_texts=template.stop_texts)
    local = is_loopback(flags.host)
    token = flags.token or ("" if local else secrets.token_urlsafe(24))
    with bound(flags.host, flags.port) as listener:
        model, tokenizer = opened_model(flags)
        name = flags.name or Path(flags.load_adapter or flags.load_model).stem
        engine = Engine(model, tokenizer, flags.batch_size, flags.cached_states)
        print(f"{name} answers at {address(listener)}/v1 (Ctrl+C ends)", flush=True)
        if token and not flags.token:
            print(f"clients must send the token (or key) {token}", flush=True)
        try:
            run_app(application(Service(engine, template, params, name), token, local), listener)
        finally:
            engine.close()
