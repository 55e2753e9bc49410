"""The server of `rwkv-rlhf serve`: /v1/chat/completions, /v1/models, /health."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rwkv_rlhf.data.report import RowError
from rwkv_rlhf.data.templates.template import Template
from rwkv_rlhf.generation.sampling import sequence_seed
from rwkv_rlhf.generation.sampling_params import SamplingParams
from rwkv_rlhf.serving.answering import pieces
from rwkv_rlhf.serving.engine import Cue, Engine, Piece, shared_with_next
from rwkv_rlhf.serving.openai import Question, Reply, Token, question_of, tokens_of
from rwkv_rlhf.serving.tool_calls import Held, parts_of
from rwkv_rlhf.serving.web import Guard, Refused, event, events, json_of, refuse

log = logging.getLogger(__name__)


class Service:
    """One model under one name.

    params: what a request does not say; `params.seed` is where the seeds of requests without one begin.
    """

    def __init__(self, engine: Engine, template: Template, params: SamplingParams, name: str) -> None:
        self.engine, self.template, self.name = engine, template, name
        self.params = params
        self.begun = int(time.time())
        self._numbers = itertools.count()

    def cue(self, question: Question) -> Cue:
        """What the answers follow. Raises Refused."""
        try:
            cue = Cue.of(question.turns, self.template, self.engine.tokenizer)
        except (RowError, ValueError) as error:
            raise Refused(str(error), param="messages") from error
        if not cue.ids:
            raise Refused("the conversation has no tokens", param="messages")
        shared = shared_with_next(question.turns, self.template, self.engine.tokenizer, cue.ids)
        return cue._replace(shared=shared)

    def seed(self, question: Question) -> int:
        """The seed of the first answer; each request without one gets another."""
        if question.seed is not None:
            return sequence_seed(question.seed, 0)
        return sequence_seed(self.params.seed, next(self._numbers))

    async def complete(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        question = question_of(await json_of(request), self.params, self.name)
        cue = self.cue(question)
        bytes_of = self.engine.tokenizer.decode_bytes
        reply = Reply(self.name, len(cue.ids), question.params.samples, bytes_of, question.scored)
        asked = pieces(self.engine, cue, question.params, self.seed(question), question.scored)
        if question.stream:
            return events(self._stream(question, asked, reply))
        async for piece in asked:
            if piece.error:
                raise Refused(piece.error, 500)
            if await request.is_disconnected():
                break
            reply.texts[piece.sample] = reply.texts.get(piece.sample, "") + piece.text
            if piece.done is not None:
                reply.done[piece.sample], reply.cached = piece.done, piece.cached
                reply.tokens[piece.sample] = tokens_of(piece.so_far, 0, piece.certain)
        else:
            for sample, text in reply.texts.items() if question.tools else ():
                reply.texts[sample], reply.calls[sample] = parts_of(text)
            return JSONResponse(reply.whole())
        return Response(status_code=499)  # nobody is there to read it

    async def _stream(self, question: Question, asked: AsyncIterator[Piece], reply: Reply) -> AsyncIterator[bytes]:
        later = {"usage": None} if question.usage else {}  # the counts come with the last chunk
        held = [Held() for _ in range(reply.samples)]
        said = [0] * reply.samples  # tokens whose log-probabilities were sent

        def chunk(sample: int, delta: dict[str, Any], tokens: Sequence[Token] = (), ended: bool = False) -> bytes:
            return event(reply.chunk(sample, delta, tokens, ended) | later)

        for sample in range(reply.samples):
            yield chunk(sample, {"role": "assistant", "content": ""})
        async for piece in asked:
            if piece.error:
                yield event(Refused(piece.error, 500).body())
                return
            sample, text = piece.sample, held[piece.sample].add(piece.text) if question.tools else piece.text
            tokens = tokens_of(piece.so_far, said[sample], piece.certain)
            said[sample] += len(tokens)
            if text or tokens:
                yield chunk(sample, {"content": text}, tokens)
            if piece.done is not None:
                reply.done[sample], reply.cached = piece.done, piece.cached
                rest, reply.calls[sample] = held[sample].end()
                if rest:
                    yield chunk(sample, {"content": rest})
                if calls := [{"index": number} | call for number, call in enumerate(reply.calls[sample])]:
                    yield chunk(sample, {"tool_calls": calls})
                yield chunk(sample, {}, ended=True)
        if question.usage:
            yield event(reply.counts())
        yield event("[DONE]")

    def _model(self) -> dict[str, object]:
        return {"id": self.name, "object": "model", "created": self.begun, "owned_by": "local"}

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        name = request.path_params["name"]
        if name != self.name:
            raise Refused(f"the model {name!r} does not exist; this server has {self.name!r}", 404, "model")
        return JSONResponse(self._model())


async def health(request: Request) -> Response:
    """GET /health."""
    return JSONResponse({"status": "ok"})


async def refuse_path(request: Request, error: Exception) -> Response:
    """An address or a method that there is not."""
    assert isinstance(error, HTTPException)
    said = f"{request.method} {request.url.path} is not offered here; POST /v1/chat/completions and GET /v1/models are"
    return Refused(said, error.status_code).response()


def application(service: Service, token: str, local: bool) -> Starlette:
    """The server as an ASGI application; see `Guard` for `token` and `local`."""
    routes = [
        Route("/v1/chat/completions", service.complete, methods=["POST"]),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.model),
        Route("/health", health),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, token=token, local=local)],
        exception_handlers={Refused: refuse, HTTPException: refuse_path},
    )
