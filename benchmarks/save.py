"""What resume points cost: the time of a save, the training time that it takes away, and the time to resume.

python benchmarks/save.py [--n_layer 6] [--n_embd 512] [--steps 24] [--every 8] [--json PATH]

A model from zero trains in full (AdamW: weights and two moments in float32, 12 bytes a parameter). The same steps run
without points, with points written in the background and with points written while the training waits; the runs take
turns. Step times are those of metrics.jsonl, from the end of a step to the end of the next, saves included. `lost` is
the mean step of a run with points minus the median step without, per save. `copy` is the time on the training thread;
`cpu` what the writing thread computes (hash) and copies, which training loses too where it uses every core.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from rwkv_rlhf.checkpoints.resume_points import ResumePoints, last_point  # noqa: E402
from rwkv_rlhf.checkpoints.run_folder import RunFolder  # noqa: E402
from rwkv_rlhf.commands import train  # noqa: E402
from rwkv_rlhf.training.background import Background  # noqa: E402
from rwkv_rlhf.training.resume import WriteResumePoints  # noqa: E402

VOCAB = 257
times: dict[str, list[float]] = defaultdict(list)


def timed(name: str, function, cpu: bool = False):
    """`function`, each call's seconds under `name`."""

    def call(*words, **named):
        begin, worked = time.perf_counter(), time.thread_time()
        result = function(*words, **named)
        times[name].append(time.perf_counter() - begin)
        if cpu:
            times[name + " cpu"].append(time.thread_time() - worked)
        return result

    return call


def start_now(self: Background, job) -> None:
    """A background that is none: what saving costs when the training waits."""
    job()


def prepare(folder: Path, flags: argparse.Namespace) -> list[str]:
    """A model from zero, a vocabulary of bytes and text; the words that all runs share."""
    (folder / "bytes.txt").write_text("".join(f"{byte + 1} {bytes([byte])!r} 1\n" for byte in range(256)))
    lines = (json.dumps({"text": f"{n} " + "some text " * 40}) for n in range(64))
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    sizes = ["--n_layer", flags.n_layer, "--n_embd", flags.n_embd, "--vocab_size", VOCAB, "--my_testing", "x070"]
    run("--train_stage", 1, "--load_model", 0, "--proj_dir", folder / "base", *sizes)
    return [
        *("--load_model", folder / "base" / "rwkv-init.pth", "--vocab_file", folder / "bytes.txt", "--sft", 1),
        *("--data_file", folder / "text.jsonl", "--ctx_len", 256, "--micro_bsz", flags.micro_bsz, "--quant", 0),
        *("--epoch_steps", flags.steps, "--epoch_count", 1, "--enable_progress_bar", 0),
    ]


def run(*words: object) -> None:
    """train.py in this process."""
    train.main([str(word) for word in words])


def steps_of(folder: Path) -> list[float]:
    """Seconds of each step but the first two."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r["tokens"] / r["tokens_per_s"] for r in records if r["event"] == "train"][2:]


def measure(flags: argparse.Namespace, folder: Path) -> dict[str, float]:
    """All figures; seconds and bytes."""
    words, seen = prepare(folder, flags), defaultdict(list)
    waiting = Background.start
    for turn in range(flags.turns):
        for mode, every in (("none", -1), ("background", flags.every), ("waiting", flags.every)):
            Background.start = start_now if mode == "waiting" else waiting
            times.clear()
            out = folder / f"{mode}{turn}"
            run(*words, "--proj_dir", out, "--resume_every", every)
            seen[mode] += steps_of(out)
            if mode == "background":
                for name in ("copy", "write", "write cpu", "checkpoint"):
                    seen[name] += times[name]
    point = folder / "background0" / "resume"
    begin = time.perf_counter()
    last_point(point)
    verify = time.perf_counter() - begin
    times.clear()
    run(*words, "--proj_dir", folder / "background0", "--resume", "auto")
    plain = statistics.median(seen["none"])
    lost = {mode: (statistics.fmean(seen[mode]) - statistics.fmean(seen["none"])) * flags.every for mode in seen}
    return {
        "bytes of a point": sum(file.stat().st_size for file in max(point.glob("step-*")).iterdir()),
        "step": plain,
        "copy on the training thread": statistics.median(seen["copy"]),
        "write, hash and flush in the thread": statistics.median(seen["write"]),
        "cpu of the thread": statistics.median(seen["write cpu"]),
        "lost per save, in the background": lost["background"],
        "lost per save, waiting": lost["waiting"],
        "a numbered checkpoint (training waits)": statistics.median(seen["checkpoint"]),
        "verify a point": verify,
        "read it into the trainer": times["resume"][0],
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("n_layer", 6), ("n_embd", 512), ("micro_bsz", 8), ("steps", 24), ("every", 8), ("turns", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json")
    flags = parser.parse_args()
    logging.disable(logging.INFO)
    WriteResumePoints._write = timed("copy", WriteResumePoints._write)
    ResumePoints.write = timed("write", ResumePoints.write, cpu=True)
    RunFolder.save = timed("checkpoint", RunFolder.save)
    WriteResumePoints._go_on = timed("resume", WriteResumePoints._go_on)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(flags, Path(folder))
    for name, value in found.items():
        print(f"{name:<42} {value / 1e6:>10.1f} MB" if "bytes" in name else f"{name:<42} {value:>10.3f} s")
    every = 100 * (found["copy on the training thread"] + found["cpu of the thread"]) / found["step"]
    print(f"steps between two points for a loss below 1 %: {max(1, round(every))}, if no core is free")
    if flags.json:
        Path(flags.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
