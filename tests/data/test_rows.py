"""Files with records: all ways of writing them give the same rows, what is broken is named by line, memory is flat."""

import gzip
import json
import tracemalloc

import pytest

from rwkv_rlhf.data.items import read_items
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.rows import read_rows
from rwkv_rlhf.data.shapes.record import Document
from tests.support.files import jsonl

ROWS = [{"prompt": f"question {number} \u00e9", "completion": "one\ntwo"} for number in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
COLUMNS = {key: [row[key] for row in ROWS] for key in ROWS[0]}


def table():
    return pytest.importorskip("pyarrow").table(COLUMNS)


def cells(mark, end):
    return f"prompt{mark}completion{end}" + "".join(f'{r["prompt"]}{mark}"{r["completion"]}"{end}' for r in ROWS)


def write_parquet(path):
    data = table()  # skips without pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(data, path)


def write_arrow(path):
    data = table()
    import pyarrow

    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, data.schema) as out:
        out.write_table(data)


def write_feather(path):
    data = table()
    import pyarrow.feather

    pyarrow.feather.write_feather(data, str(path))


def write_zst(path):
    path.write_bytes(pytest.importorskip("pyarrow").compress(LINES.encode(), codec="zstd", asbytes=True))


FILES = {
    "lines.jsonl": lambda path: path.write_text(LINES),
    "lines.json": lambda path: path.write_text(LINES),
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode()),
    "array.json": lambda path: path.write_text(json.dumps(ROWS)),
    "pretty.json": lambda path: path.write_text("\ufeff" + json.dumps(ROWS, indent=2, ensure_ascii=False)),
    "array.jsonl": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "below.json": lambda path: path.write_text("\n".join(json.dumps(row, indent=1) for row in ROWS)),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "a.json.zst": write_zst,
    "a.csv": lambda path: path.write_bytes(cells(",", "\r\n").encode()),
    "excel.csv": lambda path: path.write_bytes(b"\xef\xbb\xbf" + cells(";", "\r\n").encode()),
    "a.tsv": lambda path: path.write_text(cells("\t", "\n")),
    "a.csv.gz": lambda path: path.write_bytes(gzip.compress(cells(",", "\n").encode())),
    "a.parquet": write_parquet,
    "a.arrow": write_arrow,
    "a.feather": write_feather,
}


@pytest.mark.parametrize("name", FILES)
def test_the_same_rows_from_any_file(name, tmp_path):
    """Nobody has to convert a file of records into another one."""
    FILES[name](tmp_path / name)
    report = DataReport("")
    assert [row.record for row in read_rows(tmp_path / name, report)] == ROWS
    assert report.rows == len(ROWS)


def test_folders_of_the_datasets_library(tmp_path):
    """What save_to_disk wrote is read without that library; of several splits the one for training, by default."""
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "both")
    datasets.DatasetDict({"test": data, "dev": data}).save_to_disk(tmp_path / "odd")
    for folder, rows in (("one", ROWS), ("both", ROWS), ("both/test", ROWS[1:2])):
        assert [row.record for row in read_rows(tmp_path / folder, DataReport(""))] == rows
    with pytest.raises(ValueError, match=r"odd: name one of its splits: .*odd/dev, .*odd/test"):
        list(read_rows(tmp_path / "odd", DataReport("")))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"text": "a"}\n{"text": }\n', r"a\.json:2: not a JSON object"),
        ('[{"text": "a"}\n{"text": "b"}]', r"a\.json:1 \(element 1\): .*a comma is missing behind it"),
        ('[{"text": "a"},\n {"text": "b', r"a\.json:2 \(element 2\): not a JSON object \(Unterminated string"),
        ('[{"text": "a"},\n {"text": "b"}', r"a\.json:2: the array is not closed: the file is cut off"),
        ('[{"text": "a"},\n{"text":\n nonsense}]', r"a\.json:2 \(element 2\): .*, line 3"),
        ("[1]", r"a\.json:1 \(element 1\): a JSON object is needed, this is a int"),
        ('[{"text": "a\udcff"}]', r"a\.json:1 \(element 1\): byte 0xff is not UTF-8"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\n", r"a\.json is a Git LFS pointer"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_json(text, says, tmp_path):
    """One sentence with the line, whatever way the objects are written."""
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=says):
        list(read_items(tmp_path / "a.json", DataReport(""), ("text",)))


def test_what_stands_before_the_break_is_kept(tmp_path):
    """--skip_bad 1 on a file that was cut off keeps all whole rows and counts the rest."""
    whole = '[{"text": "a"},\n{"text": "b"}'
    for text, reason in ((whole, "cut off"), (whole + ',\n{"text": ', "unreadable, and what follows it in the array")):
        (tmp_path / "a.json").write_text(text)
        report = DataReport("", skip_bad=True)
        found = [row.item for row in read_items(tmp_path / "a.json", report, ("text",))]
        assert found == [Document("a"), Document("b")] and list(report.skipped) == [reason]


CELLS = {
    '[{"role": "assistant", "content": "a"}]': True,
    "[{'role': 'assistant', 'content': 'a'}]": True,
    '[{"role": "assistant"': False,
    "[{'role': x}]": False,
    "[see] {role}": True,
}


@pytest.mark.parametrize(("cell", "good"), CELLS.items())
def test_messages_in_cells(cell, good, tmp_path):
    """A spreadsheet holds messages as JSON, or as pandas writes them; text that only looks a little like it is text."""
    quoted = cell.replace('"', '""')
    (tmp_path / "a.csv").write_text(f'prompt,chosen,rejected\nx,"{quoted}",b\n')
    if not good:
        with pytest.raises(ValueError, match=r"a\.csv:2 \(row 1\): the cell chosen begins like a list of messages"):
            list(read_items(tmp_path / "a.csv", DataReport(""), ("pairs",)))
        return
    (found,) = read_items(tmp_path / "a.csv", DataReport(""), ("pairs",))
    assert found.item.chosen == ("a" if "assistant" in cell else cell)


def test_a_lone_carriage_return_in_a_cell(tmp_path):
    """Old spreadsheets write one for a line break: it does not end the row."""
    (tmp_path / "a.csv").write_bytes(b'prompt,chosen,rejected\r\n"a\rb",c,d\r\n')
    (found,) = read_items(tmp_path / "a.csv", DataReport(""), ("pairs",))
    assert found.item.turns[0].text == "a\nb"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_memory_does_not_grow_with_the_file(name, tmp_path):
    """A corpus on one line, or with more rows than fit into memory, is read like a small one."""
    rows, path = 24_000, tmp_path / name
    text = "x" * 500
    with open(path, "w") as file:
        if name == "a.csv":
            file.write("text\n" + f"{text}\n" * rows)
        else:
            mark, ends = (", ", "[]") if name == "a.json" else ("\n", "  ")
            file.write(ends[0] + mark.join([json.dumps({"text": text})] * rows) + ends[1])
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_rows(path, DataReport("")))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == rows and peak < path.stat().st_size / 1.5


def test_packed_files_that_are_damaged(tmp_path):
    """A download that broke off is called that."""
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode() * 50)[:-40])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: not a readable \.gz file"):
        list(read_rows(tmp_path / "a.jsonl.gz", DataReport("")))


def test_rows_of_a_table_with_gaps(tmp_path):
    """NaN, null, white space and nothing are the same: an answer that is missing, a system text that is not there."""
    gaps = [float("nan"), None, " ", "NaN", ""]
    chats = jsonl(tmp_path / "a.jsonl", *({"prompt": "a", "completion": "b", "system": gap} for gap in gaps))
    assert {len(found.item.turns) for found in read_items(chats, DataReport(""), ("text",))} == {2}
    pairs = jsonl(tmp_path / "b.jsonl", *({"prompt": "a", "chosen": "b", "rejected": gap} for gap in gaps))
    report = DataReport("", skip_bad=True)
    assert not list(read_items(pairs, report, ("pairs",))) and report.skipped.total() == len(gaps)
