"""The files that a command line names are looked at before anything slow: they are there, and of a form that their flag
can take. What is in them is seen when they are opened."""

import os
from collections.abc import Iterator

from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.constraints import trains, trains_on_text
from rwkv_rlhf.settings.formats import FORMATS, format_of_name, format_of_word, names_of_formats

MODELS = (
    *("load_model", "load_adapter", "load_adapter_pissa_init", "load_cold_adapter"),
    *("reference_model", "teacher_model"),
)
TABLES = (".csv", ".jsonl", ".parquet", ".txt")  # what is given as a model by mistake


def named_files(config: Config) -> Iterator[str]:
    """Settings that name a file which this run reads."""
    yield from (name for name in (*MODELS, "layer_profile", "vocab_file", "val_file") if getattr(config, name))
    if trains(config) and trains_on_text(config):
        yield "data_file"
    if trains(config) and config.loss and config.loss_facts.data != "text":
        yield "pair_file"


def check_given_files(config: Config) -> None:
    """Raises ValueError, with the flag, for the first file that is not there or whose name no reader knows."""
    if config.doctor or config.dry_run_shape or config.train_stage == 1:
        return
    for name in named_files(config):
        path = str(getattr(config, name))
        if name in ("data_file", "val_file") and os.path.isfile(f"{corpus_prefix(path)}.idx"):
            continue
        if os.path.isdir(path):
            raise ValueError(f"{{{name}}} {path} is a folder, expected a file")
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
    if name in MODELS and suffix in TABLES:
        raise ValueError(f"{{{name}}} {path} is a table or a text, expected a checkpoint (.pth or .safetensors)")
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
