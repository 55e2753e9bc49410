"""What a reward model says of whole answers: of held-out pairs, of a file, of samples.

Legend: n prompts, k answers to each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from rwkv_rlhf.data.batch import PairExample, pack_whole
from rwkv_rlhf.data.grouping import group_by_tokens
from rwkv_rlhf.distributed.ranks import split_over_ranks
from rwkv_rlhf.distributed.watchdog import heartbeat
from rwkv_rlhf.losses.pairs import AnswerValues, reward_metrics
from rwkv_rlhf.losses.reward import answer_scores, reward_loss
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.scoring.evaluation import ROW, Figures
from rwkv_rlhf.scoring.forward import token_scalars
from rwkv_rlhf.settings.config import Config

SCORE_HEAD = "score_head"

Tokens = Sequence[int]


def reward_rows(
    model: RWKV, prompts: Sequence[Tokens], answers: Sequence[Sequence[Tokens]], chunk: int = 0
) -> Iterator[Callable[[], Tensor]]:
    """Rewards in rows of neighbours up to ROW tokens: functions that each give a (rows, k) float32 on the host.

    answers: equally many, k, of each prompt; prompts and answers have at least one token. Raises ValueError for a model
    without a score head.
    """
    if model.scalar_head(SCORE_HEAD) is None:
        raise ValueError("the model has no score head (score_head.weight): train one with {rm} 1")
    items = list(zip(prompts, answers, strict=True))
    device = next(model.parameters()).device

    def scored(some: Sequence[tuple[Tokens, Sequence[Tokens]]]) -> Tensor:
        batch = pack_whole(*zip(*some, strict=True)).to(device)
        return (
            answer_scores(token_scalars(model, batch, SCORE_HEAD, chunk), batch.segments)
            .view(len(some), -1)
            .float()
            .cpu()
        )

    rows = group_by_tokens(items, lambda item: len(item[0]) + sum(map(len, item[1])), ROW)
    return (partial(scored, row) for row in rows)


@torch.no_grad()
def answer_rewards(
    model: RWKV, prompts: Sequence[Tokens], answers: Sequence[Sequence[Tokens]], *, chunk: int = 0, alone: bool = False
) -> Tensor:
    """(n, k) float32 rewards on the host, in the order of the prompts. Arguments and errors as `reward_rows`.

    Several ranks share the rows out and each knows all results, unless `alone`: then this rank scores what it has.
    """
    rows = list(reward_rows(model, prompts, answers, chunk))

    def scored(number: int) -> Tensor:
        heartbeat(f"scoring row {number} of answers")
        return rows[number]()

    parts = [scored(number) for number in range(len(rows))] if alone else split_over_ranks(scored, len(rows), model)
    return torch.cat(parts) if parts else torch.empty(0, 1)


def pair_rewards(model: RWKV, pairs: Sequence[PairExample], *, chunk: int = 0) -> AnswerValues:
    """(n,) rewards of both answers of each pair; see `answer_rewards`."""
    found = answer_rewards(model, [p.prompt for p in pairs], [(p.chosen, p.reject) for p in pairs], chunk=chunk)
    return AnswerValues(*found.unbind(1))


def margins_of(pairs: Sequence[PairExample], config: Config) -> Tensor | None:
    """(n,) by how much the file rates the chosen answers higher; None unless --rm_margin asks for it.

    Raises ValueError when it is asked for and a pair has none.
    """
    if not config.rm_margin:
        return None
    lacking = sum(1 for pair in pairs if pair.margin is None)
    if lacking:
        raise ValueError(
            f"{{rm_margin}} 1: {lacking} of {len(pairs)} pairs say nothing of how much better the chosen answer is: "
            "give a column margin, or score_chosen and score_rejected"
        )
    return torch.tensor([pair.margin or 0.0 for pair in pairs])


def reward_figures(rewards: AnswerValues, margins: Tensor | None, config: Config) -> Figures:
    """What `--eval_only` and validation say of pairs under a reward model: `loss` is its own, a mean over pairs."""
    count = len(rewards.chosen)
    found: Figures = {"loss": float(reward_loss(rewards, margins, config.rm_centring).mean()), "pairs": count}
    found |= {name: float(amount) / count for name, amount in reward_metrics(rewards).items()}
    both = torch.cat(list(rewards))
    return found | {"reward": float(both.mean()), "reward_min": float(both.min()), "reward_max": float(both.max())}
