"""Preference pairs in HDF5, as the later RWKV-LM-RLHF wrote them.

`prompttokens`, `chosentokens`, `rejecttokens`: one entry a pair, variable length, int64. `chosenprob`, `rejectprob`:
float32, mean log-probability of a token of each answer under the model that made the file. That program took each
logit one position too far, so the references are computed anew unless --trust_reference 1 asks for them.
"""

import os
from typing import Any

import numpy as np

from rwkv_rlhf.data.batch import PairExample
from rwkv_rlhf.data.pairs.save import NO_REFERENCE, pair_record
from rwkv_rlhf.data.report import DataReport, RowError
from rwkv_rlhf.data.text.h5 import PAIRS, readable_file, vlen_kind
from rwkv_rlhf.data.text.h5_check import check_column

NAMES = (PAIRS, "chosentokens", "rejecttokens")
MEANS = ("chosenprob", "rejectprob")


def _column(path: str | os.PathLike[str], file: Any, name: str) -> np.ndarray:
    """All entries of a dataset; ValueError unless it holds what its name says."""
    check_column(path, file, name)
    inner = file[name].dtype if name in MEANS else vlen_kind(file[name].dtype)
    if inner is None or np.dtype(inner).kind not in ("f" if name in MEANS else "iu"):
        what = "numbers" if name in MEANS else "variable-length arrays of token ids"
        raise ValueError(f"{path}: `{name}` is no list of {what}")
    return np.asarray(file[name][:])


def read_pair_h5(path: str | os.PathLike[str], report: DataReport, vocab_size: int | None = None) -> list[PairExample]:
    """Pairs of an .h5; `reference` holds the file's means times the answers' lengths, None where both are 0 or absent.

    Raises:
        ValueError: missing, truncated or foreign file; datasets that are missing or of different lengths; a record of
            the wrong form, by number from 0, unless the report skips.
    """
    with readable_file(path) as file:
        columns = {name: _column(path, file, name) for name in (*NAMES, *MEANS) if file.get(name, getlink=True)}
    for name in NAMES:
        if name not in columns:
            raise ValueError(f"{path}: holds no dataset `{name}`, so no preference pairs")
    sizes = {name: len(column) for name, column in columns.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{path}: datasets of different lengths: {', '.join(f'{n} {s}' for n, s in sizes.items())}")
    means = np.stack([np.zeros(sizes[PAIRS]) if name not in columns else columns[name] for name in MEANS], axis=1)
    pairs = []
    for number, mean in enumerate(means.tolist()):
        report.rows += 1
        parts = [np.asarray(columns[name][number]).tolist() for name in NAMES]
        sums = [mean[at] * len(parts[1 + at]) for at in (0, 1)] if any(mean) else NO_REFERENCE
        try:
            pairs.append(pair_record((*parts, *sums), vocab_size))
        except RowError as error:
            report.bad(f"{path} record {number}", error)
    return pairs
