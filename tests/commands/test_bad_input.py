"""The mistakes that people make: each gives one sentence with file, line or flag, exit status 2, and no damage."""

import os
import zipfile

import pytest
import torch

from rwkv_rlhf.commands import merge, train
from tests.support.files import write_csv


def test_a_csv_without_chosen(refused, typed, tmp_path):
    """If this breaks, a missing column is not named."""
    file = write_csv(tmp_path / "pairs.csv", [["a", "b"]], ["prompt", "reject"])
    refused([*typed, "--dpo", 1, "--rlhf_train_file", file], file, "chosen")


def test_an_empty_answer_in_row_7(refused, typed, tmp_path):
    """If this breaks, an empty answer is trained on, or a user must search for its line."""
    rows = [[f"q{n}", "yes" if n != 7 else "", "no"] for n in range(1, 10)]
    file = write_csv(tmp_path / "pairs.csv", rows)
    refused([*typed, "--orpo", 1, "--rlhf_train_file", file], f"{file}:8", "chosen", "empty")


def test_a_profile_with_11_rows_for_12_layers(refused, typed, tmp_path, pairs_csv, base_model):
    """If this breaks, a layer that the profile forgot trains, or stays out, by guess."""
    tensors = torch.load(base_model, weights_only=True)
    deep = {name: value for name, value in tensors.items() if not name.startswith("blocks.1.")}
    for layer in range(1, 12):
        deep |= {n.replace("blocks.1.", f"blocks.{layer}."): v for n, v in tensors.items() if n.startswith("blocks.1.")}
    torch.save(deep, tmp_path / "deep.pth")
    header = "Layer,Mode,Rank,Alpha,Dropout,Weight_lr_init,Weight_lr_final,Weight_decay,State_lr_init,State_lr_final"
    rows = [f"{layer},lora,4,8,0,1e-4,1e-5,0,0,0," for layer in ("emb", *range(11), "head")]
    profile = tmp_path / "profile.csv"
    profile.write_text("\n".join([header + ",RejectParts", *rows]) + "\n")
    words = [*typed, "--load_model", tmp_path / "deep.pth", "--layer_profile", profile]
    refused([*words, "--dpo", 1, "--rlhf_train_file", pairs_csv], profile, "11", "12")


def test_an_unknown_flag_names_the_nearest(refused, typed):
    """If this breaks, a misspelt flag is ignored and its default used."""
    refused([*typed, "--mico_bsz", 4], "--mico_bsz", "--micro_bsz")


def broken_checkpoints(tmp_path, base_model):
    whole = base_model.read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    torch.save({"layer.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    (tmp_path / "words.pth").write_text("this is no checkpoint")
    return {"missing.pth": "does not exist", "cut.pth": "cut.pth", "other.pth": "RWKV", "words.pth": "words.pth"}


@pytest.mark.parametrize("name", ["missing.pth", "cut.pth", "other.pth", "words.pth"])
def test_a_checkpoint_that_is_none(refused, typed, tmp_path, pairs_csv, base_model, name):
    """If this breaks, a file that is cut off or of another kind ends in a traceback of the reader."""
    said = broken_checkpoints(tmp_path, base_model)[name]
    words = [*typed, "--load_model", tmp_path / name, "--dpo", 1, "--rlhf_train_file", pairs_csv]
    refused(words, tmp_path / name, said)
    refused(
        ["--base_model", tmp_path / name, "--lora_checkpoint", base_model, "--output", tmp_path / "o.pth"],
        tmp_path / name,
        main=merge.main,
    )


class Foreign:
    """Pickles as a call of os.system: what must never run."""

    def __reduce__(self):
        return os.system, ("touch executed-by-a-pickle",)


def test_a_save_that_holds_code(refused, typed, tmp_path, monkeypatch):
    """If this breaks, opening somebody's pair file runs their program."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "evil.save"
    torch.save([([1], [2], [3], 0.5, Foreign())], file)
    refused([*typed, "--dpo", 1, "--rlhf_train_file", file], file, "system")
    assert not (tmp_path / "executed-by-a-pickle").exists()


def test_a_checkpoint_that_holds_code(refused, typed, tmp_path, pairs_csv, monkeypatch):
    """If this breaks, opening somebody's model runs their program."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "evil.pth"
    torch.save({"emb.weight": Foreign()}, file)
    refused([*typed, "--load_model", file, "--dpo", 1, "--rlhf_train_file", pairs_csv], file)
    with zipfile.ZipFile(file) as archive:  # the same, as a bare pickle
        data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    file.write_bytes(data)
    refused([*typed, "--load_model", file, "--dpo", 1, "--rlhf_train_file", pairs_csv], file)
    assert not (tmp_path / "executed-by-a-pickle").exists()


def test_a_folder_that_cannot_be_written(refused, typed, tmp_path, pairs_csv):
    """If this breaks, a run notices at its first save that it cannot save."""
    (tmp_path / "a file").write_text("in the way")
    folder = tmp_path / "a file" / "out"
    refused([*typed, "--proj_dir", folder, "--dpo", 1, "--rlhf_train_file", pairs_csv], "--proj_dir", folder)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ctx_len", 0], ["--ctx_len", "0"]),
        (["--orpo", 1], ["--orpo 1", "--dpo 1"]),
        (["--n_layer", 3], ["3", "2", "n_layer"]),
        (["--my_testing", "x060"], ["--my_testing", "x060", "x070"]),
        (["--precision", "fp8"], ["--precision", "fp8", "bf16"]),
        (["--accelerator", "gpu"], ["--accelerator gpu"]),
        (["--optim", "muon", "--strategy", "fsdp"], ["--optim muon", "--strategy fsdp"]),
        (["--micro_bsz", "many"], ["--micro_bsz", "many"]),
    ],
)
def test_flags_that_cannot_be(refused, typed, pairs_csv, words, said):
    """If this breaks, values that cannot be are found out late, or by a traceback."""
    if words[0] == "--accelerator" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    refused([*typed, "--dpo", 1, "--rlhf_train_file", pairs_csv, *words], *said)


def test_an_adapter_of_another_plan(refused, script, typed, tmp_path, pairs_csv):
    """If this breaks, an adapter of another rank is loaded in part."""
    run = [*typed, "--dpo", 1, "--rlhf_train_file", pairs_csv, "--peft", "lora", "--proj_dir", tmp_path / "first"]
    status, _, err = script(train.main, *run)
    assert status == 0, err
    adapter = tmp_path / "first" / "rwkv-0.pth"
    words = [*typed, "--dpo", 1, "--rlhf_train_file", pairs_csv, "--peft", "lora", "--lora_r", 4]
    refused([*words, "--load_adapter", adapter], adapter, "rank 8", "--lora_r 4")
