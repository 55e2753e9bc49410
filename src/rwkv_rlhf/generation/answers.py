"""From sampled text to the text of an answer, whole or as its tokens come."""

from __future__ import annotations

from rwkv_rlhf.data.tokenizer import Tokenizer
from rwkv_rlhf.generation.sampling_params import SamplingParams
from rwkv_rlhf.generation.stops import Stops


def after_cue(cue: str, text: str) -> str:
    """Sampled text without what the cue of the g1 template left open, and without NUL bytes.

    Readers take those for a sign of another encoding, and would refuse a file that holds them.
    """
    if cue.endswith("</think"):
        text = text.removeprefix(">")
    elif cue.endswith("<think"):
        text = "<think" + text
    return text.replace("\0", "")


class AnswerStream:
    """The text of one answer as its tokens come.

    What may still turn out not to belong to it waits: the beginning of a stop text, a character whose bytes are not all
    there, white space at the end. So the pieces together are the text that the whole answer has.

    Args:
        cue: the text that the answer follows. bare: white space around the answer belongs to it (plain text).
    """

    def __init__(self, cue: str, params: SamplingParams, tokenizer: Tokenizer, *, bare: bool = False) -> None:
        self.cue, self.bare = cue, bare
        self.stops, self.texts = Stops(params, tokenizer), [stop for stop in params.stop_texts if stop]
        self.tokens: list[int] = []
        self.text = ""  # what has been given so far,
        self._certain = ""  # and what that was before white space was cut off

    def add(self, token: int) -> str:
        """One more token; the text that is certain now, "" if none."""
        self.tokens.append(token)
        text = self.stops.text(self.tokens)
        for stop in self.texts:
            begun = next((size for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size])), 0)
            text = text[: len(text) - begun]
        return self._more(text)

    @property
    def certain(self) -> int:
        """How many tokens are wholly in the text that is certain."""
        return self.stops.whole_tokens(self.tokens, self._certain)

    def end(self) -> str:
        """The rest, when no token follows."""
        return self._more(self.stops.text(self.tokens))

    def _more(self, text: str) -> str:
        self._certain = text
        text = after_cue(self.cue, text)
        text = text if self.bare else text.strip()
        if not text.startswith(self.text):  # less than was given: something waits again
            return ""
        piece, self.text = text[len(self.text) :], text
        return piece
