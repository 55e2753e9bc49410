"""Every writer of the program: something made up is written, read again, and must be what it was.

WRITERS is the table: name -> a function of an empty folder and a generator. It raises AssertionError where what was
read is something else; a ValueError of one sentence is what a writer may say of what it cannot write.
"""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from rwkv_rlhf.checkpoints.exporters.peft import from_peft, to_peft
from rwkv_rlhf.checkpoints.resume_points import ResumePoints, last_point
from rwkv_rlhf.checkpoints.sidecar import read_sidecar, sidecar_of, write_sidecar
from rwkv_rlhf.checkpoints.tensor_files import read_tensors, write_tensors
from rwkv_rlhf.commands import convert
from rwkv_rlhf.data.batch import PairExample, TextExample, TopK
from rwkv_rlhf.data.opening import open_h5
from rwkv_rlhf.data.pairs.save import read_save, write_save
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.rows import read_rows
from rwkv_rlhf.data.text.binidx import Corpus, write_corpus
from rwkv_rlhf.data.text.h5 import writing
from rwkv_rlhf.data.text.teacher_log import TeacherLog
from rwkv_rlhf.files import read_json_object, write_json
from rwkv_rlhf.generation.reject_file import RejectFile
from rwkv_rlhf.layers.adaptation import Adaptation
from rwkv_rlhf.layers.placing import Layout
from rwkv_rlhf.plan import read_profile
from rwkv_rlhf.plan.writing import profile_text
from rwkv_rlhf.reports.metrics import append_json, read_records
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.command_line import kinds
from rwkv_rlhf.settings.config import Config, settings
from rwkv_rlhf.settings.config_file import config_text, read_config_files
from rwkv_rlhf.settings.field import choices_of
from tests.fuzzing.mutators import odd
from tests.support.shape_samples import SAMPLES

Writer = Callable[[Path, Random], None]
# what cells and names hold that somebody once did not think of
CHARACTERS = "\r\n\t\0\",;'\\\x1b\x85\u2028\u200b\ufeff\U0001f9a2\u4e00e\u0301{}%=@-+ a1"
SURROGATE = "\ud800"
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)


def text(rng: Random, surrogates: bool = True) -> str:
    """A text of up to 40 odd characters, now and then a long one."""
    letters = CHARACTERS + (SURROGATE if surrogates and rng.random() < 0.1 else "")
    return "".join(rng.choices(letters, k=rng.choice((0, 1, 3, 40)))) * rng.choice((1, 1, 1, 500))


def ids(rng: Random, most: int = 256, least: int = 1) -> list[int]:
    return [rng.randrange(1, most) for _ in range(rng.randint(least, 9))]


def as_written(value: str) -> str:
    """What UTF-8 can hold of a text."""
    return value.encode("utf-8", errors="replace").decode()


def rejects(folder: Path, rng: Random, suffix: str) -> None:
    """Rows of reject sampling, cut into two runs, read by the program's reader and by the library's."""
    columns = ["prompt", "chosen", "reject", *(["other column"] if rng.random() < 0.5 else [])]
    rows = [{name: text(rng) for name in columns} for _ in range(rng.randint(1, 5))]
    inputs = [{name: value for name, value in row.items() if name != "reject"} for row in rows]
    path, cut = folder / f"written{suffix}", rng.randint(0, len(rows))
    for begin, end in ((0, cut), (cut, len(rows))):
        file = RejectFile(path, columns, {"model": "x"})
        assert file.resume(inputs, False) == begin
        file.append([file.row(row, row["reject"]) for row in rows[begin:end]])
    expected = [RejectFile(path, columns).row(row, row["reject"]) for row in rows]
    if suffix == ".csv":
        with open(path, newline="", encoding="utf-8") as stream:
            theirs = [dict(zip(columns, cells)) for cells in list(csv.reader(stream, strict=True))[1:]]
    else:
        theirs = [json.loads(line) for line in path.read_text().split("\n") if line]
    assert theirs == expected
    assert [{n: as_written(v) for n, v in row.items()} for row in rows] == expected or suffix == ".csv"
    ours = list(read_rows(path, DataReport(str(path), skip_bad=True)))
    assert len(ours) == len(rows) or any("\0" in v for r in rows for v in r.values())


def conversion(folder: Path, rng: Random) -> None:
    """convert_data.py writes of its own output the same once more."""
    shape = rng.choice(sorted(SAMPLES))
    rows = [json.loads(json.dumps(one.row)) for one in SAMPLES[shape]]
    for row in rows:
        for key, value in row.items():
            if isinstance(value, str) and rng.random() < 0.2:
                row[key] = value + text(rng)
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", errors="surrogatepass")
    once, twice = folder / "written-1.jsonl", folder / "written-2.jsonl"
    convert.main(["--input", str(path), "--output", str(once), "--format", shape, "--skip_bad", "1"])
    convert.main(["--input", str(once), "--output", str(twice)])
    assert once.read_bytes() == twice.read_bytes(), shape


def pair_save(folder: Path, rng: Random) -> None:
    pairs = []
    for _ in range(rng.randint(1, 6)):
        reference = rng.choice((None, (rng.uniform(-90, 0), -1e-30)))
        pairs.append(PairExample(ids(rng), [*ids(rng), 1], [*ids(rng), 2], reference))
    write_save(folder / "written.save", pairs, {"model": None, "template": text(rng), "reference": "sum"})
    found = read_save(folder / "written.save", DataReport("written.save"), 256)
    assert [(p.prompt, p.chosen, p.reject, p.reference) for p in found] == [
        (p.prompt, p.chosen, p.reject, p.reference) for p in pairs
    ]


def documents_of(rng: Random, k: int) -> list[TextExample]:
    found = []
    for _ in range(rng.randint(1, 5)):
        tokens = np.array(ids(rng, least=2))
        mask = np.array([True, *(rng.random() < 0.5 for _ in tokens[1:])]) if rng.random() < 0.5 else None
        top = None
        if k:
            shape = (len(tokens), k)
            values = np.array([rng.uniform(-30, 30) for _ in range(shape[0] * k)], dtype=np.float32).reshape(shape)
            indices = np.array([rng.sample(range(256), k) for _ in tokens])
            top = TopK(values, indices, np.full(len(tokens), rng.uniform(0, 40), dtype=np.float32))
        found.append(TextExample(tokens, mask, top))
    return found


def same_documents(found: list[TextExample], wanted: list[TextExample]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted):
        assert list(one.tokens) == list(other.tokens)
        trained = np.ones(len(other.tokens), bool) if other.mask is None else other.mask
        mine = np.ones(len(one.tokens), bool) if one.mask is None else one.mask
        assert list(mine) == list(trained)
        if other.teacher is not None:
            assert one.teacher is not None and other.teacher.lse is not None and one.teacher.lse is not None
            order = np.argsort(-other.teacher.values, axis=1, kind="stable")
            assert np.array_equal(np.take_along_axis(other.teacher.values, order, 1), -np.sort(-one.teacher.values))
            assert np.array_equal(one.teacher.lse, other.teacher.lse)


def documents(folder: Path, rng: Random) -> None:
    k = rng.choice((0, 0, 1, 3))
    wanted = documents_of(rng, k)
    cut = rng.randint(0, len(wanted))
    with writing(folder / "written.h5", {"vocab_size": 256}, k) as file:
        for part in (wanted[:cut], wanted[cut:]):
            file.add(part)
    texts = open_h5(folder / "written.h5", 256, teacher=bool(k), skip_bad=True)
    trained = [one for one in wanted if one.mask is None or one.mask[1:].any()]
    same_documents([texts[n] for n in range(len(texts))], trained)


def teacher_log(folder: Path, rng: Random) -> None:
    k = rng.choice((1, 2))
    batches = [documents_of(rng, k) for _ in range(rng.randint(1, 3))]
    about = {"teacher": text(rng), "k": k}
    for batch in batches:
        TeacherLog(folder / "written.part", about, k).append(batch)
    found = list(TeacherLog(folder / "written.part", about, k))
    assert len(found) == len(batches)
    for one, other in zip(found, batches):
        same_documents(one, other)


def corpus(folder: Path, rng: Random) -> None:
    vocabulary = rng.choice((256, 65536, 70000))
    wanted = [np.array(ids(rng, vocabulary)) for _ in range(rng.randint(1, 6))]
    order = [rng.randrange(len(wanted)) for _ in range(rng.randint(1, 9))]
    write_corpus(folder / "written", wanted, iter(order), vocabulary)
    found = Corpus(folder / "written", vocabulary)
    assert [list(found.document(n)) for n in range(len(found))] == [list(wanted[n]) for n in order]


def tensor(rng: Random) -> torch.Tensor:
    """Of any type and shape, also empty, transposed, with NaN."""
    kind = rng.choice(TYPES)
    shape = [rng.randint(0, 4) for _ in range(rng.randint(0, 3))]
    made = torch.tensor([rng.uniform(-300, 300) for _ in range(math.prod(shape))]).reshape(shape).to(kind)
    if kind.is_floating_point and made.numel() and rng.random() < 0.2:
        made.reshape(-1)[0] = rng.choice((math.nan, math.inf, -0.0))
    return made.mT if made.dim() >= 2 and rng.random() < 0.3 else made


def same_tensors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        mine, other = (one.contiguous().reshape(-1).view(torch.uint8) for one in (found[name], value))
        assert torch.equal(mine, other), name


def tensors(folder: Path, rng: Random) -> None:
    suffix = rng.choice((".pth", ".safetensors", ".safetensors.index.json"))
    wanted = {f"{name}.{text(rng, False)[:20]}": tensor(rng) for name in ("emb", "blocks.0.att", "x y", "\u4e00")}
    if rng.random() < 0.3:
        wanted["shared"] = wanted[next(iter(wanted))]
    write_tensors(wanted, folder / f"written{suffix}")
    if sum(one.nbytes for one in wanted.values()):
        same_tensors(read_tensors(folder / f"written{suffix}"), wanted)


def sidecar(folder: Path, rng: Random) -> None:
    adapted = {}
    for n in range(rng.randint(0, 4)):
        mode, rank = rng.choice(sorted(tables.ADAPTERS)), rng.choice((1, 7, 10**6))
        adapted[f"blocks.{n}.att.key"] = Adaptation.make(
            mode, rank, rng.choice((1e-300, 32.0, 1e30)), rng.choice((0.0, 0.5)), rslora=rng.random() < 0.5
        )
    layout = Layout(adapted, frozenset(adapted) if rng.random() < 0.5 else frozenset(), frozenset(), "nf4")
    wanted = sidecar_of("x070", layout, None, None)
    torch.save({"a": torch.ones(2)}, folder / "written.pth")
    write_sidecar(wanted, folder / "written.pth")
    found = read_sidecar(folder / "written.pth")
    assert found is not None and found.adapted == wanted.adapted and found.packed == wanted.packed


def branch(rng: Random, depth: int = 0) -> Any:
    """A part of an optimizer's state: tensors, numbers, texts, lists, tuples, dicts with keys of two kinds."""
    kinds: list[Callable[[], Any]] = [
        *(lambda: tensor(rng), lambda: rng.randint(-(2**70), 2**70), lambda: rng.uniform(-1e308, 1e308)),
        *(lambda: text(rng), lambda: rng.choice((None, True, False, math.inf, -math.inf))),
    ]
    if depth < 3:
        kinds += [
            lambda: [branch(rng, depth + 1) for _ in range(rng.randint(0, 3))],
            lambda: tuple(branch(rng, depth + 1) for _ in range(rng.randint(0, 3))),
            lambda: {rng.choice((n, text(rng))): branch(rng, depth + 1) for n in range(rng.randint(0, 3))},
        ]
    return rng.choice(kinds)()


def same_tree(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted), (type(found), type(wanted))
    if isinstance(wanted, torch.Tensor):
        same_tensors({"": found}, {"": wanted})
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key, value in wanted.items():
            same_tree(found[key], value)
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted):
            same_tree(one, other)
    else:
        assert found == wanted


def resume_point(folder: Path, rng: Random) -> None:
    about = {"seed": 1, "note": text(rng)}
    points = ResumePoints(folder / "written", about)
    for step in range(1, rng.randint(2, 4)):
        tree = {"weights": branch(rng), "optimizer": [branch(rng) for _ in range(3)]}
        points.write({"step": step, "epoch": 0, "done": step}, tree)
    point = last_point(folder / "written")
    assert point is not None and point.about["step"] == step and point.about["note"] == about["note"]
    same_tree(point.read(0), tree)


def metrics(folder: Path, rng: Random) -> None:
    records = [{"event": "train", "loss": odd(rng), text(rng): odd(rng)} for _ in range(3)]
    for number, record in enumerate(records):
        append_json(folder / "written.jsonl", record | {"number": number})
    lines = (folder / "written.jsonl").read_text().splitlines()
    strict = [json.loads(line, parse_constant=refused) for line in lines]
    assert [one["number"] for one in strict] == [0, 1, 2]
    assert [one["number"] for one in read_records(folder / "written.jsonl", "train")] == [0, 1, 2]


def refused(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def json_object(folder: Path, rng: Random) -> None:
    wanted = {"a": text(rng), "b": odd(rng)}
    try:
        json.dumps(wanted, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return
    write_json(folder / "written.json", wanted)
    assert read_json_object(folder / "written.json") == wanted


def run_file(folder: Path, rng: Random) -> None:
    """What a run writes down of itself as config.yaml, read again by --config."""
    known, types = settings(), kinds()
    words: dict[str, Any] = {}
    for name in rng.sample(sorted(known), 8):
        field, kind = known[name], types[name]
        choices = [one for one in choices_of(field) if one != ""]
        if name == "loss":
            words[name] = rng.choice(sorted(tables.LOSSES))
        elif choices:
            words[name] = rng.choice(choices)
        elif kind is str:
            words[name] = text(rng) or "x"
        elif kind is bool:
            words[name] = rng.random() < 0.5
        else:
            words[name] = kind(rng.choice((1, 2, 7, 0.5, 1e-5, 1e300, 3e-7)))
    words = {name: value for name, value in words.items() if name not in ("resume", "force", "archive", "debug")}
    path = folder / "written.yaml"
    path.write_text(config_text(Config(**words, given=frozenset(words))), encoding="utf-8", errors="surrogateescape")
    found = read_config_files([str(path)], types)
    for name, value in words.items():
        assert found.get(name) == value, (name, value, found.get(name))


def profile(folder: Path, rng: Random) -> None:
    kind = rng.choice((*sorted(tables.ADAPTERS), "full"))
    layers, rank = rng.randint(1, 40), rng.choice((1, 8, 64))
    rates = {"lr_init": rng.choice((1e-3, 2e-5, 1e-9)), "lr_final": rng.choice((1e-6, 3e-12))}
    (folder / "written.csv").write_text(profile_text(kind, layers, rank=rank, dropout=0.25, **rates))
    plan = read_profile(str(folder / "written.csv"), layers, lr_init=9, lr_final=9, weight_decay=9)
    for n in range(layers):
        row = plan.rows[str(n)]
        assert (row.mode, row.lr_init, row.lr_final) == (kind, rates["lr_init"], rates["lr_final"])
        assert row.rank == (rank if kind != "full" else 0)


def peft_adapter(folder: Path, rng: Random) -> None:
    mode = rng.choice(("lora", "dora"))
    adapted, wanted = {}, {}
    for n in range(rng.randint(1, 3)):
        rank, name = rng.choice((1, 2, 5)), f"blocks.{n}.att.key"
        adapted[name] = Adaptation.make(mode, rank, rng.choice((1.0, 8.0, 3e5)), 0.0)
        wanted |= {f"{name}.lora_A": torch.rand(rank, 6), f"{name}.lora_B": torch.rand(4, rank)}
        if mode == "dora":
            wanted[f"{name}.lora_M"] = torch.rand(4)
    theirs = to_peft(wanted, adapted)
    write_tensors(theirs.tensors, folder / "written.safetensors")
    write_json(folder / "written.json", theirs.config)
    found = from_peft(read_tensors(folder / "written.safetensors"), read_json_object(folder / "written.json"))
    same_tensors(found.tensors, wanted)
    for name, how in adapted.items():
        mine = found.adapted[name]
        assert (mine.mode, mine.rank) == (how.mode, how.rank) and math.isclose(mine.scaling, how.scaling)


def parquet_through(folder: Path, rng: Random) -> None:
    """Columns of every type that parquet has come through the reject sampler's input and output."""
    from rwkv_rlhf.generation.rejects import read_tasks

    columns = {"prompt": ["say a", "say b"], "chosen": [as_written(text(rng)) + "x", "yes"]}
    table = pyarrow.table(columns)
    for n, kind in enumerate(rng.sample(PARQUET, 3)):
        table = table.append_column(f"c{n}", pyarrow.array(kind[1], kind[0]))
    with open(folder / "in.parquet", "wb") as stream:
        pyarrow.parquet.write_table(table, stream)
    names, tasks = read_tasks(str(folder / "in.parquet"), "plain", DataReport("in.parquet"))
    for suffix in (".jsonl", ".csv"):
        file = RejectFile(folder / f"written{suffix}", names, {})
        cells = [task.cells for task in tasks]
        assert file.resume(cells, False) == 0
        file.append([file.row(row, "no") for row in cells])
        assert file.resume(cells, False) == len(cells) == 2


PARQUET: list[tuple[Any, list[Any]]] = [
    (pyarrow.timestamp("us", "UTC"), [0, None]),
    (pyarrow.date32(), [1, 2]),
    (pyarrow.time64("us"), [1, None]),
    (pyarrow.duration("s"), [1, 2]),
    (pyarrow.decimal128(20, 3), [None, None]),
    (pyarrow.binary(), [b"\xff\0", b""]),
    (pyarrow.list_(pyarrow.float32()), [[1.5, math.nan], None]),
    (pyarrow.struct([("a", pyarrow.int64())]), [{"a": 2**60}, None]),
    (pyarrow.map_(pyarrow.string(), pyarrow.int8()), [[("a", 1)], []]),
    (pyarrow.null(), [None, None]),
    (pyarrow.bool_(), [True, None]),
    (pyarrow.float64(), [math.inf, -0.0]),
    (pyarrow.uint64(), [2**64 - 1, 0]),
]

WRITERS: dict[str, Writer] = {
    "rejects.csv": lambda folder, rng: rejects(folder, rng, ".csv"),
    "rejects.jsonl": lambda folder, rng: rejects(folder, rng, ".jsonl"),
    "columns of parquet": parquet_through,
    "convert_data.py": conversion,
    "pairs.save": pair_save,
    "documents.h5": documents,
    "teacher's log": teacher_log,
    "binidx": corpus,
    "tensors": tensors,
    "sidecar": sidecar,
    "resume point": resume_point,
    "metrics.jsonl": metrics,
    "JSON": json_object,
    "config.yaml": run_file,
    "layer profile": profile,
    "PEFT adapter": peft_adapter,
}
