"""Which shape a row has, by its keys: the entries of `settings/shapes.py` compared."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

from rwkv_rlhf.data.conversation import is_missing
from rwkv_rlhf.data.report import RowError
from rwkv_rlhf.settings.implementations import load
from rwkv_rlhf.settings.shapes import KINDS, REJECT, SHAPES, Names, ShapeFacts

SURER = ("pairs", "rated", "text", "prompts")  # a row with two answers is a pair, whatever else it holds
_UNSURE = "?"


class Recogniser:
    """Finds the shape of each row of one file.

    Args:
        kinds: what the caller can use. forced: --format. spare: the rejected answer may be absent.
    """

    def __init__(self, kinds: Sequence[str], forced: str = "", spare: bool = False) -> None:
        self.kinds, self.forced, self.spare = tuple(kinds), forced, spare
        self.first = ""
        self._known: dict[frozenset[str], str] = {}  # of rows whose values need no look

    def shape(self, values: dict[str, Any]) -> str:
        """The name of the row's shape.

        Raises RowError for a row that is none, or two, or of a kind that is not wanted, and for one that does not
        belong in the file that it stands in.
        """
        if self.forced:
            self._check_forced(values)
            return self.forced
        name = self._find(values)
        if SHAPES[name].kind not in self.kinds:
            raise RowError(_unwanted(name, self.kinds), "of another kind")
        self.first = self.first or name
        first = SHAPES[self.first]
        if name != self.first and first.looks and self._fits(first, frozenset(values)):
            return self.first  # its reader says what is wrong with the values
        ours = first.ours and SHAPES[name].ours and first.kind == SHAPES[name].kind
        if name != self.first and not ours:
            rows = f"this row is one of {SHAPES[name].help}, the file began with {first.help}"
            raise RowError(f"{rows}: split the file, or force one of them with --format", "another shape")
        return name

    def _check_forced(self, values: dict[str, Any]) -> None:
        missing = [names[0] for names in self._needs(SHAPES[self.forced]) if not set(names) & values.keys()]
        if missing:
            raise RowError(f"--format {self.forced} needs {_and(missing)}; {_has(values)}", "another shape")

    def _find(self, values: dict[str, Any]) -> str:
        keys = frozenset(values)
        if keys in self._known:
            return self._known[keys]
        fitting = [name for name, facts in SHAPES.items() if self._fits(facts, keys)]
        best = self._surest([name for name in fitting if _looks_right(name, values)], keys)
        if len(best) > 1:  # a table made of several has columns of each
            filled = {key for key in keys if not is_missing(values[key])}
            best = [name for name in best if self._fits(SHAPES[name], filled)] or best
        elif best and not any(SHAPES[name].looks for name in fitting):
            self._known[keys] = best[0]
        if not best:
            raise RowError(self._nearest(values), "no known shape")
        if len(best) > 1:
            both = _and([f"{name} ({SHAPES[name].help})" for name in best])
            force = " or ".join(f"--format {name}" for name in best)
            raise RowError(f"the keys are those of {both}: choose with {force}", "two shapes")
        return best[0]

    def _needs(self, facts: ShapeFacts) -> list[Names]:
        return [names for names in facts.needs if not (self.spare and names == REJECT)]

    def _fits(self, facts: ShapeFacts, keys: Set[str]) -> bool:
        return all(not keys.isdisjoint(names) for names in self._needs(facts)) and keys.isdisjoint(facts.without)

    def _surest(self, fitting: list[str], values: Set[str]) -> list[str]:
        """The shapes that explain more keys than the others of their kind: one, unless two are as good."""
        kind = next((kind for kind in SURER if any(SHAPES[name].kind == kind for name in fitting)), "")
        explained: dict[str, set[str]] = {}
        for name in fitting:
            facts = SHAPES[name]
            if facts.kind == kind:
                keys = {key for names in self._needs(facts) for key in names if key in values}
                explained[name] = keys | ({_UNSURE} if facts.looks else set())
        return [name for name, keys in explained.items() if not any(keys < other for other in explained.values())]

    def _nearest(self, values: dict[str, Any]) -> str:
        """A sentence that names the keys and the shape that lacks fewest."""

        def lacking(name: str) -> list[str]:
            return [names[0] for names in self._needs(SHAPES[name]) if keys.isdisjoint(names)]

        def known(name: str) -> int:
            facts = SHAPES[name]
            return len(keys & {key for names in (facts.joins, facts.asks, *self._needs(facts)) for key in names})

        def distance(name: str) -> tuple[int, int, int]:
            return len(lacking(name)), -known(name), SURER.index(SHAPES[name].kind)

        keys = frozenset(values)
        legal = [n for n, facts in SHAPES.items() if facts.kind in self.kinds and keys.isdisjoint(facts.without)]
        nearest = min(legal, key=distance)
        if not known(nearest):
            shapes = ", ".join(legal)
            return f"no shape of data has these keys; {_has(values)}; the shapes are {shapes} (docs/data.md)"
        missing = lacking(nearest)
        lacks = f"of which {_and(missing)} is missing" if missing else "but what they hold is of another form"
        name = f"{SHAPES[nearest].help} ({nearest})"
        return f"no shape of data has these keys; {_has(values)}; the nearest is {name}, {lacks}"


def _looks_right(name: str, values: dict[str, Any]) -> bool:
    looks = SHAPES[name].looks
    return not looks or bool(load(looks)(values))


def _unwanted(name: str, kinds: Sequence[str]) -> str:
    facts = SHAPES[name]
    wanted = " or ".join(KINDS[kind] for kind in kinds)
    flags = {"pairs": "--rlhf_train_file", "rated": "--rlhf_train_file with --kto 1", "text": "--train_data_file"}
    place = f"; train.py takes such rows as {flags[facts.kind]}" if facts.kind in flags else ""
    if facts.kind == "pairs" and "text" in kinds:
        place += ", and their chosen answers as text with --train_on_chosen 1"
    return f"a row of {facts.help} ({name}), where {wanted} are needed{place}"


def _and(words: Sequence[str]) -> str:
    return " and ".join(words)


def _has(values: dict[str, Any]) -> str:
    return f"its keys are {', '.join(values)}" if values else "it has no key"
