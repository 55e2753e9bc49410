"""Preference pairs ready for training: tokenised, capped, counted; from text files or from a `.save`."""

import dataclasses
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from rwkv_rlhf.data.batch import PairExample, RatedExample
from rwkv_rlhf.data.pairs.h5 import read_pair_h5
from rwkv_rlhf.data.pairs.rows import RawPair, read_pairs
from rwkv_rlhf.data.pairs.save import read_save, read_sidecar
from rwkv_rlhf.data.report import DataReport, RowError
from rwkv_rlhf.data.templates.builtin import Form, Turn
from rwkv_rlhf.data.templates.named import check_template, draw_form
from rwkv_rlhf.data.tokenizer import Tokenizer
from rwkv_rlhf.files import check_readable

MIXED_SEED = 100  # the tradition's seed for drawing templates


class Pairs(Sequence[PairExample]):
    """Pairs in file order.

    Attributes:
        report: what was read, cut and left out.
        ctx_len: the caller's, grown to the longest pair (prompt + longer answer) where that did not fit.
        sidecar: what F.save.json says of this F.save, or None.
    """

    def __init__(self, pairs: list[PairExample], report: DataReport, ctx_len: int = 0, sidecar: dict | None = None):
        self._pairs, self.report, self.sidecar = pairs, report, sidecar
        _count(pairs, report)
        longest = max(report.lengths)
        self.ctx_len = ctx_len
        if 0 < ctx_len < longest:
            self.ctx_len = longest
            report.notice(
                f"ctx_len grows from {ctx_len} to {longest}, the longest prompt and answer of {report.source}"
            )

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> PairExample:
        return self._pairs[index]

    def trained(self, index: int) -> int:
        """A pair counts as one."""
        return 1

    def group(self, index: int) -> object:
        """Pairs of one prompt must not be torn apart by a held-out split."""
        return tuple(self._pairs[index].prompt)

    def with_reference(self, sums: Sequence[Sequence[float]]) -> "Pairs":
        """The same pairs with `sums` (n, 2), summed log-probabilities of (chosen, reject), as reference scores."""
        assert len(sums) == len(self)
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        scored = zip(self._pairs, sums)
        new._pairs = [dataclasses.replace(p, reference=(float(s[0]), float(s[1]))) for p, s in scored]
        return new


def cut_prompt(prompt: list[int], max_len: int) -> list[int]:
    """A prompt keeps its end, with the cue for the answer."""
    return prompt[-max_len:]


def cap_pair(pair: PairExample, max_len: int, report: DataReport) -> PairExample:
    """At most `max_len` tokens each: a prompt keeps its end, an answer its start; 0 = no cap.

    What is cut is counted, and a reference score of the whole answer is dropped with it.

    Raises RowError when the two answers do not differ within the cap.
    """
    if not max_len or max(len(pair.prompt), len(pair.chosen), len(pair.reject)) <= max_len:
        return pair
    cut = PairExample(cut_prompt(pair.prompt, max_len), pair.chosen[:max_len], pair.reject[:max_len])
    if cut.chosen == cut.reject:
        raise RowError(
            f"chosen and reject do not differ in their first {max_len} tokens (--rlhf_max_corpus_len)",
            "identical when cut",
        )
    for part in ("prompt", "chosen", "reject"):
        if len(getattr(pair, part)) > max_len:
            report.truncated[part] += 1
    if pair.reference is not None:
        report.truncated["reference score (dropped)"] += 1
    return cut


def tokenise_pair(pair: RawPair, form: Form, tokenizer: Tokenizer) -> PairExample:
    """Token ids of a pair under one form; prompt and answers are tokenised apart, as sampling meets them."""
    prompt, answers = form.written(pair.turns, [pair.chosen, pair.reject])
    chosen, reject = ([*tokenizer.encode(text), *form.end_ids] for text in answers)
    return PairExample(tokenizer.encode(prompt), chosen, reject)


def pair_records(
    path: str | os.PathLike,
    tokenizer: Tokenizer,
    template: str = "world",
    count: int | None = None,
    max_len: int = 0,
    seed: int = MIXED_SEED,
    skip_bad: bool = False,
    shuffle: bool | None = None,
    drop_ties: bool = False,
) -> tuple[list[PairExample], DataReport]:
    """Tokenised pairs of a CSV, JSONL or parquet file.

    Args:
        count: rows are cycled until there are so many pairs, each cycle drawing its own templates;
            None = each row once.
        max_len: cap on prompt, chosen and reject, each in tokens; 0 = none.
        seed: of the template draws and of the shuffle.
        shuffle: None shuffles exactly when `count` is given.

    Raises:
        ValueError: with file and line for a row that cannot be used; a count below 1; no usable row.
    """
    report = DataReport(str(path), skip_bad=skip_bad)
    rows = _read(path, report, template, count, drop_ties)
    rng = random.Random(seed)
    pairs = _cycled(rows, count, template, rng, tokenizer, max_len, report)
    if shuffle or (shuffle is None and count is not None):
        rng.shuffle(pairs)
    _count(pairs, report)
    return pairs, report


def _read(
    path: str | os.PathLike, report: DataReport, template: str, count: int | None, drop_ties: bool
) -> list[RawPair]:
    check_template(template)
    if count is not None and count < 1:
        raise ValueError(f"--target_pair_count {count}: must be at least 1")
    rows = list(read_pairs(path, report, drop_ties=drop_ties))
    if count is not None and count < len(rows):
        report.notice(f"{path}: {len(rows) - count} of {len(rows)} rows are not used, --target_pair_count is {count}")
    return rows


def _cycled(
    rows: Sequence[RawPair],
    count: int | None,
    template: str,
    rng: random.Random,
    tokenizer: Tokenizer,
    max_len: int,
    report: DataReport,
) -> list[PairExample]:
    """Pairs of the rows, again and again until there are `count` (None: each row once); every cycle draws its forms."""
    wanted = len(rows) if count is None else count
    made: dict[tuple[int, Form], PairExample | None] = {}
    pairs: list[PairExample] = []
    while len(pairs) < wanted:
        before = len(pairs)
        for at, row in enumerate(rows):
            form = draw_form(template, rng)
            if (at, form) not in made:
                made[at, form] = _usable(row, form, tokenizer, max_len, report)
            if made[at, form] is not None and len(pairs) < wanted:
                pairs.append(made[at, form])
        if count is None or len(pairs) == before:
            break
    return pairs


def split_records(
    path: str | os.PathLike,
    tokenizer: Tokenizer,
    shares: Sequence[float],
    template: str = "world",
    count: int | None = None,
    max_len: int = 0,
    seed: int = MIXED_SEED,
    skip_bad: bool = False,
    drop_ties: bool = False,
) -> tuple[list[list[PairExample]], DataReport]:
    """As `pair_records`, in parts of these shares (train first); rows of one conversation stay in one part.

    Of `count` pairs each part has its share; only the first part cycles its rows to reach it.
    Raises ValueError when a part would be empty.
    """
    report = DataReport(str(path), skip_bad=skip_bad)
    rows = _read(path, report, template, count, drop_ties)
    rng = random.Random(seed)
    groups: dict[tuple[Turn, ...], list[RawPair]] = {}
    for row in rows if count is None else rows[:count]:
        groups.setdefault(row.turns, []).append(row)
    order = list(groups.values())
    rng.shuffle(order)
    total = sum(map(len, order))
    parts: list[list[PairExample]] = []
    for share in shares[:0:-1]:  # the held-out parts first, from the end
        some: list[RawPair] = []
        while len(order) > 1 and (not some or len(some) + len(order[-1]) <= share * total):
            some += order.pop()
        parts.insert(0, _cycled(some, None, template, rng, tokenizer, max_len, report))
    rest = [row for group in order for row in group]
    wanted = None if count is None else max(1, round(count * shares[0]))
    train = _cycled(rest, wanted, template, rng, tokenizer, max_len, report)
    rng.shuffle(train)
    parts.insert(0, train)
    if not all(parts):
        raise ValueError(f"--split: {path} has {len(groups)} usable prompts, too few for {len(shares)} parts")
    _count([pair for part in parts for pair in part], report)
    return parts, report


def _count(pairs: Sequence[PairExample], report: DataReport) -> None:
    """Fills in what the finished pairs say; an error when there are none."""
    if not pairs:
        raise ValueError(f"{report.source}: holds no usable preference pair ({report.rows} rows read)")
    report.examples = report.trained = len(pairs)
    report.lengths = [len(p.prompt) + longest_answer(p) for p in pairs]


def longest_answer(pair: PairExample) -> int:
    """Tokens of the longer answer; of a rated answer, its own."""
    return len(pair.chosen) if isinstance(pair, RatedExample) else max(len(pair.chosen), len(pair.reject))


def _usable(row: RawPair, form: Form, tokenizer: Tokenizer, max_len: int, report: DataReport) -> PairExample | None:
    """The row's pair, or None when it is skipped (an error unless the report skips)."""
    try:
        return cap_pair(tokenise_pair(row, form, tokenizer), max_len, report)
    except RowError as error:
        report.bad(row.where, error)
        return None


Opened = tuple[list[PairExample], DataReport, dict | None]


def _from_save(path: str | os.PathLike, tokenizer: Tokenizer, max_len: int, skip_bad: bool, **_: object) -> Opened:
    report = DataReport(str(path), skip_bad=skip_bad)
    return _capped(read_save(path, report, tokenizer.vocab_size), max_len, report), report, read_sidecar(path)


def _from_h5(path: str | os.PathLike, tokenizer: Tokenizer, max_len: int, skip_bad: bool, **_: object) -> Opened:
    report = DataReport(str(path), skip_bad=skip_bad)
    return _capped(read_pair_h5(path, report, tokenizer.vocab_size), max_len, report), report, None


def _capped(pairs: Sequence[PairExample], max_len: int, report: DataReport) -> list[PairExample]:
    kept = []
    for number, pair in enumerate(pairs):
        try:
            kept.append(cap_pair(pair, max_len, report))
        except RowError as error:
            report.bad(f"{report.source} record {number}", error)
    return kept


def _from_rows(
    path: str | os.PathLike,
    tokenizer: Tokenizer,
    max_len: int,
    skip_bad: bool,
    template: str,
    seed: int,
    drop_ties: bool,
) -> Opened:
    return *pair_records(path, tokenizer, template, None, max_len, seed, skip_bad, drop_ties=drop_ties), None


# data type (and suffix) -> opener
PAIR_FORMATS: dict[str, Callable[..., Opened]] = {
    "csv": _from_rows,
    "jsonl": _from_rows,
    "parquet": _from_rows,
    "save": _from_save,
    "h5": _from_h5,
}


def pair_type(path: str | os.PathLike) -> str:
    """The data type of a file of pairs, by its suffix; a zip archive of any name is a `.save`; "" for anything else."""
    kind = Path(path).suffix.lower().lstrip(".")
    kind = "h5" if kind == "hdf5" else kind
    if kind in PAIR_FORMATS:
        return kind
    check_readable(path)
    with open(path, "rb") as file:
        return "save" if file.read(4) == b"PK\x03\x04" else ""


def open_pairs(
    path: str | os.PathLike,
    tokenizer: Tokenizer,
    *,
    template: str = "world",
    max_len: int = 1024,
    ctx_len: int = 0,
    seed: int = MIXED_SEED,
    skip_bad: bool = False,
    drop_ties: bool = False,
) -> Pairs:
    """Preference pairs from any file that holds them, by its suffix.

    Args:
        tokenizer: also says which ids of a `.save` are legal (its vocab_size).
        max_len: --rlhf_max_corpus_len. ctx_len: grown when a pair does not fit; 0 = do not look.

    Raises:
        ValueError: one sentence with file and line, record or flag.
    """
    kind = pair_type(path)
    if not kind:
        raise ValueError(f"{path}: not a file of preference pairs; one of .{', .'.join(PAIR_FORMATS)}")
    pairs, report, sidecar = PAIR_FORMATS[kind](
        path, tokenizer=tokenizer, max_len=max_len, skip_bad=skip_bad, template=template, seed=seed, drop_ties=drop_ties
    )
    return Pairs(pairs, report, ctx_len, sidecar)
