"""Every shape of the table: what its rows become, that what is written is read again, and what is said of mistakes."""

import json

import pytest

from rwkv_rlhf.data.items import Reading, read_items
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.shapes.stable import stable_form
from rwkv_rlhf.settings.shapes import KINDS, SHAPES
from tests.support.files import jsonl
from tests.support.shape_samples import SAMPLES, WRONG

GOOD = [(shape, number) for shape, samples in SAMPLES.items() for number in range(len(samples))]
BAD = [(shape, number) for shape, mistakes in WRONG.items() for number in range(len(mistakes))]


def forms(path, shape="", kinds=tuple(KINDS), skip_bad=False):
    report = DataReport(str(path), skip_bad=skip_bad)
    return [stable_form(found.item) for found in read_items(path, report, kinds, Reading(shape))], report


def test_every_shape_has_samples():
    """A shape that nobody wrote down by hand may be read in any way."""
    assert SAMPLES.keys() == WRONG.keys() == SHAPES.keys()


@pytest.mark.parametrize(("shape", "number"), GOOD)
def test_a_row_becomes_what_it_says(tmp_path, shape, number):
    """Recognised and with --format the same, said by name; what convert_data.py writes of it is read as the same."""
    sample = SAMPLES[shape][number]
    found, report = forms(jsonl(tmp_path / "a.jsonl", sample.row))
    assert found == sample.becomes
    assert f"({shape})" in report.found[0]
    assert forms(tmp_path / "a.jsonl", shape)[0] == sample.becomes
    if shape != "prompt":  # prompts are written as chats that nobody answered
        kinds = [SHAPES[shape].kind]
        assert forms(jsonl(tmp_path / "b.jsonl", *sample.becomes), kinds=kinds)[0] == sample.becomes


@pytest.mark.parametrize(("shape", "number"), BAD)
def test_one_thing_wrong(tmp_path, shape, number):
    """One sentence with file and line; with --skip_bad 1 a count, and the rows around it are kept."""
    good, wrong = SAMPLES[shape][0], WRONG[shape][number]
    path = jsonl(tmp_path / "a.jsonl", good.row, wrong.row, good.row)
    with pytest.raises(ValueError) as mistake:
        forms(path)
    assert f"{path}:2: " in str(mistake.value) and wrong.says in str(mistake.value)
    found, report = forms(path, skip_bad=True)
    assert found == good.becomes * 2 and (report.rows, report.skipped.total()) == (3, 1)


def test_rows_of_two_shapes_in_one_file(tmp_path):
    """A file put together from two is named with its row; our own forms may be mixed, as before."""
    path = jsonl(tmp_path / "a.jsonl", SAMPLES["alpaca"][0].row, SAMPLES["sharegpt"][0].row)
    with pytest.raises(ValueError, match=r"a\.jsonl:2: .*ShareGPT conversations, the file began with Alpaca"):
        forms(path)
    ours = jsonl(tmp_path / "b.jsonl", {"text": "a"}, SAMPLES["messages"][0].row, SAMPLES["completion"][0].row)
    assert len(forms(ours)[0]) == 3


def test_a_shape_of_another_kind_says_where_it_belongs(tmp_path):
    """Pairs given as text to learn are a mistake of the flag, not of the file."""
    path = jsonl(tmp_path / "a.jsonl", SAMPLES["preference"][0].row)
    with pytest.raises(
        ValueError, match=r"preference pairs \(preference\).*train\.py takes such rows as --rlhf_train_file"
    ):
        forms(path, kinds=("text",))


def test_what_was_recognised_and_what_was_not_read_is_said_once(tmp_path):
    """If this breaks, a column that matters is dropped in silence."""
    rows = [{**SAMPLES["sharegpt"][0].row, "margin": 1.5, "source": None} for _ in range(3)]
    _, report = forms(jsonl(tmp_path / "a.jsonl", *rows))
    said = [line.removeprefix(f"{tmp_path}/a.jsonl: ") for line in report.found]
    assert said == [
        "ShareGPT conversations (sharegpt), 3 chats of 2 turns",
        "3 rows have `id`: not read",
        "3 rows have `margin`: not read",
    ]
    assert all(line in "\n".join(report.lines()) for line in said)


def test_prompts_with_lines_of_speakers_are_said(tmp_path):
    """A prompt that is nearly a transcript is trained as it stands, with one warning that shows it."""
    odd = "Please go on. \nUser: this is inside"
    rows = [{"prompt": odd, "completion": "x"}, {"prompt": "Human: a\n\nAssistant:", "completion": "y"}]
    found, report = forms(jsonl(tmp_path / "a.jsonl", *rows))
    assert [form["messages"][0]["content"] for form in found] == ["Please go on. \nUser: this is inside", "a"]
    text = "\n".join(report.found)
    assert "1 row has lines like `User:` inside prompt without being transcripts" in text and repr(odd) in text
    assert "1 row had the speakers' names in prompt: split into turns" in text


def test_thinking_can_be_dropped(tmp_path):
    """--thinking drop leaves the answers alone and counts what it took away."""
    path = jsonl(tmp_path / "a.jsonl", SAMPLES["messages"][3].row)
    report = DataReport(str(path))
    found = [stable_form(f.item) for f in read_items(path, report, ("text",), Reading(drop_thinking=True))]
    assert "thinking" not in json.dumps(found) and "two and two" not in json.dumps(found)
    assert any("1 row had thinking that was dropped" in line for line in report.found)
