"""Every setting of the trainer: name, type, default, help and legal range, in one frozen record.

Field names are the clean names; the command line spells a few of them differently (`flags.py`). What must hold between
two settings is in `constraints.py`. In help texts `{name}`
stands for the flag of that field, `[text]` and `[pairs]` for the formats of files that hold them.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rwkv_rlhf import __version__
from rwkv_rlhf.files import MODEL_SUFFIXES
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.derived import ppo_length
from rwkv_rlhf.settings.field import FILE, MAY_CHANGE, ROUNDS, ROUNDS_IF_EXACT, Choices, broken_limit, setting
from rwkv_rlhf.settings.formats import FORMATS
from rwkv_rlhf.settings.implementations import with_fact
from rwkv_rlhf.settings.optimizers import OPTIMIZERS
from rwkv_rlhf.settings.policy_tables import ADVANTAGES, GRPO_LOSSES, SCALES
from rwkv_rlhf.settings.shapes import SHAPES, THINKING
from rwkv_rlhf.settings.tables import LossFacts

PROGRAM = "RWKV-LM-RLHF"
PROGRAM_VERSION = __version__

RWKV_LM = "rwkv-lm"  # of {lr_schedule}: that of RWKV-LM's own scripts
RWKV_LM_SAMPLES = 40320  # of a mini-epoch there, whatever is typed


def new_versions() -> Choices:
    """Versions that --my_testing may name: those of which models can be made."""
    return with_fact(tables.VERSIONS, lambda facts: facts.new)


def peft_modes() -> Choices:
    """What --peft may name."""
    return ("full", "state", *tables.ADAPTERS)


def data_types() -> Choices:
    """What --data_type may name: the formats that hold text; "" = by the suffix."""
    found = ((name, facts) for name, facts in FORMATS.items() if "text" in facts.holds)
    return ("", *(word for name, facts in found for word in (name, *facts.words)))


@dataclasses.dataclass(frozen=True)
class Config:
    """One run of train.py. Empty text, 0 and None mean "not given" where the help says so.

    `given` holds the names of the fields that the user typed, so that a default can be told from a wish: a typed
    n_layer that disagrees with the checkpoint is an error, the default is not.
    """

    # --- model
    load_model: str = setting(
        "", "checkpoint to start from (.pth or .safetensors); 0 = none (with {train_stage} 1, 3)", resume=MAY_CHANGE
    )
    load_adapter: str = setting("", "adapter checkpoint to continue from, or to evaluate with", resume=FILE)
    load_adapter_pissa_init: str = setting(
        "", "initial factors of a PiSSA {load_adapter}, if they are not beside it", resume=FILE
    )
    load_cold_adapter: str = setting("", "adapter merged into the model before it is quantised", resume=FILE)
    load_partial: bool = setting(False, "tensors that {load_model} lacks begin at initial values; whole models only")
    force: bool = setting(
        False,
        "go on with an adapter of another base model, in a folder that holds another run, with too little memory",
        resume=MAY_CHANGE,
    )
    version: str | None = setting(
        None, "RWKV version; absent = read from the checkpoint", choices=new_versions, resume=MAY_CHANGE
    )
    n_layer: int = setting(
        6, "number of blocks (read from the checkpoint if there is one)", at_least=1, resume=MAY_CHANGE
    )
    n_embd: int = setting(
        512, "width of the model (read from the checkpoint if there is one)", at_least=1, resume=MAY_CHANGE
    )
    vocab_size: int = setting(0, "size of the vocabulary; 0 = read from the checkpoint", at_least=0, resume=MAY_CHANGE)
    head_size: int = setting(
        64, "channels per head (read from the checkpoint if there is one)", at_least=1, resume=MAY_CHANGE
    )
    dim_att: int = setting(0, "width of attention; 0 = n_embd", at_least=0, resume=MAY_CHANGE)
    dim_ffn: int = setting(
        0, "width of the feed-forward part; 0 = what the version uses", at_least=0, resume=MAY_CHANGE
    )
    train_stage: int = setting(
        0, "0 train; 1 write rwkv-init.pth and stop; 2, 3 go on from the newest", choices=(0, 1, 2, 3)
    )
    random_seed: int = setting(-1, "seed of all that is random; -1 = seed 0, so that runs repeat", at_least=-1)

    # --- run
    proj_dir: str = setting("out", "folder for checkpoints, logs and reports", resume=MAY_CHANGE)
    archive: bool = setting(
        False, "move what another run left in {proj_dir} into {proj_dir}/old-DATE", resume=MAY_CHANGE
    )
    wandb: str = setting("", "project name at Weights & Biases; empty = off", resume=MAY_CHANGE)
    logger: str = setting("", "where else the figures go: csv, tensorboard, or both with a comma", resume=MAY_CHANGE)
    accelerator: str = setting(
        "auto", "where to compute; auto = GPU, else CPU", choices=("auto", "cpu", "gpu"), resume=MAY_CHANGE
    )
    devices: int = setting(1, "devices per machine", at_least=1, resume=MAY_CHANGE)
    num_nodes: int = setting(1, "machines", at_least=1, resume=MAY_CHANGE)
    strategy: str = setting("auto", "how devices share the work", choices=lambda: tuple(tables.STRATEGIES))
    timeout: float = setting(
        30.0, "minutes without progress before a process counts as hung", above=0, resume=MAY_CHANGE
    )
    ds_bucket_mb: int = setting(64, "DeepSpeed bucket size in MB", at_least=1, resume=ROUNDS)
    precision: str = setting(
        "bf16",
        "precision of computation; not typed = bf16 where the device is fast in it, else fp32",
        choices=("bf16", "fp16", "fp32", "fp64"),
    )
    wkv_backend: str = setting(
        "auto", "backend of the recurrence's kernels", choices=lambda: tuple(tables.BACKENDS), resume=ROUNDS
    )
    products: str = setting(
        "auto", "how a CPU multiplies by matrices", choices=lambda: tuple(tables.PRODUCTS), resume=ROUNDS
    )
    compile: bool = setting(False, "compile blocks with torch.compile while they train", resume=ROUNDS)
    enable_progress_bar: bool = setting(True, "show a progress bar", resume=MAY_CHANGE)
    serve_report: int = setting(
        0,
        "port of this machine (127.0.0.1) at which the page is shown live; 0 = off",
        at_least=0,
        at_most=65535,
        resume=MAY_CHANGE,
    )
    log_every: int = setting(1, "optimizer steps between two lines of metrics.jsonl", at_least=1, resume=MAY_CHANGE)
    resume: str = setting(
        "",
        "continue a stopped run exactly: auto (from {proj_dir}, if there is anything) or a path; empty = off",
        resume=MAY_CHANGE,
    )
    resume_every: int = setting(
        100,
        "optimizer steps between two resume points, beside those at saves; 0 = only there, -1 = none",
        at_least=-1,
        resume=MAY_CHANGE,
    )
    dry_run: bool = setting(False, "print the plan (data, memory, steps) and stop", resume=MAY_CHANGE)
    dry_run_shape: str = setting(
        "", "{dry_run} 1: only the memory of a model like L61-D4096 or L61-D4096:V65536, no file"
    )
    doctor: bool = setting(False, "examine this machine and stop", resume=MAY_CHANGE)
    debug: bool = setting(False, "show the traceback of an error", resume=MAY_CHANGE)

    # --- length
    epoch_steps: int = setting(1000, "micro-batches per rank in one mini-epoch", at_least=1)
    epoch_count: int = setting(500, "mini-epochs to train", at_least=1, resume=MAY_CHANGE)
    epochs: float = setting(
        0.0,
        "passes over the data, each a mini-epoch, in place of {epoch_steps} and {epoch_count}; 0 = as those say, or 3 "
        "where neither is typed",
        at_least=0,
        resume=MAY_CHANGE,
    )
    epoch_begin: int = setting(0, "offset of the numbering of checkpoints and of the schedule", at_least=0)
    epoch_save: int = setting(5, "mini-epochs between two saves", at_least=1, resume=MAY_CHANGE)
    save_steps: int = setting(
        0, "optimizer steps between two saves, in place of {epoch_steps} and {epoch_save}; 0 = as those say", at_least=0
    )
    my_exit_tokens: int = setting(0, "tokens after which pre-training stops; 0 = no limit", at_least=0)
    micro_bsz: int = setting(1, "rows per micro-batch and device", at_least=1)
    accumulate_grad_batches: int = setting(1, "micro-batches per optimizer step", at_least=1)

    # --- optimizer
    optim: str = setting("adamw", "optimizer", choices=lambda: tuple(OPTIMIZERS))
    lr_init: float = setting(1e-4, "learning rate after warm-up (0.3 with {peft} state)", at_least=0)
    lr_final: float = setting(1e-5, "learning rate at the end (a tenth of the first with {peft} state)", at_least=0)
    lr_schedule: str | None = setting(
        None,
        "shape between the two; absent = rwkv-lm for text with {my_exit_tokens} or {train_stage} 2, 3, else exp",
        choices=("exp", "cosine", "linear", "constant", RWKV_LM),
    )
    lr_advanced: bool = setting(True, "learning rates from the layer profile; 0 = from {lr_init} and {lr_final}")
    warmup_steps: int = setting(-1, "optimizer steps of warm-up; -1 = none", at_least=-1)
    beta1: float = setting(0.9, "Adam: decay of the gradient's running mean", at_least=0, below=1)
    beta2: float = setting(0.99, "Adam: decay of the squared gradient's running mean", at_least=0, below=1)
    adam_eps: float = setting(1e-8, "Adam: epsilon", above=0)
    weight_decay: float = setting(0.0, "decay of matrices (a layer profile has its own)", at_least=0)
    weight_decay_final: float = setting(
        -1.0, "decay at the end, reached exponentially, of all that decays; -1 = constant", at_least=-1
    )
    layerwise_lr: bool = setting(True, "the tradition's learning-rate multipliers (time_decay, w0: x2; time_first: x3)")
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0 = no limit", at_least=0)
    grad_cp: bool = setting(True, "recompute activations in backward, to save memory", resume=MAY_CHANGE)
    dropout: float = setting(
        0.0, "dropout of the residual stream, after the embedding and both halves of each block", at_least=0, below=1
    )
    max_bad_steps: int = setting(
        3, "steps with a non-finite loss that are skipped before the run ends", at_least=0, resume=MAY_CHANGE
    )

    # --- trained
    layer_profile: str = setting(
        "", "CSV with one row per layer: mode, rank, learning rates (docs/layer-profiles.md)", resume=FILE
    )
    peft: str = setting("full", "plan for all blocks if there is no layer profile", choices=peft_modes)
    lora_r: int = setting(8, "rank (or Bone's block size) with {peft}", at_least=1)
    lora_alpha: float = setting(32.0, "alpha with {peft}: the update is scaled by alpha / rank", above=0)
    lora_dropout: float = setting(0.01, "dropout before the adapter with {peft}", at_least=0, below=1)
    lora_parts: str = setting("att,ffn,ln,time", "parts that learn with {peft}: some of att,ffn,ln,time")
    lora_layers: str = setting("", 'blocks that learn with {peft}, e.g. "0-3 25-31"; empty = all')
    limited_lora: bool = setting(False, "train the adapters only, no LayerNorms or small vectors")
    rslora: bool = setting(False, "scale LoRA by alpha / sqrt(rank)")
    lora_plus: float = setting(1.0, "LoRA+: learning rate of the factor B, in multiples of A's", above=0)
    train_tables: bool = setting(
        False, "RWKV-7a: train DeepEmbed's tables too, the rows of the tokens that occur, at their block's rates"
    )
    svd_niter: int = setting(4, "PiSSA: iterations of the randomised SVD", at_least=0, resume=MAY_CHANGE)
    quant: bool | None = setting(
        None,
        "pack frozen matrices; absent = with a layer profile or a typed {quant_mode}, not with {peft} or {state} alone",
    )
    quant_mode: str = setting("nf4", "storage of frozen matrices", choices=lambda: (*tables.STORAGES, tables.DENSE))
    state: bool = setting(False, "state tuning: learn the initial state of each block")
    state_output_mode: int = setting(
        1, "also save the state in a file of its own (0 = no)", choices=(0, 1, 2), resume=MAY_CHANGE
    )
    state_shift: bool = setting(False, "state tuning: learn the token-shift states too")

    # --- context
    ctx_len: int = setting(2048, "longest sample, in tokens", at_least=1)
    initial_ctx_len: int = setting(0, "length at the first step, growing to {ctx_len}; 0 = off", at_least=0)
    ctx_warmup_steps: int = setting(1, "optimizer steps in which the length grows", at_least=1)
    infctx: bool = setting(False, "infinite context: run the model in chunks of {chunk_ctx}", resume=ROUNDS_IF_EXACT)
    chunk_ctx: int = setting(
        512, "tokens per chunk with {infctx}; 0 = the whole sample", at_least=0, resume=ROUNDS_IF_EXACT
    )
    state_cp: bool = setting(False, "infinite context in {ctx_parts} chunks", resume=ROUNDS_IF_EXACT)
    ctx_parts: int = setting(1, "chunks that a sample is cut into", at_least=1, resume=ROUNDS_IF_EXACT)
    bptt: str = setting("exact", "gradient across chunks", choices=("exact", "truncated"))
    state_offload: bool = setting(False, "keep boundary states in host memory", resume=MAY_CHANGE)
    infctx_dataset_multiplier: int = setting(1, "documents joined to one sample", at_least=1)
    reset_state: bool = setting(True, "start each packed document from a fresh state")
    head_chunk: int = setting(1024, "rows of logits that exist at a time", at_least=1, resume=ROUNDS)

    # --- loss
    loss: str = setting("", "what is learnt; absent = next tokens of {data_file}", choices=lambda: ("", *tables.LOSSES))
    smoothing: float | None = setting(None, "label smoothing (0.001 with {sft}, {distillation})", at_least=0, below=1)
    l2wrap: bool | None = setting(None, "penalty on large logits; absent = on for text, off for preferences")
    train_on_prompt: bool = setting(False, "chats: train on all turns, not only the assistant's")
    train_on_chosen: bool = setting(False, "text: preference pairs are read too, as chats with the chosen answer")
    dpo_alpha: float | None = setting(None, "DPO: weight of the chosen answer's cross-entropy (0.1)", at_least=0)
    dpo_beta: float = setting(0.01, "DPO: beta", above=0)
    dpo_loss: str = setting("sigmoid", "DPO: variant", choices=("sigmoid", "ipo", "hinge", "robust"))
    dpo_logp: str = setting("sum", "DPO: score of an answer", choices=("sum", "mean"))
    dpo_label_smoothing: float = setting(0.0, "DPO: assumed share of swapped pairs", at_least=0, below=0.5)
    dpo_general_corpus_ratio: float = setting(
        0.0, "DPO: weight of the loss on {data_file}; 0 skips it", at_least=0, at_most=1
    )
    orpo_alpha: float = setting(0.01, "ORPO: weight of the odds ratio", at_least=0)
    orpo_mode: str = setting("mean", "ORPO: score of an answer, mean or sum of its tokens", choices=("mean", "sum"))
    simpo_alpha: float = setting(0.0, "SimPO: weight of the chosen answer's cross-entropy", at_least=0)
    simpo_beta: float = setting(2.0, "SimPO: beta, on mean log-probabilities", above=0)
    simpo_gamma: float = setting(1.0, "SimPO: target margin of rewards", at_least=0)
    cpo_alpha: float = setting(1.0, "CPO: weight of the chosen answer's cross-entropy", at_least=0)
    cpo_beta: float = setting(0.1, "CPO: beta", above=0)
    kto_beta: float = setting(0.1, "KTO: beta", above=0)
    kto_desirable_weight: float = setting(1.0, "KTO: weight of good answers", at_least=0)
    kto_undesirable_weight: float = setting(1.0, "KTO: weight of bad answers", at_least=0)
    wpo_alpha: float = setting(0.0, "WPO: weight of the chosen answer's cross-entropy", at_least=0)
    wpo_beta: float = setting(0.01, "WPO: beta", above=0)
    reference_model: str = setting("", "model that gives the reference scores; empty = the start model", resume=FILE)
    trust_reference: bool = setting(False, "use the reference scores in the pair file without checking them")
    temperature: float = setting(2.0, "distillation: temperature", above=0)
    top_k: int = setting(100, "distillation: teacher's logits per token (a file knows its own)", at_least=1)
    alpha: float = setting(0.5, "distillation: weight of cross-entropy", at_least=0, at_most=1)
    kd: str = setting("forward", "distillation: divergence", choices=("forward", "reverse", "js"))
    kd_tail: bool = setting(False, "distillation: one more outcome for the probability outside the top k")
    teacher_model: str = setting("", "distillation: teacher model that is asked during training", resume=FILE)
    rm_margin: bool = setting(
        False, "reward model: rewards differ by what the pair file says (margin, or score_chosen - score_rejected)"
    )
    rm_centring: float = setting(0.0, "reward model: weight of (chosen + rejected reward)^2", at_least=0)

    # --- rl
    reward_model: str = setting("", "reward model of {ppo} or {grpo}", resume=FILE)
    reward_funcs: str = setting("", "rewards.py:name,name, functions with TRL's signature")
    steps: int = setting(
        20000, "PPO: samples of each process in all (more where {early_stopping} leaves updates out)", at_least=1
    )
    batch_size: int = setting(32, "PPO: samples per rollout and process", at_least=1)
    mini_batch_size: int = setting(1, "PPO: samples per micro-batch and process, in place of {micro_bsz}", at_least=1)
    ppo_epochs: int = setting(4, "PPO: passes over each rollout", at_least=1)
    init_kl_coef: float = setting(0.2, "PPO: first weight of the KL penalty", at_least=0)
    adap_kl_ctrl: bool = setting(True, "PPO: adapt that weight, so that the KL of an answer nears {adap_kl_target}")
    adap_kl_target: float = setting(6.0, "PPO: KL of an answer to the start model that is aimed at, nats", above=0)
    horizon: int = setting(10000, "PPO: samples in which the weight of the KL penalty adapts", at_least=1)
    target_kl: float = setting(
        0.1, "PPO: target KL per update; {early_stopping} ends the passes at 1.5 times it", above=0
    )
    early_stopping: bool = setting(False, "PPO: end a rollout's passes early when the KL is too large ({target_kl})")
    reward_baseline: float = setting(0.0, "PPO: subtracted from each reward")
    reward_clip: float = setting(0.0, "PPO: largest reward, and smallest below zero; 0 = no limit", at_least=0)
    missing_eos_penalty: float = setting(
        0.0, "PPO: taken off the reward of answers cut at {output_max_length}", at_least=0
    )
    whiten_rewards: bool = setting(False, "PPO: scale each rollout's rewards of tokens to a variance of 1")
    cliprange: float = setting(0.2, "PPO: how far a ratio may leave 1", above=0, below=1)
    cliprange_value: float = setting(0.2, "PPO: how far a value may leave that at sampling; 0 = no limit", at_least=0)
    vf_coef: float = setting(0.1, "PPO: weight of the values' error", at_least=0)
    gamma: float = setting(1.0, "PPO: discount of later rewards, a token", above=0, at_most=1)
    lam: float = setting(0.95, "PPO: lambda of GAE", at_least=0, at_most=1)
    dual_clip: float = setting(
        0.0, "PPO: most that a bad token's ratio counts, above 1 (3 in arXiv 1912.09729); 0 = off", at_least=0
    )
    output_max_length: int = setting(128, "PPO: longest answer", at_least=1)
    save_freq: int = setting(0, "PPO: rollouts between two saves; 0 = at the end only", at_least=0)
    grpo_gen_count: int = setting(4, "GRPO: answers per prompt", at_least=2)
    grpo_gen_length: int = setting(1024, "GRPO: longest answer", at_least=1)
    grpo_gen_temperature: float = setting(1.0, "GRPO: sampling temperature", above=0)
    grpo_gen_topp: float = setting(1.0, "GRPO: nucleus; only 1, the whole distribution", above=0, at_most=1)
    grpo_kl_beta: float = setting(0.1, "GRPO: weight of the KL penalty; 0 = none", at_least=0)
    grpo_kl: str = setting("k3", "GRPO: estimator of the KL in the loss", choices=("k1", "k2", "k3"))
    grpo_kl_unbiased: bool = setting(False, "GRPO: weigh the estimator by the ratio, which makes its gradient unbiased")
    grpo_loss: str = setting("grpo", "GRPO: objective", choices=lambda: tuple(GRPO_LOSSES))
    grpo_advantage: str = setting("group", "GRPO: how rewards become advantages", choices=lambda: tuple(ADVANTAGES))
    grpo_scale: str = setting("group", "GRPO: what divides advantages", choices=lambda: tuple(SCALES))
    grpo_epsilon: float = setting(0.2, "GRPO: how far a ratio may fall below 1, and rise above it", above=0, below=1)
    grpo_epsilon_high: float = setting(
        0.0, "GRPO: how far it may rise (0.28 in DAPO; cispo: the largest ratio); 0 = the loss's own", at_least=0
    )
    grpo_delta: float = setting(0.0, "GRPO: largest ratio whatever the advantage, above 1; 0 = no limit", at_least=0)
    grpo_mask_truncated: bool = setting(False, "GRPO: answers cut at {grpo_gen_length} are not trained on")
    grpo_overlong_buffer: int = setting(
        0, "GRPO: tokens before {grpo_gen_length} in which the reward falls by up to 1; 0 = none", at_least=0
    )
    grpo_dynamic: int = setting(
        0, "GRPO: times that prompts whose answers all have one reward are replaced by others; 0 = never", at_least=0
    )
    grpo_passes: int = setting(1, "GRPO: passes over each rollout", at_least=1)
    grpo_rollout_steps: int = setting(1, "GRPO: optimizer steps of one pass over a rollout", at_least=1)
    reward_weights: str = setting("", "weights of {reward_funcs} and the reward model: 1,0.5; empty = 1 each")
    entropy_coef: float = setting(0.0, "weight of the policy's entropy, which is to be large", at_least=0)
    max_kl: float = setting(
        10.0, "KL to the start model, nats a token, at which a run stops instead of diverging; 0 = never", at_least=0
    )
    sample_at_once: int = setting(64, "answers sampled at once by each process", at_least=1, resume=ROUNDS)
    samples_every: int = setting(
        10, "rollouts between two tables of samples in samples.jsonl; 0 = none", at_least=0, resume=MAY_CHANGE
    )

    # --- data
    data_file: str = setting("", "text: [text]", resume=FILE)
    data_type: str = setting("", "format of {data_file}; empty = by its suffix", choices=data_types)
    format: str = setting("", "shape of the rows (docs/data.md); empty = recognised", choices=lambda: ("", *SHAPES))
    thinking: str = setting("keep", "thinking beside answers: kept as <think>...</think>, or dropped", choices=THINKING)
    pair_file: str = setting("", "preference pairs, rated answers or prompts: [pairs]", resume=FILE)
    rlhf_max_corpus_len: int = setting(1024, "longest prompt, chosen and rejected answer, each", at_least=1)
    vocab_file: str = setting("", "tokenizer (tokenizer.json or trie vocabulary); empty = World", resume=FILE)
    template: str = setting("world", "prompt template: world, mixed, g1, g1h, plain, or a Jinja file", resume=FILE)
    random_mode: bool = setting(True, "text in random order; 0 = as in the file")
    magic_prime: int = setting(0, "binidx: prime of the stateless order; 0 = found", at_least=0)
    drop_ties: bool = setting(False, "leave out pairs whose answers have the same score (score_chosen, score_rejected)")
    skip_bad: bool = setting(False, "count and skip bad rows instead of stopping")

    # --- evaluation
    val_file: str = setting("", "held-out text or pairs", resume=FILE)
    val_split: float = setting(0.0, "share of the training file that is held out", at_least=0, below=1)
    sample_prompts: str = setting(
        "",
        "prompts that are answered at each validation, for the page; empty = three of the data where there is a "
        "validation",
        resume=MAY_CHANGE,
    )
    eval_tasks: str = setting(
        "",
        "tasks before and after training: lambada:FILE, names and .yaml files of lm-evaluation-harness; commas between",
        resume=MAY_CHANGE,
    )
    eval_limit: int = setting(
        0, "examples of each of {eval_tasks}, from its beginning; 0 = all", at_least=0, resume=MAY_CHANGE
    )
    eval_only: bool = setting(False, "score {val_file} and {eval_tasks}, and stop", resume=MAY_CHANGE)
    json: bool = setting(False, "{eval_only} 1: JSON on stdout in place of sentences", resume=MAY_CHANGE)
    early_stop: int = setting(0, "mini-epochs without improvement before stopping; 0 = never", at_least=0)

    # --- saving
    save_dtype: str = setting(
        "base", "dtype of whole matrices in checkpoints", choices=("base", "fp32"), resume=MAY_CHANGE
    )
    save_format: str = setting("pth", "format of checkpoints", choices=tuple(MODEL_SUFFIXES), resume=MAY_CHANGE)
    keep: int = setting(0, "checkpoints that are kept; 0 = all", at_least=0, resume=MAY_CHANGE)

    given: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Fills the defaults that depend on other settings; of values out of range nothing is worked out."""
        given = [(settings()[name], getattr(self, name)) for name in self.given & settings().keys()]
        if any(value is not None and broken_limit(field, value) for field, value in given):
            return  # constraints.check says which
        if self.dpo_alpha is None:
            object.__setattr__(self, "dpo_alpha", 0.0 if self.dpo_general_corpus_ratio > 0 else 0.1)
        if self.smoothing is None:
            # next tokens of {data_file} without a word about a loss are pre-training, which is not smoothed
            meant = self.loss and (self.loss != tables.PRETRAINING or "loss" in self.given)
            object.__setattr__(self, "smoothing", self.loss_facts.smoothing if meant else 0.0)

        if self.quant is None:
            # commands with a plan of flags come from programs that packed nothing unless asked
            dense = self.peft != "full" and not self.layer_profile and "quant_mode" not in self.given
            object.__setattr__(self, "quant", not dense)
        if self.lr_schedule is None:
            theirs = self.my_exit_tokens > 0 or self.train_stage in (2, 3)
            text = self.loss_facts.data == "text"
            object.__setattr__(self, "lr_schedule", RWKV_LM if theirs and text else "exp")
        if self.lr_schedule == RWKV_LM and "epoch_steps" not in self.given:
            at_once = self.num_nodes * self.devices * self.micro_bsz
            object.__setattr__(self, "epoch_steps", max(1, RWKV_LM_SAMPLES // at_once))
        for name, value in {**self._lengths(), **self._state_rates()}.items():
            if name not in self.given:
                object.__setattr__(self, name, value)

    def _state_rates(self) -> dict[str, float]:
        """Learning rates where nothing but states learns, which takes a thousand times those of weights."""
        if self.peft != "state" or self.layer_profile or self.loss_facts.scalar_head:
            return {}
        first = self.lr_init if "lr_init" in self.given else tables.STATE_LR_INIT
        return {"lr_init": first, "lr_final": first / 10}

    def _lengths(self) -> dict[str, int]:
        """Mini-epochs and saves where other flags say how long they are."""
        if self.loss == "ppo":
            micro = self.micro_bsz if "micro_bsz" in self.given else self.mini_batch_size
            return ppo_length(self.steps, self.batch_size, micro, self.ppo_epochs, self.save_freq)
        if self.save_steps:
            return {"epoch_steps": self.save_steps * self.accumulate_grad_batches, "epoch_save": 1}
        return {}

    @property
    def own_length(self) -> bool:
        """Whether flags of the loss say how long the run is, in samples."""
        return self.loss == "ppo"

    @property
    def loss_facts(self) -> LossFacts:
        """The table's entry of the loss; without a loss that of pre-training."""
        return tables.LOSSES[self.loss or tables.PRETRAINING]

    @property
    def storage(self) -> str:
        """How frozen matrices are stored: nf4, fp4, int8, fp8 or none."""
        return self.quant_mode if self.quant else tables.DENSE

    @property
    def seed(self) -> int:
        """The seed in use, >= 0."""
        return max(0, self.random_seed)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one mini-epoch: its micro-batches rounded up to whole steps."""
        return math.ceil(self.epoch_steps / self.accumulate_grad_batches)

    @property
    def chunk(self) -> int:
        """Tokens per chunk of infinite context, 0 = one pass over the whole sample."""
        if self.infctx:
            return self.chunk_ctx
        return math.ceil(self.ctx_len / self.ctx_parts) if self.state_cp else 0


def settings() -> Mapping[str, dataclasses.Field[Any]]:
    """The fields that a user may set, by name, in the order of the help."""
    return _settings(Config)


@functools.cache  # a command line asks for them five hundred times
def _settings(owner: type[Config]) -> Mapping[str, dataclasses.Field[Any]]:
    return MappingProxyType({field.name: field for field in dataclasses.fields(owner) if "help" in field.metadata})
