"""Every number that a run logs, under the one name that it has in training, held out, on the curves, in the progress
bar and at Weights & Biases. A loss that logs a name which is not here fails a test.

Logged numbers are means over the tokens, pairs or answers of an optimizer step, or of the held-out examples. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

REWARDS = "rewards/"  # before the name of a reward function


class Metric(NamedTuple):
    """What a name means.

    unit: of the number, "" = a pure number. panel: title of the curve that it is drawn in, "" = it is not drawn. short:
    its name in the progress bar, "" = it is not there. better: "higher" or "lower", "" = neither.
    """

    meaning: str
    unit: str = ""
    panel: str = ""
    short: str = ""
    better: str = ""


# Lines of one panel lie over each other, the first one named here strongest.
METRICS: dict[str, Metric] = {
    "loss": Metric(
        "training: what is minimised, without the L2Wrap penalty; held out: plain negative log-likelihood of the text, "
        "of the chosen or of the good answers; of a reward model its own loss",
        "nats/token, or of the loss",
        panel="loss",
        short="loss",
        better="lower",
    ),
    "perplexity": Metric("exp(loss) of held-out text or answers", better="lower"),
    "nll": Metric(
        "negative log-likelihood of the trained tokens, without label smoothing", "nats/token", better="lower"
    ),
    "general_nll": Metric("the same of the general text beside DPO's pairs", "nats/token", better="lower"),
    "ce": Metric(
        "cross-entropy before its weight: distillation's (smoothed) of the trained tokens, a preference loss's of the "
        "chosen answers (each a mean over its tokens)",
        "nats/token",
        better="lower",
    ),
    "kd": Metric("distillation: divergence from the teacher before its weight, times temperature^2", "nats/token"),
    "dpo": Metric("DPO: the preference term before its weight", "of the loss", better="lower"),
    "orpo": Metric("ORPO: the odds-ratio term before its weight", "of the loss", better="lower"),
    "simpo": Metric("SimPO: the preference term before its weight", "of the loss", better="lower"),
    "cpo": Metric("CPO: the preference term before its weight", "of the loss", better="lower"),
    "wpo": Metric("WPO: the preference term before its weight", "of the loss", better="lower"),
    "pair_weight": Metric("WPO: how likely the policy itself would write both answers of a pair, at most 1"),
    "l2wrap": Metric("penalty on large logits, no part of the logged loss", "of the loss"),
    "pref_percentage": Metric(
        "running mean of accuracy over training steps (0.9 old + 0.1 new, from 0.5)",
        panel="preference accuracy",
        short="pref_percentage",
        better="higher",
    ),
    "accuracy": Metric(
        "share of pairs whose reward_margin is above 0 (0 counts one half), without a loss that defines rewards whose "
        "logp_margin is; of KTO's single answers the share on their side of kto_kl",
        panel="preference accuracy",
        short="accuracy",
        better="higher",
    ),
    "logp_accuracy": Metric("share of pairs whose logp_margin against the reference is above 0", better="higher"),
    "raw_accuracy": Metric(
        "share of pairs whose chosen_logp is above their reject_logp, whatever the reference says", better="higher"
    ),
    "reward_margin": Metric(
        "chosen_reward - reject_reward", "rewards of the loss", panel="margin of rewards", better="higher"
    ),
    "chosen_reward": Metric(
        "reward of the chosen (or good) answers: DPO, WPO, KTO beta * log-ratio to the reference; CPO beta * "
        "summed, SimPO beta * mean log-probability; ORPO log odds; of a reward model what its head says",
        "rewards of the loss",
        panel="rewards of the answers",
        better="higher",
    ),
    "reject_reward": Metric(
        "the same of the rejected (or bad) answers", "rewards of the loss", panel="rewards of the answers"
    ),
    "reward_min": Metric("held-out pairs: smallest reward that a reward model gives an answer", "rewards"),
    "reward_max": Metric("held-out pairs: largest reward that a reward model gives an answer", "rewards"),
    "logp_margin": Metric(
        "chosen_logp - reject_logp, less the same of the reference (held out, of the model that training began from or "
        "--reference_model); --eval_only without either: the raw difference",
        "nats",
        panel="margin of log-probabilities",
        better="higher",
    ),
    "chosen_logp": Metric("summed log-probability of the chosen (or good) answers", "nats", better="higher"),
    "reject_logp": Metric("summed log-probability of the rejected (or bad) answers", "nats"),
    "log_odds_margin": Metric(
        "held-out pairs: log odds ratio of both answers' mean log-probabilities, as ORPO has it",
        "nats",
        better="higher",
    ),
    "kl": Metric(
        "KL(policy || reference) of the next token: exact, at positions of held-out chosen answers; of sampled answers "
        "the estimate k3 at their tokens (losses/kl.py)",
        "nats/token",
        panel="KL to the start model, nats a token",
    ),
    "kto_kl": Metric("KTO: z, its estimate of KL(policy || reference) of whole answers, at least 0", "nats"),
    "reward": Metric(
        "mean reward of answers, from a reward model or reward functions",
        "rewards",
        panel="reward",
        short="reward",
        better="higher",
    ),
    f"{REWARDS}NAME": Metric(
        "the same of one reward function or model, before its weight", "rewards", panel="reward", better="higher"
    ),
    "reward_std": Metric("standard deviation of the rewards of a rollout's answers", "rewards"),
    "mixed_groups": Metric("share of prompts whose answers have different rewards: the others teach nothing"),
    "entropy": Metric(
        "entropy of the next token where answers were sampled, at the sampling temperature",
        "nats/token",
        panel="entropy, nats a token",
    ),
    "clip_fraction": Metric("share of tokens whose ratio of policy and sampler a limit has cut"),
    "completion_length": Metric(
        "mean tokens of a sampled answer, the stop included", "tokens", panel="tokens of an answer"
    ),
    "truncated": Metric("share of sampled answers that were cut at the longest length", better="lower"),
    "sampler_gap": Metric(
        "largest |log-probability of sampler - of trainer| over the tokens of the first rollout", "nats", better="lower"
    ),
    "sampled_tokens_per_s": Metric("speed of a rollout, rewards included, over all ranks", "tokens/s"),
    "trained_tokens_per_s": Metric(
        "speed of training on sampled answers, prompts included, without the time of the rollout; tokens_per_s has it",
        "tokens/s",
    ),
    "value_loss": Metric("PPO: half the squared error of values, clipped", "rewards^2", better="lower"),
    "explained_variance": Metric(
        "PPO: share of the returns' variance that the values foretold (1 = all, 0 = no more than a constant)",
        better="higher",
    ),
    "kl_coef": Metric("PPO: weight of the KL penalty in the rewards of the rollout"),
    "update_kl": Metric(
        "PPO: how far the policy is from the one that sampled, log-probability then - now", "nats/token"
    ),
    "lr": Metric("learning rate of the largest group of parameters", panel="learning rate", short="lr"),
    "grad_norm": Metric("norm of the gradient before it is clipped", panel="norm of the gradient", short="grad_norm"),
    "loss_scale": Metric("--precision fp16: the factor on the loss that the next step is computed with"),
    "overflows": Metric("--precision fp16: optimizer steps left out so far because a gradient overflowed", "steps"),
    "tokens": Metric("training: tokens that went through the model in the step; held out: tokens scored", "tokens"),
    "tokens_per_s": Metric("training speed", "tokens/s", panel="tokens per second", short="tokens_per_s"),
    "memory": Metric(
        "training: the most memory of the GPU so far, or what the process holds on a CPU (of rank zero)",
        "GiB",
        panel="memory",
        short="memory",
    ),
    "pairs": Metric("held-out pairs", "pairs"),
    "answers": Metric("held-out rated answers", "answers"),
    "prompts": Metric("held-out prompts", "prompts"),
}


def panels(logged: Iterable[str] = ()) -> dict[str, list[str]]:
    """Title of each panel of the curves -> the metrics drawn in it, with those of single rewards that are `logged`."""
    found: dict[str, list[str]] = {}
    for name, metric in METRICS.items():
        if metric.panel:
            found.setdefault(metric.panel, []).append(name)
    single = METRICS[f"{REWARDS}NAME"].panel
    found[single] += sorted(name for name in logged if name.startswith(REWARDS))
    return found
