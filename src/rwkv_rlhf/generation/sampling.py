"""Batched sampling with recurrent state: prompts run once, packed; then one token a step for all sequences together.

Legend: B running sequences, S prompts, C width, V vocabulary, t tokens sampled so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rwkv_rlhf.model.state import State

END_OF_DOCUMENT = 0  # the World vocabulary's id 0; other vocabularies pass their own `stop_ids`
FIRST_CANDIDATES = 128  # how many likely tokens nucleus sampling sorts before it tries more
MASK_63 = (1 << 63) - 1


@dataclass
class Generated:
    """One continuation.

    `tokens`: every sampled id, those of the stop included. `logprobs`: the natural-log probability of each under the
    model's own distribution (temperature 1, no penalty, nothing cut), float32 precision. `finished`: it stopped by
    itself. `text`: the decoded tokens before the stop ("" without a tokenizer). `state`: one row, what the model
    remembers after all tokens but the last (only with keep_state).
    """

    tokens: list[int]
    logprobs: list[float]
    finished: bool
    text: str = ""
    state: State | None = None


@dataclass(frozen=True)
class Choice:
    """How a token is chosen from logits; see `generate` for the meaning of each field."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence: float = 0.0
    frequency: float = 0.0
    decay: float = 0.996
    banned: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature} is below 0; 0 takes the likeliest token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is not in (0, 1]; 1 keeps every token")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} is below 0; 0 keeps every token")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"penalty decay {self.decay} is not in [0, 1]")


def sequence_seed(seed: int, index: int) -> int:
    """A well-mixed seed for sequence `index` of a run (the finaliser of splitmix64, Steele et al. 2014)."""
    x = (seed * 0x9E3779B97F4A7C15 + (index + 1) * 0xD1B54A32D192ED03) & ((1 << 64) - 1)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
    return (x ^ (x >> 31)) & MASK_63


def penalised(logits: Tensor, history: Tensor, first: Tensor, choice: Choice) -> Tensor:
    """logits (B, V) float32, history (B, t) sampled ids, first (B, t) bool: first occurrence -> (B, V), a copy.

    Subtracts presence + frequency * sum_i decay^(t-1-i) over the occurrences i of each token, and forbids the banned.
    """
    logits = logits.clone()
    steps = history.shape[1]
    if steps and (choice.presence or choice.frequency):
        age = torch.arange(steps - 1, -1, -1, device=logits.device, dtype=logits.dtype)
        weight = choice.frequency * choice.decay**age + choice.presence * first.to(logits.dtype)  # (B, t)
        logits.scatter_add_(1, history, -weight)
    if choice.banned:
        logits[:, list(choice.banned)] = float("-inf")
    return logits


def nucleus(probs: Tensor, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """probs (B, V) -> (probabilities, ids), each (B, K), likeliest first; what is cut has probability 0.

    top_p keeps the fewest likely tokens whose sum reaches it, at least one. Sorts few candidates where they suffice.
    """
    vocabulary = probs.shape[1]
    limit = min(top_k or vocabulary, vocabulary)
    size = min(limit, FIRST_CANDIDATES) if top_p < 1 else limit
    while True:
        kept, ids = probs.topk(size, dim=1)
        reached = kept.cumsum(1)
        if size == limit or bool((reached[:, -1] >= top_p).all()):
            break
        size = min(limit, size * 8)
    before = reached - kept
    return torch.where(before < top_p, kept, torch.zeros_like(kept)), ids


def pick(logits: Tensor, draws: Tensor, choice: Choice) -> Tensor:
    """logits (B, V) float32, draws (B,) float64 in [0, 1) -> ids (B,) int64, each from its own row and draw only.

    As in RWKV's own sampler, top_p and top_k cut the distribution first and the temperature is applied to the rest.
    """
    if choice.temperature == 0:
        return logits.argmax(1)
    probs, ids = torch.softmax(logits, 1), None
    if choice.top_p < 1 or choice.top_k:
        probs, ids = nucleus(probs, choice.top_p, choice.top_k)
    probs = probs.double() / probs.amax(1, keepdim=True)
    if choice.temperature != 1:
        probs = probs ** (1 / choice.temperature)
    reached = probs.cumsum(1)
    aim = draws[:, None] * reached[:, -1:]
    place = torch.searchsorted(reached, aim, right=True)
    # A draw next to 1 may land behind the last token that may be chosen: step back to it.
    last = reached.shape[1] - 1 - probs.flip(1).gt(0).to(torch.int8).argmax(1, keepdim=True)
    place = torch.minimum(place, last)
    return (place if ids is None else ids.gather(1, place)).squeeze(1)


class Stops:
    """Decides when one sequence ends: a stop id, or a stop text anywhere in the decoded bytes (across tokens)."""

    def __init__(self, texts: Sequence[str], ids: Sequence[int], tokenizer) -> None:
        if texts and tokenizer is None:
            raise ValueError("stop texts need a tokenizer")
        self.texts = [text.encode() for text in texts if text]
        self.ids = frozenset(ids)
        self.tokenizer = tokenizer
        self.longest = max((len(text) for text in self.texts), default=0)

    def ends(self, tail: bytes, token: int) -> tuple[bool, bytes]:
        """Bytes kept from before, a new token -> (whether it ends here, bytes to keep)."""
        if token in self.ids:
            return True, b""
        if not self.texts:
            return False, b""
        tail += self.tokenizer.decode_bytes([token])
        return any(text in tail for text in self.texts), tail[len(tail) - min(len(tail), self.longest - 1) :]

    def text(self, tokens: list[int]) -> str:
        """The tokens as text, cut before the first stop."""
        if self.tokenizer is None:
            return ""
        if tokens and tokens[-1] in self.ids:
            tokens = tokens[:-1]
        content = self.tokenizer.decode_bytes(tokens)
        ends = [content.find(text) for text in self.texts if text in content]
        return content[: min(ends, default=len(content))].decode("utf-8", errors="replace")


def start(
    model: nn.Module, prompts: Sequence[Sequence[int]], state: State | None, device: torch.device
) -> tuple[Tensor, State]:
    """Runs all prompts packed in one row -> (last hidden (S, C), state of S rows)."""
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {row + 1} has no tokens; sampling needs at least one to start from")
    flat = torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.int64, device=device)
    lengths = torch.tensor([0, *(len(prompt) for prompt in prompts)], dtype=torch.int64, device=device)
    starts = lengths.cumsum(0)
    hidden, state = model(flat[None], state=state, starts=starts)
    return hidden[0].index_select(0, starts[1:] - 1), state


def seeds_of(seed: int | Sequence[int], prompts: int, samples: int) -> list[int]:
    """One seed per sequence; a list gives each prompt its own, so results do not depend on who else is in the batch."""
    given = [seed] * prompts if isinstance(seed, int) else list(seed)
    if len(given) != prompts:
        raise ValueError(f"{len(given)} seeds for {prompts} prompts")
    alone = not isinstance(seed, int)
    return [sequence_seed(given[row], 0 if alone else row) + copy for row in range(prompts) for copy in range(samples)]


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    presence: float = 0.0,
    frequency: float = 0.0,
    decay: float = 0.996,
    banned: Sequence[int] = (),
    stop_texts: Sequence[str] = ("\n\n",),
    stop_ids: Sequence[int] = (END_OF_DOCUMENT,),
    seed: int | Sequence[int] = 0,
    samples: int = 1,
    tokenizer=None,
    state: State | None = None,
    keep_state: bool = False,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Generated]:
    """Continues every prompt (lists of ids, none empty) until a stop or `max_tokens`.

    temperature 0 takes the likeliest token. top_p, top_k cut the distribution (see `pick`); presence and frequency are
    penalties on what was sampled before, decaying by `decay` a token; banned ids are never sampled. A sequence ends
    after a token of `stop_ids` or when its text holds one of `stop_texts` (needs `tokenizer`), and leaves the batch.
    `samples` continuations per prompt share its single run; the result is prompt-major. Each sequence draws from its
    own generator: with a list of seeds (one a prompt) a prompt's continuations do not depend on the rest of the batch,
    up to the rounding of batched matrix products. `state` (S rows) is where the prompts begin; on_token(sequence, id)
    is called as tokens come. The model's training mode is restored. Raises ValueError for settings out of range, an
    empty prompt, and logits that are not finite.
    """
    choice = Choice(temperature, top_p, top_k, presence, frequency, decay, tuple(banned))
    if max_tokens < 1 or samples < 1:
        raise ValueError(f"max_tokens {max_tokens} and samples {samples} must be at least 1")
    stops = Stops(stop_texts, stop_ids, tokenizer)
    if not prompts:
        return []
    device = next(model.parameters()).device
    seeds = seeds_of(seed, len(prompts), samples)
    draws = torch.stack(
        [torch.rand(max_tokens, generator=torch.Generator().manual_seed(one), dtype=torch.float64) for one in seeds]
    ).to(device)
    results = [Generated([], [], False) for _ in seeds]
    training = model.training
    model.eval()
    try:
        hidden, state = start(model, prompts, state, device)
        if samples > 1:
            rows = torch.arange(len(prompts), device=device).repeat_interleave(samples)
            hidden, state = hidden.index_select(0, rows), state.select(rows)
        run = Run(model, stops, choice, results, draws, keep_state, on_token)
        run.finish(hidden, state, max_tokens)
    finally:
        model.train(training)
    for result in results:
        result.text = stops.text(result.tokens)
    return results


@dataclass
class Run:
    """The loop over steps. Rows of every tensor are the sequences still running; `alive` names them."""

    model: nn.Module
    stops: Stops
    choice: Choice
    results: list[Generated]
    draws: Tensor  # (sequences, max_tokens) float64
    keep_state: bool
    on_token: Callable[[int, int], None] | None

    def finish(self, hidden: Tensor, state: State, max_tokens: int) -> None:
        """hidden (B, C) after the prompts and their state -> fills `results`."""
        alive = list(range(len(self.results)))
        tails = [b""] * len(self.results)
        history = torch.empty((len(alive), 0), dtype=torch.int64, device=hidden.device)
        first = torch.empty((len(alive), 0), dtype=torch.bool, device=hidden.device)
        for step in range(max_tokens):
            tokens = self.step(hidden, history, first, alive, step)
            first = torch.cat([first, ~(history == tokens[:, None]).any(1, keepdim=True)], 1)
            history = torch.cat([history, tokens[:, None]], 1)
            going = []
            for row, (sequence, token) in enumerate(zip(alive, tokens.tolist(), strict=True)):
                done, tails[sequence] = self.stops.ends(tails[sequence], token)
                self.results[sequence].finished = done
                if self.on_token is not None:
                    self.on_token(sequence, token)
                if self.keep_state and (done or step == max_tokens - 1):
                    self.results[sequence].state = state.select(torch.tensor([row], device=hidden.device))
                if not done:
                    going.append(row)
            if not going or step == max_tokens - 1:
                return
            if len(going) < len(alive):
                rows = torch.tensor(going, device=hidden.device)
                alive = [alive[row] for row in going]
                state, tokens = state.select(rows), tokens.index_select(0, rows)
                history, first = history.index_select(0, rows), first.index_select(0, rows)
            out, state = self.model(tokens[:, None], state=state)
            hidden = out[:, -1]

    def step(self, hidden: Tensor, history: Tensor, first: Tensor, alive: list[int], step: int) -> Tensor:
        """hidden (B, C) -> sampled ids (B,), and their log-probabilities into `results`."""
        logits = self.model.head(hidden).float()
        total = torch.logsumexp(logits, 1)
        if not bool(torch.isfinite(total).all()):
            raise ValueError("the model's logits are not finite: the checkpoint is damaged or the precision is too low")
        draws = self.draws[:, step].index_select(0, torch.tensor(alive, device=hidden.device))
        tokens = pick(penalised(logits, history, first, self.choice), draws, self.choice)
        logprobs = logits.gather(1, tokens[:, None]).squeeze(1) - total
        for sequence, token, logprob in zip(alive, tokens.tolist(), logprobs.tolist(), strict=True):
            self.results[sequence].tokens.append(token)
            self.results[sequence].logprobs.append(logprob)
        return tokens
