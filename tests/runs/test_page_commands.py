"""Every command of every page runs, on a model of two layers and with small numbers in place of the page's."""

import io
import json
import re
import shutil

import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch

from rwkv_rlhf.commands import NAMED, run_command, train
from tests.support.files import VOCAB, jsonl, write_csv
from tests.support.models import any_initial_tensors
from tests.support.source_files import PAGES, ROOT, name_of
from tests.support.written_commands import WRITTEN_IN

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SHORT = {  # flag -> what stands in place of the page's value
    **{"--epoch_steps": "2", "--epoch_count": "3", "--target_pair_count": "4"},
    **dict.fromkeys(("--accumulate_grad_batches", "--devices", "--ppo_epochs", "--grpo_rollout_steps"), "1"),
    **dict.fromkeys(("--grpo_gen_count", "--batch_size", "--mini_batch_size", "--steps", "--n_layer"), "2"),
    **dict.fromkeys(("--grpo_gen_length", "--output_max_length", "--max_tokens", "--top_k"), "4"),
    **{"--ctx_len": "96", "--chunk_ctx": "32", "--n_embd": "64", "--vocab_size": str(VOCAB), "--precision": "fp32"},
    **{
        "--micro_bsz": "2",
        "--dry_run_shape": "L2-D64",
        "--epochs": "0.1",
        "--layer_profile": "layerprofile/2_TEST.csv",
    },
    **{
        "--layer_filter": "0 0.2*1 head",
        "--num_train_epochs": "0.1",
        "--gradient_accumulation_steps": "1",
        "--lora_r": "16",
    },
}
ELSEWHERE = {  # what a page shows and this test does not do
    "--doctor": "tests/commands/test_doctor.py",
    "--schema": "tests/settings/test_config_file.py",
    "--num_nodes": "tests/runs/test_nodes.py",
    "OLD.pth": "tests/commands/test_merge.py",
    "P/again.gguf": "of models with the World vocabulary: tests/commands/test_merge.py",
    "...": "an excerpt",
}
SERVERS = {"serve": "tests/serving/test_completions.py", "label": "tests/serving/test_label.py"}  # they never end
HAVE_VOCABULARY = ("train", "chat", "score", "export", "generate_rejects", "score_pairs", "prepare_pairs", "sft_h5")
HAVE_VOCABULARY += ("distillation_h5", "make_binidx", "finetune_clm", "reward_modeling", "rl_training")
TRAINED = "trained"  # the folder of a run, P, that these pages suppose
SUPPOSE_A_RUN = {"merging.md": ("P",), "exporting.md": ("P",), "talking.md": ("P",), "report.md": ("P", "P2")}
SHOWN = [page for page in PAGES if page.parent.name == "docs" or name_of(page) == "README.md"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, vocab_file):
    """A folder with what the pages suppose: models M and T, small files, the examples and the profiles."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("example", "layerprofile"):
        shutil.copytree(ROOT / name, folder / name)
    for seed, name in ((7, "M"), (8, "T")):
        tensors = any_initial_tensors("x070", 2, 64, VOCAB, 64, seed)
        generator = torch.Generator().manual_seed(seed)
        torch.save(
            {n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()},
            folder / f"{name}.pth",
        )
    pairs = [[f"say {n}", f"gladly: {n}", f"no {n}"] for n in range(24)]
    write_csv(folder / "pairs.csv", pairs)
    for name in ("pairs", "heldout"):
        write_csv(folder / "example" / "DPO" / f"{name}.csv", pairs)
    jsonl(folder / "orca.jsonl", *({"system": "", "question": q, "chosen": c, "rejected": r} for q, c, r in pairs))
    jsonl(
        folder / "chats.jsonl",
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    )
    jsonl(folder / "lambada_test.jsonl", {"text": "the last word"}, {"text": "of two passages"})
    (folder / "ultra").mkdir()
    rows = {"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]}
    parquet.write_table(pyarrow.table(rows), folder / "ultra" / "a.parquet")
    (folder / "alpaca.json").write_text(json.dumps([{"instruction": "Add.", "input": "2 and 3", "output": "5"}]))
    for name in ("corpus", "documents"):
        jsonl(folder / "example" / "pretrain" / f"{name}.jsonl", *({"text": f"line {n} " * 30} for n in range(60)))
    shared = [
        "--load_model",
        str(folder / "M.pth"),
        "--vocab_file",
        str(vocab_file),
        "--accelerator",
        "cpu",
        "--peft",
        "lora",
    ]
    shared += [
        "--data_file",
        str(folder / "chats.jsonl"),
        "--limited_lora",
        "1",
        "--epoch_steps",
        "2",
        "--epoch_count",
        "1",
    ]
    train.main([*shared, "--proj_dir", str(folder / TRAINED / "P"), "--ctx_len", "64", "--quant", "0"])
    return folder


def shortened(command, vocab_file):
    """The words of a command with small numbers, the tiny model and its vocabulary."""
    words = [{"M": "M.pth", "T": "T.pth"}.get(word, word) for word in command.words]
    words = [SHORT.get(flag, word) for flag, word in zip(["", *words], words)]
    name = NAMED[command.name]
    if name in HAVE_VOCABULARY and "--dry_run_shape" not in words:
        words += ["--vocab_file", str(vocab_file)]
    if name == "export":
        words += ["--check", "0"]  # judged in tests/checkpoints/test_exporting.py
    if name == "rl_training":
        words += ["--steps", "2"]
    if name == "score":
        words += ["--skip_bad", "1"]  # what an untrained model answers may be empty
    if name in ("chat", "generate_rejects"):
        words += ["--max_tokens", "4"]
    if name == "train" and not {
        "--epoch_steps",
        "--epochs",
        "--ppo",
        "--eval_only",
        "--train_stage",
        "--dry_run_shape",
    } & set(words):
        words += ["--epoch_steps", "4", "--epoch_count", "1"]
    return words


@pytest.mark.parametrize("page", [page for page in SHOWN if WRITTEN_IN[page]], ids=name_of)
def test_what_a_reader_copies_runs(page, place, vocab_file, tmp_path, monkeypatch, capsys):
    """If this breaks, somebody who follows a page from its first command to its last is left alone with an error."""
    work = tmp_path / "work"
    work.mkdir()
    for path in place.iterdir():
        if path.name != TRAINED:
            (work / path.name).symlink_to(path)
    for name in SUPPOSE_A_RUN.get(page.name, ()):
        shutil.copytree(place / TRAINED / "P", work / name)
    monkeypatch.chdir(work)
    ran = 0
    for command in WRITTEN_IN[page]:
        if (
            "/" in command.name
            or command.name in SERVERS
            or any(re.search(rf"(^| ){re.escape(word)}", " ".join(command.words)) for word in ELSEWHERE)
        ):
            continue
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
        with pytest.raises(SystemExit) as done:
            run_command(command.name, shortened(command, vocab_file))
        _, err = capsys.readouterr()
        assert done.value.code in (0, None), f"{command.place}: {command.name} {' '.join(command.words)}\n{err[-2000:]}"
        ran += 1
    assert ran or page.name in ("extending.md", "kernels.md", "architecture.md")
