"""Settings reach what they are about: what the optimizer was given and the model was fed, not what a log says."""

import json
import re
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from rwkv_rlhf.checkpoints.run_folder import newest_checkpoint
from rwkv_rlhf.commands import merge, score_pairs, train
from rwkv_rlhf.data.pairs.save import read_save, write_save
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.files import file_hash
from rwkv_rlhf.plan import COLUMNS
from rwkv_rlhf.settings.command_line import parse
from rwkv_rlhf.training.inputs import Inputs
from rwkv_rlhf.training.module import TrainingModule
from rwkv_rlhf.training.optimizers import adamw
from rwkv_rlhf.training.schedule import Schedule
from rwkv_rlhf.training.start import start
from tests.support.files import VOCAB, has_stepped, read_jsonl
from tests.support.processes import started

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

PROFILE = f"""{",".join(COLUMNS)}
emb,freeze,0,0,0,0,0,0,0,0,
0,lora,4,8,0,0.001,0.0001,0.3,0,0,
1,full,0,0,0,0.0003,0.00003,0.2,0,0,
head,full,0,0,0,0.0005,0.00001,0.1,0,0,
"""
ROWS = {"0": (1e-3, 1e-4, 0.3), "1": (3e-4, 3e-5, 0.2), "head": (5e-4, 1e-5, 0.1), "ln_out": (5e-4, 1e-5, 0.1)}


def documents_of(batch):
    """Numbers of the documents of conftest's text_jsonl in a batch, in order."""
    text = bytes(token - 1 for token in batch.tokens.tolist() if token)
    return [int(number) for number in re.findall(rb"line (\d+):", text)]


@pytest.fixture
def seen(monkeypatch):
    """What training did, watched where it happens.

    fed: documents of each micro-batch. updates: at each optimizer step, what each parameter's group said, by name.
    norms: of the gradient that the step used. passes: of one block, recomputation included.
    """
    found = SimpleNamespace(fed=[], updates=[], norms=[], passes=0, names={})
    training_step = TrainingModule.training_step

    def count(*_):
        found.passes += 1

    def watched_step(self, batch, index):
        if not found.names:
            found.names = {id(parameter): name for name, parameter in self.model.named_parameters()}
            self.model.blocks[1].register_forward_pre_hook(count)
        if hasattr(batch, "tokens"):
            found.fed.append(documents_of(batch))
        return training_step(self, batch, index)

    def after(optimizer, *_):
        groups = optimizer.param_groups
        found.updates.append(
            {found.names[id(p)]: {**group, "params": None} for group in groups for p in group["params"]}
        )
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        found.norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    def watched_adamw(*arguments, **named):
        optimizer = adamw(*arguments, **named)
        optimizer.register_step_post_hook(after)
        return optimizer

    def forget():
        past = SimpleNamespace(**vars(found))
        found.fed, found.updates, found.norms, found.passes, found.names = [], [], [], 0, {}
        return past

    found.forget = forget  # gives what was seen of one run, and begins anew
    monkeypatch.setattr(TrainingModule, "training_step", watched_step)
    monkeypatch.setattr("rwkv_rlhf.training.optimizers.adamw", watched_adamw)
    return found


@pytest.fixture
def typed(base_model, vocab_file):
    """The words that every run shares, without its folder."""
    return [
        *("--load_model", base_model, "--vocab_file", vocab_file, "--precision", "fp32", "--quant", 0),
        *("--ctx_len", 128, "--epoch_save", 1, "--random_seed", 3, "--epoch_count", 1),
    ]


@pytest.fixture
def go(script, typed, tmp_path):
    """go(name, words) runs train.py into tmp_path/name, which must succeed, and gives that folder."""

    def call(name, *words):
        status, _, err = script(train.main, *typed, "--proj_dir", tmp_path / name, *words)
        assert status == 0, err
        return tmp_path / name

    return call


@pytest.fixture
def half_base(base_model, tmp_path):
    """The base model as it is usually stored: bf16."""
    path = tmp_path / "half.pth"
    torch.save({name: value.bfloat16() for name, value in torch.load(base_model, weights_only=True).items()}, path)
    return path


@pytest.fixture
def other_model(base_model, tmp_path):
    """A model of the same sizes that thinks otherwise."""
    generator = torch.Generator().manual_seed(1)
    tensors = torch.load(base_model, weights_only=True)
    tensors["head.weight"] += 0.3 * torch.randn(tensors["head.weight"].shape, generator=generator)
    path = tmp_path / "other.pth"
    torch.save(tensors, path)
    return path


def weights(folder, name="final"):
    return torch.load(folder / f"rwkv-{name}.pth", weights_only=True)


def is_matrix(name):
    """A whole matrix of RWKV-7, or a factor of LoRA: what may decay, and what --save_dtype speaks of."""
    return "lora_" in name or (name.endswith(".weight") and not re.search(r"\bln(_|\d)", name))


def test_profile_reaches_the_optimizer(go, seen, half_base, text_jsonl, tmp_path):
    """If this breaks, a group trains with another rate, decay, beta or clip than was asked for."""
    (tmp_path / "profile.csv").write_text(PROFILE)
    folder = go(
        "out",
        *(
            "--load_model",
            half_base,
            "--sft",
            1,
            "--data_file",
            text_jsonl,
            "--layer_profile",
            tmp_path / "profile.csv",
        ),
        *("--micro_bsz", 2, "--accumulate_grad_batches", 2, "--epoch_steps", 4, "--epoch_count", 2),
        *("--warmup_steps", 2, "--beta1", 0.8, "--beta2", 0.95, "--adam_eps", "1e-6", "--grad_clip", 0.01),
        *("--grad_cp", 1, "--lr_init", 7, "--lr_final", 7, "--weight_decay", 7),
    )
    logged = read_jsonl(folder / "metrics.jsonl", "train")
    schedule = Schedule(warmup=2, total=4)
    assert len(seen.updates) == len(logged) == 4 and len(seen.fed) == 8
    names = set(seen.updates[0])
    assert {"blocks.0.att.w0", "blocks.0.att.key.lora_A", "blocks.1.att.w0", "head.weight", "ln_out.bias"} <= names
    assert not {"emb.weight", "blocks.0.att.key.weight"} & names
    for step, update in enumerate(seen.updates):
        for name, group in update.items():
            words = name.split(".")
            initial, final, decay = ROWS[words[1] if words[0] == "blocks" else words[0]]
            times = 2 if name.endswith(".w0") else 1
            assert group["lr"] == pytest.approx(schedule.rate(step, times * initial, times * final)), (step, name)
            assert group["weight_decay"] == (decay if is_matrix(name) else 0), name
            assert tuple(group["betas"]) == (0.8, 0.95) and group["eps"] == 1e-6
        assert logged[step]["lr"] == update["blocks.1.ffn.key.weight"]["lr"]  # the widest group
    assert all(record["grad_norm"] > 0.02 for record in logged)  # before clipping
    assert seen.norms == pytest.approx([0.01] * 4, rel=1e-3)
    assert seen.passes == 2 * len(seen.fed)  # forward and recomputation
    for name, value in weights(folder).items():
        whole = is_matrix(name) and "lora_" not in name
        assert value.dtype == (torch.bfloat16 if whole else torch.float32), name


def test_flags_reach_the_optimizer(go, seen, half_base, text_jsonl):
    """If this breaks, --grad_clip 0 clips, --layerwise_lr 0 multiplies, or --random_mode 0 shuffles."""
    folder = go(
        "out",
        *("--load_model", half_base, "--sft", 1, "--data_file", text_jsonl, "--micro_bsz", 2, "--epoch_steps", 3),
        *("--lr_init", "1e-3", "--lr_final", "1e-4", "--weight_decay", 0.1, "--layerwise_lr", 0, "--grad_clip", 0),
        *("--random_mode", 0, "--grad_cp", 0, "--save_dtype", "fp32", "--lr_schedule", "linear", "--log_every", 2),
    )
    assert seen.fed == [[0, 1], [2, 3], [4, 5]]
    for step, update in enumerate(seen.updates):
        for name, group in update.items():
            assert group["lr"] == pytest.approx(1e-3 - 0.9e-3 * step / 3), (step, name)
            assert group["weight_decay"] == (0.1 if is_matrix(name) else 0), name
    assert {"emb.weight", "head.weight", "blocks.0.att.w0", "blocks.1.ffn.value.weight"} <= set(seen.updates[0])
    logged = read_jsonl(folder / "metrics.jsonl", "train")
    assert [record["step"] for record in logged] == [2]
    assert seen.norms[1] == pytest.approx(logged[0]["grad_norm"], rel=1e-5) and min(seen.norms) > 1
    assert seen.passes == len(seen.fed)
    saved = weights(folder)
    assert {value.dtype for value in saved.values()} == {torch.float32}
    for name in ("emb.weight", "blocks.1.att.key.weight"):
        assert not torch.equal(saved[name], saved[name].bfloat16().float()), name


def test_epoch_begin_goes_on(go, seen, text_jsonl):
    """If this breaks, a continued run sees its first examples again, warms up again, or overwrites checkpoints."""
    words = ["--sft", 1, "--data_file", text_jsonl, "--micro_bsz", 2, "--epoch_steps", 3, "--warmup_steps", 2]
    words += ["--lr_init", "1e-3", "--lr_final", "1e-4"]
    one = go("one", *words, "--epoch_count", 4, "--keep", 2)
    whole = seen.forget()
    two = go("two", *words, "--epoch_count", 2, "--epoch_begin", 2)
    flat = [number for numbers in whole.fed for number in numbers]
    assert len(set(flat)) == len(flat) == 24 and flat != sorted(flat)
    assert seen.fed == whole.fed[6:]
    for name in ("head.weight", "blocks.0.att.w0"):
        rates = [update[name]["lr"] for update in whole.updates]
        expected = [Schedule(warmup=2, total=12).rate(step, 1e-3, 1e-4) for step in range(12)]
        assert rates == pytest.approx([rate * (2 if name.endswith("w0") else 1) for rate in expected])
        assert [update[name]["lr"] for update in seen.updates] == pytest.approx(rates[6:])
    kept = ["rwkv-2.json", "rwkv-2.pth", "rwkv-3.json", "rwkv-3.pth"]
    for folder in (one, two):  # the one by --keep, the other by its numbering
        assert sorted(path.name for path in folder.glob("rwkv-[0-9]*")) == kept
    assert (one / "rwkv-final.pth").exists() and (one / "rwkv-final.json").exists()
    assert [line.split()[0] for line in (two / "train_log.txt").read_text().splitlines()[2:]] == ["2", "3"]


def test_held_out_is_not_trained_and_early_stop_stops(go, seen, text_jsonl):
    """If this breaks, the held-out loss is of what was trained on, or a run that no longer improves goes on."""
    folder = go(
        "out",
        *("--sft", 1, "--data_file", text_jsonl, "--val_split", 0.25, "--early_stop", 2, "--lr_init", 0),
        *("--lr_final", 0, "--micro_bsz", 10, "--epoch_steps", 3, "--epoch_count", 6),
    )
    texts = [document["text"] for document in read_jsonl(text_jsonl)]
    for epoch in range(3):
        trained = {number for numbers in seen.fed[3 * epoch : 3 * epoch + 3] for number in numbers}
        assert len(trained) == 30
        held_out = [text for number, text in enumerate(texts) if number not in trained]
    scored = read_jsonl(folder / "metrics.jsonl", "val")
    assert [record["step"] for record in scored] == [3, 6, 9]  # the first is the best, then two that are not better
    assert {record["tokens"] for record in scored} == {sum(len(text.encode()) for text in held_out)}
    assert len(seen.updates) == 9
    assert (folder / "rwkv-2.pth").exists() and not (folder / "rwkv-3.pth").exists()


def test_adapters_alone_scaled_and_resumed(go, base_model, text_jsonl):
    """If this breaks, --limited_lora trains more, --rslora is a no-op, or a resumed adapter is not what was saved."""
    words = ["--sft", 1, "--data_file", text_jsonl, "--peft", "lora", "--lora_r", 4, "--lora_alpha", 8]
    words += ["--micro_bsz", 4, "--epoch_steps", 2, "--weight_decay", 0.1]
    rates = ["--lr_init", "1e-2", "--lr_final", "1e-2"]
    found = {}
    for name, more, scaling in (("limited", ("--limited_lora", 1, "--rslora", 1), 4.0), ("plain", (), 2.0)):
        folder = go(name, *words, *rates, *more)
        adapted = json.loads((folder / "rwkv-final.json").read_text())["adapted"]
        assert {entry["scaling"] for entry in adapted.values()} == {scaling}
        found[name] = weights(folder)
        assert all(value.any() for name, value in found[name].items() if "lora_" in name)
    adapters = {name for name in found["plain"] if "lora_" in name}
    assert set(found["limited"]) == adapters
    base = torch.load(base_model, weights_only=True)
    for name in ("blocks.0.att.w0", "blocks.1.ln1.weight", "blocks.1.ffn.x_k"):
        assert not torch.equal(found["plain"][name].flatten(), base[name].float().flatten()), name
    assert not {"emb.weight", "head.weight", "blocks.0.att.key.weight"} & set(found["plain"])
    saved = folder / "rwkv-final.pth"
    still = ["--lr_init", 0, "--lr_final", 0, "--val_file", text_jsonl, "--epoch_count", 3]
    folder = go("again", *words, *still, "--load_adapter", saved)
    again = weights(folder)
    assert again.keys() == found["plain"].keys()
    assert all(torch.equal(again[name], value) for name, value in found["plain"].items())
    assert len(read_jsonl(folder / "metrics.jsonl", "val")) == 3  # --early_stop 0 never stops


def test_a_base_with_missing_tensors_is_trained_and_merged(go, script, base_model, text_jsonl, tmp_path):
    """If this breaks, --load_partial 1 trains something else, or nothing takes the whole model that it saved."""
    whole, partial = torch.load(base_model, weights_only=True), tmp_path / "partial.pth"
    lost = ["blocks.1.att.key.weight", *(f"blocks.0.att.{name}" for name in ("v0", "v1", "v2"))]
    torch.save({name: tensor for name, tensor in whole.items() if name not in lost}, partial)
    words = ["--sft", 1, "--data_file", text_jsonl, "--epoch_steps", 2, "--micro_bsz", 2, "--load_model", partial]
    status, _, err = script(train.main, *words, "--proj_dir", tmp_path / "no")
    assert status == 2 and "1 missing: blocks.1.att.key.weight" in err
    status, _, err = script(train.main, *words, "--proj_dir", tmp_path / "no", "--load_partial", 1, "--lora", 1)
    assert status == 2 and "--load_partial 1 is for whole models" in err
    folder = go("partial", *words, "--load_partial", 1)
    saved = weights(folder)
    assert saved.keys() == whole.keys() and {name: t.shape for name, t in saved.items()} == {
        name: tensor.shape for name, tensor in whole.items()
    }
    words = ["--sft", 1, "--data_file", text_jsonl, "--epoch_steps", 2, "--micro_bsz", 2]
    released = tmp_path / "released.pth"  # as files of BlinkDL are, without the unused factors
    torch.save({name: tensor for name, tensor in whole.items() if name not in lost[1:]}, released)
    folder = go("full", *words, "--load_model", released)
    merging = ["--base_model", released, "--lora_checkpoint", folder / "rwkv-final.pth"]
    status, out, err = script(merge.main, *merging, "--output", tmp_path / "merged.pth")
    assert status == 0 and "differ by at most 0.0e+00" in out, err
    go("on", *words, "--load_model", tmp_path / "merged.pth")


def test_newest_is_the_largest_number(tmp_path):
    """If this breaks, a continued pre-training falls back to checkpoint 9 for ever."""
    with pytest.raises(ValueError, match="train_stage 1"):
        newest_checkpoint(tmp_path)
    for name in ("init.pth", "9.pth", "10.pth", "final.pth", "best.pth", "last.pth", "11.json"):
        (tmp_path / f"rwkv-{name}").touch()
    assert newest_checkpoint(tmp_path).name == "rwkv-10.pth"
    (tmp_path / "rwkv-100.safetensors").touch()
    assert newest_checkpoint(tmp_path).name == "rwkv-100.safetensors"


def test_scores_of_a_file_are_believed_only_where_they_are_ours(typed, base_model, other_model, pairs_csv, tmp_path):
    """If this breaks, DPO runs against another model's scores, or those prepared for hours are not used."""
    made = {}

    def references(file, *words, model=base_model):
        loss = ("--dpo", 1, "--rlhf_train_file", file, "--random_mode", 0, "--micro_bsz", 24)
        config = parse([str(w) for w in (*typed, *loss, "--load_model", model, "--enable_progress_bar", 0, *words)])
        ready = made.setdefault(model, start(config, tmp_path))
        return Inputs(config, ready, tmp_path).training().micro_batch(0).reference

    true = references(pairs_csv)
    others = references(pairs_csv, model=other_model)
    assert true.shape == (24, 2) and not torch.allclose(true, others, atol=0.1)
    assert torch.equal(references(pairs_csv, "--reference_model", other_model), others)

    saved = tmp_path / "pairs.save"
    script_words = ["--load_model", base_model, "--vocab_file", typed[3], "--input_csv", pairs_csv]
    words = [*script_words, "--output_save", saved, "--target_pair_count", 24, "--strategy", "cpu fp32"]
    score_pairs.main([str(word) for word in words])
    ours = json.loads((tmp_path / "pairs.save.json").read_text())
    pairs = read_save(saved, DataReport(str(saved)))
    claimed = torch.tensor([[-1.0 - n, -60.0 + n] for n in range(24)])
    told = [type(p)(p.prompt, p.chosen, p.reject, tuple(c)) for p, c in zip(pairs, claimed.tolist())]
    truth = references(saved)
    assert torch.allclose(truth, torch.tensor([pair.reference for pair in pairs]))

    def believed(about, *words):
        write_save(saved, told, ours | about)
        found = references(saved, *words)
        assert torch.equal(found, claimed) or torch.allclose(found, truth, atol=1e-3)
        return torch.equal(found, claimed)

    assert believed({})
    foreign = [{"model": file_hash(other_model)}, {"model": None}, {"precision": "bf16"}, {"storage": "nf4"}]
    for about in (*foreign, {"reference": "mean"}, {"reference": None}):
        assert not believed(about), about
        assert believed(about, "--trust_reference", 1), about
    write_save(saved, told, ours)
    assert torch.allclose(references(saved, "--reference_model", other_model).sum(), others.sum(), atol=1e-2)
    sidecar = (tmp_path / "pairs.save.json").read_text()
    write_save(saved, [*told[:-1], pairs[-1]], ours)
    (tmp_path / "pairs.save.json").write_text(sidecar)  # of another file
    assert torch.allclose(references(saved), truth, atol=1e-3)
    (tmp_path / "pairs.save.json").unlink()
    assert torch.allclose(references(saved), truth, atol=1e-3)
    assert not torch.allclose(references(saved, "--trust_reference", 1), truth, atol=1)
    with pytest.raises(ValueError, match="--trust_reference 1"):
        references(pairs_csv, "--trust_reference", 1)


def test_prepared_scores_are_those_of_the_first_step(script, go, typed, base_model, other_model, pairs_csv, tmp_path):
    """If this breaks, prepared scores are not the policy's own, and DPO starts away from its reference."""
    saved, beta = tmp_path / "pairs.save", 0.01
    words = ["--load_model", base_model, "--vocab_file", typed[3], "--input_csv", pairs_csv, "--output_save", saved]
    words += ["--target_pair_count", 30, "--strategy", "cpu fp32"]
    status, _, err = script(score_pairs.main, *words)
    assert status == 0, err
    run = ["--dpo", 1, "--dpo_beta", beta, "--rlhf_train_file", saved, "--micro_bsz", 15, "--epoch_steps", 2]
    run += ["--accumulate_grad_batches", 2]
    folder = go("same", *run)
    (first,) = read_jsonl(folder / "metrics.jsonl", "train")
    assert abs(first["reward_margin"]) / beta < 1e-4
    assert not list(folder.glob("cache/*"))  # the file's scores were used, none were computed
    folder = go("other", *run, "--reference_model", other_model)
    (first,) = read_jsonl(folder / "metrics.jsonl", "train")
    assert abs(first["reward_margin"]) / beta > 0.05


def test_sigterm_saves_and_is_no_success(typed, text_jsonl, tmp_path):
    """If this breaks, a job that the queue ends loses what it learnt, or counts as done."""
    words = [*typed, "--proj_dir", tmp_path, "--sft", 1, "--data_file", text_jsonl, "--epoch_steps", 100000]
    process = started("train.py", *words)
    deadline = time.monotonic() + 120
    while not has_stepped(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    assert weights(tmp_path, "last")["emb.weight"].shape == (VOCAB, 64)
    assert (tmp_path / "rwkv-last.json").exists()
    assert not (tmp_path / "rwkv-final.pth").exists()
    assert process.returncode == 1, err  # 1 is everything but done, a mistake, Ctrl+C
