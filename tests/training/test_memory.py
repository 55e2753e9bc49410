"""What --dry_run says of memory is what a run takes: packed models are loaded one layer at a time."""

import re
import sys
from pathlib import Path

import pytest
import torch

from rwkv_rlhf.checkpoints.loading import BuildOptions, build_model
from rwkv_rlhf.commands import make_binidx, train
from rwkv_rlhf.layers.adapters import ADAPTERS
from rwkv_rlhf.model.initial import initial_tensors
from rwkv_rlhf.ops import elementwise as elementwise
from rwkv_rlhf.plan import make_plan
from rwkv_rlhf.settings.config import new_versions
from rwkv_rlhf.training.memory import block_bytes, state_bytes, weights_by_storage
from tests.support.choosing_page import HEAD, PAGE, TAIL, row
from tests.support.files import VOCAB
from tests.support.models import any_initial_tensors
from tests.support.processes import run_program

NUMBERS = {2: torch.bfloat16, 4: torch.float32}  # by their bytes


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Four blocks of 7 million parameters: large beside what an allocator wastes."""
    path = tmp_path_factory.mktemp("large") / "base.pth"
    tensors = initial_tensors("x070", 4, 768, 2048, 64, 1)
    for name, value in tensors.items():
        noise = 0.02 * torch.randn(value.shape) if value.dim() == 2 else 0.0
        tensors[name] = (value + noise).bfloat16()
    torch.save(tensors, path)
    return path


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("mode", "quant"), [("lora", "nf4"), ("pissa", "int8")])
@pytest.mark.slow
@pytest.mark.xdist_group("large_model")
def test_loading_takes_what_the_plan_says(large, mode, quant):
    """If this breaks, a model that fits in memory packed does not get there: its dense form was there first."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this kernel does not forget a peak")
    pytest.importorskip("bitsandbytes")
    peak, after, estimate, *weights = map(int, run_program("loading_peak", large, mode, quant, fresh=True).split())
    assert peak <= 1.1 * estimate, (peak, estimate)
    assert peak >= 0.8 * estimate, (peak, estimate)
    assert after <= 1.15 * sum(weights), (after, weights)
    dense = 2 * sum(tensor.numel() for tensor in torch.load(large, mmap=True, weights_only=True).values())
    assert mode == "pissa" or peak < dense


def test_the_dry_run_lists_weights_by_storage(script, base_model, vocab_file, text_jsonl, tmp_path):
    """If this breaks, a user cannot see what packing saves."""
    pytest.importorskip("bitsandbytes")
    words = ["--load_model", base_model, "--vocab_file", vocab_file, "--proj_dir", tmp_path, "--data_file", text_jsonl]
    words += ["--precision", "bf16"]
    status, out, err = script(train.main, *words, "--peft", "lora", "--quant_mode", "nf4", "--dry_run", 1)
    assert status == 0, err
    for part in ("weights nf4", "weights bf16", "weights fp32, training", "adapters", "optimizer", "while loading"):
        assert part in out


def test_the_dry_run_counts_what_a_step_runs(script, base_model, vocab_file, text_jsonl, pairs_csv, tmp_path):
    """If this breaks, a plan for slices of 32 tokens, for joined documents or for pairs is a plan for one document."""
    corpus = tmp_path / "corpus"
    lengths = ["--ctx_len", 32, "--micro_bsz", 2, "--epoch_steps", 4, "--epoch_count", 1, "--quant", 0]
    made = ["--input", text_jsonl, "--output", corpus, "--ctx_len", 32, "--vocab_size", VOCAB]
    assert script(make_binidx.main, *made, "--vocab_file", vocab_file)[0] == 0
    words = ["--load_model", base_model, "--vocab_file", vocab_file, "--proj_dir", tmp_path, "--dry_run", 1, *lengths]
    found = {}
    for name, more in {
        "slices": ["--data_file", corpus, "--data_type", "binidx"],
        "joined": ["--data_file", text_jsonl, "--infctx_dataset_multiplier", 20],
        "pairs": ["--simpo", 1, "--rlhf_train_file", pairs_csv],
    }.items():
        status, out, err = script(train.main, *words, *more)
        assert status == 0, err
        step = int(re.search(r"memory of a step over ([\d,]+) tokens", out)[1].replace(",", ""))
        found[name] = (step, int(re.search(r"about ([\d,]+) tokens", out)[1].replace(",", "")))
    assert found["slices"] == (64, 256)
    assert found["joined"][0] == 64 and 200 < found["joined"][1] <= 256
    step, whole = found["pairs"]
    assert step > 30 and 4 * 30 < whole < 4 * step  # both answers of two pairs, and their prompts


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "words",
    [
        "--precision fp32 --grad_cp 0 --infctx 1 --chunk_ctx 256",
        "--precision fp32 --grad_cp 1",
        "--precision bf16 --grad_cp 0 --peft lora --quant_mode nf4",
    ],
)
@pytest.mark.slow
def test_a_step_takes_what_the_plan_says(words):
    """If this breaks, a run that the plan promised to fit dies, or one that fits is never tried. Within 35%."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this kernel does not forget a peak")
    pytest.importorskip("bitsandbytes")
    always = "--my_testing x070 --sft 1 --load_model x --data_file x"
    peak, estimate = map(int, run_program("step_peak", *always.split(), *words.split(), fresh=True).split())
    assert 0.74 * peak <= estimate <= 1.35 * peak, (peak, estimate)


@pytest.mark.parametrize("quant", ["none", "nf4", "fp4", "int8", "fp8"])
@pytest.mark.parametrize("mode", ["full", *ADAPTERS])
def test_a_shape_weighs_what_the_model_of_that_shape_does(mode, quant):
    """If this breaks, --dry_run_shape promises room for a model that is larger. To the byte."""
    if quant in ("nf4", "fp4"):
        pytest.importorskip("bitsandbytes")
    tensors = initial_tensors("x070", 2, 96, 50, 32, 1)
    plan = make_plan(mode, 2, rank=3 if mode != "bone" else 32, lr_init=1.0, lr_final=1.0, layers="1")
    form = {"plan": plan, "quant": quant, "compute_dtype": torch.bfloat16}
    model, report = build_model(tensors, BuildOptions(**form))
    shape, planned = build_model(
        {name: tensor.to("meta") for name, tensor in tensors.items()}, BuildOptions(device="meta", **form)
    )
    assert weights_by_storage(shape) == weights_by_storage(model)
    assert (planned.trained, planned.frozen, planned.packed) == (report.trained, report.frozen, report.packed)
    assert state_bytes(shape) == state_bytes(model)


@pytest.mark.parametrize("version", [*new_versions(), "x070a"])
@pytest.mark.parametrize(("dropout", "twins", "width"), [(0.0, False, 4), (0.1, False, 4), (0.0, True, 2)])
def test_blocks_keep_what_the_plan_counts(monkeypatch, version, dropout, twins, width):
    """If this breaks, a kernel, its plain twin or a block keeps more of each token than the plan knows. Within 15%."""
    if twins:  # as on a GPU
        monkeypatch.setattr(elementwise, "backend_of", lambda *_: "naive")
    mode = "lora" if dropout or twins else "full"  # the casts of masters are counted apart
    plan = make_plan(mode, 2, rank=4, dropout=dropout, lr_init=1.0, lr_final=1.0)
    model, _ = build_model(any_initial_tensors(version, 2, 256, 64, 64, 1), BuildOptions(NUMBERS[width], plan=plan))
    model.train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(torch.zeros(1, 256, dtype=torch.int64), None, torch.tensor([0, 256]))
    found = sum(x.untyped_storage().nbytes() for x in kept.values()) / 256
    planned = sum(block_bytes(model, width, layer) for layer in range(2))
    assert planned == pytest.approx(found, rel=0.15)


@pytest.mark.slow
def test_a_shape_is_planned_without_any_file(script):
    """14 billion parameters in nf4 with LoRA: the plan says what 65,536 tokens take, and where the states wait."""
    words = ["--dry_run", 1, "--dry_run_shape", "L61-D4096:V65536", "--peft", "lora", "--quant", 1]
    words += ["--ctx_len", 65536, "--infctx", 1, "--chunk_ctx", 1024]
    status, out, err = script(train.main, *words)
    assert status == 0, err
    assert "61 layers of width 4096" in out and "states at 63 cuts" in out and "weights nf4" in out
    sums = [float(line.split()[-2].replace(",", "")) for line in out.splitlines() if line.startswith("in all")]
    assert 8192 < sums[0] < 24576
    status, out, err = script(train.main, *words, "--state_offload", 1)
    less, host = [float(line.split()[-2].replace(",", "")) for line in out.splitlines() if line.startswith("in all")]
    assert less == pytest.approx(sums[0] - 3903, abs=2) and host > 3900


@pytest.mark.parametrize(
    "shape", ["L0-D64", "61x4096", "L2-D100", "L2-D999999999", "L999999999-D64", "L2-D64:V99999999999999999999"]
)
def test_a_shape_that_cannot_be_is_refused(script, shape):
    """If this breaks, a typing error ends in a traceback."""
    status, _, err = script(train.main, "--dry_run", 1, "--dry_run_shape", shape)
    assert status == 2 and len(err.strip().splitlines()) == 1
    status, _, err = script(train.main, "--dry_run_shape", "L2-D64")
    assert status == 2 and "--dry_run 1" in err


@pytest.mark.parametrize("model", ["0.1B", "0.4B"])
def test_the_page_of_choices_is_the_plan(model):
    """If this breaks, docs/choosing.md is old: `python -m tests.support.choosing_page` writes it again."""
    page = PAGE.read_text(encoding="utf-8")
    assert row(model) in page and page.startswith(HEAD) and page.endswith(TAIL)
