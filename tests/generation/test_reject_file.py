"""The output of sampling reads back as it was written, whatever characters the cells hold."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_rlhf.data.csv_rows import read_csv
from rwkv_rlhf.data.json_rows import read_jsonl
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.generation.reject_file import CsvRows, JsonRows

COLUMNS = ["prompt", "chosen", "reject"]
# every character, halves of surrogate pairs too, and often those that mean something in a CSV
CELLS = st.text(st.one_of(st.characters(exclude_categories=()), st.sampled_from('\r\n\0",; \t\ufeff\u2028\ud800x')))
ROWS = st.lists(st.fixed_dictionaries(dict.fromkeys(COLUMNS, CELLS)), min_size=1, max_size=4)


def written(rows, cells):
    """The bytes of a finished file, and the rows as they must read back."""
    kept = [rows.row(one) for one in cells]
    return rows.head() + b"".join(map(rows.encode, kept)), kept


@pytest.mark.parametrize(("form", "read"), [(CsvRows, read_csv), (JsonRows, read_jsonl)])
def test_any_cell_reads_back(form, read, tmp_path):
    """If this breaks, a row that was sampled is two rows of the next script, or a stopped file is lost."""

    @settings(max_examples=300, deadline=None)
    @given(ROWS)
    def check(cells):
        rows = form(COLUMNS)
        data, kept = written(rows, cells)
        assert rows.decode(data) == kept
        records = io.BytesIO(data)
        found = [rows.framing.read(records) for _ in range(len(kept) + bool(rows.head()) + 1)]
        assert b"".join(record for record in found if record is not None) == data and found[-1] is None
        (tmp_path / "a").write_bytes(data)
        report = DataReport("a")
        assert [row.record for row in read(tmp_path / "a", report, tuple((name,) for name in COLUMNS))] == kept

    check()


def test_a_lone_carriage_return_is_one_cell():
    """The case that was reported: two rows became three."""
    rows = CsvRows(COLUMNS)
    row = {"prompt": "First line", "chosen": "Second line\rmore", "reject": "no"}
    data, kept = written(rows, [row])
    assert kept == [row] and data == b'prompt,chosen,reject\nFirst line,"Second line\rmore",no\n'
