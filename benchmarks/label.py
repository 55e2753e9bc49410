"""How long the page of `label.py` takes from a key to the next pair, whose answers were sampled ahead.

python benchmarks/label.py [--votes 20] [--tokens 24]

A random RWKV-7 (2 layers, width 64, World vocabulary) in fp32 and headless Chromium (/usr/bin/chromium, driven by
playwright). Measured in the page: from the key to the frame in which the next pair stands, the vote then on the disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"]


def measured(address: str, votes: int) -> list[float]:
    """Milliseconds of each vote."""
    from playwright.sync_api import sync_playwright

    found = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=QUIET)
        page = browser.new_page()
        page.goto(address)
        for _ in range(votes):
            page.wait_for_selector("[data-vote=left]:enabled", timeout=120000)
            page.evaluate("delete document.body.dataset.milliseconds")
            page.wait_for_timeout(500)  # a person reads, and the next answers are sampled
            page.keyboard.press("3")
            page.wait_for_selector("body[data-milliseconds]")
            found.append(float(page.evaluate("document.body.dataset.milliseconds")))
        browser.close()
    return found


def main() -> None:
    """Prints the median and the longest."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--votes", type=int, default=20)
    flags.add_argument("--tokens", type=int, default=24)
    asked = flags.parse_args()
    from rwkv_rlhf.checkpoints.tensor_files import write_tensors
    from rwkv_rlhf.model.initial import initial_tensors

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tensors(initial_tensors("x070", 2, 64, 65536, 32, seed=1), folder / "model.pth")
        lines = [json.dumps({"prompt": f"Name bird number {n}."}) for n in range(asked.votes + 1)]
        (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
        words = ["label.py", "--load_model", folder / "model.pth", "--prompt_file", folder / "prompts.jsonl"]
        words += [
            "--output",
            folder / "pairs.jsonl",
            "--port",
            0,
            "--max_tokens",
            asked.tokens,
            "--strategy",
            "cpu fp32",
        ]
        command = [sys.executable, *map(str, words)]
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            found = measured(server.stdout.readline().split()[1], asked.votes)
        finally:
            server.kill()
            server.wait()
    print(f"{len(found)} votes: median {statistics.median(found):.0f} ms, longest {max(found):.0f} ms")


if __name__ == "__main__":
    main()
