"""Folders in Hugging Face's layout for RWKV-7 (`hf_layout.py`): for transformers, flash-linear-attention, MLX.

    model.safetensors, or shards with their index    config.json    generation_config.json
    tokenizer_config.json    rwkv_vocab.txt    tokenization_rwkv_trie.py    chat_template.jinja

A trie vocabulary needs a tokenizer of its own, which transformers loads from the folder (trust_remote_code); one in
tokenizer.json's form is there instead of both files.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv_rlhf.checkpoints.exporters.byte_pairs import mark_of, without_additions
from rwkv_rlhf.checkpoints.exporting import (
    DTYPES,
    ExportedModel,
    ExportOptions,
    Part,
    Tensors,
    Vocabulary,
    made_one_by_one,
)
from rwkv_rlhf.checkpoints.hf_layout import hf_name, hf_tensor
from rwkv_rlhf.checkpoints.shards import write_shards
from rwkv_rlhf.files import atomic_write, write_json
from rwkv_rlhf.model.sizes import Sizes

TOKENIZER = "tokenization_rwkv_trie.py"
MARKS = ("bos_token", "eos_token", "pad_token")  # id 0 is all of them


def write_hf(model: ExportedModel, folder: Path, options: ExportOptions) -> None:
    """Write `model` into the empty `folder`. Raises OSError."""
    parts = [*parts_of(model.shapes, options.dtype)]
    shapes = {part.name: part.made(model.shapes) for part in parts}
    write_shards(shapes, made_one_by_one(parts, model), folder, "model", options.shard_size)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in shapes.values()}
    write_json(folder / "config.json", config_of(model.sizes, dtypes.pop() if len(dtypes) == 1 else "float32"))
    write_vocabulary(folder, model.vocabulary, model.sizes.vocab_size)


def parts_of(tensors: Tensors, dtype: str) -> list[Part]:
    """Every tensor that has a place there."""
    kind = DTYPES[dtype] if dtype else None
    return [Part(theirs, make_of(name), kind) for name in tensors if (theirs := hf_name(name))]


def make_of(name: str) -> Any:
    """How the tensor `name` of this program becomes theirs."""
    return lambda tensors: hf_tensor(name, tensors[name])


def config_of(sizes: Sizes, dtype: str) -> dict[str, Any]:
    """config.json, by the names of flash-linear-attention's RWKV7Config."""
    C = sizes.n_embd
    return {
        "model_type": "rwkv7",
        "architectures": ["RWKV7ForCausalLM"],
        "vocab_size": sizes.vocab_size,
        "hidden_size": C,
        "num_hidden_layers": sizes.n_layer,
        "head_dim": sizes.head_size,
        "num_heads": sizes.n_head,
        "intermediate_size": sizes.dim_ffn,
        "hidden_ratio": sizes.dim_ffn / C,
        "hidden_act": "sqrelu",
        "decay_low_rank_dim": sizes.low_rank["w"],
        "gate_low_rank_dim": sizes.low_rank["g"],
        "a_low_rank_dim": sizes.low_rank["a"],
        "v_low_rank_dim": sizes.low_rank["v"],
        "value_dim": [C] * sizes.n_layer,
        "norm_eps": 1e-5,
        "norm_bias": True,
        "norm_first": True,
        "attn_mode": "chunk",
        "attn": None,
        "fuse_norm": False,
        "max_position_embeddings": 1 << 20,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def write_vocabulary(folder: Path, vocabulary: Vocabulary, vocab_size: int) -> None:
    """The vocabulary, its tokenizer, what ends an answer, and the chat template."""
    about = write_file(folder, vocabulary.tokenizer) if vocabulary.tokenizer else write_words(folder, vocabulary.words)
    about |= {"model_vocab_size": vocab_size, "clean_up_tokenization_spaces": False}
    if vocabulary.chat_template:
        about["chat_template"] = vocabulary.chat_template
        with atomic_write(folder / "chat_template.jinja") as file:
            file.write(vocabulary.chat_template.encode())
    write_json(folder / "tokenizer_config.json", about)
    ends = [0, *vocabulary.end] if len(vocabulary.end) == 1 else [0]
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": ends, "pad_token_id": 0})


def write_words(folder: Path, words: Mapping[int, bytes]) -> dict[str, Any]:
    """A trie vocabulary and the program that reads it; returns what tokenizer_config.json says of them."""
    lines = (f"{number} {word!r} {len(word)}\n" for number, word in sorted(words.items()))
    with atomic_write(folder / "rwkv_vocab.txt") as file:
        file.write("".join(lines).encode())
    shutil.copyfile(Path(__file__).with_name(TOKENIZER), folder / TOKENIZER)
    return {
        "tokenizer_class": "RwkvTrieTokenizer",
        "auto_map": {"AutoTokenizer": [f"{TOKENIZER.removesuffix('.py')}.RwkvTrieTokenizer", None]},
        **dict.fromkeys(MARKS, "<|endoftext|>"),
    }


def write_file(folder: Path, tokenizer: str) -> dict[str, Any]:
    """A tokenizer.json as it is; returns what tokenizer_config.json says of it."""
    with atomic_write(folder / "tokenizer.json") as file:
        file.write(without_additions(tokenizer).encode())
    mark = mark_of(tokenizer, 0)
    return {"tokenizer_class": "PreTrainedTokenizerFast"} | (dict.fromkeys(MARKS, mark) if mark else {})
