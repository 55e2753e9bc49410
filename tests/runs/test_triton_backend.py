"""Training through the Triton kernels on a CPU, in Triton's interpreter: slow, but anyone can check them so."""

import json

import pytest

from rwkv_rlhf.commands import train
from tests.support.files import read_jsonl

pytest.importorskip("triton", reason="Triton is not installed")

import triton

if not triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1 was not set before Triton was imported", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
CHUNKS = ("--infctx", 1, "--chunk_ctx", 16)


@pytest.fixture
def words(base_of, vocab_file, tmp_path):
    """words(version): two steps on short documents in float32."""
    documents = tmp_path / "text.jsonl"
    documents.write_text("".join(json.dumps({"text": f"line {n}: " + "abc " * (n % 4)}) + "\n" for n in range(8)))

    def of(version):
        return [
            *("--load_model", base_of(version), "--vocab_file", vocab_file, "--ctx_len", 32, "--random_seed", 3),
            *("--sft", 1, "--data_file", documents, "--micro_bsz", 2, "--epoch_steps", 2, "--epoch_count", 1),
            *("--precision", "fp32", "--quant", 0, "--grad_cp", 0, "--accelerator", "cpu", "--lr_init", "1e-3"),
        ]

    return of


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("version", "more"),
    [
        *(pytest.param(version, (), id=f"{version}-whole") for version in ("x052", "x060")),
        *(pytest.param(version, CHUNKS, id=f"{version}-chunks") for version in ("x040", "x070")),  # one a kernel's kind
    ],
)
def test_two_steps_are_those_of_the_cpu_kernels(script, words, tmp_path, version, more):
    """Losses and gradient norms to 1e-4, also with states carried over chunks and gradients back through them."""
    found = {}
    for backend in ("cpu", "triton"):
        folder = tmp_path / backend
        status, _, err = script(train.main, *words(version), "--proj_dir", folder, "--wkv_backend", backend, *more)
        assert status == 0, err
        found[backend] = [(step["loss"], step["grad_norm"]) for step in read_jsonl(folder / "metrics.jsonl", "train")]
    assert len(found["cpu"]) == 2 and all(norm > 0 for _, norm in found["cpu"])
    for mine, theirs in zip(found["triton"], found["cpu"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_without_the_interpreter_a_cpu_is_one_sentence(script, words, tmp_path, monkeypatch):
    """If this breaks, --wkv_backend triton on a CPU is a traceback of Triton."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    run = (*words("x070"), "--proj_dir", tmp_path / "out", "--wkv_backend", "triton")
    status, _, err = script(train.main, *run)
    assert status == 2 and "TRITON_INTERPRET=1" in err and "Traceback" not in err
