"""Tokenised documents in HDF5, with or without a teacher's logits: the layout of the older programs, and a little more.

`tokens`: one entry a document, variable length, int64. `top_k_values` float32 and `top_k_indices` int64: variable
length, (L, K) of each document flattened row by row; row t is the teacher's logits after token t. Ours adds, where a
program that does not know them loses nothing: `mask` uint8, which tokens are trained as targets (an empty entry: all);
`top_k_lse` float32 (L,), log-sum-exp of all the teacher's logits; attributes that say how the file was made. K is not
stored by the older programs, so it is read from the lengths.

L tokens of a document, K teacher's logits per token.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_rlhf.data.batch import TextExample, TopK
from rwkv_rlhf.data.progress import progress_bar
from rwkv_rlhf.data.report import DataReport, RowError
from rwkv_rlhf.data.text.cut_documents import CutDocuments, trained_before
from rwkv_rlhf.data.text.h5_check import check_column
from rwkv_rlhf.files import atomic_path, check_readable
from rwkv_rlhf.settings.config import PROGRAM_VERSION
from rwkv_rlhf.settings.counted import counted

TOKENS, MASK = "tokens", "mask"
VALUES, INDICES, LSE = "top_k_values", "top_k_indices", "top_k_lse"
KINDS = {TOKENS: np.int64, MASK: np.uint8, VALUES: np.float32, INDICES: np.int64, LSE: np.float32}
ENTRIES = 256  # of a dataset that HDF5 allocates at a time
BLOCK = 64  # documents read at a time where all are read
NUMBERS = ("vocab_size", "top_k")  # attributes that are read
KEPT = 1 << 30  # bytes of documents that are kept for the next of their segments
PAIRS = "prompttokens"  # a dataset that only files of preference pairs have


def _library() -> Any:
    """The package h5py; ValueError that says how to get it."""
    try:
        import h5py
    except ImportError as error:
        raise ValueError("files in HDF5 (.h5) need the package h5py: pip install h5py") from error
    return h5py


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """What HDF5 says of a broken file as one sentence."""
    try:
        yield
    except RowError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as error:
        text = str(error)
        if text.startswith(f"{path}:"):
            raise
        if "truncated" in text:
            raise ValueError(f"{path} is truncated: it was not written to its end; make it again") from error
        if "signature not found" in text:
            raise ValueError(f"{path}: not an HDF5 file") from error
        raise ValueError(
            f"{path}: damaged, cannot be read ({text.splitlines()[0] if text else 'no reason'})"
        ) from error


@contextmanager
def readable_file(path: str | os.PathLike[str]) -> Iterator[Any]:
    """The opened file. Raises ValueError, one sentence, for one that is missing, foreign, truncated or damaged."""
    check_readable(path)
    with _readable(str(path)), _library().File(path, "r", locking="best-effort") as file:
        yield file


def vlen_kind(dtype: np.dtype) -> np.dtype | None:
    """What variable-length entries consist of, None for entries of another kind."""
    kind: np.dtype | None = _library().check_vlen_dtype(dtype)
    return kind


def holds_pairs(path: str | os.PathLike[str]) -> bool:
    """Whether an .h5 holds preference pairs instead of documents. Raises ValueError as `readable_file`."""
    with readable_file(path) as file:
        return PAIRS in file


class H5File:
    """The documents of one file, read one at a time; usable in forked processes, each with a handle of its own.

    Attributes:
        names: which datasets there are. about: those of NUMBERS that the file has (ours only).
        k: the teacher's logits per token, 0 without a teacher.

    Raises:
        ValueError: a missing, foreign, truncated or damaged file; a dataset that is missing or of the wrong kind.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = str(path)
        self._file: Any = None
        self._sets: dict[str, Any] = {}  # asking a file for a dataset by name costs more than reading an entry
        self._process = -1
        self.names: list[str] = []
        check_readable(path)
        with _readable(self.path):
            file = self._open()
            self.names = [name for name in KINDS if file.get(name, getlink=True) is not None]
            for name in self.names:
                check_column(self.path, file, name)
            self._sets = {name: file[name] for name in self.names}
            self.about = {key: _number(file, key) for key in NUMBERS if key in file.attrs}
            sizes = {name: len(file[name]) for name in self.names}
            kinds = {name: vlen_kind(file[name].dtype) for name in self.names}
        if TOKENS not in sizes:
            raise ValueError(f"{self.path}: holds no dataset `tokens`, so no tokenised documents")
        if (VALUES in sizes) != (INDICES in sizes):
            raise ValueError(f"{self.path}: `{VALUES}` and `{INDICES}` belong together, one of them is missing")
        for name, kind in kinds.items():
            if kind is None or np.dtype(kind).kind not in ("f" if KINDS[name] is np.float32 else "iu"):
                raise ValueError(f"{self.path}: `{name}` is no list of variable-length {np.dtype(KINDS[name])} arrays")
            if sizes[name] != sizes[TOKENS]:
                raise ValueError(
                    f"{self.path}: {sizes[TOKENS]} documents in `tokens`, but {sizes[name]} entries in `{name}`"
                )
        self._count = sizes[TOKENS]
        self.k = self._find_k() if VALUES in sizes else 0

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        """Without the handle, which belongs to this process."""
        return self.__dict__ | {"_file": None, "_sets": {}, "_process": -1}

    def _open(self) -> Any:
        if self._process != os.getpid():
            if self._file is not None:
                self._file.close()  # this process's copy of the handle that the parent goes on using
            self._file, self._process = _library().File(self.path, "r", locking="best-effort"), os.getpid()
            self._sets = {name: self._file[name] for name in self.names}
        return self._file

    def read(self, name: str, index: int | slice) -> Any:
        """One entry of a dataset as an array, or a slice of entries as an object array of arrays."""
        with _readable(self.path):
            self._open()
            return self._sets[name][index]

    def _find_k(self) -> int:
        """K as the file says, or from the lengths of its first document that is not empty."""
        if "top_k" in self.about:
            k = self.about["top_k"]
            if type(k) is not int or k < 1:
                raise ValueError(f"{self.path}: the attribute top_k is {k!r}, it must be a number of logits")
            return k
        for index in range(len(self)):
            tokens = len(self.read(TOKENS, index))
            if tokens:
                return max(1, len(self.read(VALUES, index)) // tokens)
        return 1

    def document(self, index: int, vocab_size: int) -> TextExample:
        """tokens (L,) int64, mask (L,) bool or None = all trained. Raises RowError for what does not fit."""
        tokens = self.read(TOKENS, index)
        return _checked(tokens, self.read(MASK, index) if MASK in self.names else tokens[:0], vocab_size)

    def raw_documents(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(tokens, mask or nothing) of every document in order, unchecked, many at a time."""
        for begin in range(0, len(self), BLOCK):
            here = slice(begin, begin + BLOCK)
            tokens = self.read(TOKENS, here)
            masks = self.read(MASK, here) if MASK in self.names else [part[:0] for part in tokens]
            yield from zip(tokens, masks)

    def teacher(self, index: int, tokens: int, vocab_size: int) -> TopK:
        """The teacher's rows of a document of so many tokens. Raises RowError for what does not fit."""
        values, indices = self.read(VALUES, index), self.read(INDICES, index)
        lse = self.read(LSE, index) if LSE in self.names else None
        if len(values) != tokens * self.k or len(indices) != len(values):
            raise RowError(
                f"{len(values)} teacher's logits and {len(indices)} indices do not fit {tokens} tokens, K = {self.k}",
                "K does not fit",
            )
        if lse is not None and len(lse) != tokens:
            raise RowError(f"{tokens} tokens, but {len(lse)} entries in {LSE}", "wrong structure")
        if not (np.isfinite(values).all() and (lse is None or np.isfinite(lse).all())):
            raise RowError("the teacher's logits are not all finite numbers", "not finite")
        check_ids(indices, vocab_size, "the teacher's token")
        shape = (tokens, self.k)
        return TopK(values.reshape(shape), indices.reshape(shape), lse)


def _checked(tokens: np.ndarray, mask: np.ndarray, vocab_size: int) -> TextExample:
    """A document as `H5File.document` gives it."""
    check_ids(tokens, vocab_size, "token")
    if len(mask) not in (0, len(tokens)):
        raise RowError(f"{counted(len(tokens), 'token')}, but a mask of {len(mask)}", "wrong structure")
    return TextExample(tokens, mask.astype(bool) if len(mask) else None)


def check_ids(ids: np.ndarray, vocab_size: int, what: str) -> None:
    """Raises RowError for an id below 0 or outside the vocabulary."""
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        wrong = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise RowError(f"{what} id {wrong} is outside the model's vocabulary of {vocab_size}", "id outside vocabulary")


def _number(file: Any, key: str) -> Any:
    """An attribute that should be a number. Text is not even read: it lies in a heap that nobody has looked at."""
    found = file.attrs.get_id(key)
    return file.attrs[key].item() if found.shape == () and found.dtype.kind in "iufb" else "no number"


class H5Texts(CutDocuments):
    """Documents of an .h5 (or segments of them), each read when it is asked for.

    Attributes:
        k: the teacher's logits per token that examples carry, 0 = none.
    """

    def __init__(
        self, file: H5File, vocab_size: int, ctx_len: int, k: int, report: DataReport, *, ignore_mask: bool, shown: bool
    ) -> None:
        super().__init__(ctx_len, report)
        self.file, self.vocab_size, self.k = file, vocab_size, k
        self.ignore_mask = ignore_mask
        with progress_bar(len(file), "reading", shown) as done:
            for number, raw in enumerate(file.raw_documents()):
                report.rows += 1
                done(1)
                try:
                    document = _checked(*raw, vocab_size)
                    if k:
                        file.teacher(number, len(document.tokens), vocab_size)
                except RowError as error:
                    report.bad(f"{file.path} document {number}", error)
                    continue
                self._cut(number, 0, len(document.tokens), None if ignore_mask else trained_before(document.mask))
        self._close()
        self._kept: OrderedDict[int, TextExample] = OrderedDict()
        self._room = KEPT

    def __iter__(self) -> Iterator[TextExample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> TextExample:
        number, begin, end, _ = self.segments[index].tolist()
        whole = self._kept.get(number) or self._read(number)
        if end - begin < len(whole.tokens):
            self._keep(number, whole)
        mask = None if whole.mask is None else whole.mask[begin:end]
        return TextExample(
            whole.tokens[begin:end], mask, None if whole.teacher is None else whole.teacher.rows(begin, end)
        )

    def _read(self, number: int) -> TextExample:
        """A document from the file."""
        try:
            document = self.file.document(number, self.vocab_size)
            tokens, mask = document.tokens, None if self.ignore_mask else document.mask
            top = self.file.teacher(number, len(tokens), self.vocab_size).largest(self.k) if self.k else None
        except RowError as error:  # it was in order when the file was opened
            raise ValueError(f"{self.file.path} document {number} has changed: {error}") from error
        return TextExample(tokens, mask, top)

    def _keep(self, number: int, whole: TextExample) -> None:
        """For its next segment, as HDF5 reads an entry whole each time; the last asked for, at most KEPT bytes."""
        if number not in self._kept:
            self._kept[number] = whole
            self._room -= whole.nbytes
        self._kept.move_to_end(number)
        while len(self._kept) > 1 and self._room < 0:
            self._room += self._kept.popitem(last=False)[1].nbytes


def open_h5(
    path: str | os.PathLike[str],
    vocab_size: int,
    *,
    ctx_len: int = 0,
    teacher: bool = False,
    top_k: int = 0,
    train_on_prompt: bool = False,
    skip_bad: bool = False,
    shown: bool = False,
) -> H5Texts:
    """Documents of an .h5. The file is read through once, so that what is wrong with it is known before training.

    Args:
        ctx_len: longest example in inputs; longer documents are cut into segments. 0 = never cut.
        teacher: examples carry the teacher's logits; top_k: how many of them, 0 = as many as the file has.
        train_on_prompt: ignore the file's masks. shown: show a progress bar.

    Raises:
        ValueError: one sentence with file and document, or flag.
    """
    report = DataReport(str(path), skip_bad=skip_bad)
    file = H5File(path)
    made_for = file.about.get("vocab_size", vocab_size)
    if made_for != vocab_size:
        raise ValueError(f"{path} was made for a vocabulary of {made_for}, the model has {vocab_size}")
    if teacher and not file.k:
        raise ValueError(
            f"{path}: holds no teacher's logits ({VALUES}): make it with distillation_generate_h5.py, or give "
            "--teacher_model"
        )
    if teacher and top_k > file.k:
        raise ValueError(f"--top_k {top_k} is more than the {file.k} teacher's logits per token of {path}")
    k = (top_k or file.k) if teacher else 0
    return H5Texts(file, vocab_size, ctx_len, k, report, ignore_mask=train_on_prompt, shown=shown)


class H5Writer:
    """Documents appended to an .h5 that is being made; `writing` opens one."""

    def __init__(self, file: Any, k: int, about: dict[str, Any]):
        self.file, self.k, self.documents, self.tokens = file, k, 0, 0
        names = [TOKENS, *((VALUES, INDICES, LSE) if k else ())]
        self.sets = {name: self._create(name) for name in names}
        about = {"program": f"RWKV-LM-RLHF {PROGRAM_VERSION}"} | about | ({"top_k": k} if k else {})
        for key, value in about.items():
            file.attrs[key] = value

    def _create(self, name: str) -> Any:
        kind = _library().vlen_dtype(np.dtype(KINDS[name]))
        # HDF5 compresses the table of such entries only, never what they hold, so no filter is asked for
        return self.file.create_dataset(name, (self.documents,), kind, maxshape=(None,), chunks=(ENTRIES,))

    def add(self, examples: Sequence[TextExample]) -> None:
        """Appends documents; with a teacher each must carry K logits per token and their log-sum-exp."""
        if any(example.mask is not None for example in examples) and MASK not in self.sets:
            self.sets[MASK] = self._create(MASK)  # the entries before are empty: all trained
        entries: dict[str, list[np.ndarray]] = {TOKENS: [np.asarray(e.tokens) for e in examples]}
        if self.k:
            entries |= {VALUES: [], INDICES: [], LSE: []}
            for e in examples:
                top = e.teacher
                assert top is not None and top.lse is not None and top.values.shape == (len(e.tokens), self.k)
                entries[VALUES].append(top.values.reshape(-1))
                entries[INDICES].append(top.indices.reshape(-1))
                entries[LSE].append(top.lse)
        if MASK in self.sets:
            entries[MASK] = [np.empty(0) if e.mask is None else np.asarray(e.mask) for e in examples]
        begin, self.documents = self.documents, self.documents + len(examples)
        self.tokens += sum(len(example.tokens) for example in examples)
        for name, arrays in entries.items():
            self._append(self.sets[name], begin, [array.astype(KINDS[name]) for array in arrays])

    def _append(self, column: Any, begin: int, arrays: Sequence[np.ndarray]) -> None:
        """Entries from `begin` on, in one call: h5py's own assignment makes a matrix of arrays of equal length."""
        h5 = _library()
        boxed = np.empty(len(arrays), dtype=column.dtype)
        for at, array in enumerate(arrays):
            boxed[at] = array
        column.resize((begin + len(arrays),))
        place = column.id.get_space()
        place.select_hyperslab((begin,), (len(arrays),))
        column.id.write(h5.h5s.create_simple((len(arrays),)), place, boxed, h5.h5t.py_create(column.dtype))


@contextmanager
def writing(path: str | os.PathLike[str], about: dict[str, Any], k: int = 0) -> Iterator[H5Writer]:
    """Gives a writer whose file becomes `path` when the block ends well; otherwise `path` stays as it was.

    Args:
        about: what the file's attributes say of how it was made. k: the teacher's logits per token, 0 = no teacher.

    Raises:
        ValueError: the folder cannot be written to, or the disk is full.
    """
    library = _library()
    with atomic_path(Path(path)) as temporary, library.File(temporary, "w") as file:
        yield H5Writer(file, k, about)
