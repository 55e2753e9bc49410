"""What several processes cost: tokens a second, bytes sent per step by strategy beside the theory, time of a save.

`python benchmarks/scale.py --paper` prints what the formulas below say of large models, and runs nothing.
`python benchmarks/scale.py [--layers 4 --width 256 --steps 8] [--peft lora]` runs train.py's own code with 1 and 2
processes of one core each. Bytes are read from the loopback of a network namespace of their own, so they are all that
crossed it (root only; elsewhere that column is empty).

Theory, for W processes and G trained numbers of 4 bytes, sent by each process per optimizer step:
    ddp                      2 (W-1)/W * 4G    all-reduce of the gradients
    deepspeed stage 1, 2     2 (W-1)/W * 4G    reduce them to their owners, gather the new parameters
    deepspeed stage 3, fsdp  3 (W-1)/W * 4G    gather parameters forward and backward, reduce gradients

On paper, for N parameters in L blocks of width C, all trained, T tokens a GPU and step, blocks recomputed:
    memory   weights, gradients and Adam's moments in float32 (the strategy's shares: HELD), of which what a strategy
             splits is divided by W; blocks that are whole for a moment; activations 2 L T C + 60 T C bytes;
             logits 2 * 1024 * 65536 * 2 bytes
    seconds  the larger of 8 N T / (40% of 989e12) and bytes sent / bandwidth (they overlap), 400 GB/s inside a machine
             of 8 GPUs, 50 GB/s a GPU between machines
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch

STRATEGIES = ("ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3", "fsdp")
PASSES = {"ddp": 2, "deepspeed_stage_1": 2, "deepspeed_stage_2": 2, "deepspeed_stage_3": 3, "fsdp": 3}
WARM = 2
# bytes a parameter: (whole on each rank, split over the ranks, blocks whole at a time)
HELD = {
    "ddp": (16, 0, 0),
    "deepspeed_stage_1": (8, 12, 0),  # its float32 share is a copy
    "deepspeed_stage_2": (4, 16, 0),
    "deepspeed_stage_2_offload": (4, 4, 0),  # copy and moments in host memory
    "deepspeed_stage_3": (0, 20, 2),
    "fsdp": (0, 16, 2),
}
SIZES = {"7.2B": (7.2e9, 32, 4096), "14B": (13.3e9, 61, 4096)}
GPU_GB, RATE, INSIDE, BETWEEN, TOKENS = 80, 0.4 * 989e12, 400e9, 50e9, 32768
VOCAB = 257


def sent():
    """Bytes that this process's network has received on its loopback so far."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[0])
    return 0


def worker(words):
    """One process of a run: train.py with a watch on steps and saves; rank 0 writes `found.json`."""
    from rwkv_rlhf.checkpoints.run_folder import RunFolder
    from rwkv_rlhf.commands.train import ranked
    from rwkv_rlhf.distributed import ranks
    from rwkv_rlhf.distributed.launch import launched
    from rwkv_rlhf.settings.command_line import parse
    from rwkv_rlhf.training.module import TrainingModule

    end, save, found = TrainingModule.on_train_batch_end, RunFolder.save, {"steps": [], "saves": []}

    def timed_end(self, *arguments):
        end(self, *arguments)
        found["steps"].append((time.perf_counter(), sent()))

    def timed_save(self, name):
        began = time.perf_counter()
        path = save(self, name)
        found["saves"].append(time.perf_counter() - began)
        return path

    TrainingModule.on_train_batch_end, RunFolder.save = timed_end, timed_save
    with launched(parse(words), [__file__, "--worker", *words]) as config:
        ranked(config)
        if ranks.is_rank_zero():
            Path(config.proj_dir, "found.json").write_text(json.dumps(found))


def run(words, folder, alone):
    """What one command found, after the warm-up."""
    command = [sys.executable, __file__, "--worker", *map(str, words), "--proj_dir", str(folder)]
    if alone:
        command = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found = json.loads((folder / "found.json").read_text())
    steps = found["steps"][WARM:]
    (begin, before), (end, after) = steps[0], steps[-1]
    return (end - begin) / (len(steps) - 1), (after - before) / (len(steps) - 1), min(found["saves"])


def on_paper(size, strategy, world):
    """(GB a GPU, tokens/s of all) by the formulas above."""
    number, layers, width = SIZES[size]
    whole, split, blocks = HELD[strategy]
    held = number * (whole + split / world + 4 * blocks / layers)
    held += 2 * layers * TOKENS * width + 60 * TOKENS * width + 4 * 1024 * 65536
    sent_bytes = PASSES[strategy.removesuffix("_offload")] * (world - 1) / world * 4 * number
    seconds = max(8 * number * TOKENS / RATE, sent_bytes / (INSIDE if world <= 8 else BETWEEN))
    return held / 1e9, world * TOKENS / seconds


def paper():
    """The table of estimates, as Markdown."""
    counts = (8, 16, 32, 64, 128, 256, 512)
    for size in SIZES:
        print(f"\n| {size}, estimate | " + " | ".join(f"{count} GPUs" for count in counts) + " |")
        print("|---|" + "---|" * len(counts))
        for strategy in HELD:
            cells = [on_paper(size, strategy, count) for count in counts]
            said = [f"{gb:.0f} GB, {rate / 1e3:.0f}k" if gb <= GPU_GB else f"{gb:.0f} GB: no" for gb, rate in cells]
            print(f"| {strategy} | " + " | ".join(said) + " |")


def main():
    """The table, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("layers", 4), ("width", 256), ("steps", 8), ("tokens", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peft", default="full")
    parser.add_argument("--paper", action="store_true")
    asked = parser.parse_args()
    if asked.paper:
        return paper()
    from rwkv_rlhf.model.initial import initial_tensors

    alone = os.geteuid() == 0 and subprocess.run(["unshare", "-n", "true"], check=False).returncode == 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tensors = initial_tensors("x070", asked.layers, asked.width, VOCAB, 64, 1)
        torch.save(tensors, folder / "base.pth")
        (folder / "bytes.txt").write_text("".join(f"{b + 1} {bytes([b])!r} 1\n" for b in range(256)))
        text = "x" * asked.tokens
        (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for _ in range(64)) + "\n")
        words = [
            *("--load_model", folder / "base.pth", "--vocab_file", folder / "bytes.txt", "--sft", 1),
            *(
                "--data_file",
                folder / "text.jsonl",
                "--ctx_len",
                asked.tokens + 1,
                "--micro_bsz",
                1,
                "--peft",
                asked.peft,
            ),
            *("--accelerator", "cpu", "--precision", "fp32", "--quant", 0, "--epoch_steps", asked.steps),
            *("--epoch_count", 1, "--grad_cp", 0),
        ]
        print("| strategy | processes | s / step | tokens/s | MB sent per process and step | theory | save s |")
        print("|---|---|---|---|---|---|---|")
        seconds, _, saving = run(words, folder / "one", False)
        print(f"| none | 1 | {seconds:.3f} | {asked.tokens / seconds:.0f} | 0 | 0 | {saving:.3f} |")
        trained = sum(t.numel() for t in torch.load(folder / "one/rwkv-final.pth", weights_only=True).values())
        for how in STRATEGIES:
            more = ("--strategy", how, "--devices", 2)
            seconds, moved, saving = run([*words, *more], folder / how, alone)
            measured = f"{moved / 2 / 1e6:.2f}" if alone else ""
            theory = PASSES[how] / 2 * 4 * trained / 1e6
            print(
                f"| {how} | 2 | {seconds:.3f} | {2 * asked.tokens / seconds:.0f} | {measured} | {theory:.2f} "
                f"| {saving:.3f} |"
            )
        print(f"\n{trained:,} trained numbers, L{asked.layers}-D{asked.width}, {asked.tokens} tokens a process")


if __name__ == "__main__":
    worker(sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main()
