"""HDF5 files as the older programs write them."""

import h5py
import numpy as np

DOCUMENTS = ([5, 6, 7, 0], [8, 9, 10, 0], [11, 0])


def old_file(path, documents=DOCUMENTS, k=0, **changes):
    """As the older programs write: gzip 9, resizable, grown one entry at a time, K nowhere stored."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        kinds = {"tokens": np.int64} | ({"top_k_values": np.float32, "top_k_indices": np.int64} if k else {})
        for name, kind in kinds.items():
            made = file.create_dataset(
                name, (0,), h5py.vlen_dtype(kind), maxshape=(None,), compression="gzip", compression_opts=9
            )
            for number, ids in enumerate(documents):
                made.resize((number + 1,))
                if name == "tokens":
                    made[number] = np.array(ids, dtype=kind)
                elif kind is np.float32:
                    made[number] = -np.sort(-rng.normal(size=(len(ids), k)), axis=1).reshape(-1).astype(kind)
                else:
                    made[number] = np.tile(np.arange(k), len(ids)).astype(kind)
        for name, (number, value) in changes.items():
            file[name][number] = value
    return path
