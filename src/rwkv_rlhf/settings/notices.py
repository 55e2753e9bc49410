"""What is legal and hardly meant: a sentence each, before anything runs."""

from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.config import RWKV_LM, RWKV_LM_SAMPLES, Config
from rwkv_rlhf.settings.constraints import say, trains, trains_on_text


def notices(config: Config) -> list[str]:
    """What deserves one sentence before training, though it is legal."""
    said = []
    if config.loss == "orpo" and config.orpo_mode == "mean" and 0 < config.orpo_alpha < 0.005:
        said.append(
            say("{orpo_alpha=} is small for mean scores; alphas such as 0.0004 go with {orpo_mode} sum", config)
        )
    if config.loss and config.loss_facts.general_text and config.data_file and not trains_on_text(config):
        said.append(say("{data_file} is not read, because {dpo_general_corpus_ratio} is 0", config))
    elif trains(config) and config.data_file and not trains_on_text(config):
        said.append(say("{data_file} is not read: {loss=} trains on {pair_file}", config))
    if trains(config) and config.pair_file and config.loss and config.loss_facts.data == "text":
        said.append(say("{pair_file} is not read: {loss=} trains on {data_file}", config))
    if trains(config) and config.l2wrap and config.loss and not config.loss_facts.predicts:
        said.append(say("{l2wrap} 1 has no effect: {loss=} predicts no token", config))
    if trains(config) and config.trust_reference and not config.loss_facts.reference:
        said.append(say("{trust_reference} has no effect: {loss=} has no reference model", config))
    if config.drop_ties and not config.pair_file and not config.val_file:
        said.append(say("{drop_ties} 1 has no effect without preference pairs", config))
    if trains(config) and config.loss == "kto" and config.micro_bsz * config.accumulate_grad_batches < 4:
        said.append(
            "{kto} 1 estimates its divergence from the answers of one optimizer step: "
            "let {micro_bsz} times {accumulate_grad_batches} be 8 or more"
        )
    if trains(config) and config.lr_schedule == RWKV_LM and "lr_schedule" not in config.given:
        end = "{my_exit_tokens=}" if config.my_exit_tokens else "the whole run"
        epochs = (
            "" if "epoch_steps" in config.given else f", mini-epochs of {RWKV_LM_SAMPLES} samples ({{epoch_steps=}})"
        )
        sentence = (
            f"as in RWKV-LM: learning rate by cosine over {end}, warm-up from 1 %{epochs}; {{lr_schedule}} overrides"
        )
        said.append(say(sentence, config))
    if config.eval_only:
        unused = [name for name in ("wandb", "logger", "sample_prompts") if getattr(config, name)]
        said += [say(f"{{{name}=}} has no effect with {{eval_only}} 1", config) for name in unused]
    if config.infctx and not 0 < config.chunk_ctx < config.ctx_len:
        said.append(say("{chunk_ctx=} makes one chunk of a sample of {ctx_len=}: {infctx} saves nothing", config))
    if config.ctx_parts > 1 and not config.state_cp:
        said.append(say("{ctx_parts=} without {state_cp} 1 has no effect: the kernels run any length", config))
    if not config.chunk and (config.bptt != "exact" or config.state_offload):
        said.append(say("{bptt} and {state_offload} have no effect without {infctx} 1 or {state_cp} 1", config))
    if trains(config) and not config.epochs and config.epoch_steps % config.accumulate_grad_batches:
        whole = config.steps_per_epoch * config.accumulate_grad_batches
        said.append(
            say(f"{{epoch_steps=}} is rounded up to {whole}, whole steps of {{accumulate_grad_batches=}}", config)
        )
    if trains(config) and config.loss and not trains_on_text(config):
        for name in ("smoothing", "train_on_prompt"):
            if name in config.given and getattr(config, name):
                said.append(say(f"{{{name}=}} has no effect on preference pairs, only on text", config))
    own = config.loss_facts.settings if config.loss else ()
    useless = [
        name
        for loss, facts in tables.LOSSES.items()
        if loss != config.loss
        for name in facts.settings
        if name in config.given and name not in own
    ]
    if useless:
        said.append("no effect with this loss: " + ", ".join(f"{{{name}}}" for name in dict.fromkeys(useless)))
    return said
