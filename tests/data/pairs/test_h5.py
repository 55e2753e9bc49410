"""Preference pairs in HDF5."""

import numpy as np
import pytest

from rwkv_rlhf.data.opening import kind_of, open_pairs

h5py = pytest.importorskip("h5py")


def test_pairs_in_h5(tmp_path, world):
    """The later programs' preference files: the means become sums, placeholders become nothing."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, ids in (("prompttokens", [5, 6]), ("chosentokens", [7, 8, 9]), ("rejecttokens", [7, 0])):
            made = file.create_dataset(name, (2,), h5py.vlen_dtype(np.int64))
            made[0], made[1] = ids, ids
        file["chosenprob"] = np.array([-0.5, 0], dtype=np.float32)
        file["rejectprob"] = np.array([-2.0, 0], dtype=np.float32)
    pairs = open_pairs(tmp_path / "a.h5", world)
    assert kind_of(tmp_path / "a.h5") == "pairs"
    assert (pairs[0].prompt, pairs[0].chosen, pairs[0].reject) == ([5, 6], [7, 8, 9], [7, 0])
    assert (pairs[0].reference, pairs[1].reference) == ((-1.5, -4.0), None)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        del file["rejecttokens"]
    with pytest.raises(ValueError, match="holds no dataset `rejecttokens`"):
        open_pairs(tmp_path / "a.h5", world)
