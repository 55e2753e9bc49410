"""What the web servers of this program share: the port, who may ask, and JSON that comes and goes."""

from __future__ import annotations

import errno
import ipaddress
import json
import secrets
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

import uvicorn
from starlette.datastructures import Headers, QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from rwkv_rlhf.files import parse_json, without_nan
from rwkv_rlhf.serving.host_header import names_this_machine

LARGEST_BODY = 16 << 20  # bytes of a request
WAIT = 2  # seconds that running answers have when the server ends


class Refused(Exception):
    """A request that is not answered: the status, a sentence, and the parameter and code of OpenAI's errors."""

    def __init__(self, sentence: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(sentence)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kinds = {401: "authentication_error", 404: "not_found_error", 500: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer that says so."""
        return JSONResponse(self.body(), self.status)


async def refuse(request: Request, error: Exception) -> Response:
    """What a Starlette application does about `Refused`."""
    assert isinstance(error, Refused)
    return error.response()


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bound(host: str, port: int) -> socket.socket:
    """A socket at the port (0 = any that is free). Raises ValueError when it cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OverflowError:
        raise ValueError(f"--port {port}: must be 0 to 65535") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"--port {port} is in use by another program; give another one, or 0 for any") from error
        raise ValueError(f"{host}:{port} cannot be listened at ({error.strerror}); see --host and --port") from error


def address(listener: socket.socket) -> str:
    """http://127.0.0.1:8000."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Guard:
    """Lets through who may ask.

    token: what `Authorization: Bearer` (or ?token= of the address) must say, "" = nothing. local: the Host must be this
    machine's, so that a page of somebody else's, whose name leads here, is not answered.
    """

    def __init__(self, app: ASGIApp, token: str, local: bool) -> None:
        self.app, self.token, self.local = app, token, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        refused = self._refused(scope) if scope["type"] == "http" else None
        await (refused.response() if refused else self.app)(scope, receive, send)

    def _refused(self, scope: Scope) -> Refused | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.local and not names_this_machine(host):
            return Refused(f"the Host {host[:100]!r} is not this machine", 403)
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            given = QueryParams(scope["query_string"]).get("token", "")
        if self.token and not secrets.compare_digest(given.strip().encode(), self.token.encode()):
            return Refused(
                "a token is needed: open the whole address that was printed, or send Authorization: Bearer TOKEN",
                401,
                code="invalid_api_key",
            )
        return None


async def json_of(request: Request) -> dict[str, Any]:
    """The JSON object in the body. Raises Refused."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a foreign page cannot send without being asked first
        raise Refused(f"the content type is {kind or 'missing'}, expected application/json", 415)
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > LARGEST_BODY:
            raise Refused(f"the request is larger than {LARGEST_BODY >> 20} MiB", 413)
    try:
        found = parse_json(data)
    except ValueError as error:
        raise Refused(f"the body is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise Refused(f"the body must be a JSON object, not {type(found).__name__}")
    return found


def event(data: Mapping[str, Any] | str) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(without_nan(data), ensure_ascii=False)
    return f"data: {text}\n\n".encode(errors="replace")


def events(parts: AsyncIterator[bytes]) -> StreamingResponse:
    """A stream of server-sent events."""
    return StreamingResponse(parts, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def run_app(app: ASGIApp, listener: socket.socket) -> None:
    """Serves until Ctrl+C."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=WAIT
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
