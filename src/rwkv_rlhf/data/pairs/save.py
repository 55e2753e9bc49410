"""`.save` files: preference pairs as token ids, and the sidecar that says what their reference log-probabilities are.

A `.save` is `torch.save` of a list of 5-tuples (prompt ids, chosen ids, reject ids, b_c, b_r) of builtins. b are summed
log-probabilities under a reference model; 0.5 for both means that there are none. F.save.json beside F.save holds the
model's hash, template, sum or mean, lengths and seed.
"""

import dataclasses
import json
import os
import pickle
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from rwkv_rlhf.data.batch import PairExample
from rwkv_rlhf.data.pairs.same_prompt import number_prompts
from rwkv_rlhf.data.report import DataReport, RowError
from rwkv_rlhf.files import atomic_write, check_archive, check_readable, file_hash, read_json_object
from rwkv_rlhf.settings.config import PROGRAM_VERSION

NO_REFERENCE = (0.5, 0.5)
LARGEST = 1e30  # a log-probability; whole numbers of any size compare with it, and NaN does not
_GLOBAL = re.compile(r"GLOBAL (\S+)")


def _load(path: str | os.PathLike[str]) -> object:
    """What torch.load gives with weights_only; ValueError in one sentence for everything else."""
    check_readable(path)
    check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # on a bare pickle torch asks for an issue report; the error below says enough
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = _GLOBAL.search(str(error))
        if found:
            name = found.group(1).strip("`'\",.")
            raise ValueError(
                f"{path}: refused, it holds the foreign global {name}, which could run code when loaded"
            ) from error
        raise ValueError(f"{path}: not a file written by torch.save") from error
    except MemoryError:
        raise
    except Exception as error:  # what torch.load raises for other bytes depends on where it stumbles
        raise ValueError(f"{path}: not a file written by torch.save, or truncated") from error


def _ids(value: object, name: str, vocab_size: int | None) -> list[int]:
    if not isinstance(value, list | tuple) or not all(type(number) is int for number in value):
        raise RowError(f"{name} is not a list of token ids", "wrong structure")
    if not value:
        raise RowError(f"{name} is empty", f"empty {name}")
    if min(value) < 0 or (vocab_size is not None and max(value) >= vocab_size):
        wrong = next(n for n in value if n < 0 or (vocab_size is not None and n >= vocab_size))
        raise RowError(
            f"{name} holds token id {wrong}, but the vocabulary has {vocab_size or 'none below 0'}",
            "id outside vocabulary",
        )
    return value if isinstance(value, list) else list(value)  # not copied: a file may use one list many times


def pair_record(value: object, vocab_size: int | None) -> PairExample:
    """(prompt ids, chosen ids, reject ids, two log-probabilities) as a pair; RowError for what is wrong with it."""
    if not isinstance(value, list | tuple) or len(value) != 5:
        raise RowError("not a tuple of (prompt, chosen, reject, chosen log-prob, reject log-prob)", "wrong structure")
    prompt, chosen, reject = (_ids(part, name, vocab_size) for part, name in zip(value, ("prompt", "chosen", "reject")))
    reference = value[3:]
    if not all(type(number) in (int, float) and abs(number) < LARGEST for number in reference):
        raise RowError("its log-probabilities are not two finite numbers", "wrong structure")
    if chosen == reject:
        raise RowError("chosen and reject are identical", "identical answers")
    known = (float(reference[0]), float(reference[1]))
    return PairExample(prompt, chosen, reject, None if known == NO_REFERENCE else known)


def read_save(
    path: str | os.PathLike[str],
    report: DataReport,
    vocab_size: int | None = None,
    about: dict[str, Any] | None = None,
) -> list[PairExample]:
    """Pairs of a `.save` file; `reference` is None where the file holds the 0.5 placeholders.

    `about` is what its sidecar says (`read_sidecar`): which records have one prompt.

    Raises:
        ValueError: missing, truncated or foreign file (naming the global that was refused); a record of the wrong form
            or with ids outside the vocabulary, by number from 0, unless the report skips.
    """
    data = _load(path)
    if not isinstance(data, list | tuple):
        raise ValueError(f"{path}: holds a {type(data).__name__}, not a list of preference records")
    pairs, prompts = [], prompts_of(about, len(data))
    for number, value in enumerate(data):
        report.rows += 1
        try:
            pairs.append(dataclasses.replace(pair_record(value, vocab_size), conversation=prompts[number]))
        except RowError as error:
            report.bad(f"{path} record {number}", error)
    return pairs


def prompts_of(about: dict[str, Any] | None, records: int) -> list[str]:
    """What tells the prompt of each record from the others, by the sidecar; "" where it does not say."""
    numbers = str((about or {}).get("prompts", "")).split()
    return numbers if len(numbers) == records else [""] * records


def sidecar_path(path: str | os.PathLike[str]) -> str:
    """F.save.json for F.save."""
    return f"{os.fspath(path)}.json"


def write_save(path: str | os.PathLike[str], pairs: Sequence[PairExample], about: dict[str, Any]) -> None:
    """Writes F.save and F.save.json, both whole or not at all.

    Args:
        pairs: a missing reference is written as 0.5, 0.5.
        about: what the sidecar says; the caller gives `model` (hash or None), `template`, `reference` (None, "sum" or
            "mean"), `max_len`, `seed`. Program, number of records, longest parts and the file's hash are added, and
            `prompts`, a number for the prompt of each record ("0 0 1"), where that is known.
    """
    records = [
        (
            list(map(int, p.prompt)),
            list(map(int, p.chosen)),
            list(map(int, p.reject)),
            *map(float, p.reference or NO_REFERENCE),
        )
        for p in pairs
    ]
    lengths = {part: max((len(getattr(p, part)) for p in pairs), default=0) for part in ("prompt", "chosen", "reject")}
    # nested, so that a sidecar that cannot be written leaves no file without one
    with atomic_write(sidecar_path(path)) as side, atomic_write(path) as file:
        torch.save(records, file)
        file.flush()
        digest = file_hash(file.name)
        text = {
            "program": f"RWKV-LM-RLHF {PROGRAM_VERSION}",
            **about,
            "records": len(records),
            "longest": lengths,
            "sha256": digest,
        }
        if prompts := number_prompts(pairs):
            text["prompts"] = prompts
        side.write((json.dumps(text, indent=1, sort_keys=True) + "\n").encode())


def read_sidecar(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What F.save.json says, or None when it is absent, unreadable, or not of this very F.save (its hash differs)."""
    try:
        about = read_json_object(sidecar_path(path))
    except ValueError:
        return None
    return about if about.get("sha256") == file_hash(path) else None
