"""The flags of `generate_rejects`."""

from rwkv_rlhf.commands.flag_groups import add_devices_flag, add_model_flags, add_skip_flag, add_text_flags
from rwkv_rlhf.generation.sampling_params import add_sampling_flags
from rwkv_rlhf.settings.command_line import Parser


def parser() -> Parser:
    """The flags of this script."""
    flags = Parser("Sample the answers that are to be rejected.")
    add_model_flags(flags, "checkpoint of the model that answers", strategy="cuda fp16")
    text = "preference pairs; rejected answers may be absent"
    flags.add_path("--input_csv", holds="data", required=True, help=text)
    text = ".csv or .jsonl to write [rlhfoutput.csv]"
    flags.add_output("--output_csv", forms=("csv", "jsonl"), default="rlhfoutput.csv", help=text)
    flags.add_switch("--overwrite", help="replace rejects that are there")
    flags.add_count("--batch_size", default=32, help="answers sampled at once, of each process [32]")
    add_sampling_flags(flags, top_p=0.3, frequency=1.0, max_tokens=1000)
    flags.add_count("--tries", default=4, help="tries for an answer that is empty or equals chosen [4]")
    add_text_flags(flags)
    add_skip_flag(flags)
    add_devices_flag(flags)
    return flags
