"""Words of other trainers' command lines put into ours, by the tables of `settings/flags.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rwkv_rlhf.settings.flags import CONFIG_KEYS, CONFIGS, ELSEWHERE, MODES, Elsewhere

_ANY = "X"
_HIDDEN = "***"
_TRUTH = {"true": "1", "false": "0"}


class Translated(NamedTuple):
    """The words as this program spells them, and a sentence for each that was spelled otherwise."""

    words: list[str]
    said: list[str]


class _Typed(NamedTuple):
    """A flag without its dashes, the words behind it, and all of them as they were typed."""

    flag: str
    values: list[str]
    words: list[str]


def translate(words: Sequence[str], spellings: Sequence[Elsewhere] = ELSEWHERE) -> Translated:
    """A command line with every spelling of another program replaced.

    Raises ValueError for what is refused with a sentence, and for JSON that cannot be read.
    """
    typed = list(_typed(words))
    found = Translated([], [])
    peft = next((t.values[0] for t in typed if t.flag == "peft" and t.values), "")
    for one in typed:
        if one.flag in CONFIGS:
            new, note = _from_json(one, peft)
        elif (entry := _entry(one, spellings)) is not None:
            one = _Typed(one.flag, one.values, [f"--{one.flag}", _HIDDEN]) if entry.secret and one.values else one
            new, note = _from_entry(entry, one)
        else:
            found.words.extend(one.words)
            continue
        found.words.extend(new)
        becomes = " ".join(new) or "no effect"
        found.said.append(f"{' '.join(one.words)}: {becomes}" + (f" ({note})" if note else ""))
    return found


def _typed(words: Sequence[str]) -> Iterator[_Typed]:
    at = 0
    while at < len(words):
        end = at + 1
        while end < len(words) and not words[end].startswith("--"):
            end += 1
        flag, equals, value = words[at].partition("=")
        values = [*([value] if equals else []), *words[at + 1 : end]]
        yield _Typed(flag[2:] if flag.startswith("--") else "", values, list(words[at:end]))
        at = end


def _entry(one: _Typed, spellings: Sequence[Elsewhere]) -> Elsewhere | None:
    value = " ".join(one.values)
    value = _TRUTH.get(value.lower(), value)
    exact = f"{one.flag} {value}".strip()
    for entry in spellings:
        flag, _, wanted = entry.said.partition(" ")
        if entry.said == exact or (flag == one.flag and (wanted == _ANY or (not wanted and value == "1"))):
            return entry
    return None


def _from_entry(entry: Elsewhere, one: _Typed) -> tuple[list[str], str]:
    if entry.ours is None:
        raise ValueError(f"{' '.join(one.words)}: {entry.note}")
    ours = f"--{entry.ours}".split() if entry.ours else []
    return [" ".join(one.values) if word == _ANY else word for word in ours], entry.note


def _from_json(one: _Typed, peft: str) -> tuple[list[str], str]:
    """The flags that a JSON of settings stands for; none where it is for another adapter than --peft."""
    adapter = CONFIGS[one.flag]
    try:
        settings: Any = json.loads(" ".join(one.values))
    except ValueError as error:
        raise ValueError(f"--{one.flag} {' '.join(one.values)}: not JSON ({error}); quote it") from error
    if not isinstance(settings, dict):
        raise ValueError(f"--{one.flag} {' '.join(one.values)}: must be a JSON object")
    if adapter and peft and adapter != ("bone" if peft == "disha" else peft):
        return [], f"it is for --peft {adapter}"
    new = []
    for key, value in settings.items():
        if key not in CONFIG_KEYS or (not CONFIG_KEYS[key] and value not in MODES):
            raise ValueError(
                f"--{one.flag}: {key} {value!r} has no meaning here; the keys are {', '.join(CONFIG_KEYS)}"
            )
        if CONFIG_KEYS[key] and value != "":
            new += [f"--{CONFIG_KEYS[key]}", str(value)]
    return new, ""
