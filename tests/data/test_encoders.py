"""Tokenising in several processes: what is written may not depend on how many there are."""

import json
import multiprocessing
import os
import signal

import numpy as np
import pytest

from rwkv_rlhf.commands import make_binidx, sft_h5
from rwkv_rlhf.data.encoders import WORTH, Encoders, Job, workers_for
from rwkv_rlhf.data.templates.template import TEMPLATES
from rwkv_rlhf.data.tokenizer import load_tokenizer
from tests.support.files import VOCAB


@pytest.fixture
def tokenizer(vocab_file):
    """The bytes as a vocabulary, from a file that other processes read too."""
    return load_tokenizer(VOCAB, str(vocab_file))


def test_processes_give_the_bytes_of_one(script, vocab_file, tmp_path):
    """If this breaks, a corpus depends on the machine that made it: order, draws of templates, masks, skipped rows."""
    texts, chats = tmp_path / "texts.jsonl", tmp_path / "chats.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{n} " * (n % 7) + "!"}) + "\n" for n in range(300)))
    said = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": [*said, *(said if n % 3 else said[:1])]} for n in range(40)]
    chats.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "plain"}, {"messages": 3}]))
    found = []
    for workers in (1, 2):
        common = ["--vocab_file", vocab_file, "--vocab_size", VOCAB, "--workers", workers, "--skip_bad", 1]
        prefix, h5 = tmp_path / f"corpus{workers}", tmp_path / f"sft{workers}.h5"
        status, _, err = script(make_binidx.main, "--input", f"{texts}:2", "--output", prefix, *common)
        assert status == 0, err
        words = ["--input_folder", chats, "--output_parquet", h5, "--template", "mixed", *common]
        status, _, err = script(sft_h5.main, *words)
        assert status == 0, err
        found.append(
            [(tmp_path / f"corpus{workers}{end}").read_bytes() for end in (".bin", ".idx")] + [h5.read_bytes()]
        )
    assert found[0] == found[1]


def test_the_first_error_is_the_one_of_a_single_process(tokenizer, vocab_file):
    """If this breaks, a later mistake of the file hides an earlier one, and what came before it is lost."""

    def jobs():
        yield from ((n, Job((f"{n}",), TEMPLATES["world"][0].template)) for n in range(5))
        raise ValueError("row 6: broken")

    for workers in (1, 2):
        seen = []
        with (
            Encoders(tokenizer, vocab_file=str(vocab_file), workers=workers) as encoders,
            pytest.raises(ValueError, match="row 6: broken"),
        ):
            for number, found in encoders.map(jobs()):
                assert found.ids[0].tolist() == tokenizer.encode(f"{number}")
                seen.append(number)
        assert seen == list(range(5))


def test_a_killed_process_is_one_sentence(tokenizer, vocab_file):
    """If this breaks, a machine out of memory leaves a traceback, or a corpus that lacks documents."""

    def jobs():
        yield 0, Job(("first",))
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        yield from ((n, Job(("x" * 300_000,))) for n in range(1, 9))

    with (
        Encoders(tokenizer, vocab_file=str(vocab_file), workers=2) as encoders,
        pytest.raises(ValueError, match=r"a process that tokenises was ended from outside.*--workers 1"),
    ):
        # the first batch starts the processes, the next ones meet their end
        list(encoders.map((n, Job(("y" * 300_000,))) for n in range(2)))
        list(encoders.map(jobs()))


def test_small_files_are_tokenised_here(tmp_path):
    """If this breaks, ten rows wait for processes to start; or --workers is not obeyed."""
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    small.write_bytes(b"{}\n")
    large.write_bytes(np.zeros(WORTH, np.uint8).tobytes())
    assert workers_for(small) == 1 and workers_for(small, 3) == 3 and workers_for(large) >= 1
    with pytest.raises(ValueError, match="--workers -1: must be 1 or more"):
        workers_for(small, -1)
