"""Every format in the table: a sample of it becomes a batch with every token in its place."""

import json

import numpy as np
import pytest

from rwkv_rlhf.data.batch import IGNORE, PairBatch, PairExample, TextExample
from rwkv_rlhf.data.opening import kind_of, open_pairs, open_text
from rwkv_rlhf.data.pairs.save import write_save
from rwkv_rlhf.data.sampler import Sequential, Steps
from rwkv_rlhf.data.text.binidx import write_corpus
from rwkv_rlhf.data.text.h5 import writing
from rwkv_rlhf.data.tokenizer import load_tokenizer
from rwkv_rlhf.settings.formats import FORMATS
from tests.support.files import jsonl

PAIR = {"prompt": "Hi", "chosen": "Hello.", "reject": "Go away."}
IDS = ("User: Hi\n\nAssistant:", " Hello.\n\n", " Go away.\n\n")


def in_columns(path, row):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({key: [value] for key, value in row.items()})
    if path.suffix == ".parquet":
        return parquet.write_table(table, path)
    return pytest.importorskip("pyarrow.feather").write_feather(table, str(path))


def in_cells(path, row):
    mark = {".csv": ",", ".tsv": "\t"}[path.suffix]
    path.write_text("".join(mark.join(line) + "\n" for line in (row, row.values())))


# formats whose files are rows -> who writes one of one row
ROWS = {
    "csv": in_cells,
    "tsv": in_cells,
    "jsonl": lambda path, row: path.write_text(json.dumps(row) + "\n"),
    "parquet": in_columns,
    "arrow": in_columns,
}


def pair_sample(name, path, world):
    if name in ROWS:
        ROWS[name](path, PAIR)
    elif name == "save":
        write_save(path, [PairExample(*map(world.encode, IDS))], {})
    elif name == "h5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            for part, text in zip(("prompttokens", "chosentokens", "rejecttokens"), IDS):
                file.create_dataset(part, (1,), h5py.vlen_dtype(np.int64))[0] = world.encode(text)
    else:
        pytest.fail(f"give this test a sample of the format {name}")


def text_sample(name, path, world):
    if name in ROWS:
        ROWS[name](path, {"text": "one two"})
    elif name == "txt":
        path.write_text("one two")
    elif name == "binidx":
        write_corpus(path, [np.array([*world.encode("one two"), 0])], iter([0]), 65536)
    elif name == "h5":
        with writing(path, {}) as out:
            out.add([TextExample(np.array([*world.encode("one two"), 0]))])
    else:
        pytest.fail(f"give this test a sample of the format {name}")


@pytest.mark.parametrize("name", [name for name, facts in FORMATS.items() if "pairs" in facts.holds])
def test_pairs_of_every_format(name, tmp_path):
    """The same pair from any file gives the same batch."""
    world, path = load_tokenizer(65536), tmp_path / f"a.{name}"
    pair_sample(name, path, world)
    assert kind_of(path) == "pairs"
    pairs = open_pairs(path, world, ctx_len=64)
    batch = Steps(pairs, Sequential(len(pairs)), 2, 3).micro_batch(1)
    prompt, chosen, reject = map(world.encode, IDS)
    assert isinstance(batch, PairBatch)
    assert batch.prompts.tolist() == prompt[:-1] * 2
    assert batch.targets.tolist() == (chosen + reject) * 2
    assert (batch.reference, batch.total) == (None, 6.0)


@pytest.mark.parametrize("name", [name for name, facts in FORMATS.items() if "text" in facts.holds])
def test_text_of_every_format(name, tmp_path):
    """The same document from any file gives the same batch, end of document included."""
    world, path = load_tokenizer(65536), tmp_path / ("a" if name == "binidx" else f"a.{name}")
    text_sample(name, path, world)
    assert kind_of(path) == "text"
    texts = open_text(path, world, ctx_len=64)
    batch = Steps(texts, Sequential(len(texts)), 1, 1).micro_batch(7)
    ids = [*world.encode("one two"), 0]
    assert (batch.tokens.tolist(), batch.targets.tolist()) == (ids[:-1], ids[1:])
    assert IGNORE not in batch.targets.tolist()
    assert batch.starts.tolist() == [0, len(ids) - 1]


def test_what_a_file_holds(tmp_path):
    """train.py and --val_file take any format: a file with rows tells by its first row."""
    assert FORMATS["jsonl"].holds == ("text", "pairs", "rated")
    assert FORMATS["csv"].holds == ("text", "pairs", "rated") and FORMATS["save"].holds == ("pairs",)
    assert kind_of("a.save") == "pairs"
    (tmp_path / "a.csv").write_text("Instruction,output\nx,y\n")
    assert kind_of(tmp_path / "a.csv") == "text"
    assert kind_of("a.txt") == kind_of("corpus", "binidx") == "text"
    assert kind_of(jsonl(tmp_path / "a.jsonl", {"text": "x"})) == "text"
    assert kind_of(jsonl(tmp_path / "b.jsonl", {"Question": "x", "chosen": "y", "rejected": "z"})) == "pairs"
    with pytest.raises(ValueError, match="no text that can be read"):
        kind_of("a.docx")
