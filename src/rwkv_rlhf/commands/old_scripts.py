"""Scripts of older programs, by their names and arguments: which words of this program's commands they stand for.

Where the first word is a flag that the old script did not have, the words are those of the command itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rwkv_rlhf.settings.counted import counted


@dataclass(frozen=True)
class OldScript:
    """How an old script is called. Source: Blealtan/RWKV-LM-LoRA, JL-er/RWKV-PEFT and BlinkDL/RWKV-LM.

    positional: the flags that its bare words stand for, in order. renamed: flags that are called otherwise here.
    added: what the old script took for granted.
    """

    positional: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)
    added: tuple[str, ...] = ()


OLD_SCRIPTS: dict[str, OldScript] = {
    "merge_lora": OldScript(("lora_alpha", "base_model", "lora_checkpoint", "output"), added=("--type", "lora")),
    "merge_pissa": OldScript(("base_model", "lora_init", "lora_checkpoint", "output"), added=("--type", "pissa")),
    "merge_bone": OldScript(added=("--type", "bone")),
    "merge_disha": OldScript(renamed={"--peft_checkpoint": "--lora_checkpoint"}),  # bone or miss, by the file
    "merge_state": OldScript(renamed={"--state_checkpoint": "--lora_checkpoint"}, added=("--type", "state")),
    "make_data": OldScript(("input", "repeats", "ctx_len")),
}
ON_GPU = "--use-gpu"


def translated(script: str, words: Sequence[str]) -> list[str]:
    """What the old `script` means by `words`, in the words of its command.

    Raises ValueError where bare words are too few or too many.
    """
    old = OLD_SCRIPTS[script]
    given = [word for word in words if word != ON_GPU]
    device = ["--device", "cuda"] if ON_GPU in words else []
    if given and not given[0].startswith("-"):
        if len(given) != len(old.positional):
            form = " ".join(name.upper() for name in old.positional) or "flags only"
            raise ValueError(f"{script}.py takes {form}, not {counted(len(given), 'word')}; see --help")
        found = [word for name, value in zip(old.positional, given, strict=True) for word in (f"--{name}", value)]
        if "output" not in old.positional:
            found += ["--output", Path(given[0]).stem]
    else:
        found = [old.renamed.get(word, word) for word in given]
        if not any(word.startswith("--") and word not in ("--help", "--version") for word in given):
            return found
    return [*found, *device, *old.added]
