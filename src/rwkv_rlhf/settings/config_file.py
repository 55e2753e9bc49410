"""Settings in a file: `--config run.yaml` reads them, a run writes its own down, and editors complete them.

A YAML file has one setting a line under its clean name (the field of Config): `loss: dpo`, `lr_init: 1e-5`. What is
typed on the command line wins over every file, and a later file over an earlier one.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import PROGRAM, Config, settings
from rwkv_rlhf.settings.field import choices_of
from rwkv_rlhf.settings.flags import ALIASES, FLAG_OF
from rwkv_rlhf.settings.groups import GROUPS, grouped_settings
from rwkv_rlhf.settings.help import text_of
from rwkv_rlhf.settings.hub import named_again

RUN_FILE = "config.yaml"  # in the folder of a run
NOT_REPEATED = ("resume", "force", "archive", "debug")  # settings that belong to one start, not to the run
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def read_config_files(paths: Sequence[str], kinds: Mapping[str, type]) -> dict[str, Any]:
    """Setting -> value, of all files together. kinds: the type of each setting.

    Raises ValueError, naming file and key, for what is not YAML, a key twice in one file, an unknown key (with the
    nearest one) and a value of another type. What a value may be is checked later, as on the command line.
    """
    found: dict[str, Any] = {}
    for path in paths:
        for key, value in _mapping(path).items():
            if key not in kinds:
                raise ValueError(f"{path}: {key!r} is no setting{_nearest(str(key), kinds)}")
            if value is not None:
                found[str(key)] = _typed(f"{path}: {key}", value, kinds[str(key)])
        if found.get("loss", "") not in ("", *tables.LOSSES):
            raise ValueError(f"{path}: loss: must be one of {', '.join(tables.LOSSES)}, not {found['loss']!r}")
    return found


def config_text(config: Config) -> str:
    """The settings of a run that were typed or are not the default, as a file that repeats it."""
    import yaml

    lines = [f"# settings of one run of {PROGRAM}: repeat it with --config, and another proj_dir"]
    fields = settings()
    for group, names in grouped_settings().items():
        here = {}
        for name in names:
            value, default = getattr(config, name), fields[name].default
            chosen = value != default and name != "loss" and default is not None  # by --peft state, --state 1
            if name not in NOT_REPEATED and value is not None and (name in config.given or chosen):
                here[name] = named_again(value) if isinstance(value, str) else value
        if here:
            lines += ["", f"# {GROUPS[group].help}"]
            # escaped where not printable: YAML takes U+0085 and its like in plain text for line breaks
            for name, value in here.items():
                lines.append(yaml.safe_dump({name: value}, allow_unicode=str(value).isprintable()).strip())
    return "\n".join(lines) + "\n"


def schema(kinds: Mapping[str, type]) -> dict[str, Any]:
    """A JSON schema (2020-12) of such a file: types, choices, limits, defaults and help, for editors."""
    limits = {"at_least": "minimum", "above": "exclusiveMinimum", "at_most": "maximum", "below": "exclusiveMaximum"}
    words = {int: "integer", float: "number", bool: "boolean", str: "string"}
    properties: dict[str, Any] = {}
    for name, field in settings().items():
        about: dict[str, Any] = {"type": words[kinds[name]], "description": text_of(field)}
        choices: list[str | int] = (
            list(tables.LOSSES) if name == "loss" else [choice for choice in choices_of(field) if choice != ""]
        )
        if choices:
            about["enum"] = choices
        if field.default not in (None, ""):
            about["default"] = field.default
        about |= {word: field.metadata[limit] for limit, word in limits.items() if limit in field.metadata}
        properties[name] = about
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{PROGRAM}: a run of train.py",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _mapping(path: str) -> dict[Hashable, Any]:
    """The top level of one file."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that stands there twice, where YAML's own takes the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise ValueError(f"{path}: {key!r} stands there twice, with two values")
            found: dict[Hashable, Any] = super().construct_mapping(node, deep)
            return found

    try:
        found = Loader(Path(path).read_text(encoding="utf-8-sig")).get_single_data()
    except FileNotFoundError:
        raise ValueError(f"--config {path}: there is no such file") from None
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {path}: byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise ValueError(f"--config {path}: nested too deep") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ValueError(f"--config {path}{line}: not YAML: {getattr(error, 'problem', error)}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"--config {path}: expected lines such as `loss: dpo`, found {type(found).__name__}")
    return found


def _nearest(key: str, kinds: Mapping[str, type]) -> str:
    """What to write instead: the clean name of a flag's own spelling, else the most similar name, if any is."""
    plain = key.lstrip("-").replace("-", "_")
    own = {flag: name for name, flag in FLAG_OF.items()} | ALIASES
    if plain in tables.LOSSES:
        return f"; write `loss: {plain}`"
    near = own.get(plain) or plain if plain in {*own, *kinds} else None
    found = [near] if near else difflib.get_close_matches(plain.lower(), kinds, n=1, cutoff=0.6)
    return f"; the nearest is {found[0]}" if found else "; `--help` lists all"


def _typed(where: str, value: Any, kind: type) -> Any:
    """`value` as `kind`. YAML reads 1e-5 as text and 1 as a number where true is meant: both are taken."""
    if kind is bool and value in (0, 1):
        return bool(value)
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # a file or a project may be called 7
    if kind is float and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{where}: expected {KINDS[kind]}, found {value!r}")
