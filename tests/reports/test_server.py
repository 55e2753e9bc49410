"""The page of a run that is served while it trains."""

import json
import socket
import urllib.error
import urllib.request

import pytest

from rwkv_rlhf.reports.server import PageServer
from tests.support.chromium import chromium
from tests.support.run_folder import a_run


def test_a_page_that_follows_the_run(tmp_path):
    """If this breaks, who watches a run sees an old page, has to reload it, or gets an error in the browser."""
    with PageServer(tmp_path, 0) as server, chromium() as browser:
        page, said = browser.new_page(), []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(server.address)
        assert page.locator("h1").inner_text() == "The run is about to begin"
        a_run(tmp_path)
        page.evaluate("look()")
        page.get_by_text("step 120 of 240").wait_for(timeout=5000)
        assert page.locator("#curves svg").count() == 6
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"event": "train", "step": 121, "loss": 1.0}) + "\n")
        page.evaluate("look()")
        page.get_by_text("step 121 of 240").wait_for(timeout=5000)
        assert not said


def test_only_this_machine_reads_it(tmp_path):
    """If this breaks, a page on the internet reads somebody's prompts through a name that leads to 127.0.0.1."""
    a_run(tmp_path)
    with PageServer(tmp_path, 0) as server:
        with urllib.request.urlopen(server.address) as answer:
            assert (
                b'data-live="1"' in answer.read() and "default-src 'none'" in answer.headers["Content-Security-Policy"]
            )
        for path, host, status in (("", "evil.example:80", 403), ("../run.json", "127.0.0.1:80", 404)):
            request = urllib.request.Request(server.address + path, headers={"Host": host})
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request)
            assert refused.value.code == status


def test_an_occupied_port(tmp_path):
    """If this breaks, a run ends with a traceback after its model was loaded, or serves nothing without a word."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"\{{serve_report\}} {port}: .*in use.*; give another port"):
            PageServer(tmp_path, port)
