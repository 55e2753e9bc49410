"""The commands that users type, flag by flag, one after the other on a two-layer model; only paths and sizes differ."""

import json
import math
import shlex
from pathlib import Path

import pytest
import torch

from rwkv_rlhf.commands import chat, generate_rejects, make_binidx, merge, prepare_pairs, score_pairs, train
from rwkv_rlhf.model import VERSIONS
from tests.support.files import VOCAB, read_jsonl

pytestmark = pytest.mark.slow

PROFILE = Path(__file__).resolve().parents[2] / "layerprofile" / "2_TEST.csv"
COMMON = f"""--wandb "" --vocab_size {VOCAB} --epoch_begin 0 --epoch_save 1 --n_layer 2 --n_embd 64 --lr_init 5e-4
 --lr_final 1e-4 --warmup_steps 2 --beta1 0.9 --beta2 0.999 --adam_eps 1e-8 --accelerator auto --devices 1
 --precision bf16 --grad_cp 1 --quant 1 --quant_mode 'nf4' --gpu_arch 'cuda'"""
DPO = """--infctx 0 --ctx_len 256 --epoch_steps 6 --epoch_count 2 --micro_bsz 2 --dpo 1 --dpo_alpha 0.1 --dpo_beta 0.01
 --rlhf_max_corpus_len 64 --accumulate_grad_batches 3"""
ORPO = """--ctx_len 256 --epoch_steps 4 --epoch_count 1 --micro_bsz 2 --orpo 1 --orpo_alpha 0.0004 --orpo_mode 1
 --rlhf_max_corpus_len 64"""


@pytest.fixture
def run(script, base_of, vocab_file, tmp_path):
    """run(main, words, version) with a model of this version ("" = none) and the vocabulary; it must succeed."""

    def call(main, words, version="x070"):
        words = shlex.split(words) if isinstance(words, str) else list(map(str, words))
        start = ["--load_model", base_of(version)] if version else []
        status, out, err = script(main, *start, "--vocab_file", vocab_file, *words)
        assert status == 0, err
        return out, err

    return call


@pytest.mark.parametrize(
    ("version", "sharing"), [("x060", "--strategy deepspeed_stage_2_offload"), ("x070", "--strategy auto")]
)
def test_prepare_dpo_merge_and_talk(run, script, pairs_csv, base_of, vocab_file, tmp_path, version, sharing):
    """If this breaks, the main road of this program is closed."""
    saved, folder = tmp_path / "pairs.save", tmp_path / "dpo"
    words = ["--input_csv", pairs_csv, "--output_save", saved, "--target_pair_count", 60]
    run(score_pairs.main, words, version)
    records = torch.load(saved, weights_only=True)
    assert len(records) == 60 and all(len(record) == 5 and record[3] < 0 for record in records)
    files = ["--proj_dir", folder, "--layer_profile", PROFILE, "--rlhf_train_file", saved]
    run(train.main, [*shlex.split(f"{COMMON} {DPO} --my_testing {version} {sharing}"), *files], version)
    steps = read_jsonl(folder / "metrics.jsonl", "train")
    assert len(steps) == 4 and abs(steps[0]["reward_margin"]) < 1e-3
    sidecar = json.loads((folder / "rwkv-1.json").read_text())
    assert sidecar["quant_mode"] == "nf4" and sidecar["adapted"]
    merged = tmp_path / "merged.pth"
    status, out, err = script(
        merge.main, "--base_model", base_of(version), "--lora_checkpoint", folder / "rwkv-1.pth", "--output", merged
    )
    assert status == 0 and "check:" in out, err
    (tmp_path / "in.jsonl").write_text('{"prompt": "say 3"}\n{"prompt": "say 4"}\n')
    asked = ["--prompt_file", tmp_path / "in.jsonl", "--temperature", 0, "--max_tokens", 8, "--strategy", "cpu fp32"]
    status, _, err = script(
        chat.main,
        *("--load_model", merged, "--vocab_file", vocab_file, "--output", tmp_path / "out.jsonl", *asked),
    )
    assert status == 0, err
    run(chat.main, [*asked, "--load_adapter", folder / "rwkv-1.pth", "--output", tmp_path / "both.jsonl"], version)
    for name in ("out.jsonl", "both.jsonl"):
        answers = read_jsonl(tmp_path / name)
        assert [set(a) for a in answers] == [{"prompt", "answer", "tokens", "logprobs"}] * 2
        assert all(len(a["tokens"]) == len(a["logprobs"]) > 0 and max(a["logprobs"]) <= 0 for a in answers)


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_prepare_orpo_and_train_on_the_file(run, pairs_csv, tmp_path, version):
    """If this breaks, the ORPO recipe with its tiny alpha and summed scores does not run."""
    saved, folder = tmp_path / "orpo.save", tmp_path / "orpo"
    words = ["--input_csv", pairs_csv, "--output_save", saved, "--target_pair_count", 100]
    run(prepare_pairs.main, words, version)
    assert {tuple(record[3:]) for record in torch.load(saved, weights_only=True)} == {(0.5, 0.5)}
    files = ["--proj_dir", folder, "--layer_profile", PROFILE, "--rlhf_train_file", saved]
    run(train.main, [*shlex.split(f"{COMMON} {ORPO} --my_testing {version}"), *files], version)
    steps = read_jsonl(folder / "metrics.jsonl", "train")
    assert len(steps) == 4
    for step in steps:
        assert step["loss"] == pytest.approx(step["ce"] + 0.0004 * step["orpo"], rel=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_lora_recipe_on_text(run, text_jsonl, tmp_path, version):
    """If this breaks, `--lora` trains nothing in this version, or too much."""
    words = """--sft 1 --lora --lora_r 4 --lora_alpha 8 --lora_dropout 0.01 --lora_parts att,ffn,time,ln --ctx_len 64
 --micro_bsz 4 --epoch_steps 4 --epoch_count 1 --epoch_save 1 --lr_init 5e-3 --lr_final 5e-3 --pre_ffn 0 --head_qk 0"""
    typed = {"x052": "--my_testing r3r4", "x050": "", "x051": "", "x070a": ""}.get(version, f"--my_testing {version}")
    files = ["--data_file", text_jsonl, "--proj_dir", tmp_path]
    run(train.main, [*shlex.split(f"{words} {typed}"), *files], version)
    steps = read_jsonl(tmp_path / "metrics.jsonl", "train")
    assert len(steps) == 4 and steps[-1]["loss"] < steps[0]["loss"]
    saved = torch.load(tmp_path / "rwkv-0.pth", weights_only=True)
    assert {"blocks.1.ffn.value.lora_A", "blocks.0.att.output.lora_B", "blocks.1.ln2.bias"} <= saved.keys()
    assert json.loads((tmp_path / "rwkv-0.json").read_text())["version"] == version


@pytest.mark.parametrize("version", ["x052", "x060", "x070"])
def test_binidx_and_pre_training_by_magic_prime(run, script, text_jsonl, vocab_file, tmp_path, version):
    """If this breaks, a corpus made here cannot be pre-trained on."""
    corpus, folder = tmp_path / "corpus", tmp_path / "pre"
    words = ["--input", text_jsonl, "--output", corpus, "--ctx_len", 16, "--vocab_size", VOCAB]
    run(make_binidx.main, words, "")
    sizes = shlex.split(f"--my_testing {version} --n_layer 2 --n_embd 64 --vocab_size {VOCAB} --load_model 0")
    status, _, err = script(train.main, *sizes, "--train_stage", 1, "--proj_dir", folder)
    assert status == 0, err
    words = """--data_type binidx --ctx_len 16 --micro_bsz 4 --epoch_steps 5 --epoch_count 2 --epoch_save 1
 --lr_init 3e-3 --lr_final 1e-3 --precision fp32 --weight_decay 0.1 --my_exit_tokens 512 --load_model 0
 --train_stage 3"""
    run(train.main, [*shlex.split(words), "--proj_dir", folder, "--data_file", corpus], "")
    steps = read_jsonl(folder / "metrics.jsonl", "train")
    assert len(steps) == 8 and steps[-1]["loss"] < steps[0]["loss"]
    saved = [torch.load(folder / name, weights_only=True) for name in ("rwkv-init.pth", "rwkv-final.pth")]
    assert saved[0].keys() == saved[1].keys()  # RWKV-LM loads strictly, also what block 0 of RWKV-7 does not use
    assert not (folder / "rwkv-2.pth").exists()
    words = words.replace("--my_exit_tokens 512", "--my_exit_tokens 700") + " --epoch_begin 0"  # as RWKV-LM's scripts
    run(train.main, [*shlex.split(words), "--proj_dir", folder, "--data_file", corpus], "")
    assert (folder / "rwkv-2.pth").exists()
    steps = read_jsonl(folder / "metrics.jsonl", "train")
    assert len(steps) == 8 + 1  # 11 steps of 64 tokens in all, 10 of them in the two mini-epochs that are done


@pytest.fixture
def tokenizer_json(tmp_path):
    """A byte-level BPE vocabulary with an end-of-text token 0, as the one of the RWKV-4 Pile models."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|endoftext|>"], initial_alphabet=letters, show_progress=False
    )
    made.train_from_iterator(["say gladly: no, line abc abc ok"] * 20, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json", made.get_vocab_size()


def test_rwkv_4_from_zero_with_a_tokenizer_json(script, tokenizer_json, text_jsonl, pairs_csv, tmp_path):
    """If this breaks, the models of the Pile, with their vocabulary of 50277, cannot be made, tuned or talked to."""
    vocabulary, size = tokenizer_json
    folder, corpus, saved = tmp_path / "zero", tmp_path / "corpus", tmp_path / "pairs.save"
    vocab = ["--vocab_file", vocabulary]

    def go(main, *words):
        status, out, err = script(main, *words)
        assert status == 0, err
        return out

    sizes = shlex.split(f"--my_testing x040 --n_layer 2 --n_embd 64 --vocab_size {size} --load_model 0")
    go(train.main, *sizes, "--train_stage", 1, "--proj_dir", folder, *vocab)
    go(make_binidx.main, "--input", text_jsonl, "--output", corpus, "--ctx_len", 16, "--vocab_size", size, *vocab)
    run = shlex.split("--ctx_len 16 --micro_bsz 4 --epoch_steps 6 --epoch_count 1 --epoch_save 1 --precision fp32")
    rates = shlex.split("--lr_init 1e-2 --lr_final 1e-2")
    data = ["--data_file", corpus, "--data_type", "binidx", "--proj_dir", folder]
    go(train.main, *sizes, "--train_stage", 3, *run, *rates, *data, *vocab)
    steps = read_jsonl(folder / "metrics.jsonl", "train")
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    model = ["--load_model", folder / "rwkv-final.pth", *vocab]
    prepare = ["--input_csv", pairs_csv, "--output_save", saved, "--target_pair_count", 24]
    go(score_pairs.main, *model, *prepare)
    tuned = tmp_path / "dpo"
    dpo = ["--dpo", 1, "--rlhf_train_file", saved, "--proj_dir", tuned, "--peft", "lora", "--quant", 0, "--my_testing"]
    go(train.main, *model, *run, *dpo, "x040")
    assert abs(read_jsonl(tuned / "metrics.jsonl", "train")[0]["reward_margin"]) < 1e-3
    (tmp_path / "in.jsonl").write_text('{"prompt": "say 3"}\n')
    asked = ["--prompt_file", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--max_tokens", 6]
    go(chat.main, *model, "--load_adapter", tuned / "rwkv-final.pth", *asked)
    assert all(0 <= token < size for token in read_jsonl(tmp_path / "out.jsonl")[0]["tokens"])
    rejects = ["--input_csv", pairs_csv, "--output_csv", tmp_path / "rejects.csv", "--max_tokens", 4]
    go(generate_rejects.main, *model, *rejects, "--overwrite", 1)
    go(prepare_pairs.main, *model, "--input_csv", pairs_csv, "--output_save", tmp_path / "orpo.save")


RWKV5 = f"""--wandb "" --ctx_len 32 --epoch_count 2 --epoch_begin 0 --epoch_steps 4 --data_type binidx
 --vocab_size {VOCAB} --epoch_save 1 --micro_bsz 1 --n_layer 2 --n_embd 64 --pre_ffn 0 --head_qk 0 --lr_init 5e-6
 --lr_final 1e-6 --warmup_steps 50 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8 --accelerator auto --devices 1
 --precision bf16 --grad_cp 0 --accumulate_grad_batches 2 --enable_progress_bar True --ds_bucket_mb 200 --dpo 1
 --my_testing r3r4 --strategy deepspeed_stage_2 --dpo_general_corpus_ratio 0.8 --dpo_beta 0.02"""


def test_dpo_with_a_general_corpus_as_on_rwkv5(run, pairs_csv, text_jsonl, tmp_path):
    """If this breaks, the RWKV-5 recipe (pairs in trainset.save, general text in a binidx corpus) does not run."""
    corpus, folder = tmp_path / "corpus", tmp_path / "dpo"
    words = ["--input", text_jsonl, "--output", corpus, "--ctx_len", 32, "--vocab_size", VOCAB]
    run(make_binidx.main, words, "")
    words = ["--input_csv", pairs_csv, "--output_save", tmp_path / "trainset.save", "--split", "0.8,0.1,0.1"]
    run(score_pairs.main, [*words, "--target_pair_count", 24], "x052")
    assert (tmp_path / "validset.save").exists() and (tmp_path / "testset.save").exists()
    files = ["--data_file", corpus, "--dpo_train_file", tmp_path / "trainset.save", "--proj_dir", folder]
    run(train.main, [*shlex.split(RWKV5), *files, "--val_file", tmp_path / "validset.save"], "x052")
    steps = read_jsonl(folder / "metrics.jsonl", "train")
    assert len(steps) == 4
    for step in steps:
        assert step["loss"] == pytest.approx(0.8 * step["general_nll"] + 0.2 * step["dpo"], rel=1e-5)
    held_out = read_jsonl(folder / "metrics.jsonl", "val")
    scored = torch.load(tmp_path / "validset.save", weights_only=True)
    assert len(held_out) == 2 and [record["pairs"] for record in held_out] == [len(scored)] * 2
    for record in held_out:  # rates this small hardly move a bf16 model: what it scores is what was scored before
        assert record["reward_margin"] == pytest.approx(0.02 * record["logp_margin"], rel=1e-4)
        assert record["chosen_logp"] == pytest.approx(sum(row[3] for row in scored) / len(scored), rel=0.01)
        assert record["reject_logp"] == pytest.approx(sum(row[4] for row in scored) / len(scored), rel=0.01)


def softplus(x):
    return math.log1p(math.exp(x))


# the loss of a step of one pair, from what the step logs (rewards include beta); SimPO's gamma is 1
OF_ONE_PAIR = {
    "simpo": lambda step: softplus(1.0 - step["reward_margin"]),
    "cpo": lambda step: softplus(-step["reward_margin"]) + step["ce"],
    "wpo": lambda step: step["pair_weight"] * softplus(-step["reward_margin"]),
}


@pytest.mark.parametrize("loss", ["simpo", "cpo", "wpo", "kto"])
def test_the_other_preference_losses_as_the_page_shows_them(run, script, base_model, pairs_csv, tmp_path, loss):
    """If this breaks, --simpo 1 and its kin do not train a packed model by layer profile by their formula, keep the
    best checkpoint, or what they save cannot be merged."""
    words = shlex.split(f"{COMMON} --ctx_len 256 --epoch_steps 4 --epoch_count 1 --micro_bsz 1 --{loss} 1")
    folder = tmp_path / loss
    files = ["--proj_dir", folder, "--layer_profile", PROFILE, "--rlhf_train_file", pairs_csv]
    run(train.main, [*words, *files, "--val_file", pairs_csv])
    steps = read_jsonl(folder / "metrics.jsonl", "train")
    assert len(steps) == 4
    for step in steps:
        if loss in OF_ONE_PAIR:
            assert step["loss"] == pytest.approx(OF_ONE_PAIR[loss](step), rel=1e-3), step
    if loss == "kto":  # the first step: the policy is the reference, so each answer costs sigmoid(0)
        assert steps[0]["loss"] == pytest.approx(0.5, abs=1e-4)
    merging = ("--base_model", base_model, "--lora_checkpoint", folder / "rwkv-best.pth")
    status, out, err = script(merge.main, *merging, "--output", tmp_path / "merged.pth")
    assert status == 0 and "check: logits of merged" in out, err
