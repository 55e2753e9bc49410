"""Adapters as folders of the PEFT library: `adapter_model.safetensors` beside `adapter_config.json`."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from rwkv_rlhf.checkpoints.adapter_files import AdapterFile
from rwkv_rlhf.checkpoints.exporters.peft_format import from_peft, to_peft
from rwkv_rlhf.checkpoints.loading import file_sizes, read_tensors, write_atomic
from rwkv_rlhf.checkpoints.merging import Merged
from rwkv_rlhf.checkpoints.sidecar import sidecar_of, write_checkpoint
from rwkv_rlhf.files import parse_json
from rwkv_rlhf.layers.placing import Layout
from rwkv_rlhf.layers.stores import store_class

log = logging.getLogger(__name__)

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SHOWN = 4


def to_peft_folder(file: AdapterFile, folder: Path, *, force: bool = False) -> str:
    """Write the adapters of `file` for PEFT; returns a sentence. Raises ValueError for what PEFT cannot hold.

    An adapter over a cold one means something over their merge only, and is refused unless `force`. What trained beside
    the adapters (LayerNorms, small vectors, whole matrices, states) has no place there: it is counted in a warning.
    """
    cold = Path(file.sidecar.cold_file).name if file.sidecar and file.sidecar.cold_sha256 else ""
    if cold and not force:
        raise ValueError(
            f"this adapter was trained over the cold adapter {cold}, and a PEFT adapter cannot say so: merge {cold} "
            "into the base model, use that as PEFT's base model, and give --force 1 here"
        )
    tensors, config, left = to_peft(file.tensors, file.layout.adapted, file.initial)
    if left:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        log.warning(
            "%d trained tensors have no place in a PEFT adapter and are left out: %s%s; --limited_lora 1 trains none",
            *(len(left), ", ".join(left[:SHOWN]), more),
        )
    if file.initial and file.layout.packed:
        log.warning("a PiSSA adapter over %s matrices is exact in PEFT only over the same residual", file.layout.store)
    config["base_model_name_or_path"] = file.sidecar.base_file if file.sidecar and not cold else None
    write_atomic(tensors, folder / TENSORS)
    write_atomic(json.dumps(config, indent=1) + "\n", folder / CONFIG)
    return f"{len(file.layout.adapted)} adapters for the PEFT library: {folder}"


def from_peft_folder(folder: Path, base: Path, output: Path, quant: str) -> str:
    """Write the PEFT adapter in `folder`, trained on `base`, as a checkpoint with a sidecar; returns a sentence.

    quant: how the base was stored in its training. Raises ValueError when it does not fit the base.
    """
    store_class(quant)
    path = folder / CONFIG
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--from_peft {folder}: there is no {CONFIG}") from None
    except ValueError as mistake:
        raise ValueError(f"{path} is not JSON: {mistake}") from mistake
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object")
    try:
        tensors, adapted = from_peft(read_tensors(folder / TENSORS), config)
    except ValueError as mistake:
        raise ValueError(f"--from_peft {folder}: {mistake}") from mistake
    own = {f"{layer}." for layer in adapted}
    trained = frozenset(name for name in tensors if f"{name.rpartition('.')[0]}." not in own)
    packed = frozenset(name for name in adapted if name != "emb") if quant != "none" else frozenset()
    layout = Layout(adapted, packed, trained, quant)
    sidecar = sidecar_of(file_sizes(base).version, layout, None, base)
    Merged(read_tensors(base), AdapterFile(folder, tensors, sidecar, layout, {}))  # refuses what does not fit
    write_checkpoint(tensors, sidecar, output)
    return f"{len(adapted)} adapters of {folder} for {base.name}: {output}"
