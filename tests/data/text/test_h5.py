"""Documents in HDF5: the older programs' layout both ways, lazy reading, what is refused, and joined samples."""

import gc
import multiprocessing
import os
import pickle

import numpy as np
import pytest

from rwkv_rlhf.commands import sft_h5
from rwkv_rlhf.data.batch import TextExample, TopK, pack_texts
from rwkv_rlhf.data.opening import kind_of, open_text
from rwkv_rlhf.data.split import split
from rwkv_rlhf.data.text.h5 import open_h5, writing
from rwkv_rlhf.data.tokenizer import load_tokenizer
from tests.support.files import CHAT, VOCAB, jsonl
from tests.support.old_h5 import DOCUMENTS, old_file

h5py = pytest.importorskip("h5py")
K = 3


def test_old_files_are_read_with_their_k(tmp_path):
    """K is in no old file; taken from a flag, 50 against 100 ended in a shape error."""
    texts = open_h5(old_file(tmp_path / "a.h5", k=K), 20, teacher=True)
    assert texts.k == K and [texts[i].tokens.tolist() for i in range(3)] == [*map(list, DOCUMENTS)]
    with h5py.File(tmp_path / "a.h5") as file:
        for index, ids in enumerate(DOCUMENTS):
            top = texts[index].teacher
            assert np.array_equal(top.values, file["top_k_values"][index].reshape(len(ids), K)) and top.lse is None
            assert np.array_equal(top.indices, file["top_k_indices"][index].reshape(len(ids), K))
    batch = pack_texts([texts[0], texts[1]])
    assert batch.top_values.shape == (6, K) and batch.top_lse is None
    assert np.array_equal(batch.top_values[3:].numpy(), texts[1].teacher.values[:3])
    assert kind_of(tmp_path / "a.h5") == "text"


def test_fewer_logits_than_the_file_has(tmp_path):
    """--top_k 2 of K = 3 are the two largest, wherever they stand."""
    values = np.array([1.0, 3.0, 2.0] * 2, dtype=np.float32)
    path = old_file(tmp_path / "a.h5", ([5, 0],), K, top_k_values=(0, values))
    top = open_h5(path, 20, teacher=True, top_k=2)[0].teacher
    assert top.values.tolist() == [[3, 2]] * 2 and top.indices.tolist() == [[1, 2]] * 2
    with pytest.raises(ValueError, match=r"--top_k 4 is more than the 3 teacher's logits per token of .*a\.h5"):
        open_h5(path, 20, teacher=True, top_k=4)


def test_the_older_programs_read_ours(tmp_path):
    """Their loaders take f["tokens"][i] and f["top_k_values"][i].reshape(-1, K); equal lengths must not become a
    matrix, and what we add must not stand in their way."""
    rng = np.random.default_rng(0)
    documents = [
        TextExample(
            np.array(ids),
            np.array([True] * len(ids)) if ids[0] == 8 else None,
            TopK(rng.normal(size=(len(ids), K)), rng.integers(0, 20, (len(ids), K)), rng.normal(size=len(ids))),
        )
        for ids in DOCUMENTS
    ]
    with writing(tmp_path / "a.h5", {"tokenizer": "x"}, K) as out:
        out.add(documents[:1])
        out.add(documents[1:])
    with h5py.File(tmp_path / "a.h5") as file:
        assert [file["tokens"][i].tolist() for i in range(3)] == [*map(list, DOCUMENTS)]
        for name, kind in (("tokens", np.int64), ("top_k_values", np.float32), ("top_k_indices", np.int64)):
            assert h5py.check_vlen_dtype(file[name].dtype) == kind and file[name].shape == (3,)
        assert file["top_k_values"][1].reshape(-1, K).shape == (4, K)
        assert [len(file["mask"][i]) for i in range(3)] == [0, 4, 0] and file.attrs["top_k"] == K
    back = open_h5(tmp_path / "a.h5", 20, teacher=True)
    for index, document in enumerate(documents):
        assert np.array_equal(back[index].tokens, document.tokens)
        for name in ("values", "indices", "lse"):
            truth = getattr(document.teacher, name)
            assert np.allclose(getattr(back[index].teacher, name), truth, rtol=1e-6, atol=0)


def test_sft_file_gives_what_the_jsonl_gives(tmp_path, script, vocab_file):
    """Text, chats with their masks, prompt and completion: training from the .h5 is training from the JSONL."""
    (tmp_path / "in").mkdir()
    long = {"text": "one two three four five six seven"}
    jsonl(tmp_path / "in" / "a.jsonl", {"messages": CHAT}, long)
    jsonl(tmp_path / "in" / "b.jsonl", {"prompt": "Two?", "completion": "Three"}, {"text": ""}, {"text": "x"})
    words = ["--input_folder", tmp_path / "in", "--output_parquet", tmp_path / "a.h5", "--vocab_size", VOCAB]
    status, _, err = script(sft_h5.main, *words, "--vocab_file", vocab_file)
    assert status == 0, err
    tokenizer = load_tokenizer(VOCAB, str(vocab_file))
    for cut in (0, 7):
        want = [
            example
            for name in ("a", "b")
            for example in list(texts_of(tmp_path / "in" / f"{name}.jsonl", tokenizer, ctx_len=cut))
        ]
        found = texts_of(tmp_path / "a.h5", tokenizer, ctx_len=cut)
        assert len(found) == len(want) == (4 if not cut else len(found))
        for at, truth in enumerate(want):
            example = found[at]
            assert example.tokens.tolist() == truth.tokens.tolist() and found.trained(at) == truth.trained()
            masks = [np.ones(len(e.tokens), bool) if e.mask is None else e.mask for e in (example, truth)]
            assert np.array_equal(*masks)
    everything = texts_of(tmp_path / "a.h5", tokenizer, train_on_prompt=True)
    assert everything[0].mask is None
    train, held = split(found, 0.5, seed=1)
    assert not {found.group(i) for i in train.indices} & {found.group(i) for i in held.indices}


def texts_of(path, tokenizer, **how):
    return open_text(path, tokenizer, **how)


@pytest.mark.parametrize(("room", "reads"), [(1 << 30, 2), (1, 8)])
def test_a_document_is_not_read_again_for_each_of_its_pieces(tmp_path, monkeypatch, room, reads):
    """If this breaks, shuffled pieces of long documents cost a whole document each; or all of them fill the memory."""
    with writing(tmp_path / "a.h5", {}) as out:
        out.add([TextExample(np.arange(1, 41)), TextExample(np.arange(41, 81))])
    monkeypatch.setattr("rwkv_rlhf.data.text.h5.KEPT", room)
    texts = open_h5(tmp_path / "a.h5", 100, ctx_len=10)
    read, count = texts.file.document, []
    monkeypatch.setattr(texts.file, "document", lambda *words: count.append(words) or read(*words))
    pieces = [texts[index].tokens for index in (0, 4, 1, 5, 2, 6, 3, 7)]
    assert [int(piece[0]) for piece in pieces] == [1, 41, 11, 51, 21, 61, 31, 71] and len(count) == reads


def test_reading_is_lazy_and_survives_a_fork(tmp_path):
    """A worker process must not share HDF5's handle with its parent, and a big file must not be held in memory."""
    documents = [np.full(50_000, number % 16) for number in range(40)]
    with writing(tmp_path / "a.h5", {}) as out:
        out.add([TextExample(document) for document in documents])
    texts = open_h5(tmp_path / "a.h5", 20, ctx_len=20_000)
    del documents
    gc.collect()
    assert len(texts) == 120 and len(pickle.dumps(texts)) < 40_000
    again = pickle.loads(pickle.dumps(texts))
    assert np.array_equal(again[7].tokens, texts[7].tokens)
    if hasattr(os, "fork"):
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        workers = [context.Process(target=_read_all, args=(texts, queue)) for _ in range(2)]
        for worker in workers:
            worker.start()
        mine = [int(texts[index].tokens[0]) for index in range(len(texts))]
        theirs = [queue.get(timeout=60) for _ in workers]
        for worker in workers:
            worker.join(timeout=60)
        assert theirs == [mine, mine]


def _read_all(texts, queue):
    queue.put([int(texts[index].tokens[0]) for index in range(len(texts))])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": (1, np.array([8, 20, 10, 0]))}, "document 1: token id 20 is outside the model's vocabulary of 20"),
        ({"tokens": (1, np.array([8, -1, 10, 0]))}, "document 1: token id -1 is outside"),
        ({"tokens": (1, np.array([8, 9, 0]))}, "document 1: 12 .* and 12 indices do not fit 3 tokens, K = 3"),
        ({"top_k_indices": (2, np.arange(5))}, "document 2: 6 teacher's logits and 5 indices do not fit 2 tokens"),
        ({"top_k_indices": (2, np.array([0, 1, 2, 0, 1, 20]))}, "document 2: the teacher's token id 20 is outside"),
        ({"top_k_values": (0, np.full(12, np.nan))}, "document 0: the teacher's logits are not all finite"),
    ],
)
def test_what_does_not_fit_is_said_before_training(tmp_path, changes, message):
    """And with --skip_bad 1 such a document is left out and counted."""
    path = old_file(tmp_path / "a.h5", k=K, **changes)
    with pytest.raises(ValueError, match=r"a\.h5 " + message):
        open_h5(path, 20, teacher=True)
    texts = open_h5(path, 20, teacher=True, skip_bad=True)
    assert len(texts) == 2 and texts.report.skipped.total() == 1


def test_broken_files_are_one_sentence(tmp_path):
    """A copy that stopped half-way, a text file of that name, a file of something else."""
    path = old_file(tmp_path / "a.h5", [list(range(1, 20)) * 40] * 40)
    whole = path.read_bytes()
    for name, content, message in (
        ("b.h5", whole[: len(whole) // 2], "is truncated"),
        ("c.h5", b"hello" * 200, "not an HDF5 file"),
        ("d.h5", b"", "truncated|not an HDF5 file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}.*({message})"):
            open_h5(tmp_path / name, 20)
    with pytest.raises(ValueError, match="cannot be read"):
        open_h5(tmp_path / "missing.h5", 20)
    with h5py.File(tmp_path / "e.h5", "w") as file:
        file["images"] = np.zeros(3)
    with pytest.raises(ValueError, match="holds no dataset `tokens`"):
        open_h5(tmp_path / "e.h5", 20)
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["tokens"] = np.zeros(3)
    with pytest.raises(ValueError, match="`tokens` is no list of variable-length int64"):
        open_h5(tmp_path / "f.h5", 20)
    with pytest.raises(ValueError, match="holds no teacher's logits"):
        open_h5(path, 20, teacher=True)
    with writing(tmp_path / "g.h5", {"vocab_size": 30}) as out:
        out.add([TextExample(np.array([1, 2]))])
    with pytest.raises(ValueError, match="made for a vocabulary of 30, the model has 20"):
        open_h5(tmp_path / "g.h5", 20)
    for wrong, said in (("five", "'no number'"), (0, "0")):
        with h5py.File(old_file(tmp_path / "h.h5", k=K), "a") as file:
            file.attrs["top_k"] = wrong
        with pytest.raises(ValueError, match=rf"h\.h5: the attribute top_k is {said}"):
            open_h5(tmp_path / "h.h5", 20, teacher=True)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """Atomic: an error in the middle keeps what was there, and no temporary file stays."""
    path = old_file(tmp_path / "a.h5")
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="stop"), writing(path, {}) as out:
        out.add([TextExample(np.array([1, 2]))])
        raise RuntimeError("stop")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.h5"]
