"""A Hub of its own: what huggingface_hub asks of HF_ENDPOINT, answered out of a dictionary."""

import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 1000  # bytes from which on a file is named by its SHA-256, as those in LFS


def checksum(data):
    """What the Hub calls a file."""
    if len(data) >= LARGE:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """Repositories: name (datasets/... for data) -> path -> bytes.

    Attributes:
        gated: repositories that ask for the token "good". damaged: paths whose bytes are wrong on the way. cut: path ->
            bytes after which the connection breaks. asked: (method, path, Range, token) of every request.
    """

    def __init__(self, repositories):
        self.repositories, self.commit = repositories, COMMIT
        self.gated, self.damaged, self.cut, self.asked = set(), set(), {}, []

    def answer(self, method, path, headers):
        """(status, headers, bytes, how many of them are sent)."""
        token = (headers.get("Authorization") or "").removeprefix("Bearer ")
        self.asked.append((method, path, headers.get("Range"), token))
        found = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        if found:
            repo = found[2] if found[1] == "models" else f"datasets/{found[2]}"
            error = self.refusal(repo, found[3] or "main", token)
            if error:
                return error
            files = [{"rfilename": name} for name in self.repositories[repo]]
            about = {"id": found[2], "sha": self.commit, "siblings": files, "private": False, "tags": []}
            return 200, {"Content-Type": "application/json"}, json.dumps(about).encode(), None
        found = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not found:
            return 404, {}, b"", None
        repo, revision, name = found[1], found[2], unquote(found[3])
        error = self.refusal(repo, revision, token)
        if error:
            return error
        if name not in self.repositories[repo]:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.commit}, b"", None
        return self.file(self.repositories[repo][name], name, headers.get("Range"))

    def refusal(self, repo, revision, token):
        """What is wrong with a question about a repository."""
        if repo not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"", None
        if repo in self.gated and token != "good":
            return 401, {"X-Error-Code": "GatedRepo"}, b"", None
        if revision not in ("main", self.commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"", None
        return None

    def file(self, data, name, part):
        """A file, or what of it stands behind the beginning of a Range."""
        about = {"ETag": f'"{checksum(data)}"', "X-Repo-Commit": self.commit, "Accept-Ranges": "bytes"}
        if len(data) >= LARGE:
            about |= {"X-Linked-Etag": f'"{checksum(data)}"', "X-Linked-Size": str(len(data))}
        sent = bytes(255 - byte for byte in data) if name in self.damaged else data
        begin = int(re.fullmatch(r"bytes=(\d+)-", part)[1]) if part else 0
        if part:
            about["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        return 206 if part else 200, about, sent[begin:], self.cut.get(name)


@contextmanager
def serving(hub):
    """The address of a server that answers as `hub` does."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self):
            status, about, data, sent = hub.answer(self.command, self.path.partition("?")[0], self.headers)
            self.send_response(status)
            for key, value in {**about, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data[:sent])
                self.close_connection = sent is not None

        do_GET = do_HEAD = respond

        def log_message(self, *words):
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
