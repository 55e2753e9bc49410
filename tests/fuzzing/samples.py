"""A whole sample of every kind of file that the program reads, written by the program where it writes that kind."""

import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save_file

from rwkv_rlhf.checkpoints.adapter_files import open_adapter
from rwkv_rlhf.checkpoints.exporters.peft import to_peft_folder
from rwkv_rlhf.checkpoints.hf_layout import hf_name, hf_tensor
from rwkv_rlhf.checkpoints.resume_points import ResumePoints
from rwkv_rlhf.checkpoints.shards import write_sharded
from rwkv_rlhf.checkpoints.sidecar import sidecar_of, write_sidecar
from rwkv_rlhf.checkpoints.tensor_files import write_tensors
from rwkv_rlhf.data.batch import PairExample, TextExample, TopK
from rwkv_rlhf.data.pairs.save import write_save
from rwkv_rlhf.data.text.binidx import write_corpus
from rwkv_rlhf.data.text.h5 import writing
from rwkv_rlhf.data.text.teacher_log import TeacherLog
from rwkv_rlhf.generation.reject_file import RejectFile
from rwkv_rlhf.layers.adaptation import Adaptation
from rwkv_rlhf.layers.placing import Layout
from rwkv_rlhf.model.initial import initial_tensors
from tests.support.shape_samples import SAMPLES

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
    if name.endswith(".index.json"):
        write_sharded(tensors, folder / name, shard_size=20_000)
    elif name.endswith(".safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)
    return folder / name


def write_hf_folder(folder: Path) -> Path:
    (folder / "hf").mkdir()
    theirs = {hf_name(name): hf_tensor(name, tensor).contiguous() for name, tensor in base_tensors().items()}
    theirs.pop("", None)
    save_file(theirs, folder / "hf" / "model.safetensors")
    return folder / "hf"


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
    write_tensors(tensors, path)
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


SHAPES = {  # suffix -> shapes that one file may hold together
    ".jsonl": ("text", "messages", "completion"),
    ".json": ("rated",),
    ".jsonl.gz": ("preference",),
    ".jsonl.zst": ("ranked",),
}


def write_shapes(folder: Path, suffix: str) -> Path:
    """Rows of shapes that the program knows."""
    rows = [one.row for shape in SHAPES.get(suffix, ()) for one in SAMPLES[shape]]
    path = folder / f"shapes{suffix}"
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix in (".csv", ".tsv"):
        chosen = [{"system": "be kind", "question": text, "chosen": "yes", "rejected": "no"} for text in "abc"]
        write_csv(path, [list(chosen[0]), *map(dict.values, chosen)])
        if suffix == ".tsv":
            path.write_bytes(path.read_bytes().replace(b",", b"\t"))
    elif suffix == ".parquet":
        write_parquet(path, [{"messages": turns("yes"), "id": n, "tools": None} for n in range(3)])
    elif suffix.endswith(".gz"):
        path.write_bytes(gzip.compress(lines, mtime=0))
    elif suffix.endswith(".zst"):
        path.write_bytes(pyarrow.compress(lines, "zstd", asbytes=True))
    else:
        path.write_bytes(lines)
    return path


def write_reward_file(folder: Path) -> Path:
    """Two functions as a user writes them."""
    (folder / "rewards.py").write_text(
        "def exact(prompts, completions, answer, **columns):\n"
        "    return [float(text == right) for text, right in zip(completions, answer)]\n\n\n"
        "def short(completion_ids, **columns):\n    return [-len(ids) / 10 for ids in completion_ids]\n"
    )
    return folder / "rewards.py"


def write_run_file(folder: Path) -> Path:
    """Settings of a run."""
    lines = ("load_model: base.pth", "loss: dpo", "pair_file: pairs.csv", "lr_init: 1e-5", "micro_bsz: 4", "peft: lora")
    (folder / "run.yaml").write_text(
        "# a run\n" + "\n".join((*lines, "lora_r: 8", "bptt: exact", "infctx: true")) + "\n"
    )
    return folder / "run.yaml"


def write_vocabulary(folder: Path) -> Path:
    path = folder / "vocab.txt"
    words = [bytes([n]) for n in range(256)]
    path.write_text("".join(f"{n + 1} {word!r} 1\n" for n, word in enumerate(words)) + "257 'ab' 2\n258 '\u732b' 3\n")
    return path


def write_tokenizer(folder: Path) -> Path:
    import tokenizers

    words = tokenizers.models.BPE({"<|end|>": 0, "a": 1, "b": 2, "ab": 3, "<unk>": 4}, [("a", "b")], unk_token="<unk>")
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
    journal = TeacherLog(folder / "work.part", {"teacher": "x"}, 2)
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


def write_cache(folder: Path) -> Path:
    write_tensors({"sums": torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])}, folder / "reference.pth")
    return folder / "reference.pth"


def write_point(folder: Path) -> Path:
    tree = {"weights": {"a": torch.ones(4), "b": torch.zeros(2, 3)}, "optimizer": [{"step": 3, 7: None}, (0.5, "text")]}
    return ResumePoints(folder / "resume", {"seed": 1}).write({"step": 3, "epoch": 0, "done": 6}, tree)
