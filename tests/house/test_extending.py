"""docs/extending.md, followed: each toy is added at run time and walks from the command line to a merged model.

What a table's entry does not bring about by itself fails here.
"""

import json
import shutil

import numpy as np
import pytest
import torch

from rwkv_rlhf import commands
from rwkv_rlhf.commands import chat, convert, generate_rejects, make_profile, merge, prepare_pairs, score_pairs, train
from rwkv_rlhf.data.opening import kind_of
from rwkv_rlhf.layers.adapters import ADAPTERS
from rwkv_rlhf.layers.stores import STORES
from rwkv_rlhf.losses import LOSSES
from rwkv_rlhf.losses.pairs import PairScores
from rwkv_rlhf.model.sizes import sizes_of
from rwkv_rlhf.ops import check
from rwkv_rlhf.ops.backend import RECURRENCES
from rwkv_rlhf.ops.backends import candidates
from rwkv_rlhf.plan import is_matrix
from rwkv_rlhf.reports.curves import draw_curves
from rwkv_rlhf.settings import tables
from rwkv_rlhf.settings.command_line import parse
from rwkv_rlhf.training.run_identity import differences, identity
from rwkv_rlhf.training.screen import shown
from tests.support.files import VOCAB, read_jsonl
from tests.support.processes import PROGRAMS, end_of, started_ranks
from tests.support.recipes import follow, recipes, write
from tests.support.source_files import ROOT

RECIPES = recipes()
SMALL = "--precision fp32 --ctx_len 64 --epoch_steps 2 --epoch_count 1 --epoch_save 1 --micro_bsz 2 --lr_init 1e-3"
LORA = "--peft lora --lora_r 4 --lora_dropout 0 --quant 0"


@pytest.fixture
def followed(request, monkeypatch):
    """The recipe that the test names is followed."""
    follow(RECIPES[request.param], monkeypatch)


@pytest.fixture
def go(script, base_model, vocab_file, tmp_path):
    """go(words) is `train.py words` in the folder `out`; it must succeed, and gives what it printed."""

    def call(words, model=base_model, folder="out"):
        shared = f"--load_model {model} --vocab_file {vocab_file} --proj_dir {tmp_path / folder} {SMALL}"
        status, out, err = script(train.main, *shared.split(), *words.split())
        assert status == 0, err
        return out

    return call


@pytest.fixture
def refused(script):
    """refused(words) is what `train.py words` says when it ends with the user's mistake."""

    def call(words):
        status, _, err = script(train.main, *words.split())
        assert status == 2, err
        return err

    return call


@pytest.fixture
def explained(script):
    """explained(word) is `train.py --help word`."""

    def call(word):
        status, out, _ = script(train.main, "--help", word)
        assert status == 0
        return out

    return call


@pytest.fixture
def merged(script, tmp_path, base_model):
    """merged(name) merges out/<name>, whose logits merge.py compares, and gives the tensors."""

    def call(name="rwkv-0.pth", *words, model=base_model):
        path = tmp_path / "merged.pth"
        named = ["--base_model", model, "--lora_checkpoint", tmp_path / "out" / name, "--output", path]
        status, out, err = script(merge.main, *named, *words)
        assert status == 0 and "check: logits of merged" in out, err
        return torch.load(path, weights_only=True)

    return call


def recipe(name):
    """A test of what comes about once the recipe is followed."""
    return lambda test: pytest.mark.usefixtures("followed")(
        pytest.mark.parametrize("followed", [name], indirect=True)(test)
    )


def changed(base, tensors):
    """Names of the tensors that differ from those of the file `base`."""
    before = torch.load(base, weights_only=True)
    return {name for name, tensor in tensors.items() if not torch.equal(tensor.float(), before[name].float())}


def test_every_kind_has_its_recipe():
    """If this breaks, somebody who wants to add something finds no example, or one that nothing runs."""
    marks = [mark for test in globals().values() for mark in getattr(test, "pytestmark", ())]
    tested = {mark.args[1][0] for mark in marks if mark.name == "parametrize" and mark.args[0] == "followed"}
    assert RECIPES.keys() == tested


@pytest.mark.slow
@recipe("Loss")
def test_a_loss(go, refused, explained, tmp_path, pairs_csv):
    """Flags, data, reference, training, held out, chunks: all from its entry."""
    assert "anchored preference optimisation" in explained("apo") and "--apo_beta" in explained("apo")
    assert "range:    > 0" in explained("apo_beta") and "only with: --apo 1" in explained("apo_beta")
    assert "resumed:  the same value" in explained("apo_beta")  # and is part of a run's identity:
    one, two = (identity(parse(["--doctor", "1", "--apo_beta", value])) for value in ("0.5", "0.7"))
    assert differences(one, two) == (["{apo_beta} was 0.5, is 0.7"], [])
    assert "--apo 1 needs --rlhf_train_file" in refused("--load_model M --apo 1")
    assert "--dpo 1 and --apo 1: choose one loss" in refused(
        f"--load_model M --apo 1 --dpo 1 --rlhf_train_file {pairs_csv}"
    )
    assert "--apo_beta -1" in refused(f"--load_model M --apo 1 --apo_beta -1 --rlhf_train_file {pairs_csv}")
    words = f"{LORA} --apo 1 --apo_beta 0.5 --rlhf_train_file {pairs_csv} --val_file {pairs_csv}"
    assert "2 optimizer steps" in go(f"{words} --dry_run 1")
    go(words)
    go(f"{words} --infctx 1 --chunk_ctx 4", folder="chunks")
    records = read_jsonl(tmp_path / "out" / "metrics.jsonl")[1:]  # behind the begin of the run
    _, first, last, held_out = records
    assert first["loss"] == first["apo"] == pytest.approx(1.0) and first["reward_margin"] == pytest.approx(0, abs=1e-6)
    assert last["apo"] < first["apo"] and held_out["reward_margin"] > 0 and held_out["event"] == "val"
    assert held_out["reward_margin"] == pytest.approx(0.5 * held_out["logp_margin"], rel=1e-5)
    in_chunks = read_jsonl(tmp_path / "chunks" / "metrics.jsonl")[1:]
    assert [record["loss"] for record in in_chunks] == pytest.approx([record["loss"] for record in records], rel=1e-4)


@recipe("Loss")
def test_a_loss_by_hand():
    """The example on the page is the paper's formula: sigmoid(-beta r_c) + sigmoid(beta r_r)."""
    scores = PairScores(torch.tensor([-3.0]), torch.tensor([-2.0]), torch.tensor([4]), torch.tensor([5]))
    config = parse(["--doctor", "1", "--apo_beta", "2"])
    found = LOSSES["apo"].preference(scores, torch.tensor([[-4.0, -2.5]]), config)  # log-ratios 1 and 0.5
    assert float(found) == pytest.approx(1 / (1 + np.exp(2.0)) + 1 / (1 + np.exp(-1.0)))


@pytest.mark.slow
@recipe("Metric")
def test_a_metric(go, curves, tmp_path, pairs_csv, explained):
    """One name in training, held out, on the curves and in the bar."""
    go(f"{LORA} --orpo 1 --rlhf_train_file {pairs_csv} --val_file {pairs_csv}")
    records = read_jsonl(tmp_path / "out" / "metrics.jsonl")[1:]  # behind the begin of the run
    assert {record["event"] for record in records} == {"start", "train", "val"}
    assert all(5 < record["chosen_tokens"] < 40 for record in records)
    assert shown(records[0])["chosen tokens"] == f"{records[0]['chosen_tokens']:.4g}"
    assert "answer length" in drawn_titles(tmp_path / "out")


def drawn_titles(folder):
    """Titles of the panels that the curves of a run have."""
    from matplotlib.axes import Axes

    titles = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "set", lambda axis, **said: titles.append(said.get("title")))
        draw_curves(folder)
    return titles


@pytest.mark.slow
@recipe("Adapter")
@pytest.mark.parametrize("quant", ["--quant 0", "--quant_mode int8"])
def test_an_adapter(go, refused, merged, tmp_path, base_model, text_jsonl, quant):
    """Flag, plan, memory, training, sidecar, weight decay, going on, merging with and without a sidecar."""
    words = f"--peft mora --lora_r 16 {quant} --data_file {text_jsonl} --limited_lora 1"
    assert "train" in go(f"{words} --dry_run 1")
    go(words)
    sidecar = json.loads((tmp_path / "out" / "rwkv-0.json").read_text())
    assert {how["mode"] for how in sidecar["adapted"].values()} == {"mora"}
    saved = torch.load(tmp_path / "out" / "rwkv-0.pth", weights_only=True)
    assert all(name.endswith(".mora") and tensor.abs().sum() > 0 for name, tensor in saved.items())
    assert is_matrix("blocks.0.att.key.mora")
    go(f"{words} --load_adapter {tmp_path / 'out' / 'rwkv-0.pth'}", folder="on")
    tensors = merged()
    assert changed(base_model, tensors) >= {
        f"blocks.{n}.att.{part}.weight" for n in (0, 1) for part in ("key", "value")
    }
    (tmp_path / "out" / "rwkv-0.json").unlink()
    again = merged("rwkv-0.pth", *(["--quant", "int8"] if "int8" in quant else []))
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items() if "blocks" in name)


@recipe("Adapter")
def test_an_adapter_is_named_by_all_that_name_adapters(go, refused, script, tmp_path, text_jsonl):
    """Profiles, switches that it has no use for, its rank, the PEFT library that does not have it."""
    status, _, err = script(make_profile.main, *["--make", "mora", "--layers", "2", "--output"], tmp_path / "p.csv")
    assert status == 0, err
    rows = (tmp_path / "p.csv").read_text().splitlines()
    assert rows[2].startswith("0,mora,32,")
    words = f"--load_model M --data_file {text_jsonl} --peft mora"
    assert "--rslora 1 has no effect with --peft mora" in refused(f"{words} --rslora 1")
    assert "--lora_plus 4.0 has no effect with --peft mora" in refused(f"{words} --lora_plus 4")
    go(f"--layer_profile {tmp_path / 'p.csv'} --quant 0 --data_file {text_jsonl}")
    named = ["--lora_checkpoint", tmp_path / "out" / "rwkv-0.pth", "--to_peft", tmp_path / "peft"]
    status, _, err = script(merge.main, *named)
    assert status == 2 and "mode mora has no form in the PEFT library" in err


@recipe("Adapter")
def test_an_adapter_keeps_its_contract():
    """Starts as the base, and applies what `merged` says."""
    from rwkv_rlhf.layers.adaptation import Adaptation
    from rwkv_rlhf.layers.linear import Linear, StorageSpec

    layer = ADAPTERS["mora"].linear.wrap(Linear(24, 16), Adaptation.make("mora", 8, 8.0))
    weight, x = torch.randn(16, 24), torch.randn(5, 24)
    layer.load_weight(weight, StorageSpec(torch.float32))
    torch.testing.assert_close(layer(x), x @ weight.T)
    torch.nn.init.normal_(layer.mora)
    torch.testing.assert_close(layer(x), x @ layer.merged().T, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@recipe("Storage")
def test_a_storage(go, refused, merged, script, tmp_path, base_model, text_jsonl, pairs_csv, vocab_file):
    """Flags of training and of the scripts, memory of a dry run, training on it, sidecar, merging, reading it back."""
    words = f"--peft lora --lora_r 4 --quant_mode e5m2 --data_file {text_jsonl}"
    assert "e5m2" in go(f"{words} --dry_run 1")
    go(words)
    sidecar = json.loads((tmp_path / "out" / "rwkv-0.json").read_text())
    assert sidecar["quant_mode"] == "e5m2" and sidecar["packed"]
    tensors = merged()
    head = torch.load(base_model, weights_only=True)["head.weight"]
    assert torch.equal(tensors["head.weight"], head.to(torch.float8_e5m2).float())
    named = (
        f"--load_model {base_model} --vocab_file {vocab_file} --input_csv {pairs_csv} --output_save {tmp_path}/p.save"
    )
    status, _, err = script(score_pairs.main, *named.split(), *["--target_pair_count", "4", "--quant_mode", "e5m2"])
    assert status == 0, err
    assert "must be one of" in refused(f"--load_model M --data_file {text_jsonl} --quant_mode e6m1")


@recipe("Storage")
def test_a_storage_is_what_its_entry_says():
    """Bytes of a number and the error of a round trip."""
    weight = torch.randn(256, 512)
    packed, facts = STORES["e5m2"].pack(weight), tables.STORAGES["e5m2"]
    assert packed.bytes() == facts.bytes_per_number * weight.numel()
    error = (packed.unpack() - weight).square().mean().sqrt() / weight.square().mean().sqrt()
    assert float(error) == pytest.approx(facts.rms_error, rel=0.05)


@pytest.mark.slow
@recipe("RWKV version")
def test_a_version(go, merged, script, tmp_path, text_jsonl):
    """Made from zero, recognised, planned, trained, merged, and its states carried."""
    made = "--train_stage 1 --load_model 0 --my_testing x071 --n_layer 2 --n_embd 64 --head_size_a 32"
    status, _, err = script(train.main, *made.split(), "--vocab_size", VOCAB, "--proj_dir", tmp_path / "new")
    assert status == 0, err
    base = tmp_path / "new" / "rwkv-init.pth"
    tensors = torch.load(base, weights_only=True)
    assert sizes_of(tensors).version == "x071" and sizes_of(without(tensors, "o_k")).version == "x070"
    words = f"{LORA} --data_file {text_jsonl}"
    assert "x071" in go("--dry_run 1 --dry_run_shape L2-D64 --my_testing x071 --load_model 0 --vocab_size 257", model=0)
    go(f"{words} --infctx 1 --chunk_ctx 8", model=base)
    saved = torch.load(tmp_path / "out" / "rwkv-0.pth", weights_only=True)
    assert "blocks.0.att.o_k" in saved and not is_matrix("blocks.0.att.o_k")
    assert "blocks.1.att.o_k" in changed(base, merged(model=base))


def without(tensors, ending):
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(ending)}


@pytest.mark.slow
@recipe("File format")
def test_a_format(go, refused, explained, script, tmp_path, vocab_file):
    """Pairs and rated answers, in training, held out and in the scripts; what is wrong names the row."""
    rows = [f'[[row]]\nprompt = "say {n}"\nchosen = "gladly {n}"\nreject = "no {n}"\n' for n in range(8)]
    path = tmp_path / "pairs.toml"
    path.write_text("".join(rows))
    assert kind_of(path) == "pairs" and ".toml" in explained("rlhf_train_file")
    words = f"{LORA} --rlhf_train_file {path}"
    assert "gladly" in go(f"{words} --orpo 1 --dry_run 1")
    go(f"{words} --orpo 1 --val_file {path}")
    assert read_jsonl(tmp_path / "out" / "metrics.jsonl", "val")[0]["pairs"] == 8
    named = ["--input_csv", path, "--output_save", tmp_path / "p.save", "--vocab_file", vocab_file]
    status, _, err = script(prepare_pairs.main, *named, "--target_pair_count", 4, "--vocab_size", VOCAB)
    assert status == 0, err
    rated = tmp_path / "rated.toml"
    rated.write_text("".join(f'[[row]]\nprompt = "say {n}"\ncompletion = "{n}"\nlabel = {n % 2}\n' for n in range(8)))
    go(f"{LORA} --rlhf_train_file {rated} --kto 1", folder="rated")
    path.write_text(rows[0] + '[[row]]\nprompt = "say"\nchosen = "gladly"\n')
    said = bad(script, go, path)
    assert "pairs.toml row 2: " in said and "reject is missing" in said
    path.write_text("[[row]\n")
    assert "not a TOML file" in bad(script, go, path)


def bad(script, go, path):
    with pytest.raises(AssertionError) as said:
        go(f"{LORA} --orpo 1 --rlhf_train_file {path}", folder="bad")
    return str(said.value)


@pytest.mark.slow
@recipe("Data shape")
def test_a_shape(go, explained, script, tmp_path, caplog):
    """Recognised by its keys and forced, trained, converted; what is wrong names the row, what is near the key."""
    rows = [{"dialog": [f"say {n}", f"gladly {n}", "and again", "no"], "act": 1} for n in range(8)]
    path, out = tmp_path / "d.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = f"{LORA} --sft 1 --data_file {path}"
    assert "gladly" in go(f"{words} --dry_run 1")
    go(f"{words} --format dialogue")
    assert len(read_jsonl(tmp_path / "out" / "metrics.jsonl", "train")) == 2
    assert "lists of utterances" in explained("format")
    with caplog.at_level("INFO"):
        status, _, err = script(convert.main, "--input", path, "--output", out)
    assert status == 0, err
    assert "lists of utterances (dialogue)" in caplog.text and "8 rows have `act`: not read" in caplog.text
    said = [(turn["role"], turn["content"]) for turn in read_jsonl(out)[0]["messages"]]
    assert said == [("user", "say 0"), ("assistant", "gladly 0"), ("user", "and again"), ("assistant", "no")]
    path.write_text('{"dialog": ["say", 3]}\n')
    status, _, err = script(convert.main, "--input", path, "--output", out)
    assert status == 2 and "d.jsonl:1: dialog must be a list of texts" in err
    path.write_text('{"text": "say"}\n')
    status, _, err = script(convert.main, "--input", path, "--output", out, "--format", "dialogue")
    assert status == 2 and "--format dialogue needs dialog" in err


@pytest.mark.slow
@recipe("Optimizer")
def test_an_optimizer(go, explained, tmp_path, text_jsonl):
    """Flag, memory, training, and a run that goes on from a point with the same bits."""
    assert "gradient descent with momentum" in explained("optim")
    words = f"{LORA} --optim sgd --data_file {text_jsonl} --limited_lora 1 --resume_every 1"
    plans = {name: go(f"{words.replace('sgd', name)} --dry_run 1") for name in ("sgd", "adamw")}
    bytes_of = {name: memory_line(plan, "optimizer") for name, plan in plans.items()}
    assert bytes_of["adamw"] == pytest.approx(2 * bytes_of["sgd"], abs=0.1)
    go(words)
    point = tmp_path / "out" / "resume" / "step-1"
    go(f"{words} --resume {point}", folder="again")
    one, two = (torch.load(tmp_path / name / "rwkv-0.pth", weights_only=True) for name in ("out", "again"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def memory_line(plan, part):
    """MiB of a part in what a dry run prints."""
    (line,) = (line for line in plan.splitlines() if line.startswith(f"{part} "))
    return float(line.split()[-2].replace(",", ""))


@pytest.mark.slow
@recipe("Backend")
def test_a_backend(go, refused, explained, tmp_path, text_jsonl):
    """Flag, choice, packed rows, states and gradients; "auto" leaves it alone."""
    assert "plain loops in float64" in explained("wkv_backend")
    words = f"{LORA} --data_file {text_jsonl} --infctx 1 --chunk_ctx 16"
    curves = []
    for name in ("double", "naive"):
        go(f"{words} --wkv_backend {name}", folder=name)
        curves.append([line["loss"] for line in read_jsonl(tmp_path / name / "metrics.jsonl", "train")])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5) and len(curves[0]) == 2
    for dtype in check.LIMITS:
        for case in (case for case in check.cases() if case.op in RECURRENCES):
            found = check.examine(case, "double", torch.device("cpu"), dtype)
            assert found.agrees and not found.refusal and not found.failure, found
    assert "double" not in candidates("wkv7", torch.device("cpu"), torch.float32)
    assert "double" in refused("--wkv_backend doubel")


@pytest.mark.slow
@recipe("Strategy")
def test_a_strategy(go, refused, explained, tmp_path, text_jsonl):
    """Its name in help and run; alone it learns what ddp learns."""
    assert "as ddp, gradients sent in float16" in explained("strategy")
    for name in ("ddp", "ddp_fp16"):
        go(f"{LORA} --strategy {name} --data_file {text_jsonl}", folder=name)
    one, two = (read_jsonl(tmp_path / name / "metrics.jsonl", "train") for name in ("ddp", "ddp_fp16"))
    assert [record["loss"] for record in one] == [record["loss"] for record in two]


@pytest.mark.slow
@pytest.mark.timeout(600)
@recipe("Strategy")
def test_a_strategy_of_two_processes(tmp_path, base_model, vocab_file, text_jsonl):
    """The recipe followed in a copy of the sources: both ranks know the strategy, and learn nearly what ddp learns."""
    shutil.copytree(ROOT / "src", tmp_path / "src")
    (tmp_path / "cuda").symlink_to(ROOT / "cuda")
    write(RECIPES["Strategy"], tmp_path)
    words = f"--load_model {base_model} --vocab_file {vocab_file} {SMALL} {LORA} --data_file {text_jsonl}".split()
    lists = [[*words, "--strategy", name, "--proj_dir", str(tmp_path / name)] for name in ("ddp", "ddp_fp16")]
    (tmp_path / "runs.json").write_text(json.dumps(lists))
    words = (tmp_path / "runs.json", "--accelerator", "cpu")
    end_of(*started_ranks(PROGRAMS / "several_runs.py", *words, first_path=tmp_path / "src"))
    losses = {
        name: [record["loss"] for record in read_jsonl(tmp_path / name / "metrics.jsonl", "train")]
        for name in ("ddp", "ddp_fp16")
    }
    assert losses["ddp"][0] == losses["ddp_fp16"][0]
    assert losses["ddp"] == pytest.approx(losses["ddp_fp16"], rel=1e-3)


@recipe("Export")
def test_an_export(go, script, tmp_path, text_jsonl):
    """A flag of merge.py that writes it; never over an input."""
    go(f"{LORA} --data_file {text_jsonl}")
    checkpoint = tmp_path / "out" / "rwkv-0.pth"
    status, out, err = script(merge.main, "--lora_checkpoint", checkpoint, "--to_npz", tmp_path / "npz")
    assert status == 0 and "arrays:" in out, err
    arrays, tensors = np.load(tmp_path / "npz" / "adapter.npz"), torch.load(checkpoint, weights_only=True)
    assert set(arrays) == set(tensors)
    assert all(np.array_equal(arrays[name], tensor.float().numpy()) for name, tensor in tensors.items())
    status, out, _ = script(merge.main, "--help")
    assert status == 0 and "a NumPy archive of what trained" in " ".join(out.split())
    status, _, err = script(merge.main, "--lora_checkpoint", checkpoint, "--to_npz", "a", "--output", "b.pth")
    assert status == 2 and "--to_npz with --lora_checkpoint: one task at a time" in err


@recipe("Sampler option")
def test_a_sampler_option(script, tmp_path, base_model, vocab_file):
    """A flag of every command that samples, with its range; 1 leaves the likeliest token only."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "say a"}\n{"prompt": "say b"}\n')
    answers = []
    for words in ("--min_p 1 --seed 1", "--min_p 1 --seed 2", "--temperature 0"):
        named = f"--load_model {base_model} --vocab_file {vocab_file} --prompt_file {tmp_path}/prompts.jsonl {words}"
        output = tmp_path / f"{len(answers)}.jsonl"
        status, _, err = script(
            chat.main, *named.split(), "--output", output, *["--max_tokens", "8", "--strategy", "cpu"]
        )
        assert status == 0, err
        answers.append([record["tokens"] for record in read_jsonl(output)])
    assert answers[0] == answers[1] == answers[2]
    status, _, err = script(chat.main, "--load_model", base_model, "--min_p", 2)
    assert status == 2 and "--min_p 2.0: must be at least 0 and at most 1" in err
    assert "--min_p" in generate_rejects.parser().known_flags()


@recipe("Command")
def test_a_command(script, capsys, base_model, monkeypatch):
    """Its line in the list, and the command itself by both of its names."""
    with pytest.raises(SystemExit):
        commands.main(["--help"])
    assert "count the numbers in a checkpoint (count_numbers.py)" in capsys.readouterr().out
    monkeypatch.setattr(commands, "NAMED", commands.NAMED | {"count": "count"})
    status, out, err = script(lambda words: commands.main(["count", *words]), "--model", base_model)
    assert status == 0 and "numbers in" in out, err


def test_recipes_leave_nothing_behind():
    """If this breaks, a toy of one test is known to the next."""
    assert "apo" not in tables.LOSSES and "mora" not in tables.ADAPTERS and "e5m2" not in tables.STORAGES
