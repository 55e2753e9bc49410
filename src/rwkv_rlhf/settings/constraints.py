"""What must hold between settings: the range of each one, and the combinations that make no sense.

Sentences write `{name}` for the flag of a field and `{name=}` for the flag with its value; the command line spells
them.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import Config, new_versions, settings
from rwkv_rlhf.settings.field import Choices, broken_limit, choices_of
from rwkv_rlhf.settings.formats import format_of_name, format_of_word
from rwkv_rlhf.settings.implementations import with_fact
from rwkv_rlhf.settings.optimizers import OPTIMIZERS
from rwkv_rlhf.settings.policy_tables import ADVANTAGES

PLAN_FLAGS = ("lora_r", "lora_alpha", "lora_dropout", "lora_parts", "lora_layers")
ADAPTER_SWITCHES = ("limited_lora", "rslora", "lora_plus")
PARTS = ("att", "ffn", "ln", "time")


class Constraint(NamedTuple):
    """A combination that is refused: its name, when it holds, and what to say."""

    name: str
    broken: Callable[[Config], bool]
    sentence: str


class ConstraintError(ValueError):
    """A setting, or a combination of settings, that is refused; `name` says by which constraint."""

    def __init__(self, name: str, sentence: str) -> None:
        super().__init__(sentence)
        self.name = name


def trains(config: Config) -> bool:
    """Whether this run takes training data: not for rwkv-init.pth, evaluation alone, the doctor or a mere shape."""
    return config.train_stage != 1 and not (config.eval_only or config.doctor or config.dry_run_shape)


def trains_on_text(config: Config) -> bool:
    """Whether training reads {data_file}."""
    if not config.loss:
        return False
    general = config.loss_facts.general_text and config.dpo_general_corpus_ratio > 0
    return config.loss_facts.data == "text" or general


def text_format(config: Config) -> str:
    """The format of {data_file} by its data type or its name, "" without one; the file is not opened."""
    if config.data_type:
        return format_of_word(config.data_type)
    if not config.data_file:
        return ""
    return format_of_name(config.data_file) or "binidx"


def alternatives(values: Choices) -> str:
    """The values as "a, b or c"."""
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}"


CONSTRAINTS = (
    Constraint(
        "shape_needs_dry_run",
        lambda c: bool(c.dry_run_shape) and not c.dry_run,
        "{dry_run_shape=} needs {dry_run} 1: it prints the memory of a model of that shape and trains nothing",
    ),
    Constraint(
        "shape_replaces_model",
        lambda c: bool(c.dry_run_shape) and bool(c.load_model or c.load_adapter or c.train_stage),
        "{dry_run_shape=} stands in place of a file: leave out {load_model}, {load_adapter} and {train_stage}",
    ),
    Constraint(
        "eval_needs_val_file",
        lambda c: c.eval_only and not c.val_file and not c.eval_tasks,
        "{eval_only} 1 needs {val_file}, the text or pairs to score, or {eval_tasks}",
    ),
    Constraint(
        "eval_has_no_page",
        lambda c: c.eval_only and c.serve_report > 0,
        "{serve_report=} shows a run while it trains, and {eval_only} 1 trains nothing: leave one of them out",
    ),
    Constraint(
        "json_of_an_evaluation",
        lambda c: c.json and not c.eval_only,
        "{json} 1 needs {eval_only} 1; what a run logs is JSON in metrics.jsonl",
    ),
    Constraint(
        "tasks_need_tokens",
        lambda c: bool(c.eval_tasks) and bool(c.loss) and not c.loss_facts.predicts,
        "{eval_tasks=} with {loss=}: a reward model predicts no tokens",
    ),
    Constraint(
        "limit_of_tasks",
        lambda c: c.eval_limit > 0 and not c.eval_tasks,
        "{eval_limit=} needs {eval_tasks}",
    ),
    Constraint(
        "new_model_has_no_base",
        lambda c: c.train_stage == 1 and bool(c.load_model),
        "{train_stage} 1 writes a new model, so {load_model} must be 0, not {load_model!}",
    ),
    Constraint(
        "new_model_needs_version",
        lambda c: c.train_stage == 1 and c.version is None,
        "{train_stage} 1 needs {version}, the RWKV version to make: " + alternatives(new_versions()),
    ),
    Constraint(
        "new_model_needs_vocabulary",
        lambda c: c.train_stage == 1 and c.vocab_size == 0,
        "{train_stage} 1 needs {vocab_size}, e.g. 65536 for the World vocabulary",
    ),
    Constraint(
        "heads_divide_width",
        lambda c: (
            c.train_stage == 1 and bool(c.version and tables.VERSIONS[c.version].heads) and c.n_embd % c.head_size != 0
        ),
        "{n_embd=} is not a multiple of {head_size=}",
    ),
    Constraint(
        "initial_values_need_square_attention",
        lambda c: c.train_stage == 1 and c.dim_att not in (0, c.n_embd),
        "{dim_att=} with {train_stage} 1: initial values exist for attention as wide as the model only, {n_embd=}",
    ),
    Constraint(
        "model_is_missing",
        lambda c: c.train_stage == 0 and not (c.doctor or c.dry_run_shape) and not c.load_model,
        "{load_model} is missing: give a checkpoint, or 0 with {train_stage} 1 (new model) or 3 (newest in {proj_dir})",
    ),
    Constraint(
        "pairs_need_a_loss",
        lambda c: trains(c) and not c.loss and bool(c.pair_file),
        "{pair_file=} needs a loss: {dpo} 1, {orpo} 1 or another one on preference pairs",
    ),
    Constraint(
        "loss_needs_prompts",
        lambda c: trains(c) and bool(c.loss) and c.loss_facts.data == "prompts" and not c.pair_file,
        "{loss=} needs {pair_file}, the file of prompts",
    ),
    Constraint(
        "loss_needs_pairs",
        lambda c: trains(c) and bool(c.loss) and c.loss_facts.data != "text" and not c.pair_file,
        "{loss=} needs {pair_file}, the file of preference pairs",
    ),
    Constraint(
        "loss_needs_text",
        lambda c: trains(c) and bool(c.loss) and c.loss_facts.data == "text" and not c.data_file,
        "{loss=} needs {data_file}, the text to train on",
    ),
    Constraint(
        "distillation_needs_teacher",
        lambda c: trains(c) and c.loss_facts.teacher and not c.teacher_model and text_format(c) != "h5",
        "{distillation} 1 needs a teacher: an .h5 with its logits as {data_file} (distillation_generate_h5.py), or "
        "{teacher_model}",
    ),
    Constraint(
        "joining_needs_text",
        lambda c: trains(c) and bool(c.loss) and not trains_on_text(c) and c.infctx_dataset_multiplier > 1,
        "{infctx_dataset_multiplier=} joins documents of text; {loss=} trains on pairs",
    ),
    Constraint(
        "gluing_needs_text",
        lambda c: trains(c) and bool(c.loss) and not trains_on_text(c) and not c.reset_state,
        "{reset_state} 0 joins documents of text without a reset; {loss=} trains on pairs",
    ),
    Constraint(
        "growing_needs_text",
        lambda c: trains(c) and bool(c.loss) and not trains_on_text(c) and c.initial_ctx_len > 0,
        "{initial_ctx_len=} shortens samples of text; for {loss=} there is {rlhf_max_corpus_len}",
    ),
    Constraint(
        "nothing_to_train_on",
        lambda c: trains(c) and not c.loss,
        "nothing to train on: give {data_file} (text), or {pair_file} with {dpo} 1, {orpo} 1 or another loss",
    ),
    Constraint(
        "general_text_is_missing",
        lambda c: c.loss == "dpo" and c.dpo_general_corpus_ratio > 0 and not c.data_file,
        "{dpo_general_corpus_ratio=} needs {data_file}, the general text",
    ),
    Constraint(
        "smoothing_of_this_variant",
        lambda c: c.dpo_label_smoothing > 0 and c.dpo_loss in ("ipo", "hinge"),
        "{dpo_label_smoothing=} has no meaning with {dpo_loss=}; it belongs to sigmoid and robust",
    ),
    Constraint(
        "ipo_means",
        lambda c: c.loss == "dpo" and c.dpo_loss == "ipo" and c.dpo_logp == "sum" and "dpo_logp" in c.given,
        "{dpo_logp=} with {dpo_loss=}: IPO is defined on mean log-probabilities",
    ),
    Constraint(
        "ppo_needs_rewards",
        lambda c: c.loss == "ppo" and not c.reward_model and not c.reward_funcs,
        "{ppo} 1 needs {reward_model} or {reward_funcs}",
    ),
    Constraint(
        "one_micro_batch",
        lambda c: c.loss == "ppo" and {"micro_bsz", "mini_batch_size"} <= c.given and c.micro_bsz != c.mini_batch_size,
        "{micro_bsz=} and {mini_batch_size=} say the same with {loss=}: give one of them",
    ),
    Constraint(
        "whole_updates",
        lambda c: c.loss == "ppo" and c.batch_size % (c.micro_bsz * c.accumulate_grad_batches) != 0,
        "{batch_size=} must be a multiple of an update's samples, {mini_batch_size=} times {accumulate_grad_batches=}",
    ),
    Constraint(
        "dual_clip_above_one",
        lambda c: 0 < c.dual_clip <= 1,
        "{dual_clip=}: must be above 1 (0 = off)",
    ),
    Constraint(
        "grpo_needs_rewards",
        lambda c: c.loss == "grpo" and not c.reward_model and not c.reward_funcs,
        "{grpo} 1 needs {reward_model} or {reward_funcs}",
    ),
    Constraint(
        "grpo_samples_everything",
        lambda c: c.loss == "grpo" and c.grpo_gen_topp < 1,
        "{grpo_gen_topp=}: answers of a cut distribution bias the ratio of policy and sampler, which the loss rests on "
        "(its mean is below 1); leave it 1, {grpo_gen_temperature} changes both alike",
    ),
    Constraint(
        "scale_of_groups",
        lambda c: c.loss == "grpo" and "grpo_scale" in c.given and not ADVANTAGES[c.grpo_advantage].scaled,
        "{grpo_scale=} has no effect with {grpo_advantage=}, whose advantages are not divided",
    ),
    Constraint(
        "delta_above_one",
        lambda c: 0 < c.grpo_delta <= 1,
        "{grpo_delta=}: the largest ratio must be above 1 (0 = no limit)",
    ),
    Constraint(
        "buffer_inside_the_answer",
        lambda c: c.grpo_overlong_buffer >= c.grpo_gen_length,
        "{grpo_overlong_buffer=} must be below {grpo_gen_length=}",
    ),
    Constraint(
        "one_distance_of_saves",
        lambda c: c.save_steps > 0 and (c.steps_per_epoch != c.save_steps or c.epoch_save != 1),
        "{save_steps} stands in place of {epoch_steps} and {epoch_save} (PPO has {save_freq}): give one of the two",
    ),
    Constraint(
        "profile_or_peft",
        lambda c: bool(c.layer_profile) and "peft" in c.given,
        "{layer_profile=} and {peft=}: the profile already says what each layer learns; give one of the two",
    ),
    Constraint(
        "one_length",
        lambda c: c.epochs > 0 and bool({"epoch_steps", "epoch_count", "my_exit_tokens"} & c.given),
        "{epochs=} counts passes over the data: leave out {epoch_steps}, {epoch_count} and {my_exit_tokens}",
    ),
    Constraint(
        "passes_of_samples",
        lambda c: c.epochs > 0 and c.own_length,
        "{epochs=} with {loss=}, whose length is {steps} samples: leave out {epochs}",
    ),
    Constraint(
        "passes_of_a_corpus",
        lambda c: c.epochs > 0 and trains_on_text(c) and c.loss_facts.data == "text" and text_format(c) == "binidx",
        "{epochs=} with a binidx corpus, whose slices have no passes: give {epoch_steps} and {epoch_count}",
    ),
    Constraint(
        "one_held_out_set",
        lambda c: bool(c.val_file) and c.val_split > 0,
        "{val_file=} and {val_split=}: give one of the two",
    ),
    Constraint(
        "early_stop_needs_held_out",
        lambda c: trains(c) and c.early_stop > 0 and not c.val_file and c.val_split == 0,
        "{early_stop=} needs {val_file} or {val_split}, the held-out examples that may stop improving",
    ),
    Constraint(
        "magic_prime_needs_corpus",
        lambda c: trains(c) and c.magic_prime > 0 and not (trains_on_text(c) and text_format(c) == "binidx"),
        "{magic_prime=} needs a binidx corpus as {data_file}; no other data is read in that order",
    ),
    Constraint(
        "exit_tokens_need_text",
        lambda c: trains(c) and c.my_exit_tokens > 0 and c.loss_facts.data != "text",
        "{my_exit_tokens=} with {loss=}: it counts tokens of text; {epoch_count} says when this training ends",
    ),
    Constraint(
        "one_infinite_context",
        lambda c: c.infctx and c.state_cp,
        "{infctx} 1 with {chunk_ctx} and {state_cp} 1 with {ctx_parts} are two ways to say the same; give one of them",
    ),
    Constraint(
        "more_parts_than_tokens",
        lambda c: c.ctx_parts > c.ctx_len,
        "{ctx_parts=} is more than {ctx_len=}",
    ),
    Constraint(
        "initial_length_too_long",
        lambda c: c.initial_ctx_len > c.ctx_len,
        "{initial_ctx_len=} is more than {ctx_len=}",
    ),
    Constraint(
        "growing_needs_initial_length",
        lambda c: "ctx_warmup_steps" in c.given and c.initial_ctx_len == 0,
        "{ctx_warmup_steps=} needs {initial_ctx_len}, the length to start from",
    ),
    Constraint(
        "shift_needs_state",
        lambda c: c.state_shift and not c.state and c.peft != "state",
        "{state_shift} 1 needs {state} 1",
    ),
    Constraint(
        "factors_need_adapter",
        lambda c: bool(c.load_adapter_pissa_init) and not c.load_adapter and not c.load_cold_adapter,
        "{load_adapter_pissa_init=} needs {load_adapter}, the adapter that began from it",
    ),
    Constraint(
        "rslora_needs_scale",
        lambda c: c.rslora and c.peft in tables.ADAPTERS and not tables.ADAPTERS[c.peft].scaled,
        "{rslora} 1 has no effect with {peft=}: only [scaled] have a scale",
    ),
    Constraint(
        "lora_plus_needs_factor_b",
        lambda c: c.lora_plus != 1 and c.peft in tables.ADAPTERS and not tables.ADAPTERS[c.peft].factor_b,
        "{lora_plus=} has no effect with {peft=}: it has no factor B",
    ),
    Constraint(
        "known_parts",
        lambda c: not set() < {word.strip() for word in c.lora_parts.split(",")} - {""} <= set(PARTS),
        f"{{lora_parts=}}: must be a comma list of {', '.join(PARTS)}; single matrices are chosen by RejectParts of a "
        "{layer_profile}",
    ),
)


# what optimizers cannot take
OPTIMIZER_CONSTRAINTS = (
    Constraint(
        "optimizer_of_whole_tensors",
        lambda c: trains(c) and tables.STRATEGIES[c.strategy].stage > 0 and not OPTIMIZERS[c.optim].flat,
        "{optim=} needs whole matrices, and {strategy=} makes one long share of them for each rank; use {strategy} ddp",
    ),
    Constraint(
        "optimizer_of_shards",
        lambda c: trains(c) and c.strategy == "fsdp" and not OPTIMIZERS[c.optim].sharded,
        "{optim=} cannot take the parts that {strategy=} splits tensors into; use {strategy} ddp",
    ),
    Constraint(
        "optimizer_of_float32",
        lambda c: trains(c) and c.precision == "fp64" and not OPTIMIZERS[c.optim].float64,
        "{optim=} computes in float32, so {precision=} would be less than it says; use {optim} adamw",
    ),
    Constraint(
        "final_decay_below_zero",
        lambda c: -1 < c.weight_decay_final < 0,
        "{weight_decay_final=}: must be -1 (the decay stays as it is) or >= 0",
    ),
    Constraint(
        "final_decay_needs_decay",
        lambda c: trains(c) and c.weight_decay_final >= 0 and c.weight_decay == 0 and not c.layer_profile,
        "{weight_decay_final=} needs {weight_decay} above 0, the decay to begin with",
    ),
)

# what strategies cannot do, with the reason; all else goes together with all of them
STRATEGY_CONSTRAINTS = (
    Constraint(
        "whole_blocks_and_chunks",
        lambda c: trains(c) and tables.STRATEGIES[c.strategy].whole_blocks and c.chunk > 0,
        "{strategy=} gathers the weights of one block at a time, and infinite context has one backward pass for all "
        "chunks and blocks; use {strategy} ddp, deepspeed_stage_1 or deepspeed_stage_2",
    ),
    Constraint(
        "whole_blocks_and_sampling",
        lambda c: tables.STRATEGIES[c.strategy].whole_blocks and c.loss_facts.data == "prompts",
        "{strategy=} gathers the weights of one block at a time, and {loss=} samples answers token by token; use "
        "{strategy} ddp, deepspeed_stage_1 or deepspeed_stage_2",
    ),
    Constraint(
        "states_and_recomputed_blocks",
        lambda c: trains(c) and tables.STRATEGIES[c.strategy].stage == 3 and c.state and c.grad_cp,
        "{strategy=} releases the learnt states before a recomputed block reads them; use {grad_cp} 0, or "
        "{strategy} deepspeed_stage_2, which needs no more memory for them",
    ),
    Constraint(
        "rows_of_tables",
        lambda c: trains(c) and c.train_tables and not tables.STRATEGIES[c.strategy].rows,
        "{train_tables} 1 has gradients for the rows of some tokens only, and {strategy=} splits whole ones; use "
        "{strategy} ddp, or leave out {train_tables}",
    ),
    Constraint(
        "stage_3_and_compile",
        lambda c: trains(c) and tables.STRATEGIES[c.strategy].stage == 3 and c.compile,
        "{strategy=} puts each matrix of a block together as it runs, and DeepSpeed lets no compiler see that; use "
        "{strategy} ddp, fsdp, deepspeed_stage_1 or deepspeed_stage_2, or {compile} 0",
    ),
    Constraint(
        "rows_of_tables_and_compile",
        lambda c: trains(c) and c.train_tables and c.compile,
        "{train_tables} 1 has gradients for the rows of some tokens only, which torch.compile does not know; leave out "
        "{compile} or {train_tables}",
    ),
    Constraint(
        "deepspeed_scales_no_loss",
        lambda c: trains(c) and tables.STRATEGIES[c.strategy].stage > 0 and c.precision == "fp16",
        "{precision=} needs a scaled loss, and {strategy=} takes its steps by itself, without one; use {strategy} ddp "
        "or fsdp, or {precision} bf16",
    ),
    Constraint(
        "deepspeed_is_float32",
        lambda c: trains(c) and tables.STRATEGIES[c.strategy].stage > 0 and c.precision == "fp64",
        "{strategy=} keeps its copies in float32, so {precision=} would be less than it says; use {strategy} ddp",
    ),
)


def say(sentence: str, config: Config) -> str:
    """`sentence` with `{name=}` as `{name} value` and `{name!}` as the value; `{name}` stays for the command line.

    `[fact]` becomes the adapters of which the fact holds.
    """

    def filled(match: re.Match[str]) -> str:
        name, sign = match[1], match[2]
        if name == "loss":
            return f"{{{config.loss}}} 1"
        value = getattr(config, name)
        text = str(int(value) if isinstance(value, bool) else value)
        return text if sign == "!" else f"{{{name}}} {text}"

    def adapters(match: re.Match[str]) -> str:
        return " and ".join(with_fact(tables.ADAPTERS, lambda facts: bool(getattr(facts, match[1]))))

    return re.sub(r"\{(\w+)([=!])\}", filled, re.sub(r"\[(\w+)\]", adapters, sentence))


def check_range(name: str, value: Any) -> None:
    """Raises ConstraintError when the setting `name` may not have this value."""
    field = settings()[name]
    choices = choices_of(field)
    if choices and value not in choices:
        words = ", ".join(str(choice) for choice in choices if choice != "")
        raise ConstraintError(name, f"{{{name}}} {value}: must be one of {words}")
    if broken := broken_limit(field, value):
        raise ConstraintError(name, f"{{{name}}} {value}: must be {broken}")


def check(config: Config) -> None:
    """Raises ConstraintError, one sentence with the flag, its value and what is legal, for the first that is broken."""
    for name in settings():
        if (value := getattr(config, name)) is not None:
            check_range(name, value)
    for constraint in (*CONSTRAINTS, *OPTIMIZER_CONSTRAINTS, *STRATEGY_CONSTRAINTS):
        if constraint.broken(config):
            raise ConstraintError(constraint.name, say(constraint.sentence, config))
    asked_later = bool(config.load_adapter) and not config.layer_profile and "peft" not in config.given  # its sidecar
    if config.peft not in tables.ADAPTERS and not asked_later:
        useless = [name for name in PLAN_FLAGS if name in config.given]
        if not config.layer_profile:
            useless += [name for name in ADAPTER_SWITCHES if getattr(config, name) != settings()[name].default]
        if useless:
            why = "{layer_profile} has its own columns" if config.layer_profile else "it needs {lora} or {peft}"
            raise ConstraintError(
                "adapter_settings_need_adapter", say(f"{{{useless[0]}=}} has no effect: {why}", config)
            )
