"""`.save` files: the older programs' records, the sidecar, and files that must not be trusted."""

import json
import os
import pickle

import pytest
import torch

from rwkv_rlhf.data.batch import PairExample
from rwkv_rlhf.data.pairs.dataset import open_pairs
from rwkv_rlhf.data.pairs.save import read_save, read_sidecar, sidecar_path, write_save
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.data.tokenizer import load_tokenizer

PAIRS = [PairExample([1, 2], [3, 0], [4], (-1.25, -2.5)), PairExample([5], [6], [7, 8])]


def read(path, vocab_size=100, **options):
    report = DataReport(str(path), **options)
    return read_save(path, report, vocab_size), report


def test_round_trip_in_builtins_only(tmp_path):
    """Older programs read what is written: 5-tuples of lists and floats, 0.5 where there is no reference."""
    path = tmp_path / "a.save"
    write_save(path, PAIRS, {"model": "abc", "template": "world", "reference": "sum", "max_len": 9, "seed": 1})
    assert torch.load(path, weights_only=True) == [([1, 2], [3, 0], [4], -1.25, -2.5), ([5], [6], [7, 8], 0.5, 0.5)]
    assert read(path)[0] == PAIRS
    about = json.loads((tmp_path / "a.save.json").read_text())
    assert about == read_sidecar(path)
    assert (about["model"], about["records"], about["longest"]) == ("abc", 2, {"prompt": 2, "chosen": 2, "reject": 2})
    first = path.read_bytes()
    write_save(path, PAIRS, {})
    assert path.read_bytes() == first


def test_a_sidecar_of_another_file_is_not_believed(tmp_path):
    """Its hash says which F.save it describes; a stale one would vouch for wrong reference scores."""
    path = tmp_path / "a.save"
    write_save(path, PAIRS, {})
    torch.save([([1], [2], [3], -1.0, -2.0)], path)
    assert read_sidecar(path) is None
    assert read_sidecar(tmp_path / "none.save") is None


def test_no_file_without_its_sidecar(tmp_path):
    """When the sidecar cannot be written, no .save appears either."""
    path = tmp_path / "a.save"
    os.mkdir(sidecar_path(path))
    with pytest.raises(ValueError, match="cannot be written"):
        write_save(path, PAIRS, {})
    assert not path.exists()


def test_truncation_drops_the_reference(tmp_path):
    """A score of the whole answer is not the score of what is trained."""
    path = tmp_path / "a.save"
    write_save(path, [PairExample([1, 2, 3], [4, 5], [6], (-1.0, -2.0)), PAIRS[0]], {})
    pairs = open_pairs(path, load_tokenizer(65536), max_len=2)
    assert pairs[0] == PairExample([2, 3], [4, 5], [6])
    assert pairs[1].reference == (-1.25, -2.5)
    assert pairs.report.truncated == {"prompt": 1, "reference score (dropped)": 1}
    assert pairs.sidecar["records"] == 2


class Foreign:
    """Unpickled, it would run a command."""

    def __reduce__(self):
        return os.system, ("echo unsafe",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_foreign_global_is_refused_by_name(tmp_path, legacy):
    """A downloaded .save must never run code; the sentence names file and global."""
    path = tmp_path / "evil.save"
    torch.save([([1], [2], [3], Foreign(), 0.5)], path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"evil\.save: refused, it holds the foreign global (posix|os|nt)\.system"):
        read(path)


def test_files_that_are_no_save(tmp_path):
    """Missing, truncated, a bare pickle, text, and other contents: one sentence each."""
    path = tmp_path / "a.save"
    with pytest.raises(ValueError, match=r"a\.save: cannot be read"):
        read(path)
    write_save(path, PAIRS * 50, {})
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], pickle.dumps([1]), b"prompt,chosen\n", b"", whole[:3]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.save: not a file written by torch\.save"):
            read(path)
    torch.save({"a": 1}, path)
    with pytest.raises(ValueError, match="holds a dict, not a list"):
        read(path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (([1], [2], [3], -1.0), "not a tuple of"),
        ("text", "not a tuple of"),
        (([1], [2.5], [3], -1.0, -1.0), "chosen is not a list of token ids"),
        (([1], torch.tensor([2]), [3], -1.0, -1.0), "chosen is not a list of token ids"),
        (([1], [2], [], -1.0, -1.0), "reject is empty"),
        (([1], [2], [100], -1.0, -1.0), "reject holds token id 100"),
        (([-1], [2], [3], -1.0, -1.0), "prompt holds token id -1"),
        (([1], [2], [3], -(10**400), -1.0), "not two finite numbers"),
        (([1], [2], [3], float("nan"), -1.0), "not two finite numbers"),
        (([1], [2], [2], -1.0, -1.0), "identical"),
    ],
)
def test_bad_records_are_named_by_number(tmp_path, record, message):
    """Record 1 of the file is wrong; under skip_bad it is counted and the rest is used."""
    path = tmp_path / "a.save"
    torch.save([([1], [2], [3], 0.5, 0.5), record], path)
    with pytest.raises(ValueError, match=r"a\.save record 1: .*" + message):
        read(path)
    pairs, report = read(path, skip_bad=True)
    assert (len(pairs), report.rows, report.skipped.total()) == (1, 2, 1)
