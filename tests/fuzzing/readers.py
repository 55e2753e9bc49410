"""Every reader of the program: a whole sample, the function that reads it in earnest, and what may happen to the file.

READERS is the table; a new format is one line in it. A resume point of a run (P/resume) belongs here as soon as there
are some.
"""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save_file

from src.data import is_rated, kind_of, open_h5, open_pairs, open_rated, open_slices, open_text
from src.data.batch import PairExample, TextExample, TopK, pack, pack_rated
from src.data.binidx import write_corpus
from src.data.chat_template import load_chat_template
from src.data.h5 import writing
from src.data.journal import Journal
from src.data.pair_save import write_save
from src.data.report import DataReport
from src.data.tokenizer import load_tokenizer
from src.layers.adaptation import Adaptation
from src.layers.placing import Layout
from src.model.checkpoint import load_model, write_atomic
from src.model.initial import initial_tensors
from src.plan import COLUMNS, OLD_COLUMNS, read_profile
from src.rl.reject_file import RejectFile
from src.rl.rejects import read_tasks
from src.training.adapter_files import open_adapter
from src.training.exchange import from_peft_folder, to_peft_folder
from src.training.kept_scores import KeptScores
from src.training.merging import load_combined
from src.training.reference import cached_scores
from src.training.sidecar import sidecar_of, write_sidecar
from tests.fuzzing import mutators as m

VOCAB = 257
ROWS = [(f"say {n}" + "!" * n, f"gladly: {n}", f"no {n}?") for n in range(4)]
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}" + (
    "<|assistant|>{% endif %}"
)


class Words:
    """A tokenizer of single bytes, without a file."""

    name, vocab_size = "bytes", VOCAB

    def encode(self, text: str) -> list[int]:
        return [byte + 1 for byte in text.encode("utf-8", errors="surrogatepass")]

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return bytes(number - 1 for number in ids if number)


@dataclass(frozen=True)
class Reader:
    """One kind of file.

    Attributes:
        write: makes a whole sample in a folder and returns the path that is read. read: what the program does with it.
        mutators: beside those of bytes. repairs: the reader may shorten the file or begin it anew, nothing else may.
    """

    write: Callable[[Path], Path]
    read: Callable[[Path, Random], Any]
    mutators: tuple[m.Mutator, ...] = ()
    repairs: bool = False


def write_json_lines(path: Path, records: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_csv(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def turns(answer: str) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": answer},
    ]


def pair_objects() -> list[dict]:
    found: list[dict] = [dict(zip(("prompt", "chosen", "reject"), row)) for row in ROWS]
    found[1] |= {"system": "be kind", "score_chosen": 2, "score_rejected": 1.5}
    return [*found, {"chosen": turns("gladly"), "rejected": turns("no")}]


def rated_objects() -> list[dict]:
    return [{"prompt": f"say {n}", "completion": f"answer {n}", "label": n % 2 == 0} for n in range(4)]


def write_parquet(path: Path, records: Sequence[dict]) -> Path:
    names = list(records[0])
    pyarrow.parquet.write_table(pyarrow.table({n: [r.get(n) for r in records] for n in names}), path)
    return path


def write_pair_save(folder: Path) -> Path:
    pairs = [PairExample([1, 2, 3 + n], [4, 5], [6], (-1.0, -2.5) if n % 2 else None) for n in range(4)]
    write_save(folder / "pairs.save", pairs, {"model": "0" * 64, "template": "world", "reference": "sum"})
    return folder / "pairs.save"


def write_pair_h5(folder: Path) -> Path:
    import h5py

    with h5py.File(folder / "pairs.h5", "w") as file:
        for name, ids in (("prompttokens", [1, 2]), ("chosentokens", [3]), ("rejecttokens", [4, 5])):
            column = file.create_dataset(name, (3,), h5py.vlen_dtype(np.int64))
            for at in range(3):
                column[at] = np.array([*ids, at])
        for name in ("chosenprob", "rejectprob"):
            file[name] = np.full(3, -0.5, dtype=np.float32)
    return folder / "pairs.h5"


def documents(k: int) -> list[TextExample]:
    rng = np.random.default_rng(1)
    found = []
    for length in (3, 7, 12):
        mask = np.arange(length) > 1 if length == 7 else None
        top = None
        if k:
            indices = np.stack([rng.permutation(VOCAB)[:k] for _ in range(length)])
            top = TopK(
                rng.standard_normal((length, k)).astype(np.float32), indices, np.full(length, 5.0, dtype=np.float32)
            )
        found.append(TextExample(rng.integers(1, VOCAB, length), mask, top))
    return found


def write_documents(folder: Path, k: int) -> Path:
    with writing(folder / "documents.h5", {"vocab_size": VOCAB}, k) as file:
        file.add(documents(k))
    return folder / "documents.h5"


def write_binidx(folder: Path) -> Path:
    write_corpus(folder / "corpus", [np.arange(1, 40), np.arange(5, 9)], iter([0, 1, 0]), VOCAB)
    return folder / "corpus.idx"


def write_profile(folder: Path, columns: Sequence[str]) -> Path:
    rates = {
        "Layer": 0,
        "Weight_lr_init": "1e-4",
        "Weight_lr_final": "1.00E-05",
        "LRScale": 1,
        "RejectParts": "ln,gate",
    }
    adapter = {"Mode": "lora", "Rank": 4, "Alpha": "8.0", "Dropout": 0.01}
    rows = [{**rates, **adapter, "Layer": layer} for layer in (0, 1)]
    rows.insert(0, {**rates, "Layer": "emb", "Mode": "freeze", "Rank": 0})
    rows.append({**rates, "Layer": "head", "Mode": "full"})
    return write_csv(folder / "profile.csv", [columns, *[[row.get(name, 0) for name in columns] for row in rows]])


def base_tensors() -> dict[str, torch.Tensor]:
    return initial_tensors("x070", 1, 32, 24, 32, 1)


def write_checkpoint(folder: Path, name: str) -> Path:
    tensors = base_tensors()
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)
    return folder / name


def write_adapter(folder: Path) -> Path:
    """The adapter of a matrix, in a folder with its sidecar and the base."""
    base = write_checkpoint(folder, "base.pth")
    adapted = {
        "blocks.0.att.key": Adaptation.make("lora", 4, 8.0),
        "blocks.0.ffn.key": Adaptation.make("bone", 16, 0.0),
    }
    tensors = {
        "blocks.0.att.key.lora_A": torch.ones(4, 32),
        "blocks.0.att.key.lora_B": torch.zeros(32, 4),
        "blocks.0.ffn.key.bone": torch.zeros(2, 16, 16),
        "blocks.0.ln1.weight": torch.ones(32),
    }
    path = folder / "rwkv-0.pth"
    write_atomic(tensors, path)
    layout = Layout(adapted, frozenset(), frozenset({"blocks.0.ln1.weight"}), "none")
    write_sidecar(sidecar_of("x070", layout, None, base), path)
    return path


def write_peft(folder: Path) -> Path:
    path = write_adapter(folder)
    file = open_adapter(path)
    lora = {name: how for name, how in file.layout.adapted.items() if how.mode == "lora"}
    kept = {name: tensor for name, tensor in file.tensors.items() if "lora" in name}
    plain = type(file)(file.path, kept, file.sidecar, Layout(lora, frozenset(), frozenset(), "none"), {})
    to_peft_folder(plain, folder / "peft")
    for other in (path, path.with_suffix(".json")):
        other.unlink()
    return folder / "peft"


def write_vocabulary(folder: Path) -> Path:
    path = folder / "vocab.txt"
    words = [bytes([n]) for n in range(256)]
    path.write_text("".join(f"{n + 1} {word!r} 1\n" for n, word in enumerate(words)) + "257 'ab' 2\n258 '\u732b' 3\n")
    return path


def write_tokenizer(folder: Path) -> Path:
    import tokenizers

    words = tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2, "<unk>": 3}, [("a", "b")], unk_token="<unk>")
    inner = tokenizers.Tokenizer(words)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(["<|end|>"])
    inner.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def write_template(folder: Path, config: bool) -> Path:
    path = folder / ("tokenizer_config.json" if config else "chat.jinja")
    text = {"chat_template": CHAT, "bos_token": {"content": "<s>"}, "eos_token": "<|end|>"}
    path.write_text(json.dumps(text) if config else CHAT)
    return path


def write_journal(folder: Path) -> Path:
    journal = Journal(folder / "work.part", {"teacher": "x"}, 2)
    for batch in (documents(2)[:2], documents(2)[2:]):
        journal.append(batch)
    return folder / "work.part"


def write_rejects(folder: Path, suffix: str) -> Path:
    file = RejectFile(folder / f"out{suffix}", ["prompt", "chosen", "reject"], {"model": "x"})
    cells = [dict(zip(("prompt", "chosen", "reject"), row)) for row in ROWS]
    file.resume(cells, False)
    file.append([file.row(row, row["reject"]) for row in cells[:2]])
    return file.path


def write_scores(folder: Path) -> Path:
    path = folder / "scores.part"
    path.write_text("key\n[[-1.0, -2.5]]\n[[-1.25, -0.5], [-3.0, -1.0]]\n")
    return path


def read_pairs(path: Path, rng: Random) -> Any:
    """As train.py does: what kind of file is it, which examples, the first batch."""
    kind_of(path)
    how = {
        "skip_bad": rng.random() < 0.5,
        "max_len": rng.choice((0, 2, 64)),
        "template": rng.choice(("world", "plain")),
    }
    if is_rated(path):
        return pack_rated(list(open_rated(path, Words(), **how))[:2])
    return pack(list(open_pairs(path, Words(), ctx_len=16, drop_ties=rng.random() < 0.5, **how))[:2])


def read_text(path: Path, rng: Random) -> Any:
    kind_of(path)
    template = rng.choice(("world", "g1", "plain", "mixed"))
    texts = open_text(path, Words(), ctx_len=rng.choice((0, 5)), template=template, skip_bad=rng.random() < 0.5)
    return pack([texts[index] for index in range(min(3, len(texts)))])


def read_teacher(path: Path, rng: Random) -> Any:
    kind_of(path)
    texts = open_h5(path, VOCAB, ctx_len=rng.choice((0, 5)), teacher=True, skip_bad=rng.random() < 0.5)
    return pack([texts[index] for index in range(min(3, len(texts)))])


def read_binidx(path: Path, rng: Random) -> Any:
    if rng.random() < 0.5:
        return read_text(path, rng)
    slices, _ = open_slices(path, VOCAB, 8, 1)
    return pack([slices[0], slices[len(slices) - 1]])


def read_tasks_of(path: Path, rng: Random) -> Any:
    return read_tasks(path, "world", DataReport(str(path), skip_bad=rng.random() < 0.5))


def read_plan(path: Path, rng: Random) -> Any:
    return read_profile(str(path), 2, lr_init=1e-4, lr_final=1e-5, weight_decay=0.0)


def read_checkpoint(path: Path, rng: Random) -> Any:
    return load_model(path, compute_dtype=torch.float32)


def read_adapter(path: Path, rng: Random) -> Any:
    return load_combined(path.parent / "base.pth", path, compute_dtype=torch.float32)


def read_peft(path: Path, rng: Random) -> Any:
    return from_peft_folder(path, path.parent / "base.pth", path.parent / "written" / "out.pth", "none")


def read_vocabulary(path: Path, rng: Random) -> Any:
    tokenizer = load_tokenizer.__wrapped__(65536, str(path))
    for text in ("abc", "", "\u732b\ud800\0", "ab" * 50):
        ids = tokenizer.encode(text)
        assert all(0 <= number < 65536 for number in ids)
        tokenizer.decode(ids), tokenizer.decode_bytes(ids)


def read_template(path: Path, rng: Random) -> Any:
    form = load_chat_template.__wrapped__(str(path))
    said = [("user", "one"), ("assistant", "first"), ("user", "two")]
    try:
        return form.written(said, ["yes", "no"]), list(form.pieces([*said, ("assistant", "yes")]))
    except ValueError as error:  # the caller adds the place of the row
        raise ValueError(f"{path}:1: {error}") from error


def read_journal(path: Path, rng: Random) -> Any:
    return [pack(batch) for batch in islice(Journal(path, {"teacher": "x"}, 2), 4)]


def read_rejects(path: Path, rng: Random) -> Any:
    cells = [dict(zip(("prompt", "chosen", "reject"), row)) for row in ROWS]
    return RejectFile(path, ["prompt", "chosen", "reject"], {"model": "x"}).resume(cells, rng.random() < 0.3)


def read_scores(path: Path, rng: Random) -> Any:
    return KeptScores(path, "key").finished([1, 2, 1])


def write_cache(folder: Path) -> Path:
    write_atomic({"sums": torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])}, folder / "reference.pth")
    return folder / "reference.pth"


def read_cache(path: Path, rng: Random) -> Any:
    return cached_scores(path, 2)


READERS: dict[str, Reader] = {
    "pairs.csv": Reader(
        lambda d: write_csv(d / "pairs.csv", [("prompt", "chosen", "reject"), *ROWS]), read_pairs, m.CSV
    ),
    "pairs.jsonl": Reader(lambda d: write_json_lines(d / "pairs.jsonl", pair_objects()), read_pairs, m.JSON),
    "pairs.parquet": Reader(lambda d: write_parquet(d / "pairs.parquet", pair_objects()[:4]), read_pairs, m.PARQUET),
    "pairs.save": Reader(write_pair_save, read_pairs, m.TORCH),
    "pairs.h5": Reader(write_pair_h5, read_pairs, m.H5),
    "rated.csv": Reader(
        lambda d: write_csv(d / "rated.csv", [rated_objects()[0], *map(dict.values, rated_objects())]),
        read_pairs,
        m.CSV,
    ),
    "rated.jsonl": Reader(lambda d: write_json_lines(d / "rated.jsonl", rated_objects()), read_pairs, m.JSON),
    "rated.parquet": Reader(lambda d: write_parquet(d / "rated.parquet", rated_objects()), read_pairs, m.PARQUET),
    "text.jsonl": Reader(
        lambda d: write_json_lines(d / "text.jsonl", [{"text": "abc " * n} for n in range(1, 5)]), read_text, m.JSON
    ),
    "chat.jsonl": Reader(
        lambda d: write_json_lines(d / "chat.jsonl", [{"messages": turns("yes")}, {"prompt": "a", "completion": "b"}]),
        read_text,
        m.JSON,
    ),
    "text.txt": Reader(lambda d: write_json_lines(d / "text.txt", [{"plain": "text"}]), read_text, m.TEXT),
    "text.h5": Reader(lambda d: write_documents(d, 0), read_text, m.H5),
    "teacher.h5": Reader(lambda d: write_documents(d, 3), read_teacher, m.H5),
    "binidx": Reader(write_binidx, read_binidx),
    "prompts.csv": Reader(
        lambda d: write_csv(d / "in.csv", [("prompt", "chosen", "reject"), *ROWS]), read_tasks_of, m.CSV
    ),
    "profile.csv": Reader(lambda d: write_profile(d, COLUMNS), read_plan, m.CSV),
    "old profile.csv": Reader(lambda d: write_profile(d, OLD_COLUMNS), read_plan, m.CSV),
    "model.pth": Reader(lambda d: write_checkpoint(d, "model.pth"), read_checkpoint, m.TORCH),
    "model.safetensors": Reader(lambda d: write_checkpoint(d, "model.safetensors"), read_checkpoint, m.SAFETENSORS),
    "adapter and sidecar": Reader(write_adapter, read_adapter, m.TORCH + m.JSON),
    "PEFT folder": Reader(write_peft, read_peft, m.SAFETENSORS + m.JSON),
    "vocab.txt": Reader(write_vocabulary, read_vocabulary, m.TEXT),
    "tokenizer.json": Reader(write_tokenizer, read_vocabulary, m.JSON),
    "chat.jinja": Reader(lambda d: write_template(d, False), read_template, m.JINJA),
    "tokenizer_config.json": Reader(lambda d: write_template(d, True), read_template, m.JINJA + m.JSON),
    "reference cache": Reader(write_cache, read_cache, m.TORCH),
    "teacher's journal": Reader(write_journal, read_journal, repairs=True),
    "rejects.csv": Reader(lambda d: write_rejects(d, ".csv"), read_rejects, m.CSV, repairs=True),
    "rejects.jsonl": Reader(lambda d: write_rejects(d, ".jsonl"), read_rejects, m.JSON, repairs=True),
    "kept scores": Reader(write_scores, read_scores, m.JSON, repairs=True),
}
