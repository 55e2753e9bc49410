"""Sampling and a step of reinforcement learning: tokens per second, where the time goes, how exact the sampler is.

python benchmarks/rl.py                           # tokens/s sampled at 1, 8, 32, 128 answers at once, fp32 and bf16
python benchmarks/rl.py --peer 1                  # the same rows, and the `rwkv` package one answer at a time
python benchmarks/rl.py --places 1                # long and short answers: places that are filled again, or waited for
python benchmarks/rl.py --step 1                  # shares of a GRPO step; prompt tokens run; max |log ratio|
python benchmarks/rl.py --only fp32,8 --json PATH

Random weights of RWKV-7 L12-D768 with a vocabulary of 65536, no stop, the trainer's own model and engine. Tokens per
second count sampled tokens, prompts of 16 tokens included in the time. The model is made once and each row measured
once after one short run for warmth, all in this process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
LAYERS, WIDTH, VOCAB, PROMPT = 12, 768, 65536, 16
ROWS = [(kind, size) for kind in ("fp32", "bf16") for size in (1, 8, 32, 128)]
PEER = Path(__file__).with_name("rl_peer.py")


def tensors():
    """Random weights of which none are zero, so that every product is a real one."""
    import torch

    from rwkv_rlhf.model.initial import initial_tensors

    made = initial_tensors("x070", LAYERS, WIDTH, VOCAB, 64, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, value in made.items():
        if value.dim() == 2 and not value.any():
            made[name] = torch.randn(value.shape, generator=generator) * 0.02
    return made


def model_of(kind: str, train: bool = False):
    """The model in fp32 or bf16, full weights trained or all frozen."""
    from rwkv_rlhf.checkpoints.loading import BuildOptions, build_model
    from rwkv_rlhf.plan import make_plan
    from rwkv_rlhf.precision import DTYPES

    plan = make_plan("lora", LAYERS, rank=16, alpha=32.0, dropout=0.0, lr_init=1e-5, lr_final=1e-5)
    return build_model(tensors(), BuildOptions(DTYPES[kind], plan=plan if train else None))[0].eval()


def prompts(count: int) -> list[list[int]]:
    """Random prompts of one length."""
    import torch

    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, VOCAB, (count, PROMPT), generator=generator).tolist()


def sampled_rate(model, size: int, tokens: int) -> float:
    """Tokens per second of `size` answers of `tokens` tokens, sampled together."""
    from rwkv_rlhf.generation.sampler import Sampler
    from rwkv_rlhf.generation.sampling_params import SamplingParams

    params = SamplingParams(max_tokens=tokens, stop_texts=(), stop_ids=())
    sampler = Sampler(model)
    sampler.generate(prompts(size), SamplingParams(max_tokens=2, stop_texts=(), stop_ids=()))
    begun = time.perf_counter()
    sampler.generate(prompts(size), params)
    return size * tokens / (time.perf_counter() - begun)


def measure_sampling(rows: list[tuple[str, int]], tokens: int) -> list[dict]:
    """A row for each type and number of answers at once."""
    found, models = [], {}
    for kind, size in rows:
        if kind not in models:
            models = {kind: model_of(kind)}
        found.append({"type": kind, "at once": size, "tokens/s": sampled_rate(models[kind], size, tokens)})
        print(found[-1], flush=True)
    return found


def measure_peer(kinds: Sequence[str], tokens: int) -> list[dict]:
    """The `rwkv` package on the same weights, one answer after the other, in each type."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        torch.save(tensors(), f"{path}.pth")
        variables = {**environment(), "RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
        found = []
        for kind in kinds:
            command = [sys.executable, str(PEER), str(path), kind, str(tokens)]
            out = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
            rate = float(out.stdout.splitlines()[-1])
            found.append({"type": kind, "at once": 1, "tokens/s": rate, "program": "rwkv package"})
            print(found[-1], flush=True)
    return found


def environment() -> dict[str, str]:
    """This process's own."""
    import os

    return dict(os.environ)


def measure_places(at_once: int = 16, answers: int = 64) -> list[dict]:
    """Answers of 4 to 64 tokens in `at_once` places: as batches that wait for their longest, and continuously."""
    from collections import deque

    from rwkv_rlhf.generation.rows import Request
    from rwkv_rlhf.generation.sampler import Sampler
    from rwkv_rlhf.generation.sampling_params import SamplingParams

    model = model_of("fp32")
    lengths = [4 + 60 * (n * 37 % 64) // 63 for n in range(answers)]

    def requests():
        params = [SamplingParams(max_tokens=length, stop_texts=(), stop_ids=()) for length in lengths]
        return [Request(prompt, how, n) for n, (prompt, how) in enumerate(zip(prompts(answers), params))]

    found = []
    for way in ("batches", "continuous"):
        sampler, every = Sampler(model), requests()
        size = at_once if way == "batches" else answers
        begun = time.perf_counter()
        for start in range(0, answers, size):
            list(sampler.stream(deque(every[start : start + size]), at_once=at_once))
        found.append({"way": way, "answers": answers, "tokens/s": sum(lengths) / (time.perf_counter() - begun)})
        print(found[-1], flush=True)
    return found


def measure_step(kind: str, groups: int = 4, copies: int = 8, tokens: int = 32) -> dict:
    """Shares of a GRPO step with LoRA r 16, KL to the start model and two passes, after one rollout for warmth."""
    import torch

    from rwkv_rlhf.data.policy_batch import PromptBatch, PromptExample
    from rwkv_rlhf.data.prompts import Prompts
    from rwkv_rlhf.data.report import DataReport
    from rwkv_rlhf.data.sampler import Sequential
    from rwkv_rlhf.generation.sampler import Sampler
    from rwkv_rlhf.losses import LOSSES
    from rwkv_rlhf.rl.grpo import GRPO
    from rwkv_rlhf.rl.loop import PromptSteps, Rollouts
    from rwkv_rlhf.rl.rewards import Judge, Rewards
    from rwkv_rlhf.rl.start_values import StartValues
    from rwkv_rlhf.scoring.forward import batch_loss
    from rwkv_rlhf.settings.config import Config

    examples = [PromptExample(ids, "", {}, "", "", True, "") for ids in prompts(2 * groups)]
    how = {"grpo_gen_count": copies, "grpo_gen_length": tokens, "grpo_passes": 2, "precision": kind}
    config = Config(loss="grpo", micro_bsz=groups, **how)
    model, spent, gap = model_of(kind, train=True), dict.fromkeys(("sampling", "scoring", "training"), 0.0), 0.0
    steps = PromptSteps(Prompts(examples, DataReport("")), Sequential(len(examples)), groups, 1)
    rewards = Rewards({"odd": Judge(lambda samples: [float(sample.ids[0] % 2) for sample in samples])})
    rollouts = Rollouts(config, GRPO(config), rewards, Sampler(model), steps, StartValues(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def timed(name, work):
        def call(*arguments):
            begun = time.perf_counter()
            try:
                return work(*arguments)
            finally:
                spent[name] += time.perf_counter() - begun

        return call

    rollouts._sampled, rollouts._score = timed("sampling", rollouts._sampled), timed("scoring", rollouts._score)

    def train(batch):
        batch_loss(model, batch, LOSSES["grpo"], config).per(batch.total).value.backward()
        optimizer.step()
        optimizer.zero_grad()

    for turn in range(4):
        if turn == 2:  # the first rollout is for warmth, and for the gap
            spent.update(dict.fromkeys(spent, 0.0))
        batch = rollouts(PromptBatch(0))
        timed("training", train)(batch)
        rollouts.step_done({})
        gap = max(gap, rollouts.figures.get("sampler_gap", 0.0))
    whole = sum(spent.values())
    shares = {name: f"{seconds / whole:.0%}" for name, seconds in spent.items()}
    figures = {"seconds": whole, "tokens/s": groups * copies * tokens / whole, "max |log ratio|": gap}
    return {"type": kind, **shares, **figures, "prompt runs per answer": f"1/{copies}"}


def main() -> None:
    """Measures what is asked for and prints it as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", default="", help="one row: fp32,8")
    parser.add_argument("--tokens", type=int, default=32, help="sampled tokens of each answer [32]")
    parser.add_argument("--peer", default="0", help="1 = the `rwkv` package too")
    for name in ("places", "step"):
        parser.add_argument(f"--{name}", default="0", help="1 = measure this instead")
    parser.add_argument("--json", default="", help="write the rows there too")
    words = parser.parse_args()
    if words.places == "1":
        found = measure_places()
    elif words.step == "1":
        found = [measure_step(kind) for kind in ("fp32", "bf16")]
        print(*found, sep="\n")
    else:
        kind, _, size = words.only.partition(",")
        rows = [(kind, int(size))] if words.only else ROWS
        found = measure_sampling(rows, words.tokens)
        if words.peer == "1":
            found += measure_peer(sorted({kind for kind, _ in rows}), words.tokens)
    if words.json:
        Path(words.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
