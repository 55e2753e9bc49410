"""`--help` of train.py: every flag in groups, and `--help GROUP` or `--help FLAG` in full.

What is said of a flag is derived from its setting: text, default, range, choices (with the tables' words for each)
and an example.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any

from rwkv_rlhf.settings import policy_tables, tables
from rwkv_rlhf.settings.config import settings
from rwkv_rlhf.settings.field import LIMITS, choices_of
from rwkv_rlhf.settings.flags import ALIASES, FLAG_OF, LEGACY
from rwkv_rlhf.settings.formats import FORMATS, names_of_formats
from rwkv_rlhf.settings.groups import GROUPS, grouped_settings
from rwkv_rlhf.settings.optimizers import OPTIMIZERS
from rwkv_rlhf.settings.shapes import SHAPES

# setting -> the table that explains its choices
EXPLAINED: dict[str, Mapping[str, Any]] = {
    "version": tables.VERSIONS,
    "strategy": tables.STRATEGIES,
    "quant_mode": tables.STORAGES,
    "peft": tables.ADAPTERS,
    "data_type": FORMATS,
    "format": SHAPES,
    "optim": OPTIMIZERS,
    "wkv_backend": tables.BACKENDS,
    "products": tables.PRODUCTS,
    "grpo_loss": policy_tables.GRPO_LOSSES,
    "grpo_advantage": policy_tables.ADVANTAGES,
    "grpo_scale": policy_tables.SCALES,
}
# setting -> a value for the example, where the default says too little
EXAMPLES = {
    "load_model": "RWKV-x070-1B5.pth",
    "load_adapter": "out/rwkv-3.pth",
    "load_adapter_pissa_init": "out/pissa-init-0123456789ab.pth",
    "load_cold_adapter": "first/rwkv-final.pth",
    "n_layer": "24",
    "n_embd": "2048",
    "vocab_size": "65536",
    "dim_att": "2048",
    "dim_ffn": "8192",
    "random_seed": "1",
    "proj_dir": "out/dpo",
    "wandb": "my-project",
    "devices": "2",
    "num_nodes": "2",
    "timeout": "10",
    "resume": "auto",
    "dry_run_shape": "L61-D4096",
    "my_exit_tokens": "1000000000",
    "warmup_steps": "100",
    "weight_decay_final": "0.001",
    "layer_profile": "layerprofile/24_TEST.csv",
    "lora_layers": '"0-3 25-31"',
    "lora_parts": "att,ffn",
    "initial_ctx_len": "512",
    "smoothing": "0.005",
    "dpo_alpha": "0.1",
    "dpo_beta": "0.1",
    "reference_model": "base.pth",
    "teacher_model": "large.pth",
    "reward_model": "out/rm/rwkv-final.pth",
    "reward_funcs": "rewards.py:exact,format",
    "reward_weights": "1,0.5",
    "grpo_epsilon_high": "0.28",
    "grpo_delta": "4",
    "grpo_overlong_buffer": "256",
    "grpo_dynamic": "4",
    "entropy_coef": "0.001",
    "data_file": "example/SFT/chats.jsonl",
    "pair_file": "example/DPO/output_save/pairs.save",
    "vocab_file": "tokenizer.json",
    "template": "g1",
    "val_file": "example/DPO/heldout.csv",
    "val_split": "0.1",
    "chunk_ctx": "1024",
    "ctx_parts": "8",
    "lora_r": "16",
    "keep": "3",
}


def flag_of(name: str) -> str:
    """The flag, with dashes, that sets the field `name` of Config."""
    return "--" + FLAG_OF.get(name, name)


def default_of(field: dataclasses.Field[Any]) -> str:
    """The default as it would be typed, "" for none."""
    value = field.default
    if value is None or value == "":
        return ""
    return str(int(value)) if isinstance(value, bool) else str(value)


def text_of(field: dataclasses.Field[Any]) -> str:
    """The help text of a setting, with the formats that it speaks of."""
    text = str(field.metadata["help"])
    return re.sub(r"\[(text|pairs)\]", lambda match: ", ".join(names_of_formats(match[1])), text)


def range_of(field: dataclasses.Field[Any]) -> str:
    """The legal range of a number, such as ">= 0 and < 1"; "" for none."""
    return " and ".join(f"{words} {field.metadata[limit]}" for limit, words, _ in LIMITS if limit in field.metadata)


def short_help(name: str) -> str:
    """One line for the list of flags: text, choices and default."""
    field = settings()[name]
    choices = [str(choice) for choice in choices_of(field) if choice != ""]
    text = text_of(field) + (f" ({', '.join(choices)})" if choices else "")
    return text + (f" [{default_of(field)}]" if default_of(field) else "")


def loss_help(loss: str) -> str:
    """One line for the flag of a loss."""
    return f"train with this loss: {tables.LOSSES[loss].help}"


def example_of(name: str, kind: type) -> str:
    """The flag with a value that is legal and not the default, where there is one."""
    field = settings()[name]
    if name in EXAMPLES:
        return f"{flag_of(name)} {EXAMPLES[name]}"
    others = [choice for choice in choices_of(field) if choice not in ("", field.default)]
    if others:
        return f"{flag_of(name)} {others[0]}"
    if kind is bool:
        return f"{flag_of(name)} {int(not field.default)}"
    return f"{flag_of(name)} {default_of(field) or 'X'}"


def explain(word: str, kinds: Mapping[str, type]) -> str:
    """The text of `--help word`: a group, a flag (with or without dashes), or a loss. kinds: the type of each setting.

    Sentences write `{name}` for flags. Raises ValueError with the nearest words for any other.
    """
    plain = word.lstrip("-")
    fields = {flag: name for name, flag in FLAG_OF.items()} | ALIASES
    if plain in GROUPS and plain not in tables.LOSSES:
        names = grouped_settings()[plain]
        lines = [f"{plain}: {GROUPS[plain].help}", ""]
        lines += [f"  {flag_of(name):34}{short_help(name)}" for name in names if name != "loss"]
        if "loss" in names:
            lines[2:2] = [f"  --{loss:32}{loss_help(loss)}" for loss in tables.LOSSES]
        return "\n".join(lines)
    if plain in tables.LOSSES:
        own = tables.LOSSES[plain].settings
        lines = [f"--{plain} 1   {loss_help(plain)}"]
        return "\n".join([*lines, *(f"  {flag_of(name):34}{short_help(name)}" for name in own)])
    name = fields.get(plain, plain)
    if name in settings():
        return _explain_setting(name, kinds[name])
    if plain in LEGACY:
        old = LEGACY[plain]
        return f"--{plain}: a flag of older programs, accepted without effect" + (
            f" with the values {', '.join(old.harmless)}; else: {old.instead}" if old.harmless else ""
        )
    known = [*GROUPS, *tables.LOSSES, *fields, *settings()]
    near = ", ".join(difflib.get_close_matches(plain, known, n=3, cutoff=0.5))
    nearest = f"; near it: {near}" if near else ""
    raise ValueError(f"--help {word}: there is no such group or flag{nearest}; the groups are {', '.join(GROUPS)}")


def _explain_setting(name: str, kind: type) -> str:
    field = settings()[name]
    other = [f"--{alias}" for alias, target in ALIASES.items() if target == name]
    lines = [f"{flag_of(name)}   {text_of(field)}"]
    lines += [f"  also:     {', '.join(other)}"] if other else []
    lines += [f"  default:  {default_of(field) or 'none'}"]
    lines += [f"  range:    {range_of(field)}"] if range_of(field) else []
    if kind is bool:
        lines += ["  values:   0 or 1; the bare flag means 1"]
    for choice in choices_of(field):
        if choice != "":
            facts = EXPLAINED.get(name, {}).get(str(choice))
            said = f"  {facts.help}" if facts is not None else ""
            lines += [f"    {choice:24}{said}".rstrip()]
    losses = [loss for loss, facts in tables.LOSSES.items() if name in facts.settings]
    lines += [f"  only with: {', '.join(f'--{loss} 1' for loss in losses)}"] if losses else []
    lines += [f"  resumed:  {field.metadata['resume'].value}"]
    return "\n".join([*lines, f"  example:  {example_of(name, kind)}"])
