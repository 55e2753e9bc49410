"""What --val_split holds out."""

import numpy as np
import pytest

from rwkv_rlhf.data.split import split
from rwkv_rlhf.data.text.documents import open_text
from tests.support.files import jsonl


def test_held_out_split_keeps_documents_whole(tmp_path, world):
    """Pieces of one document on both sides would make validation a memory test."""
    records = [{"text": f"{i} one two three four five six seven"} for i in range(10)]
    texts = open_text(jsonl(tmp_path / "a.jsonl", *records), world, ctx_len=3)
    train, held = split(texts, 0.2, seed=1)
    assert sorted(train.indices + held.indices) == list(range(len(texts)))
    groups = [{texts.group(i) for i in part.indices} for part in (train, held)]
    assert not groups[0] & groups[1]
    assert len(groups[1]) == 2
    assert np.array_equal(held[0].tokens, texts[held.indices[0]].tokens)
    assert split(texts, 0.2, seed=1)[1].indices == held.indices
    with pytest.raises(ValueError, match="--val_split"):
        split(open_text(jsonl(tmp_path / "b.jsonl", records[0]), world), 0.5, seed=1)
