"""--serve_report: the page of a run, live, for a browser on this machine and nobody else."""

from __future__ import annotations

import logging
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from rwkv_rlhf.reports.metrics import METRICS
from rwkv_rlhf.reports.page import CURVES, Run, page, run_page
from rwkv_rlhf.reports.records import Records
from rwkv_rlhf.reports.run_facts import facts_of
from rwkv_rlhf.serving.host_header import names_this_machine

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'"
)


class Quiet(ThreadingHTTPServer):
    """A browser that leaves in the middle of an answer is nothing to tell."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing."""


class PageServer:
    """Serves the page of the run in `folder` from a thread, between `with` and its end; port 0 = a free one.

    Raises ValueError at once when the port is taken.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self._records = Records(folder / METRICS)
        self._lock = threading.Lock()
        served = self

        class Answer(BaseHTTPRequestHandler):
            """GET / and nothing else."""

            def do_GET(self) -> None:
                """The page; not under other names of this address, by which a page elsewhere could read it."""
                if not names_this_machine(self.headers.get("Host", "")):
                    self.send_error(HTTPStatus.FORBIDDEN)
                elif self.path != "/":
                    self.send_error(HTTPStatus.NOT_FOUND)
                else:
                    self.reply(served.html().encode())

            def reply(self, body: bytes) -> None:
                """A page that is not kept."""
                self.send_response(HTTPStatus.OK)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.send_header("Content-Security-Policy", POLICY)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Requests are not said."""

        try:
            self._server = Quiet((HOST, port), Answer)
        except OSError as error:
            raise ValueError(
                f"{{serve_report}} {port}: {HOST}:{port} cannot be listened at ({error.strerror}); give another port"
            ) from error
        self.address = f"http://{HOST}:{self._server.server_port}/"

    def __enter__(self) -> PageServer:
        threading.Thread(target=self._server.serve_forever, name="page", daemon=True).start()
        log.info("the page is shown live at %s", self.address)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def html(self) -> str:
        """The page as it is now."""
        with self._lock:
            self._records.read()
            run = Run(self.folder, self._records, facts_of(self.folder, self._records.run))
            if not self._records.begin:
                return page(run.name, f"<h1>The run is about to begin</h1><p id='live'></p>{CURVES}", [], live=True)
            return run_page(run, live=True)
