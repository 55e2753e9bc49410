"""Defects of the older programs that no other file looks at; tests/house/test_old_traps.py lists them all."""

import json
import os
import subprocess
import sys

import pytest
import torch

from rwkv_rlhf.checkpoints.loading import BuildOptions, load_adapter, load_model
from rwkv_rlhf.checkpoints.tensor_files import read_tensors
from rwkv_rlhf.commands import train
from rwkv_rlhf.data.pairs.save import read_save
from rwkv_rlhf.data.report import DataReport
from rwkv_rlhf.plan import read_profile
from tests.support.files import VOCAB
from tests.support.source_files import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture
def go(script, base_model, vocab_file, tmp_path):
    """go(folder, words): a run that must succeed, and its training records."""

    def call(name, *words):
        start = ["--load_model", base_model, "--vocab_file", vocab_file, "--proj_dir", tmp_path / name]
        start += ["--precision", "fp32", "--quant", 0, "--ctx_len", 64, "--grad_cp", 0]
        status, _, err = script(train.main, *start, *words)
        assert status == 0, err
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["event"] == "train"]

    return call


RATES = ("--lr_init", "1e-3", "--lr_final", "1e-5", "--warmup_steps", 1, "--micro_bsz", 1, "--epoch_count", 1)


def test_accumulation_does_not_stretch_the_schedule(go, text_jsonl):
    """The rate falls from the first to the last with the optimizer steps that there are, not with micro-batches."""
    data = ("--sft", 1, "--data_file", text_jsonl, *RATES)
    plain = [step["lr"] for step in go("plain", *data, "--epoch_steps", 4)]
    summed = [step["lr"] for step in go("summed", *data, "--epoch_steps", 12, "--accumulate_grad_batches", 3)]
    assert len(plain) == 4 and summed == pytest.approx(plain) and plain[-1] < plain[1] / 10


def test_the_logged_rate_is_the_one_used(go, text_jsonl, monkeypatch):
    """Seen in the optimizer itself, at each step."""
    used = []
    step = torch.optim.AdamW.step

    def spy(self, *rest, **named):
        done = step(self, *rest, **named)  # the rate is set within, by the closure that runs the model
        used.append(max(group["lr"] for group in self.param_groups))
        return done

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    words = ("--sft", 1, "--data_file", text_jsonl, *RATES, "--epoch_steps", 4, "--layerwise_lr", 0)
    assert [record["lr"] for record in go("out", *words)] == pytest.approx(used) and len(set(used)) == 4


@pytest.mark.parametrize("version", ["x052", "x060", "x070"])
def test_a_state_means_the_same_to_every_backend(base_of, version):
    """A state that one backend left is taken up by another; a transposed one would show in the next token."""
    tokens = torch.tensor([[5, 9, 2, 7]])
    models = [load_model(base_of(version), BuildOptions(torch.float32, wkv_backend=b))[0] for b in ("naive", "cpu")]
    with torch.no_grad():
        states = [model(tokens)[1] for model in models]
        found = [model(tokens, state)[0] for model in models for state in states]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


def test_pairs_stay_together_whatever_the_hash_seed(tmp_path, vocab_file):
    """Prompt, chosen and reject of a row stay in one record, the same in every process."""
    rows = "".join(f"say {n},yes {n},no {n}\n" for n in range(20))
    (tmp_path / "in.csv").write_text("prompt,chosen,reject\n" + rows)
    files = []
    for seed in ("0", "77"):
        files.append(tmp_path / f"{seed}.save")
        words = [
            sys.executable,
            "PrepareOrpoDataset.py",
            "--input_csv",
            tmp_path / "in.csv",
            "--output_save",
            files[-1],
        ]
        words += ["--target_pair_count", "30", "--vocab_file", vocab_file, "--vocab_size", str(VOCAB)]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(list(map(str, words)), env=environment, cwd=ROOT, check=True, capture_output=True)
    one, two = (read_save(path, DataReport("")) for path in files)
    assert one == two and len(one) == 30
    for pair in one:
        said = [bytes(i - 1 for i in part).decode().split() for part in (pair.prompt, pair.chosen, pair.reject)]
        assert said[0][2] == said[1][1] == said[2][1] and (said[1][0], said[2][0]) == ("yes", "no")


def test_a_run_without_a_word_about_saving_saves(go, tmp_path, text_jsonl):
    """The weights of the last mini-epoch are there when a run ends."""
    go("out", "--sft", 1, "--data_file", text_jsonl, "--epoch_steps", 2, "--epoch_count", 2, "--micro_bsz", 2)
    saved = [path for path in (tmp_path / "out").glob("rwkv-*.pth") if path.stat().st_size]
    assert "rwkv-1.pth" in [path.name for path in saved]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_an_embedding_that_trained_is_loaded(go, base_model, tmp_path, text_jsonl, mode):
    """Its rows or its adapter go on where they were; without them a resumed run begins with the base's words."""
    header = "Layer,Mode,Rank,Alpha,Dropout,Weight_lr_init,Weight_lr_final,Weight_decay,State_lr_init,State_lr_final"
    rows = [f"{layer},{mode if layer == 'emb' else 'freeze'},4,8,0,1e-2,1e-2,0,0,0," for layer in ("emb", 0, 1, "head")]
    (tmp_path / "profile.csv").write_text("\n".join([header + ",RejectParts", *rows]) + "\n")
    words = ["--sft", 1, "--data_file", text_jsonl, "--micro_bsz", 2, "--layer_profile", tmp_path / "profile.csv"]
    begun = go("out", *words, "--epoch_steps", 3, "--epoch_count", 1)
    trained = read_tensors(tmp_path / "out" / "rwkv-0.pth")
    plan = read_profile(str(tmp_path / "profile.csv"), 2, lr_init=0.0, lr_final=0.0, weight_decay=0.0)
    model, _ = load_model(base_model, BuildOptions(torch.float32, plan=plan))
    load_adapter(model, tmp_path / "out" / "rwkv-0.pth")
    held = dict(model.named_parameters())
    names = [name for name in trained if name.startswith("emb.")]
    assert names and all(torch.equal(held[name], trained[name]) for name in names)
    base = read_tensors(base_model)
    if mode == "full":
        assert not torch.equal(trained["emb.weight"], base["emb.weight"])
    else:
        assert trained["emb.lora_A"].abs().sum() > 0 and trained["emb.lora_B"].abs().sum() > 0
    one = ("--epoch_steps", 1, "--epoch_count", 1)
    (first,) = go("again", *words, *one, "--load_adapter", tmp_path / "out" / "rwkv-0.pth")
    assert first["tokens"] == begun[0]["tokens"]  # the same texts, which the loaded rows know by now
    assert first["loss"] < begun[0]["loss"] - 0.01
