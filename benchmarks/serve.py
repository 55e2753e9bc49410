"""Tokens per second of the server at 1 and 8 clients, beside a conversation's loop on the same model and machine.

python benchmarks/serve.py [--layers 12] [--width 768] [--tokens 48] [--clients 1 8]

A random RWKV-7 with the World vocabulary in fp32; every answer has --tokens tokens (none ends by itself), every client
streams over HTTP from `serve.py` in a process of its own. The first answer of each is not counted. Needs httpx.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
MESSAGES = [{"role": "user", "content": "Name a bird that lives by the sea, and say what it eats."}]


def write_model(path: Path, layers: int, width: int) -> None:
    """Initial values: all tokens are nearly alike, so hardly an answer ends early."""
    from rwkv_rlhf.checkpoints.tensor_files import write_tensors
    from rwkv_rlhf.model.initial import initial_tensors

    write_tensors(initial_tensors("x070", layers, width, 65536, 64, seed=1), path)


def conversation(path: Path, tokens: int) -> float:
    """Tokens per second of what chat.py runs for one answer, prompt included."""
    from rwkv_rlhf.data.templates.template import WORLD
    from rwkv_rlhf.generation.opening import open_model
    from rwkv_rlhf.generation.sampler import Sampler
    from rwkv_rlhf.generation.sampling_params import SamplingParams

    model, tokenizer = open_model(str(path), "", "cpu fp32", "")
    sampler, params = Sampler(model, tokenizer), SamplingParams(max_tokens=tokens, stop_texts=(), stop_ids=())
    prompt = tokenizer.encode(f"User: {MESSAGES[0]['content']}\n\n{WORLD.assistant}:")
    sampler.generate([prompt], params)
    begun = time.perf_counter()
    done = sampler.generate([prompt], params)
    return len(done[0].tokens) / (time.perf_counter() - begun)


def client(address: str, tokens: int, seed: int, counted: list[int]) -> None:
    """One answer, streamed; how many tokens the server counted."""
    import httpx

    asked = {"messages": MESSAGES, "max_tokens": tokens, "seed": seed, "stream": True, "temperature": 1, "top_p": 1}
    asked["stream_options"] = {"include_usage": True}
    with httpx.stream("POST", f"{address}/chat/completions", json=asked, timeout=600) as done:
        lines = [line for line in done.iter_lines() if '"usage"' in line]
    counted.append(int(lines[-1].split('"completion_tokens": ')[1].split(",")[0]))


def together(address: str, tokens: int, clients: int) -> float:
    """Tokens per second of all clients at once."""
    counted: list[int] = []
    threads = [threading.Thread(target=client, args=(address, tokens, n, counted)) for n in range(clients)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counted) / (time.perf_counter() - begun)


def main() -> None:
    """Prints a table."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--layers", type=int, default=12)
    flags.add_argument("--width", type=int, default=768)
    flags.add_argument("--tokens", type=int, default=48)
    flags.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    asked = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        write_model(path, asked.layers, asked.width)
        print(f"conversation          {conversation(path, asked.tokens):8.1f} tokens/s", flush=True)
        words = [sys.executable, "serve.py", "--load_model", path, "--port", 0, "--strategy", "cpu fp32"]
        server = subprocess.Popen([str(word) for word in words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split(" at ")[1].split(" ")[0]
            together(address, asked.tokens, 1)
            for clients in asked.clients:
                rate = together(address, asked.tokens, clients)
                print(f"server, {clients:3d} client(s)  {rate:8.1f} tokens/s", flush=True)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
