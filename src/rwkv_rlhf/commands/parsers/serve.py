"""The flags of `serve`."""

from rwkv_rlhf.commands.flag_groups import (
    add_opened_model_flags,
    add_trained_template_flag,
    add_vocabulary_flag,
)
from rwkv_rlhf.generation.sampling_params import add_sampling_flags
from rwkv_rlhf.settings.command_line import Parser


def parser() -> Parser:
    """The flags of this script."""
    flags = Parser("Answer chat clients that speak OpenAI's API.")
    add_opened_model_flags(flags, "checkpoint of the model")
    flags.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 = every one [127.0.0.1]")
    flags.add_argument("--port", type=int, default=8000, help="port to listen at; 0 = any that is free [8000]")
    text = "what clients must send as Authorization: Bearer; empty = none, but beyond this machine one is made"
    flags.add_argument("--token", default="", help=text)
    flags.add_argument("--name", default="", help="what clients call the model [the name of its file]")
    flags.add_count("--batch_size", default=16, help="answers sampled at once; others wait [16]")
    text = "conversations whose state is kept, so that their next turn runs only what is new; 0 = none [16]"
    flags.add_count("--cached_states", default=16, least=0, help=text)
    add_sampling_flags(flags, top_p=0.7, max_tokens=1024)
    add_trained_template_flag(flags)
    add_vocabulary_flag(flags)
    return flags
