"""`--doctor 1`: what a user learns of the machine, and that a wrong kernel is named and ends with a status."""

import fcntl
import re

import pytest

from rwkv_rlhf.commands import doctor as module
from rwkv_rlhf.commands.doctor import DISAGREEMENT, doctor
from rwkv_rlhf.ops import build, check, cpu, recurrence
from rwkv_rlhf.ops.backend import RECURRENCES, build_failure


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Few tokens: what is judged here is the judge."""
    monkeypatch.setattr(check, "SHAPE", (1, 9, 1, 32))
    monkeypatch.setattr(check, "TIMED", {"cpu": ((1, 5, 1, 32),)})
    monkeypatch.setattr(check, "REPEATS", 1)
    build_failure.cache_clear()
    yield
    build_failure.cache_clear()
    cpu._library.cache_clear()


def test_every_compiled_kernel_is_compared(capsys):
    """If this breaks, the doctor calls a machine healthy without having looked at every kernel."""
    try:
        build.compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    assert doctor() is None
    said = capsys.readouterr().out
    for name in (*RECURRENCES, *check.POINTWISE, "logprob", "few rows", "many rows"):
        assert said.count(f"  {name} ") == (4 if name in RECURRENCES else 2), name  # judged and timed, in two dtypes
    assert len(re.findall(r"  wkv7 cpu +cpu +(?:fp32|bf16)  1 x 5 x 1 x 32 +[\d.]+ ms +[\d.]+ GB/s", said)) == 2
    half = "cpu fp16: cpu for wkv4 wkv5 wkv6 wkv7, naive for elementwise logprob products"
    assert f"  auto uses cpu fp32: cpu; cpu bf16: cpu; {half}\n" in said
    assert f"CPU kernels for {cpu.instruction_set()} compiled on this machine" in said  # a clone brings none
    assert "NOT RIGHT" not in said and "every kernel that can run here agrees" in said


class Wrong:
    """A kernel whose gradients are off by a thousandth."""

    def __init__(self, real):
        self.real = real

    def forward(self, *arguments):
        return self.real.forward(*arguments)

    def backward(self, *arguments):
        return [grad * 1.001 for grad in self.real.backward(*arguments)]


def test_a_wrong_gradient_ends_with_a_status(monkeypatch, capsys):
    """If this breaks, a user trains for a week on a kernel that this machine's compiler got wrong."""
    real = recurrence.kernel
    wrong = lambda op, *rest: Wrong(real(op, *rest)) if op == "wkv6" else real(op, *rest)  # noqa: E731
    monkeypatch.setattr(recurrence, "kernel", wrong)
    assert doctor() == DISAGREEMENT
    assert "NOT RIGHT: wkv6 (cpu, fp32)" in capsys.readouterr().out


def test_a_missing_compiler_is_explained(monkeypatch, capsys):
    """If this breaks, a slow run on a machine without a compiler stays a riddle."""

    def missing(*_):
        raise build.BuildError("no C++ compiler: 'c++' was not found (install g++ or clang++, or set CXX)")

    monkeypatch.setattr(build, "compiler", missing)
    cpu._library.cache_clear()
    assert doctor() is None
    said = capsys.readouterr().out
    assert "install g++ or clang++" in said and "plain PyTorch, 50 times slower" in said
    assert "wkv6, wkv7" in said and "the cpu kernel does not run: no C++ compiler" in said
    assert "no compiled kernel can run here" in said


def test_a_lock_that_is_held_is_shown(monkeypatch, capsys, tmp_path):
    """A lock file whose owner is dead says nothing; one that is held is named."""
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path)
    for name in ("dead", "alive"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    with open(tmp_path / "alive" / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lines = dict(module.cache())
    assert str(tmp_path / "alive" / "lock") in lines["lock"] and "dead" not in lines["lock"]


def test_a_toolkit_outside_of_the_path_is_found(monkeypatch, tmp_path):
    """If this breaks, the doctor misses the very nvcc that the kernels are compiled with."""
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 99.9'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr("torch.version.cuda", "99.9")  # a PyTorch for processors looks for none
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))
    assert dict(module.compilers())["nvcc"] == f"Cuda compilation tools, release 99.9 ({nvcc})"
