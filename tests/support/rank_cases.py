"""Runs that one process and several make the same steps of."""

from tests.support.source_files import ROOT

REWARDS = f"{ROOT}/tests/support/rewards.py:odd,short"


def shared_words(base, vocab_file):
    return [
        *("--load_model", base, "--vocab_file", vocab_file, "--accelerator", "cpu", "--precision", "fp32"),
        *("--quant", 0, "--ctx_len", 128, "--epoch_save", 1, "--random_seed", 3, "--epoch_count", 1),
        *("--lr_init", "1e-3", "--lr_final", "1e-3"),
    ]


def case(text, pairs, name):
    """The words of a case and, for one process and for two, those that make the same steps of it."""
    sft, dpo = ("--sft", 1, "--data_file", text), ("--dpo", 1, "--dpo_beta", 0.1, "--rlhf_train_file", pairs)
    lora = ("--peft", "lora", "--quant", 1, "--quant_mode", "nf4", "--lora_r", 4, "--lora_dropout", 0)
    groups = ("--grpo_gen_count", 2, "--grpo_gen_length", 5, "--grpo_passes", 2, "--reward_funcs", REWARDS)
    judged = ("--reward_funcs", REWARDS, "--missing_eos_penalty", 0.5)
    words = {
        "sft": (*sft, "--val_file", text),
        "dpo": (*dpo, "--val_file", pairs),
        "kto": ("--kto", 1, "--rlhf_train_file", pairs, "--kto_beta", 0.1),
        "infctx": (*sft, "--infctx", 1, "--chunk_ctx", 7),  # documents of 13 to 34 tokens: 2 to 5 pieces
        "lora": (*dpo, *lora, "--infctx", 1, "--chunk_ctx", 16),
        "forgetful": (*sft, "--val_file", text),
        "compiled": (*sft, "--val_file", text, "--compile", 1),
        "tables": (*sft, "--peft", "lora", "--lora_r", 4, "--lora_dropout", 0, "--train_tables", 1),
        "state": ("--state", 1, "--state_shift", 1, "--grad_cp", 0, *sft),
        "grpo": ("--grpo", 1, "--rlhf_train_file", pairs, *groups, "--val_file", pairs),
        "ppo": ("--ppo", 1, "--rlhf_train_file", pairs, "--ppo_epochs", 2, "--output_max_length", 5, *judged),
        "blown": (*sft, "--lr_init", "1e30", "--lr_final", "1e30", "--grad_clip", 0, "--max_bad_steps", 1),
        "packed": (*dpo, "--peft", "pissa", "--quant", 1, "--quant_mode", "int8", "--lora_r", 4, "--precision", "bf16"),
        "empty": ("--sft", 1, "--data_file", text.parent / "empty.jsonl", "--random_mode", 0),
    }[name]
    # a step that finds moments; the third samples again, or is the second that is no number
    steps = 3 if name in ("grpo", "ppo", "blown") else 2
    size, parts = (1, 2) if name == "infctx" else (4, 1) if name == "kto" else (2, 2)
    shape = ("--micro_bsz", size)

    def of(processes):
        pieces = 2 * parts // processes
        rollout = ("--batch_size", size * pieces) if name == "ppo" else ()
        return [*words, *shape, *rollout, "--accumulate_grad_batches", pieces, "--epoch_steps", steps * pieces]

    return of
