"""Batched sampling with recurrent state: prompts run once, packed; then one token a step for all sequences together.

Legend: B running sequences, S prompts, C width, V vocabulary, t tokens sampled so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rwkv_rlhf.data.tokenizer import Tokenizer
from rwkv_rlhf.generation.sampling import penalise, pick, sequence_seed
from rwkv_rlhf.generation.sampling_params import SamplingParams
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.model.state import State


@dataclass
class Completion:
    """What was sampled after one prompt.

    Attributes:
        tokens: every sampled id, those of the stop included.
        logprobs: the natural-log probability of each under the model's own distribution (temperature 1, no penalty,
            nothing cut), float32 precision.
        finished: it stopped by itself, not at max_tokens.
        text: the decoded tokens before the stop; "" without a tokenizer.
        state: one row, what the model remembers after all tokens but the last; only with keep_state.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False
    text: str = ""
    state: State | None = None


@dataclass
class Running:
    """One sequence that has not ended. `tail`: its last decoded bytes, in which a stop text may have begun."""

    number: int
    completion: Completion
    tail: bytes = b""


class Stops:
    """Decides when a sequence ends: a stop id, or a stop text anywhere in the decoded bytes (across tokens)."""

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer | None) -> None:
        if params.stop_texts and tokenizer is None:
            raise ValueError("stop texts need a tokenizer")
        self.texts = [text.encode() for text in params.stop_texts if text]
        self.ids = frozenset(params.stop_ids)
        self.tokenizer = tokenizer
        self.longest = max((len(text) for text in self.texts), default=0)

    def ends(self, sequence: Running, token: int) -> bool:
        """Whether a sequence ends with its new `token`."""
        if token in self.ids:
            return True
        if self.tokenizer is None or not self.texts:
            return False
        said = sequence.tail + self.tokenizer.decode_bytes([token])
        sequence.tail = said[max(0, len(said) - self.longest + 1) :]
        return any(text in said for text in self.texts)

    def text(self, tokens: list[int]) -> str:
        """The tokens as text, cut before the first stop; a character that is not whole at the end is left out."""
        if self.tokenizer is None:
            return ""
        said = self.tokenizer.decode_bytes(tokens[:-1] if tokens and tokens[-1] in self.ids else tokens)
        ends = [said.find(text) for text in self.texts if text in said]
        return said[: min(ends, default=len(said))].decode("utf-8", errors="replace").rstrip("\ufffd")


@dataclass
class Batch:
    """The sequences that run: row b of every tensor belongs to `sequences[b]`."""

    sequences: list[Running]
    hidden: Tensor  # (B, C) after the last token
    state: State  # B rows
    draws: Tensor  # (B, max_tokens) float64 in [0, 1)
    history: Tensor  # (B, t) int64 ids sampled so far
    first: Tensor  # (B, t) bool, whether an id is sampled there for the first time

    def select(self, rows: list[int]) -> Batch:
        """Some of the rows."""
        index = torch.tensor(rows, device=self.hidden.device)
        tensors = (part.index_select(0, index) for part in (self.draws, self.history, self.first))
        sequences = [self.sequences[row] for row in rows]
        return Batch(sequences, self.hidden.index_select(0, index), self.state.select(index), *tensors)


class Sampler:
    """Continues prompts with one model. `tokenizer` is needed for stop texts and for the texts of completions."""

    def __init__(self, model: RWKV, tokenizer: Tokenizer | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        seeds: Sequence[int] | None = None,
        state: State | None = None,
        keep_state: bool = False,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """`params.samples` completions of each prompt (lists of ids, none empty), prompt-major.

        A sequence that ends leaves the batch. Each draws from a generator of its own: with `seeds`, one a prompt in
        place of params.seed, what is sampled after a prompt does not depend on the rest of the batch, up to the
        rounding of batched matrix products. `state` (S rows) is where the prompts begin; on_token(sequence, id) is
        called as tokens come. The model's training mode is restored.
        Raises ValueError for an empty prompt and logits that are not finite.
        """
        stops = Stops(params, self.tokenizer)
        if not prompts:
            return []
        training = self.model.training
        self.model.eval()
        try:
            batch = self._prefill(prompts, params, seeds, state)
            completions = [sequence.completion for sequence in batch.sequences]
            for step in range(params.max_tokens):
                tokens = self._sample(batch, params)
                running = []
                for row, (sequence, token) in enumerate(zip(batch.sequences, tokens, strict=True)):
                    sequence.completion.finished = stops.ends(sequence, token)
                    if on_token is not None:
                        on_token(sequence.number, token)
                    if not sequence.completion.finished and step < params.max_tokens - 1:
                        running.append(row)
                    elif keep_state:
                        sequence.completion.state = batch.select([row]).state
                if not running:
                    break
                if len(running) < len(batch.sequences):
                    batch = batch.select(running)
                hidden, after = self.model(batch.history[:, -1:], state=batch.state)
                batch.hidden, batch.state = hidden[:, -1], after
        finally:
            self.model.train(training)
        for completion in completions:
            completion.text = stops.text(completion.tokens)
        return completions

    def _prefill(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int] | None, state: State | None
    ) -> Batch:
        """Runs all prompts, packed in one row."""
        for number, prompt in enumerate(prompts, 1):
            if len(prompt) == 0:
                raise ValueError(f"prompt {number} has no tokens; sampling needs at least one to start from")
        device = next(self.model.parameters()).device
        draws = draws_of(params, len(prompts), seeds).to(device)
        tokens = torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.int64, device=device)
        starts = torch.tensor([0, *map(len, prompts)], dtype=torch.int64, device=device).cumsum(0)
        hidden, after = self.model(tokens[None], state=state, starts=starts)
        # the last position of each prompt, and its state, once for each of its samples
        rows = torch.arange(len(prompts), device=device).repeat_interleave(params.samples)
        count = len(rows)
        return Batch(
            sequences=[Running(number, Completion()) for number in range(count)],
            hidden=hidden[0].index_select(0, (starts[1:] - 1).index_select(0, rows)),
            state=after.select(rows) if params.samples > 1 else after,
            draws=draws,
            history=torch.empty((count, 0), dtype=torch.int64, device=device),
            first=torch.empty((count, 0), dtype=torch.bool, device=device),
        )

    def _sample(self, batch: Batch, params: SamplingParams) -> list[int]:
        """The next token of each sequence, also written into the batch and its completions."""
        logits = self.model.head(batch.hidden).float()
        total = torch.logsumexp(logits, 1)
        if not bool(torch.isfinite(total).all()):
            raise ValueError("the model's logits are not finite: the checkpoint is damaged or the precision is too low")
        step = batch.history.shape[1]
        tokens = pick(penalise(logits, batch.history, batch.first, params), batch.draws[:, step], params)
        logprobs = logits.gather(1, tokens[:, None]).squeeze(1) - total
        sampled = tokens.tolist()
        for sequence, token, logprob in zip(batch.sequences, sampled, logprobs.tolist(), strict=True):
            sequence.completion.tokens.append(token)
            sequence.completion.logprobs.append(logprob)
        new = ~(batch.history == tokens[:, None]).any(1, keepdim=True)
        batch.first = torch.cat([batch.first, new], 1)
        batch.history = torch.cat([batch.history, tokens[:, None]], 1)
        return sampled


def draws_of(params: SamplingParams, prompts: int, seeds: Sequence[int] | None) -> Tensor:
    """(prompts * samples, max_tokens) float64 in [0, 1): the draws of each sequence, from a generator of its own."""
    if seeds is None:
        firsts = [sequence_seed(params.seed, row) for row in range(prompts)]
    elif len(seeds) == prompts:
        firsts = [sequence_seed(seed, 0) for seed in seeds]
    else:
        raise ValueError(f"{len(seeds)} seeds for {prompts} prompts")
    generators = [torch.Generator().manual_seed(first + copy) for first in firsts for copy in range(params.samples)]
    return torch.stack([torch.rand(params.max_tokens, generator=g, dtype=torch.float64) for g in generators])
