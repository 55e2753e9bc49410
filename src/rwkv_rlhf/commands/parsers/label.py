"""The flags of `label`."""

from rwkv_rlhf.commands.flag_groups import (
    add_opened_model_flags,
    add_reading_flags,
    add_trained_template_flag,
    add_vocabulary_flag,
)
from rwkv_rlhf.generation.sampling_params import add_sampling_flags
from rwkv_rlhf.settings.command_line import Parser


def parser() -> Parser:
    """The flags of this script."""
    flags = Parser("Compare answers of a model in the browser: preference pairs for train.py.")
    add_opened_model_flags(flags, "checkpoint of the model that answers")
    text = "another model (a run's folder too): a blind test of both"
    flags.add_path("--compare", holds="model", default="", help=text)
    text = "JSONL of preference pairs; with OUT.votes beside it"
    flags.add_output("--output", forms=("jsonl",), required=True, help=text)
    text = "prompts, chats or pairs (docs/data.md); empty = typed ones"
    flags.add_path("--prompt_file", holds="data", default="", help=text)
    flags.add_argument("--port", type=int, default=8765, help="port on this machine; 0 = any that is free [8765]")
    flags.add_argument("--ahead", type=int, default=3, help="prompts whose answers are sampled ahead [3]")
    add_sampling_flags(flags, top_p=0.9)
    add_trained_template_flag(flags)
    add_vocabulary_flag(flags)
    add_reading_flags(flags)
    return flags
