"""When an answer ends, and what of it is its text."""

from __future__ import annotations

from rwkv_rlhf.data.tokenizer import Tokenizer
from rwkv_rlhf.generation.sampling_params import SamplingParams


class Stops:
    """Decides when a sequence ends: a stop id, or a stop text anywhere in the decoded bytes (across tokens)."""

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer | None) -> None:
        if params.stop_texts and tokenizer is None:
            raise ValueError("stop texts need a tokenizer")
        self.texts = [text.encode() for text in params.stop_texts if text]
        self.ids = frozenset(params.stop_ids)
        self.tokenizer = tokenizer
        self.longest = max((len(text) for text in self.texts), default=0)

    def ends(self, tail: bytes, token: int) -> tuple[bool, bytes]:
        """Whether a sequence whose last bytes are `tail` ends with its new `token`, and its last bytes then, in which a
        stop text may have begun."""
        if token in self.ids:
            return True, tail
        if self.tokenizer is None or not self.texts:
            return False, tail
        said = tail + self.tokenizer.decode_bytes([token])
        return any(text in said for text in self.texts), said[max(0, len(said) - self.longest + 1) :]

    def whole_tokens(self, tokens: list[int], text: str) -> int:
        """How many of the tokens say no more than `text`, with which they begin; a stop id is none of them."""
        assert self.tokenizer is not None
        count = next((at for at, token in enumerate(tokens) if token in self.ids), len(tokens))
        while count and len(self.tokenizer.decode(tokens[:count])) > len(text):
            count -= 1
        return count

    def text(self, tokens: list[int]) -> str:
        """The tokens as text, cut before the first stop; a character that is not whole at the end is left out."""
        if self.tokenizer is None:
            return ""
        said = self.tokenizer.decode_bytes(tokens[:-1] if tokens and tokens[-1] in self.ids else tokens)
        ends = [said.find(text) for text in self.texts if text in said]
        return said[: min(ends, default=len(said))].decode("utf-8", errors="replace").rstrip("\ufffd")
