"""A tokenizer for transformers over RWKV's vocabularies: greedy longest match of bytes, ids as in the vocabulary file.

It lies beside an exported model and needs transformers only. The vocabulary file has a line `id 'literal' length` for
each word; id 0 ends a document and has no word.
"""

import ast
import os
import shutil

from transformers import PreTrainedTokenizer

END = "<|endoftext|>"


class RwkvTrieTokenizer(PreTrainedTokenizer):
    """Tokens are written as their ids: bytes of a word need not be text."""

    vocab_files_names = {"vocab_file": "rwkv_vocab.txt"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self, vocab_file: str, model_vocab_size: int = 65536, errors: str = "replace", **settings: object
    ) -> None:
        self.vocab_file, self.errors, self.size = vocab_file, errors, model_vocab_size
        self.words: dict[int, bytes] = {}
        with open(vocab_file, encoding="utf-8") as file:
            for line in filter(str.strip, file):
                number, rest = line.split(" ", 1)
                word = ast.literal_eval(rest.rpartition(" ")[0].strip())
                self.words[int(number)] = word.encode() if isinstance(word, str) else word
        self.ids = {word: number for number, word in self.words.items()}
        self.prefixes = {word[:end] for word in self.ids for end in range(1, len(word) + 1)}
        marks = {"bos_token": END, "eos_token": END, "pad_token": END} | settings
        super().__init__(model_vocab_size=model_vocab_size, errors=errors, **marks)

    @property
    def vocab_size(self) -> int:
        """Ids of the model, used or not."""
        return self.size

    def get_vocab(self) -> dict[str, int]:
        """Ids by tokens."""
        return {END: 0} | {str(number): number for number in range(1, self.size)}

    def _tokenize(self, text: str, **_: object) -> list[str]:
        data, start, tokens = text.encode("utf-8", errors="surrogatepass"), 0, []
        while start < len(data):
            end, found = start + 1, start
            while end <= len(data) and data[start:end] in self.prefixes:
                if data[start:end] in self.ids:
                    found = end
                end += 1
            if found == start:
                raise ValueError(f"no word of the vocabulary matches byte 0x{data[start]:02x}")
            tokens.append(str(self.ids[data[start:found]]))
            start = found
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        return 0 if token == END else int(token)

    def _convert_id_to_token(self, index: int) -> str:
        return END if index == 0 else str(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens; bytes that are no UTF-8 become U+FFFD, the end of a document nothing."""
        words = (self.words.get(int(token), b"") for token in tokens if token != END)
        return b"".join(words).decode("utf-8", errors=self.errors)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy the vocabulary file; returns its path."""
        path = os.path.join(save_directory, f"{filename_prefix + '-' if filename_prefix else ''}rwkv_vocab.txt")
        if os.path.abspath(path) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, path)
        return (path,)
