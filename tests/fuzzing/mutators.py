"""Ways to damage a file. Each takes its bytes and a seeded generator and gives other bytes, or None if it cannot.

BYTES knows nothing of formats; TEXT, JSON, CSV, TORCH, SAFETENSORS, H5 and PARQUET build files that are well formed and
hold what nobody expects.
"""

import csv
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

Mutator = Callable[[bytes, Random], bytes | None]
SENTINEL = "code-was-run"  # a file of this name in the working folder tells that a payload ran
LONGEST = 1 << 20  # bytes of a mutated file, so that the time that a reader needs stays small
INTEGERS = (0, 1, 2, 255, 256, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
PIECES = (
    *(b"", b"\0", b"\0" * 64, b"\n", b"\r\n", b"\n\n", b'"', b'""', b"'", b",", b"\\", b"{", b"}", b"[" * 2000),
    *(b'{"a":' * 2000, b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"-1", b"1.5", b"\xff\xfe", b"\xed\xa0\x80"),
    *(b"\xc0\xaf", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf", b"\x1b[31m\x1b]0;title\x07", b"\\ud800", b"\\u0000", b"null"),
    *(b"true", "\u202e\u200b\u2028\x85\x0c".encode(), b"%s%n{0}{a}", b"__import__('os')", b"../../x", b"A" * 70000),
)


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


def place(data: bytes, rng: Random) -> tuple[int, int]:
    """Begin and end of some piece of `data`, short ones more often than long ones."""
    begin = rng.randrange(len(data) + 1)
    return begin, min(len(data), begin + int(2 ** rng.uniform(0, 12)))


def flip_bits(data: bytes, rng: Random) -> bytes | None:
    if not data:
        return None
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def truncate(data: bytes, rng: Random) -> bytes:
    return data[: rng.choice((0, 1, 4, len(data) - 1, rng.randrange(len(data) + 1)))]


def cut_out(data: bytes, rng: Random) -> bytes:
    begin, end = place(data, rng)
    return data[:begin] + data[end:]


def duplicate(data: bytes, rng: Random) -> bytes:
    begin, end = place(data, rng)
    return data[:begin] + data[begin:end] * rng.choice((2, 3, 50)) + data[end:]


def splice(data: bytes, rng: Random) -> bytes:
    begin, end = place(data, rng)
    at, _ = place(data, rng)
    return data[:at] + data[begin:end] + data[at:]


def overwrite(data: bytes, rng: Random) -> bytes:
    begin, end = place(data, rng)
    return data[:begin] + bytes([rng.choice((0, 255, 32))]) * (end - begin) + data[end:]


def insert_piece(data: bytes, rng: Random) -> bytes:
    at, end = place(data, rng)
    return data[:at] + rng.choice(PIECES) + data[at if rng.random() < 0.5 else end :]


def set_integer(data: bytes, rng: Random) -> bytes | None:
    """A length, a count or an offset that lies, most often near the beginning or the end where headers are."""
    size = rng.choice((1, 2, 4, 8))
    if len(data) < size:
        return None
    near = min(len(data) - size, 256)
    at = rng.choice((rng.randint(0, near), len(data) - size - rng.randint(0, near), rng.randint(0, len(data) - size)))
    value = rng.choice((*INTEGERS, len(data), len(data) + 1, rng.getrandbits(64))) % (1 << 8 * size)
    return data[:at] + value.to_bytes(size, rng.choice(("little", "little", "big"))) + data[at + size :]


def add_bom(data: bytes, rng: Random) -> bytes:
    return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf" * 2)) + data


def surround(data: bytes, rng: Random) -> bytes:
    junk = rng.randbytes(rng.choice((1, 7, 512)))
    return rng.choice((junk + data, data + junk, b"", b"\0" * len(data), rng.randbytes(len(data) % 5000)))


BYTES: tuple[Mutator, ...] = (
    *(flip_bits, truncate, cut_out, duplicate, splice, overwrite, insert_piece, set_integer, set_integer, add_bom),
    surround,
)


def recode(data: bytes, rng: Random) -> bytes:
    text = data.decode("utf-8", errors="replace")
    return text.encode(rng.choice(("utf-16", "utf-16-be", "utf-32", "latin-1", "utf-8-sig", "cp037")), errors="replace")


def line_ends(data: bytes, rng: Random) -> bytes:
    ends = (b"\r\n", b"\r", b"\n\r", b"\n\n\n", b"\x0b", "\u2028".encode())
    return data.replace(b"\n", rng.choice(ends))


def lines(data: bytes, rng: Random) -> bytes:
    """Lines shuffled, repeated, or left out."""
    rows = data.split(b"\n")
    picked = (rng.sample(rows, len(rows)), rows * 3, [r for r in rows if rng.random() < 0.7], rows[:1], rows[1:], rows)
    return b"\n".join(rng.choice(picked))


TEXT: tuple[Mutator, ...] = (recode, line_ends, lines, insert_piece, insert_piece)


def odd(rng: Random) -> object:
    """A JSON value that nobody expects."""
    nested: object = 1
    for _ in range(rng.choice((3, 300))):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    long = 10 ** rng.choice((10, 25, 400))
    return rng.choice(
        [
            *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, long, -long, 0.5, 1e308, float("nan"), float("inf")),
            *("", " ", "\0", "\ud800", "x" * 3000, "1", "true", "NaN", "\n\n\n", "\u202e", "../../etc", [], {}, nested),
            *([None], [1], ["a"], {"role": "user"}, [{"role": "user", "content": None}], {"": ""}, [[[]]], "\x1b[2J"),
            *({"role": "assistant", "content": "x"}, [{"role": "assistant", "content": "x"}], "lora", "x070", 1e-320),
        ]
    )


def nodes(value: object, found: list | None = None) -> list[tuple]:
    """(container, key) of everything inside `value`."""
    found = [] if found is None else found
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        found.append((value, key))
        if len(found) < 2000:
            nodes(item, found)
    return found


def change(value: object, rng: Random) -> object:
    """Another JSON value: a node replaced, removed, renamed or doubled."""
    places = nodes(value)
    if not places or rng.random() < 0.05:
        return odd(rng)
    for _ in range(rng.choice((1, 1, 2, 5))):
        box, key = rng.choice(places)
        if (isinstance(box, dict) and key not in box) or (isinstance(box, list) and key >= len(box)):
            continue
        what = rng.random()
        if what < 0.7:
            box[key] = odd(rng)
        elif what < 0.8:
            del box[key]
        elif isinstance(box, dict):
            box[rng.choice(("", " PROMPT ", "role", "text", "messages", str(key).upper(), "\0"))] = box[key]
        else:
            box.insert(key, box[rng.randrange(len(box))])
    return value


def json_values(data: bytes, rng: Random) -> bytes | None:
    """One JSON document, or one a line, with odd values in it."""
    try:
        whole = json.loads(data)
        return json.dumps(change(whole, rng)).encode()
    except (ValueError, RecursionError):
        rows = data.split(b"\n")
    at = rng.randrange(len(rows))
    try:
        rows[at] = json.dumps(change(json.loads(rows[at]), rng), ensure_ascii=rng.random() < 0.5).encode(
            "utf-8", errors="surrogatepass"
        )
    except (ValueError, RecursionError):
        return None
    return b"\n".join(rows)


JSON: tuple[Mutator, ...] = (json_values, json_values, json_values, *TEXT)


def cells(data: bytes, rng: Random) -> bytes | None:
    """A CSV with odd cells, columns or rows."""
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8"), newline="")))
    except (UnicodeDecodeError, csv.Error):
        return None
    rows = [row for row in rows if row]
    if not rows:
        return None
    words = ("nan", "inf", "-1", "1e400", "0", "", "1_000", "\u0661", "freeze", "lora", "full", "miss", "emb", "att")
    for _ in range(rng.choice((1, 2, 6))):
        row = rng.choice(rows)
        at = rng.randrange(len(row))
        row[at] = rng.choice((*words, str(odd(rng))[:5000], row[at] * 40, rng.choice(rng.choice(rows))))
    rng.choice((lambda: None, lambda: rows.append(rows[0]), lambda: rows[0].append("prompt"), lambda: rows[-1].pop()))()
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=rng.choice(("\n", "\r\n"))).writerows(rows)
    return text.getvalue().encode("utf-8", errors="surrogatepass")


CSV: tuple[Mutator, ...] = (cells, cells, cells, *TEXT)


def odd_tensor(tensor: torch.Tensor, rng: Random) -> object:
    """What a file may hold where a tensor of weights is expected."""
    kinds = (torch.int64, torch.bool, torch.complex64, torch.float16, torch.float64, torch.uint8, torch.float8_e4m3fn)
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

EVIL = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch code-was-run') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('touch code-was-run').read() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['__builtins__'] }}",
    "{{ messages.append({}) }}",
    "{{ messages.__class__ }}",
    "{{ ''|attr('__class__')|attr('__base__') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ namespace.__init__.__globals__ }}",
    "{% for x in range(10**9) %}{% endfor %}",
    "{{ 'a' * 10**12 }}",
    "{{ 9**9**9 }}",
    "{{ 'a'.ljust(10**11) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '{:>99999999999}'.format('a') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{{ range(99999)|list }}",
    "{{ lipsum(n=100000) }}",
    "{{ messages|tojson(indent=10**9) }}",
    "{{ strftime_now('%Y' * 100000) }}",
    "{{ raise_exception('no ' * 100000) }}",
    "{{ raise_exception('\x1b[2J') }}",
    "{{ [1]|sum(start='a') }}",
    "{{ 1/0 }}",
    "{{ undefined.x.y }}",
    "{% break %}",
    "{{ messages[10**30] }}",
    "{{ '\\ud800' }}",
)
# each costs the whole time that a template has: some of them are enough
SLOW = (
    "{% set n = 99999 %}{% for a in range(n) %}{% for b in range(n) %}{% endfor %}{% endfor %}",
    "{{ ('a' * 99999).replace('a', 'b' * 99999).replace('b', 'c' * 99999) | length }}",
)


def template(data: bytes, rng: Random) -> bytes:
    """A program that wants out of its sandbox, or never ends."""
    evil = rng.choice(SLOW) if rng.random() < 0.01 else rng.choice(EVIL)
    if data.lstrip().startswith(b'{"'):
        try:
            config = json.loads(data)
            config["chat_template"] = evil + str(config.get("chat_template"))
            return json.dumps(config).encode()
        except (ValueError, RecursionError, AttributeError):
            return data
    at = rng.choice((0, len(data), rng.randrange(len(data) + 1)))
    return data[:at] + evil.encode("utf-8", "surrogatepass") + data[at:]


JINJA: tuple[Mutator, ...] = (template, template, *TEXT)
