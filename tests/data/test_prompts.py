"""Prompts without answers from every format with rows: what is asked, what is handed on, what is refused."""

import pytest

from rwkv_rlhf.data.prompts import open_prompts
from rwkv_rlhf.data.tokenizer import load_tokenizer
from rwkv_rlhf.generation.answers import after_cue
from tests.support.files import CHAT, VOCAB, jsonl, write_csv


@pytest.fixture
def letters(vocab_file):
    return load_tokenizer(VOCAB, str(vocab_file))


def test_only_a_prompt_is_needed_and_columns_are_kept(letters, tmp_path):
    """If this breaks, a reward function lacks the right answer, or a file of prompts is refused."""
    path = write_csv(tmp_path / "in.csv", [["1+1?", "2", "easy"], ["2+2?", "4", ""]], ("Prompt", "answer", "Level"))
    prompts = open_prompts(path, letters)
    assert [letters.decode(one.prompt) for one in prompts] == [f"User: {q}\n\nAssistant:" for q in ("1+1?", "2+2?")]
    assert prompts[0].raw == "1+1?" and prompts[0].columns == {"answer": "2", "level": "easy"}
    assert prompts[0].stop == "\n\n" and not prompts[0].bare and len(prompts.report.lengths) == 2
    assert prompts[1].where.endswith("in.csv:3 (row 2)")


def test_conversations_that_end_with_a_question(letters, tmp_path):
    """messages, a prompt of messages, and system with question: all are what the trainers of others publish."""
    asked = [*CHAT[:3], CHAT[3]]
    rows = ({"messages": asked}, {"prompt": asked, "id": 7}, {"system": "Be kind.", "question": "Bye"})
    prompts = open_prompts(jsonl(tmp_path / "in.jsonl", *rows), letters)
    texts = [letters.decode(one.prompt) for one in prompts]
    assert (
        texts[0] == texts[1] == ("System: Be kind.\n\nUser: Hi\nthere\n\nAssistant: Hello\n\nUser: Bye\n\nAssistant:")
    )
    assert texts[2] == "System: Be kind.\n\nUser: Bye\n\nAssistant:"
    assert prompts[0].raw == prompts[1].raw == asked and prompts[1].columns == {"id": 7}


def test_plain_prompts_are_continued_byte_for_byte(letters, tmp_path):
    """With --template plain the model goes on where the text ends, spaces included."""
    (one,) = open_prompts(jsonl(tmp_path / "in.jsonl", {"prompt": "  3+4="}), letters, template="plain")
    assert letters.decode(one.prompt) == "  3+4=" and one.bare and one.stop == ""


def test_the_g1_template_opens_the_thinking(letters, tmp_path):
    """If this breaks, a model that thinks is rewarded for answers to a prompt that it never saw in training."""
    (one,) = open_prompts(jsonl(tmp_path / "in.jsonl", {"prompt": "1+1?", "answer": "2"}), letters, template="g1")
    assert letters.decode(one.prompt) == one.cue == "User: 1+1?\n\nAssistant: <think"
    assert one.stop == "\n\n" and one.columns == {"answer": "2"}
    assert after_cue(one.cue, ">\n1 and 1\n</think>\n2") == "<think>\n1 and 1\n</think>\n2"  # what rewards see


def test_long_prompts_keep_their_end(letters, tmp_path):
    """The question stands at the end; what is cut is counted."""
    prompts = open_prompts(jsonl(tmp_path / "in.jsonl", {"prompt": "x" * 99}), letters, max_len=20)
    assert letters.decode(prompts[0].prompt) == "xxxxxxxx\n\nAssistant:"
    assert prompts.report.truncated["prompt"] == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answer": "2"}, "the prompt is empty"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"messages": CHAT[:3]}, "must end with a turn of the user"),
        ({"prompt": 7}, "prompt must be text or a list of messages"),
        ({"prompt": "a\0b"}, "NUL"),
    ],
)
def test_a_row_that_asks_nothing_is_named(letters, tmp_path, row, said):
    """File, line and reason; or counted and left out."""
    path = jsonl(tmp_path / "in.jsonl", {"prompt": "ok"}, row)
    with pytest.raises(ValueError, match=r"in\.jsonl:2: ") as caught:
        open_prompts(path, letters)
    assert said in str(caught.value)
    assert len(open_prompts(path, letters, skip_bad=True)) == 1


def test_files_without_prompts(letters, tmp_path):
    """Tokenised pairs have none as text; an empty file has none at all."""
    with pytest.raises(ValueError, match="not a file of prompts"):
        open_prompts(tmp_path / "x.save", letters)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="no usable prompt"):
        open_prompts(tmp_path / "empty.jsonl", letters)
    with pytest.raises(ValueError, match="column prompt is missing"):
        open_prompts(write_csv(tmp_path / "in.csv", [["2"]], ("answer",)), letters)
