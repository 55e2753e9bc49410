"""Preference pairs ready for training, from any file that holds them."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, overload

from rwkv_rlhf.data.batch import JudgedPair, PairExample
from rwkv_rlhf.data.items import Reading
from rwkv_rlhf.data.pairs.h5 import read_pair_h5
from rwkv_rlhf.data.pairs.same_prompt import prompt_key
from rwkv_rlhf.data.pairs.save import read_save, read_sidecar
from rwkv_rlhf.data.pairs.tokenising import PairOptions, PairTokeniser, cap_pair, count_pairs
from rwkv_rlhf.data.report import DataReport, RowError
from rwkv_rlhf.data.rows import rows_format
from rwkv_rlhf.data.sources import sources_of
from rwkv_rlhf.data.templates.named import TEMPLATE_SEED
from rwkv_rlhf.data.templates.template import TEMPLATES
from rwkv_rlhf.data.tokenizer import Tokenizer
from rwkv_rlhf.files import check_readable
from rwkv_rlhf.settings.formats import FORMATS, format_of_name, names_of_formats
from rwkv_rlhf.settings.implementations import load


class Pairs(Sequence[PairExample]):
    """Pairs (or rated answers) in file order.

    Attributes:
        report: what was read, cut and left out.
        ctx_len: the caller's, grown to the longest pair (prompt + longer answer) where that did not fit.
        sidecar: what F.save.json says of this F.save, or None.
    """

    def __init__(
        self, pairs: Sequence[PairExample], report: DataReport, ctx_len: int = 0, sidecar: dict[str, Any] | None = None
    ):
        self._pairs, self.report, self.sidecar = pairs, report, sidecar
        count_pairs(pairs, report)
        longest = max(report.lengths)
        self.ctx_len = ctx_len
        if 0 < ctx_len < longest:
            self.ctx_len = longest
            report.notice(
                f"ctx_len grows from {ctx_len} to {longest}, the longest prompt and answer of {report.source}"
            )

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> PairExample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[PairExample]: ...
    def __getitem__(self, index: int | slice) -> PairExample | Sequence[PairExample]:
        return self._pairs[index]

    def trained(self, index: int) -> int:
        """A pair counts as one."""
        return 1

    def group(self, index: int) -> object:
        """Pairs of one prompt must not be torn apart by a held-out split."""
        return prompt_key(self._pairs[index])

    def check_prompts(self, flag: str) -> None:
        """Raises ValueError, naming `flag`, when pairs of one prompt cannot be told from those of others."""
        if prompts_unknown(self._pairs, self.sidecar):
            raise ValueError(
                f"{flag}: {self.report.source} was made with several templates and does not say which pairs have one "
                "prompt, so held-out prompts would be trained on: make the file anew, or give {val_file}"
            )

    def judged(self) -> "Pairs":
        """The same pairs, to be judged as wholes."""
        pairs = self._pairs
        return self._of(
            [JudgedPair(p.prompt, p.chosen, p.reject, margin=p.margin, conversation=p.conversation) for p in pairs]
        )

    def with_reference(self, sums: Sequence[Sequence[float]]) -> "Pairs":
        """The same pairs with `sums` (n, 2), summed log-probabilities of (chosen, reject), as reference scores."""
        assert len(sums) == len(self)
        scored = zip(self._pairs, sums)
        return self._of([dataclasses.replace(p, reference=(float(s[0]), float(s[1]))) for p, s in scored])

    def _of(self, pairs: Sequence[PairExample]) -> "Pairs":
        """The same file's pairs in another form."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._pairs = pairs
        return new


def prompts_unknown(pairs: Sequence[PairExample], about: dict[str, Any] | None) -> bool:
    """Whether pairs of one prompt may have different tokens, with nothing else to know them by."""
    several = len(TEMPLATES.get(str((about or {}).get("template")), ())) > 1
    return several and not all(pair.conversation for pair in pairs)


def open_rows(path: str | os.PathLike[str], tokenizer: Tokenizer, options: PairOptions, ctx_len: int) -> Pairs:
    """Pairs of a file that is read row by row."""
    tokeniser = PairTokeniser(path, tokenizer, options)
    return Pairs(tokeniser.pairs(), tokeniser.report, ctx_len)


def open_save(path: str | os.PathLike[str], tokenizer: Tokenizer, options: PairOptions, ctx_len: int) -> Pairs:
    """Pairs of a `.save`, with what its sidecar says."""
    report = DataReport(str(path), skip_bad=options.skip_bad)
    about = read_sidecar(path)
    pairs = _capped(read_save(path, report, tokenizer.vocab_size, about), options.max_len, report)
    if prompts_unknown(pairs, about):
        report.notice(
            f"{path}: one prompt in two templates counts as two prompts; make the file anew to tell them apart"
        )
    return Pairs(pairs, report, ctx_len, about)


def open_pair_h5(path: str | os.PathLike[str], tokenizer: Tokenizer, options: PairOptions, ctx_len: int) -> Pairs:
    """Pairs of an .h5 of the older programs."""
    report = DataReport(str(path), skip_bad=options.skip_bad)
    return Pairs(_capped(read_pair_h5(path, report, tokenizer.vocab_size), options.max_len, report), report, ctx_len)


def _capped(pairs: Sequence[PairExample], max_len: int, report: DataReport) -> list[PairExample]:
    kept = []
    for number, pair in enumerate(pairs):
        try:
            kept.append(cap_pair(pair, max_len, report))
        except RowError as error:
            report.bad(f"{report.source} record {number}", error)
    return kept


def pair_type(path: str | os.PathLike[str]) -> str:
    """The format of a file of pairs, by its suffix; a zip archive of any name is a `.save`; "" for anything else."""
    found = rows_format(path) or format_of_name(path)
    if found and "pairs" in FORMATS[found].holds:
        return found
    check_readable(path)
    with open(path, "rb") as file:
        return "save" if file.read(4) == b"PK\x03\x04" else ""


def open_pairs(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    template: str = "world",
    max_len: int = 1024,
    ctx_len: int = 0,
    seed: int = TEMPLATE_SEED,
    skip_bad: bool = False,
    drop_ties: bool = False,
    reading: Reading | None = None,
) -> Pairs:
    """Preference pairs from any files that hold them.

    Args:
        path: a file, or what `sources_of` takes. reading: how records are read.
        tokenizer: also says which ids of a `.save` are legal (its vocab_size).
        max_len: --rlhf_max_corpus_len. ctx_len: grown when a pair does not fit; 0 = do not look.

    Raises:
        ValueError: one sentence with file and line, record or flag.
    """
    options = PairOptions(template, max_len, seed, skip_bad, drop_ties, reading or Reading())
    sources = sources_of(path)
    if len(sources) > 1 or sources[0].weight != 1:
        return open_rows(path, tokenizer, options, ctx_len)
    path = sources[0].path
    kind = pair_type(path)
    if not kind:
        raise ValueError(f"{path}: not a file of preference pairs; one of {', '.join(names_of_formats('pairs'))}")
    facts = FORMATS[kind]
    opened: Pairs = (load(facts.pairs) if facts.pairs else open_rows)(path, tokenizer, options, ctx_len)
    return opened
