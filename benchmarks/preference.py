"""Preference losses after the same number of tokens, on the pairs of example/ and pairs that were held out.

python benchmarks/preference.py [--json PATH]                    # three seeds, every method, TRL where it is installed
python benchmarks/preference.py --seeds 1 --tokens 8000 --base_steps 60 --max_tokens 30     # a quick look

A tiny RWKV-7 (3 layers, width 128, World vocabulary) is trained from zero as in example/quickstart.sh, or --model is
taken; it writes the rejects of example/DPO's prompts. Then every method trains the same LoRA adapter (r 16, constant
rate, batches of 16 pairs; KTO of 32 answers) until it has run --tokens tokens through the model, prompts once. Of 48
held-out pairs: logp_accuracy and logp_margin (nats) against the start model, raw_accuracy (the chosen answer is the
likelier one) and kl (KL to the start model, nats a token) are means over the seeds, with the range of the accuracy.
Pairs per second are medians over the steps; two answers of KTO are a pair.

TRL's DPOTrainer gets the same model behind a thin wrapper, with our kernels, the same adapter, the same reference
scores and the same pairs in the same order as our DPO; batching (prompts in both answers, padding), chunked
log-softmax, loss and loop are its own. Printed is also how far its losses are from ours, step by step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT / "src")  # not benchmarks/, whose kernels.py transformers would take for a package
HELD_OUT = "example/DPO/heldout.csv"
BATCH = 16  # pairs a step
MEASURED = ("logp_accuracy", "raw_accuracy", "logp_margin", "kl")

# as example/quickstart.sh
INITIAL = """--train_stage 1 --load_model 0 --my_testing x070 --n_layer 3 --n_embd 128 --vocab_size 65536
 --random_seed 1"""
FROM_ZERO = """--sft 1 --smoothing 0 --data_file example/quickstart/corpus.jsonl --ctx_len 64 --micro_bsz 16
 --epoch_count 1 --lr_init 2e-3 --lr_final 2e-4 --warmup_steps 10 --precision fp32 --grad_cp 0 --quant 0
 --random_seed 1"""

METHODS: dict[str, list[str]] = {
    "DPO": ["--dpo", "1", "--dpo_beta", "0.1", "--dpo_alpha", "0"],
    "IPO": ["--dpo", "1", "--dpo_loss", "ipo", "--dpo_beta", "0.1", "--dpo_alpha", "0"],
    "ORPO": ["--orpo", "1", "--orpo_alpha", "0.1"],
    "SimPO": ["--simpo", "1"],
    "KTO": ["--kto", "1"],
}


def script(*words: object) -> None:
    """Run one of the program's commands; its messages are shown when it fails."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)


def prepare(flags: argparse.Namespace) -> None:
    """The base model and the pairs with its own rejects, unless they are given or were made before."""
    out = Path(flags.out)
    if not flags.model:
        flags.model = str(out / "base" / "rwkv-final.pth")
        if not Path(flags.model).exists():
            script("train.py", *INITIAL.split(), "--proj_dir", out / "base")
            start = ["--load_model", out / "base" / "rwkv-init.pth", "--proj_dir", out / "base"]
            script("train.py", *start, *FROM_ZERO.split(), "--epoch_steps", flags.base_steps)
    if not flags.pairs:
        flags.pairs = str(out / "pairs.csv")
        source = "example/DPO/input_csv/rlhf_example_dataset.csv"
        words = ["--input_csv", source, "--output_csv", flags.pairs, "--load_model", flags.model]
        sampling = ["--max_tokens", flags.max_tokens, "--batch_size", 64, "--top_p", 0.8, "--strategy", "cpu fp32"]
        script("rlhf_generate_reject_csv.py", *words, *sampling)


def common(flags: argparse.Namespace, folder: Path, seed: int) -> list[str]:
    """The flags that every method shares."""
    words = f"--peft lora --lora_r 16 --lora_alpha 32 --lora_dropout 0 --limited_lora 1 --random_seed {seed}"
    words += f" --lr_init {flags.lr} --lr_final {flags.lr} --lr_schedule constant --layerwise_lr 0 --epoch_count 1"
    words += " --precision fp32 --quant 0 --grad_cp 0 --ctx_len 128 --skip_bad 1 --enable_progress_bar 0"
    files = ["--load_model", flags.model, "--rlhf_train_file", flags.pairs, "--val_file", HELD_OUT]
    return [*files, "--proj_dir", str(folder), *words.split()]


def opened(words: list[str], folder: Path):
    """(config, loaded start, inputs) of a command line of train.py."""
    from rwkv_rlhf.settings.command_line import parse
    from rwkv_rlhf.training.inputs import Inputs
    from rwkv_rlhf.training.start import start

    folder.mkdir(parents=True, exist_ok=True)
    config = parse(words)
    ready = start(config, folder)
    return config, ready, Inputs(config, ready, folder)


def steps_for(words: list[str], folder: Path, tokens: int) -> int:
    """Optimizer steps until `tokens` tokens went through the model."""
    from rwkv_rlhf.training.length import tokens_run

    _, _, inputs = opened(words, folder)
    steps, seen = inputs.training(score=False), 0
    for k in itertools.count(1):
        seen += tokens_run(steps.micro_batch(k - 1))
        if seen >= tokens:
            return k


def records(folder: Path, event: str) -> list[dict]:
    """Lines of metrics.jsonl of one kind."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def ours(flags: argparse.Namespace, name: str, seed: int) -> dict:
    """One run of train.py."""
    folder = Path(flags.out) / f"{name}-{seed}"
    words = [*common(flags, folder, seed), *METHODS[name], "--micro_bsz", str(BATCH * (2 if name == "KTO" else 1))]
    count = steps_for(words, folder, flags.tokens)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    script("train.py", *words, "--epoch_steps", count)
    train, held_out = records(folder, "train"), records(folder, "val")[-1]
    seconds = statistics.median(record["tokens"] / record["tokens_per_s"] for record in train)
    measured = {key: held_out[key] for key in MEASURED}
    return measured | {"steps": count, "tokens": sum(r["tokens"] for r in train), "step_s": seconds}


def wrapped(model):
    """The model as TRL knows models: a backbone, and a head whose matrix its chunked log-softmax takes. Padding stands
    on the right, where a recurrent model does not notice it."""
    from torch import nn
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutput

    assert model.head.adaptation is None

    class Backbone(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids, attention_mask=None, **_):
            return BaseModelOutput(last_hidden_state=self.inner(input_ids)[0])

    class Wrapper(PreTrainedModel):
        config_class = PretrainedConfig
        base_model_prefix = "backbone"

        def __init__(self, config, inner):
            super().__init__(config)
            self.backbone = Backbone(inner)

        def get_output_embeddings(self):
            return SimpleNamespace(weight=self.backbone.inner.head.weight, bias=None)

        def forward(self, *args, **words):  # replaced by the trainer
            raise NotImplementedError

    found = Wrapper(PretrainedConfig(vocab_size=model.sizes.vocab_size), model)
    found.generation_config = GenerationConfig()  # the trainer writes the padding token into it
    return found


def trl_trainer(flags: argparse.Namespace, seed: int, count: int, ready, steps):
    """TRL's DPOTrainer over our `count` steps of pairs, tokenised and scored: what it would do first is done."""
    import tokenizers
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    class Prepared(DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

        def _precompute_ref_logps(self, dataset, *_, **__):
            return dataset

        def _get_train_sampler(self, *_, **__):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
    rows = [
        {
            "prompt_ids": pair.prompt,
            "chosen_ids": pair.chosen,
            "rejected_ids": pair.reject,
            "ref_chosen_logps": pair.reference[0],
            "ref_rejected_logps": pair.reference[1],
        }
        for pair in (steps.examples[index] for k in range(count) for index in steps.indices(k))
    ]
    settings = DPOConfig(
        output_dir=str(Path(flags.out) / f"trl-{seed}"),
        per_device_train_batch_size=BATCH,
        max_steps=count,
        learning_rate=flags.lr,
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.99,
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=0.1,
        max_length=None,
        precompute_ref_log_probs=True,
        activation_checkpointing=False,
        remove_unused_columns=False,
        bf16=False,
        use_cpu=True,
        seed=seed,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
    )
    return Prepared(
        wrapped(ready.model), args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


def theirs(flags: argparse.Namespace, seed: int, count: int) -> tuple[dict, list[float]]:
    """The same model, adapter and pairs under TRL, scored by our evaluation; and the loss of each step."""
    from transformers import TrainerCallback

    folder = Path(flags.out) / f"TRL-{seed}"
    words = [*common(flags, folder, seed), *METHODS["DPO"], "--micro_bsz", str(BATCH)]
    _, ready, inputs = opened(words, folder)
    steps = inputs.training()
    score = inputs.held_out(reference=True)
    trainer = trl_trainer(flags, seed, count, ready, steps)
    clock: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    held_out = score()
    seconds = statistics.median(b - a for a, b in itertools.pairwise(clock)) if count > 1 else float("nan")
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return {key: held_out[key] for key in MEASURED} | {"steps": count, "step_s": seconds}, losses


def row(name: str, found: list[dict]) -> str:
    """One line of the table."""
    mean = SimpleNamespace(**{key: statistics.mean(run[key] for run in found) for key in found[0]})
    accuracies = [run["logp_accuracy"] for run in found]
    spread = f"{min(accuracies):.3f} to {max(accuracies):.3f}"
    seconds = statistics.median(run["step_s"] for run in found)
    tokens = f"{mean.tokens:.0f}" if "tokens" in found[0] else ""
    held_out = f"{mean.logp_accuracy:.3f} ({spread}) | {mean.raw_accuracy:.3f} | {mean.logp_margin:.2f} | {mean.kl:.4f}"
    return f"| {name} | {held_out} | {mean.steps:.0f} | {tokens} | {1000 * seconds:.0f} | {BATCH / seconds:.1f} |"


def parse_flags() -> argparse.Namespace:
    """The flags of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/preference", help="folder for models and runs")
    parser.add_argument("--model", default="", help="base model; empty = a tiny one is trained")
    parser.add_argument("--pairs", default="", help="CSV of pairs; empty = example/DPO with the model's own rejects")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=60000, help="tokens run through the model by each method")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--base_steps", type=int, default=450, help="steps of the tiny model's training")
    parser.add_argument("--max_tokens", type=int, default=60, help="longest sampled reject")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--json", default="")
    return parser.parse_args()


def main() -> None:
    """Prepares, runs every method with every seed, prints the table."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    flags = parse_flags()
    flags.out = str((ROOT / flags.out).resolve())
    prepare(flags)
    print("| method | logp_accuracy (range) | raw_accuracy | logp_margin | kl | steps | tokens | ms a step | pairs/s |")
    print("|---|---|---|---|---|---|---|---|---|")
    results: dict[str, list[dict]] = {}
    for name in flags.methods.split(","):
        results[name] = [ours(flags, name, seed) for seed in range(1, flags.seeds + 1)]
        print(row(name, results[name]), flush=True)
    try:
        import trl  # only to say which
    except ImportError as error:
        print(f"\nTRL's DPOTrainer was not run: {error}")
    else:
        name, off = f"TRL {trl.__version__} DPO", 0.0
        results[name] = []
        for seed, run in enumerate(results.get("DPO", []), 1):
            found, losses = theirs(flags, seed, run["steps"])
            own = [record["loss"] for record in records(Path(flags.out) / f"DPO-{seed}", "train")]
            off = max(off, *(abs(a - b) for a, b in zip(own, losses, strict=True)))
            results[name].append(found)
        if results[name]:
            print(row(name, results[name]))
            print(f"\nLargest difference between a step's loss under TRL and ours, {flags.seeds} seeds: {off:.1e}")
    if flags.json:
        Path(flags.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
