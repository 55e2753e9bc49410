"""What must hold between settings: the range of each one, and the combinations that make no sense.

Sentences write `{name}` for the flag of a field and `{name=}` for the flag with its value; the command line spells
them.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from rwkv_rlhf.settings.config import ADAPTERS, PAIR_LOSSES, Config, settings

# settings that mean something with one loss only
SETTINGS_OF = {
    "dpo": ("dpo_alpha", "dpo_beta", "dpo_loss", "dpo_logp", "dpo_label_smoothing", "dpo_general_corpus_ratio"),
    "orpo": ("orpo_alpha", "orpo_mode"),
    "simpo": ("simpo_alpha", "simpo_beta", "simpo_gamma"),
    "cpo": ("cpo_alpha", "cpo_beta"),
    "kto": ("kto_beta", "kto_desirable_weight", "kto_undesirable_weight"),
    "wpo": ("wpo_alpha", "wpo_beta"),
    "distillation": ("temperature", "top_k", "alpha", "kd", "kd_tail", "teacher_model"),
    "rm": ("rm_margin", "rm_centring"),
    "ppo": (
        *("steps", "batch_size", "mini_batch_size", "ppo_epochs", "init_kl_coef", "adap_kl_ctrl", "target_kl"),
        *("early_stopping", "reward_baseline", "output_max_length", "save_freq"),
    ),
    "grpo": (
        *("grpo_gen_count", "grpo_gen_length", "grpo_gen_temperature", "grpo_gen_topp", "grpo_kl_beta"),
        "reward_funcs",
    ),
}
PLAN_FLAGS = ("lora_r", "lora_alpha", "lora_dropout", "lora_parts", "lora_layers")
ADAPTER_SWITCHES = ("limited_lora", "rslora", "lora_plus")
PARTS = ("att", "ffn", "ln", "time")
NOT_BINIDX = (".jsonl", ".txt", ".csv", ".save", ".h5", ".hdf5")


class Constraint(NamedTuple):
    """A combination that is refused: when it holds, and what to say."""

    broken: Callable[[Config], bool]
    sentence: str


def trains(config: Config) -> bool:
    """Whether this run takes training data: not for rwkv-init.pth, evaluation alone, the doctor or a mere shape."""
    return config.train_stage != 1 and not (config.eval_only or config.doctor or config.dry_run_shape)


def trains_on_text(config: Config) -> bool:
    """Whether training reads {data_file}."""
    return config.loss in ("sft", "distillation") or (config.loss == "dpo" and config.dpo_general_corpus_ratio > 0)


def names_corpus(config: Config) -> bool:
    """Whether {data_file} can be a binidx corpus, by its data type or its name; the file is not opened."""
    if config.data_type:
        return config.data_type == "binidx"
    return bool(config.data_file) and not config.data_file.lower().endswith(NOT_BINIDX)


def names_h5(config: Config) -> bool:
    """Whether {data_file} is an .h5, by its data type or its name."""
    if config.data_type:
        return config.data_type in ("h5", "hdf5")
    return config.data_file.lower().endswith((".h5", ".hdf5"))


CONSTRAINTS = (
    Constraint(
        lambda c: bool(c.dry_run_shape) and not c.dry_run,
        "{dry_run_shape=} needs {dry_run} 1: it prints the memory of a model of that shape and trains nothing",
    ),
    Constraint(
        lambda c: bool(c.dry_run_shape) and bool(c.load_model or c.load_adapter or c.train_stage),
        "{dry_run_shape=} stands in place of a file: leave out {load_model}, {load_adapter} and {train_stage}",
    ),
    Constraint(
        lambda c: c.eval_only and not c.val_file,
        "{eval_only} 1 needs {val_file}, the text or pairs to score",
    ),
    Constraint(
        lambda c: c.train_stage == 1 and bool(c.load_model),
        "{train_stage} 1 writes a new model, so {load_model} must be 0, not {load_model!}",
    ),
    Constraint(
        lambda c: c.train_stage == 1 and c.version is None,
        "{train_stage} 1 needs {version}, the RWKV version to make: x040, x052, x060 or x070",
    ),
    Constraint(
        lambda c: c.train_stage == 1 and c.vocab_size == 0,
        "{train_stage} 1 needs {vocab_size}, e.g. 65536 for the World vocabulary",
    ),
    Constraint(
        lambda c: c.train_stage == 1 and c.version != "x040" and c.n_embd % c.head_size != 0,
        "{n_embd=} is not a multiple of {head_size=}",
    ),
    Constraint(
        lambda c: c.train_stage == 1 and c.dim_att not in (0, c.n_embd),
        "{dim_att=} with {train_stage} 1: initial values exist for attention as wide as the model only, {n_embd=}",
    ),
    Constraint(
        lambda c: c.train_stage == 0 and not (c.doctor or c.dry_run_shape) and not c.load_model,
        "{load_model} is missing: give a checkpoint, or 0 with {train_stage} 1 (new model) or 3 (newest in {proj_dir})",
    ),
    Constraint(
        lambda c: trains(c) and not c.loss and bool(c.pair_file),
        "{pair_file=} needs a loss: {dpo} 1, {orpo} 1 or another one on preference pairs",
    ),
    Constraint(
        lambda c: trains(c) and c.loss in (*PAIR_LOSSES, "kto", "ppo", "grpo") and not c.pair_file,
        "{loss=} needs {pair_file}, the file of preference pairs",
    ),
    Constraint(
        lambda c: trains(c) and c.loss in ("sft", "distillation") and not c.data_file,
        "{loss=} needs {data_file}, the text to train on",
    ),
    Constraint(
        lambda c: trains(c) and c.loss == "distillation" and not c.teacher_model and not names_h5(c),
        "{distillation} 1 needs a teacher: an .h5 with its logits as {data_file} (distillation_generate_h5.py), or "
        "{teacher_model}",
    ),
    Constraint(
        lambda c: trains(c) and bool(c.loss) and not trains_on_text(c) and c.infctx_dataset_multiplier > 1,
        "{infctx_dataset_multiplier=} joins documents of text; {loss=} trains on pairs",
    ),
    Constraint(
        lambda c: trains(c) and bool(c.loss) and not trains_on_text(c) and not c.reset_state,
        "{reset_state} 0 glues documents of text; {loss=} trains on pairs",
    ),
    Constraint(
        lambda c: trains(c) and bool(c.loss) and not trains_on_text(c) and c.initial_ctx_len > 0,
        "{initial_ctx_len=} shortens samples of text; for {loss=} there is {rlhf_max_corpus_len}",
    ),
    Constraint(
        lambda c: trains(c) and not c.loss,
        "nothing to train on: give {data_file} (text), or {pair_file} with {dpo} 1, {orpo} 1 or another loss",
    ),
    Constraint(
        lambda c: c.loss == "dpo" and c.dpo_general_corpus_ratio > 0 and not c.data_file,
        "{dpo_general_corpus_ratio=} needs {data_file}, the general text",
    ),
    Constraint(
        lambda c: c.dpo_label_smoothing > 0 and c.dpo_loss in ("ipo", "hinge"),
        "{dpo_label_smoothing=} has no meaning with {dpo_loss=}; it belongs to sigmoid and robust",
    ),
    Constraint(
        lambda c: c.loss == "dpo" and c.dpo_loss == "ipo" and c.dpo_logp == "sum" and "dpo_logp" in c.given,
        "{dpo_logp=} with {dpo_loss=}: IPO is defined on mean log-probabilities",
    ),
    Constraint(
        lambda c: c.loss == "ppo" and not c.reward_model,
        "{ppo} 1 needs {reward_model}",
    ),
    Constraint(
        lambda c: c.loss == "grpo" and not c.reward_model and not c.reward_funcs,
        "{grpo} 1 needs {reward_model} or {reward_funcs}",
    ),
    Constraint(
        lambda c: bool(c.layer_profile) and "peft" in c.given,
        "{layer_profile=} and {peft=}: the profile already says what each layer learns; give one of the two",
    ),
    Constraint(
        lambda c: bool(c.val_file) and c.val_split > 0,
        "{val_file=} and {val_split=}: give one of the two",
    ),
    Constraint(
        lambda c: trains(c) and c.early_stop > 0 and not c.val_file and c.val_split == 0,
        "{early_stop=} needs {val_file} or {val_split}, the held-out examples that may stop improving",
    ),
    Constraint(
        lambda c: trains(c) and c.magic_prime > 0 and not (trains_on_text(c) and names_corpus(c)),
        "{magic_prime=} needs a binidx corpus as {data_file}; no other data comes in that order",
    ),
    Constraint(
        lambda c: trains(c) and c.my_exit_tokens > 0 and c.loss not in ("", "sft", "distillation"),
        "{my_exit_tokens=} with {loss=}: it counts tokens of text; {epoch_count} says when this training ends",
    ),
    Constraint(
        lambda c: c.infctx and c.state_cp,
        "{infctx} 1 with {chunk_ctx} and {state_cp} 1 with {ctx_parts} say the same twice; give one of the two",
    ),
    Constraint(
        lambda c: c.ctx_parts > c.ctx_len,
        "{ctx_parts=} is more than {ctx_len=}",
    ),
    Constraint(
        lambda c: c.initial_ctx_len > c.ctx_len,
        "{initial_ctx_len=} is more than {ctx_len=}",
    ),
    Constraint(
        lambda c: "ctx_warmup_steps" in c.given and c.initial_ctx_len == 0,
        "{ctx_warmup_steps=} needs {initial_ctx_len}, the length to start from",
    ),
    Constraint(
        lambda c: c.state_shift and not c.state and c.peft != "state",
        "{state_shift} 1 needs {state} 1",
    ),
    Constraint(
        lambda c: bool(c.load_adapter_pissa_init) and not c.load_adapter and not c.load_cold_adapter,
        "{load_adapter_pissa_init=} needs {load_adapter}, the adapter that began from it",
    ),
    Constraint(
        lambda c: c.force and not c.load_adapter and not c.load_cold_adapter,
        "{force} 1 needs {load_adapter} or {load_cold_adapter}, the adapter of another base model",
    ),
    Constraint(
        lambda c: c.rslora and c.peft in ("pissa", "bone", "miss"),
        "{rslora} 1 has no effect with {peft=}: only lora and dora have a scale",
    ),
    Constraint(
        lambda c: c.lora_plus != 1 and c.peft in ("bone", "miss"),
        "{lora_plus=} has no effect with {peft=}: it has no factor B",
    ),
    Constraint(
        lambda c: not set() < {word.strip() for word in c.lora_parts.split(",")} - {""} <= set(PARTS),
        "{lora_parts=}: must be a comma list of att, ffn, ln, time",
    ),
)


# what strategies cannot do, with the reason; all else goes together with all of them
STRATEGY_CONSTRAINTS = (
    Constraint(
        lambda c: trains(c) and c.strategy.startswith(("fsdp", "deepspeed_stage_3")) and c.chunk > 0,
        "{strategy=} puts a block together when its backward pass begins, and infinite context has one backward pass "
        "for all pieces and blocks; use {strategy} ddp, deepspeed_stage_1 or deepspeed_stage_2",
    ),
    Constraint(
        lambda c: trains(c) and c.strategy.startswith("deepspeed_stage_3") and c.state and c.grad_cp,
        "{strategy=} lets the learnt states go before a block that is recomputed reads them; use {grad_cp} 0, or "
        "{strategy} deepspeed_stage_2, which needs no more memory for them",
    ),
    Constraint(
        lambda c: trains(c) and c.strategy.startswith("deepspeed") and c.precision == "fp64",
        "{strategy=} keeps its copies in float32, so {precision=} would be less than it says; use {strategy} ddp",
    ),
)


def say(sentence: str, config: Config) -> str:
    """`sentence` with `{name=}` as `{name} value` and `{name!}` as the value; `{name}` stays for the command line."""

    def filled(match: re.Match[str]) -> str:
        name, sign = match[1], match[2]
        if name == "loss":
            return f"{{{config.loss}}} 1"
        value = getattr(config, name)
        text = str(int(value) if isinstance(value, bool) else value)
        return text if sign == "!" else f"{{{name}}} {text}"

    return re.sub(r"\{(\w+)([=!])\}", filled, sentence)


def check(config: Config) -> None:
    """Raises ValueError, one sentence with the flag, its value and what is legal, for the first broken constraint."""
    for name, field in settings().items():
        value, legal = getattr(config, name), field.metadata
        if value is None:
            continue
        if legal["choices"] and value not in legal["choices"]:
            words = ", ".join(str(choice) for choice in legal["choices"] if choice != "")
            raise ValueError(f"{{{name}}} {value}: must be one of {words}")
        for limit, broken, words in (
            ("at_least", lambda v, x: v < x, ">="),
            ("above", lambda v, x: v <= x, ">"),
            ("at_most", lambda v, x: v > x, "<="),
            ("below", lambda v, x: v >= x, "<"),
        ):
            if limit in legal and broken(value, legal[limit]):
                raise ValueError(f"{{{name}}} {value}: must be {words} {legal[limit]}")
    for constraint in (*CONSTRAINTS, *STRATEGY_CONSTRAINTS):
        if constraint.broken(config):
            raise ValueError(say(constraint.sentence, config))
    if config.peft not in ADAPTERS:
        useless = [name for name in PLAN_FLAGS if name in config.given]
        if not config.layer_profile:
            useless += [name for name in ADAPTER_SWITCHES if getattr(config, name) != settings()[name].default]
        if useless:
            why = "{layer_profile} has its own columns" if config.layer_profile else "it needs {lora} or {peft}"
            raise ValueError(say(f"{{{useless[0]}=}} has no effect: {why}", config))


def notices(config: Config) -> list[str]:
    """What deserves one sentence before training, though it is legal."""
    said = []
    if config.loss == "orpo" and config.orpo_mode == "mean" and 0 < config.orpo_alpha < 0.005:
        said.append(
            say("{orpo_alpha=} is small for mean scores; alphas such as 0.0004 go with {orpo_mode} sum", config)
        )
    if config.loss == "dpo" and config.data_file and config.dpo_general_corpus_ratio == 0:
        said.append(say("{data_file} is not read, because {dpo_general_corpus_ratio} is 0", config))
    elif trains(config) and config.data_file and not trains_on_text(config):
        said.append(say("{data_file} is not read: {loss=} trains on {pair_file}", config))
    if trains(config) and config.pair_file and config.loss in ("sft", "distillation"):
        said.append(say("{pair_file} is not read: {loss=} trains on {data_file}", config))
    if trains(config) and config.trust_reference and config.loss not in ("dpo", "wpo", "kto"):
        said.append(say("{trust_reference} has no effect: {loss=} has no reference model", config))
    if config.drop_ties and not config.pair_file and not config.val_file:
        said.append(say("{drop_ties} 1 has no effect without preference pairs", config))
    if trains(config) and config.loss == "kto" and config.micro_bsz * config.accumulate_grad_batches < 4:
        said.append(
            "{kto} 1 estimates its divergence from the answers of one optimizer step: "
            "let {micro_bsz} times {accumulate_grad_batches} be 8 or more"
        )
    if config.infctx and not 0 < config.chunk_ctx < config.ctx_len:
        said.append(say("{chunk_ctx=} makes one chunk of a sample of {ctx_len=}: {infctx} saves nothing", config))
    if config.ctx_parts > 1 and not config.state_cp:
        said.append(say("{ctx_parts=} without {state_cp} 1 has no effect: the kernels run any length", config))
    if not config.chunk and (config.bptt != "exact" or config.state_offload):
        said.append(say("{bptt} and {state_offload} have no effect without {infctx} 1 or {state_cp} 1", config))
    if trains(config) and config.epoch_steps % config.accumulate_grad_batches:
        whole = config.steps_per_epoch * config.accumulate_grad_batches
        said.append(
            say(f"{{epoch_steps=}} is rounded up to {whole}, whole steps of {{accumulate_grad_batches=}}", config)
        )
    if trains(config) and config.loss and not trains_on_text(config):
        for name in ("smoothing", "train_on_prompt"):
            if name in config.given and getattr(config, name):
                said.append(say(f"{{{name}=}} has no effect on preference pairs, only on text", config))
    useless = [
        name for loss, names in SETTINGS_OF.items() if loss != config.loss for name in names if name in config.given
    ]
    if useless:
        said.append("no effect with this loss: " + ", ".join(f"{{{name}}}" for name in useless))
    return said
