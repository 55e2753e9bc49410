"""Memory and time against the length of the context, and what forked prompts and packing save.

python benchmarks/context.py [--lengths 1024,4096,...]     # infinite context: peak memory and time per token
python benchmarks/context.py --fork 1                      # prompts run once against both sequences run whole
python benchmarks/context.py --packing [PAIRS.csv]         # packed rows against padded ones, on real pairs

L6-D256, 8192 tokens of vocabulary, full training in float32, chunks of 1024. Every length runs in a process of its own,
for 64 chunks at least, because the heap grows for the first dozens; peak is VmHWM, which counts the interpreter and the
libraries. States: what the cuts keep, by count of their tensors. CPU: seconds of the processor, which other programs on
the machine do not lengthen.

B batch, T tokens, P prompt tokens, C answer tokens
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
LAYERS, WIDTH, VOCAB, HEAD, CHUNK = 6, 256, 8192, 64, 1024
SETTLED = 64 * CHUNK  # tokens after which the heap has stopped growing
MIB = 1 << 20
PAIRS = "example/DPO/heldout.csv"


def model_of(version: str):
    """A model in training, float32 masters, nothing frozen."""
    import torch

    from rwkv_rlhf.checkpoints.loading import BuildOptions, build_model
    from rwkv_rlhf.host_memory import keep_pages
    from rwkv_rlhf.model.initial import initial_tensors
    from rwkv_rlhf.plan import make_plan

    keep_pages()
    tensors = initial_tensors(version, LAYERS, WIDTH, VOCAB, HEAD, seed=1)
    plan = make_plan("full", LAYERS, lr_init=1e-5, lr_final=1e-5)
    model, _ = build_model(tensors, BuildOptions(torch.float32, plan=plan))
    return model.train()


def peak() -> int:
    """High-water mark of this process's resident memory in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM here")


def measure_length(version: str, tokens: int, repeats: int) -> dict:
    """Steps of SFT over one document of `tokens` tokens, `repeats` at least, and until SETTLED tokens have run."""
    import torch

    from rwkv_rlhf.data.batch import TextBatch
    from rwkv_rlhf.losses import LOSSES
    from rwkv_rlhf.scoring.forward import batch_loss
    from rwkv_rlhf.settings.config import Config

    model = model_of(version)
    config = Config(loss="sft", infctx=True, chunk_ctx=CHUNK)
    generator = torch.Generator().manual_seed(2)

    def step() -> tuple[float, float]:
        row = torch.randint(1, VOCAB, (tokens + 1,), generator=generator)
        batch = TextBatch(row[:-1], row[1:], torch.tensor([0, tokens]), float(tokens))
        begin, cpu = time.perf_counter(), time.process_time()
        value, _ = batch_loss(model, batch, LOSSES["sft"], config)
        (value / batch.total).backward()
        model.zero_grad()
        return time.perf_counter() - begin, time.process_time() - cpu

    took = [step() for _ in range(max(repeats, SETTLED // tokens))]
    with torch.no_grad():
        _, state = model(torch.ones(1, 2, dtype=torch.int64))
    size = sum(part.numel() * part.element_size() for layer in state for part in layer)
    cuts = -(-tokens // CHUNK) - 1
    wall, cpu = map(min, zip(*took, strict=True))
    return {"tokens": tokens, "seconds": wall, "cpu": cpu, "peak": peak(), "states": cuts * size}


def lengths(version: str, counts: list[int], repeats: int) -> list[dict]:
    """The table of lengths."""
    print("| tokens | us/token | CPU us/token | peak MiB | states MiB | peak above the first row, less states, MiB |")
    print("|---|---|---|---|---|---|")
    rows: list[dict] = []
    for count in counts:
        row = in_process(["--raw", f"{version},{count}", "--repeats", str(repeats if count < SETTLED else 1)])
        rows.append(row)
        above = row["peak"] - rows[0]["peak"] - row["states"]
        each, cpu = (row[name] / row["tokens"] * 1e6 for name in ("seconds", "cpu"))
        print(
            f"| {count} | {each:.0f} | {cpu:.0f} | {row['peak'] / MIB:.0f} | {row['states'] / MIB:.0f} "
            f"| {above / MIB:.0f} |",
            flush=True,
        )
    several = [row for row in rows if row["states"]]
    if len(several) > 1:
        grown, states = (several[-1][name] - several[0][name] for name in ("peak", "states"))
        between = f"{several[0]['tokens']} and {several[-1]['tokens']} tokens"
        print(f"\nbetween {between} the peak grows by {grown / states:.3f} times the states")
    return rows


def measure_fork(version: str, repeats: int) -> None:
    """DPO steps with each prompt run once, against prompt and answer run whole for both answers."""
    import torch

    from rwkv_rlhf.data.batch import IGNORE, PairExample, TextBatch, pack_pairs
    from rwkv_rlhf.losses import LOSSES
    from rwkv_rlhf.scoring.forward import answer_hidden, text_hidden
    from rwkv_rlhf.settings.config import Config

    model, config = model_of(version), Config(loss="orpo")
    generator = torch.Generator().manual_seed(2)

    def draw(count: int) -> list[int]:
        return torch.randint(1, VOCAB, (count,), generator=generator).tolist()

    print("| P / C | tokens whole | tokens forked | count | CPU ms whole | forked | ratio |")
    print("|---|---|---|---|---|---|---|")
    for ratio in (3, 10):
        answer = 64
        batch = pack_pairs([PairExample(draw(ratio * answer), draw(answer), draw(answer)) for _ in range(4)])
        rows, targets = [], []
        for n in range(4):
            prompt = batch.prompts[batch.prompt_starts[n] : batch.prompt_starts[n + 1]]
            for s in (2 * n, 2 * n + 1):
                part = slice(batch.starts[s], batch.starts[s + 1])
                rows.append(torch.cat([prompt, batch.answers[part]]))
                targets.append(torch.cat([torch.full_like(prompt, IGNORE), batch.targets[part]]))
        starts = torch.tensor([0, *[len(row) for row in rows]]).cumsum(0)
        whole = TextBatch(torch.cat(rows), torch.cat(targets), starts, batch.total)
        times: dict[str, list[float]] = {"whole": [], "forked": []}
        for _ in range(repeats):
            for name, hidden_of, what in (("whole", text_hidden, whole), ("forked", answer_hidden, batch)):
                begin = time.process_time()
                LOSSES["orpo"].from_hidden(model.head, hidden_of(model, what), what, config).value.backward()
                times[name].append(time.process_time() - begin)
                model.zero_grad()
        a, b = (statistics.median(times[name][1:]) * 1e3 for name in times)
        counts = len(whole.tokens), len(batch.prompts) + len(batch.answers)
        share = f"{counts[1] / counts[0]:.3f} | {a:.0f} | {b:.0f} | {b / a:.3f}"
        print(f"| {ratio} | {counts[0]} | {counts[1]} | {share} |")


def measure_packing(version: str, path: str, repeats: int) -> None:
    """Useful tokens per CPU second of ORPO steps of 4 pairs: packed rows, and rows padded to the batch's longest."""
    import torch

    from rwkv_rlhf.data.batch import IGNORE, TextBatch, pack_pairs
    from rwkv_rlhf.data.pairs.dataset import open_pairs
    from rwkv_rlhf.data.tokenizer import load_tokenizer
    from rwkv_rlhf.losses import LOSSES
    from rwkv_rlhf.scoring.forward import answer_hidden
    from rwkv_rlhf.settings.config import Config

    model, config = model_of(version), Config(loss="orpo")
    tokenizer = load_tokenizer(65536)
    pairs = [
        type(pair)(*([t % VOCAB for t in part] for part in (pair.prompt, pair.chosen, pair.reject)))
        for pair in open_pairs(path, tokenizer)
    ]
    groups = [pairs[i : i + 4] for i in range(0, len(pairs) - 3, 4)]
    useful = sum(len(p.prompt) + len(p.chosen) + len(p.reject) for group in groups for p in group)
    print("| rows | tokens run | useful tokens per CPU second |\n|---|---|---|")
    for name in ("packed", "padded"):
        best, run = float("inf"), 0
        for _ in range(repeats):
            begin, run = time.process_time(), 0
            for group in groups:
                if name == "packed":
                    batch = pack_pairs(group)
                    run += len(batch.prompts) + len(batch.answers)
                    hidden, what = answer_hidden(model, batch), batch
                else:
                    rows = [p.prompt + answer for p in group for answer in (p.chosen, p.reject)]
                    width = max(map(len, rows)) - 1
                    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
                    targets = torch.full_like(tokens, IGNORE)
                    for i, row in enumerate(rows):
                        tokens[i, : len(row) - 1] = torch.tensor(row[:-1])
                        first = len(group[i // 2].prompt) - 1
                        targets[i, first : len(row) - 1] = torch.tensor(row[first + 1 :])
                    run += tokens.numel()
                    hidden = model(tokens)[0].flatten(0, 1)
                    starts = torch.arange(len(rows) + 1) * width
                    what = TextBatch(tokens.flatten(), targets.flatten(), starts, float(len(group)))
                LOSSES["orpo"].from_hidden(model.head, hidden, what, config).value.backward()
                model.zero_grad()
            best = min(best, time.process_time() - begin)
        print(f"| {name} | {run} | {useful / best:.0f} |")


def in_process(words: list[str]) -> dict:
    """Run one row in a fresh interpreter."""
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1024,4096,16384,65536,262144,1048576")
    parser.add_argument("--version", default="x070")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fork", type=int, default=0)
    parser.add_argument("--packing", nargs="?", const=str(ROOT / PAIRS), default="")
    parser.add_argument("--raw", default="")
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    if flags.raw:  # one length, in this process
        version, count = flags.raw.split(",")
        print(json.dumps(measure_length(version, int(count), flags.repeats)))
    elif flags.fork:
        measure_fork(flags.version, max(flags.repeats, 5))
    elif flags.packing:
        measure_packing(flags.version, flags.packing, flags.repeats)
    else:
        rows = lengths(flags.version, [int(word) for word in flags.lengths.split(",")], flags.repeats)
        if flags.json:
            flags.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
