"""Text to token ids and back: vocabularies matched greedily (World), and Hugging Face tokenizer.json files.

The World vocabulary (rwkv_vocab_v20230424: `id 'text' length` a line, longest match first, id 0 = end of document)
comes with the `rwkv` package. Its lines are parsed as literals, never evaluated, because a user may name any file.
Longest match is one walk over a flat transition table: the same ids as the package's own trie, a tenth of its
loading time and of its memory. Where `pyrwkv-tokenizer` is installed, it gives the same ids of the World vocabulary
14 times faster; as it takes longer to load than the table, it is asked from the first MUCH characters on.
"""

import ast
import functools
import importlib.util
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from rwkv_rlhf.files import file_hash, read_bytes

WORLD_SIZE = 65536
END_OF_DOCUMENT = 0  # in every vocabulary; trained like any token
# what Hugging Face's configurations of RWKV call id 0, which is no word of the vocabulary
TRIE_MARKS: dict[str, int] = {"<|rwkv_tokenizer_end_of_text|>": END_OF_DOCUMENT}
_WORLD_FILE = "rwkv_vocab_v20230424.txt"
MUCH = 200_000  # characters, which the table takes 0.2 s for: what the other program takes longer to load


class Tokenizer(Protocol):
    """What the rest of the program asks of a vocabulary. Id 0 ends a document and decodes to nothing or a mark."""

    name: str
    marks: Mapping[str, int]  # texts of special tokens that `encode` takes for ordinary text
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def decode_bytes(self, ids: list[int]) -> bytes: ...


Encode = Callable[[str], list[int]]


class _Trie(NamedTuple):
    """The words of a vocabulary by their bytes; node 0 is the root."""

    follow: dict[int, int]  # node * 256 + byte -> node
    ids: list[int]  # node -> id of the word that ends there; -1 = none

    @classmethod
    def of(cls, words: Mapping[int, bytes]) -> "_Trie":
        follow: dict[int, int] = {}
        ids = [-1]
        for number, word in words.items():
            node = 0
            for byte in word:
                child = follow.setdefault(node << 8 | byte, len(ids))
                if child == len(ids):
                    ids.append(-1)
                node = child
            ids[node] = number
        return cls(follow, ids)


class TrieTokenizer:
    """Greedy longest match over byte strings.

    Args:
        words: id -> bytes.
        vocab_size: the model's; every id is below it.
        name: what to call the vocabulary in sidecars and messages.
        load_fast: gives another program's `encode` for the same words, or None where there is none; it may raise
            UnicodeEncodeError. Called when MUCH text has come.
    """

    def __init__(
        self, words: dict[int, bytes], vocab_size: int, name: str, load_fast: Callable[[], Encode | None] | None = None
    ):
        self.words = words
        self.vocab_size = vocab_size
        self.marks: Mapping[str, int] = TRIE_MARKS
        self.name = name
        self._load_fast = load_fast
        self._seen = 0  # characters so far

    @functools.cached_property
    def _fast(self) -> Encode | None:
        return self._load_fast() if self._load_fast else None

    @functools.cached_property
    def _trie(self) -> _Trie:
        return _Trie.of(self.words)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; a lone surrogate becomes its three bytes, so any string can be encoded.

        Raises ValueError when the vocabulary lacks a single byte of the text (the World vocabulary has all 256).
        """
        self._seen += len(text)
        if self._seen > MUCH and self._fast is not None:
            with suppress(UnicodeEncodeError):
                return self._fast(text)
        data = text.encode("utf-8", errors="surrogatepass")
        follow, ids = self._trie
        out: list[int] = []
        start, size = 0, len(data)
        while start < size:
            node, at, found, end = 0, start, -1, start
            while at < size:
                step = follow.get(node << 8 | data[at])
                if step is None:
                    break
                node, at = step, at + 1
                if ids[node] >= 0:
                    found, end = ids[node], at
            if found < 0:
                raise ValueError(
                    f"{self.name}: no word of this vocabulary matches byte 0x{data[start]:02x} of the text"
                )
            out.append(found)
            start = end
        return out

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The bytes of `ids`; 0 and ids without a word give nothing."""
        return b"".join(map(self.words.get, ids, itertools.repeat(b"")))

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


@contextmanager
def _refusing(sentence: str) -> Iterator[None]:
    """Bare Exceptions of the package `tokenizers`, and its panics, which are not even that, become ValueErrors."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{sentence}: {error}") from error


_SPECIAL = re.compile(r"<.+>|\[[A-Z]+\]")  # how special tokens are written: <|endoftext|>, <s>, [PAD]


class HuggingFaceTokenizer:
    """A tokenizer.json (for example the 20B vocabulary of RWKV-4 Pile), run by the `tokenizers` package."""

    def __init__(self, path: Path, vocab_size: int):
        if importlib.util.find_spec("tokenizers") is None:
            raise ValueError(f"--vocab_file {path} needs the package tokenizers: pip install tokenizers")
        tokenizers = importlib.import_module("tokenizers")
        self.text = read_bytes(path).decode("utf-8", errors="replace")  # exports carry it
        with _refusing(f"--vocab_file {path} is not a tokenizer.json"):
            self._inner = tokenizers.Tokenizer.from_str(self.text)
        first, special = self._inner.id_to_token(0), self._inner.get_added_tokens_decoder().get(0)
        named = special is not None and special.special
        if first is not None and not named and not _SPECIAL.fullmatch(first):
            raise ValueError(
                f"--vocab_file {path}: id 0 is the word {first!r}, but 0 ends a document here: give a vocabulary whose "
                "id 0 is a special token, as in the 20B one, or none"
            )
        self.name, self.vocab_size = f"{path.name} {file_hash(path)[:12]}", vocab_size
        self.marks: Mapping[str, int] = {}  # the library knows its own
        _check_ids(max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1), vocab_size, path)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, no special tokens added; a lone surrogate becomes U+FFFD.

        Raises ValueError when the file's own rules cannot be followed.
        """
        legal = text.encode("utf-8", errors="surrogatepass").decode("utf-8", errors="replace")
        with _refusing(f"--vocab_file {self.name} cannot tokenise a text"):
            ids: list[int] = self._inner.encode(legal, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens included; id 0 (end of document) gives nothing."""
        with _refusing(f"--vocab_file {self.name} cannot write a text"):
            text: str = self._inner.decode([number for number in ids if number], skip_special_tokens=False)
        return text

    def decode_bytes(self, ids: list[int]) -> bytes:
        """UTF-8 of `decode`."""
        return self.decode(ids).encode("utf-8")


def _check_ids(largest: int, vocab_size: int, path: Path) -> None:
    if largest < 0:
        raise ValueError(f"--vocab_file {path} holds no words")
    if largest >= vocab_size:
        raise ValueError(f"--vocab_file {path} has id {largest}, but the model's vocab_size is {vocab_size}")


_PLAIN = re.compile(r"""(['"])((?:(?!\1)[^\\\x00-\x1f])*)\1""")  # text that is what it says, which most words are


def read_trie_vocabulary(path: Path) -> dict[int, bytes]:
    """id -> bytes of a vocabulary text file with lines `id literal length`.

    Raises ValueError with file and line for a line that is not of this form, a wrong length, a repeated id, or id 0.
    """
    words: dict[int, bytes] = {}
    for line, raw in enumerate(read_bytes(path).split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            text = raw.decode("utf-8")
            number, _, rest = text.partition(" ")
            literal, _, size = rest.rpartition(" ")
            plain = _PLAIN.fullmatch(literal.strip())
            word = plain[2] if plain else ast.literal_eval(literal.strip())
            word = word.encode("utf-8") if isinstance(word, str) else word
            good = isinstance(word, bytes) and len(word) == int(size) > 0
            key = int(number)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise ValueError(f"{path}:{line}: not a vocabulary line `id 'text' length`") from error
        if not good:
            raise ValueError(f"{path}:{line}: the length does not fit the text")
        if key <= 0 or key in words:
            raise ValueError(f"{path}:{line}: id {key} is {'taken' if key in words else 'kept for end of document'}")
        words[key] = word
    return words


def world_vocabulary_file() -> Path:
    """Where the `rwkv` package keeps the World vocabulary; the package itself is not imported (it builds kernels)."""
    spec = importlib.util.find_spec("rwkv")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (Path(folder) / _WORLD_FILE).is_file():
            return Path(folder) / _WORLD_FILE
    raise ValueError(f"the World vocabulary ({_WORLD_FILE}) was not found: pip install rwkv, or give --vocab_file")


def _in_rust(path: Path) -> Encode | None:
    """`encode` of the package pyrwkv-tokenizer for the World vocabulary; None where it is not installed."""
    if importlib.util.find_spec("pyrwkv_tokenizer") is None:
        return None
    encode: Encode = importlib.import_module("pyrwkv_tokenizer").WorldTokenizer(str(path)).encode
    return encode


@functools.lru_cache(maxsize=4)
def load_tokenizer(vocab_size: int, vocab_file: str | None = None) -> Tokenizer:
    """The tokenizer for a model's vocabulary; the same object when asked again.

    Args:
        vocab_size: the model's. 65536 means World unless a file is given.
        vocab_file: a tokenizer.json, or a trie vocabulary (`id literal length` a line).

    Raises:
        ValueError: another size without a file; a missing or malformed file; an id that the model does not have.
    """
    if not vocab_file:
        if vocab_size != WORLD_SIZE:
            raise ValueError(
                f"vocab_size {vocab_size} is not the World vocabulary's {WORLD_SIZE}: give --vocab_file "
                "(a Hugging Face tokenizer.json, or a trie vocabulary)"
            )
        world = world_vocabulary_file()
        return TrieTokenizer(read_trie_vocabulary(world), vocab_size, "world", functools.partial(_in_rust, world))
    path = Path(vocab_file)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, vocab_size)
    words = read_trie_vocabulary(path)
    _check_ids(max(words, default=-1), vocab_size, path)
    return TrieTokenizer(words, vocab_size, f"{path.name} {file_hash(path)[:12]}")
