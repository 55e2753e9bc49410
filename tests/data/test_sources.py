"""What a flag that names data stands for: files, folders, patterns, several with weights."""

from collections import Counter
from pathlib import Path

import pytest

from rwkv_rlhf.data.items import read_items
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.sources import fingerprint_of, refuse_sources, sources_of
from rwkv_rlhf.files import fingerprint
from tests.support.files import jsonl


@pytest.fixture
def folder(tmp_path):
    """Two files of data, one of another kind, and one with a comma in its name."""
    jsonl(tmp_path / "a.jsonl", *({"text": f"a{n}"} for n in range(4)))
    jsonl(tmp_path / "b.json", *({"text": f"b{n}"} for n in range(6)))
    jsonl(tmp_path / "c,d.jsonl", {"text": "c"})
    (tmp_path / "notes.log").write_text("not data")
    return tmp_path


def names(spec):
    return [(Path(source.path).name, source.weight) for source in sources_of(spec)]


def test_what_a_name_stands_for(folder):
    """A file whose name holds a comma or brackets is itself; what is not data is left out of a folder."""
    assert names(folder) == [("a.jsonl", 1), ("b.json", 1), ("c,d.jsonl", 1)]
    assert names(f"{folder}/*.json") == [("b.json", 1)]
    assert names(f"{folder}/a.jsonl:2, {folder}/b.json:0.5") == [("a.jsonl", 2), ("b.json", 0.5)]
    assert names(f"{folder}/c,d.jsonl") == [("c,d.jsonl", 1)]
    assert names("corpus") == [("corpus", 1)]  # PREFIX of .bin and .idx, or a file that is not there


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("{0}/*.csv", "no file has a name like this"),
        ("{0}/empty", "holds no file of data"),
        ("{0}/a.jsonl:0", "above 0"),
    ],
)
def test_what_stands_for_nothing(spec, says, folder):
    """An empty pattern must not become an empty run."""
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=says):
        sources_of(spec.format(folder))


def test_weights_repeat_and_thin_out(folder):
    """Twice is every row twice, a half is every second one, 1.5 is half of them twice."""
    spec = f"{folder}/a.jsonl:1.5,{folder}/b.json:0.5"
    report = DataReport(spec)
    counts = Counter(found.item.text for found in read_items(spec, report, ("text",)))
    assert counts == {"a0": 1, "a1": 2, "a2": 1, "a3": 2, "b1": 1, "b3": 1, "b5": 1}
    assert report.rows == 10 and "each used 1.5 times" in report.found[0]


def test_a_resumed_run_knows_its_files(folder):
    """A file that changed behind a pattern is another training; one file is known as it always was."""
    one, spec = str(folder / "a.jsonl"), f"{folder}/*.json*:2"
    assert fingerprint_of(one) == fingerprint(one) and fingerprint_of("") == ""
    before = fingerprint_of(spec)
    jsonl(folder / "b.json", {"text": "other"})
    assert fingerprint_of(spec) != before


def test_an_input_is_not_written_over(folder):
    """Also when it is one of several."""
    with pytest.raises(ValueError, match=r"--output .* is the input file itself"):
        refuse_sources(str(folder), folder / "b.json", "--output")
