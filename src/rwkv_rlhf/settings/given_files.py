"""The files that a command line names are looked at before anything slow: they are there, and of a form that their flag
can take. What is in them is seen when they are opened."""

import dataclasses
import logging
import os
import re
from collections.abc import Iterator

from rwkv_rlhf.files import FINAL, sharded_files
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.constraints import trains, trains_on_text
from rwkv_rlhf.settings.eval_tasks import check_eval_tasks
from rwkv_rlhf.settings.formats import FORMATS, format_of_name, format_of_word, names_of_formats
from rwkv_rlhf.settings.hub import PREFIX
from rwkv_rlhf.settings.loggers import loggers

log = logging.getLogger(__name__)

MODELS = (
    *("load_model", "load_adapter", "load_adapter_pissa_init", "load_cold_adapter"),
    *("reference_model", "teacher_model", "reward_model"),
)
DATA = ("data_file", "pair_file", "val_file")  # each may name several files
BOILERPLATE = "rwkv-0"  # the adapter that the commands of RWKV-PEFT name, whether there is one or not
TABLES = (".csv", ".jsonl", ".parquet", ".txt")  # what is given as a model by mistake


def named_files(config: Config) -> Iterator[str]:
    """Settings that name a file which this run reads."""
    yield from (
        name for name in (*MODELS, "layer_profile", "vocab_file", "val_file", "sample_prompts") if getattr(config, name)
    )
    if trains(config) and trains_on_text(config):
        yield "data_file"
    if trains(config) and config.loss and config.loss_facts.data != "text":
        yield "pair_file"


def check_given_files(config: Config) -> None:
    """Raises ValueError, with the flag, for the first file that is not there or whose name no reader knows."""
    if config.doctor or config.dry_run_shape or config.train_stage == 1:
        return
    check_eval_tasks(config.eval_tasks)
    loggers(config.logger)
    if config.sample_prompts and not config.loss_facts.predicts:
        raise ValueError(f"{{sample_prompts}} {config.sample_prompts}: a reward model writes no answers; leave it out")
    for name in named_files(config):
        given = str(getattr(config, name))
        for path in named_paths(given, name in DATA):
            check_file(config, name, path)
    file, separator, _ = config.reward_funcs.rpartition(":")
    if separator and not os.path.isfile(file):
        raise ValueError(f"{{reward_funcs}} {config.reward_funcs}: there is no file {file}")


def with_adapter_there(config: Config) -> Config:
    """`config` without a --load_adapter that is only the example of old scripts, which trained on without a word."""
    if config.load_adapter != BOILERPLATE or os.path.exists(BOILERPLATE):
        return config
    log.warning("--load_adapter %s: there is no such file, so training begins with new factors", BOILERPLATE)
    return dataclasses.replace(config, load_adapter="")


def plain_files(spec: str) -> Iterator[str]:
    """The files and folders among what a flag for data names; a pattern is looked at when it is opened, a name of the
    Hub when it is here."""
    for part in [spec] if os.path.exists(spec) else map(str.strip, spec.split(",")):
        weighted = None if os.path.exists(part) else re.fullmatch(r"(.+):[\d.]+", part)
        path = weighted[1] if weighted else part
        if path and not path.startswith(PREFIX) and (os.path.exists(path) or not {*"*?["} & {*path}):
            yield path


def named_paths(given: str, several: bool) -> list[str]:
    """What can be looked at of what a flag names: with `several` the parts of a list. A name of the Hub cannot."""
    return [*plain_files(given)] if several else [given] if not given.startswith(PREFIX) else []


def check_path(flag: str, holds: str, given: str) -> None:
    """Raises ValueError when what `flag` names is not there, or cannot be what it `holds`: model, data or file."""
    for path in named_paths(given, holds == "data"):
        if not os.path.exists(path) and not (holds == "data" and os.path.isfile(f"{corpus_prefix(path)}.idx")):
            raise ValueError(f"{flag} {path} does not exist, so it cannot be read")
        if holds == "file" and os.path.isdir(path):
            raise ValueError(f"{flag} {path} is a folder, expected a file")
        if holds == "model":
            refuse_table(flag, path)


def refuse_table(flag: str, path: str) -> None:
    """Raises ValueError when the suffix of `path` says that it is no checkpoint."""
    if os.path.splitext(path)[1].lower() in TABLES:
        raise ValueError(f"{flag} {path} is a table or a text, expected a checkpoint (.pth or .safetensors)")


def check_file(config: Config, name: str, path: str) -> None:
    """Raises ValueError when `path` of the setting `name` is not there, or not of a form that it can take."""
    if name in ("data_file", "val_file") and os.path.isfile(f"{corpus_prefix(path)}.idx"):
        return
    if os.path.isdir(path):
        if name in (*DATA, "reward_model"):  # a folder of data, or of a run
            return
        if name not in MODELS:
            raise ValueError(f"{{{name}}} {path} is a folder, expected a file")
        if name != "load_model" or not any(file.startswith(FINAL) for file in os.listdir(path)):  # that of a run
            sharded_files(path)
        return
    if not os.path.exists(path):
        raise ValueError(f"{{{name}}} {path} does not exist, so it cannot be read")
    check_form(config, name, path)


def corpus_prefix(path: str) -> str:
    """The name of a corpus without .bin or .idx."""
    stem, suffix = os.path.splitext(path)
    return stem if suffix in FORMATS["binidx"].suffixes else path


def check_form(config: Config, name: str, path: str) -> None:
    """Raises ValueError when the suffix of `path` says that it is not what `name` can take."""
    suffix = os.path.splitext(path)[1].lower()
    if name in MODELS:
        refuse_table(f"{{{name}}}", path)
    held = {"data_file": ("text",), "pair_file": ("pairs", "rated"), "val_file": ("text", "pairs", "rated")}
    kinds = held.get(name, ())
    typed = config.data_type if name == "data_file" else ""
    found = format_of_word(typed) if typed else format_of_name(path)
    if kinds and suffix in (".pth", ".safetensors") and not typed:
        legal = dict.fromkeys(word for kind in kinds for word in names_of_formats(kind))
        raise ValueError(f"{{{name}}} {path} is a checkpoint, expected data: {', '.join(legal)}")
    if kinds and found and not set(kinds) & set(FORMATS[found].holds):
        legal = dict.fromkeys(word for kind in kinds for word in names_of_formats(kind))
        raise ValueError(f"{{{name}}} {path}: {found} files hold no {kinds[0]}; one of {', '.join(legal)}")
