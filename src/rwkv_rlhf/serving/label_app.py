"""The server of `rwkv-rlhf label`: one page, and what it asks for. Only this machine is listened to."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from rwkv_rlhf.data.conversation import Turn, normalise, refuse_nul
from rwkv_rlhf.serving.labelling import Item, Labelling
from rwkv_rlhf.serving.web import Guard, Refused, event, events, json_of, refuse

PAGE = Path(__file__).with_name("label.html")
PAUSE = 0.03  # seconds between two looks of the page at an answer that grows
ALIVE = 10.0  # seconds after which an answer that does not grow is told again


class LabelApp:
    """names: of the models, for the results."""

    def __init__(self, work: Labelling, names: Sequence[str]) -> None:
        self.work, self.names = work, names

    async def page(self, request: Request) -> Response:
        """GET /: everything that the browser needs; it is allowed to load nothing else."""
        nonce = secrets.token_urlsafe(16)
        html = PAGE.read_text(encoding="utf-8").replace("NONCE", nonce)
        policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
        policy += "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        headers = {
            "Content-Security-Policy": policy,
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        return HTMLResponse(html, headers=headers)

    async def current(self, request: Request) -> Response:
        """GET /current: what to compare now."""
        return JSONResponse(self._current())

    def _current(self) -> dict[str, object]:
        item, said = self.work.current(), self.work.progress()
        if item is None:
            return {**said, "item": None}
        turns = [{"role": turn.role, "text": turn.text} for turn in item.turns]
        return {**said, **item.shown(), "turns": turns}

    async def answers(self, request: Request) -> Response:
        """GET /answers/N: both answers as they grow, as events."""
        item = self.work.items.get(request.path_params["number"])
        if item is None:
            raise Refused("this pair is not shown any more", 404)
        return events(self._grow(item))

    async def _grow(self, item: Item) -> AsyncIterator[bytes]:
        while True:
            version, changed = item.version, item.changed
            yield event(item.shown())
            if item.error or (item.whole and (item.task is None or item.task.done())):
                return
            if item.version == version:
                waiting = [asyncio.ensure_future(changed.wait()), *([item.task] if item.task else [])]
                await asyncio.wait(waiting, timeout=ALIVE, return_when=asyncio.FIRST_COMPLETED)
                waiting[0].cancel()
            await asyncio.sleep(PAUSE)

    async def vote(self, request: Request) -> Response:
        """POST /vote {item, vote, edited}: answers with the next pair."""
        said = await json_of(request)
        number, kind, edited = said.get("item"), said.get("vote"), said.get("edited", "")
        if not (isinstance(number, int) and isinstance(kind, str) and isinstance(edited, str)):
            raise Refused("expected item, vote and edited")
        self.work.vote(number, kind, edited)
        return JSONResponse(self._current())

    async def undo(self, request: Request) -> Response:
        """POST /undo: the last pair comes again."""
        await json_of(request)
        self.work.undo()
        return JSONResponse(self._current())

    async def ask(self, request: Request) -> Response:
        """POST /ask {text, system}: a prompt that was typed; it is next."""
        said = await json_of(request)
        texts = [normalise(str(said.get(key) or "")) for key in ("system", "text")]
        if not texts[1]:
            raise Refused("the prompt is empty")
        turns = tuple(Turn(role, text) for role, text in zip(("system", "user"), texts) if text)
        refuse_nul(turns)
        self.work.ask(turns)
        return JSONResponse(self._current())

    async def results(self, request: Request) -> Response:
        """GET /results: sentences."""
        return JSONResponse({"lines": self.work.lines(self.names)})

    def application(self, token: str) -> Starlette:
        """The server as an ASGI application."""
        routes = [
            Route("/", self.page),
            Route("/current", self.current),
            Route("/answers/{number:int}", self.answers),
            Route("/vote", self.vote, methods=["POST"]),
            Route("/undo", self.undo, methods=["POST"]),
            Route("/ask", self.ask, methods=["POST"]),
            Route("/results", self.results),
        ]
        return Starlette(
            routes=routes,
            middleware=[Middleware(Guard, token=token, local=True)],
            exception_handlers={Refused: refuse, ValueError: refuse_value},
        )


async def refuse_value(request: Request, error: Exception) -> Response:
    """What the person cannot do, in a sentence."""
    return Refused(str(error), 409).response()
