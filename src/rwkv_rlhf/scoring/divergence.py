"""How far the policy is from its reference: two estimates of KL(policy || reference), neither of which samples.

Legend: n answers, P positions, C width, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from rwkv_rlhf.data.batch import AnswerBatch, PairExample, pack_pairs
from rwkv_rlhf.losses.pairs import segment_sums
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.scoring.forward import answer_hidden, answer_logp, in_chunks
from rwkv_rlhf.scoring.infinite_context import run_in_chunks
from rwkv_rlhf.transfers import to_device

POSITIONS = 128  # a World vocabulary's float32 log-probabilities of so many are 32 MiB
TOKENS = 8192  # tokens of the pairs that they are drawn from


class Divergence:
    """KL(policy || reference) of the next token, in nats, the mean over fixed positions of held-out chosen answers.

    Exact at each position: the whole distribution of the reference is kept, up to POSITIONS of them, drawn once.
    """

    def __init__(self, reference: RWKV, pairs: Sequence[PairExample], seed: int, chunk: int = 0) -> None:
        """`chunk`: rows run in chunks of so many tokens; 0 = in one."""
        self.chunk = chunk
        rng = random.Random(seed)
        order = rng.sample(range(len(pairs)), min(len(pairs), POSITIONS))
        taken: list[PairExample] = []
        held = 0
        for index in order:
            pair = pairs[index]
            held += len(pair.prompt) + len(pair.chosen) + len(pair.reject)
            if taken and held > TOKENS:
                break
            taken.append(pair)
        self.pairs = len(taken)
        self.batch = pack_pairs(taken)
        starts = self.batch.starts.tolist()
        places = [at for begin, end in zip(starts[0::2], starts[1::2]) for at in range(begin, end)]
        self.positions = torch.tensor(sorted(rng.sample(places, min(len(places), POSITIONS))))
        self.reference = self._logp(reference).cpu()

    @torch.no_grad()
    def _logp(self, model: RWKV) -> Tensor:
        """(P, V) float32 log-probabilities of the next token."""
        device = next(model.parameters()).device
        batch = self.batch.to(device)
        if self.chunk:
            hidden = run_in_chunks(model, in_chunks(batch, self.chunk), lambda found, _: {"hidden": found})["hidden"]
        else:
            hidden = answer_hidden(model, batch)
        return torch.log_softmax(model.head(hidden[to_device(self.positions, device)]).float(), 1)

    def of(self, policy: RWKV) -> float:
        """The mean over the positions."""
        mine = self._logp(policy)
        return float((mine.exp() * (mine - to_device(self.reference, mine.device))).sum(1).mean())


@torch.no_grad()
def mismatch_ratio(model: RWKV, batches: Sequence[AnswerBatch], *, head_chunk: int, chunk: int = 0) -> Tensor:
    """() the mean of log policy - log reference of whole answers put to prompts that they do not belong to: KTO's
    estimate of KL(policy || reference) before it is cut off at 0 (arXiv 2402.01306, section 4.1). `batches` have one
    answer to each prompt."""
    ratios = []
    for batch in batches:
        assert batch.reference is not None, "KTO without reference log-probabilities"
        logp = answer_logp(model, batch, head_chunk=head_chunk, chunk=chunk)
        ratios.append(segment_sums(logp, batch.segments) - batch.reference)
    return torch.cat(ratios).mean()
