"""Kernels are compiled on first use; whatever goes wrong there must end in a slower run, not in a crash or a hang."""

import fcntl
import logging
import os
import time

import pytest
import torch

from rwkv_rlhf.ops import backend, backends, build, cpu
from rwkv_rlhf.ops.wkv7 import wkv7

EXPORTED = 'extern "C" __attribute__((visibility("default"))) int answer()'
GOOD = EXPORTED + " { return 42; }\n"
BROKEN = "int main() { return undeclared_name; }\n"


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A private source folder and a private cache; forgets what was decided about failed builds."""
    folder = tmp_path / "cpu"
    folder.mkdir()
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(build, "SOURCES", folder)
    monkeypatch.setattr(build, "cache_folder", lambda: cache)
    backend.build_failure.cache_clear()
    yield folder
    backend.build_failure.cache_clear()


def recipe(name="good"):
    return build.host_recipe(name, "DEFAULT")


def small_inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 3, 1, 32, generator=generator).mul(0.3).to(dtype) for _ in range(6)]


def test_failed_build_runs_as_plain_pytorch_with_one_warning(sources, caplog):
    """If this breaks, a broken compiler ends a run, fills the log, or slows it down without a word."""
    (sources / "wkv7.cpp").write_text(BROKEN)
    inputs = small_inputs()
    with caplog.at_level(logging.WARNING):
        y, state = wkv7(*inputs)
        wkv7(*inputs)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "error" in warnings[0] and "undeclared_name" in warnings[0] and "\n" not in warnings[0]
    expected_y, expected_state = wkv7(*inputs, backend="naive")
    assert torch.equal(y, expected_y) and torch.equal(state, expected_state)


def test_forced_kernel_that_cannot_be_built_is_an_error_with_the_reason(sources):
    """If this breaks, --wkv_backend cpu runs as something else."""
    (sources / "wkv7.cpp").write_text(BROKEN)
    with pytest.raises(ValueError, match="undeclared_name"):
        wkv7(*small_inputs(), backend="cpu")


def test_a_compiler_that_does_not_know_the_matrix_unit_makes_the_other_kernel(sources, monkeypatch, tmp_path):
    """If this breaks, a new processor with an older compiler (GCC 10) runs plain PyTorch, fifty times as slow."""
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\ncase "$*" in *-mamx*) echo "error: unrecognized option -mamx-tile" >&2; exit 1;; esac\n')
    old.write_text(old.read_text() + f'exec {os.environ.get("CXX", "c++")} "$@"\n')
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    monkeypatch.setattr(cpu, "instruction_set", lambda: "AMX")
    monkeypatch.setitem(build.ISA_FLAGS, "AVX512", ())  # that this processor can run it
    (sources / "good.cpp").write_text(GOOD + "// __AMX_BF16__\n")
    assert cpu.library("good").answer() == 42


def test_missing_compiler_is_named(sources, monkeypatch):
    """If this breaks, a user does not hear what to install."""
    (sources / "good.cpp").write_text(GOOD)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no-such-compiler"):
        cpu.library("good")


def test_second_process_reuses_the_binary_and_a_changed_source_does_not(sources):
    """If this breaks, every start compiles, or an old kernel runs after an update."""
    (sources / "good.cpp").write_text(GOOD)
    first = build.binary(recipe())
    stamp = first.stat().st_mtime_ns
    assert build.binary(recipe()) == first and first.stat().st_mtime_ns == stamp
    (sources / "good.cpp").write_text(GOOD.replace("42", "43"))
    assert build.binary(recipe()) != first


def test_a_run_compiles_side_by_side_what_it_needs(sources, caplog):
    """If this breaks, a first run waits for one kernel after the other, and for head sizes that it does not have."""
    (sources / "good.cpp").write_text(GOOD)
    (sources / "sized.cpp").write_text(EXPORTED + " { return RWKV_HEAD_SIZE; }\n")
    (sources / "bad.cpp").write_text(BROKEN)
    wanted = [("good", 0), ("sized", 64), ("bad", 0)]
    with caplog.at_level(logging.INFO):
        backends.prepare(wanted, torch.device("cpu"), torch.float32)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and "3 kernels" in told[0] and "good" in told[0] and "sized" in told[0]
    caplog.clear()
    assert cpu.library("good").answer() == 42 and cpu.library("sized", 64).answer() == 64
    assert not caplog.records  # both were there
    with pytest.raises(build.BuildError, match="undeclared_name"):
        cpu.library("bad")


def test_lock_left_by_a_dead_process_does_not_stop_the_build(sources):
    """If this breaks, a killed run keeps every later one waiting."""
    (sources / "good.cpp").write_text(GOOD)
    binary = build.binary(recipe())
    binary.unlink()
    (binary.parent / "lock").write_text("left behind")
    began = time.monotonic()
    assert build.binary(recipe()).is_file()
    assert time.monotonic() - began < 30


def test_lock_held_for_too_long_is_ignored(sources, monkeypatch):
    """If this breaks, a process that hangs keeps every other one waiting."""
    (sources / "good.cpp").write_text(GOOD)
    monkeypatch.setattr(build, "LOCK_PATIENCE", 0.2)
    binary = build.binary(recipe())
    binary.unlink()
    with open(binary.parent / "lock", "w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert build.binary(recipe()).is_file()


@pytest.mark.parametrize("patience", [0.0, 60.0])
def test_two_processes_that_build_at_once_end_with_one_binary(sources, monkeypatch, patience):
    """If this breaks, two runs that start together load half a kernel, or one of them fails; with and without locks."""
    (sources / "good.cpp").write_text(GOOD)
    monkeypatch.setattr(build, "LOCK_PATIENCE", patience)
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if build.binary(recipe()).is_file() else 2
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    binary = build.binary(recipe())
    assert sorted(path.name for path in binary.parent.iterdir()) == sorted(["lock", binary.name])


def test_damaged_binary_is_rebuilt(sources):
    """If this breaks, a kernel that was cut off by a full disk crashes every later run."""
    (sources / "good.cpp").write_text(GOOD)
    binary = build.binary(build.host_recipe("good", cpu.instruction_set()))
    binary.write_bytes(binary.read_bytes()[:200])
    cpu.library("good")
    assert binary.stat().st_size > 200


def test_full_disk_is_a_readable_error(sources, monkeypatch):
    """If this breaks, a full disk is a traceback of the compiler's caller."""
    (sources / "good.cpp").write_text(GOOD)

    def no_room(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "_compile", no_room)
    with pytest.raises(build.BuildError, match="No space left"):
        cpu.library("good")


def test_read_only_cache_folder_has_a_private_substitute(monkeypatch, tmp_path):
    """If this breaks, a user without a writable home cannot use kernels, or loads those of another user."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no-such-folder")
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = build.cache_folder()
    assert folder.parent == tmp_path and folder.stat().st_uid == os.getuid()


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("In file included\na.cpp:3:1: error: no such thing\nmore", "a.cpp:3:1: error: no such thing"),
        ("sh: 1: c++: not found", "sh: 1: c++: not found"),
        ("", "the compiler failed without a message"),
    ],
)
def test_first_error_line_of_a_compiler(output, line):
    """If this breaks, a warning shows pages of a compiler's output, or not the line that matters."""
    assert build.first_error(output) == line


def test_choice_of_backend_says_why_others_were_refused():
    """If this breaks, a slow run does not say why it is slow."""
    cpu, shape = torch.device("cpu"), (1, 8, 2, 64)
    name, reason = backends.choose("wkv7", cpu, torch.float64, shape)
    assert name == "naive" and "float64" in reason
    name, reason = backends.choose("wkv7", cpu, torch.float32, (1, 8, 2, 48))
    assert name == "naive" and "48" in reason
    name, reason = backends.choose("wkv7", torch.device("cuda"), torch.float32, shape)
    assert name == "naive" and "cuda" in reason
    with pytest.raises(ValueError, match="float64"):
        backends.choose("wkv7", cpu, torch.float64, shape, "cpu")
    with pytest.raises(ValueError, match="naive"):
        backends.choose("wkv7", cpu, torch.float32, shape, "fastest")


AMX, AVX512 = cpu.CPU_FLAGS["AMX"], cpu.CPU_FLAGS["AVX512"]


@pytest.mark.parametrize(
    ("flags", "granted", "used_by_torch", "chosen"),
    [
        (AMX, True, "AVX512", "AMX"),
        (AMX, False, "AVX512", "AVX512"),  # a container that forbids to ask
        (AMX - {"amx_bf16"}, True, "AVX512", "AVX512"),
        (AMX - {"avx512_bf16"}, True, "AVX512", "AVX512"),
        (AMX, True, "AVX2", "AVX2"),  # ATEN_CPU_CAPABILITY
        (AMX, True, "DEFAULT", "DEFAULT"),
        (None, True, "AVX512", "AVX512"),  # a system that does not say
        (AVX512 - {"avx512bw"}, True, "AVX512", "AVX2"),
        (AVX512 - {"fma"}, True, "AVX512", "DEFAULT"),
    ],
)
def test_a_processor_is_given_no_instructions_that_it_lacks(flags, granted, used_by_torch, chosen, monkeypatch):
    """If this breaks, a run ends with "illegal instruction"."""
    monkeypatch.setattr(build, "instruction_sets", lambda: list(build.ISA_FLAGS))
    monkeypatch.setattr(cpu, "processor_flags", lambda: flags)
    monkeypatch.setattr(cpu, "_tiles_granted", lambda: granted)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: used_by_torch)
    assert cpu.instruction_set() == chosen


def test_only_kernels_that_use_the_matrix_unit_are_compiled_for_it():
    """Else a wheel carries every kernel once more, and a first run compiles for nothing."""
    sets = {name: build.set_used(name, "AMX") for name in build.host_kernels()}
    assert {name for name, isa in sets.items() if isa == "AMX"} == {"products", "decode"}
    assert build.packaged_path("wkv7", "AMX") == build.packaged_path("wkv7", "AVX512")
    assert build.packaged_path("products", "AMX") != build.packaged_path("products", "AVX512")
    assert all(build.set_used("products", isa) == isa for isa in build.ISA_FLAGS)
