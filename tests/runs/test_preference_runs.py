"""Whole runs of the preference losses on a two-layer model: what a user types, logs and gets."""

import csv
import json

import pytest
import torch

from rwkv_rlhf.commands import train
from rwkv_rlhf.data.batch import PairExample, RatedBatch, pack_pairs
from rwkv_rlhf.scoring.divergence import Divergence
from rwkv_rlhf.settings.command_line import parse
from rwkv_rlhf.training.dry_run import BAD, GOOD, pair_sample
from rwkv_rlhf.training.inputs import Inputs
from rwkv_rlhf.training.start import start
from tests.support.by_hand import answer_logps
from tests.support.files import read_jsonl

pytestmark = pytest.mark.slow


@pytest.fixture
def typed(base_model, vocab_file, tmp_path):
    """The words that every run shares; float32, so that equalities are tight."""
    return [
        *("--load_model", base_model, "--vocab_file", vocab_file, "--proj_dir", tmp_path / "out"),
        *("--precision", "fp32", "--quant", 0, "--ctx_len", 128, "--epoch_save", 1, "--random_seed", 3),
        *("--epoch_count", 1, "--grad_cp", 0),
    ]


@pytest.fixture
def go(script, typed, tmp_path):
    """go(folder, words) runs train.py, which must succeed, and gives (records of metrics.jsonl, stdout)."""

    def call(name, *words):
        status, out, err = script(train.main, *typed, "--proj_dir", tmp_path / name, *words)
        assert status == 0, err
        metrics = tmp_path / name / "metrics.jsonl"
        records = read_jsonl(metrics) if metrics.exists() else []
        return [record for record in records if record["event"] != "begin"], out

    return call


@pytest.fixture(scope="session")
def rated_csv(tmp_path_factory):
    """16 good and 16 bad answers, some to the same prompt."""
    path = tmp_path_factory.mktemp("rated") / "rated.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["Prompt", "completion", "label", "note"])
        for n in range(32):
            answer = (f"gladly: {n}" + " ok" * (n % 3)) if n % 2 == 0 else (f"no {n}" + "?" * (n % 4))
            writer.writerow([f"say {n // 2}", answer, ("true", "0")[n % 2], ""])
    return path


def of(records, event):
    return [record for record in records if record["event"] == event]


LEARNING = ["--micro_bsz", 8, "--epoch_steps", 16, "--lr_init", "2e-3", "--lr_final", "1e-3"]


@pytest.mark.parametrize(
    ("loss", "words"),
    [("simpo", ()), ("cpo", ()), ("wpo", ("--wpo_beta", 0.1)), ("kto", ("--kto_beta", 0.5)), ("orpo", ())],
)
def test_each_loss_learns_the_preference_and_says_how(go, pairs_csv, loss, words):
    """If this breaks, --simpo 1 and the like train something else, or the held-out numbers are missing."""
    records, _ = go("out", f"--{loss}", 1, "--rlhf_train_file", pairs_csv, "--val_file", pairs_csv, *LEARNING, *words)
    steps, (held_out,) = of(records, "train"), of(records, "val")
    assert steps[-1]["reward_margin"] > steps[0]["reward_margin"] + 0.1
    if loss in ("wpo", "kto"):  # measured against the start model
        assert abs(steps[0]["reward_margin"]) < 1e-5 and steps[0]["pref_percentage"] == pytest.approx(0.5, abs=1e-6)
    assert held_out["logp_accuracy"] > 0.8 and held_out["logp_margin"] > 0.5
    assert held_out["accuracy"] > 0.8 and held_out["chosen_reward"] > held_out["reject_reward"]
    assert held_out["kl"] > 1e-3 and held_out["log_odds_margin"] == held_out["log_odds_margin"]


def test_kto_on_rated_answers_ignores_accumulation(go, rated_csv):
    """If this breaks, the divergence is estimated from a micro-batch, and --micro_bsz changes what is learnt."""
    found = []
    for size, pieces in ((8, 1), (2, 4)):
        words = ["--micro_bsz", size, "--accumulate_grad_batches", pieces, "--epoch_steps", 4 * pieces]
        records, _ = go(
            str(size),
            *("--kto", 1, "--rlhf_train_file", rated_csv, "--val_file", rated_csv, "--kto_beta", 0.5),
            *(*words, "--lr_init", "2e-3", "--lr_final", "2e-3"),
        )
        found.append(records)
    whole, parts = (of(records, "train") for records in found)
    assert len(whole) == len(parts) == 4
    for one, two in zip(whole, parts):
        for name in ("loss", "kto_kl", "reward_margin", "logp_margin", "chosen_reward", "reject_reward"):
            assert one[name] == pytest.approx(two[name], rel=2e-3, abs=1e-5), name
        assert one["tokens"] == two["tokens"]
    assert whole[0]["kto_kl"] == pytest.approx(0, abs=1e-4) and whole[0]["loss"] == pytest.approx(0.5, abs=1e-4)
    held_out = of(found[0], "val")[0]
    assert held_out["answers"] == 32 and held_out["logp_margin"] > 0 and held_out["kto_kl"] >= 0


@pytest.mark.parametrize("loss", ["simpo", "kto"])
def test_a_split_off_share_is_measured_against_the_start_model(go, typed, base_model, pairs_csv, tmp_path, loss):
    """If this breaks, --val_split scores other answers than those it held out, by another model than the trained one,
    or a prompt stands on both sides. Every number is worked out from the two files."""
    words = [f"--{loss}", 1, "--rlhf_train_file", pairs_csv, "--val_split", 0.25, *LEARNING]
    records, _ = go("out", *words)
    (held_out,) = of(records, "val")
    config = parse([str(word) for word in (*typed, *words)])
    inputs = Inputs(config, start(config, tmp_path), tmp_path)
    trained, held = inputs.training(score=False).examples, inputs.split_off
    assert not {tuple(one.prompt) for one in trained} & {tuple(one.prompt) for one in held}
    assert len(held) == held_out["pairs" if loss == "simpo" else "answers"] == (6 if loss == "simpo" else 12)
    policy = answer_logps(held, base_model, tmp_path / "out" / "rwkv-0.pth")
    gained = policy - answer_logps(held, base_model)
    if loss == "simpo":
        rewards = 2.0 * policy / torch.tensor([[len(one.chosen), len(one.reject)] for one in held])
        (chosen, reject), gains = rewards.mean(0), gained.mean(0)
        assert held_out["accuracy"] == pytest.approx(float((rewards[:, 0] > rewards[:, 1]).double().mean()))
    else:
        good = torch.tensor([one.good for one in held])
        gains = torch.stack([gained[good, 0].mean(), gained[~good, 0].mean()])
        chosen, reject = 0.1 * gains
    want = {"chosen_reward": chosen, "reject_reward": reject, "reward_margin": chosen - reject}
    want |= {"logp_margin": gains[0] - gains[1]}
    assert {name: held_out[name] for name in want} == pytest.approx(
        {name: float(value) for name, value in want.items()}, rel=1e-3, abs=1e-4
    )
    assert held_out["logp_margin"] > 0.1


def test_no_answer_is_matched_with_its_own_prompt(typed, rated_csv, tmp_path):
    """If this breaks, KTO's divergence is measured on answers that belong to their prompts."""
    words = [*typed, "--kto", 1, "--rlhf_train_file", rated_csv, "--micro_bsz", 4, "--accumulate_grad_batches", 2]
    config = parse([str(word) for word in (*words, "--enable_progress_bar", 0)])
    steps = Inputs(config, start(config, tmp_path), tmp_path).training(score=False)
    examples = [steps.examples[index] for index in range(len(steps.examples))]
    own = {}
    for example in examples:
        own.setdefault(tuple(example.prompt), set()).add(tuple(example.chosen))
    assert len(examples) == 32 and sum(example.good for example in examples) == 16
    assert not any(tuple(example.reject) in own[tuple(example.prompt)] for example in examples)
    assert len({tuple(example.reject) for example in examples}) == 32  # each answer is used once
    first, second = steps.micro_batch(0), steps.micro_batch(1)
    assert isinstance(first, RatedBatch) and (len(first.others), len(second.others)) == (2, 0)
    assert first.total == second.total == 8 and first.starts.numel() == 5


def test_general_text_beside_dpo(go, pairs_csv, text_jsonl):
    """total = rho L_general + (1 - rho) (dpo_alpha CE + L_dpo): checked on the first step, term by term."""
    shared = ["--micro_bsz", 4, "--epoch_steps", 2, "--lr_init", 0, "--lr_final", 0, "--random_mode", 0]
    dpo = ["--dpo", 1, "--dpo_train_file", pairs_csv]
    text = ["--data_file", text_jsonl, "--data_type", "jsonl"]
    (alone, *_), _ = go("dpo", *dpo, "--dpo_alpha", 0.1, *shared)
    (sft, *_), _ = go("sft", "--sft", 1, "--smoothing", 0, *text, *shared)
    (mixed, *_), _ = go("mixed", *dpo, "--dpo_alpha", 0.1, *text, "--dpo_general_corpus_ratio", 0.8, *shared)
    assert mixed["general_nll"] == pytest.approx(sft["loss"], rel=1e-5)
    assert mixed["loss"] == pytest.approx(0.8 * sft["loss"] + 0.2 * alone["loss"], rel=1e-5)
    assert mixed["l2wrap"] == pytest.approx(0.8 * sft["l2wrap"], rel=1e-5)
    assert mixed["dpo"] == pytest.approx(alone["dpo"]) and mixed["tokens"] == alone["tokens"] + sft["tokens"]
    (unset, *_), _ = go("unset", *dpo, *text, "--dpo_general_corpus_ratio", 0.8, *shared)
    assert unset["loss"] == pytest.approx(0.8 * sft["loss"] + 0.2 * alone["dpo"], rel=1e-5)  # dpo_alpha is 0 then
    (none, *_), _ = go("none", *dpo, "--dpo_alpha", 0.1, *text, "--dpo_general_corpus_ratio", 0, *shared)
    assert "general_nll" not in none and none["loss"] == alone["loss"]


@pytest.mark.parametrize("loss", ["simpo", "wpo", "kto", "mix"])
def test_in_chunks_as_in_one(go, pairs_csv, text_jsonl, loss):
    """--infctx 1 changes memory, not what is learnt: weights of WPO, KTO's divergence and general text included."""
    words = ["--micro_bsz", 4, "--epoch_steps", 3, "--lr_init", "2e-3", "--lr_final", "2e-3", "--val_file", pairs_csv]
    words += ["--rlhf_train_file", pairs_csv, "--dpo" if loss == "mix" else f"--{loss}", 1]
    if loss == "mix":
        words += ["--data_file", text_jsonl, "--dpo_general_corpus_ratio", 0.5]
    one, _ = go("one", *words)
    many, _ = go("many", *words, "--infctx", 1, "--chunk_ctx", 7)
    assert len(of(one, "train")) == 3
    for a, b in zip(one, many, strict=True):
        names = {"loss", "reward_margin", "logp_margin", "grad_norm", "kl", "kto_kl", "general_nll", "pair_weight"}
        for name in (names | {"chosen_reward"}) & set(a):
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-5), name


def test_the_gradient_of_the_mix_is_the_mix_of_gradients(go, pairs_csv, text_jsonl):
    """If this breaks, the logged loss is mixed and what is learnt is not."""
    shared = ["--micro_bsz", 4, "--epoch_steps", 1, "--random_mode", 0, "--l2wrap", 0, "--grad_clip", 0]
    text = ["--data_file", text_jsonl]
    norms = {}
    for rho in (0.5, 1.0):
        mix = ["--dpo", 1, "--dpo_train_file", pairs_csv, *text, "--dpo_general_corpus_ratio", rho]
        (record, *_), _ = go(f"rho{rho}", *mix, *shared, "--dpo_beta", 1e-9)  # a preference without a gradient
        norms[rho] = record["grad_norm"]
    (sft, *_), _ = go("sft", "--sft", 1, "--smoothing", 0, *text, *shared)
    assert norms[1.0] == pytest.approx(sft["grad_norm"], rel=1e-4)
    assert norms[0.5] == pytest.approx(0.5 * sft["grad_norm"], rel=1e-4)


def test_kl_is_exact(typed, pairs_csv, base_model, tmp_path):
    """If this breaks, the logged KL is not that of the two distributions: by hand over the whole vocabulary."""
    words = [*typed, "--dpo", 1, "--rlhf_train_file", pairs_csv, "--enable_progress_bar", 0]
    config = parse([str(word) for word in words])
    ready = start(config, tmp_path)
    pairs = Inputs(config, ready, tmp_path)._pairs(str(pairs_csv), cap=False)
    model = ready.model.eval()
    distance = Divergence(model, pairs, 0)
    assert distance.of(model) == pytest.approx(0, abs=1e-7)
    truth, places = [], {}
    order = distance.batch.starts.tolist()
    for at in distance.positions.tolist():
        segment = next(i for i in range(len(order) - 1) if order[i] <= at < order[i + 1])
        assert segment % 2 == 0  # chosen answers only
        places.setdefault(segment // 2, []).append(at - order[segment])

    def distributions():
        found = []
        for number, offsets in sorted(places.items()):
            first, last = distance.batch.prompt_starts[number : number + 2].tolist()
            begin, end = order[2 * number], order[2 * number + 1]
            row = [*distance.batch.prompts[first:last].tolist(), *distance.batch.answers[begin:end].tolist()]
            with torch.no_grad():
                logits = model.head(model(torch.tensor([row]))[0])[0].double()
            found += [logits[last - first + offset].softmax(0) for offset in offsets]
        return found

    before = distributions()
    with torch.no_grad():
        model.head.weight.add_(0.3 * torch.randn(model.head.weight.shape, generator=torch.Generator().manual_seed(2)))
    for p, q in zip(distributions(), before):
        truth.append(float((p * (p / q).log()).sum()))
    assert sum(truth) / len(truth) > 0.01
    assert distance.of(model) == pytest.approx(sum(truth) / len(truth), rel=1e-4)


def test_rated_answers_do_not_train_pair_losses(script, typed, rated_csv):
    """A file of single answers under --dpo 1 would otherwise end in a missing column that nobody forgot."""
    status, _, err = script(train.main, *typed, "--dpo", 1, "--rlhf_train_file", rated_csv)
    assert status == 2 and "--kto 1" in err and str(rated_csv) in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,completion,label\np,x,true\nq,y,maybe\n", ["rated.csv:3", "label", "maybe"]),
        ("prompt,completion,label\np,x,true\np,y,0\n", ["two different prompts"]),
        ("prompt,completion,label\np,,true\nq,y,1\n", ["rated.csv:2", "completion", "empty"]),
    ],
)
def test_bad_rated_answers_are_named(script, typed, tmp_path, text, said):
    """One sentence with file and line."""
    (tmp_path / "rated.csv").write_text(text)
    status, _, err = script(train.main, *typed, "--kto", 1, "--rlhf_train_file", tmp_path / "rated.csv")
    assert status == 2 and all(part in err for part in said), err


def test_rated_jsonl_and_a_heavy_prompt(go, tmp_path, caplog):
    """JSONL with booleans and messages; one prompt with most answers still finds others; the imbalance is said."""
    caplog.set_level("INFO")
    lines = [{"prompt": "p", "completion": f"bad {n}", "label": False} for n in range(6)]
    lines += [{"prompt": [{"role": "user", "content": "q"}], "completion": "good", "label": True}]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records, _ = go("out", "--kto", 1, "--rlhf_train_file", tmp_path / "rated.jsonl", "--epoch_steps", 2)
    assert len(of(records, "train")) == 2
    assert "1 good and 6 bad answers" in caplog.text and "--kto_desirable_weight 6" in caplog.text


def test_dry_run_shows_both_answers_and_the_counts(go, pairs_csv, text_jsonl, rated_csv):
    """If this breaks, a user cannot see what would be trained on before paying for it."""
    _, out = go(
        "dpo",
        *("--dpo", 1, "--rlhf_train_file", pairs_csv, "--data_file", text_jsonl, "--dpo_general_corpus_ratio", 0.5),
        *("--dry_run", 1, "--rlhf_max_corpus_len", 20, "--random_mode", 0),
    )
    assert "gladly: 0" in out and "no 0" in out and "line 0: abc" in out
    assert "prompt cut in" in out and "24 pairs" in out and "40 rows" in out
    _, out = go("kto", "--kto", 1, "--rlhf_train_file", rated_csv, "--dry_run", 1, "--random_mode", 0)
    assert "gladly: 0" in out and "no 1" in out and "16 good and 16 bad" in out


def test_dry_run_colours_what_is_trained():
    """Prompts dim, chosen answers green, rejected ones red; token by token where the mask changes."""
    batch = pack_pairs([PairExample([1, 2, 3], [4, 5], [6])])
    chosen, reject = pair_sample(batch, lambda ids: "".join(map(str, ids)))
    assert [(chosen.plain[s.start : s.end], s.style) for s in chosen.spans] == [("123", "dim"), ("45", GOOD)]
    assert [(reject.plain[s.start : s.end], s.style) for s in reject.spans] == [("123", "dim"), ("6", BAD)]


def test_scores_of_another_start_model_are_not_taken(go, pairs_csv):
    """If this breaks, PiSSA over packed matrices is compared with a model that it never was."""
    pytest.importorskip("bitsandbytes")
    first = []
    for words in (("lora", 8), ("pissa", 8), ("pissa", 4)):
        packed = ["--quant", 1, "--quant_mode", "nf4", "--peft", words[0], "--lora_r", words[1], "--lora_dropout", 0]
        packed += ["--force", 1]  # the same folder, with its cache
        records, _ = go(
            "out", "--dpo", 1, "--rlhf_train_file", pairs_csv, *packed, "--epoch_steps", 1, "--micro_bsz", 4
        )
        first.append(of(records, "train")[-1]["reward_margin"])
    assert first == pytest.approx([0, 0, 0], abs=1e-4)


def test_foreign_scores_do_not_judge_a_loss_without_a_reference(go, pairs_csv, tmp_path):
    """If this breaks, --val_split of ORPO tells an accuracy against numbers that stood in the file."""
    rows = [([5 + n], [6, 7, n + 1, 0], [8, 9, n + 1, 0], -50.0, -1.0) for n in range(24)]
    torch.save(rows, tmp_path / "foreign.save")
    words = ["--orpo", 1, "--rlhf_train_file", tmp_path / "foreign.save", "--val_split", 0.25, "--epoch_steps", 1]
    records, _ = go("out", *words, "--lr_init", "1e-9", "--lr_final", "1e-9")
    (held_out,) = of(records, "val")
    assert held_out["logp_margin"] == pytest.approx(0, abs=1e-3)
    assert held_out["reward_margin"] == pytest.approx(held_out["log_odds_margin"], rel=1e-5)


@pytest.mark.parametrize(
    ("words", "longest"),
    [
        (("--infctx_dataset_multiplier", 3), 100),
        (("--infctx_dataset_multiplier", 3, "--reset_state", 0), 100),
        (("--initial_ctx_len", 4, "--ctx_warmup_steps", 2), 4),
    ],
)
def test_general_text_beside_dpo_has_the_samples_of_text(typed, pairs_csv, text_jsonl, words, longest, tmp_path):
    """If this breaks, flags for text crash on the pairs beside it, or do nothing."""
    (tmp_path / "out").mkdir()
    mixed = ["--dpo", 1, "--rlhf_train_file", pairs_csv, "--data_file", text_jsonl, "--dpo_general_corpus_ratio", 0.5]
    tokens = []
    for more in ((), words):
        config = parse([str(word) for word in (*typed, *mixed, "--micro_bsz", 2, *more)])
        steps = Inputs(config, start(config, tmp_path / "out"), tmp_path / "out").training(score=False)
        batch = steps.micro_batch(0)
        assert len(batch.starts) == 5
        tokens.append(batch.general.tokens.numel())
    assert tokens[1] > tokens[0] if longest > 4 else tokens[1] <= 2 * longest < tokens[0]
