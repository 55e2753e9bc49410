"""How the command line is spelled: what differs from the field names, the old names, the flags that lost their meaning.

Literal tables only; `settings/command_line.py` reads them. All flag names are written without the two dashes.
"""

from typing import NamedTuple

# field of Config -> its flag, where the two differ
FLAG_OF: dict[str, str] = {"version": "my_testing", "pair_file": "rlhf_train_file"}

# further spellings of a field
ALIASES: dict[str, str] = {
    "dpo_train_file": "pair_file",
    "train_data_file": "data_file",
    "head_size_a": "head_size",
    "my_pile_stage": "train_stage",
    "lora_load": "load_adapter",
    "infctx_truncated_bptt": "bptt",
    "gradient_clip_val": "grad_clip",
    "log_every_n_steps": "log_every",
}

# flag -> words of the command line that stand for another value of the field; versions and optimizers have theirs in
# `tables.py`
WORDS: dict[str, dict[str, str | None]] = {
    "load_model": {"0": ""},
    "my_testing": {"": None},
    "infctx_truncated_bptt": {"0": "exact", "1": "truncated"},
    "orpo_mode": {"0": "mean", "1": "sum"},
    "precision": {"16": "fp16", "32": "fp32", "64": "fp64", "bf16-true": "bf16", "bf16-mixed": "bf16"},
    "accelerator": {"cuda": "gpu"},
}


class Old(NamedTuple):
    """A flag of the older programs that has no field here."""

    harmless: tuple[str, ...]  # values that ask for nothing; () = every value
    instead: str  # what to say about any other value


GONE = "that experiment is not part of this program"
LEGACY: dict[str, Old] = {
    "pre_ffn": Old(("0",), GONE),
    "head_qk": Old(("0",), GONE),
    "my_pos_emb": Old(("0",), GONE),
    "tiny_att_dim": Old(("0",), GONE),
    "tiny_att_layer": Old(("-999", "0"), GONE),
    "my_pile_version": Old(("1",), "lists of binidx files are not read"),
    "my_pile_shift": Old(("-1", "0"), "slices always start at multiples of {ctx_len}"),
    "my_pile_edecay": Old(("0",), "the schedule starts to decay after {warmup_steps}"),
    "my_random_steps": Old(("0",), GONE),
    "my_qa_mask": Old(("0",), GONE),
    "my_exit": Old(("0", "99999999"), "{epoch_count} says when training ends"),
    "head_size_divisor": Old(("8",), "the epsilon of ln_x is the one that the released models were trained with"),
    "load_partial": Old(("0",), "a checkpoint must hold every tensor of the model"),
    "previous_step": Old(("0",), "{resume} continues a run, {epoch_begin} shifts the schedule"),
    "log_add_step": Old(("0",), GONE),
    "emb": Old(("0",), "an `emb` row with mode `full` in {layer_profile} trains the embedding"),
    "fla": Old((), ""),
    "gpu_arch": Old((), ""),
    "prefix_tuning": Old(("0",), GONE),
    "prefix_token_len": Old((), ""),
    "direct_state_tuning": Old(("0", "1"), "{state} 1 tunes the initial state"),
    "post_wkv_tuning": Old(("0",), GONE),
    "moe": Old(("0",), GONE),
    "moe_experts": Old((), ""),
    "moe_active": Old((), ""),
    "moe_shared": Old((), ""),
    "moe_balance_alpha": Old((), ""),
    "zerocot": Old(("0",), GONE),
    "grpo_debug": Old((), ""),
    "gqa_kv_heads": Old((), ""),
    "rk_norm": Old(("0",), GONE),
    "rkv_bias": Old((), ""),
    "rms_norm_eps": Old((), ""),
    "sft_jsonmode": Old(("0",), "give the JSONL file as {data_file}"),
    "sft_jsonmode_overlap_tokenshift": Old((), ""),
    "sft_jsonmode_tokenizermode": Old(("world",), "give the tokenizer as {vocab_file}"),
    "sft_kl_mode": Old(("0",), "use {distillation} 1 with {teacher_model}"),
    "sft_kl_accesspoint": Old((), ""),
    "sft_kl_targetmodel": Old((), ""),
    "sft_kl_loadin4bit": Old((), ""),
    "sft_kl_temperature": Old((), ""),
    "sft_kl_alpha": Old((), ""),
    "sft_kl_topk": Old((), ""),
}
