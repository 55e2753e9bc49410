"""Words of the page and of the screen that a person copies."""

import subprocess

import pytest

from rwkv_rlhf.reports.words import change, figure, pasted
from rwkv_rlhf.training.ending import saved_files


@pytest.mark.parametrize(
    "word", ["plain.pth", "with space", "it's", "a$b", "caf\udce9's \\ x.pth", "\u65e5\u672c.pth", "two\nlines"]
)
def test_a_command_to_paste_means_the_same_file(word):
    """If this breaks, the command that a finished run offers names a file that is not there."""
    said = subprocess.run(["bash", "-c", f"printf %s {pasted([word])}"], capture_output=True, check=True)
    assert said.stdout == word.encode(errors="surrogateescape") and pasted([word]).isprintable()


def test_nothing_is_less_than_nothing():
    """If this breaks, a run whose rewards are all 0 reports a loss of -0."""
    assert (figure(-0.0), change(-0.0, -1e-9), change(-0.004, 0.2)) == ("0", "0.0000 -> 0.0000", "0.00 -> 0.20")


def test_what_a_run_saved_is_named(tmp_path):
    """The newest numbered checkpoint beside best and final; a run that ended before its first save has none."""
    assert saved_files(tmp_path) == []
    for name in ("rwkv-2", "rwkv-10", "rwkv-final", "other"):
        (tmp_path / f"{name}.pth").write_bytes(b"12345")
    assert [[name, size] for name, _, size in saved_files(tmp_path)] == [["rwkv-final.pth", 5], ["rwkv-10.pth", 5]]
