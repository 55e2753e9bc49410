"""Packages that only some commands need."""

from __future__ import annotations

import importlib.util

OPTIONAL = {  # name of the import -> what it is for, as the doctor says it
    "bitsandbytes": "packed bases, 8-bit optimizers",
    "deepspeed": "several GPUs",
    "h5py": ".h5 data",
    "pyarrow": ".parquet and .zst data",
    "wandb": "--wandb",
    "matplotlib": "curves.png",
    "gguf": "export for llama.cpp",
    "pyrwkv_tokenizer": "faster tokens",
    "starlette": "serve, label",
    "uvicorn": "serve, label",
    "huggingface_hub": "hf:// names",
    "prompt_toolkit": "editing of lines in chat",
}


def require(what: str, *packages: str) -> None:
    """Raises ValueError, with what to type, when one of `packages` (names of imports) is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        plural = "s" if len(missing) > 1 else ""
        raise ValueError(f"{what} needs the package{plural} {' and '.join(missing)}: pip install {' '.join(missing)}")
