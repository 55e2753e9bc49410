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
    "strategy": {
        "single_device": "auto",
        "single-device": "auto",
        "single": "auto",
        "ddp_find_unused_parameters_false": "ddp",
        "deepspeed": "deepspeed_stage_2",
    },
}


class Elsewhere(NamedTuple):
    """How another program spells something.

    said: a flag with a value; X stands for any value, 1 and 0 also for true and false. ours: what it is here, with X
    for that value; "" = nothing, and `note` says why. None: it is refused with `note`, which says what to do. secret:
    the value is not repeated.
    """

    program: str
    said: str
    ours: str | None
    note: str = ""
    secret: bool = False


_PACKED = "rows are packed without padding, and no token is left out"
_MARKS = "give the chats themselves (docs/data.md): of them only the answers are learnt"
_FUSED = "kernels are chosen by themselves; --wkv_backend names one"
_HYBRIDS = ("xa070", "pxa070", "cxa075", "cxa076", "cxa076r")
_HYBRID = "hybrids of RWKV-7 and attention (ARWKV, PRWKV) are not built; RWKV-7 itself is x070"
_LISA = "LISA (layers drawn anew as training goes on) is not built"
_LOADER = "data is read in the process that trains"
ELSEWHERE: tuple[Elsewhere, ...] = (
    Elsewhere("RWKV-PEFT", "dataload pad", "", _PACKED),
    Elsewhere("RWKV-PEFT", "dataload only", "", _PACKED),
    Elsewhere("RWKV-PEFT", "dataload get", "", _PACKED),
    Elsewhere("RWKV-PEFT", "peft none", "peft full"),
    Elsewhere("RWKV-PEFT", "peft disha", "peft bone", "with the mode bone; peft miss is its successor"),
    Elsewhere("RWKV-PEFT", "PISSA", "peft pissa"),
    Elsewhere("RWKV-PEFT", "state_tune", "peft state"),
    Elsewhere("RWKV-PEFT", "train_type none", ""),
    Elsewhere("RWKV-PEFT", "train_type finetune", "", "everything trains, unless --peft says otherwise"),
    Elsewhere("RWKV-PEFT", "train_type state", "peft state"),
    Elsewhere("RWKV-PEFT", "train_type infctx", "infctx 1"),
    Elsewhere("RWKV-PEFT", "loss_mask none", ""),
    Elsewhere("RWKV-PEFT", "loss_mask pad", "", "there is no padding"),
    Elsewhere("RWKV-PEFT", "loss_mask qa", None, _MARKS),
    Elsewhere("RWKV-PEFT", "loss_mask se", None, _MARKS),
    Elsewhere("RWKV-PEFT", "mask_id X", "", "read with --loss_mask only"),
    Elsewhere("RWKV-PEFT", "quant none", "quant 0"),
    Elsewhere("RWKV-PEFT", "quant nf4", "quant 1 --quant_mode nf4"),
    Elsewhere("RWKV-PEFT", "quant fp4", "quant 1 --quant_mode fp4"),
    Elsewhere("RWKV-PEFT", "quant int8", "quant 1 --quant_mode int8"),
    Elsewhere("RWKV-PEFT", "quant fp8", "quant 1 --quant_mode fp8"),
    Elsewhere("RWKV-PEFT", "rwkv_version X", "my_testing X"),
    Elsewhere("RWKV-PEFT", "data_shuffle X", "random_mode X"),
    Elsewhere("RWKV-PEFT", "train_parts time ln", "", "these train beside adapters"),
    Elsewhere("RWKV-PEFT", "train_parts []", "limited_lora 1", "nothing beside adapters"),
    Elsewhere("RWKV-PEFT", "train_parts X", None, "a layer profile says what trains: make_profile.py writes one"),
    Elsewhere("RWKV-PEFT", "data_type sft", "", "the rows are recognised (docs/data.md)"),
    Elsewhere("RWKV-PEFT", "sft_field X", "", "the rows are recognised (docs/data.md)"),
    Elsewhere("RWKV-PEFT", "sft_split train", "", "of a saved data set the split train is read"),
    Elsewhere("RWKV-PEFT", "sft_split X", None, "write these rows into a file of their own and name that"),
    Elsewhere("RWKV-PEFT", "lr_schedule cos", "lr_schedule cosine"),
    Elsewhere("RWKV-PEFT", "op X", "", _FUSED),
    Elsewhere("RWKV-PEFT", "fused_kernel", "", _FUSED),
    Elsewhere("RWKV-PEFT", "persistent_workers", "", _LOADER),
    Elsewhere("RWKV-PEFT", "num_workers X", "", _LOADER),
    Elsewhere("RWKV-PEFT", "prefetch_factor X", "", _LOADER),
    Elsewhere("RWKV-PEFT", "lisa_config X", None, _LISA),
    Elsewhere("RWKV-PEFT", "LISA", None, _LISA),
    Elsewhere("RWKV-LM", "head_chunk 0", "head_chunk 1000000000", "one chunk: all logits exist at once"),
    Elsewhere("RWKV-LM", "kernel X", "", _FUSED),
    Elsewhere("RWKV-LM", "svdfac X", None, "models whose matrices are products of two thin ones are not built"),
    Elsewhere("RWKV-LM", "my_testing r2r3r4", "my_testing x052"),
    Elsewhere("OpenMOSE", "distillation_train_file X", "train_data_file X"),
    Elsewhere("OpenMOSE", "sft_jsonmode 1", "", "the rows are recognised (docs/data.md)"),
    Elsewhere("OpenMOSE", "dpo_max_corpus_len X", "rlhf_max_corpus_len X"),
    *(Elsewhere("OpenMOSE", f"my_testing {word}", None, _HYBRID) for word in _HYBRIDS),
    Elsewhere("OpenMOSE", "orpo_type 0", "orpo_mode 0"),
    Elsewhere("OpenMOSE", "orpo_type 1", "orpo_mode 1"),
    Elsewhere("OpenMOSE", "train_type states", "peft state"),
    Elsewhere("OpenMOSE", "quant_type nf4", "quant_mode nf4"),
    Elsewhere("OpenMOSE", "quant_type fp4", "quant_mode fp4"),
    Elsewhere("RWKV-LM-V7", "fuse_l2warp X", "", _FUSED),
)

# flags of other programs that hold JSON, by the adapter that they are for; "" = any
CONFIGS: dict[str, str] = {
    "peft_config": "",
    "lora_config": "lora",
    "dora_config": "dora",
    "pissa_config": "pissa",
    "bone_config": "bone",
    "disha_config": "bone",
    "miss_config": "miss",
}
# key of such a JSON -> our flag; "" = what --peft says already
CONFIG_KEYS: dict[str, str] = {
    **dict.fromkeys(("r", "lora_r", "pissa_r", "bone_r", "disha_r"), "lora_r"),
    **dict.fromkeys(("alpha", "lora_alpha"), "lora_alpha"),
    **dict.fromkeys(("dropout", "lora_dropout"), "lora_dropout"),
    **dict.fromkeys(("load", "lora_load", "pissa_load", "bone_load", "disha_load"), "load_adapter"),
    "pissa_init": "load_adapter_pissa_init",
    "svd_niter": "svd_niter",
    **dict.fromkeys(("mode", "bone_mode"), ""),
}
MODES = ("", "mode", "bone", "miss")  # values of a key for which CONFIG_KEYS has ""


class Old(NamedTuple):
    """A flag of the older programs that has no field here."""

    harmless: tuple[str, ...]  # values that ask for nothing; () = every value
    instead: str  # what to say about any other value


_OF_LISA = (
    *("r", "k", "active_layer", "interval_steps", "debug", "rand_seed", "plus_enabled"),
    *("plus_att_train_params", "plus_att_active_weight", "plus_att_permanent_freeze_params"),
    *("plus_ffn_train_params", "plus_ffn_active_weight", "plus_ffn_permanent_freeze_params"),
    *("plus_custom_layer_probabilities", "plus_custom_layer_probabilities_profile"),
)
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
    "previous_step": Old(("0",), "{resume} continues a run, {epoch_begin} shifts the schedule"),
    "log_add_step": Old(("0",), GONE),
    "emb": Old(("0",), "an `emb` row with mode `full` in {layer_profile} trains the embedding"),
    "fla": Old((), ""),
    "gpu_arch": Old((), ""),
    "prefix_tuning": Old(("0",), "prefixes of learnt embeddings are not built; {state} 1 learns the state after one"),
    "prefix_token_len": Old((), ""),
    "suffix_tuning": Old(("0",), "suffixes of learnt embeddings are not built; {state} 1 learns a first state"),
    "suffix_offset": Old(("0",), GONE),
    "suffix_token_len": Old((), ""),
    "direct_state_tuning": Old(("0", "1"), "{state} 1 tunes the initial state"),
    "post_wkv_tuning": Old(("0",), "learnt scales behind the recurrence are not built"),
    "moe": Old(("0",), "mixtures of adapters (MoE) are not built; {peft} lora trains one for all tokens"),
    "moe_experts": Old((), ""),
    "moe_active": Old((), ""),
    "moe_shared": Old((), ""),
    "moe_balance_alpha": Old((), ""),
    "orpo_general_corpus_ratio": Old(("0", "0.0"), "ORPO takes no general text beside the pairs; DPO does ({dpo} 1)"),
    "double_extra_dim": Old(("0",), GONE),
    "orpo_debug": Old((), ""),
    "orpo_mysetting": Old((), ""),
    "zerocot": Old(("0",), "rewarded thoughts (zerocot) are not built; {grpo} 1 rewards whole answers"),
    "lisa": Old(("0",), _LISA),
    **{f"lisa_{name}": Old((), "") for name in _OF_LISA},
    "grpo_debug": Old((), ""),
    "gqa_kv_heads": Old((), ""),
    "rk_norm": Old(("0",), "it belongs to hybrids with attention, which are not built"),
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
