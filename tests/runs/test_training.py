"""Whole runs of train.py on a two-layer model: what a user types, and what is on disk afterwards."""

import json
import signal
import time

import pytest
import torch

from rwkv_rlhf.commands import train
from rwkv_rlhf.training import loss_scale
from tests.support.files import VOCAB, has_stepped, read_jsonl
from tests.support.processes import started

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


@pytest.fixture
def typed(base_model, vocab_file, tmp_path):
    """The words that every run shares; float32, so that equalities are tight."""
    return [
        *("--load_model", base_model, "--vocab_file", vocab_file, "--proj_dir", tmp_path / "out"),
        *("--precision", "fp32", "--quant", 0, "--ctx_len", 128, "--epoch_save", 1, "--random_seed", 3),
    ]


def weights(folder, name="rwkv-final.pth"):
    return torch.load(folder / name, weights_only=True)


def go(script, typed, *words):
    status, out, err = script(train.main, *typed, *words)
    assert status == 0, err
    return out, err


@pytest.mark.usefixtures("curves")
def test_sft_learns_and_leaves_everything_a_user_needs(script, typed, text_jsonl, tmp_path):
    """If this breaks, a plain fine-tuning run does not learn, save or log."""
    go(
        script,
        typed,
        *("--sft", 1, "--data_file", text_jsonl, "--val_file", text_jsonl, "--micro_bsz", 8),
        *("--epoch_steps", 5, "--epoch_count", 3, "--lr_init", "3e-3", "--lr_final", "1e-3"),
    )
    folder = tmp_path / "out"
    steps = read_jsonl(folder / "metrics.jsonl", "train")
    assert [r["step"] for r in steps] == list(range(1, 16))
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    every = sum(len(document["text"].encode()) for document in read_jsonl(text_jsonl))  # each text, and its end
    for epoch in range(3):  # 5 steps of 8 are the 40 texts
        assert sum(r["tokens"] for r in steps[5 * epoch : 5 * epoch + 5]) == every
    assert all(r["tokens_per_s"] > 0 for r in steps)
    held_out = read_jsonl(folder / "metrics.jsonl", "val")
    assert len(held_out) == 3 and held_out[-1]["loss"] < held_out[0]["loss"]
    for name in ("rwkv-0", "rwkv-1", "rwkv-2", "rwkv-final", "rwkv-best"):
        assert (folder / f"{name}.pth").exists() and json.loads((folder / f"{name}.json").read_text())
    assert len((folder / "train_log.txt").read_text().splitlines()) == 2 + 3
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert set(weights(folder)) >= {"emb.weight", "head.weight", "blocks.1.att.w0", "ln_out.bias"}


HALF = ("--precision", "fp16", "--micro_bsz", 4, "--epoch_steps", 4, "--epoch_count", 1, "--lr_init", "1e-3")


def test_half_precision_learns_what_single_does(script, typed, text_jsonl, tmp_path):
    """If this breaks, somebody with an older card trains something else: losses within 1% of float32's, with gradients
    as long and a scale that stays where it began."""
    found = {}
    for precision in ("fp32", "fp16"):
        words = [*HALF, "--precision", precision, "--proj_dir", tmp_path / precision]
        go(script, typed, "--sft", 1, "--data_file", text_jsonl, *words)
        found[precision] = read_jsonl(tmp_path / precision / "metrics.jsonl", "train")
    for want, got in zip(found["fp32"], found["fp16"], strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-2)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=5e-2)
        assert (got["loss_scale"], got["overflows"]) == (65536, 0) and "loss_scale" not in want


def test_steps_that_overflow_are_left_out_and_counted(script, typed, text_jsonl, tmp_path, monkeypatch):
    """If this breaks, an overflow in half precision ends a run or goes into its weights."""
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**24)
    words = ("--sft", 1, "--data_file", text_jsonl, *HALF, "--epoch_steps", 12, "--max_bad_steps", 0)
    go(script, typed, *words)
    steps = read_jsonl(tmp_path / "out" / "metrics.jsonl", "train")
    left_out = steps[0]["step"] - 1
    assert left_out > 2 and steps[0]["overflows"] == left_out and steps[0]["loss_scale"] == 2.0 ** (24 - left_out)
    assert steps[-1]["loss"] < steps[0]["loss"] and steps[-1]["step"] == 12
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "out").values())


def test_a_gradient_that_never_fits_half_precision_ends_the_run(script, typed, text_jsonl, monkeypatch):
    """If this breaks, a run in half precision halves its scale for ever and learns nothing. One sentence."""
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**-12)
    monkeypatch.setattr("rwkv_rlhf.training.module.gradient_norm", lambda *_: torch.tensor(torch.inf))
    status, _, err = script(train.main, *typed, "--sft", 1, "--data_file", text_jsonl, *HALF)
    assert status == 1 and "overflows at optimizer step 1 even with the loss scaled by 6.1e-05" in err
    assert "--precision bf16 or fp32" in err and err.count("overflows") == 1


def test_a_run_is_repeated_from_the_file_in_its_folder(script, typed, text_jsonl, tmp_path):
    """If this breaks, config.yaml in a run's folder does not say what the run was."""
    words = ("--sft", 1, "--data_file", text_jsonl, "--epoch_steps", 2, "--epoch_count", 1, "--lr_init", "3e-3")
    go(script, typed, *words, "--peft", "lora", "--lora_r", 2)
    again = tmp_path / "again"
    go(script, ["--config", tmp_path / "out" / "config.yaml", "--proj_dir", again])
    first, second = weights(tmp_path / "out"), weights(again)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("loss", ["sft", "dpo", "orpo"])
def test_accumulation_changes_nothing(script, typed, text_jsonl, pairs_csv, tmp_path, loss):
    """If this breaks, --accumulate_grad_batches weighs short and long rows differently from a larger batch."""
    file = ("--data_file", text_jsonl) if loss == "sft" else ("--rlhf_train_file", pairs_csv)
    data = (f"--{loss}", 1, *file)
    found = []
    for size, pieces in ((4, 1), (1, 4)):
        folder = tmp_path / f"{size}"
        go(
            script,
            [*typed, "--proj_dir", folder, *data],
            *("--micro_bsz", size, "--accumulate_grad_batches", pieces, "--epoch_steps", 3 * pieces),
            *("--epoch_count", 1, "--lr_init", "1e-3", "--lr_final", "1e-3", "--warmup_steps", 2),
        )
        found.append((read_jsonl(folder / "metrics.jsonl", "train"), weights(folder)))
    (whole, one), (parts, two) = found
    assert len(whole) == len(parts) == 3
    for a, b in zip(whole, parts):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["lr"] == b["lr"] and a["tokens"] == b["tokens"]
    for name, value in one.items():  # Adam's first steps are signs: compare where the gradient is not noise
        assert (value - two[name]).abs().mean() < 2e-5, name


def test_same_seed_same_bits(script, typed, pairs_csv, tmp_path):
    """If this breaks, two runs of one command differ and no result can be repeated."""
    for folder in ("a", "b"):
        go(
            script,
            [*typed, "--proj_dir", tmp_path / folder, "--dpo", 1, "--rlhf_train_file", pairs_csv],
            *("--peft", "lora", "--lora_dropout", 0.1, "--micro_bsz", 4, "--epoch_steps", 4, "--epoch_count", 1),
        )
    one, two = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("plan", [("--peft", "lora"), ()])
def test_dpo_starts_at_the_reference_and_moves_away(script, typed, pairs_csv, tmp_path, plan):
    """If this breaks, the reference is not the model that training starts from, or the preference is not learnt."""
    go(
        script,
        typed,
        *("--dpo", 1, "--rlhf_train_file", pairs_csv, "--val_file", pairs_csv, "--dpo_beta", 0.1, "--micro_bsz", 8),
        *("--epoch_steps", 12, "--epoch_count", 2, "--lr_init", "2e-3", "--lr_final", "1e-3", *plan),
    )
    folder = tmp_path / "out"
    steps = read_jsonl(folder / "metrics.jsonl", "train")
    assert abs(steps[0]["reward_margin"]) < 1e-5 and steps[0]["dpo"] == pytest.approx(0.6931, abs=1e-4)
    assert steps[-1]["reward_margin"] > 0.1 and steps[-1]["pref_percentage"] > 0.8
    last = read_jsonl(folder / "metrics.jsonl", "val")[-1]
    assert last["accuracy"] > 0.9 and last["logp_margin"] > 1
    status, out, err = script(
        train.main,
        *typed,
        *("--eval_only", 1, "--json", 1, "--val_file", pairs_csv, "--load_adapter", folder / "rwkv-final.pth"),
    )
    assert status == 0, err
    again = json.loads(out.splitlines()[-1])
    assert again["logp_margin"] == pytest.approx(last["logp_margin"], rel=1e-4)
    assert again["accuracy"] == last["accuracy"]


def test_reference_is_cached_by_what_it_depends_on(script, typed, pairs_csv, tmp_path):
    """If this breaks, scores of another model are used, or the same ones are computed again and again."""
    words = ["--dpo", 1, "--rlhf_train_file", pairs_csv, "--epoch_steps", 1, "--epoch_count", 1]
    cache = tmp_path / "out" / "cache"
    go(script, typed, *words)
    (kept,) = cache.iterdir()
    written = kept.stat().st_mtime_ns
    go(script, typed, *words)
    assert [entry.stat().st_mtime_ns for entry in cache.iterdir()] == [written]
    go(script, typed, *words, "--rlhf_max_corpus_len", 6, "--force", 1)  # the same folder
    assert len(list(cache.iterdir())) == 2


def test_evaluation_is_the_plain_likelihood(script, typed, text_jsonl, base_model, tmp_path):
    """If this breaks, --eval_only counts other tokens than it says (document by document, end token included)."""
    from tests.support.models import build

    status, out, err = script(
        train.main, *typed, "--eval_only", 1, "--json", 1, "--val_file", text_jsonl, "--ctx_len", 8
    )
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    assert read_jsonl(tmp_path / "out" / "metrics.jsonl", "eval") == [result]
    model = build(torch.load(base_model, weights_only=True), torch.float64)
    total = count = 0
    for document in read_jsonl(text_jsonl):
        tokens = torch.tensor([[byte + 1 for byte in document["text"].encode()] + [0]])
        with torch.no_grad():
            logp = model.head(model(tokens[:, :-1])[0])[0].log_softmax(-1)
        total -= float(logp.gather(1, tokens[0, 1:, None]).sum())
        count += tokens.shape[1] - 1
    assert result["tokens"] == count
    assert result["loss"] == pytest.approx(total / count, rel=1e-5)
    assert result["perplexity"] == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-4)


def test_train_stage_1_then_3(script, tmp_path, vocab_file, text_jsonl):
    """If this breaks, nobody can pre-train from zero."""
    folder = tmp_path / "zero"
    words = ["--load_model", 0, "--proj_dir", folder, "--vocab_file", vocab_file]
    sizes = ["--my_testing", "x070", "--n_layer", 2, "--n_embd", 64, "--vocab_size", VOCAB, "--random_seed", 1]
    status, _, err = script(train.main, *words[:4], "--train_stage", 1, *sizes)
    assert status == 0, err
    initial = weights(folder, "rwkv-init.pth")
    assert all(value.dtype == torch.float32 for value in initial.values())
    data = ["--data_file", text_jsonl, "--data_type", "jsonl", "--epoch_steps", 2, "--precision", "fp32"]
    run = [*words, "--train_stage", 3, *sizes, *data, "--ctx_len", 64, "--epoch_save", 1, "--lr_init", "1e-3"]
    status, _, err = script(train.main, *run, "--epoch_count", 1)
    assert status == 0, err
    first = weights(folder, "rwkv-0.pth")
    assert not torch.equal(first["emb.weight"], initial["emb.weight"])
    texts = [len(line["text"].encode()) for line in read_jsonl(text_jsonl)]
    enough = int(2.5 * sum(texts) / len(texts))  # tokens of two steps and a half, counted from the beginning
    status, _, err = script(train.main, *run, "--epoch_count", 2, "--my_exit_tokens", enough)
    assert status == 0, err  # goes on from rwkv-0, the newest, numbered from 1, and ends after one step
    assert (folder / "rwkv-1.pth").exists() and not (folder / "rwkv-2.pth").exists()
    assert torch.equal(weights(folder, "rwkv-0.pth")["emb.weight"], first["emb.weight"])
    assert len(read_jsonl(folder / "metrics.jsonl", "train")) == 3
    status, _, err = script(train.main, *run, "--epoch_count", 2, "--my_exit_tokens", enough)
    assert status == 2 and "nothing is left to train" in err
    status, _, err = script(train.main, *run, "--epoch_count", 1, "--peft", "lora")
    assert status == 2 and "--load_model" in err  # would leave a folder that stage 3 cannot go on from


def test_a_run_never_overwrites_its_base(script, typed, pairs_csv, base_model, tmp_path):
    """If this breaks, one careless --proj_dir turns a model into an adapter of itself."""
    folder = tmp_path / "models"
    folder.mkdir()
    kept = base_model.read_bytes()
    (folder / "rwkv-final.pth").write_bytes(kept)
    words = [*typed, "--load_model", folder / "rwkv-final.pth", "--proj_dir", folder, "--peft", "lora"]
    status, _, err = script(train.main, *words, "--dpo", 1, "--rlhf_train_file", pairs_csv)
    assert status == 2 and "--proj_dir" in err
    assert (folder / "rwkv-final.pth").read_bytes() == kept


@pytest.mark.usefixtures("curves")
def test_a_torn_line_of_an_earlier_run_is_harmless(script, typed, text_jsonl, tmp_path):
    """If this breaks, a run that was killed while it wrote metrics.jsonl takes the next one down with it."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"event": "train", "step": 1, "loss": 2.0, "lr": 1.0}\n{"event": "tra')
    go(script, typed, "--sft", 1, "--data_file", text_jsonl, "--epoch_steps", 2, "--epoch_count", 1)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 5 and [json.loads(line)["step"] for line in lines[3:]] == [1, 2]
    assert (folder / "curves.png").exists()


def test_ctrl_c_saves_and_says_130(typed, text_jsonl, tmp_path):
    """If this breaks, stopping a run loses what it learnt."""
    words = [*typed, "--sft", 1, "--data_file", text_jsonl, "--epoch_steps", 100000, "--epoch_count", 1]
    process = started("train.py", *words)
    deadline = time.monotonic() + 120
    while not has_stepped(tmp_path / "out") and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert weights(tmp_path / "out", "rwkv-last.pth")["emb.weight"].shape == (VOCAB, 64)


def test_dry_run_trains_nothing(script, typed, pairs_csv, tmp_path):
    """If this breaks, looking at the plan starts the run."""
    out, _ = go(script, typed, "--dpo", 1, "--rlhf_train_file", pairs_csv, "--dry_run", 1)
    assert "24 pairs" in out and "gladly" in out and "optimizer steps" in out
    assert not list((tmp_path / "out").glob("rwkv-*"))


def test_a_loss_that_is_no_number_ends_in_one_sentence(script, typed, text_jsonl, tmp_path):
    """If this breaks, a run that blew up goes on training garbage, or overwrites good checkpoints."""
    status, _, err = script(
        train.main,
        *typed,
        *("--sft", 1, "--data_file", text_jsonl, "--lr_init", "1e30", "--lr_final", "1e30", "--grad_clip", 0),
        *("--epoch_steps", 50, "--epoch_count", 1, "--max_bad_steps", 2),
    )
    assert status == 1
    assert "--max_bad_steps 2" in err and "Traceback" not in err
    assert len(list((tmp_path / "out").glob("bad-step-*.pth"))) == 3
    assert not list((tmp_path / "out").glob("rwkv-*"))
