"""LoRA and PiSSA adapters as GGUF files, which llama.cpp lays over a model while it runs (`--lora`).

Each matrix W of the model gets `W.lora_a` (r, in) and `W.lora_b` (out, r) in float32. The scale is multiplied into B,
so that ranks and scales of matrices may differ. llama.cpp applies them to the matrices of MATRICES, and nowhere else.

Legend: r rank.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from pathlib import Path

from rwkv_rlhf.checkpoints.adapter_files import AdapterFile
from rwkv_rlhf.checkpoints.exporters.gguf import ARCHITECTURES
from rwkv_rlhf.checkpoints.exporters.peft import LINEAR, PREFIX, to_peft
from rwkv_rlhf.files import atomic_path
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.counted import counted

HALVES = {"att": "time_mix", "ffn": "channel_mix"}
MATRICES = re.compile(r"blocks\.(\d+)\.(att|ffn)\.(receptance|key|value|output|gate)|head")
SHOWN = 4  # names of what has no place


def to_gguf_lora(file: AdapterFile, path: Path, *, force: bool = False) -> str:
    """Write the adapter `file` to `path`; returns a sentence. Raises ValueError, with names, for what has no place.

    force: also an adapter that was trained over a cold one, whose merge must then be the model that it is laid over.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("--to gguf_lora needs the package gguf: pip install gguf")
    import gguf

    logging.getLogger("gguf").setLevel(logging.WARNING)
    version = checked(file, force)
    peft = to_peft(file.tensors, file.layout.adapted, file.initial)
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(None, ARCHITECTURES[version].name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)  # 0: the factors are taken as they are
        writer.add_name(path.stem)
        if file.sidecar and file.sidecar.base_file:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, file.sidecar.base_file)
        for layer, how in file.layout.adapted.items():
            a, b = (peft.tensors[f"{PREFIX}{layer}.{LINEAR[part]}"].float() for part in ("lora_A", "lora_B"))
            for part, tensor in (("lora_a", a), ("lora_b", b * how.scaling)):
                writer.add_tensor(f"{gguf_matrix(layer)}.weight.{part}", tensor.contiguous().numpy())
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return f"{counted(len(file.layout.adapted), 'adapter')} for llama.cpp: {path}"


def checked(file: AdapterFile, force: bool) -> str:
    """The version of the model that it was trained on. Raises ValueError for an adapter that llama.cpp cannot apply."""
    if file.sidecar is None:
        raise ValueError(f"{file.path} has no sidecar (.json beside it), which names the version of its model")
    version = file.sidecar.version
    if version not in ARCHITECTURES:
        raise ValueError(f"--to gguf_lora holds adapters of {' and '.join(ARCHITECTURES)}, this one is of {version}")
    if file.sidecar.cold_sha256 and not force:
        cold = Path(file.sidecar.cold_file).name
        raise ValueError(
            f"{file.path} was trained over the cold adapter {cold}: export the model with {cold} merged in, and give "
            "--force 1 here"
        )
    lora = {mode for mode, facts in tables.ADAPTERS.items() if facts.peft and facts.peft.kind == "LORA"}
    lora -= {mode for mode, facts in tables.ADAPTERS.items() if facts.peft and facts.peft.use_dora}
    wrong = [
        f"{name} ({how.mode})"
        for name, how in file.layout.adapted.items()
        if how.mode not in lora or not MATRICES.fullmatch(name)
    ]
    wrong += sorted(file.layout.trained)
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(
            f"llama.cpp's adapters have no place for {', '.join(wrong[:SHOWN])}{more}: export the model with its "
            "adapter merged in (--to gguf), or train with --limited_lora 1 on the blocks' matrices"
        )
    return version


def gguf_matrix(layer: str) -> str:
    """`blocks.3.att.key` -> `blk.3.time_mix_key`."""
    if layer == "head":
        return "output"
    _, number, half, part = layer.split(".")
    return f"blk.{number}.{HALVES[half]}_{part}"
