"""--train_on_chosen 1: preference pairs among text are chats with the chosen answer."""

import pytest

from rwkv_rlhf.data.items import Reading
from rwkv_rlhf.data.text.documents import open_text
from rwkv_rlhf.data.tokenizer import load_tokenizer
from tests.support.files import VOCAB, jsonl


def test_the_chosen_answer_is_learnt(vocab_file, tmp_path):
    """If this breaks, SFT before DPO or PPO on the same file learns the wrong words; unasked, pairs are refused with
    the flag in the sentence."""
    letters = load_tokenizer(VOCAB, str(vocab_file))
    row = {"system": "Be kind.", "question": "Hi", "chosen": "Yes", "rejected": "No"}
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    chat = {"system": "Be kind.", "messages": turns}
    path = jsonl(tmp_path / "pairs.jsonl", row, {key: row[key] for key in ("question", "chosen")})
    found = open_text(path, letters, reading=Reading(chosen=True, spare_reject=True))
    wanted = open_text(jsonl(tmp_path / "chat.jsonl", chat), letters)
    assert (found[0].tokens == wanted[0].tokens).all() and (found[0].mask == wanted[0].mask).all()
    assert letters.decode(list(found[1].tokens)) == "User: Hi\n\nAssistant: Yes\n\n"
    with pytest.raises(ValueError, match="--train_on_chosen 1"):
        open_text(path, letters)
