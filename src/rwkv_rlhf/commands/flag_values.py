"""What the flags of `flag_groups.py` say, once the work begins."""

import logging
from argparse import Namespace
from pathlib import Path

from rwkv_rlhf.checkpoints.adapter_files import NO_FLAGS, AdapterFlags, hinting
from rwkv_rlhf.checkpoints.named_model import checkpoint_file, named_model
from rwkv_rlhf.checkpoints.sidecar import read_sidecar
from rwkv_rlhf.checkpoints.tensor_files import read_tensors
from rwkv_rlhf.data.items import Reading
from rwkv_rlhf.data.templates.named import find_templates
from rwkv_rlhf.data.templates.template import Template
from rwkv_rlhf.data.tokenizer import WORLD_SIZE, Tokenizer
from rwkv_rlhf.generation.opening import open_model
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.model.sizes import sizes_of

log = logging.getLogger(__name__)

# what to do about a mismatch of model, adapter and the flags below
ADAPTER_HINTS = {
    "base": "give the right --load_model",
    "scaling": "leave --lora_scaling out",
    "alpha": "leave --lora_alpha out",
    "factors": "give them with --load_adapter_pissa_init",
    "cold": "--load_cold_adapter must name what was merged below it, or be left out",
    "no scaling": "--lora_scaling (alpha / rank) or --lora_alpha",
}


def adapter_flags(flags: Namespace) -> AdapterFlags:
    """What the flags say of --load_adapter. Raises ValueError when there is none."""
    said = AdapterFlags(scaling=flags.lora_scaling, alpha=flags.lora_alpha)
    if not flags.load_adapter and said != NO_FLAGS:
        raise ValueError("--lora_scaling and --lora_alpha need --load_adapter")
    return said


def trained_template(flags: Namespace) -> Template:
    """What --template names, else the template that the adapter, or the run in whose folder the model is, trained with.

    Raises ValueError.
    """
    whole_run = flags.load_model and Path(flags.load_model).is_dir()
    trained = flags.load_adapter or (flags.load_model if whole_run else "")
    sidecar = read_sidecar(checkpoint_file(trained)) if trained else None
    return find_templates(flags.template or (sidecar and sidecar.template) or "world")[0].template


def opened_model(flags: Namespace) -> tuple[RWKV, Tokenizer]:
    """The model of --load_model, with --load_adapter over it, and its tokenizer. Raises ValueError."""
    known = adapter_flags(flags)
    log.info("%s is being read", flags.load_adapter or flags.load_model)  # minutes, for a large one
    with hinting(ADAPTER_HINTS):
        return open_model(
            flags.load_model,
            flags.load_adapter,
            flags.strategy,
            flags.vocab_file,
            scaling=known.scaling,
            alpha=known.alpha,
            initial_file=flags.load_adapter_pissa_init,
            cold=flags.load_cold_adapter,
            quant=flags.quant_mode,
        )


def flags_of(flags: Namespace, path: str) -> Namespace:
    """The flags that open another model: a whole one, the folder of a run, or a checkpoint over its base.

    Raises ValueError when it is not there.
    """
    named = named_model(path, [flags.load_model])
    changed = vars(flags) | {"load_model": str(named.base), "load_adapter": str(named.adapter or "")}
    nothing = {"lora_scaling": None, "lora_alpha": None, "load_adapter_pissa_init": "", "load_cold_adapter": ""}
    return Namespace(**changed | nothing)


def reading_of(flags: Namespace) -> Reading:
    """What these flags say."""
    return Reading(flags.format, flags.thinking == "drop")


def vocabulary_size(model: str, given: int) -> int:
    """The checkpoint's vocabulary size, or the flag's, or World's; ValueError when checkpoint and flag disagree."""
    if model in ("", "0"):
        return given or WORLD_SIZE
    found = sizes_of(read_tensors(model)).vocab_size
    if given and given != found:
        raise ValueError(f"--vocab_size {given}, but {model} has a vocabulary of {found}")
    return found
