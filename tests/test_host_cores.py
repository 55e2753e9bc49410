"""How many threads a run takes in a container, and what is said of a number that somebody typed."""

import os

import pytest

from rwkv_rlhf.host_cores import host_cores, odd_threads
from rwkv_rlhf.settings.surroundings import take_over, threads_typed

BOUND = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, BOUND),
        ({"cpu.max": "max 100000"}, BOUND),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu.max": f"{BOUND * 100000 + 1} 100000"}, BOUND),
        ({"cpu.max": "no numbers"}, BOUND),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, BOUND),
        ({"cpu/cpu.cfs_quota_us": "60000", "cpu/cpu.cfs_period_us": "100000"}, 1),
    ],
)
def test_a_container_has_its_share(tmp_path, files, cores):
    """If this breaks, sixty threads fight for the half core of a container."""
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    assert host_cores(tmp_path) == cores


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("", ""),
        ("1", ""),
        ("4", ""),
        ("0", "is no number"),
        ("-3", "is no number"),
        ("x", "is no number"),
        ("999", "on 4"),
    ],
)
def test_a_typed_number_of_threads(asked, said):
    """If this breaks, a run that is a hundred times slower than it could be does not say why."""
    found = odd_threads(asked, 4)
    assert said in found and bool(found) == bool(said)


def test_threads_sleep_while_they_wait_unless_told_otherwise(monkeypatch):
    """If this breaks, a run beside another program takes seven times as long."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MPLBACKEND", "agg")
    take_over()
    assert os.environ["OMP_WAIT_POLICY"] == "passive" and not threads_typed()
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("OMP_NUM_THREADS", str(BOUND + 1))
    take_over()
    assert os.environ["OMP_WAIT_POLICY"] == "active" and threads_typed()
