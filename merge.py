"""Make one model of a base model and a checkpoint of training.

python merge.py --base_model B --lora_checkpoint A --output O
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from src.cli import Parser, run
from src.model.checkpoint import file_sizes, read_tensors, write_atomic
from src.training.merging import check_base, check_merged, chosen_quant, hinting, layout_of, merged_tensors
from src.training.sidecar import read_sidecar, sidecar_path

log = logging.getLogger(__name__)

SUFFIXES = (".pth", ".safetensors")
# what to do about a mismatch of base, checkpoint and flags
HINTS = {
    "base": "give the right --base_model, or --force 1 to go on",
    "storage": "leave --quant out, or --force 1 to merge otherwise",
    "mode": "leave --type out",
    "scaling": "leave --lora_scaling out",
    "alpha": "leave --lora_alpha out",
    "no scaling": "--lora_scaling (alpha / rank) or --lora_alpha",
}


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = Parser("Merge a checkpoint of training into its base model.", prog="merge.py")
    parser.add_argument("--base_model", required=True, help="the model that training started from")
    parser.add_argument("--lora_checkpoint", required=True, help="what training saved: rwkv-<n>.pth")
    parser.add_argument("--output", required=True, help="the merged model, .pth or .safetensors")
    parser.add_argument("--type", help="adapter, when there is no sidecar (rwkv-<n>.json) [lora]")
    parser.add_argument("--lora_init", help="first factors of old PiSSA checkpoints")
    parser.add_argument("--lora_scaling", type=float, help="alpha / rank, needed when there is no sidecar")
    parser.add_argument("--lora_alpha", type=float, help="instead of --lora_scaling")
    parser.add_argument("--quant", help="storage of the frozen matrices in training [the sidecar's, else none]")
    parser.add_argument("--device", default="auto", help="where to compute: auto, cpu, cuda")
    parser.add_switch("--force", help="go on although base model or storage are not those of the training")
    return parser.parse_args(words)


def check_paths(output: Path, *inputs: Path) -> None:
    """Refuse an output that is one of the inputs, has an unknown suffix or cannot be put where it should go."""
    if output.suffix not in SUFFIXES:
        raise ValueError(f"--output {output}: the name must end in {' or '.join(SUFFIXES)}")
    for path in inputs:
        if output.resolve() == path.resolve() or (output.exists() and path.exists() and output.samefile(path)):
            raise ValueError(f"--output {output} is an input of this merge: give another name")
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}")


def chosen_device(name: str) -> str:
    """`auto` is the GPU if there is one; a GPU that is not there is replaced by the CPU with one notice."""
    if name.split(":")[0] not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {name}: must be auto, cpu or cuda")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        log.warning("--device %s: there is no such GPU, computing on the CPU", name)
        return "cpu"
    return name


def main(words: Sequence[str]) -> int:
    args = parse(words)
    base_path, adapter_path, output = Path(args.base_model), Path(args.lora_checkpoint), Path(args.output)
    check_paths(output, base_path, adapter_path, sidecar_path(adapter_path))
    if args.lora_init:
        raise ValueError(f"--lora_init {args.lora_init}: only PiSSA has first factors, and it is not built yet")
    device = chosen_device(args.device)
    file_sizes(base_path)  # a base that is no RWKV model is refused before anything is hashed
    base, adapter = read_tensors(base_path), read_tensors(adapter_path)
    sidecar = read_sidecar(adapter_path)
    said = {"mode": args.type, "scaling": args.lora_scaling, "alpha": args.lora_alpha}
    with hinting(HINTS):
        check_base(sidecar, base_path, force=args.force)
        quant = chosen_quant(sidecar, args.quant, force=args.force)
        layout = layout_of(adapter, sidecar, quant=quant, **said)
    merged = merged_tensors(base, adapter, layout, source=adapter_path, device=device)
    difference, allowed = check_merged(base, adapter, layout, merged)
    print(f"check: logits of merged and base + adapter differ by at most {difference:.1e} of their range")
    if not difference <= allowed and not args.force:
        raise RuntimeError(
            f"the merged model differs by more than rounding explains ({allowed:.0e}): nothing was written"
        )
    write_atomic(merged, output)
    plain = f"{len(layout.adapted)} adapters and {len(layout.trained)} tensors"
    print(f"merged {plain} into {base_path.name} ({quant} while training): {output}")
    return 0


if __name__ == "__main__":
    run(main)
