"""Batched sampling with recurrent state: prompts run once, packed; then one token a step for all sequences together.

Batching is continuous: a sequence that ends gives its place to one that waits, so long answers do not hold up the rest.
How a step is computed is the model's matter; here is who takes part in it.

Legend: B rows, S prompts, C width, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_rlhf.data.tokenizer import Tokenizer
from rwkv_rlhf.distributed.watchdog import heartbeat
from rwkv_rlhf.generation.rows import Completion, Finished, Hear, Request, Rows, Running, Scored, draws_of
from rwkv_rlhf.generation.sampling import candidate_counts, penalise, pick, sequence_seed
from rwkv_rlhf.generation.sampling_params import SamplingParams
from rwkv_rlhf.generation.stops import Stops
from rwkv_rlhf.model.decoding import Decoder
from rwkv_rlhf.model.packed import packed_rows
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.model.state import State
from rwkv_rlhf.transfers import to_device

PREFILL = 8192  # tokens of prompts that run together
JOIN = 8  # new sequences come when an eighth of the places is free: each time their prompts cost a pass of their own
EMPTY = 4  # rows without a sequence are taken out when they are more than a fourth of the rows
PLACES = 64  # for tokens of an answer, at first


class NoNumbers(ValueError):
    """The model's logits are NaN or infinite: nothing can be sampled."""


class Begun(NamedTuple):
    """A prompt that has run: hidden (1, C) of its last token, the state after it, and the samples still to begin."""

    request: Request
    hidden: Tensor
    state: State
    copies: deque[int]


class Sampler:
    """Continues prompts with one model. `tokenizer` is needed for stop texts and for the texts of completions."""

    def __init__(self, model: RWKV, tokenizer: Tokenizer | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        seeds: Sequence[int] | None = None,
        state: State | None = None,
        keep_state: bool = False,
        hear: Hear | None = None,
        at_once: int = 0,
    ) -> list[Completion]:
        """`params.samples` completions of each prompt (lists of ids, none empty), prompt-major.

        `seeds`, one a prompt, stand in place of params.seed. `state` (S rows) is where the prompts begin. `hear`: of
        every request, see `Request`. The other arguments, what is promised and what is raised: as `stream`.
        """
        if seeds is not None and len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
        queue = deque(
            Request(
                prompt,
                params,
                sequence_seed(params.seed, row) if seeds is None else sequence_seed(seeds[row], 0),
                row,
                None if state is None else state.row(row),
                hear,
            )
            for row, prompt in enumerate(prompts)
        )
        done = self.stream(queue, keep_state=keep_state, at_once=at_once)
        found = {(one.request.key, one.copy): one.completion for one in done}
        return [found[row, copy] for row in range(len(prompts)) for copy in range(params.samples)]

    @torch.no_grad()
    def stream(
        self,
        queue: deque[Request],
        *,
        at_once: int = 0,
        keep_state: bool = False,
    ) -> Iterator[Finished]:
        """The samples of all requests, each as soon as it is done. More may be put into `queue` meanwhile, also by
        another thread.

        At most `at_once` sequences run at a time, 0 = all. Each draws from a generator of its own, so what is sampled
        after a prompt does not depend on what else runs, up to the rounding of batched matrix products. The
        model's training mode is restored.
        Raises ValueError for an empty prompt and logits that are not finite.
        """
        training = self.model.training
        self.model.eval()
        try:
            run = _Run(self.model, self.tokenizer, queue, at_once, keep_state)
            while run.admit():
                yield from run.step()
        finally:
            self.model.train(training)


class _Run:
    """One call of `Sampler.stream`."""

    def __init__(
        self,
        model: RWKV,
        tokenizer: Tokenizer | None,
        queue: deque[Request],
        at_once: int,
        keep_state: bool,
    ) -> None:
        self.model, self.tokenizer, self.queue = model, tokenizer, queue
        self.at_once, self.keep_state = at_once, keep_state
        self.begun: deque[Begun] = deque()
        self.rows: Rows | None = None
        self.stops: dict[SamplingParams, Stops] = {}
        self.requests = 0  # taken from the queue so far
        self.device = next(model.parameters()).device
        self.decoder = Decoder(model)
        for request in queue:
            self._stops(request.params)  # refuses what cannot be before anything runs

    def _stops(self, params: SamplingParams) -> Stops:
        if params not in self.stops:
            self.stops[params] = Stops(params, self.tokenizer)
        return self.stops[params]

    def admit(self) -> bool:
        """Let waiting sequences take part; False when none runs and none waits."""
        while self.queue or self.begun:
            running = 0 if self.rows is None else len(self.rows.running)
            free = self.at_once - running if self.at_once else PREFILL
            if free < max(1, self.at_once // JOIN) and running:
                break
            new = self._begin(free)
            self.rows = new if self.rows is None or not running else self.rows.joined(new)
        return self.rows is not None and bool(self.rows.running)

    def _begin(self, free: int) -> Rows:
        """Up to `free` new sequences, whose prompts have run."""
        if not self.begun:
            self._prefill(free)
        begun: list[Running] = []
        parts: list[Begun] = []
        while self.begun and len(begun) < free:
            one = self.begun[0]
            copy = one.copies.popleft()
            generator = torch.Generator().manual_seed(one.request.seed + copy)
            begun.append(Running(one.request, copy, generator))
            parts.append(one)
            if not one.copies:
                self.begun.popleft()
        width = PLACES if self.rows is None else self.rows.draws.shape[1]
        draws = torch.cat([draws_of(sequence, width) for sequence in begun])
        return Rows(
            sequences=[*begun],
            hidden=torch.cat([one.hidden for one in parts]),
            state=State.concatenated([one.state for one in parts]),
            draws=to_device(draws, self.device),
            history=torch.zeros(len(begun), width, dtype=torch.int64, device=self.device),
            first=torch.zeros(len(begun), width, dtype=torch.bool, device=self.device),
            length=torch.zeros(len(begun), dtype=torch.int64, device=self.device),
        )

    def _prefill(self, free: int) -> None:
        """Runs the prompts of the next requests, packed in one row."""
        some: list[Request] = []
        tokens = samples = 0
        while self.queue and samples < free:
            request = self.queue[0]
            if len(request.prompt) == 0:
                number = self.requests + len(some) + 1
                raise ValueError(f"prompt {number} has no tokens; sampling needs at least one to start from")
            if some and tokens + len(request.prompt) > PREFILL:
                break
            some.append(self.queue.popleft())
            tokens, samples = tokens + len(request.prompt), samples + request.params.samples
        self.requests += len(some)
        state = None
        if any(one.state is not None for one in some):
            known = [self.model.initial_state(1) if one.state is None else one.state for one in some]
            state = State.concatenated(known)
        if any(one.kept for one in some):
            _, state = self._packed([one.prompt[: one.kept] for one in some], state)
            for row, one in enumerate(some):
                if one.kept and one.keep is not None:
                    one.keep(state.row(row).map(torch.clone))
        last, after = self._packed([one.prompt[one.kept :] for one in some], state)
        for row, one in enumerate(some):
            self.begun.append(Begun(one, last[row : row + 1], after.row(row), deque(range(one.params.samples))))

    def _packed(self, rows: Sequence[Sequence[int]], state: State | None) -> tuple[Tensor, State]:
        """Run some ids of each row -> hidden (rows, C) of its last one (of a row without any, nothing that is meant),
        and the states behind them."""
        found = packed_rows(self.model, rows, state)
        assert found.after is not None
        return found.hidden.index_select(0, found.starts.last_on(self.device)), found.after

    def step(self) -> Iterator[Finished]:
        """One more token of each sequence; gives those that end with it."""
        assert self.rows is not None
        rows = self.rows = self.rows.with_places()
        heartbeat(f"sampling with {len(rows.sequences)} sequences")
        tokens = self._sample(rows)
        done = []
        for row, sequence in enumerate(rows.sequences):
            if sequence is None:
                continue
            token, params, one = tokens[row], sequence.request.params, sequence.completion
            one.finished, sequence.tail = self._stops(params).ends(sequence.tail, token)
            hear = sequence.request.hear
            wanted = hear is None or hear(sequence.copy, one)
            if one.finished or not wanted or len(one.tokens) == params.max_tokens:
                one.text = self._stops(params).text(one.tokens)
                one.state = rows.select([row]).state if self.keep_state else None
                rows.sequences[row] = None
                done.append(Finished(sequence.request, sequence.copy, one))
        self._advance(rows, tokens)
        yield from done

    def _advance(self, rows: Rows, tokens: list[int]) -> None:
        """Run the new tokens, without the rows that are empty if they are many and none waits for their place."""
        running = rows.running
        if not running:
            self.rows = None
            return
        waiting = bool(self.queue or self.begun)
        if (len(rows.sequences) - len(running)) * EMPTY > len(rows.sequences) and not waiting:
            rows, tokens = rows.select(running), [tokens[row] for row in running]
        last = to_device(torch.tensor(tokens), self.device)
        rows.hidden, rows.state = self.decoder(last, rows.state)
        self.rows = rows

    def _sample(self, rows: Rows) -> list[int]:
        """The next token of each row (0 where it is empty), also written into the rows and their completions.

        All that the host must know comes in one transfer, unless more candidates have to be sorted.
        """
        logits = self.decoder.logits(rows.hidden)
        tokens = [0] * len(rows.sequences)
        left = [Alike(rows, numbers, params, logits) for params, numbers in rows.by_params().items()]
        while left:
            numbers = torch.cat([alike.pick().flatten() for alike in left]).tolist()
            again, at = [], 0
            for alike in left:
                told = numbers[at : at + alike.told]
                at += alike.told
                if not alike.take(told, tokens):
                    again.append(alike)
            left = again
        return tokens


class Alike:
    """The next tokens of the rows `numbers` of `rows`, which are sampled by the same `params`; logits (B, V) of all."""

    def __init__(self, rows: Rows, numbers: list[int], params: SamplingParams, logits: Tensor) -> None:
        self.rows, self.numbers, self.params = rows, numbers, params
        self.index = index = to_device(torch.tensor(numbers), logits.device)
        some = logits if len(numbers) == len(logits) else logits.index_select(0, index)
        self.scaled = some if params.scored_temperature == 1 else some / params.scored_temperature
        self.total = torch.logsumexp(self.scaled, 1)
        self.length = rows.length.index_select(0, index)
        self.draws = rows.draws.index_select(0, index).gather(1, self.length[:, None])[:, 0]
        said = rows.longest if params.penalised else 0
        self.history, first = (part[:, :said].index_select(0, index) for part in (rows.history, rows.first))
        self.penalised = penalise(some, self.history, first, params, self.length)
        self.candidates = candidate_counts(params, logits.shape[1], logits.is_cpu)
        self.ids = self.length
        self.top = min(params.top_logprobs, logits.shape[1])

    @property
    def told(self) -> int:
        """How many numbers `pick` gives."""
        return ((5 if self.params.entropy else 4) + 2 * self.top) * len(self.numbers)

    def pick(self) -> Tensor:
        """(4 or more, B) float64 for the host: ids, log-probabilities, whether logits are finite, whether as many
        candidates were enough, and where they are asked for entropies, then ids and log-probabilities of the likeliest
        tokens. Each call sorts more candidates."""
        self.ids, enough = pick(self.penalised, self.draws, self.params, next(self.candidates))
        logprobs = self.scaled.gather(1, self.ids[:, None]).squeeze(1) - self.total
        told = [self.ids, logprobs, torch.isfinite(self.total)]
        told.append(torch.ones_like(told[2]) if enough is None else enough)
        if self.params.entropy:
            logp = self.scaled - self.total[:, None]
            told.append(-(logp.exp() * logp).sum(1))
        if self.top:
            values, ids = self.scaled.topk(self.top, dim=1)
            told += [*ids.unbind(1), *(values - self.total[:, None]).unbind(1)]
        return torch.stack([numbers.double() for numbers in told])

    def take(self, told: list[float], tokens: list[int]) -> bool:
        """Note what `pick` told in `tokens`, the rows and their completions; False where more must be sorted."""
        count = len(self.numbers)
        ids, logprobs, finite, enough, *more = (told[at : at + count] for at in range(0, len(told), count))
        entropies, likeliest = (more[:1], more[1:]) if self.params.entropy else ([], more)
        if not all(finite):
            raise NoNumbers("the model's logits are not finite: the checkpoint is damaged or the precision is too low")
        if not all(enough):
            return False
        for at, row in enumerate(self.numbers):
            sequence = self.rows.sequences[row]
            assert sequence is not None
            tokens[row] = int(ids[at])
            sequence.completion.tokens.append(tokens[row])
            sequence.completion.logprobs.append(logprobs[at])
            sequence.completion.entropies += [each[at] for each in entropies]
            if self.top:
                pairs = zip(likeliest[: self.top], likeliest[self.top :], strict=True)
                sequence.completion.likeliest.append([Scored(int(known[at]), logp[at]) for known, logp in pairs])
        self._note()
        return True

    def _note(self) -> None:
        """What later draws and penalties need."""
        rows, index, length = self.rows, self.index, self.length
        rows.length[index] = length + 1
        if self.params.penalised:
            inside = torch.arange(self.history.shape[1], device=index.device) < length[:, None]
            rows.history[index, length] = self.ids
            rows.first[index, length] = ~((self.history == self.ids[:, None]) & inside).any(1)
