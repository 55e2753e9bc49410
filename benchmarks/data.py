"""Rows and megabytes per second, and the peak memory, of readers and preparation scripts; tokenizers side by side.

python benchmarks/data.py [--mb 32] [--folder F] [--only convert]

Each script runs in a process of its own on a file that is made for it; of its time, that of the same script on a
hundredth of the file is taken off (imports, the vocabulary).
"""

import argparse
import csv
import importlib.util
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

WORDS = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split()
Row = dict[str, Any]


def sentences(seed: int) -> Iterator[str]:
    """Texts of 5 to 200 words, the same for a seed."""
    draw = random.Random(seed)
    while True:
        yield " ".join(draw.choices(WORDS, k=draw.randint(5, 200)))


def documents() -> Iterator[Row]:
    return ({"text": text} for text in sentences(1))


def chats() -> Iterator[Row]:
    texts = sentences(2)
    while True:
        turns = [{"role": role, "content": next(texts)} for role in ("user", "assistant") * 2]
        yield {"messages": turns}


def sharegpt() -> Iterator[Row]:
    names = {"user": "human", "assistant": "gpt"}
    for row in chats():
        yield {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]]}


def pairs() -> Iterator[Row]:
    texts = sentences(3)
    while True:
        yield {"prompt": next(texts), "chosen": next(texts), "reject": next(texts)}


def write_lines(rows: Iterator[Row], path: Path, size: int) -> int:
    """JSON lines of `size` bytes; returns how many."""
    with open(path, "w", encoding="utf-8") as file:
        for count in itertools.count():
            if file.tell() >= size:
                return count
            file.write(json.dumps(next(rows), ensure_ascii=False) + "\n")
    return 0


def write_array(rows: Iterator[Row], path: Path, size: int) -> int:
    """The same as one JSON array in a single line."""
    with open(path, "w", encoding="utf-8") as file:
        file.write("[")
        for count in itertools.count():
            if file.tell() >= size:
                file.write("]")
                return count
            file.write((", " if count else "") + json.dumps(next(rows), ensure_ascii=False))
    return 0


def write_csv(rows: Iterator[Row], path: Path, size: int) -> int:
    """A CSV with the keys of the first row."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        first = next(rows)
        writer = csv.DictWriter(file, list(first))
        writer.writeheader()
        for count in itertools.count():
            if file.tell() >= size:
                return count
            writer.writerow(first if not count else next(rows))
    return 0


def write_parquet(rows: Iterator[Row], path: Path, size: int) -> int:
    """Parquet of as much text as the other files have; the file itself is smaller."""
    import pyarrow
    import pyarrow.parquet

    found, held = [], 0
    while held < size:
        found.append(next(rows))
        held += len(json.dumps(found[-1], ensure_ascii=False)) + 1
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), path, row_group_size=4096)
    return len(found)


class Case(NamedTuple):
    """A script with its words, {i} and {o} being the files, and the file that it reads."""

    words: str
    rows: Callable[[], Iterator[Row]]
    write: Callable[[Iterator[Row], Path, int], int]
    suffix: str


CASES = (
    Case("convert_data.py --input {i} --output {o}.jsonl", documents, write_lines, "jsonl"),
    Case("convert_data.py --input {i} --output {o}.jsonl", chats, write_lines, "jsonl"),
    Case("convert_data.py --input {i} --output {o}.jsonl", sharegpt, write_array, "json"),
    Case("convert_data.py --input {i} --output {o}.jsonl", pairs, write_csv, "csv"),
    Case("convert_data.py --input {i} --output {o}.jsonl", pairs, write_parquet, "parquet"),
    Case("make_binidx.py --input {i} --output {o}", documents, write_lines, "jsonl"),
    Case("sft_generate_h5.py --input {i} --output_h5 {o}.h5", chats, write_lines, "jsonl"),
    Case("PrepareOrpoDataset.py --input_csv {i} --output_save {o}.save", pairs, write_csv, "csv"),
)


def run(words: list[str]) -> tuple[float, float]:
    """(seconds, peak MiB) of a script."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        said.seek(0)
        assert status == 0, said.read().decode()[-2000:]
    return time.monotonic() - start, usage.ru_maxrss / 2**10


def measured(case: Case, size: int, folder: Path) -> tuple[int, float, float, float]:
    """(rows, MB, seconds, peak MiB) of a case."""
    figures = []
    for part in (size // 100, size):
        source = folder / f"in.{case.suffix}"
        rows = case.write(case.rows(), source, part)
        words = case.words.format(i=source, o=folder / "out").split()
        if case.words.startswith("Prepare"):
            words += ["--target_pair_count", str(rows)]
        seconds, peak = run(words)
        figures.append((rows, part / 1e6, seconds, peak))
        for path in folder.iterdir():
            path.unlink()
    (few, small, start, _), (rows, megabytes, seconds, peak) = figures
    return rows - few, megabytes - small, max(seconds - start, 1e-3), peak


def tokenizers() -> None:
    """MB/s of ours, of the package in Rust and of the `rwkv` package's, interleaved, on the same text."""
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    from rwkv_rlhf.data.tokenizer import TrieTokenizer, load_tokenizer, world_vocabulary_file

    world = load_tokenizer(65536)
    assert isinstance(world, TrieTokenizer)
    sides: dict[str, Callable[[str], list[int]]] = {
        "ours, in Python": TrieTokenizer(world.words, 65536, "world").encode,
        "rwkv package": TRIE_TOKENIZER(str(world_vocabulary_file())).encode,
    }
    if importlib.util.find_spec("pyrwkv_tokenizer") is not None:
        sides["pyrwkv-tokenizer"] = world.encode
    text = " ".join(itertools.islice(sentences(4), 2000))
    assert len({tuple(encode(text)) for encode in sides.values()}) == 1
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(5):
        for name, encode in sides.items():
            start = time.perf_counter()
            encode(text)
            rates[name].append(len(text.encode()) / 1e6 / (time.perf_counter() - start))
    print("\n| tokenizer, World | MB/s: median (least to most) |\n|---|---|")
    for name, found in rates.items():
        print(f"| {name} | {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f}) |")


def main() -> None:
    """Prints the tables."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--mb", type=int, default=32, help="size of each file")
    flags.add_argument("--folder", default=None, help="where the files are made")
    flags.add_argument("--only", default="", help="scripts whose names hold this")
    args = flags.parse_args()
    print(f"files of {args.mb} MB\n| script | file | rows/s | MB/s | peak MiB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for case in CASES:
            script = case.words.split()[0]
            if args.only in script:
                rows, megabytes, seconds, peak = measured(case, args.mb * 1_000_000, Path(folder))
                what = f"{case.rows.__name__}, .{case.suffix}"
                print(
                    f"| {script} | {what} | {rows / seconds:,.0f} | {megabytes / seconds:.1f} | {peak:.0f} |",
                    flush=True,
                )
    if not args.only:
        tokenizers()


if __name__ == "__main__":
    main()
