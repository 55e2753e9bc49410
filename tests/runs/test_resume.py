"""A run that is stopped anywhere and resumed ends with the very bits of one that was not."""

import json
import os
import shutil
import signal

import pytest
import torch

from rwkv_rlhf.commands import train
from rwkv_rlhf.data.templates.jinja import template_process
from rwkv_rlhf.ops import product_ways
from rwkv_rlhf.training import callbacks, start
from rwkv_rlhf.training.module import TrainingModule
from tests.support.files import read_jsonl
from tests.support.source_files import ROOT

pytestmark = pytest.mark.slow


class Cut(Exception):
    """Stands for the end of the process: nothing after it may help the run."""


@pytest.fixture
def typed(base_model, vocab_file):
    """The words that every run shares."""
    return [
        *("--load_model", base_model, "--vocab_file", vocab_file, "--ctx_len", 48, "--random_seed", 3),
        *("--lr_init", "1e-3", "--lr_final", "1e-4", "--warmup_steps", 2, "--resume_every", 1),
    ]


REWARDS = f"{ROOT}/tests/support/rewards.py:odd,short"
TEXT = ("--sft", 1, "--micro_bsz", 3)
PAIRS = ("--dpo", 1, "--micro_bsz", 2)
LORA = ("--peft", "lora", "--lora_dropout", 0.2, "--quant", 0)
HEADS = ("--layer_profile", ROOT / "tests" / "support" / "head_rows.csv", "--quant", 0)
DECAY = ("--weight_decay_final", 0.01)
LONG = ("--epoch_steps", 3, "--epoch_count", 2)
GROUPS = ("--grpo", 1, "--micro_bsz", 1, "--grpo_gen_count", 3, "--grpo_gen_length", 6, "--reward_funcs", REWARDS)
VALUES = ("--ppo", 1, "--batch_size", 2, "--ppo_epochs", 2, "--output_max_length", 6, "--reward_funcs", REWARDS)
TWO = ("--accumulate_grad_batches", 2, "--epoch_steps", 6, "--epoch_count", 1)
KINDS = {
    "sft full": (*TEXT, "--quant", 0, "--precision", "fp32", *LONG),
    "sft lora accumulated": (*TEXT, *LORA, *TWO),
    "sft infinite context": (*TEXT, *LORA, "--infctx", 1, "--chunk_ctx", 16, "--infctx_dataset_multiplier", 2, *LONG),
    "sft pissa": (*TEXT, "--peft", "pissa", "--quant", 0, *LONG),
    "sft nf4 dora": (*TEXT, "--peft", "dora", "--lora_dropout", 0.1, "--quant", 1, *LONG),
    "sft states": (*TEXT, "--state", 1, "--quant", 0, *LONG),
    "sft growing": (*TEXT, *LORA, "--initial_ctx_len", 8, "--ctx_warmup_steps", 4, *TWO),
    "sft half precision": (*TEXT, *LORA, "--precision", "fp16", "--dropout", 0.1, "--optim", "adopt", *LONG),
    "sft 8-bit moments": (*TEXT, "--quant", 0, "--optim", "adamw8bit", "--weight_decay", 0.1, *DECAY, *LONG),
    "dpo lora": (*PAIRS, *LORA, *LONG, "--keep", 1, "--epoch_save", 1),
    "dpo infinite context": (*PAIRS, *LORA, "--infctx", 1, "--chunk_ctx", 8, *TWO),
    "dpo nf4 pissa": (*PAIRS, "--peft", "pissa", "--quant", 1, *LONG),
    "reward model": ("--rm", 1, "--micro_bsz", 2, *LORA, "--val_split", 0.2, *LONG),
    "kto": ("--kto", 1, "--micro_bsz", 4, *LORA, *TWO),
    "grpo": (*GROUPS, "--grpo_passes", 2, "--grpo_dynamic", 1, "--grpo_gen_temperature", 1.5, *LORA, *TWO),
    "ppo": (*VALUES, "--early_stopping", 1, "--target_kl", 1e-9, *HEADS, *LONG),
    "grpo full": (*GROUPS, "--quant", 0, "--precision", "fp32", "--grpo_rollout_steps", 2, *LONG),
}


def words_for(kind, typed, text_jsonl, pairs_csv):
    words = [*typed, *KINDS[kind]]
    return [*words, "--data_file", text_jsonl] if "--sft" in words else [*words, "--rlhf_train_file", pairs_csv]


def tensors(folder, name="rwkv-final.pth"):
    return torch.load(folder / name, weights_only=True)


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def untimed(record):
    """A line of metrics.jsonl without what the clock says."""
    return {name: value for name, value in record.items() if not name.endswith(("tokens_per_s", "memory"))}


@pytest.fixture
def run(script):
    def go(*words, status=0):
        found, _, err = script(train.main, *words)
        assert found == status, err
        return err

    return go


def killed():
    raise Cut


@pytest.fixture
def cut_at(monkeypatch):
    """cut_at(k, what): instead of the micro-batch after the k-th from now there is `what`."""

    def cut(k, what=killed):
        step, left = TrainingModule.training_step, [k]

        def counted(self, batch, index):
            left[0] -= 1
            if left[0] < 0:
                what()
            return step(self, batch, index)

        monkeypatch.setattr(TrainingModule, "training_step", counted)
        return lambda: monkeypatch.setattr(TrainingModule, "training_step", step)

    return cut


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_anywhere_the_same_bits_in_the_end(kind, typed, run, cut_at, text_jsonl, pairs_csv, tmp_path):
    """If this breaks, a run that was stopped in the middle ends elsewhere than one that was not."""
    words = words_for(kind, typed, text_jsonl, pairs_csv)
    whole = tmp_path / "whole"
    run(*words, "--proj_dir", whole)
    folder = tmp_path / "parts"
    for k in (1, 3):  # before or in the middle of the first step, and later
        free = cut_at(k)
        run(*words, "--proj_dir", folder, "--resume", "auto", status=1)
        free()
    run(*words, "--proj_dir", folder, "--resume", "auto")
    assert same(tensors(whole), tensors(folder))
    want, found = (read_jsonl(path / "metrics.jsonl", "train") for path in (whole, folder))
    assert [untimed(record) for record in want] == [untimed(record) for record in found]
    assert len(want) == (3 if "--accumulate_grad_batches" in words else 6)
    assert sorted(p.name for p in whole.glob("rwkv-*")) == sorted(p.name for p in folder.glob("rwkv-*"))


def test_a_resumed_run_multiplies_as_it_did(typed, run, cut_at, monkeypatch, caplog, text_jsonl, tmp_path):
    """If this breaks, what another machine, or a measurement on a busy one, finds fastest changes the rest of a run."""
    if product_ways.refusal(product_ways.ONEDNN, torch.float32):
        pytest.skip("this build of PyTorch has no operators of oneDNN")
    taken = []
    monkeypatch.setitem(
        product_ways.WAYS,
        product_ways.ONEDNN,
        lambda a, b: taken.append(1) or torch.nn.functional.linear(a, b) * 1.0001,
    )  # its bits show
    monkeypatch.setattr(product_ways, "SMALLEST", 8)
    monkeypatch.setattr(product_ways, "refusal", lambda way, dtype: None)
    ways = product_ways.Ways.all(product_ways.ONEDNN)
    words = [*typed, *KINDS["sft full"], "--data_file", text_jsonl]
    monkeypatch.setattr(start, "ways_for", lambda *about: ways)
    run(*words, "--proj_dir", tmp_path / "whole")
    assert taken
    folder = tmp_path / "parts"
    free = cut_at(3)
    run(*words, "--proj_dir", folder, status=1)
    free()
    shutil.copytree(folder, tmp_path / "typed")
    monkeypatch.setattr(start, "ways_for", lambda *about: product_ways.PLAIN)
    run(*words, "--proj_dir", folder, "--resume", "auto")
    assert same(tensors(tmp_path / "whole"), tensors(folder))
    run(*words, "--proj_dir", tmp_path / "typed", "--resume", "auto", "--products", "torch")
    assert "{products} changed" in caplog.text and not same(tensors(tmp_path / "whole"), tensors(tmp_path / "typed"))


def points(folder):
    """Steps of the resume points in a project folder."""
    return sorted(int(path.name[5:]) for path in (folder / "resume").glob("step-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_loses_nothing(number, typed, run, cut_at, text_jsonl, tmp_path):
    """If this breaks, Ctrl+C or a scheduler's SIGTERM costs the steps since the last save, or half a step's tensors."""
    words = [
        *typed,
        *TEXT,
        *LORA,
        *LONG,
        "--accumulate_grad_batches",
        2,
        "--data_file",
        text_jsonl,
        "--resume_every",
        0,
    ]
    run(*words, "--proj_dir", tmp_path / "whole")
    folder = tmp_path / "parts"
    told = []
    for k in (0, 3, 2):  # before the first step; in the middle of the second; at the end of the first mini-epoch
        free = cut_at(k, lambda: os.kill(os.getpid(), number))
        told.append(run(*words, "--proj_dir", folder, "--resume", "auto", status=130 if number == signal.SIGINT else 1))
        free()
        assert (folder / "rwkv-last.pth").exists()
    assert points(folder) == [1, 2]
    run(*words, "--proj_dir", folder, "--resume", "auto")
    assert same(tensors(tmp_path / "whole"), tensors(folder))
    if number == signal.SIGTERM:
        assert "SIGTERM" in told[0] and "--resume auto" in told[0]


def test_stopped_while_validating(typed, run, monkeypatch, text_jsonl, tmp_path):
    """If this breaks, a stop during validation trains a step twice, forgets the best score, or loses the early stop."""
    words = [*typed, *TEXT, "--quant", 0, "--data_file", text_jsonl, "--val_split", 0.2, "--early_stop", 2]
    words += ["--epoch_steps", 2, "--epoch_count", 9, "--epoch_save", 4, "--lr_init", 0.3, "--lr_final", 0.3]
    whole, folder = tmp_path / "whole", tmp_path / "parts"
    run(*words, "--proj_dir", whole)
    seen = callbacks.Validate.on_train_epoch_end
    calls = []

    def stopped(self, trainer, module):
        calls.append(1)
        if len(calls) in (2, 3):
            os.kill(os.getpid(), signal.SIGINT)
        seen(self, trainer, module)

    monkeypatch.setattr(callbacks.Validate, "on_train_epoch_end", stopped)
    for _ in range(2):
        run(*words, "--proj_dir", folder, "--resume", "auto", status=130)
    run(*words, "--proj_dir", folder, "--resume", "auto")
    for event in ("train", "val"):
        want, found = (read_jsonl(path / "metrics.jsonl", event) for path in (whole, folder))
        assert [untimed(record) for record in want] == [untimed(record) for record in found]
    assert len(read_jsonl(folder / "metrics.jsonl", "train")) < 18
    for name in ("rwkv-final.pth", "rwkv-best.pth"):
        assert same(tensors(whole, name), tensors(folder, name))
    told = [line for line in (folder / "train_log.txt").read_text().splitlines() if line[0].isdigit()]
    assert [line.split()[0] for line in told] == [str(n) for n in range(len(told))]
    run(*words, "--proj_dir", folder, "--resume", "auto")  # it had stopped early: there is nothing to go on with
    assert same(tensors(whole), tensors(folder)) and len(read_jsonl(folder / "metrics.jsonl", "val")) == len(want)


@pytest.fixture
def stopped_run(typed, run, text_jsonl, tmp_path):
    """(words, folder) of a finished run of four steps; its last points are steps 3 and 4."""
    words = [*typed, *TEXT, *LORA, "--data_file", text_jsonl, "--epoch_steps", 4, "--proj_dir", tmp_path / "out"]
    run(*words, "--epoch_count", 1)
    assert points(tmp_path / "out") == [3, 4]
    return words, tmp_path / "out"


def flip(path):
    """Turn over one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_a_longer_run_goes_on(stopped_run, run, caplog):
    """If this breaks, a finished run says nothing, cannot be made longer, or changed learning rates are not told."""
    words, folder = stopped_run
    caplog.set_level("INFO")
    run(*words, "--epoch_count", 1, "--resume", "auto")
    assert "the run is finished, nothing is left to do: a larger --epochs" in caplog.text
    run(*words, "--epoch_count", 2, "--resume", "auto", "--log_every", 2)
    assert "--epoch_count was 1, is 2" in caplog.text
    assert [r["step"] for r in read_jsonl(folder / "metrics.jsonl", "train")] == [1, 2, 3, 4, 6, 8]
    assert (folder / "rwkv-1.pth").exists()


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (("--lr_init", "2e-3", "--beta2", 0.9), ("--lr_init was 0.001, is 0.002", "--beta2")),
        (("--micro_bsz", 2), ("--micro_bsz",)),
        (("--lora_r", 4), ("--lora_r",)),
    ],
)
def test_other_settings_are_refused_by_name(stopped_run, run, other, named):
    """If this breaks, a resumed run is silently another training."""
    words, folder = stopped_run
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    err = run(*words, "--epoch_count", 2, "--resume", "auto", *other, status=2)
    assert all(name in err for name in named) and err.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == kept


def test_other_files_are_refused(stopped_run, run, base_of, tmp_path, text_jsonl):
    """If this breaks, a resumed run trains on other text, or over another model, than it began with."""
    words, _ = stopped_run
    words = [*words, "--epoch_count", 2, "--resume", "auto"]
    moved = tmp_path / "moved.jsonl"
    shutil.copy(text_jsonl, moved)
    moved.write_text(moved.read_text() + '{"text": "one more"}\n')
    err = run(*words, "--data_file", moved, status=2)
    assert "--train_data_file" in err or "--data_file" in err
    other = tmp_path / "other.pth"
    changed = torch.load(base_of("x070"), weights_only=True)
    changed["ln_out.weight"] += 1
    torch.save(changed, other)
    assert "another base model (x070.pth)" in run(*words, "--load_model", other, status=2)
    shutil.copy(text_jsonl, moved)
    run(*words, "--data_file", moved)  # the same file elsewhere


@pytest.mark.parametrize("name", ["rank-0.safetensors", "manifest.json"])
def test_flipped_bytes_of_a_point(stopped_run, run, name, caplog):
    """If this breaks, a run goes on from garbage, or throws away what the point before holds."""
    words, folder = stopped_run
    want = tensors(folder)
    words = [*words, "--epoch_count", 1, "--resume", "auto"]
    flip(folder / "resume" / "step-4" / name)
    run(*words)
    assert caplog.text.count("damaged") == 1 and "resuming from" in caplog.text
    assert same(want, tensors(folder)) and points(folder) == [3, 4]
    for step in (3, 4):
        flip(folder / "resume" / f"step-{step}" / name)
    err = run(*words, status=2)
    assert "no resume point" in err and err.count("\n") == 1


def test_flipped_bytes_of_a_checkpoint(stopped_run, run, script, base_model, tmp_path):
    """If this breaks, a damaged checkpoint is trained on, scored or merged as if it were whole."""
    from rwkv_rlhf.commands import merge

    words, folder = stopped_run
    checkpoint = folder / "rwkv-final.pth"
    flip(checkpoint)
    words = [*words, "--epoch_count", 1, "--proj_dir", tmp_path / "again", "--load_adapter", checkpoint]
    assert "damaged" in run(*words, status=2)
    assert "damaged" in run(*words, "--eval_only", 1, "--val_file", words[words.index("--data_file") + 1], status=2)
    merging = ("--base_model", base_model, "--lora_checkpoint", checkpoint, "--output", tmp_path / "merged.pth")
    status, _, err = script(merge.main, *merging)
    assert status == 2 and "damaged" in err
    sidecar = checkpoint.with_suffix(".json")
    told = json.loads(sidecar.read_text())
    del told["sha256"]
    sidecar.write_text(json.dumps(told))
    run(*words)  # of an older program: as before


def test_going_on_from_the_newest_whole_model(typed, run, text_jsonl, tmp_path, caplog):
    """If this breaks, --train_stage 3 goes on from a damaged model, or a resumed one begins from its own saves."""
    folder = tmp_path / "zero"
    sizes = ["--my_testing", "x070", "--n_layer", 2, "--n_embd", 64, "--vocab_size", 257, "--load_model", 0]
    run("--train_stage", 1, *sizes, "--proj_dir", folder)
    words = [*typed, *sizes, "--train_stage", 3, "--proj_dir", folder, "--data_file", text_jsonl, "--epoch_save", 1]
    words += ["--epoch_steps", 2]
    run(*words, "--epoch_count", 2)
    want = tensors(folder)
    shutil.rmtree(folder / "resume" / "step-4")
    run(*words, "--epoch_count", 2, "--resume", "auto")
    assert same(want, tensors(folder)) and not (folder / "rwkv-2.pth").exists()
    flip(folder / "rwkv-1.pth")
    caplog.clear()
    run(*words, "--epoch_count", 1)
    assert caplog.text.count("damaged") == 1
    assert json.loads((folder / "rwkv-final.json").read_text())["base_file"] == "rwkv-0.pth"
    assert "continue the earlier run instead, add --resume auto" in caplog.text  # said to those who forgot it


def test_a_path_and_a_fresh_folder(stopped_run, run, tmp_path, caplog):
    """If this breaks, --resume PATH goes on from another point than the one named, or `auto` needs an old run."""
    words, folder = stopped_run
    want = tensors(folder)
    words = [*words, "--epoch_count", 1, "--proj_dir", tmp_path / "fresh"]
    run(*words, "--resume", folder / "resume" / "step-3")
    assert same(want, tensors(tmp_path / "fresh"))
    assert [r["step"] for r in read_jsonl(tmp_path / "fresh" / "metrics.jsonl", "train")] == [4]
    assert "there is no resume point" in run(*words, "--resume", tmp_path / "nothing", status=2)
    caplog.set_level("INFO")
    run(*words, "--resume", "auto", "--proj_dir", tmp_path / "fresher")
    assert "starts from the beginning" in caplog.text and same(want, tensors(tmp_path / "fresher"))


def test_the_date_of_a_resumed_run_is_that_of_its_first_start(script, base_model, vocab_file, tmp_path, monkeypatch):
    """A chat template that writes the date would train on another text after midnight; the sidecar tells the date."""
    monkeypatch.setattr(template_process(), "now", "")  # put back what this test changes
    template, chats = tmp_path / "t.jinja", tmp_path / "chats.jsonl"
    template.write_text(
        "{{ strftime_now('%Y') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    chats.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(4)))
    words = ["--load_model", base_model, "--vocab_file", vocab_file, "--template", template, "--data_file", chats]
    words += ["--sft", 1, "--train_on_prompt", 1, "--peft", "lora", "--limited_lora", 1, "--lora_dropout", 0]
    words += ["--epoch_steps", 2, "--epoch_count", 1, "--resume_every", 1, "--random_seed", 1, "--lr_init", "1e-2"]
    found = {}
    for name, year, more in (
        ("first", 2001, ()),
        ("again", 2002, ("--resume", tmp_path / "first" / "resume" / "step-1")),
        ("other", 2002, ()),
    ):
        monkeypatch.setattr("rwkv_rlhf.training.run.this_second", lambda year=year: f"{year}-02-03T04:05:06")
        status, _, err = script(train.main, *words, "--proj_dir", tmp_path / name, *more)
        assert status == 0, err
        found[name] = json.loads((tmp_path / name / "rwkv-final.json").read_text())["begun"], tensors(tmp_path / name)
    assert [begun[:4] for begun, _ in found.values()] == ["2001", "2001", "2002"]
    assert same(found["first"][1], found["again"][1]) and not same(found["first"][1], found["other"][1])
