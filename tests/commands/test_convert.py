"""convert_data.py: any data becomes the stable form, nothing is lost in silence, nothing is written when it fails."""

import json

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from rwkv_rlhf.commands.convert import main
from tests.support.files import jsonl, read_jsonl
from tests.support.processes import started
from tests.support.shape_samples import SAMPLES


def test_a_file_is_converted(tmp_path, caplog):
    """The output holds a line for each row, and the log says what it was and what was not read."""
    caplog.set_level("INFO")
    sample = SAMPLES["sharegpt"][0]
    path = tmp_path / "in.json"
    path.write_text(json.dumps([sample.row] * 2, indent=1))
    main(["--input", str(path), "--output", str(tmp_path / "out.jsonl")])
    assert read_jsonl(tmp_path / "out.jsonl") == sample.becomes * 2
    assert "ShareGPT conversations (sharegpt), 2 chats of 2 turns" in caplog.text
    assert "2 rows have `id`: not read" in caplog.text and "wrote 2 objects" in caplog.text
    assert "2 rows, 2 examples\n" in caplog.text, "nothing is trained here"


def test_a_dry_run_shows_and_writes_nothing(tmp_path, capsys, caplog):
    """Three rows, long texts cut, and the counts."""
    caplog.set_level("INFO")
    path = jsonl(tmp_path / "in.jsonl", *({"prompt": f"q{n}", "response": "long " * 500} for n in range(5)))
    main(["--input", str(path), "--dry_run"])
    out = capsys.readouterr().out
    assert out.count('"messages"') == 3 and "..." in out and len(out) < 3000
    assert "prompts with a response (response), 5 chats" in caplog.text
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_mistakes_write_nothing(tmp_path):
    """A bad row in the middle, an output that is the input, no output at all."""
    path = jsonl(tmp_path / "in.jsonl", {"prompt": "a", "response": "b"}, {"prompt": "a", "response": ""})
    for output, says in ((tmp_path / "o.jsonl", r"in\.jsonl:2: response is empty"), (path, "is the input file itself")):
        with pytest.raises(ValueError, match=says):
            main(["--input", str(path), "--output", str(output)])
    with pytest.raises(ValueError, match=r"--output OUT\.jsonl is needed"):
        main(["--input", str(path)])
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"] and len(read_jsonl(path)) == 2


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_process_that_imports_nothing_else_reads_columns(tmp_path, suffix):
    """If this breaks, a library's part that another import brought along is missing where a person runs the script."""
    path, table = tmp_path / f"in.{suffix}", pyarrow.table({"text": ["one", "two"]})
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    process = started("convert_data.py", "--input", path, "--output", tmp_path / "out.jsonl", fresh=True)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert read_jsonl(tmp_path / "out.jsonl") == [{"text": "one"}, {"text": "two"}]
