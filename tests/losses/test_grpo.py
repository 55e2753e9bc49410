"""GRPO and its kin against the papers' formulas, written out token by token, and against TRL."""

import math

import pytest
import torch
from torch import nn

from rwkv_rlhf.data.batch import IGNORE
from rwkv_rlhf.losses import LOSSES
from rwkv_rlhf.losses.entropy import token_entropy
from rwkv_rlhf.losses.kl import KL_ESTIMATORS
from rwkv_rlhf.losses.tokens import RequiredStats, TokenScores, at_temperature, token_scores
from rwkv_rlhf.settings.config import settings
from rwkv_rlhf.settings.field import choices_of
from rwkv_rlhf.settings.policy_tables import GRPO_LOSSES
from tests.support.loss_cases import CHUNKS, STARTS, V, config, head_and_hidden, policy_batch

TARGETS = torch.tensor([3, 5, 0, 7, 10, 0, 1, 2, 3, 4, 0, IGNORE])  # the last answer is not trained on
LENGTHS = (4, 2, 5)  # of the other three
LONGEST = 6
LIMITS = {"grpo_epsilon": 0.2, "grpo_epsilon_high": 0.3}
WAYS = {
    "plain": LIMITS,
    "two-sided": LIMITS | {"grpo_delta": 1.5},
    "kl": LIMITS | {"grpo_kl_beta": 0.4},
    "unbiased kl": LIMITS | {"grpo_kl_beta": 0.4, "grpo_kl_unbiased": True, "grpo_kl": "k1"},
    "k2": LIMITS | {"grpo_kl_beta": 0.4, "grpo_kl": "k2"},
}


def numbers():
    """Ratios on both sides of both limits, with advantages of both signs."""
    draw = torch.Generator().manual_seed(3)
    logp = -1 - 2 * torch.rand(12, generator=draw, dtype=torch.float64)
    logp[TARGETS == IGNORE] = 0
    old = logp + 0.7 * torch.randn(12, generator=draw, dtype=torch.float64)
    reference = logp + 0.5 * torch.randn(12, generator=draw, dtype=torch.float64)
    each = torch.tensor([1.3, -0.7, 0.4, 2.0], dtype=torch.float64)
    return logp.requires_grad_(), old, reference, each.repeat_interleave(STARTS.diff())


def by_hand(name, chosen, logp, old, reference, advantages):
    """The loss of the step, one token after the other."""
    answers, begin = [], 0
    for length in LENGTHS:
        ratios = [logp[t] - old[t] for t in range(begin, begin + length)]
        shared = sum(ratios) / length
        tokens = []
        for t in range(begin, begin + length):
            rho = (shared if name == "gspo" else logp[t] - old[t]).exp()
            low, high, A = 1 - chosen.grpo_epsilon, 1 + chosen.grpo_epsilon_high, advantages[t]
            if name == "cispo":
                value = -min(rho.item(), chosen.grpo_epsilon_high) * A * logp[t]
            else:
                inside = rho if low <= rho <= high else torch.tensor(low if rho < low else high)
                cut = torch.tensor(chosen.grpo_delta) if 0 < chosen.grpo_delta < rho else rho
                value = -min(cut * A, inside * A)
            d = reference[t] - logp[t]
            kl = {"k1": -d, "k2": d * d / 2, "k3": d.exp() - d - 1}[chosen.grpo_kl]
            if chosen.grpo_kl_unbiased:
                kl = kl * (logp[t] - old[t]).exp()
            tokens.append(value + chosen.grpo_kl_beta * kl)
        answers.append(tokens)
        begin += length
    every = [value for tokens in answers for value in tokens]
    if name in ("grpo", "gspo"):
        return sum(sum(tokens) / len(tokens) for tokens in answers) / 4  # the masked answer counts as one
    if name == "dr_grpo":
        return sum(every) / (4 * LONGEST)
    return sum(every) / len(every)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GRPO_LOSSES)
def test_the_papers_formula(name, way):
    """If this breaks, a run optimises something else than its objective's name says: value and gradient."""
    chosen = config(**{"grpo_kl_beta": 0.0, "grpo_loss": name, "grpo_gen_length": LONGEST} | WAYS[way])
    logp, old, reference, advantages = numbers()
    batch = policy_batch(TARGETS, old_logp=old, reference_logp=reference, advantages=advantages)
    found = LOSSES["grpo"](TokenScores(logp), batch, chosen).per(batch.total)
    truth = by_hand(name, chosen, logp, old, reference, advantages)
    torch.testing.assert_close(found.value, truth)
    torch.testing.assert_close(found.metrics["loss"], truth.detach())
    torch.testing.assert_close(torch.autograd.grad(found.value, logp), torch.autograd.grad(truth, logp))
    kl = sum((reference[t] - logp[t]).exp() - (reference[t] - logp[t]) - 1 for t in range(11)) / 11
    torch.testing.assert_close(found.metrics["kl"], kl.detach())


@pytest.mark.parametrize("name", GRPO_LOSSES)
def test_trl_agrees(name):
    """TRL's own method on the same log-probabilities, value and gradient, where it is installed."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    method = getattr(trl.GRPOTrainer, "_compute_loss", None)
    if method is None:
        pytest.skip("this trl computes the loss of GRPO elsewhere")
    ways = LIMITS | {"grpo_loss": name, "grpo_kl_unbiased": name != "gspo"}
    chosen = config(grpo_gen_length=LONGEST, grpo_kl_beta=0.4, **ways)
    logp, old, reference, advantages = numbers()
    batch = policy_batch(TARGETS, old_logp=old, reference_logp=reference, advantages=advantages)
    ours = LOSSES["grpo"](TokenScores(logp), batch, chosen).per(batch.total)

    def rows(values):
        parts = [nn.functional.pad(part, (0, 5 - len(part))) for part in values.split(STARTS.diff().tolist())]
        return torch.stack(parts)

    mask = rows((TARGETS != IGNORE).long())
    inputs = {"completion_mask": mask, "advantages": rows(advantages)[:, 0], "old_per_token_logps": rows(old)}
    inputs |= {"ref_per_token_logps": rows(reference), "num_items_in_batch": mask.sum()}
    inputs |= dict.fromkeys(("prompt_ids", "prompt_mask", "completion_ids"), mask)
    made = trl_trainer(name, chosen)
    made._get_per_token_logps_and_entropies = lambda *_, **__: (rows(logp), torch.zeros(4, 5), None)
    theirs = method(made, None, inputs)
    torch.testing.assert_close(ours.value, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours.value, logp), torch.autograd.grad(theirs, logp))


def trl_trainer(name, chosen):
    """What TRL's method asks of its trainer; everything else is None."""
    from collections import defaultdict
    from types import SimpleNamespace

    class Trainer:
        def __getattr__(self, name):
            return None

    made = Trainer()
    same = SimpleNamespace(num_processes=1, gather=lambda value: value, sync_gradients=False)
    same.reduce = lambda value, reduction: value
    made.accelerator, made.model = same, SimpleNamespace(training=True)
    made._metrics = defaultdict(lambda: defaultdict(list))
    made.loss_type = "grpo" if name == "gspo" else name
    made.importance_sampling_level = "sequence" if name == "gspo" else "token"
    made.beta, made.epsilon_low, made.epsilon_high = chosen.grpo_kl_beta, chosen.grpo_epsilon, chosen.grpo_epsilon_high
    made.args = SimpleNamespace(use_bias_correction_kl=chosen.grpo_kl_unbiased, delta=None, steps_per_generation=1)
    made.top_entropy_quantile, made.current_gradient_accumulation_steps = 1.0, 1
    made.max_completion_length = chosen.grpo_gen_length
    return made


def test_without_old_probabilities_the_ratio_is_exactly_1():
    """If this breaks, the first pass over a rollout already clips: its gradient is that of plain policy gradients."""
    logp, _, reference, advantages = numbers()
    batch = policy_batch(TARGETS, old_logp=None, reference_logp=reference, advantages=advantages)
    found = LOSSES["grpo"](TokenScores(logp), batch, config(grpo_loss="dapo", grpo_kl_beta=0.0))
    assert found.metrics["clip_fraction"] == 0
    assert float(found.value.detach()) == pytest.approx(-float(advantages[:11].sum()) * 4 / 11)
    gradient = torch.autograd.grad(found.value, logp)[0]
    torch.testing.assert_close(gradient[:11], -advantages[:11] * 4 / 11)


def test_the_clip_fraction_counts_cut_tokens():
    """By hand: of five trained tokens two have gone too far in their advantage's direction, one beyond delta."""
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    starts, targets = torch.tensor([0, 2, 5]), torch.tensor([1, 2, 3, 4, 5])
    batch = policy_batch(targets, starts, old_logp=torch.zeros(5), reference_logp=None, advantages=advantages)
    for delta, cut in ((0.0, 2), (1.4, 3)):
        found = LOSSES["grpo"](TokenScores(ratios.log()), batch, config(grpo_kl_beta=0.0, grpo_delta=delta))
        assert float(found.per(batch.total).metrics["clip_fraction"]) == pytest.approx(cut / 5)


def test_an_objectives_own_upper_limit():
    """A cispo run without --grpo_epsilon_high must not cut every ratio at 0.2."""
    logp = torch.tensor([0.3], dtype=torch.float64)
    batch = policy_batch(torch.tensor([1]), torch.tensor([0, 1]), old_logp=torch.zeros(1), advantages=torch.ones(1))
    found = LOSSES["grpo"](TokenScores(logp), batch, config(grpo_loss="cispo", grpo_kl_beta=0.0))
    assert float(found.value) == pytest.approx(-math.exp(0.3) * 0.3)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_entropy_and_its_gradient(chunk):
    """-sum p log p by its definition, in any chunks of rows, for the hidden states and the head's weight."""
    head, hidden = head_and_hidden(7)
    weight = torch.rand(7, dtype=torch.float64)
    p = torch.softmax(head(hidden), 1)
    truth = (weight * -(p * p.log()).sum(1)).sum()
    found = (weight * token_entropy(head, hidden, chunk)).sum()
    torch.testing.assert_close(found, truth)
    both = (head.weight, hidden)
    torch.testing.assert_close(torch.autograd.grad(found, both), torch.autograd.grad(truth, both))


def test_the_entropy_bonus_is_a_mean_over_tokens():
    """If this breaks, --entropy_coef means something else in each objective."""
    head, hidden = head_and_hidden(12)
    batch = policy_batch(TARGETS)
    for name in GRPO_LOSSES:
        values = [
            LOSSES["grpo"].from_hidden(head, hidden, batch, config(grpo_loss=name, entropy_coef=coef)).value / 4
            for coef in (0.0, 0.5)
        ]
        p = torch.softmax(head(hidden), 1)[:11]
        torch.testing.assert_close(values[0] - values[1], 0.5 * -(p * p.log()).sum(1).mean())


def test_scores_at_a_temperature():
    """Logits divided by the temperature that answers are sampled at."""
    head, hidden = head_and_hidden(5)
    targets = torch.randint(V, (5,))
    found = token_scores(head, at_temperature(hidden, 0.7), targets, RequiredStats(entropy=True))
    logp = torch.log_softmax(head(hidden) / 0.7, 1)
    torch.testing.assert_close(found.logp, logp.gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(found.entropy, -(logp.exp() * logp).sum(1))


def test_the_estimators_are_those_of_the_command_line():
    """If this breaks, --grpo_kl offers what does not exist, or hides what does."""
    assert choices_of(settings()["grpo_kl"]) == KL_ESTIMATORS
