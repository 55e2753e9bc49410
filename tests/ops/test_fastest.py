"""Which precision is taken where none was typed."""

import pytest

from rwkv_rlhf.ops import fastest
from rwkv_rlhf.ops.fastest import fastest_precision, kept_seconds, product_seconds
from rwkv_rlhf.settings.command_line import parse
from rwkv_rlhf.training.choices import with_precision


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(bf16, fp32): a processor whose products take so many seconds."""

    def with_times(bf16, fp32):
        monkeypatch.setattr(fastest, "cache_folder", lambda: tmp_path)
        (tmp_path / fastest.KEPT).unlink(missing_ok=True)
        kept_seconds({"bf16": bf16, "fp32": fp32}.__getitem__)

    return with_times


def test_a_cpu_that_is_slow_in_bf16_computes_in_fp32(machine, caplog):
    """If this breaks, a run without --precision takes thirty times as long, and nobody says why."""
    words = ["--load_model", "M", "--data_file", "D", "--accelerator", "cpu"]
    caplog.set_level("INFO")
    machine(0.9, 0.03)
    assert (fastest_precision("cpu"), with_precision(parse(words)).precision) == ("fp32", "fp32")
    assert with_precision(parse([*words, "--precision", "bf16"])).precision == "bf16"
    assert "as this machine is slow in bf16" in caplog.text and "30 times as long here" in caplog.text
    caplog.clear()
    machine(0.01, 0.03)
    assert with_precision(parse(words)).precision == "bf16"
    assert with_precision(parse([*words, "--precision", "fp32"])).precision == "fp32"
    assert not caplog.text


def test_products_are_timed_once(machine, tmp_path):
    """If this breaks, two starts of one run may compute in different precisions, and cannot go on with each other."""
    machine(2.0, 1.0)
    assert kept_seconds(pytest.fail) == {"bf16": 2.0, "fp32": 1.0}
    (tmp_path / fastest.KEPT).write_text("{")
    assert kept_seconds(lambda name: 3.0) == {"bf16": 3.0, "fp32": 3.0}
    assert 0 < product_seconds("fp32") < 10
