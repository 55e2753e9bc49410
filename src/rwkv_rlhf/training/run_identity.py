"""Whether a run that is to be resumed is still the same one: every setting, and the files behind the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rwkv_rlhf.files import fingerprint
from rwkv_rlhf.precision import device_for
from rwkv_rlhf.settings.config import Config, settings

# what these say never reaches the weights, or the checkpoint says it too
FREE = {
    *("proj_dir", "wandb", "enable_progress_bar", "log_every", "resume", "resume_every", "dry_run", "doctor", "debug"),
    *("devices", "num_nodes", "timeout"),  # a point knows how many processes wrote it
    *("epoch_count", "epoch_save", "keep", "save_dtype", "save_format", "state_output_mode", "max_bad_steps"),
    *("version", "n_layer", "n_embd", "vocab_size", "head_size", "dim_att", "dim_ffn"),
    *("load_model", "accelerator", "state_offload", "grad_cp", "svd_niter", "eval_only"),
}
# the same mathematics in another order: the rest is as good, not the same bits
ROUNDING = {"head_chunk", "wkv_backend", "compile", "ds_bucket_mb"}
CHUNKS = {"infctx", "chunk_ctx", "state_cp", "ctx_parts"}  # the same with --bptt exact only
FILES = {
    *("load_adapter", "load_adapter_pissa_init", "load_cold_adapter", "layer_profile", "pair_file", "data_file"),
    *("vocab_file", "template", "reference_model", "teacher_model", "reward_model", "val_file"),
}


def identity(config: Config) -> dict[str, Any]:
    """Everything that decides how the run continues, as JSON values; files by their content, so that they may move."""
    found = {}
    for name in settings():
        value = getattr(config, name)
        if name in FILES:
            found[name] = fingerprint(value)
        elif name not in FREE:
            found[name] = value
    if not config.early_stop:
        del found["val_file"]  # it is looked at and changes nothing
    found["strategy"] = "ddp" if config.strategy == "auto" else config.strategy  # the same, also with one process
    return found | {"device": device_for(config.accelerator)}


def differences(was: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What differs between two identities: sentences about what changes the training, and names of what only rounds.

    A setting that one of them does not know has its default there.
    """
    defaults = {name: field.default for name, field in settings().items()}
    wrong, rounds = [], []
    for name in sorted(was.keys() | now.keys()):
        old, new = was.get(name, defaults.get(name)), now.get(name, defaults.get(name))
        if old == new:
            continue
        if name in ROUNDING or (name in CHUNKS and was.get("bptt") == now.get("bptt") == "exact"):
            rounds.append(f"{{{name}}}")
        elif name in FILES:
            wrong.append(f"{{{name}}} is another file")
        else:
            wrong.append(
                f"{{{name}}} was {_word(old)}, is {_word(new)}" if name in defaults else f"{name}: {old}, {new}"
            )
    return wrong, rounds


def _word(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value) if value not in ("", None) else "not given"


def refuse_another_run(was: dict[str, Any], now: dict[str, Any], point: Path) -> list[str]:
    """Names of settings that change the rounding only. Raises ValueError, naming what differs, for another training."""
    wrong, rounds = differences(was, now)
    if wrong:
        raise ValueError(
            f"{point} belongs to a run with other settings ({'; '.join(wrong)}): {{resume}} goes on with the same "
            "ones; to train on with others start from a checkpoint with {load_model} or {load_adapter}"
        )
    return rounds
