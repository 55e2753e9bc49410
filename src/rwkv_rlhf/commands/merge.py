"""Make one model of a base model and a checkpoint of training, or take an adapter to the PEFT library and back.

python merge.py --base_model B --lora_checkpoint A --output O
python merge.py --base_model B --lora_checkpoint A --to_peft DIR
python merge.py --base_model B --from_peft DIR --output A
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rwkv_rlhf.checkpoints.adapter_files import (
    AdapterFile,
    AdapterFlags,
    check_base,
    cold_of,
    factors_path,
    hinting,
    open_adapter,
)
from rwkv_rlhf.checkpoints.exporters.peft import CONFIG, TENSORS, from_peft_folder
from rwkv_rlhf.checkpoints.loading import file_sizes
from rwkv_rlhf.checkpoints.merge_shares import MergeShares, parse_merge_shares
from rwkv_rlhf.checkpoints.merging import Merged, base_reader, check_merged, moved_by_packing, over_dense
from rwkv_rlhf.checkpoints.named_model import checkpoint_file
from rwkv_rlhf.checkpoints.sidecar import sidecar_path
from rwkv_rlhf.checkpoints.tensor_files import write_tensors
from rwkv_rlhf.commands import export
from rwkv_rlhf.commands.parsers.merge import EXPORTED, parser
from rwkv_rlhf.files import bytes_of
from rwkv_rlhf.layers.placing import Layout
from rwkv_rlhf.plan import is_state
from rwkv_rlhf.reports.words import command, pasted, size
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.counted import counted
from rwkv_rlhf.settings.exit_status import Failure
from rwkv_rlhf.settings.exports import EXPORTS
from rwkv_rlhf.settings.implementations import load

log = logging.getLogger(__name__)

# what to do about a mismatch of base, checkpoint and flags
HINTS = {
    "base": "give the right --base_model, or --force 1 to go on",
    "storage": "leave --quant out, or --force 1 to merge otherwise",
    "mode": "leave --type out",
    "scaling": "leave --lora_scaling out",
    "alpha": "leave --lora_alpha out",
    "no scaling": "--lora_scaling (alpha / rank) or --lora_alpha",
    "factors": "give the right ones with --lora_init, or --force 1 to go on",
    "cold": "--load_cold_adapter must name what was merged below it, or be left out",
}


def export_merged(args: argparse.Namespace) -> None:
    """--output for another program: what export.py does. Raises ValueError, also for flags that this does not know."""
    unknown = [f"--{name}" for name in ("type", "quant", "layer_filter", "dense") if getattr(args, name)]
    if unknown:
        raise ValueError(f"{', '.join(unknown)} with --output {args.output}: merge to .pth first, then export.py")
    words = ["--to", EXPORTED[Path(args.output).suffix], "--output", args.output]
    same = {"load_model": args.base_model, "load_adapter": args.lora_checkpoint, "lora_scaling": args.lora_scaling}
    same |= {"lora_alpha": args.lora_alpha, "load_adapter_pissa_init": args.lora_init}
    same |= {"load_cold_adapter": args.load_cold_adapter, "force": "1" if args.force else ""}
    same |= {"template": args.template, "vocab_file": args.vocab_file}
    words += [word for name, value in same.items() if value not in (None, "") for word in (f"--{name}", str(value))]
    export.main(words)


def check_inputs(flag: str, output: Path, *inputs: Path) -> None:
    """Refuse to write `output` over one of the inputs; `flag` is what to change."""
    for path in inputs:
        if output.resolve() == path.resolve() or (output.exists() and path.exists() and output.samefile(path)):
            raise ValueError(f"{flag}: {output} is an input of this merge: give another name")


def check_paths(output: Path, *inputs: Path) -> None:
    """Refuse an output that is one of the inputs or cannot be put where it should go."""
    check_inputs(f"--output {output}", output, *inputs)
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}")


def chosen_device(name: str) -> str:
    """`auto` is the GPU if there is one; a GPU that is not there is replaced by the CPU with one notice."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        log.warning("--device %s: there is no such GPU, computing on the CPU", name)
        return "cpu"
    return name


def opened(args: argparse.Namespace) -> AdapterFile:
    """--lora_checkpoint with what the flags say of it, checked against --base_model. Raises ValueError."""
    flags = AdapterFlags(args.type, args.lora_scaling, args.lora_alpha, args.quant)
    with hinting(HINTS):
        file = open_adapter(args.lora_checkpoint, flags, initial_file=args.lora_init, force=args.force)
        if args.base_model:
            check_base(file.sidecar, args.base_model, force=args.force)
    return file


def merge(args: argparse.Namespace) -> None:
    """Write the merged model, once its logits are those of base and adapter together."""
    base_path, adapter_path, output = Path(args.base_model), Path(args.lora_checkpoint), Path(args.output)
    named = [Path(path) for path in (args.lora_init, args.load_cold_adapter) if path]
    check_paths(output, base_path, adapter_path, sidecar_path(adapter_path), *named)
    device = chosen_device(args.device)
    sizes = file_sizes(base_path)  # a base that is no RWKV model is refused before anything is hashed
    shares = parse_merge_shares(args.layer_filter, sizes.n_layer) if args.layer_filter else MergeShares()
    file = opened(args)
    with hinting(HINTS):
        cold = cold_of(adapter_path, file.sidecar, args.load_cold_adapter, force=args.force)
        found = [factors_path(adapter_path, file.sidecar)] if file.initial else []
        check_inputs(f"--output {output}", output, *found, *([cold] if cold else []))
        base = base_reader(base_path, cold, device, force=args.force)()
    base = dict(base) if isinstance(base, Merged) else base
    trained, file = file, over_dense(file) if args.dense else file
    merged = dict(Merged(base, file, device=device, shares=shares))
    difference, allowed = check_merged(base, file, merged, shares)
    if shares.whole:
        print(f"check: logits of merged and base + adapter differ by at most {difference:.1e} of their range")
    else:
        print("check: logits are finite; with --layer_filter there is no trained model to compare with")
    if not difference <= allowed and not args.force:
        raise Failure(f"the merged model differs by more than rounding explains ({allowed:.0e}): nothing was written")
    write_tensors(merged, output)
    layout = shares.of_layout(trained.layout)
    if layout.packed and not args.dense:
        print(packing_sentence(base, layout, merged))
    elif layout.packed and shares.whole:
        difference = check_merged(base, trained, merged, shares).found
        print(f"--dense 1: logits of merged and what was trained over {layout.store} differ by {difference:.1e}")
    plain = f"{counted(len(layout.adapted), 'adapter')} and {counted(len(layout.trained), 'tensor')}"
    over = f", trained over {layout.store}" if layout.packed else ""
    print(f"merged {plain}{over}: {base_path} + {adapter_path} -> {output} ({size(bytes_of(output))})")
    scores = f"{tables.LOSSES['rm'].scalar_head}.weight" in merged
    name, more = ("score", " --input ANSWERS --output REWARDS") if scores else ("chat", "")
    print(f"next: {command(name)} --load_model {pasted([str(output)])}{more}")
    states = {name.split(".")[-1] for name in layout.trained if is_state(name)}
    if states and (not tables.VERSIONS[sizes.version].starts_from_file or states != {"time_state"}):
        print("note: the rwkv package begins from learnt states of RWKV-5.2 and 6 files only, and not token-shift ones")


def packing_sentence(base: Mapping[str, Tensor], layout: Layout, merged: Mapping[str, Tensor]) -> str:
    """What the storage of training did to matrices that nothing trained, and how to leave it out."""
    moved = moved_by_packing(base, layout, merged)
    if not moved.matrices:
        return f"packing: matrices are merged as {layout.store} rounds them; --dense 1 merges over the base as it is"
    matrices = counted(moved.matrices, "matrix", "matrices")
    return (
        f"packing: {matrices} without an adapter moved by {moved.mean:.1%} (RMS), at most "
        f"{moved.largest:.1%} ({moved.name}), as {layout.store} rounds them; --dense 1 merges over the base as it is"
    )


def main(words: Sequence[str]) -> int:
    """Merges a checkpoint, or carries one to another program's form or back. Raises ValueError."""
    run(parser().parse_args(words))
    return 0


def run(args: argparse.Namespace) -> None:
    """The one task that the parsed flags name. Raises ValueError."""
    if args.lora_checkpoint and Path(args.lora_checkpoint).is_dir():
        args.lora_checkpoint = str(checkpoint_file(args.lora_checkpoint))
    for name in args.exports:
        facts, folder = EXPORTS[name], Path(getattr(args, f"to_{name}"))
        for file in [folder / file for file in facts.files] or [folder]:
            check_inputs(f"--to_{name} {folder}", file, Path(args.lora_checkpoint))
        print(load(facts.implementation)(opened(args), folder, force=args.force))
    if args.from_peft:
        folder, base, output = Path(args.from_peft), Path(args.base_model), Path(args.output)
        inputs = (base, sidecar_path(base), folder / TENSORS, folder / CONFIG)
        check_paths(output, *inputs)
        check_inputs(f"--output {output}", sidecar_path(output), *inputs)
        print(from_peft_folder(folder, base, output, args.quant or "none"))
    elif args.output and Path(args.output).suffix in EXPORTED:
        export_merged(args)
    elif not args.exports:
        merge(args)
