"""Checkpoints, HDF5 and parquet files that are well formed and hold what nobody expects.

TORCH, SAFETENSORS, H5 and PARQUET are the tables of them.
"""

import gzip
import io
import json
import os
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from random import Random

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from tests.fuzzing.mutators import BYTES, JSON, LONGEST, SENTINEL, Mutator, change, nodes, odd


class Payload:
    """Unpickled, it leaves the sentinel: what must never happen."""

    def __init__(self, way: int = 0):
        self.way = way

    def __reduce__(self):
        ways = (
            (os.system, (f"touch {SENTINEL}",)),
            (eval, (f"open({SENTINEL!r}, 'w')",)),
            (open, (SENTINEL, "w")),
            (getattr, ("x", "__class__")),
        )
        return ways[self.way % len(ways)]


def odd_tensor(tensor: torch.Tensor, rng: Random) -> object:
    """What a file may hold where a tensor of weights is expected."""
    kinds = (torch.int64, torch.bool, torch.complex64, torch.float16, torch.float64, torch.uint8, torch.float8_e4m3fn)
    if tensor.is_meta:  # an earlier change made it so
        return tensor
    plain = tensor.detach().to_dense().clone()
    ways: tuple[Callable[[], object], ...] = (
        lambda: plain.to(rng.choice(kinds)),
        lambda: torch.full_like(plain, rng.choice((float("nan"), float("inf"), 3e38))),
        lambda: torch.zeros(()).expand(rng.choice(((1 << 20, 1 << 20), (1 << 40,), (3, 1 << 30)))),
        lambda: torch.zeros(1).as_strided((1 << 16, 1 << 20), (0, 0)),
        lambda: plain.to_sparse(),
        lambda: plain.to("meta"),
        lambda: plain.reshape(-1),
        lambda: plain[..., :-1],
        lambda: plain.new_empty(rng.choice(((0,), (), (0, 7), (1, 1, 1, 1, 1), (1, *plain.shape)))),
        lambda: plain.t() if plain.dim() == 2 else plain[None],
        lambda: torch.nn.Parameter(plain),
        lambda: torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        lambda: odd(rng),
        lambda: Payload(rng.randrange(4)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rng.choice(ways)()


def odd_number(rng: Random) -> object:
    return rng.choice(
        [odd(rng), odd(rng), torch.zeros(2), Payload(rng.randrange(4)), b"bytes", 1j, (1, 2), {1}, -(2**70)]
    )


def torch_values(data: bytes, rng: Random) -> bytes | None:
    """torch.save of a changed object."""
    try:
        value = torch.load(io.BytesIO(data), weights_only=True)
    except Exception:  # it was damaged before
        return None
    if isinstance(value, dict):
        for name in rng.sample(list(value), min(len(value), rng.choice((1, 1, 3)))):
            what, tensor = rng.random(), value[name]
            if what < 0.2:
                del value[name]
            elif what < 0.35:
                value[rng.choice((f"{name}x", str(name).upper(), 7, "", f"blocks.{10**6}.att.r_k", None))] = tensor
            elif isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32 and tensor.numel() < LONGEST:
                value[name] = odd_tensor(tensor, rng)
    elif isinstance(value, list) and value:
        value = [list(v) if isinstance(v, tuple) else v for v in value]
        box, key = rng.choice(nodes(value))
        box[key] = odd_number(rng)
        value = [tuple(v) if isinstance(v, list) and rng.random() < 0.9 else v for v in value]
    if rng.random() < 0.05:
        value = rng.choice([value, [value], Payload(), None, {}, [], "text"])
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=rng.random() < 0.8)
    return file.getvalue()


def archive(data: bytes, rng: Random) -> bytes | None:
    """The zip of torch.save with changed records: foreign pickles, bombs, missing, doubled and lying ones."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            records = [(info.filename, old.read(info)) for info in old.infolist()]
    except (zipfile.BadZipFile, OSError, RuntimeError, ValueError, NotImplementedError, EOFError, zlib.error):
        return None
    packing = zipfile.ZIP_STORED
    at = rng.randrange(len(records))
    name, content = records[at]
    what = rng.randrange(8)
    if what == 0:
        index = next((i for i, (n, _) in enumerate(records) if n.endswith("data.pkl")), at)
        records[index] = (records[index][0], pickle.dumps(Payload(rng.randrange(4)), protocol=rng.choice((0, 2, 4))))
    elif what == 1:
        records[at] = (name, bytes(80 << 20))
        packing = zipfile.ZIP_DEFLATED
    elif what == 2:
        del records[at]
    elif what == 3:
        records.append((name, content[::-1]))
    elif what == 4:
        records[at] = (rng.choice(("../" + name, "/" + name, name + "\\x", "data.pkl", "a/b/c/.data/x")), content)
    elif what == 5:
        records[at] = (name, rng.choice(BYTES)(content, rng) or b"")
    elif what == 6:
        index = next((i for i, (n, _) in enumerate(records) if n.endswith("data.pkl")), at)
        records[index] = (records[index][0], (rng.choice(BYTES)(records[index][1], rng) or b"")[:LONGEST])
    else:
        packing = zipfile.ZIP_DEFLATED
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(file, "w", packing) as new:
            for name, content in records:
                new.writestr(name, content)
    return file.getvalue()


def bare_pickle(data: bytes, rng: Random) -> bytes:
    return pickle.dumps(rng.choice([Payload(rng.randrange(4)), [1], {"a": Payload()}]), protocol=rng.choice((0, 2, 4)))


TORCH: tuple[Mutator, ...] = (torch_values, torch_values, torch_values, archive, archive, bare_pickle)


def tensor_header(data: bytes, rng: Random) -> bytes | None:
    """A safetensors file whose header says something else."""
    if len(data) < 8:
        return None
    size = struct.unpack("<Q", data[:8])[0]
    if size > len(data) - 8:
        return None
    try:
        header = json.loads(data[8 : 8 + size])
    except (ValueError, RecursionError):
        return None
    for entry in rng.sample(list(header.values()), min(len(header), 2)) if isinstance(header, dict) else ():
        if isinstance(entry, dict) and "dtype" in entry and rng.random() < 0.5:
            entry["dtype"] = rng.choice(("F64", "I64", "BOOL", "C64", "F8_E4M3", "F4", "U8", "F16", "X", "E8M0"))
    text = json.dumps(change(header, rng)).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


SAFETENSORS: tuple[Mutator, ...] = (tensor_header, tensor_header)


def h5_contents(data: bytes, rng: Random) -> bytes | None:
    """An HDF5 file with datasets, groups, links and attributes of other kinds."""
    file = io.BytesIO(data)
    try:
        with h5py.File(file, "r+") as h5:
            names = [n for n in h5 if isinstance(h5[n], h5py.Dataset)]
            name = rng.choice(names)
            rows = min(len(h5[name]), 64)  # an earlier change may have made it endless
            if rng.random() < 0.3:
                key = rng.choice(("top_k", "vocab_size", "program", "x"))
                value = rng.choice((0, -1, 2**40, "abc", 1.5, [1, 2], float("nan"), 2**62, b"\xff", np.zeros((2, 2))))
                h5.attrs[key] = value
            else:
                del h5[name]
                ways = (
                    lambda: h5.create_dataset(name, data=np.arange(rows)),
                    lambda: h5.create_dataset(name, data=np.float64(1.0)),
                    lambda: h5.create_dataset(name, data=np.full((rows, 3), rng.choice((0.5, np.nan, -7, 1e30)))),
                    lambda: h5.create_dataset(name, data=["a", "b"] * rows, dtype=h5py.string_dtype()),
                    lambda: h5.create_dataset(name, data=np.zeros(rows, [("a", "i4"), ("b", "f8")])),
                    lambda: h5.create_dataset(name, shape=(rows,), dtype=h5py.vlen_dtype(np.float64)),
                    lambda: h5.create_dataset(name, shape=(rows,), dtype=h5py.vlen_dtype(np.complex64)),
                    lambda: h5.create_dataset(name, shape=(rows, 2), dtype=h5py.vlen_dtype(np.int64)),
                    lambda: h5.create_dataset(name, shape=(1 << 40,), dtype="f4", chunks=(1024,)),
                    lambda: h5.create_dataset(name, shape=(1 << 33,), dtype=h5py.vlen_dtype(np.int64), chunks=(64,)),
                    lambda: h5.create_dataset(name, data=h5py.Empty("f4")),
                    lambda: h5.create_group(name),
                    lambda: h5.__setitem__(name, h5py.SoftLink("/nowhere")),
                    lambda: h5.__setitem__(name, h5py.SoftLink(f"/{name}")),
                    lambda: h5.__setitem__(name, h5py.ExternalLink("other.h5", "/tokens")),
                    lambda: h5.create_dataset(name, shape=(rows,), dtype="i8", external=[("/etc/hostname", 0, 800)]),
                    lambda: _filled(h5, name, rows, rng),
                    lambda: None,
                )
                rng.choice(ways)()
    except Exception:  # it was damaged before
        return None
    return file.getvalue()


def _filled(h5: h5py.File, name: str, rows: int, rng: Random) -> None:
    """Lists of numbers that no token and no logit can be."""
    kind = rng.choice((np.int64, np.float32, np.uint64, np.int8))
    made = h5.create_dataset(name, shape=(rows,), dtype=h5py.vlen_dtype(kind))
    for at in range(rows):
        made[at] = np.array([rng.choice((0, 1, 3, 39, 40, 127)) for _ in range(rng.randrange(6))], dtype=kind)
    if rows and kind is not np.int8:
        made[0] = np.array([rng.choice((2**62, 1e30, 0))], dtype=np.float64).astype(kind)


H5: tuple[Mutator, ...] = (h5_contents, h5_contents, h5_contents)


def table(data: bytes, rng: Random) -> bytes | None:
    """A parquet file with columns of other types and names."""
    try:
        return _table(pyarrow.parquet.read_table(io.BytesIO(data)), rng)
    except Exception:  # it was damaged before, or this type cannot be written
        return None


def _table(old: pyarrow.Table, rng: Random) -> bytes:
    rows = old.num_rows
    columns = {name: old.column(name).to_pylist() for name in old.column_names}
    name = rng.choice(list(columns))
    kinds: tuple[tuple[list, pyarrow.DataType | None], ...] = (
        ([None] * rows, None),
        ([1] * rows, pyarrow.int8()),
        ([b"\xff\0"] * rows, pyarrow.binary()),
        (["a"] * rows, pyarrow.dictionary(pyarrow.int8(), pyarrow.string())),
        ([[["a"]]] * rows, None),
        ([{"a": {"b": 1}}] * rows, None),
        ([float("nan")] * rows, None),
        ([10**15] * rows, pyarrow.timestamp("ns")),
        ([10**18] * rows, pyarrow.timestamp("us", tz="Nowhere/Land")),
        ([2**45] * rows, pyarrow.timestamp("s")),
        ([2**31 - 1] * rows, pyarrow.date32()),
        ([2**62] * rows, pyarrow.duration("ns")),
        ([[("a", 1)]] * rows, pyarrow.map_(pyarrow.string(), pyarrow.int32())),
        ([True] * rows, None),
    )
    arrays = {key: pyarrow.array(value) for key, value in columns.items()}
    values, kind = rng.choice(kinds)
    arrays[name] = pyarrow.array(values, type=kind)
    names = [rng.choice((n, n, n, n.upper(), "", " ", "prompt", "\u202e")) for n in arrays]
    file = io.BytesIO()
    new = pyarrow.Table.from_arrays(list(arrays.values()), names=names)
    pyarrow.parquet.write_table(new, file, compression=rng.choice(("none", "zstd", "gzip", "snappy")))
    return file.getvalue()


PARQUET: tuple[Mutator, ...] = (table, table)


def packed(unpack: Callable[[bytes], bytes], pack: Callable[[bytes], bytes]) -> Mutator:
    """What is inside a compressed file damaged, or much more of it than anybody expects."""

    def changed(data: bytes, rng: Random) -> bytes | None:
        try:
            inside = unpack(data)
        except Exception:  # it was damaged before
            return None
        if rng.random() < 0.02:
            return pack(inside.split(b"\n")[0] + b"\n" + b" " * (64 << 20))
        found = rng.choice((*JSON, *BYTES))(inside, rng)
        return None if found is None else pack(found) + (pack(found[:50]) if rng.random() < 0.1 else b"")

    return changed


GZIP: tuple[Mutator, ...] = (packed(gzip.decompress, gzip.compress),) * 2
ZSTD: tuple[Mutator, ...] = (
    packed(
        lambda data: pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd").read(),
        lambda data: pyarrow.compress(data, "zstd", asbytes=True),
    ),
) * 2
