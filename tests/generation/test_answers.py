"""The text of an answer as its tokens come is the text of the whole answer."""

import pytest

from rwkv_rlhf.data.tokenizer import load_tokenizer
from rwkv_rlhf.generation.answers import AnswerStream, after_cue
from rwkv_rlhf.generation.sampling_params import SamplingParams
from rwkv_rlhf.generation.stops import Stops
from tests.support.files import VOCAB

SAID = (
    ("Assistant:", " Hello \u732b\u00e9!  yes\n no  \n\nUser", ("\n\n",)),
    ("Assistant:", " ends here END more", ("END", "\n\n")),
    ("Assistant:", " ENE almost EN", ("END", "NDE")),
    ("Bot <think", ">\nhm\n</think>\nyes\n\n", ("\n\n",)),
    ("Bot <think>\n</think", ">\nyes\n\n", ("\n\n",)),
    ("Assistant:", "\n\n", ("\n\n",)),
    ("Assistant:", " a\0b \u2728", ()),
)


@pytest.mark.parametrize(("cue", "text", "stops"), SAID)
@pytest.mark.parametrize("bare", [False, True])
def test_pieces_are_the_whole(vocab_file, cue, text, stops, bare):
    """If this breaks, who streams reads half a character, a piece of the mark that ends an answer, or another text."""
    letters, params = load_tokenizer(VOCAB, str(vocab_file)), SamplingParams(stop_texts=stops)
    tokens = letters.encode(text)
    stream, given = AnswerStream(cue, params, letters, bare=bare), ""
    whole = after_cue(cue, Stops(params, letters).text(tokens))
    whole = whole if bare else whole.strip()
    for token in tokens:
        given += stream.add(token)
        assert whole.startswith(given) and "\ufffd" not in given
    assert given + stream.end() == whole
