"""binidx corpora: files of other tools byte by byte, and every way in which one can be broken."""

import struct

import numpy as np
import pytest

from rwkv_rlhf.data.text.binidx import Corpus, Slices, write_corpus
from rwkv_rlhf.data.text.documents import open_slices, open_text
from rwkv_rlhf.data.tokenizer import load_tokenizer


def index(sizes, pointers, code=8, magic=b"MMIDIDX\x00\x00", version=1, documents=None):
    """An .idx by the format's description, independent of the writer."""
    documents = list(range(len(sizes) + 1)) if documents is None else documents
    out = magic + struct.pack("<Q", version) + struct.pack("<B", code) + struct.pack("<QQ", len(sizes), len(documents))
    out += b"".join(struct.pack("<i", size) for size in sizes)
    return out + b"".join(struct.pack("<q", number) for number in [*pointers, *documents])


def corpus(folder, data, idx):
    (folder / "c.bin").write_bytes(data)
    (folder / "c.idx").write_bytes(idx)
    return folder / "c"


@pytest.mark.parametrize(("code", "form", "size"), [(1, "B", 1), (3, "h", 2), (4, "i", 4), (5, "q", 8), (8, "H", 2)])
def test_the_dtype_byte_is_honoured(tmp_path, code, form, size):
    """Tools write uint16 or int32 for the same vocabulary; reading one as the other gives garbage ids."""
    ids = [7, 8, 0, 9, 0]
    path = corpus(tmp_path, struct.pack(f"<5{form}", *ids), index([3, 2], [0, 3 * size], code))
    for name in (path, f"{path}.bin", f"{path}.idx"):
        found = Corpus(name, 100)
        assert [found.document(i).tolist() for i in range(len(found))] == [[7, 8, 0], [9, 0]]


@pytest.mark.parametrize(("vocab_size", "code", "form"), [(65536, 8, "H"), (65537, 4, "i"), (300, 8, "H")])
def test_the_bytes_that_are_written(tmp_path, vocab_size, code, form):
    """Other programs read these files: compared with bytes packed by hand."""
    documents = [np.array([1, 2, 0]), np.array([299, 0])]
    assert write_corpus(tmp_path / "c", documents, iter([1, 0, 1]), vocab_size) == 7
    size = struct.calcsize(form)
    assert (tmp_path / "c.bin").read_bytes() == struct.pack(f"<7{form}", 299, 0, 1, 2, 0, 299, 0)
    assert (tmp_path / "c.idx").read_bytes() == index([2, 3, 2], [0, 2 * size, 5 * size], code)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.bin", "c.idx"]


TWO = struct.pack("<5H", 7, 8, 0, 9, 0)


@pytest.mark.parametrize(
    ("data", "idx", "message"),
    [
        (TWO, index([3, 2], [0, 6], magic=b"MMIDIDY\x00\x00"), r"c\.idx: not an index"),
        (TWO, b"MMIDIDX\x00\x00\x01", r"c\.idx is truncated: 10 bytes"),
        (TWO, index([3, 2], [0, 6])[:-1], r"c\.idx is truncated"),
        (TWO, index([3, 2], [0, 6], version=2), r"c\.idx: version 2"),
        (TWO, index([3, 2], [0, 6], code=7), r"c\.idx: dtype byte 7"),
        (TWO, index([3, 2], [0, 4]), r"c\.idx: the pointer of document 1 is 4, but .* 6"),
        (TWO, index([3, -2], [0, 6]), r"c\.idx: document 1 has the negative size -2"),
        (TWO[:-1], index([3, 2], [0, 6]), r"c\.bin is truncated: 9 bytes, but .*c\.idx describes 10"),
        (TWO + b"xx", index([3, 2], [0, 6]), r"c\.bin has 12 bytes, but .*do not belong together"),
        (
            struct.pack("<5H", 7, 8, 0, 99, 0),
            index([3, 2], [0, 6]),
            r"c\.bin: document 1 holds token id 99 at position 3",
        ),
    ],
)
def test_broken_files(tmp_path, data, idx, message):
    """Each is found when the file is opened, not as a crash or nonsense in mid-training."""
    with pytest.raises(ValueError, match=message):
        Corpus(corpus(tmp_path, data, idx), 99)


def test_missing_files(tmp_path):
    """One sentence that names the file."""
    with pytest.raises(ValueError, match=r"c\.idx: cannot be read"):
        Corpus(tmp_path / "c")
    (tmp_path / "c.idx").write_bytes(index([3], [0]))
    with pytest.raises(ValueError, match=r"c\.bin: cannot be read"):
        Corpus(tmp_path / "c")


def test_slices_cover_the_stream(tmp_path):
    """Slots of ctx_len inputs and the token after; with stride 1 the last slice ends at the last token."""
    path = corpus(tmp_path, struct.pack("<9H", *range(9)), index([4, 5], [0, 8]))
    slots, report = open_slices(path, 65536, 4, 4)
    assert [slots[i].tokens.tolist() for i in range(len(slots))] == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    assert (slots.trained(0), slots[0].mask, report.rows, report.examples) == (4, None, 2, 2)
    every, _ = open_slices(path, 65536, 4, 1)
    assert len(every) == 5
    assert every[4].tokens.tolist() == [4, 5, 6, 7, 8]
    with pytest.raises(ValueError, match=r"9 tokens, too few for slices of --ctx_len 9 .* --ctx_len 8 is the most"):
        Slices(Corpus(path), 9, 9)


def test_documents_of_a_corpus(tmp_path):
    """For evaluation the documents are scored one by one, whole; one of a single token is counted and left out."""
    path = corpus(tmp_path, struct.pack("<6H", 7, 8, 0, 0, 9, 0), index([3, 1, 2], [0, 6, 8]))
    texts = open_text(path, load_tokenizer(65536))
    assert [texts[i].tokens.tolist() for i in range(len(texts))] == [[7, 8, 0], [9, 0]]
    assert texts.report.skipped.total() == 1
