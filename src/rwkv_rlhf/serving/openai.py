"""Chat completions in OpenAI's form: what a request asks, and what answers it.

Source: the reference of `POST /v1/chat/completions`, `GET /v1/models` and of errors in OpenAI's API. What a request may
say besides: top_k and penalty_decay. What cannot be done is refused, never left out in silence.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rwkv_rlhf.data.conversation import Turn
from rwkv_rlhf.data.messages import Notes
from rwkv_rlhf.data.report import RowError
from rwkv_rlhf.data.shapes.record import Record
from rwkv_rlhf.generation.rows import Completion, Scored
from rwkv_rlhf.generation.sampling_params import SamplingParams, option_types
from rwkv_rlhf.serving.web import Refused
from rwkv_rlhf.settings.shapes import SHAPES

MOST_SAMPLES, MOST_STOPS, MOST_LIKELIEST = 16, 16, 20
# key of a request -> field of SamplingParams
OPTIONS: dict[str, str] = {
    "temperature": "temperature",
    "top_p": "top_p",
    "presence_penalty": "presence",
    "frequency_penalty": "frequency",
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "top_k": "top_k",
    "penalty_decay": "penalty_decay",
}
# what is not built -> values that ask for nothing
EMPTY: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
}


class Question(NamedTuple):
    """What a request asks. seed: None where it names none. usage: whether the stream ends with the counts. scored: it
    wants the log-probabilities of the tokens. tools: it names some that an answer may call."""

    turns: Sequence[Turn]
    params: SamplingParams
    seed: int | None
    stream: bool
    usage: bool
    scored: bool
    tools: bool


def question_of(body: dict[str, Any], defaults: SamplingParams, model: str) -> Question:
    """What the JSON of a request means; what it leaves open is as in `defaults`. Raises Refused."""
    asked = {key: value for key, value in body.items() if value is not None}
    named = asked.get("model", model)
    if named != model:
        raise Refused(
            f"the model {str(named)[:100]!r} does not exist; this server has {model!r}", 404, "model", "model_not_found"
        )
    for key, harmless in EMPTY.items():
        if key in asked and asked[key] not in harmless:
            raise Refused(f"{key} is not built in this server", param=key, code="unsupported_parameter")
    options = asked.get("stream_options", {})
    if not isinstance(options, dict):
        raise Refused("stream_options must be an object", param="stream_options")
    if asked.get("tool_choice") == "none":
        asked.pop("tools", None)
    return Question(
        turns_of(asked),
        params_of(asked, defaults),
        whole(asked, "seed"),
        truth(asked, "stream"),
        truth(options, "include_usage"),
        truth(asked, "logprobs"),
        bool(asked.get("tools")),
    )


def turns_of(asked: dict[str, Any]) -> tuple[Turn, ...]:
    """The conversation, which waits for an answer. Raises Refused."""
    record = Record({key: asked.get(key) for key in ("messages", "tools")}, SHAPES["messages"], Notes())
    try:
        return record.asked(record.turns(("messages",)))
    except RowError as error:
        raise Refused(str(error), param="tools" if str(error).startswith("tools") else "messages") from error


def params_of(asked: dict[str, Any], defaults: SamplingParams) -> SamplingParams:
    """How the answers are sampled; none is longer than that of `defaults`. Raises Refused."""
    types, found = option_types(), dict[str, Any]()
    for key, name in OPTIONS.items():
        if key in asked:
            number = whole(asked, key) if types[name] is int else fraction(asked, key)
            found[name] = number
    found["max_tokens"] = min(found.get("max_tokens", defaults.max_tokens), defaults.max_tokens)
    samples = whole(asked, "n")
    found["samples"] = 1 if samples is None else samples
    if not 1 <= found["samples"] <= MOST_SAMPLES:
        raise Refused(f"n must be 1 to {MOST_SAMPLES}", param="n")
    likeliest = whole(asked, "top_logprobs") or 0
    if not 0 <= likeliest <= MOST_LIKELIEST or (likeliest and not asked.get("logprobs")):
        raise Refused(f"top_logprobs must be 0 to {MOST_LIKELIEST}, with logprobs true", param="top_logprobs")
    found["top_logprobs"] = likeliest
    found["stop_texts"] = (*defaults.stop_texts, *stops_of(asked))
    try:
        return dataclasses.replace(defaults, **found)
    except ValueError as error:
        raise Refused(str(error).removeprefix("--")) from error


def stops_of(asked: dict[str, Any]) -> list[str]:
    """The texts of `stop`. Raises Refused."""
    stop = asked.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    good = isinstance(stops, list) and all(isinstance(text, str) and text for text in stops)
    if not good or len(stops) > MOST_STOPS:
        raise Refused(f"stop must be a text or a list of at most {MOST_STOPS} texts, none empty", param="stop")
    return [*stops]


def whole(asked: dict[str, Any], key: str) -> int | None:
    """A whole number, None where there is none. Raises Refused."""
    value = asked.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise Refused(f"{key} must be a whole number", param=key)
    return value


def fraction(asked: dict[str, Any], key: str) -> float:
    """A number. Raises Refused."""
    value = asked[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refused(f"{key} must be a number", param=key)
    return float(value)


def truth(asked: dict[str, Any], key: str) -> bool:
    """true or false, false where nothing is said. Raises Refused."""
    value = asked.get(key, False)
    if not isinstance(value, bool):
        raise Refused(f"{key} must be true or false", param=key)
    return value


class Token(NamedTuple):
    """A token of an answer: its id, its log-probability, and the likeliest ones in its place."""

    id: int
    logprob: float
    likeliest: Sequence[Scored] = ()


def tokens_of(so_far: Completion | None, first: int, end: int) -> list[Token]:
    """Some tokens of an answer; none where they were not asked for."""
    if so_far is None:
        return []
    likeliest = so_far.likeliest or [[]] * len(so_far.tokens)
    return [*map(Token, so_far.tokens[first:end], so_far.logprobs[first:end], likeliest[first:end])]


@dataclass
class Reply:
    """What is said of one request: its id and time, the tokens of its prompt, and of each answer what ended it.

    bytes_of: the bytes of some ids, for `logprobs`. scored: those are wanted. cached: tokens of the prompt that did not
    run, as the state behind them was known. calls: number of the answer -> its calls of tools.
    """

    model: str
    prompt_tokens: int
    samples: int
    bytes_of: Callable[[list[int]], bytes]
    scored: bool = False
    cached: int = 0
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    texts: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[Token]] = field(default_factory=dict)
    calls: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    done: dict[int, Completion] = field(default_factory=dict)

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompt and of all answers, those that end an answer included."""
        answers = sum(len(one.tokens) for one in self.done.values())
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": answers,
            "total_tokens": self.prompt_tokens + answers,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """The `logprobs` of a choice; None where they are not wanted."""

        def told(token: int, logprob: float) -> dict[str, Any]:
            data = self.bytes_of([token])
            return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": [*data]}

        found = [
            told(one.id, one.logprob) | {"top_logprobs": [told(*other) for other in one.likeliest]} for one in tokens
        ]
        return {"content": found, "refusal": None} if self.scored else None

    def _reason(self, sample: int) -> str:
        if self.calls.get(sample):
            return "tool_calls"
        return "stop" if self.done[sample].finished else "length"

    def _message(self, sample: int) -> dict[str, Any]:
        text, calls = self.texts.get(sample, ""), self.calls.get(sample)
        message = {"role": "assistant", "content": text, "refusal": None}
        return message | {"content": text or None, "tool_calls": calls} if calls else message

    def whole(self) -> dict[str, Any]:
        """A `chat.completion`."""
        choices = [
            {
                "index": sample,
                "message": self._message(sample),
                "logprobs": self.logprobs(self.tokens.get(sample, [])),
                "finish_reason": self._reason(sample),
            }
            for sample in range(self.samples)
        ]
        return self._object("chat.completion", choices) | {"usage": self.usage()}

    def chunk(
        self, sample: int, delta: dict[str, Any], tokens: Sequence[Token] = (), ended: bool = False
    ) -> dict[str, Any]:
        """A `chat.completion.chunk`; `tokens`: those that it says more than the last one."""
        reason = self._reason(sample) if ended else None
        logprobs = self.logprobs(tokens) if tokens else None
        choice = {"index": sample, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._object("chat.completion.chunk", [choice])

    def counts(self) -> dict[str, Any]:
        """The chunk with the counts, which has no choice."""
        return self._object("chat.completion.chunk", []) | {"usage": self.usage()}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
