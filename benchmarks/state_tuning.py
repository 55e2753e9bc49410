"""State tuning: the learning rate against the loss on held-out text, for models of two versions.

python benchmarks/state_tuning.py [--json PATH]            # x060 and x070, ten rates, two lengths; an hour on one core
python benchmarks/state_tuning.py --versions x070 --rates 0.01,0.1 --steps 30 --base_steps 60     # a quick look

A small model (--layers, --width, World vocabulary) is trained from zero on example/quickstart/corpus.jsonl, whose
answers are mostly curt. Then `train.py --state 1` learns the state that texts begin from on courteous chats
(example/SFT/chats.jsonl) in batches of 8, with a warm-up of a tenth of the steps, the rate falling to a tenth. The loss
is that of 120 other courteous chats, made by the function of example/make_data.py that makes those of example/SFT.
"none" is the model before; "full" is full training of all weights, at the best of three rates.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import os
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT / "src")  # not benchmarks/, whose kernels.py transformers would take for a package
TRAINED_ON = "example/SFT/chats.jsonl"
RATES = "0.0001,0.0003,0.001,0.003,0.01,0.03,0.1,0.3,1,3"
FULL_RATES = (1e-4, 3e-4, 1e-3)
COMMON = "--precision fp32 --quant 0 --grad_cp 0 --enable_progress_bar 0 --smoothing 0 --epoch_count 1 --random_seed 1"


def other_chats(path: Path) -> None:
    """Writes courteous chats that example/SFT does not hold."""
    spec = importlib.util.spec_from_file_location("make_data", ROOT / "example/make_data.py")
    assert spec is not None and spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    sys.modules["make_data"] = maker  # dataclasses look their module up
    spec.loader.exec_module(maker)
    seen = set((ROOT / TRAINED_ON).read_text(encoding="utf-8").splitlines())
    made = [chat for part in ("a", "b") for chat in maker.chats(maker.world(), random.Random(f"held out {part}"))]
    path.write_text("".join(f"{json.dumps(chat)}\n" for chat in made if json.dumps(chat) not in seen), encoding="utf-8")


def train(folder: Path, *words: object) -> None:
    """One run of train.py in a fork of this process, which has imported what takes seconds."""
    child = os.fork()
    if not child:
        from rwkv_rlhf.commands.train import main

        os.chdir(ROOT)
        status = 1
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                status = main([*map(str, words), "--proj_dir", str(folder)]) or 0
        except Exception:
            logging.exception("%s", folder)
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"the run in {folder} failed")


def held_out_loss(folder: Path) -> float:
    """The last one in a run's metrics."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["event"] in ("val", "eval")][-1]


def base_model(flags: argparse.Namespace, version: str) -> Path:
    """A model of this version that has learnt the curt manner, unless it was made before."""
    folder = Path(flags.out).resolve() / version
    done = folder / "rwkv-final.pth"
    if not done.exists():
        sizes = ["--my_testing", version, "--n_layer", flags.layers, "--n_embd", flags.width, "--vocab_size", 65536]
        train(folder, "--train_stage", 1, "--load_model", 0, "--random_seed", 1, *sizes)
        words = "--sft 1 --data_file example/quickstart/corpus.jsonl --ctx_len 64 --micro_bsz 16 --warmup_steps 10"
        rates = ["--lr_init", 2e-3, "--lr_final", 2e-4, "--epoch_steps", flags.base_steps]
        train(folder, "--load_model", folder / "rwkv-init.pth", *words.split(), *rates, *COMMON.split())
    return done


def loss_after(flags: argparse.Namespace, base: Path, held_out: Path, steps: int, rate: float, *mode: object) -> float:
    """The held-out loss after so many steps at this rate."""
    folder = base.parent / "-".join(map(str, (mode[0], steps, rate))).lstrip("-")
    if not (folder / "metrics.jsonl").exists():
        words = ["--load_model", base, "--sft", 1, "--data_file", TRAINED_ON, "--val_file", held_out, *mode]
        rates = ["--lr_init", rate, "--lr_final", rate / 10, "--warmup_steps", max(1, steps // 10)]
        sizes = ["--ctx_len", 128, "--micro_bsz", 8, "--epoch_steps", steps]
        train(folder, *words, *rates, *sizes, *COMMON.split())
    return held_out_loss(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", default="x060,x070")
    parser.add_argument("--rates", default=RATES)
    parser.add_argument("--steps", default="30,150")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--base_steps", type=int, default=450)
    parser.add_argument("--out", default="out/state_tuning", help="where runs go; runs that are there are not repeated")
    parser.add_argument("--json", default="", help="write the figures here too")
    flags = parser.parse_args()
    import pytorch_lightning  # noqa: F401

    import rwkv_rlhf.training.run  # noqa: F401

    logging.disable(logging.WARNING)
    out = Path(flags.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    held_out = out / "held_out.jsonl"
    other_chats(held_out)
    rates, lengths = [float(word) for word in flags.rates.split(",")], [int(word) for word in flags.steps.split(",")]
    columns = [(version, steps) for version in flags.versions.split(",") for steps in lengths]
    table: dict[str, dict[str, float]] = {}
    for version, steps in columns:
        base, column = base_model(flags, version), f"{version}, {steps} steps"
        scored = ["--load_model", base, "--eval_only", 1, "--val_file", held_out, "--precision", "fp32"]
        train(out / f"{version}-none", *scored)
        table.setdefault("none", {})[column] = held_out_loss(out / f"{version}-none")
        for rate in rates:
            found = loss_after(flags, base, held_out, steps, rate, "--state", 1, "--peft", "state")
            table.setdefault(f"{rate:g}", {})[column] = found
        full = [loss_after(flags, base, held_out, steps, rate, "--peft", "full") for rate in FULL_RATES]
        table.setdefault("full", {})[column] = min(full)
        print(f"{column} done", file=sys.stderr, flush=True)
    names = list(table["none"])
    print("| rate | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
    for rate, row in table.items():
        print(f"| {rate} | " + " | ".join(f"{row[name]:.3f}" for name in names) + " |")
    if flags.json:
        Path(flags.json).write_text(json.dumps(table, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
