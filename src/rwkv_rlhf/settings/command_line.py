"""The command line: argv -> Config for train.py, and the parser and the exit statuses that all scripts share.

The only file that knows how flags are spelled. Messages from inside the program write `{name}` for the flag of a
setting; `spelled` puts the flag there.
"""

import argparse
import difflib
import functools
import logging
import math
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from rwkv_rlhf.settings import config as record
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import PROGRAM, Config
from rwkv_rlhf.settings.constraints import check
from rwkv_rlhf.settings.elsewhere import translate
from rwkv_rlhf.settings.exit_status import OK, exit_status, sentence_of
from rwkv_rlhf.settings.flags import ALIASES, FLAG_OF, LEGACY, WORDS
from rwkv_rlhf.settings.formats import refuse_other_format
from rwkv_rlhf.settings.groups import GROUPS, grouped_settings
from rwkv_rlhf.settings.help import explain, flag_of, loss_help, short_help
from rwkv_rlhf.settings.notices import notices
from rwkv_rlhf.settings.optimizers import OPTIMIZERS
from rwkv_rlhf.settings.surroundings import take_over, thread_notice

log = logging.getLogger(__name__)

TRUTH = {"1": True, "0": False, "true": True, "false": False}
READ_SIZES = ("vocab_size", "dim_att", "dim_ffn")  # 0 asks for what the checkpoint says, typed or not
TYPE_WORDS = {int: "a whole number", float: "a number", bool: "0 or 1"}
NEAR = 0.7  # likeness, 0 to 1, from which on a flag is named for one that does not exist
LONGEST = 1000  # characters of a sentence on stderr


class UsageError(ValueError):
    """A mistake on the command line."""


class Parser(argparse.ArgumentParser):
    """An argument parser in the manner of this program, for train.py and the scripts beside it.

    No abbreviations; a mistake raises UsageError (one sentence, the nearest known flag for an unknown one) instead of
    printing the usage; 0/1 flags may be given bare; `--debug` and `--version` exist in every script.
    """

    def __init__(self, description: str, help: type[argparse.Action] | str = "help") -> None:
        usage = "%(prog)s --flag value ..."
        super().__init__(usage=usage, description=description, allow_abbrev=False, add_help=False)
        self.register("type", float, finite)  # for every flag with type=float
        self.paths: dict[str, str] = {}  # flags that name what is read -> model, data, file or template
        self.checks: list[Callable[[argparse.Namespace], object]] = []  # raise ValueError for values that cannot be
        if help == "help":
            self.add_argument("-h", "--help", action="help", help="list every flag and stop")
        else:
            text = "list every flag, or explain a group or a flag, and stop"
            self.add_argument(
                "-h", "--help", action=help, nargs="?", metavar="GROUP|FLAG", default=argparse.SUPPRESS, help=text
            )
        version = f"{PROGRAM} {record.PROGRAM_VERSION}"
        self.add_argument("--version", action="version", version=version, help="print the version and stop")
        self.add_switch("--debug", help="show the traceback of an error")

    def add_switch(self, flag: str, default: bool = False, help: str = "") -> None:
        """Adds a 0/1 flag that may be given bare: `--quiet` = `--quiet 1`."""
        self.add_argument(flag, nargs="?", const=True, default=default, type=truth, metavar="0/1", help=help)

    def add_count(self, flag: str, least: int = 1, **options: Any) -> None:
        """Adds a flag that is a whole number, not below `least`."""
        name = self.add_argument(flag, type=int, **options).dest

        def check_count(found: argparse.Namespace) -> None:
            value = getattr(found, name)
            if value is not None and value < least:
                raise ValueError(f"{flag} {value}: must be at least {least}")

        self.checks.append(check_count)

    def add_path(self, *flags: str, holds: str, **options: Any) -> None:
        """Adds a flag that names what the command reads: `holds` model, data, file or template."""
        self.paths[self.add_argument(*flags, **options).dest] = holds

    def add_output(self, *flags: str, forms: Sequence[str], **options: Any) -> None:
        """Adds a flag that names the file to write, in one of `forms` (of settings/formats.py)."""
        name = self.add_argument(*flags, **options).dest
        self.checks.append(lambda found: refuse_other_format(getattr(found, name), flags[0], *forms))

    def known_flags(self) -> list[str]:
        """Every flag with its two dashes."""
        return [text for text in self._option_string_actions if text.startswith("--")]

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parses `args` (None = sys.argv); raises UsageError, and what `checks` raise."""
        found, extra = self.parse_known_args(args, namespace)
        unknown = [word.split("=")[0] for word in extra if word.startswith("--") and len(word) > 2]
        if unknown:
            known = {flag.lower(): flag for flag in self.known_flags()}
            nearest = difflib.get_close_matches(unknown[0].lower(), known, n=1, cutoff=NEAR)
            hint = f"the nearest known flag is {known[nearest[0]]}" if nearest else "--help lists all flags"
            raise UsageError(f"unknown flag {unknown[0]}; {hint}")
        if extra:
            raise UsageError(f"{extra[0]!r} stands where a flag was expected; see --help")
        for check_values in self.checks:
            check_values(found)
        return found

    def error(self, message: str) -> NoReturn:
        """Raises UsageError in place of argparse's usage dump."""
        raise UsageError(re.sub(r"^argument (-\S+?)(/-\S+)*: ", r"\1: ", message))


def truth(text: str) -> bool:
    """'0', '1', 'true' or 'false' in any case as a bool; raises argparse.ArgumentTypeError."""
    if text.lower() not in TRUTH:
        raise argparse.ArgumentTypeError(f"expected 0 or 1, found {text!r}")
    return TRUTH[text.lower()]


def finite(text: str) -> float:
    """A number that is neither NaN nor infinite; raises argparse.ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, found {text!r}")
    return value


def spelled(text: str) -> str:
    """`text` with every `{name}` of a setting or a loss replaced by its flag; other braces stay."""
    known = {*record.settings(), *tables.LOSSES, "lora"}
    return re.sub(r"\{(\w+)\}", lambda m: flag_of(m[1]) if m[1] in known else m[0], text)


class TrainHelp(argparse.Action):
    """`--help` lists every flag in groups; `--help GROUP` and `--help FLAG` explain one of them. Then the run ends."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        if values is None:
            parser.print_help()
        else:
            sys.stdout.write(spelled(explain(values, kinds())) + "\n")
        parser.exit()


def train_parser() -> Parser:
    """The parser of train.py: one flag per setting, in groups, the old spellings, and the flags without a meaning."""
    parser = Parser("Train an RWKV language model: SFT, DPO, ORPO and pre-training.", help=TrainHelp)
    for group, names in grouped_settings().items():
        section = parser.add_argument_group(group, f"{GROUPS[group].help} (--help {group})")
        for name in names:
            if name == "loss":
                for loss in tables.LOSSES:
                    add_raw(section, loss, bare=True, help=loss_help(loss))
            elif name != "debug":  # every parser has it
                text = spelled(short_help(name)).replace("%", "%%")
                add_raw(section, flag_of(name)[2:], bare=kinds()[name] is bool, help=text)
    parser.add_argument(
        "--config",
        action="append",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="YAML file of settings by their names; may be given again, later files and typed flags win",
    )
    other = parser.add_argument_group("other spellings")
    add_raw(other, "lora", bare=True, help="the same as --peft lora")
    for alias, name in ALIASES.items():
        add_raw(other, alias, bare=False, help=f"the same as {flag_of(name)}")
    for old in LEGACY:
        add_raw(other, old, bare=True, help=argparse.SUPPRESS)
    return parser


def add_raw(parser: argparse._ActionsContainer, flag: str, bare: bool, help: str) -> None:
    """Adds a flag whose text is converted later; it is absent from the result unless it was typed."""
    if bare:
        parser.add_argument("--" + flag, default=argparse.SUPPRESS, metavar="0/1", nargs="?", const="1", help=help)
    else:
        parser.add_argument("--" + flag, default=argparse.SUPPRESS, metavar="X", help=help)


def kinds() -> dict[str, type]:
    """The type of each setting; for `X | None` it is X."""
    return dict(_kinds(Config))


@functools.cache  # reading the annotations takes a millisecond, and a command line asks for each of its flags
def _kinds(owner: type) -> types.MappingProxyType[str, type]:
    hints = typing.get_type_hints(owner)
    return types.MappingProxyType({name: first_type(hints[name]) for name in record.settings()})


def first_type(hint: Any) -> type:
    """`int | None` -> int."""
    found: type = typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint
    return found


def words_of(flag: str) -> dict[str, Any]:
    """Words of the command line that stand for another value behind `--flag`."""
    spellings: dict[str, dict[str, str]] = {
        "my_testing": {word: name for name, facts in tables.VERSIONS.items() for word in facts.spellings},
        "optim": {word: name for name, facts in OPTIMIZERS.items() for word in facts.spellings},
    }
    words: dict[str, Any] = dict(WORDS.get(flag, {}))
    return words | spellings.get(flag, {})


def convert(flag: str, text: str, kind: type) -> Any:
    """The value that `text` stands for behind `--flag`; raises UsageError."""
    words = words_of(flag)
    if text in words:
        return words[text]
    try:
        value = TRUTH[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise UsageError(f"--{flag} {text!r}: expected {TYPE_WORDS[kind]}") from None
    if kind is float and not math.isfinite(value):
        raise UsageError(f"--{flag} {text}: expected a finite number")
    return value


def parse(argv: Sequence[str] | None = None) -> Config:
    """The Config of a command line of train.py.

    argv: the words after `train.py` (None = sys.argv). Raises UsageError or ValueError, one sentence each, for unknown
    flags, values out of range and settings that contradict each other. What is accepted without effect is said in one
    warning of this module's logger.
    """
    try:
        given_words = translate(sys.argv[1:] if argv is None else argv)
    except ValueError as mistake:
        raise UsageError(str(mistake)) from mistake
    typed = dict(vars(train_parser().parse_args(given_words.words)))
    filed = settings_of_files(typed.pop("config", ()))
    values: dict[str, Any] = {"debug": typed.pop("debug") or filed.pop("debug", False)}
    words = legacy_words(typed)
    loss = chosen_loss(typed) or filed.pop("loss", "")
    lora = convert("lora", typed.pop("lora", "0"), bool)
    source: dict[str, str] = {}
    field_of: dict[str, str] = {flag: name for name, flag in FLAG_OF.items()} | ALIASES
    for flag, text in typed.items():
        name = str(field_of.get(flag, flag))
        value = convert(flag, text, kinds()[name])
        if name in values and name in source and values[name] != value:
            raise UsageError(f"--{source[name]} and --{flag} {text}: the same setting with two values")
        values[name], source[name] = value, flag
    for name, value in filed.items():
        if name not in values and not (lora and name == "peft"):
            values[name], source[name] = value, flag_of(name)
    given = {name for name in source if values[name] is not None and not (name in READ_SIZES and values[name] == 0)}
    if loss:
        values["loss"] = loss
        given.add("loss")
    elif values.get("data_file") and not values.get("pair_file"):
        values["loss"] = tables.PRETRAINING
    choose_plan(values, given, lora)
    config = Config(**values, given=frozenset(given))
    try:
        check(config)
    except ValueError as mistake:
        raise UsageError(spelled(str(mistake))) from mistake
    if given_words.said:
        log.warning("spelled as in another program: %s", "; ".join(given_words.said))
    if words:
        log.warning("accepted without effect: %s", ", ".join(words))
    for sentence in notices(config):
        log.warning(spelled(sentence))
    return config


def settings_of_files(paths: Sequence[str]) -> dict[str, Any]:
    """What the files of --config say; raises UsageError."""
    if not paths:
        return {}
    from rwkv_rlhf.settings.config_file import read_config_files

    try:
        found = read_config_files(paths, kinds())
    except ValueError as mistake:
        raise UsageError(str(mistake)) from mistake
    for name, value in found.items():
        words = words_of(flag_of(name)[2:]) if isinstance(value, str) else {}
        found[name] = words.get(value, value)
    return found


def legacy_words(typed: dict[str, str]) -> list[str]:
    """Takes the flags without a meaning out of `typed`, refuses values that ask for something, returns the rest."""
    words = []
    for flag in [name for name in typed if name in LEGACY]:
        text, old = typed.pop(flag), LEGACY[flag]
        if old.harmless and text not in old.harmless:
            legal = " or ".join(f"--{flag} {value}" for value in old.harmless)
            raise UsageError(spelled(f"--{flag} {text}: {old.instead}; only {legal} is accepted"))
        words.append(f"--{flag} {text}")
    return words


def chosen_loss(typed: dict[str, str]) -> str:
    """Takes the loss flags out of `typed`; the one that is on, or ''."""
    on = [flag for flag in tables.LOSSES if convert(flag, typed.pop(flag, "0"), bool)]
    if len(on) > 1:
        raise UsageError(f"{' and '.join(f'--{flag} 1' for flag in on)}: choose one loss")
    return on[0] if on else ""


def choose_plan(values: dict[str, Any], given: set[str], lora: bool) -> None:
    """Writes into `values` what --lora, --peft state and a bare --state 1 stand for."""
    if lora:
        if values.setdefault("peft", "lora") not in ("lora", "pissa"):  # old commands say --lora --PISSA
            raise UsageError(f"--lora 1 and --peft {values['peft']}: choose one")
        given.add("peft")
    if values.get("state") and "peft" not in given and not values.get("layer_profile"):
        values["peft"] = "state"
    if values.get("peft") == "state":
        if values.get("state") is False:
            raise UsageError("--peft state and --state 0: choose one")
        values["state"] = True


def run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a script and leaves with its exit status.

    main: takes the words behind the script's name, returns an exit status or None for 0. An exception becomes one
    sentence on stderr and the status that `exit_status` gives; under --debug 1 the traceback comes first.
    """
    take_over()
    words = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    if notice := thread_notice():
        log.warning("%s", notice)
    try:
        status = main(words) or OK
    except (Exception, KeyboardInterrupt) as error:  # the last resort: a message and a status instead of a traceback
        if wants_debug(words):
            traceback.print_exc()
        sys.stderr.write(f"error: {one_line(spelled(sentence_of(error)))}\n")
        status = exit_status(error)
    sys.exit(status)


def one_line(text: str) -> str:
    """`text` as a sentence for a terminal, whatever a file put into it: no line breaks, no control characters, not
    longer than two ends of LONGEST / 2 characters."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"


def wants_debug(words: Sequence[str]) -> bool:
    """Whether --debug is on, read without the parser because the parser itself may have failed."""
    for at, word in enumerate(words):
        if word == "--debug":
            return at + 1 == len(words) or words[at + 1].lower() not in ("0", "false")
        if word.startswith("--debug="):
            return word.split("=")[1].lower() not in ("0", "false")
    return False


def as_flags(config: Config) -> list[str]:
    """The settings that differ from their defaults as words of the command line, for logs and reports."""
    words = []
    for name, field in record.settings().items():
        value = getattr(config, name)
        if value == field.default or (name not in config.given and (name == "loss" or field.default is None)):
            continue
        words += [f"--{value}", "1"] if name == "loss" else [flag_of(name), as_word(value)]
    return words


def as_word(value: Any) -> str:
    """A value as the command line writes it."""
    return str(int(value)) if isinstance(value, bool) else str(value)
