"""The command line: every published command parses, mistakes are named, nothing is accepted in silence."""

import logging
import re
import shlex

import pytest

from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.command_line import UsageError, as_flags, parse, spelled
from rwkv_rlhf.settings.config import Config, settings
from rwkv_rlhf.settings.constraints import CONSTRAINTS

SIZES = "--load_model M --proj_dir P --vocab_size 65536 --n_layer 24 --n_embd 2048 --my_testing x070"
INFCTX = f"{SIZES} --infctx 1 --chunk_ctx 512 --ctx_len 65536"
PUBLISHED = {
    "dpo": (
        """--load_model M --wandb "RWKV-LM-RLHF 1B6-RLHF DPO" --proj_dir P --infctx 0 --vocab_size 65536 --ctx_len 2048
        --epoch_steps 200 --epoch_count 1000 --epoch_begin 0 --epoch_save 1 --micro_bsz 1 --n_layer 24 --n_embd 2048
        --lr_init 5e-6 --lr_final 1e-6 --warmup_steps 100 --beta1 0.9 --beta2 0.999 --adam_eps 1e-8 --accelerator gpu
        --devices 1 --precision bf16 --grad_cp 1 --my_testing "x060" --strategy deepspeed_stage_2_offload
        --layer_profile 'layerprofile/24_TEST.csv' --quant 1 --quant_mode 'nf4' --gpu_arch 'cuda' --dpo 1
        --dpo_alpha 0.1 --dpo_beta 0.01 --rlhf_train_file F --rlhf_max_corpus_len 1024
        --accumulate_grad_batches 16"""
    ),
    "orpo": (
        """--load_model M --wandb W --proj_dir P --vocab_size 65536 --ctx_len 2048 --epoch_steps 1000 --epoch_count 1000
        --epoch_begin 0 --epoch_save 1 --micro_bsz 1 --n_layer 61 --n_embd 4096 --lr_init 5e-6 --lr_final 1e-6
        --warmup_steps 100 --beta1 0.9 --beta2 0.999 --adam_eps 1e-8 --accelerator gpu --devices 2 --precision bf16
        --grad_cp 1 --my_testing "x060" --strategy deepspeed_stage_1
        --layer_profile 'layerprofile/61_TEST_head_emb.csv' --quant 1 --quant_mode 'nf4' --gpu_arch 'rocm' --orpo 1
        --orpo_alpha 0.0004 --rlhf_train_file dataset_3b.save --rlhf_max_corpus_len 1024"""
    ),
    "dpo with general text": (
        """--load_model M --wandb W --proj_dir P --ctx_len 4096 --epoch_count 4 --epoch_begin 0 --epoch_steps 2000
        --data_file D --data_type binidx --vocab_size 65536 --epoch_save 1 --micro_bsz 1 --n_layer 24 --n_embd 1024
        --pre_ffn 0 --head_qk 0 --lr_init 5e-6 --lr_final 1e-6 --warmup_steps 50 --beta1 0.9 --beta2 0.99
        --adam_eps 1e-8 --accelerator gpu --devices 1 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 0
        --accumulate_grad_batches 20 --enable_progress_bar True --ds_bucket_mb 200 --my_testing r3r4 --dpo 1
        --dpo_train_file trainset.save --dpo_general_corpus_ratio 0.8 --dpo_beta 0.02"""
    ),
    "infinite context": (
        """--load_model M --proj_dir P --data_file D --data_type binidx --vocab_size 50277 --ctx_len 32768
        --ctx_parts 32 --state_cp 1 --initial_ctx_len 4096 --ctx_warmup_steps 200 --lora --lora_r 16 --lora_alpha 32
        --lora_dropout 0.01 --lora_parts att,ffn,time,ln --strategy deepspeed_stage_1"""
    ),
    "sft on h5": (
        f"""{INFCTX} --sft 1 --smoothing 0.005 --random_mode 1 --train_data_file F.h5
        --infctx_dataset_multiplier 8"""
    ),
    "distillation on h5": (
        f"""{INFCTX} --distillation 1 --temperature 2 --top_k 100 --alpha 0.5 --smoothing 0.005
        --train_data_file F.h5"""
    ),
    "state tuning": (
        f"{SIZES} --state 1 --orpo 1 --layer_profile 'layerprofile/32_TEST_State.csv' --lr_advanced 1"
        " --rlhf_train_file F"
    ),
    "pre-training": (
        "--load_model 0 --proj_dir P --train_stage 3 --data_file D --data_type binidx --my_exit_tokens 1000000"
        " --magic_prime 1019 --my_testing x070"
    ),
    "pre-training from zero with another vocabulary": (
        "--load_model 0 --proj_dir P --train_stage 3 --data_file D.jsonl --my_testing x040 --vocab_size 50277"
        " --vocab_file 20B_tokenizer.json"
    ),
    "initial values": (
        "--load_model 0 --train_stage 1 --my_testing x070 --n_layer 2 --n_embd 64 --vocab_size 65536 --random_seed 1"
    ),
    "reward model": (f"{SIZES} --rm 1 --rlhf_train_file F"),
    "ppo": (f"{SIZES} --ppo 1 --reward_model R --rlhf_train_file F"),
    "evaluation": ("--load_model M --eval_only 1 --val_file F --load_adapter A"),
    "doctor": ("--doctor 1"),
    "today's dpo": (
        f"{SIZES} --layer_profile layerprofile/24_TEST.csv --dpo 1 --rlhf_train_file F --accelerator cpu --dry_run 1"
    ),
}


def argv(text: str) -> list[str]:
    return shlex.split(text)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_command_parses(name):
    """A published command runs as written: never a silent no-op."""
    parse(argv(PUBLISHED[name]))


def test_the_dpo_command_means_what_it_says():
    """A flag landing in the wrong field would train something else."""
    config = parse(argv(PUBLISHED["dpo with general text"]))
    assert (config.version, config.loss, config.pair_file) == ("x052", "dpo", "trainset.save")
    assert (config.dpo_beta, config.dpo_alpha, config.grad_cp, config.enable_progress_bar) == (0.02, 0.0, False, True)
    assert {"version", "loss", "pair_file", "n_layer"} <= config.given
    assert "ctx_parts" not in config.given


def test_the_lora_recipe():
    """`--lora` is `--peft lora`, `--state_cp 1 --ctx_parts 32` are chunks of ctx_len / 32."""
    config = parse(argv(PUBLISHED["infinite context"]))
    assert (config.peft, config.lora_r, config.loss, config.chunk) == ("lora", 16, "sft", 1024)
    assert parse(argv(PUBLISHED["sft on h5"])).chunk == 512


def test_defaults_that_depend_on_other_settings():
    """Smoothing belongs to --sft and distillation; pre-training and DPO's alpha keep their own defaults."""
    text = "--load_model M --data_file D"
    assert parse(argv(text)).smoothing == 0.0
    assert parse(argv(text + " --sft")).smoothing == 0.001
    assert parse(argv(text + " --sft --smoothing 0")).smoothing == 0.0
    assert parse(argv("--load_model M --dpo --rlhf_train_file F")).dpo_alpha == 0.1


def test_sizes_of_zero_are_not_wishes():
    """`--dim_ffn 0` means "what the model has"; it must not disagree with a checkpoint."""
    config = parse(argv("--load_model M --data_file D --dim_ffn 0 --n_layer 12 --my_testing ''"))
    assert "n_layer" in config.given
    assert not {"dim_ffn", "version"} & config.given


def test_state_tuning_without_a_profile():
    """`--state 1` alone freezes the weights; `--peft state` is the same wish."""
    for text in ("--state 1", "--peft state", "--peft state --state"):
        config = parse(argv(f"--load_model M --data_file D {text}"))
        assert (config.peft, config.state) == ("state", True)


@pytest.mark.parametrize(
    ("words", "storage"),
    [
        ("", "nf4"),
        ("--layer_profile layerprofile/24_TEST.csv", "nf4"),
        ("--layer_profile layerprofile/24_TEST.csv --state 1", "nf4"),
        ("--layer_profile layerprofile/24_TEST.csv --quant 0", "none"),
        ("--lora 1", "none"),
        ("--peft dora", "none"),
        ("--state 1", "none"),
        ("--peft lora --quant 1", "nf4"),
        ("--peft lora --quant_mode int8", "int8"),
        ("--peft lora --quant_mode int8 --quant 0", "none"),
        ("--peft lora --quant nf4", "nf4"),
    ],
)
def test_adapters_without_a_profile_pack_nothing_unless_asked(words, storage):
    """The programs that such commands come from never packed: a merge over nf4 moves matrices that nothing trained."""
    assert parse(argv(f"--load_model M --data_file D {words}")).storage == storage


RWKV_LM = "--load_model 0 --train_stage 3 --my_testing x070 --data_file D --data_type binidx --micro_bsz 16"


@pytest.mark.parametrize(
    ("words", "schedule", "epoch_steps"),
    [
        (f"{RWKV_LM} --my_exit_tokens 1498226207 --magic_prime 2926181", "rwkv-lm", 2520),
        (f"{RWKV_LM.replace('stage 3', 'stage 2')} --devices 4", "rwkv-lm", 630),
        (f"{RWKV_LM} --epoch_steps 100", "rwkv-lm", 100),
        (f"{RWKV_LM} --lr_schedule exp", "exp", 1000),
        ("--load_model M --data_file D --my_exit_tokens 1000", "rwkv-lm", 40320),
        ("--load_model M --data_file D", "exp", 1000),
        ("--load_model M --train_stage 3 --dpo 1 --rlhf_train_file F", "exp", 1000),
        ("--load_model M --data_file D --lr_schedule rwkv-lm", "rwkv-lm", 40320),
    ],
)
def test_commands_of_rwkv_lm_follow_its_schedule(words, schedule, epoch_steps, caplog):
    """A pre-training that is moved here goes on at other rates, and saves at other places, if this breaks."""
    config = parse(argv(words))
    assert (config.lr_schedule, config.epoch_steps) == (schedule, epoch_steps)
    said = schedule == "rwkv-lm" and "--lr_schedule" not in words
    assert caplog.text.count("as in RWKV-LM: learning rate by cosine") == said
    assert ("mini-epochs of 40320 samples" in caplog.text) == (said and "--epoch_steps" not in words)


def test_epochs_are_whole_optimizer_steps():
    """10 micro-batches in groups of 4 make 3 steps, not 2.5."""
    assert Config(epoch_steps=10, accumulate_grad_batches=4).steps_per_epoch == 3


PPO_SIZES = ("micro_bsz", "mini_batch_size", "batch_size", "steps", "ppo_epochs")
BASE = "--load_model M "
TEXT = BASE + "--data_file D "
MISTAKES = {
    TEXT + "--epoch_step 3": "unknown flag --epoch_step; the nearest known flag is --epoch_steps",
    TEXT + "--micro-bsz 3": "unknown flag --micro-bsz; the nearest known flag is --micro_bsz",
    TEXT + "--ctx_len=0": "--ctx_len 0: must be >= 1",
    TEXT + "--ctx_len": "--ctx_len: expected one argument",
    TEXT + "--ctx_len 1k": "--ctx_len '1k': expected a whole number",
    TEXT + "--lr_init nan": "--lr_init nan: expected a finite number",
    TEXT + "--lr_init -1": "--lr_init -1.0: must be >= 0",
    TEXT + "--grad_cp 2": "--grad_cp '2': expected 0 or 1",
    TEXT + "--micro_bsz 0": "--micro_bsz 0: must be >= 1",
    RWKV_LM.replace("bsz 16", "bsz 0"): "--micro_bsz 0: must be >= 1",  # a mini-epoch's length is worked out from it
    **{f"--ppo 1 --rlhf_train_file p.csv --{name} 0": f"--{name} 0: must be >= 1" for name in PPO_SIZES},
    TEXT + "--beta1 1": "--beta1 1.0: must be < 1",
    TEXT + "--warmup_steps -2": "--warmup_steps -2: must be >= -1",
    TEXT + "--infctx 1 --chunk_ctx -1": "--chunk_ctx -1: must be >= 0",
    TEXT + "--precision int4": "--precision int4: must be one of bf16, fp16, fp32, fp64",
    TEXT + "--optim muon --strategy deepspeed_stage_1": "--optim muon needs whole matrices, and --strategy deepspeed_s",
    TEXT + "--optim lion --strategy fsdp": "--optim lion cannot take the parts that --strategy fsdp splits",
    TEXT + "--compile 1 --strategy deepspeed_stage_3": "--strategy deepspeed_stage_3 puts each matrix of a block",
    TEXT + "--compile 1 --train_tables 1": "--train_tables 1 has gradients for the rows of some tokens only",
    TEXT + "--optim adamw8bit --precision fp64": "--optim adamw8bit computes in float32, so --precision fp64 would be",
    TEXT + "--precision fp16 --strategy deepspeed_stage_2": "--precision fp16 needs a scaled loss, and --strategy deep",
    TEXT + "--weight_decay_final -0.5": "--weight_decay_final -0.5: must be -1 (the decay stays as it is) or >= 0",
    TEXT + "--weight_decay_final 0.01": "--weight_decay_final 0.01 needs --weight_decay above 0",
    TEXT + "--strategy magic": "--strategy magic: must be one of auto, ddp",
    TEXT + "--my_testing x999": "--my_testing x999: must be one of x040, x052, x060, x070",
    TEXT + "--train_stage 4": "--train_stage 4: must be one of 0, 1, 2, 3",
    TEXT + "--quant_mode q8": "--quant_mode q8: must be one of nf4, fp4, int8, fp8, none",
    TEXT + "--pre_ffn 1": "--pre_ffn 1: that experiment is not part of this program; only --pre_ffn 0 is accepted",
    TEXT + "--my_exit 3": "--my_exit 3: --epoch_count says when training ends",
    TEXT + "stray": "'stray' stands where a flag was expected",
    TEXT + "--lora_r 4": "--lora_r 4 has no effect: it needs --lora or --peft",
    TEXT + "--layer_profile L --lora_r 4": "--lora_r 4 has no effect: --layer_profile has its own columns",
    TEXT + "--layer_profile L --lora": "--layer_profile L and --peft lora: the profile already says",
    TEXT + "--lora --peft dora": "--lora 1 and --peft dora: choose one",
    TEXT + "--lora --lora_r 0": "--lora_r 0: must be >= 1",
    TEXT + "--lora --lora_parts att,emb": "--lora_parts att,emb: must be a comma list of att, ffn, ln, time",
    TEXT + "--lora --lora_parts ,": "--lora_parts ,: must be a comma list of att, ffn, ln, time",
    TEXT + "--limited_lora 1": "--limited_lora 1 has no effect: it needs --lora or --peft",
    TEXT + "--rslora": "--rslora 1 has no effect: it needs --lora or --peft",
    TEXT + "--early_stop 3": "--early_stop 3 needs --val_file or --val_split",
    "--load_model M --data_file D.jsonl --magic_prime 5": "--magic_prime 5 needs a binidx corpus as --data_file",
    TEXT + "--data_type txt --magic_prime 5": "--magic_prime 5 needs a binidx corpus as --data_file",
    BASE + "--orpo --rlhf_train_file F --magic_prime 5": "--magic_prime 5 needs a binidx corpus as --data_file",
    BASE + "--dpo --rlhf_train_file F --my_exit_tokens 9": "--my_exit_tokens 9 with --dpo 1: it counts tokens of text",
    TEXT + "--train_data_file E": "--data_file and --train_data_file E: the same setting with two values",
    TEXT + "--val_file V --val_split 0.1": "--val_file V and --val_split 0.1: give one of the two",
    TEXT + "--initial_ctx_len 9999": "--initial_ctx_len 9999 is more than --ctx_len 2048",
    BASE + "--distillation --data_file D.jsonl": "--distillation 1 needs a teacher: an .h5 with its logits",
    BASE
    + "--orpo --rlhf_train_file F --initial_ctx_len 9": "--initial_ctx_len 9 shortens samples of text; for --orpo 1",
    BASE
    + "--dpo --rlhf_train_file F --infctx_dataset_multiplier 2": "--infctx_dataset_multiplier 2 joins documents of",
    BASE
    + "--dpo --rlhf_train_file F --reset_state 0": "--reset_state 0 joins documents of text without a reset; --dpo 1",
    TEXT + "--ctx_warmup_steps 10": "--ctx_warmup_steps 10 needs --initial_ctx_len",
    TEXT + "--state_shift": "--state_shift 1 needs --state 1",
    TEXT + "--infctx --state_cp --ctx_parts 2": "--infctx 1 with --chunk_ctx and --state_cp 1 with --ctx_parts",
    "--data_file D": "--load_model is missing: give a checkpoint, or 0 with --train_stage 1",
    "--data_file D --load_model 0": "--load_model is missing",
    BASE: "nothing to train on: give --data_file",
    BASE + "--rlhf_train_file F": "--rlhf_train_file F needs a loss: --dpo 1, --orpo 1",
    TEXT + "--rlhf_train_file F": "--rlhf_train_file F needs a loss: --dpo 1, --orpo 1",
    BASE + "--dpo 1": "--dpo 1 needs --rlhf_train_file",
    BASE + "--orpo": "--orpo 1 needs --rlhf_train_file",
    BASE + "--sft": "--sft 1 needs --data_file",
    BASE + "--orpo 1 --dpo 1 --rlhf_train_file F": "--dpo 1 and --orpo 1: choose one loss",
    BASE + "--orpo 1 --rlhf_train_file F --orpo_mode 2": "--orpo_mode 2: must be one of mean, sum",
    BASE
    + "--dpo --rlhf_train_file F --dpo_general_corpus_ratio 0.5": "--dpo_general_corpus_ratio 0.5 needs --data_file",
    BASE + "--dpo --rlhf_train_file F --dpo_loss hinge --dpo_label_smoothing 0.1": "--dpo_label_smoothing 0.1 has no",
    BASE + "--eval_only": "--eval_only 1 needs --val_file",
    "--train_stage 1 --load_model M": "--train_stage 1 writes a new model, so --load_model must be 0, not M",
    "--train_stage 1": "--train_stage 1 needs --my_testing",
    "--train_stage 1 --my_testing x070": "--train_stage 1 needs --vocab_size",
    "--train_stage 1 --my_testing x070 --vocab_size 9 --n_embd 65": "--n_embd 65 is not a multiple of --head_size 64",
    "--train_stage 1 --my_testing x070 --vocab_size 9 --n_embd 64 --dim_att 128": "--dim_att 128 with --train_stage 1",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_sentence_with_the_flag(text):
    """The user reads which flag is wrong, its value and what is legal."""
    with pytest.raises(UsageError) as caught:
        parse(argv(text))
    assert MISTAKES[text] in str(caught.value)
    assert not re.search(r"\{\w+[=!]?\}", str(caught.value))


def test_every_flag_has_a_nearest_flag_and_no_abbreviation():
    """`--epoch` must not be taken for one of four flags."""
    with pytest.raises(UsageError, match="unknown flag --load_mode; the nearest known flag is --load_model"):
        parse(["--load_mode", "M"])


def test_legacy_flags_give_one_notice(caplog):
    """Old commands run; what has no effect is said once."""
    with caplog.at_level(logging.WARNING):
        parse(argv(TEXT + "--pre_ffn 0 --head_qk 0 --gpu_arch rocm --my_pos_emb 0"))
    assert len(caplog.records) == 1
    assert "--pre_ffn 0, --head_qk 0, --gpu_arch rocm, --my_pos_emb 0" in caplog.text


def test_notices(caplog):
    """Legal but surprising settings are said: ORPO's small alpha, rounded epochs, settings of another loss."""
    text = BASE + "--orpo 1 --rlhf_train_file F --orpo_alpha 0.0004 --epoch_steps 10 --accumulate_grad_batches 4"
    with caplog.at_level(logging.WARNING):
        parse(argv(text + " --dpo_beta 0.1"))
    said = [record.getMessage() for record in caplog.records]
    assert any("--orpo_alpha 0.0004" in line and "--orpo_mode sum" in line for line in said)
    assert any("--epoch_steps 10 is rounded up to 12" in line for line in said)
    assert any("no effect with this loss: --dpo_beta" in line for line in said)


def test_a_file_that_is_not_read_is_named(caplog):
    """A user who gives a file believes that it is trained on."""
    for text, said in (
        (BASE + "--orpo 1 --rlhf_train_file F --data_file D", "--data_file is not read: --orpo 1 trains on"),
        (TEXT + "--sft 1 --rlhf_train_file F", "--rlhf_train_file is not read: --sft 1 trains on"),
        (BASE + "--orpo 1 --rlhf_train_file F --trust_reference 1", "--trust_reference has no effect: --orpo 1 has no"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            parse(argv(text))
        assert any(said in record.getMessage() for record in caplog.records), text


def test_settings_of_text_are_said_to_be_idle_on_pairs(caplog):
    """Label smoothing or --train_on_prompt with DPO: the user believes in something that does not happen."""
    pairs = BASE + "--dpo 1 --rlhf_train_file F "
    for text, idle in (
        (pairs + "--smoothing 0.1 --train_on_prompt 1", ["--smoothing 0.1", "--train_on_prompt 1"]),
        (pairs + "--smoothing 0 --train_on_prompt 0", []),
        (TEXT + "--sft 1 --smoothing 0.1 --train_on_prompt 1", []),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            parse(argv(text))
        said = [record.getMessage() for record in caplog.records]
        assert said == [f"{words} has no effect on preference pairs, only on text" for words in idle]


def test_wishes_that_have_an_effect_are_accepted():
    """What refuses a no-op must not refuse the real thing."""
    for text in (
        "--lora --limited_lora 1 --rslora 1 --lora_parts 'att, ffn'",
        "--layer_profile L --limited_lora 1 --rslora 1",
        "--limited_lora 0 --rslora 0",
        "--early_stop 3 --val_split 0.1",
        "--early_stop 3 --val_file V",
        "--magic_prime 5",
        "--data_type binidx --magic_prime 5 --my_exit_tokens 9",
        "--data_type utf-8",
        "--data_type txt",
        "--train_stage 3 --dim_att 128",
    ):
        parse(argv(TEXT + text))
    parse(argv("--train_stage 1 --my_testing x070 --vocab_size 9 --n_embd 64 --dim_att 64"))


def test_flags_and_settings_are_the_same_list():
    """A setting that cannot be typed, or two with the same name, would be lost."""
    assert set(CONSTRAINTS) and {name for facts in tables.LOSSES.values() for name in facts.settings} <= set(settings())
    assert spelled("{version} {pair_file} {dpo} {lora} {unknown}") == (
        "--my_testing --rlhf_train_file --dpo --lora {unknown}"
    )


def test_as_flags_comes_back():
    """The command in a log must give the same run."""
    text = "--load_model M --dpo 1 --rlhf_train_file F --grad_cp 0 --lora --lora_r 4 --my_testing x070"
    config = parse(argv(text))
    again = parse(as_flags(config))
    assert {name: getattr(again, name) for name in settings()} == {name: getattr(config, name) for name in settings()}
