"""The flags of `merge`, and which sets of them name a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from rwkv_rlhf.commands.flag_groups import add_trained_template_flag, add_vocabulary_flag
from rwkv_rlhf.files import MODEL_SUFFIXES
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.command_line import Parser
from rwkv_rlhf.settings.exports import EXPORTS, ExportFacts

SUFFIXES = tuple(MODEL_SUFFIXES.values())
# of files for other programs: the export that writes them
EXPORTED = {
    suffix: name
    for name, facts in EXPORTS.items()
    if facts.target
    for suffix in facts.target.suffixes
    if suffix not in SUFFIXES
}
OUTPUT_HELP = f"the merged model: {', '.join(SUFFIXES)}, or for another program {', '.join(EXPORTED)}"


class Tasks(Parser):
    """Also refuses a set of flags that names no task."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parses `args`; raises UsageError or ValueError. `exports`: the forms in which the adapter is written."""
        found = super().parse_args(args, namespace)
        found.exports = [name for name in adapter_exports() if getattr(found, f"to_{name}")]
        wanted = {
            "base_model": not found.exports,
            "lora_checkpoint": not found.from_peft,
            "output": not found.exports,
        }
        for name, needed in wanted.items():
            if needed and not getattr(found, name):
                raise ValueError(f"--{name} is missing; see --help")
        storages = (tables.DENSE, *tables.STORAGES)
        if found.quant is not None and found.quant not in storages:
            raise ValueError(f"--quant {found.quant}: must be one of {', '.join(storages)}")
        if (found.from_peft and found.lora_checkpoint) or (found.exports and (found.output or found.from_peft)):
            flags = ", ".join(f"--to_{name}" for name in found.exports or adapter_exports())
            raise ValueError(f"--from_peft goes with --output, {flags} with --lora_checkpoint: one task at a time")
        if found.dense and (found.exports or found.from_peft):
            raise ValueError(
                "--dense 1 is about merging an adapter into its base, which --to_... and --from_peft do not"
            )
        told = [f"--{name}" for name in ("template", "vocab_file") if getattr(found, name)]
        if told and not found.output.endswith(tuple(EXPORTED)):
            known = " or ".join(EXPORTED)
            raise ValueError(f"{' and '.join(told)}: only a file for another program holds it, --output in {known}")
        if found.device.split(":")[0] not in ("auto", "cpu", "cuda"):
            raise ValueError(f"--device {found.device}: must be auto, cpu or cuda")
        if found.output and not found.output.endswith(SUFFIXES if found.from_peft else (*SUFFIXES, *EXPORTED)):
            known = ", ".join((*SUFFIXES, *EXPORTED))
            raise ValueError(f"--output {found.output}: the name must end in one of {known}")
        return found


Flags = TypeVar("Flags", bound=Tasks)


def parser() -> Tasks:
    """The flags of this script."""
    return add_flags(Tasks("Merge a checkpoint of training into its base model."))


def add_flags(flags: Flags) -> Flags:
    """Adds them."""
    flags.add_path("--base_model", holds="model", default="", help="the model that training started from")
    text = "what training saved: rwkv-<n>.pth, or a run's folder"
    flags.add_path("--lora_checkpoint", holds="model", default="", help=text)
    flags.add_argument("--output", default="", help=OUTPUT_HELP)
    flags.add_argument("--type", help="adapter, when there is no sidecar (rwkv-<n>.json) [what its tensors say]")
    text = "PiSSA's initial factors, if they are not beside the checkpoint"
    flags.add_path("--lora_init", holds="model", default="", help=text)
    text = "adapter merged below it, if it is not where it was"
    flags.add_path("--load_cold_adapter", holds="model", default="", help=text)
    flags.add_argument("--lora_scaling", type=float, help="alpha / rank, needed when there is no sidecar")
    flags.add_argument("--lora_alpha", type=float, help="instead of --lora_scaling")
    flags.add_argument("--quant", help="storage of the frozen matrices in training [the sidecar's, else none]")
    flags.add_switch("--dense", help="merge over the base as it is in its file, though training had it packed")
    flags.add_argument("--layer_filter", default="", help='what to merge, e.g. "0-3 0.2*4-24 head" [everything]')
    for name, facts in adapter_exports().items():
        flags.add_argument(f"--to_{name}", default="", help=f"write the adapter there: {facts.help}")
    text = "folder of a PEFT adapter to write as a checkpoint"
    flags.add_path("--from_peft", holds="model", default="", help=text)
    add_trained_template_flag(flags)
    add_vocabulary_flag(flags)
    flags.add_argument("--device", default="auto", help="where to compute: auto, cpu, cuda")
    flags.add_switch("--force", help="go on although base model or storage are not those of the training")
    return flags


def adapter_exports() -> dict[str, ExportFacts]:
    """The forms of an adapter alone."""
    return {name: facts for name, facts in EXPORTS.items() if facts.target is None}
