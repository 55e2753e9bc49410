"""Text documents and chats: which tokens are there, which are trained, and how long documents are cut."""

import pytest

from rwkv_rlhf.data.batch import IGNORE, pack_texts
from rwkv_rlhf.data.text.documents import open_text
from tests.support.files import CHAT, jsonl


def trained_text(example, world):
    return world.decode([int(t) for t, m in zip(example.tokens, example.mask) if m])


def test_text_is_byte_for_byte_and_its_end_is_trained(tmp_path, world):
    """The tradition masked token 0, so the end of a document was never learnt."""
    text = "  a\r\n\r\nb \n"
    texts = open_text(jsonl(tmp_path / "a.jsonl", {"text": text}), world)
    tokens = texts[0].tokens.tolist()
    assert tokens == [*world.encode(text), 0]
    batch = pack_texts([texts[0]])
    assert batch.targets.tolist() == tokens[1:]
    assert texts.trained(0) == len(tokens) - 1 == texts.report.trained == batch.total


def test_chats_train_the_assistant_only(tmp_path, world):
    """Answers and their closing mark; the user's words and the cue are given."""
    texts = open_text(jsonl(tmp_path / "a.jsonl", {"messages": CHAT}), world)
    whole = "System: Be kind.\n\nUser: Hi\nthere\n\nAssistant: Hello\n\nUser: Bye\n\nAssistant: Good\nnight\n\n"
    assert world.decode(texts[0].tokens.tolist()) == whole
    assert trained_text(texts[0], world) == " Hello\n\n Good\nnight\n\n"
    batch = pack_texts([texts[0]])
    assert int((batch.targets != IGNORE).sum()) == texts.trained(0) == texts[0].trained()
    everything = open_text(tmp_path / "a.jsonl", world, train_on_prompt=True)
    assert everything[0].mask is None
    assert world.decode(everything[0].tokens.tolist()) == whole + "User: ?\n\n"


def test_prompt_and_completion(tmp_path, world):
    """Trained like one turn of a chat; with the plain template bare text closed by token 0."""
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "Two?", "completion": "Three"})
    text = open_text(path, world)[0]
    assert (world.decode(text.tokens.tolist()), trained_text(text, world)) == (
        "User: Two?\n\nAssistant: Three\n\n",
        " Three\n\n",
    )
    plain = open_text(path, world, template="plain")[0]
    assert plain.tokens.tolist() == [*world.encode("Two?"), *world.encode("Three"), 0]
    assert plain.mask.tolist() == [False] * len(world.encode("Two?")) + [True] * (len(world.encode("Three")) + 1)


@pytest.mark.parametrize("ctx_len", [1, 2, 5, 7, 100])
def test_long_documents_are_cut_so_that_each_token_is_predicted_once(tmp_path, world, ctx_len):
    """Nothing is lost at the cuts and nothing counted twice."""
    records = [{"text": "one two three four five six"}, {"messages": CHAT}, {"text": "x"}]
    path = jsonl(tmp_path / "a.jsonl", *records)
    whole, pieces = open_text(path, world), open_text(path, world, ctx_len=ctx_len)
    want = [t for i in range(len(whole)) for t in pack_texts([whole[i]]).targets.tolist() if t != IGNORE]
    got = [t for i in range(len(pieces)) for t in pack_texts([pieces[i]]).targets.tolist() if t != IGNORE]
    assert got == want
    assert max(len(pieces[i].tokens) for i in range(len(pieces))) <= ctx_len + 1
    assert sum(pieces.trained(i) for i in range(len(pieces))) == whole.report.trained == pieces.report.trained
    assert all(pieces.trained(i) > 0 for i in range(len(pieces)))


def test_documents_without_a_trained_token_are_counted(tmp_path, world):
    """An empty text is one token long, a chat may have no answer: harmless, but said."""
    path = jsonl(tmp_path / "a.jsonl", {"text": ""}, {"messages": CHAT[:2]}, {"text": "ok"})
    texts = open_text(path, world)
    assert (len(texts), texts.report.rows, texts.report.skipped.total()) == (1, 3, 2)
    with pytest.raises(ValueError, match="holds no text to train on"):
        open_text(jsonl(tmp_path / "b.jsonl", {"text": ""}), world)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": 3}', "text must be a string"),
        (b'{"content": "x"}', "its keys are content; the shapes are text, messages, sharegpt"),
        (b'{"messages": "x"}', "messages must be a list"),
        (b'{"messages": [{"role": "user", "content": ""}]}', "message 1 is empty"),
        (b'{"prompt": "x", "completion": " "}', "completion is empty"),
        (b'{"text": "\xff"}', "byte 0xff is not UTF-8"),
        (b"nonsense", "not a JSON object"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path, world, line, message):
    """And with skip_bad they are counted."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "ok"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:3: .*" + message):
        open_text(path, world)
    assert open_text(path, world, skip_bad=True).report.skipped.total() == 1


def test_text_files(tmp_path, world):
    """A .txt is one document; bytes that are not UTF-8 are named by line."""
    (tmp_path / "a.txt").write_bytes("\ufeffa\r\n\u00e9".encode())
    assert open_text(tmp_path / "a.txt", world)[0].tokens.tolist() == [*world.encode("a\r\n\u00e9"), 0]
    (tmp_path / "b.txt").write_bytes(b"a\nb\xff")
    with pytest.raises(ValueError, match=r"b\.txt:2: byte 0xff is not UTF-8"):
        open_text(tmp_path / "b.txt", world)
    with pytest.raises(ValueError, match="--data_type md is no text that can be read; one of csv, tsv, jsonl"):
        open_text(tmp_path / "a.txt", world, data_type="md")
