"""What --resume auto says where there is nothing to resume, and what a fresh folder says of its scores."""

import torch

from rwkv_rlhf.checkpoints.loading import BuildOptions, load_model
from rwkv_rlhf.data.batch import PairExample
from rwkv_rlhf.scoring.reference import reference_scores
from rwkv_rlhf.settings.command_line import parse
from rwkv_rlhf.training.find_point import find_point


def test_where_a_run_without_a_point_begins(tmp_path, caplog):
    """If this breaks, "the run starts from the beginning" is followed by "going on from rwkv-1"."""
    caplog.set_level("INFO")
    words = ["--data_file", "D", "--resume", "auto", "--load_model"]
    for model, said in ((["M"], "from the beginning"), (["0", "--train_stage", "3"], "from its newest checkpoint")):
        config = parse([*words, *model])
        caplog.clear()
        assert find_point(config, tmp_path, {}) is None
        assert caplog.messages == [f"--resume auto: {tmp_path} holds no resume point, so the run starts {said}"]


def test_scores_of_a_fresh_folder_are_of_no_other_model(base_model, tmp_path, caplog):
    """If this breaks, the first run in a folder hears that what its cache holds is of another model."""
    caplog.set_level("INFO")
    model, _ = load_model(base_model, BuildOptions(torch.float32))
    pairs = [PairExample([1, 2], [3, 4], [5])]
    for word in ("computing (kept in ", "from "):
        caplog.clear()
        reference_scores(model, pairs, model_hash="a", arithmetic="", folder=tmp_path, head_chunk=64)
        assert [line for line in caplog.messages if line.startswith(f"reference scores of 1 pairs: {word}")]
