"""What --resume auto says where there is nothing to resume, and what a fresh folder says of its scores."""

import torch

from rwkv_rlhf.checkpoints.loading import BuildOptions, load_model
from rwkv_rlhf.checkpoints.resume_points import ResumePoints, last_point
from rwkv_rlhf.data.batch import PairExample
from rwkv_rlhf.scoring.reference import reference_scores
from rwkv_rlhf.settings.command_line import parse
from rwkv_rlhf.training.resume import about_run, begun_at, find_point


def test_where_a_run_without_a_point_begins(tmp_path, caplog):
    """If this breaks, "the run starts from the beginning" is followed by "going on from rwkv-1"."""
    caplog.set_level("INFO")
    words = ["--data_file", "D", "--resume", "auto", "--load_model"]
    for model, said in ((["M"], "from the beginning"), (["0", "--train_stage", "3"], "from its newest checkpoint")):
        caplog.clear()
        assert find_point(parse([*words, *model]), tmp_path, {}) is None
        assert caplog.messages == [f"--resume auto: {tmp_path} holds no resume point, so the run starts {said}"]


def test_a_resumed_run_keeps_its_time(tmp_path):
    """If this breaks, a template that writes the date gives a run that is resumed tomorrow other tokens."""
    points = ResumePoints(tmp_path / "resume", about_run({}, "2020-02-01T10:00:00", 1, "base", "hash", ("", "")))
    points.write({"step": 1, "epoch": 0, "done": 1}, {"weights": {"a": torch.ones(1)}})
    assert begun_at(last_point(tmp_path / "resume")) == "2020-02-01T10:00:00" < begun_at(None)


def test_scores_of_a_fresh_folder_are_of_no_other_model(base_model, tmp_path, caplog):
    """If this breaks, the first run in a folder hears that what its cache holds is of another model."""
    caplog.set_level("INFO")
    model, _ = load_model(base_model, BuildOptions(torch.float32))
    pairs = [PairExample([1, 2], [3, 4], [5])]
    for word in ("computing (kept in ", "from "):
        caplog.clear()
        reference_scores(model, pairs, model_hash="a", arithmetic="", folder=tmp_path, head_chunk=64)
        assert [line for line in caplog.messages if line.startswith(f"reference scores of 1 pairs: {word}")]
