"""Sampling and a step of reinforcement learning: tokens per second, where the time goes, how exact the sampler is.

python benchmarks/rl.py                           # tokens/s sampled at 1, 8, 32, 128 answers at once, fp32 and bf16
python benchmarks/rl.py --peer 1                  # the same rows, and the `rwkv` package one answer at a time
python benchmarks/rl.py --places 1                # long and short answers: places that are filled again, or waited for
python benchmarks/rl.py --step 1                  # shares of a GRPO and a PPO step; prompt tokens run; max |log ratio|
python benchmarks/rl.py --all 1 --json PATH       # all of it
python benchmarks/rl.py --only fp32,8             # one row

Random weights of RWKV-7 L12-D768 with a vocabulary of 65536, no stop, the trainer's own model and engine. Tokens per
second count sampled tokens, prompts of 16 tokens included in the time. The model is made once and each row measured
once after one short run for warmth, all in this process. A step is two passes over 16 answers with LoRA r 16 and the
log-probabilities of the start model; PPO's answers are judged by a reward model of the same size.
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


def tensors(layers: int = LAYERS, width: int = WIDTH, vocab: int = VOCAB):
    """Random weights of RWKV-7 of which none are zero, so that every product is a real one."""
    import torch

    from rwkv_rlhf.model.initial import initial_tensors

    made = initial_tensors("x070", layers, width, vocab, 64, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, value in made.items():
        if value.dim() == 2 and not value.any():
            made[name] = torch.randn(value.shape, generator=generator) * 0.02
    return made


def model_of(kind: str, config=None, **heads):
    """The model in fp32 or bf16: frozen, or what trains by `config`; `heads` are more tensors by name."""
    from rwkv_rlhf.checkpoints.loading import BuildOptions, build_model
    from rwkv_rlhf.plan import plan_for
    from rwkv_rlhf.precision import DTYPES

    plan = plan_for(config, LAYERS) if config else None
    return build_model(tensors() | heads, BuildOptions(DTYPES[kind], plan=plan))[0].eval()


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
        rate = sampled_rate(models[kind], size, tokens)
        found.append({"type": kind, "at once": size, "tokens/s": rate, "program": "this one"})
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
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=variables)
            rate = float(out.stdout.splitlines()[-1])
            found.append({"type": kind, "at once": 1, "tokens/s": rate, "program": "rwkv package"})
            print(found[-1], flush=True)
    return found


def environment() -> dict[str, str]:
    """This process's own."""
    import os

    return dict(os.environ)


def measure_places(at_once: int = 8, answers: int = 32) -> list[dict]:
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


class Clock:
    """Seconds by name; of calls inside one another each counts what is its own."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(("sampling", "scoring", "training"), 0.0)

    def timed(self, name, work):
        """`work`, timed under `name`."""

        def call(*arguments):
            begun, inside = time.perf_counter(), sum(self.spent.values())
            try:
                return work(*arguments)
            finally:
                self.spent[name] += time.perf_counter() - begun - (sum(self.spent.values()) - inside)

        return call


def step_config(loss: str, kind: str, answers: int, copies: int, tokens: int):
    """A run with one rollout of `answers` answers and two passes over it."""
    from rwkv_rlhf.settings.config import Config

    shared = {"loss": loss, "precision": kind, "peft": "lora", "lora_r": 16, "lr_init": 1e-5, "lr_final": 1e-5}
    if loss == "ppo":
        own = {"batch_size": answers, "micro_bsz": answers, "ppo_epochs": 2, "output_max_length": tokens}
        return Config(**shared, **own, given=frozenset({"micro_bsz"}))
    own = {"grpo_gen_count": copies, "grpo_gen_length": tokens, "grpo_passes": 2, "grpo_kl_beta": 0.04}
    return Config(**shared, **own, micro_bsz=answers // copies)


def rewards_for(loss: str, kind: str):
    """For PPO a reward model of the policy's size, else whether the first token is odd."""
    import torch

    from rwkv_rlhf.rl.rewards import Judge, ModelReward, Rewards
    from rwkv_rlhf.scoring.reward_model import RewardModel

    if loss == "ppo":
        return Rewards(
            {"model": Judge(ModelReward(RewardModel(model_of(kind, **{"score_head.weight": torch.ones(1, WIDTH)}))))}
        )
    return Rewards({"odd": Judge(lambda samples: [float(sample.ids[0] % 2) for sample in samples])})


def rollouts_of(config, model, kind: str, asked: int):
    """The loop's rollouts over `asked` random prompts each."""
    from rwkv_rlhf.data.policy_batch import PromptExample
    from rwkv_rlhf.data.prompts import Prompts
    from rwkv_rlhf.data.report import DataReport
    from rwkv_rlhf.data.sampler import Sequential
    from rwkv_rlhf.generation.sampler import Sampler
    from rwkv_rlhf.rl.loop import PromptSteps, Rollouts
    from rwkv_rlhf.rl.start_values import StartValues
    from rwkv_rlhf.settings.implementations import load

    examples = [PromptExample(ids, "", {}, "", "", True, "") for ids in prompts(2 * asked)]
    steps = PromptSteps(Prompts(examples, DataReport("")), Sequential(len(examples)), config.micro_bsz, 1, passes=2)
    algorithm = load(config.loss_facts.algorithm)(config)
    return Rollouts(config, algorithm, rewards_for(config.loss, kind), Sampler(model), steps, StartValues(model))


def measure_step(loss: str, kind: str, copies: int = 8, tokens: int = 32, answers: int = 16) -> dict:
    """Shares of a step with `answers` answers and two passes over them, after one rollout for warmth."""
    import torch

    from rwkv_rlhf.data.policy_batch import PromptBatch
    from rwkv_rlhf.losses import LOSSES
    from rwkv_rlhf.scoring.forward import batch_loss

    config, clock, asked = step_config(loss, kind, answers, copies, tokens), Clock(), answers
    if loss == "grpo":
        asked //= copies
    model = model_of(kind, config)
    rollouts, gap, prompt_tokens = rollouts_of(config, model, kind, asked), 0.0, 0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def counted(module, arguments):
        nonlocal prompt_tokens
        prompt_tokens += arguments[0].numel() if arguments[0].shape[1] > 1 else 0

    sample = rollouts._sampled

    def sampled(count):
        hook = model.register_forward_pre_hook(counted)
        try:
            return sample(count)
        finally:
            hook.remove()

    rollouts._sampled = clock.timed("sampling", sampled)
    rollouts._score = clock.timed("scoring", rollouts._score)
    rollouts.rewards = clock.timed("scoring", rollouts.rewards)

    def train(batch):
        batch_loss(model, batch, LOSSES[loss], config).per(batch.total).value.backward()
        optimizer.step()
        optimizer.zero_grad()

    for turn in range(1 + rollouts.cycle.total):
        if turn == 1:  # the first rollout is for warmth, and for the gap: its second pass is left out
            clock.spent.update(dict.fromkeys(clock.spent, 0.0))
            rollouts.step, prompt_tokens = rollouts.cycle.total, 0
        clock.timed("training", train)(rollouts(PromptBatch(0)))
        rollouts.step_done({"update_kl": 0.0})
        gap = max(gap, rollouts.figures.get("sampler_gap", 0.0))
    whole = sum(clock.spent.values())
    shares = {name: f"{seconds / whole:.0%}" for name, seconds in clock.spent.items()}
    figures = {"seconds": whole, "tokens/s": answers * tokens / whole, "max |log ratio|": gap}
    return {"step": loss, "type": kind, **shares, **figures, "prompt runs per answer": prompt_tokens / answers / PROMPT}


def show(rows: Sequence[dict]) -> None:
    """Rows of the same columns as a table."""
    cells = [list(rows[0])] + [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(
        *("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells), "", sep="\n", flush=True
    )


def main() -> None:
    """Measures what is asked for and prints it as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", default="", help="one row: fp32,8")
    parser.add_argument("--tokens", type=int, default=32, help="sampled tokens of each answer [32]")
    parser.add_argument("--peer", default="0", help="1 = the `rwkv` package too")
    for name in ("places", "step"):
        parser.add_argument(f"--{name}", default="0", help="1 = measure this instead")
    parser.add_argument("--all", default="0", help="1 = measure everything")
    parser.add_argument("--json", default="", help="write the rows there too")
    words = parser.parse_args()
    every, tables = words.all == "1", []
    if every or not {words.places, words.step} & {"1"}:
        kind, _, size = words.only.partition(",")
        rows = [(kind, int(size))] if words.only else ROWS
        tables.append(measure_sampling(rows, words.tokens))
        if every or words.peer == "1":
            tables[-1] += measure_peer(list(dict.fromkeys(kind for kind, _ in rows)), words.tokens)
    if every or words.places == "1":
        tables.append(measure_places())
    if every or words.step == "1":
        pairs = [(loss, kind) for loss in ("grpo", "ppo") for kind in ("fp32", "bf16")]
        tables.append([measure_step(loss, kind, tokens=words.tokens) for loss, kind in pairs])
    for found in tables:
        show(found)
    if words.json:
        Path(words.json).write_text(json.dumps([row for found in tables for row in found], indent=1))


if __name__ == "__main__":
    main()
