"""Mistakes around adapters: each gives one sentence with flag, file or line, exit status 2, and no damage."""

import json

import pytest
import torch

from rwkv_rlhf.commands import chat, merge, train
from rwkv_rlhf.plan import COLUMNS
from rwkv_rlhf.settings.command_line import parse
from rwkv_rlhf.settings.given_files import with_adapter_there

HEAD = ",".join(COLUMNS)


@pytest.fixture
def profile(tmp_path):
    """profile(row, row, head) writes a profile of two blocks."""

    def write(*rows, emb="emb,freeze,0,0,0,0,0,0,0,0,", head="head,freeze,0,0,0,0,0,0,0,0,"):
        path = tmp_path / "profile.csv"
        path.write_text("\n".join([HEAD, emb, *rows, head]) + "\n")
        return path

    return write


@pytest.fixture
def adapter(script, typed, text_jsonl, tmp_path):
    """A LoRA checkpoint of the base model, trained for one step."""
    words = [*typed, "--proj_dir", tmp_path / "trained", "--data_file", text_jsonl, "--peft", "lora", "--lora_r", 4]
    status, _, err = script(train.main, *words)
    assert status == 0, err
    return tmp_path / "trained" / "rwkv-0.pth"


LORA = ["0,lora,4,32,0,1e-4,1e-5,0,0,0,", "1,lora,4,32,0,1e-4,1e-5,0,0,0,"]


def test_a_rank_that_does_not_divide(refused, typed, text_jsonl, profile):
    """If this breaks, a rank that cannot be ends in a shape error of a tensor instead of naming the row and the
    flag."""
    path = profile(LORA[0], "1,bone,24,0,0,1e-4,1e-5,0,0,0,")
    data = [*typed, "--data_file", text_jsonl]
    said = (f"{path}:4: column Rank: '24'", "blocks.1.att.", "must divide both sides", "it must divide 64")
    refused([*data, "--layer_profile", path], *said)
    refused([*data, "--peft", "bone", "--lora_r", 24], "--lora_r 24: layer blocks.0.att.", "must divide 64")
    refused([*data, "--peft", "pissa", "--lora_r", 100], "--lora_r 100: layer", "at most 64")
    path = profile(*LORA, emb="emb,bone,4,0,0,1e-4,1e-5,0,0,0,")
    refused([*data, "--layer_profile", path], f"{path}:2: column Mode:", "bone has no form for an embedding")


def test_a_profile_that_trains_nothing(refused, typed, text_jsonl, profile):
    """If this breaks, a run takes its hours and nothing has learnt."""
    path = profile("0,freeze,0,0,0,0,0,0,0,0,", "1,freeze,0,0,0,0,0,0,0,0,")
    refused([*typed, "--data_file", text_jsonl, "--layer_profile", path], "trains nothing", "other than freeze")


def test_an_adapter_of_another_base(refused, script, typed, adapter, base_model, text_jsonl, tmp_path):
    """If this breaks, an adapter goes on over weights that it was not trained for."""
    tensors = {name: tensor + 0.001 for name, tensor in torch.load(base_model, weights_only=True).items()}
    other = tmp_path / "other.pth"
    torch.save(tensors, other)
    words = [*typed, "--load_model", other, "--data_file", text_jsonl, "--peft", "lora", "--lora_r", 4]
    refused([*words, "--load_adapter", adapter], "trained on x070.pth", "other.pth is another file")
    refused([*words, "--load_cold_adapter", adapter], "trained on x070.pth", "other.pth is another file")
    merging = ["--base_model", other, "--lora_checkpoint", adapter, "--output", tmp_path / "m.pth"]
    refused(merging, "another file", "or --force 1 to go on", main=merge.main)
    status, _, err = script(merge.main, *merging, "--force", 1)
    assert status == 0 and (tmp_path / "m.pth").exists(), err
    for flag in ("--load_adapter", "--load_cold_adapter"):
        status, _, err = script(train.main, *words, flag, adapter, "--force", 1)
        assert status == 0, err


def test_another_base_is_refused_before_the_references(refused, typed, adapter, base_model, pairs_csv, tmp_path):
    """Reference scores of a large file take hours: a wrong file must be known before them."""
    other = tmp_path / "other.pth"
    torch.save({name: tensor * 1.01 for name, tensor in torch.load(base_model, weights_only=True).items()}, other)
    words = [*typed, "--load_model", other, "--dpo", 1, "--rlhf_train_file", pairs_csv, "--peft", "lora", "--lora_r", 4]
    refused([*words, "--load_adapter", adapter], "other.pth is another file", "--load_model, or --force 1 to continue")
    assert not (tmp_path / "out" / "cache").exists()


def test_an_adapter_of_other_layers_or_another_kind(refused, typed, adapter, text_jsonl, profile):
    """If this breaks, parts of an adapter are left out in silence, or read as another kind."""
    data = [*typed, "--data_file", text_jsonl, "--load_adapter", adapter]
    path = profile(LORA[0], "1,freeze,0,0,0,0,0,0,0,0,")
    refused([*data, "--layer_profile", path], "is not an adapter of this model and plan", "unexpected: blocks.1.")
    refused([*data, "--lora_r", 8], "--lora_r 8, but --load_adapter", "with rank 4: leave --lora_r out")
    refused([*data, "--lora_alpha", 8], "--lora_alpha 8.0, but --load_adapter", "with alpha 32.0")
    refused([*data, "--peft", "dora"], "--peft dora, but --load_adapter", "with mode lora")
    path = profile(*(row.replace("lora,4", "lora,8") for row in LORA))
    refused([*data, "--layer_profile", path], "of rank 4", "of rank 8")
    refused([*data, "--peft", "lora", "--lora_r", 4, "--rslora", 1], "scaling 8", "scaling 16")
    words = ["--peft", "lora", "--lora_r", 4, "--quant", 1, "--quant_mode", "int8"]
    refused([*data, *words], "on none matrices", "as int8")


def test_a_merge_over_its_own_input(refused, adapter, base_model):
    """If this breaks, a merge destroys the only copy of a model or an adapter."""
    words = ["--base_model", base_model, "--lora_checkpoint", adapter]
    for output in (adapter, adapter.with_suffix(".json"), base_model):
        refused([*words, "--output", output], "--output", main=merge.main)


def test_what_an_adapter_needs_is_not_overwritten_either(refused, script, typed, text_jsonl, base_model, tmp_path):
    """PiSSA's initial factors, a cold adapter, a PEFT folder: the merge reads them, though nobody named them."""
    cold, folder = tmp_path / "cold", tmp_path / "pissa"
    words = [*typed, "--data_file", text_jsonl, "--peft", "pissa", "--lora_r", 4, "--limited_lora", 1]
    assert script(train.main, *words, "--proj_dir", cold)[0] == 0
    words = [*words, "--proj_dir", folder, "--load_cold_adapter", cold / "rwkv-0.pth"]
    status, _, err = script(train.main, *words)
    assert status == 0, err
    (factors,) = folder.glob("pissa-init-*.pth")
    merging = ["--base_model", base_model, "--lora_checkpoint", folder / "rwkv-0.pth"]
    for output in (factors, cold / "rwkv-0.pth"):
        refused([*merging, "--output", output], "is an input of this merge", main=merge.main)
    peft = tmp_path / "peft"
    status, _, err = script(merge.main, "--lora_checkpoint", cold / "rwkv-0.pth", "--to_peft", peft)
    assert status == 0, err
    theirs = peft / "adapter_model.safetensors"
    back = ["--base_model", base_model, "--from_peft", peft]
    refused([*back, "--output", theirs], "is an input of this merge", main=merge.main)
    refused([*back, "--output", peft / "adapter_config.pth"], "adapter_config.json is an input", main=merge.main)
    refused(["--lora_checkpoint", theirs, "--to_peft", peft], "is an input of this merge", main=merge.main)


def test_an_unknown_storage(refused, typed, adapter, base_model, text_jsonl, tmp_path):
    """If this breaks, a misspelt storage is not told with the legal ones."""
    words = [*typed, "--data_file", text_jsonl, "--peft", "lora", "--quant", 1, "--quant_mode", "int3"]
    refused(words, "--quant_mode int3: must be one of nf4, fp4, int8, fp8, none")
    merging = ["--base_model", base_model, "--lora_checkpoint", adapter, "--output", tmp_path / "m.pth"]
    refused([*merging, "--quant", "int3"], "int3", "nf4, fp4, int8, fp8", main=merge.main)


def test_fp8_without_its_hardware_is_one_sentence(script, typed, text_jsonl, tmp_path, caplog):
    """It falls back to a dense product: slower, the same model, and said once."""
    if torch.cuda.is_available():
        pytest.skip("a GPU may have it")
    from rwkv_rlhf.layers.stores import fp8

    fp8._say.cache_clear()
    words = [*typed, "--data_file", text_jsonl, "--peft", "lora", "--quant", 1, "--quant_mode", "fp8"]
    with caplog.at_level("INFO"):
        status, _, err = script(train.main, *words, "--epoch_steps", 3)
    assert status == 0, err
    assert caplog.text.count("fp8 matrices are dequantised for each product: cpu has no fast fp8 product") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--peft", "bone", "--rslora", 1], "--rslora 1 has no effect with --peft bone"),
        (["--peft", "miss", "--lora_plus", 4], "--lora_plus 4.0 has no effect with --peft miss"),
        (["--lora_plus", 4], "--lora_plus 4.0 has no effect: it needs --lora or --peft"),
        (["--peft", "lora", "--lora_plus", 0], "--lora_plus 0.0: must be > 0"),
        (["--peft", "pissa", "--load_adapter_pissa_init", "F"], "--load_adapter_pissa_init F needs --load_adapter"),
        (["--peft", "lora", "--lora_load", "nowhere.pth"], "--load_adapter nowhere.pth does not exist"),
        (["--peft", "lora", "--load_cold_adapter", "nowhere.pth"], "--load_cold_adapter nowhere.pth does not exist"),
    ],
)
def test_settings_without_an_effect(refused, typed, text_jsonl, words, said):
    """If this breaks, a flag that does nothing here is taken without a word."""
    refused([*typed, "--data_file", text_jsonl, *words], said)


def test_the_adapter_that_old_commands_name_for_example(script, caplog):
    """RWKV-PEFT's own lines say rwkv-0 whether there is one or not, and trained on: so does this, with a notice."""
    words = ["--load_model", "M", "--data_file", "a.jsonl", "--peft", "lora"]
    for typed in (["--lora_load", "rwkv-0"], ["--lora_config", '{"lora_load": "rwkv-0", "lora_r": 8}']):
        assert with_adapter_there(parse([*words, *typed])).load_adapter == ""
    status, _, err = script(train.main, *words, *typed)
    assert status == 2 and "--load_model M does not exist" in err  # what is not there after it
    assert caplog.text.count("rwkv-0: there is no such file, so training begins with new factors") == 3


def test_a_checkpoint_that_lost_its_sidecar(refused, typed, adapter, base_model, text_jsonl, tmp_path):
    """Scale and kind cannot be guessed: each program names its own flags for them."""
    adapter.with_suffix(".json").unlink()
    merging = ["--base_model", base_model, "--lora_checkpoint", adapter, "--output", tmp_path / "m.pth"]
    refused(merging, "no sidecar", "--lora_scaling (alpha / rank) or --lora_alpha", main=merge.main)
    refused([*merging, "--type", "bone"], "mode bone, but the tensors are those of lora", main=merge.main)
    refused(
        [*merging, "--lora_alpha", 8, "--lora_init", adapter],
        "holds no PiSSA adapter",
        "leave that out",
        main=merge.main,
    )
    talking = ["--load_model", base_model, "--load_adapter", adapter, "--vocab_file", typed[3]]
    talking += ["--prompt_file", prompts(tmp_path), "--output", tmp_path / "o.jsonl"]
    refused(talking, "no sidecar", "--lora_scaling (alpha / rank) or --lora_alpha", main=chat.main)
    words = [*typed, "--data_file", text_jsonl, "--peft", "lora", "--load_cold_adapter", adapter]
    refused(words, "cold adapter:", "no sidecar", "merge.py")


def prompts(folder):
    path = folder / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "say 1"}) + "\n")
    return path


def test_a_sidecar_of_a_later_program_is_refused(refused, adapter, base_model, tmp_path):
    """What it says may mean something that this program does not know."""
    side = adapter.with_suffix(".json")
    side.write_text(json.dumps(json.loads(side.read_text()) | {"format": 99}))
    merging = ["--base_model", base_model, "--lora_checkpoint", adapter, "--output", tmp_path / "m.pth"]
    refused(merging, "format 99", "update it", main=merge.main)
