"""The program on a pretend GPU: no operation on tensors of two devices, no wait of the host outside of the table."""

import itertools
import math

import pytest
import torch

from rwkv_rlhf.commands import train
from rwkv_rlhf.losses import LOSSES
from rwkv_rlhf.settings import tables
from tests.support.allowed_waits import BESIDE, IN_A_ROLLOUT, IN_A_STEP, IN_A_TOKEN
from tests.support.files import read_jsonl
from tests.support.pretend_gpu import cases
from tests.support.pretend_gpu.process import PretendProcess
from tests.support.source_files import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("pretend_gpu")]

STORAGES = (tables.DENSE, *tables.STORAGES)
# every version, adapter and storage at least once
MODELS = [
    (version, *of_both)
    for version, *of_both in zip(tables.VERSIONS, itertools.cycle(tables.ADAPTERS), itertools.cycle(STORAGES))
]
DATA = {"text": "--data_file", "pairs": "--rlhf_train_file", "rated": "--rlhf_train_file"}
REWARDS = f"{ROOT}/tests/support/rewards.py:odd,short"
ROLLOUTS = {
    "grpo": ("--grpo_gen_count", 2, "--grpo_gen_length", 3, "--grpo_passes", 2),
    "ppo": ("--batch_size", 2, "--output_max_length", 3, "--ppo_epochs", 1, "--epoch_steps", 3),
}
NOTHING: dict[str, str] = {}
ADAPTED = ("--peft", "lora", "--lora_r", 4, "--quant", 0)


@pytest.fixture(scope="module")
def gpu():
    """gpu(function of cases, *arguments) gives what it gives in a process that has a pretend GPU."""
    process = PretendProcess()
    yield process
    process.close()


@pytest.fixture
def typed(base_model, vocab_file, tmp_path):
    """Two optimizer steps in float32."""
    return [
        *(
            "--load_model",
            base_model,
            "--vocab_file",
            vocab_file,
            "--proj_dir",
            tmp_path / "out",
            "--precision",
            "fp32",
        ),
        *("--epoch_steps", 2, "--epoch_count", 1, "--ctx_len", 64, "--micro_bsz", 1, "--enable_progress_bar", 0),
    ]


def known(waits, rollout=NOTHING):
    """Fails with each place that is in no table."""
    found = {wait.place: wait for wait in waits}
    strange = found.keys() - BESIDE.keys() - IN_A_STEP.keys() - rollout.keys()
    assert not strange, [found[place] for place in sorted(strange)]


def waits_once(ran):
    """Every step waits where the table says, once."""
    known(ran.all)
    for step in ran.steps:
        assert [wait.place for wait in step] == list(IN_A_STEP), step


def test_what_a_gpu_would_do_is_seen(gpu):
    """If this breaks, the tests below see nothing: mixed devices pass, waits are not counted, copies come too early."""
    assert "aten.add.Tensor of cuda and cpu tensors [(2,)]" in gpu(cases.mixed)
    early, late, reasons = gpu(cases.unread)
    assert math.isnan(early) and late == 3.0
    assert reasons == [
        *("an event is waited for", "a number is read", "places are counted", "numbers are read"),
        *["a copy to the device that is waited for"] * 2,
        "a copy to the host",
    ]


@pytest.mark.parametrize(("version", "adapter", "storage"), MODELS)
def test_every_model_waits_once_a_step_and_learns_as_on_a_cpu(
    gpu, script, typed, base_of, text_jsonl, tmp_path, version, adapter, storage
):
    """If this breaks, a user's GPU stands still in each step, or learns something else than the CPU does."""
    quant = ("--quant", 0) if storage == tables.DENSE else ("--quant", 1, "--quant_mode", storage)
    words = [*typed, "--load_model", base_of(version), "--sft", 1, "--data_file", text_jsonl]
    words += ["--peft", adapter, "--lora_r", 4, *quant]
    waits_once(gpu(cases.run, words))
    status, _, err = script(train.main, *words, "--proj_dir", tmp_path / "cpu")
    assert status == 0, err
    here, there = (read_jsonl(tmp_path / name / "metrics.jsonl", "train") for name in ("cpu", "out"))
    for name in ("loss", "grad_norm"):
        assert [r[name] for r in there] == pytest.approx([r[name] for r in here], rel=1e-3)


@pytest.mark.parametrize("loss", [name for name in LOSSES if tables.LOSSES[name].data in DATA and name != "sft"])
def test_every_loss_waits_once_a_step(gpu, typed, base_model, text_jsonl, pairs_csv, loss):
    """If this breaks, a loss asks a GPU for a number, or has tensors on two devices: prompts are forked, too."""
    facts = tables.LOSSES[loss]
    words = [*typed, f"--{loss}", 1, DATA[facts.data], text_jsonl if facts.data == "text" else pairs_csv, *ADAPTED]
    words += ["--teacher_model", base_model, "--top_k", 5] if facts.teacher else []
    waits_once(gpu(cases.run, words))


@pytest.mark.parametrize("loss", ROLLOUTS)
def test_a_rollout_waits_once_a_token_and_its_steps_once(gpu, typed, pairs_csv, loss):
    """If this breaks, a GPU stands still for each number of a rollout, or the head of values lies beside it."""
    words = [*typed, f"--{loss}", 1, "--rlhf_train_file", pairs_csv, "--reward_funcs", REWARDS, *ADAPTED]
    ran = gpu(cases.run, [*words, *ROLLOUTS[loss]])
    known(ran.all, {**IN_A_TOKEN, **IN_A_ROLLOUT})
    *before, last = ([wait.place for wait in step] for step in ran.steps)
    if loss == "ppo":  # the last step begins with a rollout: three tokens, three numbers of two micro-batches
        assert before == [list(IN_A_STEP)]
        assert last == [*list(IN_A_TOKEN) * 3, *list(IN_A_ROLLOUT) * 6, *IN_A_STEP]
    else:  # the second pass over a rollout
        assert last == list(IN_A_STEP) and not before


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_infinite_context_waits_once_a_step(gpu, typed, text_jsonl, pairs_csv, loss):
    """325 waits a step made a GPU stand still; boundary states go to the host and back without any."""
    data = ("--data_file", text_jsonl) if loss == "sft" else ("--rlhf_train_file", pairs_csv)
    words = [*typed, f"--{loss}", 1, *data, *ADAPTED, "--infctx", 1, "--chunk_ctx", 24, "--state_offload", 1]
    waits_once(gpu(cases.run, words))


def test_other_ways_of_a_step_wait_once(gpu, typed, text_jsonl):
    """Micro-batches, dropout, recomputed blocks: none may ask between the ends of two optimizer steps."""
    words = [*typed, "--sft", 1, "--data_file", text_jsonl, *ADAPTED, "--lora_dropout", 0.1, "--grad_cp", 1]
    ran = gpu(cases.run, [*words, "--accumulate_grad_batches", 2, "--epoch_steps", 4])
    assert len(ran.steps) == 1
    waits_once(ran)


def test_a_step_that_is_not_a_number_is_left_out_on_the_device(gpu, typed, text_jsonl, tmp_path):
    """The host learns of it when the update is queued: the weights must stay, the batch is kept, the run goes on."""
    words = [*typed, "--sft", 1, "--data_file", text_jsonl, *ADAPTED, "--epoch_steps", 3]
    known(gpu(cases.run, words, 1).all)
    folder = tmp_path / "out"
    records = read_jsonl(folder / "metrics.jsonl", "train")
    assert [r["step"] for r in records] == [1, 3] and all(math.isfinite(r["loss"]) for r in records)
    assert [path.name for path in folder.glob("bad-step-*")] == ["bad-step-1-1.pth"]
    left = torch.load(folder / "rwkv-final.pth", weights_only=True)
    assert left and all(x.isfinite().all() for x in left.values())


def test_held_out_resumed_and_merged(gpu, typed, pairs_csv, base_model, tmp_path):
    """Validation, resume points, going on from one, merging on the device: only the table's waits, nothing mixed."""
    words = [*typed, "--dpo", 1, "--rlhf_train_file", pairs_csv, "--val_file", pairs_csv, *ADAPTED, "--resume_every", 1]
    known(gpu(cases.run, words).all, IN_A_TOKEN)  # fixed prompts are answered
    known(gpu(cases.run, [*words, "--epoch_count", 2, "--resume", "auto"]).all, IN_A_TOKEN)
    folder = tmp_path / "out"
    assert [r["step"] for r in read_jsonl(folder / "metrics.jsonl", "train")] == [1, 2, 3, 4]
    words = ["--base_model", base_model, "--lora_checkpoint", folder / "rwkv-final.pth"]
    known(gpu(cases.merge, [*words, "--output", tmp_path / "merged.pth", "--device", "cuda"]))


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_evaluation_waits_once_a_row(gpu, typed, text_jsonl, pairs_csv, loss):
    """--eval_only 1 of documents and of pairs."""
    ran = gpu(
        cases.run, [*typed, f"--{loss}", 1, "--val_file", text_jsonl if loss == "sft" else pairs_csv, "--eval_only", 1]
    )
    known(ran.all)
    assert sum(wait.file == "scoring/evaluation.py" for wait in ran.all) <= 2


@pytest.mark.parametrize("options", [{"top_p": 0.3, "presence": 0.4, "banned": (3, 4)}, {"temperature": 0.0}, {}])
def test_sampling_asks_once_a_token(gpu, base_model, options):
    """Each further transfer makes the GPU stand still for every token of every answer."""
    tokens, ran = gpu(cases.sample, base_model, {"max_tokens": 5, "stop_texts": (), "stop_ids": (), **options})
    assert [len(one) for one in tokens] == [5, 5, 5] and len(ran.steps) == 5
    for step in ran.steps:
        assert [wait.place for wait in step] == list(IN_A_TOKEN)
