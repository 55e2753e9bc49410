"""A model in a thread of its own, which answers whoever asks: all that is asked at a time decodes together."""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rwkv_rlhf.data.conversation import Turn
from rwkv_rlhf.data.templates.template import Template
from rwkv_rlhf.data.tokenizer import Tokenizer
from rwkv_rlhf.generation.answers import AnswerStream
from rwkv_rlhf.generation.prefixes import LEAST, PrefixCache, Rest
from rwkv_rlhf.generation.rows import Completion, Request
from rwkv_rlhf.generation.sampler import Sampler
from rwkv_rlhf.generation.sampling_params import SamplingParams
from rwkv_rlhf.model.rwkv import RWKV
from rwkv_rlhf.settings.exit_status import sentence_of

log = logging.getLogger(__name__)


class Cue(NamedTuple):
    """What an answer follows: the text and its ids. bare: white space around the answer belongs to it. shared: how many
    of the ids the next turn's prompt begins with too, not all of them; 0 = not known."""

    text: str
    ids: Sequence[int]
    bare: bool = False
    shared: int = 0

    @classmethod
    def of(cls, turns: Sequence[Turn], template: Template, tokenizer: Tokenizer) -> Cue:
        """What the answer to a conversation follows. Raises RowError where the template refuses it."""
        text = template.prompt(turns)
        return cls(text, template.ids(text, tokenizer), bare=not template.assistant)


def shared_with_next(turns: Sequence[Turn], template: Template, tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """How many of `ids`, the prompt of a conversation, the prompt of its next turn will begin with; one is left."""
    later = [*turns, Turn("assistant", "x"), Turn("user", "x")]
    try:
        longer = template.ids(template.prompt(later), tokenizer)
    except ValueError:  # a template for one question only
        return 0
    same = itertools.takewhile(lambda two: two[0] == two[1], zip(ids, longer))
    return min(sum(1 for _ in same), len(ids) - 1)


class Piece(NamedTuple):
    """More of answer `sample`: text, and how many of its tokens are certain; `done` with the last piece.

    so_far: its tokens with their log-probabilities, where those were asked for. cached: ids of the prompt behind which
    the state was known. error: why there is no answer, in a sentence.
    """

    sample: int
    text: str
    done: Completion | None = None
    error: str = ""
    certain: int = 0
    so_far: Completion | None = None
    cached: int = 0


@dataclass
class Ticket:
    """Answers that somebody waits for. `hear` is called in the engine's thread with each piece of them.

    scored: who waits wants to know of each token. cached: as of a `Piece`.
    """

    streams: list[AnswerStream]
    hear: Callable[[Piece], None]
    scored: bool = False
    cached: int = 0
    cancelled: bool = field(default=False)

    def cancel(self) -> None:
        """Nobody waits any more: the answers end with their next token."""
        self.cancelled = True

    def token(self, sample: int, so_far: Completion) -> bool:
        """One more token; whether more are wanted."""
        text = self.streams[sample].add(so_far.tokens[-1])
        if text:
            self.tell(self._piece(sample, text, so_far))
        return not self.cancelled

    def finish(self, sample: int, completion: Completion) -> None:
        """An answer is whole."""
        piece = self._piece(sample, self.streams[sample].end(), completion)
        self.tell(piece._replace(done=completion, cached=self.cached))

    def _piece(self, sample: int, text: str, so_far: Completion) -> Piece:
        if not self.scored:
            return Piece(sample, text)
        return Piece(sample, text, certain=self.streams[sample].certain, so_far=so_far)

    def tell(self, piece: Piece) -> None:
        """Hand a piece on; a listener that is gone (its loop is closed) is no fault of the others."""
        if self.cancelled:
            return
        try:
            self.hear(piece)
        except RuntimeError as error:
            log.debug("a listener is gone: %s", error)
            self.cancelled = True


class Engine:
    """Answers requests of any thread, at most `at_once` answers at a time; the others wait for their turn.

    With `states` so many states are kept, so that the next turn of a conversation runs only what is new of it.
    """

    def __init__(self, model: RWKV, tokenizer: Tokenizer, at_once: int, states: int = 0) -> None:
        self.tokenizer, self.at_once = tokenizer, at_once
        self._prefixes = PrefixCache(model, states) if states else None
        self._sampler = Sampler(model, tokenizer)
        self._queue: deque[Request] = deque()
        self._open: dict[int, tuple[Ticket, int]] = {}  # by id: ticket, answers that are still to end
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    def ask(
        self, cue: Cue, params: SamplingParams, seed: int, hear: Callable[[Piece], None], scored: bool = False
    ) -> Ticket:
        """`params.samples` answers to `cue`, of which `hear` learns in the engine's thread.

        seed: of the first answer. The same seed gives the same answer, whatever else runs, up to rounding. scored:
        pieces tell of their tokens too.
        """
        assert cue.ids
        streams = [AnswerStream(cue.text, params, self.tokenizer, bare=cue.bare) for _ in range(params.samples)]
        rest = Rest(cue.ids, None) if self._prefixes is None else self._prefixes.find(cue.ids)
        ticket = Ticket(streams, hear, scored, len(cue.ids) - len(rest.prompt))
        self._open[id(ticket)] = ticket, params.samples
        request = Request(rest.prompt, params, seed, ticket, rest.state, ticket.token)
        if self._prefixes is not None and cue.shared - ticket.cached >= LEAST:
            request.kept = cue.shared - ticket.cached
            request.keep = functools.partial(self._prefixes.add, cue.ids[: cue.shared])
        self._queue.append(request)
        self._wake.set()
        return ticket

    def close(self) -> None:
        """Ends the thread; answers that are not whole yet are given up."""
        self._closed = True
        for ticket, _ in [*self._open.values()]:
            ticket.cancel()
        self._wake.set()
        self._thread.join()

    def _serve(self) -> None:
        while not self._closed:
            self._wake.wait()
            self._wake.clear()
            try:
                for done in self._sampler.stream(self._queue, at_once=self.at_once):
                    ticket: Ticket = done.request.key
                    self._one_less(ticket)
                    ticket.finish(done.copy, done.completion)
            except Exception as error:  # whatever it is, those who wait must hear of it
                log.exception("the model failed")
                self._fail(sentence_of(error))

    def _one_less(self, ticket: Ticket) -> None:
        _, left = self._open.pop(id(ticket))
        if left > 1:
            self._open[id(ticket)] = ticket, left - 1

    def _fail(self, sentence: str) -> None:
        self._queue.clear()
        for ticket, _ in [*self._open.values()]:
            ticket.tell(Piece(0, "", error=sentence))
        self._open.clear()
