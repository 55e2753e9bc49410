"""Votes on disk: what they make, what survives, what is refused; and the interval of a win rate."""

import json
import math
import os

import pytest

from rwkv_rlhf.data.conversation import Turn
from rwkv_rlhf.serving.votes import KINDS, Vote, VoteFile, win_rate
from tests.support.files import read_jsonl

HI = (Turn("user", "say one"),)
ABOUT = {"models": [["a", "none"]], "prompts": "x"}


def vote(number, kind, answers=("good", "bad"), models=(0, 1), edited=""):
    return Vote(number, HI, answers, models, kind, edited, 0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pairs.jsonl"


def test_what_each_vote_makes(path):
    """If this breaks, training learns the worse answer, or a pair that nobody chose."""
    file = VoteFile(path, ABOUT)
    for number, kind in enumerate(KINDS):
        file.add(vote(number, kind, edited=" mine\n\n" if kind.startswith("edit") else ""))
    pairs = [(row["chosen"], row["rejected"]) for row in read_jsonl(path)]
    assert pairs == [("good", "bad"), ("bad", "good"), ("mine", "good"), ("mine", "bad")]
    assert all(row["messages"] == [{"role": "user", "content": "say one"}] for row in read_jsonl(path))
    assert file.made() == 4 and len(VoteFile(path, ABOUT).votes) == len(KINDS)


@pytest.mark.parametrize("cut", ["a vote cut off", "a pair cut off", "a pair missing", "no file of pairs"])
def test_a_kill_at_any_moment(path, cut):
    """If this breaks, a kill between or within the two files loses a vote, or trains on half a line."""
    file = VoteFile(path, ABOUT)
    for number in range(3):
        file.add(vote(number, "left", (f"good {number}", "bad")))
    log, whole = path.with_name("pairs.jsonl.votes"), path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    if cut == "a vote cut off":
        os.truncate(log, log.stat().st_size - 5)
        whole = whole[:-last]
    elif cut == "no file of pairs":
        path.unlink()
    else:
        os.truncate(path, len(whole) - (last if cut == "a pair missing" else 7))
    again = VoteFile(path, ABOUT)
    assert path.read_bytes() == whole and len(again.votes) == whole.count(b"\n")
    again.add(vote(3, "right"))
    assert len(read_jsonl(path)) == whole.count(b"\n") + 1


def test_a_vote_is_taken_back(path):
    """If this breaks, a slip of the finger stays in the training data."""
    file = VoteFile(path, ABOUT)
    file.add(vote(0, "left"))
    file.add(vote(1, "right"))
    assert file.undo().number == 1
    for known in (file, VoteFile(path, ABOUT)):
        assert [one.number for one in known.votes] == [0]
    assert [row["chosen"] for row in read_jsonl(path)] == ["good"]
    file.undo()
    with pytest.raises(ValueError, match="no vote to take back"):
        file.undo()
    assert path.read_bytes() == b""


def test_typed_prompts_are_kept(path):
    """If this breaks, what a person asked in the page is gone after a restart."""
    VoteFile(path, ABOUT).ask(HI)
    assert VoteFile(path, ABOUT).typed == [HI]


def test_files_of_others_are_refused_and_stay(path):
    """If this breaks, votes on two models, or somebody's own data, end in one file."""
    VoteFile(path, ABOUT).add(vote(0, "left"))
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(ValueError, match=r"votes of another work \(other models\)"):
        VoteFile(path, {**ABOUT, "models": [["b", "none"]]})
    other = path.with_name("mine.jsonl")
    other.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    with pytest.raises(ValueError, match=r"no mine\.jsonl\.votes"):
        VoteFile(other, ABOUT)
    assert all(file.read_bytes() == data for file, data in before.items()) and other.read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "answers", "edited", "said"),
    [
        ("left", ("", "b"), "", "empty"),
        ("right", ("a ", "a"), "", "the same"),
        ("edit_left", ("a", "b"), " ", "empty"),
        ("edit_left", ("a", "b"), "a", "the same"),
    ],
)
def test_what_teaches_nothing_is_refused(path, kind, answers, edited, said):
    """If this breaks, training stops at a pair with an empty answer, or with the same answer twice."""
    file = VoteFile(path, ABOUT)
    with pytest.raises(ValueError, match=said):
        file.add(vote(0, kind, answers, edited=edited))
    assert not file.votes and path.read_bytes() == b""


@pytest.mark.parametrize(("wins", "votes"), [(0, 5), (7, 10), (30, 30), (51, 100)])
def test_the_interval_is_wilsons(wins, votes):
    """If this breaks, a blind test promises more than it shows. A bound is the true share at which what was seen lies
    1.96 standard deviations away."""
    rate = win_rate(wins, votes)
    for bound in (rate.low, rate.high):
        assert abs(wins / votes - bound) == pytest.approx(
            1.959963985 * math.sqrt(bound * (1 - bound) / votes), abs=1e-8
        )
    assert 0 <= rate.low <= rate.share == wins / votes <= rate.high <= 1 and rate.low < rate.high
    assert win_rate(0, 0)[2:] == (0.5, 0.0, 1.0)


def test_the_rate_follows_the_models_not_the_sides(path):
    """If this breaks, the model that was shown on the left wins."""
    file = VoteFile(path, ABOUT)
    for number, (kind, models) in enumerate(
        [("left", (0, 1)), ("right", (1, 0)), ("left", (1, 0)), ("tie", (0, 1)), ("edit_left", (0, 1))]
    ):
        file.add(vote(number, kind, models=models, edited="own"))
    assert file.rate()[:2] == (2, 3)
