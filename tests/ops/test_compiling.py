"""What `--compile 1` needs of a machine."""

import re

import pytest
import torch

from rwkv_rlhf.ops import compiling


@pytest.mark.parametrize(
    ("platform", "device", "found", "said"),
    [
        ("linux", "cpu", {"g++"}, None),
        ("linux", "cpu", set(), "needs a C.. compiler on a CPU, and 'g..' was not found"),
        ("win32", "cpu", {"g++"}, "this is Windows"),
        ("linux", "cuda", {"gcc"}, "needs Triton on a GPU"),
        ("linux", "mps", {"gcc"}, "was not tried on mps"),
    ],
)
def test_what_is_missing_is_named_before_the_model_is_loaded(monkeypatch, platform, device, found, said):
    """If this breaks, a run loads its model and ends in a hundred lines of PyTorch's."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiling.sys, "platform", platform)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: name if name in found else None)
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    refusal = compiling.refusal(torch.device(device))
    assert refusal is None if said is None else re.search(said, refusal)
