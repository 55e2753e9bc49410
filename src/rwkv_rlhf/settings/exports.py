"""The table of exports: forms of adapters and of whole models for other programs. No torch, as in tables.py.

`implementation` and `judge` are imported and run where they are used; the commands export and merge follow from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class TargetFacts:
    """What another program can hold of a whole model, and who judges what was written for it.

    versions, head_sizes: those that it runs, () = all. dtypes: of the matrices (the first is the usual one; "" = as
    they are). suffixes: of the file that is written, () = a folder; of several the implementation
    chooses, and writes all or nothing by itself. needs: the package that writes it. judge: a program
    of checkpoints/judges/ that runs the result, and judge_needs the packages that this needs, with their modules.
    states: whether learnt initial states have a place in it. blocks: the fewest that it takes. vocabulary: whether it
    holds words and chat template.
    """

    versions: tuple[str, ...]
    head_sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    suffixes: tuple[str, ...] = ()
    needs: str = ""
    judge: str = ""
    judge_needs: Mapping[str, str] = field(default_factory=dict)
    states: bool = False
    blocks: int = 1
    vocabulary: bool = True


@dataclass(frozen=True)
class ExportFacts:
    """A form for another program: of an adapter, or with a `target` of a whole model.

    implementation: (adapter, path, force) -> a sentence, or with a target (model, path, options), which only writes.
    files: what an adapter's writes into a folder; () = `path` is the file.
    """

    help: str
    implementation: str
    files: tuple[str, ...] = ()
    target: TargetFacts | None = None


LLAMA_HEADS = (64, 128)  # those of llama.cpp's kernels on GPUs
HF_FOLDER = TargetFacts(
    versions=("x070",),
    head_sizes=(64,),
    dtypes=("", "f32", "f16", "bf16"),
    judge="transformers_rwkv7.py",
    judge_needs={"rwkv7-hf": "rwkv7_hf", "transformers": "transformers"},
)
EXPORTS: dict[str, ExportFacts] = {
    "peft": ExportFacts(
        "as the PEFT library has it",
        ".checkpoints.exporters.peft:to_peft_folder",
        ("adapter_model.safetensors", "adapter_config.json"),
    ),
    "hf": ExportFacts(
        "the layout of Hugging Face and flash-linear-attention: a folder for transformers",
        ".checkpoints.exporters.hf:write_hf",
        target=HF_FOLDER,
    ),
    "gguf": ExportFacts(
        "one file for llama.cpp and what is built on it",
        ".checkpoints.exporters.gguf:write_gguf",
        target=TargetFacts(
            versions=("x060", "x070"),
            head_sizes=LLAMA_HEADS,
            dtypes=("f16", "f32", "bf16", "q8_0"),
            suffixes=(".gguf",),
            needs="gguf",
            judge="llama_cpp.py",
            judge_needs={"xllamacpp": "xllamacpp"},
        ),
    ),
    "gguf_lora": ExportFacts(
        "an adapter of LoRA or PiSSA for llama.cpp's --lora", ".checkpoints.exporters.gguf_lora:to_gguf_lora"
    ),
    "mlx": ExportFacts(
        "the same folder as hf, for mlx-lm on Apple's processors",
        ".checkpoints.exporters.hf:write_hf",
        target=replace(HF_FOLDER, judge="mlx_lm_rwkv7.py", judge_needs={"mlx-lm": "mlx_lm", "mlx": "mlx"}),
    ),
    "rwkv": ExportFacts(
        "as this program and RWKV-LM have it: back from Hugging Face's layout, merged, in another type or in shards",
        ".checkpoints.exporters.rwkv:write_rwkv",
        target=TargetFacts(
            versions=(),
            head_sizes=(),
            dtypes=("", "f32", "f16", "bf16"),
            suffixes=(".pth", ".safetensors", ".safetensors.index.json"),
            states=True,
            vocabulary=False,
        ),
    ),
    "web_rwkv": ExportFacts(
        "one file for web-rwkv and Ai00",
        ".checkpoints.exporters.web_rwkv:write_web_rwkv",
        target=TargetFacts(
            versions=("x060", "x070"), head_sizes=(64,), dtypes=("f16",), suffixes=(".st",), blocks=2, vocabulary=False
        ),
    ),
}
