"""Two machines, as two network namespaces of this one, each with an address of its own and nothing else in common but
the disk."""

import os
import shutil
import subprocess
import sys

import pytest

from rwkv_rlhf.commands import train
from tests.support.files import read_jsonl
from tests.support.processes import started
from tests.support.rank_cases import case, shared_words

pytestmark = [pytest.mark.slow, pytest.mark.timeout(390)]

NAMES = [f"rwkv{os.getpid() % 10000}{side}" for side in "ab"]
ADDRESSES = ("10.77.31.1", "10.77.31.2")


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def machines():
    """Names of two network namespaces that a cable connects; skips where they cannot be made."""
    if shutil.which("ip") is None:
        pytest.skip("no ip command here: two machines cannot be made of one")
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", f"v{NAMES[0]}", "netns", NAMES[0], "type", "veth", "peer", f"v{NAMES[1]}", "netns", NAMES[1])
        for name, address in zip(NAMES, ADDRESSES):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"v{name}")
            ip("-n", name, "link", "set", f"v{name}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield NAMES
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.decode().strip()}")
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_two_machines_train_as_one(machines, base_model, vocab_file, text_jsonl, pairs_csv, tmp_path):
    """If this breaks, --num_nodes 2 does not find the other machine, or learns something else than one process."""
    words = [*shared_words(base_model, vocab_file), "--proj_dir", tmp_path / "two", "--num_nodes", 2]
    words += case(text_jsonl, pairs_csv, "sft")(2)
    processes = [
        started(
            *("netns", "exec", name, sys.executable, "train.py", *words),
            program=("ip",),
            NODE_RANK=node,
            MASTER_ADDR=ADDRESSES[0],
            MASTER_PORT=29533,
        )
        for node, name in enumerate(machines)
    ]
    one = [
        *shared_words(base_model, vocab_file),
        *case(text_jsonl, pairs_csv, "sft")(1),
        "--proj_dir",
        tmp_path / "one",
    ]
    train.main([str(word) for word in one])
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], [text[-2000:] for text in errors]
    single, double = (read_jsonl(tmp_path / name / "metrics.jsonl", "train") for name in ("one", "two"))
    assert [r["loss"] for r in double] == pytest.approx([r["loss"] for r in single], rel=1e-5)
