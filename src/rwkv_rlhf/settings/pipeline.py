"""The three stages of the neural_chat pipeline (SFT, reward model, PPO) and its merging, as its scripts are typed.

Literal tables only. A stage is a command of this program with other spellings and other defaults; what has the same
name in both (--steps, --batch_size, --peft lora, ...) is in no table. `settings/elsewhere.py` reads them.
"""

from __future__ import annotations

from typing import NamedTuple

from rwkv_rlhf.settings.flags import Elsewhere

PROGRAM = "neural_chat"


def _says(said: str, ours: str | None, note: str = "", *, secret: bool = False) -> Elsewhere:
    return Elsewhere(PROGRAM, said, ours, note, secret)


_GAUDI = "Gaudi is not supported, this program runs on CPUs and GPUs: leave it out"
_LOCAL = "files are local, nothing is downloaded"
_HELD_OUT = "held-out data is scored after each mini-epoch where there is any (--val_file, --val_split)"

ANYWHERE: tuple[Elsewhere, ...] = (
    _says("hf_access_token X", "", _LOCAL, secret=True),
    _says("use_auth_token X", "", _LOCAL, secret=True),
    _says("use_habana 0", ""),
    _says("use_habana X", None, _GAUDI),
    _says("use_lazy_mode X", "", "a mode of Gaudi"),
    _says("use_fast_tokenizer X", "", "there is one tokenizer for each vocabulary"),
    _says("log_level X", "", "there is one level"),
)
TRAINING: tuple[Elsewhere, ...] = (
    *ANYWHERE,
    _says("model_name X", "load_model X"),
    _says("model_name_or_path X", "load_model X"),
    _says("tokenizer_name X", "vocab_file X", "a folder means its tokenizer.json, or World"),
    _says("output_dir X", "proj_dir X"),
    _says("overwrite_output_dir X", "", "checkpoints of an earlier run in the folder are replaced"),
    _says("learning_rate X", "lr_init X"),
    _says("gradient_accumulation_steps X", "accumulate_grad_batches X"),
    _says("lora_rank X", "lora_r X"),
    _says("logging_steps X", "log_every X"),
    _says("log_with wandb", "wandb rlhf"),
    _says("log_with X", None, "metrics.jsonl and report.html are always written; besides there is --log_with wandb"),
    _says("seed X", "random_seed X"),
    _says("bf16 1", "precision bf16"),
    _says("bf16 0", "precision fp32"),
    _says("device hpu", None, _GAUDI),
    _says("device cpu", "accelerator cpu"),
    _says("device cuda", "accelerator gpu"),
    _says("device auto", "accelerator auto"),
    _says("adafactor 0", ""),
    _says("adafactor X", None, "Adafactor is not built: --optim adam8bit and lion keep small states"),
    _says("ddp_find_unused_parameters X", "", "every parameter that trains is used"),
    _says("per_device_eval_batch_size X", "", "held-out rows are packed"),
    _says("evaluation_strategy X", "", _HELD_OUT),
    _says("save_total_limit X", "keep X"),
    _says("do_train X", ""),
)
STAGED: tuple[Elsewhere, ...] = (
    *TRAINING,
    _says("num_train_epochs X", "epochs X"),
    _says("per_device_train_batch_size X", "micro_bsz X"),
    _says("save_strategy no", "epoch_save 1000000", "the end is saved"),
    _says("save_strategy epoch", "epoch_save 1"),
    _says("save_strategy steps", "", "--save_steps says how many"),
)


class Stage(NamedTuple):
    """A script of the pipeline.

    help: what it does. spellings: what its flags are here. words: the script's defaults that are not ours, as our
    flags; typed ones win. adapter: the same of its adapter, where nothing else is typed than --peft lora.
    """

    help: str
    spellings: tuple[Elsewhere, ...]
    words: str = ""
    adapter: str = ""


_DEFAULTS = "--lr_final 0 --lr_schedule linear --micro_bsz 8 --lr_init 5e-5"
STAGES: dict[str, Stage] = {
    "finetune_clm": Stage(
        "Supervised fine-tuning, the first stage of the neural_chat pipeline: train.py --sft 1 by other words.",
        (
            *STAGED,
            _says("dataset_name X", "data_file X"),
            _says("dataset_concatenation X", "", "rows are packed without padding, and no token is left out"),
            _says("max_seq_length X", "ctx_len X"),
        ),
        f"--sft 1 --train_on_chosen 1 --quant 0 {_DEFAULTS} --epochs 3",
        "--peft lora --lora_r 8 --lora_alpha 16 --lora_dropout 0.05",
    ),
    "reward_modeling": Stage(
        "A reward model, the second stage of the neural_chat pipeline: train.py --rm 1 by other words.",
        (*STAGED, _says("dataset_name X", "rlhf_train_file X"), _says("max_length X", "rlhf_max_corpus_len X")),
        f"--rm 1 --quant 0 {_DEFAULTS} --epochs 3 --rlhf_max_corpus_len 512",
        "--peft lora --lora_r 8 --lora_alpha 32 --lora_dropout 0.1",
    ),
    "rl_training": Stage(
        "PPO, the third stage of the neural_chat pipeline: train.py --ppo 1 by other words.",
        (
            *TRAINING,
            _says("dataset_name X", "rlhf_train_file X"),
            _says("reward_model_name X", "reward_model X"),
            _says("batched_gen X", "", "answers are sampled together: --sample_at_once"),
        ),
        "--ppo 1 --quant 0 --lr_init 1.41e-5 --lr_schedule constant --accumulate_grad_batches 4 "
        "--rlhf_max_corpus_len 512",
        "--peft lora --lora_r 16 --lora_alpha 32 --lora_dropout 0.05",
    ),
    "merge_peft_adapter": Stage(
        "A model of what a stage of the neural_chat pipeline has trained: merge.py by other words.",
        (
            *ANYWHERE,
            _says("base_model_name X", "base_model X", "without it the one that the run began from"),
            _says("adapter_model_name X", "lora_checkpoint X", "a run's folder means its rwkv-final"),
            _says("output_name X", "output X", "a folder means its rwkv-final.pth"),
        ),
    ),
}
