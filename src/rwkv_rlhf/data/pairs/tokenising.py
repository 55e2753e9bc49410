"""From preference pairs as text to token ids: templates, the cap, cycles over the rows, and parts of a file."""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from rwkv_rlhf.data.batch import PairExample, RatedExample
from rwkv_rlhf.data.conversation import Turn
from rwkv_rlhf.data.items import Reading
from rwkv_rlhf.data.pairs.same_prompt import conversation_id
from rwkv_rlhf.data.pairs.text_pairs import TextPair, read_pairs
from rwkv_rlhf.data.report import DataReport, RowError
from rwkv_rlhf.data.templates.named import TEMPLATE_SEED, draw_template, find_templates, say_plain_marks
from rwkv_rlhf.data.templates.template import Template
from rwkv_rlhf.data.tokenizer import Tokenizer
from rwkv_rlhf.settings.counted import counted


@dataclass(frozen=True)
class PairOptions:
    """How pairs are read.

    Attributes:
        template: --template.
        max_len: cap on prompt, chosen and reject, each in tokens; 0 = none.
        seed: of the template draws and of the shuffle.
        skip_bad: rows that cannot be used are counted, not an error. drop_ties, reading: as `read_pairs` has them.
    """

    template: str = "world"
    max_len: int = 0
    seed: int = TEMPLATE_SEED
    skip_bad: bool = False
    drop_ties: bool = False
    reading: Reading = field(default_factory=Reading)


def cap_prompt(prompt: list[int], max_len: int) -> list[int]:
    """A prompt keeps its end, with the cue for the answer."""
    return prompt[-max_len:]


def cap_pair(pair: PairExample, max_len: int, report: DataReport) -> PairExample:
    """At most `max_len` tokens each: a prompt keeps its end, an answer its start; 0 = no cap.

    What is cut is counted, and a reference score of the whole answer is dropped with it.

    Raises RowError when the two answers do not differ within the cap.
    """
    if not max_len or max(len(pair.prompt), len(pair.chosen), len(pair.reject)) <= max_len:
        return pair
    capped = PairExample(
        cap_prompt(pair.prompt, max_len),
        pair.chosen[:max_len],
        pair.reject[:max_len],
        margin=pair.margin,
        conversation=pair.conversation,
    )
    if capped.chosen == capped.reject:
        raise RowError(
            f"chosen and reject do not differ in their first {max_len} tokens (--rlhf_max_corpus_len)",
            "identical when cut",
        )
    for part in ("prompt", "chosen", "reject"):
        report.cut(part, len(getattr(pair, part)) > max_len)
    report.cut("reference score (dropped)", pair.reference is not None)
    return capped


def longest_answer(pair: PairExample) -> int:
    """Tokens of the longer answer; of a rated answer, its own."""
    return len(pair.chosen) if isinstance(pair, RatedExample) else max(len(pair.chosen), len(pair.reject))


def count_pairs(pairs: Sequence[PairExample], report: DataReport) -> None:
    """Fills in what the finished pairs say. Raises ValueError when there are none."""
    if not pairs:
        raise ValueError(f"{report.source}: holds no usable preference pair ({counted(report.rows, 'row')} read)")
    report.examples = report.trained = len(pairs)
    report.unit = "answer" if isinstance(pairs[0], RatedExample) else "pair"
    report.lengths = [len(pair.prompt) + longest_answer(pair) for pair in pairs]


class PairTokeniser:
    """Makes examples of the pairs in files that are read row by row.

    Attributes:
        report: what was read, cut and left out.

    Raises ValueError with file and line for a row that cannot be used, for an unknown template, a count below 1, and
    where no usable row is left.
    """

    def __init__(self, path: str | os.PathLike[str], tokenizer: Tokenizer, options: PairOptions) -> None:
        find_templates(options.template)
        self.path, self.tokenizer, self.options = path, tokenizer, options
        self.report = DataReport(str(path), skip_bad=options.skip_bad)
        say_plain_marks(options.template, tokenizer, self.report)
        self.rng = random.Random(options.seed)

    def pairs(self, count: int | None = None) -> list[PairExample]:
        """Rows are cycled until there are `count` pairs, shuffled; None = each row once, in the file's order."""
        pairs = self._cycle(self._read(count), count)
        if count is not None:
            self.rng.shuffle(pairs)
        count_pairs(pairs, self.report)
        return pairs

    def parts(self, shares: Sequence[float], count: int | None = None) -> list[list[PairExample]]:
        """Parts of these shares (train first); rows of one conversation stay in one part.

        Of `count` pairs each part has its share; only the first part cycles its rows to reach it.
        Raises ValueError when a part would be empty.
        """
        rows = self._read(count)
        groups: dict[tuple[Turn, ...], list[TextPair]] = {}
        for row in rows if count is None else rows[:count]:
            groups.setdefault(row.turns, []).append(row)
        order = list(groups.values())
        self.rng.shuffle(order)
        total = sum(map(len, order))
        parts: list[list[PairExample]] = []
        for share in shares[:0:-1]:  # the held-out parts first, from the end
            some: list[TextPair] = []
            while len(order) > 1 and (not some or len(some) + len(order[-1]) <= share * total):
                some += order.pop()
            parts.insert(0, self._cycle(some, None))
        rest = [row for group in order for row in group]
        train = self._cycle(rest, None if count is None else max(1, round(count * shares[0])))
        self.rng.shuffle(train)
        parts.insert(0, train)
        if not all(parts):
            raise ValueError(
                f"--split: {self.path} has {counted(len(groups), 'usable prompt')}, too few for {len(shares)} parts"
            )
        count_pairs([pair for part in parts for pair in part], self.report)
        return parts

    def _read(self, count: int | None) -> list[TextPair]:
        if count is not None and count < 1:
            raise ValueError(f"--target_pair_count {count}: must be at least 1")
        rows = list(read_pairs(self.path, self.report, self.options.drop_ties, self.options.reading))
        if count is not None and count < len(rows):
            unused = f"{len(rows) - count} of {len(rows)} rows are not used, --target_pair_count is {count}"
            self.report.notice(f"{self.path}: {unused}")
        return rows

    def _cycle(self, rows: Sequence[TextPair], count: int | None) -> list[PairExample]:
        """Pairs of the rows, again and again until there are `count` (None: each row once).

        Every cycle draws its own templates; a row that comes again with the same one is the same object.
        """
        wanted = len(rows) if count is None else count
        made: dict[tuple[int, Template], PairExample | None] = {}
        pairs: list[PairExample] = []
        while len(pairs) < wanted:
            before = len(pairs)
            for number, row in enumerate(rows):
                template = draw_template(self.options.template, self.rng)
                if (number, template) not in made:
                    made[number, template] = self._tokenise(row, template)
                pair = made[number, template]
                if pair is not None and len(pairs) < wanted:
                    pairs.append(pair)
            if count is None or len(pairs) == before:
                break
        return pairs

    def _tokenise(self, row: TextPair, template: Template) -> PairExample | None:
        """The row's pair; prompt and answers are tokenised apart, as sampling meets them. None = it is skipped."""
        try:
            prompt, answers = template.render(row.turns, [row.chosen, row.reject])
            chosen, reject = ([*template.ids(text, self.tokenizer), *template.end_ids] for text in answers)
            key = conversation_id(row.turns)
            pair = PairExample(
                template.ids(prompt, self.tokenizer), chosen, reject, margin=row.margin, conversation=key
            )
            return cap_pair(pair, self.options.max_len, self.report)
        except RowError as error:
            self.report.bad(row.where, error)
            return None
