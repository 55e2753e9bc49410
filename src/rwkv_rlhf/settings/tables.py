"""Facts of everything that there are several of: losses, adapters, storages, versions, strategies, optimizers.

Each table is the only list of its kind. The command line, constraints, plan, memory estimate, sidecars, weight decay,
exports, curves and the parametrised tests are derived from it, so a new thing is one file and one entry here. No torch:
`implementation` names the class or function ("module:name", ".losses.sft:SFT" in this package), which
`implementations.load` imports where it is used.

Legend: r rank, C width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LossFacts:
    """A loss as everything but the mathematics knows it.

    data: what one example is: "text" (a document), "pairs" (prompt, chosen, rejected), "rated" (an answer and its
    label) or "prompts" (answers are sampled). implementation: the loss. settings:
    fields of Config that mean nothing with most other losses. reference: scores of the start model are needed.
    general_text: other text may be trained on in the same step. l2wrap: whether the penalty on large logits is on
    unless the user says otherwise. smoothing: label smoothing where none is typed. scalar_head: the head of
    SCALAR_HEADS that the loss trains. predicts: whether tokens are predicted; otherwise the model's own head has
    nothing to learn. algorithm: of a loss on sampled answers, what samples and judges them (a subclass of
    rl/algorithm.py:Algorithm).
    """

    help: str
    data: str
    implementation: str = ""
    settings: tuple[str, ...] = ()
    reference: bool = False
    teacher: bool = False
    general_text: bool = False
    l2wrap: bool = False
    smoothing: float = 0.0
    scalar_head: str = ""
    predicts: bool = True
    algorithm: str = ""


@dataclass(frozen=True)
class ScalarHeadFacts:
    """A head that makes one number of a hidden state; a base file may lack it. merged: it belongs to a merged model."""

    help: str
    merged: bool = True


SCALAR_HEADS: dict[str, ScalarHeadFacts] = {
    "score_head": ScalarHeadFacts("the reward of a whole answer, from the state after its last token"),
    "value_head": ScalarHeadFacts(
        "what is still to come of an answer's reward, from the state before each token", merged=False
    ),
}

OF_ROLLOUTS = ("reward_funcs", "reward_weights", "entropy_coef", "max_kl", "sample_at_once", "samples_every")
LOSSES: dict[str, LossFacts] = {
    "sft": LossFacts(
        "supervised fine-tuning: next tokens of text and chats", "text", ".losses.sft:SFT", l2wrap=True, smoothing=0.001
    ),
    "dpo": LossFacts(
        "direct preference optimisation and its variants",
        "pairs",
        ".losses.dpo:DPO",
        ("dpo_alpha", "dpo_beta", "dpo_loss", "dpo_logp", "dpo_label_smoothing", "dpo_general_corpus_ratio"),
        reference=True,
        general_text=True,
    ),
    "orpo": LossFacts(
        "odds ratio preference optimisation, no reference model",
        "pairs",
        ".losses.orpo:ORPO",
        ("orpo_alpha", "orpo_mode"),
    ),
    "simpo": LossFacts(
        "simple preference optimisation, no reference model",
        "pairs",
        ".losses.simpo:SimPO",
        ("simpo_alpha", "simpo_beta", "simpo_gamma"),
    ),
    "cpo": LossFacts(
        "contrastive preference optimisation, no reference model", "pairs", ".losses.cpo:CPO", ("cpo_alpha", "cpo_beta")
    ),
    "kto": LossFacts(
        "Kahneman-Tversky optimisation of single answers, good or bad",
        "rated",
        ".losses.kto:KTO",
        ("kto_beta", "kto_desirable_weight", "kto_undesirable_weight"),
        reference=True,
    ),
    "wpo": LossFacts(
        "weighted preference optimisation", "pairs", ".losses.wpo:WPO", ("wpo_alpha", "wpo_beta"), reference=True
    ),
    "distillation": LossFacts(
        "a teacher's largest logits, from a file or live",
        "text",
        ".losses.distill:Distillation",
        ("temperature", "top_k", "alpha", "kd", "kd_tail", "teacher_model"),
        teacher=True,
        l2wrap=True,
        smoothing=0.001,
    ),
    "rm": LossFacts(
        "a reward model: one number for a whole answer",
        "pairs",
        ".losses.reward:RewardLoss",
        ("rm_margin", "rm_centring"),
        scalar_head="score_head",
        predicts=False,
    ),
    "ppo": LossFacts(
        "proximal policy optimisation against a reward model",
        "prompts",
        ".losses.ppo:PPO",
        (
            *("steps", "batch_size", "mini_batch_size", "ppo_epochs", "init_kl_coef", "adap_kl_ctrl", "adap_kl_target"),
            *("horizon", "target_kl", "early_stopping", "reward_baseline", "reward_clip", "missing_eos_penalty"),
            *("whiten_rewards", "output_max_length", "save_freq", "cliprange", "cliprange_value", "vf_coef", "gamma"),
            *("lam", "dual_clip", *OF_ROLLOUTS),
        ),
        scalar_head="value_head",
        algorithm=".rl.ppo:PPO",
    ),
    "grpo": LossFacts(
        "group relative policy optimisation with reward functions or a reward model",
        "prompts",
        ".losses.grpo:GRPO",
        (
            *("grpo_gen_count", "grpo_gen_length", "grpo_gen_temperature", "grpo_gen_topp", "grpo_kl_beta", "grpo_kl"),
            *("grpo_kl_unbiased", "grpo_loss", "grpo_advantage", "grpo_scale", "grpo_epsilon", "grpo_epsilon_high"),
            *("grpo_delta", "grpo_mask_truncated", "grpo_overlong_buffer", "grpo_dynamic", "grpo_passes"),
            *("grpo_rollout_steps", *OF_ROLLOUTS),
        ),
        algorithm=".rl.grpo:GRPO",
    ),
}
PRETRAINING = "sft"  # the loss of {data_file} alone, without a word about one (and then without smoothing)


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter of one matrix (`linear`) and, where it has such a form, of the embedding's table (`embedding`).

    tensors: its own parameters, by the last word of their names. sign: the tensor that tells it in a file without a
    sidecar (the first adapter of the table whose sign is there). decays: those that weight decay may touch. factor_b:
    those that LoRA+ trains at a higher rate. initial: buffers without which a checkpoint means nothing (PiSSA).
    scaled: multiplied by alpha / r. dropout: whether its authors have one. profile_rank: rank of a new profile.
    output_copies: values of each output channel that are kept for the backward pass. loading_bytes: of each number of a
    matrix while its adapter is made; loading_rows: some rows of it in float64 besides. peft: in the PEFT library.
    """

    help: str
    linear: str
    tensors: tuple[str, ...]
    sign: str
    decays: tuple[str, ...]
    embedding: str = ""
    factor_b: tuple[str, ...] = ()
    initial: tuple[str, ...] = ()
    scaled: bool = False
    dropout: bool = True
    profile_rank: int = 16
    output_copies: int = 0
    loading_bytes: int = 0
    loading_rows: bool = False
    peft: PeftFacts | None = None


@dataclass(frozen=True)
class PeftFacts:
    """How an adapter is called in the PEFT library: `kind` of its configuration, DoRA by a switch of LoRA's."""

    kind: str
    use_dora: bool = False
    difference: bool = False  # exported as the difference to its initial factors, of twice the rank


LORA_FACTORS = ("lora_A", "lora_B")
ADAPTERS: dict[str, AdapterFacts] = {
    "lora": AdapterFacts(
        "low-rank update (arXiv 2106.09685)",
        ".layers.adapters.lora:LoRA",
        LORA_FACTORS,
        sign="lora_A",
        decays=LORA_FACTORS,
        embedding=".layers.adapters.lora:LoRAEmbedding",
        factor_b=("lora_B",),
        scaled=True,
        peft=PeftFacts("LORA"),
    ),
    "pissa": AdapterFacts(
        "low-rank update that begins as the principal part of the matrix (arXiv 2404.02948)",
        ".layers.adapters.pissa:PiSSA",
        LORA_FACTORS,
        sign="",  # the names are LoRA's: only a sidecar or --type tells it
        decays=LORA_FACTORS,
        embedding=".layers.adapters.pissa:PiSSAEmbedding",
        factor_b=("lora_B",),
        initial=("lora_A_init", "lora_B_init"),
        dropout=False,
        loading_bytes=4,
        loading_rows=True,
        peft=PeftFacts("LORA", difference=True),
    ),
    "bone": AdapterFacts(
        "each block of the matrix updated from itself (RWKV-PEFT)",
        ".layers.adapters.bone:Bone",
        ("bone",),
        sign="bone",
        decays=("bone",),
        dropout=False,
        profile_rank=64,
    ),
    "dora": AdapterFacts(
        "low-rank update of the rows' directions, and their lengths (arXiv 2402.09353)",
        ".layers.adapters.dora:DoRA",
        (*LORA_FACTORS, "lora_M"),
        sign="lora_M",
        decays=LORA_FACTORS,
        factor_b=("lora_B",),
        scaled=True,
        output_copies=1,
        loading_bytes=4,
        peft=PeftFacts("LORA", use_dora=True),
    ),
    "miss": AdapterFacts(
        "one strip of r rows repeated across the inputs (arXiv 2409.15371)",
        ".layers.adapters.miss:MiSS",
        ("miss",),
        sign="miss",
        decays=("miss",),
        profile_rank=64,
        peft=PeftFacts("MISS"),
    ),
}


@dataclass(frozen=True)
class StorageFacts:
    """How a frozen matrix is kept. bytes_per_number and rms_error (of a normal matrix): approximate, for people.

    packing: bytes beside matrix and packed matrix while one is packed.
    """

    help: str
    implementation: str
    bytes_per_number: float
    rms_error: float
    packing: int
    needs: str = ""  # the package that it needs


STORAGES: dict[str, StorageFacts] = {
    "nf4": StorageFacts(
        "16 levels at the quantiles of a normal distribution, blocks of 64 (arXiv 2305.14314)",
        ".layers.stores.nf4:NF4",
        0.5625,
        0.09,
        20 << 20,
        needs="bitsandbytes",
    ),
    "fp4": StorageFacts(
        "4-bit floats, blocks of 64", ".layers.stores.nf4:FP4", 0.5625, 0.12, 20 << 20, needs="bitsandbytes"
    ),
    "int8": StorageFacts("8-bit integers, blocks of 64", ".layers.stores.int8:Int8", 1.0625, 0.006, 32 << 20),
    "fp8": StorageFacts("8-bit floats (e4m3), one scale a row", ".layers.stores.fp8:FP8", 1.0, 0.026, 32 << 20),
}
# learning rate of state tuning, first and last: the best of docs/state-tuning.md for RWKV-7
STATE_LR_INIT, STATE_LR_FINAL = 0.3, 0.03
DENSE = "none"  # not packed: a parameter in the compute dtype


@dataclass(frozen=True)
class VersionFacts:
    """An RWKV version by what tells it, and what depends on it.

    block: its block class. new: models of it can be made from zero. spellings: further words of --my_testing. has,
    lacks: tensors of blocks.0.att (of the other half: ffn.NAME) that a file of it has and has not (of two versions that
    fit, the one that asks for more); per_channel: whether time_decay has a number for each channel of each head (None:
    not asked). heads: the tensor of blocks.0.att that tells them, "" = none. low_rank: the tensors of att (or ffn.NAME)
    whose second axis is an inner width, the first that is there counts. small: a pattern for the last word of its small
    tensors' names. rates: multipliers of the tradition's learning rates. activations: values of width C that a block
    keeps of each token for the backward pass, and recurrence_bytes the bytes of each channel that the recurrence keeps
    in float32 (both counted, tests/training/test_memory.py). starts_from_file: the `rwkv` package begins from a learnt
    time_state in the model's file. token_tables: tables by token inside a block, which no mode of a row adapts or
    packs; their rows train only where {train_tables} says so.
    """

    help: str
    block: str
    has: frozenset[str]
    lacks: frozenset[str] = frozenset()
    per_channel: bool | None = None
    spellings: tuple[str, ...] = ()
    new: bool = True
    heads: str = ""
    low_rank: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    small: str = ".*time.*"
    rates: Mapping[str, float] = field(default_factory=dict)
    activations: float = 0.0
    recurrence_bytes: int = 0
    starts_from_file: bool = False
    token_tables: tuple[str, ...] = ()


VERSIONS: dict[str, VersionFacts] = {
    "x040": VersionFacts(
        "RWKV-4",
        ".model.rwkv4:Block",
        has=frozenset({"time_first", "time_mix_k"}),
        lacks=frozenset({"ln_x.weight"}),
        rates={"time_decay": 2.0, "time_first": 3.0},
        activations=20.1,
    ),
    "x050": VersionFacts(
        "RWKV-5.0",
        ".model.rwkv5:Block50",
        has=frozenset({"ln_x.weight", "time_mix_k"}),
        lacks=frozenset({"gate.weight"}),
        per_channel=False,
        new=False,
        heads="time_decay",
        rates={"time_decay": 2.0, "time_first": 3.0},
        activations=24.6,
        recurrence_bytes=4,
    ),
    "x051": VersionFacts(
        "RWKV-5.1",
        ".model.rwkv5:Block51",
        has=frozenset({"ln_x.weight", "time_mix_k", "gate.weight"}),
        per_channel=False,
        new=False,
        heads="time_decay",
        rates={"time_decay": 2.0, "time_first": 3.0},
        activations=24.6,
        recurrence_bytes=4,
    ),
    "x052": VersionFacts(
        "RWKV-5.2",
        ".model.rwkv5:Block52",
        has=frozenset({"ln_x.weight", "time_mix_k", "gate.weight", "time_faaaa"}),
        per_channel=True,
        spellings=("r3r4",),
        heads="time_faaaa",
        rates={"time_decay": 2.0},
        activations=24.6,
        recurrence_bytes=4,
        starts_from_file=True,
    ),
    "x060": VersionFacts(
        "RWKV-6",
        ".model.rwkv6:Block",
        has=frozenset({"time_maa_w1"}),
        heads="time_faaaa",
        low_rank={"mix": ("time_maa_w2",), "decay": ("time_decay_w1",)},
        rates={"time_decay": 2.0},
        activations=34.4,
        recurrence_bytes=4,
        starts_from_file=True,
    ),
    "x070": VersionFacts(
        "RWKV-7",
        ".model.rwkv7:Block",
        has=frozenset({"r_k", "x_r"}),
        heads="r_k",
        low_rank={"w": ("w1",), "a": ("a1",), "v": ("v1", "a1"), "g": ("g1",)},  # one block alone has no v1
        small=r"x_[a-z]+|[wav][012]|g[12]|k_k|k_a|r_k",
        rates={"w0": 2.0},
        activations=28.6,
        recurrence_bytes=8,
    ),
    "x070a": VersionFacts(
        "RWKV-7a (DeepEmbed)",
        ".model.rwkv7a:Block",
        has=frozenset({"r_k", "x_r", "ffn.s_emb.weight"}),
        new=False,
        heads="r_k",
        low_rank={"w": ("w1",), "a": ("a1",), "v": ("v1", "a1"), "g": ("g1",), "deep": ("ffn.s1",)},
        small=r"x_[a-z]+|[wav][012]|g[12]|k_k|k_a|r_k|s[012]",
        rates={"w0": 2.0},
        activations=36.7,
        recurrence_bytes=8,
        token_tables=("ffn.s_emb.weight",),
    ),
}


# what this program cannot run, by tensors of block 0 that tell it; the first that fits
OTHER_VERSIONS: dict[str, tuple[str, ...]] = {
    "RWKV-7b (DeepEmbed with attention over its cache)": ("qkv.qq.weight", "ffn.s_emb.weight"),
    "RWKV-8 with attention": ("qkv.qq.weight", "ffn.enn.weight"),
    "RWKV-8": ("ffn.enn.weight",),
}


@dataclass(frozen=True)
class StrategyFacts:
    """How ranks share the work. implementation: (config, model) -> a Lightning strategy.

    whole_blocks: a block's parameters are put together for its own forward and backward pass only, so nothing that
    runs several blocks in one backward pass goes with it. stage: of DeepSpeed's ZeRO, 0 = not DeepSpeed. rows: whether
    gradients that hold some rows of a table go with it.
    """

    help: str
    implementation: str
    whole_blocks: bool = False
    stage: int = 0
    offload: bool = False
    rows: bool = False


STRATEGIES: dict[str, StrategyFacts] = {
    "auto": StrategyFacts("one process alone, or ddp", ".training.strategies.ddp:ddp", rows=True),
    "ddp": StrategyFacts("the whole model on every rank", ".training.strategies.ddp:ddp", rows=True),
    "fsdp": StrategyFacts(
        "what trains, its gradients and the optimizer's state split over the ranks",
        ".training.strategies.fsdp:fsdp",
        whole_blocks=True,
    ),
    **{
        f"deepspeed_stage_{stage}{'_offload' if offload else ''}": StrategyFacts(
            f"DeepSpeed's ZeRO, {what} split over the ranks" + (", in host memory" if offload else ""),
            ".training.strategies.deepspeed:zero",
            whole_blocks=stage == 3,
            stage=stage,
            offload=offload,
        )
        for stage, what in ((1, "optimizer state"), (2, "optimizer state and gradients"), (3, "these and parameters"))
        for offload in (False, True)
    },
}


@dataclass(frozen=True)
class ProductFacts:
    """How a CPU multiplies by matrices while it trains; ops/product_ways.py has the functions."""

    help: str


PRODUCTS: dict[str, ProductFacts] = {
    "auto": ProductFacts("the fastest for each number of rows: known of the processor, else measured once"),
    "torch": ProductFacts("as PyTorch chooses"),
    "onednn": ProductFacts("oneDNN, which comes with PyTorch"),
}


@dataclass(frozen=True)
class BackendFacts:
    """What runs the recurrences. implementation: a subclass of ops/backend.py:Backend; "" = parsed only."""

    help: str
    implementation: str = ""


BACKENDS: dict[str, BackendFacts] = {
    "auto": BackendFacts("the fastest that can"),
    "naive": BackendFacts("plain PyTorch loops", ".ops.naive:Backend"),
    "cpu": BackendFacts("C++ for processors", ".ops.cpu:Backend"),
    "cuda": BackendFacts("CUDA or HIP, exact float32", ".ops.gpu:Backend"),
    "hip": BackendFacts("the same on an AMD GPU only", ".ops.gpu:Hip"),
    "triton": BackendFacts("Triton, chunked tensor-core form", ".ops.triton.backend:Backend"),
    "fla": BackendFacts("flash-linear-attention, RWKV-6 and RWKV-7, where it is installed", ".ops.fla:Backend"),
}
