"""Preference pairs from CSV, JSONL and parquet: text, templates, caps, and mistakes named by file and line."""

import json
from collections import Counter

import pytest

from rwkv_rlhf.data.batch import PairExample
from rwkv_rlhf.data.conversation import Turn
from rwkv_rlhf.data.items import Reading
from rwkv_rlhf.data.pairs.dataset import open_pairs
from rwkv_rlhf.data.pairs.text_pairs import read_pairs
from rwkv_rlhf.data.pairs.tokenising import PairOptions, PairTokeniser
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.templates.template import TEMPLATES, WORLD

SPARE = Reading(spare_reject=True)
GOOD = "prompt,chosen,reject\nHi,Hello.,Go away.\n"


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def rows(path, **options):
    report = DataReport(str(path), skip_bad=options.pop("skip_bad", False))
    return list(read_pairs(path, report, **options)), report


def test_pair_of_the_world_template(tmp_path, world):
    """Ids written by hand: what the tradition's files hold for this row."""
    pairs = open_pairs(write(tmp_path / "a.csv", GOOD), world)
    text = [world.decode(part) for part in (pairs[0].prompt, pairs[0].chosen, pairs[0].reject)]
    assert text == ["User: Hi\n\nAssistant:", " Hello.\n\n", " Go away.\n\n"]
    assert pairs[0].prompt == [24281, 59, *world.encode(" Hi"), 261, *world.encode("Assistant"), 59]
    assert pairs[0].chosen[-1] == world.encode(".\n\n")[-1]
    assert pairs[0].reference is None
    assert (len(pairs), pairs.trained(0), pairs.report.examples) == (1, 1, 1)


def test_csv_as_spreadsheets_write_it(tmp_path):
    """A BOM, other cases, the alias, extra columns, quoted commas, quotes and line breaks, CRLF, blank lines."""
    text = '\ufeffId,Prompt,CHOSEN, Rejected ,note\r\n1,"a, ""b""\r\nc",yes,no,\r\n\r\n2,q,"long\n\nanswer",x,y\r\n'
    pairs, report = rows(write(tmp_path / "a.csv", text))
    assert [(p.turns, p.chosen, p.reject) for p in pairs] == [
        ((Turn("user", 'a, "b"\nc'),), "yes", "no"),
        ((Turn("user", "q"),), "long\nanswer", "x"),
    ]
    assert [p.where.rsplit("/")[-1] for p in pairs] == ["a.csv:2 (row 1)", "a.csv:5 (row 2)"]
    assert report.rows == 2


def test_system_prompt(tmp_path, world):
    """The optional column comes first in the prompt."""
    pairs = open_pairs(write(tmp_path / "a.csv", "system,prompt,chosen,reject\nBe kind.,Hi,Yes,No\n"), world)
    assert world.decode(pairs[0].prompt) == "System: Be kind.\n\nUser: Hi\n\nAssistant:"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "prompt,answer,reject\na,b,c\n",
            r"a\.csv:2 .*its keys are prompt, answer, reject; the nearest is preference pairs .* chosen is missing",
        ),
        ("", r"a\.csv: holds no usable preference pair \(0 rows read\)"),
        ("prompt,chosen,reject\n" + 'p,"x\ny",z\n' * 6 + "p,,z\n", r"a\.csv:14 \(row 7\): the answer chosen is empty"),
        ("prompt,chosen,reject\n ,x,y\n", r"a\.csv:2 \(row 1\): the prompt is empty"),
        ("prompt,chosen,reject\np,x\n", r"a\.csv:2 \(row 1\): the answer reject is empty"),
        ("prompt,chosen,reject\np,x , x\n", r"a\.csv:2 \(row 1\): chosen and reject are identical"),
        ("prompt,chosen,reject\np,x,y,z\n", r"a\.csv:2 \(row 1\): 4 cells, but the header has 3"),
        ('prompt,chosen,reject\np,x,y\np,"x,y\n', r"a\.csv:3 \(row 2\): not readable as CSV.*quotation mark"),
        (b"prompt,chosen,reject\np,x,y\np,\xff,y\n", r"a\.csv:3 \(row 2\): byte 0xff is not UTF-8"),
        ("prompt,prompt,chosen,reject\n", "the column prompt stands twice"),
        ("prompt,chosen,reject\n", "holds no usable preference pair"),
    ],
)
def test_mistakes_in_a_csv(tmp_path, world, text, message):
    """One sentence with the line on which the row starts, also when cells before it span lines."""
    with pytest.raises(ValueError, match=message):
        open_pairs(write(tmp_path / "a.csv", text), world)


def test_skip_bad_counts_every_row_left_out(tmp_path, world):
    """Nothing is dropped silently."""
    text = b'prompt,chosen,reject\np,,y\np,x,x\np,\xff,y\n,x,y\np,x,y\np,x,y,z\np,"x,y\n'
    report = open_pairs(write(tmp_path / "a.csv", text), world, skip_bad=True).report
    assert (report.rows, report.examples) == (7, 1)
    assert report.skipped == Counter(
        {
            "empty chosen": 1,
            "identical answers": 1,
            "not UTF-8": 1,
            "empty prompt": 1,
            "too many cells": 1,
            "unreadable": 1,
        }
    )
    assert "skipped 1: not UTF-8" in "\n".join(report.lines())


def test_rows_that_an_open_quotation_mark_swallows_are_counted(tmp_path, world):
    """One typing error can cost the rest of the file: the summary says which lines."""
    text = 'prompt,chosen,reject\np,x,y\nq,"x,y\n' + "r,x,y\n" * 7
    with pytest.raises(ValueError, match=r"a\.csv:3 .*lines 3 to 10"):
        open_pairs(write(tmp_path / "a.csv", text), world)
    report = open_pairs(write(tmp_path / "a.csv", text), world, skip_bad=True).report
    assert (report.examples, dict(report.skipped)) == (1, {"unreadable, lines 3 to 10": 1})


def test_scores_that_are_missing_are_no_ties(tmp_path):
    """Tables have NaN where nobody scored: such a pair is kept under --drop_ties 1."""
    scores = [("NaN", "NaN"), ("3", "nan"), ("", "4"), ("4", "4"), ("5", "4"), ("4", "5")]
    lines = [f"p{n},x,y,{good},{bad}" for n, (good, bad) in enumerate(scores)]
    path = write(tmp_path / "a.csv", "\n".join(["prompt,chosen,reject,score_chosen,score_rejected", *lines]) + "\n")
    report = DataReport(str(path))
    assert [pair.turns[0][1] for pair in read_pairs(path, report, drop_ties=True)] == ["p0", "p1", "p2", "p4", "p5"]
    assert dict(report.skipped) == {"tie: both answers have the same score": 1}


def test_margins_of_rows(tmp_path, world):
    """A column margin, else the difference of both scores, else nothing; it survives tokenising and the cap."""
    rows = ["1.5,,", ",8,3", "2,8,3", ",nan,3", "inf,,"]
    lines = [f"p{n},x {'long ' * 9},y,{row}" for n, row in enumerate(rows)]
    path = write(
        tmp_path / "a.csv", "\n".join(["prompt,chosen,reject,margin,score_chosen,score_rejected", *lines]) + "\n"
    )
    for most in (0, 4):
        pairs = open_pairs(path, world, max_len=most)
        assert [pair.margin for pair in pairs] == [1.5, 5.0, 2.0, None, None]
        assert [pair.margin for pair in pairs.judged()] == [1.5, 5.0, 2.0, None, None]


def test_rows_without_rejects_for_the_generator(tmp_path):
    """rlhf_generate_reject_csv.py reads the same files with the rejects still empty or the column absent."""
    pairs, _ = rows(write(tmp_path / "a.csv", "prompt,chosen\np,x\n"), reading=SPARE)
    assert pairs[0].reject == ""
    pairs, _ = rows(write(tmp_path / "b.csv", "prompt,chosen,reject\np,x,\nq,y,z\n"), reading=SPARE)
    assert [p.reject for p in pairs] == ["", "z"]


def test_jsonl_key_sets(tmp_path):
    """prompt/chosen/reject, the question form, and message lists whose last turn is the answer."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    records = [
        {"prompt": "p", "chosen": "x", "reject": "y"},
        {"system": "s", "question": "q", "chosen": "x", "rejected": "y"},
        {
            "prompt": "a",
            "chosen": [*talk, {"role": "assistant", "content": "x"}],
            "rejected": [*talk, {"role": "assistant", "content": "y"}],
        },
        {"prompt": talk, "chosen": "x", "rejected": [{"role": "assistant", "content": "y"}]},
    ]
    pairs, _ = rows(write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, records))))
    history = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"))
    assert [p.turns for p in pairs] == [
        (Turn("user", "p"),),
        (Turn("system", "s"), Turn("user", "q")),
        history,
        history,
    ]
    assert {(p.chosen, p.reject) for p in pairs} == {("x", "y")}
    assert WORLD.prompt(history) == "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant:"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p", "chosen": "x"}', "reject is missing"),
        ('{"prompt": "p", "chosen": 3, "reject": "y"}', "chosen must be text"),
        (
            '{"prompt": "p", "chosen": "x", "reject": [{"role": "user", "content": "y"}]}',
            "last message must be the assistant",
        ),
        (
            '{"prompt": "p", "chosen": "x", "reject": [{"role": "narrator", "content": "y"}]}',
            "message 1 has the role 'narrator'",
        ),
        ('{"prompt": "p", "chosen": "x", "reject": "y"', "not a JSON object"),
        ("[1]", "a JSON object is needed"),
    ],
)
def test_mistakes_in_jsonl(tmp_path, world, line, message):
    """The line that is wrong, not the whole file."""
    good = '{"prompt": "p", "chosen": "x", "reject": "y"}\n'
    with pytest.raises(ValueError, match=r"a\.jsonl:2: .*" + message):
        open_pairs(write(tmp_path / "a.jsonl", good + line), world)


def test_parquet(tmp_path, world):
    """Sets published as parquet open without a conversion."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"prompt": ["p", "q"], "chosen": ["x", "x"], "rejected": ["y", "x"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet row 2: chosen and reject are identical"):
        open_pairs(tmp_path / "a.parquet", world)
    pairs = open_pairs(tmp_path / "a.parquet", world, skip_bad=True)
    assert world.decode(pairs[0].chosen) == " x\n\n"
    with pytest.raises(ValueError, match="not a readable parquet"):
        open_pairs(write(tmp_path / "b.parquet", "no"), world)


def test_caps_keep_the_cue_and_are_counted(tmp_path, world):
    """A prompt that lost its end would lose `Assistant:`; an answer keeps its start."""
    path = write(tmp_path / "a.csv", "prompt,chosen,reject\n" + "w " * 50 + ",good " + "g " * 50 + ",bad\n")
    whole = open_pairs(path, world)[0]
    pairs = open_pairs(path, world, max_len=10)
    assert pairs[0] == PairExample(whole.prompt[-10:], whole.chosen[:10], whole.reject)
    assert world.decode(pairs[0].prompt).endswith("\n\nAssistant:")
    assert pairs.report.truncated == Counter(prompt=1, chosen=1)
    same = write(tmp_path / "b.csv", "prompt,chosen,reject\np,same start a,same start b\n")
    with pytest.raises(
        ValueError, match=r"b\.csv:2 \(row 1\): chosen and reject do not differ in their first 2 tokens"
    ):
        open_pairs(same, world, max_len=2)


def test_ctx_len_grows_with_one_notice(tmp_path, world):
    """The tradition crashed when prompt and answer together were longer than ctx_len."""
    path = write(tmp_path / "a.csv", GOOD)
    pairs = open_pairs(path, world, ctx_len=4)
    pair = pairs[0]
    assert pairs.ctx_len == len(pair.prompt) + max(len(pair.chosen), len(pair.reject)) > 4
    assert len(pairs.report.notices) == 1
    assert open_pairs(path, world, ctx_len=100).ctx_len == 100


def test_rows_are_cycled_to_the_wanted_count(tmp_path, world):
    """60 pairs from 3 rows: every row 20 times, other templates in other cycles, the same file for the same seed."""
    path = write(tmp_path / "a.csv", "prompt,chosen,reject\n" + "".join(f"p{i},x{i},y{i}\n" for i in range(3)))

    def cycled(count, **options):
        tokeniser = PairTokeniser(path, world, PairOptions(**options))
        return tokeniser.pairs(count), tokeniser.report

    pairs, report = cycled(60, template="mixed", seed=100)
    assert Counter(world.decode(p.chosen) for p in pairs) == {f" x{i}\n\n": 20 for i in range(3)}
    assert len({world.decode(p.prompt).split(":")[0] for p in pairs}) > 1
    assert (report.rows, report.examples) == (3, 60)
    assert cycled(60, template="mixed", seed=100)[0] == pairs
    assert cycled(60, template="mixed", seed=101)[0] != pairs
    some, report = cycled(2)
    assert len(some) == 2
    assert "1 of 3 rows are not used" in report.notices[0]
    with pytest.raises(ValueError, match="--target_pair_count 0"):
        cycled(0)


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_every_template_ends_its_answers(name, tmp_path, world):
    """An answer whose end is not trained never stops; chosen and rejected share one prompt."""
    pairs = open_pairs(write(tmp_path / "a.csv", GOOD), world, template=name)
    ends = {tuple(world.encode("\n\n")), tuple(world.encode(".\n\n")), tuple(world.encode("\u273f")), (0,)}
    assert tuple(pairs[0].chosen[-1:]) in ends
    assert pairs[0].prompt


def test_unknown_names(tmp_path, world):
    """A template or a suffix that does not exist is named with the legal ones."""
    with pytest.raises(ValueError, match="--template wrld is not known; one of world, mixed, g1, g1h, plain"):
        PairTokeniser(tmp_path / "a.csv", world, PairOptions(template="wrld"))
    with pytest.raises(ValueError, match=r"not a file of preference pairs; one of \.csv"):
        open_pairs(write(tmp_path / "a.xlsx", "x"), world)
    with pytest.raises(ValueError, match=r"none\.csv: cannot be read"):
        open_pairs(tmp_path / "none.csv", world)


def test_references_can_be_set(tmp_path, world):
    """Scores computed before training go into the batches; the file's pairs stay as they were."""
    pairs = open_pairs(write(tmp_path / "a.csv", GOOD), world)
    scored = pairs.with_reference([(-1.5, -2.5)])
    assert scored[0].reference == (-1.5, -2.5)
    assert pairs[0].reference is None
    assert scored.report is pairs.report


def test_empty_rejects_name_the_script_that_samples_them(tmp_path):
    """If this breaks, who trains on the file of the README's first step is not told that the second is missing."""
    source = write(tmp_path / "a.csv", "prompt,chosen,reject\nHi,Hello.,\n")
    with pytest.raises(ValueError, match=r"a\.csv:2 .*reject is empty; rlhf_generate_reject_csv\.py samples rejects"):
        rows(source)
