"""From a teacher to a trained student: the file of its logits, the live teacher, whole runs, and what is refused.

Legend: T tokens, K teacher's logits per token.
"""

import json
import shlex

import numpy as np
import pytest
import torch

from rwkv_rlhf.checkpoints.loading import BuildOptions, load_model
from rwkv_rlhf.commands import distillation_h5 as generate
from rwkv_rlhf.commands import sft_h5, train
from rwkv_rlhf.data.batch import TextBatch, TextExample, pack_texts
from rwkv_rlhf.data.text.h5 import open_h5, writing
from rwkv_rlhf.data.text.teacher_log import TeacherLog
from rwkv_rlhf.scoring.teacher import Teacher, top_logits
from tests.support.files import VOCAB, read_jsonl
from tests.support.old_h5 import old_file

pytestmark = pytest.mark.slow

h5py = pytest.importorskip("h5py")
K = 5
FLAGS = """--ctx_len 64 --micro_bsz 2 --epoch_steps 4 --epoch_count 1 --epoch_save 1 --lr_init 1e-3 --lr_final 1e-3
 --precision fp32 --quant 0 --random_seed 3 --log_every 1"""


@pytest.fixture(scope="module")
def teacher_model(tmp_path_factory, base_model):
    """Another model with the same vocabulary: the student's, pushed off."""
    tensors = torch.load(base_model, weights_only=True)
    generator = torch.Generator().manual_seed(1)
    for name, value in tensors.items():
        tensors[name] = value + 0.05 * torch.randn(value.shape, generator=generator)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(tensors, path)
    return path


@pytest.fixture
def documents(tmp_path):
    """Texts and chats of unequal lengths, one longer than a window."""
    lines = [{"text": f"line {n}: " + "abc " * (1 + n % 6)} for n in range(10)]
    lines += [{"prompt": f"say {n}", "completion": f"gladly: {n}" + "!" * n} for n in range(6)]
    lines.insert(4, {"text": "a long one " * 20})
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def words(teacher_model, vocab_file, documents, tmp_path):
    """The generator's command line."""
    return [
        *("--load_model", teacher_model, "--vocab_file", vocab_file, "--input_folder", documents),
        *("--output_parquet", tmp_path / "F.h5", "--strategy", "cpu fp32", "--top_k", K, "--batch_tokens", 64),
    ]


@pytest.fixture
def go(script, base_model, vocab_file, tmp_path):
    """go(name, words) runs train.py into tmp_path/name; gives (folder, status, stderr)."""

    def call(name, words):
        start = ["--load_model", base_model, "--vocab_file", vocab_file, "--proj_dir", tmp_path / name]
        status, _, err = script(train.main, *start, *shlex.split(FLAGS), *shlex.split(words))
        return tmp_path / name, status, err

    return call


def weights(folder):
    return torch.load(folder / "rwkv-0.pth", weights_only=True)


def contents(path):
    """Every dataset and attribute of an .h5, to compare two of them."""
    with h5py.File(path) as file:
        sets = {name: [entry.tolist() for entry in file[name][:]] for name in sorted(file)}
        return sets, dict(file.attrs)


def test_the_file_holds_what_the_teacher_thinks(script, words, teacher_model, tmp_path):
    """Each row against the teacher run alone on its document, in float64, with full logits."""
    status, _, err = script(generate.main, *words)
    assert status == 0, err
    texts = open_h5(tmp_path / "F.h5", VOCAB, teacher=True)
    assert texts.k == K and len(texts) == 17 and not (tmp_path / "F.h5.part").exists()
    model, _ = load_model(teacher_model, BuildOptions(torch.float64))
    for index in range(len(texts)):
        example = texts[index]
        with torch.no_grad():
            hidden, _ = model(torch.from_numpy(example.tokens)[None])
            logits = model.head(hidden[0])
        best = logits.topk(K, dim=1)
        assert np.allclose(example.teacher.values, best.values, atol=2e-4)
        assert np.allclose(example.teacher.lse, logits.logsumexp(1), atol=2e-4)
        picked = logits.gather(1, torch.from_numpy(example.teacher.indices))
        assert np.allclose(picked, best.values, atol=2e-4)
    assert texts[4].mask is None and texts[12].mask is not None
    assert dict(contents(tmp_path / "F.h5")[1])["top_k"] == K


@pytest.mark.parametrize("chunk", [2, 7, 50, 4096])
def test_chunks_carry_the_state_and_forget_it_at_a_start(base_model, chunk):
    """A long document over several chunks, documents that begin at a border, one of a single token."""
    model, _ = load_model(base_model, BuildOptions(torch.float64))
    lengths = [3, 11, 1, 13, 7, 15]
    tokens = torch.randint(VOCAB, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([0, *np.cumsum(lengths).tolist()])
    found = top_logits(model, TextBatch(tokens, tokens, starts, 1.0), VOCAB, head_chunk=5, chunk=chunk)
    with torch.no_grad():
        alone = torch.cat([model.head(model(part[None])[0][0]) for part in tokens.split(lengths)])
    logits = torch.empty_like(alone).scatter_(1, found.indices, found.values)
    torch.testing.assert_close(logits, alone, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.lse, alone.logsumexp(1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cut", ["between batches", "in a batch", "in its head", "in the first line", "before the end"])
def test_a_stopped_run_goes_on_and_ends_the_same(script, words, tmp_path, monkeypatch, caplog, cut):
    """No document is lost, none stands twice, and the file is that of an unbroken run."""
    assert script(generate.main, *words)[0] == 0
    whole = contents(tmp_path / "F.h5")
    (tmp_path / "F.h5").unlink()
    real, seen = TeacherLog.append, []

    def killed(self, batch):
        if len(seen) == 2:
            raise KeyboardInterrupt
        real(self, batch)
        seen.append(len(batch))

    part = tmp_path / "F.h5.part"
    if cut == "before the end":
        monkeypatch.setattr(generate, "writing", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    else:
        monkeypatch.setattr(TeacherLog, "append", killed)
    assert script(generate.main, *words)[0] == 130
    monkeypatch.undo()
    assert part.exists() and not (tmp_path / "F.h5").exists()
    size = part.stat().st_size
    lose = {"in a batch": 100, "in its head": size - size // 3, "in the first line": size - 9}.get(cut, 0)
    if cut == "in its head":
        first = part.read_bytes().index(b"DOCS")
        lose = size - first - 6
    with open(part, "rb+") as file:
        file.truncate(size - lose)
    caplog.set_level("INFO")
    status, _, err = script(generate.main, *words)
    assert status == 0, err
    assert contents(tmp_path / "F.h5") == whole and not part.exists()
    assert ("kept from an earlier run" in caplog.text) == (cut in ("between batches", "in a batch", "before the end"))


def test_unfinished_work_of_other_settings_is_not_mixed_in(script, words, tmp_path, monkeypatch):
    """Half of the file with K = 5 and half with K = 4 would be of no use."""
    monkeypatch.setattr(generate, "writing", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    script(generate.main, *words)
    monkeypatch.undo()
    status, _, err = script(generate.main, *words, "--top_k", 4)
    assert status == 2 and "unfinished work of a run with another top_k" in err and (tmp_path / "F.h5.part").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--top_k", 0], "--top_k 0: must be at least 1"),
        (["--top_k", 258], "--top_k 258 is more than the 257 tokens of the vocabulary"),
        (["--load_initial_state", "s.pth"], "not built yet"),
        (["--input_folder", "nowhere"], "there is no such folder or file"),
        (["--template", "odd"], "--template odd is not known"),
    ],
)
def test_mistakes_of_the_generator(script, words, more, message):
    """One sentence, status 2, before anything slow."""
    status, _, err = script(generate.main, *words, *more)
    assert status == 2 and message in err and err.count("\n") == 1


def test_a_live_teacher_is_the_file(script, words, documents, teacher_model, tmp_path, go):
    """The same documents in the same order: loss by loss and weight by weight, to float error, tail included."""
    assert script(generate.main, *words)[0] == 0
    common = "--distillation 1 --temperature 2 --alpha 0.3 --smoothing 0.01 --kd_tail 1 --ctx_len 512"
    filed, status, err = go("filed", f"{common} --train_data_file {tmp_path / 'F.h5'}")
    assert status == 0, err
    live = f"{common} --top_k {K} --train_data_file {documents} --teacher_model {teacher_model}"
    live, status, err = go("live", live)
    assert status == 0, err
    one, two = (read_jsonl(folder / "metrics.jsonl", "train") for folder in (filed, live))
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        assert a["tokens"] == b["tokens"]
        for name in ("loss", "ce", "kd", "nll", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=2e-4), name
    assert one[0]["loss"] == pytest.approx(0.3 * one[0]["ce"] + 0.7 * one[0]["kd"], rel=1e-6)
    for name, tensor in weights(filed).items():
        assert float((tensor - weights(live)[name]).norm() / tensor.norm().clamp_min(1e-3)) < 2e-3, name


def test_a_live_teacher_skips_masked_positions(teacher_model):
    """Its head is asked where a target is trained, and a row without one is harmless."""
    model, _ = load_model(teacher_model, BuildOptions(torch.float32))
    masked = TextExample(np.arange(1, 9), np.array([False] * 5 + [True] * 3))
    batch = Teacher(model, K, 4)(pack_texts([masked, TextExample(np.arange(20, 26))]))
    assert batch.top_values.shape == (12, K) == batch.top_indices.shape and batch.top_lse.shape == (12,)
    assert bool((batch.top_values[:4] == 0).all()) and bool((batch.top_lse[4:] != 0).all())
    nothing = Teacher(model, K, 4)(pack_texts([TextExample(np.arange(4), np.zeros(4, bool))]))
    assert bool((nothing.top_values == 0).all())
    assert Teacher(model, K, 4)(pack_texts([TextExample(np.array([7]))])).top_values.shape == (0, K)


@pytest.mark.parametrize("kd", ["forward", "reverse", "js"])
def test_the_student_comes_nearer_to_its_teacher(script, words, tmp_path, go, kd):
    """What distillation is for; K of the file is taken without being told."""
    assert script(generate.main, *words)[0] == 0
    more = f"--distillation 1 --alpha 0 --kd {kd} --epoch_steps 24 --lr_init 3e-3 --train_data_file {tmp_path / 'F.h5'}"
    folder, status, err = go(kd, more)
    assert status == 0, err
    steps = read_jsonl(folder / "metrics.jsonl", "train")
    assert np.mean([s["kd"] for s in steps[-4:]]) < 0.5 * np.mean([s["kd"] for s in steps[:4]])


@pytest.mark.parametrize("more", ["", "--kd js --kd_tail 1", "--kd reverse --peft lora --lora_dropout 0", "LIVE"])
def test_long_contexts_give_the_same_gradient(script, words, documents, teacher_model, tmp_path, go, more):
    """--infctx in chunks of 16 tokens against one pass, in float64: packed, accumulated, from a file and alive."""
    assert script(generate.main, *words)[0] == 0
    data = f"--train_data_file {tmp_path / 'F.h5'}"
    if more == "LIVE":
        data, more = f"--data_file {documents} --teacher_model {teacher_model} --top_k {K}", ""
    common = (
        f"--distillation 1 --precision fp64 --ctx_len 200 --smoothing 0.01 --infctx_dataset_multiplier 3 {data} {more}"
    )
    common += " --micro_bsz 1 --accumulate_grad_batches 2 --epoch_steps 4"
    (one, status, err), (two, also, _) = go("whole", common), go("chunks", f"{common} --infctx 1 --chunk_ctx 16")
    assert status == also == 0, err
    pairs = zip(*(read_jsonl(folder / "metrics.jsonl", "train") for folder in (one, two)), strict=True)
    for a, b in pairs:
        for name in ("loss", "ce", "kd", "nll", "grad_norm", "l2wrap"):
            assert a[name] == pytest.approx(b[name], rel=1e-9), name
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=1e-5, atol=1e-7, msg=name)


def test_the_plan_of_a_distillation(script, words, teacher_model, documents, tmp_path, go):
    """--dry_run 1 shows what the teacher costs, from a file and alive, and trains nothing."""
    assert script(generate.main, *words)[0] == 0
    for more in (f"--train_data_file {tmp_path / 'F.h5'}", f"--data_file {documents} --teacher_model {teacher_model}"):
        folder, status, err = go("plan", f"--distillation 1 --dry_run 1 --infctx_dataset_multiplier 4 {more}")
        assert status == 0 and not list(folder.glob("rwkv-*")), err


def test_published_distillation_command(script, words, tmp_path, go):
    """As the tradition types it, --top_k 100 of a file with K = 100."""
    assert script(generate.main, *words, "--top_k", 100)[0] == 0
    folder, status, err = go(
        "old",
        f"""--infctx 1 --chunk_ctx 512 --ctx_len 65536 --distillation 1 --temperature 2 --top_k 100 --alpha 0.5
        --smoothing 0.005 --train_data_file {tmp_path / "F.h5"}""",
    )
    assert status == 0, err
    for step in read_jsonl(folder / "metrics.jsonl", "train"):
        assert step["loss"] == pytest.approx(0.5 * step["ce"] + 0.5 * step["kd"], rel=1e-5)


def test_published_sft_command_trains_as_the_jsonl_does(script, documents, vocab_file, tmp_path, go):
    """Bit-identical weights from the .h5 and from the JSONL that it was made of, eight documents to a sample."""
    flags = ["--input_folder", documents, "--output_parquet", tmp_path / "F.h5", "--vocab_size", VOCAB]
    assert script(sft_h5.main, *flags, "--vocab_file", vocab_file)[0] == 0
    command = "--sft 1 --smoothing 0.005 --random_mode 1 --infctx_dataset_multiplier 8 --ctx_len 256 --train_data_file"
    one, status, err = go("h5", f"{command} {tmp_path / 'F.h5'}")
    assert status == 0, err
    two, status, err = go("jsonl", f"{command} {documents}")
    assert status == 0, err
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(two)[name]), name
    assert max(s["tokens"] for s in read_jsonl(one / "metrics.jsonl", "train")) > 150
    two, status, err = go("long", f"--infctx 1 --chunk_ctx 32 {command} {tmp_path / 'F.h5'}")
    assert status == 0, err
    for name, tensor in weights(one).items():
        assert float((tensor - weights(two)[name]).norm() / tensor.norm().clamp_min(1e-3)) < 2e-3, name
    _, status, err = go("split", f"{command} {tmp_path / 'F.h5'} --val_split 0.3")
    assert status == 0, err
    _, status, err = go("glued", f"{command} {tmp_path / 'F.h5'} --reset_state 0 --val_file {tmp_path / 'F.h5'}")
    assert status == 0, err


def test_context_warm_up_survives_a_resume(tmp_path, go):
    """Samples grow with the step's number: two mini-epochs in one run, or in two, feed the same lengths."""
    (tmp_path / "even.jsonl").write_text("".join(json.dumps({"text": letter * 60}) + "\n" for letter in "abcdefghij"))
    grow = f"--sft 1 --data_file {tmp_path / 'even.jsonl'} --micro_bsz 1 --ctx_len 60"
    grow += " --initial_ctx_len 10 --ctx_warmup_steps 5"
    once, status, err = go("once", f"{grow} --epoch_count 2")
    assert status == 0, err
    tokens = [s["tokens"] for s in read_jsonl(once / "metrics.jsonl", "train")]
    assert tokens == [10, 20, 30, 40, 50, 60, 60, 60]
    go("twice", grow)
    twice, status, err = go("twice", f"{grow} --epoch_begin 1 --force 1")
    assert status == 0, err
    assert [s["tokens"] for s in read_jsonl(twice / "metrics.jsonl", "train")] == tokens


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train_data_file OLD --top_k 9", "--top_k 9 is more than the 4 teacher's logits per token of"),
        ("--train_data_file OLD --kd_tail 1", "--kd_tail 1 needs the log-sum-exp"),
        ("--train_data_file PLAIN", "holds no teacher's logits"),
        ("--train_data_file CUT", "is truncated"),
        ("--train_data_file WIDE", "the teacher's token id 285 is outside the model's vocabulary of 257"),
        ("--train_data_file SHORT", "do not fit 4 tokens, K = 4"),
        ("--train_data_file TEXT", "--distillation 1 needs a teacher"),
        ("--train_data_file TEXT --teacher_model OTHER", "has a vocabulary of 100, the model one of 257"),
        ("--train_data_file TEXT --teacher_model TEXT", "text.jsonl"),
        ("--train_data_file TEXT --teacher_model TEACHER --top_k 300", "--top_k 300 is more than the 257 tokens"),
        ("--train_data_file MISSING", "cannot be read"),
    ],
)
def test_what_does_not_fit_ends_with_one_sentence(tmp_path, go, text_jsonl, teacher_model, flags, message):
    """Status 2, nothing trained, nothing written over."""
    from rwkv_rlhf.model.initial import initial_tensors

    ids = ([5, 6, 7, 0], [8, 9, 10, 0], [11, 0])
    files = {
        "OLD": old_file(tmp_path / "old.h5", ids, 4),
        "PLAIN": old_file(tmp_path / "plain.h5", ids),
        "WIDE": old_file(tmp_path / "wide.h5", ids, 4, top_k_indices=(0, np.arange(285, 301))),
        "SHORT": old_file(tmp_path / "short.h5", ids, 4, top_k_values=(1, np.zeros(12))),
        "CUT": tmp_path / "cut.h5",
        "TEXT": text_jsonl,
        "TEACHER": teacher_model,
        "OTHER": tmp_path / "other.pth",
        "MISSING": tmp_path / "missing.h5",
    }
    files["CUT"].write_bytes(files["OLD"].read_bytes()[:3000])
    torch.save(initial_tensors("x070", 2, 64, 100, 32, seed=7), files["OTHER"])
    words = " ".join(str(files.get(word, word)) for word in flags.split())
    folder, status, err = go("refused", f"--distillation 1 {words}")
    assert status == 2 and message in err, err
    assert err.strip().splitlines()[-1].startswith("error: ") and not list(folder.glob("rwkv-*"))


def test_old_files_train_and_an_all_masked_sample_is_harmless(tmp_path, go):
    """A file without our additions; a sample whose first tokens, all that the warm-up leaves of it, are masked."""
    folder, status, err = go("old", f"--distillation 1 --train_data_file {old_file(tmp_path / 'old.h5', k=4)}")
    assert status == 0, err
    mask = np.array([False] * 20 + [True] * 5)
    with writing(tmp_path / "masked.h5", {}) as out:
        out.add([TextExample(np.arange(1, 26), mask), TextExample(np.array([3])), TextExample(np.arange(30, 55), mask)])
    more = f"--sft 1 --smoothing 0.01 --train_data_file {tmp_path / 'masked.h5'} --ctx_len 24"
    folder, status, err = go("masked", f"{more} --initial_ctx_len 5 --ctx_warmup_steps 3")
    assert status == 0, err
    steps = read_jsonl(folder / "metrics.jsonl", "train")
    assert [step["loss"] == 0 for step in steps] == [True, True, True, False]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(folder).values())
