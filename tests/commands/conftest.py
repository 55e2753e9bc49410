"""What whole runs share."""

import pytest

from rwkv_rlhf.commands import train


@pytest.fixture
def typed(base_model, vocab_file, tmp_path):
    """One step into tmp_path/out; a file that needs more has words of its own."""
    return [
        *("--load_model", base_model, "--vocab_file", vocab_file, "--proj_dir", tmp_path / "out"),
        *("--precision", "fp32", "--quant", 0, "--epoch_steps", 1, "--epoch_count", 1),
    ]


@pytest.fixture
def refused(script, tmp_path):
    """refused(words, *said): status 2, one sentence on stderr that holds all of `said`, inputs untouched."""

    def check(words, *said, main=train.main):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        status, _, err = script(main, *words)
        assert status == 2, err
        sentence = err.strip().splitlines()[-1]
        assert sentence.startswith("error: ") and "Traceback" not in err
        for part in said:
            assert str(part) in sentence, sentence
        for path, content in before.items():
            assert path.read_bytes() == content, path
        assert not [path for path in tmp_path.rglob("rwkv-*") if path not in before]

    return check
