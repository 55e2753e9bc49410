"""GGUF files of whole models, as llama.cpp reads them: RWKV-6 and 7 with their vocabulary and chat template.

Written with the package `gguf`, tensor by tensor. What is no large matrix stays float32: vectors, and the factors that
decays and RWKV-6's mixes come from. Layout: llama.cpp's architectures rwkv6 and rwkv7, whose shapes are PyTorch's, read
backwards.

Legend: C width, H heads, N head size, V vocabulary.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_rlhf.checkpoints.exporters.byte_pairs import BytePairs, byte_pairs
from rwkv_rlhf.checkpoints.exporting import (
    DTYPES,
    ExportedModel,
    ExportOptions,
    Make,
    Part,
    Vocabulary,
    cast,
    flat,
    made_one_by_one,
    stacked,
    taken,
    transposed,
)
from rwkv_rlhf.model import rwkv6, rwkv7
from rwkv_rlhf.model.sizes import Sizes

log = logging.getLogger(__name__)

EPSILON = 1e-5  # of LayerNorms
CONTEXT = 1 << 20  # tokens; there is no limit, but programs ask for one
BLOCK = 32  # numbers with one scale in q8_0
# of the two-dimensional tensors: those that stay float32, and those that are too small to be packed
WIDE = re.compile(r".*\.time_mix_(w[12]|decay_w[12]|first)\.weight")
FACTORS = re.compile(r".*\.time_mix_[avg][12]\.weight")
ENDS = {"token_embd": "emb", "token_embd_norm": "blocks.0.ln0", "output_norm": "ln_out", "output": "head"}
NORMS = {"attn_norm": "ln1", "attn_norm_2": "ln2", "time_mix_ln": "att.ln_x"}


class Architecture(NamedTuple):
    """One of llama.cpp's: its name, what a file says of the sizes, and the tensors of a block beside its norms."""

    name: str
    sizes: Callable[[Any, Sizes], None]
    block: Callable[[int], Mapping[str, Make]]


def write_gguf(model: ExportedModel, path: Path, options: ExportOptions) -> None:
    """Write `model` as a GGUF file. Raises OSError."""
    import gguf

    logging.getLogger("gguf").setLevel(logging.WARNING)
    sizes = model.sizes
    architecture = ARCHITECTURES[sizes.version]
    writer = gguf.GGUFWriter(None, architecture.name)
    add_about(writer, model, options.dtype)
    add_sizes(writer, sizes)
    architecture.sizes(writer, sizes)
    add_vocabulary(writer, model.vocabulary, sizes.vocab_size)
    parts = [*parts_of(sizes, architecture)]
    kinds = []
    for part in parts:
        shape = part.made(model.shapes).shape
        kinds.append(kind_of(part.name, shape, options.dtype))
        ggml = gguf.GGMLQuantizationType[kinds[-1]]
        numbers, size = gguf.GGML_QUANT_SIZES[ggml]
        # the dtype of an array tells only packed ones, whose shape would be in bytes
        dtype = torch.empty(0).numpy().dtype
        writer.add_tensor_info(part.name, tuple(shape), dtype, shape.numel() // numbers * size, ggml)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for part, tensor, kind in zip(parts, made_one_by_one(parts, model), kinds, strict=True):
        writer.write_tensor_data(packed(tensor, kind, part.name))
    writer.flush()
    writer.close()


def kind_of(name: str, shape: torch.Size, dtype: str) -> str:
    """What the tensor `name` is stored as, by ggml's names."""
    if len(shape) != 2 or WIDE.fullmatch(name):
        return "F32"
    if dtype == "q8_0" and (FACTORS.fullmatch(name) or shape[-1] % BLOCK):
        return "F16"
    return dtype.upper()


def packed(tensor: Tensor, kind: str, name: str) -> Any:
    """The bytes of the tensor `name` as `kind`, as an array of numpy. Raises ValueError as `cast`."""
    import gguf

    if kind == "Q8_0":
        return gguf.quantize(tensor.float().contiguous().numpy(), gguf.GGMLQuantizationType.Q8_0)
    tensor = cast(tensor, DTYPES[kind.lower()], name).contiguous()
    return (tensor.view(torch.int16) if kind == "BF16" else tensor).numpy()


def add_about(writer: Any, model: ExportedModel, dtype: str) -> None:
    """What the file says of the model."""
    import gguf

    about = model.about
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(about.name)
    if about.licence:
        writer.add_license(about.licence)
    if about.source:
        writer.add_source_url(about.source)
    if about.base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, about.base)
    file_type = "ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def add_sizes(writer: Any, sizes: Sizes) -> None:
    """The sizes that both architectures have."""
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(sizes.n_embd)
    writer.add_block_count(sizes.n_layer)
    writer.add_feed_forward_length(sizes.dim_ffn)
    writer.add_layer_norm_eps(EPSILON)
    writer.add_wkv_head_size(sizes.head_size)
    writer.add_head_count(0)  # asked for, and not used


def add_vocabulary(writer: Any, vocabulary: Vocabulary, vocab_size: int) -> None:
    """Words with their types, the marks that end a document and an answer, and how a conversation is written."""
    import gguf

    if vocabulary.tokenizer:
        add_byte_pairs(writer, byte_pairs(vocabulary.tokenizer), vocab_size)
    else:
        words = {number: repr(word)[2:-1] for number, word in vocabulary.words.items()}
        types = dict.fromkeys(words, gguf.TokenType.NORMAL) | {0: gguf.TokenType.CONTROL}
        writer.add_tokenizer_model("rwkv")
        add_words(writer, words | {0: "<s>"}, types, vocab_size)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    if len(vocabulary.end) == 1:
        writer.add_eot_token_id(vocabulary.end[0])
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def add_words(writer: Any, words: Mapping[int, str], types: Mapping[int, Any], vocab_size: int) -> None:
    """A word for each id of the model, and what kind it is; ids without one are never produced by a text."""
    import gguf

    ids = range(vocab_size)
    writer.add_token_list([words.get(number, f"[PAD{number}]") for number in ids])
    writer.add_token_types([types.get(number, gguf.TokenType.UNUSED) for number in ids])


def add_byte_pairs(writer: Any, found: BytePairs, vocab_size: int) -> None:
    """A vocabulary of byte pairs."""
    import gguf

    if found.composes:
        log.info(
            "the vocabulary composes characters (NFC) and llama.cpp does not: e and an accent apart are other ids there"
        )
    kinds = gguf.TokenType
    marks = {number: kinds.CONTROL if special else kinds.USER_DEFINED for number, special in found.marks.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    add_words(writer, found.words, dict.fromkeys(found.words, kinds.NORMAL) | marks, vocab_size)
    writer.add_token_merges(found.merges)
    writer.add_add_bos_token(False)


def parts_of(sizes: Sizes, architecture: Architecture) -> list[Part]:
    """Every tensor of the file, block by block."""
    makes: dict[str, Make] = {}
    for theirs, own in ENDS.items():
        makes |= layer(theirs, own, bias=own not in ("emb", "head"))
    for number in range(sizes.n_layer):
        for theirs, own in NORMS.items():
            makes |= layer(f"blk.{number}.{theirs}", f"blocks.{number}.{own}", bias=True)
        makes |= {f"blk.{number}.{name}.weight": make for name, make in architecture.block(number).items()}
    return [Part(name, make) for name, make in makes.items()]


def layer(theirs: str, own: str, *, bias: bool) -> dict[str, Make]:
    """The weight of a layer, and its bias if it has one."""
    parts = ("weight", "bias") if bias else ("weight",)
    return {f"{theirs}.{part}": taken(f"{own}.{part}") for part in parts}


def sizes_of_7(writer: Any, sizes: Sizes) -> None:
    """The inner widths of RWKV-7's factors."""
    writer.add_decay_lora_rank(sizes.low_rank["w"])
    writer.add_iclr_lora_rank(sizes.low_rank["a"])
    writer.add_value_residual_mix_lora_rank(sizes.low_rank["v"])
    writer.add_gate_lora_rank(sizes.low_rank["g"])


def block_of_7(number: int) -> dict[str, Make]:
    """The tensors of a block of RWKV-7. Block 0 mixes no values: it gets copies of `a`, which are not used."""
    att, ffn = f"blocks.{number}.att.", f"blocks.{number}.ffn."
    parts: dict[str, Make] = {"time_mix_lerp_fused": stacked([att + name for name in rwkv7.ATT_MIXES])}
    for name in "wavg":
        own = att + ("a" if name == "v" and number == 0 else name)
        if name != "g":
            parts[f"time_mix_{name}0"] = flat(f"{own}0")
        parts |= {f"time_mix_{name}{n}": transposed(f"{own}{n}") for n in (1, 2)}
    parts |= {f"time_mix_{name}": flat(att + name) for name in ("k_k", "k_a", "r_k")}
    parts |= {f"time_mix_{name}": taken(f"{att}{name}.weight") for name in rwkv7.TimeMix.matrices}
    parts["channel_mix_lerp_k"] = flat(f"{ffn}x_k")
    return parts | {f"channel_mix_{name}": taken(f"{ffn}{name}.weight") for name in ("key", "value")}


def sizes_of_6(writer: Any, sizes: Sizes) -> None:
    """The inner widths of RWKV-6's factors."""
    writer.add_rescale_every_n_layers(0)
    writer.add_time_mix_extra_dim(sizes.low_rank["mix"])
    writer.add_time_decay_extra_dim(sizes.low_rank["decay"])


def block_of_6(number: int) -> dict[str, Make]:
    """The tensors of a block of RWKV-6."""
    att, ffn = f"blocks.{number}.att.", f"blocks.{number}.ffn."
    parts: dict[str, Make] = {
        "time_mix_lerp_x": flat(f"{att}time_maa_x"),
        "time_mix_lerp_fused": stacked([att + name for name in rwkv6.MIXES]),
        "time_mix_w1": transposed(f"{att}time_maa_w1"),
        "time_mix_w2": transposed(f"{att}time_maa_w2"),
        "time_mix_first": taken(f"{att}time_faaaa"),
        "time_mix_decay": flat(f"{att}time_decay"),
        "time_mix_decay_w1": transposed(f"{att}time_decay_w1"),
        "time_mix_decay_w2": transposed(f"{att}time_decay_w2"),
    }
    parts |= {f"time_mix_{name}": taken(f"{att}{name}.weight") for name in rwkv6.TimeMix.matrices}
    parts |= {f"channel_mix_lerp_{name}": flat(f"{ffn}time_maa_{name}") for name in "kr"}
    return parts | {f"channel_mix_{name}": taken(f"{ffn}{name}.weight") for name in ("key", "value", "receptance")}


ARCHITECTURES = {
    "x060": Architecture("rwkv6", sizes_of_6, block_of_6),
    "x070": Architecture("rwkv7", sizes_of_7, block_of_7),
}
